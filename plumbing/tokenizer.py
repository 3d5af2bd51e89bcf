"""Text to tokens and back, and conversations through a model's chat template.

Text from users is always plain text: "</s>" in a file becomes four characters, never a control
token. Control tokens come from two places alone: the template, and our end-of-text.
"""

import base64
import json
import os
import re
from itertools import islice
from pathlib import Path

import tiktoken

from plumbing.files import one_line
from plumbing.formats import plain_texts

EOT = "<|endoftext|>"
NOBODY = -1                     # in place of a turn's index: text that the template wrote

# The form of Tokenizer.pieces, for other programs.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
    "{{ 'Assistant:\n' if add_generation_prompt }}")


class Tokenizer:
    """Over a tiktoken.Encoding; HFTokenizer, below, is the same over a Hugging Face tokenizer."""

    def __init__(self, backend):
        self.backend = backend
        self.eot, self.vocab_size = backend.encode_single_token(EOT), backend.n_vocab
        self.bos = []                             # tokens that every prompt begins with

    def encode(self, text):
        """Tokens of plain text: text that spells a special token stays text."""
        return self.backend.encode_ordinary(text)

    def read_ahead(self, examples):
        """The same examples; their texts may be tokenised meanwhile, see HFTokenizer."""
        return examples

    def decode(self, ids):
        return self.backend.decode([int(i) for i in ids if i < self.vocab_size])

    def text(self, ids):
        """A response as text: without its end-of-text."""
        return self.decode([i for i in ids if i != self.eot])

    def prompt_ids(self, prompt):
        """A text as it is; a conversation by the template, up to where the answer begins."""
        if isinstance(prompt, str):
            return self.bos + self.encode(prompt)
        return [i for ids, _ in self.pieces(prompt, ask=True) for i in ids]

    def conversation(self, turns, *, end=True):
        """A conversation up to the assistant's last word: (ids, owner), a number per token.

            turns   user "Why?", assistant "No."
            ids     U s e r : . W h y ? . . A s s i s t a n t : . N o . <end>
            owner   -1 .......................................... 1 1 1 1

        owner is the index of the assistant's turn that a token belongs to, else -1. To a turn
        belong its content and the template's text up to the next end-of-text, if it writes one:
        so the model learns to stop. The last turn always has its end-of-text; with end=False it
        stops after its content. Tool calls are the template's own text.
        """
        ids, owner = [], []
        last = len(turns) - 1
        speaker = NOBODY
        content_end = 0
        for piece, turn in self.pieces(turns, ask=False):
            closing = 0
            if turn == NOBODY and self.eot in piece:
                closing = piece.index(self.eot) + 1
            owner += [speaker] * closing
            speaker = NOBODY
            if turn != NOBODY and turns[turn].role == "assistant":
                speaker = turn
            owner += [speaker] * (len(piece) - closing)
            ids += piece
            if turn == last:
                content_end = len(ids)
        if not content_end:
            raise ValueError("the last turn is nothing but tool calls: the template writes those")
        if not end:
            return ids[:content_end], owner[:content_end]
        n = max(i for i, turn in enumerate(owner) if turn == last) + 1
        if ids[n - 1] == self.eot:
            return ids[:n], owner[:n]
        return [*ids[:n], self.eot], [*owner[:n], last]

    def pieces(self, turns, ask):
        """[(ids, index of the turn whose content they are, or NOBODY)]; ask: for an answer.

        Without a template a turn is "User:\\n" (or System, Assistant, Tool), its content, for the
        assistant the end-of-text, and a blank line. Tool calls follow the content, as JSON.
        """
        pieces = [(self.bos, NOBODY)]
        text = ""                                 # of ours, not yet encoded
        for index, turn in enumerate(turns):
            text += f"{turn.role.capitalize()}:\n"
            content = _with_calls(turn)
            if turn.role == "assistant":
                pieces.append((self.encode(text), NOBODY))
                pieces.append((self.encode(content), index))
                pieces.append(([self.eot], NOBODY))
                text = "\n\n"
            else:
                text += content + "\n\n"
        if ask:
            text += "Assistant:\n"
        return [*pieces, (self.encode(text), NOBODY)]

    def save(self, folder):
        """What load_tokenizer reads, and what transformers' AutoTokenizer reads."""
        encoding = self.backend
        folder = Path(folder)
        tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
        (folder / "tiktoken.json").write_text(json.dumps({
            "name": encoding.name, "pat_str": encoding._pat_str,
            "mergeable_ranks": [base64.b64encode(token).decode() for token in tokens],
            "special_tokens": encoding._special_tokens}))
        _save_for_transformers(encoding, folder)


def _with_calls(turn):
    if "tool_calls" not in turn.more:
        return turn.content
    calls = json.dumps(json.loads(turn.more)["tool_calls"], ensure_ascii=False)
    return f"{turn.content}\n{calls}" if turn.content else calls


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer, with its chat template if it has one."""

    def __init__(self, backend):
        if backend.eos_token_id is None:
            raise SystemExit("--model: its tokenizer has no end-of-text token (eos_token)")
        self.backend, self.eot, self.vocab_size = backend, backend.eos_token_id, len(backend)
        self.known = {}                                    # texts that were tokenised ahead
        probe = backend("a").input_ids                     # does it begin with a BOS? ask it
        self.bos = [i for i in probe[:1] if i == backend.bos_token_id]
        special = [str(t) for t in backend.added_tokens_decoder.values() if t.special]
        self.control = re.compile("|".join(map(re.escape, special)))

    def encode(self, text):
        if text in self.known:
            return self.known[text]
        ids = self.backend(text, add_special_tokens=False, split_special_tokens=True)
        return ids.input_ids

    def read_ahead(self, examples):
        """The same examples. Their texts are tokenised 256 rows at a time, in threads."""
        examples = iter(examples)
        while some := list(islice(examples, 256)):
            texts = list({text for example in some for text in plain_texts(example)})
            if texts:
                ids = self.backend(texts, add_special_tokens=False, split_special_tokens=True)
                self.known = dict(zip(texts, ids.input_ids))
            yield from some
        self.known = {}

    def decode(self, ids):
        return self.backend.decode([int(i) for i in ids])

    def pieces(self, turns, ask):
        """The template is rendered around markers, and each content is encoded apart:

            messages   user [0:content]
            rendered   <|user|>[0:content]</s><|assistant|>

        so that only the template's own text can become a control token.
        """
        if not self.backend.chat_template:
            return super().pieces(turns, ask)
        hidden = []                                        # (text, index of its turn)

        def hide(text, turn=NOBODY):
            hidden.append((text, turn))
            return f"\u27e6{len(hidden) - 1}:content\u27e7"

        messages = [_message(turn, index, hide, self.control) for index, turn in enumerate(turns)]
        try:
            text = self.backend.apply_chat_template(messages, tokenize=False,
                                                    add_generation_prompt=ask)
        except Exception as error:                         # jinja's own errors, and transformers'
            raise ValueError(f"the chat template refuses this conversation: {one_line(error)}")
        # template, number, template, number, ..., template
        parts = re.split("\u27e6(\\d+):content\u27e7", text)
        own = parts[::2]
        numbers = [int(n) for n in parts[1::2]]
        if sorted(numbers) != list(range(len(hidden))) or re.search("[\u27e6\u27e7]", "".join(own)):
            roles = ", ".join(turn.role for turn in turns)
            raise ValueError(f"the chat template loses or changes a message; the roles are {roles}")
        pieces = [(self._template_ids(own[0]), NOBODY)]
        for number, after in zip(numbers, own[1:]):
            content, turn = hidden[number]
            pieces.append((self.encode(content), turn))
            pieces.append((self._template_ids(after), NOBODY))
        return pieces

    def _template_ids(self, text):
        """Tokens of the template's own text, where control tokens are control tokens."""
        return self.backend(text, add_special_tokens=False).input_ids if text else []

    def save(self, folder):
        self.backend.save_pretrained(folder)


def _message(turn, index, hide, control):
    """A turn as chat templates want it, its texts hidden."""
    message = {"role": turn.role, "content": ""}
    if turn.content or "tool_calls" not in turn.more:
        message["content"] = hide(turn.content, index)
    if turn.more:
        more = turn.more
        if control.pattern:                    # a tool call may spell a control token, too
            more = control.sub(lambda found: hide(found[0]), more)
        message.update(json.loads(more))
    return message


# --- loading and saving ---------------------------------------------------------------------------

def load_tokenizer(name=None, *, trust_remote_code=False):
    """A tokenizer: bytes (no name), or that of a folder or of a name of the Hugging Face hub.

    A folder has tiktoken.json (ours), vocab.bpe + encoder.json (GPT-2's) or tokenizer.json.
    """
    if name is None:
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=r"[^\n]+|\n",
                                           mergeable_ranks={bytes([i]): i for i in range(256)},
                                           special_tokens={EOT: 256}))
    folder = Path(name)
    if (folder / "tiktoken.json").is_file():
        return Tokenizer(_our_encoding(folder))
    if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
        return Tokenizer(_gpt2_encoding(folder))
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    local = any((folder / file).is_file() for file in files)
    if folder.exists() and not local:
        raise SystemExit(f"--tokenizer {folder}: no tokenizer there; expected tiktoken.json, "
                         "vocab.bpe + encoder.json, or tokenizer.json")
    try:
        if str(name) == "gpt2" and not local:
            return Tokenizer(tiktoken.get_encoding("gpt2"))
        from transformers import AutoTokenizer
        backend = AutoTokenizer.from_pretrained(name, local_files_only=local,
                                                trust_remote_code=trust_remote_code)
    except Exception as error:         # many libraries' own: broken files, offline, no such name
        raise SystemExit(f"--tokenizer {name}: cannot be read, from a folder or online "
                         f"({one_line(error)})")
    return HFTokenizer(backend)


def _our_encoding(folder):
    saved = json.loads((folder / "tiktoken.json").read_text())
    tokens = [base64.b64decode(token) for token in saved["mergeable_ranks"]]
    return tiktoken.Encoding(saved["name"], pat_str=saved["pat_str"],
                             special_tokens=saved["special_tokens"],
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


def _gpt2_encoding(folder):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")   # else it caches files by path: they go stale
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def _save_for_transformers(encoding, folder):
    """tokenizer.json and its config: the same tokens, and our form of conversations."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class FromMemory(TikTokenConverter):
        def load_tiktoken_bpe(self, ranks):
            return ranks

    copy = FromMemory(encoding._mergeable_ranks, encoding._pat_str).converted()
    copy.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    copy.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT,
        "clean_up_tokenization_spaces": False, "chat_template": PLAIN_TEMPLATE}))

"""Text to tokens and back. For conversations see chat.py.

Text from users is always plain text: "</s>" in a file becomes four characters, never a control
token. Control tokens come only from the chat template and from our end-of-text.
"""

import base64
import json
import os
import re
from functools import cached_property
from itertools import islice
from pathlib import Path

import tiktoken

from plumbing import chat
from plumbing.reading import read_json, reading
from plumbing.formats import plain_texts

EOT = "<|endoftext|>"


class Tokenizer:
    """Wraps a tiktoken.Encoding. HFTokenizer below wraps a Hugging Face tokenizer."""

    has_template = False
    wrap = False                                  # --chat: a prompt's text is a user's turn
    also_stops = ()                               # more stop tokens, from the model's folder

    def __init__(self, backend):
        self.backend = backend
        self.eot, self.vocab_size = backend.encode_single_token(EOT), backend.n_vocab
        self.bos = []                             # tokens that every prompt begins with
        self.added = re.compile(re.escape(EOT))
        self.control = spellings([EOT])

    def encode(self, text, control=False, follow=False):
        """Tokens of text. What spells a control token becomes one only with `control`.

        follow: the text continues other text. Some tokenizers put a blank, "\u2581", before a text,
        but not after a line break. So we put a line break before it and remove its tokens.
        """
        if not follow or not text:
            return self.encode_whole(text, control)
        before = self.encode_whole("\n", control)
        ids = self.encode_whole("\n" + text, control)
        if ids[:len(before)] == before:
            return ids[len(before):]
        return self.encode_whole(text, control)

    def encode_whole(self, text, control):
        if control:
            return self.backend.encode(text, allowed_special="all")
        return self.backend.encode_ordinary(text)

    def read_ahead(self, examples):
        """Yield the examples; HFTokenizer tokenises their texts ahead of time."""
        return examples

    def decode(self, ids):
        return self.backend.decode([int(i) for i in ids if i < self.vocab_size])

    def text(self, ids):
        """A response as text, without its stop tokens."""
        return self.decode([i for i in ids if i not in self.stops])

    def prompt_ids(self, prompt):
        """A text as it is; a conversation by the template, up to where the answer begins."""
        return chat.prompt_ids(prompt, self)

    @cached_property
    def end_of_turn(self):
        return chat.find_end_of_turn(self)

    @cached_property
    def stops(self):
        """Sampling stops at these: end of turn, end-of-text, and those of the model's folder."""
        return list(dict.fromkeys([self.end_of_turn.token, self.eot, *self.also_stops]))

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


def spellings(tokens):
    """A pattern of what text from users must not become: control tokens and chat.py's marks."""
    marks = [chat.OPEN, chat.CLOSE]
    longest_first = sorted([*tokens, *marks], key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer, with its chat template if it has one.

    settings: {"template_args": {...}, "wrap": True}, from the command line. They are saved with
    the tokenizer, because the model must be used with the template settings of its training.
    """

    def __init__(self, backend, settings=None):
        if backend.eos_token_id is None:
            raise SystemExit("--model: its tokenizer has no end-of-text token (eos_token)")
        self.backend, self.eot, self.vocab_size = backend, backend.eos_token_id, len(backend)
        self.known = {}                                    # texts that were tokenised ahead
        probe = backend("a").input_ids                     # shows if texts begin with a BOS
        self.bos = [i for i in probe[:1] if i == backend.bos_token_id]
        tokens = backend.added_tokens_decoder.values()
        self.added = re.compile("|".join(re.escape(str(token)) for token in tokens))
        self.control = spellings([str(token) for token in tokens if token.special])
        settings = backend.init_kwargs.get("nanokto", {}) | (settings or {})
        self.template_args = settings.get("template_args", {})
        self.wrap = settings.get("wrap", False)
        if settings:
            backend.init_kwargs["nanokto"] = settings

    @property
    def has_template(self):
        return bool(self.backend.chat_template)

    def encode_whole(self, text, control):
        if not control and text in self.known:
            return self.known[text]
        ids = self.backend(text, add_special_tokens=False, split_special_tokens=not control)
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

    def save(self, folder):
        self.backend.save_pretrained(folder)


# --- loading and saving ---------------------------------------------------------------------------

def load_tokenizer(name=None, *, trust_remote_code=False, settings=None):
    """A tokenizer: bytes (no name), or that of a folder or of a name of the Hugging Face hub.

    A folder has tiktoken.json (ours), vocab.bpe + encoder.json (GPT-2's) or tokenizer.json.
    settings: for conversations, see HFTokenizer.
    """
    if name is None:
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=r"[^\n]+|\n",
                                           mergeable_ranks={bytes([i]): i for i in range(256)},
                                           special_tokens={EOT: 256}))
    folder = Path(name)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    local = any((folder / file).is_file() for file in files)
    ours = (folder / "tiktoken.json").is_file()
    gpt2 = (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file()
    if folder.exists() and not (local or ours or gpt2):
        raise SystemExit(f"--tokenizer {folder}: no tokenizer there; expected tiktoken.json, "
                         "vocab.bpe + encoder.json, or tokenizer.json")
    with reading(f"--tokenizer {name}"):
        if ours:
            return Tokenizer(_our_encoding(folder))
        if gpt2:
            return Tokenizer(_gpt2_encoding(folder))
        if str(name) == "gpt2" and not local:
            return Tokenizer(tiktoken.get_encoding("gpt2"))
        from transformers import AutoTokenizer
        backend = AutoTokenizer.from_pretrained(name, local_files_only=local,
                                                trust_remote_code=trust_remote_code)
        tokenizer = HFTokenizer(backend, settings)
        tokenizer.also_stops = stops_of(folder / "generation_config.json")
        return tokenizer


def stops_of(file):
    """eos_token_id of a generation_config.json: a number, a list, or nothing."""
    if not file.is_file():
        return []
    found = read_json(file, file.parent).get("eos_token_id")
    if found is None:
        return []
    stops = found if isinstance(found, list) else [found]
    if not all(type(stop) is int for stop in stops):
        raise ValueError(f"generation_config.json: eos_token_id is {found!r:.60}")
    return stops


def chat_settings(config):
    """Settings for conversations from the command line; the tokenizer's folder may have others.

    --template_args enable_thinking=false date=today
    -> {"template_args": {"enable_thinking": False, "date": "today"}}
    """
    settings = {"wrap": True} if config.chat else {}
    args = {}
    for word in config.template_args:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise SystemExit(f"--template_args {word}: expected NAME=VALUE, "
                             "such as enable_thinking=false")
        try:
            args[name] = json.loads(value)
        except ValueError:                                 # not JSON: a text
            args[name] = value
    if args:
        settings["template_args"] = args
    return settings


def _our_encoding(folder):
    saved = read_json(folder / "tiktoken.json", f"--tokenizer {folder}")
    tokens = [base64.b64decode(token) for token in saved["mergeable_ranks"]]
    if not {bytes([i]) for i in range(256)} <= set(tokens):
        raise ValueError("mergeable_ranks lack a byte")
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
        "clean_up_tokenization_spaces": False, "chat_template": chat.PLAIN_TEMPLATE}))

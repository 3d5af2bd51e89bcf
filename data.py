"""From a line of JSON to a batch on the device: every step one function, nothing mutable on the way.

    {"prompt": ..., "completion": ..., "label": true}     a line of a file
      read      -> Feedback | Pair       typed, immutable; every complaint names file and row
      encode    -> Row                   ids = prompt ++ response ++ [end-of-text], mask = 0..0 1..1
      batches   -> Batch                 rows of one global batch, and for each row a partner with another prompt
      flatten   -> Flat                  one flat row of tokens on the device; nobody ever sees a pad

What a row trains is its MASK: a float per token, 1 on the response. Prompt and response are encoded apart and joined, so
no token straddles the border, and text from users is always plain text: "</s>" in a file never becomes a control token.

`python data.py FILE` shows the first batch in colour.
"""

import base64
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


# --- files to examples ------------------------------------------------------------------------------------------------

class Turn(NamedTuple):
    role: str                                     # system, user, assistant, tool
    content: str


@dataclass(frozen=True, slots=True)
class Feedback:
    """One response with a thumb up or down."""
    prompt: str | tuple[Turn, ...]
    completion: str
    desirable: bool
    whole: bool = True                            # False: the completion was cut when it was sampled, so it has no end
    where: str = ""                               # file and row, for messages


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the first preferred. Scores where the file has them."""
    prompt: str | tuple[Turn, ...]
    chosen: str
    rejected: str
    score_chosen: float | None = None
    score_rejected: float | None = None
    win_prob_chosen: float | None = None
    win_prob_rejected: float | None = None
    target: str | None = None                     # a third response, SLiC's y_ref
    whole: bool = True
    where: str = ""


def read(files, *, columns=None, threshold=None):
    """Examples of one or several files (.jsonl: a JSON object per line; .json: an array of objects) and the format's name.

    columns: {"prompt": "question", ...} renames the file's columns to ours first.
    threshold: turns a numeric `reward` (or `score`) into a label: desirable if and only if reward > threshold.
    Raises SystemExit with one line that names the file, the row and what would have been valid.
    """
    examples, formats = [], Counter()
    for file in [files] if isinstance(files, (str, Path)) else files:
        for where, record in _records(Path(file)):
            name, example = parse(record, where, columns=columns or {}, threshold=threshold)
            formats[name] += 1
            examples.append(example)
    if not examples:
        raise SystemExit(f"--data {files}: no rows in it")
    if len({type(e) for e in examples}) > 1:
        odd = next(e for e in examples if type(e) is not type(examples[0]))
        raise SystemExit(f"{odd.where}: mixes pairs and single responses: the rows before are {type(examples[0]).__name__}, this one is {type(odd).__name__}")
    return examples, ", ".join(formats)


def _records(file):
    if not file.is_file():
        raise SystemExit(f"--data {file}: no such file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SystemExit(f"--data {file}: not UTF-8 at byte {e.start}")
    except OSError as e:
        raise SystemExit(f"--data {file}: {e.strerror}")
    if not text.strip():
        raise SystemExit(f"--data {file}: the file is empty")
    if text.lstrip()[0] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as e:
            raise SystemExit(f"--data {file}: line {e.lineno}: broken JSON ({e.msg})")
        yield from ((f"{file}: record {i}", r) for i, r in enumerate(rows, 1))
        return
    for i, line in enumerate(text.split("\n"), 1):     # not splitlines: it also breaks at form feeds and U+0085 inside strings
        if line.strip():
            try:
                yield f"{file}: line {i}", json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(f"--data {file}: line {i}: broken JSON ({e.msg}); expected one object per line, or one array")


# name -> columns that must be there; the first format whose columns are all there is taken
FORMATS = {
    "paired conversations": ("conversations", "chosen", "rejected"),
    "prompt, chosen, rejected": ("prompt", "chosen", "rejected"),
    "whole chats: chosen, rejected": ("chosen", "rejected"),
    "messages + label": ("messages", "label"),
    "conversations + label": ("conversations", "label"),
    "prompt, completion, label": ("prompt", "completion", "label"),
    "scored: prompt, completion, reward": ("prompt", "completion", "reward"),
}
PAIR_NUMBERS = ("score_chosen", "score_rejected", "win_prob_chosen", "win_prob_rejected")                   # optional, per pair
ALIASES = {"text": "completion", "response": "completion", "score": "reward", "kto_tag": "label"}


def parse(record, where="", *, columns=None, threshold=None):
    """One JSON object to (format name, Feedback or Pair)."""
    if not isinstance(record, dict):
        raise SystemExit(f"{where}: expected a JSON object with columns, got {type(record).__name__}")
    for ours, theirs in (columns or {}).items():
        if theirs not in record:
            raise SystemExit(f"{where}: --columns {ours}={theirs}, but the row has {', '.join(record)}")
        record = {**record, ours: record[theirs]}
    for theirs, ours in ALIASES.items():
        if theirs in record and ours not in record:
            record = {**record, ours: record[theirs]}
    name = next((n for n, needs in FORMATS.items() if all(k in record for k in needs)), None)
    if name is None:
        raise SystemExit(f"{where}: unknown format with columns {', '.join(k if k.isprintable() else repr(k) for k in record) or '(none)'}; known: "
                         + "; ".join(" + ".join(needs) for needs in FORMATS.values()))

    whole = record.get("truncated") is not True and record.get("finish_reason") != "length"
    if "chosen" in FORMATS[name]:
        numbers = {k: _number(record[k], k, where) for k in PAIR_NUMBERS if record.get(k) is not None}
        if name.startswith("whole"):                       # the turns that both chats share are the prompt, never a common prefix of text
            chats = [_turns(record[k], where) for k in ("chosen", "rejected")]
            n = next((i for i, (a, b) in enumerate(zip(*chats)) if a != b), min(map(len, chats)))
            prompt, (chosen, rejected) = chats[0][:n], ([t._asdict() for t in c[n:]] for c in chats)
        else:
            prompt = _prompt(record["conversations" if name.startswith("paired") else "prompt"], where)
            chosen, rejected = record["chosen"], record["rejected"]
        return name, Pair(prompt, _answer(chosen, "chosen", where), _answer(rejected, "rejected", where), whole=whole, where=where,
                          target=None if record.get("target") is None else _answer(record["target"], "target", where), **numbers)
    if "label" in FORMATS[name]:
        desirable = _label(record["label"], where)
    elif threshold is None:
        raise SystemExit(f"{where}: scored rows need --threshold NUMBER (desirable: reward > NUMBER)")
    else:
        desirable = _number(record["reward"], "reward", where) > threshold
    if "prompt" in FORMATS[name]:
        prompt, completion = _prompt(record["prompt"], where), _answer(record["completion"], "completion", where)
    else:                                                       # a conversation: its last turn is what the label is about
        turns = _turns(record["messages" if "messages" in FORMATS[name] else "conversations"], where)
        if turns[-1].role != "assistant":
            raise SystemExit(f"{where}: the last message is the {turns[-1].role}'s; the label needs an assistant's answer there")
        prompt, completion = turns[:-1], turns[-1].content
    return name, Feedback(prompt, completion, desirable, whole, where)


def _label(x, where):
    """Strictly true/false, 1/0 or +1/-1. A guess from text ("true", "good") would one day guess wrong."""
    if isinstance(x, (bool, int)) and x in (-1, 0, 1):
        return x == 1
    raise SystemExit(f"{where}: label is {x!r}; valid are true, false, 1, 0, -1")


def _number(x, column, where):
    try:
        if not isinstance(x, bool) and isinstance(x, (int, float)) and math.isfinite(x):
            return float(x)
    except OverflowError:                                                             # an integer beyond float's range
        pass
    raise SystemExit(f"{where}: {column} is {str(x)[:40]!r}; expected a finite number")


def _text(x, where):
    if any("\ud800" <= c <= "\udfff" for c in x):
        raise SystemExit(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no text")
    return x


def _prompt(x, where):
    return _text(x, where) if isinstance(x, str) else _turns(x, where)


def _answer(x, column, where):
    if isinstance(x, str):
        return _text(x, where)
    turns = _turns(x if isinstance(x, list) else [x], where)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise SystemExit(f"{where}: {column} must be a text or one assistant message, got roles {[t.role for t in turns]}")
    return turns[0].content


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
         "function_call": "assistant", "observation": "tool"}


def _turns(x, where):
    """A list of messages, {role, content} or LLaMA-Factory's {from, value}, as a tuple of turns."""
    turns = []
    for m in x if isinstance(x, list) and x else [None]:
        role, content = (m.get("role", m.get("from")), m.get("content", m.get("value"))) if isinstance(m, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise SystemExit(f"{where}: expected a text or a list of messages with a role ({', '.join(ROLES)}) and a text content")
        turns.append(Turn(ROLES[role], _text(content, where)))
    return tuple(turns)


def to_feedback(examples):
    """Pairs become labels: the chosen response is desirable, the rejected one undesirable. Feedback passes through."""
    out = []
    for e in examples:
        out += [e] if isinstance(e, Feedback) else [Feedback(e.prompt, e.chosen, True, e.whole, e.where),
                                                    Feedback(e.prompt, e.rejected, False, e.whole, e.where)]
    return out


# --- tokenizers -------------------------------------------------------------------------------------------------------

EOT = "<|endoftext|>"


class Tokenizer:
    """A tiktoken.Encoding or a Hugging Face tokenizer behind four words: encode, decode, eot, prompt_ids."""

    def __init__(self, backend):
        self.backend, self.hf = backend, not isinstance(backend, tiktoken.Encoding)
        if self.hf:
            if backend.eos_token_id is None:
                raise SystemExit("--model: its tokenizer has no end-of-text token (eos_token); add one to tokenizer_config.json")
            self.eot, self.vocab_size = backend.eos_token_id, len(backend)
            probe = backend("a").input_ids                                 # "BOS as the tokenizer says": ask it
            self.bos = [backend.bos_token_id] if probe and probe[0] == backend.bos_token_id else []
        else:
            self.eot, self.vocab_size, self.bos = backend.encode_single_token(EOT), backend.n_vocab, []

    def encode(self, text):
        """Tokens of plain text: text that spells a special token stays text."""
        if not self.hf:
            return self.backend.encode_ordinary(text)
        return self.backend(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if not self.hf:
            return self.backend.decode([i for i in ids if i < self.backend.n_vocab])
        return self.backend.decode(ids)

    def text(self, ids):
        """A response as text: without its end-of-text."""
        return self.decode([i for i in ids if i != self.eot])

    def prompt_ids(self, prompt):
        """A text is encoded as it is. A conversation goes through the model's chat template; without one, through this:

        each turn is "User:\\n" (or System, Assistant, Tool), its content and a blank line; then "Assistant:\\n".
        """
        if isinstance(prompt, str):
            return self.bos + self.encode(prompt)
        if self.hf and self.backend.chat_template:
            return self._chat_ids(prompt)
        text = "".join(f"{t.role.capitalize()}:\n{t.content}\n\n" for t in prompt)
        return self.bos + self.encode(text + "Assistant:\n")

    def _chat_ids(self, turns):
        """The template is rendered around markers and each content encoded apart, so that only the template's own text can
        become a control token. ValueError where the template refuses the conversation, or loses or changes a content."""
        marks = [f"\u27e6{i}:content\u27e7" for i in range(len(turns))]
        try:
            text = self.backend.apply_chat_template([{"role": t.role, "content": m} for t, m in zip(turns, marks)],
                                                    tokenize=False, add_generation_prompt=True)
        except Exception as e:                                                                  # jinja's own errors, and transformers'
            raise ValueError(f"the chat template refuses this conversation: {' '.join(str(e).split())}") from None
        if re.findall("\u27e6|\u27e7", text) != ["\u27e6", "\u27e7"] * len(marks) or [m for m in marks if m not in text]:
            raise ValueError(f"the chat template loses or changes a message; the roles are {', '.join(t.role for t in turns)}")
        ids = []
        for piece in re.split("(" + "|".join(map(re.escape, marks)) + ")", text):
            content = turns[marks.index(piece)].content if piece in marks else None
            ids += self.backend(piece, add_special_tokens=False).input_ids if content is None else self.encode(content)
        return ids

    def save(self, folder):
        if self.hf:
            self.backend.save_pretrained(folder)
            return
        b = self.backend
        ranks = [base64.b64encode(token).decode() for token, _ in sorted(b._mergeable_ranks.items(), key=lambda x: x[1])]
        (Path(folder) / "tiktoken.json").write_text(json.dumps(
            dict(name=b.name, pat_str=b._pat_str, mergeable_ranks=ranks, special_tokens=b._special_tokens)))


def load_tokenizer(folder=None):
    """A tokenizer: bytes (no folder), ours (tiktoken.json), GPT-2's (vocab.bpe + encoder.json), or a Hugging Face folder."""
    if folder is None:
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=r"[^\n]+|\n", special_tokens={EOT: 256},
                                           mergeable_ranks={bytes([i]): i for i in range(256)}))
    folder = Path(folder)
    if (folder / "tiktoken.json").is_file():
        d = json.loads((folder / "tiktoken.json").read_text())
        return Tokenizer(tiktoken.Encoding(d["name"], pat_str=d["pat_str"], special_tokens=d["special_tokens"],
                                           mergeable_ranks={base64.b64decode(t): i for i, t in enumerate(d["mergeable_ranks"])}))
    if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")                # tiktoken would cache local files by path, and go stale
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        return Tokenizer(tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}))
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise SystemExit(f"--tokenizer {folder}: no tokenizer there; expected tiktoken.json, vocab.bpe + encoder.json, or tokenizer.json")
    from transformers import AutoTokenizer
    return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


# --- examples to rows -------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Row:
    """One sequence. ids (T,) int32 = prompt ++ response; mask (T,) float32, > 0 on the tokens that count; read-only arrays."""
    ids: np.ndarray
    mask: np.ndarray
    n_prompt: int
    desirable: bool = True
    where: str = ""
    score: float | None = None                    # of the response, where a pair has scores
    win_prob: float | None = None

    @property
    def prompt_key(self):
        """What the model sees of the prompt. Two prompts that were cut to the same tokens are the same prompt."""
        return self.ids[:self.n_prompt].tobytes()

    @property
    def response(self):
        return self.ids[self.n_prompt:]


def make_row(prompt, response, *, desirable=True, where="", train_prompt=False, score=None, win_prob=None):
    ids = np.array([*prompt, *response], dtype=np.int32)
    mask = np.ones(len(ids), np.float32)
    mask[:1 if train_prompt else len(prompt)] = 0                    # nothing predicts the very first token
    ids.setflags(write=False), mask.setflags(write=False)
    return Row(ids, mask, len(prompt), desirable, where, score, win_prob)


def encode(examples, tokenizer, *, max_len=1024, max_prompt_len=512, add_eot=True, train_prompt=False):
    """Feedback to rows, pairs to (chosen, rejected) tuples of rows; and a Counter of what happened to them.

    A prompt that is too long loses its LEFT end (the question is at the right), a response its RIGHT end; a response that
    was cut, here or by whoever sampled it, gets no end-of-text, since teaching the model to stop there would be wrong.
    Rows with an empty (or blank) response are dropped, and pairs whose sides are the same; duplicates are kept. All of it
    is counted.
    """
    if max_len < 2 or max_prompt_len < 1:
        raise ValueError(f"max_len is {max_len} and max_prompt_len {max_prompt_len}; a row needs a prompt token and a response token")
    out, counts, seen, labels = [], Counter(read=0, desirable=0, undesirable=0), set(), {}
    max_prompt_len = min(max_prompt_len, max_len - 1)

    def response_row(prompt, text, e, desirable, **more):
        response = tokenizer.encode(text) + ([tokenizer.eot] if add_eot and e.whole else [])
        if len(response) > max_len - len(prompt):
            counts["response cut from the right"] += 1
            response = response[:max_len - len(prompt)]
        return make_row(prompt, response, desirable=desirable, where=e.where, train_prompt=train_prompt, **more)

    for e in examples:
        counts["read"] += 1
        if not all(t.strip() for t in ([e.completion] if isinstance(e, Feedback) else [e.chosen, e.rejected])):
            counts["dropped: empty response"] += 1
            continue
        try:
            prompt = tokenizer.prompt_ids(e.prompt) or [tokenizer.eot]          # an empty prompt: begin as after a document's end
        except ValueError as why:
            raise SystemExit(f"{e.where}: {why}") from None
        if len(prompt) > max_prompt_len:
            counts["prompt cut from the left"] += 1
            n_bos = len(tokenizer.bos) if prompt[:1] == tokenizer.bos else 0
            prompt = prompt[:n_bos] + prompt[len(prompt) - max_prompt_len + n_bos:]
        if isinstance(e, Feedback):
            row = response_row(prompt, e.completion, e, e.desirable)
            out.append(row)
            counts["desirable" if e.desirable else "undesirable"] += 1
            key = (row.ids.tobytes(), row.n_prompt, e.desirable)
            labels.setdefault(row.prompt_key, set()).add(e.desirable)
        else:
            pair = (response_row(prompt, e.chosen, e, True, score=e.score_chosen, win_prob=e.win_prob_chosen),
                    response_row(prompt, e.rejected, e, False, score=e.score_rejected, win_prob=e.win_prob_rejected))
            if pair[0].ids.tobytes() == pair[1].ids.tobytes():                     # as the model sees them, after cutting
                counts["dropped: chosen is rejected"] += 1
                continue
            if e.target and e.target.strip():
                pair += (response_row(prompt, e.target, e, True),)
            out.append(pair)
            counts["pairs"] += 1
            key = (pair[0].ids.tobytes(), pair[1].ids.tobytes())
            labels.setdefault(pair[0].prompt_key, set())
        counts["duplicates (kept)"] += key in seen
        seen.add(key)
    counts["prompts"] = len(labels)
    counts["prompts with both labels"] = sum(len(v) == 2 for v in labels.values())
    return out, +counts


def length_desensitised(pair, alpha):
    """LD-DPO: mask 1 on the first min(n_w, n_l) response tokens of both, alpha on the longer one's tail."""
    shared = min(len(row.response) for row in pair)

    def masked(row):
        mask = row.mask.copy()
        mask[row.n_prompt + shared:] *= alpha
        mask.setflags(write=False)
        return replace(row, mask=mask)

    return tuple(masked(row) for row in pair)


def mismatched(row, partner, max_len):
    """(x, y'): this row's prompt with another row's response, cut from the right where both together are too long."""
    response = partner.response[:max_len - row.n_prompt]
    return make_row(row.ids[:row.n_prompt], response, desirable=row.desirable, where=row.where)


class Flat(NamedTuple):
    """Sequences end to end, on the device: what a policy's forward takes, and what turns its answer into one number each."""
    ids: torch.Tensor                                # (N,)
    positions: torch.Tensor                          # (N,)
    lengths: list                                    # (B,), or less: a prompt with several responses is one (p, n_1, n_2, ...)
    predict: torch.Tensor                            # (M,) the token before each token with mask > 0
    targets: torch.Tensor                            # (M,)
    mask: torch.Tensor                               # (M,) its weight
    sequence: torch.Tensor                           # (M,) whose it is
    rows: int                                        # B

    def sums(self, logps):
        """sum_t mask_t log pi(y_t | x, y_<t) of each sequence.   (M,) -> (B,)"""
        return logps.new_zeros(self.rows).index_add(0, self.sequence, logps * self.mask.to(logps.dtype))


def flatten(rows, device="cpu", share=False):
    """Rows end to end. share: consecutive rows with one prompt become [x][y_1][y_2]...; the prompt is there, and computed, once."""
    lengths, parts, at = [], [], 0
    for i, r in enumerate(rows):
        cut = r.n_prompt if share and i and may_share(rows[i - 1], r) else 0
        n = len(r.ids) - cut
        before = np.arange(at - 1, at - 1 + n)                          # the token that predicts each token: the one to its left,
        if cut:                                                         # for a response's first the prompt's last
            before[0] = prompt_end
            lengths[-1] = (*lengths[-1], n) if isinstance(lengths[-1], tuple) else (cut, lengths[-1] - cut, n)
        else:
            prompt_end = at + r.n_prompt - 1
            lengths.append(n)
        parts.append((r.ids[cut:], r.mask[cut:], np.arange(cut, len(r.ids)), before, np.full(n, i)))
        at += n
    ids, mask, positions, before, sequence = (np.concatenate(column) for column in zip(*parts))
    trained = np.flatnonzero(mask)
    columns = (ids, positions, before[trained], ids[trained], mask[trained], sequence[trained])
    ids, positions, predict, targets, mask, sequence = (
        torch.from_numpy(c if c.dtype == np.float32 else c.astype(np.int64)).to(device) for c in columns)
    return Flat(ids, positions, lengths, predict, targets, mask, sequence, len(rows))


def may_share(first, row):
    """Has `row` the prompt of `first`, and does nothing in it train? Then its response can follow theirs."""
    p = row.n_prompt
    return 0 < p < len(row.ids) and p == first.n_prompt and np.array_equal(row.ids[:p], first.ids[:p]) and not row.mask[:p].any()


def token_batches(rows, budget):
    """Rows (or tuples of rows) in consecutive slices (ranges of indices) of at most `budget` tokens, but one item at least."""
    start, tokens = 0, 0
    for i, item in enumerate(rows):
        n = sum(len(r.ids) for r in ([item] if isinstance(item, Row) else item))
        if i > start and tokens + n > budget:
            yield range(start, i)
            start, tokens = i, 0
        tokens += n
    if len(rows):
        yield range(start, len(rows))


# --- rows to global batches -------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    step: int
    epoch: float                                     # epochs done when this batch is done
    rows: list                                       # indices of the loss rows
    partners: list                                   # for each of them the row whose response is its y'


@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """The order of rows in an epoch: a function of (n, seed, epoch) and nothing else, so any rank or resumed run knows it."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)                                         # it is cached: nobody may change it for the others
    return order


def steps_per_epoch(n, batch_size):
    return -(-n // batch_size)


def batch_at(prompts, batch_size, *, seed, step):
    """The global batch of one step. prompts: a hashable key per row of the data set; the last batch of an epoch may be short.

    Partners come from the batch itself. A batch with a single distinct prompt (a short last one, say) borrows them from the
    rows that follow in the epoch's order, wrapping.
    """
    n = len(prompts)
    epoch, k = divmod(step, steps_per_epoch(n, batch_size))
    order = epoch_order(n, seed, epoch)
    rows = order[k * batch_size:(k + 1) * batch_size].tolist()
    done = epoch + min(1.0, (k + 1) * batch_size / n)
    keys = [prompts[i] for i in rows]
    if len(set(keys)) > 1:
        return Batch(step, done, rows, [rows[j] for j in mismatch(keys)])
    following = np.roll(order, -k * batch_size).tolist()
    others = [i for i in following if prompts[i] != keys[0]][:len(rows)]
    return Batch(step, done, rows, [others[j % len(others)] for j in range(len(rows))] if others else [])


def mismatch(prompts):
    """For each row i the index j of a row with ANOTHER prompt: y_j is then no answer to x_i.   list -> list of int

    Rows are grouped by prompt and the list of groups is turned by the size of the largest, m. No group is longer than m, so
    nobody lands in their own group; it is a permutation whenever the turn fits, 2 m <= n. If one prompt holds more than
    half of the rows there are too few others to go round, and partners repeat. ValueError if all prompts are the same.
    """
    groups = {}
    for i, p in enumerate(prompts):
        groups.setdefault(p, []).append(i)
    if len(groups) < 2:
        raise ValueError(f"mismatched pairs need two distinct prompts, got {len(groups)} in {len(prompts)} rows")
    largest = max(groups.values(), key=len)
    ordered = [i for g in groups.values() for i in g]
    n, m = len(ordered), len(largest)
    partner = [0] * n
    if 2 * m <= n:
        for k, i in enumerate(ordered):
            partner[i] = ordered[(k + m) % n]
        return partner
    others = [i for i in ordered if prompts[i] != prompts[largest[0]]]
    for k, i in enumerate(largest):
        partner[i] = others[k % len(others)]
    for k, i in enumerate(others):
        partner[i] = largest[k]
    return partner


def lambda_weights(n_desirable, n_undesirable, *, ratio=4 / 3):
    """(lambda_d, lambda_u) with lambda_d n_d / (lambda_u n_u) = ratio and the smaller of the two equal to 1.

    KTO, Eq. 9 (version 4; the first version and TRL say 4/3 at most): the ratio belongs in [1, 3/2], so that a rare class is not drowned.
    A count of 0 gives (1.0, 1.0): nothing to balance.
    """
    if not 1 <= ratio <= 1.5:
        raise ValueError(f"ratio is {ratio}; KTO's Eq. 9 asks for 1 <= ratio <= 3/2")
    if n_desirable == 0 or n_undesirable == 0:
        return 1.0, 1.0
    lambda_d = ratio * n_undesirable / n_desirable                                                  # with lambda_u = 1
    return (lambda_d, 1.0) if lambda_d >= 1 else (1.0, 1 / lambda_d)


# --- python data.py FILE ----------------------------------------------------------------------------------------------

def counts_line(counts):
    return " | ".join(f"{k} {v:,}" for k, v in counts.items())


def parse_columns(text):
    """"prompt=question,completion=answer" -> {"prompt": "question", ...}"""
    columns, known = {}, sorted({c for needs in FORMATS.values() for c in needs})
    for item in filter(None, text.split(",")):
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in known:
            raise SystemExit(f"--columns {text}: {item!r} is not of the form OURS=THEIRS with OURS one of {', '.join(known)}")
        columns[ours] = theirs
    return columns


def cut_hint(examples, add_eot):
    """A line of advice where most responses seem to have been cut when they were sampled, or None."""
    whole = [e.completion.rstrip() for e in examples if e.whole and e.completion.strip()]
    ended = sum(t[-1] in ".!?\"')]}>`*:;\u3002\uff01\uff1f\u201d" for t in whole)
    if add_eot and len(whole) >= 20 and ended < 0.5 * len(whole):
        return (f"note: only {ended} of {len(whole)} responses end like a sentence. If they were cut when sampled, "
                "--add_eot false keeps the model from learning to stop there.")


def show(rows, batch, tokenizer, max_len, limit=8):
    """The batch as text: prompt grey, trained tokens green or red by label, end-of-text marked, partner's response blue."""
    grey, green, red, blue, bold, off = (f"\033[{c}m" if sys.stdout.isatty() or os.environ.get("FORCE_COLOR") else ""
                                         for c in (90, 32, 31, 34, 1, 0))
    for i, j in list(zip(batch.rows, batch.partners or [None] * len(batch.rows)))[:limit]:
        r = rows[i]
        trained = [t for t, m in zip(r.ids, r.mask) if m > 0]
        print(f"{bold}{r.where or f'row {i}'}{off}  {'desirable' if r.desirable else 'undesirable'}, "
              f"{r.n_prompt} prompt + {len(trained)} trained tokens")
        print(f"  {grey}{tokenizer.decode(r.ids[:r.n_prompt])}{off}")
        end = f"{bold} <end>{off}" if trained[-1] == tokenizer.eot else f"{bold} (cut: no end){off}"
        print(f"  {green if r.desirable else red}{tokenizer.text(trained)}{off}{end}")
        if j is not None:
            print(f"  {blue}y' for z0, from {rows[j].where or f'row {j}'}: {tokenizer.text(mismatched(r, rows[j], max_len).response)}{off}")
        print()


def main(argv):
    import argparse
    p = argparse.ArgumentParser(prog="data.py", description="Show the first batch of a preference file as it will be trained.")
    p.add_argument("files", nargs="+")
    p.add_argument("--model", "--tokenizer", dest="tokenizer", help="folder of a tokenizer (default: bytes)")
    p.add_argument("--threshold", type=float)
    p.add_argument("--columns", default="", help="prompt=question,completion=answer,...")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max_len", type=int, default=1024)
    p.add_argument("--max_prompt_len", type=int, default=512)
    p.add_argument("--add_eot", choices=["true", "false"], default="true")
    a = p.parse_args(argv)
    if a.max_len < 2 or a.max_prompt_len < 1 or a.batch_size < 1:
        raise SystemExit("--max_len must be at least 2, --max_prompt_len and --batch_size at least 1")
    examples, name = read(a.files, columns=parse_columns(a.columns), threshold=a.threshold)
    tokenizer = load_tokenizer(a.tokenizer)
    feedback = to_feedback(examples)
    rows, counts = encode(feedback, tokenizer, max_len=a.max_len, max_prompt_len=a.max_prompt_len, add_eot=a.add_eot == "true")
    print(f"format: {name}\n{counts_line(counts)}")
    if hint := cut_hint(feedback, a.add_eot == "true"):
        print(hint)
    if rows:
        lambda_d, lambda_u = lambda_weights(counts["desirable"], counts["undesirable"])
        print(f"--lambda_d auto --lambda_u auto would give lambda_d {lambda_d:.3g}, lambda_u {lambda_u:.3g}\n")
        show(rows, batch_at([r.prompt_key for r in rows], a.batch_size, seed=a.seed, step=0), tokenizer, a.max_len, a.batch_size)


if __name__ == "__main__":
    main(sys.argv[1:])

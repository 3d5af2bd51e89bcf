"""From a line of JSON to a batch on the device: every step one function, nothing mutable on the way.

    {"prompt": ..., "completion": ..., "label": true}     a line of a file
      read      -> Feedback | Pair       typed, immutable; every complaint names file and row
      encode    -> Row                   ids = prompt ++ response ++ [end-of-text], mask = 0..0 1..1
      batches   -> Batch                 rows of one global batch, and for each row a partner with another prompt
      flatten   -> Flat                  one flat row of tokens on the device; nobody ever sees a pad

What a row trains is its MASK: a float per token, 1 on the response, or on the assistant's turns of it that are asked for.
Prompt and response are encoded apart and joined, so no token straddles the border, and text from users is always plain text:
"</s>" in a file never becomes a control token.

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
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


# --- files to examples ------------------------------------------------------------------------------------------------

class Turn(NamedTuple):
    role: str                                     # system, user, assistant, tool
    content: str                                  # "" where the message is nothing but tool calls
    more: str = ""                                # JSON of its tool_calls, tool_call_id, name: text, so that turns can be compared and hashed


@dataclass(frozen=True, slots=True)
class Feedback:
    """One response with a thumb up or down. A response is a text, or a conversation going on: turns from the assistant's to the assistant's."""
    prompt: str | tuple[Turn, ...]
    completion: str | tuple[Turn, ...]
    desirable: bool
    whole: bool = True                            # False: the completion was cut when it was sampled, so it has no end
    where: str = ""                               # file and row, for messages
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the first preferred. Scores where the file has them."""
    prompt: str | tuple[Turn, ...]
    chosen: str | tuple[Turn, ...]
    rejected: str | tuple[Turn, ...]
    score_chosen: float | None = None
    score_rejected: float | None = None
    win_prob_chosen: float | None = None
    win_prob_rejected: float | None = None
    target: str | tuple[Turn, ...] | None = None  # a third response, SLiC's y_ref
    segment: tuple[int, int] | None = None        # assistant turns of chosen and rejected that count: from 0, end excluded
    whole: bool = True
    where: str = ""


def read(files, *, columns=None, threshold=None, scored="labels"):
    """Examples of one or several files, and the name of the format they were found in.

    files: .jsonl (a JSON object per line), .json (an array of objects), .parquet, or a dataset of the Hugging Face hub:
    org/name or org/name:split. A cell that is null counts as absent.
    columns: {"prompt": "question", ...} renames the file's columns to ours first.
    scored: what becomes of rows with a number instead of a label. "labels": desirable if and only if reward > threshold;
    "pairs": see pairs_from_scores.
    Raises SystemExit with one line that names the file, the row and what would have been valid.
    """
    examples, formats, files = [], Counter(), [files] if isinstance(files, (str, Path)) else files
    for file in files:
        for where, record in _records(file):
            name, found = parse(record, where, columns=columns, threshold=threshold, scored=scored)
            formats[name] += 1
            examples += found
    if not examples:
        raise SystemExit(f"--data {' '.join(map(str, files))}: no rows in it")
    if len({type(e) for e in examples}) > 1:
        odd = next(e for e in examples if type(e) is not type(examples[0]))
        raise SystemExit(f"{odd.where}: mixes pairs and single responses: the rows before are {type(examples[0]).__name__}, this one is {type(odd).__name__}")
    name = ", ".join(formats)
    if scored == "pairs" and any(isinstance(e, Feedback) and e.score is not None for e in examples):
        examples, counts = pairs_from_scores(examples)
        name += f" as pairs ({counts_line(counts)})"
        if not examples:
            raise SystemExit(f"--data {' '.join(map(str, files))}: no pairs in {name}")
    return examples, name


def _records(name):
    """(where, row) of every row of a file, or of a hub dataset where there is no such file."""
    file, hub = Path(name), re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", str(name))
    if not file.exists() and hub and file.suffix not in (".json", ".jsonl", ".parquet"):
        yield from _hub_rows(*hub.groups(default="train"))
        return
    if not file.is_file():
        raise SystemExit(f"--data {file}: no such file")
    try:
        content = file.read_bytes()
    except OSError as e:
        raise SystemExit(f"--data {file}: {e.strerror}")
    if content[:4] == b"PAR1" or file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SystemExit(f"--data {file}: not UTF-8 at byte {e.start}")
    if not text.strip():
        raise SystemExit(f"--data {file}: the file is empty")
    if text.lstrip()[0] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as e:
            raise SystemExit(f"--data {file}: line {e.lineno}: broken JSON ({e.msg})")
        except (ValueError, RecursionError) as e:                     # a number of 5,000 digits, 100,000 brackets: Python's json has limits
            raise SystemExit(f"--data {file}: unreadable JSON ({_one_line(e)})")
        yield from ((f"{file}: record {i}", r) for i, r in enumerate(rows, 1))
        return
    for i, line in enumerate(text.split("\n"), 1):     # not splitlines: it also breaks at form feeds and U+0085 inside strings
        if line.strip():
            try:
                yield f"{file}: line {i}", json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(f"--data {file}: line {i}: broken JSON ({e.msg}); expected one object per line, or one array")
            except (ValueError, RecursionError) as e:
                raise SystemExit(f"--data {file}: line {i}: unreadable JSON ({_one_line(e)})")


def _parquet_rows(file):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SystemExit(f"--data {file}: parquet needs pyarrow (pip install pyarrow)")
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise SystemExit(f"--data {file}: no readable parquet file ({_one_line(e)})")
    yield from ((f"{file}: row {i}", r) for i, r in enumerate(rows, 1))


def _hub_rows(name, split):
    try:
        import datasets
    except ImportError:
        raise SystemExit(f"--data {name}: no such file; to look for it on the Hugging Face hub install datasets (pip install datasets)")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as e:                                             # offline, no such dataset, no such split: many libraries' own errors
        raise SystemExit(f"--data {name}: no such file, and split {split!r} does not come from the Hugging Face hub either ({_one_line(e)})")
    yield from ((f"{name}:{split}: row {i}", r) for i, r in enumerate(rows, 1))


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# name -> columns that must be there; the first format whose columns are all there is taken
FORMATS = {
    "paired conversations": ("conversations", "chosen", "rejected"),
    "prompt, chosen, rejected": ("prompt", "chosen", "rejected"),
    "paired messages": ("messages", "chosen", "rejected"),
    "alpaca: instruction, chosen, rejected": ("instruction", "chosen", "rejected"),
    "whole chats: chosen, rejected": ("chosen", "rejected"),
    "messages + label": ("messages", "label"),
    "conversations + label": ("conversations", "label"),
    "prompt, completion, label": ("prompt", "completion", "label"),
    "alpaca: instruction, output, label": ("instruction", "output", "label"),
    "scored: prompt, completion, reward": ("prompt", "completion", "reward"),
    "scored: prompt, responses, scores": ("prompt", "responses", "scores"),
}
PAIR_NUMBERS = ("score_chosen", "score_rejected", "win_prob_chosen", "win_prob_rejected")                   # optional, per pair
OPTIONAL = (*PAIR_NUMBERS, "target", "segment", "system", "input", "history")
ALIASES = {"text": "completion", "response": "completion", "score": "reward", "kto_tag": "label"}


def parse(record, where="", *, columns=None, threshold=None, scored="labels"):
    """One JSON object to (format name, [Feedback, ...] or [Pair])."""
    if not isinstance(record, dict):
        raise SystemExit(f"{where}: expected a JSON object with columns, got {type(record).__name__}")
    for ours, theirs in (columns or {}).items():
        if theirs not in record:
            raise SystemExit(f"{where}: --columns {ours}={theirs}, but the row has {', '.join(record)}")
        record = {**record, ours: record[theirs]}
    nulls, record = [k for k, v in record.items() if v is None], {k: v for k, v in record.items() if v is not None}
    for theirs, ours in ALIASES.items():
        if theirs in record and ours not in record:
            record = {**record, ours: record[theirs]}
    name = next((n for n, needs in FORMATS.items() if all(k in record for k in needs)), None)
    if name is None:
        _unknown_format(record, nulls, where)
    whole = record.get("truncated") is not True and record.get("finish_reason") != "length"
    if "chosen" in FORMATS[name]:
        return name, [_pair(record, name, where, whole)]

    if "messages" in FORMATS[name] or "conversations" in FORMATS[name]:     # a conversation: its last turn is what the label is about
        turns = _turns(record["messages" if "messages" in FORMATS[name] else "conversations"], where)
        if turns[-1].role != "assistant":
            raise SystemExit(f"{where}: the last message is the {turns[-1].role}'s; the label needs an assistant's answer there")
        prompt, answers, column = turns[:-1], [turns[-1:]], "the last message"
    else:
        prompt = _alpaca(record, where) if "instruction" in FORMATS[name] else _prompt(record["prompt"], where)
        column = next(c for c in ("responses", "completion", "output") if c in FORMATS[name])
        answers = record[column] if column == "responses" else [record[column]]
    prompt = _with_system(prompt, record, where)
    scores = [None]
    if name.startswith("scored") or scored == "pairs" and "reward" in record:
        scores = record["scores"] if "scores" in FORMATS[name] else [record["reward"]]
        if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores) or not answers:
            raise SystemExit(f"{where}: responses and scores must be two lists of one length")
        scores = [_number(x, "reward" if "reward" in record else "scores", where) for x in scores]
    if "label" in FORMATS[name]:
        labels = [_label(record["label"], where)]
    elif threshold is None and scored == "labels":
        raise SystemExit(f"{where}: scored rows need --threshold NUMBER (desirable: reward > NUMBER)")
    else:
        labels = [threshold is not None and x > threshold for x in scores]         # without a threshold they are on their way to pairs
    return name, [Feedback(prompt, _answer(a, column, where), label, whole, where, score)
                  for a, label, score in zip(answers, labels, scores)]


def _unknown_format(record, nulls, where):
    near = min(FORMATS.values(), key=lambda needs: (sum(k not in record for k in needs), sum(k not in record and k not in nulls for k in needs)))
    lacks = [k for k in near if k not in record]
    if set(lacks) <= set(nulls):
        raise SystemExit(f"{where}: {', '.join(lacks)} is null; the format {' + '.join(near)} needs it")
    hint = f" (nearest: {' + '.join(near)}, without {', '.join(lacks)})" if len(lacks) < len(near) else ""
    raise SystemExit(f"{where}: unknown format with columns {', '.join(k if k.isprintable() else repr(k) for k in record) or '(none)'}{hint}; known: "
                     + "; ".join(" + ".join(needs) for needs in FORMATS.values()))


def _pair(record, name, where, whole):
    numbers = {k: _number(record[k], k, where) for k in PAIR_NUMBERS if k in record}
    chosen, rejected = record["chosen"], record["rejected"]
    if name.startswith("whole"):
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise SystemExit(f"{where}: chosen and rejected are texts, and there is no prompt column; a prompt is never guessed from a common beginning")
        prompt = ()
    else:
        prompt = (_alpaca(record, where) if "instruction" in FORMATS[name] else
                  _prompt(record[next(c for c in ("conversations", "prompt", "messages") if c in FORMATS[name])], where))
    start = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
    chats = [_turns(x, where) for x in (chosen, rejected)] if not start or isinstance(chosen, list) and isinstance(rejected, list) else []
    if not start or chats and all(c[:len(start)] == start and c[0].role != "assistant" for c in chats):          # chats told from their beginning
        # The turns that both share are the prompt, never a common prefix of text; from there on both go on with the assistant.
        n = next((i for i, (a, b) in enumerate(zip(*chats)) if a != b), min(map(len, chats)))
        while n and not all(len(c) > n and c[n].role == "assistant" for c in chats):
            n -= 1
        prompt, chosen, rejected = chats[0][:n], chats[0][n:], chats[1][n:]
    segment = record.get("segment")
    if segment is not None:
        segment = (segment.get("start"), segment.get("end")) if isinstance(segment, dict) else (None, None)
        if not all(type(x) is int for x in segment) or not 0 <= segment[0] < segment[1]:
            raise SystemExit(f"{where}: segment is {str(record['segment'])[:60]!r}; expected {{\"start\": 0, \"end\": 2}}: "
                             "assistant turns counted from 0, end excluded, start < end")
    return Pair(_with_system(prompt, record, where), _answer(chosen, "chosen", where), _answer(rejected, "rejected", where), whole=whole, where=where,
                target=_answer(record["target"], "target", where) if "target" in record else None, segment=segment, **numbers)


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


def _alpaca(record, where):
    """LLaMA-Factory's alpaca columns as a conversation: history is a list of [question, answer], input belongs to the instruction."""
    history, more = record.get("history", []), record.get("input", "")
    if not isinstance(history, list) or not all(isinstance(h, (list, tuple)) and len(h) == 2 for h in history):
        raise SystemExit(f"{where}: history must be a list of [question, answer]")
    if not isinstance(record["instruction"], str) or not isinstance(more, str):
        raise SystemExit(f"{where}: instruction and input must be texts")
    query = record["instruction"] + ("\n" + more if more else "")
    said = [{"role": role, "content": text} for h in history for role, text in zip(("user", "assistant"), h)]
    return _turns([*said, {"role": "user", "content": query}], where)


def _with_system(prompt, record, where):
    """A system column makes a conversation of the prompt, and is its first turn."""
    if not (system := record.get("system")):
        return prompt
    prompt = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
    return prompt if prompt and prompt[0].role == "system" else (*_turns([{"role": "system", "content": system}], where), *prompt)


def _answer(x, column, where):
    """A text, or the text of one assistant message; else turns: several messages, or one with tool calls."""
    if isinstance(x, str):
        return _text(x, where)
    turns = x if isinstance(x, tuple) else _turns(x if isinstance(x, list) else [x], where)
    if not turns or turns[0].role != "assistant" or turns[-1].role != "assistant":
        raise SystemExit(f"{where}: {column} must be a text, one assistant message, or messages from the assistant's to the assistant's, "
                         f"got roles {[t.role for t in turns]}")
    return turns if len(turns) > 1 or turns[0].more else turns[0].content


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
         "function_call": "assistant", "observation": "tool"}


def _turns(x, where):
    """A list of messages, {role, content} or LLaMA-Factory's {from, value}, as a tuple of turns."""
    turns = []
    for m in x if isinstance(x, list) and x else [None]:
        m = {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else {}
        more = {k: m[k] for k in ("tool_calls", "tool_call_id", "name") if m.get(k)}
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value", "" if "tool_calls" in more else None))
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise SystemExit(f"{where}: expected a text or a list of messages with a role ({', '.join(ROLES)}) and a text content")
        turns.append(Turn(ROLES[role], _text(content, where), _text(json.dumps(more, ensure_ascii=False), where) if more else ""))
    return tuple(turns)


def to_feedback(examples):
    """Pairs become labels: the chosen response is desirable, the rejected one undesirable. Feedback passes through."""
    out = []
    for e in examples:
        out += [e] if isinstance(e, Feedback) else [Feedback(e.prompt, e.chosen, True, e.whole, e.where),
                                                    Feedback(e.prompt, e.rejected, False, e.whole, e.where)]
    return out


def pairs_from_scores(examples):
    """Scored responses to one prompt become pairs: the best with the worst, the second best with the second worst, and so on.

    Feedback with scores -> (pairs, Counter). Each response is used at most once; equal scores are a tie, which says nothing and
    is dropped; an odd one out in the middle, or alone with its prompt, is left over. Scores stay, for ODPO.
    """
    by_prompt, pairs, counts = {}, [], Counter({"scored responses": len(examples)})
    for e in examples:
        if e.score is None:
            raise SystemExit(f"{e.where}: has no score, so it makes no pair")
        by_prompt.setdefault(e.prompt, []).append(e)
    for prompt, group in by_prompt.items():
        group.sort(key=lambda e: -e.score)
        counts["left over"] += len(group) % 2
        for best, worst in zip(group[:len(group) // 2], reversed(group)):
            if best.score == worst.score:
                counts["ties dropped"] += 1
            else:
                pairs.append(Pair(prompt, best.completion, worst.completion, best.score, worst.score, whole=best.whole and worst.whole, where=best.where))
    return pairs, +counts


# --- tokenizers -------------------------------------------------------------------------------------------------------

EOT = "<|endoftext|>"
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m.role | capitalize }}:\n{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
                  "{{ 'Assistant:\n' if add_generation_prompt }}")                          # Tokenizer.prompt_ids, for other programs


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
            self.control = "|".join(re.escape(str(t)) for t in backend.added_tokens_decoder.values() if t.special) or "(?!)"
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

        each turn is "User:\\n" (or System, Assistant, Tool), its content, for the assistant the end-of-text token, and a blank
        line; then "Assistant:\\n". Tool calls follow their content as JSON.
        """
        if isinstance(prompt, str):
            return self.bos + self.encode(prompt)
        return [i for ids, _ in self._pieces(prompt, answer=True) for i in ids]

    def conversation(self, turns, *, end=True):
        """A whole conversation up to the assistant's last word: (ids, owner), owner the index of the assistant turn that each
        token belongs to, else -1. To a turn belong its content and what follows up to the end-of-text token, if the template writes
        one there: so the model learns to stop after every turn. The last turn has its end-of-text in any case, or with end=False
        nothing after its content. A turn of nothing but tool calls is the template's own text and belongs to nobody: ValueError if
        it is the last one."""
        ids, owner, before, last, said = [], [], -1, len(turns) - 1, 0
        for piece, i in self._pieces(turns, answer=False):
            mine = i if i >= 0 and turns[i].role == "assistant" else -1
            closing = piece.index(self.eot) + 1 if i < 0 and self.eot in piece else 0
            ids, owner, before = ids + piece, owner + [before] * closing + [mine] * (len(piece) - closing), mine
            said = len(ids) if i == last else said
        if not said:
            raise ValueError("the last turn is nothing but tool calls, and those the chat template writes: it cannot be trained")
        if end:
            n = len(owner) - owner[::-1].index(last)
            return (ids[:n], owner[:n]) if ids[n - 1] == self.eot else (ids[:n] + [self.eot], owner[:n] + [last])
        return ids[:said], owner[:said]

    def _pieces(self, turns, answer):
        """[(ids, index of the turn whose content they are, else -1)]; `answer`: up to where the assistant's next content begins."""
        if self.hf and self.backend.chat_template:
            return self._chat_pieces(turns, answer)
        pieces, text = [(self.bos, -1)], ""
        for i, t in enumerate(turns):
            calls = [json.dumps(json.loads(t.more)["tool_calls"], ensure_ascii=False)] if "tool_calls" in t.more else []
            text, content = text + f"{t.role.capitalize()}:\n", "\n".join([t.content] * bool(t.content) + calls)
            if t.role == "assistant":
                pieces += [(self.encode(text), -1), (self.encode(content), i), ([self.eot], -1)]
                text = "\n\n"
            else:
                text += content + "\n\n"
        return [*pieces, (self.encode(text + "Assistant:\n" * answer), -1)]

    def _chat_pieces(self, turns, answer):
        """The template is rendered around markers and each content encoded apart, so that only the template's own text can
        become a control token. ValueError where the template refuses the conversation, or loses or changes a content."""
        marked = []                                                                                  # (text, index of its turn)

        def mark(text, i=-1):
            marked.append((text, i))
            return f"\u27e6{len(marked) - 1}:content\u27e7"

        messages = [{"role": t.role, "content": mark(t.content, i) if t.content or "tool_calls" not in t.more else "",
                     **(json.loads(re.sub(self.control, lambda m: mark(m[0]), t.more)) if t.more else {})} for i, t in enumerate(turns)]
        try:
            text = self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        except Exception as e:                                                                  # jinja's own errors, and transformers'
            raise ValueError(f"the chat template refuses this conversation: {' '.join(str(e).split())}") from None
        parts = re.split("\u27e6(\\d+):content\u27e7", text)                    # template, number, template, number, ..., template
        if sorted(map(int, parts[1::2])) != list(range(len(marked))) or re.search("\u27e6|\u27e7", "".join(parts[::2])):
            raise ValueError(f"the chat template loses or changes a message; the roles are {', '.join(t.role for t in turns)}")
        own = [(self.backend(p, add_special_tokens=False).input_ids if p else [], -1) for p in parts[::2]]
        contents = [(self.encode(marked[int(k)][0]), marked[int(k)][1]) for k in parts[1::2]]
        return [own[0]] + [piece for pair in zip(contents, own[1:]) for piece in pair]

    def save(self, folder):
        """Everything that load_tokenizer needs; of ours (tiktoken) also what transformers' AutoTokenizer reads."""
        if self.hf:
            self.backend.save_pretrained(folder)
            return
        b, folder = self.backend, Path(folder)
        tokens = sorted(b._mergeable_ranks, key=b._mergeable_ranks.get)
        (folder / "tiktoken.json").write_text(json.dumps(dict(
            name=b.name, pat_str=b._pat_str, mergeable_ranks=[base64.b64encode(t).decode() for t in tokens], special_tokens=b._special_tokens)))
        try:
            import tokenizers as hf
        except ImportError:                                            # an export for others: whoever has transformers has it
            return
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]                            # GPT-2's letter for each byte
        letter = {x: chr(x) for x in printable} | {x: chr(256 + i) for i, x in enumerate(sorted({*range(256)} - {*printable}))}
        spelled, rank, merges = {t: "".join(map(letter.get, t)) for t in tokens}, b._mergeable_ranks, []
        for t in tokens:                                               # tiktoken knows what pairs join to, not the pairs: all that do
            splits = [(t[:i], t[i:]) for i in range(1, len(t)) if t[:i] in rank and t[i:] in rank]
            merges += [(spelled[x], spelled[y]) for x, y in sorted(splits, key=lambda xy: (rank[xy[0]], rank[xy[1]]))]
        copy = hf.Tokenizer(hf.models.BPE({spelled[t]: i for t, i in rank.items()}, merges, ignore_merges=True))
        copy.pre_tokenizer = hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Split(hf.Regex(b._pat_str), "isolated"),
                                                         hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        copy.decoder = hf.decoders.ByteLevel()
        copy.add_special_tokens([hf.AddedToken(EOT, normalized=False, special=True)])
        if copy.token_to_id(EOT) == self.eot:                          # not so in vocabularies with gaps, which are not ours
            copy.save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(json.dumps(dict(
                tokenizer_class="PreTrainedTokenizerFast", eos_token=EOT, clean_up_tokenization_spaces=False, chat_template=PLAIN_TEMPLATE)))


def load_tokenizer(name=None, *, trust_remote_code=False):
    """A tokenizer: bytes (no name), ours (a folder with tiktoken.json), GPT-2's (vocab.bpe + encoder.json; online the name gpt2), a
    Hugging Face folder, or a hub name, org/name. SystemExit with one line if none of them is there."""
    if name is None:
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=r"[^\n]+|\n", special_tokens={EOT: 256},
                                           mergeable_ranks={bytes([i]): i for i in range(256)}))
    folder = Path(name)
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
    local = any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    if not local and (folder.exists() or str(name) != "gpt2" and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))):
        raise SystemExit(f"--tokenizer {folder}: no tokenizer there; expected tiktoken.json, vocab.bpe + encoder.json, or tokenizer.json")
    try:
        if str(name) == "gpt2" and not local:
            return Tokenizer(tiktoken.get_encoding("gpt2"))
        from transformers import AutoTokenizer
        backend = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=trust_remote_code)
    except Exception as e:                                             # many libraries' own errors: broken files, offline, no such name
        raise SystemExit(f"--tokenizer {name}: {'unreadable' if local else 'no such folder, and no such tokenizer online either'} ({_one_line(e)})")
    return Tokenizer(backend)


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


def make_row(prompt, response, *, desirable=True, where="", train_prompt=False, score=None, win_prob=None, trained=None):
    """trained: a weight for each token of the response, 1 if None."""
    ids = np.array([*prompt, *response], dtype=np.int32)
    mask = np.ones(len(ids), np.float32)
    mask[len(prompt):] = 1 if trained is None else trained
    mask[:1 if train_prompt else len(prompt)] = 0                    # nothing predicts the very first token
    ids.setflags(write=False), mask.setflags(write=False)
    return Row(ids, mask, len(prompt), desirable, where, score, win_prob)


TURNS = ("last", "all", "segment")


def encode(examples, tokenizer, *, max_len=1024, max_prompt_len=512, add_eot=True, train_prompt=False, turns="last"):
    """Feedback to rows, pairs to (chosen, rejected) tuples of rows; and a Counter of what happened to them.

    turns: which of the assistant's turns are trained, each with its end. "last": the last one. "all": every one; of feedback also
    those in its prompt, and the row's prompt ends where the first begins. "segment": those that Pair.segment names, in both
    branches (Kong et al. 2025, SDPO, arXiv 2501.01821, where both must have as many). Whatever else stands in a continuation is
    context, mask 0; what follows the last trained token is left out.

    A prompt that is too long loses its LEFT end (the question is at the right), a response its RIGHT end; a response that
    was cut, here or by whoever sampled it, gets no end-of-text, since teaching the model to stop there would be wrong.
    Rows with an empty (or blank) response are dropped, those with nothing trained left after the cut, and pairs whose sides are
    the same; duplicates are kept. All of it is counted.
    """
    if max_len < 2 or max_prompt_len < 1:
        raise ValueError(f"max_len is {max_len} and max_prompt_len {max_prompt_len}; a row needs a prompt token and a response token")
    if turns not in TURNS:
        raise ValueError(f"turns is {turns!r}; valid are {', '.join(TURNS)}")
    out, counts, seen, labels = [], Counter(read=0, desirable=0, undesirable=0), set(), {}
    max_prompt_len = min(max_prompt_len, max_len - 1)

    def row(prompt, response, trained, e, desirable, score, win_prob=None):
        if len(response) > max_len - len(prompt):
            counts["response cut from the right"] += 1
            response, trained = response[:max_len - len(prompt)], trained[:max_len - len(prompt)]
        return make_row(prompt, response, desirable=desirable, where=e.where, train_prompt=train_prompt, score=score, win_prob=win_prob, trained=trained)

    for e in examples:
        counts["read"] += 1
        single = isinstance(e, Feedback)
        answers = [e.completion] if single else [e.chosen, e.rejected] + [e.target] * bool(e.target and _final(e.target).strip())
        chats = [_trained_turns(e, answer, turns) for answer in answers]
        if not all(t.content.strip() or t.more for chat, wanted in chats for t in (chat[i] for i in wanted)):
            counts["dropped: empty response"] += 1
            continue
        try:
            prompt, responses = _spell(e.prompt, answers, chats, tokenizer, add_eot and e.whole)
        except ValueError as why:
            raise SystemExit(f"{e.where}: {why}") from None
        if len(prompt) > max_prompt_len:
            counts["prompt cut from the left"] += 1
            n_bos = len(tokenizer.bos) if prompt[:1] == tokenizer.bos else 0
            prompt = prompt[:n_bos] + prompt[len(prompt) - max_prompt_len + n_bos:]
        rows = [row(prompt, *r, e, *more) for r, more in zip(responses, [(e.desirable, e.score)] if single else [
            (True, e.score_chosen, e.win_prob_chosen), (False, e.score_rejected, e.win_prob_rejected), (True, None)])]
        if not all(r.mask.any() for r in rows):
            counts["dropped: nothing left to train"] += 1
            continue
        key = tuple(r.ids.tobytes() for r in rows[:2]) + ((rows[0].n_prompt, e.desirable) if single else ())
        if not single and key[0] == key[1]:                                        # as the model sees them, after cutting
            counts["dropped: chosen is rejected"] += 1
            continue
        out.append(rows[0] if single else tuple(rows))
        counts[("desirable" if e.desirable else "undesirable") if single else "pairs"] += 1
        labels.setdefault(rows[0].prompt_key, set()).update([e.desirable] if single else [])
        counts["duplicates (kept)"] += key in seen
        seen.add(key)
    counts["prompts"] = len(labels)
    counts["prompts with both labels"] = sum(len(v) == 2 for v in labels.values())
    return out, +counts


def _final(answer):
    """The text of a response, of its last turn if it has several."""
    return answer if isinstance(answer, str) else answer[-1].content


def _trained_turns(e, answer, turns):
    """(the whole conversation, indices of the assistant's turns in it that are trained)"""
    before = () if isinstance(e.prompt, str) else e.prompt
    chat = (*before, *((Turn("assistant", answer),) if isinstance(answer, str) else answer))
    first = 0 if turns == "all" and isinstance(e, Feedback) else len(before)
    agent = [i for i in range(first, len(chat)) if chat[i].role == "assistant"]
    if turns != "segment":
        return chat, agent if turns == "all" else agent[-1:]
    if isinstance(e, Feedback):
        raise SystemExit(f"{e.where}: --turns segment is for pairs, this is a single response")
    if e.segment is None:
        raise SystemExit(f'{e.where}: --turns segment needs the column segment: {{"start": 0, "end": 1}}')
    start, end = e.segment
    if end > len(agent):                               # so both segments have equally many turns, which is what makes Z cancel
        side = "chosen" if answer is e.chosen else "rejected" if answer is e.rejected else "target"
        raise SystemExit(f"{e.where}: the segment is the assistant's turns {start} to {end} (end excluded, from 0), but {side} has only {len(agent)}")
    return chat, agent[start:end]


def _spell(prompt, answers, chats, tokenizer, end):
    """(prompt ids, for each answer (response ids, weights)). A response of one turn follows the template's request for an answer;
    where turns follow turns, ids are those of the template over the whole conversation."""
    first = min(i for _, wanted in chats for i in wanted)
    if all(isinstance(a, str) for a in answers) and (isinstance(prompt, str) or first >= len(prompt)):
        responses = [tokenizer.encode(a) + [tokenizer.eot] * end for a in answers]
        return tokenizer.prompt_ids(prompt) or [tokenizer.eot], [(r, [1] * len(r)) for r in responses]    # no prompt: as after a document's end
    if isinstance(prompt, str):
        raise ValueError("a response of several messages needs a conversation as its prompt, not a text")
    prompts, responses = [], []
    for chat, wanted in chats:
        ids, owner = tokenizer.conversation(chat, end=end)
        begin = min(first, len(prompt))                                    # the assistant turn with which the response begins
        asked = [] if begin in owner else tokenizer.prompt_ids(chat[:begin])                      # nothing but tool calls: no content to find
        if ids[:len(asked)] != asked:
            raise ValueError("the chat template writes a turn of nothing but tool calls so that its beginning cannot be told")
        n = len(asked) or owner.index(begin)
        stop = max((t + 1 for t, i in enumerate(owner) if i in wanted), default=n)
        prompts.append(ids[:n] or [tokenizer.eot])
        responses.append((ids[n:stop], [float(i in wanted) for i in owner[n:stop]]))
    if any(p != prompts[0] for p in prompts):
        raise ValueError("the chat template writes the prompt of chosen and rejected differently")
    return prompts[0], responses


def length_desensitised(pair, alpha):
    """LD-DPO: mask 1 on the first min(n_w, n_l) trained tokens of both, alpha on the longer one's tail."""
    shared = min(int((row.mask > 0).sum()) for row in pair)

    def masked(row):
        mask = row.mask.copy()
        mask[np.flatnonzero(mask)[shared:]] *= alpha
        mask.setflags(write=False)
        return replace(row, mask=mask)

    return tuple(masked(row) for row in pair)


def mismatched(row, partner, max_len):
    """(x, y'): this row's prompt with another row's response, cut from the right where both together are too long.

    A response of several turns begins at its first trained token: what stands before is its own conversation, no answer to anybody.
    """
    start = partner.n_prompt + int(np.flatnonzero(partner.mask[partner.n_prompt:])[0])
    stop = start + max_len - row.n_prompt
    return make_row(row.ids[:row.n_prompt], partner.ids[start:stop], desirable=row.desirable, where=row.where, trained=partner.mask[start:stop])


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
    lengths, parts, at, prompt_end = [], [], 0, 0
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
    columns, known = {}, sorted({c for needs in FORMATS.values() for c in needs}.union(OPTIONAL))
    for item in filter(None, text.split(",")):
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in known:
            raise SystemExit(f"--columns {text}: {item!r} is not of the form OURS=THEIRS with OURS one of {', '.join(known)}")
        columns[ours] = theirs
    return columns


def cut_hint(examples, add_eot):
    """A line of advice where most responses seem to have been cut when they were sampled, or None."""
    whole = [text.rstrip() for e in examples if e.whole and (text := _final(e.completion)).strip()]
    ended = sum(t[-1] in ".!?\"')]}>`*:;\u3002\uff01\uff1f\u201d" for t in whole)
    if add_eot and len(whole) >= 20 and ended < 0.5 * len(whole):
        return (f"note: only {ended} of {len(whole)} responses end like a sentence. If they were cut when sampled, "
                "--add_eot false keeps the model from learning to stop there.")


def show(rows, batch, tokenizer, max_len, limit=8):
    """The batch as text, rows or pairs: context grey, trained tokens green after + or red after -, partner's response blue after ~."""
    grey, green, red, blue, bold, off = (f"\033[{c}m" if sys.stdout.isatty() or os.environ.get("FORCE_COLOR") else ""
                                         for c in (90, 32, 31, 34, 1, 0))

    def lines(sign, colour, text, end=""):
        print("\n".join(f"  {sign} {colour}{line}{off}" for line in text.split("\n")) + end)

    for i, j in list(zip(batch.rows, batch.partners or [None] * len(batch.rows)))[:limit]:
        unit = [rows[i]] if isinstance(rows[i], Row) else rows[i]
        names = ["desirable" if unit[0].desirable else "undesirable"] if isinstance(rows[i], Row) else ["chosen", "rejected", "target"]
        print(f"{bold}{unit[0].where or f'row {i}'}{off}")
        lines(" ", grey, tokenizer.decode(unit[0].ids[:unit[0].n_prompt]))
        for r, name in zip(unit, names):
            print(f"  {name}, {r.n_prompt} prompt + {int((r.mask > 0).sum())} trained tokens")
            for trained, run in groupby(range(r.n_prompt, len(r.ids)), key=lambda t: r.mask[t] > 0):
                run = r.ids[list(run)]
                if not trained:
                    lines(" ", grey, tokenizer.decode(run))
                else:
                    end = f"{bold} <end>{off}" if run[-1] == tokenizer.eot else f"{bold} (cut: no end){off}"
                    lines("+" if r.desirable else "-", green if r.desirable else red, tokenizer.text(run), end)
        if j is not None:
            lines("~", blue, f"y' for z0, from {rows[j].where or f'row {j}'}: {tokenizer.text(mismatched(unit[0], rows[j], max_len).response)}")
        print()


def main(argv):
    import argparse
    p = argparse.ArgumentParser(prog="data.py", description="Show the first batch of a preference file as it will be trained.")
    p.add_argument("files", nargs="+", help="jsonl, json, parquet, or a hub dataset org/name:split")
    p.add_argument("--model", "--tokenizer", dest="tokenizer", help="folder or hub name of a tokenizer (default: bytes)")
    p.add_argument("--paired", action="store_true", help="as the losses on pairs see it; else pairs are shown as labels")
    p.add_argument("--turns", choices=TURNS, default="last", help="which of the assistant's turns are trained")
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
    examples, name = read(a.files, columns=parse_columns(a.columns), threshold=a.threshold, scored="pairs" if a.paired else "labels")
    if a.paired and not isinstance(examples[0], Pair):
        raise SystemExit(f"--paired needs pairs (prompt, chosen, rejected) or scored responses; the file has {name}")
    tokenizer, feedback = load_tokenizer(a.tokenizer), to_feedback(examples)
    rows, counts = encode(examples if a.paired else feedback, tokenizer, max_len=a.max_len, max_prompt_len=a.max_prompt_len,
                          add_eot=a.add_eot == "true", turns=a.turns)
    print(f"format: {name}\n{counts_line(counts)}")
    if hint := cut_hint(feedback, a.add_eot == "true"):
        print(hint)
    if not rows:
        return
    if not a.paired:
        lambda_d, lambda_u = lambda_weights(counts["desirable"], counts["undesirable"])
        print(f"--lambda_d auto --lambda_u auto would give lambda_d {lambda_d:.3g}, lambda_u {lambda_u:.3g}")
    print()
    batch = batch_at([(r[0] if a.paired else r).prompt_key for r in rows], a.batch_size, seed=a.seed, step=0)
    show(rows, batch._replace(partners=[]) if a.paired else batch, tokenizer, a.max_len, a.batch_size)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Files to examples: every format of preference data becomes `Feedback` or `Pair`.

    {"prompt": "Why?", "completion": "No.", "label": true}    Feedback("Why?", "No.", True)
    {"prompt": "Why?", "chosen": "Wind.", "rejected": "No."}  Pair("Why?", "Wind.", "No.")

A new format is one entry in FORMATS, at the end of this file, and one small function above it.
A row that cannot be read stops the program with one line that names the file and the row.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple


class Turn(NamedTuple):
    """One message of a conversation."""
    role: str                # system, user, assistant, tool
    content: str             # "" where the message is nothing but tool calls
    more: str = ""           # its tool_calls, tool_call_id and name, as JSON: text can be hashed


@dataclass(frozen=True, slots=True)
class Feedback:
    """One response with a thumb up or down.

    A prompt is a text or a conversation; a response is a text, or turns that begin and end with
    the assistant's. A prompt alone has completion "" and desirable None: the policy will answer.
    """
    prompt: str | tuple[Turn, ...]
    completion: str | tuple[Turn, ...]
    desirable: bool | None
    whole: bool = True       # False: the completion was cut when it was sampled, it has no end
    where: str = ""          # file and row, for messages
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the first preferred."""
    prompt: str | tuple[Turn, ...]
    chosen: str | tuple[Turn, ...]
    rejected: str | tuple[Turn, ...]
    score_chosen: float | None = None
    score_rejected: float | None = None
    win_prob_chosen: float | None = None
    win_prob_rejected: float | None = None
    target: str | tuple[Turn, ...] | None = None    # a third response: SLiC's y_ref
    segment: tuple[int, int] | None = None          # assistant's turns that count: from 0, end out
    whole: bool = True
    where: str = ""


# --- reading --------------------------------------------------------------------------------------

def read(files, *, columns=None, threshold=None, scored="labels", prompts=False):
    """(examples, name of their format) of one or several files.

    files      .jsonl (an object per line), .json (an array of objects), .parquet, or a dataset of
               the Hugging Face hub: org/name or org/name:split
    columns    {"prompt": "question"}: what the file calls question is our prompt
    threshold  a row with a number instead of a label is desirable if its number is above this
    scored     "labels", or "pairs": rows with a number become pairs (pairs_from_scores)
    prompts    may a row be a prompt without a response?
    """
    if isinstance(files, (str, Path)):
        files = [files]
    examples = []
    formats = {}                                     # a dict keeps their order
    for file in files:
        for where, record in records(file):
            name, found = parse(record, where, columns=columns, threshold=threshold,
                                scored=scored, prompts=prompts)
            formats[name] = True
            examples += found
    name = ", ".join(formats)
    for example in examples:
        if type(example) is not type(examples[0]):
            raise SystemExit(f"{example.where}: mixes pairs and single responses")
    if scored == "pairs" and any(getattr(e, "score", None) is not None for e in examples):
        examples, counts = pairs_from_scores(examples)
        name += f" as pairs ({counts_line(counts)})"
    if not examples:
        raise SystemExit(f"--data {' '.join(map(str, files))}: no rows in it {name}".rstrip())
    return examples, name


def parse(record, where="", *, columns=None, threshold=None, scored="labels", prompts=False):
    """One JSON object to (name of its format, list of examples)."""
    row = Record(record, where, columns or {})
    found = [form for form in FORMATS if row.cells.keys() >= {*form}]
    if not found and prompts and "prompt" in row.cells:
        return "prompts alone", [row.feedback(row.prompt("prompt"), "")]
    if not found:
        known = "; ".join(" + ".join(form) for form in FORMATS)
        row.fail(f"unknown format with columns {list(row.cells)} (null is none); known: {known}")
    found = found[0]
    name = ", ".join(found)
    examples = FORMATS[found](row)
    if isinstance(examples[0], Pair):
        return name, examples
    if scored == "pairs":                            # then scores are what counts, not labels
        if "label" in found and "reward" in row.cells:
            score = row.number(row.cells["reward"], "reward")
            examples = [replace(examples[0], score=score)]
    elif "label" not in found:
        if threshold is None:
            row.fail("scored rows need --threshold NUMBER (desirable: reward > NUMBER)")
        examples = [replace(e, desirable=e.score > threshold) for e in examples]
    return name, examples


def records(name):
    """(where, JSON object) of every row of a file, or of a hub dataset if there is no such file."""
    file = Path(name)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", str(name))
    if not file.exists() and hub and file.suffix not in (".json", ".jsonl", ".parquet"):
        return _hub_rows(*hub.groups(default="train"))
    if not file.is_file():
        raise SystemExit(f"--data {file}: no such file")
    content = file.read_bytes()
    if content[:4] == b"PAR1" or file.suffix == ".parquet":
        return _parquet_rows(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"--data {file}: not UTF-8 at byte {error.start}")
    if text.lstrip()[:1] == "[":
        return _numbered(f"{file}: record", _from_json(text, file))
    # Not splitlines(): that also breaks at form feeds and at U+0085, which occur inside strings.
    lines = _numbered(f"{file}: line", text.split("\n"))
    return ((where, _from_json(line, where)) for where, line in lines if line.strip())


def _from_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"--data {where}: broken JSON ({one_line(error)})")


def _parquet_rows(file):
    try:
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:           # not installed, not parquet, written by half
        raise SystemExit(f"--data {file}: no readable parquet file ({one_line(error)})")
    return _numbered(f"{file}: row", rows)


def _hub_rows(name, split):
    try:
        import datasets
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:           # not installed, offline, no such dataset, no such split
        raise SystemExit(f"--data {name}: no such file, and split {split!r} does not come from "
                         f"the Hugging Face hub either ({one_line(error)})")
    return _numbered(f"{name}:{split}: row", rows)


def _numbered(name, rows):
    for number, row in enumerate(rows, 1):
        yield f"{name} {number}", row


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- pairs and labels from each other, and words about examples -----------------------------------

def to_feedback(examples):
    """A pair becomes two: its chosen response is desirable, its rejected one undesirable."""
    feedback = []
    for e in examples:
        if isinstance(e, Feedback):
            feedback.append(e)
        else:
            feedback.append(Feedback(e.prompt, e.chosen, True, e.whole, e.where))
            feedback.append(Feedback(e.prompt, e.rejected, False, e.whole, e.where))
    return feedback


def pairs_from_scores(examples):
    """(pairs, Counter): of the responses to one prompt the best with the worst, and so on inwards.

    Scores 5, 3, 2, 1, 0 make the pairs (5, 0) and (3, 1); 2 is left over. Equal scores are a tie,
    which says nothing and is dropped.
    """
    counts = Counter({"scored responses": len(examples)})
    by_prompt = {}
    for example in examples:
        if example.score is None:
            raise SystemExit(f"{example.where}: has no score, so it makes no pair")
        by_prompt.setdefault(example.prompt, []).append(example)
    pairs = []
    for prompt, group in by_prompt.items():
        group.sort(key=attrgetter("score"), reverse=True)
        half = len(group) // 2
        counts["left over"] += len(group) % 2
        for best, worst in zip(group[:half], reversed(group)):
            if best.score == worst.score:
                counts["ties dropped"] += 1
                continue
            pairs.append(Pair(prompt, best.completion, worst.completion, best.score, worst.score,
                              whole=best.whole and worst.whole, where=best.where))
    return pairs, +counts


def final_text(answer):
    """The text of a response, or of its last turn if it has several."""
    return answer if isinstance(answer, str) else answer[-1].content


def counts_line(counts):
    return " | ".join(f"{name} {n:,}" for name, n in counts.items())


def parse_columns(text):
    """"prompt=question,completion=answer" -> {"prompt": "question", "completion": "answer"}"""
    known = {*OPTIONAL}.union(*FORMATS)
    columns = {}
    for item in filter(None, text.split(",")):
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in known:
            raise SystemExit(f"--columns {text}: {item!r} is not OURS=THEIRS with OURS one of "
                             f"{', '.join(sorted(known))}")
        columns[ours] = theirs
    return columns


def cut_hint(examples, add_eot):
    """Advice where most responses seem to have been cut when they were sampled, else None."""
    texts = [final_text(e.completion).rstrip() for e in examples if e.whole]
    ends = [text[-1] for text in texts if text]
    ended = sum(end in ".!?\"')]}>`*:;\u3002\uff01\uff1f\u201d" for end in ends)
    if add_eot and len(ends) >= 20 and ended < 0.5 * len(ends):
        return (f"note: only {ended} of {len(ends)} responses end like a sentence. If they were "
                "cut when sampled, --add_eot false keeps the model from learning to stop there.")


# --- a record and its cells -----------------------------------------------------------------------

ALIASES = {"conversations": "messages", "text": "completion", "response": "completion",
           "score": "reward", "kto_tag": "label"}
NUMBERS = ("score_chosen", "score_rejected", "win_prob_chosen", "win_prob_rejected")
OPTIONAL = (*NUMBERS, "target", "segment", "system", "input", "history", *ALIASES)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
         "system": "system", "tool": "tool", "function_call": "assistant", "observation": "tool"}


class Record:
    """One row of a file: its cells by our names, and where it stands. A null cell is absent."""

    def __init__(self, record, where, columns):
        self.where = where
        if not isinstance(record, dict):
            self.fail(f"expected a JSON object, got {type(record).__name__}")
        renamed = dict(record)
        for ours, theirs in columns.items():
            if theirs not in record:
                self.fail(f"--columns {ours}={theirs}, but the row has {list(record)}")
            renamed[ours] = record[theirs]
        self.cells = {name: value for name, value in renamed.items() if value is not None}
        for theirs, ours in ALIASES.items():
            if theirs in self.cells:
                self.cells.setdefault(ours, self.cells[theirs])
        cut = self.cells.get("truncated") is True or self.cells.get("finish_reason") == "length"
        self.whole = not cut

    def fail(self, message):
        raise SystemExit(f"{self.where}: {message}")

    def feedback(self, prompt, response, desirable=None, score=None):
        return Feedback(self.with_system(prompt), self.answer(response), desirable,
                        self.whole, self.where, score)

    def pair(self, prompt, chosen, rejected):
        """A pair, with whatever else the row says of it."""
        more = {name: self.number(self.cells[name], name) for name in NUMBERS if name in self.cells}
        if "target" in self.cells:
            more["target"] = self.answer(self.cells["target"])
        if "segment" in self.cells:
            more["segment"] = self.segment(self.cells["segment"])
        return Pair(self.with_system(prompt), self.answer(chosen), self.answer(rejected),
                    whole=self.whole, where=self.where, **more)

    def segment(self, value):
        """{"start": 0, "end": 2} -> (0, 2)"""
        if isinstance(value, dict):
            start, end = value.get("start"), value.get("end")
            if type(start) is int and type(end) is int and 0 <= start < end:
                return start, end
        self.fail(f"segment is {value}; expected {{\"start\": 0, \"end\": 2}}: the assistant's "
                  "turns from 0, end excluded")

    def label(self):
        """Strictly true/false, 1/0 or +1/-1: a guess from text would one day guess wrong."""
        value = self.cells["label"]
        if not isinstance(value, int) or value not in (-1, 0, 1):
            self.fail(f"label is {value!r}; valid are true, false, 1, 0, -1")
        return value == 1

    def number(self, value, column):
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not abs(value) < 1e300:            # NaN is not less than anything
            self.fail(f"{column} is {str(value)[:40]!r}; expected a finite number")
        return float(value)

    def text(self, value):
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            self.fail(f"{str(value)[:60]!r} is not a text")      # or half of a surrogate pair
        return value

    def prompt(self, column):
        """A text or a conversation."""
        value = self.cells[column]
        return self.text(value) if isinstance(value, str) else self.turns(value)

    def answer(self, value):
        """A text, or the text of one assistant message; else a tuple of turns."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            value = [value]
        turns = value if isinstance(value, tuple) else self.turns(value)
        if not turns or turns[0].role != "assistant" or turns[-1].role != "assistant":
            self.fail("a response must be a text, or messages from the assistant's to the "
                      f"assistant's; got roles {[turn.role for turn in turns]}")
        if len(turns) > 1 or turns[0].more:
            return turns
        return turns[0].content

    def turns(self, messages):
        """Messages, {role, content} or LLaMA-Factory's {from, value}, as a tuple of turns."""
        if not isinstance(messages, list) or not messages:
            self.fail("expected a text or a list of messages")
        return tuple(self.turn(message) for message in messages)

    def turn(self, message):
        if not isinstance(message, dict):
            self.fail("expected a message, an object with a role and a content")
        role = message.get("role") or message.get("from")
        if not isinstance(role, str) or role not in ROLES:
            self.fail(f"the role of a message is {role!r}; valid are {', '.join(ROLES)}")
        content = message.get("content")
        if content is None:
            content = message.get("value")
        keys = ("tool_calls", "tool_call_id", "name")
        more = {key: message[key] for key in keys if message.get(key)}
        if not more:
            return Turn(ROLES[role], self.text(content))
        if content is None and "tool_calls" in more:
            content = ""
        more = json.dumps(more, ensure_ascii=False)
        return Turn(ROLES[role], self.text(content), self.text(more))

    def with_system(self, prompt):
        """A system column makes a conversation of the prompt, and is its first turn."""
        system = self.cells.get("system")
        if not system:
            return prompt
        if isinstance(prompt, str):
            prompt = (Turn("user", prompt),)
        if prompt and prompt[0].role == "system":
            return prompt
        return (Turn("system", self.text(system)), *prompt)


# --- the formats: columns -> function of a Record -> examples -------------------------------------

def labelled_text(row):
    return [row.feedback(row.prompt("prompt"), row.cells["completion"], row.label())]


def labelled_messages(row):
    """A conversation: its last turn is what the label is about."""
    turns = row.turns(row.cells["messages"])
    return [row.feedback(turns[:-1], turns[-1:], row.label())]


def labelled_alpaca(row):
    return [row.feedback(_alpaca_prompt(row), row.cells["output"], row.label())]


def scored_text(row):
    score = row.number(row.cells["reward"], "reward")
    return [row.feedback(row.prompt("prompt"), row.cells["completion"], score=score)]


def scored_texts(row):
    prompt = row.prompt("prompt")
    responses, scores = row.cells["responses"], row.cells["scores"]
    lists = isinstance(responses, list) and isinstance(scores, list)
    if not lists or len(responses) != len(scores) or not responses:
        row.fail("responses and scores must be two lists of one length")
    return [row.feedback(prompt, response, score=row.number(score, "scores"))
            for response, score in zip(responses, scores)]


def paired(row):
    """Both sides may be whole chats that begin with the prompt again (UltraFeedback)."""
    if "prompt" in row.cells:
        prompt = row.prompt("prompt")
    elif "messages" in row.cells:
        prompt = row.prompt("messages")
    else:
        prompt = _alpaca_prompt(row)
    chosen, rejected = row.cells["chosen"], row.cells["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = row.turns(chosen), row.turns(rejected)
        start = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        again = chosen[:len(start)] == rejected[:len(start)] == start
        if again and start[0].role != "assistant":
            prompt, chosen, rejected = _split(chosen, rejected)
    return [row.pair(prompt, chosen, rejected)]


def whole_chats(row):
    """The turns that both chats share are the prompt. Of texts it is never a common beginning."""
    chosen, rejected = row.turns(row.cells["chosen"]), row.turns(row.cells["rejected"])
    return [row.pair(*_split(chosen, rejected))]


def _alpaca_prompt(row):
    """LLaMA-Factory's instruction, input and history, a list of [question, answer]."""
    turns = []
    for exchange in row.cells.get("history", []):
        if not isinstance(exchange, list) or len(exchange) != 2:
            row.fail("history must be a list of [question, answer]")
        turns += [Turn("user", row.text(exchange[0])), Turn("assistant", row.text(exchange[1]))]
    question = row.text(row.cells["instruction"])
    if row.cells.get("input"):
        question += "\n" + row.text(row.cells["input"])
    return (*turns, Turn("user", question))


def _split(chosen, rejected):
    """Two chats -> (the turns they share, the rest of each). Both rests begin with the assistant.

    (user Q, assistant A), (user Q, assistant B) -> (user Q), (assistant A), (assistant B)
    """
    shortest = min(len(chosen), len(rejected))
    n = 0
    while n < shortest and chosen[n] == rejected[n]:
        n += 1
    while n and not (n < shortest and chosen[n].role == rejected[n].role == "assistant"):
        n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


# The first format whose columns are all in the row is taken.
FORMATS = {
    ("prompt", "chosen", "rejected"): paired,
    ("messages", "chosen", "rejected"): paired,
    ("instruction", "chosen", "rejected"): paired,
    ("chosen", "rejected"): whole_chats,
    ("messages", "label"): labelled_messages,
    ("prompt", "completion", "label"): labelled_text,
    ("instruction", "output", "label"): labelled_alpaca,
    ("prompt", "completion", "reward"): scored_text,
    ("prompt", "responses", "scores"): scored_texts,
}

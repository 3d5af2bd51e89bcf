"""Rows to examples: every format of preference data becomes `Feedback` or `Pair`.

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

from plumbing.files import CsvRow, records


class Turn(NamedTuple):
    """One message of a conversation."""
    role: str                # system, user, assistant, tool; tools: the functions, as JSON
    content: str             # "" if the message has only tool calls
    more: str = ""           # tool_calls, tool_call_id and name as JSON text, which can be hashed


@dataclass(frozen=True, slots=True)
class Feedback:
    """One response with a thumb up or down.

    A prompt is a text or a conversation; a response is a text, or turns that begin and end with
    the assistant's. A prompt alone has completion "" and desirable None: the policy answers it.
    """
    prompt: str | tuple[Turn, ...]
    completion: str | tuple[Turn, ...]
    desirable: bool | None
    whole: bool = True       # False: the completion was cut when it was sampled, so has no end
    where: str = ""          # file and row, for messages
    score: float | None = None
    weight: float = 1.0      # multiplies the loss


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
    segment: tuple[int, int] | None = None          # trained assistant turns: [start, end)
    whole: bool = True
    where: str = ""
    weight: float = 1.0


# --- reading --------------------------------------------------------------------------------------

def read(files, *, flag="--data", watch=None, scored="labels", **how):
    """(examples, a line about them: formats, ignored columns, rows without an answer).

    files      names of files, see `records`
    flag       the flag that named them, for messages
    watch      a progress bar: watch(rows, title) gives the same rows
    scored     "labels", or "pairs": rows with a number become pairs (pairs_from_scores)
    how        columns, threshold, prompts: see `parse`
    """
    if isinstance(files, (str, Path)):
        files = [files]
    examples = []
    names, ignored = {}, {}                          # dicts keep their order
    without_answer = 0
    for file in files:
        rows = records(file, flag)
        if watch:
            rows = watch(rows, f"reading {file}")
        for where, record in rows:
            name, found, unused = parse(record, where, scored=scored, **how)
            names[name] = True
            ignored |= dict.fromkeys(unused)
            without_answer += not found
            examples += found
    name = ", ".join(names)
    for example in examples:
        if type(example) is not type(examples[0]):
            raise SystemExit(f"{example.where}: mixes pairs and single responses")
    if scored == "pairs" and any(getattr(e, "score", None) is not None for e in examples):
        examples, counts = pairs_from_scores(examples)
        name += f" as pairs ({counts_line(counts)})"
    if without_answer:
        name += f"; dropped: {without_answer:,} rows without an answer"
    if ignored:
        name += f"; ignored columns: {', '.join(ignored)}"
    if not examples:
        raise SystemExit(f"{flag} {' '.join(map(str, files))}: no rows in it {name}".rstrip())
    return examples, name


def parse(record, where="", *, columns=None, threshold=None, scored="labels", prompts=False):
    """One JSON object to (name of its format, list of examples, unused columns).

    columns    {"prompt": "question"}: the file's column question is our prompt
    threshold  a row with a number instead of a label is desirable if its number is above this
    prompts    True: a row may be a prompt without a response
    """
    row = Record(record, where, columns or {})
    form = next((form for form in FORMATS if row.cells.keys() >= {*form}), None)
    if form:
        name, examples = ", ".join(form), FORMATS[form](row)
    elif prompts and "prompt" in row.cells:
        name, examples = "prompts alone", [row.feedback(row.prompt("prompt"), "")]
    else:
        known = "; ".join(" + ".join(form) for form in FORMATS)
        near = max(FORMATS, key=lambda form: len(row.cells.keys() & {*form}))
        missing = ", ".join(name for name in near if name not in row.cells)
        row.fail(f"unknown format with columns {list(row.cells)} (null is none); nearest: "
                 f"{' + '.join(near)}, which lacks {missing}; known: {known}. "
                 "--columns prompt=question says that the file calls the prompt question")
    single = bool(form) and "chosen" not in form
    if single and scored == "pairs":                 # pairs are made of scores, not of labels
        if "label" in form and "reward" in row.cells:
            examples = [replace(examples[0], score=row.number(row.cell("reward")))]
    elif single and "label" not in form:
        if threshold is None:
            row.fail("scored rows need --threshold NUMBER (desirable: reward > NUMBER)")
        examples = [replace(e, desirable=e.score > threshold) for e in examples]
    return name, examples, [*row.unused]


# --- labels from pairs, pairs from scores, and lines about examples -------------------------------

def to_feedback(examples):
    """A pair becomes two: its chosen response is desirable, its rejected one undesirable."""
    feedback = []
    for e in examples:
        if isinstance(e, Feedback):
            feedback.append(e)
        else:
            for answer, label in ((e.chosen, True), (e.rejected, False)):
                feedback.append(Feedback(e.prompt, answer, label, e.whole, e.where,
                                         weight=e.weight))
    return feedback


def pairs_from_scores(examples):
    """(pairs, Counter): a prompt's best response with its worst, the second best, and so on.

    Scores 5, 3, 2, 1, 0 make the pairs (5, 0) and (3, 1); 2 is left over. Equal scores are a tie,
    which is dropped. A pair has the smaller one of its two weights.
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
                              whole=best.whole and worst.whole, where=best.where,
                              weight=min(best.weight, worst.weight)))
    return pairs, +counts


def final_text(answer):
    """The text of a response, or of its last turn if it has several."""
    return answer if isinstance(answer, str) else answer[-1].content


def plain_texts(example):
    """The texts of an example; [] for a conversation."""
    if not isinstance(example.prompt, str):
        return []
    names = ("prompt", "completion", "chosen", "rejected", "target")
    cells = [getattr(example, name, None) for name in names]
    return [cell for cell in cells if isinstance(cell, str)]


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
    """Advice if most responses seem to have been cut when they were sampled, else None."""
    texts = [final_text(e.completion).rstrip() for e in examples if e.whole]
    ends = [text[-1] for text in texts if text]
    ended = sum(end in ".!?\"')]}>`*:;\u3002\uff01\uff1f\u201d" for end in ends)
    if add_eot and len(ends) >= 20 and ended < 0.5 * len(ends):
        return (f"note: only {ended} of {len(ends)} responses end like a sentence. If they were "
                "cut when sampled, --add_eot false keeps the model from learning to stop there.")


# --- a record and its cells -----------------------------------------------------------------------

ALIASES = {"conversations": "messages", "text": "completion", "response": "completion",
           "output": "completion", "score": "reward", "kto_tag": "label"}
NUMBERS = ("score_chosen", "score_rejected", "win_prob_chosen", "win_prob_rejected")
OPTIONAL = (*NUMBERS, "weight", "target", "segment", "system", "tools", "input", "history",
            *ALIASES)
NOT_TEXTS = ("label", "reward", "weight", "segment", "truncated", *NUMBERS)
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "bot": "assistant", "function_call": "assistant", "system": "system",
         "developer": "system", "tool": "tool", "observation": "tool"}


class Record:
    """One row of a file: its cells by our names, and its place. A null cell counts as absent."""

    def __init__(self, record, where, columns):
        self.where = where
        self.names = dict(columns)                           # our name -> the file's
        self.column = ""                                     # our name of the column being read
        if not isinstance(record, dict):
            self.fail(f"expected a JSON object, got {type(record).__name__}")
        self.csv = isinstance(record, CsvRow)
        cells = dict(record)
        for ours, theirs in columns.items():
            if theirs not in record:
                self.fail(f"--columns {ours}={theirs}, but the row has {list(record)}")
            cells[ours] = record[theirs]
        self.cells = {name: value for name, value in cells.items() if value is not None}
        self.unused = {name: True for name in record if name in self.cells}
        for theirs, ours in ALIASES.items():
            if theirs in self.cells and ours not in self.cells:
                self.cells[ours] = self.cells[theirs]
                self.names[ours] = self.names.get(theirs, theirs)
        cut = self.cell("truncated") is True or self.cell("finish_reason") == "length"
        self.whole = not cut

    def cell(self, name, default=None):
        """The value of a column. The next `refuse` will name this column."""
        self.column = name
        self.unused.pop(self.names.get(name, name), None)
        value = self.cells.get(name, default)
        if self.csv and name in NOT_TEXTS:
            value = plain(value)
        return value

    def fail(self, message):
        raise SystemExit(f"{self.where}: {message}")

    def refuse(self, value, expected):
        """End with a line about a wrong value in the column that was read last."""
        theirs = self.names.get(self.column, self.column)
        self.fail(f"column {theirs}: expected {expected}, got {repr(value)[:60]} "
                  f"(--columns {self.column}=NAME reads another)")

    def feedback(self, prompt, response, desirable=None, score=None):
        prompt = self.with_tools(self.with_system(prompt))
        weight = self.number(self.cell("weight", 1.0), least=0)
        return Feedback(prompt, response, desirable, self.whole, self.where,
                        score, weight)

    def pair(self, prompt, chosen, rejected):
        """A pair with the row's scores, target, segment and weight."""
        sides = self.answer("chosen", chosen), self.answer("rejected", rejected)
        more = {name: self.number(self.cell(name)) for name in NUMBERS if name in self.cells}
        if "target" in self.cells:
            more["target"] = self.answer("target")
        if "segment" in self.cells:
            more["segment"] = self.segment(self.cell("segment"))
        prompt = self.with_tools(self.with_system(prompt))
        weight = self.number(self.cell("weight", 1.0), least=0)
        return Pair(prompt, *sides, whole=self.whole, where=self.where,
                    weight=weight, **more)

    def segment(self, value):
        """{"start": 0, "end": 2} -> (0, 2)"""
        if isinstance(value, dict):
            start, end = value.get("start"), value.get("end")
            if type(start) is int and type(end) is int and 0 <= start < end:
                return start, end
        self.refuse(value, 'the assistant\'s turns from 0, end excluded: {"start": 0, "end": 2}')

    def label(self):
        """Only true/false, 1/0 or +1/-1: a label that is a text would have to be guessed."""
        value = self.cell("label")
        if not isinstance(value, int) or value not in (-1, 0, 1):
            self.refuse(value, "true, false, 1, 0 or -1")
        return value == 1

    def number(self, value, least=-1e300):
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not least <= value < 1e300:        # NaN is not less than anything
            self.refuse(value, "a finite number" + " of 0 or more" * (least == 0))
        return float(value)

    def text(self, value):
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            self.refuse(value, "a text")                     # or half of a surrogate pair
        return value

    def prompt(self, column):
        """A text or a conversation."""
        value = self.cell(column)
        return self.text(value) if isinstance(value, str) else self.turns(value)

    def answer(self, column, value=None):
        """A text, or the text of one assistant message; else a tuple of turns. [] gives ""."""
        cell = self.cell(column)
        value = cell if value is None else value
        if isinstance(value, str):
            return self.text(value)
        if value == []:
            return ""
        if isinstance(value, dict):
            value = [value]
        turns = value if isinstance(value, tuple) else self.turns(value)
        if not turns or turns[0].role != "assistant" or turns[-1].role != "assistant":
            self.refuse([turn.role for turn in turns],
                        "a text, or messages whose first and last role is the assistant's")
        if len(turns) > 1 or turns[0].more:
            return turns
        return turns[0].content

    def turns(self, messages):
        """Messages, {role, content} or LLaMA-Factory's {from, value}, as a tuple of turns."""
        if not isinstance(messages, list) or not messages:
            self.refuse(messages, "a text or a list of messages")
        return tuple(self.turn(message) for message in messages)

    def turn(self, message):
        if not isinstance(message, dict):
            self.refuse(message, "a message, an object with a role and a content")
        role = message.get("role") or message.get("from")
        if str(role).lower() not in ROLES:
            self.refuse(role, f"a role: {', '.join(ROLES)}")
        content = message.get("content")
        if content is None:
            content = message.get("value")
        if isinstance(content, list):
            content = "".join(self.part(part) for part in content)
        keys = ("tool_calls", "tool_call_id", "name")
        more = {key: message[key] for key in keys if message.get(key)}
        if content is None and "tool_calls" in more:
            content = ""
        written = json.dumps(more, ensure_ascii=False, default=str) if more else ""
        return Turn(ROLES[role.lower()], self.text(content), self.text(written))

    def part(self, part):
        """The text of {"type": "text", "text": "Why?"}."""
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            self.refuse(part, "messages with only text")
        return self.text(part.get("text"))

    def chat(self, column):
        """Messages, or hh-rlhf's one text: Human: Why? Assistant: No."""
        value = self.cell(column)
        if not isinstance(value, str):
            return self.turns(value)
        before, *parts = re.split("\n\n(Human|Assistant):", "\n\n" + value.lstrip("\n"))
        roles = [ROLES[name.lower()] for name in parts[::2]]
        if before or not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            self.refuse(value, r"messages, or \n\nHuman: ...\n\nAssistant: ... in turn, or beside "
                        f"it a column prompt; its roles are {roles}")
        return tuple(Turn(role, self.text(text.strip())) for role, text in zip(roles, parts[1::2]))

    def with_system(self, prompt):
        """Put the system column, if there is one, in front of the prompt as its first turn."""
        system = self.cell("system")
        if not system:
            return prompt
        if isinstance(prompt, str):
            prompt = (Turn("user", prompt),)
        if prompt and prompt[0].role == "system":
            return prompt
        return (Turn("system", self.text(system)), *prompt)

    def with_tools(self, prompt):
        """Put the tools column, if there is one, in front of the prompt as a turn of JSON."""
        tools = self.cell("tools")
        if isinstance(tools, str):
            tools = plain(tools)                             # in many files it is a text
        if not tools:
            return prompt
        if not isinstance(tools, list):
            self.refuse(tools, "a list of functions")
        if isinstance(prompt, str):
            prompt = (Turn("user", prompt),)
        tools = self.text(json.dumps(tools, ensure_ascii=False))
        return (Turn("tools", tools), *prompt)


def plain(text):
    """A cell of a CSV file that is not meant as a text: "0.5" -> 0.5, "True" -> True."""
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except (TypeError, ValueError):
        return text


# --- the formats: columns -> function of a Record -> examples -------------------------------------

def labelled(row):
    return [row.feedback(_prompt(row), row.answer("completion"), row.label())]


def labelled_messages(row):
    """A conversation; the label is about its last turn."""
    turns = row.turns(row.cell("messages"))
    return [row.feedback(turns[:-1], row.answer("messages", turns[-1:]), row.label())]


def scored(row):
    score = row.number(row.cell("reward"))
    return [row.feedback(_prompt(row), row.answer("completion"), score=score)]


def scored_lists(row):
    prompt, scores, responses = _prompt(row), row.cell("scores"), row.cell("responses")
    lists = isinstance(responses, list) and isinstance(scores, list)
    if not lists or len(responses) != len(scores):
        row.refuse(responses, f"a list as long as scores, {scores!r:.60}")
    return [row.feedback(prompt, row.answer("responses", response), score=row.number(score))
            for response, score in zip(responses, scores)]


def paired(row):
    """Both sides may be whole chats that begin with the prompt again (UltraFeedback)."""
    prompt = _prompt(row)
    chosen, rejected = row.cell("chosen"), row.cell("rejected")
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    if lists and chosen and rejected:
        chosen, rejected = row.chat("chosen"), row.chat("rejected")
        start = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        again = chosen[:len(start)] == rejected[:len(start)] == start
        if again and start[0].role != "assistant":
            prompt, chosen, rejected = _split(chosen, rejected)
    return [row.pair(prompt, chosen, rejected)]


def whole_chats(row):
    """The prompt is the turns that both chats share: whole turns, never a part of one."""
    return [row.pair(*_split(row.chat("chosen"), row.chat("rejected")))]


def _prompt(row):
    """The prompt: column prompt or messages, or LLaMA-Factory's instruction, input, history."""
    for column in ("prompt", "messages"):
        if column in row.cells:
            return row.prompt(column)
    turns = []
    history = row.cell("history", [])
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            row.refuse(exchange, "a list of [question, answer]")
        turns += [Turn("user", row.text(exchange[0])), Turn("assistant", row.text(exchange[1]))]
    question = row.text(row.cell("instruction"))
    more = row.cell("input")
    if more:
        question += "\n" + row.text(more)
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
    ("prompt", "completion", "label"): labelled,
    ("instruction", "completion", "label"): labelled,
    ("prompt", "completion", "reward"): scored,
    ("prompt", "responses", "scores"): scored_lists,
}

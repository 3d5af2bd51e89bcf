"""Comparisons of policy and reference: stored texts, blinded pairs, verdicts, length control.

A comparison is comparison.jsonl in a run's folder: one answer of each model to each prompt, sampled
once, so that every judge reads the same texts. People or an LLM get it as blinded pairs. Their
verdicts are read back as wins: 1 policy, 0 reference, 1/2 tie.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from plumbing.formats import Turn
from plumbing.reading import read_json, reading
from plumbing.rundir import write


def read_result(out):
    """The content of eval.json; {} if there is none."""
    file = Path(out) / "eval.json"
    return read_json(file, out) if file.is_file() else {}


def save_result(out, result):
    write(Path(out) / "eval.json", json.dumps(result, indent=2) + "\n")


def prompt_text(prompt):
    """A prompt for people to read: its text, or "role: ..." for each turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def write_comparison(out, rows):
    """-> the file's hash"""
    lines = []
    for row in rows:
        if not isinstance(row["prompt"], str):
            row = row | {"prompt": [turn._asdict() for turn in row["prompt"]]}
        lines.append(json.dumps(row) + "\n")
    write(Path(out) / "comparison.jsonl", "".join(lines))
    return _digest(out)


def kept_comparison(out):
    """(rows, how they were sampled); ([], {}) if there is none for the run's present model.

    eval.json holds the file's hash. A resumed run rewrites eval.json, so the hash is gone then.
    """
    note = read_result(out).get("comparison")
    if not isinstance(note, dict) or _digest(out) != note.get("sha256", ""):
        return [], {}
    rows = [json.loads(line) for line in open(Path(out) / "comparison.jsonl")]
    for row in rows:
        if not isinstance(row["prompt"], str):
            row["prompt"] = tuple(Turn(**turn) for turn in row["prompt"])
    return rows, note


def _digest(out):
    file = Path(out) / "comparison.jsonl"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


# --- blinded pairs and their verdicts -------------------------------------------------------------

def export_pairs(out, rows, file):
    """Every pair twice, sides swapped, in one shuffled order: lines {"id", "prompt", "a", "b"}."""
    lines = []
    for name, (i, side) in _places(out, rows).items():
        first, second = rows[i]["policy"], rows[i]["reference"]
        if side == "b":
            first, second = second, first
        pair = {"id": name, "prompt": prompt_text(rows[i]["prompt"]), "a": first, "b": second}
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    write(Path(file), "".join(lines))


def _places(out, rows):
    """id of a line -> (pair, side of the policy: "a" or "b"), in the order of the export.

    An id is the comparison's hash and the line's number. The hash also seeds the order. So the same
    texts give the same export, and an id does not tell the judge which side is the policy.
    """
    digest = _digest(out)[:8]
    places = [(i, side) for i in range(len(rows)) for side in "ab"]
    order = np.random.default_rng(int(digest, 16)).permutation(len(places))
    return {f"{digest}-{k:05d}": places[j] for k, j in enumerate(order)}


def read_verdicts(out, rows, file):
    """(wins, facts) from lines {"id", "verdict": "a" | "b" | "tie"}; more columns are ignored.

    wins (n,): the mean over a pair's verdicts. A judge who says "a" in both orders prefers a place,
    not a text: each side gets half.
    facts: `disagreement`, the share of pairs judged in both orders whose verdicts differ;
    `position_bias`, the share of "a" among "a" and "b"; `one_order`, pairs judged in one order.
    """
    places = _places(out, rows)
    given = [{} for _ in rows]          # for each pair: side of the policy -> its win
    said = []
    with reading(f"--verdicts {file}"):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--verdicts {file}: line {number}"
        name, verdict = _parse_verdict(line, where)
        if name not in places:
            raise SystemExit(f"{where}: id {name!r} is not of an export of the present texts")
        i, side = places[name]
        if side in given[i]:
            raise SystemExit(f"{where}: id {name!r} has a verdict already")
        given[i][side] = 0.5 if verdict == "tie" else float(verdict == side)
        said.append(verdict)
    missing = given.count({})
    if missing:
        raise SystemExit(f"--verdicts {file}: {missing} of {len(rows)} pairs have no verdict; one "
                         "order is enough")
    wins = np.array([np.mean(list(verdicts.values())) for verdicts in given])
    differs = [len(set(verdicts.values())) > 1 for verdicts in given if len(verdicts) == 2]
    placed = [verdict == "a" for verdict in said if verdict != "tie"]
    return wins, {"ties": sum(set(verdicts.values()) == {0.5} for verdicts in given),
                  "disagreement": float(np.mean(differs)) if differs else None,
                  "position_bias": float(np.mean(placed)) if placed else None,
                  "one_order": len(given) - len(differs)}


def _parse_verdict(line, where):
    try:
        record = json.loads(line)
        name, verdict = record["id"], record["verdict"].strip().lower()
        valid = verdict in ("a", "b", "tie") and isinstance(name, str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise SystemExit(f"{where}: expected {{\"id\": \"...\", \"verdict\": \"a\", \"b\" or "
                         f"\"tie\"}}, got {line.strip()[:60]}")
    return name, verdict


def length_controlled(wins, differences, *, ridge=1e-3):
    """The win rate at equal lengths: sigma(a), with P(win) = sigma(a + b tanh(d / std(d))).

    Paper: Dubois et al. 2024, Length-Controlled AlpacaEval, arXiv 2404.04475. Departure: no term
    for the difficulty of each instruction, which needs verdicts on many models.
    wins (n,): 1, 0, or 1/2 for a tie. differences d (n,): the policy's length minus the
    reference's, not centred. a and b maximise the log-likelihood minus ridge/2 (a^2 + b^2); the
    ridge keeps them finite. None if all differences are equal but not 0: then the effect of length
    cannot be measured.
    """
    y = np.asarray(wins, float)
    d = np.asarray(differences, float)
    if d.std() == 0:
        return None if d.any() else float(y.mean())
    x = np.stack([np.ones_like(d), np.tanh(d / d.std())], 1)            # (n, 2)
    w = np.zeros(2)                                                     # a, b

    def loss(w):
        return (np.logaddexp(0, x @ w) - y * (x @ w)).sum() + ridge / 2 * w @ w

    for _ in range(100):                                                # Newton's method
        p = _sigma(x @ w)
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x.T * (p * (1 - p))) @ x + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while loss(w - step) > loss(w):                                 # on a flat tail: too far
            step /= 2
        w = w - step
        if np.abs(step).max() < 1e-12:
            break
    return float(_sigma(w[0]))


def _sigma(x):
    return 0.5 * (1 + np.tanh(x / 2))                                   # without exp's overflow

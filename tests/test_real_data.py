"""Real preference files: read as their README counts them, trained as the equations say.

The files stay outside the repository; without them these tests skip. The same properties are
tested on made data in test_formats.py, test_data.py and test_train.py.
"""
import json
import math

import pytest
import torch

import data
import train
from conftest import SHARED, needs_shared
from lab import log_prob, tiny_llama
from plumbing import huggingface
from plumbing.formats import Turn, read, records, to_feedback
from plumbing.tokenizer import load_tokenizer

pytestmark = needs_shared
BYTES = load_tokenizer()
STACK = dict(columns=dict(prompt="question", chosen="response_j", rejected="response_k"))


def labels(file, **how):
    examples = to_feedback(read(SHARED / file, **how)[0])
    return examples, *data.encode(examples, BYTES, max_len=60_000, max_prompt_len=50_000)


def test_labels_are_read_as_the_readme_counts_them():
    examples, units, counts = labels("llamafactory/kto_en_demo.json")
    assert counts == {"read": 300, "desirable": 150, "undesirable": 150, "prompts": 297,
                      "prompts with both labels": 1}
    assert sum(len(e.prompt) > 1 for e in examples) == 77
    for number, control in ((139, "</s>"), (257, "<|user|>")):           # they stay text
        assert control in examples[number].completion and not examples[number].desirable
    for example, (row,) in zip(examples, units, strict=True):
        assert BYTES.text(row.response) == example.completion


def test_pairs_are_read_as_the_readme_counts_them():
    for file, systems, duplicates in (("dpo_en_demo", 80, 5), ("dpo_zh_demo", 64, 11)):
        pairs, _ = read(SHARED / f"llamafactory/{file}.json")
        assert len(pairs) == 300 and sum(p.prompt[0].role == "system" for p in pairs) == systems
        assert 300 - len({(p.prompt, p.chosen, p.rejected) for p in pairs}) == duplicates


def test_scored_reviews_are_labels_or_pairs_best_with_worst():
    examples, units, counts = labels("odpo/imdb-sft-test.jsonl", threshold=1.0)
    assert len(examples) == 2560 and sum(e.desirable for e in examples) == 1682
    assert len({e.prompt for e in examples}) == 252
    assert sum("\x85" in e.prompt + e.completion for e in examples) == 3
    assert counts["dropped: empty response"] == 17 and len(units) == 2543
    pairs, name = read(SHARED / "odpo/imdb-sft-test.jsonl", scored="pairs")
    ties = int(name.split("ties dropped ")[1].rstrip(")"))
    assert "left over" not in name and 2 * (len(pairs) + ties) == 2560     # none is lost


def test_repeated_questions_and_whole_chats():
    _, units, counts = labels("torchtune/stack_exchange_paired_tiny.json", **STACK)
    assert counts["prompts"] == 8 and len(units) == 50
    for row, other in data.mismatched_units(units, seed=0, max_len=60_000):
        answers = {unit[0].response.tobytes() for unit in units
                   if unit[0].prompt_key == row.prompt_key}
        assert other.response.tobytes() not in answers
    (pair,), _ = read(SHARED / "torchtune/hh_rlhf_tiny.json")
    assert pair.prompt == (Turn("user", "What do I do when I have a hole in my trousers?"),)
    assert (pair.chosen, pair.rejected) == ("Fix the hole.", "Take them off.")


# --- training -------------------------------------------------------------------------------------

def first_gradient_norm(policy, units, paired, beta=0.1):
    """Of the first step, policy = reference, in float64 and one sequence at a time.

    There the slope of -log sigma(beta h) in h is -beta/2, and that of KTO's value is beta/4.
    """
    total = 0
    for unit in units:
        logps = [log_prob(policy, row) for row in unit]
        if paired:
            total = total - beta / 2 * (logps[0] - logps[1])
        else:
            total = total - beta / 4 * (1 if unit[0].desirable else -1) * logps[0]
    (total / len(units)).backward()
    gradients = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
    return float(torch.stack(gradients).norm())


RUNS = [("kto", "llamafactory/kto_en_demo.json"), ("kto", "odpo/imdb-sft-test.jsonl"),
        ("kto", "torchtune/stack_exchange_paired_tiny.json"),
        ("dpo", "llamafactory/dpo_en_demo.json"), ("dpo", "llamafactory/dpo_zh_demo.json"),
        ("dpo", "odpo/imdb-sft-test.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("loss, file", RUNS)
def test_the_first_step_is_the_equation_and_the_margin_rises(tmp_path, loss, file):
    rows, paired = [row for _, row in records(SHARED / file)][:12], loss == "dpo"
    some = tmp_path / "some.jsonl"                                       # few rows, many steps
    some.write_text("\n".join(json.dumps(row) for row in rows))
    start = tiny_llama(tmp_path / "llama", [json.dumps(row, ensure_ascii=False) for row in rows])
    words, how = ["--max_len", 128, "--max_prompt_len", 64], {}
    if "imdb" in file:
        how = dict(scored="pairs") if paired else dict(threshold=1.0)
        words += ["--add_eot", "false", "--threshold", 1.0]
    if "stack" in file:
        how = STACK
        words += ["--columns", "prompt=question,chosen=response_j,rejected=response_k"]
    words = ["--loss", loss, "--data", some, "--model", start, "--out", tmp_path / "run", *words,
             "--batch_size", 5, "--seed", 1, "--warmup", 1, "--steps", 12, "--lr", "1e-3"]
    train.main([str(word) for word in words])

    examples, _ = read(some, **how)
    if not paired:
        examples = to_feedback(examples)
    units, _ = data.encode(examples, load_tokenizer(start), max_len=128, max_prompt_len=64,
                           add_eot="imdb" not in file)
    batch = [units[i] for i in data.batch_rows(len(units), 5, seed=1, step=0)]
    policy = huggingface.load_policy(start, dtype=torch.float64)
    metrics = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert metrics[0]["loss"] == pytest.approx(math.log(2) if paired else 0.5, abs=1e-5)
    norm = first_gradient_norm(policy, batch, paired)
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)      # the run is float32
    margin = json.loads((tmp_path / "run" / "eval.json").read_text())["train"]["margin"]
    assert margin > 0.1

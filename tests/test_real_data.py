"""KTO and DPO on real preference files, as they are, with a tiny random Llama and with the small GPT over GPT-2's vocabulary.

The files stay outside the repository; without them these tests skip, and test_data.py and test_train.py prove the same on data they make.
"""
import json
import math

import pytest
import torch

import data
import model
import train
from conftest import SHARED, needs_shared
from test_train import metrics, run, tiny_llama

FILES = {  # file -> how it is read, rows or pairs in it
    "llamafactory/kto_en_demo.json": ([], 300),
    "llamafactory/dpo_en_demo.json": ([], 300),
    "llamafactory/dpo_zh_demo.json": ([], 300),
    "odpo/imdb-sft-test.jsonl": (["--add_eot", "false"], 2560),
    "torchtune/stack_exchange_paired_tiny.json": (["--columns", "prompt=question,chosen=response_j,rejected=response_k"], 25),
    "torchtune/hh_rlhf_tiny.json": ([], 1),
}


def first_step(policy, units, batch, beta, paired):
    """Loss and gradient norm of the first step, policy = reference, in float64 and one sequence at a time."""
    def logp(row):
        ids = torch.tensor(row.ids.tolist())
        logits = policy(ids, torch.arange(len(ids)), [len(ids)])
        return model.token_logps(logits[None], ids[None], torch.tensor(row.mask.tolist())[None].double()).sum()

    for i in batch.rows:                                 # the slope of -log sigma(beta h) at h = 0 is -beta/2, that of KTO's value beta/4
        unit = units[i]
        objective = -0.5 * beta * (logp(unit[0]) - logp(unit[1])) if paired else -0.25 * beta * (1 if unit[0].desirable else -1) * logp(unit[0])
        (objective / len(batch.rows)).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    return math.log(2) if paired else 0.5, float(norm)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "dpo"])
@pytest.mark.parametrize("kind, file", [*(("llama", file) for file in FILES), ("gpt", "llamafactory/dpo_zh_demo.json"), ("gpt", "odpo/imdb-sft-test.jsonl")])
def test_the_first_step_is_the_equation_and_the_margin_rises(tmp_path, capsys, kind, file, loss):
    how, n = FILES[file]
    path, paired = SHARED / file, loss == "dpo"
    if paired and "kto" in file:
        with pytest.raises(SystemExit, match="--loss dpo needs pairs"):
            run("--loss", loss, "--data", path)
        return
    sizes = ["--max_len", 128, "--max_prompt_len", 64, "--batch_size", min(8, n * (1 if paired else 2)), "--seed", 1]
    read = dict(columns=data.parse_columns(how[1]) if "--columns" in how else None, threshold=1.0, scored="pairs" if paired else "labels")
    words = ["--loss", loss, "--data", path, *how, *sizes, "--warmup", 1, "--out", tmp_path / "run", *(["--threshold", 1.0] if "imdb" in file else [])]
    if not paired and "hh_rlhf" in file:
        words += ["--z0", "zero"]                                                               # a single prompt has no mismatched pairs
    if kind == "llama":
        tokenizer_texts = [json.dumps(r, ensure_ascii=False) for _, r in zip(range(40), (r for _, r in data._records(path)))]
        start = tiny_llama(tmp_path / "llama", tokenizer_texts)
        words += ["--model", start]
        tokenizer = data.load_tokenizer(start)
    else:
        words += ["--tokenizer", SHARED / "gpt2-bpe", "--sft_steps", 1]
        tokenizer = data.load_tokenizer(SHARED / "gpt2-bpe")
    some = tmp_path / "some.jsonl"                                                              # trained for long on few rows, read in whole first
    run(*words, "--dry_run")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("data:"))
    examples, _ = data.read(path, **read)
    examples = examples if paired else data.to_feedback(examples)
    encoded, counts = data.encode(examples, tokenizer, max_len=128, max_prompt_len=64, add_eot="--add_eot" not in how)
    dropped = sum(v for k, v in counts.items() if k.startswith("dropped"))
    assert counts["read"] == len(encoded) + dropped and data.counts_line(counts) in line, "no row is lost without being counted"
    if not (paired and "imdb" in file):
        assert counts["read"] == n * (1 if paired or "kto" in file or "imdb" in file else 2)

    records = [r for _, r in data._records(path)][:12]
    some.write_text("\n".join(json.dumps(r) for r in records))
    words[words.index(path)] = some
    run(*words, "--steps", 12, "--lr", "1e-3")
    config, m = json.loads((tmp_path / "run/config.json").read_text()), metrics(tmp_path / "run")
    examples, _ = data.read(some, **read)
    units = data.encode(examples if paired else data.to_feedback(examples), tokenizer, max_len=128, max_prompt_len=64, add_eot="--add_eot" not in how)[0]
    units = units if paired else [(u,) for u in units]
    batch = data.batch_at([u[0].prompt_key for u in units], config["batch_size"], seed=1, step=0)
    value, norm = first_step(model.load_policy(config["init"], dtype=torch.float64), units, batch, config["beta"], paired)
    assert m[0]["loss"] == pytest.approx(value, abs=1e-5) and m[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)      # the run is float32
    margin = json.loads((tmp_path / "run/eval.json").read_text())["train"]["margin"]
    labels = {row.desirable for u in units for row in u}
    assert margin > 0.1 if len(labels) == 2 else margin is None

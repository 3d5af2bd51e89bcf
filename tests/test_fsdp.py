"""Sharded over processes, a run is the same run: the same steps, metrics, checkpoints and exported model, for our GPT and for transformers'.

This file is also what torchrun starts: every process goes through a list of commands, so that one start of processes serves many cases.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import model
import train


def commands(file):
    """What each process does: train.main on every command of the file, in one process group. What stops a command, rank 0 writes down."""
    dist.destroy_process_group = lambda *_: None                                    # main ends with it; the next command needs the group
    real, said = train.train_step, {}

    def dies_at(step):
        return lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < step else sys.exit(f"died before step {step}")

    for name, words, dies in json.loads(Path(file).read_text()):
        train.train_step = dies_at(dies) if dies else real
        print("-----", name, flush=True)
        try:
            train.main(words)
        except SystemExit as e:
            said[name] = e.code
        train.Group.join().barrier()
    if int(os.environ["RANK"]) == 0:
        Path(file).with_suffix(".said").write_text(json.dumps(said))


def launch(processes, folder, cases):
    """cases: {name: (words, dies_at)}.   -> {name: what stopped it}"""
    file = folder / f"commands-{processes}.json"
    file.write_text(json.dumps([[name, [str(w) for w in words], dies] for name, (words, dies) in cases.items()]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(file.with_suffix(".said").read_text()) | {"stdout": done.stdout, "stderr": done.stderr}


# --- the cases ------------------------------------------------------------------------------------------------------------

def llama(folder, texts, tied):
    from test_train import tiny_llama
    from transformers import LlamaConfig, LlamaForCausalLM
    tiny_llama(folder, texts)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied})).save_pretrained(folder)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """13 rows, 13 pairs; a GPT and a reference with more extreme logits, so that z0 is above 0; Llamas with a tied and an untied head."""
    folder, rng, words = tmp_path_factory.mktemp("fsdp"), np.random.default_rng(0), "sun moon rain wind leaf stone river cloud bird snow".split()
    text = lambda i: " ".join(rng.choice(words, size=1 + i % 4))                                                  # noqa: E731
    rows = [{"prompt": f"say {words[i % 7]}: ", "completion": text(i), "label": bool(i % 3)} for i in range(13)]
    pairs = [{"prompt": f"say {words[i % 7]}: ", "chosen": text(i), "rejected": text(i + 1)} for i in range(13)]
    for name, records in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(257, 64, 2, 2, 32)).double()
    gpt.save(folder / "gpt", eot=256)
    with torch.no_grad():
        gpt.ln_f.weight.mul_(3)
    gpt.save(folder / "other", eot=256)
    for name, tied in (("llama", False), ("tied", True)):
        llama(folder / name, [json.dumps(r) for r in rows], tied)
    return folder


# Batches of 4, of which the fourth has one row: of two processes one, of four processes three have nothing to do in that step
# 3. With 1 row per forward the others have more forwards than these.
def flags(lab, out, what, *more, loss="kto", steps=5):
    models = ["--init", lab / "gpt", "--ref", lab / "other"] if what == "gpt" else ["--init", lab / "gpt", "--ref", lab / "gpt"] if what == "same" else ["--model", lab / what]
    return ["--loss", loss, "--data", lab / ("rows.jsonl" if loss in ("kto", "bco") else "pairs.jsonl"), *models, "--dtype", "fp64", "--max_len", 64, "--batch_size", 4,
            "--micro_batch_size", 1, "--steps", steps, "--lr", "1e-3", "--warmup", 1, "--seed", 3, "--max_grad_norm", "0.5", "--device", "cpu", "--out", out, *more]


SAME = {"gpt": ("gpt",), "same dpo": ("same", "--checkpoint_activations"), "llama": ("llama", "--checkpoint_activations"), "tied dpo": ("tied",),
        "bco": ("gpt",), "tr_dpo": ("same", "--ref_every", 2), "sdpo_stepwise": ("same", "--checkpoint_activations"), "wpo": ("same",)}


def case(lab, name, out, *more):
    what, *own = SAME[name]
    loss = name.split()[-1] if name.split()[-1] in {**train.LOSSES, **train.RECIPES} else "kto"
    return flags(lab, out, what, *own, *more, loss=loss, steps=3 if loss == "sdpo_stepwise" else 5)


@pytest.fixture(scope="module")
def runs(lab):
    """Every case in one process; on two processes, sharded; some of them on two processes with whole models; some more."""
    for name in SAME:
        train.main([str(w) for w in case(lab, name, lab / "one" / name)])
    cases = {name: (case(lab, name, lab / "two" / name, "--fsdp"), 0) for name in SAME}
    cases |= {f"whole {name}": (case(lab, name, lab / "whole" / name), 0) for name in ("gpt", "tied dpo")}
    keep = ("--save_every", 2)
    cases |= {f"dies {n}": (case(lab, name, lab / f"dies{n}", "--fsdp", *keep), 4) for n, name in ((2, "gpt"), (4, "gpt"))}
    cases |= {"resumes": (case(lab, "gpt", lab / "dies2", "--fsdp", "--resume", *keep), 0),
              "bf16": (flags(lab, lab / "bf16", "same", "--fsdp", "--dtype", "bf16", "--overwrite"), 0)}
    return launch(2, lab, cases)


def metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def agree(a, b, tolerance):
    x, y = (load_file(Path(out) / "model" / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys() and len(metrics(a)) == len(metrics(b))
    assert max(float((x[k] - y[k]).abs().max()) for k in x) <= tolerance
    for m, n in zip(metrics(a), metrics(b)):
        assert m.keys() == n.keys()
        for key in m.keys() - {"tokens_per_second"}:
            assert m[key] == n[key] or m[key] == pytest.approx(n[key], abs=tolerance), key


# float64 sums in another order differ by about 1e-16 each; AdamW divides by sqrt(v), which may raise that a thousandfold
ROUNDING = 1e-10


@pytest.mark.parametrize("name", SAME)
def test_sharded_over_two_processes_is_one_process(lab, runs, name):
    assert name not in runs, runs[name]
    agree(lab / "one" / name, lab / "two" / name, ROUNDING)


@pytest.mark.parametrize("name", ["gpt", "tied dpo"])
def test_sharded_is_plain_data_parallel(lab, runs, name):
    assert f"whole {name}" not in runs
    agree(lab / "whole" / name, lab / "two" / name, ROUNDING)


if __name__ == "__main__":
    commands(sys.argv[1])

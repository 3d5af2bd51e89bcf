"""Sharded over processes, a run is the same run: the same steps, metrics, checkpoints and exported model, for our GPT and for transformers'.

This file is also what torchrun starts: every process goes through a list of commands, so that one start of processes serves many cases.
"""
import json
import os
import re
import shutil
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

pytestmark = pytest.mark.slow                 # a minute and more of processes


def commands(file):
    """What each process does: train.main on every command of the file, in one process group. What stopped a command, and what it held, rank 0 writes down."""
    import torch.distributed.checkpoint as dcp
    dist.destroy_process_group = lambda *_: None                                    # main ends with it; the next command needs the group
    train.evaluate.plot_curves = lambda *_: None
    step, load, write, said = train.train_step, train.load_sharded, dcp.HuggingFaceStorageWriter.write_data, {}

    def watched(policy, reference, optimizer, batch, *rest, **how):
        m = step(policy, reference, optimizer, batch, *rest, **how)
        if train.sharded(policy):
            state = [x for s in optimizer.state.values() for x in s.values() if x.dim()]
            here, all_ = (sum(f(p).numel() for p in [*policy.parameters(), *state]) for f in (lambda p: p.to_local(), lambda p: p))
            said[name] |= {"share": here / all_, "in_memory": here}
        return m

    def loads(*given, **how):
        said[name]["loaded"] += 1
        return load(*given, **how)

    def full(writer, plan, planner):
        if fault == "disk full" and "000004" in str(writer.path) and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return write(writer, plan, planner)

    train.train_step, train.load_sharded, dcp.HuggingFaceStorageWriter.write_data = watched, loads, full
    for name, words, fault in json.loads(Path(file).read_text()):
        said[name] = {"loaded": 0}
        print("-----", name, flush=True)
        try:
            train.main(words)
        except SystemExit as e:
            said[name]["code"] = e.code
            said[name]["left"] = sorted(p.name for p in Path(words[words.index("--out") + 1]).glob("checkpoint/*"))
        train.Group.join().barrier()
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, said)
    if int(os.environ["RANK"]) == 0:                                                # a complaint is said by whoever comes first, and not by the others
        for name in said:
            lines = [x[name]["code"] for x in everybody if "code" in x[name]]
            said[name]["stopped"] = [line for line in lines if isinstance(line, str)]
            assert len(lines) in (0, len(everybody)), (name, "not by all processes", lines)
        Path(file).with_suffix(".said").write_text(json.dumps(said))


def launch(processes, folder, cases):
    """cases: {name: (words, fault)}.   -> {name: what was seen of it, with what stopped it}"""
    file = folder / f"commands-{processes}.json"
    file.write_text(json.dumps([[name, [str(w) for w in words], fault] for name, (words, fault) in cases.items()]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(file.with_suffix(".said").read_text())


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
    from transformers import BloomConfig, BloomForCausalLM
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
    shutil.copytree(folder / "llama", folder / "bloom")                             # no position_ids: its rows are padded
    BloomForCausalLM(BloomConfig(vocab_size=600, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(folder / "bloom")
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


KEEP = ("--save_every", 2)


@pytest.fixture(scope="module")
def runs(lab):
    """Every case in one process; on two processes, sharded; some of them on two processes with whole models; faults."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train.evaluate, "plot_curves", lambda *_: None)
        for name in SAME:
            train.main([str(w) for w in case(lab, name, lab / "one" / name)])
    cases = {name: (case(lab, name, lab / "two" / name, "--fsdp", *KEEP), None) for name in SAME}
    cases |= {f"whole {name}": (case(lab, name, lab / "whole" / name), None) for name in ("gpt", "tied dpo")}
    return launch(2, lab, cases | {
        "resumes whole": (case(lab, "gpt", lab / "whole" / "gpt", "--fsdp", "--resume"), None),
        "disk": (case(lab, "gpt", lab / "disk", "--fsdp", *KEEP), "disk full"),
        "resumes": (case(lab, "gpt", lab / "disk", "--fsdp", "--resume", *KEEP), None),
        "diverges": (flags(lab, lab / "diverges", "same", "--fsdp", "--lr", "1e200"), None),
        "dry": (flags(lab, lab / "dry", "gpt", "--fsdp", "--dry_run"), None),
        "padded": (flags(lab, lab / "padded", "bloom", "--fsdp", loss="dpo"), None),
        "bf16": (flags(lab, lab / "bf16", "same", "--fsdp", "--dtype", "bf16", loss="dpo"), None)})


def metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def agree(a, b, tolerance):
    x, y = (load_file(Path(out) / "model" / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys() and len(metrics(a)) == len(metrics(b))
    assert max(float((x[k] - y[k]).abs().max()) for k in x) <= tolerance
    for m, n in zip(metrics(a), metrics(b)):
        assert m.keys() == n.keys()
        equal = m.get("logratios/max", 1) < tolerance                               # then the sign of a margin is rounding's
        for key in m.keys() - {"tokens_per_second"} - ({"rewards/accuracies"} if equal else set()):
            assert m[key] == n[key] or m[key] == pytest.approx(n[key], abs=tolerance), key


# float64 sums in another order differ by about 1e-16 each; AdamW divides by sqrt(v), which may raise that a thousandfold
ROUNDING = 1e-10


@pytest.mark.parametrize("name", SAME)
def test_sharded_over_two_processes_is_one_process(lab, runs, name):
    assert runs[name]["stopped"] == []
    agree(lab / "one" / name, lab / "two" / name, ROUNDING)


@pytest.mark.parametrize("name", ["gpt", "tied dpo"])
def test_sharded_is_plain_data_parallel(lab, runs, name):
    assert runs[f"whole {name}"]["stopped"] == []
    agree(lab / "whole" / name, lab / "two" / name, ROUNDING)


def test_the_cases_have_a_z0_above_0_a_clipped_gradient_and_a_batch_of_one_row(lab, runs):
    m = metrics(lab / "two/gpt")
    assert max(x["z0"] for x in m) > 0.1 and max(x["grad_norm"] for x in m) > 0.5 and m[3]["epoch"] == 1 and m[2]["epoch"] == pytest.approx(12 / 13, abs=1e-4)


def test_each_process_holds_its_share_and_the_reference_is_no_second_model(runs):
    """Half of weights and Adam's means, but for rows that do not divide evenly. Where policy and reference start from one folder, one
    model is loaded in all; else the reference is a second one, gone before the first step."""
    assert all(0.45 < runs[name]["share"] < 0.55 for name in SAME)
    assert [runs[name]["loaded"] for name in ("same dpo", "llama", "tied dpo", "wpo", "gpt", "bco")] == [1, 1, 1, 1, 2, 2]


def test_bf16_computes_in_bf16_and_sums_in_float32(lab, runs):
    """bf16 keeps 8 bits: a product is off by up to 0.4 %, a gradient by a few times that. One averaged over ranks would be half as long."""
    assert runs["bf16"]["stopped"] == []
    a, b = metrics(lab / "bf16")[0], metrics(lab / "two/same dpo")[0]
    assert a["loss"] == pytest.approx(b["loss"], abs=0.01) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.03)


# --- checkpoints ----------------------------------------------------------------------------------------------------------

def test_a_full_disk_stops_all_processes_in_one_line_and_the_run_resumes_with_the_same_bytes(lab, runs):
    line, = runs["disk"]["stopped"]
    assert "step-000004: the checkpoint cannot be written" in line and "No space left" in line and "\n" not in line
    assert runs["disk"]["left"] == ["step-000002"] and runs["resumes"]["stopped"] == []
    agree(lab / "two/gpt", lab / "disk", 0)
    assert [m["step"] for m in metrics(lab / "disk")] == list(range(5))
    assert sorted(p.name for p in (lab / "disk/checkpoint").iterdir()) == ["step-000004", "step-000005"], "the last two, nothing half written"


@pytest.fixture(scope="module")
def on_four(lab, runs):
    """The same run on four processes; and one from two, whose last checkpoint is then damaged."""
    shutil.copytree(lab / "two/gpt", lab / "damaged")
    file = next((lab / "damaged/checkpoint/step-000005").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    return launch(4, lab, {"gpt": (case(lab, "gpt", lab / "four", "--fsdp"), None), "resumes": (case(lab, "gpt", lab / "damaged", "--fsdp", "--resume", *KEEP), None)})


def test_four_processes_are_one_though_three_have_no_row_in_a_step(lab, runs, on_four):
    assert on_four["gpt"]["stopped"] == [] and on_four["gpt"]["share"] < 0.3
    agree(lab / "one/gpt", lab / "four", ROUNDING)


def test_it_resumes_on_more_processes_from_the_checkpoint_before_a_damaged_one(lab, runs, on_four):
    assert on_four["resumes"]["stopped"] == []
    agree(lab / "one/gpt", lab / "damaged", ROUNDING)


@pytest.mark.filterwarnings("ignore")                                               # torch says that there is one process only
def test_a_checkpoint_without_the_file_of_one_process_gives_way_to_the_one_before(lab, runs, tmp_path, capsys):
    """torch itself would load what is there, and leave the rest of the tensor as it was."""
    shutil.copytree(lab / "two/gpt/checkpoint", tmp_path / "checkpoint")
    policy, trained = model.load_policy(lab / "gpt", dtype=torch.float64), model.load_policy(lab / "two/gpt/model", dtype=torch.float64)
    assert train.load_shards(tmp_path / "checkpoint", policy)[0] == 5
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), trained.parameters())), "and one process reads what two have written"
    next((tmp_path / "checkpoint/step-000005").glob("*.safetensors")).unlink()
    assert train.load_shards(tmp_path / "checkpoint", policy)[0] == 4 and "step-000005 is damaged" in capsys.readouterr().err
    (tmp_path / "checkpoint/step-000004/state.json").write_text("{")
    with pytest.raises(SystemExit, match="none of the checkpoints"):
        train.load_shards(tmp_path / "checkpoint", policy)


def test_a_checkpoint_is_safetensors_and_json_and_nothing_is_unpickled(lab, runs):
    kinds = {p.suffix for p in (lab / "two/llama/checkpoint/step-000005").iterdir()}
    assert kinds == {".safetensors", ".json"}


# --- what is refused --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, line", [("resumes whole", "settings changed .*fsdp was False, is True"), ("padded", "--fsdp: .*bloom needs padded rows"),
                                        ("diverges", "step 1: the loss is not finite on .*first in shared kl_logratios")])
def test_all_processes_stop_and_one_says_why(runs, name, line):
    said, = runs[name]["stopped"]
    assert re.search(line, said) and "\n" not in said


def test_a_dry_run_shows_each_processs_share_and_writes_nothing(lab, runs):
    assert runs["dry"]["stopped"] == [] and not (lab / "dry").exists()


@pytest.mark.parametrize("words, line", [
    (["--lora", 4], "--lora 4"), (["--compile"], "--compile"), (["--eval_every", 5], "--eval_every 5"), (["--z0", "on_policy"], "--z0 on_policy"), (["--loss", "tdpo2"], "--loss tdpo2"),
    (["--loss", "dpo + 0.1*tdpo1"], "tdpo1"), (["--loss", "slic"], "--slic_target sample"), (["--loss", "spin"], "--loss spin")])
def test_what_cannot_be_sharded_is_refused_in_one_line(lab, monkeypatch, words, line):
    monkeypatch.setenv("WORLD_SIZE", "2")
    loss = [] if "--loss" in words else ["--loss", "kto"]
    data = [] if "spin" in words else ["--model", lab / "llama", "--data", lab / "rows.jsonl"]
    with pytest.raises(SystemExit) as e:
        train.settings([str(w) for w in [*loss, *words, *data, "--fsdp"]])
    assert e.value.code.startswith("--fsdp: not with") and line in e.value.code and "\n" not in e.value.code


def test_one_process_has_nobody_to_share_with(lab):
    with pytest.raises(SystemExit, match="--fsdp: .*torchrun --nproc_per_node"):
        train.settings(["--fsdp"])


if __name__ == "__main__":
    commands(sys.argv[1])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)                                  # all is written; torch 2.13 aborted once while its threads were taken down

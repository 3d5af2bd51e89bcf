"""Sharded over processes, a run is the same run: steps, metrics, checkpoints, exported model.

This file is also what torchrun starts; see test_split.py, whose launcher it borrows.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pytest
import torch

import recipes
import train
from lab import flags, metrics
from plumbing import parallel, settings
from test_split import (  # noqa: F401
    ROUNDING, WHOLE, be_one_of_them, ended_well, lab, same_run, together, without_reports)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


ALL = {**recipes.LOSSES, **recipes.RECIPES}
ONLINE = {name for name in recipes.RECIPES if recipes.RECIPES[name].online}
REFUSED = {"tdpo1", "tdpo2", "spin", "slic", "xpo", "rm", *ONLINE, *WHOLE}
ACCEPTED = [name for name in ALL if name not in REFUSED]


# --- what is refused ----------------------------------------------------------------------------

def accepted(loss, monkeypatch):
    """Does --fsdp take this loss or recipe?"""
    monkeypatch.setenv("WORLD_SIZE", "2")
    reward = ["--reward", "world"] if loss in ONLINE else []
    try:
        settings.parse(["--loss", loss, "--data", "rows.jsonl", "--model", "folder", "--fsdp",
                        *reward])
    except SystemExit as stopped:
        assert stopped.code.startswith(("--fsdp: not with", "--loss")), stopped.code
        return False
    finally:
        monkeypatch.delenv("WORLD_SIZE")
    return True


def test_what_samples_or_asks_the_whole_reference_at_every_step_is_refused(monkeypatch):
    refused = {name for name in ALL if not accepted(name, monkeypatch)}
    assert refused == REFUSED


@pytest.mark.parametrize("words, named", [
    (["--lora", "4"], "--lora"), (["--compile"], "--compile"),
    (["--eval_every", "5"], "--eval_every"), (["--z0", "on_policy"], "on_policy"),
    (["--loss", "dpo + 0.1*tdpo1"], "tdpo1")])
def test_what_cannot_be_sharded_is_refused_in_one_line(monkeypatch, words, named):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        settings.parse(["--data", "rows.jsonl", "--model", "folder", "--fsdp", *words])
    assert stopped.value.code.startswith("--fsdp: ") and named in stopped.value.code


def test_one_process_has_nobody_to_share_with_and_padded_rows_are_not_shared():
    with pytest.raises(SystemExit, match="--fsdp: .*torchrun"):
        settings.parse(["--fsdp"])
    with pytest.raises(SystemExit, match="--fsdp: .*padded"):
        parallel.shard(SimpleNamespace(flat=False), None, "fp32")


# --- one launch of two processes, one of three --------------------------------------------------

LLAMAS = {"llama": False, "tied": True}                      # name -> are head and embedding one?
MORE = {"tr_dpo": ["--ref_every", 2]}
SAVES = ["--fsdp", "--save_every", 2]
DIVERGES = ["--dtype", "fp32", "--lr", "1e38"]


def make_llamas(folder):
    """Two random Llamas with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    for name, tied in LLAMAS.items():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            eos_token_id=0, bos_token_id=None, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def of_model(lab, out, name, *more, loss="kto"):
    """--model instead of --init and --ref."""
    words = flags(lab, out, *more, loss=loss, steps=5)
    for flag in ("--init", "--ref"):
        at = words.index(flag)
        del words[at:at + 2]
    return [*words, "--model", lab / name]


def plain(lab, out, loss, *more):
    return flags(lab, out, "--timeout", 250, "--micro_batch_size", 2, "--max_grad_norm", "0.5",
                 *MORE.get(loss, []), *more, loss=loss, steps=5)


@pytest.fixture(scope="module")
def runs(lab):
    """Every loss that --fsdp takes, whole and sharded; faults; what goes on with what."""
    make_llamas(lab)
    one = [[loss, plain(lab, lab / "one" / loss, loss), None] for loss in ACCEPTED]
    two = [[loss, plain(lab, lab / "two" / loss, loss, "--fsdp"), None] for loss in ACCEPTED]
    for name in LLAMAS:
        one.append([name, of_model(lab, lab / "one" / name, name), None])
        two.append([name, of_model(lab, lab / "two" / name, name, "--fsdp",
                                   "--checkpoint_activations"), None])
    two += [
        ["whole", plain(lab, lab / "whole", "kto"), None],
        ["whole goes on", plain(lab, lab / "whole", "kto", "--fsdp", "--resume"), None],
        ["saved", plain(lab, lab / "saved", "kto", *SAVES), None],
        ["begun", plain(lab, lab / "begun", "kto", *SAVES), 3],
        ["disk", plain(lab, lab / "disk", "kto", *SAVES), None],
        ["disk goes on", plain(lab, lab / "disk", "kto", *SAVES, "--resume"), None],
        ["diverges", plain(lab, lab / "diverges", "kto", "--fsdp", *DIVERGES), None],
        ["dry", plain(lab, lab / "dry", "kto", "--fsdp", "--dry_run"), None],
        ["bf16", plain(lab, lab / "bf16", "dpo", "--fsdp", "--dtype", "bf16"), None]]
    ended_well(together(1, one, lab))
    said = together(2, two, lab, __file__)
    # The first part of each tensor: of the last one torch itself would notice the loss.
    min((lab / "saved/checkpoint/step-000005").glob("*.safetensors")).unlink()
    three = [["begun", plain(lab, lab / "begun", "kto", *SAVES, "--resume"), None],
             ["saved", plain(lab, lab / "saved", "kto", *SAVES, "--resume"), None],
             ["three", plain(lab, lab / "three", "kto", "--fsdp"), None]]
    ended_well(together(3, three, lab, __file__))
    return said


def watch(folder):
    """What the processes do besides: weigh what each holds, count models, fill the disk once."""
    import torch.distributed.checkpoint as dcp
    step, load = train.train_step, parallel.load_sharded
    write = dcp.HuggingFaceStorageWriter.write_data
    loaded = []

    def train_step(policy, objective, optimizer, number, config, *rest, **how):
        line = step(policy, objective, optimizer, number, config, *rest, **how)
        if number == 0 and how.get("update", True) and parallel.sharded(policy):
            weights = list(policy.parameters())
            means = [state["exp_avg"] for state in optimizer.state.values()]
            here = [sum(t.to_local().numel() for t in tensors) for tensors in (weights, means)]
            seen = {"weights": here[0] / sum(p.numel() for p in weights),
                    "means": here[1] / sum(p.numel() for p in means), "models": len(loaded)}
            Path(f"{config.out}.{parallel.rank}").write_text(json.dumps(seen))
        loaded.clear()
        return line

    def load_sharded(*given):
        loaded.append(1)
        return load(*given)

    def write_data(writer, plan, planner):
        full = folder / "the disk was full"
        if "disk/checkpoint/step-000004" in str(writer.path) and not full.exists():
            if parallel.rank == 1:
                full.touch()
                raise OSError(28, "No space left on device")
        return write(writer, plan, planner)

    train.train_step = train_step
    parallel.load_sharded = load_sharded
    dcp.HuggingFaceStorageWriter.write_data = write_data


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ACCEPTED, *LLAMAS])
def test_sharded_over_two_processes_is_one_process(lab, runs, name):
    assert runs[name] == ["", ""]
    tolerance = ROUNDING
    if name in LLAMAS:
        tolerance = 1e-8         # their norm is in float32, where 1e-16 may flip a bit of 6e-8
    same_run(lab / "one" / name, lab / "two" / name, tolerance)


@pytest.mark.slow
def test_three_are_one_and_go_on_with_what_two_have_begun_or_lost_a_file_of(lab, runs):
    """torch alone would load the other files' parts of each tensor, and say nothing."""
    for name in ("three", "begun", "saved"):
        same_run(lab / "one/kto", lab / name)
    same_run(lab / "one/kto", lab / "whole")                 # two processes, not sharded


@pytest.mark.slow
def test_the_cases_have_a_z0_above_0_a_clipped_gradient_and_a_short_batch(lab, runs):
    lines = metrics(lab / "two/kto")
    assert min(line["z0"] for line in lines) > 0.1
    assert max(line["grad_norm"] for line in metrics(lab / "two/dpo")) > 0.5
    assert round(lines[3]["epoch"] * 27) - round(lines[2]["epoch"] * 27) == 3


@pytest.mark.slow
def test_each_process_holds_its_half_and_a_reference_that_is_the_policy_is_no_model(lab, runs):
    """Half of the weights and of Adam's means, but for rows that do not divide evenly."""
    for name, models in (("kto", 2), ("llama", 1), ("tied", 1)):
        for rank in (0, 1):
            seen = json.loads((lab / "two" / f"{name}.{rank}").read_text())
            assert 0.45 < seen["weights"] < 0.55 and 0.45 < seen["means"] < 0.55
            assert seen["models"] == models


@pytest.mark.slow
def test_a_full_disk_stops_all_in_one_line_and_the_run_goes_on_with_the_same_bytes(lab, runs):
    line, = [line for line in runs["disk"] if line != "1"]
    assert "step-000004: the checkpoint cannot be written" in line and "No space left" in line
    assert runs["disk goes on"] == ["", ""]
    same_run(lab / "two/kto", lab / "disk", 0)
    assert sorted(path.name for path in (lab / "disk/checkpoint").iterdir()) \
        == ["step-000004", "step-000005"]


@pytest.mark.slow
def test_all_processes_stop_and_one_says_why(lab, runs):
    for name, word in (("whole goes on", "fsdp was False, is True"),
                       ("diverges", "is not finite")):
        line, = [line for line in runs[name] if line != "1"]
        assert word in line and "\n" not in line
    assert runs["dry"] == ["", ""] and not (lab / "dry").exists()


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_sums_in_float32(lab, runs):
    """bf16 keeps 8 bits: a product is off by up to 0.4 %, a gradient by a few times that.
    A gradient that were averaged over processes would be half as long."""
    assert runs["bf16"] == ["", ""]
    half, full = metrics(lab / "bf16")[0], metrics(lab / "one/dpo")[0]
    assert half["loss"] == pytest.approx(full["loss"], abs=0.01) and half["loss"] != full["loss"]
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05)


if __name__ == "__main__":
    watch(Path(sys.argv[1]).parent)
    be_one_of_them(sys.argv[1])

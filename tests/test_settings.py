"""Claims about the command line: where values come from, and how a bad one ends."""

import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import recipes
import world
from lab import ROOT, make_lab, run, tiny_llama
from plumbing.settings import Config, parse


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


# --- where values come from ---------------------------------------------------------------------

def test_the_command_line_wins_over_the_world_over_the_signature_over_config(lab):
    typed = parse(["--beta", "0.2", "--batch-size=8"])
    assert (typed.hyper["beta"], typed.origin["beta"]) == (0.2, "command line")
    assert (typed.config.batch_size, typed.origin["batch_size"]) == (8, "command line")
    plain = parse([])
    assert (plain.hyper["beta"], plain.origin["beta"]) == (0.5, "embedded world")
    assert (plain.config.lr, plain.config.steps) == (5e-4, 400)
    assert (plain.hyper["lambda_d"], plain.origin["lambda_d"]) == (1.0, "kto's signature")
    assert (plain.config.seed, plain.origin["seed"]) == (0, "default")
    assert plain.config.out == "out/kto" and plain.options == {"z0": "estimate"}
    files = parse(["--data", str(lab / "rows.jsonl")])           # the small GPT learns fast
    assert (files.config.lr, files.hyper["beta"]) == (5e-4, 0.1)
    model = ["--model", str(lab / "ref"), "--data", str(lab / "rows.jsonl")]
    assert parse(model).config.lr == 5e-6
    assert parse([*model, "--loss", "dpo"]).config.lr == 1e-6


def test_a_loss_without_an_entry_gets_the_worlds_default(monkeypatch):
    """Else it would train at a real model's learning rate, and learn nothing."""
    def plain_loss(logratios, desirable, *, slope=2.0):
        return slope * torch.where(desirable, -logratios, logratios)

    monkeypatch.setitem(recipes.LOSSES, "plain", plain_loss)
    found = parse(["--loss", "plain"])
    default = world.SETTINGS["default"]
    assert (found.config.lr, found.config.steps) == (default["lr"], default["steps"])
    assert found.config.lr >= 1e-4 and found.hyper == {"slope": 2.0}
    tr_dpo = parse(["--loss", "tr_dpo"])                         # DPO's, then its own
    assert tr_dpo.config.lr == parse(["--loss", "dpo"]).config.lr
    assert (tr_dpo.hyper["beta"], tr_dpo.options["ref_every"]) == (2.0, 100)


def test_in_a_sum_a_preset_does_not_speak_for_terms_that_disagree():
    both = parse(["--loss", "dpo + simpo"])                      # betas 0.1 and 2.0
    assert both.hyper["beta"] is None
    assert parse(["--loss", "dpo + cdpo"]).hyper["beta"] == 0.5  # both 0.1: the world's


def test_every_setting_of_a_run_is_a_flag_with_an_explanation(capsys):
    for words in (["--help"], ["--loss", "kto", "-h"]):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "lambda_d sigma(beta (r - z0))" in text           # the equation
        for name in [*(field.name for field in fields(Config)), "beta", "lambda_u", "z0"]:
            assert f"--{name}" in text
        listed = text.replace(",", " ").split()
        assert {*recipes.LOSSES, *recipes.RECIPES} <= {*listed} and "(rm" in listed


def test_help_into_a_closed_pipe_ends_without_a_traceback():
    """`train.py --help | head -1`."""
    child = subprocess.Popen([sys.executable, ROOT / "train.py", "--help"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()                                         # nobody reads, from the start
    errors = child.stderr.read()
    child.wait(timeout=60)
    assert "Traceback" not in errors and "BrokenPipe" not in errors, errors


# --- what is wrong ends in one line -------------------------------------------------------------

ROW = '{"prompt": "p", "completion": "c", "label": true}\n'
TEXTS = {
    "EMPTY": "", "BROKEN": ROW + '{"prompt": \n', "LABEL": ROW + ROW.replace("true", '"yes"'),
    "FORMAT": '{"question": "", "answer": ""}', "BLANK": ROW.replace('"c"', '" "'),
    "ONE": ROW + ROW, "BAD": ROW.replace("true", "false"), "ROWS": ROW + ROW.replace('"p"', '"q"'),
    "SCORED": '{"prompt": "p", "text": "t", "reward": 1}',
    "PAIRS": '{"prompt": "p", "chosen": "c", "rejected": "r"}'}

BAD = [                                                          # words; what the line must name
    ("--bogus 1", "--bogus"), ("--loss nope", "--loss nope", "kto"), ("--lr", "--lr"),
    ("--loss apo_zero_unpaired --lambda_d 2", "--lambda_d", "beta"),
    ("--loss dpo --gamma 1", "--gamma", "beta"), ("--loss bco --z0 zero", "--z0"),
    ("--lr fast", "--lr", "'fast'"), ("--steps 1.5", "--steps", "'1.5'"),
    ("--beta nan", "--beta", "'nan'"), ("--beta 0", "--beta 0", "positive"),
    ("--lr 0", "--lr 0"), ("--steps 0", "--steps 0"), ("--max_len 1", "--max_len 1"),
    ("--loss ipo --tau 0", "--tau 0", "positive"), ("--lambda_u -1", "--lambda_u -1"),
    ("--beta -1", "--beta -1", "positive"), ("--beta inf", "--beta", "'inf'"),
    ("--loss offline_ppo --clip 0", "--clip 0", "positive"), ("--loss rm --centre -1", "--centre"),
    ("--loss ppo --reward world --clip_value -1", "--clip_value", "positive"),
    ("--loss dpo_shift --lam 2", "lam", "(0, 1]"),
    ("--loss kto+dpo", "--loss kto+dpo", "paired"), ("--loss dpo+sfft", "'sfft'", "sft"),
    ("--lambda_d x", "--lambda_d", "auto"), ("--z0 -3", "--z0 -3"), ("--z0 none", "--z0", "zero"),
    ("--dtype int8", "--dtype", "fp32, bf16, fp64"), ("--device x", "--device", "cpu"),
    ("--add_eot maybe", "--add_eot", "true, false"),
    ("--lambda_ratio 2", "--lambda_ratio", "[1, 1.5]"), ("kto", "'kto'", "--name value"),
    ("--overwrite --resume", "--overwrite", "--resume"), ("--turns first", "--turns", "last, all"),
    ("--batch_size 1", "--batch_size 1", "--z0 zero"), ("--flip 1.5", "--flip 1.5"),
    ("--loss spin --flip 0.2", "--flip"), ("--loss rm --eval_every 5", "--eval_every"),
    ("--data ROWS --flip 0.2", "--flip"), ("--threshold 1", "--threshold", "--data"),
    ("--data /nowhere/rows.jsonl", "--data /nowhere/rows.jsonl"), ("--data EMPTY", "empty"),
    ("--data ROWS --eval_data nosuch", "--eval_data nosuch: no such file"),
    ("--data ROWS --eval_data BLANK", "--eval_data", "no rows left"),
    ("--data BROKEN", "line 2"), ("--data LABEL", "line 2", "'yes'"),
    ("--data FORMAT", "line 1", "question"), ("--data BLANK", "no rows left"),
    ("--data ONE", "--data", "--z0 zero"), ("--data BAD --loss sft", "--loss sft"),
    ("--data SCORED", "line 1", "--threshold"), ("--data ONE --columns nonsense", "--columns"),
    ("--data ONE --columns prompt=q", "--columns"), ("--data ROWS --loss dpo", "--loss dpo"),
    ("--data PAIRS --loss sdpo_segment", "line 1", "segment"),
    ("--data ROWS --tokenizer FOLDER", "--tokenizer"),
    ("--model FOLDER", "--model", "--data"), ("--model FOLDER --data ROWS", "--model"),
    ("--model HALF --data ROWS", "--model"), ("--init /nowhere", "--init /nowhere"),
    ("--ref FOLDER", "--ref"), ("--out FULL", "--out"), ("--out OWN", "--out"),
    ("--out ONE", "--out", "file"), ("--out FOLDER --resume", "--resume"),
    ("--loss spin --stages 0", "--stages 0"), ("--loss tr_dpo --ref_mix 0", "--ref_mix"),
    ("--loss tr_dpo --ref_mix 1.5", "--ref_mix"), ("--lora 4", "--lora", "--model"),
    ("--save adapter", "--save adapter", "--lora"), ("--fsdp", "--fsdp", "torchrun"),
    ("--loss ppo --data ROWS", "--reward"),
    ("--loss ppo --data ROWS --reward nobody.py:f", "--reward"),
    ("--loss rm --data PAIRS --compile", "--compile"),
    ("--loss rm --lora 4 --model HALF --data PAIRS", "--lora"),
    ("--judge world --data ROWS", "--judge", "--eval_data"),
    ("--judge nobody.py:f --data ROWS --eval_data ROWS", "--judge nobody.py:f"),
    ("--loss aot --micro_batch_size 2", "--loss aot"),
    ("--loss rdpo --label_smoothing 0.5", "label_smoothing"),
    ("--loss fdpo --divergence tv", "divergence"),
    ("--loss dpo+0.1*nope", "'0.1*nope'"), ("--loss dpo+kto", "--loss dpo+kto"),
    ("--loss dpo+aot", "aot"), ("--loss ppo+dpo", "'ppo'"), ("--loss x*dpo", "'x*dpo'")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    names = {name: folder / f"{name.lower()}.jsonl" for name in TEXTS}
    for name, text in TEXTS.items():
        names[name].write_text(text)
    names |= {name: folder / name for name in ("FOLDER", "FULL", "OWN", "HALF")}
    names["FOLDER"].mkdir()
    names["FULL"].mkdir()
    (names["FULL"] / "thesis.txt").write_text("years of work")
    (names["OWN"] / "model").mkdir(parents=True)                 # somebody's, not a run's
    weights = tiny_llama(names["HALF"], [ROW]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return names


def complaint(words, named):
    """What is wrong with how a run with these words ends, or None."""
    try:
        run(*words)
    except SystemExit as stop:
        line = stop.code
        if not isinstance(line, str) or "\n" in line:
            return f"no single line: {line!r}"
        missing = [part for part in named if part not in line]
        if missing:
            return f"{missing} not in: {line}"
        return None
    except Exception as error:
        return f"a traceback: {error!r}"
    return "it ran"


def test_bad_input_ends_in_one_line_that_names_it_before_anything_is_written(files, tmp_path,
                                                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {}
    for words, *named in BAD:
        found = complaint([files.get(word, word) for word in words.split()], named)
        if list(tmp_path.iterdir()):
            found = "something was written first"
            shutil.rmtree(tmp_path / "out")
        if found:
            wrong[words] = found
    assert wrong == {}


def test_a_setting_called_like_a_flag_of_every_run_is_refused(monkeypatch):
    """It could not be set: --lr is the learning rate's."""
    def greedy_loss(logratios, desirable, *, lr=0.1):
        return lr * logratios

    monkeypatch.setitem(recipes.LOSSES, "greedy", greedy_loss)
    with pytest.raises(SystemExit, match="greedy_loss: its setting 'lr' is a flag"):
        run("--loss", "greedy")


def test_a_misspelt_flag_or_loss_is_told_the_nearest():
    for words, nearest in ((["--batchsize", 4], "--batch_size"), (["--lambda_up", 1], "--lambda_u"),
                           (["--loss", "simop"], "simpo"), (["--loss", "DPO"], "dpo"),
                           (["--loss", "sdpo"], "sdpo_segment"), (["--loss", "pppo"], "ppo")):
        with pytest.raises(SystemExit, match=f"nearest: {nearest}"):
            run(*words)

"""What a fault costs: a clear line and nothing lost, or the run goes on and comes to the same end.
And files from strangers run no code."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate
import model
import train
from lab import ROOT, flags, metrics
from plumbing import announce, checkpoint, huggingface, rundir
from plumbing.tokenizer import Tokenizer, load_tokenizer
from test_checkpoint import Bomb, marker  # noqa: F401
from test_split import (  # noqa: F401
    Dead, lab, run_all, without_reports, words_of, write_verdicts_only)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 6                                                    # checkpoints at 2, 4 and 6


def words_for(lab, out, *more):
    return words_of(lab, out, "kto", "--steps", STEPS, "--save_every", 2, *more)


def start(words, dies_at=None):
    """-> the line that the run ended with: "" where it is done, "dead" where it was made to die"""
    return run_all([["run", words, dies_at]])["run"]


def steps_of(out):
    """The metrics but for the clock's."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"}
            for line in metrics(out)]


def same_end(one, other):
    """The same bytes, of stages and of tables too; the same metrics; nothing half."""
    assert steps_of(one) == steps_of(other)
    assert not [*one.rglob("*.tmp"), *other.rglob("*.tmp")]
    files = [*one.glob("model/*.safetensors"), *one.glob("stage-*/*.safetensors"),
             *one.glob("*.safetensors")]
    assert one / "model/model.safetensors" in files
    for path in files:
        file = path.relative_to(one)
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "report_files", write_verdicts_only)
        assert start(words_for(lab, out)) == ""
    return out


@pytest.fixture
def out(lab, tmp_path):
    """A run that died in step 5, with checkpoints of steps 2 and 4."""
    assert start(words_for(lab, tmp_path / "run"), dies_at=5) == "dead"
    return tmp_path / "run"


def goes_on(lab, out, whole):
    assert start(words_for(lab, out, "--resume")) == ""
    same_end(whole, out)


# --- disks --------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["save", "export"])
def test_a_disk_that_fills_ends_the_run_in_one_line_and_loses_nothing(
        lab, out, whole, monkeypatch, what):
    """While checkpoint 6 is written; while model/ is, of which no half is left under its name."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = getattr(checkpoint, what)

    def with_a_full_disk(*given, **how):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            return real(*given, **how)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, what, with_a_full_disk)
        line = start(words_for(lab, out, "--resume"))
    assert "cannot be written" in line and "\n" not in line and not (out / "model").exists()
    newest = checkpoint.saved(out / "checkpoint")[-1].name
    assert newest == ("step-000004" if what == "save" else "step-000006")
    goes_on(lab, out, whole)


def test_a_folder_that_cannot_be_written_is_found_before_training(lab, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    out = closed / "run"
    if os.geteuid() == 0:                                    # root may write into any real folder
        out = Path("/proc/nanokto")
    assert re.fullmatch(f"--out {out}.*cannot be written.*", start(words_for(lab, out)))


# --- files of a run -----------------------------------------------------------------------------

def test_half_a_config_is_named_and_a_half_one_beside_it_is_not_read(lab, out, whole):
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config[:100])
    line = start(words_for(lab, out, "--resume"))
    assert "config.json: cannot be read" in line and "--overwrite" in line and "\n" not in line
    (out / "config.json").write_text(config)
    (out / "config.json.tmp").write_text(config[:100])       # what a killed run would leave
    goes_on(lab, out, whole)


def test_half_lines_in_the_metrics_are_left_out_and_later_steps_come_again(lab, out, whole):
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines()
    broken = [*lines[:3], '{"step":', "[]", "3", "", *lines[3:], '{"step": 5, "loss": 0.4']
    path.write_bytes("\n".join(broken).encode() + b"\xff\x00")
    goes_on(lab, out, whole)


@pytest.mark.parametrize("flag", ["model", "init", "ref"])
def test_weights_with_a_broken_header_are_named_by_their_flag(lab, tmp_path, flag):
    folder = tmp_path / "broken"
    shutil.copytree(lab / "ref", folder)
    load_tokenizer().save(folder)
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    words = words_for(lab, tmp_path / "run", f"--{flag}", folder)
    if flag == "model":
        words = with_model(lab, folder, tmp_path / "run")
    line = start(words)
    assert re.match(f"--({flag}|model) ", line) and str(folder) in line and "\n" not in line
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_last_step_that_breaks_the_model_leaves_no_model(lab, tmp_path):
    out = tmp_path / "run"
    line = start(flags(lab, out, "--dtype", "fp32", "--warmup", 0, "--lr", "1e38", steps=1))
    assert "not finite" in line and "\n" not in line and not (out / "model").exists()


# --- interruptions ------------------------------------------------------------------------------

def test_half_a_base_model_is_never_taken_for_one(lab, tmp_path, monkeypatch):
    words = ["--data", lab / "rows.jsonl", "--max_len", 64, "--batch_size", 8, "--steps", 1,
             "--sft_steps", 2, "--out", tmp_path / "run"]

    def die(*_):
        raise Dead

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "save", die)
        assert start(words) == "dead"
    half, = tmp_path.glob("base-*.tmp")
    (half / "model.safetensors").write_bytes(b"half")
    assert start(words) == "" and not half.exists()
    base, = [path for path in tmp_path.glob("base-*") if path.is_dir()]
    assert huggingface.load_policy(base).vocab_size == 257


@pytest.mark.parametrize("loss", ["sdpo_stepwise", "spin"])
def test_half_a_stage_is_written_again_from_the_checkpoint(lab, tmp_path, monkeypatch, loss):
    def words(out, *more):
        return words_of(lab, out, loss, "--steps", 2, "--stages", 2, *more)

    real = model.GPT.save

    def save(self, folder, **how):
        real(self, folder, **how)
        if "stage-1" in str(folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise Dead

    assert start(words(tmp_path / "whole")) == ""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(model.GPT, "save", save)
        assert start(words(out)) == "dead"
    assert (out / "stage-1.tmp").is_dir() and not (out / "stage-1").exists()
    assert start(words(out, "--resume")) == ""
    same_end(tmp_path / "whole", out)


# --- kill -9 ------------------------------------------------------------------------------------

KILLED = {"kto": ["--steps", 6], "bco": ["--steps", 6], "tr_dpo": ["--steps", 6, "--ref_every", 2],
          "spin": ["--steps", 2, "--stages", 3], "sdpo_stepwise": ["--steps", 3, "--stages", 2],
          "ppo": ["--steps", 4, "--ppo_epochs", 2, "--minibatches", 2]}
PLACES = ("a step", "a checkpoint", "a file", "the end")


def rests(inside, place, real):
    """`real`, which rests for 20 ms before it works; a file in `inside` says so."""
    def slowly(*given, **how):
        mark = inside / place
        mark.touch()
        time.sleep(0.02)
        result = real(*given, **how)
        mark.unlink(missing_ok=True)
        return result
    return slowly


def in_a_process(words, log, inside=None):
    """A run in a process of its own, forked: nothing is imported again."""
    def child():
        if inside is not None:
            train.train_step = rests(inside, "a step", train.train_step)
            checkpoint.write_whole = rests(inside, "a checkpoint", checkpoint.write_whole)
            os.replace = rests(inside, "a file", os.replace)
            evaluate.model_card = rests(inside, "the end", evaluate.model_card)
        tqdm.set_lock(threading.RLock())                     # its own is shared with us, and a
        sys.stdout = sys.stderr = open(log, "w", buffering=1)     # killed child would keep it
        sys.exit(start(words) or 0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def finished_steps(out):
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    return sum(rundir.step_of(line) < STEPS for line in path.read_text().splitlines())


def kill_at_random(lab, folder, loss, place, rng):
    """A run is killed in `place` (None: anywhere) and goes on.   -> where it was hit"""
    def words(out, *more):
        return words_of(lab, out, loss, *KILLED[loss], "--save_every", 2, *more)

    whole, out = folder / f"whole-{loss}", folder / f"run-{rng.random()}"
    if not whole.exists():
        assert start(words(whole)) == ""
    inside = Path(f"{out}-inside")
    inside.mkdir()
    began = time.time()
    lines, seconds = rng.randrange(4), 3 * rng.random()
    process = in_a_process(words(out), folder / "killed.txt", inside)
    while process.is_alive() and time.time() < began + 60:
        if place and (inside / place).exists() and finished_steps(out) >= lines:
            break
        if not place and time.time() > began + seconds:
            break
        time.sleep(0.001)
    time.sleep(0.02 * rng.random())
    process.kill()
    process.join()
    hit = [path.name for path in inside.iterdir()] or ["elsewhere"]
    resume = ["--resume"] if (out / "config.json").is_file() else []
    assert start(words(out, *resume)) == "", (loss, hit)
    same_end(whole, out)
    return hit[0]


def test_kill_9_at_four_random_moments_and_the_end_is_the_same(lab, tmp_path):
    rng = random.Random(0)
    for loss, place in zip(("kto", "spin", "ppo", "sdpo_stepwise"), PLACES):
        kill_at_random(lab, tmp_path, loss, place, rng)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_and_the_end_is_the_same(lab, tmp_path):
    rng = random.Random(1)
    hit = set()
    for number in range(24):
        loss = list(KILLED)[number % 6]
        place = (*PLACES, None)[number % 5]
        hit.add(kill_at_random(lab, tmp_path, loss, place, rng))
    assert hit >= set(PLACES)


# --- two runs -----------------------------------------------------------------------------------

def test_of_two_runs_into_one_folder_one_is_refused(lab, tmp_path, whole):
    out = tmp_path / "run"
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    both = [in_a_process(words_for(lab, out), log) for log in logs]
    for process in both:
        process.join(100)
    assert sorted(process.exitcode for process in both) == [0, 1]
    refused, = [log for log, process in zip(logs, both) if process.exitcode]
    line = refused.read_text().strip().splitlines()[-1]
    assert re.match("--out .*(another run is writing there|a run is there already)", line)
    same_end(whole, out)


def test_a_run_that_came_and_went_while_another_started_is_kept(lab, tmp_path, whole, monkeypatch):
    out = tmp_path / "run"

    def another(run):
        monkeypatch.undo()
        monkeypatch.setattr(evaluate, "report_files", write_verdicts_only)
        assert start(words_for(lab, out)) == ""

    monkeypatch.setattr(announce, "introduce", another)
    assert "a run is there already" in start(words_for(lab, out))
    same_end(whole, out)


# --- files from strangers -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    from test_fsdp import make_llamas
    folder = tmp_path_factory.mktemp("stranger")
    make_llamas(folder)
    return folder / "llama"


def with_model(lab, folder, out, *more):
    return ["--model", folder, "--data", lab / "rows.jsonl", "--steps", 1, "--max_len", 48,
            "--batch_size", 4, "--out", out, *more]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.bin"])
def test_a_pickle_is_never_unpickled_whatever_its_name(lab, stranger, tmp_path, marker, name):
    folder = tmp_path / "model"
    shutil.copytree(stranger, folder)
    if name == "adapter_model.bin":
        adapter = dict(base_model_name_or_path=str(stranger), peft_type="LORA", r=4,
                       target_modules=["q_proj"])
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(marker), folder / name)
    line = start(with_model(lab, folder, tmp_path / "run"))
    assert line.startswith("--model ") and "\n" not in line


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run_unless_asked_for(lab, stranger, tmp_path, marker, file):
    folder = tmp_path / "model"
    shutil.copytree(stranger, folder)
    code = f"open({str(marker)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    (folder / "evil.py").write_text(code)
    change = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    if file == "config.json":
        change = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
                  "model_type": "evil"}
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**found, **change}))
    line = start(with_model(lab, folder, tmp_path / "run"))
    assert line == "" or re.match("--(model|tokenizer) ", line) and "\n" not in line
    assert line or file == "tokenizer_config.json"


TEMPLATES = ["{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
             "{{ ''.__class__.__mro__[1].__subclasses__() }}",
             "{% set x = messages.append(1) %}",
             "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_is_rendered_in_a_sandbox(lab, stranger, tmp_path, marker, template):
    folder = tmp_path / "model"
    shutil.copytree(stranger, folder)
    (folder / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"messages": talk, "label": True}] * 2))
    line = start(with_model(lab, folder, tmp_path / "run", "--data", file))
    assert "talk.json" in line and "template" in line and "\n" not in line


def test_nothing_is_written_outside_of_out(lab, tmp_path, monkeypatch):
    """Whatever rows, tensor names and metadata say. Beside it: base models and a lock."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    evil = "../../evil"
    rows = [{"prompt": evil, "completion": f"/tmp/{evil}", "label": True, "id": evil},
            {"prompt": "{{ x }}", "completion": evil, "label": False}]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = work / "ref" / "model.safetensors"
    shutil.copytree(lab / "ref", work / "ref")
    save_file({**load_file(reference), evil: torch.zeros(1)}, reference,
              metadata={"format": "pt", evil: evil, "file": evil})
    before = set(tmp_path.rglob("*"))
    words = ["--data", "rows.jsonl", "--init", "ref", "--ref", "ref", "--steps", 2,
             "--max_len", 48, "--out", "runs/one", "--save_every", 1]
    assert start(words, dies_at=1) == "dead"
    path = next(Path("runs/one/checkpoint/step-000001").glob("*.safetensors"))
    tensors = load_file(path)
    save_file({**tensors, "policy." + evil: torch.zeros(1), evil: torch.zeros(1)}, path,
              metadata={"format": "pt", "path": evil})
    assert start([*words, "--resume"]) == ""
    for path in set(tmp_path.rglob("*")) - before:
        assert path == work / "runs" or work / "runs/one" in (path, *path.parents), path
    assert "no such loss" in start(["--loss", evil, *words])


def test_no_source_file_unpickles_or_evaluates_text():
    words = (r"\b(pickle|marshal|shelve|dill|joblib)\b|(?<![\w.])(eval|exec)\(|os\.system|"
             r"shell=True|yaml\.load\(|np\.load\(|allow_pickle")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]:
        text = path.read_text()
        assert not re.search(words, text), path
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, path

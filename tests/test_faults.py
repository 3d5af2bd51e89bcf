"""What a fault costs: each ends in a clear line and loses nothing, or the run goes on rightly. And files from strangers run no code.

`python tests/test_faults.py` makes every fault and prints what happened and what was lost.
"""
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))                                        # as conftest.py does, for the script

import data
import evaluate
import model
import train
from test_train import ROOT, flags, lab, make_lab, make_pairs, metrics, pair_flags, pairs, tiny_llama  # noqa: F401

STEPS = 6


class Stop(Exception):
    pass


@contextlib.contextmanager
def quietly():
    """No pictures and no samples at the end of a run."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluate, "report_files", lambda result, policy, reference, tokenizer, prompts, cfg, seconds: (Path(cfg.out) / "eval.json").write_text("{}"))
        yield m


def start(words, dies_at=None):
    """Runs train.main; dead in step `dies_at`. -> (the line it ended with, or "" where it finished; what it printed to stderr)"""
    real, said = train.train_step, io.StringIO()
    with quietly() as m, contextlib.redirect_stderr(said):
        if dies_at is not None:
            m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < dies_at else (_ for _ in ()).throw(Stop()))
        try:
            train.main([str(w) for w in words])
        except Stop:
            return "dead", ""
        except SystemExit as e:
            return e.code, said.getvalue()
    return "", said.getvalue()


class Lab:
    """A run that nothing happened to, and how it was started."""

    def __init__(self, files, folder):
        self.files, self.folder = files, folder
        self.whole = folder / "whole"
        assert start(self.words(self.whole)) == ("", ANY)
        self.bytes = (self.whole / "model/model.safetensors").read_bytes()

    def words(self, out, *more):
        return flags(self.files, out, "--save_every", 2, "--dtype", "fp32", *more, steps=STEPS)

    def interrupted(self, name, at=5):
        """A run that died in step `at`: checkpoints of steps 2 and 4."""
        out = self.folder / name
        assert start(self.words(out), at)[0] == "dead"
        return out

    def lost(self, out):
        """What is missing, against the run that nothing happened to, after --resume."""
        line, _ = start(self.words(out, "--resume"))
        assert line == "", line
        assert (out / "model/model.safetensors").read_bytes() == self.bytes and [m["step"] for m in metrics(out)] == list(range(STEPS))
        assert not [p for p in out.rglob("*.tmp")], "half files are left"
        return "nothing"


class Any:
    def __eq__(self, other):
        return True


ANY = Any()


@pytest.fixture(scope="module")
def laboratory(pairs, tmp_path_factory):
    return Lab(pairs, tmp_path_factory.mktemp("faults"))


# --- the faults: each a function of the laboratory -> (what happens, what is lost) ---------------------------------------------

@contextlib.contextmanager
def no_file_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_full_while_a_checkpoint_is_written(l):
    out = l.interrupted("full")
    with no_file_larger_than(100_000):
        line, _ = start(l.words(out, "--resume"))
    assert re.search(r"step-000006.*the checkpoint cannot be written .*untouched, make room and --resume", line), line
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["step-000002.safetensors", "step-000004.safetensors"]
    return line, l.lost(out)


def disk_full_while_the_model_is_written(l):
    out = l.folder / "full-model"
    real = train.save_checkpoint

    def then_full(*a, **k):
        real(*a, **k)
        if a[3] == STEPS:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    with pytest.MonkeyPatch.context() as m, no_file_larger_than(resource.RLIM_INFINITY):
        m.setattr(train, "save_checkpoint", then_full)
        line, _ = start(l.words(out))
    assert "cannot be written" in line and not (out / "model").exists(), line
    return line, l.lost(out)


def newest_checkpoint_truncated(l):
    out = l.interrupted("truncated")
    path = out / "checkpoint/step-000004.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    line, said = start(l.words(out, "--resume"))
    assert line == "" and "step-000004.safetensors is damaged" in said
    return said.strip().splitlines()[0], l.lost(out)


def all_checkpoints_damaged(l):
    out = l.interrupted("damaged")
    for path, content in zip((out / "checkpoint").iterdir(), (b"", b"\xff" * 10_000)):
        path.write_bytes(content)
    line, _ = start(l.words(out, "--resume"))
    assert re.search("none of the checkpoints in .* can be read; --overwrite starts again", line), line
    assert start(l.words(out, "--overwrite"))[0] == ""
    return line, "all steps: it must start again" if l.lost(out) == "nothing" else ""


def checkpoint_of_another_model(l):
    out = l.interrupted("another")
    for path in (out / "checkpoint").iterdir():
        save_file({"policy.wte.weight": torch.zeros(3, 3), "rng": torch.get_rng_state()}, path, metadata={"state": '{"step": 2, "running": {}}'})
    line, _ = start(l.words(out, "--resume"))
    assert re.search(r"has no tensor of shape \[257, 32\] for wte.weight: it belongs to another model", line), line
    return line, "nothing of the other run"


def checkpoint_with_a_senseless_state(l):
    out, said = l.interrupted("senseless"), ""
    for state in ('{"step": "4", "running": {}}', '{"step": -4, "running": {}}', '{"step": 4, "running": {"reward_sum": "x"}}', '[]', 'nonsense'):
        path = out / "checkpoint/step-000004.safetensors"
        save_file(load_file(path), path, metadata={"state": state})
        copy = l.folder / "senseless-copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        line, said = start(l.words(copy, "--resume"))
        assert line == "" and "is damaged" in said, (state, line)
    return said.strip().splitlines()[0], l.lost(out)


def corrupt_header(flag):
    def fault(l):
        folder = l.folder / f"broken-{flag}"
        shutil.copytree(l.files / "ref", folder)
        path = folder / "model.safetensors"
        path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
        words = l.words(l.folder / f"with-broken-{flag}")
        if flag == "model":
            data.load_tokenizer().save(folder)
            del words[words.index("--init"):words.index("--init") + 4]
            words += ["--model", folder]
        else:
            words[words.index("--" + flag) + 1] = folder
        line, _ = start(words)
        assert line.startswith(f"--{flag} {folder}: cannot be loaded from model.safetensors: ") and not (l.folder / f"with-broken-{flag}" / "checkpoint").exists(), line
        return line, "nothing: no step was made"
    return fault


def config_written_by_half(l):
    out = l.interrupted("config")
    whole = (out / "config.json").read_text()
    (out / "config.json").write_text(whole[:100])
    line, _ = start(l.words(out, "--resume"))
    assert re.search(r"config.json is broken .*--overwrite starts again", line), line
    (out / "config.json").write_text(whole)
    (out / "config.json.tmp").write_text(whole[:100])                                 # which is what a killed run would leave
    return line, l.lost(out)


def half_a_line_in_the_metrics(l):
    out = l.interrupted("metrics", at=5)
    with open(out / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 5, "loss": 0.4\xff\x00\x00}')
    lines = (out / "metrics.jsonl").read_text(errors="replace").splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines[:3], '{"step":', "[]", "3", *lines[3:]]), errors="replace")
    return "goes on: half lines are left out, later steps are done again", l.lost(out)


def metrics_gone(l):
    out = l.interrupted("no-metrics")
    (out / "metrics.jsonl").unlink()
    assert start(l.words(out, "--resume"))[0] == "" and (out / "model/model.safetensors").read_bytes() == l.bytes
    return "goes on", f"the metrics of steps 0 to {metrics(out)[0]['step'] - 1}"


def clock_going_back(l):
    out, now = l.folder / "clock", [2e9]

    def back():
        now[0] -= 1.0
        return now[0]

    real = l.bytes
    with pytest.MonkeyPatch.context() as m:
        for name in ("time", "perf_counter", "monotonic", "process_time"):
            m.setattr(time, name, back)
        assert start(l.words(out), 5)[0] == "dead"
        for i, path in enumerate(sorted((out / "checkpoint").iterdir())):
            os.utime(path, (1e9 - i, 1e9 - i))                                          # the newest looks oldest
        assert start(l.words(out, "--resume"))[0] == ""
    assert (out / "model/model.safetensors").read_bytes() == real and all(m["tokens_per_second"] > 0 for m in metrics(out))
    return "goes on: no decision hangs on a clock", l.lost(out)


def process(words, log, inside=None):
    """train.main in a process of its own, forked: nothing is imported again. Where a folder `inside` is given, the run rests for
    20 ms in each step, each evaluation and each file it writes, which is there by half then, and names there what it is in."""
    rename = os.replace

    @contextlib.contextmanager
    def rest(what):
        (inside / what).touch()
        time.sleep(0.02)
        yield
        (inside / what).unlink()

    def rests(what, real):
        def slow(*a, **k):
            with rest(what):
                return real(*a, **k)
        return slow

    def replace(source, target):
        file = Path(source)
        whole = file.read_bytes() if file.is_file() else b""
        if whole:
            file.write_bytes(whole[:len(whole) // 2])
        with rest("a file"):
            if whole:
                file.write_bytes(whole)
            rename(source, target)

    def child():
        if inside:
            train.train_step, evaluate.margins, os.replace = rests("a step", train.train_step), rests("an evaluation", evaluate.margins), replace
        tqdm.set_lock(threading.RLock())                                                  # its own is shared with us, and a killed child keeps it
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        sys.exit(start(words)[0] or 0)
    p = multiprocessing.get_context("fork").Process(target=child)
    p.start()
    return p


def two_runs_into_one_folder(l):
    out = l.folder / "both"
    runs = [process(l.words(out), l.folder / f"both-{i}.txt") for i in (0, 1)]
    for p in runs:
        p.join(100)
    said = next((l.folder / f"both-{i}.txt").read_text().strip().splitlines()[-1] for i in (0, 1) if runs[i].exitcode)
    assert sorted(p.exitcode for p in runs) == [0, 1] and re.search("another run is writing there|a run is there already", said), said
    assert (out / "model/model.safetensors").read_bytes() == l.bytes
    return said, l.lost(out)


def a_run_that_came_and_went_while_another_was_starting(l):
    out, real = l.folder / "late", train.check_disk
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "check_disk", lambda *a: (m.setattr(train, "check_disk", real), start(l.words(out)), real(*a)))
        line, _ = start(l.words(out))
    assert "a run is there already" in line and (out / "model/model.safetensors").read_bytes() == l.bytes, line
    return line, l.lost(out)


def out_that_cannot_be_written(l):
    closed = l.folder / "closed"
    closed.mkdir(mode=0o500)
    out = closed / "run" if os.geteuid() else Path("/proc/nanokto")                       # root may write into any folder of a disk
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train.shutil, "disk_usage", lambda p: SimpleNamespace(free=2**40))        # /proc has none
        line, _ = start(l.words(out))
    assert re.fullmatch(r"--out .*cannot be written to.*", line), line
    return line, "nothing: found before training"


def base_model_interrupted(l):
    words = ["--data", l.files / "rows.jsonl", "--max_len", 64, "--batch_size", 8, "--steps", 1, "--sft_steps", 2, "--out", l.folder / "bases" / "run"]
    real = data.Tokenizer.save
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data.Tokenizer, "save", lambda *a: (_ for _ in ()).throw(Stop()))
        assert start(words)[0] == "dead"
    half, = (l.folder / "bases").glob("base-*.tmp")
    (half / "model.safetensors").write_bytes(b"half")
    assert data.Tokenizer.save is real and start(words)[0] == ""
    base, = (l.folder / "bases").glob("base-*[!kp]")
    assert not half.exists() and model.load_policy(base) and (base / "tiktoken.json").is_file()
    return "goes on: made again, half a base model is never taken for one", "its pretraining"


def stage_written_by_half(l):
    words = [*pair_flags(l.files, l.folder / "stages", "sdpo_stepwise", "--stages", 2, "--save_every", 1, steps=2)]
    assert start([*words[:words.index("--out")], "--out", l.folder / "stages-whole", *words[words.index("--out") + 2:]])[0] == ""
    real = model.GPT.save

    def save(self, folder, **how):
        real(self, folder, **how)
        if "stage-1" in str(folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise Stop

    with pytest.MonkeyPatch.context() as m:
        m.setattr(model.GPT, "save", save)
        assert start(words)[0] == "dead"
    assert not (l.folder / "stages/stage-1").exists() and (l.folder / "stages/stage-1.tmp").is_dir()
    assert start([*words, "--resume"])[0] == "" and not list((l.folder / "stages").glob("*.tmp"))
    whole, parts = (l.folder / name / "model/model.safetensors" for name in ("stages-whole", "stages"))
    assert whole.read_bytes() == parts.read_bytes()
    return "goes on: written again from the checkpoint", "nothing"


def worker_killed(l):
    import test_split
    (l.folder / "killed").mkdir()
    words = [str(w) for w in l.words(l.folder / "killed/run")]
    code, said, seconds = test_split.with_fault(l.folder / "killed", "kill", words)
    assert code != 0
    line = next((x for x in said.splitlines() if "another process of this run does not answer" in x), "torchrun ends the other process")
    assert start([*words, "--resume"])[0] == "" and [m["step"] for m in metrics(l.folder / "killed/run")] == list(range(STEPS))
    a, b = (load_file(x / "model/model.safetensors") for x in (l.whole, l.folder / "killed/run"))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4                             # float32, and the first steps were made by two
    return f"after {seconds:.0f} s: {line}", "nothing"


FAULTS = {"disk full, checkpoint": disk_full_while_a_checkpoint_is_written, "disk full, model": disk_full_while_the_model_is_written,
          "newest checkpoint truncated": newest_checkpoint_truncated, "all checkpoints damaged": all_checkpoints_damaged,
          "checkpoint of another model": checkpoint_of_another_model, "checkpoint with a senseless state": checkpoint_with_a_senseless_state,
          **{f"corrupt safetensors header in --{flag}": corrupt_header(flag) for flag in ("model", "init", "ref")},
          "config.json written by half": config_written_by_half, "half a line in metrics.jsonl": half_a_line_in_the_metrics, "metrics.jsonl gone": metrics_gone,
          "clock going back": clock_going_back, "two runs into one folder at once": two_runs_into_one_folder,
          "another run while this one was starting": a_run_that_came_and_went_while_another_was_starting, "out folder read-only": out_that_cannot_be_written,
          "base model interrupted": base_model_interrupted, "stage written by half": stage_written_by_half}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_loses_nothing_or_says_what(laboratory, fault):
    what, lost = FAULTS[fault](laboratory)
    assert len(what.splitlines()) == 1 and lost


def kill_at_random(l, moments, seed):
    """kill -9 at so many random moments, by turns: anywhere, in a step, in the writing of a file, in an evaluation. -> how many of each it hit"""
    rng, hit, began = random.Random(seed), {}, time.time()
    words = lambda out, *more: l.words(out, "--eval_every", 2, "--save_every", 2, *more)                           # noqa: E731
    assert start(words(l.folder / f"kill-whole-{seed}"))[0] == ""
    seconds, wanted = time.time() - began, (l.folder / f"kill-whole-{seed}" / "model/model.safetensors").read_bytes()
    for k in range(moments):
        out, aim, lines, wait = l.folder / f"kill-{seed}-{k}", (None, "a step", "a file", "an evaluation")[k % 4], rng.randrange(STEPS), rng.random()
        inside, patience = l.folder / f"inside-{seed}-{k}", time.time() + 60
        inside.mkdir()
        p, end = process(words(out), l.folder / "kill.txt", inside), time.time() + wait * seconds
        while p.is_alive() and time.time() < patience:
            if (inside / aim).exists() and len(metrics_of(out)) >= lines if aim else time.time() > end:
                break
        time.sleep(wait * 0.01)
        p.kill()
        p.join()
        moment = next((path.name for path in inside.iterdir()), "after the end" if p.exitcode == 0 else "elsewhere")
        hit[moment] = hit.get(moment, 0) + 1
        line, _ = start(words(out, "--resume" if (out / "config.json").is_file() else "--overwrite"))
        assert line == "", (k, moment, line)
        assert (out / "model/model.safetensors").read_bytes() == wanted and [m["step"] for m in metrics(out)] == list(range(STEPS)), (k, moment)
        assert not list(out.rglob("*.tmp")), "half files are left"
    return hit


def metrics_of(out):
    file = out / "metrics.jsonl"
    return [line for line in file.read_text().splitlines() if train.step_of(line) is not None] if file.exists() else []


def test_kill_9_at_four_random_moments_and_resume_gives_the_same_bytes(laboratory):
    kill_at_random(laboratory, 4, seed=0)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_and_resume_gives_the_same_bytes(laboratory):
    hit = kill_at_random(laboratory, 20, seed=1)
    assert {"a step", "a file", "an evaluation"} <= hit.keys(), hit


def test_a_last_step_that_breaks_the_model_leaves_no_model_behind(pairs, tmp_path):
    line, _ = start(flags(pairs, tmp_path / "run", "--dtype", "fp32", "--warmup", 0, "--lr", "1e38", steps=1))
    assert re.search("step 0: after the last step the policy's log-probs are not finite; a lower --lr", line) and not (tmp_path / "run/model").exists()


# --- files from strangers -----------------------------------------------------------------------------------------------------

class Bomb:
    """Unpickled, it writes a file named after it."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    """A file that hostile code would write; the bomb is known to work."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path))).close()
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists(), "code from a file was executed"


@pytest.fixture(scope="module")
def llama(pairs, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("stranger") / "model", open(pairs / "rows.jsonl").read().split("\n"))


def with_model(pairs, folder, out, *more):
    return ["--model", folder, "--data", pairs / "rows.jsonl", "--steps", 1, "--max_len", 48, "--batch_size", 4, "--out", out, *more]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.bin", "checkpoint"])
def test_a_pickle_is_never_unpickled_whatever_its_name(pairs, llama, laboratory, tmp_path, marker, name):
    if name == "checkpoint":
        out = laboratory.interrupted("bomb")
        for path in (out / "checkpoint").iterdir():
            torch.save(Bomb(marker), path)
        assert "none of the checkpoints" in start(laboratory.words(out, "--resume"))[0]
        return
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    if name == "adapter_model.bin":
        (folder / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=str(llama), peft_type="LORA", r=4, target_modules=["q_proj"])))
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(marker), folder / name)
    line, _ = start(with_model(pairs, folder, tmp_path / "run"))
    assert re.match(r"--model .*(cannot be loaded|no \*.safetensors there|without adapter_model.safetensors)", line), line


def test_code_beside_a_model_or_a_tokenizer_is_not_run_unless_asked_for(pairs, llama, tmp_path, marker):
    code = f"open({str(marker)!r}, 'w')\n"
    for file, change in (("config.json", dict(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")),
                         ("tokenizer_config.json", dict(auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T"))):
        folder = tmp_path / file
        shutil.copytree(llama, folder)
        (folder / "evil.py").write_text(code + "class C: pass\nclass M: pass\nclass T: pass\n")
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
        line, _ = start(with_model(pairs, folder, tmp_path / "run"))
        assert file == "tokenizer_config.json" and line == "" or re.match(r"--(model|tokenizer) ", line), line
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("template", ["{{ cycler.__init__.__globals__.os.system('touch MARKER') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                                      "{% set x = messages.append(1) %}", "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}"])
def test_a_chat_template_is_rendered_in_a_sandbox(pairs, llama, tmp_path, marker, template):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "label": True}] * 2
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    words = with_model(pairs, folder, tmp_path / "run")
    words[words.index("--data") + 1] = tmp_path / "talk.json"
    line, _ = start(words)
    assert re.search(r"talk.json: record 1: the chat template refuses this conversation", line), line


def test_nothing_is_written_outside_of_out(pairs, tmp_path, monkeypatch):
    """Whatever rows, tensor names and metadata say. What a run may write: its folder, and base models beside it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    evil = "../../evil"
    rows = [{"prompt": evil, "completion": f"/tmp/{evil}", "label": True, "id": evil}, {"prompt": "{{ x }}", "completion": evil, "label": False}]
    (work / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ref = work / "ref"
    shutil.copytree(pairs / "ref", ref)
    save_file(load_file(ref / "model.safetensors") | {evil: torch.zeros(1)}, ref / "model.safetensors", metadata={"format": "pt", evil: evil, "file": evil})
    before = {p for p in tmp_path.rglob("*")}
    words = ["--data", "rows.jsonl", "--init", "ref", "--ref", "ref", "--steps", 2, "--max_len", 48, "--out", "runs/one", "--save_every", 1]
    assert start(words, dies_at=1)[0] == "dead"
    path, = Path("runs/one/checkpoint").iterdir()
    save_file(load_file(path) | {"policy." + evil: torch.zeros(1), evil: torch.zeros(1)}, path, metadata={"state": json.dumps({"step": 1, "running": {}, "out": evil, "path": evil})})
    assert start([*words, "--resume"])[0] == ""
    assert all(p == work / "runs" or work / "runs/one" in (p, *p.parents) for p in {p for p in tmp_path.rglob("*")} - before)
    assert "no such loss" in start(["--loss", evil, *words])[0]


def test_no_source_file_unpickles_or_evaluates_text():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(pickle|marshal|shelve|dill|joblib)\b|(?<![\w.])(eval|exec)\(|os\.system|shell=True|yaml\.load\(|np\.load\(|allow_pickle", text), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*", text)), path


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "lab").mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            l = Lab(make_pairs(make_lab(folder / "lab")), folder)                                              # noqa: E741
        print("| fault | what happens | lost |\n|---|---|---|")
        for name, fault in {**FAULTS, "worker killed (2 processes)": worker_killed}.items():
            with contextlib.redirect_stdout(io.StringIO()):
                what, lost = fault(l)
            print(f"| {name} | {what.replace(str(folder), '...').replace('|', '/')[:180]} | {lost} |", flush=True)
        if sys.argv[1:]:
            with contextlib.redirect_stdout(io.StringIO()):
                hit = kill_at_random(l, int(sys.argv[1]), seed=2)
            print(f"| kill -9, {sys.argv[1]} random moments | resumed to the same bytes: " + ", ".join(f"{n} {k}" for k, n in hit.items()) + " | nothing |")

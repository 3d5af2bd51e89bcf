"""One step, any split: processes and micro-batches change neither weights nor metrics.

This file is also what torchrun starts: its processes go through a list of runs, one after the
other, in one process group. So that many runs cost one start.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pytest
import torch

import evaluate
import recipes
import train
from lab import (ROOT, flags, largest_difference, make_lab, metrics, read_rows, run, torchrun,
                 weights, write_rows)
from plumbing import parallel
from plumbing.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 5                          # of 27 rows in batches of 8 the fourth has 3
ROUNDING = 1e-10                   # float64 sums in another order differ by 1e-16, and AdamW
#                                    divides by sqrt(v), which may raise that a thousandfold

WHOLE = [name for name, loss in recipes.LOSSES.items() if hasattr(loss, "needs_whole_batch")]

# name -> (loss, further flags). Between them: a loss that is coupled by z0; running means; a
# moving reference; whole distributions; responses of the policy's own; two stages.
FAST = {
    "kto": ("kto",),
    "bco": ("bco",),
    "beta_dpo": ("beta_dpo",),
    "tr_dpo": ("tr_dpo", "--ref_every", 2),
    "tdpo2": ("tdpo2",),
    "kto on_policy": ("kto", "--z0", "on_policy"),
    "sdpo_stepwise": ("sdpo_stepwise", "--steps", 2),
    "ppo": ("ppo", "--ppo_epochs", 2, "--minibatches", 2, "--steps", 2),
    "online dpo": ("dpo", "--online", "--steps", 2),
}
SLOW = {
    **{name: (name, "--steps", 2) for name in {**recipes.LOSSES, **recipes.RECIPES}
       if name not in WHOLE},
    **FAST,
    "gspo": ("gspo", "--ppo_epochs", 2, "--minibatches", 2, "--steps", 2),
    "humanline_kto": ("humanline_kto",),
    "kto weighted": ("kto", "--data", "weighted.jsonl"),
    "kto zero": ("kto", "--z0", "zero", "--steps", 2),
    "kto 0.3": ("kto", "--z0", "0.3", "--steps", 2),
    "kto auto": ("kto", "--lambda_d", "auto", "--lambda_u", "auto", "--steps", 2),
    "dpo + 0.1*sft": ("dpo + 0.1*sft", "--steps", 2),
    "kto + 0.5*bco": ("kto + 0.5*bco", "--steps", 2),
    "slic chosen": ("slic", "--slic_target", "chosen", "--steps", 2),
    **{f"online {name}": (name, "--online", "--steps", 2)
       for name in ("kto", "ipo_bernoulli", "odpo", "sppo", "slic", "wpo", "bco", "kto_uniform",
                    "tr_dpo", "humanline_dpo")},
}


# --- many runs in one process group -------------------------------------------------------------

class Dead(Exception):
    """A run that was made to stop."""


def write_verdicts_only(result, policy, reference, tokenizer, prompts, config, seconds):
    """In place of the report at a run's end, which would take most of the time here."""
    (Path(config.out) / "eval.json").write_text("{}")


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(evaluate, "report_files", write_verdicts_only)


def run_all(cases):
    """cases: [[name, words, step to die at or None]].   -> {name: the line it ended with}"""
    said = {}
    real = train.train_step
    for name, words, dies_at in cases:
        def step(policy, objective, optimizer, number, *rest, **how):
            if number == dies_at:
                raise Dead
            return real(policy, objective, optimizer, number, *rest, **how)

        said[name] = ""
        try:
            train.train_step = step
            run(*words)
        except Dead:
            said[name] = "dead"
        except SystemExit as stopped:
            said[name] = str(stopped.code)
        finally:
            train.train_step = real
        parallel.barrier()
    return said


def together(processes, cases, folder, script=__file__):
    """Run all cases on so many processes.   -> {name: [the line of each process]}"""
    cases = [[name, [str(word) for word in words], dies_at] for name, words, dies_at in cases]
    if processes == 1:
        said = run_all(cases)
        return {name: [line] for name, line in said.items()}
    file = folder / f"cases-{processes}.json"
    file.write_text(json.dumps(cases))
    done = torchrun(processes, file, script=script, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    said = [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(processes)]
    return {name: [of_one[name] for of_one in said] for name in said[0]}


def be_one_of_them(file):
    """What torchrun starts. The process group outlives each run; the last process is always late:
    what another has written meanwhile must not change its way."""
    torch.set_num_threads(1)
    real = Run.begin_stage

    def late(run, stage, first):
        if parallel.rank == parallel.size - 1:
            time.sleep(0.1)
        return real(run, stage, first)

    Run.begin_stage = late
    leave, parallel.leave = parallel.leave, lambda: None
    parallel.until_first_is_done = parallel.barrier
    evaluate.report_files = write_verdicts_only
    said = run_all(json.loads(Path(file).read_text()))
    Path(file).with_suffix(f".{parallel.rank}").write_text(json.dumps(said))
    leave()


def same_run(one, other, tolerance=ROUNDING):
    """The same weights, and the same metrics but for the clock's."""
    assert largest_difference(weights(one), weights(other)) <= tolerance
    lines, others = metrics(one), metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others] != []
    for line, theirs in zip(lines, others):
        assert line.keys() == theirs.keys()
        for key in line.keys() - {"tokens_per_second"}:
            expected = line[key]
            if expected is not None:
                expected = pytest.approx(expected, rel=tolerance, abs=tolerance)
            assert theirs[key] == expected, (other, key)


# --- the laboratory -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = make_lab(tmp_path_factory.mktemp("lab"))
    rows = read_rows(lab / "rows.jsonl")
    for place, row in enumerate(rows):
        row["weight"] = place % 4 / 2
    write_rows(lab / "weighted.jsonl", rows)
    return lab


def words_of(lab, out, loss, *more):
    more = [lab / word if word == "weighted.jsonl" else word for word in more]
    return flags(lab, out, "--timeout", 250, *more, loss=loss, steps=STEPS)


def cases_of(lab, folder, table, size, micros):
    """Runs into folder / PROCESSES-MICRO-NAME. micro: rows per forward; 0: as many as fit."""
    cases = []
    for name, (loss, *more) in table.items():
        for micro in micros:
            out = folder / f"{size}-{micro}-{name}"
            words = words_of(lab, out, loss, "--micro_batch_size", micro, *more)
            cases.append([out.name, words, None])
    return cases


def half_run(lab, folder, change, resume=False):
    """change: "1to2". One process begins, and dies at step 3; two go on from step 2."""
    dies_at = None if resume else 3
    more = ["--save_every", 2] + ["--resume"] * resume
    return [[f"{change}-{loss}", words_of(lab, folder / f"{change}-{loss}", loss, *more), dies_at]
            for loss in ("kto", "bco")]


def ended_well(said):
    for name, lines in said.items():
        assert set(lines) <= {"", "dead"}, (name, lines)


# --- any split ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def splits(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    rounds = [
        (1, (0, 2), half_run(lab, folder, "1to2")),
        (2, (1,), half_run(lab, folder, "1to2", True) + half_run(lab, folder, "2to3")),
        (3, (0,), half_run(lab, folder, "2to3", True) + half_run(lab, folder, "3to1")),
        (1, (), half_run(lab, folder, "3to1", True))]
    for size, micros, halves in rounds:
        cases = cases_of(lab, folder, FAST, size, micros)
        ended_well(together(size, cases + halves, folder))
    return folder


def test_z0_is_not_clamped_and_a_batch_is_short(splits):
    """At z0 = 0 a wrong z0 would go unseen. The fourth batch has 3 rows."""
    lines = metrics(splits / "1-0-kto")
    assert all(line["z0"] > 0.1 for line in lines)
    assert [round(line["epoch"] * 27) for line in lines] == [8, 16, 24, 27, 35]


def same_for_any_split(folder, name, splits):
    runs = list(folder.glob(f"[123]-[0-9]-{name}"))
    assert len(runs) == splits
    for path in runs:
        same_run(folder / f"1-0-{name}", path)


@pytest.mark.parametrize("name", FAST)
def test_any_split_is_the_same_run(splits, name):
    same_for_any_split(splits, name, 4)


@pytest.mark.parametrize("change", ["1to2", "2to3", "3to1"])
def test_another_number_of_processes_goes_on(splits, change):
    """Dead in step 3, with the last checkpoint at 2; bco's running mean crosses too."""
    for loss in ("kto", "bco"):
        same_run(splits / f"1-0-{loss}", splits / f"{change}-{loss}")


@pytest.fixture(scope="module")
def all_splits(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    for size, micros in ((1, (0,)), (2, (0,)), (3, (2,))):
        ended_well(together(size, cases_of(lab, folder, SLOW, size, micros), folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_any_split_is_the_same_run_for_every_loss_and_recipe(all_splits, name):
    same_for_any_split(all_splits, name, 3)


def test_a_loss_that_sorts_its_batch_refuses_to_be_split(lab, tmp_path, monkeypatch):
    for loss in WHOLE:
        words = words_of(lab, tmp_path / "run", loss)
        with pytest.raises(SystemExit, match=f"--loss {loss}: sorts its batch"):
            run(*words, "--micro_batch_size", 1)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match=f"--loss {loss}: sorts its batch"):
            run(*words)
        monkeypatch.delenv("WORLD_SIZE")


# --- several machines, and a process that fails -------------------------------------------------

@pytest.mark.slow
def test_two_machines_are_one_process(lab, splits, tmp_path):
    """Two torchrun agents that meet at one endpoint, as on two hosts with a shared --out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = words_of(lab, tmp_path / "run", "kto")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
               "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--local_addr", "127.0.0.1",
               "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "both",
               str(ROOT / "train.py"), *map(str, words)]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True) for _ in range(2)]
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    same_run(splits / "1-0-kto", tmp_path / "run")
    assert "".join(said).count("step 0: loss") == 1          # one of all processes speaks


FAULT = """
import os, signal, sys, time, train
how, words, real = sys.argv[1], sys.argv[2:], train.train_step

def addresses():     # where this process takes calls, as the kernel writes it
    mine = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")]
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/self/net/{table}").readlines()[1:]:
            word = line.split()
            if word[3] == "0A" and f"socket:[{word[9]}]" in mine:
                yield word[1].split(":")[0]

def step(policy, objective, optimizer, number, *rest, **more):
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if number == 2 and os.path.exists("/proc/self/net/tcp"):
        with open(__file__ + ".heard", "a") as file:
            file.write(" ".join(addresses()) + " ")
    if number == 3 and os.environ["RANK"] == "1" and first_time:
        if how == "raise":
            raise ArithmeticError("only I know")
        if how == "hang":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(policy, objective, optimizer, number, *rest, **more)

train.train_step = step
train.main(words)
"""


def with_fault(folder, how, words, *of_torchrun):
    """Two processes, the second of which fails in step 3.   -> (exit code, stderr, seconds)"""
    script = folder / "fault.py"
    script.write_text(FAULT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", *of_torchrun, str(script), how, *map(str, words)]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stderr, time.time() - began


@pytest.mark.parametrize("how", ["raise", pytest.param("kill", marks=pytest.mark.slow),
                                 pytest.param("hang", marks=pytest.mark.slow)])
def test_a_process_that_fails_takes_the_job_down_with_its_own_error_once(
        lab, splits, tmp_path, how):
    """By an exception, killed, or silent for longer than --timeout. --resume goes on."""
    timeout = 5 if how == "hang" else 100
    words = words_of(lab, tmp_path / "run", "kto", "--save_every", 2, "--timeout", timeout)
    code, said, seconds = with_fault(tmp_path, how, words)
    assert code != 0 and seconds < 90, said[-2000:]
    heard = tmp_path / "fault.py.heard"
    if heard.exists():                                       # 127.0.0.1, nothing else
        assert set(heard.read_text().split()) == {"0100007F"}
    if how == "raise":
        assert said.count("ArithmeticError: only I know") == 1
    if how == "hang":
        assert "imed out" in said
    run(*words, "--resume")
    same_run(splits / "1-0-kto", tmp_path / "run")


@pytest.mark.slow
def test_torchrun_starts_a_killed_job_again_and_it_goes_on(lab, splits, tmp_path):
    """Three times: where a restart met the addresses of the dead, most of these would hang."""
    for attempt in range(3):
        out = tmp_path / str(attempt)
        words = words_of(lab, out, "kto", "--save_every", 2, "--timeout", 200)
        code, said, _ = with_fault(tmp_path, "kill", words, "--max_restarts", "1")
        assert code == 0, said[-3000:]
        same_run(splits / "1-0-kto", out)


if __name__ == "__main__":
    be_one_of_them(sys.argv[1])

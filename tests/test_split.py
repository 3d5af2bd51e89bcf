"""One step, any split: processes x micro-batches x losses give the same weights and the same metrics; and torchrun, its failures included."""
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import evaluate
import train
from test_train import ROOT, flags, lab, largest_difference, metrics, pair_flags, pairs, weights  # noqa: F401

STEPS, SIZES, MICRO = 5, (1, 2, 4), (1, 2, 0)                               # 0: as many rows as fit
MATRIX = ("kto", "dpo", "bco", "beta_dpo")                                  # the last two carry running means


def words_for(loss, lab, out, *more, steps=STEPS):
    paired = train.is_paired(train.signature(train.find_loss(loss))[0])
    return [str(w) for w in (pair_flags(lab, out, loss, *more, steps=steps) if paired else flags(lab, out, *more, loss=loss, steps=steps))]


def same_metrics(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x.keys() - {"tokens_per_second"}:
            assert x[key] == (y[key] if y[key] is None else pytest.approx(y[key], rel=1e-10, abs=1e-10)), (x["step"], key)


def no_report(result, policy, reference, tokenizer, prompts, cfg, seconds):
    """What a run says at its end is tested elsewhere; here it would take most of the time."""
    (Path(cfg.out) / "eval.json").write_text("{}")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(evaluate, "report_files", no_report)


def run_cases(cases):
    """Runs one after the other, in one process group. A case that `dies_at` a step raises there, on every process at once."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluate, "report_files", no_report)
        real = train.train_step
        for words, dies_at in cases:
            m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: 1 / 0 if b.step == dies_at else real(p, r, o, b, *a, **k))
            try:
                with ExitStack() as held:
                    train.run(words, held)
            except ZeroDivisionError:
                assert dies_at is not None


@pytest.fixture(scope="module")
def splits(pairs, tmp_path_factory):
    """folder / size-micro-loss: the runs of the matrix; and folder / 1to2-loss: begun by one process, dead in step 3, continued by two."""
    folder = tmp_path_factory.mktemp("splits")
    changes = [(a, b, loss) for a, b in ((1, 2), (2, 4), (2, 1)) for loss in ("kto", "bco")]
    for size in (*SIZES, 1):
        cases = [(words_for(loss, pairs, out, "--micro_batch_size", micro), None) for loss in MATRIX for micro in MICRO
                 if not (out := folder / f"{size}-{micro}-{loss}").exists()]
        for a, b, loss in changes:
            words, begun = words_for(loss, pairs, folder / f"{a}to{b}-{loss}", "--save_every", 2), (folder / f"{a}to{b}-{loss}").exists()
            cases += [([*words, "--resume"], None)] if begun and b == size else [(words, 3)] if not begun and a == size else []
        if size == 1:
            run_cases(cases)
            continue
        (folder / f"{size}.json").write_text(json.dumps(cases))
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), __file__, str(folder / f"{size}.json")],
                              capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_matrix_is_run_where_z0_is_not_clamped_and_a_batch_is_short(splits):
    m = metrics(splits / "1-0-kto")
    assert len(m) == STEPS and all(x["z0"] > 0.1 for x in m), "at z0 = 0 a wrong z0 would go unseen"
    assert [round(x["epoch"] * 27) for x in m] == [8, 16, 24, 27, 35], "the fourth batch has 3 rows: of four processes one has none"


@pytest.mark.parametrize("micro", MICRO, ids=lambda m: f"micro-batch {m or 'whole'}")
@pytest.mark.parametrize("size", SIZES, ids=lambda n: f"{n} processes")
@pytest.mark.parametrize("loss", MATRIX)
def test_any_split_is_the_same_run(splits, loss, size, micro):
    one, other = splits / f"1-0-{loss}", splits / f"{size}-{micro}-{loss}"
    # float64 sums in another order differ by about 1e-16 each; AdamW divides by sqrt(v), which may raise that a thousandfold
    assert largest_difference(weights(one), weights(other)) < 1e-10
    same_metrics(metrics(one), metrics(other))


@pytest.mark.parametrize("loss", ["kto", "bco"])
@pytest.mark.parametrize("change", ["1to2", "2to4", "2to1"])
def test_a_run_may_be_resumed_by_another_number_of_processes(splits, change, loss):
    """Dead in step 3, with the last checkpoint at 2; bco's running mean crosses too."""
    assert largest_difference(weights(splits / f"1-0-{loss}"), weights(splits / f"{change}-{loss}")) < 1e-10
    same_metrics(metrics(splits / f"1-0-{loss}"), metrics(splits / f"{change}-{loss}"))


@pytest.mark.parametrize("loss", [x for x in [*train.LOSSES, *train.RECIPES, "dpo + 0.1*sft", "kto + 0.5*bco"] if x not in (*MATRIX, "ppo")])
def test_every_loss_and_recipe_gives_the_same_step_for_micro_batches_of_one(pairs, tmp_path, loss):
    if loss in train.BATCH_COUPLED:
        with pytest.raises(SystemExit, match=f"--loss {loss}: sorts its batch, so it needs the global batch in one micro-batch on one process"):
            train.main(words_for(loss, pairs, tmp_path / "1", "--micro_batch_size", 1))
        return
    for micro in (0, 1):
        train.main(words_for(loss, pairs, tmp_path / str(micro), "--micro_batch_size", micro, steps=2))
    assert largest_difference(weights(tmp_path / "0"), weights(tmp_path / "1")) < 1e-10
    same_metrics(metrics(tmp_path / "0"), metrics(tmp_path / "1"))


# --- torchrun: several machines, and what happens when one process fails ----------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_machines_are_one_process(pairs, splits, tmp_path):
    """Two torchrun agents that meet at one endpoint, as on two hosts with a shared folder for --out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--local_addr", "127.0.0.1",
               "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "both", str(ROOT / "train.py"), *words_for("kto", pairs, tmp_path / "run")]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [a.communicate(timeout=240) for a in agents]
    assert all(a.returncode == 0 for a in agents), said[0][1][-2000:] + said[1][1][-2000:]
    assert largest_difference(weights(splits / "1-0-kto"), weights(tmp_path / "run")) < 1e-10
    same_metrics(metrics(splits / "1-0-kto"), metrics(tmp_path / "run"))
    assert sum("step 0: loss" in out for out, _ in said) == 1, "one of all processes speaks"


FAULT = """
import os, signal, sys, time, train
how, words, real = sys.argv[1], sys.argv[2:], train.train_step
def listening():                                         # addresses at which this process takes calls, as the kernel writes them
    mine = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")}
    rows = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/self/net/{table}").readlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
def step(p, r, o, b, *a, **k):
    if b.step == 2 and os.path.exists("/proc/self/net/tcp"):
        open(os.path.join(os.path.dirname(__file__), "listening"), "a").write(" ".join(listening()) + " ")
    if b.step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if how == "raise": raise ArithmeticError("only I know")
        if how == "hang": time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(p, r, o, b, *a, **k)
train.train_step = step
train.main(words)
"""


def with_fault(folder, how, words, *torchrun_words):
    """Two processes, the second of which dies in step 3; everything they and torchrun said, and seconds."""
    (folder / "fault.py").write_text(FAULT)
    start = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *torchrun_words, str(folder / "fault.py"), how, *words],
                          capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stderr, time.time() - start


@pytest.mark.parametrize("how", [pytest.param("kill", marks=pytest.mark.slow), pytest.param("raise", marks=pytest.mark.slow), pytest.param("hang", marks=pytest.mark.slow)])
def test_a_process_that_fails_takes_the_job_down_with_its_own_error_once(pairs, splits, tmp_path, how):
    """Killed, with an exception, or silent for longer than --timeout; the other's complaint is one line, and --resume goes on."""
    words = words_for("kto", pairs, tmp_path / "run", "--save_every", 2, "--timeout", 5 if how == "hang" else 100)
    code, said, seconds = with_fault(tmp_path, how, words)
    assert code != 0 and seconds < 60, said[-2000:]
    assert "File" not in [line for line in said.splitlines() if line.startswith("[rank0]")] and said.count("another process of this run does not answer") <= 1
    if (tmp_path / "listening").exists():
        assert set((tmp_path / "listening").read_text().split()) == {"0100007F"}, "processes of one machine take calls from 127.0.0.1 alone"
    if how == "raise":
        assert said.count("ArithmeticError: only I know") == 1 and "[rank0]" not in said
    if how == "hang":
        assert said.count("process 0: another process of this run does not answer (Timed out waiting 5000ms") == 1
    train.main([*words, "--resume"])
    assert largest_difference(weights(splits / "1-0-kto"), weights(tmp_path / "run")) < 1e-10 and len(metrics(tmp_path / "run")) == STEPS


@pytest.mark.slow
def test_torchrun_starts_a_killed_job_again_and_it_goes_on(pairs, splits, tmp_path):
    """Three times: without a name for each attempt (train.agree_on_a_name) most of these would hang."""
    for i in range(3):
        words = words_for("kto", pairs, tmp_path / str(i), "--save_every", 2, "--timeout", 60)
        code, said, _ = with_fault(tmp_path, "kill", words, "--max_restarts", "1")
        assert code == 0, said[-3000:]
        assert largest_difference(weights(splits / "1-0-kto"), weights(tmp_path / str(i))) < 1e-10 and [m["step"] for m in metrics(tmp_path / str(i))] == list(range(STEPS))


def test_by_default_torchrun_meets_on_this_machine():
    """--standalone, and no rendezvous flag at all, meet on loopback. (torchrun's own store takes calls from everywhere: torch 2.13 binds it to all addresses.)"""
    from torch.distributed.run import config_from_args, parse_args
    for words in (["--standalone"], []):
        config, _, _ = config_from_args(parse_args([*words, "--nproc_per_node", "2", "train.py"]))
        host = config.rdzv_endpoint.rpartition(":")[0] or config.rdzv_endpoint
        assert host in ("localhost", "127.0.0.1"), config.rdzv_endpoint


if __name__ == "__main__":                                                    # one of the processes of a world size
    torch.set_num_threads(1)
    run_cases(json.load(open(sys.argv[1])))
    torch.distributed.destroy_process_group()

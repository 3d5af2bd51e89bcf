"""Claims about experiments.py: verdicts follow from numbers, arms are commands, tables are those in results/, nothing lies above the exact frontier."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments
import train
import world
from experiments import CLAIMS, Runs, arm, exact, interval, judge, solve

ROOT = Path(__file__).parents[1]


def store(**values):
    """A store of runs: label -> key -> one number per seed; the arms are named after their labels."""
    arms = {label: arm("dpo", beta=1.0 + i) for i, label in enumerate(values)}
    seeds = range(len(next(iter(next(iter(values.values())).values()))))
    return Runs(arms, {arms[label].key: {str(s): {"seed": s, **{k: x[s] for k, x in numbers.items()}} for s in seeds} for label, numbers in values.items()}, seeds)


def test_the_interval_is_students():
    """Against the textbook: for (1, 2, 3) the mean is 2, the standard error 1 / sqrt(3) and t(2) = 4.303."""
    mean, low, high = interval([1, 2, 3])
    assert mean == 2 and high - mean == pytest.approx(4.303 / math.sqrt(3)) and mean - low == pytest.approx(high - mean)
    assert interval([1.0])[1:] == (-math.inf, math.inf), "one seed proves nothing"
    assert all(math.isnan(x) for x in interval([1.0, math.nan, 2.0])), "a failed run is no number"


@pytest.mark.parametrize("difference, by, verdict", [([1, 1.1, 0.9], 0, "holds"), ([-1, -1.1, -0.9], 0, "does not hold here"), ([1, -1, 0.5], 0, "undecided"),
                                                     ([1, 1.1, 0.9], 2, "does not hold here"), ([1, math.nan, 1], 0, "undecided"), ([5.0], 0, "undecided")])
def test_more_needs_the_whole_interval_on_one_side(difference, by, verdict):
    assert Runs({}, {}, range(3)).more("x", difference, by)["verdict"] == verdict


@pytest.mark.parametrize("difference, verdict", [([0.01, 0.0, -0.01], "holds"), ([0.5, 0.51, 0.49], "does not hold here"), ([0.2, -0.2, 0.1], "undecided"), ([math.nan], "undecided")])
def test_alike_needs_the_whole_interval_inside(difference, verdict):
    assert Runs({}, {}, range(3)).alike("x", difference, 0.1)["verdict"] == verdict


def test_differences_are_paired_by_seed():
    """Seeds that differ much more than arms do: pairing sees the arms' difference, which is the same in each."""
    r = store(a={"win_rate": [0.5, 0.7, 0.9]}, b={"win_rate": [0.4, 0.6, 0.8]})
    assert r.more("a above b", r("a", "win_rate") - r("b", "win_rate"))["verdict"] == "holds"
    assert r.best(["a", "b"]) == "a"


def test_above_curve_compares_at_the_same_kl():
    runs = {"reward_ref": [0.0], "seed": [0]}
    r = store(low={"kl": [1.0], "reward": [1.0], **runs}, high={"kl": [2.0], "reward": [3.0], **runs}, x={"kl": [1.5], "reward": [2.5], **runs}, y={"kl": [0.5], "reward": [0.2], **runs})
    assert r.above_curve("x", ["low", "high"]) == pytest.approx([0.5]) and r.above_curve("y", ["high", "low"]) == pytest.approx([-0.3]), "below the lowest point the line starts at the reference"


def test_solve_finds_dpos_closed_form():
    """The population DPO loss under a Bradley-Terry annotator: log pi = log ref + u / beta + c (Rafailov et al. 2023, Eq. 4), to LBFGS' 1e-6."""
    ref, u = experiments.table_of_replies(3)
    better = torch.sigmoid(u[:, None] - u)
    found = solve(lambda p: (better * -torch.nn.functional.logsigmoid(0.7 * ((p - ref)[:, None] - (p - ref)))).sum(), 6)
    assert torch.allclose(found, torch.log_softmax(ref + u / 0.7, 0), atol=1e-6)


def test_an_arm_is_a_command_that_train_py_takes():
    """Every arm of every claim: its flags are known, its loss exists, its data has a name; equal arms of two claims are one run."""
    arms = {a for c in CLAIMS.values() for a in c.arms.values()}
    assert len({a.key for a in arms}) == len(arms), "the key tells arms apart"
    for a in arms:
        assert re.match(r"(.*?)(?: ([\d.]+))?$", a.on)[1] in (*experiments.DATA, "world") and a.start in ("sft", "pretrain")
        flags = [str(x) for k, v in a.flags for x in (f"--{k}", "out/rm" if (k, v) == ("reward", "rm") else v)]
        train.settings(["--loss", a.loss, *([] if a.on == "world" else ["--model", "m", "--data", "d"]), *flags])


def test_data_sets_are_what_their_names_say(tmp_path):
    few = experiments.DATA["desirable"](0, None, 0.1)
    good = sum(row["label"] for row in few)
    assert good == experiments.N // 10 and len(few) - good == experiments.N
    fair, liking = experiments.DATA["pairs"](0, None), experiments.DATA["likes length"](0, None)
    longer = lambda rows: np.mean([len(p["chosen"].split()) - len(p["rejected"].split()) for p in rows])                        # noqa: E731
    assert longer(liking) > longer(fair) + 2
    shuffled = experiments.DATA["never said"](0, None)[:200]
    assert np.mean([world.judge(p["prompt"], p["rejected"]).malformed > 0 for p in shuffled]) > 0.95, "a shuffle of two words may come out in order"
    assert not any(world.judge(p["prompt"], p["chosen"]).malformed for p in shuffled)


def test_a_failed_arm_leaves_the_others_and_is_no_verdict(tmp_path):
    c = CLAIMS["native"]
    runs = {a.key: {str(s): {"seed": s, "kl": 1.0, "reward": 1.0, "reward_ref": 0.0, "win_rate": 0.8, "cpu": 1.0} for s in range(3)} for a in c.arms.values()}
    assert judge("native", runs, 3, tmp_path, False)["verdict"] == "holds"
    runs[c.arms["native thumbs"].key]["1"] = {"seed": 1, "failed": "step 3: the loss is not finite"}
    found = judge("native", runs, 3, tmp_path, False)
    assert found["verdict"] == "undecided" and found["failed"] == 1 and "a run failed" in experiments.number(found["checks"][0])
    assert (tmp_path / "native.png").stat().st_size > 10_000


def test_quick_is_never_a_verdict(tmp_path):
    """A short seed of two arms from training to picture, in a folder of its own; the exact checks still count."""
    results = experiments.make_runs(["native"], 3, tmp_path, tmp_path / "runs.json", 1, True)
    assert len(results) == 2 and all(set(x) == {"0"} and "failed" not in x["0"] for x in results.values()), results
    assert judge("native", results, 3, tmp_path, True)["verdict"] == "undecided (quick)"
    again = experiments.make_runs(["native"], 3, tmp_path, tmp_path / "runs.json", 1, True)
    assert again == results, "what is there is not run again"


@pytest.mark.parametrize("argv, says", [(["nope"], "no such experiment"), (["native", "--seeds", "0"], "--seeds"), (["--processes", "0"], "--processes")])
def test_a_wrong_name_is_one_line(argv, says):
    with pytest.raises(SystemExit, match=says):
        experiments.main(argv)


# --- what is in results/ ----------------------------------------------------------------------------------------------------

def test_the_readmes_table_of_claims_is_the_one_in_results():
    """Stale? python experiments.py prints the one to paste."""
    assert experiments.claims_table() in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_every_claim_was_run_in_full_and_its_verdict_follows_from_its_runs(tmp_path):
    """Judged again from results/runs.json: the same checks (to rounding) and verdict; at least 3 seeds, but for what is exact or says one."""
    runs = json.loads((ROOT / "results" / "runs.json").read_text())
    for name, c in CLAIMS.items():
        kept = json.loads((ROOT / "results" / "claims" / f"{name}.json").read_text())
        assert kept["seeds"] >= (c.seeds or 3) and not kept["failed"] and kept["claim"] == c.says, name
        found = judge(name, runs, kept["seeds"], tmp_path, False)
        assert found["verdict"] == kept["verdict"], name
        for a, b in zip(found["checks"], kept["checks"], strict=True):
            assert a["says"] == b["says"] and a["mean"] == pytest.approx(b["mean"], rel=1e-6, abs=1e-6), (name, a, b)
        assert (ROOT / "results" / "claims" / f"{name}.png").stat().st_size > 10_000


def test_no_run_of_any_claim_lies_above_the_exact_frontier():
    """The lower end of a run's own 95 % interval of the reward is not above the best reward at its KL. 2.5 % of runs may be so by chance if they lie ON the
    frontier; none does, so none may."""
    runs = [run for seeds in json.loads((ROOT / "results" / "runs.json").read_text()).values() for run in seeds.values() if "kl" in run]
    assert len(runs) > 300
    above = [run for run in runs if run["reward_ci95"][0] > world.optimum_at_kl(run["kl"]).utility]
    assert not above, above[:2]

"""Verdicts follow from numbers, arms are commands, tables are those in results/."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments
import world
from experiments import CLAIMS, judge
from plumbing import arms, rundir, settings, tables
from plumbing.arms import arm
from plumbing.verdicts import (Runs, check, dpo_minimum, exact, interval, kto_minimum, overall,
                               t975, table_of_replies)

ROOT = Path(__file__).parents[1]
STORE = json.loads((ROOT / "results" / "runs.json").read_text())


def made_up(**numbers):
    """Runs of arms that are named after their labels; numbers: label -> {key: one per seed}."""
    made = {label: arm("dpo", beta=1.0 + k) for k, label in enumerate(numbers)}
    store = {}
    for label, columns in numbers.items():
        rows = zip(*columns.values())
        store[made[label].key] = {str(seed): dict(zip(columns, row))
                                  for seed, row in enumerate(rows)}
    return Runs(made, store, len(store[made[label].key]))


# --- numbers to verdicts --------------------------------------------------------------------------

def test_t_quantiles_are_those_of_the_textbook():
    for freedom, quantile in {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 10: 2.228, 11: 2.201,
                              30: 2.042, 120: 1.980}.items():
        assert t975(freedom) == pytest.approx(quantile, abs=5e-4), freedom


def test_the_interval_is_students():
    mean, low, high = interval([1, 2, 3])                    # standard error 1 / sqrt(3)
    assert mean == 2 and high - mean == mean - low == pytest.approx(4.30265 / math.sqrt(3))
    assert interval([1.0])[1:] == (-math.inf, math.inf), "one seed proves nothing"


def test_a_verdict_needs_the_whole_interval_on_one_side():
    holds, fails, open_ = "holds", "does not hold here", "undecided"
    for difference, above, below, verdict in (
            ([1, 1.1, 0.9], 0, math.inf, holds), ([-1, -1.1, -0.9], 0, math.inf, fails),
            ([1, 1.1, 0.9], 2, math.inf, fails), ([1, -1, 0.5], 0, math.inf, open_),
            ([0, 0, 0], 0, math.inf, open_), ([1, math.nan, 1], 0, math.inf, open_),
            ([5.0], 0, math.inf, open_), ([0.01, 0, -0.01], -0.1, 0.1, holds),
            ([0.5, 0.51, 0.49], -0.1, 0.1, fails), ([0.2, -0.2, 0.1], -0.1, 0.1, open_)):
        assert check("", difference, above, below)["verdict"] == verdict, (difference, above)
    assert check("", [-1, -1.1, -0.9])["verdict"] == fails, "unless said otherwise: above 0"
    assert exact("", 4 + 1e-13, 4, 1e-12)["verdict"] == holds
    assert exact("", 4.1, 4, 1e-12)["verdict"] == fails


def test_a_claim_is_as_good_as_its_worst_check():
    holds, fails, open_ = ({"verdict": verdict} for verdict in
                           ("holds", "does not hold here", "undecided"))
    assert overall([holds, holds]) == "holds"
    assert overall([open_, holds]) == "undecided"
    assert overall([holds, fails, open_]) == "does not hold here"


def test_differences_are_paired_by_seed():
    """Seeds differ much more than arms do; pairing sees what is the same in each."""
    runs = made_up(a={"win_rate": [0.5, 0.7, 0.9]}, b={"win_rate": [0.4, 0.6, 0.8]})
    assert runs.check("", "win_rate", "a", "b")["verdict"] == "holds"
    assert runs.check("", "win_rate", "a", "b", above=0.2)["verdict"] == "does not hold here"
    assert runs.best(["b", "a"]) == "a"


def test_an_arm_that_failed_is_never_best_and_one_that_was_not_run_is_left_out():
    runs = made_up(good={"win_rate": [0.5]}, bad={"failed": ["step 3: not finite"]})
    assert runs.best(["bad", "good"]) == "good" and math.isnan(runs("bad", "win_rate")[0])
    assert list(Runs(runs.arms | {"new": arm("ipo")}, runs.store, 1).arms) == ["good", "bad"]


def test_rewards_are_compared_at_the_same_kl():
    runs = made_up(low={"kl": [1, 1], "reward": [1, 2], "reward_ref": [0, 1]},
                   high={"kl": [2, 2], "reward": [3, 2], "reward_ref": [0, 1]},
                   x={"kl": [1.5, 0.5], "reward": [2.5, 1.2], "reward_ref": [0, 1]})
    # By hand: the curve is at 2 where x is, then at 1.5, half way from the reference to `low`.
    assert runs.above_curve("x", ["high", "low"]) == pytest.approx([0.5, -0.3])


def test_minima_are_the_closed_forms():
    """DPO: log pi = log ref + u / beta + c (Rafailov et al. 2023, Eq. 4). KTO: world's formula."""
    ref, utility = table_of_replies(3)
    better = torch.sigmoid(utility[:, None] - utility)
    dpo = torch.log_softmax(ref + utility / 0.7, 0)
    assert torch.allclose(dpo_minimum(ref, better, beta=0.7), dpo, atol=1e-6)    # LBFGS' tolerance
    liked, flat = better.mean(1), torch.full((6,), -math.log(6), dtype=torch.float64)
    ratios = world.kto_logratios([(1 / 6, 2 * share - 1) for share in liked.tolist()], beta=0.5)
    found = kto_minimum(flat, liked, beta=0.5)
    assert torch.allclose(found.exp(), torch.tensor(ratios).double().exp() / 6, atol=1e-6)


# --- arms -----------------------------------------------------------------------------------------

def test_an_arm_is_a_command_that_train_py_takes(monkeypatch):
    monkeypatch.setattr(arms, "base_model", lambda *_: "base")
    monkeypatch.setattr(arms, "rows_file", lambda *_: "rows.jsonl")
    monkeypatch.setattr(arms, "reward_model", lambda *_: "rm")
    every = {arm for claim in CLAIMS.values() for arm in claim.arms.values()}
    assert len({arm.key for arm in every}) == len(every), "the key tells arms apart"
    unused = set(STORE) - {arm.key for arm in every}
    assert unused == {"ppo --reward rm --steps 16 | world"}, "keys are as they were stored"
    for one in every:
        how = settings.parse(arms.command(one, 2, Path("out/x"), quick=False))
        assert how.config.loss == one.loss and how.config.seed == 2
        values = vars(how.config) | how.hyper | how.options
        for flag, value in one.flags:
            assert values[flag] == value or flag == "reward", (one.key, flag)
        if one.on != "world":
            common = {"lr": 5e-4, "steps": 150, "batch_size": 16 if how.recipe.paired else 32}
            common |= dict(one.flags)
            assert all(values[key] == common[key] for key in ("lr", "steps", "batch_size")), one.key


def test_preferences_are_what_their_names_say(monkeypatch):
    monkeypatch.setattr(arms, "N", 1500)

    def longer(pairs):
        return np.mean([len(p["chosen"].split()) - len(p["rejected"].split()) for p in pairs])

    few = arms.preferences("desirable 0.1", 0, None)
    good = sum(row["label"] for row in few)
    assert good == arms.N // 10 and len(few) - good == arms.N
    fair = arms.preferences("pairs", 0, None)
    assert longer(arms.preferences("likes length", 0, None)) > longer(fair) + 2
    flipped = arms.preferences("flip 0.4", 0, None)
    same = np.mean([a["chosen"] == b["chosen"] for a, b in zip(fair, flipped)])
    assert same == pytest.approx(0.6, abs=0.05)              # 4 standard errors of 1,500 coins
    shuffled = arms.preferences("never said", 0, None)[:200]
    broken = [world.judge(p["prompt"], p["rejected"]).malformed > 0 for p in shuffled]
    assert np.mean(broken) > 0.95, "a shuffle of two words may come out in order"
    assert not any(world.judge(p["prompt"], p["chosen"]).malformed for p in shuffled)


@pytest.mark.slow
def test_quick_runs_an_arm_from_training_to_picture_and_is_never_a_verdict(tmp_path):
    found = experiments.make_runs(["native"], 1, tmp_path, tmp_path / "runs.json", 1, True)
    for runs in found.values():
        assert "failed" not in runs["0"] and len(runs["0"]["own"]) == 2, runs
    verdict = judge("native", found, 1, tmp_path / "claims", True)
    assert verdict["verdict"] == "undecided (quick)" and verdict["runs"] == 2


def test_runs_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    """Every run is saved when it ends, with its commit; a crash is not the other arms'."""
    asked = []

    def stand_in(arm, seed, out, quick):
        asked.append((arm.on, seed))
        if (arm.on, seed) == ("native", 1):
            raise RuntimeError("out of memory")
        return {"seed": seed, "win_rate": 0.5}

    monkeypatch.setattr(experiments, "run_arm", stand_in)
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    path = tmp_path / "runs.json"
    found = experiments.make_runs(["native"], 2, tmp_path, path, 1, False)
    assert sorted(asked) == [("native", 0), ("native", 1), ("pairs", 0), ("pairs", 1)]
    runs = found[CLAIMS["native"].arms["native thumbs"].key]
    assert runs["0"] == {"seed": 0, "win_rate": 0.5, "commit": rundir.commit()}
    assert "out of memory" in runs["1"]["failed"] and json.loads(path.read_text()) == found
    experiments.make_runs(["native"], 3, tmp_path, path, 1, False)
    assert sorted(asked[4:]) == [("native", 2), ("pairs", 2)]


def test_a_run_that_failed_is_no_verdict(tmp_path):
    native = CLAIMS["native"]
    number = {"kl": 1.0, "reward": 1.0, "reward_ref": 0.0, "win_rate": 0.8, "cpu": 1.0,
              "commit": "0123456789abcdef-dirty"}
    runs = {arm.key: {str(seed): dict(number) for seed in range(3)} for arm in native.arms.values()}
    found = judge("native", runs, 3, tmp_path, False)
    assert found["verdict"] == "holds" and found["commits"] == ["0123456789-dirty"]
    runs[native.arms["native thumbs"].key]["1"] = {"seed": 1, "failed": "the loss is not finite"}
    found = judge("native", runs, 3, tmp_path, False)
    assert found["verdict"] == "undecided" and found["failed"] == 1
    assert "a run failed" in tables.number(found["checks"][0])
    assert (tmp_path / "native.png").stat().st_size > 10_000


def test_a_bad_command_is_one_line():
    for argv, says in ((["nope"], "nope"), (["native", "--seeds", "0"], "--seeds"),
                       (["--processes", "0"], "--processes")):
        with pytest.raises(SystemExit, match=says) as stop:
            experiments.main(argv)
        assert "\n" not in str(stop.value)


# --- what is in results/ and in docs/ -------------------------------------------------------

def test_the_pages_tables_are_those_that_the_commands_print():
    """Stale? python experiments.py readme"""
    objectives = (ROOT / "docs" / "objectives.md").read_text()
    results = (ROOT / "results" / "README.md").read_text()
    assert tables.objectives() in objectives
    assert tables.claims(CLAIMS) in results and tables.methods() in results


def test_every_claim_was_run_in_full():
    for name, claim in CLAIMS.items():
        kept = json.loads((ROOT / "results" / "claims" / f"{name}.json").read_text())
        assert kept["seeds"] >= claim.seeds and not kept["failed"], name
        assert kept["claim"] == claim.says and kept["source"] == claim.source, name


@pytest.mark.slow
def test_stored_verdicts_follow_from_stored_runs(tmp_path):
    for name in CLAIMS:
        kept = json.loads((ROOT / "results" / "claims" / f"{name}.json").read_text())
        found = judge(name, STORE, kept["seeds"], tmp_path, False)
        assert found["verdict"] == kept["verdict"], name
        for a, b in zip(found["checks"], kept["checks"], strict=True):
            assert a["says"] == b["says"], name
            for key in ("mean", "low", "high"):              # 1e-6: LBFGS' tolerance
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), (name, a["says"])


def test_no_run_lies_above_the_exact_frontier():
    """Nor the lower end of its own 95 % interval; of 489 runs ON the frontier 12 would."""
    ends = [run for seeds in STORE.values() for run in seeds.values() if "kl" in run]
    assert len(ends) > 300
    assert max(run["reward_ci95"][0] - run["best"] for run in ends) <= 0
    for run in ends[::20]:
        assert run["best"] == pytest.approx(world.optimum_at_kl(run["kl"]).utility, abs=1e-9)

"""Verdicts follow from numbers, arms are commands, tables are those in results/."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

import experiments
import world
from experiments import CLAIMS, judge
from plumbing import arms, claims_online, methods, rundir, settings, store, tables, verdicts
from plumbing.arms import arm
from plumbing.minima import dpo_minimum, kto_minimum, table_of_replies
from plumbing.verdicts import (Runs, check, exact, exact_interval, in_words, interval, overall,
                               seeds_needed, share_interval, t975, tail)

ROOT = Path(__file__).parents[1]
STORE = store.read()


def made_up(**numbers):
    """Runs of arms that are named after their labels; numbers: label -> {key: one per seed}."""
    made = {label: arm("dpo", beta=1.0 + k) for k, label in enumerate(numbers)}
    stored = {}
    for label, columns in numbers.items():
        rows = zip(*columns.values())
        stored[made[label].key] = {seed: dict(zip(columns, row)) for seed, row in enumerate(rows)}
    return Runs(made, stored)


# --- numbers to verdicts --------------------------------------------------------------------------

def test_t_quantiles_are_those_of_the_textbook():
    for freedom, quantile in {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 10: 2.228, 11: 2.201,
                              30: 2.042, 120: 1.980}.items():
        assert t975(freedom) == pytest.approx(quantile, abs=5e-4), freedom
        assert tail(quantile, freedom) == pytest.approx(0.025, abs=5e-5), freedom


def test_intervals_of_rates_are_clopper_and_pearsons():
    """Their ends are quantiles of beta distributions: checked by its distribution function."""
    for k, n in ((0, 12), (1, 12), (7, 20), (12, 12)):
        low, high = exact_interval(k, n)
        if k:
            assert mpmath.betainc(k, n - k + 1, 0, low, regularized=True) == pytest.approx(0.025)
        if k < n:
            assert mpmath.betainc(k + 1, n - k, 0, high, regularized=True) == pytest.approx(0.975)
        assert (low == 0) == (k == 0) and (high == 1) == (k == n)


def test_intervals_of_shares_stay_inside():
    mean, low, high = share_interval([0.97, 0.99, 0.98, 0.999])
    assert 0 < low < mean < high < 1
    middle = share_interval([0.4, 0.6])                      # symmetric on the logit scale
    assert middle[0] == pytest.approx(0.5) and middle[1] == pytest.approx(1 - middle[2])


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


def test_what_is_undecided_says_how_many_seeds_would_decide():
    """By simulation: with so many seeds of that spread the interval excludes 0, with fewer not."""
    values = np.array([0.3, -0.1, 0.25, 0.0])
    found = check("", values)
    assert found["verdict"] == "undecided" and found["up"] == 2
    n, spread = found["seeds_needed"], values.std(ddof=1)
    half = [t975(m - 1) * spread / math.sqrt(m) for m in (n - 1, n)]
    assert half[1] < values.mean() <= half[0]
    assert f"2 of 4 seeds up; about {n} seeds would decide" in in_words(found)
    assert seeds_needed(1e-6, 1.0) == verdicts.MOST_SEEDS + 1
    few, many = ([0.1, -0.1, 0.1001, -0.1] * times for times in (1, 3))
    assert check("", many)["verdict"] == "too small to matter here"
    assert "more than 500 seeds would decide" in in_words(check("", few))


def test_a_claim_has_a_verdict_for_each_part():
    holds, fails, open_ = ({"verdict": verdict} for verdict in
                           ("holds", "does not hold here", "undecided"))
    assert overall([holds, holds]) == "holds" and overall([fails]) == "does not hold here"
    assert overall([open_, holds]) == "1 of 2 parts hold, 1 undecided"
    assert overall([open_, fails]) == "0 of 2 parts hold, 1 does not, 1 undecided"
    assert overall([fails, fails, holds]) == "1 of 3 parts hold, 2 do not"


def test_holm_counts_the_verdicts_that_hold_together():
    """0.025 / 3, / 2, / 1 are the steps of three parts: the second risk is above its step."""
    parts = [{"verdict": "holds", "chance": chance} for chance in (0.001, 0.02, 0.022)]
    said = verdicts.by_chance([*parts, {"verdict": "holds"}])
    assert said.startswith("3 parts") and "about 0.1 verdicts" in said and "1 of them hold" in said
    parts[1]["chance"] = 0.012                               # below 0.025 / 2, above 0.025 / 3
    assert "3 of them hold together" in verdicts.by_chance(parts)


def test_differences_are_paired_by_seed():
    """Seeds differ much more than arms do; pairing sees what is the same in each."""
    runs = made_up(a={"reward": [0.5, 0.7, 0.9]}, b={"reward": [0.4, 0.6, 0.8]})
    assert runs.check("", "a", "b")["verdict"] == "holds"
    assert runs.check("", "a", "b", above=0.2)["verdict"] == "does not hold here"


def test_settings_are_chosen_on_the_tuning_questions():
    """`lucky` looks best on the reporting questions, `far` is too far away, `bad` has failed."""
    runs = made_up(good={"reward": [1.0], "tune": [{"reward": 1.2, "kl": 1.0}]},
                   lucky={"reward": [2.0], "tune": [{"reward": 1.0, "kl": 1.0}]},
                   far={"reward": [2.0], "tune": [{"reward": 1.5, "kl": 4.0}]},
                   bad={"failed": ["step 3: not finite"]})
    assert runs.best(list(runs.arms), most_kl=2.0) == "good"
    assert runs.best(list(runs.arms)) == "far" and math.isnan(runs("bad", "reward")[0])


def test_breakdowns_are_counted():
    runs = made_up(fine={"kl": [1.0, 4.9], "malformed": [0.1, 0.2]},
                   some={"kl": [1.0, 9.0], "malformed": [0.3, 0.1]}, bad={"failed": ["x", "y"]})
    keys = {label: one.key for label, one in runs.arms.items()}
    assert runs.breakdowns() == {keys["some"]: (2, 2), keys["bad"]: (2, 2)}


def test_a_claim_has_as_many_seeds_as_its_arm_with_the_fewest():
    runs = made_up(a={"reward": [1, 2, 3]}, b={"reward": [1, 2]})
    assert runs.seeds == 2 and len(runs("a", "reward")) == 2
    assert Runs(runs.arms | {"new": arm("ipo")}, runs.store).seeds == 0


def test_rewards_are_compared_at_the_same_kl():
    runs = made_up(low={"kl": [1, 1], "reward": [1, 2], "reward_ref": [0, 1]},
                   high={"kl": [2, 2], "reward": [3, 2], "reward_ref": [0, 1]},
                   x={"kl": [1.5, 0.5], "reward": [2.5, 1.2], "reward_ref": [0, 1]})
    # By hand: the curve is at 2 where x is, then at 1.5, half way from the reference to `low`.
    assert runs.above_curve("x", ["high", "low"]) == pytest.approx([0.5, -0.3])


def test_the_way_of_a_run_is_read_at_a_step_and_at_a_kl():
    """By hand. The second seed's KL turns back; from there on it counts as the largest so far."""
    ways = [[[10, 1.0, 2.0], [20, 3.0, 4.0]], [[10, 1.0, 1.0], [20, 0.5, 5.0], [30, 2.0, 3.0]]]
    runs = made_up(a={"reward_ref": [0.0, -1.0], "path": ways})
    assert claims_online.path_at(runs, "a", 0, [5, 15]) == pytest.approx([1.0, 3.0])
    assert claims_online.path_at(runs, "a", 1, [2.0, 1.5]) == pytest.approx([3.0, 4.0])


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

def every_arm():
    return ({arm for claim in CLAIMS.values() for arm in claim.arms.values()}
            | {arm for name in methods.NAMES for arm in methods.grid(name)})


def test_an_arm_is_a_command_that_train_py_takes(monkeypatch):
    monkeypatch.setattr(arms, "base_model", lambda *_: "base")
    monkeypatch.setattr(arms, "rows_file", lambda *_: "rows.jsonl")
    monkeypatch.setattr(arms, "reward_model", lambda *_: "rm")
    every = every_arm()
    assert len({arm.key for arm in every}) == len(every), "the key tells arms apart"
    assert not set(STORE) - {arm.key for arm in every}, "a stored run belongs to an arm"
    for one in every:
        how = settings.parse(arms.command(one, 2, Path("out/x"), quick=False))
        assert how.config.loss == one.loss and how.config.seed == 2
        values = vars(how.config) | how.hyper | how.options
        for flag, value in one.flags:
            assert flag in ("reward", "online") or values[flag] == value, (one.key, flag)
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
    some = arms.preferences("500 pairs flip 0.2 one thumb", 0, None)
    assert len(some) == 500 and 200 < sum(row["label"] for row in some) < 300    # 4.5 of their sd
    rare = arms.preferences("500 pairs desirable 0.111", 0, None)
    assert len(rare) == 500 + 56 and sum(row["label"] for row in rare) == 56
    experts = arms.preferences("nine up one cell", 0, None)
    assert len({world.parse_prompt(row["prompt"]) for row in experts}) == 1 and len(experts) > 400
    assert np.mean([row["label"] for row in experts]) == pytest.approx(0.9, abs=0.02)
    liked, others = ([world.utility(row["prompt"], row["completion"]) for row in experts
                      if row["label"] is label] for label in (True, False))
    assert np.mean(liked) > np.mean(others) + 1
    assert all(row["label"] for row in arms.preferences("only up", 0, None))
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
    path = tmp_path / "runs.jsonl"
    wanted = experiments.seeds_of_arms(["native"], 1)
    store.make(store.missing(list(wanted), wanted, {}), tmp_path, 1, path, quick=True)
    stored = store.read(path)
    for runs in stored.values():
        assert "failed" not in runs[0] and math.isfinite(runs[0]["own"]), runs
        assert not store.is_stale(runs[0])
    verdict = judge(["native"], stored, tmp_path / "claims", quick=True)["native"]
    assert verdict["verdict"] == "undecided (quick)" and verdict["runs"] == 2
    assert (tmp_path / "claims" / "native.png").stat().st_size > 10_000


def test_runs_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    """Every run is saved when it ends, with its commit; a crash is not the other arms'."""
    asked = []

    def stand_in(arm, seed, out, quick):
        asked.append((arm.on, seed))
        if (arm.on, seed) == ("native", 1):
            raise RuntimeError("out of memory")
        return {"reward": 0.123456789}

    monkeypatch.setattr(store, "run_arm", stand_in)
    monkeypatch.setattr(store, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    path = tmp_path / "runs.jsonl"
    native = list(CLAIMS["native"].arms.values())

    def make(seeds, refresh=False):
        jobs = store.missing(native, dict.fromkeys(native, seeds), store.read(path), refresh)
        store.make(jobs, tmp_path, 1, path)
        return store.read(path)

    found = make(2)
    assert sorted(asked) == [("native", 0), ("native", 1), ("pairs", 0), ("pairs", 1)]
    runs = found[CLAIMS["native"].arms["native thumbs"].key]
    assert runs[0]["reward"] == 0.123457 and runs[0]["commit"] == rundir.commit()
    assert "out of memory" in runs[1]["failed"]
    make(3)
    assert sorted(asked[4:]) == [("native", 2), ("pairs", 2)]
    make(3, refresh=True)
    assert len(asked) == 6, "nothing is stale"
    text = path.read_text().replace(runs[0]["code"], "0000000000", 2)
    path.write_text(text)
    make(3, refresh=True)
    assert len(asked) == 8 and len(path.read_text().splitlines()) == 6


def test_comments_and_new_losses_make_no_run_stale():
    source = "def f(x):\n    return x + 1\n"
    same = '"""Doc."""\n# why\ndef f(x):\n    """Doc."""\n    return x + 1   # why\n'
    assert store.without_prose(source) == store.without_prose(same)
    assert store.without_prose(source) != store.without_prose(source.replace("1", "2"))
    assert store.without_prose("SETTINGS = 1") == store.without_prose("SETTINGS = 2")
    codes = {store.code_of(loss) for loss in ("dpo", "kto", "dpo + 1*sft", "grpo")}
    assert len(codes) == 4, "each loss has its own code"
    assert store.code_of("ld_dpo") == store.code_of("dpo"), "a recipe's loss is the same function"


def test_a_run_that_failed_is_no_verdict(tmp_path):
    native = CLAIMS["native"]
    number = {"kl": 1.0, "reward": 1.0, "reward_ref": 0.0, "malformed": 0.0, "cpu": 1.0}
    runs = {arm.key: {seed: dict(number) for seed in range(3)} for arm in native.arms.values()}
    found = judge(["native"], runs, tmp_path)["native"]
    assert found["verdict"] == "holds" and found["seeds"] == 3 and not found["breakdowns"]
    key = native.arms["native thumbs"].key
    runs[key][1] = {"failed": "the loss is not finite"}
    found = judge(["native"], runs, tmp_path)["native"]
    assert found["verdict"] == "undecided" and found["breakdowns"] == {key: (1, 3)}
    assert "a run failed" in in_words(found["checks"][0])
    assert (tmp_path / "native.png").stat().st_size > 10_000
    assert not judge(["native"], {}, tmp_path), "what was never run is not judged"


def test_methods_choose_on_the_tuning_questions_within_the_leash():
    six = methods.grid("dpo")
    assert len(set(six)) == 6
    tune = [{"reward": 1.0 + k, "kl": 0.5 + k} for k in range(6)]
    stored = {one.key: {0: {"tune": found}} for one, found in zip(six, tune)}
    assert methods.chosen("dpo", stored) == six[1], "0.5 and 1.5 nats are within 2"
    assert methods.chosen("dpo", {}) is None


def test_a_bad_command_is_one_line():
    for argv, says in ((["nope"], "nope"), (["native", "--seeds", "0"], "--seeds"),
                       (["--processes", "0"], "--processes")):
        with pytest.raises(SystemExit, match=says) as stop:
            experiments.main(argv)
        assert "\n" not in str(stop.value)


# --- what is in results/ and in docs/ -------------------------------------------------------

def test_the_pages_tables_are_those_that_the_commands_print():
    """Stale? python experiments.py judge"""
    objectives = (ROOT / "docs" / "objectives.md").read_text()
    results = (ROOT / "results" / "README.md").read_text()
    kept = tables.read_verdicts()
    assert tables.objectives() in objectives
    assert tables.claims(CLAIMS, kept) in results and tables.breakdowns(kept) in results
    assert tables.table_of_methods(STORE) in results
    assert verdicts.by_chance([part for one in kept.values() for part in one["checks"]]) in results


def test_every_verdict_has_its_picture():
    for name, kept in tables.read_verdicts().items():
        assert name in CLAIMS and (ROOT / "results" / "claims" / f"{name}.png").is_file(), name
        assert kept["seeds"] >= 1


@pytest.mark.slow
def test_stored_verdicts_follow_from_stored_runs(tmp_path):
    found = json.loads(json.dumps(judge(CLAIMS, STORE, tmp_path)))
    kept = tables.read_verdicts()
    assert set(found) == set(kept)
    for name, one in kept.items():
        assert found[name]["verdict"] == one["verdict"], name
        for a, b in zip(found[name]["checks"], one["checks"], strict=True):
            assert a["says"] == b["says"], name
            for key in ("mean", "low", "high"):              # 1e-6: LBFGS' tolerance
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), (name, a["says"])


def test_no_run_lies_above_the_exact_frontier():
    """Nor the lower end of its own 95 % interval; of 400 runs ON the frontier 10 would."""
    ends = [run for seeds in STORE.values() for run in seeds.values() if "kl" in run]
    assert len(ends) > 300
    assert max(run["reward_low"] - run["best"] for run in ends) <= 0
    for run in ends[::20]:                                   # stored to six digits
        assert run["best"] == pytest.approx(world.optimum_at_kl(run["kl"]).utility, abs=1e-4)

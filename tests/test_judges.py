"""Judges outside: pairs that do not tell which side is which, verdicts, and length control."""
import json

import numpy as np
import pytest
import torch

from plumbing import judges


# --- blinded pairs and verdicts -------------------------------------------------------------------

@pytest.fixture
def comparison(tmp_path):
    """(folder, rows) of a comparison of ten pairs."""
    rows = [{"prompt": f"p{i}", "reference": f"r{i}", "policy": f"s{i}"}
            for i in range(10)]
    judges.write_comparison(tmp_path, rows)
    return tmp_path, rows


def export(comparison, name="pairs.jsonl"):
    folder, rows = comparison
    judges.export_pairs(folder, rows, folder / name)
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_exported_pairs_are_blind(comparison):
    _, rows = comparison
    pairs = export(comparison)
    assert all(list(pair) == ["id", "prompt", "a", "b"] for pair in pairs)
    assert [pair["id"][9:] for pair in pairs] == [f"{k:05d}" for k in range(20)]   # place, no more
    both_orders = {(row["prompt"], *sorted((row["reference"], row["policy"]), reverse=turned))
                   for row in rows for turned in (False, True)}
    assert {(pair["prompt"], pair["a"], pair["b"]) for pair in pairs} == both_orders
    policy_first = [pair["a"][0] == "s" for pair in pairs]
    assert policy_first not in (sorted(policy_first), sorted(policy_first)[::-1])
    assert len(set(zip(policy_first[::2], policy_first[1::2]))) > 1      # no pattern
    assert export(comparison, "again.jsonl") == pairs            # verdicts are not outdated by it


def ids_of(comparison):
    """(pair, where the policy stands) -> id."""
    ids = {}
    for pair in export(comparison):
        side = "a" if pair["a"][0] == "s" else "b"
        ids[int(pair["prompt"][1:]), side] = pair["id"]
    return ids


def read(comparison, text):
    folder, rows = comparison
    (folder / "v.jsonl").write_text(text, encoding="utf-8")
    return judges.read_verdicts(folder, rows, folder / "v.jsonl")


def test_opposite_verdicts_in_the_two_orders_count_half_and_one_order_is_enough(comparison):
    ids = ids_of(comparison)
    said = {(i, "a"): "tie" for i in range(4, 10)}               # one order only, all ties
    said[4, "b"] = "b"                                           # but this: a tie, then the policy
    said |= {(0, "a"): "a", (0, "b"): "b"}                       # the policy, twice
    said |= {(1, "a"): "a", (1, "b"): "a"}                       # the first place, twice
    said |= {(2, "a"): " B ", (3, "b"): "a"}                     # the reference
    lines = [json.dumps({"id": ids[place], "verdict": verdict, "why": "more"})
             for place, verdict in said.items()]
    wins, facts = read(comparison, "\n\n".join(lines) + "\n")
    assert wins.tolist() == [1, 0.5, 0, 0, 0.75] + [0.5] * 5
    assert facts == {"ties": 5, "disagreement": 2 / 3, "position_bias": 4 / 7, "one_order": 7}


def test_verdicts_that_do_not_fit_are_one_line(comparison):
    name = ids_of(comparison)[0, "a"]
    good = json.dumps({"id": name, "verdict": "a"})
    for text, words in [
            (f"{good}\n\n{good}", f"line 3: .*{name}.* already"),
            (good.replace('"a"', '"better"'), "line 1: expected"),
            (good.replace(name, "12345678-00000"), "line 1: .*12345678-00000"),
            ('{"id": 1, "verdict": "a"}', "line 1: expected"),
            ('{"id": "x", "verdict": null}', "line 1: expected"),
            ('{"id":', "line 1: expected"),
            (good, "9 of 10 pairs have no verdict"),
            ("", "10 of 10 pairs")]:
        with pytest.raises(SystemExit, match=f"--verdicts .*v.jsonl: {words}") as end:
            read(comparison, text)
        assert "\n" not in str(end.value), text
    with pytest.raises(SystemExit, match="--verdicts nosuch: .*No such file"):
        judges.read_verdicts(*comparison, "nosuch")


def test_verdicts_on_other_texts_are_refused(comparison):
    folder, rows = comparison
    good = json.dumps({"id": ids_of(comparison)[0, "a"], "verdict": "a"})
    note = {"sha256": judges.write_comparison(folder, rows)}
    judges.save_result(folder, {"comparison": note})
    assert judges.kept_comparison(folder) == (rows, note)
    judges.write_comparison(folder, rows[::-1])                  # sampled anew
    assert judges.kept_comparison(folder) == ([], {})
    with pytest.raises(SystemExit, match="not of an export of the present texts"):
        read(comparison, good)


# --- the win rate at equal lengths ----------------------------------------------------------------

def planted(quality, length, n=4000):
    """Verdicts with log-odds quality + length * tanh(d / std d), on a policy that is longer."""
    rng = np.random.default_rng(0)
    d = rng.normal(40, 50, n)
    logits = quality + length * np.tanh(d / d.std())
    return (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float), d


def test_a_judge_that_only_likes_length_gives_half_at_equal_lengths():
    wins, d = planted(quality=0.0, length=3.0)
    assert wins.mean() > 0.7
    # 4,000 pairs know the intercept to about 0.05, its sigmoid to a quarter of that: 3 errors.
    assert abs(judges.length_controlled(wins, d) - 0.5) < 0.04


def test_without_a_length_effect_the_two_win_rates_agree():
    wins, d = planted(quality=0.8, length=0.0)
    assert abs(judges.length_controlled(wins, d) - wins.mean()) < 0.04      # errors of 0.01 each
    assert judges.length_controlled([1, 0, 1, 1], [0, 0, 0, 0]) == 0.75
    assert judges.length_controlled([1, 0, 1, 1], [5, 5, 5, 5]) is None


def test_the_newton_fit_is_the_optimum_that_lbfgs_finds():
    wins, d = planted(0.3, 1.0, n=200)
    wins[::3] = 0.5                                              # ties among them
    x, y = torch.tensor(np.tanh(d / d.std())), torch.tensor(wins)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = w[0] + w[1] * x
        loss = (torch.nn.functional.softplus(logits) - y * logits).sum() + 1e-3 / 2 * (w @ w)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = float(torch.sigmoid(w[0].detach()))               # LBFGS stops at about 1e-8
    assert judges.length_controlled(wins, d) == pytest.approx(expected, abs=1e-7)


def test_separable_verdicts_stay_finite():
    d = np.linspace(-1, 1, 50)
    assert abs(judges.length_controlled(d > 0, d) - 0.5) < 1e-6  # symmetric: the intercept is 0
    for n in (2, 50, 100_000):                                   # sigma of about log(n / ridge)
        assert 0.99 < judges.length_controlled(np.ones(n), np.arange(n)) < 1

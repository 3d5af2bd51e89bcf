"""Claims about objective.py: every number that a loss is told is what its name says."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import objective
import recipes
from lab import (batch_of, first_loss, flags, largest_difference, load, log_prob, log_ratio,
                 log_softmax, metrics, read_rows, read_units, run, weights,
                 without_report, write_rows)
from objective import MEASURED, Part, Preferences, Reference, measured, score
from plumbing import metrics as metrics_of_a_step
from plumbing.run import Run

EXACT = 1e-12                    # float64: the same sums in another order
SUMS = 1e-10                     # weights after a few steps of it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_report(monkeypatch)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


# --- the first step of a run, from the definitions ----------------------------------------------

def test_z0_is_the_mismatched_mean_and_not_the_matched_one(lab, models, tmp_path):
    """Measured row by row. A z0 of the matched rows would be their mean reward."""
    run(*flags(lab, tmp_path / "run", steps=1))
    first = metrics(tmp_path / "run")[0]
    units = data.mismatched_units(read_units(lab, "rows.jsonl"), seed=3, max_len=64)
    matched, mismatched, losses = [], [], []
    for y, other in batch_of(units):
        assert other.prompt_key == y.prompt_key
        matched.append(log_ratio(*models, y))
        mismatched.append(log_ratio(*models, other))
    assert first["z0_raw"] == pytest.approx(np.mean(mismatched), abs=EXACT)
    assert abs(first["z0_raw"] - np.mean(matched)) > 0.01
    for (y, _), r in zip(batch_of(units), matched):              # Eq. 8 with both lambdas 1
        sign = 1 if y.desirable else -1
        losses.append(1 - sigmoid(0.1 * sign * (r - max(0, np.mean(mismatched)))))
    assert first["loss"] == pytest.approx(np.mean(losses), abs=EXACT)


def test_the_entropy_of_kto_uniform_is_minus_the_mismatched_mean(lab, models, tmp_path):
    found = first_loss(*flags(lab, tmp_path / "run", loss="kto_uniform"))
    policy = models[0]
    units = batch_of(data.mismatched_units(read_units(lab, "rows.jsonl"), seed=3, max_len=64))
    with torch.no_grad():
        entropy = -np.mean([float(log_prob(policy, other)) for _, other in units])
        logps = [float(log_prob(policy, y)) for y, _ in units]
    signs = [1 if y.desirable else -1 for y, _ in units]
    wanted = np.mean([1 - sigmoid(0.1 * sign * (logp + entropy))
                      for sign, logp in zip(signs, logps)])
    assert found == pytest.approx(wanted, abs=EXACT)


def whole_distributions(policy, reference, row):
    """(sum of KL(pi_ref || pi), WPO's weight) of a response, position by position."""
    with torch.no_grad():
        p, q = log_softmax(policy, row), log_softmax(reference, row)
    kl = float((q.exp() * (q - p)).sum())
    said = p[range(len(p)), row.response.tolist()]
    return kl, math.exp((said - p.exp().square().sum(-1).log()).mean())


def test_the_first_dpo_tdpo_and_wpo_steps_are_the_equations_by_hand(lab, models, tmp_path):
    by_hand = {"dpo": [], "tdpo2": [], "wpo": []}
    for chosen, rejected in batch_of(read_units(lab)):
        h = log_ratio(*models, chosen) - log_ratio(*models, rejected)
        kl_w, weight_w = whole_distributions(*models, chosen)
        kl_l, weight_l = whole_distributions(*models, rejected)
        assert min(kl_w, kl_l) > 0.01, "a KL of 0 would prove nothing"
        by_hand["dpo"].append(softplus(-0.1 * h))
        by_hand["tdpo2"].append(softplus(-0.1 * (h - 0.5 * (kl_l - kl_w))))
        by_hand["wpo"].append(min(weight_w * weight_l, 1) * softplus(-0.01 * h))
    for loss, values in by_hand.items():
        found = first_loss(*flags(lab, tmp_path / loss, loss=loss))
        assert found == pytest.approx(np.mean(values), abs=EXACT), loss


def test_running_means_are_what_the_papers_code_keeps(lab, models, tmp_path):
    """With a policy that stands still: lr 1e-15 moves a log-prob by about 1e-11."""
    for loss in ("beta_dpo", "bco_pair"):
        run(*flags(lab, tmp_path / loss, "--lr", "1e-15", loss=loss, steps=3))
    average, seen = 0.0, []
    for step in range(3):
        ratios = np.array([[log_ratio(*models, row) for row in unit]
                           for unit in batch_of(read_units(lab), step)])
        h = ratios[:, 0] - ratios[:, 1]
        average = 0.9 * average + 0.1 * h.mean()                 # from 0, updated before use
        beta = max(1e-3, 0.1 * (1 + 0.6 * (h.mean() - average)))
        expected = np.log1p(np.exp(-beta * h)).mean()
        assert metrics(tmp_path / "beta_dpo")[step]["loss"] == pytest.approx(expected, abs=1e-9)
        seen += (0.1 * ratios).flatten().tolist()                # BCO: all samples so far
        chosen, rejected = 0.1 * ratios.T - np.mean(seen)
        expected = (np.log1p(np.exp(-chosen)) + np.log1p(np.exp(rejected))).mean()
        assert metrics(tmp_path / "bco_pair")[step]["loss"] == pytest.approx(expected, abs=1e-9)


# --- what must change nothing -------------------------------------------------------------------

def test_the_reference_table_is_the_online_reference(lab, models):
    """Over two epochs with a short last batch; whatever rows were measured together."""
    units = data.mismatched_units(read_units(lab, "rows.jsonl"), seed=3, max_len=64)
    reference = models[1]
    table = score(reference, units)
    in_parts = torch.cat([score(reference, units[:5]), score(reference, units[5:])])
    assert torch.allclose(table, in_parts, rtol=0, atol=EXACT)
    for step in range(8):
        rows = data.batch_rows(len(units), 8, seed=3, step=step)
        batch = [units[i] for i in rows]
        online = Reference(model=reference).logps(rows, batch)
        assert torch.allclose(Reference(table).logps(rows, batch), online, rtol=0, atol=EXACT)


def test_a_shared_prompt_changes_no_step(lab, tmp_path, monkeypatch):
    cases = [("kto",), ("dpo",), ("tdpo2",), ("wpo",), ("slic", "--slic_target", "chosen")]
    for loss, *more in cases:
        run(*flags(lab, tmp_path / loss, *more, loss=loss, steps=4))
    monkeypatch.setattr(model.GPT, "shares_prompts", False)
    for loss, *more in cases:
        plain = tmp_path / f"{loss}-plain"
        run(*flags(lab, plain, *more, loss=loss, steps=4))
        apart = largest_difference(weights(tmp_path / loss), weights(plain))
        assert apart < SUMS, loss
        if loss != "kto":                                        # whose y and y' are passes apart
            assert apart > 0, "nothing was shared"


def test_whole_vocabulary_quantities_do_not_depend_on_chunks(lab, tmp_path, monkeypatch):
    """TDPO, with gradient through its KL: one chunk against chunks of 7 positions."""
    run(*flags(lab, tmp_path / "one", loss="tdpo1"))
    chunks, real = [], model.chunked_log_probs

    def small(hidden, head, vocab_size, targets, extra=None):
        chunks.append(-(-len(targets) // 7))
        return real(hidden, head, vocab_size, targets, extra, chunk_elements=7 * 257)

    monkeypatch.setattr(model, "chunked_log_probs", small)
    run(*flags(lab, tmp_path / "chunks", loss="tdpo1"))
    assert min(chunks) > 1
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "chunks")) < SUMS


# --- a new quantity, a new name -----------------------------------------------------------------

@pytest.fixture
def entropy(monkeypatch):
    """The example of objective.py's docstring, registered for one test."""
    @measured("chosen_entropy", "rejected_entropy", scope="position")
    def position_entropy(logits, targets, ref_logits):
        logps = model.wide_log_softmax(logits)
        return -(logps.exp() * logps).sum(-1)

    yield
    del MEASURED["chosen_entropy"], MEASURED["rejected_entropy"]


def test_a_new_measured_quantity_is_one_entry(lab, models, tmp_path, monkeypatch, entropy):
    """Value and gradient of the first step, by hand: one sequence at a time."""
    def calm_loss(chosen_entropy, rejected_entropy, chosen_logps, *, push=0.5):
        return chosen_entropy - push * rejected_entropy - chosen_logps

    monkeypatch.setitem(recipes.LOSSES, "calm", calm_loss)
    words = flags(lab, tmp_path / "run", "--push", 0.25, "--micro_batch_size", 3, loss="calm")
    run(*words, "--steps", 1)
    policy, total = load(lab, "moved"), 0.0
    for chosen, rejected in batch_of(read_units(lab)):
        p, q = log_softmax(policy, chosen), log_softmax(policy, rejected)
        loss = -(p.exp() * p).sum() + 0.25 * (q.exp() * q).sum() - log_prob(policy, chosen)
        (loss / 8).backward()
        total += float(loss) / 8
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(total, rel=EXACT)
    assert metrics(tmp_path / "run")[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-10)


def test_a_loss_may_name_z0s_rows_and_whole_distributions_both(lab, models, tmp_path, monkeypatch):
    """Here a paired one, whose unit is then (chosen, rejected, y')."""
    def both_loss(chosen_logratios, rejected_logratios, chosen_kl, kl_logratios):
        return chosen_logratios - 2 * rejected_logratios + chosen_kl * kl_logratios.mean()

    monkeypatch.setitem(recipes.LOSSES, "both", both_loss)
    units, values = read_units(lab), []
    partners = data.mismatched_units([unit[:1] for unit in units], seed=3, max_len=64)
    z0 = np.mean([log_ratio(*models, other) for _, other in batch_of(partners)])
    for chosen, rejected in batch_of(units):
        kl, _ = whole_distributions(*models, chosen)
        margin = log_ratio(*models, chosen) - 2 * log_ratio(*models, rejected)
        values.append(margin + kl * z0)
    found = first_loss(*flags(lab, tmp_path / "run", loss="both"))
    assert found == pytest.approx(np.mean(values), rel=EXACT)


def test_a_name_that_nobody_measures_ends_in_one_line_with_the_nearest(monkeypatch):
    def typo_loss(chosen_logratio, *, beta=0.1):
        return beta * chosen_logratio

    monkeypatch.setitem(recipes.LOSSES, "typo", typo_loss)
    with pytest.raises(SystemExit) as stop:
        run("--loss", "typo")
    assert "'chosen_logratio'" in stop.value.code and "\n" not in stop.value.code
    assert "nearest: chosen_logratios" in stop.value.code


def test_only_what_is_named_is_measured(lab, tmp_path, monkeypatch):
    """(reference loaded?, mismatched rows made?): a loss pays for what its signature names."""
    seen = set()
    real_reference, real_units = Run.load_reference, data.mismatched_units
    monkeypatch.setattr(Run, "load_reference",
                        lambda run: seen.add("reference") or real_reference(run))
    monkeypatch.setattr(data, "mismatched_units",
                        lambda *a, **k: seen.add("partners") or real_units(*a, **k))
    monkeypatch.setattr(Run, "finish", lambda run: None)         # which compares both models
    reference, partners = "reference", "partners"
    cases = [
        (["kto"], {reference, partners}), (["kto", "--z0", "zero"], {reference}),
        (["kto", "--z0", 1.5], {reference}), (["kto", "--z0", "on_policy"], {reference}),
        (["kto_uniform"], {partners}), (["apo_zero_unpaired"], {reference}),
        (["bco"], {reference}), (["sft"], set()), (["simpo"], set()), (["orpo"], set()),
        (["cpo"], set()), (["dpo"], {reference}), (["wpo"], {reference}),
        (["tdpo1"], {reference}), (["dpo_reference_free"], set())]
    for k, ((loss, *more), expected) in enumerate(cases):
        seen.clear()
        run(*flags(lab, tmp_path / str(k), *more, loss=loss, steps=1))
        assert seen == expected, (loss, more)


# --- what is known at equal weights -------------------------------------------------------------

def test_the_first_loss_of_every_loss_is_predicted(lab, models):
    """log 2 for DPO, 1/2 for KTO, ...: and always the loss itself, of zeros for log-ratios."""
    closed = {"kto": 0.5, "dpo": math.log(2), "ipo": 25.0, "hinge": 1.0, "bco": math.log(2),
              "bco_pair": 2 * math.log(2), "tdpo2": math.log(2), "apo_zero": 1.0,
              "beta_dpo": math.log(2), "sppo_hard": 2 * 500.0 ** 2}
    reference = models[1]
    for loss, function in recipes.LOSSES.items():
        wants, hyper = objective.signature(function)
        if "target_logps" in wants or MEASURED[wants[0]].scope == "token":
            continue                                             # SLiC needs a third row
        units, trained = read_units(lab), 2
        if not objective.is_paired(wants):
            units, trained = read_units(lab, "rows.jsonl"), 1
            units = data.mismatched_units(units, seed=3, max_len=64)
        whole = Preferences(function, hyper, units, Reference(score(reference, units), reference),
                            batch_size=8, seed=3, trained=trained)
        value, expected, apart = whole.first_look(reference)
        assert apart < EXACT and whole.running == {}, loss
        assert value == pytest.approx(expected, rel=EXACT), loss
        if loss in closed:                                       # whatever the policy has become
            assert expected == pytest.approx(closed[loss], rel=EXACT), loss
            moved, expected, apart = whole.first_look(models[0])
            assert expected == pytest.approx(closed[loss], rel=EXACT), loss
            assert abs(moved - expected) > 1e-3 and apart > 1, loss


# --- metrics ------------------------------------------------------------------------------------

NAMES = {"step", "epoch", "loss", "grad_norm", "lr", "tokens_per_second", "rewards/chosen",
         "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
         "logps/rejected"}


def test_metrics_have_the_contracts_names_and_are_over_the_whole_batch(lab, models, tmp_path):
    """By hand, of a run in micro-batches of 3. Desirable counts as chosen."""
    cases = [("kto", "rows.jsonl", {"z0", "z0_raw"}), ("dpo", "pairs.jsonl", set())]
    for loss, file, more in cases:
        run(*flags(lab, tmp_path / loss, "--micro_batch_size", 3, loss=loss, steps=1))
        line = metrics(tmp_path / loss)[0]
        assert line.keys() == NAMES | more
        ratios, logps, right = {True: [], False: []}, {True: [], False: []}, []
        for unit in batch_of(read_units(lab, file)):
            own = [log_ratio(*models, row) for row in unit]
            for row, ratio in zip(unit, own):
                ratios[row.desirable].append(ratio)
                logps[row.desirable].append(float(log_prob(models[0], row).detach()))
            threshold = own[1] if loss == "dpo" else line["z0"]
            right.append((own[0] > threshold) == unit[0].desirable)
        for name, label in (("chosen", True), ("rejected", False)):
            reward = 0.1 * np.mean(ratios[label])
            assert line[f"rewards/{name}"] == pytest.approx(reward, abs=EXACT)
            assert line[f"logps/{name}"] == pytest.approx(np.mean(logps[label]), rel=EXACT)
        margin = 0.1 * (np.mean(ratios[True]) - np.mean(ratios[False]))
        assert line["rewards/margins"] == pytest.approx(margin, abs=EXACT)
        assert line["rewards/accuracies"] == pytest.approx(np.mean(right), abs=EXACT)


def test_accuracies_count_good_rows_above_z0_and_bad_ones_below():
    thumbs = (True, False, False, False, True)
    units = [(SimpleNamespace(desirable=good, weight=1.0),) for good in thumbs]
    log_ratios = torch.tensor([[3.0], [3.0], [1.0], [1.0], [1.0]])
    part = Part(units, log_ratios, torch.zeros(5, 1), {}, {"kl_logratios": torch.tensor([2.0])})
    sums = metrics_of_a_step.watch(SimpleNamespace(hyper={}), part, torch.zeros(5))
    assert sums["rewards/accuracies"] == 3 and sums["good"] == 2 and sums["bad"] == 3


def test_a_class_that_is_absent_gives_null(lab, tmp_path):
    good = [record for record in read_rows(lab / "rows.jsonl") if record["label"]]
    file = write_rows(tmp_path / "good.jsonl", good)
    run(*flags(lab, tmp_path / "run", "--data", file, steps=2))
    for line in metrics(tmp_path / "run"):
        absent = ("rewards/rejected", "rewards/margins", "logps/rejected")
        assert all(line[name] is None for name in absent)
        numbers = [value for name, value in line.items() if name not in absent]
        assert all(math.isfinite(number) for number in numbers)

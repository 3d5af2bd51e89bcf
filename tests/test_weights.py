"""A file's column `weight` multiplies the loss of its row or pair, and nothing else."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import objective
import recipes
from lab import (flags, log_prob, log_ratio, metrics, read_rows, read_units, run, without_report,
                 write_rows)
from objective import MEASURED, Preferences, Reference, score

EXACT = 1e-12                      # float64 sums of eight terms


def weighted(units, weights):
    return [tuple(replace(row, weight=weight) for row in unit)
            for unit, weight in zip(units, weights)]


def gradient(policy, reference, loss, units, trained):
    """Of the batch of all units.   one long vector"""
    hyper = objective.signature(loss)[1]
    table = score(reference, units)
    whole = Preferences(loss, hyper, units, Reference(table, reference), batch_size=len(units),
                        seed=3, trained=trained)
    batch = next(whole.batches(policy, 0))
    losses = whole.losses(whole.measure(policy, batch, range(len(units))))
    weights = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(losses.sum() / batch.n, weights, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_weight_2_doubles_a_units_gradient_and_weight_0_leaves_it_out_but_counts_it(lab, models):
    """For every loss: the units' shares of the gradient, each found with all other weights 0."""
    for name, loss in recipes.LOSSES.items():
        wants = objective.signature(loss)[0]
        if hasattr(loss, "needs_whole_batch") or "target_logps" in wants \
                or MEASURED[wants[0]].scope == "token":
            continue
        units, trained = read_units(lab)[:4], 2
        if not objective.is_paired(wants):
            units, trained = read_units(lab, "rows.jsonl")[:4], 1
            units = data.mismatched_units(units, seed=3, max_len=64)

        def of(weights):
            return gradient(*models, loss, weighted(units, weights), trained)

        shares = [of(row) for row in np.eye(4).tolist()]
        for weights in ([1, 1, 1, 1], [1, 2, 0, 0.5]):
            expected = sum(weight * share for weight, share in zip(weights, shares))
            scale = float(expected.abs().max()) + 1e-30
            assert float((of(weights) - expected).abs().max()) <= EXACT * scale, name


def test_the_first_losses_are_weighted_sums_over_the_number_of_rows_by_hand(lab, models, tmp_path,
                                                                            monkeypatch):
    """z0, metrics and SFT's divisor know no weights; but one of 0 is in no metric (online ties)."""
    without_report(monkeypatch)
    for loss, file in (("dpo", "pairs.jsonl"), ("kto", "rows.jsonl"), ("sft", "rows.jsonl")):
        rows = read_rows(lab / file)[:8]
        for place, row in enumerate(rows):
            row |= {"weight": (place + 1) / 2, "label": row.get("label", True) or loss == "sft"}
        some = write_rows(tmp_path / f"{loss}.jsonl", rows)
        plain = write_rows(tmp_path / "plain.jsonl", [row | {"weight": None} for row in rows])
        for out, source in (("weighted", some), ("plain", plain)):
            run(*flags(lab, tmp_path / loss / out, "--data", source, loss=loss, steps=1))
        line = metrics(tmp_path / loss / "weighted")[0]
        unweighted = metrics(tmp_path / loss / "plain")[0]
        same = line.keys() - {"loss", "grad_norm", "tokens_per_second"}
        assert {key: line[key] for key in same} == {key: unweighted[key] for key in same}

        total, tokens = 0.0, 0
        for place, unit in enumerate(read_units(tmp_path, f"{loss}.jsonl")):
            tokens += unit[0].length
            if loss == "sft":
                value = -float(log_prob(models[0], unit[0]).detach())
            elif loss == "dpo":
                gap = log_ratio(*models, unit[0]) - log_ratio(*models, unit[1])
                value = math.log1p(math.exp(-0.1 * gap))
            else:
                sign = 1 if unit[0].desirable else -1
                gap = sign * (log_ratio(*models, unit[0]) - line["z0"])
                value = 1 - 1 / (1 + math.exp(-0.1 * gap))
            total += (place + 1) / 2 * value
        n = tokens if loss == "sft" else 8
        assert line["loss"] == pytest.approx(total / n, rel=1e-9)        # float64 forwards, twice


def test_where_no_row_has_a_loss_of_its_own_a_weight_is_refused(lab, tmp_path):
    for loss, file, *more in (("aot", "pairs.jsonl"),
                              ("ppo", "rows.jsonl", "--reward", "judge.py:f")):
        rows = read_rows(lab / file)
        rows[3]["weight"] = 2
        some = write_rows(tmp_path / "f.jsonl", rows)
        with pytest.raises(SystemExit, match=f"line 4: column weight: --loss {loss}"):
            run(*flags(lab, tmp_path / "out", "--data", some, *more, loss=loss))

"""Claims about recipes.py: every method trains, and differs from its curve in what it says."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import model
import recipes
import rollouts
from lab import (batch_of, dies_at, first_loss, flags, largest_difference, log_prob,
                 log_ratio, metrics, read_rows, read_units, run, weights,
                 without_report, write_rows)
from objective import score
from plumbing.tokenizer import load_tokenizer

EXACT = 1e-12                    # float64: the same sums in another order
SUMS = 1e-10                     # weights after a few steps of it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_report(monkeypatch)


def from_reference(lab, out, *more, **how):
    """Flags of a run whose policy starts as its reference."""
    return flags(lab, out, "--init", lab / "ref", *more, **how)


def model_bytes(out):
    return (out / "model" / "model.safetensors").read_bytes()


def softplus(x):
    return math.log1p(math.exp(x))


# --- all of them --------------------------------------------------------------------------------

def test_every_loss_and_recipe_trains_and_predicts_its_first_loss(lab, tmp_path, capsys):
    more = {"sdpo_stepwise": ["--stages", 3], "gspo": ["--clip_low", 0.1, "--clip_high", 0.1]}
    for loss in {**recipes.LOSSES, **recipes.RECIPES, "dpo + 0.1*sft": None, "kto + bco": None}:
        out = tmp_path / loss.replace(" ", "")
        run(*from_reference(lab, out, *more.get(loss, []), loss=loss, steps=2))
        stages = {"spin": 3, "sdpo_stepwise": 3}.get(loss, 1)
        lines = metrics(out)
        assert [line["step"] for line in lines] == list(range(2 * stages)), loss
        for line in lines:
            assert math.isfinite(line["loss"]) and line["grad_norm"] > 0, loss
        assert largest_difference(weights(out), load_file(lab / "ref/model.safetensors")) > 0, loss
        said = capsys.readouterr().out
        apart = loss in ("dpo_reference_free", "rm")             # both have no reference at all
        assert ("policy and reference start apart" in said) == apart, loss
        assert ("| ok" in said) != apart, loss


def test_a_new_loss_is_one_function_and_one_entry(lab, tmp_path, monkeypatch):
    def push_loss(logratios, desirable, *, beta=0.3, slope=2.0):
        """softplus(-slope beta r) for good, softplus(slope beta r) for bad.   (B,)"""
        signed = torch.where(desirable, -logratios, logratios)
        return torch.nn.functional.softplus(slope * beta * signed)

    monkeypatch.setitem(recipes.LOSSES, "push", push_loss)
    run(*flags(lab, tmp_path / "run", "--slope", 1, loss="push", steps=24))
    margins = [line["rewards/margins"] for line in metrics(tmp_path / "run")
               if line["rewards/margins"] is not None]           # null: one class is absent
    assert np.mean(margins[-6:]) > np.mean(margins[:6]) + 0.05
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["slope"], config["beta"]) == (1.0, 0.3)


# --- which tokens -------------------------------------------------------------------------------

def test_ld_dpo_down_weights_the_longer_tail_and_with_alpha_1_is_dpo(lab, models, tmp_path):
    by_hand = []
    for chosen, rejected in batch_of(read_units(lab)):
        ratio = []
        for row, other in ((chosen, rejected), (rejected, chosen)):
            part = data.make_row(row.ids[:row.n_prompt], row.response[:other.length])
            inner = log_ratio(*models, part)
            ratio.append(inner + 0.5 * (log_ratio(*models, row) - inner))
        by_hand.append(softplus(-0.1 * (ratio[0] - ratio[1])))
    found = first_loss(*flags(lab, tmp_path / "half", loss="ld_dpo"))
    assert found == pytest.approx(np.mean(by_hand), abs=EXACT)
    run(*flags(lab, tmp_path / "dpo", loss="dpo"))
    run(*flags(lab, tmp_path / "one", "--ld_alpha", 1, loss="ld_dpo"))
    assert largest_difference(weights(tmp_path / "dpo"), weights(tmp_path / "one")) == 0


def test_segment_sdpo_is_dpo_on_the_agents_turns_of_the_segment_alone(lab, models, tmp_path):
    """History and turn as text, in the plain template; segment 0 or 1 in turns."""
    tokenizer, losses = load_tokenizer(), []
    records = read_rows(lab / "sessions.jsonl")
    for i in data.batch_rows(26, 8, seed=3, step=0):
        margin = 0.0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            first, question, second = [turn["content"] for turn in records[i][side]]
            asked = records[i]["prompt"][0]["content"]
            context = tokenizer.encode(f"User:\n{asked}\n\nAssistant:\n")
            said = first
            if i % 2:                                            # the second exchange is it
                context += tokenizer.encode(first) + [256]
                context += tokenizer.encode(f"\n\nUser:\n{question}\n\nAssistant:\n")
                said = second
            row = data.make_row(context, tokenizer.encode(said) + [256])
            margin += sign * log_ratio(*models, row)
        losses.append(softplus(-0.1 * margin))
    found = first_loss(*flags(lab, tmp_path / "run", loss="sdpo_segment"))
    assert found == pytest.approx(np.mean(losses), abs=SUMS)


def test_bernoulli_ipo_sees_pairs_in_both_orders(lab, models, tmp_path):
    """Else its target were 1 / tau always: (h - 1 / tau)^2, or (-h)^2 of a turned pair."""
    heads = np.random.default_rng([3, 26]).random(26) < 0.5
    losses, right = [], []
    units = read_units(lab)
    for i in data.batch_rows(26, 8, seed=3, step=0):
        h = log_ratio(*models, units[i][0]) - log_ratio(*models, units[i][1])
        losses.append((h - 10 * heads[i]) ** 2)
        right.append(h > 0)
    run(*flags(lab, tmp_path / "run", loss="ipo_bernoulli", steps=1))
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(np.mean(losses), rel=EXACT)
    assert line["rewards/accuracies"] == pytest.approx(np.mean(right))


# --- compared with what -------------------------------------------------------------------------

def test_tr_dpo_with_a_hard_copy_after_every_step_always_starts_at_log_2(lab, tmp_path):
    """And a reference that never moves is DPO's."""
    run(*flags(lab, tmp_path / "hard", "--ref_mix", 1, "--ref_every", 1, loss="tr_dpo"))
    first, *others = [line["loss"] for line in metrics(tmp_path / "hard")]
    assert abs(first - math.log(2)) > 0.01
    assert others == pytest.approx([math.log(2)] * len(others), abs=EXACT)
    run(*flags(lab, tmp_path / "never", "--ref_every", 1000, loss="tr_dpo"))
    run(*flags(lab, tmp_path / "dpo", loss="dpo"))
    assert largest_difference(weights(tmp_path / "never"), weights(tmp_path / "dpo")) < SUMS


def test_every_stage_is_compared_with_the_policy_of_the_stage_before(lab, tmp_path):
    """So its first loss is log 2, although the policy has moved by then."""
    for loss in ("sdpo_stepwise", "spin"):
        out = tmp_path / loss
        run(*from_reference(lab, out, "--stages", 3, loss=loss, steps=3))
        losses = [line["loss"] for line in metrics(out)]
        assert losses[::3] == pytest.approx([math.log(2)] * 3, abs=EXACT), loss
        assert abs(losses[2] - math.log(2)) > 1e-3, loss
        assert (out / "stage-2").is_dir() and not (out / "stage-3").exists()
    run(*from_reference(lab, tmp_path / "one", "--stages", 1, loss="spin", steps=3))
    first = load_file(tmp_path / "spin" / "stage-1" / "model.safetensors")
    assert largest_difference(first, weights(tmp_path / "one")) == 0


# --- sums, and pairs that the policy has written ------------------------------------------------

def test_the_sft_of_a_sum_imitates_the_good_responses_per_token(lab, models, tmp_path):
    """"kto + 0.1*sft", at z0 = 0: 1 - sigma(+-0.1 r), and -log pi / n of the desirable ones."""
    by_hand = []
    for row, in batch_of(read_units(lab, "rows.jsonl")):
        sign = 1 if row.desirable else -1
        kto = 1 - 1 / (1 + math.exp(-sign * 0.1 * log_ratio(*models, row)))
        nll = -float(log_prob(models[0], row).detach()) / row.length
        by_hand.append(kto + 0.1 * nll * row.desirable)
    found = first_loss(*flags(lab, tmp_path / "run", "--z0", "zero", loss="kto + 0.1*sft"))
    assert found == pytest.approx(np.mean(by_hand), abs=EXACT)


def test_mpo_is_the_sum_that_its_entry_writes(lab, tmp_path):
    for loss in ("mpo", "0.8*dpo + 0.2*bco_pair + sft"):
        run(*flags(lab, tmp_path / loss.replace(" ", ""), loss=loss, steps=3))
    one = weights(tmp_path / "mpo")
    assert largest_difference(one, weights(tmp_path / "0.8*dpo+0.2*bco_pair+sft")) == 0


def test_rebel_of_a_file_regresses_on_its_scores_and_xpo_samples_its_third_response(
        lab, models, tmp_path):
    units = read_units(lab)
    thirds = [data.make_row(chosen.ids[:chosen.n_prompt], answer)
              for (chosen, _), answer in zip(units, sampled_by(models[1], units))]
    rebel, xpo = [], []
    for (chosen, rejected), third in batch_of(list(zip(units, thirds))):
        h = log_ratio(*models, chosen) - log_ratio(*models, rejected)
        rebel.append((h / 0.5 - (chosen.score - rejected.score)) ** 2)
        xpo.append(softplus(-0.1 * h) + 0.01 * float(log_prob(models[0], third).detach()))
    found = first_loss(*flags(lab, tmp_path / "rebel", "--eta", 0.5, loss="rebel"))
    assert found == pytest.approx(np.mean(rebel), abs=EXACT)
    found = first_loss(*flags(lab, tmp_path / "xpo", "--alpha", 0.01, loss="xpo"))
    assert found == pytest.approx(np.mean(xpo), abs=EXACT)


# --- who wrote the responses --------------------------------------------------------------------

def sampled_by(policy, units):
    prompts = [unit[0].ids[:unit[0].n_prompt].tolist() for unit in units]
    return policy.generate(prompts, eot=256, max_new_tokens=64, room=64, seed=[3, 7, 0])


def test_spins_rejected_responses_are_its_opponents_own(lab, models, tmp_path):
    """The opponent of a stage is the policy that the stage before has left."""
    out = tmp_path / "run"
    run(*from_reference(lab, out, "--stages", 2, loss="spin", steps=2))
    units, reference = read_units(lab), models[1]
    for stage, folder in ((0, lab / "ref"), (1, out / "stage-1")):
        kept = json.loads((out / f"stage-{stage}-samples.json").read_text())
        assert kept == sampled_by(model.GPT.from_pretrained(folder, dtype=torch.float64), units)
    own = json.loads((out / "stage-0-samples.json").read_text())
    pairs = [(good, data.make_row(good.ids[:good.n_prompt], answer))
             for (good, _), answer in zip(units, own)]
    good, bad = [np.mean([float(log_prob(reference, pair[side]).detach())
                          for pair in batch_of(pairs)]) for side in (0, 1)]
    line = metrics(out)[0]
    assert (line["logps/chosen"], line["logps/rejected"]) == pytest.approx((good, bad), rel=EXACT)


def test_stepwise_chunks_go_from_easy_to_hard_and_share_no_pair(lab, models, tmp_path, monkeypatch):
    chunks, real = [], recipes.preferences
    recipe = recipes.RECIPES["sdpo_stepwise"]

    def objective(run, units, reference):
        chunks.append(units)
        return real(run, units, reference)

    monkeypatch.setitem(recipes.RECIPES, "sdpo_stepwise",
                        replace(recipe, objective=objective))
    run(*from_reference(lab, tmp_path / "run", "--stages", 3, loss="sdpo_stepwise", steps=1))
    margins = [logps[:, 0] - logps[:, 1] for logps in (score(models[1], c) for c in chunks)]
    assert margins[0].min() >= margins[1].max() and margins[1].min() >= margins[2].max()
    assert [len(chunk) for chunk in chunks] == [8, 9, 9]
    assert len({pair[0].where for chunk in chunks for pair in chunk}) == 26


def test_slics_target_is_the_chosen_response_or_the_files_or_a_sample(lab, models, tmp_path,
                                                                      monkeypatch):
    """max(0, delta - lw + ll) - lam log pi(target | x)."""
    def by_hand(targets):
        losses = []
        units = [(*unit, target) for unit, target in zip(read_units(lab), targets)]
        for unit in batch_of(units):
            lw, ll, lt = [float(log_prob(models[0], row).detach()) for row in unit]
            losses.append(max(0.0, 1 - lw + ll) - 0.1 * lt)
        return np.mean(losses)

    records = read_rows(lab / "pairs.jsonl")
    with_target = write_rows(tmp_path / "with_target.jsonl",
                             [record | {"target": record["rejected"]} for record in records])
    sampled = [data.make_row(unit[0].ids[:unit[0].n_prompt], answer) for unit, answer
               in zip(read_units(lab), sampled_by(models[1], read_units(lab)))]
    for source, more, targets in (
            ("chosen", [], [unit[0] for unit in read_units(lab)]),
            ("data", ["--data", with_target], [unit[1] for unit in read_units(lab)]),
            ("sample", [], sampled)):
        out = tmp_path / source
        found = first_loss(*flags(lab, out, "--slic_target", source, *more, loss="slic"))
        assert found == pytest.approx(by_hand(targets), abs=EXACT), source
    with pytest.raises(SystemExit, match="line 1: .*needs the column target"):
        run(*flags(lab, tmp_path / "none", "--slic_target", "data", loss="slic"))
    monkeypatch.setattr(rollouts, "answers", lambda *a, **k: pytest.fail("sampled again"))
    run(*flags(lab, tmp_path / "sample", "--resume", loss="slic", steps=2))
    assert len(metrics(tmp_path / "sample")) == 2


@pytest.mark.slow
def test_an_on_policy_z0_is_the_kl_of_policy_and_reference(lab, models, tmp_path):
    """A mean over many batches, against other samples: within 4 standard errors."""
    run(*flags(lab, tmp_path / "run", "--z0", "on_policy", "--lr", "1e-12", steps=40))
    z0 = np.array([line["z0_raw"] for line in metrics(tmp_path / "run")])
    units = read_units(lab, "rows.jsonl") * 10
    prompts = [unit[0].ids[:unit[0].n_prompt].tolist() for unit in units]
    own = models[0].generate(prompts, eot=256, max_new_tokens=64, room=64, seed=9)
    rows = [(data.make_row(prompt, answer),) for prompt, answer in zip(prompts, own)]
    kl = (score(models[0], rows) - score(models[1], rows)).numpy()
    error = math.hypot(z0.std() / 40 ** 0.5, kl.std() / len(kl) ** 0.5)
    assert abs(z0.mean() - kl.mean()) < 4 * error and kl.mean() > 0.5


# --- resuming what only recipes have ------------------------------------------------------------

def test_stages_and_what_moves_beside_the_policy_resume_with_the_same_bytes(lab, tmp_path):
    """Killed in the first stage, between two, in the second; a running mean, a reference."""
    cases = [("spin", 3, ["--stages", 2]), ("sdpo_stepwise", 4, ["--stages", 2]),
             ("spin", 2, ["--stages", 2]), ("tr_dpo", 5, ["--ref_every", 2]),
             ("beta_dpo", 3, []), ("bco", 5, [])]
    for k, (loss, step, more) in enumerate(cases):
        words = [*more, "--save_every", 2]
        steps = 3 if "--stages" in more else 6
        whole, parts = tmp_path / f"{k}-whole", tmp_path / f"{k}-parts"
        run(*flags(lab, whole, *words, loss=loss, steps=steps))
        with dies_at(step):
            run(*flags(lab, parts, *words, loss=loss, steps=steps))
        run(*flags(lab, parts, *words, "--resume", loss=loss, steps=steps))
        assert model_bytes(whole) == model_bytes(parts), (loss, step)
        assert [line["step"] for line in metrics(parts)] == list(range(6)), (loss, step)


# --- sums, and names ----------------------------------------------------------------------------

def test_a_sum_is_the_sum_and_a_flag_sets_all_terms_that_have_it(lab, tmp_path):
    """Without the flag each keeps its own beta: 0.1 and 2.0."""
    for name, more in (("same", ["--beta", 0.3]), ("own", [])):
        total, dpo, simpo = [
            first_loss(*flags(lab, tmp_path / name / str(k), *more, loss=loss))
            for k, loss in enumerate(("dpo + 0.25*simpo", "dpo", "simpo"))]
        assert total == pytest.approx(dpo + 0.25 * simpo, abs=EXACT)


def test_alone_sft_is_a_mean_over_tokens_and_in_a_sum_over_examples(lab, models, tmp_path):
    def nll(rows):
        return np.array([-float(log_prob(models[0], row).detach()) for row in rows])

    chosen = [unit[0] for unit in batch_of(read_units(lab))]
    with_it = first_loss(*flags(lab, tmp_path / "sum", loss="dpo + 0.5*sft"))
    without = first_loss(*flags(lab, tmp_path / "dpo", loss="dpo"))
    per_example = np.mean(nll(chosen) / [row.length for row in chosen])
    assert with_it - without == pytest.approx(0.5 * per_example, abs=EXACT)
    good = [unit for unit in read_units(lab, "rows.jsonl") if unit[0].desirable]
    rows = [row for row, in batch_of(good)]
    found = first_loss(*flags(lab, tmp_path / "sft", loss="sft"))
    per_token = nll(rows).sum() / sum(row.length for row in rows)
    assert found == pytest.approx(per_token, abs=EXACT)


def test_rows_that_a_loss_cannot_use_end_in_one_line_that_names_them(lab, tmp_path):
    records = read_rows(lab / "pairs.jsonl")
    cases = [("odpo", {"score_chosen": None}, "score_chosen"),
             ("odpo", {"score_chosen": 1.0}, "score_chosen > score_rejected"),
             ("sppo", {"win_prob_rejected": None}, "win_prob_rejected"),
             ("dpo", {"rejected": None}, "line 1")]
    for loss, change, named in cases:
        file = write_rows(tmp_path / "pairs.jsonl", [records[0] | change, *records[1:]])
        with pytest.raises(SystemExit) as stop:
            run(*flags(lab, tmp_path / "run", "--data", file, loss=loss))
        assert re.search(r"pairs\.jsonl.* line 1\b", stop.value.code), stop.value.code
        assert named in stop.value.code and "\n" not in stop.value.code
        assert not (tmp_path / "run").exists(), "a bad file is found before anything is written"

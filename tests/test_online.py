"""Claims about --online: who writes, what a group of judged responses becomes, what a tie weighs.

That no split over processes and micro-batches matters is tested in test_split.py; the curves of
PPO's kin are in test_ppo.py.
"""

import math

import numpy as np
import pytest
import torch

import data
import recipes
import rollouts
from lab import (batch_of, dies_at, flags, load, log_ratio, log_softmax, metrics, read_units, run,
                 without_report)
from plumbing.tokenizer import load_tokenizer

F64 = torch.float64
EXACT = 1e-10                    # float64: the same sums in another order
BYTES = load_tokenizer()
HIGH = 0.9                       # of humanline's clamp: some tokens of the lab are beyond it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_report(monkeypatch)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=F64)


def rows(n):
    return [data.make_row([1, 2], [3 + i, 9]) for i in range(n)]


def sigma(x):
    return 1 / (1 + math.exp(-x))


# --- a group becomes preferences ------------------------------------------------------------------

def test_a_pair_is_the_best_and_the_worst_with_their_scores_and_chances():
    (chosen, rejected), = rollouts.pairs(rows(3), tensor(2.0, 0.5, 3.0))
    assert (chosen.response[0], rejected.response[0]) == (5, 4)
    assert (chosen.desirable, rejected.desirable, chosen.weight) == (True, False, 1.0)
    assert (chosen.score, rejected.score) == (3.0, 0.5)
    assert chosen.win_prob == pytest.approx((sigma(1.0) + sigma(2.5)) / 2)
    assert rejected.win_prob == pytest.approx((sigma(-1.5) + sigma(-2.5)) / 2)


def test_thumbs_go_up_above_the_mean_of_the_group():
    found = [unit[0] for unit in rollouts.thumbs(rows(4), tensor(1.0, 2.0, 4.0, 1.0))]
    assert [row.desirable for row in found] == [False, False, True, False]
    assert [row.weight for row in found] == [1.0] * 4


def test_equal_rewards_weigh_nothing():
    for made in (rollouts.pairs, rollouts.thumbs):
        for unit in made(rows(3), tensor(0.1, 0.1, 0.1)):        # the mean of three is not 0.1
            assert unit[0].weight == 0.0


# --- a step, by hand ------------------------------------------------------------------------------

def smooth(text):
    """What lab/judge.py says."""
    return text.count("e") - 0.02 * len(text)


def coarse(text):
    """Many ties."""
    return float("e" in text)


def written(lab, policy, file, reward=smooth, group=3):
    """The first step's responses, group by group, and their rewards, without the code of a run."""
    labelled = [row for unit in read_units(lab, file) for row in unit]
    prompts = []                                         # each once; those with a thumb up first
    for row in sorted(labelled, key=lambda row: not row.desirable):
        if row.prompt.tolist() not in prompts:
            prompts.append(row.prompt.tolist())
    order = data.batch_rows(len(prompts), min(8, len(prompts)), seed=3, step=0)
    asked = [prompts[i] for i in order for _ in range(group)]
    said = policy.generate(asked, eot=256, max_new_tokens=64, room=64, seed=[3, 0])
    rewards = [reward(BYTES.text(response)) for response in said]
    found = [data.make_row(prompt, response) for prompt, response in zip(asked, said)]
    groups = range(0, len(found), group)
    return [found[i:i + group] for i in groups], [rewards[i:i + group] for i in groups]


def test_online_dpo_is_dpo_on_the_best_and_the_worst_of_each_group(lab, models, tmp_path):
    groups, rewards = written(lab, models[0], "pairs.jsonl", coarse)
    losses, right, ties = [], [], 0
    for group, of_group in zip(groups, rewards):
        best, worst = (group[of_group.index(f(of_group))] for f in (max, min))
        ties += max(of_group) == min(of_group)
        if max(of_group) > min(of_group):
            margin = log_ratio(*models, best) - log_ratio(*models, worst)
            losses.append(math.log1p(math.exp(-0.1 * margin)))
            right.append(margin > 0)
    out = tmp_path / "run"
    judge = tmp_path / "coarse.py"
    judge.write_text("def e(prompts, responses): return [float('e' in r) for r in responses]")
    run(*flags(lab, out, "--online", "--reward", f"{judge}:e", loss="dpo", steps=1))
    line = metrics(out)[0]
    assert ties > 0 and len(losses) > 0                  # a tie is in the mean, with loss 0
    assert line["loss"] == pytest.approx(sum(losses) / len(groups), abs=EXACT)
    assert line["rewards/accuracies"] == pytest.approx(np.mean(right), abs=EXACT)
    assert line["reward"] == pytest.approx(np.mean(rewards), abs=EXACT)
    assert line["ties"] == ties


def test_online_ktos_z0_is_the_mean_log_ratio_of_its_own_responses(lab, models, tmp_path):
    """They are samples of pi, so it is an unbiased estimate of KL(pi || ref): the paper's z0."""
    groups, rewards = written(lab, models[0], "rows.jsonl")
    ratios = [[log_ratio(*models, row) for row in group] for group in groups]
    z0 = max(0.0, np.mean(ratios))
    losses = []
    for of_group, said in zip(rewards, ratios):
        for reward, ratio in zip(of_group, said):
            sign = 1 if reward > np.mean(of_group) else -1
            losses.append((max(of_group) > min(of_group)) * (1 - sigma(0.1 * sign * (ratio - z0))))
    out = tmp_path / "run"
    run(*flags(lab, out, "--online", steps=1))
    line = metrics(out)[0]
    assert line["z0"] == pytest.approx(z0, abs=EXACT) and z0 > 0.1
    assert line["loss"] == pytest.approx(np.mean(losses), abs=EXACT)


GIVEN = """
def reward(prompts, responses):          # every second group of three is a tie
    return [0.0 if (i // 3) % 2 else float(len(text)) for i, text in enumerate(responses)]
def none(prompts, responses):
    return [7.0] * len(responses)
"""


def test_ties_are_counted_and_are_neither_right_nor_wrong(lab, tmp_path):
    (tmp_path / "given.py").write_text(GIVEN)
    for loss in ("dpo", "odpo", "sppo", "kto", "dr_grpo"):
        out = tmp_path / loss
        run(*flags(lab, out, "--online", "--reward", f"{tmp_path / 'given.py'}:reward", loss=loss,
                   steps=2))
        assert metrics(out)[0]["ties"] >= 3 and math.isfinite(metrics(out)[1]["loss"])
        out = tmp_path / f"{loss}-none"
        run(*flags(lab, out, "--online", "--reward", f"{tmp_path / 'given.py'}:none", loss=loss,
                   steps=1))
        line = metrics(out)[0]
        assert line["ties"] in (6, 7) and line["loss"] == 0 and line["grad_norm"] == 0
        assert line.get("rewards/accuracies") is None


def test_what_a_loss_may_name_online_is_measured(lab, tmp_path, monkeypatch):
    """At the first pass the policy that wrote IS the policy; at the second it has moved."""
    seen = []

    def moved_loss(chosen_logps, rejected_logps, old_chosen_logps, old_rejected_logps, score_gap,
                   target_logps):
        seen.append((chosen_logps - old_chosen_logps).detach().abs().max())
        assert (score_gap > 0).all() and target_logps.shape == chosen_logps.shape
        return rejected_logps - chosen_logps + old_chosen_logps - old_rejected_logps
    monkeypatch.setitem(recipes.LOSSES, "moved", moved_loss)
    run(*flags(lab, tmp_path / "run", "--online", "--ppo_epochs", 2, loss="moved", steps=1))
    assert seen[-2] < 1e-10 and seen[-1] > 1e-6


def test_a_resumed_run_ends_in_the_same_bytes(lab, tmp_path):
    cases = {"grpo": [], "dpo": ["--online"], "kto": ["--online"], "humanline_kto": [],
             "humanline_dpo": ["--ref_every", 2]}
    for loss, more in cases.items():
        whole, broken = tmp_path / f"{loss}-whole", tmp_path / f"{loss}-broken"
        run(*flags(lab, whole, *more, loss=loss, steps=4))
        with dies_at(3):
            run(*flags(lab, broken, *more, "--save_every", 2, loss=loss, steps=4))
        run(*flags(lab, broken, *more, "--save_every", 2, "--resume", loss=loss, steps=4))
        saved = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, broken)]
        assert saved[0] == saved[1], loss


# --- humanline ------------------------------------------------------------------------------------

def clamped_ratio(policy, reference, row, low=-0.3, high=HIGH):
    """sum_t clamp(log pi(y_t) - log ref(y_t)), a token at a time."""
    said = row.ids[np.flatnonzero(row.mask)]
    with torch.no_grad():
        ratios = log_softmax(policy, row) - log_softmax(reference, row)
    ratios = ratios[range(len(said)), said].tolist()
    return sum(min(max(ratio, low), high) for ratio in ratios)


def humanline_dpo(policy, reference, units, **bounds):
    margins = [clamped_ratio(policy, reference, chosen, **bounds)
               - clamped_ratio(policy, reference, rejected, **bounds) for chosen, rejected in units]
    return np.mean([math.log1p(math.exp(-0.1 * margin)) for margin in margins])


def test_humanline_clamps_token_by_token_and_its_reference_lags_one_update(lab, models, tmp_path):
    policy, reference = models
    units = read_units(lab)
    tight = ["--log_eps_p", -0.3, "--log_eps_r", HIGH]
    run(*flags(lab, tmp_path / "two", *tight, loss="humanline_dpo", steps=2))
    run(*flags(lab, tmp_path / "one", *tight, loss="humanline_dpo", steps=1))
    first, second = [line["loss"] for line in metrics(tmp_path / "two")]
    wanted = humanline_dpo(policy, reference, batch_of(units, 0))
    assert first == pytest.approx(wanted, abs=EXACT)
    free = humanline_dpo(policy, reference, batch_of(units, 0), low=-1000, high=1000)
    assert abs(wanted - free) > 1e-3                     # it bites
    after = load(tmp_path / "one", "model")              # the policy now; the reference is `moved`
    wanted = humanline_dpo(after, policy, batch_of(units, 1))
    assert second == pytest.approx(wanted, abs=EXACT)
    assert abs(wanted - math.log(2)) > 1e-6              # without the lag all log-ratios were 0


def test_with_wide_bounds_and_a_reference_that_stays_humanline_is_its_loss(lab, tmp_path):
    wide = ["--log_eps_p", -1000, "--log_eps_r", 1000, "--ref_every", 100]
    for loss in ("kto", "dpo"):
        run(*flags(lab, tmp_path / loss, loss=loss, steps=3))
        run(*flags(lab, tmp_path / f"h{loss}", *wide, loss=f"humanline_{loss}", steps=3))
        lines, others = metrics(tmp_path / loss), metrics(tmp_path / f"h{loss}")
        for line, other in zip(lines, others):
            assert other["loss"] == pytest.approx(line["loss"], abs=EXACT)
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], abs=EXACT)


# --- the command line -----------------------------------------------------------------------------

def test_what_cannot_be_online_is_said_in_one_line(lab, tmp_path):
    cases = [("spin", ["--online"], "--online: not with --loss spin"),
             ("sft", ["--online"], "--online: not with --loss sft"),
             ("aot", ["--online"], "--online: not with --loss aot"),
             ("dpo", ["--online", "--group", 1], "--group 1"),
             ("kto", ["--online", "--lambda_d", "auto"], "--lambda_d auto"),
             ("dpo", ["--online", "--reward", ""], "--reward"),
             ("rloo", ["--ppo_epochs", 2], "--ppo_epochs: "),
             ("dpo", ["--group", 2], "--group")]
    for loss, more, said in cases:
        with pytest.raises(SystemExit, match=said) as stopped:
            run(*flags(lab, tmp_path / "run", *more, loss=loss))
        assert "\n" not in stopped.value.code


def test_prompts_alone_are_enough_for_what_writes_its_own_responses(lab, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for loss, more in (("ppo", []), ("grpo", []), ("dpo", ["--online"])):
        run(*flags(lab, tmp_path / loss, *more, "--data", file, loss=loss, steps=1))
        assert metrics(tmp_path / loss)[0]["epoch"] == 1.0


def test_help_prints_the_equation_and_the_settings(capsys):
    for loss, said in (("grpo", "kl_coef k3] / length"), ("gspo", "clip_low"), ("rloo", "--group"),
                       ("humanline_dpo", "--log_eps_p")):
        with pytest.raises(SystemExit):
            run("--loss", loss, "--help")
        assert said in capsys.readouterr().out

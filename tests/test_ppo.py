"""Claims about ppo.py: pure functions against literal float64 sums, gradients against enumeration, and a run against the exact frontier."""
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate
import model
import ppo
import train
import world
from test_train import flags, lab, largest_difference, metrics, pair_flags, pairs, run, tiny_llama, torchrun, weights            # noqa: F401


F64 = torch.float64
HOLES = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0],                            # full, cut at the right, at both ends,
                      [1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])                           # gaps, one token, none


def noise(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * scale


def spoilt(x, mask, what=math.nan):
    """x with garbage wherever the mask is 0: nothing may depend on it."""
    return torch.where(mask > 0, x, what)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- the pure half ----------------------------------------------------------------------------------------------------

def test_the_pure_half_needs_torch_and_nothing_else():
    source = Path(ppo.__file__).read_text()
    pure = source[:source.index("# ====")]
    names = {}
    exec(compile(pure, "pure half", "exec"), names)
    imported = {n for n, v in names.items() if type(v) is type(math)}
    assert imported == {"math", "torch", "F"}
    close(names["whiten"](torch.tensor([1.0, 3.0]), torch.ones(2)), torch.tensor([-1.0, 1.0]) / 2 ** 0.5, 1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_the_double_sum_over_future_surprises(gamma, lam):
    rewards, values, mask = noise(6, 5), noise(6, 5, seed=1), HOLES
    r, v = (rewards * mask).tolist(), [row + [0.0] for row in (values * mask).tolist()]
    wanted = [[m * sum((gamma * lam) ** l * (r[b][t + l] + gamma * v[b][t + l + 1] - v[b][t + l]) for l in range(5 - t))
               for t, m in enumerate(row)] for b, row in enumerate(mask.tolist())]
    advantages, returns = ppo.gae(spoilt(rewards, mask), spoilt(values, mask, math.inf), mask, gamma=gamma, lam=lam)
    close(advantages, torch.tensor(wanted, dtype=F64))
    close(returns, (torch.tensor(wanted, dtype=F64) + values) * mask)
    assert advantages.dtype == F64 and not advantages.requires_grad


def test_gae_with_lam_1_returns_the_rewards_to_come_whatever_the_critic_says():
    rewards, mask = noise(1, 5), torch.ones(1, 5)
    _, returns = ppo.gae(rewards, noise(1, 5, seed=3), mask, lam=1.0)
    close(returns, rewards.flip(1).cumsum(1).flip(1))


def test_gae_of_a_padded_batch_is_that_of_each_row_alone():
    rewards, values, mask = noise(2, 5), noise(2, 5, seed=1), HOLES[:2]
    together = ppo.gae(rewards, values, mask)
    alone = ppo.gae(rewards[1:, :3], values[1:, :3], mask[1:, :3])
    for a, b in zip(together, alone):
        close(a[1:, :3], b)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_whitened_numbers_have_mean_0_and_unbiased_variance_1(n):
    x, mask = noise(3, 5), torch.zeros(3, 5)
    mask.view(-1)[torch.randperm(15, generator=torch.Generator().manual_seed(n))[:n]] = 1
    white, picked = ppo.whiten(spoilt(x, mask), mask), x[mask > 0]
    mean = picked.sum() / n
    variance = sum((v - mean) ** 2 for v in picked) / (n - 1)
    close(white[mask > 0], (picked - mean) / (variance + 1e-8) ** 0.5)
    assert (white[mask == 0] == 0).all() and white.dtype == F64
    close(white[mask > 0].var(), torch.tensor(1.0, dtype=F64), 1e-7)                                   # 1e-8 in the denominator


def test_one_number_or_none_whitens_to_0():
    assert ppo.whiten(torch.tensor([[5.0, 3.0]]), torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]
    assert ppo.whiten(torch.tensor([[5.0, 3.0]]), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def scalar_ppo(lp, old, a, clip):
    """(loss, its slope in lp) of one token, from the paper's Eq. 7 and its sign turned."""
    ratio = math.exp(lp - old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    stuck = (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
    return -min(ratio * a, clipped * a), 0.0 if stuck else -a * ratio


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_ppo_loss_is_minus_the_clipped_objective_around_both_edges(clip):
    edges = [math.log(e) + d for e in (1 - clip, 1.0, 1 + clip) for d in (-0.3, -1e-6, 1e-6, 0.3)]
    cases = [(x, a) for x in edges for a in (-2.0, -0.1, 0.0, 0.1, 2.0)]
    lp = torch.tensor([[x - 1.5 for x, _ in cases]], dtype=F64, requires_grad=True)
    old, a = torch.full_like(lp, -1.5), torch.tensor([[a for _, a in cases]], dtype=F64)
    loss = ppo.ppo_loss(lp, old, a, torch.ones(1, len(cases)), clip=clip)
    wanted = [scalar_ppo(float(x), -1.5, a, clip) for x, (_, a) in zip(lp[0].detach(), cases)]
    close(loss, torch.tensor(sum(v for v, _ in wanted) / len(cases), dtype=F64))
    loss.backward()
    close(lp.grad[0] * len(cases), torch.tensor([g for _, g in wanted], dtype=F64))
    assert loss.dtype == F64 and loss.shape == ()


def test_a_good_token_is_made_likelier_by_descent():
    lp = torch.tensor([[-1.0, -1.0]], dtype=F64, requires_grad=True)
    ppo.ppo_loss(lp, lp.detach(), torch.tensor([[1.0, -1.0]], dtype=F64), torch.ones(1, 2)).backward()
    assert lp.grad[0, 0] < 0 < lp.grad[0, 1]


def test_means_are_over_tokens_and_what_is_masked_has_no_influence_nor_gradient():
    mask = HOLES
    names = dict(token_logps=noise(6, 5, scale=0.3), old_token_logps=noise(6, 5, seed=1, scale=0.3), advantages=noise(6, 5, seed=2))
    lp = spoilt(names["token_logps"], mask).requires_grad_()
    loss = ppo.ppo_loss(lp, spoilt(names["old_token_logps"], mask, -math.inf), spoilt(names["advantages"], mask), mask)
    one_by_one = [scalar_ppo(*(float(names[k][i]) for k in names), 0.2)[0] for i in zip(*np.nonzero(mask.numpy()))]
    close(loss, torch.tensor(np.mean(one_by_one)))
    loss.backward()
    assert lp.grad.isfinite().all() and (lp.grad[mask == 0] == 0).all()
    flat = mask > 0
    close(ppo.ppo_loss(*(x[flat] for x in names.values()), torch.ones(int(flat.sum()))), loss.detach())       # a flat row will do


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("d", [21.0, 100.0, 1000.0, -100.0, -1000.0])
@pytest.mark.parametrize("a", [3.0, -3.0, 0.0])
def test_a_ratio_that_overflows_gives_no_nan_and_no_infinity(dtype, d, a):
    lp = torch.tensor([[d, 0.0]], dtype=dtype, requires_grad=True)
    loss = ppo.ppo_loss(lp, torch.zeros(1, 2, dtype=dtype), torch.tensor([[a, 1.0]], dtype=dtype), torch.ones(1, 2))
    gradient, = torch.autograd.grad(loss, lp)
    assert loss.isfinite() and gradient.isfinite().all() and loss.dtype == dtype
    ratio = math.exp(min(d, ppo.MAX_LOG_RATIO))
    close(loss.double(), torch.tensor((max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)) - 1) / 2, dtype=F64), 1e-7 * abs(float(loss.detach())) + 1e-12)


@pytest.mark.parametrize("eps", [0.2, math.inf])
def test_value_loss_is_the_larger_of_the_plain_and_the_clipped_error(eps):
    v, old, g = noise(6, 5, scale=0.5), noise(6, 5, seed=1, scale=0.5), noise(6, 5, seed=2)
    wanted = [0.5 * max((a - c) ** 2, (b + min(max(a - b, -eps), eps) - c) ** 2) for a, b, c in
              ((float(v[i]), float(old[i]), float(g[i])) for i in zip(*np.nonzero(HOLES.numpy())))]
    x = spoilt(v, HOLES).requires_grad_()
    loss = ppo.value_loss(x, spoilt(old, HOLES), spoilt(g, HOLES, math.inf), HOLES, clip_value=eps)
    close(loss, torch.tensor(np.mean(wanted)))
    loss.backward()
    assert x.grad.isfinite().all()
    if eps == math.inf:
        close(x.grad, torch.where(HOLES > 0, v - g, 0.0) / int(HOLES.sum()))


def test_an_empty_mask_gives_losses_of_0_with_gradients_of_0():
    x, none = noise(2, 3).requires_grad_(), torch.zeros(2, 3)
    for loss in (ppo.ppo_loss(x, noise(2, 3), noise(2, 3), none), ppo.value_loss(x, noise(2, 3), noise(2, 3), none)):
        assert float(loss.detach()) == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_the_score_goes_to_the_last_token_and_the_penalty_to_all():
    scores, lp, ref = noise(6), noise(6, 5, seed=1), noise(6, 5, seed=2)
    rewards = ppo.token_rewards(scores.float(), spoilt(lp, HOLES), spoilt(ref, HOLES, -math.inf), HOLES, kl_coef=0.3)
    wanted = torch.zeros(6, 5, dtype=F64)
    for b, row in enumerate(HOLES.tolist()):
        on = [t for t, m in enumerate(row) if m]
        for t in on:
            wanted[b, t] = -0.3 * (lp[b, t] - ref[b, t]) + (scores[b].float() if t == on[-1] else 0)
    close(rewards, wanted)
    assert rewards.dtype == F64


def test_k1_and_k3_have_the_exact_kl_as_their_mean_and_k3_is_never_negative():
    pi, ref = (noise(7, seed=s).log_softmax(0) for s in (0, 1))
    k1, k2, k3 = ppo.kl_estimates(pi, ref)
    exact = (pi.exp() * (pi - ref)).sum()
    close((pi.exp() * k1).sum(), exact)                              # the mean over y ~ pi, by enumeration: unbiased
    close((pi.exp() * k3).sum(), exact)
    assert (k3 >= 0).all() and (k1 < 0).any() and (k2 >= 0).all()
    assert abs((pi.exp() * k2).sum() - exact) > 1e-3                 # biased
    draws = torch.multinomial(pi.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for k in (k1, k3):
        close(k[draws].mean(), exact, 5 * float(k[draws].std()) / 200_000 ** 0.5)                      # five standard errors
    close(ppo.kl_estimates(pi, pi - 1e-9)[2] / 5e-19, torch.ones(7, dtype=F64), 1e-6)                  # digits survive near 0: d^2 / 2


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_kl_estimates_of_absurd_log_ratios_leave_no_nan_behind(dtype):
    lp = torch.tensor([1000.0, -1000.0, 0.0], dtype=dtype, requires_grad=True)
    for k in ppo.kl_estimates(lp, torch.zeros(3, dtype=dtype)):
        assert not k.isnan().any() and k.isfinite().all()
        assert torch.autograd.grad((k * torch.tensor([0.0, 0.0, 1.0], dtype=dtype)).sum(), lp, retain_graph=True)[0].isfinite().all()


def test_reward_model_loss_is_bradley_terry_and_survives_large_gaps():
    w, l = torch.tensor([0.0, 2.0, -800.0], dtype=F64, requires_grad=True), torch.tensor([0.0, 0.5, 0.0], dtype=F64)
    loss = ppo.reward_model_loss(w, l)
    close(loss, torch.tensor([math.log(2), math.log1p(math.exp(-1.5)), 800.0], dtype=F64))
    close(torch.autograd.grad(loss.sum(), w)[0], torch.tensor([-0.5, -1 / (1 + math.exp(1.5)), -1.0], dtype=F64))
    close(ppo.reward_model_loss(w, l, centre=0.1) - loss, torch.tensor([0.0, 0.625, 64000.0], dtype=F64), 1e-10)


def test_offline_ppo_moves_good_responses_up_bad_ones_down_and_stops_at_its_clip():
    r = torch.tensor([0.0, 0.0, 0.8, -0.8, 50.0, -50.0], dtype=F64, requires_grad=True)
    up = torch.tensor([True, False, True, False, False, True])
    loss = ppo.offline_ppo_loss(r, up, clip=0.5, kl_coef=0.0)
    close(loss[:4], torch.tensor([-1.0, 1.0, -2.0, 0.5], dtype=F64))                                   # ratio in [1/2, 2]
    gradient, = torch.autograd.grad(loss.sum(), r)
    close(gradient[:4], torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=F64))
    assert loss.isfinite().all() and gradient.isfinite().all()
    close(ppo.offline_ppo_loss(r, up, clip=0.5) - loss, -0.1 * r.detach(), 1e-6)


# --- exact policy gradient: a policy over 3 tokens, 2 of them in a row, that can be enumerated ------------------------

class Tabular:
    """pi(y_1), pi(y_2|y_1) from two tables of logits; 9 responses with a reward each."""

    def __init__(self):
        self.first, self.second = noise(3, seed=5).requires_grad_(), noise(3, 3, seed=6).requires_grad_()
        self.scores, self.y = noise(9, seed=7), torch.cartesian_prod(torch.arange(3), torch.arange(3))
        self.ref = self.token_logps(noise(3, seed=8), noise(3, 3, seed=9))

    def token_logps(self, first, second):
        a, b = self.y.T
        return torch.stack([first.log_softmax(0)[a], second.log_softmax(1)[a, b]], 1)                  # (9, 2)

    def now(self):
        return self.token_logps(self.first, self.second)

    def gradient(self, objective):
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, [self.first, self.second])])


def analytic(table, kl_coef):
    """grad of E_pi[score] - kl_coef KL(pi || ref), by enumeration: no samples, no advantages, no trick."""
    logp = table.now().sum(1)
    return table.gradient((logp.exp() * (table.scores - kl_coef * (logp - table.ref.sum(1)))).sum())


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
@pytest.mark.parametrize("critic", [0.0, 1.0])
def test_the_expected_first_update_is_the_policy_gradient_of_reward_minus_kl(kl_coef, critic):
    """Weights in place of samples: the mask of response y is pi(y), so that the token mean IS the expectation over pi, halved (2 tokens)."""
    t = Tabular()
    old = t.now().detach()
    values = critic * torch.stack([torch.full((9,), 0.7, dtype=F64), t.y[:, 0].double()], 1)           # any function of the state
    rewards = ppo.token_rewards(t.scores, old, t.ref, torch.ones(9, 2), kl_coef=kl_coef)
    advantages, _ = ppo.gae(rewards, values, torch.ones(9, 2), lam=1.0)
    probability = old.sum(1).exp()[:, None].expand(9, 2)
    loss = ppo.ppo_loss(t.now(), old, advantages, probability)
    close(-2 * t.gradient(loss), analytic(t, kl_coef))
    shifted = ppo.ppo_loss(t.now(), old, advantages * 3 - 2, probability)                              # what whitening does
    close(-2 / 3 * t.gradient(shifted), analytic(t, kl_coef))


def test_sampled_updates_have_the_analytic_gradient_within_monte_carlo_error():
    t, batches, size = Tabular(), 200, 500
    old, estimates, generator = t.now().detach(), [], torch.Generator().manual_seed(0)
    for _ in range(batches):
        y = torch.multinomial(old.sum(1).exp(), size, replacement=True, generator=generator)
        rewards = ppo.token_rewards(t.scores[y], old[y], t.ref[y], torch.ones(size, 2), kl_coef=0.5)
        advantages, _ = ppo.gae(rewards, torch.zeros(size, 2, dtype=F64), torch.ones(size, 2), lam=1.0)
        estimates.append(-2 * t.gradient(ppo.ppo_loss(t.now()[y], old[y], advantages, torch.ones(size, 2))))
    estimates = torch.stack(estimates)
    error, standard = estimates.mean(0) - analytic(t, 0.5), estimates.std(0) / batches ** 0.5
    assert (error.abs() <= 4 * standard).all()                       # 12 numbers within 4 standard errors of about 0.004
    assert float(standard.max()) < 0.006


def test_repeated_updates_end_at_the_closed_form_optimum():
    """pi = ref e^(score / kl_coef) / Z: gradient ascent on exact advantages through ppo_loss finds RLHF's optimum."""
    t, kl_coef = Tabular(), 0.5
    optimizer = torch.optim.Adam([t.first, t.second], lr=0.05)
    for _ in range(2500):
        old = t.now().detach()
        rewards = ppo.token_rewards(t.scores, old, t.ref, torch.ones(9, 2), kl_coef=kl_coef)
        advantages, _ = ppo.gae(rewards, torch.zeros(9, 2, dtype=F64), torch.ones(9, 2), lam=1.0)
        loss = ppo.ppo_loss(t.now(), old, advantages, old.sum(1).exp()[:, None].expand(9, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = (t.ref.sum(1) + t.scores / kl_coef).softmax(0)
    close(t.now().sum(1).exp().detach(), wanted, 1e-6)


# --- the acting half: rollouts, splits, reward models, rewards --------------------------------------------------------

TOY = dict(vocab_size=257, context=24, n_layer=2, n_head=2, d_model=16)


def toy(seed=0, dtype=F64, scale=0.3):
    """A small GPT over bytes whose every parameter matters."""
    torch.manual_seed(seed)
    net = model.GPT(model.GPTConfig(**TOY)).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * scale + ("ln_" in name and name.endswith("weight")))
    return net.to(dtype)


def toy_critic(kind=None, seed=5, dtype=F64):
    scorer = (kind or ppo.Critic)(toy(seed, dtype))
    with torch.no_grad():
        scorer.score.weight.copy_(noise(1, TOY["d_model"], seed=seed))
    return scorer


BYTES = data.load_tokenizer()
PROMPTS = [BYTES.encode(p) for p in ("ab", "c", "hello", "ab", "xyz", "q?")]


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r) - 0.1 * len(r) + len(p) for p, r in zip(prompts, responses)]


def toy_rollouts(policy=None, reward=vowels, dtype=F64, **how):
    policy = policy or toy(dtype=dtype)
    how = {"max_len": 12, "seed": [0, 3], "kl_coef": 0.3, "lam": 0.9, **how}
    return ppo.rollouts(policy, toy_critic(dtype=dtype), toy(1, dtype), PROMPTS, reward, BYTES, **how)


def test_rollouts_measure_what_separate_forwards_measure():
    policy, critic, reference, e = toy(), toy_critic(), toy(1), toy_rollouts()
    assert [r.ids[:r.n_prompt].tolist() for r in e.rows] == PROMPTS
    for i, row in enumerate(e.rows):
        ids, n, T = torch.tensor(row.ids.astype(np.int64)), row.n_prompt, len(row.response)
        assert int(e.mask[i].sum()) == T and e.mask[i, :T].all()
        for m, table in ((policy, e.old_token_logps), (reference, e.ref_token_logps)):
            logits = m(ids, torch.arange(len(ids)), [len(ids)])
            close(table[i, :T], logits.log_softmax(-1)[torch.arange(n - 1, len(ids) - 1), ids[n:]].detach(), 1e-10)
        hidden = critic.trunk.hidden(ids, torch.arange(len(ids)), [len(ids)], slice(None))
        close(e.old_values[i, :T], critic.score(hidden)[n - 1:-1, 0].detach(), 1e-10)                   # V of the state BEFORE the token
    texts = [[BYTES.text(r.ids[:r.n_prompt]) for r in e.rows], [BYTES.text(r.response) for r in e.rows]]
    close(e.scores, torch.tensor(vowels(*texts), dtype=F64))
    rewards = ppo.token_rewards(e.scores, e.old_token_logps, e.ref_token_logps, e.mask, kl_coef=0.3)
    advantages, returns = ppo.gae(rewards, e.old_values, e.mask, lam=0.9)
    close(e.returns, returns)
    close(e.advantages, ppo.whiten(advantages, e.mask))
    close(torch.tensor(e.stats["kl/k1"], dtype=F64), ((e.old_token_logps - e.ref_token_logps) * e.mask).sum() / 6)


def test_rollouts_depend_on_seed_step_and_row_alone_and_repeat():
    a, b, other_step = toy_rollouts(), toy_rollouts(), toy_rollouts(seed=[0, 4])
    assert all(np.array_equal(x.ids, y.ids) for x, y in zip(a.rows, b.rows)) and torch.equal(a.advantages, b.advantages)
    assert any(not np.array_equal(x.ids, y.ids) for x, y in zip(a.rows, other_step.rows))
    assert not np.array_equal(a.rows[0].ids, a.rows[3].ids)                                             # one prompt, two rows, two samples


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_that_share_the_work_hold_the_experience_of_one_process(size):
    """`combine` adds the ranks' tables: run every rank once to collect its parts, then once more with the sums."""
    parts, whole = {}, toy_rollouts()
    for rank in range(size):
        calls = iter(range(9))
        toy_rollouts(rank=rank, size=size, combine=lambda t: parts.setdefault(next(calls), []).append(t.clone()) or t)
    calls = iter(range(9))
    e = toy_rollouts(rank=size - 1, size=size, combine=lambda t: sum(parts[next(calls)]))
    assert all(np.array_equal(x.ids, y.ids) for x, y in zip(e.rows, whole.rows))
    for name in ("scores", "old_token_logps", "ref_token_logps", "old_values", "advantages", "returns"):
        close(getattr(e, name), getattr(whole, name), 1e-12)


def test_the_first_update_starts_at_ratio_1_and_any_micro_batch_gives_the_same_step():
    ends = []
    for micro in (0, 1, 2, 5):
        policy, critic = toy(), toy_critic()
        e = toy_rollouts(policy)
        measured = ppo.measure(ppo.ActorCritic(policy, critic), e, [2, 0, 5], "cpu")
        close(measured["token_logps"].detach(), measured["old_token_logps"], 1e-12)
        close(measured["values"].detach(), measured["old_values"], 1e-12)
        both = ppo.ActorCritic(policy, critic)
        optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
        for minibatch in ppo.updates(6, epochs=2, minibatches=2, seed=[0, 3]):
            norm, stats = update(both, optimizer, e, minibatch, Run(micro=micro, clip=0.05))
        ends.append(torch.cat([torch.tensor([norm], dtype=F64), stats, *(p.detach().flatten() for p in both.parameters())]))
    for end in ends[1:]:
        close(end, ends[0], 1e-11)
    assert 0 < ends[0][2] < ends[0][1] and ends[0][3] > 0                                                # some clipped, some moved


def test_an_epoch_of_updates_sees_every_row_once_in_an_order_of_its_own():
    parts = list(ppo.updates(10, epochs=3, minibatches=4, seed=[1, 2]))
    epochs = [sum(parts[i:i + 4], []) for i in range(0, 12, 4)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert parts == list(ppo.updates(10, epochs=3, minibatches=4, seed=[1, 2]))
    assert list(map(len, ppo.updates(3, epochs=1, minibatches=8))) == [1, 1, 1]


def test_update_stats_count_the_tokens_whose_slope_is_gone():
    lp = torch.tensor([0.5, 0.5, 0.5, -0.5, 0.1], dtype=F64, requires_grad=True)
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)                                           # gone for the first, third and fourth
    measured = dict(token_logps=lp, old_token_logps=torch.zeros(5, dtype=F64), advantages=a, mask=torch.ones(5))
    gradient, = torch.autograd.grad(ppo.ppo_loss(**measured), lp)
    tokens, clipped, k3 = ppo.update_stats(measured)
    assert tokens == 5 and clipped == int((gradient == 0).sum()) == 3
    close(k3, (lp.exp() - 1 - lp).sum().detach())                                                      # KL(pi_old || pi), samples of pi_old


def test_float32_rollouts_rarely_flip_a_token_against_float64():
    narrow, wide = toy_rollouts(dtype=torch.float32), toy_rollouts()
    same = [np.array_equal(x.ids, y.ids) for x, y in zip(narrow.rows, wide.rows)]
    assert sum(same) >= 5                                            # a flip needs a draw within rounding of a border of the cdf: ~1e-6 per token


def test_a_new_critic_expects_nothing_and_a_new_reward_model_starts_at_log_2(tmp_path):
    toy(dtype=torch.float32).save(tmp_path)
    for kind in (ppo.Critic, ppo.RewardModel):
        scorer = kind.load(tmp_path, new=True)
        flat = data.flatten([data.make_row([1, 2], [3, 4, 5])])
        assert (scorer(*flat[:4]) == 0).all()
    close(ppo.reward_model_loss(torch.zeros(1), torch.zeros(1)), torch.tensor([math.log(2)]), 1e-6)
    with pytest.raises(SystemExit, match="without a reward head"):
        ppo.RewardModel.load(tmp_path)


def test_a_reward_model_reads_the_last_token_and_loads_as_it_was_saved(tmp_path):
    reward_model = toy_critic(ppo.RewardModel, dtype=torch.float32)
    rows = [data.make_row([1, 2], [3, 4, 5]), data.make_row([9], [8, 256]), data.make_row([1, 2], [3, 4, 6])]
    rewards = ppo.rewards_of(reward_model, rows)
    for row, r in zip(rows, rewards):
        ids = torch.tensor(row.ids.astype(np.int64))
        close(reward_model.score(reward_model.trunk.hidden(ids, torch.arange(len(ids)), [len(ids)], [-1]))[0, 0].detach().double(), r, 1e-5)
    assert rewards[0] != rewards[2]                                                                    # it did see the last token
    reward_model.save(tmp_path, eot=256)
    close(ppo.rewards_of(ppo.RewardModel.load(tmp_path), rows), rewards, 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_hugging_face_reward_model_is_a_sequence_classifier_for_transformers(tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    torch.manual_seed(0)
    shape = dict(gpt2=dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=5, eos_token_id=5),
                 llama=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                            max_position_embeddings=32, eos_token_id=5, pad_token_id=5))[kind]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=61, **shape)).save_pretrained(tmp_path / "lm")
    with pytest.raises(SystemExit, match="without a reward head"):
        ppo.RewardModel.load(tmp_path / "lm")
    reward_model = ppo.RewardModel.load(tmp_path / "lm", new=True)
    rows = [data.make_row([1, 2], [3, 4, 5]), data.make_row([9], [8, 5]), data.make_row([1, 2, 3], [7, 7, 7, 5])]
    assert reward_model.flat and (ppo.rewards_of(reward_model, rows) == 0).all()
    reward_model.trunk.lm.classifier.score.weight.data.normal_()
    rewards = ppo.rewards_of(reward_model, rows)
    reward_model.save(tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        for row, r in zip(rows, rewards):                                                              # one at a time: no pads, the last token counts
            close(theirs(torch.tensor(row.ids.astype(np.int64))[None]).logits[0, 0].double(), r, 1e-5)
    close(ppo.rewards_of(ppo.RewardModel.load(tmp_path / "rm"), rows), rewards, 1e-6)
    reward_model.trunk.flat = False                                                                    # the padded way gives the same
    close(ppo.rewards_of(reward_model, rows), rewards, 1e-5)


REWARD_FILE = """
def good(prompts, responses): return [float(len(r)) for r in responses]
def short(prompts, responses): return [1.0]
def nan(prompts, responses): return [float("nan")] * len(responses)
def text(prompts, responses): return ["good"] * len(responses)
def raises(prompts, responses): raise KeyError("no such\\nprompt")
none = 3
"""


def test_rewards_come_from_the_world_a_folder_or_a_function_and_bad_ones_say_what_is_wrong(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(REWARD_FILE)
    rows = [data.make_row(BYTES.encode("hi"), BYTES.encode(r) + [BYTES.eot]) for r in ("yes", "no, never")]
    assert ppo.ask(ppo.load_reward(f"{file}:good", BYTES), rows, BYTES).tolist() == [3.0, 9.0]
    for name, said in (("short", "returned 1 numbers for 2"), ("nan", "returned nan for the response 'yes'"), ("text", "raised ValueError"),
                       ("raises", "raised KeyError: 'no such")):
        with pytest.raises(SystemExit, match=said) as e:
            ppo.ask(ppo.load_reward(f"{file}:{name}", BYTES), rows, BYTES)
        assert "\n" not in str(e.value)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for spec in (f"{file}:none", f"{file}:absent", str(file), "wrold", str(tmp_path / "no.py:f"), f"{tmp_path / 'broken.py'}:f", str(tmp_path)):
        with pytest.raises(SystemExit, match="--reward"):
            ppo.load_reward(spec, BYTES)
    prompt = world.eval_prompts("train", 1)[0]
    assert ppo.load_reward("world", None)([prompt], ["Happy to help."]) == [world.utility(prompt, "Happy to help.")]


def test_a_reward_model_is_a_reward_on_rows_and_on_texts_but_not_for_another_tokenizer(tmp_path):
    reward_model = toy_critic(ppo.RewardModel, dtype=torch.float32)
    reward_model.save(tmp_path, eot=256)
    BYTES.save(tmp_path)
    reward = ppo.load_reward(str(tmp_path), BYTES)
    rows = [data.make_row(BYTES.encode("hi"), BYTES.encode(r) + [BYTES.eot]) for r in ("yes", "no")]
    close(torch.tensor(reward(["hi", "hi"], ["yes", "no"])), torch.tensor(reward.of_rows(rows)))
    close(ppo.ask(reward, rows, BYTES), ppo.rewards_of(reward_model, rows))
    with pytest.raises(SystemExit, match="its tokenizer is not the policy's"):
        ppo.load_reward(str(tmp_path), data.Tokenizer(world.tokenizer()))


# --- a small driver in the style of train.py's loop -------------------------------------------------------------------

@dataclass
class Run:
    steps: int = 80                       # rollouts; each is followed by epochs * minibatches optimiser steps
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 5
    epochs: int = 2
    minibatches: int = 4
    kl_coef: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    clip_value: float = 1.0
    vf_coef: float = 0.5
    target_kl: float = 0.0                # stop the epochs of a step beyond this KL(pi_old || pi) per token; 0: never
    max_grad_norm: float = 1.0
    max_len: int = 80
    micro: int = 0
    seed: int = 0


def world_prompts(tokenizer, n, seed):
    """n prompts of the training cells, as tokens."""
    return [tokenizer.prompt_ids(p) for p in world.eval_prompts("train", n, seed)]


def train_ppo(policy, critic, reference, tokenizer, reward, run, log=None):
    """What train.py does with ppo.py. -> list of metrics per step"""
    both, history = ppo.ActorCritic(policy, critic), []
    optimizer = torch.optim.AdamW(both.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    prompts = world_prompts(tokenizer, 288, run.seed)
    keys = list(map(tuple, prompts))
    for step in range(run.steps):
        clock = time.perf_counter()
        done = (step - run.warmup) / max(1, run.steps - run.warmup)
        for g in optimizer.param_groups:
            g["lr"] = run.lr * ((step + 1) / run.warmup if step < run.warmup else 0.55 + 0.45 * math.cos(math.pi * done))
        some = [prompts[i % len(prompts)] for i in np.random.default_rng([run.seed, step]).integers(len(keys), size=run.batch_size)]
        experience = ppo.rollouts(policy, critic, reference, some, reward, tokenizer, max_len=run.max_len, seed=[run.seed, step],
                                  kl_coef=run.kl_coef, gamma=run.gamma, lam=run.lam)
        sampled, total = time.perf_counter() - clock, torch.zeros(3, dtype=torch.float64)
        for minibatch in ppo.updates(run.batch_size, epochs=run.epochs, minibatches=run.minibatches, seed=[run.seed, step]):
            norm, stats = update(both, optimizer, experience, minibatch, run)
            total += stats
            if run.target_kl and stats[2] / stats[0] > run.target_kl:
                break
        history.append({"step": step, **experience.stats, "grad_norm": norm, "clip_fraction": float(total[1] / total[0]),
                        "kl/old": float(total[2] / total[0]), "rollout_s": sampled, "seconds": time.perf_counter() - clock})
        if log:
            log(history[-1])
    return history


def update(both, optimizer, experience, minibatch, run):
    """One optimiser step. -> (gradient norm, sums of update_stats)"""
    n_tokens, stats = experience.mask[minibatch].sum(), torch.zeros(3, dtype=torch.float64)
    parts = data.token_batches([experience.rows[i] for i in minibatch], both.token_budget) if not run.micro else \
        [range(i, min(i + run.micro, len(minibatch))) for i in range(0, len(minibatch), run.micro)]
    for part in parts:
        measured = ppo.measure(both, experience, [minibatch[i] for i in part], "cpu")
        loss = ppo.actor_critic_loss(**measured, clip=run.clip, clip_value=run.clip_value, vf_coef=run.vf_coef)
        (loss * measured["mask"].sum() / n_tokens).backward()
        stats += ppo.update_stats(measured, clip=run.clip)
    norm = float(torch.nn.utils.clip_grad_norm_(both.parameters(), run.max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stats


def ppo_on_the_world(base, run, reward="world", log=None, n=480, part="report"):
    torch.manual_seed(run.seed)
    tokenizer = data.Tokenizer(world.tokenizer())
    policy, reference = model.load_policy(base), model.load_policy(base).requires_grad_(False)
    critic = ppo.Critic.load(base, new=True)
    clock, cpu = time.perf_counter(), time.process_time()
    history = train_ppo(policy, critic, reference, tokenizer, ppo.load_reward(reward, tokenizer), run, log)
    spent = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    r = evaluate.evaluate_world(policy, reference, tokenizer, seed=run.seed, n=n, part=part)
    kept = {k: r[k] for k in ("kl", "reward", "reward_ci95", "reward_ref", "malformed", "win_rate")}
    return {**kept, "optimum": r["optimum_at_same_kl"]["reward"], **spent}, history, policy


def world_pairs(tokenizer, n, seed, part):
    """(chosen, rejected) rows with their masks on the last token, and the Bayes bound: the mean probability of the likelier winner."""
    examples = world.pairs(n, seed, part=part)
    rows, _ = data.encode([data.Pair(**p) for p in examples], tokenizer)
    gaps = [world.utility(p["prompt"], p["chosen"]) - world.utility(p["prompt"], p["rejected"]) for p in examples]
    return [tuple(map(ppo.last_token, u)) for u in rows], float(np.mean([world.sigmoid(abs(g)) for g in gaps]))


def train_reward_model(reward_model, units, *, steps, batch_size, lr, warmup=20, centre=0.0, seed=0):
    optimizer = torch.optim.AdamW(reward_model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        flat = data.flatten([r for i in data.batch_at(range(len(units)), batch_size, seed=seed, step=step).rows for r in units[i]])
        chosen, rejected = flat.sums(reward_model(*flat[:4])).view(-1, 2).T
        ppo.reward_model_loss(chosen, rejected, centre=centre).mean().backward()
        torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
        for g in optimizer.param_groups:
            g["lr"] = lr * ((step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup)))
        optimizer.step()
        optimizer.zero_grad()


def accuracy(reward_model, units):
    rewards = ppo.rewards_of(reward_model, [row for u in units for row in u]).view(-1, 2)
    return float((rewards[:, 0] > rewards[:, 1]).double().mean())


# --- on the embedded world --------------------------------------------------------------------------------------------

def test_a_reward_model_trained_for_seconds_tells_better_replies_to_unseen_prompts():
    """From random weights, so what it learns first is style: without knowing which fix is right no reward can be right in more than .70
    of the held-out pairs, with it in .82 (world.classes, enumerated). The slow test below goes for the rest."""
    torch.manual_seed(0)
    tokenizer = data.Tokenizer(world.tokenizer())
    units, held = world_pairs(tokenizer, 3000, 0, "train")[0], world_pairs(tokenizer, 1000, 1, "tune")[0]
    reward_model = ppo.RewardModel(model.GPT(model.GPTConfig(vocab_size=tokenizer.vocab_size, **world.MODEL)))
    assert accuracy(reward_model, held) == 0                                                           # all rewards are 0 and equal
    train_reward_model(reward_model, units, steps=100, batch_size=24, lr=4e-3)
    assert accuracy(reward_model, held) > 0.60                       # 6 standard errors above chance


def base_model(tmp_path, seed):
    """The folder of the embedded world's SFT model, as train.py makes it (40 CPU s)."""
    if os.environ.get("PPO_BASES"):                                                                    # made before: folder0,folder1,folder2
        return os.environ["PPO_BASES"].split(",")[seed]
    train.main(["--loss", "kto", "--steps", "1", "--seed", str(seed), "--out", str(tmp_path / "kto")])
    return json.loads((tmp_path / "kto" / "config.json").read_text())["ref"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])                     # 2.5 minutes each: the README has three
def test_ppo_with_the_true_utility_comes_to_the_exact_frontier(tmp_path, seed):
    """KL 1.0 +- 0.2 and at least 90 % of the best utility that any policy has at that KL. Nobody is above it, but for noise."""
    r, history, _ = ppo_on_the_world(base_model(tmp_path, seed), Run(seed=seed))
    assert 0.8 <= r["kl"] <= 1.2
    assert 0.9 * r["optimum"] <= r["reward"] <= r["optimum"] + 0.15
    assert history[-1]["explained_variance"] > 0.5 and history[-1]["ended"] > 0.99


# --- through train.py ---------------------------------------------------------------------------------------------------

def rewards_file(folder, body="[r.count('a') - 0.1 * len(r) for r in responses]"):
    (folder / "reward.py").write_text(f"def reward(prompts, responses):\n    return {body}\n")
    return f"{folder / 'reward.py'}:reward"


def ppo_flags(lab, folder, out, *more, steps=3):
    return flags(lab, out, "--reward", rewards_file(folder), "--minibatches", 2, "--ppo_epochs", 2, *more, loss="ppo", steps=steps)


def test_a_step_of_ppo_is_the_same_for_any_micro_batch_and_on_two_processes(lab, tmp_path):
    """float64: every process samples all rows from noise that is a function of (seed, step, row, position), so nothing depends on the split."""
    run(*ppo_flags(lab, tmp_path, tmp_path / "one"))
    run(*ppo_flags(lab, tmp_path, tmp_path / "micro", "--micro_batch_size", 1))
    done = torchrun(2, *ppo_flags(lab, tmp_path, tmp_path / "two", "--micro_batch_size", 2))
    assert done.returncode == 0, done.stderr[-2000:]
    one = metrics(tmp_path / "one")
    assert one[-1]["kl/old"] > 0 and one[0]["updates"] == 4 and all(m["grad_norm"] > 0 for m in one)
    for name in ("micro", "two"):
        assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / name)) < 1e-10          # sums in another order, through AdamW
        for a, b in zip(one, metrics(tmp_path / name)):
            assert all(a[k] == pytest.approx(b[k], abs=1e-9) for k in ("loss", "grad_norm", "reward", "kl/k1", "explained_variance", "clip_fraction"))


def test_ppo_raises_the_reward_it_is_given_and_resumes_with_the_same_bytes(lab, tmp_path, monkeypatch):
    words = ("--save_every", 3, "--dtype", "fp32", "--lr", "1e-2", "--kl_coef", "0.01", "--batch_size", 7)          # the file has 7 prompts
    run(*ppo_flags(lab, tmp_path, tmp_path / "whole", *words, steps=12))
    m = metrics(tmp_path / "whole")
    assert np.mean([x["reward"] for x in m[-3:]]) > np.mean([x["reward"] for x in m[:3]])
    real = train.ppo_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "ppo_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < 7 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*ppo_flags(lab, tmp_path, tmp_path / "parts", *words, steps=12))
    run(*ppo_flags(lab, tmp_path, tmp_path / "parts", *words, "--resume", steps=12))
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (tmp_path / "parts/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("body, message", [("[1.0]", "returned 1 numbers for"), ("[float('nan')] * len(responses)", "returned nan for the response"),
                                           ("1 / 0", "raised ZeroDivisionError")])
def test_a_reward_function_that_does_not_do_its_job_is_one_line(lab, tmp_path, body, message):
    words = ppo_flags(lab, tmp_path, tmp_path / "run")
    rewards_file(tmp_path, body)
    with pytest.raises(SystemExit, match=message) as e:
        run(*words)
    assert "--reward" in e.value.code and "\n" not in e.value.code


def test_a_reward_model_from_the_command_line_is_a_reward_for_ppo(lab, pairs, tmp_path, capsys):
    run(*pair_flags(pairs, tmp_path / "rm", "rm", "--dtype", "fp32", "--eval_data", pairs / "pairs.jsonl", steps=60))
    m = metrics(tmp_path / "rm")
    assert m[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and m[-1]["rewards/accuracies"] > 0.8
    result = json.loads((tmp_path / "rm/eval.json").read_text())
    assert result["train"] == result["eval"] and result["train"]["accuracy"] > 0.8
    run(*flags(lab, tmp_path / "ppo", "--reward", tmp_path / "rm/model", "--dtype", "fp32", loss="ppo", steps=2))
    assert all(math.isfinite(x["reward"]) and x["reward"] != 0 for x in metrics(tmp_path / "ppo"))


@pytest.mark.parametrize("loss, held", [("rm", [False]), ("ppo", [True, False])])
def test_a_dry_run_adds_up_what_every_model_will_hold(lab, pairs, tmp_path, capsys, monkeypatch, loss, held):
    """A reward model is one transformer; PPO's policy and critic are two, the first with a reference that stays."""
    asked = []
    monkeypatch.setattr(model, "memory_estimate", lambda net, *, reference, **how: asked.append((type(net), reference)) or {"weights": 3 * 2**20})
    run(*(pair_flags(pairs, tmp_path / "run", "rm", "--dry_run", steps=3) if loss == "rm" else ppo_flags(lab, tmp_path, tmp_path / "run", "--dry_run")))
    assert asked == [(model.GPT, reference) for reference in held] and f"weights {3 * len(held)} MB" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def llama(lab, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", open(lab / "rows.jsonl").read().split("\n"))


def test_a_hugging_face_model_becomes_a_reward_model_and_another_is_trained_on_it(lab, pairs, llama, tmp_path):
    from transformers import AutoModelForSequenceClassification
    run("--loss", "rm", "--model", llama, "--data", pairs / "pairs.jsonl", "--out", tmp_path / "rm", "--steps", 5, "--lr", "1e-2", "--batch_size", 8)
    assert metrics(tmp_path / "rm")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm/model").config.num_labels == 1
    run("--loss", "ppo", "--model", llama, "--data", lab / "rows.jsonl", "--reward", tmp_path / "rm/model", "--out", tmp_path / "ppo", "--steps", 2, "--lr", "1e-3",
        "--max_len", 40, "--batch_size", 7)
    assert all(math.isfinite(m["loss"]) for m in metrics(tmp_path / "ppo"))
    with pytest.raises(SystemExit, match="its tokenizer is not the policy's"):
        run(*flags(lab, tmp_path / "other", "--reward", tmp_path / "rm/model", loss="ppo", steps=1))


REWARD_MODEL = dict(steps=500, batch_size=32, lr=4e-3)


@pytest.mark.slow
def test_a_reward_model_learns_the_style_and_a_part_of_the_rest(tmp_path):
    """.70 is what style alone can reach, .82 what anything can. Measured: .774 after 500 steps, .753 after 800 (three passes: it starts to
    learn the training cells by heart; .79 on them both times)."""
    torch.manual_seed(0)
    tokenizer = data.Tokenizer(world.tokenizer())
    units, (held, bound) = world_pairs(tokenizer, 8000, 0, "train")[0], world_pairs(tokenizer, 2000, 99, "tune")
    reward_model = ppo.RewardModel.load(base_model(tmp_path, 0), new=True)
    train_reward_model(reward_model, units, **REWARD_MODEL)
    assert 0.80 < bound < 0.83
    assert 0.67 < accuracy(reward_model, held) < bound + 0.02                           # .714 and .774 in two runs; a standard error is .01


if __name__ == "__main__":                # python tests/test_ppo.py BASE name=value ...: one run, its settings and result as a line of JSON
    torch.set_num_threads(1)
    kinds = {f: type(v) for f, v in vars(Run()).items()}
    given = dict(a.split("=") for a in sys.argv[2:])
    part, reward = given.pop("part", "tune"), given.pop("reward", "world")
    run = Run(**{k: kinds[k](v) for k, v in given.items()})
    every = lambda m: m["step"] % 10 == 0 and print({k: round(v, 3) for k, v in m.items() if v is not None}, file=sys.stderr, flush=True)
    print(json.dumps({"given": given, "part": part, **ppo_on_the_world(sys.argv[1], run, reward, every, part=part)[0]}), flush=True)

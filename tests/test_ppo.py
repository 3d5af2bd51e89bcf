"""Claims about ppo.py: its functions against literal sums, its gradients against enumeration."""

import math

import pytest
import torch

import ppo

F64 = torch.float64
HOLES = torch.tensor([[1, 1, 1, 1, 1],       # full
                      [1, 1, 1, 0, 0],       # cut at the right
                      [0, 1, 1, 1, 0],       # at both ends
                      [1, 0, 1, 0, 1],       # gaps
                      [0, 0, 0, 1, 0],       # one token
                      [0, 0, 0, 0, 0]])      # none
ON = HOLES > 0


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator) * scale


def spoilt(x, what=math.nan):
    """x with garbage wherever the mask is 0: nothing may depend on it."""
    return torch.where(ON, x, what)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=F64)


# --- rewards, advantages --------------------------------------------------------------------------

def test_gae_is_the_double_sum_over_future_surprises():
    rewards, values = noise(6, 5), noise(6, 5, seed=1)
    for gamma, lam in ((0.9, 0.7), (1.0, 1.0), (1.0, 0.0)):
        wanted = torch.zeros(6, 5, dtype=F64)
        for b, t in ON.nonzero().tolist():
            R = (rewards * HOLES)[b].tolist()
            V = (values * HOLES)[b].tolist() + [0.0]
            for later in range(t, 5):
                surprise = R[later] + gamma * V[later + 1] - V[later]
                wanted[b, t] += (gamma * lam) ** (later - t) * surprise
        advantages, returns = ppo.gae(spoilt(rewards), spoilt(values, math.inf), HOLES,
                                      gamma=gamma, lam=lam)
        close(advantages, wanted)
        close(returns, (wanted + values) * HOLES)


def test_whitened_numbers_have_mean_0_and_unbiased_variance_1():
    x = noise(6, 5)
    white = ppo.whiten(spoilt(x), HOLES)
    picked = x[ON].tolist()
    mean = sum(picked) / len(picked)
    variance = sum((v - mean) ** 2 for v in picked) / (len(picked) - 1)
    close(white[ON], (x[ON] - mean) / (variance + 1e-8) ** 0.5)
    assert (white[~ON] == 0).all()
    for mask in (torch.tensor([[1, 0]]), torch.zeros(1, 2)):             # one number, or none
        assert ppo.whiten(torch.tensor([[5.0, 3.0]]), mask).tolist() == [[0.0, 0.0]]


def test_the_score_goes_to_the_last_token_and_the_penalty_to_all():
    scores, logps, ref = noise(6), noise(6, 5, seed=1), noise(6, 5, seed=2)
    rewards = ppo.token_rewards(scores, spoilt(logps), spoilt(ref, -math.inf), HOLES, kl_coef=0.3)
    wanted = -0.3 * (logps - ref) * HOLES
    for b, last in enumerate([4, 2, 3, 4, 3]):           # the sixth row has no token
        wanted[b, last] += scores[b]
    close(rewards, wanted)


def test_k1_and_k3_have_the_exact_kl_as_their_mean_and_k3_is_never_negative():
    pi, ref = noise(7, seed=0).log_softmax(0), noise(7, seed=1).log_softmax(0)
    k1, k2, k3 = ppo.kl_estimates(pi, ref)
    exact = (pi.exp() * (pi - ref)).sum()
    close((pi.exp() * k1).sum(), exact)                  # the mean over y ~ pi, by enumeration
    close((pi.exp() * k3).sum(), exact)
    assert (k3 >= 0).all() and (k2 >= 0).all() and (k1 < 0).any()
    assert abs((pi.exp() * k2).sum() - exact) > 1e-3     # biased
    tiny = ppo.kl_estimates(pi, pi - 1e-9)[2]            # digits survive near 0: d^2 / 2
    close(tiny / 5e-19, torch.ones(7, dtype=F64), 1e-6)  # d itself is rounded at 1e-16


def test_absurd_log_ratios_leave_no_nan_behind():
    """No infinity either: 0 times it, at a token that does not count, would be one."""
    for dtype in (torch.float32, F64):
        zeros = torch.zeros(5, dtype=dtype)
        logps = torch.tensor([1000.0, -1000.0, 100.0, -100.0, 21.0], dtype=dtype,
                             requires_grad=True)
        found = [*ppo.kl_estimates(logps, zeros)]
        for advantage in (3.0, -3.0, 0.0):
            found.append(ppo.ppo_loss(logps, zeros, zeros + advantage, torch.ones(5)))
            wanted = [scalar_ppo(min(x, 20.0), advantage, 0.2)[0] for x in logps.tolist()]
            torch.testing.assert_close(found[-1].double(), tensor(*wanted), rtol=1e-6,
                                       atol=1e-12)                       # float32
        found.append(ppo.offline_ppo_loss(logps, logps > 0))
        for x in found:
            gradient, = torch.autograd.grad(x.sum(), logps, retain_graph=True)
            assert x.isfinite().all() and gradient.isfinite().all()


# --- the losses -----------------------------------------------------------------------------------

def scalar_ppo(log_ratio, advantage, clip):
    """(loss, its slope in log pi) of one token, from the paper's Eq. 7 with its sign turned."""
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    too_good = advantage > 0 and ratio > 1 + clip
    too_bad = advantage < 0 and ratio < 1 - clip
    slope = 0.0 if too_good or too_bad else -advantage * ratio
    return -min(ratio * advantage, clipped * advantage), slope


def test_ppo_loss_is_minus_the_clipped_objective_around_both_edges():
    clip = 0.3
    for edge in (1 - clip, 1.0, 1 + clip):
        for beside in (-0.3, -1e-6, 1e-6, 0.3):
            for advantage in (-2.0, 0.0, 0.1):
                log_ratio = math.log(edge) + beside
                logps = tensor(log_ratio - 1.5).requires_grad_()
                loss = ppo.ppo_loss(logps, tensor(-1.5), tensor(advantage), torch.ones(1),
                                    clip=clip)
                value, slope = scalar_ppo(log_ratio, advantage, clip)
                close(loss, tensor(value))
                close(torch.autograd.grad(loss.sum(), logps)[0], tensor(slope))


def test_what_is_masked_has_no_influence_and_no_gradient():
    logps = spoilt(noise(6, 5)).requires_grad_()
    old = spoilt(noise(6, 5, seed=1), -math.inf)
    target = spoilt(noise(6, 5, seed=2), math.inf)
    for loss_of in (ppo.ppo_loss, ppo.value_loss):
        losses = loss_of(logps, old, target, HOLES)
        close(losses[ON], loss_of(logps[ON], old[ON], target[ON], torch.ones(15)))
        assert (losses[~ON] == 0).all()
        gradient, = torch.autograd.grad(losses.sum(), logps)
        assert gradient.isfinite().all() and (gradient[~ON] == 0).all()


def test_value_loss_is_the_larger_of_the_plain_and_the_clipped_error():
    V, old, G = noise(40, scale=0.5), noise(40, seed=1, scale=0.5), noise(40, seed=2)
    for eps in (0.2, math.inf):
        losses = ppo.value_loss(V, old, G, torch.ones(40), clip_value=eps)
        for v, v_old, g, loss in zip(V.tolist(), old.tolist(), G.tolist(), losses.tolist()):
            clipped = v_old + min(max(v - v_old, -eps), eps)
            assert loss == pytest.approx(0.5 * max((v - g) ** 2, (clipped - g) ** 2), abs=1e-12)


def test_actor_critic_loss_adds_both_and_only_the_present_has_a_gradient():
    names = ("token_logps", "values", "old_token_logps", "old_values", "advantages", "returns")
    measured = {name: noise(9, seed=i).requires_grad_() for i, name in enumerate(names)}
    losses = ppo.actor_critic_loss(**measured, clip=0.3, clip_value=0.4, vf_coef=0.7)
    logps, V, old, V_old, A, G = measured.values()
    policy_term = ppo.ppo_loss(logps, old, A, torch.ones(9), clip=0.3)
    critic_term = ppo.value_loss(V, V_old, G, torch.ones(9), clip_value=0.4)
    close(losses, policy_term + 0.7 * critic_term)
    gradients = torch.autograd.grad(losses.sum(), list(measured.values()), allow_unused=True)
    assert [g is not None for g in gradients] == [True, True, False, False, False, False]


def test_reward_model_loss_is_bradley_terry_and_survives_large_gaps():
    chosen = tensor(0.0, 2.0, -800.0).requires_grad_()
    rejected = tensor(0.0, 0.5, 0.0)
    losses = ppo.reward_model_loss(chosen, rejected)
    close(losses, tensor(math.log(2), math.log1p(math.exp(-1.5)), 800.0))
    gradient, = torch.autograd.grad(losses.sum(), chosen, retain_graph=True)
    close(gradient, tensor(-0.5, -1 / (1 + math.exp(1.5)), -1.0))
    centred = ppo.reward_model_loss(chosen, rejected, centre=0.1)
    close(centred - losses, tensor(0.0, 0.1 * 2.5 ** 2, 0.1 * 800.0 ** 2), 1e-10)


def test_offline_ppo_moves_good_responses_up_bad_ones_down_and_stops_at_its_clip():
    logratios = tensor(0.0, 0.0, 0.8, -0.8).requires_grad_()
    desirable = torch.tensor([True, False, True, False])
    losses = ppo.offline_ppo_loss(logratios, desirable, clip=0.5, kl_coef=0.0)
    close(losses, tensor(-1.0, 1.0, -2.0, 0.5))                      # the ratio is in [1/2, 2]
    gradient, = torch.autograd.grad(losses.sum(), logratios, retain_graph=True)
    close(gradient, tensor(-1.0, 1.0, 0.0, 0.0))
    close(ppo.offline_ppo_loss(logratios, desirable, clip=0.5) - losses, -0.1 * logratios)


# --- exact policy gradient: a policy of two tokens, all of whose responses can be enumerated ------

class Tabular:
    """pi(y_1) and pi(y_2|y_1) from two tables of logits; each of the 9 responses has a score."""

    def __init__(self):
        self.first = noise(3, seed=5).requires_grad_()
        self.second = noise(3, 3, seed=6).requires_grad_()
        self.scores = noise(9, seed=7)
        self.y = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        self.ref = self.token_logps(noise(3, seed=8), noise(3, 3, seed=9))

    def token_logps(self, first, second):
        a, b = self.y.T
        return torch.stack([first.log_softmax(0)[a], second.log_softmax(1)[a, b]], 1)   # (9, 2)

    def now(self):
        return self.token_logps(self.first, self.second)

    def gradient(self, objective):
        return torch.cat([g.flatten() for g in
                          torch.autograd.grad(objective, [self.first, self.second])])

    def exact_gradient(self, kl_coef):
        """Of E_pi[score] - kl_coef KL(pi || ref), by enumeration: no samples, no advantages."""
        logp = self.now().sum(1)
        inside = self.scores - kl_coef * (logp - self.ref.sum(1))
        return self.gradient((logp.exp() * inside).sum())


def advantages_of(table, old, values, kl_coef):
    all_count = torch.ones_like(values)
    rewards = ppo.token_rewards(table.scores, old, table.ref, all_count, kl_coef=kl_coef)
    return ppo.gae(rewards, values, all_count, lam=1.0)[0]


def test_the_expected_first_update_is_the_policy_gradient_of_reward_minus_kl():
    """Each response's loss is weighed by its probability, so the sum IS the mean over pi."""
    table = Tabular()
    old = table.now().detach()
    probability = old.sum(1, keepdim=True).exp()
    a_critic = torch.stack([torch.full((9,), 0.7, dtype=F64), table.y[:, 0].double()], 1)
    for kl_coef in (0.0, 0.5):
        for values in (torch.zeros(9, 2, dtype=F64), a_critic):      # any function of the state
            advantages = advantages_of(table, old, values, kl_coef)
            for scale, shift in ((1.0, 0.0), (3.0, -2.0)):           # what whitening does
                losses = ppo.ppo_loss(table.now(), old, advantages * scale + shift,
                                      torch.ones(9, 2))
                found = table.gradient(-(probability * losses).sum() / scale)
                close(found, table.exact_gradient(kl_coef))


def test_repeated_updates_end_at_the_closed_form_optimum():
    """pi = ref e^(score / kl_coef) / Z: exact advantages through ppo_loss find RLHF's optimum."""
    table, kl_coef = Tabular(), 0.5
    optimizer = torch.optim.Adam([table.first, table.second], lr=0.2)
    for _ in range(400):
        old = table.now().detach()
        advantages = advantages_of(table, old, torch.zeros(9, 2, dtype=F64), kl_coef)
        losses = ppo.ppo_loss(table.now(), old, advantages, torch.ones(9, 2))
        optimizer.zero_grad()
        (old.sum(1, keepdim=True).exp() * losses).sum().backward()
        optimizer.step()
    wanted = (table.ref.sum(1) + table.scores / kl_coef).softmax(0)
    close(table.now().sum(1).exp().detach(), wanted, 1e-4)           # what 400 steps leave

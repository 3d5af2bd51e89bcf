"""Claims about ppo.py: its functions against literal sums, its gradients against enumeration."""

import inspect
import math

import pytest
import torch

import dpo_variants
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


# --- without a critic -----------------------------------------------------------------------------

KIN = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce", "humanline_grpo")
LENGTHS = [3, 1, 2, 4]                     # four responses, flat: 0 0 0 1 2 2 3 3 3 3
RESPONSE = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
RESPONSE_LEN = torch.tensor(LENGTHS, dtype=F64)[RESPONSE]


def advantage_name(loss):
    return next(n for n in inspect.signature(loss).parameters if n.endswith("advantages"))


def call(name, logps, old, advantages, ref=None, **settings):
    """The curve on the four responses; advantages (4,), or (10,) as PPO's are.   (10,)"""
    loss = ppo.ppo_loss if name == "ppo" else ppo.LOSSES[name]
    known = {"token_logps": logps, "old_token_logps": old, "response": RESPONSE,
             "response_len": RESPONSE_LEN, "mask": torch.ones(10),
             "ref_token_logps": logps.detach() if ref is None else ref,
             advantage_name(loss): advantages if len(advantages) == 10 else advantages[RESPONSE]}
    wanted = inspect.signature(loss).parameters
    return loss(**{key: known[key] for key in wanted if key in known}, **settings)


def by_hand(name, i, logps, old, ref, A):
    """Token i's loss in plain numbers, with settings that differ from every default."""
    mine = [k for k in range(10) if RESPONSE[k] == RESPONSE[i]]
    n = len(mine)
    d = logps[i] - ref[i]
    k3 = 0.3 * (math.exp(-d) - 1 + d)
    ratio = math.exp(logps[i] - old[i])
    if name in ("rloo", "reinforce"):
        return -A * logps[i]
    if name == "gspo":
        ratio = math.exp(sum(logps[k] - old[k] for k in mine) / n)
    if name == "humanline_grpo":
        ratio = min(max(ratio, math.exp(-0.4)), math.exp(0.5))
    low, high = (0.9, 1.3) if name in ("dapo", "gspo") else (0.8, 1.2)
    step = -min(ratio * A, min(max(ratio, low), high) * A)
    return {"grpo": (step + k3) / n, "humanline_grpo": (step + k3) / n, "dr_grpo": step / 50,
            "dapo": step, "gspo": step / n}[name]


SETTINGS = {"grpo": {"clip": 0.2, "kl_coef": 0.3}, "dr_grpo": {"clip": 0.2, "max_tokens": 50.0},
            "dapo": {"clip_low": 0.1, "clip_high": 0.3},
            "gspo": {"clip_low": 0.1, "clip_high": 0.3},
            "humanline_grpo": {"clip": 0.2, "kl_coef": 0.3, "log_eps_p": -0.4, "log_eps_r": 0.5}}


def test_each_curve_is_its_equation_and_its_gradient_the_difference_quotient():
    logps, old, ref = (noise(10, seed=i, scale=0.4) - 2 for i in range(3))
    A = noise(4, seed=3)
    for name in KIN[1:]:
        settings = SETTINGS.get(name, {})

        def total(at):
            numbers = at.tolist(), old.tolist(), ref.tolist()
            return [by_hand(name, i, *numbers, A[RESPONSE[i]].item()) for i in range(10)]

        x = logps.clone().requires_grad_()
        losses = call(name, x, old, A, ref, **settings)
        close(losses, tensor(*total(logps)))
        gradient, = torch.autograd.grad(losses.sum(), x)
        for i in range(10):
            h = torch.zeros(10, dtype=F64)
            h[i] = 1e-6
            slope = (sum(total(logps + h)) - sum(total(logps - h))) / 2e-6
            assert gradient[i] == pytest.approx(slope, abs=1e-8), (name, i)    # h^2, 1e-16 / h


def test_advantages_are_their_formulas_and_exactly_0_in_a_tie():
    rewards = tensor(1.0, 2.0, 6.0)[None]
    close(ppo.centred_advantages(rewards), tensor(-2.0, -1.0, 3.0)[None])
    close(ppo.loo_advantages(rewards), tensor(1 - 4, 2 - 3.5, 6 - 1.5)[None])
    std = math.sqrt((4 + 1 + 9) / 2)
    close(ppo.group_advantages(rewards), tensor(-2, -1, 3)[None] / (std + 1e-4))
    tie = torch.full((1, 3), 0.1, dtype=F64)
    assert tie.mean() != 0.1                                     # its mean is rounded
    for advantages in (ppo.centred_advantages, ppo.loo_advantages, ppo.group_advantages):
        assert (advantages(tie) == 0).all()


def test_a_wrong_way_token_keeps_its_slope_under_the_clip_and_loses_it_to_humanline():
    """A < 0 and ratio e^2: PPO's min is pessimistic, a person has stopped looking."""
    old = torch.full((10,), -3.0, dtype=F64)
    A = -torch.ones(4, dtype=F64)
    for name, slope in (("grpo", math.exp(2.0) / 3), ("humanline_grpo", 0.0)):
        logps = (old + 2).requires_grad_()
        losses = call(name, logps, old, A, old, kl_coef=0.0)
        gradient, = torch.autograd.grad(losses.sum(), logps)
        assert gradient[0] == pytest.approx(slope, abs=1e-12)


class Table:
    """pi(y_t | s_t) = softmax of a row of logits; a state per place of the four responses."""

    def __init__(self):
        self.logits = noise(10, 5, seed=11).requires_grad_()
        self.y = torch.randint(0, 5, (10,), generator=torch.Generator().manual_seed(12))

    def logps(self):
        return self.logits.log_softmax(1).gather(1, self.y[:, None])[:, 0]

    def score(self):
        """grad log pi(y_t|s_t) in its row's logits, by hand: one-hot minus pi.   (10, 5)"""
        rows = self.logits.detach().exp()
        one_hot = torch.nn.functional.one_hot(self.y, 5)
        return one_hot - rows / rows.sum(1, keepdim=True)

    def gradient(self, losses):
        return torch.autograd.grad(losses.sum(), self.logits, retain_graph=True)[0]


def test_at_pi_old_all_of_them_are_reinforce_with_their_own_advantage_and_divisor():
    table = Table()
    logps, old = table.logps(), table.logps().detach()
    per_token, per_response = noise(10, seed=13), noise(4, seed=14)
    for name in KIN:
        A = per_token if name == "ppo" else per_response[RESPONSE]
        divisor = torch.ones(10, dtype=F64)
        if name in ("grpo", "humanline_grpo", "gspo"):
            divisor = RESPONSE_LEN
        if name == "dr_grpo":
            divisor = divisor * 100
        losses = call(name, logps, old, per_token if name == "ppo" else per_response)
        close(table.gradient(losses), -(A / divisor)[:, None] * table.score())
    over_tokens = {name for name in KIN if getattr(ppo.LOSSES[name], "mean_over", "") == "tokens"}
    assert over_tokens == {"ppo", "dapo"}                        # the others: over responses


def test_grpo_with_two_responses_points_where_dpo_per_token_does_and_dr_grpo_where_dpo_does():
    """arXiv 2510.00977, what is true of it: at pi = pi_old = ref the directions agree.

    Best and worst of a group of two, rewards 3 and 1. GRPO's A is +-1 / sqrt 2 whatever the gap,
    as DPO's slope is; its division by length makes it DPO on log-probs per TOKEN. Dr. GRPO's A is
    half the gap. Once pi has moved they part: DPO's slope fades with its margin, GRPO's does not.
    """
    table = Table()
    pair = (RESPONSE == 0) | (RESPONSE == 2)                     # of 3 and 2 tokens
    best = RESPONSE[pair] == 0
    logps = table.logps()
    old = logps.detach()

    def dpo(h):
        return dpo_variants.dpo_loss(h[None], torch.zeros(1, dtype=F64), beta=0.1)

    moved = logps - old
    per_token = moved[RESPONSE == 0].mean() - moved[RESPONSE == 2].mean()
    per_response = moved[RESPONSE == 0].sum() - moved[RESPONSE == 2].sum()
    rewards = tensor(3.0, 1.0)[None]
    A = torch.where(best, *ppo.group_advantages(rewards)[0])
    grpo = ppo.grpo_loss(logps[pair], old[pair], old[pair], A, RESPONSE_LEN[pair]).sum() / 2
    scale = (1 / (math.sqrt(2) + 1e-4)) / 2 / (0.1 / 2)          # A / 2 responses; DPO: beta / 2
    close(table.gradient(grpo), scale * table.gradient(dpo(per_token)))
    A = torch.where(best, *ppo.centred_advantages(rewards)[0])
    dr_grpo = ppo.dr_grpo_loss(logps[pair], old[pair], A, max_tokens=1.0).sum() / 2
    close(table.gradient(dr_grpo), (1 / 2) / (0.1 / 2) * table.gradient(dpo(per_response)))


def test_k3_as_a_loss_pulls_towards_the_other_kl():
    """E_pi grad k3 = grad KL(ref || pi), by enumeration, though E_pi k3 is KL(pi || ref)."""
    logits = noise(7, seed=20).requires_grad_()
    ref = noise(7, seed=21).log_softmax(0)
    logps = logits.log_softmax(0)
    k3 = ppo.kl_estimates(logps, ref)[2]
    found, = torch.autograd.grad((logps.exp().detach() * k3).sum(), logits, retain_graph=True)
    wanted, = torch.autograd.grad((ref.exp() * (ref - logps)).sum(), logits)
    close(found, wanted)


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

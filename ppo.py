"""The policy writes, a reward judges, and the better tokens become likelier: PPO, GRPO and others.

Papers: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347 (PPO);
Schulman et al. 2015, arXiv 1506.02438 (GAE); for language models: Ziegler et al. 2019,
arXiv 1909.08593, and Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT); without a critic: Shao
et al. 2024, arXiv 2402.03300 (GRPO). Each function below names its own paper.

    1  a reward model learns from pairs          reward_model_loss
    2  the policy answers a batch of prompts     (rollouts.py: it samples, and a reward judges)
    3  a reward for every token                  token_rewards, kl_estimates
    4  was it better than expected?              of a token, by a critic: gae, whiten
                                                 of a response, by its group: group_advantages,
                                                 centred_, loo_, batch_advantages
    5  one or a few steps on these samples       per token: ppo_loss, grpo_loss, ...
       and again from 2

One table holds the whole family. pi_old is the policy that sampled. At pi = pi_old each loss has
the gradient of REINFORCE, - sum_t A_t grad log pi(y_t|s_t) / divisor:

    name        A                                 divided by            once pi has moved
    ppo         per token, critic, whitened       tokens of the batch   clip of each token's ratio
    reinforce   R - mean of the batch             responses             (one update per sample)
    rloo        R - mean of the OTHERS            responses             (one update per sample)
    grpo        (R - mean) / std of the group     own length; responses clip of each token's ratio
    dr_grpo     R - mean of the group             a constant; responses clip of each token's ratio
    dapo        as grpo                           tokens of the batch   clip, wider above than below
    gspo        as grpo                           own length; responses clip of the RESPONSE's ratio

This file is only the mathematics and imports only torch. Its last function, offline_ppo_loss,
takes PPO's step on thumbs from a file, without any sampling.

The sign. The paper MAXIMISES L^CLIP = E[min(ratio A, clip(ratio) A)]. Every function named *_loss
here is such a term with a minus sign, to be minimised.

Notation. log is natural. A token is an action y_t, the text before it is its state s_t.
    token_logps      (B, T)  log pi(y_t|s_t) of the policy in training       carries the gradient
    old_token_logps  (B, T)  the same under the policy that sampled
    ref_token_logps  (B, T)  the same under the frozen reference
    values           (B, T)  V(s_t): what the critic expects from y_t on     carries the gradient
    mask             (B, T)  > 0 on response tokens; elsewhere inputs may hold anything, also NaN
    scores           (B,)    the reward of a whole response
ppo_loss and value_loss give one number per token, 0 where mask is 0; the step divides their sum
by the number of tokens. They and whiten also take flat rows, (M,): M tokens that all count. The
losses without a critic take only those; `mean_over` says what the step divides by. They also get
    *_advantages     (M,)    A of the response that a token belongs to
    response         (M,)    which response that is, 0 to b - 1
    response_len     (M,)    how many tokens that response has
float64 in, float64 out.
"""

import math

import torch
import torch.nn.functional as F

# A log-ratio is cut here before exp. In float32 e^89 is inf, and inf * 0 is NaN. e^20 is 4.9e8,
# small enough that its square in the norm of the gradient stays finite too.
MAX_LOG_RATIO = 20.0


# --- 1. the reward model --------------------------------------------------------------------------

def reward_model_loss(chosen_rewards, rejected_rewards, *, centre=0.0):
    """-log sigma(r_w - r_l) + centre (r_w + r_l)^2.   (B,)

    Paper: Ouyang et al. 2022, Training language models to follow instructions with human feedback,
           arXiv 2203.02155 (Eq. 1, one pair per prompt)
    Idea: if P(w beats l) = sigma(r_w - r_l) (Bradley and Terry 1952), these are the rewards under
          which the annotator's choices are likeliest.
    It is log 2 at equal rewards. A constant added to both rewards changes nothing; `centre` > 0
    (0.01, say) draws their mean to 0 (as in TRL, from memory).
    """
    log_likelihood = F.logsigmoid(chosen_rewards - rejected_rewards)
    return -log_likelihood + centre * (chosen_rewards + rejected_rewards) ** 2


# --- 3. a reward for every token ------------------------------------------------------------------

def kl_estimates(token_logps, ref_token_logps):
    """Three estimates of KL(pi || ref) per token that pi has sampled: k1, k2, k3.   (B, T) each

    With d = log pi(y_t|s_t) - log ref(y_t|s_t), in nats:
        k1 = d               unbiased, but negative wherever a token became less likely: noisy
        k2 = d^2 / 2         biased, never negative, correct to second order near pi = ref
        k3 = e^-d - 1 + d    unbiased and never negative: E e^-d = E ref/pi = 1, and e^x >= 1 + x
    (Schulman 2020, joschu.net/blog/kl-approx.html, from memory.) "Unbiased" holds for samples of
    pi itself. With another temperature, or with top-p sampling, the mean of k1 can be anything.
    """
    d = token_logps - ref_token_logps
    largest = math.log(torch.finfo(d.dtype).max) - 1
    inverse_ratio_minus_1 = torch.expm1((-d).clamp(max=largest))     # e^-d - 1, exact for small d
    return d, d ** 2 / 2, inverse_ratio_minus_1 + d


@torch.no_grad()
def token_rewards(scores, token_logps, ref_token_logps, mask, *, kl_coef=0.05):
    """-kl_coef log(pi/ref) on every token, plus the score on the last one.   (B, T)

    Example: three tokens, log pi/ref = 1, 0, -2, score 5, kl_coef 0.1: rewards -0.1, 0, 5.2.
    Their sum, averaged over samples of pi, is E[score] - kl_coef KL(pi || ref): what RLHF
    maximises (Ouyang et al., Eq. 2, without its pretraining term). The penalty is k1, although it
    is noisy: as a reward only k1 has the gradient of the KL.
    0 where mask is 0. A row without any token gets no score.
    """
    on = mask > 0
    position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = torch.where(on, position, -1).amax(1, keepdim=True)                          # (B, 1)
    penalty = torch.where(on, -kl_coef * (token_logps - ref_token_logps), 0.0)
    with_score = penalty + scores[:, None].to(penalty.dtype)
    return torch.where(position == last, with_score, penalty)


# --- 4. was it better than expected? --------------------------------------------------------------

@torch.no_grad()
def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: (advantages, returns).   (B, T) each, 0 where mask is 0

        delta_t   = R_t + gamma V(s_t+1) - V(s_t)          the surprise of one step (Eq. 12)
        A_t       = sum_l>=0 (gamma lam)^l delta_t+l       (1506.02438, Eq. 16), computed backwards:
                  = delta_t + gamma lam A_t+1              (1707.06347, Eq. 11)
        returns_t = A_t + V(s_t)                           what the critic should have said
    V after the last token is 0. With lam = 0 the critic replaces all rewards after this token:
    little noise, but the critic's bias. With lam = 1 A_t is the sum of the rewards to come minus
    V(s_t): no bias, but all the noise. Where mask is 0, reward and value count as 0.
    """
    on = mask > 0
    rewards = torch.where(on, rewards, 0.0)
    values = torch.where(on, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = 0.0
    next_advantage = 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                       # Eq. 12
        advantages[:, t] = delta + gamma * lam * next_advantage                         # Eq. 11
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    advantages = torch.where(on, advantages, 0.0)
    return advantages, advantages + values


@torch.no_grad()
def whiten(x, mask):
    """(x - mean) / sqrt(var + 1e-8) over the mask, 0 elsewhere; var unbiased.   same shape

    The mean is a baseline: subtracting it does not change the expected gradient. The scale makes
    the learning rate independent of the reward's unit. Whiten the WHOLE batch of rollouts before
    it is split: a micro-batch has another mean.
    """
    on = mask > 0
    n = on.sum()
    mean = torch.where(on, x, 0.0).sum() / n.clamp(min=1)
    centred = torch.where(on, x - mean, 0.0)
    variance = (centred ** 2).sum() / (n - 1).clamp(min=1)
    return centred / (variance + 1e-8).sqrt()


# --- 4. without a critic: better than the other responses to this prompt? ------------------------

@torch.no_grad()
def centred_advantages(rewards):
    """R - mean of the group; exactly 0 in a group of equal rewards.   (n, G) -> (n, G)

    Paper: Liu et al. 2025, Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783
    The baseline contains R itself, so on average this is (G - 1) / G of an unbiased advantage.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    ties = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(ties, 0.0, centred)               # a mean of equal numbers may be rounded


@torch.no_grad()
def group_advantages(rewards):
    """(R - mean) / (std + 1e-4) over the group, std unbiased.   (n, G) -> (n, G)

    Paper: Shao et al. 2024, DeepSeekMath, arXiv 2402.03300 (4.1.2); 1e-4 and the unbiased std are
           TRL's; other code differs
    Trap: the division gives every prompt the same weight, however little its responses differ.
    Rewards 0, 0, 0, 0.01 have nearly the advantages of 0, 0, 0, 1: noise in rewards is scaled up.
    """
    return centred_advantages(rewards) / (rewards.std(1, keepdim=True) + 1e-4)


@torch.no_grad()
def loo_advantages(rewards):
    """R_i - mean of the G - 1 others.   (n, G) -> (n, G)

    Paper: Ahmadian et al. 2024, Back to Basics (RLOO), arXiv 2402.14740
    The baseline does not depend on y_i, so the gradient is unbiased. The result is
    centred_advantages times G / (G - 1).
    """
    size = rewards.shape[1]
    return centred_advantages(rewards) * size / (size - 1)


@torch.no_grad()
def batch_advantages(rewards):
    """R - mean of all rewards of the batch.   (n, G) -> (n, G)"""
    return centred_advantages(rewards.reshape(1, -1)).view_as(rewards)


# --- 5. the clipped step --------------------------------------------------------------------------

def clipped(log_ratio, advantages, low, high):
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), for PPO, GRPO and others.   (M,)"""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio)


def ppo_loss(token_logps, old_token_logps, advantages, mask, *, clip=0.2):
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A),  ratio = pi(y_t|s_t) / pi_old(y_t|s_t).

    Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347
           (Eq. 7, negated: a loss to MINIMISE)
    Idea: the policy gradient on samples of a slightly older policy. A token whose ratio has moved
          by eps in the direction of its advantage has no slope left.
    At pi = pi_old it is -A, with the gradient -A grad log pi: REINFORCE's. The min is pessimistic:
    a token that moved the WRONG way (A > 0 and ratio < 1 - eps, or A < 0 and ratio > 1 + eps)
    keeps its slope. Departure: a log-ratio above 20 has no slope either, because its ratio would
    overflow; such a token waits for the next rollouts.
    """
    on = mask > 0
    advantages = torch.where(on, advantages.detach(), 0.0)
    log_ratio = torch.where(on, token_logps - old_token_logps.detach(), 0.0)    # before exp: no inf
    return clipped(log_ratio, advantages, clip, clip)                                   # Eq. 7


def value_loss(values, old_values, returns, mask, *, clip_value=0.2):
    """1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2),  G = returns.

    The critic's regression, with a clip like the policy's: a value that has moved by eps towards
    its target has no slope until the next rollouts. It is not in the paper but in OpenAI's
    baselines and TRL. eps is in units of the REWARD: 0.2 is slow if scores are large; inf switches
    the clip off.
    """
    on = mask > 0
    values = torch.where(on, values, 0.0)
    old_values = torch.where(on, old_values.detach(), 0.0)
    returns = torch.where(on, returns.detach(), 0.0)
    clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def actor_critic_loss(token_logps, values, old_token_logps, old_values, advantages, returns,
                      *, clip=0.2, clip_value=0.2, vf_coef=0.1):
    """ppo_loss + vf_coef value_loss, of flat tokens that all count.   (M,)

    Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347 (Eq. 9)
    Idea: one step for the policy and for the critic, which predicts the rewards to come.
    Departure: without Eq. 9's entropy bonus; the KL penalty in the rewards already keeps the
    policy from collapsing.
    """
    all_count = torch.ones_like(values)
    policy_term = ppo_loss(token_logps, old_token_logps, advantages, all_count, clip=clip)
    critic_term = value_loss(values, old_values, returns, all_count, clip_value=clip_value)
    return policy_term + vf_coef * critic_term


# --- without a critic: flat tokens that all count, (M,) -------------------------------------------

def grpo_loss(token_logps, old_token_logps, ref_token_logps, group_advantages, response_len,
              *, clip=0.2, kl_coef=0.04):
    """[-min(ratio A, clip(ratio) A) + kl_coef k3] / length, A = (R - mean) / std of the group.

    Paper: Shao et al. 2024, DeepSeekMath, arXiv 2402.03300 (Eq. 3 and 4)
    Idea: G responses to one prompt are each other's baseline, so there is no critic.
    k3 = e^-d - 1 + d with d = log pi/ref, per token. Its VALUE is an unbiased estimate of
    KL(pi || ref), but its gradient on samples of pi is that of the other direction, KL(ref || pi).
    Trap: after the division by its own length, a long bad response loses less per token, so wrong
    answers grow long (see dr_grpo). Groups with equal rewards have A = 0: only k3 is left.
    """
    step = clipped(token_logps - old_token_logps, group_advantages, clip, clip)
    k3 = kl_estimates(token_logps, ref_token_logps)[2]
    return (step + kl_coef * k3) / response_len


def dr_grpo_loss(token_logps, old_token_logps, centred_advantages, *, clip=0.2, max_tokens=100.0):
    """-min(ratio A, clip(ratio) A) / max_tokens, A = R - mean of the group.

    Paper: Liu et al. 2025, Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783
    Idea: GRPO without its two divisions: by the response's length and by the group's std.
    What is left is REINFORCE with the group's mean as baseline: (G - 1) / G of the true gradient.
    The divisor is a constant (the authors: the longest response that may be sampled); AdamW
    nearly cancels it. Trap: A is in the reward's units, so scaling the reward scales the step.
    """
    return clipped(token_logps - old_token_logps, centred_advantages, clip, clip) / max_tokens


def dapo_loss(token_logps, old_token_logps, group_advantages, *, clip_low=0.2, clip_high=0.28):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) over the TOKENS of the batch.

    Paper: Yu et al. 2025, DAPO, arXiv 2503.14476 (Eq. 8)
    Idea: all tokens have equal weight, and a token has more room to grow than to shrink.
    With clip 0.2 a token of probability 0.01 may only grow to 0.012, so exploration dies; hence
    the larger clip_high. Departures: groups with equal rewards are not sampled again but have A = 0
    (`ties` in the log); no penalty for responses that are too long.
    """
    return clipped(token_logps - old_token_logps, group_advantages, clip_low, clip_high)


def gspo_loss(token_logps, old_token_logps, group_advantages, response, response_len,
              *, clip_low=3e-4, clip_high=4e-4):
    """-min(s A, clip(s) A) / length on each token, s = exp(mean of the response's log-ratios).

    Paper: Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071 (Eq. 5 and 7)
    Idea: a reward belongs to a response, so the ratio and the clip do too: all its tokens or none.
    The tokens share the response's loss evenly, so their sum is the paper's term. s is a geometric
    mean of ratios, not their product: it stays near 1, hence clips of a few 1e-4. At the first
    update after sampling s = 1, and the gradient is that of GRPO without k3.
    """
    log_ratio = mean_log_ratio(token_logps - old_token_logps, response)
    return clipped(log_ratio, group_advantages, clip_low, clip_high) / response_len


def mean_log_ratio(log_ratio, response):
    """The mean over each response, repeated on all its tokens.   (M,), (M,) -> (M,)"""
    total = torch.zeros_like(log_ratio).index_add(0, response, log_ratio)
    return (total / response.bincount(minlength=len(total)).clamp(min=1))[response]


def rloo_loss(token_logps, loo_advantages):
    """-A log pi(y_t|s_t), A = R - mean of the other responses to the prompt.

    Paper: Ahmadian et al. 2024, Back to Basics (RLOO), arXiv 2402.14740
    Idea: after SFT a language model needs no clip and no critic: REINFORCE with a good baseline.
    A response is one action: its tokens' terms add up to -A log pi(y|x). R contains the penalty
    -kl_coef log pi/ref (the recipe's flag). Trap: no ratio corrects for a policy that has moved, so
    a sample is good for one update only. The value of the loss says nothing: watch R.
    """
    return -loo_advantages * token_logps


def reinforce_loss(token_logps, batch_advantages):
    """-A log pi(y_t|s_t), A = R - mean over the batch.

    Paper: Williams 1992, Simple statistical gradient-following algorithms, Machine Learning 8
    Idea: what was better than average becomes likelier; every other method here refines this.
    Works with one response per prompt. Trap: the baseline mixes prompts, so on an easy prompt even
    a poor response is pushed up. R contains the KL penalty, as in rloo.
    """
    return -batch_advantages * token_logps


def humanline_grpo_loss(token_logps, old_token_logps, ref_token_logps, group_advantages,
                        response_len, *, clip=0.2, kl_coef=0.04, log_eps_p=-1.0, log_eps_r=1.5):
    """grpo_loss of log-ratios clamped to [log_eps_p, log_eps_r], before PPO's clip.

    Paper: Liu et al. 2025, Humanline: Online Alignment as Perceptual Loss, arXiv 2509.24207
    Idea: people misjudge extreme probabilities; a token whose ratio is extreme gets no gradient.
    PPO's clip keeps the slope of a token that has moved the WRONG way; the clamp removes that one
    too. Within the clamp this is GRPO, so the two differ only where pi is far from pi_old. Source:
    the authors' HALOs, train/trainers.py, where the ratio is to a reference that follows the
    policy; here it is to the policy that sampled.
    """
    log_ratio = (token_logps - old_token_logps).clamp(log_eps_p, log_eps_r)
    step = clipped(log_ratio, group_advantages, clip, clip)
    k3 = kl_estimates(token_logps, ref_token_logps)[2]
    return (step + kl_coef * k3) / response_len


# --- offline: each thumb is an episode of one step ------------------------------------------------

def offline_ppo_loss(logratios, desirable, *, clip=0.5, kl_coef=0.1):
    """-min(ratio A, clip(ratio, eps, 1/eps) A) - kl_coef r,  r = log pi/ref, ratio = e^r.   (B,)

    Paper: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization,
           arXiv 2402.01306 (its offline PPO baseline)
    Idea: PPO's clipped step on responses from a file, as if the reference had sampled them;
          the advantage A is +1 for a desirable response and -1 for an undesirable one.
    clip is HALOs' cliprange: the ratio is cut to [clip, 1 / clip]. For samples of the reference
    E[-r] is KL(ref || pi), hence the sign of the penalty: it raises every response a little.
    Departures from HALOs' trainer: the response is ONE action (they take ratios per token), so
    there is no critic, no GAE and nothing to whiten. r is cut at 20 as in ppo_loss.
    """
    ratio = logratios.clamp(max=MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(clip, 1 / clip)
    one = torch.ones_like(ratio)
    advantages = torch.where(desirable, one, -one)
    clipped_step = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return clipped_step - kl_coef * logratios


actor_critic_loss.mean_over = "tokens"   # the others: a sum per response, then a mean over those
dapo_loss.mean_over = "tokens"

LOSSES = {                               # name on the command line -> function
    "offline_ppo": offline_ppo_loss,     # thumbs from a file
    "rm": reward_model_loss,             # pairs -> a reward model
    "ppo": actor_critic_loss,            # prompts and a reward; the policy writes
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "gspo": gspo_loss,
    "rloo": rloo_loss,
    "reinforce": reinforce_loss,
    "humanline_grpo": humanline_grpo_loss,
}


if __name__ == "__main__":                       # a lesson: python ppo.py
    names = ["The", "vents", "are", "dusty", "<end>"]
    old = torch.tensor([[-1.2, -2.0, -0.7, -1.6, -0.4]])         # when the policy wrote them
    ref = torch.tensor([[-1.2, -2.3, -0.7, -2.6, -0.3]])
    now = torch.tensor([[-1.1, -1.7, -0.6, -1.5, -0.5]], requires_grad=True)
    values = torch.tensor([[1.0, 1.2, 1.1, 1.9, 2.4]])           # the critic's guesses
    mask = torch.ones(1, 5)
    rewards = token_rewards(torch.tensor([2.0]), old, ref, mask, kl_coef=0.1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    white = whiten(advantages, mask)
    losses = ppo_loss(now, old, white, mask, clip=0.2)
    slopes, = torch.autograd.grad(losses.sum(), now)
    columns = {"log pi/ref": old - ref, "reward": rewards, "critic": values,
               "advantage": advantages, "whitened": white, "ratio": (now - old).exp(),
               "loss": losses, "slope": slopes}
    print("The policy wrote five tokens, and a judge gave the whole response the score 2.\n")
    print("      " + "".join(f"{title:>{max(8, len(title) + 1)}}" for title in columns))
    for t, name in enumerate(names):
        cells = [f"{column[0, t] + 0.0:{max(8, len(title) + 1)}.3f}"
                 for title, column in columns.items()]
        print(f"{name:6}" + "".join(cells))
    print("""
reward     each token pays 0.1 x its log-ratio; the last one gets the score.
critic     what it expects from this token on; after the end, nothing.
advantage  the surprise at this token, plus 0.95 x the next advantage.
whitened   the advantage, moved and scaled to mean 0 and variance 1.
ratio      pi / pi_old, of a policy that has moved since it wrote this.
loss       -min(ratio A, clip(ratio, 0.8, 1.2) A), A the whitened advantage.
slope      by the token's log-prob: where it is negative, descent makes the
           token likelier. "vents" has already moved by more than 20 % in its
           good direction: its slope is 0 until there are new samples.""")

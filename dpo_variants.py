"""Every paired objective: one prompt, two responses, the better one named. A map of the literature in one file.

    1  imitate, or compare with a reference      sft, dpo
    2  some labels are wrong                     cdpo, rdpo
    3  another curve on the same margin          ipo, ipo_avg, ipo_bernoulli, hinge, exo, discopop
    4  each response against an anchor           dpop, nca, bco_pair, apo_zero, apo_down, sppo, sppo_hard
    5  another distance from the reference       fdpo, tdpo1, tdpo2
    6  pairs that do not count alike             odpo, wpo, beta_dpo
    7  length, and no reference at all           sigmoid_norm, slic, cpo, orpo, simpo, alphapo
    8  a batch is two distributions, not pairs   aot, aot_unpaired
`LOSSES` at the end lists them in this order.

Notation. log is natural; every tensor is (B,), one entry per pair, unless said.
    lw, ll   chosen_logps, rejected_logps             log pi(y|x), SUMS over response tokens, end-of-text included
    c, r     chosen_logratios, rejected_logratios     log pi(y|x) - log pi_ref(y|x); the gradient is the policy's
    h        c - r                                    the margin, all that DPO looks at
    nw, nl   chosen_len, rejected_len                 tokens in those sums, int or float
    aw, al   lw / nw, ll / nl                         log-probs per token; a loss that averages divides visibly
    eps      label_smoothing                          share of labels taken to be the wrong way round
    sg(.)    a constant: no gradient                  sigma(t) = 1 / (1 + e^-t)
Every loss returns one value per pair in input order (aot*: sorted), the batch loss is their mean. float64 in, float64 out.
Data and reference never get a gradient. A hyper-parameter without meaning is a ValueError that names it.

Sources. Equations were read in public code: the authors' where it exists, HALOs' for slic, TRL's for rdpo, hinge, alphapo,
apo*, aot* (with a version where versions differ). The papers themselves could not be read: what rests on other texts says
"secondary", what rests on memory "from memory" (as do authors and titles).
Numerics. log sigma(t) is F.logsigmoid(t): log(sigmoid(-800.)) is -inf. sigma(t) is exp(log sigma(t)): sigmoid(100.) is
exactly 1, so autograd's sigma (1 - sigma) is 0 where 4e-44 is right.
"""

import torch
import torch.nn.functional as F


# --- 1. imitate, or compare with a reference --------------------------------------------------------------------------

def sft_loss(chosen_logps, chosen_len):
    """-lw / nw.   (B,)

    Paper: Ouyang et al. 2022, Training language models to follow instructions with human feedback, arXiv 2203.02155 (its SFT stage)
    Idea: imitate the chosen response; the rejected one is not looked at.
    Per example, for sums such as "dpo + 0.1*sft" (LLaMA-Factory's pref_ftx). TRL's "sft" term is the mean over all chosen TOKENS of
    the batch, so long responses weigh more there; its older rpo_alpha drops real tokens whose id is 0.
    """
    return -chosen_logps / chosen_len


def dpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """-log sigma(beta h), h = c - r.   (B,)

    Paper: Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv 2305.18290
    Idea: beta log(pi/pi_ref) IS a reward, so fitting a Bradley-Terry reward model trains the policy; no sampling, no critic.
    log 2 at policy = reference; gradient -beta sigma(-beta h) on c, the opposite on r. The optimum under Bradley-Terry preferences
    is pi_ref e^(u/beta) / Z. Blind to a constant added to both c and r: both responses may become less likely. SPIN, sDPO (stepwise
    and segment), LD-DPO and TR-DPO are this loss with another reference or mask (train.py, RECIPES).
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


# --- 2. some labels are wrong -----------------------------------------------------------------------------------------

def cdpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, label_smoothing=0.1):
    """-(1 - eps) log sigma(beta h) - eps log sigma(-beta h).   (B,)

    Paper: Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO, ericmitchell.ai/cdpo.pdf
    Idea: cross-entropy with the label 1 - eps in place of 1, so the margin stops at beta h = logit(1 - eps).
    Conservative, but biased: under flips its optimum is not the clean one (rdpo's is). TRL before 0.29: label_smoothing on "sigmoid",
    which ignores it from 0.29 on. LLaMA-Factory's help calls this one "robust DPO": it is not.
    """
    check(beta=beta, label_smoothing=label_smoothing)
    u = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


def rdpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, label_smoothing=0.1):
    """[-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps).   (B,)

    Paper: Chowdhury, Kini, Natarajan 2024, Provably Robust DPO: Aligning Language Models with Noisy Feedback, arXiv 2403.00409
    Idea: if a share eps of the labels is flipped, the expectation of this loss is the clean DPO loss, whatever the policy.
    A MINUS where cDPO has a plus. The price is variance and no lower bound: -16.7 at beta h = 50, eps = 0.2, and the slope in
    beta h, -(sigma(-beta h) + eps / (1 - 2 eps)), never ends. Not R-DPO (2403.19159), which penalises length.
    """
    check(beta=beta, label_smoothing=label_smoothing)
    u = beta * (chosen_logratios - rejected_logratios)
    return (-(1 - label_smoothing) * F.logsigmoid(u) + label_smoothing * F.logsigmoid(-u)) / (1 - 2 * label_smoothing)


# --- 3. another curve on the same margin ------------------------------------------------------------------------------

def ipo_loss(chosen_logratios, rejected_logratios, *, tau=0.1):
    """(h - 1 / (2 tau))^2.   (B,)

    Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036
    Idea: regress the margin on a fixed target, so that preferences without noise do not drive it to infinity.
    Eq. 17, on sums as in the paper's text. tau is one over the margin: a LARGER tau asks for less, and tau -> infinity gives pi_ref
    (the uniform policy only in the paper's toy example, whose pi_ref is uniform). (1 / 2tau)^2 at policy = reference. Optimum over
    pairs from mu x mu: log pi = log pi_ref + p(y beats mu) / tau + const. TRL calls tau beta.
    """
    check(tau=tau)
    return (chosen_logratios - rejected_logratios - 1 / (2 * tau)) ** 2


def ipo_avg_loss(chosen_logratios, rejected_logratios, chosen_len, rejected_len, *, tau=0.1):
    """(c / nw - r / nl - 1 / (2 tau))^2.   (B,)

    Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036 (as TRL, HALOs and LLaMA-Factory code it)
    Idea: IPO per token, so that the target does not depend on length.
    The paper's text has sums; TRL says the authors confirmed averages. nw, nl count tokens by the mask: HALOs counts NON-ZERO
    log-ratios, which is 0/0 = NaN at policy = reference.
    """
    check(tau=tau)
    return (chosen_logratios / chosen_len - rejected_logratios / rejected_len - 1 / (2 * tau)) ** 2


def ipo_bernoulli_loss(chosen_logratios, rejected_logratios, preferred, *, tau=0.1):
    """(h - I / tau)^2, I = 1 where the FIRST response won, else 0.   (B,)

    Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036
    Idea: IPO from one coin flip per pair, in whichever order the two responses come.
    "chosen" and "rejected" mean first and second here. Averaged over both orders of a pair it is ipo + 1 / (4 tau^2): same gradient.
    I is the sample, p* its mean: "p* takes the values 0 and 1" in the Chinese source documents confuses them.
    """
    check(tau=tau)
    h = chosen_logratios - rejected_logratios
    return torch.where(preferred, h - 1 / tau, h) ** 2         # not h - preferred / tau: bool / float is float32


def hinge_loss(chosen_logratios, rejected_logratios, *, beta=0.05):
    """max(0, 1 - beta h).   (B,)

    Paper: Liu et al. 2023, Statistical Rejection Sampling Improves Preference Optimization, arXiv 2309.06657
    Idea: RSO's support-vector DPO: a pair with a margin of 1 / beta is done, and its gradient exactly 0.
    beta is the paper's gamma. With a reference and no regulariser, so not SLiC, which TRL's docs call it in places.
    """
    check(beta=beta)
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def exo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, label_smoothing=1e-3):
    """KL(p || q), p = (sigma(u), sigma(-u)), q = (1 - eps, eps), u = beta h.   (B,)

    Paper: Ji et al. 2024, Towards Efficient Exact Optimization of Language Model Alignment, arXiv 2402.00856
    Idea: DPO and cDPO are the forward KL (label || policy); this is the reverse, mode-seeking one.
    Eq. 16. Minimum 0 at u = logit(1 - eps), as cDPO's; the slope sigma(u) sigma(-u) (u - logit(1 - eps)) dies in both tails.
    eps = 0 is infinite: an error (TRL before 0.29 puts 1e-3, silently). The official code has e^-10 and leaves out log(1 - eps).
    """
    check(beta=beta, label_smoothing=label_smoothing)
    if label_smoothing == 0:
        raise ValueError(f"label_smoothing must be in (0, 0.5), not {label_smoothing}: the KL to a certain label is infinite")
    u = beta * (chosen_logratios - rejected_logratios)
    eps, log_p, log_not_p = u.new_tensor(label_smoothing), F.logsigmoid(u), F.logsigmoid(-u)
    return log_p.exp() * (log_p - torch.log1p(-eps)) + log_not_p.exp() * (log_not_p - eps.log())


def discopop_loss(chosen_logratios, rejected_logratios, *, beta=0.05, tau=0.05):
    """-log sigma(u) sigma(-u / tau) + e^-u sigma(u / tau), u = beta h.   (B,)

    Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models, arXiv 2406.08414
    Idea: found by a language model that proposes losses: logistic while the pair is wrong, exponential once it is right.
    Eq. 5. Not convex: with the default tau it RISES with the margin for beta h in (-0.1185, 0.0719), so where training starts, at
    policy = reference, it pushes both responses the WRONG way (slope in beta h: (1 - log 2) / (4 tau) - 3/4 = +0.784).
    """
    check(beta=beta, tau=tau)
    u = beta * (chosen_logratios - rejected_logratios)
    exponential = (F.logsigmoid(u / tau) - u).clamp(max=log_max(u)).exp()        # e^-u * sigma(u / tau): inf * 0 at u = -800
    return -F.logsigmoid(u) * F.logsigmoid(-u / tau).exp() + exponential


# --- 4. each response against an anchor -------------------------------------------------------------------------------

def dpop_loss(chosen_logratios, rejected_logratios, *, beta=0.3, lam=50.0):
    """-log sigma(beta (h - lam max(0, -c))).   (B,)

    Paper: Pal et al. 2024, Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv 2402.13228
    Idea: DPO may lower both responses; pay lam for each nat that the chosen one falls below the reference.
    Penalty inside beta and sigma (third-party code: outside one or the other; the official repository has no code; beta = 0.3 and
    lam = 50 are secondary). Kink at c = 0, where training starts: subgradient 0; below, the slope in c is 1 + lam times DPO's.
    """
    check(beta=beta, lam=lam)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - lam * F.relu(-chosen_logratios)))


def nca_loss(chosen_logratios, rejected_logratios, *, beta=0.01):
    """-log sigma(beta c) - 1/2 log sigma(-beta c) - 1/2 log sigma(-beta r).   (B,)

    Paper: Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv 2402.05369
    Idea: noise contrastive estimation: tell each response from a sample of the reference, by its own likelihood.
    The chosen reward beta c is held at log 2, above it c is pushed DOWN. The official biasedNCA is bco_pair with a shift of 0.
    """
    check(beta=beta)
    c, r = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(c) - F.logsigmoid(-c) / 2 - F.logsigmoid(-r) / 2


def bco_pair_loss(chosen_logratios, rejected_logratios, reward_shift, *, beta=0.1):
    """-log sigma(beta c - delta) - log sigma(delta - beta r), delta = sg(reward_shift).   (B,)

    Paper: Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment, arXiv 2404.04656
    Idea: a binary classifier "good or bad" whose logit is the reward; its loss bounds DPO's from above.
    delta = sg(`reward_shift`), (): mean of beta * log-ratio over all samples seen. In the paper (secondary) it is the mean of the
    two class means, the same for pairs. TRL from 0.29 has delta = 0, and its paper index prints DPO's formula for this.
    """
    check(beta=beta)
    delta = reward_shift.detach()
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(delta - beta * rejected_logratios)


def apo_zero_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """sigma(-beta c) + sigma(beta r).   (B,)

    Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment, arXiv 2408.06266
    Idea: for chosen responses better than the model's own: one up, the other down, both against the reference.
    Eq. 7. Bounded, so hopeless pairs are left alone, as in KTO: its two halves by label are KTO with z0 = 0.
    """
    check(beta=beta)
    return F.logsigmoid(-beta * chosen_logratios).exp() + F.logsigmoid(beta * rejected_logratios).exp()


def apo_down_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """sigma(beta c) + sigma(-beta h).   (B,)

    Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment, arXiv 2408.06266
    Idea: for chosen responses worse than the model's own: both down, the rejected one further.
    Eq. 8. At policy = reference the two slopes in c cancel exactly: only the rejected response moves in the first step.
    """
    check(beta=beta)
    h = chosen_logratios - rejected_logratios
    return F.logsigmoid(beta * chosen_logratios).exp() + F.logsigmoid(-beta * h).exp()


def sppo_loss(chosen_logratios, rejected_logratios, chosen_win_prob, rejected_win_prob, *, beta=1e-3):
    """(c - (P_w - 1/2) / beta)^2 + (r - (P_l - 1/2) / beta)^2.   (B,)

    Paper: Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, arXiv 2405.00675
    Idea: one step towards the Nash equilibrium of a game: each log-ratio is regressed on how often the response wins.
    P: mean probability of winning against the policy's own samples, a constant. eta = 1 / beta. Twice the official code, which has
    1/2 in front. Two squares, not one of the margin: the responses cannot fall together.
    """
    check(beta=beta)
    target_w, target_l = ((p.detach().type_as(chosen_logratios) - 0.5) / beta for p in (chosen_win_prob, rejected_win_prob))
    return (chosen_logratios - target_w) ** 2 + (rejected_logratios - target_l) ** 2


def sppo_hard_loss(chosen_logratios, rejected_logratios, *, beta=1e-3):
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.   (B,)

    Paper: Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, arXiv 2405.00675
    Idea: SPPO from bare labels: the winner always wins, the loser never.
    sppo with P = (1, 0), as in TRL; twice the official scale. With the default beta the targets are +-500 nats.
    """
    check(beta=beta)
    return (chosen_logratios - 1 / (2 * beta)) ** 2 + (rejected_logratios + 1 / (2 * beta)) ** 2


# --- 5. another distance from the reference ---------------------------------------------------------------------------

def fdpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, divergence="js", alpha=0.5):
    """-log sigma(beta (f'(e^c) - f'(e^r))), f'(u) = log u | log 2u/(1+u) | -1/u | (1 - u^-alpha) / alpha by `divergence`.   (B,)

    Paper: Wang et al. 2023, Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints, arXiv 2309.16240
    Idea: DPO solves a problem with a reverse-KL leash; another f-divergence gives another reward, f'(pi / pi_ref).
    `divergence`: reverse_kl (DPO) | js | forward_kl | alpha, in the order above; constants of f' cancel. alpha -> 0 is reverse_kl,
    alpha -> 1 forward_kl; both ends are allowed. TRL's coefficient is this alpha up to 0.28 (default 1), but 1 - alpha from 0.29 on
    (default .5). Only for losses of a difference: nca or apo have no margin to put f' into.
    """
    check(beta=beta)
    c, r = chosen_logratios, rejected_logratios
    if divergence == "reverse_kl":
        gap = c - r
    elif divergence == "js":
        gap = F.logsigmoid(c) - F.logsigmoid(r)                # log 2 cancels
    elif divergence == "forward_kl":
        gap = power_gap(c, r, 1.0)
    elif divergence == "alpha":
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {alpha}")
        gap = power_gap(c, r, alpha)
    else:
        raise ValueError(f"divergence must be reverse_kl, js, forward_kl or alpha, not {divergence!r}")
    return -F.logsigmoid(beta * gap)


def tdpo1_loss(chosen_logratios, rejected_logratios, chosen_kl, rejected_kl, *, beta=0.1):
    """-log sigma(beta (h - (D_l - D_w))), D = chosen_kl, rejected_kl.   (B,)

    Paper: Zeng et al. 2024, Token-level Direct Preference Optimization, arXiv 2404.11999
    Idea: DPO derived token by token, which leaves the difference of two sequence KLs in the margin.
    D = `chosen_kl`, `rejected_kl`: sum over positions of KL(pi_ref || pi), this direction (official code), gradient through both.
    The "pi_ref | pi" of the source documents is a divergence, not a conditioning.
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - (rejected_kl - chosen_kl)))


def tdpo2_loss(chosen_logratios, rejected_logratios, chosen_kl, rejected_kl, *, beta=0.1, alpha=0.5):
    """-log sigma(beta (h - alpha (D_l - sg(D_w)))), D = chosen_kl, rejected_kl.   (B,)

    Paper: Zeng et al. 2024, Token-level Direct Preference Optimization, arXiv 2404.11999
    Idea: TDPO1 with a weight on the KLs, and no reward for drifting away on the chosen response.
    D_w is a constant: TDPO1's loss falls as D_w grows. The official config trains TDPO1 unless told otherwise.
    """
    check(beta=beta, alpha=alpha)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - alpha * (rejected_kl - chosen_kl.detach())))


# --- 6. pairs that do not count alike ---------------------------------------------------------------------------------

def odpo_loss(chosen_logratios, rejected_logratios, score_gap, *, beta=0.5, alpha=1.0):
    """-log sigma(beta h - alpha log(score_gap)).   (B,)

    Paper: Amini, Vieira, Cotterell 2024, Direct Preference Optimization with an Offset, arXiv 2402.10571
    Idea: a pair that is far apart in score must get further apart in reward.
    The offset is outside beta. A gap below 1 gives a NEGATIVE offset, easier than DPO; a gap <= 0 is a ValueError. No KL term:
    the "+ lambda KL(pi || pi_ref)" of the Chinese source documents (which lack alpha and the log) is in neither paper nor code.
    """
    check(beta=beta, alpha=alpha)
    if not (score_gap > 0).all():
        raise ValueError(f"score_gap must be > 0 in every pair, the smallest is {score_gap.min():g}")
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios) - alpha * score_gap.detach().type_as(chosen_logratios).log())


def wpo_loss(chosen_logratios, rejected_logratios, chosen_weight, rejected_weight, *, beta=0.01, clamp=1.0):
    """-sg(min(clamp, w_w w_l)) log sigma(beta h).   (B,)

    Paper: Zhou et al. 2024, WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv 2406.11827
    Idea: off-policy pairs that the current policy would hardly write count less, as if it had sampled them.
    w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]) under the current policy, no gradient. The product is clamped, as in the
    official code and TRL up to 0.28; TRL from 0.29 on does not clamp (`clamp=inf`). Whether the paper does is not known here.
    """
    check(beta=beta, clamp=clamp)
    weight = (chosen_weight * rejected_weight).detach().clamp(max=clamp)
    return -weight * F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def beta_dpo_loss(chosen_logratios, rejected_logratios, margin_mean, batch_margin_mean, *, beta=0.1, a=0.6):
    """-log sigma(b h), b = sg(max(0.001, beta (1 + a (batch_margin_mean - margin_mean)))).   (B,)

    Paper: Wu et al. 2024, beta-DPO: Direct Preference Optimization with Dynamic beta, arXiv 2407.08639
    Idea: batches with wide margins get a larger beta, batches with narrow ones a smaller.
    Both means are (), of h without beta (official code; the paper has beta in it, secondary): over the global batch, and its moving
    average. Departure: no filtering of outlying pairs, so that every row counts. With a = 0 it is DPO, if beta >= 0.001.
    """
    check(beta=beta, a=a)
    surplus = (batch_margin_mean - margin_mean).detach().type_as(chosen_logratios)
    b = (beta * (1 + a * surplus)).clamp(min=1e-3)
    return -F.logsigmoid(b * (chosen_logratios - rejected_logratios))


# --- 7. length, and no reference at all -------------------------------------------------------------------------------

def sigmoid_norm_loss(chosen_logratios, rejected_logratios, chosen_len, rejected_len, *, beta=5.0):
    """-log sigma(beta (c / nw - r / nl)).   (B,)

    Paper: Lambert et al. 2024, Tulu 3: Pushing Frontiers in Open Language Model Post-Training, arXiv 2411.15124
    Idea: DPO per token: a longer response no longer has the larger reward for being longer.
    beta = 5 is Tulu 3's, from memory; TRL's default of .1 is far too small for a margin per token. Also in SimPO's appendix.
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logratios / chosen_len - rejected_logratios / rejected_len))


def slic_loss(chosen_logps, rejected_logps, target_logps, *, delta=1.0, lam=0.1):
    """max(0, delta - lw + ll) - lam log pi(y_ref | x).   (B,)

    Paper: Zhao et al. 2022, Calibrating Sequence likelihood Improves Conditional Language Generation, arXiv 2210.00045
    Idea: rank the two responses with a margin of delta, and stay near the old model by imitating a third one.
    `target_logps` carries a gradient; y_ref is the SFT target (SLiC-HF, arXiv 2305.10425, another paper), a sample of pi_ref (KTO's
    paper, the Chinese source documents) or y_w (HALOs). Sums, no reference. OLDER than DPO; those documents say the opposite.
    """
    check(delta=delta, lam=lam)
    return F.relu(delta - chosen_logps + rejected_logps) - lam * target_logps


def cpo_loss(chosen_logps, rejected_logps, chosen_len, *, beta=0.1, nll_weight=1.0):
    """-log sigma(beta (lw - ll)) - nll_weight lw / nw.   (B,)

    Paper: Xu et al. 2024, Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation, arXiv 2401.08417
    Idea: DPO with a uniform reference, and likelihood on the chosen response in its place.
    Sums in the margin. Departure: the NLL is per example and per token; the paper's is per sequence, the code's the mean over all
    chosen tokens of the batch. The official repository's HEAD is ARPO, not this. nll_weight = 0 is DPO's reference-free form.
    """
    check(beta=beta, nll_weight=nll_weight)
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) - nll_weight * chosen_logps / chosen_len


def orpo_loss(chosen_logps, rejected_logps, chosen_len, rejected_len, *, lam=0.1):
    """-aw - lam log sigma(log odds(aw) - log odds(al)), log odds(a) = a - log(1 - e^a).   (B,)

    Paper: Hong, Lee, Thorne 2024, ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691
    Idea: SFT with a small odds-ratio penalty on the rejected response; one stage in place of two.
    AVERAGES: with sums log(1 - e^l) is about 0 and the odds are gone. Departure: NLL of the response only (official, TRL: prompt
    too). lam is the paper's, the official code has 1. Odds Ratio PREFERENCE Optimization, not "Policy" (a source document).
    """
    check(lam=lam)
    aw, al = chosen_logps / chosen_len, rejected_logps / rejected_len
    log_odds_ratio = (aw - log1mexp(aw)) - (al - log1mexp(al))
    return -aw - lam * F.logsigmoid(log_odds_ratio)


def simpo_loss(chosen_logps, rejected_logps, chosen_len, rejected_len, *, beta=2.0, gamma=0.5):
    """-log sigma(beta (aw - al) - gamma).   (B,)

    Paper: Meng, Xia, Chen 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734
    Idea: reward = log-prob per token, which is what decoding maximises; win by a margin of gamma.
    gamma is OUTSIDE beta; the official config gives gamma / beta (.25 here). beta is 2 to 10: .1, LLaMA-Factory's default, is far
    off. Nothing holds the policy back but a small learning rate. Simple PREFERENCE Optimization, not "Policy".
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logps / chosen_len - rejected_logps / rejected_len) - gamma)


def alphapo_loss(chosen_logps, rejected_logps, chosen_len, rejected_len, *, alpha=0.25, beta=2.5, gamma=0.1):
    """-log sigma(R_w - R_l - gamma), R = beta (1 - p^-alpha) / alpha, p = e^aw, e^al.   (B,)

    Paper: Gupta et al. 2025, AlphaPO: Reward Shape Matters for LLM Alignment, arXiv 2501.03884
    Idea: SimPO with fdpo's alpha curve: alpha > 0 lets the reward of an unlikely response plunge, so a pair is done sooner.
    alpha -> 0 is SimPO, and alpha = 0 is allowed. Defaults: Mistral-Instruct's. p^-alpha = e^(-alpha a): TRL's e^a is 0 below a =
    -745, so 0^-alpha = inf; TRL also applies alpha to sums when loss_type is sigmoid or hinge.
    """
    check(beta=beta)
    return -F.logsigmoid(beta * power_gap(chosen_logps / chosen_len, rejected_logps / rejected_len, alpha) - gamma)


# --- 8. a batch is two distributions, not pairs -----------------------------------------------------------------------

def aot_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.01, label_smoothing=0.0):
    """-(1 - eps) log sigma(beta d) - eps log sigma(-beta d), d = sort(lw - ll) - sort(lw_ref - ll_ref), in sorted order.   (B,)

    Paper: Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport, arXiv 2406.05882
    Idea: each quantile of the policy's margins must lie above the same quantile of the reference's.
    Quantiles belong to the batch that is sorted: micro-batches change the loss. A row meets its own reference only if both sorts
    agree. eps is cDPO's smoothing. With B = 1 it is dpo (cdpo).
    """
    d = (chosen_logps - rejected_logps).sort().values - (ref_chosen_logps - ref_rejected_logps).detach().sort().values
    return cdpo_loss(d, torch.zeros_like(d), beta=beta, label_smoothing=label_smoothing)


def aot_unpaired_loss(chosen_logratios, rejected_logratios, *, beta=0.01, label_smoothing=0.0):
    """-(1 - eps) log sigma(beta d) - eps log sigma(-beta d), d = sort(c) - sort(r), in sorted order.   (B,)

    Paper: Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport, arXiv 2406.05882
    Idea: the rewards of chosen responses must dominate those of rejected ones, quantile by quantile; no pairs needed.
    TRL before 0.28 calls this one "aot_pair". Batch-coupled like aot; here both sides carry a gradient.
    """
    return cdpo_loss(chosen_logratios.sort().values, rejected_logratios.sort().values, beta=beta, label_smoothing=label_smoothing)


# --- numerics and checks ----------------------------------------------------------------------------------------------

def log_max(x):
    """The largest exponent whose exp stays finite, with room for a factor of e^10.   ()"""
    return x.new_tensor(torch.finfo(x.dtype).max).log() - 10


def log1mexp(x):
    """log(1 - e^x) for x <= 0: by expm1 near 0, where e^x rounds to 1; by log1p below, where 1 - e^x does.   (B,)

    Each branch gets a harmless number where the other is used: the gradient of a branch not taken is 0 * inf = NaN.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)                # a log-prob that was rounded to 0: odds are huge, not infinite
    near, harmless = x > -0.6931471805599453, torch.full_like(x, -0.6931471805599453)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, harmless))),
                       torch.log1p(-torch.exp(torch.where(near, harmless, x))))


def power_gap(a, b, alpha):
    """f(a) - f(b), f(t) = (1 - e^(-alpha t)) / alpha, which is t at alpha = 0.   (B,)

    Where an exponential would overflow, both lose the same factor: inf - inf is NaN, and clamping both would make them equal.
    expm1 keeps the digits of a small alpha; but its backward pass is result + 1, exactly 0 below -37, so only above -1.
    """
    if alpha == 0:
        return a - b
    x, y = -alpha * b, -alpha * a
    excess = (torch.maximum(x, y) - log_max(x)).clamp(min=0).detach()
    e_x, e_y = (torch.where(t > -1, torch.expm1(t), t.exp() - 1) for t in (x - excess, y - excess))
    return (e_x - e_y) / alpha


def check(**hyper):
    """ValueError for a value that leaves a loss no meaning: beta = 0 teaches nothing, beta < 0 the opposite."""
    for name, value in hyper.items():
        if name == "label_smoothing":
            fine, valid = 0 <= value < 0.5, "in [0, 0.5)"
        elif name in ("beta", "tau", "clamp"):
            fine, valid = 0 < value < float("inf") or value == float("inf") and name == "clamp", "> 0"
        else:
            fine, valid = 0 <= value < float("inf"), ">= 0"
        if not fine:
            raise ValueError(f"{name} must be {valid}, not {value}")


LOSSES = {
    "sft": sft_loss, "dpo": dpo_loss,
    "cdpo": cdpo_loss, "rdpo": rdpo_loss,
    "ipo": ipo_loss, "ipo_avg": ipo_avg_loss, "ipo_bernoulli": ipo_bernoulli_loss, "hinge": hinge_loss, "exo": exo_loss,
    "discopop": discopop_loss,
    "dpop": dpop_loss, "nca": nca_loss, "bco_pair": bco_pair_loss, "apo_zero": apo_zero_loss, "apo_down": apo_down_loss,
    "sppo": sppo_loss, "sppo_hard": sppo_hard_loss,
    "fdpo": fdpo_loss, "tdpo1": tdpo1_loss, "tdpo2": tdpo2_loss,
    "odpo": odpo_loss, "wpo": wpo_loss, "beta_dpo": beta_dpo_loss,
    "sigmoid_norm": sigmoid_norm_loss, "slic": slic_loss, "cpo": cpo_loss, "orpo": orpo_loss, "simpo": simpo_loss, "alphapo": alphapo_loss,
    "aot": aot_loss, "aot_unpaired": aot_unpaired_loss,
}

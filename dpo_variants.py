"""Every paired objective: one prompt, two responses, the better one named. A map of the literature.

    1  imitate; compare with a reference    sft, dpo
    2  some labels are wrong                cdpo, rdpo
    3  another curve on the same margin     ipo, ipo_avg, ipo_bernoulli, hinge, exo, discopop
    4  each response against an anchor      dpop, dpo_shift, nca, bco_pair, apo_zero, apo_down
       a fixed target for each              sppo, sppo_hard, cal_dpo
    5  another distance from the reference  fdpo, chipo, tdpo1, tdpo2
    6  some pairs count more                odpo, wpo, beta_dpo
    7  length, and no reference at all      sigmoid_norm, slic, cpo, orpo, simpo, alphapo
    8  a batch as two distributions         aot, aot_unpaired
    9  the policy writes the pair itself    rebel, xpo
`LOSSES` at the end lists them in this order.

Notation. log is natural; every tensor is (B,), one entry per pair, unless said.
    lw, ll   chosen_logps, rejected_logps          log pi(y|x): SUMS over response tokens and end
    c, r     chosen_logratios, rejected_logratios  log pi(y|x) - log pi_ref(y|x)
    h        c - r                                 the margin, all that DPO looks at
    nw, nl   chosen_len, rejected_len              tokens in those sums, int or float
    aw, al   lw / nw, ll / nl                      log-probs per token
    eps      label_smoothing                       share of labels assumed to be flipped
    sg(.)    a constant: no gradient               sigma(t) = 1 / (1 + e^-t)
Every loss returns one value per pair in input order (aot*: sorted); the batch loss is their mean.
float64 in, float64 out. Data and reference never get a gradient. A hyper-parameter out of range
raises a ValueError that names it.

Sources. Equations were read in public code (the authors' where it exists), not in the papers.
"secondary": from another text. "from memory": not looked up. Titles are shortened.
Numerics. log sigma(t) is F.logsigmoid(t), because log(sigmoid(-800.)) is -inf. sigma(t) is
exp(log sigma(t)), because sigmoid(100.) is exactly 1 and its gradient 0 instead of 4e-44.
"""

import torch
import torch.nn.functional as F


# --- 1. imitate; compare with a reference ---------------------------------------------------------

def sft_loss(chosen_logps, chosen_len):
    """-lw / nw.   (B,)

    Paper: Ouyang et al. 2022, Training language models to follow instructions, arXiv 2203.02155
    Idea: imitate the chosen response; the rejected one is not looked at.
    One mean per example, for sums such as "dpo + 0.1*sft". TRL's "sft" is a mean over all TOKENS.
    """
    return -chosen_logps / chosen_len


def dpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """-log sigma(beta h), h = c - r.   (B,)

    Paper: Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290
    Idea: beta log(pi/pi_ref) IS a reward, so fitting a reward model trains the policy itself.
    The slope in c is -beta sigma(-beta h), the slope in r its opposite. If labels follow
    Bradley-Terry with utility u, the optimum is pi_ref e^(u/beta) / Z. A constant added to both c
    and r changes nothing, so both responses may become less likely. SPIN, sDPO, LD-DPO and TR-DPO
    are this loss with another reference or mask (recipes.py).
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


# --- 2. some labels are wrong ---------------------------------------------------------------------

def cdpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, label_smoothing=0.1):
    """-(1 - eps) log sigma(beta h) - eps log sigma(-beta h).   (B,)

    Paper: Mitchell 2023, A note on DPO with noisy preferences, ericmitchell.ai/cdpo.pdf
    Idea: cross-entropy with the label 1 - eps in place of 1: beta h stops at logit(1 - eps).
    With flipped labels its optimum differs from the optimum on clean labels; rdpo's does not.
    (LLaMA-Factory's help calls this loss "robust DPO", which is the name of rdpo.)
    """
    check(beta=beta, label_smoothing=label_smoothing)
    u = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


def rdpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, label_smoothing=0.1):
    """[-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps).   (B,)

    Paper: Chowdhury, Kini, Natarajan 2024, Provably Robust DPO, arXiv 2403.00409
    Idea: if a share eps of the labels is flipped, the mean of this loss is the clean DPO loss.
    The eps term has the opposite sign of cDPO's. The price is a larger variance and no lower
    bound: at eps = 0.2 and beta h = 50 the loss is -16.7. Not R-DPO (arXiv 2403.19159), which
    penalises length.
    """
    check(beta=beta, label_smoothing=label_smoothing)
    u = beta * (chosen_logratios - rejected_logratios)
    right = -(1 - label_smoothing) * F.logsigmoid(u)
    return (right + label_smoothing * F.logsigmoid(-u)) / (1 - 2 * label_smoothing)


# --- 3. another curve on the same margin ----------------------------------------------------------

def ipo_loss(chosen_logratios, rejected_logratios, *, tau=0.1):
    """(h - 1 / (2 tau))^2.   (B,)

    Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning, arXiv 2310.12036
    Idea: regress the margin on a fixed target, so that no pair drives it to infinity.
    Eq. 17, on sums as in the paper's text; TRL calls tau beta. A LARGER tau is a smaller target. If
    mu wrote both responses, the optimum is log pi = log pi_ref + p(y beats mu) / tau + const.
    """
    check(tau=tau)
    return (chosen_logratios - rejected_logratios - 1 / (2 * tau)) ** 2


def ipo_avg_loss(chosen_logratios, rejected_logratios, chosen_len, rejected_len, *, tau=0.1):
    """(c / nw - r / nl - 1 / (2 tau))^2.   (B,)

    Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning, arXiv 2310.12036
    Idea: IPO per token, so that the target does not depend on length.
    This is the IPO of TRL, HALOs and LLaMA-Factory; TRL says that the authors confirmed averages.
    Lengths are counted by the mask. HALOs counts NON-ZERO log-ratios, which gives 0/0 = NaN at
    policy = reference.
    """
    check(tau=tau)
    return (chosen_logratios / chosen_len - rejected_logratios / rejected_len - 1 / (2 * tau)) ** 2


def ipo_bernoulli_loss(chosen_logratios, rejected_logratios, preferred, *, tau=0.1):
    """(h - I / tau)^2, I = 1 where the FIRST response won, else 0.   (B,)

    Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning, arXiv 2310.12036
    Idea: IPO from one coin flip per pair, in whichever order the two responses come.
    "chosen" and "rejected" mean first and second here, `preferred` (bool) is I. Averaged over both
    orders of a pair the loss is ipo + 1 / (4 tau^2): the same gradient.
    """
    check(tau=tau)
    h = chosen_logratios - rejected_logratios
    return torch.where(preferred, h - 1 / tau, h) ** 2       # h - preferred / tau would be float32


def hinge_loss(chosen_logratios, rejected_logratios, *, beta=0.05):
    """max(0, 1 - beta h).   (B,)

    Paper: Liu et al. 2023, Statistical Rejection Sampling (RSO), arXiv 2309.06657
    Idea: a support vector machine on pairs: at a margin of 1 / beta the gradient is exactly 0.
    beta is the paper's gamma. It has a reference and no regulariser, so it is not SLiC.
    """
    check(beta=beta)
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def exo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, label_smoothing=1e-3):
    """KL(p || q), p = (sigma(u), sigma(-u)), q = (1 - eps, eps), u = beta h.   (B,)

    Paper: Ji et al. 2024, Towards Efficient Exact Optimization of Alignment, arXiv 2402.00856
    Idea: DPO and cDPO are the forward KL (label || policy); this is the reverse, mode-seeking one.
    Eq. 16. The minimum, 0, is at u = logit(1 - eps), as cDPO's. The slope goes to 0 in both tails.
    At eps = 0 the loss is infinite, so that is an error.
    """
    check(beta=beta, label_smoothing=label_smoothing)
    require(label_smoothing > 0, "label_smoothing", "in (0, 0.5)", label_smoothing)
    u = beta * (chosen_logratios - rejected_logratios)
    eps = u.new_tensor(label_smoothing)
    log_p = F.logsigmoid(u)
    log_not_p = F.logsigmoid(-u)
    chosen_term = log_p.exp() * (log_p - torch.log1p(-eps))
    return chosen_term + log_not_p.exp() * (log_not_p - eps.log())


def discopop_loss(chosen_logratios, rejected_logratios, *, beta=0.05, tau=0.05):
    """-log sigma(u) sigma(-u / tau) + e^-u sigma(u / tau), u = beta h.   (B,)

    Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms, arXiv 2406.08414
    Idea: found by a language model: logistic at negative margins, exponential at positive ones.
    Eq. 5. With the default tau the loss RISES with the margin for beta h in (-0.1185, 0.0719).
    Training starts there, at h = 0, so both responses are first pushed the WRONG way (slope in
    beta h: (1 - log 2) / (4 tau) - 3/4 = +0.784).
    """
    check(beta=beta, tau=tau)
    u = beta * (chosen_logratios - rejected_logratios)
    log_exponential = F.logsigmoid(u / tau) - u     # e^-u sigma(u / tau) is inf * 0 at u = -800
    exponential = log_exponential.clamp(max=log_max(u)).exp()
    return -F.logsigmoid(u) * F.logsigmoid(-u / tau).exp() + exponential


# --- 4. each response against an anchor -----------------------------------------------------------

def dpop_loss(chosen_logratios, rejected_logratios, *, beta=0.3, lam=50.0):
    """-log sigma(beta (h - lam max(0, -c))).   (B,)

    Paper: Pal et al. 2024, Smaug, arXiv 2402.13228
    Idea: DPO may lower both responses; pay lam for each nat the chosen one falls below pi_ref.
    The penalty is inside beta and sigma; both defaults are secondary. At c = 0, where training
    starts, the curve has a kink: its slope in c is DPO's for c >= 0, 1 + lam times that for c < 0.
    """
    check(beta=beta, lam=lam)
    penalty = lam * F.relu(-chosen_logratios)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - penalty))


def dpo_shift_loss(chosen_logratios, rejected_logratios, *, beta=0.1, lam=0.75):
    """-log sigma(beta (c - lam r)).   (B,)

    Paper: Yang et al. 2025, DPO-Shift, arXiv 2502.07599
    Idea: weigh the rejected response less, so that pushing it down cannot replace raising c.
    Checked against the authors' code, where lam is dpo_lambda (0.7 in one of their recipes) and may
    also grow linearly from 0.5 to 1. 0 < lam <= 1; lam = 1 is DPO. The slope in r is -lam times
    the slope in c.
    Trap: raising BOTH responses by t nats now gains beta (1 - lam) t. So there is no Bradley-Terry
    optimum, and the words that both share are imitated, good or bad.
    """
    check(beta=beta, lam=lam)
    require(0 < lam <= 1, "lam", "in (0, 1]", lam)
    return -F.logsigmoid(beta * (chosen_logratios - lam * rejected_logratios))


def nca_loss(chosen_logratios, rejected_logratios, *, beta=0.01):
    """-log sigma(beta c) - 1/2 log sigma(-beta c) - 1/2 log sigma(-beta r).   (B,)

    Paper: Chen et al. 2024, Noise Contrastive Alignment of Language Models, arXiv 2402.05369
    Idea: by its likelihood alone, tell each response from a sample of the reference.
    The chosen reward beta c is best at log 2; above that c is pushed DOWN. The authors' biased NCA
    is bco_pair with a shift of 0.
    """
    check(beta=beta)
    c = beta * chosen_logratios
    r = beta * rejected_logratios
    return -F.logsigmoid(c) - F.logsigmoid(-c) / 2 - F.logsigmoid(-r) / 2


def bco_pair_loss(chosen_logratios, rejected_logratios, reward_shift, *, beta=0.1):
    """-log sigma(beta c - delta) - log sigma(delta - beta r), delta = sg(reward_shift).   (B,)

    Paper: Jung et al. 2024, Binary Classifier Optimization, arXiv 2404.04656
    Idea: a binary classifier "good or bad" whose logit is the reward; it bounds DPO's loss.
    delta, (), is the mean of beta * log-ratio over all samples seen. In the paper (secondary) it is
    the mean of the two class means, which is the same for pairs. TRL from 0.29 has delta = 0.
    """
    check(beta=beta)
    delta = reward_shift.detach()
    chosen_term = -F.logsigmoid(beta * chosen_logratios - delta)
    return chosen_term - F.logsigmoid(delta - beta * rejected_logratios)


def apo_zero_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """sigma(-beta c) + sigma(beta r).   (B,)

    Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv 2408.06266
    Idea: for chosen responses better than the model's own: chosen goes up, rejected goes down.
    Eq. 7. The loss is bounded, so a badly wrong pair has almost no gradient. Its two halves are KTO
    with z0 = 0.
    """
    check(beta=beta)
    chosen_term = F.logsigmoid(-beta * chosen_logratios).exp()
    return chosen_term + F.logsigmoid(beta * rejected_logratios).exp()


def apo_down_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """sigma(beta c) + sigma(-beta h).   (B,)

    Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv 2408.06266
    Idea: for chosen responses worse than the model's own: both go down, the rejected one further.
    Eq. 8. At policy = reference the two slopes in c cancel exactly: only the rejected response
    moves in the first step.
    """
    check(beta=beta)
    h = chosen_logratios - rejected_logratios
    return F.logsigmoid(beta * chosen_logratios).exp() + F.logsigmoid(-beta * h).exp()


def sppo_loss(chosen_logratios, rejected_logratios, chosen_win_prob, rejected_win_prob,
              *, beta=1e-3):
    """(c - (P_w - 1/2) / beta)^2 + (r - (P_l - 1/2) / beta)^2.   (B,)

    Paper: Wu et al. 2024, Self-Play Preference Optimization, arXiv 2405.00675
    Idea: one step towards a Nash equilibrium: each log-ratio is fitted to its response's win rate.
    P_w, P_l: mean probability of winning against the policy's own samples, a constant. beta is the
    paper's 1 / eta. The official code has half of this loss.
    """
    check(beta=beta)
    target_w = (chosen_win_prob.detach().type_as(chosen_logratios) - 0.5) / beta
    target_l = (rejected_win_prob.detach().type_as(chosen_logratios) - 0.5) / beta
    return (chosen_logratios - target_w) ** 2 + (rejected_logratios - target_l) ** 2


def sppo_hard_loss(chosen_logratios, rejected_logratios, *, beta=1e-3):
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.   (B,)

    Paper: Wu et al. 2024, Self-Play Preference Optimization, arXiv 2405.00675
    Idea: SPPO from bare labels: the winner always wins, the loser never.
    sppo with P = (1, 0), as in TRL. With the default beta the targets are +-500 nats.
    """
    check(beta=beta)
    target = 1 / (2 * beta)
    return (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2


def cal_dpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1):
    """-log sigma(c - r) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.   (B,)

    Paper: Xiao et al. 2024, Cal-DPO: Calibrated Direct Preference Optimization, arXiv 2412.14516
    Idea: DPO fixes only the difference of the two rewards; here each one has a target of its own.
    It is sppo_hard plus DPO at beta = 1: the first term has NO beta in it. Checked against the two
    codes of the authors: the one for Pythia is this, the one for Zephyr halves the squares.
    Trap: the squares dominate. With the default beta their targets are +-5 nats, and at policy =
    reference their slope is 20 times the DPO term's. The optimum, c = -r =
    1 / (2 beta) + sigma(-2 c) / 2, is almost SPPO's.
    """
    check(beta=beta)
    ranking = -F.logsigmoid(chosen_logratios - rejected_logratios)
    return ranking + sppo_hard_loss(chosen_logratios, rejected_logratios, beta=beta)


# --- 5. another distance from the reference -------------------------------------------------------

def fdpo_loss(chosen_logratios, rejected_logratios, *, beta=0.1, divergence="js", alpha=0.5):
    """-log sigma(beta (f'(e^c) - f'(e^r))), f' named by `divergence` and alpha.   (B,)

    Paper: Wang et al. 2023, Beyond Reverse KL, arXiv 2309.16240
    Idea: DPO penalises the reverse KL; another f-divergence gives another reward, f'(pi / pi_ref).
        divergence   f'(u) up to constants, which cancel
        reverse_kl   log u                    this is DPO
        js           log (u / (1 + u))
        forward_kl   -1/u
        alpha        (1 - u^-alpha) / alpha   alpha = 0 is reverse_kl, alpha = 1 forward_kl
    TRL's coefficient is this alpha up to version 0.28, but 1 - alpha from 0.29 on.
    """
    check(beta=beta)
    c = chosen_logratios
    r = rejected_logratios
    if divergence == "reverse_kl":
        gap = c - r
    elif divergence == "js":
        gap = F.logsigmoid(c) - F.logsigmoid(r)
    elif divergence == "forward_kl":
        gap = power_gap(c, r, 1.0)
    elif divergence == "alpha":
        require(0 <= alpha <= 1, "alpha", "in [0, 1]", alpha)
        gap = power_gap(c, r, alpha)
    else:
        require(False, "divergence", "reverse_kl, js, forward_kl or alpha", repr(divergence))
    return -F.logsigmoid(beta * gap)


def chipo_loss(chosen_logratios, rejected_logratios, *, beta=0.05, clip=10.0):
    """-log sigma(clip(beta (phi(c) - phi(r)), -R, R)), phi(t) = e^t + t, R = `clip`.   (B,)

    Paper: Huang et al. 2024, Chi-Squared Preference Optimization, arXiv 2407.13399
    Idea: DPO with KL plus chi-squared in place of KL: moving far from the reference costs more.
    The paper writes phi(z) = z + log z of the ratio z = pi / pi_ref. With Bradley-Terry labels of
    utility u the optimum is pi_ref W(e^((u - const) / beta)), where W(x) e^W(x) = x: ratios grow
    like u / beta, in DPO like e^(u / beta).
    The clip is on the DIFFERENCE of the rewards, R = 2 R_max (Algorithm 1, secondary and from
    memory; one public code clips each reward instead). beta is the larger of the paper's two
    (secondary), R our choice; clip = inf switches it off.
    Trap: beyond R the slope is exactly 0, so a pair that is wrong by more is never corrected. And t
    is the log-ratio of a whole response: 10 nats, common in long ones, are far beyond R.
    """
    check(beta=beta, clip=clip)
    c = chosen_logratios
    r = rejected_logratios
    gap = power_gap(c, r, -1.0) + (c - r)                        # e^c - e^r + c - r
    return -F.logsigmoid((beta * gap).clamp(-clip, clip))


def tdpo1_loss(chosen_logratios, rejected_logratios, chosen_kl, rejected_kl, *, beta=0.1):
    """-log sigma(beta (h - (D_l - D_w))), D = chosen_kl, rejected_kl.   (B,)

    Paper: Zeng et al. 2024, Token-level Direct Preference Optimization, arXiv 2404.11999
    Idea: DPO derived token by token, which leaves the difference of two sequence KLs in the margin.
    D sums KL(pi_ref || pi) over positions, in this direction (official code), with gradient.
    """
    check(beta=beta)
    drift = rejected_kl - chosen_kl
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - drift))


def tdpo2_loss(chosen_logratios, rejected_logratios, chosen_kl, rejected_kl,
               *, beta=0.1, alpha=0.5):
    """-log sigma(beta (h - alpha (D_l - sg(D_w)))), D = chosen_kl, rejected_kl.   (B,)

    Paper: Zeng et al. 2024, Token-level Direct Preference Optimization, arXiv 2404.11999
    Idea: TDPO1 with a weight on the KLs, and no reward for drifting away on the chosen response.
    D_w has no gradient here, because TDPO1's loss falls as D_w grows.
    """
    check(beta=beta, alpha=alpha)
    drift = rejected_kl - chosen_kl.detach()
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - alpha * drift))


# --- 6. some pairs count more ---------------------------------------------------------------------

def odpo_loss(chosen_logratios, rejected_logratios, score_gap, *, beta=0.5, alpha=1.0):
    """-log sigma(beta h - alpha log(score_gap)).   (B,)

    Paper: Amini et al. 2024, Direct Preference Optimization with an Offset, arXiv 2402.10571
    Idea: a pair that is far apart in score must get further apart in reward.
    beta does not multiply the offset. A gap below 1 gives a NEGATIVE offset: easier than DPO. A gap
    <= 0 is an error. There is no KL term, though some texts print one.
    """
    check(beta=beta, alpha=alpha)
    smallest = score_gap.detach().min()
    require(smallest > 0, "score_gap", "> 0 in every pair", f"{smallest:g}")
    offset = alpha * score_gap.detach().type_as(chosen_logratios).log()
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios) - offset)


def wpo_loss(chosen_logratios, rejected_logratios, chosen_weight, rejected_weight,
             *, beta=0.01, clamp=1.0):
    """-sg(min(clamp, w_w w_l)) log sigma(beta h), w = chosen_weight, rejected_weight.   (B,)

    Paper: Zhou et al. 2024, WPO, arXiv 2406.11827
    Idea: pairs that the current policy would hardly write count less, as in its own samples.
    w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]) under the current policy. The product is
    clamped, as in the official code and in TRL up to 0.28, but not from 0.29 on (`clamp=inf`).
    """
    check(beta=beta, clamp=clamp)
    weight = (chosen_weight * rejected_weight).detach().clamp(max=clamp)
    return -weight * F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def beta_dpo_loss(chosen_logratios, rejected_logratios, margin_mean, batch_margin_mean,
                  *, beta=0.1, a=0.6):
    """-log sigma(b h), b = sg(max(0.001, beta (1 + a (batch_margin_mean - margin_mean)))).   (B,)

    Paper: Wu et al. 2024, beta-DPO, arXiv 2407.08639
    Idea: batches with wide margins get a larger beta, batches with narrow ones a smaller.
    batch_margin_mean is the mean of h over the global batch, margin_mean its moving average over
    the steps; both are () and without beta, as in the official code.
    Departure: outlying pairs are not filtered out. a = 0 is DPO.
    """
    check(beta=beta, a=a)
    surplus = (batch_margin_mean - margin_mean).detach().type_as(chosen_logratios)
    b = (beta * (1 + a * surplus)).clamp(min=1e-3)
    return -F.logsigmoid(b * (chosen_logratios - rejected_logratios))


# --- 7. length, and no reference at all -----------------------------------------------------------

def sigmoid_norm_loss(chosen_logratios, rejected_logratios, chosen_len, rejected_len, *, beta=5.0):
    """-log sigma(beta (c / nw - r / nl)).   (B,)

    Paper: Lambert et al. 2024, Tulu 3, arXiv 2411.15124
    Idea: DPO per token: a longer response has no larger reward for being longer.
    beta = 5 is Tulu 3's, from memory; TRL's default of 0.1 is far too small for a margin per token.
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logratios / chosen_len - rejected_logratios / rejected_len))


def slic_loss(chosen_logps, rejected_logps, target_logps, *, delta=1.0, lam=0.1):
    """max(0, delta - lw + ll) - lam log pi(y_ref | x).   (B,)

    Paper: Zhao et al. 2022, Calibrating Sequence likelihood, arXiv 2210.00045
    Idea: rank the two responses with a margin of delta, and imitate a third one to stay near.
    `target_logps` is log pi(y_ref | x), with gradient. y_ref is the SFT target (SLiC-HF, arXiv
    2305.10425), a sample of pi_ref (KTO's paper) or y_w (HALOs). Sums, no reference.
    """
    check(delta=delta, lam=lam)
    return F.relu(delta - chosen_logps + rejected_logps) - lam * target_logps


def cpo_loss(chosen_logps, rejected_logps, chosen_len, *, beta=0.1, nll_weight=1.0):
    """-log sigma(beta (lw - ll)) - nll_weight lw / nw.   (B,)

    Paper: Xu et al. 2024, Contrastive Preference Optimization, arXiv 2401.08417
    Idea: DPO with a uniform reference; the NLL of the chosen response limits the drift instead.
    The margin is of sums. Departure: the NLL is per token; the paper's is per sequence.
    nll_weight = 0 is DPO's reference-free form.
    """
    check(beta=beta, nll_weight=nll_weight)
    ranking = -F.logsigmoid(beta * (chosen_logps - rejected_logps))
    return ranking - nll_weight * chosen_logps / chosen_len


def orpo_loss(chosen_logps, rejected_logps, chosen_len, rejected_len, *, lam=0.1):
    """-aw - lam log sigma(log odds(aw) - log odds(al)), log odds(a) = a - log(1 - e^a).   (B,)

    Paper: Hong, Lee, Thorne 2024, ORPO, arXiv 2403.07691
    Idea: SFT with a small odds-ratio penalty on the rejected response; one stage in place of two.
    Log-probs are AVERAGES: of a sum l, log(1 - e^l) is about 0, so odds would be probabilities.
    Departure: NLL of the response only (official code and TRL: of the prompt too). lam is the
    paper's; their code has 1.
    """
    check(lam=lam)
    aw = chosen_logps / chosen_len
    al = rejected_logps / rejected_len
    log_odds_ratio = (aw - log1mexp(aw)) - (al - log1mexp(al))
    return -aw - lam * F.logsigmoid(log_odds_ratio)


def simpo_loss(chosen_logps, rejected_logps, chosen_len, rejected_len, *, beta=2.0, gamma=0.5):
    """-log sigma(beta (aw - al) - gamma).   (B,)

    Paper: Meng, Xia, Chen 2024, SimPO, arXiv 2405.14734
    Idea: reward = log-prob per token, which is what decoding maximises; win by a margin of gamma.
    beta does not multiply gamma; the official config gives gamma / beta (0.25 here). beta is 2 to
    10; 0.1, a default elsewhere, is far too small. Only a small learning rate limits the drift.
    """
    check(beta=beta)
    return -F.logsigmoid(beta * (chosen_logps / chosen_len - rejected_logps / rejected_len) - gamma)


def alphapo_loss(chosen_logps, rejected_logps, chosen_len, rejected_len,
                 *, alpha=0.25, beta=2.5, gamma=0.1):
    """-log sigma(R_w - R_l - gamma), R = beta (1 - p^-alpha) / alpha, p = e^aw, e^al.   (B,)

    Paper: Gupta et al. 2025, AlphaPO, arXiv 2501.03884
    Idea: SimPO with fdpo's alpha curve: with alpha > 0, unlikely responses have far lower rewards.
    alpha = 0 is SimPO. The defaults are the paper's for Mistral-Instruct. p^-alpha is computed as
    e^(-alpha a): TRL's e^a is 0 below a = -745, and 0^-alpha is inf.
    """
    check(beta=beta)
    gap = power_gap(chosen_logps / chosen_len, rejected_logps / rejected_len, alpha)
    return -F.logsigmoid(beta * gap - gamma)


# --- 8. a batch as two distributions, not pairs ---------------------------------------------------

def aot_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
             *, beta=0.01, label_smoothing=0.0):
    """cdpo's curve at beta d, d = sort(lw - ll) - sort(lw_ref - ll_ref), in sorted order.   (B,)

    Paper: Melnyk et al. 2024, Distributional Preference Alignment of LLMs, arXiv 2406.05882
    Idea: each quantile of the policy's margins must lie above the same quantile of the reference's.
    The k-th smallest margin of the policy is compared with the k-th smallest of the reference,
    even if that is another pair's. So rows are sorted over the whole batch, not a micro-batch.
    """
    margins = (chosen_logps - rejected_logps).sort().values
    ref_margins = (ref_chosen_logps - ref_rejected_logps).detach().sort().values
    d = margins - ref_margins
    return cdpo_loss(d, torch.zeros_like(d), beta=beta, label_smoothing=label_smoothing)


def aot_unpaired_loss(chosen_logratios, rejected_logratios, *, beta=0.01, label_smoothing=0.0):
    """cdpo's curve at beta d, d = sort(c) - sort(r), in sorted order.   (B,)

    Paper: Melnyk et al. 2024, Distributional Preference Alignment of LLMs, arXiv 2406.05882
    Idea: chosen rewards must dominate rejected ones, quantile by quantile; no pairs needed.
    TRL before 0.28 calls this one "aot_pair". Here both sides carry a gradient.
    """
    c = chosen_logratios.sort().values
    r = rejected_logratios.sort().values
    return cdpo_loss(c, r, beta=beta, label_smoothing=label_smoothing)


aot_loss.needs_whole_batch = True               # the loop gives it the global batch in one part
aot_unpaired_loss.needs_whole_batch = True


# --- 9. the policy writes the pair itself ---------------------------------------------------------

def rebel_loss(chosen_logps, rejected_logps, old_chosen_logps, old_rejected_logps, score_gap,
               *, eta=1.0):
    """(d / eta - score_gap)^2, d = (lw - lw_old) - (ll - ll_old).   (B,)

    Paper: Gao et al. 2024, REBEL: Regressing Relative Rewards, arXiv 2404.16767
    Idea: a policy gradient as least squares: log-ratios to the last policy must match rewards.
    lw_old, ll_old: log-probs under the policy that wrote the pair; for pairs from a file, under the
    reference. The optimum is pi_old e^(eta u) / Z, one step of natural policy gradient.
    Checked against the authors' code: it has (d - eta score_gap)^2, which is eta^2 times this, with
    eta = 1 (1e6 for one data set). A tie (gap 0) is no error: its target is d = 0.
    Trap: only eta keeps the policy near pi_old, and nothing keeps it near the reference. If that
    matters, put a KL penalty into the reward.
    """
    check(eta=eta)
    moved = (chosen_logps - old_chosen_logps.detach()) - (rejected_logps
                                                          - old_rejected_logps.detach())
    return (moved / eta - score_gap.detach().type_as(moved)) ** 2


def xpo_loss(chosen_logratios, rejected_logratios, target_logps, *, beta=0.1, alpha=1e-5):
    """-log sigma(beta h) + alpha log pi(y_ref | x), y_ref a sample of the reference.   (B,)

    Paper: Xie et al. 2024, Exploratory Preference Optimization (XPO), arXiv 2405.21046
    Idea: online DPO that explores: responses the reference would give are made less likely.
    On average over y_ref the second term is -alpha KL(pi_ref || pi), up to a constant. Its sign is
    PLUS. Checked against TRL's code, an early draft of which had a minus: that is SLiC's imitation.
    alpha = 1e-5 is TRL's, and alpha = 0 is DPO.
    Trap: log pi has no lower bound, so with a large alpha the policy unlearns the language.
    """
    check(beta=beta, alpha=alpha)
    return dpo_loss(chosen_logratios, rejected_logratios, beta=beta) + alpha * target_logps


# --- numerics and checks --------------------------------------------------------------------------

def log_max(x):
    """The largest exponent whose exp stays finite, with room for a factor of e^10.   ()"""
    return x.new_tensor(torch.finfo(x.dtype).max).log() - 10


def log1mexp(x):
    """log(1 - e^x) for x <= 0.   (B,)

    Near 0, where e^x rounds to 1, expm1 is exact; far below, where 1 - e^x rounds to 1, log1p is.
    log1p gets a harmless number where it is not used, else its gradient would be 0 * inf = NaN.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)     # p = 1: the odds are huge, not infinite
    minus_log2 = torch.full_like(x, -0.6931471805599453)
    near = x > minus_log2
    by_expm1 = torch.log(-torch.expm1(x))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, minus_log2, x)))
    return torch.where(near, by_expm1, by_log1p)


def power_gap(a, b, alpha):
    """f(a) - f(b), f(t) = (1 - e^(-alpha t)) / alpha, which is t at alpha = 0.   (B,)

    Where an exponential would overflow, both are divided by the same factor. Without it inf - inf
    would be NaN, and clamping both would make them equal.
    """
    if alpha == 0:
        return a - b
    x = -alpha * b
    y = -alpha * a
    excess = (torch.maximum(x, y) - log_max(x)).clamp(min=0).detach()
    return (exp_minus_1(x - excess) - exp_minus_1(y - excess)) / alpha


def exp_minus_1(t):
    """e^t - 1.   (B,)   expm1 keeps its digits near 0; its gradient, result + 1, is 0 below -37."""
    return torch.where(t > -1, torch.expm1(t), t.exp() - 1)


def check(**hyper):
    """ValueError for a value out of range: beta = 0 has no gradient, beta < 0 the wrong sign."""
    for name, value in hyper.items():
        if name == "label_smoothing":
            require(0 <= value < 0.5, name, "in [0, 0.5)", value)
        elif name in ("clip", "clamp"):
            require(value > 0, name, "> 0", value)           # inf switches it off
        elif name in ("beta", "tau", "eta"):
            require(0 < value < float("inf"), name, "> 0", value)
        else:
            require(0 <= value < float("inf"), name, ">= 0", value)


def require(fine, name, valid, value):
    if not fine:
        raise ValueError(f"{name} must be {valid}, not {value}")


LOSSES = {
    "sft": sft_loss, "dpo": dpo_loss, "cdpo": cdpo_loss, "rdpo": rdpo_loss,
    "ipo": ipo_loss, "ipo_avg": ipo_avg_loss, "ipo_bernoulli": ipo_bernoulli_loss,
    "hinge": hinge_loss, "exo": exo_loss, "discopop": discopop_loss,
    "dpop": dpop_loss, "dpo_shift": dpo_shift_loss, "nca": nca_loss, "bco_pair": bco_pair_loss,
    "apo_zero": apo_zero_loss, "apo_down": apo_down_loss,
    "sppo": sppo_loss, "sppo_hard": sppo_hard_loss, "cal_dpo": cal_dpo_loss,
    "fdpo": fdpo_loss, "chipo": chipo_loss, "tdpo1": tdpo1_loss, "tdpo2": tdpo2_loss,
    "odpo": odpo_loss, "wpo": wpo_loss, "beta_dpo": beta_dpo_loss,
    "sigmoid_norm": sigmoid_norm_loss, "slic": slic_loss, "cpo": cpo_loss,
    "orpo": orpo_loss, "simpo": simpo_loss, "alphapo": alphapo_loss,
    "aot": aot_loss, "aot_unpaired": aot_unpaired_loss,
    "rebel": rebel_loss, "xpo": xpo_loss,
}


if __name__ == "__main__":                       # a lesson: python dpo_variants.py
    from plumbing import lessons
    lessons.descend_each(LOSSES)

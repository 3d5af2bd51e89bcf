"""KTO: from prospect theory to a loss, in one reading.

Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela 2024, "KTO: Model Alignment as Prospect Theoretic
Optimization", arXiv 2402.01306. The letters are Kahneman-Tversky Optimization; equation numbers
are those of version 4.

Kahneman and Tversky found three things about how people judge an outcome. They compare it with a
REFERENCE POINT: what lies above is a gain, what lies below a loss. Each further unit of gain or
loss counts less (the value is concave above the point, convex below it). And losses may weigh more
than gains (loss aversion). KTO uses all three for a language model:

    prospect theory           here
    an outcome                a response y to a prompt x
    how much it is worth      the implied reward  r(x,y) = log pi(y|x) - log pi_ref(y|x)
    the reference point       z0 = KL(pi || pi_ref), the mean reward of the policy's own responses
    a curve that saturates    the logistic function, in place of (z - z0)^0.88
    risk aversion             beta: how soon it saturates
    loss aversion             lambda_d, lambda_u: weights of desirable and undesirable responses

No pairs are needed: one response with a thumb up or down is a training example.

Notation. log is natural. A log-prob is a SUM over the response's tokens, end-of-text included.
Shapes: B responses in the (micro-)batch; M mismatched pairs (x, y') in the whole global batch.
    logps         (B,)  log pi(y|x) under the policy, with gradient
    logratios     (B,)  r = log pi(y|x) - log pi_ref(y|x), gradient through the policy
    desirable     (B,)  bool: thumb up
    kl_logratios  (M,)  log pi(y'|x) - log pi_ref(y'|x), y' another prompt's response, no gradient
    sigma(t) = 1 / (1 + e^-t)
Every loss returns one value per example, (B,), in input order. The batch loss is the mean over ALL
examples, both classes together (not the sum of two class means). float64 in, float64 out.
"""

import torch
import torch.nn.functional as F


def kto_loss(logratios, desirable, kl_logratios, *, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """lambda_y - v, v = lambda_d sigma(beta (r - z0)) or lambda_u sigma(beta (z0 - r)).   (B,)

    Paper: Ethayarajh et al. 2024, KTO, arXiv 2402.01306
    Idea: one thumb per response; a response's value saturates on both sides of a reference point.
    The gradient in closed form, with z0 constant, u the argument of sigma in v, m the batch size:
        grad L = 1/m sum d(y) lambda_y sigma(u) (1 - sigma(u)) beta grad log pi(y|x)
        d(y) = -1 for a desirable response, +1 for an undesirable one
    A response gets the largest gradient where r is near z0, and almost none once r is far above
    or far below it. (DPO's gradient does not fade for a pair that is badly wrong.)
    At pi = pi_ref every r is 0, z0 = 0 and the loss is lambda_y / 2.
    Source: Eq. 8. Equal to TRL's and the authors' code, except that they estimate z0 per
    micro-batch.
    """
    z0 = reference_point(kl_logratios)
    v = value(logratios, desirable, z0, beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)
    lambda_y = class_weight(desirable, logratios, lambda_d, lambda_u)
    return lambda_y - v                                                                     # Eq. 8


def reference_point(kl_logratios):
    """z0 = max(0, 1/M sum_i [log pi(y'_i|x_i) - log pi_ref(y'_i|x_i)]), no gradient.   () in nats

    The true z0 is KL(pi || pi_ref) >= 0, the mean of r over samples of the POLICY. Sampling at
    every step is slow, so the paper scores responses under prompts that they do not belong to.
    That estimate is biased, often below zero, and therefore clamped. Three things matter:
      - FIRST the mean, THEN the clamp: clamping each term would count only the positive ones.
      - The mean runs over the whole global batch. The mean over one micro-batch, or over one
        process's share, is a different and noisier number.
      - z0 is a constant: the paper found that a gradient through it makes training unstable.
    An empty tensor means z0 = 0 (`--z0 zero`). A tensor of one number fixes z0 (`--z0 1.5`).
    """
    if kl_logratios.numel() == 0:
        return kl_logratios.new_zeros(())
    return kl_logratios.detach().mean().clamp(min=0)                 # section 4.1: mean, then clamp


def value(logratios, desirable, z0, *, beta, lambda_d, lambda_u):
    """v = lambda_d sigma(beta (r - z0)) where desirable, lambda_u sigma(beta (z0 - r)) else.   (B,)

    The human value of a response: concave in gains, convex in losses, 0 < v < lambda_y. beta is
    risk aversion in gains and risk seeking in losses. The logistic replaces Kahneman and
    Tversky's power function, whose slope is infinite at z0.
    """
    u = beta * torch.where(desirable, logratios - z0, z0 - logratios)
    # exp(logsigmoid(u)) is sigma(u) with a gradient that keeps its digits in both tails:
    # sigmoid(100.) is 1. in float64, and autograd's sigma (1 - sigma) would then be exactly 0
    # instead of 4e-44.
    return class_weight(desirable, logratios, lambda_d, lambda_u) * F.logsigmoid(u).exp()


def class_weight(desirable, like, lambda_d, lambda_u):
    """lambda_y per example.   (B,)

    The ratio lambda_d / lambda_u matters most when one class is rare: see Eq. 9 and
    `data.lambda_weights`.
    """
    return torch.where(desirable, torch.full_like(like, lambda_d), torch.full_like(like, lambda_u))


# --- relatives: the same curve, another reference point -------------------------------------------

def kto_uniform_loss(logps, desirable, entropy, *, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """kto_loss with r - z0 = log pi(y|x) + H(pi(.|x)), H = `entropy`.   (B,)

    Paper: Ethayarajh et al. 2024, KTO, arXiv 2402.01306
    Idea: KTO with a uniform reference: compare log pi(y|x) with its mean under the policy.
    No reference model is needed. Let pi_ref give each of N responses the probability 1/N. Then
        r  = log pi(y|x) - log(1/N)  = log pi(y|x) + log N
        z0 = KL(pi || uniform)       = sum_y pi log pi + log N = log N - H,   H = -sum_y pi log pi
        r - z0 = log pi(y|x) + H
    log N cancels and the sign is PLUS. Some texts print a minus, which is wrong by exactly 2H
    unless their "H" is the negative entropy. Check: at pi = uniform every r is z0, and indeed
    log pi + H = -log N + log N = 0. No clamp: the KL is >= 0 by itself.
    `entropy` is (B,) or (), in nats, no gradient: the exact H or an estimate. The authors' early
    code estimates it by -mean log pi(y'|x) over mismatched responses, and so does our training.
    Departure: they average log-probs over tokens, here they are sums as everywhere in this file.
    """
    z0 = -entropy.detach()                                                    # z0 - log N = -H
    v = value(logps, desirable, z0, beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)
    return class_weight(desirable, logps, lambda_d, lambda_u) - v


def apo_zero_unpaired_loss(logratios, desirable, *, beta=0.1):
    """1 - sigma(beta r) where desirable, sigma(beta r) where not.   (B,)

    Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv 2408.06266
    Idea: good responses become likelier than under the reference, bad ones less likely.
    Source: Eq. 7, one half for each label. It is KTO with z0 = 0 and lambda = 1.
    """
    z0 = logratios.new_zeros(())
    return 1 - value(logratios, desirable, z0, beta=beta, lambda_d=1.0, lambda_u=1.0)


def bco_loss(logratios, desirable, reward_shift, *, beta=0.1):
    """-log sigma(+-(beta r - delta)), + where desirable, delta = `reward_shift`.   (B,)

    Paper: Jung et al. 2024, Binary Classifier Optimization, arXiv 2404.04656
    Idea: classify good and bad by the logit beta r - delta, delta the mean reward seen so far.
    delta is (), no gradient: the mean of beta r over all samples seen so far, the current global
    batch included. So the boundary lies between the two classes, not at 0.
    Departure: the paper averages the two class means, TRL (and we) pool the samples.
    The gradient of KTO's sigma fades for a badly wrong example; with log sigma its slope is beta.
    """
    u = beta * logratios - reward_shift.detach()
    return -F.logsigmoid(torch.where(desirable, u, -u))      # log(sigmoid(-800.)) would be -inf


LOSSES = {
    "kto": kto_loss,
    "kto_uniform": kto_uniform_loss,
    "apo_zero_unpaired": apo_zero_unpaired_loss,
    "bco": bco_loss,
}


if __name__ == "__main__":                       # a lesson: python kto.py
    import world

    answers = ["Clean the air vents.", "Let it cool in the shade.", "We will replace it for free.",
               "Lower the brightness.", "Move it closer to the base.", "Read the manual."]
    ref = torch.tensor([0.15, 0.10, 0.10, 0.30, 0.15, 0.20])     # what the policy says at first
    liked = torch.tensor([0.90, 0.75, 0.55, 0.25, 0.20, 0.05])   # share of thumbs that are up
    share = torch.cat([ref * liked, ref * (1 - liked)])          # of each (answer, thumb)
    logits = ref.log().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.2)
    seen = []
    for step in range(401):
        r = logits.log_softmax(0) - ref.log()
        z0 = (logits.softmax(0) * r).sum().detach()              # KL(pi || ref), exactly
        loss = share @ kto_loss(r.repeat(2), torch.arange(12) < 6, z0[None], beta=0.5)
        seen.append([*logits.softmax(0).tolist(), z0.item(), loss.item()])
        logits.grad, = torch.autograd.grad(loss, logits)
        adam.step()
    balances = list(zip(ref.tolist(), (2 * liked - 1).tolist()))
    best = ref * torch.tensor(world.kto_logratios(balances, beta=0.5, z0=z0.item())).exp()
    print("""One prompt, six answers. Customers give thumbs, KTO moves the policy.

My router gets too hot!        thumbs up   step 0     10    100    400    best""")
    notes = [f"{p:8.0%}" for p in liked] + ["    nats", "        "]
    ends = [f"{p:8.3f}" for p in best] + ["", ""]
    for k, name in enumerate([*answers, "z0, the reference point", "mean loss"]):
        cells = "".join(f"{seen[step][k]:7.3f}" for step in (0, 10, 100, 400))
        print(f"{name:30}{notes[k]}   {cells}{ends[k]}")
    print(f"""
At step 0 policy and reference are equal: r = 0, z0 = 0, and every loss is 1/2.
At the end nothing is left that more than half of the customers dislike.
z0 is what the policy gains on average. It rises, and an answer has to beat it:
the third answer gains at first and then falls behind.

The best policy for the last z0, without any training: column "best" (world.py).
The largest distance of step 400 from it: {(logits.softmax(0) - best).abs().max():.4f}""")

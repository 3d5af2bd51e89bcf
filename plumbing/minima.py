"""Small tables of replies whose optimum is exact: claims are checked against them without a run."""

import math
from functools import lru_cache

import numpy as np
import torch

from dpo_variants import dpo_loss
from kto import kto_loss


def solve(loss, n, steps=400):
    """log pi over n replies at the minimum of a population loss of log pi; float64, LBFGS."""
    scores = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([scores], max_iter=steps, tolerance_grad=1e-12,
                               tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        value = loss(torch.log_softmax(scores, 0))
        value.backward()
        return value

    search.step(closure)
    return torch.log_softmax(scores.detach(), 0)


def table_of_replies(seed, n=6):
    """A random reference over n replies and their utilities, float64."""
    draw = torch.Generator().manual_seed(seed)
    ref = torch.randn(n, generator=draw, dtype=torch.float64)
    return torch.log_softmax(ref, 0), torch.randn(n, generator=draw, dtype=torch.float64)


def dpo_minimum(ref, better, beta):
    """Where DPO's population loss is least; better: P(row beats column)   (n, n)"""
    def loss(logp):
        ratios = logp - ref
        chosen, rejected = torch.broadcast_tensors(ratios[:, None], ratios)
        return (better * dpo_loss(chosen, rejected, beta=beta)).sum()
    return solve(loss, len(ref))


def kto_minimum(ref, liked, beta):
    """Where KTO's is, with z0 = 0; liked: the share of thumbs that are up   (n,)"""
    def loss(logp):
        ratios = logp - ref
        up = torch.ones(len(ref), dtype=torch.bool)
        none = ratios.detach()[:0]
        good = kto_loss(ratios, up, none, beta=beta)
        bad = kto_loss(ratios, ~up, none, beta=beta)
        return (liked * good + (1 - liked) * bad).sum()
    return solve(loss, len(ref))


SHARES = np.linspace(0.55, 0.95, 9)


@lru_cache(maxsize=None)
def majority(seed):
    """Of two replies, a share p of annotators prefer a to b, for each p of SHARES.   (3, 9)

    -> pi(b) under KTO; DPO's odds of b, over the reference's; DPO's beta h less logit(p)
    """
    ref, _ = table_of_replies(seed, 2)
    found = []
    for p in SHARES:
        better = torch.tensor([[0, p], [1 - p, 0]], dtype=torch.float64)
        kept = kto_minimum(ref, better.sum(1), beta=0.5)[1].exp().item()
        log_odds = (dpo_minimum(ref, better, beta=0.5) - ref).diff().item()
        found.append((kept, math.exp(log_odds), -0.5 * log_odds - math.log(p / (1 - p))))
    return np.array(found).T


def first_gradients():
    """DPO's gradient over KTO's on one pair, at equal weights."""
    ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    dpo = dpo_loss(ratios[:1], ratios[1:], beta=0.5).mean()
    kto = kto_loss(ratios, torch.tensor([True, False]), ratios.detach()[:0], beta=0.5).mean()
    return (torch.autograd.grad(dpo, ratios)[0] / torch.autograd.grad(kto, ratios)[0]).mean()


def spin_distances(lam, n):
    """Largest less smallest log p_t - log p_data after t = 0..n exact steps, on a random table.

    SPIN's exact step: log p' = (1 - 1/lam) log p + (1/lam) log p_data, normalised.
    """
    p, _ = table_of_replies(0)
    goal = torch.log_softmax(table_of_replies(1)[1], 0)
    distances = []
    for _ in range(n + 1):
        distances.append(float((p - goal).max() - (p - goal).min()))
        p = torch.log_softmax((1 - 1 / lam) * p + goal / lam, 0)
    return distances

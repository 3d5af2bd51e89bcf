"""From runs to verdicts: t intervals over seeds, and exact minima of small tables."""

import math
from functools import lru_cache

import numpy as np
import torch

from dpo_variants import dpo_loss
from kto import kto_loss

HOLDS, FAILS, UNDECIDED = "holds", "does not hold here", "undecided"


# --- checks ---------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def t975(freedom):
    """Student's t: the 97.5 % quantile, for any number of degrees of freedom.

    With t = sqrt(freedom) tan(angle), the density of the angle goes like cos(angle)^(freedom - 1).
    Sum that, and see where 95 % of it lies within +-angle.
    """
    edges = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)
    share = np.append(0, density.cumsum()) / density.sum()
    return math.sqrt(freedom) * math.tan(np.interp(0.95, share, edges))


def interval(values):
    """95 % t interval of the mean over seeds.   (n,) -> (mean, low, high)"""
    values = np.asarray(values, float)
    mean = float(values.mean())
    half = math.inf
    if len(values) > 1:
        half = float(t975(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def check(says, difference, above=0.0, below=math.inf):
    """Does the mean of `difference`, one number per seed, lie between `above` and `below`?"""
    return judged(says, interval(difference), above, below)


def exact(says, got, expected, tolerance):
    """A formula: no training, no seeds."""
    got = (float(got),) * 3
    return judged(f"exact: {says}", got, expected - tolerance, expected + tolerance)


def judged(says, values, above=-math.inf, below=math.inf):
    """One line of a claim's verdict. Of a run that failed the numbers are NaN: undecided."""
    mean, low, high = values
    verdict = UNDECIDED
    if above < low and high < below:
        verdict = HOLDS
    if high < above or low > below:
        verdict = FAILS
    return {"says": says, "mean": mean, "low": low, "high": high, "verdict": verdict}


def overall(checks):
    """The worst of them."""
    verdicts = [check["verdict"] for check in checks]
    return max(verdicts, key=(HOLDS, UNDECIDED, FAILS).index)


class Runs:
    """What a claim's arms gave: runs("dpo", "kl") is one number per seed."""

    def __init__(self, arms, store, seeds):
        # Arms that nobody has run yet are left out: a new objective needs no runs at once.
        self.arms = {label: arm for label, arm in arms.items() if arm.key in store}
        self.store = store
        self.seeds = seeds

    def of(self, label):
        """The runs as they are stored."""
        return [self.store[self.arms[label].key][str(seed)] for seed in range(self.seeds)]

    def __call__(self, label, key):
        """A run that failed gives NaN; of a stored [mean, sd] the mean is taken."""
        return np.array([np.ravel(run.get(key, math.nan))[0] for run in self.of(label)], float)

    def check(self, says, key, label, other, above=0.0):
        """Is arm `label`, less arm `other`, above `above`? Paired by seed."""
        return check(says, self(label, key) - self(other, key), above)

    def like(self, start):
        """The labels that begin so."""
        return [label for label in self.arms if label.startswith(start)]

    def best(self, labels, key="win_rate"):
        """The label with the best mean; an arm that failed is never best."""
        means = [np.nan_to_num(self(label, key), nan=-1e9).mean() for label in labels]
        return labels[int(np.argmax(means))]

    def above_curve(self, label, curve):
        """Reward of an arm less that of a curve, given by its labels, at the same KL; by seed."""
        kl, reward = self(label, "kl"), self(label, "reward")
        curve_kl = np.array([self(point, "kl") for point in curve])
        curve_reward = np.array([self(point, "reward") for point in curve])
        start = self(curve[0], "reward_ref")                 # the curve begins at the reference
        for seed in range(self.seeds):
            order = curve_kl[:, seed].argsort()
            kls = np.append(0, curve_kl[order, seed])
            rewards = np.append(start[seed], curve_reward[order, seed])
            reward[seed] -= np.interp(kl[seed], kls, rewards)
        return reward


# --- exact minima ---------------------------------------------------------------------------------

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

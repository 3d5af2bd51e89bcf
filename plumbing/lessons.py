"""One comparison of two responses, for the lessons of dpo_variants.py and objective.py.

`python dpo_variants.py` prints the page of `descend_each`.
"""

import torch
import torch.nn.functional as F

import data
import objective

A_WINS = 0.8                             # of 100 comparisons A wins 80


def comparison(log_odds, first, first_won=True):
    """What a loss is told of A and B, two responses of one token.   -> objective.Part of one pair

    log_odds = log pi(A) - log pi(B). The reference gives each 1/2. The winner's score is 2 higher.
    A third response, the target, has the mean of both log-probs.
    """
    ours = F.logsigmoid(torch.stack([log_odds, -log_odds]))
    wins = [A_WINS, 1 - A_WINS]
    if first == "B":
        ours = ours.flip(0)
        wins = wins[::-1]
    unit = [data.make_row([0], [1], desirable=won, score=2.0 * won, win_prob=win_prob)
            for won, win_prob in zip((first_won, not first_won), wins)]
    log_half = torch.full((1, 3), 0.5).log()
    mean = ours.mean()
    sums = {objective.position_kl: (log_half[0, 0] - mean).expand(1, 2),
            objective.position_confidence: (ours - torch.logsumexp(2 * ours, 0)).detach()[None]}
    known = {"reward_shift": mean.detach() - log_half[0, 0],                 # at beta = 1
             "margin_mean": torch.zeros(()), "batch_margin_mean": torch.zeros(())}
    logps = torch.cat([ours, mean[None]])[None]                              # (1, 3)
    return objective.Part([unit], logps, log_half, sums, known)


def mean_loss(loss, log_odds, **settings):
    """The mean loss over all comparisons; `settings` replace the loss's defaults.   ()"""
    names, defaults = objective.signature(loss)
    settings = defaults | {key: value for key, value in settings.items() if key in defaults}
    cases = [(A_WINS, "A", True), (1 - A_WINS, "B", True)]       # share, who comes first, it won
    if "preferred" in names:                                     # the winner may also come second
        cases = [(share / 2, first, won) for share, first, won in
                 [*cases, (A_WINS, "B", False), (1 - A_WINS, "A", False)]]
    total = 0.0
    for share, first, first_won in cases:
        told = comparison(log_odds, first, first_won)
        total = total + share * loss(*(told[name] for name in names), **settings).sum()
    return total


def descend_each(losses):
    """A line for each loss: its value and slope at the reference, and where descent ends."""
    print("A beats B in 80 of 100 comparisons. The reference says each half the time.")
    print("beta is 1. Slope: by log pi(A) / pi(B). Descent starts at the reference.\n")
    print("                  loss    slope   pi(A) where descent ends")
    for name, loss in losses.items():
        value, slope, rest = descend(loss)
        print(f"{name:14}{value:9.2f} {slope:+8.2f}{rest:8.2f}  {'#' * round(36 * rest)}")


def descend(loss, steps=30):
    """Descent on the log odds of A, by the slope's sign.  -> first loss, first slope, pi(A)"""
    log_odds = torch.zeros((), requires_grad=True)
    path = []
    stride = 0.5
    for _ in range(steps):
        mean = mean_loss(loss, log_odds, beta=1.0)
        slope, = torch.autograd.grad(mean, log_odds)
        path.append((mean.item(), slope.item()))
        if slope * path[-2:][0][1] < 0:                          # it went too far
            stride = stride / 2
        log_odds.data -= stride * slope.sign()
    return *path[0], log_odds.sigmoid().item()

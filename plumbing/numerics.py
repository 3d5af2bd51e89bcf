"""Exponentials and logarithms of dpo_variants.py that neither overflow nor lose their digits."""

import torch


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

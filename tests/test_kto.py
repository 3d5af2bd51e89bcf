"""Claims about kto.py: every function against a slow scalar oracle, value and gradient."""
import ast
import itertools
import math
from pathlib import Path

import mpmath
import torch

import dpo_variants
import kto
import ppo
from kto import apo_zero_unpaired_loss, bco_loss, kto_loss, kto_uniform_loss, reference_point, value

mp = mpmath.mp.clone()
mp.dps = 600                         # 1 - sigma(1000) = 5e-435 must not cancel away
f64 = torch.float64
RATIOS = [0.0, 1e-4, -1e-4, 3.0, -3.0, 40.0, -40.0, 200.0, -200.0, 1000.0, -1000.0]
EMPTY = torch.empty(0)
SMALLEST = {f64: 2.0 ** -1074, torch.float32: 2.0 ** -149}       # below it all is rounded to 0


# --- oracles: one example at a time, straight from the equations ----------------------------------

def sigma(t):
    return 1 / (1 + mp.exp(-t))


def kto_oracle(r, desirable, z0, beta, lambda_d, lambda_u):
    if desirable:
        return lambda_d * (1 - sigma(beta * (r - z0)))
    return lambda_u * (1 - sigma(beta * (z0 - r)))


def agree(loss, oracle, *, lam=1.0):
    """loss(x (B,), desirable (B,)) -> (B,) is oracle(x_i, desirable_i), and so is its gradient.

    Tolerances. The argument u of sigma is rounded about four times, so it is off by 4 |u| eps. In
    a KTO value that is at most 4 x 0.23 eps, since |u| sigma (1 - sigma) < 0.23; in log sigma it is
    4 |u| eps; and 4 |u| eps relative to the gradient, which behaves like e^-|u|. The rest of the
    16 eps is for exp, product and difference.
    """
    for dtype, thumb in itertools.product((f64, torch.float32), (True, False)):
        eps = torch.finfo(dtype).eps
        x = torch.tensor(RATIOS, dtype=dtype, requires_grad=True)
        out = loss(x, torch.full(x.shape, thumb))
        assert out.shape == x.shape and out.dtype == dtype
        slopes, = torch.autograd.grad(out.sum(), x)
        for given, got, got_slope in zip(x.tolist(), out.tolist(), slopes.tolist()):
            wanted = oracle(mp.mpf(given), thumb)
            slope = mp.diff(lambda t: oracle(t, thumb), mp.mpf(given))
            assert abs(got - wanted) <= 16 * eps * max(lam, abs(wanted)), (given, thumb)
            digits = 16 + 4 * (abs(given) + 4)               # beta <= 1, so |u| <= |x| + 4 in here
            allowed = digits * eps * abs(slope) + SMALLEST[dtype]
            assert abs(got_slope - slope) <= allowed, (given, thumb)


def test_kto_is_equation_8_in_value_and_gradient():
    for kl, z0, beta, lambda_d, lambda_u in [([4.0, -1.0, 3.0], 2, 0.125, 1.0, 0.0),
                                             ([-5.0, 1.0], 0, 1.0, 1.5, 0.75)]:  # exact in binary
        how = dict(beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)
        agree(lambda r, d: kto_loss(r, d, torch.tensor(kl, dtype=r.dtype), **how),
              lambda r, d: kto_oracle(r, d, mp.mpf(z0), **how), lam=1.5)


def test_the_relatives_are_their_equations_in_value_and_gradient():
    entropy = torch.tensor(2.5)
    shift = torch.tensor(-0.75)
    how = dict(beta=0.5, lambda_d=0.5, lambda_u=1.5)
    agree(lambda x, d: kto_uniform_loss(x, d, entropy, **how),                   # log pi + H
          lambda x, d: kto_oracle(x, d, mp.mpf(-2.5), **how), lam=1.5)
    agree(lambda x, d: apo_zero_unpaired_loss(x, d, beta=0.5),
          lambda x, d: 1 - sigma(0.5 * x) if d else sigma(0.5 * x))
    agree(lambda x, d: bco_loss(x, d, shift, beta=0.5),
          lambda x, d: -mp.log(sigma(0.5 * x + 0.75 if d else -0.75 - 0.5 * x)))


# --- the reference point --------------------------------------------------------------------------

def test_the_reference_point_is_the_clamp_of_the_mean_not_the_mean_of_the_clamps():
    for kl, z0 in [([-3.0, 2.0, 4.0], 1.0),      # clamping each would give (0 + 2 + 4) / 3 = 2
                   ([-3.0, 2.0], 0.0),           # clamping each: 1; no clamp: -0.5
                   ([], 0.0), ([1.5], 1.5)]:
        assert reference_point(torch.tensor(kl, dtype=f64)).item() == z0


def test_no_gradient_flows_through_what_is_measured_as_a_constant():
    r = torch.tensor([0.3, -0.2], requires_grad=True)
    thumbs = torch.tensor([True, False])
    for loss in (kto_loss, kto_uniform_loss, bco_loss):
        constant = torch.tensor([0.4, 0.8], requires_grad=True)
        given = constant.mean() if loss is bco_loss else constant
        total = loss(r, thumbs, given).sum()
        of_r, of_constant = torch.autograd.grad(total, (r, constant), allow_unused=True)
        assert of_constant is None and (of_r != 0).all(), loss
    assert not reference_point(constant).requires_grad


# --- what the docstrings claim --------------------------------------------------------------------

def test_at_policy_equals_reference_the_loss_is_half_its_lambda():
    thumbs = torch.tensor([True, False, True, False])
    loss = kto_loss(torch.zeros(4), thumbs, torch.zeros(4), lambda_d=4.0, lambda_u=3.0)
    assert loss.tolist() == [2.0, 1.5, 2.0, 1.5]                 # sigma(0) = 1/2 is exact


def test_the_closed_form_gradient_of_the_docstring_is_autograds():
    beta = 0.3
    m = 40
    r = torch.linspace(-60, 60, m, dtype=f64, requires_grad=True)
    desirable = torch.arange(m) % 3 == 0
    for lambda_d, lambda_u, z in [(4 / 3, 1.0, 2.0), (1.0, 13.0, 0.5)]:
        loss = kto_loss(r, desirable, torch.tensor([z]), beta=beta, lambda_d=lambda_d,
                        lambda_u=lambda_u)
        gradient, = torch.autograd.grad(loss.mean(), r)
        u = beta * torch.where(desirable, r - z, z - r).detach()
        d_lambda = torch.where(desirable, -lambda_d, lambda_u * torch.ones_like(u))
        closed = d_lambda * torch.sigmoid(u) * torch.sigmoid(-u) * beta / m
        torch.testing.assert_close(gradient, closed, rtol=1e-13, atol=0)         # |u| <= 19: 19 eps


def test_value_is_concave_in_gains_and_convex_in_losses():
    r = torch.linspace(-30, 34, 129, dtype=f64)                  # symmetric around z0 = r[64] = 2
    for thumb in (True, False):
        v = value(r, torch.full(r.shape, thumb), torch.tensor(2.0), beta=0.5, lambda_d=3.0,
                  lambda_u=3.0)
        by_gain = v if thumb else v.flip(0)                      # bad ones gain by falling
        bend = by_gain.diff().diff()
        assert (v > 0).all() and (v < 3).all() and v[64] == 1.5
        assert (by_gain.diff() > 0).all()
        assert (bend[:63] > 0).all() and (bend[64:] < 0).all()


def test_any_split_of_the_rows_gives_the_same_losses_if_the_reference_point_is_the_global_one():
    generator = torch.Generator().manual_seed(0)
    r, kl = torch.randn(2, 16, generator=generator, dtype=f64) + 0.5
    thumbs = torch.arange(16) % 2 == 0
    whole = kto_loss(r, thumbs, kl)
    parts = [kto_loss(a, b, kl) for a, b in zip(r.split(4), thumbs.split(4))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=4e-16)      # exp: 1 ulp
    own = [kto_loss(a, b, c) for a, b, c in zip(r.split(4), thumbs.split(4), kl.split(4))]
    assert (torch.cat(own) - whole).abs().max() > 1e-3           # a z0 per part is another loss


def test_each_loss_is_in_input_order_and_falls_as_good_responses_rise_and_bad_ones_fall():
    x = torch.linspace(-9, 9, 12, dtype=f64)
    third = {"kto": [torch.tensor([0.3, 0.9])], "kto_uniform": [torch.tensor(1.7)],
             "apo_zero_unpaired": [], "bco": [torch.tensor(0.2)]}
    good = torch.ones(12, dtype=torch.bool)
    for name, loss in kto.LOSSES.items():
        assert (loss(x, good, *third[name]).diff() < 0).all(), name
        assert (loss(x, ~good, *third[name]).diff() > 0).all(), name
        mixed = torch.arange(12) % 3 == 0
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        shuffled = loss(x[order], mixed[order], *third[name])
        straight = loss(x, mixed, *third[name])[order]
        torch.testing.assert_close(shuffled, straight, rtol=0, atol=1e-15)       # 1 ulp


# --- relatives ------------------------------------------------------------------------------------

def tabular(n):
    """log pi of n responses, their entropy, and the exact KL to the uniform distribution."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(n, dtype=f64, generator=generator).mul(3).log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    kl = (logps.exp() * (logps + math.log(n))).sum()             # sum pi (log pi - log 1/n)
    return logps, entropy, kl


def test_kto_uniform_is_kto_with_a_uniform_reference_and_the_exact_kl_and_a_minus_is_off_by_2H():
    how = dict(beta=0.5, lambda_d=1.75, lambda_u=0.5)
    for n in (2, 7, 1000):
        logps, entropy, kl = tabular(n)
        r = logps + math.log(n)
        thumbs = torch.arange(n) % 2 == 0
        close = dict(rtol=0, atol=1e-14)                         # numbers below 16: a few eps of it
        torch.testing.assert_close(logps + entropy, r - kl, **close)
        with_ref = kto_loss(r, thumbs, kl[None], **how)
        plus = kto_uniform_loss(logps, thumbs, entropy, **how)
        torch.testing.assert_close(plus, with_ref, **close)
        wrong = kto_loss(r, thumbs, (kl + 2 * entropy)[None], **how)
        minus = kto_uniform_loss(logps, thumbs, -entropy, **how)
        torch.testing.assert_close(minus, wrong, **close)
        assert (wrong - with_ref).abs().max() > 0.01             # and that is another loss


def test_apo_zero_unpaired_is_kto_with_a_reference_point_of_zero():
    r = torch.linspace(-50, 50, 21, dtype=f64, requires_grad=True)
    thumbs = torch.arange(21) % 2 == 0
    apo = apo_zero_unpaired_loss(r, thumbs, beta=0.3)
    plain = kto_loss(r, thumbs, EMPTY, beta=0.3)
    assert torch.equal(apo, plain)                               # the same operations
    assert torch.equal(torch.autograd.grad(apo.sum(), r)[0], torch.autograd.grad(plain.sum(), r)[0])


def test_bco_keeps_pushing_where_kto_has_given_up():
    r = torch.tensor([-1000.0], dtype=f64, requires_grad=True)   # desirable and hopelessly unlikely
    thumb = torch.tensor([True])
    bco = bco_loss(r, thumb, torch.tensor(0.0), beta=1.0)
    assert bco.item() == 1000.0                                  # log(sigmoid(-1000)) would be -inf
    assert torch.autograd.grad(bco.sum(), r)[0].item() == -1.0   # the full slope, beta
    plain = kto_loss(r, thumb, EMPTY, beta=1.0)
    assert torch.autograd.grad(plain.sum(), r)[0].item() == 0.0  # e^-1000 underflows


# --- the house ------------------------------------------------------------------------------------

def test_the_files_of_losses_import_torch_alone_and_know_no_device_and_no_dtype():
    for module in (kto, dpo_variants, ppo):
        text = Path(module.__file__).read_text().partition("\nif __name__")[0]   # no lesson
        nodes = list(ast.walk(ast.parse(text)))
        imported = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        assert imported <= {"math", "torch", "torch.nn.functional"}
        assert not any(isinstance(n, ast.ImportFrom) for n in nodes)
        words = {getattr(n, "attr", getattr(n, "id", "")) for n in nodes}
        assert not words & {"cuda", "distributed", "half", "bfloat16", "double", "item"}

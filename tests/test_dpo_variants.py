"""Claims about dpo_variants.py: every loss against a slow scalar oracle with 350 digits, the family tree, exact optima."""
import ast
import inspect
import itertools
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import mpmath
import pytest
import torch
import torch.nn.functional as F

import dpo_variants
import kto
from dpo_variants import LOSSES, log1mexp, power_gap

mp = mpmath.mp.clone()
mp.dps = 350                                     # 1 + e^-745 must not round to 1, nor its difference quotient
TINY, HUGE = 2.0 ** -1022, 1e300                 # below: less than 53 bits are kept; above: inf or a clamp is right
f64 = torch.float64

RATIOS = [0.0, -1e-4, 1e-4, 3.0, -3.0, -40.0, 40.0, 200.0, -200.0, 1000.0, -1000.0]
AVERAGES = [-1e-30, -1e-8, -1e-4, -0.7, -3.0, -40.0, -200.0, -1000.0]
CYCLES = {"chosen_len": [1, 3, 64], "rejected_len": [1, 2, 7, 50], "chosen_kl": [0.0, 0.5, 30.0], "rejected_kl": [2.0, 0.0, 7.0, 100.0],
          "score_gap": [1e-3, 0.25, 1.0, 2.5, 100.0], "chosen_weight": [0.01, 0.3, 0.9, 1.7], "rejected_weight": [0.5, 1.0, 1e-3],
          "chosen_win_prob": [1.0, 0.6, 0.5, 0.2], "rejected_win_prob": [0.0, 0.4, 0.5], "preferred": [True, False],
          "target_logps": [-1.0, -200.0, -1e-30]}
CONSTANT = {"score_gap", "chosen_weight", "rejected_weight", "chosen_win_prob", "rejected_win_prob", "margin_mean", "batch_margin_mean",
            "reward_shift", "ref_chosen_logps", "ref_rejected_logps"}                # measured, but never a gradient
SCALARS = {"margin_mean": 0.5, "batch_margin_mean": 2.0, "reward_shift": -0.75}
PER_PAIR = [name for name in LOSSES if not name.startswith("aot")]


def signature(name):
    ps = inspect.signature(LOSSES[name]).parameters.values()
    return [p.name for p in ps if p.kind != p.KEYWORD_ONLY], {p.name: p.default for p in ps if p.kind == p.KEYWORD_ONLY}


def loss(name, *columns, **hyper):
    """The loss on lists of numbers, in float64."""
    return LOSSES[name](*(torch.tensor(x, dtype=torch.bool if isinstance(x[0], bool) else f64) for x in columns), **hyper)


# --- oracles: one pair at a time, straight from the equations, mpmath only --------------------------------------------

def sigma(t):
    return 1 / (1 + mp.exp(-t))


def L(t):
    return mp.log(1 + mp.exp(-t))


def log_odds(a):
    return a - mp.log(1 - mp.exp(a))


def f_prime(log_u, divergence, alpha):
    u = mp.exp(log_u)
    return {"reverse_kl": lambda: log_u, "js": lambda: mp.log(2 * u / (1 + u)), "forward_kl": lambda: -1 / u,
            "alpha": lambda: (1 - u ** -mp.mpf(alpha)) / alpha}[divergence]()


def alpha_reward(a, alpha, beta):
    return beta * (1 - mp.exp(a) ** -mp.mpf(alpha)) / alpha


ORACLES = {
    "sft": lambda lw, nw: -lw / nw,
    "dpo": lambda c, r, beta: L(beta * (c - r)),
    "cdpo": lambda c, r, beta, label_smoothing: (1 - label_smoothing) * L(beta * (c - r)) + label_smoothing * L(beta * (r - c)),
    "rdpo": lambda c, r, beta, label_smoothing: ((1 - mp.mpf(label_smoothing)) * L(beta * (c - r)) - label_smoothing * L(beta * (r - c)))
        / (1 - 2 * mp.mpf(label_smoothing)),
    "ipo": lambda c, r, tau: (c - r - 1 / (2 * mp.mpf(tau))) ** 2,
    "ipo_avg": lambda c, r, nw, nl, tau: (c / nw - r / nl - 1 / (2 * mp.mpf(tau))) ** 2,
    "ipo_bernoulli": lambda c, r, first_won, tau: (c - r - (1 if first_won else 0) / mp.mpf(tau)) ** 2,
    "hinge": lambda c, r, beta: max(mp.mpf(0), 1 - beta * (c - r)),
    "exo": lambda c, r, beta, label_smoothing: sigma(beta * (c - r)) * (mp.log(sigma(beta * (c - r))) - mp.log(1 - mp.mpf(label_smoothing)))
        + sigma(beta * (r - c)) * (mp.log(sigma(beta * (r - c))) - mp.log(label_smoothing)),
    "discopop": lambda c, r, beta, tau: L(beta * (c - r)) * sigma(-beta * (c - r) / tau) + mp.exp(-beta * (c - r)) * sigma(beta * (c - r) / tau),
    "dpop": lambda c, r, beta, lam: L(beta * (c - r - lam * max(mp.mpf(0), -c))),
    "nca": lambda c, r, beta: L(beta * c) + L(-beta * c) / 2 + L(-beta * r) / 2,
    "bco_pair": lambda c, r, delta, beta: L(beta * c - delta) + L(-(beta * r - delta)),
    "apo_zero": lambda c, r, beta: 1 - sigma(beta * c) + sigma(beta * r),
    "apo_down": lambda c, r, beta: sigma(beta * c) + 1 - sigma(beta * (c - r)),
    "sppo": lambda c, r, pw, pl, beta: (c - (pw - 0.5) / mp.mpf(beta)) ** 2 + (r - (pl - 0.5) / mp.mpf(beta)) ** 2,
    "sppo_hard": lambda c, r, beta: (c - 1 / (2 * mp.mpf(beta))) ** 2 + (r + 1 / (2 * mp.mpf(beta))) ** 2,
    "fdpo": lambda c, r, beta, divergence, alpha: L(beta * (f_prime(c, divergence, alpha) - f_prime(r, divergence, alpha))),
    "tdpo1": lambda c, r, dw, dl, beta: L(beta * (c - r - (dl - dw))),
    "tdpo2": lambda c, r, dw, dl, beta, alpha: L(beta * (c - r - alpha * (dl - dw))),
    "odpo": lambda c, r, gap, beta, alpha: L(beta * (c - r) - alpha * mp.log(gap)),
    "wpo": lambda c, r, ww, wl, beta, clamp: min(ww * wl, clamp) * L(beta * (c - r)),
    "beta_dpo": lambda c, r, mean, batch_mean, beta, a: L(max(mp.mpf(1e-3), beta * (1 + a * (batch_mean - mean))) * (c - r)),
    "sigmoid_norm": lambda c, r, nw, nl, beta: L(beta * (c / nw - r / nl)),
    "slic": lambda lw, ll, lt, delta, lam: max(mp.mpf(0), delta - lw + ll) - lam * lt,
    "cpo": lambda lw, ll, nw, beta, nll_weight: L(beta * (lw - ll)) - nll_weight * lw / nw,
    "orpo": lambda lw, ll, nw, nl, lam: -lw / nw + lam * L(log_odds(lw / nw) - log_odds(ll / nl)),
    "simpo": lambda lw, ll, nw, nl, beta, gamma: L(beta * (lw / nw - ll / nl) - gamma),
    "alphapo": lambda lw, ll, nw, nl, alpha, beta, gamma: L(alpha_reward(lw / nw, alpha, beta) - alpha_reward(ll / nl, alpha, beta) - gamma),
}
OTHER = {                                        # what to try besides the defaults
    "dpo": [dict(beta=1.0)], "cdpo": [dict(beta=0.5, label_smoothing=0.25), dict(label_smoothing=0.0)], "rdpo": [dict(beta=0.5, label_smoothing=0.4)],
    "ipo": [dict(tau=1.0)], "ipo_avg": [dict(tau=0.7)], "ipo_bernoulli": [dict(tau=0.7)], "hinge": [dict(beta=0.7)],
    "exo": [dict(beta=1.0, label_smoothing=0.3)], "discopop": [dict(beta=1.0, tau=0.5)], "dpop": [dict(beta=0.5, lam=5.0)],
    "bco_pair": [dict(reward_shift=2.0, beta=1.0)], "tdpo2": [dict(beta=1.0, alpha=2.0)], "odpo": [dict(beta=0.1, alpha=0.5)],
    "fdpo": [dict(divergence="reverse_kl"), dict(divergence="forward_kl"), dict(divergence="alpha", alpha=0.25)],
    "wpo": [dict(clamp=math.inf, beta=1.0)], "beta_dpo": [dict(margin_mean=5.0, batch_margin_mean=-20.0), dict(beta=1.0, a=0.0)],
    "slic": [dict(delta=10.0, lam=1.0)], "cpo": [dict(beta=1.0, nll_weight=0.25)], "orpo": [dict(lam=4.0)], "simpo": [dict(beta=10.0, gamma=-1.0)],
    "alphapo": [dict(alpha=-0.5, beta=1.0), dict(alpha=1.0)], "sppo": [dict(beta=0.5)], "sppo_hard": [dict(beta=0.5)],
    "nca": [dict(beta=1.0)], "apo_zero": [dict(beta=1.0)], "apo_down": [dict(beta=1.0)],
}


def table(name, first=None, **scalars):
    """{measured name: column of numbers}: every pair of RATIOS (or AVERAGES times lengths), the rest in cycles."""
    wants = signature(name)[0]
    first = first or list(itertools.product(*[AVERAGES if "logps" in wants[0] else RATIOS] * 2))
    columns = {n: [CYCLES[n][i % len(CYCLES[n])] for i in range(len(first))] for n in wants if n in CYCLES}
    for side, values in zip(("chosen", "rejected"), zip(*first)):
        lengths = columns.get(side + "_len", [1] * len(first))
        if "logps" in wants[0]:
            columns[side + "_logps"] = [a * n for a, n in zip(values, lengths)]
        else:
            columns[side + "_logratios"] = list(values)
    return {n: columns[n] if n in columns else {**SCALARS, **scalars}[n] for n in wants}


def tensors(columns, dtype=f64):
    """Lengths stay integers and `preferred` bool; everything else is a leaf that asks for a gradient."""
    kind = lambda n: torch.int64 if n.endswith("_len") else torch.bool if n == "preferred" else dtype
    return {n: torch.tensor(v, dtype=kind(n), requires_grad=kind(n) == dtype) for n, v in columns.items()}


def gradients(out, measured):
    """{name: gradient or None} of the sum, for what asks for one."""
    leaves = {n: t for n, t in measured.items() if t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(out.sum(), leaves.values(), allow_unused=True)))


def near(got, wanted, where, slack=0):
    """An argument u of exp is rounded four times or so, which makes e^-u wrong by 4 |u| eps relative; it underflows beyond
    |u| = 745, so 745 x 4 x 2.2e-16 = 7e-13 < 2e-12. `slack`: the size of terms that cancel. e^1000 need only be large."""
    assert not math.isnan(got), where
    if abs(wanted) > HUGE:
        assert got * mp.sign(wanted) > HUGE / 1e10, where
        return
    assert abs(got - wanted) <= 2e-12 * (abs(wanted) + slack) + TINY, (where, got, float(wanted))


@pytest.mark.parametrize("name, how", [(n, how) for n in ORACLES for how in [{}] + OTHER.get(n, [])], ids=str)
def test_each_loss_is_its_equation_in_value_and_gradient_from_moderate_to_extreme(name, how):
    wants, defaults = signature(name)
    hyper = {**defaults, **{k: v for k, v in how.items() if k in defaults}}
    thin = list(itertools.product(*[AVERAGES[::2] if "logps" in wants[0] else RATIOS[::2]] * 2)) if how else None    # to save time
    columns = table(name, thin, **{k: v for k, v in how.items() if k not in defaults})
    measured = tensors(columns)
    out = LOSSES[name](*measured.values(), **hyper)
    size = len(columns[wants[0]])
    assert out.shape == (size,) and out.dtype == f64
    slopes = gradients(out, measured)
    for n in slopes:
        assert (slopes[n] is None) == (n in CONSTANT or (name, n) == ("tdpo2", "chosen_kl")), f"{n}: a constant has no gradient"
        assert slopes[n] is None or not slopes[n].isnan().any()
    for i in range(size):
        row = [c[i] if isinstance(c, list) else c for c in columns.values()]
        row = [mp.mpf(x) if isinstance(x, float) else x for x in row]
        wanted = ORACLES[name](*row, **hyper)
        near(out[i].item(), wanted, (name, row))
        if wanted > HUGE:                                                            # the slopes of a loss of e^1000 are not NaN: enough
            continue
        for k, n in enumerate(wants):
            if slopes.get(n) is None or (name, n, row[0]) == ("dpop", "chosen_logratios", 0):        # a kink: has its own test
                continue
            slack = hyper["beta"] * sigma(hyper["beta"] * row[0]) * sigma(-hyper["beta"] * row[0]) if name == "apo_down" else 0
            near(slopes[n][i].item(), mp.diff(lambda x: ORACLES[name](*row[:k], x, *row[k + 1:], **hyper), row[k]), (name, n, row), slack)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot_is_its_equation_on_sorted_rows_in_value_and_gradient(e):
    first = [(-5.0, -9.0), (-300.0, -2.0), (-1.0, -1000.0), (-40.0, -40.5), (-7.0, -3.0)]
    other = [(-6.0, -8.0), (-200.0, -3.0), (-4.0, -4.25), (-90.0, -10.0), (-1.0, -80.0)]
    for name, margins in [("aot", lambda a, b: ([x - y for x, y in a], [x - y for x, y in b])),
                          ("aot_unpaired", lambda a, b: ([x for x, _ in a], [y for _, y in a]))]:
        up, down = margins(first, other)
        columns = dict(zip(signature(name)[0], [*zip(*first), *zip(*other)]))
        measured = tensors(columns)
        out = LOSSES[name](*measured.values(), beta=0.3, label_smoothing=e)
        slopes = gradients(out, measured)
        d = [mp.mpf(x) - mp.mpf(y) for x, y in zip(sorted(up), sorted(down))]
        curve = lambda t: (1 - mp.mpf(e)) * L(0.3 * t) + e * L(-0.3 * t)
        for i, t in enumerate(d):                                                    # the i-th smallest pair of order statistics
            near(out[i].item(), curve(t), (name, i))
            slope = mp.diff(curve, t)
            near(slopes[signature(name)[0][0]][up.index(sorted(up)[i])].item(), slope, (name, i))
            lower = slopes["rejected_logps"][up.index(sorted(up)[i])] if name == "aot" else slopes["rejected_logratios"][down.index(sorted(down)[i])]
            near(lower.item(), -slope, (name, i))
        if name == "aot":
            assert slopes["ref_chosen_logps"] is None and slopes["ref_rejected_logps"] is None


# --- shape, type, order, no NaN ---------------------------------------------------------------------------------------

def small(name, pairs):
    """A table of moderate numbers; for aot the reference holds each response for the other one."""
    if name == "aot":
        chosen, rejected = ([-abs(x) - 1 for x in side] for side in zip(*pairs))
        return {"chosen_logps": chosen, "rejected_logps": rejected, "ref_chosen_logps": rejected, "ref_rejected_logps": chosen}
    return table(name, pairs if "logratios" in signature(name)[0][0] else [(-abs(x) - 0.1, -abs(y) - 0.1) for x, y in pairs])


PAIRS = [(0.5, -1.0), (-2.0, 1.5), (3.0, 0.25), (-0.75, -4.0), (1.25, 2.75)]


@pytest.mark.parametrize("dtype", [f64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_one_number_per_pair_in_the_dtype_it_was_given(name, dtype):
    for pairs in (PAIRS, PAIRS[:1]):                                                 # and a batch of one
        out = LOSSES[name](*tensors(small(name, pairs), dtype).values())
        assert out.shape == (len(pairs),) and out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("name", PER_PAIR)
def test_a_pair_has_the_same_loss_alone_in_a_batch_and_in_any_order(name):
    measured = tensors(small(name, PAIRS))
    whole = LOSSES[name](*measured.values())
    pick = lambda index: LOSSES[name](*(t if t.dim() == 0 else t[index] for t in measured.values()))
    for index in [[i] for i in range(5)] + [[3, 0, 4, 1, 2]]:
        torch.testing.assert_close(pick(torch.tensor(index)), whole[index], rtol=4e-16, atol=4e-16)      # vector and scalar exp: 1 ulp


@pytest.mark.parametrize("name", [n for n in LOSSES if n.startswith("aot")])
def test_aot_does_not_care_about_the_order_of_rows_and_knows_only_the_batch_it_sorts(name):
    measured = list(tensors(small(name, PAIRS)).values())
    whole = LOSSES[name](*measured)
    assert torch.equal(LOSSES[name](*(t[[3, 0, 4, 1, 2]] for t in measured)), whole)
    halves = torch.cat([LOSSES[name](*(t[:2] for t in measured)), LOSSES[name](*(t[2:] for t in measured))])
    assert (halves.sum() - whole.sum()).abs() > 1e-9                                 # micro-batches would be another loss


@pytest.mark.parametrize("dtype", [f64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_ever_nan_in_value_or_gradient(name, dtype):
    extreme = [-1000.0, -80.0, -1e-30, 0.0, 1e-30, 80.0, 1000.0]                     # 0 as an average log-prob too: p = 1 exactly
    pairs = list(itertools.product(extreme, extreme))
    for how in [{}] + [h for h in OTHER.get(name, []) if not set(h) & set(SCALARS)]:
        if "logps" in signature(name)[0][0]:
            columns = table(name, [(-abs(x), -abs(y)) for x, y in pairs]) if name != "aot" else small(name, pairs)
        else:
            columns = table(name, pairs)
        measured = tensors(columns, dtype)
        out = LOSSES[name](*measured.values(), **how)
        assert not out.isnan().any(), how
        for n, g in gradients(out, measured).items():
            assert g is None or not g.isnan().any(), (how, n)
            assert g is None or dtype != f64 or how or g.isfinite().all(), n         # with the defaults nothing even overflows


def test_overflow_is_never_inf_minus_inf_even_at_strange_settings():
    x = torch.tensor([-1000.0, -1000.0, -900.0, 1000.0, -1000.0], dtype=f64, requires_grad=True)
    y = torch.tensor([-1000.0, -900.0, -1000.0, -1000.0, 1000.0], dtype=f64, requires_grad=True)
    ones = torch.ones(5, dtype=torch.int64)
    for out, equal in [(LOSSES["alphapo"](x, y, ones, ones, alpha=2.0, gamma=0.0), math.log(2)),
                       (LOSSES["fdpo"](x, y, divergence="forward_kl"), math.log(2)),
                       (LOSSES["discopop"](x, y, beta=1.0, tau=3.0), None)]:
        slopes = torch.autograd.grad(out.sum(), (x, y))
        assert all(g.isfinite().all() for g in slopes) and out[4] > 1e280
        if equal:
            assert out[0].item() == pytest.approx(equal, rel=1e-15)                  # the true value, not a clamp
            assert out[1] > 1e280 and out[2] == 0 and out[3] == 0                    # the side of the truth, where it is e^2000
            assert slopes[0][1] < -1e280 and slopes[0][2] == 0                       # and its slope: up, and steeply


# --- policy = reference -----------------------------------------------------------------------------------------------

AT_THE_REFERENCE = {                             # one value per loss, straight from the equations with c = r = 0
    "dpo": math.log(2), "cdpo": math.log(2), "rdpo": math.log(2), "ipo": 25.0, "ipo_avg": 25.0, "hinge": 1.0,
    "exo": -math.log(2) - 0.5 * (math.log(1 - 1e-3) + math.log(1e-3)), "discopop": 0.5 * math.log(2) + 0.5, "dpop": math.log(2),
    "nca": 2 * math.log(2), "bco_pair": math.log1p(math.exp(-0.75)) + math.log1p(math.exp(0.75)), "apo_zero": 1.0, "apo_down": 1.0,
    "sppo_hard": 500000.0, "fdpo": math.log(2), "beta_dpo": math.log(2), "sigmoid_norm": math.log(2), "aot_unpaired": math.log(2),
}


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_at_policy_equals_reference_the_loss_is_the_closed_value(name):
    out = LOSSES[name](*tensors(table(name, [(0.0, 0.0)] * 3)).values())
    assert out.tolist() == pytest.approx([AT_THE_REFERENCE[name]] * 3, rel=1e-15)    # a few roundings


def test_at_policy_equals_reference_the_rest_is_closed_too():
    zero = [0.0, 0.0]
    assert loss("ipo_bernoulli", zero, zero, [True, False]).tolist() == [100.0, 0.0]
    assert loss("sppo", zero, zero, [1.0, 0.6], [0.0, 0.4], beta=0.5).tolist() == pytest.approx([2.0, 0.08], rel=1e-15)
    assert loss("odpo", [0.0], [0.0], [3.0]).item() == pytest.approx(math.log(4), rel=1e-15)         # log(1 + gap^alpha)
    assert loss("wpo", [0.0], [0.0], [0.5], [0.5]).item() == pytest.approx(math.log(2) / 4, rel=1e-15)
    for name in ("tdpo1", "tdpo2"):                                                  # both KLs are 0 as well
        assert loss(name, zero, zero, zero, zero).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    apart = loss("aot", [-3.0, -8.0], [-5.0, -1.0], [-3.0, -8.0], [-5.0, -1.0])
    assert apart.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert set(PER_PAIR) - set(AT_THE_REFERENCE) == {"sft", "ipo_bernoulli", "sppo", "odpo", "wpo", "tdpo1", "tdpo2",
                                                     "slic", "cpo", "orpo", "simpo", "alphapo"}      # the last five know no reference


def test_a_batch_of_one_at_policy_equals_reference_is_finite_for_every_loss():
    for name in LOSSES:
        if "logratios" in signature(name)[0][0]:
            measured = tensors(table(name, [(0.0, 0.0)]))
            out = LOSSES[name](*measured.values())
            assert out.isfinite().all() and all(g is None or g.isfinite().all() for g in gradients(out, measured).values()), name


# --- the family tree --------------------------------------------------------------------------------------------------

GRID = torch.tensor([0.0, 1e-4, -1e-4, 0.5, -2.0, 3.0, 17.0, -40.0, 200.0, -1000.0], dtype=f64)
C, R = (x.flatten().requires_grad_() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
ONES = torch.ones(100, dtype=torch.int64)
NUMBERS = torch.linspace(0.1, 3, 100, dtype=f64)


def same(left, right, *inputs, rtol=1e-15, atol=1e-300):
    """Equal values, equal gradients. rtol: the same curve on an argument that is rounded once or twice differently."""
    torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs or (C, R), retain_graph=True) for x in (left, right))):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


V = SimpleNamespace(**LOSSES)


def test_cdpo_without_smoothing_is_dpo():
    same(V.cdpo(C, R, label_smoothing=0.0), V.dpo(C, R))


def test_rdpo_without_flips_is_dpo():
    same(V.rdpo(C, R, label_smoothing=0.0), V.dpo(C, R))


def test_dpop_without_penalty_is_dpo():
    same(V.dpop(C, R, lam=0.0, beta=0.1), V.dpo(C, R))


def test_dpop_is_dpo_wherever_the_chosen_response_has_not_fallen_and_costs_more_where_it_has():
    fine = C >= 0
    torch.testing.assert_close(V.dpop(C, R, beta=0.1)[fine], V.dpo(C, R)[fine], rtol=0, atol=0)
    assert (V.dpop(C, R, beta=0.1)[~fine] > V.dpo(C, R)[~fine]).any() and (V.dpop(C, R, beta=0.1) >= V.dpo(C, R)).all()


def test_dpop_at_its_kink_the_reference_has_dpos_gradient_and_just_below_lam_plus_one_times_it():
    c = torch.tensor([0.0, -1e-12], dtype=f64, requires_grad=True)
    slope, = torch.autograd.grad(V.dpop(c, torch.zeros(2), beta=0.1, lam=4.0).sum(), c)
    assert slope.tolist() == pytest.approx([-0.05, -0.25], rel=1e-12)                # relu's subgradient at 0 is 0


def test_odpo_without_offset_is_dpo():
    same(V.odpo(C, R, NUMBERS, alpha=0.0, beta=0.1), V.dpo(C, R))
    same(V.odpo(C, R, torch.ones(100), beta=0.1), V.dpo(C, R))                       # log 1 = 0


def test_odpo_asks_less_than_dpo_below_a_gap_of_one_and_more_above():
    gap = torch.tensor([0.5, 2.0], dtype=f64)
    below, above = V.odpo(torch.ones(2), torch.zeros(2), gap, beta=0.1) - V.dpo(torch.ones(2), torch.zeros(2))
    assert below < 0 < above


def test_odpo_has_no_kl_term():
    far = V.odpo(C + 50, R + 50, NUMBERS)                                            # both responses e^50 times likelier: any KL would show
    torch.testing.assert_close(far, V.odpo(C, R, NUMBERS), rtol=1e-11, atol=0)       # 50 is not exact next to 1e-4


def test_beta_dpo_without_adaptation_is_dpo():
    same(V.beta_dpo(C, R, torch.tensor(3.0), torch.tensor(-7.0), a=0.0), V.dpo(C, R))
    same(V.beta_dpo(C, R, torch.tensor(3.0), torch.tensor(3.0)), V.dpo(C, R))        # a batch like the average


def test_beta_dpo_uses_one_beta_for_the_batch_and_never_one_below_a_thousandth():
    mean, batch = torch.tensor(1.0, dtype=f64), torch.tensor(6.0, dtype=f64)
    same(V.beta_dpo(C, R, mean, batch), V.dpo(C, R, beta=0.4))                       # 0.1 (1 + 0.6 x 5)
    same(V.beta_dpo(C, R, batch, mean), V.dpo(C, R, beta=1e-3))                      # 0.1 (1 - 3) < 0


def test_wpo_with_equal_weights_is_dpo_and_its_clamp_bounds_the_product_not_the_factors():
    same(V.wpo(C, R, torch.ones(100), torch.ones(100), beta=0.1), V.dpo(C, R))
    two, third = torch.full((100,), 2.0, dtype=f64), torch.full((100,), 0.25, dtype=f64)
    same(V.wpo(C, R, two, third, beta=0.1), 0.5 * V.dpo(C, R))                       # clamped factors would give 0.25
    same(V.wpo(C, R, two, two, beta=0.1), V.dpo(C, R))
    same(V.wpo(C, R, two, two, beta=0.1, clamp=math.inf), 4 * V.dpo(C, R))


def test_tdpo_without_kls_or_without_alpha_is_dpo():
    nothing = torch.zeros(100)
    same(V.tdpo1(C, R, nothing, nothing), V.dpo(C, R))
    same(V.tdpo2(C, R, nothing, nothing), V.dpo(C, R))
    same(V.tdpo2(C, R, NUMBERS, NUMBERS.flip(0), alpha=0.0), V.dpo(C, R))


def test_tdpo2_with_alpha_one_has_the_value_of_tdpo1_but_holds_the_chosen_kl_constant():
    dw, dl = NUMBERS.clone().requires_grad_(), NUMBERS.flip(0).requires_grad_()
    one, two = V.tdpo1(C, R, dw, dl), V.tdpo2(C, R, dw, dl, alpha=1.0)
    same(one, two, C, R, dl)
    assert torch.autograd.grad(two.sum(), dw, allow_unused=True) == (None,)
    assert (torch.autograd.grad(one.sum(), dw)[0] <= 0).all()                        # TDPO1 rewards drifting on the chosen response


def test_sigmoid_norm_and_ipo_avg_of_single_tokens_are_dpo_and_ipo_and_use_each_sides_own_length():
    same(V.sigmoid_norm(C, R, ONES, ONES, beta=0.1), V.dpo(C, R))
    same(V.ipo_avg(C, R, ONES, ONES), V.ipo(C, R))
    same(V.sigmoid_norm(4 * C, 2 * R, 4 * ONES, 2 * ONES), V.dpo(C, R, beta=5.0))
    same(V.ipo_avg(4 * C, 2 * R, 4 * ONES, 2 * ONES), V.ipo(C, R))


def test_fdpo_with_reverse_kl_is_dpo_and_the_alpha_family_runs_from_it_to_forward_kl():
    same(V.fdpo(C, R, divergence="reverse_kl"), V.dpo(C, R))
    same(V.fdpo(C, R, divergence="alpha", alpha=0.0), V.dpo(C, R))
    same(V.fdpo(C, R, divergence="alpha", alpha=1.0), V.fdpo(C, R, divergence="forward_kl"))
    near_0, near_1 = (x[(C.abs() < 20) & (R.abs() < 20)] for x in (V.fdpo(C, R, divergence="alpha", alpha=1e-9), V.dpo(C, R)))
    torch.testing.assert_close(near_0, near_1, rtol=1e-7, atol=0)                    # alpha c^2 / 2 < 1.5e-7


def test_alphapo_at_alpha_to_zero_is_simpo():
    lw, ll = -C.abs() - 0.5, -R.abs() - 0.25
    same(V.alphapo(lw, ll, ONES, ONES, alpha=0.0, beta=2.0, gamma=0.5), V.simpo(lw, ll, ONES, ONES))
    for alpha in (1e-12, -1e-12):
        limit = V.alphapo(lw, ll, ONES, ONES, alpha=alpha, beta=2.0, gamma=0.5)
        torch.testing.assert_close(limit, V.simpo(lw, ll, ONES, ONES), rtol=2e-6, atol=1e-300)       # alpha beta a^2 / 2 = 1e-6


def test_alphapo_is_simpo_with_fdpos_alpha_curve():
    lw, ll = -C.abs(), -R.abs()
    same(V.alphapo(lw, ll, ONES, ONES, alpha=0.5, beta=0.7, gamma=0.0), V.fdpo(lw, ll, beta=0.7, divergence="alpha", alpha=0.5))


def test_simpo_without_gamma_is_cpo_without_nll_on_averages_and_reference_free_dpo():
    same(V.simpo(3 * C, 5 * R, 3 * ONES, 5 * ONES, gamma=0.0, beta=0.1), V.dpo(C, R), rtol=1e-13)    # 3c / 3 is rounded
    same(V.cpo(C, R, ONES, nll_weight=0.0), V.dpo(C, R))


def test_simpos_gamma_is_outside_beta():
    assert loss("simpo", [-1.0], [-2.0], [1], [1], beta=2.0, gamma=2.0).item() == pytest.approx(math.log(2), rel=1e-15)


def test_cpo_is_reference_free_dpo_plus_weighted_sft_and_orpo_without_odds_is_sft():
    same(V.cpo(C, R, 4 * ONES, nll_weight=0.5), V.dpo(C, R) + 0.5 * V.sft(C, 4 * ONES))
    lw, ll = -C.abs(), -R.abs()
    torch.testing.assert_close(V.orpo(lw, ll, 2 * ONES, ONES, lam=0.0), V.sft(lw, 2 * ONES), rtol=0, atol=0)


def test_orpo_on_sums_would_not_see_the_odds():
    lw, ll = torch.tensor([-60.0], dtype=f64), torch.tensor([-90.0], dtype=f64)     # 30 tokens of 2 and 3 nats
    once = torch.ones(1)
    assert V.orpo(lw, ll, once, once) + lw == pytest.approx((0.1 * V.dpo(lw, ll, beta=1.0)).item(), rel=1e-9)        # a bare margin
    odds = V.orpo(lw, ll, 30 * once, 30 * once) + lw / 30
    assert (odds - 0.1 * V.dpo(lw / 30, ll / 30, beta=1.0)).abs() > 1e-3


def test_ipo_in_both_orders_is_the_dataset_form_plus_a_constant():
    for tau in (0.1, 0.7):
        won, lost = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
        both = (V.ipo_bernoulli(C, R, won, tau=tau) + V.ipo_bernoulli(R, C, lost, tau=tau)) / 2
        same(both, V.ipo(C, R, tau=tau) + 1 / (4 * tau ** 2), rtol=1e-12)            # squares up to 1e6 next to 0.5


@pytest.mark.parametrize("e", [0.05, 0.2, 0.45])
def test_rdpo_is_unbiased_its_mean_over_flips_is_the_clean_dpo_loss(e):
    mean = (1 - e) * V.rdpo(C, R, label_smoothing=e) + e * V.rdpo(R, C, label_smoothing=e)
    torch.testing.assert_close(mean, V.dpo(C, R), rtol=1e-12, atol=1e-12)            # terms of 1000 x 100 cancel to 1e-44
    biased = (1 - e) * V.cdpo(C, R, label_smoothing=e) + e * V.cdpo(R, C, label_smoothing=e)
    assert (biased - V.dpo(C, R)).abs().max() > 1


def test_rdpo_is_unbounded_below_and_cdpo_is_not():
    assert loss("rdpo", [50.0], [0.0], beta=1.0, label_smoothing=0.2).item() == pytest.approx(-50 / 3, rel=1e-12)
    assert (V.cdpo(C, R) > 0).all()


def test_apo_zero_is_the_sum_of_its_two_unpaired_halves_which_are_kto_with_a_reference_point_of_zero():
    up, down = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    halves = kto.apo_zero_unpaired_loss(C, up) + kto.apo_zero_unpaired_loss(R, down)
    by_kto = kto.kto_loss(C, up, torch.empty(0)) + kto.kto_loss(R, down, torch.empty(0))
    torch.testing.assert_close(V.apo_zero(C, R), halves, rtol=0, atol=4e-16)         # 1 - sigma(x) there, sigma(-x) here
    torch.testing.assert_close(V.apo_zero(C, R), by_kto, rtol=0, atol=4e-16)


def test_bco_pair_is_the_sum_of_its_two_unpaired_halves_and_bounds_dpo_from_above():
    shift, up, down = torch.tensor(0.4, dtype=f64), torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    same(V.bco_pair(C, R, shift), kto.bco_loss(C, up, shift) + kto.bco_loss(R, down, shift))
    assert (V.bco_pair(C, R, shift) >= V.dpo(C, R)).all()                            # sigma(a) sigma(b) <= sigma(a + b)


def test_nca_is_biased_nca_made_symmetric_on_the_chosen_side():
    biased = V.bco_pair(C, R, torch.tensor(0.0), beta=0.01)                          # L(beta c) + L(-beta r)
    same(V.nca(C, R), biased + (V.dpo(-C, torch.zeros(100), beta=0.01) - V.dpo(torch.zeros(100), R, beta=0.01)) / 2, rtol=1e-12)


def test_sppo_hard_is_sppo_with_certain_wins_and_twice_the_official_scale():
    won, lost = torch.ones(100), torch.zeros(100)
    same(V.sppo_hard(C, R, beta=0.5), V.sppo(C, R, won, lost, beta=0.5))
    official = 0.5 * (C - 0.5 / 0.5) ** 2 + 0.5 * (R + 0.5 / 0.5) ** 2
    same(V.sppo_hard(C, R, beta=0.5), 2 * official)


def test_exo_is_the_reverse_kl_to_the_label_and_cdpo_the_forward_kl():
    e, u = 0.2, torch.linspace(-30, 30, 61, dtype=f64)
    zero, p = torch.zeros(61, dtype=f64), torch.stack([u.sigmoid(), (-u).sigmoid()])
    q = torch.tensor([1 - e, e], dtype=f64)[:, None]
    reverse, forward = (p * (p / q).log()).sum(0), (q * (q / p).log()).sum(0)
    entropy = -(1 - e) * math.log(1 - e) - e * math.log(e)
    torch.testing.assert_close(V.exo(u, zero, beta=1.0, label_smoothing=e), reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(V.cdpo(u, zero, beta=1.0, label_smoothing=e) - entropy, forward, rtol=1e-12, atol=1e-14)
    assert (reverse - forward).abs().max() > 1                                       # not each other


def test_aot_of_one_pair_is_dpo_and_with_smoothing_cdpo():
    lw, ll, rw, rl = (torch.tensor([x], dtype=f64) for x in (-5.0, -9.0, -6.0, -7.5))
    assert torch.equal(V.aot(lw, ll, rw, rl, beta=0.1), V.dpo((lw - ll) - (rw - rl), torch.zeros(1)))
    assert torch.equal(V.aot_unpaired(lw - rw, ll - rl, label_smoothing=0.2), V.cdpo(lw - rw, ll - rl, beta=0.01, label_smoothing=0.2))


def test_aot_compares_the_sorted_not_the_row_and_equals_dpo_where_rows_are_sorted_alike():
    c, r = torch.tensor([3.0, 1.0, 2.0], dtype=f64), torch.tensor([0.0, -1.0, 5.0], dtype=f64)
    assert torch.equal(V.aot_unpaired(c, r, beta=0.1), V.dpo(torch.tensor([1.0, 2.0, 3.0], dtype=f64), torch.tensor([-1.0, 0.0, 5.0], dtype=f64)))
    ordered = torch.tensor([-2.0, 0.0, 7.0], dtype=f64)
    assert torch.equal(V.aot(ordered, torch.zeros(3), ordered / 2, torch.zeros(3), beta=0.1), V.dpo(ordered, ordered / 2))


def test_dpo_does_not_see_a_constant_added_to_both_policy_or_both_reference_log_probs():
    lw, ll, rw, rl = torch.linspace(-40, -1, 4 * 7, dtype=f64).view(7, 4).unbind(1)
    for shift in (8.0, -1024.0):
        for a, b in (((lw + shift) - rw, (ll + shift) - rl), (lw - (rw + shift), ll - (rl + shift))):
            torch.testing.assert_close(V.dpo(a, b), V.dpo(lw - rw, ll - rl), rtol=1e-13, atol=0)     # 1024 eps of rounding


def test_spin_is_dpo_whose_reference_is_the_opponent():
    real, generated, opp_real, opp_generated = torch.tensor([[-3.0], [-4.0], [-3.5], [-3.25]], dtype=f64)
    lam = 0.1
    spin = torch.log1p(torch.exp(-lam * ((real - opp_real) - (generated - opp_generated))))
    torch.testing.assert_close(V.dpo(real - opp_real, generated - opp_generated, beta=lam), spin, rtol=1e-15, atol=0)


def test_at_the_reference_dpo_has_four_times_the_gradient_of_kto():
    m, beta = 5, 0.3
    c, r = torch.zeros(2, m, dtype=f64, requires_grad=True)
    dpo = V.dpo(c, r, beta=beta).mean()
    of_kto = kto.kto_loss(torch.cat([c, r]), torch.arange(2 * m) < m, torch.empty(0), beta=beta).mean()      # the same 2 m responses
    assert (dpo.item(), of_kto.item()) == pytest.approx((math.log(2), 0.5), rel=1e-15)
    for a, b in zip(torch.autograd.grad(dpo, (c, r)), torch.autograd.grad(of_kto, (c, r))):
        assert b.abs().min() > 0
        torch.testing.assert_close(a, 4 * b, rtol=1e-15, atol=0)


def test_tdpo_on_one_token_replies_is_dpo_in_value_and_tdpo1_in_gradient_too():
    logits, ref = torch.randn(2, 5, dtype=f64, generator=torch.Generator().manual_seed(3))
    logits.requires_grad_()
    logps, ref = logits.log_softmax(0), ref.log_softmax(0)
    kl = (ref.exp() * (ref - logps)).sum()                                           # both replies sit at the one position of one prompt
    c, r, kls = (logps - ref)[:1], (logps - ref)[1:2], kl[None]
    dpo, one, two = V.dpo(c, r), V.tdpo1(c, r, kls, kls), V.tdpo2(c, r, kls, kls)
    grad = lambda x: torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.stack([one, two]), torch.stack([dpo, dpo]), rtol=1e-15, atol=0)
    torch.testing.assert_close(grad(one), grad(dpo), rtol=0, atol=1e-16)
    extra = 0.5 * 0.1 * torch.sigmoid(-0.1 * (c - r)).detach() * grad(kl)            # alpha beta sigma(-beta h) grad D
    torch.testing.assert_close(grad(two), grad(dpo) + extra, rtol=0, atol=1e-16)


# --- up with the chosen, down with the rejected: where it is not so ---------------------------------------------------

LINE = [0.0, 1e-3, -1e-3, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 9.0, -9.0, 30.0, -30.0, 100.0, -100.0, 600.0, -600.0]
NEVER = lambda p: False
past = lambda where: (where, where)
TURNS = {  # where the chosen response is pushed DOWN, where the rejected one is pushed UP; everything else is as it should be
    "ipo": past(lambda p: p.c - p.r > 5),                                            # past the target 1 / (2 tau) the margin is too wide
    "ipo_avg": past(lambda p: p.c / p.chosen_len - p.r / p.rejected_len > 5),
    "ipo_bernoulli": past(lambda p: p.c - p.r > (10 if p.preferred else 0)),         # the second one won: the margin must come down to 0
    "cdpo": past(lambda p: 0.1 * (p.c - p.r) > math.log(9)),                         # surer than its label, 0.9
    "exo": past(lambda p: 0.1 * (p.c - p.r) > math.log(999)),
    "discopop": past(lambda p: -0.1185 < 0.05 * (p.c - p.r) < 0.0719),               # the bump, the reference itself included
    "nca": (lambda p: 0.01 * p.c > math.log(2), NEVER),                              # likelier than a sample of the reference should be
    "apo_down": (lambda p: abs(p.c) < abs(p.c - p.r), NEVER),                        # on purpose: both down
    "sppo": (lambda p: p.c > (p.chosen_win_prob - 0.5) / 1e-3, lambda p: p.r < (p.rejected_win_prob - 0.5) / 1e-3),  # past its target
    "sppo_hard": (lambda p: p.c > 500, lambda p: p.r < -500),
}


@pytest.mark.parametrize("name", [n for n in PER_PAIR if n != "sft"] + ["aot_unpaired"])          # sft knows no rejected response
def test_chosen_is_pushed_up_and_rejected_down_except_where_the_loss_turns(name):
    wants = signature(name)[0]
    pairs = list(itertools.product(LINE, LINE))
    if "logps" in wants[0]:
        pairs = [(-abs(x) - 1e-4, -abs(y) - 1e-4) for x, y in pairs]
    columns = table(name, pairs)
    measured = tensors(columns)
    slopes = gradients(LOSSES[name](*measured.values()), measured)
    turns = TURNS.get(name, (NEVER, NEVER))
    for i, (c, r) in enumerate(pairs):
        here = SimpleNamespace(c=c, r=r, **{n: v[i] for n, v in columns.items() if isinstance(v, list)})
        on_c, on_r = slopes[wants[0]][i].item(), slopes[wants[1]][i].item()
        assert (on_c > 0) == turns[0](here) or abs(on_c) < 1e-17, (name, here, on_c)                 # 1e-17: rounding where it is 0
        assert (on_r < 0) == turns[1](here) or abs(on_r) < 1e-17, (name, here, on_r)
        done = name == "slic" and c - r >= 1                                                         # a satisfied hinge
        if name not in TURNS and abs(c) < 10 and abs(r) < 10 and not done:
            assert on_c < 0 < on_r, (name, here)


def test_at_the_reference_apo_down_moves_only_the_rejected_response_and_discopop_goes_the_wrong_way():
    for name, wanted in [("dpo", (-0.05, 0.05)), ("apo_down", (0.0, 0.025)), ("discopop", (0.05 * 0.78426, -0.05 * 0.78426))]:
        c, r = torch.zeros(2, 1, dtype=f64, requires_grad=True)
        assert [g.item() for g in torch.autograd.grad(LOSSES[name](c, r).sum(), (c, r))] == pytest.approx(list(wanted), rel=1e-4, abs=1e-16)


def test_a_satisfied_hinge_is_exactly_done():
    c, r = torch.tensor([21.0, 19.0], dtype=f64, requires_grad=True), torch.zeros(2, dtype=f64)
    assert torch.autograd.grad(V.hinge(c, r).sum(), c)[0].tolist() == [0.0, -0.05]   # a margin of 20 = 1 / beta


# --- hyper-parameters without meaning ---------------------------------------------------------------------------------

BAD = [(n, {"beta": b}) for n in LOSSES if "beta" in signature(n)[1] for b in (0.0, -0.1, math.nan, math.inf)]
BAD += [(n, {"tau": t}) for n in LOSSES if "tau" in signature(n)[1] for t in (0.0, -1.0)]
BAD += [(n, {"label_smoothing": e}) for n in LOSSES if "label_smoothing" in signature(n)[1] for e in (-0.01, 0.5, 1.0, math.nan)]
BAD += [(n, {k: -0.5}) for n in LOSSES for k in ("lam", "delta", "nll_weight", "a", "clamp") if k in signature(n)[1]]
BAD += [("exo", {"label_smoothing": 0.0}), ("fdpo", {"divergence": "kl"}), ("fdpo", {"divergence": "alpha", "alpha": 1.5}),
        ("fdpo", {"divergence": "alpha", "alpha": -0.1}), ("odpo", {"alpha": -1.0}), ("tdpo2", {"alpha": -1.0}), ("wpo", {"clamp": 0.0})]


@pytest.mark.parametrize("name, hyper", BAD, ids=str)
def test_a_setting_without_meaning_is_one_line_that_names_it(name, hyper):
    with pytest.raises(ValueError) as error:
        LOSSES[name](*tensors(small(name, PAIRS)).values(), **hyper)
    assert list(hyper)[-1] in str(error.value) and str(hyper[list(hyper)[-1]]) in str(error.value) and "\n" not in str(error.value)


def test_zero_switches_a_term_off_and_is_no_error():
    for pair in ("dpop lam", "slic lam", "slic delta", "cpo nll_weight", "orpo lam", "beta_dpo a", "odpo alpha", "tdpo2 alpha", "alphapo alpha",
                 "alphapo gamma", "simpo gamma", "cdpo label_smoothing", "rdpo label_smoothing", "aot label_smoothing"):
        name, hyper = pair.split()
        assert LOSSES[name](*tensors(small(name, PAIRS)).values(), **{hyper: 0.0}).isfinite().all()


@pytest.mark.parametrize("gap", [0.0, -1.0, math.nan])
def test_odpo_wants_every_score_gap_above_zero(gap):
    with pytest.raises(ValueError, match="score_gap") as error:
        V.odpo(C[:3], R[:3], torch.tensor([1.0, gap, 2.0]))
    assert "\n" not in str(error.value)


# --- numerics ---------------------------------------------------------------------------------------------------------

def test_log1mexp_has_every_digit_and_a_gradient_from_one_ulp_below_zero_to_a_thousand():
    x = torch.tensor([-1e-300, -1e-30, -1e-17, -1e-8, -0.5, -math.log(2), -0.7, -3.0, -40.0, -700.0, -1000.0, 0.0], dtype=f64, requires_grad=True)
    y = log1mexp(x)
    slope, = torch.autograd.grad(y.sum(), x)
    with mp.workdps(400):
        for a, got, g in zip(x.tolist()[:-1], y.tolist(), slope.tolist()):
            a = mp.mpf(a)
            near(got, mp.log(-mp.expm1(a)), a)
            near(g, mp.exp(a) / mp.expm1(a), a)                                      # 1 / -1e-300 is finite too
    assert y[-1].item() == pytest.approx(-708.4, abs=0.1) and slope[-1] == 0                # p = 1 after rounding: held, not -inf


def test_orpo_is_finite_where_the_naive_odds_are_not():
    a = torch.tensor([-1e-17], dtype=f64, requires_grad=True)
    assert torch.log1p(-torch.exp(a)).item() == -math.inf                            # what TRL and the official code compute
    out = V.orpo(a, torch.tensor([-1.0]), torch.ones(1), torch.ones(1))
    slope, = torch.autograd.grad(out.sum(), a)
    assert out.isfinite() and slope.isfinite() and slope < 0


def test_power_gap_keeps_the_gradient_of_a_tail_that_expm1_would_round_away():
    a, b = (torch.tensor([x], dtype=f64, requires_grad=True) for x in (60.0, 2.0))
    slope_a, slope_b = torch.autograd.grad(power_gap(a, b, 1.0).sum(), (a, b))
    assert (slope_a.item(), slope_b.item()) == pytest.approx((math.exp(-60), -math.exp(-2)), rel=1e-13)


# --- exact optima: a tabular policy, Bradley-Terry preferences with full support --------------------------------------

def world(n=6, seed=0):
    """log pi_ref, mu, u, and p(i beats j) = sigma(u_i - u_j), float64."""
    g = torch.Generator().manual_seed(seed)
    ref, mu, u = torch.randn(3, n, dtype=f64, generator=g)
    return ref.log_softmax(0), mu.softmax(0), u, torch.sigmoid(u[:, None] - u[None, :])


def minimise(objective, start):
    """argmin over a vector, LBFGS in float64; for the tabular policy the vector is its logits."""
    x = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([x], max_iter=1000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = objective(x)
        value.backward()
        return value
    solver.step(closure)
    return x.detach()


def population(curve, ref, weights, logps):
    """sum_ij weights_ij curve(c_i, c_j): i won against j."""
    n = len(ref)
    c = (logps - ref)[:, None].expand(n, n)
    return (weights.flatten() * curve(c.flatten(), c.T.flatten())).sum()


def optimum(curve, ref, weights):
    return minimise(lambda x: population(curve, ref, weights, x.log_softmax(0)), torch.zeros_like(ref)).log_softmax(0)


def pairs_of(mu, p):
    return mu[:, None] * mu[None, :] * p                                             # both orders: i shown against j, and i won


CLOSE = dict(rtol=0, atol=2e-6)                  # LBFGS stops at a flat 1e-13 or so of the objective, which is its square root in log pi


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpos_minimiser_is_the_reference_times_exp_of_utility_over_beta(beta):
    ref, mu, u, p = world()
    found = optimum(lambda c, r: V.dpo(c, r, beta=beta), ref, pairs_of(mu, p))
    torch.testing.assert_close(found, (ref + u / beta).log_softmax(0), **CLOSE)


@pytest.mark.parametrize("e", [0.1, 0.25])
def test_rdpo_on_flipped_labels_is_the_clean_dpo_loss_with_the_clean_optimum_and_cdpo_and_dpo_only_shrink(e):
    ref, mu, u, p = world(seed=1)
    flipped = pairs_of(mu, (1 - e) * p + e * p.T)
    curve = lambda c, r: V.rdpo(c, r, beta=0.5, label_smoothing=e)
    anywhere = torch.randn(6, dtype=f64, generator=torch.Generator().manual_seed(7)).log_softmax(0)
    clean_loss = population(lambda c, r: V.dpo(c, r, beta=0.5), ref, pairs_of(mu, p), anywhere)
    torch.testing.assert_close(population(curve, ref, flipped, anywhere), clean_loss, rtol=1e-14, atol=0)
    clean = (ref + u / 0.5).log_softmax(0)
    torch.testing.assert_close(optimum(curve, ref, flipped), clean, **CLOSE)
    spread = lambda logps: (logps - ref).max() - (logps - ref).min()
    for shrunk in (lambda c, r: V.dpo(c, r, beta=0.5), lambda c, r: V.cdpo(c, r, beta=0.5, label_smoothing=e)):
        assert spread(optimum(shrunk, ref, flipped)) < 0.9 * spread(clean)


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_ipos_minimiser_is_the_reference_times_exp_of_the_win_rate_over_tau_however_the_pairs_are_labelled(tau):
    ref, mu, u, p = world(seed=2)
    wanted = (ref + (p @ mu) / tau).log_softmax(0)                                   # p(y beats mu), ties with itself at 1/2
    torch.testing.assert_close(optimum(lambda c, r: V.ipo(c, r, tau=tau), ref, pairs_of(mu, p)), wanted, **CLOSE)

    def bernoulli(c, r):                                                             # expectation over the coin, first response = i
        won = torch.ones(len(c), dtype=torch.bool)
        return p.flatten() * V.ipo_bernoulli(c, r, won, tau=tau) + (1 - p.flatten()) * V.ipo_bernoulli(c, r, ~won, tau=tau)
    torch.testing.assert_close(optimum(bernoulli, ref, pairs_of(mu, torch.ones(6, 6, dtype=f64))), wanted, **CLOSE)


def test_stepwise_sdpo_in_two_steps_of_beta_is_dpo_with_half_of_it():
    ref, mu, u, p = world(seed=3)
    curve, weights = lambda c, r: V.dpo(c, r, beta=1.0), pairs_of(mu, p)
    twice = optimum(curve, optimum(curve, ref, weights), weights)
    torch.testing.assert_close(twice, optimum(lambda c, r: V.dpo(c, r, beta=0.5), ref, weights), **CLOSE)


def test_a_spin_step_moves_the_opponent_by_one_over_lambda_towards_the_data():
    opponent, data, _, _ = world(seed=4)
    for lam in (1.0, 2.0):
        found = optimum(lambda c, r: V.dpo(c, r, beta=lam), opponent, data[:, None] * opponent.exp()[None, :])
        torch.testing.assert_close(found, ((1 - 1 / lam) * opponent + data.log() / lam).log_softmax(0), **CLOSE)


def test_exos_and_cdpos_minimiser_on_a_certain_pair_is_the_logit_of_the_label():
    for name in ("cdpo", "exo"):
        for e in (0.1, 0.3):
            h = minimise(lambda x: LOSSES[name](x, torch.zeros(1, dtype=f64), beta=0.5, label_smoothing=e).sum(), torch.zeros(1, dtype=f64))
            assert 0.5 * h.item() == pytest.approx(math.log((1 - e) / e), abs=1e-6)


def offset_root(p, g):
    """a with p sigma(g - a) = (1 - p) sigma(g + a), by bisection; the left falls and the right rises."""
    low, high = -50.0, 50.0
    for _ in range(200):
        a = (low + high) / 2
        low, high = (a, high) if p / (1 + math.exp(a - g)) > (1 - p) / (1 + math.exp(-a - g)) else (low, a)
    return low


@pytest.mark.parametrize("p, g", [(0.7, 0.0), (0.7, 1.0), (0.9, 0.5)])
def test_an_offset_pulls_apart_what_is_contested_simpos_gamma_and_odpos_log_gap_alike(p, g):
    wanted, zero, one = offset_root(p, g), torch.zeros(1, dtype=f64), torch.ones(1)
    assert wanted == pytest.approx({(0.7, 1.0): 1.43085764, (0.7, 0.0): math.log(0.7 / 0.3)}.get((p, g), wanted), abs=1e-8)
    gap = torch.tensor([math.exp(g)], dtype=f64)
    odpo = minimise(lambda x: (p * V.odpo(x, zero, gap, beta=0.5) + (1 - p) * V.odpo(zero, x, gap, beta=0.5)).sum(), zero)
    simpo = minimise(lambda x: (p * V.simpo(x, zero, one, one, beta=0.5, gamma=g) + (1 - p) * V.simpo(zero, x, one, one, beta=0.5, gamma=g)).sum(), zero)
    assert (0.5 * odpo.item(), 0.5 * simpo.item()) == pytest.approx((wanted, wanted), abs=1e-6)


def test_simpos_minimiser_without_a_margin_is_length_times_utility_over_beta_plus_a_constant_and_no_reference():
    _, mu, u, p = world(seed=5)
    lengths = torch.tensor([1, 2, 3, 5, 8, 13])
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))

    def objective(x):
        logps = x.log_softmax(0)
        return (pairs_of(mu, p).flatten() * V.simpo(logps[i], logps[j], lengths[i], lengths[j], beta=2.0, gamma=0.0)).sum()
    per_token = minimise(objective, torch.zeros(6, dtype=f64)).log_softmax(0) / lengths - u / 2.0
    torch.testing.assert_close(per_token, per_token.mean().expand(6), **CLOSE)


# --- the contract -----------------------------------------------------------------------------------------------------

CD, CP, LN = "chosen_logratios, rejected_logratios", "chosen_logps, rejected_logps", "chosen_len, rejected_len"
CONTRACT = {                                                                         # DESIGN.md, section 3
    "sft": "chosen_logps, chosen_len", "dpo": f"{CD}, *, beta=0.1", "cdpo": f"{CD}, *, beta=0.1, label_smoothing=0.1",
    "rdpo": f"{CD}, *, beta=0.1, label_smoothing=0.1", "ipo": f"{CD}, *, tau=0.1", "ipo_avg": f"{CD}, {LN}, *, tau=0.1",
    "ipo_bernoulli": f"{CD}, preferred, *, tau=0.1", "hinge": f"{CD}, *, beta=0.05", "slic": f"{CP}, target_logps, *, delta=1.0, lam=0.1",
    "dpop": f"{CD}, *, beta=0.3, lam=50.0", "tdpo1": f"{CD}, chosen_kl, rejected_kl, *, beta=0.1",
    "tdpo2": f"{CD}, chosen_kl, rejected_kl, *, beta=0.1, alpha=0.5", "odpo": f"{CD}, score_gap, *, beta=0.5, alpha=1.0",
    "orpo": f"{CP}, {LN}, *, lam=0.1", "simpo": f"{CP}, {LN}, *, beta=2.0, gamma=0.5", "cpo": f"{CP}, chosen_len, *, beta=0.1, nll_weight=1.0",
    "alphapo": f"{CP}, {LN}, *, alpha=0.25, beta=2.5, gamma=0.1", "sigmoid_norm": f"{CD}, {LN}, *, beta=5.0",
    "exo": f"{CD}, *, beta=0.1, label_smoothing=0.001", "nca": f"{CD}, *, beta=0.01", "bco_pair": f"{CD}, reward_shift, *, beta=0.1",
    "sppo": f"{CD}, chosen_win_prob, rejected_win_prob, *, beta=0.001", "sppo_hard": f"{CD}, *, beta=0.001", "apo_zero": f"{CD}, *, beta=0.1",
    "apo_down": f"{CD}, *, beta=0.1", "discopop": f"{CD}, *, beta=0.05, tau=0.05", "fdpo": f"{CD}, *, beta=0.1, divergence='js', alpha=0.5",
    "wpo": f"{CD}, chosen_weight, rejected_weight, *, beta=0.01, clamp=1.0", "beta_dpo": f"{CD}, margin_mean, batch_margin_mean, *, beta=0.1, a=0.6",
    "aot": f"{CP}, ref_chosen_logps, ref_rejected_logps, *, beta=0.01, label_smoothing=0.0", "aot_unpaired": f"{CD}, *, beta=0.01, label_smoothing=0.0",
}


def test_signatures_are_the_contract_measured_before_the_star_chosen_after():
    assert {name: str(inspect.signature(function)) for name, function in LOSSES.items()} == {name: f"({s})" for name, s in CONTRACT.items()}
    assert set(ORACLES) | {"aot", "aot_unpaired"} == set(LOSSES)                     # and each has an oracle


def test_losses_is_the_table_of_contents_in_the_order_of_the_file_and_of_its_header():
    tree = ast.parse(Path(dpo_variants.__file__).read_text())
    written = [n.name.removesuffix("_loss") for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_loss")]
    assert list(LOSSES) == written and all(f.__name__ == n + "_loss" for n, f in LOSSES.items())
    listed = re.findall(r"^    \d  .*?  +(\w+(?:, \w+)*)$", dpo_variants.__doc__, re.M)
    assert ", ".join(listed).split(", ") == written


@pytest.mark.parametrize("name", LOSSES)
def test_each_docstring_gives_equation_shape_paper_and_idea_on_lines_a_program_can_find(name):
    lines = inspect.getdoc(LOSSES[name]).splitlines()
    assert lines[0].endswith("   (B,)") and lines[1] == ""
    paper, = (line for line in lines if line.startswith("Paper: "))
    idea, = (line for line in lines if line.startswith("Idea: "))
    assert re.search(r" 20\d\d, .*(arXiv \d{4}\.\d{5}|cdpo\.pdf)", paper) and 20 < len(idea) < 140
    for hyper in set(signature(name)[1]) & {"beta", "tau", "alpha", "gamma", "lam", "delta", "nll_weight", "a", "clamp"}:
        assert re.search(rf"\b{hyper}\b", lines[0]), f"{hyper} is not in the equation"


def test_dpo_variants_imports_torch_and_nothing_else_and_never_narrows():
    tree = ast.parse(Path(dpo_variants.__file__).read_text())
    imported = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert {name.split(".")[0] for name in imported} == {"torch"} and not any(isinstance(n, ast.ImportFrom) for n in ast.walk(tree))
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not names & {"device", "cuda", "distributed", "double", "half", "bfloat16", "to", "item", "float32", "float64"}


# --- parity with TRL, where it is installed ---------------------------------------------------------------------------

LENGTHS = torch.arange(1, 1001) % 7 + 1, torch.arange(1, 1001) % 5 + 1
THEIRS = {  # loss_type of TRL's DPOTrainer -> our loss of chosen and rejected log-ratios at the same beta = 0.1, label_smoothing = 0.2, tau = 0.3
    "sigmoid": V.dpo, "robust": lambda c, r: V.rdpo(c, r, label_smoothing=0.2), "exo_pair": lambda c, r: V.exo(c, r, label_smoothing=0.2),
    "hinge": lambda c, r: V.hinge(c, r, beta=0.1), "ipo": lambda c, r: V.ipo_avg(c, r, *(n[:len(c)] for n in LENGTHS)),
    "sigmoid_norm": lambda c, r: V.sigmoid_norm(c, r, *(n[:len(c)] for n in LENGTHS), beta=0.1), "nca_pair": lambda c, r: V.nca(c, r, beta=0.1),
    "bco_pair": lambda c, r: V.bco_pair(c, r, torch.tensor(0.0)), "sppo_hard": lambda c, r: V.sppo_hard(c, r, beta=0.1),
    "aot": lambda c, r: V.aot(c, r, 0 * c.detach(), 0 * r.detach(), beta=0.1, label_smoothing=0.2),
    "aot_unpaired": lambda c, r: V.aot_unpaired(c, r, beta=0.1, label_smoothing=0.2), "apo_zero": V.apo_zero, "apo_down": V.apo_down,
    "discopop": lambda c, r: V.discopop(c, r, beta=0.1, tau=0.3),
}  # deliberate differences: "ipo" there is ipo_avg here; "bco_pair" has no running mean any more; cDPO is gone; log-ratios stay where
#    sigmoid(100.) is not yet 1 and e^-u not yet inf, beyond which TRL's numbers are wrong


@pytest.mark.parametrize("loss_type", THEIRS)
def test_trl_agrees_in_value_and_gradient(loss_type):
    """TRL's losses are one method of its trainer: it gets a stand-in for itself, and a model that "measured" the log-probs of 0-reference responses."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed", exc_type=ImportError)
    c, r = (x[(C.abs() < 50) & (R.abs() < 50)].detach().requires_grad_() for x in (C, R))
    n, width = len(c), 8                                                              # the whole log-prob on a response's first token, 0 on the others
    seen = F.pad(torch.cat([c, r])[:, None], (0, width - 2))
    mask = (torch.arange(width) >= 1) & (torch.arange(width) <= torch.cat([x[:n] for x in LENGTHS])[:, None])
    zeros = torch.zeros(2 * n, width - 1)
    outputs = SimpleNamespace(log_probs=seen, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)
    same_everywhere = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=same_everywhere, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
                              f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=0.1, label_smoothing=0.2, use_weighting=False,
                              args=SimpleNamespace(discopop_tau=0.3), _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1)
    inputs = {"input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long(), "ref_chosen_logps": torch.zeros(n), "ref_rejected_logps": torch.zeros(n)}
    mean = trl.DPOTrainer._compute_loss(trainer, lambda **how: outputs, inputs, False)
    rtol = 1e-5 if loss_type == "exo_pair" else 1e-12                                 # its label smoothing is a float32 tensor (1e-8), and slopes nearly cancel
    same(mean, THEIRS[loss_type](c, r).mean(), c, r, rtol=rtol, atol=1e-15)            # atol: slopes that cancel

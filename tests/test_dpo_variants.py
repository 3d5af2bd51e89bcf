"""Claims about dpo_variants.py: each loss against a slow oracle, the family tree, exact optima."""
import inspect
import itertools
import math
import re
from types import SimpleNamespace

import mpmath
import pytest
import torch

import dpo_variants
import kto
import objective
from dpo_variants import LOSSES

mp = mpmath.mp.clone()
mp.dps = 350                         # 1 + e^-745 must not round to 1, nor its difference quotient
f64 = torch.float64
INF, NAN = math.inf, math.nan
V = SimpleNamespace(**LOSSES)


def signature(name):
    """(measured names, {setting: default})."""
    return objective.signature(LOSSES[name])


# --- what the losses are tried on -----------------------------------------------------------------

RATIOS = [0.0, -1e-4, 1e-4, 3.0, -3.0, -40.0, 40.0, 200.0, -200.0, 1000.0, -1000.0]
AVERAGES = [-1e-30, -1e-8, -1e-4, -0.7, -3.0, -40.0, -200.0, -1000.0]            # per token
CYCLES = {                                       # the other columns, repeated to the table's length
    "chosen_len": [1, 3, 64], "rejected_len": [1, 2, 7, 50], "preferred": [True, False],
    "chosen_kl": [0.0, 0.5, 30.0], "rejected_kl": [2.0, 0.0, 7.0, 100.0],
    "score_gap": [1e-3, 0.25, 1.0, 2.5, 100.0], "target_logps": [-1.0, -200.0, -1e-30],
    "chosen_weight": [0.01, 0.3, 0.9, 1.7], "rejected_weight": [0.5, 1.0, 1e-3],
    "chosen_win_prob": [1.0, 0.6, 0.5, 0.2], "rejected_win_prob": [0.0, 0.4, 0.5]}
SCALARS = {"margin_mean": 0.5, "batch_margin_mean": 2.0, "reward_shift": -0.75}
CONSTANT = {"score_gap", "chosen_weight", "rejected_weight", "chosen_win_prob", "rejected_win_prob",
            "ref_chosen_logps", "ref_rejected_logps", "old_chosen_logps", "old_rejected_logps",
            *SCALARS}                  # never a gradient


def table(name, pairs, **scalars):
    """{measured name: column}: `pairs` are log-ratios, or log-probs per token times the lengths."""
    wants = signature(name)[0]
    columns = {}
    for want in wants:
        side = 1 if want.startswith("rejected_") else 0
        if want in SCALARS:
            columns[want] = scalars.get(want, SCALARS[want])
        elif want in CYCLES:
            columns[want] = list(itertools.islice(itertools.cycle(CYCLES[want]), len(pairs)))
        elif want.endswith("_logratios"):
            columns[want] = [pair[side] for pair in pairs]
        elif want.startswith(("ref_", "old_")):  # there each response is as likely as the other
            columns[want] = [pair["chosen" in want] for pair in pairs]
        else:
            columns[want] = [pair[side] for pair in pairs]
            lengths = want.replace("_logps", "_len")
            if lengths in wants:
                cycled = itertools.cycle(CYCLES[lengths])
                columns[want] = [x * n for x, n in zip(columns[want], cycled)]
    return columns


def pairs_for(name, pairs):
    if "logps" not in signature(name)[0][0]:
        return pairs
    return [(-abs(x) - 0.1, -abs(y) - 0.1) for x, y in pairs]


def tensors(columns, dtype=f64):
    """Lengths stay integers and `preferred` bool; all else asks for a gradient."""
    made = {}
    for name, column in columns.items():
        if name.endswith("_len") or name == "preferred":
            made[name] = torch.tensor(column)
        else:
            made[name] = torch.tensor(column, dtype=dtype, requires_grad=True)
    return made


def value_and_slopes(name, columns, dtype=f64, **how):
    measured = tensors(columns, dtype)
    out = LOSSES[name](*measured.values(), **how)
    leaves = {n: t for n, t in measured.items() if t.requires_grad}
    slopes = torch.autograd.grad(out.sum(), leaves.values(), allow_unused=True)
    return out, dict(zip(leaves, slopes))


# --- oracles: one pair at a time, straight from the equations, mpmath only ------------------------

def sigma(t):
    return 1 / (1 + mp.exp(-t))


def L(t):
    """-log sigma(t)"""
    return mp.log(1 + mp.exp(-t))


def relu(t):
    return max(mp.mpf(0), t)


def log_odds(a):
    return a - mp.log(1 - mp.exp(a))


def exo(u, e):
    return sigma(u) * mp.log(sigma(u) / (1 - e)) + sigma(-u) * mp.log(sigma(-u) / e)


def f_prime(log_u, divergence, alpha):
    u = mp.exp(log_u)
    if divergence == "reverse_kl":
        return log_u
    if divergence == "js":
        return mp.log(2 * u / (1 + u))
    if divergence == "forward_kl":
        return -1 / u
    return (1 - u ** -alpha) / alpha


def phi(log_u):
    u = mp.exp(log_u)
    return u + mp.log(u)


def alpha_reward(a, alpha, beta):
    return beta * (1 - mp.exp(a) ** -alpha) / alpha


def dynamic_beta(mean, batch_mean, beta, a):
    return max(mp.mpf(1e-3), beta * (1 + a * (batch_mean - mean)))


ORACLES = {   # measured columns in the order of the signature, then settings: b beta, e smoothing
    "sft": lambda lw, nw: -lw / nw,
    "dpo": lambda c, r, b: L(b * (c - r)),
    "cdpo": lambda c, r, b, e: (1 - e) * L(b * (c - r)) + e * L(b * (r - c)),
    "rdpo": lambda c, r, b, e: ((1 - e) * L(b * (c - r)) - e * L(b * (r - c))) / (1 - 2 * e),
    "ipo": lambda c, r, tau: (c - r - 1 / (2 * tau)) ** 2,
    "ipo_avg": lambda c, r, nw, nl, tau: (c / nw - r / nl - 1 / (2 * tau)) ** 2,
    "ipo_bernoulli": lambda c, r, first_won, tau: (c - r - int(first_won) / tau) ** 2,
    "hinge": lambda c, r, b: relu(1 - b * (c - r)),
    "exo": lambda c, r, b, e: exo(b * (c - r), e),
    "discopop": lambda c, r, b, tau: (L(b * (c - r)) * sigma(-b * (c - r) / tau)
                                      + mp.exp(-b * (c - r)) * sigma(b * (c - r) / tau)),
    "dpop": lambda c, r, b, lam: L(b * (c - r - lam * relu(-c))),
    "dpo_shift": lambda c, r, b, lam: L(b * (c - lam * r)),
    "nca": lambda c, r, b: L(b * c) + L(-b * c) / 2 + L(-b * r) / 2,
    "bco_pair": lambda c, r, delta, b: L(b * c - delta) + L(delta - b * r),
    "apo_zero": lambda c, r, b: 1 - sigma(b * c) + sigma(b * r),
    "apo_down": lambda c, r, b: sigma(b * c) + 1 - sigma(b * (c - r)),
    "sppo": lambda c, r, pw, pl, b: (c - (pw - 0.5) / b) ** 2 + (r - (pl - 0.5) / b) ** 2,
    "sppo_hard": lambda c, r, b: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "cal_dpo": lambda c, r, b: (L(c - r) + (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2),
    "fdpo": lambda c, r, b, f, alpha: L(b * (f_prime(c, f, alpha) - f_prime(r, f, alpha))),
    "chipo": lambda c, r, b, R: L(min(R, max(-R, b * (phi(c) - phi(r))))),
    "tdpo1": lambda c, r, dw, dl, b: L(b * (c - r - (dl - dw))),
    "tdpo2": lambda c, r, dw, dl, b, alpha: L(b * (c - r - alpha * (dl - dw))),
    "odpo": lambda c, r, gap, b, alpha: L(b * (c - r) - alpha * mp.log(gap)),
    "wpo": lambda c, r, ww, wl, b, clamp: min(ww * wl, clamp) * L(b * (c - r)),
    "beta_dpo": lambda c, r, mean, batch, b, a: L(dynamic_beta(mean, batch, b, a) * (c - r)),
    "sigmoid_norm": lambda c, r, nw, nl, b: L(b * (c / nw - r / nl)),
    "slic": lambda lw, ll, lt, delta, lam: relu(delta - lw + ll) - lam * lt,
    "cpo": lambda lw, ll, nw, b, nll: L(b * (lw - ll)) - nll * lw / nw,
    "orpo": lambda lw, ll, nw, nl, lam: -lw / nw + lam * L(log_odds(lw / nw) - log_odds(ll / nl)),
    "simpo": lambda lw, ll, nw, nl, b, gamma: L(b * (lw / nw - ll / nl) - gamma),
    "alphapo": lambda lw, ll, nw, nl, alpha, b, gamma: L(
        alpha_reward(lw / nw, alpha, b) - alpha_reward(ll / nl, alpha, b) - gamma),
    "rebel": lambda lw, ll, ow, ol, gap, eta: ((lw - ow - (ll - ol)) / eta - gap) ** 2,
    "xpo": lambda c, r, lt, b, alpha: L(b * (c - r)) + alpha * lt,
}
OTHER = {     # what to try besides the defaults; a loss with a beta is tried at beta = 1 too
    "cdpo": [dict(beta=0.5, label_smoothing=0.25), dict(label_smoothing=0.0)],
    "rdpo": [dict(beta=0.5, label_smoothing=0.4)], "exo": [dict(label_smoothing=0.3)],
    "ipo": [dict(tau=1.0)], "ipo_avg": [dict(tau=0.7)], "ipo_bernoulli": [dict(tau=0.7)],
    "discopop": [dict(beta=1.0, tau=0.5)], "dpop": [dict(beta=0.5, lam=5.0)],
    "bco_pair": [dict(reward_shift=2.0)], "tdpo2": [dict(alpha=2.0)], "odpo": [dict(alpha=0.5)],
    "wpo": [dict(clamp=INF)], "dpo_shift": [dict(lam=0.5, beta=0.5)],
    "chipo": [dict(clip=INF), dict(clip=2.0, beta=0.5)], "rebel": [dict(eta=0.25)],
    "xpo": [dict(alpha=0.5)], "slic": [dict(delta=10.0, lam=1.0)], "cpo": [dict(nll_weight=0.25)],
    "fdpo": [dict(divergence="reverse_kl"), dict(divergence="forward_kl"),
             dict(divergence="alpha", alpha=0.25)],
    "beta_dpo": [dict(margin_mean=5.0, batch_margin_mean=-20.0), dict(a=0.0)],
    "orpo": [dict(lam=4.0)], "simpo": [dict(beta=10.0, gamma=-1.0)],
    "alphapo": [dict(alpha=-0.5, beta=1.0), dict(alpha=1.0)]}


def settings(name):
    """[(settings of the loss, constants among its measured numbers)]"""
    tried = [{}] + OTHER.get(name, [])
    if "beta" in signature(name)[1]:
        tried.append(dict(beta=1.0))
    found = []
    for how in tried:
        scalars = {k: v for k, v in how.items() if k in SCALARS}
        found.append(({k: v for k, v in how.items() if k not in SCALARS}, scalars))
    return found


def near(got, wanted, where, slack=0):
    """An argument u of exp is rounded about four times, so e^-u is off by 4 |u| eps. It underflows
    beyond |u| = 745, and 745 x 4 x 2.2e-16 = 7e-13 < 2e-12. slack: the size of terms that cancel.
    Above 1e300 the answer need only be large, and below 2^-1022 fewer than 53 bits are kept."""
    assert not math.isnan(got), where
    if abs(wanted) > 1e300:
        assert got * mp.sign(wanted) > 1e290, where
    else:
        error = abs(got - wanted)
        assert error <= 2e-12 * (abs(wanted) + slack) + 2.0 ** -1022, (where, got, float(wanted))


def exact(x):
    return mp.mpf(x) if isinstance(x, float) else x


def test_each_loss_but_aot_has_an_oracle():
    assert {*ORACLES, "aot", "aot_unpaired"} == set(LOSSES)


@pytest.mark.parametrize("name", ORACLES)
def test_each_loss_is_its_equation_in_value_and_gradient_from_moderate_to_extreme(name):
    wants, defaults = signature(name)
    numbers = AVERAGES if "logps" in wants[0] else RATIOS
    for how, scalars in settings(name):
        some = numbers[::2] if how or scalars else numbers
        pairs = list(itertools.product(some, some))[::2]                         # to save time
        columns = table(name, pairs, **scalars)
        out, slopes = value_and_slopes(name, columns, **how)
        assert out.shape == (len(pairs),) and out.dtype == f64
        for n, slope in slopes.items():
            constant = n in CONSTANT or (name, n) == ("tdpo2", "chosen_kl")
            assert (slope is None) == constant, (n, "a constant has no gradient")
        chosen = [exact(x) for x in {**defaults, **how}.values()]
        for i in range(len(out)):
            row = [exact(c[i] if isinstance(c, list) else c) for c in columns.values()]
            where = (name, how, row)
            wanted = ORACLES[name](*row, *chosen)
            near(out[i].item(), wanted, where)
            for k, n in enumerate(wants):
                if slopes.get(n) is None:
                    continue
                assert not math.isnan(slopes[n][i]), where
                kink = (name, n, row[0]) == ("dpop", "chosen_logratios", 0)      # its own test
                if wanted > 1e300 or kink:
                    continue
                slack = 0
                if name == "apo_down":                                   # slopes cancel at 0
                    slack = chosen[0] * sigma(chosen[0] * row[0]) * sigma(-chosen[0] * row[0])
                slope = mp.diff(lambda x: ORACLES[name](*row[:k], x, *row[k + 1:], *chosen), row[k])
                near(slopes[n][i].item(), slope, (n, where), slack)


def test_aot_is_cdpos_equation_on_sorted_rows_in_value_and_gradient():
    own = [(-5.0, -9.0), (-300.0, -2.0), (-1.0, -1000.0), (-40.0, -40.5), (-7.0, -3.0)]
    ref = [(-6.0, -8.0), (-200.0, -3.0), (-4.0, -4.25), (-90.0, -10.0), (-1.0, -80.0)]
    chosen, rejected = map(list, zip(*own))
    ref_chosen, ref_rejected = map(list, zip(*ref))
    margins = [c - r for c, r in own]
    ref_margins = [c - r for c, r in ref]
    cases = [("aot", [chosen, rejected, ref_chosen, ref_rejected], margins, ref_margins),
             ("aot_unpaired", [chosen, rejected], chosen, rejected)]
    for (name, columns, up, down), e in itertools.product(cases, (0.0, 0.2)):
        columns = dict(zip(signature(name)[0], columns))
        out, slopes = value_and_slopes(name, columns, beta=0.3, label_smoothing=e)
        on_chosen, on_rejected, *on_ref = slopes.values()
        assert on_ref in ([], [None, None])
        for k, (high, low) in enumerate(zip(sorted(up), sorted(down))):          # order statistics
            d = mp.mpf(high) - mp.mpf(low)
            near(out[k].item(), ORACLES["cdpo"](d, 0, 0.3, e), (name, k))
            slope = mp.diff(lambda t: ORACLES["cdpo"](t, 0, 0.3, e), d)
            loser = up.index(high) if name == "aot" else down.index(low)
            near(on_chosen[up.index(high)].item(), slope, (name, k))
            near(on_rejected[loser].item(), -slope, (name, k))


# --- shape, type, order, no NaN -------------------------------------------------------------------

PAIRS = [(0.5, -1.0), (-2.0, 1.5), (3.0, 0.25), (-0.75, -4.0), (1.25, 2.75)]


def test_a_loss_keeps_dtype_and_order_and_only_aot_looks_at_the_rows_beside():
    coupled = set()
    for name in LOSSES:
        columns = table(name, pairs_for(name, PAIRS))
        measured = tensors(columns).values()
        whole = LOSSES[name](*measured)
        narrow = LOSSES[name](*tensors(columns, torch.float32).values())
        assert whole.shape == narrow.shape == (5,), name
        assert (whole.dtype, narrow.dtype) == (f64, torch.float32), name
        for rows in ([0], [3, 0, 4, 1, 2]):
            part = LOSSES[name](*(t if t.dim() == 0 else t[rows] for t in measured))
            if not torch.allclose(part, whole[rows], rtol=4e-16, atol=4e-16):    # exp: 1 ulp
                coupled.add(name)
    assert coupled == {"aot", "aot_unpaired"}
    assert coupled == {name for name in LOSSES if getattr(LOSSES[name], "needs_whole_batch", False)}


def test_nothing_is_ever_nan_in_value_or_gradient_and_with_defaults_nothing_even_overflows():
    extreme = [-1000.0, -80.0, -1e-30, 0.0, 1e-30, 80.0, 1000.0]
    for name, dtype in itertools.product(LOSSES, (f64, torch.float32)):
        pairs = list(itertools.product(extreme, extreme))
        if "logps" in signature(name)[0][0]:
            pairs = [(-abs(x), -abs(y)) for x, y in pairs]       # 0 too: p = 1 exactly
        for how, scalars in settings(name):
            out, slopes = value_and_slopes(name, table(name, pairs, **scalars), dtype, **how)
            for x in [out, *slopes.values()]:
                assert x is None or not x.isnan().any(), (name, how, dtype)
                plain = dtype == f64 and not how
                assert x is None or not plain or x.isfinite().all(), name


def test_overflow_is_never_inf_minus_inf_even_at_strange_settings():
    x = torch.tensor([-1000.0, -1000.0, -900.0, 1000.0, -1000.0], dtype=f64, requires_grad=True)
    y = torch.tensor([-1000.0, -900.0, -1000.0, -1000.0, 1000.0], dtype=f64, requires_grad=True)
    ones = torch.ones(5, dtype=torch.int64)
    for out in (V.alphapo(x, y, ones, ones, alpha=2.0, gamma=0.0),
                V.fdpo(x, y, divergence="forward_kl")):
        slopes = torch.autograd.grad(out.sum(), (x, y))
        assert all(slope.isfinite().all() for slope in slopes)
        assert out[0].item() == pytest.approx(math.log(2), rel=1e-15)            # not clamped
        assert out[1] > 1e280 and out[4] > 1e280 and out[2] == 0 and out[3] == 0
        assert slopes[0][1] < -1e280 and slopes[0][2] == 0                       # up, and steeply
    out = V.discopop(x, y, beta=1.0, tau=3.0)
    assert out[4] > 1e280 and torch.autograd.grad(out.sum(), x)[0].isfinite().all()


# --- the family tree ------------------------------------------------------------------------------

GRID = torch.tensor([0.0, 1e-4, -1e-4, 0.5, -2.0, 3.0, 17.0, -40.0, 200.0, -1000.0], dtype=f64)
C, R = (x.flatten().requires_grad_() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
LW, LL = -C.abs(), -R.abs()                      # the same as log-probs
ONES = torch.ones(100, dtype=torch.int64)
NUMBERS = torch.linspace(0.1, 3, 100, dtype=f64)
ZERO, ALL = torch.zeros(100), torch.ones(100, dtype=torch.bool)


def same(left, right, *inputs, rtol=1e-15, atol=1e-300):
    """Equal values, equal gradients. rtol: one curve, its argument rounded once or twice more."""
    torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
    inputs = inputs or (C, R)
    mine, theirs = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (left, right))
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def scalar(x):
    return torch.tensor(x, dtype=f64)


def test_a_variant_with_its_idea_switched_off_is_dpo():
    dpo = V.dpo(C, R)
    same(V.cdpo(C, R, label_smoothing=0.0), dpo)
    same(V.rdpo(C, R, label_smoothing=0.0), dpo)
    same(V.dpop(C, R, lam=0.0, beta=0.1), dpo)
    same(V.odpo(C, R, NUMBERS, alpha=0.0, beta=0.1), dpo)
    same(V.odpo(C, R, torch.ones(100), beta=0.1), dpo)                           # log 1 = 0
    same(V.beta_dpo(C, R, scalar(3.0), scalar(-7.0), a=0.0), dpo)
    same(V.beta_dpo(C, R, scalar(3.0), scalar(3.0)), dpo)                        # an average batch
    same(V.dpo_shift(C, R, lam=1.0), dpo)
    same(V.xpo(C, R, NUMBERS, alpha=0.0), dpo)
    same(V.wpo(C, R, torch.ones(100), torch.ones(100), beta=0.1), dpo)
    same(V.tdpo1(C, R, ZERO, ZERO), dpo)
    same(V.tdpo2(C, R, NUMBERS, NUMBERS.flip(0), alpha=0.0), dpo)
    same(V.fdpo(C, R, divergence="reverse_kl"), dpo)
    same(V.fdpo(C, R, divergence="alpha", alpha=0.0), dpo)
    same(V.sigmoid_norm(C, R, ONES, ONES, beta=0.1), dpo)
    same(V.cpo(C, R, ONES, nll_weight=0.0), dpo)
    same(V.simpo(3 * C, 5 * R, 3 * ONES, 5 * ONES, gamma=0.0, beta=0.1), dpo, rtol=1e-13)    # 3c/3


def test_dpop_at_its_kink_has_dpos_gradient_and_just_below_lam_plus_one_times_it():
    c = torch.tensor([0.0, -1e-12], dtype=f64, requires_grad=True)
    slope, = torch.autograd.grad(V.dpop(c, torch.zeros(2), beta=0.1, lam=4.0).sum(), c)
    assert slope.tolist() == pytest.approx([-0.05, -0.25], rel=1e-12)            # relu' at 0 is 0


def test_the_alpha_curve_ends_in_forward_kl_and_is_alphapos_which_begins_in_simpo():
    same(V.fdpo(C, R, divergence="alpha", alpha=1.0), V.fdpo(C, R, divergence="forward_kl"))
    same(V.alphapo(LW, LL, ONES, ONES, alpha=0.5, beta=0.7, gamma=0.0),
         V.fdpo(LW, LL, beta=0.7, divergence="alpha", alpha=0.5))
    lw, ll, how = LW - 0.5, LL - 0.25, dict(beta=2.0, gamma=0.5)
    for alpha in (0.0, 1e-12, -1e-12):           # off by alpha beta a^2 / 2
        limit = V.alphapo(lw, ll, ONES, ONES, alpha=alpha, **how)
        same(limit, V.simpo(lw, ll, ONES, ONES, **how), rtol=2e-6)


def test_cpo_is_reference_free_dpo_plus_weighted_sft_and_orpo_without_odds_is_sft():
    same(V.cpo(C, R, 4 * ONES, nll_weight=0.5), V.dpo(C, R) + 0.5 * V.sft(C, 4 * ONES))
    assert torch.equal(V.orpo(LW, LL, 2 * ONES, ONES, lam=0.0), V.sft(LW, 2 * ONES))


def test_ipo_in_both_orders_is_the_dataset_form_plus_a_constant():
    for tau in (0.1, 0.7):
        both = (V.ipo_bernoulli(C, R, ALL, tau=tau) + V.ipo_bernoulli(R, C, ~ALL, tau=tau)) / 2
        same(both, V.ipo(C, R, tau=tau) + 1 / (4 * tau ** 2), rtol=1e-12)        # 1e6 beside 0.5


def test_rdpo_is_unbiased_and_unbounded_below_and_cdpo_is_neither():
    for e in (0.05, 0.2, 0.45):
        mean = (1 - e) * V.rdpo(C, R, label_smoothing=e) + e * V.rdpo(R, C, label_smoothing=e)
        torch.testing.assert_close(mean, V.dpo(C, R), rtol=1e-12, atol=1e-12)    # terms cancel
        biased = (1 - e) * V.cdpo(C, R, label_smoothing=e) + e * V.cdpo(R, C, label_smoothing=e)
        assert (biased - V.dpo(C, R)).abs().max() > 1
    sure = V.rdpo(50 * torch.ones(1, dtype=f64), torch.zeros(1), beta=1.0, label_smoothing=0.2)
    assert sure.item() == pytest.approx(-50 / 3, rel=1e-12) and (V.cdpo(C, R) > 0).all()


def test_apo_zero_and_bco_pair_are_sums_of_their_unpaired_halves_and_sppo_hard_a_sure_sppo():
    halves = kto.apo_zero_unpaired_loss(C, ALL) + kto.apo_zero_unpaired_loss(R, ~ALL)
    torch.testing.assert_close(V.apo_zero(C, R), halves, rtol=0, atol=4e-16)     # 1 - sigma there
    shift = scalar(0.4)
    same(V.sppo_hard(C, R, beta=0.5), V.sppo(C, R, torch.ones(100), ZERO, beta=0.5))
    same(V.bco_pair(C, R, shift), kto.bco_loss(C, ALL, shift) + kto.bco_loss(R, ~ALL, shift))
    assert (V.bco_pair(C, R, shift) >= V.dpo(C, R)).all()        # sigma(a) sigma(b) <= sigma(a + b)


def test_at_the_reference_dpo_has_four_times_the_gradient_of_kto():
    c, r = torch.zeros(2, 5, dtype=f64, requires_grad=True)
    dpo = V.dpo(c, r, beta=0.3).mean()
    thumbs = torch.arange(10) < 5                                # the same 10 responses
    by_kto = kto.kto_loss(torch.cat([c, r]), thumbs, torch.empty(0), beta=0.3).mean()
    for a, b in zip(torch.autograd.grad(dpo, (c, r)), torch.autograd.grad(by_kto, (c, r))):
        assert b.abs().min() > 0
        torch.testing.assert_close(a, 4 * b, rtol=1e-15, atol=0)


def test_the_first_step_of_apo_down_and_of_discopop_is_as_their_docstrings_say():
    for name, on_c, on_r in [("dpo", -0.05, 0.05), ("apo_down", 0.0, 0.025),
                             ("discopop", 0.05 * 0.78426, -0.05 * 0.78426)]:
        c, r = torch.zeros(2, 1, dtype=f64, requires_grad=True)
        slopes = torch.autograd.grad(LOSSES[name](c, r).sum(), (c, r))
        assert [x.item() for x in slopes] == pytest.approx([on_c, on_r], rel=1e-4, abs=1e-16)


# --- hyper-parameters without meaning -------------------------------------------------------------

BAD = {"beta": [0.0, -0.1, NAN, INF], "tau": [0.0], "eta": [0.0, INF], "clip": [0.0, NAN],
       "label_smoothing": [-0.01, 0.5, NAN],
       "lam": [-0.5], "delta": [-0.5], "nll_weight": [-0.5], "a": [-0.5], "clamp": [0.0, NAN],
       "divergence": ["kl"]}


def test_a_setting_without_meaning_is_one_line_that_names_it():
    cases = [(name, {setting: bad}) for name in LOSSES for setting in signature(name)[1]
             for bad in BAD.get(setting, [])]
    cases += [("exo", {"label_smoothing": 0.0}), ("odpo", {"alpha": -1.0}),
              ("tdpo2", {"alpha": -1.0}), ("dpo_shift", {"lam": 0.0}), ("dpo_shift", {"lam": 1.5}),
              ("fdpo", {"divergence": "alpha", "alpha": 1.5})]
    for name, how in cases:
        setting, bad = list(how.items())[-1]
        with pytest.raises(ValueError, match=f"^{setting} .*{bad}'?$"):
            LOSSES[name](*tensors(table(name, pairs_for(name, PAIRS))).values(), **how)
    for gap in (0.0, NAN):
        with pytest.raises(ValueError, match="score_gap"):
            V.odpo(C[:2], R[:2], torch.tensor([1.0, gap]))


# --- exact optima: a tabular policy, Bradley-Terry preferences with full support ------------------

CLOSE = dict(rtol=0, atol=2e-6)      # LBFGS stops where the objective is flat to 1e-13: its root


def world(seed=0):
    """log pi_ref, mu, u, and p(i beats j) = sigma(u_i - u_j), of 6 responses."""
    generator = torch.Generator().manual_seed(seed)
    ref, mu, u = torch.randn(3, 6, dtype=f64, generator=generator)
    return ref.log_softmax(0), mu.softmax(0), u, torch.sigmoid(u[:, None] - u[None, :])


def minimise(objective, start):
    x = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([x], max_iter=1000, tolerance_grad=1e-13, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        found = objective(x)
        found.backward()
        return found
    solver.step(closure)
    return x.detach()


def optimum(curve, ref, weights):
    """The policy that minimises sum_ij weights_ij curve(c_i, c_j): i won against j."""
    def population(x):
        c = (x.log_softmax(0) - ref)[:, None].expand(6, 6)
        return (weights.flatten() * curve(c.flatten(), c.T.flatten())).sum()
    return minimise(population, 0 * ref).log_softmax(0)


def pairs_of(mu, p):
    return mu[:, None] * mu[None, :] * p                         # i shown against j, and i won


def test_dpos_minimiser_is_the_reference_times_exp_of_utility_over_beta():
    ref, mu, u, p = world()
    for beta in (0.3, 1.0):
        found = optimum(lambda c, r: V.dpo(c, r, beta=beta), ref, pairs_of(mu, p))
        torch.testing.assert_close(found, (ref + u / beta).log_softmax(0), **CLOSE)


def test_ipos_minimiser_is_the_reference_times_exp_of_the_win_rate_over_tau():
    ref, mu, u, p = world(seed=2)
    found = optimum(lambda c, r: V.ipo(c, r, tau=0.25), ref, pairs_of(mu, p))
    torch.testing.assert_close(found, (ref + (p @ mu) / 0.25).log_softmax(0), **CLOSE)


def test_chipos_minimiser_has_its_reward_beta_phi_equal_to_the_utility_up_to_a_constant():
    ref, mu, u, p = world(seed=3)
    for beta in (0.3, 1.0):
        found = optimum(lambda c, r: V.chipo(c, r, beta=beta, clip=INF), ref, pairs_of(mu, p))
        c = found - ref
        beyond = beta * (c.exp() + c) - u                        # so c.exp() is Lambert's W
        torch.testing.assert_close(beyond, beyond.mean().expand(6), **CLOSE)
        dpo = (ref + u / beta).log_softmax(0)
        assert (c.exp() * c.exp() * ref.exp()).sum() < ((dpo - ref).exp() * dpo.exp()).sum()


def test_rebels_minimiser_is_one_step_of_natural_policy_gradient_from_the_old_policy():
    old, mu, u, p = world(seed=5)
    gaps = (u[:, None] - u[None, :]).flatten()
    zero = torch.zeros(36, dtype=f64)
    for eta in (0.5, 2.0):
        found = optimum(lambda c, r: V.rebel(c, r, zero, zero, gaps, eta=eta), old, pairs_of(mu, p))
        torch.testing.assert_close(found, (old + eta * u).log_softmax(0), **CLOSE)


def test_cal_dpos_minimiser_on_a_certain_pair_lies_just_beyond_sppos():
    zero = torch.zeros(2, dtype=f64)
    for beta in (0.1, 1.0):
        c, r = minimise(lambda x: V.cal_dpo(x[:1], x[1:], beta=beta).sum(), zero).tolist()
        assert c == pytest.approx(-r) == pytest.approx(
            1 / (2 * beta) + 0.5 / (1 + math.exp(2 * c)), abs=1e-6)


def test_xpos_bonus_is_the_kl_from_the_reference_in_value_and_gradient():
    ref, _, _, _ = world(seed=6)
    x = (0.3 * ref.flip(0)).requires_grad_()
    policy = x.log_softmax(0)
    bonus = V.xpo(ZERO[:6], ZERO[:6], policy, alpha=0.7) - V.dpo(ZERO[:6], ZERO[:6])
    by_sampling = (ref.exp() * bonus).sum()
    kl = (ref.exp() * (ref - policy)).sum()
    entropy = -(ref.exp() * ref).sum()
    torch.testing.assert_close(by_sampling, -0.7 * (kl + entropy), rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(by_sampling, x, retain_graph=True),
                    torch.autograd.grad(-0.7 * kl, x)):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


def test_chipo_gives_up_a_pair_beyond_its_clip_and_clips_the_difference_not_each_reward():
    c, r = torch.tensor([[0.0, 6.0], [6.0, 6.0]], dtype=f64).requires_grad_()
    out = V.chipo(c, r, beta=0.05, clip=10.0)
    assert out.tolist() == pytest.approx([math.log1p(math.exp(10)), math.log(2)])
    slopes, = torch.autograd.grad(out.sum(), c)
    assert slopes.tolist() == pytest.approx([0, -0.05 * (math.exp(6) + 1) / 2])


def test_a_spin_step_moves_the_opponent_by_one_over_lambda_towards_the_data():
    opponent, data, _, _ = world(seed=4)
    weights = data[:, None] * opponent.exp()[None, :]            # the data wins, always
    for lam in (1.0, 2.0):
        found = optimum(lambda c, r: V.dpo(c, r, beta=lam), opponent, weights)
        wanted = ((1 - 1 / lam) * opponent + data.log() / lam).log_softmax(0)
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_exos_and_cdpos_minimiser_on_a_certain_pair_is_the_logit_of_the_label():
    zero = torch.zeros(1, dtype=f64)
    for loss, e in itertools.product((V.cdpo, V.exo), (0.1, 0.3)):
        h = minimise(lambda x: loss(x, zero, beta=0.5, label_smoothing=e).sum(), zero)
        assert 0.5 * h.item() == pytest.approx(math.log((1 - e) / e), abs=1e-6)


# --- the contract ---------------------------------------------------------------------------------

def test_losses_is_the_table_of_contents_in_the_order_of_the_header():
    listed = re.findall(r"^    [\d ]  .*?  +(\w+(?:, \w+)*)$", dpo_variants.__doc__, re.M)
    assert ", ".join(listed).split(", ") == list(LOSSES)
    assert all(loss.__name__ == name + "_loss" for name, loss in LOSSES.items())


def test_each_docstring_has_equation_shape_paper_and_idea_on_lines_that_a_program_can_find():
    for name, loss in LOSSES.items():
        lines = inspect.getdoc(loss).splitlines()
        assert lines[0].endswith("   (B,)") and lines[1] == "", name
        paper, = (line for line in lines if line.startswith("Paper: "))
        assert re.search(r" 20\d\d, .*(arXiv \d{4}\.\d{5}|cdpo\.pdf)$", paper), name
        assert sum(line.startswith("Idea: ") for line in lines) == 1, name


def test_the_defaults_are_the_papers():
    """By the name of the setting; what a loss has of its own stands below it."""
    usual = {"beta": 0.1, "label_smoothing": 0.1, "tau": 0.1, "alpha": 0.5}
    own = {"hinge": {"beta": 0.05}, "slic": {"delta": 1.0, "lam": 0.1}, "nca": {"beta": 0.01},
           "dpo_shift": {"lam": 0.75}, "chipo": {"beta": 0.05, "clip": 10.0},
           "rebel": {"eta": 1.0}, "xpo": {"alpha": 1e-5},
           "dpop": {"beta": 0.3, "lam": 50.0}, "odpo": {"beta": 0.5, "alpha": 1.0},
           "orpo": {"lam": 0.1}, "simpo": {"beta": 2.0, "gamma": 0.5}, "cpo": {"nll_weight": 1.0},
           "alphapo": {"alpha": 0.25, "beta": 2.5, "gamma": 0.1}, "sigmoid_norm": {"beta": 5.0},
           "exo": {"label_smoothing": 1e-3}, "sppo": {"beta": 1e-3}, "sppo_hard": {"beta": 1e-3},
           "discopop": {"beta": 0.05, "tau": 0.05}, "fdpo": {"divergence": "js"},
           "wpo": {"beta": 0.01, "clamp": 1.0}, "beta_dpo": {"a": 0.6},
           "aot": {"beta": 0.01, "label_smoothing": 0.0},
           "aot_unpaired": {"beta": 0.01, "label_smoothing": 0.0}}
    for name in LOSSES:
        for setting, default in signature(name)[1].items():
            assert default == (usual | own.get(name, {}))[setting], (name, setting)
    for name in ("kto", "kto_uniform"):
        defaults = objective.signature(kto.LOSSES[name])[1]
        assert defaults == {"beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0}

"""Claims about kto.py: every function against a slow scalar oracle with 1,000 digits, value and gradient."""
import ast
import inspect
import math
from pathlib import Path

import mpmath
import pytest
import torch
import torch.nn.functional as F

import kto
from kto import apo_zero_unpaired_loss, bco_loss, kto_loss, kto_uniform_loss, reference_point, value

mp = mpmath.mp.clone()
mp.dps = 1000                                    # 1 - sigma(1000) = 5e-435 must not cancel away, nor its difference quotient
RATIOS = [0.0, 1e-4, -1e-4, 3.0, -3.0, 40.0, -40.0, 200.0, -200.0, 1000.0, -1000.0]
BATCHES = {
    "mixed": (RATIOS + RATIOS, [True] * len(RATIOS) + [False] * len(RATIOS)),
    "alternating": (RATIOS, [i % 2 == 0 for i in range(len(RATIOS))]),
    "all desirable": (RATIOS, [True] * len(RATIOS)),
    "all undesirable": (RATIOS, [False] * len(RATIOS)),
    "one desirable": ([0.7], [True]),
    "one undesirable": ([0.7], [False]),
}
KLS = {"none": [], "clamped": [-5.0, 1.0], "one number": [1.5], "mean of three": [4.0, -1.0, 3.0]}
SMALLEST = {torch.float64: 2.0 ** -1074, torch.float32: 2.0 ** -149}          # below it everything is rounded to 0


# --- oracles: one example at a time, straight from the equations ------------------------------------------------------

def sigma(t):
    return 1 / (1 + mp.exp(-t))


def kto_oracle(r, desirable, z0, beta, lambda_d, lambda_u):
    if desirable:
        return lambda_d * (1 - sigma(beta * (r - z0)))
    return lambda_u * (1 - sigma(beta * (z0 - r)))


def bco_oracle(r, desirable, shift, beta):
    return -mp.log(sigma(beta * r - shift if desirable else shift - beta * r))


def agree(loss, oracle, x, desirable, dtype, *, lam=1.0):
    """loss(x (B,), desirable (B,)) -> (B,) equals oracle(x_i, desirable_i), and so does the gradient of its mean.

    Tolerances. The argument u of sigma is rounded four times or so, so it is off by 4 |u| eps: sigma's own slope makes that
    at most 4 x 0.23 eps in a KTO value (|u| sigma (1 - sigma) < 0.23), 4 |u| eps for log sigma, and 4 |u| eps relative to the
    gradient, which behaves like e^-|u|. The rest of the 16 eps is for exp, product and difference.
    """
    eps, m = torch.finfo(dtype).eps, len(x)
    t = torch.tensor(x, dtype=dtype, requires_grad=True)
    out = loss(t, torch.tensor(desirable))
    assert out.shape == (m,) and out.dtype == dtype
    gradient, = torch.autograd.grad(out.mean(), t)
    assert gradient.dtype == dtype
    for i in range(m):
        xi = mp.mpf(t[i].item())                                                     # what the loss was really given
        wanted, slope = oracle(xi, desirable[i]), mp.diff(lambda v: oracle(v, desirable[i]), xi) / m
        assert abs(out[i].item() - wanted) <= 16 * eps * max(lam, abs(wanted)), (x[i], desirable[i])
        # beta <= 1 in these tests and |shift| <= 4, so |u| <= |x| + 4
        assert abs(gradient[i].item() - slope) <= (16 + 4 * (abs(x[i]) + 4)) * eps * abs(slope) + SMALLEST[dtype], (x[i], desirable[i])


def mean_then_clamp(kl):
    return max(mp.mpf(0), mp.fsum(map(mp.mpf, kl)) / len(kl)) if kl else mp.mpf(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kl", KLS.values(), ids=KLS.keys())
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_kto_is_equation_8_in_value_and_gradient(batch, kl, dtype):
    z0 = mean_then_clamp(kl)
    for beta, lambda_d, lambda_u in [(0.125, 1.0, 1.0), (1.0, 1.5, 0.75)]:          # exact in binary: the oracle gets the same
        agree(lambda r, d: kto_loss(r, d, torch.tensor(kl, dtype=dtype), beta=beta, lambda_d=lambda_d, lambda_u=lambda_u),
              lambda r, d: kto_oracle(r, d, z0, beta, lambda_d, lambda_u), *batch, dtype, lam=1.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_the_relatives_are_their_equations_in_value_and_gradient(batch, dtype):
    entropy, shift = torch.tensor(2.5, dtype=dtype), torch.tensor(-0.75, dtype=dtype)
    agree(lambda x, d: kto_uniform_loss(x, d, entropy, beta=0.5, lambda_d=0.5, lambda_u=1.5),                 # log pi + H
          lambda x, d: kto_oracle(x, d, mp.mpf(-2.5), 0.5, 0.5, 1.5), *batch, dtype, lam=1.5)
    agree(lambda x, d: apo_zero_unpaired_loss(x, d, beta=0.5),
          lambda x, d: 1 - sigma(0.5 * x) if d else sigma(0.5 * x), *batch, dtype)
    agree(lambda x, d: bco_loss(x, d, shift, beta=0.5),
          lambda x, d: bco_oracle(x, d, mp.mpf(-0.75), 0.5), *batch, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("z0", [0.0, 2.5])
def test_value_is_lambda_sigma_on_the_side_of_the_label(z0, dtype):
    agree(lambda r, d: value(r, d, torch.tensor(z0, dtype=dtype), beta=0.5, lambda_d=1.5, lambda_u=0.5),
          lambda r, d: 1.5 * sigma(0.5 * (r - z0)) if d else 0.5 * sigma(0.5 * (z0 - r)), *BATCHES["mixed"], dtype, lam=1.5)


# --- the reference point ----------------------------------------------------------------------------------------------

def test_the_reference_point_is_the_clamp_of_the_mean_not_the_mean_of_the_clamps():
    kl = torch.tensor([-3.0, 2.0, 4.0])
    assert reference_point(kl).item() == 1.0                                         # clamping first would give (0 + 2 + 4) / 3 = 2
    assert reference_point(torch.tensor([-3.0, 2.0])).item() == 0.0                  # clamping first: 1; no clamp: -0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_reference_point_of_nothing_is_zero_and_of_one_number_that_number(dtype):
    for kl, z0 in [([], 0.0), ([1.5], 1.5), ([-1.5], 0.0)]:
        point = reference_point(torch.tensor(kl, dtype=dtype))
        assert point.item() == z0 and point.shape == () and point.dtype == dtype


def test_the_mean_is_over_all_mismatched_pairs_even_where_there_are_more_of_them_than_rows():
    kl = torch.tensor([1.0, 2.0, 3.0, 6.0])
    one_row = kto_loss(torch.tensor([3.0]), torch.tensor([True]), kl, beta=1.0)
    assert one_row.item() == 0.5                                                     # r is z0 = 3: half of lambda, exactly


def test_no_gradient_flows_through_what_is_measured_as_a_constant():
    r, d = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([True, False])
    for loss in (kto_loss, kto_uniform_loss, bco_loss):
        for constant in (torch.tensor([0.4, 0.8]), torch.tensor(0.6)):
            if loss is bco_loss:
                constant = constant.mean()
            constant.requires_grad_()
            through_r, through_constant = torch.autograd.grad(loss(r, d, constant).sum(), (r, constant), allow_unused=True)
            assert through_constant is None and (through_r != 0).all(), loss
    kl = torch.tensor([0.4, 0.8], requires_grad=True)
    assert not reference_point(kl).requires_grad


# --- what the docstrings claim ----------------------------------------------------------------------------------------

def test_at_policy_equals_reference_each_loss_is_half_its_lambda():
    r, d = torch.zeros(4, dtype=torch.float64), torch.tensor([True, False, True, False])
    loss = kto_loss(r, d, torch.zeros(4), lambda_d=4.0, lambda_u=3.0)
    assert loss.tolist() == [2.0, 1.5, 2.0, 1.5]                                     # sigma(0) = 1/2 is exact


@pytest.mark.parametrize("lambda_d, lambda_u, z", [(1.0, 1.0, 0.0), (4 / 3, 1.0, 2.0), (1.0, 13.0, 0.5)])
def test_the_closed_form_gradient_of_the_docstring_is_autograds(lambda_d, lambda_u, z):
    beta, m = 0.3, 40
    r = torch.linspace(-60, 60, m, dtype=torch.float64, requires_grad=True)
    desirable = torch.arange(m) % 3 == 0
    loss = kto_loss(r, desirable, torch.tensor([z]), beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)
    gradient, = torch.autograd.grad(loss.mean(), r)
    u = beta * torch.where(desirable, r - z, z - r).detach()
    d = torch.where(desirable, -lambda_d, lambda_u * torch.ones_like(u))             # d(y) lambda_y
    closed = d * torch.sigmoid(u) * torch.sigmoid(-u) * beta / m                     # 1 - sigma(u) = sigma(-u)
    torch.testing.assert_close(gradient, closed, rtol=1e-13, atol=0)                 # |u| <= 19: 19 eps and some


def test_the_gradient_keeps_its_digits_where_one_minus_sigma_would_be_exactly_zero():
    r = torch.tensor([1000.0, -1000.0], dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(kto_loss(r, torch.tensor([True, True]), r.new_empty(0), beta=0.1).sum(), r)
    assert 1 - torch.sigmoid(torch.tensor(100.0, dtype=torch.float64)) == 0
    # sigma(100) sigma(-100) beta, both tails alike; 1e-13: |u| = 100 rounding errors in the exponent
    assert gradient.tolist() == pytest.approx([-0.1 * math.exp(-100)] * 2, rel=1e-13)


def test_value_rises_for_the_desirable_falls_for_the_undesirable_and_bends_at_the_reference_point():
    z0, r = 2.0, torch.linspace(-30, 34, 129, dtype=torch.float64)                   # symmetric around z0, which is in the middle
    for desirable, direction in ((True, 1), (False, -1)):
        v = value(r, torch.full(r.shape, desirable), torch.tensor(z0), beta=0.5, lambda_d=3.0, lambda_u=3.0)
        assert (v > 0).all() and (v < 3).all() and v[64] == 1.5
        assert (direction * v.diff() > 0).all()
        gain = direction * v if desirable else (direction * v).flip(0).neg()         # as a function of the gain, left to right
        bend = gain.diff().diff()
        assert (bend[:63] > 0).all() and (bend[64:] < 0).all()                       # convex in losses, concave in gains


def test_a_lambda_of_zero_is_zero_and_scales_nothing_else():
    r, d = torch.tensor([0.5, 0.5, -2.0]), torch.tensor([True, False, False])
    plain = kto_loss(r, d, torch.tensor([0.3]))
    assert kto_loss(r, d, torch.tensor([0.3]), lambda_u=0.0).tolist() == [plain[0].item(), 0.0, 0.0]
    assert torch.equal(kto_loss(r, d, torch.tensor([0.3]), lambda_u=4.0), plain * torch.tensor([1.0, 4.0, 4.0]))   # powers of 2
    assert torch.equal(kto_loss(r, d, torch.tensor([0.3]), lambda_d=4.0), plain * torch.tensor([4.0, 1.0, 1.0]))


def test_the_batch_loss_is_the_mean_over_all_examples_not_the_sum_of_class_means():
    r, d = torch.tensor([0.0, 2.0, 2.0, 2.0], requires_grad=True), torch.tensor([True, False, False, False])
    loss = kto_loss(r, d, torch.empty(0), beta=1.0)
    a, b = 1 - 0.5, 1 - 1 / (1 + math.exp(2))
    assert loss.mean().item() == pytest.approx((a + 3 * b) / 4, rel=1e-6)            # float32; a + b would be 1.38, this is 0.79
    gradient, = torch.autograd.grad(loss.mean(), r)
    assert gradient[0].item() == -1 / 4 / 4                                          # sigma' = 1/4, over FOUR rows


def test_any_split_of_the_rows_gives_the_same_losses_when_the_reference_point_is_the_global_one():
    generator = torch.Generator().manual_seed(0)
    r, kl = torch.randn(2, 16, generator=generator, dtype=torch.float64) + 0.5
    d = torch.arange(16) % 2 == 0
    whole = kto_loss(r, d, kl)
    for size in (1, 2, 4, 16):
        pieces = [kto_loss(a, b, kl) for a, b in zip(r.split(size), d.split(size))]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=4e-16)     # vector and scalar exp differ by 1 ulp
    own = [kto_loss(a, b, c) for a, b, c in zip(r.split(4), d.split(4), kl.split(4))]
    assert (torch.cat(own) - whole).abs().max() > 1e-3                               # a z0 per micro-batch is another loss


LOSS_INPUTS = {"kto": torch.tensor([0.3, 0.9]), "kto_uniform": torch.tensor(1.7), "apo_zero_unpaired": None, "bco": torch.tensor(0.2)}


def call(name, x, desirable, **how):
    third = LOSS_INPUTS[name]
    return kto.LOSSES[name](x, desirable, *([] if third is None else [third.to(x.dtype)]), **how)


@pytest.mark.parametrize("name", kto.LOSSES)
def test_a_loss_gives_one_number_per_example_in_input_order(name):
    x, d = torch.linspace(-9, 9, 12, dtype=torch.float64), torch.arange(12) % 3 == 0
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    loss = call(name, x, d)
    assert loss.shape == (12,)
    torch.testing.assert_close(call(name, x[order], d[order]), loss[order], rtol=0, atol=1e-15)      # 1 ulp; neighbours: > 1e-3


@pytest.mark.parametrize("name", kto.LOSSES)
def test_a_loss_falls_when_a_desirable_response_rises_and_when_an_undesirable_one_falls(name):
    x = torch.linspace(-9, 9, 13, dtype=torch.float64)
    assert (call(name, x, torch.ones(13, dtype=torch.bool)).diff() < 0).all()
    assert (call(name, x, torch.zeros(13, dtype=torch.bool)).diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", kto.LOSSES)
def test_no_loss_is_nan_at_log_ratios_of_a_thousand_even_at_beta_one(name, dtype):
    x = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0, 0.0], dtype=dtype, requires_grad=True)
    loss = call(name, x, torch.tensor([True, True, False, False, True]), beta=1.0)
    gradient, = torch.autograd.grad(loss.sum(), x)
    assert loss.isfinite().all() and gradient.isfinite().all()


# --- relatives --------------------------------------------------------------------------------------------------------

def tabular(n=7, seed=0):
    """log pi of n responses, their entropy, and the exact KL to the uniform distribution over them."""
    logps = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(3).log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    kl = (logps.exp() * (logps + math.log(n))).sum()                                 # sum pi (log pi - log 1/n), no clamp, no H
    return logps, entropy, kl


def test_log_pi_plus_entropy_is_r_minus_z0_under_a_uniform_reference_and_minus_is_wrong_by_2H():
    logps, entropy, kl = tabular()
    r = logps + math.log(7)
    torch.testing.assert_close(logps + entropy, r - kl, rtol=0, atol=1e-14)          # numbers below 16: a few eps of it
    torch.testing.assert_close((r - kl) - (logps - entropy), (2 * entropy).expand(7), rtol=0, atol=1e-14)
    assert entropy > 0.1


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_kto_uniform_is_kto_with_a_uniform_reference_and_the_exact_kl(n):
    logps, entropy, kl = tabular(n)
    d, how = torch.arange(n) % 2 == 0, dict(beta=0.5, lambda_d=1.75, lambda_u=0.5)
    with_ref = kto_loss(logps + math.log(n), d, kl[None], **how)
    torch.testing.assert_close(kto_uniform_loss(logps, d, entropy, **how), with_ref, rtol=0, atol=1e-14)     # as above
    moved = kto_loss(logps + math.log(n), d, (kl + 2 * entropy)[None], **how)        # the printed minus: z0 is 2H too high
    torch.testing.assert_close(kto_uniform_loss(logps, d, -entropy, **how), moved, rtol=0, atol=1e-14)
    assert (moved - with_ref).abs().max() > 0.01                                     # and that is another loss


def test_kto_uniform_takes_an_entropy_per_prompt_or_one_for_all_and_does_not_clamp_it():
    logps, d = torch.tensor([-3.0, -2.0], dtype=torch.float64), torch.tensor([True, False])
    each = kto_uniform_loss(logps, d, torch.tensor([3.0, 5.0]), beta=1.0)
    assert each.tolist() == pytest.approx([0.5, 1 - 1 / (1 + math.exp(3))], rel=1e-15)
    assert torch.equal(kto_uniform_loss(logps, d, torch.tensor(3.0)), kto_uniform_loss(logps, d, torch.tensor([3.0, 3.0])))
    assert kto_uniform_loss(logps, d, torch.tensor(-3.0), beta=1.0)[0].item() == pytest.approx(1 - 1 / (1 + math.exp(6)), rel=1e-15)


def test_at_the_uniform_policy_every_uniform_kto_loss_is_half_its_lambda():
    log8 = torch.tensor(math.log(8), dtype=torch.float64)
    loss = kto_uniform_loss(-log8.expand(8), torch.arange(8) < 4, log8, lambda_d=4.0, lambda_u=2.0)
    assert loss.tolist() == [2.0] * 4 + [1.0] * 4                                    # -log 8 + log 8 is 0 exactly


def test_apo_zero_unpaired_is_kto_with_a_reference_point_of_zero():
    r = torch.linspace(-50, 50, 21, dtype=torch.float64, requires_grad=True)
    d = torch.arange(21) % 2 == 0
    apo, plain = apo_zero_unpaired_loss(r, d, beta=0.3), kto_loss(r, d, torch.empty(0), beta=0.3)
    assert torch.equal(apo, plain)                                                   # the same operations in the same order
    assert torch.equal(*(torch.autograd.grad(loss.sum(), r)[0] for loss in (apo, plain)))


def test_bco_keeps_pushing_where_kto_has_given_up():
    r = torch.tensor([-1000.0], dtype=torch.float64, requires_grad=True)             # desirable and hopelessly unlikely
    d = torch.tensor([True])
    bco = bco_loss(r, d, torch.tensor(0.0), beta=1.0)
    assert bco.item() == 1000.0                                                      # log(sigmoid(-1000)) would be -inf
    assert torch.autograd.grad(bco.sum(), r)[0].item() == -1.0                       # the full slope, beta
    assert torch.autograd.grad(kto_loss(r, d, r.new_empty(0), beta=1.0).sum(), r)[0].item() == 0.0       # e^-1000 underflows


def test_bco_splits_the_classes_at_the_shift():
    shift = torch.tensor(2.0, dtype=torch.float64)                                   # in units of beta r, not of r
    loss = bco_loss(torch.tensor([4.0, 4.0], dtype=torch.float64), torch.tensor([True, False]), shift, beta=0.5)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)


def test_at_the_reference_dpo_has_four_times_the_gradient_of_kto():
    beta, m = 0.3, 5
    chosen, rejected = torch.zeros(2, m, dtype=torch.float64, requires_grad=True)
    dpo = -F.logsigmoid(beta * (chosen - rejected)).mean()                           # m pairs
    both, labels = torch.cat([chosen, rejected]), torch.arange(2 * m) < m
    plain = kto_loss(both, labels, both.new_empty(0), beta=beta).mean()              # the same 2 m responses
    for x in (chosen, rejected):
        of_dpo, of_kto = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (dpo, plain))
        assert of_kto.abs().min() > 0
        torch.testing.assert_close(of_dpo, 4 * of_kto, rtol=1e-15, atol=0)           # beta/2m against beta/4/2m


# --- the contract -----------------------------------------------------------------------------------------------------

CONTRACT = {                                                                         # DESIGN.md, section 3
    reference_point: "(kl_logratios)",
    value: "(logratios, desirable, z0, *, beta, lambda_d, lambda_u)",
    kto_loss: "(logratios, desirable, kl_logratios, *, beta=0.1, lambda_d=1.0, lambda_u=1.0)",
    kto_uniform_loss: "(logps, desirable, entropy, *, beta=0.1, lambda_d=1.0, lambda_u=1.0)",
    apo_zero_unpaired_loss: "(logratios, desirable, *, beta=0.1)",
    bco_loss: "(logratios, desirable, reward_shift, *, beta=0.1)",
}


@pytest.mark.parametrize("function", CONTRACT, ids=lambda f: f.__name__)
def test_signatures_are_the_contract_measured_before_the_star_chosen_after(function):
    assert str(inspect.signature(function)) == CONTRACT[function]


def test_losses_maps_each_short_name_to_the_function_of_that_name():
    assert list(kto.LOSSES) == ["kto", "kto_uniform", "apo_zero_unpaired", "bco"]
    assert all(function.__name__ == name + "_loss" and getattr(kto, name + "_loss") is function for name, function in kto.LOSSES.items())


def tree():
    return ast.parse(Path(kto.__file__).read_text())


def test_kto_imports_torch_and_nothing_else():
    imported = [a.name for n in ast.walk(tree()) if isinstance(n, ast.Import) for a in n.names]
    imported += [n.module for n in ast.walk(tree()) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported} == {"torch"}


def test_the_kto_loss_with_all_it_calls_fits_in_fifteen_lines_of_code():
    functions = {f.name: f for f in tree().body if isinstance(f, ast.FunctionDef)}
    lines = set()
    for name in ("kto_loss", "reference_point", "value", "class_weight"):
        code = [s for s in functions[name].body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        lines |= {n.lineno for s in code for n in ast.walk(s) if hasattr(n, "lineno")} | {functions[name].lineno}
    assert 8 <= len(lines) < 15                                                      # 8: the count itself must not be broken
    called = {n.func.id for n in ast.walk(functions["kto_loss"]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert called == {"reference_point", "value", "class_weight"}


def test_no_loss_reads_a_model_a_device_or_a_rank():
    names = {n.attr for n in ast.walk(tree()) if isinstance(n, ast.Attribute)} | {n.id for n in ast.walk(tree()) if isinstance(n, ast.Name)}
    assert not names & {"device", "cuda", "distributed", "float", "double", "half", "bfloat16", "to", "item"}

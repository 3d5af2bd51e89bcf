"""Claims about model.py: flat rows give what separate forwards give, transformers agrees, and sampling samples the policy."""
import functools
import inspect
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
from model import GPT, GPTConfig, HFPolicy, head_log_probs, load_policy, log_probs, sample, token_logps

CONFIG = GPTConfig(vocab_size=61, context=32, n_layer=2, n_head=2, d_model=16, bias=True)
LENGTHS = [6, 9, 1, 5]


def gpt(seed=0, dtype=torch.float64, scale=0.3, **changes):
    """A small GPT whose every parameter is random and large enough to matter (0.02 would leave attention uniform)."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**vars(CONFIG), **changes})).to(dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * scale + ("ln_" in name and name.endswith("weight")))
    return net


def flat_row(lengths=LENGTHS, vocab=61, seed=1):
    ids = torch.randint(vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return ids, torch.cat([torch.arange(n) for n in lengths]), lengths


def apart(net, ids, lengths):
    """Logits of each sequence in a forward of its own."""
    return torch.cat([net(part, torch.arange(n), [n]) for part, n in zip(ids.split(lengths), lengths)])


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- log-probs --------------------------------------------------------------------------------------------------------

def test_log_probs_is_the_log_softmax_at_the_target_for_any_leading_shape():
    logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(12).view(3, 4) % 7
    naive = (logits.exp() / logits.exp().sum(-1, keepdim=True)).log()
    wanted = naive.gather(-1, targets[..., None])[..., 0]
    close(log_probs(logits, targets), wanted, 1e-14)                                 # log-probs of size 5: a few dozen eps
    close(log_probs(logits[0], targets[0]), wanted[0], 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_widened_before_the_softmax_and_wide_ones_never_narrowed(dtype):
    logits, targets = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).mul(3), torch.arange(50)
    narrow = logits.to(dtype)
    logps = log_probs(narrow, targets)
    assert logps.dtype == torch.float32
    close(logps, narrow.float().log_softmax(-1)[targets, targets], 1e-5)             # float32 rounding of numbers near 10
    inside = narrow.log_softmax(-1)[targets, targets].float()                        # what it would be without widening
    assert (inside - logps).abs().max() > (0.01 if dtype == torch.bfloat16 else 1e-3)         # their steps near 9: 0.06, 0.008
    assert log_probs(logits.double(), targets).dtype == torch.float64 and log_probs(logits, targets).dtype == torch.float32


def padded(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(2, 5, 7, dtype=torch.float64, generator=g), torch.randint(7, (2, 5), generator=g)
    mask = torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    return logits, ids, mask


def test_token_logps_gives_index_t_the_logits_of_t_minus_one_times_its_weight():
    logits, ids, mask = padded()
    logps = token_logps(logits, ids, mask)
    for b in range(2):
        for t in range(5):
            wanted = mask[b, t] * logits[b, t - 1].log_softmax(-1)[ids[b, t]] if t else torch.zeros(()).double()
            close(logps[b, t], wanted, 1e-14)                                        # one log-softmax of numbers below 5
    assert (logps[:, 0] == 0).all() and logps.shape == (2, 5) and (logps[mask == 0] == 0).all()


def test_index_zero_is_zero_even_where_its_mask_is_one():
    logits, ids, _ = padded()
    assert (token_logps(logits, ids, torch.ones(2, 5))[:, 0] == 0).all()


def test_a_masked_minus_infinity_is_no_nan_in_value_or_gradient():
    logits, ids, mask = padded()
    logits[0, 0, ids[0, 1]] = -torch.inf                                             # ids[0, 1] cannot come; its mask is 0
    logits[0, 3, ids[0, 4]] = -torch.inf
    logits.requires_grad_()
    logps = token_logps(logits, ids, mask)
    gradient, = torch.autograd.grad(logps.sum(), logits)
    assert logps.isfinite().all() and gradient.isfinite().all()
    assert (gradient[0, 0] == 0).all() and (gradient[0, 3] == 0).all() and (gradient[0, 1] != 0).all()


def test_token_logps_widens_narrow_logits():
    logits, ids, mask = padded()
    assert token_logps(logits.bfloat16(), ids, mask.float()).dtype == torch.float32
    assert token_logps(logits, ids, mask.float()).dtype == torch.float64


def head_inputs(m=23, d=8, v=20):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(m, d, dtype=torch.float64, generator=g, requires_grad=True),
            torch.randn(v, d, dtype=torch.float64, generator=g, requires_grad=True), torch.randint(v, (m,), generator=g))


@pytest.mark.parametrize("chunk_elements", [1, 20, 60, 100, 459, 460, 10 ** 6])
def test_the_head_in_chunks_is_the_head_in_one_piece_in_value_and_gradient(chunk_elements):
    hidden, weight, targets = head_inputs()
    upstream = torch.linspace(-1, 1, 23, dtype=torch.float64)
    whole, chunked = log_probs(hidden @ weight.T, targets), head_log_probs(hidden, weight, targets, chunk_elements=chunk_elements)
    close(chunked, whole, 1e-13)                                                     # another order of sums of 20 numbers near 10
    for a, b in zip(*(torch.autograd.grad((x * upstream).sum(), (hidden, weight)) for x in (whole, chunked))):
        close(b, a, 1e-13)
    with torch.no_grad():
        close(head_log_probs(hidden, weight, targets, chunk_elements=chunk_elements), whole.detach(), 1e-13)


@pytest.mark.parametrize("grad", [True, False])
def test_no_block_of_the_vocabulary_and_no_chunk_of_positions_holds_more_logits_than_it_may(grad):
    sizes, spy = [], lambda f: lambda logits, *a: sizes.append(tuple(logits.shape)) or f(logits, *a)
    hidden, weight, targets = head_inputs()
    kernels, chunk = model.Kernels(*map(spy, model.Kernels())), dict(chunk_elements=100)
    for head, once in ((lambda: head_log_probs(hidden, weight, targets, kernels=kernels, **chunk), [(23, 4)] * 5),
                       (lambda: model.chunked_log_probs(hidden, lambda h: h @ weight.T, 20, targets, log_probs=kernels.log_probs, **chunk), [(5, 20)] * 4 + [(3, 20)])):
        with torch.set_grad_enabled(grad):
            logps = head()
        assert sizes == once
        if grad:
            logps.sum().backward()
            assert sorted(sizes[len(once):]) == sorted(once)                         # each once more: recomputed, not remembered
        sizes.clear()


@pytest.mark.parametrize("n", [1, 3, 20])
def test_the_blocked_heads_gradient_is_the_difference_quotient(n):
    hidden, weight, targets = head_inputs(m=4, d=3)
    targets[1] = targets[0]                                                          # one token trained twice: its row of W gets both
    assert torch.autograd.gradcheck(lambda h, w: model._BlockedHead.apply(h, w, targets, n, model.Kernels()), (hidden, weight))


@pytest.mark.parametrize("chunk_elements", [60, 10 ** 6])
def test_a_frozen_head_and_a_frozen_trunk_get_no_gradient(monkeypatch, chunk_elements):
    made, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: made.append(1) or mm(*a, **k))
    for frozen in (0, 1):
        inputs = head_inputs()
        inputs[frozen].requires_grad_(False)
        made.clear()
        head_log_probs(*inputs, chunk_elements=chunk_elements).sum().backward()
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad.abs().sum() > 0
        assert bool(made) == (frozen == 0 and chunk_elements == 60)                  # nor is one computed and thrown away


def test_the_head_under_autocast_is_the_16_bit_head_its_sums_in_32():
    """Logits are rounded to bf16 as ever; the log-probs of 2,000 words from them are exact, and the gradients of float32 weights are float32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).requires_grad_() for n in (40, 2000))
    targets, results = torch.randint(2000, (40,), generator=g), []
    for chunk_elements in (40 * 2000, 40 * 128):
        with torch.autocast("cpu", torch.bfloat16):
            logps = head_log_probs(hidden, weight, targets, chunk_elements=chunk_elements)
        gradients = torch.autograd.grad(logps.sum(), (hidden, weight))
        assert logps.dtype == torch.float32 and all(x.dtype == torch.float32 for x in gradients)
        results.append((logps.detach(), *gradients))
    (a, *da), (b, *db) = results
    close(b, a, 1e-5)                                                                # float32 sums of the same rounded logits
    for x, y in zip(da, db):
        close(y, x, 0.02 * x.abs().max().item())                                     # bf16: 2^-8, twice


def test_a_head_without_targets_gives_an_empty_answer():
    hidden, weight, targets = head_inputs()
    assert head_log_probs(hidden[:0], weight, targets[:0]).shape == (0,)


# --- flat rows --------------------------------------------------------------------------------------------------------

def test_a_flat_row_is_its_sequences_one_by_one():
    net = gpt()
    ids, positions, lengths = flat_row()
    close(net(ids, positions, lengths), apart(net, ids, lengths), 1e-12)             # float64, logits below 100: 1e-14 per operation


@pytest.mark.parametrize("bias", [True, False])
def test_flat_sums_are_padded_token_logps_sums(bias):
    net = gpt(bias=bias)
    rows = [data.make_row([1, 2], [3, 4, 5]), data.make_row([7], [8]), data.make_row([9, 9, 9, 9], [1, 2])]
    flat = data.flatten(rows)
    sums = flat.sums(net(flat.ids, flat.positions, flat.lengths, flat.predict, flat.targets))
    width = max(flat.lengths)
    logits = torch.full((3, width, 61), 1e9, dtype=torch.float64)                    # pads hold nonsense; nobody may look
    ids, mask = torch.full((3, width), 60), torch.zeros(3, width)
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n], mask[b, :n] = torch.tensor(row.ids), torch.tensor(row.mask)
        logits[b, :n] = net(ids[b, :n], torch.arange(n), [n])
    close(token_logps(logits, ids, mask).sum(1), sums, 1e-12)                        # as above


def test_predict_and_targets_select_from_the_full_logits():
    net = gpt()
    ids, positions, lengths = flat_row()
    predict = torch.tensor([0, 3, 7, 17])
    logits = net(ids, positions, lengths)
    close(net(ids, positions, lengths, predict), logits[predict], 1e-13)             # the same numbers in a smaller product
    close(net(ids, positions, lengths, predict, ids[predict + 1]), logits.log_softmax(-1)[predict, ids[predict + 1]], 1e-12)


def test_only_positions_that_predict_something_meet_the_output_head():
    shapes, net = [], gpt()
    net.kernels = model.Kernels(lambda logits, targets: shapes.append(tuple(logits.shape)) or log_probs(logits, targets))
    ids, positions, lengths = flat_row()
    net(ids, positions, lengths, torch.tensor([0, 3, 7]), ids[[1, 4, 8]])
    assert shapes == [(3, 61)]                                                       # not all 21


def test_sequences_of_a_row_neither_see_nor_teach_each_other():
    net = gpt()
    ids, positions, lengths = flat_row()
    other = ids.clone()
    other[6:15] = (other[6:15] + 1) % 61                                             # the second sequence
    a, b = net(ids, positions, lengths), net(other, positions, lengths)
    assert torch.equal(a[:6], b[:6]) and torch.equal(a[15:], b[15:])                 # bit for bit: the same operations on the same numbers
    assert (a[6:15] - b[6:15]).abs().amax(1).min() > 1e-3
    seen = net(ids, positions, lengths)[15:].sum()                                   # 15: the third and fourth
    gradient, = torch.autograd.grad(seen, net.wpe.weight)
    assert (gradient[5:] == 0).all() and (gradient[:5] != 0).all()                   # positions 5 to 8 occur only in the first two


def test_no_token_sees_a_later_one():
    net = gpt()
    ids, positions, lengths = flat_row([8])
    later = ids.clone()
    later[5] = (later[5] + 1) % 61
    a, b = net(ids, positions, lengths), net(later, positions, lengths)
    assert torch.equal(a[:5], b[:5]) and (a[5:] != b[5:]).any(1).all()


def groups_of_rows():
    """Prompts of 1 to 5 tokens with 1 to 3 responses each, one of a single token, and LD-DPO's weights on one pair."""
    row, ld = data.make_row, data.length_desensitised((data.make_row([4, 4, 9], [5, 6, 7, 8, 9]), data.make_row([4, 4, 9], [2, 3])), 0.25)
    return [row([7], [1, 2, 3]), row([7], [4, 5]), row([1, 2, 3, 4, 5], [6, 7]), row([8, 9], [1]), row([8, 9], [2, 3, 4, 5]), row([8, 9], [6, 7]), *ld,
            row([5, 5], [1, 2], train_prompt=True), row([5, 5], [3, 4], train_prompt=True)]


def sums_and_gradients(net, share, extra=None):
    """(B,) or (1 + k, B) of groups_of_rows, and the gradient of a weighted sum of them in every parameter."""
    flat = data.flatten(groups_of_rows(), share=share)
    values = net(flat.ids, flat.positions, flat.lengths, flat.predict, flat.targets, extra)
    sums = flat.sums(values) if extra is None else torch.stack([flat.sums(v) for v in values])
    return flat, sums, torch.autograd.grad((sums * torch.linspace(-1, 2, 10, dtype=sums.dtype)).sum(), list(net.parameters()))


@pytest.mark.parametrize("chunk_elements", [61, 400, 10 ** 6])
@pytest.mark.parametrize("more", [False, True])
def test_a_prompt_computed_once_for_its_responses_is_the_prompt_computed_for_each(monkeypatch, chunk_elements, more):
    monkeypatch.setitem(head_log_probs.__kwdefaults__, "chunk_elements", chunk_elements)
    extra = (lambda logits, targets, part: torch.stack([logits.logsumexp(-1), model.position_confidence(logits, targets)])) if more else None
    (plain, a, da), (shared, b, db) = (sums_and_gradients(gpt(), share, extra) for share in (False, True))
    assert shared.lengths == [(1, 3, 2), 7, (2, 1, 4, 2), (3, 5, 2), 4, 4] and len(shared.ids) == len(plain.ids) - 1 - 2 - 2 - 3
    close(b, a, 1e-12)                                                               # float64, sums near 100
    for x, y in zip(da, db):
        close(y, x, 1e-10)                                                           # gradients near 1e3: sums in another order


def test_responses_that_share_a_prompt_neither_see_nor_teach_each_other():
    net = gpt()
    rows = [data.make_row([1, 2], r) for r in ([3, 4, 5], [6, 7], [8, 9, 10])]
    flat = data.flatten(rows, share=True)
    token = {y: net(flat.ids.where(flat.ids != 7, torch.tensor(y)), flat.positions, flat.lengths) for y in (7, 20)}
    changed = (token[7] != token[20]).any(1)
    assert flat.ids[changed].tolist() == [7]                                         # the last token of y_2: only what stands there


def test_a_policy_with_mismatched_responses_beside_is_two_forwards():
    """Values of both passes, the gradient of the first, and none through the second; with equal prompts next to each other."""
    net = gpt()
    rows = [data.make_row(p, r) for p, r in (([7], [1, 2, 3]), ([7], [4]), ([1, 2, 3], [5, 6]), ([9, 9], [8]))]
    pairs = [data.mismatched(row, rows[j], 32) for row, j in zip(rows, (2, 3, 0, 1))]
    flat, other = data.flatten(rows), data.flatten(pairs)
    logps, silent = net.forward_beside(flat, other, [r.n_prompt for r in rows])
    plain, expected = (net(f.ids, f.positions, f.lengths, f.predict, f.targets) for f in (flat, other))
    assert logps.requires_grad and not silent.requires_grad
    close(logps, plain, 1e-12)                                                       # float64, log-probs below 100
    close(silent, expected.detach(), 1e-12)
    for x, y in zip(*(torch.autograd.grad(v.sin().sum(), list(net.parameters())) for v in (plain, logps))):
        close(y, x, 1e-10)


def dense_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, from_the_end=True):
    """What the CUDA kernel is documented to do, by a dense mask over all queries and keys."""
    assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[0] == cu_k[0] == 0 and (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    assert (max_q, max_k) == tuple(int(c.diff().max()) for c in (cu_q, cu_k))
    (row_q, at_q), (row_k, at_k) = ((torch.repeat_interleave(torch.arange(len(c) - 1), c.diff()), torch.cat([torch.arange(n) for n in c.diff()])) for c in (cu_q, cu_k))
    shift = (cu_k.diff() - cu_q.diff())[row_q] if from_the_end else torch.zeros_like(row_q)
    seen = (row_q[:, None] == row_k) & (at_k <= (at_q + shift)[:, None])
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("share", [False, True])
def test_attention_in_one_kernel_is_the_loop_over_sequences(monkeypatch, share):
    """On a GPU. Here the kernel is a dense mask; what it is called with is under test, for shared prompts and for mismatched responses beside."""
    rows = [data.make_row(p, r) for p, r in (([7], [1, 2, 3]), ([7], [4]), ([1, 2, 3], [5, 6]), ([9, 9], [8]))]
    flat, other = data.flatten(rows), data.flatten([data.mismatched(row, rows[j], 32) for row, j in zip(rows, (2, 3, 0, 1))])
    results = []
    for attend in (model.attend, model.varlen_attention):
        monkeypatch.setattr(model, "attend", attend)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", dense_varlen)
        net = gpt()
        _, sums, gradients = sums_and_gradients(net, share)
        results.append([sums, *gradients, *net.forward_beside(flat, other, [r.n_prompt for r in rows])])
    for a, b in zip(*results):
        close(b, a, 1e-10)                                                           # float64, gradients near 1e3


def test_the_kernel_is_taken_only_where_it_exists_and_is_causal_from_the_end(monkeypatch):
    ask = lambda: model.varlen_is_right.__wrapped__("cpu", torch.bfloat16, 2, 8)                              # noqa: E731
    assert not ask()                                                                 # this machine's torch has it for CUDA only
    for from_the_end in (True, False):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", functools.partial(dense_varlen, from_the_end=from_the_end))
        assert ask() == from_the_end


def test_the_kernel_takes_what_it_is_given():
    from torch.nn.attention.varlen import varlen_attn
    inspect.signature(varlen_attn).bind(*range(7), window_size=(-1, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_log_probs_of_a_policy_are_float32_or_better(dtype):
    net = gpt(dtype=dtype)
    ids, positions, lengths = flat_row()
    logps = net(ids, positions, lengths, torch.tensor([0, 1]), ids[1:3])
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_z0_from_mismatched_pairs_is_not_the_mean_of_the_matched_log_ratios_however_rolled():
    policy, ref = gpt(0), gpt(1)
    rows = [data.make_row([i, i + 1], [3 * i + 5, i + 9, 60]) for i in range(8)]
    def ratios(rows):
        f = data.flatten(rows)
        with torch.no_grad():
            return f.sums(policy(*f[:3], f.predict, f.targets) - ref(*f[:3], f.predict, f.targets))
    matched = ratios(rows)
    mismatched = ratios([data.mismatched(rows[i], rows[j], 32) for i, j in enumerate(data.mismatch([r.prompt_key for r in rows]))])
    close(matched.roll(1).mean(), matched.mean(), 1e-12)                             # a mean does not care: 8 numbers near 10
    assert (mismatched.mean() - matched.mean()).abs() > 0.1


def test_init_is_gpt2s_small_and_smaller_where_residual_branches_add_up():
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=500, context=64, n_layer=8, n_head=4, d_model=64, bias=True))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 4 if "c_proj" in name else 0.02                             # sqrt(2 x 8 layers) = 4
            assert abs(p.std().item() / std - 1) < 5 / (2 * p.numel()) ** 0.5, name  # 5 standard errors of a sample's deviation
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
    ids, positions, lengths = flat_row([64] * 4, 500)
    nll = -log_probs(net(ids, positions, lengths)[:-1], ids[1:]).mean().item()
    assert abs(nll - math.log(500)) < 0.1                                            # nearly uniform: logits of size 0.02 sqrt(64) = 0.16


# --- GPT-2's format ---------------------------------------------------------------------------------------------------

def hf_gpt2(folder, dtype=torch.float32, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**{**dict(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2), **changes})).to(dtype).eval()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + ("ln_" in name and name.endswith("weight")))
    lm.save_pretrained(folder)
    return lm


def hf_logits(lm, ids, lengths):
    with torch.no_grad():
        return torch.cat([lm(part[None], use_cache=False).logits[0] for part in ids.split(lengths)])


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_the_small_gpt_is_transformers_gpt2(tmp_path, dtype, atol):
    """1e-5: float32 rounding over two layers; 1e-10: the same in float64 would be 1e-14, a wrong constant 1e-3."""
    lm = hf_gpt2(tmp_path).to(dtype)
    net = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert net.config.bias and net.wte.weight.dtype == dtype
    ids, positions, lengths = flat_row()
    with torch.no_grad():
        close(net(ids, positions, lengths).log_softmax(-1), hf_logits(lm, ids, lengths).log_softmax(-1), atol)


def test_float64_weights_are_not_narrowed_on_their_way_in(tmp_path):
    lm = hf_gpt2(tmp_path, torch.float64)
    net = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(net.wte.weight, lm.transformer.wte.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_what_we_save_and_computes_the_same(tmp_path, bias):
    from transformers import AutoModelForCausalLM
    net = gpt(bias=bias)
    net.save(tmp_path, eot=60)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(lm).__name__ == "GPT2LMHeadModel" and lm.config.eos_token_id == 60
    ids, positions, lengths = flat_row()
    with torch.no_grad():
        close(net(ids, positions, lengths), hf_logits(lm, ids, lengths), 1e-12)      # float64, logits below 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_what_we_save_comes_back_bit_for_bit_as_our_own_gpt(tmp_path, bias, dtype):
    net = gpt(dtype=dtype, bias=bias)
    net.save(tmp_path)
    again = load_policy(tmp_path, dtype=dtype)
    assert isinstance(again, GPT) and again.config == net.config
    for (name, p), q in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_saving_twice_overwrites_and_sharded_weights_load(tmp_path):
    gpt(0).save(tmp_path)
    lm = hf_gpt2(tmp_path / "sharded")
    lm.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    assert len(model.weight_files(tmp_path / "sharded")) > 1
    assert torch.equal(GPT.from_pretrained(tmp_path / "sharded").wte.weight, lm.transformer.wte.weight)
    gpt(1).float().save(tmp_path)
    assert torch.equal(load_policy(tmp_path).wte.weight, gpt(1).float().wte.weight)


def one_line(call, *args, **how):
    with pytest.raises(SystemExit) as e:
        call(*args, **how)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    return e.value.code


def test_a_folder_that_is_no_model_is_a_one_line_error_that_names_it(tmp_path):
    assert f"{tmp_path}: no config.json" in one_line(load_policy, tmp_path)
    assert f"{tmp_path / 'none'}: no config.json" in one_line(load_policy, tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert f"{tmp_path}: no *.safetensors" in one_line(load_policy, tmp_path)
    assert "no *.safetensors" in one_line(GPT.from_pretrained, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is 'llama'" in one_line(GPT.from_pretrained, tmp_path)


def test_a_broken_config_is_a_one_line_error_that_names_the_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert str(tmp_path) in one_line(load_policy, tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    gpt().save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "h.1.mlp.c_fc.weight" in one_line(load_policy, tmp_path)


# --- generation -------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [7], [4, 4, 4, 4, 4, 4], [0, 8], [5, 6, 7, 8, 0]]
EOT = 7


def small(seed=3, **changes):
    """Nine tokens, so that an end-of-text turns up soon; float64, so that two ways to compute agree on every token."""
    return gpt(seed, vocab_size=9, context=24, **changes)


def naive_generate(net, prompts, eot, new, temperature=1.0, top_p=1.0, seed=0, room=24):
    """No cache, no batch: the whole sequence through the model again for every token."""
    out = []
    for i, prompt in enumerate(prompts):
        ids, noise = list(prompt), np.random.default_rng([seed, i]).random(new)
        for t in range(new):
            logits = net(torch.tensor(ids), torch.arange(len(ids)), [len(ids)])[-1:]
            ids.append(sample(logits, torch.tensor(noise[t:t + 1]), temperature, top_p).item())
            if ids[-1] == eot or len(ids) == room:
                break
        out.append(ids[len(prompt):])
    return out


@pytest.mark.parametrize("how", [dict(temperature=0), dict(), dict(temperature=0.6, seed=5), dict(top_p=0.7), dict(temperature=2.0, top_p=0.9)], ids=str)
def test_generating_with_the_cache_is_generating_without(how):
    net = small()
    with torch.no_grad():
        expected = naive_generate(net, PROMPTS, EOT, 15, **how)
    assert net.generate(PROMPTS, eot=EOT, max_new_tokens=15, **how) == expected
    if how.get("temperature") != 0:
        assert len({len(r) for r in expected}) > 1                                   # rows of several lengths: the batch does shrink


def test_a_sample_does_not_depend_on_the_other_rows_nor_on_how_many_go_together():
    net = small()
    all_at_once = net.generate(PROMPTS, eot=EOT, max_new_tokens=12, seed=4)
    for rows in (1, 2, 3):
        assert net.generate(PROMPTS, eot=EOT, max_new_tokens=12, seed=4, rows=rows) == all_at_once
    assert net.generate(PROMPTS[4:1:-2], eot=EOT, max_new_tokens=12, seed=4, numbers=[4, 2]) == all_at_once[4:1:-2]         # a part, called by its numbers
    others = [[3, 3], *PROMPTS[1:3], [1], [2]]
    assert net.generate(others, eot=EOT, max_new_tokens=12, seed=4)[1:3] == all_at_once[1:3]
    assert net.generate(PROMPTS, eot=EOT, max_new_tokens=5, seed=4) == [r[:5] for r in all_at_once]
    assert net.generate(PROMPTS, eot=EOT, max_new_tokens=12, seed=5) != all_at_once


def test_equal_prompts_in_one_batch_get_samples_of_their_own():
    assert len({tuple(r) for r in small().generate([[1]] * 20, eot=EOT, max_new_tokens=12)}) > 5


def test_a_finished_row_leaves_the_batch(monkeypatch):
    net, counts = small(), []
    trunk = net.trunk
    monkeypatch.setattr(net, "trunk", lambda ids, *rest: counts.append(len(ids)) or trunk(ids, *rest))
    out = net.generate(PROMPTS, eot=EOT, max_new_tokens=12)
    assert counts[0] == sum(map(len, PROMPTS))                                       # prompts as one flat row, no pads
    assert counts[1:] == [n for n in (sum(len(r) > t for r in out) for t in range(1, 12)) if n]
    assert min(counts[1:]) < len(PROMPTS)


def test_an_end_of_text_comes_last_and_once_or_not_at_all():
    out = small().generate(PROMPTS * 4, eot=EOT, max_new_tokens=12)
    assert all(EOT not in r[:-1] and (r[-1] == EOT or len(r) == 12) for r in out)
    assert {r[-1] == EOT for r in out} == {True, False}


@pytest.mark.parametrize("room", [None, 10, 100])
def test_prompt_and_response_fit_the_room_so_that_they_can_be_scored(room):
    net = small()
    limit = min(room or 24, 24)
    prompts = [p + [1] * n for p, n in zip(PROMPTS, (0, 8, 3, 1, 4))]
    out = net.generate(prompts, eot=8, max_new_tokens=50, temperature=0, room=room)      # greedy, and 8 does not come
    assert [len(p) + len(r) for p, r in zip(prompts, out)] == [limit] * 5
    for p, r in zip(prompts, out):
        flat = data.flatten([data.make_row(p, r)])
        assert net(*flat[:3], flat.predict, flat.targets).isfinite().all()


def test_prompts_that_do_not_fit_or_are_empty_are_an_error():
    net = small()
    for prompts, room in (([[1] * 25], None), ([[1], [1] * 11], 10), ([[1], []], None)):
        with pytest.raises(ValueError, match="prompts must have 1 to"):
            net.generate(prompts, eot=EOT, max_new_tokens=3, room=room)


def test_no_prompts_or_no_tokens_give_empty_answers():
    assert small().generate([], eot=EOT, max_new_tokens=3) == [] and small().generate([[1], [2]], eot=EOT, max_new_tokens=0) == [[], []]


def test_generation_carries_no_gradient_and_leaves_the_global_random_state_alone():
    net = small()
    torch.manual_seed(0), np.random.seed(0)
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()
    net.generate(PROMPTS, eot=EOT, max_new_tokens=5)
    assert torch.equal(before, torch.get_rng_state()) and (before_np == np.random.get_state()[1]).all()
    assert all(p.grad is None for p in net.parameters())


def test_generation_samples_the_policys_own_distribution():
    net, n = small(), 4000
    first = torch.tensor([r[0] for r in net.generate([[1, 2]] * n, eot=EOT, max_new_tokens=1, seed=1)])
    p = net(torch.tensor([1, 2]), torch.arange(2), [2])[-1].softmax(-1).detach()
    counts = torch.bincount(first, minlength=9)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert (n * p).min() > 5 and chi2 < 43                                           # 8 degrees of freedom: P(chi2 > 43) = 1e-6


# --- sampling from logits ---------------------------------------------------------------------------------------------

def frequencies(logits, n, **how):
    """Tokens at n evenly spaced uniform numbers: each gets its probability times n, give or take one."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.bincount(sample(logits.expand(n, -1), uniform, **how), minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sample_frequencies_are_the_softmax(dtype, temperature):
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0, -torch.inf], dtype=dtype)
    p = torch.softmax(logits.double() / temperature, -1)
    counts = frequencies(logits, 1000, temperature=temperature)
    assert (counts - 1000 * p).abs().max() <= 1 and counts[4] == 0


def naive_top_p(p, top_p):
    """The likeliest tokens one after another until their mass reaches top_p."""
    kept, mass = torch.zeros_like(p), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        kept[i], mass = p[i], mass + p[i].item()
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.50001, 0.75, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_that_reaches_it(top_p):
    p = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625], dtype=torch.float64)        # exact in binary: 0.5 and 0.75 are reached exactly
    wanted = naive_top_p(p, top_p)
    counts = frequencies(p.log(), 1600, top_p=top_p)
    assert (counts - 1600 * wanted).abs().max() <= 1 and ((counts > 0) == (wanted > 0)).all()


def test_the_smallest_nucleus_is_one_token():
    assert frequencies(torch.tensor([0.0, 3.0, 1.0, -1.0]), 10, top_p=0.0).tolist() == [0, 10, 0, 0]


def test_greedy_is_the_argmax_whatever_the_noise():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, torch.rand(50, dtype=torch.float64), temperature=0), logits.argmax(-1))


def test_the_ends_of_the_uniform_interval_never_give_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (1 - 2 ** -53, 2), (0.5 - 1e-12, 1), (0.5 + 1e-12, 2)):
        assert sample(logits, torch.tensor([u], dtype=torch.float64)).item() == token


# --- Hugging Face models ----------------------------------------------------------------------------------------------

TINY = dict(vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=0)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **TINY)
GPT2_SHAPE = dict(n_embd=32, n_layer=2, n_head=2, **TINY)
MODELS = {   # one line per difference that matters here; a sliding window of 4 is shorter than the sequences
    "gpt2": GPT2_SHAPE, "llama": SMALL | dict(tie_word_embeddings=False), "qwen2": SMALL | dict(tie_word_embeddings=True), "qwen3": SMALL | dict(head_dim=16),
    "mistral": SMALL | dict(sliding_window=4), "gemma": SMALL | dict(head_dim=16), "gemma2": SMALL | dict(head_dim=16, sliding_window=4, final_logit_softcapping=5.0),
    "gemma3_text": SMALL | dict(head_dim=16, sliding_window=4, final_logit_softcapping=5.0), "cohere": SMALL, "granite": SMALL | dict(logits_scaling=7.0),
    "phi": SMALL, "opt": SMALL | dict(ffn_dim=64, word_embed_proj_dim=16), "mixtral": SMALL | dict(num_local_experts=4),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=2, **TINY)}


def tiny_lm(kind, std=0.3, **changes):
    """Weights of 0.3, not 0.02: logits of size 10, so that what leaks from one sequence into another shows."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**MODELS[kind], "initializer_range": std, **changes})).eval()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=std)                                                   # zeros would hide a forgotten bias
    return lm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = {}
    for kind in MODELS:
        out[kind] = tmp_path_factory.mktemp(kind)
        tiny_lm(kind).save_pretrained(out[kind], max_shard_size="10KB")              # sharded, all of them
    return out


def response(ids):
    predict = torch.tensor([0, 2, 4, 6, 9, 13, 16, 18])
    return predict, ids[predict + 1]


# no mixtral in float64: torch's grouped matmul, which transformers uses for experts, does not have it
@pytest.mark.parametrize("kind, dtype, atol", [(k, *how) for k in MODELS for how in ((torch.float32, 1e-4), (torch.float64, 1e-5)) if (k, how[0]) != ("mixtral", torch.float64)])
def test_every_architecture_gives_what_separate_forwards_give_flat_and_padded_chunked_and_whole(folders, kind, dtype, atol):
    """Logits near 10: float32 rounds at 1e-5; float64 keeps transformers' float32 rotary angles and norms. A leak would show as 0.1."""
    policy = load_policy(folders[kind], dtype=dtype)
    ids, positions, lengths = flat_row(vocab=64)
    predict, targets = response(ids)
    expected = hf_logits(policy.lm, ids, lengths)
    assert policy.chunked and policy.vocab_size == 64 and len(model.weight_files(folders[kind])) > 1
    assert policy.flat == (kind not in ("bloom", "opt"))                             # no position_ids at all; sequences see each other in spite of them
    for policy.flat in {policy.flat, False}:
        for policy.chunked in (True, False):
            with torch.no_grad():
                assert policy.hidden(ids, positions, lengths, predict).shape == (8, expected.shape[-1] if not policy.chunked else
                                                                                 policy.lm.get_output_embeddings().weight.shape[1])
                close(policy(ids, positions, lengths), expected, atol)
                close(policy(ids, positions, lengths, predict), expected[predict], atol)
                close(policy(ids, positions, lengths, predict, targets), expected.log_softmax(-1)[predict, targets], atol)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_the_head_in_parts_has_the_gradient_of_the_whole(monkeypatch, folders, kind):
    """By blocks of the vocabulary (llama), or in chunks of positions where the head is capped (gemma2) or has a bias (phi)."""
    policy, used = load_policy(folders[kind], dtype=torch.float64), []
    ids, positions, lengths = flat_row(vocab=64)
    for name in ("chunked_log_probs", "head_log_probs"):
        monkeypatch.setattr(model, name, lambda *a, f=getattr(model, name), name=name, **how: used.append(name) or f(*a, **how | {"chunk_elements": 3 * 64}))
    gradients = []
    for policy.chunked in (True, False):
        loss = policy(ids, positions, lengths, *response(ids)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
    assert used == ["head_log_probs" if kind == "llama" else "chunked_log_probs"] + ["chunked_log_probs"]
    for a, b in zip(*gradients):
        close(a, b, 1e-9 * b.abs().max().clamp(min=1).item())                        # float64, another order of sums


def test_only_response_positions_meet_a_hugging_face_head_and_never_more_than_a_chunk(monkeypatch, folders):
    policy, shapes = load_policy(folders["gemma2"]), []
    policy.lm.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    monkeypatch.setattr(model, "chunked_log_probs", functools.partial(model.chunked_log_probs, chunk_elements=3 * 64))
    ids, positions, lengths = flat_row(vocab=64)
    logps = policy(ids, positions, lengths, *response(ids))
    assert shapes == [(3, 64), (3, 64), (2, 64)]                                     # 8 of 21 positions
    logps.sum().backward()
    assert sorted(shapes[3:]) == sorted(shapes[:3])                                  # recomputed, not remembered


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_losses_over_whole_distributions_run_in_chunks_and_never_hold_two_whole_logits(monkeypatch, folders, kind):
    policy, ref = load_policy(folders[kind], dtype=torch.float64), HFPolicy(tiny_lm(kind, 0.25).double())
    ids, positions, lengths = flat_row(vocab=64)
    predict, targets = response(ids)
    with torch.no_grad():
        hidden = ref.hidden(ids, positions, lengths, predict)
        whole, ref_whole = policy(ids, positions, lengths, predict), ref(ids, positions, lengths, predict)
    monkeypatch.setattr(model, "chunked_log_probs", functools.partial(model.chunked_log_probs, chunk_elements=3 * 64))
    monkeypatch.setitem(head_log_probs.__kwdefaults__, "chunk_elements", 3 * 64)
    most = []

    def extra(logits, targets, rows):
        theirs = ref.head(hidden[rows])
        most.append(max(len(logits), len(theirs)))
        return torch.stack([model.position_kl(theirs, logits), model.position_confidence(logits, targets)])

    out = policy(ids, positions, lengths, predict, targets, extra)
    assert out.shape == (3, 8) and max(most) == 3
    close(out[0], log_probs(whole, targets), 1e-9)                                   # float64: other sums of the same
    close(out[1], model.position_kl(ref_whole, whole), 1e-9)
    close(out[2], model.position_confidence(whole, targets), 1e-9)


@pytest.mark.parametrize("kind, change", [("gemma2", dict(softcap=None)), ("gemma2", dict(softcap=6.0)), ("cohere", dict(scale=1)), ("granite", dict(scale=1 / 6))], ids=str)
@pytest.mark.parametrize("std", [0.3, 0.02])
def test_the_probe_rejects_a_head_that_is_not_the_models_and_the_answer_is_right_all_the_same(monkeypatch, kind, change, std):
    """Weights of 0.02 as well: the logits of an untrained model are far below any cap, and the probe must see it anyway."""
    plain = HFPolicy._head_is_ours

    def spoiled(self):
        vars(self).update(change)
        return plain(self)

    monkeypatch.setattr(HFPolicy, "_head_is_ours", spoiled)
    policy = HFPolicy(tiny_lm(kind, std))
    ids, positions, lengths = flat_row(vocab=64)
    assert policy.chunked is False
    with torch.no_grad():
        close(policy(ids, positions, lengths), hf_logits(policy.lm, ids, lengths), 1e-4)         # float32, logits near 10


def test_heads_with_other_post_processing_than_ours_fall_back_to_the_models_own_logits():
    lm = tiny_lm("llama")
    plain = lm.forward
    def forward(*args, **how):
        out = plain(*args, **how)
        out.logits = out.logits.clamp(-3, 3)
        return out
    lm.forward = forward
    policy = HFPolicy(lm)
    ids, positions, lengths = flat_row(vocab=64)
    predict, targets = response(ids)
    with torch.no_grad():
        assert not policy.chunked and policy(ids, positions, lengths).abs().max() == 3
        close(policy(ids, positions, lengths, predict, targets), hf_logits(lm, ids, lengths).log_softmax(-1)[predict, targets], 1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_the_probe_notices_flat_rows_without_their_sliding_window(monkeypatch, kind):
    """The probe's sequences are longer than a small window: a flat row that forgets the window differs only there."""
    lm, run = tiny_lm(kind), HFPolicy._run
    wide = tiny_lm(kind, sliding_window=999)
    monkeypatch.setattr(HFPolicy, "_run", lambda self, rows, positions=None: run(self, rows) if positions is None else wide.base_model(
        input_ids=rows, position_ids=positions, use_cache=False).last_hidden_state)
    assert HFPolicy(tiny_lm(kind, sliding_window=999)).flat and not HFPolicy(lm).flat


def test_padding_is_grouped_by_length_and_at_most_an_eighth(folders):
    policy, shapes = load_policy(folders["llama"]), []
    policy.lm.base_model.register_forward_pre_hook(lambda module, args, how: shapes.append(tuple(how["input_ids"].shape)), with_kwargs=True)
    policy.flat = False
    ids, positions, lengths = flat_row([3, 40, 38, 4, 3, 36, 20], vocab=64)
    with torch.no_grad():
        close(policy(ids, positions, lengths), hf_logits(policy.lm, ids, lengths), 1e-4)         # float32, logits near 10; order restored
    assert shapes[:4] == [(2, 3), (1, 4), (1, 20), (3, 40)]


def test_a_model_whose_tokens_see_later_ones_is_a_one_line_error(tmp_path):
    from transformers import BertConfig, BertLMHeadModel
    BertLMHeadModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)).save_pretrained(tmp_path)
    message = one_line(load_policy, tmp_path)
    assert f"--model {tmp_path}: its tokens see later ones (model_type 'bert')" in message


def test_flat_and_padded_rows_have_the_same_gradient(folders):
    policy = load_policy(folders["llama"], dtype=torch.float64)
    ids, positions, lengths = flat_row(vocab=64)
    predict = torch.tensor([0, 6, 9, 16])
    gradients = []
    for policy.flat in (True, False):
        loss = policy(ids, positions, lengths, predict, ids[predict + 1]).sum()
        gradients.append(torch.autograd.grad(loss, policy.lm.model.layers[0].self_attn.q_proj.weight)[0])
    assert gradients[0].abs().max() > 1e-3
    close(gradients[0], gradients[1], 1e-6)                                          # rotary angles stay float32 in transformers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("std", [0.3, 0.02])
def test_the_probe_rejects_a_model_whose_sequences_see_each_other(monkeypatch, kind, std):
    run = HFPolicy._run
    monkeypatch.setattr(HFPolicy, "_run", lambda self, rows, positions=None: run(self, rows))        # position_ids forgotten
    policy = HFPolicy(tiny_lm(kind, std))
    ids, positions, lengths = flat_row(vocab=64)
    with torch.no_grad():
        expected = hf_logits(policy.lm, ids, lengths)
        assert (policy.head(policy._run(ids[None], positions[None])[0]) - expected).abs().max() > 1e-3               # they do
        assert policy.flat is False
        close(policy(ids, positions, lengths), expected, 1e-4)                       # and the answer is right: padded


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_sees_what_the_default_cache_does_to_flat_rows(monkeypatch, kind, dtype):
    monkeypatch.setattr(HFPolicy, "_run", lambda self, rows, positions=None: self.lm.base_model(
        input_ids=rows, **({} if positions is None else dict(position_ids=positions))).last_hidden_state)            # use_cache left at its default
    policy = HFPolicy(tiny_lm(kind).to(dtype))
    ids, positions, lengths = flat_row(vocab=64)
    with torch.no_grad():
        leak = (policy.hidden(ids, positions, lengths, torch.arange(21)) - policy._padded(ids, lengths)).abs().max()
        policy.flat = True
        leak = max(leak, (policy.hidden(ids, positions, lengths, torch.arange(21)) - policy._padded(ids, lengths)).abs().max())
    assert HFPolicy(tiny_lm(kind).to(dtype)).flat == bool(leak < (0.1 if dtype == torch.bfloat16 else 1e-3))         # 5.23: it leaks. Should that be mended, the verdict follows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_sixteen_bit_weights_keep_flat_rows_and_the_chunked_head(kind):
    policy = HFPolicy(tiny_lm(kind, 0.1).to(torch.bfloat16))
    assert policy.flat and policy.chunked


def test_dropout_is_off_from_the_start(folders):
    policy = load_policy(folders["gpt2"])                                            # GPT-2's default dropout is 0.1
    ids, positions, lengths = flat_row(vocab=64)
    assert policy.lm.config.resid_pdrop == 0.1
    assert torch.equal(policy(ids, positions, lengths), policy(ids, positions, lengths))


def test_load_policy_takes_the_dtype_it_is_given(folders):
    for dtype in (torch.float64, torch.bfloat16):
        policy = load_policy(folders["llama"], dtype=dtype)
        assert {p.dtype for p in policy.parameters()} == {dtype}
        ids, positions, lengths = flat_row(vocab=64)
        assert policy(ids, positions, lengths, torch.tensor([0]), ids[1:2]).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_what_an_hf_policy_saves_loads_again(folders, tmp_path):
    policy = load_policy(folders["qwen2"])
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True))


HF_PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4]]


def greedy(policy, prompt, eot, new):
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(policy(torch.tensor(ids), torch.arange(len(ids)), [len(ids)])[-1].argmax().item())
        if ids[-1] == eot:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hf_generation_is_greedy_decoding_of_each_prompt_and_stops_at_the_end_of_text(folders, kind):
    policy = load_policy(folders[kind], dtype=torch.float64)
    free = [greedy(policy, p, None, 8) for p in HF_PROMPTS]
    eot = free[0][2]                                                                 # so that at least the first one ends early
    expected = [greedy(policy, p, eot, 8) for p in HF_PROMPTS]
    assert len(expected[0]) <= 3 and expected[0][-1] == eot
    for rows in (1, 2, 64):
        assert policy.generate(HF_PROMPTS, eot=eot, max_new_tokens=8, temperature=0, rows=rows) == expected


def test_hf_samples_stop_at_the_end_of_text_repeat_with_the_seed_and_leave_the_global_random_state_alone(folders):
    policy = load_policy(folders["llama"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    out = policy.generate([[3]] * 60, eot=5, max_new_tokens=20, temperature=3.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(5 not in r[:-1] and (r[-1] == 5 or len(r) == 20) for r in out) and {r[-1] == 5 for r in out} == {True, False}
    assert policy.generate([[3]] * 60, eot=5, max_new_tokens=20, temperature=3.0, seed=1) == out
    assert policy.generate([[3]] * 60, eot=5, max_new_tokens=20, temperature=3.0, seed=2) != out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hf_samples_are_drawn_from_the_same_random_numbers_as_ours_whatever_shares_the_batch(folders, kind):
    policy, prompts = load_policy(folders[kind], dtype=torch.float64), HF_PROMPTS + HF_PROMPTS[:1]
    for how in (dict(temperature=2.0), dict(temperature=3.0, top_p=0.8)):
        how = dict(eot=5, seed=4, **how)
        with torch.no_grad():
            expected = naive_generate(policy, prompts, new=12, **how)
        for rows in (1, 2, 64):
            assert policy.generate(prompts, max_new_tokens=12, rows=rows, **how) == expected
        assert policy.generate(prompts[3:1:-1], max_new_tokens=12, numbers=[3, 2], **how) == expected[3:1:-1]
        assert expected[0] != expected[3]                                            # one prompt, two rows


def test_hf_generation_samples_the_policys_own_distribution(folders):
    policy, n = load_policy(folders["llama"]), 2000
    p = policy(torch.tensor([3, 4]), torch.arange(2), [2])[-1].div(4).softmax(-1).detach()
    first = torch.tensor([r[0] for r in policy.generate([[3, 4]] * n, eot=1, max_new_tokens=1, temperature=4.0, rows=n)])
    counts = torch.bincount(first, minlength=64)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert (n * p).min() > 5 and chi2 < 130                                          # 63 degrees of freedom: P(chi2 > 130) = 1e-6


@pytest.mark.parametrize("setting", [dict(repetition_penalty=5.0), dict(no_repeat_ngram_size=1), dict(min_p=0.9, do_sample=True),
                                     dict(top_k=1, do_sample=True), dict(temperature=0.01, do_sample=True), dict(suppress_tokens=[40])], ids=lambda s: next(iter(s)))
def test_samples_come_from_the_policy_not_from_the_folders_generation_config(folders, tmp_path, setting):
    plain = load_policy(folders["llama"])
    plain.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({**setting, "eos_token_id": 1, "pad_token_id": 0}))
    policy = load_policy(tmp_path)
    for temperature in (0, 1.0):
        how = dict(eot=1, max_new_tokens=12, temperature=temperature, seed=1)
        assert policy.generate(HF_PROMPTS, **how) == plain.generate(HF_PROMPTS, **how), temperature


@pytest.mark.parametrize("own", [True, False], ids=["gpt", "hf"])
def test_both_kinds_of_policy_refuse_prompts_without_room_and_give_nothing_when_asked_for_nothing(folders, own):
    policy = gpt(vocab_size=64) if own else load_policy(folders["llama"])
    assert policy.generate([[3]], eot=1, max_new_tokens=0) == [[]] and policy.generate([], eot=1, max_new_tokens=3) == []
    with pytest.raises(ValueError):
        policy.generate([[3] * 21], eot=1, max_new_tokens=3, room=20)


@pytest.mark.parametrize("own", [True, False], ids=["gpt", "hf"])
def test_both_kinds_of_policy_keep_prompt_and_response_within_the_room(folders, own):
    policy = gpt(vocab_size=64) if own else load_policy(folders["llama"])
    out = policy.generate([[3] * 4, [3] * 8], eot=63, max_new_tokens=30, temperature=0, room=12)
    assert 63 not in out[0] + out[1] and 4 + len(out[0]) <= 12 and len(out[1]) == 4


# --- files that are not right: one line each --------------------------------------------------------------------------

def spoiled(source, folder, change):
    """The model in `source`, in one file, its tensors changed by `change(tensors)`."""
    from safetensors.torch import load_file, save_file
    tensors = {k: v for f in model.weight_files(source) for k, v in load_file(f).items()}
    change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poke(name, value):
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(value)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor 'model.layers.1.mlp.up_proj.weight'"),
    (lambda t: t.pop("lm_head.weight"), "no tensor 'lm_head.weight'"),                # untied: transformers would make one up
    (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(70, 32)}), "model.embed_tokens.weight has the shape (70, 32), config.json asks for (64, 32)"),
    (poke("model.layers.0.self_attn.q_proj.weight", math.nan), "NaN or infinity in model.layers.0.self_attn.q_proj.weight"),
    (poke("lm_head.weight", -math.inf), "NaN or infinity in lm_head.weight"),
], ids=["missing", "head missing", "embedding", "nan", "inf"])
def test_weights_that_are_not_right_are_a_one_line_error_that_names_folder_and_tensor(folders, tmp_path, change, words):
    message = one_line(load_policy, spoiled(folders["llama"], tmp_path / "m", change))
    assert message.startswith(f"--model {tmp_path / 'm'}: ") and words in message


def test_a_tied_head_is_not_missed(folders, tmp_path):
    assert load_policy(spoiled(folders["qwen2"], tmp_path / "m", lambda t: t.pop("lm_head.weight", None))).chunked


def test_nan_in_the_small_gpts_weights_is_named_too(tmp_path):
    net = gpt()
    net.h[1].ln_2.weight.data[3] = math.nan
    net.save(tmp_path)
    assert "NaN or infinity in h.1.ln_2.weight" in one_line(load_policy, tmp_path)


@pytest.mark.parametrize("config, words", [
    ('{"model_type": "nosuch"}', "nosuch"), ('{}', "model_type"), ('{"model_type": "t5"}', "'t5' is no causal language model"),
    ('{"model_type": "llama", "vocab_size": "many"}', "cannot be loaded")], ids=str)
def test_a_config_that_is_no_causal_model_is_a_one_line_error(folders, tmp_path, config, words):
    spoiled(folders["llama"], tmp_path / "m", lambda t: None)
    (tmp_path / "m" / "config.json").write_text(config)
    message = one_line(load_policy, tmp_path / "m")
    assert f"--model {tmp_path / 'm'}" in message and words in message


def test_a_half_written_file_is_a_one_line_error(folders, tmp_path):
    file = spoiled(folders["llama"], tmp_path / "m", lambda t: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "cannot be loaded from model.safetensors: " in one_line(load_policy, tmp_path / "m")


def test_a_missing_shard_is_a_one_line_error(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    model.weight_files(tmp_path / "m")[1].unlink()
    assert str(tmp_path / "m") in one_line(load_policy, tmp_path / "m")


def test_code_in_a_model_folder_is_not_run_unless_asked_for(folders, tmp_path):
    spoiled(folders["llama"], tmp_path / "m", lambda t: None)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= dict(model_type="homemade", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\nclass C(LlamaConfig): model_type = 'homemade'\nclass M(LlamaForCausalLM): config_class = C\n")
    assert str(tmp_path / "m") in one_line(load_policy, tmp_path / "m")
    assert torch.equal(logits_of(load_policy(tmp_path / "m", trust_remote_code=True)), logits_of(load_policy(folders["llama"])))


def test_a_name_that_is_no_folder_is_asked_of_the_hub_and_a_path_never(monkeypatch, folders, tmp_path):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(name) or str(folders["llama"]))
    assert torch.equal(logits_of(load_policy("someone/llama")), logits_of(load_policy(folders["llama"]))) and asked == ["someone/llama"]
    load_policy("someone/llama", lora=2).save(tmp_path, adapter=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/llama"          # not our cache's folder
    asked.clear()
    for path in ("/no/such", "./no/such", "out/run/model", "../x"):
        assert f"{Path(path)}: no config.json" in one_line(load_policy, path)
    assert asked == []


def test_without_a_network_a_hub_name_is_a_one_line_error(monkeypatch):
    import huggingface_hub
    def offline(name, **how):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nthe files and offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert one_line(load_policy, "someone/llama").startswith("--model someone/llama: no such folder, and not to be had from the hub (LocalEntryNotFoundError: cannot find the files")


# --- adapters ---------------------------------------------------------------------------------------------------------

def train_a_little(policy, steps=3, seed=5):
    """A few steps on one row; every parameter that may move does."""
    ids, positions, lengths = flat_row(vocab=64, seed=seed)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        policy(ids, positions, lengths, *response(ids)).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def logits_of(policy, seed=1):
    with torch.no_grad():
        return policy(*flat_row(vocab=64, seed=seed))


@pytest.fixture(scope="module")
def sft_adapter(folders, tmp_path_factory):
    """What a user of peft has: an adapter folder, trained on the llama above. The adapter is large: to forget it shows."""
    folder = tmp_path_factory.mktemp("sft")
    policy = load_policy(folders["llama"], dtype=torch.float64, lora=3)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.save(folder, adapter=True)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "mixtral"])
def test_a_fresh_adapter_is_the_base_bit_for_bit_and_the_only_thing_trained(folders, kind):
    base, policy = load_policy(folders[kind]), load_policy(folders[kind], lora=4)
    assert torch.equal(logits_of(policy), logits_of(base)) and torch.equal(logits_of(policy.reference()), logits_of(base))
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names) and not any("lm_head" in n for n in names)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    train_a_little(policy)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if "lora_" not in n)
    assert all(not torch.equal(p, before[n]) for n, p in policy.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("flat", [True, False])
def test_the_reference_stays_the_base_while_the_adapter_learns_and_is_no_second_copy(folders, flat):
    base, policy = load_policy(folders["llama"]), load_policy(folders["llama"], lora=4)
    base.flat = policy.flat = flat
    reference = policy.reference()
    train_a_little(policy)
    assert torch.equal(logits_of(reference), logits_of(base))
    assert (logits_of(policy) - logits_of(reference)).abs().max() > 1e-2
    assert next(reference.parameters()) is next(policy.parameters()) and reference.token_budget == policy.token_budget
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)        # as before the reference ran


def test_the_reference_does_all_a_policy_does_without_gradient_and_freezing_it_freezes_nothing(folders):
    policy = train_a_little(load_policy(folders["llama"], dtype=torch.float64, lora=4))
    base, reference = load_policy(folders["llama"], dtype=torch.float64), policy.reference().requires_grad_(False)
    ids, positions, lengths = flat_row(vocab=64)
    predict, targets = response(ids)
    logps = reference(ids, positions, lengths, predict, targets)
    assert not logps.requires_grad and torch.equal(logps, base(ids, positions, lengths, predict, targets).detach())
    assert torch.equal(reference.head(reference.hidden(ids, positions, lengths, predict)), base(ids, positions, lengths, predict).detach())
    how = dict(eot=1, max_new_tokens=8, temperature=0)
    assert reference.generate(HF_PROMPTS, **how) == base.generate(HF_PROMPTS, **how)
    assert any(p.requires_grad for p in policy.parameters())


def test_tdpos_reference_inside_the_policys_chunks_leaves_the_adapters_gradient_right(monkeypatch, folders):
    """The adapter is switched off and on in the middle of the policy's forward, and again when backward recomputes the chunks."""
    policy, base = load_policy(folders["llama"], dtype=torch.float64, lora=4), load_policy(folders["llama"], dtype=torch.float64)
    train_a_little(policy)
    ids, positions, lengths = flat_row(vocab=64)
    predict, targets = response(ids)

    def gradients(reference):
        hidden = reference.hidden(ids, positions, lengths, predict).detach()
        extra = lambda logits, y, rows: model.position_kl(reference.head(hidden[rows]), logits)[None]
        out = policy(ids, positions, lengths, predict, targets, extra)
        return torch.autograd.grad(out[0].sum() + out[1].sum(), [p for p in policy.parameters() if p.requires_grad])

    expected = gradients(base)
    monkeypatch.setattr(model, "chunked_log_probs", functools.partial(model.chunked_log_probs, chunk_elements=3 * 64))
    for a, b in zip(gradients(policy.reference()), expected, strict=True):
        assert a.abs().max() > 1e-6
        close(a, b, 1e-9 * b.abs().max().clamp(min=1).item())                        # float64, another order of sums


def test_an_adapter_folder_is_base_plus_adapter_as_policy_and_as_reference(folders, sft_adapter):
    """The trap: with the bare base as reference, log-ratios at step 0 are not 0 and the SFT stage is forgotten."""
    from peft import AutoPeftModelForCausalLM
    theirs = AutoPeftModelForCausalLM.from_pretrained(sft_adapter, dtype=torch.float64)
    ids, positions, lengths = flat_row(vocab=64)
    expected = hf_logits(theirs, ids, lengths)
    full, lora = load_policy(sft_adapter, dtype=torch.float64), load_policy(sft_adapter, dtype=torch.float64, lora=4)
    base = load_policy(folders["llama"], dtype=torch.float64)
    for policy in (full, lora, lora.reference()):
        close(logits_of(policy), expected, 1e-5)                                     # transformers' rotary angles are float32: flat, padded and apart differ by it
        assert (logits_of(policy) - logits_of(base)).abs().max() > 1
    ratios = lora(ids, positions, lengths, *response(ids)) - lora.reference()(ids, positions, lengths, *response(ids))
    assert (ratios == 0).all() and torch.equal(logits_of(lora), logits_of(full))
    before = logits_of(lora.reference())
    train_a_little(lora)
    assert torch.equal(logits_of(lora.reference()), before) and not torch.equal(logits_of(lora), before)
    assert all(p.requires_grad for p in full.parameters())                           # without --lora the merged model is trained whole


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"])
def test_a_merged_save_has_the_adapters_logits_in_transformers_and_leaves_the_policy_as_it_was(folders, tmp_path, kind):
    from transformers import AutoModelForCausalLM
    policy = train_a_little(load_policy(folders[kind], lora=4))
    expected, before = logits_of(policy), {n: p.clone() for n, p in policy.named_parameters()}
    policy.save(tmp_path)
    assert {n: p for n, p in policy.named_parameters()}.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in policy.named_parameters())
    assert torch.equal(logits_of(policy), expected) and not torch.equal(logits_of(policy.reference()), expected)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, positions, lengths = flat_row(vocab=64)
    close(hf_logits(lm, ids, lengths), expected, 2e-4)                               # W + BA added before or after the product: float32 at 10
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_an_adapter_save_loads_with_peft_and_here_wherever_one_stands(folders, tmp_path, monkeypatch, kind):
    from peft import AutoPeftModelForCausalLM
    monkeypatch.chdir(folders[kind].parent)
    policy = train_a_little(load_policy(folders[kind].name, lora=4))                 # by a relative name
    policy.save(tmp_path, adapter=True)
    expected = logits_of(policy)
    monkeypatch.chdir(tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    ids, positions, lengths = flat_row(vocab=64)
    close(hf_logits(theirs, ids, lengths), expected, 2e-4)                           # float32, logits near 10
    close(logits_of(load_policy(tmp_path)), expected, 2e-4)                          # merged on loading
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 60_000 and not (tmp_path / "config.json").exists()


def test_an_adapter_on_top_of_a_merged_one_cannot_be_saved_alone_and_says_so(sft_adapter, tmp_path):
    policy = load_policy(sft_adapter, lora=2)
    assert str(sft_adapter) in one_line(policy.save, tmp_path, adapter=True)
    policy.save(tmp_path)
    close(logits_of(load_policy(tmp_path)), logits_of(policy), 2e-4)                 # merged, it can: float32, logits near 10


def test_adapters_are_float32_on_a_sixteen_bit_base(folders):
    policy = load_policy(folders["llama"], dtype=torch.bfloat16, lora=4)
    assert {(p.dtype, p.requires_grad) for p in policy.parameters()} == {(torch.bfloat16, False), (torch.float32, True)}
    train_a_little(policy)
    assert all(p.isfinite().all() for p in policy.parameters())
    assert {p.dtype for p in load_policy(folders["llama"], dtype=torch.float64, lora=4).parameters()} == {torch.float64}


def spoiled_adapter(source, folder, change):
    from safetensors.torch import load_file, save_file
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_what_adapters_cannot_do_is_a_one_line_error(folders, sft_adapter, tmp_path, monkeypatch):
    gpt().save(tmp_path / "own")
    assert "--lora 4: is for Hugging Face models" in one_line(load_policy, tmp_path / "own", lora=4)
    for call in (load_policy(folders["llama"]).reference, lambda: load_policy(folders["llama"]).save(tmp_path, adapter=True)):
        with pytest.raises(ValueError, match="adapter|lora"):
            call()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "does not say what its base model is" in one_line(load_policy, tmp_path)
    for name, change, words in (("cut", lambda t: t.pop(sorted(t)[3]), "only in the model"), ("more", lambda t: t.update({"x": torch.zeros(1)}), "only in the file")):
        spoiled_adapter(sft_adapter, tmp_path / name, change)
        assert words in one_line(load_policy, tmp_path / name)
    (tmp_path / "cut" / "adapter_model.safetensors").rename(tmp_path / "cut" / "adapter_model.bin")
    assert "no *.safetensors" in one_line(load_policy, tmp_path / "cut")
    monkeypatch.setitem(sys.modules, "peft", None)                                   # as if it were not installed
    assert one_line(load_policy, folders["llama"], lora=4) == "--lora: needs the peft package (pip install peft)"
    assert "needs the peft package (pip install peft)" in one_line(load_policy, sft_adapter)


# --- activation checkpointing -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["own", "gpt2", "llama", "gemma2", "opt", "mixtral", "lora"])
def test_checkpointed_activations_give_the_same_numbers_and_each_block_runs_again_in_backward(folders, kind):
    def build():
        return gpt(vocab_size=64, dtype=torch.float32) if kind == "own" else load_policy(folders["llama" if kind == "lora" else kind], lora=4 if kind == "lora" else 0)

    plain, policy, runs = build(), build(), []
    policy.checkpoint_activations()
    block = (policy.h if kind == "own" else next(m for m in policy.lm.modules() if isinstance(m, torch.nn.ModuleList)))[0]
    for m in block.modules():
        if isinstance(m, torch.nn.LayerNorm) or "RMSNorm" in type(m).__name__:
            m.register_forward_hook(lambda *_: runs.append(1))
            break
    ids, positions, lengths = flat_row(vocab=64)
    out = [p(ids, positions, lengths, *response(ids)) for p in (plain, policy)]
    forwards = len(runs)                                                             # OPT's rows are padded, in three groups
    assert torch.equal(*out) and forwards >= 1                                       # GPT-2's and OPT's dropout of 0.1 stays off
    gradients = [torch.autograd.grad(o.sum(), [p for p in net.parameters() if p.requires_grad]) for o, net in zip(out, (plain, policy))]
    assert len(runs) == 2 * forwards                                                 # really recomputed
    assert all(torch.equal(a, b) for a, b in zip(*gradients))                        # by the same operations on the same numbers
    how = dict(eot=1, max_new_tokens=6, temperature=0)
    assert policy.generate(HF_PROMPTS, **how) == plain.generate(HF_PROMPTS, **how)


def test_checkpointed_activations_leave_less_alive_between_forward_and_backward(folders):
    def saved(policy):
        kept = set()
        def pack(t):
            kept.add((t.data_ptr(), t.numel()))
            return t
        ids, positions, lengths = flat_row(vocab=64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            policy.hidden(ids, positions, lengths, slice(None))
        parameters = {p.data_ptr() for p in policy.parameters()}
        return sum(n for address, n in kept if address not in parameters)

    plain, policy = load_policy(folders["llama"]), load_policy(folders["llama"])
    policy.checkpoint_activations()
    assert saved(policy) < 0.25 * saved(plain)


def test_a_merged_save_after_checkpointing_is_the_policys(folders, tmp_path):
    policy = load_policy(folders["llama"], lora=4)
    policy.checkpoint_activations()
    train_a_little(policy)
    policy.save(tmp_path)
    close(logits_of(load_policy(tmp_path)), logits_of(policy), 2e-4)                 # float32, logits near 10


# --- torch.compile ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, backend", [("own", "aot_eager"), ("lora", "aot_eager"),
                                           *(pytest.param(*how, marks=pytest.mark.slow) for how in (("gpt2", "aot_eager"), ("own", "inductor"), ("llama", "inductor")))])
def test_compiled_layers_give_the_same_numbers_and_are_compiled_once_for_all_layers_and_lengths(folders, monkeypatch, kind, backend):
    def build():
        return gpt(vocab_size=64, dtype=torch.float32) if kind == "own" else load_policy(folders["llama" if kind == "lora" else kind], lora=4 if kind == "lora" else 0)

    def both(policy, lengths, seed):
        """Log-probs of a flat row, of y and of y' on one prompt, and the gradient of their sum."""
        ids, positions, _ = flat_row(lengths, vocab=64, seed=seed)
        predict = torch.arange(len(ids) - 1)[positions[1:] > 0]
        out = [policy(ids, positions, lengths, predict, ids[predict + 1])]
        if policy.shares_prompts:
            rows = [data.make_row(part[:2].numpy(), part[2:].numpy()) for part in ids.split(lengths)]
            out += policy.forward_beside(data.flatten(rows), data.flatten([data.mismatched(a, b, 99) for a, b in zip(rows, rows[::-1])]), [2] * len(rows))
        return [o.detach() for o in out] + list(torch.autograd.grad(sum(o.sum() for o in out), [p for p in policy.parameters() if p.requires_grad]))

    torch._dynamo.reset()
    monkeypatch.setattr(model, "compiled", lambda f: torch.compile(f, dynamic=True, backend=backend))
    monkeypatch.setitem(head_log_probs.__kwdefaults__, "chunk_elements", 500)            # the head in two to five blocks
    plain, policy, graphs = build(), build(), []
    policy.compile_layers()
    if kind != "gpt2":
        policy.checkpoint_activations()                                              # recomputes what is compiled
    for seed, lengths in enumerate([[5, 3, 7], [4, 9], [3, 3, 8, 6], [11, 4, 5]]):
        for a, b in zip(both(plain, lengths, seed), both(policy, lengths, seed)):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))              # float32, sums in another order
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and len(set(graphs)) == 1, graphs
    how = dict(eot=1, max_new_tokens=6, temperature=0)
    assert policy.generate(HF_PROMPTS, **how) == plain.generate(HF_PROMPTS, **how)


# --- memory -----------------------------------------------------------------------------------------------------------

def test_the_memory_estimate_of_an_8b_model_is_the_one_reasoned_in_perf_md():
    """PERF.md section 4, in GiB: bf16 weights + fp32 Adam 90; fp32 everything 120; a reference 15; 8k tokens 43, checkpointed 3.3; LoRA 20."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    shape = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    gib = lambda **how: {k: v / 2**30 for k, v in model.memory_estimate(lm, tokens=8192, **how).items()}
    state = lambda m: m["weights"] + m["gradients"] + m["optimizer"]
    full, frugal = gib(reference=True), gib(checkpointed=True)
    assert abs(state(full) - 90) < 1 and abs(full["reference"] - 15) < 0.1
    assert abs(full["activations"] - 43) < 1.5 and abs(frugal["activations"] - 3.3) < 0.2 and frugal["head"] < 1.2 and frugal["reference"] == 0
    model.add_lora(lm, 16)
    assert abs(sum(gib(checkpointed=True).values()) - 20) < 1
    with torch.device("meta"):
        assert abs(sum(model.memory_estimate(AutoModelForCausalLM.from_config(LlamaConfig(**shape)), tokens=0).values()) / 2**30 - 120) < 1


@pytest.mark.parametrize("kind", ["own", "gpt2", "llama", "qwen3"])
def test_the_activations_estimated_are_about_those_kept(kind):
    """By the tensors autograd holds after a forward, each storage once: a rule of thumb, right to 40 %; checkpointed to 20 %."""
    wide = dict(n_embd=128, n_layer=4) if kind == "gpt2" else dict(hidden_size=128, intermediate_size=448, num_hidden_layers=4, head_dim=64)
    policy = gpt(vocab_size=64, dtype=torch.float32, d_model=128, n_layer=4) if kind == "own" else HFPolicy(tiny_lm(kind, **wide))
    ids, positions, lengths = flat_row([30, 32, 31], vocab=64)

    def held():
        kept = {}
        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            policy.hidden(ids, positions, lengths, slice(None))
        own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        return sum(n for address, n in kept.items() if address not in own)

    whole = model.memory_estimate(policy, tokens=93, activation_bytes=4)["activations"]
    assert abs(held() / whole - 1) < 0.4
    policy.checkpoint_activations()
    layer_inputs = model.memory_estimate(policy, tokens=93, checkpointed=True, activation_bytes=4)["activations"] - whole / 4      # less the recomputed one
    assert abs(held() / (layer_inputs * 6 / 4) - 1) < 0.2                            # four inputs, and the last norm keeps two more

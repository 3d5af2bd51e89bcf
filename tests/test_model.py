"""Claims about model.py: flat rows give what separate forwards give, the head in parts gives the
whole head, transformers agrees, and samples are the policy's."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

import data
import model
from model import GPT, GPTConfig, chunked_log_probs, head_log_probs, log_probs, sample, token_logps
from plumbing import kernels

LENGTHS = [6, 9, 1, 5]


def gpt(seed=0, dtype=torch.float64, scale=0.3, **changes):
    """A small GPT whose parameters are large enough to matter; 0.02 leaves attention uniform."""
    shape = dict(vocab_size=61, context=32, n_layer=2, n_head=2, d_model=16, bias=True)
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**shape, **changes})).to(dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(std=scale)
            if "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return net


def flat_row(lengths=LENGTHS, vocab=61, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (sum(lengths),), generator=generator)
    return ids, torch.cat([torch.arange(n) for n in lengths]), lengths


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(value, net):
    return torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad])


# --- log-probs ------------------------------------------------------

def test_log_probs_is_the_log_softmax_at_the_target_for_any_leading_shape():
    logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(12).view(3, 4) % 7
    naive = (logits.exp() / logits.exp().sum(-1, keepdim=True)).log()
    wanted = naive.gather(-1, targets[..., None])[..., 0]
    close(log_probs(logits, targets), wanted, 1e-14)  # numbers below 5: a few dozen eps
    close(log_probs(logits[0], targets[0]), wanted[0], 1e-14)


def test_narrow_logits_are_widened_before_the_softmax_and_wide_ones_never_narrowed():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 1000, generator=generator) * 3, torch.arange(50)
    for dtype, step in ((torch.bfloat16, 0.01), (torch.float16, 1e-3)):
        narrow = logits.to(dtype)
        logps = log_probs(narrow, targets)
        assert logps.dtype == model.wide_log_softmax(narrow).dtype == torch.float32
        close(logps, narrow.float().log_softmax(-1)[targets, targets], 1e-5)  # float32 near 10
        not_widened = narrow.log_softmax(-1)[targets, targets].float()
        assert (not_widened - logps).abs().max() > step
    assert log_probs(logits.double(), targets).dtype == torch.float64


def test_token_logps_gives_index_t_the_logits_of_t_minus_one_times_its_weight():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    ids = torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[0, 0, 1, 0.5, 0], [1, 1, 1, 1, 2]], dtype=torch.float64)
    logps = token_logps(logits, ids, mask)
    for b in range(2):
        for t in range(1, 5):
            wanted = mask[b, t] * logits[b, t - 1].log_softmax(-1)[ids[b, t]]
            close(logps[b, t], wanted, 1e-14)  # one log-softmax of numbers below 5
    assert (logps[:, 0] == 0).all() and logps.shape == (2, 5)  # mask[1, 0] is 1

    logits[0, 0, ids[0, 1]] = -torch.inf  # so ids[0, 1] cannot come; its mask is 0
    again = token_logps(logits.requires_grad_(), ids, mask)
    gradient, = torch.autograd.grad(again.sum(), logits)
    assert torch.equal(again, logps) and gradient.isfinite().all()  # no 0 x infinity = NaN


# --- the output head ------------------------------------------------

def head_inputs(m=23, d=8, v=130):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(m, d, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(v, (m,), generator=generator)


def test_the_head_in_parts_is_the_head_in_one_piece_in_value_and_gradient(monkeypatch):
    hidden, weight, targets = head_inputs()
    upstream = torch.linspace(-1, 1, 23, dtype=torch.float64)
    whole = log_probs(hidden @ weight.T, targets)
    wanted = torch.autograd.grad((whole * upstream).sum(), (hidden, weight))

    def head(h):
        return h @ weight.T

    for chunk_elements in (23 * 3, 23 * 70, 10 ** 6):  # 44 blocks of words, 3, 1
        monkeypatch.setattr(kernels, "KEPT", (chunk_elements % 2) * 10 ** 6)  # none; all, for 44
        blocks = head_log_probs(hidden, weight, targets, chunk_elements=chunk_elements)
        chunks = chunked_log_probs(hidden, head, 130, targets, chunk_elements=chunk_elements)
        for logps in (blocks, chunks):
            close(logps, whole, 1e-13)  # another order of sums of 130 numbers near 10
            found = torch.autograd.grad((logps * upstream).sum(), (hidden, weight))
            for a, b in zip(found, wanted):
                close(a, b, 1e-12)


def spied(function, shapes):
    def call(logits, *rest):
        shapes.append(tuple(logits.shape))
        return function(logits, *rest)
    return call


def test_no_part_of_the_head_holds_more_logits_than_it_may(monkeypatch):
    shapes = []
    for function in (log_probs, kernels.block_sums, kernels.block_gradient):
        monkeypatch.setitem(model.compiled, function, spied(function, shapes))
    hidden, weight, targets = head_inputs(v=20)
    for kept, blocks in ((20 * 23, 10), (20 * 23 - 1, 15)):  # backward computes them again
        monkeypatch.setattr(kernels, "KEPT", kept)
        shapes.clear()
        head_log_probs(hidden, weight, targets, chunk_elements=100).sum().backward()
        assert shapes == [(23, 4)] * blocks
    shapes.clear()
    head = partial(torch.nn.functional.linear, weight=weight)
    chunked_log_probs(hidden, head, 20, targets, chunk_elements=100).sum().backward()
    assert sorted(shapes) == [(3, 20)] * 2 + [(5, 20)] * 8


def test_a_frozen_heads_gradient_is_not_computed_and_thrown_away(monkeypatch):
    made, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **how: made.append(1) or mm(*args, **how))
    for frozen, products in ((1, 0), (0, 9)):
        inputs = head_inputs(v=18)
        inputs[frozen].requires_grad_(False)
        made.clear()
        head_log_probs(*inputs, chunk_elements=46).sum().backward()
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad.abs().sum() > 0
        assert len(made) == products


def test_the_head_under_autocast_has_16_bit_logits_and_32_bit_sums():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).requires_grad_()
    weight = torch.randn(2000, 16, generator=generator).requires_grad_()
    targets = torch.randint(2000, (40,), generator=generator)
    results = []
    for chunk_elements in (40 * 2000, 40 * 2):  # whole, and in 1000 blocks
        with torch.autocast("cpu", torch.bfloat16):
            logps = head_log_probs(hidden, weight, targets, chunk_elements=chunk_elements)
        assert logps.dtype == torch.float32
        results.append([logps.detach(), *torch.autograd.grad(logps.sum(), (hidden, weight))])
    # Float32 sums of the same rounded logits; bf16 gradients round by 2^-8, twice.
    for whole, blocks, tolerance in zip(*results, (1e-5, 0.02, 0.02)):
        close(blocks, whole, tolerance * whole.abs().max().item())


def test_more_can_be_measured_on_whole_distributions_chunk_by_chunk():
    hidden, weight, targets = head_inputs()

    def entropy_and_row(logits, targets, rows):
        p = logits.softmax(-1)
        return torch.stack([-(p * p.log()).sum(-1), torch.arange(23.0).double()[rows]])

    head = partial(torch.nn.functional.linear, weight=weight)
    out = chunked_log_probs(hidden, head, 130, targets, entropy_and_row, chunk_elements=650)
    whole = (hidden @ weight.T).softmax(-1)
    close(out[0], whole.log()[torch.arange(23), targets], 1e-13)
    close(out[1], -(whole * whole.log()).sum(-1), 1e-13)  # sums of 130 numbers below 1
    assert torch.equal(out[2], torch.arange(23.0).double()) and out.shape == (3, 23)


# --- flat rows ------------------------------------------------------

def test_a_flat_row_is_its_sequences_one_by_one():
    net = gpt()
    ids, positions, lengths = flat_row()
    alone = [net(part, torch.arange(n), [n]) for part, n in zip(ids.split(lengths), lengths)]
    logits = net(ids, positions, lengths)
    close(logits, torch.cat(alone), 1e-12)  # float64, logits below 100
    predict = torch.tensor([0, 3, 7, 17])
    targets = ids[predict + 1]
    wanted = logits.log_softmax(-1)[predict, targets]
    close(net(ids, positions, lengths, predict), logits[predict], 1e-12)
    close(net(ids, positions, lengths, predict, targets), wanted, 1e-12)


def test_only_positions_that_predict_something_meet_the_head(monkeypatch):
    shapes = []
    monkeypatch.setitem(model.compiled, log_probs, spied(log_probs, shapes))
    (ids, positions, lengths), predict = flat_row(), torch.tensor([0, 3, 7])
    net, tokens = gpt(), []
    for block in net.h:
        block.mlp.c_fc.register_forward_hook(lambda _, args, out: tokens.append(len(args[0])))
    net(ids, positions, lengths, predict, ids[predict + 1])
    assert shapes == [(3, 61)]  # not all 21 positions
    assert tokens == [21] * (len(net.h) - 1) + [3]  # nor does the last layer


# --- prompts computed once ------------------------------------------

def rows_that_share_prompts():
    """Prompts of 1 to 5 tokens with 1 to 3 responses each, one of a single token."""
    row = data.make_row
    return [row([7], [1, 2, 3]), row([7], [4, 5]), row([1, 2, 3, 4, 5], [6, 7]), row([8, 9], [1]),
            row([8, 9], [2, 3, 4, 5]), row([8, 9], [6, 7])]


def sums_and_gradients(net, share):
    flat = data.flatten(rows_that_share_prompts(), share=share)
    sums = flat.sums(net(flat.ids, flat.positions, flat.lengths, flat.predict, flat.targets))
    upstream = torch.linspace(-1, 2, 6, dtype=sums.dtype)
    return flat, [sums, *gradients((sums * upstream).sum(), net)]


def test_a_prompt_computed_once_for_its_responses_is_the_prompt_computed_for_each():
    plain, wanted = sums_and_gradients(gpt(), share=False)
    shared, found = sums_and_gradients(gpt(), share=True)
    assert shared.lengths == [(1, 3, 2), 7, (2, 1, 4, 2)]
    assert len(shared.ids) == len(plain.ids) - 1 - 2 - 2
    for a, b in zip(found, wanted):
        close(a, b, 1e-10)  # gradients near 1e3, in another order of sums


# --- attention in one kernel, on a GPU ------------------------------

def dense_varlen(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size, at_end=True):
    """What the CUDA kernel is documented to do, by a dense mask over all queries and keys."""
    n_q, n_k = ends_q.diff(), ends_k.diff()
    assert window_size == (-1, 0) and ends_q.dtype == ends_k.dtype == torch.int32
    assert (ends_q[0], ends_q[-1], ends_k[0], ends_k[-1]) == (0, len(q), 0, len(k))
    assert (longest_q, longest_k) == (n_q.max(), n_k.max())
    row_q = torch.arange(len(n_q)).repeat_interleave(n_q)
    row_k = torch.arange(len(n_k)).repeat_interleave(n_k)
    at_q = torch.cat([torch.arange(n) for n in n_q])
    at_k = torch.cat([torch.arange(n) for n in n_k])
    if at_end:
        at_q = at_q + (n_k - n_q)[row_q]
    seen = (row_q[:, None] == row_k) & (at_k <= at_q[:, None])
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def test_attention_in_one_kernel_is_the_loop_over_pieces(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", dense_varlen)
    for share in (False, True):
        monkeypatch.setattr(model, "attend", model.loop_attention)
        _, wanted = sums_and_gradients(gpt(), share)
        monkeypatch.setattr(model, "attend", kernels.varlen_attention)
        _, found = sums_and_gradients(gpt(), share)
        for a, b in zip(found, wanted):
            close(a, b, 1e-10)  # float64, gradients near 1e3


def test_the_kernel_is_taken_only_where_it_exists_and_is_causal_from_the_end(monkeypatch):
    from torch.nn.attention.varlen import varlen_attn
    inspect.signature(varlen_attn).bind(*range(7), window_size=(-1, 0))  # it takes what we give it
    ask = partial(kernels.varlen_is_right.__wrapped__, "cpu", torch.bfloat16, 2, 8)
    assert not ask()  # torch has it for CUDA alone
    for at_end in (True, False):
        kernel = partial(dense_varlen, at_end=at_end)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        assert ask() == at_end


# --- the GPT --------------------------------------------------------

def test_init_is_gpt2s_small_and_smaller_where_residual_branches_add_up():
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=500, context=64, n_layer=8, n_head=4, d_model=64, bias=True))
    for name, p in net.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
            continue
        std = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 x 8 layers) = 4
        # 5 standard errors of a sample's deviation
        assert abs(p.std().item() / std - 1) < 5 / (2 * p.numel()) ** 0.5, name


def test_transformers_loads_what_we_save_and_computes_the_same(tmp_path):
    from transformers import AutoModelForCausalLM
    ids, positions, lengths = flat_row()
    for bias in (True, False):
        net = gpt(bias=bias)
        net.save(tmp_path, eot=60)
        lm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert type(lm).__name__ == "GPT2LMHeadModel" and lm.config.eos_token_id == 60
        with torch.no_grad():
            parts = [lm(part[None], use_cache=False).logits[0] for part in ids.split(lengths)]
            close(net(ids, positions, lengths), torch.cat(parts), 1e-12)  # logits below 100


def test_what_we_save_comes_back_bit_for_bit(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for bias in (True, False):
            net = gpt(dtype=dtype, bias=bias)
            net.save(tmp_path)  # over the one before
            again = GPT.from_pretrained(tmp_path, dtype=dtype)
            assert again.config == net.config
            for p, q in zip(net.parameters(), again.parameters(), strict=True):
                assert torch.equal(p, q) and p.dtype == q.dtype
    gpt(0).save(tmp_path, weights=gpt(1).state_dict())  # by somebody who holds only a shard
    loaded = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.h[1].mlp["c_fc"].weight, gpt(1).h[1].mlp["c_fc"].weight)


def test_recomputed_layers_give_the_same_numbers_and_run_again_in_backward():
    plain, policy = gpt(), gpt()
    policy.checkpoint_activations()
    runs = []
    policy.h[0].ln_1.register_forward_hook(lambda *_: runs.append(1))
    row = flat_row()
    logits = policy(*row)
    assert torch.equal(logits, plain(*row))
    found, wanted = gradients(logits.sum(), policy), gradients(plain(*row).sum(), plain)
    assert all(map(torch.equal, found, wanted)) and len(runs) == 2


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers_compiled_once_for_all_lengths(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(model, "compiled", {})
    compiled = partial(torch.compile, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(kernels, "fuse", compiled)
    monkeypatch.setitem(head_log_probs.__kwdefaults__, "chunk_elements", 500)  # several blocks
    plain, policy = gpt(dtype=torch.float32), gpt(dtype=torch.float32)
    policy.compile_layers()
    policy.checkpoint_activations()
    graphs = []
    for seed, lengths in enumerate([[5, 3, 7], [4, 9], [3, 3, 8, 6], [11, 4, 5]]):
        ids, positions, _ = flat_row(lengths, seed=seed)
        predict = torch.arange(len(ids) - 1)[positions[1:] > 0]
        both = []
        for net in (plain, policy):
            logps = net(ids, positions, lengths, predict, ids[predict + 1])
            both.append([logps, *gradients(logps.sum(), net)])
        for a, b in zip(*both):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.detach().abs().max()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and len(set(graphs)) == 1, graphs


# --- generation -----------------------------------------------------

PROMPTS = [[1, 2, 3], [7], [4, 4, 4, 4, 4, 4], [0, 8], [5, 6, 7, 8, 0]]
EOT = 7


def small(seed=3):
    """Nine tokens, so that an end-of-text comes soon; float64, so that every token agrees."""
    return gpt(seed, vocab_size=9, context=24)


def naive_generate(net, prompts, *, eot, max_new_tokens, temperature=1.0, top_p=1.0, seed=0,
                   room=24):
    """No cache, no batch: the whole sequence through the model again for every token."""
    out = []
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        noise = torch.from_numpy(np.random.default_rng([seed, i]).random(max_new_tokens))
        for t in range(max_new_tokens):
            logits = net(torch.tensor(ids), torch.arange(len(ids)), [len(ids)])[-1:]
            ids.append(sample(logits, noise[t:t + 1], temperature, top_p).item())
            if ids[-1] == eot or len(ids) == room:
                break
        out.append(ids[len(prompt):])
    return out


def test_generating_with_the_cache_is_generating_without():
    net = small()
    for how in (dict(temperature=0), dict(), dict(temperature=0.6, seed=5), dict(top_p=0.7)):
        how |= dict(eot=EOT, max_new_tokens=15)
        with torch.no_grad():
            expected = naive_generate(net, PROMPTS, **how)
        assert net.generate(PROMPTS, **how) == expected
        if how.get("temperature") != 0:
            assert len({len(r) for r in expected}) > 1  # so the batch does shrink


def test_a_sample_does_not_depend_on_the_other_rows_nor_on_how_many_go_together():
    write = partial(small().generate, eot=EOT, seed=4)
    together = write(PROMPTS, max_new_tokens=12)
    for rows in (1, 2, 3):
        assert write(PROMPTS, max_new_tokens=12, rows=rows) == together
    part = write(PROMPTS[4:1:-2], max_new_tokens=12, numbers=[4, 2])
    assert part == together[4:1:-2]
    assert write(PROMPTS, max_new_tokens=5) == [response[:5] for response in together]
    assert small().generate(PROMPTS, eot=EOT, seed=5, max_new_tokens=12) != together
    assert len({tuple(r) for r in write([[1]] * 20, max_new_tokens=12)}) > 5


def test_prompt_and_response_fit_the_room():
    net = small()
    prompts = [[1, 2], [1] * 9, [3, 1, 1]]
    for room, limit in ((None, 24), (10, 10), (100, 24)):
        out = net.generate(prompts, eot=8, max_new_tokens=50, temperature=0, room=room)
        assert [len(p) + len(r) for p, r in zip(prompts, out)] == [limit] * 3  # 8 does not come
    for bad, room in (([[1] * 24], None), ([[1], [1] * 10], 10), ([[1], []], None)):
        with pytest.raises(ValueError):
            net.generate(bad, eot=EOT, max_new_tokens=3, room=room)
    assert net.generate([], eot=EOT, max_new_tokens=3) == []
    assert net.generate([[1], [2]], eot=EOT, max_new_tokens=0) == [[], []]


# --- sampling from logits -------------------------------------------

def frequencies(logits, n, **how):
    """Tokens at n evenly spaced uniform numbers: each gets n times its probability, +- 1."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.bincount(sample(logits.expand(n, -1), uniform, **how), minlength=len(logits))


def test_sample_frequencies_are_the_softmax():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for temperature in (0.3, 1.0, 2.5):
            logits = torch.tensor([1.0, -0.5, 2.0, 0.0, -torch.inf], dtype=dtype)
            p = torch.softmax(logits.double() / temperature, -1)
            counts = frequencies(logits, 1000, temperature=temperature)
            assert (counts - 1000 * p).abs().max() <= 1 and counts[4] == 0


def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_that_reaches_it():
    p = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625], dtype=torch.float64)  # exact in binary
    kept = {0.0: [1], 0.01: [1], 0.5: [1], 0.50001: [1, 3], 0.75: [1, 3], 0.8: [1, 3, 0],
            1.0: [0, 1, 2, 3, 4]}
    for top_p, tokens in kept.items():
        wanted = torch.zeros(5, dtype=torch.float64)
        wanted[tokens] = p[tokens] / p[tokens].sum()
        counts = frequencies(p.log(), 1600, top_p=top_p)
        assert (counts - 1600 * wanted).abs().max() <= 1, top_p
        assert ((counts > 0) == (wanted > 0)).all(), top_p


def test_greedy_is_the_argmax_and_the_ends_of_the_interval_give_no_impossible_token():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, torch.rand(50).double(), temperature=0), logits.argmax(-1))
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (1 - 2 ** -53, 2), (0.5 - 1e-12, 1), (0.5 + 1e-12, 2)):
        assert sample(logits, torch.tensor([u], dtype=torch.float64)).item() == token

"""A small GPT on flat rows, its log-probs, its generation; and the adapter that lets any Hugging Face model stand in for it.

No padding. A batch of sequences is ONE row of tokens laid end to end; `positions` restart at every sequence and attention
stays inside it. Everything but attention treats tokens alone, so attention is the only place that looks at `lengths`:

    ids        (N,)  tokens of all sequences, end to end         N = sum(lengths)
    positions  (N,)  0, 1, 2, ... restarting at every sequence
    lengths    list  tokens per sequence; or (p, n_1, n_2, ...) where a prompt of p tokens carries several responses: [x][y_1][y_2]
    predict    (M,)  indices into the row: the tokens that stand just before a trained token
    targets    (M,)  the trained tokens, ids[predict + 1]

A policy is a module with `forward(ids, positions, lengths, predict, targets) -> (M,) log-probs`. Only the M positions that
predict something meet the output head, which is most of the saving when the vocabulary is large.

The architecture is GPT-2's (Radford et al. 2019; tanh-GELU, pre-norm, learned positions, tied head), biases optional, and
models are stored in GPT-2's Hugging Face format, so transformers loads what this file saves and this file loads GPT-2.
"""

import copy
import json
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint


# --- log-probs --------------------------------------------------------------------------------------------------------

def widened(logits):
    """float32 at least: in bf16 a log-probability near -9 has steps of 0.06; summed over a response that is noise larger than z0."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def log_probs(logits, targets):
    """log softmax(logits)[targets].   (..., V), (...) -> (...)   bf16 and fp16 are widened to float32, nothing is narrowed"""
    return -F.cross_entropy(widened(logits).flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def token_logps(logits, ids, mask):
    """mask_t * log pi(ids_t | ids_<t), for padded teaching use.   logits (B, T, V), ids (B, T), mask (B, T) -> (B, T)

    Index t belongs to ids[:, t]; it is 0 at index 0 (nothing predicts the first token) and wherever mask is 0.
    """
    logps = F.pad(log_probs(logits[:, :-1], ids[:, 1:]), (1, 0))               # the one shift: logits at t-1 speak of t
    return torch.where(mask > 0, logps * mask, torch.zeros_like(logps))        # where: a masked -inf must not become NaN


def head_log_probs(hidden, weight, targets, extra=None, *, chunk_elements=None, kernels=None):
    """Log-probs of the targets under hidden @ weight.T, without ever holding (M, V) logits.   (M, d), (V, d), (M,) -> (M,)

    At V = 50257 the logits of 2,000 tokens and their gradient would be 800 MB. `chunk_elements`: logits alive at most, 2^20 on a CPU,
    where a block of them then stays in the cache, 2^26 on a GPU. `extra`: as in `chunked_log_probs`, which it takes. `kernels`: `Kernels`, or these compiled.
    """
    kernels = kernels or Kernels()
    if extra is not None:
        return chunked_log_probs(hidden, lambda h: F.linear(h, weight), weight.shape[0], targets, extra, chunk_elements=chunk_elements, log_probs=kernels.log_probs)
    most = chunk_elements or 2**(26 if hidden.is_cuda else 20)
    if len(targets) * weight.shape[0] <= most:
        return kernels.log_probs(F.linear(hidden, weight), targets)
    if torch.is_autocast_enabled(hidden.device.type):                      # which looks into no function of our own
        hidden, weight = (t.to(torch.get_autocast_dtype(hidden.device.type)) for t in (hidden, weight))
    n = max(1, most // len(targets))
    return _BlockedHead.apply(hidden, weight, targets, n - n % 64 or n, kernels)               # rows of logits then start where vectors do


class _BlockedHead(torch.autograd.Function):
    """log softmax(h W^T)[y] by blocks of the vocabulary, all M positions at once.

        forward     z_v = h . W_v           log p(y) = z_y - log sum_v exp z_v           the log of a sum from the logs of its parts
        backward    dL/dz_v = g (1[v = y] - p_v)     dL/dh = sum_v dL/dz_v W_v     dL/dW_v = sum over positions of dL/dz_v h     with g = dL/dlog p(y)

    Backward computes the block's logits again, a third more products than it could do with. So do chunks of positions (below), which on a CPU
    take 1.5 times as long: 166 x 50257 logits leave the cache between any two operations, and every chunk adds a gradient as large as W.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, n, kernels):
        sums, at_target = zip(*(kernels.block_sums(hidden @ w.t(), targets - i * n) for i, w in enumerate(weight.split(n))))
        log_sum = torch.stack(sums).logsumexp(0)
        ctx.save_for_backward(hidden, weight, targets, log_sum)
        ctx.n, ctx.kernels = n, kernels
        return sum(at_target) - log_sum

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets, log_sum = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), ctx.n):
            w = weight[start:start + ctx.n]
            d_logits = ctx.kernels.block_gradient(hidden @ w.t(), targets - start, log_sum, upstream)
            d_hidden += d_logits @ w
            if d_weight is not None:
                torch.mm(d_logits.t(), hidden, out=d_weight[start:start + ctx.n])
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def block_sums(logits, targets):
    """(log of the block's part of the sum of exponentials, the target's logit or 0 where it is in another block).   (M, n), (M,) -> (M,), (M,)"""
    z, here = widened(logits), (targets >= 0) & (targets < logits.shape[1])
    return z.logsumexp(-1), torch.where(here, z.gather(-1, (targets * here)[:, None])[:, 0], 0.0)


def block_gradient(logits, targets, log_sum, upstream):
    """upstream * (1[v = y] - softmax_v) on a block, narrowed to the logits' type again.   (M, n), (M,) x 3 -> (M, n)"""
    here = (targets >= 0) & (targets < logits.shape[1])
    grad = (widened(logits) - log_sum[:, None]).exp_().mul_(-upstream[:, None])
    return grad.scatter_add_(-1, (targets * here)[:, None], (upstream * here)[:, None]).to(logits.dtype)


class Kernels(NamedTuple):
    """What torch.compile may fuse in the head, `log_probs` where the logits are whole, the other two where they come in blocks."""
    log_probs: Callable = log_probs
    block_sums: Callable = block_sums
    block_gradient: Callable = block_gradient


def chunked_log_probs(hidden, head, vocab_size, targets, extra=None, *, chunk_elements=None, log_probs=log_probs):
    """Log-probs of the targets under head(hidden), chunk of positions by chunk.   (M, d), (m, d) -> (m, V), V, (M,) -> (M,)

    For a head that is more than a product and for what looks at whole distributions. Chunks are recomputed in backward.
    `chunk_elements`: logits of a chunk at most, 2^23 on a CPU, 2^26 on a GPU, where few rows would leave it idle.
    `extra(logits, targets, rows)` -> (k, m) may measure more on a chunk, `rows` being its slice of the M positions; the
    result is then (1 + k, M). `log_probs`: the function of that name, or it compiled.
    """
    def of(h, y, start):
        logits = head(h)
        logps = log_probs(logits, y)
        return logps if extra is None else torch.cat([logps[None], extra(logits, y, slice(start, start + len(y)))])

    rows = max(1, (chunk_elements or 2**(26 if hidden.is_cuda else 23)) // vocab_size)
    if len(targets) <= rows:
        return of(hidden, targets, 0)
    pieces = zip(hidden.split(rows), targets.split(rows), range(0, len(targets), rows))
    if not torch.is_grad_enabled():
        return torch.cat([of(*piece) for piece in pieces], dim=-1)
    return torch.cat([checkpoint(of, *piece, use_reentrant=False) for piece in pieces], dim=-1)


def wide_log_softmax(logits):
    """log softmax over the vocabulary, bf16 and fp16 widened to float32."""
    return torch.log_softmax(widened(logits), -1)


def position_kl(ref_logits, logits):
    """KL(pi_ref(. | s_t) || pi(. | s_t)) at every position, nats.   (m, V) x 2 -> (m,)   log_softmax on both: 0 log 0 is not NaN"""
    p, q = wide_log_softmax(ref_logits.detach()), wide_log_softmax(logits)
    return (p.exp() * (p - q)).sum(-1)


def position_confidence(logits, targets):
    """WPO: log p(y_t) - log sum_v p(v)^2, no gradient.   (m, V), (m,) -> (m,)   0 on average where y is the policy's own sample"""
    p = wide_log_softmax(logits.detach())
    return p.gather(-1, targets[:, None])[:, 0] - torch.logsumexp(2 * p, -1)


# --- the transformer --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context: int = 1024
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    bias: bool = False


def packed_attention(q, k, v, lengths):
    """Causal attention inside each sequence of the flat row.   (N, heads, d) x 3 -> (N, heads, d)

    A prompt with several responses, (p, n_1, n_2, ...), is there once: y_1 simply follows it, the others look back at it.
    """
    pieces, before = [], []
    for n in lengths:
        for j, m in enumerate([n] if isinstance(n, int) else [n[0] + n[1], *n[2:]]):
            before.append((len(pieces) - j, n[0]) if j else None)                          # which piece begins with the prompt, and its tokens
            pieces.append(m)
    keys, values = k.split(pieces), v.split(pieces)
    return attend(q, k, v, pieces, [b and (keys[b[0]][:b[1]], values[b[0]][:b[1]]) for b in before])


def attend(q, k, v, lengths, before):
    """Every token sees the sequence's keys and values from `before` it, and its own sequence up to itself.   (N, heads, d) x 3 -> (N, heads, d)

    before: for each sequence ((p, heads, d), (p, heads, d)), or None. On a GPU in 16 bits one kernel does it all. On a CPU a loop over
    sequences looks slow and is not: against one padded call it measured 1.8 to 2.2 times faster forward and backward at 64 to 300 tokens
    per sequence, since nothing is computed for padding or across sequences.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and varlen_is_right(q.device, q.dtype, *q.shape[1:]):
        return varlen_attention(q, k, v, lengths, before)
    return loop_attention(q, k, v, lengths, before)


def loop_attention(q, k, v, lengths, before):
    """`attend`, sequence by sequence."""
    out = []
    for q, k, v, b in zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v)), before):         # each (1, heads, n, d)
        if b is None:
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        else:
            n, p = q.shape[2], len(b[0])
            k, v = (torch.cat([first.transpose(0, 1)[None], own], 2) for first, own in zip(b, (k, v)))
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(n, p + n, dtype=torch.bool, device=q.device).tril(p)))
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def varlen_attention(q, k, v, lengths, before):
    """`attend` in one kernel, FlashAttention's for rows of any lengths (Dao 2023, arXiv 2307.08691). A mask is causal from the end: the last query sees all keys."""
    from torch.nn.attention.varlen import varlen_attn
    seen = tuple(n + (len(b[0]) if b else 0) for n, b in zip(lengths, before))
    if any(before):
        k, v = (torch.cat([x for own, b in zip(t.split(lengths), before) for x in ((b[i], own) if b else (own,))]) for i, t in enumerate((k, v)))
    return varlen_attn(q, k, v, ends(tuple(lengths), q.device), ends(seen, q.device), max(lengths), max(seen), window_size=(-1, 0))


@lru_cache(maxsize=8)
def ends(lengths, device):
    """(0, n_1, n_1 + n_2, ...), int32: the same for every layer."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@lru_cache(maxsize=None)
def varlen_is_right(device, dtype, heads, d):
    """Asked once of the machine itself: has its torch the kernel, and does it give the loop's numbers, backward too, where a prompt stands before a response?"""
    found, lengths = [], [3, 5, 2]
    for f in (loop_attention, varlen_attention):
        with torch.enable_grad():
            q, k, v = (torch.linspace(0, 50 + i, 10 * heads * d, device=device).sin().view(10, heads, d).to(dtype).requires_grad_() for i in range(3))
            try:
                out = f(q, k, v, lengths, [None, None, (k[3:6], v[3:6])])
                found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
            except (ImportError, RuntimeError, TypeError, ValueError):
                return False
    return all(bool((a - b).abs().max() <= 0.05 * a.abs().max()) for a, b in zip(*found))          # bf16: 2^-8 each, a few in a row


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1 = nn.LayerNorm(c.d_model, bias=c.bias)
        self.ln_2 = nn.LayerNorm(c.d_model, bias=c.bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(c.d_model, 3 * c.d_model, bias=c.bias),
                                   "c_proj": nn.Linear(c.d_model, c.d_model, bias=c.bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(c.d_model, 4 * c.d_model, bias=c.bias),
                                  "c_proj": nn.Linear(4 * c.d_model, c.d_model, bias=c.bias)})

    def forward(self, x, attend):
        return self.after(x, attend(*self.before(x)))

    def before(self, x):
        return [t.unflatten(1, (self.n_head, -1)) for t in self.attn.c_attn(self.ln_1(x)).chunk(3, dim=1)]

    def after(self, x, attended):
        x = x + self.attn.c_proj(attended.flatten(1))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    flat = True                                                                             # takes flat rows as they are
    shares_prompts = True                                                                   # ... and computes a prompt once for several responses
    token_budget = 8192                                                                     # tokens of a forward, by default
    kernels = Kernels()

    def __init__(self, config):
        super().__init__()
        self.config, self.context, self.vocab_size = config, config.context, config.vocab_size
        self.wte = nn.Embedding(config.vocab_size, config.d_model)                          # also the output head (tied)
        self.wpe = nn.Embedding(config.context, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, bias=config.bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:                             # GPT-2's: 0.02, less where 2 x n_layer residual branches add up
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, ids, positions, attend):
        """Hidden states.   (N,), (N,) -> (N, d).   attend(layer, q, k, v) is the only thing that knows what belongs together"""
        x = self.wte(ids) + self.wpe(positions)
        for i, block in enumerate(self.h):
            x = block(x, lambda q, k, v, i=i: attend(i, q, k, v))           # i=i: a recomputation comes after the loop
        return self.ln_f(x)

    def hidden(self, ids, positions, lengths, predict):
        """What the output head sees at the `predict` positions.   (M, d)"""
        return self.trunk(ids, positions, lambda i, q, k, v: packed_attention(q, k, v, lengths))[predict]

    def head(self, hidden):
        return F.linear(hidden, self.wte.weight)

    def forward(self, ids, positions, lengths, predict=None, targets=None, extra=None):
        """Logits (M, V) at the `predict` positions (at all, if None); with `targets`, their log-probs (M,) instead."""
        x = self.hidden(ids, positions, lengths, slice(None) if predict is None else predict)
        return self.head(x) if targets is None else head_log_probs(x, self.wte.weight, targets, extra, kernels=self.kernels)

    def checkpoint_activations(self):
        """Keep only the input of each block and recompute the rest in backward: a third more work, 5 to 15 times less memory."""
        recompute_in_backward(self.blocks("checkpoint_activations"))

    def compile_layers(self):
        """Kernels fused by torch.compile, for any number of tokens. Attention, which looks at lengths, stays outside: it would be compiled anew for every batch."""
        self.kernels = Kernels(*map(compiled, Kernels()))
        for block in self.h:
            block.before, block.after = compiled(block.before), compiled(block.after)

    def blocks(self, flag):
        """The layers, each of which is recomputed (or sharded) as one."""
        return self.h

    def forward_beside(self, flat, other, prompts):
        """Log-probs of flat's targets (M,), and those of other's, without gradient: row by row the same prompt of prompts[i] tokens.

        Each prompt is computed once: the second pass runs over other's responses alone and looks back at the first one's keys and values.
        """
        kept = []

        def first(i, q, k, v):
            kept.append((k.detach(), v.detach()))
            return packed_attention(q, k, v, flat.lengths)

        def second(i, q, k, v):
            keys, values = (t.split(flat.lengths) for t in kept[i])
            return attend(q, k, v, new, [(x_k[:p], x_v[:p]) for x_k, x_v, p in zip(keys, values, prompts)])

        x = self.trunk(flat.ids, flat.positions, first)
        logps = head_log_probs(x[flat.predict], self.wte.weight, flat.targets, kernels=self.kernels)
        with torch.no_grad():
            new = [n - p for n, p in zip(other.lengths, prompts)]
            here, there = (f.positions < torch.tensor(prompts).repeat_interleave(torch.tensor(f.lengths)).to(x.device) for f in (flat, other))
            hidden = x.new_empty(len(other.ids), x.shape[1])
            hidden[there], hidden[~there] = x[here], self.trunk(other.ids[~there], other.positions[~there], second)
            return logps, head_log_probs(hidden[other.predict], self.wte.weight, other.targets, kernels=self.kernels)

    @torch.no_grad()
    def generate(self, prompts, *, eot, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, rows=512, room=None, numbers=None):
        """Sample a response to each prompt.   list of token lists -> list of token lists (with the end-of-text, if it came)

        temperature 0 is greedy. A key-value cache, all rows at once; a row that has ended leaves the batch. The random
        number of row i's t-th token depends on (seed, i, t) alone (seed: a number or a list of them), so batching and other rows do not change a sample;
        in float32, where sums round otherwise in another batch, all but never (tests/test_ppo.py counts).
        `numbers`: what i is for each prompt, where they are a part of more (default: 0, 1, 2, ...).
        `room`: tokens at most in prompt and response together (default: the model's context). ValueError where a prompt is
        empty or leaves no room for a response.
        """
        numbers, out = numbers or range(len(prompts)), []
        for k in range(0, len(prompts), rows):
            out += self._generate(prompts[k:k + rows], numbers[k:k + rows], eot, max_new_tokens, temperature, top_p, seed, room)
        return out

    def _generate(self, prompts, numbers, eot, max_new_tokens, temperature, top_p, seed, room):
        device, room = self.wte.weight.device, min(room or self.context, self.context)
        out = [[] for _ in prompts]
        if max_new_tokens < 1:
            return out
        noise, lengths = uniforms(seed, numbers, max_new_tokens, device), check_prompts(prompts, room)
        cache = _Cache(self.config, lengths, min(max(lengths) + max_new_tokens, room), self.wte.weight)
        ids = torch.tensor([t for p in prompts for t in p], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden = self.trunk(ids, positions, cache.fill)[last]                                            # (rows, d)
        alive = torch.arange(len(prompts), device=device)                     # which prompts the rows of the cache belong to
        for t in range(max_new_tokens):
            token = sample(F.linear(hidden, self.wte.weight), noise[alive, t], temperature, top_p)
            for i, x in zip(alive.tolist(), token.tolist()):
                out[i].append(x)
            goes_on = (token != eot) & (cache.used + 1 < room)
            if t + 1 == max_new_tokens or not goes_on.any():
                break
            if not goes_on.all():
                alive, token = alive[goes_on], token[goes_on]
                cache.keep(goes_on)
            hidden = self.trunk(token, cache.used.clone(), cache.append)
            cache.used += 1
        return out

    # --- files: GPT-2's Hugging Face layout

    TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")            # GPT-2 stores these as (in, out)

    def save(self, folder, *, eot=None, weights=None):
        """Write config.json and model.safetensors in GPT-2's format; transformers' AutoModelForCausalLM loads them.

        A model without biases is written with biases of 0, the same function. `weights`: by name, where the module holds only a part of them.
        """
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, p in (weights or self.state_dict()).items():
            tensors["transformer." + name] = p.t().contiguous().cpu() if name.endswith(self.TRANSPOSED) else p.cpu()
            if not c.bias and name.endswith(".weight") and not name.startswith(("wte", "wpe")):
                tensors["transformer." + name[:-6] + "bias"] = torch.zeros(p.shape[0], dtype=p.dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.context,
                      n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, activation_function="gelu_new", n_inner=None,
                      layer_norm_epsilon=1e-5, tie_word_embeddings=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                      dtype=str(self.wte.weight.dtype).removeprefix("torch."), bos_token_id=eot, eos_token_id=eot, nanokto={"bias": c.bias})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder, *, device="cpu", dtype=torch.float32):
        """GPT-2 weights from a folder in Hugging Face format (one or several safetensors files), ours or anybody's."""
        c = read_model_config(folder)
        if c.get("model_type") != "gpt2":
            raise SystemExit(f"--model {folder}: model_type is {c.get('model_type')!r}; the small GPT reads 'gpt2' folders")
        fixed = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (True,),
                 "n_inner": (None, 4 * c.get("n_embd", 768)), "scale_attn_by_inverse_layer_idx": (False,)}
        for name, valid in fixed.items():
            if c.get(name, valid[0]) not in valid:
                raise SystemExit(f"--model {folder}: {name} is {c[name]!r}; the small GPT has {valid[0]!r} (load_policy reads any)")
        bias = c.get("nanokto", {"bias": True})["bias"]
        n_layer, n_head, d = c.get("n_layer", 12), c.get("n_head", 12), c.get("n_embd", 768)
        model = cls(GPTConfig(c.get("vocab_size", 50257), c.get("n_positions", 1024), n_layer, n_head, d, bias)).to(dtype)
        tensors = {k.removeprefix("transformer."): v for f in weight_files(folder) for k, v in load_file(f).items()}
        wanted = model.state_dict()
        missing = [k for k in wanted if k not in tensors]
        if missing:
            raise SystemExit(f"--model {folder}: no tensor {missing[0]!r} in its safetensors files")
        model.load_state_dict({k: tensors[k].t() if k.endswith(cls.TRANSPOSED) else tensors[k] for k in wanted})
        return model.to(device)


def recompute_in_backward(blocks):
    """Wraps each block's forward in torch's checkpoint. No training mode is needed, and module hooks (FSDP's) stay outside."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compiled(f):
    """Once for any number of tokens, not once for each."""
    return torch.compile(f, dynamic=True)


class _Cache:
    """Keys and values of every layer, (layer, key or value, row, head, position, d): row i's tokens are at 0 .. used[i] - 1."""

    def __init__(self, c, lengths, room, like):
        shape = (c.n_layer, 2, len(lengths), c.n_head, room, c.d_model // c.n_head)
        self.kv = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.lengths, self.used = lengths, torch.tensor(lengths, device=like.device)        # used: the next free position
        self.row = torch.repeat_interleave(torch.arange(len(lengths), device=like.device), self.used)
        self.column = torch.cat([torch.arange(n, device=like.device) for n in lengths])

    def fill(self, layer, q, k, v):
        """Prompts, as a flat row: remember keys and values, attend as in training."""
        for slot, t in enumerate((k, v)):
            self.kv[layer, slot][self.row, :, self.column] = t.to(self.kv.dtype)
        return packed_attention(q, k, v, self.lengths)

    def append(self, layer, q, k, v):
        """One new token per row, at position `used`: it sees its own row up to itself.   (rows, heads, d) x 3"""
        rows = torch.arange(len(q), device=q.device)
        for slot, t in enumerate((k, v)):
            self.kv[layer, slot][rows, :, self.used] = t.to(self.kv.dtype)
        n = int(self.used.max()) + 1
        seen = (torch.arange(n, device=q.device) <= self.used[:, None])[:, None, None]              # (rows, 1, 1, n)
        keys, values = self.kv[layer, :, :, :, :n].to(q.dtype)
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen)[:, :, 0]

    def keep(self, rows):
        self.kv, self.used = self.kv[:, :, rows], self.used[rows]


def check_prompts(prompts, room):
    """The prompts' lengths, if every one has a token to start from and leaves room for one more."""
    lengths = [len(p) for p in prompts]
    if min(lengths) < 1 or max(lengths) >= room:
        raise ValueError(f"prompts must have 1 to {room - 1} tokens, got {min(lengths)} to {max(lengths)}")
    return lengths


def uniforms(seed, numbers, n, device="cpu"):
    """A random number in [0, 1) for each of the n tokens of each row: a function of (seed, the row's number, position).   (rows, n) float64"""
    return torch.from_numpy(np.stack([np.random.default_rng([*np.atleast_1d(seed), i]).random(n) for i in numbers])).to(device)


def sample(logits, uniform, temperature=1.0, top_p=1.0):
    """One token per row by inverting the distribution function at `uniform`.   (B, V), (B,) -> (B,);  temperature 0: argmax

    top_p keeps the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2019, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, -1)                 # float64: a float32 running sum ends short of 1
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p                              # the token that crosses top_p stays,
        ordered[:, 1:][beyond[:, 1:]] = 0                                           # and the likeliest one always
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


# --- any Hugging Face causal LM behind the same call ------------------------------------------------------------------

class HFPolicy(nn.Module):
    """`AutoModelForCausalLM` that takes flat rows, and only response positions meet its head, in chunks.

    transformers keeps the sequences of a row apart only when it sees restarting position_ids, no attention mask and NO cache; with
    its default use_cache=True they silently see each other (logit errors of 0.02 to 0.25). So a probe decides, per model,
    whether rows may stay `flat`; else they are padded on the way in and unpadded on the way out. Nobody else ever sees a pad.
    A second probe compares our head with the model's own; where they differ the model's logits are taken whole (`chunked` False).

    `lora`: train a fresh adapter of that rank on frozen weights; `reference()` is then the same weights with it switched off.
    """

    shares_prompts = False
    kernels = Kernels()

    def __init__(self, lm, *, lora=0, seed=0):
        super().__init__()
        from transformers import GenerationConfig
        self.lm = lm.eval()                             # dropout off, in training too: policy and reference must agree
        lm.generation_config = GenerationConfig()       # a folder's own may carry penalties, and samples would not be the policy's
        c = lm.config.get_text_config()
        self.vocab_size = c.vocab_size
        self.context = getattr(c, "max_position_embeddings", None) or getattr(c, "n_positions", 1024)
        # What heads do after the product: Cohere scales, Granite divides, Gemma caps. The probe sees what is not listed here.
        self.scale = (getattr(c, "logit_scale", None) or 1) / (getattr(c, "logits_scaling", None) or 1)
        self.softcap = getattr(c, "final_logit_softcapping", None)
        self.chunked = self._head_is_ours()             # else hidden() gives the model's own logits, and head() nothing to do
        self._check_causal()
        self.flat = self._keeps_apart()
        # SDPA's attention is N x N over a flat row. CPU, one core, Llama shape d = 384, microseconds per token forward and backward,
        # at 128 / 512 tokens a row: flat rows of 512: 969 / 996, of 1024: 1143 / 1175, of 2048: 1626 / 1600; padded to one
        # width 1911 / 1669, padded in groups of like length 1026 / 1132. So flat rows of 512 tokens are the best of them.
        varlen = "flash" in (lm.config._attn_implementation or "")
        self.token_budget = 8192 if self.flat and varlen else 512 if self.flat and lm.device.type == "cpu" else 2048
        self.sft_adapter = None                         # the adapter folder that was merged into the weights on loading
        object.__setattr__(self, "peft", add_lora(lm, lora, seed) if lora else None)       # no submodule: its weights are lm's

    # --- what the model is like: asked once, of the model itself

    def _rows(self, *lengths):
        device = next(self.lm.parameters()).device
        return (torch.arange(sum(lengths), device=device) * 7 + 3) % self.vocab_size, torch.cat([torch.arange(n, device=device) for n in lengths])

    def _same(self, a, b, wide, narrow):
        """Equal but for rounding: up to `narrow` for 16-bit weights, else up to `wide`."""
        tolerance = narrow if a.dtype in (torch.bfloat16, torch.float16) else wide
        return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1))

    @torch.no_grad()
    def _check_causal(self):
        """A later token must not change an earlier one's output. It is also why pads at the right need no attention mask."""
        ids, _ = self._rows(9)
        other = torch.cat([ids[:7], (ids[7:] + 1) % self.vocab_size])
        if not self._same(self._run(ids[None])[0, :7], self._run(other[None])[0, :7], 1e-5, 0.03):
            kind = self.lm.config.model_type
            raise SystemExit(f"--model {self.lm.name_or_path}: its tokens see later ones (model_type {kind!r}); a causal language model is needed")

    @torch.no_grad()
    def _keeps_apart(self):
        """Do two sequences in one row give what two forwards give, and does the second not notice when the first changes? The latter
        is exact in 16 bits too, where rounding would hide a small leak. Sequences longer than a small sliding window, so that it matters."""
        window = getattr(self.lm.config.get_text_config(), "sliding_window", None) or 0
        lengths = [n + (window if window <= 512 else 0) for n in (5, 6)]
        ids, positions = self._rows(*lengths)
        other = torch.cat([(ids[:lengths[0]] + 1) % self.vocab_size, ids[lengths[0]:]])
        try:
            row, changed = (self._run(x[None], positions[None])[0] for x in (ids, other))
        except TypeError:                                                           # no position_ids at all
            return False
        apart = torch.cat([self._run(part[None])[0] for part in ids.split(lengths)])
        return self._same(row, apart, 1e-3, 0.1) and self._same(row[lengths[0]:], changed[lengths[0]:], 1e-5, 0.0)

    @torch.no_grad()
    def _head_is_ours(self):
        """Does `head` of the decoder's output give the model's own logits, of hidden states from small to so large that any cap shows?"""
        if self.lm.get_decoder() is self.lm or self.lm.get_output_embeddings() is None:
            return False
        seen = []

        def enlarge(module, args, out):
            out.last_hidden_state = out.last_hidden_state * torch.logspace(-1, 2, 9).to(out.last_hidden_state)[:, None]
            seen.append(out.last_hidden_state)
            return out

        hook = self.lm.get_decoder().register_forward_hook(enlarge)
        try:
            logits = self.lm(input_ids=self._rows(9)[0][None], use_cache=False).logits
        finally:
            hook.remove()
        if not seen:                                                                # its forward goes another way
            return False
        ours = self._post(self.lm.get_output_embeddings()(seen[0]))
        size = logits.abs().amax(-1, keepdim=True).clamp(min=1e-6)                            # each position by its own size
        return ours.shape == logits.shape and self._same(ours / size, logits / size, 1e-3, 0.02)

    # --- the policy's interface

    def train(self, mode=True):
        return super().train(False)

    def _run(self, rows, positions=None):
        """(B, T) -> (B, T, d): the decoder's output; the model's logits where the head is not ours."""
        how = dict(input_ids=rows, use_cache=False) | ({} if positions is None else {"position_ids": positions})
        return self.lm.get_decoder()(**how).last_hidden_state if self.chunked else self.lm(**how).logits

    def _padded(self, ids, lengths):
        """The same (N, d) by rows padded at the right, in groups of like length: at most an eighth of a group is padding."""
        groups, parts, order = [], ids.split(lengths), sorted(range(len(lengths)), key=lengths.__getitem__)
        for i in order:
            group = groups[-1] if groups else []
            if group and lengths[i] * (len(group) + 1) * 7 <= (sum(lengths[j] for j in group) + lengths[i]) * 8:
                group.append(i)
            else:
                groups.append([i])
        out = [None] * len(lengths)
        for group in groups:
            hidden = self._run(nn.utils.rnn.pad_sequence([parts[i] for i in group], batch_first=True))
            for i, h in zip(group, hidden):
                out[i] = h[:lengths[i]]
        return torch.cat(out)

    def hidden(self, ids, positions, lengths, predict):
        """What `head` sees at the `predict` positions.   (M, d); not `chunked`: the logits, (M, V)"""
        return (self._run(ids[None], positions[None])[0] if self.flat else self._padded(ids, list(lengths)))[predict]

    def _post(self, logits):
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def head(self, hidden):
        return self._post(self.lm.get_output_embeddings()(hidden)) if self.chunked else hidden

    def forward(self, ids, positions, lengths, predict=None, targets=None, extra=None):
        hidden = self.hidden(ids, positions, lengths, slice(None) if predict is None else predict)
        if targets is None:
            return self.head(hidden)
        if self.chunked and self.scale == 1 and self.softcap is None and (weight := plain_weight(self.lm.get_output_embeddings())) is not None:
            return head_log_probs(hidden, weight, targets, extra, kernels=self.kernels)
        return chunked_log_probs(hidden, self.head, self.vocab_size, targets, extra, log_probs=self.kernels.log_probs)

    def reference(self):
        """The policy before training, without a second copy of the weights: the same model with its adapter switched off."""
        if self.peft is None:
            raise ValueError("only a policy with lora has its reference inside")
        return AdapterOff(self)

    def checkpoint_activations(self):
        """As `GPT.checkpoint_activations`. Not by transformers' own switch, which needs training mode, and that means dropout."""
        recompute_in_backward(self.blocks("checkpoint_activations"))

    def compile_layers(self):
        """As `GPT.compile_layers`, attention included: transformers' looks at the positions alone."""
        self.kernels = Kernels(*map(compiled, Kernels()))
        for block in self.blocks("compile"):
            block.forward = compiled(block.forward)
        self.generate = torch.compiler.set_stance("force_eager")(self.generate)            # a layer's own cache would be compiled layer by layer

    def blocks(self, flag):
        from transformers.modeling_layers import GradientCheckpointingLayer
        found = [m for m in self.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not found:
            raise SystemExit(f"--{flag}: transformers does not mark the layers of model_type {self.lm.config.model_type!r}")
        return found

    @torch.no_grad()
    def generate(self, prompts, *, eot, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, rows=64, room=None, numbers=None):
        """As `GPT.generate` and from the same random numbers, by transformers' own `generate` (left-padded), which takes our draw for a greedy choice."""
        device, out, room = next(self.lm.parameters()).device, [], min(room or self.context, self.context)
        if max_new_tokens < 1 or not prompts:
            return [[] for _ in prompts]
        check_prompts(prompts, room)
        noise = uniforms(seed, numbers or range(len(prompts)), max_new_tokens, device)
        for i in range(0, len(prompts), rows):
            part = prompts[i:i + rows]
            width = max(map(len, part))
            ids = torch.tensor([[eot] * (width - len(p)) + list(p) for p in part], device=device)
            real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)

            def draw(ids, logits, noise=noise[i:i + rows], width=width):
                token = sample(logits, noise[:, ids.shape[1] - width], temperature, top_p)
                return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)

            grown = self.lm.generate(ids, attention_mask=real, max_new_tokens=max_new_tokens, eos_token_id=eot, pad_token_id=eot,
                                     do_sample=False, logits_processor=[draw])
            for prompt, row in zip(part, grown[:, width:].tolist()):
                row = row[:room - len(prompt)]
                out.append(row[:row.index(eot) + 1] if eot in row else row)
        return out

    def save(self, folder, *, eot=None, adapter=False, weights=None):
        """The model in Hugging Face format, an adapter merged into its weights; `adapter=True`: the adapter alone, in peft's format. `weights` as above."""
        if not adapter:
            # Merging in place and back would leave rounding in the frozen weights, so in a copy.
            lm = self.lm if self.peft is None else copy.deepcopy(self.peft).merge_and_unload()
            lm.save_pretrained(folder, state_dict=weights and {name.removeprefix("lm."): p for name, p in weights.items()})
        elif self.peft is None:
            raise ValueError("there is no adapter to save: the policy was loaded without lora")
        elif self.sft_adapter:
            raise SystemExit(f"--save adapter: this one stands on {self.sft_adapter} merged into its base, which no adapter folder can say; save it merged")
        else:
            self.peft.save_pretrained(folder, save_embedding_layers=False)


def plain_weight(head):
    """The weight of a head that is a product and nothing else, no bias and no adapter; or None."""
    return head.weight if type(head) is nn.Linear and head.bias is None else None


class AdapterOff:
    """A policy with its adapter switched off, and without gradient; sizes and settings are the policy's own."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def _call(self, method, *args, **how):
        with torch.no_grad(), self.policy.peft.disable_adapter():
            return method(*args, **how)

    def __call__(self, *args, **how):
        return self._call(self.policy, *args, **how)

    def hidden(self, *args):
        return self._call(self.policy.hidden, *args)

    def head(self, hidden):
        return self._call(self.policy.head, hidden)

    def generate(self, prompts, **how):
        return self._call(self.policy.generate, prompts, **how)

    def requires_grad_(self, mode=True):
        return self                                     # its weights are the policy's: freezing them would freeze the policy


# --- loading ----------------------------------------------------------------------------------------------------------

def local_folder(name, flag="model", *, trust_remote_code=False):
    """The folder itself, or where the hub's files of that name are after downloading them."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        return Path(name)
    from huggingface_hub import snapshot_download
    files = ["config.json", "*model*.safetensors", "*.safetensors.index.json", "adapter_config.json", "generation_config.json",
             "*token*", "vocab*", "merges.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as e:                                                          # offline, no such name, no access: a dozen classes
        raise SystemExit(f"--{flag} {name}: no such folder, and not to be had from the hub ({type(e).__name__}: {' '.join(str(e).split())[:150]})") from None


def adapter_base(folder, flag="model"):
    """The folder or hub name of the base model if `folder` holds a peft adapter, else None."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError):
        base = None
    if not base:
        raise SystemExit(f"--{flag} {folder}: adapter_config.json does not say what its base model is (base_model_name_or_path)")
    return str(path.parent / base) if (path.parent / base).is_dir() else base


def read_model_config(folder, flag="model"):
    """config.json of the model in `folder`, or of the base if it holds an adapter."""
    path = Path(folder) / "config.json"
    if base := adapter_base(folder, flag):
        return read_model_config(local_folder(base, flag), flag)
    if not path.is_file():
        raise SystemExit(f"--{flag} {folder}: no config.json there; expected a folder with a model in Hugging Face format")
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise SystemExit(f"--{flag} {folder}: config.json is broken ({e})") from None


def weight_files(folder, flag="model"):
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SystemExit(f"--{flag} {folder}: no *.safetensors there; only safetensors weights are loaded")
    return files


def load_policy(folder, *, device="cpu", dtype=torch.float32, lora=0, seed=0, trust_remote_code=False, flag="model"):
    """The causal LM in `folder` (or of that name on the hub): our own GPT where we wrote it, else transformers' as an `HFPolicy`.

    A folder with an adapter is its base with the adapter merged in, so that what is trained next, and its reference, start from
    both. `lora`: rank of a fresh adapter, the only thing then trained, its random half drawn from `seed`. `dtype` is that of the weights.
    """
    name, folder = folder, local_folder(folder, flag, trust_remote_code=trust_remote_code)
    base = adapter_base(folder, flag)
    lm_folder = local_folder(base, flag, trust_remote_code=trust_remote_code) if base else folder
    config, files = read_model_config(lm_folder, flag), weight_files(lm_folder, flag) + (weight_files(folder, flag) if base else [])
    if "nanokto" in config and lora:
        raise SystemExit(f"--lora {lora}: is for Hugging Face models; {folder} holds this project's small GPT, which is trained whole")
    try:
        policy = GPT.from_pretrained(folder, device=device, dtype=dtype) if "nanokto" in config else None
        lm = load_lm(lm_folder, dtype, trust_remote_code, flag).to(device) if policy is None else None
        if base:
            lm = merge_adapter(lm, folder, flag)
    except Exception as e:                                                          # a folder can be broken in a hundred ways
        raise SystemExit(f"--{flag} {folder}: cannot be loaded from {', '.join(f.name for f in files)[:100]}: {' '.join(str(e).split())[:300]}") from None
    for tensor, p in (policy or lm).named_parameters():
        if p.numel() and not all(x.isfinite() for x in p.detach().aminmax()):       # which pass a NaN on, and allocate nothing
            raise SystemExit(f"--{flag} {folder}: the weights are broken: NaN or infinity in {tensor}")
    if policy is None:
        policy = HFPolicy(lm, lora=lora, seed=seed)
        policy.sft_adapter = str(folder) if base else None
        if lora:                                                # what an adapter's folder will say of its base: a path good from anywhere, or the hub's name
            policy.peft.active_peft_config.base_model_name_or_path = str(Path(name).resolve() if Path(name).is_dir() else name)
    return policy


def load_lm(folder, dtype, trust_remote_code, flag):
    """transformers' causal LM in `folder`. What transformers only warns of, weights left at random numbers, is an error here."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available, logging
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()                                                   # its tables; the one line below says it
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if not trust_remote_code and type(config) not in AutoModelForCausalLM._model_mapping:
            raise SystemExit(f"--{flag} {folder}: model_type {config.model_type!r} is no causal language model that transformers knows")
        lm, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
                                                        ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code)
    finally:
        logging.set_verbosity(before)
    for name, got, expected in sorted(info["mismatched_keys"]):
        raise SystemExit(f"--{flag} {folder}: {name} has the shape {tuple(got)}, config.json asks for {tuple(expected)}")
    if missing := sorted(info["missing_keys"]):
        raise SystemExit(f"--{flag} {folder}: no tensor {missing[0]!r} in its safetensors files" + (f" ({len(missing)} are missing)" if missing[1:] else ""))
    if torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available() and lm._supports_flash_attn:
        lm.set_attn_implementation("flash_attention_2")                             # variable length: flat rows cost no N x N
    return lm


# --- adapters (Hu et al. 2021, arXiv 2106.09685), by the peft library ----------------------------------------------------------

def peft_library(flag):
    try:
        import peft
    except ImportError:
        raise SystemExit(f"--{flag}: needs the peft package (pip install peft)") from None
    return peft


def add_lora(lm, rank, seed=0):
    """A fresh adapter on every linear layer but the head: W + 2 B A, B = 0, so that it starts as the model itself. W is frozen.

    A is random, and the same on every process whatever the state of its generator.
    """
    peft = peft_library("lora")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return peft.get_peft_model(lm, config)


def merge_adapter(lm, folder, flag="model"):
    """lm with the adapter in `folder` added to its weights, all of them trainable."""
    peft, file = peft_library(flag), Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise SystemExit(f"--{flag} {folder}: an adapter without adapter_model.safetensors; only safetensors weights are loaded")
    with warnings.catch_warnings(action="ignore"):                                  # what peft warns of is an error below
        model = peft.PeftModel.from_pretrained(lm, folder)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise SystemExit(f"--{flag} {folder}: an adapter of type {model.active_peft_config.peft_type.value} cannot be merged into the weights; LoRA can")
    wanted, got = peft.get_peft_model_state_dict(model, save_embedding_layers=False), load_file(file)
    if odd := sorted(wanted.keys() ^ got.keys()):
        raise SystemExit(f"--{flag} {folder}: the adapter does not fit its base: {odd[0]!r} is only in {'the file' if odd[0] in got else 'the model'}")
    return model.merge_and_unload().requires_grad_(True)


# --- what it needs ----------------------------------------------------------------------------------------------------

def memory_estimate(net, *, tokens, checkpointed=False, reference=False, state_bytes=8, activation_bytes=2):
    """Bytes that training will hold, by what holds them. `net`: a GPT or a transformers model, on the meta device too.

    `tokens` of the largest forward; `reference`: a second copy stays in memory; `state_bytes` of the optimiser per trained weight.
    Rules of thumb for a decoder with a gated MLP: a token leaves about 8 d + 4 d_mlp numbers in each layer (an ungated MLP
    less); checkpointed it leaves d, and one layer at a time is recomputed. A logit costs 14 bytes in the head's loss: 16-bit, float32,
    its softmax and its gradient.
    """
    net = getattr(net, "lm", net)
    if isinstance(net, GPT):
        d, layers, mlp, vocab = net.config.d_model, net.config.n_layer, 4 * net.config.d_model, net.vocab_size
    else:
        c = net.config.get_text_config()
        d, layers, vocab = c.hidden_size, c.num_hidden_layers, c.vocab_size
        mlp = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * d
    weights, trained = list(net.parameters()), [p for p in net.parameters() if p.requires_grad]
    layer, size = tokens * (8 * d + 4 * mlp) * activation_bytes, sum(p.numel() * p.element_size() for p in weights)
    return {"weights": size, "gradients": sum(p.numel() * p.element_size() for p in trained), "optimizer": state_bytes * sum(p.numel() for p in trained),
            "activations": layers * tokens * d * activation_bytes + layer if checkpointed else layers * layer,
            "head": 14 * min(tokens * vocab, max(vocab, 2**26)), "reference": size if reference else 0}

"""Faster code for what model.py computes in a plain way, with the same results.

    blocked_log_probs    the head by blocks of the vocabulary, if there are too many logits
    varlen_attention     attention of all sequences in one kernel, on a GPU
    compile_head         --compile
"""

from functools import lru_cache

import torch

import model
from model import log_probs, loop_attention, pieces_of, widened


# --- the head by blocks of the vocabulary -------------------------------------------------------

# Up to this many exponentials of logits (128 MB) stay in memory for backward. If there are more,
# none stays: backward computes the logits again, block by block.
KEPT = 2 ** 25


def blocked_log_probs(hidden, weight, targets, most):
    """model.head_log_probs with at most `most` logits at a time.   (M, d), (V, d), (M,) -> (M,)"""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # autocast does not reach into BlockedHead
        hidden = hidden.to(torch.get_autocast_dtype(device))
        weight = weight.to(torch.get_autocast_dtype(device))
    size = max(1, most // len(targets))
    if size > 64:
        size -= size % 64  # aligns each row of logits for vector instructions
    keep = torch.is_grad_enabled() and len(targets) * len(weight) <= KEPT
    return BlockedHead.apply(hidden, weight, targets, size, keep)


class BlockedHead(torch.autograd.Function):
    """log softmax(h W^T)[y] of all M positions, `size` words of the vocabulary at a time.

        forward     z_v = h . W_v        log p(y) = z_y - log sum_v exp z_v
        backward    dL/dz_v = g (1[v = y] - p_v)               g = dL/dlog p(y)
                    dL/dh = sum_v dL/dz_v W_v                  dL/dW_v = sum_m dL/dz_mv h_m

    In a block p_v = exp(z_v - top) exp(top - log sum). The first factor is known in forward. If it
    is kept (`keep`), backward needs one exponential per position and block, and no product h W^T.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, size, keep):
        log_sums, target_logits = [], []
        kept = []  # with `keep`: the first factor and `top` of each block
        for start in range(0, len(weight), size):
            logits = hidden @ weight[start:start + size].t()
            shares, top, log_sum, at_target = compiled(block_sums)(logits, targets - start)
            log_sums.append(log_sum)
            target_logits.append(at_target)
            if keep:
                kept += [shares, top]
        log_sum = torch.stack(log_sums).logsumexp(0)
        ctx.size = size
        ctx.save_for_backward(hidden, weight, targets, log_sum, *kept)
        return sum(target_logits) - log_sum

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets, log_sum, *kept = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
        for start in range(0, len(weight), ctx.size):
            words = weight[start:start + ctx.size]
            if kept:
                shares, top, *kept = kept
            else:
                shares, top, _, _ = compiled(block_sums)(hidden @ words.t(), targets - start)
            gradient = compiled(block_gradient)(shares, top, targets - start, log_sum, upstream)
            gradient = gradient.to(hidden.dtype)
            d_hidden += gradient @ words
            if d_weight is not None:
                torch.mm(gradient.t(), hidden, out=d_weight[start:start + ctx.size])
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def block_sums(logits, targets):
    """exp(z_v - top) of a block, (M, n); top = max_v z_v, log sum_v exp z_v and z_y, (M,) each.

    z_y is 0 where y is in another block.
    """
    logits = widened(logits)
    here = (targets >= 0) & (targets < logits.shape[1])
    at_target = logits.gather(-1, (targets * here)[:, None])[:, 0]
    top = logits.amax(-1)
    shares = logits.sub_(top[:, None]).exp_()
    return shares, top, top + shares.sum(-1).log(), torch.where(here, at_target, 0.0)


def block_gradient(shares, top, targets, log_sum, upstream):
    """upstream * (1[v = y] - p_v) on a block; p_v = shares * exp(top - log_sum).   -> (M, n)"""
    here = (targets >= 0) & (targets < shares.shape[1])
    gradient = shares * (-upstream * (top - log_sum).exp())[:, None]
    return gradient.scatter_add_(-1, (targets * here)[:, None], (upstream * here)[:, None])


def compiled(function):
    return model.compiled.get(function, function)


def compile_head():
    for function in (log_probs, block_sums, block_gradient):
        model.compiled[function] = fuse(function)


def fuse(function):
    """Compile once for any number of tokens."""
    return torch.compile(function, dynamic=True)


# --- attention in one kernel --------------------------------------------------------------------

def varlen_attention(q, k, v, pieces):
    """Attention in one kernel: FlashAttention for rows of any lengths (Dao 2023, 2307.08691).

    Its causal mask is aligned at the end: the last query of a piece sees all the piece's keys.
    """
    from torch.nn.attention.varlen import varlen_attn
    lengths = tuple(piece.length for piece in pieces)
    seen = tuple(piece.length + piece.prompt for piece in pieces)
    if seen != lengths:
        k = with_prompts(k, pieces, lengths)
        v = with_prompts(v, pieces, lengths)
    return varlen_attn(q, k, v, ends(lengths, q.device), ends(seen, q.device),
                       max(lengths), max(seen), window_size=(-1, 0))


def with_prompts(t, pieces, lengths):
    """The flat row, with a copy of the prompt before every piece that attends to one."""
    parts = t.split(lengths)
    out = []
    for piece, part in zip(pieces, parts):
        out += [parts[piece.holder][:piece.prompt], part]
    return torch.cat(out)


@lru_cache(maxsize=8)
def ends(lengths, device):
    """(0, n_1, n_1 + n_2, ...), int32. Cached, because all layers need the same."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@lru_cache(maxsize=None)
def varlen_is_right(device, dtype, heads, d):
    """True if the kernel exists here and gives the loop's values and gradients. Tried once."""
    pieces = pieces_of([3, (3, 2, 2)])
    waves = [torch.linspace(0, 50 + i, 10 * heads * d, device=device).sin() for i in range(3)]
    results = []
    for attention in (loop_attention, varlen_attention):
        inputs = [wave.view(10, heads, d).to(dtype).requires_grad_() for wave in waves]
        try:
            with torch.enable_grad():
                out = attention(*inputs, pieces)
                gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        except (ImportError, RuntimeError, TypeError, ValueError):
            return False
        results.append([out, *gradients])
    # bf16 rounds with a relative error of 2^-8, and here several roundings add up.
    return all(bool((a - b).abs().max() <= 0.05 * a.abs().max()) for a, b in zip(*results))

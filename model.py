"""From tokens to log-probs: a small GPT on flat rows, its output head, and its generation.

There is no padding. A batch of sequences is ONE row of tokens laid end to end. Positions restart
at every sequence, and a token attends only to its own sequence.

    ids        (N,)  tokens of all sequences                        N = sum(lengths)
    positions  (N,)  0, 1, 2, ... restarting at every sequence
    lengths    list  tokens per sequence. [4, (3, 2, 5)]: a sequence of 4 tokens, then a prompt of
                     3 tokens with two responses of 2 and 5: [x][y_1][y_2], the prompt only once
    predict    (M,)  indices into the row: the tokens that stand just before a trained token
    targets    (M,)  the trained tokens, ids[predict + 1]

The output head is computed only at the M positions that predict a trained token. With a large
vocabulary this saves most of the work.

The architecture is GPT-2's (Radford et al. 2019): pre-norm, tanh-GELU, learned positions, a head
tied to the embedding; biases are optional. transformers loads what it saves.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from plumbing import gpt2


# --- log-probs ------------------------------------------------------

def widened(logits):
    """bf16 and fp16 become float32. In bf16 a log-prob near -9 has steps of 0.06."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        return logits.float()
    return logits


def wide_log_softmax(logits):
    """log softmax over the vocabulary, in float32 at least.   (..., V) -> (..., V)"""
    return torch.log_softmax(widened(logits), -1)


def log_probs(logits, targets):
    """log softmax(logits)[targets], in float32 at least.   (..., V), (...) -> (...)"""
    logits = widened(logits).flatten(0, -2)
    return -F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


def token_logps(logits, ids, mask):
    """mask_t * log pi(ids_t | ids_<t), for padded batches.   (B, T, V), (B, T), (B, T) -> (B, T)

    Index t belongs to ids[:, t]. The result is 0 where mask is 0, and at t = 0: no token predicts
    the first one.
    """
    # The only shift: the logits at t - 1 predict the token at t.
    logps = F.pad(log_probs(logits[:, :-1], ids[:, 1:]), (1, 0))
    # `where`, because a masked -inf times 0 would be NaN.
    return torch.where(mask > 0, logps * mask, torch.zeros_like(logps))


# --- the output head ------------------------------------------------

compiled = {}  # function -> its compiled version, with --compile

# The logits of 2,000 tokens over 50,257 words, and their gradient, would take 800 MB. So at most
# `chunk_elements` of them are made at a time: 2^20 stay in a CPU's cache, 2^26 keep a GPU busy.

def head_log_probs(hidden, weight, targets, *, chunk_elements=None):
    """Log-probs of the targets under the logits hidden @ weight.T.  (M, d), (V, d), (M,) -> (M,)"""
    most = chunk_elements or 2 ** (26 if hidden.is_cuda else 20)
    if len(targets) * len(weight) <= most:
        return compiled.get(log_probs, log_probs)(F.linear(hidden, weight), targets)
    from plumbing.kernels import blocked_log_probs
    return blocked_log_probs(hidden, weight, targets, most)


def chunked_log_probs(hidden, head, vocab_size, targets, extra=None, *, chunk_elements=None):
    """Log-probs of the targets under any head(hidden), a chunk of positions at a time.   -> (M,)

    `extra(logits, targets, rows) -> (k, m)` may measure more on the m positions of a chunk; `rows`
    is their slice of all M. The result is then (1 + k, M), the log-probs first.
    """
    def measure(hidden, targets, start):
        logits = head(hidden)
        logps = compiled.get(log_probs, log_probs)(logits, targets)
        if extra is None:
            return logps
        more = extra(logits, targets, slice(start, start + len(targets)))
        return torch.cat([logps[None], more])

    most = chunk_elements or 2 ** (26 if hidden.is_cuda else 23)
    rows = max(1, most // vocab_size)
    if len(targets) <= rows:
        return measure(hidden, targets, 0)
    if torch.is_grad_enabled():
        measure = partial(checkpoint, measure, use_reentrant=False)  # computed again in backward
    starts = range(0, len(targets), rows)
    parts = zip(hidden.split(rows), targets.split(rows), starts)
    return torch.cat([measure(*part) for part in parts], dim=-1)


# --- attention ------------------------------------------------------

class Piece(NamedTuple):
    """Some tokens of the flat row. They also attend to the first `prompt` tokens of `holder`."""
    length: int
    prompt: int = 0
    holder: int = 0


def pieces_of(lengths):
    """[4, (3, 2, 5)] -> [Piece(4), Piece(3 + 2), Piece(5, prompt=3, holder=1)]

    The first response is in one piece with its prompt; the others attend to the prompt in it.
    """
    pieces = []
    for length in lengths:
        if isinstance(length, int):
            pieces.append(Piece(length))
            continue
        prompt, first, *others = length
        holder = len(pieces)
        pieces.append(Piece(prompt + first))
        pieces += [Piece(other, prompt, holder) for other in others]
    return pieces


def attend(q, k, v, pieces):
    """Causal attention inside each sequence of the flat row.  (N, heads, d) x 3 -> (N, heads, d)"""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from plumbing.kernels import varlen_attention, varlen_is_right
        if varlen_is_right(q.device, q.dtype, *q.shape[1:]):
            return varlen_attention(q, k, v, pieces)
    return loop_attention(q, k, v, pieces)


def loop_attention(q, k, v, pieces):
    """Attention piece by piece. On a CPU this is twice as fast as one padded call."""
    lengths = [piece.length for piece in pieces]
    # (N, heads, d) -> one (1, heads, n, d) per piece
    queries, keys, values = (t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v))
    out = []
    for piece, query, key, value in zip(pieces, queries, keys, values):
        if piece.prompt == 0:
            out.append(F.scaled_dot_product_attention(query, key, value, is_causal=True))
            continue
        key = torch.cat([keys[piece.holder][:, :, :piece.prompt], key], dim=2)
        value = torch.cat([values[piece.holder][:, :, :piece.prompt], value], dim=2)
        mask = torch.ones(piece.length, key.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(piece.prompt)
        out.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    return torch.cat(out, dim=2)[0].transpose(0, 1)


# --- what every policy does -----------------------------------------

class Policy(nn.Module):
    """A causal language model on flat rows: `GPT` below, or plumbing's `HFPolicy`.

    Both define hidden(ids, positions, lengths, predict) -> (M, d), head(hidden) -> (M, V),
    head_weight() -> (V, d), or None if the head is more than a product, write(...), blocks(flag).
    """

    flat = True  # it takes flat rows; False: they are padded inside
    chunked = True  # the head is separate, so logits can be made in chunks
    shares_prompts = False  # computes a prompt once for several responses
    token_budget = 8192  # tokens per forward, by default
    rows_at_once = 512  # prompts that `generate` answers at a time, by default
    sft_adapter = None  # folder of an adapter that was merged into the weights

    def forward(self, ids, positions, lengths, predict=None, targets=None, extra=None):
        """Log-probs of the targets (M,), or with `extra` (1 + k, M): see `chunked_log_probs`.

        Without targets: the logits (M, V). Without predict: at all positions.
        """
        if predict is None:
            predict = slice(None)
        hidden = self.hidden(ids, positions, lengths, predict)
        if targets is None:
            return self.head(hidden)
        weight = self.head_weight()
        if extra is None and weight is not None:
            return head_log_probs(hidden, weight, targets)
        return chunked_log_probs(hidden, self.head, self.vocab_size, targets, extra)

    @torch.no_grad()
    def generate(self, prompts, *, eot, max_new_tokens, temperature=1.0, top_p=1.0, seed=0,
                 rows=None, room=None, numbers=None):
        """A response to each prompt: lists of tokens -> lists of tokens, eot included if sampled.

        `eot`: the token that ends a response, or a list of such tokens. `rows`: prompts per batch.
        `room`: most tokens of prompt and response together (default: the context).
        The random number of row i's token t is a function of (seed, i, t), so that other rows do
        not change a sample. `numbers`: the i of each prompt, if this is one process's share.
        """
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        if numbers is None:
            numbers = range(len(prompts))
        device = next(self.parameters()).device
        room = min(room or self.context, self.context)
        stops = [eot] if isinstance(eot, int) else eot
        choose = partial(sample, temperature=temperature, top_p=top_p)
        rows = rows or self.rows_at_once
        responses = []
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            check_prompts(prompts[part], room)
            noise = uniforms(seed, numbers[part], max_new_tokens, device)
            responses += self.write(prompts[part], noise, stops, room, choose)
        return responses

    def checkpoint_activations(self):
        """Keep only each block's input; backward computes the rest again: a third more work.

        `forward` is wrapped, not the module, so that hooks on the module (FSDP's) stay outside.
        """
        for block in self.blocks("checkpoint_activations"):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def check_prompts(prompts, room):
    """Each prompt needs a token to start from and room for one more."""
    for prompt in prompts:
        if not 1 <= len(prompt) < room:
            raise ValueError(f"a prompt must have 1 to {room - 1} tokens, got {len(prompt)}")


def uniforms(seed, numbers, n, device="cpu"):
    """n random numbers in [0, 1) for each row, a function of (seed, number).   (rows, n) float64"""
    seeds = np.atleast_1d(seed)
    noise = [np.random.default_rng([*seeds, number]).random(n) for number in numbers]
    return torch.from_numpy(np.stack(noise)).to(device)


def sample(logits, uniform, temperature=1.0, top_p=1.0):
    """One token per row, where the cumulative distribution passes `uniform`.   (B, V), (B,) -> (B,)

    temperature 0: the likeliest token. top_p: only the likeliest tokens, as few as have this
    probability together (Holtzman et al. 2019, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, -1)  # a float32 running sum ends short of 1
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        beyond[:, 0] = False  # and the likeliest token always stays
        p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(beyond, 0))
    cumulative = p.cumsum(-1)
    height = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, height, right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


# --- the transformer ------------------------------------------------

@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context: int = 1024
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    bias: bool = False


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).   (N, d) -> (N, d)"""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.n_head = layer, c.n_head
        d = c.d_model
        self.ln_1 = nn.LayerNorm(d, bias=c.bias)
        self.ln_2 = nn.LayerNorm(d, bias=c.bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(d, 3 * d, bias=c.bias),
                                   "c_proj": nn.Linear(d, d, bias=c.bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(d, 4 * d, bias=c.bias),
                                  "c_proj": nn.Linear(4 * d, d, bias=c.bias)})

    def forward(self, x, attention, keep=slice(None)):
        """keep: the tokens whose result is needed; the others only serve as keys and values."""
        q, k, v = self.before(x)
        attended = attention(self.layer, q, k, v)
        return self.after(x[keep], attended[keep])

    def before(self, x):
        """q, k, v, each (N, heads, d / heads)."""
        parts = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=1)
        return [part.unflatten(1, (self.n_head, -1)) for part in parts]

    def after(self, x, attended):
        x = x + self.attn.c_proj(attended.flatten(1))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(Policy):
    shares_prompts = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context = config.context
        self.vocab_size = config.vocab_size
        self.wte = nn.Embedding(config.vocab_size, config.d_model)  # also the output head
        self.wpe = nn.Embedding(config.context, config.d_model)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, bias=config.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer of these add up in x
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, ids, positions, attention, predict=slice(None)):
        """Hidden states at the `predict` positions, all by default.   (N,), (N,) -> (M, d)

        Only `attention(layer, q, k, v)` knows which tokens belong to one sequence. Of tokens that
        predict nothing, such as the prompt's, the last layer needs only keys and values.
        """
        x = self.wte(ids) + self.wpe(positions)
        *lower, last = self.h
        for block in lower:
            x = block(x, attention)
        return self.ln_f(last(x, attention, predict))

    def hidden(self, ids, positions, lengths, predict):
        """The hidden states at the `predict` positions, for the output head.   (M, d)"""
        pieces = pieces_of(lengths)

        def attention(layer, q, k, v):
            return attend(q, k, v, pieces)

        return self.trunk(ids, positions, attention, predict)

    def head(self, hidden):
        return F.linear(hidden, self.wte.weight)

    def head_weight(self):
        return self.wte.weight

    def blocks(self, flag):
        """The layers; each is one unit of recomputing (checkpointing) and of sharding (FSDP)."""
        return self.h

    def compile_layers(self):
        """Compile all but attention, which depends on lengths: it would compile in every batch."""
        from plumbing.kernels import compile_head, fuse
        compile_head()
        for block in self.h:
            block.before = fuse(block.before)
            block.after = fuse(block.after)

    def write(self, prompts, noise, stops, room, choose):
        """One batch of `generate`. A row that has ended leaves the batch."""
        lengths = [len(prompt) for prompt in prompts]
        new = noise.shape[1]
        cache = Cache(self.config, lengths, min(max(lengths) + new, room), self.wte.weight)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=noise.device)
        stops = torch.tensor(stops, device=noise.device)
        last = cache.used.cumsum(0) - 1
        hidden = self.trunk(ids, cache.column, cache.fill, last)  # (rows, d)
        alive = torch.arange(len(prompts), device=noise.device)  # prompts still in the cache
        responses = [[] for _ in prompts]
        for t in range(new):
            token = choose(self.head(hidden), noise[alive, t])
            for row, chosen in zip(alive.tolist(), token.tolist()):
                responses[row].append(chosen)
            goes_on = ~torch.isin(token, stops) & (cache.used + 1 < room)
            if t + 1 == new or not goes_on.any():
                break
            if not goes_on.all():
                alive, token = alive[goes_on], token[goes_on]
                cache.keep(goes_on)
            hidden = self.trunk(token, cache.used, cache.append)
            cache.used = cache.used + 1
        return responses

    def save(self, folder, *, eot=None, weights=None):
        """GPT-2's Hugging Face format. weights: the whole state dict, if this module is a shard."""
        gpt2.save(self, folder, eot, weights or self.state_dict())

    @classmethod
    def from_pretrained(cls, folder, *, device="cpu", dtype=torch.float32):
        """Load what `save` wrote. For any other model use plumbing's `load_policy`."""
        return gpt2.load(cls, GPTConfig, folder, dtype).to(device)


class Cache:
    """Keys and values of all tokens so far: (layer, 2, row, head, column, d).

    Row i has `used[i]` of them.
    """

    def __init__(self, c, lengths, room, like):
        shape = (c.n_layer, 2, len(lengths), c.n_head, room, c.d_model // c.n_head)
        self.kv = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.pieces = pieces_of(lengths)
        self.used = torch.tensor(lengths, device=like.device)
        # Row and column of each prompt token; a token's column is its position.
        self.row = torch.arange(len(lengths), device=like.device).repeat_interleave(self.used)
        self.column = torch.cat([torch.arange(n, device=like.device) for n in lengths])

    def fill(self, layer, q, k, v):
        """The prompts, as a flat row: store keys and values, attend as in training."""
        self.kv[layer, 0][self.row, :, self.column] = k.to(self.kv.dtype)
        self.kv[layer, 1][self.row, :, self.column] = v.to(self.kv.dtype)
        return attend(q, k, v, self.pieces)

    def append(self, layer, q, k, v):
        """One new token per row; it attends to its row up to itself.   (rows, heads, d) x 3"""
        rows = torch.arange(len(q), device=q.device)
        self.kv[layer, 0][rows, :, self.used] = k.to(self.kv.dtype)
        self.kv[layer, 1][rows, :, self.used] = v.to(self.kv.dtype)
        longest = int(self.used.max()) + 1
        keys, values = self.kv[layer, :, :, :, :longest].to(q.dtype)
        seen = torch.arange(longest, device=q.device) <= self.used[:, None]
        seen = seen[:, None, None]  # (rows, 1, 1, longest)
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen)[:, :, 0]

    def keep(self, rows):
        self.kv = self.kv[:, :, rows]
        self.used = self.used[rows]


if __name__ == "__main__":  # a lesson: python model.py
    import data

    torch.manual_seed(0)
    policy = GPT(GPTConfig(vocab_size=257, context=32, n_layer=2, n_head=2, d_model=32))
    rows = [data.make_row([*b"Hot?"], [*answer, 256]) for answer in (b"Yes.", b"No!")]
    rows.append(data.make_row([*b"Why"], [*b"Dust", 256]))
    flat = data.flatten(rows, share=True)
    with torch.no_grad():
        trunk = policy.hidden(*flat[:3], slice(None))
        hidden = trunk[flat.predict]
        logits = policy.head(hidden)
        logps = log_probs(logits, flat.targets)
        apart = [data.flatten([row]) for row in rows]
        alone = torch.cat([one.sums(policy(*one[:5])) for one in apart])

    def spell(ids):
        return "".join("  $" if token == 256 else f"  {chr(token)}" for token in ids.tolist())

    print(f"""Three responses to two prompts, in one flat row ($ is end-of-text):
    ids      {spell(flat.ids)}
    positions{"".join(f"{p:3}" for p in flat.positions)}
    lengths    {flat.lengths}: "Hot?" is there once, with two responses
What is trained, and the place of the token just before it:
    targets  {spell(flat.targets)}
    predict  {"".join(f"{p:3}" for p in flat.predict)}

On the way to log-probs                      shape
    ids                                      {tuple(flat.ids.shape)}
    hidden states, attention in each row     {tuple(trunk.shape)}
    of them, those that predict              {tuple(hidden.shape)}
    the head's logits, one per token id      {tuple(logits.shape)}
    log-probs of the targets                 {tuple(logps.shape)}
    their sums, log pi(y|x)                  {tuple(flat.sums(logps).shape)}

                             "Yes."     "No!"    "Dust"
    in the flat row     {"".join(f"{x:10.4f}" for x in flat.sums(logps))}
    each row by itself  {"".join(f"{x:10.4f}" for x in alone)}
An untrained model knows nothing: about -log 257 = -5.55 per token.
The largest difference: {(flat.sums(logps) - alone).abs().max():.1e}""")

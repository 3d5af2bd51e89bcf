"""The loop: `torchrun [--nproc_per_node N] train.py --loss kto`, or `python train.py ...`, the same thing.

    reference = what the policy is compared with         log-probs computed once per row, then the model is let go
    for batch in batches:                                global batch: rows, and for each a mismatched partner
        shared = measured over the WHOLE batch first     z0's log-ratios, running means; no gradient
        for micro in split(batch):
            m = measured on these rows                   what the loss's signature names before its *, nothing else
            (loss(**m, **hyperparameters).sum() / len(batch)).backward()
        all-reduce, clip, step

A loss is a plain function (kto.py, dpo_variants.py); the loop knows none by name. It reads the signature: parameters before `*` are
measured, those after it are set on the command line. One step is the same for any number of processes and any micro-batch,
because everything that couples rows (z0, running means, the divisor) is taken over the global batch.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

# Before torch is loaded: waiting threads sleep instead of spinning. With two threads on a busy machine, matmuls took 1.5 (width 384)
# to 10 times (width 128) as long when they spun; on an idle one sleeping costs 1.3 times at width 128 and nothing at 384.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import dpo_variants
import evaluate
import kto
import model
import ppo
import world


def token_nll_loss(logps, mean_len):
    """-log pi(y|x) / (mean response length of the global batch): averaged over rows this is the mean per TOKEN.   (B,)

    The SFT stage. A mean of per-response means would weigh each token of a short response more and teach brevity.
    """
    return -logps / mean_len


LOSSES = {"sft": token_nll_loss, **kto.LOSSES, "offline_ppo": ppo.offline_ppo_loss, **{n: f for n, f in dpo_variants.LOSSES.items() if n != "sft"}}
ACTING = {"rm": ppo.reward_model_loss, "ppo": ppo.actor_critic_loss}               # what learns is a reward model; a policy that acts, and its critic
RECIPES = {   # no new curve: DPO's, with another mask, another reference or other data, and the flags that brings; and what is no policy's loss
    "ld_dpo": dict(loss="dpo", flags={"ld_alpha": 0.5}, paper="Liu et al. 2024, Length Desensitization in Direct Preference Optimization, arXiv 2409.06411",
                   idea="beyond the shorter response's length, the longer one's tokens count ld_alpha"),
    "tr_dpo": dict(loss="dpo", reference="moving", flags={"ref_mix": 0.6, "ref_every": 512},
                   paper="Gorbatovski et al. 2024, Learn Your Reference Model for Real Good Alignment, arXiv 2404.09656",
                   idea="every ref_every steps the reference becomes ref_mix * policy + (1 - ref_mix) * reference"),
    "sdpo_stepwise": dict(loss="dpo", stages="easy first", flags={"stages": 2}, paper="Kim et al. 2024, sDPO: Don't Use Your Data All at Once, arXiv 2403.19270",
                          idea="the pairs in chunks, easy ones first; each chunk against the policy that the one before left"),
    "sdpo_segment": dict(loss="dpo", turns="segment", source="sessions", paper="Kong et al. 2025, SDPO: Segment-Level DPO for Social Agents, arXiv 2501.01821",
                         idea="of two conversations only the agent's turns of one segment count, as many in both"),
    "spin": dict(loss="dpo", stages="self-play", source="an expert's replies", flags={"stages": 3},
                 paper="Chen et al. 2024, Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models, arXiv 2401.01335",
                 idea="the rejected response is the last stage's own, so that imitation goes on where SFT ends"),
    "dpo_reference_free": dict(loss="dpo", reference="none", paper="Rafailov et al. 2023, arXiv 2305.18290, with a uniform reference",
                               idea="the reference's log-probs are 0: nothing holds the policy where it started"),
    "rm": dict(loss="rm", paper="Ouyang et al. 2022, Training language models to follow instructions with human feedback, arXiv 2203.02155",
               idea="a reward for every response, under which the annotator's choices are likeliest; PPO's judge"),
    "ppo": dict(loss="ppo", flags={"reward": "", "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "ppo_epochs": 4, "minibatches": 4, "target_kl": 0.0},
                paper="Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347",
                idea="the policy writes, a reward judges, and a clipped step makes the better tokens likelier"),
}
REFERENCE = {"logratios", "kl_logratios", "chosen_logratios", "rejected_logratios", "ref_chosen_logps", "ref_rejected_logps",
             "reward_shift", "margin_mean", "batch_margin_mean", "chosen_kl", "rejected_kl", "advantages"}                            # names that need a reference
REFERENCE_STAYS = {"chosen_kl", "rejected_kl"}            # these cannot be cached
BATCH_COUPLED = ("aot", "aot_unpaired")                   # these sort their rows: the global batch must be one micro-batch on one rank
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}                   # the dtype of the weights


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    loss: str = flag("kto", "objective: " + ", ".join(LOSSES))
    model: str = flag("", "folder or hub name of a causal LM, or of an adapter to continue; without it the small GPT")
    data: tuple = flag((), "preference files (jsonl, json, parquet) or hub data sets; without it the embedded help desk")
    eval_data: tuple = flag((), "held-out files, same formats")
    tokenizer: str = flag("", "with --data and no --model: a folder with vocab.bpe and encoder.json, or gpt2 (default: bytes)")
    init: str = flag("", "folder the policy starts from (default: --model)")
    ref: str = flag("", "folder of the reference (default: --model)")
    out: str = flag("", "the run's folder (default: out/<loss>)")
    overwrite: bool = flag(False, "replace an existing run in --out")
    resume: bool = flag(False, "continue the run in --out")
    dry_run: bool = flag(False, "everything up to the first step: counts, self-check, time and memory; writes nothing")
    batch_size: int = flag(32, "rows per optimiser step, over all processes")
    micro_batch_size: int = flag(0, "rows per forward (default: as many as fit 8192 tokens)")
    steps: int = flag(0, "optimiser steps (default: --epochs)")
    epochs: float = flag(1.0, "passes over the data")
    lr: float = flag(5e-6, "peak learning rate")
    warmup: int = flag(10, "steps of linear warm-up; then a cosine to 10 %")
    weight_decay: float = flag(0.0, "on matrices only")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: never")
    seed: int = flag(0, "of data order, initial weights and sampling")
    lora: int = flag(0, "rank of low-rank adapters, which alone are trained (needs peft); 0: all weights are")
    save: str = flag("merged", "with --lora, model/ is the adapter merged into the weights, or the adapter alone: merged, adapter")
    checkpoint_activations: bool = flag(False, "recompute activations in backward: less memory, a quarter more time")
    compile: bool = flag(False, "kernels fused by torch.compile: minutes to start, for GPUs")
    fsdp: bool = flag(False, "share weights, gradients and optimiser out over the processes: for models larger than one GPU")
    trust_remote_code: bool = flag(False, "run Python code that comes with --model")
    dtype: str = flag("fp32", "fp32, bf16 (autocast; weights stay fp32, with --lora the frozen ones are bf16) or fp64")
    device: str = flag("", "cpu, cuda or mps (default: cuda where there is one)")
    max_len: int = flag(1024, "tokens per row, never above the model's context")
    max_prompt_len: int = flag(512, "tokens per prompt; longer ones lose their left end")
    threshold: float = flag(None, "scored rows: desirable if reward > threshold")
    columns: str = flag("", "column names, prompt=question,completion=answer")
    turns: str = flag("last", "of a conversation's assistant turns train the last or all of them")
    add_eot: bool = flag(True, "true or false: end-of-text after whole responses")
    lambda_ratio: float = flag(4 / 3, "what `auto` makes of lambda_d n_d / (lambda_u n_u), in [1, 1.5]")
    pretrain_steps: int = flag(500, "embedded world: steps of the base model's pretraining")
    sft_steps: int = flag(400, "small GPT: steps of supervised fine-tuning before alignment; with --data on the desirable responses")
    flip: float = flag(0.0, "embedded world: share of its annotator's labels that are flipped")
    judge: str = flag("", "of --data runs: a reward model's folder or file.py:function that compares policy and reference at the end")
    eval_every: int = flag(0, "steps between evaluations on the tuning prompts (0: only at the end)")
    save_every: int = flag(100, "steps between checkpoints")
    log_every: int = flag(1, "steps between progress updates")
    timeout: int = flag(1800, "seconds that a process waits for the others before it gives up")


# --- one step ---------------------------------------------------------------------------------------------------------

@dataclass
class Task:
    """One objective under one set of settings: what the loop needs to know, fixed for a whole stage."""
    cfg: Config
    group: Group
    loss: object
    hyper: dict
    z0: object = None                             # estimate, zero, on_policy or a number; None: the loss has none
    tokenizer: object = None
    own: dict = field(default_factory=dict)       # the recipe's flags
    reward: object = None                         # PPO's: (prompts, responses) -> numbers

    def __post_init__(self):
        self.wants = signature(self.loss)[0]
        self.needs_reference = bool(REFERENCE & set(self.wants))
        self.needs_partners = "entropy" in self.wants or ("kl_logratios" in self.wants and self.z0 == "estimate")


def train_step(policy, reference, optimizer, batch, units, task, running, *, update=True):
    """One optimiser step on one global batch. Returns its metrics, the same on every rank.

    update=False stops before the optimiser: the gradients are there to be looked at, the weights are untouched.
    """
    cfg, group, start = task.cfg, task.group, time.perf_counter()
    n = len(batch.rows)
    mine = list(range(group.rank, n, group.size))                                       # this rank's share of the global batch
    parts = micro_batches(mine, batch, units, cfg, policy.token_budget)
    ahead = both_logps(policy, batch, mine, units, cfg, group.device) if task.needs_partners and policy.shares_prompts and not sharded(policy) and len(parts) == 1 else None
    shared = measure_shared(policy, reference, batch, units, task, running, ahead and ahead[1])
    ref_logps = reference.matched(batch) if task.needs_reference else None
    table = torch.zeros(2 + len(units[0]), n, dtype=torch.float64)                      # loss, tokens, log pi of each response
    extra = full_vocabulary(task.wants, reference, cfg, group.device)
    for part in in_step(parts, policy, group):
        if not part:                                                                    # nothing left of its own: it adds 0
            (0 * logps_of(policy, [units[batch.rows[0]]], cfg, group.device)[0].sum()).backward()
            continue
        some = [units[batch.rows[i]] for i in part]
        logps, tokens = ahead[0] if ahead else logps_of(policy, some, cfg, group.device, extra)
        logps, extras = (logps, None) if extra is None else (logps[0], logps[1:])

        def to(x):                                                                      # cast first: Apple's GPUs have no float64
            return x.to(logps.dtype if x.is_floating_point() else x.dtype).to(logps.device)

        named = measure(logps, None if ref_logps is None else to(ref_logps[part]), some, extras)
        measured = {name: to(shared[name] if name in shared else named[name]()) for name in task.wants}
        losses = task.loss(**measured, **task.hyper)
        (losses.sum() / n).backward()                                                   # the global count, on every rank
        table[:, part] = torch.stack([losses, torch.full_like(losses, tokens / len(part)), *logps.T]).detach().cpu().double()
    table = group.sum(table)
    if not torch.isfinite(table[0]).all():
        bad = [units[batch.rows[i]][0].where or f"row {batch.rows[i]}" for i in (~torch.isfinite(table[0])).nonzero()[:, 0].tolist()]
        raise SystemExit(f"step {batch.step}: the loss is not finite on {', '.join(bad[:3])} ({first_not_finite(table, ref_logps, shared, policy)}); "
                         "a lower --lr, or look at these rows. The last checkpoint is as it was")
    grad_norm, lr = descend(policy, optimizer, task, batch.step, update)
    # ------------------------------------------------------------------------------------ everything below is diagnostics
    return {"step": batch.step, "epoch": round(batch.epoch, 4), "loss": float(table[0].mean()), "grad_norm": grad_norm, "lr": lr,
            "tokens_per_second": float(table[1].sum()) / max(time.perf_counter() - start, 1e-9)} | diagnostics(table[2:].T, ref_logps, batch, units, task, shared)


def descend(policy, optimizer, task, step, update=True):
    """From each rank's gradients to the optimiser's step: summed, clipped, taken.   -> (norm before the clip, learning rate)"""
    cfg, group, params = task.cfg, task.group, [p for p in policy.parameters() if p.requires_grad]
    if group.size > 1 and not sharded(policy):                                          # one flat all-reduce; no gradient counts as 0
        grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(grads)
        for p, g in zip(params, grads.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    norm, lr = whole(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])), learning_rate(step, cfg)
    if not math.isfinite(norm):
        backward = reversed(list(policy.named_parameters()))
        name = next((name for name, p in backward if p.grad is not None and not torch.isfinite(whole(p.grad)).all()), "their norm alone")
        raise SystemExit(f"step {step}: the gradient is not finite although the loss is (first in {name}); a lower --lr, or --dtype fp32. "
                         "The last checkpoint is as it was")
    torch.nn.utils.clip_grads_with_norm_(params, cfg.max_grad_norm or math.inf, norm)
    if update:
        for g in optimizer.param_groups:
            g["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(norm), lr


def ppo_step(both, reference, optimizer, batch, units, task, running, *, update=True):
    """PPO's step on one global batch of prompts: responses, sampled and judged, then a few optimiser steps on them. Returns its metrics."""
    cfg, group, own, seed, start = task.cfg, task.group, task.own, [task.cfg.seed, batch.step], time.perf_counter()
    prompts = [units[i][0].ids[:units[i][0].n_prompt].tolist() for i in batch.rows]
    with precision(cfg, group.device):
        seen = ppo.rollouts(both.policy, both.critic, reference.live, prompts, task.reward, task.tokenizer, max_len=cfg.max_len, seed=seed,
                            kl_coef=own["kl_coef"], gamma=own["gamma"], lam=own["lam"], rank=group.rank, size=group.size, combine=group.sum)
    total, norms = torch.zeros(4, dtype=torch.float64), []
    for some in ppo.updates(len(prompts), epochs=own["ppo_epochs"], minibatches=own["minibatches"], seed=seed):
        n_tokens, sums, mine = float(seen.mask[some].sum()), torch.zeros(4, dtype=torch.float64), some[group.rank::group.size]
        for part in slices(mine, seen.rows, cfg, both.token_budget):
            with precision(cfg, group.device):
                m = ppo.measure(both, seen, part, group.device)
                loss = task.loss(**m, **task.hyper) * (m["mask"].sum() / n_tokens)                   # its means are over the minibatch's tokens
            loss.backward()
            sums += torch.tensor([float(loss.detach()) * n_tokens, *ppo.update_stats(m, clip=task.hyper["clip"])])
        sums = group.sum(sums)
        if not math.isfinite(sums[0]):
            raise SystemExit(f"step {batch.step}: PPO's loss is not finite; a lower --lr, or a look at the rewards. The last checkpoint is as it was")
        norm, lr = descend(both, optimizer, task, batch.step, update)
        total, norms = total + sums, [*norms, norm]
        if not update or own["target_kl"] and sums[3] / sums[1] > own["target_kl"]:                  # the samples are too old now
            break
    # ------------------------------------------------------------------------------------ everything below is diagnostics
    apart = (seen.old_token_logps - seen.ref_token_logps)[seen.mask].abs().max()
    return {"step": batch.step, "epoch": round(batch.epoch, 4), "loss": float(total[0] / total[1]), "grad_norm": norms[0], "lr": lr, **seen.stats,
            "clip_fraction": float(total[2] / total[1]), "kl/old": float(total[3] / total[1]), "logratios/max": float(apart), "updates": len(norms),
            "tokens_per_second": float(seen.mask.sum()) / max(time.perf_counter() - start, 1e-9)}


def first_not_finite(table, ref_logps, shared, policy):
    """Where it began, in the order in which a step computes: for the message."""
    tensors = {**{f"the weights, {name}": p for name, p in policy.named_parameters()}, **{f"shared {k}": v for k, v in shared.items()},
               "the reference's log-probs": ref_logps, "the policy's log-probs": table[2:]}
    return next((f"first in {name}" for name, x in tensors.items() if x is not None and not torch.isfinite(whole(x)).all()), "the log-probs are finite: it is the loss itself")


def micro_batches(mine, batch, units, cfg, budget):
    """This rank's examples in slices (aot: all at once, it sorts them)."""
    return [mine] if cfg.loss in BATCH_COUPLED else slices(mine, {i: units[batch.rows[i]] for i in mine}, cfg, budget)


def slices(mine, rows, cfg, budget):
    """The indices `mine`, --micro_batch_size at a time, or as many as fit the token budget."""
    if cfg.micro_batch_size:
        return [mine[i:i + cfg.micro_batch_size] for i in range(0, len(mine), cfg.micro_batch_size)]
    return [mine[part.start:part.stop] for part in data.token_batches([rows[i] for i in mine], budget)]


def learning_rate(step, cfg):
    """Linear warm-up, then a cosine from lr to lr / 10."""
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (step + 1) / cfg.warmup if step < cfg.warmup else cfg.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def make_optimizer(policy, cfg):
    """AdamW, fused; weight decay on matrices only."""
    params = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


# --- measuring: which numbers a loss gets, and what they are compared with --------------------------------------------

def logps_of(policy, units, cfg, device, extra=None):
    """(log pi of each response (b, S), tokens of all rows, shared prompts counted as often as they are used): the masked sums that every loss is made of.

    A unit is what one example of the loss consists of: (row,), or (chosen, rejected). S is its size. With `extra`, a function
    of the rows that measures more per position, the sums of those too: (1 + k, b, S).
    """
    rows = [row for unit in units for row in unit]
    flat = data.flatten(rows, device, policy.shares_prompts)
    with precision(cfg, device):
        values = policy(flat.ids, flat.positions, flat.lengths, flat.predict, flat.targets, extra and extra(rows))
    sums = flat.sums(values) if extra is None else torch.stack([flat.sums(v) for v in values])
    return sums.unflatten(-1, (len(units), -1)), sum(len(row.ids) for row in rows)


def both_logps(policy, batch, mine, units, cfg, device):
    """(what logps_of says of this rank's examples, log pi(y'|x) of their mismatched pairs without gradient): x is computed once for both.

    Only where these are all the rank's examples: of several micro-batches the first could not go backward before z0 is known from all.
    """
    rows, pairs = [units[batch.rows[i]][0] for i in mine], [u[0] for u in mismatched_units(units, batch, cfg)]
    flat, other = data.flatten(rows, device), data.flatten([pairs[i] for i in mine], device)
    with precision(cfg, device):
        logps, kl_logps = policy.forward_beside(flat, other, [r.n_prompt for r in rows])
    return (flat.sums(logps)[:, None], len(flat.ids)), other.sums(kl_logps)[:, None].cpu().double()


def precision(cfg, device):
    return torch.autocast(device.type, torch.bfloat16) if cfg.dtype == "bf16" else nullcontext()


@torch.no_grad()
def score(policy, units, cfg, device):
    """log pi of any number of units, without gradient.   -> (len(units), S) float64 on the CPU"""
    parts = [logps_of(policy, [units[i] for i in part], cfg, device)[0].cpu().double() for part in data.token_batches(units, policy.token_budget)]
    if sharded(policy):
        policy.reshard()                                                  # a forward without backward leaves the root's weights gathered, and old ones soon
    return torch.cat(parts) if parts else torch.zeros(0, 1, dtype=torch.float64)


def score_over_ranks(policy, units, cfg, group, known=None):
    """The same for one global batch, each rank scoring its share (`known`: it has, already); the whole table on every rank.   -> (B, S)"""
    table = torch.zeros(len(units), len(units[0]), dtype=torch.float64)
    mine = list(range(group.rank, len(units), group.size))
    parts = [mine[p.start:p.stop] for p in data.token_batches([units[i] for i in mine], policy.token_budget)] if known is None else []
    for part in in_step(parts, policy, group):
        table[part] = score(policy, [units[i] for i in part] or units[:1], cfg, group.device)[:len(part)]
    if known is not None:
        table[mine] = known
    return group.sum(table)


class Reference:
    """Log-probs of the frozen reference: of (x, y) once per data set, of (x, y') once per epoch, since partners are drawn anew.

    The model is loaded for these passes alone. They run over fixed slices of the epoch's order, dealt out to the ranks, so a
    number depends on data, seed and epoch, never on micro-batches or on where a run was resumed; slices that no step will
    reach are left out.

    Under --fsdp all of them run `ahead`, before the first step: by the policy's own weights as long as they are the reference's, so that
    no second model is needed, else by one that is gone before the optimiser has any state.
    """

    def __init__(self, units, cfg, group, policy=None):
        self.units, self.cfg, self.group, self.policy = units, cfg, group, policy
        self.prompts = [u[0].prompt_key for u in units]
        self.matched_table, self.mismatched_tables, self.loaded = None, {}, None

    def ahead(self, first, partners):
        """What the steps from `first` on will ask for."""
        self.loaded = frozen_reference(self.cfg, self.group, self.policy)
        self.matched(data.Batch(first, 0, [], []))
        for step in range(first, self.cfg.steps) if partners else ():
            self._mismatched_of(step // data.steps_per_epoch(len(self.units), self.cfg.batch_size))
        self.loaded = self.policy = None                              # from now on the policy moves
        gc.collect()                                                  # modules and their hooks refer to each other

    def _score(self, units, needed, what):
        policy = self.loaded or frozen_reference(self.cfg, self.group, self.policy)
        table = torch.zeros(len(units), len(units[0]), dtype=torch.float64)
        with self.group.bar(needed, what) as bar:
            parts = [part for part in data.token_batches(units, policy.token_budget) if part.start < needed]
            for k, part in enumerate(parts + [range(0)] * (-len(parts) % self.group.size if sharded(policy) else 0)):            # see in_step
                if k % self.group.size == self.group.rank:
                    table[part.start:part.stop] = score(policy, [units[i] for i in part] or units[:1], self.cfg, self.group.device)[:len(part)]
                bar.update(min(part.stop, needed) - part.start)
        return self.group.sum(table)

    @cached_property
    def live(self):
        """The model itself, for losses that compare whole next-token distributions (TDPO)."""
        return frozen_reference(self.cfg, self.group, self.policy)

    def matched(self, batch):
        """log pi_ref(y|x) of the batch's responses.   (B, S)"""
        if self.matched_table is None:
            order = data.epoch_order(len(self.units), self.cfg.seed, 0).tolist()
            needed = min(len(order), self.cfg.steps * self.cfg.batch_size)
            table = self._score([self.units[i] for i in order], needed, "reference log-probs")
            self.matched_table = torch.zeros_like(table)
            self.matched_table[order] = table
        return self.matched_table[batch.rows]

    def mismatched(self, batch):
        """log pi_ref(y'|x) of the batch's mismatched pairs.   (B,)"""
        epoch, k = divmod(batch.step, data.steps_per_epoch(len(self.units), size := self.cfg.batch_size))
        return self._mismatched_of(epoch)[k * size:k * size + len(batch.rows)]

    def _mismatched_of(self, epoch):
        if epoch not in self.mismatched_tables:
            n, size, seed = len(self.units), self.cfg.batch_size, self.cfg.seed
            per_epoch = data.steps_per_epoch(n, size)
            batches = [data.batch_at(self.prompts, size, seed=seed, step=epoch * per_epoch + s) for s in range(per_epoch)]
            pairs = [u for b in batches for u in mismatched_units(self.units, b, self.cfg)]
            needed = min(n, (self.cfg.steps - epoch * per_epoch) * size)
            self.mismatched_tables[epoch] = self._score(pairs, needed, "reference, mismatched")[:, 0]
        return self.mismatched_tables[epoch]


class MovingReference(Reference):
    """TR-DPO: every `every` steps the reference becomes mix * policy + (1 - mix) * reference (mix = 1: a hard copy).

    It moves, so nothing is cached: each batch is scored as it comes, each rank its share.
    """

    def __init__(self, units, cfg, group, mix, every):
        super().__init__(units, cfg, group)
        self.mix, self.every = mix, every

    def matched(self, batch):
        return score_over_ranks(self.live, [self.units[i] for i in batch.rows], self.cfg, self.group)

    def after_step(self, policy, step):
        if (step + 1) % self.every == 0:
            for mine, theirs in zip(self.live.parameters(), policy.parameters()):
                mine.data.lerp_(theirs.data, self.mix)


class NoReference:
    """log pi_ref = 0 for every response: what is left of a log-ratio is log pi."""

    def __init__(self, width):
        self.width = width

    def matched(self, batch):
        return torch.zeros(len(batch.rows), self.width, dtype=torch.float64)


def frozen_reference(cfg, group, policy=None):
    """The reference model. Where both started from one folder, `policy` stands in for it: with its adapter switched off, or, given only
    before the first step, sharded as it is."""
    if (cfg.lora or cfg.fsdp) and policy is not None and Path(cfg.init).resolve() == Path(cfg.ref).resolve():
        return policy if cfg.fsdp else policy.reference()
    return load(cfg.ref, cfg, group).requires_grad_(False)


def load(folder, cfg, group, **how):
    dtype = torch.bfloat16 if cfg.lora and cfg.dtype == "bf16" else DTYPES[cfg.dtype]                # peft keeps its own weights in fp32
    flag = next((name for name in ("model", "init", "ref") if str(getattr(cfg, name)) == str(folder)), "model")          # whose folder it is, for messages
    if cfg.fsdp:
        return load_sharded(folder, cfg, group, dtype=dtype, trust_remote_code=cfg.trust_remote_code, flag=flag)
    policy = model.load_policy(folder, device=group.device, dtype=dtype, trust_remote_code=cfg.trust_remote_code, flag=flag, **how)
    if cfg.compile:                                                                                  # the reference too: fused, bf16 rounds elsewhere
        policy.compile_layers()
    return policy


def mismatched_units(units, batch, cfg):
    return [(data.mismatched(units[i][0], units[j][0], cfg.max_len),) for i, j in zip(batch.rows, batch.partners)]


def on_policy_units(policy, rows, task, seed):
    """The policy's own response to each row's prompt, at temperature 1: the same ones on every rank."""
    prompts, group = [row.ids[:row.n_prompt].tolist() for row in rows], task.group
    with precision(task.cfg, group.device):
        responses = ppo.answers(policy, prompts, task.tokenizer, max_len=task.cfg.max_len, seed=seed, rank=group.rank, size=group.size, combine=group.sum)
    return [(data.make_row(p, r),) for p, r in zip(prompts, responses)]


def measure_shared(policy, reference, batch, units, task, running, kl_logps=None):
    """What must be known of the WHOLE global batch before the first backward, by name; no gradient, equal on every rank.

    kl_logps: this rank's part of log pi(y'|x), where that is known already.
    """
    cfg, group, wants, shared = task.cfg, task.group, set(task.wants), {}
    if "kl_logratios" in wants and task.z0 == "on_policy":                # E_{y ~ pi} log pi / pi_ref, one sample per prompt: unbiased
        own = on_policy_units(policy, [units[i][0] for i in batch.rows], task, seed=[cfg.seed, batch.step])
        shared["kl_logratios"] = (score_over_ranks(policy, own, cfg, group) - score_over_ranks(reference.live, own, cfg, group))[:, 0]
    elif "kl_logratios" in wants and task.z0 != "estimate":
        shared["kl_logratios"] = torch.tensor([] if task.z0 == "zero" else [task.z0], dtype=torch.float64)
    elif {"kl_logratios", "entropy"} & wants:
        kl_logps = score_over_ranks(policy, mismatched_units(units, batch, cfg), cfg, group, kl_logps)[:, 0]
        if "kl_logratios" in wants:
            shared["kl_logratios"] = kl_logps - reference.mismatched(batch)
        if "entropy" in wants:
            shared["entropy"] = -kl_logps.mean()
    if {"reward_shift", "margin_mean", "batch_margin_mean"} & wants:
        ratios = score_over_ranks(policy, [units[i] for i in batch.rows], cfg, group) - reference.matched(batch)
        if "reward_shift" in wants:                                       # BCO: mean over every sample seen so far
            running["reward_sum"] = running.get("reward_sum", 0.0) + task.hyper["beta"] * float(ratios.sum())
            running["reward_count"] = running.get("reward_count", 0.0) + ratios.numel()
            shared["reward_shift"] = torch.tensor(running["reward_sum"] / running["reward_count"], dtype=torch.float64)
        else:                                                             # beta-DPO: moving average from 0, updated before use
            margin = (ratios[:, 0] - ratios[:, 1]).mean()
            running["margin_mean"] = 0.9 * running.get("margin_mean", 0.0) + 0.1 * float(margin)
            shared |= {"batch_margin_mean": margin, "margin_mean": torch.tensor(running["margin_mean"], dtype=torch.float64)}
    if "mean_len" in wants:
        shared["mean_len"] = torch.tensor(float(np.mean([n_trained(units[i][0]) for i in batch.rows])), dtype=torch.float64)
    return shared


def measure(logps, ref_logps, units, extras=None):
    """What a loss may name of its own examples, as functions: only what it names is computed. logps, ref_logps (b, S).

    extras (2, b, S): sums over the response of KL(pi_ref || pi) per position, and of WPO's log-confidence.
    """
    def column(values, dtype=torch.float64):
        return torch.tensor(list(values), dtype=dtype)

    named = {"logps": lambda: logps[:, 0], "logratios": lambda: logps[:, 0] - ref_logps[:, 0],
             "desirable": lambda: column((u[0].desirable for u in units), torch.bool),
             "target_logps": lambda: logps[:, 2],
             "chosen_rewards": lambda: logps[:, 0], "rejected_rewards": lambda: logps[:, 1],          # of a reward model, whose rows count their last token
             "preferred": lambda: column((u[0].desirable for u in units), torch.bool),
             "score_gap": lambda: column(u[0].score - u[1].score for u in units)}
    for k, side in enumerate(("chosen", "rejected")):
        named |= {f"{side}_logps": lambda k=k: logps[:, k], f"ref_{side}_logps": lambda k=k: ref_logps[:, k],
                  f"{side}_logratios": lambda k=k: logps[:, k] - ref_logps[:, k],
                  f"{side}_len": lambda k=k: column(n_trained(u[k]) for u in units),
                  f"{side}_kl": lambda k=k: extras[0, :, k],
                  f"{side}_weight": lambda k=k: (extras[1, :, k] / column(n_trained(u[k]) for u in units).to(logps)).exp(),
                  f"{side}_win_prob": lambda k=k: column(u[k].win_prob for u in units)}
    return named


def full_vocabulary(wants, reference, cfg, device):
    """The `extra` of logps_of for losses that look at whole next-token distributions, or None.   -> rows -> (logits, y, slice) -> (2, m)

    Chunk by chunk: the reference's hidden states are kept, never its logits, so no two (M, V) tensors are ever alive.
    """
    kl, weight = ({f"chosen_{x}", f"rejected_{x}"} & set(wants) for x in ("kl", "weight"))
    if not kl and not weight:
        return None

    def of(rows):
        if kl:                                                # its own flat row: it may be a model that shares no prompts where the policy does
            flat = data.flatten(rows, device, reference.live.shares_prompts)
            with torch.no_grad(), precision(cfg, device):
                hidden = reference.live.hidden(flat.ids, flat.positions, flat.lengths, flat.predict)

        def extra(logits, targets, part):
            zeros = torch.zeros(len(targets), device=device)
            return torch.stack([model.position_kl(reference.live.head(hidden[part]), logits) if kl else zeros,
                                model.position_confidence(logits, targets) if weight else zeros])
        return extra

    return of


def n_trained(row):
    return int((row.mask > 0).sum())


# --- what the loop says of itself -------------------------------------------------------------------------------------

def diagnostics(logps, ref_logps, batch, units, task, shared):
    """Metrics over the global batch, named as TRL's dashboards name them. A class that is absent gives None, never NaN."""
    logps, ref_logps = logps[:, :2], None if ref_logps is None else ref_logps[:, :2]                  # SLiC's third response is neither
    if "chosen_rewards" in task.wants:                                                                # a reward model says rewards itself
        ref_logps = torch.zeros_like(logps)
    up = torch.tensor([[row.desirable for row in units[i][:2]] for i in batch.rows])                  # (B, S), as logps
    mean = lambda x, where: float(x[where].mean()) if where.any() else None                                    # noqa: E731
    out = {"logps/chosen": mean(logps, up), "logps/rejected": mean(logps, ~up)}
    if ref_logps is not None:
        ratios, beta, z0, kl = logps - ref_logps, task.hyper.get("beta") or 1.0, 0.0, shared.get("kl_logratios")
        if kl is not None:
            z0 = float(kto.reference_point(kl))
            out |= {"z0": z0, "z0_raw": float(kl.mean()) if len(kl) else 0.0}
        good, bad = mean(beta * ratios, up), mean(beta * ratios, ~up)
        right = (ratios[:, 0] > ratios[:, 1]) == up[:, 0] if ratios.shape[1] > 1 else torch.where(up, ratios > z0, ratios < z0)
        out |= {"rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": None if None in (good, bad) else good - bad,
                "rewards/accuracies": float(right.double().mean()),
                "logratios/max": float(max(ratios.abs().max(), kl.abs().max() if task.z0 in ("estimate", "on_policy") else 0))}
    return out


def check_first_step(m, predicted, cfg, apart):
    """The step-0 self-check: at equal weights every log-ratio is 0, the loss has a known value, and there is a gradient."""
    line = f"step 0: loss {m['loss']:.6f}" + (f" (predicted {predicted:.6f})" if predicted is not None and not apart else "")
    if "logratios/max" in m:
        line += f" | largest |log-ratio| {m['logratios/max']:.1e}"
    line += f" | gradient norm {m['grad_norm']:.3g}"
    tolerance = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.1}[cfg.dtype]
    if not math.isfinite(m["grad_norm"]) or m["grad_norm"] == 0:
        raise SystemExit(line + " | no usable gradient: are all weights frozen, or both lambdas 0?")
    if not apart and m.get("logratios/max", 0) > tolerance:
        raise SystemExit(line + f" | policy and reference have equal weights, yet a log-ratio exceeds {tolerance}. Known causes: dropout "
                         "is on; the reference was measured in another dtype; an adapter is missing from the reference")
    if not apart and predicted is not None and abs(m["loss"] - predicted) > tolerance:
        raise SystemExit(line + " | the loss is not the value it must have at equal weights")
    return line + (" | policy and reference start apart" if apart else " | ok")


def predicted_first_loss(batch, units, task):
    """The loss at pi = pi_ref, from the loss function itself at log-ratios of 0; None where it depends on the log-probs."""
    if {"logps", "chosen_logps", "rejected_logps", "chosen_weight", "advantages"} & set(task.wants):
        return None
    some = [units[i] for i in batch.rows]
    zeros = torch.zeros(len(some), len(some[0]), dtype=torch.float64)
    known = example_values(len(some))
    if isinstance(task.z0, float):
        known["kl_logratios"] = torch.tensor([task.z0], dtype=torch.float64)
    own = measure(zeros, zeros, some, torch.zeros(2, *zeros.shape, dtype=torch.float64))
    return float(task.loss(**{name: own[name]() if name in own else known[name] for name in task.wants}, **task.hyper).mean())


def example_values(n):
    """Every measured quantity as it is where policy and reference are equal, for n examples of one token with log-prob -1."""
    zero, one, yes = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
    sides = {f"{side}_{name}": v for side in ("chosen", "rejected") for name, v in (("logps", -one), ("logratios", zero), ("len", one), ("win_prob", one / 2),
                                                                                    ("kl", zero), ("weight", one))}
    return {"logps": -one, "logratios": zero, "desirable": yes, "kl_logratios": zero[:0], "entropy": one, "reward_shift": zero.sum(),
            "mean_len": one.mean(), "score_gap": one, "preferred": yes, "margin_mean": zero.sum(), "batch_margin_mean": zero.sum(),
            "ref_chosen_logps": -one, "ref_rejected_logps": -one, "target_logps": -one, "chosen_rewards": zero, "rejected_rewards": zero,
            **{name: zero for name in ("token_logps", "values", "old_token_logps", "old_values", "advantages", "returns")}, "mask": one, **sides}


# --- a run ------------------------------------------------------------------------------------------------------------

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def main(argv=None):
    try:
        with ExitStack() as held:
            return run(sys.argv[1:] if argv is None else argv, held)
    except SystemExit as e:
        if not isinstance(e.code, str):
            raise
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", e.code)           # names come from files and may hold anything
        line = line if len(line) < 2500 else f"{line[:2000]} ... {line[-400:]}"
        raise SystemExit(line if Group.first_to_say(line) else 1) from None           # one line in all, not one per process
    except (OSError, SafetensorError) as e:
        if isinstance(e, OSError) and e.errno not in NO_ROOM:
            raise
        raise SystemExit(f"{getattr(e, 'filename', None) or '--out'} cannot be written ({getattr(e, 'strerror', None) or e}); "
                         "what was there before is untouched: make room, then --resume") from None
    except RuntimeError as e:                                                   # a collective that nobody answers: whoever has failed says why
        if not dist.is_initialized() or not re.search("gloo|nccl", str(e), re.I):
            raise
        why = re.sub(r"^\[.*?\] ", "", str(e).splitlines()[0]).split(". ")[0]
        raise SystemExit(f"process {os.environ['RANK']}: another process of this run does not answer ({why}); the last checkpoint is as it was, --resume goes on") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted before the first step; nothing was written to --out") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(argv, held):
    cfg, hyper, origin = settings(argv)
    out = Path(cfg.out)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (out / "config.json").is_file():        # torchrun has started us again: go on
        cfg.resume, cfg.overwrite = True, False
    check_out(out, cfg)
    named = find_models(cfg)
    loss, z0, recipe, stages = find_loss(cfg.loss), hyper.get("z0"), RECIPES.get(cfg.loss, {}), hyper.get("stages", 1)
    paired = is_paired(signature(loss)[0]) and recipe.get("stages") != "self-play"         # self-play makes its own pairs
    source = (file_source if cfg.data else world_source)(cfg, paired, recipe)
    group = Group.join(cfg.device, cfg.timeout)
    judge = evaluate.load_judge(cfg.judge, device=group.device) if cfg.judge and group.rank == 0 else None
    units = examples_for(loss, recipe, source, cfg, hyper)
    per_stage = len(units) // stages if recipe.get("stages") == "easy first" else len(units)
    if per_stage < 1:
        raise SystemExit(f"--stages {stages}: there are only {len(units)} pairs")
    cfg.batch_size = min(cfg.batch_size, per_stage)
    cfg.steps = cfg.steps or max(1, math.ceil(cfg.epochs * data.steps_per_epoch(per_stage, cfg.batch_size)))      # of each stage
    n_d, n_u = (sum(row.desirable is side for u in units for row in u) for side in (True, False))
    balance = set_lambdas(hyper, n_d, n_u, cfg.lambda_ratio)
    own, hyper = hyper, {k: v[0] if isinstance(v, list) else v for k, v in hyper.items() if k in signature(loss)[1]}           # a list: one for each stage
    reward = ppo.load_reward(own["reward"], source.tokenizer, device=group.device) if "advantages" in signature(loss)[0] else None
    task = Task(cfg, group, loss, hyper, z0, source.tokenizer, own, reward)
    if task.needs_partners and len({u[0].prompt_key for u in units}) < 2:
        raise SystemExit(f"--data {' '.join(cfg.data)}: all rows have one prompt, as the model sees it (--max_prompt_len {cfg.max_prompt_len}); "
                         "z0 is estimated from mismatched pairs, which need two: give --z0 zero or more prompts")
    announce(source, task, {**own, **{k: getattr(cfg, k) for k in ("lr", "steps", "batch_size", "dtype", "seed")}}, origin, balance)

    # --- where it starts, and what it is compared with
    clock = time.perf_counter()
    if cfg.resume:                                                               # from what it started from, even if the code has changed since
        old = read_config(out)
        cfg.init, cfg.ref = cfg.init or old["init"], cfg.ref or old["ref"]
    base = cfg.model or (cfg.init if cfg.init and cfg.ref else base_model(cfg, group, source))
    cfg.init, cfg.ref = cfg.init or base, cfg.ref or base
    policy = start(cfg, group, source, named)
    group.say(introduce(policy, cfg, group)
              + (f" | reference: {cfg.ref}" if task.needs_reference and recipe.get("reference") != "none" else " | no reference needed")
              + (f" | {stages} stages of {cfg.steps} steps, each against the policy of the one before" if stages > 1 else ""))
    seconds = {"base": time.perf_counter() - clock}
    versions = {"torch": torch.__version__, "transformers": version("transformers"), "python": sys.version.split()[0], "numpy": np.__version__}
    record = {**asdict(cfg), **own, "model": named, "task": source.task, "source": recipe.get("source", ""), "origin": origin, "n_desirable": n_d,
              "n_undesirable": n_u, "processes": group.size, "versions": versions, "commit": git_commit()}
    record, done, running = json.loads(json.dumps(record)), 0, {}                # as it will be read back
    if cfg.resume:
        refuse_changes(out, record)
        done, running = load_checkpoint(out / "checkpoint", policy)              # steps done, over all stages
    if group.rank == 0 and not cfg.dry_run:
        check_disk(out, policy)
        held.enter_context(locked(out / "lock", wait=False))
        check_out(out, cfg)                                                      # again: another run may have come and gone since
        prepare_out(out, record, done, cfg)
    group.barrier()

    clock, cpu = time.perf_counter(), time.process_time()
    for stage in range(done // cfg.steps, stages):
        first = max(0, done - stage * cfg.steps)
        if stage and not (out / f"stage-{stage}").exists():
            save_model(actor(policy), out / f"stage-{stage}.tmp", group, eot=task.tokenizer.eot)  # what this stage is compared with: the last one's policy
            if group.rank == 0:
                os.replace(out / f"stage-{stage}.tmp", out / f"stage-{stage}")
        group.barrier()
        task = replace(task, cfg=replace(cfg, ref=str(out / f"stage-{stage}") if stage else cfg.ref),
                       hyper=hyper | {k: v[stage] for k, v in own.items() if isinstance(v, list)})
        some = stage_units(units, stage, stages, recipe, own, task, source.tokenizer, cfg.ref, policy)
        reference, optimizer = reference_for(some, recipe, own, task, None if stage or cfg.fsdp and done else actor(policy)), make_optimizer(policy, cfg)
        if first:
            load_checkpoint(out / "checkpoint", policy, optimizer, reference)
        prompts = [u[0].prompt_key for u in some]
        apart = stage == 0 and (recipe.get("reference") == "none" or Path(cfg.init).resolve() != Path(cfg.ref).resolve() or getattr(policy, "trained_before", False))
        if cfg.dry_run:
            return dry_run(policy, reference, optimizer, some, prompts, task, apart)
        if cfg.fsdp and type(reference) is Reference:
            reference.ahead(first, task.needs_partners)
        loop(policy, reference, optimizer, some, prompts, task, source, range(first, cfg.steps), running, apart, stage, stages)
    seconds |= {"align": time.perf_counter() - clock, "align_cpu": time.process_time() - cpu}
    if not torch.isfinite(score(actor(policy), units[:8], cfg, group.device)).all():               # a step is checked by the next one; after the last there is none
        raise SystemExit(f"step {stages * cfg.steps - 1}: after the last step the policy's log-probs are not finite; a lower --lr. "
                         f"There is no model/, {out}/checkpoint has what is left")
    beside = out / "model.tmp"
    save_model(actor(policy), beside, group, eot=source.tokenizer.eot, **({"adapter": True} if cfg.save == "adapter" else {}))
    if cfg.fsdp:                                                                 # what follows is one process's work, with whole models
        policy = reference = optimizer = None
        cfg.fsdp = False
        gc.collect()
    if group.rank == 0:
        source.tokenizer.save(beside)
        shutil.rmtree(out / "model", ignore_errors=True)
        os.replace(beside, out / "model")                                        # whole or absent
        try:
            judge_run(actor(policy or load(out / "model", cfg, group)), source, units, cfg, group, judge, record, seconds)
        except torch.OutOfMemoryError:
            if not record["fsdp"]:
                raise
            print(f"no evaluation: policy and reference do not fit one GPU together. {out}/model is complete; judge it where there is more memory", flush=True)
        found = json.loads((out / "eval.json").read_text()) if (out / "eval.json").is_file() else {}
        (out / "model" / "README.md").write_text(evaluate.model_card(record, found))
    group.until_first_is_done()


def judge_run(policy, source, units, cfg, group, judge, record, seconds):
    """What came out: eval.json, pictures, samples, the end of the story; and what a judge says who was asked."""
    if isinstance(policy, ppo.RewardModel):
        return evaluate.report_rewards({"train": ppo.accuracy(policy, units[:2000]), "eval": ppo.accuracy(policy, source.held_out())}, cfg, seconds)
    reference = frozen_reference(cfg, group, policy)
    source.report(policy, reference, seconds)
    if judge:
        rows = evaluate.compare(cfg.out, record, lambda: (policy, reference, source.tokenizer), seed=cfg.seed, device=group.device)
        print(evaluate.win_rate_lines(evaluate.judge_comparison(cfg.out, record, rows, judge, cfg.judge)))


def find_models(cfg):
    """Hub names become the folders of their files; -> --model as it was typed. SystemExit where there is no model."""
    named = cfg.model
    for name in filter(lambda name: getattr(cfg, name), ("model", "init", "ref")):
        setattr(cfg, name, str(folder := model.local_folder(getattr(cfg, name), name, trust_remote_code=cfg.trust_remote_code)))
        model.read_model_config(folder, name), model.weight_files(folder, name)
    return named


def start(cfg, group, source, named):
    """What is trained, from --init, once it fits the data and the flags. `named`: --model as it was typed, which an adapter calls its base."""
    policy = learner(cfg.loss, named if cfg.init == cfg.model and named else cfg.init, cfg, group)
    if cfg.checkpoint_activations:
        policy.checkpoint_activations()
    if cfg.save == "adapter" and actor(policy).sft_adapter:
        raise SystemExit(f"--save adapter: the new adapter would stand on {named} merged into its base, which no adapter folder can say; save it merged")
    if actor(policy).context < cfg.max_len:
        raise SystemExit(f"--max_len {cfg.max_len}: the model in {cfg.init} has a context of {actor(policy).context} tokens")
    if source.tokenizer.vocab_size > actor(policy).vocab_size:
        raise SystemExit(f"--model {cfg.init}: its tokenizer has {source.tokenizer.vocab_size} tokens, its embedding only {actor(policy).vocab_size}")
    use_threads(policy)
    return policy


def introduce(policy, cfg, group):
    return (f"policy: {cfg.init}, {sum(p.numel() for p in policy.parameters()):,} weights"
            + (f", {sum(p.numel() for _, p in trained(policy)):,} of them trained (rank {cfg.lora})" if cfg.lora else "")
            + (f" | sharded over {group.size} processes" if cfg.fsdp else "")
            + ("" if actor(policy).flat else " | rows are padded: this architecture does not keep flat ones apart")
            + ("" if getattr(actor(policy), "chunked", True) else " | logits are held whole: this head is not a plain product"))


def learner(loss, folder, cfg, group):
    """What is trained from the model in `folder`: a policy; a reward model; or a policy and its critic, as one module."""
    if loss == "rm":
        return ppo.RewardModel.load(folder, new=True, device=group.device, dtype=DTYPES[cfg.dtype], flag="model")
    policy = load(folder, cfg, group, lora=cfg.lora, seed=cfg.seed)
    return ppo.ActorCritic(policy, ppo.Critic.load(folder, new=True, device=group.device, dtype=DTYPES[cfg.dtype], flag="model")) if loss == "ppo" else policy


def actor(policy):
    return policy.policy if isinstance(policy, ppo.ActorCritic) else policy


def models_of(policy):
    """The language models in what is trained: one, or an actor and the trunk of its critic."""
    return [policy.policy, policy.critic.trunk] if isinstance(policy, ppo.ActorCritic) else [policy.trunk if isinstance(policy, ppo.RewardModel) else policy]


def reference_for(units, recipe, own, task, policy):
    """What this stage compares with, as the recipe says; None where the loss names no reference."""
    if recipe.get("reference") == "none":
        return NoReference(len(units[0]))
    if recipe.get("reference") == "moving":
        return MovingReference(units, task.cfg, task.group, own["ref_mix"], own["ref_every"])
    return Reference(units, task.cfg, task.group, policy) if task.needs_reference else None


def stage_units(units, stage, stages, recipe, own, task, tokenizer, first_ref, policy):
    """The examples of one stage. Easy first: chunks of the pairs, in the order in which the first reference prefers them, by log pi_ref(y_w|x)
    - log pi_ref(y_l|x). Self-play: a rejected response to every prompt, sampled from the opponent, which is the last stage's policy."""
    cfg, group, out = task.cfg, task.group, Path(task.cfg.out)
    if recipe.get("stages") == "easy first":
        logps = Reference(units, replace(cfg, ref=first_ref), group)._score(units, len(units), "ordering by difficulty")
        order = (logps[:, 1] - logps[:, 0]).argsort(stable=True).tolist()
        return [units[i] for i in order[stage * len(units) // stages:(stage + 1) * len(units) // stages]]
    if recipe.get("stages") == "self-play":
        return with_samples(units, out / f"stage-{stage}-samples.json", task, tokenizer, policy, desirable=False)
    if own.get("slic_target") == "sample":
        return with_samples(units, out / "targets.json", task, tokenizer, policy, desirable=True)
    return units


def with_samples(units, path, task, tokenizer, policy, desirable):
    """To each unit one response more, sampled from the reference at temperature 1, once, and kept with the run: SLiC's y_ref, SPIN's y'."""
    cfg, group = task.cfg, task.group
    if cfg.dry_run:                                                             # another row's response, for an estimate of the cost
        return [(*u, units[i - 1][0]) for i, u in enumerate(units)]
    prompts = [u[0].ids[:u[0].n_prompt].tolist() for u in units]
    if group.rank == 0 and not path.is_file():
        responses, reference = [], frozen_reference(cfg, group, policy)
        with group.bar(len(prompts), "sampling from the reference") as bar:
            for i in range(0, len(prompts), 512):
                responses += reference.generate(prompts[i:i + 512], eot=tokenizer.eot, max_new_tokens=cfg.max_len, room=cfg.max_len, seed=[cfg.seed, 7, i])
                bar.update(len(responses) - i)
        path.with_suffix(".tmp").write_text(json.dumps(responses))
        os.replace(path.with_suffix(".tmp"), path)
    group.barrier()
    return [(*u, data.make_row(p, r, desirable=desirable, where=u[0].where)) for u, p, r in zip(units, prompts, json.loads(path.read_text()))]


def examples_for(loss, recipe, source, cfg, hyper):
    """The units this loss learns from, checked for what its signature asks of the data, and with the recipe's mask."""
    wants, units = signature(loss)[0], source.units
    if "advantages" in wants:                                                   # it writes its own responses: each prompt once
        return list({u[0].prompt_key: u[:1] for u in units}.values())
    imitates = recipe.get("stages") == "self-play" or not is_paired(wants) and "desirable" not in wants
    if imitates:                                                                # it knows no labels: good rows only
        units = [u for u in units if u[0].desirable]
        if not units:
            raise SystemExit(f"--loss {cfg.loss}: learns from desirable rows only, and there are none ({data.counts_line(source.counts)})")
    for name, column in (("score_gap", "score"), ("chosen_win_prob", "win_prob")):
        if name in wants and (u := next((u for u in units if None in [getattr(row, column) for row in u[:2]]), None)):
            raise SystemExit(f"{u[0].where}: --loss {cfg.loss} needs the columns {column}_chosen, {column}_rejected")
    if "score_gap" in wants and (u := next((u for u in units if u[0].score <= u[1].score), None)):
        raise SystemExit(f"{u[0].where}: --loss {cfg.loss} needs score_chosen > score_rejected, got {u[0].score:g} and {u[1].score:g}")
    if "preferred" in wants:                                                    # data puts the preferred response first: toss a coin for each pair
        heads = np.random.default_rng([cfg.seed, len(units)]).random(len(units)) < 0.5
        units = [u if head else (u[1], u[0], *u[2:]) for u, head in zip(units, heads)]
    target = hyper.get("slic_target")
    if target == "data" and (u := next((u for u in units if len(u) < 3), None)):
        raise SystemExit(f"{u[0].where}: --slic_target data needs the column target")
    if target != "data":
        units = [(*u[:2], u[0]) if target == "chosen" else u[:2] for u in units]
    if "chosen_rewards" in wants:
        return [tuple(map(ppo.last_token, u)) for u in units]
    return [data.length_desensitised(u, hyper["ld_alpha"]) for u in units] if "ld_alpha" in hyper else units


def loop(policy, reference, optimizer, units, prompts, task, source, steps, running, apart, stage=0, stages=1):
    """The steps of one stage, with what they leave behind: metrics.jsonl, checkpoints, a progress bar. Ctrl-C saves and stops."""
    cfg, group, out, stop, bar = task.cfg, task.group, Path(task.cfg.out), [], None
    before, total = stage * cfg.steps, stages * cfg.steps
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)} if in_main_thread() else {}
    log = open(out / "metrics.jsonl" if group.rank == 0 else os.devnull, "a")
    try:
        for step in steps:
            batch = data.batch_at(prompts, cfg.batch_size, seed=cfg.seed, step=step)
            m = (ppo_step if "advantages" in task.wants else train_step)(policy, reference, optimizer, batch, units, task, running)
            if isinstance(reference, MovingReference):
                reference.after_step(policy, step)
            # -------------------------------------------------------------------------- everything below is diagnostics
            done = m["step"] = before + step
            done += 1
            if step == 0:
                group.say(check_first_step(m, predicted_first_loss(batch, units, task), cfg, apart))
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and group.rank == 0:
                m |= {f"eval/{k}": v for k, v in source.quick(actor(policy), frozen_reference(cfg, group, actor(policy))).items()}
            log.write(json.dumps(m) + "\n")
            log.flush()
            bar = bar or group.bar(total, f"{cfg.loss}, step", initial=before + step)
            bar.update()
            if (step + 1) % cfg.log_every == 0:
                bar.set_postfix_str(f"loss {m['loss']:.3f}" + (f" margin {m['rewards/margins']:.2f}" if m.get("rewards/margins") is not None else ""),
                                    refresh=False)
            stopped = bool(group.sum(torch.tensor(float(len(stop)))))                # all ranks stop after the same step
            if stopped or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                if sharded(policy):
                    save_shards(out / "checkpoint", policy, optimizer, done, running, group, reference)
                elif group.rank == 0:
                    save_checkpoint(out / "checkpoint", policy, optimizer, done, running, reference)
                group.barrier()
            if stopped and done < total:
                raise SystemExit(f"stopped after step {done} of {total}; {out}/checkpoint has it, the same command with --resume goes on")
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        log.close()
        if bar:
            bar.close()


def in_main_thread():
    return threading.current_thread() is threading.main_thread()


def announce(source, task, values, origin, balance):
    """What is about to happen, on what, with which settings and where each of them came from."""
    say, by_origin = task.group.say, {}
    equation = (inspect.getdoc(task.loss) or task.loss.__name__).splitlines()[0].removesuffix("(B,)").strip()
    say(f"nanoKTO | --loss {task.cfg.loss}: {equation}")
    say(source.story)
    say(f"data: {source.format} | {data.counts_line(source.counts)}")
    for line in filter(None, (source.hint, balance)):
        say(line)
    for name, value in values.items():
        by_origin.setdefault(origin[name], []).append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    say("settings: " + " | ".join(f"{', '.join(v)} ({k})" for k, v in by_origin.items()))
    say(f"machine: {task.group.device}, {task.group.size} process{'es' if task.group.size > 1 else ''}")


def set_lambdas(hyper, n_d, n_u, ratio):
    """`auto` becomes numbers; returns the line that says which, from what counts, and the ratio they reach."""
    if "auto" not in (hyper.get("lambda_d"), hyper.get("lambda_u")):
        return None
    d, u = data.lambda_weights(n_d, n_u, ratio=ratio)
    if hyper["lambda_d"] != "auto":                                              # one is given: scale the other to it
        d, u = hyper["lambda_d"], hyper["lambda_d"] * u / d
    elif hyper["lambda_u"] != "auto":
        d, u = hyper["lambda_u"] * d / u, hyper["lambda_u"]
    hyper |= {"lambda_d": d, "lambda_u": u}
    reached = f"{d * n_d / (u * n_u):.4g}" if n_u and u else "undefined, one class only"
    return f"lambdas: {n_d:,} desirable, {n_u:,} undesirable -> lambda_d {d:.4g}, lambda_u {u:.4g}; lambda_d n_d / (lambda_u n_u) = {reached}"


def dry_run(policy, reference, optimizer, units, prompts, task, apart):
    """The first step without the update, then what the whole run would cost."""
    cfg, group, steps = task.cfg, task.group, task.cfg.steps
    cfg.steps = 1                                                                    # only the reference's first slices
    batch = data.batch_at(prompts, cfg.batch_size, seed=cfg.seed, step=0)
    step = ppo_step if "advantages" in task.wants else train_step
    m = step(policy, reference, optimizer, batch, units, task, {}, update=False)
    group.say(check_first_step(m, predicted_first_loss(batch, units, task), cfg, apart))
    clock = time.perf_counter()
    step(policy, reference, optimizer, batch, units, task, {}, update=False)            # again, now that everything is warm
    per_step, clock = time.perf_counter() - clock, time.perf_counter()
    score(actor(policy), [units[i] for i in batch.rows], cfg, group.device)
    per_row = (time.perf_counter() - clock) / len(batch.rows) / group.size
    passes = 0 if reference is None or "advantages" in task.wants else min(len(units), steps * cfg.batch_size) + steps * cfg.batch_size * task.needs_partners
    held = Counter()
    for k, part in enumerate(models_of(policy)):                                     # the reference's model: where every step needs it
        held.update(model.memory_estimate(part, tokens=policy.token_budget, checkpointed=cfg.checkpoint_activations, activation_bytes=2 if cfg.dtype == "bf16" else 4,
                                          reference=k == 0 and "live" in getattr(reference, "__dict__", {})))
    held = dict(held)
    if cfg.fsdp:
        held |= {what: held[what] / group.size for what in ("weights", "gradients", "optimizer", "reference")}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    peak = torch.cuda.max_memory_allocated() if group.device.type == "cuda" else rss
    group.say(f"estimate: {steps} steps x {per_step:.3f} s + {passes:,} reference rows x {1e3 * per_row:.2f} ms = about "
              f"{(steps * per_step + passes * per_row) / 60:.1f} minutes, base model and evaluation apart\nmemory: "
              + ", ".join(f"{what} {n / 2**20:,.0f}" for what, n in held.items()) + f" MB per process, {sum(held.values()) / 2**30:.2f} GiB in all; "
              f"measured so far {peak / 2**30:.2f}\nnothing was written to {cfg.out}")


# --- where rows come from: the embedded world, or the user's files ----------------------------------------------------

@dataclass
class Source:
    """Where rows come from, how a base model for them is made, and how a result is judged."""
    task: str                                     # "world" or "files"
    tokenizer: object
    units: list                                   # (row,) each, or (chosen, rejected)
    counts: object
    format: str
    story: str
    hint: object                                  # a line of advice, or None
    shape: object                                 # GPTConfig of the base model
    stages: object                                # () -> [(what, rows, settings)] that train the base model
    held_out: object                              # () -> units that nothing was trained on
    quick: object                                 # (policy, reference) -> a few numbers, every --eval_every steps
    report: object                                # (policy, reference, seconds): eval.json, pictures, the end of the story


def world_source(cfg, paired, recipe):
    """The embedded help desk: a base model, pairs or thumbs from its annotator, a judge that knows the true utility."""
    tokenizer, expert, sessions = data.Tokenizer(world.tokenizer()), recipe.get("stages") == "self-play", recipe.get("source") == "sessions"
    shape = model.GPTConfig(vocab_size=tokenizer.vocab_size, **world.MODEL | ({"context": world.SESSION["context"]} if sessions else {}))
    cfg.max_len = min(cfg.max_len, shape.context)
    cfg.max_prompt_len = min(cfg.max_prompt_len, cfg.max_len * 3 // 4)

    def encode(examples, **how):
        return data.encode(examples, tokenizer, max_len=cfg.max_len, max_prompt_len=cfg.max_prompt_len, **how)

    def talk(messages):
        return tuple(data.Turn(**m) for m in messages)

    pairs = world.pairs(world.N_PAIRS, cfg.seed, flip=cfg.flip)
    if sessions:                                                                # two exchanges, one of them gone wrong
        units, counts = encode((data.parse(s, f"world: session {i}")[1][0] for i, s in enumerate(world.sessions(world.N_PAIRS, cfg.seed))), turns="segment")
    elif expert:                                                                 # SPIN imitates: replies of a good help desk
        rows, counts = encode(data.Feedback(p, r, True) for p, r in world.dialogues(world.N_EXPERT, cfg.seed + 2, "expert"))
        units = [(r,) for r in rows]
    elif paired:
        units, counts = encode(data.Pair(**p, where=f"world: pair {i}") for i, p in enumerate(pairs))
    else:
        rows, counts = encode(data.Feedback(t["prompt"], t["completion"], t["label"]) for t in world.thumbs(pairs, cfg.seed))
        units = [(r,) for r in rows]

    def stages():
        for mix, steps in (("pretrain", cfg.pretrain_steps), ("sft", cfg.sft_steps)):
            how = {**world.BASE[mix], "steps": steps} | ({"batch_size": world.SESSION["batch_size"]} if sessions else {})
            n = max(1, steps) * how["batch_size"]
            texts = ((talk(m[:1]), talk(m[1:])) for m in world.session_dialogues(n, cfg.seed + 1, mix)) if sessions else world.dialogues(n, cfg.seed + 1, mix)
            yield mix, encode((data.Feedback(*t, True) for t in texts), train_prompt=mix == "pretrain", turns="all")[0], how

    def judge(policy, reference, **how):
        return evaluate.evaluate_world(policy, reference, tokenizer, seed=cfg.seed, sessions=sessions, **how)

    feedback = ("rewards for its own replies" if cfg.loss == "ppo" else f"{counts['pairs']:,} pairs of sessions" if sessions
                else f"{counts['read']:,} replies of an expert" if expert else f"{counts['pairs']:,} pairs" if paired
                else f"{counts['desirable']:,} thumbs up and {counts['undesirable']:,} thumbs down")
    story = ("task: a help desk learns what its customers like. The true utility of every reply is known, so the result can be checked.\n"
             "      A base model is pretrained and fine-tuned on replies good and bad: the reference. Then alignment starts from it, with\n"
             f"      {feedback}. All in all about {'three minutes' if cfg.loss == 'ppo' else 'a minute'} on 2 cores.")
    return Source("world", tokenizer, units, counts, "embedded world", story, None, shape,
                  lambda: list(stages()), lambda: encode(data.Pair(**p) for p in world.pairs(2000, cfg.seed + 3, part="report"))[0],
                  lambda policy, reference: {k: v for k, v in judge(policy, reference, part="tune", n=192).items()
                                             if k in ("win_rate", "reward", "kl", "malformed")},
                  lambda policy, reference, seconds: evaluate.report_world(judge, policy, reference, tokenizer, cfg, seconds, sessions))


def file_source(cfg, paired, recipe):
    """The user's own preference files, for a Hugging Face model or for the small GPT."""
    for folder in filter(None, (cfg.model, cfg.init, cfg.ref)):
        shape = model.read_model_config(folder)
        shape = shape.get("text_config", shape)
        cfg.max_len = min(cfg.max_len, shape.get("max_position_embeddings") or shape.get("n_positions") or cfg.max_len)
    base = model.adapter_base(cfg.model) if cfg.model and not (Path(cfg.model) / "tokenizer_config.json").is_file() else None       # of a bare adapter
    tokenizer = data.load_tokenizer(base or cfg.model or cfg.tokenizer or None, trust_remote_code=cfg.trust_remote_code)

    def read(files):
        acts = cfg.loss == "ppo"                                                                      # it takes the prompts alone, whatever else is there
        examples, name = data.read(files, columns=data.parse_columns(cfg.columns), threshold=0.0 if acts and cfg.threshold is None else cfg.threshold,
                                   scored="pairs" if paired else "labels", prompts=acts)
        if paired and not isinstance(examples[0], data.Pair):
            raise SystemExit(f"--data {' '.join(files)}: --loss {cfg.loss} needs pairs (prompt, chosen, rejected); the file has {name}")
        examples = examples if paired else data.to_feedback(examples)
        found, counts = data.encode(examples, tokenizer, max_len=cfg.max_len, max_prompt_len=cfg.max_prompt_len, add_eot=cfg.add_eot,
                                    turns=recipe.get("turns", cfg.turns))
        if not found:
            raise SystemExit(f"--data {' '.join(files)}: no rows left ({data.counts_line(counts)})")
        return examples, found if paired else [(r,) for r in found], counts, name

    examples, units, counts, name = read(cfg.data)
    held_out, held_out_units = read(cfg.eval_data)[:2] if cfg.eval_data else ([], [])

    def margins(policy, reference, some):
        device, rows = next(policy.parameters()).device, [(row,) for u in some for row in u if row.desirable is not None]
        return evaluate.margins(*(score(p, rows, cfg, device)[:, 0] for p in (policy, reference)), [row.desirable for row, in rows]) if rows else {}

    def stages():
        rows = [row for u in units for row in u if row.desirable is not None]
        if not rows:
            raise SystemExit(f"--data {' '.join(cfg.data)}: prompts without responses, from which no small GPT can be trained; give --model, or --init and --ref")
        good = [row for row in rows if row.desirable] or rows
        return [("sft", good, dict(steps=cfg.sft_steps, batch_size=cfg.batch_size, lr=1e-3, warmup=20, weight_decay=0.1))]

    def report(policy, reference, seconds):
        result = {"train": margins(policy, reference, units[:256])} | ({"eval": margins(policy, reference, held_out_units)} if held_out else {})
        prompts = list(dict.fromkeys(e.prompt for e in held_out or examples))[:6]
        evaluate.report_files(result, policy, reference, tokenizer, prompts, cfg, seconds)

    return Source("files", tokenizer, units, counts, name, f"task: {' '.join(cfg.data)}",
                  data.cut_hint(data.to_feedback(examples), cfg.add_eot),
                  model.GPTConfig(vocab_size=tokenizer.vocab_size, context=cfg.max_len, n_layer=4, n_head=4, d_model=128), stages, lambda: held_out_units,
                  lambda policy, reference: margins(policy, reference, (held_out_units or units)[:512]), report)


# --- the small GPT's base model: pretraining and SFT, made once -------------------------------------------------------

def base_model(cfg, group, source):
    """The folder of a small GPT trained through `source.stages()`; made once, then reused.

    Its name is a hash of all it depends on: code, seed, settings, rows. Rank 0 makes it, alone and with a fixed number of
    threads, in a folder beside that is renamed when done. A dry run trains nothing: random weights in a temporary folder.
    """
    stages, tokenizer = source.stages(), source.tokenizer
    key = hashlib.sha256(json.dumps([asdict(source.shape), cfg.seed, torch.__version__, [(what, s) for what, _, s in stages]], sort_keys=True).encode())
    for module in (data, model, world, sys.modules[__name__]):
        key.update(Path(module.__file__).read_bytes())
    for _, rows, _ in stages:
        key.update(b"".join(r.ids.tobytes() + r.mask.tobytes() for r in rows))
    folder = Path(cfg.out).parent / f"base-{key.hexdigest()[:12]}"
    torch.manual_seed(cfg.seed)
    if cfg.dry_run and not folder.exists():
        group.say("base model: not made yet; random weights stand in for it here")
        stand_in = tempfile.mkdtemp(prefix="nanokto-dry-run-")
        atexit.register(shutil.rmtree, stand_in, ignore_errors=True)
        model.GPT(source.shape).save(stand_in)
        return stand_in
    if group.rank == 0:
        with locked(folder.with_suffix(".lock")):
            if folder.exists():
                group.say(f"base model: {folder} (made before; nothing it depends on has changed)")
            else:
                policy = model.GPT(source.shape).to(group.device)
                threads = use_threads(policy, alone=True)
                for what, rows, s in stages:
                    stage = Config(**{**asdict(cfg), "micro_batch_size": 0, "dtype": "fp32", "max_grad_norm": 1.0, "fsdp": False, **s})
                    fit(policy, rows, stage, Group(device=group.device), f"{what}, step")
                beside = folder.with_suffix(".tmp")
                shutil.rmtree(beside, ignore_errors=True)
                policy.save(beside, eot=tokenizer.eot)
                tokenizer.save(beside)
                beside.rename(folder)
                torch.set_num_threads(threads)
    group.barrier()
    return str(folder)


def fit(policy, rows, cfg, group, what):
    """A supervised stage, on one process: the same step as alignment, with the token-mean loss and no reference."""
    task = Task(cfg, group, token_nll_loss, {})
    optimizer, prompts, running, loss = make_optimizer(policy, cfg), [r.prompt_key for r in rows], {}, math.nan
    units = [(r,) for r in rows]
    with group.bar(cfg.steps, what) as bar:
        for step in range(cfg.steps):
            m = train_step(policy, None, optimizer, data.batch_at(prompts, cfg.batch_size, seed=cfg.seed, step=step), units, task, running)
            loss = m["loss"] if step == 0 else 0.95 * loss + 0.05 * m["loss"]
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f} per token", refresh=False)
    return loss


@contextmanager
def locked(path, wait=True):
    """Holds a lock file; where another process holds it, waits or ends in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        f = open(path, "w")
    except OSError as e:
        raise SystemExit(f"--out {path.parent}: cannot be written to ({e.strerror})") from None
    with f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:                                                            # Windows: two runs at once are not guarded
            pass
        except BlockingIOError:
            raise SystemExit(f"--out {path.parent}: another run is writing there; wait for it or choose another --out") from None
        yield


# --- what a run leaves; checkpoints are one file, written beside and renamed, the last two are kept -------------------

def trained(policy):
    return [(name, p) for name, p in policy.named_parameters() if p.requires_grad]


def save_checkpoint(folder, policy, optimizer, step, running, reference=None):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"rng": torch.get_rng_state()}
    for name, p in trained(policy):
        tensors["policy." + name] = p.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    if isinstance(reference, MovingReference):
        tensors |= {"reference." + name: p for name, p in reference.live.named_parameters()}
    path = folder / f"step-{step:06d}.safetensors"
    beside = path.with_suffix(".tmp")
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, beside, metadata={"state": json.dumps({"step": step, "running": running})})
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
    except (OSError, SafetensorError) as e:
        beside.unlink(missing_ok=True)
        raise SystemExit(f"{path}: the checkpoint cannot be written ({e}); the ones before it are untouched, make room and --resume") from None
    os.replace(beside, path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(folder, policy, optimizer=None, reference=None):
    """(steps done, running means); policy, optimiser and a moving reference are filled in place. A damaged file gives way to the one before."""
    if sharded(policy):
        return load_shards(folder, policy, optimizer, reference)
    files = sorted(folder.glob("step-*.safetensors"), reverse=True)
    for path in files:
        try:
            with safe_open(path, "pt") as f:
                saved, state = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["state"])
            if type(state["step"]) is not int or state["step"] < 0 or not all(isinstance(x, float) for x in state["running"].values()):
                raise ValueError(f"its state is {str(state)[:80]}")
            torch.Generator().set_state(saved["rng"])
            break
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            print(f"--resume: {path} is damaged ({e}); going back to the one before it", file=sys.stderr, flush=True)
    else:
        if files:
            raise SystemExit(f"--resume: none of the checkpoints in {folder} can be read; --overwrite starts again")
        return 0, {}
    wrong = torch.empty(0, 0, 0, 0)
    for name, p in trained(policy):
        if any(saved.get(f"{key}.{name}", wrong if key == "policy" else p).shape != p.shape for key in ("policy", "exp_avg", "exp_avg_sq")):
            raise SystemExit(f"--resume: {path} has no tensor of shape {list(p.shape)} for {name}: it belongs to another model")
        p.data.copy_(saved["policy." + name])
        if optimizer is not None and "exp_avg." + name in saved:
            optimizer.state[p] = {k: saved[f"{k}.{name}"].to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}
    for name, p in reference.live.named_parameters() if isinstance(reference, MovingReference) else ():
        p.data.copy_(saved["reference." + name])
    torch.set_rng_state(saved["rng"])
    return state["step"], state["running"]


def read_config(out):
    try:
        old = json.loads((out / "config.json").read_text())
        return {"init": "", "ref": "", **old}
    except (ValueError, TypeError) as e:
        raise SystemExit(f"--resume: {out}/config.json is broken ({e}); what the run was started with is not known. --overwrite starts again") from None


def refuse_changes(out, record):
    old = read_config(out)
    fixed = set(record) - MAY_CHANGE - {"origin", "processes", "versions", "commit"}
    changed = [f"{k} was {old[k]}, is {record[k]}" for k in sorted(fixed) if k in old and k in record and old[k] != record[k]]
    if changed:
        raise SystemExit(f"--resume: settings changed since {out} was started: {'; '.join(changed)}")


RUN_FILES = ("config.json", "metrics.jsonl", "curves.png", "frontier.png", "samples.md", "eval.json", "checkpoint", "model", "targets.json", "comparison.jsonl",
             "pairs_key.json")


def check_out(out, cfg):
    """An existing run is never overwritten unasked, and nothing that is not a run's is ever deleted."""
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out}: is a file; expected a folder")
    is_run = (out / "config.json").is_file()
    if cfg.resume and not is_run:
        raise SystemExit(f"--resume: {out} holds no run (no config.json); start it without --resume")
    if out.is_dir() and not cfg.resume and not cfg.dry_run:
        begun = {"lock", "metrics.jsonl", "metrics.jsonl.tmp", "config.json.tmp"} if (out / "lock").exists() else {"lock"}     # a run was killed as it began, or begins just now
        if not is_run and any(p.name not in begun for p in out.iterdir()):
            raise SystemExit(f"--out {out}: holds files that are not a run's; choose an empty or new folder")
        if is_run and not cfg.overwrite:
            raise SystemExit(f"--out {out}: a run is there already; --resume continues it, --overwrite replaces it, or choose another --out")


def check_disk(out, policy):
    """Before training: may we write there, and is there room for the model and three checkpoints (two kept, one being written)?"""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise SystemExit(f"--out {out}: {parent} cannot be written to")
    needed, free = sum(p.numel() * p.element_size() * (10 if p.requires_grad else 4) for p in policy.parameters()), shutil.disk_usage(parent).free
    if needed > free:
        raise SystemExit(f"--out {out}: the model and its checkpoints need {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} free")


def prepare_out(out, record, start, cfg):
    if not cfg.resume:
        for path in [*(out / name for name in RUN_FILES), *out.glob("stage-*"), *out.glob("*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for half in [*out.glob("*.tmp"), *out.glob("checkpoint/*.tmp")]:                 # of a run that was killed
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    lines = (out / "metrics.jsonl").read_text(errors="replace").splitlines() if start and (out / "metrics.jsonl").is_file() else []
    kept = {step: line for line in lines if (step := step_of(line)) is not None and step < start}            # later steps are done again
    for name, text in (("metrics.jsonl", "".join(line + "\n" for line in kept.values())), ("config.json", json.dumps(record, indent=2) + "\n")):
        (out / f"{name}.tmp").write_text(text)
        os.replace(out / f"{name}.tmp", out / name)                                  # killed here or there, one of them is whole


def step_of(line):
    """The step of a line of metrics.jsonl; None of half a line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None


def git_commit():
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# --- several processes; everything else reads as if there were one ----------------------------------------------------

@dataclass
class Group:
    """The processes of this run. Only fixed-size sums cross between them."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    store = None                                                                    # where the processes leave notes for each other

    @classmethod
    def join(cls, device="", timeout=1800):
        """The process group torchrun has prepared; a single process where there is none. Nobody waits longer than `timeout` seconds."""
        rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        cuda = device.startswith("cuda") if device else torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local)
        if size > 1 and not dist.is_initialized():
            if size == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):                          # one machine: its processes talk over loopback, and nobody else can
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            Group.store = agree_on_a_name(next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))[0], rank, size)
            dist.init_process_group("nccl" if cuda else "gloo", store=Group.store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        elif size > 1:
            dist.barrier()                                                                   # as meeting does: all have looked at --out before one writes there
        return cls(rank, size, torch.device(f"cuda:{local}" if cuda else device or "cpu"))

    @classmethod
    def first_to_say(cls, line):
        """Whether no other process has said this before: a complaint of all is printed once, that of a single one is not lost."""
        if cls.store is None:                                                       # before they have met all see the same
            return int(os.environ.get("RANK", 0)) == 0
        try:
            return cls.store.add(line, 1) == 1
        except RuntimeError:                                                        # torchrun, who holds it, has gone
            return True

    def sum(self, tensor):
        """All-reduced in place: each rank fills in its part, the rest is 0."""
        if self.size > 1:
            shared = tensor.to(self.device)
            dist.all_reduce(shared)
            tensor.copy_(shared)
        return tensor

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def until_first_is_done(self):
        """Rank 0 works alone at the end, for as long as it takes; at a barrier the others would give up after --timeout."""
        if self.size > 1 and Group.store is not None:
            Group.store.set("done", "yes") if self.rank == 0 else Group.store.wait(["done"], timedelta(days=7))

    def most(self, n):
        """The largest of every process's n."""
        shared = torch.tensor(n, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    @contextmanager
    def in_turn(self):
        """On each machine one process after the other."""
        before, places = int(os.environ.get("LOCAL_RANK", 0)), self.most(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        for _ in range(before):
            self.barrier()
        try:
            yield
        finally:                                                                    # a complaint too waits until all have had their turn
            for _ in range(before, places):
                self.barrier()

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def bar(self, total, what, initial=0):
        return tqdm(total=total, initial=initial, desc=what, unit="step" if "step" in what else "row", disable=self.rank != 0,
                    mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True)


def agree_on_a_name(store, rank, size):
    """The store under a name that no earlier attempt has used. torchrun --max_restarts keeps one store for all attempts (torch 2.13), and
    gloo would call the dead by the addresses they left there: 1 restart in 8 went on, the others hung. Process 0 thinks of a name
    and tells each of the others, again and again until it has answered: what the dead have said may still lie in its place."""
    own = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", own)
        name = store.get(f"welcome/{own}").decode()
        store.set(f"{name}/{rank}", "here")
        return dist.PrefixStore(name, store)
    for other in range(1, size):
        while not store.check([f"{own}/{other}"]):
            store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            time.sleep(0.02)
    return dist.PrefixStore(own, store)


def use_threads(policy, alone=False):
    """Set torch's threads, explicitly (torchrun sets 1 for several processes only); returns the number before.

    The matmuls of a model below a million weights are too small to share: a second thread gained 1.3x on an idle machine and
    lost 5x to 10x on a busy one, where threads spin for each other. A fixed number for a base model made `alone`, since it may
    change the last bit of a sum.
    """
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    share = 2 if alone else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(1 if sum(p.numel() for p in policy.parameters()) < 1e6 else min(share, cores))
    return before


# --- models larger than one GPU: torch's fully_shard (FSDP2) ------------------------------------------------------------

def sharded(policy):
    return hasattr(policy, "unshard")                                               # which fully_shard adds


def whole(x):
    """A tensor of which each process holds a part, put together; every process must ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def in_step(parts, policy, group):
    """The parts, and of a sharded policy as many empty ones more as the busiest process has: all gather the weights for every forward together."""
    parts = list(parts)
    return parts + [[]] * (group.most(len(parts)) - len(parts) if sharded(policy) else 0)


def load_sharded(folder, cfg, group, **how):
    """The policy in `folder`, of which each process keeps its share of every layer, of embedding and head, and later of their gradients and Adam's means.

    No GPU ever holds the whole: a machine's processes load it into main memory one after the other, and layer by layer it moves to the
    GPU and is cut. Forward and backward gather a layer when it is needed and drop it again; gradients are summed to where their share is.
    bf16: shares stay fp32; a layer is gathered and computed in bf16, half of what fp32 would send, and gradients are summed in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh, threads = init_device_mesh(group.device.type, (group.size,)), torch.get_num_threads()
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cfg.dtype == "bf16" else MixedPrecisionPolicy()
    with group.in_turn():
        torch.set_num_threads(os.cpu_count() or 1)
        policy = model.load_policy(folder, device="cpu", **how)
        torch.set_num_threads(threads)
        if not policy.flat:
            raise SystemExit(f"--fsdp: {folder} needs padded rows, and how often these call the model depends on the data; processes must call it in step")
        for module in [*policy.blocks("fsdp"), policy]:                             # the rest, embedding and (tied) head, is the root's
            fully_shard(module, mesh=mesh, mp_policy=mixed)
            module.set_gradient_divide_factor(1.0)                                  # the loss is divided by the global batch already
            module.set_force_sum_reduction_for_comms(True)                          # a plain sum: gloo has no scaled one
    if group.device.type == "cuda":
        policy.token_budget = max(policy.token_budget, 2048)                        # it was chosen for a CPU
    return policy


def save_model(policy, folder, group, **how):
    """`policy.save` by rank 0, a sharded policy's weights being gathered first, tensor by tensor into rank 0's main memory."""
    weights = {}
    for name, p in policy.named_parameters() if sharded(policy) else ():
        full = whole(p.detach())
        if group.rank == 0:
            weights[name] = full.cpu()
    if group.rank == 0:
        policy.save(folder, **how, **({"weights": weights} if weights else {}))
    group.barrier()


def shards(policy, optimizer, reference):
    """Of all that a checkpoint holds, this process's part."""
    found = {"policy." + name: p.detach() for name, p in policy.named_parameters()}
    for name, p in policy.named_parameters() if optimizer else ():
        found |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items() if key != "step"}
    return found | ({"reference." + name: p for name, p in reference.live.named_parameters()} if isinstance(reference, MovingReference) else {})


def save_shards(folder, policy, optimizer, step, running, group, reference=None):
    """One folder of safetensors, each process writing its part, by torch's distributed checkpoints (whose other format is pickled)."""
    import torch.distributed.checkpoint as dcp
    path, tensors = folder / f"step-{step:06d}", shards(policy, optimizer, reference)
    beside = path.with_suffix(".tmp")
    if group.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    group.barrier()
    try:
        files = {name: 1 + i // 64 for i, name in enumerate(sorted(tensors))}        # a file is put together in main memory: 64 tensors at a time
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(beside), fqn_to_index_mapping=files, save_distributed=True))
        if group.rank == 0:
            steps = {name: int(optimizer.state[p]["step"]) for name, p in policy.named_parameters() if p in optimizer.state}
            with open(beside / "state.json", "w") as f:
                json.dump({"step": step, "running": running, "optimizer_steps": steps, "files": len(list(beside.glob("*.safetensors")))}, f)
                f.flush()
                os.fsync(f.fileno())
    except (OSError, dcp.CheckpointException) as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise SystemExit(f"{path}: the checkpoint cannot be written ({reason(e)}); the ones before it are untouched, make room and --resume") from None
    if group.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
        for old in sorted(p for p in folder.glob("step-*") if not p.suffix)[:-2]:
            shutil.rmtree(old)


def load_shards(folder, policy, optimizer=None, reference=None):
    """As `load_checkpoint`, by any number of processes: each reads what is its part now."""
    import torch.distributed.checkpoint as dcp
    paths, weights = sorted((p for p in folder.glob("step-*") if not p.suffix), reverse=True), dict(policy.named_parameters())
    for path in paths:
        try:
            state = json.loads((path / "state.json").read_text())
            if state["files"] != len(list(path.glob("*.safetensors"))):              # torch would leave out what is missing, and say nothing
                raise ValueError("files are missing")
            for name, n in state["optimizer_steps"].items() if optimizer else ():
                p = weights[name]
                optimizer.state[p] = {"step": torch.tensor(float(n), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            dcp.load(shards(policy, optimizer, reference), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
            return state["step"], state["running"]
        except (OSError, KeyError, TypeError, ValueError, dcp.CheckpointException) as e:
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"--resume: {path} is damaged, or another model's ({reason(e)}); going back to the one before it", file=sys.stderr, flush=True)
    if paths:
        raise SystemExit(f"--resume: none of the checkpoints in {folder} can be read; --overwrite starts again")
    return 0, {}


def reason(e):
    """One line of an exception, or of the first process's that had one."""
    first = next(iter(getattr(e, "failures", {}).values()), (e,))[0]
    return f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"


# --- the command line -------------------------------------------------------------------------------------------------

MAY_CHANGE = {"resume", "overwrite", "steps", "epochs", "micro_batch_size", "save_every", "eval_every", "log_every", "out", "device", "timeout", "judge", "save", "checkpoint_activations", "compile"}


class Parser(argparse.ArgumentParser):
    """argparse that ends in one line and keeps only the flags that were typed."""

    def __init__(self, **how):
        super().__init__(prog="train.py", usage="train.py --name value ...   (--loss NAME --help: that objective's equation and parameters)", add_help=False,
                         allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def error(self, message):
        raise SystemExit(message.removeprefix("argument "))


def settings(argv):
    """Command line -> (Config, hyper-parameters of the loss, origin of each value). SystemExit with one line on bad input.

    Precedence: command line, then world.SETTINGS[loss] (embedded world only), then the loss's signature, then Config.
    """
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), str(word)) for word in argv]          # --batch-size will do
    if nothing := next((word for word in argv if re.fullmatch(r"--\w*=--", word)), None):                                   # which argparse makes an empty list of
        raise SystemExit(f"{nothing[:-3]}: '--' is no value")
    first = Parser()
    first.add_argument("--loss", default="kto")
    loss_name = first.parse_known_args(argv)[0].loss
    loss, recipe = find_loss(loss_name), RECIPES.get(loss_name, {})
    wants, hyper = signature(loss)
    hyper |= ({"z0": "estimate"} if "kl_logratios" in wants else {}) | ({"slic_target": "sample"} if "target_logps" in wants else {}) | recipe.get("flags", {})
    known = {f.name: f for f in fields(Config)}
    defaults = {name: f.default for name, f in known.items()} | hyper

    parser = Parser(description=f"--loss {loss_name}\n\n{inspect.getdoc(loss)}")
    for name, default in defaults.items():
        about = known[name].metadata["help"] if name in known else f"of --loss {loss_name}"
        how = dict(action="store_true") if default is False else dict(metavar="", type=_typed(name, default, recipe), nargs="+" if default == () else None)
        parser.add_argument("--" + name, help=(about + ("" if default in ("", False, (), None) else f" [{default}]")).replace("%", "%%"), **how)
    if {"--help", "-h"} & set(argv):
        print(parser.format_help())
        raise SystemExit(0)
    typed, unknown = parser.parse_known_args(argv)
    typed = vars(typed)
    for word in unknown:
        name = word.partition("=")[0][2:]
        if not word.startswith("--"):
            raise SystemExit(f"{word!r}: expected --name value or --name=value")
        if any(name in signature(f)[1] or (name == "z0" and "kl_logratios" in signature(f)[0]) for f in LOSSES.values()):
            raise SystemExit(f"--{name}: {loss_name} has no such parameter; it has {', '.join(hyper) or 'none of its own'}")
        raise SystemExit(f"--{name}: unknown flag; valid are " + ", ".join("--" + n for n in defaults))

    embedded, like = not typed.get("model") and not typed.get("data"), recipe.get("loss", loss_name.split("+")[0].split("*")[-1].strip())    # a sum: its first term
    if embedded:
        preset, source = world.SETTINGS.get(like, {}) | world.SETTINGS.get(loss_name, {}), "embedded world"
    elif not typed.get("model"):
        preset, source = {"lr": 5e-4, "sft_steps": 200}, "small GPT"                     # from random weights, it learns fast
    else:
        preset, source = {"lr": 1e-6} if is_paired(wants) else {}, "pairs"
    preset = {k: v for k, v in preset.items() if k in known or hyper.get(k) is not None}    # in a sum, each term keeps its own
    values = {name: typed.get(name, preset.get(name, default)) for name, default in defaults.items()}
    origin = {name: "command line" if name in typed else source if name in preset else f"{loss_name}'s signature" if name in hyper else "default" for name in values}
    hyper = {name: values.pop(name) for name in hyper}
    cfg = Config(**values)
    cfg.out = cfg.out or "out/" + re.sub(r"[^\w.+*-]", "", loss_name).replace("*", "x")
    check_settings(cfg, hyper, typed)
    return cfg, hyper, origin


def _typed(name, default, recipe):
    """A function from a flag's text to a value of its default's type."""
    def number(text, kind=float if default is None else type(default)):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not math.isfinite(value) and (name, value) != ("clamp", math.inf):                                            # WPO: inf is no clamp
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        return value

    def typed(text):
        words = WORDS.get(name, ("true", "false") if default is True else ())
        if text in words:
            return text == "true" if default is True else text
        if isinstance(default, str) and not words or default == ():
            return text
        if words:
            if name in NUMBER_TOO and re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text):
                return number(text, float)
            raise argparse.ArgumentTypeError(f"{text!r}: valid are {', '.join(words)}{', or a number >= 0' if name in NUMBER_TOO else ''}")
        if name == "beta" and "stages" in recipe and "," in text:                            # one beta for each stage
            return [number(part) for part in text.split(",")]
        return number(text)
    return typed


WORDS = {"z0": ("estimate", "zero", "on_policy"), "lambda_d": ("auto",), "lambda_u": ("auto",), "slic_target": ("sample", "chosen", "data"),
         "dtype": tuple(DTYPES), "turns": ("last", "all"), "save": ("merged", "adapter")}
NUMBER_TOO = ("z0", "lambda_d", "lambda_u")


def check_settings(cfg, hyper, typed):
    """Ranges, and flags that need each other: (is it wrong, the line that says what is valid)."""
    at_least = dict(batch_size=1, micro_batch_size=0, steps="steps" in typed, warmup=0, weight_decay=0, max_grad_norm=0, seed=0, max_len=2, lora=0,
                    max_prompt_len=1, pretrain_steps=0, sft_steps=0, eval_every=0, save_every=1, log_every=1, timeout=1, stages=1, ref_every=1, lambda_d=0, lambda_u=0, z0=0)
    values, several = {**asdict(cfg), **hyper}, isinstance(hyper.get("beta"), list)
    wrong = [(isinstance(values.get(name), (int, float)) and values[name] < least, f"--{name} {values.get(name)}: must be at least {int(least)}")
             for name, least in at_least.items()]
    wrong += [(x is not None and x <= 0, f"--{name} {x}: must be positive") for name in ("lr", "epochs", "tau", "beta")
              for x in (values["beta"] if several and name == "beta" else [values.get(name)])]
    world_only = RECIPES.get(cfg.loss, {}).get("source")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    wrong += [
        (several and len(hyper["beta"]) != hyper.get("stages"), f"--beta: {hyper.get('beta')} for {hyper.get('stages')} stages; give one, or one for each"),
        (not 1 <= cfg.lambda_ratio <= 1.5, f"--lambda_ratio {cfg.lambda_ratio}: KTO's Eq. 9 asks for a ratio in [1, 1.5]"),
        (not 0 <= cfg.flip <= 1, f"--flip {cfg.flip}: a share, from 0 to 1"),
        ("flip" in typed and cfg.data, "--flip: belongs to the embedded world; --data brings its own labels"),
        ("flip" in typed and world_only, f"--flip: --loss {cfg.loss} learns from {world_only}, which no annotator has labelled"),
        (cfg.lora and not cfg.model, f"--lora {cfg.lora}: is for Hugging Face models; give --model"),
        (cfg.lora and hyper.get("ref_mix"), f"--lora {cfg.lora}: tr_dpo moves all weights of its reference, of which an adapter has no copy"),
        (cfg.fsdp and int(os.environ.get("WORLD_SIZE", 1)) == 1, "--fsdp: shares one model out over processes; start several: torchrun --nproc_per_node N train.py ..."),
        *((cfg.fsdp and clash, f"--fsdp: {why}") for clash, why in (
            (cfg.lora, f"not with --lora {cfg.lora}, whose weights without optimiser fit one GPU; leave one of them out"),
            (cfg.compile, "not with --compile, which has not been tried on sharded layers"),
            (cfg.eval_every, f"not with --eval_every {cfg.eval_every}: evaluation samples, and that from a whole model; it is done at the end"),
            (REFERENCE_STAYS & set(signature(find_loss(cfg.loss))[0]), f"not with --loss {cfg.loss}, which needs the reference's whole distributions at every step"),
            (hyper.get("z0") == "on_policy", "not with --z0 on_policy, which samples at every step from a whole model; estimate, zero or a number"),
            (hyper.get("slic_target") == "sample", "not with --slic_target sample, which samples from a whole model; chosen or data"),
            (world_only and "stages" in RECIPES[cfg.loss] and RECIPES[cfg.loss]["stages"] == "self-play", f"not with --loss {cfg.loss}, which samples from a whole model"))),
        (cfg.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))), "--compile: torch.compile needs a C++ compiler (g++ or clang++), and there is none"),
        (cfg.loss == "ppo" and not hyper.get("reward"), "--loss ppo: needs --reward: a folder that --loss rm wrote, or file.py:function(prompts, responses)"),
        (cfg.loss in ACTING and cfg.fsdp, f"--fsdp: not with --loss {cfg.loss}, which samples or scores with whole models"),
        (cfg.compile and cfg.loss in ACTING, f"--compile: not with --loss {cfg.loss}, whose heads would stay as they are"),
        (cfg.loss == "rm" and (cfg.lora or cfg.eval_every), f"--loss rm: without {'--lora' if cfg.lora else '--eval_every'}; all weights of a reward model are trained, and it writes nothing"),
        (cfg.save == "adapter" and not cfg.lora, "--save adapter: needs --lora RANK"),
        (cfg.judge and not (cfg.data and cfg.eval_data), "--judge: needs --eval_data FILE, whose prompts both models answer (the embedded world has its own judge)"),
        (cfg.model and not cfg.data, "--model: needs --data FILE, the preferences to align it with"),
        *((name in typed and not cfg.data, f"--{name}: needs --data FILE; the embedded world brings its own") for name in FILE_FLAGS),
        ("tokenizer" in typed and cfg.model, "--tokenizer: --model brings its own tokenizer; the flag is for the small GPT"),
        (not 0 < hyper.get("ref_mix", 1.0) <= 1, f"--ref_mix {hyper.get('ref_mix')}: a share, above 0 and up to 1"),
        (cfg.device not in ("", *devices), f"--device {cfg.device}: this machine has {', '.join(devices)}"),
        (cfg.overwrite and cfg.resume, "--overwrite and --resume: give one of them"),
        (cfg.loss in BATCH_COUPLED and (cfg.micro_batch_size or int(os.environ.get("WORLD_SIZE", 1)) > 1),
         f"--loss {cfg.loss}: sorts its batch, so it needs the global batch in one micro-batch on one process"),
        (hyper.get("z0") == "estimate" and cfg.batch_size == 1,
         "--batch_size 1: KTO's z0 is estimated from mismatched pairs, which need 2 rows; raise it or give --z0 zero"),
    ]
    if line := next((line for is_wrong, line in wrong if is_wrong), None):
        raise SystemExit(line)
    if "auto" not in hyper.values():
        wants, own = signature(find_loss(cfg.loss))
        try:                                                                            # the loss itself knows its parameters' ranges
            find_loss(cfg.loss)(**{n: v for n, v in example_values(1).items() if n in wants}, **{k: hyper[k][0] if several and k == "beta" else hyper[k] for k in own})
        except ValueError as e:
            raise SystemExit(f"--loss {cfg.loss}: {e}") from None


FILE_FLAGS = ("eval_data", "threshold", "columns", "tokenizer", "turns", "add_eot")                  # they say how files are read


# --- a name on the command line to a loss -------------------------------------------------------------------------------

def signature(loss):
    """(measured names, {hyper-parameter: default}) of a loss function: what stands before its * and what after."""
    ps = inspect.signature(loss).parameters.values()
    return [p.name for p in ps if p.kind != p.KEYWORD_ONLY], {p.name: p.default for p in ps if p.kind == p.KEYWORD_ONLY}


def find_loss(text):
    if text in LOSSES or text in RECIPES:
        return {**LOSSES, **ACTING}[RECIPES[text]["loss"] if text in RECIPES else text]
    if "+" in text or "*" in text:
        return weighted_sum(text)
    raise SystemExit(f"--loss {text}: no such loss; valid are {', '.join([*LOSSES, *RECIPES])}, or a sum such as \"dpo + 0.1*sft\"")


def weighted_sum(text):
    """"dpo + 0.1*sft" as one loss function: its measured names are the union, a shared hyper-parameter shares its value.

    A hyper-parameter whose terms disagree on the default shows None, and each term keeps its own until a flag sets all.
    """
    available, terms = {**LOSSES, "sft": dpo_variants.sft_loss}, []
    for part in text.split("+"):
        weight, star, name = part.rpartition("*")
        name = name.strip()
        if name not in available or (star and not re.fullmatch(r"[\d.]+(e[+-]?\d+)?", weight.strip())):
            raise SystemExit(f"--loss {text}: {part.strip()!r} is not NAME or NUMBER*NAME; names are {', '.join(LOSSES)}")
        if name in BATCH_COUPLED:
            raise SystemExit(f"--loss {text}: {name} sorts its batch and cannot be summed")
        terms.append((float(weight) if star else 1.0, available[name]))
    wants, hyper = [], {}
    for _, f in terms:
        names, defaults = signature(f)
        wants += [n for n in names if n not in wants]
        hyper |= {k: v if hyper.get(k, v) == v else None for k, v in defaults.items()}
    if len({is_paired(signature(f)[0]) for _, f in terms}) > 1:
        raise SystemExit(f"--loss {text}: an unpaired and a paired loss cannot be summed")

    def loss(**given):
        total = 0.0
        for weight, f in terms:
            names, defaults = signature(f)
            own = {k: v if given[k] is None else given[k] for k, v in defaults.items()}
            total = total + weight * f(**{n: given[n] for n in names}, **own)
        return total

    loss.__doc__ = text + ": " + "; ".join(f"{f.__name__.removesuffix('_loss')} = {inspect.getdoc(f).splitlines()[0]}" for _, f in terms)
    kind = inspect.Parameter
    loss.__signature__ = inspect.Signature([kind(n, kind.POSITIONAL_OR_KEYWORD) for n in wants]
                                           + [kind(k, kind.KEYWORD_ONLY, default=v) for k, v in hyper.items()])
    return loss


def is_paired(wants):
    return any(w.startswith(("chosen_", "rejected_")) for w in wants)


if __name__ == "__main__":
    main()

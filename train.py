"""The loop: `torchrun [--nproc_per_node N] train.py --loss kto`, or `python train.py ...`, the same thing.

    reference = what the policy is compared with         log-probs computed once per row, then the model is let go
    for batch in batches:                                global batch: rows, and for each a mismatched partner
        shared = measured over the WHOLE batch first     z0's log-ratios, running means; no gradient
        for micro in split(batch):
            m = measured on these rows                   what the loss's signature names before its *, nothing else
            (loss(**m, **hyperparameters).sum() / len(batch)).backward()
        all-reduce, clip, step

A loss is a plain function (kto.py); this file knows none by name. It reads the signature: parameters before `*` are
measured, those after it are set on the command line. One step is the same for any number of processes and any micro-batch,
because everything that couples rows (z0, running means, the divisor) is taken over the global batch.
"""

import hashlib
import inspect
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import evaluate
import kto
import model
import world


def token_nll_loss(logps, mean_len):
    """-log pi(y|x) / (mean response length of the global batch): averaged over rows this is the mean per TOKEN.   (B,)

    The SFT stage. A mean of per-response means would weigh each token of a short response more and teach brevity.
    """
    return -logps / mean_len


LOSSES = {"sft": token_nll_loss, **kto.LOSSES}


# --- settings ---------------------------------------------------------------------------------------------------------

def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    loss: str = flag("kto", "objective: " + ", ".join(LOSSES))
    model: str = flag("", "folder of a causal LM in Hugging Face format; without it the small GPT")
    data: str = flag("", "preference files, separated by commas; without it the embedded help desk")
    eval_data: str = flag("", "held-out files, same formats")
    tokenizer: str = flag("", "with --data and no --model: a folder with vocab.bpe and encoder.json (default: bytes)")
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
    dtype: str = flag("fp32", "fp32, bf16 (autocast, weights stay fp32) or fp64")
    device: str = flag("", "cpu, cuda or mps (default: cuda where there is one)")
    max_len: int = flag(1024, "tokens per row, never above the model's context")
    max_prompt_len: int = flag(512, "tokens per prompt; longer ones lose their left end")
    threshold: float = flag(math.nan, "scored rows: desirable if reward > threshold")
    columns: str = flag("", "column names, prompt=question,completion=answer")
    add_eot: bool = flag(True, "true or false: end-of-text after whole responses")
    lambda_ratio: float = flag(4 / 3, "what `auto` makes of lambda_d n_d / (lambda_u n_u), in [1, 1.5]")
    pretrain_steps: int = flag(500, "embedded world: steps of the base model's pretraining")
    sft_steps: int = flag(400, "small GPT: steps of supervised fine-tuning before alignment; with --data on the desirable responses")
    eval_every: int = flag(0, "steps between evaluations on the tuning prompts (0: only at the end)")
    save_every: int = flag(100, "steps between checkpoints")
    log_every: int = flag(1, "steps between progress updates")


SWITCHES = ("overwrite", "resume", "dry_run")                             # flags that need no value
MAY_CHANGE = {"resume", "overwrite", "steps", "epochs", "micro_batch_size", "save_every", "eval_every", "log_every", "out", "device"}


def signature(loss):
    """(measured names, {hyper-parameter: default}) of a loss function: what stands before its * and what after."""
    ps = inspect.signature(loss).parameters.values()
    return [p.name for p in ps if p.kind != p.KEYWORD_ONLY], {p.name: p.default for p in ps if p.kind == p.KEYWORD_ONLY}


def settings(argv):
    """Command line -> (Config, hyper-parameters of the loss, origin of each value). SystemExit with one line on bad input.

    Precedence: command line, then world.SETTINGS[loss] (embedded world only), then the loss's signature, then Config.
    """
    typed, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            typed["help"] = True
            continue
        if not word.startswith("--"):
            raise SystemExit(f"{word!r}: expected --name value or --name=value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if name in SWITCHES:
                value = "true"
            elif not words or (words[0].startswith("--") and not _is_number(words[0])):
                raise SystemExit(f"--{name}: a value is missing")
            else:
                values = [words.pop(0)]
                while name in ("data", "eval_data") and words and not words[0].startswith("--"):
                    values.append(words.pop(0))
                value = ",".join(values)
        typed[name] = value
    loss_name = typed.get("loss", "kto")
    if loss_name not in LOSSES:
        raise SystemExit(f"--loss {loss_name}: no such loss; valid are {', '.join(LOSSES)}")
    wants, hyper = signature(LOSSES[loss_name])
    if "kl_logratios" in wants:
        hyper["z0"] = "estimate"
    if typed.pop("help", False):
        raise SystemExit(help_text(loss_name if "loss" in typed else None, hyper))

    known = {f.name: f for f in fields(Config)}
    for name in typed:
        if name not in known and name not in hyper:
            other = [n for n, f in LOSSES.items() if name in signature(f)[1] or (name == "z0" and "kl_logratios" in signature(f)[0])]
            raise SystemExit(f"--{name}: {loss_name} has no such parameter; it has {', '.join(hyper) or 'none of its own'}" if other
                             else f"--{name}: unknown flag; valid are " + ", ".join("--" + n for n in [*known, *hyper]))
    embedded = not typed.get("model") and not typed.get("data")
    preset = dict(world.SETTINGS.get(loss_name, {})) if embedded else {}
    if not embedded and not typed.get("model"):
        preset = {"lr": 5e-4, "sft_steps": 200}                                # a small GPT from random weights learns fast
    values, origin = {}, {}
    for name, default in {**{n: f.default for n, f in known.items()}, **hyper}.items():
        if name in typed:
            values[name], origin[name] = _typed(name, typed[name], default), "command line"
        elif name in preset:
            values[name], origin[name] = preset[name], "embedded world" if embedded else "small GPT"
        else:
            values[name], origin[name] = default, f"{loss_name}'s signature" if name in hyper else "default"
    hyper = {name: values.pop(name) for name in hyper}
    cfg = Config(**values)
    cfg.out = cfg.out or f"out/{loss_name}"
    _check(cfg, hyper, typed)
    return cfg, hyper, origin


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _typed(name, text, default):
    """A flag's text as the type of its default."""
    if name in ("lambda_d", "lambda_u") and text == "auto":
        return text
    if name == "z0":
        if text in ("estimate", "zero") or (_is_number(text) and float(text) >= 0):
            return float(text) if _is_number(text) else text
        raise SystemExit(f"--z0 {text}: valid are estimate, zero, or a number >= 0")
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise SystemExit(f"--{name} {text}: valid are true, false")
        return text == "true"
    try:
        value = type(default)(text)
    except ValueError:
        raise SystemExit(f"--{name} {text}: expected {'a whole number' if isinstance(default, int) else 'a number'}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise SystemExit(f"--{name} {text}: expected a finite number")
    return value


def _check(cfg, hyper, typed):
    """Ranges, and flags that need each other."""
    at_least = dict(batch_size=1, micro_batch_size=0, steps=0, warmup=0, weight_decay=0, max_grad_norm=0, seed=0, max_len=2,
                    max_prompt_len=1, pretrain_steps=0, sft_steps=0, eval_every=0, save_every=1, log_every=1)
    for name, least in at_least.items():
        if getattr(cfg, name) < least:
            raise SystemExit(f"--{name} {getattr(cfg, name)}: must be at least {least}")
    for name, x in (("lr", cfg.lr), ("epochs", cfg.epochs), ("beta", hyper.get("beta", 1.0))):
        if x <= 0:
            raise SystemExit(f"--{name} {x}: must be positive")
    for name in ("lambda_d", "lambda_u"):
        if name in hyper and hyper[name] != "auto" and hyper[name] < 0:
            raise SystemExit(f"--{name} {hyper[name]}: must be >= 0 or auto")
    if not 1 <= cfg.lambda_ratio <= 1.5:
        raise SystemExit(f"--lambda_ratio {cfg.lambda_ratio}: KTO's Eq. 9 asks for a ratio in [1, 1.5]")
    if cfg.dtype not in DTYPES:
        raise SystemExit(f"--dtype {cfg.dtype}: valid are {', '.join(DTYPES)}")
    if "steps" in typed and cfg.steps < 1:
        raise SystemExit(f"--steps {cfg.steps}: must be at least 1")
    if cfg.model and not cfg.data:
        raise SystemExit("--model: needs --data FILE, the preferences to align it with")
    for name in ("eval_data", "threshold", "columns", "tokenizer"):
        if name in typed and not cfg.data:
            raise SystemExit(f"--{name}: needs --data FILE; the embedded world brings its own")
    if "tokenizer" in typed and cfg.model:
        raise SystemExit("--tokenizer: --model brings its own tokenizer; the flag is for the small GPT")
    if cfg.overwrite and cfg.resume:
        raise SystemExit("--overwrite and --resume: give one of them")
    if hyper.get("z0") == "estimate" and cfg.batch_size == 1:
        raise SystemExit("--batch_size 1: KTO's z0 is estimated from mismatched pairs, which need 2 rows; raise it or give --z0 zero")


def help_text(loss_name, hyper):
    if loss_name:
        lines = [f"--loss {loss_name}", "", inspect.getdoc(LOSSES[loss_name]), "", "its own flags:"]
        return "\n".join(lines + [f"  --{n} (default {d})" for n, d in hyper.items()] or ["  none"])
    lines = ["train.py --name value ...   (--loss NAME --help shows that objective's equation and parameters)", ""]
    return "\n".join(lines + [f"  --{f.name:<18} {f.metadata['help']}" + ("" if f.default in ("", False) or f.default != f.default
                                                                      else f" [{f.default}]") for f in fields(Config)])


DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}                   # the dtype of the weights


# --- several processes (everything else reads as if there were one) -----------------------------------------------------

class Group:
    """The processes of this run. Only fixed-size sums cross between them."""

    def __init__(self, device=""):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available() if not device else device.startswith("cuda")
        self.device = torch.device(f"cuda:{local}" if cuda else device or "cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

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

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def bar(self, total, what, initial=0):
        return tqdm(total=total, initial=initial, desc=what, unit="step" if "step" in what else "row", disable=self.rank != 0,
                    mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True)


# --- measuring --------------------------------------------------------------------------------------------------------

TOKEN_BUDGET = 8192                                       # tokens per forward without gradient, and of a default micro-batch


def precision(cfg, device):
    return torch.autocast(device.type, torch.bfloat16) if cfg.dtype == "bf16" else nullcontext()


def logps_of(policy, rows, cfg, device):
    """(log pi(y|x) of each row (B,), tokens in the forward): the masked sums that every loss is made of."""
    flat = data.flatten(rows, device)
    with precision(cfg, device):
        return flat.sums(policy(flat.ids, flat.positions, flat.lengths, flat.predict, flat.targets)), len(flat.ids)


@torch.no_grad()
def score(policy, rows, cfg, device):
    """log pi(y|x) of any number of rows, without gradient.   -> (len(rows),) float64 on the CPU"""
    parts = [logps_of(policy, [rows[i] for i in part], cfg, device)[0].double().cpu() for part in data.token_batches(rows, TOKEN_BUDGET)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


class Reference:
    """Log-probs of the frozen reference: of (x, y) once per data set, of (x, y') once per epoch, since partners are drawn anew.

    The model is loaded for these passes alone. They run over fixed slices of the epoch's order, dealt out to the ranks, so a
    number depends on data, seed and epoch, never on micro-batches or on where a run was resumed; slices that no step will
    reach are left out.
    """

    def __init__(self, folder, rows, cfg, group):
        self.folder, self.rows, self.cfg, self.group = folder, rows, cfg, group
        self.prompts = [r.prompt_key for r in rows]
        self.matched_table, self.mismatched_table, self.epoch = None, None, None

    def _score(self, rows, needed, what):
        policy = model.load_policy(self.folder, device=self.group.device, dtype=DTYPES[self.cfg.dtype])
        table = torch.zeros(len(rows), dtype=torch.float64)
        with self.group.bar(needed, what) as bar:
            for k, part in enumerate(data.token_batches(rows, TOKEN_BUDGET)):
                if part.start >= needed:
                    break
                if k % self.group.size == self.group.rank:
                    table[part.start:part.stop] = score(policy, [rows[i] for i in part], self.cfg, self.group.device)
                bar.update(min(part.stop, needed) - part.start)
        return self.group.sum(table)

    def matched(self, batch):
        """log pi_ref(y|x) of the batch's rows.   (B,)"""
        if self.matched_table is None:
            order = data.epoch_order(len(self.rows), self.cfg.seed, 0).tolist()
            needed = min(len(order), self.cfg.steps * self.cfg.batch_size)
            self.matched_table = torch.zeros(len(order), dtype=torch.float64)
            self.matched_table[order] = self._score([self.rows[i] for i in order], needed, "reference log-probs")
        return self.matched_table[batch.rows]

    def mismatched(self, batch):
        """log pi_ref(y'|x) of the batch's mismatched pairs.   (B,)"""
        n, size, seed = len(self.rows), self.cfg.batch_size, self.cfg.seed
        per_epoch = data.steps_per_epoch(n, size)
        epoch, k = divmod(batch.step, per_epoch)
        if self.epoch != epoch:
            batches = [data.batch_at(self.prompts, size, seed=seed, step=epoch * per_epoch + s) for s in range(per_epoch)]
            rows = [data.mismatched(self.rows[i], self.rows[j], self.cfg.max_len) for b in batches for i, j in zip(b.rows, b.partners)]
            needed = min(n, (self.cfg.steps - epoch * per_epoch) * size)
            self.mismatched_table, self.epoch = self._score(rows, needed, "reference, mismatched"), epoch
        return self.mismatched_table[k * size:k * size + len(batch.rows)]


def measure_shared(policy, reference, batch, rows, task, running):
    """What must be known of the WHOLE global batch before the first backward, by name; no gradient, equal on every rank."""
    cfg, group, shared = task.cfg, task.group, {}

    def over_ranks(batch_rows):
        """log pi of all these rows, each rank scoring its share.   (B,)"""
        table = torch.zeros(len(batch_rows), dtype=torch.float64)
        table[group.rank::group.size] = score(policy, batch_rows[group.rank::group.size], cfg, group.device)
        return group.sum(table)

    if "kl_logratios" in task.wants and task.z0 != "estimate":
        shared["kl_logratios"] = torch.tensor([] if task.z0 == "zero" else [task.z0], dtype=torch.float64)
    elif {"kl_logratios", "entropy"} & set(task.wants):
        kl_logps = over_ranks([data.mismatched(rows[i], rows[j], cfg.max_len) for i, j in zip(batch.rows, batch.partners)])
        if "kl_logratios" in task.wants:
            shared["kl_logratios"] = kl_logps - reference.mismatched(batch)
        if "entropy" in task.wants:
            shared["entropy"] = -kl_logps.mean()
    if "reward_shift" in task.wants:                                      # a running mean over every sample seen so far
        rewards = task.hyper["beta"] * (over_ranks([rows[i] for i in batch.rows]) - reference.matched(batch))
        running["reward_sum"] = running.get("reward_sum", 0.0) + float(rewards.sum())
        running["reward_count"] = running.get("reward_count", 0.0) + len(rewards)
        shared["reward_shift"] = torch.tensor(running["reward_sum"] / running["reward_count"], dtype=torch.float64)
    if "mean_len" in task.wants:
        shared["mean_len"] = torch.tensor(float(np.mean([(rows[i].mask > 0).sum() for i in batch.rows])), dtype=torch.float64)
    return shared


# --- one step ---------------------------------------------------------------------------------------------------------

@dataclass
class Task:
    """One objective on one set of rows: what the loop needs to know, fixed for the whole run."""
    cfg: Config
    group: Group
    loss: object
    hyper: dict
    z0: object = None

    def __post_init__(self):
        self.wants = signature(self.loss)[0]
        self.needs_reference = bool({"logratios", "kl_logratios", "reward_shift"} & set(self.wants))
        self.needs_partners = "entropy" in self.wants or ("kl_logratios" in self.wants and self.z0 == "estimate")


def train_step(policy, reference, optimizer, batch, rows, task, running, *, update=True):
    """One optimiser step on one global batch. Returns its metrics, the same on every rank.

    update=False stops before the optimiser: the gradients are there to be looked at, the weights are untouched.
    """
    cfg, group, start = task.cfg, task.group, time.perf_counter()
    n = len(batch.rows)
    shared = measure_shared(policy, reference, batch, rows, task, running)
    ref_logps = reference.matched(batch) if task.needs_reference else None
    table = torch.zeros(3, n, dtype=torch.float64)                                      # loss, log pi, tokens; one column per row
    mine = list(range(group.rank, n, group.size))                                       # this rank's rows of the global batch
    for part in micro_batches(mine, batch, rows, cfg):
        logps, tokens = logps_of(policy, [rows[batch.rows[i]] for i in part], cfg, group.device)

        def to(x):
            return x.to(device=logps.device, dtype=logps.dtype)

        quantities = {"logps": lambda: logps,
                      "logratios": lambda: logps - to(ref_logps[part]),
                      "desirable": lambda: torch.tensor([rows[batch.rows[i]].desirable for i in part], device=logps.device),
                      **{name: (lambda x=x: to(x)) for name, x in shared.items()}}
        losses = task.loss(**{name: quantities[name]() for name in task.wants}, **task.hyper)
        (losses.sum() / n).backward()                                                   # the global count, on every rank
        table[:, part] = torch.stack([losses.detach(), logps.detach(), torch.full_like(logps, tokens / len(part))]).double().cpu()
    table = group.sum(table)
    params = [p for p in policy.parameters() if p.requires_grad]
    if group.size > 1:                                                                  # one flat all-reduce; no gradient counts as 0
        grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(grads)
        for p, g in zip(params, grads.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    if not torch.isfinite(table[0]).all():
        bad = [rows[batch.rows[i]].where or f"row {batch.rows[i]}" for i in (~torch.isfinite(table[0])).nonzero()[:, 0].tolist()]
        raise SystemExit(f"step {batch.step}: the loss is not finite on {', '.join(bad[:3])}; a lower --lr, or look at these rows")
    grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm or math.inf)
    lr = learning_rate(batch.step, cfg)
    if update:
        for g in optimizer.param_groups:
            g["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # ------------------------------------------------------------------------------------ everything below is diagnostics
    return {"step": batch.step, "epoch": round(batch.epoch, 4), "loss": float(table[0].mean()), "grad_norm": float(grad_norm), "lr": lr,
            "tokens_per_second": float(table[2].sum()) / (time.perf_counter() - start)} | diagnostics(table[1], ref_logps, batch, rows, task, shared)


def micro_batches(mine, batch, rows, cfg):
    """This rank's rows in slices: --micro_batch_size rows, or as many as fit the token budget."""
    if cfg.micro_batch_size:
        return [mine[i:i + cfg.micro_batch_size] for i in range(0, len(mine), cfg.micro_batch_size)]
    return [mine[part.start:part.stop] for part in data.token_batches([rows[batch.rows[i]] for i in mine], TOKEN_BUDGET)]


def learning_rate(step, cfg):
    """Linear warm-up, then a cosine from lr to lr / 10."""
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (step + 1) / cfg.warmup if step < cfg.warmup else cfg.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def diagnostics(logps, ref_logps, batch, rows, task, shared):
    """Metrics over the global batch, named as TRL's dashboards name them. A class that is absent gives None, never NaN."""
    up = torch.tensor([rows[i].desirable for i in batch.rows])
    ratios = None if ref_logps is None else logps - ref_logps
    mean = lambda x, where: float(x[where].mean()) if where.any() else None                                    # noqa: E731
    out = {"logps/chosen": mean(logps, up), "logps/rejected": mean(logps, ~up)}
    if ratios is not None:
        beta, z0 = task.hyper.get("beta", 1.0), 0.0
        if "kl_logratios" in shared:
            kl = shared["kl_logratios"]
            z0 = float(kto.reference_point(kl))
            out |= {"z0": z0, "z0_raw": float(kl.mean()) if len(kl) else 0.0}
        good, bad = mean(beta * ratios, up), mean(beta * ratios, ~up)
        out |= {"rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": None if None in (good, bad) else good - bad,
                "rewards/accuracies": float(torch.where(up, ratios > z0, ratios < z0).double().mean()),
                "logratios/max": float(ratios.abs().max())}
    return out


def make_optimizer(policy, cfg):
    """AdamW, fused; weight decay on matrices only."""
    params = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def check_first_step(m, predicted, cfg, apart):
    """The step-0 self-check: at equal weights every log-ratio is 0, the loss has a known value, and there is a gradient."""
    line = f"step 0: loss {m['loss']:.6f}" + (f" (predicted {predicted:.6f})" if predicted is not None and not apart else "")
    if "logratios/max" in m:
        line += f" | largest |log-ratio| {m['logratios/max']:.1e}"
    line += f" | gradient norm {m['grad_norm']:.3g}"
    tolerance = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.1}[cfg.dtype]
    if not math.isfinite(m["grad_norm"]) or m["grad_norm"] == 0:
        raise SystemExit(line + "\nstep 0: no usable gradient: are all weights frozen, or both lambdas 0?")
    if not apart and m.get("logratios/max", 0) > tolerance:
        raise SystemExit(line + f"\nstep 0: policy and reference have equal weights, yet a log-ratio exceeds {tolerance}. Known causes: dropout "
                         "is on; the reference was measured in another dtype; an adapter is missing from the reference")
    if not apart and predicted is not None and abs(m["loss"] - predicted) > tolerance:
        raise SystemExit(line + "\nstep 0: the loss is not the value it must have at equal weights")
    return line + (" | policy and reference start apart" if apart else " | ok")


def predicted_first_loss(batch, rows, task):
    """The loss at pi = pi_ref, from the loss function itself at log-ratios of 0; None where it depends on the log-probs."""
    if not set(task.wants) <= {"logratios", "desirable", "kl_logratios", "reward_shift"}:
        return None
    zeros = torch.zeros(len(batch.rows), dtype=torch.float64)
    fixed = torch.tensor([] if task.z0 in ("zero", "estimate", None) else [task.z0], dtype=torch.float64)
    known = {"logratios": zeros, "kl_logratios": fixed, "reward_shift": zeros.sum(),
             "desirable": torch.tensor([rows[i].desirable for i in batch.rows])}
    return float(task.loss(**{name: known[name] for name in task.wants}, **task.hyper).mean())


# --- checkpoints: one file, written beside and renamed; the last two are kept ---------------------------------------------

def save_checkpoint(folder, policy, optimizer, step, running):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"rng": torch.get_rng_state()}
    for name, p in policy.named_parameters():
        tensors["policy." + name] = p.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    path = folder / f"step-{step:06d}.safetensors"
    beside = path.with_suffix(".tmp")
    save_file({k: t.contiguous() for k, t in tensors.items()}, beside, metadata={"state": json.dumps({"step": step, "running": running})})
    with open(beside, "rb") as f:
        os.fsync(f.fileno())
    os.replace(beside, path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(folder, policy, optimizer):
    """(next step, running means); policy and optimiser are filled in place."""
    files = sorted(folder.glob("step-*.safetensors"))
    if not files:
        return 0, {}
    with safe_open(files[-1], "pt") as f:
        state = json.loads(f.metadata()["state"])
        names = set(f.keys())
        for name, p in policy.named_parameters():
            if "policy." + name not in names:
                raise SystemExit(f"--resume: {files[-1]} has no tensor for {name}: it belongs to another model")
            p.data.copy_(f.get_tensor("policy." + name))
            if "exp_avg." + name in names:
                optimizer.state[p] = {k: f.get_tensor(f"{k}.{name}").to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}
        torch.set_rng_state(f.get_tensor("rng"))
    return state["step"], state["running"]


# --- where the policy starts: the embedded world's base model, or the small GPT for a file -------------------------------

def fit(policy, rows, cfg, group, what):
    """A supervised stage, on one process: the same step as alignment, with the token-mean loss and no reference."""
    task = Task(cfg, group, token_nll_loss, {})
    optimizer, prompts, running, loss = make_optimizer(policy, cfg), [r.prompt_key for r in rows], {}, math.nan
    with group.bar(cfg.steps, what) as bar:
        for step in range(cfg.steps):
            m = train_step(policy, None, optimizer, data.batch_at(prompts, cfg.batch_size, seed=cfg.seed, step=step), rows, task, running)
            loss = m["loss"] if step == 0 else 0.95 * loss + 0.05 * m["loss"]
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f} per token", refresh=False)
    return loss


def base_model(cfg, group, tokenizer, stages, shape):
    """The folder of a small GPT trained through `stages` [(name, rows, settings)]; made once, then reused.

    Its name is a hash of all it depends on: the code, the seed, the settings and the rows. Rank 0 makes it, alone and with a
    fixed number of threads, in a folder beside that is renamed when done.
    """
    key = hashlib.sha256()
    for module in (model, data, inspect.getmodule(fit)):
        key.update(Path(module.__file__).read_bytes() if module is not inspect.getmodule(fit) else
                   "".join(map(inspect.getsource, (fit, train_step, token_nll_loss, learning_rate, make_optimizer, micro_batches))).encode())
    key.update(json.dumps([asdict(shape), cfg.seed, torch.__version__, [(name, s) for name, _, s in stages]], sort_keys=True).encode())
    for _, rows, _ in stages:
        key.update(b"".join(r.ids.tobytes() + r.mask.tobytes() for r in rows))
    folder = Path(cfg.out).parent / f"base-{key.hexdigest()[:12]}"
    if group.rank == 0:
        with locked(folder.with_suffix(".lock")):
            if (folder / "config.json").is_file():
                group.say(f"base model: {folder} (made before; nothing it depends on has changed)")
            else:
                threads, alone = torch.get_num_threads(), Group.__new__(Group)
                alone.rank, alone.size, alone.device = 0, 1, group.device
                torch.set_num_threads(min(2, os.cpu_count() or 1))
                torch.manual_seed(cfg.seed)
                policy = model.GPT(shape).to(alone.device)
                for name, rows, s in stages:
                    stage = Config(**{**asdict(cfg), "micro_batch_size": 0, "dtype": "fp32", "max_grad_norm": 1.0, **s})
                    fit(policy, rows, stage, alone, f"{name}, step")
                beside = folder.with_suffix(".tmp")
                shutil.rmtree(beside, ignore_errors=True)
                policy.save(beside, eot=tokenizer.eot)
                tokenizer.save(beside)
                beside.rename(folder)
                torch.set_num_threads(threads)
    group.barrier()
    return str(folder)


@contextmanager
def locked(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)
        except ImportError:                                                            # Windows: two runs at once are not guarded
            pass
        yield


# --- a run ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:
        if int(os.environ.get("RANK", 0)) and isinstance(e.code, str):          # one line in all, not one per process
            raise SystemExit(1) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(argv):
    cfg, hyper, origin = settings(argv)
    out, embedded = Path(cfg.out), not cfg.data
    check_out(out, cfg)
    source = load_world(cfg) if embedded else load_files(cfg)
    group = Group(cfg.device)
    say = group.say
    tokenizer = source["tokenizer"]
    wants = signature(LOSSES[cfg.loss])[0]
    rows = source["rows"] if "desirable" in wants else [r for r in source["rows"] if r.desirable]
    if not rows:
        raise SystemExit(f"--data {cfg.data}: no rows left ({data.counts_line(source['counts'])})")
    cfg.batch_size = min(cfg.batch_size, len(rows))
    per_epoch = data.steps_per_epoch(len(rows), cfg.batch_size)
    cfg.steps = cfg.steps or max(1, math.ceil(cfg.epochs * per_epoch))
    n_d, n_u = sum(r.desirable for r in rows), sum(not r.desirable for r in rows)
    balance = set_lambdas(hyper, n_d, n_u, cfg.lambda_ratio)
    z0 = hyper.pop("z0", None)
    task = Task(cfg, group, LOSSES[cfg.loss], hyper, z0)
    prompts = [r.prompt_key for r in rows]
    if task.needs_partners and len(set(prompts)) < 2:
        raise SystemExit(f"--data {cfg.data}: all {len(rows)} rows have one prompt; z0 is estimated from mismatched pairs, which need two. "
                         "Give --z0 zero" + (" or more data" if embedded else f" or more prompts (longer than --max_prompt_len {cfg.max_prompt_len}?)"))

    # --- say what is about to happen
    say(f"nanoKTO: {cfg.loss} {'= ' + inspect.getdoc(task.loss).splitlines()[0] if inspect.getdoc(task.loss) else ''}")
    say(source["story"])
    say(f"data: {source['format']} | {data.counts_line(source['counts'])}")
    for line in [source.get("hint"), balance]:
        if line:
            say(line)
    own = {**hyper, **({} if z0 is None else {"z0": z0})}
    say("settings: " + ", ".join(f"{k} {v:g} ({origin[k]})" if isinstance(v, float) else f"{k} {v} ({origin[k]})" for k, v in
                                 {**own, "lr": cfg.lr, "steps": cfg.steps, "batch_size": cfg.batch_size, "dtype": cfg.dtype, "seed": cfg.seed}.items())
        + f" | {group.device}, {group.size} process{'es' if group.size > 1 else ''} x {torch.get_num_threads()} threads")

    # --- where it starts, and what it is compared with
    clock = time.perf_counter()
    base = source["base"](group) if source["base"] else cfg.model
    init, ref = cfg.init or base, cfg.ref or base
    policy = model.load_policy(init, device=group.device, dtype=DTYPES[cfg.dtype])
    if policy.context < cfg.max_len:
        raise SystemExit(f"--max_len {cfg.max_len}: {init} has a context of {policy.context} tokens")
    if tokenizer.vocab_size > policy.vocab_size:
        raise SystemExit(f"--model {init}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {policy.vocab_size}")
    reference = Reference(ref, rows, cfg, group) if task.needs_reference else None
    n_params = sum(p.numel() for p in policy.parameters())
    say(f"policy: {init} ({n_params:,} weights{'' if getattr(policy, 'flat', True) else ', padded rows: this architecture mixes flat ones'})"
        + (f" | reference: {ref}" if reference else " | no reference needed"))
    base_seconds = time.perf_counter() - clock
    optimizer = make_optimizer(policy, cfg)
    record = {**asdict(cfg), **own, "init": init, "ref": ref, "task": "world" if embedded else "files", "threshold": None if math.isnan(cfg.threshold) else cfg.threshold,
              "origin": origin, "versions": {"torch": torch.__version__, "python": sys.version.split()[0], "numpy": np.__version__}, "commit": git_commit(),
              "n_desirable": n_d, "n_undesirable": n_u, "processes": group.size}
    start, running = resume(out, record, policy, optimizer) if cfg.resume else (0, {})
    apart = Path(init).resolve() != Path(ref).resolve()
    if cfg.dry_run:
        return dry_run(policy, reference, optimizer, rows, prompts, task, apart)
    if group.rank == 0:
        prepare_out(out, record, start, cfg)
    group.barrier()

    # --- the loop
    clock, metrics, stop = time.perf_counter(), [], []
    previous = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)} if in_main_thread() else {}
    log = open(out / "metrics.jsonl", "a") if group.rank == 0 else None
    bar = None
    try:
        for step in range(start, cfg.steps):
            batch = data.batch_at(prompts, cfg.batch_size, seed=cfg.seed, step=step)
            m = train_step(policy, reference, optimizer, batch, rows, task, running)
            if step == 0:
                say(check_first_step(m, predicted_first_loss(batch, rows, task), cfg, apart))
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
                m |= source["quick"](policy, ref, group)
            if log:
                log.write(json.dumps(m) + "\n")
                log.flush()
            metrics.append(m)
            bar = bar or group.bar(cfg.steps, f"{cfg.loss}, step", initial=start)
            bar.update()
            if (step + 1) % cfg.log_every == 0:
                bar.set_postfix_str(f"loss {m['loss']:.3f}" + (f" margin {m['rewards/margins']:.2f}" if m.get("rewards/margins") is not None else ""), refresh=False)
            stopped = bool(group.sum(torch.tensor([float(len(stop))]))[0])                   # all ranks stop at the same step
            if stopped or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                if group.rank == 0:
                    save_checkpoint(out / "checkpoint", policy, optimizer, step + 1, running)
                group.barrier()
            if stopped and step + 1 < cfg.steps:
                bar.close()
                raise SystemExit(f"stopped after step {step + 1} of {cfg.steps}; the checkpoint is in {out}/checkpoint; the same command with --resume goes on")
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        if bar:
            bar.close()
        if log:
            log.close()
    train_seconds = time.perf_counter() - clock

    # --- what came out
    if group.rank == 0:
        policy.save(out / "model", eot=tokenizer.eot)
        tokenizer.save(out / "model")
        source["report"](policy, ref, group, base_seconds, train_seconds)
    group.barrier()


def in_main_thread():
    import threading
    return threading.current_thread() is threading.main_thread()


def set_lambdas(hyper, n_d, n_u, ratio):
    """`auto` becomes numbers; returns the line that says which, from what counts, and the ratio they reach."""
    if "auto" not in (hyper.get("lambda_d"), hyper.get("lambda_u")):
        return None
    d, u = data.lambda_weights(n_d, n_u, ratio=ratio)
    if hyper["lambda_d"] != "auto":                                     # one is given: solve for the other
        d, u = hyper["lambda_d"], u / d * hyper["lambda_d"]
    elif hyper["lambda_u"] != "auto":
        d, u = d / u * hyper["lambda_u"], hyper["lambda_u"]
    hyper |= {"lambda_d": d, "lambda_u": u}
    reached = f"{d * n_d / (u * n_u):.4g}" if n_u and u else "undefined: one class only"
    return f"lambdas: {n_d:,} desirable, {n_u:,} undesirable -> lambda_d {d:.4g}, lambda_u {u:.4g}; lambda_d n_d / (lambda_u n_u) = {reached}"


RUN_FILES = ("config.json", "metrics.jsonl", "curves.png", "frontier.png", "samples.md", "eval.json", "checkpoint", "model")


def check_out(out, cfg):
    """An existing run is never overwritten unasked, and nothing that is not a run is ever deleted."""
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out}: is a file; expected a folder")
    is_run = (out / "config.json").is_file()
    if cfg.resume and not is_run:
        raise SystemExit(f"--resume: {out} holds no run (no config.json); start it without --resume")
    if out.is_dir() and any(out.iterdir()) and not cfg.resume and not cfg.dry_run:
        if not is_run:
            raise SystemExit(f"--out {out}: holds files that are not a run's; choose an empty or new folder")
        if not cfg.overwrite:
            raise SystemExit(f"--out {out}: a run is there already; --resume continues it, --overwrite replaces it, or choose another --out")


def prepare_out(out, record, start, cfg):
    if not cfg.resume:
        for name in RUN_FILES:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    lines = (out / "metrics.jsonl").read_text().splitlines() if start else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]     # steps after the checkpoint are redone
    (out / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def resume(out, record, policy, optimizer):
    old = json.loads((out / "config.json").read_text())
    fixed = {f.name for f in fields(Config)} - MAY_CHANGE | {"beta", "lambda_d", "lambda_u", "z0"}
    changed = [f"{k} was {old[k]}, is {record[k]}" for k in sorted(fixed) if k in old and k in record and old[k] != record[k]]
    if changed:
        raise SystemExit(f"--resume: settings changed since {out} was started: {'; '.join(changed)}")
    return load_checkpoint(out / "checkpoint", policy, optimizer)


def dry_run(policy, reference, optimizer, rows, prompts, task, apart):
    """The first step without the update, then what the whole run would cost."""
    cfg, steps = task.cfg, task.cfg.steps
    cfg.steps = 1                                                                       # only the first slices of the reference
    batch = data.batch_at(prompts, cfg.batch_size, seed=cfg.seed, step=0)
    m = train_step(policy, reference, optimizer, batch, rows, task, {}, update=False)
    task.group.say(check_first_step(m, predicted_first_loss(batch, rows, task), cfg, apart))
    clock = time.perf_counter()
    train_step(policy, reference, optimizer, batch, rows, task, {}, update=False)
    seconds = time.perf_counter() - clock
    clock = time.perf_counter()
    some = [rows[i] for i in batch.rows]
    score(policy, some, cfg, task.group.device)
    per_row = (time.perf_counter() - clock) / len(some) / task.group.size
    passes = (min(len(rows), steps * cfg.batch_size) + (steps * cfg.batch_size if task.needs_partners else 0)) if task.needs_reference else 0
    weights = sum(p.numel() * p.element_size() for p in policy.parameters()) / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20 if task.group.device.type == "cuda" else resource_peak()
    task.group.say(f"estimate: {steps} steps x {seconds:.3f} s + {passes:,} reference rows x {1e3 * per_row:.2f} ms = about "
                   f"{(steps * seconds + passes * per_row) / 60:.1f} minutes, without evaluation | memory: weights {weights:.0f} MB, with gradients and "
                   f"AdamW's state {4 * weights:.0f} MB; peak so far {peak:.0f} MB per process | nothing was written")


def resource_peak():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def git_commit():
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# --- the two sources of rows ------------------------------------------------------------------------------------------

def load_world(cfg):
    """The embedded help desk: base model, thumbs up and down on its replies, a judge that knows the true utility."""
    tokenizer = data.Tokenizer(world.tokenizer())
    cfg.max_len = min(cfg.max_len, world.MODEL["context"])
    cfg.max_prompt_len = min(cfg.max_prompt_len, cfg.max_len // 2)

    def rows_of(records, **how):
        examples = [data.Feedback(r["prompt"], r["completion"], r["label"]) for r in records]
        return data.encode(examples, tokenizer, max_len=cfg.max_len, max_prompt_len=cfg.max_prompt_len, **how)

    rows, counts = rows_of(world.thumbs(world.pairs(world.N_PAIRS, cfg.seed), cfg.seed))

    def base(group):
        def text(mix, steps, batch_size):
            lines = world.dialogues(min(steps * batch_size, 16000), cfg.seed + 1, mix)
            return [dict(prompt=p, completion=r, label=True) for p, r in lines]

        plan = {"pretrain": cfg.pretrain_steps, "sft": cfg.sft_steps}
        stages = [(name, rows_of(text(name, max(1, steps), world.BASE[name]["batch_size"]), train_prompt=name == "pretrain")[0],
                   {**world.BASE[name], "steps": steps}) for name, steps in plan.items()]
        if "init" in cfg.__dict__ and cfg.init and cfg.ref:
            return cfg.ref
        shape = model.GPTConfig(vocab_size=tokenizer.vocab_size, **world.MODEL)
        return base_model(cfg, group, tokenizer, stages, shape)

    def quick(policy, ref, group):
        reference = model.load_policy(ref, device=group.device, dtype=DTYPES[cfg.dtype])
        r = evaluate.evaluate_world(policy, reference, tokenizer, part="tune", n=192, seed=cfg.seed, device=group.device)
        return {f"eval/{k}": r[k] for k in ("win_rate", "reward", "kl", "malformed")}

    def report(policy, ref, group, base_seconds, train_seconds):
        clock, out = time.perf_counter(), Path(cfg.out)
        reference = model.load_policy(ref, device=group.device, dtype=DTYPES[cfg.dtype])
        r = evaluate.evaluate_world(policy, reference, tokenizer, seed=cfg.seed, device=group.device)
        metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
        prompts = world.eval_prompts("report", 24)[:12]
        texts = [evaluate.replies(m, tokenizer, prompts, temperature=0.7, seed=cfg.seed)[0] for m in (reference, policy)]
        scores = [tuple(world.utility(p, t) for t in pair) for p, *pair in zip(prompts, *texts)]
        evaluate.write_samples(out / "samples.md", prompts, *texts, scores=scores)
        evaluate.plot_curves(metrics, out / "curves.png")
        evaluate.plot_frontier(r, out / "frontier.png", name=cfg.loss)
        seconds = {"base": base_seconds, "align": train_seconds, "evaluate": time.perf_counter() - clock}
        saved = {k: v for k, v in r.items() if not k.startswith("utilities")} | {"seconds": seconds}
        (out / "eval.json").write_text(json.dumps(saved, indent=2) + "\n")
        best, (low, high), (u_low, u_high) = r["optimum_at_same_kl"], r["win_rate_ci95"], r["reward_ci95"]
        z0 = [m for m in metrics if m.get("z0_raw") is not None]
        group.say(f"""
What came out, on {r['n']} questions about 24 (device, problem) pairs that no stage has seen:
  win rate against the reference   {r['win_rate']:.3f}  [{low:.3f}, {high:.3f}]   (0.5: no better; best possible at this KL: {best['win_rate']:.3f})
  true utility per reply           {r['reward']:+.2f}  [{u_low:+.2f}, {u_high:+.2f}]   (reference {r['reward_ref']:+.2f}; best possible at this KL {best['reward']:+.2f}; 3.5 is perfect)
  KL(policy || reference)          {r['kl']:.2f} nats per reply
  right fix, right device          {r['right']:.0%}   (reference {r['right_ref']:.0%})
  malformed replies                {r['malformed']:.1%}   (reference {r['malformed_ref']:.1%})
  length in tokens                 {r['length']:.1f}   (reference {r['length_ref']:.1f})
  greedy decoding, true utility    {r['reward_greedy']:+.2f}   (reference {r['reward_ref_greedy']:+.2f})""")
        if z0:
            group.say(f"  z0 before the clamp, last step    {z0[-1]['z0_raw']:+.2f}; clamped to 0 in {np.mean([m['z0_raw'] <= 0 for m in z0]):.0%} of the steps")
        group.say("\nOne of them, at temperature 0.7 (utility in front):")
        show = max(range(len(prompts)), key=lambda i: scores[i][1] - scores[i][0])
        group.say(f"  {prompts[show]}\n    reference ({scores[show][0]:+.1f})  {texts[0][show]}\n    policy    ({scores[show][1]:+.1f})  {texts[1][show]}")
        group.say(f"""
seconds: base model {base_seconds:.0f}, alignment {train_seconds:.0f}, evaluation {seconds['evaluate']:.0f}
files:   {out}/curves.png, frontier.png, samples.md, eval.json, metrics.jsonl, model/ (transformers loads it)
next:    python evaluate.py {out} --prompt "{prompts[0]}"
         python train.py --loss {cfg.loss} --beta 0.1 --out {out}-beta0.1     (what does beta do to the KL?)
         python train.py --loss bco          python train.py --help""")

    story = ("task: a help desk that must learn what customers like. Its true utility is known, so the result can be checked.\n"
             "      First a base model (pretrained, then fine-tuned on good and bad replies alike: the reference), then alignment\n"
             f"      from {counts['desirable']:,} thumbs up and {counts['undesirable']:,} thumbs down. On 2 cores the whole takes about 2 minutes.")
    return dict(tokenizer=tokenizer, rows=rows, counts=counts, format="embedded world", story=story, base=base, quick=quick, report=report)


def load_files(cfg):
    """The user's own preference files, for a Hugging Face model or for the small GPT."""
    columns = {}
    for item in filter(None, cfg.columns.split(",")):
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in {c for needs in data.FORMATS.values() for c in needs}:
            raise SystemExit(f"--columns {cfg.columns}: expected prompt=question,completion=answer,...; {item!r} is not of that form")
        columns[ours] = theirs
    threshold = None if math.isnan(cfg.threshold) else cfg.threshold
    for folder in filter(None, (cfg.model, cfg.init, cfg.ref)):
        model.read_model_config(folder), model.weight_files(folder)
    if cfg.model:
        c = model.read_model_config(cfg.model)
        cfg.max_len = min(cfg.max_len, c.get("max_position_embeddings") or c.get("n_positions") or cfg.max_len)
    tokenizer = data.load_tokenizer(cfg.model or cfg.tokenizer or None)
    cfg.max_prompt_len = min(cfg.max_prompt_len, cfg.max_len - 1)

    def rows_of(files, **how):
        examples, name = data.read(files.split(","), columns=columns, threshold=threshold)
        feedback = data.to_feedback(examples)
        rows, counts = data.encode(feedback, tokenizer, max_len=cfg.max_len, max_prompt_len=cfg.max_prompt_len, add_eot=cfg.add_eot, **how)
        if not rows:
            raise SystemExit(f"--data {files}: no rows left ({data.counts_line(counts)})")
        return rows, counts, name, feedback

    rows, counts, name, feedback = rows_of(cfg.data)
    held_out = rows_of(cfg.eval_data) if cfg.eval_data else None

    def base(group):
        shape = model.GPTConfig(vocab_size=tokenizer.vocab_size, context=cfg.max_len, n_layer=4, n_head=4, d_model=128)
        good = [r for r in rows if r.desirable] or rows
        return base_model(cfg, group, tokenizer, [("sft", good, dict(steps=cfg.sft_steps, batch_size=cfg.batch_size, lr=1e-3, warmup=20, weight_decay=0.1))], shape)

    def accuracy(policy, ref, group, some):
        """Implied rewards of some rows: mean margin and accuracy against 0, each row scored by policy and reference."""
        reference = model.load_policy(ref, device=group.device, dtype=DTYPES[cfg.dtype])
        ratios = score(policy, some, cfg, group.device) - score(reference, some, cfg, group.device)
        up = torch.tensor([r.desirable for r in some])
        mean = lambda x: float(x.mean()) if len(x) else None                                                   # noqa: E731
        good, bad = mean(ratios[up]), mean(ratios[~up])
        return {"logratio_desirable": good, "logratio_undesirable": bad, "margin": None if None in (good, bad) else good - bad,
                "accuracy": float(torch.where(up, ratios > 0, ratios < 0).double().mean()), "n": len(some)}

    def quick(policy, ref, group):
        return {f"eval/{k}": v for k, v in accuracy(policy, ref, group, (held_out or [rows])[0][:512]).items()}

    def report(policy, ref, group, base_seconds, train_seconds):
        out = Path(cfg.out)
        result = {"win_rate": None, "win_rate_ci95": None, "reward": None, "reward_ref": None, "kl": None, "n": 0,
                  "why_null": "files bring no judge; samples.md shows both models' answers side by side",
                  "train": accuracy(policy, ref, group, rows[:1000])}
        if held_out:
            result["eval"] = accuracy(policy, ref, group, held_out[0])
        prompts = list(dict.fromkeys(e.prompt for e in (held_out or [0, 0, 0, feedback])[3] if e.completion.strip()))[:6]
        reference = model.load_policy(ref, device=group.device, dtype=DTYPES[cfg.dtype])
        room = max(1, min(128, cfg.max_len // 4))
        texts = [evaluate.replies(m, tokenizer, prompts, temperature=0.7, seed=cfg.seed, max_new_tokens=room)[0] for m in (reference, policy)]
        evaluate.write_samples(out / "samples.md", [evaluate.prompt_text(p) for p in prompts], *texts)
        metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
        evaluate.plot_curves(metrics, out / "curves.png")
        result["seconds"] = {"base": base_seconds, "align": train_seconds}
        (out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
        for key in ("train", "eval"):
            if key in result:
                r = result[key]
                n = lambda x: "none of them" if x is None else f"{x:+.3f}"                                       # noqa: E731
                group.say(f"{key} rows ({r['n']}): log pi/pi_ref of desirable {n(r['logratio_desirable'])}, undesirable {n(r['logratio_undesirable'])}, "
                          f"margin {n(r['margin'])} nats, on the right side of 0: {r['accuracy']:.1%}")
        group.say(f"seconds: {train_seconds:.0f}\nfiles:   {out}/curves.png, samples.md, eval.json, metrics.jsonl, model/")

    hint = data.cut_hint(feedback, cfg.add_eot)
    return dict(tokenizer=tokenizer, rows=rows, counts=counts, format=name, story=f"task: {cfg.data}", hint=hint,
                base=None if cfg.model else base, quick=quick, report=report)


if __name__ == "__main__":
    main()

"""How fast, beside what the hardware allows and beside TRL: `python bench.py [CASE ...] [--quick]`; `python bench.py scaling`.

Every case prints a row and appends a line to results/bench.jsonl. A case is named by what it is, so any combination can be asked for:

    kto-64-64             one KTO step; mean prompt 64 tokens, mean response 64, log-normal; GPT-2 shape, 6 layers, d = 384, V = 512, fp32
    dpo-256-64-50k-bf16   pairs; V = 50257; bf16 autocast.   -llama: a Llama config behind HFPolicy.   -124m: GPT-2's own size and vocabulary
    score-64-64           the reference pass and evaluation: log-probs of y and of y' without gradient
    epoch-kto             one epoch from text to trained weights: loading, tokenising and reference pass included
    generate              16 prompts, temperature 1: beside transformers' generate and beside no cache
    memory-kto-256-256-50k  peak of two steps on rows of equal lengths, each variant in a process of its own, in MB above what it had imported
    kto-512-512-8b-bf16-lora-checkpoint-compile   Llama-3-8B's shape; rank 16; recomputed activations; torch.compile: words for a GPU, any of them

Policy and reference are random; TRL loads the same weights and gets the same rows and mismatched pairs, with gradient checkpointing off. Variants
take turns batch by batch in one process, and a ratio is the median of the ratios per batch. Time is CPU time (CUDA events on a GPU), which other
processes disturb less; how much they still do is the `spread` of one matmul, repeated all along. That matmul is also the peak of `of limit`: FLOPs
that the step cannot do without / (peak * seconds). On a GPU: python bench.py kto-256-256-124m-bf16-compile --tokens 16384 --micro 32
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import train                                                     # before torch: it says how waiting threads wait

import numpy as np
import torch
from tqdm import tqdm

import data
import dpo_variants
import kto
import model

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
RESULTS = Path(__file__).parent / "results"
FULL = [f"{kind}-{shape}" for kind in ("kto", "dpo") for shape in ("64-64", "256-64", "64-256", "256-256")] + [
    "kto-64-64-bf16", "dpo-64-64-bf16", "kto-64-64-50k", "kto-64-64-50k-bf16", "kto-256-256-50k", "dpo-64-64-50k", "kto-64-64-llama", "dpo-64-64-llama",
    "score-64-64", "score-64-64-50k", "generate", "epoch-kto", "epoch-dpo", "memory-kto-256-256-50k"]
QUICK = ["kto-64-64", "dpo-64-64", "generate"]


# --- the floor: FLOPs that cannot be avoided --------------------------------------------------------------------------

def attention_flops(c, before, *, d, layers):
    """Forward: c queries, each over the `before` tokens in front of them and over themselves up to itself. 4 d per pair: q.k and p.v."""
    return 4 * d * layers * (c * before + c * (c + 1) / 2)


def pass_flops(units, *, trunk, vocab, d, layers):
    """One forward over units of rows that share a prompt, each prompt computed once; only responses meet the head. (backward: twice that)"""
    total = 0
    for unit in units:
        p, responses = unit[0].n_prompt, [len(row.response) for row in unit]
        total += 2 * trunk * (p + sum(responses)) + 2 * vocab * d * sum(responses) + attention_flops(p, 0, d=d, layers=layers)
        total += sum(attention_flops(c, p, d=d, layers=layers) for c in responses)
    return total


def beside_flops(units, **shape):
    """Forward over responses alone, the keys and values of their prompts being there already."""
    return pass_flops(units, **shape) - pass_flops([(replace(u[0], ids=u[0].ids[:u[0].n_prompt]),) for u in units], **shape)


def shape_of(policy):
    """{trunk: matmul weights without embeddings and head, vocab, d, layers} of a GPT or a Hugging Face model."""
    inner = [p.numel() for n, p in policy.named_parameters() if p.dim() == 2 and not any(w in n for w in ("wte", "wpe", "embed", "lm_head"))]
    c = policy.config if isinstance(policy, model.GPT) else policy.lm.config
    d, layers = (c.d_model, c.n_layer) if isinstance(policy, model.GPT) else (c.hidden_size, c.num_hidden_layers)
    return dict(trunk=sum(inner), vocab=policy.vocab_size, d=d, layers=layers)


# --- measuring --------------------------------------------------------------------------------------------------------

def clock(f, device="cpu"):
    """Seconds that f() takes: CPU time of this process, or time between two CUDA events."""
    if torch.device(device).type != "cuda":
        start = time.process_time()
        f()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def matmul_seconds(case, device):
    """Seconds per FLOP at the peak: the fastest of five large matmuls of the case's dtype."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a = torch.ones(n, n, dtype=train.DTYPES[case.dtype] if case.dtype != "bf16" else torch.bfloat16, device=device)
    return min(clock(lambda: a @ a, device) for _ in range(5)) / (2 * n**3)


def out_of_memory(e):
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(e) or "not enough memory" in str(e)


def alternate(variants, batches, timer=clock):
    """{name: seconds per batch} for functions of a batch, in turns; the first batch warms up. A variant that runs out of memory: None."""
    times = {name: [] for name in variants}
    for k, batch in enumerate(batches):
        for name in list(variants)[k % len(variants):] + list(variants)[:k % len(variants)]:           # nobody always goes first
            try:
                if times[name] is not None and (seconds := timer(lambda: variants[name](batch))) and k:
                    times[name].append(seconds)
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
                times[name] = None
    return times


def ratio(a, b):
    """Median of a_i / b_i: how many times as long a takes; None where one of them is missing."""
    return float(np.median(np.array(a) / np.array(b))) if a and b else None


def spread(seconds):
    """(90th percentile - 10th) / median of one thing timed again and again: on an idle machine a few percent."""
    low, mid, high = np.percentile(seconds, [10, 50, 90])
    return float((high - low) / mid)


# --- a case: weights, rows, batches, the same for both sides ------------------------------------------------------------

@dataclass
class Case:
    name: str = ""
    what: str = "step"                            # step, score, epoch, generate or memory
    kind: str = "kto"                             # kto or dpo
    prompt: int = 64                              # mean tokens
    response: int = 64
    size: tuple = (6, 6, 384)                     # layers, heads, d
    vocab: int = 512
    dtype: str = "fp32"
    llama: bool = False
    big: bool = False                             # 8B: Llama-3's MLP and shared keys, bf16 on disk, no second model anywhere, no TRL
    lora: int = 0
    checkpoint: bool = False
    compile: bool = False
    tokens: int = 2048                            # of (x, y) per step, about
    micro: int = 0                                # rows per forward; 0: as many as fit the policy's token budget
    sigma: float = 0.5                            # of the log of the lengths
    new: int = 64                                 # tokens generated

    WORDS = {"kto": {}, "dpo": {"kind": "dpo"}, **{what: {"what": what} for what in ("score", "epoch", "generate", "memory")},
             "50k": {"vocab": 50257}, "bf16": {"dtype": "bf16"}, "fp64": {"dtype": "fp64"}, "llama": {"llama": True}, "124m": {"size": (12, 12, 768), "vocab": 50257},
             "8b": {"llama": True, "big": True, "size": (32, 32, 4096), "vocab": 128256},
             "lora": {"lora": 16}, "checkpoint": {"checkpoint": True}, "compile": {"compile": True}}

    @classmethod
    def named(cls, name, **more):
        words, lengths = [w for w in name.split("-") if not w.isdigit()], [int(w) for w in name.split("-") if w.isdigit()]
        wrong = words[:1] not in (["kto"], ["dpo"], ["score"], ["epoch"], ["generate"], ["memory"]) or not set(words) <= set(cls.WORDS)
        if wrong or len(lengths) not in (0, 2) or 0 in lengths or "lora" in words and not {"llama", "8b"} & set(words):
            raise SystemExit(f"{name}: no such case; e.g. {', '.join(FULL)}, scaling")
        return cls(name, **{k: v for w in words for k, v in cls.WORDS[w].items()} | dict(zip(("prompt", "response"), lengths)) | more)

    @property
    def batch_size(self):
        """Rows, 2 at least, or pairs, 1 at least, of one step."""
        rows = self.tokens // (self.prompt + self.response)
        return max(1, rows // 2) if self.kind == "dpo" else max(2, rows)


def make_models(folder, case, device="cpu"):
    """folder/policy and folder/ref: random weights, and the same with noise on them; so the policy has the flatter distribution and z0 is above 0."""
    torch.manual_seed(0)
    layers, heads, d = case.size
    if case.llama:
        from transformers import AutoModelForCausalLM, LlamaConfig
        c = LlamaConfig(vocab_size=case.vocab, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=7 * d // 2 if case.big else 4 * d,
                        num_key_value_heads=heads // 4 if case.big else heads, max_position_embeddings=4096, tie_word_embeddings=not case.big)
        with torch.device(device):                                                  # 8e9 random numbers take a CPU minutes
            AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16 if case.big else torch.float32).save_pretrained(folder / "policy")
        if case.big:
            return (folder / "ref").symlink_to("policy")
    else:
        model.GPT(model.GPTConfig(case.vocab, 4096, layers, heads, d, bias=True)).save(folder / "policy", eot=case.vocab - 1)
    other = model.load_policy(folder / "policy")
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * torch.randn_like(p)
    other.save(folder / "ref", eot=case.vocab - 1)


def make_units(case, n, seed=0):
    """n units, (row,) or (chosen, rejected), of random tokens; each response ends with the end-of-text V - 1."""
    rng = np.random.default_rng(seed)
    length = lambda mean: int(np.clip(mean * np.exp(case.sigma * rng.standard_normal() - case.sigma**2 / 2), 2, 4 * mean))                   # noqa: E731
    tokens = lambda n: rng.integers(0, case.vocab - 1, n)                                                                                    # noqa: E731
    units = []
    for i in range(n):
        x = tokens(length(case.prompt))
        responses = [[*tokens(length(case.response) - 1), case.vocab - 1] for _ in range(2 if case.kind == "dpo" else 1)]
        units.append(tuple(data.make_row(x, y, desirable=not k if case.kind == "dpo" else bool(i % 2)) for k, y in enumerate(responses)))
    return units


class Alone(train.Group):
    """No progress bars in a table."""

    def bar(self, total, what, initial=0):
        return tqdm(disable=True)


class Ours:
    """nanoKTO's step on the batches of a case. Models are loaded when they are first needed."""

    def __init__(self, case, folder, n_batches, device, *, group=None):
        self.case, self.folder, size = case, folder, case.batch_size
        self.cfg = train.Config(loss=case.kind, ref=str(folder / "ref"), batch_size=size, micro_batch_size=case.micro, steps=n_batches, lr=1e-6, dtype=case.dtype, max_len=4096,
                                lora=case.lora, compile=case.compile)
        self.group, self.units = group or Alone(device=torch.device(device)), make_units(case, size * n_batches)
        loss, hyper, z0 = (dpo_variants.dpo_loss, {"beta": 0.1}, None) if case.kind == "dpo" else (
            kto.kto_loss, {"beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0}, "estimate")
        self.task, self.reference = train.Task(self.cfg, self.group, loss, hyper, z0), train.Reference(self.units, self.cfg, self.group)
        prompts = [u[0].prompt_key for u in self.units]
        self.batches = [data.batch_at(prompts, size, seed=0, step=k) for k in range(n_batches)]

    @cached_property
    def policy(self):
        policy = train.load(str(self.folder / "policy"), self.cfg, self.group, lora=self.case.lora)
        if self.case.checkpoint:
            policy.checkpoint_activations()
        return policy

    @cached_property
    def optimizer(self):
        return train.make_optimizer(self.policy, self.cfg)

    def cache(self):
        """The reference's log-probs of all batches, once; TRL's precomputed variant is given the same numbers."""
        for b in self.batches:
            self.reference.matched(b), self.task.needs_partners and self.reference.mismatched(b)
        return self

    def made_up(self):
        """The log-probs of a reference that finds all tokens equally likely: for the steps alone, without its pass."""
        uniform = lambda units: torch.tensor([[-np.log(self.case.vocab) * len(row.response) for row in u] for u in units], dtype=torch.float64)          # noqa: E731
        self.reference.matched_table = uniform(self.units)
        self.reference.mismatched_tables[0] = uniform(u for b in self.batches for u in self.pairs(b)).flatten()
        return self

    def step(self, batch, **how):
        return train.train_step(self.policy, self.reference, self.optimizer, batch, self.units, self.task, {}, **how)

    def pairs(self, batch):
        """The mismatched pairs (x, y') of a batch; none for pairs."""
        return train.mismatched_units(self.units, batch, self.cfg) if self.task.needs_partners else []

    def score(self, batch):
        for units in ([self.units[i] for i in batch.rows], self.pairs(batch)):
            train.score(self.policy, units, self.cfg, self.group.device)

    def floor(self, batch):
        shape, units = shape_of(self.policy), [self.units[i] for i in batch.rows]
        passes = 1 if self.case.what == "score" else 2 if self.case.lora else 3                  # frozen weights need no gradient
        return passes * pass_flops(units, **shape) + beside_flops(self.pairs(batch), **shape)

    def tokens(self, batch):
        rows = [row for i in batch.rows for row in self.units[i]]
        return sum(len(row.ids) for row in rows), sum(len(row.response) for row in rows)

    def gradients(self):
        """{name as in transformers: gradient, as it is stored there}"""
        if not isinstance(self.policy, model.GPT):
            return {n.removeprefix("lm."): p.grad for n, p in self.policy.named_parameters()}
        return {"transformer." + n: p.grad.t() if n.endswith(model.GPT.TRANSPOSED) else p.grad for n, p in self.policy.named_parameters()}


# --- TRL, where it is installed -----------------------------------------------------------------------------------------

def trl_missing():
    """The line that says how to get TRL, or None where it is there."""
    try:
        import trl                                                                                                     # noqa: F401
        from trl import KTOTrainer                                                                                     # noqa: F401
    except ImportError as e:
        return f"TRL cannot be imported ({e}): nanoKTO is measured alone. To compare: pip install trl==1.16.0"


def word_tokenizer(vocab):
    """Numbers as words: "17 4 230 " <-> [17, 4, 230], so that text and tokens are the same thing on both sides."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=str(vocab - 1), pad_token="0")


def records_of(units):
    """Rows as the text that they came from, without the end-of-text, which both sides add."""
    text = lambda ids: "".join(f"{i} " for i in ids)                                                                   # noqa: E731
    return [{"prompt": text(u[0].ids[:u[0].n_prompt])} | ({"chosen": text(u[0].response[:-1]), "rejected": text(u[1].response[:-1])} if len(u) > 1 else
            {"completion": text(u[0].response[:-1]), "label": u[0].desirable}) for u in units]


class Theirs:
    """TRL's trainer on the same weights: its own collator, forward, loss, backward and optimiser. cached: it computes its reference's log-probs first."""

    def __init__(self, case, folder, records, device, *, cached=False):
        from accelerate.state import AcceleratorState
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PrinterCallback
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        AcceleratorState._reset_state(True)                                            # or the first trainer's precision would be everybody's
        config, trainer = (DPOConfig, DPOTrainer) if case.kind == "dpo" else (KTOConfig, KTOTrainer)
        args = config(output_dir=str(folder / "trl"), per_device_train_batch_size=case.batch_size, gradient_checkpointing=False, bf16=case.dtype == "bf16",
                      use_cpu=torch.device(device).type == "cpu", report_to="none", beta=0.1, max_length=None, learning_rate=1e-6, save_strategy="no",
                      logging_strategy="no", disable_tqdm=True, num_train_epochs=1, dataloader_pin_memory=False, precompute_ref_log_probs=cached)
        load = lambda name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=train.DTYPES[case.dtype])        # noqa: E731
        self.trainer = trainer(model=load("policy"), ref_model=None if cached else load("ref"), args=args, train_dataset=Dataset.from_list(records),
                               processing_class=word_tokenizer(case.vocab))
        self.trainer.remove_callback(PrinterCallback)                                  # no lines in the middle of a table
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)        # as its train() does: bf16 is an autocast around the model's forward
        self.case, self.trainer.current_gradient_accumulation_steps = case, 1

    def inputs(self, ours, batch, cached):
        """One batch through its collator, ours' mismatched responses included."""
        examples = [{"prompt_ids": u[0].ids[:u[0].n_prompt].tolist()} for u in (ours.units[i] for i in batch.rows)]
        ref = ours.reference.matched(batch)
        for k, (e, i) in enumerate(zip(examples, batch.rows)):
            names = ("chosen", "rejected") if self.case.kind == "dpo" else ("completion",)
            e |= {f"{n}_ids": row.response.tolist() for n, row in zip(names, ours.units[i])} | {"label": ours.units[i][0].desirable}
            if cached:
                e |= {"ref_logps": float(ref[k, 0])} if self.case.kind != "dpo" else {f"ref_{n}_logps": float(ref[k, j]) for j, n in enumerate(names)}
        for k, pair in enumerate(ours.pairs(batch)):
            examples[k] |= {"KL_completion_ids": pair[0].response.tolist()} | ({"ref_KL_logps": float(ours.reference.mismatched(batch)[k])} if cached else {})
        return self.trainer.data_collator(examples)

    def step(self, ours, batch, cached, update=True):
        t = self.trainer
        t.precompute_ref_logps = cached
        if t.optimizer is None:
            t.create_optimizer()
        t.optimizer.zero_grad()
        loss = t.training_step(self.model, self.inputs(ours, batch, cached))
        if update:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            t.optimizer.step()
        return float(loss)

    def score(self, ours, batch):
        self.trainer.compute_ref_log_probs(self.model, self.inputs(ours, batch, False))


def apart(ours, theirs, batch):
    """(loss of each, largest relative difference of a tensor's gradient) on one batch, no update and no clipping."""
    clip, ours.cfg.max_grad_norm = ours.cfg.max_grad_norm, 0.0
    mine, trl = ours.step(batch, update=False)["loss"], theirs.step(ours, batch, ours.cfg.dtype != "fp64", update=False)      # its collator has float32 only
    grads, other = ours.gradients(), dict(theirs.model.named_parameters())
    worst = max(float((g - other[n].grad).norm() / g.norm()) for n, g in grads.items() if float(g.norm()) > 0)
    ours.cfg.max_grad_norm = clip
    ours.optimizer.zero_grad(), theirs.trainer.optimizer.zero_grad()
    return mine, trl, worst


# --- cases --------------------------------------------------------------------------------------------------------------

def measure_step(case, device, repeats, with_trl, folder):
    """A step (or a scoring pass) of nanoKTO, of TRL with the reference beside it, and of TRL with precomputed log-probs."""
    ours, matmuls, row = Ours(case, folder, repeats + 1, device), [], {}
    ours.made_up() if case.big else ours.cache()
    theirs = Theirs(case, folder, records_of(ours.units[:8]), device) if with_trl else None
    variants = {"nanokto": ours.score if case.what == "score" else ours.step, "peak": lambda batch: matmuls.append(matmul_seconds(case, device))}
    if theirs and case.what == "score":
        variants["online"] = lambda batch: theirs.score(ours, batch)
    elif theirs:
        variants |= {"online": lambda batch: theirs.step(ours, batch, False), "cached": lambda batch: theirs.step(ours, batch, True)}
        row["loss"], row["loss_trl"], row["gradient_apart"] = apart(ours, theirs, ours.batches[0])
    times = alternate(variants, ours.batches, lambda f: clock(f, device))
    mine, batches, lost = times["nanokto"], ours.batches[1:], [name for name, t in times.items() if t is None]
    row |= {"note": f"out of memory: {', '.join(lost)}" if lost else None, "spread": spread(matmuls), "batches": repeats, "rows": case.batch_size}
    if mine is None:
        return row
    tokens, trained = np.median(np.array([ours.tokens(b) for b in batches]) / np.array(mine)[:, None], axis=0)
    limit = [ours.floor(b) * peak / t for b, peak, t in zip(batches, matmuls[1:], mine)]             # the peak beside every batch: a machine's speed changes
    return row | {"tokens_per_second": float(tokens), "trained_per_second": float(trained), "peak_gflops": 1e-9 / float(np.median(matmuls)),
                  "of_limit": float(np.median(limit)), "seconds": {n: float(np.median(t)) for n, t in times.items() if t and n != "peak"},
                  **{f"vs_{n}": ratio(times[n], mine) for n in ("online", "cached") if n in times}}


def measure_memory(case, device, repeats, with_trl, folder):
    """MB at most, of each variant; nothing is timed."""
    sides = ("nanokto", "micro-batches", *(("TRL online", "TRL cached") if with_trl else ()))
    return {"rows": case.batch_size, "peak_mb": {side: peak_memory(case, side, folder, device) for side in sides}}


def peak_memory(case, side, folder, device):
    """MB above import that two steps on rows of equal lengths take, in a process of its own; or "out of memory"."""
    done = subprocess.run([sys.executable, __file__, case.name, "--peak", side, "--folder", str(folder), "--device", device, "--tokens", str(case.tokens),
                           "--micro", str(1 if side == "micro-batches" else case.micro)], capture_output=True, text=True)
    if done.returncode not in (0, -9):                                                                  # -9: the system killed it
        raise RuntimeError(done.stderr[-2000:])
    words = done.stdout.split()
    return float(words[-1]) if words and words[-1] != "memory" else "out of memory"


def print_peak(case, side, folder, device):
    """What peak_memory starts."""
    if side.startswith("TRL"):                                                                          # imported before: not counted
        import trl.trainer.dpo_trainer, trl.trainer.kto_trainer                                         # noqa: E401, F401
    import transformers.models.gpt2.modeling_gpt2                                                       # noqa: F401
    before, cached = peak_rss(), side == "TRL cached"
    ours = Ours(case, folder, 2, device).made_up()
    try:
        theirs = Theirs(case, folder, records_of(ours.units[:2]), device, cached=cached) if side.startswith("TRL") else None
        for batch in ours.batches:
            theirs.step(ours, batch, cached) if theirs else ours.step(batch)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        return print("out of memory")
    print((torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else peak_rss() - before) / 2**20)


def peak_rss():
    """Bytes at most so far. Not Linux's ru_maxrss, which a child inherits from a large parent: /proc knows this process alone."""
    try:
        return 1024 * next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_epoch(case, device, repeats, with_trl, folder, n=64):
    """A whole run over n rows: text -> tokens -> reference pass -> one epoch, models loaded from their folder; TRL's with its defaults, the reference online."""
    n = max(n, case.batch_size)
    units, matmuls = make_units(case, n), []
    records, tokenizer = records_of(units), data.Tokenizer(word_tokenizer(case.vocab))

    def nanokto(_):
        ours = Ours(case, folder, n // case.batch_size, device)                                         # its batches: the same prompts are the same batches
        found, _ = data.encode([data.parse(r)[1][0] for r in records], tokenizer, max_len=4096)
        ours.units = found if case.kind == "dpo" else [(r,) for r in found]
        ours.reference = train.Reference(ours.units, ours.cfg, ours.group)
        for batch in ours.batches:
            ours.step(batch)

    variants = {"nanokto": nanokto} | ({"online": lambda _: Theirs(case, folder, records, device).trainer.train()} if with_trl else {})
    times = alternate({**variants, "peak": lambda _: matmuls.append(matmul_seconds(case, device))}, range(repeats + 1), lambda f: clock(f, device))
    tokens, mine = sum(len(row.ids) for u in units for row in u), times["nanokto"]
    return {"tokens_per_second": tokens / float(np.median(mine)), "vs_online": ratio(times.get("online"), mine), "spread": spread(matmuls), "rows": n,
            "seconds": {k: float(np.median(v)) for k, v in times.items() if v and k != "peak"}, "note": f"{n} rows, {n // case.batch_size} steps"}


def measure_generate(case, device, repeats, with_trl, folder):
    """New tokens per second at temperature 1: our cache, transformers' generate (left-padded), and the whole row again for every token."""
    from transformers import AutoModelForCausalLM
    prompts = [u[0].ids[:u[0].n_prompt].tolist() for u in make_units(case, case.batch_size)]
    policy, matmuls, new = model.load_policy(folder / "policy", device=device), [], case.new
    lm, width = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32).to(device).eval(), max(map(len, prompts))
    padded, on = (torch.tensor([[0] * (width - len(p)) + row(p) for p in prompts], device=device) for row in (list, lambda p: [1] * len(p)))
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)    # rows do not end early; ours cannot: eot -1

    @torch.no_grad()
    def no_cache(_):
        grown = [list(p) for p in prompts]
        for _ in range(new):
            flat = data.flatten([data.make_row(p, []) for p in grown], device)
            last = torch.tensor(flat.lengths, device=device).cumsum(0) - 1
            token = model.sample(policy(flat.ids, flat.positions, flat.lengths, last), torch.rand(len(grown), device=device).double())
            for p, t in zip(grown, token.tolist()):
                p.append(t)

    times = alternate({"nanokto": lambda _: policy.generate(prompts, eot=-1, max_new_tokens=new), "no_cache": no_cache,
                       "transformers": lambda _: lm.generate(padded, attention_mask=on, **how),
                       "peak": lambda _: matmuls.append(matmul_seconds(case, device))}, range(repeats + 1), lambda f: clock(f, device))
    mine = times["nanokto"]
    row = {"tokens_per_second": len(prompts) * new / float(np.median(mine)), "spread": spread(matmuls), "rows": len(prompts),
           **{f"vs_{n}": ratio(times[n], mine) for n in ("transformers", "no_cache")}}
    return row | {"note": f"{new} new tokens: {row['vs_transformers'] or 0:.2f}x transformers, {row['vs_no_cache'] or 0:.1f}x no cache"}


# --- scaling: cost per token against what the arithmetic says ---------------------------------------------------------------

def step_cost(length, examples, vocab=512, device="cpu", group=None, kind="kto"):
    """(seconds, unavoidable FLOPs) per token of a step of a small model, prompt and response half the length each: the fastest of 3 steps or more,
    all being alike."""
    case = Case(kind=kind, prompt=length // 2, response=length // 2, tokens=length * examples * (2 if kind == "dpo" else 1), vocab=vocab, size=(2, 4, 128), sigma=0.0)
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), case)
        ours = Ours(case, Path(folder), 1 + min(20, max(3, 2**14 // case.tokens)), device, group=group).cache()
        seconds = alternate({"nanokto": ours.step}, ours.batches, lambda f: clock(f, device))["nanokto"]
    tokens = ours.tokens(ours.batches[0])[0]
    return min(seconds) / tokens, ours.floor(ours.batches[0]) / tokens


def ideal(seconds, floor):
    """What would be measured everywhere if the hardware were used as well as where it is used best: in the shape of the floor, nowhere above `seconds`."""
    return floor * (seconds / floor).min()


def data_cost(n):
    """(seconds, bytes) per row: reading a .jsonl of n rows, encoding it as bytes, and pairing every batch of one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        file, before = Path(folder) / "rows.jsonl", peak_rss()
        with open(file, "w") as f:
            f.writelines(json.dumps({"prompt": f"What is {i} and {i % 97}? ", "completion": f"It is {i + i % 97}.", "label": i % 2 == 0}) + "\n" for i in range(n))

        def load():
            rows, _ = data.encode(data.read(file)[0], data.load_tokenizer())
            prompts = [r.prompt_key for r in rows]
            for step in range(data.steps_per_epoch(n, 32)):
                data.batch_at(prompts, 32, seed=0, step=step)

        seconds = clock(load)
    return seconds / n, (peak_rss() - before) / n


def rank_cost():
    """What `scaling` starts under torchrun: prints the CPU seconds per token of all processes together. They wait asleep, so waiting is free."""
    group = train.Group.join("cpu")
    group.bar = Alone.bar.__get__(group)
    cost = group.sum(torch.tensor(step_cost(128, 32, group=group)[0], dtype=torch.float64))
    group.say(float(cost))


def scaling(device, quick, out):
    """results/scaling.png: five panels, the line of the ideal in each; a line of each in `out`."""
    most = 4 if quick else 99
    panels = {"tokens per row (KTO)": ([64, 128, 256, 512, 1024, 2048, 4096], lambda n: step_cost(n, max(2, 4096 // n), device=device)),
              "pairs per batch (DPO)": ([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], lambda n: step_cost(64, n, device=device, kind="dpo")),           # z0 needs 2 rows
              "vocabulary": ([512, 1024, 2048, 4096, 8192, 16384, 32768, 50257], lambda n: step_cost(128, 16, n, device)),
              "rows of data": ([10**3, 10**4, 10**5, 10**6], data_cost),
              "processes": ([1, 2, 4], lambda n: (float(subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n),
                                                                        __file__, "--rank"], capture_output=True, text=True, check=True).stdout.split()[-1]), 1.0))}
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (name, (sizes, cost)) in zip(axes, panels.items()):
        sizes, per = sizes[:most], "row" if name == "rows of data" else "token"
        seconds, floor = (np.array(c) for c in zip(*map(cost, sizes)))
        note = f"{floor[-1]:.0f} bytes per row" if per == "row" else ""
        axis.loglog(sizes, 1e6 * seconds, "o-", label="measured")
        axis.loglog(sizes, 1e6 * ideal(seconds, np.ones(len(sizes)) if per == "row" else floor), "--", color="grey", label="ideal")
        axis.set(xlabel=name, ylabel=f"microseconds of CPU time per {per}", title=note, ylim=(1e6 * seconds.min() / 3, 1e6 * seconds.max() * 3))
        axis.legend(frameon=False)
        print(f"{name:<16}" + "  ".join(f"{n:,}: {1e6 * s:,.0f} us" for n, s in zip(sizes, seconds)) + f"  per {per}  {note}", flush=True)
        append(out, f"scaling: {name}", {"sizes": sizes, "seconds": seconds.tolist(), "floor": floor.tolist(), "per": per}, device)
        figure.savefig(out.parent / "scaling.png", dpi=120)                                   # after every panel: what is done is there
    plt.close(figure)


# --- the table ----------------------------------------------------------------------------------------------------------

COLUMNS = [("case", 22), ("tokens/s", 9), ("trained/s", 10), ("of limit", 9), ("TRL online", 11), ("cached", 8), ("loss apart", 11), ("grad apart", 11), ("spread", 7)]


def line(name, r):
    cell = lambda key, f: f(r[key]) if r.get(key) is not None else "-"                                                 # noqa: E731
    times, apart = "{:.2f}x".format, "{:.0e}".format
    loss = apart(abs(r["loss"] / r["loss_trl"] - 1)) if r.get("loss_trl") else "-"
    cells = [name, cell("tokens_per_second", "{:,.0f}".format), cell("trained_per_second", "{:,.0f}".format), cell("of_limit", "{:.0%}".format),
             cell("vs_online", times), cell("vs_cached", times), loss, cell("gradient_apart", apart), cell("spread", "{:.0%}".format)]
    memory = "peak MB: " + ", ".join(f"{k} {v:,.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in r["peak_mb"].items()) if r.get("peak_mb") else ""
    return "".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, (_, w)) in enumerate(zip(cells, COLUMNS))) + "  " + "  ".join(filter(None, (r.get("note"), memory)))


def machine(device):
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), None) if os.path.exists("/proc/cpuinfo") else None
    gpu = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None
    return {"device": gpu or cpu or platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "commit": train.git_commit(),
            "date": time.strftime("%Y-%m-%d"), "versions": {m: getattr(sys.modules.get(m), "__version__", None) for m in ("torch", "transformers", "trl")}}


def append(out, name, row, device):
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as f:
        f.write(json.dumps({"case": name, **row, **machine(device)}) + "\n")


def bench(names, device, quick, out, *, repeats=None, **of_case):
    """Measure each case, print its row, append its line to `out`. A case out of memory is a row that says so, and the others go on."""
    missing, spreads = trl_missing(), [0.0]
    measure = {"step": measure_step, "score": measure_step, "epoch": measure_epoch, "generate": measure_generate, "memory": measure_memory}
    if missing:
        print(missing)
    print("".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(COLUMNS)))
    for name in names:
        case, times = Case.named(name, **of_case), repeats or (2 if quick else 5)
        with tempfile.TemporaryDirectory() as folder:
            try:
                make_models(Path(folder), case, device)
                row = measure[case.what](case, device, times, not (missing or case.big or case.lora), Path(folder))
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
                row = {"note": "out of memory"}
        print(line(name, row), flush=True)
        torch.cuda.empty_cache()                                                         # the next case, and its other processes, need the room
        spreads.append(row.get("spread", 0.0))
        append(out, name, row, device)
    if max(spreads) > 0.1:
        print(f"a busy machine: one and the same matmul took up to {max(spreads):.0%} more or less time. Ratios are medians over alternating batches and bear it; "
              "tokens/s and the share of the limit bear it less")


def main(argv=None):
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(FULL)}")
    p.add_argument("--quick", action="store_true", help=f"under two minutes: {', '.join(QUICK)}")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--tokens", type=int, help="of prompts and responses per step (default 2048; --quick 1024)")
    p.add_argument("--micro", type=int, default=0, help="rows per forward (default: as many as fit 8192 tokens)")
    p.add_argument("--repeats", type=int, help="batches per variant (default 5; --quick 2)")
    p.add_argument("--out", default=str(RESULTS / "bench.jsonl"))
    p.add_argument("--peak", help=argparse.SUPPRESS)
    p.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    warnings.filterwarnings("ignore")                                                # others' deprecations, in the middle of a table
    torch.set_num_threads(a.threads)
    if a.peak:
        return print_peak(Case.named(a.cases[0], sigma=0.0, tokens=a.tokens, micro=a.micro), a.peak, a.folder, a.device)
    if a.rank:
        return rank_cost()
    names = a.cases or (QUICK if a.quick else FULL)
    cases = [n for n in names if n != "scaling"]
    for name in cases:
        Case.named(name)                                                             # a misspelt one is an error before anything is measured
    if cases:
        bench(cases, a.device, a.quick, Path(a.out), repeats=a.repeats, micro=a.micro, new=8 if a.quick else 64, tokens=a.tokens or (1024 if a.quick else 2048))
    if len(cases) < len(names):
        scaling(a.device, a.quick, Path(a.out))


if __name__ == "__main__":
    main()

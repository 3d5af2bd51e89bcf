"""How fast, beside what the hardware allows and beside TRL.

    python bench.py [CASE ...] [--quick]     each prints a row and appends to results/bench.jsonl
    python bench.py scaling                  results/scaling.png: cost per token against size

A case is named by words, in any combination; WORDS and FLAGS say what each one sets:

    kto-64-64                one KTO step; mean prompt 64 tokens, mean response 64, log-normal
    dpo-256-64-50k-bf16      pairs; a vocabulary of 50257; bf16 autocast
    kto-128-128-even-llama-d256-32k          rows of one length; a Hugging Face model
    epoch-kto                one epoch from text to trained weights
    generate-64-64           64 new tokens, beside transformers' generate
    memory-kto-256-256-50k   peak MB of two steps, each variant in a process of its own
    kto-512-512-8b-bf16-lora-checkpoint-compile        Llama-3-8B's shape: for a GPU

Models are random. Variants take turns step by step in one process; a ratio is the median of the
ratios per step, their time / ours, like with like:

    null            our step / our step: what noise alone does
    online          both ask the reference's model about the batch at every step
    cached          both are given the reference's log-probs
    ... gather      TRL's head sees the labelled positions alone, which it does on GPUs only
    epoch-...       whole runs, the reference's pass included, whenever it is made

Time is CPU time (on a GPU, wall time). One matmul is timed beside each step: it is the peak of
`of limit`: FLOPs that a step cannot do without / (peak * seconds).
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                  TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  HF_DATASETS_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")

import train                                     # before torch: it says how waiting threads wait

import numpy as np
import torch
from tqdm import tqdm

import data
import model
from objective import Reference
from plumbing import huggingface, parallel, rundir, settings, trl_side
from plumbing.plots import figure
from plumbing.run import Run
from plumbing.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results"
CONTEXT = 4096
FULL = """kto-64-64 kto-256-64 kto-64-256 kto-64-64-bf16 kto-64-64-50k kto-64-64-uneven
    dpo-64-64 dpo-256-64 dpo-64-256 dpo-64-64-bf16 dpo-64-64-50k
    kto-128-128-even-llama-d256-32k dpo-128-128-even-llama-d256-32k
    epoch-kto epoch-dpo generate-64-64 memory-kto-256-256-50k""".split()
QUICK = ["kto-64-64", "dpo-64-64", "generate-64-8"]


# --- a case ---------------------------------------------------------------------------------------

@dataclass
class Case:
    what: str = "step"               # step, epoch, generate or memory
    loss: str = "kto"
    prompt: int = 64                 # mean tokens
    response: int = 64
    shape: tuple = (6, 6, 384)       # layers, heads, width
    vocab: int = 512
    llama: bool = False              # a Llama behind HFPolicy in place of our GPT
    big: bool = False                # no room for a second model: no reference, no TRL
    flags: tuple = ()                # of train.py
    tokens: int = 2048               # of the trained rows of a step, about
    sigma: float = 0.5               # of the log of the lengths

    @property
    def batch_size(self):
        rows = max(2, self.tokens // (self.prompt + self.response))
        return rows // 2 if self.loss == "dpo" else rows


KINDS = {"kto": {}, "dpo": {"loss": "dpo"}, "epoch": {"what": "epoch"},
         "generate": {"what": "generate"}, "memory": {"what": "memory"}}
WORDS = KINDS | {
    "50k": {"vocab": 50257}, "32k": {"vocab": 32000}, "llama": {"llama": True},
    "even": {"sigma": 0.0}, "uneven": {"sigma": 1.0}, "d256": {"shape": (4, 8, 256)},
    "124m": {"shape": (12, 12, 768), "vocab": 50257},
    "8b": {"shape": (32, 32, 4096), "vocab": 128256, "llama": True, "big": True}}
FLAGS = {"bf16": "--dtype=bf16", "lora": "--lora=16", "compile": "--compile",
         "checkpoint": "--checkpoint_activations"}


def case_named(name, *flags, **more):
    words = [word for word in name.split("-") if not word.isdigit()]
    lengths = [int(word) for word in name.split("-") if word.isdigit()]
    known = set(words[:1]) <= set(KINDS) and set(words) <= {*WORDS, *FLAGS}
    if not words or not known or len(lengths) not in (0, 2) or 0 in lengths:
        raise SystemExit(f"{name}: no such case; e.g. {', '.join(FULL)}, scaling")
    values = dict(zip(("prompt", "response"), lengths))
    for word in words:
        values |= WORDS.get(word, {})
    flags += tuple(FLAGS[word] for word in words if word in FLAGS)
    return Case(**values, **more, flags=flags)


def make_models(case, folder):
    """folder/policy and folder/ref, of random weights; with the words of `records`."""
    layers, heads, width = case.shape
    for seed, name in enumerate(["policy"] if case.big else ["policy", "ref"]):
        torch.manual_seed(seed)
        if case.llama:
            from transformers import AutoModelForCausalLM, LlamaConfig
            config = LlamaConfig(
                vocab_size=case.vocab, hidden_size=width, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
                intermediate_size=7 * width // 2, max_position_embeddings=CONTEXT)
            with torch.device(parallel.device):  # 8e9 random numbers take a CPU minutes
                lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            lm.save_pretrained(folder / name)
        else:
            shape = model.GPTConfig(case.vocab, CONTEXT, layers, heads, width, bias=True)
            model.GPT(shape).save(folder / name, eot=case.vocab - 1)
        trl_side.word_tokenizer(case.vocab).save_pretrained(folder / name)


def records(case, n):
    """n records of a preference file: random tokens as words, "17 4 230 "."""
    rng = np.random.default_rng(0)

    def text(mean, eot=0):
        length = mean * np.exp(case.sigma * rng.standard_normal() - case.sigma**2 / 2)
        tokens = rng.integers(0, case.vocab - 1, int(np.clip(length, 2, 4 * mean)) - eot)
        return "".join(f"{token} " for token in tokens)

    for i in range(n):
        record = {"prompt": text(case.prompt)}
        if case.loss == "dpo":
            yield record | {"chosen": text(case.response, 1), "rejected": text(case.response, 1)}
        else:
            yield record | {"completion": text(case.response, 1), "label": i % 2 == 1}


class Ours:
    """A run of train.py on a case, right before its first step."""

    def __init__(self, case, folder, steps):
        # A second model would add to the peak; its own log-probs do as well.
        ref = "policy" if case.big or case.what == "memory" else "ref"
        out = tempfile.mkdtemp(dir=folder)
        rows = Path(out) / "rows.jsonl"
        lines = (json.dumps(record) + "\n" for record in records(case, case.batch_size * steps))
        rows.write_text("".join(lines))
        run = self.run = Run(settings.parse([
            "--loss", case.loss, "--model", folder / "policy", "--init", folder / "policy",
            "--ref", folder / ref, "--data", rows, "--out", out, "--max_len", CONTEXT,
            "--max_prompt_len", CONTEXT // 2, "--batch_size", case.batch_size, "--lr", 1e-6,
            "--device", parallel.device, *case.flags]))
        run.find_models()
        run.read()
        run.start()
        run.prepare_units()
        run.count_steps()
        self.objective = run.begin_stage(0, 0)
        self.cached = self.objective.reference
        self.online = None
        self.optimizer = train.make_optimizer(run.policy, run.config)
        torch.set_num_threads(1)                 # a run takes what it can get

    def step(self, step, online=False):
        """online: the reference's model is asked about the batch; else its log-probs are known."""
        run = self.run
        if online and self.online is None:
            self.online = Reference(model=run.load_reference())
        self.objective.reference = self.online if online else self.cached
        train.train_step(run.policy, self.objective, self.optimizer, step, run.config)

    def indices(self, step):
        config = self.run.config
        return data.batch_rows(self.run.n_units, config.batch_size, seed=config.seed, step=step)

    def units(self, step):
        return [self.run.units[i] for i in self.indices(step)]

    def trained(self, step):
        """The units without KTO's mismatched rows."""
        return [unit[:self.run.trained] for unit in self.units(step)]

    def tokens(self, step):
        return sum(len(row.ids) for unit in self.trained(step) for row in unit)

    def floor(self, step):
        """FLOPs of a forward over all rows, and of a backward (twice that) over the trained."""
        shape = shape_of(self.run.policy)
        backward = 1 if self.run.config.lora else 2          # frozen weights need no gradient
        trained = pass_flops(self.trained(step), **shape)
        return pass_flops(self.units(step), **shape) + backward * trained


# --- the floor: FLOPs that cannot be avoided ------------------------------------------------------

def attention_flops(queries, before, *, width, layers):
    """Forward: each query looks at `before` tokens, at the queries in front of it and at itself.

    4 width FLOPs per pair of query and key: q.k and p.v.
    """
    return 4 * width * layers * (queries * before + queries * (queries + 1) / 2)


def pass_flops(units, *, trunk, vocab, width, layers):
    """One forward, each unit's prompt computed once; only responses meet the output head.

    Of the last layer prompts need keys and values only. That is not taken off.
    """
    total = 0
    for unit in units:
        prompt = unit[0].n_prompt
        total += 2 * trunk * prompt + attention_flops(prompt, 0, width=width, layers=layers)
        for row in unit:
            total += 2 * (trunk + vocab * width) * len(row.response)
            total += attention_flops(len(row.response), prompt, width=width, layers=layers)
    return total


def shape_of(policy):
    """trunk: weights of the matmuls, embeddings and head left out."""
    trunk = 0
    for name, p in policy.named_parameters():
        outside = any(word in name for word in ("wte", "wpe", "embed", "lm_head"))
        if p.dim() == 2 and not outside:
            trunk += p.numel()
    if isinstance(policy, model.GPT):
        width, layers = policy.config.d_model, policy.config.n_layer
    else:
        width, layers = policy.lm.config.hidden_size, policy.lm.config.num_hidden_layers
    return dict(trunk=trunk, vocab=policy.vocab_size, width=width, layers=layers)


# --- measuring ------------------------------------------------------------------------------------

def join(device):
    """This process's device, and no progress bars in the middle of a table."""
    parallel.join(device)
    parallel.bar = lambda total, *_: tqdm(total=total, disable=True)


def now():
    """Seconds: CPU time of this process; on a GPU, wall time."""
    if parallel.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def clock(function):
    start = now()
    function()
    return now() - start


def matmul_seconds(case):
    """Seconds per FLOP of the fastest of five large matmuls."""
    n = 8192 if parallel.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if FLAGS["bf16"] in case.flags else torch.float32
    matrix = torch.ones(n, n, dtype=dtype, device=parallel.device)
    return min(clock(lambda: matrix @ matrix) for _ in range(5)) / (2 * n**3)


def alternate(variants, steps):
    """{name: seconds per step} of functions of a step, in turns; step 0 warms up."""
    times = {name: [] for name in variants}
    names = list(variants)
    for step in range(steps):
        first = step % len(names)                # nobody always goes first
        for name in names[first:] + names[:first]:
            times[name].append(clock(partial(variants[name], step)))
    return {name: seconds[1:] for name, seconds in times.items()}


def measure(case, variants, tokens, repeats, floor=None):
    """The row of a case: `variants` in turns; tokens(step) and floor(step) are of one step."""
    matmuls = []
    times = alternate({**variants, "peak": lambda step: matmuls.append(matmul_seconds(case))},
                      repeats + 1)
    del times["peak"]
    ours = times["nanokto"]
    speeds = [tokens(step + 1) / seconds for step, seconds in enumerate(ours)]
    row = {"rows": case.batch_size, "batches": repeats, "tokens_per_second": np.median(speeds),
           "peak_gflops": 1e-9 / np.median(matmuls)}
    if floor:                                    # the peak beside every step: speed changes
        floors = [floor(step + 1) for step in range(repeats)]
        row["of_limit"] = np.median(np.multiply(floors, matmuls[1:]) / ours)
    row["seconds"] = {name: np.median(seconds) for name, seconds in times.items()}
    for name in list(times)[1:]:                 # like with like
        like = times.get("nanokto online", ours) if name.startswith("online") else ours
        row[f"vs_{name}"] = np.median(np.divide(times[name], like))
    return row


# --- what is measured -----------------------------------------------------------------------------

def measure_step(case, repeats, with_trl, folder):
    """A step; and TRL's, with the reference's model or its log-probs, without and with gather."""
    ours = Ours(case, folder, repeats + 1)
    variants = {"nanokto": ours.step, "null": ours.step}
    row = {}
    if with_trl:
        theirs = trl_side.Theirs(case, folder, list(records(case, 8)))
        variants["nanokto online"] = partial(ours.step, online=True)
        variants |= {name: partial(theirs.step, ours, **how)
                     for name, how in trl_side.VARIANTS.items()}
        row = trl_side.apart(ours, theirs)
    return row | measure(case, variants, ours.tokens, repeats, ours.floor)


def measure_epoch(case, repeats, with_trl, folder):
    """A whole run over 64 units, from text to trained weights.

    It reads and tokenises the text, loads the models, asks the reference, and takes every step.
    TRL asks its reference at every step ("online"), or before the first as we do ("cached").
    """
    steps = max(1, 64 // case.batch_size)
    rows = list(records(case, steps * case.batch_size))
    tokens = []

    def nanokto(_):
        ours = Ours(case, folder, steps)
        for step in range(steps):
            ours.step(step)
        tokens.append(sum(ours.tokens(step) for step in range(steps)))

    def theirs(how, _):
        trl_side.Theirs(case, folder, rows, **how).trainer.train()

    variants = {"nanokto": nanokto, "null": nanokto}
    if with_trl:                                 # over 512 words the gather changes nothing
        variants |= {name: partial(theirs, trl_side.VARIANTS[name])
                     for name in ("online", "cached")}
    return measure(case, variants, lambda step: tokens[step], repeats)


def measure_generate(case, repeats, with_trl, folder):
    """New tokens per second: ours, and transformers' generate."""
    from transformers import AutoModelForCausalLM
    prompts = [record["prompt"] for record in records(case, case.batch_size)]
    tokenizer = load_tokenizer(folder / "policy").backend
    padded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    padded = padded.to(parallel.device)
    prompts = tokenizer(prompts)["input_ids"]
    policy = huggingface.load_policy(folder / "policy", device=parallel.device)
    lm = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    lm = lm.to(parallel.device).eval()

    def nanokto(_):
        policy.generate(prompts, eot=-1, max_new_tokens=case.response)   # nobody ends early

    def transformers(_):
        lm.generate(**padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    min_new_tokens=case.response, max_new_tokens=case.response, pad_token_id=0)

    variants = {"nanokto": nanokto, "transformers": transformers}
    return measure(case, variants, lambda step: len(prompts) * case.response, repeats)


def measure_memory(case, repeats, with_trl, folder):
    """Peak MB of each variant, in a process of its own; nothing is timed."""
    peaks = {}
    for side in ["nanokto", "TRL online", "TRL cached"][:3 if with_trl else 1]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peak = pool.submit(peak_of, case, side, folder, str(parallel.device))
            peaks[side] = peak.result()
    said = ", ".join(f"{side} {peak}" for side, peak in peaks.items())
    return {"rows": case.batch_size, "peak_mb": peaks, "note": f"peak MB: {said}"}


def peak_of(case, side, folder, device):
    """MB that two steps take above what was imported."""
    join(device)
    load_tokenizer(folder / "policy")            # imports transformers, which is not counted
    if side != "nanokto":
        trl_side.import_all()
    before = peak_rss()
    if side == "nanokto":
        ours = Ours(case, folder, 2)
        for step in range(2):
            ours.step(step)
    else:
        rows = list(records(case, 2 * case.batch_size))
        trl_side.Theirs(case, folder, rows, cached=side == "TRL cached").trainer.train()
    if parallel.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round((peak_rss() - before) / 2**20)


def peak_rss():
    """Bytes at most so far. /proc knows this process alone; Linux's ru_maxrss is inherited."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss        # macOS


# --- scaling: cost per token against what the arithmetic says -------------------------------------

def step_cost(length, examples, vocab=512, loss="kto"):
    """(seconds, unavoidable FLOPs) per token of a small model's step: the fastest of some."""
    rows = examples * (2 if loss == "dpo" else 1)
    case = Case(loss=loss, prompt=length // 2, response=length // 2, vocab=vocab, sigma=0.0,
                shape=(2, 4, 128), tokens=length * rows)
    steps = 1 + min(20, max(3, 2**14 // case.tokens))
    with tempfile.TemporaryDirectory() as folder:
        make_models(case, Path(folder))
        ours = Ours(case, Path(folder), steps)
        seconds = min(alternate({"nanokto": ours.step}, steps)["nanokto"])
    return seconds / ours.tokens(0), ours.floor(0) / ours.tokens(0)


def ideal(seconds, floor):
    """The cost if every size used the hardware as well as the best one: the floor's shape."""
    return floor * (seconds / floor).min()


def scaling(quick, out):
    """Two panels, each with the line of the ideal; a line of `out` for each."""
    panels = [
        ("tokens per row (KTO)", 2 ** np.arange(6, 13), lambda n: step_cost(n, max(2, 4096 // n))),
        ("vocabulary", [*2 ** np.arange(9, 16), 50257], lambda n: step_cost(128, 16, n))]
    picture, axes = figure(len(panels), 5.6, 4.0)
    for axis, (name, sizes, cost) in zip(axes, panels):
        sizes = [int(size) for size in sizes[:4 if quick else None]]
        seconds, floor = np.array([cost(size) for size in sizes]).T
        best = ideal(seconds, floor)
        axis.loglog(sizes, 1e6 * seconds, "o-", label="measured")
        axis.loglog(sizes, 1e6 * best, "--", color="grey", label="ideal: proportional to FLOPs")
        axis.set(xlabel=name, ylabel="microseconds of CPU time per token",
                 ylim=(5e5 * seconds.min(), 2e6 * seconds.max()),
                 title=f"at most {(seconds / best).max():.2f} times the ideal")
        heights = [y for y in (10, 20, 50, 100, 200, 500, 1000, 2000)
                   if 5e5 * seconds.min() < y < 2e6 * seconds.max()]
        axis.set_xticks(sizes[::2], [f"{size:,}" for size in sizes[::2]])
        axis.set_yticks(heights, [str(y) for y in heights])
        axis.minorticks_off()
        axis.legend(frameon=False)
        costs = ", ".join(f"{size:,}: {1e6 * x:,.0f} us" for size, x in zip(sizes, seconds))
        print(f"{name:<22}{costs} per token", flush=True)
        append(out, f"scaling: {name}",
               {"sizes": sizes, "seconds": seconds.tolist(), "floor": floor.tolist()})
        picture.savefig(out.parent / "scaling.png", dpi=120)  # after every panel


# --- the table ------------------------------------------------------------------------------------

RATIOS = ("null", "online", "cached", "online gather", "cached gather", "transformers")
COLUMNS = {"tokens/s": ("tokens_per_second", "{:,.0f}"), "GFLOP/s": ("peak_gflops", "{:,.0f}"),
           "of limit": ("of_limit", "{:.0%}"),
           **{name: (f"vs_{name}", "{:.2f}x") for name in RATIOS},
           "loss apart": ("loss_apart", "{:.0e}"), "grad apart": ("gradient_apart", "{:.0e}")}
MEASURE = {"step": measure_step, "epoch": measure_epoch, "generate": measure_generate,
           "memory": measure_memory}


def line_of(name, row):
    cells = [form.format(row[key]) if key in row else "-" for key, form in COLUMNS.values()]
    return name.ljust(32) + "".join(cell.rjust(14) for cell in cells) + "  " + row.get("note", "")


def append(out, name, row):
    """A line of results: the row, and the machine that it was measured on."""
    device = platform.processor() or platform.machine()
    if parallel.device.type == "cuda":
        device = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        _, _, after = Path("/proc/cpuinfo").read_text().partition("model name\t: ")
        device = after.partition("\n")[0] or device
    versions = {name: getattr(sys.modules.get(name), "__version__", None)
                for name in ("torch", "transformers", "trl")}
    where = {"device": device, "commit": rundir.commit(), "date": time.strftime("%Y-%m-%d"),
             "versions": versions}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        print(json.dumps({"case": name, **row, **where}), file=file)


def bench(names, out, *flags, repeats=5, **of_case):
    """Measure each case, print its row, append its line to `out`."""
    missing = trl_side.missing()
    if missing:
        print(missing)
    print("case".ljust(32) + "".join(title.rjust(14) for title in COLUMNS))
    for name in names:
        case = case_named(name, *flags, **of_case)
        with_trl = not (missing or case.big or FLAGS["lora"] in case.flags)
        with tempfile.TemporaryDirectory() as folder:
            make_models(case, Path(folder))
            row = MEASURE[case.what](case, repeats, with_trl, Path(folder))
        print(line_of(name, row), flush=True)
        append(out, name, row)
        torch.cuda.empty_cache()                 # other processes of the next case need the room


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(FULL)}")
    add("--quick", action="store_true", help=f"a few minutes: {', '.join(QUICK)}")
    add("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    add("--tokens", type=int, default=2048, help="of the trained rows of a step")
    add("--micro", type=int, default=0, help="units per forward (0: as many as fit 8192 tokens)")
    add("--out", type=Path, default=RESULTS / "bench.jsonl")
    a = parser.parse_args(argv)
    warnings.filterwarnings("ignore")            # others' deprecations, in the middle of a table
    torch.set_num_threads(1)                     # CPU time counts those of all threads
    join(a.device)
    names = a.cases or (QUICK if a.quick else FULL)
    cases = [name for name in names if name != "scaling"]
    for name in cases:
        case_named(name)                         # a misspelt one ends before anything is measured
    if cases:
        repeats = 2 if a.quick else 5
        bench(cases, a.out, f"--micro_batch_size={a.micro}", repeats=repeats, tokens=a.tokens)
    if "scaling" in names:
        scaling(a.quick, a.out)


if __name__ == "__main__":
    main()

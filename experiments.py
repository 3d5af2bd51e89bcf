"""The papers' claims as runs on a world whose optimum is known; and every objective in one table.

    python experiments.py                     every claim, its last verdict and what it cost: the README's table
    python experiments.py NAME ...            runs those; `all`: every one. Runs that are there already are not repeated
    python experiments.py --quick             one short seed of every arm and the exact checks: does it all work? Its verdict is never more than that
    python experiments.py methods [--table]   every objective with its tuned settings, 3 seeds; `objectives`: the table of papers and ideas

A claim is one function below: the claim in words, its source, its arms, what is compared, a picture. An arm is one command line of train.py
(`results/runs.json` has its numbers, seed by seed), and claims share arms. A check is a difference between arms, paired by seed (equal seed:
equal base model, data and evaluation), with a 95 % t interval over seeds; its verdict is computed: `holds` if the whole interval says so,
`does not hold here` if the whole interval says the opposite, else `undecided`. A claim holds if all its checks do.

What a 151,000-weight model on a grammar cannot test: anything about scale (that KTO catches up with DPO at 13B and more, that large models need
no SFT), about human or GPT-4 judges, about reasoning and code benchmarks (GSM8K, HumanEval), and learning rates in absolute terms. Where the
world's exact optimum answers a question without training, the claim uses that too and says "exact".
"""

import argparse
import contextlib
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")                              # arms run side by side, each on one core

import numpy as np
import torch
from tqdm import tqdm

import data
import dpo_variants
import evaluate
import kto
import model
import ppo
import train
import world

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")     # Okabe and Ito


# --- an arm: one run of train.py ------------------------------------------------------------------------------------------

class Arm(NamedTuple):
    """`train.py --loss LOSS FLAGS` on preferences `on` (a key of DATA; "world": the embedded run with all its defaults), from the SFT or the pretrained model."""
    loss: str
    flags: tuple = ()
    on: str = "pairs"
    start: str = "sft"

    @property
    def key(self):
        return " ".join([self.loss, *(f"--{k} {v}" for k, v in self.flags)]) + f" | {self.on}" * (self.on != "pairs") + f" | {self.start}" * (self.start != "sft")


def arm(loss, on="pairs", start="sft", **flags):
    if loss == "kto":
        flags = {"z0": "zero"} | flags                                     # what the default estimate is clamped to here (the claim z0_zero), at less cost
    return Arm(loss, tuple(flags.items()), on, start)


COMMON = dict(lr=5e-4, steps=150)                                          # of all arms, unless they say otherwise; 16 pairs or 32 labels per step
N = 4000                                                                   # pairs


def likes_length(seed, base):
    """The same replies, judged by somebody who gives 0.12 points for every word above 16."""
    rng, rows = random.Random(f"length {seed}"), []
    for p in world.pairs(N, seed):
        scored = [(world.utility(p["prompt"], y) + 0.12 * (len(y.split()) - 16) - math.log(rng.expovariate(1.0)), y) for y in (p["chosen"], p["rejected"])]
        rows.append({"prompt": p["prompt"], "chosen": max(scored)[1], "rejected": min(scored)[1]})
    return rows


def own_replies(seed, base):
    """Pairs of the reference model's own replies, judged by the same annotator."""
    prompts, rng = world.eval_prompts("train", N, seed=seed), random.Random(f"own {seed}")
    policy, tokenizer = model.load_policy(base), data.load_tokenizer(base)
    both = [evaluate.replies(policy, tokenizer, prompts, seed=[seed, 11, k])[0] for k in (0, 1)]
    scored = [sorted(((world.utility(p, y) - math.log(rng.expovariate(1.0)), y) for y in ys), reverse=True) for p, *ys in zip(prompts, *both)]
    return [{"prompt": p, "chosen": s[0][1], "rejected": s[1][1]} for p, s in zip(prompts, scored) if s[0][1] != s[1][1] and s[1][1]]


def never_said(seed, base):
    """Rejected replies that no policy would write: an ordinary reply, its words shuffled; any ordinary reply is chosen."""
    rng = random.Random(f"shuffled {seed}")
    return [{"prompt": p["prompt"], "chosen": ys[0], "rejected": " ".join(rng.sample(ys[1].split(), len(ys[1].split())))}
            for p in world.pairs(N, seed) for ys in [rng.sample([p["chosen"], p["rejected"]], 2)]]


DATA = {   # name -> (seed, the base model's folder, number in the name) -> rows
    "pairs": lambda seed, base: world.pairs(N, seed),
    "flip": lambda seed, base, share: world.pairs(N, seed, flip=share),
    "desirable": lambda seed, base, share: world.keep_class(world.thumbs(world.pairs(N, seed), seed), desirable=share, seed=seed),
    "undesirable": lambda seed, base, share: world.keep_class(world.thumbs(world.pairs(N, seed), seed), undesirable=share, seed=seed),
    "native": lambda seed, base: world.native_thumbs(2 * N, seed),
    "expert": lambda seed, base: [{"prompt": p, "completion": y, "label": True} for p, y in world.dialogues(world.N_EXPERT, seed + 2, "expert")],
    "likes length": likes_length, "own replies": own_replies, "never said": never_said,
}


def rows_file(on, seed, base, out, quick):
    """The arm's preferences as a file, written once."""
    path = out / f"{slug(on)}-seed{seed}.jsonl"
    name, *share = re.match(r"(.*?)(?: ([\d.]+))?$", on).groups()
    if not path.exists():
        rows = DATA[name](seed, base, *(float(x) for x in share if x))[:200 if quick else None]
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(beside, path)
    return path


def slug(text):
    return re.sub(r"[^\w.]+", "-", text).strip("-")


@lru_cache(maxsize=None)
def base_model(seed, start, out, quick):
    """The embedded world's SFT or pretrained model of this seed: what the run itself would make."""
    short = ["--pretrain_steps", 30, "--sft_steps", 30] if quick else []
    cfg, *_ = train.settings(["--seed", seed, "--out", out / "x", *short, *(["--sft_steps", 0] if start == "pretrain" else [])])
    return train.base_model(cfg, train.Group(), train.world_source(cfg, False, {}))


def command(a, seed, folder, quick):
    """The arm's command line."""
    out, flags = folder.parent, dict(a.flags)
    like = train.RECIPES.get(a.loss, {}).get("loss", a.loss.split("+")[0].split("*")[-1].strip())
    if flags.get("reward") == "rm":
        flags["reward"] = out / f"rm-world-seed{seed}" / "model"
    argv = ["--loss", a.loss, "--seed", seed, "--out", folder, "--overwrite", "--log_every", 50, "--save_every", 10**6]
    if a.on == "world":
        flags |= {"steps": 2, "pretrain_steps": 30, "sft_steps": 30} | ({"batch_size": 32} if a.loss == "ppo" else {}) if quick else {}
    else:
        base = base_model(seed, a.start, out, quick)
        flags = world.SETTINGS.get(like, {}) | world.SETTINGS.get(a.loss, {}) | COMMON | {"batch_size": 16 if train.is_paired(train.signature(train.find_loss(a.loss))[0]) or a.loss == "spin" else 32} | flags
        flags |= {"steps": 4} if quick else {}
        argv += ["--model", base, "--data", rows_file(a.on, seed, base, out, quick)]
    return [str(x) for x in [*argv, *(word for k, v in flags.items() for word in (f"--{k}", v))]]


def run_arm(a, seed, out, quick=False):
    """Train, then measure on held-out questions against the SFT model of this seed.   -> the run's numbers, or {"failed": why}"""
    folder, clock = out / f"{slug(a.key)}-seed{seed}", time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{folder.name}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if dict(a.flags).get("reward") == "rm":
            with train.locked(out / f"rm-seed{seed}.lock"):                # arms of one seed share the reward model
                if not (out / f"rm-world-seed{seed}" / "eval.json").exists():
                    train.main(command(Arm("rm", on="world"), seed, out / f"rm-world-seed{seed}", quick))
        argv = command(a, seed, folder, quick)
        try:
            train.main(argv)
        except SystemExit as e:
            return {"seed": seed, "failed": str(e.code)}
        sft = base_model(seed, "sft", out, quick)
        policy, reference, tokenizer = model.load_policy(folder / "model"), model.load_policy(sft), data.load_tokenizer(sft)
        n = 24 if quick else 480
        run = numbers(policy, reference, tokenizer, seed, n, own=a.loss == "kto")
        if stages := sorted(folder.glob("stage-[0-9]")):
            run["stages"] = [numbers(model.load_policy(stage), reference, tokenizer, seed, n) for stage in stages]
    log = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    if raw := [m["z0_raw"] for m in log if m.get("z0_raw") is not None]:
        run |= {"z0_raw": float(np.mean(raw[-50:])), "clamped": float(np.mean(np.array(raw) <= 0))}
    if curve := [{"step": m["step"] + 1, **{k: m[f"eval/{k}"] for k in ("reward", "kl", "win_rate", "malformed")}} for m in log if "eval/kl" in m]:
        run["curve"] = curve
    seconds = json.loads((folder / "eval.json").read_text())["seconds"]
    return {"seed": seed, **run, "align_cpu": seconds["align_cpu"], "cpu": time.process_time() - clock, "commit": train.git_commit()}


def numbers(policy, reference, tokenizer, seed, n, own=False):
    """What an arm is judged by. d_*: mean change of log pi of 400 held-out pairs; mismatched, own: mean and sd of log-ratios, for z0."""
    r, cpu, cfg = evaluate.evaluate_world(policy, reference, tokenizer, seed=seed, n=n), torch.device("cpu"), train.Config()
    units, _ = data.encode((data.Pair(**p) for p in world.pairs(400 if n > 100 else 20, seed + 3, part="report")), tokenizer, max_len=80, max_prompt_len=60)
    moved = (train.score(policy, units, cfg, cpu) - train.score(reference, units, cfg, cpu)).mean(0)
    found = {k: r[k] for k in ("win_rate", "reward", "reward_ci95", "kl", "malformed", "length", "right", "rude")}
    found |= {"reward_ref": r["reward_ref"], "best": r["optimum_at_same_kl"]["reward"], "d_chosen": float(moved[0]), "d_rejected": float(moved[1])}
    if own:
        chosen = [u[0] for u in units]
        partners = data.mismatch([row.prompt_key for row in chosen])
        for name, rows in (("mismatched", [data.mismatched(chosen[i], chosen[j], 80) for i, j in enumerate(partners)]),
                           ("own", evaluate.replies(policy, tokenizer, world.eval_prompts("report", n), seed=[seed, 5])[1])):
            ratios = (train.score(policy, [(row,) for row in rows], cfg, cpu) - train.score(reference, [(row,) for row in rows], cfg, cpu))[:, 0]
            found[name] = [float(ratios.mean()), float(ratios.std())]
    return found


# --- numbers to verdicts --------------------------------------------------------------------------------------------------

T975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}         # Student's t, by degrees of freedom


def interval(x):
    """95 % t interval of the mean over seeds.   (n,) -> (mean, low, high)"""
    x = np.asarray(x, float)
    half = T975.get(len(x) - 1, 1.96) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


class Runs:
    """What a claim's arms gave: r("dpo", "kl") is a number for each seed. The methods below make checks: dicts of says, mean, low, high, verdict."""

    def __init__(self, arms, store, seeds):
        self.arms, self.store, self.seeds = arms, store, seeds

    def runs(self, label):
        return [self.store[self.arms[label].key][str(s)] for s in self.seeds]

    def __call__(self, label, key):
        return np.array([run.get(key, math.nan) for run in self.runs(label)], float)

    def more(self, says, difference, by=0.0):
        """Is the mean difference (one number for each seed) above `by`?"""
        mean, low, high = interval(difference)
        return dict(says=says, mean=mean, low=low, high=high, verdict="holds" if low > by else "does not hold here" if high < by else "undecided")

    def alike(self, says, difference, within):
        """Does it lie within +-`within`?"""
        mean, low, high = interval(difference)
        inside, outside = -within < low and high < within, low > within or high < -within
        return dict(says=f"{says}, within {within:g}", mean=mean, low=low, high=high, verdict="holds" if inside else "does not hold here" if outside else "undecided")

    def best(self, labels, key="win_rate"):
        """The label with the best mean (a failed arm is never best)."""
        return max(labels, key=lambda label: np.nan_to_num(self(label, key), nan=-1e9).mean())

    def above_curve(self, label, curve):
        """Reward of an arm minus that of a curve (labels, over beta) at the same KL, seed by seed."""
        kls, rewards = (np.array([self(c, key) for c in curve]).T for key in ("kl", "reward"))
        start = np.array([run["reward_ref"] for run in self.runs(curve[0])])
        at = [np.interp(k, np.r_[0, x[order]], np.r_[u0, y[order]]) for k, x, y, u0 in zip(self(label, "kl"), kls, rewards, start) for order in [np.argsort(x)]]
        return self(label, "reward") - np.array(at)


def exact(says, got, expected, tolerance):
    """A check against a formula: no training, no seeds."""
    return dict(says=f"exact: {says}", mean=float(got), low=float(got), high=float(got), verdict="holds" if abs(got - expected) <= tolerance else "does not hold here")


def solve(loss, n, steps=400):
    """log pi over n replies at the minimum of a population loss of log pi; float64, LBFGS."""
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([x], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        value = loss(torch.log_softmax(x, 0))
        value.backward()
        return value

    search.step(closure)
    return torch.log_softmax(x.detach(), 0)


def table_of_replies(seed, n=6):
    """A random reference over n replies and their utilities, float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(n, generator=draw, dtype=torch.float64), 0), torch.randn(n, generator=draw, dtype=torch.float64)


# --- pictures ---------------------------------------------------------------------------------------------------------------

def dots(ax, r, labels, key, xlabel, mark=None):
    """One line per arm: its seeds and their mean."""
    for i, label in enumerate(labels):
        x = r(label, key)
        ax.scatter(x, [i] * len(x), s=22, color=BLUE, alpha=0.45)
        ax.scatter([x.mean()], [i], s=70, marker="|", color=ORANGE, lw=2.5, zorder=3)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel(xlabel)
    if mark is not None:
        ax.axvline(mark, color=BLACK, lw=0.8, ls=":")


def curve(ax, r, xs, labels, key, label, colour, marker="o"):
    """Mean and standard deviation over seeds against a knob."""
    y = np.array([r(name, key) for name in labels])
    ax.errorbar(xs, y.mean(1), y.std(1, ddof=1) if y.shape[1] > 1 else None, marker=marker, ms=5, color=colour, capsize=3, label=label)


def knob_axis(ax, xs, xlabel):
    """Its values as they are typed, on a log scale."""
    ax.set(xscale="log", xlabel=xlabel)
    ax.set_xticks(xs, [f"{x:g}" for x in xs])
    ax.minorticks_off()


def frontier(ax, kl_max=4.4):
    points = sorted((world.optimum(float(b)) for b in np.geomspace(0.08, 60, 80)), key=lambda p: p.kl)
    ax.plot([p.kl for p in points], [p.utility for p in points], color="#777777", lw=2, label="exact frontier")
    ax.set(xlabel="KL(policy || reference), nats per reply", ylabel="true utility per reply", xlim=(-0.1, kl_max), ylim=(-0.7, 3.6))


def plane(ax, r, series, kl_max=4.4):
    """Arms on the reward-KL plane, under the exact frontier; each series is one objective's curve over its knob."""
    frontier(ax, kl_max)
    for (label, names), colour, marker in zip(series.items(), 2 * COLOURS, "os^Dv*PX<>hp"):
        kl, u = (np.array([r(name, key) for name in names]) for key in ("kl", "reward"))
        order = np.argsort(kl.mean(1))
        ax.plot(kl.mean(1)[order], u.mean(1)[order], marker=marker, ms=6, color=colour, label=label)
        ax.scatter(kl, u, s=8, color=colour, alpha=0.4)


# --- the claims -------------------------------------------------------------------------------------------------------------

CLAIMS = {}


class Claim(NamedTuple):
    says: str
    source: str
    arms: dict
    check: object                                # (Runs, axes) -> checks
    panels: int
    seeds: object                                # how many; None: as many as asked for


def claim(says, source, *, arms={}, panels=1, seeds=None):
    def register(check):
        CLAIMS[check.__name__] = Claim(says, source, arms, check, panels, seeds)
        return check
    return register


BETAS, RATES, FLIPS = (0.1, 0.25, 0.5, 1.0, 2.0), (2e-4, 5e-4, 1e-3, 2e-3), (0.0, 0.1, 0.2, 0.3, 0.4)
BETA_ARMS = {f"{loss} beta {b:g}": arm(loss, beta=b) for loss in ("kto", "dpo") for b in BETAS}
RATE_ARMS = {f"{loss} lr {lr:g}": arm(loss, beta=0.5, **({} if lr == COMMON["lr"] else {"lr": lr})) for loss in ("kto", "dpo") for lr in RATES}
KTO, DPO = BETA_ARMS["kto beta 0.5"], BETA_ARMS["dpo beta 0.5"]


@claim("KTO does at least as well as DPO, though it is not told which two replies form a pair", "Ethayarajh et al. 2024 (2402.01306), 4.1", panels=2,
       arms=BETA_ARMS | RATE_ARMS)
def kto_and_dpo(r, axes):
    """Each at its best beta and learning rate of those tried (the same for both), and both at beta 0.5, lr 5e-4. Allowed: 0.02 less."""
    best = {loss: r.best([x for x in r.arms if x.startswith(loss)]) for loss in ("kto", "dpo")}
    for loss, colour, marker in (("kto", BLUE, "o"), ("dpo", ORANGE, "s")):
        curve(axes[0], r, BETAS, [f"{loss} beta {b:g}" for b in BETAS], "win_rate", loss.upper(), colour, marker)
        curve(axes[1], r, RATES, [f"{loss} lr {lr:g}" for lr in RATES], "win_rate", loss.upper(), colour, marker)
    knob_axis(axes[0], BETAS, "beta (lr 5e-4)")
    knob_axis(axes[1], RATES, "learning rate (beta 0.5)")
    axes[0].set_ylabel("win rate against the reference")
    axes[0].legend(frameon=False)
    return [r.more(f"win rate, KTO's best arm ({best['kto']}) - DPO's best ({best['dpo']}) > -0.02", r(best["kto"], "win_rate") - r(best["dpo"], "win_rate"), by=-0.02),
            r.more("win rate, KTO - DPO > -0.02 at beta 0.5, lr 5e-4", r("kto beta 0.5", "win_rate") - r("dpo beta 0.5", "win_rate"), by=-0.02)]


@claim("A larger beta keeps the policy nearer to the reference", "Rafailov et al. 2023 (2305.18290), Eq. 3; Ethayarajh et al. 2024, 4.3", arms=BETA_ARMS)
def beta(r, axes):
    """And KTO's own optimum hardly depends on it, where DPO's does: its curve over beta is a formula here."""
    for loss, colour, marker, best in (("kto", BLUE, "o", lambda b: world.kto_optimum(b).kl), ("dpo", ORANGE, "s", lambda b: world.dpo_optimum(b).kl)):
        curve(axes[0], r, BETAS, [f"{loss} beta {b:g}" for b in BETAS], "kl", f"{loss.upper()}, 150 steps", colour, marker)
        axes[0].plot(BETAS, [best(b) for b in BETAS], color=colour, ls="--", lw=1, label=f"{loss.upper()}'s exact optimum")
    knob_axis(axes[0], BETAS, "beta")
    axes[0].set(yscale="log", ylabel="KL(policy || reference), nats per reply")
    axes[0].legend(frameon=False)
    spread = lambda f: f(0.1).kl / f(2.0).kl                                                                     # noqa: E731
    return [*(r.more(f"log KL of {loss.upper()} at beta 0.1 - at beta 2 > 0", np.log(r(f"{loss} beta 0.1", "kl")) - np.log(r(f"{loss} beta 2", "kl"))) for loss in ("kto", "dpo")),
            exact("KL at beta 0.1 / KL at beta 2, at DPO's optimum over the same at KTO's (10 times and more)", min(10, spread(world.dpo_optimum) / spread(world.kto_optimum)), 10, 1e-9)]


@claim("KTO wants a learning rate 2 to 10 times DPO's", "Ethayarajh et al. 2024's code and TRL's guide", arms=RATE_ARMS)
def learning_rate(r, axes):
    """At equal weights KTO's gradient on the same pairs is exactly a quarter of DPO's, and Adam does not see a scale. Clipping at norm 1 does."""
    best = {loss: np.log2([RATES[i] for i in np.argmax([r(f"{loss} lr {lr:g}", "win_rate") for lr in RATES], 0)]) for loss in ("kto", "dpo")}
    for loss, colour, marker in (("kto", BLUE, "o"), ("dpo", ORANGE, "s")):
        curve(axes[0], r, RATES, [f"{loss} lr {lr:g}" for lr in RATES], "win_rate", loss.upper(), colour, marker)
    knob_axis(axes[0], RATES, "learning rate (beta 0.5)")
    axes[0].set_ylabel("win rate against the reference")
    axes[0].legend(frameon=False)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    c, rejected = x[:1], x[1:]
    dpo = torch.autograd.grad(dpo_variants.dpo_loss(c, rejected, beta=0.5).mean(), x)[0]
    ours = torch.autograd.grad(kto.kto_loss(torch.cat([c, rejected]), torch.tensor([True, False]), x[:0].detach(), beta=0.5).mean(), x)[0]
    return [r.more("log2(KTO's best rate / DPO's best rate) >= 1", best["kto"] - best["dpo"], by=1 - 1e-9), exact("DPO's first gradient / KTO's", (dpo / ours).mean(), 4, 1e-12)]


@claim("KTO bears losing 90 % of either class, if the lambdas make up for it", "Ethayarajh et al. 2024, 4.2 and Eq. 9", panels=2,
       arms={"all": KTO} | {f"10 % {c}, {name}": arm("kto", on=f"{c} 0.1", beta=0.5, **how) for c in ("desirable", "undesirable")
             for name, how in {"lambda 1": {}, **{f"ratio {x:.3g}": dict(lambda_d="auto", lambda_u="auto", lambda_ratio=x) for x in (1.0, 4 / 3, 1.5)}}.items()}
       | {f"10 % desirable, {name}, lr {lr:g}": arm("kto", on="desirable 0.1", beta=0.5, lr=lr, **how) for lr in (2e-4, 1e-3)
          for name, how in {"lambda 1": {}, "ratio 1.33": dict(lambda_d="auto", lambda_u="auto")}.items()})
def imbalance(r, axes):
    """`ratio`: lambda_d n_d / (lambda_u n_u). Allowed: 0.05 less than with all 8,000 labels. By the exact optimum losing desirables alone would do no
    harm (kto_optimum with lambda_d = 0.1): what breaks is the optimisation, and how badly depends on the learning rate."""
    labels = [x for x in r.arms if "lr" not in x]
    dots(axes[0], r, labels, "win_rate", "win rate against the reference (lr 5e-4)", mark=0.5)
    for name, colour, marker in (("lambda 1", ORANGE, "s"), ("ratio 1.33", BLUE, "o")):
        some = [f"10 % desirable, {name}" + (f", lr {lr:g}" if lr != 5e-4 else "") for lr in (2e-4, 5e-4, 1e-3)]
        curve(axes[1], r, (2e-4, 5e-4, 1e-3), some, "win_rate", f"10 % of the desirable, {name}", colour, marker)
    knob_axis(axes[1], (2e-4, 5e-4, 1e-3), "learning rate")
    axes[1].set_ylabel("win rate against the reference")
    axes[1].legend(frameon=False)
    out = []
    for c in ("desirable", "undesirable"):
        best = r.best([x for x in labels if x.startswith(f"10 % {c}, ratio")])
        out += [r.more(f"win rate, {best} - all labels > -0.05", r(best, "win_rate") - r("all", "win_rate"), by=-0.05),
                r.more(f"win rate with 10 % {c}, {best.split(', ')[1]} - lambda 1 > 0", r(best, "win_rate") - r(f"10 % {c}, lambda 1", "win_rate"))]
    return out


@claim("DPO lowers the chosen answer too; DPOP and an SFT term cure it", "Pal et al. 2024 (2402.13228); Razin et al. 2024 (2410.08847)",
       arms={"DPO": DPO, "KTO": KTO, "DPOP": arm("dpop"), "APO-zero": arm("apo_zero", beta=0.5), "APO-down": arm("apo_down", beta=0.5), "DPO + SFT": arm("dpo + 1*sft", beta=0.5),
             "IPO": arm("ipo", tau=0.1), "SimPO": arm("simpo")})
def displacement(r, axes):
    """Mean change of log pi over 400 held-out pairs, in nats per reply."""
    for i, label in enumerate(r.arms):
        for key, colour, marker in (("d_chosen", BLUE, "o"), ("d_rejected", ORANGE, "s")):
            axes[0].scatter(r(label, key), [i] * len(r.seeds), color=colour, marker=marker, s=28, label=key.replace("d_", "") if i == 0 else None)
    axes[0].set_yticks(range(len(r.arms)), list(r.arms))
    axes[0].set_xscale("symlog", linthresh=1)
    axes[0].axvline(0, color=BLACK, lw=0.8, ls=":")
    axes[0].set(xlabel="change of log pi(reply), nats (linear within +-1)", ylim=(len(r.arms) - 0.5, -0.5))
    axes[0].legend(frameon=False)
    return [r.more("DPO: -(change of log pi(chosen)) > 0", -r("DPO", "d_chosen")),
            *(r.more(f"{name}: change of log pi(chosen) - DPO's > 0", r(name, "d_chosen") - r("DPO", "d_chosen")) for name in ("DPOP", "DPO + SFT"))]


@claim("z0 can be set to 0 (after SFT)", "a source document of this project, and HALOs' own option", panels=2,
       arms={"zero": KTO, "estimate": arm("kto", beta=0.5, z0="estimate"), "fixed 1.5": arm("kto", beta=0.5, z0=1.5), "on policy": arm("kto", beta=0.5, z0="on_policy")})
def z0_zero(r, axes):
    """`estimate`: the paper's, from mismatched pairs; `on policy`: from the policy's own samples, which is unbiased."""
    dots(axes[0], r, list(r.arms), "win_rate", "win rate against the reference")
    plane(axes[1], r, {name: [name] for name in r.arms}, kl_max=3)
    axes[1].legend(frameon=False, loc="lower right")
    at = {z: world.kto_optimum(0.5, z0=z).win_rate for z in (0.0, "exact")}
    return [*(r.alike(f"win rate, z0 zero - {other}", r("zero", "win_rate") - r(other, "win_rate"), 0.03) for other in ("estimate", "fixed 1.5", "on policy")),
            exact("win rate of KTO's optimum at beta 0.5, z0 = 0 less z0 = KL (within 0.03)", at[0.0] - at["exact"], 0, 0.03)]


@claim("Mismatched pairs estimate z0 = KL(policy || reference)", "Ethayarajh et al. 2024, 3.2 (its estimate of z0)", panels=2,
       arms={"zero": KTO, "on policy": arm("kto", beta=0.5, z0="on_policy"), "zero, no SFT": arm("kto", start="pretrain", beta=0.5)})
def z0_estimate(r, axes):
    """Bias and standard error of both estimates at the end of a run, against the exact KL along sampled replies. Not biased: less than a quarter of the KL off."""
    for i, label in enumerate(r.arms):
        kl, runs = r(label, "kl"), r.runs(label)
        for key, colour, marker in (("mismatched", ORANGE, "s"), ("own", BLUE, "o")):
            axes[0].scatter([run[key][0] for run in runs], [i] * len(runs), color=colour, marker=marker, s=34, label=f"mean over {'mismatched pairs' if key == 'mismatched' else 'own samples'}" if i == 0 else None)
        axes[0].scatter(kl, [i] * len(kl), marker="|", s=160, color=BLACK, lw=2, label="KL" if i == 0 else None)
    axes[0].set_yticks(range(len(r.arms)), [f"policy of\n{x}" for x in r.arms])
    axes[0].set_ylim(len(r.arms) + 0.4, -0.6)
    axes[0].set_xlabel("nats per reply")
    axes[0].legend(frameon=False, loc="lower center", ncol=2)
    sizes = np.array([8, 16, 32, 64, 128, 256, 512])
    for key, colour, marker in (("mismatched", ORANGE, "s"), ("own", BLUE, "o")):
        sd = np.mean([run[key][1] for run in r.runs("on policy")])
        axes[1].loglog(sizes, sd / np.sqrt(sizes), color=colour, marker=marker, label=f"{key}: {sd:.1f} / sqrt(batch)")
    axes[1].set(xlabel="replies per batch", ylabel="standard error of z0 before the clamp, nats")
    axes[1].legend(frameon=False)
    share = lambda label, key: np.array([run[key][0] / run["kl"] - 1 for run in r.runs(label)])                 # noqa: E731
    return [r.alike("mismatched mean / KL - 1, after KTO with z0 = 0", share("zero", "mismatched"), 0.25), r.alike("own samples' mean / KL - 1", share("zero", "own"), 0.25)]


@claim("KTO needs no SFT before it", "Ethayarajh et al. 2024, 4.1 (of 13B and 30B models)", panels=2,
       arms={"after SFT, z0 zero": KTO} | {f"no SFT, z0 {z}": arm("kto", start="pretrain", beta=0.5, z0=z) for z in ("zero", "estimate", 3.0, "on_policy")})
def no_sft(r, axes):
    """Start and reference are the pretrained model; everything is judged against the SFT model. Allowed: 0.05 less. The paper's claim is about large models."""
    dots(axes[0], r, list(r.arms), "win_rate", "win rate against the SFT model", mark=0.5)
    dots(axes[1], r, list(r.arms), "malformed", "share of malformed replies")
    best = r.best([x for x in r.arms if x.startswith("no SFT")])
    return [r.more("win rate without SFT (z0 estimated) - after SFT > -0.05", r("no SFT, z0 estimate", "win_rate") - r("after SFT, z0 zero", "win_rate"), by=-0.05),
            r.more(f"win rate of the best without SFT ({best}) - after SFT > -0.05", r(best, "win_rate") - r("after SFT, z0 zero", "win_rate"), by=-0.05)]


def flip_arm(loss, share):
    on, own = f"flip {share:g}" if share else "pairs", {"ipo": dict(tau=0.1)}.get(loss, dict(beta=0.5))
    smoothing = {"label_smoothing": share} if loss in ("rdpo", "cdpo") and share else {}
    return arm("dpo" if loss in ("rdpo", "cdpo") and not share else loss, on=on, **own, **smoothing)


FLIP_ARMS = {f"{loss} {share:g}": flip_arm(loss, share) for loss in ("kto", "dpo", "cdpo", "rdpo", "ipo") for share in FLIPS}


def flip_curves(r, ax):
    for loss, colour, marker in zip(("kto", "dpo", "cdpo", "rdpo", "ipo"), COLOURS, "os^Dv"):
        curve(ax, r, [100 * s for s in FLIPS], [f"{loss} {s:g}" for s in FLIPS], "win_rate", {"rdpo": "rDPO", "cdpo": "cDPO"}.get(loss, loss.upper()), colour, marker)
    ax.set(xlabel="flipped labels, % (rDPO and cDPO are told)", ylabel="win rate against the reference")
    ax.legend(frameon=False)


@claim("rDPO bears flipped labels that DPO does not", "Chowdhury et al. 2024 (2403.00409)", arms=FLIP_ARMS)
def noise_rdpo(r, axes):
    """rDPO is told the share of flips. cDPO, told the same, is beside it."""
    flip_curves(r, axes[0])
    return [r.more(f"win rate, rDPO - DPO > 0 at {s:.0%} flips", r(f"rdpo {s:g}", "win_rate") - r(f"dpo {s:g}", "win_rate")) for s in (0.2, 0.4)]


@claim("IPO bears noise better than DPO", "Azar et al. 2023 (2310.12036), 5", arms=FLIP_ARMS)
def noise_ipo(r, axes):
    """IPO's margin has a fixed target, so it cannot overfit; with noise that is not the same as doing well."""
    flip_curves(r, axes[0])
    return [r.more(f"win rate, IPO - DPO > 0 at {s:.0%} flips", r(f"ipo {s:g}", "win_rate") - r(f"dpo {s:g}", "win_rate")) for s in (0.2, 0.4)]


@claim("KTO bears noisy labels better than DPO", "Ethayarajh et al. 2024, 4.4 (Theorem 4.2: it may ignore what is hard to learn)", arms=FLIP_ARMS)
def noise_kto(r, axes):
    """Exact: KTO's optimum at ratio 1 does not move under symmetric flips below one half, since c(y) only scales. A run's does."""
    flip_curves(r, axes[0])
    a, b = (world.kto_optimum(0.5, flip=f) for f in (0.0, 0.4))
    return [*(r.more(f"win rate, KTO - DPO > 0 at {s:.0%} flips", r(f"kto {s:g}", "win_rate") - r(f"dpo {s:g}", "win_rate")) for s in (0.2, 0.4)),
            exact("utility of KTO's optimum with 40 % flips less without", b.utility - a.utility, 0, 1e-9)]


@claim("Of contradictory labels KTO's optimum follows the majority, where DPO's stops at its log-odds", "Ethayarajh et al. 2024, 4.4 (Theorem 4.3)")
def contradictory(r, axes):
    """Exact, by minimising population losses of a table with two replies (three random references): the share p of annotators prefer a to b."""
    shares, kept, margins = np.linspace(0.55, 0.95, 9), [], []
    for seed in range(3):
        ref, _ = table_of_replies(seed, 2)
        for p in shares:
            dpo = solve(lambda logp: p * dpo_variants.dpo_loss(*(logp - ref).split(1), beta=0.5).sum() + (1 - p) * dpo_variants.dpo_loss(*(logp - ref).flip(0).split(1), beta=0.5).sum(), 2)
            margins.append(float(0.5 * ((dpo - ref)[0] - (dpo - ref)[1])) - math.log(p / (1 - p)))
            weights, twice, up = torch.tensor([p, 1 - p, 1 - p, p], dtype=torch.float64), torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False])
            mine = solve(lambda logp: (weights * kto.kto_loss((logp - ref)[twice], up, logp[:0].detach(), beta=0.5)).sum(), 2)
            kept.append((p, float(mine[1].exp()), float(dpo[1].exp() / dpo[0].exp() / (ref[1].exp() / ref[0].exp()))))
    p, lost, ratio = np.array(kept).T
    axes[0].semilogy(p[:9], np.maximum(lost[:9], 1e-12), "o-", color=BLUE, label="KTO: pi(b)")
    axes[0].semilogy(p[:9], ratio[:9], "s-", color=ORANGE, label="DPO: pi(b)/pi(a), over the reference's")
    axes[0].set(xlabel="share of annotators who prefer a to b", ylabel="what is left of reply b (below 1e-12: drawn there)")
    axes[0].legend(frameon=False)
    return [exact("largest pi(b) at KTO's minimum, wherever a has a majority", lost.max(), 0, 1e-3), exact("DPO's beta h - logit(p), largest", np.abs(margins).max(), 0, 1e-5)]


@claim("TDPO2 spends less KL than DPO for the same reward", "Zeng et al. 2024 (2404.11999), 5",
       arms={k: v for k, v in BETA_ARMS.items() if k.startswith("dpo")} | {f"tdpo1 beta {b:g}": arm("tdpo1", beta=b) for b in (0.5, 1.0, 2.0)}
       | {f"tdpo2 beta {b:g}": arm("tdpo2", beta=b) for b in (0.05, 0.1, 0.5, 1.0)})
def tdpo(r, axes):
    """Reward above DPO's curve over beta, at the same KL, seed by seed."""
    series = {name.upper(): [x for x in r.arms if x.startswith(name + " ")] for name in ("dpo", "tdpo1", "tdpo2")}
    plane(axes[0], r, series)
    axes[0].legend(frameon=False, loc="lower right")
    return [r.more("reward of TDPO2 (beta 0.1) - DPO's curve at the same KL > 0", r.above_curve("tdpo2 beta 0.1", series["DPO"])),
            r.more("reward of TDPO2 (beta 0.5) - DPO's curve at the same KL > 0", r.above_curve("tdpo2 beta 0.5", series["DPO"]))]


@claim("SPIN goes on improving where SFT on the same data ends", "Chen et al. 2024 (2401.01335), 6", panels=2,
       arms={"SPIN, lambda 1": arm("spin", on="expert", beta=1.0, stages=4, steps=40), "SPIN, lambda 0.1": arm("spin", on="expert", beta=0.1, stages=4, steps=40),
             "SFT, 40 steps": arm("sft", on="expert", steps=40, lr=1e-3, batch_size=16), "SFT, 160 steps": arm("sft", on="expert", steps=160, lr=1e-3, batch_size=16)})
def spin(r, axes):
    """1,500 replies of an expert. SPIN's step, at its optimum: p' ~ p^(1 - 1/lambda) p_data^(1/lambda). It converges for lambda > 1/2 and runs away
    below, the paper's 0.1 included; short training hides it."""
    for label, colour, marker in (("SPIN, lambda 1", BLUE, "o"), ("SPIN, lambda 0.1", ORANGE, "s")):
        y = np.array([[s["reward"] for s in run["stages"]] + [run["reward"]] for run in r.runs(label)])
        axes[0].errorbar(range(1, y.shape[1] + 1), y.mean(0), y.std(0, ddof=1) if len(y) > 1 else None, marker=marker, color=colour, capsize=3, label=label)
    for label, ls in (("SFT, 40 steps", ":"), ("SFT, 160 steps", "--")):
        axes[0].axhline(r(label, "reward").mean(), color="#777777", ls=ls, label=label)
    axes[0].set(xlabel="iteration of 40 steps", ylabel="true utility per reply", ylim=(-3, 3))
    axes[0].set_xticks(range(1, 5))
    axes[0].legend(frameon=False)
    for lam, colour, marker in ((2.0, GREEN, "^"), (1.0, BLUE, "o"), (0.6, SKY, "v"), (0.4, ORANGE, "s")):
        axes[1].semilogy(range(7), spin_distance(lam, 6), color=colour, marker=marker, label=f"lambda {lam:g}")
    axes[1].set(xlabel="iteration (exact optimum of each)", ylabel="range of log p - log p_data, nats")
    axes[1].legend(frameon=False)
    first = np.array([run["stages"][0]["reward"] for run in r.runs("SPIN, lambda 1")])
    return [r.more("reward, SPIN after 4 iterations - after the first > 0", r("SPIN, lambda 1", "reward") - first),
            r.more("reward, SPIN after 4 iterations - SFT with as many steps > 0", r("SPIN, lambda 1", "reward") - r("SFT, 160 steps", "reward")),
            exact("growth of the distance to the data in an exact iteration at lambda 0.4 (1.5: it runs away)", (spin_distance(0.4, 6)[-1] / spin_distance(0.4, 6)[0]) ** (1 / 6), 1.5, 1e-9)]


def spin_distance(lam, n):
    """Largest less smallest log p_t - log p_data, t = 0..n, on a random table: each step is (1 - 1/lam) log p + (1/lam) log p_data, normalised."""
    p, target = table_of_replies(0)[0], torch.log_softmax(table_of_replies(1)[1], 0)
    out = []
    for _ in range(n + 1):
        out.append(max(float((p - target).max() - (p - target).min()), 1e-16))
        p = torch.log_softmax((1 - 1 / lam) * p + target / lam, 0)
    return out


@claim("Stepwise DPO, easy pairs first, beats DPO on all of them at once", "Kim et al. 2024 (2403.19270), 4", panels=1,
       arms={"DPO": BETA_ARMS["dpo beta 1"], "DPO, beta / 2": DPO, "sDPO, 2 stages": arm("sdpo_stepwise", beta=1.0, steps=75, stages=2)})
def stepwise(r, axes):
    """Exact: two optimal steps of beta are one of beta / 2, so what sDPO adds is a weaker leash."""
    plane(axes[0], r, {name: [name] for name in r.arms}, kl_max=3)
    axes[0].legend(frameon=False, loc="lower right")
    ref, u = table_of_replies(0)
    better = torch.sigmoid(u[:, None] - u)                                  # P(row beats column)

    def dpo(ref, beta):
        return solve(lambda logp: (better * -torch.nn.functional.logsigmoid(beta * ((logp - ref)[:, None] - (logp - ref)))).sum(), 6)

    return [r.more("win rate, sDPO (beta 1, 2 x 75 steps) - DPO (beta 1, 150 steps) > 0", r("sDPO, 2 stages", "win_rate") - r("DPO", "win_rate")),
            r.more("reward of sDPO - the line from the reference over DPO's beta 1 to beta 1/2, at the same KL > 0", r.above_curve("sDPO, 2 stages", ["DPO", "DPO, beta / 2"])),
            exact("two optimal steps of beta 1 less one of beta 1/2, largest log-probability apart", (dpo(dpo(ref, 1.0), 1.0) - dpo(ref, 0.5)).abs().max(), 0, 1e-4)]


DRIFT_ARMS = {k: v for k, v in BETA_ARMS.items() if k.startswith("dpo")} | {"SimPO": arm("simpo"), "SimPO, beta 2": arm("simpo", beta=2.0), "ORPO": arm("orpo"), "CPO": arm("cpo"),
                                                                              "DPO without reference": arm("dpo_reference_free", beta=0.5)}


def drift_of(name, says, source):
    def check(r, axes):
        plane(axes[0], r, {"DPO over beta": [x for x in r.arms if x.startswith("dpo ")], **{x: [x] for x in r.arms if not x.startswith("dpo ")}}, kl_max=8)
        axes[0].legend(frameon=False, loc="lower right")
        return [r.more(f"reward of DPO's curve at the same KL - {name}'s > 0", -r.above_curve(name, [x for x in r.arms if x.startswith("dpo ")]))]
    check.__name__, check.__doc__ = f"drift_{name.lower()}", "Reward below DPO's curve over beta at the same KL: what the missing reference costs."
    return claim(says, source, arms=DRIFT_ARMS)(check)


drift_of("SimPO", "Without a reference SimPO drifts: it pays more KL for the same reward", "source documents, on Meng et al. 2024 (2405.14734)")
drift_of("ORPO", "Without a reference ORPO drifts", "source documents, on Hong et al. 2024 (2403.07691)")
drift_of("CPO", "Without a reference CPO drifts", "source documents, on Xu et al. 2024 (2401.08417)")


@claim("DPO exploits an annotator who likes length; counting per token cures it", "Meng et al. 2024 (2405.14734), 4.2; Liu et al. 2024 (2409.06411)", panels=2,
       arms={"DPO, fair annotator": DPO, "DPO": arm("dpo", on="likes length", beta=0.5), "KTO": arm("kto", on="likes length", beta=0.5),
             "DPO per token": arm("sigmoid_norm", on="likes length"), "LD-DPO": arm("ld_dpo", on="likes length", beta=0.5), "SimPO": arm("simpo", on="likes length")})
def length(r, axes):
    """The annotator gives 0.12 points for each word above 16; true utility knows nothing of it."""
    dots(axes[0], r, list(r.arms), "length", "tokens per reply")
    dots(axes[1], r, list(r.arms), "right", "share of right fixes")
    return [r.more("tokens, DPO with this annotator - with the fair one > 0", r("DPO", "length") - r("DPO, fair annotator", "length")),
            r.more("tokens, DPO - DPO per token > 0", r("DPO", "length") - r("DPO per token", "length")),
            r.more("reward, DPO per token - DPO > 0", r("DPO per token", "reward") - r("DPO", "reward"))]


@claim("Rejected answers that the policy would never write teach it little; its own teach it most", "Tajwar et al. 2024 (2404.14367); D'Oosterlinck et al. 2024 (2408.06266)", panels=2,
       arms={f"{loss.upper()}, {on}": arm(loss, on=on, beta=0.5) for loss in ("dpo", "kto") for on in ("pairs", "own replies", "never said")})
def off_policy(r, axes):
    """`pairs`: from the grammar that the reference was trained on; `own replies`: sampled from the reference; `never said`: rejected ones are shuffled words."""
    dots(axes[0], r, list(r.arms), "reward", "true utility per reply")
    dots(axes[1], r, list(r.arms), "malformed", "share of malformed replies")
    return [c for loss in ("DPO", "KTO") for c in (
        r.more(f"reward, {loss} on pairs - on replies never said > 0", r(f"{loss}, pairs", "reward") - r(f"{loss}, never said", "reward")),
        r.more(f"reward, {loss} on the model's own - on pairs > 0", r(f"{loss}, own replies", "reward") - r(f"{loss}, pairs", "reward")))]


@claim("KTO with a uniform reference saves the reference model and loses little", "Ethayarajh et al. 2024, its memory-saving form",
       arms={"KTO": KTO, "KTO, uniform reference": arm("kto_uniform", lr=3e-4)})
def uniform(r, axes):
    """Allowed: 0.03 less."""
    plane(axes[0], r, {name: [name] for name in r.arms})
    axes[0].legend(frameon=False, loc="lower right")
    return [r.more("win rate, uniform - KTO > -0.03", r("KTO, uniform reference", "win_rate") - r("KTO", "win_rate"), by=-0.03)]


@claim("KTO learns as well from thumbs that never were pairs", "Ethayarajh et al. 2024, 4.2 (one reply per prompt)", arms={"pairs taken apart": KTO, "native thumbs": arm("kto", on="native", beta=0.5)})
def native(r, axes):
    """A thumb up with probability sigmoid(utility), one reply per prompt, as many labels. Allowed: 0.03 less."""
    plane(axes[0], r, {name: [name] for name in r.arms}, kl_max=3)
    axes[0].legend(frameon=False, loc="lower right")
    return [r.more("win rate, native - pairs > -0.03", r("native thumbs", "win_rate") - r("pairs taken apart", "win_rate"), by=-0.03)]


FEEDBACK = {"KTO, 400 steps": arm("kto", on="world"), "DPO, 400 steps": arm("dpo", on="world"), "offline PPO, 400 steps": arm("offline_ppo", on="world"),
            "PPO, 16 steps": arm("ppo", on="world", reward="rm", kl_coef=0.1, steps=16), "KTO, 1600 steps": arm("kto", on="world", steps=1600),
            "DPO, 1600 steps": arm("dpo", on="world", steps=1600), **{f"PPO, 40 steps, kl_coef {k:g}": arm("ppo", on="world", reward="rm", kl_coef=k, steps=40) for k in (0.1, 0.3)},
            "PPO, 80 steps, kl_coef 1": arm("ppo", on="world", reward="rm")}


@claim("PPO gets more out of the same preferences than DPO and KTO", "Xu et al. 2024 (2404.10719), Ivison et al. 2024 (2406.09279)", panels=2, arms=FEEDBACK)
def ppo_dpo_kto(r, axes):
    """8,000 pairs each: PPO's reward model learns from them (about 50 CPU s more), then PPO samples. Compared where alignment takes about as many CPU seconds: 40
    steps of PPO with 1600 of the others, 16 with 400."""
    plane(axes[0], r, {name: [name] for name in r.arms}, kl_max=6)
    axes[0].legend(frameon=False, loc="lower right", fontsize=7)
    for label, colour, marker in zip(r.arms, 2 * COLOURS, "os^Dv*PX<>hp"):
        axes[1].errorbar(r(label, "align_cpu").mean(), r(label, "win_rate").mean(), r(label, "win_rate").std(ddof=1) if len(r.seeds) > 1 else None, color=colour, marker=marker, capsize=3)
    knob_axis(axes[1], (20, 50, 100), "alignment, CPU seconds (PPO: without its reward model)")
    axes[1].set_ylabel("win rate against the reference")
    best = r.best([x for x in r.arms if x.startswith("PPO, 40")])
    return [r.more(f"win rate, {mine} - {theirs} > 0", r(mine, "win_rate") - r(theirs, "win_rate"))
            for mine, others in ((best, ("DPO, 1600 steps", "KTO, 1600 steps")), ("PPO, 16 steps", ("DPO, 400 steps", "KTO, 400 steps"))) for theirs in others]


@claim("Against a learnt reward true reward rises and then falls", "Gao et al. 2023 (2210.10760)",
       arms={"kl_coef 0.05": arm("ppo", on="world", reward="rm", kl_coef=0.05, steps=160, eval_every=8)} | {k.split(", ")[2]: a for k, a in FEEDBACK.items() if "kl_coef" in k})
def overoptimisation(r, axes):
    """Ends of runs over the KL coefficient, on the reporting questions; the run with the smallest one also on its way, on the tuning questions every 8 steps."""
    frontier(axes[0])
    for run, colour in zip(r.runs("kl_coef 0.05"), COLOURS):
        kl, u = (np.array([start, *(point[k] for point in run.get("curve", []))]) for k, start in (("kl", 0.0), ("reward", run["reward_ref"])))
        axes[0].plot(kl, u, ".-", ms=4, lw=0.8, color=colour, label=f"kl_coef 0.05 on its way, seed {run['seed']}")
    ends = sorted(r.arms, key=lambda label: r(label, "kl").mean())
    axes[0].plot([r(x, "kl").mean() for x in ends], [r(x, "reward").mean() for x in ends], "D--", color=BLACK, lw=1.2, ms=6, zorder=3, label="ends of runs, kl_coef 1 to 0.05 (mean)")
    axes[0].set_xlim(-0.1, 9)
    axes[0].legend(frameon=False, loc="lower right", fontsize=8)
    best = r.best(ends, "reward")
    return [r.more(f"true reward rises: {best} - kl_coef 1 > 0", r(best, "reward") - r("kl_coef 1", "reward")),
            r.more(f"... and falls: {best} - kl_coef 0.05 > 0", r(best, "reward") - r("kl_coef 0.05", "reward"))]


def knobs():
    """Every objective with its tuned settings, and with a quarter and four times its main knob."""
    out = {}
    for name in (n for n in (*train.LOSSES, *train.RECIPES) if n not in ("rm", "ppo", "spin", "sdpo_segment", "offline_ppo", "sft")):
        like, own = train.RECIPES.get(name, {}).get("loss", name), train.signature(train.find_loss(name))[1]
        preset = own | world.SETTINGS.get(like, {}) | world.SETTINGS.get(name, {})
        knob = next(k for k in ("beta", "tau", "lam") if k in own)
        short = {"steps": 75} if name == "sdpo_stepwise" else {"ref_every": 40} if name == "tr_dpo" else {}
        out |= {f"{name} {knob} {preset[knob] * f:g}": arm(name, **{knob: preset[knob] * f}, **short) for f in (0.25, 1, 4)}
    return out


@claim("No objective earns more than the exact frontier allows for its KL", "the closed form: Rafailov et al. 2023, Eq. 4, on this world's 135 classes of replies", seeds=1, arms=knobs())
def exact_frontier(r, axes):
    """Every objective at a quarter, once and four times its tuned knob, one seed. Allowed: the upper half of the run's own 95 % interval of the reward."""
    names = list(dict.fromkeys(x.split()[0] for x in r.arms))
    frontier(axes[0])
    shown = dict(zip(("kto", "dpo", "ipo", "tdpo2", "simpo", "nca", "orpo"), zip(COLOURS, "os^Dv*P")))
    for name in names:
        labels = [x for x in r.arms if x.split()[0] == name]
        kl, u = (np.array([r(x, k)[0] for x in labels]) for k in ("kl", "reward"))
        colour, marker = shown.get(name, ("#bbbbbb", "."))
        axes[0].plot(kl, u, marker=marker, ms=6 if name in shown else 4, color=colour, lw=1.2 if name in shown else 0.6, zorder=3 if name in shown else 1,
                     label={"simpo": "SimPO", "tdpo2": "TDPO2"}.get(name, name.upper()) if name in shown else "the others" if name == names[1] else None)
    for label, points, colour in (("IPO's exact optimum, tau 1 to 0.05", [world.ipo_optimum(t) for t in np.geomspace(1, 0.05, 20)], GREEN),
                                  ("KTO's exact optimum, beta 0.1 to 2", [world.kto_optimum(b) for b in (0.1, 0.5, 1.0, 2.0)], BLUE)):
        axes[0].plot([p.kl for p in points], [p.utility for p in points], ls=":", lw=3, color=colour, label=label, zorder=2)
    axes[0].legend(frameon=False, loc="lower right", fontsize=8, ncol=2)
    runs = [run for x in r.arms for run in r.runs(x) if "kl" in run]
    worst = max(run["reward_ci95"][0] - run["best"] for run in runs)
    return [dict(says=f"largest (lower end of a run's reward - frontier at its KL), {len(runs)} runs, <= 0", mean=worst, low=worst, high=worst, verdict="holds" if worst <= 0 else "does not hold here")]


# --- running claims ---------------------------------------------------------------------------------------------------------

def make_runs(claims, seeds, out, store_path, processes, quick):
    """Every arm of these claims that is not in the store yet, `processes` at a time.   -> {arm: {seed: numbers}}, saved after every run"""
    store = json.loads(store_path.read_text()) if store_path.exists() else {}
    jobs = {(a, s) for name in claims for a in CLAIMS[name].arms.values() for s in range(1 if quick else CLAIMS[name].seeds or seeds) if str(s) not in store.get(a.key, {})}
    order = sorted(jobs, key=lambda j: (j[0].on != "world", j[0].key, j[1]))                     # PPO takes longest: first
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool, tqdm(total=len(jobs), unit="run", disable=not jobs) as bar:
        running = {pool.submit(run_arm, a, s, out, quick): (a, s) for a, s in order}
        for done in as_completed(running):
            a, s = running[done]
            try:
                store.setdefault(a.key, {})[str(s)] = done.result()
            except Exception as e:                                                               # one arm's fault is not the others'
                store.setdefault(a.key, {})[str(s)] = {"seed": s, "failed": f"{type(e).__name__}: {e}"}
            if why := store[a.key][str(s)].get("failed"):
                tqdm.write(f"{a.key}, seed {s}: {why}")
            store_path.parent.mkdir(parents=True, exist_ok=True)
            beside = store_path.with_suffix(".tmp")
            beside.write_text(json.dumps({k: dict(sorted(store[k].items())) for k in sorted(store)}, indent=1) + "\n")
            os.replace(beside, store_path)
            bar.update()
    return store


def judge(name, store, seeds, folder, quick):
    """The claim's checks, its verdict, its picture: folder/NAME.json and NAME.png.   -> the JSON's content"""
    from matplotlib.figure import Figure
    c, clock = CLAIMS[name], time.process_time()
    seeds = range(1 if quick else c.seeds or seeds)
    figure = Figure(figsize=(6.4 * c.panels, 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, c.panels))
    runs = Runs(c.arms, store, seeds)
    checks = c.check(runs, axes)
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.suptitle(textwrap.fill(c.says, 72 * c.panels), fontsize=11)
    verdicts = [check["verdict"] for check in checks]
    verdict = "does not hold here" if "does not hold here" in verdicts else "undecided" if "undecided" in verdicts else "holds"
    used = [run for label in c.arms for run in runs.runs(label)]
    found = {"claim": c.says, "source": c.source, "verdict": "undecided (quick)" if quick else verdict, "checks": checks, "seeds": len(seeds), "runs": len(used),
             "failed": sum("failed" in run for run in used), "arms": {label: a.key for label, a in c.arms.items()},
             "cpu_seconds": round(sum(run.get("cpu", 0) for run in used) + time.process_time() - clock), "date": time.strftime("%Y-%m-%d"),
             "commits": sorted({run["commit"][:10] for run in used if run.get("commit")})}
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def say(name, found):
    print(f"\n{name}: {found['claim']}\n  source: {found['source']}\n  verdict: {found['verdict']}   ({found['runs']} runs, {found['cpu_seconds']} CPU s)")
    for c in found["checks"]:
        print(f"  {c['verdict']:<19}{c['says']}: {number(c)}")


def number(c):
    if math.isnan(c["mean"]):
        return "not measured: a run failed"
    return f"{c['mean']:+.3g}" + (f" [{c['low']:+.3g}, {c['high']:+.3g}]" if math.isfinite(c["low"]) and c["low"] != c["high"] else "")


def claims_table():
    """Every claim with its last verdict: the README's table, from results/claims."""
    lines = ["| claim | source | verdict | what was compared: mean difference [95 %] | `experiments.py` | CPU s |", "|---|---|---|---|---|---|"]
    for name, c in CLAIMS.items():
        path = RESULTS / "claims" / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            compared = "; ".join(f"{check['says']}: {number(check)}" for check in found["checks"])
            cells = [c.says, c.source, f"**{found['verdict']}**", compared, f"[`{name}`](results/claims/{name}.png)", f"{found['cpu_seconds']:,}"]
        else:
            cells = [c.says, c.source, "not run yet", "", f"`{name}`", ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


# --- every objective in two tables --------------------------------------------------------------------------------------------

KEPT = ("win_rate", "reward", "kl", "malformed", "length", "reward_greedy", "reward_ref_greedy")


def methods(names, seeds, out):
    """results/methods.json: {loss: {"settings": ..., "runs": [{seed, win_rate, reward, kl, ...}]}}, written after every run."""
    path = RESULTS / "methods.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in seeds:
        for name in names:
            folder = Path(out) / f"{name}-{seed}"
            if not (folder / "eval.json").exists():
                command = [sys.executable, str(ROOT / "train.py"), "--loss", name, "--seed", str(seed), "--out", str(folder), "--overwrite"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{name}, seed {seed}: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
            r, config = (json.loads((folder / f).read_text()) for f in ("eval.json", "config.json"))
            own = {k: config[k] for k in ("lr", "steps", "batch_size", *train.signature(train.find_loss(name))[1]) if k in config}
            entry = results.setdefault(name, {"settings": own, "runs": []})
            entry["runs"] = [x for x in entry["runs"] if x["seed"] != seed] + [
                {"seed": seed, **{k: r[k] for k in KEPT}, "win_rate_ci95": r["win_rate_ci95"], "best": r["optimum_at_same_kl"]["reward"],
                 "seconds": r["seconds"]["align_cpu"], "commit": config["commit"]}]
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}, seed {seed}: win rate {r['win_rate']:.3f}, true utility {r['reward']:+.2f}, KL {r['kl']:.2f}", flush=True)
    return results


def methods_table(results):
    """Mean +- standard deviation over seeds, best win rate first."""
    lines = ["| `--loss` | win rate | true utility | best possible at this KL | KL, nats | malformed | CPU s | beta, lr |", "|---|---|---|---|---|---|---|---|"]
    for name, entry in sorted(results.items(), key=lambda x: -np.mean([r["win_rate"] for r in x[1]["runs"]])):
        def both(key, digits):
            x = [r[key] for r in entry["runs"]]
            return f"{np.mean(x):.{digits}f} +- {np.std(x, ddof=1):.{digits}f}" if len(x) > 1 else f"{x[0]:.{digits}f}"

        s = entry["settings"]
        knob = ", ".join(f"{k} {s[k]:g}" for k in ("beta", "tau", "gamma", "delta", "lam") if k in s)
        lines.append(f"| `{name}` | {both('win_rate', 3)} | {both('reward', 2)} | {np.mean([r['best'] for r in entry['runs']]):.2f} | {both('kl', 2)} | "
                     f"{both('malformed', 2)} | {np.mean([r['seconds'] for r in entry['runs']]):.0f} | {knob}{', ' if knob else ''}{s['lr']:g} |")
    return "\n".join(lines)


def objectives_table():
    """Every objective and recipe, from signatures and docstrings: the README's first table of methods."""
    extra = {"score_gap": "scores", "chosen_win_prob": "win probabilities", "target_logps": "a third response"}
    rows, source = [], (ROOT / "train.py").read_text().split("\n")
    for name, f in {**kto.LOSSES, "offline_ppo": ppo.offline_ppo_loss, **dpo_variants.LOSSES}.items():
        wants, file = train.signature(f)[0], Path(inspect.getsourcefile(f)).stem
        said = dict(line.strip().split(": ", 1) for line in inspect.getdoc(f).splitlines() if line.startswith(("Paper: ", "Idea: ")))
        needs = ["pairs" if train.is_paired(wants) else "labels", *(words for n, words in extra.items() if n in wants)]
        rows.append((f"[`{name}`]({file}.py#L{inspect.getsourcelines(f)[1]})", said["Paper"], "yes" if train.REFERENCE & set(wants) else "no", " + ".join(needs), said["Idea"],
                     f"[test](tests/test_{file}.py)" + ", [curve](notebooks/01_loss_landscapes.ipynb)" * (file != "ppo")))
    for name, r in train.RECIPES.items():
        reference = {"none": "no", "moving": "moves"}.get(r.get("reference"), "no" if name == "rm" else "the last stage" if "stages" in r else "yes")
        needs = {"spin": "good responses", "sdpo_segment": "sessions", "ppo": "prompts + a reward"}.get(name, "pairs")
        line = next(i for i, text in enumerate(source, 1) if text.startswith(f'    "{name}": dict('))
        see = {"ppo": "[test](tests/test_ppo.py), [pictures](notebooks/06_ppo_and_friends.ipynb)", "rm": "[test](tests/test_ppo.py)"}.get(name, "[test](tests/test_train.py), [plane](results/claims/exact_frontier.png)")
        rows.append((f"[`{name}`](train.py#L{line})", r["paper"], reference, needs, r["idea"] + ".", see))
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(["| `--loss`, its equation | paper | reference | data | idea | see |", "|---|---|---|---|---|---|", *(f"| {row} |" for row in cells)])


def main(argv):
    p = argparse.ArgumentParser(prog="experiments.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"all, methods, objectives, or claims: {', '.join(CLAIMS)}")
    p.add_argument("--quick", action="store_true", help="one short seed of every arm, all in out/quick: does it all work?")
    p.add_argument("--seeds", type=int, default=3, help="seeds per arm [3]")
    p.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2)), help="arms that run at once, each on one core [all cores]")
    p.add_argument("--out", default="out/experiments", help="where the runs go [out/experiments]")
    p.add_argument("--losses", nargs="*", default=[n for n in (*train.LOSSES, *train.RECIPES) if n != "rm"], help="of methods: which")
    p.add_argument("--table", action="store_true", help="of methods: only print the table of the results that are there")
    a = p.parse_args(argv)
    if unknown := [n for n in a.names if n not in (*CLAIMS, "all", "methods", "objectives")]:
        raise SystemExit(f"{unknown[0]}: no such experiment; valid are all, methods, objectives, {', '.join(CLAIMS)}")
    if a.seeds < 1 or a.processes < 1:
        raise SystemExit(f"--{'seeds' if a.seeds < 1 else 'processes'}: must be at least 1")
    if "objectives" in a.names:
        return print(objectives_table())
    if "methods" in a.names:
        results = json.loads((RESULTS / "methods.json").read_text()) if a.table else methods(a.losses, range(a.seeds), "out/methods")
        return print(methods_table(results))
    if not a.names and not a.quick:
        return print(claims_table())
    names = list(CLAIMS) if "all" in a.names or not a.names else a.names
    out = Path("out/quick") if a.quick else Path(a.out)
    store = make_runs(names, a.seeds, out.absolute(), out / "runs.json" if a.quick else RESULTS / "runs.json", a.processes, a.quick)
    for name in names:
        say(name, judge(name, store, a.seeds, out / "claims" if a.quick else RESULTS / "claims", a.quick))


if __name__ == "__main__":
    main(sys.argv[1:])

"""An arm of experiments.py: one run of train.py on the embedded world, and what is measured of it.

This file drives train.py, and only experiments.py imports it.
"""

import contextlib
import json
import math
import random
import re
import time
from functools import lru_cache
from typing import NamedTuple

import data
import evaluate
import recipes
import train
import world
from objective import score
from plumbing import rundir, settings, sources
from plumbing.formats import Pair
from plumbing.huggingface import load_policy
from plumbing.tokenizer import load_tokenizer

N = 4000                                                 # pairs
COMMON = {"lr": 5e-4, "steps": 150}                      # of all arms, unless they say otherwise
QUICK_BASE = {"pretrain_steps": 30, "sft_steps": 30}
MEASURED = ("win_rate", "reward", "reward_ci95", "reward_ref", "kl", "malformed", "length", "right",
            "rude")


class Arm(NamedTuple):
    """`train.py --loss LOSS FLAGS` on the preferences `on`, from the SFT or the pretrained model.

    on: see `preferences`; "world": the embedded run with its own data and defaults
    """
    loss: str
    flags: tuple = ()
    on: str = "pairs"
    start: str = "sft"

    @property
    def key(self):
        """Its name in results/runs.json: kto --z0 zero --beta 0.5 | flip 0.2"""
        name = " ".join([self.loss, *(f"--{flag} {value}" for flag, value in self.flags)])
        if self.on != "pairs":
            name += f" | {self.on}"
        if self.start != "sft":
            name += f" | {self.start}"
        return name


def arm(loss, on="pairs", start="sft", **flags):
    if loss == "kto":                # z0's estimate is clamped to 0 here anyway: the claim z0_zero
        flags = {"z0": "zero"} | flags
    return Arm(loss, tuple(flags.items()), on, start)


# --- its preferences ------------------------------------------------------------------------------

def preferences(on, seed, base):
    """The rows called "pairs", or "flip 0.2" where a share belongs to the name."""
    name, share = re.fullmatch(r"(.*?) ?([\d.]*)", on).groups()
    if name == "flip":
        return world.pairs(N, seed, flip=float(share))
    if name == "native":
        return world.native_thumbs(2 * N, seed)
    if name == "expert":
        texts = world.dialogues(world.N_EXPERT, seed + 2, "expert")
        return [{"prompt": prompt, "completion": reply, "label": True} for prompt, reply in texts]
    if name == "own replies":
        return own_replies(seed, base)
    pairs = world.pairs(N, seed)
    if name in ("desirable", "undesirable"):
        return world.keep_class(world.thumbs(pairs, seed), **{name: float(share)}, seed=seed)
    if name == "likes length":
        rng = random.Random(f"length {seed}")
        return [annotate(rng, pair["prompt"], (pair["chosen"], pair["rejected"]), per_word=0.12)
                for pair in pairs]
    if name == "never said":
        return never_said(pairs, seed)
    assert name == "pairs", on
    return pairs


def annotate(rng, prompt, replies, per_word=0.0):
    """A Bradley-Terry annotator chooses. per_word: points for each word above 16."""
    scored = []
    for reply in replies:
        liking = world.utility(prompt, reply) + per_word * (len(reply.split()) - 16)
        scored.append((liking - math.log(rng.expovariate(1.0)), reply))
    return {"prompt": prompt, "chosen": max(scored)[1], "rejected": min(scored)[1]}


def own_replies(seed, base):
    """Pairs of the reference model's own replies, judged by the same annotator."""
    rng = random.Random(f"own {seed}")
    policy = load_policy(base)
    tokenizer = load_tokenizer(base)
    prompts = world.eval_prompts("train", N, seed=seed)
    first, _ = evaluate.replies(policy, tokenizer, prompts, seed=[seed, 11, 0])
    second, _ = evaluate.replies(policy, tokenizer, prompts, seed=[seed, 11, 1])
    rows = [annotate(rng, prompt, two) for prompt, *two in zip(prompts, first, second)]
    return [row for row in rows if row["rejected"] and row["chosen"] != row["rejected"]]


def never_said(pairs, seed):
    """Rejected is what no policy would write: an ordinary reply with its words shuffled."""
    rng = random.Random(f"shuffled {seed}")
    rows = []
    for pair in pairs:
        chosen, other = rng.sample([pair["chosen"], pair["rejected"]], 2)
        words = other.split()
        shuffled = " ".join(rng.sample(words, len(words)))
        rows.append({"prompt": pair["prompt"], "chosen": chosen, "rejected": shuffled})
    return rows


# --- its command line -----------------------------------------------------------------------------

def tuned(loss):
    """The embedded world's settings for a loss."""
    like = recipes.find(loss).like
    return world.SETTINGS.get(like, world.SETTINGS["default"]) | world.SETTINGS.get(loss, {})


def command(arm, seed, folder, quick):
    """What is typed: train.py ..."""
    out = folder.parent
    flags = dict(arm.flags)
    always = {"loss": arm.loss, "seed": seed, "out": folder, "log_every": 50, "save_every": 10**6}
    if arm.on == "world":
        if quick:
            flags |= {"steps": 2, "batch_size": 32} | QUICK_BASE
    else:
        base = base_model(seed, arm.start, out, quick)
        always |= {"model": base, "data": rows_file(arm.on, seed, base, out, quick)}
        size = 16 if recipes.find(arm.loss).paired else 32
        flags = tuned(arm.loss) | COMMON | {"batch_size": size} | flags
        if quick:
            flags["steps"] = 4
    if flags.get("reward") == "rm":
        flags["reward"] = reward_model(seed, out, quick)
    return [*as_words(always | flags), "--overwrite"]


def as_words(flags):
    """{"lr": 5e-4} -> ["--lr", "0.0005"]"""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


@lru_cache(maxsize=None)
def base_model(seed, start, out, quick):
    """The embedded world's SFT or pretrained model of this seed: what the run itself would make."""
    flags = {"seed": seed, "out": out / "base"}
    if quick:
        flags |= QUICK_BASE
    if start == "pretrain":
        flags["sft_steps"] = 0
    run = settings.parse(as_words(flags))
    return train.base_model(run.config, sources.World(run.config, run.recipe))


def rows_file(on, seed, base, out, quick):
    """The arm's preferences as a file, written once."""
    path = out / f"{slug(on)}-seed{seed}.jsonl"
    with rundir.locked(path.with_suffix(".lock")):
        if not path.exists():
            rows = preferences(on, seed, base)
            if quick:
                rows = rows[:200]
            rundir.write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward_model(seed, out, quick):
    """PPO's judge; the arms of one seed share it."""
    folder = out / f"rm-world-seed{seed}"
    with rundir.locked(out / f"rm-seed{seed}.lock"):
        if not (folder / "eval.json").exists():
            train.main(command(Arm("rm", on="world"), seed, folder, quick))
    return folder / "model"


def slug(text):
    return re.sub(r"[^\w.]+", "-", text).strip("-")


# --- its run --------------------------------------------------------------------------------------

def run_arm(arm, seed, out, quick=False):
    """Train, then measure.   -> the run's numbers, or {"failed": why}"""
    folder = out / f"{slug(arm.key)}-seed{seed}"
    clock = time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    with (open(out / f"{folder.name}.log", "w") as log,
          contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        try:
            train.main(command(arm, seed, folder, quick))
        except SystemExit as stop:
            return {"seed": seed, "failed": str(stop.code)}
        found = measure(arm, seed, folder, quick)
    seconds = json.loads((folder / "eval.json").read_text())["seconds"]
    return {"seed": seed, **found, "align_cpu": seconds["align_cpu"],
            "cpu": time.process_time() - clock}


def measure(arm, seed, folder, quick):
    """What the arm's policy does on held-out questions, against the SFT model of this seed."""
    n_questions, n_pairs = (24, 20) if quick else (480, 400)
    sft = base_model(seed, "sft", folder.parent, quick)
    reference = load_policy(sft)
    tokenizer = load_tokenizer(sft)
    pairs = [Pair(**pair) for pair in world.pairs(n_pairs, seed + 3, part="report")]
    units, _ = data.encode(pairs, tokenizer, max_len=80, max_prompt_len=60)

    def numbers(folder):
        policy = load_policy(folder)
        result = evaluate.evaluate_world(policy, reference, tokenizer, seed=seed,
                                         n=n_questions)
        moved = (score(policy, units) - score(reference, units)).mean(0).tolist()
        found = {key: result[key] for key in MEASURED}
        found["best"] = result["optimum_at_same_kl"]["reward"]
        return found | dict(zip(("d_chosen", "d_rejected"), moved))

    found = numbers(folder / "model")
    if arm.loss == "kto":
        found |= z0_numbers(folder / "model", reference, tokenizer, units, seed, n_questions)
    if stages := sorted(folder.glob("stage-[0-9]")):
        found["stages"] = [numbers(stage) for stage in stages]
    if curve := on_the_way(folder / "metrics.jsonl"):
        found["curve"] = curve
    return found


def z0_numbers(folder, reference, tokenizer, units, seed, n):
    """Mean and sd of log-ratios: of mismatched pairs, and of the policy's own replies."""
    policy = load_policy(folder)
    chosen = [unit[0] for unit in units]
    partners = data.mismatch([row.prompt_key for row in chosen])
    mismatched = [data.mismatched(row, chosen[j], 80) for row, j in zip(chosen, partners)]
    prompts = world.eval_prompts("report", n)
    _, own = evaluate.replies(policy, tokenizer, prompts, seed=[seed, 5])
    found = {}
    for name, rows in (("mismatched", mismatched), ("own", own)):
        units = [(row,) for row in rows]
        ratios = score(policy, units) - score(reference, units)
        found[name] = [float(ratios.mean()), float(ratios.std())]
    return found


def on_the_way(log):
    """What --eval_every has measured during the run."""
    curve = []
    for line in map(json.loads, open(log)):
        if "eval/kl" in line:
            point = {key: line[f"eval/{key}"] for key in ("reward", "kl", "win_rate", "malformed")}
            curve.append({"step": line["step"] + 1} | point)
    return curve

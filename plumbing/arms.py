"""An arm of experiments.py: one command line of train.py, and what is measured of its policy.

This file drives train.py; only experiments.py and the studies import it.
"""

import contextlib
import json
import math
import random
import re
import time
from functools import lru_cache
from typing import NamedTuple
from unittest import mock

import numpy as np

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

N = 4000                                                 # pairs, unless the arm says otherwise
COMMON = {"lr": 5e-4, "steps": 150}                      # of all arms, unless they say otherwise
QUICK_BASE = {"pretrain_steps": 30, "sft_steps": 30}
REPLIES = {"report": 2400, "tune": 480}                  # to the questions of each part
KL_REPLIES = 960                                         # of them; its noise is .03 nats then


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
        """Its name in results/runs.jsonl: kto --z0 zero --beta 0.5 | flip 0.2"""
        name = " ".join([self.loss, *as_words(dict(self.flags))])
        if self.on != "pairs":
            name += f" | {self.on}"
        if self.start != "sft":
            name += f" | {self.start}"
        return name


def arm(loss, on="pairs", start="sft", **flags):
    if loss == "kto" and "online" not in flags:      # z0's estimate is clamped to 0 in nearly every
        flags = {"z0": "zero"} | flags               # step here, so it is left out: claim z0_zero
    return Arm(loss, tuple(flags.items()), on, start)


# --- its preferences ------------------------------------------------------------------------------

def preferences(on, seed, base):
    """The rows called "pairs", "flip 0.2", "500 pairs flip 0.2 one thumb", "likes length" ...

    N pairs, or as many as the name begins with. flip: that share is exchanged. desirable,
    undesirable: that share is kept of a class. one thumb: of each pair one response alone.
    """
    how = {name: float(share) for name, share in re.findall(r"([a-z]+) (0\.\d+)", on)}
    n = int(re.match(r"\d+|", on)[0] or N)
    if on == "native":
        return world.native_thumbs(2 * n, seed)
    if on == "expert":
        texts = world.dialogues(world.N_EXPERT, seed + 2, "expert")
        return [row | {"label": True} for row in unjudged(texts)]
    if on == "own replies":
        return own_replies(seed, base)
    if "up" in on:                                       # only up, nine up one cell
        return thumbs_up("one cell" in on, seed, down=0.1 * ("nine" in on))
    if on == "one cell":
        texts = of_one_cell(seed, "sft")
        rng = random.Random(f"one cell {seed}")
        rows = [annotate(rng, prompt, (first, second))
                for (prompt, first), (_, second) in zip(texts[::2], texts[1::2])]
        return [row for row in rows if row["chosen"] != row["rejected"]]
    rows = world.pairs(n, seed, flip=how.pop("flip", 0.0))
    if on == "likes length":
        rng = random.Random(f"length {seed}")
        return [annotate(rng, pair["prompt"], (pair["chosen"], pair["rejected"]), per_word=0.12)
                for pair in rows]
    if on == "never said":
        return never_said(rows, seed)
    if "one thumb" in on:
        rng = random.Random(f"one thumb {seed}")
        rows = [rng.choice(world.thumbs([pair], 0)) for pair in rows]
    if how:
        rows = world.keep_class(world.thumbs(rows, seed), **how, seed=seed)
    return rows


def unjudged(texts):
    return [{"prompt": prompt, "completion": reply} for prompt, reply in texts]


def of_one_cell(seed, mix):
    """Texts about one problem of one device, asked in four wordings: any reply fits any prompt."""
    texts = world.dialogues(40_000, seed + 2, mix)
    cell = tuple(world.split()["train"][seed])
    return [text for text in texts if world.parse_prompt(text[0]) == cell]


def thumbs_up(one_cell, seed, down=0.0):
    """An expert's replies, all liked; and a share of ordinary ones, all disliked."""
    rows = []
    for mix, label in (("expert", True), ("sft", False)):
        texts = of_one_cell(seed, mix) if one_cell else world.dialogues(N, seed + 2, mix)
        share = 1 - down if label else down
        kept = texts[:round(share * len(texts))]
        rows += [row | {"label": label} for row in unjudged(kept)]
    return rows


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
    """{"lr": 5e-4, "online": True} -> ["--lr", "0.0005", "--online"]"""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
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
    """The learnt reward: fitted to the 8,000 pairs of this seed; the arms of a seed share it."""
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
    with (open(out / f"{folder.name}.log", "w") as log, without_pictures(),
          contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        try:
            train.main(command(arm, seed, folder, quick))
        except SystemExit as stop:
            return {"failed": str(stop.code)}
        found = measure(arm, seed, folder, quick)
    seconds = json.loads((folder / "eval.json").read_text())["seconds"]
    return found | {"align_cpu": seconds["align_cpu"], "cpu": time.process_time() - clock}


def without_pictures():
    """A picture takes as long as 30 steps, and nobody looks at those of 1,000 runs."""
    return mock.patch.multiple(evaluate, plot_curves=mock.DEFAULT, plot_frontier=mock.DEFAULT)


def measure(arm, seed, folder, quick):
    """What the arm's policy does on held-out questions, against the SFT model of this seed."""
    sft = base_model(seed, "sft", folder.parent, quick)
    reference = load_policy(sft)
    tokenizer = load_tokenizer(sft)
    policy = load_policy(folder / "model")
    found, rows = on_questions("report", policy, sft, tokenizer, seed, quick)
    tune, _ = on_questions("tune", policy, sft, tokenizer, seed, quick)
    found["tune"] = {key: tune[key] for key in ("reward", "kl", "malformed")}

    pairs = [Pair(**pair) for pair in world.pairs(20 if quick else 400, seed + 3, part="report")]
    units, _ = data.encode(pairs, tokenizer, max_len=80, max_prompt_len=60)
    moved = (score(policy, units) - score(reference, units)).mean(0).tolist()
    found |= dict(zip(("d_chosen", "d_rejected"), moved))
    if arm.loss == "kto":                                # two estimates of z0 at the end of the run
        chosen = [unit[0] for unit in units]
        partners = data.mismatch([row.prompt_key for row in chosen])
        mismatched = [data.mismatched(row, chosen[j], 80) for row, j in zip(chosen, partners)]
        for name, answers in (("mismatched", mismatched), ("own", rows[:480])):
            answers = [(row,) for row in answers]
            found[name] = float((score(policy, answers) - score(reference, answers)).mean())
    if stages := sorted(folder.glob("stage-[0-9]")):
        found["stages"] = [on_questions("tune", load_policy(stage), sft, tokenizer, seed, quick)[0]
                           ["reward"] for stage in stages]
    return found | from_the_log(folder / "metrics.jsonl")


def on_questions(part, policy, sft, tokenizer, seed, quick):
    """(Numbers over REPLIES[part] replies, the replies as rows)."""
    n = 24 if quick else REPLIES[part]
    prompts = world.eval_prompts(part, n)
    found, rows = evaluate.world_numbers(policy, tokenizer, prompts, prompts, 2 * seed + 1)
    utilities = found.pop("utilities")
    cells = [world.parse_prompt(prompt) for prompt in prompts]
    kl = float(evaluate.sampled_kl(policy, load_policy(sft), rows[:KL_REPLIES]).mean())
    wins = evaluate.wins_in_cells(utilities, of_reference(part, n, sft, seed), cells)
    low, _ = evaluate.bootstrap_ci(utilities, cells)
    found |= {"win_rate": float(np.mean(wins)), "reward_low": low, "kl": kl,
              "reward_ref": float(np.mean(of_reference(part, n, sft, seed))),
              "best": world.optimum_at_kl(kl).utility}
    return found, rows


@lru_cache(maxsize=64)
def of_reference(part, n, sft, seed):
    """Utilities of the SFT model's replies; all arms of a seed are compared with the same ones."""
    prompts = world.eval_prompts(part, n)
    found, _ = evaluate.world_numbers(load_policy(sft), load_tokenizer(sft), prompts, prompts,
                                      2 * seed)
    return found["utilities"]


def from_the_log(log):
    """`path`: what --eval_every has measured. `early`: means over five equal parts of the run."""
    lines = [json.loads(line) for line in open(log)]
    path = [[line["step"] + 1, *(round(line[f"eval/{key}"], 4) for key in ("kl", "reward"))]
            for line in lines if "eval/kl" in line]
    early = {}
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "z0_raw",
                 "grad_norm", "reward", "length"):
        values = [line[name] for line in lines if line.get(name) is not None]
        if len(values) >= 5:
            early[name] = [round(float(part.mean()), 3) for part in np.array_split(values, 5)]
    return {"path": path, "early": early}

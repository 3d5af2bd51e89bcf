"""The README's tables of objectives: their papers and ideas, and what they reach on the world."""

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

import recipes
from objective import needs, signature
from plumbing import rundir

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "results" / "methods.json"
NAMES = list(dict.fromkeys([*recipes.LOSSES, *recipes.RECIPES]))


def markdown(head, rows):
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([str(cell).replace("|", "\\|") for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- what there is --------------------------------------------------------------------------------

def objectives():
    """Every loss and recipe, from signatures and docstrings."""
    rows = []
    for name in NAMES:
        recipe = recipes.find(name)
        file, line, paper, idea = source_of(name, recipe)
        rows.append((f"[`{name}`]({file}.py#L{line})", paper, reference_of(recipe), data_of(recipe),
                     idea, see(name, file)))
    head = ["`--loss`, its equation", "paper", "reference", "data", "idea", "see"]
    return markdown(head, rows)


def source_of(name, recipe):
    """File, line, paper, idea: of a recipe's entry, else of the loss's docstring."""
    if recipe.paper:
        lines = (ROOT / "recipes.py").read_text().split("\n")
        return "recipes", lines.index(f'    "{name}": Recipe(') + 1, recipe.paper, recipe.idea + "."
    said = {}
    for line in inspect.getdoc(recipe.loss).splitlines():
        key, colon, text = line.strip().partition(": ")
        said[key] = text
    file = Path(inspect.getsourcefile(recipe.loss)).stem
    return file, inspect.getsourcelines(recipe.loss)[1], said["Paper"], said["Idea"]


def reference_of(recipe):
    if recipe.stage_units is not recipes.the_data:
        return "the last stage"
    if recipe.reference is recipes.moving:
        return "moves"
    if recipe.reference is recipes.nothing or "reference" not in needs(recipe.wants):
        return "no"
    return "yes"


def data_of(recipe):
    words = {"thumbs": "labels", "replies": "good responses", "prompts": "prompts + a reward"}
    found = [words.get(recipe.learns_from, recipe.learns_from)]
    for name, column in (("score_gap", "scores"), ("chosen_win_prob", "win probabilities"),
                         ("target_logps", "a third response")):
        if name in recipe.wants:
            found.append(column)
    return " + ".join(found)


def see(name, file):
    if name == "ppo":
        return "[pictures](notebooks/06_ppo_and_friends.ipynb)"
    if file == "recipes":
        return "[plane](results/claims/exact_frontier.png)"
    if file == "ppo":
        return "[test](tests/test_ppo.py)"
    return f"[test](tests/test_{file}.py), [curve](notebooks/01_loss_landscapes.ipynb)"


# --- what it reaches ------------------------------------------------------------------------------

KEPT = ("win_rate", "win_rate_ci95", "reward", "kl", "malformed", "length", "reward_greedy",
        "reward_ref_greedy")


def run_methods(names, seeds):
    """results/methods.json: every objective's settings and runs, written after every run."""
    results = read_methods()
    for seed in range(seeds):
        for name in names:
            folder = Path("out/methods") / f"{name}-{seed}"
            if not (folder / "eval.json").exists():
                done = subprocess.run(
                    [sys.executable, str(ROOT / "train.py"), "--loss", name, "--seed", str(seed),
                     "--out", str(folder), "--overwrite"], capture_output=True, text=True)
                if done.returncode:
                    print(f"{name}, seed {seed}: failed: {done.stderr.strip().splitlines()[-1]}")
                    continue
            add_run(results.setdefault(name, {"runs": []}), name, seed, folder)
            rundir.write(METHODS, json.dumps(results, indent=1) + "\n")
            print(f"{name}, seed {seed}: win rate {results[name]['runs'][-1]['win_rate']:.3f}")


def read_methods():
    return json.loads(METHODS.read_text()) if METHODS.exists() else {}


def add_run(entry, name, seed, folder):
    found = json.loads((folder / "eval.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    own = signature(recipes.find(name).loss)[1]
    entry["settings"] = {key: config[key] for key in ("lr", "steps", "batch_size", *own)}
    run = {"seed": seed} | {key: found[key] for key in KEPT}
    run |= {"best": found["optimum_at_same_kl"]["reward"], "commit": config["commit"],
            "seconds": found["seconds"]["align_cpu"]}
    entry["runs"] = [old for old in entry["runs"] if old["seed"] != seed] + [run]


def methods():
    """Mean +- standard deviation over seeds, best win rate first."""
    rows = []
    for name, entry in read_methods().items():
        runs = {key: [run[key] for run in entry["runs"]]
                for key in ("win_rate", "reward", "best", "kl", "malformed", "seconds")}
        used = entry["settings"]
        knobs = [f"{knob} {used[knob]:g}, " for knob in ("beta", "tau", "gamma", "delta", "lam")
                 if knob in used]
        rows.append((-np.mean(runs["win_rate"]), (
            f"`{name}`", both(runs["win_rate"], 3), both(runs["reward"], 2),
            f"{np.mean(runs['best']):.2f}", both(runs["kl"], 2), both(runs["malformed"], 2),
            f"{np.mean(runs['seconds']):.0f}", "".join(knobs) + f"{used['lr']:g}")))
    head = ["`--loss`", "win rate", "true utility", "best possible at this KL", "KL, nats",
            "malformed", "CPU s", "beta, lr"]
    return markdown(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def both(values, digits):
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


# --- verdicts -------------------------------------------------------------------------------------

def number(check):
    """+0.017 [-0.011, +0.045]"""
    mean, low, high = check["mean"], check["low"], check["high"]
    if math.isnan(mean):
        return "not measured: a run failed"
    if low == high or math.isinf(low):
        return f"{mean:+.3g}"
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def claims(every):
    """Every claim with its last verdict, from results/claims."""
    rows = []
    for name, claim in every.items():
        path = ROOT / "results" / "claims" / f"{name}.json"
        if not path.exists():
            rows.append((claim.says, claim.source, "not run yet", "", f"`{name}`", ""))
            continue
        found = json.loads(path.read_text())
        compared = [f"{check['says']}: {number(check)}" for check in found["checks"]]
        rows.append((claim.says, claim.source, f"**{found['verdict']}**", "; ".join(compared),
                     f"[`{name}`](results/claims/{name}.png)", f"{found['cpu_seconds']:,}"))
    head = ["claim", "source", "verdict", "what was compared: mean difference [95 %]",
            "`experiments.py`", "CPU s"]
    return markdown(head, rows)

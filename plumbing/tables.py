"""Tables of objectives and claims: docs/objectives.md and results/README.md have them."""

import inspect
import itertools
import json
import math
import re
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


def refresh(every_claim):
    """Paste the tables into the pages that have them."""
    paste(objectives(), ROOT / "docs" / "objectives.md")
    paste(claims(every_claim), ROOT / "results" / "README.md")
    paste(methods(), ROOT / "results" / "README.md")


def paste(table, page):
    """In place of the page's table with the same first line."""
    text = page.read_text(encoding="utf-8")
    head = re.escape(table.splitlines()[0])
    pattern = rf"^{head}\n(?:\|.*\n)+"
    assert re.search(pattern, text, re.MULTILINE), f"{page} has no table {table.splitlines()[0]}"
    page.write_text(re.sub(pattern, lambda _: table + "\n", text, flags=re.MULTILINE),
                    encoding="utf-8")


def markdown(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


# --- what there is --------------------------------------------------------------------------------

def objectives():
    """Every loss and recipe, from signatures and docstrings."""
    rows = []
    for name in NAMES:
        recipe = recipes.find(name)
        link, paper, idea = source_of(name, recipe)
        rows.append((f"[`{name}`](../{link})", paper, reference_of(recipe), data_of(recipe), idea))
    return markdown(("`--loss`, its equation", "paper", "reference", "data", "idea"), rows)


def source_of(name, recipe):
    """Where its code is, paper, idea: a recipe's own, else from the docstring of the loss."""
    if recipe.paper:
        return "recipes.py", recipe.paper, recipe.idea + "."
    file = Path(inspect.getsourcefile(recipe.loss)).name
    said = re.search(r"Paper: (.+?)\nIdea: (.+?\.)(\n|$)", inspect.getdoc(recipe.loss), re.DOTALL)
    return file, " ".join(said[1].split()), " ".join(said[2].split())


def reference_of(recipe):
    if recipe.reference in (recipes.moving, recipes.following):
        return "moves"
    if "stages" in recipe.flags:
        return "the last stage"
    if recipe.reference is recipes.nothing or "reference" not in needs(recipe.wants):
        return "no"
    return "yes"


def data_of(recipe):
    words = {"thumbs": "labels", "replies": "good responses", "prompts": "prompts + a reward"}
    columns = {"score_gap": "scores", "chosen_win_prob": "win probabilities",
               "target_logps": "a third response"}
    more = [columns[name] for name in recipe.wants if name in columns]
    return " + ".join([words.get(recipe.learns_from, recipe.learns_from), *more])


# --- what it reaches ------------------------------------------------------------------------------

KEPT = ("win_rate", "win_rate_ci95", "reward", "kl", "malformed", "length", "reward_greedy",
        "reward_ref_greedy")


def read_methods():
    return json.loads(METHODS.read_text()) if METHODS.exists() else {}


def run_methods(names, seeds):
    """results/methods.json: every objective's settings and runs, written after every run."""
    results = read_methods()
    for seed, name in itertools.product(range(seeds), names):
        folder = Path("out/methods") / f"{name}-{seed}"
        argv = ["--loss", name, "--seed", str(seed), "--out", str(folder), "--overwrite"]
        if not (folder / "eval.json").exists():
            done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv],
                                  stdout=subprocess.DEVNULL)
            if done.returncode:                              # it has said why
                print(f"{name}, seed {seed}: failed")
                continue
        add_run(results.setdefault(name, {"runs": []}), name, seed, folder)
        rundir.write(METHODS, json.dumps(results, indent=1) + "\n")
        print(f"{name}, seed {seed}: win rate {results[name]['runs'][-1]['win_rate']:.3f}")


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
        used = entry["settings"]
        knobs = [f"{knob} {used[knob]:g}" for knob in ("beta", "tau", "gamma", "delta", "lam")
                 if knob in used]
        win_rate = np.mean([run["win_rate"] for run in entry["runs"]])
        rows.append((-win_rate, (
            f"`{name}`", over_seeds(entry, "win_rate", 3), over_seeds(entry, "reward", 2),
            over_seeds(entry, "best", 2, spread=False), over_seeds(entry, "kl", 2),
            over_seeds(entry, "malformed", 2), over_seeds(entry, "seconds", 0, spread=False),
            ", ".join([*knobs, f"{used['lr']:g}"]))))
    head = ("`--loss`", "win rate", "true utility", "best possible at this KL", "KL, nats",
            "malformed", "CPU s", "beta, lr")
    rows.sort(key=lambda row: row[0])
    return markdown(head, [cells for _, cells in rows])


def over_seeds(entry, key, digits, spread=True):
    values = [run[key] for run in entry["runs"]]
    text = f"{np.mean(values):.{digits}f}"
    if spread and len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.{digits}f}"
    return text


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
                     f"[`{name}`](claims/{name}.png)", f"{found['cpu_seconds']:,}"))
    head = ["claim", "source", "verdict", "what was compared: mean difference [95 %]",
            "`experiments.py`", "CPU s"]
    return markdown(head, rows)

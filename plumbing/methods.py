"""What every objective reaches: each on the same grid, compared within the same KL.

    1  three values of its knob x two learning rates, seed 0
    2  of these six the one with the most utility on the TUNING questions within 2 nats
    3  that one with five seeds, on the reporting questions

Its share of the frontier is (utility - reference's) / (frontier at its KL - reference's).
"""

import math

import numpy as np

import recipes
from objective import signature
from plumbing import store
from plumbing.arms import arm, tuned
from plumbing.claim_plots import COLOURS, frontier
from plumbing.plots import figure
from plumbing.verdicts import broken, interval, share_interval

SEEDS, MOST_KL = 5, 2.0
RATES = {False: (2e-4, 5e-4), True: (3e-4, 1e-3)}        # offline, online
SHORT = {"sdpo_stepwise": {"steps": 75}, "tr_dpo": {"ref_every": 40}}
FAMILIES = {                                             # what a method learns from -> colour
    "thumbs": "thumbs", "pairs": "pairs", "sessions": "pairs of conversations",
    "replies": "good replies", "prompts": "its own replies, judged"}
LEFT_OUT = {"sft", "rm", "sdpo_segment"}                 # no preferences; no policy; sessions
NAMES = [name for name in dict.fromkeys([*recipes.LOSSES, *recipes.RECIPES])
         if name not in LEFT_OUT]


def family(name):
    return recipes.find(name).learns_from


def grid(name):
    """The six arms of a method."""
    recipe = recipes.find(name)
    if recipe.online:
        flags = {"reward": "rm", "steps": 54 if name == "ppo" else 60}
        return [arm(name, "world", **flags, lr=rate, kl_coef=knob)
                for knob in (0.05, 0.2, 0.8) for rate in RATES[True]]
    on = "expert" if recipe.learns_from == "replies" else "pairs"
    used = signature(recipe.loss)[1]
    known = used | tuned(name)
    knob = next((knob for knob in ("beta", "tau", "lam", "log_eps_r", "lambda_u")
                 if knob in (used | recipe.flags)), None)
    settings = [{}]
    if knob:
        middle = known.get(knob, recipe.flags.get(knob))
        settings = [{knob: factor * middle} for factor in (0.25, 1, 4)]
    return [arm(name, on, **setting, lr=rate, **SHORT.get(name, {}))
            for setting in settings for rate in RATES[False]]


def chosen(name, stored):
    """The best arm on the tuning questions within MOST_KL; None before the whole grid has run."""
    def on_tuning(one):
        found = stored[one.key][0].get("tune", {"reward": -math.inf, "kl": math.inf})
        return found["reward"] if found["kl"] <= MOST_KL else -100 - found["kl"]

    if any(0 not in stored.get(one.key, {}) for one in grid(name)):
        return None
    return max(grid(name), key=on_tuning)


def run(out, processes):
    """Both rounds; what is stored stays."""
    first = {one: 1 for name in NAMES for one in grid(name)}
    store.make(store.missing(list(first), first, store.read()), out, processes)
    stored = store.read()
    second = {one: SEEDS for name in NAMES if (one := chosen(name, stored))}
    store.make(store.missing(list(second), second, stored), out, processes)


def share(run):
    return (run["reward"] - run["reward_ref"]) / (run["best"] - run["reward_ref"])


def results(stored):
    """[(name, arm, its runs)], most utility first."""
    found = []
    for name in NAMES:
        one = chosen(name, stored)
        if one:
            runs = [run for run in stored[one.key].values() if "kl" in run]
            found.append((name, one, runs))
    return sorted(found, key=lambda row: -np.mean([run["reward"] for run in row[2]]))


def rows(stored):
    """Cells of the table in results/README.md."""
    cells = []
    for name, one, runs in results(stored):
        utility = "{:.2f} [{:.2f}, {:.2f}]".format(*interval([run["reward"] for run in runs]))
        wins = "{:.3f} [{:.3f}, {:.3f}]".format(*share_interval([run["win_rate"] for run in runs]))
        flags = ", ".join(f"{flag} {value:g}" for flag, value in one.flags
                          if isinstance(value, float))
        cells.append((
            f"`{name}`", FAMILIES[family(name)], utility,
            f"{np.mean([run['kl'] for run in runs]):.2f}",
            f"{np.mean([share(run) for run in runs]):.0%}",
            wins,
            f"{np.mean([run['malformed'] for run in runs]):.0%}",
            f"{sum(map(broken, runs))} of {len(runs)}",
            f"{np.mean([run['align_cpu'] for run in runs]):.0f}", flags))
    return cells


def draw(stored, path):
    """Families on the plane: every run of the grids small, each method's choice large."""
    found = results(stored)
    if not found:
        return
    picture, (ax,) = figure(1, 8.0, 5.4)
    kinds = list(FAMILIES)
    for name, _, runs in found:
        colour = COLOURS[kinds.index(family(name))]
        tried = [stored[one.key][0] for one in grid(name) if 0 in stored.get(one.key, {})]
        tried = [run for run in tried if "kl" in run]
        ax.scatter([run["kl"] for run in tried], [run["reward"] for run in tried], s=8, alpha=0.35,
                   color=colour)
        ax.scatter(np.mean([run["kl"] for run in runs]), np.mean([run["reward"] for run in runs]),
                   s=60, color=colour, edgecolor="white")
    for kind in {family(name) for name, *_ in found}:
        ax.scatter([], [], color=COLOURS[kinds.index(kind)], label=f"learns from {FAMILIES[kind]}")
    frontier(ax)
    ax.set_title(f"{len(found)} methods: small, every setting tried; large, the choice within "
                 f"{MOST_KL:g} nats")
    ax.legend(frameon=False, loc="lower right")
    picture.savefig(path, dpi=110)

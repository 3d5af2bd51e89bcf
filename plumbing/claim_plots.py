"""The pictures of experiments.py; runs("dpo", "kl") is one number per seed of the arm "dpo"."""

import re
import textwrap

import numpy as np

import world
from plumbing.plots import figure

# Okabe and Ito's colours: readers who do not see red and green tell them apart.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK = COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
WORDS = {
    "win_rate": "win rate against the reference",
    "reward": "true utility per reply",
    "kl": "KL(policy || reference), nats per reply",
    "malformed": "share of malformed replies",
    "length": "tokens per reply",
    "right": "share of right fixes",
    "d_chosen": "change of log pi(chosen)",
    "d_rejected": "change of log pi(rejected)",
    "mismatched": "mean over mismatched pairs",
    "own": "mean over own samples",
    "align_cpu": "alignment, CPU seconds (PPO: without its reward model)",
}
NAMED = ("kto", "dpo", "ipo", "tdpo2", "simpo", "nca", "orpo")          # where a plane is crowded


def draw(claim, runs, path):
    """A claim's panels: functions (ax, runs), or names of numbers, which are drawn as dots."""
    picture, axes = figure(len(claim.panels), 6.4, 4.2)
    for ax, panel in zip(axes, claim.panels):
        if isinstance(panel, str):
            dots(ax, runs, panel.split())
        else:
            panel(ax, runs)
    picture.suptitle(textwrap.fill(claim.says, 72 * len(axes)), fontsize=11)
    picture.savefig(path, dpi=110)


def look(k):
    """Colour and marker of the k-th series."""
    return {"color": COLOURS[k % 7], "marker": "osD^v*PX<>hp"[k % 12]}


def dots(ax, runs, keys):
    """A line per arm: its seeds, and their mean as a bar; a colour per number."""
    labels = list(runs.arms)
    for k, key in enumerate(keys):
        ax.scatter([], [], label=WORDS[key], **look(k))
        for place, label in enumerate(labels):
            values = runs(label, key)
            ax.scatter(values, [place] * len(values), s=22, alpha=0.4, **look(k))
            ax.scatter(values.mean(), place, s=90, marker="|", lw=2, color=COLOURS[k], zorder=3)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=2)
    if "d_chosen" in keys:
        ax.set_xscale("symlog", linthresh=1)
        ax.axvline(0, color=BLACK, lw=0.8, ls=":")


def curves(ax, runs, knob="", key="win_rate"):
    """A line per loss against a knob, from labels such as "kto beta 0.5"."""
    series = {}
    for label in runs.arms:
        if found := re.fullmatch(rf"(\w+) {knob} ?([\d.e-]+)", label):
            series.setdefault(found[1], {})[float(found[2])] = runs(label, key)
    for k, (name, points) in enumerate(series.items()):
        y = np.array(list(points.values()))
        spread = y.std(1, ddof=1) if y.shape[1] > 1 else None
        ax.errorbar(list(points), y.mean(1), spread, capsize=3, label=name.upper(), **look(k))
    ax.set(xlabel=knob or "share of flipped labels (rDPO and cDPO are told)", ylabel=WORDS[key])
    if knob:
        ax.set_xscale("log")
        ax.set_xticks(list(points), [f"{x:g}" for x in points])
        ax.minorticks_off()
    ax.legend(frameon=False)


def frontier(ax, kl_max=4.4):
    """The most utility that any policy can have at a KL."""
    points = [world.optimum(float(beta)) for beta in np.geomspace(60, 0.08, 80)]
    ax.plot([point.kl for point in points], [point.utility for point in points],
            color="#777777", lw=2, label="exact frontier")
    ax.set(xlabel=WORDS["kl"], ylabel=WORDS["reward"], xlim=(-0.1, kl_max), ylim=(-0.7, 3.6))


def plane(ax, runs):
    """Arms under the exact frontier: "dpo beta 0.1" and "dpo beta 0.5" are points of one curve.

    In grey what --eval_every has measured on the way, and where it is crowded what is not NAMED.
    """
    series = {}
    for label in runs.arms:
        family = re.match(r"([a-z]\w*) (beta|tau|lam) ", label)
        series.setdefault(family[1] if family else label, []).append(label)
    shown = [name for name in series if len(series) < 13 or name in NAMED]
    for name, labels in series.items():
        kl = np.array([runs(label, "kl") for label in labels])
        reward = np.array([runs(label, "reward") for label in labels])
        how = {"color": "#bbbbbb", "marker": ".", "lw": 0.6, "zorder": 1}
        if name in shown:
            how = look(shown.index(name)) | {"label": name}
        order = kl.mean(1).argsort()
        ax.plot(kl.mean(1)[order], reward.mean(1)[order], **how)
        ax.scatter(kl, reward, s=6, alpha=0.4, color=how["color"])
        for run in runs.of(labels[0]):
            way = np.array([(point["kl"], point["reward"]) for point in run.get("curve", [])])
            ax.plot(*way.reshape(-1, 2).T, ".-", ms=4, lw=0.6, color="#bbbbbb", zorder=1)
    farthest = max([4.4, *(runs(label, "kl").mean() for name in shown for label in series[name])])
    frontier(ax, kl_max=min(9.0, 1.2 * farthest))
    ax.legend(frameon=False, loc="lower right", fontsize=8)


def majorities(ax, runs):
    """Of two replies, what is left of the one that fewer annotators prefer."""
    from plumbing.verdicts import SHARES, majority
    kto, dpo, _ = majority(0)
    ax.semilogy(SHARES, kto.clip(1e-12), label="KTO: pi(b)", **look(0))
    ax.semilogy(SHARES, dpo, label="DPO: pi(b)/pi(a), over the reference's", **look(1))
    ax.set(xlabel="share of annotators who prefer a to b", ylabel="below 1e-12: drawn there")
    ax.legend(frameon=False)

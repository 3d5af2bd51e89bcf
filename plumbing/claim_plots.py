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


def draw(claim, runs, verdict, path):
    """A claim's panels: functions (ax, runs), or names of numbers, which are drawn as dots."""
    picture, axes = figure(len(claim.panels), 6.4, 4.2)
    for ax, panel in zip(axes, claim.panels):
        if isinstance(panel, str):
            dots(ax, runs, panel.split())
        else:
            panel(ax, runs)
    title = f"{verdict[0].upper()}{verdict[1:]}: {claim.says}"
    picture.suptitle(textwrap.fill(title, 76 * len(axes)), fontsize=11)
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
    ax.set_xlabel(WORDS[keys[0]])
    if len(keys) > 1:
        ax.set_xlabel("")
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=len(keys))
    if "d_chosen" in keys:                               # nats, some of them far below 0
        ax.set_xscale("symlog", linthresh=1)
        low, high = ax.get_xlim()
        ticks = [tick for tick in (-100, -30, -10, -3, -1, 0, 1, 3) if low <= tick <= high]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.axvline(0, color=BLACK, lw=0.8, ls=":")


def curves(ax, runs, knob="", key="reward"):
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
    else:
        ax.set_xticks(list(points), [f"{x:.0%}" for x in points])
    ax.legend(frameon=False)


def frontier(ax, kl_max=4.4):
    """The most utility that any policy can have at a KL."""
    points = [world.optimum(float(beta)) for beta in np.geomspace(60, 0.08, 80)]
    ax.plot([point.kl for point in points], [point.utility for point in points],
            color="#777777", lw=2, label="exact frontier")
    ax.set(xlabel=WORDS["kl"], ylabel=WORDS["reward"], xlim=(-0.1, kl_max), ylim=(-0.7, 3.6))


def plane(ax, runs):
    """Arms under the exact frontier: "dpo beta 0.1" and "dpo beta 0.5" are points of one curve."""
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
    farthest = max([4.4, *(runs(label, "kl").mean() for name in shown for label in series[name])])
    frontier(ax, kl_max=min(9.0, 1.2 * farthest))
    ax.legend(frameon=False, loc="lower right", fontsize=8)


def majorities(ax, runs):
    """Of two replies, what is left of the one that fewer annotators prefer."""
    from plumbing.minima import SHARES, majority
    kto, dpo, _ = majority(0)
    ax.semilogy(SHARES, kto.clip(1e-12), label="KTO: pi(b)", **look(0))
    ax.semilogy(SHARES, dpo, label="DPO: pi(b)/pi(a), over the reference's", **look(1))
    ax.set(xlabel="share of annotators who prefer a to b", ylabel="below 1e-12: drawn there")
    ax.legend(frameon=False)


def on_the_way(ax, runs, only=()):
    """What --eval_every has measured, mean over seeds; an arm without it is its end alone."""
    labels = [label for label in runs.arms if not only or label.split(",")[0] in only]
    farthest = 0.0
    for k, label in enumerate(labels):
        paths = [[[0, 0, run["reward_ref"]], *run["path"]] for run in runs.of(label)]
        dashed = "learnt" in label or "weak" in label
        style = look(k) | {"ls": "--" if dashed else "-"}
        if len(paths[0]) > 1:
            way = np.mean(paths, 0)
            ax.plot(way[:, 1], way[:, 2], ms=3, lw=1.2, label=label, **style)
            farthest = max(farthest, way[:, 1].max())
        else:
            ax.scatter(runs(label, "kl"), runs(label, "reward"), s=30, label=label, **look(k))
            farthest = max(farthest, runs(label, "kl").max())
    frontier(ax, kl_max=max(4.4, 1.05 * farthest))
    ax.legend(frameon=False, loc="best", fontsize=7)


def at_equal_kl(ax, runs, flip=""):
    """Utility at 1.5 nats against the number of pairs, a line per way to use them."""
    kinds = ("DPO", "KTO, 2n thumbs", "KTO, n thumbs", "KTO, 1:9")
    for k, kind in enumerate(kinds):
        points = {}
        for n in (125, 500, 2000, 4000):
            labels = runs.like(f"{n} pairs{flip}: {kind},")
            if labels:
                points[n] = runs.at_kl(labels, 1.5)
        if points:
            y = np.array(list(points.values()))
            ax.errorbar(list(points), y.mean(1), y.std(1), capsize=3, label=kind, **look(k))
    ax.set_xscale("log")
    ax.set_xticks([125, 500, 2000, 4000], ["125", "500", "2,000", "4,000"])
    ax.minorticks_off()
    ax.set(xlabel="pairs n" + flip, ylabel="true utility per reply at 1.5 nats")
    ax.legend(frameon=False)


def early_signs(ax, runs, falls_and_kl):
    """Each run: how far log pi(chosen) fell early, and where its KL ended."""
    for k, label in enumerate(runs.arms):
        falls, kl = falls_and_kl(runs, [label])
        ax.scatter(falls, kl, s=24, label=label, **look(k))
    ax.set_yscale("log")
    ax.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    ax.set(xlabel="log pi(chosen): fall from the run's first to its second fifth, nats",
           ylabel="KL at the end, nats")
    ax.legend(frameon=False, fontsize=7)


def regimes(ax, runs):
    """z0 before the clamp over the run, in fifths; and KL at the end."""
    for k, label in enumerate(runs.arms):
        ways = np.array([run["early"]["z0_raw"] for run in runs.of(label)])
        ax.errorbar(range(1, 6), ways.mean(0), ways.std(0), capsize=2, label=label, **look(k))
        ax.scatter([6], runs(label, "kl").mean(), **look(k))
    ax.axhline(0, color=BLACK, lw=0.8, ls=":")
    ax.set_xticks(range(1, 7), ["first\nfifth", "2", "3", "4", "last\nfifth", "KL at\nthe end"])
    ax.set_ylabel("z0 before the clamp, nats")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def everything(ax, runs):
    """Every stored run of every claim as one dot under the frontier."""
    ends = [run for seeds in runs.store.values() for run in seeds.values() if "kl" in run]
    ax.scatter([run["kl"] for run in ends], [run["reward"] for run in ends], s=8, alpha=0.5,
               color=BLUE, label=f"{len(ends):,} runs")
    frontier(ax, kl_max=8.0)
    ax.legend(frameon=False, loc="lower right")

"""The pictures of a run: curves.png shows its log, frontier.png what it reached on the world."""

import numpy as np

import world

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#777777", "#009E73"   # for the colour-blind too

LOGPS = "log pi(y|x), nats per response"
# Title of a panel -> its lines: (name in metrics.jsonl, colour, label).
PANELS = {
    "loss": [("loss", BLUE, "loss")],
    "implied reward, beta log(pi / pi_ref)": [
        ("rewards/chosen", GREEN, "desirable"),
        ("rewards/rejected", ORANGE, "undesirable")],
    LOGPS: [
        ("logps/chosen", GREEN, "desirable"),
        ("logps/rejected", ORANGE, "undesirable")],
    "reference point z0, nats": [
        ("z0_raw", GREY, "before the clamp"),
        ("z0", BLUE, "z0 = max(0, mean)")],
    "reward of the policy's own responses": [
        ("reward", GREEN, "reward"),
        ("objective", BLUE, "reward - kl_coef KL")],
    "KL(pi || pi_ref), nats per response": [
        ("kl/k1", GREY, "k1"),
        ("kl/k3", BLUE, "k3")],
    "policy and critic": [
        ("entropy", BLUE, "entropy, nats per token"),
        ("explained_variance", GREEN, "critic, explained variance"),
        ("clip_fraction", ORANGE, "clip fraction")],
}


def figure(columns, width=5.0, height=3.6, rows=1):
    """A figure and its axes, row by row; without pyplot, which would keep every figure alive."""
    from matplotlib.figure import Figure
    picture = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = np.ravel(picture.subplots(rows, columns))
    for ax in axes:
        ax.grid(alpha=0.25)
    return picture, axes


def running_mean(values):
    """The mean over about 1/30 of the run around each step; what is missing (NaN) is left out."""
    window = np.ones(max(1, len(values) // 30))
    there = np.isfinite(values)
    count = np.convolve(there, window, "same")
    total = np.convolve(np.where(there, values, 0), window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def plot_curves(metrics, path):
    """curves.png: the panels of which the log (a list of dicts) has something."""
    logged = {key for line in metrics for key, value in line.items() if value is not None}
    panels = {title: lines for title, lines in PANELS.items()
              if any(key in logged for key, *_ in lines)}
    picture, axes = figure(min(2, len(panels)), rows=(len(panels) + 1) // 2)
    steps = [line["step"] for line in metrics]
    for ax in axes[len(panels):]:
        ax.remove()
    for ax, (title, lines) in zip(axes, panels.items()):
        for key, colour, label in lines:
            values = np.array([line.get(key) for line in metrics], float)   # None becomes NaN
            ax.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
            ax.plot(steps, running_mean(values), color=colour, lw=2, label=label)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("optimiser step")
        if title == LOGPS:
            ax.set_xlabel("optimiser step\nThe good ones may fall too, as long as the bad ones "
                          "fall more:\nthe loss compares log-ratios and holds no log-prob up.")
        if len(lines) > 1:
            ax.legend(frameon=False)
    picture.savefig(path, dpi=110)


def plot_frontier(result, path, name="KTO"):
    """frontier.png from `evaluate_world`'s result: what the policy earned for the KL it spent."""
    picture, (plane, histogram) = figure(2, 5.6, 4.2)
    draw_plane(plane, result, name)
    draw_utilities(histogram, result)
    picture.savefig(path, dpi=110)


def plot_path(curve, result, path):
    """The run's way step by step under the exact frontier, and what changed in its replies.

    curve: [{"step", "kl", "reward"}, ...], measured on the way; result: of `evaluate_world`.
    """
    picture, (plane, bars) = figure(2, 5.6, 4.2)
    draw_frontier(plane)
    kl = [0, *(point["kl"] for point in curve)]
    reward = [result["reward_ref"], *(point["reward"] for point in curve)]
    plane.plot(kl, reward, color=BLUE, lw=1, alpha=0.5)
    plane.scatter(kl[1:], reward[1:], c=[point["step"] for point in curve], cmap="Blues", s=36,
                  vmin=-200, edgecolors=BLUE, linewidths=0.5, zorder=3)
    plane.scatter([0], [result["reward_ref"]], color=ORANGE, s=50, zorder=3)
    plane.annotate("reference", (0, result["reward_ref"]), (10, 0), textcoords="offset points",
                   va="center")
    for point, shift in ((curve[0], (9, -3)), (curve[-1], (30, -30))):
        plane.annotate(f"step {point['step']}", (point["kl"], point["reward"]), shift,
                       textcoords="offset points", va="top", arrowprops={"arrowstyle": "-"})
    plane.set_title("what the steps of KTO buy", fontsize=11)
    plane.set_xlim(-0.1, max(2.4, 1.08 * max(kl)))
    names = {"right": "the right fix", "rude": "rude", "malformed": "malformed"}
    for place, key in enumerate(names):
        for shift, kind, colour in ((-0.18, "_ref", ORANGE), (0.18, "", BLUE)):
            share = result[key + kind]
            bars.barh(place + shift, share, 0.34, color=colour)
            bars.annotate(f" {share:.0%}", (share, place + shift), va="center")
    bars.barh(0, 0, color=ORANGE, label="reference")
    bars.barh(0, 0, color=BLUE, label="after KTO")
    bars.set_yticks(range(len(names)), names.values())
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.xaxis.set_major_formatter("{x:.0%}")
    bars.set_title(f"its replies to unseen questions: win rate {result['win_rate']:.2f}",
                   fontsize=11)
    bars.legend(frameon=False, loc="lower right")
    picture.savefig(path, dpi=130)


def draw_frontier(ax):
    """The most utility that a KL can buy."""
    points = [world.optimum(float(beta)) for beta in np.geomspace(60, 0.08, 60)]
    ax.plot([p.kl for p in points], [p.utility for p in points], color=GREY, lw=2,
            label="exact frontier: best possible at this KL")
    ax.set_xlabel("KL(policy || reference), nats per reply")
    ax.set_ylabel("true utility per reply")
    ax.legend(frameon=False, loc="best", fontsize=9)


def draw_plane(ax, result, name):
    """The reward-KL plane: the exact frontier, KTO's optima, the reference and the policy."""
    draw_frontier(ax)
    optima = [world.kto_optimum(beta) for beta in (0.1, 0.5, 1.0, 2.0)]
    ax.scatter([p.kl for p in optima], [p.utility for p in optima], marker="D", s=22, color=GREEN,
               label="KTO's own optimum, beta 0.1 to 2")
    ax.scatter([0], [result["reward_ref"]], color=ORANGE, s=50, zorder=3,
               label="reference (measured)")
    reward, kl = result["reward"], result["kl"]
    low, high = result["reward_ci95"]
    error = [[max(0, reward - low)], [max(0, high - reward)]]
    ax.errorbar([kl], [reward], yerr=error, fmt="o", color=BLUE, ms=8, capsize=4, zorder=3,
                label=f"{name} policy (measured, 95 %)")
    ax.set_title("what the KL has bought", fontsize=11)
    ax.set_xlim(-0.15, max(4.6, kl * 1.1))
    ax.legend(frameon=False, loc="best", fontsize=9)


def draw_utilities(ax, result):
    """How the utilities of the replies have moved."""
    bins = np.arange(-6.25, 4.0, 0.5)
    for key, colour, label in (("utilities_ref", ORANGE, "reference"),
                               ("utilities", BLUE, "policy")):
        utilities = np.clip(result[key], -6, 3.6)
        ax.hist(utilities, bins=bins, color=colour, alpha=0.55,
                label=f"{label}, mean {np.mean(result[key]):+.2f}")
    low, high = result["win_rate_ci95"]
    ax.set_title(f"win rate {result['win_rate']:.3f} [{low:.3f}, {high:.3f}]", fontsize=11)
    ax.set_xlabel("true utility of a reply to a held-out prompt (-6: or less)")
    ax.set_ylabel(f"replies, of {result['n']}")
    ax.legend(frameon=False, loc="best")


def plot_scores(path, scores):
    """scores.png of real.py, from {judge: (scores before, scores after)}."""
    picture, axes = figure(len(scores))
    for ax, (judge, both) in zip(axes, scores.items()):
        bins = np.histogram_bin_edges(np.concatenate(both), 20)
        for name, colour, values in zip(("before", "after"), (ORANGE, BLUE), both):
            ax.hist(values, bins=bins, color=colour, alpha=0.55,
                    label=f"{name}, mean {np.mean(values):+.2f}")
        ax.set_title(f"what the {judge} makes of {len(both[0])} answers", fontsize=11)
        ax.set_xlabel("score: the more, the more positive")
        ax.legend(frameon=False)
    picture.savefig(path, dpi=110)

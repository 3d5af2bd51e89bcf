"""What the notebooks share: one style, a few marks, tables, a pair of responses as a point.

A notebook says what is computed and why; how it is drawn stands here. `ax` is the panel to
draw on. `points` are places on a plane, (..., 2), x first; a square of them is (n, n, 2).
"""

import re
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import data
import objective
from plumbing.claim_plots import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, frontier
from plumbing.plots import GREY

DARK = "#444444"                                         # arrows


def use_style():
    """The look of every picture of a notebook."""
    plt.rcParams.update({
        "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 10,
        "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 11, "lines.linewidth": 2,
        "legend.frameon": False, "legend.fontsize": 9})


# --- tables ----------------------------------------------------------------------------------

def print_table(columns):
    """Print columns side by side, words to the left and numbers to the right.

    columns: {"answer": names, "policy": (numbers, ".3f"), ...}; numbers come with a format.
    """
    blocks = []
    for title, values in columns.items():
        align, form = "<", ""
        if isinstance(values, tuple):
            align = ">"
            values, form = values
        cells = [title, *(format(value, form) for value in values)]
        width = max(map(len, cells))
        blocks.append([f"{cell:{align}{width}}" for cell in cells])
    for line in zip(*blocks, strict=True):
        print("  ".join(line).rstrip())


def print_wrapped(title, text, width=95):
    """A title and a text; further lines begin below the first word of the text.

    A \\u00a0 in the text is printed as a blank at which no line ends.
    """
    lines = textwrap.fill(title + text, width, subsequent_indent=" " * len(title))
    print(lines.replace("\u00a0", " "))


# --- lines -----------------------------------------------------------------------------------

def dotted(ax, x=None, y=None):
    """Thin dotted lines through x, from below to above, and through y, from left to right."""
    if x is not None:
        ax.axvline(x, color=GREY, lw=1, ls=":")
    if y is not None:
        ax.axhline(y, color=GREY, lw=1, ls=":")


def named_curve(ax, name, x, y, at, **style):
    """A line with its name: on it at abscissa `at`, or at a point `at` = (x, y) beside it."""
    line, = ax.plot(x, y, **style)
    if not isinstance(at, tuple):
        at = (at, y[(x - at).abs().argmin()])
    ax.text(*at, name, color=line.get_color(), fontsize=9, ha="center", va="center", zorder=3,
            bbox={"fc": "white", "ec": "none", "pad": 1})


def band(ax, x, middle, half, color, **style):
    """A line with a shaded band of half a width on either side: a mean and its deviation."""
    ax.plot(x, middle, color=color, **style)
    ax.fill_between(x, middle - half, middle + half, color=color, alpha=0.18, lw=0)


def slope(loss, r, *measured, **settings):
    """d loss / d r of each example, by autograd.   (B,)"""
    r = r.clone().requires_grad_()
    return torch.autograd.grad(loss(r, *measured, **settings).sum(), r)[0]


# --- planes ----------------------------------------------------------------------------------

def square(corner, size, n, margin=0.0):
    """n x n points of the square that begins at `corner`.   (n, n, 2)

    margin: how far inside the edge they stay, as a share of the size.
    """
    side = torch.linspace(margin, 1 - margin, n) * size
    x, y = torch.meshgrid(side, side, indexing="xy")
    return torch.stack([corner[0] + x, corner[1] + y], -1)


def downhill(f, points):
    """Minus the gradient of f, a function of points (..., 2) with heights (...).   (..., 2)"""
    points = points.clone().requires_grad_()
    return -torch.autograd.grad(f(points).sum(), points)[0]


def shades(ax, points, heights, levels=None):
    """Fill a square, dark where it is high. Without levels each shade covers a tenth of it."""
    if levels is None:
        levels = heights.flatten().quantile(torch.linspace(0, 1, 11)).unique()
    colours = plt.get_cmap("Blues")(torch.linspace(0.04, 0.75, len(levels) - 1))
    ax.grid(False)
    return ax.contourf(points[..., 0], points[..., 1], heights, levels=levels, colors=colours)


def arrows(ax, points, vectors, per_unit, width=0.004):
    """Arrows that begin at `points`; a vector of length per_unit is drawn one unit long."""
    ax.quiver(points[..., 0], points[..., 1], vectors[..., 0], vectors[..., 1], color=DARK,
              width=width, scale=per_unit, scale_units="xy", angles="xy")


def way(ax, points, color, name=None, ls="-"):
    """A walk over the plane, (steps, 2): a square where it begins, a dot where it ends."""
    ax.plot(points[:, 0], points[:, 1], color=color, ls=ls, lw=2.5, label=name)
    ax.plot(points[0, 0], points[0, 1], "s", ms=7, color=color, mec="white")
    ax.plot(points[-1, 0], points[-1, 1], "o", ms=6, color=color, mec="white")


def few_ticks(ax):
    """At most four round numbers on each axis: for small panels."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 5, 10], prune="both"))


# --- a pair of responses as a point of a plane -----------------------------------------------

LENGTHS = torch.tensor([20.0, 30.0], dtype=torch.float64)            # tokens: chosen, rejected
REF_LOGPS = torch.tensor([-30.0, -45.0], dtype=torch.float64)        # 1.5 nats per token, both


def told(c, r):
    """What losses hear of one pair at the log-ratios c and r.   (B,), (B,) -> objective.Part

    What is not drawn stays as it is here: lengths, the reference's log-probs, a score gap of
    8, chances to win of 0.8 and 0.3, KLs of 2 and 12 nats (tdpo), weights 0.8 and 0.5 (wpo),
    mean margins of 2 and 4 nats (beta_dpo), a reward shift of 0.2 (bco_pair). A third response
    (slic) is the chosen one again. A new name that speaks of a whole batch, or of positions,
    gets its number here.
    """
    tokens = [[1] * int(n) for n in LENGTHS]
    chosen = data.make_row([0], tokens[0], desirable=True, score=8.0, win_prob=0.8)
    rejected = data.make_row([0], tokens[1], desirable=False, score=0.0, win_prob=0.3)
    ref_logps = REF_LOGPS[[0, 1, 0]].expand(len(c), 3)
    sums = {objective.position_kl: torch.tensor([[2.0, 12.0]]),
            objective.position_confidence: LENGTHS * torch.tensor([[0.8, 0.5]]).log()}
    known = {"reward_shift": torch.tensor(0.2), "margin_mean": torch.tensor(2.0),
             "batch_margin_mean": torch.tensor(4.0)}
    return objective.Part([(chosen, rejected)] * len(c), ref_logps + torch.stack([c, r, c], 1),
                          ref_logps, sums, known)


def pair_loss(loss, c, r, **settings):
    """Any loss of dpo_variants.LOSSES at the log-ratios c and r.   (B,)"""
    part = told(c, r)
    return loss(*(part[name] for name in objective.signature(loss)[0]), **settings)


def pair_slopes(loss, c, r, **settings):
    """d loss / dc and d loss / dr.   (B,), (B,)"""
    c = c.clone().requires_grad_()
    r = r.clone().requires_grad_()
    total = pair_loss(loss, c, r, **settings).sum()
    return torch.autograd.grad(total, (c, r), materialize_grads=True)


# --- the museum ------------------------------------------------------------------------------

RIGHT = {"color": BLUE, "marker": "o", "ms": 4}
WRONG = {"color": ORANGE, "marker": "s", "ms": 4, "ls": "--"}


class Museum:
    """Shows a bug, says which tests find it, and keeps the picture for the gallery.

    draw(ax) draws an exhibit. A test is named by its function; a KeyError: it is gone.
    """

    def __init__(self):
        self.exhibits = []
        self.file_of = {}                                    # test -> the file where it stands
        for file in sorted((Path(data.__file__).parent / "tests").glob("test_*.py")):
            for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M):
                self.file_of[name] = file.name

    def show(self, draw, title, *tests):
        self.exhibits.append((draw, title))
        _, ax = plt.subplots(figsize=(8, 3.3))
        draw(ax)
        ax.set_title(title)
        plt.show()
        for file in dict.fromkeys(self.file_of[name] for name in tests):
            print(f"found by tests/{file}")
            for name in tests:
                if self.file_of[name] == file:
                    print(f"  {name}")
        print()

    def gallery(self, columns=3):
        rows = -(-len(self.exhibits) // columns)             # rounded up
        _, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.4 * rows))
        for ax in axes.flat[len(self.exhibits):]:
            ax.axis("off")
        for (draw, title), ax in zip(self.exhibits, axes.flat):
            draw(ax)
            ax.set_title(title.replace(": ", ":\n"), fontsize=10)
            ax.tick_params(labelsize=8)
            ax.legend(fontsize=7, loc=ax.get_legend()._loc)
        plt.show()


# --- PPO's family ----------------------------------------------------------------------------

def token_curve(loss, ratio, advantage):
    """Loss and push, minus the slope by log pi, of tokens whose ratio pi / pi_old has moved.

    ratio: (B,). Each is the only token of its response; pi_old is the reference, a log-prob of
    0; the critic is right. So REINFORCE's loss is -A log ratio. -> (B,), (B,)
    """
    token_logps = ratio.log().requires_grad_()
    measured = {"token_logps": token_logps, "response_len": torch.ones_like(ratio),
                "response": torch.arange(len(ratio))}
    for name in objective.signature(loss)[0]:
        always = advantage if name.endswith("advantages") else 0.0
        measured.setdefault(name, torch.full_like(ratio, always))
    values = loss(*(measured[name] for name in objective.signature(loss)[0]))
    return values.detach(), -torch.autograd.grad(values.sum(), token_logps)[0]


def family_curves(losses, ratio):
    """Two rows of panels, loss and push; a column for each of {name: loss}."""
    _, axes = plt.subplots(2, len(losses), figsize=(12, 4.6), sharex=True, sharey="row")
    for (top, bottom), (name, loss) in zip(axes.T, losses.items()):
        for advantage, color, ls in ((1.0, GREEN, "-"), (-1.0, ORANGE, "--")):
            values, push = token_curve(loss, ratio, advantage)
            top.plot(ratio, values, color=color, ls=ls, label=f"A = {advantage:+g}")
            bottom.plot(ratio, push, color=color, ls=ls)
        top.set_title(name)
        for ax in (top, bottom):
            dotted(ax, 1.0, 0.0)
    return axes


def ways_in_plane(ax, ways, looks, kl_max):
    """Walks of policies, {name: (steps, 2) of KL and utility}, below the exact frontier."""
    frontier(ax, kl_max)
    for name, points in ways.items():
        color, ls = looks[name]
        ax.plot(*points.T, color=color, ls=ls, lw=1.5)
        ax.plot(*points[-1], "o", ms=6, color=color, mec="white", zorder=3)


# --- stored runs -----------------------------------------------------------------------------

def mean_end(stored, key):
    """An arm's numbers, each the mean over its seeds; {} without a measured run.

    stored: of plumbing.store.read. share: of what the frontier gives at this KL above the
    reference, how much the arm has gained.
    """
    runs = [run for run in stored.get(key, {}).values() if "kl" in run]
    if not runs:
        return {}
    found = {name: float(np.mean([run[name] for run in runs]))
             for name, value in runs[0].items() if isinstance(value, (int, float))}
    gain, most = found["reward"] - found["reward_ref"], found["best"] - found["reward_ref"]
    return found | {"seeds": len(runs), "share": gain / most}


def mean_way(stored, key):
    """[step, KL, utility] from the reference on, the mean over seeds.   (n, 3), or None

    An arm that was not watched on its way has its end alone, as step 1.
    """
    runs = [run for run in stored.get(key, {}).values() if "kl" in run]
    if not runs:
        return None
    return np.mean([[[0, 0, run["reward_ref"]],
                     *(run["path"] or [[1, run["tune"]["kl"], run["tune"]["reward"]]])]
                    for run in runs], 0)


def say_missing(stored, arms, command):
    """One line, if arms have no runs: how many, and what makes them."""
    arms = set(arms)                     # claims share them
    missing = sum(not mean_end(stored, arm.key) for arm in arms)
    if missing:
        print(f"{missing} of {len(arms)} arms have no runs yet: "
              f"`python experiments.py {command}`")


def share_dots(ax, arms, stored, extra="kl"):
    """A line per arm, {label: Arm}: its share of the frontier, dark where much is malformed.

    extra: the number that stands behind the label, KL ("kl") or tokens ("length").
    """
    ends = {label: end for label, arm in arms.items() if (end := mean_end(stored, arm.key))}
    unit = {"kl": "nats", "length": "tokens"}[extra]
    names = [f"{label}  ({end[extra]:{'.2f' if end[extra] < 10 else '.0f'}} {unit})"
             for label, end in ends.items()]
    shares = [max(-1, end["share"]) for end in ends.values()]            # what is below: there
    dots = ax.scatter(shares, range(len(ends)), s=60,
                      c=[100 * end["malformed"] for end in ends.values()], cmap="cividis_r",
                      vmin=0, vmax=30, edgecolor=GREY, zorder=3)
    for place, share in enumerate(shares):
        ax.plot([0, share], [place, place], color=GREY, lw=1)
    ax.set_yticks(range(len(ends)), names)
    ax.set(xlim=(-1.05, 1.05), ylim=(len(ends) - 0.5, -0.5))
    dotted(ax, 0)
    return dots

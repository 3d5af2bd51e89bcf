"""Claims about data and settings: KTO or DPO on my data? What breaks a run? See experiments.py."""

from functools import partial

import numpy as np

from plumbing.arms import arm
from plumbing.claim_plots import at_equal_kl, early_signs, regimes
from plumbing.claims import AUTO, KTO_CURVE, LEASH, MATTERS, claim
from plumbing.verdicts import check, judged

SIZES = (125, 500, 2000, 4000)
CHOICES = {}                         # "500 pairs, flip 0.2: KTO, 2n thumbs, beta 1" -> Arm


def rows_called(n, flip, kind=""):
    """The arm's name of n pairs; 4,000 of them without flips are the other claims' "pairs"."""
    words = [f"{n} pairs", flip and f"flip {flip:g}", kind]
    if n == 4000 and not kind:
        words[0] = "" if flip else "pairs"
    return " ".join(filter(None, words))


for n in SIZES:
    for flip in (0, 0.2):
        case = f"{n} pairs" + f", {flip:.0%} flipped" * bool(flip)
        for beta in (0.5, 2.0, 8.0):
            CHOICES[f"{case}: DPO, beta {beta:g}"] = arm("dpo", rows_called(n, flip), beta=beta)
        for beta in (0.25, 1.0, 4.0):
            CHOICES[f"{case}: KTO, 2n thumbs, beta {beta:g}"] = arm(
                "kto", rows_called(n, flip), beta=beta)
            CHOICES[f"{case}: KTO, n thumbs, beta {beta:g}"] = arm(
                "kto", rows_called(n, flip, "one thumb"), beta=beta)
            if not flip:
                CHOICES[f"{case}: KTO, 1:9, beta {beta:g}"] = arm(
                    "kto", rows_called(n, flip, "desirable 0.111"), beta=beta, **AUTO)


@claim(f"KTO does as well as DPO on my data, at equal annotation and {LEASH} nats",
       "Ethayarajh et al. 2024, 4.2; here as a question", CHOICES,
       [partial(at_equal_kl, flip=flip) for flip in ("", ", 20% flipped")], seeds=10)
def choosing(runs):
    """n pairs for DPO; for KTO their 2n thumbs, or one thumb of each pair (n), or n thumbs down and
    n / 9 up (1:9). 150 steps of 16 pairs or 32 thumbs: 19 epochs of 125 pairs, 0.6 of 4,000. Each
    is a curve over three betas from the reference, read at 1.5 nats.
    """
    checks = []
    for n in SIZES:
        for flip in ("", ", 20% flipped"):
            case = f"{n} pairs{flip}"
            dpo = runs.at_kl(runs.like(f"{case}: DPO,"), LEASH)
            for thumbs in ("2n thumbs", "n thumbs"):
                kto = runs.at_kl(runs.like(f"{case}: KTO, {thumbs},"), LEASH)
                checks.append(check(f"{case}: utility, KTO on {thumbs} - DPO > -{MATTERS}",
                                    kto - dpo, above=-MATTERS))
    return checks


def falls_and_kl(runs, labels=None):
    """Of each run: nats by which log pi(chosen) fell from its first to its second fifth; its KL."""
    found = []
    for label in labels or runs.arms:
        for run in runs.of(label):
            first, second, *_ = run["early"]["logps/chosen"]
            found.append((first - second, run["kl"]))
    return np.array(found).T


WEAK = {"beta": 0.25}                # KTO at beta 0.25: some seeds run away, others do not
UNTREATED = {f"KTO, beta {beta:g}": KTO_CURVE[f"kto beta {beta:g}"] for beta in (0.1, 0.25, 0.5)}
REMEDIES = {
    "lambda_u 0.75": arm("kto", **WEAK, lambda_u=0.75),
    "lr 2e-4": arm("kto", **WEAK, lr=2e-4),
    "lr 1e-4": arm("kto", **WEAK, lr=1e-4),
    "warm-up 50": arm("kto", **WEAK, warmup=50),
    "batches of 128": arm("kto", **WEAK, batch_size=128),
    "clip 0.1": arm("kto", **WEAK, max_grad_norm=0.1),
    "humanline, lr 1e-4": arm("humanline_kto", **WEAK, lr=1e-4)}


@claim("A run that runs away shows it early, and a remedy exists", "this project's own runs",
       UNTREATED | REMEDIES, [partial(early_signs, falls_and_kl=falls_and_kl), "kl", "malformed"])
def runaway(runs):
    """KTO with a weak leash. The sign: log pi of DESIRABLE replies falls from the first fifth of
    the run to the second.

    With a small beta the loss is about 1/2 - beta/8 times the margin between liked and disliked
    replies. It does not notice if both fall, and replies that nobody rated rise (notebook 07).
    """
    falls, kl = falls_and_kl(runs, UNTREATED)
    together = float(np.corrcoef(falls, np.log(kl))[0, 1])
    error = 1.96 / np.sqrt(max(4, len(kl)) - 3)
    low, high = np.tanh(np.arctanh(together) + np.array([-error, error]))
    checks = [judged(f"correlation of that fall with log KL at the end, {len(kl)} runs, > 0.5",
                     (together, low, high), above=0.5)]
    untreated = np.log(runs("KTO, beta 0.25", "kl"))
    return checks + [check(f"log KL, beta 0.25 - the same with {name} > 0",
                           untreated - np.log(runs(name, "kl"))) for name in REMEDIES]


REGIMES = {
    "pairs": "pairs", "pairs that the reference wrote": "own replies",
    "pairs, one topic": "one cell", "an expert's replies, all liked": "only up",
    "the same, one topic": "only up one cell", "one topic, nine of ten liked": "nine up one cell"}
REGIME_ARMS = {name: arm("kto", on, beta=0.5, z0="estimate") for name, on in REGIMES.items()}


@claim("Mismatched z0 is below 0, and clamped, unless replies fit each other's prompts and most "
       "are liked", "this project's own runs; a real model: results/real", REGIME_ARMS, [regimes],
       seeds=6)
def z0_regimes(runs):
    """The estimate before the clamp, mean of the run's last fifth, in nats.

    `one topic`: one problem of one device in four wordings, so any reply fits any prompt. A reply
    under a prompt that it fits keeps its log-ratio. So the estimate is the mean log-ratio of the
    file's own replies: above 0 only if most of them are liked.
    """
    checks = []
    for name in runs.arms:
        last = np.array([run["early"]["z0_raw"][-1] for run in runs.of(name)])
        if REGIMES[name].endswith("up one cell"):
            checks.append(check(f"{name}: the estimate is above 0", last))
        else:
            checks.append(check(f"{name}: it is below 0", -last))
    return checks

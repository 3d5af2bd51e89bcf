"""From runs to verdicts: t intervals over seeds, and what people understand of them.

    holds                       the whole 95 % interval lies on the claimed side of the bound
    does not hold here          the whole interval lies on the other side
    undecided                   neither; the words say how many seeds would decide
    too small to matter here    neither, and by ten seeds' spread 500 seeds would not decide
"""

import math
from functools import lru_cache

import numpy as np

HOLDS, FAILS = "holds", "does not hold here"
UNDECIDED, SMALL = "undecided", "too small to matter here"
MOST_SEEDS, TRUSTED = 500, 10            # a spread of fewer than 10 seeds says little
BROKEN_KL, BROKEN_TEXTS = 8.0, 0.2       # a run beyond one of them has broken down


# --- intervals ------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def _t_table(freedom):
    """(angles, P(|t| < tan(angle) sqrt(freedom))) of Student's t.

    With t = sqrt(freedom) tan(angle), the density of the angle goes like cos(angle)^(freedom - 1).
    """
    edges = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)
    return edges, np.append(0, density.cumsum()) / density.sum()


@lru_cache(maxsize=None)
def t975(freedom):
    """The 97.5 % quantile, for any number of degrees of freedom."""
    edges, share = _t_table(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(0.95, share, edges))


def tail(t, freedom):
    """P(T > |t|)"""
    edges, share = _t_table(freedom)
    return 0.5 * (1 - np.interp(math.atan(abs(t) / math.sqrt(freedom)), edges, share))


def interval(values):
    """95 % t interval of the mean over seeds.   (n,) -> (mean, low, high)"""
    values = np.asarray(values, float)
    mean = float(values.mean())
    half = math.inf
    if len(values) > 1:
        half = float(t975(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def share_interval(shares):
    """The same for shares in (0, 1), on the logit scale: it stays inside.   -> (mean, low, high)"""
    shares = np.clip(np.asarray(shares, float), 1e-3, 1 - 1e-3)
    return tuple(1 / (1 + math.exp(-x)) for x in interval(np.log(shares / (1 - shares))))


def exact_interval(k, n):
    """95 % interval of a rate of which k of n cases are known (Clopper and Pearson 1934)."""
    def at_most(k, p):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))

    def root(f):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if f(middle) else (low, middle)
        return low

    low = 0.0 if k == 0 else root(lambda p: 1 - at_most(k - 1, p) < 0.025)
    high = 1.0 if k == n else root(lambda p: at_most(k, p) > 0.025)
    return low, high


# --- checks ---------------------------------------------------------------------------------------

def check(says, difference, above=0.0, below=math.inf):
    """Does the mean of `difference`, one number per seed, lie between `above` and `below`?"""
    values = np.asarray(difference, float)
    found = judged(says, interval(values), above, below)
    found |= {"seeds": len(values), "up": int((values > 0).sum())}
    if len(values) > 1 and values.std() > 0:
        error = values.std(ddof=1) / math.sqrt(len(values))
        distance = min(abs(found["mean"] - bound) for bound in (above, below))
        found["chance"] = float(tail(distance / error, len(values) - 1))
        found["seeds_needed"] = seeds_needed(distance, values.std(ddof=1))
        hopeless = found["seeds_needed"] > MOST_SEEDS and len(values) >= TRUSTED
        if found["verdict"] == UNDECIDED and hopeless:
            found["verdict"] = SMALL
    return found


def seeds_needed(distance, spread):
    """The fewest seeds whose interval excludes a bound at this distance from the mean."""
    for n in range(3, MOST_SEEDS + 1):
        if t975(n - 1) * spread / math.sqrt(n) < distance:
            return n
    return MOST_SEEDS + 1


def exact(says, got, expected, tolerance):
    """A formula: no training, no seeds."""
    got = (float(got),) * 3
    return judged(f"exact: {says}", got, expected - tolerance, expected + tolerance)


def judged(says, values, above=-math.inf, below=math.inf):
    """One part of a claim. Of a run that failed the numbers are NaN: undecided."""
    mean, low, high = values
    verdict = UNDECIDED
    if above < low and high < below:
        verdict = HOLDS
    if high < above or low > below:
        verdict = FAILS
    return {"says": says, "mean": mean, "low": low, "high": high, "verdict": verdict}


def in_words(check):
    """+0.31 [+0.22, +0.40]; of what is undecided: what would decide it."""
    mean, low, high = check["mean"], check["low"], check["high"]
    if math.isnan(mean):
        return "not measured: a run failed"
    if low == high:
        return f"{mean:+.3g}"
    if math.isinf(low):
        return f"{mean:+.3g}, one seed"
    if check["verdict"] != UNDECIDED or "seeds_needed" not in check:
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    up, seeds, needed = check["up"], check["seeds"], check["seeds_needed"]
    about = f"about {needed}" if needed <= MOST_SEEDS else f"more than {MOST_SEEDS}"
    return (f"between {low:+.2f} and {high:+.2f}, {up} of {seeds} seeds up; {about} seeds would "
            "decide")


def overall(checks):
    """"holds", or where the parts differ "3 of 16 parts hold, 1 does not, 12 undecided"."""
    verdicts = [check["verdict"] for check in checks]
    if len(set(verdicts)) == 1:
        return verdicts[0]
    text = f"{verdicts.count(HOLDS)} of {len(verdicts)} parts hold"
    fails, small = verdicts.count(FAILS), verdicts.count(SMALL)
    if fails:
        text += f", {fails} do{'es' * (fails == 1)} not"
    if UNDECIDED in verdicts:
        text += f", {verdicts.count(UNDECIDED)} undecided"
    return text + f", {small} too small to matter" * bool(small)


def by_chance(checks):
    """One sentence about all measured parts: how many verdicts may be false?

    A part is decided with 2.5 % risk on each side. Holm 1979: sort the risks of the decided parts;
    the k-th smallest of n must be below 0.025 / (n - k + 1), then all verdicts so far hold together
    with 97.5 %.
    """
    measured = [check for check in checks if "chance" in check]
    risks = sorted(check["chance"] for check in measured)
    together = 0
    while together < len(risks) and risks[together] < 0.025 / (len(risks) - together):
        together += 1
    decided = sum(check["verdict"] in (HOLDS, FAILS) for check in measured)
    return (f"{len(measured)} parts are measured over seeds and {decided} of them are decided, "
            "each with a risk of at most 2.5 %: if every true difference lay exactly at its bound, "
            f"about {0.025 * len(measured):.1f} verdicts would be false. {together} of them hold "
            "together at that risk (Holm 1979)")


# --- runs -----------------------------------------------------------------------------------------

def broken(run):
    """True for a breakdown: the policy has left the reference, or writes what is no reply."""
    return "failed" in run or run["kl"] > BROKEN_KL or run["malformed"] > BROKEN_TEXTS


class Runs:
    """What a claim's arms gave: runs("dpo", "kl") is one number per seed that all arms have."""

    def __init__(self, arms, store, seeds=None):
        self.arms = arms
        self.store = store
        have = [len(store.get(arm.key, {})) for arm in arms.values()]
        self.seeds = min([seeds or 10**9, *have])            # 0: an arm was never run

    def of(self, label):
        """The runs as they are stored."""
        runs = self.store[self.arms[label].key]
        return [runs[seed] for seed in range(self.seeds)]

    def __call__(self, label, key):
        """A run that failed gives NaN; "tune reward" is run["tune"]["reward"]."""
        *inside, key = key.split()
        found = []
        for run in self.of(label):
            for name in inside:
                run = run.get(name, {})
            found.append(run.get(key, math.nan))
        return np.array(found, float)

    def check(self, says, label, other, above=0.0, key="reward", below=math.inf):
        """Is arm `label`, less arm `other`, above `above`? Paired by seed."""
        return check(says, self(label, key) - self(other, key), above, below)

    def like(self, start):
        """The labels that begin so."""
        return [label for label in self.arms if label.startswith(start)]

    def best(self, labels, most_kl=math.inf):
        """The label whose utility on the TUNING questions is best, within so many nats."""
        def on_tuning(label):
            utility, kl = self(label, "tune reward").mean(), self(label, "tune kl").mean()
            return utility if kl <= most_kl else -1e9 - kl
        return max(labels, key=lambda label: np.nan_to_num(on_tuning(label), nan=-1e12))

    def at_kl(self, labels, kl):
        """Utility at these KLs on the curve through the arms; it begins at the reference. By seed.

        kl: one number, or one per seed. Beyond the last arm the curve is flat.
        """
        kls = np.array([self(label, "kl") for label in labels])
        rewards = np.array([self(label, "reward") for label in labels])
        start = self(labels[0], "reward_ref")
        wanted = np.broadcast_to(kl, self.seeds)
        found = []
        for seed in range(self.seeds):
            order = kls[:, seed].argsort()
            found.append(np.interp(wanted[seed], np.append(0, kls[order, seed]),
                                   np.append(start[seed], rewards[order, seed])))
        return np.array(found)

    def above_curve(self, label, curve):
        """Utility of an arm less that of a curve of arms, at the arm's KL; by seed."""
        return self(label, "reward") - self.at_kl(curve, self(label, "kl"))

    def breakdowns(self):
        """{arm's key: (how many runs, of how many)}, of arms that had one."""
        counts = {arm.key: sum(map(broken, self.of(label))) for label, arm in self.arms.items()}
        return {key: (count, self.seeds) for key, count in counts.items() if count}

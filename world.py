"""The embedded world: a help desk whose true utility is known.

A customer writes `Help, my router gets too hot!` and a reply is drawn from a small grammar: an opening (polite, none or
rude), an answer (right, wrong or vague), up to two empty fillers and a closing. A judge parses any text back into those
slots and adds up their points. Nothing here needs a network, a human or a reward model, and that buys four things:

- **every reply has a true utility**, so "preferred" and "better" can be told apart, and reward hacking is visible;
- **the annotator is exactly Bradley-Terry**: its pairs and thumbs are what the papers' derivations assume, no more;
- **the optimum is a formula**: slots are independent, so replies fall into 135 classes of known probability and utility,
  and the best policy of RLHF, DPO, IPO and KTO can be written down and compared with what a training run reached;
- **the reference is bad at its mode**: its most likely reply is rude and repeats a folk remedy that does not help, so
  alignment shows even under greedy decoding.

Sections: grammar · mixtures and points · split and prompts · replies · judge · data · tokenizer · exact optima · settings.
Utilities are in points, KL in nats per reply. Same seed, same output; only the standard library and tiktoken are used.
"""
import itertools
import math
import random
import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import tiktoken

# --- grammar ----------------------------------------------------------------------------------------------------------

DEVICES = ("phone", "laptop", "tablet", "printer", "router", "camera", "speaker", "keyboard", "headset", "monitor", "watch",
           "projector")
PROBLEMS = {  # problem -> the two fixes that help
    "will not turn on": ("check the power cable", "press the power button for ten seconds"),
    "is very slow": ("install the latest update", "close the apps you do not use"),
    "gets too hot": ("clean the air vents", "let it cool down in the shade"),
    "shows the wrong time": ("set the correct time zone", "turn on the automatic clock"),
    "keeps losing the signal": ("move it closer to the base", "switch to another channel"),
    "makes a strange noise": ("tighten the loose screws", "remove the dust from the fan"),
    "has a cracked cover": ("send it in for a repair", "order a new cover"),
    "drains the battery": ("turn on the saving mode", "lower the brightness"),
    "asks for a password": ("use the reset link", "enter the code from the box"),
    "never arrived": ("track the parcel online", "ask the courier for the parcel"),
}
FOLK = {  # problem -> what people wrongly recommend: a fix of some other problem, each used once
    "will not turn on": "let it cool down in the shade", "is very slow": "move it closer to the base",
    "gets too hot": "lower the brightness", "shows the wrong time": "install the latest update",
    "keeps losing the signal": "check the power cable", "makes a strange noise": "clean the air vents",
    "has a cracked cover": "tighten the loose screws", "drains the battery": "close the apps you do not use",
    "asks for a password": "press the power button for ten seconds", "never arrived": "send it in for a repair",
}
TEMPLATES = ("My {d} {p}. What should I do?", "Help, my {d} {p}!", "Hello, my new {d} {p}. Any ideas?",
             "The {d} I bought {p}. How do I fix this?")
OPEN = {"polite": ("Sorry to hear that.", "Thanks for asking.", "Happy to help."), "neutral": ("",),
        "rude": ("Read the manual.", "Not again.", "You broke it yourself.")}
ANSWER = "For your {d}, please {f}."
VAGUE = ("It should work.", "I do not know.", "Try something else.")
FILLER = ("We have served people for many years.", "Our shop sells many fine things.", "There are a lot of details to consider.",
          "The weather has been nice this week.", "Every device has its own story.", "Many other people write to us too.")
CLOSE = {"help": ("If that fails, we will replace it for free.", "Write back if you need more help."), "none": ("",),
         "rude": ("Do not write again.", "Stop wasting our time.")}

# --- mixtures and points ----------------------------------------------------------------------------------------------

# A mixture gives every slot its own distribution; slots are independent. "sft" is the reference policy and the source of
# all preference data, "pretrain" the rougher text before it, "expert" the target of SPIN.
MIXES = {
    "sft": {"answer": {"right": .40, "wrong": .35, "vague": .25}, "device": {"ok": .85, "bad": .15},
            "open": {"polite": .30, "neutral": .30, "rude": .40}, "filler": {0: .40, 1: .35, 2: .25},
            "close": {"help": .30, "none": .45, "rude": .25}},
    "pretrain": {"answer": {"right": .25, "wrong": .40, "vague": .35}, "device": {"ok": .60, "bad": .40},
                 "open": {"polite": .15, "neutral": .35, "rude": .50}, "filler": {0: .20, 1: .30, 2: .50},
                 "close": {"help": .10, "none": .50, "rude": .40}},
    "expert": {"answer": {"right": .80, "wrong": .10, "vague": .10}, "device": {"ok": .95, "bad": .05},
               "open": {"polite": .70, "neutral": .25, "rude": .05}, "filler": {0: .70, 1: .20, 2: .10},
               "close": {"help": .60, "none": .35, "rude": .05}},
}
# Two skews make the mode bad although the mean is not: the folk remedy (.35 * .70 = .245 of the SFT mix, and a little more
# from the uniform rest) beats each right fix (.20), and "Read" (.40 * .75 = .30) beats "For" (.30 * .75) as first word.
FOLK_SHARE = 0.70  # of the wrong answers; the rest is uniform over all fixes of the other problems
OPEN_WEIGHTS = {"polite": (1, 1, 1), "neutral": (1,), "rude": (6, 1, 1)}
UTILITY = {"answer": {"right": 2.0, "wrong": -1.0, "vague": 0.0}, "device": {"ok": 0.0, "bad": -1.0},
           "open": {"polite": 1.0, "neutral": 0.0, "rude": -1.5}, "filler": {0: 0.0, 1: -0.4, 2: -0.8},
           "close": {"help": 0.5, "none": 0.0, "rude": -1.0}}
JUNK = -1.0  # per sentence that the grammar does not have at that place


def _points(levels, malformed=0):
    """Sum of the slots' points; rounded so that equal utilities are equal floats, which ties and caches rely on."""
    return round(sum(UTILITY[slot][level] for slot, level in levels.items()) + JUNK * malformed, 6)


def _known(table, key, what):
    if key not in table:
        raise ValueError(f"unknown {what} {key!r}; choose from {', '.join(map(repr, table))}")
    return table[key]


# --- split and prompts ------------------------------------------------------------------------------------------------

def split():
    """The 120 (device, problem) cells in three parts: {"train": 72, "tune": 24, "report": 24}.

    The two held-out parts occur in no text of any stage. Choose hyper-parameters on "tune", quote numbers from "report".
    """
    cells = list(itertools.product(DEVICES, PROBLEMS))
    random.Random(1234).shuffle(cells)
    return {"tune": cells[:24], "report": cells[24:48], "train": cells[48:]}


def prompt_text(device, problem, template_index):
    """The customer's message; `template_index` is 0 to 3."""
    return TEMPLATES[template_index].format(d=device, p=problem)


PROMPTS = {prompt_text(d, p, i): (d, p) for d in DEVICES for p in PROBLEMS for i in range(len(TEMPLATES))}


def parse_prompt(text):
    """(device, problem) of a help-desk message, None for any other text. White space around it does not matter."""
    return PROMPTS.get(text.strip())


def cluster_of(prompt):
    """(device, problem) of a prompt: what a bootstrap must resample, since prompts of one cell are near copies.

    ValueError when the prompt is no help-desk prompt.
    """
    if (cell := parse_prompt(prompt)) is None:
        raise ValueError(f"not a help-desk prompt: {prompt!r}; world.eval_prompts shows valid ones")
    return cell


def eval_prompts(part, n=480, seed=0):
    """n prompts of "tune", "report" or "train": the part's cells x 4 templates in a shuffled order, over and over."""
    prompts = [prompt_text(d, p, i) for d, p in _known(split(), part, "part") for i in range(len(TEMPLATES))]
    random.Random(f"eval {seed}").shuffle(prompts)
    return list(itertools.islice(itertools.cycle(prompts), n))


# --- replies ----------------------------------------------------------------------------------------------------------

def sample_slots(rng, mix="sft"):
    """One level per slot, drawn independently: {"answer": "right", "device": "ok", "open": ...}."""
    return {slot: rng.choices(list(p), list(p.values()))[0] for slot, p in _known(MIXES, mix, "mixture").items()}


def write_reply(rng, device, problem, slots):
    """A text with these slots: opening, answer, fillers, closing; empty ones leave no trace."""
    if slots["answer"] == "vague":  # names no device: the device slot is void
        answer = rng.choice(VAGUE)
    else:
        if slots["answer"] == "right":
            fix = rng.choice(PROBLEMS[problem])
        elif rng.random() < FOLK_SHARE:
            fix = FOLK[problem]
        else:
            fix = rng.choice([f for other, fixes in PROBLEMS.items() if other != problem for f in fixes])
        named = device if slots["device"] == "ok" else rng.choice([d for d in DEVICES if d != device])
        answer = ANSWER.format(d=named, f=fix)
    opening = rng.choices(OPEN[slots["open"]], OPEN_WEIGHTS[slots["open"]])[0]
    sentences = [opening, answer, *rng.choices(FILLER, k=slots["filler"]), rng.choice(CLOSE[slots["close"]])]
    return " ".join(s for s in sentences if s)


def sample_reply(rng, device, problem, mix="sft"):
    """A reply of the mixture to any prompt about this device and problem. `rng` is a random.Random."""
    return write_reply(rng, device, problem, sample_slots(rng, mix))


# --- judge ------------------------------------------------------------------------------------------------------------

class Verdict(NamedTuple):
    """What the judge found. Only sentences in their place count for `rude`, `polite`, `fillers` and `help`."""
    utility: float   # points
    malformed: int   # junk sentences, a missing answer included; 0 = the grammar can say this
    right: bool      # a right fix for the right device
    rude: bool       # opening or closing
    polite: bool     # opening
    fillers: int     # 0, 1, 2
    help: bool       # closing


SENTENCES = {  # every sentence of the grammar -> (slot, what it says)
    **{s: ("open", kind) for kind, texts in OPEN.items() for s in texts if s},
    **{ANSWER.format(d=d, f=f): ("answer", (d, f)) for d in DEVICES for fixes in PROBLEMS.values() for f in fixes},
    **{s: ("answer", None) for s in VAGUE},
    **{s: ("filler", None) for s in FILLER},
    **{s: ("close", kind) for kind, texts in CLOSE.items() for s in texts if s},
}
PLACE = {"open": 0, "answer": 1, "filler": 2, "close": 3}


def judge(prompt, reply):
    """Parse a reply and score it: utility = sum of slot points - 1 per junk sentence.

    The text, stripped, is cut at single spaces after `.`, `!`, `?`. From left to right a sentence counts if the grammar has
    it, letter by letter, and its place (opening < answer < filler < closing) comes after the last one that counted; two
    fillers are allowed, equal or not. Everything else is junk: unknown text, a second answer, a third filler, anything too
    late. Without an answer that counts there is one junk more and the answer is rated as vague, so an empty reply has -1.
    ValueError when the prompt is no help-desk prompt.
    """
    device, problem = cluster_of(prompt)
    levels = {"answer": "vague", "device": "ok", "open": "neutral", "filler": 0, "close": "none"}
    malformed, place, answered = 0, 0, False  # place: the earliest slot that may still come
    for sentence in re.split(r"(?<=[.!?]) ", reply.strip()) if reply.strip() else ():
        slot, said = SENTENCES.get(sentence, (None, None))
        if slot is None or PLACE[slot] < place:
            malformed += 1
            continue
        place = PLACE[slot] + 1
        if slot == "answer":
            answered = True
            if said is not None:
                levels["answer"] = "right" if said[1] in PROBLEMS[problem] else "wrong"
                levels["device"] = "ok" if said[0] == device else "bad"
        elif slot == "filler":
            levels["filler"] += 1
            place -= levels["filler"] < 2
        else:
            levels[slot] = said
    malformed += not answered
    return Verdict(_points(levels, malformed), malformed, levels["answer"] == "right" and levels["device"] == "ok",
                   "rude" in (levels["open"], levels["close"]), levels["open"] == "polite", levels["filler"],
                   levels["close"] == "help")


def utility(prompt, reply):
    """True utility in points: 3.5 at best, about -0.4 on average under the SFT mix."""
    return judge(prompt, reply).utility


# --- data: text, pairs, thumbs, sessions ------------------------------------------------------------------------------

def sigmoid(x):
    return 0.5 * (1.0 + math.tanh(0.5 * x))  # no overflow at either end


@lru_cache(maxsize=None)
def win_probability(u):
    """P(a reply of utility u is preferred to an SFT-mix reply) = E_u' sigmoid(u - u'), over the 135 classes."""
    return math.fsum(p * sigmoid(u - v) for p, v in classes("sft"))


def _prompts(rng, n, part):
    cells = _known(split(), part, "part")
    for _ in range(n):
        device, problem = rng.choice(cells)
        yield device, problem, prompt_text(device, problem, rng.randrange(len(TEMPLATES)))


def dialogues(n, seed, mix, part="train"):
    """n (prompt, reply) texts of a mixture, for pretraining and SFT."""
    rng = random.Random(f"dialogues {mix} {seed}")
    return [(prompt, sample_reply(rng, d, p, mix)) for d, p, prompt in _prompts(rng, n, part)]


def pairs(n, seed, *, part="train", flip=0.0):
    """n preference pairs by a Bradley-Terry annotator: two SFT-mix replies to one prompt, the higher score is chosen.

    score = utility + Gumbel(0, 1) noise. The difference of two Gumbels is logistic, so P(a beats b) = sigmoid(u_a - u_b),
    and score_chosen > score_rejected always. `flip` is the probability that the two replies then trade places (the scores
    stay, so the gap remains positive). win_prob_*: chance to beat an SFT-mix reply before this annotator, flips included.
    """
    rng, rows = random.Random(f"pairs {seed}"), []
    for device, problem, prompt in _prompts(rng, n, part):
        first = second = sample_reply(rng, device, problem)
        while second == first:  # a pair of equal texts says nothing
            second = sample_reply(rng, device, problem)
        scored = [(utility(prompt, y) - math.log(rng.expovariate(1.0)), y) for y in (first, second)]  # -log Exp(1) is Gumbel
        (low, rejected), (high, chosen) = sorted(scored)
        if rng.random() < flip:
            chosen, rejected = rejected, chosen
        win = [flip + (1 - 2 * flip) * win_probability(utility(prompt, y)) for y in (chosen, rejected)]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low,
                     "win_prob_chosen": win[0], "win_prob_rejected": win[1]})
    return rows


def thumbs(pairs, seed):
    """Pairs taken apart: the winner gets a thumb up, the loser one down, and all are shuffled."""
    rows = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs for side in ("chosen", "rejected")]
    random.Random(f"thumbs {seed}").shuffle(rows)
    return rows


def native_thumbs(n, seed, *, part="train", flip=0.0):
    """Feedback that never was a pair: label ~ Bernoulli(sigmoid(utility)), reversed with probability `flip`."""
    rng, rows = random.Random(f"native {seed}"), []
    for device, problem, prompt in _prompts(rng, n, part):
        reply = sample_reply(rng, device, problem)
        label = (rng.random() < sigmoid(utility(prompt, reply))) != (rng.random() < flip)
        rows.append({"prompt": prompt, "completion": reply, "label": label})
    return rows


def keep_class(rows, *, desirable=1.0, undesirable=1.0, seed=0):
    """Imbalanced feedback: keep this share of the thumbs up and of the thumbs down, in their order."""
    rng, kept = random.Random(f"keep {seed}"), []
    for label, share in ((True, desirable), (False, undesirable)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"a share must lie in [0, 1], not {share}")
        of_class = [i for i, row in enumerate(rows) if row["label"] is label]
        kept += rng.sample(of_class, round(share * len(of_class)))
    return [rows[i] for i in sorted(kept)]


def sessions(n, seed, *, part="train"):
    """n conversations of two exchanges, for segment-level DPO. An error is a reply of utility < 0.

    {"prompt": messages up to the customer's turn that the two branches answer differently,
     "chosen": [assistant, user, assistant] or [assistant], each reply >= 0,
     "rejected": as many turns, the same customer, the first reply an error and the others >= 0 (and not those of chosen),
     "segment": {"start": 0, "end": 1}}: assistant turns of the branch that the loss may see, counted from 0, end excluded.
    The error is in the first exchange or the second, with equal chance; in the second there is nothing after it.
    """
    rng, rows = random.Random(f"sessions {seed}"), []

    def turn(device, problem, prompt, error=False):
        while (utility(prompt, reply := sample_reply(rng, device, problem)) < 0) != error:
            pass
        return {"role": "assistant", "content": reply}

    cells = _prompts(rng, 2 * n, part)
    for first, second in zip(cells, cells):
        ask, then = ({"role": "user", "content": cell[2]} for cell in (first, second))
        if rng.random() < 0.5:
            prompt, good, bad = [ask], turn(*first), turn(*first, error=True)
            chosen, rejected = [good, then, turn(*second)], [bad, then, turn(*second)]
        else:
            prompt = [ask, turn(*first), then]
            chosen, rejected = [turn(*second)], [turn(*second, error=True)]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "segment": {"start": 0, "end": 1}})
    return rows


def session_dialogues(n, seed, mix, part="train"):
    """n conversations of two exchanges in a mixture, as messages: what a base model for sessions learns to write."""
    rng = random.Random(f"session dialogues {mix} {seed}")
    cells = _prompts(rng, 2 * n, part)
    return [[message for d, p, prompt in two for message in ({"role": "user", "content": prompt}, {"role": "assistant", "content": sample_reply(rng, d, p, mix)})]
            for two in zip(cells, cells)]


def in_sessions(prompts, seed=0):
    """Prompts as a session's customer sends them, for evaluation: every second one comes after an exchange about something else."""
    return [[*earlier[:2 * (i % 2)], {"role": "user", "content": prompt}]
            for i, (prompt, earlier) in enumerate(zip(prompts, session_dialogues(len(prompts), f"in sessions {seed}", "sft")))]


# --- tokenizer --------------------------------------------------------------------------------------------------------

PATTERN = r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9\s]+|\s"  # what merges never cross; every character matches exactly one branch


@lru_cache(maxsize=1)
def tokenizer():
    """Byte-level BPE as a tiktoken.Encoding, trained on the grammar until each of its words is one token (~0.1 s).

    Words carry the space in front of them, so "For" (first in a reply) and " For" (later) are two tokens. All 256 bytes
    are tokens too: any text encodes, and decodes to itself. The last id is "<|endoftext|>".
    """
    later = [" " + s for s, (slot, _) in SENTENCES.items() if slot != "open"]
    leading = [s for s, (slot, _) in SENTENCES.items() if slot in ("open", "answer")]
    counts = Counter(word for text in (*PROMPTS, *leading, *later) for word in re.findall(PATTERN, text))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    ranks = {bytes([b]): b for b in range(256)}
    while words := {word: parts for word, parts in words.items() if len(parts) > 1}:
        # Pairs are counted by what they join to, because tiktoken looks merges up by the joined bytes.
        joined = Counter()
        for word, parts in words.items():
            for a, b in itertools.pairwise(parts):
                joined[a + b] += counts[word]
        best = max(joined, key=lambda token: (joined[token], token))  # ties by bytes: the same vocabulary everywhere
        ranks[best] = len(ranks)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if parts[i] + parts[i + 1] == best:
                    parts[i:i + 2] = [best]
                i += 1
    return tiktoken.Encoding("nanokto-world", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


# --- exact optima -----------------------------------------------------------------------------------------------------

class Point(NamedTuple):
    """A policy as a point of the reward-KL plane. `beta` is the knob that led there (IPO: tau)."""
    beta: float
    kl: float        # KL(pi || ref), nats per reply
    utility: float   # E_pi[u], points
    win_rate: float  # P(its reply has more utility than one of the reference), ties count half


@lru_cache(maxsize=None)
def classes(mix="sft"):
    """The 135 (probability, utility) classes of a mixture, by enumeration of independent slots. Sums to 1.

    Within a class all replies are alike to every objective below, so optima over classes are optima over texts.
    """
    mass = Counter()
    slots = _known(MIXES, mix, "mixture")
    for combination in itertools.product(*slots.values()):
        levels = dict(zip(slots, combination))
        p = math.prod(slots[slot][level] for slot, level in levels.items())
        if levels["answer"] == "vague":  # the device slot is void: its levels are one class
            levels["device"] = "ok"
        mass[tuple(levels.items())] += p
    return [(p, _points(dict(levels))) for levels, p in mass.items()]


@lru_cache(maxsize=None)
def _beats_reference(u):
    return math.fsum(p * ((u > v) + 0.5 * (u == v)) for p, v in classes())


def _point(beta, logratios):
    """Point of the policy with these log pi/ref, one per class of the SFT mix."""
    policy = [(p * math.exp(r), r, u) for (p, u), r in zip(classes(), logratios)]
    return Point(beta, max(0.0, math.fsum(q * r for q, r, _ in policy if q > 0)), math.fsum(q * u for q, _, u in policy),
                 math.fsum(q * _beats_reference(u) for q, _, u in policy))


def tilt(scores):
    """log pi/ref of pi(y) = ref(y) exp(score(y)) / Z, scores in nats, one per class."""
    top = max(scores)
    log_z = top + math.log(math.fsum(p * math.exp(s - top) for (p, _), s in zip(classes(), scores)))
    return [s - log_z for s in scores]


def _positive(name, x):
    if not x > 0:
        raise ValueError(f"{name} must be > 0, not {x}")


def optimum(beta):
    """The policy that maximises E[u] - beta KL(pi || ref): pi = ref exp(u/beta) / Z, with value beta log Z.

    No policy has more utility at the same KL, so these points are the frontier. optimum(math.inf) is the reference.
    """
    _positive("beta", beta)
    return _point(beta, tilt([u / beta for _, u in classes()]))


def dpo_optimum(beta):
    """DPO's minimum with unlimited pairs of this annotator: the same policy, for the Bradley-Terry reward IS the utility."""
    return optimum(beta)


def ipo_optimum(tau):
    """IPO's minimum: pi = ref exp(p(y > mu)/tau) / Z, where mu = ref. Probabilities are bounded, so the tilt is too."""
    _positive("tau", tau)
    return _point(tau, tilt([win_probability(u) / tau for _, u in classes()]))


def _bisect(f, lo, hi):
    """The root of a decreasing f in [lo, hi], to 1e-13 or to the last bit."""
    while hi - lo > 1e-13 and lo < (mid := 0.5 * (lo + hi)) < hi:
        lo, hi = (mid, hi) if f(mid) > 0 else (lo, mid)
    return 0.5 * (lo + hi)


def kto_logratios(rows, *, beta, z0=0.0):
    """log pi/ref at the minimum of the population KTO loss, for any table of (ref probability, c); -inf where pi = 0.

    A completion seen with probability ref(y) and liked at rate q(y) contributes, up to a constant, -ref(y) c(y)
    s(beta (r - z0)), where s is the sigmoid, r = log pi/ref and c = lambda_d q - lambda_u (1 - q). Minimise the sum subject
    to sum ref e^r = 1. Where c <= 0 the best pi is 0. Elsewhere set the derivative by pi equal to the multiplier nu:

        c(y) beta s'(beta (r - z0)) = nu e^r,   in logs   h(r) = log nu - log c,   h(r) = log(beta s'(beta (r - z0))) - r.

    For beta < 1, h falls from +inf to -inf: each nu gives each y one r, and nu follows from the sum. As beta -> 0 the answer
    is pi = ref max(0, c) / Z. At beta = 1, h is bounded and a small c > 0 may get pi = 0. For beta > 1 the value s is an
    S-shaped function of pi: below the point where it touches its tangent from the origin, s = 1 - 1/beta, a y is better given
    up, so some with c > 0 get pi = 0 and a run may stop in another minimum than this, the lowest one (exact up to one y).
    ValueError when no c is positive.
    """
    _positive("beta", beta)
    mass = Counter()  # equal c, equal r
    for p, c in rows:
        if c > 0 and p > 0:
            mass[c] += p
    if not mass:
        raise ValueError("no completion has c > 0: lambda_u is too large (or nothing is liked), and the minimum is undefined")

    def h(r):
        x = abs(beta * (r - z0))
        return math.log(beta) - x - 2.0 * math.log1p(math.exp(-x)) - r

    def solve(level):  # the r on the falling branch with h(r) = level
        r = (math.log(beta) + beta * z0 - level) / (1.0 + beta)  # right of the root, since s'(x) < e^-x
        for _ in range(200):  # h is concave: Newton from the right cannot overshoot
            step = (level - h(r)) / (1.0 + beta * math.tanh(0.5 * beta * (r - z0)) or 1e-300)  # (h - level) / h'
            if step <= 1e-15 * (1.0 + abs(r)):
                break
            r -= step
        return r

    def total(log_nu):
        return math.fsum(p * math.exp(solve(log_nu - math.log(c))) for c, p in mass.items())

    top = math.inf if beta < 1 else -z0 if beta == 1 else h(z0 + math.log(beta - 1) / beta)  # the largest h worth having
    while len(mass) > 1 and top < math.inf and total(math.log(min(mass)) + top) > 1:
        del mass[min(mass)]  # at the largest nu that keeps this c alive the sum exceeds 1: give it up
    middle = h(-math.log(sum(mass.values())))  # of ref rescaled to those alive: the sum of 1 needs r on both sides of it
    lo, hi = (math.log(c) + middle for c in (min(mass), max(mass)))
    log_nu = _bisect(lambda x: total(x) - 1, lo, min(hi, math.log(min(mass)) + top))
    r = {c: solve(log_nu - math.log(c)) for c in mass}
    rest = math.log(math.fsum(p * math.exp(r[c]) for c, p in mass.items()))  # what bisection leaves, ~1e-13
    return [r[c] - rest if c in r and p > 0 else -math.inf for p, c in rows]


def kto_optimum(beta, *, lambda_d=1.0, lambda_u=1.0, z0=0.0, flip=0.0, labels="pairs"):
    """KTO's minimum with unlimited thumbs, as many texts from either class as the annotator gives.

    labels="pairs": a reply is liked at the rate at which it wins, E sigmoid(u - u'); "native": at rate sigmoid(u). `flip` of
    the thumbs are reversed. z0 is a number, or "exact": the fixed point z0 = KL(pi || ref) that the paper's reference point
    estimates. keep_class(desirable=s) is lambda_d = s here.
    """
    rate = _known({"pairs": win_probability, "native": sigmoid}, labels, "labels")
    liked = [flip + (1 - 2 * flip) * rate(u) for _, u in classes()]
    rows = [(p, lambda_d * q - lambda_u * (1 - q)) for (p, _), q in zip(classes(), liked)]
    at = lambda z: _point(beta, kto_logratios(rows, beta=beta, z0=z))
    if z0 != "exact":
        return at(z0)
    point = at(0.0)  # a run starts here; KL grows with z0, so iterating finds the smallest fixed point
    for _ in range(500):
        last, point = point, at(point.kl)
        if abs(point.kl - last.kl) < 1e-12:
            break
    return point


def optimum_at_kl(kl):
    """The frontier's point at a given KL in nats, by bisection over log beta.

    Beyond the KL of the best class alone (4.4) it is the frontier's end; an estimate <= 0 gives the reference (beta 1e9).
    """
    end = optimum(1e-3)  # all mass on the best class, to the last bit
    if kl >= end.kl:
        return end._replace(beta=0.0)
    return optimum(math.exp(_bisect(lambda log_beta: optimum(math.exp(log_beta)).kl - kl, math.log(1e-3), math.log(1e9))))


def frontier(kls):
    """The largest utility any policy can have at each of these KLs (a run above it is a bug or sampling noise)."""
    return [optimum_at_kl(kl).utility for kl in kls]


# --- settings of the embedded runs ------------------------------------------------------------------------------------

MODEL = dict(n_layer=2, n_head=4, d_model=64, context=80)
SESSION = dict(context=160, batch_size=12)  # two exchanges: as many tokens per step of the base model as with single replies
# The two stages before alignment: AdamW with this decay on matrices, cosine to a tenth of the peak.
BASE = dict(pretrain=dict(steps=500, batch_size=32, lr=8e-3, warmup=20, weight_decay=0.1),
            sft=dict(steps=400, batch_size=32, lr=4e-3, warmup=20, weight_decay=0.1))
N_PAIRS = 8000
N_EXPERT = 1500
SETTINGS = {  # defaults per loss; the command line comes before, the loss's own signature after
    "kto": dict(lr=5e-4, steps=400, batch_size=32, beta=0.5),
    "kto_uniform": dict(lr=3e-4, steps=400, batch_size=32, beta=0.05, lambda_d=1.75),  # larger beta or lambda_d = 1: it collapses
    "apo_zero_unpaired": dict(lr=5e-4, steps=400, batch_size=32, beta=0.5),
    "bco": dict(lr=5e-4, steps=400, batch_size=32, beta=0.5),
    "sft": dict(lr=1e-3, steps=200, batch_size=32),
    "offline_ppo": dict(lr=5e-4, steps=400, batch_size=32),
    "rm": dict(lr=4e-3, steps=500, batch_size=32, warmup=20),
    "ppo": dict(lr=1e-3, steps=80, batch_size=288, warmup=5, reward="world", kl_coef=1.0, clip_value=1.0, vf_coef=0.5, ppo_epochs=2, minibatches=4),
    # pairs: 16 per step, the same number of replies. Where a first try did badly, beta (or what stands for it) was chosen on the tuning split
    **{name: dict(lr=5e-4, steps=400, batch_size=16, beta=0.5) for name in (
        "dpo", "cdpo", "bco_pair", "apo_zero", "apo_down", "beta_dpo", "odpo", "hinge", "wpo")},
    **{name: dict(lr=5e-4, steps=400, batch_size=16, beta=1.0) for name in ("rdpo", "exo", "fdpo", "discopop", "tdpo1")},
    **{name: dict(lr=5e-4, steps=400, batch_size=16, **own) for name, own in {
        "ipo": dict(tau=0.1), "ipo_bernoulli": dict(tau=0.1), "ipo_avg": dict(tau=2.0),             # 1 / (2 tau) nats: per reply, per token
        "orpo": dict(lam=1.0), "simpo": dict(beta=10.0, gamma=0.5), "alphapo": dict(beta=10.0, gamma=1.0), "cpo": dict(beta=0.1),
        "sigmoid_norm": dict(beta=10.0), "sppo": dict(beta=0.05), "sppo_hard": dict(beta=0.05), "nca": dict(beta=0.1), "tdpo2": dict(beta=0.1),
        "aot": dict(beta=2.0), "aot_unpaired": dict(beta=2.0), "slic": dict(delta=5.0, lam=0.2), "dpop": dict(beta=0.5, lam=0.5)}.items()},
    "spin": dict(lr=5e-4, steps=80, batch_size=16, beta=1.0, stages=4),              # of each stage; beta < 1/2 overshoots (its fixed points)
    "sdpo_stepwise": dict(lr=5e-4, steps=200, batch_size=16, beta=1.0, stages=2),    # two steps of beta are one of beta / 2
    "sdpo_segment": dict(lr=5e-4, steps=100, batch_size=16, beta=2.0),               # good against bad replies, no noise: more steps, more KL
    "tr_dpo": dict(beta=2.0, ref_every=100),                                                   # and DPO's; 512 would be never in 400 steps
}

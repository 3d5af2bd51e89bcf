"""The embedded world: a help desk whose true utility is known.

A customer writes `Help, my router gets too hot!`. A reply has an opening (polite, none, rude), an
answer (right, wrong, vague), up to two empty fillers and a closing. A judge reads these slots off
any text and adds up their points.

- every reply has a true utility, so "preferred" and "better" can be told apart;
- the annotator is exactly Bradley-Terry, as the papers' derivations assume;
- the best policy of RLHF, DPO, IPO and KTO is a formula: slots are independent, so replies fall
  into 135 classes of known probability and utility;
- the reference's most likely reply is rude and wrong, so greedy decoding shows the effect too.

Utilities are in points, KL in nats per reply.
"""
import itertools
import math
import random
import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import tiktoken

# --- grammar ----------------------------------------------

DEVICES = ("phone", "laptop", "tablet", "printer", "router", "camera", "speaker", "keyboard",
           "headset", "monitor", "watch", "projector")
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
FOLK = {  # problem -> what people wrongly recommend: a fix of another problem, each used once
    "will not turn on": "let it cool down in the shade",
    "is very slow": "move it closer to the base",
    "gets too hot": "lower the brightness",
    "shows the wrong time": "install the latest update",
    "keeps losing the signal": "check the power cable",
    "makes a strange noise": "clean the air vents",
    "has a cracked cover": "tighten the loose screws",
    "drains the battery": "close the apps you do not use",
    "asks for a password": "press the power button for ten seconds",
    "never arrived": "send it in for a repair",
}
TEMPLATES = ("My {d} {p}. What should I do?", "Help, my {d} {p}!",
             "Hello, my new {d} {p}. Any ideas?", "The {d} I bought {p}. How do I fix this?")
OPEN = {"polite": ("Sorry to hear that.", "Thanks for asking.", "Happy to help."),
        "neutral": ("",),
        "rude": ("Read the manual.", "Not again.", "You broke it yourself.")}
ANSWER = "For your {d}, please {f}."
VAGUE = ("It should work.", "I do not know.", "Try something else.")
FILLER = ("We have served people for many years.", "Our shop sells many fine things.",
          "There are a lot of details to consider.", "The weather has been nice this week.",
          "Every device has its own story.", "Many other people write to us too.")
CLOSE = {
    "help": ("If that fails, we will replace it for free.", "Write back if you need more help."),
    "none": ("",),
    "rude": ("Do not write again.", "Stop wasting our time."),
}

# --- mixtures and points ----------------------------------

# "sft" is the reference and writes all preference data; "expert" is SPIN's target.
MIXES = {
    "sft": {"answer": {"right": .40, "wrong": .35, "vague": .25},
            "device": {"ok": .85, "bad": .15},
            "open": {"polite": .30, "neutral": .30, "rude": .40},
            "filler": {0: .40, 1: .35, 2: .25},
            "close": {"help": .30, "none": .45, "rude": .25}},
    "pretrain": {"answer": {"right": .25, "wrong": .40, "vague": .35},
                 "device": {"ok": .60, "bad": .40},
                 "open": {"polite": .15, "neutral": .35, "rude": .50},
                 "filler": {0: .20, 1: .30, 2: .50},
                 "close": {"help": .10, "none": .50, "rude": .40}},
    "expert": {"answer": {"right": .80, "wrong": .10, "vague": .10},
               "device": {"ok": .95, "bad": .05},
               "open": {"polite": .70, "neutral": .25, "rude": .05},
               "filler": {0: .70, 1: .20, 2: .10},
               "close": {"help": .60, "none": .35, "rude": .05}},
}
# Two skews make the likeliest reply bad. The folk remedy has .35 * .70 = .245 of the SFT mix and
# each right fix .20; "Read" is the first word with .40 * .75 = .30 and "For" with .30 * .75.
FOLK_SHARE = 0.70  # of the wrong answers; the others are spread evenly over other problems' fixes
OPEN_WEIGHTS = {"polite": (1, 1, 1), "neutral": (1,), "rude": (6, 1, 1)}
UTILITY = {"answer": {"right": 2.0, "wrong": -1.0, "vague": 0.0},
           "device": {"ok": 0.0, "bad": -1.0},
           "open": {"polite": 1.0, "neutral": 0.0, "rude": -1.5},
           "filler": {0: 0.0, 1: -0.4, 2: -0.8},
           "close": {"help": 0.5, "none": 0.0, "rude": -1.0}}


def _points(levels, malformed=0):
    """Sum of the slots' points, rounded: ties and caches need equal floats for equal utilities."""
    return round(sum(UTILITY[slot][level] for slot, level in levels.items()) - malformed, 6)


# --- split and prompts ------------------------------------

def split():
    """The 120 (device, problem) cells: 72 to train on, 24 to choose settings on, 24 to report."""
    cells = list(itertools.product(DEVICES, PROBLEMS))
    random.Random(1234).shuffle(cells)
    return {"tune": cells[:24], "report": cells[24:48], "train": cells[48:]}


def prompt_text(device, problem, template_index):
    return TEMPLATES[template_index].format(d=device, p=problem)


PROMPTS = {prompt_text(d, p, i): (d, p) for d in DEVICES for p in PROBLEMS for i in range(4)}


def parse_prompt(text):
    """(device, problem) of a customer's message, one for its four wordings; else None."""
    return PROMPTS.get(text.strip())


def eval_prompts(part, n=480, seed=0):
    """n prompts of a part: its cells in all four wordings, shuffled once, repeated as needed."""
    prompts = [prompt_text(d, p, i) for d, p in split()[part] for i in range(4)]
    random.Random(f"eval {seed}").shuffle(prompts)
    return list(itertools.islice(itertools.cycle(prompts), n))


# --- replies ----------------------------------------------

def sample_slots(rng, mix="sft"):
    """One level per slot: {"answer": "right", "device": "ok", "open": ...}."""
    return {slot: rng.choices(list(p), list(p.values()))[0] for slot, p in MIXES[mix].items()}


def sample_reply(rng, device, problem, mix="sft"):
    """A reply of the mixture: opening, answer, fillers, closing."""
    slots = sample_slots(rng, mix)
    if slots["answer"] == "vague":  # names no device: the device slot is void
        answer = rng.choice(VAGUE)
    else:
        fix = _draw_fix(rng, problem, right=slots["answer"] == "right")
        named = device
        if slots["device"] == "bad":
            named = rng.choice([d for d in DEVICES if d != device])
        answer = ANSWER.format(d=named, f=fix)
    opening = rng.choices(OPEN[slots["open"]], OPEN_WEIGHTS[slots["open"]])[0]
    fillers = rng.choices(FILLER, k=slots["filler"])
    closing = rng.choice(CLOSE[slots["close"]])
    return " ".join(sentence for sentence in (opening, answer, *fillers, closing) if sentence)


def _draw_fix(rng, problem, right):
    if right:
        return rng.choice(PROBLEMS[problem])
    if rng.random() < FOLK_SHARE:
        return FOLK[problem]
    return rng.choice([fix for other in PROBLEMS if other != problem for fix in PROBLEMS[other]])


# --- judge ------------------------------------------------

class Verdict(NamedTuple):
    utility: float
    malformed: int   # junk sentences, a missing answer included
    right: bool      # a right fix for the right device
    rude: bool       # opening or closing


# Every sentence of the grammar -> (slot, what it says)
SENTENCES = {text: ("open", kind) for kind, texts in OPEN.items() for text in texts}
for _device, _fixes in itertools.product(DEVICES, PROBLEMS.values()):
    SENTENCES |= {ANSWER.format(d=_device, f=fix): ("answer", (_device, fix)) for fix in _fixes}
SENTENCES |= dict.fromkeys(VAGUE, ("answer", None)) | dict.fromkeys(FILLER, ("filler", None))
SENTENCES |= {text: ("close", kind) for kind, texts in CLOSE.items() for text in texts}
del SENTENCES[""]  # an empty opening or closing is not a sentence
PLACE = {"open": 0, "answer": 1, "filler": 2, "close": 3}


def judge(prompt, reply):
    """Read a reply's slots: utility = sum of their points - 1 per junk sentence.

    A sentence counts if it is in the grammar, letter by letter, and in its place: opening, answer,
    at most two fillers, closing. All else is junk: unknown text, a second answer, a third filler. A
    missing answer counts as a vague one plus one junk sentence: an empty reply has utility -1.
    """
    device, problem = parse_prompt(prompt)
    levels = {"answer": "vague", "device": "ok", "open": "neutral", "filler": 0, "close": "none"}
    malformed = 1  # no answer so far
    earliest = 0   # the first place that may still come
    text = reply.strip()
    for sentence in re.split(r"(?<=[.!?]) ", text) if text else ():
        slot, said = SENTENCES.get(sentence, (None, None))
        if slot is None or PLACE[slot] < earliest:
            malformed += 1
            continue
        earliest = PLACE[slot] + 1
        if slot == "filler":
            levels["filler"] += 1
            if levels["filler"] < 2:
                earliest = PLACE["filler"]
        elif slot != "answer":
            levels[slot] = said
        else:
            malformed -= 1
            if said is not None:  # not a vague one
                levels["device"] = "ok" if said[0] == device else "bad"
                levels["answer"] = "right" if said[1] in PROBLEMS[problem] else "wrong"
    right = levels["answer"] == "right" and levels["device"] == "ok"
    rude = "rude" in (levels["open"], levels["close"])
    return Verdict(_points(levels, malformed), malformed, right, rude)


def utility(prompt, reply):
    """True utility in points: 3.5 at best, about -0.4 on average under the SFT mix."""
    return judge(prompt, reply).utility


# --- data: texts, pairs, thumbs, sessions -----------------

def sigmoid(x):
    return 0.5 * (1.0 + math.tanh(0.5 * x))  # no overflow at either end


@lru_cache(maxsize=None)
def win_probability(u):
    """P(a reply of utility u is preferred to an SFT-mix reply): the mean of sigmoid(u - u')."""
    return math.fsum(p * sigmoid(u - other) for p, other in classes("sft"))


def _prompts(rng, n, part="train"):
    cells = split()[part]
    for _ in range(n):
        device, problem = rng.choice(cells)
        yield device, problem, prompt_text(device, problem, rng.randrange(4))


def dialogues(n, seed, mix):
    """n (prompt, reply) texts of a mixture, for pretraining and SFT."""
    rng = random.Random(f"dialogues {mix} {seed}")
    return [(prompt, sample_reply(rng, device, problem, mix))
            for device, problem, prompt in _prompts(rng, n)]


def pairs(n, seed, *, part="train", flip=0.0):
    """n preference pairs of a Bradley-Terry annotator, each of two SFT-mix replies to one prompt.

    score = utility + Gumbel(0, 1) noise, and the higher score is chosen. The difference of two
    Gumbels is logistic: P(a beats b) = sigmoid(u_a - u_b). With probability `flip` the two replies
    are then exchanged, the scores are not. win_prob_*: the chance to beat an SFT-mix reply.
    """
    rng = random.Random(f"pairs {seed}")
    rows = []
    for device, problem, prompt in _prompts(rng, n, part):
        first = second = sample_reply(rng, device, problem)
        while second == first:  # a pair of equal texts says nothing
            second = sample_reply(rng, device, problem)
        scored = []
        for reply in (first, second):
            gumbel = -math.log(rng.expovariate(1.0))
            scored.append((utility(prompt, reply) + gumbel, reply))
        (low, rejected), (high, chosen) = sorted(scored)
        if rng.random() < flip:
            chosen, rejected = rejected, chosen
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected,
               "score_chosen": high, "score_rejected": low}
        for side in ("chosen", "rejected"):
            win = win_probability(utility(prompt, row[side]))
            row["win_prob_" + side] = flip + (1 - 2 * flip) * win
        rows.append(row)
    return rows


def thumbs(pairs, seed):
    """Pairs taken apart: the winner gets a thumb up, the loser one down, and all are shuffled."""
    rows = [{"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs for side in ("chosen", "rejected")]
    random.Random(f"thumbs {seed}").shuffle(rows)
    return rows


def native_thumbs(n, seed, flip=0.0):
    """Thumbs on single replies: up with probability sigmoid(utility), then a share is flipped."""
    rng = random.Random(f"native {seed}")
    rows = []
    for device, problem, prompt in _prompts(rng, n):
        reply = sample_reply(rng, device, problem)
        liked = rng.random() < sigmoid(utility(prompt, reply))
        flipped = rng.random() < flip
        rows.append({"prompt": prompt, "completion": reply, "label": liked != flipped})
    return rows


def keep_class(rows, *, desirable=1.0, undesirable=1.0, seed=0):
    """Unequal classes: keep this share of the thumbs up and of the thumbs down, in their order."""
    rng = random.Random(f"keep {seed}")
    kept = []
    for label, share in ((True, desirable), (False, undesirable)):
        of_class = [i for i, row in enumerate(rows) if row["label"] is label]
        kept += rng.sample(of_class, round(share * len(of_class)))
    return [rows[i] for i in sorted(kept)]


def _message(role, text):
    return {"role": role, "content": text}


def sessions(n, seed):
    """n conversations of two exchanges, for segment-level DPO. An error is a reply of utility < 0.

    The branches "chosen" and "rejected" differ in the first reply after "prompt": there the
    rejected one has an error. "segment" is which of a branch's replies the loss sees.
    """
    rng = random.Random(f"sessions {seed}")

    def answer(cell, error=False):
        device, problem, prompt = cell
        while True:
            reply = sample_reply(rng, device, problem)
            if (utility(prompt, reply) < 0) == error:
                return _message("assistant", reply)

    rows = []
    cells = _prompts(rng, 2 * n)
    for first, second in zip(cells, cells):
        ask, ask_again = _message("user", first[2]), _message("user", second[2])
        if rng.random() < 0.5:                   # the error is in the first exchange
            prompt = [ask]
            good, bad = answer(first), answer(first, error=True)
            chosen = [good, ask_again, answer(second)]
            rejected = [bad, ask_again, answer(second)]
        else:
            prompt = [ask, answer(first), ask_again]
            chosen = [answer(second)]
            rejected = [answer(second, error=True)]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected,
                     "segment": {"start": 0, "end": 1}})
    return rows


def session_dialogues(n, seed, mix):
    """n conversations of two exchanges: what a base model for sessions learns to write."""
    rng = random.Random(f"session dialogues {mix} {seed}")
    cells = _prompts(rng, 2 * n)
    talks = []
    for both in zip(cells, cells):
        talk = []
        for device, problem, prompt in both:
            reply = sample_reply(rng, device, problem, mix)
            talk += [_message("user", prompt), _message("assistant", reply)]
        talks.append(talk)
    return talks


def in_sessions(prompts):
    """Prompts inside conversations: every second one comes after an exchange on something else."""
    earlier = session_dialogues(len(prompts), "in sessions 0", "sft")
    talks = [[_message("user", prompt)] for prompt in prompts]
    for i in range(1, len(prompts), 2):
        talks[i] = earlier[i][:2] + talks[i]
    return talks


# --- tokenizer --------------------------------------------

# Merges stay inside one match of this pattern; every character matches exactly one branch.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9\s]+|\s"


@lru_cache(maxsize=1)
def tokenizer():
    """Byte-level BPE, trained on the grammar until each of its words is one token.

    Words carry the space in front of them: "For" (first in a reply) and " For" (later) are two
    tokens. All 256 bytes are tokens too, so any text encodes. The last id is "<|endoftext|>".
    """
    texts = list(PROMPTS)
    texts += [text for text, (slot, _) in SENTENCES.items() if slot in ("open", "answer")]
    texts += [" " + text for text, (slot, _) in SENTENCES.items() if slot != "open"]
    counts = Counter(itertools.chain(*(re.findall(PATTERN, text) for text in texts)))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    ranks = {bytes([b]): b for b in range(256)}
    while True:
        # Count pairs by what they join to, because tiktoken looks merges up by the joined bytes.
        joined = Counter()
        for word, parts in words.items():
            for left, right in itertools.pairwise(parts):
                joined[left + right] += counts[word]
        if not joined:
            break
        best = max(joined, key=lambda token: (joined[token], token))  # ties: by the bytes
        ranks[best] = len(ranks)
        for parts in words.values():
            _merge(parts, best)
    return tiktoken.Encoding("nanokto-world", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def _merge(parts, token):
    """Join neighbours that together are `token`, from left to right, in place."""
    i = 0
    while i < len(parts) - 1:
        if parts[i] + parts[i + 1] == token:
            parts[i:i + 2] = [token]
        i += 1


# --- exact optima -----------------------------------------

class Point(NamedTuple):
    """A policy as a point of the reward-KL plane, optimal for the setting `beta` (IPO: tau)."""
    beta: float
    kl: float        # KL(pi || ref), nats per reply
    utility: float   # E_pi[u], points
    win_rate: float  # P(its reply has more utility than one of the reference), ties count half


@lru_cache(maxsize=None)
def classes(mix="sft"):
    """The 135 classes of replies that the objectives cannot tell apart: [(p, utility), ...]."""
    mass = Counter()
    slots = MIXES[mix]
    for combination in itertools.product(*slots.values()):
        levels = dict(zip(slots, combination))
        p = math.prod(slots[slot][level] for slot, level in levels.items())
        if levels["answer"] == "vague":  # the device slot is void: its levels are one class
            levels["device"] = "ok"
        mass[tuple(levels.items())] += p
    return [(p, _points(dict(levels))) for levels, p in mass.items()]


def _point(beta, logratios):
    """The point of the policy with these log pi/ref, one per class of the SFT mix."""
    p, u = np.array(classes()).T
    r = np.array(logratios)
    pi = p * np.exp(r)
    kl = pi[pi > 0] @ r[pi > 0]
    wins = (u[:, None] > u) + 0.5 * (u[:, None] == u)
    return Point(beta, max(0.0, float(kl)), float(pi @ u), float(pi @ wins @ p))


def tilt(scores):
    """log pi/ref of pi(y) = ref(y) exp(score(y)) / Z; one score per class, in nats."""
    log_p = [math.log(p) for p, _ in classes()]
    return (np.array(scores) - np.logaddexp.reduce(np.add(scores, log_p))).tolist()


def optimum(beta):
    """The frontier: E[u] - beta KL(pi || ref) is largest where pi = ref exp(u / beta) / Z."""
    return _point(beta, tilt([u / beta for _, u in classes()]))


dpo_optimum = optimum  # DPO's minimum with unlimited pairs: its reward IS the utility


def ipo_optimum(tau):
    """IPO's minimum: pi = ref exp(P(y beats ref) / tau) / Z."""
    return _point(tau, tilt([win_probability(u) / tau for _, u in classes()]))


def optimum_at_kl(kl):
    """The frontier's point at a KL in nats. From 4.4 nats on it is the best class alone."""
    end = optimum(1e-3)  # all mass on the best class, to the last bit
    if kl >= end.kl:
        return end._replace(beta=0.0)
    log_beta = _bisect(lambda x: optimum(math.exp(x)).kl - kl, math.log(1e-3), math.log(1e9))
    return optimum(math.exp(log_beta))


def _bisect(f, low, high):
    """The root of a decreasing f in [low, high]."""
    for _ in range(60):  # to the last bit
        middle = 0.5 * (low + high)
        if f(middle) > 0:
            low = middle
        else:
            high = middle
    return middle


def kto_optimum(beta, *, lambda_d=1.0, lambda_u=1.0, z0=0.0, flip=0.0):
    """KTO's minimum with unlimited thumbs: a reply is liked as often as it wins, E sigmoid(u - u').

    A share `flip` of the thumbs is reversed. z0: a number, or "exact", the fixed point
    z0 = KL(pi || ref) that the paper's reference point estimates.
    """
    rows = []
    for p, u in classes():
        liked = flip + (1 - 2 * flip) * win_probability(u)
        rows.append((p, lambda_d * liked - lambda_u * (1 - liked)))
    if z0 != "exact":
        return _point(beta, kto_logratios(rows, beta=beta, z0=z0))
    kl = 0.0
    for _ in range(500):  # KL grows with z0: from 0 this finds the smallest fixed point
        point = _point(beta, kto_logratios(rows, beta=beta, z0=kl))
        if abs(point.kl - kl) < 1e-12:
            break
        kl = point.kl
    return point


def kto_logratios(rows, *, beta, z0=0.0):
    """log pi/ref at the minimum of the population KTO loss; -inf where the best pi is 0.

    rows: (p, c) of each completion y: p = ref(y), and c = lambda_d q - lambda_u (1 - q) where a
    share q of people likes y. Two replies liked by 60 and 40 %: [(.5, .2), (.5, -.2)] gives
    [log 2, -inf], all mass on the first.

    With r = log pi/ref the loss is, up to a constant, - sum_y p c sigma(beta (r - z0)), and
    sum_y p e^r = 1. Where c <= 0 the best pi is 0. Elsewhere the derivative by pi is one number
    nu for all y:   log c + h(r) = log nu,   h(r) = log(beta sigma'(beta (r - z0))) - r
    `_invert_h` finds each r for a given nu, and bisection the nu whose pi sums to 1.
    """
    p, c = np.array(rows, float).T
    candidates = np.unique(c[(c > 0) & (p > 0)])
    if not len(candidates):
        raise ValueError("no completion has c > 0: lambda_u is too large, or nothing is liked")

    def logratios(log_nu):
        r = np.full(len(p), -np.inf)
        alive = (c >= least) & (p > 0)
        r[alive] = _invert_h(log_nu - np.log(c[alive]), beta, z0)
        return r

    def total(log_nu):
        return p @ np.exp(logratios(log_nu))

    # With beta > 1, sigma is an S-shaped function of pi. The best pi of a y is then 0, or at least
    # where the S touches its tangent from the origin, sigma = 1 - 1/beta. So h has a maximum `top`,
    # and nu is at most c e^top. If the sum is above 1 even there, the y of the smallest c has pi 0.
    top = math.inf
    if beta == 1:
        top = -z0
    elif beta > 1:
        top = _h(z0 + math.log(beta - 1) / beta, beta, z0)
    for least in candidates:
        if beta < 1 or total(math.log(least) + top) <= 1:
            break
    # If all r were equal, they would be -log(sum of p). The smallest c has at most this r.
    equal = _h(-math.log(p[c >= least].sum()), beta, z0)
    low = math.log(least) + equal
    high = min(math.log(candidates[-1]) + equal, math.log(least) + top)
    log_nu = _bisect(lambda x: total(x) - 1, low, high)
    rest = math.log(total(log_nu))  # the error of the bisection, about 1e-13
    return (logratios(log_nu) - rest).tolist()


def _h(r, beta, z0):
    x = np.abs(beta * (r - z0))  # sigma' is even: sigma'(x) = e^-x / (1 + e^-x)^2
    return math.log(beta) - x - 2.0 * np.log1p(np.exp(-x)) - r


def _invert_h(level, beta, z0):
    """The r on the falling branch with h(r) = level, by Newton's method from the right."""
    r = (math.log(beta) + beta * z0 - level) / (1.0 + beta)  # sigma'(x) < e^-x
    for _ in range(200):  # h is concave: no step overshoots
        slope = 1.0 + beta * np.tanh(0.5 * beta * (r - z0))  # -h'(r)
        step = (level - _h(r, beta, z0)) / np.maximum(slope, 1e-15)
        if np.all(step <= 1e-14 * (1.0 + np.abs(r))):
            break
        r = r - step
    return r


# --- settings of the embedded runs ------------------------

MODEL = dict(n_layer=2, n_head=4, d_model=64, context=80)
SESSION = dict(context=160, batch_size=12)  # two exchanges: as many tokens per step
# The two stages before alignment: AdamW, decay on matrices, cosine to a tenth of the peak.
BASE = dict(pretrain=dict(batch_size=32, lr=8e-3, warmup=20, weight_decay=0.1),
            sft=dict(batch_size=32, lr=4e-3, warmup=20, weight_decay=0.1))
N_PAIRS, N_EXPERT = 8000, 1500

# Settings per loss. They replace the defaults of its signature; the command line replaces them.
# Where a first try did badly, beta (or its counterpart) was chosen on the tuning split.
# 200 steps at 1e-3 take half the time and cost .02 of KTO's win rate.
THUMBS = dict(lr=5e-4, steps=400, batch_size=32)
PAIRS = THUMBS | dict(batch_size=16)  # 16 pairs are 32 replies
SETTINGS = {  # "default": for a loss that has no entry here
    **dict.fromkeys(("default", "kto", "apo_zero_unpaired", "bco"), THUMBS | dict(beta=0.5)),
    "kto_uniform": THUMBS | dict(lr=3e-4, beta=0.05, lambda_d=1.75),  # it collapses with others
    "sft": dict(lr=1e-3, steps=200, batch_size=32),
    "offline_ppo": THUMBS,
    "rm": dict(lr=4e-3, steps=500, batch_size=32, warmup=20),
    "ppo": dict(lr=1e-3, steps=80, batch_size=288, warmup=5, reward="world", kl_coef=1.0,
                clip_value=1.0, vf_coef=0.5, ppo_epochs=2, minibatches=4),
    **dict.fromkeys(("dpo", "cdpo", "bco_pair", "apo_zero", "apo_down", "beta_dpo", "odpo", "hinge",
                     "wpo", "dpo_shift", "chipo", "xpo"), PAIRS | dict(beta=0.5)),
    **dict.fromkeys(("rdpo", "exo", "fdpo", "discopop", "tdpo1"), PAIRS | dict(beta=1.0)),
    **dict.fromkeys(("ipo", "ipo_bernoulli"), PAIRS | dict(tau=0.1)),  # 1 / (2 tau) nats per reply
    "ipo_avg": PAIRS | dict(tau=2.0),                                  # 1 / (2 tau) nats per token
    **dict.fromkeys(("sppo", "sppo_hard", "cal_dpo"), PAIRS | dict(beta=0.05)),
    **dict.fromkeys(("cpo", "nca", "tdpo2"), PAIRS | dict(beta=0.1)),
    **dict.fromkeys(("aot", "aot_unpaired"), PAIRS | dict(beta=2.0)),
    "orpo": PAIRS | dict(lam=1.0),
    "simpo": PAIRS | dict(beta=10.0, gamma=0.5),
    "alphapo": PAIRS | dict(beta=10.0, gamma=1.0),
    "sigmoid_norm": PAIRS | dict(beta=10.0),
    "rebel": PAIRS | dict(eta=1.0),
    "slic": PAIRS | dict(delta=5.0, lam=0.2),
    "dpop": PAIRS | dict(beta=0.5, lam=0.5),
    # `steps` are those of each stage. With beta < 1/2 SPIN overshoots.
    "spin": PAIRS | dict(steps=80, beta=1.0, stages=4),
    "sdpo_stepwise": PAIRS | dict(steps=200, beta=1.0, stages=2),
    "sdpo_segment": PAIRS | dict(steps=100, beta=2.0),  # its pairs have no noise
    "tr_dpo": dict(beta=2.0, ref_every=100),            # the others are DPO's
    # Their reference follows the policy, so only lr limits the drift: at 5e-4 they collapse.
    **dict.fromkeys(("humanline_dpo", "humanline_kto"), dict(lr=1e-4)),
}
# --online: the policy's own replies, judged by their true utility. 23,040 of them in every run.
ONLINE = {
    "default": dict(reward="world", lr=1e-3, steps=90, batch_size=32, group=8, warmup=5),
    "ppo": dict(steps=80, batch_size=288, group=1),
    "dr_grpo": dict(max_tokens=50.0),                   # the longest reply
}

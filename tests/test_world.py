"""Claims about world.py: the grammar means what it says, the annotator is Bradley-Terry, the optima are optima."""
import ast
import itertools
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import world
from kto import kto_loss
from world import (CLOSE, DEVICES, FILLER, FOLK, MIXES, OPEN, OPEN_WEIGHTS, PROBLEMS, PROMPTS, VAGUE, classes, judge, optimum,
                   pairs, sample_slots, split, tokenizer, utility, win_probability, write_reply)

PROMPT = "Help, my router gets too hot!"
GOOD = "For your router, please clean the air vents."


def within(value, expected, se, n_se=4):
    """A sample statistic may miss its expectation by 4 standard errors: one false alarm in 16,000 tests."""
    assert abs(value - expected) < n_se * se, f"{value} is {abs(value - expected) / se:.1f} standard errors from {expected}"


# --- grammar, split, prompts ------------------------------------------------------------------------------------------

def test_world_imports_nothing_but_the_standard_library_and_tiktoken():
    tree = ast.parse(Path(world.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"tiktoken"}


def test_every_folk_remedy_is_a_fix_of_another_problem_and_none_is_shared():
    fixes = {f: p for p, fs in PROBLEMS.items() for f in fs}
    assert len(DEVICES) == 12 and len(fixes) == 20 and FOLK.keys() == PROBLEMS.keys()
    assert all(fixes[folk] != problem for problem, folk in FOLK.items())
    assert len(set(FOLK.values())) == len(FOLK)


def test_the_three_parts_are_disjoint_and_train_has_every_device_and_problem():
    parts = split()
    assert {k: len(v) for k, v in parts.items()} == {"train": 72, "tune": 24, "report": 24}
    assert len({cell for part in parts.values() for cell in part}) == 120
    assert {d for d, _ in parts["train"]} == set(DEVICES) and {p for _, p in parts["train"]} == set(PROBLEMS)
    assert parts["tune"][0] == ("laptop", "has a cracked cover") and parts["report"][0] == ("headset", "shows the wrong time")


def test_no_held_out_cell_leaks_into_any_training_data():
    prompts = [p for mix in MIXES for p, _ in world.dialogues(2000, 0, mix)]
    prompts += [r["prompt"] for r in pairs(2000, 0) + world.native_thumbs(2000, 0)]
    prompts += [m["content"] for s in world.sessions(300, 0) for key in ("prompt", "chosen", "rejected")
                for m in s[key] if m["role"] == "user"]
    assert {world.cluster_of(p) for p in prompts} == set(split()["train"])  # all of it, and nothing else


@pytest.mark.parametrize("part", ["train", "tune", "report"])
def test_data_of_a_part_stays_in_that_part(part):
    rows = pairs(200, 1, part=part) + world.native_thumbs(200, 1, part=part)
    cells = {world.cluster_of(r["prompt"]) for r in rows} | {world.cluster_of(p) for p, _ in world.dialogues(200, 1, "sft", part)}
    assert cells <= set(split()[part])


def test_a_prompt_parses_back_to_its_cell_and_other_text_to_none():
    assert len(PROMPTS) == 480
    for d, p in [("phone", "never arrived"), ("watch", "is very slow")]:
        assert all(world.parse_prompt(world.prompt_text(d, p, i)) == (d, p) for i in range(4))
    assert world.parse_prompt("Help, my toaster gets too hot!") is None
    with pytest.raises(ValueError, match="not a help-desk prompt"):
        judge("What is the capital of France?", GOOD)


def test_eval_prompts_visit_every_cell_and_template_equally_often():
    prompts = world.eval_prompts("report")
    assert len(prompts) == 480 and set(Counter(prompts).values()) == {5}
    assert Counter(map(world.cluster_of, prompts)) == {cell: 20 for cell in split()["report"]}
    assert len(set(world.eval_prompts("tune", 96))) == 96  # one cycle, no repeats
    assert prompts != world.eval_prompts("report", seed=1)


def test_same_seed_same_data_and_another_seed_other_data():
    for make in (pairs, world.native_thumbs, world.sessions, lambda n, s: world.dialogues(n, s, "sft")):
        assert make(20, 3) == make(20, 3) != make(20, 4)


@pytest.mark.parametrize("call, words", [
    (lambda: pairs(1, 0, part="test"), "unknown part 'test'.*'report'"), (lambda: world.dialogues(1, 0, "x"), "unknown mixture"),
    (lambda: world.kto_optimum(1, labels="x"), "unknown labels"), (lambda: optimum(0), "beta must be > 0"),
    (lambda: world.ipo_optimum(-1), "tau must be > 0"), (lambda: world.keep_class([], desirable=2), r"\[0, 1\]"),
    (lambda: world.kto_optimum(1, lambda_u=1e9), "lambda_u is too large")])
def test_errors_are_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- judge ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix", MIXES)
def test_the_judge_reads_back_the_slots_every_reply_was_made_of(mix):
    rng = random.Random(0)
    for prompt, (d, p) in PROMPTS.items():
        for _ in range(8):
            s = sample_slots(rng, mix)
            v = judge(prompt, write_reply(rng, d, p, s))
            device = "ok" if s["answer"] == "vague" else s["device"]
            expected = sum(world.UTILITY[slot][level] for slot, level in {**s, "device": device}.items())
            assert v == (pytest.approx(expected, abs=1e-6), 0, s["answer"] == "right" and device == "ok",
                         "rude" in (s["open"], s["close"]), s["open"] == "polite", s["filler"], s["close"] == "help")


F, G = FILLER[:2]


@pytest.mark.parametrize("reply, u, malformed", [
    (f"Happy to help. {GOOD} Write back if you need more help.", 3.5, 0),   # the best reply there is
    (f"\n{GOOD}  ", 2.0, 0),                                               # white space around it is no matter
    (f"{GOOD} {F} {F}", 1.2, 0),                                           # equal fillers are fillers
    ("For your phone, please clean the air vents.", 1.0, 0),               # wrong device
    ("For your phone, please order a new cover.", -2.0, 0),                # wrong both
    ("I do not know.", 0.0, 0),
    ("", -1.0, 1),                                                         # no answer: one junk, and vague
    ("Read the manual.", -2.5, 1),
    (f"{GOOD} {GOOD}", 1.0, 1),                                            # the second answer is misplaced
    (f"I do not know. {GOOD}", -1.0, 1),                                   # the first answer counts
    (f"{GOOD} {F} {G} {F}", 0.2, 1),                                       # a third filler
    (f"{F} {GOOD}", -2.4, 2),                                              # too late: misplaced, and no answer
    (f"{GOOD} Happy to help.", 1.0, 1),
    (f"Stop wasting our time. {GOOD}", -3.0, 2),
    ("For your router, please clean the vents.", -2.0, 2),                 # unknown sentence, and no answer
    (f"{GOOD}  {F}", 1.0, 1),                                              # two spaces are not the grammar
    (GOOD[:-1], -2.0, 2), (GOOD.lower(), -2.0, 2), ("hm? " * 5, -6.0, 6)])
def test_each_unknown_or_misplaced_sentence_costs_one_point(reply, u, malformed):
    v = judge(PROMPT, reply)
    assert (v.utility, v.malformed) == (pytest.approx(u, abs=1e-9), malformed)
    assert utility(PROMPT, reply) == v.utility


def test_no_text_is_worth_more_than_the_best_reply_and_junk_never_pays():
    sentences = [GOOD, "For your router, please lower the brightness.", "I do not know.", "Happy to help.", "Not again.", F, G,
                 "Write back if you need more help.", "Do not write again.", "Hm."]
    best = [-math.inf, -math.inf]  # of well-formed texts, of malformed ones
    for k in range(5):
        for text in itertools.product(sentences, repeat=k):
            v = judge(PROMPT, " ".join(text))
            best[v.malformed > 0] = max(best[v.malformed > 0], v.utility)
    assert best == [3.5, 2.5]  # one point below: what the junk sentence costs


# --- the reference ----------------------------------------------------------------------------------------------------

def test_reference_statistics_by_enumeration_are_those_of_20000_samples():
    assert len(classes()) == 135 and math.fsum(p for p, _ in classes()) == pytest.approx(1, abs=1e-14)
    mean = math.fsum(p * u for p, u in classes())
    sd = math.sqrt(math.fsum(p * (u - mean) ** 2 for p, u in classes()))
    assert mean == pytest.approx(.4 * 2 - .35 - .75 * .15 + .3 - .4 * 1.5 - .4 * .85 + .3 * .5 - .25, abs=1e-12)  # slot by slot
    n, verdicts = 20_000, [judge(*row) for row in world.dialogues(20_000, 5, "sft")]
    within(sum(v.utility for v in verdicts) / n, mean, sd / math.sqrt(n))
    for name, p in {"right": .40 * .85, "rude": 1 - .60 * .75, "polite": .30, "help": .30}.items():
        within(sum(getattr(v, name) for v in verdicts) / n, p, math.sqrt(p * (1 - p) / n))
    assert not any(v.malformed for v in verdicts)


@pytest.mark.parametrize("mix", MIXES)
def test_utilities_have_the_enumerated_distribution(mix):
    n, mass = 10_000, Counter()
    for p, u in classes(mix):
        mass[u] += p
    counts = Counter(utility(*row) for row in world.dialogues(n, 6, mix))
    assert counts.keys() <= mass.keys()
    for u, p in mass.items():  # ~60 comparisons, rare classes far from normal: 5 standard errors plus one count
        within(counts[u] / n, p, math.sqrt(p * (1 - p) / n) + .2 / n, n_se=5)


def reply_distribution(problem):
    """Exact probabilities of the head (opening, answer) and of the tail (fillers, closing) of an SFT-mix reply about a phone."""
    m, head, tail = MIXES["sft"], Counter(), Counter()
    answers = {text: m["answer"]["vague"] / 3 for text in VAGUE}
    others = [f for p, fs in PROBLEMS.items() if p != problem for f in fs]
    fixes = Counter({f: m["answer"]["right"] / 2 for f in PROBLEMS[problem]})
    fixes[FOLK[problem]] += m["answer"]["wrong"] * .70
    fixes.update({f: m["answer"]["wrong"] * .30 / 18 for f in others})
    for d in DEVICES:
        share = .85 if d == "phone" else .15 / 11
        answers.update({f"For your {d}, please {f}.": share * p for f, p in fixes.items()})
    for kind, texts in OPEN.items():
        for text, w in zip(texts, OPEN_WEIGHTS[kind]):
            for answer, p in answers.items():
                head[f"{text} {answer}".strip()] += m["open"][kind] * w / sum(OPEN_WEIGHTS[kind]) * p
    for k, p_k in m["filler"].items():
        for fillers in itertools.product(FILLER, repeat=k):
            for kind, texts in CLOSE.items():
                for text in texts:
                    tail[" ".join(fillers + (text,)).strip()] += p_k / 6 ** k * m["close"][kind] / len(texts)
    return head, tail, fixes


def greedy(distribution):
    """Decode word by word, always the likeliest next one; None is the end of the text."""
    words, rows = [], {tuple(text.split()) + (None,): p for text, p in distribution.items()}
    while True:
        following = Counter()
        for row, p in rows.items():
            if list(row[:len(words)]) == words:
                following[row[len(words)]] += p
        word = max(following, key=following.get)
        if word is None:
            return " ".join(words)
        words.append(word)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_reference_is_rude_and_wrong_at_its_mode(problem):
    head, tail, fixes = reply_distribution(problem)
    assert math.fsum(head.values()) == pytest.approx(1, abs=1e-12) and math.fsum(tail.values()) == pytest.approx(1, abs=1e-12)
    first = Counter()
    for text, p in head.items():
        first[text.split()[0]] += p
    (word, p), (second, p2) = first.most_common(2)
    assert (word, second) == ("Read", "For") and p == pytest.approx(.30) and p2 == pytest.approx(.225)
    assert all(fixes[FOLK[problem]] > fixes[f] for f in PROBLEMS[problem])
    reply = f"{greedy(head)} {greedy(tail)}".strip()
    assert reply == f"Read the manual. For your phone, please {FOLK[problem]}."
    assert utility(f"Help, my phone {problem}!", reply) == -2.5


def test_samples_have_the_shares_of_folk_remedy_and_opening_that_the_mode_claim_uses():
    n, rng = 20_000, random.Random(7)
    replies = [world.sample_reply(rng, "phone", "drains the battery") for _ in range(n)]
    _, _, fixes = reply_distribution("drains the battery")
    for text, p in {f"please {FOLK['drains the battery']}.": fixes[FOLK["drains the battery"]], "Read the manual.": .30,
                    "please lower the brightness.": .20, "please order a new cover.": .35 * .30 / 18}.items():
        within(sum(text in r for r in replies) / n, p, math.sqrt(p * (1 - p) / n))


# --- annotator and data -----------------------------------------------------------------------------------------------

def test_the_annotator_is_bradley_terry():
    """Given both replies, the better one wins with probability sigmoid(gap): tested in bands of the gap."""
    bands = {}
    for r in pairs(8000, 1):
        gap = utility(r["prompt"], r["chosen"]) - utility(r["prompt"], r["rejected"])
        won, expected, variance = bands.get(band := min(3, int(abs(gap))), (0, 0, 0))
        q = world.sigmoid(abs(gap))
        if gap:
            bands[band] = (won + (gap > 0), expected + q, variance + q * (1 - q))
    assert len(bands) == 4
    for won, expected, variance in bands.values():
        within(won, expected, math.sqrt(variance))


def test_the_noise_of_the_scores_is_gumbel():
    """Normal noise of the same size would pass for Bradley-Terry in 8000 pairs, but not here: Gumbel is skewed."""
    noise = [r[f"score_{k}"] - utility(r["prompt"], r[k]) for r in pairs(4000, 1) for k in ("chosen", "rejected")]
    within(sum(noise) / 8000, 0.5772, math.pi / math.sqrt(6 * 8000))
    for x in (-1, 0, 2):
        p = math.exp(-math.exp(-x))
        within(sum(e < x for e in noise) / 8000, p, math.sqrt(p * (1 - p) / 8000))


@pytest.mark.parametrize("flip", [0.0, 0.3])
def test_pairs_have_a_positive_gap_and_two_texts_whatever_is_flipped(flip):
    rows = pairs(2000, 2, flip=flip)
    assert all(r["score_chosen"] > r["score_rejected"] and r["chosen"] != r["rejected"] for r in rows)
    assert {*rows[0]} == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "win_prob_chosen", "win_prob_rejected"}


def test_flipping_trades_the_places_of_that_share_of_the_same_pairs():
    n, clean, noisy = 4000, pairs(4000, 3), pairs(4000, 3, flip=0.2)
    swapped = sum((a["chosen"], a["rejected"]) == (b["rejected"], b["chosen"]) for a, b in zip(clean, noisy))
    kept = sum((a["chosen"], a["rejected"]) == (b["chosen"], b["rejected"]) for a, b in zip(clean, noisy))
    assert swapped + kept == n
    within(swapped / n, 0.2, math.sqrt(.2 * .8 / n))


def test_win_probabilities_are_the_mean_chance_to_beat_a_reference_reply():
    others = [utility(*row) for row in world.dialogues(20_000, 8, "sft")]
    for u in (-4.0, 0.0, 3.5):
        wins = [1 / (1 + math.exp(v - u)) for v in others]
        mean = sum(wins) / len(wins)
        within(win_probability(u), mean, math.sqrt(sum((w - mean) ** 2 for w in wins)) / len(wins))
    assert math.fsum(p * win_probability(u) for p, u in classes()) == pytest.approx(.5, abs=1e-12)  # by symmetry
    for row in pairs(50, 4):
        assert row["win_prob_chosen"] == win_probability(utility(row["prompt"], row["chosen"]))
    for row in pairs(50, 4, flip=.5):  # an annotator who tosses a coin
        assert row["win_prob_chosen"] == row["win_prob_rejected"] == .5


def test_thumbs_are_the_pairs_taken_apart_and_shuffled():
    rows = pairs(500, 5)
    taken = world.thumbs(rows, 0)
    expected = [(r["prompt"], r[k], k == "chosen") for r in rows for k in ("chosen", "rejected")]
    got = [(t["prompt"], t["completion"], t["label"]) for t in taken]
    assert Counter(got) == Counter(expected) and got != expected
    assert 200 < sum(t["label"] for t in taken[:500]) < 300  # 250 +- 8 (2 s.e. = 16) if mixed, 500 if in blocks


@pytest.mark.parametrize("flip", [0.0, 0.4])
def test_native_thumbs_go_up_with_the_sigmoid_of_the_utility(flip):
    up = expected = variance = high = high_expected = high_variance = 0
    for r in world.native_thumbs(8000, 6, flip=flip):
        u = utility(r["prompt"], r["completion"])
        q = flip + (1 - 2 * flip) * world.sigmoid(u)
        up, expected, variance = up + r["label"], expected + q, variance + q * (1 - q)
        if u > 0:
            high, high_expected, high_variance = high + r["label"], high_expected + q, high_variance + q * (1 - q)
    within(up, expected, math.sqrt(variance))
    within(high, high_expected, math.sqrt(high_variance))


def test_keep_class_cuts_one_class_and_keeps_the_order():
    rows = world.thumbs(pairs(500, 7), 0)
    cut = world.keep_class(rows, desirable=0.1)
    assert Counter(r["label"] for r in cut) == {True: 50, False: 500}
    assert [r for r in rows if r in cut] == cut
    assert world.keep_class(rows) == rows and not world.keep_class(rows, desirable=0, undesirable=0)
    assert cut != world.keep_class(rows, desirable=0.1, seed=1)


def test_a_session_has_one_error_turn_and_equally_many_turns_on_both_sides():
    places = Counter()
    for s in world.sessions(300, 0):
        assert len(s["chosen"]) == len(s["rejected"]) and s["segment"] == {"start": 0, "end": 1}
        assert s["prompt"][-1]["role"] == "user"
        scores = {}
        for side in ("chosen", "rejected"):
            messages = s["prompt"] + s[side]
            assert [m["role"] for m in messages] == ["user", "assistant"] * 2
            scores[side] = [utility(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2])]
        assert [m for m in s["chosen"] if m["role"] == "user"] == [m for m in s["rejected"] if m["role"] == "user"]
        error = len(s["prompt"]) // 2  # index of the exchange the branches start with
        assert min(scores["chosen"]) >= 0 and [i for i, u in enumerate(scores["rejected"]) if u < 0] == [error]
        places[error] += 1
    assert 115 < places[0] < 185  # a fair coin, 4 standard errors


# --- tokenizer --------------------------------------------------------------------------------------------------------

def test_every_word_of_the_grammar_is_one_token():
    encode, rng = tokenizer().encode_ordinary, random.Random(0)
    texts = list(PROMPTS) + [y for mix in MIXES for _, y in world.dialogues(500, 0, mix)]
    words = {w for text in texts for w in re.findall(r" ?[A-Za-z]+|[.,!?]", text)}
    assert len(words) > 150 and [w for w in words if len(encode(w)) > 1] == []
    text = rng.choice(texts)
    assert len(encode(text)) == len(re.findall(r"[A-Za-z]+|[.,!?]", text))


def test_any_text_survives_the_tokenizer():
    enc, rng = tokenizer(), random.Random(1)
    for _ in range(300):
        text = "".join(chr(c) for c in (rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)))
                                        for _ in range(rng.randrange(40))))
        assert enc.decode(enc.encode_ordinary(text)) == text
    for text in ("", "  two  spaces \n\t", "<|endoftext|>", "naïve 東京 🙂 12345 a_b", GOOD):
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.eot_token == enc.n_vocab - 1 and enc.eot_token not in enc.encode_ordinary("<|endoftext|>")


def test_training_the_tokenizer_again_gives_the_same_vocabulary():
    again = tokenizer.__wrapped__()
    assert again._mergeable_ranks == tokenizer()._mergeable_ranks and again.n_vocab < 1000
    assert all(bytes([b]) in again._mergeable_ranks for b in range(256))
    assert sorted(again._mergeable_ranks.values()) == list(range(again.n_vocab - 1))  # no id is missing or given twice


def test_the_context_holds_the_longest_prompt_and_reply():
    n_tokens = lambda text: len(tokenizer().encode_ordinary(text))
    longest = lambda texts: max(texts, key=n_tokens)
    answer = longest([s for s, (slot, _) in world.SENTENCES.items() if slot == "answer"])
    parts = [longest(sum(OPEN.values(), ())), answer, longest(FILLER), longest(FILLER), longest(sum(CLOSE.values(), ()))]
    worst = longest(PROMPTS), " ".join(parts)
    total = n_tokens(worst[0]) + n_tokens(worst[1]) + 1  # end-of-text
    assert judge(PROMPT, worst[1]).malformed == 0 and total <= world.MODEL["context"]
    assert all(n_tokens(p) + n_tokens(y) + 1 <= total for p, y in world.dialogues(2000, 9, "pretrain"))


# --- exact optima: the frontier ---------------------------------------------------------------------------------------

U = torch.tensor([u for _, u in classes()], dtype=torch.float64)
P = torch.tensor([p for p, _ in classes()], dtype=torch.float64)


def gradient(loss, logratios):
    """d loss / d logits of a softmax policy over the classes, where its log pi/ref is `logratios`."""
    logits = (torch.tensor(logratios, dtype=torch.float64) + P.log()).requires_grad_()
    loss(logits.log_softmax(0) - P.log()).backward()
    return logits.grad.abs().max().item()


@pytest.mark.parametrize("beta", [0.1, 0.5, 1, 2])
def test_the_value_of_the_optimum_is_beta_log_z(beta):
    z = math.fsum(p * math.exp(u / beta) for p, u in classes())
    point = optimum(beta)
    assert point.utility - beta * point.kl == pytest.approx(beta * math.log(z), abs=1e-12)  # sums of 135 doubles


def test_the_slope_of_the_frontier_is_beta():
    for beta in (0.2, 0.5, 1.0, 3.0):
        a, b = optimum(beta * 1.001), optimum(beta / 1.001)
        assert (b.utility - a.utility) / (b.kl - a.kl) == pytest.approx(beta, rel=2e-6)  # central difference: error ~ step^2
    assert optimum(math.inf) == pytest.approx((math.inf, 0, -0.4025, 0.5), abs=1e-12)


def test_the_frontier_is_the_optimum_at_that_kl_and_ends_at_the_best_class():
    for beta in (0.1, 0.5, 2.0):
        point = optimum(beta)
        assert world.optimum_at_kl(point.kl) == pytest.approx(point, rel=1e-9)  # bisection to 1e-13 in log beta
    p_best = max((u, p) for p, u in classes())[1]
    assert world.optimum_at_kl(99) == pytest.approx((0, -math.log(p_best), 3.5, 1 - p_best / 2))
    assert world.frontier([0, -1e-9, 1, 99]) == pytest.approx([-0.4025, -0.4025, world.optimum_at_kl(1).utility, 3.5])


def test_no_policy_and_no_exact_optimum_lies_above_the_frontier():
    points = [world.ipo_optimum(tau) for tau in (1, .5, .25, .1, .05, .01)]
    points += [world.kto_optimum(beta, labels=labels, flip=flip, z0=z0, lambda_d=lambda_d)
               for beta in (.1, .5, 1, 2) for labels in ("pairs", "native") for flip in (0, .2) for z0 in (0, 1)
               for lambda_d in (1, 2)]
    rng = random.Random(0)
    points += [world._point(0, world.tilt([u / 2 + rng.gauss(0, s) for _, u in classes()])) for s in (.01, .1, 1) for _ in range(20)]
    best = world.frontier([p.kl for p in points])
    assert all(p.utility <= top + 1e-9 for p, top in zip(points, best))  # rounding of the bisection
    assert min(top - p.utility for p, top in zip(points, best)) < 0.05   # and the bound is not an empty one


def test_win_rate_counts_ties_half():
    better = sum(p * q * ((u > v) + (u == v) / 2) for p, u in classes("sft") for q, v in classes("sft"))
    assert better == pytest.approx(0.5) == optimum(math.inf).win_rate
    rng, point = random.Random(0), optimum(1)
    weights = [p * math.exp(u) for p, u in classes()]
    n, us = 20_000, [u for _, u in classes()]
    a, b = rng.choices(us, weights, k=n), rng.choices(us, [p for p, _ in classes()], k=n)
    within(sum((x > y) + (x == y) / 2 for x, y in zip(a, b)) / n, point.win_rate, .5 / math.sqrt(n))


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_dpo_on_this_annotator_has_the_rlhf_optimum(beta):
    """The gradient of the population DPO loss, all ordered pairs of classes, vanishes there and nowhere near."""
    def loss(r):
        h = r[:, None] - r[None, :]
        return -(P[:, None] * P * torch.sigmoid(U[:, None] - U) * torch.nn.functional.logsigmoid(beta * h)).sum()
    best = world.tilt([u / beta for u in U.tolist()])
    assert gradient(loss, best) < 1e-15 < 1e-6 < gradient(loss, world.tilt([1.01 * u / beta for u in U.tolist()]))
    assert world.dpo_optimum(beta) == optimum(beta) == world._point(beta, best)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_has_its_closed_form(tau):
    def loss(r):
        h = r[:, None] - r[None, :]
        return (P[:, None] * P * torch.sigmoid(U[:, None] - U) * (h - 1 / (2 * tau)) ** 2).sum()
    best = world.tilt([win_probability(u) / tau for u in U.tolist()])
    assert gradient(loss, best) < 1e-14 < 1e-6 < gradient(loss, world.tilt([1.01 * win_probability(u) / tau for u in U.tolist()]))
    assert world.ipo_optimum(tau) == world._point(tau, best)


# --- exact optima: KTO ------------------------------------------------------------------------------------------------

def population_kto(logratios, p, q, beta, z0, lambda_d=1.0, lambda_u=1.0):
    """E of kto_loss over completions seen with probability p and liked at rate q."""
    logratios, everyone = logratios.repeat(2), torch.cat([p * q, p * (1 - q)])
    desirable = torch.arange(len(everyone)) < len(p)
    losses = kto_loss(logratios, desirable, torch.tensor([z0], dtype=p.dtype), beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)
    return (everyone * losses).sum()


def minimise(p, loss, steps=100):
    """LBFGS over the logits of a softmax policy, from the reference.   -> (loss, policy)"""
    logits = p.log().clone().requires_grad_()
    opt = torch.optim.LBFGS([logits], max_iter=steps, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        value = loss(logits.log_softmax(0) - p.log())
        value.backward()
        return value
    opt.step(closure)
    return closure().item(), logits.detach().softmax(0)


TABLE_P = torch.tensor([.05, .30, .10, .25, .20, .10], dtype=torch.float64)
TABLE_Q = torch.tensor([.95, .70, .55, .40, .60, .05], dtype=torch.float64)


@pytest.mark.parametrize("beta, lambda_d, z0", [(.1, 1, 0.), (.5, 1, 0.), (1., 1, 0.), (.5, 4 / 3, 0.), (.5, 1, .7), (.3, .8, .2)])
def test_the_kto_optimum_is_where_lbfgs_takes_the_kto_loss(beta, lambda_d, z0):
    c = lambda_d * TABLE_Q - (1 - TABLE_Q)
    exact = torch.tensor(world.kto_logratios(list(zip(TABLE_P.tolist(), c.tolist())), beta=beta, z0=z0), dtype=torch.float64)
    pi = TABLE_P * exact.exp()
    assert pi.sum().item() == pytest.approx(1, abs=1e-14) and all(pi[c <= 0] == 0) and all(pi[c > .2] > 0)
    loss = lambda r: population_kto(r, TABLE_P, TABLE_Q, beta, z0, lambda_d=lambda_d)
    value, learnt = minimise(TABLE_P, loss)
    # Logits cannot reach pi = 0, hence a total variation of ~1e-5 and a loss a little above the minimum, never below it.
    assert 0.5 * (pi - learnt).abs().sum() < 1e-4
    assert -1e-12 < value - loss(exact.clamp_min(-1e3)).item() < 1e-5


@pytest.mark.parametrize("beta, z0", [(.2, 0.), (.9, .5), (1.5, 0.), (3., .3)])
def test_kto_optima_satisfy_their_stationarity_condition(beta, z0):
    c = [2 * q - 1 for q in map(win_probability, U.tolist())]
    r = world.kto_logratios(list(zip(P.tolist(), c)), beta=beta, z0=z0)
    alive = [(c_y, r_y) for c_y, r_y in zip(c, r) if r_y > -math.inf]
    s = [1 / (1 + math.exp(-beta * (r_y - z0))) for _, r_y in alive]  # the tanh form has no relative precision near 0
    nu = [c_y * beta * x * (1 - x) / math.exp(r_y) for (c_y, r_y), x in zip(alive, s)]
    assert max(nu) == pytest.approx(min(nu), rel=1e-9)  # one multiplier for all; Newton and bisection leave ~1e-12
    assert math.fsum(p * math.exp(x) for p, x in zip(P.tolist(), r)) == pytest.approx(1, abs=1e-12)
    assert min(s) > 1 - 1 / beta and {c_y for c_y, _ in alive} == {x for x in c if x >= min(a for a, _ in alive)}


@pytest.mark.parametrize("beta", [1.5, 2.0, 4.0])
def test_for_large_beta_gradient_descent_finds_nothing_lower_than_the_kto_optimum(beta):
    q = torch.tensor([win_probability(u) for u in U.tolist()], dtype=torch.float64)
    loss = lambda r: population_kto(r, P, q, beta, 0.0)
    exact = torch.tensor(world.kto_logratios(list(zip(P.tolist(), (2 * q - 1).tolist())), beta=beta), dtype=torch.float64)
    value, _ = minimise(P, loss)
    assert -1e-5 < value - loss(exact.clamp_min(-1e3)).item() < 1e-3  # below by what one class more or less can matter


def test_for_small_beta_kto_reweights_the_reference_by_its_majority():
    """pi -> ref max(0, c) / Z: KTO's optimum hardly depends on beta."""
    c = (2 * TABLE_Q - 1).tolist()
    limit = [p * max(0, x) for p, x in zip(TABLE_P.tolist(), c)]
    r = world.kto_logratios(list(zip(TABLE_P.tolist(), c)), beta=1e-3)
    pi = [p * math.exp(x) for p, x in zip(TABLE_P.tolist(), r)]
    assert pi == pytest.approx([x / sum(limit) for x in limit], abs=1e-5)  # s' is flat to second order in beta
    assert abs(world.kto_optimum(.1).utility - world.kto_optimum(1).utility) < .15 < 1 < optimum(.1).utility - optimum(1).utility


@pytest.mark.parametrize("flip", [0.2, 0.4])
def test_symmetric_flips_do_not_move_the_kto_optimum_at_ratio_one(flip):
    for beta, labels in ((.5, "pairs"), (1, "pairs"), (.5, "native")):
        clean = world.kto_optimum(beta, labels=labels)
        assert world.kto_optimum(beta, labels=labels, flip=flip) == pytest.approx(clean, abs=1e-10)  # c only shrinks by 1 - 2 flip
    assert world.kto_optimum(.5, flip=flip, lambda_d=4 / 3).utility < world.kto_optimum(.5, lambda_d=4 / 3).utility - .1


def test_on_contradictory_labels_kto_takes_the_majority_and_dpo_a_finite_margin():
    r = world.kto_logratios([(.5, .6 - .4), (.5, .4 - .6)], beta=.5)
    assert r == [pytest.approx(math.log(2)), -math.inf]
    half = torch.tensor([.5, .5], dtype=torch.float64)
    dpo = lambda r: -(.6 * torch.nn.functional.logsigmoid(.5 * (r[0] - r[1])) + .4 * torch.nn.functional.logsigmoid(.5 * (r[1] - r[0])))
    _, pi = minimise(half, dpo)
    assert (pi[0] / pi[1]).log().item() == pytest.approx(math.log(.6 / .4) / .5, abs=1e-6)
    _, pi = minimise(half, lambda r: population_kto(r, half, torch.tensor([.6, .4], dtype=torch.float64), .5, 0.0))
    assert pi[0] > 1 - 1e-4


def test_at_the_reference_kto_has_a_quarter_of_the_gradient_of_dpo():
    r = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    desirable = torch.arange(10) < 5
    kto = kto_loss(r, desirable, r.new_empty(0), beta=.3).mean()
    dpo = -torch.nn.functional.logsigmoid(.3 * (r[:5] - r[5:])).mean()
    assert (kto.item(), dpo.item()) == (0.5, pytest.approx(math.log(2)))
    (g_kto,), (g_dpo,) = torch.autograd.grad(kto, r), torch.autograd.grad(dpo, r)
    assert torch.allclose(g_dpo, 4 * g_kto, rtol=0, atol=1e-16)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_exact_reference_point_is_the_kl_of_the_policy_it_gives(beta):
    point = world.kto_optimum(beta, z0="exact")
    assert world.kto_optimum(beta, z0=point.kl) == pytest.approx(point, abs=1e-9)  # iterated to 1e-12
    assert point.utility > world.kto_optimum(beta).utility  # a raised reference point asks for more


def test_settings_name_only_losses_and_hyper_parameters_that_exist():
    import inspect
    import kto
    assert set(world.SETTINGS) >= set(kto.LOSSES) | {"sft"}
    for name, loss in kto.LOSSES.items():
        assert set(world.SETTINGS[name]) - {"lr", "steps", "batch_size"} <= set(inspect.signature(loss).parameters)

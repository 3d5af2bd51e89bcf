"""Claims about world.py: the judge reads the grammar, the annotator is Bradley-Terry, and the exact
optima are optima of the losses in kto.py and dpo_variants.py."""
import hashlib
import inspect
import itertools
import json
import math
import random
import re
from collections import Counter

import pytest
import torch

import dpo_variants
import kto
import world
from world import DEVICES, FILLER, FOLK, MIXES, PROBLEMS, PROMPTS, classes, judge, optimum, utility

PROMPT = "Help, my router gets too hot!"
GOOD = "For your router, please clean the air vents."


def within(value, expected, se, n_se=4):
    """A sample statistic misses its expectation by 4 standard errors once in 16,000 tests."""
    errors = abs(value - expected) / se
    assert errors < n_se, f"{value} is {errors:.1f} standard errors from {expected}"


def share(events, p):
    """The share of true events must be p."""
    within(sum(events) / len(events), p, math.sqrt(p * (1 - p) / len(events)))


def cells_of(prompts):
    return set(map(world.parse_prompt, prompts))


# --- grammar, split, prompts ----------------------------------------------------------------------

def test_the_texts_of_a_seed_are_those_that_the_published_numbers_were_measured_on():
    made = {
        "pairs": [list(pair.values())[:3] for pair in world.pairs(200, 0, flip=0.1)],
        "thumbs": world.thumbs(world.pairs(200, 3), 3),
        "native": world.native_thumbs(200, 1, flip=0.1),
        "dialogues": [world.dialogues(100, 2, mix) for mix in MIXES],
        "sessions": world.sessions(100, 4),
        "talks": world.session_dialogues(50, 5, "sft"),
        "in sessions": world.in_sessions(world.eval_prompts("report", 50)),
        "kept": world.keep_class(world.thumbs(world.pairs(100, 0), 0), desirable=0.2, seed=1),
        "tuning": world.eval_prompts("tune", 96, seed=7),
        "tokens": [token.hex() for token in world.tokenizer()._mergeable_ranks],
        "split": world.split()}
    found = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
             for name, value in made.items()}
    assert found == {
        "pairs": "c2cc1bb4", "thumbs": "7ed867f2", "native": "ae2d4802", "dialogues": "7751bdfb",
        "sessions": "a1984400", "talks": "20324dd2", "in sessions": "a4d5620d",
        "kept": "cbdc5ef6", "tuning": "bdac06f7", "tokens": "6ee0e404", "split": "e10bf808"}


def test_no_held_out_question_is_in_any_training_data():
    prompts = [prompt for mix in MIXES for prompt, _ in world.dialogues(2000, 0, mix)]
    prompts += [row["prompt"] for row in world.pairs(2000, 0) + world.native_thumbs(2000, 0)]
    talks = world.session_dialogues(300, 0, "sft")
    talks += [session["prompt"] + session["chosen"] for session in world.sessions(300, 0)]
    for talk in talks:
        prompts += [message["content"] for message in talk if message["role"] == "user"]
    parts = {part: set(cells) for part, cells in world.split().items()}
    assert cells_of(prompts) == parts["train"]                   # all of it, and nothing else
    assert not parts["train"] & (parts["tune"] | parts["report"]) | parts["tune"] & parts["report"]
    held_out = [row["prompt"] for row in world.pairs(200, 1, part="report")]
    assert cells_of(held_out) <= parts["report"]


def test_eval_prompts_visit_every_cell_and_wording_equally_often():
    prompts = world.eval_prompts("report")
    assert len(prompts) == 480 and set(Counter(prompts).values()) == {5}
    assert cells_of(prompts) == set(world.split()["report"])
    assert world.parse_prompt("Help, my toaster gets too hot!") is None


# --- judge ----------------------------------------------------------------------------------------

def test_the_judge_reads_back_the_slots_every_reply_was_made_of():
    for mix, (prompt, (device, problem)) in itertools.product(MIXES, PROMPTS.items()):
        for seed in range(4):
            slots = world.sample_slots(random.Random(seed), mix)         # what sample_reply draws
            reply = world.sample_reply(random.Random(seed), device, problem, mix)
            if slots["answer"] == "vague":                       # it names no device
                slots["device"] = "ok"
            points = sum(world.UTILITY[slot][level] for slot, level in slots.items())
            right = slots["answer"] == "right" and slots["device"] == "ok"
            rude = "rude" in (slots["open"], slots["close"])
            assert judge(prompt, reply) == (pytest.approx(points, abs=1e-6), 0, right, rude)


F, G = FILLER[:2]
REPLIES = [  # text, utility, junk
    (f"Happy to help. {GOOD} Write back if you need more help.", 3.5, 0),   # the best there is
    (f"\n{GOOD}  ", 2.0, 0),                                     # white space around it
    (f"{GOOD} {F} {F}", 1.2, 0),                                 # equal fillers are fillers
    ("For your phone, please clean the air vents.", 1.0, 0),     # wrong device
    ("For your phone, please order a new cover.", -2.0, 0),      # wrong both
    ("", -1.0, 1),                                               # no answer: one junk, and vague
    ("Read the manual.", -2.5, 1),
    (f"{GOOD} {GOOD}", 1.0, 1),                                  # the second answer is misplaced
    (f"I do not know. {GOOD}", -1.0, 1),                         # the first answer counts
    (f"{GOOD} {F} {G} {F}", 0.2, 1),                             # a third filler
    (f"{F} {GOOD}", -2.4, 2),                                    # too late, and no answer
    (f"{GOOD}  {F}", 1.0, 1),                                    # two spaces
    (GOOD.lower(), -2.0, 2),
    ("hm? " * 5, -6.0, 6),
]


def test_each_unknown_or_misplaced_sentence_costs_one_point():
    for reply, points, malformed in REPLIES:
        found = judge(PROMPT, reply)[:2]
        assert found == (pytest.approx(points, abs=1e-9), malformed), reply


# --- the reference --------------------------------------------------------------------------------

def test_replies_have_the_enumerated_distribution_of_utilities():
    assert len(classes()) == 135
    assert math.fsum(p for p, _ in classes()) == pytest.approx(1, abs=1e-14)
    for mix in MIXES:
        mass = Counter()
        for p, u in classes(mix):
            mass[u] += p
        counts = Counter(utility(*row) for row in world.dialogues(10_000, 6, mix))
        assert counts.keys() <= mass.keys()
        for u, p in mass.items():    # 180 comparisons, rare ones far from normal: 5 errors, 1 count
            error = math.sqrt(p * (1 - p) / 10_000) + .2 / 10_000
            within(counts[u] / 10_000, p, error, n_se=5)


# --- annotator and data ---------------------------------------------------------------------------

def test_the_annotator_is_bradley_terry():
    """The better reply wins with probability sigmoid(gap), in each band of the gap."""
    bands = {band: [] for band in range(4)}
    for row in world.pairs(8000, 1):
        gap = utility(row["prompt"], row["chosen"]) - utility(row["prompt"], row["rejected"])
        if gap:
            bands[min(3, int(abs(gap)))].append((gap > 0, world.sigmoid(abs(gap))))
    for pairs in bands.values():
        expected = sum(q for _, q in pairs)
        variance = sum(q * (1 - q) for _, q in pairs)
        within(sum(better for better, _ in pairs), expected, math.sqrt(variance))


def test_flips_trade_places_and_leave_the_scores():
    swapped = []
    for before, after in zip(world.pairs(2000, 3), world.pairs(2000, 3, flip=0.2)):
        assert after["score_chosen"] > after["score_rejected"]
        assert before["chosen"] in (after["chosen"], after["rejected"])
        swapped.append(before["chosen"] == after["rejected"])
    share(swapped, 0.2)


def test_win_probabilities_are_the_mean_chance_to_beat_a_reference_reply():
    others = torch.tensor([utility(*row) for row in world.dialogues(20_000, 8, "sft")])
    for u in (-4.0, 0.0, 3.5):
        wins = torch.sigmoid(u - others)
        within(world.win_probability(u), wins.mean(), wins.std() / math.sqrt(20_000))
    for flip in (0, 0.2, 0.5):
        for row in world.pairs(20, 4, flip=flip):
            win = world.win_probability(utility(row["prompt"], row["rejected"]))
            assert row["win_prob_rejected"] == pytest.approx(win + flip * (1 - 2 * win), abs=1e-12)


def test_keep_class_cuts_one_class_and_keeps_the_order():
    rows = world.thumbs(world.pairs(500, 7), 0)
    cut = world.keep_class(rows, desirable=0.1)
    assert Counter(row["label"] for row in cut) == {True: 50, False: 500}
    assert [row for row in rows if row in cut] == cut


def test_a_session_has_one_error_turn_and_equally_many_turns_on_both_sides():
    places = Counter()
    for session in world.sessions(300, 0):
        assert session["segment"] == {"start": 0, "end": 1}
        scores, asked = {}, {}
        for side in ("chosen", "rejected"):
            messages = session["prompt"] + session[side]
            assert [message["role"] for message in messages] == ["user", "assistant"] * 2
            texts = [message["content"] for message in messages]
            asked[side] = texts[::2]
            scores[side] = [utility(*exchange) for exchange in zip(texts[::2], texts[1::2])]
        error = len(session["prompt"]) // 2                      # where the branches begin
        assert asked["chosen"] == asked["rejected"] and min(scores["chosen"]) >= 0
        assert [i for i, u in enumerate(scores["rejected"]) if u < 0] == [error]
        places[error] += 1
    assert 115 < places[0] < 185                                 # a fair coin, 4 standard errors


# --- tokenizer ------------------------------------------------------------------------------------

def test_every_word_of_the_grammar_is_one_token():
    encode = world.tokenizer().encode_ordinary
    texts = list(PROMPTS) + [reply for mix in MIXES for _, reply in world.dialogues(500, 0, mix)]
    for text in texts:
        assert len(encode(text)) == len(re.findall(r"[A-Za-z]+|[.,!?]", text)), text


def test_any_text_survives_the_tokenizer():
    encoding = world.tokenizer()
    for text in ("", "  two  spaces \n\t", "<|endoftext|>", "naïve 東京 🙂 12345 a_b", GOOD):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert encoding.eot_token not in encoding.encode_ordinary(text)
    assert encoding.eot_token == encoding.n_vocab - 1


def test_the_context_holds_the_longest_prompt_and_reply():
    def length(text):
        return len(world.tokenizer().encode_ordinary(text))

    longest = {slot: max([text for text, (place, _) in world.SENTENCES.items() if place == slot],
                         key=length) for slot in world.PLACE}
    parts = [longest["open"], longest["answer"], *[longest["filler"]] * 2, longest["close"]]
    assert judge(PROMPT, " ".join(parts)).malformed == 0
    assert length(max(PROMPTS, key=length) + " ".join(parts)) + 1 <= world.MODEL["context"]


# --- exact optima: the frontier -------------------------------------------------------------------

P, U = torch.tensor(classes(), dtype=torch.float64).T


def gradient(loss, logratios):
    """d loss / d logits of a softmax policy over the classes, where its log pi/ref is this."""
    logits = (torch.tensor(logratios, dtype=torch.float64) + P.log()).requires_grad_()
    loss(logits.log_softmax(0) - P.log()).backward()
    return logits.grad.abs().max().item()


def test_the_value_of_the_optimum_is_beta_log_z_and_the_frontiers_slope_is_beta():
    for beta in (0.1, 0.5, 1, 3):
        point = optimum(beta)
        log_z = (P.log() + U / beta).logsumexp(0).item()
        value = point.utility - beta * point.kl
        assert value == pytest.approx(beta * log_z, abs=1e-12)   # sums of 135 doubles
        a, b = optimum(beta * 1.001), optimum(beta / 1.001)      # central difference: step^2
        assert (b.utility - a.utility) / (b.kl - a.kl) == pytest.approx(beta, rel=2e-6)
        assert world.optimum_at_kl(point.kl) == pytest.approx(point, rel=1e-9)
    assert world.optimum_at_kl(99).utility == pytest.approx(3.5)             # the best class alone
    assert optimum(math.inf) == pytest.approx((math.inf, 0, -0.4025, 0.5), abs=1e-12)


def test_no_exact_optimum_lies_above_the_frontier():
    points = [world.ipo_optimum(tau) for tau in (1, .25, .1, .05, .01)]
    for beta, flip in itertools.product((.1, .5, 1, 2), (0, .2)):
        points.append(world.kto_optimum(beta, flip=flip, z0=1, lambda_d=2))
    gaps = [world.optimum_at_kl(point.kl).utility - point.utility for point in points]
    assert -1e-9 < min(gaps) < 0.05                              # a bound, and not an empty one


def all_pairs(r):
    """Log-ratios of all ordered pairs of classes, and how often each is labelled like this."""
    chosen, rejected = r[:, None].expand(135, 135), r[None, :].expand(135, 135)
    return chosen, rejected, P[:, None] * P * torch.sigmoid(U[:, None] - U)


def test_dpo_and_ipo_have_the_minima_that_the_formulas_say():
    """The gradient of the population loss vanishes there, and not one per cent beside it."""
    wins = [world.win_probability(u) for u in U.tolist()]
    dpo, ipo = dpo_variants.dpo_loss, dpo_variants.ipo_loss
    for knob in (0.1, 0.25, 1.0):
        for loss_of, name, scores, optimum_of in ((dpo, "beta", U.tolist(), world.dpo_optimum),
                                                  (ipo, "tau", wins, world.ipo_optimum)):
            def loss(r):
                chosen, rejected, weight = all_pairs(r)
                return (weight * loss_of(chosen, rejected, **{name: knob})).sum()

            best = world.tilt([score / knob for score in scores])
            beside = world.tilt([1.01 * score / knob for score in scores])
            assert gradient(loss, best) < 1e-13 < 1e-6 < gradient(loss, beside)
            assert world._point(knob, best) == optimum_of(knob)


# --- exact optima: KTO ----------------------------------------------------------------------------

def population_kto(logratios, p, q, beta, z0, lambda_d=1.0):
    """E of kto_loss over completions seen with probability p and liked at rate q."""
    weight = torch.cat([p * q, p * (1 - q)])
    desirable = torch.arange(len(weight)) < len(p)
    losses = kto.kto_loss(logratios.repeat(2), desirable, torch.tensor([z0], dtype=p.dtype),
                          beta=beta, lambda_d=lambda_d)
    return (weight * losses).sum()


def minimise(p, loss):
    """LBFGS over the logits of a softmax policy, from the reference.   -> (loss, policy)"""
    logits = p.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-14, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0) - p.log())
        value.backward()
        return value

    optimizer.step(closure)
    return closure().item(), logits.detach().softmax(0)


TABLE_P = torch.tensor([.05, .30, .10, .25, .20, .10], dtype=torch.float64)
TABLE_Q = torch.tensor([.95, .70, .55, .40, .60, .05], dtype=torch.float64)


def solve(p, c, **how):
    rows = list(zip(p.tolist(), c.tolist()))
    return torch.tensor(world.kto_logratios(rows, **how), dtype=torch.float64)


def test_the_kto_optimum_is_where_lbfgs_takes_the_kto_loss():
    for beta, lambda_d, z0 in [(.1, 1, 0.), (1., 1, 0.), (.5, 4 / 3, .7)]:
        c = lambda_d * TABLE_Q - (1 - TABLE_Q)
        exact = solve(TABLE_P, c, beta=beta, z0=z0)
        pi = TABLE_P * exact.exp()
        assert pi.sum().item() == pytest.approx(1, abs=1e-14)
        assert all(pi[c <= 0] == 0) and all(pi[c > .2] > 0)

        def loss(r):
            return population_kto(r, TABLE_P, TABLE_Q, beta, z0, lambda_d)

        value, learnt = minimise(TABLE_P, loss)
        # Logits cannot reach pi = 0: total variation of 1e-5, a loss a little above the minimum.
        assert 0.5 * (pi - learnt).abs().sum() < 1e-4
        assert -1e-12 < value - loss(exact.clamp_min(-1e3)).item() < 1e-5


def test_kto_optima_have_one_multiplier_and_give_up_the_least_liked_first():
    c = torch.tensor([2 * world.win_probability(u) - 1 for u in U.tolist()], dtype=torch.float64)
    for beta, z0 in [(.2, 0.), (.9, .5), (1., .3), (1.5, 0.), (3., .3)]:
        r = solve(P, c, beta=beta, z0=z0)
        alive = r > -math.inf
        s = torch.sigmoid(beta * (r - z0))
        nu = (c * beta * s * (1 - s) / r.exp())[alive]
        assert nu.max().item() == pytest.approx(nu.min().item(), rel=1e-9)   # Newton leaves 1e-12
        assert (P * r.exp()).sum().item() == pytest.approx(1, abs=1e-12)
        assert s[alive].min() > 1 - 1 / beta
        assert c[~alive].max() < c[alive].min()


def test_for_large_beta_gradient_descent_finds_nothing_lower_than_the_kto_optimum():
    q = torch.tensor([world.win_probability(u) for u in U.tolist()], dtype=torch.float64)
    for beta in (1.5, 4.0):
        def loss(r):
            return population_kto(r, P, q, beta, 0.0)

        value, _ = minimise(P, loss)
        exact = loss(solve(P, 2 * q - 1, beta=beta).clamp_min(-1e3)).item()
        assert -1e-5 < value - exact < 1e-3                      # one class more or less


def test_symmetric_flips_do_not_move_the_kto_optimum_at_ratio_one():
    for beta, flip in ((.5, .2), (1, .4)):                       # c only shrinks by 1 - 2 flip
        clean, noisy = world.kto_optimum(beta), world.kto_optimum(beta, flip=flip)
        assert noisy == pytest.approx(clean, abs=1e-10)
    clean, noisy = [world.kto_optimum(.5, flip=flip, lambda_d=4 / 3) for flip in (0, .2)]
    assert noisy.utility < clean.utility - .1
    skewed = world.kto_optimum(.5, lambda_d=1.2, lambda_u=1.1, z0=.3, flip=.1)
    q = .1 + .8 * torch.tensor([world.win_probability(u) for u in U.tolist()])
    r = solve(P, 1.2 * q - 1.1 * (1 - q), beta=.5, z0=.3)
    assert skewed == pytest.approx(world._point(.5, r.tolist()), abs=1e-6)       # q is in float32


def test_on_contradictory_labels_kto_takes_the_majority():
    two = world.kto_logratios([(.5, .6 - .4), (.5, .4 - .6)], beta=.5)
    assert two == [pytest.approx(math.log(2)), -math.inf]
    with pytest.raises(ValueError, match="no completion has c > 0"):
        world.kto_logratios([(1., -.1)], beta=.5)


def test_the_exact_reference_point_is_the_kl_of_the_policy_it_gives():
    for beta in (0.1, 0.5, 1.0):
        point = world.kto_optimum(beta, z0="exact")
        again = world.kto_optimum(beta, z0=point.kl)
        assert again == pytest.approx(point, abs=1e-9)           # iterated to 1e-12
        assert point.utility > world.kto_optimum(beta).utility   # a raised z0 asks for more


# --- settings -------------------------------------------------------------------------------------

def test_settings_name_only_parameters_that_the_loss_has():
    losses = kto.LOSSES | dpo_variants.LOSSES
    assert set(world.SETTINGS) >= set(losses) | {"sft", "rm", "ppo", "default"}
    for name, loss in losses.items():
        own = set(world.SETTINGS[name]) - {"lr", "steps", "batch_size"}
        assert own <= set(inspect.signature(loss).parameters), name
    assert {"lr", "steps", "batch_size"} <= set(world.SETTINGS["default"])

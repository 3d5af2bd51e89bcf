"""What is trained is what was asked for, y' is never an answer to x, and flat rows lose nothing."""
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st

import data
from data import encode, flatten, lambda_weights, make_row, mismatch, mismatched
from plumbing import formats, show
from plumbing.chat import Chat
from plumbing.formats import Feedback, Pair, Turn
from plumbing.tokenizer import EOT, Tokenizer, load_tokenizer
from test_formats import write
from test_tokenizer import (BYTES, CALL, hf_folder, odd_encoding, texts,
                            tokenizers)                                  # noqa: F401 (a fixture)


def turns(*contents, first="user"):
    """turns("q", "a") is a user's and an assistant's turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return tuple(Turn(roles[i % 2], content) for i, content in enumerate(contents))


ASK = (Turn("system", "S"), *turns("q1", "a1", "q2"))
GO = turns("a2", "q3", "a3", "q4", "a4", first="assistant")


def trained_runs(row, tokenizer):
    """The trained tokens, a text for each unbroken run of them, "#" for the end-of-text."""
    text = ""
    for token, weight in zip(row.ids.tolist(), row.mask):
        text += tokenizer.decode([token]).replace("</s>", "#").replace(EOT, "#") if weight else "\n"
    return [run.replace(" #", "#").strip() for run in text.split("\n") if run]


# --- single responses -----------------------------------------------------------------------------

@given(texts, texts)
def test_trained_tokens_decode_to_the_response_and_one_end_of_text(tokenizers, prompt, response):
    assume(response.strip() and len(prompt.encode()) < 400)
    for tokenizer, asked in [(BYTES, prompt), (tokenizers["plain"], prompt),
                             (tokenizers["chatml"], (Turn("user", prompt),))]:
        ((row,),), _ = encode([Feedback(asked, response, True)], tokenizer)
        before = tokenizer.prompt_ids(asked) or [tokenizer.eot]
        answer = tokenizer.encode(response) + [tokenizer.eot]
        assert row.ids.tolist() == before + answer
        assert row.mask.tolist() == [0] * len(before) + [1] * len(answer)
        assert (row.n_prompt, row.length) == (len(before), len(answer))
        assert tokenizer.text(row.ids[row.mask > 0]) == response


def test_no_token_straddles_the_border_of_prompt_and_response():
    tokenizer = Tokenizer(odd_encoding())
    assert tokenizer.encode("abc") == [256]                              # one token
    ((row,),), _ = encode([Feedback("ab", "c", True)], tokenizer)
    assert row.ids.tolist() == [97, 98, 99, tokenizer.eot] and row.n_prompt == 2


@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 40), st.integers(1, 40),
       st.booleans(), st.booleans())
def test_prompts_lose_their_left_responses_their_right_and_a_cut_response_has_no_end(
        tokenizers, n, m, max_len, max_prompt_len, whole, add_eot):
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    for tokenizer in (BYTES, tokenizers["plain"]):
        example = Feedback(text[:n], text[-m:], True, whole=whole)
        ((row,),), counts = encode([example], tokenizer, add_eot=add_eot, max_len=max_len,
                                   max_prompt_len=max_prompt_len)
        full, bos = tokenizer.prompt_ids(text[:n]) or [tokenizer.eot], tokenizer.bos
        answer = tokenizer.encode(text[-m:]) + [tokenizer.eot] * (whole and add_eot)
        room = min(max_prompt_len, max_len - 1)
        kept = bos + full[max(len(bos), len(full) - room + len(bos)):]
        assert row.ids.tolist() == kept + answer[:max_len - len(kept)]
        assert row.n_prompt == len(kept) <= room and len(row.response) == row.length >= 1
        assert counts["prompt cut from the left"] == (len(full) > room)
        assert counts["response cut from the right"] == (len(answer) > row.length)


def test_a_prompt_alone_is_a_row_that_ends_where_its_answer_would_begin():
    prompts = ["Question?", turns("a", "b", "c"), "", "x" * 80]
    examples = [Feedback(prompt, "", None) for prompt in prompts]
    for how in ({}, dict(add_eot=False), dict(turns="all"), dict(turns="segment")):
        units, counts = encode(examples, BYTES, max_len=60, max_prompt_len=59, **how)
        for (row,), prompt in zip(units, prompts, strict=True):
            asked = BYTES.prompt_ids(prompt) or [BYTES.eot]
            assert row.ids[:row.n_prompt].tolist() == asked[-59:] and row.desirable is None
            assert row.response.tolist() == [BYTES.eot]
        assert counts["prompts alone"] == 4


def test_what_is_dropped_or_odd_is_counted():
    def counted(*answers, **how):
        return encode([Feedback(*answer) for answer in answers], BYTES, **how)[1]

    assert counted(("Q", "", True), ("Q", " \n\x85", False), ("Q", "A", True)) == {
        "read": 3, "dropped: empty response": 2, "desirable": 1, "prompts": 1}
    counts = counted(("Q", "A", True), ("Q", "A", True), ("Q", "A", False), ("P", "A", True))
    assert counts == {"read": 4, "desirable": 3, "undesirable": 1, "duplicates (kept)": 1,
                      "same text with both labels": 1, "prompts": 2, "prompts with both labels": 1}
    twice = counted(*[("Q", "A", label) for label in (False, True, True, False)])
    assert (twice["same text with both labels"], twice["duplicates (kept)"]) == (1, 2)
    cut = counted(("1 same end", "A", True), ("2 same end", "B", False), max_prompt_len=8)
    assert cut["prompts"] == cut["prompts with both labels"] == 1        # as the model sees them
    units, counts = encode([Pair("Q", "A", "A"), Pair("Q", "A", "B", target=" ")], BYTES)
    assert [len(unit) for unit in units] == [2]
    assert counts == {"read": 2, "dropped: chosen is rejected": 1, "pairs": 1, "prompts": 1}


def test_train_prompt_trains_all_but_the_very_first_token():
    ((row,),), _ = encode([Feedback("abc", "d", True)], BYTES, train_prompt=True)
    assert row.mask.tolist() == [0, 1, 1, 1, 1] and row.n_prompt == 3


def test_rows_know_the_scores_of_their_side_and_cannot_be_changed():
    (unit,), _ = encode([Pair("Q", "A", "B", 2.0, 1.0, 0.75, 0.25, target="C")], BYTES)
    assert unit[0].prompt is unit[1].prompt is unit[2].prompt            # kept once
    known = [(row.score, row.win_prob, row.desirable) for row in unit]
    assert known == [(2.0, 0.75, True), (1.0, 0.25, False), (None, None, True)]
    for row in (unit[0], mismatched(unit[0], unit[1], 12), *data.length_desensitised(unit, 0.5)):
        for array in (row.prompt, row.response, row.mask):
            with pytest.raises(ValueError):
                array[0] = 1


# --- several turns --------------------------------------------------------------------------------

def test_a_conversations_ids_are_the_templates_and_its_mask_the_turns_asked_for(tokenizers):
    every = ["a1#", "a2#", "a3#", "a4#"]
    for tokenizer in tokenizers.values():
        chat = Chat(ASK + GO, tokenizer)
        ids = chat.ids(chat.whole)
        for how, first, runs in [("last", "a2", every[3:]), ("all", "a1", every)]:
            ((row,),), _ = encode([Feedback(ASK, GO, False)], tokenizer, turns=how)
            assert row.ids.tolist() == ids[:len(row.ids)]
            assert trained_runs(row, tokenizer) == runs
            assert tokenizer.decode(row.response).lstrip().startswith(first)
        # a response of one turn: "all" also trains the answers in its prompt
        ((row,),), _ = encode([Feedback(ASK, "a2", True)], tokenizer, turns="all")
        assert trained_runs(row, tokenizer) == every[:2]
        # cut when it was sampled: its last turn has no end, the earlier ones do
        ((row,),), _ = encode([Feedback(ASK, GO, True, whole=False)], tokenizer, turns="all")
        assert trained_runs(row, tokenizer) == [*every[:3], "a4"]


def test_both_sides_of_a_pair_are_trained_after_their_shared_prompt(tokenizers):
    other = tuple(turn._replace(content=turn.content.replace("a", "b")) for turn in GO)
    cases = [("last", None, ["a4#"]), ("all", None, ["a2#", "a3#", "a4#"]),
             ("segment", (0, 1), ["a2#"]), ("segment", (1, 3), ["a3#", "a4#"])]
    for tokenizer in tokenizers.values():
        for how, segment, runs in cases:
            pair = Pair(ASK, GO, other, segment=segment)
            ((chosen, rejected),), _ = encode([pair], tokenizer, turns=how)
            assert trained_runs(chosen, tokenizer) == runs
            assert trained_runs(rejected, tokenizer) == [run.replace("a", "b") for run in runs]
            assert chosen.prompt_key == rejected.prompt_key and chosen.mask[-1] == 1
        (unit,), _ = encode([Pair(ASK, GO[:1], GO, target="c")], tokenizer)    # of one and of five
        assert len({row.prompt_key for row in unit}) == 1
        assert [trained_runs(row, tokenizer) for row in unit] == [["a2#"], ["a4#"], ["c#"]]


def test_a_continuation_is_cut_from_the_right_and_dropped_where_nothing_trained_is_left():
    example = Feedback(turns("Q"), turns("a" * 9, "b" * 9, "c" * 9, first="assistant"), True)
    n = len(encode([example], BYTES)[0][0][0].ids)
    for room, runs in [(n - 1, ["c" * 9]), (n - 9, ["c"]), (n - 10, None)]:
        units, counts = encode([example], BYTES, max_len=room)
        assert counts["response cut from the right"] == 1
        if runs is None:
            assert units == [] and counts["dropped: nothing left to train"] == 1
        else:
            assert trained_runs(units[0][0], BYTES) == runs


def test_blank_or_equal_turns_are_dropped_where_they_would_be_trained():
    blank = (*GO[:2], Turn("assistant", " \n"))
    early = Feedback(turns("Q", "", "Q"), "A", True)
    other = (*GO[:2], Turn("assistant", "else"))                 # equal up to the second turn
    for example, how, kept in [
            (Feedback(ASK, blank, True), "last", 0), (Pair(ASK, GO, blank), "last", 0),
            (early, "last", 1), (early, "all", 0),
            (Pair(ASK, GO[:3], other, segment=(0, 1)), "segment", 0),
            (Pair(ASK, GO[:3], other, segment=(0, 2)), "segment", 1)]:
        assert len(encode([example], BYTES, turns=how)[0]) == kept


def test_a_response_may_begin_with_tool_calls(tokenizers):
    go = (Turn("assistant", "", CALL), Turn("tool", "R"), Turn("assistant", "A"))
    ((row,),), _ = encode([Feedback(turns("Q"), go, True)], tokenizers["chatml"])
    assert row.ids[:row.n_prompt].tolist() == tokenizers["chatml"].prompt_ids(turns("Q"))
    assert trained_runs(row, tokenizers["chatml"]) == ["A#"]


def test_what_cannot_be_encoded_is_one_line_that_names_the_row(tmp_path):
    one_by_one = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    count = "{{ messages | length }}" + one_by_one
    counting = load_tokenizer(hf_folder(tmp_path / "counting", count))
    for example, tokenizer, how in [
            (Pair(ASK, GO, GO[:3], where="f: 2"), BYTES, "segment"),                # no segment
            (Pair(ASK, GO, GO[:3], segment=(0, 3), where="f: 2"), BYTES, "segment"),
            (Feedback(ASK, GO, True, where="f: 2"), BYTES, "segment"),
            (Feedback("Q", GO, True, where="f: 2"), BYTES, "last"),       # turns after a text
            (Pair(ASK, GO, GO[:3], where="f: 2"), counting, "last")]:     # the prompt in two ways
        with pytest.raises(SystemExit) as stop:
            encode([example], tokenizer, turns=how)
        assert str(stop.value).startswith("f: 2: ") and "\n" not in str(stop.value)


def test_length_desensitising_counts_trained_tokens_wherever_they_stand():
    long = make_row([1], [2, 3, 4, 5, 6], trained=[1, 0, 1, 1, 1])
    short = make_row([1], [7, 8, 9], trained=[0, 1, 1])
    long, short = data.length_desensitised((long, short), 0.25)
    assert long.mask.tolist() == [0, 1, 0, 1, 0.25, 0.25] and short.mask.tolist() == [0, 0, 1, 1]


# --- mismatched pairs and class weights -----------------------------------------------------------

def test_mismatched_keeps_the_prompt_and_cuts_the_response_to_fit():
    row = make_row([1, 2, 3], [4, 9], desirable=False)
    partner = make_row([5], [6, 7, 8, 9], where="there", trained=[0, 1, 1, 0.5])
    for max_len, response, weights in [(7, [7, 8, 9], [1, 1, 0.5]), (5, [7, 8], [1, 1])]:
        y = mismatched(row, partner, max_len)                            # 6 was context there
        assert y.ids.tolist() == [1, 2, 3] + response and y.mask.tolist() == [0] * 3 + weights
        assert (y.n_prompt, y.desirable, y.where) == (3, False, "there")


def test_mismatched_units_pair_every_row_with_another_prompts_response_drawn_by_the_seed():
    units = [(make_row([i % 9], [100 + i, 7]),) for i in range(40)]
    drawn = []
    for seed in (0, 1):
        both = data.mismatched_units(units, seed=seed, max_len=5)
        assert [y for y, _ in both] == [y for (y,) in units]
        partners = [int(other.ids[1]) - 100 for _, other in both]
        assert sorted(partners) == list(range(40))
        for i, (row, other) in enumerate(both):
            assert other.prompt_key == row.prompt_key and partners[i] % 9 != i % 9
        drawn.append(partners)
    assert drawn[0] != drawn[1]
    with pytest.raises(ValueError, match="two distinct prompts"):
        data.mismatched_units(units[::9], seed=0, max_len=5)


groups = st.lists(st.integers(1, 12), min_size=2, max_size=6).flatmap(    # sizes, then any order
    lambda sizes: st.permutations([i for i, n in enumerate(sizes) for _ in range(n)]))


@given(groups)
def test_a_partner_never_has_the_same_prompt_and_each_serves_as_often_as_can_be(prompts):
    partners = mismatch(prompts)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))
    largest = max(prompts, key=prompts.count)
    n, m = len(prompts), prompts.count(largest)
    if 2 * m <= n:
        assert sorted(partners) == list(range(n))
    else:                                                            # m rows share n - m others
        uses = [partners.count(j) for j in range(n) if prompts[j] != largest]
        assert max(uses) - min(uses) <= 1 and sum(uses) == m


@given(st.integers(1, 10 ** 6), st.integers(1, 10 ** 6), st.floats(1, 1.5))
def test_lambda_weights_reach_the_ratio_and_the_smaller_is_one(n_d, n_u, ratio):
    lambda_d, lambda_u = lambda_weights(n_d, n_u, ratio=ratio)
    assert min(lambda_d, lambda_u) == 1.0
    assert lambda_d * n_d / (lambda_u * n_u) == pytest.approx(ratio, rel=4e-15)   # four roundings


def test_lambda_weights_are_one_without_a_class_and_the_ratio_is_the_papers():
    assert lambda_weights(0, 5) == lambda_weights(5, 0) == (1.0, 1.0)
    for ratio in (0.99, 1.51, float("nan")):
        with pytest.raises(ValueError, match="3/2"):
            lambda_weights(3, 4, ratio=ratio)


# --- batches and flat rows ------------------------------------------------------------------------

@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 3))
def test_every_row_comes_once_per_epoch_in_an_order_of_seed_and_step_alone(n, size, seed):
    steps = list(range(data.steps_per_epoch(n, size)))
    forward = [data.batch_rows(n, size, seed=seed, step=step) for step in steps]
    assert sorted(sum(forward, [])) == list(range(n))
    assert {len(batch) for batch in forward[:-1]} <= {size}
    data.epoch_order.cache_clear()
    np.random.seed(n)                                                    # nobody else's numbers
    for step in reversed(steps):
        assert data.batch_rows(n, size, seed=seed, step=step) == forward[step]


def test_epochs_and_seeds_are_reordered_and_nobody_can_change_the_order_for_the_others():
    orders = {tuple(data.batch_rows(50, 50, seed=s, step=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9 and tuple(range(50)) not in orders          # 50! orders
    with pytest.raises(ValueError):
        data.epoch_order(5, 0, 0)[0] = 3


def test_a_file_with_the_good_rows_first_gives_batches_of_both_labels():
    """In the file's order a batch has one label, and z0 and the gradient swing with it."""
    labels = [True] * 1000 + [False] * 1000
    for step in range(125):
        batch = [labels[i] for i in data.batch_rows(2000, 16, seed=0, step=step)]
        assert 0 < sum(batch) < 16, step


@given(st.lists(st.integers(2, 12), max_size=12), st.integers(1, 40))
def test_token_batches_cover_every_item_within_the_budget_and_no_earlier_than_needed(sizes, budget):
    rows = [make_row([0], [1] * (size - 1)) for size in sizes]
    parts = list(data.token_batches(rows, budget))
    assert [i for part in parts for i in part] == list(range(len(rows)))
    for part, following in zip(parts, parts[1:] + [range(0)]):
        tokens = sum(sizes[i] for i in part)
        assert len(part) == 1 or tokens <= budget
        assert not following or tokens + sizes[following[0]] > budget
    assert list(data.token_batches([(row, row) for row in rows], 2 * budget)) == parts


def some_rows(rng):
    """Rows of which neighbours often share a prompt; each response token has its own weight."""
    rows = []
    for _ in range(rng.randint(1, 9)):
        response = rng.choices(range(256), k=rng.randint(1, 5))
        weights = rng.choices([0.0, 0.5, 1.0, 2.0], k=len(response))
        rows.append(make_row(rng.choice([[7], [7, 8, 9]]), response, trained=weights))
    return rows


def test_flatten_is_the_naive_loop_over_rows_and_tokens():
    rng = random.Random(0)
    for trial in range(100):
        rows, share = some_rows(rng), trial % 2 == 1
        flat = flatten(rows, share=share)
        tokens, expected, sums = [], [], [0.0] * len(rows)
        for b, row in enumerate(rows):
            shared = share and b > 0 and row.prompt_key == rows[b - 1].prompt_key
            if not shared:
                prompt_end = len(tokens) + row.n_prompt - 1
            for t, token in enumerate(row.ids.tolist()):
                if row.mask[t]:
                    before = prompt_end if t == row.n_prompt else len(tokens) - 1
                    sums[b] += row.mask[t] * len(expected)         # the k-th "log-prob" is k
                    expected.append((before, token, row.mask[t], b))
                if not shared or t >= row.n_prompt:
                    tokens.append((token, t))
        assert list(zip(flat.ids.tolist(), flat.positions.tolist())) == tokens
        found = (flat.predict, flat.targets, flat.mask, flat.sequence)
        assert list(zip(*(column.tolist() for column in found))) == expected
        assert flat.sums(torch.arange(len(expected), dtype=torch.float64)).tolist() == sums


def test_rows_with_one_prompt_share_it_unless_it_trains():
    rows = [make_row([1, 2], [3]), make_row([1, 2], [4, 5]), make_row([1, 2], [6]),
            make_row([1, 3], [7]), make_row([1, 3], [7], train_prompt=True)]
    assert flatten(rows, share=True).lengths == [(2, 1, 2, 1), 3, 3]
    assert flatten(rows).lengths == [3, 4, 3, 3, 3]


def test_sums_are_added_up_in_float64_whatever_the_log_probs_are():
    flat = flatten([make_row([1], [2] * 400), make_row([1], [2], trained=[0]), make_row([1], [3])])
    for dtype in (torch.float32, torch.bfloat16):
        logps = torch.linspace(-9, -1e-3, 401).to(dtype).requires_grad_()
        sums = flat.sums(logps)
        exact = math.fsum(logps[:400].tolist())
        assert sums.dtype == torch.float64 and sums[1] == 0 and sums[2] == logps[400]
        assert sums[0].item() == pytest.approx(exact, abs=1e-10)      # 400 roundings of 4e-13
        (gradient,) = torch.autograd.grad(sums.sum(), logps)
        assert gradient.dtype == dtype and gradient.eq(1).all()


# --- python data.py FILE --------------------------------------------------------------------------

def test_showing_labels_prints_prompt_trained_tokens_and_partner(tmp_path, capsys, monkeypatch):
    path = tmp_path / "f.jsonl"
    write(path, {"q": "Why?", "completion": "Vents.", "label": True},
          {"q": "Loud?", "completion": "Fans.", "label": False, "truncated": True})
    show.main([str(path), "--columns", "prompt=q"])
    shown = capsys.readouterr().out
    assert "read 2 | desirable 1 | undesirable 1 | prompts 2" in shown and "1.33, 1" in shown
    block = (f"{path}: line 1\n    Why?\n"
             "  desirable, 4 prompt + 7 trained tokens\n  + Vents. <end>\n"
             f"  y' for z0, from {path}: line 3, 4 prompt + 5 trained tokens\n"
             "  ~ Fans. (cut: no end)\n")
    assert block in shown and "  - Fans. (cut: no end)\n" in shown and "\033" not in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    show.main([str(path), "--columns", "prompt=q", "--max_len", "9", "--max_prompt_len", "4"])
    assert "\033[32mVents\033[0m" in capsys.readouterr().out           # its last two are cut


def test_prompts_alone_are_shown_and_a_missing_label_is_named(tmp_path, capsys):
    path = tmp_path / "f.jsonl"
    write(path, {"prompt": "Why?"}, {"prompt": "Loud?"})
    show.main([str(path)])
    shown = capsys.readouterr().out
    assert "prompts alone 2" in shown and "line 1\n    Why?\n" in shown and "lambda" not in shown
    lacks = "nearest: prompt .* completion .* label, which lacks label"
    with pytest.raises(SystemExit, match=lacks):
        formats.parse({"prompt": "Why?", "completion": "Vents."}, "row 1")


def test_showing_pairs_prints_the_trained_turns_of_both_sides(tmp_path, capsys):
    path = tmp_path / "f.jsonl"
    chat = [{"role": turn.role, "content": turn.content} for turn in (*turns("Q"), *GO[:3])]
    write(path, {"prompt": chat[:1], "chosen": chat[1:], "rejected": "B",
                 "segment": {"start": 0, "end": 1}})
    show.main([str(path), "--paired", "--turns", "segment"])
    shown = capsys.readouterr().out
    assert "\n  + a2 <end>\n  rejected, " in shown and "y'" not in shown
    write(path, {"prompt": "Q", "completion": "A", "label": True})
    for how in (["--paired"], ["--max_len", "1"]):
        with pytest.raises(SystemExit, match=how[0]):
            show.main([str(path), *how])

"""bench.py: the formulas against counting, the ratios on planted times, tiny cases end to end."""
import json
import re
import sys

import numpy as np
import pytest

import bench
import data
import model
from plumbing import parallel, trl_side

TINY = (1, 2, 16)                    # layers, heads, width


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(parallel, "bar", parallel.bar)           # which `join` replaces
    bench.join("cpu")


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_pass_is_counted_by_hand_with_a_shared_prompt_once():
    """4 width = 16 FLOPs for every pair of a query and a key that it sees: q.k and p.v."""
    shape = dict(trunk=100, vocab=50, width=4, layers=1)
    two, four = (data.make_row([1] * 3, [2] * n) for n in (2, 4))
    prompt = 2 * 100 * 3 + 16 * (1 + 2 + 3)
    of_two = 2 * (100 + 50 * 4) * 2 + 16 * (4 + 5)
    of_four = 2 * (100 + 50 * 4) * 4 + 16 * (4 + 5 + 6 + 7)
    assert bench.pass_flops([(two, four), (two,)], **shape) == 2 * prompt + 2 * of_two + of_four


def test_the_trunk_of_a_gpt_has_12_width_squared_per_layer():
    net = model.GPT(model.GPTConfig(vocab_size=30, context=8, n_layer=3, n_head=2, d_model=16))
    assert bench.shape_of(net) == dict(trunk=3 * 12 * 16**2, vocab=30, width=16, layers=3)


def test_variants_take_turns_and_the_first_step_only_warms_up(monkeypatch):
    order = []

    def variant(name):
        return lambda step: order.append(name + str(step)) or step

    monkeypatch.setattr(bench, "clock", lambda function: function())
    times = bench.alternate({"a": variant("a"), "b": variant("b")}, 3)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]                 # nobody always first
    assert times == {"a": [1, 2], "b": [1, 2]}


def test_a_row_has_medians_over_steps_of_ratios_and_of_the_share_of_the_limit(monkeypatch):
    def planted(variants, steps):                                # the machine slows down meanwhile
        for step in range(steps):
            variants["peak"](step)
        theirs = [3.0, 4.0, 20.0]
        return {"nanokto": [1.0, 2.0, 4.0], "nanokto online": [2.0, 2.0, 8.0],
                "online gather": theirs, "cached": theirs, "peak": []}

    matmuls = iter([9.0, 1.0, 2.0, 3.0])                         # the first one warms up
    monkeypatch.setattr(bench, "alternate", planted)
    monkeypatch.setattr(bench, "matmul_seconds", lambda case: next(matmuls))
    row = bench.measure(bench.Case(), {}, lambda step: 100 * step, 3, lambda step: 0.1 * step)
    assert row["vs_cached"] == 3                                 # 3, 2 and 5 times
    assert row["vs_online gather"] == 2                          # 1.5, 2 and 2.5: like with like
    assert row["tokens_per_second"] == 100                       # 100/1, 200/2, 300/4
    assert row["of_limit"] == pytest.approx(0.2)                 # .1 1/1, .2 2/2, .3 3/4
    assert row["seconds"]["nanokto"] == 2.0 and row["seconds"]["cached"] == 4.0


def test_tiny_cases_run_from_end_to_end_without_trl_and_append_their_lines(tmp_path, monkeypatch,
                                                                           capsys):
    monkeypatch.setitem(sys.modules, "trl", None)                # as if it were not installed
    names = ["kto-8-8", "kto-8-8-llama-lora-checkpoint", "generate-8-4", "epoch-dpo-8-8-bf16"]
    out = tmp_path / "bench.jsonl"
    bench.bench(names, out, "--micro_batch_size=1", repeats=1, tokens=32, shape=TINY)
    said = capsys.readouterr().out
    assert said.count("pip install trl") == 1 and all(name in said for name in names)
    assert [row["case"] for row in lines_of(out)] == names
    for row in lines_of(out):
        assert row["tokens_per_second"] > 0 and row["device"] and row["commit"]
        assert row["case"][0] in "ge" or 0 < row["of_limit"] < 1


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    case = bench.case_named("memory-kto-8-8", shape=TINY, tokens=64)
    bench.make_models(case, tmp_path)
    peaks = bench.measure_memory(case, 1, False, tmp_path)["peak_mb"]
    assert list(peaks) == ["nanokto"] and 0 < peaks["nanokto"] < 700     # MB; the parent has more


def test_both_sides_read_the_numbers_that_were_drawn_as_words():
    tokenizer = trl_side.word_tokenizer(512)
    for loss, columns in (("kto", ["prompt", "completion"]), ("dpo", ["chosen", "rejected"])):
        for record in bench.records(bench.case_named(f"{loss}-8-8"), 20):
            for column in columns:
                ids = tokenizer(record[column])["input_ids"]
                assert ids and ids == [int(word) for word in record[column].split()]


def test_trls_step_has_our_loss_and_our_gradient(tmp_path):
    pytest.importorskip("trl")
    for name in ("kto-8-8", "dpo-8-8", "kto-8-8-llama"):
        case = bench.case_named(name, shape=TINY, tokens=128)
        folder = tmp_path / name
        folder.mkdir()
        bench.make_models(case, folder)
        ours = bench.Ours(case, folder, 1)
        theirs = trl_side.Theirs(case, folder, list(bench.records(case, 8)))
        row = trl_side.apart(ours, theirs)
        assert row["loss_apart"] < 1e-5 and row["gradient_apart"] < 1e-4         # float32
        for how in trl_side.VARIANTS.values():                   # the same step, all of them
            loss = theirs.step(ours, 0, **how, update=False)
            assert loss == pytest.approx(row["loss_trl"], rel=1e-5)
        ours.step(0, online=True)
        assert abs(row["loss"] - {"kto": 0.5, "dpo": np.log(2)}[case.loss]) > 1e-6


def test_scaling_draws_the_ideal_nowhere_above_what_was_measured_and_appends_its_lines(
        tmp_path, monkeypatch):
    seconds, floor = np.array([8.0, 6.0, 9.0]), np.array([1.0, 2.0, 3.0])
    assert bench.ideal(seconds, floor).tolist() == [3, 6, 9]
    monkeypatch.setattr(bench, "step_cost", lambda length, *how, **more: (length * 1e-5, length))
    bench.main(["scaling", "--device", "cpu", "--out", str(tmp_path / "bench.jsonl")])
    sizes = {row["case"]: row["sizes"] for row in lines_of(tmp_path / "bench.jsonl")}
    ends = {case.removeprefix("scaling: "): (min(x), max(x)) for case, x in sizes.items()}
    assert ends == {"tokens per row (KTO)": (64, 4096), "vocabulary": (512, 50257)}
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_what_a_step_costs_has_a_floor_for_a_single_pair_too():
    seconds, flops = bench.step_cost(16, 1, loss="dpo")
    trunk = 2 * 12 * 128**2
    assert 0 < seconds < 1
    assert 6 * trunk * 0.7 < flops < 6 * (trunk + 512 * 128)     # the shared prompt counts once


def test_the_pages_cases_are_cases_and_a_misspelt_one_is_one_line(tmp_path):
    page = (bench.RESULTS.parent / "docs" / "speed.md").read_text()
    commands = re.findall(r"^python bench.py (.*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        for name in command.split("--")[0].split():
            assert name == "scaling" or bench.case_named(name), name
    case = bench.case_named("kto-512-256-8b-bf16-lora-compile")
    assert (case.prompt, case.response, case.vocab) == (512, 256, 128256)
    assert case.flags == ("--dtype=bf16", "--lora=16", "--compile")
    for name in ("ppo-64-64", "kto-64-64-100k", "kto-64", "64-64", "kto-0-8", "bf16-kto"):
        with pytest.raises(SystemExit, match=f"^{name}: no such case; e.g. kto-64-64"):
            bench.main(["kto-64-64", name, "--out", str(tmp_path / "x")])

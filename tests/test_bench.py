"""bench.py: the formulas against counting, the ratios on planted times, and a tiny case from end to end."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import data
import model

TINY = (1, 2, 16)


def row(prompt, response):
    return data.make_row([1] * prompt, [2] * response)


def test_attention_flops_count_every_pair_of_a_query_and_a_key_it_sees():
    for c, before in ((1, 0), (5, 0), (4, 3)):
        pairs = sum(1 for i in range(before, before + c) for j in range(i + 1))                       # token i sees 0 .. i
        assert bench.attention_flops(c, before, d=8, layers=2) == 2 * pairs * (2 * 8 + 2 * 8)         # q.k and p.v: 2 d each


def test_a_pass_is_its_matmuls_counted_by_hand():
    shape = dict(trunk=100, vocab=50, d=4, layers=1)
    one, pair = (row(3, 2),), (row(3, 2), row(3, 4))
    attention = lambda p, *cs: 16 * (p * (p + 1) / 2 + sum(c * p + c * (c + 1) / 2 for c in cs))      # noqa: E731   4 d = 16 per pair
    assert bench.pass_flops([one], **shape) == 2 * 100 * 5 + 2 * 50 * 4 * 2 + attention(3, 2)
    assert bench.pass_flops([pair], **shape) == 2 * 100 * 9 + 2 * 50 * 4 * 6 + attention(3, 2, 4)     # the prompt once
    assert bench.beside_flops([one], **shape) == 2 * 100 * 2 + 2 * 50 * 4 * 2 + 16 * (2 * 3 + 3)      # its keys are there already


def test_the_trunk_of_a_gpt_has_12_d_squared_per_layer():
    net = model.GPT(model.GPTConfig(vocab_size=30, context=8, n_layer=3, n_head=2, d_model=16))
    assert bench.shape_of(net) == dict(trunk=3 * 12 * 16**2, vocab=30, d=16, layers=3)


def test_ratios_are_medians_over_batches_that_both_had_and_the_first_only_warms_up():
    planted = {"ours": [99, 1, 2, 4], "theirs": [1, 3, 4, 20]}                                         # the machine slows down: 3, 2, 5 times
    order = []

    def timer(f):
        name, k = f()
        order.append(name)
        return planted[name][k]

    times = bench.alternate({n: lambda k, n=n: (n, k) for n in planted}, range(4), timer)
    assert times == {"ours": [1, 2, 4], "theirs": [3, 4, 20]} and bench.ratio(times["theirs"], times["ours"]) == 3
    assert order[:4] == ["ours", "theirs", "theirs", "ours"]                                          # nobody always goes first
    assert bench.ratio(None, [1]) is None and bench.spread([1.0] * 9) == 0 and bench.spread(range(1, 102)) == pytest.approx(80 / 51)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes")], ids=repr)
def test_who_runs_out_of_memory_is_left_out_and_the_others_go_on(error):
    def greedy(batch):
        raise error

    times = bench.alternate({"greedy": greedy, "modest": lambda batch: None}, range(3))
    assert times["greedy"] is None and len(times["modest"]) == 2
    with pytest.raises(RuntimeError, match="shapes"):                                                 # any other error is one
        bench.alternate({"wrong": lambda batch: torch.ones(2) @ torch.ones(3) or "shapes"} | {"wrong": lambda b: (_ for _ in ()).throw(RuntimeError("shapes"))}, range(1))


def test_a_case_without_memory_is_a_row_that_says_so(monkeypatch, tmp_path, capsys):
    real = bench.measure_step
    monkeypatch.setattr(bench, "measure_step", lambda case, *how: real(case, *how) if case.kind == "dpo" else (_ for _ in ()).throw(MemoryError()))
    monkeypatch.setattr(bench, "trl_missing", lambda: "no TRL here")
    bench.bench(["kto-8-8", "dpo-8-8"], "cpu", True, tmp_path / "bench.jsonl", size=TINY, repeats=1, tokens=64)
    first, second = [json.loads(x) for x in open(tmp_path / "bench.jsonl")]
    assert first["note"] == "out of memory" and second["case"] == "dpo-8-8" and second["tokens_per_second"] > 0
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kto-8-8", "dpo-8-8-bf16", "kto-8-8-llama", "score-8-8", "generate", "epoch-kto", "epoch-dpo",
                                  "kto-8-8-8b-bf16-checkpoint", "kto-8-8-8b-bf16-lora-checkpoint"])
def test_a_tiny_case_runs_from_end_to_end_without_trl_and_appends_a_line(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setitem(sys.modules, "trl", None)                                                     # as if it were not installed
    bench.bench([name], "cpu", True, tmp_path / "bench.jsonl", size=(1, 4, 16) if "8b" in name else TINY, vocab=512, repeats=1, tokens=64, new=4)
    out = capsys.readouterr().out
    assert out.count("pip install trl") == 1 and len(out.splitlines()) <= 4                           # TRL, head, the case, a busy machine
    r, = [json.loads(x) for x in open(tmp_path / "bench.jsonl")]
    assert r["case"] == name and r["tokens_per_second"] > 0 and r["device"] and r["date"] and r["versions"]["torch"] == torch.__version__
    assert r.get("vs_online") is None and name in out
    if name.startswith(("kto", "dpo", "score")):
        assert 0 < r["of_limit"] < 1 and r["tokens_per_second"] > r["trained_per_second"]


@pytest.mark.parametrize("name", ["kto-8-8", "dpo-8-8", "kto-8-8-llama"])
def test_trls_step_has_our_loss_and_our_gradient(tmp_path, name):
    pytest.importorskip("trl")
    case = bench.Case.named(name, size=TINY, tokens=128)
    bench.make_models(tmp_path, case)
    ours = bench.Ours(case, tmp_path, 1, "cpu").cache()
    theirs = bench.Theirs(case, tmp_path, bench.records_of(ours.units), "cpu")
    mine, trl, gradient = bench.apart(ours, theirs, ours.batches[0])
    assert mine == pytest.approx(trl, rel=1e-5) and gradient < 1e-4                                   # float32; the second is per tensor, small ones included
    assert mine != pytest.approx({"kto": 0.5, "dpo": 0.6931472}[case.kind], rel=1e-4), "policy and reference are apart"


@pytest.mark.parametrize("name", ["kto-8-8-bf16", "dpo-8-8-bf16"])
def test_trls_policy_and_reference_compute_in_bf16_where_ours_do(tmp_path, name):
    pytest.importorskip("trl")
    case, seen = bench.Case.named(name, size=TINY, tokens=64), []
    bench.make_models(tmp_path, case)
    ours = bench.Ours(case, tmp_path, 1, "cpu").cache()
    theirs = bench.Theirs(case, tmp_path, bench.records_of(ours.units), "cpu")
    for net in (theirs.trainer.model, theirs.trainer.ref_model):
        net.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    theirs.step(ours, ours.batches[0], False)
    assert seen == [torch.bfloat16] * {"kto": 4, "dpo": 2}[case.kind]                                # y, and for KTO y', by both


def test_both_sides_read_the_same_tokens():
    units = bench.make_units(bench.Case.named("dpo-8-8"), 5)
    found, _ = data.encode([data.parse(r)[1][0] for r in bench.records_of(units)], data.Tokenizer(bench.word_tokenizer(512)))
    assert all(a.ids.tolist() == b.ids.tolist() and a.n_prompt == b.n_prompt for u, v in zip(units, found) for a, b in zip(u, v))


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    case = bench.Case.named("memory-kto-8-8", size=TINY, tokens=64)
    bench.make_models(tmp_path, case)
    shutil.rmtree(tmp_path / "ref")                                                                   # the steps alone: nobody asks for the reference
    assert 0 < bench.peak_memory(case, "micro-batches", tmp_path, "cpu") < 500


def test_memory_is_measured_of_each_variant_and_trls_only_where_it_is(monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda case, side, folder, device: "out of memory" if side == "TRL online" else 12.3)
    row = bench.measure_memory(bench.Case.named("memory-dpo-8-8"), "cpu", 1, True, None)
    assert bench.line("memory-dpo-8-8", row).endswith("peak MB: nanokto 12, micro-batches 12, TRL online out of memory, TRL cached 12")
    assert list(bench.measure_memory(bench.Case.named("memory-8-8"), "cpu", 1, False, None)["peak_mb"]) == ["nanokto", "micro-batches"]


def test_the_ideal_has_the_floors_shape_and_is_nowhere_above_what_was_measured():
    seconds, floor = np.array([8.0, 6.0, 9.0]), np.array([1.0, 2.0, 3.0])
    assert bench.ideal(seconds, floor).tolist() == [3, 6, 9]


def test_the_scaling_picture_has_all_its_panels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "step_cost", lambda length, examples, *how, **more: (length * 1e-5 + 1e-4 / examples, float(length)))
    monkeypatch.setattr(bench, "data_cost", lambda n: (1e-5, 900.0))
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=lambda words, **how: SimpleNamespace(stdout=f"1e-5 {int(words[words.index('--nproc_per_node') + 1])}")))
    bench.main(["scaling", "--device", "cpu", "--out", str(tmp_path / "bench.jsonl")])
    rows = {r["case"].removeprefix("scaling: "): r for r in map(json.loads, open(tmp_path / "bench.jsonl"))}
    ends = {name: (min(r["sizes"]), max(r["sizes"])) for name, r in rows.items()}
    assert ends == {"tokens per row (KTO)": (64, 4096), "pairs per batch (DPO)": (1, 512), "vocabulary": (512, 50257), "rows of data": (1000, 10**6), "processes": (1, 4)}
    assert (tmp_path / "scaling.png").stat().st_size > 10_000 and "900 bytes per row" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_what_a_step_costs_is_more_than_its_floor_for_a_single_example_too(kind):
    seconds, flops = bench.step_cost(16, 2 if kind == "kto" else 1, kind=kind)
    assert 0 < seconds < 1 and flops > 6 * 2 * 12 * 128**2 / 2


@pytest.mark.parametrize("name", ["ppo-64-64", "kto-64-64-100k", "kto-64", "64-64", "kto-0-8", "kto-64-64-lora"])
def test_a_misspelt_case_ends_in_one_line_before_anything_is_measured(tmp_path, name):
    with pytest.raises(SystemExit, match=f"^{name}: no such case; e.g. kto-64-64"):
        bench.main(["kto-64-64", name, "--out", str(tmp_path / "x")])


@pytest.mark.parametrize("spread, said", [(0.02, False), (0.3, True)])
def test_a_busy_machine_is_seen_and_said(monkeypatch, tmp_path, capsys, spread, said):
    monkeypatch.setattr(bench, "measure_step", lambda *how: {"spread": spread})
    bench.bench(["kto-8-8"], "cpu", True, tmp_path / "bench.jsonl", size=TINY)
    assert ("a busy machine: one and the same matmul took up to 30% more" in capsys.readouterr().out) == said


def test_the_readmes_cases_are_cases():
    names = [w for command in re.findall(r"`python bench.py ([^`]*)`", (bench.RESULTS.parent / "README.md").read_text()) for w in command.split("--")[0].split()]
    assert len(names) >= 7 and all(bench.Case.named(n) for n in names if n != "scaling")
    assert bench.Case.named("kto-512-512-8b-bf16-lora").lora == 16 and bench.Case.named("memory-kto-256-256-124m-bf16-compile").compile


def test_more_data_costs_the_same_per_row():
    few, many = (bench.data_cost(n)[0] for n in (500, 4000))
    assert many < 4 * few                                                                             # quadratic would be 8 times

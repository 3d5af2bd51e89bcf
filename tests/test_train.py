"""Claims about the loop and about a run from start to end, for the small GPT and for a Llama.

A step is the same for any split: test_split.py. What faults leave: test_faults.py.
"""

import json
import math
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import model
import recipes
import train
from lab import (batch_of, dies_at, flags, largest_difference, log_prob, metrics,
                 read_rows, read_units, run, tiny_llama, weights, without_report, write_rows)
from plumbing import announce
from plumbing.huggingface import load_policy
from plumbing.run import Run
from plumbing.settings import Config, parse
from plumbing.sources import World
from plumbing.tokenizer import load_tokenizer


@pytest.fixture
def quick(monkeypatch):
    without_report(monkeypatch)


def model_bytes(out):
    return (out / "model" / "model.safetensors").read_bytes()


# --- one step -----------------------------------------------------------------------------------

def test_the_learning_rate_rises_from_above_0_and_falls_along_a_cosine_to_a_tenth():
    config = Config(lr=1.0, warmup=4, steps=10)
    rates = [train.learning_rate(step, config) for step in (0, 1, 2, 3, 4, 7, 10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.55, 0.1], abs=1e-12)
    assert train.learning_rate(0, Config(lr=1.0, warmup=0, steps=10)) == 1.0


def test_the_optimiser_is_adamw_with_decay_on_matrices_alone():
    """Two steps by hand: means with .9 and .95, bias-corrected; a decayed matrix first."""
    torch.manual_seed(0)
    policy = torch.nn.Linear(3, 2).double()
    by_hand = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = train.make_optimizer(policy, Config(lr=0.1, weight_decay=0.5))
    mean = {name: torch.zeros_like(p) for name, p in by_hand.items()}
    square = {name: torch.zeros_like(p) for name, p in by_hand.items()}
    for step in (1, 2):
        for name, p in policy.named_parameters():
            p.grad = torch.randn_like(p)
            mean[name] = 0.9 * mean[name] + 0.1 * p.grad
            square[name] = 0.95 * square[name] + 0.05 * p.grad ** 2
            if p.dim() == 2:
                by_hand[name] *= 1 - 0.1 * 0.5
            corrected = (square[name] / (1 - 0.95 ** step)).sqrt() + 1e-8
            by_hand[name] -= 0.1 * mean[name] / (1 - 0.9 ** step) / corrected
        optimizer.step()
    for name, p in policy.named_parameters():
        assert torch.allclose(p, by_hand[name], rtol=0, atol=1e-12), name


def test_gradients_are_scaled_down_to_a_norm_and_with_0_never():
    policy = torch.nn.Linear(2, 1, bias=False)
    for most, after in ((1.0, 1.0), (0, 5.0), (7.0, 5.0)):
        policy.weight.grad = torch.tensor([[3.0, -4.0]])
        assert train.clip_gradients(policy, most) == 5.0         # what is logged: the norm before
        assert float(policy.weight.grad.norm()) == pytest.approx(after, rel=1e-5)


def test_tokens_per_second_counts_prompts_and_responses_once(lab, tmp_path, monkeypatch, quick):
    """With a clock that says 2 seconds for every step, and a batch in micro-batches."""
    ticks = iter(range(0, 10 ** 6, 2))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=time.process_time)
    monkeypatch.setattr(train, "time", clock)
    run(*flags(lab, tmp_path / "run", "--micro_batch_size", 3, loss="dpo", steps=1))
    tokens = sum(len(row.ids) for unit in batch_of(read_units(lab)) for row in unit)
    assert metrics(tmp_path / "run")[0]["tokens_per_second"] == tokens / 2


# --- the self-check of step 0 -------------------------------------------------------------------

def test_step_0_has_the_predicted_loss_where_policy_and_reference_are_equal(lab, tmp_path, capsys,
                                                                          quick):
    """lambda_y / 2 of each row, in closed form."""
    batch = batch_of(read_units(lab, "rows.jsonl"))
    expected = np.mean([0.75 if row.desirable else 0.5 for row, in batch])
    for dtype, exact in (("fp64", 1e-6), ("fp32", 1e-6), ("bf16", 1e-3)):
        run(*flags(lab, tmp_path / dtype, "--init", lab / "ref", "--lambda_d", 1.5,
                   "--dtype", dtype, steps=1))
        said = re.search(r"step 0: loss ([\d.]+) \(predicted ([\d.]+)\).*\| ok",
                         capsys.readouterr().out)
        loss, predicted = map(float, said.groups())
        assert predicted == pytest.approx(expected, abs=1e-6), dtype
        assert loss == pytest.approx(expected, abs=exact), dtype


def test_how_far_step_0_may_be_off_depends_on_the_dtype(capsys):
    """A tenth of the tolerance passes, and ten times it stops: log-ratio and loss."""
    for dtype, tolerance in (("fp64", 1e-9), ("fp32", 1e-3), ("bf16", 0.1)):
        run_ = SimpleNamespace(config=SimpleNamespace(dtype=dtype), must_be_equal=lambda: True,
                               recipe=SimpleNamespace(online=False))
        small, large = tolerance / 10, tolerance * 10
        announce.check_first_step((0.5 + small, 0.5, small), 1.0, run_)
        assert capsys.readouterr().out.endswith("| ok\n")
        for look in ((0.5, 0.5, large), (0.5 + large, 0.5, 0.0)):
            with pytest.raises(SystemExit, match="equal weights"):
                announce.check_first_step(look, 1.0, run_)
        with pytest.raises(SystemExit, match="no gradient"):
            announce.check_first_step((0.5, 0.5, 0.0), 0.0, run_)


def test_what_step_0_prints_fits_the_page(capsys):
    for equal, gradient in ((True, 1.23e-5), (False, 1.23e-5), (True, 0.0)):
        run_ = SimpleNamespace(config=SimpleNamespace(dtype="bf16"), must_be_equal=lambda: equal,
                               recipe=SimpleNamespace(online=True))
        announce.check_first_step((0.693147, 0.693147, 1.2e-4), gradient, run_)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 95


def test_step_0_stops_when_the_reference_is_not_the_policy_it_should_be(lab, tmp_path, monkeypatch):
    """As if an adapter were missing from the reference; and a broken table of log-probs."""
    real = Run.reference_table
    monkeypatch.setattr(Run, "reference_table", lambda *a, **k: real(*a, **k) + 0.01)
    with pytest.raises(SystemExit, match="equal weights, yet a log-ratio exceeds"):
        run(*flags(lab, tmp_path / "run", "--init", lab / "ref", steps=2))


def test_step_0_stops_when_there_is_no_gradient(lab, tmp_path):
    with pytest.raises(SystemExit, match="no gradient"):
        run(*flags(lab, tmp_path / "run", "--lambda_d", 0, "--lambda_u", 0, steps=2))


def test_a_fixed_z0_at_equal_weights_is_no_alarm(lab, tmp_path, capsys, quick):
    run(*flags(lab, tmp_path / "run", "--init", lab / "ref", "--z0", 1.5, steps=1))
    assert "| ok" in capsys.readouterr().out and metrics(tmp_path / "run")[0]["z0"] == 1.5


# --- steps that go wrong ------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(lab, tmp_path, monkeypatch):
    def broken_loss(logratios, desirable):
        return logratios / desirable.to(logratios.dtype)

    monkeypatch.setitem(recipes.LOSSES, "broken", broken_loss)
    with pytest.raises(SystemExit) as stop:
        run(*flags(lab, tmp_path / "run", loss="broken", steps=2))
    (first,), *_ = batch_of(read_units(lab, "rows.jsonl"))
    assert first.where in stop.value.code
    assert "step 0: the loss is not finite" in stop.value.code and "\n" not in stop.value.code


def test_a_gradient_that_is_not_finite_leaves_the_last_checkpoint(lab, tmp_path, monkeypatch):
    real = train.train_step

    def step(policy, objective, optimizer, number, config):
        if number == 3:
            policy.h[1].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
        return real(policy, objective, optimizer, number, config)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit, match="step 3: the gradient is not finite"):
        run(*flags(lab, tmp_path / "run", "--save_every", 2, steps=5))
    [saved] = (tmp_path / "run" / "checkpoint").iterdir()
    assert saved.name == "step-000002"
    for file in saved.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


# --- stop and resume ----------------------------------------------------------------------------

def timeless(out):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"}
            for line in metrics(out)]


def test_killed_and_resumed_gives_the_same_bytes(lab, tmp_path, quick):
    """In step 8, in the second epoch, with the last checkpoint at 5; and the same run twice."""
    more = ("--save_every", 5, "--dtype", "fp32")
    for name in ("whole", "again"):
        run(*flags(lab, tmp_path / name, *more, steps=12))
    with dies_at(8):
        run(*flags(lab, tmp_path / "parts", *more, steps=12))
    assert metrics(tmp_path / "parts")[-1]["step"] == 7          # more than the checkpoint holds
    run(*flags(lab, tmp_path / "parts", *more, "--resume", steps=12))
    for name in ("again", "parts"):
        assert model_bytes(tmp_path / "whole") == model_bytes(tmp_path / name), name
        assert timeless(tmp_path / "whole") == timeless(tmp_path / name), name


def test_an_existing_run_is_only_replaced_when_asked_and_only_resumed_unchanged(lab, tmp_path,
                                                                               quick):
    run(*flags(lab, tmp_path / "run", steps=2))
    with pytest.raises(SystemExit, match="--resume continues it, --overwrite replaces it"):
        run(*flags(lab, tmp_path / "run", steps=2))
    with pytest.raises(SystemExit, match=r"changed .*beta was 0.1, is 0.2.*seed was 3, is 4"):
        run(*flags(lab, tmp_path / "run", "--resume", "--beta", 0.2, "--seed", 4, steps=2))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(*flags(lab, tmp_path / "run", "--overwrite", steps=1))
    assert len(metrics(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# --- a run from start to end --------------------------------------------------------------------

def test_a_dry_run_writes_nothing_and_reads_no_other_run(lab, tmp_path, capsys, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    run("--dry_run")                                             # the embedded world
    for loss in ("kto", "spin", "slic", "rm", "sdpo_stepwise"):
        run(*flags(lab, tmp_path / loss, "--dry_run", loss=loss))
    said = capsys.readouterr().out
    assert said.count("step 0: loss") == said.count("estimate: ") == 6
    assert "loss 0.500000 (predicted 0.500000)" in said
    assert not list(tmp_path.iterdir())
    run(*flags(lab, tmp_path / "there", loss="dpo", steps=1))
    run(*flags(lab, tmp_path / "there", "--dry_run"))            # KTO, in the folder of a DPO run
    real = re.findall(r"step 0: loss [\d.]+", said)[1]
    assert re.findall(r"step 0: loss [\d.]+", capsys.readouterr().out)[-1] == real


def test_auto_lambdas_print_the_counts_and_reach_the_ratio(lab, tmp_path, capsys, quick):
    for k, (d, u) in enumerate((("auto", "auto"), (3.0, "auto"), ("auto", 3.0))):
        out = tmp_path / str(k)
        run(*flags(lab, out, "--lambda_d", d, "--lambda_u", u, "--lambda_ratio", 1.25, steps=1))
        config = json.loads((out / "config.json").read_text())
        ratio = config["lambda_d"] * 18 / (config["lambda_u"] * 9)
        assert ratio == pytest.approx(1.25, rel=1e-12)
        assert config["lambda_d"] == d or config["lambda_u"] == u or (d, u) == ("auto", "auto")
        assert "18 desirable, 9 undesirable" in capsys.readouterr().out


def test_two_rows_and_an_uneven_last_batch_work(lab, tmp_path, quick):
    for n in (2, 3):
        file = write_rows(tmp_path / "few.jsonl", read_rows(lab / "rows.jsonl")[:n])
        run(*flags(lab, tmp_path / str(n), "--data", file, "--batch_size", 2, steps=3))
        epochs = [line["epoch"] for line in metrics(tmp_path / str(n))]
        assert epochs == {2: [1, 2, 3], 3: [0.6667, 1, 1.6667]}[n]


def test_the_base_model_is_made_again_when_anything_it_depends_on_changes(lab, tmp_path):
    """Masks too: they say which tokens it has learned from."""
    units = read_units(lab, "rows.jsonl")[:4]
    whole = [(data.make_row(row.ids[:row.n_prompt], row.response, train_prompt=True),)
             for row, in units]

    def folder(units, seed=0, lr=1e-3):
        how = dict(steps=1, batch_size=2, lr=lr, warmup=1, weight_decay=0.0)
        source = SimpleNamespace(shape=model.GPTConfig(257, 64, 1, 1, 8),
                                 tokenizer=load_tokenizer(),
                                 base_stages=lambda: [("sft", units, how)])
        return train.base_model(Config(out=str(tmp_path / "run"), seed=seed), source)

    first = folder(units)
    assert folder(units) == first and model.GPT.from_pretrained(first).config.d_model == 8
    others = {folder(whole), folder(units[::-1]), folder(units, seed=1), folder(units, lr=1e-2)}
    assert len(others) == 4 and first not in others


def test_choosing_and_reporting_questions_of_the_world_are_not_the_trained_ones(monkeypatch):
    """--eval_every looks at the tuning ones; held-out pairs and the report at questions apart."""
    settings = parse(["--loss", "rm"])
    source = World(settings.config, settings.recipe)
    asked = []

    def evaluate_world(*args, part="report", **how):
        asked.append(part)
        return dict.fromkeys(("win_rate", "reward", "kl", "malformed"), 0.0)

    monkeypatch.setattr(evaluate, "evaluate_world", evaluate_world)
    source.quick(None, None)
    source.judge(None, None)
    assert asked == ["tune", "report"]
    trained = {unit[0].prompt_key for unit in source.units}
    held_out = {unit[0].prompt_key for unit in source.held_out()}
    assert len(trained) > 50 and len(held_out) > 10 and not trained & held_out


# --- Hugging Face models ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(lab, tmp_path_factory):
    texts = [row["prompt"] + row["completion"] for row in read_rows(lab / "rows.jsonl")]
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", texts)


def llama_flags(llama, file, out, *more, steps=4):
    return ["--model", llama, "--data", file, "--out", out, "--lr", "1e-2", "--steps", steps,
            "--batch_size", 8, "--seed", 3, "--warmup", 1, "--max_len", 64, *more]


def test_a_hugging_face_model_trains_and_what_is_saved_is_what_was_trained(llama, lab, tmp_path):
    """The first KTO step by hand, a sequence at a time: its gradient is -beta/4 (+1 or -1) / B."""
    from transformers import AutoModelForCausalLM
    out, file = tmp_path / "run", lab / "rows.jsonl"
    run(*llama_flags(llama, file, out, "--max_grad_norm", 0, steps=20))
    policy = load_policy(llama, dtype=torch.float64)
    for row, in batch_of(read_units(lab, "rows.jsonl", tokenizer=load_tokenizer(str(llama)))):
        sign = 1 if row.desirable else -1
        (-sign * 0.1 / 4 * log_prob(policy, row) / 8).backward()
    gradients = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
    first = metrics(out)[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    # The run is float32: 1e-4 of a sum over 8 sequences.
    assert first["grad_norm"] == pytest.approx(float(torch.stack(gradients).norm()), rel=1e-4)
    assert json.loads((out / "eval.json").read_text())["train"]["margin"] > 0.5
    lm = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    again = load_policy(out / "model").lm
    assert largest_difference(dict(lm.named_parameters()), dict(again.named_parameters())) == 0


def test_an_adapter_alone_is_trained_and_resumes_with_the_same_bytes(llama, lab, tmp_path, quick):
    """Of rank 4, compared with the model without it."""
    words = ["--lora", 4, "--save_every", 2]
    rows, whole, parts = lab / "rows.jsonl", tmp_path / "whole", tmp_path / "parts"
    run(*llama_flags(llama, rows, whole, *words))
    first, *_, last = metrics(whole)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-5 < abs(last["rewards/chosen"])
    for file in (whole / "checkpoint").glob("*/*.safetensors"):
        assert all("lora_" in name for name in load_file(file))
    name = "model.layers.0.self_attn.q_proj.weight"
    change = weights(whole)[name].double() - load_file(llama / "model.safetensors")[name].double()
    # float32 rounds the sum by 1e-7 of the weight, which is 1e-5 of the change.
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    with dies_at(3):
        run(*llama_flags(llama, rows, parts, *words))
    run(*llama_flags(llama, rows, parts, *words, "--resume"))
    assert model_bytes(whole) == model_bytes(parts)


def test_an_adapter_saved_alone_is_the_merged_model_and_may_be_gone_on_with(llama, lab, tmp_path,
                                                                           quick):
    """Then it is in the reference as well: the log-ratios of the first step are 0."""
    rows, alone = lab / "rows.jsonl", tmp_path / "alone"
    run(*llama_flags(llama, rows, tmp_path / "merged", "--lora", 4))
    run(*llama_flags(llama, rows, alone, "--lora", 4, "--save", "adapter"))
    assert not (alone / "model" / "model.safetensors").exists()
    loaded = [dict(load_policy(tmp_path / name / "model").named_parameters())
              for name in ("merged", "alone")]
    assert largest_difference(*loaded) < 1e-6                    # float32
    run(*llama_flags(alone / "model", rows, tmp_path / "more", "--lora", 4, "--dtype", "fp64",
                     steps=1))
    run(*llama_flags(llama, rows, tmp_path / "base", "--dtype", "fp64", steps=1))
    first, base = metrics(tmp_path / "more")[0], metrics(tmp_path / "base")[0]
    assert abs(first["rewards/chosen"]) < 1e-9 and first["loss"] == pytest.approx(0.5, abs=1e-9)
    assert abs(first["logps/chosen"] - base["logps/chosen"]) > 0.1


def test_losses_and_recipes_of_every_kind_work_with_adapters(llama, lab, tmp_path, quick):
    for loss in ("tdpo2", "spin", "dpo_reference_free", "slic"):
        out = tmp_path / loss
        run(*llama_flags(llama, lab / "pairs.jsonl", out, "--lora", 4, "--loss", loss, steps=2))
        assert all(math.isfinite(line["loss"]) for line in metrics(out)), loss


def test_a_judge_on_the_command_line_compares_both_models_at_the_end(llama, lab, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def short(prompts, responses):\n    return [-len(r) for r in responses]\n")
    run(*llama_flags(llama, lab / "rows.jsonl", tmp_path / "run", "--eval_data",
                     lab / "rows.jsonl", "--judge", f"{judge}:short", steps=1))
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert 0 <= result["win_rate"] <= 1 and result["n"] == 7
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "win_rate" in card and str(tmp_path) not in card

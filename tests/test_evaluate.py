"""Intervals over clusters, KL from sampled prefixes, comparisons, and what a run leaves."""
import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import model
import world
from plumbing import plots
from plumbing.formats import Turn
from plumbing.tokenizer import Tokenizer, load_tokenizer


# --- measuring ------------------------------------------------------------------------------------

def test_the_interval_is_that_of_the_clusters_and_of_95_per_cent():
    """20 values per cluster, all alike: 8,000 values are worth no more than 400 numbers."""
    of_cluster = np.random.default_rng(0).normal(size=400)
    clusters = np.repeat(np.arange(400), 20).tolist()
    low, high = evaluate.bootstrap_ci(np.repeat(of_cluster, 20), clusters)
    normal = 2 * 1.96 * of_cluster.std() / np.sqrt(400)
    assert 0.92 * normal < high - low < 1.08 * normal            # 2,000 resamples: 3 %; 90 %: .84
    assert low < of_cluster.mean() < high


@pytest.fixture(scope="module")
def two_policies():
    torch.manual_seed(0)
    policies = [model.GPT(model.GPTConfig(5, 8, 1, 1, 8)).double() for _ in range(2)]
    for policy in policies:
        for weight in policy.parameters():
            weight.data += 0.5 * torch.randn_like(weight)
    return policies


def every_response(prefix=()):
    """Vocabulary of 5; a response ends with token 4, or after 3 tokens: 85 of them."""
    if len(prefix) == 3 or 4 in prefix:
        return [prefix]
    return [response for token in range(5) for response in every_response((*prefix, token))]


def test_sampled_kl_has_the_mean_of_the_exact_kl_over_all_replies(two_policies):
    policy, reference = two_policies
    rows = [data.make_row([0, 1], response) for response in every_response()]
    flat = data.flatten(rows)
    logp = flat.sums(policy(*flat[:5])).detach()
    logq = flat.sums(reference(*flat[:5])).detach()
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-12)
    exact = float((logp.exp() * (logp - logq)).sum())
    sampled = torch.tensor(evaluate.sampled_kl(policy, reference, rows, budget=50))
    assert float((logp.exp() * sampled).sum()) == pytest.approx(exact, abs=1e-12)   # an identity
    assert np.abs(evaluate.sampled_kl(policy, policy, rows)).max() == 0


def test_margins_give_none_for_an_absent_class():
    found = evaluate.margins(torch.tensor([1.0, -2.0, -3.0, -1.0]), torch.zeros(4),
                             [True, True, False, False])
    assert found == {"logratio_desirable": -0.5, "logratio_undesirable": -2.0, "margin": 1.5,
                     "accuracy": 0.75, "n": 4}
    alone = evaluate.margins(torch.ones(2), torch.zeros(2), [True, True])
    assert alone["margin"] is None and alone["logratio_desirable"] == 1


def test_a_long_prompt_loses_its_left_end_and_leaves_room_for_a_reply():
    torch.manual_seed(0)
    small, tokenizer = model.GPT(model.GPTConfig(257, 32, 1, 1, 8)), load_tokenizer()
    for limit, length in ((None, 32 - 8), (100, 32 - 8), (10, 10)):
        _, (row,) = evaluate.replies(small, tokenizer, ["x" * 100 + "END"], max_prompt_len=limit,
                                     max_new_tokens=5)
        assert row.n_prompt == length and tokenizer.decode(row.ids[:length]).endswith("END")
        assert 1 <= len(row.response) <= 5
    assert data.cut_left([9, 1, 2, 3, 4], 3, [9]) == [9, 3, 4]          # 9: beginning of text
    assert data.cut_left([1, 2, 3, 4], 3, [9]) == [2, 3, 4]


# --- the embedded world ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def desk():
    """A random model of the help desk's size, and its tokenizer."""
    tokenizer = Tokenizer(world.tokenizer())
    torch.manual_seed(0)
    shape = world.MODEL | {"context": 48}
    return model.GPT(model.GPTConfig(vocab_size=tokenizer.vocab_size, **shape)), tokenizer


def test_a_policy_that_is_the_reference_wins_half_of_the_time(desk):
    """Both write junk, but other junk: with the same random numbers they would always tie."""
    policy, tokenizer = desk
    r = evaluate.evaluate_world(policy, policy, tokenizer)
    assert abs(r["win_rate"] - 0.5) < 0.1                        # 4 standard errors of 480 pairs
    assert r["kl"] == 0 and r["malformed"] == 1
    assert r["utilities"] != r["utilities_ref"]
    assert r["n"] == len(r["utilities"]) == 480 and r["split"] == "report"
    prompts = world.eval_prompts("report")
    cells = [world.parse_prompt(prompt) for prompt in prompts]
    wins = evaluate.wins_in_cells(r["utilities"], r["utilities_ref"], cells)
    assert r["win_rate_ci95"] == evaluate.bootstrap_ci(wins, cells)
    assert r["win_rate_ci95"] != evaluate.bootstrap_ci(wins, prompts)


def test_a_reply_meets_every_reply_of_the_reference_to_its_cell():
    """By hand: in cell a 3 beats 1 and 2, and 1 ties with 1; in cell b 0 loses to 5."""
    wins = evaluate.wins_in_cells([3, 0, 1], [1, 5, 2], ["a", "b", "a"])
    assert wins.tolist() == [1, 0, 0.25]


def test_a_world_runs_end_leaves_its_files_and_tells_the_story(desk, tmp_path, capsys):
    policy, tokenizer = desk
    metrics = [{"step": step, "loss": 0.5, "z0_raw": -1.0, "z0": 0.0} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    judge = partial(evaluate.evaluate_world, tokenizer=tokenizer, n=12)
    config = SimpleNamespace(out=str(tmp_path), seed=0, loss="kto")
    evaluate.report_world(judge, policy, policy, tokenizer, config, {"base": 1.0, "align": 2.0})
    said = capsys.readouterr().out
    assert "win rate against the reference" in said and "clamped to 0 in 100%" in said
    result = evaluate.read_result(tmp_path)
    assert result["seconds"].keys() == {"base", "align", "evaluate"} and "utilities" not in result
    assert len((tmp_path / "samples.md").read_text().splitlines()) == 4 + 12
    for picture in ("curves.png", "frontier.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"


# --- runs on files: comparisons -------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    """A finished run on a file with ten prompts: two random models over bytes."""
    tokenizer, out = load_tokenizer(), tmp_path / "run"
    for folder in (out / "model", tmp_path / "ref"):
        torch.manual_seed(len(folder.name))
        model.GPT(model.GPTConfig(257, 64, 1, 1, 8)).save(folder, eot=tokenizer.eot)
        tokenizer.save(folder)
    lines = [{"prompt": f"Question {i % 10}", "completion": f"Answer {i}", "label": i % 2 == 0}
             for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = dict(loss="kto", model="", data=[f"{tmp_path}/rows.jsonl"], eval_data=[], columns="",
                  threshold=None, max_prompt_len=32, ref=f"{tmp_path}/ref", task="files")
    (out / "config.json").write_text(json.dumps(config))
    evaluate.save_result(out, {"win_rate": None, "n": 0, "why_null": "no judge", "train": {"n": 1}})
    (tmp_path / "j.py").write_text("def length(prompts, texts): return [len(t) for t in texts]\n"
                                   "def same(prompts, texts): return [0 for t in texts]\n")
    return out


def evaluate_run(run, *flags):
    """The command line on `run`.   -> eval.json"""
    evaluate.main([str(run), *map(str, flags)])
    return evaluate.read_result(run)


def test_every_judge_of_a_run_on_files_reads_the_same_texts(run, tmp_path, capsys):
    evaluate_run(run, "--max_new_tokens", 20)
    assert "TRAINING prompts" in capsys.readouterr().out
    texts = (run / "comparison.jsonl").read_bytes()
    rows, _ = evaluate.kept_comparison(run)
    assert [row["prompt"] for row in rows] == [f"Question {i}" for i in range(10)]

    by_length = evaluate_run(run, "--judge", f"{tmp_path}/j.py:length")
    lengths = [(len(row["reference"]), len(row["policy"])) for row in rows]
    wins = [(b > a) + 0.5 * (a == b) for a, b in lengths]
    assert by_length["win_rate"] == np.mean(wins) and by_length["kl"] > 0
    low, high = by_length["win_rate_ci95"]
    assert low <= by_length["win_rate"] <= high
    assert by_length["judge"] == "j.py:length" and by_length["n"] == 10
    assert by_length["train"] == {"n": 1} and "why_null" not in by_length
    tied = evaluate_run(run, "--judge", f"{tmp_path}/j.py:same")
    assert (tied["win_rate"], tied["ties"]) == (0.5, 10)

    evaluate_run(run, "--export_pairs", tmp_path / "pairs.jsonl")
    verdicts = []
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        longer = np.sign(len(pair["a"]) - len(pair["b"]))
        verdicts.append({"id": pair["id"], "verdict": {1: "A", 0: "tie", -1: " b"}[longer]})
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, verdicts)))
    outside = evaluate_run(run, "--verdicts", tmp_path / "v.jsonl")
    for key in ("win_rate", "win_rate_ci95", "win_rate_length_controlled", "ties", "n"):
        assert outside[key] == by_length[key], key
    assert (outside["disagreement"], outside["one_order"], outside["position_bias"]) == (0, 0, 0.5)
    assert outside["judge"] == "verdicts in v.jsonl" and "score" not in outside
    assert (run / "comparison.jsonl").read_bytes() == texts


def test_a_kept_comparison_is_never_replaced_unasked_nor_used_after_the_run_went_on(run, tmp_path):
    evaluate_run(run, "--n", 4, "--max_new_tokens", 5)
    for flags in (["--n", 5], ["--data", "other.jsonl"], ["--seed", 1]):
        with pytest.raises(SystemExit, match=f"{flags[0]} .*was sampled with.*delete it"):
            evaluate_run(run, *flags)
    judged = evaluate_run(run, "--n", 4, "--judge", f"{tmp_path}/j.py:same")
    assert judged["n"] == 4 and len(evaluate.kept_comparison(run)[0]) == 4
    (run / "comparison.jsonl").unlink()
    anew = evaluate_run(run, "--n", 5, "--max_new_tokens", 5)
    assert anew["win_rate"] is None and len(evaluate.kept_comparison(run)[0]) == 5
    evaluate.save_result(run, {})                                # as a run that is continued does
    assert evaluate.kept_comparison(run) == ([], {})


def test_prompts_come_from_any_file_that_trains_and_conversations_survive_the_disk(run, tmp_path):
    talk = [{"role": "user", "content": "Hi\u0085|"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": talk, "label": True}] * 2))
    evaluate_run(run, "--data", tmp_path / "chat.json", "--max_new_tokens", 5)
    (row,), note = evaluate.kept_comparison(run)
    assert row["prompt"] == (Turn("user", "Hi\u0085|"),) and note["source"].endswith("chat.json")


def test_prompts_are_those_of_the_held_out_file_and_of_more_a_seeded_draw(run, tmp_path):
    record = evaluate.run_config(run)
    drawn = [evaluate.held_out_prompts(record, (), 4, seed)[0] for seed in range(3)]
    assert all(len(prompts) == 4 and prompts == sorted(prompts) for prompts in drawn)
    assert drawn[0] != drawn[1] or drawn[0] != drawn[2]
    (tmp_path / "held.jsonl").write_text('{"prompt": "x", "completion": "y", "reward": 1}\n')
    record["eval_data"] = [str(tmp_path / "held.jsonl")]         # scores need no --threshold here
    assert evaluate.held_out_prompts(record, (), 4, 0)[0] == ["x"]


def test_models_answer_side_by_side_and_other_requests_are_refused_in_one_line(run, capsys):
    evaluate.main([str(run), "--prompt", "Why?", "--max_new_tokens", "3"])
    said = capsys.readouterr().out
    assert said.count("reference") == said.count("policy") == 3 and "Why?" in said
    record = evaluate.run_config(run) | {"task": "world"}
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="world.* its own judge"):
        evaluate.main([str(run), "--judge", "j.py:same"])
    (run / "model" / "config.json").unlink()
    with pytest.raises(SystemExit, match="no model/config.json there.*finished run"):
        evaluate.main([str(run)])


# --- what a run leaves ----------------------------------------------------------------------------

def test_a_file_runs_end_leaves_its_files(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 0.5}\n')
    config = SimpleNamespace(out=str(run), seed=0, max_len=64)
    result = {"train": evaluate.margins(torch.ones(2), torch.zeros(2), [True, False])}
    evaluate.report_files(result, *evaluate.load_run(run), ["Why?", (Turn("user", "|"),)],
                          config, {"align": 1.0})
    left = evaluate.read_result(run)
    assert left["win_rate"] is None and left["train"]["accuracy"] == 0.5 and left["why_null"]
    assert "user: \\|" in (run / "samples.md").read_text() and (run / "curves.png").is_file()
    rewards = {"train": {"accuracy": .9, "margin": 1., "n": 5}, "eval": {}}
    evaluate.report_rewards(rewards, config, {})
    assert evaluate.read_result(run)["n"] == 5
    assert "larger reward in 90.0%" in capsys.readouterr().out


def test_samples_stay_one_table_row_whatever_is_in_them(tmp_path):
    evaluate.write_samples(tmp_path, ["a|b\nc"], ["x\ny"], ["|"], [(1.0, -2.0)])
    last = (tmp_path / "samples.md").read_text().splitlines()[-1]
    assert last == "| a\\|b c | (+1.0) x y | (-2.0) \\| |"


def test_a_model_card_says_what_was_trained_and_leaks_no_path():
    import yaml
    record = dict(loss="dpo + 0.1*sft", model="/secret/Tiny-Llama", data=["/secret/rows.jsonl"],
                  lr=1e-6, beta=0.25, weight_decay=0.0, judge="/secret/judge.py:f", commit="abc123",
                  origin={"beta": "command line", "lr": "pairs", "judge": "command line"})
    card = evaluate.model_card(record, {"win_rate": 0.625, "n": 40, "kl": None})
    for words in ("Tiny-Llama", "rows.jsonl", "beta 0.25", "lr 1e-06", "win_rate: 0.625", "abc123"):
        assert words in card, words
    assert "secret" not in card and "weight_decay" not in card and "kl" not in card
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S).group(1))
    assert front["tags"] == ["nanokto", "preference-alignment", "dpo + 0.1*sft"]
    assert "SequenceClassification" in evaluate.model_card(record | {"loss": "rm"}, {})
    assert "AutoPeftModel" in evaluate.model_card(record | {"save": "adapter"}, {})


def test_a_running_mean_leaves_out_what_is_missing():
    mean = plots.running_mean(np.array([1.0, np.nan, 3.0] * 30))         # over 3 steps
    assert mean[1:-1] == pytest.approx(2.0) and len(mean) == 90

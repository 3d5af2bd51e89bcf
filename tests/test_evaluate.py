"""Measuring: intervals over clusters, KL from sampled prefixes, and a judge that cannot be beaten by more than it can be."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import model
import world


def test_the_interval_resamples_clusters_and_not_prompts():
    """20 replies per cluster, all alike inside a cluster: 480 prompts are then worth no more than 24 numbers."""
    rng = np.random.default_rng(0)
    per_cluster = rng.normal(size=24)
    clusters, values = np.repeat(np.arange(24), 20).tolist(), np.repeat(per_cluster, 20)
    low, high = evaluate.bootstrap_ci(values, clusters)
    wide = 2 * 1.96 * per_cluster.std() / np.sqrt(24)
    assert 0.8 * wide < high - low < 1.2 * wide, "2,000 resamples know the width to about 3 %, the normal formula to 5 %"
    naive_low, naive_high = evaluate.bootstrap_ci(values, range(480))
    assert high - low > 3 * (naive_high - naive_low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.normal(size=24), 5) + 0.5 * rng.normal(size=120)
        low, high = evaluate.bootstrap_ci(values, np.repeat(np.arange(24), 5).tolist(), seed=seed, resamples=500)
        covered += low <= 0 <= high
    assert 170 <= covered <= 199, "95 % of 200 is 190; percentile intervals of 24 clusters cover a little less"


@pytest.fixture(scope="module")
def two_policies():
    torch.manual_seed(0)
    shape = model.GPTConfig(vocab_size=5, context=8, n_layer=1, n_head=1, d_model=8)
    policies = [model.GPT(shape).double() for _ in range(2)]
    for p in policies:
        for w in p.parameters():
            w.data += 0.5 * torch.randn_like(w)
    return policies


def test_sampled_kl_has_the_mean_of_the_exact_kl_over_all_replies(two_policies):
    """Vocabulary of 5, replies end with token 4 or after 3 tokens: all 85 replies are enumerated."""
    policy, reference = two_policies
    prompt, exact, weighted = [0, 1], 0.0, 0.0

    def replies(prefix=()):
        if len(prefix) == 3 or (prefix and prefix[-1] == 4):
            yield prefix
        else:
            for t in range(5):
                yield from replies((*prefix, t))

    rows = [data.make_row(prompt, r) for r in replies()]
    flat = data.flatten(rows)
    logp, logq = (flat.sums(m(*flat[:5])).detach() for m in (policy, reference))
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-12)
    exact = float((logp.exp() * (logp - logq)).sum())
    weighted = float((logp.exp().numpy() * evaluate.sampled_kl(policy, reference, rows, budget=50)).sum())
    assert weighted == pytest.approx(exact, abs=1e-12)                       # equal in expectation, an identity: no sampling here


def test_sampled_kl_agrees_with_the_mean_log_ratio_and_is_zero_at_equality(two_policies):
    policy, reference = two_policies
    responses = policy.generate([[0, 1]] * 400, eot=4, max_new_tokens=5, seed=1)
    rows = [data.make_row([0, 1], r) for r in responses]
    flat = data.flatten(rows)
    ratios = (flat.sums(policy(*flat[:5])) - flat.sums(reference(*flat[:5]))).detach().numpy()
    kl = evaluate.sampled_kl(policy, reference, rows)
    assert abs(kl.mean() - ratios.mean()) < 4 * (kl - ratios).std() / 20                                      # 4 standard errors
    assert np.abs(evaluate.sampled_kl(policy, policy, rows)).max() == 0


def test_margins_give_none_for_an_absent_class():
    m = evaluate.margins(torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3), [True, True, False])
    assert m == {"logratio_desirable": 1.5, "logratio_undesirable": -3.0, "margin": 4.5, "accuracy": 1.0, "n": 3}
    assert evaluate.margins(torch.ones(2), torch.zeros(2), [True, True])["margin"] is None


def test_samples_stay_one_table_row_whatever_is_in_them(tmp_path):
    evaluate.write_samples(tmp_path / "s.md", ["a|b\nc"], ["x\ny"], ["|"], scores=[(1.0, -2.0)])
    assert (tmp_path / "s.md").read_text().splitlines()[-1] == "| a\\|b c | (+1.0) x y | (-2.0) \\| |"


def test_a_long_prompt_is_cut_from_the_left_and_still_answered(two_policies):
    tokenizer = data.load_tokenizer()
    torch.manual_seed(0)
    small = model.GPT(model.GPTConfig(257, 32, 1, 1, 8))
    texts, rows = evaluate.replies(small, tokenizer, ["x" * 100 + "END"], max_new_tokens=5)
    assert tokenizer.decode(rows[0].ids[:rows[0].n_prompt]).endswith("END") and len(rows[0].response) >= 1


def test_evaluating_a_folder_that_is_no_finished_run_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no config.json there; expected the --out folder of a run"):
        evaluate.main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="the run has not finished: continue it with --resume"):
        evaluate.main([str(tmp_path)])


def test_the_summary_of_runs_is_their_mean_and_deviation(tmp_path):
    for i, w in enumerate((0.8, 0.9)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "eval.json").write_text(json.dumps(
            {"win_rate": w, "win_rate_ci95": [0.7, 0.95], "optimum_at_same_kl": {"win_rate": 0.95, "reward": 2.5}, "reward": 2.0, "kl": 1.0 + i,
             "malformed": 0.05, "reward_greedy": 2.0, "seconds": {"base": 30, "align": 20}}))
    table = evaluate.summary([tmp_path / "0", tmp_path / "1"])
    assert "| mean +- sd | 0.850 +- 0.071 | 0.950 +- 0.000 | 2.000 +- 0.000 | 2.500 +- 0.000 | 1.500 +- 0.707 |" in table


def test_a_policy_that_is_the_reference_wins_half_of_the_time(tmp_path):
    """A random model against itself: junk on both sides, so ties; KL 0; and the interval contains 1/2."""
    tokenizer = data.Tokenizer(world.tokenizer())
    torch.manual_seed(0)
    m = model.GPT(model.GPTConfig(vocab_size=tokenizer.vocab_size, **world.MODEL))
    r = evaluate.evaluate_world(m, m, tokenizer, n=96)
    low, high = r["win_rate_ci95"]
    assert low <= 0.5 <= high and r["kl"] == 0 and r["malformed"] == 1 and r["n"] == 96
    evaluate.plot_frontier(r, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


# --- judges -----------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """save(name, architecture="GPT2", template=None, **config) -> folder of a tiny random reward model over bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    root = tmp_path_factory.mktemp("reward")
    special = ["<|user|>", "<|assistant|>", "<|end|>", "<pad>"]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def save(name, architecture="GPT2", template=None, head="SequenceClassification", **config):
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<pad>", model_max_length=64,
                                                         extra_special_tokens=special[:2])
        tokenizer.chat_template = template
        shape = dict(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
                     pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None, num_labels=1)
        torch.manual_seed(0)
        c = getattr(transformers, architecture + "Config")(**{**shape, **config})
        lm = getattr(transformers, f"{architecture}{'LMHeadModel' if head == 'LM' else 'For' + head}")(c)
        for w in lm.parameters():                                                  # at 0.02, as initialised, all texts score alike
            w.data += 0.3 * torch.randn_like(w)
        lm.save_pretrained(root / name), tokenizer.save_pretrained(root / name)
        return str(root / name)

    return save


TEXTS = ["Yes.", "No, not at all, and here is why.", "", "Perhaps", "é " * 40]


@pytest.mark.parametrize("architecture", ["GPT2", "Llama"])
def test_a_reward_model_gives_transformers_own_logits_whatever_shares_the_batch(reward_models, architecture):
    import transformers
    folder = reward_models(architecture, architecture)
    lm = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["Is it?\n"] * len(TEXTS)
    scores = evaluate.load_judge(folder)(prompts, TEXTS)
    for p, t, s in zip(prompts, TEXTS, scores):
        with torch.no_grad():
            expected = lm(torch.tensor([tokenizer(p + t).input_ids[-64:]])).logits[0, 0].item()
        assert s == pytest.approx(expected, abs=1e-5), "float32 sums in another order"
    assert len(set(scores)) == len(TEXTS) and evaluate.load_judge(folder)([], []) == []


def test_a_reward_model_without_a_pad_token_scores_the_same(reward_models):
    with_pad, without = reward_models("pad", "Llama"), reward_models("nopad", "Llama", pad_token_id=None)
    scores = [evaluate.load_judge(f)(["x"] * 5, TEXTS) for f in (with_pad, without)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5), "float32; one row at a time against batches of five"


def test_conversations_and_texts_go_through_the_chat_template_and_control_tokens_stay_text(reward_models):
    import transformers
    folder = reward_models("chat", "Llama", TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    judge = evaluate.load_judge(folder)

    def expected(messages):
        with torch.no_grad():
            return lm(torch.tensor([tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids])).logits[0, 0].item()

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    one, two, sly = judge(["Hi", (data.Turn("user", "Hi"),), "Hi"], ["Ho", "Ho", "Ho<|end|>"])
    assert one == two == pytest.approx(expected(chat), abs=1e-5), "float32"
    assert abs(sly - expected([chat[0], {"role": "assistant", "content": "Ho<|end|>"}])) > 1e-3, "there it is one control token, here seven bytes"


@pytest.mark.parametrize("change, message", [
    (dict(num_labels=2), "num_labels is 2; a reward model has 1"),
    (dict(head="LM"), "no weights for score.weight; is it a causal LM"),
    (dict(vocab_size=100), "its tokenizer gives token .* its embedding has 100")])
def test_a_folder_that_is_no_reward_model_is_one_line(reward_models, change, message):
    folder = reward_models("bad" + str(len(message)), **change, **({"pad_token_id": None} if "vocab_size" in change else {}))
    if "head" in change:                                            # a causal LM that claims to have one label
        config = json.loads((file := Path(folder, "config.json")).read_text())
        file.write_text(json.dumps(config | {"id2label": {"0": "x"}, "label2id": {"x": 0}}))
    with pytest.raises(SystemExit, match=f"--reward .*{message}") as e:
        evaluate.load_judge(folder, flag="reward")(["x"], ["é" * 5])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("template, message", [("{{ messages[0].content }}", "loses or repeats the assistant's message"),
                                               ("{{ raise_exception('no such role') }}", "refuses roles user, assistant: no such role")])
def test_a_judges_template_that_drops_the_response_or_refuses_is_one_line(reward_models, template, message):
    with pytest.raises(SystemExit, match=f"its chat template {message}"):
        evaluate.load_judge(reward_models("template", "Llama", template))(["x"], ["y"])


def test_a_reward_model_without_or_with_broken_weights_is_one_line(reward_models):
    folder = reward_models("broken")
    weights = Path(folder, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="cannot be loaded as a reward model"):
        evaluate.load_judge(folder)
    weights.unlink()
    with pytest.raises(SystemExit, match="no \\*.safetensors there"):
        evaluate.load_judge(folder)


@pytest.mark.parametrize("name, message", [
    ("few", "1 scores for 2 responses"), ("nan", "the score of response 1 is nan; expected finite numbers"),
    ("words", "gave 'good'; expected a list of 2 numbers"), ("none", "gave 'None'; expected"), ("nosuch", "no function 'nosuch'; it has few, nan, words, none")])
def test_a_python_judge_that_gives_no_usable_scores_is_one_line(tmp_path, name, message):
    (tmp_path / "j.py").write_text("def few(p, r): return [1]\ndef nan(p, r): return [0, float('nan')]\ndef words(p, r): return 'good'\ndef none(p, r): pass\n")
    with pytest.raises(SystemExit, match=message):
        evaluate.load_judge(f"{tmp_path}/j.py:{name}")(["a", "b"], ["c", "d"])


def test_judges_are_found_or_refused_by_name(tmp_path):
    (tmp_path / "j.py").write_text("import numpy as np\ndef length(prompts, responses): return np.array([len(r) for r in responses])\n")
    assert evaluate.load_judge(f"{tmp_path}/j.py:length")(["a"], ["four"]) == [4.0]
    prompt = world.eval_prompts("report", 1)[0]
    assert evaluate.load_judge("world")([prompt], [""]) == [world.utility(prompt, "")]
    (tmp_path / "k.py").write_text("x = (")
    for text, message in (("world!", "no such judge; valid are world"), (f"{tmp_path}/no.py:f", "no such file"), (f"{tmp_path}/k.py:f", "cannot be imported: SyntaxError")):
        with pytest.raises(SystemExit, match=message):
            evaluate.load_judge(text)
    with pytest.raises(SystemExit, match="knows the help desk's questions only"):
        evaluate.load_judge("world")(["Why?"], ["So."])
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        evaluate.load_judge("world")([prompt] * 2, [""])


# --- win rates --------------------------------------------------------------------------------------------------------

def planted(quality, length, n=4000, seed=0):
    """Verdicts of a judge with log-odds quality + length * tanh(d / std d), on a policy that writes longer replies."""
    rng = np.random.default_rng(seed)
    d = rng.normal(40, 50, n)
    logits = quality + length * np.tanh(d / d.std())
    return (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float), d


def test_a_judge_that_only_likes_length_gives_half_at_equal_lengths():
    wins, d = planted(quality=0.0, length=3.0)
    assert wins.mean() > 0.7
    assert abs(evaluate.length_controlled(wins, d) - 0.5) < 0.04, "4,000 pairs know the intercept to about 0.05, its sigmoid to a quarter of that: 3 errors"


def test_without_a_length_effect_the_two_win_rates_agree():
    wins, d = planted(quality=0.8, length=0.0)
    assert abs(evaluate.length_controlled(wins, d) - wins.mean()) < 0.04, "each has a standard error of about 0.01"
    assert evaluate.length_controlled([1, 0, 1, 1], [0, 0, 0, 0]) == 0.75
    assert evaluate.length_controlled([1, 0, 1, 1], [5, 5, 5, 5]) is None


@pytest.mark.parametrize("soft", [False, True])
def test_the_newton_fit_is_the_optimum_that_lbfgs_finds(soft):
    wins, d = planted(0.3, 1.0, n=200)
    wins = np.where(np.arange(200) % 3 == 0, 0.5, wins) if soft else wins
    x, y, w = torch.tensor(np.tanh(d / d.std())), torch.tensor(wins), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = w[0] + w[1] * x
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") + 1e-3 / 2 * (w @ w)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert evaluate.length_controlled(wins, d) == pytest.approx(float(torch.sigmoid(w[0].detach())), abs=1e-7), "LBFGS stops at about 1e-8"


def test_separable_verdicts_stay_finite():
    d = np.linspace(-1, 1, 50)
    assert abs(evaluate.length_controlled(d > 0, d) - 0.5) < 1e-6, "symmetric: the intercept is 0"
    for n in (2, 50, 100_000):
        assert 0.99 < evaluate.length_controlled(np.ones(n), np.arange(n)) < 1, "all won: sigma of about log(n / ridge), not of infinity"


# --- comparisons and judges outside -----------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    """The folder of a finished run on a file with ten prompts: a random policy and a random reference over bytes."""
    tokenizer, out = data.load_tokenizer(), tmp_path / "run"
    for name in ("run/model", "ref"):
        torch.manual_seed(len(name))
        m = model.GPT(model.GPTConfig(257, 64, 1, 1, 8))
        m.save(tmp_path / name, eot=tokenizer.eot), tokenizer.save(tmp_path / name)
    lines = [{"prompt": f"Question {i % 10}", "completion": f"Answer {i}", "label": i % 2 == 0} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = dict(loss="kto", model="", data=[f"{tmp_path}/rows.jsonl"], eval_data=[], columns="", threshold=None, max_len=64, max_prompt_len=32,
                  add_eot=True, ref=f"{tmp_path}/ref", task="files")
    (out / "config.json").write_text(json.dumps(config))
    (out / "eval.json").write_text(json.dumps({"win_rate": None, "n": 0, "why_null": "files bring no judge", "train": {"margin": 1.0}}))
    (tmp_path / "j.py").write_text("def length(prompts, responses): return [len(r) for r in responses]\ndef same(prompts, responses): return [0] * len(prompts)\n")
    return out


def result(run):
    return json.loads((run / "eval.json").read_text())


def test_a_run_on_files_is_compared_judged_exported_and_read_back_on_the_same_texts(run, tmp_path, capsys):
    evaluate.main([str(run), "--max_new_tokens", "20"])
    said = capsys.readouterr().out
    assert "TRAINING prompts" in said and "--export_pairs" in said and "margin" in said
    texts = (run / "comparison.jsonl").read_bytes()
    rows, _ = evaluate.kept_comparison(run)
    assert [r["prompt"] for r in rows] == [f"Question {i}" for i in range(10)], "each prompt once"
    assert (run / "samples.md").read_text().splitlines()[0] == "# Samples at temperature 1"

    evaluate.main([str(run), "--judge", f"{tmp_path}/j.py:length"])
    by_length = result(run)
    assert by_length["win_rate"] == np.mean([(b > a) + 0.5 * (a == b) for a, b in (r["lengths"] for r in rows)])
    assert by_length["train"] == {"margin": 1.0} and "why_null" not in by_length and by_length["n"] == 10 and by_length["judge"] == "j.py:length"
    assert by_length["win_rate_ci95"][0] <= by_length["win_rate"] <= by_length["win_rate_ci95"][1] and by_length["kl"] > 0
    evaluate.main([str(run), "--judge", f"{tmp_path}/j.py:same"])
    assert (result(run)["win_rate"], result(run)["ties"]) == (0.5, 10)

    evaluate.main([str(run), "--export_pairs", str(tmp_path / "pairs.jsonl")])
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    verdicts = [{"id": p["id"], "verdict": "tie" if len(p["a"]) == len(p["b"]) else "A" if len(p["a"]) > len(p["b"]) else " b"} for p in pairs]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, verdicts)))
    evaluate.main([str(run), "--verdicts", str(tmp_path / "v.jsonl")])
    outside = result(run)
    for key in ("win_rate", "win_rate_ci95", "win_rate_length_controlled", "ties", "n"):
        assert outside[key] == by_length[key], key
    assert (outside["disagreement"], outside["one_order"], outside["judge"]) == (0, 0, "verdicts in v.jsonl") and "score" not in outside
    assert outside["position_bias"] == 0.5 and (run / "comparison.jsonl").read_bytes() == texts


def test_exported_pairs_are_blind(run, tmp_path):
    evaluate.main([str(run), "--max_new_tokens", "20", "--export_pairs", str(tmp_path / "pairs.jsonl")])
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows, _ = evaluate.kept_comparison(run)
    assert all(list(p) == ["id", "prompt", "a", "b"] for p in pairs) and len({p["id"] for p in pairs}) == 20
    assert [p["id"][9:] for p in pairs] == [f"{k:05d}" for k in range(20)], "an id is the place in the file and no more"
    seen = {(p["prompt"], p["a"], p["b"]) for p in pairs}
    assert seen == {(r["prompt"], a, b) for r in rows for a, b in ((r["reference"], r["policy"]), (r["policy"], r["reference"]))}, "both orders"
    policy_first = [p["a"] in [r["policy"] for r in rows] for p in pairs]
    assert sum(policy_first) == 10 and policy_first != sorted(policy_first) and policy_first != [k % 2 == policy_first[0] for k in range(20)]
    first = (tmp_path / "pairs.jsonl").read_bytes()
    evaluate.main([str(run), "--export_pairs", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_bytes() == first, "exporting again does not outdate the verdicts"


@pytest.fixture
def exported(tmp_path):
    """read(verdicts by (pair, side of the policy)) of an export of three pairs."""
    rows = [{"prompt": f"p{i}", "reference": "r" * i, "policy": "pp", "lengths": [i, 2]} for i in range(3)]
    (tmp_path / "comparison.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluate.export_pairs(tmp_path, rows, tmp_path / "pairs.jsonl")
    ids = {tuple(v): k for k, v in json.loads((tmp_path / "pairs_key.json").read_text())["pairs"].items()}

    def read(given=None, text=None):
        lines = [json.dumps({"id": ids[k], "verdict": v}) for k, v in (given or {}).items()]
        (tmp_path / "v.jsonl").write_text(text if text is not None else "\n".join(lines) + "\n", encoding="utf-8")
        return evaluate.read_verdicts(tmp_path, rows, tmp_path / "v.jsonl")

    return read, ids, tmp_path


def test_opposite_verdicts_in_the_two_orders_count_half_and_are_reported(exported):
    read, _, _ = exported
    wins, facts = read({(0, "a"): "a", (0, "b"): "b", (1, "a"): "a", (1, "b"): "a", (2, "a"): "tie", (2, "b"): "TIE"})
    assert wins.tolist() == [1, 0.5, 0.5]
    assert facts == {"ties": 1, "disagreement": 1 / 3, "position_bias": 0.75, "one_order": 0}


def test_one_order_is_enough_and_counted(exported):
    read, _, _ = exported
    wins, facts = read({(0, "a"): "b", (1, "b"): "b", (2, "a"): "tie"})
    assert wins.tolist() == [0, 1, 0.5]
    assert facts == {"ties": 1, "disagreement": None, "position_bias": 0, "one_order": 3}


@pytest.mark.parametrize("text, message", [
    ('{"id": "ID", "verdict": "a"}\n\n{"id": "ID", "verdict": "a"}', "line 3: id 'ID' has a verdict already, in line 1"),
    ('{"id": "ID", "verdict": "better"}', "line 1: verdict 'better'; valid are a, b, tie"),
    ('{"id": "12345678-00000", "verdict": "a"}', "not of this run's export: it belongs to another one; ids here go from"),
    ('{"id": "ID9", "verdict": "a"}', "not of this run's export: ids here go from"),
    ('{"id": 1, "verdict": "a"}', "line 1: expected .* got"), ('["a"]', "line 1: expected .* got"), ('{"id":', "line 1: broken JSON"),
    ('{"id": "ID", "verdict": "a"}', "2 of 3 pairs have no verdict, the first is .*00.* one order is enough"), ("", "3 of 3 pairs have no verdict")])
def test_verdicts_that_do_not_fit_are_one_line(exported, text, message):
    read, ids, _ = exported
    with pytest.raises(SystemExit, match="--verdicts .*" + message.replace("ID", ids[0, "a"])) as e:
        read(text=text.replace("ID", ids[0, "a"]))
    assert "\n" not in str(e.value)


def test_verdicts_on_texts_that_are_gone_are_refused(exported, run):
    read, _, folder = exported
    (folder / "comparison.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="sampled anew since the pairs were exported"):
        read({(0, "a"): "a"})
    with pytest.raises(SystemExit, match="no comparison of its present model"):
        evaluate.main([str(run), "--verdicts", "v.jsonl"])


def test_a_kept_comparison_is_never_replaced_unasked_nor_used_after_the_run_went_on(run, tmp_path):
    evaluate.main([str(run), "--n", "4", "--max_new_tokens", "5"])
    with pytest.raises(SystemExit, match="--n 5: .*was sampled with 4; --resample replaces it"):
        evaluate.main([str(run), "--n", "5"])
    evaluate.main([str(run), "--n", "4"])
    assert len(evaluate.kept_comparison(run)[0]) == 4 and result(run)["compared"]["n"] == 8, "two rows to each of the four prompts"
    evaluate.main([str(run), "--judge", f"{tmp_path}/j.py:same"])
    evaluate.main([str(run), "--resample", "--n", "5", "--max_new_tokens", "5"])
    assert len(evaluate.kept_comparison(run)[0]) == 5 and result(run)["win_rate"] is None, "a win rate of other texts does not stay"
    (run / "eval.json").write_text("{}")                                                        # as a run that is continued writes it anew
    assert evaluate.kept_comparison(run) == ([], {})


def test_prompts_come_from_any_file_that_trains_and_conversations_survive_the_disk(run, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi\u0085|"}, {"role": "assistant", "content": "Ho"}], "label": True}] * 2
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    evaluate.main([str(run), "--data", f"{tmp_path}/chat.json", "--max_new_tokens", "5", "--export_pairs", str(tmp_path / "p.jsonl")])
    (row,), note = evaluate.kept_comparison(run)
    assert row["prompt"] == (data.Turn("user", "Hi\u0085|"),) and note["source"] == f"{tmp_path}/chat.json"
    assert json.loads((tmp_path / "p.jsonl").read_text().split("\n")[0])["prompt"] == "user: Hi\u0085|"
    (tmp_path / "scored.jsonl").write_text('{"prompt": "x", "completion": "y", "reward": 1}\n')
    config = evaluate.run_config(run)
    assert evaluate.held_out_prompts(config, [f"{tmp_path}/scored.jsonl"], n=9)[0] == ["x"], "a prompt needs no --threshold"
    with pytest.raises(SystemExit, match=r"--data other.jsonl: .*was sampled with prompts of .*chat.json; --resample"):
        evaluate.main([str(run), "--data", "other.jsonl"])
    with pytest.raises(SystemExit, match="no such file"):
        evaluate.main([str(run), "--resample", "--data", "nosuch.jsonl"])


def test_a_world_run_keeps_its_own_win_rate_beside_another_judges(run, tmp_path):
    config = json.loads((run / "config.json").read_text()) | {"task": "world"}
    (run / "eval.json").write_text(json.dumps({"win_rate": 0.9, "optimum_at_same_kl": {}}))
    prompts = world.eval_prompts("report", 6)
    rows = [{"prompt": p, "reference": "a", "policy": "bb", "lengths": [1, 2]} for p in prompts]
    found = evaluate.judge_comparison(run, config, rows, evaluate.load_judge(f"{tmp_path}/j.py:length"), "j.py:length")
    assert result(run)["win_rate"] == 0.9 and result(run)["judged"]["win_rate"] == found["win_rate"] == 1.0


def test_a_prompt_that_is_cut_keeps_its_beginning_of_text():
    assert evaluate._cut_left([9, 1, 2, 3, 4], 3, [9]) == [9, 3, 4] and evaluate._cut_left([1, 2, 3, 4], 3, [9]) == [2, 3, 4]


def test_a_table_of_runs_on_files_is_one_line(run):
    with pytest.raises(SystemExit, match="no evaluation on the embedded world there"):
        evaluate.main([str(run), str(run)])


# --- the model card ---------------------------------------------------------------------------------------------------

CONFIG = dict(loss="dpo + 0.1*sft", model="/home/secret/models/Tiny-Llama", data=["/home/secret/rows.jsonl"], eval_data=["C:\\secret\\held.json"], tokenizer="",
              init="/home/secret/models/Tiny-Llama", ref="/home/secret/models/Tiny-Llama", out="/home/secret/out", lr=1e-6, steps=12, batch_size=32, beta=0.25,
              judge="/home/secret/judge.py:f", more=["/home/secret/a"], weight_decay=0.0, save_every=100, device="", task="files", n_desirable=1234, n_undesirable=1234,
              origin={"beta": "command line", "lr": "pairs", "judge": "command line", "more": "command line", "weight_decay": "default"},
              versions={"torch": "2.13.0", "transformers": "5.23.0"}, commit="abc123")
RESULT = {"win_rate": 0.625, "win_rate_ci95": [0.5, 0.75], "win_rate_length_controlled": 0.5625, "ties": 3, "n": 40, "judge": "/home/secret/rm", "reward": None, "kl": 0.5,
          "eval": {"logratio_desirable": 1.5, "logratio_undesirable": -0.5, "margin": 2.0, "accuracy": 0.75, "n": 8}}


def front_matter(card):
    import yaml
    return yaml.safe_load(re.fullmatch(r"---\n(.*?)\n---\n.*", card, re.S).group(1))


def test_a_model_card_says_what_was_trained_and_leaks_no_path():
    card = evaluate.model_card(CONFIG, RESULT)
    for part in ("Tiny-Llama", "`rows.jsonl`", "`held.json`", "1,234 desirable", "| beta | 0.25 | command line |", "| lr | 1e-06 | pairs |", "| steps | 12 |", "0.625 [0.500, 0.750]",
                 "at equal lengths 0.562", "over 40 prompts", "3 of them", "0.500 nats", "margin +2.000 nats", "dpo: -log sigma(beta h), h = c - r.", "arXiv 2305.18290", "sft: -lw / nw",
                 "AutoTokenizer", "torch 2.13.0, transformers 5.23.0", "abc123"):
        assert part in card, part
    assert "secret" not in card and "weight_decay" not in card and "save_every" not in card
    assert front_matter(card) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nanokto", "preference-alignment", "dpo", "sft"]}


def test_the_hub_reads_a_model_card_and_base_model_is_a_hub_name_or_absent(tmp_path, monkeypatch):
    from huggingface_hub import ModelCard
    card = evaluate.model_card(CONFIG | {"model": "someone/Tiny-Llama-1.1B"}, {})
    assert ModelCard(card).data.base_model == "someone/Tiny-Llama-1.1B" and "Not measured." in card
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    for local in ("models/mine", "./models/mine", "../x", "mine", ""):
        assert "base_model" not in front_matter(evaluate.model_card(CONFIG | {"model": local}, RESULT)), local


def test_a_card_is_made_for_every_loss():
    import dpo_variants
    import kto
    for loss in (*kto.LOSSES, *dpo_variants.LOSSES, "spin", "ppo"):
        card = evaluate.model_card(CONFIG | {"loss": loss, "model": ""}, {})
        assert front_matter(card)["tags"][2:] == [loss] and 'AutoTokenizer.from_pretrained("FOLDER")' in card
        assert ("Paper: " in card) == (loss in {**kto.LOSSES, **dpo_variants.LOSSES} and loss != "sft")

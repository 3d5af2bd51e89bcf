"""Measuring: intervals over clusters, KL from sampled prefixes, and a judge that cannot be beaten by more than it can be."""
import json

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

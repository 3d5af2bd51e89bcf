"""Claims about rollouts.py: what is sampled and measured, when updates stop. See test_online, too.

That no split over processes and micro-batches matters is tested in test_split.py.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import ppo
import rollouts
import train
from objective import Reference, signature
from plumbing import parallel, rewards
from plumbing.tokenizer import load_tokenizer

F64 = torch.float64
BYTES = load_tokenizer()
PROMPTS = [BYTES.encode(prompt) for prompt in ("ab", "c", "hello", "ab", "xyz", "q?")]
OPTIONS = {"group": 1, "kl_coef": 0.3, "gamma": 1.0, "lam": 0.9, "ppo_epochs": 2, "minibatches": 2,
           "target_kl": 0.0}
SHAPE = dict(vocab_size=257, context=24, n_layer=2, n_head=2, d_model=16)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def toy(seed=0, dtype=F64):
    """A small GPT over bytes, every parameter of which matters."""
    net = model.GPT(model.GPTConfig(**SHAPE)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, dtype=F64, generator=generator))
            if "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return net.to(dtype)


def scorer(kind=rewards.Critic, dtype=F64):
    found = kind(toy(5, dtype))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        found.score.weight.copy_(torch.randn(1, SHAPE["d_model"], dtype=F64, generator=generator))
    return found


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in response) - 0.1 * len(response) + len(prompt)
            for prompt, response in zip(prompts, responses)]


def ppo_of(policy=None, dtype=F64, reward=vowels, clip=0.2, **options):
    """(objective, actor and critic) on the toys."""
    both = rollouts.ActorCritic(policy or toy(dtype=dtype), scorer(dtype=dtype))
    config = SimpleNamespace(batch_size=6, seed=0, max_len=12, dtype="fp64")
    hyper = signature(ppo.actor_critic_loss)[1] | {"clip": clip}
    units = [(data.make_row(prompt, [BYTES.eot]),) for prompt in PROMPTS]
    reference = Reference(model=toy(1, dtype))
    options = OPTIONS | options
    author = rollouts.Author(reward, BYTES, config, options)
    objective = rollouts.OnPolicy(ppo.actor_critic_loss, hyper, units, reference, author, config,
                                  options)
    return objective, both


def same_rows(a, b):
    return [np.array_equal(x.ids, y.ids) for x, y in zip(a, b, strict=True)]


# --- what is sampled and measured -----------------------------------------------------------------

def test_rollouts_measure_what_separate_forwards_measure():
    objective, both = ppo_of()
    rows, known, stats = objective.rollouts(both, step=3)
    reference = objective.reference.model
    on = known["mask"]
    ref_logps, entropies = torch.zeros_like(known["returns"]), torch.zeros_like(known["returns"])
    prompts, responses = [], []
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids.astype(np.int64))
        start, length = row.n_prompt, len(row.response)
        assert len(row.ids) == 12 or row.ids[-1] == BYTES.eot        # max_len, prompt included
        assert on[i].tolist() == [t < length for t in range(on.shape[1])]
        flat = ids, torch.arange(len(ids)), [len(ids)]
        before = torch.arange(start - 1, len(ids) - 1)
        every_logp = both.policy(*flat).log_softmax(-1)[before].detach()
        entropies[i, :length] = -(every_logp.exp() * every_logp).sum(1)
        logps = every_logp.gather(1, ids[start:, None])[:, 0]
        close(known["old_token_logps"][i, :length], logps, 1e-10)    # sums in another order
        ref_logps[i, :length] = reference(*flat).log_softmax(-1)[before, ids[start:]].detach()
        hidden = both.critic.trunk.hidden(*flat, before)             # the state BEFORE the token
        values = both.critic.score(hidden)[:, 0]
        close(known["old_values"][i, :length], values.detach(), 1e-10)
        prompts.append(BYTES.text(row.ids[:start]))
        responses.append(BYTES.text(row.response))
    scores = torch.tensor(vowels(prompts, responses), dtype=F64)
    logps, values = known["old_token_logps"], known["old_values"]
    received = ppo.token_rewards(scores, logps, ref_logps, on, kl_coef=0.3)
    advantages, returns = ppo.gae(received, values, on, lam=0.9)
    close(known["returns"], returns, 1e-10)
    close(known["advantages"], ppo.whiten(advantages, on), 1e-9)
    kl = float(((logps - ref_logps) * on).sum()) / 6
    k3 = float(ppo.kl_estimates(logps[on], ref_logps[on])[2].sum()) / 6
    wanted = {"reward": float(scores.mean()), "objective": float(scores.mean()) - 0.3 * kl,
              "kl/k1": kl, "kl/k3": k3, "length": float(on.sum()) / 6,
              "ended": np.mean([row.ids[-1] == BYTES.eot for row in rows]),
              "entropy": float(entropies[on].mean()),
              "explained_variance": rollouts.explained_variance(values[on], returns[on])}
    assert {name: stats[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)


def test_responses_are_a_function_of_seed_step_and_row():
    objective, both = ppo_of()
    objective.units = objective.units[:1] * 6            # one prompt: only the draws differ
    seen, again, later = (objective.rollouts(both, step) for step in (0, 0, 1))
    assert all(same_rows(seen[0], again[0]))
    assert torch.equal(seen[1]["advantages"], again[1]["advantages"])
    assert not any(same_rows(seen[0], later[0]))
    assert len({row.response.tobytes() for row in seen[0]}) == 6


def test_an_epoch_of_steps_asks_every_prompt_once():
    objective, both = ppo_of()
    objective.config.batch_size = 3
    rows = objective.rollouts(both, 0)[0] + objective.rollouts(both, 1)[0]
    assert sorted(row.prompt.tolist() for row in rows) == sorted(PROMPTS)


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert rollouts.explained_variance(returns, returns) == 1
    assert rollouts.explained_variance(torch.full((3,), 7.0), returns) == 0
    assert rollouts.explained_variance(returns, torch.full((3,), 7.0)) is None


def test_responses_are_written_once_and_reach_every_process_as_they_are(monkeypatch):
    """Each process would write its own rank. Token 0 is a token; a response may fill the room."""
    class Writer:
        def generate(self, prompts, *, numbers, **how):
            return [[parallel.rank] * (1 + 3 * (i % 2)) for i in numbers]

    tables = []

    def collect(table):
        tables.append(table)
        return table

    def answers(rank, total):
        for name, value in (("rank", rank), ("size", 3), ("total", total)):
            monkeypatch.setattr(parallel, name, value)
        return rollouts.answers(Writer(), [[1]] * 5, BYTES, max_len=4, seed=0)

    for rank in range(3):
        answers(rank, collect)
    for rank in range(3):                                # row i is written by process i mod 3
        assert answers(rank, lambda table: sum(tables)) == [[0], [1] * 4, [2], [0] * 4, [1]]


# --- the objective --------------------------------------------------------------------------------

def test_the_first_update_starts_at_pi_old_and_first_look_says_so():
    objective, both = ppo_of()
    batch = next(objective.batches(both, 0))
    measured = objective.measure(both, batch, [2, 0])
    close(measured["token_logps"].detach(), measured["old_token_logps"])
    close(measured["values"].detach(), measured["old_values"])
    assert batch.n == sum(len(row.response) for row, in batch.units)
    loss, expected, largest = objective.first_look(both)
    assert loss == pytest.approx(expected, abs=1e-12) and loss != 0 and largest > 0.1
    objective.reference.model = both.policy
    assert objective.first_look(both)[2] < 1e-12
    honest = objective.measure

    def measure(*what):                                  # a measurement that is off is seen
        found = honest(*what)
        return {**found, "token_logps": found["token_logps"] + 0.1}
    objective.measure = measure
    loss, expected, _ = objective.first_look(both)
    assert abs(loss - expected) > 1e-6


def test_updates_stop_after_the_first_one_that_went_too_far():
    """Each report is fed a KL by hand. The LAST update's counts, not the mean of all so far."""
    objective, both = ppo_of(target_kl=0.02)
    for kls, wanted in (([0.01, 0.03, 0.01, 0.01], 2), ([0.0, 0.0, 0.021, 0.0], 3),
                        ([0.01] * 4, 4)):
        tokens, kl_sum = 0, 0.0                          # of this step alone
        for batch, kl in zip(objective.batches(both, 0), kls):
            sums = {"loss": 2.0 * batch.n, "tokens": batch.n, "clipped": 0.0, "kl": kl * batch.n}
            line = objective.report(sums, batch)
            tokens += batch.n
            kl_sum += kl * batch.n
        assert line["updates"] == wanted and line["loss"] == pytest.approx(2.0)
        assert line["kl/old"] == pytest.approx(kl_sum / tokens)      # the log has the mean


def test_an_epoch_of_updates_sees_every_row_once_in_an_order_of_its_own():
    parts = list(rollouts.updates(10, epochs=3, minibatches=4, seed=[1, 2]))
    epochs = [sum(parts[i:i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(part) for part in rollouts.updates(3, epochs=1, minibatches=8)] == [1, 1, 1]


def test_clipped_are_the_tokens_whose_slope_is_gone():
    objective, _ = ppo_of()
    logps = torch.tensor([0.5, 0.5, 0.5, -0.5, 0.1], dtype=F64, requires_grad=True)
    zero = torch.zeros(5, dtype=F64)
    measured = {"token_logps": logps, "old_token_logps": zero, "values": zero, "old_values": zero,
                "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).double(), "returns": zero}
    losses = objective.losses(measured)
    gradient, = torch.autograd.grad(losses.sum(), logps)
    sums = objective.watch(measured, losses)
    assert sums["tokens"] == 5 and sums["clipped"] == int((gradient == 0).sum()) == 3
    close(sums["kl"], (logps.exp() - 1 - logps).sum().detach())      # samples of pi_old: k3


@pytest.mark.slow
def test_ppo_with_the_true_utility_comes_to_the_exact_frontier(tmp_path):
    """Nobody is above it, but for noise; a good policy has 90 % of what its KL can buy."""
    train.main(["--loss", "ppo", "--reward", "world", "--out", str(tmp_path / "ppo")])
    found = json.loads((tmp_path / "ppo" / "eval.json").read_text())
    lines = (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
    last, optimum = json.loads(lines[-1]), found["optimum_at_same_kl"]["reward"]
    assert 0.8 <= found["kl"] <= 1.2
    assert 0.9 * optimum <= found["reward"] <= optimum + 0.15
    assert last["explained_variance"] > 0.5 and last["ended"] > 0.99

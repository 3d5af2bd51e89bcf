"""Claims about rollouts.py: what is sampled and measured, who judges, when updates stop.

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
import world
from objective import Reference, signature
from plumbing import parallel
from plumbing.formats import Turn
from plumbing.tokenizer import Tokenizer, load_tokenizer

F64 = torch.float64
BYTES = load_tokenizer()
PROMPTS = [BYTES.encode(prompt) for prompt in ("ab", "c", "hello", "ab", "xyz", "q?")]
OPTIONS = {"kl_coef": 0.3, "gamma": 1.0, "lam": 0.9, "ppo_epochs": 2, "minibatches": 2,
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


def scorer(kind=rollouts.Critic, dtype=F64):
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
    return rollouts.PPO(hyper, units, reference, reward, BYTES, config, OPTIONS | options), both


def same_rows(a, b):
    return [np.array_equal(x.ids, y.ids) for x, y in zip(a.rows, b.rows, strict=True)]


# --- what is sampled and measured -----------------------------------------------------------------

def test_rollouts_measure_what_separate_forwards_measure():
    objective, both = ppo_of()
    seen = objective.rollouts(both, step=3)
    known, reference = seen.known, objective.reference.model
    on = known["mask"]
    ref_logps, entropies = torch.zeros_like(known["returns"]), torch.zeros_like(known["returns"])
    prompts, responses = [], []
    for i, row in enumerate(seen.rows):
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
    rewards = ppo.token_rewards(scores, logps, ref_logps, on, kl_coef=0.3)
    advantages, returns = ppo.gae(rewards, values, on, lam=0.9)
    close(known["returns"], returns, 1e-10)
    close(known["advantages"], ppo.whiten(advantages, on), 1e-9)
    kl = float(((logps - ref_logps) * on).sum()) / 6
    k3 = float(ppo.kl_estimates(logps[on], ref_logps[on])[2].sum()) / 6
    wanted = {"reward": float(scores.mean()), "objective": float(scores.mean()) - 0.3 * kl,
              "kl/k1": kl, "kl/k3": k3, "length": float(on.sum()) / 6,
              "ended": np.mean([row.ids[-1] == BYTES.eot for row in seen.rows]),
              "entropy": float(entropies[on].mean()),
              "explained_variance": rollouts.explained_variance(values[on], returns[on])}
    assert {name: seen.stats[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)


def test_responses_are_a_function_of_seed_step_and_row():
    objective, both = ppo_of()
    objective.units = objective.units[:1] * 6            # one prompt: only the draws differ
    seen, again, later = (objective.rollouts(both, step) for step in (0, 0, 1))
    assert all(same_rows(seen, again))
    assert torch.equal(seen.known["advantages"], again.known["advantages"])
    assert not any(same_rows(seen, later))
    assert len({row.response.tobytes() for row in seen.rows}) == 6


def test_an_epoch_of_steps_asks_every_prompt_once():
    objective, both = ppo_of()
    objective.config.batch_size = 3
    rows = objective.write(both.policy, 0) + objective.write(both.policy, 1)
    assert sorted(row.ids[:row.n_prompt].tolist() for row in rows) == sorted(PROMPTS)


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


# --- critics and reward models --------------------------------------------------------------------

ROWS = [data.make_row([1, 2], [3, 4, 5]), data.make_row([9], [8, 5]),
        data.make_row([1, 2], [3, 4, 6]), data.make_row([1, 2, 3], [7, 7, 7, 5])]


def test_a_new_critic_expects_nothing_and_a_language_model_is_no_reward_model(tmp_path):
    toy(dtype=torch.float32).save(tmp_path)
    flat = data.flatten(ROWS)
    for kind in (rollouts.Critic, rollouts.RewardModel):
        assert (kind.load(tmp_path, new=True)(*flat[:4]) == 0).all()
    narrow = rollouts.Critic.load(tmp_path, new=True, dtype=torch.bfloat16)
    assert narrow(*flat[:4]).dtype == torch.float32      # what follows is float32 in any case
    with pytest.raises(SystemExit, match="without a reward head"):
        rollouts.RewardModel.load(tmp_path)


def test_a_reward_model_reads_the_last_token_and_loads_as_it_was_saved(tmp_path):
    reward_model = scorer(rollouts.RewardModel, torch.float32)
    rewards = rollouts.rewards_of(reward_model, ROWS)
    for row, reward in zip(ROWS, rewards):
        ids = torch.tensor(row.ids.astype(np.int64))
        hidden = reward_model.trunk.hidden(ids, torch.arange(len(ids)), [len(ids)], [-1])
        close(reward_model.score(hidden)[0, 0].detach().double(), reward, 1e-5)      # float32
    assert rewards[0] != rewards[2]                      # they differ in their last token alone
    reward_model.token_budget = 4
    close(rollouts.rewards_of(reward_model, ROWS), rewards, 1e-5)
    reward_model.save(tmp_path, eot=256)
    close(rollouts.rewards_of(rollouts.RewardModel.load(tmp_path), ROWS), rewards, 0)


def test_accuracy_counts_a_tie_as_half_and_a_third_response_not_at_all(monkeypatch):
    monkeypatch.setattr(rollouts, "rewards_of", lambda reward_model, rows:
                        torch.tensor([float(row.ids[-1]) for row in rows]))
    five, also_five, six, _ = ROWS
    units = [(five, also_five, six), (six, five, six), (six, five, five), (five, six, five)]
    found = rollouts.accuracy(None, units)               # a tie, right, right, wrong
    assert found == {"accuracy": 2.5 / 4, "margin": 0.25, "n": 4}


def tiny_llama(folder, vocab):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, eos_token_id=5,
        pad_token_id=5)
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_hugging_face_reward_model_loads_as_it_was_saved_and_may_be_padded(tmp_path):
    tiny_llama(tmp_path / "lm", vocab=61)
    reward_model = rollouts.RewardModel.load(tmp_path / "lm", new=True)
    assert reward_model.flat and (rollouts.rewards_of(reward_model, ROWS) == 0).all()
    reward_model.trunk.lm.classifier.score.weight.data.normal_()
    rewards = rollouts.rewards_of(reward_model, ROWS)
    reward_model.save(tmp_path / "rm")
    close(rollouts.rewards_of(rollouts.RewardModel.load(tmp_path / "rm"), ROWS), rewards, 1e-6)
    reward_model.trunk.flat = False
    close(rollouts.rewards_of(reward_model, ROWS), rewards, 1e-5)                    # float32


# --- rewards --------------------------------------------------------------------------------------

REWARDS = """
def good(prompts, responses): return [float(len(r)) for r in responses]
def short(prompts, responses): return [1.0]
def nan(prompts, responses): return [float("nan")] * len(responses)
def infinite(prompts, responses): return [1.0, float("-inf")]
"""


def test_a_reward_that_is_none_is_one_line_that_names_the_flag(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    prompts, responses = ["hi", "hi"], ["yes", "no, never"]
    assert rollouts.load_reward(f"{file}:good")(prompts, responses) == [3.0, 9.0]
    question = world.eval_prompts("train", 1)[0]
    assert rollouts.load_reward("world")([question], ["Happy to help."]) == \
        [world.utility(question, "Happy to help.")]
    toy(dtype=torch.float32).save(tmp_path / "policy", eot=256)
    for spec in (f"{file}:short", f"{file}:nan", f"{file}:infinite", f"{tmp_path}/no.py:f",
                 "wrold", "world", f"{tmp_path}/policy", str(tmp_path)):
        with pytest.raises(SystemExit) as stopped:       # world: these are no questions of its own
            rollouts.load_reward(spec)(prompts, responses)
        line = stopped.value.code
        assert "reward" in line and "\n" not in line and len(line) < 400


def test_a_reward_model_judges_rows_as_it_judges_texts(tmp_path):
    reward_model = scorer(rollouts.RewardModel, torch.float32)
    reward_model.save(tmp_path, eot=256)
    BYTES.save(tmp_path)
    reward = rollouts.load_reward(str(tmp_path), BYTES)
    rows = [data.make_row(BYTES.encode("hi"), BYTES.encode(text) + [BYTES.eot])
            for text in ("yes", "no")]
    wanted = rollouts.rewards_of(reward_model, rows)
    close(rollouts.ask(reward, rows, BYTES), wanted, 0)
    close(torch.tensor(reward(["hi", "hi"], ["yes", "no"])), wanted.to(torch.float32), 1e-6)
    with pytest.raises(SystemExit, match="its tokenizer is not the policy's"):
        rollouts.load_reward(str(tmp_path), Tokenizer(world.tokenizer()))
    long = "x" * 19 + "why"                              # 25 tokens for a context of 24
    assert reward.row(long, "no").ids.tolist() == BYTES.encode("x" * 18 + "why" + "no") + [256]


def test_a_reward_function_is_not_told_of_the_beginning_of_text():
    told = []

    def reward(prompts, responses):
        told.extend([prompts, responses])
        return [0.0]
    rollouts.ask(reward, [data.make_row([7, 8], [9])], SimpleNamespace(bos=[7], text=list))
    assert told == [[[8]], [[9]]]


def chat_reward_model(folder):
    """A tiny llama classifier with a chat template that goes on after the end of the turn."""
    import tokenizers as hf
    from transformers import PreTrainedTokenizerFast
    letters = {chr(i): i - 32 for i in range(32, 127)}
    core = hf.Tokenizer(hf.models.BPE({**letters, "<s>": 95, "</s>": 96}, []))
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = ("<s>{% for m in messages %}{{ m.role }}:{{ m.content }}</s> "
                               "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    tiny_llama(folder, vocab=97)
    reward_model = rollouts.RewardModel.load(folder, new=True)
    reward_model.trunk.lm.classifier.score.weight.data.normal_()
    reward_model.save(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_with_a_chat_template_the_judge_reads_what_transformers_would(tmp_path):
    from transformers import AutoModelForSequenceClassification
    tokenizer = chat_reward_model(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    reward = rollouts.load_reward(str(tmp_path), flag="judge")
    for prompt in ("a?", (Turn("user", "a?"),)):         # a text is the user's turn
        messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "no"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert reward.row(prompt, "no").ids.tolist() == ids
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits[0, 0]
        close(torch.tensor(reward([prompt], ["no"])[0]), wanted, 1e-5)               # float32
    assert 96 in ids and reward.row("a?", "</s>").ids.tolist().count(96) == 2        # text is text
    cut = reward.row("a" * 50, "no").ids.tolist()
    assert len(cut) == 32 and cut[0] == 95 and cut[-5:] == ids[-5:]                  # BOS stays


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

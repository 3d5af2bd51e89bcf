"""The policy writes, a reward judges: what PPO does around the mathematics of ppo.py.

    answers        the policy's response to each prompt, sampled at temperature 1
    load_reward    who judges: the help desk's true utility, a reward model, a Python function
    Critic         V(s_t): what is still to come, one number per token
    PPO            the objective. At every step: responses to a batch of prompts, judged once, then
                   a few optimiser steps on minibatches of them
"""

import importlib.util
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import ppo
import world
from model import GPT, wide_log_softmax, widened
from objective import Batch, Objective
from plumbing import parallel
from plumbing.chat import Chat
from plumbing.formats import Turn
from plumbing.huggingface import HFPolicy, TokenClassifier, read_model_config, weight_files
from plumbing.tokenizer import load_tokenizer


# --- one number per token: critic and reward model ------------------------------------------------

class Scorer(nn.Module):
    """A transformer whose head says one number per token. It takes flat rows, as a policy does.

    A new head is 0, and so is every answer: a new critic expects nothing, a new reward model has
    loss log 2. The transformer is a copy of its own, not the policy's. That costs a forward more,
    but the value loss cannot spoil the policy.
    """

    shares_prompts = False
    chunked = True
    sft_adapter = None
    ahead = 0                 # 0: a number for the text before a token; 1: with this token

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.flat = trunk.flat
        self.token_budget = trunk.token_budget
        self.context = trunk.context
        self.vocab_size = trunk.vocab_size
        self.score = trunk.head                              # a TokenClassifier has its own
        if isinstance(trunk, GPT):
            like = trunk.wte.weight
            self.score = nn.Linear(trunk.config.d_model, 1, bias=False, device=like.device,
                                   dtype=like.dtype)
            nn.init.zeros_(self.score.weight)

    def forward(self, ids, positions, lengths, predict, targets=None, extra=None):
        """A number at each of the M positions; a policy's targets are not looked at.   (M,)"""
        hidden = self.trunk.hidden(ids, positions, lengths, predict + self.ahead)
        return widened(self.score(hidden)[:, 0])

    def checkpoint_activations(self):
        self.trunk.checkpoint_activations()

    def save(self, folder, *, eot=None):
        """Our GPT with score.safetensors beside it; else what transformers' classifiers read."""
        if isinstance(self.trunk, GPT):
            self.trunk.save(folder, eot=eot)
            weight = self.score.weight.detach().cpu().contiguous()
            save_file({"score.weight": weight}, Path(folder) / "score.safetensors")
        else:
            self.trunk.lm.classifier.save_pretrained(folder)

    @classmethod
    def load(cls, folder, *, new=False, device="cpu", dtype=torch.float32, flag="reward"):
        """What `save` or transformers wrote. new: a language model will do, with a head of 0."""
        has_head = any("score.weight" in safe_open(file, "pt").keys()
                       for file in weight_files(folder, flag))
        if not has_head and not new:
            raise SystemExit(f"--{flag} {folder}: a language model without a reward head; "
                             "--loss rm trains one from it")
        if "nanokto" in read_model_config(folder, flag):
            scorer = cls(GPT.from_pretrained(folder, device=device, dtype=dtype))
            if has_head:
                saved = load_file(Path(folder) / "score.safetensors")
                scorer.score.load_state_dict({"weight": saved["score.weight"]})
            return scorer
        classifier = TokenClassifier(folder, dtype, flag).to(device)
        if not has_head:
            nn.init.zeros_(classifier.get_output_embeddings().weight)
        return cls(HFPolicy(classifier))


class Critic(Scorer):
    """V(s_t): what is still to come, said before y_t is known."""


class RewardModel(Scorer):
    """r(x, y), read at the response's last token, where all of it is known: see last_token."""
    ahead = 1


def last_token(row):
    """The row with its mask on the last token alone: a RewardModel's sum over it is the reward."""
    mask = np.zeros_like(row.mask)
    mask[-1] = 1
    mask.setflags(write=False)
    return replace(row, mask=mask)


@torch.no_grad()
def rewards_of(reward_model, rows):
    """r(x, y) of any number of rows.   (B,) float64 on the CPU"""
    device = next(reward_model.parameters()).device
    rows = [last_token(row) for row in rows]
    rewards = torch.zeros(len(rows), dtype=torch.float64)
    for part in data.token_batches(rows, reward_model.token_budget):
        some = slice(part.start, part.stop)
        flat = data.flatten(rows[some], device)
        rewards[some] = reward_model(*flat[:4]).cpu().double()
    return rewards


def accuracy(reward_model, units):
    """How often the chosen response has the larger reward, ties counting half.   -> dict"""
    if not units:
        return None
    rewards = rewards_of(reward_model, [row for unit in units for row in unit[:2]])
    gaps = rewards[0::2] - rewards[1::2]
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return {"accuracy": float(right.mean()), "margin": float(gaps.mean()), "n": len(units)}


# --- rewards --------------------------------------------------------------------------------------

def load_reward(spec, tokenizer=None, *, device="cpu", flag="reward"):
    """reward(prompts, responses) -> a list of numbers; more is better.

    spec       "world": the help desk's true utility, in points
               a folder: a reward model, of --loss rm or of anybody
               "file.py:function": a Python function of the same two lists
    tokenizer  the policy's: a reward model must then have the same, and judges rows of tokens
               as they are (reward.of_rows). Texts go through the folder's own tokenizer.
    """
    said = f"--{flag} {spec}"
    file, _, name = str(spec).rpartition(":")
    if spec == "world":
        return world_reward
    if file.endswith(".py") and Path(file).is_file():
        return python_reward(file, name, said)
    if Path(spec).is_dir():
        return ModelReward(spec, tokenizer, device, flag)
    raise SystemExit(f"{said}: no such reward; valid are world, the folder of a reward model, "
                     "or file.py:function")


def world_reward(prompts, responses):
    for prompt in prompts:
        if not isinstance(prompt, str) or world.parse_prompt(prompt) is None:
            raise SystemExit("the reward world knows the help desk's questions only, "
                             f"not {str(prompt)[:60]!r}")
    return [world.utility(prompt, response) for prompt, response in zip(prompts, responses)]


def python_reward(file, name, said):
    """`name` in `file`. An error in the user's code keeps its traceback."""
    spec = importlib.util.spec_from_file_location("reward_" + Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                          # its dataclasses look there
    spec.loader.exec_module(module)
    function = getattr(module, name)

    def reward(prompts, responses):
        return finite_numbers(function(prompts, responses), len(responses), said)
    return reward


def finite_numbers(scores, n, said):
    numbers = [float(score) for score in scores]
    if len(numbers) != n or not all(math.isfinite(number) for number in numbers):
        raise SystemExit(f"{said}: gave {str(numbers)[:80]} for {n} responses; expected a finite "
                         "number for each")
    return numbers


class ModelReward:
    """A reward model as a reward, of rows or of texts."""

    def __init__(self, folder, tokenizer, device, flag):
        self.said = f"--{flag} {folder}"
        self.model = RewardModel.load(folder, device=device, flag=flag).requires_grad_(False)
        self.tokenizer = load_tokenizer(folder)
        if tokenizer is not None and fingerprint(tokenizer) != fingerprint(self.tokenizer):
            raise SystemExit(f"{self.said}: its tokenizer is not the policy's")

    def of_rows(self, rows):
        return finite_numbers(rewards_of(self.model, rows).tolist(), len(rows), self.said)

    def __call__(self, prompts, responses):
        return self.of_rows([self.row(p, r) for p, r in zip(prompts, responses)])

    def row(self, prompt, response):
        """A prompt and a response as tokens. With a chat template a text is a user's turn.

        A row that is too long loses its left end, but a beginning-of-text stays: rather the
        question is cut than the answer.
        """
        tokenizer = self.tokenizer
        if tokenizer.has_template:
            if isinstance(prompt, str):
                prompt = [Turn("user", prompt)]
            chat = Chat([*prompt, Turn("assistant", response)], tokenizer)
            ids = chat.ids(chat.whole)
        else:
            ids = tokenizer.prompt_ids(prompt) + tokenizer.encode(response) + [tokenizer.eot]
        bos = [getattr(tokenizer.backend, "bos_token_id", None)]
        ids = data.cut_left(ids, self.model.context, bos)
        return data.make_row(ids[:-1], ids[-1:])


def fingerprint(tokenizer):
    text = "Help, my router's fan (2) makes\na strange noise: 100%!"
    return tokenizer.vocab_size, tokenizer.eot, tokenizer.encode(text)


def ask(reward, rows, tokenizer):
    """The reward of each row's response; a function is told texts, without a BOS.   (B,) float64"""
    if hasattr(reward, "of_rows"):
        return torch.tensor(reward.of_rows(rows), dtype=torch.float64)
    prompts = [tokenizer.text(i for i in prompt_of(row) if i not in tokenizer.bos)
               for row in rows]
    responses = [tokenizer.text(row.response) for row in rows]
    return torch.tensor(reward(prompts, responses), dtype=torch.float64)


def prompt_of(row):
    return row.ids[:row.n_prompt].tolist()


# --- the policy writes ----------------------------------------------------------------------------

def answers(policy, prompts, tokenizer, *, max_len, seed):
    """A response to each prompt (lists of tokens) at temperature 1.   -> lists of tokens

    Every process writes its share, and all get all of them. A random number is a function of
    (seed, row, position), so in float64 these are exactly what one process would write. In
    float32 another batch rounds otherwise, and about 4 tokens in a million differ.
    """
    mine = range(parallel.rank, len(prompts), parallel.size)
    with parallel.precision(getattr(policy, "precision", "")):
        written = policy.generate([prompts[i] for i in mine], eot=tokenizer.stops, seed=seed,
                                  max_new_tokens=max_len, room=max_len, numbers=mine)
    table = torch.zeros(len(prompts), max_len, dtype=torch.int64)     # token + 1; 0: nothing there
    for i, response in zip(mine, written):
        table[i, :len(response)] = torch.tensor(response) + 1
    return [[token - 1 for token in row if token] for row in parallel.total(table).tolist()]


class ActorCritic(nn.Module):
    """Policy and critic as one module: one optimiser, one gradient norm, one checkpoint."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.token_budget = min(policy.token_budget, critic.token_budget)

    def forward(self, ids, positions, lengths, predict, targets):
        """(token_logps, values).   (M,) each"""
        token_logps = self.policy(ids, positions, lengths, predict, targets)
        return token_logps, self.critic(ids, positions, lengths, predict)

    def checkpoint_activations(self):
        self.policy.checkpoint_activations()
        self.critic.checkpoint_activations()


def measure_tokens(both, reference, rows):
    """(mask, [log pi, its entropy, log ref, V]) of every response token.   (B, T), (4, B, T)"""
    device = next(both.parameters()).device
    lengths = torch.tensor([row.length for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tables = torch.zeros(4, *mask.shape, dtype=torch.float64)
    for part, weight in parallel.deal(rows, min(both.token_budget, reference.token_budget)):
        if not weight:
            continue
        flat = data.flatten([rows[i] for i in part], device)
        own = both.policy(*flat[:5], entropy)                          # (2, M)
        ref_logps = reference(*flat[:5])                               # (M,)
        values = both.critic(*flat[:4])                                # (M,)
        block = torch.zeros(4, len(part), mask.shape[1], dtype=torch.float64)
        block[:, mask[part]] = torch.cat([own, ref_logps[None], values[None]]).cpu().double()
        tables[:, part] = block
    return mask, parallel.total(tables)


def entropy(logits, targets, chunk):
    """Of the next-token distribution, nats: an `extra` of a policy's forward.   (m, V) -> (1, m)"""
    logps = wide_log_softmax(logits)
    return -(logps.exp() * logps).sum(-1)[None]


class Experience(NamedTuple):
    """The responses of a batch, judged and measured."""
    rows: list           # (B,) data.Row
    known: dict          # name -> (B, T) table, float64 on the CPU: mask, old_token_logps,
                         # old_values, advantages (whitened), returns
    stats: dict          # for the log


def explained_variance(values, returns):
    """1 - var(returns - values) / var(returns): 1 a perfect critic, 0 no better than a constant."""
    spread = float(returns.var())
    return 1 - float((returns - values).var()) / spread if spread > 0 else None


# --- the objective --------------------------------------------------------------------------------

def updates(n, *, epochs=4, minibatches=1, seed=0):
    """`epochs` times all n responses, in a new order, cut into minibatches.   yields index lists

    A function of (n, seed), so all processes know it. From the second minibatch on, pi is not
    pi_old any more.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(n)
        for part in np.array_split(order, min(minibatches, n)):
            yield part.tolist()


class PPO(Objective):
    """A step: responses to a batch of prompts, judged once; then the batches are minibatches."""

    def __init__(self, hyper, units, reference, reward, tokenizer, config, options):
        """units: (row,) each, of which only the prompt is looked at.

        options: kl_coef, gamma, lam, ppo_epochs, minibatches, target_kl.
        """
        super().__init__(ppo.actor_critic_loss, hyper, reference)
        self.units = units
        self.reward = reward
        self.tokenizer = tokenizer
        self.config = config
        self.options = options

    def precision(self, both):
        return parallel.precision(self.config.dtype, next(both.parameters()).device)

    def batches(self, both, step):
        """The minibatches of one Experience; after an update that went too far, no more."""
        with self.precision(both):
            seen = self.rollouts(both, step)
        self.stats = seen.stats
        self.sums = Counter()                                # over all updates of this step
        self.updates = 0
        most = self.options["target_kl"]
        for some in updates(len(seen.rows), epochs=self.options["ppo_epochs"],
                            minibatches=self.options["minibatches"], seed=[self.config.seed, step]):
            known = {name: table[some] for name, table in seen.known.items()}
            tokens = int(known["mask"].sum())
            yield Batch([(seen.rows[i],) for i in some], tokens, known)
            if most and self.last_kl > most:
                return                                       # the samples are too old now

    @torch.no_grad()
    def rollouts(self, both, step):
        """Sample a response to each prompt, judge it, measure it.   -> Experience"""
        options = self.options
        rows = self.write(both.policy, step)
        scores = self.judge(rows)
        mask, tables = measure_tokens(both, self.reference.model, rows)
        logps, entropies, ref_logps, values = tables
        rewards = ppo.token_rewards(scores, logps, ref_logps, mask, kl_coef=options["kl_coef"])
        advantages, returns = ppo.gae(rewards, values, mask, gamma=options["gamma"],
                                      lam=options["lam"])
        known = {"mask": mask, "old_token_logps": logps, "old_values": values,
                 "advantages": ppo.whiten(advantages, mask), "returns": returns}
        k1, _, k3 = (k[mask].sum() / len(rows) for k in ppo.kl_estimates(logps, ref_logps))
        ended = [row.ids[-1] in self.tokenizer.stops for row in rows]
        stats = {"reward": float(scores.mean()),
                 "objective": float(scores.mean() - options["kl_coef"] * k1),
                 "kl/k1": float(k1), "kl/k3": float(k3),               # nats per response
                 "logratios/max": float((logps - ref_logps)[mask].abs().max()),
                 "entropy": float(entropies[mask].mean()),
                 "explained_variance": explained_variance(values[mask], returns[mask]),
                 "length": float(mask.sum()) / len(rows),
                 "ended": float(np.mean(ended))}
        return Experience(rows, known, stats)

    def write(self, policy, step):
        """The policy's responses to the prompts of this step: rows, equal on every process."""
        config = self.config
        chosen = data.batch_rows(len(self.units), config.batch_size, seed=config.seed, step=step)
        prompts = [prompt_of(self.units[i][0]) for i in chosen]
        responses = answers(policy, prompts, self.tokenizer, max_len=config.max_len,
                            seed=[config.seed, step])
        return [data.make_row(prompt, response) for prompt, response in zip(prompts, responses)]

    def judge(self, rows):
        """Their rewards; every process asks for its share.   (B,)"""
        mine = slice(parallel.rank, None, parallel.size)
        scores = torch.zeros(len(rows), dtype=torch.float64)
        scores[mine] = ask(self.reward, rows[mine], self.tokenizer)
        return parallel.total(scores)

    def measure(self, both, batch, part):
        """What actor_critic_loss names, of every response token of the part.   dict of (M,)"""
        flat = data.flatten([batch.units[i][0] for i in part], next(both.parameters()).device)
        with self.precision(both):
            token_logps, values = both(*flat[:5])
        on = batch.known["mask"][part]
        measured = {name: table[part][on].to(token_logps.dtype).to(token_logps.device)
                    for name, table in batch.known.items()}
        return measured | {"token_logps": token_logps, "values": values}

    @torch.no_grad()
    def first_look(self, both, micro_batch_size=0):
        """(loss, what it must be at pi = pi_old, largest |log pi - log ref|) before any step.

        Its responses are those of step 0, sampled once more.
        """
        batch = next(self.batches(both, 0))
        sums = torch.zeros(2, dtype=torch.float64)
        for part, weight in parallel.deal(batch.units, both.token_budget, micro_batch_size):
            found = self.measure(both, batch, part)
            equal = {**found, "token_logps": found["old_token_logps"],
                     "values": found["old_values"]}
            sums[0] += weight * self.losses(found).sum().cpu()
            sums[1] += weight * self.losses(equal).sum().cpu()
        loss, expected = (parallel.total(sums) / batch.n).tolist()
        return loss, expected, self.stats["logratios/max"]

    # ------------------------------------------------------- everything below is diagnostics

    def watch(self, measured, losses):
        """Sums over tokens. clipped: their slope is gone. kl: of pi_old || pi, by k3."""
        logps = measured["token_logps"].detach().cpu().double()
        old = measured["old_token_logps"].cpu().double()
        advantages = measured["advantages"].cpu().double()
        ratio = (logps - old).exp()
        too_good = (ratio > 1 + self.hyper["clip"]) & (advantages > 0)
        too_bad = (ratio < 1 - self.hyper["clip"]) & (advantages < 0)
        return {"loss": losses.detach().cpu().double().sum(),
                "tokens": torch.ones_like(ratio).sum(),
                "clipped": (too_good | too_bad).double().sum(),
                "kl": ppo.kl_estimates(old, logps)[2].sum()}

    def report(self, sums, batch):
        """The metrics of this step so far: of its rollouts, and means over all its updates."""
        self.last_kl = sums["kl"] / sums["tokens"]           # what the early stop looks at
        self.updates += 1
        self.sums.update(sums)
        tokens = self.sums["tokens"]
        return {"loss": self.sums["loss"] / tokens, **self.stats,
                "clip_fraction": self.sums["clipped"] / tokens,
                "kl/old": self.sums["kl"] / tokens, "updates": self.updates}

    def tokens(self, batch):
        return sum(len(unit[0].ids) for unit in batch.units)

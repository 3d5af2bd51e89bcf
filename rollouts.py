"""The policy writes, a reward judges: what PPO, GRPO and --online need besides a loss.

    answers     the policy's response to each prompt, sampled at temperature 1
    Author      G responses to each prompt of a step, and their rewards
    pairs, thumbs
                G judged responses as training data of online DPO, online KTO ...
    OnPolicy    the objective of PPO, GRPO and others with a loss per token. At every step: sample,
                judge once, then one or a few optimiser steps on minibatches of the responses
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn

import data
import ppo
from model import wide_log_softmax
from objective import Batch, Objective, divisor
from plumbing import parallel
from plumbing.rewards import ask


# --- the policy writes ----------------------------------------------------------------------------

def answers(policy, prompts, tokenizer, *, max_len, seed):
    """A response to each prompt (lists of tokens) at temperature 1.   -> lists of tokens

    Every process writes its share and gets all responses. A random number is a function of
    (seed, row, position), so in float64 they are exactly those that one process would write. In
    float32 another batch rounds differently, and about 4 tokens in a million differ.
    """
    mine = range(parallel.rank, len(prompts), parallel.size)
    with parallel.precision(getattr(policy, "precision", "")):
        written = policy.generate([prompts[i] for i in mine], eot=tokenizer.stops, seed=seed,
                                  max_new_tokens=max_len, room=max_len, numbers=mine)
    table = torch.zeros(len(prompts), max_len, dtype=torch.int64)     # token + 1; 0: nothing there
    for i, response in zip(mine, written):
        table[i, :len(response)] = torch.tensor(response) + 1
    return [[token - 1 for token in row if token] for row in parallel.total(table).tolist()]


def prompts_of(units):
    return [unit[0].prompt.tolist() for unit in units]


def as_rows(units, responses, desirable=True):
    """One row per unit: its prompt with the response written to it."""
    return [data.make_row(prompt, response, desirable=desirable, where=unit[0].where)
            for unit, prompt, response in zip(units, prompts_of(units), responses)]


class Author:
    """At every step the policy writes, and `reward` (plumbing/rewards.py) judges."""

    def __init__(self, reward, tokenizer, config, options):
        self.reward = reward
        self.tokenizer = tokenizer
        self.config = config
        self.group = options["group"]                        # G, responses to a prompt

    def write(self, policy, units, seed):
        """G rows for each unit's prompt, next to each other; equal on every process."""
        units = [unit for unit in units for _ in range(self.group)]
        written = answers(policy, prompts_of(units), self.tokenizer, seed=seed,
                          max_len=self.config.max_len)
        return as_rows(units, written)

    def judge(self, rows):
        """The rewards of the rows; every process computes its share.   (B,)"""
        mine = slice(parallel.rank, None, parallel.size)
        scores = torch.zeros(len(rows), dtype=torch.float64)
        scores[mine] = ask(self.reward, rows[mine], self.tokenizer)
        return parallel.total(scores)

    def __call__(self, policy, units, step):
        """-> (rows, their rewards, stats for the log)"""
        rows = self.write(policy, units, [self.config.seed, step])
        scores = self.judge(rows)
        ended = [row.ids[-1] in self.tokenizer.stops for row in rows]
        stats = {"reward": float(scores.mean()),
                 "length": sum(row.length for row in rows) / len(rows),
                 "ended": float(np.mean(ended))}
        if self.group > 1:                                   # groups that teach nothing
            best_first = scores.view(-1, self.group).sort(1, descending=True).values
            stats["ties"] = int((best_first[:, 0] == best_first[:, -1]).sum())
        return rows, scores, stats


# --- a group of judged responses, as preferences --------------------------------------------------

def pairs(rows, scores):
    """The best and the worst of a group; weight 0 if all its rewards are equal.   -> [unit]

    Rewards 1, 3, 2 give [(second, first)] with the scores 3 and 1. The win probability of a
    response is its mean chance to beat another one of the group, P(a beats b) = sigma(R_a - R_b).
    """
    chance = torch.sigmoid(scores[:, None] - scores)                              # (G, G)
    wins = (chance.sum(1) - 0.5) / (len(rows) - 1)           # minus sigma(0) = 1/2, against itself
    best, worst = int(scores.argmax()), int(scores.argmin())
    weight = float(scores[best] > scores[worst])

    def side(k, desirable):
        return replace(rows[k], desirable=desirable, score=float(scores[k]),
                       win_prob=float(wins[k]), weight=weight)

    return [(side(best, True), side(worst, False))]


def thumbs(rows, scores):
    """Thumb up for a reward above the group's mean; weight 0 if all are equal.   -> G units"""
    advantages = ppo.centred_advantages(scores[None])[0]
    weight = float(advantages.any())
    return [(replace(row, desirable=bool(advantage > 0), weight=weight),)
            for row, advantage in zip(rows, advantages)]


# --- the policy writes, and every token counts ----------------------------------------------------

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


def actor_of(learner):
    """The language model: the learner itself, or the policy of an ActorCritic."""
    return getattr(learner, "policy", learner)


def measure_tokens(learner, reference, rows):
    """(mask, [log pi, its entropy, log ref, V]) of every response token.   (B, T), (4, B, T)"""
    device = next(learner.parameters()).device
    lengths = torch.tensor([row.length for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tables = torch.zeros(4, *mask.shape, dtype=torch.float64)
    for part, weight in parallel.deal(rows, min(learner.token_budget, reference.token_budget)):
        if not weight:
            continue
        flat = data.flatten([rows[i] for i in part], device)
        own = actor_of(learner)(*flat[:5], entropy)                    # (2, M)
        found = [own, reference(*flat[:5])[None]]                      # (1, M)
        if hasattr(learner, "critic"):
            found.append(learner.critic(*flat[:4])[None])
        found = torch.cat(found).cpu().double()
        block = torch.zeros(4, len(part), mask.shape[1], dtype=torch.float64)
        block[:len(found), mask[part]] = found
        tables[:, part] = block
    return mask, parallel.total(tables)


def entropy(logits, targets, chunk):
    """Entropy of each next-token distribution, nats; an `extra` of forward.   (m, V) -> (1, m)"""
    logps = wide_log_softmax(logits)
    return -(logps.exp() * logps).sum(-1)[None]


def explained_variance(values, returns):
    """1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for a constant one."""
    spread = float(returns.var())
    return 1 - float((returns - values).var()) / spread if spread > 0 else None


ADVANTAGES = {                           # of a response, from the rewards (prompts, G)
    "group_advantages": ppo.group_advantages,
    "centred_advantages": ppo.centred_advantages,
    "loo_advantages": ppo.loo_advantages,
    "batch_advantages": ppo.batch_advantages,
}


def updates(n, *, epochs=4, minibatches=1, seed=0):
    """`epochs` passes over n responses, each in a new order and cut into minibatches.

    Yields lists of indices, a function of (n, seed), so all processes have the same. From the
    second minibatch on pi differs from pi_old.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(n)
        for part in np.array_split(order, min(minibatches, n)):
            yield part.tolist()


class OnPolicy(Objective):
    """A step samples and judges responses to a batch of prompts; its batches are minibatches."""

    def __init__(self, loss, hyper, units, reference, author, config, options):
        """units: (row,) each; only its prompt is used. options: the recipe's flags."""
        super().__init__(loss, hyper, reference)
        self.units = units
        self.author = author
        self.config = config
        self.options = options
        self.advantages = next(name for name in self.wants if name.endswith("advantages"))

    def precision(self, learner):
        return parallel.precision(self.config.dtype, next(learner.parameters()).device)

    def batches(self, learner, step):
        """The minibatches of one step's responses; they stop once the KL exceeds target_kl."""
        with self.precision(learner):
            rows, known, self.stats = self.rollouts(learner, step)
        self.sums = Counter()                                # over all updates of this step
        self.updates = 0
        most = self.options.get("target_kl", 0)
        for some in updates(len(rows), epochs=self.options.get("ppo_epochs", 1),
                            minibatches=self.options.get("minibatches", 1),
                            seed=[self.config.seed, step]):
            units = [(rows[i],) for i in some]
            tables = {name: table[some] for name, table in known.items()}
            yield Batch(units, divisor(self.loss, units), tables)
            if most and self.last_kl > most:
                return                                       # pi is too far from pi_old

    @torch.no_grad()
    def rollouts(self, learner, step):
        """Sample, judge, measure.   -> (rows, {name: (B, T) table, float64}, stats)"""
        config = self.config
        chosen = data.batch_rows(len(self.units), config.batch_size, seed=config.seed, step=step)
        rows, scores, stats = self.author(actor_of(learner), [self.units[i] for i in chosen], step)
        mask, (logps, entropies, ref_logps, values) = measure_tokens(
            learner, self.reference.model, rows)
        lengths = mask.sum(1, keepdim=True).double()
        known = {"mask": mask, "old_token_logps": logps, "ref_token_logps": ref_logps,
                 "response_len": lengths.expand(mask.shape)}
        kl_coef = self.options.get("kl_coef", 0)             # of a KL penalty inside the reward
        k1, _, k3 = (torch.where(mask, k, 0).sum(1) for k in ppo.kl_estimates(logps, ref_logps))
        stats |= {"objective": float((scores - kl_coef * k1).mean()),
                  "kl/k1": float(k1.mean()), "kl/k3": float(k3.mean()),      # nats per response
                  "logratios/max": float((logps - ref_logps)[mask].abs().max()),
                  "entropy": float(entropies[mask].mean())}
        if "values" in self.wants:
            rewards = ppo.token_rewards(scores, logps, ref_logps, mask, kl_coef=kl_coef)
            advantages, returns = ppo.gae(rewards, values, mask, gamma=self.options["gamma"],
                                          lam=self.options["lam"])
            known |= {"old_values": values, "returns": returns,
                      "advantages": ppo.whiten(advantages, mask)}
            stats["explained_variance"] = explained_variance(values[mask], returns[mask])
        else:
            rewards = (scores - kl_coef * k1).view(-1, self.author.group)
            of_response = ADVANTAGES[self.advantages](rewards).view(-1, 1)
            known[self.advantages] = of_response.expand(mask.shape)
        return rows, known, stats

    def measure(self, learner, batch, part):
        """What the loss names, for every response token of the part.   dict of (M,)"""
        flat = data.flatten([batch.units[i][0] for i in part], next(learner.parameters()).device)
        with self.precision(learner):
            found = learner(*flat[:5])
        if "values" in self.wants:
            found = dict(zip(("token_logps", "values"), found))
        else:
            found = {"token_logps": found}
        like = found["token_logps"]
        on = batch.known["mask"][part]
        measured = {name: table[part][on].to(like.dtype).to(like.device)
                    for name, table in batch.known.items()}
        return measured | found | {"response": flat.sequence}

    @torch.no_grad()
    def first_look(self, learner, micro_batch_size=0):
        """Before any step: (loss, what it must be at pi = pi_old, largest |log pi - log ref|).

        Samples the responses of step 0, which step 0 will sample again.
        """
        batch = next(self.batches(learner, 0))
        sums = torch.zeros(2, dtype=torch.float64)
        for part, weight in parallel.deal(batch.units, learner.token_budget, micro_batch_size):
            found = self.measure(learner, batch, part)
            equal = found | {"token_logps": found["old_token_logps"],
                             "values": found.get("old_values")}
            sums[0] += weight * self.losses(found).sum().cpu()
            sums[1] += weight * self.losses(equal).sum().cpu()
        loss, expected = (parallel.total(sums) / batch.n).tolist()
        return loss, expected, self.stats["logratios/max"]

    # ------------------------------------------------------- everything below is diagnostics

    def watch(self, measured, losses):
        """Sums over tokens. clipped: tokens without slope. kl: KL(pi_old || pi), by k3."""
        logps = measured["token_logps"].detach().cpu().double()
        old = measured["old_token_logps"].cpu().double()
        advantages = measured[self.advantages].cpu().double()
        log_ratio = logps - old
        if "response" in self.wants:                         # GSPO clips whole responses
            log_ratio = ppo.mean_log_ratio(log_ratio, measured["response"].cpu())
        ratio = log_ratio.exp()
        clip = self.hyper.get("clip", torch.inf)
        too_good = (ratio > 1 + self.hyper.get("clip_high", clip)) & (advantages > 0)
        too_bad = (ratio < 1 - self.hyper.get("clip_low", clip)) & (advantages < 0)
        return {"loss": losses.detach().cpu().double().sum(),
                "tokens": torch.ones_like(ratio).sum(),
                "clipped": (too_good | too_bad).double().sum(),
                "kl": ppo.kl_estimates(old, logps)[2].sum()}

    def report(self, sums, batch):
        """The metrics of this step so far: its rollouts' stats, and means over its updates."""
        self.last_kl = sums["kl"] / sums["tokens"]           # for the early stop
        self.updates += 1
        self.sums.update(sums | {"n": batch.n})
        tokens = self.sums["tokens"]
        return {"loss": self.sums["loss"] / self.sums["n"], **self.stats,
                "clip_fraction": self.sums["clipped"] / tokens,
                "kl/old": self.sums["kl"] / tokens, "updates": self.updates}

    def tokens(self, batch):
        return sum(len(unit[0].ids) for unit in batch.units)

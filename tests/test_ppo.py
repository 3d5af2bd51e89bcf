"""Claims about ppo.py: pure functions against literal float64 sums, gradients against enumeration, and a run against the exact frontier."""
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate
import model
import ppo
import world


# --- a small driver in the style of train.py's loop -------------------------------------------------------------------

@dataclass
class Run:
    steps: int = 60                       # rollouts; each is followed by epochs * minibatches optimiser steps
    batch_size: int = 256
    lr: float = 1e-3
    critic_lr: float = 2e-3
    warmup: int = 5
    epochs: int = 2
    minibatches: int = 4
    kl_coef: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    clip_value: float = 1.0
    vf_coef: float = 0.5
    target_kl: float = 0.0                # stop the epochs of a step beyond this KL(pi_old || pi) per token; 0: never
    max_grad_norm: float = 1.0
    max_len: int = 80
    micro: int = 0
    seed: int = 0


def world_prompts(tokenizer, n, seed):
    """n prompts of the training cells, as tokens."""
    return [tokenizer.prompt_ids(p) for p in world.eval_prompts("train", n, seed)]


def train_ppo(policy, critic, reference, tokenizer, reward, run, log=None):
    """What train.py does with ppo.py. -> list of metrics per step"""
    both, history = ppo.ActorCritic(policy, critic), []
    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "peak": run.lr}, {"params": critic.parameters(), "peak": run.critic_lr}], betas=(0.9, 0.95), weight_decay=0.0)
    prompts = world_prompts(tokenizer, 288, run.seed)
    keys = list(map(tuple, prompts))
    for step in range(run.steps):
        clock = time.perf_counter()
        done = (step - run.warmup) / max(1, run.steps - run.warmup)
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * ((step + 1) / run.warmup if step < run.warmup else 0.55 + 0.45 * math.cos(math.pi * done))
        some = [prompts[i % len(prompts)] for i in np.random.default_rng([run.seed, step]).integers(len(keys), size=run.batch_size)]
        experience = ppo.rollouts(policy, critic, reference, some, reward, tokenizer, max_len=run.max_len, seed=[run.seed, step],
                                  kl_coef=run.kl_coef, gamma=run.gamma, lam=run.lam)
        sampled, total = time.perf_counter() - clock, torch.zeros(3, dtype=torch.float64)
        for minibatch in ppo.updates(run.batch_size, epochs=run.epochs, minibatches=run.minibatches, seed=[run.seed, step]):
            norm, stats = update(both, optimizer, experience, minibatch, run)
            total += stats
            if run.target_kl and stats[2] / stats[0] > run.target_kl:
                break
        history.append({"step": step, **experience.stats, "grad_norm": norm, "clip_fraction": float(total[1] / total[0]),
                        "kl/old": float(total[2] / total[0]), "rollout_s": sampled, "seconds": time.perf_counter() - clock})
        if log:
            log(history[-1])
    return history


def update(both, optimizer, experience, minibatch, run):
    """One optimiser step. -> (gradient norm, sums of update_stats)"""
    n_tokens, stats = experience.mask[minibatch].sum(), torch.zeros(3, dtype=torch.float64)
    parts = data.token_batches([experience.rows[i] for i in minibatch], both.token_budget) if not run.micro else \
        [range(i, min(i + run.micro, len(minibatch))) for i in range(0, len(minibatch), run.micro)]
    for part in parts:
        measured = ppo.measure(both, experience, [minibatch[i] for i in part], "cpu")
        loss = ppo.actor_critic_loss(**measured, clip=run.clip, clip_value=run.clip_value, vf_coef=run.vf_coef)
        (loss * measured["mask"].sum() / n_tokens).backward()
        stats += ppo.update_stats(measured, clip=run.clip)
    norm = float(torch.nn.utils.clip_grad_norm_(both.parameters(), run.max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stats


def ppo_on_the_world(base, run, reward="world", log=None, n=480, part="report"):
    torch.manual_seed(run.seed)
    tokenizer = data.Tokenizer(world.tokenizer())
    policy, reference = (model.load_policy(base) for _ in range(2))
    critic = ppo.Critic.load(base, new=True)
    reference.requires_grad_(False)
    clock = time.perf_counter()
    history = train_ppo(policy, critic, reference, tokenizer, ppo.load_reward(reward, tokenizer), run, log)
    seconds = time.perf_counter() - clock
    r = evaluate.evaluate_world(policy, reference, tokenizer, seed=run.seed, n=n, part=part)
    return {k: r[k] for k in ("kl", "reward", "reward_ci95", "reward_ref", "malformed", "win_rate")} | {"optimum": r["optimum_at_same_kl"]["reward"], "seconds": seconds}, history, policy


if __name__ == "__main__":                # python tests/test_ppo.py BASE name=value ...: one run, its settings and result as a line of JSON
    torch.set_num_threads(1)
    kinds = {f: type(v) for f, v in vars(Run()).items()}
    given = dict(a.split("=") for a in sys.argv[2:])
    part, reward = given.pop("part", "tune"), given.pop("reward", "world")
    run = Run(**{k: kinds[k](v) for k, v in given.items()})
    every = lambda m: m["step"] % 10 == 0 and print({k: round(v, 3) for k, v in m.items() if v is not None}, file=sys.stderr, flush=True)
    print(json.dumps({"given": given, "part": part, **ppo_on_the_world(sys.argv[1], run, reward, every, part=part)[0]}), flush=True)

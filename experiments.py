"""The papers' claims as runs on a world whose optimum is known; every objective in one table.

    python experiments.py              every claim and its last verdict
    python experiments.py NAME ...     run claims (`all`: every one); runs that are there stay
    python experiments.py --quick      one short seed of every arm: does it all work?
    python experiments.py methods      every objective, 3 seeds; --table: only print the table
    python experiments.py objectives   the table of papers and ideas
    python experiments.py hero         the first page's picture: the main job, seed 0
    python experiments.py readme       paste all tables: docs/objectives.md, results/README.md

A claim is a function below: its words, its source, its arms, its pictures, its checks. An arm is
one command line of train.py; claims share arms, and results/runs.json has their numbers by seed.
A check compares arms seed by seed: equal seeds have equal base models, data and evaluation. Its
verdict follows from a 95 % t interval over seeds: `holds` if all of the interval says so, `does not
hold here` if all of it says the opposite, else `undecided`. A claim holds if all its checks do.
"exact" is a formula, not a run.

A model of 151,000 weights on a grammar cannot test anything about scale (that KTO catches up with
DPO at 13B, that large models need no SFT), about human or GPT-4 judges, about reasoning and code
benchmarks, nor learning rates in absolute terms.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")            # arms run side by side, each on one core

import numpy as np
import torch
from tqdm import tqdm

import recipes
import train
import world
from objective import signature
from plumbing import claim_plots, plots, rundir, tables
from plumbing.arms import COMMON, arm, on_the_way, run_arm, tuned
from plumbing.claim_plots import curves, plane
from plumbing.verdicts import (Runs, check, dpo_minimum, exact, first_gradients, judged, majority,
                               overall, spin_distances, table_of_replies)

RESULTS = Path(__file__).parent / "results"


# --- the claims -----------------------------------------------------------------------------------

CLAIMS = {}


class Claim(NamedTuple):
    says: str
    source: str
    arms: dict                       # label -> Arm
    panels: tuple                    # functions (ax, runs), or names of numbers: dots of them
    seeds: int
    checks: Callable                 # runs -> list of checks


def claim(says, source, arms={}, panels=(plane,), seeds=4):
    """Register the checks of a claim under their function's name."""
    def register(checks):
        CLAIMS[checks.__name__] = Claim(says, source, arms, panels, seeds, checks)
        return checks
    return register


BETAS, RATES = (0.1, 0.25, 0.5, 1.0, 2.0), (2e-4, 5e-4, 1e-3, 2e-3)
KTO_CURVE = {f"kto beta {beta:g}": arm("kto", beta=beta) for beta in BETAS}
DPO_CURVE = {f"dpo beta {beta:g}": arm("dpo", beta=beta) for beta in BETAS}
BETA_ARMS = KTO_CURVE | DPO_CURVE
KTO, DPO = BETA_ARMS["kto beta 0.5"], BETA_ARMS["dpo beta 0.5"]


def at_rate(loss, rate):
    """With beta 0.5; the common rate goes without saying."""
    if rate == COMMON["lr"]:
        return arm(loss, beta=0.5)
    return arm(loss, beta=0.5, lr=rate)


RATE_ARMS = {f"{loss} lr {rate:g}": at_rate(loss, rate)
             for loss in ("kto", "dpo") for rate in RATES}


@claim("KTO does at least as well as DPO, though it is not told which two replies form a pair",
       "Ethayarajh et al. 2024 (2402.01306), 4.1", BETA_ARMS | RATE_ARMS,
       [partial(curves, knob="beta"), partial(curves, knob="lr")])
def kto_and_dpo(runs):
    """Each at its best beta or learning rate, and both at beta 0.5, lr 5e-4. Allowed: 0.02 less."""
    kto, dpo = runs.best(runs.like("kto")), runs.best(runs.like("dpo"))
    return [
        runs.check(f"win rate, KTO's best arm ({kto}) - DPO's best ({dpo}) > -0.02",
                   "win_rate", kto, dpo, above=-0.02),
        runs.check("win rate, KTO - DPO > -0.02 at beta 0.5, lr 5e-4",
                   "win_rate", "kto beta 0.5", "dpo beta 0.5", above=-0.02)]


@claim("A larger beta keeps the policy nearer to the reference",
       "Rafailov et al. 2023 (2305.18290), Eq. 3; Ethayarajh et al. 2024, 4.3", BETA_ARMS,
       [partial(curves, knob="beta", key="kl")])
def beta(runs):
    """And KTO's own optimum hardly depends on it, where DPO's does."""
    checks = []
    for loss in ("kto", "dpo"):
        far, near = runs(f"{loss} beta 0.1", "kl"), runs(f"{loss} beta 2", "kl")
        checks.append(check(f"log KL of {loss.upper()} at beta 0.1 - at beta 2 > 0",
                            np.log(far) - np.log(near)))
    dpo = world.dpo_optimum(0.1).kl / world.dpo_optimum(2.0).kl
    kto = world.kto_optimum(0.1).kl / world.kto_optimum(2.0).kl
    return [*checks, exact("KL at beta 0.1 / KL at beta 2, at DPO's optimum over the same at KTO's "
                           "(10 times and more)", min(10, dpo / kto), 10, 1e-9)]


@claim("KTO wants a learning rate 2 to 10 times DPO's",
       "Ethayarajh et al. 2024's code and TRL's guide", RATE_ARMS, [partial(curves, knob="lr")])
def learning_rate(runs):
    """At equal weights KTO's gradient on the same pairs is exactly a quarter of DPO's.

    Adam does not see a scale; clipping at norm 1 does.
    """
    best = {}
    for loss in ("kto", "dpo"):
        win_rates = [runs(label, "win_rate") for label in runs.like(loss)]
        best[loss] = np.log2(np.array(RATES)[np.argmax(win_rates, 0)])
    return [check("log2(KTO's best rate / DPO's best rate) >= 1", best["kto"] - best["dpo"],
                  above=1 - 1e-9),
            exact("DPO's first gradient / KTO's", first_gradients(), 4, 1e-12)]


AUTO = {"lambda_d": "auto", "lambda_u": "auto"}
FEW = {"all": KTO}
for kind in ("desirable", "undesirable"):
    FEW[f"10 % {kind}, lambda 1"] = arm("kto", f"{kind} 0.1", beta=0.5)
    for ratio in (1.0, 4 / 3, 1.5):
        FEW[f"10 % {kind}, ratio {ratio:.3g}"] = arm(
            "kto", f"{kind} 0.1", beta=0.5, **AUTO, lambda_ratio=ratio)
for rate in (2e-4, 1e-3):
    few = {"on": "desirable 0.1", "beta": 0.5, "lr": rate}
    FEW[f"10 % desirable, lambda 1, lr {rate:g}"] = arm("kto", **few)
    FEW[f"10 % desirable, ratio 1.33, lr {rate:g}"] = arm("kto", **few, **AUTO)


@claim("KTO bears losing 90 % of either class, if the lambdas make up for it",
       "Ethayarajh et al. 2024, 4.2 and Eq. 9", FEW, ["win_rate"])
def imbalance(runs):
    """`ratio`: lambda_d n_d / (lambda_u n_u). Allowed: 0.05 less than with all 8,000 labels.

    By the exact optimum losing desirables would do no harm (kto_optimum with lambda_d = 0.1): what
    breaks is the optimisation, and how badly depends on the learning rate.
    """
    checks = []
    for kind in ("desirable", "undesirable"):
        tried = [label for label in runs.like(f"10 % {kind}, ratio") if "lr" not in label]
        best = runs.best(tried)
        ratio = best.split(", ")[1]
        checks += [runs.check(f"win rate, {best} - all labels > -0.05",
                              "win_rate", best, "all", above=-0.05),
                   runs.check(f"win rate with 10 % {kind}, {ratio} - lambda 1 > 0",
                              "win_rate", best, f"10 % {kind}, lambda 1")]
    return checks


@claim("DPO lowers the chosen answer too; DPOP and an SFT term cure it",
       "Pal et al. 2024 (2402.13228); Razin et al. 2024 (2410.08847)",
       {"DPO": DPO, "KTO": KTO, "DPOP": arm("dpop"), "APO-zero": arm("apo_zero", beta=0.5),
        "APO-down": arm("apo_down", beta=0.5), "DPO + SFT": arm("dpo + 1*sft", beta=0.5),
        "IPO": arm("ipo", tau=0.1), "SimPO": arm("simpo")}, ["d_chosen d_rejected"])
def displacement(runs):
    """Mean change of log pi over 400 held-out pairs, in nats per reply."""
    cures = [runs.check(f"{name}: change of log pi(chosen) - DPO's > 0", "d_chosen", name, "DPO")
             for name in ("DPOP", "DPO + SFT")]
    return [check("DPO: -(change of log pi(chosen)) > 0", -runs("DPO", "d_chosen")), *cures]


@claim("z0 can be set to 0 (after SFT)", "a source document of this project, and HALOs' own option",
       {"zero": KTO, "estimate": arm("kto", beta=0.5, z0="estimate"),
        "fixed 1.5": arm("kto", beta=0.5, z0=1.5),
        "on policy": arm("kto", beta=0.5, z0="on_policy")}, ["win_rate", plane])
def z0_zero(runs):
    """`estimate`: the paper's, from mismatched pairs; `on policy`: unbiased, from own samples."""
    checks = [check(f"win rate, z0 zero - {other}, within 0.03",
                    runs("zero", "win_rate") - runs(other, "win_rate"), above=-0.03, below=0.03)
              for other in ("estimate", "fixed 1.5", "on policy")]
    zero, fixed_point = world.kto_optimum(0.5, z0=0.0), world.kto_optimum(0.5, z0="exact")
    return [*checks, exact("win rate of KTO's optimum at beta 0.5, z0 = 0 less z0 = KL "
                           "(within 0.03)", zero.win_rate - fixed_point.win_rate, 0, 0.03)]


@claim("Mismatched pairs estimate z0 = KL(policy || reference)",
       "Ethayarajh et al. 2024, 3.2 (its estimate of z0)",
       {"zero": KTO, "on policy": arm("kto", beta=0.5, z0="on_policy"),
        "zero, no SFT": arm("kto", start="pretrain", beta=0.5)}, ["mismatched own kl"])
def z0_estimate(runs):
    """Both estimates at the end of a run. Not biased: less than a quarter of the KL off."""
    kl = runs("zero", "kl")
    return [check("mismatched mean / KL - 1, after KTO with z0 = 0, within 0.25",
                  runs("zero", "mismatched") / kl - 1, above=-0.25, below=0.25),
            check("own samples' mean / KL - 1, within 0.25",
                  runs("zero", "own") / kl - 1, above=-0.25, below=0.25)]


@claim("KTO needs no SFT before it", "Ethayarajh et al. 2024, 4.1 (of 13B and 30B models)",
       {"after SFT, z0 zero": KTO}
       | {f"no SFT, z0 {z0}": arm("kto", start="pretrain", beta=0.5, z0=z0)
          for z0 in ("zero", "estimate", 3.0, "on_policy")}, ["win_rate", "malformed"])
def no_sft(runs):
    """From the pretrained model, judged against the SFT model. Allowed: 0.05 less."""
    best = runs.best(runs.like("no SFT"))
    usual = "after SFT, z0 zero"
    return [runs.check("win rate without SFT (z0 estimated) - after SFT > -0.05",
                       "win_rate", "no SFT, z0 estimate", usual, above=-0.05),
            runs.check(f"win rate of the best without SFT ({best}) - after SFT > -0.05",
                       "win_rate", best, usual, above=-0.05)]


def flip_arm(loss, share):
    """rDPO and cDPO are told the share of flips; without flips they are DPO."""
    flags = {"tau": 0.1} if loss == "ipo" else {"beta": 0.5}
    on = f"flip {share:g}" if share else "pairs"
    if loss in ("rdpo", "cdpo"):
        if not share:
            return DPO
        flags["label_smoothing"] = share
    return arm(loss, on, **flags)


FLIP_ARMS = {f"{loss} {share:g}": flip_arm(loss, share)
             for loss in ("kto", "dpo", "cdpo", "rdpo", "ipo") for share in (0, 0.1, 0.2, 0.3, 0.4)}


def with_flips(runs, loss, name):
    """More wins than DPO, at 20 and at 40 % flips?"""
    return [runs.check(f"win rate, {name} - DPO > 0 at {share:.0%} flips",
                       "win_rate", f"{loss} {share:g}", f"dpo {share:g}") for share in (0.2, 0.4)]


@claim("rDPO bears flipped labels that DPO does not", "Chowdhury et al. 2024 (2403.00409)",
       FLIP_ARMS, [curves])
def noise_rdpo(runs):
    """rDPO is told the share of flips. cDPO, told the same, is beside it."""
    return with_flips(runs, "rdpo", "rDPO")


@claim("IPO bears noise better than DPO", "Azar et al. 2023 (2310.12036), 5", FLIP_ARMS, [curves])
def noise_ipo(runs):
    """IPO's margin has a fixed target, so it cannot overfit; that is not yet to do well."""
    return with_flips(runs, "ipo", "IPO")


@claim("KTO bears noisy labels better than DPO",
       "Ethayarajh et al. 2024, 4.4 (Theorem 4.2: it may ignore what is hard to learn)",
       FLIP_ARMS, [curves])
def noise_kto(runs):
    """Exact: flips below one half only scale c(y), so KTO's optimum stays. A run's does not."""
    flipped, clean = world.kto_optimum(0.5, flip=0.4), world.kto_optimum(0.5)
    return [*with_flips(runs, "kto", "KTO"),
            exact("utility of KTO's optimum with 40 % flips less without",
                  flipped.utility - clean.utility, 0, 1e-9)]


@claim("Of contradictory labels KTO's optimum follows the majority, where DPO's stops at its "
       "log-odds", "Ethayarajh et al. 2024, 4.4 (Theorem 4.3)", panels=[claim_plots.majorities],
       seeds=3)
def contradictory(runs):
    """Population losses of two replies, minimised; three random references."""
    found = [majority(seed) for seed in range(3)]
    return [exact("largest pi(b) at KTO's minimum, wherever a has a majority",
                  max(kto.max() for kto, _, _ in found), 0, 1e-3),
            exact("DPO's beta h - logit(p), largest",
                  max(abs(gap).max() for _, _, gap in found), 0, 1e-5)]


@claim("TDPO2 spends less KL than DPO for the same reward", "Zeng et al. 2024 (2404.11999), 5",
       DPO_CURVE | {f"tdpo1 beta {beta:g}": arm("tdpo1", beta=beta) for beta in (0.5, 1.0, 2.0)}
       | {f"tdpo2 beta {beta:g}": arm("tdpo2", beta=beta) for beta in (0.05, 0.1, 0.5, 1.0)})
def tdpo(runs):
    """Reward above DPO's curve over beta, at the same KL, seed by seed."""
    return [check(f"reward of TDPO2 (beta {beta}) - DPO's curve at the same KL > 0",
                  runs.above_curve(f"tdpo2 beta {beta}", list(DPO_CURVE)))
            for beta in (0.1, 0.5)]


@claim("SPIN goes on improving where SFT on the same data ends",
       "Chen et al. 2024 (2401.01335), 6",
       {"SPIN, lambda 1": arm("spin", "expert", beta=1.0, stages=4, steps=40),
        "SPIN, lambda 0.1": arm("spin", "expert", beta=0.1, stages=4, steps=40),
        "SFT, 40 steps": arm("sft", "expert", steps=40, lr=1e-3, batch_size=16),
        "SFT, 160 steps": arm("sft", "expert", steps=160, lr=1e-3, batch_size=16)},
       ["reward", plane])
def spin(runs):
    """1,500 replies of an expert. At its optimum a step of SPIN is p' ~ p^(1 - 1/lambda)
    p_data^(1/lambda): it converges for lambda > 1/2 and runs away below, the paper's 0.1 included;
    short training hides it.
    """
    first = [run["stages"][0]["reward"] for run in runs.of("SPIN, lambda 1")]
    distance = spin_distances(0.4, 6)
    return [check("reward, SPIN after 4 iterations - after the first > 0",
                  runs("SPIN, lambda 1", "reward") - first),
            runs.check("reward, SPIN after 4 iterations - SFT with as many steps > 0",
                       "reward", "SPIN, lambda 1", "SFT, 160 steps"),
            exact("growth of the distance to the data in an exact iteration at lambda 0.4 (1.5: it "
                  "runs away)", (distance[-1] / distance[0]) ** (1 / 6), 1.5, 1e-9)]


@claim("Stepwise DPO, easy pairs first, beats DPO on all of them at once",
       "Kim et al. 2024 (2403.19270), 4",
       {"DPO": BETA_ARMS["dpo beta 1"], "DPO, beta / 2": DPO,
        "sDPO, 2 stages": arm("sdpo_stepwise", beta=1.0, steps=75, stages=2)})
def stepwise(runs):
    """Exact: two optimal steps of beta are one of beta / 2: what sDPO adds is a weaker leash."""
    ref, utility = table_of_replies(0)
    better = torch.sigmoid(utility[:, None] - utility)              # P(row beats column)
    twice = dpo_minimum(dpo_minimum(ref, better, beta=1.0), better, beta=1.0)
    once = dpo_minimum(ref, better, beta=0.5)
    return [runs.check("win rate, sDPO (beta 1, 2 x 75 steps) - DPO (beta 1, 150 steps) > 0",
                       "win_rate", "sDPO, 2 stages", "DPO"),
            check("reward of sDPO - the line from the reference over DPO's beta 1 to beta 1/2, at "
                  "the same KL > 0", runs.above_curve("sDPO, 2 stages", ["DPO", "DPO, beta / 2"])),
            exact("two optimal steps of beta 1 less one of beta 1/2, largest log-probability apart",
                  (twice - once).abs().max(), 0, 1e-4)]


DRIFT_ARMS = DPO_CURVE | {
    "SimPO": arm("simpo"), "SimPO, beta 2": arm("simpo", beta=2.0), "ORPO": arm("orpo"),
    "CPO": arm("cpo"), "DPO without reference": arm("dpo_reference_free", beta=0.5)}


def cost_of_drift(runs, name):
    """Reward below DPO's curve over beta at the same KL: what the missing reference costs."""
    return [check(f"reward of DPO's curve at the same KL - {name}'s > 0",
                  -runs.above_curve(name, list(DPO_CURVE)))]


@claim("Without a reference SimPO drifts: it pays more KL for the same reward",
       "source documents, on Meng et al. 2024 (2405.14734)", DRIFT_ARMS)
def drift_simpo(runs):
    return cost_of_drift(runs, "SimPO")


@claim("Without a reference ORPO drifts", "source documents, on Hong et al. 2024 (2403.07691)",
       DRIFT_ARMS)
def drift_orpo(runs):
    return cost_of_drift(runs, "ORPO")


@claim("Without a reference CPO drifts", "source documents, on Xu et al. 2024 (2401.08417)",
       DRIFT_ARMS)
def drift_cpo(runs):
    return cost_of_drift(runs, "CPO")


@claim("DPO exploits an annotator who likes length; counting per token cures it",
       "Meng et al. 2024 (2405.14734), 4.2; Liu et al. 2024 (2409.06411)",
       {"DPO, fair annotator": DPO, "DPO": arm("dpo", "likes length", beta=0.5),
        "KTO": arm("kto", "likes length", beta=0.5),
        "DPO per token": arm("sigmoid_norm", "likes length"),
        "LD-DPO": arm("ld_dpo", "likes length", beta=0.5),
        "SimPO": arm("simpo", "likes length")}, ["length", "right"])
def length(runs):
    """It gives 0.12 points for each word above 16; true utility knows nothing of it."""
    return [runs.check("tokens, DPO with this annotator - with the fair one > 0",
                       "length", "DPO", "DPO, fair annotator"),
            runs.check("tokens, DPO - DPO per token > 0", "length", "DPO", "DPO per token"),
            runs.check("reward, DPO per token - DPO > 0", "reward", "DPO per token", "DPO")]


@claim("Rejected answers that the policy would never write teach it little; its own teach it most",
       "Tajwar et al. 2024 (2404.14367); D'Oosterlinck et al. 2024 (2408.06266)",
       {f"{loss.upper()}, {on}": arm(loss, on, beta=0.5) for loss in ("dpo", "kto")
        for on in ("pairs", "own replies", "never said")}, ["reward", "malformed"])
def off_policy(runs):
    """`pairs`: from the grammar of the reference's texts; `never said`: shuffled words."""
    checks = []
    for loss in ("DPO", "KTO"):
        checks += [runs.check(f"reward, {loss} on pairs - on replies never said > 0",
                              "reward", f"{loss}, pairs", f"{loss}, never said"),
                   runs.check(f"reward, {loss} on the model's own - on pairs > 0",
                              "reward", f"{loss}, own replies", f"{loss}, pairs")]
    return checks


@claim("KTO with a uniform reference saves the reference model and loses little",
       "Ethayarajh et al. 2024, its memory-saving form",
       {"KTO": KTO, "KTO, uniform reference": arm("kto_uniform", lr=3e-4)})
def uniform(runs):
    """Allowed: 0.03 less."""
    return [runs.check("win rate, uniform - KTO > -0.03",
                       "win_rate", "KTO, uniform reference", "KTO", above=-0.03)]


@claim("KTO learns as well from thumbs that never were pairs",
       "Ethayarajh et al. 2024, 4.2 (one reply per prompt)",
       {"pairs taken apart": KTO, "native thumbs": arm("kto", "native", beta=0.5)})
def native(runs):
    """A thumb up with probability sigmoid(utility), as many labels. Allowed: 0.03 less."""
    return [runs.check("win rate, native - pairs > -0.03",
                       "win_rate", "native thumbs", "pairs taken apart", above=-0.03)]


def ppo(kl_coef, steps, **flags):
    """PPO against a reward model that has learnt from the 8,000 pairs."""
    return arm("ppo", "world", reward="rm", kl_coef=kl_coef, steps=steps, **flags)


KL_COEFS = {"kl_coef 0.05": ppo(0.05, 160, eval_every=8), "kl_coef 0.1": ppo(0.1, 40),
            "kl_coef 0.3": ppo(0.3, 40), "kl_coef 1": arm("ppo", "world", reward="rm")}


@claim("PPO gets more out of the same preferences than DPO and KTO",
       "Xu et al. 2024 (2404.10719), Ivison et al. 2024 (2406.09279)",
       {"KTO, 400 steps": arm("kto", "world"), "DPO, 400 steps": arm("dpo", "world"),
        "offline PPO, 400 steps": arm("offline_ppo", "world"), "PPO, 16 steps": ppo(0.1, 16),
        "KTO, 1600 steps": arm("kto", "world", steps=1600),
        "DPO, 1600 steps": arm("dpo", "world", steps=1600),
        "PPO, 40 steps, kl_coef 0.1": KL_COEFS["kl_coef 0.1"],
        "PPO, 40 steps, kl_coef 0.3": KL_COEFS["kl_coef 0.3"],
        "PPO, 80 steps, kl_coef 1": KL_COEFS["kl_coef 1"]},
       [plane, "win_rate", "align_cpu"], seeds=3)
def ppo_dpo_kto(runs):
    """8,000 pairs each; PPO's reward model learns from them first, for about 50 CPU s more.

    Compared where alignment takes about as many CPU seconds: 40 steps of PPO with 1600 of the
    others, 16 with 400.
    """
    best = runs.best(runs.like("PPO, 40"))
    checks = []
    for mine, steps in ((best, 1600), ("PPO, 16 steps", 400)):
        for theirs in (f"DPO, {steps} steps", f"KTO, {steps} steps"):
            checks.append(runs.check(f"win rate, {mine} - {theirs} > 0", "win_rate", mine, theirs))
    return checks


@claim("Against a learnt reward true reward rises and then falls", "Gao et al. 2023 (2210.10760)",
       KL_COEFS, seeds=3)
def overoptimisation(runs):
    """Ends of runs on the reporting questions; one also on its way, on the tuning questions."""
    best = runs.best(list(runs.arms), "reward")
    return [runs.check(f"true reward rises: {best} - kl_coef 1 > 0", "reward", best, "kl_coef 1"),
            runs.check(f"... and falls: {best} - kl_coef 0.05 > 0", "reward", best, "kl_coef 0.05")]


def knob_arms():
    """Every objective with its tuned settings, and with a quarter and four times its main knob."""
    short = {"sdpo_stepwise": {"steps": 75}, "tr_dpo": {"ref_every": 40}}
    arms = {}
    for name in tables.NAMES:
        recipe = recipes.find(name)
        used = signature(recipe.loss)[1]
        knobs = [knob for knob in ("beta", "tau", "lam") if knob in used]
        if knobs and not recipe.feedback:                # it learns from pairs or from thumbs
            middle = (used | tuned(name))[knobs[0]]
            for value in (0.25 * middle, middle, 4 * middle):
                flags = {knobs[0]: value} | short.get(name, {})
                arms[f"{name} {knobs[0]} {value:g}"] = arm(name, **flags)
    return arms


@claim("No objective earns more than the exact frontier allows for its KL",
       "the closed form: Rafailov et al. 2023, Eq. 4, on this world's 135 classes of replies",
       knob_arms(), seeds=1)
def exact_frontier(runs):
    """One seed. Allowed: the upper half of the run's own 95 % interval of the reward."""
    ends = [run for label in runs.arms for run in runs.of(label) if "kl" in run]
    worst = max(run["reward_ci95"][0] - run["best"] for run in ends)
    return [judged(f"largest (lower end of a run's reward - frontier at its KL), {len(ends)} runs, "
                   "<= 0", (worst, worst, worst), below=0)]


# --- running claims -------------------------------------------------------------------------------

def make_runs(names, seeds, out, path, processes, quick):
    """Every run of these claims that `path` lacks, `processes` at a time, saved one by one."""
    store = json.loads(path.read_text()) if path.exists() else {}
    commit = rundir.commit()
    jobs = set()
    for name in names:
        for arm in CLAIMS[name].arms.values():
            jobs |= {(arm, seed) for seed in range(seeds or CLAIMS[name].seeds)
                     if str(seed) not in store.get(arm.key, {})}
    order = sorted(jobs, key=lambda job: (job[0].on != "world", job[0].key, job[1]))   # PPO first
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool, tqdm(total=len(jobs), unit="run") as bar:
        running = {pool.submit(run_arm, arm, seed, out, quick): (arm, seed) for arm, seed in order}
        for done in as_completed(running):
            arm, seed = running[done]
            try:
                found = done.result()
            except Exception as error:                   # one arm's fault is not the others'
                found = {"seed": seed, "failed": f"{type(error).__name__}: {error}"}
            if "failed" in found:
                tqdm.write(f"{arm.key}, seed {seed}: {found['failed']}")
            store.setdefault(arm.key, {})[str(seed)] = found | {"commit": commit}
            in_order = {key: dict(sorted(store[key].items())) for key in sorted(store)}
            path.parent.mkdir(parents=True, exist_ok=True)
            rundir.write(path, json.dumps(in_order, indent=1) + "\n")
            bar.update()
    return store


def judge(name, store, seeds, folder, quick):
    """The claim's checks, verdict and picture: folder/NAME.json and .png.   -> the JSON"""
    claim = CLAIMS[name]
    clock = time.process_time()
    runs = Runs(claim.arms, store, seeds or claim.seeds)
    checks = claim.checks(runs)
    folder.mkdir(parents=True, exist_ok=True)
    claim_plots.draw(claim, runs, folder / f"{name}.png")
    verdict = overall(checks)
    if quick:
        verdict = "undecided (quick)"
    used = [run for label in runs.arms for run in runs.of(label)]
    cpu = sum(run.get("cpu", 0) for run in used) + time.process_time() - clock
    found = {
        "claim": claim.says, "source": claim.source, "verdict": verdict, "checks": checks,
        "seeds": runs.seeds, "runs": len(used), "failed": sum("failed" in run for run in used),
        "arms": {label: arm.key for label, arm in runs.arms.items()},
        "cpu_seconds": round(cpu), "date": time.strftime("%Y-%m-%d"),
        "commits": sorted({short(run["commit"]) for run in used if run.get("commit")})}
    rundir.write(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    return found


def short(commit):
    """Its first ten digits, and "-dirty" where the tree had changes."""
    digits, dash, dirty = commit.partition("-")
    return digits[:10] + dash + dirty


def say(name, found):
    print(f"\n{name}: {found['claim']}\n  source: {found['source']}\n  verdict: {found['verdict']}"
          f"   ({found['runs']} runs, {found['cpu_seconds']} CPU s)")
    for check in found["checks"]:
        print(f"  {check['verdict']:<19}{check['says']}: {tables.number(check)}")


def run_claims(args):
    names = args.names
    if not names or "all" in names:
        names = list(CLAIMS)
    results = RESULTS
    if args.quick:
        results = args.out = Path("out/quick")
        args.seeds = 1
    store = make_runs(names, args.seeds, Path(args.out).absolute(), results / "runs.json",
                      args.processes, args.quick)
    for name in names:
        say(name, judge(name, store, args.seeds, results / "claims", args.quick))


def hero():
    """results/main_job.png: the main job, looked at on its way."""
    folder = Path("out/hero")
    train.main(["--loss", "kto", "--eval_every", "20", "--out", str(folder), "--overwrite"])
    found = json.loads((folder / "eval.json").read_text())
    plots.plot_path(on_the_way(folder / "metrics.jsonl"), found, RESULTS / "main_job.png")


def main(argv):
    known = ("all", "methods", "objectives", "readme", "hero", *CLAIMS)
    parser = argparse.ArgumentParser(prog="experiments.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("names", nargs="*", metavar="NAME", help=", ".join(known))
    flag("--quick", action="store_true", help="one short seed of every arm, in out/quick")
    flag("--seeds", type=int, help="per arm [4; PPO and methods 3]")
    flag("--processes", type=int, default=os.cpu_count() or 2, help="arms that run at once [cores]")
    flag("--out", default="out/experiments", help="where the runs go [%(default)s]")
    flag("--losses", nargs="*", default=[], help="of methods: which [all]")
    flag("--table", action="store_true", help="of methods: only print what is there")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in known:
            raise SystemExit(f"{name}: no such experiment; valid are {', '.join(known)}")
    for name in ("seeds", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name}: must be at least 1")
    if "hero" in args.names:
        hero()
    elif "readme" in args.names:
        tables.refresh(CLAIMS)
    elif "objectives" in args.names:
        print(tables.objectives())
    elif "methods" in args.names:
        if not args.table:
            tables.run_methods(args.losses or tables.NAMES, args.seeds or 3)
        print(tables.methods())
    elif args.names or args.quick:
        run_claims(args)
    else:
        print(tables.claims(CLAIMS))


if __name__ == "__main__":
    main(sys.argv[1:])

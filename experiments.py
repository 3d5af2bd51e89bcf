"""The papers' claims as runs on a world whose optimum is known.

    python experiments.py                 every claim and its verdict
    python experiments.py NAME ...        make the runs that a claim lacks, then judge it (`all`)
    python experiments.py judge           judge all stored runs again: pictures, tables, verdicts
    python experiments.py --dry_run       how many runs are missing or stale, and their CPU time
    python experiments.py all --refresh   make the runs again whose code has changed since
    python experiments.py --quick         one short seed of every arm: it tests the machinery only
    python experiments.py hero            the first page's picture: the main job, seed 0

A claim is a function below: its words, its source, its arms, its pictures, its checks. An arm is
one command line of train.py; claims share arms. results/runs.jsonl has every run, so a stopped
command goes on where it was. A check compares arms seed by seed: equal seeds have equal base
models, data and evaluation. Its verdict follows from a 95 % t interval over seeds; a claim of
several parts has a verdict for each (plumbing/verdicts.py). "exact" is a formula, not a run.

The endpoint is the true utility per reply, on 2,400 replies to the reporting questions. Wherever an
arm is chosen among several, it is chosen on the tuning questions.

A model of 151,000 weights on a grammar cannot test anything about scale (that KTO catches up with
DPO at 13B, that large models need no SFT), about human or GPT-4 judges, about reasoning and code
benchmarks, nor learning rates in absolute terms.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")            # arms run side by side, each on one core

import numpy as np
import torch

import train
import world
from plumbing import claim_plots, methods, plots, rundir, store, tables
from plumbing.arms import COMMON, arm
from plumbing.claim_plots import curves, plane
from plumbing.claims import (AUTO, BETA_ARMS, CLAIMS, DPO, DPO_CURVE, KTO, LEASH, MATTERS, claim)
from plumbing.minima import (dpo_minimum, first_gradients, majority, spin_distances,
                             table_of_replies)
from plumbing.verdicts import Runs, by_chance, check, exact, judged, overall

RESULTS = Path(__file__).parent / "results"
RATES = (2e-4, 5e-4, 1e-3, 2e-3)


# --- the papers' claims about offline objectives --------------------------------------------------

def at_rate(loss, rate):
    """With beta 0.5; the common rate goes without saying."""
    if rate == COMMON["lr"]:
        return arm(loss, beta=0.5)
    return arm(loss, beta=0.5, lr=rate)


RATE_ARMS = {f"{loss} lr {rate:g}": at_rate(loss, rate)
             for loss in ("kto", "dpo") for rate in RATES}


@claim("KTO does at least as well as DPO, though it is not told which two replies form a pair",
       "Ethayarajh et al. 2024 (2402.01306), 4.1", BETA_ARMS, [plane, partial(curves, knob="beta")])
def kto_and_dpo(runs):
    """At beta 0.5; each at its best beta; and at equal KL on their curves over beta."""
    kto, dpo = runs.like("kto"), runs.like("dpo")
    best, best_dpo = runs.best(kto), runs.best(dpo)
    return [runs.check(f"utility, KTO - DPO > -{MATTERS} at beta 0.5",
                       "kto beta 0.5", "dpo beta 0.5", above=-MATTERS),
            runs.check(f"... > -{MATTERS}, each at its best beta ({best[9:]}, {best_dpo[9:]})",
                       best, best_dpo, above=-MATTERS),
            check(f"... > -{MATTERS} at {LEASH} nats, on the curves over beta",
                  runs.at_kl(kto, LEASH) - runs.at_kl(dpo, LEASH), above=-MATTERS)]


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
    """Where a parabola through utility over log2(rate) has its top, within the rates tried.

    At equal weights KTO's gradient on the same pairs is exactly a quarter of DPO's. Adam does not
    see a scale; clipping at norm 1 does.
    """
    tops = {}
    for loss in ("kto", "dpo"):
        utilities = np.array([runs(label, "reward") for label in runs.like(loss)])
        tops[loss] = np.array([top_of(np.log2(RATES), column) for column in utilities.T])
    return [check("log2(KTO's best rate / DPO's best rate) > 1", tops["kto"] - tops["dpo"],
                  above=1),
            exact("DPO's first gradient / KTO's", first_gradients(), 4, 1e-12)]


def top_of(x, y):
    """The x of a fitted parabola's top, within the range of x."""
    a, b, _ = np.polyfit(x, y, 2)
    if a >= 0:                                           # it has no top: the better end
        return x[np.argmax(y)]
    return float(np.clip(-b / (2 * a), min(x), max(x)))


FEW = {"all": KTO}
for kind in ("desirable", "undesirable"):
    FEW[f"10 % {kind}, lambda 1"] = arm("kto", f"{kind} 0.1", beta=0.5)
    for ratio in (1.0, 4 / 3):
        FEW[f"10 % {kind}, ratio {ratio:.3g}"] = arm(
            "kto", f"{kind} 0.1", beta=0.5, **AUTO, lambda_ratio=ratio)
FEW["10 % desirable, ratio 1.33, lr 0.0002"] = arm(
    "kto", "desirable 0.1", beta=0.5, lr=2e-4, **AUTO, lambda_ratio=4 / 3)


@claim("KTO bears losing 90 % of either class, if the lambdas make up for it",
       "Ethayarajh et al. 2024, 4.2 and Eq. 9", FEW, ["reward", "malformed"])
def imbalance(runs):
    """`ratio`: lambda_d n_d / (lambda_u n_u).

    By the exact optimum losing desirables would do no harm (kto_optimum with lambda_d = 0.1): what
    breaks is the optimisation, and how badly depends on the learning rate.
    """
    checks = []
    for kind in ("desirable", "undesirable"):
        best = runs.best(runs.like(f"10 % {kind}, ratio"))
        how = best.split(", ", 1)[1]
        checks += [runs.check(f"utility with 10 % {kind} ({how}) - all labels > -0.3",
                              best, "all", above=-0.3),
                   runs.check(f"utility with 10 % {kind}, {how} - lambda 1 > 0",
                              best, f"10 % {kind}, lambda 1")]
    return checks


@claim("DPO lowers the chosen answer too; DPOP and an SFT term cure it",
       "Pal et al. 2024 (2402.13228); Razin et al. 2024 (2410.08847)",
       {"DPO": DPO, "KTO": KTO, "DPOP": arm("dpop"), "APO-zero": arm("apo_zero", beta=0.5),
        "APO-down": arm("apo_down", beta=0.5), "DPO + SFT": arm("dpo + 1*sft", beta=0.5),
        "IPO": arm("ipo", tau=0.1), "SimPO": arm("simpo")}, ["d_chosen d_rejected"])
def displacement(runs):
    """Mean change of log pi over 400 held-out pairs, nats per reply. Cured: it falls no more."""
    checks = [check("DPO: log pi(chosen) falls", -runs("DPO", "d_chosen"))]
    for name in ("DPOP", "DPO + SFT"):
        checks += [runs.check(f"{name} lessens it", name, "DPO", key="d_chosen"),
                   check(f"{name} cures it: change of log pi(chosen) > 0", runs(name, "d_chosen"))]
    return checks


@claim("z0 can be set to 0 (after SFT)", "HALOs' own option",
       {"zero": KTO, "estimate": arm("kto", beta=0.5, z0="estimate"),
        "fixed 1.5": arm("kto", beta=0.5, z0=1.5),
        "on policy": arm("kto", beta=0.5, z0="on_policy")}, ["reward", plane])
def z0_zero(runs):
    """`estimate`: the paper's, from mismatched pairs; `on policy`: unbiased, from own samples."""
    checks = [runs.check(f"utility, z0 zero - {other}, within {MATTERS}", "zero", other,
                         above=-MATTERS, below=MATTERS)
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
          for z0 in ("zero", "estimate", "on_policy")}, ["reward", "malformed"])
def no_sft(runs):
    """From the pretrained model, judged against the SFT model."""
    best = runs.best(runs.like("no SFT"))
    usual = "after SFT, z0 zero"
    return [runs.check(f"utility without SFT (z0 estimated) - after SFT > -{MATTERS}",
                       "no SFT, z0 estimate", usual, above=-MATTERS),
            runs.check(f"utility of the best without SFT ({best}) - after SFT > -{MATTERS}",
                       best, usual, above=-MATTERS)]


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
             for loss in ("kto", "dpo", "cdpo", "rdpo", "ipo") for share in (0, 0.2, 0.4)}


@claim("KTO, rDPO and IPO bear flipped labels better than DPO",
       "Ethayarajh et al. 2024, 4.4 (Theorem 4.2); Chowdhury et al. 2024 (2403.00409); Azar et al. "
       "2023 (2310.12036), 5", FLIP_ARMS, [curves, partial(curves, key="kl")])
def noise(runs):
    """rDPO is told the share of flips; cDPO, told the same, is beside it.

    Exact: flips below one half only scale c(y), so KTO's optimum stays. A run's does not.
    """
    checks = [runs.check(f"utility, {name} - DPO > 0 at {share:.0%} flips",
                         f"{name.lower()} {share:g}", f"dpo {share:g}")
              for name in ("KTO", "rDPO", "IPO") for share in (0.2, 0.4)]
    flipped, clean = world.kto_optimum(0.5, flip=0.4), world.kto_optimum(0.5)
    return [*checks, exact("utility of KTO's optimum with 40 % flips less without",
                           flipped.utility - clean.utility, 0, 1e-9)]


@claim("Of contradictory labels KTO's optimum follows the majority, where DPO's stops at its "
       "log-odds", "Ethayarajh et al. 2024, 4.4 (Theorem 4.3)", panels=[claim_plots.majorities])
def contradictory(runs):
    """Population losses of two replies, minimised; three random references."""
    found = [majority(seed) for seed in range(3)]
    return [exact("largest pi(b) at KTO's minimum, wherever a has a majority",
                  max(kto.max() for kto, _, _ in found), 0, 1e-3),
            exact("DPO's beta h - logit(p), largest",
                  max(abs(gap).max() for _, _, gap in found), 0, 1e-5)]


@claim("TDPO2 spends less KL than DPO for the same reward", "Zeng et al. 2024 (2404.11999), 5",
       DPO_CURVE | {f"tdpo2 beta {beta:g}": arm("tdpo2", beta=beta) for beta in (0.1, 0.5)})
def tdpo(runs):
    """Utility above DPO's curve over beta, at the same KL, seed by seed."""
    return [check(f"utility of TDPO2 (beta {beta}) - DPO's curve at the same KL > 0",
                  runs.above_curve(f"tdpo2 beta {beta}", list(DPO_CURVE)))
            for beta in (0.1, 0.5)]


@claim("SPIN goes on improving where SFT on the same data ends",
       "Chen et al. 2024 (2401.01335), 6",
       {"SPIN, lambda 1": arm("spin", "expert", beta=1.0, stages=4, steps=40),
        "SPIN, lambda 0.1": arm("spin", "expert", beta=0.1, stages=4, steps=40),
        "SFT, 40 steps": arm("sft", "expert", steps=40, lr=1e-3, batch_size=16),
        "SFT, 160 steps": arm("sft", "expert", steps=160, lr=1e-3, batch_size=16)},
       ["reward", plane], seeds=8)
def spin(runs):
    """1,500 replies of an expert. At its optimum a step of SPIN is p' ~ p^(1 - 1/lambda)
    p_data^(1/lambda): it converges for lambda > 1/2 and runs away below, the paper's 0.1 included;
    short training hides it.
    """
    first = [run["stages"][0] for run in runs.of("SPIN, lambda 1")]
    distance = spin_distances(0.4, 6)
    return [check("utility, SPIN after 4 iterations - after the first > 0",
                  runs("SPIN, lambda 1", "tune reward") - first),
            runs.check("utility, SPIN after 4 iterations - SFT with as many steps > 0",
                       "SPIN, lambda 1", "SFT, 160 steps"),
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
    return [runs.check("utility, sDPO (beta 1, 2 x 75 steps) - DPO (beta 1, 150 steps) > 0",
                       "sDPO, 2 stages", "DPO"),
            check("utility of sDPO - the line from the reference over DPO's beta 1 to beta 1/2, at "
                  "the same KL > 0", runs.above_curve("sDPO, 2 stages", ["DPO", "DPO, beta / 2"])),
            exact("two optimal steps of beta 1 less one of beta 1/2, largest log-probability apart",
                  (twice - once).abs().max(), 0, 1e-4)]


@claim("Without a reference SimPO, ORPO and CPO drift: they pay more KL for the same reward",
       "often said of Meng et al. 2024 (2405.14734), Hong et al. 2024 (2403.07691), Xu et al. 2024 "
       "(2401.08417)",
       DPO_CURVE | {"SimPO": arm("simpo"), "ORPO": arm("orpo"), "CPO": arm("cpo"),
                    "DPO without reference": arm("dpo_reference_free", beta=0.5)})
def drift(runs):
    """Utility below DPO's curve over beta at the same KL: what the missing reference costs."""
    return [check(f"utility of DPO's curve at the same KL - {name}'s > 0",
                  -runs.above_curve(name, list(DPO_CURVE))) for name in ("SimPO", "ORPO", "CPO")]


@claim("DPO exploits an annotator who likes length; counting per token cures it",
       "Meng et al. 2024 (2405.14734), 4.2; Liu et al. 2024 (2409.06411)",
       {"DPO, fair annotator": DPO, "DPO": arm("dpo", "likes length", beta=0.5),
        "KTO": arm("kto", "likes length", beta=0.5),
        "DPO per token": arm("sigmoid_norm", "likes length"),
        "LD-DPO": arm("ld_dpo", "likes length", beta=0.5),
        "SimPO": arm("simpo", "likes length")}, ["length", "reward"])
def length(runs):
    """It gives 0.12 points for each word above 16; true utility knows nothing of it.

    Cured: replies are no longer than with the fair annotator, give or take a token.
    """
    tokens = {"key": "length"}
    return [runs.check("tokens, DPO with this annotator - with the fair one > 0",
                       "DPO", "DPO, fair annotator", **tokens),
            runs.check("DPO per token lessens it: tokens, DPO - DPO per token > 0",
                       "DPO", "DPO per token", **tokens),
            runs.check("... and cures it: tokens, DPO per token - fair DPO < 1",
                       "DPO per token", "DPO, fair annotator", above=-np.inf, below=1, **tokens),
            runs.check("... at no cost: utility, DPO per token - DPO > 0", "DPO per token", "DPO")]


@claim("Rejected answers that the policy would never write teach it little; its own teach it most",
       "Tajwar et al. 2024 (2404.14367); D'Oosterlinck et al. 2024 (2408.06266)",
       {f"{loss.upper()}, {on}": arm(loss, on, beta=0.5) for loss in ("dpo", "kto")
        for on in ("pairs", "own replies", "never said")}, ["reward", "malformed"])
def off_policy(runs):
    """`pairs`: from the grammar of the reference's texts; `never said`: shuffled words."""
    checks = []
    for loss in ("DPO", "KTO"):
        checks += [runs.check(f"utility, {loss} on pairs - on replies never said > 0",
                              f"{loss}, pairs", f"{loss}, never said"),
                   runs.check(f"utility, {loss} on the model's own - on pairs > 0",
                              f"{loss}, own replies", f"{loss}, pairs")]
    return checks


@claim("KTO with a uniform reference saves the reference model and loses little",
       "Ethayarajh et al. 2024, its memory-saving form",
       {"KTO": KTO, "KTO, uniform reference": arm("kto_uniform", lr=3e-4)})
def uniform(runs):
    return [runs.check(f"utility, uniform - KTO > -{MATTERS}",
                       "KTO, uniform reference", "KTO", above=-MATTERS)]


@claim("KTO learns as well from thumbs that never were pairs",
       "Ethayarajh et al. 2024, 4.2 (one reply per prompt)",
       {"pairs taken apart": KTO, "native thumbs": arm("kto", "native", beta=0.5)})
def native(runs):
    """A thumb up with probability sigmoid(utility), as many labels."""
    return [runs.check(f"utility, native - pairs > -{MATTERS}",
                       "native thumbs", "pairs taken apart", above=-MATTERS)]


@claim("No objective earns more than the exact frontier allows for its KL",
       "the closed form: Rafailov et al. 2023, Eq. 4, on this world's 135 classes of replies",
       panels=[claim_plots.everything])
def exact_frontier(runs):
    """Of all runs of all claims. Allowed: the upper half of the run's own 95 % interval."""
    ends = [run for seeds in runs.store.values() for run in seeds.values() if "kl" in run]
    worst = max(run["reward_low"] - run["best"] for run in ends)
    return [judged("largest (lower end of a run's utility - frontier at its KL), all runs, <= 0",
                   (worst, worst, worst), below=0)]


# Further claims register themselves: on data and settings, and on who writes the responses.
from plumbing import claims_data, claims_online  # noqa: E402, F401


# --- running and judging --------------------------------------------------------------------------

def seeds_of_arms(names, seeds=None):
    """{arm: how many seeds the claims that use it ask for}"""
    wanted = {}
    for name in names:
        for arm in CLAIMS[name].arms.values():
            wanted[arm] = max(wanted.get(arm, 0), seeds or CLAIMS[name].seeds)
    return wanted


def judge(names, stored, folder, quick=False):
    """Checks, verdicts and pictures: folder/NAME.png.   -> {name: what was found}"""
    found = {}
    for name in names:
        claim = CLAIMS[name]
        runs = Runs(claim.arms, stored, claim.seeds)
        if claim.arms and not runs.seeds:
            continue                                     # nothing was run yet
        checks = claim.checks(runs)
        verdict = "undecided (quick)" if quick else overall(checks)
        folder.mkdir(parents=True, exist_ok=True)
        claim_plots.draw(claim, runs, verdict, folder / f"{name}.png")
        used = [run for label in runs.arms for run in runs.of(label)]
        found[name] = {"verdict": verdict, "checks": checks, "seeds": runs.seeds,
                       "asked": claim.seeds, "runs": len(used),
                       "breakdowns": runs.breakdowns(),
                       "cpu_seconds": round(sum(run.get("cpu", 0) for run in used))}
    return found


def run_claims(args):
    results, out = RESULTS, Path(args.out).absolute()
    if args.quick:
        results = out = Path("out/quick").absolute()
        args.seeds = 1
    path = results / "runs.jsonl"
    stored = store.read(path)
    wanted = seeds_of_arms(args.names, args.seeds)
    jobs = store.missing(list(wanted), wanted, stored, args.refresh)
    if args.dry_run:
        return say_cost(jobs, stored)
    store.make(jobs, out, args.processes, path, args.quick)
    say(judge(args.names, store.read(path), results / "claims", args.quick))


def say_cost(jobs, stored):
    """How many runs, and their time by the runs that are there."""
    runs = [run for seeds in stored.values() for run in seeds.values() if "cpu" in run]
    online = [run["cpu"] for run in runs if run["path"]] or [45]
    offline = [run["cpu"] for run in runs if not run["path"]] or [10]
    seconds = sum(np.mean(online if "reward" in dict(arm.flags) else offline) for arm, _ in jobs)
    stale = sum(map(store.is_stale, runs))
    print(f"{len(jobs)} runs are missing, about {seconds / 60:.0f} CPU minutes; {len(runs)} are "
          f"there, {stale} of them stale (their code has changed since: --refresh)")


def say(found):
    for name, one in found.items():
        print(f"\n{name}: {CLAIMS[name].says}\n  source: {CLAIMS[name].source}\n"
              f"  {one['verdict']}   ({one['runs']} runs, {one['seeds']} seeds, "
              f"{one['cpu_seconds']} CPU s)")
        for check in one["checks"]:
            print(f"  {check['verdict']:<26}{check['says']}: {tables.in_words(check)}")
        for key, (count, n) in one["breakdowns"].items():
            print(f"  broke down                {key}: {tables.rate(count, n)}")


def judge_all():
    """Everything that follows from the stored runs: verdicts.json, pictures, the pages' tables."""
    stored = store.read()
    found = judge(CLAIMS, stored, RESULTS / "claims")
    rundir.write(RESULTS / "verdicts.json", json.dumps(found, indent=1) + "\n")
    methods.draw(stored, RESULTS / "methods.png")
    tables.refresh(CLAIMS, found, stored)
    say(found)
    print("\n" + by_chance([check for one in found.values() for check in one["checks"]]))


def hero():
    """results/main_job.png: the main job, looked at on its way."""
    folder = Path("out/hero")
    train.main(["--loss", "kto", "--eval_every", "20", "--out", str(folder), "--overwrite"])
    found = json.loads((folder / "eval.json").read_text())
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    way = [{"step": line["step"] + 1} | {key: line[f"eval/{key}"] for key in
                                         ("reward", "kl", "win_rate", "malformed")}
           for line in lines if "eval/kl" in line]
    plots.plot_path(way, found, RESULTS / "main_job.png")


def main(argv):
    others = {"judge": judge_all, "hero": hero}
    parser = argparse.ArgumentParser(prog="experiments.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("names", nargs="*", metavar="NAME", help=", ".join(["all", "methods", *others, *CLAIMS]))
    flag("--quick", action="store_true", help="one short seed of every arm, in out/quick")
    flag("--seeds", type=int, help="per arm [as the claim says, mostly 12]")
    flag("--refresh", action="store_true", help="run again what other code has made")
    flag("--dry_run", action="store_true", help="only count the runs that are missing or stale")
    flag("--processes", type=int, default=os.cpu_count() or 2, help="arms that run at once [cores]")
    flag("--out", default="out/experiments", help="where the runs go [%(default)s]")
    args = parser.parse_args(argv)
    known = {"all", "methods", *others, *CLAIMS}
    for name in args.names:
        if name not in known:
            raise SystemExit(f"{name}: no such experiment; valid are {', '.join(sorted(known))}")
    for name in ("seeds", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name}: must be at least 1")
    if args.names and args.names[0] in others:
        others[args.names[0]]()
    elif args.names == ["methods"]:
        methods.run(Path(args.out).absolute(), args.processes)
    elif args.names or args.quick or args.dry_run:
        if not args.names or "all" in args.names:
            args.names = list(CLAIMS)
        run_claims(args)
    else:
        print(tables.claims(CLAIMS, tables.read_verdicts()))


if __name__ == "__main__":
    main(sys.argv[1:])

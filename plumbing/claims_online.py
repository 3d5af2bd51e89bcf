"""Claims about who writes the responses: the data, or the policy itself. See experiments.py.

Online, each of 60 steps samples 32 prompts, writes 8 responses to each (15,360 in all), and a
reward judges them: the true utility, or a reward model that was fitted to the same 8,000 pairs that
the offline methods learn from. PPO takes 54 steps of 288 responses. Under the true utility DPO and
KTO have beta 0.5 and nothing holds the others; under the learnt reward all need a leash: beta 2,
kl_coef 0.2 (the claim overoptimisation shows them without).
"""

from functools import partial

import numpy as np

from plumbing.arms import arm
from plumbing.claim_plots import on_the_way, plane
from plumbing.claims import MATTERS, claim
from plumbing.verdicts import check

NATIVE = {"grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce", "ppo"}     # always online
SEEDS = 5


def online(loss, reward, **flags):
    if loss not in NATIVE:
        flags["online"] = True
    if loss == "ppo":
        flags = {"steps": 54, "kl_coef": 0.0} | flags    # its default is another one
    return arm(loss, "world", **{"steps": 60, "reward": reward, "eval_every": 6} | flags)


TRUE = {loss: online(loss, "world")
        for loss in ("dpo", "kto", "rebel", "xpo", "grpo", "dr_grpo", "dapo", "gspo", "rloo",
                     "reinforce", "ppo")}
LEARNT = {f"{loss}, learnt reward": online(loss, "rm", **leash)
          for loss, leash in (("dpo", {"beta": 2.0}), ("kto", {"beta": 2.0}),
                              ("grpo", {"kl_coef": 0.2}), ("dr_grpo", {"kl_coef": 0.2}),
                              ("ppo", {"kl_coef": 0.2}))}
HELD = ("dpo", "kto", "grpo")
LEASHES = ({f"{loss}, weak leash": online(loss, "rm") for loss in HELD}
           | {f"{loss}, strong leash": LEARNT[f"{loss}, learnt reward"] for loss in HELD})
OFFLINE = {f"offline {loss}": arm(loss, "world", steps=480) for loss in ("dpo", "kto")}
HUMANLINE = {f"humanline {loss}": arm(f"humanline_{loss}", "world") for loss in ("dpo", "kto")}


def path_at(runs, label, column, wanted):
    """Utility on the way (tuning questions) where the step (column 0) or the KL (1) is `wanted`."""
    found = []
    for run, x in zip(runs.of(label), np.broadcast_to(wanted, runs.seeds)):
        way = np.array([[0, 0, run["reward_ref"]], *run["path"]])
        found.append(np.interp(x, np.maximum.accumulate(way[:, column]), way[:, 2]))
    return np.array(found)


@claim("Online beats offline", "Tajwar et al. 2024 (2404.14367), Tang et al. 2024 (2405.08448)",
       OFFLINE | {name: LEARNT[name] for name in LEARNT if name[:3] in ("dpo", "kto")}
       | {"dpo": TRUE["dpo"], "kto": TRUE["kto"]}, [on_the_way, "reward", "align_cpu"], seeds=SEEDS)
def online_offline(runs):
    """The same loss and the same 8,000 pairs: offline on them, online through a reward model that
    was fitted to them. Once after as many responses, once at the KL where offline ended (there the
    online run is still on its way, the offline one has settled), once after as many CPU seconds
    (the reward model's fit, about 40 s more, is not counted).
    """
    checks = []
    for loss in ("dpo", "kto"):
        ours, theirs, name = f"{loss}, learnt reward", f"offline {loss}", loss.upper()
        offline = runs(theirs, "tune reward")
        share = np.minimum(1, runs(theirs, "align_cpu") / runs(ours, "align_cpu"))
        checks += [runs.check(f"utility, {name} online - offline > 0 after as many responses",
                              ours, theirs),
                   check("... > 0 at the KL where offline ended",
                         path_at(runs, ours, 1, runs(theirs, "tune kl")) - offline),
                   check("... > 0 after as many CPU seconds",
                         path_at(runs, ours, 0, 60 * share) - offline)]
    return checks


@claim("Online KTO and online DPO agree", "follows from one reward for both; tested here",
       {"dpo": TRUE["dpo"], "kto": TRUE["kto"]} | LEARNT, [on_the_way, "reward"], seeds=SEEDS)
def online_kto_dpo(runs):
    return [runs.check(f"utility, {what}: KTO - DPO, within {MATTERS}", f"kto{label}",
                       f"dpo{label}", above=-MATTERS, below=MATTERS)
            for what, label in (("true reward", ""), ("learnt reward", ", learnt reward"))]


@claim("Humanline's clamp makes offline data as good as online data",
       "Liu et al. 2025 (2509.24207)", OFFLINE | HUMANLINE | LEARNT, ["reward", plane],
       seeds=SEEDS)
def humanline(runs):
    checks = []
    for loss in ("dpo", "kto"):
        name = loss.upper()
        checks += [runs.check(f"utility, humanline {name} - online {name} > -{MATTERS}",
                              f"humanline {loss}", f"{loss}, learnt reward", above=-MATTERS),
                   runs.check(f"utility, humanline {name} - offline {name} > 0",
                              f"humanline {loss}", f"offline {loss}")]
    return checks


@claim("GRPO needs no critic: it does as well as PPO", "Shao et al. 2024 (2402.03300), 4.1",
       TRUE | LEARNT, [partial(on_the_way, only=("grpo", "ppo", "rloo", "reinforce")), "reward",
                       "align_cpu"], seeds=SEEDS)
def grpo_critic(runs):
    return [runs.check(f"utility, GRPO - PPO > -{MATTERS}, true reward", "grpo", "ppo",
                       above=-MATTERS),
            runs.check(f"... > -{MATTERS}, learnt reward", "grpo, learnt reward",
                       "ppo, learnt reward", above=-MATTERS),
            runs.check("CPU seconds, PPO - GRPO > 0", "ppo", "grpo", key="align_cpu")]


@claim("Dr. GRPO shortens what GRPO writes, at the same reward", "Liu et al. 2025 (2503.20783)",
       {"grpo": TRUE["grpo"], "dr_grpo": TRUE["dr_grpo"]}
       | {name: LEARNT[name] for name in LEARNT if "grpo" in name}, ["length", "reward"],
       seeds=SEEDS)
def dr_grpo(runs):
    checks = []
    for what, label in (("true reward", ""), ("learnt reward", ", learnt reward")):
        ours, theirs = f"dr_grpo{label}", f"grpo{label}"
        checks += [runs.check(f"tokens, GRPO - Dr. GRPO > 0, {what}", theirs, ours, key="length"),
                   runs.check(f"utility, Dr. GRPO - GRPO > -{MATTERS}", ours, theirs,
                              above=-MATTERS)]
    return checks


@claim("PPO gets more out of the same preferences than DPO and KTO",
       "Xu et al. 2024 (2404.10719), Ivison et al. 2024 (2406.09279)",
       OFFLINE | {"ppo, learnt reward": LEARNT["ppo, learnt reward"]},
       [on_the_way, "reward", "align_cpu"], seeds=SEEDS)
def ppo_dpo_kto(runs):
    """8,000 pairs each; PPO's reward model learns from them first."""
    ppo = "ppo, learnt reward"
    checks = []
    for name in ("dpo", "kto"):
        offline = runs(f"offline {name}", "tune reward")
        at_kl = path_at(runs, ppo, 1, runs(f"offline {name}", "tune kl"))
        checks += [runs.check(f"utility, PPO - {name.upper()} > 0", ppo, f"offline {name}"),
                   check("... > 0 at its KL", at_kl - offline)]
    return checks


@claim("Against a learnt reward true utility rises and then falls, and a leash prevents it",
       "Gao et al. 2023 (2210.10760)", LEASHES, [on_the_way, "reward", "malformed"], seeds=SEEDS)
def overoptimisation(runs):
    """Best: at the step that is best in the other seeds, so that its own noise does not choose."""
    checks = []
    for loss in HELD:
        weak, strong = f"{loss}, weak leash", f"{loss}, strong leash"
        paths = np.array([[point[2] for point in run["path"]] for run in runs.of(weak)])
        others = (paths.sum(0) - paths) / max(1, len(paths) - 1)
        best = paths[np.arange(len(paths)), others.argmax(1)]
        name = loss.upper()
        checks += [check(f"{name}, weak leash: utility rises: best on the way - reference > 0",
                         best - runs(weak, "reward_ref")),
                   check("... and falls: best on the way - end > 0", best - paths[:, -1]),
                   runs.check("... and a strong leash helps: utility, strong - weak > 0", strong,
                              weak)]
    return checks

"""Writes real training paths into explorer.html: KTO, DPO and PPO on the embedded world.

    python train.py --loss kto --eval_every 10 --out out/path-kto
    python train.py --loss dpo --eval_every 10 --out out/path-dpo
    python train.py --loss ppo --eval_every 2 --out out/path-ppo
    python docs/paths.py out/path-kto out/path-dpo out/path-ppo

A point is [step, KL in nats, true utility, share of malformed replies], on the tuning questions;
logratios are means over 20 steps of [chosen, rejected] log pi / pi_ref in nats, as logged.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import world

PAGE = Path(__file__).with_name("explorer.html")
BLOCK = re.compile(r'(<script type="application/json" id="measured">).*?(</script>)', re.S)
BETAS = [60 * 0.93 ** i for i in range(80)]              # of the frontier's points, 0.2 at the end


def main(folders):
    runs = {}
    for folder in map(Path, folders):
        loss = json.loads((folder / "config.json").read_text())["loss"]
        runs[loss] = path_of(folder)
    measured = {"runs": runs, "frontier": [point(world.optimum(beta)) for beta in BETAS],
                "optima": {"kto": point(world.kto_optimum(0.5)),
                           "dpo": point(world.dpo_optimum(0.5)),
                           "ppo": point(world.optimum(1.0))}}        # its kl_coef
    text = json.dumps(measured, separators=(",", ":"))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")


def path_of(folder):
    """The measurements of one run, beginning at the reference."""
    log = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    start = json.loads((folder / "eval.json").read_text())
    points = [[0, 0.0, round(start["reward_ref"], 3), round(start["malformed_ref"], 3)]]
    for line in log:
        if "eval/kl" in line:
            found = [round(line["eval/" + name], 3) for name in ("kl", "reward", "malformed")]
            points.append([line["step"] + 1, *found])
    run = {"points": points}
    if "rewards/chosen" in log[0]:
        run["logratios"] = log_ratios(log, json.loads((folder / "config.json").read_text())["beta"])
    return run


def log_ratios(log, beta, window=20):
    """Implied rewards are beta * log-ratio; one step's mean is noisy."""
    means = [[0.0, 0.0]]
    for first in range(0, len(log), window):
        part = log[first:first + window]
        means.append([round(sum(line["rewards/" + side] for line in part) / len(part) / beta, 2)
                      for side in ("chosen", "rejected")])
    return means


def point(optimum):
    return [round(optimum.kl, 6), round(optimum.utility, 4)]   # near 0 the frontier is steep


if __name__ == "__main__":
    main(sys.argv[1:])

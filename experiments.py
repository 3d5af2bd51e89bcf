"""Runs that compare: `python experiments.py methods` trains every objective on the embedded world and tabulates what came out.

Each run is the command a reader would type (`train.py --loss NAME --seed S`), its numbers are the run's own eval.json, and runs
that are there already are not repeated. The numbers go to results/methods.json; `--table` prints the README's table from it.
`python experiments.py objectives` prints the README's table of papers and ideas.
"""

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import dpo_variants
import kto
import ppo
import train

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
KEPT = ("win_rate", "reward", "kl", "malformed", "length", "reward_greedy", "reward_ref_greedy")


def methods(names, seeds, out):
    """results/methods.json: {loss: {"settings": ..., "runs": [{seed, win_rate, reward, kl, ...}]}}, written after every run."""
    path = RESULTS / "methods.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in seeds:
        for name in names:
            folder = Path(out) / f"{name}-{seed}"
            if not (folder / "eval.json").exists():
                command = [sys.executable, str(ROOT / "train.py"), "--loss", name, "--seed", str(seed), "--out", str(folder), "--overwrite"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{name}, seed {seed}: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
            r, config = (json.loads((folder / f).read_text()) for f in ("eval.json", "config.json"))
            own = {k: config[k] for k in ("lr", "steps", "batch_size", *train.signature(train.find_loss(name))[1]) if k in config}
            entry = results.setdefault(name, {"settings": own, "runs": []})
            entry["runs"] = [x for x in entry["runs"] if x["seed"] != seed] + [
                {"seed": seed, **{k: r[k] for k in KEPT}, "win_rate_ci95": r["win_rate_ci95"], "best": r["optimum_at_same_kl"]["reward"],
                 "seconds": r["seconds"]["align_cpu"], "commit": config["commit"]}]
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}, seed {seed}: win rate {r['win_rate']:.3f}, true utility {r['reward']:+.2f}, KL {r['kl']:.2f}", flush=True)
    return results


def methods_table(results):
    """Mean +- standard deviation over seeds, best win rate first."""
    lines = ["| `--loss` | win rate | true utility | best possible at this KL | KL, nats | malformed | CPU s | beta, lr |", "|---|---|---|---|---|---|---|---|"]
    for name, entry in sorted(results.items(), key=lambda x: -np.mean([r["win_rate"] for r in x[1]["runs"]])):
        def both(key, digits):
            x = [r[key] for r in entry["runs"]]
            return f"{np.mean(x):.{digits}f} +- {np.std(x, ddof=1):.{digits}f}" if len(x) > 1 else f"{x[0]:.{digits}f}"

        s = entry["settings"]
        knob = ", ".join(f"{k} {s[k]:g}" for k in ("beta", "tau", "gamma", "delta", "lam") if k in s)
        lines.append(f"| `{name}` | {both('win_rate', 3)} | {both('reward', 2)} | {np.mean([r['best'] for r in entry['runs']]):.2f} | {both('kl', 2)} | "
                     f"{both('malformed', 2)} | {np.mean([r['seconds'] for r in entry['runs']]):.0f} | {knob}{', ' if knob else ''}{s['lr']:g} |")
    return "\n".join(lines)


def objectives_table():
    """Every objective and recipe, from signatures and docstrings: the README's first table of methods."""
    extra = {"score_gap": "scores", "chosen_win_prob": "win probabilities", "target_logps": "a third response"}
    rows = []
    for name, f in {**kto.LOSSES, "offline_ppo": ppo.offline_ppo_loss, **dpo_variants.LOSSES}.items():
        wants = train.signature(f)[0]
        said = dict(line.strip().split(": ", 1) for line in inspect.getdoc(f).splitlines() if line.startswith(("Paper: ", "Idea: ")))
        needs = ["pairs" if train.is_paired(wants) else "labels", *(words for n, words in extra.items() if n in wants)]
        rows.append((name, said["Paper"], "yes" if train.REFERENCE & set(wants) else "no", " + ".join(needs), said["Idea"]))
    for name, r in train.RECIPES.items():
        reference = {"none": "no", "moving": "moves"}.get(r.get("reference"), "no" if name == "rm" else "the last stage" if "stages" in r else "yes")
        needs = {"spin": "good responses", "sdpo_segment": "sessions", "ppo": "prompts + a reward"}.get(name, "pairs")
        rows.append((name, r["paper"], reference, needs, r["idea"] + "."))
    cells = [" | ".join([f"`{name}`", *(cell.replace("|", "\\|") for cell in rest)]) for name, *rest in rows]
    return "\n".join(["| `--loss` | paper | reference | data | idea |", "|---|---|---|---|---|", *(f"| {row} |" for row in cells)])


def main(argv):
    p = argparse.ArgumentParser(prog="experiments.py", description=__doc__.split("\n")[0])
    p.add_argument("name", choices=["methods", "objectives"], help="methods: run them; objectives: the table of papers and ideas")
    p.add_argument("--losses", nargs="*", default=[n for n in (*train.LOSSES, *train.RECIPES) if n != "rm"])
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--out", default="out/methods")
    p.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    a = p.parse_args(argv)
    if a.name == "objectives":
        return print(objectives_table())
    results = json.loads((RESULTS / "methods.json").read_text()) if a.table else methods(a.losses, a.seeds, a.out)
    print(methods_table(results))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Did it work? Win rate against the reference with an interval, true reward, KL, malformed replies, samples side by side.

Everything that is a NUMBER is sampled at temperature 1, since the policy is that distribution (KL and reward at another
temperature belong to another policy); samples for SHOW use temperature 0.7.

    win rate   P(u(policy's reply) > u(reference's reply)), a tie counts half; one reply each to the same prompt
    interval   95 % bootstrap over CLUSTERS: the held-out (device, problem) pairs are resampled, not the prompts, since four
               wordings of one problem are not four independent problems
    KL         KL(pi || pi_ref) in nats per reply = E_{y ~ pi} sum_t KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)): each next-token
               KL is exact, only the prefixes are sampled. Same mean as the samples' log-ratios, and never below 0

`python evaluate.py out/kto` measures a finished run again; `python evaluate.py out/kto --prompt "..."` lets reference and
policy answer side by side.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import world
from data import Turn, flatten, load_tokenizer, make_row, token_batches
from model import load_policy


def bootstrap_ci(values, clusters, *, seed=0, resamples=2000):
    """95 % percentile interval of the mean of `values`, resampling whole clusters.   -> (low, high)"""
    names = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    index = np.array([names[c] for c in clusters])
    total, size = np.bincount(index, weights=values), np.bincount(index)
    draw = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = total[draw].sum(1) / size[draw].sum(1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


@torch.no_grad()
def sampled_kl(policy, reference, rows, *, device="cpu", budget=4096):
    """sum_t KL(pi(.|s_t) || pi_ref(.|s_t)) over the response positions of each row.   -> float64 array (rows,)"""
    out = np.zeros(len(rows))
    for part in token_batches(rows, budget):
        flat = flatten([rows[i] for i in part], device)
        p, q = (torch.log_softmax(m(flat.ids, flat.positions, flat.lengths, flat.predict).double(), -1) for m in (policy, reference))
        kl = (p.exp() * (p - q)).sum(-1)
        out[part.start:part.stop] = flat.sums(kl).cpu().numpy()
    return out


def replies(policy, tokenizer, prompts, *, temperature=1.0, top_p=1.0, seed=0, max_new_tokens=64):
    """(texts, rows): a response to each prompt, as text and as a row that can be scored."""
    ids = [tokenizer.prompt_ids(p)[-(policy.context - 8):] or [tokenizer.eot] for p in prompts]
    responses = policy.generate(ids, eot=tokenizer.eot, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return [tokenizer.text(r) for r in responses], [make_row(p, r) for p, r in zip(ids, responses)]


def in_sessions(prompts):
    """The same questions inside a conversation, every second one after an earlier exchange."""
    return [tuple(Turn(**message) for message in messages) for messages in world.in_sessions(prompts)]


def evaluate_world(policy, reference, tokenizer, *, part="report", n=480, seed=0, device="cpu", sessions=False):
    """The help desk's own verdict on n replies to held-out prompts.   -> dict, the content of eval.json"""
    prompts = world.eval_prompts(part, n)
    asked, clusters = in_sessions(prompts) if sessions else prompts, [world.cluster_of(p) for p in prompts]
    texts, rows = replies(policy, tokenizer, asked, seed=2 * seed + 1)
    ref_texts, _ = replies(reference, tokenizer, asked, seed=2 * seed)
    verdicts, ref_verdicts = ([world.judge(p, t) for p, t in zip(prompts, ts)] for ts in (texts, ref_texts))
    u, u_ref = (np.array([v.utility for v in vs]) for vs in (verdicts, ref_verdicts))
    win = (u > u_ref) + 0.5 * (u == u_ref)
    kl = sampled_kl(policy, reference, rows, device=device)
    greedy = []
    for model in (policy, reference):
        ts, _ = replies(model, tokenizer, asked[:96], temperature=0)
        greedy.append(float(np.mean([world.utility(p, t) for p, t in zip(prompts, ts)])))
    result = {"win_rate": float(win.mean()), "win_rate_ci95": bootstrap_ci(win, clusters),
              "reward": float(u.mean()), "reward_ci95": bootstrap_ci(u, clusters), "reward_ref": float(u_ref.mean()),
              "kl": float(kl.mean()), "kl_ci95": bootstrap_ci(kl, clusters), "n": n, "split": part,
              "reward_greedy": greedy[0], "reward_ref_greedy": greedy[1]}
    for name, vs, rs in (("", verdicts, texts), ("_ref", ref_verdicts, ref_texts)):
        result |= {"malformed" + name: float(np.mean([v.malformed > 0 for v in vs])),
                   "right" + name: float(np.mean([v.right for v in vs])),
                   "rude" + name: float(np.mean([v.rude for v in vs])),
                   "length" + name: float(np.mean([len(tokenizer.encode(t)) for t in rs]))}
    best = world.optimum_at_kl(result["kl"])
    result["optimum_at_same_kl"] = {"reward": best.utility, "win_rate": best.win_rate, "beta": best.beta}
    result["utilities"], result["utilities_ref"] = u.tolist(), u_ref.tolist()
    return result


def write_samples(path, prompts, reference_texts, policy_texts, scores=None):
    """samples.md: prompt, reference, policy, side by side."""
    lines = ["# Samples at temperature 0.7", "", "| prompt | reference | policy |", "|---|---|---|"]
    for i, row in enumerate(zip(prompts, reference_texts, policy_texts)):
        p, r, y = (" ".join(t.replace("|", "\\|").split()) for t in map(str, row))
        if scores:
            r, y = f"({scores[i][0]:+.1f}) {r}", f"({scores[i][1]:+.1f}) {y}"
        lines.append(f"| {p} | {r} | {y} |")
    Path(path).write_text("\n".join(lines) + "\n")


def prompt_text(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(f"{t.role}: {t.content}" for t in prompt)


# --- pictures ---------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#777777", "#009E73"                  # Okabe and Ito: colour-blind safe


def _figure(columns, width=5.0, height=3.6):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")
    return figure, np.atleast_1d(axes)


def plot_curves(metrics, path):
    """curves.png: loss, rewards of both classes, log-probs of both classes, and z0 where there is one."""
    has_z0 = any(m.get("z0_raw") is not None for m in metrics)
    figure, axes = _figure(3 + has_z0)
    x = [m["step"] for m in metrics]

    def line(ax, key, color, label):
        y = np.array([np.nan if m.get(key) is None else m[key] for m in metrics], float)
        ax.plot(x, y, color=color, alpha=0.25, lw=0.8)
        w = max(1, len(y) // 30)                                          # a running mean over about 1/30 of the run
        good = np.isfinite(y)
        smooth = np.convolve(np.where(good, y, 0), np.ones(w), "same") / np.maximum(np.convolve(good, np.ones(w), "same"), 1)
        ax.plot(x, np.where(np.convolve(good, np.ones(w), "same") > 0, smooth, np.nan), color=color, lw=2, label=label)

    line(axes[0], "loss", BLUE, "loss")
    line(axes[1], "rewards/chosen", GREEN, "desirable")
    line(axes[1], "rewards/rejected", ORANGE, "undesirable")
    line(axes[2], "logps/chosen", GREEN, "desirable")
    line(axes[2], "logps/rejected", ORANGE, "undesirable")
    titles = ["loss", "implied reward beta (log pi - log pi_ref)", "log pi(y|x), nats per response"]
    if has_z0:
        line(axes[3], "z0_raw", GREY, "before the clamp")
        line(axes[3], "z0", BLUE, "z0 = max(0, mean)")
        titles.append("reference point z0, nats")
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("optimiser step")
        ax.grid(alpha=0.25)
        if len(ax.lines) > 2:
            ax.legend(frameon=False)
    figure.savefig(path, dpi=110)


def plot_frontier(result, path, name="KTO"):
    """frontier.png: what the policy earned for the KL it spent, under the exact frontier; and the utilities it moved."""
    figure, axes = _figure(2, 5.6, 4.2)
    betas = np.geomspace(0.08, 60, 60)
    points = sorted((world.optimum(float(b)) for b in betas), key=lambda p: p.kl)
    axes[0].plot([p.kl for p in points], [p.utility for p in points], color=GREY, lw=2, label="exact frontier: best possible at this KL")
    kto = [world.kto_optimum(b) for b in (0.1, 0.5, 1.0, 2.0)]
    axes[0].scatter([p.kl for p in kto], [p.utility for p in kto], marker="D", s=22, color=GREEN, label="KTO's own optimum, beta 0.1 to 2")
    axes[0].scatter([0], [result["reward_ref"]], color=ORANGE, s=50, zorder=3, label="reference (measured)")
    u, kl, (low, high) = result["reward"], result["kl"], result["reward_ci95"]
    axes[0].errorbar([kl], [u], yerr=[[max(0, u - low)], [max(0, high - u)]], fmt="o", color=BLUE, ms=8, capsize=4, zorder=3,
                     label=f"{name} policy (measured, 95 %)")
    axes[0].set_xlabel("KL(policy || reference), nats per reply")
    axes[0].set_ylabel("true utility per reply")
    axes[0].set_xlim(-0.15, max(4.6, kl * 1.1))
    axes[0].legend(frameon=False, loc="lower right", fontsize=9)
    bins = np.arange(-6.25, 4.0, 0.5)
    for key, color, label in (("utilities_ref", ORANGE, "reference"), ("utilities", BLUE, "policy")):
        axes[1].hist(np.clip(result[key], -6, 3.6), bins=bins, color=color, alpha=0.55,
                     label=f"{label}, mean {np.mean(result[key]):+.2f}")
    axes[1].set_xlabel("true utility of a reply to a held-out prompt")
    axes[1].set_ylabel(f"replies of {result['n']}")
    win, (low, high) = result["win_rate"], result["win_rate_ci95"]
    axes[1].set_title(f"win rate {win:.3f} [{low:.3f}, {high:.3f}]", fontsize=11)
    axes[1].legend(frameon=False, loc="upper left")
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


# --- the end of a run: files, pictures, and what to tell ----------------------------------------------------------------

def report_world(judge, policy, reference, tokenizer, cfg, seconds, sessions=False):
    """eval.json, samples.md, curves.png, frontier.png, and the last part of the story. judge(policy, reference) -> eval.json's content"""
    clock, out = time.perf_counter(), Path(cfg.out)
    r = judge(policy, reference)
    prompts = world.eval_prompts("report", 24)[:12]
    asked = in_sessions(prompts) if sessions else prompts
    texts = [replies(m, tokenizer, asked, temperature=0.7, seed=cfg.seed)[0] for m in (reference, policy)]
    scores = [tuple(world.utility(p, t) for t in pair) for p, *pair in zip(prompts, *texts)]
    write_samples(out / "samples.md", prompts, *texts, scores=scores)
    metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
    plot_curves(metrics, out / "curves.png")
    plot_frontier(r, out / "frontier.png", name=cfg.loss)
    seconds["evaluate"] = time.perf_counter() - clock
    saved = {k: v for k, v in r.items() if not k.startswith("utilities")} | {"seconds": seconds}
    (out / "eval.json").write_text(json.dumps(saved, indent=2) + "\n")

    best, (low, high), (u_low, u_high) = r["optimum_at_same_kl"], r["win_rate_ci95"], r["reward_ci95"]
    raw = [m["z0_raw"] for m in metrics if m.get("z0_raw") is not None]
    show = max(range(len(prompts)), key=lambda i: scores[i][1] - scores[i][0])
    print(f"""
What came out, on {r['n']} questions about 24 (device, problem) pairs that no stage has seen:
  win rate against the reference   {r['win_rate']:.3f} [{low:.3f}, {high:.3f}]   (0.5: no better; the best possible at this KL: {best['win_rate']:.3f})
  true utility per reply           {r['reward']:+.2f} [{u_low:+.2f}, {u_high:+.2f}]   (reference {r['reward_ref']:+.2f}; best at this KL {best['reward']:+.2f}; perfect +3.50)
  KL(policy || reference)          {r['kl']:.2f} nats per reply
  right fix for the right device   {r['right']:.0%}   (reference {r['right_ref']:.0%})
  malformed replies                {r['malformed']:.1%}   (reference {r['malformed_ref']:.1%})
  length                           {r['length']:.1f} tokens   (reference {r['length_ref']:.1f})
  utility of the greedy reply      {r['reward_greedy']:+.2f}   (reference {r['reward_ref_greedy']:+.2f})"""
          + (f"\n  z0 before the clamp              {raw[-1]:+.2f} at the last step; clamped to 0 in {np.mean([z <= 0 for z in raw]):.0%} of the steps" if raw else "")
          + f"""

One of the questions, answered at temperature 0.7 (utility in front):
  {prompts[show]}
    reference  ({scores[show][0]:+.1f}) {texts[0][show]}
    policy     ({scores[show][1]:+.1f}) {texts[1][show]}

seconds: base model {seconds['base']:.0f}, alignment {seconds['align']:.0f}, evaluation {seconds['evaluate']:.0f}
files:   {out}/ frontier.png, curves.png, samples.md, eval.json, metrics.jsonl, model/ (transformers loads it)
next:    python evaluate.py {out} --prompt "{prompts[0]}"
         python train.py --loss {cfg.loss} --beta 0.1 --out {out}-beta0.1      (what does a smaller beta do to the KL?)
         python train.py --loss bco      python train.py --help""", flush=True)


def margins(logps, ref_logps, desirable):
    """Mean log-ratio (nats) of desirable and undesirable rows, their difference, and the share on the right side of 0."""
    ratios, up = logps - ref_logps, torch.tensor(desirable)
    good, bad = (float(ratios[where].mean()) if where.any() else None for where in (up, ~up))
    return {"logratio_desirable": good, "logratio_undesirable": bad, "margin": None if None in (good, bad) else good - bad,
            "accuracy": float(torch.where(up, ratios > 0, ratios < 0).double().mean()), "n": len(ratios)}


def report_files(result, policy, reference, tokenizer, prompts, cfg, seconds):
    """What a run on files leaves: there is no judge, so margins on its rows and samples side by side."""
    clock, out, room = time.perf_counter(), Path(cfg.out), max(1, min(128, cfg.max_len // 4))
    texts = [replies(m, tokenizer, prompts, temperature=0.7, seed=cfg.seed, max_new_tokens=room)[0] for m in (reference, policy)]
    write_samples(out / "samples.md", map(prompt_text, prompts), *texts)
    plot_curves([json.loads(line) for line in open(out / "metrics.jsonl")], out / "curves.png")
    seconds["evaluate"] = time.perf_counter() - clock
    unknown = dict.fromkeys(("win_rate", "win_rate_ci95", "reward", "reward_ref", "kl"))
    result = {**unknown, "n": 0, "why_null": "files bring no judge; samples.md has both models' answers", **result, "seconds": seconds}
    (out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    for name in ("train", "eval"):
        if r := result.get(name):
            d, u, m = ("none" if x is None else f"{x:+.3f}" for x in (r["logratio_desirable"], r["logratio_undesirable"], r["margin"]))
            print(f"{name} rows ({r['n']}): log pi/pi_ref of desirable {d}, of undesirable {u}, margin {m} nats; {r['accuracy']:.1%} on the right side of 0")
    print(f"seconds: alignment {seconds['align']:.0f}, samples {seconds['evaluate']:.0f}\n"
          f"files:   {out}/ samples.md, curves.png, eval.json, metrics.jsonl, model/ (transformers loads it)\n"
          f"next:    python evaluate.py {out} --prompt \"...\"", flush=True)


# --- command line -----------------------------------------------------------------------------------------------------

def load_run(out, device="cpu"):
    """(policy, reference, tokenizer, config) of a finished run's folder."""
    out = Path(out)
    if not (out / "config.json").is_file():
        raise SystemExit(f"{out}: no config.json there; expected the --out folder of a run")
    if not (out / "model" / "config.json").is_file():
        raise SystemExit(f"{out}: no model/ there; the run has not finished: continue it with --resume")
    config = json.loads((out / "config.json").read_text())
    return load_policy(out / "model", device=device), load_policy(config["ref"], device=device), load_tokenizer(out / "model"), config


def summary(runs):
    """A markdown table of several runs' eval.json, and mean +- standard deviation over them."""
    results = [json.loads((Path(r) / "eval.json").read_text()) for r in runs]
    columns = {"win rate": lambda r: r["win_rate"], "best win rate at this KL": lambda r: r["optimum_at_same_kl"]["win_rate"],
               "true utility": lambda r: r["reward"], "best utility at this KL": lambda r: r["optimum_at_same_kl"]["reward"],
               "KL, nats": lambda r: r["kl"], "malformed": lambda r: r["malformed"], "greedy utility": lambda r: r["reward_greedy"],
               "seconds": lambda r: sum(r["seconds"][k] for k in ("base", "align", "evaluate"))}
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run, r in zip(runs, results):
        cells = [f"{f(r):.3f}" if name != "seconds" else f"{f(r):.0f}" for name, f in columns.items()]
        low, high = r["win_rate_ci95"]
        lines.append(f"| {Path(run).name} | {cells[0]} [{low:.3f}, {high:.3f}] | " + " | ".join(cells[1:]) + " |")
    values = {name: np.array([f(r) for r in results]) for name, f in columns.items()}
    lines.append("| mean +- sd | " + " | ".join(f"{v.mean():.3f} +- {v.std(ddof=1):.3f}" if name != "seconds" else f"{v.mean():.0f}"
                                                for name, v in values.items()) + " |")
    return "\n".join(lines)


def main(argv):
    import argparse
    p = argparse.ArgumentParser(prog="evaluate.py", description="Measure a finished run again, or let both models answer.")
    p.add_argument("run", help="a run's folder, out/kto")
    p.add_argument("more", nargs="*", help="more runs (other seeds): their eval.json side by side, with mean and standard deviation")
    p.add_argument("--prompt", action="append", help="answer this from reference and policy, side by side (repeatable)")
    p.add_argument("--temperature", type=float, default=0.7)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--samples", type=int, default=3, help="answers per prompt")
    p.add_argument("--max_new_tokens", type=int, default=64)
    p.add_argument("--split", choices=["report", "tune"], default="report")
    p.add_argument("--n", type=int, default=480)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    a = p.parse_args(argv)
    if a.more:
        print(summary([a.run, *a.more]))
        return
    policy, reference, tokenizer, config = load_run(a.run, a.device)
    if a.prompt:
        how = dict(temperature=a.temperature, top_p=a.top_p, seed=a.seed, max_new_tokens=a.max_new_tokens)
        for prompt in a.prompt:
            known = world.parse_prompt(prompt) if config["task"] == "world" else None
            print(f"\n{prompt}")
            for name, model in (("reference", reference), ("policy", policy)):
                for text in replies(model, tokenizer, [prompt] * a.samples, **how)[0]:
                    print(f"  {name:>9} {f'({world.utility(prompt, text):+.1f}) ' if known else ''}{text}")
            if config["task"] == "world" and not known:
                print("  (not one of the help desk's questions: this model has seen nothing else)")
        return
    if config["task"] != "world":
        raise SystemExit(f"{a.run}: was trained on files, which have no judge here; --prompt \"...\" shows both models' answers")
    result = evaluate_world(policy, reference, tokenizer, part=a.split, n=a.n, seed=a.seed, device=a.device)
    print(json.dumps({k: v for k, v in result.items() if not k.startswith("utilities")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

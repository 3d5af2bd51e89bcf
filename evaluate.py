"""Did it work? Win rate with an interval, true reward, KL, malformed replies, samples side by side.

Numbers are measured on samples at temperature 1, the policy's own distribution. Samples for reading
have temperature 0.7.

    win rate   P(u(policy's reply) > u(reference's)); a tie counts half. In the embedded world each
               reply is compared with all replies of the reference in its (device, problem) cell;
               elsewhere each model gives one reply per prompt
    interval   95 % bootstrap over CLUSTERS: it draws (device, problem) cells, not prompts, because
               four wordings of one problem are not four independent problems
    KL         KL(pi || pi_ref), nats per reply = E_{y ~ pi} sum_t KL(pi(.|s_t) || pi_ref(.|s_t)):
               next-token KLs are exact, only the prefixes s_t are sampled

    python evaluate.py out/kto                     measures a run on the embedded world again
    python evaluate.py out/kto --prompt "..."      reference and policy answer side by side
    python evaluate.py out/mine [--data FILE]      a run on files: both answer held-out prompts
    python evaluate.py out/mine --judge JUDGE      a reward model's folder, or file.py:function
    python evaluate.py out/mine --export_pairs pairs.jsonl     blinded, for people or an LLM
    python evaluate.py out/mine --verdicts verdicts.jsonl      their verdicts (plumbing/judges.py)

Answers are sampled once and stored in comparison.jsonl, so every judge reads the same texts. A
prompt for an LLM as judge, with each line of pairs.jsonl: "Here are a message and two answers to
it. Which answer is better: more helpful, harmless and concise? An answer is not better for being
longer or for coming first. Reply with one word: a, b or tie."
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # threads that wait sleep; before torch

import numpy as np
import torch

import data
import world
from plumbing import formats, rewards
from plumbing.huggingface import load_policy
from plumbing.judges import (export_pairs, kept_comparison, length_controlled, prompt_text,
                             read_result, read_verdicts, save_result, write_comparison)
from plumbing.plots import plot_curves, plot_frontier
from plumbing.reading import check_path
from plumbing.rundir import read_config
from plumbing.tokenizer import load_tokenizer


# --- measuring ------------------------------------------------------------------------------------

def bootstrap_ci(values, clusters, *, seed=0, resamples=2000):
    """95 % interval of the mean of `values`, resampling whole clusters.   -> [low, high]"""
    names = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([names[cluster] for cluster in clusters])
    total = np.bincount(index, weights=values)
    size = np.bincount(index)
    draw = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = total[draw].sum(1) / size[draw].sum(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


@torch.no_grad()
def sampled_kl(policy, reference, rows, *, device="cpu", budget=4096):
    """sum_t KL(pi(.|s_t) || pi_ref(.|s_t)) over the response of each row.   -> (rows,) float64"""
    kl = np.zeros(len(rows))
    for part in data.token_batches(rows, budget):
        flat = data.flatten([rows[i] for i in part], device)
        where = (flat.ids, flat.positions, flat.lengths, flat.predict)
        p = torch.log_softmax(policy(*where).double(), -1)
        q = torch.log_softmax(reference(*where).double(), -1)
        per_token = (p.exp() * (p - q)).sum(-1)
        kl[part.start:part.stop] = flat.sums(per_token).cpu().numpy()
    return kl


def replies(policy, tokenizer, prompts, *, max_prompt_len=None, max_new_tokens=64, **how):
    """(texts, rows): a response to each prompt. how: temperature, top_p, seed, as in `generate`."""
    room = min(max_prompt_len or policy.context, policy.context - 8)      # 8 for the response
    encoded = [data.cut_left(tokenizer.prompt_ids(prompt), room, tokenizer.bos)
               for prompt in prompts]
    responses = policy.generate(encoded, eot=tokenizer.stops, max_new_tokens=max_new_tokens, **how)
    rows = [data.make_row(ids, response) for ids, response in zip(encoded, responses)]
    return [tokenizer.text(response) for response in responses], rows


def wins_of(scores, ref_scores):
    """1 where the policy's score is larger, 1/2 where they are equal."""
    return (scores > ref_scores) + 0.5 * (scores == ref_scores)


def wins_in_cells(scores, ref_scores, cells):
    """Each reply's chance to beat a reply of the reference in its cell.   (n,) x 3 -> (n,)

    Every reply of a cell meets every one of the reference: this halves the win rate's noise.
    """
    scores, ref_scores = np.asarray(scores), np.asarray(ref_scores)
    wins = np.zeros(len(scores))
    for cell in set(cells):
        here = [i for i, other in enumerate(cells) if other == cell]
        wins[here] = wins_of(scores[here][:, None], ref_scores[here]).mean(1)
    return wins


def margins(logps, ref_logps, desirable):
    """Mean log-ratios (nats) of desirable and undesirable rows; the share with the right sign."""
    ratios = logps - ref_logps
    liked = torch.tensor(desirable)
    means = [float(ratios[rows].mean()) if rows.any() else None for rows in (liked, ~liked)]
    margin = None if None in means else means[0] - means[1]
    right = torch.where(liked, ratios > 0, ratios < 0)
    return {"logratio_desirable": means[0], "logratio_undesirable": means[1], "margin": margin,
            "accuracy": float(right.double().mean()), "n": len(ratios)}


# --- the embedded world ---------------------------------------------------------------------------

def evaluate_world(policy, reference, tokenizer, *, part="report", n=480, seed=0, device="cpu",
                   sessions=False):
    """Judge n replies to held-out prompts.   -> what eval.json gets, and utilities"""
    prompts = world.eval_prompts(part, n)
    asked = in_sessions(prompts) if sessions else prompts
    # Each model has its own random numbers: with the same ones, equal models would always tie.
    own, rows = world_numbers(policy, tokenizer, prompts, asked, 2 * seed + 1)
    ref, _ = world_numbers(reference, tokenizer, prompts, asked, 2 * seed)
    utilities = own["utilities"]
    clusters = [world.parse_prompt(prompt) for prompt in prompts]
    wins = wins_in_cells(utilities, ref["utilities"], clusters)
    kl = sampled_kl(policy, reference, rows, device=device)
    best = world.optimum_at_kl(float(kl.mean()))
    return {"win_rate": float(wins.mean()), "win_rate_ci95": bootstrap_ci(wins, clusters),
            "reward_ci95": bootstrap_ci(utilities, clusters),
            "kl": float(kl.mean()), "kl_ci95": bootstrap_ci(kl, clusters), "n": n, "split": part,
            **own, "reward_ref_greedy": ref.pop("reward_greedy"),
            **{f"{name}_ref": value for name, value in ref.items()},
            "optimum_at_same_kl": {"reward": best.utility, "win_rate": best.win_rate,
                                   "beta": best.beta}}


def world_numbers(model, tokenizer, prompts, asked, seed):
    """(numbers about one model's replies, the replies as rows)."""
    texts, rows = replies(model, tokenizer, asked, seed=seed)
    greedy, _ = replies(model, tokenizer, asked[:96], temperature=0)
    verdicts = [world.judge(*pair) for pair in zip(prompts, texts)]
    utilities = [verdict.utility for verdict in verdicts]
    numbers = {"reward": np.mean(utilities),
               "reward_greedy": np.mean([world.utility(*pair) for pair in zip(prompts, greedy)]),
               "malformed": np.mean([verdict.malformed > 0 for verdict in verdicts]),
               "right": np.mean([verdict.right for verdict in verdicts]),
               "rude": np.mean([verdict.rude for verdict in verdicts]),
               "length": np.mean([len(tokenizer.encode(text)) for text in texts])}
    numbers = {name: float(value) for name, value in numbers.items()}
    return numbers | {"utilities": utilities}, rows


def in_sessions(prompts):
    """The same questions as conversations; every second one follows an earlier exchange."""
    return [tuple(formats.Turn(**message) for message in messages)
            for messages in world.in_sessions(prompts)]


def without_utilities(result):
    return {key: value for key, value in result.items() if not key.startswith("utilities")}


# --- a comparison: both models answer once, and every judge reads the same texts ------------------

def compare(out, record, models, files=(), *, n=200, seed=0, max_new_tokens=256, device="cpu"):
    """Write comparison.jsonl: one answer of each model to each held-out prompt.

    models: () -> (policy, reference, tokenizer). record: the run's config.json.
    -> [{"prompt", "reference", "policy"}, ...]
    """
    prompts, source = held_out_prompts(record, files, n, seed)
    policy, reference, tokenizer = models()
    print(f"{len(prompts)} prompts from {source}: both models answer once each", flush=True)
    room = dict(max_new_tokens=max_new_tokens, max_prompt_len=record["max_prompt_len"])
    before, _ = replies(reference, tokenizer, prompts, seed=2 * seed, **room)
    after, replied = replies(policy, tokenizer, prompts, seed=2 * seed + 1, **room)
    rows = [{"prompt": prompt, "reference": first, "policy": second}
            for prompt, first, second in zip(prompts, before, after)]
    budget = max(256, 2**20 // policy.vocab_size)
    kl = sampled_kl(policy, reference, replied, device=device, budget=budget)
    unknown = dict.fromkeys(("win_rate", "win_rate_ci95", "win_rate_length_controlled", "judge"))
    note = {"data": [str(file) for file in files], "source": source, "n": n, "seed": seed,
            "max_new_tokens": max_new_tokens, "sha256": write_comparison(out, rows)}
    save_result(out, read_result(out) | unknown | {"kl": float(kl.mean()), "n": 0,
                                                   "comparison": note})
    write_samples(out, prompts[:24], before, after, temperature=1)
    return rows


def held_out_prompts(record, files, n, seed):
    """(at most n distinct prompts, their source): from `files`, else eval_data, else data."""
    source = list(files or record["eval_data"] or record["data"])
    # A threshold separates good from bad responses; prompts do not depend on it.
    examples, _ = formats.read(source, columns=formats.parse_columns(record["columns"]),
                               threshold=record["threshold"] or 0.0, prompts=True)
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    if len(prompts) > n:
        drawn = np.random.default_rng(seed).permutation(len(prompts))[:n]
        prompts = [prompts[i] for i in sorted(drawn)]
    named = ", ".join(map(str, source))
    if not files and not record["eval_data"]:
        named += " (TRAINING prompts: the run has no --eval_data)"
    return prompts, named


def judge_comparison(out, record, rows, judge, name):
    """The win rate by a judge's scores. judge: from `rewards.load_reward`; name: its flag."""
    prompts = [row["prompt"] for row in rows]
    scores = np.array(judge(prompts, [row["policy"] for row in rows]))
    ref_scores = np.array(judge(prompts, [row["reference"] for row in rows]))
    wins = wins_of(scores, ref_scores)
    return keep_verdict(out, rows, wins, {
        "ties": int((wins == 0.5).sum()), "judge": Path(name).name,
        "score": float(scores.mean()), "score_ref": float(ref_scores.mean())})


def keep_verdict(out, rows, wins, facts):
    """Write the win rate to eval.json. wins: 1 policy, 0 reference, 1/2 tie."""
    longer = [len(row["policy"]) - len(row["reference"]) for row in rows]     # characters
    found = {"win_rate": float(np.mean(wins)),
             "win_rate_ci95": bootstrap_ci(wins, [row["prompt"] for row in rows]),
             "win_rate_length_controlled": length_controlled(wins, longer), "n": len(rows), **facts}
    result = read_result(out)
    for key in ("why_null", "score", "score_ref", "disagreement", "position_bias", "one_order"):
        result.pop(key, None)                             # from the judge before
    save_result(out, result | found)
    return found


def win_rate_lines(found):
    """A verdict as text, one fact per line."""
    shown = {key: round(fact, 3) if isinstance(fact, float) else fact
             for key, fact in found.items()}
    return "\n".join(f"  {key:<28}{fact}" for key, fact in shown.items())


# --- the end of a run: files, pictures, the printed summary ---------------------------------------

def write_samples(out, prompts, ref_texts, texts, scores=None, temperature=0.7):
    """samples.md: prompt, reference, policy, side by side; a score in front of each answer."""
    lines = [f"# Samples at temperature {temperature:g}", "", "| prompt | reference | policy |",
             "|---|---|---|"]
    for i, cells in enumerate(zip(map(prompt_text, prompts), ref_texts, texts)):
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        if scores:
            cells[1] = f"({scores[i][0]:+.1f}) {cells[1]}"
            cells[2] = f"({scores[i][1]:+.1f}) {cells[2]}"
        lines.append("| " + " | ".join(cells) + " |")
    (Path(out) / "samples.md").write_text("\n".join(lines) + "\n")


def draw_curves(out):
    """curves.png.   -> metrics.jsonl's lines"""
    metrics = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    plot_curves(metrics, Path(out) / "curves.png")
    return metrics


def report_world(judge, policy, reference, tokenizer, config, seconds, sessions=False):
    """eval.json, samples.md, two pictures, a summary. judge(policy, reference): evaluate_world."""
    clock = time.perf_counter()
    out = Path(config.out)
    result = judge(policy, reference)
    prompts = world.eval_prompts("report", 24)[:12]
    asked = in_sessions(prompts) if sessions else prompts
    texts, _ = replies(policy, tokenizer, asked, temperature=0.7, seed=config.seed)
    ref_texts, _ = replies(reference, tokenizer, asked, temperature=0.7, seed=config.seed)
    scores = [(world.utility(prompt, before), world.utility(prompt, after))
              for prompt, before, after in zip(prompts, ref_texts, texts)]
    write_samples(out, prompts, ref_texts, texts, scores)
    metrics = draw_curves(out)
    plot_frontier(result, out / "frontier.png", name=config.loss)
    seconds["evaluate"] = time.perf_counter() - clock
    save_result(out, without_utilities(result) | {"seconds": seconds})

    print(world_lines(result))
    raw = [line["z0_raw"] for line in metrics if line.get("z0_raw") is not None]
    if raw:
        clamped = np.mean([z0 <= 0 for z0 in raw])
        print(f"  z0 before the clamp              {raw[-1]:+.2f} at the last step; clamped to 0 "
              f"in {clamped:.0%} of the steps")
    print(f"""
One of the questions, answered at temperature 0.7 (utility in front):
  {prompts[0]}
    reference  ({scores[0][0]:+.1f}) {ref_texts[0]}
    policy     ({scores[0][1]:+.1f}) {texts[0]}

seconds: {', '.join(f'{what} {spent:.0f}' for what, spent in seconds.items())}
files:   {out}/ frontier.png, curves.png, samples.md, eval.json, metrics.jsonl, model/
next:    python evaluate.py {out} --prompt "{prompts[0]}"
         python train.py --loss bco      python train.py --help""", flush=True)


def world_lines(r):
    best = r["optimum_at_same_kl"]
    low, high = r["win_rate_ci95"]
    return f"""
What came out, on {r['n']} questions about 24 (device, problem) pairs that no stage has seen:
  win rate against the reference   {r['win_rate']:.3f} [{low:.3f}, {high:.3f}]   \
(0.5: no better; best at this KL {best['win_rate']:.3f})
  true utility per reply           {r['reward']:+.2f}   \
(reference {r['reward_ref']:+.2f}; best at this KL {best['reward']:+.2f}; perfect +3.50)
  KL(policy || reference)          {r['kl']:.2f} nats per reply
  the right fix                    {r['right']:.0%}   (reference {r['right_ref']:.0%})
  rude replies                     {r['rude']:.0%}   (reference {r['rude_ref']:.0%})
  malformed replies                {r['malformed']:.0%}   (reference {r['malformed_ref']:.0%})
  utility of the greedy reply      {r['reward_greedy']:+.2f}   \
(reference {r['reward_ref_greedy']:+.2f}; one reply to a prompt, so a noisy number)"""


def report_files(result, policy, reference, tokenizer, prompts, config, seconds):
    """The report of a run on files. It has no judge: margins on its rows, samples side by side."""
    out = Path(config.out)
    show = dict(temperature=0.7, seed=config.seed,
                max_new_tokens=max(1, min(128, config.max_len // 4)))
    texts, _ = replies(policy, tokenizer, prompts, **show)
    ref_texts, _ = replies(reference, tokenizer, prompts, **show)
    write_samples(out, prompts, ref_texts, texts)
    draw_curves(out)
    unknown = dict.fromkeys(("win_rate", "win_rate_ci95", "reward", "reward_ref", "kl"))
    why = "files bring no judge; samples.md has both models' answers"
    save_result(out, {**unknown, "n": 0, "why_null": why, **result, "seconds": seconds})
    for name, found in result.items():
        if found:
            print(f"{name} rows, log pi / pi_ref in nats:\n{win_rate_lines(found)}")
    print(f"""files:   {out}/ samples.md, curves.png, eval.json, metrics.jsonl, model/
next:    python evaluate.py {out} --prompt "..."
         python evaluate.py {out} --judge FOLDER     or --export_pairs pairs.jsonl""", flush=True)


def report_rewards(result, config, seconds):
    """The report of `--loss rm`: how often the reward model agrees with the annotator."""
    draw_curves(config.out)
    result = {name: found for name, found in result.items() if found}
    n = result.get("eval", result["train"])["n"]
    save_result(config.out, result | {"win_rate": None, "n": n, "seconds": seconds})
    for name, found in result.items():
        print(f"{name} pairs ({found['n']}): the chosen response has the larger reward in "
              f"{found['accuracy']:.1%}")
    print(f"files:   {config.out}/ eval.json, curves.png, metrics.jsonl, model/\n"
          f"next:    python train.py --loss ppo --reward {config.out}/model", flush=True)


TOLD = ("win_rate", "win_rate_ci95", "n", "judge", "reward", "reward_ref", "kl", "train", "eval")


def model_card(record, found):
    """README.md for model/, from config.json and eval.json. A path shows its last name only."""
    files = ", ".join(Path(file).name for file in record["data"]) or "the embedded help desk"
    base = Path(record["model"]).name or "a small GPT"
    loader = "AutoModelForCausalLM"
    if record["loss"] == "rm":
        loader = "AutoModelForSequenceClassification"
    elif record.get("save") == "adapter":
        loader = "AutoPeftModelForCausalLM"               # of peft
    origin = record.get("origin", {})
    settings = [f"{key} {value}" for key, value in record.items()
                if origin.get(key, "default") != "default" and isinstance(value, (int, float))]
    results = [f"- {key}: {found[key]}" for key in TOLD if found.get(key) is not None]
    tags = json.dumps(["nanokto", "preference-alignment", record["loss"]])
    return f"""---
library_name: transformers
tags: {tags}
---

# {base}, aligned with {record['loss']}

Trained with nanoKTO on {files}. Settings: {', '.join(settings)}.

{chr(10).join(results)}

Load it with `{loader}.from_pretrained(FOLDER)`. Made at commit {record.get('commit')}.
"""


# --- command line ---------------------------------------------------------------------------------

def main(argv):
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="a run's folder, out/kto")
    p.add_argument("--prompt", action="append", help="answer this, side by side (repeatable)")
    p.add_argument("--data", action="append", help="files to take prompts from (repeatable)")
    p.add_argument("--judge", help="a reward model's folder, or file.py:function")
    p.add_argument("--export_pairs", metavar="FILE", help="write blinded pairs")
    p.add_argument("--verdicts", metavar="FILE", help="read the verdicts on them")
    p.add_argument("--n", type=int, help="prompts at most (world 480, files 200)")
    p.add_argument("--max_new_tokens", type=int, help="64; comparisons 256")
    p.add_argument("--seed", type=int)
    p.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    check_path(args.run, f"run {args.run}")
    for path in filter(None, [args.judge, args.verdicts, args.export_pairs, *(args.data or ())]):
        check_path(path, path)
    record = run_config(args.run)
    if args.prompt:
        answer_prompts(args)
    elif record["task"] == "world":
        if args.data or args.judge or args.export_pairs or args.verdicts:
            raise SystemExit(f"{args.run}: a run on the embedded world, which is its own judge")
        result = evaluate_world(*load_run(args.run, args.device), device=args.device,
                                n=args.n or 480, seed=args.seed or 0,
                                sessions=record.get("source") == "sessions")
        print(json.dumps(without_utilities(result), indent=2))
    else:
        compare_and_judge(args, record)


def run_config(out):
    """config.json of a finished run."""
    if not (out / "model/config.json").is_file():
        raise SystemExit(f"{out}: no model/config.json there; expected the --out folder of a "
                         "finished run")
    return read_config(out, "run", task=str, ref=str, columns=str, data=list, eval_data=list,
                       max_prompt_len=int)


def load_run(out, device="cpu"):
    """(policy, reference, tokenizer) of a finished run."""
    reference = load_policy(run_config(out)["ref"], device=device, flag="ref")
    return load_policy(out / "model", device=device), reference, load_tokenizer(out / "model")


def answer_prompts(args):
    """Three answers of each model to each --prompt."""
    policy, reference, tokenizer = load_run(args.run, args.device)
    how = dict(temperature=0.7, seed=args.seed or 0, max_new_tokens=args.max_new_tokens or 64)
    for prompt in args.prompt:
        print(f"\n{prompt}")
        for name, model in (("reference", reference), ("policy", policy)):
            texts, _ = replies(model, tokenizer, [prompt] * 3, **how)
            for text in texts:
                print(f"  {name:>9} {text}")


def compare_and_judge(args, record):
    """Sample a comparison or read the stored one; judge it, export it, read verdicts on it."""
    judge = None
    if args.judge:                                        # before minutes of sampling
        judge = rewards.load_reward(args.judge, device=args.device, flag="judge")
    rows = comparison_for(args, record)
    if judge:
        print(win_rate_lines(judge_comparison(args.run, record, rows, judge, args.judge)))
    if args.export_pairs:
        export_pairs(args.run, rows, args.export_pairs)
        print(f"{args.export_pairs}: {2 * len(rows)} lines, each pair in both orders; answer each "
              "with {\"id\": ..., \"verdict\": \"a\", \"b\" or \"tie\"}")
    if args.verdicts:
        wins, facts = read_verdicts(args.run, rows, args.verdicts)
        facts["judge"] = f"verdicts in {Path(args.verdicts).name}"
        print(win_rate_lines(keep_verdict(args.run, rows, wins, facts)))
    print(f"files:   {args.run}/ comparison.jsonl, samples.md (side by side), eval.json")


def comparison_for(args, record):
    """The stored comparison, if it was sampled as the command line says; else a new one."""
    typed = {flag: getattr(args, flag) for flag in ("data", "n", "seed", "max_new_tokens")
             if getattr(args, flag) is not None}
    rows, note = kept_comparison(args.run)
    if not rows:
        return compare(args.run, record, lambda: load_run(args.run, args.device),
                       typed.pop("data", ()), device=args.device, **typed)
    for flag, value in typed.items():
        if note[flag] != value:
            raise SystemExit(f"--{flag} {value}: {args.run}/comparison.jsonl was sampled with "
                             f"{note[flag]}; delete it for another one")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])

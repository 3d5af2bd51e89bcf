"""Did it work? Win rate with an interval, true reward, KL, malformed replies, samples side by side.

What becomes a NUMBER is sampled at temperature 1, for the policy is that distribution. Samples to
LOOK at have temperature 0.7.

    win rate   P(u(policy's reply) > u(reference's)), a tie counts half; one reply each to a prompt
    interval   95 % bootstrap over CLUSTERS: held-out (device, problem) cells are drawn, not
               prompts, for four wordings of one problem are not four independent problems
    KL         KL(pi || pi_ref), nats per reply = E_{y ~ pi} sum_t KL(pi(.|s_t) || pi_ref(.|s_t)):
               next-token KLs are exact, only the prefixes s_t are sampled

    python evaluate.py out/kto                     measures a run on the embedded world again
    python evaluate.py out/kto --prompt "..."      reference and policy answer side by side
    python evaluate.py out/mine [--data FILE]      a run on files: both answer held-out prompts
    python evaluate.py out/mine --judge JUDGE      world, a reward model's folder, file.py:function
    python evaluate.py out/mine --export_pairs pairs.jsonl     blinded, for people or an LLM
    python evaluate.py out/mine --verdicts verdicts.jsonl      what they said (plumbing/judges.py)
    python evaluate.py out/seed0 out/seed1 ...     several runs on the embedded world in a table

Answers are sampled once and stay in comparison.jsonl: every judge reads the same texts. An LLM that
judges may be told, of each line of pairs.jsonl: "Here are a message and two answers to it. Which
answer is better: more helpful, harmless and concise? An answer is not better for being longer or
for coming first. Reply with one word: a, b or tie."
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
import rollouts
import world
from plumbing import formats
from plumbing.huggingface import load_policy
from plumbing.judges import (export_pairs, kept_comparison, length_controlled, prompt_text,
                             read_result, read_verdicts, save_result, write_comparison)
from plumbing.plots import plot_curves, plot_frontier
from plumbing.tokenizer import load_tokenizer


# --- measuring ------------------------------------------------------------------------------------

def bootstrap_ci(values, clusters, *, seed=0, resamples=2000):
    """95 % interval of the mean of `values`: whole clusters are drawn again.   -> (low, high)"""
    names = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([names[cluster] for cluster in clusters])
    total = np.bincount(index, weights=values)
    size = np.bincount(index)
    draw = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = total[draw].sum(1) / size[draw].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]


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
    """(texts, rows): a response to each prompt. A long prompt loses its left end.

    how: temperature, top_p and seed, as in `generate`.
    """
    room = min(max_prompt_len or policy.context, policy.context - 8)      # 8 for the response
    encoded = [cut_left(tokenizer.prompt_ids(prompt) or [tokenizer.eot], room, tokenizer.bos)
               for prompt in prompts]
    responses = policy.generate(encoded, eot=tokenizer.eot, max_new_tokens=max_new_tokens, **how)
    rows = [data.make_row(ids, response) for ids, response in zip(encoded, responses)]
    return [tokenizer.text(response) for response in responses], rows


def cut_left(ids, room, begin):
    """The last `room` tokens; `begin`, where the prompt starts with it, stays in front."""
    if len(ids) <= room:
        return ids
    kept = [*begin] if list(ids[:len(begin)]) == list(begin) else []
    return kept + ids[len(ids) - room + len(kept):]


def wins_of(scores, ref_scores):
    """1 where the policy's score is larger, 1/2 where they are equal."""
    return (scores > ref_scores) + 0.5 * (scores == ref_scores)


def in_sessions(prompts):
    """The same questions inside a conversation, every second one after an earlier exchange."""
    return [tuple(formats.Turn(**message) for message in messages)
            for messages in world.in_sessions(prompts)]


def evaluate_world(policy, reference, tokenizer, *, part="report", n=480, seed=0, device="cpu",
                   sessions=False):
    """The help desk's verdict on n replies to held-out prompts.   -> eval.json, and utilities"""
    prompts = world.eval_prompts(part, n)
    asked = in_sessions(prompts) if sessions else prompts
    # Other random numbers for each: with the same ones, equal models would always tie.
    own, rows = world_numbers(policy, tokenizer, prompts, asked, 2 * seed + 1)
    ref, _ = world_numbers(reference, tokenizer, prompts, asked, 2 * seed)
    utilities = np.array(own["utilities"])
    wins = wins_of(utilities, np.array(ref["utilities"]))
    kl = sampled_kl(policy, reference, rows, device=device)
    clusters = [world.cluster_of(prompt) for prompt in prompts]
    best = world.optimum_at_kl(float(kl.mean()))
    return {"win_rate": float(wins.mean()), "win_rate_ci95": bootstrap_ci(wins, clusters),
            "reward_ci95": bootstrap_ci(utilities, clusters),
            "kl": float(kl.mean()), "kl_ci95": bootstrap_ci(kl, clusters), "n": n, "split": part,
            **own, "reward_ref_greedy": ref.pop("reward_greedy"),
            **{f"{name}_ref": value for name, value in ref.items()},
            "optimum_at_same_kl": {"reward": best.utility, "win_rate": best.win_rate,
                                   "beta": best.beta}}


def world_numbers(model, tokenizer, prompts, asked, seed):
    """(what one model's replies are worth, the replies as rows)."""
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


def without_utilities(result):
    """What eval.json keeps: not every single reply's utility."""
    return {key: value for key, value in result.items() if not key.startswith("utilities")}


def margins(logps, ref_logps, desirable):
    """Mean log-ratios (nats) of desirable and undesirable rows, and the share on the right side."""
    ratios = logps - ref_logps
    liked = torch.tensor(desirable)
    means = [float(ratios[rows].mean()) if rows.any() else None for rows in (liked, ~liked)]
    margin = None if None in means else means[0] - means[1]
    right = torch.where(liked, ratios > 0, ratios < 0)
    return {"logratio_desirable": means[0], "logratio_undesirable": means[1], "margin": margin,
            "accuracy": float(right.double().mean()), "n": len(ratios)}


def margins_line(name, found):
    shown = ["none" if found[key] is None else f"{found[key]:+.3f}"
             for key in ("logratio_desirable", "logratio_undesirable", "margin")]
    return (f"{name} rows ({found['n']}): log pi/pi_ref of desirable {shown[0]}, of undesirable "
            f"{shown[1]}, margin {shown[2]} nats; {found['accuracy']:.1%} on the right side of 0")


# --- a comparison: both models answer once, and every judge reads the same texts ------------------

def compare(out, record, models, files=(), *, columns=None, device="cpu", **how):
    """One answer of each model to each held-out prompt, into comparison.jsonl.

    models: () -> (policy, reference, tokenizer). record: the run's config.json. how: n, seed,
    max_new_tokens. eval.json notes how the answers were sampled.
    -> [{"prompt", "reference", "policy", "lengths": [reference's, policy's], in characters}, ...]
    """
    of_world = record["task"] == "world"
    size = {"n": 480, "max_new_tokens": 64} if of_world else {"n": 200, "max_new_tokens": 256}
    how = {"seed": 0} | size | how
    prompts, source = held_out_prompts(record, files, columns, how)
    policy, reference, tokenizer = models()
    print(f"{len(prompts)} prompts from {source}: both models answer once each", flush=True)
    room = dict(max_new_tokens=how["max_new_tokens"], max_prompt_len=record["max_prompt_len"])
    before, _ = replies(reference, tokenizer, prompts, seed=2 * how["seed"], **room)
    after, replied = replies(policy, tokenizer, prompts, seed=2 * how["seed"] + 1, **room)
    rows = [{"prompt": prompt, "reference": first, "policy": second,
             "lengths": [len(first), len(second)]}
            for prompt, first, second in zip(prompts, before, after)]

    result = read_result(out)
    result.pop("judged", None)                            # a verdict on older texts
    if not of_world:
        result |= dict.fromkeys(("win_rate", "win_rate_ci95", "win_rate_length_controlled"))
        budget = max(256, 2**20 // policy.vocab_size)
        kl = sampled_kl(policy, reference, replied, device=device, budget=budget)
        result |= {"kl": float(kl.mean()), "judge": None, "n": 0}
    note = {"data": [str(file) for file in files], "source": source, **how}
    result["comparison"] = note | {"sha256": write_comparison(out, rows)}
    save_result(out, result)
    compared_samples(out, rows)
    return rows


def held_out_prompts(record, files, columns, how):
    """(distinct prompts, where from): of `files`, else eval_data, else data; or the world's.

    Of more than n a seeded draw is kept, in the file's order.
    """
    n = how["n"]
    if record["task"] == "world" and not files:
        return world.eval_prompts("report", n), "the world's report split"
    source = list(files or record["eval_data"] or record["data"])
    columns = formats.parse_columns(record["columns"] if columns is None else columns)
    # A threshold tells good from bad responses; no prompt depends on it.
    examples, _ = formats.read(source, columns=columns, threshold=record["threshold"] or 0.0,
                               prompts=True)
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    if len(prompts) > n:
        drawn = np.random.default_rng(how["seed"]).permutation(len(prompts))[:n]
        prompts = [prompts[i] for i in sorted(drawn)]
    named = ", ".join(map(str, source))
    if not files and not record["eval_data"]:
        named += " (TRAINING prompts: the run has no --eval_data)"
    return prompts, named


def judge_comparison(out, record, rows, judge, name):
    """A judge's scores (judge: of `rollouts.load_reward`; name: its text) become a win rate."""
    prompts = [row["prompt"] for row in rows]
    scores = np.array(judge(prompts, [row["policy"] for row in rows]))
    ref_scores = np.array(judge(prompts, [row["reference"] for row in rows]))
    wins = wins_of(scores, ref_scores)
    found = win_rates(wins, rows)
    found |= {"ties": int((wins == 0.5).sum()), "judge": Path(name).name,
              "score": float(scores.mean()), "score_ref": float(ref_scores.mean())}
    keep_verdict(out, record, found)
    compared_samples(out, rows, list(zip(ref_scores, scores)))
    return found


def win_rates(wins, rows):
    """What any judge adds to eval.json. wins: 1 policy, 0 reference, 1/2 tie."""
    clusters = []
    for row in rows:
        prompt = row["prompt"]
        cell = world.parse_prompt(prompt) if isinstance(prompt, str) else None
        clusters.append(cell or prompt)
    longer = [policy - reference for reference, policy in (row["lengths"] for row in rows)]
    return {"win_rate": float(np.mean(wins)), "win_rate_ci95": bootstrap_ci(wins, clusters),
            "win_rate_length_controlled": length_controlled(wins, longer), "n": len(rows)}


def keep_verdict(out, record, found):
    """A win rate goes to the top of eval.json; of a world run, which has its own, to "judged"."""
    result = read_result(out)
    if record["task"] == "world":
        result["judged"] = found
    else:
        for key in ("why_null", "score", "score_ref", "disagreement", "position_bias", "one_order"):
            result.pop(key, None)
        result |= found
    save_result(out, result)


def win_rate_lines(found):
    low, high = found["win_rate_ci95"]
    lines = [f"judge {found['judge']}, {found['n']} pairs, {found['ties']} ties (half a win each)",
             f"  win rate against the reference   {found['win_rate']:.3f} [{low:.3f}, {high:.3f}]"]
    labels = {"win_rate_length_controlled": "at equal lengths",
              "score": "mean score", "score_ref": "mean score of the reference",
              "one_order": "pairs judged in one order only",
              "disagreement": "verdicts change with the order",
              "position_bias": "share of the first place (0.5)"}
    for key, label in labels.items():
        if found.get(key) is not None:
            lines.append(f"  {label:<33}{round(found[key], 3)}")
    return "\n".join(lines)


# --- the end of a run: files, pictures, and what to tell ------------------------------------------

def write_samples(path, prompts, ref_texts, texts, scores=None, temperature=0.7):
    """samples.md: prompt, reference, policy, side by side; a score in front of each answer."""
    lines = [f"# Samples at temperature {temperature:g}", "", "| prompt | reference | policy |",
             "|---|---|---|"]
    for i, cells in enumerate(zip(prompts, ref_texts, texts)):
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        if scores:
            cells[1] = f"({scores[i][0]:+.1f}) {cells[1]}"
            cells[2] = f"({scores[i][1]:+.1f}) {cells[2]}"
        lines.append("| " + " | ".join(cells) + " |")
    Path(path).write_text("\n".join(lines) + "\n")


def compared_samples(out, rows, scores=None):
    some = rows[:24]
    write_samples(Path(out) / "samples.md", [prompt_text(row["prompt"]) for row in some],
                  [row["reference"] for row in some], [row["policy"] for row in some],
                  scores, temperature=1)


def read_metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def report_world(judge, policy, reference, tokenizer, config, seconds, sessions=False):
    """eval.json, samples.md, two pictures, and the end of the story.

    judge(policy, reference) -> `evaluate_world`'s result.
    """
    clock = time.perf_counter()
    out = Path(config.out)
    result = judge(policy, reference)
    prompts = world.eval_prompts("report", 24)[:12]
    asked = in_sessions(prompts) if sessions else prompts
    texts, _ = replies(policy, tokenizer, asked, temperature=0.7, seed=config.seed)
    ref_texts, _ = replies(reference, tokenizer, asked, temperature=0.7, seed=config.seed)
    scores = [(world.utility(prompt, before), world.utility(prompt, after))
              for prompt, before, after in zip(prompts, ref_texts, texts)]
    write_samples(out / "samples.md", prompts, ref_texts, texts, scores)
    metrics = read_metrics(out)
    plot_curves(metrics, out / "curves.png")
    plot_frontier(result, out / "frontier.png", name=config.loss)
    seconds["evaluate"] = time.perf_counter() - clock
    save_result(out, without_utilities(result) | {"seconds": seconds})

    print(world_lines(result))
    raw = [line["z0_raw"] for line in metrics if line.get("z0_raw") is not None]
    if raw:
        clamped = np.mean([z0 <= 0 for z0 in raw])
        print(f"  z0 before the clamp              {raw[-1]:+.2f} at the last step; clamped to 0 "
              f"in {clamped:.0%} of the steps")
    best = max(range(len(prompts)), key=lambda i: scores[i][1] - scores[i][0])
    print(f"""
One of the questions, answered at temperature 0.7 (utility in front):
  {prompts[best]}
    reference  ({scores[best][0]:+.1f}) {ref_texts[best]}
    policy     ({scores[best][1]:+.1f}) {texts[best]}

seconds: base model {seconds['base']:.0f}, alignment {seconds['align']:.0f}, \
evaluation {seconds['evaluate']:.0f}
files:   {out}/ frontier.png, curves.png, samples.md, eval.json, metrics.jsonl, model/
next:    python evaluate.py {out} --prompt "{prompts[0]}"
         python train.py --loss bco      python train.py --help""", flush=True)


def world_lines(r):
    best = r["optimum_at_same_kl"]
    low, high = r["win_rate_ci95"]
    u_low, u_high = r["reward_ci95"]
    return f"""
What came out, on {r['n']} questions about 24 (device, problem) pairs that no stage has seen:
  win rate against the reference   {r['win_rate']:.3f} [{low:.3f}, {high:.3f}]   \
(0.5: no better; the best policy at this KL: {best['win_rate']:.3f})
  true utility per reply           {r['reward']:+.2f} [{u_low:+.2f}, {u_high:+.2f}]   \
(reference {r['reward_ref']:+.2f}; best at this KL {best['reward']:+.2f}; perfect +3.50)
  KL(policy || reference)          {r['kl']:.2f} nats per reply
  right fix for the right device   {r['right']:.0%}   (reference {r['right_ref']:.0%})
  malformed replies                {r['malformed']:.1%}   (reference {r['malformed_ref']:.1%})
  length                           {r['length']:.1f} tokens   (reference {r['length_ref']:.1f})
  utility of the greedy reply      {r['reward_greedy']:+.2f}   \
(reference {r['reward_ref_greedy']:+.2f})"""


def report_files(result, policy, reference, tokenizer, prompts, config, seconds):
    """What a run on files leaves. Nobody judges it: margins on its rows, samples side by side."""
    clock = time.perf_counter()
    out = Path(config.out)
    show = dict(temperature=0.7, seed=config.seed,
                max_new_tokens=max(1, min(128, config.max_len // 4)))
    texts, _ = replies(policy, tokenizer, prompts, **show)
    ref_texts, _ = replies(reference, tokenizer, prompts, **show)
    write_samples(out / "samples.md", map(prompt_text, prompts), ref_texts, texts)
    plot_curves(read_metrics(out), out / "curves.png")
    seconds["evaluate"] = time.perf_counter() - clock
    unknown = dict.fromkeys(("win_rate", "win_rate_ci95", "reward", "reward_ref", "kl"))
    why = "files bring no judge; samples.md has both models' answers"
    save_result(out, {**unknown, "n": 0, "why_null": why, **result, "seconds": seconds})
    for name in ("train", "eval"):
        if result.get(name):
            print(margins_line(name, result[name]))
    print(f"""seconds: alignment {seconds['align']:.0f}, samples {seconds['evaluate']:.0f}
files:   {out}/ samples.md, curves.png, eval.json, metrics.jsonl, model/
next:    python evaluate.py {out} --prompt "..."
         python evaluate.py {out} --judge FOLDER     or --export_pairs pairs.jsonl""", flush=True)


def report_rewards(result, config, seconds):
    """What `--loss rm` leaves: how often the reward model agrees with the annotator."""
    out = Path(config.out)
    plot_curves(read_metrics(out), out / "curves.png")
    result = {name: found for name, found in result.items() if found}
    n = result.get("eval", result["train"])["n"]
    save_result(out, result | {"win_rate": None, "n": n, "seconds": seconds})
    for name, found in result.items():
        print(f"{name} pairs ({found['n']}): the chosen response has the larger reward in "
              f"{found['accuracy']:.1%}, by {found['margin']:+.2f} on average")
    print(f"files:   {out}/ eval.json, curves.png, metrics.jsonl, model/\n"
          f"next:    python train.py --loss ppo --reward {out}/model", flush=True)


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
    return "\n".join([
        "---", "library_name: transformers", f"tags: {tags}", "---", "",
        f"# {base}, aligned with {record['loss']}", "",
        f"Trained with nanoKTO on {files}. Settings: {', '.join(settings)}.", "", *results, "",
        f"Load it with `{loader}.from_pretrained(FOLDER)`. Made at commit {record.get('commit')}."
    ]) + "\n"


# --- command line ---------------------------------------------------------------------------------

def run_config(out):
    """config.json of a finished run."""
    out = Path(out)
    for file in ("config.json", "model/config.json"):
        if not (out / file).is_file():
            raise SystemExit(f"{out}: no {file} there; expected the --out folder of a finished run")
    return json.loads((out / "config.json").read_text())


def load_run(out, device="cpu"):
    """(policy, reference, tokenizer) of a finished run."""
    model = Path(out) / "model"
    reference = load_policy(run_config(out)["ref"], device=device, flag="ref")
    return load_policy(model, device=device), reference, load_tokenizer(model)


def summary(runs):
    """A markdown table of several world runs, and mean +- standard deviation over them."""
    heads = ["win rate", "best policy's win rate at this KL", "true utility",
             "best utility at this KL", "KL, nats", "malformed", "greedy utility"]
    lines = ["| run | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    table = []
    for run in runs:
        result = read_result(run)
        if "optimum_at_same_kl" not in result:
            raise SystemExit(f"{run}: no evaluation on the embedded world there")
        best = result["optimum_at_same_kl"]
        table.append([result["win_rate"], best["win_rate"], result["reward"], best["reward"],
                      result["kl"], result["malformed"], result["reward_greedy"]])
        cells = [f"{value:.3f}" for value in table[-1]]
        low, high = result["win_rate_ci95"]
        cells[0] += f" [{low:.3f}, {high:.3f}]"
        lines.append(f"| {Path(run).name} | " + " | ".join(cells) + " |")
    over_runs = zip(np.mean(table, 0), np.std(table, 0, ddof=1))
    cells = [f"{mean:.3f} +- {deviation:.3f}" for mean, deviation in over_runs]
    return "\n".join([*lines, "| mean +- sd | " + " | ".join(cells) + " |"])


def parser():
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run's folder, out/kto")
    p.add_argument("more", nargs="*", help="more runs (other seeds), for a table")
    p.add_argument("--prompt", action="append", help="answer this, side by side (repeatable)")
    p.add_argument("--data", action="append", help="files to take prompts from (repeatable)")
    p.add_argument("--columns", help="of --data: prompt=question,completion=answer")
    p.add_argument("--judge", help="world, a reward model's folder, or file.py:function")
    p.add_argument("--export_pairs", metavar="FILE", help="write blinded pairs")
    p.add_argument("--verdicts", metavar="FILE", help="read the verdicts on them")
    p.add_argument("--resample", action="store_true", help="replace the comparison that is kept")
    p.add_argument("--n", type=int, help="prompts at most (world 480, files 200)")
    p.add_argument("--max_new_tokens", type=int, help="64; comparisons of files 256")
    p.add_argument("--seed", type=int)
    p.add_argument("--device", default="cpu")
    return p


def main(argv):
    args = parser().parse_args(argv)
    if args.more:
        print(summary([args.run, *args.more]))
        return
    record = run_config(args.run)
    others_judge = args.data or args.judge or args.export_pairs or args.verdicts
    if args.prompt:
        answer_prompts(args, record)
    elif record["task"] == "world" and not others_judge:
        result = evaluate_world(*load_run(args.run, args.device), device=args.device,
                                n=args.n or 480, seed=args.seed or 0,
                                sessions=record.get("source") == "sessions")
        print(json.dumps(without_utilities(result), indent=2))
    else:
        compare_and_judge(args, record)


def answer_prompts(args, record):
    """Three answers of each model to each --prompt."""
    policy, reference, tokenizer = load_run(args.run, args.device)
    how = dict(temperature=0.7, seed=args.seed or 0, max_new_tokens=args.max_new_tokens or 64)
    for prompt in args.prompt:
        print(f"\n{prompt}")
        known = record["task"] == "world" and world.parse_prompt(prompt)
        for name, model in (("reference", reference), ("policy", policy)):
            texts, _ = replies(model, tokenizer, [prompt] * 3, **how)
            for text in texts:
                points = f"({world.utility(prompt, text):+.1f}) " if known else ""
                print(f"  {name:>9} {points}{text}")


def compare_and_judge(args, record):
    """Sample a comparison, or take the one that is kept; judge it, export it, read verdicts."""
    out = Path(args.run)
    judge = None
    if args.judge:                                        # before minutes of sampling
        judge = rollouts.load_reward(args.judge, device=args.device, flag="judge")
    rows = comparison_for(args, record)
    if judge:
        print(win_rate_lines(judge_comparison(out, record, rows, judge, args.judge)))
    if args.export_pairs:
        export_pairs(out, rows, args.export_pairs)
        print(f"{args.export_pairs}: {2 * len(rows)} lines, each pair in both orders; answer each "
              "with {\"id\": ..., \"verdict\": \"a\", \"b\" or \"tie\"}\n"
              f"next:    python evaluate.py {out} --verdicts VERDICTS.jsonl")
    if args.verdicts:
        wins, facts = read_verdicts(out, rows, args.verdicts)
        found = win_rates(wins, rows) | facts
        found["judge"] = f"verdicts in {Path(args.verdicts).name}"
        keep_verdict(out, record, found)
        print(win_rate_lines(found))
    print(f"files:   {out}/ comparison.jsonl, samples.md (side by side), eval.json\n"
          f"next:    python evaluate.py {out} --judge FOLDER or --export_pairs pairs.jsonl")


def comparison_for(args, record):
    """The kept comparison, if it was sampled as the command line says; or a new one."""
    out = Path(args.run)
    typed = {flag: getattr(args, flag) for flag in ("data", "n", "seed", "max_new_tokens")
             if getattr(args, flag) is not None}
    rows, note = kept_comparison(out)
    if rows and not args.resample:
        for flag, value in typed.items():
            if note[flag] != value:
                raise SystemExit(f"--{flag} {value}: {out}/comparison.jsonl was sampled with "
                                 f"{note[flag]}; --resample replaces it, and what was exported")
        print(f"{out}/comparison.jsonl: {len(rows)} pairs, sampled before (--resample: anew)")
        return rows
    if args.verdicts:
        raise SystemExit(f"--verdicts {args.verdicts}: {out} has no comparison of its present "
                         "model; --export_pairs FILE makes one, and the pairs to judge")
    files = typed.pop("data", ())
    return compare(out, record, lambda: load_run(out, args.device), files, columns=args.columns,
                   device=args.device, **typed)


if __name__ == "__main__":
    main(sys.argv[1:])

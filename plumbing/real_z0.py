"""Why does z0 rise on a real model, where the embedded world clamps it? Short runs of real.py's
training that differ from one of them in one thing, and real.py's policy asked about other texts.

    python -m plumbing.real_z0                       after `python real.py` and `python train.py`
    python -m plumbing.real_z0 "first 10 tokens"     one run of it; all go to results/real/z0.json

z0 is the mean of r(x, y') = log pi(y'|x) - log pi_ref(y'|x) over other prompts' responses y'.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import real
import train
import world
from objective import score
from plumbing import parallel, settings
from plumbing.fetched import once
from plumbing.formats import Feedback, parse
from plumbing.huggingface import load_policy
from plumbing.run import Run
from plumbing.sentiment import Lexicon, rated_texts
from plumbing.tokenizer import load_tokenizer

OUT = Path("out/real")
RESULT = Path("results/real/z0.json")
FILM = "movieReviewSnippets"
TRAINING = ["--lora", 8, "--lr", 1e-3, "--batch_size", 4, "--warmup", 4, "--max_len", 256,
            "--steps", 16, "--threshold", 0.3]


# --- rows: 32 answers to 16 prompts, 4 of each source, are what the others are compared with ----

def rows_of(prompts, answers):
    """The first answers to these prompts (positions), from the file of real.py's answers."""
    n = len(answers) // 2
    return [answers[i + n * k] for i in prompts for k in range(2)]


def as_real_py(answers):
    """What real.py trains on, a part of it."""
    return rows_of(range(16), answers)


def more_thumbs_up(answers):
    """The same rows; the thumb is up where the score is above 0, two thirds of them."""
    return [row | {"reward": float(row["reward"] > 0)} for row in as_real_py(answers)]


def fewer_thumbs_up(answers):
    """The same rows; the thumb is up where the score is above 0.68, a quarter of them."""
    return [row | {"reward": float(row["reward"] > 0.68)} for row in as_real_py(answers)]


def four_times_as_often(answers):
    """A quarter of the prompts, each row eight times."""
    return rows_of(range(4), answers)


def first_tokens(answers):
    """The same rows, of which ten tokens of the response remain."""
    tokenizer = load_tokenizer(OUT / "base")
    rows = []
    for row in as_real_py(answers):
        ids = tokenizer.encode(row["completion"])
        cut = row["truncated"] or len(ids) > 10
        rows.append(row | {"completion": tokenizer.text(ids[:10]), "truncated": cut})
    return rows


def whole_answers(answers):
    """Answers that came to their end within 40 tokens: the end-of-text is trained, too."""
    return [row for row in answers if not row["truncated"]][:32]


def one_family(answers):
    """Every prompt is about a film."""
    return sampled([FILM], 0.7)


def temperature_1(answers):
    """The same prompts, answered at temperature 1: the reference's own distribution."""
    return sampled(real.FORMS, 1.0)


def temperature_03(answers):
    """The same prompts, answered at temperature 0.3: texts that the reference finds very likely."""
    return sampled(real.FORMS, 0.3)


def by_people(answers):
    """The same prompts; the responses are people's texts from the same source, and their thumbs."""
    rng = np.random.default_rng(1)
    rows = []
    for source, row in zip(list(real.FORMS) * 16, by_prompt(as_real_py(answers))):
        texts = rated_texts(OUT / "texts")[source]
        for i in rng.choice(len(texts), 2, replace=False):
            text, rating = texts[i]
            rows.append(row | {"completion": text, "truncated": False,
                               "reward": float(rating > 0)})
    return rows


def by_prompt(rows):
    return rows[::2]


def sampled(sources, temperature):
    """Answers to 16 prompts of these sources, twice each."""
    rated, lexicon = rated_texts(OUT / "texts"), Lexicon(OUT / "texts")
    forms = {source: real.FORMS[source] for source in sources}
    # Another seed than real.py's: the same random numbers would give much the same answers.
    args = real.parser().parse_args(["--temperature", str(temperature), "--seed", "5"])
    prompts = real.make_prompts(rated, 16, 0, forms)
    file = OUT / "z0" / f"answers-{len(forms)}-t{temperature:g}.jsonl"
    once(file, lambda beside: real.write_answers(beside, OUT / "base", prompts, lexicon, args))
    return rows_of(range(16), read(file))


VARIANTS = {"as real.py": as_real_py,
            "more thumbs up": more_thumbs_up,
            "fewer thumbs up": fewer_thumbs_up,
            "people's texts": by_people,
            "each row 8 times": four_times_as_often,
            "temperature 0.3": temperature_03,
            "temperature 1": temperature_1,
            "whole answers": whole_answers,
            "first 10 tokens": first_tokens,
            "films alone": one_family}


def read(file):
    return [json.loads(line) for line in open(file)]


# --- a run --------------------------------------------------------------------------------------

def short_run(name, rows):
    """16 steps on these rows.   -> their log, and at the end r of every row, in nats"""
    folder = OUT / "z0" / name.replace(" ", "-").replace("'", "")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", OUT / "base", "--data", file, *TRAINING, "--out", folder, "--overwrite"]
    run = Run(settings.parse([str(word) for word in words]))
    run.config.init = run.config.ref = run.config.model
    run.find_models()
    run.read()
    parallel.join(run.config.device, run.config.timeout)
    run.prepare_units()
    run.count_steps()
    run.start()
    run.record()
    run.prepare_folder(0)
    objective = run.begin_stage(0, 0)
    train.train(run, objective, 0, 0)
    r = score(run.policy, run.units, name) - objective.reference.table
    return summary(read(folder / "metrics.jsonl"), run.hyper["beta"]) | scatter(run.units, r)


def scatter(units, r):
    """r of each row under its own prompt, and of its partner's response under this prompt."""
    places = {unit[0].where: i for i, unit in enumerate(units)}
    return {"desirable_rows": [unit[0].desirable for unit in units],
            "r_own_prompt": r[:, 0].tolist(), "r_other_prompt": r[:, 1].tolist(),
            "partner": [places[unit[1].where] for unit in units]}


def world_run(out=Path("out/kto")):
    """The same of the main job, as `python train.py` leaves it: 256 of its thumbs."""
    policy, reference, tokenizer = evaluate.load_run(out)
    thumbs = world.thumbs(world.pairs(world.N_PAIRS, seed=0), seed=0)
    examples = [Feedback(t["prompt"], t["completion"], t["label"], where=f"thumb {i}")
                for i, t in enumerate(thumbs[:256])]
    units, _ = data.encode(examples, tokenizer, max_len=policy.context)
    units = data.mismatched_units(units, seed=0, max_len=policy.context)
    r = score(policy, units) - score(reference, units)
    return summary(read(out / "metrics.jsonl")[::10], beta=0.5) | scatter(units, r)


# --- what real.py trained, asked about other texts ----------------------------------------------

def ask(answers):
    """{whose texts under whose prompts: r = log pi - log pi_ref}, 16 rows each."""
    seen = by_prompt(as_real_py(answers))
    fresh = by_prompt(sampled(real.FORMS, 0.7))
    at_1 = by_prompt(temperature_1(answers))
    sets = {"trained answers, own prompts": (seen, seen),
            "trained answers, another prompt of the source": (seen, seen[4:] + seen[:4]),
            "trained answers, a prompt of another source": (seen, seen[1:] + seen[:1]),
            "fresh answers, own prompts": (fresh, fresh),
            "fresh answers, another prompt of the source": (fresh, fresh[4:] + fresh[:4]),
            "fresh answers at temperature 1, own prompts": (at_1, at_1),
            "people's texts": (seen, by_prompt(by_people(answers)))}
    tokenizer = load_tokenizer(OUT / "base")
    units = {name: mismatched(tokenizer, *both) for name, both in sets.items()}
    after = log_probs(load_policy(OUT / "kto" / "model"), units)
    before = log_probs(load_policy(OUT / "base"), units)
    found = {}
    for name in units:
        r = after[name] - before[name]
        tokens = sum(row.length for row, in units[name])
        found[name] = {"mean": float(r.mean()), "error": float(r.std() / len(r) ** 0.5),
                       "per_token": float(r.sum()) / tokens}
    return found


def mismatched(tokenizer, rows, partners):
    """The prompts of `rows` with the responses of `partners`, as units of one row."""
    units = []
    for row, partner in zip(rows, partners):
        both = row | {"completion": partner["completion"], "truncated": partner["truncated"]}
        _, examples = parse(both, "row", threshold=0.3)
        units += data.encode(examples, tokenizer, max_len=256)[0]
    return units


@torch.no_grad()
def log_probs(policy, units):
    return {name: score(policy, found, name)[:, 0] for name, found in units.items()}


def summary(lines, beta):
    """What notebook 08 shows of a run's log: z0 and the log-ratios of both classes, in nats."""
    found = {key: [line[key] for line in lines] for key in ("step", "z0_raw")}
    for name, reward in (("desirable", "rewards/chosen"), ("undesirable", "rewards/rejected")):
        rewards = [line[reward] for line in lines]       # None: none of this class in the batch
        found[name] = [None if value is None else value / beta for value in rewards]
    return found


def rounded(found):
    """A ten-thousandth of a nat is more than is known."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return round(found, 4) if isinstance(found, float) else found


def main(names):
    answers = read(next(OUT.glob("answers-seed0-*-t0.7.jsonl")))
    for name in names or [*VARIANTS, "world", "partners"]:
        found = {"runs": {}}
        if RESULT.is_file():
            found = json.loads(RESULT.read_text())
        if name == "partners":
            found["partners"] = ask(answers)
        elif name == "world":
            found["world"] = world_run()
        else:
            make = VARIANTS[name]
            about = " ".join(make.__doc__.split())
            found["runs"][name] = {"about": about} | short_run(name, make(answers))
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(rounded(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

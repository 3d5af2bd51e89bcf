"""A small laboratory: two tiny models, three small files, and what tests do with them.

    lab/rows.jsonl       27 labelled rows on 7 prompts
    lab/pairs.jsonl      26 pairs of uneven lengths, with scores and win probabilities
    lab/sessions.jsonl   26 pairs of conversations of two exchanges, with segments
    lab/judge.py         a reward for responses that the policy writes
    lab/ref              a random GPT over bytes, float64
    lab/moved            the same after 15 steps of SFT: z0 is well above 0 there
"""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import model
import recipes
import train
from objective import Preferences
from plumbing.formats import Feedback, read
from plumbing.settings import Config
from plumbing.tokenizer import load_tokenizer

ROOT = Path(train.__file__).parent
WORDS = "sun moon rain wind leaf stone river cloud bird snow".split()
REWARD = """
def reward(prompts, responses):
    return [text.count("e") - 0.02 * len(text) for text in responses]
"""
FILES = {"pairs": "pairs.jsonl", "sessions": "sessions.jsonl"}


# --- the data and the models --------------------------------------------------------------------

def make_lab(folder):
    rng = np.random.default_rng(0)
    records = []
    for i in range(27):
        words = WORDS[:5] if i % 3 else WORDS[5:]
        records.append({"prompt": f"say {WORDS[i % 7]}: ",
                        "completion": " ".join(rng.choice(words, size=1 + i % 4)),
                        "label": bool(i % 3)})
    write_rows(folder / "rows.jsonl", records)
    (folder / "judge.py").write_text(REWARD)
    torch.manual_seed(0)
    policy = model.GPT(model.GPTConfig(257, 64, 2, 2, 32)).double()
    policy.save(folder / "ref", eot=256)
    fine_tune(policy, [Feedback(r["prompt"], r["completion"], True) for r in records])
    policy.save(folder / "moved", eot=256)
    return make_pairs(folder)


def fine_tune(policy, examples):
    config = Config(dtype="fp64", steps=15, lr=2e-3, batch_size=9)
    units, _ = data.encode(examples, load_tokenizer(), max_len=64)
    objective = Preferences(recipes.token_nll_loss, {}, units, None, batch_size=9, seed=0,
                            trained=1)
    optimizer = train.make_optimizer(policy, config)
    for step in range(config.steps):
        train.train_step(policy, objective, optimizer, step, config)


def make_pairs(folder):
    rng = np.random.default_rng(1)
    records, sessions = [], []
    for i in range(26):
        pair = {"prompt": f"say {WORDS[i % 6]}: ",
                "chosen": " ".join(rng.choice(WORDS[:5], size=1 + i % 4)),
                "rejected": " ".join(rng.choice(WORDS[5:], size=1 + i % 3))}
        talks = {side: [turn("assistant", pair[side][:3]), turn("user", "?"),
                        turn("assistant", pair[side][2::-1])] for side in ("chosen", "rejected")}
        sessions.append({"prompt": [turn("user", pair["prompt"][4:6])],
                         "segment": {"start": i % 2, "end": 1 + i % 2}, **talks})
        records.append({**pair, "score_chosen": 2.0 + i % 5, "score_rejected": 1.0,
                        "win_prob_chosen": 0.8, "win_prob_rejected": 0.3})
    write_rows(folder / "pairs.jsonl", records)
    write_rows(folder / "sessions.jsonl", sessions)
    return folder


def turn(role, text):
    return {"role": role, "content": text}


def read_rows(file):
    return [json.loads(line) for line in open(file)]


def write_rows(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read_units(lab, file="pairs.jsonl", tokenizer=None):
    """The units of a file, as a run has them before the loss is known."""
    examples, _ = read([str(lab / file)])
    return data.encode(examples, tokenizer or load_tokenizer(), max_len=64)[0]


def load(lab, name):
    return model.GPT.from_pretrained(lab / name, dtype=torch.float64)


def tiny_llama(folder, texts):
    """A random Llama with a byte-level BPE tokenizer: end-of-text, no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- the same numbers from their definitions ----------------------------------------------------

def batch_of(units, step=0):
    """The units of a step of the runs below."""
    return [units[i] for i in data.batch_rows(len(units), 8, seed=3, step=step)]


def log_softmax(policy, row):
    """Next-token log-probs at each position that predicts a counted token, one forward per row."""
    ids = torch.tensor(row.ids.tolist())
    logits = policy(ids, torch.arange(len(ids)), [len(ids)])
    return logits.log_softmax(-1)[np.flatnonzero(row.mask) - 1]


def log_prob(policy, row):
    """log pi(y|x), with gradient.   ()"""
    said = row.ids[np.flatnonzero(row.mask)]
    return log_softmax(policy, row)[range(len(said)), said].sum()


def log_ratio(policy, reference, row):
    with torch.no_grad():
        return float(log_prob(policy, row) - log_prob(reference, row))


# --- runs ---------------------------------------------------------------------------------------

def flags(lab, out, *more, loss="kto", steps=6):
    """A short float64 run from `moved` against `ref`, on the file that the loss learns from.

    A flag in `more` wins over the same one here: argparse keeps the last.
    """
    file = FILES.get(recipes.find(loss).learns_from, "rows.jsonl")
    if loss == "spin":                                       # its prompts are those of the pairs
        file = "pairs.jsonl"
    if recipes.find(loss).online or "--online" in more:      # 3 responses to each of 7 prompts
        more = ("--reward", f"{lab / 'judge.py'}:reward", "--group", 3, *more)
    return ["--loss", loss, "--data", lab / file, "--init", lab / "moved", "--ref", lab / "ref",
            "--dtype", "fp64", "--max_len", 64, "--batch_size", 8, "--steps", steps,
            "--lr", "1e-3", "--seed", 3, "--out", out, *more]


def run(*words):
    """train.main in this process; numbers and paths may be given as they are."""
    train.main([str(word) for word in words])


def without_report(monkeypatch):
    """What comes after the last step takes longer than our few steps, and is tested elsewhere."""
    def report(result, policy, reference, tokenizer, prompts, config, seconds):
        (Path(config.out) / "eval.json").write_text(json.dumps(result))

    monkeypatch.setattr(evaluate, "report_files", report)
    monkeypatch.setattr(evaluate, "model_card", lambda record, found: "")


def first_loss(*words):
    """The loss of the first step of a run."""
    run(*words, "--steps", 1)
    return metrics(words[words.index("--out") + 1])[0]["loss"]


class Died(Exception):
    pass


@contextmanager
def dies_at(step):
    """The run in here dies, without a word, as it begins its step number `step`."""
    real, begun = train.train_step, []

    def train_step(*args, **how):
        if len(begun) == step:
            raise Died
        begun.append(step)
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(train, "train_step", train_step)
        yield


def torchrun(processes, *words, script=ROOT / "train.py", **how):
    """The same in processes of its own.   -> the finished subprocess, its output as text"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", processes, script, *words]
    how = {"timeout": 300, **how}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **how)


def metrics(out):
    return read_rows(Path(out) / "metrics.jsonl")


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)

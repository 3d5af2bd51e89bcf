"""Did it work? Win rate against the reference with an interval, true reward, KL, malformed replies, samples side by side.

Everything that is a NUMBER is sampled at temperature 1, since the policy is that distribution (KL and reward at another
temperature belong to another policy); samples for SHOW use temperature 0.7.

    win rate   P(u(policy's reply) > u(reference's reply)), a tie counts half; one reply each to the same prompt
    interval   95 % bootstrap over CLUSTERS: the held-out (device, problem) pairs are resampled, not the prompts, since four
               wordings of one problem are not four independent problems
    KL         KL(pi || pi_ref) in nats per reply = E_{y ~ pi} sum_t KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)): each next-token
               KL is exact, only the prefixes are sampled. Same mean as the samples' log-ratios, and never below 0

    python evaluate.py out/kto                                measures a run on the embedded world again
    python evaluate.py out/kto --prompt "..."                 reference and policy answer side by side
    python evaluate.py out/mine [--data FILE]                 a run on files: both answer held-out prompts, once; comparison.jsonl
    python evaluate.py out/mine --judge JUDGE                 win rate: JUDGE is world, a reward model's folder, or file.py:function
    python evaluate.py out/mine --export_pairs pairs.jsonl    blinded pairs, each in both orders, for people or an LLM
    python evaluate.py out/mine --verdicts verdicts.jsonl     their verdicts: a line {"id": ..., "verdict": "a", "b" or "tie"} each
    python evaluate.py out/seed0 out/seed1 ...                several runs on the embedded world in a table

The texts of a comparison are sampled once and stay in the run's folder, so that every judge speaks of the same ones. To an LLM
that judges (GPT-4 in the KTO paper, asked for the more helpful, harmless and concise answer) one may say, per line of pairs.jsonl:

    Here are a message and two answers to it. Which answer is better: more helpful, harmless and concise? An answer is not better
    for being longer or for coming first. Reply with one word: a, b or tie.
    Message: {prompt}      Answer a: {a}      Answer b: {b}
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                             # as in train.py: waiting threads sleep, before torch is loaded

import numpy as np
import torch

import data
import dpo_variants
import kto
import world
from data import Turn, flatten, load_tokenizer, make_row, token_batches
from model import load_policy, read_model_config, weight_files


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


def replies(policy, tokenizer, prompts, *, temperature=1.0, top_p=1.0, seed=0, max_new_tokens=64, max_prompt_len=None):
    """(texts, rows): a response to each prompt, as text and as a row that can be scored. A long prompt loses its left end."""
    ids, room = [tokenizer.prompt_ids(p) or [tokenizer.eot] for p in prompts], min(max_prompt_len or policy.context, policy.context - 8)
    ids = [p if len(p) <= room else _cut_left(p, room, tokenizer.bos) for p in ids]
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


def _cut_left(ids, room, keep=()):
    """The last `room` tokens, but a beginning-of-text that stands in front stays there."""
    n = len(keep) if list(ids[:len(keep)]) == list(keep) else 0
    return [*ids[:n], *ids[len(ids) - room + n:]]


def write_samples(path, prompts, reference_texts, policy_texts, scores=None, temperature=0.7):
    """samples.md: prompt, reference, policy, side by side."""
    lines = [f"# Samples at temperature {temperature:g}", "", "| prompt | reference | policy |", "|---|---|---|"]
    for i, row in enumerate(zip(prompts, reference_texts, policy_texts)):
        p, r, y = (" ".join(t.replace("|", "\\|").split()) for t in map(str, row))
        if scores:
            r, y = f"({scores[i][0]:+.1f}) {r}", f"({scores[i][1]:+.1f}) {y}"
        lines.append(f"| {p} | {r} | {y} |")
    Path(path).write_text("\n".join(lines) + "\n")


def prompt_text(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(f"{t.role}: {t.content}" for t in prompt)


# --- judges: scores for responses ---------------------------------------------------------------------------------------

def load_judge(text, *, device="cpu", flag="judge"):
    """judge(prompts, responses) -> list of floats, higher is better: what `find_judge` finds, its scores checked for number and finiteness.

    prompts are texts or tuples of data.Turn. SystemExit with one line that names --`flag` where it gives no usable scores.
    """
    score, said = find_judge(text, device=device, flag=flag), f"--{flag} {text}"

    def judge(prompts, responses):
        prompts, responses = list(prompts), list(responses)
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; a judge scores one response to each prompt")
        scores = score(prompts, responses) if prompts else []
        try:
            scores = [float(s) for s in scores]
        except (TypeError, ValueError):
            raise SystemExit(f"{said}: gave {str(scores)[:60]!r}; expected a list of {len(prompts)} numbers") from None
        if len(scores) != len(prompts):
            raise SystemExit(f"{said}: {len(scores)} scores for {len(prompts)} responses; expected one number for each")
        if (i := next((i for i, s in enumerate(scores) if not np.isfinite(s)), None)) is not None:
            raise SystemExit(f"{said}: the score of response {i} is {scores[i]}; expected finite numbers ({responses[i][:60]!r})")
        return scores

    return judge


def find_judge(text, *, device="cpu", flag="judge"):
    """(prompts, responses) -> scores, unchecked: of a comparison's judge, or PPO's reward.

    text    `world`: true utility of the embedded help desk, in points; FOLDER: a reward model in Hugging Face format;
            `file.py:function`: a Python function of the same signature
    SystemExit with one line that names --`flag` where there is no such judge.
    """
    (file, _, name), said = text.rpartition(":"), f"--{flag} {text}"
    if text == "world":
        return _world_judge(said)
    if file.endswith(".py"):
        return _python_judge(file, name, said)
    if Path(text).is_dir():
        return _reward_model(text, device, flag)
    raise SystemExit(f"{said}: no such judge; valid are world, the folder of a reward model, or file.py:function")


def _world_judge(said):
    def score(prompts, responses):
        for p in prompts:
            if not isinstance(p, str) or world.parse_prompt(p) is None:
                raise SystemExit(f"{said}: knows the help desk's questions only, not {prompt_text(p)[:60]!r}; valid are a folder or file.py:function")
        return [world.utility(p, r) for p, r in zip(prompts, responses)]

    return score


def _python_judge(file, name, said):
    if not Path(file).is_file():
        raise SystemExit(f"{said}: no such file")
    spec = importlib.util.spec_from_file_location("judge_" + Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)                        # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise SystemExit(f"{said}: {file} cannot be imported: {type(e).__name__}: {' '.join(str(e).split())}") from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == spec.name]
        raise SystemExit(f"{said}: {file} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function                                                      # an error inside it keeps its traceback


def _reward_model(folder, device, flag):
    """score(prompts, responses): the one logit of AutoModelForSequenceClassification, float32.

    A conversation goes through the tokenizer's chat template (a text is its user's turn), or, without one, prompt and response
    are joined. What is too long loses its left end, the question rather than the answer. As in training, a text that spells a
    control token stays text: a policy that learns to write one cannot end its own turn before the judge.
    """
    read_model_config(folder, flag), weight_files(folder, flag)
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error(), logging.disable_progress_bar()
    local = dict(local_files_only=True)
    try:
        if (labels := AutoConfig.from_pretrained(folder, **local).num_labels) != 1:
            raise SystemExit(f"--{flag} {folder}: num_labels is {labels}; a reward model has 1, a number that is higher for a better response")
        lm, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local)
        own = (Path(folder) / "tiktoken.json").is_file()
        tokenizer = load_tokenizer(folder) if own else AutoTokenizer.from_pretrained(folder, **local)
    except Exception as e:                                                          # transformers, safetensors and tokenizers have many of their own
        raise SystemExit(f"--{flag} {folder}: cannot be loaded as a reward model: {' '.join(str(e).split())[:300]}") from None
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:                                                        # transformers would draw them at random and go on
        raise SystemExit(f"--{flag} {folder}: no weights for {sorted(info['missing_keys'])[0]}; is it a causal LM without a reward head?")
    lm = lm.eval().to(device)
    limits = [getattr(lm.config, "max_position_embeddings", None), None if own else tokenizer.model_max_length]
    room, pad = min(x for x in (*limits, 2**20) if x), lm.config.pad_token_id
    first = [] if own else [t for t in (tokenizer.bos_token_id, tokenizer.cls_token_id) if t is not None][:1]

    def encode(prompt, response):
        if own:
            return tokenizer.prompt_ids(prompt) + tokenizer.encode(response) + [tokenizer.eot]
        if not tokenizer.chat_template:                                             # conversations: the same plain form as in data.py
            text = prompt if isinstance(prompt, str) else "".join(f"{t.role.capitalize()}:\n{t.content}\n\n" for t in prompt) + "Assistant:\n"
            return tokenizer(text + response, split_special_tokens=True).input_ids
        turns = [data.Turn("user", prompt)] if isinstance(prompt, str) else list(prompt)
        turns = {f"\u27e6{i}:content\u27e7": t for i, t in enumerate([*turns, data.Turn("assistant", response)])}
        try:
            text = tokenizer.apply_chat_template([{"role": t.role, "content": m} for m, t in turns.items()], tokenize=False)
        except Exception as e:                                                      # jinja's own errors, and transformers'
            raise SystemExit(f"--{flag} {folder}: its chat template refuses roles {', '.join(t.role for t in turns.values())}: {' '.join(str(e).split())}") from None
        pieces = re.split("(" + "|".join(map(re.escape, turns)) + ")", text)
        if lost := [t.role for m, t in turns.items() if pieces.count(m) != 1]:                              # all responses would score alike
            raise SystemExit(f"--{flag} {folder}: its chat template loses or repeats the {lost[-1]}'s message")
        return [t for piece in pieces for t in tokenizer(turns[piece].content if piece in turns else piece, add_special_tokens=False,
                                                         split_special_tokens=piece in turns).input_ids]

    @torch.no_grad()
    def score(prompts, responses):
        rows = [encode(p, r) or [0] for p, r in zip(prompts, responses)]
        rows = [torch.tensor(ids if len(ids) <= room else _cut_left(ids, room, first)) for ids in rows]
        if (largest := max(int(ids.max()) for ids in rows)) >= lm.config.vocab_size:
            raise SystemExit(f"--{flag} {folder}: its tokenizer gives token {largest}, its embedding has {lm.config.vocab_size}: tokenizer and model do not belong together")
        scores, order = torch.zeros(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i]))            # by length: little padding
        size = 1 if pad is None else 16                        # without a pad token transformers cannot tell where a padded row ends
        for part in (order[k:k + size] for k in range(0, len(order), size)):
            ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in part], batch_first=True, padding_value=pad or 0)
            real = torch.arange(ids.shape[1]) < torch.tensor([[len(rows[i])] for i in part])
            scores[part] = lm(input_ids=ids.to(device), attention_mask=real.long().to(device)).logits[:, 0].float().cpu()
        return scores.tolist()

    return score


# --- from scores and verdicts to win rates ----------------------------------------------------------------------------

def length_controlled(wins, differences, *, ridge=1e-3):
    """The win rate at equal lengths: sigmoid(a), with P(win) = sigmoid(a + b tanh(d / std(d))) fitted to all pairs.

    Paper: Dubois, Galambosi, Liang, Hashimoto 2024, Length-Controlled AlpacaEval, arXiv 2404.04475
    wins (n,): 1, 0 or what lies between (a tie is 1/2); differences d (n,): policy's length minus reference's. d is scaled and
    not centred, since 0 must go on meaning equal lengths. Departures: no term for the difficulty of each instruction, which
    takes the verdicts on many models to estimate, and so no pull towards a baseline either.
    Newton's method on the log-likelihood minus ridge/2 (a^2 + b^2). Where length alone decides, or one side wins everything, the
    likelihood has no maximum and the ridge keeps it finite; against n pairs, each worth up to 1/4, it is otherwise nothing.
    None where all differences are the same but not 0: what is due to length cannot be told then.
    """
    y, d = np.asarray(wins, float), np.asarray(differences, float)
    if d.std() == 0:
        return None if d.any() else float(y.mean())
    x, w = np.stack([np.ones_like(d), np.tanh(d / d.std())], 1), np.zeros(2)

    def loss(w):
        return (np.logaddexp(0, x @ w) - y * (x @ w)).sum() + ridge / 2 * w @ w

    for _ in range(100):
        p = 0.5 * (1 + np.tanh(x @ w / 2))                                         # sigma, without exp's overflow
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + ridge * np.eye(2), x.T @ (p - y) + ridge * w)
        while loss(w - step) > loss(w):                                            # a flat tail asks for too long a step
            step /= 2
        w = w - step
        if np.abs(step).max() < 1e-12:
            break
    return float(0.5 * (1 + np.tanh(w[0] / 2)))


def win_rates(wins, rows):
    """The part of eval.json that any judge fills in. wins: 1 policy, 0 reference, 1/2 tie, one for each row of a comparison."""
    clusters = [world.parse_prompt(r["prompt"]) or r["prompt"] if isinstance(r["prompt"], str) else r["prompt"] for r in rows]
    return {"win_rate": float(np.mean(wins)), "win_rate_ci95": bootstrap_ci(wins, clusters),
            "win_rate_length_controlled": length_controlled(wins, [r["lengths"][1] - r["lengths"][0] for r in rows]), "n": len(rows)}


# --- a comparison: both models answer once, and every judge reads the same texts --------------------------------------

def held_out_prompts(config, files=(), *, n, seed=0, split="report", columns=None):
    """(prompts, examples, where from) for a run: from `files`, else its eval_data, else the data it was trained on; or the world's.

    Prompts are distinct; of more than n a seeded draw of n is kept, in the file's order. examples: the rows of these prompts.
    """
    if config["task"] == "world" and not files:
        return world.eval_prompts(split, n), [], f"the world's {split} split"
    source = list(files or config["eval_data"] or config["data"])
    columns = data.parse_columns(config["columns"] if columns is None else columns)
    threshold = 0.0 if config["threshold"] is None else config["threshold"]                         # no prompt depends on it
    examples, _ = data.read(source, columns=columns, threshold=threshold, prompts=True)
    prompts = list(dict.fromkeys(e.prompt for e in examples))
    if len(prompts) > n:
        prompts = [prompts[i] for i in sorted(np.random.default_rng(seed).permutation(len(prompts))[:n])]
    kept = set(prompts)
    trained_on = not files and not config["eval_data"]
    return prompts, [e for e in examples if e.prompt in kept], ", ".join(map(str, source)) + " (TRAINING prompts: the run has no --eval_data)" * trained_on


def compare(out, config, models, files=(), *, n=None, temperature=1.0, top_p=1.0, seed=0, max_new_tokens=None, split="report",
            columns=None, device="cpu"):
    """One response of each model to each held-out prompt, into comparison.jsonl; `eval.json` says how they were sampled.

    models: () -> (policy, reference, tokenizer); config: the content of the run's config.json.
    -> [{"prompt", "reference", "policy", "lengths": [reference's, policy's], characters}, ...]
    """
    out, of_world = Path(out), config["task"] == "world"
    n, max_new_tokens = n or (480 if of_world else 200), max_new_tokens or (64 if of_world else 256)
    prompts, examples, source = held_out_prompts(config, files, n=n, seed=seed, split=split, columns=columns)
    policy, reference, tokenizer = models()
    for p in prompts:
        try:
            tokenizer.prompt_ids(p)
        except ValueError as e:
            raise SystemExit(f"--data {next(x.where for x in examples if x.prompt == p)}: {e}") from None
    print(f"{len(prompts)} prompts from {source}: reference and policy answer once each, at temperature {temperature:g}", flush=True)
    how = dict(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    room = dict(max_prompt_len=config["max_prompt_len"])
    ref_texts, _ = replies(reference, tokenizer, prompts, seed=2 * seed, **how, **room)              # other noise for each, or equal models would always tie
    texts, replied = replies(policy, tokenizer, prompts, seed=2 * seed + 1, **how, **room)
    rows = [{"prompt": p, "reference": r, "policy": t, "lengths": [len(r), len(t)]} for p, r, t in zip(prompts, ref_texts, texts)]
    turns = lambda p: p if isinstance(p, str) else [t._asdict() for t in p]                                     # noqa: E731
    text = "".join(json.dumps(r | {"prompt": turns(r["prompt"])}, ensure_ascii=False) + "\n" for r in rows)
    (out / "comparison.jsonl").write_text(text, encoding="utf-8")
    note = {"data": [str(f) for f in files], "source": source, "n": n, "seed": seed, "split": split, **how, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    old, new = _result(out), {}
    if not of_world:                                                               # of older texts, if there were any
        new = dict.fromkeys(("win_rate", "win_rate_ci95", "win_rate_length_controlled", "kl")) | {"judge": None, "n": 0}
        if temperature == top_p == 1:
            new["kl"] = float(sampled_kl(policy, reference, replied, device=device, budget=max(256, 2**20 // policy.vocab_size)).mean())
    if examples:
        labelled = [e for e in data.to_feedback(examples) if e.desirable is not None][:512]                      # prompts alone say nothing of margins
        labelled, _ = data.encode(labelled, tokenizer, max_len=min(config["max_len"], policy.context), max_prompt_len=config["max_prompt_len"], add_eot=config["add_eot"])
        if labelled:
            new["compared"] = margins(*(response_logps(m, labelled, device) for m in (policy, reference)), [r.desirable for r in labelled])
            print(margins_line("these prompts'", new["compared"]))
    _save_result(out, {k: v for k, v in old.items() if k != "judged"} | new | {"comparison": note})
    return rows


@torch.no_grad()
def response_logps(policy, rows, device="cpu"):
    """log pi of each row's response, nats.   -> float64 tensor (rows,), on the CPU"""
    sums = []
    for part in token_batches(rows, policy.token_budget):
        flat = flatten([rows[i] for i in part], device)
        sums.append(flat.sums(policy(flat.ids, flat.positions, flat.lengths, flat.predict, flat.targets)).cpu().double())
    return torch.cat(sums)


def kept_comparison(out):
    """(rows, how they were sampled) of the comparison in a run's folder; ([], {}) where there is none, or the run has moved on since."""
    note, file = _result(out).get("comparison"), Path(out) / "comparison.jsonl"
    if not note or not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != note["sha256"]:
        return [], {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [r | {"prompt": r["prompt"] if isinstance(r["prompt"], str) else tuple(data.Turn(**t) for t in r["prompt"])} for r in rows], note


def judge_comparison(out, config, rows, judge, name):
    """The scores of a judge (from `load_judge`; name: its text) for both sides become a win rate in eval.json.   -> the new fields"""
    prompts = [r["prompt"] for r in rows]
    ref_scores, scores = (np.array(judge(prompts, [r[side] for r in rows])) for side in ("reference", "policy"))
    wins = (scores > ref_scores) + 0.5 * (scores == ref_scores)
    found = win_rates(wins, rows) | {"ties": int((scores == ref_scores).sum()), "judge": Path(name).name, "score": float(scores.mean()), "score_ref": float(ref_scores.mean())}
    _record(out, config, found)
    _samples(out, rows, list(zip(ref_scores, scores)))
    return found


def _samples(out, rows, scores=None):
    how, some = kept_comparison(out)[1], rows[:24]
    write_samples(Path(out) / "samples.md", [prompt_text(r["prompt"]) for r in some], [r["reference"] for r in some], [r["policy"] for r in some],
                  scores=scores, temperature=how.get("temperature", 1.0))


def _result(out):
    file = Path(out) / "eval.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _save_result(out, result):
    (Path(out) / "eval.json").write_text(json.dumps(result, indent=2) + "\n")


def _record(out, config, found):
    """A win rate goes to the top of eval.json. A world run's own is there already, of the true utility: others stand under "judged"."""
    result = _result(out)
    if config["task"] == "world":
        result["judged"] = found
    else:
        result = {k: v for k, v in result.items() if k not in ("why_null", "score", "score_ref", *VERDICT_FIELDS)} | found
    _save_result(out, result)


# --- judges outside: people, or an LLM --------------------------------------------------------------------------------

VERDICT_FIELDS = ("disagreement", "position_bias", "one_order")


def export_pairs(out, rows, file, seed=0):
    """Every pair twice, sides swapped, all in one shuffled order, as lines {"id", "prompt", "a", "b"}; the key stays with the run.

    An id is the export's hash and the place in the shuffled order: it tells a stranger nothing, and us whose export it is of.
    """
    digest = _digest(out)
    places = [(i, side) for i in range(len(rows)) for side in "ab"]
    key, lines = {}, []
    for k, j in enumerate(np.random.default_rng([seed, len(rows)]).permutation(len(places))):
        i, side = places[j]                                                        # the policy of pair i stands at a or at b
        first, second = (rows[i][m] for m in (("policy", "reference") if side == "a" else ("reference", "policy")))
        key[f"{digest[:8]}-{k:05d}"] = [i, side]
        lines.append(json.dumps({"id": f"{digest[:8]}-{k:05d}", "prompt": prompt_text(rows[i]["prompt"]), "a": first, "b": second}, ensure_ascii=False))
    try:
        Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as e:
        raise SystemExit(f"--export_pairs {file}: {e.strerror}") from None
    (Path(out) / "pairs_key.json").write_text(json.dumps({"comparison": digest, "pairs": key}) + "\n")


def _digest(out):
    return hashlib.sha256((Path(out) / "comparison.jsonl").read_bytes()).hexdigest()


def read_verdicts(out, rows, file):
    """(wins, facts) from lines {"id", "verdict": "a" | "b" | "tie"}; more columns are ignored.

    wins (n,): the mean over a pair's verdicts, so opposite ones in the two orders, which are about the place and not about the
    text, count half for each side. Facts: `disagreement`, of the pairs judged in both orders the share whose verdicts differ;
    `position_bias`, the share of "a" among all "a" and "b" (0.5: none); `one_order`, pairs judged in one order only, which count.
    """
    key_file = Path(out) / "pairs_key.json"
    if not key_file.is_file():
        raise SystemExit(f"--verdicts {file}: {out} has no pairs_key.json; --export_pairs FILE writes it, and the pairs to judge")
    key = json.loads(key_file.read_text())
    if key["comparison"] != _digest(out):
        raise SystemExit(f"--verdicts {file}: {out}/comparison.jsonl has been sampled anew since the pairs were exported; export and judge those")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"--verdicts {file}: {getattr(e, 'strerror', None) or 'not UTF-8'}") from None
    given, first_seen, said = [{} for _ in rows], {}, []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"--verdicts {file}: line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise SystemExit(f"{where}: broken JSON ({e.msg}); expected {{\"id\": ..., \"verdict\": \"a\", \"b\" or \"tie\"}}") from None
        name, verdict = (record.get(k) if isinstance(record, dict) else None for k in ("id", "verdict"))
        if not isinstance(name, str) or not isinstance(verdict, str):
            raise SystemExit(f"{where}: expected {{\"id\": \"...\", \"verdict\": \"a\", \"b\" or \"tie\"}}, got {line.strip()[:60]}")
        if name not in key["pairs"]:
            other = name.partition("-")[0] != key["comparison"][:8]
            raise SystemExit(f"{where}: id {name!r} is not of this run's export: " + ("it belongs to another one; " if other else "")
                             + f"ids here go from {min(key['pairs'])} to {max(key['pairs'])}")
        if name in first_seen:
            raise SystemExit(f"{where}: id {name!r} has a verdict already, in line {first_seen[name]}")
        verdict = verdict.strip().lower()
        if verdict not in ("a", "b", "tie"):
            raise SystemExit(f"{where}: verdict {verdict[:40]!r}; valid are a, b, tie")
        i, side = key["pairs"][name]
        first_seen[name], given[i][side] = number, 0.5 if verdict == "tie" else float(verdict == side)
        said.append(verdict)
    if (i := next((i for i, g in enumerate(given) if not g), None)) is not None:
        ids = sorted(name for name, (j, _) in key["pairs"].items() if j == i)
        missing = sum(not g for g in given)
        raise SystemExit(f"--verdicts {file}: {missing} of {len(rows)} pairs have no verdict, the first is {' or '.join(ids)}; one order is enough")
    both = [len(set(g.values())) > 1 for g in given if len(g) == 2]
    sides = [v for v in said if v != "tie"]
    return np.array([np.mean(list(g.values())) for g in given]), {
        "ties": sum(set(g.values()) == {0.5} for g in given), "disagreement": float(np.mean(both)) if both else None,
        "position_bias": sides.count("a") / len(sides) if sides else None, "one_order": len(rows) - len(both)}


def win_rate_lines(r):
    low, high = r["win_rate_ci95"]
    fixed = r["win_rate_length_controlled"]
    lines = [f"judge {r['judge']}, {r['n']} pairs, {r['ties']} ties (half a win each)",
             f"  win rate against the reference   {r['win_rate']:.3f} [{low:.3f}, {high:.3f}]",
             f"  at equal lengths                 {'cannot be told: all lengths differ by the same' if fixed is None else f'{fixed:.3f}'}"]
    if "score" in r:
        lines.append(f"  mean score                       {r['score']:+.3f}   (reference {r['score_ref']:+.3f})")
    if "position_bias" in r:
        share = lambda x: "none to tell from" if x is None else f"{x:.1%}"                                      # noqa: E731
        lines += [f"  judged in one order only         {r['one_order']} pairs",
                  f"  verdicts that change with order  {share(r['disagreement'])}",
                  f"  verdicts for the first place     {share(r['position_bias'])}   (50 %: no position bias)"]
    return "\n".join(lines)


# --- pictures ---------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#777777", "#009E73"                  # Okabe and Ito: colour-blind safe


def _figure(columns, width=5.0, height=3.6):
    from matplotlib.figure import Figure                                           # without pyplot, which keeps every figure alive
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def plot_curves(metrics, path):
    """curves.png: of what a run logs the loss, rewards and log-probs of both classes, z0; of PPO rewards, KL, entropy and how the critic does."""
    panels = {"loss": [("loss", BLUE, "loss")],
              "implied reward beta (log pi - log pi_ref)": [("rewards/chosen", GREEN, "desirable"), ("rewards/rejected", ORANGE, "undesirable")],
              "log pi(y|x), nats per response": [("logps/chosen", GREEN, "desirable"), ("logps/rejected", ORANGE, "undesirable")],
              "reference point z0, nats": [("z0_raw", GREY, "before the clamp"), ("z0", BLUE, "z0 = max(0, mean)")],
              "reward of the policy's own responses": [("reward", GREEN, "reward"), ("objective", BLUE, "reward - kl_coef KL")],
              "KL(pi || pi_ref), nats per response": [("kl/k1", GREY, "k1"), ("kl/k3", BLUE, "k3")],
              "policy and critic": [("entropy", BLUE, "entropy, nats per token"), ("explained_variance", GREEN, "critic, explained variance"),
                                    ("clip_fraction", ORANGE, "clip fraction")]}
    panels = {title: lines for title, lines in panels.items() if any(m.get(key) is not None for m in metrics for key, *_ in lines)}
    figure, axes = _figure(len(panels))
    for ax, (title, lines) in zip(axes, panels.items()):
        for key, color, label in lines:
            y = np.array([np.nan if m.get(key) is None else m[key] for m in metrics], float)
            ax.plot([m["step"] for m in metrics], y, color=color, alpha=0.25, lw=0.8)
            w, good = max(1, len(y) // 30), np.isfinite(y)                          # a running mean over about 1/30 of the run
            count = np.convolve(good, np.ones(w), "same")
            smooth = np.convolve(np.where(good, y, 0), np.ones(w), "same") / np.maximum(count, 1)
            ax.plot([m["step"] for m in metrics], np.where(count > 0, smooth, np.nan), color=color, lw=2, label=label)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("optimiser step")
        ax.grid(alpha=0.25)
        if len(lines) > 1:
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

    config = json.loads((out / "config.json").read_text())
    weaker = "".join(f"         python train.py --loss {cfg.loss} --{k} {config[k] / 5:g} --out {out}-{k}{config[k] / 5:g}      (what does a smaller {k} do to the KL?)\n"
                     for k in ("beta", "tau", "kl_coef") if isinstance(config.get(k), float))
    best, (low, high), (u_low, u_high) = r["optimum_at_same_kl"], r["win_rate_ci95"], r["reward_ci95"]
    raw = [m["z0_raw"] for m in metrics if m.get("z0_raw") is not None]
    show = max(range(len(prompts)), key=lambda i: scores[i][1] - scores[i][0])
    print(f"""
What came out, on {r['n']} questions about 24 (device, problem) pairs that no stage has seen:
  win rate against the reference   {r['win_rate']:.3f} [{low:.3f}, {high:.3f}]   (0.5: no better; the best policy at this KL: {best['win_rate']:.3f})
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
{weaker}         python train.py --loss bco      python train.py --help""", flush=True)


def margins(logps, ref_logps, desirable):
    """Mean log-ratio (nats) of desirable and undesirable rows, their difference, and the share on the right side of 0."""
    ratios, up = logps - ref_logps, torch.tensor(desirable)
    good, bad = (float(ratios[where].mean()) if where.any() else None for where in (up, ~up))
    return {"logratio_desirable": good, "logratio_undesirable": bad, "margin": None if None in (good, bad) else good - bad,
            "accuracy": float(torch.where(up, ratios > 0, ratios < 0).double().mean()), "n": len(ratios)}


def margins_line(name, r):
    d, u, m = ("none" if x is None else f"{x:+.3f}" for x in (r["logratio_desirable"], r["logratio_undesirable"], r["margin"]))
    return f"{name} rows ({r['n']}): log pi/pi_ref of desirable {d}, of undesirable {u}, margin {m} nats; {r['accuracy']:.1%} on the right side of 0"


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
            print(margins_line(name, r))
    print(f"seconds: alignment {seconds['align']:.0f}, samples {seconds['evaluate']:.0f}\n"
          f"files:   {out}/ samples.md, curves.png, eval.json, metrics.jsonl, model/ (transformers loads it)\n"
          f"next:    python evaluate.py {out} --prompt \"...\"\n"
          f"         python evaluate.py {out} --judge FOLDER     or --export_pairs pairs.jsonl, for people or an LLM to judge", flush=True)


def report_rewards(result, cfg, seconds):
    """What `--loss rm` leaves: how often the reward model agrees with the annotator, on pairs it learnt from and on others."""
    out = Path(cfg.out)
    plot_curves([json.loads(line) for line in open(out / "metrics.jsonl")], out / "curves.png")
    result = {k: v for k, v in result.items() if v} | {"win_rate": None, "n": (result.get("eval") or result["train"])["n"], "seconds": seconds}
    (out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, of in (("train", "pairs it learnt from"), ("eval", "other pairs")):
        if r := result.get(name):
            print(f"{of} ({r['n']}): the chosen response has the larger reward in {r['accuracy']:.1%}, by {r['margin']:+.2f} on average")
    print(f"files:   {out}/ eval.json, curves.png, metrics.jsonl, model/\n"
          f"next:    python train.py --loss ppo --reward {out}/model", flush=True)


# --- the model card -----------------------------------------------------------------------------------------------------

NOT_IN_CARD = {"loss", "model", "data", "eval_data", "tokenizer", "init", "ref", "out", "overwrite", "resume", "dry_run", "device", "eval_every", "save_every",
               "log_every", "columns"}
ALWAYS_IN_CARD = ("lr", "steps", "epochs", "batch_size", "max_len", "max_prompt_len", "dtype", "seed")


def model_card(config, result):
    """README.md for model/: what was trained, on what, with which settings and results, and how to load it. A text, nothing is written.

    config, result: the contents of config.json and eval.json. Paths show their last name only; `base_model` is set where --model was
    a hub name (owner/name, and no folder of that name here).
    """
    name = lambda x: re.split(r"[/\\]", str(x).rstrip("/\\"))[-1]                                               # noqa: E731
    loss, base = config["loss"], config.get("model") or ""
    curves = {**kto.LOSSES, **dpo_variants.LOSSES}
    terms = [t for t in re.findall(r"[a-z]\w*", loss) if t in curves] or [loss]
    hub = base if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) and not Path(base).exists() else None
    what = f"`{hub or name(base)}`" if base else "a small GPT (GPT-2's architecture) trained from random weights"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"] + ([f"base_model: {json.dumps(hub)}"] if hub else [])
    lines += [f"tags: {json.dumps(['nanokto', 'preference-alignment', *terms])}", "---", "", f"# {name(base) if base else 'small GPT'}, aligned with {loss}", "",
              f"{what[0].upper() + what[1:]}, aligned with nanoKTO's `--loss {loss}`."]
    for t in terms if loss != "sft" else ():                                        # the stage of that name takes the token mean, not that curve
        if doc := (curves[t].__doc__ or "").splitlines() if t in curves else ():
            paper = next((line.strip() for line in doc if line.strip().startswith("Paper: ")), "")
            lines += ["", f"    {t}: {doc[0].removesuffix('(B,)').strip()}", "", f"{paper}. Symbols as in nanoKTO's kto.py and dpo_variants.py."]
    of = lambda key: ", ".join(f"`{name(f)}`" for f in config.get(key) or ())                                   # noqa: E731
    learnt = ("its own responses to these prompts" if loss == "ppo" else
              f"{config.get('n_desirable', 0):,} desirable and {config.get('n_undesirable', 0):,} undesirable responses")
    lines += ["", "## Data", "", f"Trained on {of('data') or 'the embedded help desk of nanoKTO'}: {learnt}."
              + (f" Held out: {of('eval_data')}." if of("eval_data") else "")]
    origin = config.get("origin", {})
    chosen = [k for k in config if k not in NOT_IN_CARD and (k in ALWAYS_IN_CARD or origin.get(k, "default") != "default")]
    lines += ["", "## Settings", "", "| setting | value | from |", "|---|---|---|"]
    show = lambda v: name(v) if isinstance(v, str) else ", ".join(map(show, v)) if isinstance(v, list) else str(v)          # noqa: E731
    lines += [f"| {k} | {show(config[k])} | {origin.get(k, '')} |" for k in chosen if config[k] not in (None, "", [])]
    if loss == "rm":
        lines += ["", "## Results", "", *(f"- {k}: {v}" for k, v in result.items() if k in ("train", "eval")), "", "A reward model: a number for the last token of prompt and "
                  "response. transformers loads it as AutoModelForSequenceClassification; nanoKTO's own small GPT serves as `--reward FOLDER`.", ""]
        return "\n".join(lines)
    lines += ["", "## Results", ""] + (_card_results(result, name) or ["Not measured."])
    kind = "peft.AutoPeftModelForCausalLM" if config.get("save") == "adapter" else "AutoModelForCausalLM"
    lines += ["", "## Load it", "", "```python", *["import peft"] * kind.startswith("peft"), "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
              f'model = {kind}.from_pretrained("FOLDER")', 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```"]
    versions = ", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items())
    lines += ["", f"Made by nanoKTO{' at commit ' + config['commit'] if config.get('commit') else ''}{', with ' + versions if versions else ''}."]
    return "\n".join(lines) + "\n"


def _card_results(r, name):
    """Lines of a list: whatever eval.json knows."""
    lines = []
    if r.get("win_rate") is not None:
        low, high = r["win_rate_ci95"]
        fixed = r.get("win_rate_length_controlled")
        lines.append(f"- win rate against the reference: {r['win_rate']:.3f} [{low:.3f}, {high:.3f}] over {r['n']} prompts, ties counting half"
                     + (f" ({r['ties']} of them)" if r.get("ties") is not None else "") + (f"; at equal lengths {fixed:.3f}" if fixed is not None else "")
                     + f"; judge: {name(r.get('judge') or 'true utility of the embedded world')}")
    if r.get("reward") is not None:
        lines.append(f"- true utility per reply: {r['reward']:+.2f} (reference {r['reward_ref']:+.2f})")
    if r.get("kl") is not None:
        lines.append(f"- KL(policy || reference): {r['kl']:.3f} nats per response")
    for key in ("train", "eval"):
        if m := r.get(key):
            lines.append("- " + margins_line({"train": "training", "eval": "held-out"}[key], m))
    return lines


# --- command line -----------------------------------------------------------------------------------------------------

def run_config(out):
    """config.json of a finished run's folder."""
    out = Path(out)
    if not (out / "config.json").is_file():
        raise SystemExit(f"{out}: no config.json there; expected the --out folder of a run")
    if not (out / "model" / "config.json").is_file():
        raise SystemExit(f"{out}: no model/ there; the run has not finished: continue it with --resume")
    return json.loads((out / "config.json").read_text())


def load_run(out, device="cpu"):
    """(policy, reference, tokenizer, config) of a finished run's folder."""
    out, config = Path(out), run_config(out)
    return load_policy(out / "model", device=device), load_policy(config["ref"], device=device), load_tokenizer(out / "model"), config


def summary(runs):
    """A markdown table of several runs' eval.json, and mean +- standard deviation over them."""
    results = [_result(r) for r in runs]
    if bad := next((run for run, r in zip(runs, results) if "optimum_at_same_kl" not in r), None):
        raise SystemExit(f"{bad}: no evaluation on the embedded world there; the table is for runs without --data")
    columns = {"win rate": lambda r: r["win_rate"], "best policy's win rate at this KL": lambda r: r["optimum_at_same_kl"]["win_rate"],
               "true utility": lambda r: r["reward"], "best utility at this KL": lambda r: r["optimum_at_same_kl"]["reward"],
               "KL, nats": lambda r: r["kl"], "malformed": lambda r: r["malformed"], "greedy utility": lambda r: r["reward_greedy"],
               "seconds": lambda r: sum(v for k, v in r["seconds"].items() if k != "align_cpu")}
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run, r in zip(runs, results):
        cells = [f"{f(r):.3f}" if name != "seconds" else f"{f(r):.0f}" for name, f in columns.items()]
        low, high = r["win_rate_ci95"]
        lines.append(f"| {Path(run).name} | {cells[0]} [{low:.3f}, {high:.3f}] | " + " | ".join(cells[1:]) + " |")
    values = {name: np.array([f(r) for r in results]) for name, f in columns.items()}
    lines.append("| mean +- sd | " + " | ".join(f"{v.mean():.3f} +- {v.std(ddof=1):.3f}" if name != "seconds" else f"{v.mean():.0f}"
                                                for name, v in values.items()) + " |")
    return "\n".join(lines)


SAMPLING = ("data", "n", "temperature", "top_p", "seed", "max_new_tokens", "split")          # what a kept comparison was sampled with


def main(argv):
    import argparse
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run's folder, out/kto")
    p.add_argument("more", nargs="*", help="more runs (other seeds): their eval.json side by side, with mean and standard deviation")
    p.add_argument("--prompt", action="append", help="answer this from reference and policy, side by side (repeatable)")
    p.add_argument("--samples", type=int, default=3, help="answers per --prompt")
    p.add_argument("--data", action="append", help="files to take prompts from, any format that trains (default: the run's eval_data; repeatable)")
    p.add_argument("--judge", help="world, the folder of a reward model, or file.py:function(prompts, responses) -> scores")
    p.add_argument("--export_pairs", metavar="FILE", help="write the blinded pairs for a judge outside")
    p.add_argument("--verdicts", metavar="FILE", help="read the verdicts of a judge outside")
    p.add_argument("--resample", action="store_true", help="replace the comparison that is kept in the run's folder")
    p.add_argument("--n", type=int, help="prompts at most (default: 480 of the world's, 200 of a file's)")
    p.add_argument("--temperature", type=float, help="default: 1 for numbers, 0.7 for --prompt")
    p.add_argument("--top_p", type=float)
    p.add_argument("--max_new_tokens", type=int, help="default: 64, of a file run's comparison 256")
    p.add_argument("--seed", type=int)
    p.add_argument("--split", choices=["report", "tune"], help="of the embedded world's held-out questions")
    p.add_argument("--columns", help="of --data: prompt=question,completion=answer,... (default: as in the run)")
    p.add_argument("--device", default="cpu")
    a = p.parse_args(argv)
    for flag, good, valid in (("n", a.n is None or a.n >= 1, "1 or more"), ("temperature", a.temperature is None or 0 <= a.temperature < float("inf"), "0 or more"),
                              ("top_p", a.top_p is None or 0 < a.top_p <= 1, "above 0, at most 1"), ("seed", a.seed is None or a.seed >= 0, "0 or more"),
                              ("max_new_tokens", a.max_new_tokens is None or a.max_new_tokens >= 1, "1 or more"), ("samples", a.samples >= 1, "1 or more")):
        if not good:
            raise SystemExit(f"--{flag} {getattr(a, flag)}: valid are {valid}")
    if a.more:
        print(summary([a.run, *a.more]))
        return
    config, typed = run_config(a.run), {k: getattr(a, k) for k in SAMPLING if getattr(a, k) is not None}
    if a.prompt:
        answer_prompts(a, config)
    elif config["task"] == "world" and not (a.data or a.judge or a.export_pairs or a.verdicts):
        policy, reference, tokenizer, _ = load_run(a.run, a.device)
        result = evaluate_world(policy, reference, tokenizer, part=a.split or "report", n=a.n or 480, seed=a.seed or 0, device=a.device,
                                sessions=config.get("source") == "sessions")
        print(json.dumps({k: v for k, v in result.items() if not k.startswith("utilities")}, indent=2))
    else:
        compare_and_judge(a, config, typed)


def answer_prompts(a, config):
    policy, reference, tokenizer, _ = load_run(a.run, a.device)
    how = dict(temperature=0.7 if a.temperature is None else a.temperature, top_p=a.top_p or 1.0, seed=a.seed or 0, max_new_tokens=a.max_new_tokens or 64)
    for prompt in a.prompt:
        known = world.parse_prompt(prompt) if config["task"] == "world" else None
        print(f"\n{prompt}")
        for name, model in (("reference", reference), ("policy", policy)):
            for text in replies(model, tokenizer, [prompt] * a.samples, **how)[0]:
                print(f"  {name:>9} {f'({world.utility(prompt, text):+.1f}) ' if known else ''}{text}")
        if config["task"] == "world" and not known:
            print("  (not one of the help desk's questions: this model has seen nothing else)")


def compare_and_judge(a, config, typed):
    out = Path(a.run)
    rows, kept = ([], {}) if a.resample else kept_comparison(out)
    for flag, value in typed.items() if rows else ():
        if kept[flag] != value:
            value, was = (" ".join(value), "prompts of " + kept["source"]) if flag == "data" else (value, kept[flag])
            raise SystemExit(f"--{flag} {value}: {out}/comparison.jsonl was sampled with {was}; --resample replaces it, and with it what was exported")
    if a.verdicts and not rows:
        raise SystemExit(f"--verdicts {a.verdicts}: {out} has no comparison of its present model; --export_pairs FILE makes one, and the pairs to judge")
    judge = load_judge(a.judge, device=a.device) if a.judge else None              # before minutes of sampling
    if rows:
        print(f"{out}/comparison.jsonl: {len(rows)} pairs, sampled before (--resample: anew)")
    else:
        how = {k: v for k, v in typed.items() if k != "data"}
        rows = compare(out, config, lambda: load_run(out, a.device)[:3], a.data or (), columns=a.columns, device=a.device, **how)
        _samples(out, rows)
    if judge:
        print(win_rate_lines(judge_comparison(out, config, rows, judge, a.judge)))
    if a.export_pairs:
        export_pairs(out, rows, a.export_pairs, kept_comparison(out)[1]["seed"])
        print(f"{a.export_pairs}: {2 * len(rows)} lines, each pair in both orders; answer each with {{\"id\": ..., \"verdict\": \"a\", \"b\" or \"tie\"}}\n"
              f"next:    python evaluate.py {out} --verdicts VERDICTS.jsonl")
    if a.verdicts:
        wins, facts = read_verdicts(out, rows, a.verdicts)
        found = win_rates(wins, rows) | facts | {"judge": f"verdicts in {Path(a.verdicts).name}"}
        _record(out, config, found)
        print(win_rate_lines(found))
    print(f"files:   {out}/ comparison.jsonl, samples.md (side by side), eval.json")
    if not (a.judge or a.export_pairs or a.verdicts):
        print(f"next:    python evaluate.py {out} --judge FOLDER (a reward model) or file.py:function\n"
              f"         python evaluate.py {out} --export_pairs pairs.jsonl     (blinded, for people or an LLM; then --verdicts)")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The loop: one step for any split, nothing lost on the way, and a plain sentence for whoever typed something wrong."""
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import model
import train
from conftest import SHARED, needs_shared

ROOT = Path(train.__file__).parent


def run(*words):
    """train.main on words and flags; numbers and paths may be given as they are."""
    train.main([str(w) for w in words])


def torchrun(processes, *words, **how):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(ROOT / "train.py")]
    return subprocess.run(command + [str(w) for w in words], capture_output=True, text=True, timeout=240, **how)


def metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


def make_lab(folder):
    """A file of 27 labelled rows, a random reference, and a policy that moved away from it so that z0 is well above 0."""
    rng = np.random.default_rng(0)
    words = "sun moon rain wind leaf stone river cloud bird snow".split()
    records = [{"prompt": f"say {words[i % 7]}: ", "completion": " ".join(rng.choice(words[:5] if i % 3 else words[5:], size=1 + i % 4)),
                "label": bool(i % 3)} for i in range(27)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    torch.manual_seed(0)
    reference = model.GPT(model.GPTConfig(257, 64, 2, 2, 32)).double()
    reference.save(folder / "ref", eot=256)
    rows, _ = data.encode([data.Feedback(r["prompt"], r["completion"], True) for r in records], data.load_tokenizer(), max_len=64)
    cfg = train.settings(["--loss", "sft", "--data", str(folder / "rows.jsonl"), "--dtype", "fp64", "--steps", "15", "--lr", "2e-3", "--batch_size", "9"])[0]
    train.fit(reference, rows, cfg, train.Group(), "moving, step")
    reference.save(folder / "moved", eot=256)
    return folder


def flags(lab, out, *more, loss="kto", steps=20):
    return ["--loss", loss, "--data", lab / "rows.jsonl", "--init", lab / "moved", "--ref", lab / "ref", "--dtype", "fp64", "--max_len", 64,
            "--batch_size", 8, "--steps", steps, "--lr", "1e-3", "--seed", 3, "--out", out, *more]


# --- one step; that it is the same for any split is in test_split.py ------------------------------------------------------

@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*flags(lab, out))
    return out


def test_z0_is_the_mismatched_mean_and_not_the_matched_one(lab, whole):
    """From the definition, row by row: the first step's z0_raw. A rolled vector of matched rewards has the matched mean."""
    rows, _ = data.encode(data.read(lab / "rows.jsonl")[0], data.load_tokenizer(), max_len=64)
    batch = data.batch_at([r.prompt_key for r in rows], 8, seed=3, step=0)
    policy, reference = (model.load_policy(lab / name, dtype=torch.float64) for name in ("moved", "ref"))

    def ratio(row):
        logps = []
        for m in (policy, reference):
            ids = torch.tensor(row.ids.tolist())
            logits = m(ids, torch.arange(len(ids)), [len(ids)])
            logps.append(model.token_logps(logits[None], ids[None], torch.tensor(row.mask.tolist())[None].double()).sum())
        return float((logps[0] - logps[1]).detach())

    pairs = [data.make_row(rows[i].ids[:rows[i].n_prompt], rows[j].response) for i, j in zip(batch.rows, batch.partners)]
    assert metrics(whole)[0]["z0_raw"] == pytest.approx(np.mean([ratio(r) for r in pairs]), abs=1e-12)
    assert abs(np.mean([ratio(rows[i]) for i in batch.rows]) - metrics(whole)[0]["z0_raw"]) > 0.01
    # and the whole first step: loss by hand from Eq. 8
    z0 = max(0.0, metrics(whole)[0]["z0_raw"])
    by_hand = np.mean([1 - 1 / (1 + math.exp(-0.1 * (1 if rows[i].desirable else -1) * (ratio(rows[i]) - z0))) for i in batch.rows])
    assert metrics(whole)[0]["loss"] == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.slow
def test_an_on_policy_z0_is_the_kl_and_the_same_for_any_split(lab, tmp_path):
    """Its mean over many batches is KL(pi || pi_ref), measured apart on other samples; and a rank does not sample for itself."""
    run(*flags(lab, tmp_path / "whole", "--z0", "on_policy", "--lr", "1e-12", steps=40))
    z0 = np.array([m["z0_raw"] for m in metrics(tmp_path / "whole")])
    policy, reference = (model.load_policy(lab / name, dtype=torch.float64) for name in ("moved", "ref"))
    rows, _ = data.encode(data.read(lab / "rows.jsonl")[0], data.load_tokenizer(), max_len=64)
    prompts = [r.ids[:r.n_prompt].tolist() for r in rows] * 10
    sampled = [data.make_row(p, r) for p, r in zip(prompts, policy.generate(prompts, eot=256, max_new_tokens=64, seed=9))]
    kl = evaluate.sampled_kl(policy, reference, sampled)
    assert abs(z0.mean() - kl.mean()) < 4 * math.hypot(z0.std() / 40 ** 0.5, kl.std() / len(kl) ** 0.5) and kl.mean() > 0.5     # 4 standard errors
    run(*flags(lab, tmp_path / "a", "--z0", "on_policy", "--micro_batch_size", 3, steps=4))
    done = torchrun(2, *flags(lab, tmp_path / "b", "--z0", "on_policy", steps=4))
    assert done.returncode == 0 and largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-10, done.stderr[-2000:]


def test_the_cached_reference_is_the_online_one(lab):
    """Looked up per batch over two epochs, against a forward of exactly those rows."""
    cfg, hyper, _ = train.settings([str(w) for w in flags(lab, "unused", steps=8)])
    rows, _ = data.encode(data.read(lab / "rows.jsonl")[0], data.load_tokenizer(), max_len=64)
    cached, online = train.Reference([(r,) for r in rows], cfg, train.Group()), train.frozen_reference(cfg, train.Group())
    for step in range(8):
        b = data.batch_at([r.prompt_key for r in rows], 8, seed=3, step=step)
        pairs = [data.mismatched(rows[i], rows[j], 64) for i, j in zip(b.rows, b.partners)]
        for table, some in ((cached.matched(b)[:, 0], [rows[i] for i in b.rows]), (cached.mismatched(b), pairs)):
            assert torch.allclose(table, train.score(online, [(r,) for r in some], cfg, torch.device("cpu"))[:, 0], rtol=0, atol=1e-12)


def test_a_reference_slice_does_not_depend_on_how_many_steps_there_are(lab):
    """Else a run resumed with more --steps would see other last bits in its reference."""
    rows, _ = data.encode(data.read(lab / "rows.jsonl")[0], data.load_tokenizer(), max_len=64)
    tables = []
    for steps in (1, 8):
        cfg, _, _ = train.settings([str(w) for w in flags(lab, "unused", "--dtype", "fp32", steps=steps)])
        reference = train.Reference([(r,) for r in rows], cfg, train.Group())
        b = data.batch_at([r.prompt_key for r in rows], 8, seed=3, step=0)
        tables.append(torch.stack([reference.matched(b)[:, 0], reference.mismatched(b)]))
    assert torch.equal(*tables)


# --- pairs --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pairs(lab):
    return make_pairs(lab)


def make_pairs(lab):
    """26 pairs of uneven lengths with scores and win probabilities, for the lab's models."""
    rng = np.random.default_rng(1)
    words = "sun moon rain wind leaf stone river cloud bird snow".split()
    records = [{"prompt": f"say {words[i % 6]}: ", "chosen": " ".join(rng.choice(words[:5], size=1 + i % 4)), "rejected": " ".join(rng.choice(words[5:], size=1 + i % 3)),
                "score_chosen": 2.0 + i % 5, "score_rejected": 1.0, "win_prob_chosen": 0.8, "win_prob_rejected": 0.3} for i in range(26)]
    (lab / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    turn = lambda text: {"role": "assistant", "content": text}                                                  # noqa: E731
    sessions = [{"prompt": [{"role": "user", "content": r["prompt"][4:6]}], "segment": {"start": i % 2, "end": 1 + i % 2},
                 **{side: [turn(r[side][:3]), {"role": "user", "content": "?"}, turn(r[side][2::-1])] for side in ("chosen", "rejected")}} for i, r in enumerate(records)]
    (lab / "sessions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sessions))
    return lab


def pair_flags(lab, out, loss, *more, steps=6):
    words = flags(lab, out, *more, loss=loss, steps=steps)
    words[words.index("--data") + 1] = lab / ("sessions.jsonl" if loss == "sdpo_segment" else "pairs.jsonl")
    return words


PAIRED = [n for n, f in train.LOSSES.items() if train.is_paired(train.signature(f)[0])]


RECIPES = [n for n, r in train.RECIPES.items() if r["loss"] == "dpo"]


@pytest.mark.parametrize("loss", [*PAIRED, *RECIPES, "dpo + 0.1*sft"])
def test_every_paired_loss_and_recipe_trains(pairs, tmp_path, loss):
    run(*pair_flags(pairs, tmp_path / "run", loss, steps=3))
    m, stages = metrics(tmp_path / "run"), train.RECIPES.get(loss, {}).get("flags", {}).get("stages", 1)
    assert [x["step"] for x in m] == list(range(3 * stages)) and all(math.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in m)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["train"]["n"] == 52


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "wpo", "ld_dpo", "slic"])
def test_a_shared_prompt_changes_no_step(pairs, tmp_path, monkeypatch, loss):
    more = ["--slic_target", "chosen"] if loss == "slic" else []
    run(*pair_flags(pairs, tmp_path / "shared", loss, *more))
    monkeypatch.setattr(model.GPT, "shares_prompts", False)
    run(*pair_flags(pairs, tmp_path / "plain", loss, *more))
    assert 0 < largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "shared")) < 1e-10                 # 0: nothing was shared


@pytest.mark.parametrize("loss", ["kto", "kto_uniform"])
def test_a_prompt_shared_with_the_mismatched_response_changes_no_step(lab, tmp_path, monkeypatch, loss):
    beside, calls = model.GPT.forward_beside, []
    monkeypatch.setattr(model.GPT, "forward_beside", lambda *a: calls.append(1) or beside(*a))
    run(*flags(lab, tmp_path / "shared", loss=loss, steps=8))
    monkeypatch.setattr(model.GPT, "shares_prompts", False)
    run(*flags(lab, tmp_path / "plain", loss=loss, steps=8))
    assert len(calls) == 8 and largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "shared")) < 1e-10
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "shared")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-12) and a.get("z0_raw") == pytest.approx(b.get("z0_raw"), abs=1e-12)


def by_hand(pairs, step=0):
    """chosen and rejected of one batch: (row, policy logits, reference logits) each, one forward per sequence."""
    rows, _ = data.encode(data.read(pairs / "pairs.jsonl")[0], data.load_tokenizer(), max_len=64)
    batch = data.batch_at([p[0].prompt_key for p in rows], 8, seed=3, step=step)
    policy, reference = (model.load_policy(pairs / name, dtype=torch.float64) for name in ("moved", "ref"))

    def look(row):
        ids = torch.tensor(row.ids.tolist())
        return row, *(m(ids, torch.arange(len(ids)), [len(ids)]).detach() for m in (policy, reference))

    return [tuple(look(row) for row in rows[i]) for i in batch.rows]


def logp(row, logits):
    ids = torch.tensor(row.ids.tolist())
    return float(model.token_logps(logits[None], ids[None], torch.tensor(row.mask.tolist())[None].double()).sum())


def test_the_first_dpo_and_tdpo_and_wpo_steps_are_the_equations_by_hand(pairs, tmp_path):
    """Whole vocabularies position by position, no chunks, no flat rows: KL(pi_ref || pi) and WPO's weights from their definitions."""
    dpo, tdpo2, wpo = [], [], []
    for pair in by_hand(pairs):
        ratio = [logp(row, p) - logp(row, q) for row, p, q in pair]
        kl, weight = [], []
        for row, p, q in pair:
            at = range(row.n_prompt - 1, len(row.ids) - 1)
            logp_all, logq_all = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
            kl.append(sum(float((logq_all[t].exp() * (logq_all[t] - logp_all[t])).sum()) for t in at))
            weight.append(math.exp(np.mean([float(logp_all[t, row.ids[t + 1]] - torch.log((logp_all[t].exp() ** 2).sum())) for t in at])))
        h = ratio[0] - ratio[1]
        dpo.append(math.log1p(math.exp(-0.1 * h)))
        tdpo2.append(math.log1p(math.exp(-0.1 * (h - 0.5 * (kl[1] - kl[0])))))
        wpo.append(min(weight[0] * weight[1], 1.0) * math.log1p(math.exp(-0.01 * h)))
        assert min(kl) > 0.01, "the policy moved: a KL of 0 would prove nothing"
    for loss, values in (("dpo", dpo), ("tdpo2", tdpo2), ("wpo", wpo)):
        run(*pair_flags(pairs, tmp_path / loss, loss, steps=1))
        assert metrics(tmp_path / loss)[0]["loss"] == pytest.approx(np.mean(values), abs=1e-12)


def test_whole_vocabulary_quantities_do_not_depend_on_chunks(pairs, tmp_path, monkeypatch):
    """TDPO with gradient through its KL, chunks of 7 positions recomputed in backward, against one chunk."""
    run(*pair_flags(pairs, tmp_path / "one", "tdpo1"))
    monkeypatch.setitem(model.head_log_probs.__kwdefaults__, "chunk_elements", 7 * 257)
    run(*pair_flags(pairs, tmp_path / "chunks", "tdpo1"))
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "chunks")) < 1e-10


def test_ld_dpo_weighs_the_longer_tail_and_with_alpha_1_is_dpo(pairs, tmp_path):
    chosen, rejected = data.make_row([1, 2], [3, 4, 5, 6]), data.make_row([1, 2], [7, 8])
    a, b = data.length_desensitised((chosen, rejected), 0.25)
    assert a.mask.tolist() == [0, 0, 1, 1, 0.25, 0.25] and b.mask.tolist() == [0, 0, 1, 1] and chosen.mask.tolist() == [0, 0, 1, 1, 1, 1]
    run(*pair_flags(pairs, tmp_path / "dpo", "dpo"))
    run(*pair_flags(pairs, tmp_path / "ld", "ld_dpo", "--ld_alpha", 1))
    assert largest_difference(weights(tmp_path / "dpo"), weights(tmp_path / "ld")) == 0


def test_slics_target_is_sampled_once_or_the_chosen_response_or_read_from_the_data(pairs, tmp_path, monkeypatch):
    """The first step by hand: max(0, delta - lw + ll) - lam log pi(y_ref | x)."""
    both = [[logp(row, p) for row, p, _ in pair] for pair in by_hand(pairs)]
    hinge = [max(0.0, 1 - lw + ll) for lw, ll in both]
    run(*pair_flags(pairs, tmp_path / "chosen", "slic", "--slic_target", "chosen", steps=1))
    assert metrics(tmp_path / "chosen")[0]["loss"] == pytest.approx(np.mean([h - 0.1 * lw for h, (lw, _) in zip(hinge, both)]), abs=1e-12)
    records = [json.loads(line) for line in open(pairs / "pairs.jsonl")]
    (tmp_path / "with_target.jsonl").write_text("\n".join(json.dumps({**r, "target": r["rejected"]}) for r in records))
    words = pair_flags(pairs, tmp_path / "data", "slic", "--slic_target", "data", steps=1)
    words[words.index("--data") + 1] = tmp_path / "with_target.jsonl"
    run(*words)
    assert metrics(tmp_path / "data")[0]["loss"] == pytest.approx(np.mean([h - 0.1 * ll for h, (_, ll) in zip(hinge, both)]), abs=1e-12)
    with pytest.raises(SystemExit, match="line 1: --slic_target data needs the column target"):
        run(*pair_flags(pairs, tmp_path / "none", "slic", "--slic_target", "data"))
    run(*pair_flags(pairs, tmp_path / "sample", "slic", steps=2))
    targets = json.loads((tmp_path / "sample" / "targets.json").read_text())
    reference = model.load_policy(pairs / "ref", dtype=torch.float64)
    rows, _ = data.encode(data.read(pairs / "pairs.jsonl")[0], data.load_tokenizer(), max_len=64)
    assert targets == reference.generate([p[0].ids[:p[0].n_prompt].tolist() for p in rows], eot=256, max_new_tokens=64, room=64, seed=[3, 7, 0])
    monkeypatch.setattr(model.GPT, "generate", lambda *a, **k: pytest.fail("sampled again"))
    monkeypatch.setattr(evaluate, "replies", lambda m, t, prompts, **k: ([""] * len(prompts), []))
    run(*pair_flags(pairs, tmp_path / "sample", "slic", "--resume", steps=4))
    assert len(metrics(tmp_path / "sample")) == 4


def test_tr_dpo_with_a_hard_copy_after_every_step_always_starts_again_at_log_2(pairs, tmp_path):
    """The first step is DPO's; then policy and reference are equal at every step. And a reference that never moves is DPO."""
    run(*pair_flags(pairs, tmp_path / "hard", "tr_dpo", "--ref_mix", 1, "--ref_every", 1))
    m = metrics(tmp_path / "hard")
    assert m[0]["logratios/max"] > 1 and all(x["loss"] == pytest.approx(math.log(2), abs=1e-12) for x in m[1:])
    run(*pair_flags(pairs, tmp_path / "never", "tr_dpo", "--ref_every", 1000))
    run(*pair_flags(pairs, tmp_path / "dpo", "dpo"))
    assert largest_difference(weights(tmp_path / "never"), weights(tmp_path / "dpo")) < 1e-10


@pytest.mark.slow
def test_tr_dpo_is_the_same_on_any_split_and_resumes_with_its_reference(pairs, tmp_path, monkeypatch):
    soft = ("--ref_every", 2, "--save_every", 3)
    run(*pair_flags(pairs, tmp_path / "one", "tr_dpo", *soft))
    done = torchrun(2, *pair_flags(pairs, tmp_path / "two", "tr_dpo", "--micro_batch_size", 2, *soft))
    assert done.returncode == 0 and largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-10, done.stderr[-2000:]
    real = train.train_step
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*pair_flags(pairs, tmp_path / "parts", "tr_dpo", *soft))
    run(*pair_flags(pairs, tmp_path / "parts", "tr_dpo", "--resume", *soft))
    assert (tmp_path / "one/model/model.safetensors").read_bytes() == (tmp_path / "parts/model/model.safetensors").read_bytes()


def same_start(pairs, out, loss, *more, steps):
    words = pair_flags(pairs, out, loss, *more, steps=steps)
    words[words.index("--init") + 1] = pairs / "ref"
    return words


@pytest.mark.parametrize("loss", ["sdpo_stepwise", "spin"])
def test_every_stage_is_compared_with_the_policy_of_the_one_before(pairs, tmp_path, loss):
    """So its first loss is log 2 and its first log-ratios are 0, although the policy has moved; and the weights of stage k are those in stage-k."""
    run(*same_start(pairs, tmp_path / "run", loss, "--stages", 3, steps=3))
    m = metrics(tmp_path / "run")
    for first in (0, 3, 6):
        assert m[first]["loss"] == pytest.approx(math.log(2), abs=1e-12) and m[first]["logratios/max"] < 1e-9
    assert m[2]["logratios/max"] > 0.01 and (tmp_path / "run" / "stage-2").is_dir() and not (tmp_path / "run" / "stage-3").exists()
    one = tmp_path / "one"
    run(*same_start(pairs, one, loss, "--stages", 1, steps=3))
    if loss == "spin":                                             # all of stepwise's pairs would be in its only chunk
        stage = load_file(tmp_path / "run" / "stage-1" / "model.safetensors")
        assert largest_difference(stage, weights(one)) == 0


def test_segment_sdpo_is_dpo_on_the_agents_turns_of_the_segment_and_on_nothing_else(pairs, tmp_path):
    run(*pair_flags(pairs, tmp_path / "run", "sdpo_segment", steps=1))
    records, tokenizer = [json.loads(line) for line in open(pairs / "sessions.jsonl")], data.load_tokenizer()
    policy, reference = (model.load_policy(pairs / name, dtype=torch.float64) for name in ("moved", "ref"))
    rows, _ = data.encode(data.read(pairs / "sessions.jsonl")[0], tokenizer, max_len=64)
    losses = []
    for i in data.batch_at([p[0].prompt_key for p in rows], 8, seed=3, step=0).rows:
        margin = 0.0
        for side, sign in (("chosen", 1), ("rejected", -1)):                              # the history and the turn as text, in the plain template
            said = [m["content"] for m in records[i][side]]
            before = f"User:\n{records[i]['prompt'][0]['content']}\n\nAssistant:\n"
            context = tokenizer.encode(before) + (tokenizer.encode(said[0]) + [256] + tokenizer.encode("\n\nUser:\n?\n\nAssistant:\n") if i % 2 else [])
            turn = tokenizer.encode(said[2 * (i % 2)]) + [256]
            ids = torch.tensor(context + turn)
            for m, of in ((policy, 1), (reference, -1)):
                logps = m(ids, torch.arange(len(ids)), [len(ids)]).log_softmax(-1)
                margin += sign * of * logps[torch.arange(len(context) - 1, len(ids) - 1), turn].sum().item()
        losses.append(math.log1p(math.exp(-0.1 * margin)))
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-10)               # float64 sums in another order


def test_each_stage_may_have_a_beta_of_its_own(pairs, tmp_path, monkeypatch):
    seen, real = [], train.LOSSES["dpo"]

    @wraps(real)
    def dpo(*measured, beta, **named):
        seen.append(beta)
        return real(*measured, beta=beta, **named)

    monkeypatch.setitem(train.LOSSES, "dpo", dpo)
    run(*pair_flags(pairs, tmp_path / "run", "spin", "--beta", "0.5,1,2", "--stages", 3, steps=2))
    assert list(dict.fromkeys(seen)) == [0.5, 1.0, 2.0] and seen == sorted(seen)


def test_spins_rejected_responses_are_the_opponents_own_samples(pairs, tmp_path):
    run(*same_start(pairs, tmp_path / "run", "spin", "--stages", 2, steps=2))
    rows, _ = data.encode(data.read(pairs / "pairs.jsonl")[0], data.load_tokenizer(), max_len=64)
    prompts = [p[0].ids[:p[0].n_prompt].tolist() for p in rows]
    for stage, folder in ((0, pairs / "ref"), (1, tmp_path / "run" / "stage-1")):
        opponent = model.load_policy(folder, dtype=torch.float64)
        kept = json.loads((tmp_path / "run" / f"stage-{stage}-samples.json").read_text())
        assert kept == opponent.generate(prompts, eot=256, max_new_tokens=64, room=64, seed=[3, 7, 0])


def test_stepwise_chunks_are_disjoint_and_go_from_what_the_reference_prefers_to_what_it_does_not(pairs, tmp_path, monkeypatch):
    seen, real = [], train.stage_units
    monkeypatch.setattr(train, "stage_units", lambda *a: seen.append(real(*a)) or seen[-1])
    run(*same_start(pairs, tmp_path / "run", "sdpo_stepwise", "--stages", 3, steps=1))
    reference = model.load_policy(pairs / "ref", dtype=torch.float64)
    cfg = train.settings([str(w) for w in flags(pairs, "unused")])[0]
    margins = [(lambda x: x[:, 0] - x[:, 1])(train.score(reference, chunk, cfg, torch.device("cpu"))) for chunk in seen]
    assert margins[0].min() >= margins[1].max() and margins[1].min() >= margins[2].max()
    assert len({pair[0].where for chunk in seen for pair in chunk}) == 26 and [len(c) for c in seen] == [8, 9, 9]


@pytest.mark.parametrize("loss", ["sdpo_stepwise", "spin"])
@pytest.mark.parametrize("dies_at", [2, 3, 4])
def test_stages_resume_in_any_of_them_with_the_same_bytes(pairs, tmp_path, monkeypatch, loss, dies_at):
    """Killed in the first stage, right after it (checkpoint written, next stage not begun), and in the second."""
    how = ("--stages", 2, "--save_every", 1)
    run(*same_start(pairs, tmp_path / "whole", loss, *how, steps=3))
    real, count = train.train_step, []
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", lambda *a, **k: count.append(1) or (real(*a, **k) if len(count) <= dies_at else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(*same_start(pairs, tmp_path / "parts", loss, *how, steps=3))
    run(*same_start(pairs, tmp_path / "parts", loss, *how, "--resume", steps=3))
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (tmp_path / "parts/model/model.safetensors").read_bytes()
    assert [x["step"] for x in metrics(tmp_path / "parts")] == list(range(6))


def test_running_means_are_what_the_papers_code_keeps(pairs, tmp_path):
    """With a policy that stands still: beta-DPO's 0.9 moving average from 0, updated before use; BCO's mean over all samples so far."""
    for loss in ("beta_dpo", "bco_pair"):
        run(*pair_flags(pairs, tmp_path / loss, loss, "--lr", "1e-15", steps=3))
    average, seen = 0.0, []
    for step in range(3):
        ratios = np.array([[logp(row, p) - logp(row, q) for row, p, q in pair] for pair in by_hand(pairs, step)])
        h = ratios[:, 0] - ratios[:, 1]
        average = 0.9 * average + 0.1 * h.mean()
        beta = max(1e-3, 0.1 * (1 + 0.6 * (h.mean() - average)))
        assert metrics(tmp_path / "beta_dpo")[step]["loss"] == pytest.approx(np.log1p(np.exp(-beta * h)).mean(), abs=1e-9)
        seen += (0.1 * ratios).flatten().tolist()
        c, r, shift = 0.1 * ratios[:, 0], 0.1 * ratios[:, 1], np.mean(seen)
        by_equation = (np.log1p(np.exp(-(c - shift))) + np.log1p(np.exp(r - shift))).mean()
        assert metrics(tmp_path / "bco_pair")[step]["loss"] == pytest.approx(by_equation, abs=1e-9)     # lr 1e-15 moves a log-prob by about 1e-11


def test_bernoulli_ipo_sees_pairs_in_both_orders(pairs, tmp_path):
    """Else its target would be 1 / tau always, and not 1 / (2 tau) on average. The first step by hand: (h - 1/tau)^2 or, turned, (-h)^2."""
    run(*pair_flags(pairs, tmp_path / "run", "ipo_bernoulli", steps=1))
    heads = np.random.default_rng([3, 26]).random(26) < 0.5
    rows, _ = data.encode(data.read(pairs / "pairs.jsonl")[0], data.load_tokenizer(), max_len=64)
    batch = data.batch_at([p[0].prompt_key for p in rows], 8, seed=3, step=0)
    h = [logp(w, pw) - logp(w, qw) - logp(l, pl) + logp(l, ql) for (w, pw, qw), (l, pl, ql) in by_hand(pairs)]
    expected = np.mean([(x - 10) ** 2 if heads[i] else x ** 2 for x, i in zip(h, batch.rows)])
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-12) and 0 < heads[batch.rows].sum() < 8
    assert metrics(tmp_path / "run")[0]["rewards/accuracies"] == pytest.approx(np.mean([x > 0 for x in h]))


def test_a_sum_is_the_sum_and_a_flag_sets_all_terms_that_have_it(pairs, tmp_path):
    run(*pair_flags(pairs, tmp_path / "sum", "dpo + 0.25*simpo", "--beta", 0.3, steps=1))
    for name in ("dpo", "simpo"):
        run(*pair_flags(pairs, tmp_path / name, name, "--beta", 0.3, steps=1))
    total, dpo, simpo = (metrics(tmp_path / n)[0]["loss"] for n in ("sum", "dpo", "simpo"))
    assert total == pytest.approx(dpo + 0.25 * simpo, abs=1e-12)
    run(*pair_flags(pairs, tmp_path / "own", "dpo + 0.25*simpo", steps=1))                  # else each keeps its own: 0.1 and 2.0
    run(*pair_flags(pairs, tmp_path / "dpo1", "dpo", steps=1)), run(*pair_flags(pairs, tmp_path / "simpo2", "simpo", steps=1))
    own, dpo, simpo = (metrics(tmp_path / n)[0]["loss"] for n in ("own", "dpo1", "simpo2"))
    assert own == pytest.approx(dpo + 0.25 * simpo, abs=1e-12)


@pytest.mark.parametrize("loss, loads", [("simpo", False), ("orpo", False), ("cpo", False), ("wpo", True), ("tdpo1", True), ("dpo_reference_free", False)])
def test_a_paired_loss_without_a_reference_in_its_signature_never_loads_one(pairs, tmp_path, monkeypatch, loss, loads):
    seen, real = [], train.frozen_reference
    monkeypatch.setattr(train, "frozen_reference", lambda *a: seen.append(1) or real(*a))

    def before_the_report(*a, **k):
        assert bool(seen) == loads
        raise InterruptedError

    monkeypatch.setattr(model.GPT, "save", before_the_report)
    with pytest.raises(InterruptedError):
        run(*pair_flags(pairs, tmp_path / "run", loss, steps=2))


def test_beta_dpo_resumes_with_its_running_mean(pairs, tmp_path, monkeypatch):
    run(*pair_flags(pairs, tmp_path / "whole", "beta_dpo", "--save_every", 2, steps=6))
    real = train.train_step
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*pair_flags(pairs, tmp_path / "parts", "beta_dpo", "--save_every", 2, steps=6))
    run(*pair_flags(pairs, tmp_path / "parts", "beta_dpo", "--save_every", 2, "--resume", steps=6))
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (tmp_path / "parts/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("loss, change, message", [
    ("odpo", {"score_chosen": None}, r"pairs.jsonl: line 1: --loss odpo needs the columns score_chosen, score_rejected"),
    ("odpo", {"score_chosen": 1.0}, r"line 1: --loss odpo needs score_chosen > score_rejected, got 1 and 1"),
    ("sppo", {"win_prob_rejected": None}, r"line 1: --loss sppo needs the columns win_prob_chosen, win_prob_rejected"),
    ("dpo", {"rejected": None}, r"line 1: rejected|line 1: expected a text")])
def test_a_missing_or_senseless_column_is_one_line_naming_the_row(pairs, tmp_path, loss, change, message):
    records = [json.loads(line) for line in open(pairs / "pairs.jsonl")]
    records[0] |= change
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = pair_flags(pairs, tmp_path / "run", loss)
    words[words.index("--data") + 1] = tmp_path / "pairs.jsonl"
    with pytest.raises(SystemExit) as e:
        run(*words)
    assert re.search(message, e.value.code) and "\n" not in e.value.code and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, message", [
    (["--loss", "dpo", "--data", "ROWS"], r"--loss dpo needs pairs \(prompt, chosen, rejected\); the file has prompt, completion, label"),
    (["--loss", "aot", "--micro_batch_size", "2"], r"--loss aot: sorts its batch"),
    (["--loss", "rdpo", "--label_smoothing", "0.5"], r"--loss rdpo: label_smoothing"),
    (["--loss", "dpo + 0.1*nope"], r"--loss dpo \+ 0.1\*nope: '0.1\*nope' is not NAME or NUMBER\*NAME; names are .*dpo"),
    (["--loss", "dpo + kto"], r"an unpaired and a paired loss cannot be summed"),
    (["--loss", "dpo + aot"], r"aot sorts its batch and cannot be summed"),
    (["--loss", "dpo", "--gamma", "1"], r"--gamma: dpo has no such parameter; it has beta"),
    (["--loss", "ipo", "--tau", "0"], r"--tau 0.0: must be positive")])
def test_bad_input_for_pairs_ends_in_one_line(pairs, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train.main([str(pairs / "rows.jsonl") if w == "ROWS" else w for w in words])
    assert re.search(message, e.value.code) and "\n" not in e.value.code and not list(tmp_path.iterdir())


def test_equal_sides_are_dropped_and_counted(pairs, tmp_path, capsys):
    records = [json.loads(line) for line in open(pairs / "pairs.jsonl")]
    records[3]["rejected"] = records[3]["chosen"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = pair_flags(pairs, tmp_path / "run", "dpo", steps=1)
    words[words.index("--data") + 1] = tmp_path / "pairs.jsonl"
    run(*words)
    assert "read 26 | pairs 25 | dropped: chosen is rejected 1" in capsys.readouterr().out


# --- what is measured, and what is not ------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, extra, references, mismatched", [
    ("kto", [], True, True), ("kto", ["--z0", "zero"], True, False), ("kto", ["--z0", "1.5"], True, False),
    ("apo_zero_unpaired", [], True, False), ("bco", [], True, False), ("kto_uniform", [], False, True), ("sft", [], False, False)])
def test_only_what_the_signature_names_is_measured(lab, tmp_path, monkeypatch, loss, extra, references, mismatched):
    seen = {"mismatched": 0, "reference": 0}
    real_mismatched, real_reference = data.mismatched, train.frozen_reference
    monkeypatch.setattr(data, "mismatched", lambda *a: seen.__setitem__("mismatched", 1) or real_mismatched(*a))
    monkeypatch.setattr(train, "frozen_reference", lambda *a: seen.__setitem__("reference", 1) or real_reference(*a))
    monkeypatch.setattr(evaluate, "report_files", lambda *a: None)
    source = train.file_source
    monkeypatch.setattr(train, "file_source", lambda *a: (s := source(*a), setattr(s, "report", lambda *a: None))[0])

    def stop_before_report(*a, **k):                                       # the report loads the reference for its samples
        assert bool(seen["reference"]) == references and bool(seen["mismatched"]) == mismatched
        raise InterruptedError

    monkeypatch.setattr(model.GPT, "save", stop_before_report)
    with pytest.raises(InterruptedError):
        run(*flags(lab, tmp_path / "run", *extra, loss=loss, steps=2))
    if extra == ["--z0", "1.5"]:
        assert metrics(tmp_path / "run")[0]["z0"] == 1.5


def test_a_new_loss_is_one_function_and_one_entry(lab, tmp_path, monkeypatch):
    def push_loss(logratios, desirable, *, beta=0.3, slope=2.0):
        """softplus(-slope beta r) for good, softplus(slope beta r) for bad.   (B,)"""
        return torch.nn.functional.softplus(slope * beta * torch.where(desirable, -logratios, logratios))

    monkeypatch.setitem(train.LOSSES, "push", push_loss)
    run(*flags(lab, tmp_path / "run", "--slope", 1, loss="push", steps=30))
    margins = [m["rewards/margins"] for m in metrics(tmp_path / "run") if m["rewards/margins"] is not None]
    assert np.mean(margins[-6:]) > np.mean(margins[:6]) + 0.05
    assert json.loads((tmp_path / "run" / "config.json").read_text())["slope"] == 1.0


def test_metrics_have_the_names_of_the_contract_and_null_for_an_absent_class(lab, tmp_path):
    good = [json.dumps(r) for r in map(json.loads, open(lab / "rows.jsonl")) if r["label"]]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    words = flags(lab, tmp_path / "run", steps=2)
    words[words.index("--data") + 1] = tmp_path / "good.jsonl"
    run(*words)
    names = {"step", "epoch", "loss", "grad_norm", "lr", "tokens_per_second", "rewards/chosen", "rewards/rejected", "rewards/margins",
             "rewards/accuracies", "logps/chosen", "logps/rejected", "z0", "z0_raw"}
    for m in metrics(tmp_path / "run"):
        assert names <= m.keys() and m["rewards/rejected"] is None and m["rewards/margins"] is None and m["logps/rejected"] is None
        assert all(x is None or math.isfinite(x) for x in m.values())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"seed", "beta", "z0", "versions", "commit", "batch_size"} <= config.keys() and config["n_undesirable"] == 0
    assert {"win_rate", "win_rate_ci95", "reward", "reward_ref", "kl", "n"} <= json.loads((tmp_path / "run" / "eval.json").read_text()).keys()


@pytest.mark.parametrize("rows", [2, 3])
def test_two_rows_and_an_uneven_last_batch_work(lab, tmp_path, rows):
    lines = open(lab / "rows.jsonl").read().splitlines()[:rows]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    words = flags(lab, tmp_path / "run", "--batch_size", 2, steps=3)
    words[words.index("--data") + 1] = tmp_path / "few.jsonl"
    run(*words)
    assert len(metrics(tmp_path / "run")) == 3


def test_auto_lambdas_print_the_counts_and_the_ratio_they_reach(lab, tmp_path, capsys):
    run(*flags(lab, tmp_path / "run", "--lambda_d", "auto", "--lambda_u", "auto", steps=1))
    text = capsys.readouterr().out
    line = next(x for x in text.splitlines() if x.startswith("lambdas:"))
    assert "18 desirable, 9 undesirable" in line and line.endswith("= 1.333")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["lambda_d"], config["lambda_u"]) == pytest.approx((1.0, 18 / 9 * 3 / 4))


def test_one_given_lambda_and_one_auto_reach_the_ratio_too():
    for hyper in ({"lambda_d": 3.0, "lambda_u": "auto"}, {"lambda_d": "auto", "lambda_u": 3.0}):
        train.set_lambdas(hyper, 10, 100, 1.25)
        assert hyper["lambda_d"] * 10 / (hyper["lambda_u"] * 100) == pytest.approx(1.25, rel=1e-12) and 3.0 in hyper.values()


# --- the step-0 self-check ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_step_0_has_the_predicted_loss_where_policy_and_reference_are_equal(lab, tmp_path, capsys, dtype):
    words = flags(lab, tmp_path / "run", "--lambda_d", 1.5, "--dtype", dtype, steps=1)
    words[words.index("--init") + 1] = lab / "ref"
    run(*words)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step 0:"))
    loss, predicted, largest = map(float, re.search(r"loss ([\d.]+) \(predicted ([\d.]+)\) \| largest \|log-ratio\| ([\d.e+-]+)", line).groups())
    m = metrics(tmp_path / "run")[0]
    rows, _ = data.encode(data.read(lab / "rows.jsonl")[0], data.load_tokenizer(), max_len=64)
    batch = data.batch_at([r.prompt_key for r in rows], 8, seed=3, step=0)
    expected = np.mean([0.75 if rows[i].desirable else 0.5 for i in batch.rows])           # lambda_y / 2, in closed form
    assert predicted == pytest.approx(expected, abs=1e-6) and line.endswith("ok") and m["grad_norm"] > 0
    assert largest <= {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.1}[dtype] and loss == pytest.approx(expected, abs=1e-6 if dtype != "bf16" else 1e-3)


def test_step_0_stops_when_the_reference_is_not_the_policy_it_should_be(lab, tmp_path, monkeypatch):
    real = model.load_policy
    loaded = []

    def other_the_second_time(folder, **how):                              # as if an adapter were missing from the reference
        loaded.append(real(folder, **how))
        if len(loaded) > 1:
            loaded[-1].wte.weight.data.mul_(1.1)
        return loaded[-1]

    monkeypatch.setattr(model, "load_policy", other_the_second_time)
    words = flags(lab, tmp_path / "run", steps=2)
    words[words.index("--init") + 1] = lab / "ref"
    with pytest.raises(SystemExit, match="equal weights, yet a log-ratio exceeds"):
        run(*words)


def test_step_0_stops_when_there_is_no_gradient(lab, tmp_path):
    with pytest.raises(SystemExit, match="no usable gradient"):
        run(*flags(lab, tmp_path / "run", "--lambda_d", 0, "--lambda_u", 0, steps=2))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(lab, tmp_path, monkeypatch):
    monkeypatch.setitem(train.LOSSES, "broken", lambda logratios, desirable: logratios / desirable.to(logratios.dtype))
    with pytest.raises(SystemExit, match=r"step 0: the loss is not finite on .*rows.jsonl: line \d+ .*it is the loss itself"):
        run(*flags(lab, tmp_path / "run", loss="broken", steps=2))


@pytest.mark.parametrize("where, message", [("wpe.weight", "the loss is not finite on .*first in the weights, wpe.weight"),
                                            ("gradient", r"the gradient is not finite although the loss is \(first in h.1.mlp.c_fc.weight\)")])
def test_a_step_that_goes_wrong_says_which_tensor_was_first_and_leaves_the_last_checkpoint(lab, tmp_path, monkeypatch, where, message):
    real, folder = train.train_step, tmp_path / "run" / "checkpoint"

    def step(policy, reference, optimizer, batch, *rest, **how):
        if batch.step == 3 and where == "gradient":
            policy.h[1].mlp.c_fc.weight.register_hook(lambda g: g * math.nan)
        elif batch.step == 3:
            policy.get_parameter(where).data[0, 0] = math.nan
        return real(policy, reference, optimizer, batch, *rest, **how)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit, match=f"step 3: {message}"):
        run(*flags(lab, tmp_path / "run", "--save_every", 2, steps=5))
    assert [p.name for p in folder.iterdir()] == ["step-000002.safetensors"]
    assert all(t.isfinite().all() for t in load_file(folder / "step-000002.safetensors").values())


def test_a_complaint_of_one_process_is_not_lost_and_one_of_all_is_printed_once(lab, tmp_path):
    """Process 1 alone cannot write; then both find a loss that is not finite."""
    (tmp_path / "faults.py").write_text(
        "import os, sys, train, torch\n"
        "where, words = sys.argv[1], sys.argv[2:]\n"
        "def alone(*a, **k):\n"
        "    if os.environ['RANK'] == '1': raise SystemExit('only I know')\n"
        "    return real(*a, **k)\n"
        "real, train.train_step = train.train_step, alone if where == 'one' else train.train_step\n"
        "train.LOSSES['broken'] = lambda logratios, desirable: logratios / 0\n"
        "train.main(words)\n")
    for where, loss, line in (("one", "kto", "only I know"), ("all", "broken", "the loss is not finite on")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "faults.py"), where]
        words = [str(w) for w in flags(lab, tmp_path / where, loss=loss, steps=2)]
        done = subprocess.run(command + words, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode != 0 and done.stderr.count(line) == 1, done.stderr[-3000:]


def test_a_full_disk_or_a_folder_without_permission_is_found_before_training(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match=r"the model and its checkpoints need .* GiB, the disk has 0.0 free"):
        run(*flags(lab, tmp_path / "full", steps=2))
    monkeypatch.undo()
    monkeypatch.setattr(train.os, "access", lambda p, mode: False)                     # root may write anywhere, so it is pretended
    with pytest.raises(SystemExit, match="cannot be written to"):
        run(*flags(lab, tmp_path / "closed", steps=2))
    assert not (tmp_path / "full").exists() and not (tmp_path / "closed").exists()


# --- stop and resume; what faults leave behind is in test_faults.py ---------------------------------------------------------

@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_killed_and_resumed_gives_the_same_bytes(lab, tmp_path, monkeypatch, loss):
    """Stopped dead inside step 8, with the last checkpoint at 5, in the second epoch of a short-batched file; fp32."""
    more = ("--save_every", 5, "--dtype", "fp32")
    run(*flags(lab, tmp_path / "whole", *more, loss=loss, steps=12))
    real = train.train_step
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < 8 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*flags(lab, tmp_path / "parts", *more, loss=loss, steps=12))
    assert metrics(tmp_path / "parts")[-1]["step"] == 7                       # three steps more than the checkpoint holds
    run(*flags(lab, tmp_path / "parts", *more, "--resume", loss=loss, steps=12))
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b
    assert [m["step"] for m in metrics(tmp_path / "parts")] == list(range(12))
    timeless = lambda ms: [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in ms]               # noqa: E731
    assert timeless(metrics(tmp_path / "whole")) == timeless(metrics(tmp_path / "parts"))


def test_a_run_that_torchrun_starts_again_goes_on(lab, tmp_path, monkeypatch, capsys):
    real = train.train_step
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*flags(lab, tmp_path / "run", "--save_every", 2, steps=6))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step >= 4 else 1 / 0)
    run(*flags(lab, tmp_path / "run", "--overwrite", "--save_every", 2, steps=6))                    # as it was typed the first time
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(6))


def test_ctrl_c_saves_a_checkpoint_and_resume_finishes_the_same_run(lab, tmp_path):
    words = flags(lab, tmp_path / "run", "--save_every", 10**6, "--dtype", "fp32", steps=4000)
    child = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    patience = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 5) and time.time() < patience:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    stopped = re.search(r"stopped after step (\d+) of 4000; .*--resume goes on", errors)
    assert stopped and child.returncode != 0 and "Traceback" not in errors, errors[-2000:]
    k = int(stopped.group(1))
    words[words.index("--steps") + 1] = k + 3
    run(*words, "--resume")
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(k + 3))


def test_the_last_two_checkpoints_are_kept_and_no_half_files(lab, tmp_path):
    run(*flags(lab, tmp_path / "run", "--save_every", 2, steps=9))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir()) == ["step-000008.safetensors", "step-000009.safetensors"]


def test_resume_refuses_settings_that_changed_and_lists_them(lab, tmp_path):
    run(*flags(lab, tmp_path / "run", steps=2))
    with pytest.raises(SystemExit, match=r"settings changed .*beta was 0.1, is 0.2.*seed was 3, is 4"):
        run(*flags(lab, tmp_path / "run", "--resume", "--beta", 0.2, "--seed", 4, steps=2))


def test_the_same_command_gives_the_same_bytes(lab, tmp_path):
    for name in ("a", "b"):
        run(*flags(lab, tmp_path / name, "--dtype", "fp32", steps=3))
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (tmp_path / "b/model/model.safetensors").read_bytes()


# --- bad input: one line, before any training --------------------------------------------------------------------------------

BAD = {
    "unknown flag": (["--bogus", "1"], r"--bogus: unknown flag; valid are .*--loss.*--beta"),
    "unknown loss": (["--loss", "nope"], r"--loss nope: no such loss; valid are .*kto"),
    "a flag the loss lacks": (["--loss", "apo_zero_unpaired", "--lambda_d", "2"], r"--lambda_d: apo_zero_unpaired has no such parameter; it has beta"),
    "z0 for a loss without one": (["--loss", "bco", "--z0", "zero"], r"--z0: bco has no such parameter; it has beta"),
    "no value": (["--lr"], r"--lr: expected one argument"),
    "not a number": (["--lr", "fast"], r"--lr: 'fast' is not a number"),
    "not a whole number": (["--steps", "1.5"], r"--steps: '1.5' is not a whole number"),
    "not finite": (["--beta", "nan"], r"--beta: 'nan' is not a finite number"),
    "out of range": (["--beta", "0"], r"--beta 0.0: must be positive"),
    "negative lambda": (["--lambda_u", "-1"], r"--lambda_u: '-1': valid are auto, or a number >= 0"),
    "negative z0": (["--z0", "-3"], r"--z0: '-3': valid are estimate, zero, on_policy, or a number >= 0"),
    "dtype": (["--dtype", "int8"], r"--dtype: 'int8': valid are fp32, bf16, fp64"),
    "a device that is no device": (["--device", "x"], r"--device x: this machine has cpu"),
    "ratio": (["--lambda_ratio", "2"], r"--lambda_ratio 2.0: .*\[1, 1.5\]"),
    "missing file": (["--data", "/nowhere/rows.jsonl"], r"--data /nowhere/rows.jsonl: no such file"),
    "empty file": (["--data", "EMPTY"], r"--data .*: the file is empty"),
    "broken JSON": (["--data", "BROKEN"], r"--data .*: line 2: broken JSON"),
    "wrong label": (["--data", "LABEL"], r"label\.jsonl: line 2: label is 'yes'; valid are true, false, 1, 0, -1"),
    "unknown format": (["--data", "FORMAT"], r"format\.jsonl: line 1: unknown format with columns question, answer"),
    "no rows left": (["--data", "BLANK"], r"--data .*: no rows left \(read 1 \| dropped: empty response 1\)"),
    "one prompt": (["--data", "ONE"], r"--data .*: all rows have one prompt.*--z0 zero"),
    "a batch of one": (["--batch_size", "1"], r"--batch_size 1: KTO's z0 is estimated from mismatched pairs, which need 2 rows"),
    "no desirable rows for sft": (["--data", "BAD", "--loss", "sft"], r"--loss sft: learns from desirable rows only"),
    "threshold missing": (["--data", "SCORED"], r"line 1: scored rows need --threshold NUMBER"),
    "columns": (["--data", "ONE", "--columns", "nonsense"], r"--columns nonsense: .nonsense. is not of the form OURS=THEIRS"),
    "column not there": (["--data", "ONE", "--columns", "prompt=q"], r"--columns prompt=q, but the row has prompt, completion, label"),
    "folder without a model": (["--model", "FOLDER", "--data", "ONE"], r"--model .*: no config.json there"),
    "model without data": (["--model", "FOLDER"], r"--model: needs --data FILE"),
    "tokenizer folder": (["--tokenizer", "FOLDER", "--data", "ONE"], r"--tokenizer .*: no tokenizer there"),
    "a start that is not there": (["--init", "/nowhere"], r"--init /nowhere: no config.json there"),
    "half a model": (["--model", "HALF", "--data", "ROWS"], r"--model .*: cannot be loaded from model.safetensors: .*header"),
    "existing folder": (["--out", "FULL"], r"--out .*: holds files that are not a run's"),
    "a folder with a model of one's own": (["--out", "OWN"], r"--out .*: holds files that are not a run's"),
    "out is a file": (["--out", "ONE"], r"--out .*: is a file"),
    "nothing to resume": (["--out", "FOLDER", "--resume"], r"--resume: .* holds no run"),
    "flips": (["--flip", "1.5"], r"--flip 1.5: a share, from 0 to 1"),
    "flips of a file": (["--data", "ROWS", "--flip", "0.2"], r"--flip: belongs to the embedded world"),
    "stages": (["--loss", "spin", "--stages", "0"], r"--stages 0: must be at least 1"),
    "betas": (["--loss", "spin", "--beta", "1,2"], r"--beta: \[1.0, 2.0\] for 4 stages; give one, or one for each"),
    "moving": (["--loss", "tr_dpo", "--ref_mix", "0"], r"--ref_mix 0.0: a share, above 0 and up to 1"),
    "both": (["--overwrite", "--resume"], r"--overwrite and --resume: give one of them"),
    "adapters of the small GPT": (["--lora", "4"], r"--lora 4: is for Hugging Face models; give --model"),
    "no adapter to save": (["--save", "adapter"], r"--save adapter: needs --lora RANK"),
    "ppo without a reward": (["--loss", "ppo", "--data", "ROWS"], r"--loss ppo: needs --reward: a folder that --loss rm wrote, or file.py:function"),
    "compiled heads": (["--loss", "rm", "--data", "PAIRS", "--compile"], r"--compile: not with --loss rm"),
    "a reward that is not there": (["--loss", "ppo", "--reward", "nobody.py:f"], r"--reward nobody.py:f: "),
    "a sum of what acts": (["--loss", "ppo + dpo"], r"'ppo' is not NAME or NUMBER\*NAME"),
    "a sharded reward model": (["--loss", "rm", "--lora", "4", "--model", "HALF", "--data", "PAIRS"], r"--loss rm: without --lora"),
    "judge without prompts": (["--judge", "world", "--data", "ROWS"], r"--judge: needs --eval_data FILE"),
    "judge that is not there": (["--judge", "nobody.py:f", "--data", "ROWS", "--eval_data", "ROWS"], r"--judge nobody.py:f: no such file"),
    "turns": (["--turns", "first"], r"--turns: 'first': valid are last, all"),
    "segments that are not there": (["--loss", "sdpo_segment", "--data", "PAIRS"], r"pairs.jsonl: line 1: .*segment"),
    "not a flag": (["kto"], r"'kto': expected --name value or --name=value"),
    "two dashes for a value": (["--warmup=--"], r"--warmup: .--. is no value"),
    "flag without the file it belongs to": (["--threshold", "1"], r"--threshold: needs --data FILE"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    row = '{"prompt": "p", "completion": "c", "label": true}\n'
    texts = {"EMPTY": "", "BROKEN": row + '{"prompt": \n', "LABEL": row + row.replace("true", '"yes"'), "FORMAT": '{"question": "", "answer": ""}',
             "BLANK": row.replace('"c"', '" "'), "ONE": row + row, "BAD": row.replace("true", "false"), "SCORED": '{"prompt": "p", "text": "t", "reward": 1}',
             "PAIRS": '{"prompt": "p", "chosen": "c", "rejected": "r"}'}
    names = {}
    for name, text in texts.items():
        names[name] = folder / f"{name.lower()}.jsonl"
        names[name].write_text(text)
    for name in ("FOLDER", "FULL"):
        names[name] = folder / name
        names[name].mkdir()
    (names["FULL"] / "thesis.txt").write_text("years of work")
    names["OWN"] = folder / "own"
    (names["OWN"] / "model").mkdir(parents=True)
    names["ROWS"] = folder / "rows.jsonl"
    names["ROWS"].write_text(row + row.replace('"p"', '"q"'))
    names["HALF"] = folder / "half"
    tiny_llama(names["HALF"], [row])
    whole = (names["HALF"] / "model.safetensors").read_bytes()
    (names["HALF"] / "model.safetensors").write_bytes(whole[:1000])
    return {k: str(v) for k, v in names.items()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_that_names_it(case, bad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = BAD[case]
    with pytest.raises(SystemExit) as e:
        train.main([bad_files.get(w, w) for w in words])
    assert re.search(message, e.value.code) and "\n" not in e.value.code
    assert not (tmp_path / "out").exists(), "nothing may be written before the input is known to be good"


def test_an_existing_run_is_only_replaced_when_asked(lab, tmp_path):
    run(*flags(lab, tmp_path / "run", steps=1))
    with pytest.raises(SystemExit, match="a run is there already; --resume continues it, --overwrite replaces it"):
        run(*flags(lab, tmp_path / "run", steps=1))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(*flags(lab, tmp_path / "run", "--overwrite", steps=2))
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_flags_may_be_written_with_an_equals_sign():
    cfg, hyper, origin = train.settings(["--loss=kto", "--beta=0.2", "--z0=0", "--lr=1e-4", "--dry-run"])
    assert hyper["beta"] == 0.2 and hyper["z0"] == 0.0 and cfg.lr == 1e-4 and cfg.dry_run and origin["beta"] == "command line"


def test_defaults_come_from_the_world_then_the_signature_then_config(lab):
    cfg, hyper, origin = train.settings([])
    assert (cfg.lr, cfg.steps, cfg.batch_size, hyper["beta"]) == (5e-4, 400, 32, 0.5) and origin["beta"] == "embedded world"
    assert hyper["lambda_d"] == 1.0 and origin["lambda_d"] == "kto's signature" and origin["seed"] == "default"
    cfg, hyper, _ = train.settings(["--model", str(lab / "ref"), "--data", str(lab / "rows.jsonl")])
    assert (cfg.lr, hyper["beta"], cfg.epochs) == (5e-6, 0.1, 1.0)


def test_a_dry_run_writes_nothing(lab, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*flags(lab, tmp_path / "run", "--dry_run"))
    run("--dry_run")                                                         # the embedded world, without its base model
    text = capsys.readouterr().out
    assert text.count("step 0: loss") == 2 and text.count("estimate: ") == 2 and "loss 0.500000 (predicted 0.500000)" in text
    assert not list(tmp_path.iterdir())


def test_help_shows_the_flags_and_the_equation(capsys):
    for words, part in ((["--help"], "--micro_batch_size"), (["--loss", "kto", "--help"], "lambda_d sigma(beta (r - z0))")):
        with pytest.raises(SystemExit) as e:
            run(*words)
        assert e.value.code == 0 and part in capsys.readouterr().out


# --- real models and real files -----------------------------------------------------------------------------------------------

def tiny_llama(folder, texts):
    """A random Llama with a byte-level BPE tokenizer: end-of-text, no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    c = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)
    LlamaForCausalLM(c).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def first_step_by_hand(folder, file, m, *, batch_size, seed, max_len, max_prompt_len, beta=0.1):
    """The first KTO step in float64, one sequence at a time: at policy = reference loss is 1/2 and the gradient beta/4 d(y)/B."""
    tokenizer, lm = data.load_tokenizer(folder), model.load_policy(folder, dtype=torch.float64)
    rows, _ = data.encode(data.to_feedback(data.read(file)[0]), tokenizer, max_len=max_len, max_prompt_len=max_prompt_len)
    batch = data.batch_at([r.prompt_key for r in rows], batch_size, seed=seed, step=0)
    for i in batch.rows:
        ids = torch.tensor(rows[i].ids.tolist())[None]
        logp = model.token_logps(lm.lm(ids, use_cache=False).logits, ids, torch.tensor(rows[i].mask.tolist())[None].double()).sum()
        (-(1 if rows[i].desirable else -1) * 0.25 * beta * logp / len(batch.rows)).backward()
    norm = torch.stack([p.grad.norm() for p in lm.parameters() if p.grad is not None]).norm()
    assert m["loss"] == pytest.approx(0.5, abs=1e-6)
    assert m["grad_norm"] == pytest.approx(float(norm), rel=1e-4)                     # the run is float32, its sums over 32 sequences


def check_llama_run(out, folder, file, n, **how):
    run("--model", folder, "--data", file, "--out", out, "--lr", "2e-3", "--epochs", 2, "--batch_size", 16, "--seed", 1, "--warmup", 3,
        "--max_len", how["max_len"], "--max_prompt_len", how["max_prompt_len"])
    m = metrics(out)
    first_step_by_hand(folder, file, m[0], batch_size=16, seed=1, **how)
    assert len(m) == 2 * math.ceil(n / 16)
    result = json.loads((Path(out) / "eval.json").read_text())
    assert result["train"]["margin"] > 0.5, "the margin of the trained rows rises"
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(Path(out) / "model", dtype=torch.float32)      # the saved model is what was trained
    assert largest_difference(dict(lm.named_parameters()), dict(model.load_policy(Path(out) / "model").lm.named_parameters())) == 0


def test_a_hugging_face_model_trains_on_conversations(tmp_path):
    rng = np.random.default_rng(1)
    words = "red green blue black white round square flat deep tall".split()
    records = [{"messages": [{"role": "user", "content": " ".join(rng.choice(words, 3))}, {"role": "assistant", "content": "ok"},
                             {"role": "user", "content": " ".join(rng.choice(words, 2))},
                             {"role": "assistant", "content": " ".join(rng.choice(words[:5] if i % 2 else words[5:], 4))}], "label": bool(i % 2)} for i in range(40)]
    (tmp_path / "talk.json").write_text(json.dumps(records))
    folder = tiny_llama(tmp_path / "llama", [json.dumps(r) for r in records])
    check_llama_run(tmp_path / "run", folder, tmp_path / "talk.json", 40, max_len=128, max_prompt_len=64)


@pytest.fixture(scope="module")
def llama(lab, tmp_path_factory):
    """A tiny random Llama and flags that train it on the lab's rows."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama") / "model", open(lab / "rows.jsonl").read().split("\n"))
    return folder, lambda out, *more, steps=4: ["--model", folder, "--data", lab / "rows.jsonl", "--out", out, "--lr", "1e-2", "--steps", steps,
                                                "--batch_size", 8, "--seed", 1, "--warmup", 1, "--lora", 4, *more]


def linear(folder, name="model.layers.0.self_attn.q_proj.weight"):
    return load_file(Path(folder) / "model.safetensors")[name].double()


def test_an_adapter_alone_is_trained_and_compared_with_the_model_without_it(llama, tmp_path):
    folder, words = llama
    run(*words(tmp_path / "run", "--save_every", 2))
    m = metrics(tmp_path / "run")
    assert m[0]["loss"] == pytest.approx(0.5, abs=1e-6) and m[0]["logratios/max"] < 1e-5 < 0.1 < m[-1]["logratios/max"]
    saved = load_file(next((tmp_path / "run" / "checkpoint").iterdir()))
    assert {k for k in saved if k.startswith("policy.")} == {k for k in saved if "lora_" in k and k.startswith("policy.")}
    change = linear(tmp_path / "run" / "model") - linear(folder)
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4                  # float32 rounding of the sum is 1e-7 of W, 1e-5 of the change


def test_an_adapter_saved_alone_is_the_merged_model_and_may_be_continued_with_itself_in_the_reference(llama, tmp_path, lab):
    folder, words = llama
    run(*words(tmp_path / "merged"))
    run(*words(tmp_path / "alone", "--save", "adapter"))
    alone, merged = (model.load_policy(tmp_path / name / "model") for name in ("alone", "merged"))
    assert not (tmp_path / "alone/model/model.safetensors").exists() and largest_difference(dict(alone.named_parameters()), dict(merged.named_parameters())) < 1e-6
    more = words(tmp_path / "more", "--dtype", "fp64", steps=1)
    more[1] = tmp_path / "alone" / "model"
    run(*more)
    first = metrics(tmp_path / "more")[0]
    rows, _ = data.encode(data.to_feedback(data.read(lab / "rows.jsonl")[0]), data.load_tokenizer(folder), max_len=512)
    batch = [rows[i] for i in data.batch_at([r.prompt_key for r in rows], 8, seed=1, step=0).rows]
    of = lambda path: train.score(model.load_policy(path, dtype=torch.float64), [(r,) for r in batch if r.desirable], train.Config(), torch.device("cpu")).mean()  # noqa: E731
    assert first["logratios/max"] < 1e-9 and first["logps/chosen"] == pytest.approx(float(of(tmp_path / "alone/model")), abs=1e-6)
    assert abs(first["logps/chosen"] - float(of(folder))) > 0.1, "the reference would be the bare base"


def test_adapters_resume_with_the_same_bytes(llama, tmp_path, monkeypatch):
    _, words = llama
    run(*words(tmp_path / "whole", "--save_every", 2))
    real = train.train_step
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", lambda p, r, o, b, *a, **k: real(p, r, o, b, *a, **k) if b.step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*words(tmp_path / "parts", "--save_every", 2))
    run(*words(tmp_path / "parts", "--save_every", 2, "--resume"))
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (tmp_path / "parts/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", ["tdpo2", "spin", "dpo_reference_free", "slic"])
def test_paired_losses_and_recipes_work_with_adapters(llama, pairs, tmp_path, loss):
    words = llama[1](tmp_path / "run", "--loss", loss, "--max_len", 64, steps=2)
    words[words.index("--data") + 1] = pairs / "pairs.jsonl"
    run(*words)
    assert all(math.isfinite(m["loss"]) for m in metrics(tmp_path / "run"))


@pytest.mark.parametrize("loss", ["kto", "tdpo2"])
def test_recomputed_activations_change_nothing(llama, pairs, tmp_path, loss):
    for name, more in (("plain", []), ("checkpointed", ["--checkpoint_activations"])):
        words = llama[1](tmp_path / name, "--loss", loss, "--dtype", "fp64", *more, steps=2)
        words[words.index("--data") + 1] = pairs / ("pairs.jsonl" if loss == "tdpo2" else "rows.jsonl")
        run(*words)
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")) < 1e-10


def test_compiled_policy_and_reference_start_equal_and_train_as_plain_ones(lab, tmp_path, monkeypatch):
    made, once = [], model.GPT.compile_layers
    monkeypatch.setattr(model, "compiled", lambda f: torch.compile(f, dynamic=True, backend="aot_eager"))
    monkeypatch.setattr(model.GPT, "compile_layers", lambda policy: made.append(policy) or once(policy))
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        run(*flags(lab, tmp_path / name, "--dtype", "fp32", *more))
    assert len(made) >= 3                                                    # the policy, and its reference for y and for y'
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_a_judge_named_on_the_command_line_compares_both_models_at_the_end(llama, lab, tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def short(prompts, responses):\n    return [-len(r) for r in responses]\n")
    run(*llama[1](tmp_path / "run", "--eval_data", lab / "rows.jsonl", "--judge", f"{tmp_path / 'judge.py'}:short", "--max_len", 48, steps=1))
    result, card = json.loads((tmp_path / "run/eval.json").read_text()), (tmp_path / "run/model/README.md").read_text()
    assert 0 <= result["win_rate"] <= 1 and result["n"] == 7 and result["judge"].endswith("short") and "win rate against the reference" in card
    assert str(tmp_path) not in card


@needs_shared
def test_a_hugging_face_model_trains_on_kto_en_demo(tmp_path, capsys):
    file = SHARED / "llamafactory" / "kto_en_demo.json"
    folder = tiny_llama(tmp_path / "llama", [m["content"] for r in json.loads(file.read_text())[:60] for m in r["messages"]])
    check_llama_run(tmp_path / "run", folder, file, 300, max_len=256, max_prompt_len=128)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("data:"))
    assert "read 300" in line and "desirable 150" in line and "prompt cut from the left" in line and "response cut from the right" in line


@needs_shared
def test_the_small_gpt_trains_on_scored_reviews_over_gpt2s_vocabulary(tmp_path, capsys):
    """A few steps on all 2,543 usable rows (the reviews were cut when sampled: no end-of-text), then many on 48 of them."""
    file, some = SHARED / "odpo" / "imdb-sft-test.jsonl", tmp_path / "some.jsonl"
    some.write_text("\n".join(file.read_text().split("\n")[:48]))
    how = ("--threshold", "1.0", "--tokenizer", SHARED / "gpt2-bpe", "--add_eot", "false", "--max_len", 96, "--max_prompt_len", 32, "--batch_size", 8,
           "--sft_steps", 2, "--warmup", 2)
    run("--data", file, "--dry_run", *how)
    text = capsys.readouterr().out
    assert "read 2,560" in text and "dropped: empty response 17" in text and "desirable 1,665" in text and "undesirable 878" in text
    run("--data", some, "--steps", 10, "--lr", "2e-3", "--out", tmp_path / "run", *how)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["train"]["margin"] > 0.2, "the margin of the trained rows rises"


# --- the README ------------------------------------------------------------------------------------------------

def test_the_readmes_table_of_methods_is_the_one_the_docstrings_give():
    """Stale? python experiments.py objectives prints the one to paste."""
    import experiments
    assert experiments.objectives_table() in (ROOT / "README.md").read_text()


def test_the_readmes_table_of_results_is_the_one_in_results():
    """Stale? python experiments.py methods --table prints the one to paste."""
    import experiments
    results = json.loads((ROOT / "results" / "methods.json").read_text())
    assert experiments.methods_table(results) in (ROOT / "README.md").read_text()
    assert set(results) == {*train.LOSSES, *train.RECIPES} - {"rm"} and all(len(r["runs"]) >= 3 for r in results.values())
    for name, entry in results.items():
        for r in entry["runs"]:                                    # nothing lies above the exact frontier by more than sampling noise
            assert r["reward"] <= r["best"] + 0.15, (name, r["seed"])


def main_command():
    """The torchrun command of the README's first code block, as written there."""
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    command = re.search(r"torchrun (train\.py.*)", block).group(1)
    return [sys.executable, "-m", "torch.distributed.run", *shlex.split(command.split("&&")[0])]


def check_main_job(out, steps):
    result = json.loads((out / "eval.json").read_text())
    low, high = result["win_rate_ci95"]
    assert low <= result["win_rate"] <= high and result["n"] == 480 and result["split"] == "report"
    for name in ("curves.png", "frontier.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert (out / "samples.md").read_text().count("\n|") == 14 and len(metrics(out)) == steps
    # no policy lies above the exact frontier; 0.1 is two standard errors of a mean of 480 utilities with deviation 1.2
    assert result["reward"] <= result["optimum_at_same_kl"]["reward"] + 0.1
    return result


def test_the_readmes_main_command_runs(tmp_path):
    """On a base model of a few steps; the whole job is a slow test."""
    done = subprocess.run(main_command() + ["--pretrain_steps", "20", "--sft_steps", "20", "--steps", "10", "--out", tmp_path / "kto"], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
    assert done.returncode == 0, done.stderr[-3000:]
    check_main_job(tmp_path / "kto", 10)
    for part in ("step 0: loss 0.500000 (predicted 0.500000)", "thumbs up", "What came out", "win rate against the reference", "next:"):
        assert part in done.stdout
    answer = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path / "kto", "--prompt", "Help, my router gets too hot!"],
                            capture_output=True, text=True, timeout=100)
    assert answer.stdout.count("reference") == 3 and answer.stdout.count("policy") == 3, answer.stderr


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The main job's folder, as the README's command leaves it."""
    out = tmp_path_factory.mktemp("main") / "kto"
    done = subprocess.run(main_command() + ["--out", out], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_readmes_main_command_reaches_its_numbers(main_job):
    """One seed of the three the README reports; the bounds leave two standard errors (0.03; 0.15) below what is promised."""
    result = check_main_job(main_job, 400)
    assert result["win_rate"] >= 0.81 and result["reward"] >= 1.75 and result["malformed"] <= 0.10
    assert result["reward_greedy"] > result["reward_ref_greedy"] + 1, "greedy decoding shows the effect too"


@pytest.mark.slow
def test_two_processes_reach_the_same_win_rate_in_fp32(main_job):
    done = torchrun(2, "--loss", "kto", "--out", main_job.parent / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((out / "eval.json").read_text()) for out in (main_job, main_job.parent / "two"))
    assert one["win_rate_ci95"][0] <= two["win_rate"] <= one["win_rate_ci95"][1]
    assert two["win_rate_ci95"][0] <= one["win_rate"] <= two["win_rate_ci95"][1]

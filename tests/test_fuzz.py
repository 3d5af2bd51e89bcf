"""Whatever is typed and whatever is in a file: it trains, or it stops with one line that names the flag, or the file and the row."""
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from hypothesis.internal.conjecture import providers
from safetensors.torch import load_file

import data
import evaluate
import model
import train

NOTHING = providers.Constants(**{kind: providers.SortedSet() for kind in ("integers", "floats", "bytes", "strings")})
NASTY = ["", " ", "\n", "</s>", "<|endoftext|>", "\x00", "\x85", "\u2028", "\ufeff", "\ud800", "\u202e", "e\u0301", "\U0001f600", "{{ 1/0 }}", "{% raw %}", "\u27e60:content\u27e7",
         "../../etc/passwd", "%s%n", "long " * 400, "\u4f60\u597d", "null", "-1", "true", "\\", '"', "\t\r"]
texts = st.sampled_from(NASTY) | st.text(max_size=12) | st.sampled_from(["how?", "why so?", "good answer.", "bad answer!", "ok"])
good_texts = st.sampled_from(["sun", "moon and rain", "wind", "a leaf", "stone.", "\u4f60\u597d", "e\u0301\U0001f600", "</s>"])
junk = st.none() | st.booleans() | st.integers(-3, 3) | st.just(10**400) | st.floats() | texts | st.lists(texts, max_size=2) | st.just({}) | st.just([]) | st.just([[["deep"]]])


def messages(text):
    roles = st.sampled_from(["user", "assistant"] * 4 + ["system", "tool", "human", "gpt", "function_call", "observation", "judge", None])
    turn = st.builds(lambda role, t, how: {"role": role, "content": t} if how else {"from": role, "value": t}, roles, text, st.booleans())
    call = st.just({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]})
    proper = st.lists(text, min_size=1, max_size=2).map(lambda ts: [m for t in ts for m in ({"role": "user", "content": t}, {"role": "assistant", "content": t})])
    return rarely(6).flatmap(lambda odd: st.lists(turn | call, max_size=4) if odd else proper)


def rarely(n):
    """True once in n times."""
    return st.integers(1, n).map(lambda i: i == n)


def record(text, paired=None):
    """A row of any format, or of those for a loss on pairs or on labels; its numbers and labels are mostly right."""
    label, number = st.sampled_from([True, False, True, False, 1, 0, -1]), st.floats(-2, 2) | st.integers(-3, 3)
    prompt = text | messages(text).map(lambda ms: ms[:-1] or ms)
    turn = text.map(lambda t: {"role": "assistant", "content": t})
    segment = st.builds(lambda a, b: {"start": a, "end": b}, st.integers(-1, 2), st.integers(0, 3))
    optional = dict(score_chosen=st.just(2.0), score_rejected=number, win_prob_chosen=st.just(0.7), win_prob_rejected=number, target=text, system=text, segment=segment,
                    truncated=st.booleans())
    pairs = [
        st.fixed_dictionaries(dict(prompt=text, chosen=text, rejected=text), optional=optional),
        st.fixed_dictionaries(dict(prompt=text, chosen=text, rejected=text, score_chosen=st.just(2.0), score_rejected=number, win_prob_chosen=st.just(0.7), win_prob_rejected=st.just(0.2))),
        st.fixed_dictionaries(dict(prompt=prompt, chosen=text | turn, rejected=text | turn), optional=optional),
        st.fixed_dictionaries(dict(chosen=messages(text), rejected=messages(text))),
        st.fixed_dictionaries(dict(prompt=text, responses=st.lists(text, min_size=2, max_size=3), scores=st.lists(number, min_size=2, max_size=3)))]
    single = [
        st.fixed_dictionaries(dict(prompt=prompt, completion=text, label=label)),
        st.fixed_dictionaries(dict(messages=messages(text), label=label), optional=optional),
        st.fixed_dictionaries(dict(conversations=messages(text), kto_tag=label)),
        st.fixed_dictionaries(dict(instruction=text, output=text, label=label), optional=dict(input=text, history=st.lists(st.lists(text, min_size=2, max_size=2), max_size=1))),
        st.fixed_dictionaries(dict(prompt=text, response=text, score=number))]
    return st.one_of(pairs if paired is True else single if paired is False else pairs + single)


@st.composite
def files(draw, paired=None):
    """(name of the file, its bytes): most files are in order, of one format, and their rows differ in their texts."""
    one = draw(record(texts if draw(rarely(3)) else good_texts, paired))

    def vary(x, key=None):
        if isinstance(x, dict):
            return {k: vary(v, k) for k, v in x.items()}
        return [vary(v) for v in x] if isinstance(x, list) else draw(good_texts) if isinstance(x, str) and key not in ("role", "from") else x

    rows = [one] + [vary(one) for _ in range(draw(st.integers(1, 5)))]
    if draw(rarely(8)):
        rows.append(draw(record(texts)))
    if draw(rarely(4)):                                                                            # one cell is broken, renamed or gone
        row = rows[draw(st.integers(0, len(rows) - 1))]
        column = draw(st.sampled_from(sorted(row)))
        how = draw(st.sampled_from(["junk", "gone", "renamed"]))
        value = row.pop(column)
        if how != "gone":
            row[column if how == "junk" else draw(texts)] = draw(junk) if how == "junk" else value
    if draw(rarely(16)):
        rows.append(draw(junk))
    lines = [json.dumps(r, ensure_ascii=draw(st.booleans())) for r in rows]
    text = "[" + ",".join(lines) + "]" if draw(rarely(4)) else draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)
    content = text.encode("utf-8", "surrogatepass")
    if draw(rarely(12)):
        content = content[:draw(st.integers(0, len(content)))]
    if draw(rarely(12)):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4) | st.sampled_from([b"\xef\xbb\xbf", b"PAR1", b"[" * 100_000, b'{"a":' * 3000, b"NaN", b"1e999", b"9" * 5000])) + content[at:]
    return draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.txt"] * 8 + ["rows.parquet", "ro ws;'.jsonl"])), content


BAD_LOSS = ["nope", "", "dpo + kto", "0*dpo", "1e9*dpo", "-1*dpo", "+", "dpo+", "__class__", "kto\n"]
LOSS = [*train.LOSSES, *train.RECIPES, "dpo + 0.1*sft", "kto + 0.5*bco"]
WRONG = ["", "x", "-1", "0", "nan", "inf", "1e999", "1.5", "\x00", "\u00e9", "None", "1e-320", "99999999999999999999", "/", ".", "true", "1,2", "NUL\n", "-", "--", "0x10", "1_0", "\u0663"]
VALUES = {                                                                     # mostly good; what would train for hours is left out
    "batch_size": ["1", "2", "5", "1000"], "micro_batch_size": ["0", "1", "3"], "lr": ["1e-3", "1e30", "1e-30"], "warmup": ["0", "1", "1000"], "weight_decay": ["0.1", "1e9"],
    "max_grad_norm": ["0", "1", "1e-9"], "seed": ["0", "7", "4294967296", "18446744073709551616"], "lora": ["0", "1"], "save": ["merged", "adapter"], "dtype": ["fp32", "fp64", "bf16"],
    "device": ["cpu", "cuda", "mps", "cpu:0"], "max_len": ["2", "8", "48", "1000000"], "max_prompt_len": ["1", "4", "100"], "threshold": ["0", "0.5", "-1e9"],
    "columns": ["prompt=question", "completion=prompt", "prompt=prompt,label=label", "=", ","], "turns": ["all", "last"], "add_eot": ["true", "false"], "lambda_ratio": ["1", "1.5"],
    "flip": ["0.1"], "eval_every": ["1"], "save_every": ["1"], "log_every": ["1"], "timeout": ["1"], "checkpoint_activations": [None], "compile": ["nope"], "trust_remote_code": [None],
    "beta": ["0.1", "1e6", "1e-6", "1,2"], "tau": ["0.1", "1e-9"], "lambda_d": ["auto", "0", "2", "1e30"], "lambda_u": ["auto", "0", "1"],
    "z0": ["estimate", "zero", "on_policy", "3", "1e300"], "label_smoothing": ["0", "0.1", "0.5", "1"], "lam": ["0", "0.1", "1e9"], "alpha": ["0", "0.5", "1", "-1", "-0.5"], "gamma": ["0.5", "1e9"],
    "delta": ["1"], "a": ["0", "0.6", "1e9"], "clamp": ["inf", "0", "1"], "divergence": ["js", "alpha", "forward_kl"], "nll_weight": ["0", "1"], "slic_target": ["sample", "chosen", "data"],
    "ld_alpha": ["0", "1", "2", "-1"], "ref_mix": ["1", "0.5"], "ref_every": ["1"], "stages": ["1", "2"], "judge": ["world", "nobody.py:f"], "tokenizer": ["gpt2-bpe", "/"],
    "eval_data": ["FILE", "/nowhere"], "resume": [None], "overwrite": [None], "dry_run": [None], "model": ["MODEL", "/nowhere", "a/b/c"], "init": ["MODEL", "/"], "ref": ["MODEL", "FILE"],
    "nope": ["1"], "help": [None], "": ["1"], "loss": ["dpo"], "\u00e9": ["1"]}


@st.composite
def commands(draw, most=3):
    """A loss and flags, mostly such as it has."""
    loss = draw(st.sampled_from(BAD_LOSS if draw(rarely(12)) else LOSS if draw(st.booleans()) else ["kto"]))
    own = train.signature(train.find_loss(loss))[1] | train.RECIPES.get(loss, {}).get("flags", {}) | {"z0": 0} if loss in LOSS else {}
    own = sorted(VALUES) if draw(rarely(8)) else [name for name in sorted(VALUES) if name in own or name in train.Config.__dataclass_fields__]
    words = []
    for name in draw(st.just([]) | st.lists(st.sampled_from(own), max_size=most)):
        value = draw(st.sampled_from(WRONG if draw(rarely(6)) else VALUES[name]))
        words += [f"--{name}"] if value is None else [f"--{name}={value}"] if draw(st.booleans()) else [f"--{name}", value]
    return loss, words + draw(st.sampled_from([[]] * 40 + [["--dry_run"]] * 20 + [["kto"], ["--"], ["---"], ["-h"], ["--lr"], [""]]))


def outcome(words, call):
    """None where it went through; else the line with which it stopped, if it is a line that says something."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still going on after a minute: {words}"))
    signal.alarm(60)
    try:
        call(words)
    except SystemExit as e:
        if e.code in (0, None):                                                                    # --help
            return "help"
        assert isinstance(e.code, str) and e.code.strip() and len(e.code.splitlines()) == 1 and len(e.code) < 3000, (words, e.code)
        assert re.search(r"--\w+|(line|record|row|step) \d+|expected --name", e.code), (words, e.code)
        return e.code
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder to work in, with a GPT of 5,000 weights over bytes."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model.GPT(model.GPTConfig(257, 48, 1, 1, 16)).save(folder / "model", eot=256)
    data.load_tokenizer().save(folder / "model")
    before = os.getcwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(providers, "_get_local_constants", lambda: NOTHING, raising=False)                # else the cases would hang on which modules other tests have loaded
        m.setattr(evaluate, "plot_curves", lambda *a, **k: None)                                   # matplotlib takes longer than all the rest
        m.setattr(evaluate, "write_samples", lambda *a, **k: None)
        m.setattr(evaluate, "replies", lambda m, t, prompts, **k: ([""] * len(prompts), []))
        m.setattr(train, "git_commit", lambda: None)
        yield folder
    os.chdir(before)


def trains_or_says_why(room, file, start, command):
    (name, content), (loss, words) = file, command
    (room / name).write_bytes(content)
    shutil.rmtree(room / "out", ignore_errors=True)
    words = [{"FILE": name, "MODEL": "model"}.get(w.rpartition("=")[2], w) if not w.startswith("--") else w.replace("=FILE", "=" + name).replace("=MODEL", "=model") for w in words]
    argv = ["--loss", loss, "--data", name, *start, "--steps", "1", "--out", "out/run", *words]
    before = {p for p in room.iterdir()}
    said = outcome(argv, train.main)
    stray = {p for p in room.iterdir()} - before - {room / "out"}
    assert not stray, (argv, stray)
    if said is None and (room / "out/run/metrics.jsonl").exists():
        for line in open(room / "out/run/metrics.jsonl"):
            m = json.loads(line)
            assert all(x is None or math.isfinite(x) for x in m.values()), (argv, m)
        json.loads((room / "out/run/eval.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} in eval.json: {argv}"))
        assert all(t.isfinite().all() for t in load_file(room / "out/run/model/model.safetensors").values()), argv
    if said not in (None, "help") and "step" not in said and "expected --name" not in said and not re.search(r"--\w+", said):
        assert name in said, (argv, said)
    (room / name).unlink()
    return said


@st.composite
def runs(draw):
    """(file, --init and --ref or --model, (loss, flags)): the file is mostly one that the loss can learn from."""
    loss, words = command = draw(commands())
    paired = None if loss in BAD_LOSS or loss == "kto" or draw(rarely(8)) else train.is_paired(train.signature(train.find_loss(loss))[0])
    return draw(files(paired)), draw(starts), command


starts = st.sampled_from([["--init", "model", "--ref", "model"], ["--model", "model"]])
quick = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])


@settings(max_examples=200, **quick)
@given(run=runs())
def test_any_file_and_any_flags_train_or_stop_with_one_line(room, run):
    trains_or_says_why(room, *run)


@pytest.mark.slow
@settings(max_examples=2000, **quick)
@given(run=runs())
def test_two_thousand_files_and_flags_train_or_stop_with_one_line(room, run):
    trains_or_says_why(room, *run)


@settings(max_examples=500, **quick)
@given(command=commands(most=6), with_data=st.booleans())
def test_any_flags_are_settings_or_one_line(room, command, with_data):
    """Without the work that follows, and for the embedded world too."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "run", lambda argv, held: train.settings(argv))
        outcome(["--loss", command[0], *(["--data", "rows.jsonl"] if with_data else []), *command[1]], train.main)

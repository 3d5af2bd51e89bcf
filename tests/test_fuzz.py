"""Whatever is typed and whatever is in a file: it trains, or it stops with one line that names the
flag, or the file and the row. No traceback, no hang, no NaN in what is left."""

import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from safetensors.torch import load_file

import evaluate
import model
import recipes
import train
from lab import run
from objective import signature
from plumbing import rundir
from plumbing import settings as our_settings
from plumbing.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


# --- rows ---------------------------------------------------------------------------------------

NASTY = ["", " ", "\n", "</s>", "<|endoftext|>", "\x00", "\x85", "\u2028", "\ufeff", "\ud800",
         "\u202e", "e\u0301", "\U0001f600", "{{ 1/0 }}", "{% raw %}", "\u27e60:content\u27e7",
         "../../etc/passwd", "%s%n", "long " * 400, "\u4f60\u597d", "null", "-1", "\\", '"', "\t\r"]
GOOD = ["sun", "moon and rain", "wind", "a leaf", "stone.", "\u4f60\u597d", "\U0001f600", "</s>"]
JUNK = [None, True, -3, 10**400, math.nan, math.inf, "", "x", [], ["x"], {}, [[["deep"]]]]
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "observation", "judge", None]
good_texts = st.sampled_from(GOOD)
texts = st.sampled_from(NASTY) | st.text(max_size=12) | good_texts
numbers = st.floats(-2, 2) | st.integers(-3, 3)
labels = st.sampled_from([True, False, True, False, 1, 0, -1])
some = st.fixed_dictionaries


def rarely(n):
    """True once in n times; in the middle, since the ends of a range are drawn more often."""
    return st.sampled_from(range(n)).map(lambda number: number == n // 2)


def turn(role, text):
    return {"role": role, "content": text}


def talks(text):
    """Conversations: a question and an answer, or turns of any role in any order."""
    roles = st.sampled_from(ROLES)
    turns = st.builds(turn, roles, text) | some({"from": roles, "value": text})
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    proper = st.tuples(st.builds(turn, st.just("user"), text),
                       st.builds(turn, st.just("assistant"), text)).map(list)
    return proper | proper | proper | st.lists(turns | st.just(call), max_size=4)


def pairs(text):
    """A list of formats."""
    answer = text | text.map(lambda words: turn("assistant", words))
    plain = dict(prompt=text, chosen=text, rejected=text)
    scores = dict(score_chosen=st.just(2.0), score_rejected=numbers)
    chances = dict(win_prob_chosen=st.just(0.7), win_prob_rejected=numbers)
    segment = some(dict(start=st.integers(-1, 2), end=st.integers(0, 3)))
    several = st.lists(text, min_size=2, max_size=2)
    return [some(plain), some({**plain, **scores, **chances}), some({**plain, "target": text}),
            some(dict(prompt=talks(text), chosen=answer, rejected=answer), optional=scores),
            some(dict(chosen=talks(text), rejected=talks(text))),
            some(dict(chosen=talks(text), rejected=talks(text), segment=segment)),
            some(dict(prompt=text, responses=several, scores=st.tuples(numbers, numbers)))]


def singles(text):
    return [some(dict(prompt=text | talks(text), completion=text, label=labels)),
            some(dict(messages=talks(text), label=labels), optional=dict(system=text)),
            some(dict(conversations=talks(text), kto_tag=labels)),
            some(dict(instruction=text, output=text, label=labels), optional=dict(input=text)),
            some(dict(prompt=text, response=text, score=numbers))]


# --- files --------------------------------------------------------------------------------------

BROKEN = [b"", b"\xef\xbb\xbf", b"PAR1", b"[" * 100_000, b'{"a":' * 3000, b"NaN", b"1e999"]
NAMES = ["rows.jsonl", "rows.json", "rows.txt"] * 8 + ["rows.parquet", "ro ws;'.jsonl"]


@st.composite
def files(draw, formats):
    """(name, bytes): most are in order and of one format; some have a fault, few have several."""
    text = texts if draw(rarely(3)) else good_texts
    rows = draw(st.lists(draw(st.sampled_from(formats(text))), min_size=2, max_size=6))
    if draw(rarely(8)):
        rows.append(draw(st.one_of(formats(texts))))
    if draw(rarely(4)):                                      # a cell is broken, or one too many
        row = rows[-1]
        column = draw(st.sampled_from(sorted(row)))
        row[draw(st.sampled_from([column, "other"]))] = draw(st.sampled_from(JUNK))
    if draw(rarely(12)):
        rows.append(draw(st.sampled_from(JUNK)))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)
    if draw(rarely(4)):
        text = "[" + ",".join(lines) + "]"
    content = text.encode("utf-8", "surrogatepass")
    if draw(rarely(8)):                                      # cut off, with something behind
        content = content[:draw(st.integers(0, len(content)))] + draw(st.sampled_from(BROKEN))
    return draw(st.sampled_from(NAMES)), content


# --- command lines ------------------------------------------------------------------------------

BAD_LOSS = ["nope", "", "dpo + kto", "0*dpo", "1e9*dpo", "-1*dpo", "+", "dpo+", "__class__"]
LOSS = [*recipes.LOSSES, *recipes.RECIPES, "dpo + 0.1*sft", "kto + 0.5*bco"]
WRONG = ["", "x", "-1", "0", "nan", "inf", "1e999", "1.5", "\x00", "\u00e9", "None", "1e-320",
         "99999999999999999999", "/", ".", "true", "1,2", "NUL\n", "-", "--", "0x10", "1_0",
         "1e39", "1e400", "x" * 300, "/dev/zero"]
VALUES = {                                                   # what would train for hours is absent
    "batch_size": ["1", "2", "5", "1000"], "micro_batch_size": ["0", "1", "3"],
    "lr": ["1e-3", "1e30", "1e-30"], "warmup": ["0", "1000"], "weight_decay": ["0.1", "1e9"],
    "max_grad_norm": ["0", "1e-9"], "seed": ["7", "4294967296", "18446744073709551616"],
    "lora": ["0", "1"], "save": ["merged", "adapter"], "dtype": ["fp32", "fp64", "bf16"],
    "device": ["cpu", "cuda", "mps", "cpu:0"], "max_len": ["2", "8", "48", "1000000"],
    "max_prompt_len": ["1", "100"], "threshold": ["0", "0.5", "-1e9"], "turns": ["all", "last"],
    "columns": ["prompt=question", "completion=prompt", "prompt=prompt,label=label", "=", ","],
    "add_eot": ["true", "false"], "lambda_ratio": ["1", "1.5"], "flip": ["0.1"],
    "eval_every": ["1"], "save_every": ["1"], "log_every": ["1"], "timeout": ["1"],
    "checkpoint_activations": [None], "compile": ["nope"], "trust_remote_code": [None],
    "fsdp": [None], "beta": ["0.1", "1e6", "1e-6", "1,2"], "tau": ["0.1", "1e-9"],
    "lambda_d": ["auto", "0", "1e30"], "lambda_u": ["auto", "0"], "clamp": ["inf", "0", "1"],
    "z0": ["estimate", "zero", "on_policy", "3", "1e300"], "label_smoothing": ["0", "0.5", "1"],
    "lam": ["0", "0.1", "1e9"], "alpha": ["0", "0.5", "1", "-1"], "gamma": ["0.5", "1e9"],
    "delta": ["1"], "a": ["0", "0.6", "1e9"], "divergence": ["js", "alpha", "forward_kl"],
    "nll_weight": ["0", "1"], "slic_target": ["sample", "chosen", "data"],
    "ld_alpha": ["0", "1", "2", "-1"], "ref_mix": ["1", "0.5"], "ref_every": ["1"],
    "stages": ["1", "2"], "reward": ["world", "nobody.py:f", "judge.py:reward", "model"],
    "judge": ["world", "nobody.py:f"], "tokenizer": ["gpt2-bpe", "/"], "ppo_epochs": ["1"],
    "eval_data": ["FILE", "/nowhere"], "resume": [None], "overwrite": [None], "dry_run": [None],
    "model": ["model", "/nowhere", "a/b/c"], "init": ["model", "/"], "ref": ["model", "FILE"],
    "nope": ["1"], "help": [None], "": ["1"], "loss": ["dpo"], "\u00e9": ["1"]}
STRAY = [[]] * 40 + [["--dry_run"]] * 20 + [["kto"], ["--"], ["---"], ["-h"], ["--lr"], [""]]


def flags_of(loss):
    """Those in VALUES that the loss takes."""
    recipe = recipes.find(loss)
    own = {**signature(recipe.loss)[1], **recipe.flags, "z0": 0, **our_settings.FIELDS}
    return [name for name in VALUES if name in own]


@st.composite
def commands(draw, most=3):
    """(loss, words): mostly flags that it has, mostly with a value that is good."""
    loss = draw(st.sampled_from(LOSS) | st.just("kto"))
    names = flags_of(loss)
    if draw(rarely(8)):
        names = list(VALUES)
    if draw(rarely(12)):
        loss = draw(st.sampled_from(BAD_LOSS))
    words = []
    for name in draw(st.lists(st.sampled_from(names), max_size=most)):
        value = draw(st.sampled_from(WRONG if draw(rarely(6)) else VALUES[name]))
        if value is None:
            words.append(f"--{name}")
        elif draw(st.booleans()):
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", value]
    return loss, words + draw(st.sampled_from(STRAY))


@st.composite
def runs(draw):
    """(file, where the models are, (loss, words)); the loss can mostly learn from the file."""
    loss, words = draw(commands())
    paired = draw(st.booleans())
    if loss in LOSS and not draw(rarely(8)):
        paired = recipes.find(loss).learns_from in ("pairs", "sessions")
    models = draw(st.sampled_from([["--init", "model", "--ref", "model"], ["--model", "model"]]))
    if loss in LOSS and recipes.find(loss).online:
        models = [*models, "--reward", "judge.py:reward"]
    return draw(files(pairs if paired else singles)), models, (loss, words)


# --- what must come of it -----------------------------------------------------------------------

def outcome(words, call):
    """"" where it went through, "help", or the line with which it stopped."""
    def too_long(*_):
        pytest.fail(f"still going on after a minute: {words}")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        call(words)
    except SystemExit as stopped:
        line = stopped.code
        if line in (0, None):
            return "help"
        assert isinstance(line, str) and line.strip(), (words, line)
        assert len(line.splitlines()) == 1 and len(line) < 3000, (words, line)
        assert re.search(r"--\w+|(line|record|row|step) \d+|expected --name", line), (words, line)
        return line
    finally:
        signal.alarm(0)
    return ""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder to work in, with a GPT of 5,000 weights over bytes."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model.GPT(model.GPTConfig(257, 48, 1, 1, 16)).save(folder / "model", eot=256)
    load_tokenizer().save(folder / "model")
    (folder / "judge.py").write_text("def reward(prompts, texts):\n    return map(len, texts)")
    before = os.getcwd()
    os.chdir(folder)
    nothing = {kind: providers.SortedSet() for kind in ("integers", "floats", "bytes", "strings")}
    with pytest.MonkeyPatch.context() as patched:
        # Else the cases would hang on which modules other tests have loaded.
        patched.setattr(providers, "_get_local_constants",
                        lambda: providers.Constants(**nothing), raising=False)
        patched.setattr(evaluate, "plot_curves", lambda *_, **__: None)      # slower than the rest
        patched.setattr(evaluate, "replies", no_replies)
        patched.setattr(rundir, "commit", lambda: None)
        yield folder
    os.chdir(before)


def no_replies(policy, tokenizer, prompts, **how):
    return [""] * len(prompts), []


def trains_or_says_why(room, file, models, command):
    (name, content), (loss, words) = file, command
    (room / name).write_bytes(content)
    shutil.rmtree(room / "out", ignore_errors=True)
    words = [word.replace("FILE", name) for word in words]
    argv = ["--loss", loss, "--data", name, *models, "--steps", "1", "--out", "out/run", *words]
    before = set(room.iterdir())
    line = outcome(argv, lambda words: run(*words))
    stray = set(room.iterdir()) - before - {room / "out", room / "__pycache__"}
    assert not stray, (argv, stray)
    if not line and (room / "out/run/eval.json").exists():
        check_numbers(room / "out/run", argv)
    if line not in ("", "help") and not re.search(r"--\w+|step|expected --name", line):
        assert name in line, (argv, line)
    (room / name).unlink()


def check_numbers(out, argv):
    def refuse(word):
        pytest.fail(f"{word} in eval.json: {argv}")

    for text in open(out / "metrics.jsonl"):
        numbers = [value for value in json.loads(text).values() if value is not None]
        assert all(map(math.isfinite, numbers)), (argv, text)
    json.loads((out / "eval.json").read_text(), parse_constant=refuse)
    for tensor in load_file(out / "model/model.safetensors").values():
        assert tensor.isfinite().all(), argv


quick = dict(deadline=None, derandomize=True, database=None,
             suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])


@settings(max_examples=60, **quick)
@given(case=runs())
def test_any_file_and_any_flags_train_or_stop_with_one_line(room, case):
    trains_or_says_why(room, *case)


@pytest.mark.slow
@settings(max_examples=2000, **quick)
@given(case=runs())
def test_two_thousand_files_and_flags_train_or_stop_with_one_line(room, case):
    trains_or_says_why(room, *case)


@settings(max_examples=300, **quick)
@given(command=commands(most=6), with_data=st.booleans())
def test_any_flags_are_settings_or_one_line(room, command, with_data):
    """Without the work that follows, and for the embedded world too."""
    loss, words = command
    more = ["--data", "rows.jsonl"] if with_data else []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "run_once", our_settings.parse)
        outcome(["--loss", loss, *more, *words], train.main)

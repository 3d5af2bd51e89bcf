"""Five places are strict, so that no corner needs a branch of its own: JSON from a folder, weights
from a folder, flags, parquet, and a run's folder when it goes on. Each has a table of bad inputs
and one loop; each input ends in one line that names the flag or the file."""

import copy
import json
import math
import os
import random
import shutil
import signal
from datetime import datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
from data import make_row
from lab import make_lab, read_rows, run, tiny_llama
from model import GPT, GPTConfig
from plumbing import huggingface, rewards, rundir
from plumbing.formats import read
from plumbing.settings import parse
from plumbing.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


GOES_ON = "it went through"


class TooLong(BaseException):
    """Nobody but `complaint` catches it."""


def complaint(call, *named, seconds=30):
    """What is wrong with how a bad input ends, or None: one line with `named` in it, in time."""
    def too_long(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        call()
    except SystemExit as stop:
        line = stop.code
        if not isinstance(line, str) or "\n" in line or len(line) > 1000:
            return f"no single line: {line!r}"
        missing = [part for part in named if part not in line]
        return f"{missing} not in: {line}" if missing else None
    except BaseException as error:                           # tiktoken's panics are not Exceptions
        return f"a traceback: {error!r:.300}"
    finally:
        signal.alarm(0)
    return GOES_ON


def check(cases, room, expected=None):
    """Every case on its own copy of `room` must end as `complaint` expects it."""
    wrong = {}
    for number, (name, spoil, call, *named) in enumerate(cases):
        place = room.parent / f"{room.name}-{number}"
        shutil.copytree(room, place)
        os.chdir(place)
        spoil()
        found = complaint(call, *named)
        if found != expected:
            wrong[name] = found
        os.chdir(room)
        shutil.rmtree(place)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


# --- a room with one folder of every kind -------------------------------------------------------

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """gpt, llama, adapter, reward: models; run: a finished run of 2 steps, with a comparison."""
    room = tmp_path_factory.mktemp("strict") / "room"
    room.mkdir()
    make_lab(room)
    before = os.getcwd()
    os.chdir(room)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(257, 64, 1, 1, 16))
    gpt.save("gpt", eot=256)
    tiny_llama(room / "llama", ["sun moon"])
    huggingface.load_policy("llama", lora=2).save("adapter", adapter=True)
    huggingface.load_policy("adapter")
    rewards.RewardModel(gpt).save("reward", eot=256)
    for folder in ("gpt", "reward"):
        load_tokenizer().save(room / folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "plot_curves", lambda *_, **__: None)
        patched.setattr(evaluate, "replies", no_replies)
        patched.setattr(rundir, "commit", lambda: None)
        run(*RUN)
        evaluate.main(["run", "--n", "2", "--export_pairs", "pairs"])
        yield room
    os.chdir(before)


RUN = ["--data", "rows.jsonl", "--init", "gpt", "--ref", "gpt", "--max_len", 64, "--steps", 2,
       "--batch_size", 4, "--save_every", 1, "--out", "run"]


def no_replies(policy, tokenizer, prompts, **how):
    return ["sun"] * len(prompts), [row_of("say sun: ", "sun")] * len(prompts)


def row_of(prompt, response):
    return make_row(list(prompt.encode()), list(response.encode()))


def model(folder):
    return lambda: huggingface.load_policy(folder)


def tokenizer(folder):
    return lambda: load_tokenizer(folder)


def reward(spec):
    return lambda: rewards.load_reward(spec)


def resume():
    run(*RUN, "--resume", "--steps", 3)


def evaluated():
    evaluate.main(["run", "--export_pairs", "pairs"])


def verdicts():
    evaluate.main(["run", "--verdicts", "pairs"])


# --- JSON ---------------------------------------------------------------------------------------

def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


WAYS = {"gone": Path.unlink, "a folder": a_folder, "a pipe": a_pipe,
        "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
        "half": lambda path: path.write_bytes(path.read_bytes()[:20]),
        "a list": lambda path: path.write_text("[]"),
        "too deep": lambda path: path.write_text('{"a":' + "[" * 100_000)}
MUST_BE_THERE = [                                            # file, who reads it
    ("gpt/config.json", model("gpt")), ("llama/config.json", model("llama")),
    ("reward/config.json", reward("reward")), ("run/config.json", resume),
    ("run/config.json", evaluated), ("pairs", verdicts),
    ("adapter/adapter_config.json", model("adapter"))]
MAY_BE_ABSENT = [
    ("gpt/tiktoken.json", tokenizer("gpt")), ("llama/tokenizer.json", tokenizer("llama")),
    ("llama/tokenizer_config.json", tokenizer("llama")), ("run/eval.json", evaluated)]


def broken_files():
    for file, call in MUST_BE_THERE:
        for way, spoil in WAYS.items():
            named = Path(file).name
            if file.startswith("adapter") and way in ("gone", "a folder", "a pipe"):
                named = "config.json"                        # then it may be a whole model
            yield f"{file} {way} {call.__name__}", partial(spoil, Path(file)), call, named
    for file, call in MAY_BE_ABSENT:
        for way in ("not UTF-8", "half", "a list", "too deep"):
            yield f"{file} {way}", partial(WAYS[way], Path(file)), call, Path(file).parts[0]


def test_a_broken_json_file_is_named(room):
    check(broken_files(), room)


SELF = {"base_model_name_or_path": "adapter"}
WRONG_VALUES = [                                             # file, reader, changes, what is named
    *[("gpt/config.json", model("gpt"), {name: value}, "--model gpt: ")
      for name in ("n_layer", "n_positions") for value in ("x", None, -1, 1.5, 10**12, [])],
    ("gpt/config.json", model("gpt"), {"nanokto": 3}, "--model gpt: "),
    ("gpt/config.json", lambda: run(*RUN, "--overwrite"), {"n_positions": "x"}, "n_positions"),
    ("llama/config.json", model("llama"), {"max_position_embeddings": "x"}, "llama"),
    ("llama/config.json", model("llama"), {"hidden_act": []}, "llama"),
    ("llama/config.json", model("llama"), {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama/config.json", model("llama"), {"model_type": 3}, "llama"),
    *[("adapter/adapter_config.json", model("adapter"), {"base_model_name_or_path": value},
       "adapter") for value in ("adapter", "./adapter/", 3, [], "\0", "x" * 5000, "nowhere/x/y")],
    ("adapter/adapter_config.json", model("adapter"), {"r": "x"}, "adapter"),
    ("gpt/tiktoken.json", tokenizer("gpt"), {"mergeable_ranks": 3}, "gpt"),
    ("gpt/tiktoken.json", tokenizer("gpt"), {"mergeable_ranks": []}, "gpt"),
    ("gpt/tiktoken.json", tokenizer("gpt"), {"mergeable_ranks": ["YQ==", "YQ=="]}, "gpt"),
    ("gpt/tiktoken.json", tokenizer("gpt"), {"special_tokens": {}}, "gpt"),
    ("gpt/tiktoken.json", tokenizer("gpt"), {"special_tokens": {"<|endoftext|>": -5}}, "gpt"),
    ("gpt/tiktoken.json", tokenizer("gpt"), {"pat_str": "("}, "gpt"),
    *[("run/config.json", resume, {name: value}, name) for name, value in (
        ("init", 3), ("ref", None), ("data", "rows.jsonl"), ("columns", 1), ("task", 3))],
    *[("run/config.json", evaluated, {name: value}, name) for name, value in (
        ("ref", None), ("data", "rows.jsonl"), ("columns", 1), ("max_prompt_len", "x"),
        ("task", 3))]]


def change(file, changes):
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def test_a_value_of_a_wrong_kind_is_named(room):
    cases = [(f"{file} {str(changes)[:60]} {call.__name__}", partial(change, file, changes), call,
              named) for file, call, changes, named in WRONG_VALUES]
    check(cases, room)


def test_adapters_that_stand_on_each_other_are_refused(room):
    def spoil():
        shutil.copytree("adapter", "other")
        change("other/adapter_config.json", SELF)
        change("adapter/adapter_config.json", {"base_model_name_or_path": "other"})

    check([("a circle", spoil, model("adapter"), "--model adapter: ", "other")], room)


# --- flags --------------------------------------------------------------------------------------

PATHS = ("model", "init", "ref", "tokenizer", "data", "eval_data", "out", "judge", "reward")
NOT_PATHS = ("x" * 5000, "a/" + "x" * 300, "nul\0", "pipe", "/dev/zero")
NUMBERS = [("ppo", "ppo_epochs", 0), ("ppo", "minibatches", 0), ("ppo", "clip", 0),
           ("ppo", "gamma", "1e39"), ("spin", "stages", 0), ("tr_dpo", "ref_every", 0),
           ("kto", "lr", "1e400"), ("kto", "lr", "1e39"), ("kto", "beta", "1e39"),
           ("kto", "weight_decay", "1e39"), ("kto", "lambda_d", "1e39"), ("kto", "z0", "1e39"),
           ("kto", "batch_size", 10**40), ("kto", "seed", 10**40), ("kto", "timeout", 10**15),
           ("kto", "max_len", 2**63), ("kto", "warmup", -1), ("kto", "seed", 2**64),
           ("kto", "save_every", "1e3"), ("kto", "threshold", "nan"), ("kto", "epochs", "1e39"),
           ("tr_dpo", "ref_mix", "1e-400"), ("ppo", "kl_coef", "1e39"), ("ppo", "lam", "-1e39")]


def test_a_path_that_is_none_and_a_number_out_of_range_name_their_flag(room):
    cases = []
    for flag in PATHS:
        for path in NOT_PATHS:
            words = {"--data": "rows.jsonl", "--out": "new"}
            if flag in ("judge", "reward"):
                words |= {"--eval_data": "rows.jsonl"}
            if flag == "reward":
                words |= {"--loss": "ppo"}
            words[f"--{flag}"] = path
            words = [word for pair in words.items() for word in pair]
            cases.append((f"--{flag} {path[:9]!r}", lambda: os.mkfifo("pipe"),
                          partial(parse, words), f"--{flag}"))
    for flag in ("data", "judge", "verdicts", "export_pairs"):
        for path in NOT_PATHS:
            cases.append((f"evaluate --{flag} {path[:9]!r}", lambda: os.mkfifo("pipe"),
                          partial(evaluate.main, ["run", f"--{flag}", path]), path[:3]))
    for path in NOT_PATHS:
        cases.append((f"evaluate {path[:9]!r}", lambda: os.mkfifo("pipe"),
                      partial(evaluate.main, [path]), path[:3]))
    for loss, flag, number in NUMBERS:
        words = ["--loss", loss, f"--{flag}", str(number)]
        cases.append((f"--{flag} {number}", lambda: None, partial(parse, words), f"--{flag}"))
    check(cases, room)


# --- weights ------------------------------------------------------------------------------------

def cut(file):
    Path(file).write_bytes(Path(file).read_bytes()[:100])


def tensor(file, name, value):
    """Write another tensor of that name; None: leave it out."""
    tensors = load_file(file)
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


NAN = torch.full((1, 16), torch.nan)
HEAD = "reward/score.safetensors"
WEIGHTS = [
    ("cut", partial(cut, HEAD), "score.safetensors"), ("folder", partial(a_folder, Path(HEAD)), ""),
    ("pipe", partial(a_pipe, Path(HEAD)), ""), ("gone", Path(HEAD).unlink, "without a reward head"),
    ("not its shape", partial(tensor, HEAD, "score.weight", torch.zeros(1, 9)), "[1, 9]"),
    ("NaN", partial(tensor, HEAD, "score.weight", NAN), "NaN"),
    ("cut trunk", partial(cut, "reward/model.safetensors"), "model.safetensors"),
    ("NaN trunk", partial(tensor, "reward/model.safetensors", "transformer.ln_f.weight",
                          NAN[0].clone()), "NaN"),
    ("no tensor", partial(tensor, "reward/model.safetensors", "transformer.ln_f.weight", None),
     "transformer.ln_f.weight")]


def test_a_broken_reward_model_is_found_at_loading_and_named(room):
    ppo = partial(run, *RUN, "--loss", "ppo", "--reward", "reward", "--out", "new")
    judged = partial(evaluate.main, ["run", "--judge", "reward"])
    cases = []
    for name, spoil, named in WEIGHTS:
        cases += [(f"{name}, --reward", spoil, ppo, "--reward reward", named),
                  (f"{name}, --judge", spoil, judged, "--judge reward", named)]
    cases.append(("--init", partial(cut, HEAD), partial(
        run, *RUN, "--loss", "rm", "--data", "pairs.jsonl", "--init", "reward", "--out", "new"),
        "--init reward", "score.safetensors"))
    check(cases, room)


# --- parquet ------------------------------------------------------------------------------------

def test_parquet_with_dates_and_texts_that_python_has_not(tmp_path):
    bad_text = pa.Array.from_buffers(pa.utf8(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"),
                                                    pa.py_buffer(b"\xff")])
    columns = {"late": pa.array([2**52], pa.timestamp("ms")),
               "early": pa.array([-2**61], pa.timestamp("us")),
               "nanoseconds": pa.array([1], pa.timestamp("ns")), "text": bad_text,
               "zone": pa.array([1], pa.timestamp("s", "Nowhere/Here")),
               "duration": pa.array([2**52], pa.duration("ms"))}
    wrong = {}
    for place in ("prompt", "other"):
        for name, column in columns.items():
            file = tmp_path / f"{name}.parquet"
            row = {"prompt": ["p"], "completion": ["c"], "label": [True], place: column}
            pa.parquet.write_table(pa.table(row), file)
            found = complaint(lambda: read(str(file)), file.name)
            if found and not (place == "other" and found == "it went through"):
                wrong[place, name] = found
    assert wrong == {}
    call = {"role": "assistant", "content": "c", "tool_calls": [{"at": datetime(2020, 1, 1)}]}
    for column, value in (("completion", [call]), ("history", [datetime(2020, 1, 1)])):
        row = {"instruction": ["p"], "completion": ["c"], "label": [True], column: [value]}
        pa.parquet.write_table(pa.table(row), file)
        found = complaint(lambda: read(str(file)), "history")
        assert found == (GOES_ON if column == "completion" else None)


# --- a run that goes on -------------------------------------------------------------------------

LAST = Path("run/checkpoint/step-000002")
FIRST = Path("run/checkpoint/step-000001")


def both(spoil):
    for folder in (FIRST, LAST):
        spoil(folder)


def without(kind, folder):
    file, = folder.glob("*.safetensors")
    name = next(name for name in load_file(file) if name.startswith(kind))
    tensor(file, name, None)


def misshapen(kind, folder):
    file, = folder.glob("*.safetensors")
    name = next(name for name in load_file(file) if name.startswith(kind))
    tensor(file, name, torch.zeros(3))


def state(changes, folder):
    change(folder / "state.json", changes)


def weights_as_folder(folder):
    a_folder(next(folder.glob("*.safetensors")))


CHECKPOINTS = [
    *[(f"without {kind}", partial(without, kind)) for kind in ("policy", "exp_avg.", "exp_avg_sq")],
    *[(f"misshapen {kind}", partial(misshapen, kind)) for kind in ("policy", "exp_avg_sq")],
    ("a folder for weights", weights_as_folder),
    ("a pipe for state.json", lambda folder: a_pipe(folder / "state.json")),
    ("a pipe for weights", lambda folder: a_pipe(next(folder.glob("*.safetensors")))),
    ("a folder for state.json", lambda folder: a_folder(folder / "state.json")),
    *[(str(changes), partial(state, changes)) for changes in (
        {"step": "x"}, {"step": -1}, {"step": 10**9}, {"step": None}, {"updates": "x"},
        {"updates": None}, {"running": 3}, {"running": {"reward_sum": "x"}}, {"files": "x"})],
    ("a file for the folder", lambda folder: (shutil.rmtree(folder), folder.write_text("")))]


def test_a_resumed_run_says_what_it_cannot_use(room):
    cases = [(name, partial(both, spoil), resume, "--resume") for name, spoil in CHECKPOINTS]
    for file in ("metrics.jsonl", "eval.json", "samples.md", "reference-0.safetensors"):
        cases.append((file, partial(a_folder, Path("run", file)), resume, file))
    for folder in ("model", "checkpoint"):
        cases.append((folder, lambda folder=folder: (shutil.rmtree(f"run/{folder}"),
                                                     Path("run", folder).write_text("")),
                      resume, folder))
    cases.append(("half a table", partial(cut, "run/reference-0.safetensors"), resume,
                  "reference-0.safetensors"))
    table = "run/reference-0.safetensors"
    cases += [("a table of others", partial(tensor, table, "logps", torch.zeros(2, 1)), resume,
               "reference-0.safetensors"),
              ("no table", partial(tensor, table, "logps", None), resume, "reference-0"),
              ("a pipe", partial(a_pipe, Path("run/lock")), resume, "run/lock")]
    check(cases, room)


def test_where_only_the_newest_checkpoint_is_damaged_the_one_before_does(room, capsys):
    for name, spoil in CHECKPOINTS:
        check([(name, partial(spoil, LAST), resume)], room, GOES_ON)
        assert "step-000002 cannot be read" in capsys.readouterr().out


def test_lines_of_the_metrics_that_are_none_are_left_out(room):
    lines = ['{"step": "x"}', '{"step": null}', '{"step": 0, "loss": "x"}', "[" * 100_000, "3"]

    def spoil():
        with open("run/metrics.jsonl", "a") as file:
            file.write("\n".join(lines))

    def goes_on():
        resume()
        assert [line["step"] for line in read_rows("run/metrics.jsonl")] == [0, 1, 2]

    check([("metrics", spoil, goes_on)], room, GOES_ON)


# --- a thousand broken folders ------------------------------------------------------------------

JUNK = [None, True, -3, 0, 1.5, 10**9, math.nan, "", "x", "\0", "\ud800", [], ["x"], {}, [[3]]]
READERS = {"gpt": [model("gpt"), tokenizer("gpt")], "llama": [model("llama"), tokenizer("llama")],
           "adapter": [model("adapter")], "reward": [reward("reward")],
           "run": [resume, evaluated]}


def places_of(value, found):
    """Every (object or array, key) in a JSON value."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:50]))
    for key, inner in items:
        found.append((value, key))
        places_of(inner, found)
    return found


def break_values(path, rng):
    """Up to three values of a JSON file become something else, or go."""
    content = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        inside, key = rng.choice(places_of(content, []) or [([0], 0)])
        if rng.random() < 0.2:
            del inside[key]
        else:
            inside[key] = copy.deepcopy(rng.choice(JUNK))
    path.write_text(json.dumps(content))


def break_bytes(path, rng):
    """Cut, or some bytes changed, most of them in the head."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        content = content[:rng.randrange(len(content) + 1)]
    else:
        for _ in range(rng.randint(1, 4)):
            content[int(rng.random() ** 4 * len(content))] = rng.randrange(256)
    path.write_bytes(content)


def spoil_at_random(folder, rng):
    """-> what was done"""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix == ".json" and rng.random() < 0.6:
        break_values(path, rng)
        return f"{path}: values"
    if path.stat().st_size and rng.random() < 0.6:
        break_bytes(path, rng)
        return f"{path}: bytes"
    way = rng.choice(list(WAYS))
    WAYS[way](path)
    return f"{path}: {way}"


@pytest.mark.slow
def test_a_thousand_broken_folders_give_one_line_or_a_result(room):
    rng = random.Random(0)
    wrong = {}
    for number in range(1000):
        folder = rng.choice(list(READERS))
        shutil.copytree(folder, "kept")
        done = spoil_at_random(Path(folder), rng)
        call = rng.choice(READERS[folder])
        found = complaint(call)
        if found not in (None, GOES_ON):
            wrong[f"{number}, {done}"] = found
        shutil.rmtree(folder)
        os.rename("kept", folder)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())

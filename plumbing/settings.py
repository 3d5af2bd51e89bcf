"""The command line: every field of `Config` and every setting of the loss is a flag.

A value comes from the command line; else from the embedded world's settings for that loss
(world.SETTINGS; with --data from PRESETS below); else from the loss's signature or `Config`.
A wrong flag ends the program with one line that says what is valid.
"""

import argparse
import difflib
import inspect
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields

import torch

import recipes
import world
from objective import MEASURED, needs, signature
from plumbing.reading import check_path


def flag(default, help, *, least=None, most=None, positive=False, choices=(), may_change=False):
    """One flag. may_change: a resumed run may have another value of it."""
    return field(default=default, metadata=dict(
        help=help, least=least, most=most, positive=positive, choices=choices,
        may_change=may_change))


@dataclass
class Config:
    loss: str = flag("kto",
                     "a loss, a recipe (rm, ppo, spin, ...), or a sum such as \"dpo + 0.1*sft\"")
    model: str = flag("", "folder or hub name of a causal LM, or of an adapter; default: small GPT")
    data: tuple = flag((), "preference files, a folder of save_to_disk, or hub data sets "
                                "org/name/config:split; default: the embedded help desk")
    online: bool = flag(False, "the policy writes --group responses to each prompt at every step, "
                        "and --reward judges them")
    eval_data: tuple = flag((), "held-out files, same formats")
    tokenizer: str = flag("", "with --data and no --model: a folder, or gpt2 (default: bytes)")
    init: str = flag("", "folder the policy starts from (default: --model)")
    ref: str = flag("", "folder of the reference (default: --model)")
    out: str = flag("", "the run's folder (default: out/<loss>)", may_change=True)
    overwrite: bool = flag(False, "replace an existing run in --out", may_change=True)
    resume: bool = flag(False, "continue the run in --out", may_change=True)
    dry_run: bool = flag(False, "everything up to the first step; writes nothing")
    batch_size: int = flag(32, "rows or pairs per optimiser step, over all processes", least=1)
    micro_batch_size: int = flag(0, "rows or pairs per forward (0: as many as fit a token budget)",
                                 least=0, may_change=True)
    steps: int = flag(0, "optimiser steps (0: as --epochs says)", least=0, may_change=True)
    epochs: float = flag(1.0, "passes over the data", positive=True, may_change=True)
    lr: float = flag(5e-6, "peak learning rate", positive=True)
    warmup: int = flag(10, "steps of linear warm-up; then a cosine to a tenth", least=0)
    weight_decay: float = flag(0.0, "on matrices only", least=0)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: never", least=0)
    seed: int = flag(0, "of data order, initial weights and sampling", least=0,
                     most=2**63)
    lora: int = flag(0, "rank of low-rank adapters; only they are trained; 0: none", least=0)
    save: str = flag("merged", "with --lora: what model/ holds", choices=("merged", "adapter"),
                     may_change=True)
    checkpoint_activations: bool = flag(False, "recompute activations in backward: less memory, "
                                        "a quarter more time", may_change=True)
    compile: bool = flag(False, "torch.compile: minutes to start, for GPUs", may_change=True)
    fsdp: bool = flag(False, "shard weights and optimiser over the processes")
    trust_remote_code: bool = flag(False, "run Python code that comes with --model")
    dtype: str = flag("fp32", "bf16: autocast, weights stay fp32 (with --lora frozen ones do not)",
                      choices=("fp32", "bf16", "fp64"))
    device: str = flag("", "cpu, cuda or mps (default: cuda if there is one)", may_change=True)
    max_len: int = flag(1024, "tokens per row, never above the model's context", least=2,
                        most=2**24)
    max_prompt_len: int = flag(512, "tokens per prompt; longer ones lose their left end", least=1)
    threshold: float = flag(None, "scored rows: desirable if reward > threshold")
    columns: str = flag("", "column names, prompt=question,completion=answer")
    turns: str = flag("last", "assistant turns of a conversation that are trained",
                      choices=("last", "all"))
    add_eot: bool = flag(True, "end-of-text after whole responses")
    chat: bool = flag(False, "put a prompt that is a text into --model's template as a user's turn")
    template_args: tuple = flag((), "arguments of --model's template: enable_thinking=false ...")
    lambda_ratio: float = flag(4 / 3, "lambda_d n_d / (lambda_u n_u) that auto aims at")
    pretrain_steps: int = flag(300, "embedded world: steps of pretraining", least=0)
    sft_steps: int = flag(200, "small GPT: steps of SFT before alignment", least=0)
    flip: float = flag(0.0, "embedded world: share of labels that are flipped", least=0)
    judge: str = flag("", "with --data: the judge of policy and reference at the end, a reward "
                      "model's folder or file.py:function", may_change=True)
    eval_every: int = flag(0, "steps between evaluations (0: only at the end)", least=0,
                           may_change=True)
    save_every: int = flag(100, "steps between checkpoints", least=1, may_change=True)
    log_every: int = flag(1, "steps between progress updates", least=1, may_change=True)
    timeout: int = flag(1800, "seconds that a process waits for the others", least=1,
                        most=10**9, may_change=True)


FIELDS = {f.name: f for f in fields(Config)}
MAY_CHANGE = {name for name, f in FIELDS.items() if f.metadata["may_change"]}
OF_FILES = ("eval_data", "threshold", "columns", "tokenizer", "turns", "add_eot", "chat",
            "template_args")
# Limits of the losses' and recipes' own flags. A loss checks its other limits itself.
LEAST = {"stages": 1, "ref_every": 1, "lambda_d": 0, "lambda_u": 0, "z0": 0, "ppo_epochs": 1,
         "minibatches": 1, "kl_coef": 0, "vf_coef": 0, "centre": 0, "target_kl": 0, "group": 1}
POSITIVE = ("beta", "tau", "eta", "clip", "clip_value", "clamp")
MOST = torch.finfo(torch.float32).max
PATHS = ("model", "data", "eval_data", "tokenizer", "init", "ref", "out", "judge", "reward")
NO_LIMIT = ("clip", "clip_value", "clamp")                   # inf switches these off
WORDS = {"z0": ("estimate", "zero", "on_policy"), "lambda_d": ("auto",), "lambda_u": ("auto",),
         "slic_target": ("sample", "chosen", "data")}
NUMBER_TOO = ("z0", "lambda_d", "lambda_u")                  # a number is valid, too
PRESETS = {"small GPT": {"lr": 5e-4},                        # from random weights, it learns fast
           "pairs": {"lr": 1e-6}}


@dataclass
class Settings:
    config: Config
    recipe: recipes.Recipe
    hyper: dict                      # the loss's own settings
    options: dict                    # the recipe's flags, z0, slic_target
    origin: dict                     # flag -> where its value came from


def parse(argv):
    """Command line -> Settings."""
    argv = [re.sub(r"^--[\w-]+", underscores, str(word)) for word in argv]
    first = Parser()
    first.add_argument("--loss", default="kto")
    first.add_argument("--online", action="store_true", default=False)
    asked = first.parse_known_args(argv)[0]
    name = asked.loss
    recipe = recipes.find(name)
    if asked.online:
        recipe = recipes.online(recipe, name)
    wants, hyper = signature(recipe.loss)
    for key in hyper.keys() & FIELDS.keys():
        raise SystemExit(f"{recipe.loss.__name__}: its setting {key!r} is a flag of every run "
                         "(--help lists them); give it another name")
    options = dict(recipe.flags)
    if "kl_logratios" in wants:
        options["z0"] = "estimate"
    typed = read_flags(argv, name, recipe, hyper | options)

    preset, source = preset_of(name, recipe, typed)
    values, origin = {}, {}
    for key, default in defaults_of(hyper | options).items():
        # None: terms of a sum with different defaults. A preset leaves each term its own.
        if key in typed:
            values[key], origin[key] = typed[key], "command line"
        elif key in preset and (key in FIELDS or default is not None):
            values[key], origin[key] = preset[key], source
        else:
            values[key] = default
            origin[key] = "default" if key in FIELDS else f"{name}'s signature"
    config = Config(**{key: values[key] for key in FIELDS})
    config.out = config.out or "out/" + re.sub(r"[^\w.+-]", "", name.replace("*", "x"))
    hyper = {key: values[key] for key in hyper}
    options = {key: values[key] for key in options}
    settings = Settings(config, recipe, hyper, options, origin)
    check(settings, typed)
    return settings


def underscores(match):
    """--batch-size means --batch_size."""
    return "--" + match[0][2:].replace("-", "_")


def defaults_of(own):
    return {name: f.default for name, f in FIELDS.items()} | own


def preset_of(name, recipe, typed):
    """({flag: value}, where from): the embedded world's settings, or a real model's."""
    if not typed.get("model") and not typed.get("data"):
        known = world.SETTINGS.get(recipe.like, world.SETTINGS["default"])
        known = known | world.SETTINGS.get(name, {})
        if recipe.online:
            known = known | world.ONLINE["default"] | world.ONLINE.get(recipe.like, {})
        return known, "embedded world"
    if not typed.get("model"):
        return PRESETS["small GPT"], "small GPT"
    return (PRESETS["pairs"] if recipe.paired else {}), "pairs"


# --- reading words ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that ends in one line, and keeps only the flags that were typed."""

    def __init__(self, **how):
        super().__init__(
            prog="train.py", add_help=False, allow_abbrev=False, **how,
            usage="train.py --name value ...   (--loss NAME --help: its equation and parameters)",
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise SystemExit(message.removeprefix("argument "))


def read_flags(argv, name, recipe, own):
    """{flag: value} of what was typed."""
    about = f"--loss {name}\n\n{inspect.getdoc(recipe.loss)}\n\nlosses: {', '.join(recipes.LOSSES)}"
    about += f"\nrecipes: {', '.join(recipes.RECIPES)}"
    parser = Parser(description=about)
    defaults = defaults_of(own)
    for key, default in defaults.items():
        text = f"of --loss {name}"
        if key in FIELDS:
            text = FIELDS[key].metadata["help"]
        elif key in recipes.FLAGS and key not in signature(recipe.loss)[1]:
            text = recipes.FLAGS[key]
        if default not in ("", False, (), None):
            text += f" [{default}]"
        how = dict(help=text.replace("%", "%%"))
        if default is False:
            how |= dict(action="store_true")
        else:
            how |= dict(metavar="", type=reader(key, default))
        if default == ():
            how |= dict(nargs="+")
        parser.add_argument("--" + key, **how)
    if {"--help", "-h"} & set(argv):
        print(parser.format_help())
        raise SystemExit(0)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(unknown[0], name, own, defaults)
    return vars(typed)


def refuse(word, name, own, known):
    key = word.partition("=")[0][2:]
    if not word.startswith("--"):
        raise SystemExit(f"{word!r}: expected --name value or --name=value")
    everywhere = {key for loss in recipes.LOSSES.values() for key in signature(loss)[1]}
    if key in everywhere:
        raise SystemExit(f"--{key}: {name} has no such parameter; it has "
                         f"{', '.join(own) or 'none of its own'}")
    near = difflib.get_close_matches(key, known, 1, cutoff=0)[0]
    raise SystemExit(f"--{key}: unknown flag; nearest: --{near}; --help lists all")


def reader(key, default):
    """A function from a flag's text to its value."""
    words = ("true", "false") if default is True else WORDS.get(key, ())
    if key in FIELDS:
        words = FIELDS[key].metadata["choices"] or words
    kind = type(default)
    if default is None or key in NUMBER_TOO:
        kind = float
    number = {int: "a whole number", float: "a number"}.get(kind)
    valid = ", ".join([*words, number] if number else words)

    def read(text):
        if text in words:
            return text == "true" if default is True else text
        if kind in (str, tuple) and not words:
            if key in PATHS:
                check_path(text, f"--{key} {text}")
            return text
        try:
            if words and key not in NUMBER_TOO:
                raise ValueError
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: valid are {valid}") from None
        switched_off = value == math.inf and key in NO_LIMIT
        if not abs(value) <= MOST and not switched_off:
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number up to {MOST:.2g}")
        return value
    return read


# --- what fits together -------------------------------------------------------------------------

def check(settings, typed):
    config, own = settings.config, settings.hyper | settings.options
    for key, value in (asdict(config) | own).items():
        about = {"least": LEAST.get(key), "most": None, "positive": key in POSITIVE}
        if key in FIELDS:
            about = FIELDS[key].metadata
        if not isinstance(value, (int, float)):
            continue
        if about["least"] is not None and value < about["least"]:
            raise SystemExit(f"--{key} {value}: must be at least {about['least']}")
        if about["most"] is not None and value > about["most"]:
            raise SystemExit(f"--{key} {value}: must be at most {about['most']}")
        if about["positive"] and value <= 0:
            raise SystemExit(f"--{key} {value}: must be positive")
    if "steps" in typed and not config.steps:
        raise SystemExit("--steps 0: must be at least 1")
    for wrong, line in [*clashes(settings, typed), *clashes_of_models(settings)]:
        if wrong:
            raise SystemExit(line)
    try_the_loss(settings)


def clashes(settings, typed):
    """Yield (True if wrong, the error line) for flags that do not fit or would have no effect."""
    config, recipe, own = settings.config, settings.recipe, settings.hyper | settings.options
    yield config.overwrite and config.resume, "--overwrite and --resume: give one of them"
    yield not 1 <= config.lambda_ratio <= 1.5, "--lambda_ratio: KTO's Eq. 9 asks for [1, 1.5]"
    yield config.flip > 1, f"--flip {config.flip}: a share, from 0 to 1"
    yield "flip" in typed and config.data, "--flip: belongs to the embedded world, not to --data"
    yield "flip" in typed and recipe.learns_from not in ("pairs", "thumbs"), \
        f"--flip: --loss {config.loss} learns from {recipe.learns_from}, which have no labels"
    yield config.loss == "rm" and (config.eval_every or config.judge), \
        "--loss rm: without --eval_every and --judge; a reward model writes nothing"
    yield config.model and not config.data, "--model: needs --data FILE to align it with"
    for key in OF_FILES:
        yield key in typed and not config.data, f"--{key}: needs --data FILE"
    yield config.tokenizer and config.model, "--tokenizer: --model brings its own tokenizer"
    for key in ("chat", "template_args"):
        yield key in typed and not config.model, f"--{key}: needs a --model with a chat template"
    yield config.judge and not config.eval_data, "--judge: needs --eval_data FILE with prompts"
    yield own.get("z0") == "estimate" and config.batch_size == 1, \
        "--batch_size 1: z0 is estimated from mismatched pairs; give 2 or more, or --z0 zero"
    yield not 0 < own.get("ref_mix", 1) <= 1, "--ref_mix: a share, above 0 and up to 1"
    yield own.get("reward") == "", \
        "--reward: responses that the policy writes need a judge: a folder that --loss rm wrote, " \
        "file.py:function, or world"
    alone = "values" in recipe.wants or "batch_advantages" in recipe.wants
    yield own.get("group") == 1 and not alone, \
        f"--group 1: --loss {config.loss} compares responses to one prompt; give 2 or more"
    yield recipe.online and "auto" in (own.get("lambda_d"), own.get("lambda_u")), \
        "--lambda_d auto: with --online there are no thumbs to count yet; give numbers"
    yield config.device not in ("", "cpu", "cuda", "mps"), "--device: valid are cpu, cuda, mps"
    yield config.device == "cuda" and not torch.cuda.is_available(), "--device cuda: there is none"


def clashes_of_models(settings):
    """Yield the same for what cannot be adapted, sharded or compiled."""
    config, recipe, own = settings.config, settings.recipe, settings.options
    processes = int(os.environ.get("WORLD_SIZE", 1))
    wants = recipe.wants
    samples = (own.get("z0") == "on_policy" or own.get("slic_target") == "sample"
               or recipe.stage_units is recipes.self_play
               or recipe.learner is not recipes.language_model or recipe.online)
    yield config.lora and not config.model, "--lora: is for Hugging Face models; give --model"
    yield config.lora and "ref_every" in own, \
        f"--lora: --loss {config.loss} moves all weights of its reference"
    yield config.lora and config.loss == "rm", "--lora: a reward model is trained whole"
    yield config.save == "adapter" and not config.lora, "--save adapter: needs --lora RANK"
    yield config.fsdp and processes == 1, "--fsdp: start several processes with torchrun"
    yield config.fsdp and config.lora, "--fsdp: not with --lora"
    yield config.fsdp and config.compile, "--fsdp: not with --compile"
    yield config.fsdp and config.eval_every, "--fsdp: without --eval_every, which samples"
    yield config.fsdp and "distributions" in needs(wants), \
        f"--fsdp: not with --loss {config.loss}, which asks the reference at every step"
    yield config.fsdp and samples, "--fsdp: not with what samples from a whole model " \
        f"(--loss {config.loss}, z0 on_policy, slic_target sample)"
    yield config.compile and recipe.learner is not recipes.language_model, \
        f"--compile: not with --loss {config.loss}"
    whole = getattr(recipe.loss, "needs_whole_batch", False)
    yield whole and (config.micro_batch_size or processes > 1), \
        f"--loss {config.loss}: sorts its batch, so it needs one process and one micro-batch"


def try_the_loss(settings):
    """The loss checks the ranges of its own settings: call it once, on one example."""
    example = {name: torch.ones(1, dtype=torch.float64) for name in MEASURED}
    example |= {name: torch.ones(1, dtype=torch.bool) for name in ("desirable", "preferred")}
    example["response"] = torch.zeros(1, dtype=torch.int64)
    hyper = {key: 1.0 if value == "auto" else value for key, value in settings.hyper.items()}
    try:
        settings.recipe.loss(**{name: example[name] for name in settings.recipe.wants}, **hyper)
    except ValueError as e:
        raise SystemExit(f"--loss {settings.config.loss}: {e}") from None

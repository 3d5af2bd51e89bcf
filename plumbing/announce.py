"""What a run prints before and at its first step."""

import atexit
import inspect
import resource
import shutil
import sys
import tempfile
import time

import torch

from objective import score
from plumbing import parallel
from plumbing.formats import counts_line
from plumbing.parallel import say


def settings_of(run, balance):
    """Print the loss and the data. balance: a line about the lambdas, or None."""
    loss = run.recipe.loss
    equation = (inspect.getdoc(loss) or loss.__name__).splitlines()[0].removesuffix("(B,)").strip()
    say(f"nanoKTO | --loss {run.config.loss}: {equation}")
    say(run.source.story)
    say(f"data: {run.source.format} | {counts_line(run.source.counts)}")
    if run.source.hint:
        say(run.source.hint)
    if balance:
        say(balance)


def introduce(run):
    """Print every setting with its origin, the machine, the policy and the reference."""
    config, by_origin = run.config, {}
    values = {**run.hyper, **run.options}
    values |= {key: getattr(config, key) for key in ("lr", "steps", "batch_size", "dtype", "seed")}
    for name, value in values.items():
        text = f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        by_origin.setdefault(run.origin[name], []).append(text)
    say("settings: " + " | ".join(f"{', '.join(texts)} ({origin})"
                                  for origin, texts in by_origin.items()))
    say(f"machine: {parallel.device}, processes: {parallel.size}")
    weights = sum(p.numel() for p in run.policy.parameters())
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    line = f"policy: {config.init}, {weights:,} weights, {trained:,} of them trained"
    if config.fsdp:
        line += f", sharded over {parallel.size} processes"
    if not run.actor.flat:
        line += " | rows are padded: this architecture would mix the sequences of a flat row"
    if not run.actor.chunked:
        line += " | all logits are in memory at once: this head is more than one product"
    say(line + f" | reference: {config.ref}")
    if run.stages > 1:
        say(f"{run.stages} stages of {config.steps} steps; the reference is the last one's policy")


TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.1}


def check_first_step(look, grad_norm, run):
    """The self-check of step 0: at equal weights the loss is known, and there is a gradient."""
    loss, expected, apart = look
    tolerance = TOLERANCE[run.config.dtype]
    line = (f"step 0: loss {loss:.6f} (predicted {expected:.6f}) | log-ratios up to {apart:.2g} "
            f"| gradient {grad_norm:.3g}")
    if grad_norm == 0 and run.recipe.online:                 # such as a task not solved once yet
        return say(line + "\n        no gradient yet: the rewards of each group are equal")
    if grad_norm == 0:
        raise SystemExit(line + " | no gradient: are all weights frozen, or both lambdas 0?")
    if not run.must_be_equal():
        return say(line + "\n        policy and reference start apart")
    if apart > tolerance:
        raise SystemExit(line + " | policy and reference have equal weights, yet a log-ratio "
                         f"exceeds {tolerance}. Known causes: dropout is on; the reference was "
                         "measured in another dtype; an adapter is missing from the reference")
    if abs(loss - expected) > tolerance:
        raise SystemExit(line + " | the loss is not the value it must have at equal weights")
    say(line + " | ok")


def dry_run(run, train_step, make_optimizer):
    """Run the first step without its update, and estimate what the whole run would cost."""
    config = run.config
    objective = run.begin_stage(0, 0)
    optimizer = make_optimizer(run.policy, config)
    look = objective.first_look(run.policy, config.micro_batch_size)
    line = train_step(run.policy, objective, optimizer, 0, config, update=False)
    check_first_step(look, line["grad_norm"], run)
    clock = time.perf_counter()
    train_step(run.policy, objective, optimizer, 0, config, update=False)     # now all is warm
    per_step = time.perf_counter() - clock
    some = run.units[:config.batch_size]
    clock = time.perf_counter()
    score(run.actor, some)
    per_unit = (time.perf_counter() - clock) / len(some)
    passes = len(run.rows_reached(len(run.units))) if objective.reference else 0
    minutes = (run.stages * config.steps * per_step + passes * per_unit) / 60
    say(f"estimate: {run.stages * config.steps} steps of {per_step:.3f} s and {passes:,} rows of "
        f"the reference: about {minutes:.1f} minutes, without base model and evaluation")
    say(f"memory at its peak so far: {peak_memory() / 2**30:.2f} GiB; nothing was written to "
        f"{config.out}")


def peak_memory():
    """The largest memory so far, in bytes: of the GPU, or of this process."""
    if parallel.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def temporary_folder():
    """A folder that is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="nanokto-dry-run-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

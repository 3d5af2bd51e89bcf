"""The loop: `torchrun [--nproc_per_node N] train.py --loss kto`, or `python train.py ...`.

    for step in range(steps):
        for batch in objective.batches(policy, step):        one; with PPO several
            for part in this process's share of the batch:
                measured = what the loss's signature names, on these examples
                (weight * loss(measured).sum() / batch.n).backward()
            sum the gradients over processes, clip, AdamW

The loop knows no loss by name. A loss is a function (kto.py, dpo_variants.py, ppo.py). objective.py
measures what a loss names. recipes.py says which data, reference and author belong to a loss.
A step is the same for any number of processes and any micro-batch size: quantities of the whole
batch are measured over all of it first, and `n` counts all of it.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

# Set before torch is loaded: waiting threads sleep. If they spin, a busy machine slows down 10 x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import data
import model
import objective
import recipes
import world
from objective import Preferences
from plumbing import announce, parallel, rundir, settings
from plumbing.run import Run


# --- one step -----------------------------------------------------------------------------------

def train_step(policy, objective, optimizer, step, config, update=True):
    """One step: usually one batch and one update, with PPO several.   -> its line for the log"""
    started = time.perf_counter()
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens = 0
    for batch in objective.batches(policy, step):
        watched = []
        size = batch.part_size or config.micro_batch_size
        # weight 0: a filler, so that all processes run equally many forwards
        for part, weight in parallel.deal(batch.units, policy.token_budget, size):
            measured = objective.measure(policy, batch, part)
            losses = objective.losses(measured)
            (weight * losses.sum() / batch.n).backward()
            watched.append((weight, objective.watch(measured, losses)))
        sums = sum_up(watched)
        parallel.sum_gradients(policy)
        norm = clip_gradients(policy, config.max_grad_norm)
        refuse_what_is_not_finite(sums["loss"], norm, batch, step)
        line = objective.report(sums, batch)
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += objective.tokens(batch)
    if update and objective.reference is not None:
        objective.reference.follow(policy, step)
    seconds = max(time.perf_counter() - started, 1e-9)
    return line | {"grad_norm": norm, "lr": lr, "tokens_per_second": tokens / seconds}


def sum_up(watched):
    """Sums over parts and processes, by name. One transfer from the device for all of them."""
    totals = 0
    for weight, sums in watched:
        totals = totals + weight * torch.stack(list(sums.values()))
    names = list(watched[0][1])
    return dict(zip(names, parallel.total(totals).tolist()))


def clip_gradients(policy, most):
    """Scale all gradients down to the norm `most` (0: never).   -> the norm before"""
    params = [p for p in policy.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm = parallel.whole(norm)
    torch.nn.utils.clip_grads_with_norm_(params, most or math.inf, norm)
    return float(norm)


def refuse_what_is_not_finite(loss, norm, batch, step):
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "gradient" if math.isfinite(loss) else "loss"
    rows = ", ".join(unit[0].where for unit in batch.units)[:300]
    raise SystemExit(f"step {step}: the {what} is not finite; a lower --lr, or look at the rows of "
                     f"this batch: {rows}. The last checkpoint is as it was")


def learning_rate(step, config):
    """Linear warm-up, then a cosine from lr to lr / 10."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def make_optimizer(policy, config):
    """AdamW, fused; weight decay on matrices only."""
    params = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    for p in params:                                         # made now, so that a checkpoint
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),        # can fill it in
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


# --- the steps of a stage -----------------------------------------------------------------------

def train(run, objective, stage, first):
    """One stage from step `first` on: metrics.jsonl, checkpoints, a progress bar."""
    config, policy = run.config, run.policy
    optimizer = make_optimizer(policy, config)
    if first and run.load_checkpoint(optimizer, objective.reference) != run.done(stage, first):
        raise SystemExit("--resume: the newest checkpoint lacks the reference; --overwrite")
    look = None
    if stage == first == 0:
        look = objective.first_look(policy, config.micro_batch_size)
    with run.diary(stage, first) as diary, stopping() as stop:
        for step in range(first, config.steps):
            line = train_step(policy, objective, optimizer, step, config)
            if look:
                announce.check_first_step(look, line["grad_norm"], run)
                look = None
            diary.write(step, line | run.quick_look(step))
            stopped = parallel.any_of(stop)                  # all processes stop after this step
            last = step + 1 == config.steps
            if stopped or last or (step + 1) % config.save_every == 0:
                run.save_checkpoint(stage, step, optimizer, objective.reference)
            if stopped and not run.is_over(stage, step):
                raise SystemExit(f"stopped after step {step + 1} of stage {stage + 1}; the same "
                                 "command with --resume continues it")


@contextmanager
def stopping():
    """A list; Ctrl-C and SIGTERM append to it, so that `train` finishes its step and saves."""
    stop, before = [], {}
    if threading.current_thread() is threading.main_thread():          # Python's rule for signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop.append(1))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the small GPT's base model -----------------------------------------------------------------

def base_model(config, source):
    """The folder of a small GPT, pretrained and fine-tuned by `source.base_stages()`.

    Process 0 makes it once. Its name is a hash of all it depends on: code, seed, settings, rows.
    """
    stages = source.base_stages()
    key = hashlib.sha256(json.dumps([asdict(source.shape), config.seed, torch.__version__,
                                     [(what, how) for what, _, how in stages]]).encode())
    for file in (data, model, objective, recipes, world, sys.modules[__name__]):
        key.update(Path(file.__file__).read_bytes())
    for _, units, _ in stages:
        for row, in units:
            key.update(row.ids.tobytes() + row.mask.tobytes())
    folder = Path(config.out).parent / f"base-{key.hexdigest()[:12]}"
    torch.manual_seed(config.seed)
    if config.dry_run and not folder.exists():
        parallel.say("base model: not made yet; random weights stand in for it here")
        folder = announce.temporary_folder()
        model.GPT(source.shape).save(folder)
        return str(folder)
    if parallel.rank == 0:
        with rundir.locked(folder.with_suffix(".lock")), parallel.alone():
            if folder.exists():
                parallel.say(f"base model: {folder} (made before; nothing it depends on changed)")
            else:
                make_base_model(folder, stages, config, source)
    parallel.barrier()
    return str(folder)


def make_base_model(folder, stages, config, source):
    """Supervised stages: the same step, with the token-mean loss and no reference."""
    policy = model.GPT(source.shape).to(parallel.device)
    parallel.use_threads(policy)
    for what, units, how in stages:
        how = replace(config, micro_batch_size=0, max_grad_norm=1.0, **how)
        imitation = Preferences(recipes.token_nll_loss, {}, units, None, batch_size=how.batch_size,
                                seed=how.seed, trained=1)
        optimizer = make_optimizer(policy, how)
        bar = parallel.bar(how.steps, f"{what}, step")
        for step in range(how.steps):
            line = train_step(policy, imitation, optimizer, step, how)
            bar.set_postfix_str(f"loss {line['loss']:.3f} per token", refresh=False)
            bar.update()
        bar.close()
    beside = folder.with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save(beside, eot=source.tokenizer.eot)
    source.tokenizer.save(beside)
    beside.rename(folder)


# --- a run, from start to end -------------------------------------------------------------------

def run_once(argv):
    run = Run(settings.parse(argv))
    config, out = run.config, run.out
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (out / "config.json").is_file():
        config.resume, config.overwrite = True, False        # torchrun has restarted us: resume
    rundir.check(config)
    run.find_models()
    run.read()
    parallel.join(config.device, config.timeout)
    run.prepare_units()
    run.count_steps()
    balance = run.balance_lambdas()
    announce.settings_of(run, balance)
    run.find_judges()

    clock = time.perf_counter()
    if config.resume:                                        # with the same models as before
        old = rundir.read_config(out, init=str, ref=str)
        config.init, config.ref = config.init or old["init"], config.ref or old["ref"]
    base = config.model
    if not base and not (config.init and config.ref):        # no flag names a model: make one
        base = base_model(config, run.source)
    config.init, config.ref = config.init or base, config.ref or base
    run.start()
    announce.introduce(run)
    run.seconds["base"] = time.perf_counter() - clock
    if config.dry_run:
        return announce.dry_run(run, train_step, make_optimizer)
    with run.lock():
        run.record()
        clock, cpu = time.perf_counter(), time.process_time()
        done = 0
        if config.resume:
            done = run.load_checkpoint(make_optimizer(run.policy, config))
        run.prepare_folder(done)
        for stage in range(done // config.steps, run.stages):
            first = max(0, done - stage * config.steps)
            train(run, run.begin_stage(stage, first), stage, first)
        run.seconds["align"] = time.perf_counter() - clock
        run.seconds["align_cpu"] = time.process_time() - cpu
        run.finish()
    parallel.until_first_is_done()


def main(argv=None):
    """Run one command line. An error is one line of text."""
    try:
        return run_once(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:
        if not isinstance(e.code, str):
            raise
        line = " ".join(e.code.split())                      # a quoted file name may have \n
        if not parallel.first_to_say(line):
            line = 1                                         # another process has said it
        raise SystemExit(line) from None
    except BrokenPipeError:                                  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit("interrupted before the first step; nothing was written") from None
    finally:
        parallel.leave()


if __name__ == "__main__":
    main()

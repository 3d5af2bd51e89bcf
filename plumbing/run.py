"""A run: its data, its models, its stages and its folder.

train.run_once calls its methods in this order:
    find_models, read, prepare_units, count_steps      data: from files to the units of a step
    find_judges, start                                 models: a reward, a judge, the policy
    record, prepare_folder, begin_stage                the run's folder; the objective of a stage
    finish                                             model/, eval.json, pictures
"""

import gc
import hashlib
import json
import math
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import data
import evaluate
import recipes
from objective import needs, score
from plumbing import checkpoint, huggingface, parallel, rewards, rundir, settings, sources
from plumbing.reading import read_json, tensors_of
from rollouts import actor_of


class Run:
    def __init__(self, how):
        self.config, self.recipe = how.config, how.recipe
        self.hyper, self.options, self.origin = how.hyper, how.options, how.origin
        self.out = Path(self.config.out)
        self.dtype = torch.float64 if self.config.dtype == "fp64" else torch.float32
        self.stages = self.options.get("stages", 1)
        self.given = given_z0(self.options.get("z0"))
        self.running = {}                                    # running means, over all stages
        self.seconds = {}
        self.policy = None
        self.reference_folder = ""                           # of the model this stage starts from
        self.unmoved = False                                 # True: the policy still is that model

    # --- data

    def read(self):
        """Read the examples from files, or make those of the embedded world."""
        source = sources.Files if self.config.data else sources.World
        self.source = source(self.config, self.recipe)
        self.tokenizer = self.source.tokenizer

    def prepare_units(self):
        """Turn the examples into the units that the loss and the recipe need."""
        config, recipe = self.config, self.recipe
        units = recipes.units_for_loss(self.source.units, self)
        if recipe.prepare:
            units = recipe.prepare(units, self)
        self.trained = 1                                     # rows of a unit with a gradient
        if recipe.paired:
            self.trained = 2 + ("target_logps" in recipe.wants)
        own = recipe.online or self.options.get("z0") == "on_policy"
        if "partners" in needs(recipe.wants, self.given) and not own:
            try:
                units = data.mismatched_units(units, seed=config.seed, max_len=config.max_len)
            except ValueError as e:
                raise SystemExit(f"--data {' '.join(config.data)}: {e}; z0 is estimated from them: "
                                 "give --z0 zero, or more prompts") from None
        self.units = units

    def find_judges(self):
        """Load PPO's reward and the --judge, so that a wrong name fails before any work."""
        where = dict(device=parallel.device)
        if "reward" in self.options:
            self.reward = rewards.load_reward(self.options["reward"], self.tokenizer, **where)
        if self.config.judge:
            self.judge_of_texts = rewards.load_reward(self.config.judge, flag="judge", **where)

    def count_steps(self):
        """Turn --epochs into steps of one stage; make the batch no larger than the data."""
        config = self.config
        self.n_units = len(self.units)                       # of one stage
        if self.recipe.stage_units is recipes.easy_first:
            self.n_units //= self.stages
        if not self.n_units:
            raise SystemExit(f"--stages {self.stages}: there are only {len(self.units)} pairs")
        if config.batch_size > self.n_units:
            config.batch_size = self.n_units
            self.origin["batch_size"] = "all there are"
        steps = math.ceil(config.epochs * data.steps_per_epoch(self.n_units, config.batch_size))
        config.steps = config.steps or max(1, steps)

    def epoch(self, step):
        """Passes over the stage's data after this step."""
        epoch, k = divmod(step, data.steps_per_epoch(self.n_units, self.config.batch_size))
        return round(epoch + min(1.0, (k + 1) * self.config.batch_size / self.n_units), 4)

    def balance_lambdas(self):
        """Replace `auto` by numbers.   -> a line about them for the log, or None"""
        hyper = self.hyper
        if "auto" not in (hyper.get("lambda_d"), hyper.get("lambda_u")):
            return None
        thumbs = [row.desirable for unit in self.source.units for row in unit]
        n_d, n_u = thumbs.count(True), thumbs.count(False)
        d, u = data.lambda_weights(n_d, n_u, ratio=self.config.lambda_ratio)
        if hyper["lambda_d"] != "auto":                      # one is given: scale the other to it
            d, u = hyper["lambda_d"], hyper["lambda_d"] * u / d
        elif hyper["lambda_u"] != "auto":
            d, u = hyper["lambda_u"] * d / u, hyper["lambda_u"]
        hyper |= {"lambda_d": d, "lambda_u": u}
        reached = "undefined, one class only"
        if n_d and n_u and u:
            reached = f"{d * n_d / (u * n_u):.4g}"
        return (f"lambdas: {n_d:,} desirable, {n_u:,} undesirable -> lambda_d {d:.4g}, "
                f"lambda_u {u:.4g}; lambda_d n_d / (lambda_u n_u) = {reached}")

    # --- models

    def find_models(self):
        """Replace the hub names of models by local folders."""
        config = self.config
        self.named = config.model                            # as typed
        for name in ("model", "init", "ref"):
            if getattr(config, name):
                folder = huggingface.local_folder(getattr(config, name), name,
                                                  trust_remote_code=config.trust_remote_code)
                huggingface.read_model_config(folder, name)
                tensors_of(folder, f"--{name} {folder}")
                setattr(config, name, str(folder))

    def start(self):
        """Load the model to train, and check that it fits the data and the flags."""
        config = self.config
        self.reference_folder = config.ref
        self.policy = self.recipe.learner(self)
        self.policy.precision = config.dtype
        actor = self.actor
        if config.checkpoint_activations:
            self.policy.checkpoint_activations()
        if config.save == "adapter" and actor.sft_adapter:
            raise SystemExit(f"--save adapter: {config.model} was merged into its base, and an "
                             "adapter folder cannot name a merged model; use --save merged")
        if actor.context < config.max_len:
            raise SystemExit(f"--max_len {config.max_len}: the model in {config.init} has a "
                             f"context of {actor.context} tokens")
        if self.tokenizer.vocab_size > actor.vocab_size:
            raise SystemExit(f"--model {config.init}: its embedding has {actor.vocab_size} tokens, "
                             f"its tokenizer {self.tokenizer.vocab_size}")
        parallel.use_threads(self.policy)

    @property
    def actor(self):
        """The language model; PPO trains it together with a critic."""
        return actor_of(self.policy)

    def load(self, folder, **how):
        config = self.config
        dtype = self.dtype
        if config.lora and config.dtype == "bf16":           # peft keeps its own weights in fp32
            dtype = torch.bfloat16
        flag = "model"
        if str(folder) != config.model:
            flag = "init" if str(folder) == config.init else "ref"
        how |= dict(dtype=dtype, trust_remote_code=config.trust_remote_code, flag=flag)
        if config.fsdp:
            how.pop("lora", None)
            return parallel.load_sharded(
                lambda: huggingface.load_policy(folder, device="cpu", **how), config.dtype)
        policy = huggingface.load_policy(folder, device=parallel.device, **how)
        if config.compile:
            policy.compile_layers()
        policy.precision = config.dtype
        return policy

    def load_reference(self, folder=None):
        """The model in `folder`, frozen; by default the one this stage is compared with."""
        config = self.config
        folder = folder or self.reference_folder
        if config.lora and folder == config.ref and self.starts_at_reference():
            return self.actor.reference()                    # the policy without its adapter
        return self.load(folder).requires_grad_(False)

    def starts_at_reference(self):
        """True if policy and reference are loaded from the same folder."""
        return Path(self.config.init).resolve() == Path(self.config.ref).resolve()

    def must_be_equal(self):
        """True if policy and reference must agree before the first step."""
        return self.starts_at_reference() and self.recipe.reference is not recipes.nothing

    def reference_table(self, units, path, what, model=None, every_row=False):
        """log pi_ref of the rows that the steps use; stored in `path` and read from there."""
        table = torch.full((len(units), len(units[0])), torch.nan, dtype=torch.float64)
        if path.is_file() and not self.config.dry_run:
            table = checkpoint.load_table(path, table.shape)
        rows = range(len(units))
        if not every_row:
            rows = self.rows_reached(len(units))
        missing = [i for i in rows if table[i].isnan().any()]
        if missing:
            if model is None and self.unmoved:
                model = self.actor                           # no second model is needed
            model = model or self.load_reference()
            table[missing] = score(model, [units[i] for i in missing], what)
            if not self.config.dry_run:
                checkpoint.save_table(path, table)
        return table

    def rows_reached(self, n):
        steps = 1 if self.config.dry_run else self.config.steps
        if steps >= data.steps_per_epoch(n, self.config.batch_size):
            return range(n)
        reached = []
        for step in range(steps):
            reached += data.batch_rows(n, self.config.batch_size, seed=self.config.seed, step=step)
        return sorted(reached)

    # --- stages

    def begin_stage(self, stage, first):
        """The Objective of one stage: its loss, its units and its reference."""
        if stage:
            folder = self.out / f"stage-{stage}"
            missing = not folder.exists()
            parallel.barrier()                               # all look before one writes
            if missing:                                      # the policy of the stage before
                checkpoint.export(self.actor, folder, self.tokenizer)
            self.reference_folder = str(folder)
        self.unmoved = first == 0 and (stage > 0 or self.starts_at_reference())
        units = self.recipe.stage_units(self, self.units, stage)
        reference = self.recipe.reference(self, units, stage)
        self.unmoved = False
        objective = self.recipe.objective(self, units, reference)
        objective.running = self.running
        return objective

    # --- the folder

    def lock(self):
        if parallel.rank:
            return nullcontext()
        return rundir.locked(self.out / "lock", wait=False)

    def record(self):
        """Collect the content of config.json. A resumed run must agree with the old one."""
        versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
        versions["python"] = sys.version.split()[0]
        thumbs = [row.desirable for unit in self.source.units for row in unit]
        rows = hashlib.sha256()                              # a resumed run must read the same
        for unit in self.units:
            for row in unit:
                known = f"{row.desirable} {row.weight}".encode()
                rows.update(row.ids.tobytes() + row.mask.tobytes() + known)
        found = {**asdict(self.config), **self.hyper, **self.options, "model": self.named,
                 "task": self.source.task, "source": self.recipe.learns_from,
                 "origin": self.origin, "n_desirable": thumbs.count(True),
                 "n_undesirable": thumbs.count(False),
                 "rows": rows.hexdigest()[:16], "processes": parallel.size,
                 "versions": versions, "commit": rundir.commit()}
        self.settings = json.loads(json.dumps(found))
        may_change = set(settings.MAY_CHANGE)
        if self.stages > 1:                                  # steps done say which stage it is
            may_change -= {"steps", "epochs"}
        if self.config.resume:
            rundir.refuse_changes(self.out, self.settings, may_change)

    def prepare_folder(self, done):
        if parallel.rank == 0:
            rundir.check(self.config)                        # another run may have come since
            rundir.prepare(self.out, self.settings, done)
        parallel.barrier()

    def done(self, stage, steps):
        """Steps done over all stages, if `steps` of this stage are done."""
        return stage * self.config.steps + steps

    def is_over(self, stage, step):
        return self.done(stage, step + 1) == self.stages * self.config.steps

    @contextmanager
    def diary(self, stage, first):
        """The log of a stage: a line per step in metrics.jsonl, and a progress bar."""
        steps = self.config.steps
        bar = parallel.bar(self.stages * steps, f"{self.config.loss}, step", stage * steps + first)
        file = open(os.devnull if parallel.rank else self.out / "metrics.jsonl", "a")
        with bar, file:
            yield Diary(self, stage, file, bar)

    def quick_look(self, step):
        """A few numbers on the tuning questions, every --eval_every steps; by process 0."""
        every = self.config.eval_every
        if not every or (step + 1) % every or parallel.rank:
            return {}
        with parallel.alone():
            found = self.source.quick(self.actor, self.load_reference(self.config.ref))
        return {f"eval/{key}": value for key, value in found.items()}

    # --- checkpoints

    def save_checkpoint(self, stage, step, optimizer, reference):
        checkpoint.save(self.out / "checkpoint", self.done(stage, step + 1), self.policy,
                        optimizer, self.running, moving_model(reference))

    def load_checkpoint(self, optimizer, reference=None):
        """-> steps done, over all stages"""
        return checkpoint.load(self.out / "checkpoint", self.policy, optimizer, self.running,
                               moving_model(reference))

    def finish(self):
        """Write model/, whole or not at all; then evaluate it."""
        config = self.config
        if not score(self.actor, self.source.units[:8]).isfinite().all():
            raise SystemExit("after the last step the policy's log-probs are not finite; try a "
                             f"lower --lr. model/ is not written; {self.out}/checkpoint is kept")
        checkpoint.export(self.actor, self.out / "model", self.tokenizer,
                          adapter=config.save == "adapter")
        if config.fsdp:                                      # process 0 will load the whole model
            self.policy = None
            config.fsdp = False
            gc.collect()
        if parallel.rank == 0:
            with parallel.alone():
                self.judge()

    def judge(self):
        """Write eval.json, pictures, samples and the model card; print a summary."""
        policy = self.actor
        if policy is None:
            policy = self.load(self.out / "model")
        if isinstance(policy, rewards.RewardModel):
            found = {"train": rewards.accuracy(policy, self.units[:2000])}
            if self.source.held_out():
                found["eval"] = rewards.accuracy(policy, self.source.held_out())
            evaluate.report_rewards(found, self.config, self.seconds)
        else:
            reference = self.load_reference(self.config.ref)
            self.source.report(policy, reference, self.seconds)
            if self.config.judge:
                self.ask_the_judge(policy, reference)
        found = read_json(self.out / "eval.json", self.out)
        card = evaluate.model_card(self.settings, found)
        (self.out / "model" / "README.md").write_text(card)

    def ask_the_judge(self, policy, reference):
        config = self.config
        rows = evaluate.compare(config.out, self.settings,
                                lambda: (policy, reference, self.tokenizer), seed=config.seed,
                                device=parallel.device)
        verdicts = evaluate.judge_comparison(config.out, self.settings, rows,
                                             self.judge_of_texts, config.judge)
        print(evaluate.win_rate_lines(verdicts))


@dataclass
class Diary:
    """metrics.jsonl and the progress bar of one stage."""
    run: Run
    stage: int
    file: object
    bar: object

    def write(self, step, line):
        steps = self.run.config.steps
        line = {"step": self.stage * steps + step, "epoch": self.run.epoch(step)} | line
        print(json.dumps(line), file=self.file, flush=True)
        self.bar.update()
        if (step + 1) % self.run.config.log_every == 0:
            self.bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)


def moving_model(reference):
    """The model of a moving reference, which a checkpoint must contain; else None."""
    if reference is None or not reference.every:
        return None
    return reference.model


def given_z0(z0):
    """{measured name: tensor} of a z0 that a flag sets: `--z0 zero`, `--z0 1.5`."""
    if z0 == "zero":
        return {"kl_logratios": torch.zeros(0, dtype=torch.float64)}
    if isinstance(z0, float):
        return {"kl_logratios": torch.tensor([z0], dtype=torch.float64)}
    return {}

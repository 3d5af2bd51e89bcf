"""A recipe is a whole method: a loss, its data, its mask and its reference.

For example, LD-DPO is DPO's loss with another mask, and TR-DPO is DPO's loss with a reference that
moves. A method answers four questions. Each answer is a function in a field of the recipe:

    question                               field           answers
    Who wrote the responses?               stage_units     the data; the last stage's policy (SPIN)
                                           objective       the policy, at every step (--online)
    Which tokens count, and how much?      prepare         all alike; a long tail less (LD-DPO)
    What is the policy compared with?      reference       a frozen model; a moving one; nothing
                                           objective       the same, but clamped (humanline)
    Which function is minimised?           loss            one of kto.py, dpo_variants.py, ppo.py

A loss without an entry below is a recipe with the default answers, so `find` gives a recipe for
any name that --loss takes. A new recipe is one entry.

The functions get `run` (plumbing/run.py), which knows the settings and loads models:
    run.config, run.options        settings of the run; the recipe's own flags, z0, slic_target
    run.policy, run.tokenizer      the model in training; its tokenizer
    run.reference_folder           the folder of this stage's reference
    run.load_reference()           the reference, frozen
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial

import numpy as np
import torch

import data
import dpo_variants
import kto
import ppo
import rollouts
from objective import Preferences, Reference, is_paired, needs, signature
from plumbing import parallel, rewards, rundir
from plumbing.reading import read_json
from rollouts import as_rows, prompts_of


# --- which tokens, and of which rows ------------------------------------------------------------

def units_for_loss(units, run):
    """The units that the loss's signature asks for."""
    wants = run.recipe.wants
    if run.recipe.online:
        return prompts_once(units)
    if not is_paired(wants) and "desirable" not in wants:    # SFT: it imitates, without labels
        units = good_ones(units, run)
    if "preferred" in wants:                                 # files put the preferred one first
        units = in_random_order(units, run.config.seed)
    if "target_logps" not in wants:                          # only SLiC and XPO use a target
        units = [unit[:2] for unit in units]
    for name, column in (("score_gap", "score"), ("chosen_win_prob", "win_prob")):
        if name in wants:
            require_column(units, column, run)
    if "score_gap" in wants:
        require_gap(units, run)
    return units


def in_random_order(units, seed):
    """Toss a coin for each pair: which response comes first."""
    heads = np.random.default_rng([*np.atleast_1d(seed), len(units)]).random(len(units)) < 0.5
    return [unit if head else (unit[1], unit[0], *unit[2:]) for unit, head in zip(units, heads)]


def require_target(units, run):
    """With --slic_target data refuse a file without a third response."""
    for unit in units:
        if run.options["slic_target"] == "data" and len(unit) < 3:
            raise SystemExit(f"{unit[0].where}: --slic_target data needs the column target")
    return units


def good_ones(units, run):
    good = [unit[:1] for unit in units if unit[0].desirable]
    if not good:
        raise SystemExit(f"--loss {run.config.loss}: learns from desirable rows only, and --data "
                         "has none")
    return good


def require_column(units, column, run):
    for unit in units:
        if None in [getattr(row, column) for row in unit[:2]]:
            raise SystemExit(f"{unit[0].where}: --loss {run.config.loss} needs the columns "
                             f"{column}_chosen, {column}_rejected")


def require_gap(units, run):
    for chosen, rejected, *_ in units:
        if chosen.score <= rejected.score:
            raise SystemExit(f"{chosen.where}: --loss {run.config.loss} needs score_chosen > "
                             f"score_rejected, got {chosen.score:g} and {rejected.score:g}")


def tail_counts_less(units, run):
    """LD-DPO: the longer response's tokens beyond the shorter one's length weigh ld_alpha."""
    return [data.length_desensitised(unit, run.options["ld_alpha"]) for unit in units]


def last_tokens(units, run):
    """Only the last token counts: the reward is read there."""
    return [tuple(rewards.last_token(row) for row in unit[:2]) for unit in units]


def prompts_once(units):
    """Each prompt once, since the policy writes the responses. Labels only decide the order."""
    liked_first = sorted(units, key=lambda unit: unit[0].desirable is False)
    return list({unit[0].prompt_key: unit[:1] for unit in liked_first}.values())


# --- who wrote the responses, stage by stage ----------------------------------------------------

def the_data(run, units, stage):
    return units


def easy_first(run, units, stage):
    """sDPO: one chunk of pairs per stage; pairs that the first reference ranks right come first."""
    logps = run.reference_table(units, run.out / "ordering.safetensors", "ordering by difficulty",
                                every_row=True)
    order = (logps[:, 1] - logps[:, 0]).argsort(stable=True).tolist()
    start = stage * len(units) // run.stages
    stop = (stage + 1) * len(units) // run.stages
    return [units[i] for i in order[start:stop]]


def self_play(run, units, stage):
    """SPIN: the rejected response is written by this stage's reference, the last stage's policy."""
    path = run.out / f"stage-{stage}-samples.json"
    said = sampled_once(run, units, path, run.load_reference(), desirable=False)
    return [(unit[0], row) for unit, row in zip(units, said)]


def with_target(run, units, stage):
    """The third response of SLiC and XPO: the reference's, the chosen one, or the file's own."""
    source = run.options["slic_target"]
    if source == "chosen":
        return [(*unit[:2], unit[0]) for unit in units]
    if source == "sample":
        said = sampled_once(run, units, run.out / "targets.json", run.load_reference(),
                            desirable=True)
        return [(*unit[:2], row) for unit, row in zip(units, said)]
    return units


def own_answers(run, policy, units, seed, desirable=None):
    """The policy's response to each unit's prompt, at temperature 1; equal on every process."""
    written = rollouts.answers(policy, prompts_of(units), run.tokenizer, seed=seed,
                               max_len=run.config.max_len)
    return as_rows(units, written, desirable)


def with_own_answers(run):
    """`--z0 on_policy`: y' is a new response of the policy to the same prompt, at every step."""
    def author(policy, units, step):
        own = own_answers(run, policy, units, [run.config.seed, step])
        return [(*unit, answer) for unit, answer in zip(units, own)], {}
    return author


def judged_answers(run, reference):
    """--online: at every step a pair, or G thumbs, for each prompt of the batch."""
    author = rollouts.Author(run.reward, run.tokenizer, run.config, run.options)
    wants = run.recipe.wants
    preferences_of = rollouts.pairs if run.recipe.paired else rollouts.thumbs

    def write(policy, prompts, step):
        rows, scores, stats = author(policy, prompts, step)
        units = []
        for start in range(0, len(rows), author.group):
            group = slice(start, start + author.group)
            units += preferences_of(rows[group], scores[group])
        if "preferred" in wants:
            units = in_random_order(units, [run.config.seed, step])
        if "target_logps" in wants:                          # SLiC, XPO: the reference writes it
            said = own_answers(run, reference.model, units, [run.config.seed, step, 1], True)
            units = [(*unit, row) for unit, row in zip(units, said)]
        if "partners" in needs(wants, run.given):            # y' = y is a sample of pi, so z0
            units = [(*unit, unit[0]) for unit in units]     # estimates the paper's KL(pi || ref)
        return units, stats
    return write


def sampled_once(run, units, path, policy, *, desirable):
    """One response to each unit's prompt, kept in `path`, so that a resumed run reads them."""
    if run.config.dry_run:                                   # other rows, to estimate the cost
        return [units[k - 1][0] for k in range(len(units))]
    prompts = prompts_of(units)
    if not path.is_file():
        written = []
        with parallel.bar(len(prompts), "sampling") as progress:
            for start in range(0, len(prompts), 512):
                written += rollouts.answers(
                    policy, prompts[start:start + 512], run.tokenizer,
                    max_len=run.config.max_len, seed=[run.config.seed, 7, start])
                progress.update(len(written) - start)
        if parallel.rank == 0:
            rundir.write(path, json.dumps(written))
        parallel.barrier()
    return as_rows(units, read_json(path, f"--resume: {path.parent}", list), desirable)


# --- what the policy is compared with -----------------------------------------------------------

def frozen(run, units, stage):
    """A frozen model. Its log-probs are stored; it stays in memory only if every step needs it."""
    needed = needs(run.recipe.wants, run.given)
    asked = run.recipe.online and "target_logps" in run.recipe.wants   # it writes the target
    if "reference" not in needed and not asked:
        return None
    if run.recipe.online or run.options.get("z0") == "on_policy":      # new rows at every step
        return Reference(model=run.load_reference())
    model = None
    if "distributions" in needed:
        model = run.load_reference()
    path = run.out / f"reference-{stage}.safetensors"
    table = run.reference_table(units, path, "reference log-probs", model)
    return Reference(table, model)


def moving(run, units, stage):
    """TR-DPO: a model that follows the policy."""
    return Reference(model=run.load_reference(), mix=run.options["ref_mix"],
                     every=run.options["ref_every"])


def following(run, units, stage):
    """Humanline: the policy as it was one update ago, copied every ref_every steps."""
    return Reference(model=run.load_reference(), mix=1.0, every=run.options["ref_every"], lags=True)


def nothing(run, units, stage):
    """log pi_ref = 0: nothing holds the policy where it started."""
    return Reference()


class Clamped:
    """Humanline: the policy, with each token's log-ratio to `model` clamped to [low, high] nats.

    log pi~ = log ref + clamp(log pi - log ref, low, high), token by token. So every log-ratio to
    `model` is a sum of clamped ones. Beyond the clamp there is no gradient.
    """

    def __init__(self, policy, model, low, high):
        self.policy = policy
        self.model = model
        self.low, self.high = low, high

    def __call__(self, ids, positions, lengths, predict, targets, extra=None):
        row = ids, positions, lengths, predict, targets
        with torch.no_grad():
            ref_logps = self.model(*row)
        if parallel.sharded(self.model):                     # no backward will free its weights
            self.model.reshard()
        return ref_logps + (self.policy(*row) - ref_logps).clamp(self.low, self.high)

    def __getattr__(self, name):                             # anything else is the policy's
        return getattr(self.policy, name)


# --- what is trained, and on what objective -----------------------------------------------------

def language_model(run):
    return run.load(run.config.init, lora=run.config.lora, seed=run.config.seed)


def reward_model(run):
    return rewards.RewardModel.load(run.config.init, new=True, device=parallel.device,
                                    dtype=run.dtype, flag="model")


def actor_and_critic(run):
    critic = rewards.Critic.load(run.config.init, new=True, device=parallel.device,
                                 dtype=run.dtype, flag="model")
    return rollouts.ActorCritic(language_model(run), critic)


def preferences(run, units, reference, through=None):
    author = None
    if run.recipe.online:
        author = judged_answers(run, reference)
    elif run.options.get("z0") == "on_policy":
        author = with_own_answers(run)
    return Preferences(run.recipe.loss, run.hyper, units, reference, trained=run.trained,
                       batch_size=run.config.batch_size, seed=run.config.seed, given=run.given,
                       author=author, passes=run.options.get("ppo_epochs", 1), through=through)


def humanline(run, units, reference):
    low, high = run.options["log_eps_p"], run.options["log_eps_r"]
    return preferences(run, units, reference,
                       partial(Clamped, model=reference.model, low=low, high=high))


def on_policy(run, units, reference):
    author = rollouts.Author(run.reward, run.tokenizer, run.config, run.options)
    return rollouts.OnPolicy(run.recipe.loss, run.hyper, units, reference, author, run.config,
                             run.options)


# --- the table ----------------------------------------------------------------------------------

def token_nll_loss(logps):
    """-log pi(y|x); its mean is over the TOKENS of the batch.   (B,)

    Paper: Ouyang et al. 2022, arXiv 2203.02155 (the SFT stage before alignment)
    Idea: imitate good responses.
    A mean of per-response means would weigh each token of a short response more, and teach brevity.
    """
    return -logps


token_nll_loss.mean_over = "tokens"


def good_nll_loss(logps, lengths, desirable):
    """-log pi(y|x) / n where desirable, 0 where not; n tokens in y.   (B,)

    The SFT term of a sum such as "kto + 0.1*sft": one number per response, as in the other terms.
    """
    return torch.where(desirable, -logps / lengths, torch.zeros_like(logps))


@dataclass(frozen=True)
class Recipe:
    loss: Callable
    prepare: Callable = None               # after `units_for_loss`: (units, run) -> units
    stage_units: Callable = the_data       # (run, units, stage) -> the units of one stage
    reference: Callable = frozen           # (run, units, stage) -> objective.Reference or None
    learner: Callable = language_model     # run -> the module that is trained
    objective: Callable = preferences      # (run, units, reference) -> objective.Objective
    flags: dict = field(default_factory=dict)
    like: str = ""                         # the loss whose settings it takes in the embedded world
    feedback: str = ""                     # pairs, thumbs, sessions (their turns), replies, prompts
    paper: str = ""
    idea: str = ""

    @property
    def wants(self):
        return signature(self.loss)[0]

    @property
    def online(self):
        """True if the policy writes the responses and a reward judges them."""
        return self.feedback == "prompts"

    @property
    def paired(self):
        return is_paired(self.wants)

    @property
    def learns_from(self):
        return self.feedback or ("pairs" if self.paired else "thumbs")


LOSSES = {"sft": token_nll_loss, **kto.LOSSES, "offline_ppo": ppo.offline_ppo_loss,
          **{name: loss for name, loss in dpo_variants.LOSSES.items() if name != "sft"}}
DPO = dpo_variants.dpo_loss


class Sum:
    """"dpo + 0.1*sft" as one loss: its measured names are the union of its terms'.

    A setting that several terms have, such as beta, is one flag for all of them. If their defaults
    differ, its default is None: without the flag each term keeps its own.
    """

    def __init__(self, text):
        self.__doc__ = self.__name__ = text
        self.terms = []                                      # (weight, loss, wants, defaults)
        self.names = []
        self.wants, self.defaults = [], {}
        terms = [self.split(term.strip()) for term in text.split("+")]
        unpaired = any(name not in dpo_variants.LOSSES for _, name in terms)
        sft = good_nll_loss if unpaired else dpo_variants.sft_loss
        for weight, name in terms:
            self.add(weight, name, {**LOSSES, "sft": sft})   # in a sum, SFT is per example
        if len({is_paired(names) for _, _, names, _ in self.terms}) > 1:
            raise SystemExit(f"--loss {text}: a paired and an unpaired loss cannot be summed")

    def split(self, term):
        """"0.1*sft" -> ("0.1", "sft")"""
        weight, _, name = [part.strip() for part in term.rpartition("*")]
        known = name in LOSSES and re.fullmatch(r"|[\d.]+(e[+-]?\d+)?", weight)
        if not known:
            raise SystemExit(f"--loss {self.__name__}: {term!r} is not NAME or NUMBER*NAME; names "
                             f"are {', '.join(LOSSES)}")
        return weight, name

    def add(self, weight, name, losses):
        loss = losses[name]
        if hasattr(loss, "needs_whole_batch") or "target_logps" in signature(loss)[0]:
            raise SystemExit(f"--loss {self.__name__}: {name} cannot be summed")
        wants, defaults = signature(loss)
        self.names.append(name)
        self.terms.append((float(weight or 1), loss, wants, defaults))
        self.wants += [want for want in wants if want not in self.wants]
        for key, value in defaults.items():
            agree = self.defaults.get(key, value) == value
            self.defaults[key] = value if agree else None

    def __call__(self, **given):
        total = 0.0
        for weight, loss, wants, defaults in self.terms:
            own = {key: default if given[key] is None else given[key]
                   for key, default in defaults.items()}
            total = total + weight * loss(**{want: given[want] for want in wants}, **own)
        return total

HUMANLINE = {"log_eps_p": -1.0, "log_eps_r": 1.5, "ref_every": 1}
HUMANLINE_PAPER = ("Liu et al. 2025, Humanline: Online Alignment as Perceptual Loss, "
                   "arXiv 2509.24207; HALOs, train/trainers.py")
HUMANLINE_IDEA = ("each token's log-ratio is clamped to [log_eps_p, log_eps_r]; every ref_every "
                  "steps the reference becomes the policy, as it was before the last update")

RECIPES = {
    "ld_dpo": Recipe(
        DPO, prepare=tail_counts_less, flags={"ld_alpha": 0.5}, like="dpo",
        paper="Liu et al. 2024, Length Desensitization in Direct Preference Optimization, "
              "arXiv 2409.06411",
        idea="the longer response's tokens beyond the shorter one's length weigh ld_alpha"),
    "tr_dpo": Recipe(
        DPO, reference=moving, flags={"ref_mix": 0.6, "ref_every": 512}, like="dpo",
        paper="Gorbatovski et al. 2024, Learn Your Reference Model for Real Good Alignment, "
              "arXiv 2404.09656",
        idea="every ref_every steps the reference becomes "
             "ref_mix * policy + (1 - ref_mix) * reference"),
    "sdpo_stepwise": Recipe(
        DPO, stage_units=easy_first, flags={"stages": 2}, like="dpo",
        paper="Kim et al. 2024, sDPO: Don't Use Your Data All at Once, arXiv 2403.19270",
        idea="the pairs in chunks, easy ones first; a chunk's reference is the policy after the "
             "chunk before"),
    "sdpo_segment": Recipe(
        DPO, feedback="sessions", like="dpo",
        paper="Kong et al. 2025, SDPO: Segment-Level DPO for Social Agents, arXiv 2501.01821",
        idea="in each of two conversations only the agent's turns of one segment count, as many "
             "in both"),
    "spin": Recipe(
        DPO, prepare=good_ones, stage_units=self_play, flags={"stages": 3}, feedback="replies",
        like="dpo",
        paper="Chen et al. 2024, Self-Play Fine-Tuning Converts Weak Language Models to Strong "
              "Language Models, arXiv 2401.01335",
        idea="the rejected response is written by the last stage's policy, so that imitation goes "
             "on where SFT ends"),
    "dpo_reference_free": Recipe(
        DPO, reference=nothing, like="dpo",
        paper="Rafailov et al. 2023, arXiv 2305.18290, with a uniform reference",
        idea="the reference's log-probs are 0: nothing holds the policy where it started"),
    "slic": Recipe(
        dpo_variants.slic_loss, prepare=require_target, stage_units=with_target,
        flags={"slic_target": "sample"}, like="slic"),
    "xpo": Recipe(
        dpo_variants.xpo_loss, prepare=require_target, stage_units=with_target,
        flags={"slic_target": "sample"}, like="xpo"),
    "mpo": Recipe(
        Sum("0.8*dpo + 0.2*bco_pair + sft"), like="dpo",
        paper="Wang et al. 2024, Enhancing the Reasoning Ability of Multimodal LLMs via Mixed "
              "Preference Optimization, arXiv 2411.10442 (weights: InternVL's training scripts)",
        idea="which response is better, how good each is by itself, and imitation of the good one: "
             "three losses in one sum"),
    "rm": Recipe(
        ppo.reward_model_loss, prepare=last_tokens, learner=reward_model, reference=nothing,
        feedback="pairs", like="rm",
        paper="Ouyang et al. 2022, Training language models to follow instructions with human "
              "feedback, arXiv 2203.02155",
        idea="fit a reward under which the annotator's choices are likeliest; PPO uses it as its "
             "judge"),
    "ppo": Recipe(
        ppo.actor_critic_loss, learner=actor_and_critic,
        objective=on_policy, feedback="prompts", like="ppo",
        flags={"reward": "", "group": 1, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95,
               "ppo_epochs": 4, "minibatches": 4, "target_kl": 0.0},
        paper="Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347",
        idea="the policy writes, a reward judges, and a clipped step makes the better tokens "
             "likelier"),
    "humanline_kto": Recipe(
        kto.kto_loss, reference=following, objective=humanline, flags=HUMANLINE, like="kto",
        paper=HUMANLINE_PAPER, idea=HUMANLINE_IDEA),
    "humanline_dpo": Recipe(
        DPO, reference=following, objective=humanline, flags=HUMANLINE, like="dpo",
        paper=HUMANLINE_PAPER, idea=HUMANLINE_IDEA),
}

FLAGS = {                                                # what --help says of a recipe's own flags
    "z0": "estimate, zero, on_policy, or a number of nats",
    "ld_alpha": "weight of the tokens beyond the shorter response's length",
    "ref_mix": "share of the policy in the next reference",
    "ref_every": "steps from one move of the reference to the next",
    "log_eps_p": "a token's log-ratio is at least this",
    "log_eps_r": "a token's log-ratio is at most this",
    "stages": "how often --steps are run; each stage starts from the last one's policy",
    "slic_target": "what is imitated: sample (of the reference), chosen, data (column target)",
    "reward": "the judge: a reward model's folder, file.py:function; on the world `world`",
    "group": "responses to each prompt",
    "kl_coef": "penalty for each nat of KL, in units of reward",
    "gamma": "discount of rewards, per token",
    "lam": "lambda of generalised advantage estimation",
    "ppo_epochs": "passes over the responses of a step",
    "minibatches": "updates in a pass",
    "target_kl": "no further pass once the policy has moved so many nats per token; 0: never",
}

# No critic. Losses that name old_token_logps may take several updates on the same responses.
ONE_UPDATE = {"reward": "", "group": 8, "kl_coef": 0.0}
UPDATES = {"ppo_epochs": 1, "minibatches": 1, "target_kl": 0.0}
for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce", "humanline_grpo"):
    loss = ppo.LOSSES[name]
    wants, hyper = signature(loss)
    flags = ONE_UPDATE | (UPDATES if "old_token_logps" in wants else {})
    RECIPES[name] = Recipe(loss, objective=on_policy, feedback="prompts", like=name,
                           flags={key: flags[key] for key in flags if key not in hyper})


def online(recipe, name):
    """--online: the same loss on responses that the policy writes and a reward judges."""
    if recipe.online:                                        # PPO and its relatives always are
        return recipe
    learns = recipe.paired or "desirable" in recipe.wants
    plain = (recipe.prepare in (None, require_target) and not recipe.feedback
             and recipe.stage_units in (the_data, with_target)
             and recipe.learner is language_model and not hasattr(recipe.loss, "needs_whole_batch"))
    if not learns or not plain:
        raise SystemExit(f"--online: not with --loss {name}, which says itself where its responses "
                         "come from, or learns from no comparison")
    flags = {key: value for key, value in recipe.flags.items() if key != "slic_target"}
    flags |= {"reward": "", "group": 8, "ppo_epochs": 1}
    return replace(recipe, prepare=None, stage_units=the_data, feedback="prompts", flags=flags)


def find(name):
    """The recipe of a loss, of a recipe, or of a sum such as "dpo + 0.1*sft"."""
    if name in RECIPES:
        return RECIPES[name]
    if name in LOSSES:
        return Recipe(LOSSES[name], like=name)
    if "+" in name or "*" in name:
        loss = Sum(name)
        return Recipe(loss, like=loss.names[0])
    known = sorted({*LOSSES, *RECIPES})
    longer = [other for other in known if other.startswith(name.lower())]
    near = (longer or get_close_matches(name.lower(), known, 1, cutoff=0))[0]
    raise SystemExit(f"--loss {name}: no such loss; nearest: {near}; valid are {', '.join(known)}, "
                     'or a sum such as "dpo + 0.1*sft"')

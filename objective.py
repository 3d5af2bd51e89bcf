"""What a loss is told, and what it is compared with.

A loss is a plain function. The names before its `*` are MEASURED, those after it are settings:

    def kto_loss(logratios, desirable, kl_logratios, *, beta=0.1, lambda_d=1.0, lambda_u=1.0)

This file has every measured name once: a small function under `@measured(names)`, which also says
what measuring it needs. A new quantity is one entry. For example, after this one any loss may name
`chosen_entropy`. The loss gets its sum over the response, (b,):

    @measured("chosen_entropy", "rejected_entropy", scope="position")
    def position_entropy(logits, targets, ref_logits):
        '''Entropy of each next-token distribution, nats, with gradient.   (m, V) -> (m,)'''
        logps = wide_log_softmax(logits)
        return -(logps.exp() * logps).sum(-1)

Words.
    row    one sequence, prompt and response (data.Row); its mask says which tokens count
    unit   the rows of one example: (y,), (y, y'), (chosen, rejected) or (chosen, rejected, target).
           y' is the mismatched row: this prompt with another prompt's response, for KTO's z0 (with
           --z0 on_policy or --online: with a response of the policy). The first `trained` rows get
           a gradient, the others are only measured
    batch  the units of one optimiser step, over all processes
    part   some units of a batch: what one forward takes

Two passes. First come the quantities that need the whole batch (z0, a running mean): they are
measured without gradient. Then the units are measured part by part, with gradient. Therefore any
split of a batch into parts gives the same step.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

import data
from model import wide_log_softmax
from plumbing import metrics, parallel


# --- the registry of measured names -------------------------------------------------------------

class Quantity(NamedTuple):
    compute: Callable
    row: int               # which row of a unit is measured: 0 chosen, 1 rejected, 2 target
    scope: str             # example, position, batch or token: see below
    needs: tuple           # "reference": the reference's log-probs. "distributions": its model, at
                           # every step. "partners": mismatched rows. "author": responses written
                           # by the policy, with their rewards
    zero: bool             # is it 0 where policy and reference are equal?


MEASURED = {}


def measured(*names, scope="example", needs=(), zero=False):
    """Register a function under its names. The k-th name in the list is for a unit's k-th row.

    scope     the function                        gives
    example   f(part, row)                        (b,)  one number per unit of the part
    position  f(logits, targets, ref_logits)      (m,)  per token; summed over the response
    batch     f(whole, row)                       any   once per step, without gradient
    token     rollouts.OnPolicy measures it       (m,)  per token that the policy wrote
    """
    def register(compute):
        for row, name in enumerate(names):
            MEASURED[name] = Quantity(compute, row, scope, tuple(needs), zero)
        return compute
    return register


# --- one number per example: part is a Part -----------------------------------------------------

@measured("chosen_logps", "rejected_logps", "target_logps")
@measured("logps")
@measured("chosen_rewards", "rejected_rewards")
def log_prob(part, row):
    """log pi(y|x), a masked sum over the response; for a reward model the reward.   (b,)"""
    return part.logps[:, row]


@measured("ref_chosen_logps", "ref_rejected_logps", needs=["reference"])
def ref_log_prob(part, row):
    """log pi_ref(y|x), never with a gradient.   (b,)"""
    return part.ref_logps[:, row]


@measured("old_chosen_logps", "old_rejected_logps", needs=["reference"])
def old_log_prob(part, row):
    """log pi_old(y|x), no gradient. With --online pi_old is the policy that wrote y.   (b,)

    A file does not say who wrote its responses: for them pi_old is the reference.
    """
    old_logps = part.ref_logps if part.old_logps is None else part.old_logps
    return old_logps[:, row]


@measured("chosen_logratios", "rejected_logratios", needs=["reference"], zero=True)
@measured("logratios", needs=["reference"], zero=True)
def log_ratio(part, row):
    """log pi(y|x) - log pi_ref(y|x).   (b,)"""
    return part.logps[:, row] - part.ref_logps[:, row]


@measured("chosen_len", "rejected_len")
@measured("lengths")
def response_length(part, row):
    """Response tokens that count, end-of-text included.   (b,)"""
    return part.column(unit[row].length for unit in part.units)


@measured("chosen_win_prob", "rejected_win_prob")
def win_probability(part, row):
    """The response's mean win probability: from the data, or in its group (--online).   (b,)"""
    return part.column(unit[row].win_prob for unit in part.units)


@measured("score_gap")
def score_gap(part, row):
    """Score of chosen minus score of rejected, from the data; --online: their rewards.   (b,)

    1 where the example's weight is 0 (an online tie), because ODPO takes the logarithm.
    """
    gaps = [unit[0].score - unit[1].score for unit in part.units]
    return torch.where(part["weight"] > 0, part.column(gaps), 1.0)


@measured("desirable")
@measured("preferred")
def thumb(part, row):
    """desirable: thumb up. preferred: the unit's first response is the preferred one.   (b,)"""
    return part.column((unit[0].desirable for unit in part.units), torch.bool)


@measured("weight")
def example_weight(part, row):
    """What the example's loss is multiplied by: a file's `weight`; 0 for an online tie.   (b,)"""
    return part.column(unit[row].weight for unit in part.units)


@measured("chosen_weight", "rejected_weight")
def confidence_weight(part, row):
    """WPO: exp(mean over the response of log p(y_t) - log sum_v p(v)^2), no gradient.   (b,)"""
    return (part.position_sums[position_confidence][:, row] / response_length(part, row)).exp()


# --- one number per token, from whole next-token distributions; summed over the response --------

@measured("chosen_kl", "rejected_kl", scope="position", needs=["reference", "distributions"],
          zero=True)
def position_kl(logits, targets, ref_logits):
    """KL(pi_ref(.|s_t) || pi(.|s_t)), nats.   (m, V), (m,), (m, V) -> (m,)"""
    ref_logps = wide_log_softmax(ref_logits.detach())        # log-probs, so that 0 log 0 is 0
    return (ref_logps.exp() * (ref_logps - wide_log_softmax(logits))).sum(-1)


def position_confidence(logits, targets, ref_logits):
    """log p(y_t) - log sum_v p(v)^2, no gradient. On own samples its exp is 1 on average."""
    logps = wide_log_softmax(logits.detach())
    return logps.gather(-1, targets[:, None])[:, 0] - torch.logsumexp(2 * logps, -1)


# --- once per step, over the whole batch, without gradient: whole is a Whole --------------------

@measured("kl_logratios", scope="batch", needs=["reference", "partners"], zero=True)
def mismatched_log_ratios(whole, row):
    """log pi(y'|x) - log pi_ref(y'|x) of every mismatched row.   (M,)"""
    return whole.partner_logps - whole.ref_logps[:, whole.trained]


@measured("kl_logps", scope="batch", needs=["partners"])
def mismatched_log_probs(whole, row):
    """log pi(y'|x) of every mismatched row.   (M,)"""
    return whole.partner_logps


@measured("entropy", scope="batch", needs=["partners"])
def entropy_estimate(whole, row):
    """-mean log pi(y'|x): the estimate of H(pi) that KTO's authors use.   ()"""
    return -whole.partner_logps.mean()


@measured("reward_shift", scope="batch", needs=["reference"], zero=True)
def mean_reward_so_far(whole, row):
    """BCO: mean of beta * log-ratio over all samples seen so far, this batch included.   ()"""
    running = whole.running
    rewards = whole.hyper["beta"] * whole.log_ratios
    running["reward_sum"] = running.get("reward_sum", 0.0) + float(rewards.sum())
    running["reward_count"] = running.get("reward_count", 0.0) + rewards.numel()
    return torch.tensor(running["reward_sum"] / running["reward_count"], dtype=torch.float64)


@measured("batch_margin_mean", scope="batch", needs=["reference"], zero=True)
def batch_margin(whole, row):
    """beta-DPO: mean of chosen minus rejected log-ratio over the batch.   ()"""
    return (whole.log_ratios[:, 0] - whole.log_ratios[:, 1]).mean()


@measured("margin_mean", scope="batch", needs=["reference"], zero=True)
def running_margin(whole, row):
    """beta-DPO: moving average of batch_margin_mean; starts at 0, updated before its use.   ()"""
    before = whole.running.get("margin_mean", 0.0)
    whole.running["margin_mean"] = 0.9 * before + 0.1 * float(batch_margin(whole, row))
    return torch.tensor(whole.running["margin_mean"], dtype=torch.float64)


# --- one number per token that the policy wrote -------------------------------------------------

@measured("token_logps", "old_token_logps", "ref_token_logps",       # under pi, pi_old, reference
          "advantages", "values", "old_values", "returns",           # with a critic: ppo.gae
          "group_advantages", "centred_advantages",                  # one per response, repeated
          "loo_advantages", "batch_advantages",                      # on its tokens: see ppo.py
          "response", "response_len",              # the token's response, 0 to b - 1; its length
          scope="token", needs=["reference", "author"])
def token_quantity(measured_tokens, row):
    """What PPO, GRPO and their relatives are told; rollouts.py measures it."""
    raise LookupError("token quantities are measured by rollouts.OnPolicy, not by this objective")


# --- from a signature to what must be measured --------------------------------------------------

def signature(loss):
    """(measured names, {setting: default}) of a loss: what stands before its * and what after."""
    if hasattr(loss, "wants"):                               # a sum of losses (recipes.py)
        return loss.wants, loss.defaults
    wants, defaults = [], {}
    for p in inspect.signature(loss).parameters.values():
        if p.kind == p.KEYWORD_ONLY:
            if p.default is p.empty:
                raise SystemExit(f"{loss.__name__}: its setting {p.name!r} needs a default")
            defaults[p.name] = p.default
        else:
            wants.append(p.name)
    for name in wants:
        if name not in MEASURED:
            near = difflib.get_close_matches(name, MEASURED, 1, cutoff=0)[0]
            raise SystemExit(f"{loss.__name__} asks for {name!r}, which is not measured; nearest: "
                             f"{near}; known: {', '.join(MEASURED)}")
    return wants, defaults


def needs(wants, given=()):
    """What measuring these names needs, as a set; a name that is `given` needs nothing."""
    return {need for name in wants if name not in given for need in MEASURED[name].needs}


def is_paired(wants):
    return any(name.startswith(("chosen_", "rejected_")) for name in wants)


def divisor(loss, units):
    """What a step divides the summed losses by: the number of its units, or of its tokens.

    Tokens, if the loss says so: `token_nll_loss.mean_over = "tokens"`.
    """
    if getattr(loss, "mean_over", "units") == "tokens":
        return sum(unit[0].length for unit in units)
    return len(units)


# --- log-probs of units -------------------------------------------------------------------------

def logps(policy, units, extra=None):
    """log pi(y|x) of every row of every unit, with gradient.   (b, rows per unit)

    extra: a function that gives k more numbers per position (model.Policy.forward). Their sums
    follow log pi in the result: (1 + k, b, rows).
    """
    rows = [row for unit in units for row in unit]
    device = next(policy.parameters()).device
    flat = data.flatten(rows, device, policy.shares_prompts)
    with parallel.precision(getattr(policy, "precision", ""), device):
        per_token = policy(*flat[:5], extra)                 # ids, positions, lengths, ...
    if extra is None:
        return flat.sums(per_token).unflatten(-1, (len(units), -1))
    sums = torch.stack([flat.sums(values) for values in per_token])
    return sums.unflatten(-1, (len(units), -1))


@torch.no_grad()
def score(policy, units, what=""):
    """`logps` without gradient. The processes share the work; each gets the whole result.

    -> (len(units), rows per unit) float64 on the CPU. what: the title of a progress bar.
    """
    table = torch.zeros(len(units), len(units[0]), dtype=torch.float64)
    progress = parallel.bar(len(units), what) if what else None
    for part, weight in parallel.deal(units, policy.token_budget):
        found = logps(policy, [units[i] for i in part]).cpu().double()
        if weight:
            table[part] = found
        if progress is not None:
            progress.update(len(part) * parallel.size)
    if progress is not None:
        progress.close()
    if parallel.sharded(policy):                             # no backward will free its weights
        policy.reshard()
    return parallel.total(table)


# --- compared with what? ------------------------------------------------------------------------

@dataclass
class Reference:
    """log pi_ref of a batch: from a `table` that was measured once, or from a `model`, every time.

    Without either, log pi_ref is 0: no reference at all. With `mix` and `every` the reference
    moves (TR-DPO). With `lags` it moves to the weights that the policy had one update ago
    (humanline); HALOs moves it between gradient and update, with the same effect. If it moved
    after the update, it would equal the policy at the next step: all log-ratios 0, nothing to
    clamp.
    """
    table: torch.Tensor = None       # (units of the data set, rows per unit) float64
    model: object = None             # for losses that look at whole distributions, too
    mix: float = 0.0
    every: int = 0
    lags: bool = False
    before: list = None              # the policy's weights as the step began, if it lags

    def logps(self, indices, units, policy=None):
        """log pi_ref of `units`; `indices` are their places in the data.   (B, rows per unit)"""
        if self.lags:
            if parallel.sharded(policy):                     # no backward has freed its weights
                policy.reshard()
            self.before = [p.detach().clone() for p in policy.parameters()]
        if self.table is not None:
            return self.table[indices]
        if self.model is None:
            return torch.zeros(len(units), len(units[0]), dtype=torch.float64)
        return score(self.model, units)

    def follow(self, policy, step):
        """Every so many steps the reference becomes mix * policy + (1 - mix) * reference."""
        if self.every and (step + 1) % self.every == 0:
            source = self.before or policy.parameters()
            for mine, theirs in zip(self.model.parameters(), source):
                mine.data.lerp_(theirs.data, self.mix)


# --- batches ------------------------------------------------------------------------------------

@dataclass
class Batch:
    units: list                      # of the whole batch, all processes'
    n: int                           # what the loss is a mean over: units, or tokens
    known: dict                      # quantities of the whole batch, by name, no gradient
    ref_logps: torch.Tensor = None   # (units, rows per unit)
    old_logps: torch.Tensor = None   # the same, of the policy that wrote the responses
    part_size: int = 0               # units per part, if the loss demands a number; 0: any


@dataclass
class Whole:
    """A batch before its first backward, for quantities that need all its rows; no gradient."""
    policy: object
    units: list
    ref_logps: torch.Tensor          # (B, rows per unit), None where the loss needs none
    trained: int
    hyper: dict
    running: dict

    @cached_property
    def log_ratios(self):
        """log pi(y|x) - log pi_ref(y|x) of the trained rows.   (B, trained)"""
        own = score(self.policy, [unit[:self.trained] for unit in self.units])
        return own - self.ref_logps[:, :self.trained]

    @cached_property
    def partner_logps(self):
        """log pi(y'|x).   (B,)"""
        return score(self.policy, [unit[self.trained:] for unit in self.units])[:, 0]


@dataclass
class Part:
    """Some units of a batch, measured. part["chosen_logps"] is measured as the registry says."""
    units: list
    logps: torch.Tensor              # (b, trained), with gradient
    ref_logps: torch.Tensor          # (b, trained), or None
    position_sums: dict              # position function -> (b, trained)
    known: dict                      # what was measured over the whole batch
    old_logps: torch.Tensor = None   # (b, trained), or None

    def __getitem__(self, name):
        if name in self.known:
            return as_like(self.known[name], self.logps)
        quantity = MEASURED[name]
        if quantity.scope == "position":
            return self.position_sums[quantity.compute][:, quantity.row]
        return quantity.compute(self, quantity.row)

    def column(self, values, dtype=None):
        values = torch.tensor(list(values), dtype=dtype or self.logps.dtype)
        return values.to(self.logps.device)


def as_like(tensor, other):
    """First the type, then the device: Apple's GPUs have no float64."""
    return tensor.to(other.dtype).to(other.device)


def same_policy(policy):
    return policy


# --- objectives ---------------------------------------------------------------------------------

class Objective:
    """What the training loop calls. Two classes extend it: Preferences and rollouts.OnPolicy.

    Both define batches(policy, step), measure(policy, batch, part), and for the log
    watch(measured, losses), report(sums, batch), tokens(batch), first_look(policy).
    """

    def __init__(self, loss, hyper, reference):
        self.loss = loss
        self.hyper = hyper                                   # its settings
        self.wants = signature(loss)[0]                      # its measured names
        self.reference = reference
        self.running = {}                                    # running means, kept by checkpoints

    def losses(self, measured):
        """The loss on what was measured, one number per example.   (b,)"""
        return self.loss(**{name: measured[name] for name in self.wants}, **self.hyper)


class Preferences(Objective):
    """KTO, DPO and their relatives, SFT, reward models: responses that somebody has judged."""

    def __init__(self, loss, hyper, units, reference, *, batch_size, seed, trained, given=None,
                 author=None, passes=1, through=None):
        """given: {measured name: tensor}, set by a flag instead of measured (a fixed z0).

        author(policy, units, step) -> (units, stats): writes new responses at every step; stats
        go to the log. None: the data's own responses. passes: updates on each batch.
        through(policy): the model that is measured instead of the policy (humanline).
        """
        super().__init__(loss, hyper, reference)
        self.units = units
        self.batch_size = batch_size
        self.seed = seed
        self.trained = trained
        self.given = given or {}
        self.author = author
        self.passes = passes
        self.through = through or same_policy
        self.stats = {}                                      # the author's, for the log
        found = {name: MEASURED[name] for name in self.wants if name not in self.given}
        self.over_batch = [name for name, q in found.items() if q.scope == "batch"]
        self.zero_at_equal = [name for name, q in found.items() if q.zero]
        positions = [q.compute for q in found.values() if q.scope == "position"]
        self.over_positions = list(dict.fromkeys(positions))             # each once, in order
        if any(q.compute is confidence_weight for q in found.values()):
            self.over_positions.append(position_confidence)

    # --- the batch of a step, with the quantities of the whole batch

    def batches(self, policy, step):
        """The one batch of this step: a function of (data, seed, step)."""
        indices = data.batch_rows(len(self.units), self.batch_size, seed=self.seed, step=step)
        units = [self.units[i] for i in indices]
        if self.author:
            units, self.stats = self.author(policy, units, step)
        ref_logps = old_logps = None
        if self.reference is not None:
            ref_logps = self.reference.logps(indices, units, policy)
        if self.author and "old_chosen_logps" in self.wants:
            old_logps = score(policy, units)
        seen = self.through(policy)
        whole = Whole(seen, units, ref_logps, self.trained, self.hyper, self.running)
        known = dict(self.given)
        for name in self.over_batch:
            known[name] = MEASURED[name].compute(whole, MEASURED[name].row)
        part_size = 0
        if getattr(self.loss, "needs_whole_batch", False):   # it sorts its rows
            part_size = len(units)
        n = divisor(self.loss, units)
        for _ in range(self.passes):
            yield Batch(units, n, known, ref_logps, old_logps, part_size)

    # --- a part of it, with gradient

    def losses(self, measured):
        """The loss of each example times its weight.   (b,)"""
        return measured["weight"] * super().losses(measured)

    def measure(self, policy, batch, part):
        units = [batch.units[i][:self.trained] for i in part]
        policy = self.through(policy)
        position_sums = {}
        if self.over_positions:
            own, *sums = logps(policy, units, self.extra(units))
            position_sums = dict(zip(self.over_positions, sums))
        else:
            own = logps(policy, units)
        tables = []
        for table in (batch.ref_logps, batch.old_logps):
            if table is not None:
                table = as_like(table[part, :self.trained], own)
            tables.append(table)
        return Part(units, own, tables[0], position_sums, batch.known, tables[1])

    def extra(self, units):
        """A function for model.Policy.forward: what to measure at every position.

        Only the reference's hidden states are kept. Its logits are made chunk by chunk, so that
        no (M, V) tensor is ever in memory.
        """
        model = None
        if "distributions" in needs(self.wants):
            model = self.reference.model
            rows = [row for unit in units for row in unit]
            device = next(model.parameters()).device
            flat = data.flatten(rows, device, model.shares_prompts)
            with torch.no_grad(), parallel.precision(getattr(model, "precision", ""), device):
                hidden = model.hidden(flat.ids, flat.positions, flat.lengths, flat.predict)

        def extra(logits, targets, chunk):
            ref_logits = None
            if model is not None:
                with torch.no_grad():
                    ref_logits = model.head(hidden[chunk])
            return torch.stack([f(logits, targets, ref_logits) for f in self.over_positions])
        return extra

    # ------------------------------------------------ diagnostics: what the log says of a step
    watch = metrics.watch
    report = metrics.report
    tokens = metrics.tokens
    first_look = metrics.first_look


if __name__ == "__main__":                       # a lesson: python objective.py
    import objective                             # `measured` filled its registry, not __main__'s
    import recipes
    from plumbing import lessons

    told = lessons.comparison(torch.tensor(0.7), "A")
    groups = []                                  # names on one line: chosen, rejected, target
    for name, quantity in objective.MEASURED.items():
        if quantity.row == 0:
            groups.append([])
        groups[-1].append(name)
    print("The policy says A with .67 and B with .33, the reference with .50 each. A won.")
    print("A loss gets what its signature names, and nothing else:\n")
    print(f"{'name':43}{'is told':20}named by")
    for names in groups:
        scope = objective.MEASURED[names[0]].scope
        if scope in ("example", "position"):
            values = ", ".join(f"{float(told[name]):+.2f}" for name in names)
        else:
            values = f"one per {'step' if scope == 'batch' else 'token'}"
        users = [loss for loss in {**recipes.LOSSES, **recipes.RECIPES}
                 if set(names) & set(recipes.find(loss).wants)]
        by = f"{users[0]} + {len(users) - 1} more" if users[1:] else "".join(users)
        print(f"{', '.join(names)[:42]:43}{values:20}{by}")
    found = recipes.DPO(*(told[name] for name in objective.signature(recipes.DPO)[0]))
    print(f"""
def dpo_loss{inspect.signature(recipes.DPO)}
is told {told["chosen_logratios"].item():+.4f} and {told["rejected_logratios"].item():+.4f}: \
a margin of 0.70 nats, so the loss is {found.item():.4f}""")

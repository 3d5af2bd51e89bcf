"""The metrics of a step on preferences, and the self-check of step 0.

Every metric is a sum divided by a count, both taken over all parts and processes. So it does not
depend on how the batch is split. These functions are methods of objective.Preferences.
"""

import torch

import kto
from plumbing import parallel


def watch(self, part, losses):
    """Sums over these examples, without those of weight 0.   -> {name: tensor ()}"""
    own = part.logps.detach()[:, :2]                         # without SLiC's third response
    thumbs = [row.desirable for unit in part.units for row in unit[:2]]
    up = torch.tensor(thumbs, device=own.device).view_as(own)          # (b, rows)
    counts = (part["weight"] > 0).to(own.dtype)                        # (b,)
    good = counts[:, None] * up
    bad = counts[:, None] - good
    sums = {"loss": losses.detach().sum().to(own.dtype), "units": counts.sum(),
            "good": good.sum(), "bad": bad.sum(),
            "logps/chosen": (good * own).sum(), "logps/rejected": (bad * own).sum()}
    if part.ref_logps is None:
        return sums
    ratios = own - part.ref_logps[:, :2]
    beta = self.hyper.get("beta") or 1.0
    if ratios.shape[1] > 1:
        margin = torch.where(up[:, 0], ratios[:, 0] - ratios[:, 1], ratios[:, 1] - ratios[:, 0])
        # A margin of 0 up to rounding, as before the first step, counts as half right.
        right = torch.where(margin.abs() < 1e-9, 0.5, (margin > 0).to(own.dtype))
    else:
        z0 = 0.0
        if "kl_logratios" in part.known:
            z0 = float(kto.reference_point(part.known["kl_logratios"]))
        right = torch.where(up, ratios > z0, ratios < z0)[:, 0]
    return sums | {"rewards/chosen": beta * (good * ratios).sum(),
                   "rewards/rejected": beta * (bad * ratios).sum(),
                   "rewards/accuracies": (counts * right).sum()}


def report(self, sums, batch):
    """The metrics of a step. A class without examples in the batch gives None, never NaN."""
    def mean(name, count):
        return sums[name] / sums[count] if sums[count] else None

    line = {"loss": sums["loss"] / batch.n,
            "logps/chosen": mean("logps/chosen", "good"),
            "logps/rejected": mean("logps/rejected", "bad")}
    line |= self.stats                                       # about responses of this step
    if "kl_logratios" in batch.known:
        ratios = batch.known["kl_logratios"]
        line["z0"] = float(kto.reference_point(ratios))
        line["z0_raw"] = float(ratios.sum()) / max(1, len(ratios))
    if "rewards/chosen" in sums:
        good = mean("rewards/chosen", "good")
        bad = mean("rewards/rejected", "bad")
        margin = None if good is None or bad is None else good - bad
        line |= {"rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": margin,
                 "rewards/accuracies": mean("rewards/accuracies", "units")}
    return line


def tokens(self, batch):
    """Tokens that the step trains on: prompts and responses."""
    return sum(len(row.ids) for unit in batch.units for row in unit[:self.trained])


@torch.no_grad()
def first_look(self, policy, micro_batch_size=0):
    """(loss, what it must be at equal weights, largest |log-ratio|) of the first batch.

    The second number is the same loss, but every quantity that is 0 at equal weights (`zero` in
    the registry) is set to 0 before.
    """
    before = dict(self.running)
    batch = next(self.batches(policy, 0))
    self.running.clear()                                     # as before: step 0 will count it
    self.running.update(before)
    loss = expected = largest = 0.0
    if "kl_logratios" in self.over_batch:
        largest = float(batch.known["kl_logratios"].abs().max())
    with parallel.alone():                                   # every process measures all of it
        size = batch.part_size or micro_batch_size
        parts = parallel.deal(batch.units, policy.token_budget, size)
    for part, _ in parts:
        found = self.measure(policy, batch, part)
        equal = {name: found[name] for name in [*self.wants, "weight"]}
        for name in self.zero_at_equal:
            equal[name] = torch.zeros_like(equal[name])
        loss += float(self.losses(found).sum())
        expected += float(self.losses(equal).sum())
        if found.ref_logps is not None:
            largest = max(largest, float((found.logps - found.ref_logps).abs().max()))
    return loss / batch.n, expected / batch.n, largest

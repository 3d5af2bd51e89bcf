"""What the log says of a step on preferences, and what step 0 must look like.

Every metric is a sum and a count, summed over parts and processes once, so it is over the whole
batch however that is split. `self` is an objective.Preferences: it takes these as its methods.
"""

import torch

import kto
from plumbing import parallel


def watch(self, part, losses):
    """Sums over these examples, but for those of weight 0.   -> {name: tensor ()}"""
    own = part.logps.detach()[:, :2]                         # SLiC's third response is neither
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
        # Equal but for rounding, as before the first step: half right.
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
    """The metrics of a step. A class that is absent from the batch gives None, never NaN."""
    def mean(name, count):
        return sums[name] / sums[count] if sums[count] else None

    line = {"loss": sums["loss"] / batch.n,
            "logps/chosen": mean("logps/chosen", "good"),
            "logps/rejected": mean("logps/rejected", "bad")}
    line |= self.stats                                       # of responses written at this step
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

    The second number is the loss itself on the same measured numbers, but for those that the
    registry says are 0 where policy and reference are equal: these are set to 0.
    """
    before = dict(self.running)
    batch = next(self.batches(policy, 0))
    self.running.clear()                                     # the step itself will count it
    self.running.update(before)
    loss = expected = largest = 0.0
    if "kl_logratios" in self.over_batch:
        largest = float(batch.known["kl_logratios"].abs().max())
    with parallel.alone():                                   # everybody looks at the whole batch
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

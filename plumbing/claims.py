"""The registry of claims, and the arms that many of them share. See experiments.py."""

from collections.abc import Callable
from typing import NamedTuple

from plumbing.arms import arm
from plumbing.claim_plots import plane

CLAIMS = {}
MATTERS = 0.1                        # points of true utility; a reply has between -4.5 and +3.5
LEASH = 1.5                          # nats: where curves are compared


class Claim(NamedTuple):
    says: str
    source: str
    arms: dict                       # label -> Arm
    panels: tuple                    # functions (ax, runs), or names of numbers: dots of them
    seeds: int
    checks: Callable                 # runs -> list of checks


def claim(says, source, arms={}, panels=(plane,), seeds=12):
    """Register the checks of a claim under their function's name."""
    def register(checks):
        CLAIMS[checks.__name__] = Claim(says, source, arms, panels, seeds, checks)
        return checks
    return register


BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)
KTO_CURVE = {f"kto beta {beta:g}": arm("kto", beta=beta) for beta in BETAS}
DPO_CURVE = {f"dpo beta {beta:g}": arm("dpo", beta=beta) for beta in BETAS}
BETA_ARMS = KTO_CURVE | DPO_CURVE
KTO, DPO = BETA_ARMS["kto beta 0.5"], BETA_ARMS["dpo beta 0.5"]
AUTO = {"lambda_d": "auto", "lambda_u": "auto"}

"""PMQ: 1, 2 or 3 bits for each expert of a layer (MC-MoE, arXiv 2410.06270, section 3.2; MC#, arXiv 2510.10962)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.registry import lookup

WIDTHS = (1, 2, 3)
# alpha of the access frequency, beta of the gate weight, gamma of the loss. The paper's, and what its code computes:
# there gamma is never read and the loss is raised to alpha.
EXPONENTS = {"paper": (1.0, 1.0, 2.0), "code": (1.0, 1.5, 1.0)}
PRESET = -1.0


@dataclass(frozen=True, slots=True)
class PmqParams:
    """Attributes:
    exponents: ``paper`` (1, 1, 2) or ``code`` (1, 1.5, 1), which the authors' program computes.
    alpha: exponent of the access frequency; -1 for that of ``exponents``.
    beta: the same of the gate weight. gamma: the same of the quantization loss.
    """

    exponents: str = "paper"
    alpha: float = PRESET
    beta: float = PRESET
    gamma: float = PRESET

    def __post_init__(self) -> None:
        lookup(self.exponents, EXPONENTS, "set of exponents")
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if value != PRESET and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"{name} is {value:g}", where=f"--set {name}={value:g}", next="use 0 or more")

    @property
    def powers(self) -> tuple[float, float, float]:
        """alpha, beta, gamma."""
        preset = EXPONENTS[self.exponents]
        own = (self.alpha, self.beta, self.gamma)
        return tuple(p if mine == PRESET else mine for mine, p in zip(own, preset, strict=True))  # type: ignore[return-value]

    @property
    def told(self) -> str:
        """The exponents that were used, and both published sets, for people."""
        named = "; ".join(f"{name} {_three(powers)}" for name, powers in EXPONENTS.items())
        return f"exponents {_three(self.powers)} of access, gate weight and loss ({named})"


def _three(powers: tuple[float, float, float]) -> str:
    return ", ".join(f"{power:g}" for power in powers)


def code_bits(experts: int, bits: float) -> int:
    """A layer's budget: bits per weight, one for each expert, rounded half up.

    Raises:
        PlanError: less than 1 bit each with a 2 and a 3 among them, which PMQ always has, or more than 3.
    """
    # half up on the decimal value that the user typed: 2.45 * 10 is 24.500000000000004 in binary
    budget = math.floor(round(experts * bits, 9) + 0.5)
    if experts < 2 or not experts + 3 <= budget or bits > max(WIDTHS):
        raise PlanError(
            f"pmq cannot share {bits:g} bits over {experts} experts: each has 1 to 3 bits, one has 2 and one has 3",
            next=f"use {(experts + 3) / experts:g} to 3 bits" if experts > 1 else "use --allocate lp",
        )
    return budget


def costs(counts: Array, gates: Array, losses: Array, params: PmqParams) -> Array:
    """[E, 3]: (n_i / sum n)^alpha (w_i / sum w)^beta eps_ib^gamma, scaled to a largest of 1.

    Args:
        counts: [E] n, tokens routed to each expert.
        gates: [E] w, over those tokens the sum of the router's probability among all experts, before it is renormalised
            over the chosen ones (the record ``probability_sum``).
        losses: [E, 3] eps at 1, 2, 3 bits: sum over batches of the norm (not squared) of the change of the block's
            output if that expert alone is rounded to nearest.

    Raises:
        PlanError: shapes that differ, or values that are negative or no numbers.
    """
    experts = len(counts)
    if gates.shape != (experts,) or losses.shape != (experts, len(WIDTHS)):
        raise PlanError(f"pmq reads [E], [E] and [E, 3], not {counts.shape}, {gates.shape} and {losses.shape}")
    for name, values in (("access counts", counts), ("gate sums", gates), ("quantization losses", losses)):
        if not np.isfinite(values).all() or (values < 0).any():
            raise PlanError(f"pmq: {name} are not all 0 or more", next="the statistics are damaged; calibrate again")
    alpha, beta, gamma = params.powers
    # shares, so that exponents do not overflow; an idle layer has none
    frequency = counts / max(float(counts.sum()), math.ulp(0.0))
    weight = gates / max(float(gates.sum()), math.ulp(0.0))
    found = (frequency**alpha * weight**beta)[:, None] * (losses / max(float(losses.max()), math.ulp(0.0))) ** gamma
    return np.asarray(found / max(float(found.max()), math.ulp(0.0)))


def pmq(cost: Array, budget: int) -> tuple[int, ...]:
    """Bits of each expert: the least sum of costs with at most ``budget`` bits, at least one 2 and one 3.

    Exact: a dynamic program over (bits used, whether there is a 2, whether there is a 3). Where two choices cost the
    same, the one with fewer bits is taken, and among those the one that gives the last expert fewer bits, then the last
    but one, and so on; an expert that no token reached costs nothing and so gets 1 bit unless it must be the 2 or 3.

    Args:
        cost: [E, 3] of 1, 2, 3 bits. budget: bits of all experts together (``code_bits``).

    Raises:
        PlanError: a budget without room for a 2 and a 3.
    """
    experts = len(cost)
    if experts < 2 or budget < experts + 3:
        raise PlanError(f"{budget} bits cannot hold {experts} experts of which one has 2 bits and one has 3")
    most = min(budget, 3 * experts)
    best = np.full((4, most + 1), np.inf)  # state: 1 if there is a 2, plus 2 if there is a 3
    best[0, 0] = 0.0
    came: list[np.ndarray] = []
    for row in cost:
        after = np.full_like(best, np.inf)
        # from which state, with how many bits: state * 4 + bits
        chosen = np.zeros(best.shape, np.uint8)
        for bits in WIDTHS:
            for state in range(4):
                target = state | (bits - 1)
                trial = best[state, : most + 1 - bits] + row[bits - 1]
                better = trial < after[target, bits:]
                after[target, bits:][better] = trial[better]
                chosen[target, bits:][better] = 4 * state + bits
        best = after
        came.append(chosen)
    used, state = int(best[3].argmin()), 3  # argmin: the first, so the fewest bits
    found: list[int] = []
    for chosen in reversed(came):
        before, bits = divmod(int(chosen[state, used]), 4)
        found.append(bits)
        state, used = before, used - bits
    return tuple(reversed(found))

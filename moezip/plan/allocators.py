"""The ways to share out bits, by the names that users type, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moezip.plan.pmq import PmqParams
from moezip.registry import NoParams


@dataclass(frozen=True, slots=True)
class LpParams:
    """Attributes:
    drops: whole experts may go as well, where that is cheaper than bits.
    """

    drops: bool = True


ALLOCATORS: Mapping[str, type] = {
    "uniform": NoParams,
    "lp": LpParams,
    "pmq": PmqParams,
    "outlier": NoParams,
    "block": NoParams,
}
SUMMARIES = {
    "uniform": "every expert has the same width",
    "lp": "the least predicted rise of the loss over the whole model, dropped experts included",
    "pmq": "1, 2 or 3 bits for each expert of a layer, as MC-MoE and MC# share them",
    "outlier": "more bits for matrices with outliers (QuantMoE-Bench)",
    "block": "more bits for layers that turn the hidden state most (QuantMoE-Bench)",
}
PAPERS = {
    "uniform": "baseline",
    "lp": "integer program over second-order prices (Fisher), no paper",
    "pmq": "MC-MoE, arXiv 2410.06270; MC#, arXiv 2510.10962",
    "outlier": "QuantMoE-Bench, arXiv 2406.08155",
    "block": "QuantMoE-Bench, arXiv 2406.08155",
}

"""Gate sum: the total gate weight that an expert received (baseline)."""

from __future__ import annotations

from collections.abc import Mapping

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams
from moezip.registry import Method


def score(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """Sum of g_{t,i} for every expert of one layer, float64 [E]."""
    return stats["gate_sum"]


GATE_SUM = Method(
    name="gate-sum",
    family="prune",
    summary="total gate weight that the expert received (baseline)",
    paper="baseline in arXiv 2504.06792",
    needs=("gate_sum",),
    params=PruneParams,
    run=score,
)

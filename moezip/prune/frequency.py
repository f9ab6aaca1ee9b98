"""Frequency: how many tokens chose the expert. The oldest baseline; weak where rare experts matter."""

from __future__ import annotations

from collections.abc import Mapping

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams
from moezip.registry import Method


def score(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """n_i for every expert of one layer, float64 [E]."""
    return stats["counts"]


FREQUENCY = Method(
    name="frequency",
    family="prune",
    summary="number of tokens routed to the expert (baseline)",
    paper="baseline in arXiv 2510.13999 and 2504.06792",
    needs=("counts",),
    params=PruneParams,
    run=score,
)

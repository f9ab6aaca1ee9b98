"""Router norm: a data-free baseline of our own, from weights alone.

    score_i = || row i of W_r ||  *  mean over columns j of || D_i[:, j] ||

A long router row wins tokens more easily, long columns of the down projection make each of them count.
"""

from __future__ import annotations

from collections.abc import Mapping

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams
from moezip.registry import Method


def score(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """The product above for every expert of one layer, float64 [E]."""
    return stats["router_row_norm"] * stats["down_column_norm"]


ROUTER_NORM = Method(
    name="router-norm",
    family="prune",
    summary="router row norm x mean down-projection column norm (no data)",
    paper="baseline, no paper",
    needs=(),
    weights=("router_row_norm", "down_column_norm"),
    params=PruneParams,
    run=score,
)

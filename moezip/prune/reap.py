"""REAP (arXiv 2510.13999, ICLR 2026).

    S_i = mean over tokens routed to i of  g_{t,i} * ||f_i(x_t)||

A mean: how often an expert is used does not count, only how much it adds when it is. The gate weight is the one that
really multiplies the output, taken from the model (the authors' observer derives it again from the logits, which is
wrong for sigmoid routers). An expert that no token reached scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams
from moezip.prune.ratios import per_token
from moezip.registry import Method


def score(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """S_i for every expert of one layer, float64 [E]."""
    return per_token(stats["gate_norm_sum"], stats["counts"])


REAP = Method(
    name="reap",
    family="prune",
    summary="mean gate weight x output norm over the tokens that an expert serves",
    paper="REAP, arXiv 2510.13999",
    needs=("counts", "gate_norm_sum"),
    params=PruneParams,
    run=score,
)

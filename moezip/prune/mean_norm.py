"""Expert activation norm (EAN): the mean norm of an expert's output over its tokens, gate weight left out."""

from __future__ import annotations

from collections.abc import Mapping

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams
from moezip.prune.ratios import per_token
from moezip.registry import Method


def score(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """Mean ||f_i|| for every expert of one layer, float64 [E]; 0 for an expert that no token reached."""
    return per_token(stats["norm_sum"], stats["counts"])


MEAN_NORM = Method(
    name="mean-norm",
    family="prune",
    summary="mean output norm over the expert's tokens (EAN)",
    paper="EAN baseline in arXiv 2510.13999",
    needs=("counts", "norm_sum"),
    params=PruneParams,
    run=score,
)

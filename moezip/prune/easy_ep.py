"""EASY-EP (arXiv 2504.06792, NeurIPS 2025).

With r_t = sum over the chosen experts of g_{t,i} f_i(x_t) (shared experts excluded) and h_t the residual stream just
before r_t is added:

    c_t = max(0, 1 - cos(h_t, h_t + r_t))                 how far the routed output turns the stream
    I_i = sum over tokens routed to i of  g_{t,i} * ||f_i(x_t)|| * c_t

A plain sum: an expert that is used more counts more. The clamp is in the authors' code, not in the paper; it only
matters for rounding. The same number of experts is kept in every layer: the authors tried a ranking across layers and
found it worse.
"""

from __future__ import annotations

from collections.abc import Mapping

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams
from moezip.registry import Method


def score(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """I_i for every expert of one layer, float64 [E]; 0 for an expert that no token reached."""
    return stats["change_gate_norm_sum"]


EASY_EP = Method(
    name="easy-ep",
    family="prune",
    summary="output-aware and token-aware expert scores; the best choice for one domain",
    paper="EASY-EP, arXiv 2504.06792",
    needs=("change_gate_norm_sum",),
    params=PruneParams,
    run=score,
)

"""M-SMoE (arXiv 2310.01334): group experts whose router logits are alike around the most used ones, average them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.merge.params import MergeParams, looks
from moezip.registry import Method


@dataclass(frozen=True, slots=True)
class MSmoeParams(MergeParams):
    """No settings of its own."""


def similarity(gram: Array) -> Array:
    """(1 + cosine) / 2 of the experts' router logits over all tokens, from their Gram matrix [E, E]."""
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return 0.5 * (1 + np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0))


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: MSmoeParams
) -> list[tuple[int, ...]]:
    """The ``keep`` most used experts (of equal ones the lower id), each with those that resemble it most."""
    counts, alike = stats["counts"], similarity(stats["router_gram"])
    size, each = facts.experts // facts.groups, keep // facts.groups
    found: list[tuple[int, ...]] = []
    for group in range(facts.groups):
        inside = range(group * size, (group + 1) * size)
        dominant = sorted(sorted(inside, key=lambda e: (-counts[e], e))[:each])
        members: dict[int, list[int]] = {expert: [expert] for expert in dominant}
        for expert in inside:
            if expert not in members:
                members[max(dominant, key=lambda d: (alike[expert, d], -d))].append(expert)
        found += [tuple(row) for row in members.values()]
    return found


def score(facts: LayerFacts, stats: Mapping[str, Array], params: MSmoeParams) -> Array:
    """Tokens routed to each expert, float64 [E]."""
    return stats["counts"]


M_SMOE = Method(
    name="m-smoe",
    family="merge",
    summary="averages experts whose router logits are alike into the most used one",
    paper="M-SMoE, arXiv 2310.01334",
    needs=("counts", "gate_sum", "router_gram"),
    params=MSmoeParams,
    choose=choose,
    looks=looks,
    run=score,
)

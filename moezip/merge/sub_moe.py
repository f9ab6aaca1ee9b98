"""Sub-MoE (arXiv 2506.23266): k-means on the experts' outputs, then weights averaged by usage in a shared subspace.

1. Y_i is the collection of expert i's outputs over tokens, whether routed there or not. K-means with k-means++ seeding
   on the Y_i, the best of several restarts. Only the Gram matrix of the Y_i is recorded: kernel k-means minimises the
   very same objective. `--set cosine=true` scales every output to length 1 first, so that the Gram matrix is the sum
   of the outputs' cosines, the paper's similarity.
2. The most used expert of a cluster is the dominant one. Merged is U S V' with U, S shared and V averaged by usage;
   without truncation that is the plain weighted average of the weights, and no SVD is needed (`--set rank=1`, the
   default). With rank < 1 the average is projected on the leading directions of the whitened members. The authors
   average neurons as they lie (`--set align=none`); in the order of the dominant expert's, the default, the model lost
   less.
3. With --scope model, ``layers`` neighbouring layers share their number of clusters, so that they may differ. The paper
   gives no rule. Here each layer has a dendrogram (Ward's: every merge raises the k-means objective least), whose
   heights are the rises as shares of the layer's whole spread; the heights are pooled, and the lowest merges are taken
   until the number is reached exactly. (REAP's reading, average linkage on 1 - cosine, left layers with so few experts
   that the model lost far more than with equal numbers.)

The authors run all experts on all tokens; here that is done on every n-th (`--set every=N`, by default experts / top-k,
which costs one more forward pass). Clusters lie inside router groups, equally many in each, where there are groups. An
expert that no token reached has outputs all the same and is grouped like any other; it weighs nothing in a group of
used ones, and stays as it is where it is alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import Record
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.merge.clusters import (
    grouped,
    kmeans,
    least_groups,
    require_finite,
    router_groups,
    ward_rises,
)
from moezip.merge.outputs import gram_name, output_gram, require_every, require_sampled
from moezip.merge.params import MergeParams, looks
from moezip.registry import Method


@dataclass(frozen=True, slots=True)
class SubMoeParams(MergeParams):
    """Attributes:
    every: run all experts on every n-th token; 0 for n = experts / top-k, about one more forward pass.
    cosine: scale every output to length 1 before clustering; experts with large outputs then merge with others, and the
        models tried lost far more.
    restarts: seedings of k-means to take the best of. seed: of their random numbers; --seed if not given.
    layers: with --scope model, how many neighbouring layers share their number of experts.
    rank: share of the singular values that merged matrices keep; 1 for all, which is the plain average.
    """

    every: int = 0
    cosine: bool = False
    restarts: int = 20
    seed: int = 0
    layers: int = 2
    rank: float = 1.0

    def __post_init__(self) -> None:
        MergeParams.__post_init__(self)
        require_every(self.every)
        for key, value in (("restarts", self.restarts), ("layers", self.layers)):
            if value < 1:
                raise UsageError(f"{key} is 1 or more", where=f"--set {key}={value}")
        if not 0 < self.rank <= 1:
            raise UsageError("the rank is a share, above 0 and at most 1", where=f"--set rank={self.rank:g}")


def records(params: SubMoeParams) -> tuple[Record, ...]:
    return (output_gram(params.every, params.cosine),)


def output_products(facts: LayerFacts, stats: Mapping[str, Array], params: SubMoeParams) -> Array:
    """The Gram matrix, [E, E]. Raises PlanError where it is not finite, or no token was sampled."""
    name = gram_name(params.every, params.cosine)
    require_finite(facts, stats, "counts", name)
    require_sampled(facts, stats, name)
    return stats[name]


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: SubMoeParams
) -> list[tuple[int, ...]]:
    """``keep`` clusters of the experts' outputs. Raises PlanError where no token was sampled."""
    gram = output_products(facts, stats, params)

    def clusters(inside: range, count: int) -> list[list[int]]:
        part = gram[inside.start : inside.stop, inside.start : inside.stop]
        return kmeans(part, count, params.seed, params.restarts)

    return grouped(facts, keep, stats["counts"], clusters)


# -- neighbouring layers ------------------------------------------------------------------------------------


def counts(
    facts: Sequence[LayerFacts], stats: Mapping[int, Mapping[str, Array]], total: int, params: SubMoeParams
) -> dict[int, int]:
    """Clusters of each layer, ``total`` in all (or, with router groups, the most that share evenly over them).

    Every layer keeps what its router cannot do without.

    Raises:
        PlanError: a total below what the routers need, or above what there is.
    """
    blocks = [facts[first : first + params.layers] for first in range(0, len(facts), params.layers)]
    least: dict[int, int] = {}
    found: dict[int, int] = {}
    for fact in facts:
        bound = least_groups(fact, params.router)
        need = max(-(-bound.top_k // bound.top_groups), bound.group_rank) if bound.groups > 1 else bound.top_k
        least[fact.layer] = need * fact.groups
    there = sum(fact.experts for fact in facts)
    if not sum(least.values()) <= total <= there:
        raise PlanError(
            f"cannot keep {total} experts in all: the routers need {sum(least.values())}, there are {there}",
            next=f"keep between {sum(least.values())} and {there}",
        )
    for block, share in zip(blocks, shares(blocks, total), strict=True):
        merges = sorted(
            (float(height), fact.layer, step)
            for fact in block
            for step, height in enumerate(heights(fact, output_products(fact, stats[fact.layer], params)))
        )
        size = {fact.layer: fact.groups for fact in block}
        left = {fact.layer: fact.experts for fact in block}
        for _, layer, _ in merges:
            if sum(left.values()) - size[layer] >= share and left[layer] > least[layer]:
                left[layer] -= size[layer]
        found |= left
    return found


def shares(blocks: Sequence[Sequence[LayerFacts]], total: int) -> list[int]:
    """How many clusters each block of layers gets: in proportion to its experts, what is over to the first ones."""
    there, step = sum(fact.experts for block in blocks for fact in block), blocks[0][0].groups
    fair = [total * sum(fact.experts for fact in block) // there for block in blocks]
    found = [each - each % step for each in fair]
    for number in range((total - sum(found)) // step):
        found[number] += step
    return found


def heights(facts: LayerFacts, gram: Array) -> Array:
    """What each of a layer's merges adds to the k-means objective, as a share of the layer's whole spread, ascending;
    with router groups the j-th merges of all groups together."""
    total = np.zeros(facts.experts // facts.groups - 1)
    for inside in router_groups(facts):
        total += ward_rises(gram[inside.start : inside.stop, inside.start : inside.stop])
    return total / max(total.sum(), np.finfo(float).tiny)


def score(facts: LayerFacts, stats: Mapping[str, Array], params: SubMoeParams) -> Array:
    """Tokens routed to each expert, float64 [E]."""
    return stats["counts"]


SUB_MOE = Method(
    name="sub-moe",
    family="merge",
    summary="averages experts whose outputs are alike token by token (k-means), optionally in a truncated subspace",
    paper="Sub-MoE, arXiv 2506.23266",
    needs=("counts", "gate_sum"),
    params=SubMoeParams,
    records=records,
    choose=choose,
    counts=counts,
    looks=looks,
    run=score,
)

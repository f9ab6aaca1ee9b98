"""M-SMoE (arXiv 2310.01334): group experts that are alike around the most used ones, average them.

1. Similarity. `--set similarity=router` (the published one): (1 + cosine) / 2 of the experts' router logits over all
   tokens, from their Gram matrix. `weights`: the cosine of the experts' matrices as they lie. `outputs`: the cosine of
   what they put out on sampled tokens (`--set every=N`, as of sub-moe). `coactivation`: of the tokens that chose the
   rarer of the two, the share that chose both.
2. The most used experts are dominant; every other one joins the dominant expert that it resembles most (of equal ones
   the more used). With router groups all of this happens inside each, equally many dominant experts in each.
3. With --scope model the numbers of groups adapt: usage as a share of the layer's tokens is ranked over all layers,
   and the top of the list is dominant; the most used expert of a layer always is. The total is exact: of equal shares
   the one in the earlier layer counts; as published, with a strict threshold, ties give fewer groups than asked for.
   A stock router needs at least top-k experts, so no layer gets fewer; with router=remap one is enough.
4. Neurons are put in the order of the layer's first expert, weights are averaged by usage.

An expert that no token reached is dominant only if there are not enough others, joins a group by its similarity (router
logits and outputs are there all the same; it was chosen beside nobody, so by `coactivation` it joins the most used
one), and weighs nothing in the average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import BY_NAME, Record
from moezip.calibrate.statistics import Array
from moezip.merge.clusters import cosines, grouped, least_groups, require_finite
from moezip.merge.outputs import gram_name, output_gram, require_every, require_sampled
from moezip.merge.params import MergeParams, looks, require_one_of
from moezip.plan.allocate import model_counts
from moezip.registry import Method

SIMILARITIES = ("router", "weights", "outputs", "coactivation")
WEIGHTS = "expert_gram"
STANDING = {"router": "router_gram", "coactivation": "coactivation"}


@dataclass(frozen=True, slots=True)
class MSmoeParams(MergeParams):
    """Attributes:
    similarity: what makes experts alike: ``router`` logits, ``weights``, ``outputs``, or ``coactivation``.
    every: outputs: run all experts on every n-th token; 0 for n = experts / top-k, about one more forward pass.
    """

    reference: str = "first"
    similarity: str = "router"
    every: int = 0

    def __post_init__(self) -> None:
        MergeParams.__post_init__(self)
        require_one_of("similarity", self.similarity, SIMILARITIES)
        require_every(self.every)


def records(params: MSmoeParams) -> tuple[Record, ...]:
    """The counts and what the similarity reads."""
    if params.similarity == "outputs":
        return BY_NAME["counts"], output_gram(params.every, False)
    if params.similarity in STANDING:
        return BY_NAME["counts"], BY_NAME[STANDING[params.similarity]]
    return (BY_NAME["counts"],)


def weights(params: MSmoeParams) -> tuple[str, ...]:
    """The statistic of the weights that the similarity reads."""
    return (WEIGHTS,) if params.similarity == "weights" else ()


def similarity(facts: LayerFacts, stats: Mapping[str, Array], params: MSmoeParams) -> Array:
    """How much every two experts resemble each other, [E, E], at most 1. Raises PlanError for damaged statistics."""
    if params.similarity == "outputs":
        name = gram_name(params.every, False)
        require_sampled(facts, stats, name)
    else:
        name = WEIGHTS if params.similarity == "weights" else STANDING[params.similarity]
    require_finite(facts, stats, "counts", name)
    if params.similarity == "coactivation":
        own = np.diag(stats[name])
        rarer = np.minimum.outer(own, own)
        return np.divide(stats[name], rarer, out=np.zeros_like(stats[name]), where=rarer > 0)
    return 0.5 * (1 + cosines(stats[name]))


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: MSmoeParams
) -> list[tuple[int, ...]]:
    """The ``keep`` most used experts (of equal ones the lower id), each with those that resemble it most."""
    used, alike = stats["counts"], similarity(facts, stats, params)

    def around_most_used(inside: range, count: int) -> list[list[int]]:
        by_use = sorted(inside, key=lambda expert: (-used[expert], expert))
        dominant = by_use[:count]
        clusters = {expert: [expert - inside.start] for expert in dominant}
        for expert in by_use[count:]:
            # the first of the most alike, and they are in order of use
            nearest = dominant[int(np.argmax(alike[expert, dominant]))]
            clusters[nearest].append(expert - inside.start)
        return list(clusters.values())

    return grouped(facts, keep, used, around_most_used)


def counts(
    facts: Sequence[LayerFacts], stats: Mapping[int, Mapping[str, Array]], total: int, params: MSmoeParams
) -> dict[int, int]:
    """Groups of each layer, ``total`` in all: as many as it has among the most used experts of the model.

    Raises:
        PlanError: a total below what the routers need, or above what there is.
    """
    usage = {}
    for fact in facts:
        require_finite(fact, stats[fact.layer], "counts")
        tokens = stats[fact.layer]["counts"]
        usage[fact.layer] = tokens / max(tokens.sum(), np.finfo(float).tiny)
    bound = [least_groups(fact, params.router) for fact in facts]
    return model_counts(bound, usage, total, {})


def score(facts: LayerFacts, stats: Mapping[str, Array], params: MSmoeParams) -> Array:
    """Tokens routed to each expert, float64 [E]."""
    return stats["counts"]


M_SMOE = Method(
    name="m-smoe",
    family="merge",
    summary="averages experts whose router logits are alike into the most used one",
    paper="M-SMoE, arXiv 2310.01334",
    needs=("counts", "gate_sum"),
    params=MSmoeParams,
    weights=weights,
    records=records,
    choose=choose,
    counts=counts,
    looks=looks,
    run=score,
)

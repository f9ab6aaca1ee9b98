"""HC-SMoE (arXiv 2410.08589): cluster experts by what they put out on average, average each cluster's weights.

1. Every expert's mean output over tokens, whether routed there or not; a vector of D numbers.
2. Agglomerative clustering, average linkage, Euclidean distance, until as many clusters are left as experts are to
   stay: equally many in every layer, and inside every router group where there are groups.
3. The most used expert of a cluster is the dominant one; weights are averaged by usage. The authors average neurons as
   they lie (`--set align=none`); in the order of the dominant expert's, the default, the model lost less.

The authors run all experts on all tokens; here that is done on every n-th (`--set every=N`, by default experts / top-k,
which costs one more forward pass). The sums serve as well as the means: all are of the same tokens. An expert that no
token reached has outputs all the same and is grouped like any other; it weighs nothing in a group of used ones, and
stays as it is where it is alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import Record
from moezip.calibrate.statistics import Array
from moezip.merge.clusters import average_linkage, cut, grouped, require_finite
from moezip.merge.outputs import output_sums, require_every, require_sampled, sums_name
from moezip.merge.params import MergeParams, looks
from moezip.registry import Method


@dataclass(frozen=True, slots=True)
class HCSmoeParams(MergeParams):
    """Attributes:
    every: run all experts on every n-th token; 0 for n = experts / top-k, about one more forward pass.
    """

    every: int = 0

    def __post_init__(self) -> None:
        MergeParams.__post_init__(self)
        require_every(self.every)


def records(params: HCSmoeParams) -> tuple[Record, ...]:
    return (output_sums(params.every),)


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: HCSmoeParams
) -> list[tuple[int, ...]]:
    """``keep`` clusters of the experts' mean outputs. Raises PlanError where no token was sampled."""
    from scipy.spatial.distance import cdist

    name = sums_name(params.every)
    require_finite(facts, stats, "counts", name)
    require_sampled(facts, stats, name)

    def clusters(inside: range, count: int) -> list[list[int]]:
        points = stats[name][inside.start : inside.stop]
        return cut(average_linkage(cdist(points, points)), count)

    return grouped(facts, keep, stats["counts"], clusters)


def score(facts: LayerFacts, stats: Mapping[str, Array], params: HCSmoeParams) -> Array:
    """Tokens routed to each expert, float64 [E]."""
    return stats["counts"]


HC_SMOE = Method(
    name="hc-smoe",
    family="merge",
    summary="averages experts whose mean outputs are alike (average linkage)",
    paper="HC-SMoE, arXiv 2410.08589",
    needs=("counts", "gate_sum"),
    params=HCSmoeParams,
    records=records,
    choose=choose,
    looks=looks,
    run=score,
)

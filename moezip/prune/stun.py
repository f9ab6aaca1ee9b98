"""STUN, its first stage (arXiv 2409.06211): cluster experts that behave alike, keep one of each cluster.

1. Similarity s_ij of two experts.

   `--set similarity=coactivation` (the default): of the tokens that chose the rarer of the two, the share that chose
   both, n_ij / min(n_i, n_j). So an expert that is used seldom, and then beside another, counts as covered by that
   other. (Divided by the total, or by sqrt(n_i n_j), a rare expert resembles nobody and each one stays as a cluster of
   its own: on the demo model, calibrated on one domain, that was as bad as drawing lots.)
   `--set similarity=router`: the cosine of the two experts' router logits over all tokens, from their Gram matrix.

2. Agglomerative clustering with complete linkage on the distance d_ij = sqrt(2 - 2 s_ij) until exactly as many clusters
   are left as experts are to be kept; inside each router group where there are groups.

3. Of each cluster the expert with the least mean d_ij^2 to the cluster's members stays. With the cosine that is the one
   nearest to the centroid of the experts' columns of logits, scaled to length 1; counts have no such columns, and the
   same rule picks the most central expert. In a cluster of two both are equally near; the one that serves more tokens
   stays.

Experts that no token reached resemble nobody and would each be a cluster of their own: they are set aside and stay only
if there are not enough others. Protected (super) experts are kept as the representatives of their clusters, and no
cluster may hold two of them.

The authors cluster by the distance of the router's rows with co-activation added, seek the threshold that gives a
number of experts over all layers together, and take the centroid of the experts' weights. Here one similarity is used
at a time, every layer keeps the same number, and the centroid lies where the similarity does, so that recorded sums are
enough and no weight is read. Their second stage, unstructured sparsity, is not part of it.

Similarity says which experts can stand in for each other, not which matter: for one domain, frequency alone was better
on the demo model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import BY_NAME, Record
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.prune.params import PruneParams
from moezip.registry import Method

SIMILARITIES = {"coactivation": "coactivation", "router": "router_gram"}
APART = 4.0  # farther than any two experts, whose distance is at most 2: such clusters are merged last


@dataclass(frozen=True, slots=True)
class StunParams(PruneParams):
    """Attributes:
    similarity: ``coactivation`` (tokens in common) or ``router`` (router logits alike).
    """

    similarity: str = "coactivation"

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise UsageError(
                f"similarity is {' or '.join(SIMILARITIES)}, not {self.similarity!r}",
                where=f"--set similarity={self.similarity}",
            )


def records(params: StunParams) -> tuple[Record, ...]:
    """The counts and the matrix of the similarity; both are standing records."""
    return BY_NAME["counts"], BY_NAME[SIMILARITIES[params.similarity]]


def square_distances(matrix: Array, members: Sequence[int], similarity_name: str) -> Array:
    """2 - 2 s_ij of these experts, float64 [n, n]; an expert without tokens or logits resembles none but itself.

    Args:
        matrix: tokens that chose both, or the Gram matrix of the logits, [E, E].
        similarity_name: ``coactivation`` or ``router``.
    """
    part = matrix[np.ix_(members, members)]
    own = np.diag(part)
    unit = np.minimum.outer(own, own) if similarity_name == "coactivation" else np.sqrt(np.outer(own, own))
    similarity = np.divide(part, unit, out=np.zeros_like(part), where=unit > 0)
    squares = 2 - 2 * np.clip(similarity, -1, 1)
    squares = (squares + squares.T) / 2  # exact symmetry whatever order the products were summed in
    np.fill_diagonal(squares, 0)
    return squares


def clusters(squares: Array, count: int, apart: Sequence[int] = ()) -> list[list[int]]:
    """Exactly ``count`` clusters of complete linkage, each ascending, in the order of their first members.

    Args:
        squares: squared distances, [n, n]; 1 <= count <= n.
        apart: at most ``count`` members of which no two may share a cluster.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    n = len(squares)
    if count == n:
        return [[member] for member in range(n)]
    distances = np.sqrt(squares)
    for a in apart:
        for b in apart:
            if a != b:
                distances[a, b] = APART
    labels = cut_tree(linkage(squareform(distances, checks=False), "complete"), n_clusters=count)[:, 0]
    found: dict[int, list[int]] = {}
    for member, label in enumerate(labels):
        found.setdefault(int(label), []).append(member)
    return list(found.values())


def representative(cluster: Sequence[int], squares: Array, counts: Array) -> int:
    """The most central member; of equals the one with more tokens, then the lower id."""
    # |x_i - centroid|^2 = mean over members j of d_ij^2, less a constant of the cluster
    spread = squares[np.ix_(cluster, cluster)].mean(1)
    # 1e-9: distances that differ by rounding are equal
    return min(cluster, key=lambda i: (round(float(spread[cluster.index(i)]), 9), -counts[i], i))


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: StunParams
) -> list[int]:
    """The ids of ``keep`` representatives, ascending, the protected experts among them.

    Raises:
        PlanError: statistics that are not finite.
    """
    counts, matrix = stats["counts"], stats[SIMILARITIES[params.similarity]]
    if not (np.isfinite(counts).all() and np.isfinite(matrix).all()):
        raise PlanError(
            f"the statistics of layer {facts.layer} are not finite numbers",
            next="the statistics are damaged or the model overflows; calibrate again",
        )
    size, each = facts.experts // facts.groups, keep // facts.groups
    kept: list[int] = []
    for group in range(facts.groups):
        inside = range(group * size, (group + 1) * size)
        guarded = {expert for expert in protected if expert in inside}
        reached = [expert for expert in inside if counts[expert] > 0 or expert in guarded]
        idle = [expert for expert in inside if expert not in reached]
        squares = square_distances(matrix, reached, params.similarity)
        apart = [place for place, expert in enumerate(reached) if expert in guarded]
        for cluster in clusters(squares, min(each, len(reached)), apart):
            firm = [place for place in cluster if place in apart]
            kept.append(reached[firm[0] if firm else representative(cluster, squares, counts[reached])])
        kept += idle[: max(each - len(reached), 0)]
    return sorted(kept)


def score(facts: LayerFacts, stats: Mapping[str, Array], params: StunParams) -> Array:
    """Tokens routed to each expert, float64 [E], for the reader of the plan: ``choose`` decides."""
    return stats["counts"]


STUN = Method(
    name="stun",
    family="prune",
    summary="clusters experts that are chosen together and keeps the centre of each cluster",
    paper="STUN, arXiv 2409.06211",
    needs=(),
    params=StunParams,
    records=records,
    choose=choose,
    run=score,
)

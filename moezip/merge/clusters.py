"""Clusters of experts: average linkage, k-means on a Gram matrix, and what the grouping methods share.

Kernel k-means needs the Gram matrix K of the points alone. With Z [n, c] the clusters' members and n_c their numbers,

    |Y_i - centre_c|^2  =  K_ii - 2 (K Z)_ic / n_c + (Z' K Z)_cc / n_c^2
    objective           =  sum_i K_ii - sum_c (Z' K Z)_cc / n_c

which is the k-means objective of the points themselves, however long they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError

# Gains below this share of the points' whole energy are rounding, and would let points move back and forth for ever.
ROUNDING = 1e-12


# -- what the methods share ---------------------------------------------------------------------------------


def router_groups(facts: LayerFacts) -> list[range]:
    """The experts of each router group; one range of all where there are none."""
    size = facts.experts // facts.groups
    return [range(first, first + size) for first in range(0, facts.experts, size)]


def grouped(
    facts: LayerFacts, keep: int, counts: Array, clusters: Callable[[range, int], Sequence[Sequence[int]]]
) -> list[tuple[int, ...]]:
    """``keep`` groups, equally many inside every router group, the most used expert of each first.

    Args:
        counts: tokens routed to each expert, [E]; of equally used ones the lower id comes first.
        clusters: ``clusters(experts, n)`` divides the experts of a router group; its answer counts places in them.
    """
    found = []
    for inside in router_groups(facts):
        for cluster in clusters(inside, keep // facts.groups):
            members = sorted(inside[place] for place in cluster)
            dominant = min(members, key=lambda expert: (-counts[expert], expert))
            found.append((dominant, *(expert for expert in members if expert != dominant)))
    return found


def require_finite(facts: LayerFacts, stats: Mapping[str, Array], *names: str) -> None:
    """Raises PlanError where a statistic is not made of finite numbers."""
    for name in names:
        if not np.isfinite(stats[name]).all():
            raise PlanError(
                f"{name} of layer {facts.layer} are not finite numbers",
                next="the statistics are damaged or the model overflows; calibrate again",
            )


def least_groups(facts: LayerFacts, router: str) -> LayerFacts:
    """The facts that bind how many groups a layer may be left with: any number where all router rows stay."""
    return replace(facts, top_k=1, top_groups=1, group_rank=1) if router == "remap" else facts


def cosines(gram: Array) -> Array:
    """Cosine of every two points, [n, n], from their Gram matrix; 0 with a point that has no length."""
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    scale = np.outer(norms, norms)
    return np.clip(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0), -1, 1)


# -- agglomerative ------------------------------------------------------------------------------------------


def average_linkage(distances: Array) -> Array:
    """The dendrogram, scipy's [n - 1, 4], of symmetric distances [n, n]; two clusters are as far apart as their
    members are on average."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    symmetric = (distances + distances.T) / 2  # whatever order the sums had
    np.fill_diagonal(symmetric, 0)
    return np.asarray(linkage(squareform(symmetric, checks=False), "average"), dtype=np.float64)


def ward_rises(gram: Array) -> Array:
    """By how much each of Ward's n - 1 merges raises the k-means objective, ascending; together it is the objective of
    one cluster. Of points whose inner products are ``gram`` [n, n]."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    own = np.diag(gram)
    squares = np.clip(own[:, None] + own[None, :] - gram - gram.T, 0, None)
    np.fill_diagonal(squares, 0)
    # scipy's height h of joining n_a and n_b points is sqrt(2 n_a n_b / (n_a + n_b)) times their centres' distance
    tree = np.asarray(linkage(squareform(np.sqrt(squares), checks=False), "ward"), dtype=np.float64)
    return tree[:, 2] ** 2 / 2


def cut(tree: Array, count: int) -> list[list[int]]:
    """Exactly ``count`` clusters of a dendrogram: its last merges undone. Each ascending, by first members."""
    n = len(tree) + 1
    clusters = {point: [point] for point in range(n)}
    for step, (a, b) in enumerate(tree[: n - count, :2].astype(int)):
        clusters[n + step] = clusters.pop(int(a)) + clusters.pop(int(b))
    return sorted(sorted(members) for members in clusters.values())


# -- k-means ------------------------------------------------------------------------------------------------


def kmeans(gram: Array, count: int, seed: int, restarts: int) -> list[list[int]]:
    """Exactly ``count`` clusters of least k-means objective that ``restarts`` k-means++ seedings lead to.

    After Lloyd's iterations single points are moved as long as that helps (Hartigan): where clusters are small, the
    iterations alone stop at once.

    Args:
        gram: inner products of the points, [n, n], 1 <= count <= n.
    """
    n = len(gram)
    if count == n:
        return [[point] for point in range(n)]
    random, best, least = np.random.default_rng(seed), np.zeros(n, int), np.inf
    for _ in range(restarts):
        labels = moves(gram, lloyd(gram, seeded(gram, count, random), count), count)
        value = objective(gram, labels)
        if value < least * (1 - ROUNDING):
            best, least = labels, value
    return [np.flatnonzero(best == label).tolist() for label in range(count)]


def objective(gram: Array, labels: np.ndarray) -> float:
    """Sum over all points of the squared distance to the centre of their cluster."""
    member = np.eye(int(labels.max()) + 1)[labels]
    sizes = member.sum(0)
    inside = np.einsum("ic,ij,jc->c", member, gram, member, optimize=True)
    return float(np.trace(gram) - np.divide(inside, sizes, out=np.zeros_like(inside), where=sizes > 0).sum())


def seeded(gram: Array, count: int, random: np.random.Generator) -> np.ndarray:
    """Labels [n] of the nearest of ``count`` seeds, drawn as k-means++ does (Arthur and Vassilvitskii, 2007): each
    with odds of its squared distance to the nearest seed so far."""
    own = np.diag(gram)
    squares = np.clip(own[:, None] + own[None, :] - 2 * gram, 0, None)
    seeds = [int(random.integers(len(gram)))]
    while len(seeds) < count:
        odds = squares[:, seeds].min(1)
        odds[seeds] = 0
        if odds.sum() <= ROUNDING * np.trace(gram):  # only copies of the seeds are left
            odds = np.ones(len(gram))
            odds[seeds] = 0
        seeds.append(int(random.choice(len(gram), p=odds / odds.sum())))
    labels = squares[:, seeds].argmin(1)
    labels[seeds] = np.arange(count)
    return labels


def square_distances(gram: Array, labels: np.ndarray, count: int) -> Array:
    """|Y_i - centre_c|^2 of every point and cluster, [n, count]; no cluster is empty."""
    member = np.eye(count)[labels]
    sizes = member.sum(0)
    sums = gram @ member
    inside: Array = (member * sums).sum(0) / sizes**2
    return np.diag(gram)[:, None] - 2 * sums / sizes + inside


def lloyd(gram: Array, labels: np.ndarray, count: int) -> np.ndarray:
    """Lloyd's iterations: every point to the nearest centre, until none moves.

    A cluster that runs empty takes the point that lies farthest from its own centre.
    """
    labels, slack = labels.copy(), ROUNDING * float(np.trace(gram))
    while True:
        squares = square_distances(gram, labels, count)
        now = squares[np.arange(len(labels)), labels]
        nearest = squares.argmin(1)
        moved = np.where(squares.min(1) < now - slack, nearest, labels)
        for label in set(range(count)) - set(moved.tolist()):
            shared = np.bincount(moved, minlength=count)[moved] > 1
            moved[np.where(shared, squares[np.arange(len(moved)), moved], -1).argmax()] = label
        if (moved == labels).all():
            return labels
        labels = moved


def moves(gram: Array, labels: np.ndarray, count: int) -> np.ndarray:
    """Moves one point at a time, the one that lowers the objective most, until none does (Hartigan, 1975)."""
    labels, slack = labels.copy(), ROUNDING * float(np.trace(gram))
    points = np.arange(len(labels))
    while True:
        sizes = np.bincount(labels, minlength=count)
        squares = square_distances(gram, labels, count)
        own = sizes[labels]
        # what leaving the own cluster takes off the objective; the last member stays
        saved = squares[points, labels] * np.divide(own, own - 1, out=np.zeros(len(own)), where=own > 1)
        gains = saved[:, None] - squares * sizes / (sizes + 1)
        gains[points, labels] = 0
        point, label = np.unravel_index(gains.argmax(), gains.shape)
        if gains[point, label] <= slack:
            return labels
        labels[point] = label

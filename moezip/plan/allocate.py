"""From scores to picks: how many experts stay, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.plan.plan import LayerPlan, Pick, require_keepable


def kept_count(experts: int, keep: int | None, ratio: float | None) -> int:
    """Experts kept per layer, from a count or from the share removed (rounded half up).

    Raises:
        UsageError: neither or both given, or a share outside 0 to 1.
    """
    if (keep is None) == (ratio is None):
        raise UsageError("say how much to keep", next="give either --keep N or --ratio R (the share removed)")
    if keep is not None:
        return keep
    assert ratio is not None
    if not 0 <= ratio < 1:
        raise UsageError(f"--ratio {ratio:g} is not a share removed", next="give a number from 0 up to, not with, 1")
    # half up on the decimal value that the user typed: 1 - 0.3 is 0.7000000000000001 in binary
    return math.floor(round(experts * (1 - ratio), 9) + 0.5)


def combine_domains(scores: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    """One score per expert from several domains': each divided by its layer sum, then added (arXiv 2504.06792).

    A single domain's scores pass unchanged. A domain whose scores sum to zero says nothing and adds nothing.

    Args:
        scores: per domain, [E].
        weights: how much each domain counts; equally without.
    """
    if len(scores) == 1:
        return scores[0]
    total = np.zeros_like(scores[0])
    for score, weight in zip(scores, weights or [1.0] * len(scores), strict=True):
        if (layer_sum := score.sum()) > 0:
            total += weight * score / layer_sum
    return total


def rank(fact: LayerFacts, scores: Array, keep: int, protected: Sequence[int] = ()) -> list[int]:
    """The ``keep`` experts of highest score, ascending by id; equal scores keep the lower id.

    Protected experts stay whatever their score. Group-limited routers keep equally many in every group.

    Raises:
        PlanError: scores that are not finite, an impossible count, or more protected experts than are kept.
    """
    require_keepable(fact, keep)
    if scores.shape != (fact.experts,) or not np.isfinite(scores).all():
        raise PlanError(
            f"the scores of layer {fact.layer} are not {fact.experts} finite numbers",
            next="the statistics are damaged or the model overflows; calibrate again",
        )
    guarded = set(protected)
    order = sorted(range(fact.experts), key=lambda e: (e not in guarded, -scores[e], e))
    size, each = fact.experts // fact.groups, keep // fact.groups
    kept: list[int] = []
    for group in range(fact.groups):
        members = [expert for expert in order if expert // size == group]
        if sum(expert in guarded for expert in members) > each:
            raise PlanError(
                f"layer {fact.layer} has more super experts than the {each} it may keep"
                + (f" in group {group}" if fact.groups > 1 else ""),
                next="keep more experts, or switch the guard off with --set guard=false",
            )
        kept += members[:each]
    return sorted(kept)


def layer_plans(
    facts: Sequence[LayerFacts],
    scores: Mapping[int, Array],
    keep: int,
    protected: Mapping[int, Sequence[int]],
) -> tuple[LayerPlan, ...]:
    """The same number of experts in every layer, ranked inside the layer."""
    return tuple(
        LayerPlan(
            fact.layer,
            fact.experts,
            tuple(map(Pick.keep, rank(fact, scores[fact.layer], keep, protected.get(fact.layer, ())))),
            tuple(float(value) for value in scores[fact.layer]),
            tuple(protected.get(fact.layer, ())),
        )
        for fact in facts
    )

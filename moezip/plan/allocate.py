"""From scores to picks: how many experts stay, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import combine_of
from moezip.calibrate.statistics import Array, Domain
from moezip.errors import PlanError, UsageError
from moezip.plan.plan import LayerPlan, Pick, require_groups, require_keepable

# (layer, how many, which must be among them) -> the experts that stay, where a method does more than rank.
Choice = Callable[[LayerFacts, int, Sequence[int]], list[int]]


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

    Raises:
        PlanError: several domains, and scores below 0, which have no common scale.
    """
    if len(scores) == 1:
        return scores[0]
    if any((score < 0).any() for score in scores):
        raise PlanError(
            "this method gives scores below 0, and those of several domains cannot be put on one scale",
            next="give one --data path (a folder is one domain), or another method or setting",
        )
    total = np.zeros_like(scores[0])
    for score, weight in zip(scores, weights or [1.0] * len(scores), strict=True):
        if (layer_sum := score.sum()) > 0:
            total += weight * score / layer_sum
    return total


def mix_domains(domains: Sequence[Domain], layer: int, weights: Sequence[float]) -> dict[str, Array]:
    """One layer's statistics as if every token of the mixture were drawn from a domain with odds of its weight.

    Sums are taken per token before they are added; largest values stay the largest of all.
    """
    mixed: dict[str, Array] = {}
    for name in domains[0].layers[layer]:
        each = [domain.layers[layer][name] for domain in domains]
        if len(each) == 1:
            mixed[name] = each[0]
        elif combine_of(name) == "max":
            mixed[name] = np.max(each, axis=0)
        else:
            parts = [w * sums / d.tokens for w, sums, d in zip(weights, each, domains, strict=True)]
            mixed[name] = np.sum(parts, axis=0)
    return mixed


def require_room(fact: LayerFacts, keep: int, protected: Sequence[int]) -> None:
    """Raises PlanError if a layer, or a group of it, has more protected experts than may stay."""
    size, each = fact.experts // fact.groups, keep // fact.groups
    for group in range(fact.groups):
        if sum(expert // size == group for expert in set(protected)) > each:
            raise PlanError(
                f"layer {fact.layer} has more super experts than the {each} it may keep"
                + (f" in group {group}" if fact.groups > 1 else ""),
                next="keep more experts, or switch the guard off with --set guard=false",
            )


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
    require_room(fact, keep, protected)
    guarded = set(protected)
    order = sorted(range(fact.experts), key=lambda e: (e not in guarded, -scores[e], e))
    size, each = fact.experts // fact.groups, keep // fact.groups
    kept: list[int] = []
    for group in range(fact.groups):
        kept += [expert for expert in order if expert // size == group][:each]
    return sorted(kept)


def chosen(fact: LayerFacts, choice: Choice, keep: int, protected: Sequence[int] = ()) -> list[int]:
    """What ``choice`` keeps, ascending, checked: ``keep`` different experts, all protected ones, groups of equal size.

    Raises:
        PlanError: an impossible count, more protected experts than are kept, or a choice that breaks the rules.
    """
    require_keepable(fact, keep)
    require_room(fact, keep, protected)
    kept = sorted(choice(fact, keep, protected))
    if len(set(kept)) != keep or len(kept) != keep or not set(kept) <= set(range(fact.experts)):
        raise PlanError(f"layer {fact.layer}: the method was to keep {keep} experts and chose {kept}")
    if missing := sorted(set(protected) - set(kept)):
        raise PlanError(f"layer {fact.layer}: the method dropped the protected experts {missing}")
    require_groups(fact, kept)
    return kept


def model_counts(
    facts: Sequence[LayerFacts], prices: Mapping[int, Array], total: int, protected: Mapping[int, Sequence[int]]
) -> dict[int, int]:
    """How many experts each layer keeps if the ``total`` dearest of the whole model stay.

    Every layer keeps what its router cannot do without (top-k, and its share of every group) and its protected
    experts; the rest of the budget goes to the dearest, one from every group at a time where there are groups.

    Args:
        prices: per layer, [E], on one scale for all layers (nats per token).
        total: experts kept in all layers together.

    Raises:
        PlanError: a total below what the routers need, or above what there is.
    """
    least, values, places = {}, [], []
    for fact in facts:
        size = fact.experts // fact.groups
        guarded = set(protected.get(fact.layer, ()))
        most = max((sum(e // size == g for e in guarded) for g in range(fact.groups)), default=0)
        need = max(-(-fact.top_k // fact.top_groups), fact.group_rank) if fact.groups > 1 else fact.top_k
        least[fact.layer] = max(need, most) * fact.groups
        # the j-th dearest of every group, together
        grouped = -np.sort(-prices[fact.layer].reshape(fact.groups, size), axis=1)
        for lot in range(least[fact.layer] // fact.groups, size):
            values.append(float(grouped[:, lot].sum()))
            places.append(fact)
    there = sum(fact.experts for fact in facts)
    if not sum(least.values()) <= total <= there:
        raise PlanError(
            f"cannot keep {total} experts in all: the routers need {sum(least.values())}, there are {there}",
            next=f"keep between {sum(least.values())} and {there}",
        )
    counts, left = dict(least), total - sum(least.values())
    for index in np.argsort(-np.array(values), kind="stable"):
        fact = places[int(index)]
        if fact.groups <= left:
            counts[fact.layer] += fact.groups
            left -= fact.groups
    return counts


def layer_plans(
    facts: Sequence[LayerFacts],
    scores: Mapping[int, Array],
    keep: int | Mapping[int, int],
    protected: Mapping[int, Sequence[int]],
    choice: Choice | None = None,
) -> tuple[LayerPlan, ...]:
    """``keep`` experts of every layer (or so many of each), ranked inside it, or chosen where the method chooses."""
    layers = []
    for fact in facts:
        guarded = tuple(protected.get(fact.layer, ()))
        count = keep if isinstance(keep, int) else keep[fact.layer]
        if choice is None:
            kept = rank(fact, scores[fact.layer], count, guarded)
        else:
            kept = chosen(fact, choice, count, guarded)
        shown = tuple(float(value) for value in scores[fact.layer])
        layers.append(LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, kept)), shown, guarded))
    return tuple(layers)

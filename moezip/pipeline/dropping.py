"""What it means for plan, names and bytes that a choice of widths drops whole experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from moezip.arch.families import identify
from moezip.arch.layout import tripwire_of
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.source import Source
from moezip.errors import PlanError
from moezip.plan.apply import Applied
from moezip.plan.plan import LayerPlan, Pick, Plan

# Layer, and expert, in the name of a tensor.
OF_LAYER = re.compile(r"\.layers\.(\d+)\.")
OF_EXPERT = re.compile(r"\.layers\.(\d+)\..*\bexperts\.(\d+)\.")


def without(plan: Plan, dropped: Mapping[int, Sequence[int]], facts: Sequence[LayerFacts]) -> tuple[Plan, Any]:
    """The plan without some experts, and the new name of a matrix.

    Raises:
        PlanError: experts would go of a plan that has chosen some already.
    """
    if not dropped:
        return plan, lambda name: name
    kept = {fact.layer: [e for e in range(fact.experts) if e not in set(dropped.get(fact.layer, ()))] for fact in facts}
    if any(layer.kept != tuple(range(layer.experts)) for layer in plan.layers):
        raise PlanError("experts cannot be dropped from a plan that has chosen some", next="use --set drops=false")
    layers = tuple(
        LayerPlan(layer.layer, layer.experts, tuple(Pick.keep(expert) for expert in kept[layer.layer]))
        for layer in plan.layers
    )
    places = {(layer, expert): place for layer, row in kept.items() for place, expert in enumerate(row)}

    def renumbered(name: str) -> str:
        found = OF_EXPERT.search(name)
        if found is None:
            return name
        place = places[int(found.group(1)), int(found.group(2))]
        return f"{name[: found.start(2)]}{place}{name[found.end(2) :]}"

    return replace(plan, layers=layers), renumbered


def freed(plain: Source, split: Source, plan: Plan, facts: Sequence[LayerFacts], matrices: Set[str]) -> dict[int, int]:
    """By layer, the bytes beside its matrices that an expert takes along: its row of the router, biases.

    Args:
        plain, split: what ``plan`` makes of a checkpoint, as the family stores it and one tensor per expert and matrix.
        matrices: names of those that are counted apart.
    """
    some = [fact for fact in facts if fact.experts > fact.groups]
    last = {
        fact.layer: tuple(range(fact.experts // fact.groups - 1, fact.experts, fact.experts // fact.groups))
        for fact in some
    }
    fewer, _ = without(plan, last, facts)
    before, after = (_rest_by_layer(view, matrices) for view in (split, Applied(plain, fewer, split=True)))
    return {fact.layer: (before[fact.layer] - after[fact.layer]) // fact.groups for fact in some}


def _rest_by_layer(view: Source, named: Set[str | None]) -> Counter[int]:
    """Bytes of each layer's tensors that are not ``named``, nor there for the loader alone."""
    named = {*named, tripwire_of(identify(view.config, view.folder), view.config)}
    found: Counter[int] = Counter()
    for name in view.names():
        place = OF_LAYER.search(name)
        if name not in named and place is not None:
            found[int(place.group(1))] += view.spec(name).bytes
    return found

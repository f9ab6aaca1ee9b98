"""Two plans, one after the other, as one plan for the source of the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moezip.errors import PlanError
from moezip.plan.plan import LayerPlan, Part, Pick, Plan


def after_pruning(first: Plan, second: Plan, made_by: Mapping[str, Any]) -> Plan:
    """What ``second`` makes of the view of ``first``, which chooses whole experts. Its solved values stay as they are.

    Args:
        second: for the view of ``first``: it numbers experts as that does.
        made_by: for the reader of the plan.

    Raises:
        PlanError: ``first`` takes neurons, merges or packs, or ``second`` keeps the rows of all experts: those that
            were pruned have none, and no expert that they could lead to.
    """
    if first.merges or first.packing or not all(layer.whole for layer in first.layers):
        raise PlanError(
            "only a plan that keeps whole experts as they are can have another one after it",
            next="write the checkpoint that the first one makes, and go on from there",
        )
    layers = []
    for before, after in zip(first.layers, second.layers, strict=True):
        if after.router == "remap":
            raise PlanError(
                f"layer {after.layer}: merged experts behind the rows of all experts, some of which were pruned",
                where="router=remap",
                next="use router: dominant, or write the pruned checkpoint and merge that",
            )
        kept = before.kept
        picks = tuple(
            Pick(tuple(Part(kept[p.expert], p.weight, p.neurons) for p in pick.parts)) for pick in after.picks
        )
        layers.append(LayerPlan(after.layer, before.experts, picks, router=after.router))
    return replace(second, source=first.source, layers=tuple(layers), made_by=dict(made_by))

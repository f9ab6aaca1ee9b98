"""Two plans, one after the other, as one plan for the source of the first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from moezip.errors import CheckpointError, PlanError
from moezip.plan.merged import digest_of
from moezip.plan.packed import Values
from moezip.plan.plan import LayerPlan, Part, Pick, Plan

if TYPE_CHECKING:
    import torch

NEXT = "write the checkpoint that the first one makes, and go on from there"


def require_onward(first: Plan, *, merging: bool, neurons: bool = False) -> None:
    """Raises PlanError for a plan that no other can come after.

    Args:
        merging: whether the other one merges. neurons: whether it takes neurons out of experts.
    """
    if first.packing or first.factors or not all(layer.whole for layer in first.layers):
        what = "codes" if first.packing else "factors" if first.factors else "some neurons of its experts alone"
        raise PlanError(f"after a plan that keeps {what} there can be none that chooses experts", next=NEXT)
    if merging and first.merges:
        raise PlanError("after a plan that merges there can be none that merges again", next=NEXT)
    if neurons and first.merges:
        raise PlanError("neurons cannot be taken out of experts that are merged by a plan", next=NEXT)
    for layer in first.layers:
        if layer.router == "remap":
            raise PlanError(
                f"layer {layer.layer}: the router keeps the rows of all experts (router=remap); those of an expert "
                "that was then pruned would lead nowhere",
                next="merge with --set router=dominant or sum where a prune is to follow",
            )


def after_pruning(first: Plan, second: Plan, made_by: Mapping[str, Any]) -> Plan:
    """What ``second`` makes of the view of ``first``, which chooses whole experts. Its solved values stay as they are.

    Args:
        second: for the view of ``first``: it numbers experts as that does.
        made_by: for the reader of the plan.

    Raises:
        PlanError: ``first`` takes neurons, merges or packs, or ``second`` keeps the rows of all experts: those that
            were pruned have none, and no expert that they could lead to.
    """
    require_onward(first, merging=True)
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


def after_merging(
    first: Plan, values: Values | None, second: Plan, made_by: Mapping[str, Any]
) -> tuple[Plan, Values | None]:
    """What ``second``, which chooses whole experts, keeps of the view of ``first``, and the solved values of that.

    Args:
        first: a merge, or a choice of whole experts. values: its solved values, if it has any.
        second: for the view of ``first``: it numbers experts as that does.
        made_by: for the reader of the plan.

    Raises:
        PlanError: as of ``require_onward``, or ``second`` takes neurons out of experts that ``first`` merges.
    """
    require_onward(first, merging=False, neurons=not all(layer.whole for layer in second.layers))
    layers = []
    for before, after in zip(first.layers, second.layers, strict=True):
        picks = []
        for pick in after.picks:
            old = before.picks[pick.kept]
            picks.append(old if pick.neurons is None else Pick((Part(old.kept, 1.0, pick.neurons),)))
        protected = tuple(before.picks[place].kept for place in after.protected)
        layers.append(LayerPlan(after.layer, before.experts, tuple(picks), (), protected, before.router))
    mtp = second.mtp if first.mtp == "keep" else "drop"
    plan = replace(second, source=first.source, layers=tuple(layers), mtp=mtp, made_by=dict(made_by))
    if values is None or not first.solved:
        return plan, None
    chosen = Chosen(values, first.solved, {layer.layer: layer.kept for layer in second.layers})
    return replace(plan, values=digest_of(chosen, chosen.names()), solved=tuple(chosen.names())), chosen


@final
class Chosen:
    """Those solved values of a merge that belong to experts which stay, under their new numbers.

    Args:
        values: of the merge. solved: their names.
        kept: by layer, the merge's experts that stay, in the order of the output.
    """

    def __init__(self, values: Values, solved: Sequence[str], kept: Mapping[int, Sequence[int]]):
        self._values, self._kept = values, kept
        self._origin: dict[str, str] = {}
        places = {layer: {old: new for new, old in enumerate(some)} for layer, some in kept.items()}
        for name in solved:
            if found := re.fullmatch(r"layers\.(\d+)\.experts\.(\d+)\.([\w.]+)", name):
                new = places[int(found[1])].get(int(found[2]))
                if new is not None:
                    self._origin[f"layers.{found[1]}.experts.{new}.{found[3]}"] = name
            else:
                self._origin[name] = name

    def names(self) -> list[str]:
        return list(self._origin)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Raises CheckpointError if there is no such value."""
        if name not in self._origin:
            raise CheckpointError(f"{name} is no value of the plan")
        if found := re.fullmatch(r"layers\.(\d+)\.router\.\d+", name):
            value = self._values.read(name)[list(self._kept[int(found[1])])]
        else:
            value = self._values.read(self._origin[name])
        return value if rows is None else value[rows.start : rows.stop]

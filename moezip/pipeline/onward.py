"""Going on from a plan: a model is seen through it, and what is decided there becomes one plan with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from moezip.arch.families import identify
from moezip.checkpoint.reader import Checkpoint
from moezip.export.readers import planned
from moezip.pipeline.common import Opened
from moezip.plan.compose import after_merging, after_pruning, require_onward
from moezip.plan.packed import Values
from moezip.plan.plan import Plan

# Where one choice follows another, in the report.
OBSERVED = (
    "text was read again through the plan before: its routers send tokens elsewhere, so no statistics of the model "
    "itself could be used; statistics of weights are those of the experts that it makes"
)


def seen_through(model: Opened, plan: Plan | None, values: Values | None = None, *, merging: bool = False) -> Opened:
    """The model as a plan leaves it; itself without one.

    Args:
        values: the plan's solved values. merging: whether what comes next merges.

    Raises:
        PlanError: a plan that does not fit the model, or that nothing can come after.
    """
    if plan is None:
        return model
    require_onward(plan, merging=merging)
    view = planned(model.source, plan, None, values)
    entry = identify(view.config, view.folder)
    # whatever calibrates, prunes or merges takes any Source; only whoever writes needs the checkpoint
    return Opened(cast(Checkpoint, view), entry, tuple(entry.layer_facts(view.config)))


def joined(
    first: Plan | None, first_values: Values | None, second: Plan, second_values: Values | None
) -> tuple[Plan, Values | None]:
    """Both plans as one for the model itself, with its solved values; the second alone where there is no first."""
    if first is None:
        return second, second_values
    made_by = provenance(first.made_by, second.made_by)
    if second.merges:
        return after_pruning(first, second, made_by), second_values
    return after_merging(first, first_values, second, made_by)


def provenance(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Of both decisions. A predicted rise is that of both, or of none: the second predicts what comes on top."""
    both = {**second, "after": dict(first)}
    both.pop("price_factors", None)
    if (more := both.pop("predicted_nats", None)) is not None and "predicted_nats" in first:
        both["predicted_nats"] = first["predicted_nats"] + more
    return both

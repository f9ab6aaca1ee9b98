"""The merge steps of a recipe: of the model itself, or of what a prune step of the same job leaves of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moezip.arch.families import identify
from moezip.calibrate.data import DomainText
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import RecipeError
from moezip.pipeline.calibrate import run_calibration
from moezip.pipeline.common import Common, Opened
from moezip.pipeline.merge import MergeJob, Prepared, make_merge_plan, passing, prepare_merge
from moezip.plan.apply import Applied
from moezip.plan.compose import after_pruning
from moezip.plan.packed import LayerFiles, Values
from moezip.plan.plan import LayerPlan, Pick, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moezip.calibrate.statistics import Statistics
    from moezip.pipeline.prune import Prepared as Pruning
    from moezip.recipe import Recipe
    from moezip.recipe.shape import Merge


@dataclass(frozen=True, slots=True)
class Decided:
    """What the steps of a job have decided so far.

    Attributes:
        plan: for the recipe's model, None as long as it stays as it is. values: its solved values, None without any.
        stats: that the last of them decided with. notes: for the report.
    """

    plan: Plan | None
    values: Values | None
    stats: Statistics | None
    notes: tuple[str, ...]


def merge_job(recipe: Recipe, step: Merge) -> MergeJob:
    """The step as ``moezip merge`` would be asked for it."""
    names = recipe.calibration if step.calibration is None else step.calibration
    entries = {name: recipe.calibration[name] for name in names}
    settings = {key: str(value) for key, value in step.settings.items()}
    texts = tuple(DomainText(name, entry.data, entry.tokens) for name, entry in entries.items())
    weights = {name: entry.weight for name, entry in entries.items()}
    return MergeJob(step.method, step.keep, step.ratio, settings, texts, weights=weights, scope=step.scope)


def seen_through(model: Opened, plan: Plan | None) -> Opened:
    """The model as a plan leaves it; itself without one."""
    if plan is None:
        return model
    view = Applied(model.source, plan)
    entry = identify(view.config, view.folder)
    # whatever calibrates or merges takes any Source; only whoever writes needs the checkpoint
    return Opened(cast(Checkpoint, view), entry, tuple(entry.layer_facts(view.config)))


def check_merge(recipe: Recipe, model: Opened, step: Merge, pruning: Pruning | None, common: Common) -> Prepared:
    """Raises what can be known before any text is read; after a prune, for as many experts as that will leave."""
    plan = None
    if pruning is not None:
        if pruning.method.unit != "expert":
            raise RecipeError(
                f"{pruning.method.name} takes neurons out of experts, whose averages then have no common width",
                next="merge in one job, prune in another, or prune whole experts",
            )
        layers = []
        for fact in model.facts:
            size, each = fact.experts // fact.groups, pruning.keep // fact.groups
            kept = [group * size + place for group in range(fact.groups) for place in range(each)]
            layers.append(LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, kept))))
        plan = Plan(model.source.fingerprint, model.architecture.name, tuple(layers))
    prepared = prepare_merge(str(model.source.folder), merge_job(recipe, step), common, seen_through(model, plan))
    if pruning is not None and prepared.params.router == "remap":
        raise RecipeError(
            "router=remap keeps the rows of all experts, and some of them are pruned before",
            next="use router: dominant, or give the merge a job of its own",
        )
    return prepared


@contextmanager
def merging(
    recipe: Recipe,
    model: Opened,
    step: Merge,
    first: Plan | None,
    stats: Statistics | None,
    common: Common,
    folder: Path,
) -> Iterator[Decided]:
    """Decides, and keeps the solved values in ``folder`` until what is made of them is written.

    Args:
        first: plan of the prune before it. stats: of the model, where nothing was pruned: what is left of a model
            routes its tokens in another way, so it is observed again.
    """
    job, seen = merge_job(recipe, step), seen_through(model, first)
    prepared = prepare_merge(str(model.source.folder), job, common, seen)
    notes: tuple[str, ...] = ()
    if first is not None:
        stats = run_calibration(seen, job.texts, common, workdir=folder / "calibrate", **passing(prepared))
        notes = ("what the prune left was observed again before it was merged",)
    plan, solved, more = make_merge_plan(prepared, job, stats, common, folder / "merge")
    values = LayerFiles(solved.folder) if plan.solved else None
    if first is not None:
        plan = after_pruning(first, plan, _provenance(plan.made_by, first.made_by))
    yield Decided(plan, values, stats, (*notes, *more))
    shutil.rmtree(folder)


def _provenance(merged: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    """Of both decisions. The rise that the second predicts is one on top of the first's, which is not known here."""
    return {**{key: value for key, value in merged.items() if key != "predicted_nats"}, "after": dict(pruned)}

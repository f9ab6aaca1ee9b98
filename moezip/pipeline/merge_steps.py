"""The steps of a recipe that merge, and those that go on from what the step before them decided."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.calibrate.data import DomainText
from moezip.errors import RecipeError
from moezip.pipeline.calibrate import run_calibration
from moezip.pipeline.common import Common, Opened
from moezip.pipeline.merge import MergeJob, Prepared, make_merge_plan, passing, prepare_merge
from moezip.pipeline.merge_estimate import any_groups
from moezip.pipeline.onward import OBSERVED, joined, seen_through
from moezip.pipeline.probes import probing
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune
from moezip.pipeline.prune import passing as prune_passing
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
    return MergeJob(
        step.method, step.keep, step.ratio, settings, texts, weights=weights, scope=step.scope, reader=step.reader
    )


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


def check_prune(model: Opened, job: PruneJob, merge: Prepared, scope: str, common: Common) -> Pruning:
    """Raises what can be known before any text is read of a prune after a merge."""
    params = merge.params
    reason = None
    if params.router == "remap":
        reason = "router=remap keeps the rows of all experts, and those of a pruned one would lead nowhere"
    elif merge.method.factored is not None:
        reason = f"{merge.method.name} stores experts as factors, which are not pruned"
    elif scope == "model":
        reason = "--scope model leaves layers that differ, which are not compressed again"
    layers = tuple(any_groups(fact, merge.keep, "kept") for fact in model.facts)
    view = seen_through(model, Plan(model.source.fingerprint, model.architecture.name, layers))
    prepared = prepare_prune(str(model.source.folder), job, common, view)
    if prepared.method.unit != "expert":
        reason = f"{prepared.method.name} takes neurons out of experts, and merged ones are not there yet"
    if reason is not None:
        raise RecipeError(reason, next="give the merge a job of its own, and prune its output with `moezip prune`")
    return prepared


def pruned(model: Opened, job: PruneJob, before: Decided, common: Common, folder: Path) -> Decided:
    """A prune of what a merge made. Work is left in ``folder``."""
    assert before.plan is not None
    seen = seen_through(model, before.plan, before.values)
    prepared = prepare_prune(str(model.source.folder), job, common, seen)
    stats, notes = None, before.notes
    if prepared.method.reads_text:
        asked = {**prune_passing(prepared), **probing([(prepared.method, prepared.params)])}
        stats = run_calibration(seen, job.texts, common, workdir=folder / "again", **asked)
        notes = (*notes, OBSERVED)
    plan, values = joined(before.plan, before.values, make_plan(prepared, job, stats, common), None)
    return Decided(plan, values, stats, notes)


def merge_after(
    job: MergeJob, model: Opened, first: Plan | None, stats: Statistics | None, common: Common, folder: Path
) -> Decided:
    """Decides, and leaves the solved values in ``folder``.

    Args:
        first: plan of the prune before it. stats: of the model, where nothing was pruned: what is left of a model
            routes its tokens in another way, so it is observed again.
    """
    seen = seen_through(model, first, merging=True)
    prepared = prepare_merge(str(model.source.folder), job, common, seen)
    notes: tuple[str, ...] = ()
    if first is not None:
        stats = run_calibration(seen, job.texts, common, workdir=folder / "calibrate", **passing(prepared))
        notes = (OBSERVED,)
    plan, solved, more = make_merge_plan(prepared, job, stats, common, folder / "merge")
    plan, values = joined(first, None, plan, LayerFiles(solved.folder) if plan.solved else None)
    return Decided(plan, values, stats, (*notes, *more))


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
    """Decides, and keeps the solved values in ``folder`` until what is made of them is written."""
    yield merge_after(merge_job(recipe, step), model, first, stats, common, folder)
    shutil.rmtree(folder)

"""A recipe from its first job to its last."""

from __future__ import annotations

from dataclasses import replace

from moezip.errors import RecipeError
from moezip.pipeline.batch.calibration import Observed
from moezip.pipeline.batch.jobs import Batch, JobResult
from moezip.pipeline.batch.state import State, write
from moezip.pipeline.common import Common, opened
from moezip.recipe import Recipe, dump


def run_recipe(recipe: Recipe, common: Common, only: str | None = None) -> list[JobResult]:
    """Every job of the recipe (or the one called ``only`` and what it needs), in order of need.

    Raises:
        RecipeError: no such job, no output, or an output folder that is not a recipe's.
    """
    if recipe.output is None:
        raise RecipeError("the recipe does not say where to", next="add `output: FOLDER`, or give --set output=FOLDER")
    folder = recipe.output
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "recipe.yaml").is_file())):
        raise RecipeError(
            "the output folder holds something else than a recipe's results", where=folder, next="name another folder"
        )
    names = recipe.order()
    if only is not None:
        names = _with_needs(recipe, only)
    common = replace(common, seed=recipe.seed, seq_len=common.seq_len or recipe.seq_len, resume=True)
    state = State(folder)
    batch = Batch(recipe, folder, common, state, Observed(recipe, folder, common, opened(recipe.model), state))
    open_jobs = [name for name in names if batch.finished(name) is None]
    for name in open_jobs:
        batch.check(name)
    write(folder / "recipe.yaml", dump(recipe))
    try:
        batch.observed.calibrate(batch.observed.wanted(recipe.jobs[name] for name in open_jobs))
        return [batch.run(name) for name in names]
    except KeyboardInterrupt as stop:
        stop.add_note("finished jobs and statistics are kept: the same command again goes on from there")
        raise


def _with_needs(recipe: Recipe, only: str) -> list[str]:
    from moezip.registry import lookup

    lookup(only, recipe.jobs, "job")
    wanted, queue = {only}, [only]
    while queue:
        for name in recipe.jobs[queue.pop()].needs:
            if name not in wanted:
                wanted.add(name)
                queue.append(name)
    return [name for name in recipe.order() if name in wanted]

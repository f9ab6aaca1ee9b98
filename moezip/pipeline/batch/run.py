"""A recipe from its first job to its last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from moezip.errors import MoezipError, RecipeError, UsageError
from moezip.pipeline.batch.jobs import Batch, JobResult
from moezip.pipeline.batch.state import State, write
from moezip.pipeline.batch.summary import write_summary
from moezip.pipeline.common import Common, opened
from moezip.recipe import Recipe, dump
from moezip.registry import did_you_mean

Tell = Callable[[JobResult], None]


@dataclass(slots=True)
class _Run:
    """What has become of each job so far.

    Attributes:
        tell: called with every job that failed or cannot run, as soon as that is known.
        strict: the first failure ends the run, with its traceback.
    """

    batch: Batch
    tell: Tell
    strict: bool
    results: dict[str, JobResult] = field(default_factory=dict)

    def attempt(self, name: str, work: Callable[[], JobResult | None]) -> None:
        """The result of ``work``, if it has one, or the failure that it ends in, is the job's."""
        try:
            found = work()
            if found is not None:
                self.results[name] = found
        except Exception as error:
            if self.strict:
                raise
            self.fail(name, _explained(name, error))
            self.tell(self.results[name])

    def fail(self, name: str, error: MoezipError) -> None:
        told = {"what": error.what, "where": error.where, "next": error.next}
        self.results[name] = JobResult(name, status="failed", error=told)

    def blocked(self, name: str) -> bool:
        """Whether a job that this one needs was not done; that is then its result."""
        for needed in self.batch.recipe.jobs[name].before:
            if (before := self.results.get(needed)) is not None and before.status != "done":
                so = "which failed" if before.status == "failed" else "which could not run either"
                told = {"what": f"it needs {needed!r}, {so}", "where": f"jobs.{name}", "next": None}
                self.results[name] = JobResult(name, status="not run", error=told)
                self.tell(self.results[name])
                return True
        return False


def run_recipe(
    recipe: Recipe, common: Common, only: str | None = None, tell: Tell = lambda result: None, strict: bool = False
) -> list[JobResult]:
    """Every job of the recipe (or the one, or the sweep, called ``only`` and what it needs), in order of need.

    A job that fails does not stop the others.

    Args:
        tell: called with every job that failed or cannot run, as soon as that is known.
        strict: the first failure is raised as it is.

    Raises:
        RecipeError: no such job, no output, or an output folder that is not a recipe's.
        MoezipError: no job can run.
    """
    folder = output_of(recipe)
    names = chosen(recipe, only)
    batch = batch_of(recipe, folder, common)
    run = _Run(batch, tell, strict)
    failed: list[MoezipError] = []
    for name in names:
        try:
            if (found := batch.finished(name)) is None:
                batch.check(name)
            else:
                run.results[name] = found
        except Exception as error:
            if strict:
                raise
            failed.append(_explained(name, error))
            run.fail(name, failed[-1])
    if len(failed) == len(names):
        if len(failed) > 1:
            failed[0].add_note(f"none of the {len(failed)} jobs can run; this is why the first one cannot")
        raise failed[0]
    for result in run.results.values():
        if result.status == "failed":
            tell(result)
    batch.open = [name for name in names if name not in run.results]
    if (text := dump(recipe)) != _text(folder / "recipe.yaml"):
        write(folder / "recipe.yaml", text)
    try:
        for name in batch.open:
            if not run.blocked(name):
                run.attempt(name, lambda name=name: batch.run(name))  # type: ignore[misc]
            write_summary(batch, run.results)
        write_summary(batch, run.results)
    except KeyboardInterrupt as stop:
        stop.add_note("finished jobs and statistics are kept: the same command again goes on from there")
        raise
    if all(run.results[name].status == "done" for name in recipe.jobs if name in run.results or only is None):
        _forget(batch.work, every=only is None)
    return [run.results[name] for name in names]


def output_of(recipe: Recipe) -> Path:
    """The output folder. Raises RecipeError if there is none, or it holds something else than a recipe's results."""
    if recipe.output is None:
        raise RecipeError("the recipe does not say where to", next="add `output: FOLDER`, or give --set output=FOLDER")
    folder = recipe.output
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "recipe.yaml").is_file())):
        raise RecipeError(
            "the output folder holds something else than a recipe's results", where=folder, next="name another folder"
        )
    return folder


def batch_of(recipe: Recipe, folder: Path, common: Common) -> Batch:
    """The recipe, ready to run. Raises what makes every job impossible: an unreadable model or state."""
    common = replace(common, seed=recipe.seed, seq_len=common.seq_len or recipe.seq_len, resume=True)
    state = State(folder)
    state.read()
    opened(recipe.model)
    return Batch(recipe, folder, common, state)


def chosen(recipe: Recipe, only: str | None) -> list[str]:
    """All jobs, or the job or sweep called ``only`` and what it needs, in order of need.

    Raises:
        UsageError: no such job.
    """
    if only is None:
        return recipe.order()
    if only not in recipe.jobs and only not in recipe.sweeps:
        known = [*recipe.jobs, *recipe.sweeps]
        raise UsageError(f"unknown job {only!r}", next=f"{did_you_mean(only, known)}available: {', '.join(known)}")
    queue = list(recipe.sweeps.get(only, (only,)))
    wanted = set(queue)
    while queue:
        for name in recipe.jobs[queue.pop()].before:
            if name not in wanted:
                wanted.add(name)
                queue.append(name)
    return [name for name in recipe.order() if name in wanted]


def _explained(name: str, error: Exception) -> MoezipError:
    if isinstance(error, MoezipError):
        return error
    first = (str(error).splitlines() or [""])[0]
    return MoezipError(
        f"moezip met something that it does not foresee ({type(error).__name__}: {first})",
        next=f"--only {name} --debug shows where; please report it",
    )


def _forget(work: Path, every: bool) -> None:
    """Removes the work folder of a run in which all went well, unless other jobs' work may wait there."""
    if every:
        shutil.rmtree(work, ignore_errors=True)
    elif work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None

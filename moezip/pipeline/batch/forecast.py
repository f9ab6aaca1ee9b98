"""``moezip run --dry-run``: the jobs in order, what they share, sizes and estimates; nothing is read but headers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moezip.errors import MoezipError
from moezip.export.readers import planned
from moezip.export.stock import tensor_bytes
from moezip.pipeline.batch.calibration import after_merging
from moezip.pipeline.batch.jobs import Batch
from moezip.pipeline.batch.run import batch_of, chosen, output_of
from moezip.pipeline.common import Common, Opened
from moezip.pipeline.estimate import DISK_BYTES_PER_SECOND, alike, dry_run, matmul_rate
from moezip.pipeline.merge_estimate import alike as merged_alike
from moezip.pipeline.merge_estimate import any_groups, estimate_merge
from moezip.pipeline.merge_steps import check_merge, check_prune, merge_job
from moezip.pipeline.prune import prepare_prune
from moezip.pipeline.quantize_estimate import estimate_quantize
from moezip.plan.plan import Plan
from moezip.report.overview import overview

if TYPE_CHECKING:
    from moezip.recipe import Recipe
    from moezip.recipe.shape import Evaluate, Merge, Prune

# Of a token, in files of text, where nothing says how many are read; of English in common tokenizers it is 4 and more.
BYTES_PER_TOKEN = 3
# Seconds that every estimate counts for a start of its own; a run starts once.
START = 6.0


@dataclass(frozen=True, slots=True)
class JobForecast:
    """What a job would do.

    Attributes:
        state: ``finished``, ``to run``, ``cannot run`` (and why), or ``not run`` where it needs one of these.
        steps: verbs with methods, in order. reads: calibration sets.
        bytes_after, experts, seconds, memory_bytes: None where they depend on what another job makes.
        seconds: without the calibrations that jobs share.
    """

    name: str
    state: str
    model: str
    needs: tuple[str, ...]
    steps: tuple[str, ...]
    reads: tuple[str, ...]
    bytes_before: int | None = None
    bytes_after: int | None = None
    experts: int | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    error: dict[str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over text that several jobs share.

    Attributes:
        saved: sets whose statistics are there already. seconds: None where the model is not there yet.
    """

    model: str
    sets: dict[str, int]
    saved: tuple[str, ...]
    jobs: tuple[str, ...]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """A recipe's jobs in the order in which they would run; rough sums over those that are to run and are known."""

    output: str
    jobs: list[JobForecast]
    passes: list[Pass]
    seconds: float
    memory_bytes: int
    disk_bytes: int
    assumes: str
    unknown: tuple[str, ...] = ()
    dry_run: bool = field(default=True)


@dataclass(slots=True)
class _Costs:
    """Of one job, as its steps add up; ``per_token`` are seconds of the shared pass."""

    plan: Plan | None = None
    bytes_after: int | None = None
    experts: int | None = None
    bits: float | None = None
    seconds: float = 0.0
    memory: int = 0
    per_token: float = 0.0


def forecast(recipe: Recipe, common: Common, only: str | None = None) -> Forecast:
    """Touches nothing. Raises what ``run_recipe`` raises before any job."""
    folder = output_of(recipe)
    names = chosen(recipe, only)
    batch = batch_of(recipe, folder, common)
    rate = matmul_rate()
    jobs: list[JobForecast] = []
    costs: dict[str, _Costs] = {}
    for name in names:
        found = _state(batch, name, {job.name: job for job in jobs})
        if found.state == "to run" and batch.reachable(name):
            try:
                costs[name] = _job_costs(batch, name, rate)
                found = _with_costs(found, costs[name], overview(batch.observed(name).model.source).bytes)
            except MoezipError as error:
                found = replace(found, state="cannot run", error=_told(error))
        jobs.append(found)
    batch.open = [job.name for job in jobs if job.state == "to run"]
    passes = _passes(batch, costs)
    open_jobs = [job for job in jobs if job.state == "to run"]
    return Forecast(
        str(folder),
        jobs,
        passes,
        seconds=START + sum(job.seconds or 0 for job in open_jobs) + sum(each.seconds or 0 for each in passes),
        memory_bytes=max((job.memory_bytes or 0 for job in open_jobs), default=0),
        disk_bytes=sum(job.bytes_after or 0 for job in open_jobs),
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s",
        unknown=tuple(job.name for job in open_jobs if job.seconds is None),
    )


def _state(batch: Batch, name: str, before: dict[str, JobForecast]) -> JobForecast:
    """What is known of a job without its costs."""
    job = batch.recipe.jobs[name]
    named = JobForecast(name, "to run", batch.model_of(name), job.before, _steps(batch.recipe, name), ())
    blocked = [each for each in job.before if each in before and before[each].state in ("cannot run", "not run")]
    try:
        if blocked:
            told = {"what": f"it needs {blocked[0]!r}, which cannot run", "where": f"jobs.{name}", "next": None}
            return replace(named, state="not run", error=told)
        if (done := batch.finished(name)) is not None:
            report = done.report or {}
            kept = report.get("experts_after") or [None]
            return replace(
                named, state="finished", bytes_before=report.get("bytes_before"), experts=kept[0],
                bytes_after=report.get("bytes_after"), bits_per_weight=report.get("bits_per_weight"),
            )  # fmt: skip
        batch.check(name)
        if batch.reachable(name):
            return replace(named, reads=tuple(batch.observed(name).wanted([job])))
        return replace(named, reads=_read(batch, name))
    except MoezipError as error:
        return replace(named, state="cannot run", error=_told(error))


def _read(batch: Batch, name: str) -> tuple[str, ...]:
    """Calibration sets that the job names, where its model is not there yet."""
    actions = [step.action for step in batch.recipe.jobs[name].steps]
    used = {each for action in actions for each in getattr(action, "calibration", None) or ()}
    return tuple(each for each in batch.recipe.calibration if each in used)


def _steps(recipe: Recipe, name: str) -> tuple[str, ...]:
    said = []
    for step in recipe.jobs[name].steps:
        action = step.action
        about = [getattr(action, key, None) for key in ("method", "solver", "to")]
        if step.quantize is not None and step.quantize.bits is not None:
            about.append(f"{step.quantize.bits:g} bits")
        amounts = [getattr(action, key, None) for key in ("ratio", "keep")]
        about += [
            f"{key} {value:g}" for key, value in zip(("ratio", "keep"), amounts, strict=True) if value is not None
        ]
        said.append(" ".join([step.verb, *(str(word) for word in about if word is not None)]))
    return tuple(said)


def _with_costs(named: JobForecast, costs: _Costs, before: int) -> JobForecast:
    return replace(
        named, bytes_before=before, bytes_after=costs.bytes_after, experts=costs.experts, bits_per_weight=costs.bits,
        seconds=costs.seconds, memory_bytes=costs.memory,
    )  # fmt: skip


def _told(error: MoezipError) -> dict[str, str | None]:
    return {"what": error.what, "where": error.where, "next": error.next}


# -- costs --------------------------------------------------------------------------------------------------


def _job_costs(batch: Batch, name: str, rate: float) -> _Costs:
    job, model = batch.recipe.jobs[name], batch.observed(name).model
    checkpoint, common = batch.checkpoint(batch.model_of(name)), replace(batch.common, workdir=None)
    costs = _Costs()
    for step in job.steps:
        if step.prune is not None and step in after_merging(job):
            _after_merge(batch, name, step.prune, costs)
        elif step.prune is not None:
            asked = batch.prune_job(name, step.prune, texts=True)
            estimate = dry_run(checkpoint, asked, common)
            costs.plan = alike(prepare_prune(checkpoint, asked, common), asked)
            _add(costs, estimate, estimate.pass_seconds)
        if step.merge is not None:
            _merge_costs(batch, name, step.merge, costs)
        if step.quantize is not None:
            quantized = estimate_quantize(checkpoint, batch.quantize_job(name, step.quantize, costs.plan), common)
            costs.bytes_after, costs.bits = quantized.bytes_after, quantized.bits_per_weight
            costs.experts = max(quantized.experts)
            costs.seconds += quantized.seconds - START
            costs.memory = max(costs.memory, quantized.memory_bytes)
        if step.evaluate is not None:
            tokens = evaluated_tokens(step.evaluate)
            seen = overview(model.source)
            runs = 2 if step.evaluate.against else 1
            costs.seconds += runs * tokens * 2 * seen.active_parameters / rate
            costs.seconds += runs * seen.bytes / DISK_BYTES_PER_SECOND
            costs.memory = max(costs.memory, 600 * 2**20 + seen.largest_layer_bytes + runs * tokens * seen.hidden * 2)
        if step.export is not None and costs.bytes_after is not None:
            costs.seconds += 2 * costs.bytes_after / DISK_BYTES_PER_SECOND
    return costs


def _add(costs: _Costs, estimate: Any, pass_seconds: float) -> None:
    costs.bytes_after, costs.experts = estimate.bytes_after, estimate.keep
    costs.seconds += estimate.seconds - START - pass_seconds
    costs.memory = max(costs.memory, estimate.memory_bytes)
    if estimate.tokens:
        costs.per_token = max(costs.per_token, pass_seconds / estimate.tokens)


def _merge_costs(batch: Batch, name: str, step: Merge, costs: _Costs) -> None:
    """Of the model itself, or of what a prune leaves, which is read again."""
    model, common = batch.observed(name).model, replace(batch.common, workdir=None)
    asked = merge_job(batch.recipe, step)
    first = next((each.prune for each in batch.recipe.jobs[name].steps if each.prune is not None), None)
    estimate = estimate_merge(str(model.source.folder), asked, common)
    if costs.plan is None or first is None:
        prepared = check_merge(batch.recipe, model, step, None, common)
        costs.plan = merged_alike(prepared)
        _add(costs, estimate, estimate.pass_seconds)
        return
    pruning = prepare_prune(str(model.source.folder), batch.prune_job(name, first, texts=False), common)
    prepared = check_merge(batch.recipe, model, step, pruning, common)
    _resized(costs, model, prepared.keep)
    costs.seconds += estimate.seconds - START
    costs.memory = max(costs.memory, estimate.memory_bytes)


def _after_merge(batch: Batch, name: str, step: Prune, costs: _Costs) -> None:
    """A prune of what a merge makes, which is read again."""
    observed, common = batch.observed(name), replace(batch.common, workdir=None)
    asked = batch.prune_job(name, step, texts=True)
    merge = next(each.merge for each in batch.recipe.jobs[name].steps if each.merge is not None)
    merged = check_merge(batch.recipe, observed.model, merge, None, common)
    prepared = check_prune(observed.model, asked, merged, merge.scope, common)
    _resized(costs, observed.model, prepared.keep)
    costs.seconds += dry_run(str(observed.model.source.folder), asked, common).seconds - START


def _resized(costs: _Costs, model: Opened, keep: int) -> None:
    layers = tuple(any_groups(fact, keep, "kept") for fact in model.facts)
    costs.plan = Plan(model.source.fingerprint, model.architecture.name, layers)
    costs.bytes_after, costs.experts = tensor_bytes(planned(model.source, costs.plan, None)), keep


def evaluated_tokens(step: Evaluate) -> int:
    """At most so many tokens are read: as asked for, or guessed from the files' sizes."""
    from moezip.calibrate.data import text_files

    sizes = [file.stat().st_size // BYTES_PER_TOKEN for path in (*step.data, *step.tasks) for file in text_files(path)]
    return sum(size if step.tokens is None else min(size, step.tokens) for size in sizes)


def _passes(batch: Batch, costs: dict[str, _Costs]) -> list[Pass]:
    """One per model, for all jobs that are to run on it."""
    by_model: dict[str, list[str]] = {}
    for name in batch.open:
        by_model.setdefault(batch.model_of(name), []).append(name)
    found = []
    for model, names in by_model.items():
        if not batch.reachable(names[0]):
            used = dict.fromkeys(each for name in names for each in _read(batch, name))
            if used:
                sets = {each: batch.recipe.calibration[each].tokens for each in used}
                found.append(Pass(model, sets, (), tuple(names), None))
            continue
        observed = batch.observed(names[0])
        used_by = {name: observed.wanted([batch.recipe.jobs[name]]) for name in names}
        wanted = observed.wanted(batch.recipe.jobs[name] for name in names)
        if not wanted:
            continue
        missing = observed.missing(wanted)
        tokens = {each: batch.recipe.calibration[each].tokens for each in wanted}
        slowest = max(costs[name].per_token for name in names)
        found.append(Pass(
            model, {each: tokens[each] for each in missing}, tuple(each for each in wanted if each not in missing),
            tuple(name for name in names if used_by[name]), slowest * sum(tokens[each] for each in missing),
        ))  # fmt: skip
    return found

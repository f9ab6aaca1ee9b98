"""The jobs of a recipe: what each depends on, what can be known before, and how it runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moezip import __version__
from moezip.calibrate.data import DomainText
from moezip.errors import RecipeError
from moezip.export.formats import COMPRESSED, GPTQ
from moezip.export.stock import tensor_bytes
from moezip.pipeline.apply import write_plan
from moezip.pipeline.batch.calibration import COMPRESS, Observed, after_merging, texts_of
from moezip.pipeline.batch.state import State, digest_of, saved, write
from moezip.pipeline.common import Clock, Common, open_checkpoint, opened
from moezip.pipeline.evaluate import evaluate_command
from moezip.pipeline.export import export_command
from moezip.pipeline.merge_steps import Decided, check_merge, check_prune, merging, pruned
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune
from moezip.pipeline.quantize import QuantizeJob, prepare_quantize, quantize_command
from moezip.progress import Progress, Watch
from moezip.recipe import Recipe
from moezip.recipe.load import export_name
from moezip.recipe.shape import JOB
from moezip.report.report import begin_peak, peak_rss_bytes

if TYPE_CHECKING:
    from moezip.pipeline.prune import Prepared as Pruning
    from moezip.plan.packed import Values
    from moezip.plan.plan import Plan
    from moezip.recipe.shape import Evaluate, Export, Prune, Quantize, Step


@dataclass(frozen=True, slots=True)
class JobResult:
    """What one job ended with.

    Attributes:
        skipped: it was finished before.
        report: of its compression, None if it only measured. evaluations: one per evaluate step, as JSON.
        exports: reports of its exports.
        seconds: of its own steps, over all runs that they took; the calibration that jobs share is not in it.
        peak_rss_bytes: of the process while it ran.
        status: ``failed`` with an ``error`` of what, where and next; ``not run`` where a job that it needs was not
            done.
    """

    name: str
    out: str | None = None
    skipped: bool = False
    report: Mapping[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    status: Literal["done", "failed", "not run"] = "done"
    error: Mapping[str, str | None] | None = None


@dataclass(slots=True)
class Batch:
    """A recipe on its way.

    Attributes:
        models: opened, by the recipe's name for each. open: jobs that are to run, which share calibrations.
    """

    recipe: Recipe
    folder: Path
    common: Common
    state: State
    models: dict[str, Observed] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Where interrupted work waits."""
        inside = self.common.workdir
        return self.folder / "work" if inside is None else inside / f"{self.folder.name}.moezip-work"

    # -- what a job works on --------------------------------------------------------------------------------

    def model_of(self, name: str) -> str:
        """The job's model as the recipe names it: a checkpoint, or ``job:NAME``."""
        return self.recipe.jobs[name].model or self.recipe.model

    def checkpoint(self, model: str) -> str:
        """The folder of a model that a recipe names."""
        return str(self.folder / model.removeprefix(JOB)) if model.startswith(JOB) else model

    def observed(self, name: str) -> Observed:
        """The job's model, opened. Raises CheckpointError where a job that is to make it has not run."""
        model = self.model_of(name)
        if model not in self.models:
            at = model.removeprefix(JOB) if model.startswith(JOB) else f"{Path(model).name}-{digest_of([model])[:8]}"
            own = model == self.recipe.model
            jobs = [job for key, job in self.recipe.jobs.items() if self.model_of(key) == model]
            folder = self.folder / "statistics" / ("" if own else at)
            common = replace(self.common, workdir=None)
            self.models[model] = Observed(
                self.recipe, jobs, folder, self.work, "" if own else f"{at}/", common, opened(self.checkpoint(model)),
                self.state,
            )  # fmt: skip
        return self.models[model]

    # -- digests --------------------------------------------------------------------------------------------

    def output_digest(self, name: str) -> str:
        """Everything that the job's checkpoint depends on."""
        job, observed = self.recipe.jobs[name], self.observed(name)
        model = self.model_of(name)
        before = self.output_digest(model.removeprefix(JOB)) if model.startswith(JOB) else ""
        parts = [__version__, before or observed.model.source.fingerprint, str(self.recipe.seed)]
        parts.append(str(self.recipe.seq_len))
        parts += [f"{observed.digest(each)} {self.recipe.calibration[each].weight}" for each in observed.wanted([job])]
        for step in job.steps:
            again = step.prune if step in after_merging(job) else None
            for action in (again, step.merge, step.quantize):
                for each in () if action is None else action.calibration or self.recipe.calibration:
                    parts += self.state.contents(self.recipe.calibration[each].data)
            if step.verb in COMPRESS:
                parts.append(step.model_dump_json())
        return digest_of(parts)

    def step_digest(self, name: str, step: Step) -> str:
        """Everything that the result of an evaluate or export step depends on."""
        parts = [self.output_digest(name), step.model_dump_json()]
        if step.evaluate is not None:
            parts += self.state.contents((*step.evaluate.data, *step.evaluate.tasks))
            against = step.evaluate.against or ""
            if against.startswith(JOB):
                parts.append(self.output_digest(against.removeprefix(JOB)))
        return digest_of(parts)

    def digest(self, name: str) -> str:
        """Everything that the job's results depend on."""
        job = self.recipe.jobs[name]
        parts = [self.output_digest(name), *(self.step_digest(name, step) for step in job.steps)]
        return digest_of([*parts, *(self.digest(each) for each in job.before), job.model_dump_json()])

    def results_file(self, name: str) -> Path:
        return self.folder / f"{name}.evaluate.json"

    def made(self, name: str) -> bool:
        """Whether the job's checkpoint is there as the recipe wants it."""
        return (
            (self.folder / name).is_dir()
            and self.results_file(name).is_file()
            and self.state.holds(f"output {name}", self.output_digest(name))
        )

    def reachable(self, name: str) -> bool:
        """Whether what the job works on is there: always, but for the outputs of other jobs."""
        model = self.model_of(name)
        before = model.removeprefix(JOB)
        return not model.startswith(JOB) or (self.reachable(before) and self.made(before))

    def finished(self, name: str) -> JobResult | None:
        """The saved results of a job that was finished before, unless the recipe changed or its output is gone."""
        results = self.results_file(name)
        if not results.is_file() or not all(map(self.reachable, (name, *self.recipe.jobs[name].before))):
            return None
        if not self.state.holds(f"job {name}", self.digest(name)):
            return None
        before = saved(results)
        outputs = [before["out"], *(export["out"] for export in before.get("exports", ()))]
        if not all(Path(out).exists() for out in outputs if out is not None):
            return None
        return JobResult(name, skipped=True, **before)

    # -- what can be known before ---------------------------------------------------------------------------

    def check(self, name: str) -> None:
        """Raises what can be known of a job's failure before anything is computed.

        Of a job that works on another one's output, more than its order only once that is there.
        """
        job = self.recipe.jobs[name]
        self._check_order(name)
        if sum(step.prune is not None for step in job.steps) > 1:
            raise RecipeError(
                "a job prunes twice", where=f"jobs.{name}",
                next=f"give the second prune a job of its own, with `model: {JOB}NAME`",
            )  # fmt: skip
        if not self.reachable(name):
            return
        observed, common = self.observed(name), replace(self.common, workdir=None)
        checkpoint = self.checkpoint(self.model_of(name))
        pruning: Pruning | None = None
        for step in observed.prunes([job]):
            pruning = prepare_prune(checkpoint, self.prune_job(name, step), common)
        for merge in (step.merge for step in job.steps if step.merge is not None):
            merged = check_merge(self.recipe, observed.model, merge, pruning, common)
            for after in after_merging(job):
                assert after.prune is not None
                again = self.prune_job(name, after.prune, texts=True)
                check_prune(observed.model, again, merged, merge.scope, common)
        for quantize in (step.quantize for step in job.steps if step.quantize is not None):
            prepare_quantize(checkpoint, self.quantize_job(name, quantize, None), common)
        packed = "quantization_config" in observed.model.source.config or any(step.quantize for step in job.steps)
        for export in (step.export for step in job.steps if step.export is not None):
            if export.to in (COMPRESSED, GPTQ) and not packed:
                raise RecipeError(
                    f"an export to {export.to} takes codes as they are, and this job has none", where=f"jobs.{name}",
                    next="quantize before it",
                )  # fmt: skip

    def writer(self, name: str) -> Step | None:
        """The step whose plan or codes are written: the last one that compresses, None without any."""
        return next((step for step in reversed(self.recipe.jobs[name].steps) if step.verb in COMPRESS), None)

    def _check_order(self, name: str) -> None:
        """Raises RecipeError unless a job prunes and merges, then quantizes, each at most once, nothing between.

        Or prunes several times, which is told elsewhere.
        """
        verbs = [step.verb for step in self.recipe.jobs[name].steps if step.verb != "calibrate"]
        places = [place for place, verb in enumerate(verbs) if verb in COMPRESS]
        given = [verbs[place] for place in places]
        if set(given) <= {"prune"}:
            return
        in_order = len(set(given)) == len(given) and "quantize" not in given[:-1]
        if not in_order or places != list(range(places[0], places[0] + len(places))):
            raise RecipeError(
                f"the job's steps are {', '.join(verbs)}; it may prune and merge, then quantize, each once, one right "
                "behind the other",
                where=f"jobs.{name}",
                next=f"write one job per output; to do a thing again, give it a job of its own with `model: {JOB}NAME`",
            )

    def calibrate(self, name: str) -> None:
        """The statistics of the job's model, for it and all others that are to run on that model."""
        observed, model = self.observed(name), self.model_of(name)
        sharing = [self.recipe.jobs[each] for each in self.open if self.model_of(each) == model]
        observed.calibrate(observed.wanted(sharing))
        observed.require(observed.wanted([self.recipe.jobs[name]]))

    # -- running --------------------------------------------------------------------------------------------

    def run(self, name: str) -> JobResult:
        """One job, from its first step to its last, or its saved results if it was finished before.

        What it has made is saved after every step, so that a run that was stopped goes on behind it.
        """
        if (before := self.finished(name)) is not None:
            return before
        self.check(name)
        job = self.recipe.jobs[name]
        if not (made := self.made(name)):
            self.calibrate(name)
        begun = time.monotonic()
        begin_peak()
        common = replace(self.common, watch=_labelled(name, self.common.watch))
        old = saved(self.results_file(name)) if self.results_file(name).is_file() else {}
        record: dict[str, Any] = {"out": None, "report": None, "evaluations": [], "exports": []}
        spent = float(old.get("seconds", 0.0)) if made else 0.0
        writer = self.writer(name)
        kept = made or writer is None

        def done(entry: str, digest: str) -> None:
            record["seconds"] = spent + time.monotonic() - begun
            record["peak_rss_bytes"] = max(peak_rss_bytes(), int(old.get("peak_rss_bytes", 0)) if made else 0)
            write(self.results_file(name), json.dumps(record, indent=2) + "\n")
            self.state.finish(entry, digest)

        if writer is not None and made:
            record.update(out=old["out"], report=old["report"])
        measured = 0
        for step in job.steps:
            if step is writer and not made:
                out = self.folder / name
                record.update(out=str(out), report=self._compress(name, out, common))
                done(f"output {name}", self.output_digest(name))
            if step.evaluate is None and step.export is None:
                continue
            digest = self.step_digest(name, step)
            source = record["out"] or self.checkpoint(self.model_of(name))
            if step.export is not None:
                out = self.folder / export_name(name, step.export)
                entry = f"export {out.name}"
                found = next((each for each in old.get("exports", ()) if each["out"] == str(out)), None)
                if not (kept and found and out.exists() and self.state.holds(entry, digest)):
                    found = self._export(step.export, source, out, common)
                record["exports"].append(found)
            else:
                assert step.evaluate is not None
                entry = f"evaluation {name} {measured}"
                known = old.get("evaluations", [])
                if kept and measured < len(known) and self.state.holds(entry, digest):
                    record["evaluations"].append(known[measured])
                else:
                    record["evaluations"].append(
                        self._evaluate(step.evaluate, source, common, record["out"] is not None)
                    )
                measured += 1
            done(entry, digest)
        done(f"job {name}", self.digest(name))
        return JobResult(name, **record)

    def _compress(self, name: str, out: Path, common: Common) -> dict[str, Any]:
        """The job's checkpoint; its report."""
        job, observed, writer = self.recipe.jobs[name], self.observed(name), self.writer(name)
        work = self.work / self.output_digest(name)[:16]
        own = replace(common, workdir=None)
        made, report = Decided(None, None, None, ()), None
        with ExitStack() as held:
            for step in job.steps:
                if step.prune is not None and made.plan is not None:
                    made = pruned(observed.model, self.prune_job(name, step.prune, texts=True), made, own, work)
                elif step.prune is not None:
                    made = Decided(self._plan(name, step.prune), None, observed.of(step.prune), ())
                if step.merge is not None:
                    stats = None if made.plan is not None else observed.of(step.merge)
                    merged = merging(self.recipe, observed.model, step.merge, made.plan, stats, own, work)
                    made = held.enter_context(merged)
                if step.quantize is not None:
                    quantize = self.quantize_job(name, step.quantize, made.plan, made.values)
                    again = replace(common, workdir=work, overwrite=True)
                    report = quantize_command(self.checkpoint(self.model_of(name)), out, quantize, again).report
                elif step is writer:
                    assert made.plan is not None
                    reader = (step.prune or step.merge).reader  # type: ignore[union-attr]
                    # what stands there is of an unfinished or a changed job of this very recipe
                    report = write_plan(
                        observed.model.source, made.plan, out, replace(own, overwrite=True), Clock(), made.stats,
                        made.notes, reader, made.values,
                    )  # fmt: skip
        shutil.rmtree(work, ignore_errors=True)
        assert report is not None  # more than a plan was asked for
        return asdict(report)

    def prune_job(self, name: str, step: Prune, *, texts: bool = False) -> PruneJob:
        """The step as ``moezip prune`` would be asked for it, with its ``texts`` where it is to read them itself."""
        entries = {each: self.recipe.calibration[each] for each in self.observed(name).needed(step)}
        weights = {each: entry.weight for each, entry in entries.items()}
        own = [DomainText(each, entry.data, entry.tokens) for each, entry in entries.items()] if texts else ()
        settings = texts_of(step.settings)
        return PruneJob(
            step.method, step.keep, step.ratio, settings, own, weights=weights, scope=step.scope, reader=step.reader
        )

    def _plan(self, name: str, step: Prune) -> Plan:
        job, common = self.prune_job(name, step), replace(self.common, workdir=None)
        prepared = prepare_prune(self.checkpoint(self.model_of(name)), job, common)
        return make_plan(prepared, job, self.observed(name).of(step), common)

    def quantize_job(self, name: str, step: Quantize, plan: Plan | None, values: Values | None = None) -> QuantizeJob:
        """The step as ``moezip quantize`` would be asked for it."""
        names = self.recipe.calibration if step.calibration is None else step.calibration
        entries = {each: self.recipe.calibration[each] for each in names}
        texts = [DomainText(each, entry.data, entry.tokens) for each, entry in entries.items()]
        settings, size = texts_of(step.settings), step.size
        if size is not None and size <= 1 and self.model_of(name).startswith(JOB):
            # a share is of the model that all goes back to, not of what the job before left of it
            size = float(int(size * tensor_bytes(open_checkpoint(self.recipe.source_of(name)))))
        return QuantizeJob(
            step.bits, step.solver, step.allocate, size, step.granularity, step.reader, group=step.group_size,
            settings=settings, texts=texts, plan=plan, values=values,
        )  # fmt: skip

    def _evaluate(self, step: Evaluate, checkpoint: str, common: Common, save: bool) -> dict[str, Any]:
        against = None if step.against is None else self.checkpoint(step.against)
        common = common if step.seq_len is None else replace(common, seq_len=step.seq_len)
        result = evaluate_command(
            checkpoint, common, against=against, data=step.data, tasks=step.tasks, tokens=step.tokens, save=save
        )
        return result.to_json()

    def _export(self, step: Export, checkpoint: str, out: Path, common: Common) -> dict[str, Any]:
        again = replace(common, overwrite=True)
        report = export_command(checkpoint, out, step.to, step.reader, again, texts_of(step.settings))
        return asdict(report)


def _labelled(job: str, watch: Watch) -> Watch:
    """A watch that says which job a stage belongs to."""

    def labelled(step: Progress) -> None:
        watch(replace(step, stage=f"{job}: {step.stage}"))

    return labelled

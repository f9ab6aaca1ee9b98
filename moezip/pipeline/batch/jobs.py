"""The jobs of a recipe: what each depends on, what can be known before, and how it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.calibrate.data import DomainText
from moezip.errors import RecipeError
from moezip.pipeline.batch.calibration import COMPRESS, Observed, after_merging, texts_of
from moezip.pipeline.batch.state import State, digest_of, saved, write
from moezip.pipeline.common import Clock, Common, Opened
from moezip.pipeline.evaluate import evaluate_command
from moezip.pipeline.merge_steps import Decided, check_merge, check_prune, merging, pruned
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune, write_plan
from moezip.pipeline.quantize import QuantizeJob, prepare_quantize, quantize_command
from moezip.progress import Progress, Watch
from moezip.recipe import Recipe

if TYPE_CHECKING:
    from moezip.pipeline.prune import Prepared as Pruning
    from moezip.plan.packed import Values
    from moezip.plan.plan import Plan
    from moezip.recipe.shape import Evaluate, Prune, Quantize


@dataclass(frozen=True, slots=True)
class JobResult:
    """What one job ended with.

    Attributes:
        skipped: it was finished before.
        report: of its compression, None if it only measured. evaluations: one per evaluate step, as JSON.
    """

    name: str
    out: str | None
    skipped: bool
    report: Mapping[str, Any] | None
    evaluations: list[dict[str, Any]]


@dataclass(slots=True)
class Batch:
    """A recipe on its way."""

    recipe: Recipe
    folder: Path
    common: Common
    state: State
    observed: Observed

    @property
    def model(self) -> Opened:
        return self.observed.model

    def digest(self, name: str) -> str:
        """Everything that the job's results depend on."""
        job = self.recipe.jobs[name]
        parts = [__version__, self.model.source.fingerprint, str(self.recipe.seed), str(self.recipe.seq_len)]
        parts += [
            f"{self.observed.digest(each)} {self.recipe.calibration[each].weight}"
            for each in self.observed.wanted([job])
        ]
        parts += [self.digest(each) for each in job.needs]
        for step in job.steps:
            if step.evaluate is not None:
                parts += self.state.contents((*step.evaluate.data, *step.evaluate.tasks))
            again = step.prune if step in after_merging(job) else None
            for action in (again, step.merge, step.quantize):
                for each in () if action is None else action.calibration or self.recipe.calibration:
                    parts += self.state.contents(self.recipe.calibration[each].data)
        parts.append(job.model_dump_json())
        return digest_of(parts)

    def finished(self, name: str) -> JobResult | None:
        """The saved results of a job that was finished before, unless the recipe changed or its output is gone."""
        results = self.folder / f"{name}.evaluate.json"
        if not self.state.holds(f"job {name}", self.digest(name)) or not results.is_file():
            return None
        before = saved(results)
        if before["out"] is not None and not Path(before["out"]).is_dir():
            return None
        return JobResult(name, before["out"], True, before["report"], before["evaluations"])

    def check(self, name: str) -> None:
        """Raises what can be known of a job's failure before anything is computed."""
        self._check_order(name)
        prunes = [step.prune for step in self.recipe.jobs[name].steps if step.prune is not None]
        if len(prunes) > 1:
            raise RecipeError(
                "a job prunes twice, which this version cannot do", where=f"jobs.{name}",
                next="write one job per pruning",
            )  # fmt: skip
        pruning: Pruning | None = None
        for step in self.observed.prunes([self.recipe.jobs[name]]):
            pruning = prepare_prune(self.recipe.model, self._prune_job(step), self.common)
        for merge in (step.merge for step in self.recipe.jobs[name].steps if step.merge is not None):
            merged = check_merge(self.recipe, self.model, merge, pruning, self.common)
            for after in after_merging(self.recipe.jobs[name]):
                assert after.prune is not None
                check_prune(self.model, self._prune_job(after.prune, texts=True), merged, merge.scope, self.common)
        for quantize in (step.quantize for step in self.recipe.jobs[name].steps if step.quantize is not None):
            prepare_quantize(self.recipe.model, self._quantize_job(quantize, None), self.common)

    def writer(self, name: str) -> str | None:
        """The step whose plan or codes are written: the last one that compresses, None without any."""
        return next((s.verb for s in reversed(self.recipe.jobs[name].steps) if s.verb in COMPRESS), None)

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
                next="write one job per output; to do a thing again, run the command on that output",
            )

    def run(self, name: str) -> JobResult:
        """One job, from its first step to its last, or its saved results if it was finished before."""
        if (before := self.finished(name)) is not None:
            return before
        digest = self.digest(name)
        common = replace(self.common, watch=_labelled(name, self.common.watch))
        out: Path | None = None
        report: dict[str, Any] | None = None
        evaluations: list[dict[str, Any]] = []
        made = Decided(None, None, None, ())
        with ExitStack() as held:
            for step in self.recipe.jobs[name].steps:
                if step.prune is not None and made.plan is not None:
                    work = self.folder / "work" / digest[:16]
                    job = self._prune_job(step.prune, texts=True)
                    made = pruned(self.model, job, made, common, work)
                elif step.prune is not None:
                    made = Decided(self._plan(step.prune), None, self.observed.of(step.prune), ())
                if step.merge is not None:
                    stats = None if made.plan is not None else self.observed.of(step.merge)
                    work = self.folder / "work" / digest[:16]
                    made = held.enter_context(
                        merging(self.recipe, self.model, step.merge, made.plan, stats, common, work)
                    )
                if step.quantize is not None:
                    out = self.folder / name
                    report = self._quantize(step.quantize, made.plan, made.values, out, common)
                elif step.verb == self.writer(name):
                    out = self.folder / name
                    report = self._written(made, out, common)
                if step.evaluate is not None:
                    evaluations.append(self._evaluate(step.evaluate, str(out or self.recipe.model), common))
        record = {"out": None if out is None else str(out), "report": report, "evaluations": evaluations}
        write(self.folder / f"{name}.evaluate.json", json.dumps(record, indent=2) + "\n")
        self.state.finish(f"job {name}", digest)
        return JobResult(name, record["out"], False, report, evaluations)  # type: ignore[arg-type]

    def _prune_job(self, step: Prune, *, texts: bool = False) -> PruneJob:
        """The step as ``moezip prune`` would be asked for it, with its ``texts`` where it is to read them itself."""
        entries = {name: self.recipe.calibration[name] for name in self.observed.needed(step)}
        weights = {name: entry.weight for name, entry in entries.items()}
        own = [DomainText(name, entry.data, entry.tokens) for name, entry in entries.items()] if texts else ()
        return PruneJob(step.method, step.keep, step.ratio, texts_of(step.settings), own, weights=weights)

    def _plan(self, step: Prune) -> Plan:
        job = self._prune_job(step)
        prepared = prepare_prune(self.recipe.model, job, self.common)
        return make_plan(prepared, job, self.observed.of(step), self.common)

    def _written(self, made: Decided, out: Path, common: Common) -> dict[str, Any]:
        assert made.plan is not None
        # what stands there is of an unfinished or a changed job of this very recipe
        common = replace(common, overwrite=True)
        report = write_plan(
            self.model.source, made.plan, out, common, Clock(), made.stats, made.notes, values=made.values
        )
        return asdict(report)

    def _quantize_job(self, step: Quantize, plan: Plan | None, values: Values | None = None) -> QuantizeJob:
        names = self.recipe.calibration if step.calibration is None else step.calibration
        entries = {name: self.recipe.calibration[name] for name in names}
        texts = [DomainText(name, entry.data, entry.tokens) for name, entry in entries.items()]
        settings = texts_of(step.settings)
        return QuantizeJob(
            step.bits, step.solver, step.allocate, step.size, step.granularity, group=step.group_size,
            settings=settings, texts=texts, plan=plan, values=values,
        )  # fmt: skip

    def _quantize(
        self, step: Quantize, plan: Plan | None, values: Values | None, out: Path, common: Common
    ) -> dict[str, Any]:
        common = replace(common, overwrite=True)
        report = quantize_command(self.recipe.model, out, self._quantize_job(step, plan, values), common).report
        assert report is not None  # as more than the plan was asked for
        return asdict(report)

    def _evaluate(self, step: Evaluate, checkpoint: str, common: Common) -> dict[str, Any]:
        against = self.recipe.model if step.against == "source" else step.against
        common = common if step.seq_len is None else replace(common, seq_len=step.seq_len)
        result = evaluate_command(
            checkpoint, common, against=against, data=step.data, tasks=step.tasks, tokens=step.tokens
        )
        return result.to_json()


def _labelled(job: str, watch: Watch) -> Watch:
    """A watch that says which job a stage belongs to."""

    def labelled(step: Progress) -> None:
        watch(replace(step, stage=f"{job}: {step.stage}"))

    return labelled

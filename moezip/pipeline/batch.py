"""``moezip run``: a recipe's jobs, sharing what they can; finished ones are skipped, interrupted ones go on.

The output folder holds one checkpoint per job under the job's name, ``statistics/`` with one file per calibration
set, ``<job>.evaluate.json`` with the job's measurements, the resolved ``recipe.yaml``, and ``state.json``, which says
by digest what is finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.calibrate.data import DomainText
from moezip.errors import RecipeError
from moezip.pipeline.calibrate import run_calibration
from moezip.pipeline.common import Clock, Common, Opened, opened
from moezip.pipeline.evaluate import evaluate_command
from moezip.pipeline.merge import passing as merge_passing
from moezip.pipeline.merge_steps import Decided, check_merge, check_prune, merging, pruned
from moezip.pipeline.probes import probing
from moezip.pipeline.prune import PruneJob, counted, make_plan, own_names, prepare_prune, write_plan
from moezip.pipeline.quantize import QuantizeJob, prepare_quantize, quantize_command
from moezip.progress import Progress, Watch
from moezip.recipe import Recipe, dump
from moezip.registry import parse_params

if TYPE_CHECKING:
    from moezip.calibrate.statistics import Statistics
    from moezip.pipeline.prune import Prepared as Pruning
    from moezip.plan.packed import Values
    from moezip.plan.plan import Plan
    from moezip.recipe.shape import Evaluate, Job, Merge, Prune, Quantize, Step
    from moezip.registry import Method


# The steps that change weights. Quantize comes last, the others in any order, each once.
COMPRESS = ("prune", "merge", "quantize")


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
    model: Opened
    statistics: dict[str, Statistics] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.json"

    def state(self) -> dict[str, str]:
        """Digest by name of everything that is finished."""
        if not self._state_file.is_file():
            return {}
        found: dict[str, str] = _saved(self._state_file)
        return found

    def finish(self, name: str, digest: str) -> None:
        _write(self._state_file, json.dumps({**self.state(), name: digest}, indent=2) + "\n")

    # -- calibration ----------------------------------------------------------------------------------------

    def needed(self, step: Prune | Merge) -> list[str]:
        """Calibration sets that a prune step reads, or a merge step of the model itself."""
        from moezip import merge, prune

        methods = {method.name: method for method in (*prune.METHODS, *merge.METHODS)}
        return list(step.calibration or self.recipe.calibration) if methods[step.method].reads_text else []

    def merges(self, jobs: Iterable[Job]) -> list[Merge]:
        """The merge steps that read the model's own statistics: not those of what a prune leaves."""
        return [step.merge for step in map(_first, jobs) if step is not None and step.merge is not None]

    def prunes(self, jobs: Iterable[Job]) -> list[Prune]:
        """The prune steps that read the model's own statistics: not those of what a merge makes."""
        after = {id(step.prune) for job in jobs for step in _after_merging(job)}
        steps = [step.prune for job in jobs for step in job.steps if step.prune is not None]
        return [step for step in steps if id(step) not in after]

    @property
    def record(self) -> list[str] | None:
        """What a pass of this recipe records besides the standing records: gradients, and what methods bring along."""
        from moezip.calibrate.record import GRADIENTS, wants_gradients
        from moezip.plan.allocate import kept_count
        from moezip.prune import METHODS

        experts = self.model.facts[0].experts
        by_name, names = {method.name: method for method in METHODS}, set()
        for prune in self.prunes(self.recipe.jobs.values()):
            method = by_name[prune.method]
            names.update([GRADIENTS] if wants_gradients(method.needs) else [])
            params = parse_params(method, _texts(prune.settings))
            names.update(own_names(method, counted(params, kept_count(experts, prune.keep, prune.ratio))))
        for merge in self.merges(self.recipe.jobs.values()):
            names.update(merge_passing(check_merge(self.recipe, self.model, merge, None, self.common))["record"])
        return sorted(names) or None

    @property
    def prunings(self) -> list[tuple[Method, Any]]:
        """Method and settings of every prune step of the model itself."""
        from moezip.prune import METHODS

        by_name = {method.name: method for method in METHODS}
        steps = self.prunes(self.recipe.jobs.values())
        return [(by_name[s.method], parse_params(by_name[s.method], _texts(s.settings))) for s in steps]

    def wanted(self, jobs: Iterable[Job]) -> list[str]:
        """Calibration sets of all these jobs, in the recipe's order."""
        names: set[str] = set()
        for job in jobs:
            for prune in self.prunes([job]):
                names.update(self.needed(prune))
            for merge in self.merges([job]):
                names.update(self.needed(merge))
            for step in job.steps:
                if step.calibrate is not None:
                    names.update(step.calibrate.calibration or self.recipe.calibration)
        return [name for name in self.recipe.calibration if name in names]

    def calibrate(self, names: list[str]) -> None:
        """Loads saved statistics and takes the missing ones, all in one pass."""
        from moezip.calibrate.statistics import Statistics

        state, missing = self.state(), []
        for name in names:
            file = self.folder / "statistics" / f"{name}.safetensors"
            if file.is_file() and state.get(f"calibration {name}") == self._calibration_digest(name):
                self.statistics[name] = Statistics.load(file)
            else:
                missing.append(name)
        if not missing:
            return
        texts = []
        for name in missing:
            entry = self.recipe.calibration[name]
            texts.append(DomainText(name, entry.data, entry.tokens))
        # a work folder of its own for this very set of calibrations: after a change of the recipe an old one is stale
        key = _digest(self._calibration_digest(name) for name in missing)
        folder = self.folder / "work" / key[:16]
        found = run_calibration(
            self.model, texts, self.common, record=self.record, workdir=folder, **probing(self.prunings)
        )
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        for domain in found.domains:
            alone = replace(found, domains=(domain,))
            alone.save(self.folder / "statistics" / f"{domain.name}.safetensors")
            self.statistics[domain.name] = alone
            self.finish(f"calibration {domain.name}", self._calibration_digest(domain.name))

    def _calibration_digest(self, name: str) -> str:
        entry = self.recipe.calibration[name]
        parts = [self.model.source.fingerprint, str(entry.tokens), str(self.recipe.seq_len), str(self.record)]
        parts.append(str(probing(self.prunings)))
        return _digest([*parts, *self._contents(entry.data)])

    def _contents(self, paths: Iterable[Path]) -> Iterator[str]:
        """Digests of the text files that these paths stand for, each file read once."""
        from moezip.calibrate.data import text_files

        for path in paths:
            for file in text_files(path):
                if file not in self.digests:
                    with file.open("rb") as stream:
                        self.digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
                yield f"{file.name} {self.digests[file]}"

    # -- jobs -----------------------------------------------------------------------------------------------

    def job_digest(self, name: str) -> str:
        """Everything that the job's results depend on."""
        job = self.recipe.jobs[name]
        parts = [__version__, self.model.source.fingerprint, str(self.recipe.seed), str(self.recipe.seq_len)]
        parts += [
            f"{self._calibration_digest(each)} {self.recipe.calibration[each].weight}" for each in self.wanted([job])
        ]
        parts += [self.job_digest(each) for each in job.needs]
        for step in job.steps:
            if step.evaluate is not None:
                parts += self._contents((*step.evaluate.data, *step.evaluate.tasks))
            again = step.prune if step in _after_merging(job) else None
            for action in (again, step.merge, step.quantize):
                for each in () if action is None else action.calibration or self.recipe.calibration:
                    parts += self._contents(self.recipe.calibration[each].data)
        parts.append(job.model_dump_json())
        return _digest(parts)

    def finished(self, name: str) -> JobResult | None:
        """The saved results of a job that was finished before, unless the recipe changed or its output is gone."""
        results = self.folder / f"{name}.evaluate.json"
        if self.state().get(f"job {name}") != self.job_digest(name) or not results.is_file():
            return None
        saved = _saved(results)
        if saved["out"] is not None and not Path(saved["out"]).is_dir():
            return None
        return JobResult(name, saved["out"], True, saved["report"], saved["evaluations"])

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
        for step in self.prunes([self.recipe.jobs[name]]):
            pruning = prepare_prune(self.recipe.model, self._prune_job(step), self.common)
        for merge in (step.merge for step in self.recipe.jobs[name].steps if step.merge is not None):
            merged = check_merge(self.recipe, self.model, merge, pruning, self.common)
            for after in _after_merging(self.recipe.jobs[name]):
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
        digest = self.job_digest(name)
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
                    made = Decided(self._plan(step.prune), None, self._statistics(step.prune), ())
                if step.merge is not None:
                    stats = None if made.plan is not None else self._statistics(step.merge)
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
        _write(self.folder / f"{name}.evaluate.json", json.dumps(record, indent=2) + "\n")
        self.finish(f"job {name}", digest)
        return JobResult(name, record["out"], False, report, evaluations)  # type: ignore[arg-type]

    def _prune_job(self, step: Prune, *, texts: bool = False) -> PruneJob:
        """The step as ``moezip prune`` would be asked for it, with its ``texts`` where it is to read them itself."""
        entries = {name: self.recipe.calibration[name] for name in self.needed(step)}
        weights = {name: entry.weight for name, entry in entries.items()}
        own = [DomainText(name, entry.data, entry.tokens) for name, entry in entries.items()] if texts else ()
        return PruneJob(step.method, step.keep, step.ratio, _texts(step.settings), own, weights=weights)

    def _statistics(self, step: Prune | Merge) -> Statistics | None:
        stats: Statistics | None = None
        for name in self.needed(step):
            stats = self.statistics[name] if stats is None else stats + self.statistics[name]
        return stats

    def _plan(self, step: Prune) -> Plan:
        job = self._prune_job(step)
        prepared = prepare_prune(self.recipe.model, job, self.common)
        return make_plan(prepared, job, self._statistics(step), self.common)

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
        settings = _texts(step.settings)
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
    batch = Batch(recipe, folder, common, opened(recipe.model))
    open_jobs = [name for name in names if batch.finished(name) is None]
    for name in open_jobs:
        batch.check(name)
    _write(folder / "recipe.yaml", dump(recipe))
    try:
        batch.calibrate(batch.wanted(recipe.jobs[name] for name in open_jobs))
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


def _labelled(job: str, watch: Watch) -> Watch:
    """A watch that says which job a stage belongs to."""

    def labelled(step: Progress) -> None:
        watch(replace(step, stage=f"{job}: {step.stage}"))

    return labelled


def _first(job: Job) -> Step | None:
    """The first step that changes weights."""
    return next((step for step in job.steps if step.verb in COMPRESS), None)


def _after_merging(job: Job) -> list[Step]:
    """The prune steps that come after a merge."""
    first = _first(job)
    return [step for step in job.steps if step.prune is not None and first is not None and first.merge is not None]


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """A recipe's settings as ``--set`` would give them."""
    return {key: str(value) for key, value in settings.items()}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _saved(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise RecipeError(
            f"what an earlier run left is damaged ({fault})", where=path, next="delete this file; its jobs run again"
        ) from fault


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

"""The statistics of a recipe: what its jobs need, and one pass for all of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.calibrate.data import DomainText
from moezip.errors import DataError, MoezipError
from moezip.pipeline.batch.state import State, digest_of
from moezip.pipeline.calibrate import run_calibration
from moezip.pipeline.common import Common, Opened
from moezip.pipeline.merge import passing as merge_passing
from moezip.pipeline.merge_steps import check_merge
from moezip.pipeline.probes import probing
from moezip.pipeline.prune import counted, own_names
from moezip.registry import parse_params

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moezip.calibrate.statistics import Statistics
    from moezip.recipe import Recipe
    from moezip.recipe.shape import Job, Merge, Prune, Step
    from moezip.registry import Method


# The steps that change weights. Quantize comes last, the others in any order, each once.
COMPRESS = ("prune", "merge", "quantize")


@dataclass(slots=True)
class Observed:
    """A model and what is recorded of it for the jobs that work on it, by calibration set.

    Attributes:
        jobs: those that work on this model.
        folder: gets one statistics file per set. work: where an interrupted pass waits. name: in the state, before
            that of a set; empty for the recipe's own model.
        statistics: by set, once there. failed: why a set has none.
        basis: of every set's digest, once it is known.
    """

    recipe: Recipe
    jobs: Sequence[Job]
    folder: Path
    work: Path
    name: str
    common: Common
    model: Opened
    state: State
    statistics: dict[str, Statistics] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)
    basis: list[str] = field(default_factory=list)

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
        after = {id(step.prune) for job in jobs for step in after_merging(job)}
        steps = [step.prune for job in jobs for step in job.steps if step.prune is not None]
        return [step for step in steps if id(step) not in after]

    @property
    def record(self) -> list[str] | None:
        """What a pass for these jobs records besides the standing records: gradients, and what methods bring along."""
        names: set[str] = set()
        for job in self.jobs:
            # what cannot be done needs no records; the check of that job says why it cannot
            with suppress(MoezipError):
                names.update(self._records_of(job))
        return sorted(names) or None

    def _records_of(self, job: Job) -> set[str]:
        from moezip.calibrate.record import GRADIENTS, wants_gradients
        from moezip.plan.allocate import kept_count

        experts, names = self.model.facts[0].experts, set[str]()
        for step in self.prunes([job]):
            method, params = _pruning(step)
            names.update([GRADIENTS] if wants_gradients(method.needs) else [])
            names.update(own_names(method, counted(params, kept_count(experts, step.keep, step.ratio))))
        for merge in self.merges([job]):
            names.update(merge_passing(check_merge(self.recipe, self.model, merge, None, self.common))["record"])
        return names

    @property
    def probes(self) -> dict[str, Any]:
        """How many decisions of which kind the pass measures, for all prune steps of the model itself."""
        return probing(_pruning(step) for step in self.prunes(self.jobs))

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

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def missing(self, names: Iterable[str]) -> list[str]:
        """The sets that have no saved statistics, or others than are wanted."""
        done = {name for name in names if self.file(name).is_file() and self.state.holds(*self._entry(name))}
        return [name for name in names if name not in done]

    def _entry(self, name: str) -> tuple[str, str]:
        return f"calibration {self.name}{name}", self.digest(name)

    def calibrate(self, names: list[str]) -> None:
        """Loads saved statistics and takes the missing ones, all in one pass. What has none is in ``failed``."""
        from moezip.calibrate.statistics import Statistics

        for name in names:
            try:
                missing = bool(self.missing([name]))
            except MoezipError as error:  # text that is not there
                self.failed[name] = error
                continue
            if not missing and name not in self.statistics:
                self.statistics[name] = Statistics.load(self.file(name))
        names = [name for name in names if name not in self.statistics and name not in self.failed]
        if not names:
            return
        try:
            self._pass(names)
        except DataError as error:
            # one faulty text must not take the others along
            readable = [name for name in names if self._readable(name)]
            if len(readable) == len(names):
                self.failed.update(dict.fromkeys(names, error))
            elif readable:
                self.calibrate(readable)
        except Exception as error:
            self.failed.update(dict.fromkeys(names, error))

    def _pass(self, names: list[str]) -> None:
        # a work folder of its own for this very set of calibrations: after a change of the recipe an old one is stale
        work = self.work / digest_of(map(self.digest, names))[:16]
        texts = [self._text(name) for name in names]
        found = run_calibration(
            self.model, texts, self.common, record=self.record, workdir=work, **self.probes
        )  # fmt: skip
        for domain in found.domains:
            alone = replace(found, domains=(domain,))
            self.folder.mkdir(parents=True, exist_ok=True)
            alone.save(self.file(domain.name))
            self.statistics[domain.name] = alone
            self.state.finish(*self._entry(domain.name))
        shutil.rmtree(work, ignore_errors=True)

    def _text(self, name: str) -> DomainText:
        entry = self.recipe.calibration[name]
        return DomainText(name, entry.data, entry.tokens)

    def _readable(self, name: str) -> bool:
        """Whether a set's text can be read; if not, it has failed."""
        from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of

        source = self.model.source
        try:
            load_rows(
                [self._text(name)], tokenizer_of(source.folder), self.common.seq_len or default_seq_len(source.config)
            )
        except DataError as error:
            self.failed[name] = error
        return name not in self.failed

    def digest(self, name: str) -> str:
        """Everything that the statistics of a calibration set depend on."""
        if not self.basis:
            self.basis += [self.model.source.fingerprint, str(self.recipe.seq_len), str(self.record), str(self.probes)]
        entry = self.recipe.calibration[name]
        return digest_of([*self.basis, str(entry.tokens), *self.state.contents(entry.data)])

    def require(self, names: Iterable[str]) -> None:
        """Raises what kept one of these sets from having statistics."""
        for name in names:
            if name in self.failed:
                raise self.failed[name]

    def of(self, step: Prune | Merge) -> Statistics | None:
        """The statistics that a step decides with."""
        stats: Statistics | None = None
        self.require(self.needed(step))
        for name in self.needed(step):
            stats = self.statistics[name] if stats is None else stats + self.statistics[name]
        return stats


def _first(job: Job) -> Step | None:
    """The first step that changes weights."""
    return next((step for step in job.steps if step.verb in COMPRESS), None)


def after_merging(job: Job) -> list[Step]:
    """The prune steps that come after a merge."""
    first = _first(job)
    return [step for step in job.steps if step.prune is not None and first is not None and first.merge is not None]


def _pruning(step: Prune) -> tuple[Method, Any]:
    """Method and settings of a prune step."""
    from moezip.prune import METHODS

    method = {method.name: method for method in METHODS}[step.method]
    return method, parse_params(method, texts_of(step.settings))


def texts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """A recipe's settings as ``--set`` would give them."""
    return {key: str(value) for key, value in settings.items()}

"""The statistics of a recipe: what its jobs need, and one pass for all of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.calibrate.data import DomainText
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
    """A model and what is recorded of it for a recipe's jobs, by calibration set."""

    recipe: Recipe
    folder: Path
    common: Common
    model: Opened
    state: State
    statistics: dict[str, Statistics] = field(default_factory=dict)

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
        """What a pass of this recipe records besides the standing records: gradients, and what methods bring along."""
        from moezip.calibrate.record import GRADIENTS, wants_gradients
        from moezip.plan.allocate import kept_count
        from moezip.prune import METHODS

        experts = self.model.facts[0].experts
        by_name, names = {method.name: method for method in METHODS}, set()
        for prune in self.prunes(self.recipe.jobs.values()):
            method = by_name[prune.method]
            names.update([GRADIENTS] if wants_gradients(method.needs) else [])
            params = parse_params(method, texts_of(prune.settings))
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
        return [(by_name[s.method], parse_params(by_name[s.method], texts_of(s.settings))) for s in steps]

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

        missing = []
        for name in names:
            file = self.folder / "statistics" / f"{name}.safetensors"
            if file.is_file() and self.state.holds(f"calibration {name}", self.digest(name)):
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
        key = digest_of(self.digest(name) for name in missing)
        folder = self.folder / "work" / key[:16]
        found = run_calibration(
            self.model, texts, self.common, record=self.record, workdir=folder, **probing(self.prunings)
        )
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        for domain in found.domains:
            alone = replace(found, domains=(domain,))
            alone.save(self.folder / "statistics" / f"{domain.name}.safetensors")
            self.statistics[domain.name] = alone
            self.state.finish(f"calibration {domain.name}", self.digest(domain.name))

    def digest(self, name: str) -> str:
        """Everything that the statistics of a calibration set depend on."""
        entry = self.recipe.calibration[name]
        parts = [self.model.source.fingerprint, str(entry.tokens), str(self.recipe.seq_len), str(self.record)]
        parts.append(str(probing(self.prunings)))
        return digest_of([*parts, *self.state.contents(entry.data)])

    def of(self, step: Prune | Merge) -> Statistics | None:
        """The statistics that a step decides with."""
        stats: Statistics | None = None
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


def texts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """A recipe's settings as ``--set`` would give them."""
    return {key: str(value) for key, value in settings.items()}

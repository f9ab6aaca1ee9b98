"""One compressed output as a report sees it: what was said when it was written, and what was measured since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moezip.errors import CheckpointError, MoezipError
from moezip.export.reading import Reading, readings
from moezip.export.stock import PLAN, REPORT
from moezip.export.verify import MANIFEST
from moezip.plan.plan import Plan
from moezip.report.measured import Measured, evaluations_of, headline

MEASURE = "moezip evaluate {out} --against {source} --data TEXT --save"


@dataclass(frozen=True, slots=True)
class Run:
    """An output folder, or a job of which only the numbers are left.

    Attributes:
        name: of the folder or job. folder: None where there is none.
        report: ``moezip/report.json``. plan, manifest: None and empty where missing.
        evaluations: all that were saved. readings: who reads it; empty where the checkpoint cannot be opened.
        missing: what a reader of the report would look for and not find, with what to do.
        label: of a job, its methods, one after the other. state: of a job: ``done``, ``failed``, ...; empty for a
            folder. why: of a job that failed.
    """

    name: str
    folder: Path | None
    report: Mapping[str, Any]
    plan: Plan | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Measured, ...] = ()
    readings: tuple[Reading, ...] = ()
    missing: tuple[str, ...] = ()
    label: str = ""
    state: str = ""
    why: str = ""

    @property
    def measured(self) -> Measured | None:
        return headline(self.evaluations)

    @property
    def rise(self) -> float | None:
        """Measured, over all texts, in nats per token."""
        return None if self.measured is None else self.measured.rise

    @property
    def predicted(self) -> float | None:
        """Rise of the loss in nats per token: of all steps together, None unless each has a price."""
        steps = [nats for _, nats in self.steps]
        if len(steps) > 1:
            return None if None in steps else sum(steps)  # type: ignore[arg-type]
        found = self.report.get("predicted_nats")
        return None if found is None else float(found)

    @property
    def bytes_after(self) -> int | None:
        found = self.report.get("bytes_after")
        return None if found is None else int(found)

    @property
    def method(self) -> str:
        """What it was made by: a job's methods, else the plan's, else the report's."""
        return self.label or ", then ".join(name for name, _ in self.steps) or str(self.report.get("method") or "")

    @property
    def steps(self) -> list[tuple[str, float | None]]:
        """What was done one after the other, and the predicted rise of each, in nats per token."""
        found = [] if self.plan is None else _steps(self.plan.made_by)
        # what is written may not be what was priced (routers that stay whole), which the report knows
        return [(found[0][0], self.report.get("predicted_nats"))] if len(found) == 1 else found

    @property
    def texts(self) -> dict[str, int | None]:
        """The texts that it was decided on, and their tokens where those are known."""
        given = self.report.get("statistics") or {}
        named = given.get("domains")
        if isinstance(named, list):
            return {str(name): None for name in named}
        return {str(name): int(count) for name, count in given.items() if isinstance(count, int)}

    @property
    def rise_on_texts(self) -> tuple[float, int] | None:
        """The measured rise on texts of the same names as those that it was decided on, and how many those are."""
        return None if self.measured is None else self.measured.rise_on(self.texts)

    def to_json(self) -> dict[str, Any]:
        """What ``moezip report --json`` says of it."""
        found, measured = dict(self.report), self.measured
        told = None
        if measured is not None:
            told = {
                "nll": measured.nll, "source": measured.source, "rise": measured.rise, "kl": measured.kl,
                "top1_agreement": measured.top1, "tokens": measured.tokens, "date": measured.when,
                "by_file": {d.name: {"nll": d.nll, "source": d.source, "rise": d.rise} for d in measured.domains},
                "rise_on_its_texts": None if self.rise_on_texts is None else self.rise_on_texts[0],
                "tasks": dict(measured.tasks),
            }  # fmt: skip
        return {
            "name": self.name,
            **found,
            "steps": [{"name": name, "predicted_nats": nats} for name, nats in self.steps],
            "measured": told,
            "readers": {each.reader: {"reads": each.reads, "why": each.why} for each in self.readings},
            "command": self.manifest.get("command"),
            "missing": list(self.missing),
            **({"state": self.state, "why": self.why} if self.state else {}),
        }


def _steps(made_by: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The plan's provenance, unrolled: what it goes on from stands inside it."""
    before = made_by.get("chosen_by") or made_by.get("after")
    own, bits, allocate = made_by.get("predicted_nats"), made_by.get("bits"), made_by.get("allocate", "uniform")
    name = str(made_by.get("method", "a saved plan"))
    name += "" if allocate == "uniform" else f", {allocate}"
    name += f", {bits:g} bits" if isinstance(bits, int | float) else ""
    if not isinstance(before, Mapping):
        return [(name, own)]
    if "after" in made_by and own is not None:  # said of both together
        first = before.get("predicted_nats")
        own = None if first is None else own - first
    return [*_steps(before), (name, own)]


def open_run(folder: Path) -> Run:
    """
    Raises:
        CheckpointError: no output of moezip, or damaged files in it.
        PlanError: a damaged plan.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=folder, next="name a folder that moezip wrote")
    if not (folder / REPORT).is_file():
        raise CheckpointError(
            f"it holds no {REPORT}, so moezip has not written it", where=folder,
            next="name the output of prune, merge, quantize, apply, export or run; `moezip inspect` tells of any model",
        )  # fmt: skip
    report = read_object(folder / REPORT)
    missing: list[str] = []
    plan = Plan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    if plan is None:
        missing.append(f"{PLAN}: which experts were kept cannot be shown")
    manifest = read_object(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if not manifest:
        missing.append(f"{MANIFEST}: the command and the checksums are not known")
    evaluations = evaluations_of(folder)
    if headline(evaluations) is None:
        missing.append(f"a measurement: {MEASURE.format(out=folder, source=report.get('source') or 'SOURCE')}")
    elif headline(evaluations).rise is None:  # type: ignore[union-attr]
        missing.append("the source's loss: give `--against SOURCE` to `moezip evaluate --save`")
    found, broken = _readings(folder, report.get("form", "stock"))
    if broken is not None:
        missing.append(f"the weights: {broken}")
    run = Run(folder.resolve().name, folder, report, plan, manifest, evaluations, found)
    if run.predicted is None:
        unpriced = ", ".join(name for name, nats in run.steps if nats is None)
        why = report.get("predicted_nats_reason") or f"{unpriced or 'the method'} has no price"
        missing.append(f"a prediction: {why}")
    return replace(run, missing=tuple(missing))


def _readings(folder: Path, form: str) -> tuple[tuple[Reading, ...], str | None]:
    """Who reads the checkpoint; or why that cannot be told, as numbers alone are worth a report."""
    from moezip.checkpoint.reader import Checkpoint

    try:
        with Checkpoint.open(folder) as checkpoint:
            return readings(checkpoint, form), None  # type: ignore[arg-type]
    except MoezipError as error:
        return (), error.what


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise CheckpointError(
            f"{path.name} is damaged ({type(fault).__name__}: {fault})", where=path, next="write the output again"
        ) from fault
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} is no table", where=path, next="write the output again")
    return found

"""What quantizing ends with: a checkpoint of packed matrices, its report and its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.arch.experts import decoded
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import PlanError
from moezip.export.stock import tensor_bytes
from moezip.pipeline.common import Clock, Common, Opened
from moezip.pipeline.reported import write_reported
from moezip.plan.apply import Applied
from moezip.plan.merged import CheckpointValues, Merged
from moezip.plan.packed import Packed
from moezip.plan.plan import Plan
from moezip.report.card import made_by, model_card
from moezip.report.report import Report

if TYPE_CHECKING:
    from moezip.pipeline.export import Form

NO_PRICE = "there is no price without gradients: use --allocate lp"


def apply_packed(model: Opened, plan: Plan, plan_file: Path, out: Path, common: Common, clock: Clock) -> Report:
    """A saved plan with packed matrices: the codes are those of the checkpoint that the plan lies in.

    Raises:
        PlanError: the plan file lies in no checkpoint, or in one with other codes.
    """
    folder = plan_file.resolve().parent.parent
    if plan_file.name != "plan.json" or not (folder / "config.json").is_file():
        raise PlanError(
            "the plan names grids, and the codes on them are in the checkpoint that it was written with",
            where=plan_file,
            next="name the moezip/plan.json inside that checkpoint, or solve codes: moezip quantize --plan",
        )
    plain = decoded(model.source)
    with Checkpoint.open(folder) as values:
        if plan.merges:  # what is packed is not read, and whatever else was solved is in the checkpoint as it is
            split: Source = Merged(plain, plan, CheckpointValues(values, plan.solved), split=True)
        else:
            split = Applied(plain, plan, split=True)
        packed = Packed(split, plan.packing, values)
        about = About(str(plan.made_by.get("method", "a saved plan")), model, nats=plan.made_by.get("predicted_nats"))
        return write_packed(about, plan, packed, out, common, clock, [])


@dataclass(frozen=True, slots=True)
class About:
    """Whose codes are written, for whom, and what they are predicted to cost."""

    method: str
    model: Opened
    reader: str | None = None
    nats: float | None = None


def write_packed(
    about: About, plan: Plan, packed: Packed, out: Path, common: Common, clock: Clock, notes: Sequence[str]
) -> Report:
    """Writes the packed checkpoint; its report."""
    source = about.model.source
    view, form, warnings = readable(packed, about.reader)
    report = Report(
        out=str(out),
        bytes_before=tensor_bytes(source),
        bytes_after=tensor_bytes(view),
        bits_per_weight=bits_per_weight(packed),
        experts_before=[layer.experts for layer in plan.layers],
        experts_after=[len(layer.picks) for layer in plan.layers],
        predicted_nats=about.nats,
        predicted_nats_reason=None if about.nats is not None else NO_PRICE,
        seconds=0.0,
        peak_rss_bytes=0,
        method=about.method,
        settings=plan.made_by.get("settings", {}),
        source=str(source.folder),
        statistics={each["name"]: each["tokens"] for each in plan.made_by.get("domains", [])},
        stock=False,
        form=form,
        notes=[*notes, *warnings],
    )
    return write_reported(view, plan, out, report, card_of(about, plan, packed, view, report), common, clock)


def readable(packed: Packed, reader: str | None) -> tuple[Source, Form, tuple[str, ...]]:
    """The packed checkpoint in the form that a reader reads, what that form is called, and what to tell its user.

    Raises:
        PlanError: the reader cannot read these codes.
    """
    from moezip.pipeline.export import COMPRESSED, export_of

    if reader in (None, "moezip"):
        return packed, "moezip", ()
    export = export_of(packed, COMPRESSED, reader)
    return export.view, export.form, export.warnings


def card_of(about: About, plan: Plan, packed: Packed, view: Source, report: Report) -> str:
    """The model card of a packed checkpoint."""
    made = made_by(f"solver `{about.method}`")
    text = (
        f"{made}: {len(plan.packing)} matrices are stored in {bits_per_weight(packed):.2f} bits per weight, scales and "
        "zeros counted. Which, and on what text they were solved, is in `moezip/plan.json`; sizes and timings are in "
        "`moezip/report.json`."
    )
    return model_card(about.model.source, view, report, "quantized", [text])


def bits_per_weight(packed: Packed) -> float:
    """Stored bits for each weight of the packed matrices: codes, scales, zeros and padding counted."""
    shapes = {name: packed.base.spec(name).shape for name in packed.packing}
    stored = sum(8 * grid.nbytes(*shapes[name]) for name, grid in packed.packing.items())
    return stored / sum(rows * columns for rows, columns in shapes.values())

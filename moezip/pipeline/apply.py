"""``moezip apply``, and what every command that prunes or merges ends with: the checkpoint that a plan describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.arch.experts import decoded
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.export.mone import Substituted
from moezip.export.readers import VLLM_NOTE, Planned, planned
from moezip.export.stock import tensor_bytes
from moezip.pipeline.calibrate import unrouted
from moezip.pipeline.common import Clock, Common, opened, refuse_output
from moezip.pipeline.plan_files import values_beside
from moezip.pipeline.probes import factor_note
from moezip.pipeline.reported import write_reported
from moezip.plan.apply import Applied
from moezip.plan.packed import Values
from moezip.plan.plan import Plan
from moezip.plan.recoded import Recoded
from moezip.report.card import made_by, model_card, span
from moezip.report.report import Report

if TYPE_CHECKING:
    from moezip.calibrate.statistics import Statistics

NO_PRICE = "there is no price without gradients: use --method nats, or statistics made with --record gradients"
NO_MERGE_PRICE = "merging is priced with gradients and text: --data with --set price=true"
NO_LONGER_THERE = "experts that are gone have no price here, and what their neurons make up for has none"
NO_SUM = "one of the two plans behind it has no price"
RENORMALISED_PRICE = "prices are of gates that the kept experts share anew, which they do not where routers stay whole"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a prune or apply ended with."""

    plan: Plan
    report: Report | None


def apply_command(checkpoint: str, plan_file: Path, out: Path, common: Common, reader: str | None = None) -> Outcome:
    """``moezip apply``: a saved plan, no data."""
    clock = Clock()
    model = opened(checkpoint)
    refuse_output(out, model.source.folder, common)
    plan = Plan.load(plan_file)
    if plan.packing:
        from moezip.pipeline.packed import apply_packed

        return Outcome(plan, apply_packed(model, plan, plan_file, out, common, clock))
    with values_beside(plan, plan_file) as values:
        return Outcome(plan, write_plan(model.source, plan, out, common, clock, None, reader=reader, values=values))


def write_plan(
    source: Checkpoint,
    plan: Plan,
    out: Path,
    common: Common,
    clock: Clock,
    stats: Statistics | None,
    notes: Sequence[str] = (),
    reader: str | None = None,
    values: Values | None = None,
) -> Report:
    """Writes the checkpoint that the plan describes, with its solved ``values``; its report, in which ``notes`` stand
    first.
    """
    applied = planned(source, plan, reader, values)
    report = _report(source, applied, out, stats, notes)
    text = None if applied.changes_nothing else card_of(source, applied, report)
    return write_reported(applied, plan, out, report, text, common, clock)


def card_of(source: Source, applied: Planned, report: Report) -> str:
    """The model card of what a plan made."""
    plan = applied.plan
    width = applied.architecture.layer_facts(applied.source_config)[0].width
    widths = [each for layer in plan.layers for each in layer.widths(width)]
    layers = f"{plan.layers[0].experts} routed experts in each of {len(plan.layers)} MoE layers"
    kept = f"{span(report.experts_after)} of {layers}"
    if plan.merges:
        kept = f"{layers} were merged into {span(report.experts_after)}, which"
    elif not all(layer.whole for layer in plan.layers):
        kept += f", {span(widths)} of {width} neurons in an expert"
    how = made_by(f"method `{report.method}`" if report.method else "a saved plan")
    text = [
        f"{how}: {kept} are left. What was kept, the scores and the "
        "data it was chosen with are in `moezip/plan.json`; sizes and timings in `moezip/report.json`."
    ]
    if isinstance(applied, Applied) and applied.stored_note:
        text += ["", f"Stored codes: {applied.stored_note}."]
    if isinstance(applied, Substituted):
        text += [
            "",
            "The routers are the source's own and still choose among all experts. A dropped one adds nothing, and the "
            "gates of the others do not grow in its place.",
        ]
    return model_card(source, applied, report, "merged" if plan.merges else "pruned", text)


def _report(
    source: Source,
    applied: Planned,
    out: Path,
    stats: Statistics | None,
    more: Sequence[str],
) -> Report:
    plan = applied.plan
    after = tensor_bytes(applied)
    notes = list(more)
    if isinstance(applied, Applied) and applied.stored_note:
        notes.append(applied.stored_note)
    if isinstance(applied, Recoded):
        notes.append(
            f"{applied.recoded} matrices were rounded to fp8 blocks anew; all other codes are the source's bytes"
        )
    elif plan.merges and source.config.get("quantization_config"):
        notes.append(
            "the source's codes were decoded: an average of codes is no code, so the output is plain numbers; pack "
            "them with `moezip quantize`"
        )
    if plan.mtp == "drop" and any(
        applied.architecture.claim(name, source.config).kind == "extra" for name in source.names()
    ):
        notes.append("the multi-token-prediction layers were dropped (keep them with --set mtp=keep)")
    width = applied.architecture.layer_facts(source.config)[0].width
    widths = [each for layer in plan.layers for each in layer.widths(width)]
    if not all(layer.whole for layer in plan.layers):
        share = sum(widths) / (width * len(widths))
        between = f"{min(widths)} to {max(widths)}" if min(widths) < max(widths) else str(widths[0])
        notes.append(f"{share:.2%} of the experts' neurons stay, {between} of {width} in an expert")
    substituted = isinstance(applied, Substituted)
    if substituted:
        notes.append(VLLM_NOTE)
    guard = plan.made_by.get("settings", {}).get("guard")
    if guard and stats is None and "method" in plan.made_by:
        notes.append("the guard for super experts had no recorded outputs to look at")
    if (note := factor_note(plan, stats)) is not None:
        notes.append(note)
    return Report(
        out=str(out),
        bytes_before=tensor_bytes(source),
        bytes_after=after,
        bits_per_weight=8 * after / weights_of(applied),
        experts_before=[layer.experts for layer in plan.layers],
        experts_after=[len(layer.picks) for layer in plan.layers],
        predicted_nats=None if substituted else plan.made_by.get("predicted_nats"),
        predicted_nats_reason=_no_price(plan, substituted),
        seconds=0.0,
        peak_rss_bytes=0,
        price_factors=plan.made_by.get("price_factors", {}),
        method=plan.made_by.get("method"),
        settings=plan.made_by.get("settings", {}),
        source=str(source.folder),
        statistics={} if stats is None else {domain.name: domain.tokens for domain in stats.domains},
        protected={str(layer.layer): list(layer.protected) for layer in plan.layers if layer.protected},
        unrouted={} if stats is None else unrouted(stats),
        stock=not plan.ragged(width),
        form="mone" if substituted else "moezip" if plan.ragged(width) else "stock",
        notes=notes,
    )


def _no_price(plan: Plan, substituted: bool) -> str | None:
    """Why there is no prediction; None where there is one."""
    if substituted:
        return RENORMALISED_PRICE
    if "predicted_nats" in plan.made_by:
        return None
    if "after" in plan.made_by:
        return NO_SUM
    if not plan.merges:
        return NO_PRICE
    return NO_MERGE_PRICE if "price" in plan.made_by.get("settings", {}) else NO_LONGER_THERE


def weights_of(source: Source) -> int:
    """Weights, whatever they are stored in: scales and zero points not counted."""
    plain = decoded(source)
    return sum(plain.spec(name).elements for name in plain.names())

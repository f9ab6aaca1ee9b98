"""``moezip export``: the same weights in the format of another reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moezip.arch.experts import decoded
from moezip.arch.layout import Layout
from moezip.checkpoint.source import Source
from moezip.errors import PlanError, UsageError
from moezip.export.dense import dense
from moezip.export.formats import COMPRESSED, FORMATS, GGUF, GPTQ, SAFETENSORS
from moezip.export.packed import GPTQ_IN_TRANSFORMERS, as_compressed_tensors, as_gptq, codes_of, misread, unread
from moezip.export.readers import READERS
from moezip.export.remade import stock_config
from moezip.export.stock import PLAN, tensor_bytes
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_output
from moezip.pipeline.reported import write_reported
from moezip.registry import lookup
from moezip.report.card import made_by, model_card
from moezip.report.overview import overview
from moezip.report.report import Report

Form = Literal["stock", "moezip", "mone", "compressed-tensors", "gptq"]


@dataclass(frozen=True, slots=True)
class Export:
    """What is written: a view, what it is called in reports, and what its user must be told."""

    view: Source
    form: Form
    warnings: tuple[str, ...] = ()


def export_of(source: Source, to: str, reader: str | None = None) -> Export:
    """``source`` in the format ``to``, which ``reader`` must be able to read.

    Raises:
        UsageError: no such format or reader, or a format that is no checkpoint folder (gguf).
        PlanError: what the format cannot hold, or the reader does not read.
        ArchitectureError: a quantization that moezip cannot decode.
    """
    lookup(to, FORMATS, "format")
    if reader is not None:
        lookup(reader, READERS, "reader")
    if to == GGUF:
        raise UsageError("a GGUF file is no checkpoint folder", where="--to gguf", next="see moezip.pipeline.gguf")
    if to == SAFETENSORS:
        return _plain(source, reader)
    codes = codes_of(source)
    view = as_compressed_tensors(source, codes) if to == COMPRESSED else as_gptq(source, codes)
    refusal = None if reader is None else unread(reader, codes, view)
    if refusal is not None:
        raise PlanError(
            f"{READERS[str(reader)]} would not read it: {refusal}", where=f"--for {reader}",
            next="use --to safetensors, which every reader reads, or quantize with other settings",
        )  # fmt: skip
    if to == GPTQ:
        told = f"do not load it with transformers: {GPTQ_IN_TRANSFORMERS}. GPTQModel reads it, and so does "
        return Export(view, "gptq", (f"{told}moezip.load",))
    wrong = misread(codes, view)
    if wrong is None:
        return Export(view, "compressed-tensors")
    told = f"do not load it with transformers and compressed-tensors, which read it wrongly: {wrong}. vLLM reads it, "
    return Export(view, "compressed-tensors", (f"{told}and so does moezip.load",))


def _plain(source: Source, reader: str | None) -> Export:
    view = decoded(source)
    if view is source and Layout.of(source.config) is None:
        raise PlanError(
            "its weights are plain numbers in stock form already", where=source.folder, next="copy the folder"
        )  # fmt: skip
    if stock_config(source) is None and reader == "moezip":
        if view is source:
            raise PlanError("its weights are plain numbers already", where=source.folder, next="copy the folder")
        return Export(view, "moezip")
    return Export(dense(source), "stock")


def export_command(
    checkpoint: str,
    out: Path,
    to: str,
    reader: str | None,
    common: Common,
    settings: Mapping[str, str] | None = None,
) -> Report:
    """``moezip export``: writes ``checkpoint`` in another format, and proves it complete.

    Args:
        settings: ``--set`` texts; only gguf has any (``moezip.export.gguf.GGUFParams``).
    """
    if to == GGUF:
        from moezip.pipeline.gguf import gguf_command

        return gguf_command(checkpoint, out, reader, common, settings or {})
    if settings:
        raise UsageError(f"--to {to} has no settings", where=f"--set {next(iter(settings))}", next="leave --set out")
    clock = Clock()
    model = opened(checkpoint)
    source = model.source
    with clock.stage("plan"):
        refuse_output(out, source.folder, common)
        export = export_of(source, to, reader)
    plan = source.folder / PLAN
    return write_export(model, export, out, to, plan.read_bytes() if plan.is_file() else None, common, clock)


def write_export(
    model: Opened, export: Export, out: Path, to: str, plan: bytes | None, common: Common, clock: Clock
) -> Report:
    """Writes what ``export_of`` made of the model, with the plan that made the model; its report."""
    base = _report(model, export, out, to)
    extra = None if plan is None else {PLAN: plan}
    return write_reported(export.view, None, out, base, card_of(model, export, base, to), common, clock, extra)


def _report(model: Opened, export: Export, out: Path, to: str) -> Report:
    counts = [fact.experts for fact in model.facts]
    after = tensor_bytes(export.view)
    return Report(
        out=str(out),
        bytes_before=tensor_bytes(model.source),
        bytes_after=after,
        bits_per_weight=8 * after / overview(model.source).parameters,
        experts_before=counts,
        experts_after=counts,
        predicted_nats=None,
        predicted_nats_reason="an export changes no weight",
        seconds=0.0,
        peak_rss_bytes=0,
        method=f"export to {to}",
        source=str(model.source.folder),
        stock=export.form == "stock",
        form=export.form,
        notes=list(export.warnings),
    )


def card_of(model: Opened, export: Export, report: Report, to: str) -> str:
    """The model card of an export."""
    text = f"{made_by('by export')} from a packed checkpoint, as {FORMATS[to]}."
    return model_card(model.source, export.view, report, "exported", [text])

"""``moezip export --to gguf``: one file for llama.cpp in place of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moezip import __version__
from moezip.errors import PlanError
from moezip.export.gguf import GGUFParams, ready, refuse_gguf, write_gguf
from moezip.export.readers import READERS
from moezip.export.stock import tensor_bytes
from moezip.pipeline.common import Clock, Common, opened
from moezip.registry import lookup, read_settings
from moezip.report.overview import overview
from moezip.report.report import Report, peak_rss_bytes

READER = "llamacpp"


def gguf_command(checkpoint: str, out: Path, reader: str | None, common: Common, settings: Mapping[str, str]) -> Report:
    """Writes ``checkpoint`` as the file ``out``; the report is returned and not kept, as a file has no room for it.

    Raises:
        UsageError: no such reader, setting or type, or the package gguf is missing.
        PlanError: a reader of other files, or what llama.cpp does not read or would compute otherwise.
        CheckpointError: the output exists, or numbers that the type cannot hold.
    """
    clock = Clock()
    params: GGUFParams = read_settings(GGUFParams, settings, "gguf")
    if reader is not None and lookup(reader, READERS, "reader") and reader != READER:
        raise PlanError(
            f"GGUF files are written for llama.cpp; what {READERS[reader]} makes of them is not known",
            where=f"--for {reader}",
            next="leave --for out, or choose another format (--to)",
        )  # fmt: skip
    model = opened(checkpoint)
    with clock.stage("plan"):
        refuse_gguf(out, common.overwrite)
        file = ready(model.source, params)
    with clock.stage("write"):
        facts = {"version": __version__, "command": common.command, "source": model.source.fingerprint}
        size = write_gguf(file, out, facts, overwrite=common.overwrite, watch=common.watch)
    counts = [fact.experts for fact in model.facts]
    return Report(
        out=str(out),
        bytes_before=tensor_bytes(model.source),
        bytes_after=size,
        bits_per_weight=8 * file.bytes / overview(model.source).parameters,
        experts_before=counts,
        experts_after=counts,
        predicted_nats=None,
        predicted_nats_reason="what rounding costs is not predicted",
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        stages=dict(clock.stages),
        method="export to gguf",
        settings=asdict(params),
        source=str(model.source.folder),
        stock=False,
        form="gguf",
        notes=list(file.notes),
    )

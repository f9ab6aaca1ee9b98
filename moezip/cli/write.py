"""Commands that write a checkpoint with no choice left to make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moezip import console
from moezip.cli import complete
from moezip.cli.options import Ckpt, Debug, For, Json, Out, Overwrite, Quiet, Set, common_of, settings_of
from moezip.console import results


def apply(
    checkpoint: Ckpt,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out: Out,
    reader: For = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Carries out a saved plan: the same bytes again, with no data."""
    from moezip.pipeline import apply_command

    with console.watching(quiet) as watch:
        outcome = apply_command(checkpoint, plan, out, common_of(watch, overwrite=overwrite), reader)
    results.show_outcome(outcome, out, as_json, quiet)


def export(
    checkpoint: Ckpt,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            autocompletion=complete.formats,
            help="safetensors (plain numbers), compressed-tensors, gptq, or gguf (OUT is then a file; "
            "--set type=F16, BF16, F32, Q8_0, Q4_0 or MXFP4).",
        ),
    ],
    reader: For = None,
    settings: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Writes a checkpoint in the format of another reader; no weight changes, but for the rounding of a GGUF type."""
    from moezip.console.export import show_export
    from moezip.pipeline.export import export_command

    with console.watching(quiet) as watch:
        common = common_of(watch, overwrite=overwrite)
        report = export_command(checkpoint, out, to, reader, common, settings_of(settings))
    show_export(report, as_json, quiet)

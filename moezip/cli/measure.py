"""Commands that run text through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moezip import console
from moezip.cli import complete
from moezip.cli.options import (
    Ckpt,
    Data,
    Debug,
    Device,
    Json,
    MaxMemory,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    SeqLen,
    Tokens,
    Workdir,
    common_of,
    packaged,
)
from moezip.console import results
from moezip.errors import UsageError


def calibrate(
    checkpoint: Ckpt,
    data: Data = None,
    out: Annotated[Path, typer.Option("--out", help="The statistics file to make.")] = Path("statistics.safetensors"),
    tokens: Tokens = 65_536,
    seq_len: SeqLen = None,
    record: Annotated[
        list[str] | None,
        typer.Option("--record", help="Only these statistics. METHOD:KEY=VALUE,... adds a method's own. Default all."),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Runs text through the model once, layer by layer, and saves what its experts did."""
    from moezip.pipeline import calibrate_command

    if not data:
        raise UsageError("calibrate needs text", next="give --data PATH, once per domain")
    with console.watching(quiet) as watch:
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len,
        )  # fmt: skip
        result = calibrate_command(checkpoint, data, out, common, tokens, record)
    if as_json:
        console.data(result)
    elif not quiet:
        domains = ", ".join(f"{name} {count:,}" for name, count in result["domains"].items())
        console.say(f"{out}: {result['tokens']:,} tokens ({domains}) in {console.duration(result['seconds'])}")
        results.say_unrouted(result["unrouted"])
        results.say_super_experts(result["super_experts"])


def evaluate(
    checkpoint: Ckpt,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", autocompletion=complete.checkpoints, help="A reference checkpoint, usually the source."
        ),
    ] = None,
    data: Data = None,
    tasks: Annotated[
        list[Path] | None, typer.Option("--tasks", callback=packaged, help="Questions: .jsonl or a folder of them.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="At most this many per file. Default all.")
    ] = None,
    seq_len: SeqLen = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASK[,TASK...]", help="Tasks for lm-eval: names, .yaml files or folders."),
    ] = None,
    generate: Annotated[
        int, typer.Option("--generate", metavar="N", min=0, help="Continue N documents of --data: repetition, loops.")
    ] = 0,
    speed: Annotated[
        bool, typer.Option("--speed", help="Tokens per second and memory, beside those of --against.")
    ] = False,
    seed: Seed = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the result in CKPT/moezip/evaluation.json, for reports and the card.")
    ] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measures a checkpoint: loss on text, divergence from a reference and task accuracy, all streamed; and, where the
    model fits into memory, what it writes and how fast it is."""
    from moezip.console.evaluation import show_evaluation
    from moezip.pipeline import evaluate_command

    with console.watching(quiet) as watch:
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, seq_len=seq_len, seed=seed
        )  # fmt: skip
        result = evaluate_command(
            checkpoint, common, against=against, data=data or (), tasks=tasks or (), tokens=tokens,
            lm_eval=[name for name in (lm_eval or "").split(",") if name], generate=generate, speed=speed, save=save,
        )  # fmt: skip
    if as_json:
        console.data(result.to_json())
        return
    show_evaluation(result)

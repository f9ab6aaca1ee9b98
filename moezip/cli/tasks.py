"""Tasks and the experts that each needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moezip import console
from moezip.cli import complete
from moezip.cli.options import (
    Ckpt,
    Debug,
    Device,
    Json,
    MaxMemory,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    SeqLen,
    Set,
    Workdir,
    common_of,
    settings_of,
)

app = typer.Typer(
    help="Tasks and the experts that each needs: build the patterns once, then load the original checkpoint for one "
    "task alone, with `moezip.load(CKPT, patterns=PATTERNS, prompt=TEXT)`.",
    no_args_is_help=True,
)


@app.command("build")
def tasks_build(
    checkpoint: Ckpt,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME=DATA", help="A task and text of it; repeat for each, two at least."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The patterns file to make.")] = Path("patterns.json"),
    method: Annotated[
        str, typer.Option("--method", "-m", autocompletion=complete.pruning, help="See `moezip methods`.")
    ] = "tcess",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Experts kept per layer. Default half.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the experts removed.")] = None,
    settings: Set = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens in all, shared over the tasks.")] = 65_536,
    seq_len: SeqLen = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Finds the experts of every task in one pass over their texts, and what a task's prompts look like."""
    from moezip.console.tasks import show_built
    from moezip.pipeline.tasks import TasksJob, build_tasks_command, task_texts

    job = TasksJob(task_texts(task, tokens), method, keep, ratio, settings_of(settings))
    with console.watching(quiet) as watch:
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        built = build_tasks_command(checkpoint, out, job, common)
    show_built(built, out, as_json, quiet)


@app.command("show")
def tasks_show(
    patterns: Annotated[Path, typer.Argument(metavar="PATTERNS", help="What `moezip tasks build` made.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The tasks of a patterns file: which experts they share, and how far apart their prompts are."""
    from moezip.console.tasks import facts, show_patterns
    from moezip.runtime.patterns import Patterns

    found = Patterns.load(patterns)
    if as_json:
        console.data(facts(found))
        return
    show_patterns(found)

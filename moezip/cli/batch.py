"""Commands that run several others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moezip import console
from moezip.cli import complete
from moezip.cli.options import Debug, Device, Json, MaxMemory, Quiet, Set, Workdir, common_of, settings_of
from moezip.console import results
from moezip.progress import unwatched


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            autocompletion=complete.recipes,
            help="A recipe.yaml, or the name of one that comes with moezip.",
        ),
    ],
    only: Annotated[str | None, typer.Option("--only", help="One job or sweep, and what it needs.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, with sizes and estimates; touch nothing.")
    ] = False,
    settings: Set = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Runs a batch of jobs from a recipe; finished ones are skipped, interrupted ones go on."""
    from moezip.console.jobs import show_forecast, show_jobs, tell_failure
    from moezip.pipeline.batch import run_recipe, summary_of
    from moezip.recipe import find, load

    loaded = load(find(recipe), settings_of(settings))
    if dry_run:
        from moezip.pipeline.batch.forecast import forecast

        common = common_of(unwatched, device=device, max_memory=max_memory, workdir=workdir)
        seen = forecast(loaded, common, only)
        show_forecast(seen, as_json)
        raise typer.Exit(int(any(job.error for job in seen.jobs)))
    with console.watching(quiet) as watch:
        common = common_of(watch, device=device, max_memory=max_memory, workdir=workdir)
        found = run_recipe(loaded, common, only, tell_failure, debug)
    show_jobs(found, summary_of(loaded, found), as_json, quiet)
    if any(job.status != "done" for job in found):
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for what the demo makes.")] = Path(
        "moezip-demo"
    ),
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The main job on a small trained model that comes with the package: calibrate, prune to half, measure."""
    from moezip import demo as shipped
    from moezip.console.jobs import show_jobs, tell_failure
    from moezip.pipeline.batch import run_recipe, summary_of
    from moezip.recipe import load

    loaded = load(shipped.recipe(), {"output": str(out)})
    console.say("The demo model reads scripture, country profiles, Python and sums. Half of its 16 experts per layer "
                "go, once chosen for Python by EASY-EP, once by lot.", quiet or as_json)  # fmt: skip
    with console.watching(quiet) as watch:
        found = run_recipe(loaded, common_of(watch, device=device), tell=tell_failure, strict=debug)
    failed = any(job.status != "done" for job in found)
    if as_json or failed:
        show_jobs(found, summary_of(loaded, found), as_json, quiet)
        raise typer.Exit(int(failed))
    results.show_demo(found, loaded.calibration, out, quiet)

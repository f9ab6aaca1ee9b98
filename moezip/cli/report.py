"""``moezip report``: what compressions did and what they cost, for people, browsers and scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moezip.cli.options import Debug, Json


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", help="What moezip wrote; several are compared. Or a folder of `moezip run`."),
    ],
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page that needs no network.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sizes, losses, who can load it, what became of every expert; several outputs or a whole batch side by side."""
    from moezip.console.report import show_report
    from moezip.report.batch import open_runs

    if page is not None:
        from moezip.report.drawing import require
        from moezip.report.file import refuse_page

        refuse_page(page)
        require()
    runs = open_runs(folders)
    if page is not None:
        from moezip.report.file import write_page

        write_page(page, runs, folders)
    show_report(runs, as_json, page)

"""A page on the disk: whole or not at all, and never in the place of something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moezip.errors import UsageError
from moezip.report.page import page
from moezip.report.run import Run

MARK = '<meta name="generator" content="moezip '


def refuse_page(file: Path) -> None:
    """Raises UsageError where a page cannot or should not be written: only earlier pages are replaced."""
    if file.is_dir():
        raise UsageError("the page would be a file, and this is a folder", where=file, next="name a file: report.html")
    if not file.absolute().parent.is_dir():
        raise UsageError("there is no such folder", where=file.parent, next="make it first, or name another file")
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:4096]:
        raise UsageError(
            "this file is there already and is no report of moezip", where=file, next="name another one"
        )  # fmt: skip


def write_page(file: Path, runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Raises UsageError where nothing can be written."""
    refuse_page(file)
    name = runs[0].name if len(runs) == 1 else folders[0].resolve().name
    title = name if len(folders) == 1 else " · ".join(run.name for run in runs[:4]) + (" …" if len(runs) > 4 else "")
    text = page(runs, title)
    temporary = file.with_name(f".{file.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as fault:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"the page cannot be written ({fault.strerror})", where=file, next="name another place"
        ) from fault

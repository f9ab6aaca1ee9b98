"""What people see: progress, tables, errors. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from moezip.errors import MoezipError
from moezip.progress import Progress as Step
from moezip.progress import Watch, unwatched

out = Console(highlight=False, soft_wrap=True)
talk = Console(stderr=True, highlight=False)


def size(count: float) -> str:
    """Bytes for people: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def resident_bytes() -> int:
    """Resident memory of this process now, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Bars:
    """One bar per stage: done of total, tokens per second, memory, time left."""

    def __init__(self, bars: Progress):
        self._bars, self._tasks, self._begun = bars, dict[str, TaskID](), dict[str, tuple[float, int]]()

    def __call__(self, step: Step) -> None:
        if step.stage not in self._tasks or self._bars.tasks[self._tasks[step.stage]].total != step.total:
            self._tasks[step.stage] = self._bars.add_task(step.stage, total=step.total, note="")
            self._begun[step.stage] = (time.monotonic(), step.done)
        self._bars.update(self._tasks[step.stage], completed=step.done, note=self._note(step))

    def _note(self, step: Step) -> str:
        begun, first = self._begun[step.stage]
        notes = [f"{step.done}/{step.total} {step.unit}" if step.unit != "bytes" else size(step.done)]
        elapsed = time.monotonic() - begun
        if step.tokens and step.done > first and elapsed > 0:
            share = (step.done - first) / step.total
            notes.append(f"{step.tokens * share / elapsed:,.0f} tokens/s")
        if memory := resident_bytes():
            notes.append(f"{size(memory)} in memory")
        return ", ".join(notes)


@contextmanager
def watching(quiet: bool) -> Iterator[Watch]:
    """A watch that draws progress on a terminal, prints a line per finished stage elsewhere, and nothing if quiet."""
    if quiet:
        yield unwatched
    elif talk.is_terminal:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=talk, transient=False) as bars:
            yield _Bars(bars)
    else:
        yield _line


def _line(step: Step) -> None:
    if step.done == step.total:
        amount = size(step.total) if step.unit == "bytes" else f"{step.total} {step.unit}"
        say(f"{step.stage}: " + ("done" if step.total == 1 else f"{amount} done"))


def say(text: str, quiet: bool = False) -> None:
    """A sentence to the user, beside the data."""
    if not quiet:
        # lines are folded for people only: a log or a script gets one message per line
        talk.print(text, markup=False, soft_wrap=not talk.is_terminal)


def data(value: Any) -> None:
    """JSON on stdout, and nothing else there."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; numbers to the right."""
    rows = [list(row) for row in rows]
    drawn = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) or row[i] in ("", "-") for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    out.print(drawn)


def pairs(title: str, values: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    drawn = Table(title=title or None, title_justify="left", show_header=False)
    drawn.add_column()
    drawn.add_column(overflow="fold")
    for key, value in values.items():
        drawn.add_row(escape(key), escape(str(value)))
    out.print(drawn)


def fail(error: MoezipError) -> None:
    """One message: what, where, what next."""
    talk.print(f"[bold red]error:[/] {escape(error.what)}", soft_wrap=True)
    if error.where is not None:
        talk.print(f"  where: {escape(error.where)}", soft_wrap=True)
    if error.next is not None:
        talk.print(f"  next:  {escape(error.next)}", soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        talk.print(f"  note:  {escape(note)}", soft_wrap=True)

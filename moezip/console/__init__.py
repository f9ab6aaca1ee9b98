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
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from moezip.errors import MoezipError
from moezip.progress import Progress as Step
from moezip.progress import Watch, unwatched

# Where there is no terminal there is no width to keep to; rich would fold tables at 80.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
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
        self._bars, self._tasks = bars, dict[str, TaskID]()

    def __call__(self, step: Step) -> None:
        now, task = time.monotonic(), self._task(step)
        fields = task.fields
        notes = [f"{step.done}/{step.total} {step.unit}" if step.unit != "bytes" else size(step.done)]
        elapsed, done = now - fields["begun"], step.done - fields["first"]
        if done > 0 and elapsed > 0:
            fields["ends"] = now + elapsed / done * (step.total - step.done)
            if step.tokens:
                notes.append(f"{step.tokens * done / step.total / elapsed:,.0f} tokens/s")
        self._bars.update(task.id, completed=step.done, note=", ".join(notes))

    def _task(self, step: Step) -> Task:
        """The bar of the step's stage; another one where the stage has begun again."""
        known = self._tasks.get(step.stage)
        if known is None or self._at(known).total != step.total or self._at(known).completed > step.done:
            known = self._tasks[step.stage] = self._bars.add_task(
                step.stage, total=step.total, note="", begun=time.monotonic(), first=step.done, ends=None
            )
        return self._at(known)

    def _at(self, known: TaskID) -> Task:
        return next(task for task in self._bars.tasks if task.id == known)


class _Now(ProgressColumn):
    """Memory and time left while a stage runs, its time once it is done.

    The time left is of the whole stage so far: rich's own looks back 30 s, and a layer may take longer than that.
    """

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        now = time.monotonic()
        if task.finished:
            return Text(duration(task.finished_time or 0))
        notes = [f"{size(memory)} in memory"] if (memory := resident_bytes()) else []
        if task.fields["ends"] is not None:
            notes.append(f"{duration(max(task.fields['ends'] - now, 0))} left")
        return Text(", ".join(notes))


@contextmanager
def watching(quiet: bool) -> Iterator[Watch]:
    """A watch that draws progress on a terminal, prints a line per finished stage elsewhere, and nothing if quiet."""
    if quiet:
        yield unwatched
    elif talk.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}", markup=False),
            _Now(),
        )
        with Progress(*columns, console=talk) as bars:
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

"""What the benchmarks share: whole processes with wall time and peak memory, work in turns, tables, results as JSON.

Imports nothing heavy: the peak that the system reports of a process is never below what its parent held when it
was started, so a parent that measures others has to stay small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HERE = Path(__file__).parent
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended: wall seconds from start to exit, peak resident bytes, processor seconds."""

    seconds: float
    peak_rss_bytes: int
    cpu_seconds: float
    output: str


def process(command: Sequence[object], cwd: Path | None = None, **environment: str) -> Finished:
    """Runs ``command`` to its end, in the folder ``cwd`` if one is given.

    Raises:
        SystemExit: it failed; what it said last goes into the message.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as talk:
        begun = time.perf_counter()
        child = subprocess.Popen([str(word) for word in command], stdout=output, stderr=talk, cwd=cwd,
                                 env={**os.environ, **environment})  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if child.returncode:
            talk.seek(0)
            tail = "\n".join((output.read() + talk.read()).splitlines()[-30:])
            raise SystemExit(f"{' '.join(map(str, command))}\nended with {child.returncode}:\n{tail}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Finished(seconds, peak, usage.ru_utime + usage.ru_stime, output.read())


def moezip(*words: str | Path | float) -> list[str]:
    """A ``moezip`` command line for this interpreter."""
    return [sys.executable, "-c", "from moezip.cli import main; main()", *map(str, words)]


def in_turns(rounds: int, work: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Runs every entry once per round, A B A B ..., so that a slow minute of the machine hits all of them."""
    found: dict[str, list[T]] = {name: [] for name in work}
    for number in range(rounds):
        for name, run in work.items():
            say(f"round {number + 1} of {rounds}: {name}")
            found[name].append(run())
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def all_of(values: Sequence[float], digits: int = 2) -> str:
    """Every value, in the order measured."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def say(text: str) -> None:
    """Talk, on stderr."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count(), "load": load}


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept; default a temporary one, removed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    return parser


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """``given``, made; or a temporary folder, removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="moezip-bench-") as folder:
        yield Path(folder)


def save(file: Path | None, values: Mapping[str, Any]) -> None:
    """Writes the values, and the machine, where ``--json`` says."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), **values}, indent=2) + "\n", encoding="utf-8")

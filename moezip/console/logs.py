"""The log of what is done, for whoever looks for a fault: the logger ``moezip`` of the standard library, on stderr.

The library itself adds no handler, not even one that drops everything: without one, Python shows warnings on stderr
and nothing else, and those of moezip are meant to be seen. A program that has a log of its own gets everything.
"""

from __future__ import annotations

import logging
import os

from moezip.errors import UsageError

VARIABLE = "MOEZIP_LOG"
LEVELS = ("debug", "info", "warning", "error")


def show(debug: bool) -> None:
    """Shows the log from the level that MOEZIP_LOG names, or all of it for ``--debug``.

    Raises:
        UsageError: no such level.
    """
    level = "debug" if debug else os.environ.get(VARIABLE, "").strip().lower()
    if not level:
        return
    if level not in LEVELS:
        raise UsageError(f"{level!r} is no level of a log", where=VARIABLE, next=f"use one of {', '.join(LEVELS)}")
    log = logging.getLogger("moezip")
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        log.addHandler(_Stderr())
    log.setLevel(level.upper())


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Lines on stderr with the time and the part of the program that they are from."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

"""What long work says about itself while it runs. Rooms report, only the console shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One step done.

    Attributes:
        stage: what is going on, in the user's words (``calibrate``, ``write``, ``evaluate``, ...).
        done, total: of ``unit``.
        unit: ``layers``, ``bytes``, ``rows``, ...
        tokens: tokens that one unit of work takes through (for a rate), 0 where that says nothing.
    """

    stage: str
    done: int
    total: int
    unit: str = "layers"
    tokens: int = 0


Watch = Callable[[Progress], None]


def unwatched(_progress: Progress) -> None:
    """For callers that do not look."""

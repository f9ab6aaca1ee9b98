"""Knobs that every pruning method has."""

from __future__ import annotations

from dataclasses import dataclass

from moezip.errors import UsageError


@dataclass(frozen=True, slots=True)
class PruneParams:
    """Common settings.

    Attributes:
        guard: keep super experts whatever their score (needs recorded outputs).
        mtp: ``drop`` the multi-token-prediction layers, or ``keep`` them with the ranking of the last layer.
    """

    guard: bool = True
    mtp: str = "drop"


def require_probes(count: int) -> None:
    """Raises UsageError for a number of probes below 0."""
    if count < 0:
        raise UsageError(f"{count} probes cannot be", where=f"--set probes={count}", next="give 0 or more")

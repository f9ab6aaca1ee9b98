"""Knobs that every pruning method has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PruneParams:
    """Common settings.

    Attributes:
        guard: keep super experts whatever their score (needs recorded outputs).
        mtp: ``drop`` the multi-token-prediction layers, or ``keep`` them with the ranking of the last layer.
    """

    guard: bool = True
    mtp: str = "drop"

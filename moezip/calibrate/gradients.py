"""Squared output gradients of a backward pass, all domains together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from moezip.calibrate.statistics import Array, Statistics
from moezip.errors import StatisticsError


class Linear(Protocol):
    """A matrix of the checkpoint.

    Attributes:
        name: on disk. kind: ``gate``, ``up`` or ``down`` if it is an expert's. layer, expert: None where that means
            nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def expert(self) -> int | None: ...


class Gradients:
    """Sums of squared output gradients over all domains of a backward pass.

    Attributes:
        scored: T, tokens that the loss counts.
    """

    def __init__(self, stats: Statistics):
        self._domains = stats.domains
        self.scored = sum(domain.scored for domain in stats.domains)
        self._layers: dict[tuple[int, str], Array] = {}

    def require(self, items: Iterable[Linear]) -> None:
        """Raises StatisticsError unless there are gradients for every one of ``items``."""
        again = "calibrate again with --record gradients"
        if not self.scored:
            raise StatisticsError("the statistics are not of a backward pass", next=again)
        for domain in self._domains:
            for item in items:
                if item.expert is None:
                    missing = item.name not in domain.linears
                else:
                    named = domain.layers.get(item.layer if item.layer is not None else -1, {})
                    missing = f"{item.kind}_grad_square" not in named
                if missing:
                    raise StatisticsError(
                        f"the statistics lack the squared gradients of {item.name} (domain {domain.name})", next=again
                    )

    def linear(self, name: str) -> Array:
        """G of a linear outside the routed experts, [R]."""
        total: Array = np.sum([domain.linears[name] for domain in self._domains], axis=0)
        return total

    def expert(self, layer: int, expert: int | None, role: str) -> Array:
        """G of one expert's matrix, [R]; without ``expert`` the mean over the layer's."""
        whole = self._summed(layer, f"{role}_grad_square")
        found: Array = whole.mean(0) if expert is None else whole[expert]
        return found

    def reached(self, layer: int, expert: int) -> bool:
        """Whether the loss of any token depends on it: not if only last tokens of windows were routed to it."""
        return bool(self._summed(layer, "down_grad_square")[expert].any())

    def _summed(self, layer: int, name: str) -> Array:
        if (layer, name) not in self._layers:
            self._layers[layer, name] = np.sum([domain.layers[layer][name] for domain in self._domains], axis=0)
        return self._layers[layer, name]

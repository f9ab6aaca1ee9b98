"""The plan: which source experts make up each new expert. Readable JSON, re-appliable with no data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A share of one source expert in a new one."""

    expert: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Pick:
    """One output expert: its sources and how its router row is made (the same parts)."""

    parts: tuple[Part, ...]

    @classmethod
    def keep(cls, expert: int) -> Pick:
        return cls((Part(expert),))

    @property
    def kept(self) -> int | None:
        """The source expert where this pick keeps one as it is, else None."""
        if len(self.parts) == 1 and self.parts[0].weight == 1.0:
            return self.parts[0].expert
        return None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer seen through the plan.

    Attributes:
        layer: decoder layer index.
        experts: E of the source.
        picks: the output's experts, in order.
        scores: the method's score per source expert, for the reader; never used when the plan is applied.
        protected: source experts that the guard kept whatever their score.
    """

    layer: int
    experts: int
    picks: tuple[Pick, ...]
    scores: tuple[float, ...] = ()
    protected: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the bytes of the output.

    Attributes:
        source: fingerprint of the checkpoint that it was made for.
        architecture: model_type.
        layers: MoE layers, ascending.
        mtp: ``drop`` or ``keep`` the multi-token-prediction layers.
        made_by: method, settings, statistics and data fingerprints, seed, version: for the reader.
    """

    source: str
    architecture: str
    layers: tuple[LayerPlan, ...]
    mtp: str = "drop"
    made_by: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

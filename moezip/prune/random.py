"""Random scores: the floor that every method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.errors import UsageError
from moezip.prune.params import PruneParams
from moezip.registry import Method


@dataclass(frozen=True, slots=True)
class RandomParams(PruneParams):
    """Attributes:
    seed: of the random numbers; ``--seed`` sets it too.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is below 0", where="--seed", next="give 0 or more")


def score(facts: LayerFacts, stats: Mapping[str, Array], params: RandomParams) -> Array:
    """Uniform numbers, float64 [E]; the same for the same seed and layer."""
    return np.random.default_rng([params.seed, facts.layer]).random(facts.experts)


RANDOM = Method(
    name="random",
    family="prune",
    summary="random experts: the floor that every method must beat (no data)",
    paper="baseline",
    needs=(),
    params=RandomParams,
    run=score,
)

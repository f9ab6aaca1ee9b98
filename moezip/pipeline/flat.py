"""Prices as if every weight mattered alike: what an allocation would come to, told from headers alone.

With b bits a weight costs 4^-b, with none 1: an expert that is dropped costs its weights, and one bit more is worth
three quarters of what the last one was. So budgets that nothing fits are known before any text is read, and a dry run
has sizes that are right and widths that are typical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moezip.arch.spec import LayerFacts
from moezip.formats.packed import Grid
from moezip.plan.pmq import WIDTHS as PMQ_WIDTHS

if TYPE_CHECKING:
    from moezip.pipeline.bits import PriceTable
    from moezip.pipeline.items import Item

Array = npt.NDArray[np.float64]
# An optimum of made-up prices is worth little; anywhere near it the sizes are the same.
GAP = 0.05


def flat_prices(items: Sequence[Item], grids: Sequence[Grid]) -> PriceTable:
    """A table in which the whole model's weights, gone, cost 1."""
    from moezip.pipeline.bits import PriceTable

    weights = np.array([float(item.shape[0] * item.shape[1]) for item in items])
    each = np.array([4.0**-grid.bits for grid in grids])
    return PriceTable(
        tuple(items),
        tuple(grids),
        (weights / weights.sum())[:, None] * each,
        {item.kind: np.ones(len(grids)) for item in items},
        {},
        np.array([[grid.nbytes(*item.shape) for grid in grids] for item in items], np.int64),
        np.ones(len(items), np.int64),
    )


def flat_drops(items: Sequence[Item], facts: Sequence[LayerFacts]) -> dict[int, Array]:
    """Per layer, [E], what experts cost in that table if they go."""
    total = float(sum(item.shape[0] * item.shape[1] for item in items))
    found = {fact.layer: np.zeros(fact.experts) for fact in facts}
    for item in items:
        if item.expert is not None and item.layer is not None:
            found[item.layer][item.expert] += item.shape[0] * item.shape[1] / total
    return found


def flat_costs(facts: Sequence[LayerFacts]) -> dict[int, Array]:
    """Per layer, [E, 3], PMQ's costs of experts that are all alike."""
    row = np.array([4.0**-bits for bits in PMQ_WIDTHS])
    return {fact.layer: np.tile(row, (fact.experts, 1)) for fact in facts}


def flat_scores(items: Sequence[Item], by_layer: bool) -> Mapping[str, float]:
    """Scores of experts' matrices that differ, as real ones do, but mean nothing.

    Args:
        by_layer: those of a layer have one score.
    """
    experts = [item for item in items if item.expert is not None]
    return {item.name: float(item.layer or 0) if by_layer else float(place) for place, item in enumerate(experts)}

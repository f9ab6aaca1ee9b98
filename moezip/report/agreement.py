"""How well predicted rises of the loss agree with measured ones, over several compressions of one model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import correlation

# Fewer plans have no rank correlation worth the name.
LEAST_PLANS = 3


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: the correlation of the ranks, equal values sharing theirs. None below three, or where all are equal.

    >>> rank_correlation([0.1, 0.2, 0.9], [1.0, 3.0, 2.0])
    0.5
    """
    if len(first) < LEAST_PLANS or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    # the first of equals has `index` below it, and `count` of them share the middle of their places
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]

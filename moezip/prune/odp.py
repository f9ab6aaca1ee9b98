"""Thresholds for dropping a token's lesser experts at run time: NAEE (arXiv 2402.14800), ODP (arXiv 2410.06270).

Both drop a token's second expert where its gate is less than a threshold times the first one's, and take as threshold
of a layer the median of that ratio over calibration tokens. Here every rank after the first has a threshold of its own,
for routers that choose more than two, and the quantile is a setting: higher ones drop more.

ODP spares the tokens that matter most, which ``moezip.runtime.attended`` tells, and has only the layers take part in
which dropping loses least. The authors fix ten layers of Mixtral by a loss that they measured; here the layers are
ordered by the share of gate weight x output norm that would be dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moezip.calibrate.statistics import Array


def thresholds(histogram: Array, quantile: float) -> tuple[float, ...]:
    """Per rank, the ratio to the best gate below which ``quantile`` of the tokens lie; 0 for the best itself.

    Args:
        histogram: [2, k, bins] as ``moezip.calibrate.skips.GATE_RATIOS`` sums it. Inside a bin tokens are taken to lie
            evenly, so a threshold is off by a bin's width at most.
        quantile: 0 drops nothing.
    """
    found = [0.0]
    for counts in histogram[0, 1:]:
        total, bins = counts.sum(), len(counts)
        if not total or quantile <= 0:
            found.append(0.0)
            continue
        below = np.cumsum(counts)
        place = min(int(np.searchsorted(below, quantile * total)), bins - 1)
        inside = (quantile * total - (below[place] - counts[place])) / counts[place] if counts[place] else 1.0
        found.append(float((place + inside) / bins))
    return tuple(found)


def shares_below(histogram: Array, limits: tuple[float, ...]) -> tuple[float, float]:
    """Share of the expert calls, and of gate weight x output norm, that lie below the thresholds of their ranks."""
    bins = histogram.shape[2]
    edges = np.arange(bins)
    parts = np.array([np.clip(limit * bins - edges, 0, 1) for limit in limits])
    dropped = (histogram * parts).sum((1, 2))
    whole = histogram.sum((1, 2))
    calls, mass = (float(d / w) if w else 0.0 for d, w in zip(dropped, whole, strict=True))
    return calls, mass


def least_harmed(masses: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` layers of least dropped mass, ascending; all of them for 0. Equal ones: earlier layers first."""
    order = sorted(masses, key=lambda layer: (masses[layer], layer))
    return sorted(order[: count or len(order)])

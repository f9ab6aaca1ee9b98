"""Prices corrected by what a few measured decisions show: one factor per kind of decision and layer.

A second-order price ranks well and is low in size, by a factor that depends on the kind of decision and on the layer: a
whole expert is no small step, the expert that steps in brings an error of its own, and what was chosen for being cheap
on one text is dearer on another. So after the backward pass a few decisions of every layer are taken and measured on
text that the prices have not seen (``moezip.calibrate.probes``), and the prices of that kind in that layer are
multiplied by

    f = sum of m / sum of p

of prices p and measured divergences m, KL(model || probe): what the rise of the loss would be if the text were drawn
from the model, which is what second order predicts. On 2,048 tokens the rise on the text itself is as large as its own
standard error for most probes, the divergence is not, and on 8,192 held-out tokens of the reference model both agreed
within about a tenth where many experts or neurons went. A ratio of sums is a mean of the ratios weighted by price:
probes so cheap that rounding is all that they show do not count. No factor leaves 1/4 to 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.probes import Decision
from moezip.calibrate.statistics import Array, Domain, Probe, Statistics
from moezip.errors import PlanError
from moezip.plan.plan import require_keepable
from moezip.plan.price import expert_prices, neuron_prices

EXPERTS, NEURONS = "experts", "neurons"
KINDS = (EXPERTS, NEURONS)
LEAST, MOST = 0.25, 8.0


@dataclass(frozen=True, slots=True)
class Factors:
    """What prices are multiplied by.

    Attributes:
        pooled: by kind, the factor of all layers together.
        layers: by kind, the layers that have a factor of their own.
    """

    pooled: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def of(self, kind: str, layer: int) -> float:
        """The layer's own factor, else that of all layers, else 1."""
        return self.layers.get(kind, {}).get(layer, self.pooled.get(kind, 1.0))

    def to_json(self) -> dict[str, Any]:
        """By kind: ``pooled``, and ``layers`` {layer: factor} where a layer has its own."""
        return {
            kind: {"pooled": pooled, "layers": {str(layer): f for layer, f in self.layers.get(kind, {}).items()}}
            for kind, pooled in self.pooled.items()
        }


def ratio(probes: Sequence[Probe]) -> float | None:
    """The factor of some probes, as above; None where nothing has a price."""
    price = sum(probe.predicted for probe in probes)
    if price <= 0:
        return None
    return float(np.clip(sum(probe.divergence for probe in probes) / price, LEAST, MOST))


def fit(probes: Sequence[Probe]) -> Factors:
    """The factors of all kinds that were probed; a kind whose probes have no price is left out."""
    pooled: dict[str, float] = {}
    layers: dict[str, dict[int, float]] = {}
    for kind in dict.fromkeys(probe.kind for probe in probes):
        own = [probe for probe in probes if probe.kind == kind]
        middle = ratio(own)
        if middle is None:
            continue
        pooled[kind] = middle
        for layer in sorted({probe.layer for probe in own}):
            factor = ratio([probe for probe in own if probe.layer == layer])
            if factor is not None:
                layers.setdefault(kind, {})[layer] = factor
    return Factors(pooled, layers)


# -- which decisions to measure -----------------------------------------------------------------------------


def probes_of(
    facts: Sequence[LayerFacts],
    domains: Sequence[Domain],
    weights: Mapping[str, float],
    count: int,
    kinds: Sequence[str] = KINDS,
) -> list[tuple[Decision, Probe]]:
    """Decisions worth measuring, ``count`` per layer and kind, with their prices.

    Experts go as plans take them, cheapest first: for a count of 3 a quarter, a half and three quarters of the layer's,
    as far as the router can spare them. (Single ones say little: which documents of a short text ask for one is chance,
    and the next best that step in for it are still there.) Neurons go in the same shares. Layers that cannot lose an
    expert are left out.

    Args:
        weights: by domain, its share of the text that will be measured.
    """
    shares = [weights.get(domain.name, 0.0) for domain in domains]
    experts = [expert_prices(domain) for domain in domains]
    found: list[tuple[Decision, Probe]] = []
    for fact in facts:
        if EXPERTS in kinds and removable(fact):
            price = np.average([each[fact.layer] for each in experts], axis=0, weights=shares)
            for lot in expert_lots(fact, price, count):
                cost = float(price[list(lot)].sum())
                found.append((Decision(fact.layer, lot), Probe(fact.layer, EXPERTS, len(lot), cost, 0.0, 0.0, 0.0, 0)))
        if NEURONS in kinds:
            each = np.average([neuron_prices(domain, fact.layer) for domain in domains], axis=0, weights=shares)
            for gone in neuron_shares(each, count):
                cost, size = float(each[gone].sum()), int(gone.sum())
                probe = Probe(fact.layer, NEURONS, size, cost, 0.0, 0.0, 0.0, 0)
                found.append((Decision(fact.layer, neurons=gone), probe))
    return found


def removable(fact: LayerFacts) -> bool:
    """Whether the layer's router works with one expert less, or one less in every group."""
    return _keepable(fact, fact.experts - fact.groups)


def _keepable(fact: LayerFacts, keep: int) -> bool:
    try:
        require_keepable(fact, keep)
    except PlanError:
        return False
    return True


def expert_lots(fact: LayerFacts, price: Array, count: int) -> list[tuple[int, ...]]:
    """The cheapest experts of every group: ``count`` shares of them in equal steps, each holding the smaller ones.

    Never more than the router can spare; shares without a price are left out.
    """
    size = fact.experts // fact.groups
    order = np.argsort(price.reshape(fact.groups, size), axis=1, kind="stable") + size * np.arange(fact.groups)[:, None]
    most = max((each for each in range(size) if _keepable(fact, fact.experts - each * fact.groups)), default=0)
    sizes = dict.fromkeys(min(size * part // (count + 1), most) for part in range(1, count + 1))
    lots = [tuple(sorted(map(int, order[:, :each].flat))) for each in sizes if each]
    return [lot for lot in lots if price[list(lot)].sum() > 0]


def neuron_shares(price: Array, count: int) -> list[Any]:
    """[E, F] masks of the cheapest neurons: for a count of 3 a quarter, a half, and three quarters of them."""
    order = np.argsort(price, axis=None, kind="stable")
    masks = []
    for size in dict.fromkeys(price.size * part // (count + 1) for part in range(1, count + 1)):
        if size:
            gone = np.zeros(price.size, dtype=bool)
            gone[order[:size]] = True
            masks.append(gone.reshape(price.shape))
    return masks


def factors_of(stats: Statistics | None, wanted: bool = True) -> Factors:
    """The factors that the statistics' probes give; none where there are no probes, or they are not wanted."""
    return fit(stats.probes) if stats is not None and wanted else Factors()

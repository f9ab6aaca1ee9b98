"""What a plan is predicted to cost, in nats per token, where the statistics of a backward pass can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moezip.calibrate.statistics import Array, Domain, Statistics
from moezip.plan.plan import Plan

if TYPE_CHECKING:
    from moezip.plan.factors import Factors

PRICE = "drop_renormalised_square"
NEURON_PRICE = "inner_product_square"


def expert_prices(domain: Domain, factors: Factors | None = None) -> dict[int, Array]:
    """Per layer, the predicted rise of the domain's loss if one expert goes, [E], nats per token.

    Args:
        factors: what prices are multiplied by, layer by layer; as they are without.
    """
    prices = {layer: 0.5 * named[PRICE] / domain.scored for layer, named in domain.layers.items()}
    if factors is None:
        return prices
    return {layer: factors.of("experts", layer) * price for layer, price in prices.items()}


def neuron_prices(domain: Domain, layer: int, factors: Factors | None = None) -> Array:
    """The predicted rise of the domain's loss if one neuron goes, [E, F], nats per token: (1 / 2T) sum of (u v)^2."""
    factor = 1.0 if factors is None else factors.of("neurons", layer)
    return np.asarray(factor * 0.5 * domain.layers[layer][NEURON_PRICE] / domain.scored)


def priced(stats: Statistics | None) -> bool:
    """Whether every domain has what prices are made of."""
    return (
        stats is not None
        and bool(stats.domains)
        and all(d.scored > 0 and all(PRICE in named for named in d.layers.values()) for d in stats.domains)
    )


def predicted_nats(
    plan: Plan, domains: Sequence[Domain], weights: Mapping[str, float], factors: Factors | None = None
) -> float:
    """Sum of the prices of all dropped experts and neurons, averaged over the domains by weight.

    Prices of experts of one layer interact and are of second order only: a figure for comparing plans, neither a lower
    nor an upper bound of what will be measured.

    Args:
        factors: what measured probes correct the prices by.
    """
    totals, shares = [], []
    for domain in domains:
        prices = expert_prices(domain, factors)
        dropped = 0.0
        for layer in plan.layers:
            gone = np.setdiff1d(np.arange(layer.experts), layer.kept)
            dropped += float(prices[layer.layer][gone].sum())
            if not layer.whole:
                each = neuron_prices(domain, layer.layer, factors)
                for pick in layer.picks:
                    if pick.neurons is not None:
                        dropped += float(each[pick.kept].sum() - each[pick.kept, list(pick.neurons)].sum())
        totals.append(dropped)
        shares.append(weights.get(domain.name, 1.0))
    return float(np.average(totals, weights=shares))

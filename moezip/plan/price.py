"""What a plan is predicted to cost, in nats per token, where the statistics of a backward pass can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moezip.calibrate.statistics import Array, Domain, Statistics
from moezip.plan.plan import Plan

PRICE = "drop_renormalised_square"
NEURON_PRICE = "inner_product_square"


def expert_prices(domain: Domain) -> dict[int, Array]:
    """Per layer, the predicted rise of the domain's loss if one expert goes, [E], nats per token."""
    return {layer: 0.5 * named[PRICE] / domain.scored for layer, named in domain.layers.items()}


def neuron_prices(domain: Domain, layer: int) -> Array:
    """The predicted rise of the domain's loss if one neuron goes, [E, F], nats per token: (1 / 2T) sum of (u v)^2."""
    return np.asarray(0.5 * domain.layers[layer][NEURON_PRICE] / domain.scored)


def priced(stats: Statistics | None) -> bool:
    """Whether every domain has what prices are made of."""
    return (
        stats is not None
        and bool(stats.domains)
        and all(d.scored > 0 and all(PRICE in named for named in d.layers.values()) for d in stats.domains)
    )


def predicted_nats(plan: Plan, domains: Sequence[Domain], weights: Mapping[str, float]) -> float:
    """Sum of the prices of all dropped experts and neurons, averaged over the domains by weight.

    Prices of experts of one layer interact and are of second order only: a figure for comparing plans, neither a lower
    nor an upper bound of what will be measured.
    """
    totals, shares = [], []
    for domain in domains:
        prices = expert_prices(domain)
        dropped = 0.0
        for layer in plan.layers:
            gone = np.setdiff1d(np.arange(layer.experts), layer.kept)
            dropped += float(prices[layer.layer][gone].sum())
            if not layer.whole:
                each = neuron_prices(domain, layer.layer)
                for pick in layer.picks:
                    if pick.neurons is not None:
                        dropped += float(each[pick.kept].sum() - each[pick.kept, list(pick.neurons)].sum())
        totals.append(dropped)
        shares.append(weights.get(domain.name, 1.0))
    return float(np.average(totals, weights=shares))

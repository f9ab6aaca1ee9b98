"""Nats: experts by the rise of the loss that losing them is predicted to cost.

To second order, with the Fisher matrix for the Hessian and tokens taken one by one, taking away what expert i adds to
the residual stream costs

    price_i = 1/(2 T) * sum over tokens t of  (G_t . delta_t,i)^2       [nats per token]

with T the scored tokens, G_t the gradient of the summed loss at the output of the MoE block, and delta_t,i the change
of that output: the expert's weighted output goes and, where the router's gates are divided by their sum (or are shares
of one softmax), the others grow,

    delta_t,i = p / (1 - p) * (y_t - S f_i(x_t)),      p = g_t,i / S,  S the sum of the gates

(else delta = -g f). One streamed forward and backward pass gives all prices. Dropping a whole expert is no small step,
and the expert that steps in brings an error of its own, so ranks are good and sizes are off. Therefore the cheapest
quarter, half and three quarters of every layer's experts are dropped in turn and measured, each on 512 to 2,048 tokens
that follow the calibrated ones in the files (on some of these where the files end), all in one more streamed pass that
costs about one forward pass over the calibration text; prices of a layer are multiplied by the factor that these probes
give (`moezip/plan/factors.py` says how; the report shows the factors). `--set probes=N` takes N per layer, 0 none.
Prices of several experts of one layer still do not simply add: take the figure for comparing plans.
`benchmarks/prices.py` prints predicted and measured rises side by side.

`--set labels=model` draws the labels from the model's own predictions (the true Fisher) in place of the text's
(the empirical one), at the same cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams, require_probes
from moezip.registry import Method


@dataclass(frozen=True, slots=True)
class NatsParams(PruneParams):
    """Attributes:
    labels: ``data`` or ``model``, for the pass that is made for this method; saved statistics keep their own.
    probes: shares of experts dropped and measured in each layer, to correct the prices by; 0 for bare prices.
    """

    labels: str = "data"
    probes: int = 3

    def __post_init__(self) -> None:
        require_probes(self.probes)


def score(facts: LayerFacts, stats: Mapping[str, Array], params: NatsParams) -> Array:
    """Sum of (G . delta)^2 for every expert of one layer, float64 [E]; 0 for an expert that no token reached."""
    return stats["drop_renormalised_square"]


NATS = Method(
    name="nats",
    family="prune",
    summary="predicted rise of the loss, from a streamed backward pass; prices every expert in nats per token",
    paper="second-order price (Fisher), no paper",
    needs=("drop_renormalised_square",),
    params=NatsParams,
    comparable=True,
    run=score,
)

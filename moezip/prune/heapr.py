"""HEAPr (arXiv 2509.22299, ICLR 2026): single neurons of experts, ranked over the whole model.

An atomic expert (i, j) is neuron j of expert i: row j of its gate and up matrices and column j of its down matrix. With
u its activation and v the gradient of the loss with respect to it (which contains the gate weight), removing it
costs, to second order with the Fisher matrix for the Hessian,

    paper:  s_ij = mean over tokens routed to i of u_ij^2  *  mean over the same tokens of v_ij^2
    exact:  s_ij = mean over the same tokens of (u_ij v_ij)^2

`fisher=paper` is the published score: its d x d matrix form D_j' G D_j is the mean of (gamma . D_j)^2, which is the
mean of v^2, so two running sums per neuron replace all matrices. `fisher=exact` drops the assumption that u and v are
independent; same cost. The paper's factor 1/2 changes no rank and is left out, as in its code. Both means are over the
tokens that reached the expert, so an expert that is used often is not favoured for it.

Policy for an expert that no token reached: its neurons score 0 and go first. The router stays as it is: a token that is
sent to an expert without neurons gets nothing from it.

`rank=global` ranks all neurons of the model in one list (the paper); `layer` and `expert` keep the same share of every
layer or expert. `round=N` keeps widths that are multiples of N (N divides the experts' width), never more than the
budget. `uniform=true` keeps the same number of neurons in every expert, chosen inside each: such a checkpoint loads in
stock transformers and vLLM.

The predicted rise of the loss that is printed is the sum of (u v)^2 / 2 over all tokens, whatever the scores, times a
factor per layer that a few measured probes give (the cheapest quarter, half and three quarters of a layer's neurons
taken out; `moezip/plan/factors.py`). `--set probes=0` leaves them away; what is removed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.prune.params import PruneParams, require_probes
from moezip.registry import Method


@dataclass(frozen=True, slots=True)
class HeaprParams(PruneParams):
    """Attributes:
    fisher: ``paper`` or ``exact``, see above.
    rank: ``global``, ``layer`` or ``expert``: what one list of neurons spans.
    round: widths are multiples of this.
    uniform: one width for all experts of the model.
    labels: ``data`` or ``model``, for the pass that is made for this method.
    probes: shares of neurons taken out and measured in each layer, to correct the printed price by; 0 for the bare one.
    """

    fisher: str = "paper"
    rank: str = "global"
    round: int = 1
    uniform: bool = False
    labels: str = "data"
    probes: int = 3

    def __post_init__(self) -> None:
        require_probes(self.probes)


def score(facts: LayerFacts, stats: Mapping[str, Array], params: HeaprParams) -> Array:
    """s_ij for every neuron of one layer, float64 [E, F]; 0 for experts that no token reached."""
    routed = stats["routed"][:, None]
    counts = np.where(routed > 0, routed, 1.0)
    if params.fisher == "exact":
        return np.asarray(stats["inner_product_square"] / counts)
    return np.asarray((stats["inner_square"] / counts) * (stats["inner_grad_square"] / counts))


HEAPR = Method(
    name="heapr",
    family="prune",
    unit="neuron",
    comparable=True,
    summary="neurons inside experts, by second-order importance over the whole model",
    paper="HEAPr, arXiv 2509.22299",
    needs=("routed", "inner_square", "inner_grad_square", "inner_product_square"),
    params=HeaprParams,
    run=score,
)

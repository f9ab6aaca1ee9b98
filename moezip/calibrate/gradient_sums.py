"""What every second-order price is made of: sums over the tokens of activations u and gradients v of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import GRADIENT_RECORDS
from moezip.calibrate.statistics import Array
from moezip.calibrate.trace import Trace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Gates:
    """How the gates of a token's other experts answer when one expert goes.

    Attributes:
        renormalised: they are divided by their sum. softmax: they are shares of a softmax over all experts.
        scale: factor on all gates.
    """

    renormalised: bool
    softmax: bool
    scale: float

    def renormalised_drops(self, gates: torch.Tensor, pushes: torch.Tensor) -> torch.Tensor:
        """First-order change of the loss of each token if one of its experts goes and the other gates grow, [T, k].

        With p the share of the gate that goes: p / (1 - p) * (G.y - total * G.f). Gates that are divided by their sum
        share that sum; softmax gates that are not share the whole softmax; others do not move.
        """
        import torch

        gates = gates.double()
        if self.renormalised:
            total = gates.sum(1, keepdim=True)
        elif self.softmax:
            total = torch.full_like(gates[:, :1], self.scale)
        else:
            return pushes
        share = gates / total
        # an expert that has the whole gate leaves nothing to grow: only taking its output away is left
        grown = share / (1 - share) * (pushes.sum(1, keepdim=True) - total * pushes / gates.clamp_min(1e-30))
        return torch.where((share < 1 - 1e-9) & (gates > 0), grown, -pushes)


def gradient_sums(
    trace: Trace, fact: LayerFacts, gates: Gates, mask: torch.Tensor | None, scale: float
) -> dict[str, Array]:
    """What one micro-batch adds to the sums of one layer, by the names of ``GRADIENT_RECORDS``.

    Args:
        trace: what the layer's experts did, after the backward.
        mask: [n, S], False on padding, None without any.
        scale: how many times too large the gradients of the trace are.
    """
    import torch

    found = {record.name: np.zeros(record.shape(fact)) for record in GRADIENT_RECORDS}
    valid = None if mask is None else mask.reshape(-1).to(trace.ids.device)
    top_k = trace.ids.shape[1]
    # a = g_i (G . f_i) of every choice: the inner product of activation and gradient, plus the bias's share
    push = torch.zeros(trace.ids.numel(), dtype=torch.float64, device=trace.ids.device)
    for part in trace.parts:
        count = part.slots.numel()
        u = part.inner.detach()[:count].float()
        gradient = part.inner.grad
        assert gradient is not None
        v = gradient[:count].float()
        here = (u * v).sum(1).double()
        if part.output is not None and part.bias is not None and part.output.grad is not None:
            here += (part.output.grad.float() * part.bias.float()).sum(1).double()
        push[part.slots] = here / scale
        if valid is not None:
            real = valid[part.slots // top_k]
            u, v = u[real], v[real]
        found["routed"][part.expert] = u.shape[0]
        own = (part.expert, slice(u.shape[1]))  # of a ragged layer's experts few are as wide as the widest
        found["inner_square"][own] = u.square().sum(0).double().cpu().numpy()
        found["inner_grad_square"][own] = v.square().sum(0).double().cpu().numpy() / scale**2
        found["inner_product_square"][own] = (u * v).square().sum(0).double().cpu().numpy() / scale**2
        for role, squares in part.squares.items():
            found[f"{role}_grad_square"][part.expert, : squares.shape[0]] = squares.cpu().numpy() / scale**2
    pushes = push.view(-1, top_k)
    drops = {
        "drop_square": pushes.square(),
        "drop_renormalised_square": gates.renormalised_drops(trace.gates, pushes).square(),
    }
    for name, squares in drops.items():
        if valid is not None:
            squares = squares * valid[:, None]
        sums = torch.bincount(trace.ids.reshape(-1), squares.reshape(-1), minlength=fact.experts)
        found[name] = sums.double().cpu().numpy()
    return found

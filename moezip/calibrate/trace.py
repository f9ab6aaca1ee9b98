"""The experts with gradients: the same output as ``experts_forward``, and a hold on every inner activation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Traced:
    """What one expert did with its tokens.

    Attributes:
        expert: its id.
        slots: [n] positions in the flattened [T, k] choices.
        inner: [at least n, F] input of the down projection, its gradient kept; rows beyond n are filling.
        output: [n, D] output before the gate weight, its gradient kept where a bias makes it needed, else None.
        bias: [D] of the down projection, or None.
    """

    expert: int
    slots: torch.Tensor
    inner: torch.Tensor
    output: torch.Tensor | None
    bias: torch.Tensor | None


class Trace(threading.local):
    """Hung on an experts module as ``_moezip_trace``; every thread sees its own micro-batch.

    Attributes:
        ids, gates: [T, k] as the router gave them, gates detached.
        parts: one per expert that has tokens.
    """

    def __init__(self) -> None:
        self.ids: Any = None
        self.gates: Any = None
        self.parts: list[Traced] = []

    def clear(self) -> None:
        """Lets go of the graph."""
        self.ids = self.gates = None
        self.parts = []


def traced_forward(
    module: Any,
    trace: Trace,
    linear: Callable[[Any, str, int, torch.Tensor], torch.Tensor],
    padded_rows: Callable[[int], int],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """``experts_forward`` for gradients: [T, D]. Pieces are joined, not written in place, because the backward of a
    write in place copies the whole target once per expert."""
    import torch

    tokens, top_k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=module.num_experts).tolist()[: module.num_experts]
    rows = order // top_k
    trace.clear()
    trace.ids, trace.gates = top_k_index, top_k_weights.detach()
    pieces, start = [], 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        stop = start + count
        given = hidden_states[rows[start : start + padded_rows(count)]]
        inner = linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, given)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        inner.retain_grad()
        out = linear(module, "down_proj", expert, inner)[:count]
        bias = module.down_proj_bias[expert] if module.has_bias else None
        if bias is not None:
            out.retain_grad()
        trace.parts.append(Traced(expert, order[start:stop], inner, None if bias is None else out, bias))
        pieces.append(out)
        start = stop
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    chosen = torch.cat(pieces)[places].view(tokens, top_k, -1)
    return (chosen * top_k_weights[:, :, None]).sum(dim=1).to(hidden_states.dtype)

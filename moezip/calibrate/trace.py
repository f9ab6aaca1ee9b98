"""The experts with gradients: the same output as ``experts_forward``, and a hold on every inner activation.

Of the gradients of the three products only the sum of squares over the tokens is taken, as they pass: kept, they would
be the largest thing in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moezip.arch.matrices import gate_and_up

if TYPE_CHECKING:
    import torch

# Numbers that are squared at a time, in float32: 4 MiB.
PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Traced:
    """What one expert did with its tokens.

    Attributes:
        expert: its id.
        slots: [n] positions in the flattened [T, k] choices.
        inner: [at least n, F] input of the down projection, its gradient kept; rows beyond n are filling.
        output: [n, D] output before the gate weight, its gradient kept where a bias makes it needed, else None.
        bias: [D] of the down projection, or None.
        squares: after the backward, by ``gate`` [F], ``up`` [F] and ``down`` [D]: sum over its tokens of the squared
            gradient of each output of that product; of gate and up before the activation, of down before the gate
            weight. float64.
    """

    expert: int
    slots: torch.Tensor
    inner: torch.Tensor
    output: torch.Tensor | None
    bias: torch.Tensor | None
    squares: dict[str, torch.Tensor] = field(default_factory=dict)


class Trace(threading.local):
    """Hung on an experts module as ``_moezip_trace``; every thread sees its own micro-batch.

    Attributes:
        ids, gates: [T, k] as the router gave them, gates detached.
        parts: one per expert that has tokens.
        linears: sums of squared output gradients of other linears, by name, [out] float64.
    """

    def __init__(self) -> None:
        self.ids: Any = None
        self.gates: Any = None
        self.parts: list[Traced] = []
        self.linears: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Ready for the next micro-batch."""
        self.clear()
        self.linears = {}

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
        product = linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, given)
        inner = module._apply_gate(product) if module.has_gate else module.act_fn(product)
        inner.retain_grad()
        out = linear(module, "down_proj", expert, inner)[:count]
        bias = module.down_proj_bias[expert] if module.has_bias else None
        if bias is not None:
            out.retain_grad()
        part = Traced(expert, order[start:stop], inner, None if bias is None else out, bias)
        trace.parts.append(part)
        _keep_products(module, part, product, out)
        del product
        pieces.append(out)
        start = stop
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    chosen = torch.cat(pieces)[places].view(tokens, top_k, -1)
    return (chosen * top_k_weights[:, :, None]).sum(dim=1).to(hidden_states.dtype)


def _keep_products(module: Any, part: Traced, product: torch.Tensor, out: torch.Tensor) -> None:
    """Fills ``part.squares`` once gradients pass: of gate and up, [at least n, 2F] together, and of ``out`` [n, D]."""
    squares = part.squares

    def split(total: torch.Tensor) -> None:
        if module.has_gate:
            squares["gate"], squares["up"] = gate_and_up(module, total)
        else:
            squares["up"] = total

    def keep(total: torch.Tensor) -> None:
        squares["down"] = total

    keep_squares(product, split)
    keep_squares(out, keep)


def keep_squares(output: torch.Tensor, take: Callable[[torch.Tensor], None]) -> None:
    """Calls ``take`` with the sum over rows of the squared gradient of ``output`` [..., C], float64 [C], once it is
    known.

    Padding needs no mask: no scored token sees it, so its gradients are 0, as are those of filling rows.
    """

    def passing(gradient: torch.Tensor) -> None:
        take(summed_squares(gradient.flatten(0, -2)))

    output.register_hook(passing)


def summed_squares(values: torch.Tensor) -> torch.Tensor:
    """Of [n, C]: the sum over n of the squares, float64 [C]."""
    import torch

    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for part in values.split(max(PIECE // max(values.shape[1], 1), 1)):
        total += part.float().square().sum(0)
    return total

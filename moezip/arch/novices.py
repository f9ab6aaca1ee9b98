"""Models in which some experts are constants, "novices" in MoNE's words (see ``moezip.arch.mone``).

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moezip.arch.layout import Layout
from moezip.arch.mone import LEAF, Substitution
from moezip.arch.ragged import make_ragged
from moezip.arch.spec import Architecture


class Novice(nn.Module):
    """Holds the constant [D] of one dropped expert, under the name that it has on disk."""

    def __init__(self, hidden: int, **kind: Any):
        super().__init__()
        self.register_parameter(LEAF, nn.Parameter(torch.empty(hidden, **kind)))


def make_substituted(model: Any, architecture: Architecture, substitution: Substitution, layout: Layout) -> None:
    """Gives a model on the meta device novices in place of the dropped experts; routers stay as they are.

    Args:
        layout: of ``substitution``.
    """
    make_ragged(model, architecture, layout)
    for layer, dropped in substitution.dropped.items():
        block = model.get_submodule(f"{architecture.layers}.{layer}.{architecture.block}")
        experts = block.get_submodule(architecture.experts_module)
        some = next(experts.parameters())
        for expert in dropped:
            experts.add_module(str(expert), Novice(experts.hidden_dim, dtype=some.dtype, device=some.device))
        experts.register_forward_hook(add_constants)


def add_constants(experts: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """``output`` [T, D] of the kept experts, and gate x constant of the dropped ones that were chosen.

    As vLLM does it: summed in float32, rounded to the model's dtype, then added.
    """
    _, ids, gates = given
    dropped = [expert for expert, width in enumerate(experts.widths) if not width]
    constants = torch.stack([getattr(experts.get_submodule(str(expert)), LEAF) for expert in dropped])
    by_expert = torch.zeros(ids.shape[0], experts.num_experts + 1, device=gates.device)  # the last is nobody
    by_expert.scatter_add_(1, ids, gates.float())
    result = output + (by_expert[:, dropped] @ constants.float()).to(output.dtype)
    if (routed := getattr(experts, "_moezip_routed", None)) is not None:
        routed.output = result
    return result

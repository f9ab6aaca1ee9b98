"""One expert's matrices inside an experts module that is in memory, whatever way the module keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def expert_matrices(experts: Any, expert: int) -> dict[str, torch.Tensor]:
    """``gate`` [F, D], ``up`` [F, D] and ``down`` [D, F] as views: what is written into them is what the module runs.

    Args:
        experts: a loaded experts module of transformers (fused weights), or ``moezip.arch.ragged.RaggedExperts``;
            an expert of width 0 has no matrices.
    """
    if hasattr(experts, "matrix"):
        if not experts.widths[expert]:
            return {}
        return {role: experts.matrix(expert, role).weight.data for role in ("gate", "up", "down")}
    return {role: fused_part(experts, role, expert) for role in ("gate", "up", "down")}


def fused_part(experts: Any, role: str, expert: int, whole: torch.Tensor | None = None) -> torch.Tensor:
    """The part of a fused parameter that is one expert's ``gate``, ``up`` or ``down``, seen as [out, in].

    Args:
        experts: the module, for the flags that say how its parameters lie.
        whole: the parameter; default the module's own.
    """
    if whole is None:
        whole = (experts.down_proj if role == "down" else experts.gate_up_proj).data
    part = whole[expert]
    if experts.is_transposed:
        part = part.T
    if role == "down":
        return part
    gate, up = gate_and_up(experts, part)
    return gate if role == "gate" else up


def gate_and_up(experts: Any, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels [F, ...] of the gate and of the up projection, as views of what has both, [2F, ...]."""
    if experts.is_concatenated:
        half = both.shape[0] // 2
        return both[:half], both[half:]
    return both[0::2], both[1::2]

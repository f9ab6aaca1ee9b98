"""The experts implementation of calibration: outputs and what is recorded of them, in one go.

Running the experts once for the output and once for the statistics would halve the speed, and hooks cannot see
single experts inside a fused module. transformers calls this function in place of its own (``eager`` and
``grouped_mm`` are the twins that the tests compare it with).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IMPLEMENTATION = "moezip"


@dataclass(slots=True)
class Routed:
    """What one call of an experts module leaves behind for the recorder; filled only if hung on the module.

    ``valid`` [T] bool goes in (False on padding, None without any), the rest comes out.
    """

    valid: Any = None
    ids: Any = None
    gates: Any = None
    norms: Any = None
    peaks: Any = None
    output: Any = None


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum over the chosen experts of gate weight x expert output.

    Args:
        self: a transformers experts module (fused weights, and the flags that say how they lie).
        hidden_states: [T, D]. top_k_index, top_k_weights: [T, k], from the model's own router.

    Returns:
        [T, D] in the dtype of ``hidden_states``, summed in float32. If ``self`` carries a ``Routed`` as
        ``_moezip_routed``, norms and peaks of the unweighted outputs are left there.
    """
    import torch
    import torch.nn.functional as F

    tokens, top_k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).tolist()
    routed: Routed | None = getattr(self, "_moezip_routed", None)
    norms = torch.zeros(tokens * top_k, dtype=torch.float32, device=flat.device)
    peaks = torch.zeros(self.num_experts, dtype=torch.float32, device=flat.device)
    gates = top_k_weights.reshape(-1)
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    start = 0
    for expert, end in enumerate(ends[: self.num_experts]):
        if end == start:
            continue
        slots = order[start:end]
        start = end
        rows = slots // top_k
        inner = F.linear(hidden_states[rows], *_matrix(self, "gate_up_proj" if self.has_gate else "up_proj", expert))
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        out = F.linear(inner, *_matrix(self, "down_proj", expert))
        if routed is not None:
            norms[slots] = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)
            real = out if routed.valid is None else out[routed.valid[rows]]
            if real.numel():
                low, high = torch.aminmax(real)
                peaks[expert] = torch.maximum(high, -low)
        output.index_add_(0, rows, (out * gates[slots, None]).float())
    result = output.to(hidden_states.dtype)
    if routed is not None:
        routed.ids, routed.gates = top_k_index, top_k_weights
        routed.norms, routed.peaks, routed.output = norms.view(tokens, top_k), peaks, result
    return result


def _matrix(module: Any, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return (weight.T if module.is_transposed else weight), bias


def register() -> str:
    """Makes the implementation known to transformers; its name."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    return IMPLEMENTATION

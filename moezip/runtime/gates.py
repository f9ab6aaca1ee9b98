"""How the experts of a transformers model join gate and up, as the kernels know it."""

from __future__ import annotations

from typing import Any

# Name of the kernels' gate, by the activation's class.
_PLAIN = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}


def gate_of(stock: Any) -> tuple[str, float, float] | None:
    """Name, alpha and limit of the gate of an experts module; None if the kernels have none like it."""
    from transformers.integrations import moe

    gate = getattr(type(stock), "_apply_gate", None)
    if gate is not None and gate is getattr(moe, "_default_apply_gate", None):
        name = _PLAIN.get(type(stock.act_fn).__name__)
        return None if name is None else (name, 1.0, 0.0)
    if type(stock).__name__ == "GptOssExperts":
        return "clamped", float(stock.alpha), float(stock.limit)
    return None

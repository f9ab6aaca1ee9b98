"""Packed experts and linears on a GPU, through the Triton kernels. **Never run on a GPU**, only in the tests.

A module's codes are laid out once for the kernels, beside the stored ones, which takes their memory again. Where the
kernels cannot be used the answer is None, and why is said once for every reason.

This module imports torch, so it is imported where a model is run and nowhere else; triton, when a module is first run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from moezip.formats.packed import PACKED, SCALE, STEP, ZERO, Grid, unpack
from moezip.kernels import triton_packed
from moezip.runtime.fast import tell

if TYPE_CHECKING:
    from moezip.runtime.linear import Packed, PackedExperts, PackedLinear

Made = TypeVar("Made")

# By module: the address and device of the codes that something was made of, and what that is; None: it cannot be.
_kept: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Any]] = WeakKeyDictionary()


def is_for(value: torch.Tensor) -> bool:
    """Whether such inputs should go to the Triton kernels."""
    return value.device.type == "cuda"


def experts_forward(
    module: PackedExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """Sum over the chosen experts of gate weight x expert output; None where the kernels do not do it.

    Arguments as of ``RaggedExperts.forward``; -1 in ``top_k_index`` is an expert that is skipped.

    Returns:
        [T, D] in the dtype of ``hidden_states``.
    """
    layer = _made(module, hidden_states, layer_of)
    if layer is None:
        return None
    from moezip.kernels import triton_experts

    return triton_experts.run_layer(hidden_states.contiguous(), layer, top_k_index, top_k_weights)


def linear_forward(module: PackedLinear, value: torch.Tensor) -> torch.Tensor | None:
    """``value`` [..., C] to [..., R], with the bias; None where the kernels do not do it."""
    linear = _made(module, value, lambda each: triton_packed.pack_linear(laid_out(each), _detached(each.bias)))
    if linear is None:
        return None
    from moezip.kernels import triton_experts

    return triton_experts.run_linear(value, linear)


def laid_out(packed: Packed) -> triton_packed.Matrix:
    """A matrix for the kernels; its codes are copied.

    Raises:
        ValueError: the kernels do not take its groups.
    """
    tensors, grid = packed.tensors(), packed.grid
    scales, zeros = tensors[SCALE], _zeros(tensors, grid, packed.rows)
    if grid.double:
        scales = scales.float() * tensors[STEP].float()
    return triton_packed.lay_out(tensors[PACKED], scales, zeros, grid.bits, grid.group, packed.columns)


def layer_of(module: PackedExperts) -> triton_packed.Layer:
    """The experts of a layer for the kernels; codes are copied.

    Raises:
        ValueError: a matrix is not packed, its groups or the gate are not among those that the kernels take.
    """
    from moezip.runtime.linear import Packed

    if module._gate is None:
        raise ValueError(f"they do not know how {type(module._gating).__name__} joins gate and up")
    kind, alpha, limit = module._gate
    experts: list[Any] = []
    biases: list[Any] = []
    for number, width in enumerate(module.widths):
        held = [module.matrix(number, role) for role in ("gate", "up", "down")] if width else []
        if not all(isinstance(matrix, Packed) for matrix in held):
            raise ValueError(f"not all matrices of expert {number} are packed")
        experts.append(tuple(laid_out(matrix) for matrix in held) if width else None)
        if module.has_bias:
            alone = None if width else _detached(module.matrix(number, "down").bias)
            biases.append(tuple(_detached(matrix.bias) for matrix in held) if width else alone)
    return triton_packed.pack_layer(experts, kind, biases=biases or None, limit=limit, alpha=alpha)


def _zeros(tensors: Mapping[str, torch.Tensor], grid: Grid, rows: int) -> torch.Tensor | None:
    if grid.symmetric:
        return None
    return unpack(tensors[ZERO].t().contiguous(), grid.bits, rows).t().contiguous()


def _detached(bias: torch.Tensor | None) -> Any:
    return None if bias is None else bias.detach()


def _made(module: Any, value: torch.Tensor, make: Callable[[Any], Made]) -> Made | None:
    """What ``make`` makes of the module, now or before; None, with a warning, where that or ``value`` will not do."""
    why = _why_not(value)
    if why is not None:
        tell(f"{why} in Triton's kernels")
        return None
    of = tuple((each.data_ptr(), each.device) for name, each in module.named_buffers() if name.endswith(PACKED))
    if module not in _kept or _kept[module][0] != of:
        made: Made | None = None
        try:
            made = make(module)
        except ValueError as error:
            tell(f"Triton's kernels cannot be used ({error})")
        _kept[module] = of, made
    found: Made | None = _kept[module][1]
    return found


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not(value: torch.Tensor) -> str | None:
    """Why such inputs cannot go to the kernels."""
    if value.dtype not in triton_packed.DTYPES:
        return f"activations are {value.dtype}, which there is not"
    if value.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted, which there are not"
    if not _has_triton():
        return "Triton is not installed (pip install triton), so nothing runs"
    if value.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"activations are on {value.device.type}, which cannot be"
    return None

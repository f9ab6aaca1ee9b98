"""RMS norms of a few tokens on the CPU, in one call of the C++ library in place of six of torch.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moezip.kernels import products, unpacked
from moezip.runtime.derived import Derived, derived

DTYPES = {torch.bfloat16: unpacked.BF16, torch.float32: unpacked.F32}
_EPSILONS = ("variance_epsilon", "eps")
# Steps of the dtype by which norms may differ that sum in another order, which turns roundings of what follows.
ROUNDED = 4
# Share of numbers in bf16 that such an order turns: 0.1 % was measured; a rounding more or less turns 20 %.
OTHERS = 0.02


def use(model: nn.Module) -> None:
    """Has the norms of a model that the library knows run there."""
    for module in model.modules():
        mixin = _mixin(type(module)) if _is_norm(module) else None
        if mixin is not None:
            module.__class__ = derived(mixin, type(module))


def epsilon_of(module: nn.Module) -> float | None:
    """Of an RMS norm; None where there is none."""
    for name in _EPSILONS:
        found = module.__dict__.get(name)
        if isinstance(found, float):
            return found
    return None


def known_epsilon(norm: nn.Module) -> float:
    """Of a module that is known to be an RMS norm."""
    found = epsilon_of(norm)
    assert found is not None
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether it has the parts and the name of an RMS norm of one tensor. Which one it is, ``_mixin`` finds out."""
    weight = module._parameters.get("weight")
    return (
        "RMSNorm" in type(module).__name__
        and weight is not None
        and weight.dim() == 1
        and len(module._parameters) == 1
        and not module._modules
        and epsilon_of(module) is not None
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


class Norm(Derived):
    """An RMS norm as Llama's: weight [C] x the normed input, which is rounded before that."""

    once = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: Any = self._parameters["weight"]  # type: ignore[attr-defined]
        dtype = hidden_states.dtype
        columns = weight.shape[0]
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or weight.dtype != dtype
            or dtype not in DTYPES
            or not hidden_states.is_cpu
            or not weight.is_cpu
            or hidden_states.shape[-1] != columns
            or not hidden_states.numel()
        ):
            return super().forward(hidden_states)  # type: ignore[misc,no-any-return]
        given = hidden_states.contiguous()
        out = torch.empty_like(given)
        products.native().norm(
            given.data_ptr(), DTYPES[dtype], (given.numel() // columns, columns, columns), weight.data_ptr(),
            known_epsilon(self), self.once, out.data_ptr(), torch.get_num_threads(),  # type: ignore[arg-type]
        )  # fmt: skip
        return out


class NormOnce(Norm):
    """One that is rounded after the weight alone, as gpt-oss has it."""

    once = True


_known: dict[type[nn.Module], type[Norm] | None] = {}


def _mixin(kind: type[nn.Module]) -> type[Norm] | None:
    """Which of them a class computes; None if neither: others have the name too, such as Gemma's, by 1 + weight."""
    if kind not in _known:
        agreeing = (mixin for mixin in (Norm, NormOnce) if all(_agree(mixin, kind, dtype) for dtype in DTYPES))
        _known[kind] = next(agreeing, None)
    return _known[kind]


def _agree(mixin: type[Norm], kind: type[nn.Module], dtype: torch.dtype) -> bool:
    """Whether both make the same of random numbers, nearly all to the bit where these are bf16."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 64, generator=random).to(dtype), torch.rand(64, generator=random).to(dtype) + 0.5
    found = []
    for each in (kind, derived(mixin, kind)):
        module: Any = each.__new__(each)
        nn.Module.__init__(module)
        module.weight = nn.Parameter(weight, requires_grad=False)
        for name in _EPSILONS:
            setattr(module, name, 0.25)
        with torch.no_grad():
            found.append(module(x))
    ours, theirs = found
    if dtype == torch.bfloat16 and (ours != theirs).float().mean() > OTHERS:
        return False
    return torch.allclose(ours.float(), theirs.float(), rtol=ROUNDED * torch.finfo(dtype).eps, atol=0)

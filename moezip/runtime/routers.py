"""Routers on a few tokens, on the CPU: product, softmax and choice in one call of the C++ library, in place of six.

For routers that take the softmax of all logits and then the best; what a class does is found out by asking it. Of
experts whose logits are the same number torch chooses any, this the first.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.kernels import products, unpacked
from moezip.runtime.derived import Derived, derived

# Tokens that a router is asked about.
ASKED = 32
SCORES = {torch.bfloat16: unpacked.BF16, torch.float32: unpacked.F32}


def use(model: nn.Module) -> None:
    """Has the routers of a model that fit choose here."""
    for module in model.modules():
        form = _form(module) if _has_the_parts(module) else None
        if form is not None:
            module._moezip_route = form  # type: ignore[assignment]
            module.__class__ = derived(Router, type(module))


def _has_the_parts(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return (
        type(module).__name__.lower().endswith("router")
        and weight is not None
        and len(module._parameters) == 1
        and weight.dim() == 2
        and weight.dtype == torch.bfloat16
        and weight.is_cpu
        and isinstance(getattr(module, "top_k", None), int)
        and 0 < module.top_k <= len(weight)
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


class Router(Derived):
    """Logits [T, E], scores and ids [T, k], the best first."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        own: Any = self
        weight = own._parameters["weight"]
        with torch._C.DisableTorchFunctionSubclass():
            if (
                torch.compiler.is_compiling()
                or torch.is_grad_enabled()
                or hidden_states.dtype != torch.bfloat16
                or not hidden_states.is_cpu
                or not 0 < hidden_states.numel() <= unpacked.MOST_TOKENS * hidden_states.shape[-1]
                or weight.dtype != torch.bfloat16
                or not weight.is_cpu
                or not weight.is_contiguous()
                or hidden_states.shape[-1] != weight.shape[1]
                or own.training
            ):
                return super().forward(hidden_states)  # type: ignore[misc]
            return _route(own, weight, hidden_states, *own._moezip_route)


def _route(
    router: Any, weight: torch.Tensor, hidden: torch.Tensor, normalise: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (experts, columns), top_k = weight.shape, router.top_k
    given = hidden.contiguous()
    tokens = given.numel() // columns
    logits = torch.empty((tokens, experts), dtype=torch.bfloat16)
    scores, ids = torch.empty((tokens, top_k), dtype=dtype), torch.empty((tokens, top_k), dtype=torch.int64)
    products.native().route(
        weight.data_ptr(), given.data_ptr(), (experts, columns, tokens, top_k), normalise, SCORES[dtype],
        logits.data_ptr(), scores.data_ptr(), ids.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logits, scores, ids


def _form(router: Any) -> tuple[bool, torch.dtype] | None:
    """Whether scores are normalised, and their dtype; None where the router is of another form.

    Its logits must be the plain product, of small inputs and large ones, its choice the largest of them, and its scores
    one of two functions of them.
    """
    weight = router._parameters["weight"]
    x = torch.randn(ASKED, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x[::2] *= 64
    given = x.bfloat16()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        theirs = type(router).forward(router, given)
        if not isinstance(theirs, tuple) or [getattr(each, "ndim", 0) for each in theirs] != [2, 2, 2]:
            return None
        logits, scores, ids = theirs
        if logits.dtype != torch.bfloat16 or scores.dtype not in SCORES or ids.dtype != torch.int64:
            return None
        shares = logits.float().softmax(-1)
        if ids.shape != (ASKED, router.top_k) or not torch.equal(logits, F.linear(given, weight)):
            return None
        chosen = shares.gather(1, ids)
        if not torch.equal(chosen, shares.topk(router.top_k).values):
            return None
        off = {
            normalise: (scores.float() - (chosen / chosen.sum(-1, keepdim=True) if normalise else chosen)).abs()
            for normalise in (False, True)
        }
    best = min(off, key=lambda normalise: float(off[normalise].max()))
    # scores are at most 1
    return (best, scores.dtype) if float(off[best].max()) <= torch.finfo(scores.dtype).eps else None

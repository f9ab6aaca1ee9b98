"""Whole decoder layers on one new token, on the CPU: two calls, with the cache between them.

For layers of the plain form, a norm, attention of the usual form (``moezip.runtime.one_token``), a norm, and packed
experts chosen by softmax, each added to what it was given. All in it runs on the library by then, so a layer that
is of that form gives the same bits by its modules: it is asked, and else stays as it is.

This module imports transformers' models, so it is imported where one is built and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moezip.kernels import unpacked
from moezip.runtime import one_query, one_token
from moezip.runtime.derived import Derived, derived, untouched
from moezip.runtime.linear import WATCHERS, PackedExperts
from moezip.runtime.norms import Norm, known_epsilon
from moezip.runtime.routers import SCORES, Router

_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = {"self_attn", "mlp", *_NORMS}
_BLOCK = {"gate", "experts"}


def use(model: nn.Module) -> None:
    """Has the layers that fit run here; after all others of ``moezip.runtime.unpacked.use``."""
    for module in model.modules():
        if _has_the_parts(module) and fits(module):
            module.__class__ = derived(Layer, type(module))


def _has_the_parts(module: Any) -> bool:
    parts = module._modules
    if set(parts) != _PARTS or not isinstance(parts["self_attn"], one_token.Attention):
        return False
    block = parts["mlp"]._modules
    return (
        all(isinstance(parts[name], Norm) and not parts[name].once for name in _NORMS)
        and set(block) == _BLOCK
        and isinstance(block["gate"], Router)
        and isinstance(block["experts"], PackedExperts)
        and set(inspect.signature(type(module).forward).parameters) >= one_token.TAKES
    )


class Layer(Derived):
    """A decoder layer of the plain form."""

    def forward(self, hidden_states: torch.Tensor, *others: Any, **given: Any) -> Any:
        """As the layer's own, whose order of arguments differs by family; of one token in bf16 [n, 1, D] here."""
        own: Any = self
        attention = own._modules["self_attn"]
        if (
            not others
            and isinstance(attention, one_token.Attention)
            and len(hidden_states) <= unpacked.MOST_TOKENS
            and one_token.takes(attention, hidden_states, given.get("position_embeddings"))
        ):
            found = _run(own, hidden_states, *one_token.asked(given))
            if found is not None:
                return found
        return super().forward(hidden_states, *others, **given)  # type: ignore[misc]


class _Described:
    """The layer's second half as the library takes it, good while ``key`` is what the modules say it is."""

    def __init__(self, key: Any, layer: Any):
        norm, block = layer._modules[_NORMS[1]], layer._modules["mlp"]._modules
        router, experts = block["gate"], block["experts"]
        normalise, scores = router._moezip_route
        self.key = key
        self.block = unpacked.Block(
            norm._parameters["weight"].data_ptr(), known_epsilon(norm), router._parameters["weight"].data_ptr(),
            router.top_k, normalise, SCORES[scores], experts._table, experts._gate, experts.activations,
        )  # fmt: skip

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy's layer has a block of its own


def _described(layer: Any) -> _Described | None:
    """None where the modules must be asked one by one."""
    parts = layer._modules
    mlp = parts["mlp"]
    router: Any = mlp._modules.get("gate")
    experts: Any = mlp._modules.get("experts")
    if router is None or experts is None:
        return None
    for module in (parts["self_attn"], mlp, router, experts, parts[_NORMS[0]], parts[_NORMS[1]]):
        if not untouched(module):
            return None
    kinds = (parts[_NORMS[0]], Norm), (parts[_NORMS[1]], Norm), (router, Router), (experts, PackedExperts)
    if not all(isinstance(module, kind) for module, kind in kinds):
        return None  # something was put in its place
    own = experts.__dict__
    if experts._table is None or experts._apart or experts._remap is not None:
        return None
    if any(own.get(name) is not None for name in WATCHERS):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        weight, norm = router._parameters["weight"], parts[_NORMS[1]]._parameters["weight"]
        if not (one_token.in_halves(weight) and one_token.in_halves(norm)) or len(weight) != experts.num_experts:
            return None
        key = (experts._table, experts.activations, weight.data_ptr(), norm.data_ptr(), router.top_k)
        found: _Described | None = layer.__dict__.get("_moezip_block")
        if found is None or found.key != key:
            found = layer.__dict__["_moezip_block"] = _Described(key, layer)
        return found


def _run(
    layer: Any, hidden: torch.Tensor, positions: Any, mask: torch.Tensor | None, cache: Any, more: dict[str, Any]
) -> torch.Tensor | None:
    """What the layer returns; None where its modules must be asked, before anything was done."""
    parts = layer._modules
    attention, norm = parts["self_attn"], parts[_NORMS[0]]
    block = _described(layer)
    matrices = one_token.described_of(attention) if block is not None and one_token.plain(more) else None
    weight = norm._parameters["weight"]
    if block is None or matrices is None or not one_token.in_halves(weight):
        return None
    given = hidden.contiguous()
    query, key, value = one_token.heads(
        attention, matrices, given, positions, (weight.data_ptr(), known_epsilon(norm)), cache
    )
    found = one_query.on_the_library(
        query, key, value, mask, attention.scaling, matrices.last_matrix,
        block.block.rest(given.data_ptr()),
    )  # fmt: skip
    if found is None:  # a mask that the library does not take; the cache has the token by now
        middle = hidden + one_token.attended(attention, query, key, value, mask, more)
        found = middle + parts["mlp"](parts[_NORMS[1]](middle))
    return found


def fits(layer: Any) -> bool:
    """Whether a layer gives the same bits by its modules and here, of small numbers and of large ones."""
    attention = layer._modules["self_attn"]
    for size in (1.0, 64.0):
        random = torch.Generator().manual_seed(1)
        columns = layer._modules[_NORMS[0]]._parameters["weight"].shape[0]
        hidden = (size * torch.randn(2, 1, columns, generator=random)).bfloat16()
        positions = tuple(torch.randn(2, 1, 1, max(attention._moezip_turned), generator=random).bfloat16())
        with torch.no_grad():
            found = _run(layer, hidden, positions, None, one_token.Watching(), {})
            wanted = type(layer).forward(
                layer, hidden, position_embeddings=positions, attention_mask=None,
                past_key_values=one_token.Watching(),
            )  # fmt: skip
        if found is None or not isinstance(wanted, torch.Tensor) or not torch.equal(found, wanted):
            return False
    return True

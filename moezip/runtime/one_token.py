"""Attention layers on one new token, on the CPU: what is between their products takes two calls in place of twenty.

Most families attend alike: products with q, k and v, perhaps an RMS norm of each head, a rotary embedding, the cache,
``softmax(q k) v``, a product with o. For one token torch then spends most of its time on being called. Whether a layer
is of that form is not read off its name: it is asked, with random numbers and a cache that looks at what it is given,
and where the answer differs the layer stays as it is (``fits``).

This module imports transformers' models, so it is imported where one is built and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moezip.kernels import products, unpacked
from moezip.runtime import one_query
from moezip.runtime.derived import Derived, derived, untouched
from moezip.runtime.linear import PackedLinear
from moezip.runtime.norms import Norm, known_epsilon

_GIVEN = ("position_embeddings", "attention_mask", "past_key_values")
TAKES = {"hidden_states", *_GIVEN}
_HAS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# What differs by more than this share of the largest number is another function: bf16 keeps 8 bits, and a few numbers
# are rounded one after the other.
NEAR = 2.0**-5


def use(model: Any) -> None:
    """Has the layers that fit attend here; after ``one_query.use`` and ``norms.use``."""
    if model.config._attn_implementation != one_query.NAME:
        return
    for module in model.modules():
        if _has_the_parts(module):
            # all of a head is turned, or half of it
            fitting = frozenset(turned for turned in (module.head_dim, module.head_dim // 2) if fits(module, turned))
            if fitting:
                module._moezip_turned = fitting  # type: ignore[assignment]
                module.__class__ = derived(Attention, type(module))


def _has_the_parts(module: Any) -> bool:
    """Whether there is all that ``_attend`` reads, in bf16 on the CPU."""
    if any(not isinstance(module._modules.get(name), nn.Module) for name in _HAS):
        return False
    width = getattr(module, "head_dim", None)
    return (
        isinstance(width, int)
        and 0 < width <= unpacked.WIDEST_HEAD
        and width % 4 == 0
        and isinstance(getattr(module, "scaling", None), float)
        and isinstance(getattr(module, "layer_idx", None), int)
        and set(inspect.signature(type(module).forward).parameters) >= TAKES
        and _whole(module) is not None
        and all(each.is_cpu for each in (*module.parameters(), *module.buffers()))
        and all(each.dtype == torch.bfloat16 for each in module.parameters())
    )


def _whole(layer: Any) -> bool | None:
    """Whether queries and keys are normed with all heads as one; None where it is neither that nor by head."""
    found = set()
    for name, product in zip(_NORMS, _HAS, strict=False):
        norm = layer._modules.get(name)
        if norm is None:
            continue
        if not isinstance(norm, Norm) or norm.once:
            return None
        size = tuple(norm._parameters["weight"].shape)  # type: ignore[attr-defined]
        if size not in ((layer.head_dim,), (layer._modules[product].out_features,)):
            return None
        found.add(size != (layer.head_dim,))
    return None if len(found) > 1 else True in found


class Watching:
    """A cache with three tokens in it, which remembers what it is given."""

    updates = 0

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.given = key, value
        self.updates += 1
        earlier = torch.randn((2, *key.shape[:2], 3, key.shape[3]), generator=torch.Generator().manual_seed(2))
        return (
            torch.cat([earlier[0].to(key.dtype), key], 2),
            torch.cat([earlier[1].to(value.dtype), value], 2),
        )


def fits(layer: Any, turned: int) -> bool:
    """Whether a layer does with a token what ``_attend`` does, where positions turn ``turned`` columns of a head.

    Asked with numbers of size 1, and with large ones, as some layers clip what is large.
    """
    return _fits(layer, turned, 1.0) and _fits(layer, turned, 1024.0)


def _fits(layer: Any, turned: int, size: float) -> bool:
    random = torch.Generator().manual_seed(1)
    hidden = (size * torch.randn(1, 1, layer.q_proj.in_features, generator=random)).bfloat16()
    positions = tuple(torch.randn(2, 1, 1, turned, generator=random).bfloat16())
    ours, theirs = Watching(), Watching()
    with torch.no_grad():
        try:
            wanted = type(layer).forward(
                layer, hidden, position_embeddings=positions, attention_mask=None, past_key_values=theirs
            )[0]  # fmt: skip
        except RuntimeError:
            return False  # it turns another number of columns
        if not hasattr(theirs, "given") or wanted.shape != hidden.shape:
            return False
        if theirs.given[1].shape[-1] != layer.head_dim:
            return False
        found = _attend(layer, hidden, positions, None, ours, {})[0]
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= NEAR * other.abs().max())
        for one, other in zip((found, *ours.given), (wanted, *theirs.given), strict=True)
    )


class Attention(Derived):
    """An attention layer of the usual form."""

    def forward(self, hidden_states: torch.Tensor, *others: Any, **given: Any) -> Any:
        """As the layer's own, whose order of arguments differs by family; of one token in bf16 [n, 1, D] here."""
        own: Any = self
        if others or not takes(own, hidden_states, given.get("position_embeddings")):
            return super().forward(hidden_states, *others, **given)  # type: ignore[misc]
        return _attend(own, hidden_states, *asked(given))


def asked(given: dict[str, Any]) -> tuple[Any, torch.Tensor | None, Any, dict[str, Any]]:
    """Positions, mask and cache of what a layer is called with, and the rest."""
    more = dict(given)
    positions, mask, cache = (more.pop(name, None) for name in _GIVEN)
    return positions, mask, cache, more


def takes(layer: Any, hidden: torch.Tensor, positions: Any) -> bool:
    """Whether a layer of this class attends here to ``hidden``."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and hidden.dtype == torch.bfloat16
        and hidden.is_cpu
        and hidden.dim() == 3
        and hidden.shape[1] == 1
        and layer.config._attn_implementation == one_query.NAME
        and positions is not None
        and positions[0].dtype == torch.bfloat16
        and positions[0].shape[-1] in layer._moezip_turned
        and not layer.training
        and all(_stands(layer._modules.get(name)) for name in _NORMS)
    )


def _stands(norm: Any) -> bool:
    """Whether a norm of heads, or none, is still what it was when the layer was asked."""
    known = norm is None or isinstance(norm, Norm)
    return known and (norm is None or (untouched(norm) and in_halves(norm._parameters["weight"])))


def in_halves(weight: torch.Tensor) -> bool:
    """Whether the library can read it: in bf16, and not somewhere else until it is needed."""
    return weight.dtype == torch.bfloat16 and weight.is_cpu and weight.is_contiguous()


class Described:
    """The matrices of a layer as the library takes them, good while ``key`` is what the modules say it is."""

    def __init__(self, key: Any, layer: Any):
        products_of = [_either(layer._modules[name]) for name in _HAS]
        self.key = key
        self.given, self.last = unpacked.Matrices(*products_of[:3]), unpacked.Matrices(products_of[3])
        self.whole = bool(_whole(layer))
        self.rows = [layer._modules[name].out_features for name in _HAS]
        self.paths = [products.path_of(True, getattr(layer._modules[name], "activations", "exact")) for name in _HAS]
        self.last_matrix = self.last.address, self.paths[3], self.rows[3]

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy's layer has matrices of its own


def _either(module: Any) -> Any:
    if isinstance(module, PackedLinear):
        return module.matrix
    bias = module.bias
    return (module.weight.data_ptr(), *module.weight.shape, 0 if bias is None else bias.data_ptr())


def _key(module: Any) -> Any:
    """Changes when what the library would be told of a module does; None where it cannot do what the module does."""
    if not untouched(module):
        return None
    if type(module) is PackedLinear:
        return None if module.matrix is None and not module.lay_out() else (module.matrix, module.activations)
    if type(module) is not nn.Linear:
        return None
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if not all(each is None or in_halves(each) for each in (weight, bias)):
        return None
    return weight.data_ptr(), None if bias is None else bias.data_ptr()  # type: ignore[union-attr]


def described_of(layer: Any) -> Described | None:
    """None where the modules must be asked one by one."""
    modules = layer._modules
    with torch._C.DisableTorchFunctionSubclass():
        key = [_key(modules[name]) for name in _HAS]
        if None in key:
            return None
        found: Described | None = layer.__dict__.get("_moezip_described")
        if found is None or found.key != key:
            found = Described(key, layer)
            # products of queries, keys and values are one call, which has one kind of activations
            if len(set(found.paths[:3])) > 1:
                return None
            layer.__dict__["_moezip_described"] = found
        return found


def _attend(
    layer: Any, hidden: torch.Tensor, positions: Any, mask: torch.Tensor | None, cache: Any, more: dict[str, Any]
) -> tuple[torch.Tensor, None]:
    described = described_of(layer) if len(hidden) <= unpacked.MOST_TOKENS else None
    if described is None:
        return _by_modules(layer, hidden, positions, mask, cache, more)
    query, key, value = heads(layer, described, hidden, positions, (None, 0.0), cache)
    found = None
    if plain(more):
        found = one_query.on_the_library(query, key, value, mask, layer.scaling, described.last_matrix)
    if found is None:
        found = attended(layer, query, key, value, mask, more)
    return found, None


def heads(
    layer: Any,
    described: Described,
    hidden: torch.Tensor,
    positions: Any,
    norm: tuple[int | None, float],
    cache: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of a token, and keys and values of all that the cache has with it.

    Args:
        norm: of ``hidden`` before all else: the address of its weight or None, and its epsilon.
    """
    width, batch, modules = layer.head_dim, len(hidden), layer._modules
    cosine, sine = (each.contiguous() for each in positions)
    turned, given = cosine.shape[-1], hidden.contiguous()
    query, key, value = (
        torch.empty((batch, rows // width, 1, width), dtype=hidden.dtype) for rows in described.rows[:3]
    )
    products.native().heads(
        described.given.address, described.paths[0], given.data_ptr(), norm, batch, width,
        (*_normed(modules.get("q_norm")), *_normed(modules.get("k_norm")), described.whole),
        (cosine.data_ptr(), sine.data_ptr(), turned, turned if len(cosine) > 1 else 0),
        (query.data_ptr(), key.data_ptr(), value.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    if cache is not None:
        key, value = cache.update(key, value, layer.layer_idx)
    return query, key, value


def attended(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    more: dict[str, Any],
) -> torch.Tensor:
    """What the layer makes of them, where the library has no attention for them."""
    out, _ = one_query.attention(layer, query, key, value, mask, scaling=layer.scaling, **more)
    found: torch.Tensor = layer._modules["o_proj"](out.reshape(len(query), 1, -1))
    return found


def plain(more: dict[str, Any]) -> bool:
    return not any(more.get(name) is not None for name in one_query.FOR_SDPA)


def _by_modules(
    layer: Any, hidden: torch.Tensor, positions: Any, mask: torch.Tensor | None, cache: Any, more: dict[str, Any]
) -> tuple[torch.Tensor, None]:
    """The same, of modules that somebody listens to, or put something in the place of, or of more tokens."""
    modules, width, batch = layer._modules, layer.head_dim, len(hidden)
    cosine, sine = (each.contiguous() for each in positions)
    query = _turned(modules["q_proj"](hidden), modules.get("q_norm"), cosine, sine, width)
    key = _turned(modules["k_proj"](hidden), modules.get("k_norm"), cosine, sine, width)
    value = modules["v_proj"](hidden).view(batch, -1, 1, width)
    if cache is not None:
        key, value = cache.update(key, value, layer.layer_idx)
    out, _ = one_query.attention(layer, query, key, value, mask, scaling=layer.scaling, **more)
    return modules["o_proj"](out.reshape(batch, 1, -1)), None


def _normed(norm: nn.Module | None) -> tuple[int | None, float]:
    if norm is None:
        return None, 0.0
    return norm._parameters["weight"].data_ptr(), known_epsilon(norm)  # type: ignore[union-attr]


def _turned(
    x: torch.Tensor, norm: nn.Module | None, cosine: torch.Tensor, sine: torch.Tensor, width: int
) -> torch.Tensor:
    """``x`` [n, 1, H d], normed by head and turned: [n, H, 1, d]."""
    batch = len(x)
    heads, turned = x.shape[-1] // width, cosine.shape[-1]
    if norm is not None and norm._parameters["weight"].shape != (width,):  # type: ignore[union-attr]
        x, norm = norm(x), None
    out = torch.empty((batch, heads, 1, width), dtype=x.dtype)
    x = x.contiguous()
    products.native().turn(
        x.data_ptr(), (batch, heads, width), *_normed(norm),
        (cosine.data_ptr(), sine.data_ptr(), turned, turned if len(cosine) > 1 else 0), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out

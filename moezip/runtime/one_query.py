"""Attention of one new token on the CPU, which packed models generate with.

torch's kernel for the CPU takes its time over a single query in 16 bits: with 32 heads of 128 over 512 keys, 2.8 ms,
where the same products in float32 take 0.2 (measured, one thread of a Zen 5). Next to packed experts that is most of a
token. Here heads that share keys are multiplied together and nothing is repeated; numbers are float32 until the result
is rounded, so it is no less exact. Whatever is not a single query in 16 bits on the CPU goes to torch as ever.

This module imports transformers' models, so it is imported where one is built and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moezip.kernels import products, unpacked

NAME = "moezip_one_query"
_MASKS = {torch.bool: unpacked.LOOKS, torch.bfloat16: unpacked.ADDED_BF16, torch.float32: unpacked.ADDED_F32}
# What sdpa_attention_forward takes, and this does not.
FOR_SDPA = ("position_bias", "cache", "softcap", "s_aux")


def use(model: Any) -> None:
    """Has a model that attends by ``sdpa`` attend by this; any other stays as it is."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """[n, L, H, d'] of ``query`` [n, H, L, d], ``key`` [n, H', S, d] and ``value`` [n, H', S, d'], H' a divisor of H.

    Args:
        attention_mask: [n, 1 or H, L, S or more], False or very negative where a token may not look; None for all.
    """
    if (
        query.shape[2] != 1
        or query.device.type != "cpu"
        or query.dtype not in (torch.bfloat16, torch.float16)
        or dropout
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(more.get(name) is not None for name in FOR_SDPA)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )  # fmt: skip
    found = on_the_library(query, key, value, attention_mask, scaling)
    if found is None:
        found = one_query(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous()
    return found, None


def on_the_library(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    matrix: tuple[int, int, int] | None = None,
    rest: tuple[int | None, int | None, float, float, float] = (None, None, 0.0, 0.0, 0.0),
) -> torch.Tensor | None:
    """[n, 1, H, d'], or with a matrix [n, 1, R]; None where the C++ library cannot.

    Args:
        matrix: that the heads are multiplied by: address (``moezip.kernels.unpacked.Matrices``), path and R.
        rest: of a decoder layer, as ``moezip.kernels.native`` takes it; then [n, 1, R] is what the layer returns.
    """
    if query.dtype != torch.bfloat16 or not products.available():
        return None
    batch, heads, _, width = query.shape
    shared, length, out_width = value.shape[1:]
    queries, keys, values = query.stride(), key.stride(), value.stride()
    if queries[3] != 1 or keys[3] != 1 or values[3] != 1:
        return None
    given: tuple[int | None, int, int, int] = (None, unpacked.NO_MASK, 0, 0)
    if mask is not None:
        kind = _MASKS.get(mask.dtype)
        if kind is None or mask.stride(3) != 1 or mask.shape[2] != 1 or mask.shape[3] < length:
            return None
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
            return None
        by_sequence, by_head = (mask.stride(axis) if mask.shape[axis] > 1 else 0 for axis in (0, 1))
        given = (mask.data_ptr(), kind, by_sequence, by_head)
    out = torch.empty((batch, 1, heads, out_width) if matrix is None else (batch, 1, matrix[2]), dtype=query.dtype)
    products.native().attend(
        (query.data_ptr(), key.data_ptr(), value.data_ptr()),
        (batch, heads, shared, length, width, out_width),
        (*queries[:2], *keys[:3], *values[:3]),
        given, width**-0.5 if scaling is None else scaling, (None, 0) if matrix is None else matrix[:2],
        out.data_ptr(), torch.get_num_threads(), rest,
    )  # fmt: skip
    return out


def one_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """[n, H, 1, d'] as ``attention`` has them, in the dtype of ``query``."""
    batch, heads, _, width = query.shape
    shared, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, shared, heads // shared, width).float()
    products = torch.matmul(grouped, key.float().transpose(2, 3)) * (width**-0.5 if scaling is None else scaling)
    if mask is not None:
        mask = mask[..., :length]
        if mask.shape[1] != 1:
            mask = mask.reshape(mask.shape[0], shared, heads // shared, length)
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask
    found = torch.matmul(products.softmax(-1), value.float())
    return found.reshape(batch, heads, 1, value.shape[-1]).to(query.dtype)

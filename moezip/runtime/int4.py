"""Products with packed matrices where there is no C++ library: by the one that torch has for 4 bits.

torch's ``_weight_int4pack_mm_for_cpu`` takes groups of 32, 64, 128 or 256, rows in sixteens and activations in bf16. A
weight is (code - 8) x scale + offset there; per group both are in bf16, so a scale stored in fp16 is rounded. Codes of
up to 4 bits are such codes whatever their zero, and codes of more bits are two of them, the upper at 16 scales.
Beside the codes as they are stored, a matrix then has them in torch's layout: 4 or 8 bits of memory per weight more.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from moezip.formats.packed import Grid, unpacked
from moezip.kernels import products

if TYPE_CHECKING:
    from moezip.runtime.linear import Packed

GROUPS = (32, 64, 128, 256)
ROWS = 16
# Tokens up to which it is faster than decoding by torch and multiplying then. Measured at [768, 2048] in 4 bits on one
# thread of a Zen 5: 61 us for one token and 18 for each further one, against 29 ms and 7.
MOST_TOKENS = 1024

# Codes, and scales with offsets [G, R, 2], of each product.
Laid = list[tuple[torch.Tensor, torch.Tensor]]


def can_run(value: torch.Tensor, matrices: Sequence[Any]) -> bool:
    """Whether to multiply ``value`` [..., C] by these matrices here: there is no library, and torch has the product."""
    return (
        not products.available()
        and value.dtype == torch.bfloat16
        and value.is_cpu
        and 0 < value.numel() <= MOST_TOKENS * value.shape[-1]
        and not (torch.is_grad_enabled() and value.requires_grad)
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and all(_fits(matrix) for matrix in matrices)
    )


def _fits(matrix: Any) -> bool:
    grid: Grid | None = getattr(matrix, "grid", None)
    if grid is None:
        return False
    return matrix.columns // grid.groups(matrix.columns) in GROUPS and not matrix.rows % ROWS


def product(value: torch.Tensor, matrix: Packed) -> torch.Tensor:
    """``value`` [..., C] times a matrix [R, C] that ``can_run``: [..., R]."""
    if matrix.int4 is None:
        matrix.int4 = _laid_out(matrix)
    group = matrix.columns // matrix.grid.groups(matrix.columns)
    given = value.reshape(-1, matrix.columns).contiguous()
    parts = [torch.ops.aten._weight_int4pack_mm_for_cpu(given, codes, group, both) for codes, both in matrix.int4]
    rows: torch.Tensor = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return rows.view(*value.shape[:-1], matrix.rows)


def _laid_out(matrix: Packed) -> Laid:
    """Codes are moved so that the usual zero is torch's own, 8: offsets are small then, and lose little in bf16."""
    stored = unpacked(matrix.tensors(), matrix.grid)
    bits, codes, scales = matrix.grid.bits, stored.codes.to(torch.int32), stored.scales.float()
    if bits == 1:  # scale (2 code - 1), as (code + 7 - 8) x 2 scale + scale
        return [_part(codes + 7, 2 * scales, scales)]
    usual = 2 ** (bits - 1)
    zeros = torch.full_like(scales, usual) if stored.zeros is None else stored.zeros.float()
    if bits <= 4:
        return [_part(codes + 8 - usual, scales, (usual - zeros) * scales)]
    # 16 scale (upper - zero's upper) + scale (lower - zero's lower)
    upper = (zeros / 16).floor()
    return [
        _part((codes >> 4) + 8 - usual // 16, 16 * scales, 16 * (usual // 16 - upper) * scales),
        _part(codes & 15, scales, (8 - (zeros - 16 * upper)) * scales),
    ]


def _part(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.stack([scales, offsets], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1), both

"""Matrices that stay packed in memory, and the modules that multiply by them.

``packed_linear`` and ``packed_rows`` are the two places where a product with packed codes is computed: one decodes a
matrix with torch, multiplies and forgets it. Whatever is faster goes there, and nowhere else.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.arch.ragged import Matrix, RaggedExperts
from moezip.formats.packed import PACKED, SHAPE, WORD, ZERO, Grid, check, dequantize, torch_dtype, unpacked, words
from moezip.formats.stored import CHUNK


def packed_linear(
    value: torch.Tensor, tensors: Mapping[str, torch.Tensor], grid: Grid, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``value`` [..., C] times a packed matrix [R, C]: [..., R] in the dtype of ``value``.

    Args:
        tensors: by suffix, as ``moezip.formats.packed`` stores them; checked once, when they were loaded.
    """
    return F.linear(value, decoded(tensors, grid, value.dtype), bias)


def packed_rows(value: torch.Tensor, matrices: Sequence[Packed | Matrix], bias: torch.Tensor | None) -> torch.Tensor:
    """``value`` [n, C] times matrices of as many columns, one above the other: [n, sum of R].

    Gate and up of an expert are multiplied by as one, because that is how they are where nothing is packed, and two
    products may round otherwise.
    """
    if len(matrices) == 1 and isinstance(matrices[0], Packed):
        return packed_linear(value, matrices[0].tensors(), matrices[0].grid, bias)
    weights = [
        decoded(matrix.tensors(), matrix.grid, value.dtype) if isinstance(matrix, Packed) else matrix.weight
        for matrix in matrices
    ]
    return F.linear(value, torch.cat(weights), bias)


def decoded(tensors: Mapping[str, torch.Tensor], grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """[R, C] in ``dtype``: computed in float32 and rounded once, large matrices in pieces of rows."""
    rows, columns = tensors[PACKED].shape[0], int(tensors[SHAPE][1])
    step = max(1, CHUNK // (4 * columns * WORD)) * WORD  # the zeros of 32 rows fill whole words
    if rows <= step:
        return dequantize(unpacked(tensors, grid), dtype)
    whole = torch.empty((rows, columns), dtype=dtype, device=tensors[PACKED].device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}
        part[SHAPE] = torch.tensor([stop - start, columns])
        if ZERO in tensors:
            part[ZERO] = tensors[ZERO][start * grid.bits // WORD : words(stop, grid.bits)]
        whole[start:stop] = dequantize(unpacked(part, grid), dtype)
    return whole


class Packed(nn.Module):
    """Holds one matrix [R, C] as packed codes, in buffers named as on disk, and one ``bias`` [R] or None.

    The buffers keep their dtypes whatever the module is cast to: the scales say what the codes stand for.

    Args:
        grid: of the codes. rows, columns: R, C.
        bias: of the matrix that it replaces.
        device: of the buffers.
    """

    bias: nn.Parameter | None

    def __init__(self, grid: Grid, rows: int, columns: int, bias: nn.Parameter | None, device: torch.device):
        super().__init__()
        self.grid, self.rows, self.columns = grid, rows, columns
        for suffix, (dtype, shape) in grid.specs(rows, columns).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=torch_dtype(dtype), device=device))
        self.register_parameter("bias", bias)

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, {self.grid}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix."""
        return {suffix: buffer for suffix, buffer in self._buffers.items() if buffer is not None}

    def require_sound(self, where: str) -> None:
        """Raises CheckpointError if the stored tensors cannot be those of this matrix."""
        check(self.tensors(), self.grid, where)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Packed:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class PackedLinear(Packed):
    """A packed matrix in the place of an ``nn.Linear``."""

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` [..., C] to [..., R]."""
        return packed_linear(value, self.tensors(), self.grid, self.bias)


class PackedExperts(RaggedExperts):
    """``RaggedExperts`` some of whose matrices are ``Packed``; they are decoded one expert at a time."""

    def expert_linear(self, name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
        if not self.widths[expert]:
            return super().expert_linear(name, expert, value)
        roles = ("gate", "up") if name == "gate_up_proj" else ("down",)
        matrices = [self.matrix(expert, role) for role in roles]
        if not any(isinstance(matrix, Packed) for matrix in matrices):
            return super().expert_linear(name, expert, value)
        return packed_rows(value, matrices, self._bias(name, expert) if self.has_bias else None)

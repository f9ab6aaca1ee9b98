"""Scales and zeros of groups of weights, and what rounding makes of them.

Inside this room a group is a ``step`` and a ``zero``: weight = step * (code - zero), for every width. With one bit that
is step = 2 * scale and zero = 1/2, which gives the format's scale * (2 * code - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezip import kernels
from moezip.errors import UsageError
from moezip.formats.packed import Codes, Grid

Array = npt.NDArray[Any]

CLIPS = ("search", "minmax")
# A group whose weights are this much smaller than its row's largest is as good as 0; its scale is not made smaller.
SMALLEST = 2.0**-14


def require_clip(clip: str) -> None:
    """Raises UsageError unless ``clip`` is one of CLIPS."""
    if clip not in CLIPS:
        raise UsageError(f"clip is {clip!r}", where=f"--set clip={clip}", next=f"use {' or '.join(CLIPS)}")


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups of a matrix [R, C].

    Attributes:
        grid: what they belong to.
        step, zero: float32 [R, G], exactly what the stored form decodes to; zeros are whole except with one bit.
    """

    grid: Grid
    step: Array
    zero: Array

    @property
    def top(self) -> int:
        """The largest code."""
        return self.grid.levels - 1

    @property
    def scales(self) -> Array:
        """float32 [R, G], as the format has them."""
        return np.ascontiguousarray(self.step / _steps_per_scale(self.grid))

    @property
    def zeros(self) -> Array | None:
        """uint8 [R, G], as the format has them; None where it has none."""
        return None if self.grid.symmetric else self.zero.astype(np.uint8)

    def values(self, codes: Array) -> Array:
        """float32 [R, C], the weights behind codes [R, C]."""
        rows, columns = codes.shape
        grouped = codes.reshape(rows, self.step.shape[1], -1).astype(np.float32)
        return ((grouped - self.zero[..., None]) * self.step[..., None]).reshape(rows, columns)

    def nearest(self, weight: Array) -> Array:
        """uint8 [R, C], the code nearest to each weight [R, C]."""
        return kernels.round_codes(weight, self.scales, self.zeros, self.grid.group, self.grid.bits)

    def with_steps(self, step: Array) -> Groups:
        """The same zeros, and the steps nearest to ``step`` [R, G] that can be stored."""
        return Groups(self.grid, stored(self.grid, step), self.zero)

    def codes(self, codes: Array) -> Codes:
        """``codes`` [R, C] in the form that is stored."""
        import torch

        zeros = None if self.zeros is None else torch.from_numpy(self.zeros)
        return Codes(self.grid, torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(self.scales), zeros)


def _steps_per_scale(grid: Grid) -> np.float32:
    return np.float32(2.0 if grid.bits == 1 else 1.0)


def stored(grid: Grid, step: Array) -> Array:
    """float32 [R, G], the steps that the stored scales stand for."""
    import torch

    factor = _steps_per_scale(grid)
    kept: Array = grid.stored_scales(torch.from_numpy(np.ascontiguousarray(step / factor, np.float32))).numpy()
    return kept * factor


def fit(weight: Array, importance: Array | None, grid: Grid, clip: str) -> Groups:
    """The groups for rounding ``weight``, row by row and group by group.

    ``search`` cuts the range of a group off at several shares of it, at both ends, and takes what makes
    sum_c importance_c (w_c - rounded w_c)^2 smallest; ``minmax`` takes the whole range. The range always holds 0. One
    bit: the scale is the importance-weighted mean of |w|, the least-squares answer.

    Args:
        weight: float32 [R, C].
        importance: [C], at least 0; all alike by default.

    Returns:
        The groups; their grid has BF16 scales where F16 could not hold them (``Grid.fitting``).

    Raises:
        PlanError: groups that do not divide the columns.
    """
    import torch

    count = grid.groups(weight.shape[1])
    candidates = np.ones(1, np.float32) if clip == "minmax" else None
    shares = None if importance is None else np.ascontiguousarray(importance, np.float32)
    scales, zeros = kernels.clip_search(
        weight, grid.group, grid.bits, grid.symmetric, candidates=candidates, importance=shares, scale_dtype=grid.scale
    )
    empty = ~weight.reshape(len(weight), count, -1).any(-1)
    largest = np.where(empty, 0, scales).max(1, keepdims=True)  # the search gives empty groups a scale of 1
    scales = np.maximum(np.where(empty, largest, scales), SMALLEST * largest)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)  # a row of zeros: any scale gives zeros
    grid = grid.fitting(torch.from_numpy(scales))
    if zeros is not None:
        zero = zeros.astype(np.float32)
    else:
        zero = np.full_like(scales, 0.5 if grid.bits == 1 else grid.levels // 2)
    return Groups(grid, stored(grid, scales * _steps_per_scale(grid)), zero)

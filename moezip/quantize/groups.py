"""Scales and zeros of groups of weights: where they come from, and what rounding makes of them.

Inside this room a group is a ``step`` and a ``zero``: weight = step * (code - zero), for every width. With one bit that
is step = 2 * scale and zero = 1/2, which gives the format's scale * (2 * code - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moezip.formats.packed import Codes, Grid

if TYPE_CHECKING:
    pass

Array = npt.NDArray[Any]

# Shares of the range of a group at which the search cuts it off.
SHRINK = tuple(np.linspace(1.0, 0.4, 11).tolist())
# Rounds of: round with the best step so far, fit the step to these codes by least squares, try the neighbouring zeros.
ROUNDS = 2
# A group whose weights are this much smaller than its row's largest is as good as 0; its step is not made smaller.
SMALLEST = 2.0**-14
# Rows are searched a few at a time, so that what is tried over and over stays in the cache: weights at a time.
CACHED = 32_768


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Attributes:
    step, zero: float32 [R, G], exactly what the stored form decodes to; zeros are whole numbers except with one bit.
    """

    step: Array
    zero: Array

    def values(self, codes: Array) -> Array:
        """float32 [R, C], the weights behind codes [R, C]."""
        rows, columns = codes.shape
        grouped = codes.reshape(rows, self.step.shape[1], -1).astype(np.float32)
        return ((grouped - self.zero[..., None]) * self.step[..., None]).reshape(rows, columns)

    def nearest(self, weight: Array, top: int) -> Array:
        """uint8 [R, C], the code nearest to each weight [R, C]."""
        rows, columns = weight.shape
        grouped = weight.reshape(rows, self.step.shape[1], -1)
        return nearest(grouped, self.step[..., None], self.zero[..., None], top).reshape(rows, columns).astype(np.uint8)


def nearest(weight: Array, step: Array, zero: Array, top: int) -> Array:
    """The codes, still as floats, nearest to weights: round half to even, clipped to 0 .. top."""
    return np.clip(np.rint(weight / step + zero), 0, top)


def top_code(grid: Grid) -> int:
    """The largest code."""
    return grid.levels - 1


def stored(grid: Grid, step: Array) -> Array:
    """The steps [R, G] that the stored scales stand for."""
    import torch

    half = np.float32(2.0 if grid.bits == 1 else 1.0)
    kept: Array = grid.stored_scales(torch.from_numpy(np.ascontiguousarray(step / half, np.float32))).numpy()
    return kept * half


def to_codes(grid: Grid, codes: Array, groups: Groups) -> Codes:
    """What the format stores."""
    import torch

    scales = torch.from_numpy(np.ascontiguousarray(groups.step / np.float32(2.0 if grid.bits == 1 else 1.0)))
    zeros = None if grid.symmetric else torch.from_numpy(groups.zero.astype(np.uint8))
    return Codes(grid, torch.from_numpy(np.ascontiguousarray(codes)), scales, zeros)


def fit(weight: Array, importance: Array | None, grid: Grid, clip: str) -> tuple[Grid, Groups]:
    """Steps and zeros for plain rounding, the best found per row and group.

    ``search`` cuts the range of each group off at several shares of it, then fits the step to the codes by least
    squares and tries the neighbouring zeros; what is smallest is sum_c importance_c (w_c - rounded w_c)^2. ``minmax``
    takes the whole range. The range always holds 0. One bit: the importance-weighted mean of |w|.

    Args:
        weight: float32 [R, C].
        importance: [C], at least 0; all alike by default.
        grid: codes and groups.
        clip: ``search`` or ``minmax``.

    Returns:
        The grid (with BF16 scales where F16 could not hold them) and its groups.
    """
    rows, columns = weight.shape
    count = grid.groups(columns)
    shares = np.ones((count, columns // count), np.float32)
    if importance is not None:
        shares = importance.reshape(count, -1).astype(np.float32)
        largest = shares.max(1, keepdims=True)  # each group by itself: only shares inside a group matter
        shares = np.where(largest > 0, np.maximum(shares / np.where(largest > 0, largest, 1), 1e-6), 1)
    step, zero = np.empty((rows, count), np.float32), np.empty((rows, count), np.float32)
    chunk = max(1, CACHED // columns)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        search = _Search(weight[part].reshape(-1, count, columns // count), shares, top_code(grid))
        step[part], zero[part] = search.run(grid, clip)
    floor = SMALLEST * step.max(1, keepdims=True)
    step = np.where(floor > 0, np.maximum(step, floor), 1).astype(np.float32)  # a row of zeros: any step gives zeros
    grid = _fitting(grid, step)
    return grid, Groups(stored(grid, step), zero)


def _fitting(grid: Grid, step: Array) -> Grid:
    import torch

    return grid.fitting(torch.from_numpy(step / np.float32(2.0 if grid.bits == 1 else 1.0)))


class _Search:
    """The best step and zero so far of some rows' groups [r, G, g]."""

    def __init__(self, weight: Array, shares: Array, top: int):
        self.weight, self.shares, self.top = weight, shares, top
        self.error = np.full(weight.shape[:2], np.inf, np.float32)
        self.step = np.zeros(weight.shape[:2], np.float32)
        self.zero = np.zeros(weight.shape[:2], np.float32)

    def run(self, grid: Grid, clip: str) -> tuple[Array, Array]:
        if grid.bits == 1:
            mean = (np.abs(self.weight) * self.shares).sum(-1) / self.shares.sum(-1)
            return 2 * mean, np.full_like(mean, 0.5)
        candidates = self._ends(grid, (1.0,) if clip == "minmax" else SHRINK)
        if clip == "minmax":
            return next(candidates)
        for step, zero in candidates:
            self._offer(step, zero, self._rounded(step, zero))
        for _ in range(ROUNDS):
            for shift in (0,) if grid.symmetric else (0, -1, 1):
                zero = np.clip(self.zero + shift, 0, self.top)
                codes = self._rounded(self.step, zero)
                step = self._least_squares(codes, zero)
                self._offer(step, zero, self._rounded(step, zero))
        return self.step, self.zero

    def _ends(self, grid: Grid, shrink: tuple[float, ...]) -> Iterator[tuple[Array, Array]]:
        low, high = np.minimum(self.weight.min(-1), 0), np.maximum(self.weight.max(-1), 0)
        for share in shrink:
            if grid.symmetric:
                step = 2 * share * np.maximum(high, -low) / self.top
                yield step, np.full_like(step, grid.levels // 2)
            else:
                step = share * (high - low) / self.top
                yield step, np.clip(np.rint(-share * low / np.where(step > 0, step, 1)), 0, self.top)

    def _rounded(self, step: Array, zero: Array) -> Array:
        """Codes less zero, [r, G, g]."""
        safe = np.where(step > 0, step, 1)[..., None]
        return nearest(self.weight, safe, zero[..., None], self.top) - zero[..., None]

    def _least_squares(self, codes: Array, zero: Array) -> Array:
        along = (self.shares * codes * self.weight).sum(-1)
        norm = (self.shares * codes * codes).sum(-1)
        good = (norm > 0) & (along > 0)
        return np.where(good, along / np.where(good, norm, 1), self.step)

    def _offer(self, step: Array, zero: Array, codes: Array) -> None:
        missed = codes * step[..., None] - self.weight
        error = (self.shares * missed * missed).sum(-1)
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.step = np.where(better, step, self.step)
        self.zero = np.where(better, zero, self.zero)

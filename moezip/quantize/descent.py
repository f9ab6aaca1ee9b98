"""Codes and steps improved against the whole hessian once there are some: coordinate descent.

The output error E = d H d^T of a row d is quadratic in each code and in each step while all others stand still, so the
best value of one is known in closed form: with G = d H,

    step of a group    step - (u G) / (u H u^T)           u = code - zero inside the group, 0 elsewhere
    code of column j   the one nearest to  v_j - G_j / H_jj   v = the row's present values

Both only ever lower E. A pass goes through the groups in order and needs one product, d H, all in all: what GPTQ's own
update costs twice. Own formulation; the code step is that of CDQuant (arXiv 2406.17542).
"""

from __future__ import annotations

import numpy as np

from moezip.formats.packed import Grid
from moezip.quantize.groups import Array, Groups, nearest, stored

# A new step below this share of the old one is not taken: the codes would no longer be near.
LEAST_STEP = 0.3
# Columns that tell each other of their moves at once; those behind them hear of all together, in one product.
NEAR = 16


def improve(
    weight: Array, hessian: Array, damping: float, codes: Array, groups: Groups, passes: int
) -> tuple[Array, Groups, Array]:
    """``passes`` passes over all groups.

    Args:
        weight: float32 [R, C]. hessian: float32 [C, C]. damping: added to its diagonal.
        codes: uint8 [R, C]. groups: their steps and zeros.

    Returns:
        Codes, groups, and float64 [R], how much E (with damping) changed: never above 0 where scales have no step of
        their own to be stored in.
    """
    changed = np.zeros(len(weight))
    for _ in range(passes):
        codes, groups, change = _one_pass(weight, hessian, damping, codes, groups, steps=True)
        changed += change
    if groups.grid.double and passes:  # steps moved freely; they are rounded together, and the codes follow
        kept = groups.with_steps(groups.step)
        before, after = groups.values(codes) - weight, kept.values(codes) - weight
        changed += _error(after, hessian, damping) - _error(before, hessian, damping)
        codes, groups, change = _one_pass(weight, hessian, damping, codes, kept, steps=False)
        changed += change
    return codes, groups, changed


def _error(change: Array, hessian: Array, damping: float) -> Array:
    moved = change @ hessian + np.float32(damping) * change
    total: Array = (moved.astype(np.float64) * change).sum(1)
    return total


def _one_pass(
    weight: Array, hessian: Array, damping: float, codes: Array, groups: Groups, *, steps: bool
) -> tuple[Array, Groups, Array]:
    count = groups.step.shape[1]
    width = weight.shape[1] // count
    codes, step, zero = codes.copy(), groups.step.copy(), groups.zero
    changes = groups.values(codes) - weight
    gained = np.zeros(len(weight))
    for group in range(count):
        part = slice(group * width, (group + 1) * width)
        inner = hessian[part, part].copy()
        inner.flat[:: width + 1] += np.float32(damping)
        slope = changes @ hessian[:, part] + np.float32(damping) * changes[:, part]
        if steps:
            unit = codes[:, part].astype(np.float32) - zero[:, group, None]
            new, gain = _step(unit, slope, inner, step[:, group], groups.grid)
            shift = (new - step[:, group])[:, None] * unit
            changes[:, part] += shift
            slope += shift @ inner
            step[:, group] = new
            gained += gain
        found, moved, gain = _codes(
            weight[:, part] + changes[:, part], slope, inner, step[:, group], zero[:, group], groups.top
        )
        codes[:, part], changes[:, part] = found, moved - weight[:, part]
        gained += gain
    return codes, Groups(groups.grid, step, zero), gained


def _step(unit: Array, slope: Array, inner: Array, step: Array, grid: Grid) -> tuple[Array, Array]:
    """The best step of one group per row, and what it gains, both [R]."""
    curve = ((unit @ inner) * unit).sum(1)
    along = (unit * slope).sum(1)
    best = step - np.divide(along, curve, out=np.zeros_like(along), where=curve > 0)
    best = np.where(best > LEAST_STEP * step, best, step).astype(np.float32)
    if not grid.double:
        best = stored(grid, best[:, None])[:, 0]
    move = (best - step).astype(np.float64)
    gain = move * (2 * along + move * curve)
    return np.where(gain < 0, best, step), np.minimum(gain, 0)


def _codes(values: Array, slope: Array, inner: Array, step: Array, zero: Array, top: int) -> tuple[Array, Array, Array]:
    """The best codes of one group, column after column: codes and values [R, g], and what they gain, [R]."""
    held = np.ascontiguousarray(values.T)  # [g, R]: a column is one run of memory
    slope = np.ascontiguousarray(slope.T)
    codes = np.empty(held.shape, np.uint8)
    gained = np.zeros(held.shape[1])
    curves = inner.diagonal()
    for start in range(0, len(held), NEAR):
        stop = min(start + NEAR, len(held))
        before = held[start:stop].copy()
        for column in range(start, stop):
            code = nearest(held[column] - slope[column] / curves[column], step, zero, top)
            value = step * (code - zero)
            move = value - held[column]
            gained += move * (2 * slope[column] + move * curves[column])
            slope[column:stop] += inner[column:stop, column, None] * move
            codes[column], held[column] = code, value
        slope[stop:] += inner[stop:, start:stop] @ (held[start:stop] - before)
    return codes.T, held.T, gained

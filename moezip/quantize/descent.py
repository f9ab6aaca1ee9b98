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
from moezip.quantize.groups import Array, Groups, stored

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
        old = codes[:, part].astype(np.float32)
        new, gain = _codes(old, slope / step[:, group, None], inner, groups.top)
        codes[:, part] = new
        changes[:, part] += (new - old) * step[:, group, None]
        gain *= step[:, group].astype(np.float64) ** 2
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


def _codes(codes: Array, slope: Array, inner: Array, top: int) -> tuple[Array, Array]:
    """The best codes of one group, column after column: float32 [R, g], and what they gain in steps squared, [R].

    In units of the step: v_j - G_j / H_jj is the code less slope_j / H_jj, whatever the zero.
    """
    held = codes.T.copy()  # [g, R]: a column is one run of memory
    slope = np.ascontiguousarray(slope.T)
    moves = np.empty_like(held)
    inverses = 1 / inner.diagonal()
    for start in range(0, len(held), NEAR):
        stop = min(start + NEAR, len(held))
        for column in range(start, stop):
            move = np.multiply(slope[column], -inverses[column], out=moves[column])
            move += held[column]
            np.rint(move, out=move)
            np.minimum(np.maximum(move, 0, out=move), top, out=move)
            move -= held[column]
            slope[column + 1 : stop] += inner[column + 1 : stop, column, None] * move
        slope[stop:] += inner[stop:, start:stop] @ moves[start:stop]
    # the slope of each column is still the one that its move was made on
    gained = (moves * (2 * slope + moves * inner.diagonal()[:, None])).sum(0, dtype=np.float64)
    held += moves
    return np.ascontiguousarray(held.T), gained

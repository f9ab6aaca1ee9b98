"""Codes and steps improved against the whole hessian once there are some: coordinate descent.

The output error E = d H d^T of a row d is quadratic in each code and in each step while all others stand still, so the
best value of one is known in closed form: with G = d H,

    step of a group    step - (u G) / (u H u^T)           u = code - zero inside the group, 0 elsewhere
    code of column j   the one nearest to  v_j - G_j / H_jj   v = the row's present values

Both only ever lower E. A pass goes through the groups in order and needs one product, d H, all in all: what GPTQ's own
update costs twice. Own formulation; the code step is that of CDQuant (arXiv 2406.17542).
The pass itself is ``moezip.kernels.descend``.
"""

from __future__ import annotations

import numpy as np

from moezip import kernels
from moezip.formats.packed import Grid
from moezip.quantize.groups import Array, Groups


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
        codes, groups, change = _pass(weight, hessian, damping, codes, groups, steps=True)
        changed += change
    if _rounded_together(groups.grid) and passes:  # steps moved freely; they are rounded together, and the codes follow
        kept = groups.with_steps(groups.step)
        before, after = groups.values(codes) - weight, kept.values(codes) - weight
        changed += _error(after, hessian, damping) - _error(before, hessian, damping)
        codes, groups, change = _pass(weight, hessian, damping, codes, kept, steps=False)
        changed += change
    return codes, groups, changed


def _error(change: Array, hessian: Array, damping: float) -> Array:
    moved = change @ hessian + np.float32(damping) * change
    total: Array = (moved.astype(np.float64) * change).sum(1)
    return total


def _pass(
    weight: Array, hessian: Array, damping: float, codes: Array, groups: Groups, *, steps: bool
) -> tuple[Array, Groups, Array]:
    """One pass; steps that are stored in a form of their own move freely in it."""
    grid = groups.grid
    dtype = "F32" if _rounded_together(grid) else grid.scale
    codes, step, gain = kernels.descend(
        weight, hessian, np.ascontiguousarray(codes), groups.step, groups.zero, grid.bits,
        damping=damping, scale_dtype=dtype if steps else None,
    )  # fmt: skip
    return codes, Groups(grid, step, groups.zero), gain


def _rounded_together(grid: Grid) -> bool:
    """Scales that are no plain half-precision numbers: a pass cannot round one of them alone."""
    return grid.double or grid.scale == "F32"

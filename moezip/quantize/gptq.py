"""GPTQ (arXiv 2210.17323): each column is rounded in turn, and the columns after it make up for the error.

With H = mean of x x^T over the layer's inputs and U the upper Cholesky factor of its inverse, column i leaves
e_i = (w_i - rounded w_i) / U_ii, and every later column j becomes w_j - e_i U_ij. The error of the output is then
sum_i e_i^2, for any width: even signs are compensated, which MC-MoE (arXiv 2410.06270) leaves out below 4 bits.

- The columns with the largest inputs come first, when all others can still make up for them. Groups keep their place:
  their steps and zeros are chosen beforehand, each column counted as the error counts it after the others have made
  up for it, 1 / (H^-1)_jj.
- H is factored once: with the columns in reverse order, H = L L^T, the factor needed is L^-1 read backwards. One
  factorization and one triangular inverse, a third of the usual three.
- ``refine`` passes of coordinate descent over steps and codes follow (see ``moezip.quantize.descent``).
- A column that no input reached (H_jj = 0) is rounded to nearest, not zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moezip import kernels
from moezip.errors import MoezipError, UsageError
from moezip.formats.packed import Grid
from moezip.quantize.descent import improve
from moezip.quantize.groups import Array, fit, require_clip
from moezip.quantize.hessian import PRIOR
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as round_to_nearest
from moezip.quantize.solution import Solution, as_array
from moezip.registry import Method

if TYPE_CHECKING:
    import torch

ORDERS = ("activity", "natural")
# Where the hessian cannot be factored the damping grows tenfold, from and up to these shares of the mean diagonal.
LEAST_RAISED, MOST_DAMPING = 1e-4, 100.0
# Passes of refinement by default, and up to which width.
REFINED_PASSES, REFINED_BITS = 2, 3


@dataclass(frozen=True, slots=True)
class GptqParams:
    """Attributes:
    damp: share of the hessian's mean diagonal that is added to its diagonal; raised where that is not enough. The usual
        0.01 fits the calibration text better and other text worse.
    order: ``activity`` (columns with the largest inputs first) or ``natural``.
    clip: ``search`` the range of each group, or keep all of it (``minmax``).
    refine: passes of coordinate descent after the compensated rounding; 0 for plain GPTQ. -1 (the default): 2 up to
        3 bits, where a pass lowers the output error by a tenth or more, and 0 above.
    prior: an expert's hessian is mixed with as many pooled tokens as this times its columns.
    gate: tokens count by their gate weight in an expert's hessian (MoEQuant).
    """

    damp: float = 0.1
    order: str = "activity"
    clip: str = "search"
    refine: int = -1
    prior: float = PRIOR
    gate: bool = True

    def __post_init__(self) -> None:
        require_clip(self.clip)
        if self.order not in ORDERS:
            raise UsageError(f"order is {self.order!r}", where="--set order", next=f"use {' or '.join(ORDERS)}")
        for name, least in (("damp", 0), ("refine", -1), ("prior", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name)}", where=f"--set {name}", next=f"use {least} or more")

    def passes(self, bits: int) -> int:
        """Passes of refinement at this width."""
        if self.refine >= 0:
            return self.refine
        return REFINED_PASSES if bits <= REFINED_BITS else 0


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A hessian made ready; gate and up share one.

    Attributes:
        hessian: float32 [C, C], as given.
        order: int32 [C], columns from the last to be rounded to the first.
        upper: float32 [C, C] U, in that order: U U^T = inverse of the damped hessian.
        damping: what was added to the diagonal. share: the same as a share of the mean diagonal.
        raised: more than was asked for.
    """

    hessian: Array
    order: Array
    upper: Array
    damping: float
    share: float
    raised: bool

    @property
    def importance(self) -> Array:
        """[C], by column: what an error in it costs once all others have made up for it, 1 / (H^-1)_jj."""
        found = np.empty(len(self.order), np.float32)
        found[self.order] = 1 / np.einsum("ij,ij->i", self.upper, self.upper)
        return found


def factor(hessian: torch.Tensor, params: GptqParams) -> Factor | None:
    """``hessian`` [C, C] ready for any number of solves; None where it is 0, which tells nothing.

    Raises:
        CheckpointError: a value that is no finite number.
        MoezipError: no damping makes it invertible, so it is no sum of x x^T.
    """
    given = as_array(hessian, "hessian")
    diagonal = given.diagonal()
    mean = float(diagonal.mean(dtype=np.float64))
    if mean <= 0:
        return None
    natural = np.arange(len(given)) if params.order == "natural" else np.argsort(-diagonal, kind="stable")
    order = np.ascontiguousarray(natural[::-1], np.int32)
    share = params.damp
    while share <= MOST_DAMPING:
        try:
            upper = kernels.gptq_factor(given, order=order, damping=share * mean)
        except np.linalg.LinAlgError:
            share = max(10 * share, LEAST_RAISED)
        else:
            return Factor(given, order, upper, share * mean, share, share > params.damp)
    raise MoezipError(
        f"a hessian of {len(given)} columns cannot be factored, whatever is added to its diagonal",
        next="calibrate with more text, or in float32; --solver rtn needs no hessian",
    )


def solve(weight: torch.Tensor, hessian: torch.Tensor | Factor | None, grid: Grid, params: GptqParams) -> Solution:
    """Codes for ``weight`` [R, C], the output error the smallest that was found.

    Rows do not touch each other: stacked matrices with one input (gate and up) may be solved as one.

    Args:
        hessian: [C, C], mean of x x^T over the inputs; or what ``factor`` made of it. None, or all 0: no input is
            known and the weights are rounded to nearest, which ``Solution.blind`` says.

    Raises:
        CheckpointError: a weight, or an entry of the hessian, that is no finite number.
        PlanError: groups that do not divide the columns.
        MoezipError: a hessian that is none.
    """
    import torch

    ready = hessian if hessian is None or isinstance(hessian, Factor) else factor(hessian, params)
    if ready is None:
        return round_to_nearest(weight, None, grid, RtnParams(params.clip))
    values = as_array(weight, "weight")
    groups = fit(values, ready.importance, grid, params.clip)
    members = np.arange(values.shape[1], dtype=np.int32) // (values.shape[1] // groups.step.shape[1])
    solved = kernels.gptq(
        values, ready.upper, members, groups.scales, groups.zeros, groups.grid.bits, order=ready.order
    )
    codes, errors = solved.codes, solved.loss.astype(np.float64)
    if passes := params.passes(grid.bits):
        codes, groups, change = improve(values, ready.hessian, ready.damping, codes, groups, passes)
        errors += change
    # the damping's own share of the error is nobody's output
    moved = groups.values(codes)
    moved -= values
    errors -= ready.damping * np.einsum("ij,ij->i", moved, moved)
    return Solution(groups.codes(codes), torch.from_numpy(np.maximum(errors, 0)), ready.share, ready.raised)


GPTQ = Method(
    name="gptq",
    family="quantize",
    summary="rounds column by column, the rest making up for the error; then improves steps and codes together",
    paper="GPTQ, arXiv 2210.17323",
    needs=(),
    params=GptqParams,
    schedule="layerwise",
    run=solve,
)

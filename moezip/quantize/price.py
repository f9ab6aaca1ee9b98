"""What the codes of one matrix cost: its output error, rows weighted by how much the loss depends on them.

To second order, tokens one by one and gradients independent of inputs, a change dW raises the loss by
1/(2T) sum_r G_r dW_r H dW_r^T nats per token: G_r the sum over the matrix's tokens of the squared gradient of output r,
H the mean of x x^T over them, T all scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moezip.formats.packed import Grid, dequantize
from moezip.quantize.gptq import GptqParams, factor
from moezip.quantize.groups import fit
from moezip.quantize.solution import Solution, as_array, output_error_rows

if TYPE_CHECKING:
    import torch

    from moezip.calibrate.moments import Moment
    from moezip.quantize.hessian import Mixed

Array = npt.NDArray[np.float64]
Solve = Callable[["torch.Tensor", "torch.Tensor | None", Grid], Solution]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What is known of a matrix's inputs.

    Attributes:
        hessian: [C, C] mean of x x^T that errors are weighed on. solver: what a solver is given, mixed with pooled
            inputs. tokens: behind ``hessian``; 0 if none of them are the matrix's own.
        importance: [C], what an error in a column costs once the others have made up for it.
    """

    hessian: torch.Tensor
    solver: torch.Tensor | None
    tokens: int
    importance: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, moment: Moment | None, mean: Mixed, tokens: int) -> Inputs:
        """From a moment of at least one token and the solver's mean."""
        assert moment is not None
        ready = None if mean.hessian is None else factor(mean.hessian, GptqParams())
        return cls(
            moment.total / max(moment.tokens, 1), mean.hessian, tokens, None if ready is None else ready.importance
        )


def prices(
    weight: torch.Tensor, given: Inputs, share: Array, grids: Sequence[Grid], solve: Solve | None = None
) -> tuple[Array, Array | None]:
    """Of ``weight`` [R, C] on every grid: nats per token with rounding's codes, and with those of ``solve`` if given.

    Rounding's ranges are searched by the measure that GPTQ searches them by.

    Args:
        share: [R], G_r / (2T).

    Returns:
        Two arrays, one number per grid.

    Raises:
        CheckpointError: weights or inputs that are no finite numbers.
        PlanError: groups that do not divide the columns.
    """
    values = as_array(weight, "weight")
    rounded, solved = np.empty(len(grids)), np.empty(len(grids))
    for place, grid in enumerate(grids):
        groups = fit(values, given.importance, grid, "search")
        rounded[place] = _weighed(groups.values(groups.nearest(values)) - values, given.hessian, share)
        if solve is not None:
            codes = solve(weight.float(), given.solver, grid).codes
            solved[place] = _weighed(dequantize(codes).cpu().numpy() - values, given.hessian, share)
    return rounded, None if solve is None else solved


def _weighed(change: npt.NDArray[np.float32], hessian: torch.Tensor, share: Array) -> float:
    """sum_r share_r d_r H d_r^T of a change [R, C]."""
    import torch

    errors = output_error_rows(torch.from_numpy(change).to(hessian.device), hessian)
    return float(errors.cpu().numpy() @ share)

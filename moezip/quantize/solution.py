"""What a solver gives back, and the error that it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moezip.errors import CheckpointError
from moezip.formats.packed import Codes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """One quantized matrix.

    Attributes:
        codes: the codes, scales and zeros. Their grid is the one that was asked for, save that scales which half
            precision cannot hold well are stored as BF16 (``Grid.fitting``).
        errors: float64 [R], the output error of each output channel, d H d^T with d the row's change; summed weights
            of the hessian's own scale, so a mean over tokens gives the mean squared error of the output. Without a
            hessian it is the squared change of the weights. ``output_error_rows`` gives the same numbers.
        damping: share of the hessian's mean diagonal that was added to its diagonal; 0 without a hessian.
        raised: the damping that was asked for did not make the hessian invertible, so more was added.
        blind: there was no hessian, or one of zeros, so that errors could not be compensated.
    """

    codes: Codes
    errors: torch.Tensor
    damping: float = 0.0
    raised: bool = False
    blind: bool = False

    @property
    def error(self) -> float:
        """tr(dW H dW^T)."""
        return float(self.errors.sum())

    def split(self, rows: Sequence[int]) -> list[Solution]:
        """The solutions of the matrices of so many ``rows`` that were solved as one, lying one below the other."""
        codes, found, start = self.codes, [], 0
        for stop in accumulate(rows):
            zeros = None if codes.zeros is None else codes.zeros[start:stop]
            part = Codes(codes.grid, codes.codes[start:stop], codes.scales[start:stop], zeros)
            found.append(replace(self, codes=part, errors=self.errors[start:stop]))
            start = stop
        return found


def output_error_rows(change: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """float64 [R]: d H d^T for every row d of ``change`` [R, C]; the squared norm without a hessian [C, C].

    With H the mean of x x^T this is the mean squared change of each output. Weighted by half the mean squared gradient
    of that output and summed, it is the price of the change in nats.
    """
    change = change.float()
    moved = change if hessian is None else change @ hessian.float()
    return (moved.double() * change.double()).sum(1)


def as_array(tensor: torch.Tensor, what: str) -> npt.NDArray[np.float32]:
    """``tensor`` as a float32 array in main memory, a view of it where it is one already.

    Raises:
        CheckpointError: a value that is no finite number; every code that came of it would be arbitrary.
    """
    array: npt.NDArray[np.float32] = tensor.detach().float().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"the {what} holds NaN or infinity", next="run `moezip verify` on the checkpoint, or calibrate in float32"
        )
    return array

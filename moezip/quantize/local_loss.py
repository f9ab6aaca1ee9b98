"""What rounding one expert does to the output of its block: the loss that PMQ shares bits out by.

MC-MoE, arXiv 2410.06270, section 3.2, its epsilon; computed from the expert's own tokens alone, which is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.arch.matrices import expert_matrices
from moezip.calibrate.experts import expert_output
from moezip.formats.packed import Grid, dequantize
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as round_to_nearest

if TYPE_CHECKING:
    from moezip.calibrate.moments import ExpertInputs

WIDTHS = (1, 2, 3)
BATCH_ROWS = 8  # windows per norm


def local_losses(experts: Any, expert: int, inputs: ExpertInputs, like: Grid) -> list[float]:
    """One expert's at 1, 2 and 3 bits: the sum over batches of sqrt(sum over its tokens of g^2 |f(x) - f_b(x)|^2).

    g is the gate weight; f_b has all three matrices rounded to nearest over the whole range of each group (one bit: the
    sign times the group's mean |w|). Only the expert's own tokens change, by that much, so this is the norm of the
    change of the whole block's output.

    Args:
        experts: the loaded module; the expert's matrices are put back as they were.
        like: a grid, for the size of groups.
    """
    slots = inputs.slots(expert)
    if not len(slots):
        return [0.0] * len(WIDTHS)
    x, gates = inputs.tokens(expert), inputs.weights(expert).double()
    batch = slots // inputs.ids.shape[1] // inputs.hidden.shape[1] // BATCH_ROWS
    matrices = expert_matrices(experts, expert)
    kept = {role: matrix.clone() for role, matrix in matrices.items()}
    plain, losses = expert_output(experts, expert, x).double(), []
    try:
        for bits in WIDTHS:
            for role, matrix in matrices.items():
                codes = round_to_nearest(kept[role], None, Grid(bits, like.group), RtnParams("minmax")).codes
                matrix.copy_(dequantize(codes, matrix.dtype))
            change = (expert_output(experts, expert, x).double() - plain).square().sum(1) * gates.square()
            sums = np.bincount(batch, change.cpu().numpy())
            losses.append(float(np.sqrt(sums).sum()))
    finally:
        for role, matrix in matrices.items():
            matrix.copy_(kept[role])
    return losses

"""Rounding to nearest, with no text: every weight by itself, on steps that fit its group best.

The range of each group is searched (``moezip.quantize.groups.fit``); ``--set clip=minmax`` keeps the whole range, as
plain rounding does everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moezip.formats.packed import Grid
from moezip.quantize.groups import fit, require_clip
from moezip.quantize.solution import Solution, as_array, output_error_rows
from moezip.registry import Method

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RtnParams:
    """Attributes:
    clip: ``search`` the range of each group, or keep all of it (``minmax``).
    """

    clip: str = "search"

    def __post_init__(self) -> None:
        require_clip(self.clip)


def solve(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid, params: RtnParams) -> Solution:
    """Codes for ``weight`` [R, C]. A ``hessian`` [C, C] is only used to say what the error costs.

    Raises:
        CheckpointError: a weight that is no finite number.
        PlanError: groups that do not divide the columns.
    """
    import torch

    values = as_array(weight, "weight")
    groups = fit(values, None, grid, params.clip)
    codes = groups.nearest(values)
    change = torch.from_numpy(np.subtract(groups.values(codes), values))
    return Solution(groups.codes(codes), output_error_rows(change, hessian), blind=hessian is None)


RTN = Method(
    name="rtn",
    family="quantize",
    summary="rounds to the nearest code, on group ranges that are searched (no data)",
    paper="baseline",
    needs=(),
    params=RtnParams,
    run=solve,
)

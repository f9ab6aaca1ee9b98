"""Rounding to nearest, with no text: every weight by itself, on steps that fit its group best.

The range of each group is searched (see ``moezip.quantize.groups.fit``); ``--set clip=minmax`` keeps the whole range,
as plain rounding does everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moezip.errors import UsageError
from moezip.formats.packed import Grid
from moezip.quantize.groups import fit, to_codes, top_code
from moezip.quantize.solution import Solution, as_array, output_error_rows
from moezip.registry import Method

if TYPE_CHECKING:
    import torch

CLIPS = ("search", "minmax")


@dataclass(frozen=True, slots=True)
class RtnParams:
    """Attributes:
    clip: ``search`` the range of each group, or keep all of it (``minmax``).
    """

    clip: str = "search"

    def __post_init__(self) -> None:
        require_clip(self.clip)


def require_clip(clip: str) -> None:
    """Raises UsageError unless ``clip`` is one of CLIPS."""
    if clip not in CLIPS:
        raise UsageError(f"clip is {clip!r}", where=f"--set clip={clip}", next=f"use {' or '.join(CLIPS)}")


def solve(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid, params: RtnParams) -> Solution:
    """Codes for ``weight`` [R, C]. A ``hessian`` [C, C] is only used to say what the error costs.

    Raises:
        CheckpointError: a weight that is no finite number.
        PlanError: groups that do not divide the columns.
    """
    import torch

    values = as_array(weight, "weight")
    grid, groups = fit(values, None, grid, params.clip)
    codes = groups.nearest(values, top_code(grid))
    change = torch.from_numpy(np.subtract(groups.values(codes), values))
    return Solution(to_codes(grid, codes, groups), output_error_rows(change, hessian), blind=hessian is None)


RTN = Method(
    name="rtn",
    family="quantize",
    summary="rounds to the nearest code, on group ranges that are searched (no data)",
    paper="baseline",
    needs=(),
    params=RtnParams,
    run=solve,
)

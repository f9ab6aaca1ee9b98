"""A matrix stored as a product of two thin ones, and some rows that are added to it.

A matrix [R, C] is ``left @ right``, plus ``rows`` in the places that ``rows_index`` names:

=====================  =======  =====================================================
``weight_left``        float    [R, r]
``weight_right``       float    [r, C]
``weight_rows``        float    [k, C], absent where k = 0
``weight_rows_index``  I32      [k], ascending: the output channels that get these rows
=====================  =======  =====================================================

Dtypes are the model's own. MC-SMoE (arXiv 2310.01334) stores merged experts so. Inputs are
multiplied by right, then by left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import torch

LEFT, RIGHT, ROWS, INDEX = "weight_left", "weight_right", "weight_rows", "weight_rows_index"
_TEXT = re.compile(r"rank(?P<rank>\d+)\+(?P<rows>\d+)\Z")


@dataclass(frozen=True, slots=True)
class Factors:
    """How large the factors of one matrix are.

    Attributes:
        rank: r, at least 1. rows: k.
    """

    rank: int
    rows: int

    def __str__(self) -> str:
        return f"rank{self.rank}+{self.rows}"

    @classmethod
    def parse(cls, text: str) -> Factors:
        """The inverse of ``str``. Raises PlanError for anything else."""
        found = _TEXT.match(text)
        if found is None or not int(found["rank"]):
            raise PlanError(f"{text!r} is no size of factors, such as rank12+8")
        return cls(int(found["rank"]), int(found["rows"]))

    def specs(self, rows: int, columns: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By suffix: dtype and shape of the stored tensors of a matrix [rows, columns] of this dtype."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            LEFT: (dtype, (rows, self.rank)),
            RIGHT: (dtype, (self.rank, columns)),
        }
        if self.rows:
            found |= {ROWS: (dtype, (self.rows, columns)), INDEX: ("I32", (self.rows,))}
        return found

    def numbers(self, rows: int, columns: int) -> int:
        """How many numbers are stored for a matrix [rows, columns], those of the index included."""
        return self.rank * (rows + columns) + self.rows * (columns + 1)


def multiplied(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
    """The matrix [R, C] that factors stand for: computed in float32, rounded once to ``dtype``, default theirs."""
    left, right = tensors[LEFT], tensors[RIGHT]
    whole = left.float() @ right.float()
    if ROWS in tensors:
        whole.index_add_(0, tensors[INDEX].long(), tensors[ROWS].float())
    return whole.to(dtype or left.dtype)


def product(value: torch.Tensor, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None = None) -> torch.Tensor:
    """``value`` [..., C] times the matrix [R, C] that factors stand for, and ``bias`` [R]: [..., R]."""
    import torch.nn.functional as F

    result = F.linear(F.linear(value, tensors[RIGHT]), tensors[LEFT], bias)
    if ROWS in tensors:
        result = result.index_add(-1, tensors[INDEX], F.linear(value, tensors[ROWS]))
    return result


def require_sound(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    """Raises CheckpointError unless the rows' places are ascending numbers of rows that there are."""
    if INDEX not in tensors:
        return
    places, count = tensors[INDEX].tolist(), tensors[LEFT].shape[0]
    if places != sorted(set(places)) or not 0 <= places[0] <= places[-1] < count:
        raise CheckpointError(
            f"{INDEX} names rows {places[:8]}, which are not ascending numbers below {count}", where=where,
            next="download the checkpoint again, or make it again",
        )  # fmt: skip

"""Two heuristics of QuantMoE-Bench (arXiv 2406.08155) for who gets more bits, and widths by rank.

The paper gives the important share of experts' linears, or of blocks, the wider of two fixed widths and all others the
narrower. The scores are the paper's; that the two widths are neighbours and how many get the wider follow from a
budget of bytes, which is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moezip.errors import PlanError
from moezip.formats.packed import Grid
from moezip.plan.relaxation import BudgetError
from moezip.plan.widths import Allocation, Form, Matrix, price_of

if TYPE_CHECKING:
    import torch


def outlier_score(weight: torch.Tensor) -> float:
    """How far a matrix [R, C] has outliers: the largest |w| of its worst input channel over the mean of all channels'.

    Higher asks for more bits. A matrix of zeros has none and scores 1.
    """
    peaks = weight.detach().abs().amax(0).double()
    mean = float(peaks.mean())
    return float(peaks.max()) / mean if mean > 0 else 1.0


def block_importance(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """1 - the mean cosine between the hidden states [T, D] before and after a decoder layer: how much it turns them.

    Higher asks for more bits. Tokens whose state is zero on a side count as unturned.
    """
    import torch

    cosine = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1, eps=1e-30)
    idle = (inputs == 0).all(-1) | (outputs == 0).all(-1)
    return 1.0 - float(torch.where(idle, 1.0, cosine).mean())


def by_score(
    matrices: Sequence[Matrix], scores: Mapping[str, float], budget: int, grids: Sequence[Grid], answered: str
) -> Allocation:
    """Two neighbouring grids: the widest that fits for all, and the next one for the highest scores, as far as it fits.

    Matrices of equal score widen together or not at all, and the first that does not fit ends it, so that none is
    wider than one of a higher score.

    Args:
        scores: by name, of the matrices that share the grids; the others keep the only form that they have.
        budget: bytes of all ``matrices``. grids: to choose from, one for each width.
        answered: name of the heuristic.

    Raises:
        BudgetError: the narrowest grid does not fit.
        PlanError: scores that are no numbers, or a matrix without a score that has a choice.
    """
    ladder = sorted(grids, key=lambda grid: grid.bits)
    open_ = [matrix for matrix in matrices if matrix.name in scores]
    fixed = [matrix for matrix in matrices if matrix.name not in scores]
    for matrix in fixed:
        if len(matrix.nats) != 1:
            raise PlanError(f"{matrix.name} has no score and {len(matrix.nats)} widths to choose from")
    if not ladder or not open_ or not all(np.isfinite(scores[matrix.name]) for matrix in open_):
        raise PlanError(f"{answered} has no scores to rank by, or some are no numbers", next="calibrate again")
    spent = sum(matrix.nbytes(next(iter(matrix.nats))) for matrix in fixed)
    totals = [spent + sum(matrix.nbytes(grid) for matrix in open_) for grid in ladder]
    weights = sum(matrix.weights for matrix in matrices)
    if totals[0] > budget:
        raise BudgetError(budget, totals[0], totals[-1], weights)
    base = max(place for place, total in enumerate(totals) if total <= budget)
    forms: dict[str, Form] = {matrix.name: next(iter(matrix.nats)) for matrix in fixed}
    forms |= {matrix.name: ladder[base] for matrix in open_}
    total = totals[base]
    if base + 1 < len(ladder):
        ranks: dict[float, list[Matrix]] = {}
        for matrix in open_:
            ranks.setdefault(scores[matrix.name], []).append(matrix)
        for score in sorted(ranks, reverse=True):
            extra = sum(matrix.nbytes(ladder[base + 1]) - matrix.nbytes(ladder[base]) for matrix in ranks[score])
            if total + extra > budget:
                break
            total += extra
            forms |= {matrix.name: ladder[base + 1] for matrix in ranks[score]}
    forms = {matrix.name: forms[matrix.name] for matrix in matrices}
    return Allocation(forms, total, budget, weights, answered, nats=price_of(matrices, forms))

"""The hessian of one linear layer, H = mean of x x^T, from however few tokens there are.

An expert that the text hardly reached has a hessian of low rank: codes fitted to it are right for the few inputs that
were seen and arbitrary for all others. So it is mixed with what is known besides (the pooled inputs of the layer), as
if ``prior`` tokens of that had been seen. Of the published codes, QMoE (arXiv 2310.16795) rounds experts that saw
nothing and MC-MoE (arXiv 2410.06270) zeroes their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Basis = Literal["own", "mixed", "pooled", "none"]
# A hessian of [C, C] gets PRIOR * C tokens' worth of the pooled one. Chosen by the output error on
# held-out text of a trained model: 1 and 2 are alike, less is worse where tokens are few, more where they are many.
PRIOR = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """A hessian and where it comes from.

    Attributes:
        hessian: float32 [C, C], a mean over tokens; None where there were none at all: the identity.
        basis: ``own`` tokens alone, ``mixed`` with pooled ones, ``pooled`` alone, or ``none``.
        own: share of the matrix's own tokens, n / (n + k).
    """

    hessian: torch.Tensor | None
    basis: Basis
    own: float


def shrunk(
    sums: torch.Tensor | None,
    count: float,
    pooled_sums: torch.Tensor | None,
    pooled_count: float,
    prior: float,
    *,
    mass: float | None = None,
) -> Mixed:
    """H = (n H_own + k H_pool) / (n + k).

    Args:
        sums: sum of x x^T [C, C] over the ``count`` = n tokens of this matrix; None if there were none.
        pooled_sums: the same over the ``pooled_count`` tokens of the layer; None if nothing is pooled.
        prior: k in tokens, such as ``PRIOR * C``; 0 mixes nothing.
        mass: sum of the weights of the tokens in ``sums``, where they have any (gates); default ``count``. The mean is
            over the mass, and ``count`` stays the evidence that it is mixed by.
    """
    mass = count if mass is None else mass
    own = None if sums is None or count <= 0 or mass <= 0 else sums.float() / mass
    pool = None if pooled_sums is None or pooled_count <= 0 else pooled_sums.float() / pooled_count
    if own is None:
        return Mixed(None, "none", 0.0) if pool is None else Mixed(pool, "pooled", 0.0)
    if pool is None or prior <= 0:
        return Mixed(own, "own", 1.0)
    share = count / (count + prior)
    return Mixed(own.mul_(share).add_(pool, alpha=1 - share), "mixed", share)

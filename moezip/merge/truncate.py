"""Sub-MoE's extra compression (arXiv 2506.23266): the average, cut to the directions that the members' outputs need.

The paper takes W_i S_i of every member, S_i S_i^T the second moment of its inputs, cuts the SVD of all of them side by
side, [W_1 S_1 | ... | W_n S_n] ~ U_r Sigma_r [V_1^T | ... | V_n^T], undoes S_i and averages the V_i. That is P W_avg, P
the projection on the columns of U_r, which are also the leading eigenvectors of sum_i W_i S_i S_i^T W_i^T: no SVD of
all members is needed, and no factor of the second moments. The product is stored, so this saves no bytes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezip.arch.spec import ExpertRole
from moezip.calibrate.moments import second_moment
from moezip.merge.layer import MergeLayer
from moezip.merge.least_squares import average_of, by_role, member, reached, tokens_of, with_ones
from moezip.plan.plan import Pick

if TYPE_CHECKING:
    import torch


def truncated(
    average: torch.Tensor, members: Sequence[torch.Tensor], moments: Sequence[torch.Tensor], share: float
) -> torch.Tensor:
    """P ``average``: what is left of it in the leading directions of the members' outputs.

    Args:
        average: [R, C]. members: [R, C] each. moments: [C, C] each, sum of x x^T of a member's inputs.
        share: of the singular values that stay, of min(R, C); rounded up. 1 leaves the average as it is.
    """
    import torch

    if share >= 1:
        return average
    rank = math.ceil(share * min(average.shape))
    outputs = sum(weight @ moment @ weight.T for weight, moment in zip(members, moments, strict=True))
    assert isinstance(outputs, torch.Tensor)
    leading = torch.linalg.eigh(outputs).eigenvectors[:, -rank:]
    return leading @ (leading.T @ average)


def truncated_expert(layer: MergeLayer, pick: Pick, share: float) -> dict[ExpertRole, torch.Tensor] | None:
    """The matrices of one group by role, float32; None if no token was routed to any of its members.

    Biases are averages.
    """
    parts, biased = reached(layer, pick), "down_bias" in layer.roles
    if not parts:
        return None
    moments: dict[ExpertRole, list[torch.Tensor]] = {"gate": [], "down": []}
    members: dict[ExpertRole, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
    for part in parts:
        own = {role: member(layer, part, role) for role in members}
        given: torch.Tensor | float = 0.0
        inner: torch.Tensor | float = 0.0
        for x, _ in tokens_of(layer, part.expert):
            ones = with_ones(x, biased)
            given = given + second_moment(x).total
            inner = inner + second_moment(layer.activate(ones @ own["gate"].T, ones @ own["up"].T)).total
        moments["gate"].append(given)  # type: ignore[arg-type]
        moments["down"].append(inner)  # type: ignore[arg-type]
        for role, value in own.items():
            members[role].append(value[:, :-1] if biased else value)
    found: dict[ExpertRole, torch.Tensor] = {}
    for role, each in members.items():
        whole = average_of(layer, pick, role)
        plain = whole[:, :-1] if biased else whole
        found[role] = truncated(plain, each, moments["down" if role == "down" else "gate"], share)
        if biased:
            found[role] = _beside(found[role], whole[:, -1:])
    return by_role(found, biased)


def _beside(matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([matrix, bias], 1)

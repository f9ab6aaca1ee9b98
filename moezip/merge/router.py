"""One router row for several experts: fitted to the score that the members have together.

A softmax router gives a group the gate exp(log sum_i exp z_i) / (sum over all), i its chosen members: with the
log-sum-exp of their logits for a logit, one row would take their place exactly. Where no member is chosen, what counts
is how near the best one is to that. This is not linear in the input, so the row is fitted to it by least squares over
sampled inputs and held to the row of the dominant expert. Tokens weigh the less, the further the group is from being
chosen. The row of an expert that was merged with no other stays as it is, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moezip.calibrate.moments import second_moment
from moezip.merge.layer import Merge, MergeLayer
from moezip.merge.least_squares import towards, with_ones

if TYPE_CHECKING:
    import torch

# Router inputs that rows are fitted on, evenly spaced over the text.
SAMPLE = 16_384
# Tokens weigh exp(-distance of the best member's logit to the last chosen one) and this much besides.
FLOOR = 0.02


def fitted(layer: MergeLayer, params: Any, found: Merge) -> None:
    """Adds the router's rows (and entries of its bias, where logits have one) to ``found``, one per pick.

    Raises:
        MoezipError: router inputs that are not finite.
    """
    import torch

    assert layer.inputs is not None  # Method.looks says so with router=sum
    number = layer.facts.layer
    names = [tensor.template.format(layer=number) for tensor in layer.architecture.router]
    # the bias of the linear layer itself; those that only select have longer names
    biased = len(names) > 1 and names[1].rpartition(".")[2] == "bias"
    stored = [layer.source.read(name) for name in names[: 1 + biased]]
    rows = stored[0].float()
    if biased:
        rows = torch.cat([rows, stored[1].float()[:, None]], 1)
    with torch.no_grad():
        merged = fitted_rows(
            with_ones(layer.inputs.sample(SAMPLE).float(), biased), rows, layer.groups, layer.facts.top_k, params.ridge
        )
    kept = [group[0] for group in layer.groups]
    alone = torch.tensor([len(group) == 1 for group in layer.groups])
    parts = [merged[:, :-1], merged[:, -1]] if biased else [merged]
    for place, (part, old) in enumerate(zip(parts, stored, strict=True)):
        new = part.to(old.dtype)
        new[alone] = old[kept][alone]
        found.solve_router(number, place, new)


def fitted_rows(
    inputs: torch.Tensor, rows: torch.Tensor, groups: tuple[tuple[int, ...], ...], top_k: int, ridge: float
) -> torch.Tensor:
    """One row per group, [M, D]: its only member's, or the one nearest to the score of its members together.

    Args:
        inputs: [n, D], router inputs. rows: [E, D], of the source. groups: dominant experts first.
        top_k: experts per token; the best k logits stand for the router's choice.
        ridge: as of ``moezip.merge.least_squares.towards``.
    """
    result = rows[[group[0] for group in groups]].clone()
    if not len(inputs):
        return result
    logits = inputs @ rows.T
    last = logits.topk(top_k).values[:, -1:]  # of those that are chosen
    for place, group in enumerate(groups):
        if len(group) == 1:
            continue
        own = logits[:, list(group)]
        best = own.amax(1, keepdim=True)
        together = own.where(own >= last.minimum(best), -float("inf")).logsumexp(1)
        weights = (best - last)[:, 0].clamp_max(0).exp() + FLOOR
        target = (weights * together) @ inputs
        moment = second_moment(inputs, weights).total
        result[place] = towards(result[place][None], target[None], moment, len(inputs), ridge)[0]
    return result

"""Alignment: in which order an expert's neurons resemble those of another, so that the two can be averaged.

An expert computes the same whatever the order of its neurons: rows of gate and up, columns of down, biases of gate and
up. Of all orders pi of a member the one is taken that maximises the sum over a of P[a, pi(a)], which for

    P = A_ref A^T + B_ref B^T + D_ref^T D        (M-SMoE, arXiv 2310.01334, for gate A, up B, down D; biases added)

also minimises the summed squared distance of the matrices. Or P holds the correlations of the neurons' activations.

The assignment costs F^3, so experts wider than ``WIDE`` are first cut in halves, quarters, ... that belong together,
and rows of a reduced number of random projections stand for the rows of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moezip.merge.layer import MergeLayer

if TYPE_CHECKING:
    import torch

Order = tuple[int, ...]

# Widest experts whose neurons are assigned all at once: 2.7 s and a float64 matrix of 134 MB for each member.
WIDE = 4096
# Most neurons in a part of a wider one: 0.5 s each.
PART = 2048
# Of the signs of random projections.
SEED = 20240517
# Tokens of either expert whose activations are correlated.
TOKENS = 2048
# Where the two experts saw fewer, tokens of the layer stand in, whoever they went to: with less, correlations of
# unrelated neurons reach 1 / sqrt(FEWEST) by chance.
FEWEST = 256
# Cutting a wide expert in two: steps towards the direction along which its neurons differ most, and then of 2-means.
POWER_STEPS = 8
MEANS_STEPS = 8


def orders(layer: MergeLayer, params: Any) -> dict[int, Order]:
    """By expert the order of its neurons: place j holds the neuron that goes with neuron j of the reference.

    Experts that are in the reference's order already, or in a group by themselves, are left out.

    Args:
        params: ``align``, ``reference`` and ``projection`` of ``moezip.merge.params.MergeParams``.
    """
    if params.align == "none":
        return {}
    pairs = list(reference_pairs(layer.groups, params.reference))
    match = _by_weights(layer, params.projection) if params.align == "weights" else _by_activations(layer)
    found = zip(pairs, _share_out(match, pairs), strict=True)
    own = tuple(range(layer.facts.width))
    return {member: order for (_, member), order in found if order != own}


def reference_pairs(groups: Sequence[Sequence[int]], reference: str) -> Iterator[tuple[int, int]]:
    """(reference, member) of everyone who is to be put in order.

    With ``dominant`` that is each group's first expert; with ``first`` expert 0 of the layer, whose order then its
    group's dominant expert takes as well.
    """
    for group in groups:
        if len(group) > 1:
            chosen = group[0] if reference == "dominant" else 0
            yield from ((chosen, member) for member in group if member != chosen)


# -- what tells a neuron ------------------------------------------------------------------------------------


def _by_weights(layer: MergeLayer, projection: int) -> Callable[[tuple[int, int]], Order]:
    import torch

    wide = layer.facts.width > WIDE

    def rows(expert: int) -> torch.Tensor:
        # one matrix at a time, so that of a wide expert no more than one is in memory
        parts = (_per_neuron(layer, expert, role) for role in layer.roles if role != "down_bias")
        if wide:
            folds = [fold(part, projection, number) for number, part in enumerate(parts)]
            return torch.stack(folds).sum(0)
        return torch.cat(list(parts), 1)

    # members of one reference come one after the other, so those at work at the same time share few references
    reference = lru_cache(maxsize=torch.get_num_threads())(rows)
    return lambda pair: matched(reference(pair[0]), rows(pair[1]))


def _per_neuron(layer: MergeLayer, expert: int, role: Any) -> torch.Tensor:
    """[F, D] of a matrix, [F, 1] of a bias: one row per neuron."""
    value = layer.matrix(expert, role)
    if value.dim() == 1:
        return value[:, None]
    return value.T if role == "down" else value


def fold(rows: torch.Tensor, size: int, salt: int) -> torch.Tensor:
    """Random projections [F, size] of rows [F, C], whose inner products are on average those of the rows.

    Entries c, c + size, c + 2 size, ... are added, each with a random sign: a count sketch (Charikar, Chen,
    Farach-Colton 2002) whose buckets are of one size, at one addition per entry.

    Args:
        salt: other signs for another number.
    """
    import torch

    chance = torch.Generator().manual_seed(SEED + salt)
    found = rows.new_zeros(rows.shape[0], size)
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        signs = torch.randint(2, (part.shape[1],), generator=chance).mul_(2).sub_(1).to(rows.dtype)
        found[:, : part.shape[1]].addcmul_(part, signs)
    return found


def _by_activations(layer: MergeLayer) -> Callable[[tuple[int, int]], Order]:
    import torch

    inputs = layer.inputs
    assert inputs is not None  # Method.looks says so with these settings

    def match(pair: tuple[int, int]) -> Order:
        seen = [_thinned(inputs.tokens(expert)) for expert in pair]
        if (missing := FEWEST - sum(map(len, seen))) > 0:
            seen.append(inputs.sample(missing))
        tokens = torch.cat(seen).float()
        return matched(*(_standardised(activations(layer, expert, tokens)) for expert in pair))

    return match


def _thinned(tokens: torch.Tensor) -> torch.Tensor:
    """At most ``TOKENS`` of them, evenly spaced."""
    import torch

    if len(tokens) <= TOKENS:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, TOKENS).long()]


def activations(layer: MergeLayer, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """What enters the expert's down projection, [n, F], from inputs [n, D] float32."""
    linear = {}
    for role in ("gate", "up"):
        linear[role] = tokens @ layer.matrix(expert, role).T  # type: ignore[arg-type]
        if f"{role}_bias" in layer.roles:
            linear[role] += layer.matrix(expert, f"{role}_bias")  # type: ignore[arg-type]
    return layer.activate(linear["gate"], linear["up"])


def _standardised(inner: torch.Tensor) -> torch.Tensor:
    """Rows [F, n] whose inner products are the correlations of the columns of [n, F]; 0 where one never changes."""
    import torch

    centred = (inner - inner.mean(0)).T
    return torch.nn.functional.normalize(centred, dim=1)


# -- the assignment -----------------------------------------------------------------------------------------


def matched(reference: torch.Tensor, member: torch.Tensor) -> Order:
    """The order of the member's rows [F, C] with the largest sum of inner products with the reference's, row by row.

    The very largest up to a width of ``WIDE``; above, the largest inside parts of at most ``PART`` rows, into which
    both experts were cut.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    width = len(reference)
    order = torch.empty(width, dtype=torch.long)
    limit = width if width <= WIDE else PART
    for left, right in cut(reference, member, limit):
        alike = (reference[left] @ member[right].T).numpy()
        order[left] = right[torch.from_numpy(linear_sum_assignment(alike, maximize=True)[1])]
    return tuple(order.tolist())


def cut(reference: torch.Tensor, member: torch.Tensor, limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Row numbers of both experts in parts that belong together, as many of the one as of the other, ``limit`` at most.

    The reference's rows are cut in two equal halves by 2-means. The member's are given to the halves such that the sum
    of their inner products with the halves' means is largest: those with the larger difference go to the first. Then
    the halves are cut on. A permuted copy of the reference is cut as the reference is.
    """
    import torch

    everything = torch.arange(len(reference))
    queue = [(everything, everything)]
    while queue:
        left, right = queue.pop()
        if len(left) <= limit:
            yield left, right
            continue
        direction = _apart(reference[left])
        halves = []
        for rows, numbers in ((reference, left), (member, right)):
            # row by row, so that a row's value does not depend on its place
            along = torch.cat([(rows[some] * direction).sum(1) for some in numbers.split(PART)])
            halves.append(numbers[along.argsort(descending=True, stable=True)].tensor_split(2))
        queue += zip(*halves, strict=True)


def _apart(rows: torch.Tensor) -> torch.Tensor:
    """The difference [C] of the means of two halves of the rows: 2-means, begun along the rows' main direction."""
    mean = rows.mean(0)
    direction = rows[(rows - mean).square().sum(1).argmax()] - mean
    for _ in range(POWER_STEPS):
        along = rows @ direction
        direction = (along - along.mean()) @ rows
        direction = direction / direction.norm().clamp_min(1e-30)
    for _ in range(MEANS_STEPS):
        first, second = (rows @ direction).argsort(descending=True).tensor_split(2)
        direction = rows[first].mean(0) - rows[second].mean(0)
    return direction


def _share_out(work: Callable[[tuple[int, int]], Order], pairs: Sequence[tuple[int, int]]) -> list[Order]:
    """``work`` of every pair, in order, over as many threads as torch has, each computing alone.

    The assignment lets other threads run meanwhile.
    """
    import torch

    def alone(pair: tuple[int, int]) -> Order:
        with torch.inference_mode():
            return work(pair)

    with ThreadPoolExecutor(torch.get_num_threads(), "moezip-align", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(alone, pairs))

"""Merging by choice: those neurons of the members that together explain their outputs best, and a new down projection.

Averages of neurons of experts that were trained apart resemble none of them. Here the merged expert's F neurons are
neurons of the members as they are (rows of gate and up), and down is solved for the gate-weighted error that
``least_squares`` speaks of. Neurons are chosen one by one, each the one that lowers the remaining error most, given
those already there (orthogonal matching pursuit over the second moment of all members' activations, one step of a
pivoted Cholesky factorisation per neuron).

The solution holds on to the mean of the members' *outputs*, sum_i w_i f_i, with all their neurons: to the second
moment K of the activations r I is added, and r w_i D_i to the products with the outputs, so that an expert of few
tokens takes the largest neurons with their own columns of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moezip.arch.spec import ExpertRole
from moezip.calibrate.moments import second_moment
from moezip.merge.layer import MergeLayer
from moezip.merge.least_squares import by_role, member, reached, strength, tokens_of, with_ones
from moezip.plan.plan import Part, Pick

if TYPE_CHECKING:
    import torch

# Candidates are at most this many times the neurons of an expert (on the reference model 4 and 20 times made no better
# experts, by error on held-out text), and no more than MOST: their second moment is a matrix of their number squared
# (1 GiB at 16,384).
CANDIDATES = 2
MOST = 16_384


@dataclass(frozen=True, slots=True)
class Own:
    """A member: its share of the group's average, matrices with their biases as last columns, and its candidates."""

    expert: int
    share: float
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    neurons: torch.Tensor

    def inner(self, layer: MergeLayer, given: torch.Tensor) -> torch.Tensor:
        """Activations [n, F] of all its neurons."""
        return layer.activate(given @ self.gate.T, given @ self.up.T)


def chosen_neurons(layer: MergeLayer, pick: Pick, ridge: float) -> dict[ExpertRole, torch.Tensor] | None:
    """The matrices of one group by role, float32; None if no token was routed to any of its members."""
    import torch

    parts, biased = reached(layer, pick), "down_bias" in layer.roles
    if not parts:
        return None
    limit = max(layer.facts.width, min(CANDIDATES * layer.facts.width, MOST))
    members = [own(layer, part, biased) for part in parts]
    if len(members) * layer.facts.width > limit:
        members = strongest(layer, members, limit, biased)
    gate, up = (torch.cat([getattr(each, role)[each.neurons] for each in members]) for role in ("gate", "up"))
    size = len(gate) + biased
    moment, target, tokens = torch.zeros(size, size), torch.zeros(layer.facts.hidden, size), 0
    for each in members:
        cross = torch.zeros(each.down.shape[1], size)
        for x, gates in tokens_of(layer, each.expert):
            given, shares = with_ones(x, biased), gates.square()
            wanted = with_ones(each.inner(layer, given), biased)
            inner = with_ones(layer.activate(given @ gate.T, given @ up.T), biased)
            cross += (wanted * shares[:, None]).T @ inner
            moment += second_moment(inner, shares).total
            tokens += len(x)
        target += each.down @ cross
    hold = strength(moment, tokens, ridge)
    if hold <= 0:
        return None
    prior = [each.share * each.down[:, each.neurons] for each in members]
    if biased:
        prior.append(torch.stack([each.share * each.down[:, -1] for each in members]).sum(0)[:, None])
    moment.diagonal().add_(hold)
    target += hold * torch.cat(prior, 1)
    picked = pursuit(moment, target, layer.facts.width, constant=biased)
    factor = torch.linalg.cholesky(moment[picked][:, picked])
    down = torch.cholesky_solve(target[:, picked].T, factor).T
    some = picked[: layer.facts.width]
    return by_role({"gate": gate[some], "up": up[some], "down": down}, biased)


def own(layer: MergeLayer, part: Part, biased: bool) -> Own:
    """A member with all its neurons as candidates."""
    import torch

    gate, up, down = (member(layer, part, role, ordered=False) for role in ("gate", "up", "down"))
    return Own(part.expert, part.weight, gate, up, down, torch.arange(layer.facts.width))


def strongest(layer: MergeLayer, members: Sequence[Own], limit: int, biased: bool) -> list[Own]:
    """The members with the ``limit`` candidates that add most to the outputs: sum_t g^2 h_j^2 |D_j|^2."""
    import torch

    energies = []
    for each in members:
        squares = torch.zeros(layer.facts.width)
        for x, gates in tokens_of(layer, each.expert):
            squares += gates.square() @ each.inner(layer, with_ones(x, biased)).square()
        energies.append(squares * each.down[:, : layer.facts.width].square().sum(0))
    best = torch.cat(energies).argsort(descending=True, stable=True)[:limit].sort().values
    return [
        replace(each, neurons=best[best // layer.facts.width == place] % layer.facts.width)
        for place, each in enumerate(members)
    ]


def pursuit(moment: torch.Tensor, target: torch.Tensor, count: int, *, constant: bool = False) -> torch.Tensor:
    """Which ``count`` inputs to fit the outputs with, in ascending order.

    With W = target_S moment_SS^-1 the squared error falls by tr(target_S moment_SS^-1 target_S^T); every step takes the
    input that adds most to that.

    Args:
        moment: [C, C], sum of x x^T, positive definite. target: [R, C], sum of y x^T.
        constant: the last input is taken besides, before all others.
    """
    import torch

    left, rest = moment.diagonal().clone(), target.clone()
    rows = moment.new_empty(count + constant, len(moment))
    open_ = torch.ones(len(moment), dtype=torch.bool)
    smallest = torch.finfo(moment.dtype).eps * float(left.max())
    for step in range(count + constant):
        gain = rest.square().sum(0) / left.clamp_min(smallest)
        gain[~open_] = -1.0
        best = len(moment) - 1 if constant and step == 0 else int(gain.argmax())
        root = left[best].clamp_min(smallest).sqrt()
        row = (moment[best] - rows[:step, best] @ rows[:step]) / root
        rows[step] = row
        rest -= torch.outer(rest[:, best] / root, row)
        left -= row.square()
        open_[best] = False
    return (~open_).nonzero().flatten()

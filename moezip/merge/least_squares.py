"""The merged expert that makes the least error on the tokens of its members, weighted by their squared gates.

What an expert adds to a token is its output times the gate, so a merged expert M in the place of the members i makes
the error sum_i sum_t g_ti^2 |f_M(x_t) - f_i(x_t)|^2 over the tokens t routed to each. It is made small one matrix at a
time, each in closed form and held to the average (``MergeParams.ridge``): gate and up so that their outputs come near
those of the members,

    A = (sum_i A_i S_i + r A_avg) (sum_i S_i + r I)^-1,                S_i = sum_t g_ti^2 x_t x_t^T,

then down, which sees what the merged gate and up make of the tokens and answers for the error itself,

    D = (sum_i D_i C_i + r D_avg) (H + r I)^-1,    H = sum_i sum_t g_ti^2 h_M h_M^T,    C_i = sum_t g_ti^2 h_i h_M^T,

with h the input of down. Biases are one input more, which is always 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moezip.arch.spec import ExpertRole
from moezip.calibrate.moments import second_moment
from moezip.errors import MoezipError
from moezip.merge.layer import MergeLayer
from moezip.plan.merged import average
from moezip.plan.plan import Part, Pick

if TYPE_CHECKING:
    import torch

# Tokens that are looked at at a time: float32 inputs and activations of more need not be held.
CHUNK = 4096
# The ridge is that of many tokens; with n tokens for C inputs it is 1 + EVIDENCE * C / n times that, so that an expert
# that the text hardly reached stays near the average.
EVIDENCE = 1.0
# Where rounding leaves a matrix that has no factor, the ridge is raised by this much at a time.
RAISE = 10.0
RAISES = 6


def tokens_of(layer: MergeLayer, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [n, D] of the tokens routed to an expert and their gates [n], float32, ``CHUNK`` tokens at a time."""
    import torch

    inputs = layer.inputs
    assert inputs is not None
    slots = inputs.slots(expert)
    gates = torch.from_numpy(inputs.gates.reshape(-1)[slots])
    for start in range(0, len(slots), CHUNK):
        part = slice(start, start + CHUNK)
        yield inputs.hidden.gather(slots[part] // inputs.ids.shape[1]).float(), gates[part]


def reached(layer: MergeLayer, pick: Pick) -> list[Part]:
    """The parts of a pick that some token was routed to."""
    assert layer.inputs is not None
    return [part for part in pick.parts if len(layer.inputs.slots(part.expert))]


def merged_expert(layer: MergeLayer, pick: Pick, ridge: float) -> dict[ExpertRole, torch.Tensor] | None:
    """The matrices of one group by role, float32; None if no token was routed to any of its members."""
    import torch

    parts = reached(layer, pick)
    if not parts:
        return None
    biased = "down_bias" in layer.roles
    total = Sums()
    for part in parts:
        own = Sums()
        for x, gates in tokens_of(layer, part.expert):
            own.add(with_ones(x, biased), gates.square())
        # gate and up share their inputs, so they are solved as one matrix
        total.join(own, torch.cat([member(layer, part, role) for role in ("gate", "up")]))
    start = torch.cat([average_of(layer, pick, role) for role in ("gate", "up")])
    gate, up = (
        each.to(layer.dtype("gate")).float() for each in total.solved(start, ridge).chunk(2)
    )  # down makes up for the rounding as well
    outer = Sums()
    for part in parts:
        theirs = [member(layer, part, role, ordered=False) for role in ("gate", "up", "down")]
        own = Sums()
        cross: torch.Tensor | float = 0.0
        for x, gates in tokens_of(layer, part.expert):
            given, shares = with_ones(x, biased), gates.square()
            wanted = with_ones(layer.activate(given @ theirs[0].T, given @ theirs[1].T), biased)
            inner = with_ones(layer.activate(given @ gate.T, given @ up.T), biased)
            cross = cross + (wanted * shares[:, None]).T @ inner
            own.add(inner, shares)
        outer.join(own, theirs[2], cross)
    down = outer.solved(average_of(layer, pick, "down"), ridge)
    return by_role({"gate": gate, "up": up, "down": down}, biased)


class Sums:
    """Sums over tokens of a least-squares problem Y ~ W X: ``moment`` of x x^T, ``target`` of y x^T, and how many."""

    def __init__(self) -> None:
        self.moment: torch.Tensor | None = None
        self.target: torch.Tensor | None = None
        self.tokens = 0

    def add(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Inputs [n, C] of weights [n]."""
        found = second_moment(x, weights).total
        self.moment = found if self.moment is None else self.moment + found
        self.tokens += len(x)

    def join(self, own: Sums, weight: torch.Tensor, cross: torch.Tensor | float | None = None) -> None:
        """Adds a member's tokens, whose outputs are ``weight`` [R, C] times their inputs.

        Args:
            cross: sum of the member's own inputs times these, where they are others.
        """
        assert own.moment is not None
        target = weight @ (own.moment if cross is None else cross)
        self.moment = own.moment if self.moment is None else self.moment + own.moment
        self.target = target if self.target is None else self.target + target
        self.tokens += own.tokens

    def solved(self, start: torch.Tensor, ridge: float) -> torch.Tensor:
        """W [R, C]: ``towards`` ``start``."""
        assert self.moment is not None and self.target is not None
        return towards(start, self.target, self.moment, self.tokens, ridge)


def strength(moment: torch.Tensor, tokens: int, ridge: float) -> float:
    """r of the equations above: a share of the mean diagonal of ``moment`` [C, C], more for few tokens.

    Raises:
        MoezipError: numbers that are not finite.
    """
    scale = float(moment.diagonal().mean())
    if not scale < float("inf"):  # of a sum of squares: infinite, or no number
        raise MoezipError(
            "the inputs or outputs of some experts are not finite, so no least error can be found",
            next="look for infinite weights with `moezip verify`, or merge with --set combine=frequency",
        )
    return ridge * scale * (1 + EVIDENCE * len(moment) / tokens)


def towards(start: torch.Tensor, target: torch.Tensor, moment: torch.Tensor, tokens: int, ridge: float) -> torch.Tensor:
    """(target + r start) (moment + r I)^-1: the least-squares answer, held to ``start``.

    Args:
        start: [R, C]. target: [R, C], sum of y x^T. moment: [C, C], sum of x x^T over ``tokens`` of them.
        ridge: r as a share of the mean diagonal of ``moment``, for many tokens; for few it is more.

    Raises:
        MoezipError: numbers that are not finite, or inputs that even a far larger ridge does not make solvable.
    """
    import torch

    hold = strength(moment, tokens, ridge)
    if hold <= 0:
        return start
    distance = target - start @ moment  # solved for the way from the start: what is small comes out small
    for _ in range(RAISES):
        held = moment.clone()
        held.diagonal().add_(hold)
        factor, fault = torch.linalg.cholesky_ex(held)
        if not int(fault):
            return start + torch.cholesky_solve(distance.T, factor).T
        hold *= RAISE
    raise MoezipError(
        "the second moment of some experts' inputs has no Cholesky factor",
        next="raise the ridge, such as --set ridge=0.1, or merge with --set combine=frequency",
    )


def with_ones(x: torch.Tensor, biased: bool) -> torch.Tensor:
    """[n, C], with a last column of ones where there are biases."""
    import torch

    return torch.cat([x, x.new_ones(len(x), 1)], 1) if biased else x


def member(layer: MergeLayer, part: Part, role: ExpertRole, *, ordered: bool = True) -> torch.Tensor:
    """A member's matrix, its bias as last column where there are biases; neurons in the group's order or its own."""
    return average_of(layer, Pick((Part(part.expert, 1.0, part.neurons if ordered else None),)), role)


def average_of(layer: MergeLayer, pick: Pick, role: ExpertRole) -> torch.Tensor:
    """The average of a group's matrices, its bias as last column where there are biases; float32."""
    import torch

    number, bias = layer.facts.layer, f"{role}_bias"
    value = average(layer.source, layer.architecture, number, pick, role)
    if bias not in layer.roles:
        return value
    return torch.cat([value, average(layer.source, layer.architecture, number, pick, bias)[:, None]], 1)  # type: ignore[arg-type]


def by_role(joined: dict[ExpertRole, torch.Tensor], biased: bool) -> dict[ExpertRole, torch.Tensor]:
    """Matrices and biases apart again."""
    if not biased:
        return joined
    found: dict[ExpertRole, torch.Tensor] = {role: value[:, :-1] for role, value in joined.items()}
    found |= {f"{role}_bias": value[:, -1] for role, value in joined.items()}  # type: ignore[misc]
    return found

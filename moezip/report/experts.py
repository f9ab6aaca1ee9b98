"""What became of every expert of the source, read from a plan: kept, merged into which, dropped, how wide, in how many
bits."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moezip.plan.plan import Plan, ranges

Fate = Literal["kept", "averaged", "merged", "dropped"]
_EXPERT = re.compile(r"\blayers\.(?P<layer>\d+)\..*\bexperts\.(?P<expert>\d+)\.(?P<role>.+)\.weight$")
ROLES = (("gate", ("gate", "w1")), ("up", ("up", "w3")), ("down", ("down", "w2")))


@dataclass(frozen=True, slots=True)
class Cell:
    """One expert of the source.

    Attributes:
        fate: ``kept``; ``averaged``: it is there, with others in it; ``merged``: it went into another; ``dropped``.
        into: of a merged one, the expert that dominates its group. members: of an averaged one, the others in it.
        share: of its neurons, those kept. score: the method's, None without. bits: per weight, None if not packed.
        guarded: a super expert that the guard kept.
    """

    layer: int
    expert: int
    fate: Fate
    share: float = 1.0
    score: float | None = None
    bits: float | None = None
    into: int | None = None
    members: tuple[int, ...] = ()
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """All of them. ``cells`` by layer and expert."""

    cells: Mapping[int, tuple[Cell, ...]]

    @property
    def width(self) -> int:
        return max(len(row) for row in self.cells.values())

    def every(self) -> list[Cell]:
        return [cell for row in self.cells.values() for cell in row]

    def counts(self) -> Counter[str]:
        return Counter(cell.fate for cell in self.every())

    @property
    def scored(self) -> bool:
        return any(cell.score is not None for cell in self.every())

    @property
    def packed(self) -> bool:
        return any(cell.bits is not None for cell in self.every())

    @property
    def slim(self) -> bool:
        return any(cell.share < 1 for cell in self.every() if cell.fate != "dropped")

    def lines(self) -> list[tuple[int, str, str, str]]:
        """Per layer in words: experts kept, merges (``1 <- 0 5``), experts dropped."""
        found = []
        for layer, row in self.cells.items():
            stay = [cell.expert for cell in row if cell.fate == "kept"]
            gone = [cell.expert for cell in row if cell.fate == "dropped"]
            merges = [f"{cell.expert} ← {ranges(sorted(cell.members))}" for cell in row if cell.fate == "averaged"]
            found.append((layer, ranges(stay), ", ".join(merges), ranges(gone)))
        return found


def expert_map(plan: Plan) -> ExpertMap | None:
    """None for a model without experts."""
    width = 1 + max(
        (pick.neurons[-1] for layer in plan.layers for pick in layer.picks if pick.neurons), default=-1
    )  # the highest neuron that anyone keeps; the plan does not say how many there were
    bits = _bits(plan)
    rows = {}
    for layer in plan.layers:
        cells: dict[int, Cell] = {}
        scores = dict(enumerate(layer.scores))
        for place, pick in enumerate(layer.picks):
            own, others = pick.kept, pick.members[1:]
            share = 1.0 if pick.neurons is None or width == 0 else len(pick.neurons) / width
            fate: Fate = "averaged" if others else "kept" if share else "dropped"
            packed = bits.get((layer.layer, place))
            guarded = own in layer.protected
            cells[own] = Cell(
                layer.layer, own, fate, share, scores.get(own), packed, members=others, guarded=guarded
            )  # fmt: skip
            for other in others:
                cells[other] = Cell(layer.layer, other, "merged", 1.0, scores.get(other), packed, into=own)
        rows[layer.layer] = tuple(
            cells.get(expert) or Cell(layer.layer, expert, "dropped", 0.0, scores.get(expert))
            for expert in range(layer.experts)
        )
    return ExpertMap(rows) if rows else None


def _bits(plan: Plan) -> dict[tuple[int, int], float]:
    """Mean bits of the codes over an expert's matrices, by layer and place in the output."""
    found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for name, grid in plan.packing.items():
        if place := _EXPERT.search(name):
            found[int(place["layer"]), int(place["expert"])].append(grid.bits)
    return {key: sum(each) / len(each) for key, each in found.items()}


def bits_histogram(plan: Plan) -> dict[str, Counter[int]]:
    """How many matrices have how many bits: by the role in an expert, and of all others."""
    found: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for name, grid in plan.packing.items():
        place = _EXPERT.search(name)
        role = "no expert's"
        if place:
            role = next((role for role, starts in ROLES if place["role"].startswith(starts)), "other")
        found[role][grid.bits] += 1
    order = [role for role, _ in ROLES] + ["other", "no expert's"]
    return {role: found[role] for role in order if role in found}

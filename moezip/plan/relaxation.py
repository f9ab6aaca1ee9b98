"""What a budget of bytes is worth: a lower bound on the nats of any choice, and a choice near it.

Every unit takes exactly one of its options; units of one bundle (the matrices of an expert) may go all together, for
no bytes and a price of their own; rules say how many bundles a layer must keep. With a price on every byte each unit
decides for itself, and the best such price gives a lower bound on what any choice within the budget costs (Everett
1963; Geoffrion 1974). Where nothing may go it is the bound of the linear program, else it is that or higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moezip.errors import PlanError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

STEPS = 200  # the price is found in about ten
ROUNDING = 1e-12  # float64 sums in another order, relative


class BudgetError(PlanError):
    """A budget that nothing fits.

    Attributes:
        budget, least, most: bytes of the budget, of the smallest choice, and of the largest that has any use.
        weights: of all matrices, to tell them in bits as well; 0 if unknown.
    """

    def __init__(self, budget: int, least: int, most: int, weights: int = 0):
        def shown(size: int) -> str:
            return f"{size:,} bytes" + (f" ({8 * size / weights:.3f} bits per weight)" if weights else "")

        super().__init__(
            f"the budget is {shown(budget)}, scales and zeros counted, and the smallest choice takes {shown(least)}",
            next=f"give at least that; more than {shown(most)} has no use",
        )
        self.budget, self.least, self.most = budget, least, most


@dataclass(frozen=True, slots=True)
class Unit:
    """One decision: ``bytes`` and ``nats`` of its options, one of which is taken."""

    bytes: tuple[int, ...]
    nats: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """``units`` that may go, all of them or none. ``drop``: nats if they go; infinite: they stay."""

    units: tuple[int, ...]
    drop: float


@dataclass(frozen=True, slots=True)
class Rule:
    """Bundles of one layer by router group, all groups of one size: ``least`` of each group stay, as many of each."""

    groups: tuple[tuple[int, ...], ...]
    least: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Units (any that is in no bundle stays), bundles (each in exactly one rule), rules, bytes at most."""

    units: tuple[Unit, ...]
    budget: int
    bundles: tuple[Bundle, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """One choice: option per unit, whether each bundle goes, and the sums."""

    option: Ints
    gone: Flags
    bytes: int
    nats: float


class Table:
    """The problem as arrays: [U, O] bytes and nats, options ascending in bytes, dominated ones and padding infinite."""

    def __init__(self, problem: Problem):
        self.problem = problem
        kept = [_undominated(unit) for unit in problem.units]
        self.original = kept
        units, width = len(kept), max(map(len, kept), default=1)
        self.bytes = np.zeros((units, width))
        self.nats = np.full((units, width), np.inf)
        for number, (unit, options) in enumerate(zip(problem.units, kept, strict=True)):
            self.bytes[number, : len(options)] = [unit.bytes[option] for option in options]
            self.nats[number, : len(options)] = [unit.nats[option] for option in options]
        self.bundle = np.full(units, -1, np.int64)
        for number, bundle in enumerate(problem.bundles):
            self.bundle[list(bundle.units)] = number
        self.bundled = self.bundle >= 0
        self.drop = np.array([bundle.drop for bundle in problem.bundles], np.float64)
        self.rules = [(np.array(rule.groups, np.int64), rule.least) for rule in problem.rules]
        self.rows = np.arange(units)

    def state(self, option: Ints, gone: Flags) -> State:
        """The choice with its sums."""
        there = ~self.bundled
        there[self.bundled] = ~gone[self.bundle[self.bundled]]
        taken = self.rows[there], option[there]
        nats = math.fsum(self.nats[taken]) + math.fsum(self.drop[gone])
        return State(option, gone, int(self.bytes[taken].sum()), nats)

    def at(self, nats_per_byte: float, nats: float = 1.0) -> State:
        """The cheapest choice if the budget did not bind but a byte cost so much (and a nat ``nats``)."""
        cost = np.where(np.isinf(self.nats), np.inf, nats * self.nats + nats_per_byte * self.bytes)
        option = cost.argmin(1)
        gain = self.gains(cost[self.rows, option], nats)
        gone = np.zeros(len(self.drop), np.bool_)
        for groups, least in self.rules:
            gone[_cheapest_drops(groups, gain, least)] = True
        return self.state(option, gone)

    def gains(self, cost: Floats, nats: float = 1.0) -> Floats:
        """[bundles]: what is paid if each goes rather than stays at these costs of its units."""
        stay = np.bincount(self.bundle[self.bundled], cost[self.bundled], len(self.drop))
        return np.asarray(nats * self.drop - stay)


def _undominated(unit: Unit) -> list[int]:
    """Options ascending in bytes, each cheaper than all before it. Raises PlanError for a price that is none."""
    if not unit.bytes or len(unit.bytes) != len(unit.nats) or not all(map(math.isfinite, unit.nats)):
        raise PlanError("a price is not a finite number", next="the statistics are damaged or the model overflows")
    kept: list[int] = []
    for option in sorted(range(len(unit.bytes)), key=lambda o: (unit.bytes[o], unit.nats[o], o)):
        if not kept or unit.nats[option] < unit.nats[kept[-1]]:
            kept.append(option)
    return kept


def _cheapest_drops(groups: Ints, gain: Floats, least: int) -> Ints:
    """Of bundles [G, S] those that go, as many of every group: the count and choice that add the least ``gain``."""
    order = np.argsort(gain[groups], axis=1, kind="stable")
    ranked = np.take_along_axis(groups, order, 1)[:, : groups.shape[1] - least]
    totals = np.concatenate([[0.0], np.cumsum(gain[ranked], axis=1).sum(0)])
    return np.asarray(ranked[:, : int(totals.argmin())].ravel())


# -- the price of the budget --------------------------------------------------------------------------------


def _smallest(table: Table) -> State:
    """Fewest bytes; of these nearly the fewest nats, which only break ties."""
    finite = np.abs(table.nats[np.isfinite(table.nats)]).sum() + np.abs(table.drop[np.isfinite(table.drop)]).sum()
    return table.at(1.0, 0.25 / float(finite) if finite else 1.0)


def price_of_budget(table: Table, budget: int) -> tuple[tuple[State, State], float, float]:
    """The best choices just within and just beyond the budget, the nats per byte between them, and the lower bound.

    The bound is the maximum of a concave, piecewise linear function of the rate, found exactly by secants.
    """
    within, beyond = _smallest(table), table.at(0.0)
    if within.bytes > budget:
        raise BudgetError(budget, within.bytes, beyond.bytes)
    if beyond.bytes <= budget:
        return (beyond, beyond), 0.0, beyond.nats
    rate, bound = 0.0, beyond.nats
    for _ in range(STEPS):
        trial = max((within.nats - beyond.nats) / (beyond.bytes - within.bytes), 0.0)
        state = table.at(trial)
        value = state.nats + trial * (state.bytes - budget)
        if value >= bound:
            rate, bound = trial, value
        line = within.nats + trial * (within.bytes - budget)
        if line - value <= ROUNDING * (abs(line) + abs(trial * budget)):
            break
        if state.bytes <= budget:
            within = state
        else:
            beyond = state
    return (within, beyond), rate, bound


def filled(table: Table, within: State, beyond: State, budget: int) -> State:
    """``within``, moved towards ``beyond`` as far as fits, then widened wherever that still fits and helps."""
    best = within
    blocks: list[tuple[list[int], list[int]]] = [([unit], []) for unit in map(int, np.flatnonzero(~table.bundled))]
    for groups, _ in table.rules:
        members = groups.ravel()
        if (within.gone[members] == beyond.gone[members]).all():
            blocks += [([unit], []) for unit in map(int, np.flatnonzero(np.isin(table.bundle, members)))]
        else:
            blocks.append((list(np.flatnonzero(np.isin(table.bundle, members))), list(members)))
    moved = [
        block
        for block in blocks
        if (within.option[block[0]] != beyond.option[block[0]]).any()
        or (within.gone[block[1]] != beyond.gone[block[1]]).any()
    ]
    for units, bundles in moved:
        option, gone = best.option.copy(), best.gone.copy()
        option[units], gone[bundles] = beyond.option[units], beyond.gone[bundles]
        trial = table.state(option, gone)
        if trial.bytes <= budget and trial.nats <= best.nats:
            best = trial
    return _widened(table, best, budget)


def _widened(table: Table, state: State, budget: int) -> State:
    """Options of more bytes for as long as one fits, the one that saves most nats per byte first."""
    option = state.option.copy()
    there = ~table.bundled
    there[table.bundled] = ~state.gone[table.bundle[table.bundled]]
    slack = budget - state.bytes
    gain = table.nats[table.rows, option][:, None] - table.nats
    extra = table.bytes - table.bytes[table.rows, option][:, None]
    gain[~there] = -np.inf
    while True:
        worth = np.divide(gain, extra, out=np.zeros_like(gain), where=(extra <= slack) & (gain > 0) & (extra > 0))
        unit, chosen = divmod(int(worth.argmax()), worth.shape[1])
        if worth[unit, chosen] <= 0:
            return table.state(option, state.gone)
        slack -= int(extra[unit, chosen])
        option[unit] = chosen
        gain[unit] = table.nats[unit, chosen] - table.nats[unit]
        extra[unit] = table.bytes[unit] - table.bytes[unit, chosen]

"""The cheapest choice of widths under a budget of bytes: an integer program over the whole model.

``relaxation.py`` says what the program is and bounds it. Its own choice is nearly the best; where "nearly" is more than
``gap``, CBC (through PuLP) settles what the bound leaves open, or a dynamic program does. Pure functions of their
arguments: no chance, and no clock unless CBC runs out of time before it runs out of nodes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moezip.errors import PlanError, UsageError
from moezip.plan.relaxation import (
    ROUNDING,
    Flags,
    Ints,
    Problem,
    State,
    Table,
    filled,
    price_of_budget,
)

Solver = Literal["cbc", "dp"]

GAP = 1e-4  # an answer this close to the bound, relative, is not worth a search
NODES = 20_000  # of CBC's search tree: stops it at the same place everywhere
SECONDS = 20.0  # if those nodes take longer still
SHARES = 1e4  # CBC looks for nothing that is better by less than 1e-5
TABLE = 200_000_000  # steps that a dynamic program may take


@dataclass(frozen=True, slots=True)
class Solution:
    """What was chosen.

    Attributes:
        options: per unit, the index of its option; None where its bundle goes.
        bytes, nats: sums. bound: no choice costs fewer nats.
        answered: ``relaxation``, ``cbc`` or ``dp``: whose answer it is.
        proven: no choice within the budget is cheaper (to CBC's tolerances).
        remark: what the reader should know of the search, or empty.
    """

    options: tuple[int | None, ...]
    bytes: int
    nats: float
    bound: float
    answered: str
    proven: bool
    remark: str = ""

    @property
    def gap(self) -> float:
        """How far the answer may be from the best, as a share of its nats."""
        return max(self.nats - self.bound, 0.0) / max(abs(self.nats), math.ulp(0.0))


def solve(
    problem: Problem,
    solver: Solver = "cbc",
    gap: float = GAP,
    nodes: int = NODES,
    seconds: float = SECONDS,
) -> Solution:
    """The cheapest choice within the budget, or one within a known gap of it.

    Args:
        solver: who is asked where the relaxation's answer is farther than ``gap`` from its bound.
        nodes, seconds: where CBC stops; its best answer so far is taken if it beats the relaxation's.

    Raises:
        PlanError: nothing fits the budget (the message names the least and the most bytes), prices that are no
            numbers, or a dynamic program that is asked for where it does not apply.
        UsageError: no such solver.
    """
    if solver not in ("cbc", "dp"):
        raise UsageError(f"unknown solver of integer programs {solver!r}", next="use cbc or dp")
    if not problem.units:
        return Solution((), 0, 0.0, 0.0, "relaxation", True)
    table = Table(problem)
    below, rate, bound = price_of_budget(table, problem.budget)
    best = filled(table, below[0], below[-1], problem.budget)
    bound = min(bound, best.nats)  # they may cross in the last digit
    answered, remark = "relaxation", ""
    proven = best.nats - bound <= ROUNDING * abs(best.nats)
    if best.nats - bound > gap * abs(best.nats):
        if solver == "dp":
            best, answered, proven = _dynamic(table, problem), "dp", True
        else:
            found, proven, remark = _cbc(table, problem, best, rate, bound, nodes, seconds)
            if proven or found.nats < best.nats:
                best, answered = found, "cbc"
    options = [
        None if bundle >= 0 and best.gone[bundle] else table.original[unit][int(best.option[unit])]
        for unit, bundle in enumerate(table.bundle)
    ]
    return Solution(tuple(options), best.bytes, best.nats, bound, answered, proven, remark)


# -- what the bound leaves open -----------------------------------------------------------------------------


def _open(table: Table, best: State, rate: float, bound: float) -> tuple[Flags, Ints]:
    """Options [U, O] that a better choice than ``best`` may contain, and bundles' fate: stay (1), go (-1), any (0).

    At the rate of the bound, an option that costs its unit ``d`` more than the cheapest lifts the bound by ``d``: with
    ``bound + d`` above what is already had, it is out.
    """
    margin = (best.nats - bound) * (1 + 1e-6) + ROUNDING * abs(best.nats)
    cost = np.where(np.isinf(table.nats), np.inf, table.nats + rate * table.bytes)
    least = cost.min(1)
    options = cost - least[:, None] <= margin
    options[table.rows, best.option] = True
    gain = table.gains(least)
    fate = np.zeros(len(table.drop), np.int64)
    fate[np.isinf(table.drop)] = 1
    for groups, keep in table.rules:
        if len(groups) > 1:  # groups move together: what one bundle costs cannot be told alone
            continue
        members = groups[0]
        own = np.sort(gain[members])
        most = len(members) - keep
        successor = min(float(own[most]), 0.0) if most < len(own) else 0.0  # goes in the place of one that stays
        fate[members[gain[members] > margin]] = 1
        if most:
            fate[members[(gain[members] <= own[most - 1]) & (successor - gain[members] > margin)]] = -1
        else:
            fate[members] = 1
    fate[(fate == 1) & best.gone] = 0
    fate[(fate == -1) & ~best.gone] = 0
    return options, fate


@dataclass(frozen=True, slots=True)
class _Program:
    """What is left to decide, as PuLP has it: variables of options by unit (None where only one is left), of drops."""

    model: Any
    taken: dict[int, list[tuple[int, Any]]]
    goes: dict[int, Any]


def _program(table: Table, problem: Problem, best: State, rate: float, bound: float) -> _Program:
    """The integer program over what is open.

    Bytes are told as differences from ``best`` in units of their common divisor, nats as shares (``SHARES`` in all) of
    what can still be saved: CBC's tolerances are absolute.
    """
    import pulp

    options, fate = _open(table, best, rate, bound)
    worth = (best.nats - bound) / SHARES
    divisor = math.gcd(*(int(x) for x in table.bytes[np.isfinite(table.nats)])) or 1
    model = pulp.LpProblem("widths", pulp.LpMinimize)
    goes = {int(b): pulp.LpVariable(f"d{b}", cat="Binary") for b in np.flatnonzero(fate == 0)}
    taken: dict[int, list[tuple[int, Any]]] = {}
    spent: list[tuple[Any, int]] = []
    cost = [(variable, float(table.drop[bundle]) / worth) for bundle, variable in goes.items()]
    shift = -math.fsum(float(table.drop[bundle]) / worth for bundle in goes if best.gone[bundle])
    for unit in range(len(table.rows)):
        bundle = int(table.bundle[unit])
        if bundle >= 0 and fate[bundle] < 0:
            continue
        left = [int(option) for option in np.flatnonzero(options[unit])]
        if len(left) == 1 and bundle not in goes:
            taken[unit] = [(left[0], None)]
            continue
        taken[unit] = [(option, pulp.LpVariable(f"x{unit}_{option}", cat="Binary")) for option in left]
        one = pulp.lpSum(variable for _, variable in taken[unit])
        model += (one + goes[bundle] if bundle in goes else one) == 1
        bytes_now, nats_now = (float(each[unit, best.option[unit]]) for each in (table.bytes, table.nats))
        if bundle in goes and best.gone[bundle]:
            bytes_now = nats_now = 0.0
        for option, variable in taken[unit]:
            spent.append((variable, int(table.bytes[unit, option] - bytes_now) // divisor))
            cost.append((variable, float(table.nats[unit, option] - nats_now) / worth))
        if bundle in goes:
            spent.append((goes[bundle], int(-bytes_now) // divisor))
            cost.append((goes[bundle], -nats_now / worth))
    model += pulp.lpSum(factor * variable for variable, factor in cost) + shift
    model += pulp.lpSum(factor * variable for variable, factor in spent) <= (problem.budget - best.bytes) // divisor
    for groups, least in table.rules:
        gone = [pulp.lpSum(goes.get(int(b), int(fate[b] < 0)) for b in group) for group in groups]
        model += gone[0] <= groups.shape[1] - least
        for other in gone[1:]:
            model += other == gone[0]
    return _Program(model, taken, goes)


def _cbc(
    table: Table, problem: Problem, best: State, rate: float, bound: float, nodes: int, seconds: float
) -> tuple[State, bool, str]:
    """CBC's choice among what is open, or ``best``; whether it is proven; a remark where it is not."""
    import pulp

    with warnings.catch_warnings():  # PuLP 3.3 announces names of PuLP 4 that earlier ones do not have
        warnings.simplefilter("ignore", DeprecationWarning)
        program = _program(table, problem, best, rate, bound)
        try:
            program.model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, threads=1, maxNodes=nodes, gapRel=0.0))
        except pulp.PulpSolverError as fault:
            return best, False, f"CBC did not run ({fault})"
    status = program.model.sol_status
    if status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return best, False, f"CBC found nothing better in {nodes} nodes or {seconds:g} s"
    option, gone = best.option.copy(), best.gone.copy()
    for bundle, variable in program.goes.items():
        gone[bundle] = variable.value() > 0.5
    for unit, choices in program.taken.items():
        option[unit] = max(choices, key=lambda each: 1.0 if each[1] is None else each[1].value())[0]
    found = table.state(option, gone)
    if found.bytes > problem.budget:  # within CBC's tolerance, not within the budget
        return best, False, "CBC's answer took more bytes than the budget and was not used"
    proven = status == pulp.LpSolutionOptimal
    return (
        min(found, best, key=lambda state: state.nats),
        proven,
        "" if proven else (f"CBC stopped after {nodes} nodes or {seconds:g} s"),
    )


def _dynamic(table: Table, problem: Problem) -> State:
    """The exact answer where nothing may go, over the bytes spent in units of their common divisor."""
    if problem.bundles:
        raise PlanError("a dynamic program cannot drop experts", next="use cbc, or drop none")
    base = table.bytes[:, 0].astype(np.int64)
    steps = (table.bytes - table.bytes[:, :1]).astype(np.int64)
    usable = np.isfinite(table.nats)
    divisor = math.gcd(*(int(step) for step in steps[usable])) or 1
    most = min((problem.budget - int(base.sum())) // divisor, int(np.where(usable, steps, 0).max(1).sum()) // divisor)
    if (most + 1) * usable.sum() > TABLE:
        raise PlanError(
            f"a dynamic program would take {(most + 1) * int(usable.sum()):,} steps", next="use cbc for so many bytes"
        )
    cost = np.zeros(most + 1)  # fewest nats of the units so far with at most so many bytes
    choice = np.zeros((len(base), most + 1), np.uint8 if table.nats.shape[1] < 256 else np.uint16)
    for unit in range(len(base)):
        after = np.full(most + 1, np.inf)
        for option in np.flatnonzero(usable[unit]):
            step = int(steps[unit, option]) // divisor
            if step > most:
                continue
            trial = cost[: most + 1 - step] + table.nats[unit, option]
            better = trial < after[step:]
            after[step:][better] = trial[better]
            choice[unit, step:][better] = option
        cost = after
    chosen = np.zeros(len(base), np.int64)
    left = most
    for unit in reversed(range(len(base))):
        chosen[unit] = choice[unit, left]
        left -= int(steps[unit, chosen[unit]]) // divisor
    return table.state(chosen, np.zeros(0, np.bool_))

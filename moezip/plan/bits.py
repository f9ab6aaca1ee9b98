"""Who gets how many bits: the cheapest choice of widths, and of experts to drop, for the whole model at once.

Matrices come with the price of each form (``widths.py``), whole experts with the price of going without them; what
shares a width is one decision; ``lp.py`` takes them all together. ``pmq.py`` and ``importance.py`` hold the published
heuristics. Pure functions, no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.plan import lp as program
from moezip.plan.relaxation import BudgetError, Bundle, Problem, Rule, Unit
from moezip.plan.widths import GRANULARITIES, READERS, Allocation, Form, Granularity, Matrix, Reader, place_of
from moezip.registry import lookup


def allocate(
    matrices: Sequence[Matrix],
    budget: int,
    *,
    facts: Sequence[LayerFacts] = (),
    drops: Mapping[int, Array] | None = None,
    freed: Mapping[int, int] | None = None,
    granularity: Granularity = "role",
    reader: str | None = None,
    solver: program.Solver = "cbc",
    gap: float = program.GAP,
) -> Allocation:
    """The forms of all matrices, and the experts to drop, that cost the fewest nats within the budget.

    A layer keeps at least max(top-k, 2 per router group) experts, and as many of every group. The same matrices in
    another order give the same choice, as long as no two choices cost exactly as much.

    Args:
        budget: bytes of all ``matrices`` together.
        facts: of the layers that may drop experts.
        drops: per layer, [E] nats if the expert goes; infinite for one that must stay. None: nothing is dropped.
        freed: per layer, bytes beside the matrices that an expert takes along if it goes, as its row of the router;
            the matrices may then take so many more. Of layers that are not named: none.
        granularity: what shares a width; matrices that are no experts' share by kind within a layer at ``layer``,
            over the model at ``model``. With ``model`` every layer keeps the same number of experts.
        reader: who must be able to read the result, see ``READERS``; without, it is moezip.
        solver: ``cbc``, or ``dp`` for the exact dynamic program (no drops).
        gap: see ``lp.solve``.

    Raises:
        UsageError: no such granularity or reader, or a granularity that is too fine for the reader.
        PlanError: a budget that nothing fits (the message says which would), or forms that leave a matrix no choice.
    """
    lookup(granularity, GRANULARITIES, "granularity")
    allowed = _reader(reader, granularity)
    if not matrices:
        raise PlanError("there is no matrix to give bits to", next="check that the groups divide the experts' sizes")
    matrices = [_limited(matrix, allowed, reader) for matrix in matrices]
    layers = [fact for fact in facts if drops is not None and fact.layer in drops]
    beside = {fact.layer: (freed or {}).get(fact.layer, 0) for fact in layers}
    call = _Call(
        tuple(matrices), budget, beside, sum(fact.experts * beside[fact.layer] for fact in layers), solver, gap
    )
    if drops is None or not layers or granularity in ("role", "expert"):
        decisions = [_shared(members) for members in _sharing(matrices, granularity).values()]
        return call.solved(decisions, layers, drops)
    inside = {fact.layer for fact in layers}
    rest = [matrix for matrix in matrices if matrix.expert is None or matrix.layer not in inside]
    decisions = [_shared(members) for members in _sharing(rest, granularity).values()]
    counted = [
        _counted(fact, drops[fact.layer], _experts_of(matrices, fact.layer), beside[fact.layer]) for fact in layers
    ]
    if granularity == "model":
        return call.solved([*decisions, _joined(counted)])
    if allowed.counts_differ:
        return call.solved([*decisions, *counted])
    return call.equal_counts(decisions, counted)


@dataclass(frozen=True, slots=True)
class _Option:
    """One option of a decision.

    Attributes:
        form: of everything that it decides on and that stays.
        bytes, nats: sums. orders: per layer, its experts from the first to stay to the first to go.
        kept: how many stay of each of these layers.
    """

    form: Form
    bytes: int
    nats: float
    orders: tuple[tuple[tuple[int, int], ...], ...] = ()
    kept: int = 0

    @property
    def gone(self) -> set[tuple[int, int]]:
        return {expert for order in self.orders for expert in order[self.kept :]}


@dataclass(frozen=True, slots=True)
class _Decision:
    """Matrices that share a form, and the options for them all."""

    members: tuple[Matrix, ...]
    options: tuple[_Option, ...]

    def keeping(self, count: int) -> _Decision:
        return _Decision(self.members, tuple(option for option in self.options if option.kept == count))


@dataclass(frozen=True, slots=True)
class _Call:
    """What every program of one call of ``allocate`` has in common.

    Attributes:
        budget: bytes of the matrices if every expert stays.
        beside: by layer that may drop experts, the bytes beside its matrices that each takes along. all_beside: of
            all those experts. The programs count them with the matrices.
    """

    matrices: tuple[Matrix, ...]
    budget: int
    beside: Mapping[int, int]
    all_beside: int
    solver: program.Solver
    gap: float

    def solved(
        self,
        decisions: Sequence[_Decision],
        layers: Sequence[LayerFacts] = (),
        drops: Mapping[int, Array] | None = None,
    ) -> Allocation:
        """The cheapest options. ``layers``: whose experts may go, one by one, for the price in ``drops``."""
        places: dict[tuple[int | None, int | None], list[int]] = {}
        for place, each in enumerate(decisions):
            if each.members[0].expert is not None:
                places.setdefault((each.members[0].layer, each.members[0].expert), []).append(place)
        first = {
            own[0]: self.beside.get(layer, 0) for (layer, _), own in places.items() if layers and layer is not None
        }
        units = tuple(
            Unit(
                tuple(option.bytes + first.get(place, 0) for option in each.options),
                tuple(option.nats for option in each.options),
            )
            for place, each in enumerate(decisions)
        )
        bundles: list[Bundle] = []
        rules = []
        for fact in layers:
            assert drops is not None
            start, size = len(bundles), fact.experts // fact.groups
            bundles += [
                Bundle(tuple(places[fact.layer, expert]), float(drops[fact.layer][expert]))
                for expert in range(fact.experts)
            ]
            cuts = range(start, start + fact.experts, size)
            rules.append(Rule(tuple(tuple(range(cut, cut + size)) for cut in cuts), least_of_group(fact)))
        problem = Problem(units, self.budget + self.all_beside, tuple(bundles), tuple(rules))
        weights = sum(matrix.weights for matrix in self.matrices)
        try:
            solution = program.solve(problem, self.solver, self.gap)
        except BudgetError as fault:
            whole = self.all_beside
            raise BudgetError(fault.budget - whole, fault.least - whole, fault.most - whole, weights) from None
        forms: dict[str, Form] = {}
        gone: set[tuple[int, int]] = set()
        for each, chosen in zip(decisions, solution.options, strict=True):
            if chosen is None:
                gone |= {place_of(member) for member in each.members}
                continue
            option = each.options[chosen]
            away = option.gone
            gone |= away
            forms |= {m.name: option.form for m in each.members if m.expert is None or place_of(m) not in away}
        dropped: dict[int, tuple[int, ...]] = {}
        for layer, expert in sorted(gone):
            dropped[layer] = (*dropped.get(layer, ()), expert)
        more = sum(self.beside[layer] * len(experts) for layer, experts in dropped.items())
        return Allocation(
            {matrix.name: forms[matrix.name] for matrix in self.matrices if matrix.name in forms},
            solution.bytes - self.all_beside + more, self.budget + more, weights, solution.answered, dropped,
            solution.nats, solution.bound, solution.remark, solution.proven,
        )  # fmt: skip

    def equal_counts(self, decisions: Sequence[_Decision], layers: Sequence[_Decision]) -> Allocation:
        """The best where every one of ``layers`` keeps the same number of experts: one program for each number."""
        counts = sorted(set.intersection(*({option.kept for option in each.options} for each in layers)))
        if not counts:
            raise PlanError("no number of experts can be kept in every layer", next="drop none")
        relaxed: list[tuple[float, int]] = []
        for count in counts:
            quick = replace(self, solver="cbc", gap=math.inf)
            try:
                found = quick.solved([*decisions, *(each.keeping(count) for each in layers)])
            except BudgetError:  # more experts take more bytes still
                if not relaxed:
                    raise
                break
            relaxed.append((found.bound or 0.0, count))
        best: Allocation | None = None
        proven = True
        for bound, count in sorted(relaxed):
            if best is not None and best.nats is not None and best.nats <= bound:
                break
            found = self.solved([*decisions, *(each.keeping(count) for each in layers)])
            proven = proven and found.proven
            if best is None or (found.nats or 0.0) < (best.nats or 0.0):
                best = found
        assert best is not None
        return replace(best, bound=min(relaxed)[0], proven=proven)


def _reader(reader: str | None, granularity: str) -> Reader:
    allowed = lookup("moezip" if reader is None else reader, READERS, "reader of packed checkpoints")
    order = list(GRANULARITIES)
    if order.index(granularity) < order.index(allowed.finest):
        raise UsageError(
            f"{reader} cannot read a checkpoint in which {GRANULARITIES[granularity]}",
            where=f"--granularity {granularity} --for {reader}",
            next=f"use --granularity {allowed.finest}: {GRANULARITIES[allowed.finest]}; or write it for moezip",
        )
    return allowed


def _limited(matrix: Matrix, allowed: Reader, reader: str | None) -> Matrix:
    """The matrix with the forms that the reader knows. What is no expert's may stay as it is."""
    if allowed.bits is None:
        return matrix
    forms = {
        form: nats
        for form, nats in matrix.nats.items()
        if (form.bits in allowed.bits if form is not None else matrix.expert is None or len(matrix.nats) == 1)
    }
    if not forms:
        raise PlanError(
            f"none of the widths that may be chosen can be read by {reader}", where=matrix.name,
            next=f"let it have one of {', '.join(map(str, allowed.bits))} bits",
        )  # fmt: skip
    return replace(matrix, nats=forms)


def _sharing(matrices: Sequence[Matrix], granularity: str) -> dict[tuple, list[Matrix]]:  # type: ignore[type-arg]
    """Matrices by what they share a form with."""
    found: dict[tuple, list[Matrix]] = {}  # type: ignore[type-arg]
    for matrix in matrices:
        key: tuple[object, ...] = (matrix.name,)
        if granularity == "expert" and matrix.expert is not None:
            key = (matrix.layer, matrix.expert)
        elif granularity in ("layer", "model"):
            kind = matrix.kind if matrix.expert is None else "experts"
            # beside experts, only what has the same forms to choose from
            forms = () if matrix.expert is not None else tuple(sorted(map(str, matrix.nats)))
            key = (kind, forms, matrix.layer if granularity == "layer" else None)
        found.setdefault(key, []).append(matrix)
    return found


def _common_forms(members: Sequence[Matrix]) -> list[Form]:
    forms = [form for form in members[0].nats if all(form in member.nats for member in members)]
    if not forms:
        raise PlanError(
            f"{members[0].name} and {members[-1].name} are to share a width, and have none in common",
            next="use a finer --granularity, or another --group-size",
        )
    return forms


def _shared(members: Sequence[Matrix]) -> _Decision:
    """One form for all of them."""
    options = [
        _Option(form, sum(each.nbytes(form) for each in members), math.fsum(each.nats[form] for each in members))
        for form in _common_forms(members)
    ]
    return _Decision(tuple(members), tuple(options))


# -- experts that share a form and may go -------------------------------------------------------------------


def least_of_group(fact: LayerFacts) -> int:
    """How many experts of each router group must stay: 2, and what top-k and the group's score need."""
    need = fact.top_k if fact.groups == 1 else max(-(-fact.top_k // fact.top_groups), fact.group_rank)
    return min(max(need, 2), fact.experts // fact.groups)


def _experts_of(matrices: Sequence[Matrix], layer: int) -> list[Matrix]:
    return [matrix for matrix in matrices if matrix.layer == layer and matrix.expert is not None]


def _counted(fact: LayerFacts, drop: Array, members: Sequence[Matrix], beside: int) -> _Decision:
    """One form for the layer's experts, and how many stay: those whose loss in that form is dearest to replace.

    ``beside``: bytes of an expert that stays, beside its matrices.
    """
    size = fact.experts // fact.groups
    options: list[_Option] = []
    for form in _common_forms(members):
        nats, stored = np.zeros(fact.experts), np.full(fact.experts, beside, np.int64)
        for member in members:
            nats[place_of(member)[1]] += member.nats[form]
            stored[place_of(member)[1]] += member.nbytes(form)
        gain = (np.asarray(drop, np.float64) - nats).reshape(fact.groups, size)
        ranked = np.argsort(-gain, axis=1, kind="stable") + size * np.arange(fact.groups)[:, None]
        order = ranked.T.ravel()  # the first of every group, then the second of every group, ...
        kept_bytes, kept_nats = np.cumsum(stored[order]), np.cumsum(nats[order])
        gone_nats = np.append(np.cumsum(np.asarray(drop)[order][::-1])[::-1], 0.0)
        places = tuple((fact.layer, int(expert)) for expert in order)
        for each in range(least_of_group(fact), size + 1):
            kept = each * fact.groups
            total = float(kept_nats[kept - 1] + gone_nats[kept])
            if math.isfinite(total):  # else an expert would go that must stay
                options.append(_Option(form, int(kept_bytes[kept - 1]), total, (places,), kept))
    return _Decision(tuple(members), tuple(options))


def _joined(layers: Sequence[_Decision]) -> _Decision:
    """One decision for all layers: the same form and count in each."""
    tables = [{(option.form, option.kept): option for option in each.options} for each in layers]
    options = []
    for key in tables[0]:
        if all(key in table for table in tables):
            each = [table[key] for table in tables]
            orders = tuple(order for option in each for order in option.orders)
            total = math.fsum(option.nats for option in each)
            options.append(_Option(key[0], sum(option.bytes for option in each), total, orders, key[1]))
    if not options:
        raise PlanError("no width and number of experts is possible in every layer", next="use --granularity layer")
    return _Decision(tuple(member for each in layers for member in each.members), tuple(options))

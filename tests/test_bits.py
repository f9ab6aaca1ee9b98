"""Who gets how many bits: integer programs by hand and against every possible choice, laws, published heuristics."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from moezip.arch.spec import LayerFacts
from moezip.errors import MoezipError, PlanError, UsageError
from moezip.formats.packed import Grid
from moezip.plan.bits import allocate, least_of_group
from moezip.plan.importance import block_importance, by_score, outlier_score
from moezip.plan.lp import GAP, solve
from moezip.plan.pmq import PmqParams, code_bits, costs, pmq
from moezip.plan.relaxation import BudgetError, Bundle, Problem, Rule, Unit
from moezip.plan.widths import Allocation, Form, Matrix, assigned, budget_of, search_line, width_table

ROUNDING = 1e-9  # float64 sums of some hundred prices of about 1, in another order
SOLVED = 1e-7  # CBC's tolerances: it looks for nothing that is better by less than 1e-9 of what the bound leaves open
GRIDS = tuple(Grid(bits, 32) for bits in (1, 2, 3, 4, 6, 8))
FORMS: tuple[Form, ...] = (*GRIDS, None)
HIDDEN, WIDTH = 64, 32


# -- the program --------------------------------------------------------------------------------------------


def every_choice(problem: Problem) -> Iterator[tuple[int, float]]:
    """Bytes and nats of everything that the rules allow."""
    for gone in itertools.product((False, True), repeat=len(problem.bundles)):
        counts = [[sum(gone[b] for b in group) for group in rule.groups] for rule in problem.rules]
        if any(len(set(each)) > 1 for each in counts) or any(
            len(rule.groups[0]) - each[0] < rule.least for rule, each in zip(problem.rules, counts)
        ):
            continue
        away = {unit for bundle, goes in zip(problem.bundles, gone) if goes for unit in bundle.units}
        dropped = sum(bundle.drop for bundle, goes in zip(problem.bundles, gone) if goes)
        there = [unit for place, unit in enumerate(problem.units) if place not in away]
        for options in itertools.product(*(range(len(unit.bytes)) for unit in there)):
            yield (
                sum(unit.bytes[option] for unit, option in zip(there, options)),
                dropped + sum(unit.nats[option] for unit, option in zip(there, options)),
            )


def random_units(rng: np.random.Generator, count: int, options: int = 3) -> tuple[Unit, ...]:
    """More bytes, fewer nats, neither in even steps."""
    return tuple(
        Unit(
            tuple(map(int, np.sort(rng.choice(np.arange(1, 60), options, replace=False)))),
            tuple(map(float, -np.sort(-rng.random(options)))),
        )
        for _ in range(count)
    )


def test_a_program_by_hand() -> None:
    """Options of 1, 2, 3 bytes. First unit: 9, 4, 3.5 nats; second: 6, 5, 1. Four bytes.

    Choices that fill them: (1, 3) 9 + 1 = 10; (2, 2) 4 + 5 = 9; (3, 1) 3.5 + 6 = 9.5. So 9.
    The bound: from (1, 1), 15 nats and 2 bytes, the best byte is the first unit's second (saves 5), then half of the
    way from 1 to 3 of the second unit, whose 2 bytes save 5: 15 - 5 - 2.5 = 7.5.
    """
    problem = Problem((Unit((1, 2, 3), (9.0, 4.0, 3.5)), Unit((1, 2, 3), (6.0, 5.0, 1.0))), budget=4)
    for solver in ("cbc", "dp"):
        found = solve(problem, solver)  # type: ignore[arg-type]
        assert (found.options, found.bytes, found.nats) == ((1, 1), 4, 9.0)
        assert found.bound == pytest.approx(7.5, abs=ROUNDING)
        assert found.gap == pytest.approx(1.5 / 9, abs=ROUNDING)
        assert (found.answered, found.proven) == (solver, True)


def test_a_drop_by_hand() -> None:
    """One layer of three experts, two must stay. Each has two matrices of 1 byte (2 nats) or 2 bytes (0.5 nats).

    All stay in 6 bytes: 6 * 2 = 12 nats. Dropping the first (3 nats) leaves 6 bytes for four matrices: two of them in
    2 bytes, 3 + 2 * 0.5 + 2 * 2 = 8. Dropping the second too would be cheaper (3 + 0.1 + 2 * 0.5 = 4.1), but two stay;
    dropping the second (0.1) alone costs 0.1 + 1 + 4 = 5.1, the least.
    """
    units = tuple(Unit((1, 2), (2.0, 0.5)) for _ in range(6))
    bundles = tuple(Bundle((2 * e, 2 * e + 1), price) for e, price in enumerate((3.0, 0.1, math.inf)))
    found = solve(Problem(units, 6, bundles, (Rule(((0, 1, 2),), 2),)))
    assert found.nats == pytest.approx(5.1, abs=ROUNDING)
    assert [unit for unit, option in enumerate(found.options) if option is None] == [2, 3]
    lax = solve(Problem(units, 6, bundles, (Rule(((0, 1, 2),), 1),)))
    assert lax.nats == pytest.approx(4.1, abs=ROUNDING)  # the infinite one stays whatever the budget


def test_one_that_would_go_may_stay_so_that_another_goes() -> None:
    """One of two experts stays, of 4 bytes (0 nats if it goes) or 8 (2 nats); 5 bytes save 3 nats, and 2 bytes 3 more.

    Ten bytes. The large one gone, 6 are left, for one of the two: 2 + 3 = 5. The small one gone, 2 are left: 0 + 3 = 3.
    """
    units = (Unit((4,), (0.0,)), Unit((8,), (0.0,)), Unit((0, 5), (3.0, 0.0)), Unit((0, 2), (3.0, 0.0)))
    found = solve(Problem(units, 10, (Bundle((0,), 0.0), Bundle((1,), 2.0)), (Rule(((0, 1),), 1),)))
    assert (found.options, found.nats) == ((None, 0, 0, 1), 3.0)


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_the_answer_is_the_best_of_all(groups: int) -> None:
    rng = np.random.default_rng(groups)
    for turn in range(20):
        units = random_units(rng, 6)
        dear = (2.0, 0.5)[turn % 2]  # the cheap ones would all go, so that the rule binds
        bundles = tuple(Bundle(units, float(dear * rng.random())) for units in ((0, 1), (2,), (3,), (4,)))
        rules = {0: (), 1: (Rule(((0, 1, 2, 3),), 2),), 2: (Rule(((0, 1), (2, 3)), 1),)}[groups]
        problem = Problem(units, 0, bundles if groups else (), rules)
        choices = list(every_choice(problem))
        sizes = [size for size, _ in choices]
        problem = replace(problem, budget=int(rng.integers(min(sizes), max(sizes))))
        best = min(nats for size, nats in choices if size <= problem.budget)
        found = solve(problem, gap=0.0)
        assert found.bytes <= problem.budget
        assert found.nats == pytest.approx(best, abs=SOLVED)
        assert found.proven and found.bound <= best + ROUNDING


def test_cbc_and_the_dynamic_program_agree() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        units = random_units(rng, 40, options=6)
        problem = Problem(units, int(sum(np.mean(unit.bytes) for unit in units)))
        cbc, dp = solve(problem, gap=0.0), solve(problem, "dp", gap=0.0)
        assert cbc.nats == pytest.approx(dp.nats, abs=SOLVED)
        assert dp.answered == "dp" and max(cbc.bytes, dp.bytes) <= problem.budget


def test_a_large_model_needs_no_search() -> None:
    """6144 experts x 3 matrices x 7 widths: the relaxation is within its gap, so that no time limit decides."""
    rng = np.random.default_rng(2)
    size = (*(Grid(bits, 128).nbytes(768, 2048) for bits in (1, 2, 3, 4, 6, 8)), 768 * 2048 * 2)
    prices = np.exp(2 * rng.normal(size=(6144 * 3, 1))) * np.array([1, 0.3, 0.07, 0.017, 1e-3, 6e-5, 0])
    problem = Problem(tuple(Unit(size, tuple(map(float, row))) for row in prices), int(2.5 * 6144 * 3 * 768 * 2048 / 8))
    found = solve(problem)
    assert found.answered == "relaxation"
    assert found.gap < GAP and 0.9999 * problem.budget < found.bytes <= problem.budget


def test_the_relaxation_leaves_no_room_for_anything_that_helps() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        units = random_units(rng, 30, options=5)
        problem = Problem(units, int(sum(np.mean(unit.bytes) for unit in units)))
        found = solve(problem, gap=math.inf)
        assert found.answered == "relaxation"
        for unit, option in zip(units, found.options):
            assert option is not None
            for size, nats in zip(unit.bytes, unit.nats):
                assert nats >= unit.nats[option] or found.bytes - unit.bytes[option] + size > problem.budget


def test_a_search_that_ends_early_is_told_and_leaves_the_nearly_best(monkeypatch: pytest.MonkeyPatch) -> None:
    import pulp

    def broken(*args: object) -> None:
        raise pulp.PulpSolverError("no such program")

    problem = Problem((Unit((1, 2, 3), (9.0, 4.0, 3.5)), Unit((1, 2, 3), (6.0, 5.0, 1.0))), budget=4)
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", broken)
    found = solve(problem)
    assert found.answered == "relaxation" and not found.proven and "no such program" in found.remark
    assert found.bytes <= 4 and found.bound == pytest.approx(7.5, abs=ROUNDING)


def test_prices_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(PlanError, match="not a finite number"):
        solve(Problem((Unit((1, 2), (1.0, math.nan)),), 3))
    with pytest.raises(PlanError, match="cannot drop"):
        solve(Problem((Unit((1, 4), (1.0, 0.0)),) * 2, 6, (Bundle((0,), 1.0), Bundle((1,), 1.0)),
                      (Rule(((0, 1),), 1),)), "dp", gap=0.0)  # fmt: skip
    with pytest.raises(UsageError, match="unknown solver"):
        solve(Problem((), 3), "gurobi")  # type: ignore[arg-type]


# -- a model ------------------------------------------------------------------------------------------------


def model(seed: int, layers: int = 2, experts: int = 8, forms: Sequence[Form] = FORMS) -> list[Matrix]:
    """Matrices of one size; prices fall about fourfold for each bit, and differ a hundredfold between experts."""
    rng = np.random.default_rng(seed)
    found = []
    for layer, expert in itertools.product(range(layers), range(experts)):
        scale = math.exp(1.5 * rng.normal())
        for kind in ("gate", "up", "down"):
            own = scale * math.exp(rng.normal())
            nats = {f: 0.0 if f is None else own * 4.0**-f.bits * math.exp(0.1 * rng.normal()) for f in forms}
            shape = (HIDDEN, WIDTH) if kind == "down" else (WIDTH, HIDDEN)
            name = f"{layer}.{expert}.{kind}"
            found.append(Matrix(name, kind, shape, layer, expert, nats, 2 * HIDDEN * WIDTH))
    return found


def model_facts(layers: int = 2, experts: int = 8, top_k: int = 2, groups: int = 1) -> list[LayerFacts]:
    return [LayerFacts(n, experts, top_k, HIDDEN, WIDTH, groups, max(groups // 2, 1)) for n in range(layers)]


def model_drops(seed: int, layers: int = 2, experts: int = 8) -> dict[int, np.ndarray]:
    """What it costs if an expert goes: about what 1 bit costs."""
    rng = np.random.default_rng(100 + seed)
    return {layer: np.exp(1.5 * rng.normal(size=experts)) for layer in range(layers)}


def bytes_of(matrices: Sequence[Matrix], found: Allocation) -> int:
    return sum(matrix.nbytes(found.forms[matrix.name]) for matrix in matrices if matrix.name in found.forms)


def nats_of(matrices: Sequence[Matrix], found: Allocation, drops: dict[int, np.ndarray] | None = None) -> float:
    kept = sum(matrix.nats[found.forms[matrix.name]] for matrix in matrices if matrix.name in found.forms)
    return kept + sum(float((drops or {})[layer][e]) for layer, gone in found.dropped.items() for e in gone)


@pytest.mark.parametrize("granularity", ["role", "expert", "layer", "model"])
@pytest.mark.parametrize("dropping", [False, True])
def test_sums_are_those_of_the_choice_and_the_budget_holds(granularity: str, dropping: bool) -> None:
    matrices, drops = model(0), model_drops(0) if dropping else None
    for bits in (1.9, 2.5, 3.7, 9.0):
        budget = budget_of(matrices, bits)
        found = allocate(matrices, budget, facts=model_facts(), drops=drops, granularity=granularity)  # type: ignore[arg-type]
        assert found.bytes == bytes_of(matrices, found) <= budget
        assert found.nats == pytest.approx(nats_of(matrices, found, drops), abs=ROUNDING)
        assert found.bound is not None and found.nats is not None and found.bound <= found.nats + ROUNDING
        assert found.bits == pytest.approx(8 * found.bytes / sum(m.weights for m in matrices))
        gone = {(layer, expert) for layer, experts in found.dropped.items() for expert in experts}
        assert {m.name for m in matrices} - set(found.forms) == {
            m.name for m in matrices if (m.layer, m.expert) in gone
        }
        shared = {"expert": lambda m: (m.layer, m.expert), "layer": lambda m: m.layer, "model": lambda m: 0}
        if granularity != "role":
            widths: dict[object, set[Form]] = {}
            for matrix in matrices:
                if matrix.name in found.forms:
                    widths.setdefault(shared[granularity](matrix), set()).add(found.forms[matrix.name])
            assert all(len(each) == 1 for each in widths.values())


@pytest.mark.parametrize("granularity", ["role", "expert"])
def test_the_budget_is_spent_to_a_thousandth(granularity: str) -> None:
    """512 experts: a bit more for one of them is 0.08 % of 2.5 bits for all."""
    matrices = model(1, layers=8, experts=64)
    budget = budget_of(matrices, 2.5)
    found = allocate(matrices, budget, granularity=granularity)  # type: ignore[arg-type]
    assert 0.999 * budget <= found.bytes <= budget


def test_more_bytes_never_cost_nats() -> None:
    matrices, drops = model(2), model_drops(2)
    for given in (None, drops):
        nats = [
            allocate(matrices, budget_of(matrices, bits), facts=model_facts(), drops=given).nats
            for bits in (1.9, 2.0, 2.1, 2.7, 3.3, 5.0, 12.0, 20.0)
        ]
        assert all(b <= a * (1 + GAP) for a, b in itertools.pairwise(nats)), nats  # type: ignore[operator]
    assert nats[-1] == 0.0  # everything fits as it is


def test_the_currency_does_not_matter() -> None:
    matrices, drops = model(3), model_drops(3)
    dear = [replace(m, nats={form: 1000 * nats for form, nats in m.nats.items()}) for m in matrices]
    dear_drops = {layer: 1000 * prices for layer, prices in drops.items()}
    for bits in (1.9, 2.6):
        budget = budget_of(matrices, bits)
        one = allocate(matrices, budget, facts=model_facts(), drops=drops)
        other = allocate(dear, budget, facts=model_facts(), drops=dear_drops)
        assert (one.forms, one.dropped) == (other.forms, other.dropped)


@pytest.mark.parametrize("granularity", ["role", "expert", "layer"])
def test_the_order_of_matrices_does_not_matter(granularity: str) -> None:
    matrices, drops = model(4), model_drops(4)
    mixed = [matrices[place] for place in np.random.default_rng(4).permutation(len(matrices))]
    for bits in (1.9, 2.6):
        budget = budget_of(matrices, bits)
        one, other = (
            allocate(each, budget, facts=model_facts(), drops=drops, granularity=granularity)  # type: ignore[arg-type]
            for each in (matrices, mixed)
        )
        assert (one.forms, one.dropped) == (other.forms, other.dropped)
        assert list(other.forms) == [m.name for m in mixed if m.name in other.forms]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_uniform_widths_and_widening_by_price_alone(bits: int) -> None:
    matrices = model(5, layers=3)
    grid = Grid(bits, 32)
    uniform = sum(matrix.nats[grid] for matrix in matrices)
    budget = sum(matrix.nbytes(grid) for matrix in matrices)
    forms = {matrix.name: 0 for matrix in matrices}
    spent = sum(matrix.nbytes(FORMS[0]) for matrix in matrices)
    # the dearest is widened until it is not the dearest any more, whatever the bytes
    while True:
        dearest = max(matrices, key=lambda m: m.nats[FORMS[forms[m.name]]])
        wider = forms[dearest.name] + 1
        extra = dearest.nbytes(FORMS[wider]) - dearest.nbytes(FORMS[wider - 1])
        if spent + extra > budget:
            break
        forms[dearest.name], spent = wider, spent + extra
    greedy = sum(matrix.nats[FORMS[forms[matrix.name]]] for matrix in matrices)
    by_matrix = allocate(matrices, budget)
    by_expert = allocate(matrices, budget, granularity="expert")
    assert by_matrix.nats is not None and by_expert.nats is not None
    # prices differ a hundredfold here, so that the same bytes buy at least a quarter less
    assert by_matrix.nats < 0.75 * uniform
    assert by_matrix.nats < greedy
    assert by_matrix.nats < by_expert.nats < uniform


def test_an_impossible_budget_says_what_would_do() -> None:
    matrices = model(6)
    least = sum(matrix.nbytes(GRIDS[0]) for matrix in matrices)
    most = sum(matrix.plain_bytes for matrix in matrices)
    weights = sum(matrix.weights for matrix in matrices)
    with pytest.raises(BudgetError) as refusal:
        allocate(matrices, least - 1)
    assert (refusal.value.least, refusal.value.most) == (least, most)
    assert f"{least:,} bytes ({8 * least / weights:.3f} bits" in str(refusal.value)
    assert f"{most:,} bytes (16.000 bits" in str(refusal.value)
    assert set(allocate(matrices, least).forms.values()) == {GRIDS[0]}
    with pytest.raises(PlanError, match="no matrix"):
        allocate([], 100)


def test_matrices_with_one_form_keep_it_and_count() -> None:
    head = Matrix("head", "head", (128, HIDDEN), None, None, {None: 0.0}, 2 * 128 * HIDDEN)
    query = Matrix("q", "attention", (HIDDEN, HIDDEN), 0, None, {Grid(4, 32): 0.1}, 2 * HIDDEN * HIDDEN)
    matrices = [*model(7), head, query]
    for granularity in ("role", "layer", "model"):
        found = allocate(matrices, budget_of(matrices, 4), granularity=granularity)  # type: ignore[arg-type]
        assert found.forms["head"] is None and found.forms["q"] == Grid(4, 32)
        assert "head" not in found.packing and found.bytes == bytes_of(matrices, found)


# -- experts that go ----------------------------------------------------------------------------------------


def test_least_of_a_group() -> None:
    assert least_of_group(LayerFacts(0, 8, 1, 64, 32)) == 2
    assert least_of_group(LayerFacts(0, 8, 4, 64, 32)) == 4
    # 8 of 4 groups' experts: 2 of each; 12 of 4: 3 of each
    assert least_of_group(LayerFacts(0, 256, 8, 64, 32, groups=8, top_groups=4)) == 2
    assert least_of_group(LayerFacts(0, 256, 12, 64, 32, groups=8, top_groups=4)) == 3


@pytest.mark.parametrize("granularity", ["role", "expert", "layer", "model"])
def test_routers_keep_what_they_need_and_groups_stay_even(granularity: str) -> None:
    matrices = model(8)
    free = {layer: np.zeros(8) for layer in range(2)}  # nothing is lost with any of them
    for top_k, groups, least in ((2, 1, 2), (5, 1, 5), (2, 2, 4), (3, 4, 8)):
        facts = model_facts(top_k=top_k, groups=groups)
        found = allocate(matrices, budget_of(matrices, 16), facts=facts, drops=free, granularity=granularity)  # type: ignore[arg-type]
        # as they are, all matrices cost nothing either; with less than that room all go that may
        tight = allocate(matrices, budget_of(matrices, 1.5 * least / 8 + 0.5), facts=facts, drops=free,
                         granularity=granularity)  # type: ignore[arg-type]  # fmt: skip
        for each in (found, tight):
            for fact in facts:
                kept = sorted(set(range(8)) - set(each.dropped.get(fact.layer, ())))
                assert len(kept) >= least
                assert len({sum(e // (8 // groups) == g for e in kept) for g in range(groups)}) == 1


def test_an_expert_that_must_stay_stays() -> None:
    matrices, drops = model(9), model_drops(9)
    budget = budget_of(matrices, 1.2)
    facts = model_facts()
    first = allocate(matrices, budget, facts=facts, drops=drops)
    layer, gone = next(iter(first.dropped.items()))
    drops[layer][gone[0]] = math.inf
    for granularity in ("role", "layer", "model"):
        found = allocate(matrices, budget, facts=facts, drops=drops, granularity=granularity)  # type: ignore[arg-type]
        assert found.dropped and gone[0] not in found.dropped.get(layer, ())


def test_what_goes_with_an_expert_makes_room_by_hand() -> None:
    """Three experts of n2 or n4 bytes (2 and 4 bits); the first may go for nothing, the others cost 50 then.

    The budget is one byte short of n2 + n4: two stay at 2 bits. With 1 byte that goes with an expert there is room for
    the 4 bits of the dearer one, and bytes of matrices may be the budget and that 1.
    """
    two, four = Grid(2, 32), Grid(4, 32)
    prices = ((3.0, 0.0), (5.0, 0.0), (9.0, 0.0))
    matrices = [
        Matrix(f"0.{expert}.up", "up", (WIDTH, HIDDEN), 0, expert, dict(zip((two, four), own)), 2 * HIDDEN * WIDTH)
        for expert, own in enumerate(prices)
    ]
    facts, drops = model_facts(1, experts=3), {0: np.array([0.0, 50.0, 50.0])}
    small, large = (matrices[0].nbytes(grid) for grid in (two, four))
    budget = small + large - 1
    for granularity in ("role", "expert"):
        short = allocate(matrices, budget, facts=facts, drops=drops, granularity=granularity)  # type: ignore[arg-type]
        assert (short.dropped, short.bytes, short.nats) == ({0: (0,)}, 2 * small, 14.0)
        found = allocate(matrices, budget, facts=facts, drops=drops, freed={0: 1}, granularity=granularity)  # type: ignore[arg-type]
        assert (found.dropped, found.bytes, found.nats) == ({0: (0,)}, small + large, 5.0)
        assert found.budget == budget + 1
        stays = allocate(matrices, 3 * small, facts=facts, freed={0: 1000}, granularity=granularity)  # type: ignore[arg-type]
        assert stays.bytes == stays.budget == 3 * small and not stays.dropped  # nothing goes, nothing is freed


@pytest.mark.parametrize("freed", [{}, {0: 900, 1: 300}], ids=["nothing freed", "router rows freed"])
def test_layers_that_share_a_width_drop_as_the_best_of_all_choices_does(freed: dict[int, int]) -> None:
    """Every width and number of experts for each of two layers, those that go by (price of the drop - price kept)."""
    matrices, drops = model(10, experts=5, forms=GRIDS[:4]), model_drops(10, experts=5)
    facts = model_facts(experts=5)

    def options(layer: int) -> Iterator[tuple[int, int, float, int]]:
        for grid, kept in itertools.product(GRIDS[:4], range(2, 6)):
            for stay in itertools.combinations(range(5), kept):
                inside = [m for m in matrices if m.layer == layer and m.expert in stay]
                lost = sum(drops[layer][e] for e in range(5) if e not in stay)
                taken = sum(m.nbytes(grid) for m in inside) - freed.get(layer, 0) * (5 - kept)
                yield kept, taken, lost + sum(m.nats[grid] for m in inside), grid.bits

    both = list(itertools.product(options(0), options(1)))
    for bits in (2.2, 2.7):
        budget = budget_of(matrices, bits)
        found = allocate(matrices, budget, facts=facts, drops=drops, freed=freed, granularity="layer", gap=0.0)
        best = min(a[2] + b[2] for a, b in both if a[1] + b[1] <= budget)
        assert found.nats == pytest.approx(best, abs=SOLVED)
    for bits in (2.5, 2.7, 2.9, 3.1):  # wide enough for a reader without 1 bit, and with equal numbers
        budget = budget_of(matrices, bits)
        found = allocate(
            matrices, budget, facts=facts, drops=drops, freed=freed, granularity="layer", reader="vllm", gap=0.0
        )
        even = [(a, b) for a, b in both if a[1] + b[1] <= budget and a[0] == b[0] and min(a[3], b[3]) > 1]
        assert found.nats == pytest.approx(min(a[2] + b[2] for a, b in even), abs=SOLVED)
        assert found.proven and found.bound is not None and found.bound <= found.nats + ROUNDING
        assert len({len(found.dropped.get(layer, ())) for layer in range(2)}) == 1


@pytest.mark.parametrize(
    ("reader", "granularity", "widths"),
    [("vllm", "layer", {2, 3, 4, 6, 8}), ("sglang", "layer", {4, 8}), ("transformers", "model", {2, 3, 4, 6, 8})],
)
def test_readers_get_what_they_read(reader: str, granularity: str, widths: set[int]) -> None:
    matrices, drops = model(11), model_drops(11)
    for bits in (3.5, 5.5, 16.0):
        found = allocate(matrices, budget_of(matrices, bits), facts=model_facts(), drops=drops,
                         granularity=granularity, reader=reader)  # type: ignore[arg-type]  # fmt: skip
        for layer in range(2):
            own = {found.forms[m.name] for m in matrices if m.layer == layer and m.name in found.forms}
            assert len(own) == 1 and all(form is not None and form.bits in widths for form in own)
        assert len({len(found.dropped.get(layer, ())) for layer in range(2)}) == 1
    for finer in ("role", "expert", *(("layer",) if granularity == "model" else ())):
        with pytest.raises(UsageError, match=f"--granularity {granularity}"):
            allocate(matrices, 10**9, granularity=finer, reader=reader)  # type: ignore[arg-type]


def test_unreadable_widths_unknown_readers_and_granularities_are_refused() -> None:
    narrow = model(12, forms=GRIDS[:1])
    with pytest.raises(PlanError, match="can be read by vllm"):
        allocate(narrow, 10**9, granularity="layer", reader="vllm")
    for wrong in ({"reader": "llamacpp"}, {"granularity": "roles"}):
        with pytest.raises(MoezipError, match="unknown"):
            allocate(narrow, 10**9, **wrong)  # type: ignore[arg-type]


# -- PMQ ----------------------------------------------------------------------------------------------------


def pmq_instance(rng: np.random.Generator, experts: int = 8) -> np.ndarray:
    """[E, 3] costs of experts that differ in use and in how well they round; losses shrink about twofold per bit."""
    counts = np.round(rng.dirichlet(np.full(experts, 10.0)) * 1e5)
    gates = counts * 0.5 * np.exp(0.1 * rng.normal(size=experts))
    losses = (counts / 1e5 * np.exp(0.5 * rng.normal(size=experts)))[:, None] * np.array([1.0, 0.5, 0.22])
    return costs(counts, gates, losses, PmqParams("code"))


def test_pmq_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    choices = np.array(list(itertools.product((1, 2, 3), repeat=8)))
    legal = (choices == 2).any(1) & (choices == 3).any(1)
    for budget in range(11, 25):
        for cost in (pmq_instance(rng), rng.random((8, 3))):  # the second: more bits may even cost more
            found = pmq(cost, budget)
            assert sum(found) <= budget and {2, 3} <= set(found)
            totals = cost[np.arange(8), choices - 1].sum(1)
            best = totals[legal & (choices.sum(1) <= budget)].min()
            assert cost[np.arange(8), np.array(found) - 1].sum() == pytest.approx(best, abs=ROUNDING)


def test_pmq_with_all_the_bits_there_are_only_keeps_the_2_that_it_must() -> None:
    cost = pmq_instance(np.random.default_rng(1))
    found = pmq(cost, 8 * 3)
    assert Counter(found) == {3: 7, 2: 1}
    assert found.index(2) == int((cost[:, 1] - cost[:, 2]).argmin())  # where the third bit is worth least


def test_pmq_shares_bits_as_the_authors_tables_do() -> None:
    """For Mixtral: 12 bits 1,1,1,1,1,2,2,3; 16 bits 1,1,1,2,2,3,3,3 in 30 of 32 layers; 20 bits 1,2,2,3,3,3,3,3."""
    rng = np.random.default_rng(2)
    for budget, usual in ((12, "11111223"), (16, "11122333"), (20, "12233333")):
        found = Counter("".join(map(str, sorted(pmq(pmq_instance(rng), budget)))) for _ in range(32))
        assert found.most_common(1)[0][0] == usual


def test_pmq_costs_by_hand() -> None:
    """n 1, 3: shares 1/4, 3/4. w 1, 1: 1/2 each. eps of the first at 1 bit 8, the largest: 1, and 4: 1/2, 2: 1/4.

    paper (1, 1, 2): first 1/4 * 1/2 * (1, 1/4, 1/16); second, eps 4, 2, 1 = 1/2, 1/4, 1/8: 3/8 * (1/4, 1/16, 1/64).
    Largest 1/8, so the first's row is 1, 1/4, 1/16, the second's 3/4, 3/16, 3/64.
    code (1, 1.5, 1): w drops out again: first 1/4 * (1, 1/2, 1/4), second 3/4 * (1/2, 1/4, 1/8); largest 3/8.
    """
    inputs = np.array([1.0, 3.0]), np.array([1.0, 1.0]), np.array([[8.0, 4.0, 2.0], [4.0, 2.0, 1.0]])
    paper = [[1, 1 / 4, 1 / 16], [3 / 4, 3 / 16, 3 / 64]]
    code = [[2 / 3, 1 / 3, 1 / 6], [1, 1 / 2, 1 / 4]]
    np.testing.assert_allclose(costs(*inputs, PmqParams()), paper, rtol=ROUNDING)
    np.testing.assert_allclose(costs(*inputs, PmqParams("code")), code, rtol=ROUNDING)
    assert PmqParams().told == ("exponents 1, 1, 2 of access, gate weight and loss (paper 1, 1, 2; code 1, 1.5, 1)")
    own = PmqParams("code", alpha=0.0, gamma=2.0)
    assert own.powers == (0.0, 1.5, 2.0)
    np.testing.assert_allclose(costs(*inputs, own)[1], [1 / 4, 1 / 16, 1 / 64], rtol=ROUNDING)


def test_pmq_ties_take_fewer_bits_and_the_first_experts() -> None:
    cost = np.zeros((4, 3))  # no token reached any
    assert pmq(cost, 12) == (3, 2, 1, 1)
    assert pmq(costs(np.zeros(4), np.zeros(4), np.zeros((4, 3)), PmqParams()), 12) == (3, 2, 1, 1)


@pytest.mark.parametrize(("experts", "bits", "expected"), [(8, 1.5, 12), (8, 2.5, 20), (10, 2.45, 25), (8, 3, 24)])
def test_pmq_budget_is_rounded_half_up(experts: int, bits: float, expected: int) -> None:
    assert code_bits(experts, bits) == expected


def test_pmq_refuses_what_it_cannot_do() -> None:
    for experts, bits in ((8, 1.3), (8, 3.5), (1, 2.0)):
        with pytest.raises(PlanError, match="pmq cannot share"):
            code_bits(experts, bits)
    with pytest.raises(PlanError, match="cannot hold"):
        pmq(np.ones((8, 3)), 10)
    with pytest.raises(PlanError, match="access counts"):
        costs(np.array([-1.0, 1.0]), np.ones(2), np.ones((2, 3)), PmqParams())
    with pytest.raises(PlanError, match="reads"):
        costs(np.ones(2), np.ones(3), np.ones((2, 3)), PmqParams())
    with pytest.raises(UsageError, match="unknown set of exponents"):
        PmqParams("papers")
    with pytest.raises(UsageError, match="alpha"):
        PmqParams(alpha=-2.0)


def test_pmq_bits_become_an_allocation() -> None:
    matrices = model(13, layers=1, experts=2)
    found = assigned(matrices, {(0, 0): 3, (0, 1): 1}, {grid.bits: grid for grid in GRIDS}, "pmq")
    assert {name: form.bits for name, form in found.packing.items()} == {
        f"0.{e}.{kind}": bits for e, bits in ((0, 3), (1, 1)) for kind in ("gate", "up", "down")
    }
    assert found.bytes == bytes_of(matrices, found) and found.nats == pytest.approx(nats_of(matrices, found))
    with pytest.raises(PlanError, match="no width"):
        assigned(matrices, {(0, 0): 3}, {3: GRIDS[2]}, "pmq")


# -- QuantMoE-Bench -----------------------------------------------------------------------------------------


def test_outlier_score_by_hand() -> None:
    """Column maxima 4, 2, 0, 2: largest 4 over mean 2."""
    weight = torch.tensor([[1.0, -2.0, 0.0, 1.0], [-4.0, 0.5, 0.0, 2.0]])
    assert outlier_score(weight) == 2.0
    assert outlier_score(torch.zeros(2, 3)) == 1.0


def test_block_importance_by_hand() -> None:
    """Cosines 1 (same direction), 0 (right angle), -1, and 1 for the token that is zero: mean 1/4."""
    inputs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    outputs = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 0.0]])
    assert block_importance(inputs, outputs) == pytest.approx(3 / 4, abs=ROUNDING)


def test_scores_widen_the_highest_first() -> None:
    """Six matrices of one size. Between 2 and 3 bits there is room for three steps: the two highest take them, the next
    two have one score and room for one, so neither widens."""
    matrices = model(14, layers=1, experts=2)
    scores = dict(zip((m.name for m in matrices), (1.0, 5.0, 3.0, 9.0, 3.0, 2.0)))
    two, three = (matrices[0].nbytes(grid) for grid in GRIDS[1:3])
    found = by_score(matrices, scores, 6 * two + 3 * (three - two), GRIDS, "outlier")
    assert {name for name, grid in found.packing.items() if grid.bits == 3} == {"0.0.up", "0.1.gate"}
    assert {grid.bits for grid in found.packing.values()} == {2, 3}
    assert found.bytes == bytes_of(matrices, found) == 4 * two + 2 * three
    assert found.answered == "outlier" and found.nats == pytest.approx(nats_of(matrices, found))
    exact = by_score(matrices, scores, 6 * three, GRIDS, "outlier")
    assert {grid.bits for grid in exact.packing.values()} == {3}
    widest = by_score(matrices, scores, 10**9, GRIDS, "outlier")
    assert {grid.bits for grid in widest.packing.values()} == {8}
    with pytest.raises(BudgetError, match="smallest choice"):
        by_score(matrices, scores, 10, GRIDS, "outlier")
    with pytest.raises(PlanError, match="no score"):
        by_score(matrices, {"0.0.up": 1.0}, 10**9, GRIDS, "outlier")
    with pytest.raises(PlanError, match="no numbers"):
        by_score(matrices, {**scores, "0.0.up": math.nan}, 10**9, GRIDS, "outlier")


# -- for people ---------------------------------------------------------------------------------------------


def test_table_of_widths() -> None:
    matrices = model(15, experts=3)
    forms: dict[str, Form] = {m.name: GRIDS[1] for m in matrices if (m.layer, m.expert) != (1, 2)}
    forms |= {f"0.0.{kind}": None for kind in ("gate", "up", "down")}
    found = Allocation(forms, 0, 0, 1, "cbc", {1: (2,)}, 0.5, 0.4, "it stopped")
    table = width_table(matrices, found)
    # 2 bits in groups of 32 with their scales (16 bits) and zeros (2 bits, packed), and the shape (16 bytes)
    two = GRIDS[1].bits_per_weight(WIDTH, HIDDEN) * 2 / 3 + GRIDS[1].bits_per_weight(HIDDEN, WIDTH) / 3
    assert table.counted == "experts"
    assert table.head == ("layer", "dropped", "2", "16", "bits per weight")
    assert table.rows == (
        ("0", "0", "2", "1", f"{(16 + 2 * two) / 3:.3f}"),
        ("1", "1", "2", "", f"{2 * two / 3:.3f}"),
    )
    forms["0.1.down"] = GRIDS[2]
    mixed = width_table(matrices, replace(found, forms=forms))
    assert mixed.counted == "matrices" and mixed.rows[0][2:5] == ("5", "1", "3")
    assert search_line(found) == (
        "predicted 0.500000 nats per token, at least 0.400000 at this granularity (gap 20.000%), found by CBC; "
        "it stopped"
    )
    assert "CBC and proven the least; it" in search_line(replace(found, proven=True))
    assert search_line(replace(found, nats=None, answered="pmq")) == "chosen by pmq; no price"
    priced = search_line(replace(found, bound=None, answered="pmq"))
    assert priced == "predicted 0.500000 nats per token, chosen by pmq"

"""Alignment: laws first (a planted order is found again, copies merge into themselves), then cases worked by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.decoded import decoded
from moezip.arch.families import identify
from moezip.arch.spec import LayerFacts
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.moments import ExpertInputs
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import UsageError
from moezip.merge import align
from moezip.merge.layer import MergeLayer, averages
from moezip.merge.params import MergeParams
from moezip.pipeline.merge_estimate import align_bytes, align_seconds
from moezip.plan.merged import average
from tests.copies import copies, reordered, shuffled, with_experts
from tests.test_laws import REORDERED, largest_difference, plain_rows, streamed_logits

Tiny = Callable[..., Path]

# One of each kind of layout: one tensor per matrix; all experts in one, [out, in]; the same [in, out], gate and up in
# turns, biased; a router with groups.
KINDS = ("qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3")
kinds = pytest.mark.parametrize("name", KINDS)
# A weighted mean of up to 8 equal float32 values: its weights add to 1 but for a unit in the last place each.
AVERAGED = 2e-6


def layer_of(view: Any, groups: Any, **more: Any) -> MergeLayer:
    entry = identify(view.config)
    return MergeLayer(view, entry, entry.layer_facts(view.config)[-1], tuple(groups), {}, **more)


def seen_by(view: Any, layer: MergeLayer, seed: int = 0, tokens: int = 512) -> MergeLayer:
    """The layer with random inputs, every one routed to two experts in turn, and its loaded module."""
    stream = Stream(view, experts_implementation="eager", dtype=torch.float32)
    stream.load_layer(layer.facts.layer)
    block: Any = stream.layers[layer.facts.layer].get_submodule(layer.architecture.block)
    hidden = HiddenStates((1, tokens, layer.facts.hidden), torch.float32)
    hidden.write(0, 1, torch.randn(1, tokens, layer.facts.hidden, generator=torch.Generator().manual_seed(seed)))
    first = np.arange(tokens, dtype=np.int32) % layer.facts.experts
    ids = np.stack([first, (first + 1) % layer.facts.experts], 1)
    inputs = ExpertInputs(hidden, ids, np.full(ids.shape, 0.5, np.float32))
    return replace(layer, inputs=inputs, module=block.get_submodule(layer.architecture.experts_module))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


# -- laws ---------------------------------------------------------------------------------------------------


@kinds
def test_the_order_of_neurons_does_not_matter(name: str, tiny: Tiny) -> None:
    source, rows = Checkpoint.open(tiny(name)), plain_rows()
    facts = identify(source.config).layer_facts(source.config)
    own = {f.layer: [(e, shuffled(f.width, e)) for e in range(f.experts)] for f in facts}
    got = streamed_logits(with_experts(source, own), rows)
    assert 0 < largest_difference(streamed_logits(source, rows), got, rows) < REORDERED


@kinds
@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("reference", ["dominant", "first"])
def test_a_planted_order_is_found_again(name: str, by: str, reference: str, tiny: Tiny) -> None:
    view = copies(Checkpoint.open(tiny(name)))
    layer = layer_of(view, [(2, 0, 5), (4, 6, 7), (1,), (3,)])
    layer = seen_by(view, layer) if by == "activations" else layer
    found = align.orders(layer, MergeParams(align=by, reference=reference))
    # expert e is expert 0 in the order planted[e], so expert 0's neuron j is expert e's neuron inverse(planted[e])[j]
    number, width = layer.facts.layer, layer.facts.width
    planted = {e: shuffled(width, 100 * number + e) for e in range(8)} | {0: tuple(range(width))}
    if reference == "first":
        assert found == {e: inverse(planted[e]) for e in (2, 5, 4, 6, 7)}
        return
    # neuron j of dominant expert d is expert 0's planted[d][j]
    wanted = {e: tuple(inverse(planted[e])[n] for n in planted[d]) for d, e in ((2, 0), (2, 5), (4, 6), (4, 7))}
    assert found == wanted


@kinds
@pytest.mark.parametrize("reference", ["dominant", "first"])
def test_merged_copies_are_the_copy(name: str, reference: str, tiny: Tiny) -> None:
    view = copies(Checkpoint.open(tiny(name)))
    groups = [(3, 0, 1), (2,), (6, 5, 4, 7)]
    layer = layer_of(view, groups)
    found = align.orders(layer, MergeParams(reference=reference))
    picks = averages(layer.groups, np.arange(1.0, 9), found)
    for pick in picks:
        like = 0 if reference == "first" and pick.mixed else pick.kept
        for role in layer.roles:
            merged = average(view, layer.architecture, layer.facts.layer, pick, role)
            assert torch.allclose(merged, layer.matrix(like, role), rtol=0, atol=AVERAGED), (pick.members, role)
    blind = averages(layer.groups, np.arange(1.0, 9), {})  # and not so without
    merged = average(view, layer.architecture, layer.facts.layer, blind[0], "gate")
    assert float((merged - layer.matrix(3, "gate")).abs().max()) > 0.1


def test_noise_up_to_a_tenth_of_the_weights_hides_no_order() -> None:
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 96, generator=chance)
    order = shuffled(64, 1)
    noisy = rows[list(order)] + 0.1 * torch.randn(64, 96, generator=chance)
    assert align.matched(rows, noisy) == inverse(order)


def test_no_other_order_is_nearer() -> None:
    chance = torch.Generator().manual_seed(3)
    one, other = torch.randn(6, 4, generator=chance), torch.randn(6, 4, generator=chance)
    distances = {p: float((one - other[list(p)]).square().sum()) for p in permutations(range(6))}
    assert align.matched(one, other) == min(distances, key=distances.__getitem__)


def test_no_other_order_brings_the_matrices_nearer() -> None:
    """The order that ``orders`` finds, by trying all of them: the summed squared distance of all three matrices."""
    chance, width, hidden = torch.Generator().manual_seed(5), 5, 3
    experts: dict[int, dict[str, list[Any]]] = {
        e: {
            role: torch.randn((hidden, width) if role == "down" else (width, hidden), generator=chance).tolist()
            for role in ("gate", "up", "down")
        }
        for e in (0, 1)
    }
    layer: Any = Plain(experts, [(0, 1)], width)

    def distance(order: tuple[int, ...]) -> float:
        return sum(
            float((layer.matrix(0, role) - reordered(layer.matrix(1, role), role, order)).square().sum())
            for role in layer.roles
        )

    assert align.orders(layer, MergeParams()) == {1: min(permutations(range(width)), key=distance)}


def test_threads_change_nothing(tiny: Tiny) -> None:
    layer = layer_of(decoded(Checkpoint.open(tiny("qwen3_moe"))), [(0, 1, 2, 3), (7, 6, 5, 4)])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(align.orders(layer, MergeParams()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] and len(found[0]) == 6


# -- wide experts -------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything wider than 4 neurons counts as wide."""
    monkeypatch.setattr(align, "WIDE", 4)
    monkeypatch.setattr(align, "PART", 4)


@kinds
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("projection", [8, 64, 4096])
def test_a_planted_order_is_found_in_parts(name: str, projection: int, tiny: Tiny) -> None:
    layer = layer_of(copies(Checkpoint.open(tiny(name))), [(0, 1, 2, 3)])
    found = align.orders(layer, MergeParams(projection=projection))
    width = layer.facts.width
    assert found == {e: inverse(shuffled(width, 100 * layer.facts.layer + e)) for e in (1, 2, 3)}


def test_parts_hold_every_neuron_once() -> None:
    chance = torch.Generator().manual_seed(0)
    one, other = torch.randn(23, 5, generator=chance), torch.randn(23, 5, generator=chance)
    parts = list(align.cut(one, other, 4))
    assert [len(a) for a, _ in parts] == [len(b) for _, b in parts] and max(len(a) for a, _ in parts) <= 4
    for side in zip(*parts, strict=True):
        assert sorted(torch.cat(side).tolist()) == list(range(23))


def test_parts_cost_little_of_the_likeness(monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 neurons around 16 centres, as a member's would be that learned the same features: in parts of 32 the sum of
    # inner products is at least 9 tenths of the largest there is, where any order whatever has about none.
    chance = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 48, generator=chance)
    one, other = (centres.repeat(16, 1) + 0.5 * torch.randn(256, 48, generator=chance) for _ in range(2))
    other = other[list(shuffled(256, 1))]

    def likeness() -> float:
        return float((one * other[list(align.matched(one, other))]).sum())

    best = likeness()
    monkeypatch.setattr(align, "WIDE", 32)
    monkeypatch.setattr(align, "PART", 32)
    assert 0.9 * best < likeness() < best
    assert abs(float((one * other).sum())) < 0.1 * best


def test_equal_neurons_can_be_cut_apart() -> None:
    for same in (torch.ones(9, 3), torch.zeros(9, 3)):
        parts = [left for left, _ in align.cut(same, same, 2)]
        assert sorted(torch.cat(parts).tolist()) == list(range(9)) and max(map(len, parts)) == 2


def test_projections_keep_inner_products() -> None:
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 96, generator=chance)
    exact = rows @ rows.T
    # as many projections as entries: only signs change
    whole = align.fold(rows, 96, 0)
    assert torch.allclose(whole @ whole.T, exact, atol=1e-4)
    # a third as many: right on average. Of one sketch the variance is below (|x|^2 |y|^2 + (x y)^2) / 32, so the
    # mean of 400 is off by less than 5 standard deviations of sqrt(2 / 32 / 400) |x| |y|.
    mean = torch.stack([f @ f.T for f in (align.fold(rows, 32, salt) for salt in range(400))]).mean(0)
    norms = rows.norm(dim=1)
    assert float(((mean - exact).abs() / torch.outer(norms, norms)).max()) < 5 * (2 / 32 / 400) ** 0.5


# -- by hand ------------------------------------------------------------------------------------------------


class Plain:
    """A layer whose matrices are given: {expert: {role: rows}}."""

    def __init__(self, experts: dict[int, dict[str, list[Any]]], groups: Any, width: int):
        self._experts, self.groups, self.facts = experts, groups, SimpleNamespace(width=width)
        self.roles = tuple(experts[0])

    def matrix(self, expert: int, role: str) -> torch.Tensor:
        return torch.tensor(self._experts[expert][role], dtype=torch.float32)


def test_gate_up_and_down_decide_together() -> None:
    # P = A_ref A^T + B_ref B^T + D_ref^T D with F = 2, D = 1. Gates alone: [[2], [1]] [3 1] = [[6 2] [3 1]], where
    # keeping (6 + 1) beats swapping (2 + 3). Ups add [[0], [1]] [2 0] = [[0 0] [2 0]]: 6 + 1 against 2 + 5, a tie.
    # Downs add [[1], [0]] [0 1] = [[0 1] [0 0]]: 7 against 3 + 5 = 8, so they are swapped.
    experts: dict[int, dict[str, list[Any]]] = {
        0: {"gate": [[2], [1]], "up": [[0], [1]], "down": [[1, 0]]},
        1: {"gate": [[3], [1]], "up": [[2], [0]], "down": [[0, 1]]},
    }
    layer: Any = Plain(experts, [(0, 1)], 2)
    assert align.orders(layer, MergeParams()) == {1: (1, 0)}
    experts[1]["down"] = [[1, 0]]  # then downs add [[1 0] [0 0]]: 8 against 7
    assert align.orders(layer, MergeParams()) == {}


def test_biases_take_part() -> None:
    # equal but for the gate's bias: P = [[0 1] [0 0]] from [[1], [0]] [0 1]
    experts: dict[int, dict[str, list[Any]]] = {
        e: {"gate": [[0], [0]], "up": [[0], [0]], "down": [[0, 0]], "gate_bias": bias, "up_bias": [0, 0],
            "down_bias": [5]}
        for e, bias in ((0, [1, 0]), (1, [0, 1]))
    }  # fmt: skip
    layer: Any = Plain(experts, [(0, 1)], 2)
    assert align.orders(layer, MergeParams()) == {1: (1, 0)}


def test_who_is_put_in_whose_order() -> None:
    groups = [(2, 0, 3), (1,), (5, 4)]
    assert list(align.reference_pairs(groups, "dominant")) == [(2, 0), (2, 3), (5, 4)]
    assert list(align.reference_pairs(groups, "first")) == [(0, 2), (0, 3), (0, 5), (0, 4)]


def test_standardised_rows_multiply_to_correlations() -> None:
    chance = torch.Generator().manual_seed(0)
    one, other = (torch.randn(40, 6, generator=chance) * 3 + 7 for _ in range(2))  # far from 0 on average
    wanted = np.corrcoef(one.numpy(), other.numpy(), rowvar=False)[:6, 6:]
    got = align._standardised(one) @ align._standardised(other).T
    assert np.allclose(got.numpy(), wanted, atol=1e-5)  # float32 sums of 40 terms
    assert not align._standardised(torch.ones(40, 1)).any()  # one that never changes goes with none


def test_activations_correlate_whatever_their_size(tiny: Tiny) -> None:
    # A member whose neurons are the reference's in another order, each up row times 1 to 16 and each down column as
    # much smaller: the same function, whose activations correlate by 1 with those that they belong to.
    source = decoded(Checkpoint.open(tiny("qwen3_moe")))
    layer = seen_by(source, layer_of(source, [(0, 1)]))
    order = shuffled(16, 1)
    own = layer.matrix

    def matrix(expert: int, role: Any) -> torch.Tensor:
        value = own(0, role)
        if expert == 0:
            return value
        if role == "up":
            value = value * torch.arange(1.0, 17)[:, None]
        return value[:, list(order)] if role == "down" else value[list(order)]

    class Scaled(MergeLayer):
        def matrix(self, expert: int, role: Any) -> torch.Tensor:
            return matrix(expert, role)

    scaled = Scaled(source, layer.architecture, layer.facts, layer.groups, {}, layer.inputs, layer.module)
    assert align.orders(scaled, MergeParams(align="activations")) == {1: inverse(order)}


def test_experts_that_saw_nothing_are_aligned_on_other_tokens(tiny: Tiny) -> None:
    view = copies(Checkpoint.open(tiny("qwen3_moe")))
    layer = seen_by(view, layer_of(view, [(0, 1, 2)]))
    assert layer.inputs is not None
    ids = np.full_like(layer.inputs.ids, 5)  # all tokens to expert 5
    layer.inputs = ExpertInputs(layer.inputs.hidden, ids, layer.inputs.gates)
    assert not len(layer.inputs.tokens(1))
    found = align.orders(layer, MergeParams(align="activations"))
    assert found == {e: inverse(shuffled(16, 100 * layer.facts.layer + e)) for e in (1, 2)}


def test_none_is_none_and_nonsense_is_refused(tiny: Tiny) -> None:
    layer = layer_of(decoded(Checkpoint.open(tiny("qwen3_moe"))), [(0, 1)])
    assert align.orders(layer, MergeParams(align="none")) == {}
    with pytest.raises(UsageError, match="projection"):
        MergeParams(projection=0)


def test_the_cost_of_wide_experts_is_foretold() -> None:
    """Per layer: members x (products of rows + an assignment that grows with the cube), in parts above the limit."""
    narrow = LayerFacts(layer=0, experts=128, top_k=8, hidden=2048, width=768)
    wide = replace(narrow, experts=8, top_k=2, hidden=4096, width=14336)
    rate = 1e12
    one = align_seconds(wide, 7, MergeParams(), rate)
    assert align_seconds(wide, 4, MergeParams(), rate) == pytest.approx(4 * one)
    assert align_seconds(narrow, 128, MergeParams(), rate) == 0
    assert align_seconds(narrow, 127, MergeParams(), rate) < one
    # without parts the assignment alone would take (14336 / 2048)^3 times a quarter of a second
    assert one < 0.24 * 7**3 / (os.cpu_count() or 1)
    # and on whole rows in place of projections the products would be six times as many
    assert align_seconds(wide, 7, MergeParams(projection=3 * 4096), rate) > one
    assert align_bytes(wide, MergeParams()) < 4 * 14336 * 14336 * (
        os.cpu_count() or 1
    )  # no float32 matrix of all pairs

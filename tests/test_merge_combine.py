"""Merged experts, router rows and prices: laws first (nothing beats the least error, copies stay), then by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.decoded import decoded
from moezip.calibrate.experts import expert_output
from moezip.calibrate.statistics import Domain, Statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError, UsageError
from moezip.formats.factors import LEFT, RIGHT
from moezip.merge.combine import combined
from moezip.merge.layer import Merge, MergeLayer, averages
from moezip.merge.least_squares import merged_expert, towards
from moezip.merge.params import MergeParams, looks
from moezip.merge.price import Change, changes_of, nats, outputs, priced
from moezip.merge.router import fitted, fitted_rows
from moezip.merge.selection import chosen_neurons, pursuit
from moezip.merge.sub_moe import SubMoeParams
from moezip.merge.truncate import truncated, truncated_expert
from moezip.pipeline.merge import mixed_scored
from moezip.plan.merged import factor_value
from moezip.plan.plan import Part, Pick
from tests.command import Cli
from tests.test_merge_align import KINDS, layer_of, seen_by

Tiny = Callable[..., Path]
kinds = pytest.mark.parametrize("name", KINDS)
GROUP = (1, 0, 3)
# float32 sums over a few hundred tokens against the same in float64.
ROUNDED = 1e-4
# A ridge that holds nothing but what no token speaks of.
SLIGHT = 1e-6


def looked_at(folder: Path, groups: Any = (GROUP, (2,)), *, tokens: int = 512) -> MergeLayer:
    """The last layer of a tiny model with random inputs, those of one half space with gates five times larger."""
    view: Any = decoded(Checkpoint.open(folder))
    layer = seen_by(view, layer_of(view, groups), tokens=tokens)
    assert layer.inputs is not None
    first = layer.inputs.hidden.read(0, 1)[0, :, 0].numpy()
    gates = np.where(first[:, None] > 0, np.float32(0.75), np.float32(0.15)).repeat(2, 1)
    return replace(layer, inputs=replace(layer.inputs, gates=gates), stats={"counts": np.ones(layer.facts.experts)})


def pick_of_group() -> Pick:
    [pick] = averages((GROUP,), np.arange(8.0) + 1, {})
    return pick


def average_expert(layer: MergeLayer, pick: Pick) -> dict[Any, torch.Tensor]:
    shares = torch.tensor([part.weight for part in pick.parts])
    return {
        role: torch.tensordot(shares, torch.stack([layer.matrix(each, role) for each in pick.members]), 1)
        for role in layer.roles
    }


def objective(layer: MergeLayer, pick: Pick, expert: dict[Any, torch.Tensor]) -> float:
    """sum_i sum_t g^2 |f_M - f_i|^2, the members' outputs by the model's own code, summed in float64."""
    total = 0.0
    for each in pick.members:
        x, gates = layer.inputs.tokens(each), layer.inputs.weights(each).double()  # type: ignore[union-attr]
        error = (outputs(layer, x, expert) - expert_output(layer.module, each, x)).double()
        total += float(gates.square() @ error.square().sum(1))
    return total


# -- least error ------------------------------------------------------------------------------------------------


@kinds
def test_the_least_error_is_below_that_of_the_average(name: str, tiny: Tiny) -> None:
    layer, pick = looked_at(tiny(name, dtype="float32")), pick_of_group()
    average = objective(layer, pick, average_expert(layer, pick))
    for solve in (merged_expert, chosen_neurons):
        found = solve(layer, pick, 0.01)
        assert found is not None and set(found) == set(layer.roles)
        # experts of random weights have little in common that one could have in their place
        assert objective(layer, pick, found) < 0.96 * average


@kinds
@pytest.mark.parametrize("solve", [merged_expert, chosen_neurons])
def test_no_other_down_projection_is_better(name: str, solve: Any, tiny: Tiny) -> None:
    layer, pick = looked_at(tiny(name, dtype="float32")), pick_of_group()
    found = solve(layer, pick, SLIGHT)
    least = objective(layer, pick, found)
    generator = torch.Generator().manual_seed(1)
    for role in ("down", "down_bias"):
        for _ in range(5 if role in found else 0):
            step = 0.01 * found[role].std() * torch.randn(found[role].shape, generator=generator)
            for sign in (1, -1):
                # with a linear term left, one of the two directions would go down
                assert objective(layer, pick, {**found, role: found[role] + sign * step}) > least


@kinds
@pytest.mark.parametrize("solve", [merged_expert, chosen_neurons, truncated_expert])
def test_an_expert_merged_with_itself_computes_the_same(name: str, solve: Any, tiny: Tiny) -> None:
    layer = looked_at(tiny(name, dtype="float32"))
    twice = Pick((Part(1, 0.25), Part(1, 0.75)))
    found = solve(layer, twice, SLIGHT if solve is not truncated_expert else 1.0)
    x = layer.inputs.sample(64)  # type: ignore[union-attr]
    wanted = expert_output(layer.module, 1, x)
    assert float((outputs(layer, x, found) - wanted).norm() / wanted.norm()) < 10 * ROUNDED


def test_one_matrix_in_double_precision(tiny: Tiny) -> None:
    """gate is (sum A_i S_i + r A_avg) (sum S_i + r I)^-1, with r = ridge x mean diagonal x (1 + D / tokens)."""
    layer, pick = looked_at(tiny("qwen3_moe", dtype="float32")), pick_of_group()
    moment, target, count = torch.zeros(32, 32).double(), torch.zeros(16, 32).double(), 0
    for each in pick.members:
        x = layer.inputs.tokens(each).double()  # type: ignore[union-attr]
        own = x.T @ (layer.inputs.weights(each).double().square()[:, None] * x)  # type: ignore[union-attr]
        moment, target, count = moment + own, target + layer.matrix(each, "gate").double() @ own, count + len(x)
    ridge = 0.01 * moment.diagonal().mean() * (1 + 32 / count)
    start = average_expert(layer, pick)["gate"].double()
    wanted = (target + ridge * start) @ torch.linalg.inv(moment + ridge * torch.eye(32))
    found = merged_expert(layer, pick, 0.01)
    assert found is not None
    assert torch.allclose(found["gate"].double(), wanted, rtol=0, atol=ROUNDED * float(wanted.abs().max()))


def test_towards_by_hand() -> None:
    """One input, one output, one token x = 2, y = 6, start 1: r = 0.5 * 4 * (1 + 1/1) = 4; (12 + 4) / (4 + 4) = 2."""
    found = towards(torch.ones(1, 1), torch.tensor([[12.0]]), torch.tensor([[4.0]]), 1, 0.5)
    assert found.item() == pytest.approx(2)
    # of many tokens of the same mean r is 2 per token: (12 n + 2 n) / (4 n + 2 n)
    many = towards(torch.ones(1, 1), torch.tensor([[12e6]]), torch.tensor([[4e6]]), 10**6, 0.5)
    assert many.item() == pytest.approx(14 / 6, rel=1e-5)


def test_inputs_that_were_never_seen_leave_the_average() -> None:
    start = torch.randn(3, 2)
    found = towards(start, torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 9, 0.01)
    assert torch.equal(found[:, 1], start[:, 1]) and not torch.equal(found[:, 0], start[:, 0])
    assert torch.equal(towards(start, torch.zeros(3, 2), torch.zeros(2, 2), 9, 0.01), start)


def test_groups_without_tokens_stay_averages(tiny: Tiny) -> None:
    layer = looked_at(tiny("qwen3_moe", dtype="float32"), ((0, 1), (2, 3), (4,), (5,)))
    assert layer.inputs is not None
    ids = layer.inputs.ids.copy()
    ids[np.isin(ids, (2, 3))] = 4
    layer.inputs = replace(layer.inputs, ids=ids)
    for combine in ("least-squares", "neurons"):
        found = Merge(averages(layer.groups, layer.usage(combine), {}), "kept")
        notes = combined(layer, MergeParams(combine=combine), found)
        assert {name.split(".")[3] for name in found.values} == {"0"} and "1 group" in notes[0]


def test_what_is_not_finite_is_refused(tiny: Tiny) -> None:
    layer = looked_at(tiny("qwen3_moe", dtype="float32"))
    layer.inputs.hidden.write(0, 1, torch.full((1, 512, 32), float("inf")))  # type: ignore[union-attr]
    for solve in (merged_expert, chosen_neurons):
        with pytest.raises(MoezipError, match="not finite"):
            solve(layer, pick_of_group(), 0.01)


def test_averages_solve_nothing(tiny: Tiny) -> None:
    layer = looked_at(tiny("qwen3_moe", dtype="float32"))
    found = Merge(averages(layer.groups, layer.usage("mean"), {}), "kept")
    assert combined(layer, MergeParams(combine="mean"), found) == () and not found.values
    assert not looks(MergeParams()) and looks(MergeParams(combine="neurons")) and looks(SubMoeParams(rank=0.5))
    with pytest.raises(UsageError, match="cuts averages"):
        SubMoeParams(rank=0.5, combine="neurons")


# -- choice of neurons ------------------------------------------------------------------------------------------


def problem(seed: int, inputs: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(40, size, generator=generator, dtype=torch.float64) for size in (inputs, 3))
    return x.T @ x, (y + x[:, :3]).T @ x


def explained(moment: torch.Tensor, target: torch.Tensor, some: list[int]) -> float:
    return float(torch.trace(target[:, some] @ torch.linalg.inv(moment[some][:, some]) @ target[:, some].T))


@pytest.mark.parametrize("seed", range(5))
def test_every_step_takes_the_best_of_all_left(seed: int) -> None:
    moment, target = problem(seed)
    chosen: list[int] = []
    for count in range(1, 6):
        gains = {j: explained(moment, target, [*chosen, j]) for j in range(7) if j not in chosen}
        chosen.append(max(gains, key=lambda j: gains[j]))
        assert pursuit(moment, target, count).tolist() == sorted(chosen)


def test_of_unrelated_inputs_the_best_set_is_found() -> None:
    moment, target = problem(0)
    moment = torch.diag(moment.diagonal())
    best = max(combinations(range(7), 3), key=lambda some: explained(moment, target, list(some)))
    assert pursuit(moment, target, 3).tolist() == list(best)


def test_a_constant_is_taken_besides() -> None:
    moment, target = problem(1)
    found = pursuit(moment, target, 2, constant=True).tolist()
    gains = {pair: explained(moment, target, [*pair, 6]) for pair in combinations(range(6), 2)}
    assert found[-1] == 6 and len(found) == 3
    first = max(range(6), key=lambda j: explained(moment, target, [j, 6]))
    assert first in found and gains[found[0], found[1]] == max(v for pair, v in gains.items() if first in pair)


def test_the_neurons_are_the_members_own(tiny: Tiny) -> None:
    layer = looked_at(tiny("gpt_oss", dtype="float32"))
    found = chosen_neurons(layer, pick_of_group(), 0.01)
    assert found is not None
    pairs: tuple[tuple[Any, Any], ...] = (("gate", "gate_bias"), ("up", "up_bias"))
    for role, bias in pairs:
        whole = torch.cat([torch.cat([layer.matrix(e, role), layer.matrix(e, bias)[:, None]], 1) for e in GROUP])
        rows = torch.cat([found[role], found[bias][:, None]], 1)
        assert all(bool((whole == row).all(1).any()) for row in rows)


# -- truncation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1.0])
def test_truncation_is_that_of_the_joint_svd(share: float) -> None:
    """methods of the paper step by step: whiten, SVD side by side, cut, undo the whitening, average, multiply."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 12, generator=generator, dtype=torch.float64) for _ in range(3)]
    inputs = [torch.randn(30, 12, generator=generator, dtype=torch.float64) for _ in range(3)]
    moments, phi = [x.T @ x for x in inputs], [0.5, 0.3, 0.2]
    factors = [torch.linalg.cholesky(moment) for moment in moments]
    rank = -int(-share * 8 // 1)
    left, values, right = torch.linalg.svd(torch.cat([w @ s for w, s in zip(weights, factors, strict=True)], 1))
    parts = [right[:rank, 12 * i : 12 * i + 12] @ torch.linalg.inv(s) for i, s in enumerate(factors)]
    mean = sum(share * part for share, part in zip(phi, parts, strict=True))
    wanted = left[:, :rank] @ torch.diag(values[:rank]) @ mean
    average = sum(share * weight for share, weight in zip(phi, weights, strict=True))
    assert isinstance(average, torch.Tensor)
    found = truncated(average, weights, moments, share)
    # two factorisations of matrices of condition 100, in float64
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10) and torch.linalg.matrix_rank(found) == rank
    assert torch.equal(truncated(average, weights, moments, 1.0), average)
    assert torch.equal(truncated(weights[0], weights[:1], moments[:1], 1.0), weights[0])


@kinds
def test_truncated_experts_have_the_rank_asked_for(name: str, tiny: Tiny) -> None:
    layer, pick = looked_at(tiny(name, dtype="float32")), pick_of_group()
    found = truncated_expert(layer, pick, 0.5)
    assert found is not None and set(found) == set(layer.roles)
    average = average_expert(layer, pick)
    for role in ("gate", "up", "down"):
        values = torch.linalg.svdvals(found[role])  # type: ignore[index]
        assert values[7] > 1e-3 * values[0] > 1e3 * values[8]
    if "down_bias" in found:
        assert torch.allclose(found["down_bias"], average["down_bias"])


# -- the router -------------------------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    """Two experts of the same row, biases 0 and -log 2, both chosen: together exp(z) + exp(z) / 2, so z + log 1.5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, 3, generator=generator), torch.ones(200, 1)], 1)
    row = torch.tensor([0.3, -1.0, 0.5, 0.0])
    constant = torch.tensor([0.0, 0.0, 0.0, 1.0])
    rows = torch.stack([row, row - math.log(2) * constant])
    found = fitted_rows(x, rows, ((0, 1),), 2, SLIGHT)
    assert torch.allclose(found[0], row + math.log(1.5) * constant, atol=ROUNDED)
    # with one expert per token the second is never chosen, so the first alone is the score
    alone = fitted_rows(x, rows, ((0, 1),), 1, SLIGHT)
    assert torch.allclose(alone[0], row, atol=ROUNDED)
    # nobody of the group is chosen: its best member says how near it is to that
    other = fitted_rows(x, torch.cat([rows, rows[:1] + 30 * constant]), ((0, 1), (2,)), 1, SLIGHT)
    assert torch.allclose(other[0], row, atol=ROUNDED) and torch.equal(other[1], row + 30 * constant)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_single_experts_keep_their_rows(name: str, tiny: Tiny) -> None:
    layer = looked_at(tiny(name, dtype="bfloat16"), ((1, 0, 3), (2,), (4, 5), (6,), (7,)))
    found = Merge(averages(layer.groups, layer.usage("frequency"), {}), "fitted")
    fitted(layer, MergeParams(router="sum"), found)
    tensors = [layer.source.read(each.template.format(layer=layer.facts.layer)) for each in layer.architecture.router]
    assert len(found.values) == len(tensors)
    for value, whole in zip(found.values.values(), tensors, strict=True):
        assert value.dtype == whole.dtype and value.shape == (5, *whole.shape[1:])
        assert torch.equal(value[[1, 3, 4]], whole[[2, 6, 7]]) and not torch.equal(value[0], whole[1])


def test_fitted_rows_choose_more_like_all_rows_than_the_dominant_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(n, 8, generator=generator) for n in (3000, 12))
    groups = tuple((2 * i, 2 * i + 1) for i in range(6))
    best = (x @ rows.T).topk(2).indices // 2

    def agreement(own: torch.Tensor) -> float:
        return float(((x @ own.T).topk(2).indices[:, :, None] == best[:, None]).any(2).float().mean())

    assert agreement(fitted_rows(x, rows, groups, 2, 0.01)) > agreement(rows[::2]) + 0.02


# -- the price --------------------------------------------------------------------------------------------------


def test_nats_by_hand() -> None:
    """(3 * 1 + 4 * 2 + 5 * 0 + 6 * 1) / (2 * 10)."""
    changes = [Change(0, np.array([1.0, 2.0]), 1.0, 1.0), Change(2, np.array([0.0, 1.0]), 1.0, 1.0)]
    gradients = np.array([[3.0, 4.0], [9.0, 9.0], [5.0, 6.0]])
    assert nats(changes, gradients, 10.0) == pytest.approx(17 / 20)


@kinds
def test_changes_are_those_of_the_outputs(name: str, tiny: Tiny) -> None:
    layer = looked_at(tiny(name, dtype="float32"))
    found = Merge(averages(layer.groups, layer.usage("mean"), {}), "kept")
    changes = {change.expert: change for change in changes_of(layer, found)}
    assert set(changes) == {0, 1, 2, 3} and not changes[2].channels.any()
    total = sum(changes[e].mass * changes[e].channels.sum() for e in GROUP)
    wanted = objective(layer, found.picks[0], average_expert(layer, found.picks[0]))
    assert total == pytest.approx(wanted, rel=ROUNDED)


def test_the_note_and_the_price(tiny: Tiny) -> None:
    layer = looked_at(tiny("qwen3_moe", dtype="float32"), tuple((e,) for e in range(8)))
    layer.stats |= {"down_grad_square": np.ones((8, 32)), "scored": np.asarray(100.0)}
    nothing = Merge(averages(layer.groups, layer.usage("mean"), {}), "kept")
    priced(layer, nothing)
    assert nothing.nats == 0 and "0.0000" in nothing.notes[0]
    layer.groups = (GROUP, (2,), (4,), (5,), (6,), (7,))
    found = Merge(averages(layer.groups, layer.usage("mean"), {}), "kept")
    priced(layer, found)
    # gradients of 1 on every channel: half the sum of the mean squared changes, per scored token
    wanted = sum(change.channels.sum() for change in changes_of(layer, found)) / 200
    assert found.nats == pytest.approx(wanted)
    unseen = Merge(found.picks, "kept")
    priced(replace(layer, inputs=None), unseen)
    assert unseen.nats is None and unseen.notes == ()


def test_factors_are_part_of_the_change(tiny: Tiny) -> None:
    """An expert that stays by itself, but is stored as factors, is changed by what they leave out; others are not."""
    layer = looked_at(tiny("qwen3_moe", dtype="float32"), tuple((e,) for e in range(8)))
    found = Merge(averages(layer.groups, layer.usage("mean"), {}), "kept")
    thin: dict[Any, torch.Tensor] = {}
    for role in layer.roles:
        u, s, v = torch.linalg.svd(layer.matrix(1, role), full_matrices=False)
        left, right = u[:, :4] * s[:4], v[:4]
        thin[role] = left @ right
        for suffix, value in ((LEFT, left), (RIGHT, right)):
            found.values[factor_value(layer.facts.layer, 1, role, suffix)] = value
    changes = {change.expert: change for change in changes_of(layer, found)}
    assert all(not change.channels.any() for expert, change in changes.items() if expert != 1)
    total = changes[1].mass * changes[1].channels.sum()
    assert total == pytest.approx(objective(layer, Pick.keep(1), thin), rel=ROUNDED) and total > 0


def test_scored_tokens_of_a_mixture_by_hand() -> None:
    """Sums are per token: 90 of 100 are scored in the one domain, 30 of 60 in the other, which weighs twice."""
    domains = (Domain("a", (), 100, {}, scored=90), Domain("b", (), 60, {}, scored=30))
    assert mixed_scored(Statistics("", domains), [1.0, 2.0]) == pytest.approx(0.9 + 2 * 0.5)
    assert mixed_scored(Statistics("", domains[:1]), [3.0]) == 90


# -- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("qwen3_moe", ("combine=neurons", "router=sum", "price=true")),
        ("gpt_oss", ("combine=least-squares", "router=sum")),
        ("deepseek_v3", ("combine=neurons", "price=true")),
    ],
)
def test_the_command(name: str, more: tuple[str, ...], tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A tiny model reads tiny text, and learns nothing. " * 60)
    folder, out = tiny(name, dtype="float32"), tmp_path / "out"
    settings = [word for each in more for word in ("--set", each)]
    words = ("--method", "m-smoe", "--keep", 4, "--data", text, "--tokens", 1024, "--seq-len", 64, *settings)
    answer = cli("merge", folder, out, *words, "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert (found["predicted_nats"] is not None) == ("price=true" in more)
    assert any("squared error of the routed outputs" in note for note in found["notes"])
    assert cli("verify", out).code == 0
    # the solved values are in the output itself, so its plan applies again
    assert cli("apply", folder, out / "moezip" / "plan.json", tmp_path / "again").code == 0
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files and all((out / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)

"""Prices of widths: against their definition on whole models, hand-worked numbers, and what a killed pass leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moezip.arch.matrices import expert_matrices
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import expert_output, inner_activation
from moezip.calibrate.gradients import Gradients
from moezip.calibrate.record import BY_NAME
from moezip.calibrate.run import calibrate
from moezip.calibrate.statistics import Domain, Statistics
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError, StatisticsError
from moezip.formats.packed import Codes, Grid, dequantize
from moezip.pipeline import opened
from moezip.pipeline.bits import Job, PriceTable, forget_prices, price_bits
from moezip.pipeline.items import Item, items_of
from moezip.pipeline.quantize import views
from moezip.quantize import local_loss
from moezip.quantize import price as price_of_one
from moezip.quantize.groups import fit
from moezip.quantize.hessian import shrunk
from moezip.quantize.price import Inputs, prices
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as round_to_nearest
from moezip.quantize.solution import Solution
from tests.tiny import token_ids

WIDTHS = (1, 3, 8)
GRIDS = tuple(Grid(bits, 16) for bits in WIDTHS)
# float32 sums over some hundred tokens in another order, squared and weighted.
FLOAT32 = 2e-4
# Concatenated, interleaved and transposed, with biases, a dense layer and shared experts.
SOME = ("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe")


def rows_of(ids: torch.Tensor) -> Rows:
    return Rows(ids, None, ("text",) * len(ids))


def statistics(folder: Path, rows: Rows, work: Path) -> Statistics:
    with Checkpoint.open(folder) as source:
        return calibrate(source, rows, [BY_NAME["counts"]], workdir=work, gradients="data")


def priced(folder: Path, rows: Rows, work: Path, **options: Any) -> PriceTable:
    """All matrices of a checkpoint; ``stats`` and ``resume`` besides the fields of a job."""
    model = opened(str(folder))
    plain, split = views(model)
    items = [item for item in items_of(split, model) if item.shape[1] % 16 == 0]
    stats = options.pop("stats", None) or statistics(folder, rows, work / "backward")
    resume = options.pop("resume", False)
    job = replace(Job(items, GRIDS, "job"), **options)
    return price_bits(Stream(plain, dtype=torch.float32), rows, stats, job, work / "prices", resume=resume)


def rtn(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> Solution:
    return round_to_nearest(weight, hessian, grid, RtnParams())


# -- one matrix ---------------------------------------------------------------------------------------------


def test_a_price_by_hand() -> None:
    # one bit, one group: the scale is the mean of |1|, |3|, so both become 2: d = (1, -1).
    # d H d' = 2 - 1 - 1 + 2 = 2 of the first row; the second, (-1, -3) to (-2, -2), costs as much
    weight = torch.tensor([[1.0, 3.0], [-1.0, -3.0]])
    given = Inputs(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), None, 5, None)
    # G = 6 and 12 over T = 3 tokens: 6 / 6 * 2 + 12 / 6 * 2
    found, solved = prices(weight, given, np.array([6.0, 12.0]) / (2 * 3), [Grid(1, 0)])
    assert found.tolist() == [6.0] and solved is None


def test_ranges_are_searched_for_the_columns_that_count() -> None:
    # the importance-weighted mean of 1 and 3 is (3 * 1 + 1 * 3) / 4 = 1.5: d = (0.5, -1.5), and 4 d_1^2 + d_2^2 = 3.25
    given = Inputs(torch.diag(torch.tensor([4.0, 1.0])), None, 5, np.array([3.0, 1.0], np.float32))
    assert prices(torch.tensor([[1.0, 3.0]]), given, np.ones(1), [Grid(1, 0)])[0].tolist() == [3.25]


def test_the_solvers_own_codes_are_priced() -> None:
    def halves(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> Solution:
        assert hessian is solver
        scales = torch.full((1, 1), 0.5)
        return Solution(Codes(grid, torch.ones(1, 2, dtype=torch.uint8), scales, None), torch.zeros(1))

    solver = torch.eye(2)
    given = Inputs(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), solver, 5, None)
    # both become 0.5: d = (-0.5, -2.5); 2 * 0.25 + 2 * 1 * 1.25 + 2 * 6.25 = 15.5
    found, solved = prices(torch.tensor([[1.0, 3.0]]), given, np.ones(1), [Grid(1, 0)], halves)
    assert solved is not None and (found.tolist(), solved.tolist()) == ([2.0], [15.5])


def test_inputs_are_means() -> None:
    from moezip.calibrate.moments import second_moment

    moment = second_moment(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))  # sums ((10, 2), (2, 4))
    given = Inputs.of(moment, shrunk(moment.total, 2, None, 0, 0.0), 2)
    assert given.hessian.tolist() == [[5, 1], [1, 2]]
    assert given.importance is not None and given.importance[0] > given.importance[1]


# -- whole models -------------------------------------------------------------------------------------------


def keep_inputs(module: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Experts one by one; ``module.seen``: by expert, inputs of gate and up, inputs of down, gate weights."""
    result, module.seen = torch.zeros_like(hidden), {}
    for expert in range(module.num_experts):
        token, place = torch.where(ids == expert)
        if len(token):
            x = hidden[token]
            module.seen[expert] = (x, inner_activation(module, expert, x), gates[token, place], token)
            result.index_add_(0, token, expert_output(module, expert, x) * gates[token, place, None])
    module.given, module.chosen = hidden, (ids, gates)
    return result


@pytest.fixture(scope="module")
def kept() -> str:
    """Name of an experts implementation."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("kept-inputs", keep_inputs)
    return "kept-inputs"


def run_whole(folder: Path, rows: Rows, implementation: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model after one forward pass, and the inputs of its linears by module path."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=implementation)
    inputs: dict[str, torch.Tensor] = {}
    for path, module in model.eval().named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].detach()}))
    with torch.inference_mode():
        model(rows.ids, use_cache=False)
    return model, inputs


def defined(weight: torch.Tensor, x: torch.Tensor, gradient: np.ndarray, scored: int) -> np.ndarray:
    """1/(2T) sum_r G_r mean_t (dW_r x_t)^2, token by token in float64, with plainly searched codes."""
    found = []
    for grid in GRIDS:
        groups = fit(weight.contiguous().numpy(), None, grid, "search")
        change = groups.values(groups.nearest(weight.contiguous().numpy())).astype(np.float64) - weight.numpy()
        moved = x.reshape(-1, x.shape[-1]).double().numpy() @ change.T
        found.append(float((moved**2).mean(0) @ gradient) / (2 * scored))
    return np.array(found)


@pytest.mark.parametrize("name", SOME)
def test_prices_are_those_of_the_definition(
    name: str, tiny: Any, tmp_path: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_of_one, "fit", lambda values, _, grid, clip: fit(values, None, grid, clip))
    rows = rows_of(token_ids(12, 12))
    stats = statistics(tiny(name), rows, tmp_path / "backward")
    table = priced(tiny(name), rows, tmp_path, stats=stats)
    model, inputs = run_whole(tiny(name), rows, kept)
    assert table.nats is not table.rounded and (table.nats == table.rounded).all()  # no solver, no ratio
    assert (table.rounded > 0).all() and not table.pooled
    domain, checked = stats.domains[0], 0
    modules = dict(model.named_modules())
    for item, row, tokens in zip(table.items, table.rounded, table.tokens, strict=True):
        if item.expert is None:
            path = item.name.removesuffix(".weight").replace("block_sparse_moe", "mlp")
            if path not in inputs:  # named otherwise on disk
                continue
            wanted = defined(modules[path].weight.detach(), inputs[path], domain.linears[item.name], domain.scored)
        else:
            experts = modules[f"model.layers.{item.layer}.mlp"].experts if name != "granitemoe" else next(
                m for p, m in modules.items() if p.startswith(f"model.layers.{item.layer}.") and hasattr(m, "seen")
            )  # fmt: skip
            x, inner, gates, _ = experts.seen[item.expert]
            gradient = domain.layers[item.layer][f"{item.kind}_grad_square"][item.expert]  # type: ignore[index]
            weight = expert_matrices(experts, item.expert)[item.kind]
            wanted = defined(weight, inner if item.kind == "down" else x, gradient, domain.scored)
            assert tokens == len(gates)
        assert row == pytest.approx(wanted, rel=FLOAT32), item.name
        checked += 1
    kinds = {item.kind for item in table.items}
    assert {"gate", "up", "down", "attention"} <= kinds and checked >= 0.9 * len(table.items)
    assert ("head" in kinds) == (name != "qwen3_moe")  # whose head is tied
    assert table.bytes.tolist() == [[grid.nbytes(*item.shape) for grid in GRIDS] for item in table.items]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_local_losses_are_those_of_the_whole_block(name: str, tiny: Any, tmp_path: Path, kept: str) -> None:
    rows = rows_of(token_ids(12, 12))  # batches of 8 and of 4 rows
    table = priced(tiny(name), rows, tmp_path, local=True)
    model, _ = run_whole(tiny(name), rows, kept)
    for layer, losses in table.losses.items():
        experts = next(m for p, m in model.named_modules() if f"layers.{layer}." in p and hasattr(m, "seen"))
        given, (ids, gates) = experts.given, experts.chosen
        with torch.inference_mode():
            plain = keep_inputs(experts, given, ids, gates)
            for bits, expert in ((1, 0), (2, 3), (3, 7)):
                matrices = expert_matrices(experts, expert)
                before = {role: matrix.clone() for role, matrix in matrices.items()}
                for matrix in matrices.values():
                    codes = round_to_nearest(matrix, None, Grid(bits, 16), RtnParams("minmax")).codes
                    matrix.copy_(dequantize(codes))
                change = (keep_inputs(experts, given, ids, gates) - plain).double()
                for role, matrix in matrices.items():
                    matrix.copy_(before[role])
                wanted = change[: 8 * 12].norm() + change[8 * 12 :].norm()
                assert losses[expert, bits - 1] == pytest.approx(wanted.item(), rel=FLOAT32)
    assert table.losses.keys() == {item.layer for item in table.items if item.expert is not None}
    assert local_loss.BATCH_ROWS == 8


def test_ratios_are_of_the_sample(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(token_ids(12, 12))
    stats = statistics(tiny("deepseek_v3"), rows, tmp_path / "backward")
    plain = priced(tiny("deepseek_v3"), rows, tmp_path, stats=stats)

    def coarser(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> Solution:
        return rtn(weight, hessian, Grid(1, 16) if grid.bits == 3 else grid)

    monkeypatch.setattr(price_of_one, "fit", lambda values, _, grid, clip: fit(values, None, grid, clip))
    bare = priced(tiny("deepseek_v3"), rows, tmp_path, stats=stats, solve=rtn)
    for kind, ratios in bare.ratios.items():
        assert ratios.tolist() == [1, 1, 1], kind  # rounding is what is sampled
    table = priced(tiny("deepseek_v3"), rows, tmp_path, stats=stats, solve=coarser)
    # two experts in each of the two layers that have any; two linears of each kind a layer, three layers
    assert table.sampled == {"gate": 4, "up": 4, "down": 4, "attention": 6, "dense": 2, "shared": 4}
    for kind in table.sampled:
        one, three, eight = table.ratios[kind]
        assert (one, eight) == (1, 1) and three > 3  # of one bit instead of three
    assert table.ratios["head"].tolist() == [1, 1, 1]
    index = next(i for i, item in enumerate(table.items) if item.kind == "up")
    assert table.nats[index].tolist() == (table.rounded[index] * table.ratios["up"]).tolist()
    assert plain.items == table.items


def test_an_expert_that_no_token_reached_is_flagged(tiny: Any, tmp_path: Path) -> None:
    rows = rows_of(token_ids(1, 3))  # 3 tokens of 2 experts cannot reach 8
    stats = statistics(tiny("qwen3_moe"), rows, tmp_path / "backward")
    table = priced(tiny("qwen3_moe"), rows, tmp_path, stats=stats)
    found, idle = stats.domains[0].layers.items(), set()
    for layer, named in found:
        # in the last layer the last token's experts have no share in any loss that is counted
        idle |= {(layer, expert) for expert in np.flatnonzero(named["down_grad_square"].sum(1) == 0)}
    assert {(layer, e) for layer, named in found for e in np.flatnonzero(named["routed"] == 0)} < idle
    for item, row, tokens in zip(table.items, table.rounded, table.tokens, strict=True):
        never = (item.layer, item.expert) in idle
        assert (item.name in table.pooled) == never == (tokens == 0)
        assert (row > 0).all() and np.isfinite(row).all()


def test_every_matrix_may_stay_as_it_is(tiny: Any, tmp_path: Path) -> None:
    table = priced(tiny("qwen3_moe"), rows_of(token_ids(5, 12)), tmp_path)
    matrices = table.matrices({item.name: 7 for item in table.items})
    for matrix, item, row in zip(matrices, table.items, table.nats, strict=True):
        assert matrix.name == item.name and matrix.nbytes(None) == 7
        assert matrix.nats == {**dict(zip(GRIDS, row, strict=True)), None: 0.0}


# -- gradients ----------------------------------------------------------------------------------------------


def test_gradients_of_all_domains_are_added() -> None:
    def domain(name: str, scored: int, factor: float) -> Domain:
        sums = {"gate_grad_square": factor * np.array([[1.0, 2.0], [3.0, 4.0]])}
        sums["down_grad_square"] = np.array([[0.0, 1.0], [0.0, 0.0]])
        return Domain(name, (name,), 9, {2: sums}, scored, 1.0, {"q.weight": factor * np.ones(3)})

    found = Gradients(Statistics("s", (domain("a", 3, 1.0), domain("b", 4, 10.0))))
    assert found.scored == 7
    assert found.linear("q.weight").tolist() == [11, 11, 11]
    assert found.expert(2, 1, "gate").tolist() == [33, 44]
    assert found.expert(2, None, "gate").tolist() == [22, 33]  # the mean of (11, 22) and (33, 44)
    assert (found.reached(2, 0), found.reached(2, 1)) == (True, False)


@pytest.mark.parametrize(
    ("item", "scored", "message"),
    [
        (Item("q.weight", "attention", (3, 4), 0), 0, "not of a backward pass"),
        (Item("k.weight", "attention", (3, 4), 0), 5, "lack the squared gradients of k.weight .domain a."),
        (Item("e.up", "up", (3, 4), 2, 0), 5, "lack the squared gradients of e.up"),
        (Item("e.gate", "gate", (3, 4), 1, 0), 5, "lack the squared gradients of e.gate"),
    ],
)
def test_missing_gradients_are_told(item: Item, scored: int, message: str) -> None:
    sums = {"gate_grad_square": np.ones((1, 2))}
    stats = Statistics("s", (Domain("a", ("a",), 9, {2: sums}, scored, 1.0, {"q.weight": np.ones(3)}),))
    with pytest.raises(StatisticsError, match=message) as caught:
        Gradients(stats).require([item])
    assert "--record gradients" in str(caught.value.next)


# -- interrupted and resumed --------------------------------------------------------------------------------


def same(one: PriceTable, other: PriceTable) -> bool:
    return (
        (one.rounded == other.rounded).all()
        and (one.tokens == other.tokens).all()
        and {kind: own.tolist() for kind, own in one.ratios.items()}
        == {kind: own.tolist() for kind, own in other.ratios.items()}
        and (one.sampled, one.pooled) == (other.sampled, other.pooled)
        and all((one.losses[layer] == other.losses[layer]).all() for layer in one.losses)
        and one.losses.keys() == other.losses.keys()
    )


def test_a_killed_pass_goes_on_to_the_same_table(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, folder = rows_of(token_ids(5, 12)), tiny("deepseek_v3")
    run = partial(priced, folder, rows, stats=statistics(folder, rows, tmp_path / "b"), solve=rtn, local=True)
    wanted = run(tmp_path / "plain")
    advance, work = Stream.advance, tmp_path / "work"

    def stop(self: Stream, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        advance(self, index, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            run(work)
    left = sorted(file.name for file in (work / "prices").iterdir())
    assert left == ["prices-0000.json", "prices-0001.json"]
    assert same(run(work, resume=True), wanted)
    # a finished pass streams nothing
    with monkeypatch.context() as patched:
        patched.setattr(Stream, "embed", None)
        assert same(run(work, resume=True), wanted)
    with pytest.raises(MoezipError, match="prices of another checkpoint, other data or other settings"):
        run(work, resume=True, digest="another")
    assert same(run(work, digest="another"), wanted)  # afresh
    file = work / "prices" / "prices-0001.json"
    for damage in ("{", json.dumps({"job": "another", "what": 1}), "[]"):
        file.write_text(damage)
        with pytest.raises(MoezipError, match="saved prices are damaged"):
            run(work, resume=True, digest="another")
    (work / "prices" / "mine.json").write_text("keep")
    forget_prices(work / "prices")
    assert [file.name for file in (work / "prices").iterdir()] == ["mine.json"]

"""Prices in nats: the algebra of a dropped expert, and sums of prices by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.calibrate.gradient_sums import Gates
from moezip.calibrate.record import GRADIENT_RECORDS, RECORDS
from moezip.calibrate.run import calibrate
from moezip.calibrate.statistics import Domain, Statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError
from moezip.plan.plan import LayerPlan, Pick, Plan
from moezip.plan.price import expert_prices, predicted_nats, priced
from tests.test_backward import rows_of
from tests.tiny import token_ids

ROUNDING = 1e-12  # float64 algebra in another order


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("renormalised", [True, False])
def test_the_change_of_a_dropped_expert_is_that_of_the_block_itself(scale: float, renormalised: bool) -> None:
    """G . (y' - y), with y' the block's output once the expert is gone and the gates are what the router would give."""
    torch.manual_seed(0)
    tokens, experts, top_k, width = 6, 7, 3, 5
    probabilities = torch.rand(tokens, experts, dtype=torch.float64).softmax(-1)
    ids = probabilities.topk(top_k).indices
    outputs = torch.randn(tokens, top_k, width, dtype=torch.float64)
    gradient = torch.randn(tokens, width, dtype=torch.float64)

    def gates_of(p: torch.Tensor) -> torch.Tensor:
        chosen = p.gather(1, ids)
        return scale * (chosen / chosen.sum(1, keepdim=True) if renormalised else chosen)

    gates = gates_of(probabilities)
    before = (gates[:, :, None] * outputs).sum(1)
    pushes = gates * (outputs @ gradient[:, :, None])[:, :, 0]
    found = Gates(renormalised, softmax=True, scale=scale).renormalised_drops(gates, pushes)
    for place in range(top_k):
        without = probabilities.scatter(1, ids[:, place : place + 1], 0.0)
        without = without / without.sum(1, keepdim=True)  # the softmax over the experts that are left
        after = (gates_of(without)[:, :, None] * outputs).sum(1)
        change = ((after - before) * gradient).sum(1)
        assert torch.allclose(found[:, place], change, atol=ROUNDING, rtol=1e-9)


def test_gates_that_do_not_share_anything_only_lose_the_expert() -> None:
    pushes = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    found = Gates(renormalised=False, softmax=False, scale=1.0).renormalised_drops(torch.ones(1, 2), pushes)
    assert torch.equal(found.abs(), pushes.abs())


def test_an_expert_with_the_whole_gate_only_takes_its_output_away() -> None:
    pushes = torch.tensor([[3.0]], dtype=torch.float64)
    gates = Gates(renormalised=True, softmax=True, scale=1.0)
    assert gates.renormalised_drops(torch.ones(1, 1), pushes).tolist() == [[-3.0]]


def priced_domain(name: str, sums: list[float], scored: int) -> Domain:
    return Domain(name, (name,), 100, {0: {"drop_renormalised_square": np.array(sums)}}, scored, 10.0)


def test_predicted_nats_by_hand() -> None:
    # prices: 0.5 * (4, 8, 2) / 20 = (0.1, 0.2, 0.05); keeping expert 1 drops 0 and 2: 0.15
    one = priced_domain("one", [4.0, 8.0, 2.0], 20)
    assert expert_prices(one)[0] == pytest.approx([0.1, 0.2, 0.05])
    plan = Plan("s", "a", (LayerPlan(0, 3, (Pick.keep(1),)),))
    assert predicted_nats(plan, [one], {}) == pytest.approx(0.15)
    # a second domain: 0.5 * (8, 0, 8) / 10 = (0.4, 0, 0.4), dropped 0.8; weights 3 to 1: (3 * 0.15 + 0.8) / 4 = 0.3125
    two = priced_domain("two", [8.0, 0.0, 8.0], 10)
    assert predicted_nats(plan, [one, two], {"one": 3.0}) == pytest.approx(0.3125)


def test_without_gradients_there_is_no_price() -> None:
    assert not priced(None)
    assert not priced(Statistics("s", ()))
    assert not priced(Statistics("s", (Domain("d", ("d",), 10, {0: {"counts": np.ones(3)}}),)))
    assert priced(Statistics("s", (priced_domain("d", [1.0], 1),)))


@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_gradient_pass_saves_adds_and_repeats(labels: Any, tiny: Any, tmp_path: Path) -> None:
    rows = rows_of(token_ids(4, 10))
    with Checkpoint.open(tiny("qwen3_moe")) as source:
        stats = calibrate(source, rows, RECORDS, workdir=tmp_path / "work", gradients=labels, micro_rows=8)
        again = calibrate(source, rows, RECORDS, workdir=tmp_path / "work", gradients=labels, micro_rows=8)
        plain = calibrate(source, rows, RECORDS, micro_rows=2)
        with pytest.raises(MoezipError, match="on disk"):
            calibrate(source, rows, RECORDS, gradients=labels)
    assert not (tmp_path / "work").exists()
    stats.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Statistics.load(tmp_path / "a")
    [domain] = loaded.domains
    assert (domain.scored, domain.tokens) == (4 * 9, 4 * 10)
    assert domain.loss == stats.domains[0].loss > 0
    twice = loaded + loaded
    for layer, named in domain.layers.items():
        assert set(named) == {record.name for record in (*RECORDS, *GRADIENT_RECORDS)}
        assert np.array_equal(named["routed"], named["counts"])
        assert np.array_equal(twice.domains[0].layers[layer]["drop_square"], 2 * named["drop_square"])
        # the forward half records what a forward pass alone does on the same micro-batches
        assert np.array_equal(named["change_gate_norm_sum"], plain.domains[0].layers[layer]["change_gate_norm_sum"])
    assert twice.domains[0].scored == 2 * domain.scored


def test_padding_gives_no_gradient_statistics(tiny: Any, tmp_path: Path) -> None:
    """Rows padded on the right count as the same rows without padding."""
    ids = token_ids(3, 8)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=ids.dtype)], 1)
    mask = torch.cat([torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)], 1)
    with Checkpoint.open(tiny("deepseek_v3")) as source:
        bare = calibrate(source, rows_of(ids), RECORDS, workdir=tmp_path, gradients="data").domains[0]
        full = calibrate(source, rows_of(padded, mask), RECORDS, workdir=tmp_path, gradients="data").domains[0]
    assert bare.scored == full.scored
    assert full.loss == pytest.approx(bare.loss, rel=1e-5)  # float32 attention over another width
    for layer, named in bare.layers.items():
        for record in GRADIENT_RECORDS:
            scale = np.abs(named[record.name]).max()
            assert np.abs(full.layers[layer][record.name] - named[record.name]).max() <= 1e-4 * scale, record.name

"""The pruning methods: their formulas by hand, the guard, and that they are worth their trouble."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip import demo
from moezip.arch.experts import read_expert
from moezip.arch.families import identify
from moezip.arch.spec import LayerFacts
from moezip.calibrate.data import DomainText, load_rows, tokenizer_of
from moezip.calibrate.record import BY_NAME, GRADIENT_RECORDS, RECORDS, wants_gradients
from moezip.calibrate.run import calibrate
from moezip.calibrate.statistics import Domain, Statistics
from moezip.calibrate.weights import WEIGHT_RECORDS, weight_statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import StatisticsError, UsageError
from moezip.evaluate.loss import evaluate
from moezip.pipeline.common import Common
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune
from moezip.plan.allocate import rank
from moezip.plan.apply import Applied
from moezip.plan.plan import Plan
from moezip.prune import METHODS
from moezip.prune.params import PruneParams
from moezip.prune.random import RANDOM, RandomParams
from moezip.prune.super_experts import super_experts
from moezip.registry import parse_params

FACTS = LayerFacts(layer=2, experts=4, top_k=2, hidden=8, width=4)
BY_METHOD = {method.name: method for method in METHODS}
# Methods whose scores are made of a forward pass' standing records, or of none: they share the tests below. Those that
# read gradients, or bring records or choices of their own, have test files of their own.
PLAIN = [m for m in METHODS if m.unit == "expert" and m.records is None and not wants_gradients(m.needs)]
WITH_DATA = [method for method in PLAIN if method.needs]


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# Expert 0: 4 tokens, expert 1: 1 token, expert 2: none, expert 3: 2 tokens.
STATS: dict[str, np.ndarray] = {
    "counts": array(4, 1, 0, 2),
    "gate_sum": array(1, 0.75, 0, 1.5),
    "norm_sum": array(10, 6, 0, 3),
    "gate_norm_sum": array(2, 4.5, 0, 1),
    "change_gate_norm_sum": array(0.5, 0.25, 0, 0.125),
    "router_row_norm": array(1, 2, 3, 4),
    "down_column_norm": array(0.5, 0.25, 2, 1),
}

BY_HAND: dict[str, Any] = {
    "easy-ep": [0.5, 0.25, 0, 0.125],  # the sum as it is
    "reap": [0.5, 4.5, 0, 0.5],  # 2/4, 4.5/1, -, 1/2
    "frequency": [4, 1, 0, 2],
    "gate-sum": [1, 0.75, 0, 1.5],
    "mean-norm": [2.5, 6, 0, 1.5],  # 10/4, 6/1, -, 3/2
    "router-norm": [0.5, 0.5, 6, 4],  # 1*0.5, 2*0.25, 3*2, 4*1
}


@pytest.mark.parametrize("method", [method for method in PLAIN if method is not RANDOM], ids=lambda m: m.name)
def test_by_hand(method: Any) -> None:
    before = {name: values.copy() for name, values in STATS.items()}
    needed = {name: STATS[name] for name in (*method.needs, *method.weights)}
    found = method.run(FACTS, needed, method.params())  # what it says it needs is enough
    assert found.dtype == np.float64
    assert found.tolist() == BY_HAND[method.name]
    assert all(np.array_equal(before[name], STATS[name]) for name in STATS)


def test_the_table_of_methods() -> None:
    assert {method.name for method in PLAIN} == {*BY_HAND, "random"}
    assert len(BY_METHOD) == len(METHODS)
    for method in METHODS:
        assert method.family == "prune"
        assert method.summary
        assert method.paper
        assert set(method.needs) <= {*BY_NAME, *(record.name for record in GRADIENT_RECORDS)}
        assert set(method.weights) <= set(WEIGHT_RECORDS)
        assert isinstance(method.params(), PruneParams)
        assert method.params().guard
        assert method.params().mtp == "drop"


@pytest.mark.parametrize("method", WITH_DATA, ids=lambda m: m.name)
def test_experts_that_no_token_reached_go_first(method: Any) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        facts = LayerFacts(layer=0, experts=16, top_k=1, hidden=8, width=4)
        idle = generator.permutation(16)[:5]
        stats = {name: generator.random(16) * 3 + 1e-9 for name in BY_NAME}
        stats["counts"] = generator.integers(1, 9, 16).astype(np.float64)
        for values in stats.values():
            values[idle] = 0
        scores = method.run(facts, stats, method.params())
        assert np.isfinite(scores).all()
        assert scores[idle].tolist() == [0] * 5
        assert not set(rank(facts, scores, 11)) & set(idle.tolist())


# -- random -------------------------------------------------------------------------------------------------


def test_random_scores_repeat_for_a_seed_and_differ_otherwise() -> None:
    def scores(layer: int, seed: int, experts: int = 64) -> list[float]:
        facts = LayerFacts(layer=layer, experts=experts, top_k=2, hidden=8, width=4)
        found: np.ndarray = RANDOM.run(facts, {}, RandomParams(seed=seed))
        return found.tolist()

    assert scores(0, 0) == scores(0, 0)
    different = [scores(layer, seed) for layer in range(4) for seed in range(4)]
    assert len({tuple(each) for each in different}) == 16
    values = scores(0, 0, experts=10_000)
    # uniform on [0, 1): the mean of 10,000 has a standard deviation of 1 / sqrt(12 * 10,000) = 0.003
    assert 0 <= min(values) <= max(values) < 1
    assert abs(np.mean(values) - 0.5) < 0.02


def test_seeds_are_set_as_text() -> None:
    assert parse_params(RANDOM, {"seed": "3", "guard": "no"}) == RandomParams(guard=False, seed=3)
    with pytest.raises(UsageError, match="seed -1 is below 0"):
        parse_params(RANDOM, {"seed": "-1"})
    with pytest.raises(UsageError, match="unknown setting of reap 'seed'"):
        parse_params(BY_METHOD["reap"], {"seed": "3"})


# -- weights alone ------------------------------------------------------------------------------------------


class Weights:
    """Two experts in numbers that can be checked by eye."""

    config: Mapping[str, Any] = {}
    folder = Path()
    fingerprint = ""
    tensors: Mapping[str, Any] = {
        "model.layers.3.mlp.gate.weight": torch.tensor([[3.0, 4.0], [5.0, -12.0]]),
        **{f"model.layers.3.mlp.experts.{e}.{role}_proj.weight": torch.full((3, 2), 9.0)
           for e in range(2) for role in ("gate", "up")},
        # columns (3, 4), (0, 0), (0, -1): norms 5, 0, 1
        "model.layers.3.mlp.experts.0.down_proj.weight": torch.tensor([[3.0, 0, 0], [4.0, 0, -1.0]]),
        # columns (1, 0), (0, 2), (6, 8): norms 1, 2, 10
        "model.layers.3.mlp.experts.1.down_proj.weight": torch.tensor([[1.0, 0, 6.0], [0, 2.0, 8.0]]),
    }  # fmt: skip

    def names(self) -> list[str]:
        return list(self.tensors)

    def spec(self, name: str) -> Any:
        from moezip.checkpoint.source import TensorSpec

        return TensorSpec(name, "F32", tuple(self.tensors[name].shape), "one")

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        assert rows is None
        found: torch.Tensor = self.tensors[name]
        return found


def test_router_norm_by_hand() -> None:
    facts = LayerFacts(layer=3, experts=2, top_k=1, hidden=2, width=3)
    source: Any = Weights()
    entry = identify({"model_type": "qwen3_moe"})
    (found,) = weight_statistics(source, entry, [facts], ["router_row_norm", "down_column_norm"]).values()
    assert found["router_row_norm"].tolist() == [5, 13]
    assert found["down_column_norm"].tolist() == pytest.approx([(5 + 0 + 1) / 3, (1 + 2 + 10) / 3], rel=1e-15)
    # 5 * 2 and 13 * 13/3
    scores = BY_METHOD["router-norm"].run(facts, found, PruneParams())
    assert scores.tolist() == pytest.approx([10, 169 / 3], rel=1e-15)


@pytest.mark.parametrize(
    ("name", "stored"), [("gpt_oss", None), ("gpt_oss", "mxfp4"), ("granitemoe", None), ("deepseek_v3", "fp8")]
)
def test_weight_statistics_of_other_layouts(name: str, stored: str | None, tiny: Any) -> None:
    from moezip.arch.experts import decoded

    source = Checkpoint.open(tiny(name, stored=stored))
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    found = weight_statistics(source, entry, facts, WEIGHT_RECORDS)
    assert list(found) == [fact.layer for fact in facts]
    for fact in facts:
        for expert in range(fact.experts):
            down = read_expert(decoded(source), entry, fact.layer, expert).down.double()
            assert tuple(down.shape) == (fact.hidden, fact.width)
            norms = [float(down[:, j] @ down[:, j]) ** 0.5 for j in range(fact.width)]
            got = float(found[fact.layer]["down_column_norm"][expert])
            assert got == pytest.approx(sum(norms) / fact.width, rel=1e-12)
        assert found[fact.layer]["router_row_norm"].shape == (fact.experts,)


# -- super experts ------------------------------------------------------------------------------------------


def peaks(**changes: float) -> dict[int, np.ndarray]:
    """Layers 1 to 4 of 100 experts each with peak 1, but ``l2e7=50`` says that expert 7 of layer 2 has 50."""
    found = {layer: np.ones(100) for layer in (1, 2, 3, 4)}
    for key, value in changes.items():
        layer, expert = key.removeprefix("l").split("e")
        found[int(layer)][int(expert)] = value
    return found


def test_super_experts_are_above_the_percentile() -> None:
    # 400 values; the 99.5th percentile lies at 0.995 * 399 = 397.005 of them in order, between the third and the second
    # largest: 200 + 0.005 * 300 = 201.5, and a tenth of the maximum is 100. So 500 and 1000 are above, 200 is not.
    found = peaks(l1e3=1000, l2e7=500, l2e9=200)
    assert super_experts(found, 8) == {1: [3], 2: [7]}
    assert super_experts(peaks(l2e9=1000, l2e7=500, l1e0=200), 8) == {2: [7, 9]}


def test_super_experts_are_above_a_tenth_of_the_maximum() -> None:
    # the percentile is 1 + 0.005 * 89 = 1.445; a tenth of the maximum is 100, so 90 is not enough and 101 is
    assert super_experts(peaks(l1e3=1000, l2e7=90), 8) == {1: [3]}
    assert super_experts(peaks(l1e3=1000, l2e7=101), 8) == {1: [3], 2: [7]}
    # exactly a tenth is not above it
    assert super_experts(peaks(l1e3=1000, l2e7=100), 8) == {1: [3]}


def test_super_experts_lie_in_the_first_three_quarters_of_the_decoder() -> None:
    found = peaks(l2e7=1000, l3e5=1000)
    # a decoder of 4 layers: 2 < 3 but not 3 < 3; of 5: 3 < 3.75 (dense layers count)
    assert super_experts(found, 4) == {2: [7]}
    assert super_experts(found, 5) == {2: [7], 3: [5]}
    assert super_experts(peaks(l4e1=1000), 5) == {}
    # a giant in a late layer still sets the bar
    assert super_experts(peaks(l4e1=100_000, l2e7=1000), 5) == {}


def test_models_where_all_are_alike_have_none() -> None:
    assert super_experts(peaks(), 8) == {}
    assert super_experts({0: np.zeros(8)}, 4) == {}


# -- guard --------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tiny: Any) -> tuple[Path, Statistics]:
    """Expert i is the (i + 1)-th best, so 7 is the worst by every score; but in layer 1 expert 7 has giant outputs."""
    folder = tiny("qwen3_moe")
    named = {name: np.arange(8.0, 0, -1) for name in BY_NAME if len(BY_NAME[name].shape(FACTS)) == 1}
    named["counts"] = np.sqrt(named["counts"])  # falls more slowly, so that sums over counts fall too
    calm, giant = {**named, "output_max": np.ones(8)}, {**named, "output_max": np.ones(8)}
    giant["output_max"][7] = 1000.0
    stats = Statistics(Checkpoint.open(folder).fingerprint, (Domain("code", ("x",), 9, {0: calm, 1: giant, 2: calm}),))
    return folder, stats


def planned(folder: Path, stats: Statistics, method: str, **settings: str) -> Plan:
    job = PruneJob(method, keep=4, settings=settings)
    return make_plan(prepare_prune(str(folder), job, Common()), job, stats, Common())


@pytest.mark.parametrize("method", [method.name for method in WITH_DATA])
def test_the_guard_keeps_super_experts_whatever_their_score(method: str, guarded: tuple[Path, Statistics]) -> None:
    plan = planned(*guarded, method)
    assert [layer.kept for layer in plan.layers] == [(0, 1, 2, 3), (0, 1, 2, 7), (0, 1, 2, 3)]
    assert [layer.protected for layer in plan.layers] == [(), (7,), ()]
    assert plan.made_by["settings"]["guard"] is True
    off = planned(*guarded, method, guard="false")
    assert [layer.kept for layer in off.layers] == [(0, 1, 2, 3)] * 3
    assert [layer.protected for layer in off.layers] == [()] * 3


def test_the_guard_looks_at_the_largest_of_all_domains(guarded: tuple[Path, Statistics]) -> None:
    folder, stats = guarded
    (code,) = stats.domains
    calm = Domain("prose", ("y",), 9, {layer: code.layers[0] for layer in code.layers})
    plan = planned(folder, Statistics(stats.source, (calm, code)), "reap")
    assert [layer.protected for layer in plan.layers] == [(), (7,), ()]


def test_the_guard_asks_for_the_record_that_it_reads(guarded: tuple[Path, Statistics]) -> None:
    folder, stats = guarded
    (code,) = stats.domains
    layers = {layer: {"counts": named["counts"]} for layer, named in code.layers.items()}
    without = Statistics(stats.source, (Domain("code", ("x",), 9, layers),))
    with pytest.raises(StatisticsError, match="lack output_max") as caught:
        planned(folder, without, "frequency")
    assert "--set guard=false" in str(caught.value.next)
    assert [layer.kept for layer in planned(folder, without, "frequency", guard="false").layers] == [(0, 1, 2, 3)] * 3


# -- quality ------------------------------------------------------------------------------------------------

DOMAIN, OTHER = "python", "scripture"
SEQ_LEN = 128


@cache
def demo_statistics() -> tuple[Checkpoint, Statistics]:
    """4,096 tokens of each of two domains."""
    source = Checkpoint.open(demo.checkpoint())
    texts = [DomainText(name, (demo.data("calib") / f"{name}.jsonl",), 4096) for name in (DOMAIN, OTHER)]
    rows = load_rows(texts, tokenizer_of(source.folder), SEQ_LEN)
    return source, calibrate(source, rows, RECORDS)


def held_out_loss(source: Any) -> float:
    """Nats per token of 2,048 tokens of python that nothing was fitted on."""
    found = evaluate(source, data=[demo.data("heldout") / f"{DOMAIN}.jsonl"], tokens=2048, seq_len=SEQ_LEN)
    assert found.loss is not None
    return found.loss.nll


@cache
def pruned_loss(method: str, domain: str = DOMAIN, seed: int = 0) -> float:
    """... with half of the experts, chosen for ``domain``."""
    source, stats = demo_statistics()
    mine = Statistics(stats.source, tuple(each for each in stats.domains if each.name == domain))
    job = PruneJob(method, ratio=0.5)
    plan = make_plan(prepare_prune(str(source.folder), job, Common(seed=seed)), job, mine, Common(seed=seed))
    assert {len(layer.kept) for layer in plan.layers} == {8}
    return held_out_loss(Applied(source, plan))


@pytest.mark.parametrize("method", [method.name for method in PLAIN if method is not RANDOM])
def test_every_method_beats_random_experts(method: str) -> None:
    # random: 6.0 to 6.2 nats over seeds; the worst method measured here is mean-norm with 4.5
    floor = min(pruned_loss("random", seed=seed) for seed in range(3))
    assert pruned_loss(method) < floor - 0.5


def test_half_of_the_experts_cost_little_in_their_own_domain() -> None:
    # measured: 3.7 whole, 3.9 with half of the experts chosen by easy-ep for this domain, 6.0 at random
    whole, kept = held_out_loss(demo_statistics()[0]), pruned_loss("easy-ep")
    assert whole < kept < whole + 0.5
    assert kept < pruned_loss("easy-ep", OTHER) - 0.5  # chosen for another domain, they are not worth much
    assert kept < pruned_loss("router-norm")  # text beats no text

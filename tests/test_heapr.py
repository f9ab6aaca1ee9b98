"""HEAPr: the score by hand and against the published matrix form, budgets, and what a narrower model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import ARCHITECTURES, identify
from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Domain
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, PlanError, UsageError
from moezip.plan.apply import Applied
from moezip.plan.neurons import neuron_plans
from moezip.plan.plan import LayerPlan, Part, Pick, Plan, numbers_of, ranges
from moezip.plan.price import predicted_nats
from moezip.prune.heapr import HeaprParams, score
from tests.test_laws import REORDERED, full_logits, largest_difference, load, plain_rows, written

FACTS = LayerFacts(layer=0, experts=2, top_k=1, hidden=3, width=4)


def test_score_by_hand() -> None:
    stats = {
        "routed": np.array([2.0, 0.0]),
        "inner_square": np.array([[2.0, 4.0, 0.0, 6.0], [0.0] * 4]),
        "inner_grad_square": np.array([[1.0, 0.5, 9.0, 2.0], [0.0] * 4]),
        "inner_product_square": np.array([[3.0, 1.0, 0.0, 8.0], [0.0] * 4]),
    }
    # two tokens: mean u^2 = 1, 2, 0, 3; mean v^2 = 0.5, 0.25, 4.5, 1; products 0.5, 0.5, 0, 3
    assert score(FACTS, stats, HeaprParams()).tolist() == [[0.5, 0.5, 0.0, 3.0], [0.0] * 4]
    # exact: mean (u v)^2 = 1.5, 0.5, 0, 4; the expert that no token reached has 0 either way
    assert score(FACTS, stats, HeaprParams(fisher="exact")).tolist() == [[1.5, 0.5, 0.0, 4.0], [0.0] * 4]


def test_two_sums_equal_the_published_matrices() -> None:
    """D_j' G D_j with G = mean of gamma gamma', times mean u_j^2, is the streaming product (methods 3.3)."""
    random = np.random.default_rng(0)
    tokens, hidden, width = 40, 6, 5
    u, gamma = random.normal(size=(tokens, width)), random.normal(size=(tokens, hidden))
    down = random.normal(size=(hidden, width))
    matrix = gamma.T @ gamma / tokens
    published = (u**2).mean(0) * np.einsum("dj,de,ej->j", down, matrix, down)
    v = gamma @ down
    stats = {
        "routed": np.array([float(tokens)]),
        "inner_square": (u**2).sum(0)[None],
        "inner_grad_square": (v**2).sum(0)[None],
    }
    facts = LayerFacts(0, 1, 1, hidden, width)
    assert np.allclose(score(facts, stats, HeaprParams())[0], published, rtol=1e-12)


SCORES = {0: np.array([[9.0, 1.0, 8.0, 2.0], [7.0, 6.0, 5.0, 4.0]]), 1: np.array([[3.0, 0.5, 0.4, 0.3], [0.0] * 4])}
TWO = (FACTS, LayerFacts(layer=1, experts=2, top_k=1, hidden=3, width=4))


def kept(plans: tuple[LayerPlan, ...]) -> list[list[list[int]]]:
    return [[list(range(4)) if p.neurons is None else list(p.neurons) for p in plan.picks] for plan in plans]


def test_budgets_by_hand() -> None:
    # 16 neurons, half stay: 9 8 7 6 5 4 3 2; the last expert vanishes, expert 1 of layer 0 stays whole
    assert kept(neuron_plans(TWO, SCORES, 0.5)) == [[[0, 2, 3], [0, 1, 2, 3]], [[0], []]]
    # per layer 4 of 8: layer 0 keeps 9 8 7 6, layer 1 keeps its first expert
    assert kept(neuron_plans(TWO, SCORES, 0.5, rank="layer")) == [[[0, 2], [0, 1]], [[0, 1, 2, 3], []]]
    assert kept(neuron_plans(TWO, SCORES, 0.5, rank="expert")) == [[[0, 2], [0, 1]], [[0, 1], [0, 1]]]
    assert kept(neuron_plans(TWO, SCORES, 0.5, uniform=True)) == [[[0, 2], [0, 1]], [[0, 1], [0, 1]]]
    # lots of two: (9+8) (7+6) (5+4) (3+.5) (2+1) (.4+.3) 0 0; four of them stay
    assert kept(neuron_plans(TWO, SCORES, 0.5, step=2)) == [[[0, 2], [0, 1, 2, 3]], [[0, 1], []]]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_the_budget_is_exact_and_never_exceeded(ratio: float, step: int) -> None:
    random = np.random.default_rng(1)
    facts = [LayerFacts(layer, 5, 2, 8, 12) for layer in range(3)]
    scores = {fact.layer: random.random((5, 12)) for fact in facts}
    budget = int(round(180 * (1 - ratio), 6))
    plans = neuron_plans(facts, scores, ratio, step=step)
    widths = [width for plan in plans for width in plan.widths(12)]
    assert sum(widths) == budget - budget % step
    assert all(width % step == 0 for width in widths)
    # no neuron that went is better than one that stayed, lot by lot, when lots are single neurons
    if step == 1 and 0 < sum(widths) < 180:
        stay = np.zeros((3, 5, 12), dtype=bool)
        for plan in plans:
            for expert, pick in enumerate(plan.picks):
                stay[plan.layer, expert, list(range(12) if pick.neurons is None else pick.neurons)] = True
        table = np.stack([scores[layer] for layer in range(3)])
        assert table[stay].min() >= table[~stay].max()


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(UsageError, match="round=3 does not divide"):
        neuron_plans(TWO, SCORES, 0.5, step=3)
    with pytest.raises(UsageError, match="rank is global"):
        neuron_plans(TWO, SCORES, 0.5, rank="model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not a share"):
        neuron_plans(TWO, SCORES, 1.0)
    with pytest.raises(PlanError, match="finite"):
        neuron_plans(TWO, {**SCORES, 1: np.full((2, 4), np.nan)}, 0.5)
    with pytest.raises(PlanError, match="no neuron at all"):
        neuron_plans(TWO, SCORES, 0.99)


def test_protected_experts_keep_all_neurons() -> None:
    plans = neuron_plans(TWO, SCORES, 0.5, protected={1: [1]})
    assert plans[1].picks[1].neurons is None
    assert sum(sum(plan.widths(4)) for plan in plans) == 8


def test_predicted_nats_of_neurons_by_hand() -> None:
    # (1 / 2T) sum (u v)^2 with T = 5: 0.2 0.4 0.6 0.8 for expert 0; keeping neurons 1 and 3 drops 0.2 + 0.6
    sums = {"drop_renormalised_square": np.ones(2), "inner_product_square": np.array([[2.0, 4, 6, 8], [1.0] * 4])}
    domain = Domain("d", ("d",), 5, {0: sums}, 5, 1.0)
    plan = Plan("s", "a", (LayerPlan(0, 2, (Pick.slim(0, [1, 3], 4), Pick.keep(1))),))
    assert predicted_nats(plan, [domain], {}) == pytest.approx(0.8)


def test_neurons_are_readable_in_a_plan() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges([]) == ""
    assert numbers_of("0-2 5 7-8") == (0, 1, 2, 5, 7, 8)
    plan = Plan("s", "a", (LayerPlan(0, 2, (Pick.slim(0, [1, 3], 4), Pick.slim(1, [], 4))),))
    assert '{"expert": 0, "neurons": "1 3"}' in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    for bad in ([3, 1], [0, 0], [4]):
        wrong = Plan("s", "a", (LayerPlan(0, 2, (Pick((Part(0, neurons=tuple(bad)),)), Pick.keep(1))),))
        with pytest.raises(PlanError, match="neurons are ascending"):
            wrong.validate([FACTS], "s")


# -- what a narrower model computes -------------------------------------------------------------------------

NARROWABLE = [name for name, entry in ARCHITECTURES.items() if not entry.width_is_dense_too]


def half_of_each(facts: list[LayerFacts], width: int) -> dict[int, np.ndarray]:
    random = np.random.default_rng(3)
    return {fact.layer: random.random((fact.experts, width)) for fact in facts}


@pytest.mark.parametrize("name", NARROWABLE)
def test_a_narrower_model_is_the_model_without_those_neurons(name: str, tiny: Any, tmp_path: Path) -> None:
    """Loads in stock transformers; equal to the source with the columns of the dropped neurons set to zero."""
    folder = tiny(name)
    with Checkpoint.open(folder) as source:
        entry = identify(source.config)
        facts = entry.layer_facts(source.config)
        layers = neuron_plans(facts, half_of_each(facts, facts[0].width), 0.5, uniform=True)
        plan = Plan(source.fingerprint, entry.name, layers)
        applied = Applied(source, plan)
        for tensor in applied.names():
            whole = applied.read(tensor)
            assert b"".join(applied.chunks(tensor)) == whole.contiguous().view(torch.uint8).numpy().tobytes()
        narrow = load(written(applied, tmp_path / "narrow"))
    assert getattr(narrow.config, entry.width_key) == facts[0].width // 2
    full = load(folder)
    for layer in layers:
        experts = full.get_submodule(f"{entry.layers}.{layer.layer}.{entry.block}.{entry.experts_module}")
        for expert, pick in enumerate(layer.picks):
            gone = sorted(set(range(facts[0].width)) - set(pick.neurons or ()))
            if experts.is_transposed:
                experts.down_proj.data[expert, gone] = 0
            else:
                experts.down_proj.data[expert][:, gone] = 0
    rows = plain_rows()
    assert largest_difference(full_logits(full, rows), full_logits(narrow, rows), rows) <= REORDERED


def test_dense_layers_keep_jamba_as_wide_as_it_is(tiny: Any) -> None:
    config = Checkpoint.open(tiny("jamba")).config
    with pytest.raises(ArchitectureError, match="sizes its dense layers too"):
        ARCHITECTURES["jamba"].with_width(config, 4)


def test_shared_experts_stay_whole() -> None:
    entry = ARCHITECTURES["deepseek_v3"]
    config = {"moe_intermediate_size": 12, "n_shared_experts": 2}
    assert entry.with_width(config, 8) == {"moe_intermediate_size": 8, "n_shared_experts": 3}
    with pytest.raises(ArchitectureError, match="24 wide, which is no multiple of 9"):
        entry.with_width(config, 9)
    # a budget of 9 of 12 neurons falls to the next width that divides 24
    facts = [LayerFacts(0, 2, 1, 4, 12)]
    plans = neuron_plans(facts, {0: np.random.default_rng(0).random((2, 12))}, 0.25, uniform=True,
                         allowed=lambda width: 24 % width == 0)  # fmt: skip
    assert plans[0].widths(12) == (8, 8)

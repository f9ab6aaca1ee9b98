"""Experts ranked over the whole model: how many each layer keeps, and what is written then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.arch.layout import Layout, tripwire
from moezip.arch.spec import ExpertTensor, LayerFacts
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import PlanError
from moezip.export.verify import verify
from moezip.plan.allocate import layer_plans, model_counts
from moezip.plan.apply import Applied
from moezip.plan.neurons import neuron_plans
from moezip.plan.plan import LayerPlan, Pick, Plan
from tests.test_laws import REORDERED, largest_difference, plain_rows, streamed_logits, written


def facts_of(layers: int, experts: int = 4, top_k: int = 1, **groups: int) -> list[LayerFacts]:
    return [LayerFacts(layer, experts, top_k, 4, 4, **groups) for layer in range(layers)]


def test_counts_by_hand() -> None:
    prices = {0: np.array([9.0, 1.0, 8.0, 7.0]), 1: np.array([2.0, 3.0, 0.5, 0.1])}
    # every layer keeps its dearest (9 and 3); of 5, three go to the dearest of the rest: 8, 7, 2
    assert model_counts(facts_of(2), prices, 5, {}) == {0: 3, 1: 2}
    # top-2 routers need two each: 9 8 and 3 2, then 7
    assert model_counts(facts_of(2, top_k=2), prices, 5, {}) == {0: 3, 1: 2}
    assert model_counts(facts_of(2), prices, 4, {}) == {0: 3, 1: 1}
    # three protected experts of layer 1 are a floor
    assert model_counts(facts_of(2), prices, 5, {1: [1, 2, 3]}) == {0: 2, 1: 3}
    assert model_counts(facts_of(2), prices, 8, {}) == {0: 4, 1: 4}


def test_counts_with_groups_by_hand() -> None:
    # two groups of two, one of each must stay; the dearest of each group together are 9 + 8 and 3 + 0.5, the second
    # ones 1 + 7 = 8 and 2 + 0.1 = 2.1: a budget of 6 takes the first pair
    prices = {0: np.array([9.0, 1.0, 8.0, 7.0]), 1: np.array([2.0, 3.0, 0.5, 0.1])}
    facts = facts_of(2, groups=2, top_groups=1)
    assert model_counts(facts, prices, 6, {}) == {0: 4, 1: 2}
    # 7 is no sum of pairs: one less is kept, never one more
    assert model_counts(facts, prices, 7, {}) == {0: 4, 1: 2}


@pytest.mark.parametrize(
    ("total", "words"), [(1, "the routers need 2, there are 8"), (9, "cannot keep 9 experts in all")]
)
def test_impossible_totals_are_refused(total: int, words: str) -> None:
    prices = {layer: np.arange(4.0) for layer in range(2)}
    with pytest.raises(PlanError, match=words):
        model_counts(facts_of(2), prices, total, {})


RAGGABLE = ("qwen3_moe", "mixtral", "deepseek_v3", "jamba", "ernie4_5_moe", "granitemoe", "gpt_oss")


def uneven(source: Checkpoint) -> Plan:
    """Other experts in every layer, one group's worth more in the first, and neurons taken out of some."""
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    random = np.random.default_rng(5)
    scores = {fact.layer: random.random(fact.experts) for fact in facts}
    least = max(facts[0].groups * 2, facts[0].top_k + 1)
    counts = {fact.layer: least + (facts[0].groups if i == 0 else 0) for i, fact in enumerate(facts)}
    layers = []
    for plan, fact in zip(layer_plans(facts, scores, counts, {}), facts, strict=True):
        picks = list(plan.picks)
        picks[0] = Pick.slim(picks[0].kept, range(0, fact.width, 2), fact.width)
        picks[-1] = Pick.slim(picks[-1].kept, [], fact.width)
        layers.append(LayerPlan(fact.layer, fact.experts, tuple(picks)))
    return Plan(source.fingerprint, entry.name, tuple(layers))


@pytest.mark.parametrize("name", RAGGABLE)
def test_a_ragged_output_is_what_the_view_computes(name: str, tiny: Any, tmp_path: Path) -> None:
    """On disk and through the plan: complete, with the tripwire, and the same logits."""
    source = Checkpoint.open(tiny(name))
    applied = Applied(source, uneven(source))
    layout = Layout.of(applied.config)
    assert layout is not None
    assert {layer.layer: layer.widths(layout_width(source)) for layer in applied.plan.layers} == dict(layout.widths)
    name_of_wire = tripwire(applied.architecture, layout)
    assert b"".join(applied.chunks(name_of_wire)) == b"\0"
    assert applied.spec(name_of_wire).shape == (1,)
    folder = written(applied, tmp_path / "out")
    assert verify(folder, deep=True) == []
    rows = plain_rows()
    seen, stored = streamed_logits(applied, rows), streamed_logits(Checkpoint.open(folder), rows)
    assert largest_difference(seen, stored, rows) == 0.0
    config = json.loads((folder / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == {
        key: value for key, value in source.config.items() if key not in applied.architecture.extra_count_keys
    } | {key: config[key] for key in applied.architecture.extra_count_keys if key in config}


def layout_width(source: Checkpoint) -> int:
    return identify(source.config).layer_facts(source.config)[0].width


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_ragged_neurons_equal_zeroed_ones(name: str, tiny: Any) -> None:
    """Dropped neurons are as if their columns of the down matrix were zero: the router does not move."""
    source = Checkpoint.open(tiny(name))
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    random = np.random.default_rng(6)
    scores = {fact.layer: random.random((fact.experts, fact.width)) for fact in facts}
    layers = neuron_plans(facts, scores, 0.4)
    plan = Plan(source.fingerprint, entry.name, layers)
    assert plan.ragged(facts[0].width)

    picks = {layer.layer: layer.picks for layer in layers}

    class Zeroed(Checkpoint):
        def read(self, name: str, rows: range | None = None) -> torch.Tensor:
            tensor, claim = super().read(name, rows), entry.claim(name, self.config)
            if isinstance(claim.tensor, ExpertTensor) and claim.tensor.role == "down" and claim.layer is not None:
                experts = [claim.expert] if claim.expert is not None else range(8)
                for expert, down in zip(experts, tensor if claim.tensor.fused else [tensor], strict=True):
                    neurons = picks[claim.layer][expert].neurons
                    gone = [] if neurons is None else sorted(set(range(facts[0].width)) - set(neurons))
                    (down.T if claim.tensor.transposed else down)[:, gone] = 0
            return tensor

    rows = plain_rows()
    wanted = streamed_logits(Zeroed.open(tiny(name)), rows)
    assert largest_difference(wanted, streamed_logits(Applied(source, plan), rows), rows) <= REORDERED


def test_what_cannot_be_ragged_is_refused(tiny: Any) -> None:
    stored = Checkpoint.open(tiny("gpt_oss", stored="mxfp4"))
    plan = uneven(stored)
    with pytest.raises(PlanError, match="some neurons are gone, but mxfp4 has one scale for 32 neighbours"):
        Applied(stored, plan)
    whole = tuple(LayerPlan(p.layer, p.experts, tuple(Pick.keep(e) for e in p.kept)) for p in plan.layers)
    with pytest.raises(PlanError, match="layers or experts that differ, but mxfp4"):
        Applied(stored, Plan(stored.fingerprint, plan.architecture, whole))

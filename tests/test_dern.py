"""DERN: which experts stay, whose neurons go where, and what becomes of those that meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import UsageError
from moezip.merge.dern import DernParams, Neurons, choose, cluster, combined, neurons_of, solve
from moezip.merge.layer import Merge, MergeLayer
from moezip.plan.merged import expert_value
from tests.command import Cli, model_files, write_text
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
# float32: lengths are taken out and put back, which rounds a few times.
ROUNDING = 1e-5
# Found by trying: here clusters lose all their members while they move.
SEED_WITH_GAP = 851


class Held:
    """A source that is a dict: mixtral's names, every expert given as (gate, up, down)."""

    def __init__(self, experts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
        self.tensors = {
            f"model.layers.0.block_sparse_moe.experts.{number}.{name}.weight": value
            for number, expert in enumerate(experts)
            for name, value in zip(("w1", "w3", "w2"), expert, strict=True)
        }

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        value = self.tensors[name].clone()
        return value if rows is None else value[rows.start : rows.stop]


def layer_of(experts: list[Any], kept: list[int], mass: list[float], groups: int = 1) -> MergeLayer:
    width, hidden = experts[0][0].shape
    facts = LayerFacts(0, len(experts), 1, hidden, width, groups=groups)
    entry = identify({"model_type": "mixtral"})
    stats = {"gate_sum": np.array(mass), "counts": np.array(mass)}
    return MergeLayer(Held(experts), entry, facts, tuple((e,) for e in kept), stats)  # type: ignore[arg-type]


def random_expert(seed: int, width: int = 6, hidden: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, hidden, generator=chance) for _ in range(2))
    return gate, up, torch.randn(hidden, width, generator=chance)


def run(expert: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = expert
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def solved(found: Merge, layer: MergeLayer, number: int) -> tuple[torch.Tensor, ...]:
    expert = layer.groups[number][0]
    return tuple(
        found.values.get(expert_value(0, number, role), layer.matrix(expert, role))  # type: ignore[arg-type]
        for role in ("gate", "up", "down")
    )


# -- who stays ----------------------------------------------------------------------------------------------


def test_experts_of_the_largest_gate_mass_stay_and_ties_go_to_the_lower_id() -> None:
    facts = LayerFacts(0, 6, 1, 4, 4)
    stats = {"gate_sum": np.array([1.0, 5.0, 2.0, 2.0, 2.0, 0.0])}
    assert choose(facts, stats, 3, (), DernParams()) == [(1,), (2,), (3,)]


def test_every_router_group_keeps_as_many() -> None:
    facts = LayerFacts(0, 6, 1, 4, 4, groups=2)
    stats = {"gate_sum": np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])}
    assert choose(facts, stats, 4, (), DernParams()) == [(0,), (1,), (4,), (5,)]


# -- likeness -----------------------------------------------------------------------------------------------


def test_a_neuron_is_alike_to_itself_however_up_and_down_share_its_size_and_sign() -> None:
    gate, up, down = random_expert(0)
    scale = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0, -0.1])[:, None]
    one = Neurons.of((gate, up, down.T), True)
    other = Neurons.of((3 * gate, up * scale, down.T / scale), True)
    assert torch.allclose(one.similarity(other), torch.ones(6), atol=ROUNDING)
    assert one.nearest(other).tolist() == list(range(6))


def test_similarity_by_hand() -> None:
    # gates at 60 degrees (cos 1/2), ups opposite (-1), downs the same (1): (1/2 + |-1 + 1|) / 3 = 1/6;
    # without turning the same here, and with downs opposite too (1/2 + 2)/3 = 5/6 against (1/2 - 2)/3 = -1/2
    one = (torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 5.0]]))
    other = (torch.tensor([[0.5, 0.75**0.5]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, 0.1]]))
    for turns, against, wanted in ((True, 1, 1 / 6), (True, -1, 5 / 6), (False, -1, -1 / 2)):
        there = (*other[:2], against * other[2])
        found = Neurons.of(one, turns).similarity(Neurons.of(there, turns))
        assert found.item() == pytest.approx(wanted, abs=ROUNDING)


def test_wide_neurons_are_found_by_projections() -> None:
    # 3 x 500 numbers are above the limit; a planted neighbour at 0.9 stands out from chance (0.05) by far
    gate, up, down = random_expert(1, width=40, hidden=500)
    noise = random_expert(2, width=40, hidden=500)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    near = [0.9 * part[order] + 0.4 * other for part, other in zip((gate, up, down.T), (*noise[:2], noise[2].T))]
    one, other = Neurons.of(near, True).sketch(0), Neurons.of((gate, up, down.T), True).sketch(0)
    assert one.gate.shape[1] < 500
    assert torch.equal(one.nearest(other), order)


# -- what those that meet become ----------------------------------------------------------------------------


def test_two_neurons_become_one_by_hand() -> None:
    # weights 3 and 1. gate: directions (1, 0), (0, 1): sum (3, 1)/sqrt 10, lengths 2 and 6: mean 3.
    # up: (1, 0) of length 1, (-1, 0) of length 3, down (0, 1) of length 4, (0, -1) of length 2: the second is turned,
    # so the directions stay; mean of up (3 x 1 + 3)/4 = 1.5, of up x down (3 x 4 + 6)/4 = 4.5, so down 4.5 / 1.5 = 3
    parts = (
        torch.tensor([[2.0, 0.0], [0.0, 6.0]]),
        torch.tensor([[1.0, 0.0], [-3.0, 0.0]]),
        torch.tensor([[0.0, 4.0], [0.0, -2.0]]),
    )
    made = combined(Neurons.of(parts, True), torch.tensor([3.0, 1.0]), torch.tensor([0, 0]), 1)
    assert torch.allclose(made.gate, torch.tensor([[3.0, 1.0]]) / 10**0.5)
    assert torch.allclose(made.up, torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(made.down, torch.tensor([[0.0, 1.0]]))
    assert torch.allclose(made.lengths, torch.tensor([[3.0, 1.5, 3.0]]))


def test_no_cluster_stays_empty() -> None:
    # directions in the plane, weights of all sizes; in SEED_WITH_GAP a cluster loses all its members on the way
    for seed in (*range(20), SEED_WITH_GAP):
        chance = torch.Generator().manual_seed(seed)
        angle, weights = torch.rand(9, generator=chance) * 6.28, torch.rand(9, generator=chance) ** 4
        part = torch.stack([angle.cos(), angle.sin()], 1)
        label = cluster(Neurons.of((part, part, part), False), weights, 4, 10)
        assert set(label.tolist()) == {0, 1, 2, 3}


def test_equal_neurons_of_the_retained_expert_stay_apart() -> None:
    part = torch.ones(2, 3)
    members = Neurons.of((part, part, part), True)
    assert sorted(cluster(members, torch.ones(2), 2, 10).tolist()) == [0, 1]


# -- a layer ------------------------------------------------------------------------------------------------


def test_where_nothing_is_dropped_nothing_changes() -> None:
    layer = layer_of([random_expert(0), random_expert(1)], [0, 1], [1.0, 2.0])
    assert not solve(layer, DernParams(threshold=-1)).values


def test_threshold_1_is_plain_pruning_even_of_a_copy() -> None:
    layer = layer_of([random_expert(0), random_expert(0)], [0], [2.0, 1.0])
    found = solve(layer, DernParams(threshold=1))
    assert not found.values and [pick.kept for pick in found.picks] == [0]


def test_a_dropped_copy_in_other_order_scale_and_sign_changes_no_output() -> None:
    gate, up, down = random_expert(0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    scale = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0, -0.1])
    copy = gate[order], up[order] * scale[:, None], down[:, order] / scale
    layer = layer_of([(gate, up, down), random_expert(1), copy], [0, 1], [3.0, 2.0, 1.0])
    found = solve(layer, DernParams())
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(run(solved(found, layer, 0), x), run((gate, up, down), x), rtol=1e-4, atol=1e-4)
    assert {name.split(".")[3] for name in found.values} == {"0"}  # the other one had no visitors
    assert found.notes == ("6 of 6 neurons of dropped experts went to retained ones",)


def test_a_planted_neuron_goes_where_its_like_is_and_the_rest_stays_bit_by_bit() -> None:
    experts = [random_expert(seed) for seed in range(3)]
    gate, up, down = (part.clone() for part in experts[2])
    gate[4], up[4], down[:, 4] = 2 * experts[1][0][3], experts[1][1][3], 3 * experts[1][2][:, 3]
    layer = layer_of([*experts[:2], (gate, up, down)], [0, 1], [4.0, 3.0, 1.0])
    found = solve(layer, DernParams(threshold=0.9))
    assert found.notes[0].startswith("1 of 6")
    new, old = solved(found, layer, 1), experts[1]
    others = [0, 1, 2, 4, 5]
    assert torch.equal(new[0][others], old[0][others])
    assert torch.equal(new[1][others], old[1][others])
    assert torch.equal(new[2][:, others], old[2][:, others])
    # gate: lengths 1 and 2 with weights 3 and 1, mean 1.25; down: 1 and 3, mean 1.5
    assert torch.allclose(new[0][3], 1.25 * old[0][3], rtol=ROUNDING)
    assert torch.allclose(new[1][3], old[1][3], rtol=ROUNDING)
    assert torch.allclose(new[2][:, 3], 1.5 * old[2][:, 3], rtol=ROUNDING)
    assert all(torch.equal(a, b) for a, b in zip(solved(found, layer, 0), experts[0], strict=True))


def test_a_neuron_goes_no_farther_than_its_router_group() -> None:
    experts = [random_expert(seed) for seed in range(4)]
    experts[3] = experts[0]  # its like is in the other group
    layer = layer_of(experts, [0, 2], [2.0, 1.0, 2.0, 1.0], groups=2)
    assert not solve(layer, DernParams()).values


def test_experts_that_no_token_reached_are_averaged_without_a_nan() -> None:
    layer = layer_of([random_expert(0), random_expert(0)], [0], [0.0, 0.0])
    found = solve(layer, DernParams())
    assert found.values and all(bool(value.isfinite().all()) for value in found.values.values())


@pytest.mark.parametrize("settings", [{"threshold": 1.5}, {"rounds": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DernParams(**settings)


# -- families and the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tiny: Tiny, name: str) -> None:
    """A dropped copy of a retained expert leaves it as it is, whatever its form on disk; biases come along."""
    with Checkpoint.open(tiny(name)) as source:
        entry = identify(source.config, source.folder)
        facts = entry.layer_facts(source.config)[0]
        kept = [e for e in range(facts.experts) if e % (facts.experts // facts.groups) < 3]
        mass = np.arange(facts.experts, 0, -1.0)
        layer = MergeLayer(source, entry, facts, tuple((e,) for e in kept), {"gate_sum": mass})
        found = solve(layer, DernParams(threshold=-1))
        assert found.router == "kept" and found.values
        roles = {key.rpartition(".")[2] for key in found.values}
        assert roles == set(layer.roles) - {"down_bias"}
        for key, value in found.values.items():
            number, role = key.split(".")[3:]
            assert value.shape == layer.matrix(kept[int(number)], role).shape  # type: ignore[arg-type]
            assert bool(value.isfinite().all())
        own = neurons_of(layer, kept[0])
        assert torch.allclose(own.similarity(own), torch.ones(facts.width), atol=ROUNDING)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_command_writes_a_stock_checkpoint_and_repeats_itself(
    tiny: Tiny, cli: Cli, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    text = write_text(tmp_path / "text.jsonl")
    for out in ("a", "b"):
        answer = cli(
            "merge", tiny(name), tmp_path / out, "--method", "dern", "--keep", 6, "--data", text,
            "--set", "threshold=0.1",
        )  # fmt: skip
        assert answer.code == 0, answer.err
    assert model_files(tmp_path / "a") == model_files(tmp_path / "b")
    answer = cli("apply", tiny(name), tmp_path / "a" / "moezip" / "plan.json", tmp_path / "again")
    assert answer.code == 0, answer.err
    assert model_files(tmp_path / "again") == model_files(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert bool(model(torch.arange(5, 20)[None]).logits.isfinite().all())
    answer = cli(
        "merge", tiny(name), tmp_path / "all", "--method", "dern", "--keep", 8, "--data", text, "--set", "threshold=-1"
    )
    assert answer.code == 0, answer.err
    for file in (tmp_path / "all").glob("*.safetensors"):
        assert file.read_bytes() == (tiny(name) / file.name).read_bytes()

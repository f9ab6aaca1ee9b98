"""Neurons taken out of experts that are stored in fp8 blocks; layers and experts that differ, stored so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moezip
from moezip.arch.decoded import decoded
from moezip.arch.experts import read_expert
from moezip.arch.families import identify
from moezip.arch.layout import Layout
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import CheckpointError, PlanError
from moezip.export.verify import verify
from moezip.formats import fp8_block
from moezip.plan.apply import Applied
from moezip.plan.neurons import neuron_plans
from moezip.plan.plan import LayerPlan, Pick, Plan
from tests.test_laws import REORDERED, full_logits, largest_difference, load, plain_rows, streamed_logits, written

Tiny = Callable[..., Path]
# e4m3 has 3 bits behind the leading one: a rounded value is off by at most a sixteenth of itself or, below the
# normal range, by 2^-10 of the block's factor, that is 2^-10 / 448 of its largest value.
RELATIVE, SUBNORMAL = 1 / 16, 2**-10 / fp8_block.LARGEST
WIDTH, BLOCK = 64, 16  # four blocks of neurons in an expert


# -- blocks by themselves -----------------------------------------------------------------------------------


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_one_origin_are_copied(axis: int) -> None:
    block = (2, 4)
    codes, factors = fp8_block.encode(matrix(8, 16), block)
    size = block[axis]
    # the third block whole, then the first whole; codes and factors move together
    entries = [*range(2 * size, 3 * size), *range(size)]
    taken, scales = fp8_block.take(codes, factors, entries, axis, block)
    assert torch.equal(bits(taken), bits(codes).index_select(axis, torch.tensor(entries)))
    assert torch.equal(scales, factors.index_select(axis, torch.tensor([2, 0])))
    # every second entry of one block: still of one origin
    part, scale = fp8_block.take(codes, factors, list(range(0, size, 2)), axis, block)
    assert torch.equal(bits(part), bits(codes).index_select(axis, torch.arange(0, size, 2)))
    assert torch.equal(scale, factors.narrow(axis, 0, 1))


def test_blocks_of_mixed_origin_by_hand() -> None:
    # blocks of 2 x 2, values that e4m3 holds: rows 0 1 have factor 1 (largest 448), rows 2 3 factor 2 (896)
    weight = torch.tensor([[448.0, 8.0], [1.0, 2.0], [896.0, 4.0], [16.0, 32.0]])
    codes, factors = fp8_block.encode(weight, (2, 2))
    assert factors.flatten().tolist() == [1.0, 2.0]
    taken, scales = fp8_block.take(codes, factors, [0, 2, 3], 0, (2, 2))
    # rows 0 and 2 share the first new block: largest 896, factor 2, so codes 224, 4 and 448, 2. Row 3 is alone.
    assert scales.flatten().tolist() == [2.0, 2.0]
    assert taken.float().tolist() == [[224.0, 4.0], [448.0, 2.0], [8.0, 16.0]]
    assert torch.equal(fp8_block.decode(taken, scales, (2, 2), dtype=torch.float32), weight[[0, 2, 3]])


@pytest.mark.parametrize("axis", [0, 1])
def test_mixed_blocks_are_rounded_once_more(axis: int) -> None:
    codes, factors = fp8_block.encode(matrix(40, 48, seed=1) * 3, (16, 16))
    whole = fp8_block.decode(codes, factors, (16, 16), dtype=torch.float32)
    entries = torch.arange(0, 40, 3)
    taken, scales = fp8_block.take(codes, factors, entries.tolist(), axis, (16, 16))
    assert tuple(scales.shape) == fp8_block.scale_shape(*taken.shape, (16, 16))
    got, wanted = fp8_block.decode(taken, scales, (16, 16), dtype=torch.float32), whole.index_select(axis, entries)
    assert bool(((got - wanted).abs() <= wanted.abs() * RELATIVE + SUBNORMAL * float(wanted.abs().max())).all())
    assert not torch.equal(got, wanted)


def test_factors_that_are_powers_of_two_stay_so() -> None:
    weight = torch.tensor([[448.0, 1.0], [450.0, 3.0], [0.0, 0.0]])
    _, factors = fp8_block.encode(weight, (1, 2), powers_of_two=True)
    assert factors.flatten().tolist() == [1.0, 2.0, 1.0]  # 450 / 448 is a little above 1
    codes, factors = fp8_block.encode(matrix(32, 32) * 7, (16, 16), powers_of_two=True)
    _, scales = fp8_block.take(codes, factors, list(range(0, 32, 2)), 0, (16, 16), powers_of_two=True)
    assert bool((torch.frexp(scales).mantissa == 0.5).all())
    assert fp8_block.powers_of_two({"quantization_config": {"scale_fmt": "ue8m0"}})
    assert not fp8_block.powers_of_two({"quantization_config": {}})


# -- plans --------------------------------------------------------------------------------------------------


def stored(tiny: Tiny, name: str = "qwen3_moe", **options: Any) -> Checkpoint:
    return Checkpoint.open(tiny(name, stored="fp8", dtype="bfloat16", moe_intermediate_size=WIDTH, **options))


def plan_of(source: Checkpoint, neurons: Callable[[int, int], Any]) -> Plan:
    """Neurons by (layer, expert)."""
    entry = identify(source.config)
    layers = tuple(
        LayerPlan(
            fact.layer,
            fact.experts,
            tuple(Pick.slim(e, neurons(fact.layer, e), fact.width) for e in range(fact.experts)),
        )
        for fact in entry.layer_facts(source.config)
    )
    return Plan(source.fingerprint, entry.name, layers)


def raw(source: Any) -> Mapping[str, bytes]:
    return {name: b"".join(source.chunks(name)) for name in source.names()}


def require_same_experts(source: Checkpoint, output: Any, plan: Plan, relative: float) -> None:
    """Every expert of the output is the source's, decoded, with the neurons kept, to a relative error."""
    before, after, entry = decoded(source), decoded(output), identify(source.config)
    own = identify(output.config)
    for layer in plan.layers:
        for number, pick in enumerate(layer.picks):
            if pick.neurons == ():
                continue
            whole = read_expert(before, entry, layer.layer, pick.kept)
            got = read_expert(after, own, layer.layer, number)
            kept = torch.arange(WIDTH) if pick.neurons is None else torch.tensor(pick.neurons)
            for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
                wanted = getattr(whole, role).index_select(axis, kept).float()
                slack = wanted.abs() * relative + SUBNORMAL * bool(relative) * float(wanted.abs().max())
                assert bool(((getattr(got, role).float() - wanted).abs() <= slack).all()), (layer.layer, number, role)


def test_whole_blocks_are_the_source_s_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source = stored(tiny)
    plan = plan_of(source, lambda layer, e: [*range(BLOCK), *range(2 * BLOCK, 3 * BLOCK)])
    applied = Applied(source, plan)
    assert applied.requantised == 0
    name = "model.layers.1.mlp.experts.3.{}_proj.weight"
    kept = torch.tensor([*range(BLOCK), *range(2 * BLOCK, 3 * BLOCK)])
    for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
        key = name.format(role)
        assert torch.equal(bits(applied.read(key)), bits(source.read(key)).index_select(axis, kept))
        scales = source.read(key + "_scale_inv").index_select(axis, torch.tensor([0, 2]))
        assert torch.equal(applied.read(key + "_scale_inv"), scales)
    require_same_experts(source, applied, plan, relative=0.0)
    folder = written(applied, tmp_path / "narrow")
    assert verify(folder, deep=True) == []
    config = Checkpoint.open(folder).config
    assert config["moe_intermediate_size"] == 2 * BLOCK
    assert config["quantization_config"] == source.config["quantization_config"]


def test_one_width_loads_in_stock_transformers(tiny: Tiny, tmp_path: Path) -> None:
    source = stored(tiny)
    random = np.random.default_rng(0)
    facts = identify(source.config).layer_facts(source.config)
    scores = {fact.layer: random.random((fact.experts, fact.width)) for fact in facts}
    layers = neuron_plans(facts, scores, 0.5, uniform=True, step=BLOCK // 2)
    plan = Plan(source.fingerprint, "qwen3_moe", layers)
    applied = Applied(source, plan)
    assert applied.requantised == 3 * 8 * len(facts)
    require_same_experts(source, applied, plan, RELATIVE)
    for name in applied.names():
        whole = applied.read(name)
        assert b"".join(applied.chunks(name)) == whole.contiguous().view(torch.uint8).numpy().tobytes()
        assert tuple(whole.shape) == applied.spec(name).shape
    folder = written(applied, tmp_path / "narrow")
    before, after = (sum(s.spec(n).bytes for n in s.names()) for s in (source, Checkpoint.open(folder)))
    assert after < before
    rows = plain_rows()
    stock = full_logits(load(folder, dtype=torch.bfloat16), rows)  # without a GPU transformers decodes fp8, and says so
    assert largest_difference(stock, streamed_logits(Checkpoint.open(folder), rows, torch.bfloat16), rows) == 0.0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_experts_that_differ_keep_their_codes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source = stored(tiny, name)

    def neurons(layer: int, e: int) -> list[int]:
        return [] if e == 1 else list(range(0, WIDTH, 1 + (layer + e) % 3))

    plan = plan_of(source, neurons)
    applied = Applied(source, plan)
    layout = Layout.of(applied.config)
    assert layout is not None and layout.stored == source.config["quantization_config"]
    require_same_experts(source, applied, plan, RELATIVE)
    folder = written(applied, tmp_path / "ragged")
    assert verify(folder, deep=True) == []
    output = Checkpoint.open(folder)
    before, after = raw(source), raw(output)
    assert sum(map(len, after.values())) < sum(map(len, before.values()))
    for key, value in after.items():
        if ".mlp.experts." not in key:
            assert value == before[key], key
    rows = plain_rows()
    wanted = streamed_logits(output, rows)
    model = moezip.load(folder, dtype=torch.float32)
    model.config._experts_implementation = "eager"
    assert largest_difference(wanted, full_logits(model, rows), rows) < REORDERED
    with pytest.raises(CheckpointError, match="fp8 codes, which were decoded"):
        model.save_pretrained(tmp_path / "again")


def test_layers_with_different_numbers_of_experts(tiny: Tiny, tmp_path: Path) -> None:
    source = stored(tiny)
    facts = identify(source.config).layer_facts(source.config)
    layers = tuple(
        LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, range(fact.layer, fact.experts)))) for fact in facts
    )
    applied = Applied(source, Plan(source.fingerprint, "qwen3_moe", layers))
    assert applied.requantised == 0
    before = raw(source)
    for key, value in raw(applied).items():
        claim = identify(source.config).claim(key, source.config)
        if claim.kind == "expert" and claim.layer is not None and claim.expert is not None and len(value) > 1:
            origin = key.replace(f"experts.{claim.expert}.", f"experts.{claim.expert + claim.layer}.")
            assert value == before[origin], key
    folder = written(applied, tmp_path / "fewer")
    assert verify(folder, deep=True) == []
    rows = plain_rows()
    model = moezip.load(folder, dtype=torch.float32)
    model.config._experts_implementation = "eager"
    assert (
        largest_difference(streamed_logits(Checkpoint.open(folder), rows), full_logits(model, rows), rows) < REORDERED
    )


def test_mxfp4_is_refused_with_the_reason(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("gpt_oss", stored="mxfp4"))
    with pytest.raises(PlanError, match="one scale for 32 neighbours"):
        Applied(source, plan_of(source, lambda layer, e: range(16)))


def test_one_width_fills_its_blocks(tiny: Tiny) -> None:
    source = stored(tiny)
    with pytest.raises(PlanError, match=r"40 neurons do not fill .* blocks of \(16, 16\)"):
        Applied(source, plan_of(source, lambda layer, e: range(40)))


# -- commands -----------------------------------------------------------------------------------------------


def test_heapr_of_stored_blocks(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    source, text = stored(tiny, "deepseek_v3"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    saved = tmp_path / "stats.safetensors"
    common = ("--data", text, "--seq-len", 32, "--tokens", 256)
    # of 64 neurons 38 stay at 40 %: the largest multiple of the block of 16 is 32
    asked = ("prune", source.folder, tmp_path / "uniform", "--method", "heapr", "--ratio", 0.4, "--set", "uniform=true")
    answer = cli(*asked, *common, "--save-stats", saved)
    assert answer.code == 0, answer.err
    uniform = Checkpoint.open(tmp_path / "uniform")
    assert uniform.config["moe_intermediate_size"] == 32 and uniform.config["n_shared_experts"] == 2
    assert "Stored codes: re-quantised: 48 matrices" in (tmp_path / "uniform" / "README.md").read_text()
    assert "re-quantised" in answer.err + answer.out
    answer = cli("prune", source.folder, tmp_path / "ragged", "--method", "heapr", "--ratio", 0.4, "--stats", saved)
    assert answer.code == 0, answer.err
    out = Checkpoint.open(tmp_path / "ragged")
    layout = Layout.of(out.config)
    assert layout is not None and sum(map(sum, layout.widths.values())) == int(0.6 * 2 * 8 * 64)
    assert sum(out.spec(n).bytes for n in out.names()) < sum(source.spec(n).bytes for n in source.names())
    losses = [cli("evaluate", folder, "--data", text, "--seq-len", 32, "--json").json["nll"]
              for folder in (source.folder, tmp_path / "ragged", tmp_path / "uniform")]  # fmt: skip
    assert all(np.isfinite(losses)) and len(set(losses)) == 3


def test_heapr_of_mxfp4_is_refused(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("gpt_oss", stored="mxfp4")
    answer = cli("prune", folder, tmp_path / "out", "--method", "heapr", "--ratio", 0.4, "--data", tmp_path)
    assert answer.code == 2 and "one scale for 32 neighbours" in answer.err

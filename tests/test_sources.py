"""Quantized checkpoints of others as sources: read matrix by matrix, pruned code by code, or refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moezip.arch.decoded import Decoded, decoded
from moezip.arch.experts import check_shapes, read_expert
from moezip.arch.families import identify
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, CheckpointError, PlanError
from moezip.formats import gptq, packed
from moezip.formats.compressed_tensors import Targets
from moezip.formats.packed import Codes, Grid
from tests import tiny as make_tiny
from tests.command import Cli
from tests.test_families import Headers
from tests.test_laws import (
    full_logits,
    largest_difference,
    load,
    plain_rows,
    planned,
    some_experts,
    streamed_logits,
    written,
)

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
GROUP = 8  # divides every matrix of the tiny models
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")


def rounded(weight: torch.Tensor, grid: Grid) -> Codes:
    """Codes of a matrix, the nearest ones on a range as wide as each group's values."""
    rows, columns = weight.shape
    runs = weight.float().view(rows, grid.groups(columns), -1)
    low, high = runs.amin(2).clamp(max=0), runs.amax(2).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = grid.stored_scales(((high - low) / (grid.levels - 1)).clamp(min=1e-3))
    zeros = torch.full_like(scales, grid.levels // 2) if grid.symmetric else (-low / scales).round()
    zeros = zeros.clamp(1, grid.levels - 1)
    codes = (runs / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, grid.levels - 1)
    return Codes(
        grid, codes.view(rows, columns).to(torch.uint8), scales, None if grid.symmetric else zeros.to(torch.uint8)
    )


def tensors_of(folder: Path) -> Tensors:
    source = Checkpoint.open(folder)
    return {name: source.read(name) for name in source.names()}


def rewritten(folder: Path, output: Path, tensors: Tensors, quantization: Mapping[str, Any] | None) -> Path:
    """A copy of a checkpoint with other tensors and another ``quantization_config``."""
    output.mkdir(parents=True)
    for file in folder.iterdir():
        if ".safetensors" not in file.name:
            shutil.copyfile(file, output / file.name)
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (output / "config.json").write_text(json.dumps(config))
    make_tiny._write_shards(output, tensors, 2)
    return output


def quantized(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def group_of(grid: Grid, targets: list[str]) -> dict[str, Any]:
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric,
               "strategy": "group" if grid.group else "channel", "group_size": grid.group or None}  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def pack_quantized(groups: Mapping[str, Any], ignore: tuple[str, ...] = ("lm_head", r"re:.*\.gate$")) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": dict(groups), "ignore": list(ignore), "kv_cache_scheme": None, "sparsity_config": {},
    }  # fmt: skip


def ct_folder(
    plain: Path, output: Path, grids: Callable[[str], Grid | None], quantization: Mapping[str, Any]
) -> tuple[Path, Tensors]:
    """A pack-quantized form of a plain checkpoint, and the weights that it stands for."""
    stored, wanted = {}, {}
    for name, tensor in tensors_of(plain).items():
        grid = grids(name) if quantized(name) else None
        if grid is None:
            stored[name] = wanted[name] = tensor
            continue
        codes = rounded(tensor, grid)
        stored |= {name.removesuffix("weight") + suffix: part for suffix, part in packed.encode(codes).items()}
        wanted[name] = packed.dequantize(codes, tensor.dtype)
    return rewritten(plain, output, stored, quantization), wanted


def gptq_folder(plain: Path, output: Path, grid: Grid, less_one: bool = True, **more: Any) -> tuple[Path, Tensors]:
    """The same in GPTQ's form. Attention stays plain."""
    stored, wanted = {}, {}
    for name, tensor in tensors_of(plain).items():
        if ".experts." not in name:
            stored[name] = wanted[name] = tensor
            continue
        codes = rounded(tensor, grid)
        parts = gptq.encode(codes, less_one=less_one)
        stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        wanted[name] = packed.dequantize(codes, tensor.dtype)
    quantization = {
        "quant_method": "gptq", "bits": grid.bits, "group_size": grid.group or -1, "desc_act": False,
        "sym": grid.symmetric, "checkpoint_format": "gptq" if less_one else "gptq_v2",
        "dynamic": {r"-:.*self_attn": {}, r"-:.*\.gate$": {}}, **more,
    }  # fmt: skip
    return rewritten(plain, output, stored, quantization), wanted


def uniform(tiny: Tiny, output: Path, name: str, grid: Grid, **options: Any) -> tuple[Path, Tensors]:
    config = pack_quantized({"group_0": group_of(grid, ["Linear"])})
    return ct_folder(tiny(name, **options), output, lambda _: grid, config)


def require_equal(view: Any, wanted: Tensors) -> None:
    """The view has these tensors and no others; some are compared in parts too, and as bytes."""
    assert sorted(view.names()) == sorted(wanted)
    for name, tensor in wanted.items():
        whole = view.read(name)
        assert torch.equal(whole, tensor) and whole.dtype == tensor.dtype, name
        assert view.spec(name).shape == tuple(tensor.shape)
        if "layers.1." not in name or ("experts.5" not in name and "experts" in name):
            continue
        raw = whole.contiguous().view(torch.uint8).numpy().tobytes()
        assert b"".join(map(bytes, view.chunks(name))) == raw
        for start, stop in ((0, 1), (3, 7), (5, 5), (len(tensor) - 1, len(tensor))):
            if tensor.dim() == 2 and stop <= len(tensor):
                assert torch.equal(view.read(name, range(start, stop)), tensor[start:stop])


@pytest.fixture(scope="module")
def four_bits(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder, _ = uniform(tiny, tmp_path_factory.mktemp("four") / "packed", "qwen3_moe", Grid(4, GROUP, True))
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def four_bits_gptq(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder, _ = gptq_folder(tiny("qwen3_moe"), tmp_path_factory.mktemp("four") / "gptq", Grid(4, GROUP, True))
    return Checkpoint.open(folder)


def require_refused(source: Checkpoint, change: Callable[[dict[str, Any]], None], words: str) -> None:
    """The same tensors with a changed ``quantization_config``: an error that says what next."""
    config = copy.deepcopy(source.config)
    change(config["quantization_config"])
    with pytest.raises(ArchitectureError, match=words) as caught:
        decoded(Headers(source, config))  # type: ignore[arg-type]
    assert caught.value.next is not None


# -- pack-quantized -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [Grid(4, GROUP, True), Grid(3, GROUP), Grid(8, 0, True, "BF16"), Grid(5, 0), Grid(2, GROUP, True, "F32")],
    ids=str,
)
def test_pack_quantized_reads_as_its_weights(grid: Grid, tiny: Tiny, tmp_path: Path) -> None:
    folder, wanted = uniform(tiny, tmp_path / "packed", "qwen3_moe", grid)
    source = Checkpoint.open(folder)
    view, entry = decoded(source), identify(source.config)
    assert isinstance(view, Decoded) and "quantization_config" not in view.config
    require_equal(view, wanted)
    check_shapes(source, entry)
    up = read_expert(view, entry, 1, 3).up
    assert torch.equal(up, wanted["model.layers.1.mlp.experts.3.up_proj.weight"])
    # And what it stands for is near what it was made of: within a step.
    plain = Checkpoint.open(tiny("qwen3_moe")).read("model.layers.1.mlp.experts.3.up_proj.weight")
    assert float((up - plain).abs().max()) <= 2 * float(plain.abs().max()) / (2**grid.bits - 1)


@pytest.mark.parametrize("name", EXPERTS)
def test_pack_quantized_streams_like_its_plain_form(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = uniform(tiny, tmp_path / "packed", name, Grid(4, GROUP), dtype="bfloat16")
    source, rows = Checkpoint.open(folder), plain_rows()
    plain = written(decoded(source), tmp_path / "plain")
    wanted = full_logits(load(plain, torch.bfloat16), rows)
    assert largest_difference(wanted, streamed_logits(source, rows, torch.bfloat16), rows) == 0.0


def test_large_matrices_are_decoded_in_pieces(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 96 rows of 8 codes, of which 32 rows are decoded at a time.
    grid = Grid(3, 8)
    weight = torch.randn((96, 8), generator=torch.Generator().manual_seed(0))
    codes = rounded(weight, grid)
    name = "model.layers.0.self_attn.q_proj."
    tensors = {name + suffix: part for suffix, part in packed.encode(codes).items()}
    config = pack_quantized({"g": group_of(grid, ["Linear"])})
    view = decoded(Checkpoint.open(rewritten(tiny("qwen3_moe"), tmp_path / "one", tensors, config)))
    monkeypatch.setattr("moezip.formats.packed_matrix.CHUNK", 1)
    assert len(list(view.chunks(f"{name}weight"))) == 3
    require_equal(view, {f"{name}weight": packed.dequantize(codes)})


def test_groups_by_layer_and_module_are_followed(tiny: Tiny, tmp_path: Path) -> None:
    narrow, wide, exact = Grid(2, GROUP, True), Grid(4, 32, True), Grid(8, GROUP)
    name = "model.layers.1.self_attn.k_proj"

    def grids(tensor: str) -> Grid | None:
        if tensor == f"{name}.weight":
            return exact
        if ".experts." in tensor:
            return narrow if "layers.1." in tensor or "down_proj" in tensor else wide
        return None if "layers.2.self_attn" in tensor else Grid(6, 0)

    config = pack_quantized(
        {
            "everything else": group_of(Grid(6, 0), ["Linear"]),
            "narrow": group_of(narrow, [r"re:.*layers\.1\.mlp\.experts", r"re:.*experts\.\d+\.down_proj$"]),
            "wide": group_of(wide, [r"re:model\.layers\.(0|2)\.mlp\.experts\.\d+\.(gate|up)_proj$"]),
            "exact": group_of(exact, [name]),
        },
        ignore=("lm_head", r"re:.*\.gate$", r"re:.*layers\.2\.self_attn"),
    )
    folder, wanted = ct_folder(tiny("qwen3_moe"), tmp_path / "mixed", grids, config)
    require_equal(decoded(Checkpoint.open(folder)), wanted)


def test_the_most_particular_target_counts() -> None:
    targets = Targets(("Linear", r"re:b.*", "b.c", r"re:.*c"))
    assert targets.find("b.c") == "b.c"
    # Among expressions the first in the alphabet, "." before "b"; each from the beginning of the name.
    assert [targets.find(name) for name in ("b.xc", "b.x", "x.b")] == [r"re:.*c", r"re:b.*", "Linear"]
    assert Targets((r"re:b.*",)).find("x.b") is None


@pytest.mark.parametrize("none", [False, True])
def test_stored_column_order(none: bool, tiny: Tiny, tmp_path: Path) -> None:
    grid = Grid(4, GROUP, True)
    config = pack_quantized({"g": group_of(grid, ["Linear"])})
    config["config_groups"]["g"]["weights"]["actorder"] = "group"
    folder, wanted = ct_folder(tiny("mixtral"), tmp_path / "packed", lambda _: grid, config)
    tensors, order = tensors_of(folder), {}
    for name in wanted:
        if quantized(name):
            columns = wanted[name].shape[1]
            picked = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) // GROUP
            order[name] = torch.full_like(picked, -1) if none else picked
            tensors[name.removesuffix("weight") + "weight_g_idx"] = order[name].to(torch.int32)
    if not none:
        for name, picked in order.items():
            stem = name.removesuffix("weight")
            parts = {suffix: tensors[stem + suffix] for suffix in grid.specs(*wanted[name].shape)}
            wanted[name] = packed.dequantize(packed.decode(parts, grid), order=picked)
    view = decoded(Checkpoint.open(rewritten(folder, tmp_path / "ordered", tensors, config)))
    require_equal(view, wanted)


def test_pack_quantized_loads_alike_in_transformers(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    # Full precision throughout: others compute the product in the scale's dtype.
    folder, _ = uniform(tiny, tmp_path / "packed", "qwen3_moe", Grid(4, GROUP, True, "F32"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    source, rows = Checkpoint.open(folder), plain_rows()
    # A bound, not equality: weights of a mapped file may be multiplied in another order than aligned copies.
    assert largest_difference(full_logits(model, rows), streamed_logits(source, rows), rows) < 1e-4


def changed(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(keys)


def group_changed(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"].update(keys)


def weights_changed(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(quant_method="awq"), "quant_method 'awq'"),
        (changed(quant_method="bitsandbytes"), "quant_method 'bitsandbytes'"),
        (changed(format="int-quantized"), "format 'int-quantized'"),
        (changed(quantization_status="frozen"), "'frozen'"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (changed(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (changed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (changed(config_groups={}), "no config_groups"),
        (changed(config_groups={"W4A16": ["Linear"]}), "no list of targets"),
        (changed(ignore="lm_head"), "no list of names"),
        (changed(ignore=["re:.*experts"]), "is not quantized"),
        (group_changed(targets=["re:.*self_attn"]), r"experts\.\d+\.\w+_proj is not quantized"),
        (group_changed(format="float-quantized"), "format 'float-quantized'"),
        (group_changed(input_activations={"num_bits": 8}), "quantizes activations"),
        (group_changed(weights=None), "does not quantize weights"),
        (weights_changed(type="float"), "'float'"),
        (weights_changed(num_bits=1), "1 bits"),
        (weights_changed(num_bits=3), "int3-g8-sym by the config"),
        (weights_changed(strategy="block"), "scales per block"),
        (weights_changed(strategy="tensor", group_size=None), "scales per tensor"),
        (weights_changed(group_size=32), "int4-g32-sym by the config"),
        (weights_changed(symmetric=False), "int4-g8 by the config"),
        (weights_changed(dynamic=True), "dynamically"),
        (weights_changed(actorder="spiral"), "'spiral'"),
        (weights_changed(actorder="group"), "no weight_g_idx"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, four_bits: Checkpoint
) -> None:
    require_refused(four_bits, change, words)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_shape", "weight_packed"])
def test_a_missing_piece_is_noticed(suffix: str, four_bits: Checkpoint) -> None:
    hole = {f"model.layers.1.mlp.experts.4.up_proj.{suffix}": None}
    with pytest.raises(ArchitectureError, match=r"layers\.1\.mlp\.experts\.4\.up_proj"):
        decoded(Headers(four_bits, **hole))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "value"), [("weight_shape", 33), ("weight_scale", -1.0), ("weight_scale", torch.inf)]
)
def test_damage_is_noticed_when_it_is_read(suffix: str, value: float, tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = uniform(tiny, tmp_path / "packed", "qwen3_moe", Grid(3, GROUP))
    tensors, config = tensors_of(folder), Checkpoint.open(folder).config["quantization_config"]
    tensors[f"model.layers.1.mlp.experts.4.up_proj.{suffix}"].view(-1)[-1] = value
    view = decoded(Checkpoint.open(rewritten(folder, tmp_path / "damaged", tensors, config)))
    view.read("model.layers.1.mlp.experts.3.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"(?s)weight_shape|positive number.*experts\.4\.up_proj"):
        view.read("model.layers.1.mlp.experts.4.up_proj.weight")


def test_codes_without_a_config_are_no_plain_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = uniform(tiny, tmp_path / "packed", "qwen3_moe", Grid(4, GROUP))
    source = Checkpoint.open(rewritten(tiny("qwen3_moe"), tmp_path / "bare", tensors_of(folder), None))
    with pytest.raises(ArchitectureError, match="no quantization_config"):
        decoded(source)


def test_routers_of_codes_are_refused(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    entry = identify(source.config)
    for suffix in ("weight_packed", "weight_scale", "qweight"):
        with pytest.raises(ArchitectureError, match="router"):
            entry.claim(f"model.layers.0.mlp.gate.{suffix}", source.config)


# -- GPTQ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid(4, GROUP, True), Grid(8, GROUP), Grid(4, 0)], ids=str)
@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_reads_as_its_weights(grid: Grid, less_one: bool, tiny: Tiny, tmp_path: Path) -> None:
    folder, wanted = gptq_folder(tiny("qwen3_moe"), tmp_path / "gptq", grid, less_one)
    source = Checkpoint.open(folder)
    require_equal(decoded(source), wanted)
    check_shapes(source, identify(source.config))


def test_gptq_widths_by_layer(tiny: Tiny, tmp_path: Path) -> None:
    eight = {r"+:.*layers\.1\.mlp\.experts": {"bits": 8, "group_size": -1}}
    four, wanted = gptq_folder(tiny("mixtral"), tmp_path / "four", Grid(4, GROUP, True))
    other, wanted_other = gptq_folder(tiny("mixtral"), tmp_path / "eight", Grid(8, 0, True))
    tensors = tensors_of(four)
    place = "model.layers.1.block_sparse_moe.experts."
    tensors |= {name: tensor for name, tensor in tensors_of(other).items() if name.startswith(place)}
    wanted |= {name: tensor for name, tensor in wanted_other.items() if name.startswith(place)}
    config = Checkpoint.open(four).config["quantization_config"]
    mixed = config | {"dynamic": {r"+:.*layers\.1\.block_sparse_moe\.experts": eight.popitem()[1], **config["dynamic"]}}
    require_equal(decoded(Checkpoint.open(rewritten(four, tmp_path / "mixed", tensors, mixed))), wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(checkpoint_format="marlin"), "'marlin'"),
        (changed(bits=3), "3 bits"),
        (changed(bits=8), "8 bits in groups"),
        (changed(group_size=32), "groups of 32"),
        (changed(group_size=0), "group_size 0"),
        (changed(pack_dtype="int16"), "'int16'"),
        (changed(dynamic={"-:.*experts": {}}), "is not quantized"),
    ],
)  # fmt: skip
def test_gptq_that_is_not_understood_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, four_bits_gptq: Checkpoint
) -> None:
    require_refused(four_bits_gptq, change, words)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_missing_piece_of_gptq_is_noticed(suffix: str, four_bits_gptq: Checkpoint) -> None:
    hole = {f"model.layers.1.mlp.experts.4.up_proj.{suffix}": None}
    with pytest.raises(ArchitectureError, match=f"stored without {suffix}"):
        decoded(Headers(four_bits_gptq, **hole))  # type: ignore[arg-type]


# -- pruning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pack-quantized", "gptq"])
@pytest.mark.parametrize("name", EXPERTS)
def test_pruning_copies_codes_and_keeps_the_config(form: str, name: str, tiny: Tiny, tmp_path: Path) -> None:
    if form == "gptq":
        folder, _ = gptq_folder(tiny(name), tmp_path / "stored", Grid(4, GROUP, True))
    else:
        folder, _ = uniform(tiny, tmp_path / "stored", name, Grid(3, GROUP))
    source, rows = Checkpoint.open(folder), plain_rows()
    view = planned(source, some_experts)
    output = Checkpoint.open(written(view, tmp_path / "pruned"))
    assert output.config["quantization_config"] == source.config["quantization_config"]
    kept = {layer.layer: layer.kept for layer in view.plan.layers}
    pieces = 0
    for target in output.names():
        claim = view.architecture.claim(target, output.config)
        if claim.kind == "expert" and claim.layer is not None and claim.expert is not None:
            origin = target.replace(f"experts.{claim.expert}.", f"experts.{kept[claim.layer][claim.expert]}.")
            assert b"".join(map(bytes, output.chunks(target))) == b"".join(map(bytes, source.chunks(origin)))
            pieces += bool(claim.suffix)
    # Three matrices of four pieces each, for every kept expert.
    assert pieces == 12 * sum(map(len, kept.values()))
    # It is the model that pruning its plain form gives.
    plain = Checkpoint.open(written(decoded(source), tmp_path / "plain"))
    wanted = streamed_logits(planned(plain, some_experts), rows)
    assert largest_difference(wanted, streamed_logits(output, rows), rows) == 0.0


def test_pruning_where_experts_are_told_apart_by_number(tiny: Tiny, tmp_path: Path) -> None:
    few = r"re:.*experts\.[0-3]\."
    config = pack_quantized({"few": group_of(Grid(2, GROUP), [few]), "rest": group_of(Grid(4, GROUP), ["Linear"])})

    def grids(name: str) -> Grid:
        return Grid(2 if re.search(few[5:], name) else 4, GROUP)

    folder, wanted = ct_folder(tiny("mixtral"), tmp_path / "mixed", grids, config)
    source = Checkpoint.open(folder)
    require_equal(decoded(source), wanted)
    with pytest.raises(PlanError, match="under their new numbers"):
        planned(source, lambda _: range(2, 8))
    planned(source, lambda _: [3, 2, 1, 0, 7, 6])  # numbers stay on their side of 4


def test_commands_read_a_packed_checkpoint(tiny: Tiny, tmp_path: Path, cli: Cli) -> None:
    folder, _ = uniform(tiny, tmp_path / "packed", "qwen3_moe", Grid(4, GROUP))
    told = json.loads(cli("inspect", folder, "--json").out)
    plain = json.loads(cli("inspect", tiny("qwen3_moe"), "--json").out)
    assert told["quantization"] == "compressed-tensors"
    assert {key: told[key] for key in ("parameters", "expert_parameters", "experts")} == {
        key: plain[key] for key in ("parameters", "expert_parameters", "experts")
    }
    assert told["bytes"] < plain["bytes"]
    assert cli("prune", folder, tmp_path / "out", "--method", "random", "--keep", 4).code == 0
    assert cli("verify", tmp_path / "out").code == 0
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    scored = cli("evaluate", tmp_path / "out", "--data", text, "--seq-len", 32, "--json")
    assert scored.code == 0 and json.loads(scored.out)["nll"] > 0

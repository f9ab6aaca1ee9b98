"""What a packed checkpoint says of itself in other formats, and that it is read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moezip.arch.decoded import decoded
from moezip.arch.families import ARCHITECTURES
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import PlanError
from moezip.export import compressed_tensors, gptq
from moezip.formats import packed
from moezip.formats.packed import Grid
from tests.test_laws import full_logits, largest_difference, plain_rows, streamed_logits
from tests.test_sources import GROUP, require_equal, rewritten, rounded, tensors_of

Tiny = Callable[..., Path]
Grids = dict[str, Grid]
Shapes = dict[str, tuple[int, ...]]
QWEN = ARCHITECTURES["qwen3_moe"]


def small_model(layers: int = 3, experts: int = 2) -> Shapes:
    """Names and shapes of a model; no tensors."""
    shapes: Shapes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {f"{stem}self_attn.{role}_proj.weight": (32, 32) for role in "qkvo"}
        shapes |= {f"{stem}mlp.gate.weight": (experts, 32), f"{stem}input_layernorm.weight": (32,)}
        for expert in range(experts):
            place = f"{stem}mlp.experts.{expert}."
            shapes |= {f"{place}gate_proj.weight": (16, 32), f"{place}up_proj.weight": (16, 32)}
            shapes[f"{place}down_proj.weight"] = (32, 16)
    return shapes


def experts_on(shapes: Shapes, grid_of_layer: Callable[[int], Grid | None]) -> Grids:
    grids = {name: grid_of_layer(int(name.split(".")[2])) for name in shapes if ".experts." in name}
    return {name: grid for name, grid in grids.items() if grid is not None}


# -- compressed-tensors -------------------------------------------------------------------------------------


def test_config_worked_by_hand() -> None:
    shapes = small_model()
    grids = experts_on(shapes, lambda layer: Grid(3, 32) if layer == 1 else Grid(4, 0, True))
    grids["model.layers.2.self_attn.o_proj.weight"] = Grid(4, 0, True)
    config = compressed_tensors.quantization_config(QWEN, grids, shapes)
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    groups = [(group["targets"], group["weights"]) for group in config["config_groups"].values()]
    common: dict[str, Any] = {"type": "int", "dynamic": False}
    channel = {**common, "num_bits": 4, "symmetric": True, "strategy": "channel", "group_size": None}
    grouped = {**common, "num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 32}
    assert groups == [
        ([r"re:.*layers\.1\.mlp\.experts\..*"], grouped),
        ([r"re:.*layers\.(0|2)\.mlp\.experts\..*"], channel),
        ([r"re:.*layers\.2\.self_attn\.o_proj$"], channel),
    ]
    assert config["ignore"] == [
        r"re:model\.embed_tokens$", "lm_head",
        # Of layers 0 and 1 nothing in the attention is packed, of layer 2 one matrix is.
        r"re:.*layers\.\d+\.self_attn\.q_proj$", r"re:.*layers\.\d+\.self_attn\.k_proj$",
        r"re:.*layers\.\d+\.self_attn\.v_proj$", r"re:.*layers\.(0|1)\.self_attn\..*", r"re:.*layers\.\d+\.mlp\.gate$",
    ]  # fmt: skip


def test_attention_that_is_plain_is_named_as_a_block() -> None:
    shapes = small_model()
    config = compressed_tensors.quantization_config(QWEN, experts_on(shapes, lambda _: Grid(4, 16)), shapes)
    assert config["ignore"] == [
        r"re:model\.embed_tokens$", "lm_head", r"re:.*layers\.\d+\.self_attn\..*", r"re:.*layers\.\d+\.mlp\.gate$",
    ]  # fmt: skip
    assert [group["targets"] for group in config["config_groups"].values()] == [[r"re:.*layers\.\d+\.mlp\.experts\..*"]]


def test_the_scales_dtype_is_not_written() -> None:
    shapes = small_model()
    grids = experts_on(shapes, lambda layer: Grid(4, 16, scale="BF16" if layer else "F16"))
    assert len(compressed_tensors.quantization_config(QWEN, grids, shapes)["config_groups"]) == 1


def odd(name: str, grid: Grid | None) -> Grids:
    grids: Grids = experts_on(small_model(), lambda _: Grid(4, 16))
    full = f"model.layers.1.mlp.experts.1.{name}.weight"
    if grid is None:
        del grids[full]
    else:
        grids[full] = grid
    return grids


@pytest.mark.parametrize(
    ("grids", "words"),
    [
        (odd("up_proj", Grid(2, 16)), "experts of layer 1 are stored differently"),
        (odd("up_proj", Grid(4, 16, True)), "experts of layer 1 are stored differently"),
        (odd("down_proj", None), "experts of layer 1 are stored differently .*plain"),
        (odd("up_proj", Grid(1, 16)), "one bit"),
        (odd("up_proj", Grid(4, 16, double=True)), "scales in 8 bits"),
        ({}, "nothing is packed"),
        ({"model.layers.9.mlp.experts.0.up_proj.weight": Grid(4, 16)}, "no such matrix"),
    ],
)
def test_what_compressed_tensors_cannot_say(grids: Grids, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        compressed_tensors.quantization_config(QWEN, grids, small_model())


def test_ragged_and_fused_models_are_refused() -> None:
    shapes = small_model()
    narrow = shapes | {"model.layers.2.mlp.experts.1.up_proj.weight": (8, 32)}
    fewer = {name: shape for name, shape in shapes.items() if "layers.2.mlp.experts.1" not in name}
    for change, words in ((narrow, "differ in width"), (fewer, "number of experts: {0: 2, 1: 2, 2: 1}")):
        with pytest.raises(PlanError, match=words):
            compressed_tensors.quantization_config(QWEN, experts_on(change, lambda _: Grid(4, 16)), change)
    with pytest.raises(PlanError, match="in one tensor"):
        compressed_tensors.quantization_config(ARCHITECTURES["granitemoe"], {}, shapes)


def test_who_misreads_what() -> None:
    shapes = small_model()

    def reason(grids: Grids, dtype: str = "F16") -> str | None:
        config = compressed_tensors.quantization_config(QWEN, grids, shapes)
        return compressed_tensors.misread(config, {grid.scale for grid in grids.values()}, dtype)

    same = experts_on(shapes, lambda _: Grid(4, 16, True))
    assert reason(same) is None
    assert "F16 in a BF16 model" in str(reason(same, "BF16"))
    assert "zeros" in str(reason(experts_on(shapes, lambda _: Grid(4, 16))))
    assert "like the first" in str(reason(experts_on(shapes, lambda layer: Grid(4 - layer, 16, True))))
    attention = {f"model.layers.{layer}.self_attn.q_proj.weight": Grid(8, 0, True) for layer in range(3)}
    assert reason(same | attention) is None
    attention["model.layers.1.self_attn.q_proj.weight"] = Grid(6, 0, True)
    assert "outside the experts" in str(reason(same | attention))


def packed_by(grids: Callable[[str], Grid | None], plain: dict[str, torch.Tensor]) -> tuple[Grids, Shapes]:
    found = {name: grid for name in plain if name.endswith("_proj.weight") and (grid := grids(name)) is not None}
    return found, {name: tuple(tensor.shape) for name, tensor in plain.items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen2_moe"])
def test_what_is_written_is_read_back(name: str, tiny: Tiny, tmp_path: Path) -> None:
    def grids(tensor: str) -> Grid | None:
        if ".experts." in tensor:
            return Grid(2, GROUP) if ".layers.2." in tensor else Grid(3, GROUP, True)
        return Grid(8, 0) if "o_proj" in tensor or ("layers.1" in tensor and "shared" not in tensor) else None

    plain = tensors_of(tiny(name))
    chosen, shapes = packed_by(grids, plain)
    stored: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for tensor, value in plain.items():
        if tensor in chosen:
            codes = rounded(value, chosen[tensor])
            stored |= {tensor.removesuffix("weight") + suffix: part for suffix, part in packed.encode(codes).items()}
            wanted[tensor] = packed.dequantize(codes)
        else:
            stored[tensor] = wanted[tensor] = value
    config = compressed_tensors.quantization_config(ARCHITECTURES[name], chosen, shapes)
    folder = rewritten(tiny(name), tmp_path / "out", stored, config)
    require_equal(decoded(Checkpoint.open(folder)), wanted)


@pytest.mark.parametrize(("scale", "dtype"), [("F32", "float32"), ("BF16", "bfloat16")])
def test_transformers_reads_what_is_written(scale: str, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    source = tiny("qwen3_moe", dtype=dtype)
    plain = tensors_of(source)
    expert, other = Grid(3, GROUP, True, scale), Grid(6, 0, True, scale)
    chosen, shapes = packed_by(lambda name: expert if ".experts." in name else other, plain)
    stored: dict[str, torch.Tensor] = {}
    for name, value in plain.items():
        if name in chosen:
            parts = packed.encode(rounded(value, chosen[name]))
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        else:
            stored[name] = value
    config = compressed_tensors.quantization_config(QWEN, chosen, shapes)
    assert compressed_tensors.misread(config, {scale}, scale) is None
    folder = rewritten(source, tmp_path / "out", stored, config)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, experts_implementation="eager").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # aligned memory, as in test_laws.load
    rows = plain_rows()
    streamed = streamed_logits(Checkpoint.open(folder), rows, kind)
    assert largest_difference(full_logits(model, rows), streamed, rows) == 0.0


# -- GPTQ ---------------------------------------------------------------------------------------------------


def test_gptq_config_worked_by_hand() -> None:
    shapes = small_model()
    grids = experts_on(shapes, lambda layer: Grid(8, 0, True) if layer == 1 else Grid(4, 16, True))
    config = gptq.quantization_config(QWEN, grids, shapes)
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32",
        "dynamic": {
            r"+:.*layers\.1\.mlp\.experts\..*": {"bits": 8, "group_size": -1, "sym": True},
            r"-:model\.embed_tokens$": {}, r"-:.*layers\.\d+\.self_attn\..*": {}, r"-:.*layers\.\d+\.mlp\.gate$": {},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("grids", "words"),
    [
        (odd("up_proj", Grid(3, 16, True)), "4 or 8 bits"),
        (odd("up_proj", Grid(4, 16, double=True)), "plain scales"),
        (odd("up_proj", Grid(8, 16)), "experts of layer 1 are stored differently"),
        ({}, "nothing is packed"),
        ({"model.layers.0.mlp.gate.weight": Grid(4, 32)}, "whole words"),  # two rows
    ],
)
def test_what_gptq_cannot_say(grids: Grids, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        gptq.quantization_config(QWEN, grids, small_model())


def test_gptq_is_read_back(tiny: Tiny, tmp_path: Path) -> None:
    plain = tensors_of(tiny("mixtral"))
    chosen = {
        name: Grid(8, 0, True) if "layers.1" in name else Grid(4, GROUP, True) for name in plain if ".experts." in name
    }
    stored: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for name, value in plain.items():
        if name in chosen:
            codes = rounded(value, chosen[name])
            stored |= gptq.tensors(name, codes)
            wanted[name] = packed.dequantize(codes)
        else:
            stored[name] = wanted[name] = value
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
    config = gptq.quantization_config(ARCHITECTURES["mixtral"], chosen, shapes)
    require_equal(decoded(Checkpoint.open(rewritten(tiny("mixtral"), tmp_path / "out", stored, config))), wanted)

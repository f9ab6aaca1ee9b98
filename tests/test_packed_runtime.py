"""Packed checkpoints: they load with the codes as they are, run as their decoded form does, and save the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moezip
from moezip.arch.families import ARCHITECTURES
from moezip.arch.packing import packing_of
from moezip.arch.ragged import RaggedExperts
from moezip.calibrate.experts import IMPLEMENTATION, register
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError
from moezip.export.compressed_tensors import quantization_config
from moezip.export.verify import verify
from moezip.formats.packed import PACKED, SCALE, SHAPE, STEP, ZERO, Codes, Grid, decode, dequantize, encode
from moezip.kernels import products
from moezip.pipeline.common import opened
from moezip.pipeline.items import Item, items_of
from moezip.plan.packed import Packed as PackedView
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as rtn
from moezip.runtime import int4, linear
from moezip.runtime.linear import Packed, PackedExperts, PackedLinear, decoded, packed_linear
from moezip.runtime.packing import packed_modules
from tests.test_laws import full_logits, largest_difference, plain_rows
from tests.test_ragged import edited, everything, kept_of, ragged

Tiny = Callable[..., Path]
families = pytest.mark.parametrize("name", ARCHITECTURES)
# One of every kind, so that neighbours differ in everything; None: not packed.
MIX: tuple[Grid | None, ...] = (
    Grid(4, 8),
    Grid(2, 8, symmetric=True),
    Grid(3, 0, scale="BF16"),
    None,
    Grid(1, 8),
    Grid(8, 8, symmetric=True),
    Grid(6, 16, double=True),
    Grid(5, 0, symmetric=True, scale="F32"),
    Grid(7, 8, scale="BF16", double=True),
)


# -- fixtures -----------------------------------------------------------------------------------------------


class Solved:
    """Codes in memory, by name, and the grids that they are on, which may have other scales than was asked for."""

    def __init__(self, base: Any, packing: Mapping[str, Grid]):
        self.tensors: dict[str, torch.Tensor] = {}
        self.grids: dict[str, Grid] = {}
        for name, grid in packing.items():
            codes = rtn(base.read(name), None, grid, RtnParams()).codes
            self.grids[name] = codes.grid
            self.tensors |= {name.removesuffix("weight") + suffix: value for suffix, value in encode(codes).items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows.start : rows.stop]


def mixed(items: list[Item]) -> dict[str, Grid]:
    """The kinds of MIX in turns; where a group does not divide the row, one scale for all of it."""
    chosen = ((item, MIX[number % len(MIX)]) for number, item in enumerate(items))
    return {item.name: fitted(item, grid) for item, grid in chosen if grid is not None}


def fitted(item: Item, grid: Grid) -> Grid:
    return replace(grid, group=0) if grid.group and item.shape[1] % grid.group else grid


def written(source: Any, folder: Path, out: Path) -> Path:
    """A source as one shard, with the other files of ``folder``."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(source.config))
    tensors = {name: source.read(name).contiguous() for name in source.names()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def packed(
    folder: Path,
    out: Path,
    choose: Callable[[list[Item]], dict[str, Grid]] = mixed,
    kept: Callable[[Checkpoint], Any] = kept_of,
) -> Path:
    """The checkpoint in ``folder`` with the experts ``kept`` and the matrices that ``choose`` names as codes."""
    base = Checkpoint.open(ragged(folder, out / "plain", kept(Checkpoint.open(folder))))
    solved = Solved(base, choose(items_of(base, opened(str(base.folder)))))
    return written(PackedView(base, solved.grids, solved), base.folder, out / "packed")


def load(folder: Path, implementation: str = "eager", **more: Any) -> Any:
    """As a user loads it; then plain weights moved to aligned memory, as ``tests.test_laws.load`` explains."""
    from transformers import AutoModelForCausalLM

    register()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=implementation, output_loading_info=True, **more
    )
    assert not any(info.values()), info
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    for module in model.modules():
        if isinstance(module, RaggedExperts):
            module.join()
    return model.eval()


def streamed(folder: Path, rows: Any, implementation: str) -> list[torch.Tensor]:
    stream = Stream(Checkpoint.open(folder), experts_implementation=implementation, micro_rows=1)
    states = stream.embed(rows)
    for _ in stream.run(rows, states):
        pass
    stream.load_head()
    return [stream.logits(rows, states, i, torch.arange(rows.ids.shape[1])) for i in range(len(rows.ids))]


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices stay as on disk and are decoded by torch, as where there is no C++ library and torch has no product for
    them: then bits are the same ones. ``test_packed_kernels`` has the kernels, ``test_int4`` torch's product."""
    monkeypatch.setattr(products, "available", lambda: False)
    monkeypatch.setattr(int4, "MOST_TOKENS", 0)


# -- the same model -----------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loaded_is_streamed_through_the_decoded_view(
    name: str, dtype: str, tiny: Tiny, tmp_path: Path, by_torch: None
) -> None:
    """Any mix of widths and grids over layers with different numbers of experts of different widths."""
    folder, rows = packed(tiny(name, dtype=dtype), tmp_path), plain_rows()
    grids = packing_of(json.loads((folder / "config.json").read_text()))
    assert {grid.bits for grid in grids.values()} == set(range(1, 9))
    implementation = "eager" if dtype == "float32" else IMPLEMENTATION
    model = load(folder, implementation)
    assert len(list(packed_modules(model))) == len(grids)
    wanted = streamed(folder, rows, implementation)
    assert largest_difference(full_logits(model, rows), wanted, rows) == 0.0
    assert any(float(logits.float().std()) > 0.1 for logits in wanted)


@families
def test_generates_and_saves_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny(name, dtype="bfloat16"), tmp_path)
    model = moezip.load(folder)
    prompt = torch.tensor([[5, 6, 7, 8]])
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 4
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith("e_score_correction_bias"):  # see the same test of ragged checkpoints
            value = value.to(after[key].dtype)
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]
    again = moezip.load(tmp_path / "again")
    assert torch.equal(again(prompt).logits, model(prompt).logits)


def attention_only(items: list[Item]) -> dict[str, Grid]:
    return {item.name: fitted(item, Grid(4, 8)) for item in items if item.expert is None}


def experts_only(items: list[Item]) -> dict[str, Grid]:
    return {item.name: Grid(4, 8) for item in items if item.expert is not None}


def all_alike(items: list[Item]) -> dict[str, Grid]:
    return {item.name: fitted(item, Grid(4, 8, symmetric=True)) for item in items}


def test_what_is_not_packed_stays_what_it_was(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2_moe", dtype="bfloat16")
    one = load(packed(folder, tmp_path / "attention", attention_only, everything))
    assert isinstance(one.model.layers[0].self_attn.q_proj, PackedLinear)
    assert isinstance(one.lm_head, PackedLinear)
    assert not any(isinstance(module, Packed) for module in one.model.layers[0].mlp.experts.modules())
    two = load(packed(folder, tmp_path / "experts", experts_only, everything))
    assert type(two.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(two.model.layers[0].mlp.experts) is PackedExperts


def test_a_dtype_changes_what_is_computed_and_not_what_is_stored(tiny: Tiny, tmp_path: Path, by_torch: None) -> None:
    folder = packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path)
    stored = load_file(folder / "model.safetensors")
    for model in (load(folder, dtype=torch.float32), load(folder).to(torch.float16).to(torch.float32)):
        assert model.dtype == torch.float32
        for name, module in packed_modules(model):
            for suffix, buffer in module.tensors().items():
                assert buffer.dtype == stored[f"{name}.{suffix}"].dtype
                assert torch.equal(buffer, stored[f"{name}.{suffix}"]), name
        layer = model.model.layers[0].self_attn.q_proj
        x = torch.randn(3, 32)
        weight = dequantize(decode(layer.tensors(), layer.grid))  # float32, never rounded to the model's own bfloat16
        assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))


# -- the product --------------------------------------------------------------------------------------------


def test_a_packed_product_by_hand() -> None:
    # scale 0.5, zero 1: codes (0, 3) are (-0.5, 1.0); scale 2, zero 2: (1, 2) are (-2, 0). With x = (4, 1):
    # first row 4 * -0.5 + 1 * 1.0 = -1, plus the bias 10 = 9; second row 4 * -2 + 0 = -8, plus 20 = 12
    grid = Grid(2, 2)
    codes = Codes(grid, torch.tensor([[0, 3], [1, 2]], dtype=torch.uint8), torch.tensor([[0.5], [2.0]]),
                  torch.tensor([[1], [2]], dtype=torch.uint8))  # fmt: skip
    x, bias = torch.tensor([4.0, 1.0]), torch.tensor([10.0, 20.0])
    assert packed_linear(x, encode(codes), grid, bias).tolist() == [9, 12]


@pytest.mark.parametrize("grid", [each for each in MIX if each is not None], ids=str)
def test_large_matrices_are_decoded_in_pieces(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = encode(rtn(torch.randn(150, 16), None, grid, RtnParams()).codes)
    whole = decoded(tensors, grid, torch.bfloat16)
    assert torch.equal(whole, dequantize(decode(tensors, grid), torch.bfloat16))
    monkeypatch.setattr(linear, "CHUNK", 1)  # 32 rows at a time, and 22 at the end
    assert torch.equal(decoded(tensors, grid, torch.bfloat16), whole)


# -- damage -------------------------------------------------------------------------------------------------


def damaged(folder: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


# Of logits of size 1 in fp32 whose sums run in another order: up to 1.4e-5 was measured.
SUMS = 5e-5
Q = "model.layers.1.self_attn.q_proj."
UP = "model.layers.1.mlp.experts.2.up_proj."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (Q + SCALE, _put(0.0), "not a positive number"),
        (UP + SCALE, _put(float("nan")), "not a positive number"),
        (UP + SCALE, _put(float("inf")), "not a positive number"),
        (UP + SCALE, _put(-1.0), "not a positive number"),
        (Q + SHAPE, _put(24), "q_proj"),
        (UP + SHAPE, _put(0), "up_proj"),
        (Q + PACKED, lambda t: t[:, :-1].contiguous(), "q_proj"),
        (UP + PACKED, lambda t: t.to(torch.int64), "up_proj"),
        (UP + PACKED, _put(-1), "bits behind the last"),
        (UP + ZERO, _put(-1), "bits behind the last"),
        (UP + ZERO, lambda t: None, "up_proj"),
        (Q + SCALE, lambda t: None, "q_proj"),
        (Q + SCALE, lambda t: t.to(torch.bfloat16), "q_proj"),
        ("model.layers.1.self_attn.o_proj.weight_packed", lambda t: None, "o_proj"),
        ("model.norm.weight", lambda t: None, "model.norm.weight"),
    ],
)
def test_corrupt_codes_are_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    def three(items: list[Item]) -> dict[str, Grid]:  # 36 rows of 12 columns: neither fills whole words of 3 bits
        return {item.name: Grid(3, 0) for item in items}

    sizes = {"moe_intermediate_size": 12, "hidden_size": 36}
    folder = packed(tiny("qwen3_moe", dtype="bfloat16", **sizes), tmp_path / "good", three, everything)
    assert verify(folder, deep=True) == []
    bad = damaged(folder, tmp_path / "bad", name, change)
    with pytest.raises(MoezipError, match=message):
        moezip.load(bad)
    assert any(message in finding.what + finding.where for finding in verify(bad, deep=True))


def _packed_table(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda config: edit(config["quantization_config"]["packed"]) and None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_packed_table(lambda table: table.pop(Q + "weight")), "q_proj"),
        (_packed_table(lambda table: table.update({Q + "weight": "int5-g8"})), "q_proj"),
        (_packed_table(lambda table: table.update({Q + "weight": "int9-g8"})), "int9-g8"),
        (_packed_table(lambda table: table.update({"model.norm.weight": "int4-g8"})), "model.norm.weight"),
        (_packed_table(lambda table: table["model.layers.1.mlp.experts.*.up_proj.weight"].pop()), "up_proj"),
    ],
)
def test_a_table_that_is_not_the_codes_is_refused(
    edit: Callable[[dict[str, Any]], None], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "good", all_alike, everything)
    bad = edited(folder, tmp_path / "bad", edit)
    with pytest.raises(MoezipError, match=message):
        moezip.load(bad)
    assert verify(bad, deep=False)


def test_codes_are_not_offloaded(tiny: Tiny, tmp_path: Path) -> None:
    """Buffers stay where they are used, unless transformers is told otherwise."""
    from transformers import AutoModelForCausalLM

    folder, ids = packed(tiny("qwen3_moe"), tmp_path, all_alike, everything), plain_rows(1, 6).ids
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    assert model.model.layers[1].input_layernorm.weight.is_meta
    with torch.no_grad():  # the layer from disk multiplies by torch, the others on the kernels, which sum otherwise
        torch.testing.assert_close(model(ids).logits, moezip.load(folder)(ids).logits, rtol=0, atol=SUMS)


@pytest.fixture
def without_moezip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers as it is in a process that never imported moezip."""
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "moezip")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "moezip")
    yield


@families
@pytest.mark.parametrize("choose", [all_alike, attention_only])
def test_without_moezip_nothing_loads(
    name: str, choose: Callable[[list[Item]], dict[str, Grid]], tiny: Tiny, tmp_path: Path, without_moezip: None
) -> None:
    """Not even where every layer is as the config says, so that stock code would only miss the weights."""
    from transformers import AutoModelForCausalLM

    folder = packed(tiny(name), tmp_path, choose, everything)
    with pytest.raises(RuntimeError, match=r"(?i)conver|mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(folder)


# -- compressed-tensors -------------------------------------------------------------------------------------

PUBLISHED_APART = [name for name, entry in ARCHITECTURES.items() if not any(tensor.fused for tensor in entry.experts)]


def foreign(folder: Path, out: Path, choose: Callable[[list[Item]], dict[str, Grid]]) -> Path:
    """The checkpoint in ``folder`` packed as compressed-tensors."""
    model = opened(str(folder))
    solved = Solved(model.source, choose(items_of(model.source, model)))
    shapes = {name: model.source.spec(name).shape for name in model.source.names()}
    config = quantization_config(model.architecture, solved.grids, shapes)
    return written(PackedView(model.source, solved.grids, solved, config), folder, out)


@pytest.mark.parametrize("name", PUBLISHED_APART)
def test_compressed_tensors_load_packed(name: str, tiny: Tiny, tmp_path: Path, by_torch: None) -> None:
    def differ(items: list[Item]) -> dict[str, Grid]:
        last = max(item.layer for item in items if item.expert is not None and item.layer is not None)
        return {item.name: Grid(3 if item.expert is not None and item.layer == last else 4, 8)
                for item in items if item.kind != "attention"}  # fmt: skip

    folder, rows = foreign(tiny(name, dtype="bfloat16"), tmp_path / "foreign", differ), plain_rows()
    model = moezip.load(folder)
    assert len(list(packed_modules(model))) > 20 and not model.training
    register()
    assert largest_difference(full_logits(model, rows), streamed(folder, rows, IMPLEMENTATION), rows) <= ADDRESSES
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value.to(after[key].dtype), after[key]), key
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]


# What a product may differ by where plain weights lie at other addresses, in bf16 logits of a few units.
ADDRESSES = 0.05


# -- commands -----------------------------------------------------------------------------------------------


def test_inspect_verify_and_evaluate_read_it(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny("deepseek_v3", dtype="bfloat16"), tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    found = cli("inspect", folder, "--json").json
    source = Checkpoint.open(folder)
    grids = packing_of(source.config)
    shapes = {name: source.read(name.removesuffix("weight") + SHAPE).tolist() for name in grids}
    stored = sum(grid.nbytes(*shapes[name]) for name, grid in grids.items())
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert found["bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert found["quantized_parameters"] == weights < found["parameters"]
    assert found["quantization"] == "moezip" and sum(found["grids"].values()) == len(grids)
    assert f"{found['bits_per_weight']:.2f} bits" in cli("inspect", folder).out
    assert cli("verify", folder).code == 0
    nll = cli("evaluate", folder, "--data", text, "--seq-len", 32, "--json").json["nll"]
    # the same loss by hand, from the loaded model
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False).input_ids
    model, losses = load(folder, IMPLEMENTATION), []
    for start in range(0, len(ids) - 31, 32):
        row = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            losses.append(model(row, use_cache=False, labels=row).loss.float())
    assert len(losses) > 5 and nll == pytest.approx(float(torch.stack(losses).mean()), abs=0.02)


def test_codes_stay_codes_in_memory(tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path, all_alike, everything)
    held = sum(tensor.nbytes for tensor in load(folder).state_dict().values())
    tied = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].nbytes  # lm_head, listed again
    on_disk = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    plain = sum(file.stat().st_size for file in (tmp_path / "plain").glob("*.safetensors"))
    assert held - tied == on_disk < 0.7 * plain
    assert os.path.getsize(folder / "model.safetensors") > on_disk
    assert STEP not in {name.rpartition(".")[2] for name in load_file(folder / "model.safetensors")}

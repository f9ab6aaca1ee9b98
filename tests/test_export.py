"""Exports hold the same weights: read back by the loader that each is for, they answer as the packed model does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moezip
from moezip.arch.decoded import decoded
from moezip.arch.families import ARCHITECTURES, identify
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError
from moezip.export.verify import verify
from moezip.formats.packed import Grid
from moezip.pipeline.export import export_of
from moezip.pipeline.items import Item
from tests.command import Cli, write_text
from tests.test_laws import REORDERED, full_logits, largest_difference, plain_rows
from tests.test_laws import load as load_stock
from tests.test_packed_runtime import PUBLISHED_APART, experts_only, fitted, load, mixed, packed, streamed, written
from tests.test_ragged import everything, kept_of

Tiny = Callable[..., Path]
families = pytest.mark.parametrize("name", ARCHITECTURES)


def four(scale: str = "F16", symmetric: bool = True, bits: int = 4) -> Callable[[list[Item]], dict[str, Grid]]:
    def choose(items: list[Item]) -> dict[str, Grid]:
        return {item.name: fitted(item, Grid(bits, 8, symmetric, scale)) for item in items}

    return choose


def exported(folder: Path, out: Path, to: str, reader: str | None = None) -> Path:
    return written(export_of(Checkpoint.open(folder), to, reader).view, folder, out)


def fewer(source: Checkpoint) -> Any:
    """In every layer six of eight experts (three of every four), eight neurons of each."""
    return {
        layer: [(expert, neurons[4:12]) for expert, neurons in row if expert % 4 != 1]
        for layer, row in everything(source).items()
    }


def require_same_tensors(folder: Path, other: Path) -> None:
    """Decoded, the two hold the same numbers; ``other`` has no tripwire."""
    one, two = (decoded(Checkpoint.open(each)) for each in (folder, other))
    assert len(one.names()) == len(two.names()) + 1
    for name in two.names():
        assert torch.equal(one.read(name), two.read(name)), name


# -- plain numbers ------------------------------------------------------------------------------------------


@families
def test_dense_is_the_packed_model_in_stock_form(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source, rows = tiny(name), plain_rows()
    folder = packed(source, tmp_path, mixed, everything)
    out = exported(folder, tmp_path / "dense", "safetensors")
    original, view = Checkpoint.open(source), Checkpoint.open(out)
    assert "quantization_config" not in view.config
    described = [{(s.name, s.shape, s.dtype) for s in map(c.spec, c.names())} for c in (original, view)]
    assert described[0] == described[1]
    assert verify(out, deep=True) == []
    # gpt_oss publishes matrices [in, out], whose products another kernel sums in another order
    tolerance = REORDERED if name == "gpt_oss" else 0.0
    wanted = streamed(folder, rows, "eager")
    assert largest_difference(full_logits(load_stock(out), rows), wanted, rows) <= tolerance
    assert largest_difference(full_logits(load_stock(source), rows), wanted, rows) > 0.01


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_fused_tensors_are_given_expert_by_expert(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny(name, dtype="bfloat16"), tmp_path, mixed, everything)
    view = export_of(Checkpoint.open(folder), "safetensors").view
    entry = identify(view.config)
    for tensor in entry.experts:
        fused = tensor.template.format(layer=1)
        whole, pieces = view.read(fused), [bytes(piece) for piece in view.chunks(fused)]
        assert len(pieces) == 8 and b"".join(pieces) == whole.view(torch.uint8).numpy().tobytes()
        assert torch.equal(view.read(fused, range(2, 5)), whole[2:5])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_pruned_model_is_exported_with_its_own_counts(name: str, tiny: Tiny, tmp_path: Path) -> None:
    sizes = {"deepseek_v3": {"n_group": 2}}.get(name, {})
    folder, rows = packed(tiny(name, **sizes), tmp_path, mixed, fewer), plain_rows()
    out = exported(folder, tmp_path / "dense", "safetensors")
    config = Checkpoint.open(out).config
    facts = identify(config).layer_facts(config)
    assert {(fact.experts, fact.width) for fact in facts} == {(6, 8)}
    difference = largest_difference(
        full_logits(load_stock(out), rows), streamed(folder, rows, "eager"), rows
    )  # fmt: skip
    assert difference <= REORDERED


def test_layers_that_differ_are_exported_for_moezip_alone(tiny: Tiny, tmp_path: Path) -> None:
    folder, rows = packed(tiny("qwen3_moe"), tmp_path, mixed, kept_of), plain_rows()
    for reader in (None, "vllm"):
        with pytest.raises(MoezipError, match="differ") as caught:
            exported(folder, tmp_path / "no", "safetensors", reader)
        assert "--for moezip" in str(caught.value.next)
    out = exported(folder, tmp_path / "dense", "safetensors", "moezip")
    assert verify(out, deep=True) == []
    assert not [name for name in Checkpoint.open(out).names() if "packed" in name]
    difference = largest_difference(full_logits(load(out), rows), streamed(folder, rows, "eager"), rows)
    assert difference == 0.0


# -- codes of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED_APART)
def test_compressed_tensors_hold_the_same_codes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny(name, dtype="bfloat16"), tmp_path, four(bits=3, symmetric=False), everything)
    out = exported(folder, tmp_path / "out", "compressed-tensors")
    require_same_tensors(folder, out)
    assert verify(out, deep=True) == []
    before, after = Checkpoint.open(folder), Checkpoint.open(out)
    for each in after.names():  # the stored bytes too
        assert torch.equal(before.read(each), after.read(each))
    ids = plain_rows(1, 6).ids
    with torch.no_grad():
        assert torch.equal(moezip.load(out)(ids).logits, moezip.load(folder)(ids).logits)


def test_transformers_reads_the_compressed_tensors_it_can_read(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder, rows = packed(tiny("qwen3_moe"), tmp_path, four("F32"), everything), plain_rows()
    out = exported(folder, tmp_path / "out", "compressed-tensors", "transformers")
    difference = largest_difference(
        full_logits(load_stock(out), rows), streamed(folder, rows, "eager"), rows
    )  # fmt: skip
    assert difference == 0.0


@pytest.mark.parametrize("name", PUBLISHED_APART)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_holds_the_same_codes(name: str, symmetric: bool, tiny: Tiny, tmp_path: Path) -> None:
    def choose(items: list[Item]) -> dict[str, Grid]:
        return {
            item.name: fitted(item, Grid(4 if item.expert is not None else 8, 8, symmetric))
            for item in items
            if not any(size % 8 for size in item.shape) and item.kind != "head"
        }

    folder, rows = packed(tiny(name, dtype="bfloat16"), tmp_path, choose, everything), plain_rows()
    out = exported(folder, tmp_path / "out", "gptq")
    kind = Checkpoint.open(out).config["quantization_config"]["checkpoint_format"]
    assert kind == ("gptq" if symmetric else "gptq_v2")  # zeros of 0 cannot be stored less one
    require_same_tensors(folder, out)
    assert verify(out, deep=True) == []
    assert largest_difference(streamed(out, rows, "eager"), streamed(folder, rows, "eager"), rows) == 0.0


# -- refusals -----------------------------------------------------------------------------------------------


def one_wider(items: list[Item]) -> dict[str, Grid]:
    first = next(item for item in items if item.expert == 3)
    return {**four()(items), first.name: Grid(8, 8, True)}


@pytest.mark.parametrize(
    ("family", "choose", "kept", "to", "reader", "message", "hint"),
    [
        ("qwen3_moe", four(), everything, "gguf", None, "no checkpoint folder", "gguf"),
        ("qwen3_moe", four(), everything, "ggfu", None, "unknown format", "gguf"),
        ("qwen3_moe", four(), everything, "gptq", "vlm", "unknown reader", "vllm"),
        ("qwen3_moe", mixed, everything, "compressed-tensors", None, "one bit|8 bits|differently", "moezip's own"),
        ("qwen3_moe", one_wider, everything, "compressed-tensors", None, "stored differently", "--granularity"),
        ("qwen3_moe", one_wider, everything, "gptq", None, "stored differently", "--granularity"),
        ("qwen3_moe", four(bits=3), everything, "gptq", None, "4 or 8 bits", "compressed-tensors"),
        ("qwen3_moe", four(), kept_of, "compressed-tensors", None, "number or width", "--scope layer"),
        ("gpt_oss", four(), everything, "compressed-tensors", None, "in one tensor", "moezip's own"),
        ("granitemoe", experts_only, everything, "gptq", None, "in one tensor", "moezip's own"),
        ("qwen3_moe", four(symmetric=False), everything, "gptq", "vllm", "without zeros", "safetensors"),
        ("qwen3_moe", four(), everything, "gptq", "transformers", "random numbers", "safetensors"),
        ("qwen3_moe", four(bits=3), everything, "compressed-tensors", "sglang", "4 and 8 bits", "safetensors"),
        ("qwen3_moe", four(), everything, "compressed-tensors", "transformers", "scales stored as", "safetensors"),
        ("qwen3_moe", four(), everything, "compressed-tensors", "llamacpp", "reads GGUF", "safetensors"),
    ],
)
def test_what_cannot_be_said_is_refused_with_another_way(
    family: str,
    choose: Callable[[list[Item]], dict[str, Grid]],
    kept: Callable[[Checkpoint], Any],
    to: str,
    reader: str | None,
    message: str,
    hint: str,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    folder = packed(tiny(family), tmp_path, choose, kept)
    with pytest.raises(MoezipError, match=message) as caught:
        export_of(Checkpoint.open(folder), to, reader)
    assert hint in f"{caught.value.what} {caught.value.next}"


def test_plain_checkpoints_have_nothing_to_export(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    refusals = {"safetensors": "stock form already", "gptq": "plain numbers", "compressed-tensors": "plain numbers"}
    for to, message in refusals.items():
        with pytest.raises(MoezipError, match=message):
            export_of(source, to)


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_writes_verified_folders(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path, four(), everything)
    out = tmp_path / "out"
    found = cli("export", folder, out, "--to", "compressed-tensors", "--json")
    assert found.code == 0 and found.json["form"] == "compressed-tensors" and not found.json["stock"]
    assert "warning: do not load it with transformers" in found.err and "F16 in a BF16 model" in found.json["notes"][0]
    assert "F16 in a BF16 model" in (out / "README.md").read_text()
    assert cli("verify", out).code == 0
    assert json.loads((out / "moezip" / "report.json").read_text())["method"] == "export to compressed-tensors"
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    codes = cli("export", folder, tmp_path / "codes", "--to", "gptq")
    assert codes.code == 0 and "do not load it with transformers" in " ".join(codes.err.split())
    again = cli("export", folder, out, "--to", "safetensors")
    assert again.code == 1 and "--overwrite" in again.err
    done = cli("export", folder, out, "--to", "safetensors", "--overwrite", "--json")
    assert done.code == 0 and done.json["stock"] and "warning" not in done.err
    assert done.json["bytes_after"] > done.json["bytes_before"]
    assert cli("verify", out).code == 0
    refused = cli("export", folder, tmp_path / "no", "--to", "gguf", "--set", "type=Q9")
    assert refused.code == 2 and not (tmp_path / "no").exists()
    stored = cli("export", out, tmp_path / "no", "--to", "safetensors")
    assert stored.code == 1 and "already" in stored.err


# -- several forms from one calibration ---------------------------------------------------------------------


def test_forms_beyond_the_first_need_no_second_pass(
    cli: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One quantization looks at text; every export of it runs no layer of the model, reads no text, solves nothing."""
    from moezip.calibrate.stream import Stream

    passes: list[str] = []
    begin = Stream.__init__

    def counted(self: Any, *given: Any, **named: Any) -> None:
        passes.append("a pass")
        begin(self, *given, **named)

    monkeypatch.setattr(Stream, "__init__", counted)
    text = write_text(tmp_path / "text.jsonl")
    packed = tmp_path / "packed"
    words = ("--bits", "4", "--group-size", "8", "--data", text, "--tokens", "256", "--set", "symmetric=true")
    assert cli("quantize", tiny("mixtral"), packed, *words).code == 0
    solved = len(passes)
    assert solved > 0
    text.unlink()
    outs = {"compressed-tensors": (), "gptq": (), "safetensors": (), "gguf": ("--set", "pre=none")}
    for to, more in outs.items():
        if to == "gguf" and importlib.util.find_spec("gguf") is None:
            continue
        answer = cli("export", packed, tmp_path / to, "--to", to, *more)
        assert answer.code == 0, answer.err
    assert len(passes) == solved

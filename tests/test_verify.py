"""verify: a sound checkpoint has no findings, and every single fault has one that names it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moezip.checkpoint.reader import INDEX_NAME, Checkpoint
from moezip.checkpoint.writer import Staging
from moezip.errors import CheckpointError
from moezip.export.verify import MANIFEST, manifest_bytes, require_verified, verify
from moezip.formats import fp8_block

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A complete qwen3_moe of a few kilobytes, writable."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen3_moe", dtype="bfloat16"), folder)
    for file in folder.rglob("*"):
        file.chmod(0o644)
    return folder


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights as one file, changed; index and manifest go."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (model / INDEX_NAME).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def set_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | values))


def findings(model: Path, deep: bool = False, digests: dict[str, str] | None = None) -> list[str]:
    return [f"{finding.where}: {finding.what}" for finding in verify(model, digests=digests, deep=deep)]


def written(model: Path, out: Path) -> dict[str, str]:
    """A copy as the compressing commands write it, manifest included."""
    with Checkpoint.open(model) as source, Staging(out, source=model) as staging:
        staging.write_tensors(source)
        staging.copy_side_files(model)
        staging.add("moezip/report.json", b"{}")
        staging.add(MANIFEST, manifest_bytes({"version": "0"}, staging.digests))
    return staging.digests


# -- model against config -----------------------------------------------------------------------------------


def test_a_sound_checkpoint_has_no_findings(model: Path) -> None:
    assert findings(model, deep=True) == []
    require_verified(model, deep=True)


def test_the_reference_model_is_sound() -> None:
    folder = Path(__file__).parents[2] / "shared/models/ref-qwen3moe"
    if not folder.is_dir():
        pytest.skip("the reference model is not beside the repository")
    assert findings(folder, deep=True) == []


def test_a_missing_expert_matrix(model: Path) -> None:
    edit(model, lambda tensors: tensors.pop(EXPERT))
    (found,) = findings(model)
    assert "layers.1" in found and "expert 3 has no up" in found
    with pytest.raises(CheckpointError, match="expert 3 has no up"):
        require_verified(model, deep=False)


def test_a_missing_norm(model: Path) -> None:
    edit(model, lambda tensors: tensors.pop("model.norm.weight"))
    (found,) = findings(model)
    assert "model.norm.weight: no stored tensor fills this parameter" in found


def test_a_wrong_shape(model: Path) -> None:
    edit(model, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].contiguous()}))
    (found,) = findings(model)
    assert EXPERT in found and "where the config implies" in found


def test_a_tensor_that_nobody_needs(model: Path) -> None:
    edit(model, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    (found,) = findings(model)
    assert "model.layers.0.mlp.extra.weight" in found


@pytest.mark.parametrize("experts", [7, 9])
def test_config_counts_other_experts_than_there_are(model: Path, experts: int) -> None:
    set_config(model, num_experts=experts)
    assert any("expert" in found for found in findings(model))


def test_an_unknown_architecture_is_a_finding(model: Path) -> None:
    set_config(model, model_type="made_up")
    (found,) = findings(model)
    assert "'made_up'" in found


def test_what_cannot_be_opened_is_a_finding(model: Path, tmp_path: Path) -> None:
    assert "no such folder" in findings(tmp_path / "absent")[0]
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    (found,) = findings(model)
    assert file.name in found and "truncated" in found


def test_a_wrong_total_size(model: Path) -> None:
    edit(model, lambda tensors: None)
    checkpoint = Checkpoint.open(model)
    total = sum(checkpoint.spec(name).bytes for name in checkpoint.names())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(checkpoint.names(), "model.safetensors")}
    (model / INDEX_NAME).write_text(json.dumps(index))
    assert findings(model) == []
    index["metadata"]["total_size"] += 2
    (model / INDEX_NAME).write_text(json.dumps(index))
    assert findings(model) == [f"{INDEX_NAME}: total_size is {total + 2}, the tensors take {total} bytes"]


# -- values -------------------------------------------------------------------------------------------------


def test_nan_weights(model: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT].view(-1)[-1] = float("nan")

    edit(model, poison)
    assert findings(model, deep=True) == [f"{EXPERT}: holds NaN or infinity"]
    assert findings(model, deep=False) == []  # weights are read in depth only


def test_scales_are_looked_at_always(model: Path) -> None:
    """fp8 blocks of DeepSeek's kind on one tensor, with an infinite factor."""

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8_block.encode(tensors[name])

    edit(model, quantize)
    set_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert findings(model, deep=True) == []
    edit(model, lambda tensors: tensors[f"{EXPERT}_scale_inv"].fill_(float("inf")))
    assert findings(model, deep=False) == [f"{EXPERT}_scale_inv: holds NaN or infinity"]


def test_the_nan_of_mxfp4_scales(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moezip.export.verify._model", lambda checkpoint: [])  # these names belong to another family
    scales = torch.full((2, 3), 254, dtype=torch.uint8)
    edit(model, lambda tensors: tensors.update({"x_scales": scales}))
    assert findings(model) == []
    scales[1, 2] = 255
    edit(model, lambda tensors: tensors.update({"x_scales": scales}))
    assert findings(model) == ["x_scales: holds NaN or infinity"]


# -- checksums ----------------------------------------------------------------------------------------------


def test_written_files_match_the_manifest(model: Path, tmp_path: Path) -> None:
    digests = written(model, tmp_path / "out")
    assert findings(tmp_path / "out", deep=True) == []
    assert findings(tmp_path / "out", digests=digests) == []
    listed = json.loads((tmp_path / "out" / MANIFEST).read_bytes())["files"]
    present = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert present - listed.keys() == {MANIFEST, "moezip/report.json"}
    assert listed["config.json"] == hashlib.sha256((model / "config.json").read_bytes()).hexdigest()


def test_one_flipped_bit_is_found_in_depth_only(model: Path, tmp_path: Path) -> None:
    digests = written(model, tmp_path / "out")
    file = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (found,) = findings(tmp_path / "out", deep=True)
    assert found.startswith(f"{file.name}: SHA-256 is")
    # Right after writing the digests taken while writing are used, and nothing is read again (8.14).
    assert findings(tmp_path / "out", digests=digests) == []
    (found,) = findings(tmp_path / "out", digests=digests | {file.name: "0" * 64})
    assert found.startswith(f"{file.name}: SHA-256 is")


def test_files_and_manifest_disagree(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    digests = written(model, out)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "notes.txt").write_text("the user's own")  # not listed, but no weights: nobody is misled
    (out / "old.safetensors").write_bytes(b"")
    manifest = json.loads((out / MANIFEST).read_bytes())
    manifest["files"] |= {"gone.json": "0" * 64, "../model/config.json": "0" * 64}
    (out / MANIFEST).write_text(json.dumps(manifest))
    found = "\n".join(findings(out, deep=True))
    assert "gone.json: is listed in the manifest but missing" in found
    assert "lists '../model/config.json', which is not inside the folder" in found
    assert "old.safetensors: holds weights, but the manifest does not list it" in found
    assert "notes.txt" not in found
    lines = findings(out, digests=digests | {"new.json": ""})
    assert "new.json: was written, but the manifest does not list it" in lines


@pytest.mark.parametrize("text", ["{", "{}", '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_a_finding(model: Path, text: str) -> None:
    (model / "moezip").mkdir()
    (model / MANIFEST).write_text(text)
    (found,) = findings(model)
    assert found.startswith(MANIFEST)


def test_the_message_lists_the_first_and_counts_the_rest(model: Path) -> None:
    edit(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts.3." in name])
    with pytest.raises(CheckpointError) as caught:
        require_verified(model, deep=False)
    assert "problems" in str(caught.value) and "expert 3 has no" in str(caught.value)

"""Statistics of ragged checkpoints: those of the model whose dropped neurons are zeroed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.arch.spec import ExpertTensor
from moezip.calibrate.record import BY_NAME, GRADIENT_RECORDS
from moezip.calibrate.run import calibrate
from moezip.checkpoint.reader import Checkpoint
from tests.test_laws import plain_rows
from tests.test_ragged import Kept, everything, kept_of, ragged
from tests.tiny import WIDTH

Tiny = Callable[..., Path]
RECORDS = ("counts", "gate_sum", "norm_sum", "output_max")
# float32 products over 16 neurons instead of over those that stay, then sums of squares of them and of gradients
# through three layers
FLOAT32 = 1e-4


def zeroed(folder: Path, kept: Kept) -> Checkpoint:
    """The source with the columns of the down matrices zeroed that ``kept`` leaves out."""

    class Zeroed(Checkpoint):
        def read(self, name: str, rows: range | None = None) -> torch.Tensor:
            tensor, claim = super().read(name, rows), identify(self.config).claim(name, self.config)
            if isinstance(claim.tensor, ExpertTensor) and claim.tensor.role == "down" and claim.layer is not None:
                experts = [claim.expert] if claim.expert is not None else range(len(kept[claim.layer]))
                for expert, down in zip(experts, tensor if claim.tensor.fused else [tensor], strict=True):
                    gone = sorted(set(range(WIDTH)) - set(kept[claim.layer][expert or 0][1]))
                    (down.T if claim.tensor.transposed else down)[:, gone] = 0
            return tensor

    return Zeroed.open(folder)


def statistics(source: Any, work: Path) -> dict[int, dict[str, np.ndarray]]:
    records = [BY_NAME[name] for name in RECORDS]
    found = calibrate(source, plain_rows(4, 24), records, workdir=work, gradients="data", micro_rows=2)
    return {layer: dict(sums) for layer, sums in found.domains[0].layers.items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_they_are_those_of_zeroed_neurons(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name)
    kept = everything(Checkpoint.open(folder))
    for layer, row in kept.items():
        for expert in range(len(row)):
            row[expert] = (expert, list(range((3 * expert + layer) % 7, WIDTH, 1 + expert % 3)))
        row[2] = (2, [])
    wanted = statistics(zeroed(folder, kept), tmp_path / "wanted")
    got = statistics(Checkpoint.open(ragged(folder, tmp_path / "ragged", kept)), tmp_path / "got")
    assert got.keys() == wanted.keys()
    for layer, row in kept.items():
        assert {record.name for record in GRADIENT_RECORDS} <= got[layer].keys()
        for key, sums in got[layer].items():
            for expert, (_, neurons) in enumerate(row):
                own, other = sums[expert], wanted[layer][key][expert]
                if np.ndim(sums) == 2 and sums.shape[1] == max(len(each) for _, each in row):  # by neuron
                    assert not own[len(neurons) :].any(), (layer, key, expert)
                    own, other = own[: len(neurons)], other[neurons]
                scale = np.abs(wanted[layer][key]).max()
                np.testing.assert_allclose(own, other, rtol=FLOAT32, atol=FLOAT32 * scale, err_msg=f"{layer} {key}")
    assert sum(float(got[layer]["inner_grad_square"].sum()) for layer in got) > 0


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_commands_read_families_of_one_tensor(name: str, cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name, dtype="bfloat16")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    found = cli("inspect", path, "--json").json
    assert found["experts"] == [8, 8, 7]
    assert cli("verify", path).code == 0
    assert cli("calibrate", path, "--data", text, "--seq-len", 32, "--out", tmp_path / "stats.safetensors").code == 0
    assert np.isfinite(cli("evaluate", path, "--data", text, "--seq-len", 32, "--json").json["nll"])
    pruned = cli(
        "prune", folder, tmp_path / "pruned", "--method", "heapr", "--ratio", 0.4, "--data", text, "--seq-len", 32
    )
    assert pruned.code == 0, pruned.err
    widths = Checkpoint.open(tmp_path / "pruned").config["quantization_config"]["experts"].values()
    assert sum(map(sum, widths)) == int(0.6 * 3 * 8 * WIDTH)
    assert np.isfinite(cli("evaluate", tmp_path / "pruned", "--data", text, "--seq-len", 32, "--json").json["nll"])

"""Loaded packed experts through the Triton kernels, in Triton's interpreter, against the same experts decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'moezip[gpu]', or make gpu-check")

import moezip
from moezip.arch.ragged import RaggedExperts
from moezip.formats.packed import Grid, dequantize, encode
from moezip.pipeline.items import Item
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as rtn
from moezip.runtime import gpu
from moezip.runtime.fast import _told
from moezip.runtime.linear import PackedExperts, PackedLinear
from tests.test_packed_runtime import fitted, packed

# The decoded experts round weights, sums and the gate to bf16 on the way, the kernels none but the gate's result: a few
# units of 2**-8 in the last place each, of the largest output.
CLOSE = 2e-2
# What the kernels take and a checkpoint may hold, in turns: groups of 32 need rows that they divide.
GRIDS = (
    Grid(4, 0),
    Grid(2, 32, symmetric=True),
    Grid(3, 0, scale="BF16"),
    Grid(1, 0),
    Grid(6, 0, double=True),
    Grid(8, 0, symmetric=True, scale="F32"),
    Grid(5, 32),
    Grid(7, 0, scale="BF16", double=True),
)


def all_packed(items: list[Item]) -> dict[str, Grid]:
    return {item.name: fitted(item, GRIDS[number % len(GRIDS)]) for number, item in enumerate(items)}


def experts_of(model: torch.nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_layer_gives_what_its_decoded_experts_give(tiny: Callable[..., Path], tmp_path: Path, name: str):
    """Experts of other widths, one of width 0; biases, interleaved gates and the clamp of gpt-oss."""
    model = moezip.load(packed(tiny(name), tmp_path, all_packed), dtype=torch.bfloat16)
    for module in experts_of(model)[:1]:
        chance = torch.Generator().manual_seed(1)
        x = torch.randn(3, module.hidden_dim, generator=chance).to(torch.bfloat16)
        index = torch.stack([torch.randperm(module.num_experts, generator=chance)[:2] for _ in range(3)])
        weights = torch.rand(3, 2, generator=chance)
        with torch.no_grad():
            true = module.plain(x, index, weights)
            found = gpu.experts_forward(module, x, index, weights)
        assert found is not None and found.dtype == x.dtype
        assert (found.float() - true.float()).abs().max() <= CLOSE * true.abs().max()
        assert torch.equal(found, gpu.experts_forward(module, x, index, weights))  # from what was kept


def test_a_linear_gives_what_its_decoded_matrix_gives():
    for grid in GRIDS:
        rows, columns = 24, 64
        solved = rtn(torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)), None, grid, RtnParams())
        bias = torch.nn.Parameter(torch.linspace(-1, 1, rows).to(torch.bfloat16))
        module = PackedLinear(solved.codes.grid, rows, columns, bias, torch.device("cpu"))
        module.load_state_dict({"bias": bias, **encode(solved.codes)})
        x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        with torch.no_grad():
            true = x.float() @ dequantize(solved.codes).T + bias.float()
            found = gpu.linear_forward(module, x)
        assert found is not None and found.shape == (2, 3, rows)
        assert (found.float() - true).abs().max() <= CLOSE * true.abs().max()


def test_what_the_kernels_do_not_take_is_said_once(tiny: Callable[..., Path], tmp_path: Path):
    grouped = packed(tiny("qwen3_moe"), tmp_path, lambda items: {item.name: fitted(item, Grid(4, 8)) for item in items})
    module = experts_of(moezip.load(grouped, dtype=torch.bfloat16))[0]
    index, weights = torch.zeros((1, 1), dtype=torch.int64), torch.ones((1, 1))
    _told.clear()
    for dtype, why in ((torch.bfloat16, "multiples of 32"), (torch.float32, r"activations are torch\.float32")):
        x = torch.zeros((1, module.hidden_dim), dtype=dtype)
        with pytest.warns(RuntimeWarning, match=why):
            assert gpu.experts_forward(module, x, index, weights) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gpu.experts_forward(module, x, index, weights) is None
    x = torch.zeros((1, module.hidden_dim), dtype=torch.bfloat16, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="gradients are wanted"):
        assert gpu.experts_forward(module, x, index, weights) is None


def test_a_module_whose_codes_moved_is_laid_out_anew(tiny: Callable[..., Path], tmp_path: Path):
    model = moezip.load(packed(tiny("qwen3_moe"), tmp_path, all_packed), dtype=torch.bfloat16)
    module = experts_of(model)[0].to("cpu")  # which brings the codes back from the layout of the CPU's kernels
    downs = {e: module.matrix(e, "down") for e, width in enumerate(module.widths) if width}
    expert, down = next((e, each) for e, each in downs.items() if not each.grid.double)
    x, weights = torch.ones((1, module.hidden_dim), dtype=torch.bfloat16), torch.ones((1, 1))
    with torch.no_grad():
        before = gpu.experts_forward(module, x, torch.tensor([[expert]]), weights)
        down.weight_scale = 2 * down.weight_scale
        down.weight_packed = down.weight_packed.clone()
        after = gpu.experts_forward(module, x, torch.tensor([[expert]]), weights)
    assert before is not None and after is not None
    assert torch.equal(after, 2 * before)


def test_modules_on_a_gpu_run_on_the_kernels(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And router rows that stand for one expert, as after a merge, go to that expert, on every path."""
    module = experts_of(moezip.load(packed(tiny("qwen3_moe"), tmp_path, all_packed), dtype=torch.bfloat16))[0]
    x = torch.ones((2, module.hidden_dim), dtype=torch.bfloat16)
    index, weights = torch.arange(4).view(2, 2) % module.num_experts, torch.full((2, 2), 0.5)
    module._remap = torch.arange(module.num_experts).flip(0)
    with torch.no_grad():
        true = RaggedExperts.forward(module, x, index, weights).float()
        on_cpu = module(x, index, weights)
        monkeypatch.setattr(gpu, "is_for", lambda value: True)
        on_gpu = module(x, index, weights)
    for found in (on_cpu, on_gpu):
        assert (found.float() - true).abs().max() <= CLOSE * true.abs().max()
    monkeypatch.setattr(gpu, "experts_forward", lambda *given: None)
    with torch.no_grad():
        assert torch.equal(module(x, index, weights).float(), true)

"""Products without a C++ library, by torch's for 4 bits, against float64; and models that run on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import moezip
from moezip.formats.packed import Codes, Grid, dequantize, encode
from moezip.kernels import products
from moezip.runtime import int4
from moezip.runtime.linear import Packed, PackedLinear, packed_rows
from tests.test_packed_runtime import fitted, packed
from tests.test_ragged import everything

Tiny = Callable[..., Path]
# Scales, offsets and results are rounded to bf16, each by up to 2^-9 of itself. Measured, of the largest result: up to
# 0.005 with up to 4 bits, by which decoded weights, rounded one by one, are off too, and 0.008 in two parts.
HALVES = 0.01


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        pytest.skip("this torch has no product for 4 bits")
    monkeypatch.setattr(products, "available", lambda: False)
    with torch.no_grad():
        yield


def made(grid: Grid, rows: int, columns: int, bias: bool = False) -> tuple[PackedLinear, torch.Tensor]:
    """A module of random codes, scales and zeros; and its weights in float64."""
    random = torch.Generator().manual_seed(rows + grid.bits)
    shape = rows, grid.groups(columns)
    codes = torch.randint(0, 2**grid.bits, (rows, columns), generator=random, dtype=torch.uint8)
    zeros = torch.randint(0, 2**grid.bits, shape, generator=random, dtype=torch.uint8)
    scales = grid.stored_scales(0.01 + 0.01 * torch.rand(shape, generator=random))
    given = Codes(grid, codes, scales, None if grid.symmetric else zeros)
    numbers = nn.Parameter(torch.randn(rows, generator=random).bfloat16()) if bias else None
    module = PackedLinear(grid, rows, columns, numbers, torch.device("cpu"))
    for suffix, tensor in encode(given).items():
        module._buffers[suffix] = tensor
    module.require_sound("here")
    return module, dequantize(given).double()


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = HALVES) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


def test_a_product_by_hand() -> None:
    """One row of 32 columns, scale 0.5, zero 3: code 7 is 2, the others, 3, are 0. Times 1 and thirty-one 9s: 2. Its
    neighbours' codes are 0, which is -1.5: times all that -420.
    """
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0] = 3
    codes[0, 0] = 7
    grid = Grid(4, 32)
    module = PackedLinear(grid, 16, 32, None, torch.device("cpu"))
    given = Codes(grid, codes, torch.full((16, 1), 0.5), torch.full((16, 1), 3, dtype=torch.uint8))
    module._buffers.update(encode(given))
    x = torch.full((1, 32), 9.0).bfloat16()
    x[0, 0] = 1
    assert module(x).tolist() == [[2.0] + 15 * [-420.0]]
    assert module.int4 is not None


@pytest.mark.parametrize("scale", ["F16", "BF16"])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(1, True), *((bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))]
)
def test_products_are_what_float64_gives(bits: int, symmetric: bool, scale: str) -> None:
    for rows, columns, group in ((16, 32, 32), (48, 256, 64), (32, 256, 128), (64, 512, 256), (16, 128, 0)):
        module, weight = made(Grid(bits, group, symmetric, scale), rows, columns, bias=rows == 48)
        for tokens in (1, 5, 40):
            x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
            wanted = x.double() @ weight.T + (0 if module.bias is None else module.bias.double())
            assert near(module(x), wanted)
            assert module.int4 is not None and len(module.int4) == (1 if bits <= 4 else 2)


def test_scales_of_scales() -> None:
    module, weight = made(Grid(4, 32, True, double=True), 32, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert near(module(x), x.double() @ weight.T) and module.int4 is not None


def test_gate_and_up_are_joined() -> None:
    (gate, one), (up, other) = made(Grid(3, 32), 16, 64), made(Grid(8, 64), 48, 64)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert near(packed_rows(x, [gate, up], None), x.double() @ torch.cat([one, other]).T)
    assert gate.int4 is not None and up.int4 is not None


def test_what_torch_has_no_product_for_is_decoded() -> None:
    """Odd groups or rows, float32, very many tokens, gradients."""
    for grid, rows in ((Grid(4, 8), 16), (Grid(4, 32), 20)):
        module, weight = made(grid, rows, 64)
        assert near(module(torch.ones(1, 64).bfloat16()), weight.sum(1)[None]) and module.int4 is None
    module, weight = made(Grid(4, 32), 16, 64)
    x = torch.randn(1, 64)
    assert near(module(x), x.double() @ weight.T, 1e-5)
    module(torch.ones(int4.MOST_TOKENS + 1, 64).bfloat16())
    module(torch.ones(0, 64).bfloat16())
    assert module.int4 is None
    with torch.enable_grad():
        x = torch.ones(1, 64).bfloat16().requires_grad_()
        module(x).sum().backward()
    assert x.grad is not None and near(x.grad, weight.sum(0)[None])
    assert module.int4 is None


def test_codes_are_still_saved_and_copied() -> None:
    module, _ = made(Grid(4, 32), 16, 64)
    x = torch.ones(1, 64).bfloat16()
    before, state = module(x), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert module.int4 is not None
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), before)
    other, _ = made(Grid(4, 32), 16, 64)
    other(x)
    for tensor in other._buffers.values():
        if tensor is not None and tensor.dtype == torch.int32:
            tensor.zero_()
    other.load_state_dict(state)  # what was laid out before is not what is there now
    assert torch.equal(other(x), before)


def test_a_model_without_a_library(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generates by that product where it can be, its other matrices decoded, as it does where all are."""
    folder = packed(
        tiny("qwen3_moe", dtype="bfloat16"), tmp_path,
        lambda items: {item.name: fitted(item, Grid(4, 32)) for item in items}, everything,
    )  # fmt: skip
    model = moezip.load(folder)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    found = model(ids).logits
    modules = {path: module for path, module in model.named_modules() if isinstance(module, Packed)}
    used = {path for path, module in modules.items() if module.int4 is not None}
    assert "model.layers.0.self_attn.q_proj" in used and any(".experts." in path for path in used)
    assert used < set(modules) and all(modules[path].columns == 32 for path in used)  # not down, of 16
    monkeypatch.setattr(int4, "MOST_TOKENS", 0)
    wanted = moezip.load(folder)(ids).logits
    # most of the 18 tokens choose the same experts in spite of roundings
    assert float((found - wanted).abs().amax(-1).median()) <= 0.1
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)

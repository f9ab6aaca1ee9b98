"""Packed codes: hand-worked words, a slow reference, round trips, and damage that must be noticed."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from moezip.errors import CheckpointError, PlanError
from moezip.formats import gptq
from moezip.formats.packed import (
    PACKED,
    SCALE,
    SHAPE,
    STEP,
    ZERO,
    Codes,
    Grid,
    decode,
    dequantize,
    encode,
    pack,
    unpack,
)

BITS = range(1, 9)
# Rows around one word of zeros (32 / bits of them) and around a block of 32; columns that fill words and that do not.
SHAPES = ((1, 32, 32), (3, 96, 32), (33, 64, 64), (33, 40, 0), (5, 7, 0), (64, 128, 0))


def slow_words(codes: list[int], bits: int) -> list[int]:
    """The words of one row, by the definition: one long number whose lowest bits are the first code."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    raw = number.to_bytes(4 * -(-len(codes) * bits // 32), "little")
    return [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]


def random_codes(grid: Grid, rows: int, columns: int, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, grid.groups(columns))
    codes = torch.randint(0, grid.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, grid.levels, shape, dtype=torch.uint8, generator=generator)
    scales = grid.stored_scales(torch.rand(shape, generator=generator) + 0.01)
    return Codes(grid, codes, scales, None if grid.symmetric else zeros)


def all_grids(group: int) -> list[Grid]:
    return [Grid(b, group, s, d, q) for b, s, d, q in product(BITS, (True, False), ("F16", "BF16"), (False, True))]


# -- words --------------------------------------------------------------------------------------------------


def test_words_worked_by_hand() -> None:
    # 4 bits: codes 0 to 7 give the digits 7 6 5 4 3 2 1 0, and 8 more give 1 in the second word.
    assert pack(torch.tensor([[*range(8), 1]], dtype=torch.uint8), 4).tolist() == [[0x76543210, 1]]
    # 3 bits, eleven codes of 7: 33 bits, so the first word is full (-1) and one bit is in the second.
    assert pack(torch.full((1, 11), 7, dtype=torch.uint8), 3).tolist() == [[-1, 1]]
    # 3 bits: code 5 = 101 at place 10 has its two lower bits (01) as bits 30, 31 and its highest as bit 0 of the next
    # word: 01 at bit 30 is 2**30.
    assert pack(torch.tensor([[0] * 10 + [5]], dtype=torch.uint8), 3).tolist() == [[2**30, 1]]
    # 1 bit: codes 1 0 1 1 are 1 + 4 + 8.
    assert pack(torch.tensor([[1, 0, 1, 1]], dtype=torch.uint8), 1).tolist() == [[13]]


@pytest.mark.parametrize("bits", BITS)
def test_words_are_the_slow_ones(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 7, 31, 32, 33, 64, 100):
        codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8, generator=generator)
        packed = pack(codes, bits)
        assert packed.dtype == torch.int32
        assert packed.tolist() == [slow_words(row, bits) for row in codes.tolist()]
        assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    codes = torch.randint(0, 1 << bits, (33, 70), generator=torch.Generator().manual_seed(bits))
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(helpers.pack_to_int32(signed, bits), pack(codes.to(torch.uint8), bits))
    along_rows = pack(codes.to(torch.uint8).t().contiguous(), bits).t()
    assert torch.equal(helpers.pack_to_int32(signed, bits, packed_dim=0), along_rows)


# -- grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4-g32", "int2-g64-sym", "int3-g0-bf16", "int2-g32-double", "int1-g32",
                                  "int8-g128-sym-f32", "int3-g64-sym-bf16-double"])  # fmt: skip
def test_grids_as_text(text: str) -> None:
    assert str(Grid.parse(text)) == text


def test_every_grid_has_its_own_text() -> None:
    grids = {str(grid): grid for group in (0, 32) for grid in all_grids(group)}
    assert all(Grid.parse(text) == grid for text, grid in grids.items())
    # 7 widths x 2 groups x symmetric or not x 2 dtypes x double or not, and 8 of one bit, which is always symmetric.
    assert len(grids) == 7 * 16 + 8


@pytest.mark.parametrize("text", ["int4", "int0-g32", "int9-g32", "int4-g32-sum", "4-g32", "int4-g32 ", "int4-g-1", ""])
def test_texts_that_are_no_grid(text: str) -> None:
    with pytest.raises(PlanError):
        Grid.parse(text)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(PlanError, match="groups of 32 do not divide 40"):
        Grid(4, 32).specs(8, 40)
    assert Grid(4, 0).groups(40) == 1


def test_bytes_worked_by_hand() -> None:
    # 3 bits, 33 x 64 in groups of 32, asymmetric: codes 33 rows x 6 words = 792 bytes; scales 33 x 2 x 2 = 132; zeros
    # ceil(33 x 3 / 32) = 4 words x 2 groups = 32; shape 16. In all 972, 3.68 bits for each of the 2112 weights.
    assert Grid(3, 32).nbytes(33, 64) == 792 + 132 + 32 + 16
    assert Grid(3, 32).bits_per_weight(33, 64) == pytest.approx(3.682, abs=1e-3)
    # Double: scales of one byte each, 66, and a step of two bytes per row, 66.
    assert Grid(3, 32, double=True).nbytes(33, 64) == 792 + 66 + 66 + 32 + 16


# -- scales -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", all_grids(32), ids=str)
def test_stored_scales_stay_and_are_near(grid: Grid) -> None:
    for size in (1e-3, 1.0, 50.0):
        scales = torch.rand((16, 8), generator=torch.Generator().manual_seed(1)) * size + size / 100
        fitting = grid.fitting(scales)
        stored = fitting.stored_scales(scales)
        assert torch.equal(fitting.stored_scales(stored), stored)
        # Half a step: 2**-9 relative for BF16's 8 bits, as for F16 where it fits; half of 1/255 of the row's largest
        # if the scales are quantized (the smallest here is 1/101 of the size, so none is raised to one step).
        bound = scales.amax(1, keepdim=True) / 255 * 0.51 if grid.double else scales * 2**-8
        assert bool(((stored - scales).abs() <= bound).all())


def test_scales_beyond_half_precision_are_stored_as_bf16() -> None:
    for value in (1e-6, 1e-8, 1e5):
        scales = torch.full((2, 2), value)
        assert Grid(4, 32).fitting(scales) == Grid(4, 32, scale="BF16")
        stored = Grid(4, 32).fitting(scales).stored_scales(scales)
        assert torch.allclose(stored, scales, rtol=2**-8, atol=0)
    assert Grid(4, 32).fitting(torch.full((2, 2), 0.01)) == Grid(4, 32)
    # 1e-8 would become 0 in half precision, 1e5 infinity: never silently.
    for value in (1e-8, 1e5):
        with pytest.raises(CheckpointError, match="cannot be stored as F16"):
            Grid(4, 32).stored_scales(torch.full((2, 2), value))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none(value: float) -> None:
    scales = torch.tensor([[1.0, value]])
    for grid in (Grid(4, 32), Grid(4, 32, scale="BF16"), Grid(4, 32, double=True)):
        with pytest.raises(CheckpointError, match="scale"):
            grid.stored_scales(scales)


def test_a_small_scale_is_one_step_never_zero() -> None:
    # Steps of 255 / 255 = 1: 0.1 would round to 0 and becomes 1; 100.4 becomes 100.
    stored = Grid(4, 32, double=True).stored_scales(torch.tensor([[255.0, 0.1, 100.4]]))
    assert stored.tolist() == [[255.0, 1.0, 100.0]]


# -- encode and decode --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_and_bytes(shape: tuple[int, int, int]) -> None:
    rows, columns, group = shape
    for number, grid in enumerate(all_grids(group)):
        codes = random_codes(grid, rows, columns, number)
        stored = encode(codes)
        assert sum(tensor.nbytes for tensor in stored.values()) == grid.nbytes(rows, columns)
        again = decode(stored, grid)
        assert torch.equal(again.codes, codes.codes) and torch.equal(again.scales, codes.scales)
        assert (again.zeros is None) == (codes.zeros is None)
        assert codes.zeros is None or (again.zeros is not None and torch.equal(again.zeros, codes.zeros))
        twice = encode(again)
        assert all(torch.equal(twice[suffix], tensor) for suffix, tensor in stored.items())


def test_weights_worked_by_hand() -> None:
    scales, row = torch.tensor([[0.5, 2.0]]), torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
    # Groups {0, 3} and {1, 2}. Zeros 1 and 2: 0.5 (0 - 1), 0.5 (3 - 1), 2 (1 - 2), 2 (2 - 2).
    zeros = torch.tensor([[1, 2]], dtype=torch.uint8)
    assert dequantize(Codes(Grid(2, 2), row, scales, zeros)).tolist() == [[-0.5, 1.0, -2.0, 0.0]]
    # Symmetric, two bits: the zero is 2.
    assert dequantize(Codes(Grid(2, 2, True), row, scales)).tolist() == [[-1.0, 0.5, -2.0, 0.0]]
    # One bit: 2 q - 1 is -1 or 1.
    signs = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    assert dequantize(Codes(Grid(1, 2), signs, scales)).tolist() == [[-0.5, 0.5, 2.0, -2.0]]
    # With the group of every column given: columns 0, 2 in group 1, columns 1, 3 in group 0.
    order = torch.tensor([1, 0, 1, 0])
    assert dequantize(Codes(Grid(2, 2), row, scales, zeros), order=order).tolist() == [[-4.0, 1.0, -2.0, 0.5]]


def test_rounding_to_the_grid_is_within_half_a_stored_step() -> None:
    weight = torch.randn((8, 64), generator=torch.Generator().manual_seed(3))
    for grid in (Grid(3, 32), Grid(5, 32, double=True), Grid(4, 0, scale="BF16")):
        runs = weight.view(8, grid.groups(64), -1)
        scales = grid.stored_scales((runs.amax(2) - runs.amin(2)) / (grid.levels - 2))
        zeros = (-runs.amin(2) / scales).round().clamp(0, grid.levels - 1)
        codes = (runs / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, grid.levels - 1)
        found = decode(encode(Codes(grid, codes.view(8, 64).to(torch.uint8), scales, zeros.to(torch.uint8))), grid)
        spread = scales.repeat_interleave(64 // grid.groups(64), 1)
        inside = (codes > 0) & (codes < grid.levels - 1)  # those at the ends may have been cut off
        near = (dequantize(found) - weight).abs() <= spread * (0.5 + 1e-6)  # 1e-6: float32 division and product
        assert bool((near | ~inside.view(8, 64)).all()) and int(inside.sum()) > 256


def test_bf16_weights_are_rounded_once() -> None:
    codes = random_codes(Grid(4, 32), 8, 64)
    assert torch.equal(dequantize(codes, torch.bfloat16), dequantize(codes).to(torch.bfloat16))


def test_what_cannot_be_encoded() -> None:
    good = random_codes(Grid(4, 32), 4, 64)
    above = good.codes.clone()
    above[2, 5] = 16
    assert good.zeros is not None
    for bad, words in (
        (Codes(good.grid, above, good.scales, good.zeros), "a code is 16"),
        (Codes(good.grid, good.codes, good.scales, good.zeros + 16), "a zero is"),
        (Codes(good.grid, good.codes, good.scales, None), "zeros"),
        (Codes(good.grid, good.codes, good.scales, good.zeros[:, :1]), "zeros"),
        (Codes(good.grid, good.codes, good.scales[:, :1], good.zeros), "scales"),
        (Codes(good.grid, good.codes, good.scales * 1.0001, good.zeros), "stored_scales"),
    ):
        with pytest.raises(CheckpointError, match=words):
            encode(bad)


# -- damage -------------------------------------------------------------------------------------------------


def damaged(suffix: str, tensor: torch.Tensor | None, grid: Grid = Grid(3, 32)) -> dict[str, torch.Tensor]:  # noqa: B008
    stored = dict(encode(random_codes(grid, 5, 96)))
    if tensor is None:
        del stored[suffix]
    else:
        stored[suffix] = tensor
    return stored


def changed(suffix: str, place: tuple[int, int], value: float, grid: Grid = Grid(3, 32)) -> dict[str, torch.Tensor]:  # noqa: B008
    stored = dict(encode(random_codes(grid, 5, 96)))
    stored[suffix] = stored[suffix].clone()
    stored[suffix][place] = value
    return stored


DAMAGE = {
    "codes gone": (lambda: damaged(PACKED, None), "stored as"),
    "shape gone": (lambda: damaged(SHAPE, None), SHAPE),
    "zeros gone": (lambda: damaged(ZERO, None), "stored as"),
    "words cut off": (lambda: damaged(PACKED, torch.zeros(5, 8, dtype=torch.int32)), r"\[5, 8\].*\[5, 9\]"),
    "rows cut off": (lambda: damaged(PACKED, torch.zeros(4, 9, dtype=torch.int32)), r"\[4, 9\].*\[5, 9\]"),
    "other dtype": (lambda: damaged(PACKED, torch.zeros(5, 9, dtype=torch.int64)), "int64"),
    "scales of another dtype": (lambda: damaged(SCALE, torch.ones(5, 3)), "float32"),
    "shape lies about rows": (lambda: damaged(SHAPE, torch.tensor([6, 96])), r"6 x 96"),
    "shape lies about columns": (lambda: damaged(SHAPE, torch.tensor([5, 64])), r"5 x 64"),
    "shape off the grid": (lambda: damaged(SHAPE, torch.tensor([5, 95])), "5 x 95"),
    "shape of nothing": (lambda: damaged(SHAPE, torch.tensor([0, 96])), "0 x 96"),
    "negative scale": (lambda: changed(SCALE, (4, 2), -0.5), "positive number: -0.5"),
    "scale of 0": (lambda: changed(SCALE, (0, 0), 0.0), "positive number: 0"),
    "infinite scale": (lambda: changed(SCALE, (1, 1), float("inf")), "positive number: inf"),
    "scale not a number": (lambda: changed(SCALE, (1, 1), float("nan")), "positive number: nan"),
    # 5 zeros of 3 bits are 15 of 32 bits: bit 15 is behind the last, as a sixth zero would be.
    "a zero too many": (lambda: changed(ZERO, (0, 1), 1 << 15), "behind the last of 5"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_located(name: str) -> None:
    stored, words = DAMAGE[name][0](), DAMAGE[name][1]
    with pytest.raises(CheckpointError, match=words) as caught:
        decode(stored, Grid(3, 32), "layers.0.up_proj")
    assert caught.value.where == "layers.0.up_proj"


def test_damage_of_quantized_scales() -> None:
    grid = Grid(3, 32, double=True)
    for suffix in (SCALE, STEP):
        with pytest.raises(CheckpointError, match="positive number: 0"):
            decode(changed(suffix, (1, 0), 0, grid), grid)
    with pytest.raises(CheckpointError, match="stored as"):
        decode(damaged(STEP, None, grid), grid)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bits_behind_the_last_code_are_noticed(bits: int) -> None:
    # One row of 7 codes leaves at least one bit of the last word free; the highest is the sign.
    grid = Grid(bits, 0, True)
    stored = dict(encode(random_codes(grid, 2, 7)))
    assert 7 * bits % 32
    stored[PACKED] = stored[PACKED].clone()
    stored[PACKED][1, -1] |= -(2**31)
    with pytest.raises(CheckpointError, match="behind the last of 7"):
        decode(stored, grid)


# -- GPTQ's layout ------------------------------------------------------------------------------------------


def test_gptq_worked_by_hand() -> None:
    # 4 bits, 8 inputs, 8 outputs, one group. Output r has the codes r, r, ..., and the zero 8 (symmetric).
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 8)
    scales = torch.full((8, 1), 0.5)
    stored = gptq.encode(Codes(Grid(4, 0, True), codes, scales))
    # One word per output: eight times the digit r. One word of zeros, each stored as 7.
    assert stored["qweight"].tolist() == [[r * 0x11111111 for r in range(8)]]
    assert stored["qzeros"].tolist() == [[0x77777777]]
    assert stored["scales"].shape == (1, 8) and stored["scales"].dtype == torch.float16
    assert stored["g_idx"].tolist() == [0] * 8
    assert gptq.decode(stored, 4)[:, 0].tolist() == [0.5 * (r - 8) for r in range(8)]
    as_is = gptq.encode(Codes(Grid(4, 0, True), codes, scales), less_one=False)
    assert as_is["qzeros"].tolist() == [[0x88888888 - 2**32]]
    assert torch.equal(gptq.decode(as_is, 4, less_one=False), gptq.decode(stored, 4))


def test_gptq_zero_of_0_borrows_from_its_neighbour_and_is_read_back() -> None:
    # Zeros 0, 2, 2, ...: 0x22222220 - 0x11111111 = 0x1111110F; decoded by whole words it is 0, 2, 2, ... again.
    stored = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32), "qzeros": torch.tensor([[0x1111110F]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }  # fmt: skip
    assert gptq.decode(stored, 4)[:, 0].tolist() == [0.0] + [-2.0] * 7


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_round_trip(bits: int, symmetric: bool, less_one: bool) -> None:
    for group, scale in ((32, "F16"), (0, "BF16")):
        codes = random_codes(Grid(bits, group, symmetric, scale), 24, 96)
        if codes.zeros is not None and less_one:
            codes.zeros.clamp_(min=1)
        stored = gptq.encode(codes, less_one=less_one)
        assert torch.equal(gptq.decode(stored, bits, less_one=less_one), dequantize(codes))
        del stored["g_idx"]
        assert torch.equal(gptq.decode(stored, bits, less_one=less_one), dequantize(codes))


def test_gptq_order_of_groups() -> None:
    codes = random_codes(Grid(4, 32, True), 8, 64)
    stored, order = gptq.encode(codes), torch.randperm(64) // 32
    stored["g_idx"] = order.to(torch.int32)
    assert torch.equal(gptq.decode(stored, 4), dequantize(codes, order=order))
    stored["g_idx"] = (order + 1).to(torch.int32)
    with pytest.raises(CheckpointError, match="groups 1 to 2; there are 2"):
        gptq.decode(stored, 4, where="up_proj")


def test_what_has_no_gptq_form() -> None:
    for grid in (Grid(3, 32), Grid(1, 32), Grid(4, 32, double=True)):
        with pytest.raises(CheckpointError, match="no GPTQ form"):
            gptq.encode(random_codes(grid, 8, 64))
    with pytest.raises(CheckpointError, match="whole words"):
        gptq.encode(random_codes(Grid(4, 32), 5, 64))
    codes = random_codes(Grid(4, 32), 8, 64)
    assert codes.zeros is not None
    codes.zeros[3, 1] = 0
    with pytest.raises(CheckpointError, match="zero of 0"):
        gptq.encode(codes)

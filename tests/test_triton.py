"""The Triton kernels against a plain float64 loop: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0.

The interpreter sees wrong indices, masks and arithmetic, and no race, layout or rounding of a GPU. Its arithmetic in
bf16 is wrong, so there the kernels multiply in fp32; the PTX that a GPU runs instead is emulated below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from moezip.kernels import reference, triton_layout

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install 'moezip[gpu]', or make gpu-check")

from moezip.kernels import triton_experts as gpu  # noqa: E402
from moezip.kernels import triton_grouped as kernels  # noqa: E402
from moezip.kernels import triton_packed  # noqa: E402
from tests import triton_static  # noqa: E402

DEVICE = "cpu" if gpu.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("Triton was imported before its interpreter was asked for, and no GPU is here", allow_module_level=True)

# Sums of a few hundred products in fp32, of numbers above the codes by up to 64 times their range, which is taken off
# again: 6 of 24 bits are lost to that.
PRODUCTS = 5e-5
# Half a unit in the last place of what is written.
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float16, torch.bfloat16]

# rows N around the tiles of 128, inputs K around blocks of 128 and 256, tokens around tiles of 16 and 32; group 0: all
SHAPES = [(1, 32, 32, 1), (40, 256, 128, 3), (130, 192, 64, 17), (129, 96, 32, 33), (9, 704, 0, 2), (64, 384, 192, 16)]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """What torch.empty gives holds NaN, so that nothing that was not written can count for nothing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Known:
    """A random matrix: as a checkpoint stores it, and its weights in float64."""

    def __init__(self, rows: int, inputs: int, bits: int, group: int, seed: int = 0, **kind: Any):
        chance = torch.Generator().manual_seed(seed)
        groups, symmetric = inputs // group if group else 1, kind.get("symmetric", bits == 1)
        codes = torch.randint(0, 2**bits, (rows, inputs), generator=chance, dtype=torch.uint8)
        self.scales = (0.01 + 0.02 * torch.rand(rows, groups, generator=chance)).to(kind.get("scales", torch.float16))
        self.zeros = None
        if not symmetric:
            self.zeros = torch.randint(0, 2**bits, (rows, groups), generator=chance, dtype=torch.uint8)
        self.packed = torch.from_numpy(reference.pack(codes.numpy(), bits, 1))
        self.bits, self.group, self.inputs = bits, group, inputs
        whole = codes.double().view(rows, groups, -1)
        if bits == 1:
            values = 2 * whole - 1
        else:
            values = whole - (2 ** (bits - 1) if self.zeros is None else self.zeros.double()[:, :, None])
        self.weights = (values * self.scales.double()[:, :, None]).view(rows, inputs)

    def laid_out(self) -> triton_packed.Matrix:
        zeros = None if self.zeros is None else self.zeros.to(DEVICE)
        return triton_packed.lay_out(
            self.packed.to(DEVICE), self.scales.to(DEVICE), zeros, self.bits, self.group, self.inputs
        )


def inputs_of(tokens: int, width: int, dtype: torch.dtype, seed: int = 9) -> torch.Tensor:
    made = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (made + 0.3).to(dtype).to(DEVICE)  # a mean makes what is added and taken off larger


# -- layout --------------------------------------------------------------------------------------------------


def test_lanes_hold_the_codes_of_inputs_one_run_apart():
    """4 bits, 32 lanes: lane l holds the inputs l, 32 + l, 64 + l, 96 + l. Codes 1 + k // 32 make every lane 0x4321."""
    codes = (1 + torch.arange(128) // 32).to(torch.uint8)[None]
    assert triton_layout.lay_out(codes, 4).tolist() == [0x4321] * 32
    # 1 bit, 16 lanes of 16 fields: input 35 = 2 * 16 + 3 is field 2 of lane 3, so bit 2; input 255 bit 15 of lane 15.
    codes = torch.zeros((1, 256), dtype=torch.uint8)
    codes[0, 35] = codes[0, 255] = 1
    assert triton_layout.lay_out(codes, 1).tolist() == [0, 0, 0, 4, *[0] * 11, -(2**15)]
    # 3 bits = 2 + 1: two runs of 2-bit lanes (inputs 0-127, 128-255), then one of 1-bit lanes, each [rows, 16]. Code 6
    # = 0b110 at input 129 of row 1: 2 in field 0 of lane 1 of row 1 of the second run, 1 in field 8 of lane 1.
    codes = torch.zeros((2, 256), dtype=torch.uint8)
    codes[1, 129] = 6
    lanes = triton_layout.lay_out(codes, 3)
    assert lanes.nonzero().flatten().tolist() == [32 + 16 + 1, 64 + 16 + 1]
    assert lanes[lanes != 0].tolist() == [2, 2**8]


@pytest.mark.parametrize("bits", range(1, 9))
def test_laying_out_loses_no_code_and_takes_no_more_room(bits: int):
    for rows, inputs in ((1, 32), (3, 128), (5, 704), (40, 96)):
        codes = torch.randint(0, 2**bits, (rows, inputs), generator=torch.Generator().manual_seed(rows))
        codes = codes.to(torch.uint8)
        words = torch.from_numpy(reference.pack(codes.numpy(), bits, 1))
        assert torch.equal(triton_layout.unpack_words(words, bits, inputs), codes)
        lanes = triton_layout.lay_out(codes, bits)
        assert lanes.numel() * 16 == rows * triton_layout.padded(inputs, bits) * bits
        assert torch.equal(triton_layout.taken_apart(lanes, bits, rows, inputs), codes)


def test_planes_add_up_to_the_width():
    for bits in range(1, 9):
        assert sum(triton_layout.PLANES[bits]) == bits
        runs, block = triton_layout.runs(bits), triton_layout.block_inputs(bits)
        assert sum(run.lanes for run in runs) * 16 == block * bits
        assert [run.at for run in runs] == list(np.cumsum([0, *(run.lanes for run in runs)])[:-1])


# -- numbers -------------------------------------------------------------------------------------------------


def ptx(text: str, words: np.ndarray) -> np.ndarray:
    """What one PTX instruction of the kernels does to 32-bit words."""
    name, _, rest = text.rstrip(";").partition(" ")
    given = [int(word, 0) for word in rest.split(", ")[2:]]
    if name == "lop3.b32":
        assert given[2] == 0xEA  # (a & b) | c
        return (words & np.uint32(given[0])) | np.uint32(given[1])
    return words >> np.uint32(given[0]) if {"shr.b32": True, "shl.b32": False}[name] else words << np.uint32(given[0])


@pytest.mark.parametrize("mantissa", [10, 7])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_ptx_makes_numbers_that_are_a_constant_above_the_code(mantissa: int, width: int):
    """Both halves of every word, whatever the other half and the other fields hold."""
    words = np.random.default_rng(width).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    for plane in (0, 2, 4):
        for field in range(16 // width):
            shift, bit = triton_layout.place(field * width, width, mantissa)
            mask, exponent = ((1 << width) - 1) << bit, kernels._exponent(mantissa - bit + plane, mantissa)
            moved = ptx(kernels._moved(shift), words) if shift else words
            made = ptx(kernels._and_or(mask, exponent), moved)
            for half in (0, 16):
                codes = words >> np.uint32(half + field * width) & np.uint32((1 << width) - 1)
                numbers = (made >> np.uint32(half)).astype(np.uint16)
                found = (
                    numbers.view(np.float16).astype(np.float64)
                    if mantissa == 10
                    else (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
                )
                assert np.array_equal(found, 2.0 ** (mantissa - bit + plane) + codes * 2.0**plane)


# -- products ------------------------------------------------------------------------------------------------


def products(x: torch.Tensor, matrix: triton_packed.Matrix) -> torch.Tensor:
    """fp32, before anything is rounded to the dtype of x."""
    linear = triton_packed.pack_linear(matrix)
    tiles = gpu._all_rows(len(x), x.device)
    return gpu._multiply(x, linear.stacks, tiles, 1, linear.rows, parts=1, rows=len(x), experts=1).sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_the_decoded_weights(bits: int, dtype: torch.dtype):
    for number, (rows, inputs, group, tokens) in enumerate(SHAPES):
        known = Known(rows, inputs, bits, group, symmetric=bits == 1 or number % 2 == 1)
        x = inputs_of(tokens, inputs, dtype)
        true = x.cpu().double() @ known.weights.T
        found = products(x, known.laid_out()).cpu()
        assert (found - true).abs().max() <= PRODUCTS * true.abs().max(), (rows, inputs, group, tokens)


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=str)
def test_scales_may_be_of_other_dtypes(scales: torch.dtype):
    for bits in (1, 3):
        known = Known(17, 128, bits, 64, scales=scales)
        x = inputs_of(2, 128, torch.bfloat16)
        true = x.cpu().double() @ known.weights.T
        assert (products(x, known.laid_out()).cpu() - true).abs().max() <= PRODUCTS * true.abs().max()


def test_a_one_bit_scale_that_cannot_be_doubled_in_its_dtype_is_kept_in_fp32():
    known = Known(2, 32, 1, 32)
    known.scales.fill_(60000.0)  # of 65504 at most in fp16
    matrix = known.laid_out()
    assert matrix.scales.dtype == torch.float32
    assert matrix.scales.unique().item() == 2 * known.scales[0, 0].item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_has_a_bias_and_rounds_once(dtype: torch.dtype):
    known, bias = Known(40, 256, 4, 128), torch.linspace(-1, 1, 40)
    x = inputs_of(6, 256, dtype).view(2, 3, 256)
    found = gpu.run_linear(x, triton_packed.pack_linear(known.laid_out(), bias.to(DEVICE)))
    true = x.cpu().double() @ known.weights.T + bias.double()
    assert found.shape == (2, 3, 40) and found.dtype == dtype
    allowed = HALF[dtype] * true.abs() + PRODUCTS * true.abs().max()
    assert ((found.cpu().double() - true).abs() <= allowed).all()


@pytest.mark.parametrize("count", [1, 2, 100])
def test_splitting_the_inputs_changes_the_order_of_sums_alone(count: int, monkeypatch: pytest.MonkeyPatch):
    """Five blocks in 1, 2 and 4 splits; the last of the 4 has no block left."""
    known, x = Known(24, 640, 2, 64), inputs_of(3, 640, torch.float16)
    monkeypatch.setattr(gpu, "_multiprocessors", lambda device: count)
    true = x.cpu().double() @ known.weights.T
    found = products(x, known.laid_out())
    assert (found.cpu() - true).abs().max() <= PRODUCTS * true.abs().max()


def test_no_tokens():
    known = Known(8, 32, 4, 32)
    linear = triton_packed.pack_linear(known.laid_out())
    assert gpu.run_linear(inputs_of(0, 32, torch.float16), linear).shape == (0, 8)


# -- tiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [gpu.DECODE, gpu.PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize(("pairs", "experts"), [(1, 8), (7, 3), (64, 2), (200, 5), (33, 1), (16, 200)])
def test_every_pair_is_in_one_tile_of_its_expert(tile: gpu.Tile, pairs: int, experts: int):
    chosen = torch.randint(-1, experts, (pairs,), generator=torch.Generator().manual_seed(pairs))
    tiles = gpu._tiles(chosen.to(DEVICE), experts, tile)
    rows, owners = tiles.rows.cpu().view(tiles.count, tile.tokens), tiles.experts.cpu().tolist()
    found = {int(row): owner for line, owner in zip(rows, owners) for row in line if row >= 0 and owner >= 0}
    assert found == {pair: expert for pair, expert in enumerate(chosen.tolist()) if expert >= 0}
    assert (rows >= 0).sum() == pairs  # none twice


# -- layers --------------------------------------------------------------------------------------------------


def act(kind: str, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    if kind == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def by_hand(
    x: torch.Tensor, experts: Sequence[Any], kind: str, chosen: torch.Tensor, weights: torch.Tensor, **more: Any
) -> torch.Tensor:
    """One token and one choice after the other, in float64; what is between the products is rounded as x is."""
    biases = more.get("biases")
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(chosen.tolist()):
        for place, number in enumerate(row):
            if number < 0:
                continue
            value = torch.zeros(x.shape[1], dtype=torch.float64)
            bias: Any = (0, 0, 0) if biases is None else biases[number]
            if experts[number] is not None:
                gate, up, down = (known.weights for known in experts[number])
                inner = x[token].cpu().double()
                h = act(kind, gate @ inner + bias[0], up @ inner + bias[1], more.get("limit", 7.0), 1.702)
                value = down @ h.to(x.dtype).double() + bias[2]
            elif biases is not None:
                value = bias.double()
            out[token] += weights[token, place].double() * value
    return out


def expert(width: int, hidden: int, bits: tuple[int, int, int], group: int, seed: int, **kind: Any) -> Any:
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    return [Known(*shape, b, group, seed=3 * seed + i, **kind) for i, (shape, b) in enumerate(zip(shapes, bits))]


def layer_of(experts: Sequence[Any], kind: str, **more: Any) -> triton_packed.Layer:
    there = [None if known is None else tuple(each.laid_out() for each in known) for known in experts]
    return triton_packed.pack_layer(there, kind, **more)


def close(found: torch.Tensor, true: torch.Tensor) -> bool:
    """Half a unit of the output, and as much again for values between the products that rounded the other way."""
    assert found.isfinite().all()
    return bool((found.cpu().double() - true).abs().max() <= 2 * HALF[found.dtype] * true.abs().max())


@pytest.mark.parametrize("kind", triton_packed.GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_the_weighted_sum_of_its_chosen_experts(kind: str, dtype: torch.dtype):
    experts = [expert(64, 96, (4, 4, 4), 32, seed) for seed in range(3)]
    x, chosen = inputs_of(5, 96, dtype), torch.tensor([[0, 2], [2, 1], [0, 1], [1, 0], [2, 0]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(4))
    found = gpu.run_layer(x, layer_of(experts, kind), chosen.to(DEVICE), weights.to(DEVICE))
    assert found.shape == x.shape and found.dtype == dtype
    assert close(found, by_hand(x, experts, kind, chosen, weights))


def test_widths_bits_and_groups_may_differ_and_experts_be_absent():
    """Gate and up of other widths than each other, an expert of width 0, one whose rows end inside a block, biases."""
    experts = [
        expert(96, 128, (2, 3, 4), 32, 0),
        None,
        expert(32, 128, (8, 8, 1), 32, 1, symmetric=True),
        expert(160, 128, (5, 6, 7), 32, 2),
    ]
    biases: list[Any] = []
    for number, known in enumerate(experts):
        chance = torch.Generator().manual_seed(number)
        width = 0 if known is None else len(known[0].weights)
        each = tuple(torch.randn(size, generator=chance).double() for size in (width, width, 128))
        biases.append(each[2] if known is None else each)
    on_device = [b.to(DEVICE) if isinstance(b, torch.Tensor) else tuple(t.to(DEVICE) for t in b) for b in biases]
    layer = layer_of(experts, "clamped", biases=on_device, limit=0.5)
    assert sorted({(each.bits, each.zeros is None) for each in (*layer.gate_up, *layer.down)}) == [
        (1, True), (2, False), (3, False), (4, False), (5, False), (6, False), (7, False), (8, True),
    ]  # fmt: skip
    x = inputs_of(7, 128, torch.float16)
    chosen = torch.tensor([[0, 1, 2], [3, 3, 1], [1, 2, 0], [-1, 3, 0], [-1, -1, -1], [2, 3, 1], [0, 2, 3]])
    weights = torch.rand(7, 3, generator=torch.Generator().manual_seed(5))
    found = gpu.run_layer(x, layer, chosen.to(DEVICE), weights.to(DEVICE))
    assert close(found, by_hand(x, experts, "clamped", chosen, weights, biases=biases, limit=0.5))
    assert (found[4] == 0).all()  # every choice skipped


def test_many_tokens_of_few_experts_go_in_larger_tiles():
    experts = [expert(32, 64, (3, 3, 3), 32, seed) for seed in range(2)]
    x, chosen = inputs_of(45, 64, torch.bfloat16), (torch.arange(45) % 5 // 3)[:, None]
    assert chosen.numel() > gpu.DECODE.tokens * len(experts)
    weights = torch.ones(45, 1)
    found = gpu.run_layer(x, layer_of(experts, "silu"), chosen.to(DEVICE), weights.to(DEVICE))
    assert close(found, by_hand(x, experts, "silu", chosen, weights))


def test_the_order_of_experts_and_tokens_does_not_matter():
    """Bit for bit: a token's sums do not depend on what else is in its tile."""
    experts = [expert(64, 64, (2, 2, 2), 64, seed) for seed in range(4)]
    x = inputs_of(6, 64, torch.bfloat16)
    chosen = torch.randint(0, 4, (6, 2), generator=torch.Generator().manual_seed(6))
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(7))
    first = gpu.run_layer(x, layer_of(experts, "silu"), chosen.to(DEVICE), weights.to(DEVICE))
    again = gpu.run_layer(x, layer_of(experts, "silu"), chosen.to(DEVICE), weights.to(DEVICE))
    assert torch.equal(first, again)
    new = torch.tensor([2, 0, 3, 1])  # expert e is now number new[e]
    moved = [experts[int((new == number).nonzero())] for number in range(4)]
    assert torch.equal(first, gpu.run_layer(x, layer_of(moved, "silu"), new[chosen].to(DEVICE), weights.to(DEVICE)))
    turned = torch.tensor([5, 3, 0, 1, 4, 2])
    layer = layer_of(experts, "silu")
    other = gpu.run_layer(x[turned.to(DEVICE)], layer, chosen[turned].to(DEVICE), weights[turned].to(DEVICE))
    assert torch.equal(first[turned.to(DEVICE)], other)


def test_no_expert_chosen_gives_zeros():
    layer = layer_of([expert(32, 32, (4, 4, 4), 32, 0)], "silu")
    none = torch.zeros((3, 0), dtype=torch.int64, device=DEVICE)
    assert (gpu.run_layer(inputs_of(3, 32, torch.float16), layer, none, none.float()) == 0).all()


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits are 1 to 8, not 9"),
        ({"inputs": 128}, "8 words do not hold 128 codes of 4 bits"),
        ({"group": 48}, "groups of multiples of 32, or whole rows, not 48"),
        ({"group": 128}, "groups of 128 do not divide 64 inputs"),
        ({"group": 64}, r"scales are \[4, 2\], not \[4, 1\]"),
        ({"packed": torch.zeros(4, 8, dtype=torch.int64)}, "codes are torch.int64"),
        ({"scales": torch.ones(4, 2, dtype=torch.float64)}, "scales are torch.float64"),
        ({"zeros": torch.zeros(4, 2, dtype=torch.int32)}, "zeros are not uint8"),
        ({"bits": 1, "packed": torch.zeros(4, 2, dtype=torch.int32)}, "one bit has no zeros"),
    ],
)
def test_tensors_that_are_no_matrix_are_refused(change: dict[str, Any], message: str):
    known = Known(4, 64, 4, 32)
    given = {"packed": known.packed, "scales": known.scales, "zeros": known.zeros, "bits": 4, "group": 32, "inputs": 64}
    with pytest.raises(ValueError, match=message):
        triton_packed.lay_out(**(given | change))


def test_inputs_that_do_not_fit_are_refused():
    linear = triton_packed.pack_linear(Known(4, 64, 4, 32).laid_out())
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        gpu.run_linear(inputs_of(1, 64, torch.float32), linear)
    with pytest.raises(ValueError, match="x has 32 inputs for matrices of 64"):
        gpu.run_linear(inputs_of(1, 32, torch.float16), linear)
    layer = layer_of([expert(32, 64, (4, 4, 4), 32, 0)], "silu")
    chosen, weights = torch.zeros((2, 1), dtype=torch.int64, device=DEVICE), torch.ones((2, 1), device=DEVICE)
    with pytest.raises(ValueError, match="do not belong to x"):
        gpu.run_layer(inputs_of(3, 64, torch.float16), layer, chosen, weights)
    with pytest.raises(ValueError, match=r"not int64"):
        gpu.run_layer(inputs_of(2, 64, torch.float16), layer, chosen.int(), weights)
    with pytest.raises(ValueError, match="the gate is 'relu', not one of silu"):
        layer_of([expert(32, 64, (4, 4, 4), 32, 0)], "relu")
    with pytest.raises(ValueError, match="gate, up and down are"):
        layer_of([[*expert(32, 64, (4, 4, 4), 32, 0)[:2], Known(64, 64, 4, 32)]], "silu")


# -- figures of the compiler ---------------------------------------------------------------------------------


def test_decode_spends_no_more_instructions_than_full_bandwidth_allows():
    """At 3.35 TB/s an H100 reads 26.8 / bits T weights/s and issues 29.7 T instructions/s: 1.108 bits for each weight.

    One bit alone does not keep to it: 1.9 instructions are spent where 1.1 are there.
    """
    kept = json.loads(triton_static.TABLE.read_text(encoding="utf-8"))
    for bits in range(2, 9):
        assert kept[f"sm_90 grouped {bits} bits g128 decode bf16"]["instructions"] <= 29.7 / 26.8 * bits


def test_worse_figures_are_told_and_better_ones_are_not():
    kept = triton_static.Figures(100, 0, 40000, "wgmma", 2.0)
    assert triton_static.worse(kept, kept) == []
    assert triton_static.worse(triton_static.Figures(90, 0, 20000, "wgmma", 1.5), kept) == []
    bad = triton_static.Figures(109, 8, 41025, "mma", 2.11)
    assert [what.split()[0] for what in triton_static.worse(bad, kept)] == [
        "instructions", "registers", "shared", "spilled", "product",
    ]  # fmt: skip

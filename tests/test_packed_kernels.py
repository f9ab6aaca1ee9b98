"""Products with packed matrices against float64 over awkward shapes, on every instruction set that there is."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from moezip import kernels
from moezip.kernels import build, products
from moezip.kernels import products_reference as true
from tests.test_kernels import native

# Of the largest result. fp32 sums of a few hundred products, of numbers that are up to 3 times the weights' (a 1 is
# added to each code and taken off the sum).
FP32 = 1e-5
# A result rounded to bf16, which has 8 bits: half a unit of the last one.
BF16 = 2**-8 + FP32
# Down projections see what gate and up made of the input, rounded to bf16 too: its errors add up as a random walk.
BF16_TWICE = 6e-3
# Whole numbers of 8 bits against what they stand for: only a tie can be rounded another way, and few are.
TIES = 4e-3

# Rows around blocks of 16, groups around units of 32, and one scale per row.
SHAPES = [(48, 256, 128), (33, 96, 32), (17, 66, 11), (16, 96, 0), (5, 40, 0), (1, 32, 8), (64, 192, 64)]
KINDS = ("F16", "BF16", "F32", "U8")


@pytest.fixture(params=list(build.variants()))
def library(request: pytest.FixtureRequest) -> Any:
    return native(request.param)


def rounded(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def floats(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


@dataclass
class Case:
    """A random matrix: laid out, and as float64."""

    laid: products.Laid
    codes: np.ndarray
    weight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


def case(library: Any, rows: int, columns: int, group: int, bits: int, kind: Any = "F16", seed: int = 0) -> Case:
    chance = np.random.default_rng(seed + bits)
    groups = columns // group if group else 1
    codes = chance.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    scales = (0.02 * chance.random((rows, groups)) + 0.001).astype(np.float32)
    scales[0, 0] = 3e-6  # below the normal numbers of F16
    zeros = None if bits == 1 or kind == "BF16" else chance.integers(0, 2**bits, (rows, groups)).astype(np.uint8)
    steps = None
    stored: np.ndarray = scales
    if kind == "F16":
        stored = scales.astype(np.float16).view(np.uint16)
        scales = stored.view(np.float16).astype(np.float64)
    elif kind == "BF16":
        stored, scales = rounded(scales), floats(rounded(scales))
    elif kind == "U8":
        stored = chance.integers(1, 256, (rows, groups)).astype(np.uint8)
        steps = (1e-4 * chance.random(rows) + 1e-5).astype(np.float32)
        scales = stored * steps.astype(np.float64)[:, None]
    laid = products.lay(kernels.pack(codes, bits), stored, zeros, columns, bits, kind, steps=steps, library=library)
    return Case(laid, codes, true.weights(codes, scales, zeros, bits), stored, zeros)


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(floats(found) - wanted).max() <= tolerance * np.abs(wanted).max())


# -- the layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_and_back(bits: int, library: Any) -> None:
    for number, (rows, columns, group) in enumerate(SHAPES):
        made = case(library, rows, columns, group, bits, KINDS[number % 4])
        assert np.array_equal(made.laid.codes, true.relay(made.codes, made.laid.groups, bits))
        assert np.array_equal(products.codes(made.laid, threads=2, library=library), made.codes)
        assert np.array_equal(products.per_group(made.laid, "scales"), made.scales)
        zeros = products.per_group(made.laid, "zeros")
        assert zeros is None if made.zeros is None else np.array_equal(zeros, made.zeros)


def test_a_unit_by_hand(library: Any) -> None:
    # 3 bits: a plane of 2 bits in two lines, then one of 1 bit. Row 0, columns 0 to 3 are 5, 2, 7, 0: their upper two
    # bits 2, 1, 3, 0 are byte 0 of line 0, 2 + 1 * 4 + 3 * 16 = 54; their lowest 1, 0, 1, 0 byte 0 of line 2, 5. Column
    # 28 of row 1 is 4: the upper bits, 2, begin byte 3 of line 1 (columns 28 to 31), at row 1: 4 + 3.
    codes = np.zeros((2, 32), np.uint8)
    codes[0, :4], codes[1, 28] = (5, 2, 7, 0), 4
    laid = products.lay(kernels.pack(codes, 3), np.ones((2, 1), np.float32), None, 32, 3, "F32", library=library)
    wanted = np.zeros((1, 1, 3, 64), np.uint8)
    wanted[0, 0, 0, 0], wanted[0, 0, 2, 0], wanted[0, 0, 1, 7] = 54, 5, 2
    assert np.array_equal(laid.codes, wanted)


@pytest.mark.parametrize("bits", range(1, 9))
def test_plain_is_what_dequantize_says(bits: int, library: Any) -> None:
    """The same bits, so that a decoded matrix does not depend on where it lies."""
    for rows, columns, group in SHAPES:
        made = case(library, rows, columns, group, bits, "F32")
        packed = kernels.pack(made.codes, bits)
        for dtype in ("float32", "bfloat16"):
            wanted = kernels.dequantize(packed, made.scales, made.zeros, group, bits, columns, dtype=dtype)
            assert np.array_equal(products.plain(made.laid, dtype=dtype, threads=2, library=library), wanted.T)


# -- one matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("halves", [False, True])
def test_products(bits: int, halves: bool, library: Any) -> None:
    chance = np.random.default_rng(1)
    for number, (rows, columns, group) in enumerate(SHAPES):
        made = case(library, rows, columns, group, bits, KINDS[(number + bits) % 4])
        for tokens in (1, 2, 3, 4, 8, 15):
            x = chance.standard_normal((tokens, columns)).astype(np.float32)
            x[0, columns // 2 :] = 0
            given = rounded(x) if halves else x
            seen = floats(given).astype(np.float64)
            found = products.linear(made.laid, given, threads=2, library=library)
            assert found.dtype == given.dtype
            assert close(found, seen @ made.weight.T, BF16 if halves else FP32)
            whole = true.whole_numbers(seen, made.laid.groups)
            found = products.linear(made.laid, given, activations="int8", threads=2, library=library)
            assert close(found, whole @ made.weight.T, BF16 + TIES if halves else TIES)


@pytest.mark.parametrize("bits", range(1, 9))
def test_more_tokens_than_are_taken_at_once(bits: int, library: Any) -> None:
    """Of bf16, 8 in vectors and 32 in tiles; whatever is left over."""
    chance = np.random.default_rng(2)
    for rows, columns, group in ((48, 256, 128), (33, 96, 32), (17, 66, 11)):
        made = case(library, rows, columns, group, bits)
        for tokens in (16, 17, 32, 33, 50):
            given = rounded(chance.standard_normal((tokens, columns)))
            wanted = floats(given).astype(np.float64) @ made.weight.T
            assert close(products.linear(made.laid, given, threads=2, library=library), wanted, BF16)


def test_a_product_by_hand(library: Any) -> None:
    # scale 0.5, zero 1: codes (0, 3) are (-0.5, 1); scale 2, zero 2: (1, 2) are (-2, 0). x = (4, 1), bias (10, 20):
    # 4 * -0.5 + 1 + 10 = 9 and 4 * -2 + 0 + 20 = 12
    codes, scales = np.array([[0, 3], [1, 2]], np.uint8), np.array([[0.5], [2]], np.float32)
    laid = products.lay(
        kernels.pack(codes, 2), scales, np.array([[1], [2]], np.uint8), 2, 2, "F32",
        bias=np.array([10, 20], np.float32), library=library,
    )  # fmt: skip
    assert products.linear(laid, np.array([[4, 1]], np.float32), library=library).tolist() == [[9, 12]]


def test_infinite_and_not_a_number_stay_what_they_are(library: Any) -> None:
    made = case(library, 16, 64, 32, 4)
    for bad, bits in ((np.nan, 0x7FC0), (np.inf, 0x7F80)):
        x = np.ones((2, 64), np.float32)
        halves = rounded(x)
        x[1, 3], halves[1, 3] = bad, bits
        for given in (x, halves):
            found = floats(products.linear(made.laid, given, library=library))
            assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()


def test_the_same_from_many_threads_at_once(library: Any) -> None:
    made = case(library, 400, 256, 32, 3)
    x = np.random.default_rng(0).standard_normal((8, 5, 256)).astype(np.float32)
    alone = [products.linear(made.laid, each, library=library) for each in x]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda each: products.linear(made.laid, each, threads=3, library=library), x))
            assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))


def test_the_same_from_any_number_of_threads(library: Any) -> None:
    """71 pairs of blocks, the last one half full, for few threads and for more than have runs of items of their own."""
    chance = np.random.default_rng(0)
    rows, columns = 2241, 5504
    packed = chance.integers(-(2**31), 2**31, (rows, columns // 32)).astype(np.int32)
    scales = chance.random((rows, 43), np.float32)
    laid = products.lay(packed, scales, None, columns, 1, "F32", library=library)
    x = chance.standard_normal((3, columns), np.float32)
    for tokens in (1, 3):
        alone = products.linear(laid, x[:tokens], library=library)
        for threads in (2, 5, 70):
            assert np.array_equal(products.linear(laid, x[:tokens], threads=threads, library=library), alone)


@pytest.mark.parametrize(
    "change",
    [
        {"packed": np.zeros((2, 2), np.int32)},
        {"packed": np.zeros((2, 4), np.int64)},
        {"scales": np.ones((2, 3), np.float32)},
        {"scales": np.ones((2, 2), np.float64)},
        {"zeros": np.zeros((2, 1), np.uint8)},
        {"bits": 9},
        {"kind": "F8"},
        {"kind": "U8"},
        {"steps": np.ones(2, np.float32)},
        {"bias": np.ones(3, np.float32)},
        {"threads": 0},
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"packed": np.zeros((2, 4), np.int32), "scales": np.ones((2, 2), np.float32), "zeros": None,
                             "columns": 32, "bits": 4, "kind": "F32"}  # fmt: skip
    products.lay(**given, library=native())
    with pytest.raises(ValueError):
        products.lay(**(given | change), library=native())


def test_activations_that_do_not_fit_are_refused() -> None:
    made = case(native(), 16, 64, 32, 4)
    for x in (np.ones((2, 63), np.float32), np.ones((2, 64)), np.ones((64, 2), np.float32).T, [[1.0] * 64]):
        with pytest.raises(ValueError):
            products.linear(made.laid, x, library=native())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exact or int8"):
        products.linear(made.laid, np.ones((2, 64), np.float32), activations="int4", library=native())  # type: ignore[arg-type]
    assert products.linear(made.laid, np.ones((0, 64), np.float32), library=native()).shape == (0, 16)


# -- a layer ------------------------------------------------------------------------------------------------

HIDDEN = 80
# Widths of the experts of a layer; one of 0, which is its bias alone.
WIDTHS = (48, 0, 33, 16, 64, 50, 40)


def layer(library: Any, seed: int = 0) -> tuple[products.Experts, list[Any]]:
    """Seven experts, every matrix of another width and grid, with biases."""
    chance = np.random.default_rng(seed)
    held: list[Any] = []
    plain: list[Any] = []
    constants: list[Any] = []
    for expert, width in enumerate(WIDTHS):
        constant = chance.standard_normal(HIDDEN).astype(np.float32)
        constants.append(None if width else constant)
        if not width:
            held.append(None)
            plain.append(constant.astype(np.float64))
            continue
        sizes = (
            (width, HIDDEN, (16, 0, 40, 10)[expert % 4]),
            (width, HIDDEN, 0),
            (HIDDEN, width, 0 if width % 8 else 8),
        )
        laid, numbers = [], []
        for role, (rows, columns, group) in enumerate(sizes):
            made = case(library, rows, columns, group, (expert + 3 * role) % 8 + 1, KINDS[(expert + role) % 4], expert)
            bias = chance.standard_normal(rows).astype(np.float32)
            laid.append(replace(made.laid, bias=products._padded(bias)))
            numbers.append((made.weight, bias.astype(np.float64)))
        held.append(tuple(laid))
        plain.append(tuple(numbers))
    return products.Experts(held, HIDDEN, constants, library), plain


def routed(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [T, D], ids [T, 3] of which some are -1, weights [T, 3]."""
    chance = np.random.default_rng(seed)
    ids = np.stack([chance.permutation(len(WIDTHS))[:3] for _ in range(tokens)]).astype(np.int64)
    ids[chance.random(ids.shape) < 0.1] = -1
    x = chance.standard_normal((tokens, HIDDEN)).astype(np.float32)
    return x, ids, chance.random((tokens, 3)).astype(np.float32)


@pytest.mark.parametrize("gate", list(products.GATES))
def test_a_layer(gate: str, library: Any) -> None:
    table, plain = layer(library)
    for tokens in (1, 3, 20, 90):
        x, ids, weights = routed(tokens)
        for given in (x, rounded(x)):
            halves = given.dtype == np.uint16
            seen = floats(given).astype(np.float64)
            wanted = true.experts(plain, seen, ids, weights.astype(np.float64), (gate, 1.702, 2.0))
            found = table.run(given, ids, weights, gate, alpha=1.702, limit=2.0)
            assert found.dtype == given.dtype
            assert close(found, wanted, BF16_TWICE if halves else FP32)
            again = table.run(given, ids, weights, gate, alpha=1.702, limit=2.0, threads=3)
            assert np.array_equal(found, again)
            # coarser, not wrong: half a step of 127 for each of the inputs, twice
            found = table.run(given, ids, weights, gate, alpha=1.702, limit=2.0, activations="int8", threads=3)
            assert close(found, wanted, 0.03)


def test_groups_of_several_sizes_in_one_layer(library: Any) -> None:
    """Whole units all of them, which lie alike in memory: what is known of a group is not that of another size."""
    chance = np.random.default_rng(5)
    sizes = ((24, 128, 32), (24, 128, 0)), ((40, 128, 64), (40, 128, 128)), ((16, 128, 0), (16, 128, 32))
    held, plain = [], []
    for expert, (gate, up) in enumerate(sizes):
        made = [case(library, *each, 2 + expert) for each in (gate, up, (128, gate[0], 0))]
        held.append(tuple(each.laid for each in made))
        plain.append(tuple((each.weight, np.zeros(len(each.weight))) for each in made))
    table = products.Experts(held, 128, library=library)
    for tokens in (1, 5):
        x = chance.standard_normal((tokens, 128)).astype(np.float32)
        ids = np.tile(np.arange(3), (tokens, 1))
        weights = np.full(ids.shape, 0.5, np.float32)
        wanted = true.experts(plain, x.astype(np.float64), ids, weights.astype(np.float64), ("silu", 1.0, 0.0))
        assert close(table.run(x, ids, weights, "silu"), wanted, FP32)
        seen = floats(rounded(x)).astype(np.float64)
        wanted = true.experts(plain, seen, ids, weights.astype(np.float64), ("silu", 1.0, 0.0))
        assert close(table.run(rounded(x), ids, weights, "silu"), wanted, BF16_TWICE)


def test_order_of_tokens_and_experts_does_not_matter(library: Any) -> None:
    """A token's result is its own; its experts are added in the same order whatever the others do."""
    table, _ = layer(library)
    x, ids, weights = routed(20)
    whole = table.run(x, ids, weights, "silu")
    order = np.random.default_rng(1).permutation(20)
    turned = table.run(x[order], ids[order], weights[order], "silu")
    assert close(turned, whole[order], FP32)
    swapped = table.run(x, ids[:, ::-1].copy(), weights[:, ::-1].copy(), "silu")
    assert np.array_equal(swapped, whole)


def test_experts_that_are_left_out(library: Any) -> None:
    table, _ = layer(library)
    x, ids, weights = routed(4)
    assert not table.run(x, np.full_like(ids, -1), weights, "silu", threads=2).any()
    with pytest.raises(ValueError, match="beyond the last"):
        table.run(x, np.full_like(ids, len(WIDTHS)), weights, "silu")
    with pytest.raises(ValueError):
        table.run(x, ids[:3], weights, "silu")
    with pytest.raises(ValueError, match="gate"):
        table.run(x, ids, weights, "relu")


def test_copies_point_to_memory_of_their_own_or_kept_alive() -> None:
    table, _ = layer(native())
    x, ids, weights = routed(4)
    wanted = table.run(x, ids, weights, "silu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "native", native)
        copies = [copy.deepcopy(table), pickle.loads(pickle.dumps(table))]
    del table
    for each in copies:
        assert np.array_equal(each.run(x, ids, weights, "silu"), wanted)


def test_matrices_that_do_not_fit_are_refused() -> None:
    def made(rows: int, columns: int, group: int = 0) -> products.Laid:
        return case(native(), rows, columns, group, 4).laid

    good = (made(16, HIDDEN), made(16, HIDDEN), made(HIDDEN, 16))
    products.Experts([good, None], HIDDEN, library=native())
    for bad in ((made(32, HIDDEN), *good[1:]), (made(16, 64), *good[1:]), (*good[:2], made(HIDDEN, 32))):
        with pytest.raises(ValueError, match="expert 1"):
            products.Experts([good, bad], HIDDEN, library=native())
    many = [(made(16, 720, g), made(16, 720), made(720, 16)) for g in (2, 3, 4, 5, 6, 8, 9, 10)]
    products.Experts(many[:7], 720, library=native())
    with pytest.raises(ValueError, match="9 sizes"):
        products.Experts(many, 720, library=native())

"""The C++ kernels against their numpy twins, on every instruction set that there is; and what happens without them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezip import kernels
from moezip.kernels import build, choice, reference, selfcheck

# Sums of fp32 products in another order: a few units in the last place each, over a few hundred terms.
SUMS = 2e-5
# A loss is a sum of squares of such sums; the codes that it belongs to are the same ones.
LOSS = 1e-3

# Rows around the tiles of the instruction sets (32, 64), columns around blocks and words.
SHAPES = [(1, 32, 32), (3, 96, 96), (7, 33, 11), (64, 64, 32), (65, 160, 32), (130, 256, 128)]


@cache
def native(isa: str | None = None) -> Any:
    from moezip.kernels.native import find

    try:
        return find(isa)
    except build.BuildError as error:
        pytest.skip(f"no C++ library: {error}")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["numpy", *build.variants()])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public functions on numpy, or on one instruction set."""
    chosen = reference if request.param == "numpy" else native(request.param)
    monkeypatch.setattr(kernels, "_backend", lambda: chosen)
    return str(request.param)


@pytest.fixture(params=list(build.variants()))
def library(request: pytest.FixtureRequest) -> Any:
    return native(request.param)


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Like trained weights, with a row and a group of zeros, and an outlier."""
    made = (0.02 * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)
    made[rows // 2, : columns // 2] = 0
    made[-1, -1] = 1.5
    return made


def moment(columns: int, seed: int = 0) -> np.ndarray:
    """A damped second moment of correlated inputs, [C, C], float64."""
    chance = np.random.default_rng(seed)
    mixed = np.eye(columns) + 0.3 * chance.standard_normal((columns, columns)) / columns**0.5
    inputs = chance.standard_normal((2 * columns + 3, columns)) @ mixed
    return inputs.T @ inputs / len(inputs) + 0.01 * np.eye(columns)


def quadratic(away: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """dW H dW' of each row, in float64."""
    return np.einsum("rc,cd,rd->r", away.astype(np.float64), hessian, away.astype(np.float64))


def read_back(solved: kernels.Solved, group: int, bits: int) -> np.ndarray:
    packed = kernels.pack(solved.codes, bits)
    return kernels.dequantize(packed, solved.scales, solved.zeros, group, bits, solved.codes.shape[1])


def dyadic(rows: int, columns: int, bits: int) -> dict[str, Any]:
    """A problem for ``gptq`` whose every step is exact in fp32, fused or not and in any order of summation: weights are
    multiples of 2^-10, the scale is 2^-2, and each error goes, whole, to at most one other place."""
    chance = np.random.default_rng(columns + bits)
    factor = np.eye(columns, dtype=np.float32)
    for place in range(1, columns):
        if chance.random() < 0.7:
            factor[chance.integers(place), place] = chance.choice([-1, 1])
    return {
        "weight": (chance.integers(-900, 900, (rows, columns)) / 1024).astype(np.float32),
        "factor": factor,
        "groups": np.minimum(np.arange(columns, dtype=np.int32) // 32, 1),
        "scales": np.full((rows, 2), 0.25, np.float32),
        "zeros": None if bits == 1 else np.full((rows, 2), 2**bits // 2, np.uint8),
        "bits": bits,
        "order": chance.permutation(columns).astype(np.int32),
    }


# -- hand-worked --------------------------------------------------------------------------------------------


def test_gptq_of_two_weights(backend: str):
    """H = [[4, 2], [2, 2]] = L L' with L = [[2, 0], [1, 1]]; inv(L) = [[1/2, 0], [-1/2, 1]], so U = inv(L)' =
    [[1/2, -1/2], [0, 1]]. Scale 1, zero 0. Place 1: 1.3 -> 1, error 0.3 / 1. Place 0: 0.4 - 0.3 * (-1/2) = 0.55 -> 1
    (rounding alone gives 0), error (0.55 - 1) / (1/2) = -0.9. Loss 0.09 + 0.81 = 0.9, and dW = (-0.6, 0.3) gives
    4 * 0.36 - 2 * 2 * 0.18 + 2 * 0.09 = 0.9, less than the 1.3 of rounding."""
    factor = kernels.gptq_factor(np.array([[4, 2], [2, 2]], np.float32))
    np.testing.assert_allclose(factor, [[0.5, -0.5], [0, 1]], atol=1e-7)
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.uint8)
    solved = kernels.gptq(np.array([[0.4, 1.3]], np.float32), factor, np.zeros(2, np.int32), one, zero, 2)
    np.testing.assert_array_equal(solved.codes, [[1, 1]])
    np.testing.assert_allclose(solved.errors, [[-0.9, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(solved.loss, [0.9], rtol=1e-6)


def test_descent_of_two_codes_and_a_step(backend: str):
    """H = [[2, 1], [1, 2]], w = (0.4, 1.3), codes (0, 1), step 1, zero 0: d = (-0.4, -0.3), G = d H = (-1.1, -1),
    E = 0.44 + 0.3 = 0.74.

    Codes alone: 0 + 1.1 / 2 = 0.55 -> 1, which gains 1 (2 (-1.1) + 2) = -0.2 and makes G_1 = -1 + 1 = 0, so the other
    stays. With the step first: u = (0, 1), so step 1 + 1 / 2 = 1.5, which gains 0.5 (-2 + 0.5 * 2) = -0.5; now
    d = (-0.4, 0.2), G = (-0.6, 0), and 0 + 0.6 / (1.5 * 2) = 0.2 stays 0."""
    hessian, weight = np.array([[2, 1], [1, 2]], np.float32), np.array([[0.4, 1.3]], np.float32)
    codes, one, zero = np.array([[0, 1]], np.uint8), np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    found, step, gain = kernels.descend(weight, hessian, codes, one, zero, 2, scale_dtype=None)
    np.testing.assert_array_equal(found, [[1, 1]])
    np.testing.assert_array_equal(step, [[1]])
    np.testing.assert_allclose(gain, [-0.2], rtol=1e-6)
    found, step, gain = kernels.descend(weight, hessian, codes, one, zero, 2)
    np.testing.assert_array_equal(found, [[0, 1]])
    np.testing.assert_array_equal(step, [[1.5]])
    np.testing.assert_allclose(gain, [-0.5], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[0, 1]])
    np.testing.assert_array_equal(one, [[1]])


def test_words_of_three_bits(backend: str):
    """1 + 2 * 8 + 3 * 64 = 209. The eleventh code, 5 = 101 in bits, lies at bits 30, 31 and 32: the first word gets bit
    30, the second its lowest bit."""
    codes = np.zeros((1, 11), np.uint8)
    codes[0, :3], codes[0, 10] = (1, 2, 3), 5
    packed = kernels.pack(codes, 3)
    np.testing.assert_array_equal(packed, [[209 + 2**30, 1]])
    np.testing.assert_array_equal(kernels.unpack(packed, 3, 11), codes)


def test_one_bit_is_a_sign_times_the_mean_size(backend: str):
    """|w| = 1, 3 with importance 3, 1: s = (3 * 1 + 1 * 3) / 4 = 1.5; codes 1, 0; read back 1.5, -1.5."""
    weight, importance = np.array([[1, -3]], np.float32), np.array([3, 1], np.float32)
    scales, zeros = kernels.clip_search(weight, 2, 1, True, importance=importance)
    assert zeros is None
    np.testing.assert_array_equal(scales, [[1.5]])
    codes = kernels.round_codes(weight, scales, zeros, 2, 1)
    np.testing.assert_array_equal(codes, [[1, 0]])
    np.testing.assert_array_equal(kernels.dequantize(kernels.pack(codes, 1), scales, zeros, 2, 1, 2), [[1.5, -1.5]])


def test_the_whole_range(backend: str):
    """-1 to 5 at 2 bits: scale 6 / 3 = 2, zero round(1 / 2) = 0 (ties to even), codes 0, 0, 2 (5 / 2 = 2.5)."""
    scales, zeros = kernels.minmax(np.array([[-1, 0, 5]], np.float32), 0, 2, False)
    np.testing.assert_array_equal(scales, [[2]])
    np.testing.assert_array_equal(zeros, [[0]])
    codes = kernels.round_codes(np.array([[-1, 0, 5]], np.float32), scales, zeros, 0, 2)
    np.testing.assert_array_equal(codes, [[0, 0, 2]])


def test_second_moment_of_two_tokens(backend: str):
    """(1, 2) weighted 3 and (0, 1) weighted 1, on top of 10: 3 * [[1, 2], [2, 4]] + [[0, 0], [0, 1]]."""
    out = np.full((2, 2), 10, np.float32)
    kernels.second_moment(np.array([[1, 2], [0, 1]], np.float32), out, weights=np.array([3, 1], np.float32))
    np.testing.assert_array_equal(out, [[13, 16], [16, 23]])


# -- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_integers_are_those_of_numpy(rows: int, columns: int, group: int, bits: int):
    """Scales, zeros, codes, words and dequantized values, bit for bit, at any number of threads."""
    weight, importance = weights(rows, columns), np.linspace(0, 2, columns, dtype=np.float32)
    shares = np.array(kernels.SHRINK[::5], np.float32)
    for symmetric, dtype, threads in ((False, "F16", 1), (True, "BF16", 3)):
        search = (weight, group, bits, symmetric, shares, importance, dtype)
        scales, zeros = reference.clip_search(*search, 1)
        codes = reference.round_codes(weight, scales, zeros, group, bits, 1)
        packed = reference.pack(codes, bits, 1)
        whole = (packed, scales, zeros, group, bits, columns)
        values = [reference.dequantize(*whole, bf16, 1) for bf16 in (False, True)]
        for isa in native().sets:
            library = native(isa)
            np.testing.assert_array_equal(library.clip_search(*search, threads), (scales, zeros))
            np.testing.assert_array_equal(library.round_codes(weight, scales, zeros, group, bits, threads), codes)
            np.testing.assert_array_equal(library.pack(codes, bits, threads), packed)
            np.testing.assert_array_equal(library.unpack(packed, bits, columns, threads), codes)
            for bf16 in (False, True):
                np.testing.assert_array_equal(library.dequantize(*whole, bf16, threads), values[bf16])


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 47), (66, 131), (130, 300)])
def test_gptq_is_that_of_numpy_where_arithmetic_is_exact(
    backend: str, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, bits: int
):
    problem = dyadic(rows, columns, bits)
    found = [kernels.gptq(**problem, threads=threads) for threads in (1, 3)]
    monkeypatch.setattr(kernels, "_backend", lambda: reference)
    true = kernels.gptq(**problem)
    assert np.abs(true.errors).max() < 2**10  # 20 bits at most: the premise
    for one in found:
        np.testing.assert_array_equal(one.codes, true.codes)
        np.testing.assert_array_equal(one.errors, true.errors)
        np.testing.assert_allclose(one.loss, true.loss, rtol=SUMS)


def test_blocks_make_up_the_whole(backend: str):
    """The last columns first, their errors paid by the others, then those: the same as all at once."""
    problem = {**dyadic(20, 100, 3), "order": None}
    whole = kernels.gptq(**problem)
    weight, factor, groups = problem["weight"].copy(), problem["factor"], problem["groups"]
    for start, end in ((70, 100), (13, 70), (0, 13)):
        block = kernels.gptq(
            weight[:, start:end].copy(), factor[start:end, start:end], groups[start:end], problem["scales"],
            problem["zeros"], 3,
        )  # fmt: skip
        np.testing.assert_array_equal(block.codes, whole.codes[:, start:end])
        weight[:, :start] -= block.errors @ factor[:start, start:end].T


@pytest.mark.parametrize("columns", [1, 11, 12, 48, 49, 131])
def test_the_factor_is_one_of_the_inverse(backend: str, columns: int):
    """U U' (H + damping) = 1, with rows and columns of H in the order of their places; nothing below the diagonal."""
    hessian, order = moment(columns), np.random.default_rng(1).permutation(columns).astype(np.int32)
    factor = kernels.gptq_factor(hessian.astype(np.float32), order=order, damping=0.25).astype(np.float64)
    np.testing.assert_array_equal(factor, np.triu(factor))
    damped = hessian[np.ix_(order, order)] + 0.25 * np.eye(columns)
    np.testing.assert_allclose(factor @ factor.T @ damped, np.eye(columns), atol=SUMS)


@pytest.mark.parametrize(("bits", "dtype"), [(1, "F16"), (2, "F16"), (3, "BF16"), (4, None), (8, "F32")])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_descent_gains_what_it_says(backend: str, rows: int, columns: int, group: int, bits: int, dtype: str | None):
    """E in float64, before and after; it never rises, and steps are as they are stored."""
    weight, hessian, damping = weights(rows, columns), moment(columns), 0.1
    scales, zeros = kernels.minmax(weight, group, bits, False, scale_dtype=dtype or "F16")
    codes = kernels.round_codes(weight, scales, zeros, group, bits)
    step, zero = kernels._affine(scales, zeros, bits)

    def error(codes: np.ndarray, step: np.ndarray) -> np.ndarray:
        values = step[..., None] * (codes.reshape(rows, -1, group) - zero[..., None].astype(np.float64))
        return quadratic(values.reshape(rows, columns) - weight, hessian + damping * np.eye(columns))

    before = error(codes, step)
    found, moved, gain = kernels.descend(
        weight, hessian.astype(np.float32), codes, step, zero, bits, damping=damping, scale_dtype=dtype
    )
    after = error(found, moved)
    np.testing.assert_allclose(after - before, gain, atol=LOSS * before.max())
    assert (gain <= 0).all()
    assert rows < 64 or bits == 8 or after.sum() < 0.99 * before.sum()
    assert found.max() < 2**bits
    if dtype is None:
        np.testing.assert_array_equal(moved, step)
    else:
        np.testing.assert_array_equal(reference.stored_step(moved, bits, dtype), moved)


def test_steps_are_rounded_as_half_precision_rounds(library: Any):
    """Normal, subnormal and too large: w = 3 s with code 3 and step 1.1 s wants the step s, which must come out as the
    nearest fp16 number, or stay where there is none."""
    wanted = np.array([[1.0001], [3.3e-5], [7e-6], [1e5]], np.float32)
    weight = np.repeat(3 * wanted, 2, 1)
    step, zero = (wanted * np.float32(1.1)), np.zeros((4, 1), np.float32)
    codes = np.full((4, 2), 3, np.uint8)
    hessian = np.eye(2, dtype=np.float32)
    found = library.descend(weight, hessian, 0.0, codes, step, zero, 2, "F16", 1)[1]
    np.testing.assert_array_equal(found[:3], wanted[:3].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found[3], step[3])


def test_a_column_that_no_input_reached_keeps_its_code(backend: str):
    hessian = np.diag([1, 0]).astype(np.float32)
    weight, codes = np.array([[3, 3]], np.float32), np.array([[1, 1]], np.uint8)
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    found = kernels.descend(weight, hessian, codes, one, zero, 2, scale_dtype=None)[0]
    np.testing.assert_array_equal(found, [[3, 1]])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_loss_is_the_quadratic_form(backend: str, bits: int):
    """||errors||^2 = dW H dW' for whatever codes come out, and well below that of rounding with the same scales."""
    rows, columns, group = 24, 192, 64
    weight, hessian = weights(rows, columns), moment(columns)
    factor = kernels.gptq_factor(hessian.astype(np.float32))
    scales, zeros = kernels.minmax(weight, group, bits, False)
    owner = np.arange(columns, dtype=np.int32) // group
    solved = kernels.gptq(weight, factor, owner, scales, zeros, bits)
    true = quadratic(weight - read_back(solved, group, bits), hessian)
    np.testing.assert_allclose(solved.loss, true, rtol=LOSS)
    rounded = kernels.dequantize(
        kernels.pack(kernels.round_codes(weight, scales, zeros, group, bits), bits), scales, zeros, group, bits, columns
    )
    assert true.sum() < 0.9 * quadratic(weight - rounded, hessian).sum()


@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (2, False), (3, True), (4, False)])
def test_refitting_finds_better_scales(backend: str, bits: int, symmetric: bool):
    """Its loss, too, is the quadratic form of the weights that its codes, scales and zeros stand for; groups and the
    columns inside them may change places."""
    rows, columns, group = 70, 128, 32
    weight, hessian = weights(rows, columns), moment(columns)
    importance = np.ascontiguousarray(hessian.diagonal(), np.float32)
    order = np.concatenate([np.arange(g, g + group)[::-1] for g in (64, 0, 96, 32)]).astype(np.int32)
    factor = kernels.gptq_factor(hessian[np.ix_(order, order)].astype(np.float32))
    solved = kernels.gptq_refit(weight, factor, group, bits, symmetric, importance=importance, order=order, threads=2)
    true = quadratic(weight - read_back(solved, group, bits), hessian)
    np.testing.assert_allclose(solved.loss, true, rtol=LOSS)
    scales, zeros = kernels.minmax(weight, group, bits, symmetric)
    fixed = kernels.gptq(weight, factor, np.arange(columns, dtype=np.int32) // group, scales, zeros, bits, order=order)
    assert true.sum() < fixed.loss.sum()


def test_without_correlations_gptq_rounds(backend: str):
    weight = weights(33, 64)
    scales, zeros = kernels.minmax(weight, 32, 3, False)
    solved = kernels.gptq(weight, np.eye(64, dtype=np.float32), np.arange(64, dtype=np.int32) // 32, scales, zeros, 3)
    np.testing.assert_array_equal(solved.codes, kernels.round_codes(weight, scales, zeros, 32, 3))


@pytest.mark.parametrize("symmetric", [False, True])
def test_searching_never_loses_to_the_whole_range(backend: str, symmetric: bool):
    weight, importance = weights(40, 128), np.linspace(0.1, 3, 128, dtype=np.float32)
    for bits in (2, 3, 4):
        losses = []
        for search in (kernels.minmax(weight, 64, bits, symmetric),
                       kernels.clip_search(weight, 64, bits, symmetric, importance=importance)):  # fmt: skip
            codes = kernels.round_codes(weight, *search, 64, bits)
            away = weight - kernels.dequantize(kernels.pack(codes, bits), *search, 64, bits, 128)
            losses.append((importance * away**2).reshape(40, 2, 64).sum(2))
        assert (losses[1] <= losses[0] * (1 + SUMS)).all()
        assert losses[1][:-1].sum() < 0.95 * losses[0][:-1].sum()  # the last row's outlier decides its own


@pytest.mark.parametrize(("dtype", "bits"), [("F16", 13), ("BF16", 16)])
def test_scales_are_stored_as_they_are(backend: str, dtype: str, bits: int):
    for width in (1, 2, 4):
        scales, _ = kernels.clip_search(weights(9, 64), 32, width, False, scale_dtype=dtype)
        assert not (scales.view(np.uint32) & (2**bits - 1)).any()
        assert (scales > 0).all()


def test_second_moments_add_up(backend: str):
    """Those of two parts make that of the whole; a token of weight zero is none; bf16 in, exact products."""
    x = np.random.default_rng(1).standard_normal((1043, 101)).astype(np.float32)
    halves = (x.view(np.uint32) >> 16).astype(np.uint16)
    exact = (halves.astype(np.uint32) << 16).view(np.float32)
    importance = np.linspace(0, 1, len(x), dtype=np.float32)
    for given, seen, by in ((x, x, None), (x, x, importance), (halves, exact, None), (halves, exact, importance)):
        true = seen.astype(np.float64).T @ (seen if by is None else seen * by[:, None])
        for threads in (1, 3):
            out = np.zeros((101, 101), np.float32)
            for part in (slice(0, 1), slice(1, 600), slice(600, None)):
                kernels.second_moment(given[part], out, weights=None if by is None else by[part], threads=threads)
            np.testing.assert_allclose(out, true, atol=SUMS * true.max())
            np.testing.assert_array_equal(out, out.T)


def test_the_number_of_threads_changes_nothing(library: Any):
    rows, columns = 200, 96
    weight, factor = weights(rows, columns), kernels.gptq_factor(moment(columns).astype(np.float32))
    order, shares = np.arange(columns, dtype=np.int32), np.array(kernels.SHRINK, np.float32)
    refit = (weight, factor, 32, 3, False, shares, np.ones(columns, np.float32), "F16", order)
    once = library.gptq_refit(*refit, 1)
    x = np.random.default_rng(2).standard_normal((77, columns)).astype(np.float32)
    sums = np.zeros((2, columns, columns), np.float32)
    library.second_moment(x, sums[0], None, 1)
    library.second_moment(x, sums[1], None, 5)
    np.testing.assert_array_equal(*sums)
    for threads in (2, 5):
        for one, other in zip(once, library.gptq_refit(*refit, threads)):
            np.testing.assert_array_equal(one, other)
    with ThreadPoolExecutor(4) as pool:  # and calls side by side
        for found in pool.map(lambda _: library.gptq_refit(*refit, 2), range(8)):
            np.testing.assert_array_equal(once[0], found[0])


def test_nothing_is_something(backend: str):
    """No rows, no columns, no tokens."""
    empty = np.zeros((0, 32), np.float32)
    scales, zeros = kernels.clip_search(empty, 32, 4, False)
    assert kernels.round_codes(empty, scales, zeros, 32, 4).shape == (0, 32)
    solved = kernels.gptq(empty, np.eye(32, dtype=np.float32), np.zeros(32, np.int32), scales, zeros, 4)
    assert solved.codes.shape == (0, 32)
    assert kernels.pack(np.zeros((3, 0), np.uint8), 3).shape == (3, 0)
    out = np.eye(5, dtype=np.float32)
    kernels.second_moment(np.zeros((0, 5), np.float32), out)
    np.testing.assert_array_equal(out, np.eye(5))


# -- refusals -----------------------------------------------------------------------------------------------


def refusals() -> Iterator[tuple[str, Callable[[], Any], str]]:
    weight, scales, zeros = np.ones((4, 64), np.float32), np.ones((4, 2), np.float32), np.zeros((4, 2), np.uint8)
    factor, groups = np.eye(64, dtype=np.float32), np.arange(64, dtype=np.int32) // 32
    shuffled = np.arange(64, dtype=np.int32)
    shuffled[[0, 40]] = shuffled[[40, 0]]
    words = np.zeros((4, 8), np.int32)

    def gptq(**changed: Any) -> Callable[[], Any]:
        given = {"weight": weight, "factor": factor, "groups": groups, "scales": scales, "zeros": zeros, "bits": 4}
        return lambda: kernels.gptq(**{**given, **changed})

    yield "bits", gptq(bits=9), "bits are 1 to 8"
    yield "threads", gptq(threads=0), "threads"
    yield "weight dtype", gptq(weight=weight.astype(np.float64)), "weight is a float64"
    yield "weight strides", gptq(weight=np.asfortranarray(weight)), "row-major"
    yield "weight kind", gptq(weight=[[1.0]]), "weight is a list"
    yield "factor shape", gptq(factor=factor[:32, :32]), "factor is"
    yield "factor strides", gptq(factor=np.asfortranarray(factor)), "rows are not contiguous"
    yield "factor diagonal", gptq(factor=np.zeros_like(factor)), "diagonal"
    yield "groups range", gptq(groups=groups + 1), "groups are 0 to 1"
    yield "groups dtype", gptq(groups=groups.astype(np.int64)), "groups is a int64"
    yield "scales rows", gptq(scales=scales[:3]), "scales are"
    yield "scales zero", gptq(scales=scales * 0), "scale is zero"
    yield "scales inf", gptq(scales=scales * np.float32(np.inf)), "not finite"
    yield "zeros range", gptq(zeros=zeros + np.uint8(16)), "no code of 4 bits"
    yield "zeros at one bit", gptq(bits=1), "one bit has no zeros"
    yield "order twice", gptq(order=np.zeros(64, np.int32)), "no permutation"
    yield "order range", gptq(order=np.arange(1, 65, dtype=np.int32)), "no permutation"
    yield "group", lambda: kernels.minmax(weight, 48, 4, False), "do not divide"
    yield "scale dtype", lambda: kernels.minmax(weight, 32, 4, False, scale_dtype="F8"), "F16, BF16 or F32"
    yield "candidates", lambda: kernels.clip_search(weight, 32, 4, False, candidates=-scales[0]), "candidates"
    yield "importance", lambda: kernels.clip_search(weight, 32, 4, False, importance=-weight[0]), "importance"
    yield "refit order", lambda: kernels.gptq_refit(weight, factor, 32, 4, False, order=shuffled), "apart"
    step, zero, codes = scales, scales - 1, np.zeros((4, 64), np.uint8)

    def descend(**changed: Any) -> Callable[[], Any]:
        given = {"weight": weight, "hessian": factor, "codes": codes, "step": step, "zero": zero, "bits": 4}
        return lambda: kernels.descend(**{**given, **changed})

    yield "descent hessian", descend(hessian=factor[:32, :32].copy()), "hessian is"
    yield "descent codes", descend(codes=codes + np.uint8(16)), "does not fit in 4 bits"
    yield "descent step", descend(step=step * 0), "step is zero"
    yield "descent groups", descend(step=np.ones((4, 3), np.float32)), "do not belong"
    yield "descent scales", descend(scale_dtype="F8"), "F16, BF16 or F32"
    yield "factor order", lambda: kernels.gptq_factor(factor, order=np.zeros(64, np.int32)), "no permutation"
    yield "codes too large", lambda: kernels.pack(np.full((2, 8), 4, np.uint8), 2), "does not fit in 2 bits"
    yield "codes dtype", lambda: kernels.pack(words, 2), "codes is a int32"
    yield "words", lambda: kernels.unpack(words, 3, 64), "do not hold 64 codes of 3 bits"
    yield "value dtype", lambda: kernels.dequantize(words, scales, zeros, 32, 4, 64, dtype="f8"), "float32 or bfloat16"
    yield "moment shape", lambda: kernels.second_moment(weight, np.zeros((4, 4), np.float32)), "out is"
    yield "moment weights", lambda: kernels.second_moment(weight, factor.copy(), weights=weight[0]), "weights is"
    frozen = np.zeros((64, 64), np.float32)
    frozen.flags.writeable = False
    yield "moment read-only", lambda: kernels.second_moment(weight, frozen), "read-only"


@pytest.mark.parametrize(("call", "says"), [pytest.param(call, says, id=name) for name, call, says in refusals()])
def test_bad_arguments_never_reach_the_kernels(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], says: str):
    monkeypatch.setattr(kernels, "_backend", lambda: pytest.fail("the kernels were reached"))
    with pytest.raises(ValueError, match=says):
        call()


def test_a_matrix_that_is_not_positive_definite(backend: str):
    with pytest.raises(np.linalg.LinAlgError, match="damp it more"):
        kernels.gptq_factor(np.array([[1, 2], [2, 1]], np.float32))


# -- with and without a library -----------------------------------------------------------------------------


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process whose cache is empty and whose package came without a library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "LIBRARY", "no-such-library.so")
    monkeypatch.delenv("MOEZIP_NATIVE", raising=False)
    choice.choose.cache_clear()
    yield monkeypatch
    choice.choose.cache_clear()


def still_packs() -> bool:
    return bool((kernels.pack(np.full((1, 4), 1, np.uint8), 2) == 85).all())


def test_numpy_on_request_is_no_cause_for_a_warning(afresh: pytest.MonkeyPatch):
    afresh.setenv("MOEZIP_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.status() == kernels.Status(False, "MOEZIP_NATIVE=0")
        assert kernels._backend() is reference and still_packs()


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("CXX", "/no/such/compiler", "/no/such/compiler, is not there"),
        ("PATH", "", "no C++ compiler was found"),
        ("CXX", "false", "false failed"),
    ],
)
def test_without_a_compiler_there_is_one_warning(afresh: pytest.MonkeyPatch, variable: str, value: str, why: str):
    afresh.delenv("CXX", raising=False)
    afresh.setenv(variable, value)
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(3):
            assert not kernels.status().native
            assert still_packs()
    assert len(told) == 1
    text = str(told[0].message)
    assert why in text and kernels.COST in text and "Install a C++ compiler" in text


def test_an_instruction_set_that_is_not_there(afresh: pytest.MonkeyPatch, tmp_path: Path):
    have = native()
    if have.file != build.kept():  # else this test was the first to build, and the file is in use: writing it crashes
        build.kept().parent.mkdir(parents=True)
        build.kept().write_bytes(have.file.read_bytes())
    afresh.setenv("MOEZIP_NATIVE", "abacus")
    with pytest.warns(RuntimeWarning, match="this machine has no abacus"):
        assert not kernels.status().native
    choice.choose.cache_clear()
    afresh.setenv("MOEZIP_NATIVE", "baseline")
    assert kernels.status().isa == "baseline"
    assert kernels.status().library == str(build.kept()) and still_packs()


def test_a_library_that_computes_wrongly_is_not_used(afresh: pytest.MonkeyPatch):
    have = native_of_package(afresh)
    afresh.setattr(type(have), "unpack", lambda self, packed, bits, columns, threads: np.zeros((1, 1), np.uint8))
    with pytest.warns(RuntimeWarning, match="computes wrongly: 1 bits differs from numpy's"):
        assert not kernels.status().native


def native_of_package(patch: pytest.MonkeyPatch) -> Any:
    """The library of the user's cache, found as if it had come with the package."""
    patch.delenv("XDG_CACHE_HOME")
    return native()


def test_a_library_of_other_sources_is_built_anew(afresh: pytest.MonkeyPatch):
    from moezip.kernels.native import Native, StaleError

    have = native_of_package(afresh)
    afresh.setattr(build, "fingerprint", lambda: "0123456789abcdef")
    with pytest.raises(StaleError, match="other sources"):
        Native(have.file)


def test_a_compiler_may_not_know_the_flags_of_tiles(tmp_path: Path):
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    assert build._knows(build.compiler(), build.FLAGS, tmp_path)
    assert not build._knows(build.compiler(), ["-mno-such-tiles"], tmp_path)


def test_a_file_that_is_no_library_is_built_anew(afresh: pytest.MonkeyPatch, tmp_path: Path):
    built = []
    afresh.setattr(build, "build", built.append)
    build.kept().parent.mkdir(parents=True)
    build.kept().write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert not kernels.status().native
    assert built == [build.kept()]


def test_a_failed_build_leaves_nothing(afresh: pytest.MonkeyPatch, tmp_path: Path):
    afresh.setenv("CXX", "false")
    with pytest.raises(build.BuildError):
        build.build(tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


def test_every_fault_is_seen(library: Any):
    """Each kernel in turn answers with something else: the self-check names it, and nothing when all is well."""
    assert selfcheck.faults(library) == []

    class Broken:
        def __init__(self, name: str):
            self.name = name

        def __getattr__(self, name: str) -> Any:
            def spoilt(*arguments: Any) -> Any:
                found = getattr(library, name)(*arguments)
                if name == "second_moment":
                    arguments[1][0, 0] += 1
                    return None
                return tuple(part + 1 for part in found) if isinstance(found, tuple) else found + 1

            return spoilt if name == self.name else getattr(library, name)

    names = ["gptq", "gptq_refit", "clip_search", "round_codes", "pack", "unpack", "dequantize", "second_moment"]
    assert all(selfcheck.faults(Broken(name)) for name in names)


def test_moezip_kernels(cli: Any):
    ran = cli("kernels", "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert set(told) >= {"native", "why", "isa", "available", "checks"}
    assert list(told["checks"]) == told["available"]
    assert all(one["failed"] == [] and one["passed"] > 8 for one in told["checks"].values())
    assert cli("kernels").code == 0

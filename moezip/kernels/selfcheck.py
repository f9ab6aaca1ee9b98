"""Does a library compute what the numpy twins compute? A few milliseconds, asked before a library is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moezip.kernels import SHRINK, Status, products, products_reference, reference, unpacked, unpacked_reference

# Sums of products in another order, in fp32.
SUMS = 1e-4
# Results rounded to bf16, and activations to whole numbers, where a tie may go either way.
ROUNDED = 5e-3
# A weight within rounding of half a step may go the other way, and its row follows: one row of five at most.
CODES = 0.25
LOSS = 1e-2


def _floats(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def _problem(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [R, C], inputs [2 C + 5, C] with correlated columns, and the factor of their second moment."""
    chance = np.random.default_rng(seed)
    weight = (0.02 * chance.standard_normal((rows, columns))).astype(np.float32)
    mixed = np.eye(columns) + 0.3 * chance.standard_normal((columns, columns)) / columns**0.5
    inputs = (chance.standard_normal((2 * columns + 5, columns)) @ mixed).astype(np.float32)
    moment = inputs.astype(np.float64).T @ inputs / len(inputs)
    moment[np.diag_indices(columns)] += 0.01 * moment.diagonal().mean()
    return weight, inputs, np.ascontiguousarray(np.linalg.inv(np.linalg.cholesky(moment)).T.astype(np.float32))


Check = tuple[str, Callable[[], bool]]


def checks(native: Any, rows: int, columns: int, widths: Iterable[int], threads: int = 2) -> Iterator[Check]:
    """(what, does it agree) for every kernel; ``columns`` is a multiple of 32."""
    weight, inputs, factor = _problem(rows, columns, seed=1)
    group, shares, order = 32, np.array(SHRINK[::5], np.float32), np.arange(columns, dtype=np.int32)
    owner, importance = order // group, np.linspace(0.5, 2, columns, dtype=np.float32)
    halves = (inputs.view(np.uint32) >> 16).astype(np.uint16)
    token_weights = np.linspace(0, 1, len(inputs), dtype=np.float32)

    def same(name: str, *arguments: Any) -> bool:
        found, true = getattr(native, name)(*arguments, threads), getattr(reference, name)(*arguments, 1)
        pairs = zip(found, true) if isinstance(true, tuple) else [(found, true)]
        return all(np.array_equal(one, other) for one, other in pairs)

    def close(name: str, *arguments: Any) -> bool:
        found, true = getattr(native, name)(*arguments, threads), getattr(reference, name)(*arguments, 1)
        same_loss = abs(found[2].sum() - true[2].sum()) <= LOSS * true[2].sum()
        return bool(same_loss and (found[0] != true[0]).mean() <= CODES)

    hessian = inputs.T @ inputs / np.float32(len(inputs))

    def factor_agrees() -> bool:
        found, true = (each.gptq_factor(hessian, order[::-1].copy(), 0.1) for each in (native, reference))
        singular = native.gptq_factor(np.ones_like(hessian), order, 0.0)
        return found is not None and singular is None and bool(np.abs(found - true).max() <= SUMS * true.max())

    def descent_agrees(bits: int, dtype: str | None) -> bool:
        step, zero = np.full((rows, columns // group), 0.02, np.float32), np.ones((rows, columns // group), np.float32)
        codes = reference.round_codes(weight, step, zero, group, bits, 1)
        given = (weight, hessian, 0.1, codes, step, zero, bits, dtype)
        found, true = native.descend(*given, threads), reference.descend(*given, 1)
        same_gain = abs(found[2].sum() - true[2].sum()) <= LOSS * -true[2].sum()
        return bool(same_gain and (found[0] != true[0]).mean() <= CODES)

    def moment(x: np.ndarray, weights: np.ndarray | None) -> bool:
        found, true = np.ones((2, columns, columns), np.float32)
        native.second_moment(x, found, weights, threads)
        reference.second_moment(x, true, weights, 1)
        return bool(np.abs(found - true).max() <= SUMS * true.max() and np.array_equal(found, found.T))

    def at(bits: int, symmetric: bool) -> Callable[[], bool]:
        def agree() -> bool:
            search = (weight, group, bits, symmetric, shares, importance, "F16")
            scales, zeros = reference.clip_search(*search, 1)
            codes = reference.round_codes(weight, scales, zeros, group, bits, 1)
            packed = reference.pack(codes, bits, 1)
            return (
                same("clip_search", *search)
                and same("round_codes", weight, scales, zeros, group, bits)
                and same("pack", codes, bits)
                and same("unpack", packed, bits, columns)
                and same("dequantize", packed, scales, zeros, group, bits, columns, False)
                and same("dequantize", packed, scales, zeros, group, bits, columns, True)
                and close("gptq", weight, factor, owner, scales, zeros, bits, order[::-1].copy())
                and close("gptq_refit", weight, factor, group, bits, symmetric, *search[4:], order)
            )

        return agree

    def products_agree(bits: int) -> bool:
        codes = chance.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
        scales = (0.01 + 0.01 * chance.random((rows, columns // group))).astype(np.float32)
        laid = products.lay(
            reference.pack(codes, bits, 1), scales, None, columns, bits, "F32", threads=threads, library=native
        )
        if not np.array_equal(laid.codes, products_reference.relay(codes, laid.groups, bits)):
            return False
        plain = products_reference.weights(codes, scales, None, bits)
        for tokens in (1, 3):
            whole = products_reference.whole_numbers(inputs[:tokens].astype(np.float64), laid.groups)
            given = (inputs[:tokens], "exact", SUMS), (halves[:tokens], "exact", ROUNDED), (whole, "int8", ROUNDED)
            for x, activations, near in given:
                x = x.astype(np.float32) if x.dtype == np.float64 else x
                found = products.linear(laid, x, activations=activations, threads=threads, library=native)  # type: ignore[arg-type]
                true = _floats(x).astype(np.float64) @ plain.T
                if not np.abs(_floats(found) - true).max() <= near * np.abs(true).max():
                    return False
        return True

    def layer_agrees() -> bool:
        shapes = ((rows, columns), (rows, columns), (columns, rows))
        codes = [chance.integers(0, 8, shape).astype(np.uint8) for shape in shapes]
        scales = [np.full((len(each), 1), 0.05, np.float32) for each in codes]
        laid = [
            products.lay(reference.pack(each, 3, 1), by, None, each.shape[1], 3, "F32", library=native)
            for each, by in zip(codes, scales, strict=True)
        ]
        plain: Any = tuple(
            (products_reference.weights(each, by, None, 3), np.zeros(len(each)))
            for each, by in zip(codes, scales, strict=True)
        )
        table = products.Experts([None, (laid[0], laid[1], laid[2])], columns, library=native)
        ids = np.array([[1, 0], [0, -1], [-1, 1]])
        gates = np.array([[0.5, 0.5], [1, 0], [0.3, 0.7]], np.float32)
        found = table.run(inputs[:3], ids, gates, "silu", threads=threads)
        given = inputs[:3].astype(np.float64), ids, gates.astype(np.float64)
        true = products_reference.experts([None, plain], *given, ("silu", 1.0, 0.0))
        return bool(np.abs(found - true).max() <= SUMS * np.abs(true).max())

    def between_agrees() -> bool:
        """Plain products, norms, heads and attention of one token, in bf16."""
        half = columns // 2
        weight_of = unpacked_reference.to_halves(weight)
        x, angles = halves[:2], (halves[2:4, :half].copy(), halves[4:6, :half].copy())
        true_x, true_weight = unpacked_reference.from_halves(x), unpacked_reference.from_halves(weight_of)
        near = [(unpacked.linear(weight_of, x, threads=threads, library=native), true_x @ true_weight.T)]
        near.append((
            unpacked.rms_norm(x, halves[6], 1e-6, threads=threads, library=native),
            unpacked_reference.rms_norm(true_x, unpacked_reference.from_halves(halves[6]), 1e-6, True),
        ))  # fmt: skip
        heads, keys = x.reshape(2, 2, half), halves[:24].reshape(2, 1, -1, half)
        true_heads, true_keys = unpacked_reference.from_halves(heads), unpacked_reference.from_halves(keys)
        near.append((
            unpacked.turn(heads, *angles, threads=threads, library=native),
            unpacked_reference.turn(true_heads, *map(unpacked_reference.from_halves, angles)),
        ))  # fmt: skip
        near.append((
            unpacked.attend(heads, keys, keys, None, 0.1, threads=threads, library=native),
            unpacked_reference.attend(true_heads, true_keys, true_keys, None, 0.1),
        ))  # fmt: skip
        return all(np.abs(_floats(found) - true).max() <= ROUNDED * np.abs(true).max() for found, true in near)

    chance = np.random.default_rng(3)
    yield "factor", factor_agrees
    yield "descent", lambda: descent_agrees(3, "F16") and descent_agrees(1, "BF16") and descent_agrees(2, None)
    for bits in widths:
        yield f"{bits} bits", at(bits, symmetric=bits % 2 == 1)
        yield f"products at {bits} bits", partial(products_agree, bits)
    yield "products of a layer", layer_agrees
    yield "between the products", between_agrees
    yield "second moment", lambda: moment(inputs, None)
    yield "second moment, weighted", lambda: moment(inputs, token_weights)
    yield "second moment of bf16", lambda: moment(halves, None)
    yield "second moment of bf16, weighted", lambda: moment(halves, token_weights)


def faults(native: Any) -> list[str]:
    """What does not agree with the numpy twins, by name; small, as it runs whenever a library is loaded."""
    return [f"{what} differs from numpy's" for what, agrees in checks(native, 5, 64, (1, 2, 3)) if not agrees()]


@dataclass(frozen=True, slots=True)
class Examined:
    """One instruction set: checks passed, names of those failed, seconds of a GPTQ of [256, 512] on one thread."""

    isa: str
    passed: int
    failed: tuple[str, ...]
    seconds: float


def examine(status: Status) -> list[Examined]:
    """Checks every instruction set that the machine has, at all widths; about a second. Empty without a library."""
    from moezip.kernels.native import Native

    found = []
    for isa in status.available:
        native = Native(Path(str(status.library)), isa)
        results = [(what, agrees()) for what, agrees in checks(native, 37, 64, range(1, 9))]
        failed = tuple(what for what, agrees in results if not agrees)
        found.append(Examined(isa, len(results) - len(failed), failed, _gptq_seconds(native)))
    return found


def _gptq_seconds(native: Any, rows: int = 256, columns: int = 512) -> float:
    """The best of five: what the machine can do, whatever else it does."""
    chance = np.random.default_rng(2)
    weight = (0.02 * chance.standard_normal((rows, columns))).astype(np.float32)
    factor = np.eye(columns, dtype=np.float32) + np.float32(0.01) * np.tri(columns, dtype=np.float32).T
    order = np.arange(columns, dtype=np.int32)
    scales, zeros = np.full((rows, 4), 0.02, np.float32), np.full((rows, 4), 4, np.float32)
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        native.gptq(weight, factor, order // 128, scales, zeros, 3, order, 1)
        taken.append(time.perf_counter() - begun)
    return min(taken)

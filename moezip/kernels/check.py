"""Checks of what goes to the kernels: a wrong pointer, shape or dtype must never reach C++. All raise ValueError."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezip.kernels import SHRINK


def width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits are 1 to 8, not {bits}")


def threads(count: int) -> None:
    if not 1 <= count <= 1024:
        raise ValueError(f"threads are 1 to 1024, not {count}")


def _of(name: str, array: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype not in kinds:
        got = f"{array.dtype} " if isinstance(array, np.ndarray) else ""
        raise ValueError(f"{name} is a {got}{type(array).__name__}, not {' or '.join(k.__name__ for k in kinds)}")


def matrix(name: str, array: Any, *kinds: type, square: bool = False) -> None:
    """A row-major array of two axes, one after the other in memory, in the machine's byte order."""
    _of(name, array, kinds)
    if array.ndim != 2 or (square and array.shape[0] != array.shape[1]):
        raise ValueError(f"{name} is {list(array.shape)}, not {'square' if square else 'of two axes'}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name} is not contiguous and row-major")


def vector(name: str, array: Any, kind: type, length: int) -> None:
    _of(name, array, (kind,))
    if array.shape != (length,):
        raise ValueError(f"{name} is {list(array.shape)}, not [{length}]")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name} is not contiguous")


def group(size: int, columns: int) -> int:
    """The group's size in columns: 0 stands for all."""
    if size < 0 or (size and columns % size):
        raise ValueError(f"groups of {size} do not divide {columns} columns")
    return size or max(1, columns)


def grid(scales: Any, zeros: Any, bits: int, rows: int, groups: int) -> None:
    """Scales [rows, groups] that are positive; zeros that are codes, or None."""
    matrix("scales", scales, np.float32)
    if scales.shape != (rows, groups):
        raise ValueError(f"scales are {list(scales.shape)}, not [{rows}, {groups}]")
    if scales.size and not (scales.min() > 0 and scales.max() < np.inf):
        raise ValueError("a scale is zero, negative or not finite")
    if zeros is None:
        return
    if bits == 1:
        raise ValueError("one bit has no zeros: a weight is scale * (2 * code - 1)")
    matrix("zeros", zeros, np.uint8)
    if zeros.shape != (rows, groups):
        raise ValueError(f"zeros are {list(zeros.shape)}, not [{rows}, {groups}]")
    if zeros.size and zeros.max() >= 2**bits:
        raise ValueError(f"a zero of {zeros.max()} is no code of {bits} bits")


def factored(weight: Any, factor: Any) -> int:
    """Columns of a weight [R, C] and a factor [C, C], whose rows may lie apart."""
    matrix("weight", weight, np.float32)
    _of("factor", factor, (np.float32,))
    columns = weight.shape[1]
    if factor.shape != (columns, columns):
        raise ValueError(f"factor is {list(factor.shape)} for a weight of {columns} columns")
    if columns and (factor.strides[1] != 4 or factor.strides[0] < 4 * columns or factor.strides[0] % 4):
        raise ValueError("the factor's rows are not contiguous")
    diagonal = factor.diagonal()
    if columns and not (diagonal.min() > 0 and diagonal.max() < np.inf):
        raise ValueError("the factor's diagonal is not positive")
    return columns


def order(given: Any, columns: int) -> NDArray[np.int32]:
    """``given``, a permutation; or the natural order."""
    if given is None:
        return np.arange(columns, dtype=np.int32)
    vector("order", given, np.int32, columns)
    seen = np.zeros(columns, bool)
    if columns and (given.min() < 0 or given.max() >= columns):
        raise ValueError("the order is no permutation of the columns")
    seen[given] = True
    if not seen.all():
        raise ValueError("the order is no permutation of the columns")
    return given


def stored(scale_dtype: str) -> None:
    if scale_dtype not in ("F16", "BF16", "F32"):
        raise ValueError(f"scales are F16, BF16 or F32, not {scale_dtype!r}")


def descent(weight: Any, hessian: Any, codes: Any, step: Any, zero: Any, bits: int) -> None:
    """Codes [R, C] of a weight [R, C] and a hessian [C, C]; steps that are positive and zeros, both [R, G]."""
    rows, columns = weight.shape
    if hessian.shape[0] != columns or codes.shape != weight.shape:
        raise ValueError(
            f"hessian is {list(hessian.shape)} and codes are {list(codes.shape)} for a weight of {[rows, columns]}"
        )
    if codes.size and codes.max() >= 2**bits:
        raise ValueError(f"a code of {codes.max()} does not fit in {bits} bits")
    matrix("step", step, np.float32)
    matrix("zero", zero, np.float32)
    groups = step.shape[1]
    if step.shape != (rows, groups) or zero.shape != step.shape or not groups or columns % groups:
        raise ValueError(f"steps {list(step.shape)} and zeros {list(zero.shape)} do not belong to {[rows, columns]}")
    if step.size and not (step.min() > 0 and step.max() < np.inf):
        raise ValueError("a step is zero, negative or not finite")


def search(
    candidates: Any, importance: Any, columns: int, scale_dtype: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shares [K] and importance [columns], with their defaults."""
    stored(scale_dtype)
    if candidates is None:
        candidates = np.array(SHRINK, np.float32)
    vector("candidates", candidates, np.float32, len(candidates))
    if not len(candidates) or not (candidates.min() > 0 and candidates.max() < np.inf):
        raise ValueError("candidates are not one or more positive numbers")
    if importance is None:
        importance = np.ones(columns, np.float32)
    vector("importance", importance, np.float32, columns)
    if columns and not (importance.min() >= 0 and importance.max() < np.inf):
        raise ValueError("an importance is negative or not finite")
    return candidates, importance


def words(packed: Any, bits: int, columns: int) -> None:
    """int32 words that hold ``columns`` codes per row."""
    matrix("packed", packed, np.int32)
    if columns < 0 or packed.shape[1] != -(-columns * bits // 32):
        raise ValueError(f"{packed.shape[1]} words of 32 bits do not hold {columns} codes of {bits} bits")

"""Fast inner loops of quantization: arrays in, arrays out. Those that run packed models are in ``products``.

Every function takes numpy arrays (float32 and row-major unless it says otherwise; a torch tensor's ``.numpy()`` costs
nothing) and runs in a C++ library where one could be built, else in numpy (``reference``), with the same results up to
what ``reference`` says. Arguments are checked here, once for both. ``status()`` tells which of the two runs, and why.

Notation: a matrix has R rows (outputs) and C columns (inputs); ``group`` columns side by side share a scale, 0 means
all of a row; G = C / group. A weight is ``scale * (code - zero)``. ``zeros`` may be None: then the zero is
``2**(bits - 1)``, and at one bit, which has no other form, a weight is ``scale * (2 * code - 1)``.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezip.kernels.choice import COST as COST
from moezip.kernels.choice import Status, chosen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

# Shares of a group's range that the search for scales tries: 1 must come first, so that ties keep the whole range.
SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7, 0.66, 0.62, 0.58, 0.54, 0.5)

@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What GPTQ found.

    ``codes`` uint8 [R, C], column by column of the weight. ``errors`` float32 [R, C], by place in the factor: the
    compensated weight's distance from its code, over the factor's diagonal. ``loss`` float32 [R]: the sum of the
    squared errors, which is ``dW H dW'`` of the row. ``scales``, ``zeros`` [R, G]: given, or found on the way.
    """

    codes: Bytes
    errors: Floats
    loss: Floats
    scales: Floats
    zeros: Bytes | None


def gptq_factor(hessian: Floats, *, order: NDArray[np.int32] | None = None, damping: float = 0.0) -> Floats:
    """The triangular matrix that ``gptq`` needs, from a symmetric positive definite one [C, C] (which is kept).

    Args:
        order: int32 [C], a permutation: place i of the factor is column ``order[i]`` of the matrix.
        damping: added to the diagonal.

    Returns:
        U, upper triangular and row-major, with ``U U' = inv(hessian)``. Columns are quantized from the last to the
        first, so that one Cholesky factor and its inverse are enough: hessian = L L', U = inv(L)'. The published order,
        first to last, needs the Cholesky factor of the inverse: three factorizations.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite in fp32; damp it more.
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.matrix("hessian", hessian, np.float32, square=True)
    places = check.order(order, len(hessian))
    factor: Floats | None = _backend().gptq_factor(hessian, places, damping)
    if factor is None:
        raise np.linalg.LinAlgError("the hessian is not positive definite; damp it more")
    return factor


def descend(
    weight: Floats,
    hessian: Floats,
    codes: Bytes,
    step: Floats,
    zero: Floats,
    bits: int,
    *,
    damping: float = 0.0,
    scale_dtype: str | None = "F16",
    threads: int = 1,
) -> tuple[Bytes, Floats, NDArray[np.float64]]:
    """One pass of coordinate descent on ``E = dW H dW'`` of each row: group by group, the step, then code after code.

    A weight is ``step (code - zero)`` here, at one bit too. With all others standing still, E is a parabola in one step
    and in one code, and each goes to the stored step, or the code, that is nearest to its lowest point (codes:
    CDQuant, arXiv 2406.17542). A step that would lose by its own rounding, or fall below 0.3 of what it was, stays.

    Args:
        weight: [R, C]. hessian: [C, C], symmetric. damping: added to its diagonal.
        codes: uint8 [R, C]. step: [R, G], positive. zero: [R, G]. All are kept.
        scale_dtype: what new steps are rounded to as scales, as of ``clip_search``; None: steps stand still.

    Returns:
        Codes, steps, and float64 [R], how much E changed: not above 0, up to rounding.

    Raises:
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    check.matrix("weight", weight, np.float32)
    check.matrix("hessian", hessian, np.float32, square=True)
    check.matrix("codes", codes, np.uint8)
    check.descent(weight, hessian, codes, step, zero, bits)
    if scale_dtype is not None:
        check.stored(scale_dtype)
    return _backend().descend(weight, hessian, damping, codes, step, zero, bits, scale_dtype, threads)


def gptq(
    weight: Floats,
    factor: Floats,
    groups: NDArray[np.int32],
    scales: Floats,
    zeros: Bytes | None,
    bits: int,
    *,
    order: NDArray[np.int32] | None = None,
    threads: int = 1,
) -> Solved:
    """GPTQ with scales fixed beforehand (Frantar et al., arXiv 2210.17323, algorithm 1, walked from the last column).

    Column at place i: ``code = round(w_i / s + z)``, ``e_i = (w_i - s (code - z)) / U[i, i]``, and every column at a
    place j < i moves by ``-e_i U[j, i]``. A block of columns is a matrix too: with ``factor[a:b, a:b]``, the columns
    before it then owe ``-errors @ factor[:a, a:b].T``.

    Args:
        weight: [R, C], kept.
        factor: [C, C] as of ``gptq_factor``; only the upper triangle is read.
        groups: int32 [C], the column of ``scales`` that column c of the weight uses.
        scales: [R, G], positive.
        zeros: uint8 [R, G] or None.
        order: int32 [C], a permutation: place i of the factor is column ``order[i]`` of the weight. To begin with the
            columns that matter most, sort them ascending.

    Raises:
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    columns = check.factored(weight, factor)
    check.vector("groups", groups, np.int32, columns)
    check.grid(scales, zeros, bits, weight.shape[0], scales.shape[-1])
    if columns and (groups.min() < 0 or groups.max() >= scales.shape[1]):
        raise ValueError(f"groups are 0 to {scales.shape[1] - 1}, these are {groups.min()} to {groups.max()}")
    places = check.order(order, columns)
    step, zero = _affine(scales, zeros, bits)
    codes, errors, loss = _backend().gptq(weight, factor, groups, step, zero, bits, places, threads)
    return Solved(codes, errors, loss, scales, zeros)


def gptq_refit(
    weight: Floats,
    factor: Floats,
    group: int,
    bits: int,
    symmetric: bool,
    *,
    candidates: Floats | None = None,
    importance: Floats | None = None,
    scale_dtype: str = "F16",
    order: NDArray[np.int32] | None = None,
    threads: int = 1,
) -> Solved:
    """GPTQ whose scales are found group by group, from the weights as compensated so far (``clip_search`` in between).

    Arguments as of ``gptq`` and ``clip_search``. With ``order``, the columns of a group must have places side by side,
    in a run of ``group`` that starts at a multiple of it: whole groups may change places, and columns inside them.

    Raises:
        ValueError: arguments that do not fit together.
    """
    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    columns = check.factored(weight, factor)
    group = check.group(group, columns)
    places = check.order(order, columns)
    owner = places.reshape(-1, group) // group
    if (owner != owner[:, :1]).any():
        raise ValueError(f"the order takes columns of a group of {group} apart")
    shares, by_column = check.search(candidates, importance, columns, scale_dtype)
    one = bits == 1 or symmetric
    codes, errors, loss, step, zero = _backend().gptq_refit(
        weight, factor, group, bits, one, shares, by_column, scale_dtype, places, threads
    )
    return Solved(codes, errors, loss, *_stored_form(step, zero, bits, one))


def clip_search(
    weight: Floats,
    group: int,
    bits: int,
    symmetric: bool,
    *,
    candidates: Floats | None = None,
    importance: Floats | None = None,
    scale_dtype: str = "F16",
    threads: int = 1,
) -> tuple[Floats, Bytes | None]:
    """Scales and zeros per row and group that minimise ``sum_c importance_c (w_c - q(w_c))**2`` over shrunk ranges.

    The range of a group is from min(w, 0) to max(w, 0), or its symmetric hull. Every share in ``candidates`` is tried:
    on both ends together, then, if asymmetric, on the lower end alone and on the upper end alone. At one bit there is
    nothing to search: the scale is the weighted mean of \\|w\\|.

    Args:
        weight: [R, C], C a multiple of ``group``.
        candidates: float32 [K] of positive shares, the first one kept where several are as good; default ``SHRINK``.
        importance: float32 [C], not negative, such as the diagonal of the Hessian; default 1.
        scale_dtype: F16, BF16 or F32: every scale tried is rounded to that significand, so that the ones returned are
            stored as they are, unless they leave the range of F16 (6e-5 to 65504).

    Returns:
        scales float32 [R, G], positive; zeros uint8 [R, G], None if symmetric or one bit.

    Raises:
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    check.matrix("weight", weight, np.float32)
    columns = weight.shape[1]
    group = check.group(group, columns)
    shares, by_column = check.search(candidates, importance, columns, scale_dtype)
    one = bits == 1 or symmetric
    step, zero = _backend().clip_search(weight, group, bits, one, shares, by_column, scale_dtype, threads)
    return _stored_form(step, zero, bits, one)


def minmax(
    weight: Floats, group: int, bits: int, symmetric: bool, *, scale_dtype: str = "F16", threads: int = 1
) -> tuple[Floats, Bytes | None]:
    """``clip_search`` over the whole range alone."""
    import numpy as np

    return clip_search(weight, group, bits, symmetric, candidates=np.ones(1, np.float32), scale_dtype=scale_dtype,
                       threads=threads)  # fmt: skip


def round_codes(
    weight: Floats, scales: Floats, zeros: Bytes | None, group: int, bits: int, *, threads: int = 1
) -> Bytes:
    """Codes uint8 [R, C] of the nearest values (ties to the even code), clamped to the range.

    Raises:
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    check.matrix("weight", weight, np.float32)
    rows, columns = weight.shape
    group = check.group(group, columns)
    check.grid(scales, zeros, bits, rows, columns // group)
    return _backend().round_codes(weight, *_affine(scales, zeros, bits), group, bits, threads)


def pack(codes: Bytes, bits: int, *, threads: int = 1) -> NDArray[np.int32]:
    """Codes uint8 [R, C] as int32 words [R, ceil(C bits / 32)]: a dense bit stream per row, lowest bits first, zeros at
    the end. Bits of a code above ``bits`` are refused.

    Raises:
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    check.matrix("codes", codes, np.uint8)
    if bits < 8 and codes.size and codes.max() >> bits:
        raise ValueError(f"a code of {codes.max()} does not fit in {bits} bits")
    return _backend().pack(codes, bits, threads)


def unpack(packed: NDArray[np.int32], bits: int, columns: int, *, threads: int = 1) -> Bytes:
    """The codes uint8 [R, columns] of ``pack``. Bits after the last code are not looked at.

    Raises:
        ValueError: arguments that do not fit together.
    """
    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    check.words(packed, bits, columns)
    return _backend().unpack(packed, bits, columns, threads)


def dequantize(
    packed: NDArray[np.int32],
    scales: Floats,
    zeros: Bytes | None,
    group: int,
    bits: int,
    columns: int,
    *,
    dtype: str = "float32",
    threads: int = 1,
) -> Floats | NDArray[np.uint16]:
    """Weights [R, columns] of packed codes: float32, or with ``dtype="bfloat16"`` bf16 in uint16 (nearest, ties to
    even).

    Raises:
        ValueError: arguments that do not fit together.
    """
    from moezip.kernels import check

    check.width(bits)
    check.threads(threads)
    check.words(packed, bits, columns)
    group = check.group(group, columns)
    check.grid(scales, zeros, bits, packed.shape[0], columns // group)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is float32 or bfloat16, not {dtype!r}")
    step, zero = _affine(scales, zeros, bits)
    return _backend().dequantize(packed, step, zero, group, bits, columns, dtype == "bfloat16", threads)


def second_moment(
    x: Floats | NDArray[np.uint16], out: Floats, *, weights: Floats | None = None, threads: int = 1
) -> None:
    """Adds ``sum_t weights[t] x[t] x[t]'`` to ``out``, which stays symmetric.

    Args:
        x: float32 [T, C], or bf16 in uint16 [T, C] (products are then exact, sums fp32).
        out: float32 [C, C], symmetric; changed in place.
        weights: float32 [T], default 1.

    Raises:
        ValueError: arguments that do not fit together.
    """
    import numpy as np

    from moezip.kernels import check

    check.threads(threads)
    check.matrix("x", x, np.float32, np.uint16)
    check.matrix("out", out, np.float32, square=True)
    if out.shape[0] != x.shape[1]:
        raise ValueError(f"out is {list(out.shape)} for x of {x.shape[1]} columns")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if weights is not None:
        check.vector("weights", weights, np.float32, x.shape[0])
    _backend().second_moment(x, out, weights, threads)


def _affine(scales: Floats, zeros: Bytes | None, bits: int) -> tuple[Floats, Floats]:
    """Step and zero of ``w = step (code - zero)``: one bit's ``s (2 q - 1)`` is ``2 s (q - 1/2)``."""
    import numpy as np

    if bits == 1:
        return scales + scales, np.full(scales.shape, 0.5, np.float32)
    if zeros is None:
        return scales, np.full(scales.shape, 2 ** (bits - 1), np.float32)
    return scales, zeros.astype(np.float32)


def _stored_form(step: Floats, zero: Floats, bits: int, symmetric: bool) -> tuple[Floats, Bytes | None]:
    import numpy as np

    if bits == 1:
        return step * np.float32(0.5), None
    return step, None if symmetric else zero.astype(np.uint8)


def status() -> Status:
    """Which library and which instruction set are in use, or why there is none. Builds the library if need be."""
    return chosen()[1]


def _backend() -> Any:
    return chosen()[0]

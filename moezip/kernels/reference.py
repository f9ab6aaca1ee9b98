"""The slow, readable twins of the C++ kernels, in numpy: what the native library is checked against, and what runs
where there is none.

Arguments arrive checked (``moezip.kernels`` does that), outputs are new arrays. Where a twin does its arithmetic in the
same order as the C++ code, integer outputs agree bit for bit; the docstring says so where they cannot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Columns that GPTQ takes together before their errors go to the others in one product.
BLOCK = 128

# The smallest scale whose reciprocal is finite in fp32.
SMALLEST = np.float32(2.0**-126)

# Dropped bits of a fp32 significand, by stored dtype.
DROPPED = {"F32": 0, "F16": 13, "BF16": 16}


# A new step below this share of the old one is not taken: the codes would no longer be near.
LEAST_STEP = np.float32(0.3)

# Columns that tell each other of their moves at once; those behind them hear of all together, in one product.
NEAR = 16

# The smallest fp16 number with all its bits, and the largest.
HALF = np.float32(2.0**-14), np.float32(65504)


def quantized(weight: Floats, scale: Floats, zero: Floats, bits: int) -> Floats:
    """Codes as floats: ``clamp(rint(weight / scale + zero), 0, 2**bits - 1)``, ties to even; NaN becomes 0."""
    top = np.float32(2**bits - 1)
    place = weight * (np.float32(1) / scale) + zero
    place = np.where(place > 0, place, np.float32(0))
    return np.rint(np.where(place < top, place, top))


def gptq_factor(hessian: Floats, order: NDArray[np.int32], damping: float) -> Floats | None:
    """U, or None where the damped matrix is not positive definite. LAPACK's sums run in another order."""
    from scipy.linalg import lapack

    ordered = hessian[np.ix_(order, order)]
    ordered.flat[:: len(order) + 1] += np.float32(damping)
    # Row-major and symmetric is column-major and symmetric: LAPACK reads a transposed view without a copy of its own.
    lower, info = lapack.spotrf(ordered.T, lower=1, clean=1, overwrite_a=1)
    if info == 0:
        lower, info = lapack.strtri(lower, lower=1, overwrite_c=1)
    if info or not np.isfinite(lower[-1]).all():
        return None
    return np.ascontiguousarray(lower.T)


def gptq(
    weight: Floats,
    factor: Floats,
    groups: NDArray[np.int32],
    scales: Floats,
    zeros: Floats,
    bits: int,
    order: NDArray[np.int32],
    threads: int,
) -> tuple[Bytes, Floats, Floats]:
    """Codes [R, C] in the weight's own columns, errors [R, C] in the factor's order, loss [R].

    Errors reach columns of other blocks through one matrix product, which adds in another order than the C++ code:
    there codes may differ where a weight lies within rounding of half a step.
    """
    rows, columns = weight.shape
    rest = np.ascontiguousarray(weight[:, order].T)
    errors = np.empty((columns, rows), np.float32)
    codes = np.empty((rows, columns), np.uint8)
    loss = np.zeros(rows, np.float32)
    for end in range(columns, 0, -BLOCK):
        start = max(0, end - BLOCK)
        for at in range(end - 1, start - 1, -1):
            group = groups[order[at]]
            scale, zero = scales[:, group], zeros[:, group]
            code = quantized(rest[at], scale, zero, bits)
            error = (rest[at] - scale * (code - zero)) * (np.float32(1) / factor[at, at])
            rest[start:at] -= factor[start:at, at, None] * error
            errors[at], codes[:, order[at]] = error, code
            loss += error * error
        rest[:start] -= factor[:start, start:end] @ errors[start:end]
    return codes, np.ascontiguousarray(errors.T), loss


def gptq_refit(
    weight: Floats,
    factor: Floats,
    group: int,
    bits: int,
    symmetric: bool,
    candidates: Floats,
    importance: Floats,
    scale_dtype: str,
    order: NDArray[np.int32],
    threads: int,
) -> tuple[Bytes, Floats, Floats, Floats, Floats]:
    """As ``gptq``, with the scales [R, G] and zeros [R, G] of a group found when its columns come up."""
    rows, columns = weight.shape
    rest = np.ascontiguousarray(weight[:, order])
    errors = np.empty((rows, columns), np.float32)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, columns // group), np.float32)
    zeros = np.empty_like(scales)
    loss = np.zeros(rows, np.float32)
    one_group, natural = np.zeros(group, np.int32), np.arange(group, dtype=np.int32)
    for end in range(columns, 0, -group):
        start = end - group
        inside = np.ascontiguousarray(rest[:, start:end])
        number = order[start] // group
        found = clip_search(
            inside, group, bits, symmetric, candidates, importance[order[start:end]], scale_dtype, threads
        )
        scales[:, number], zeros[:, number] = found[0][:, 0], found[1][:, 0]
        block = gptq(inside, factor[start:end, start:end], one_group, *found, bits, natural, threads)
        codes[:, order[start:end]], errors[:, start:end] = block[0], block[1]
        loss += block[2]
        rest[:, :start] -= block[1] @ factor[:start, start:end].T
    return codes, errors, loss, scales, zeros


def stored(scale: Floats, dtype: str) -> Floats:
    """``scale`` rounded to the significand of ``dtype``, ties to even; exponents are left alone."""
    drop = DROPPED[dtype]
    if not drop:
        return scale
    bits = scale.view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1) + ((bits >> np.uint32(drop)) & np.uint32(1))
    return ((bits + half) & np.uint32(2**32 - (1 << drop))).view(np.float32)


def clip_search(
    weight: Floats,
    group: int,
    bits: int,
    symmetric: bool,
    candidates: Floats,
    importance: Floats,
    scale_dtype: str,
    threads: int,
) -> tuple[Floats, Floats]:
    """Scales and zeros, both float32 [R, G]. Sums run over a group's columns one by one, as in the C++ code."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, columns // group, group)
    weights = importance.reshape(columns // group, group)
    if bits == 1:
        return _sign_scales(parts, weights, scale_dtype)
    one, top = np.float32(1), np.float32(2**bits - 1)
    low = np.minimum(np.fmin.reduce(parts, axis=2), 0).astype(np.float32)
    high = np.maximum(np.fmax.reduce(parts, axis=2), 0).astype(np.float32)
    if symmetric:
        high = np.maximum(high, -low)

    def trial(lower: Floats, upper: Floats) -> tuple[Floats, Floats, Floats]:
        if symmetric:
            width = high * upper / (top / np.float32(2))
        else:
            width = (high * upper - low * lower) / top
        scale = stored(np.where(width > SMALLEST, width, SMALLEST), scale_dtype)
        scale = np.where(high > low, scale, one)
        if symmetric:
            zero = np.full_like(scale, 2 ** (bits - 1))
        else:
            zero = quantized(-(low * lower), scale, np.float32(0), bits)  # type: ignore[arg-type]
        loss = np.zeros_like(scale)
        for at in range(group):
            code = quantized(parts[..., at], scale, zero, bits)
            away = parts[..., at] - scale * (code - zero)
            loss += weights[:, at] * (away * away)
        return loss, scale, zero

    shape = low.shape
    lower = upper = np.full(shape, candidates[0], np.float32)
    best, scales, zeros = trial(lower, upper)

    def keep(low_factor: Floats, high_factor: Floats) -> None:
        nonlocal best, scales, zeros, lower, upper
        loss, scale, zero = trial(low_factor, high_factor)
        better = loss < best
        best, scales, zeros = (
            np.where(better, new, old) for new, old in ((loss, best), (scale, scales), (zero, zeros))
        )
        lower, upper = np.where(better, low_factor, lower), np.where(better, high_factor, upper)

    for factor in candidates[1:]:
        keep(np.full(shape, factor), np.full(shape, factor))
    if not symmetric and len(candidates) > 1:
        for factor in candidates:
            keep(np.full(shape, factor), upper)
        for factor in candidates:
            keep(lower, np.full(shape, factor))
    return scales, zeros


def _sign_scales(parts: Floats, weights: Floats, scale_dtype: str) -> tuple[Floats, Floats]:
    """One bit, ``w = s (2 q - 1)``: s is the weighted mean of |w|, the least-squares answer. As scale 2 s, zero 1/2."""
    total, plain = np.zeros(parts.shape[:2], np.float32), np.zeros(parts.shape[:2], np.float32)
    mass = np.zeros(parts.shape[1], np.float32)
    for at in range(parts.shape[2]):
        size = np.abs(parts[..., at])
        total += weights[:, at] * size
        plain += size
        mass += weights[:, at]
    counted = mass > 0
    mean = np.where(counted, total / np.where(counted, mass, np.float32(1)), plain / np.float32(parts.shape[2]))
    scale = stored(np.where(mean > SMALLEST, mean, np.float32(2.0**-24)), scale_dtype)
    return scale + scale, np.full_like(scale, 0.5)


def round_codes(weight: Floats, scales: Floats, zeros: Floats, group: int, bits: int, threads: int) -> Bytes:
    """Codes [R, C]."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, columns // group, group)
    return quantized(parts, scales[..., None], zeros[..., None], bits).astype(np.uint8).reshape(rows, columns)


def pack(codes: Bytes, bits: int, threads: int) -> NDArray[np.int32]:
    """Words [R, ceil(C * bits / 32)]: code c occupies bits c * bits ... of the row's stream, lowest bit first."""
    rows, columns = codes.shape
    stream = np.unpackbits(codes[..., None], axis=2, bitorder="little")[..., :bits].reshape(rows, columns * bits)
    padded = np.zeros((rows, -(-columns * bits // 32) * 32), np.uint8)
    padded[:, : columns * bits] = stream
    return np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def unpack(packed: NDArray[np.int32], bits: int, columns: int, threads: int) -> Bytes:
    """Codes [R, columns]."""
    rows = len(packed)
    stream = np.unpackbits(packed.astype("<i4", copy=False).view(np.uint8), axis=1, bitorder="little")
    each = np.zeros((rows, columns, 8), np.uint8)
    each[..., :bits] = stream[:, : columns * bits].reshape(rows, columns, bits)
    return np.packbits(each, axis=2, bitorder="little").reshape(rows, columns)


def dequantize(
    packed: NDArray[np.int32],
    scales: Floats,
    zeros: Floats,
    group: int,
    bits: int,
    columns: int,
    bf16: bool,
    threads: int,
) -> Floats | NDArray[np.uint16]:
    """``scale * (code - zero)``, float32 [R, columns], or bf16 as uint16 (nearest, ties to even)."""
    rows = len(packed)
    codes = unpack(packed, bits, columns, threads).astype(np.float32).reshape(rows, columns // group, group)
    values = (scales[..., None] * (codes - zeros[..., None])).reshape(rows, columns)
    if not bf16:
        return values
    return (stored(values, "BF16").view(np.uint32) >> 16).astype(np.uint16)


def second_moment(x: NDArray, out: Floats, weights: Floats | None, threads: int) -> None:
    """Adds ``x.T @ diag(weights) @ x`` to ``out``. Sums in another order than the C++ code."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    product = x.T @ (x if weights is None else x * weights[:, None])
    out += np.float32(0.5) * (product + product.T)


def stored_step(step: Floats, bits: int, dtype: str) -> Floats:
    """What a step [R] is once its scale was stored, ties to even; 0 where the scale is too large for ``dtype``."""
    factor = np.float32(0.5 if bits == 1 else 1)
    scale = step * factor
    kept = stored(scale, dtype)
    if dtype == "F16":
        least, most = HALF
        half = np.float32(0.5)
        kept = np.where(scale < least, (scale + half) - half, np.where(kept > most, np.float32(0), kept))
    return (kept / factor).astype(np.float32)


def descend(
    weight: Floats,
    hessian: Floats,
    damping: float,
    codes: Bytes,
    step: Floats,
    zero: Floats,
    bits: int,
    scale_dtype: str | None,
    threads: int,
) -> tuple[Bytes, Floats, NDArray[np.float64]]:
    """Codes [R, C], steps [R, G], and how much the error of each row changed [R].

    Products add in another order than the C++ code: codes may differ where two are as good within rounding.
    """
    rows, count = step.shape
    width = weight.shape[1] // count
    codes, step, gained = codes.copy(), step.copy(), np.zeros(rows)
    slope: Floats
    grouped = codes.reshape(rows, count, width).astype(np.float32)
    changes = ((grouped - zero[..., None]) * step[..., None]).reshape(weight.shape) - weight
    for group in range(count):
        part = slice(group * width, (group + 1) * width)
        inner = hessian[part, part].copy()
        inner.flat[:: width + 1] += np.float32(damping)
        slope = changes @ hessian[:, part] + np.float32(damping) * changes[:, part]
        if scale_dtype is not None:
            unit = codes[:, part].astype(np.float32) - zero[:, group, None]
            turned: NDArray = unit @ inner
            best, gain = _best_step(unit, slope, turned, step[:, group], bits, scale_dtype)
            shift = (best - step[:, group])[:, None]
            changes[:, part] += shift * unit
            slope += shift * turned
            step[:, group] = best
            gained += gain
        old = codes[:, part].astype(np.float32)
        new, gain = _best_codes(old, slope / step[:, group, None], inner, 2**bits - 1)
        codes[:, part] = new
        changes[:, part] += (new - old) * step[:, group, None]
        gained += gain * step[:, group].astype(np.float64) ** 2
    return codes, step, gained


def _best_step(
    unit: Floats, slope: Floats, turned: Floats, step: Floats, bits: int, scale_dtype: str
) -> tuple[Floats, NDArray[np.float64]]:
    """The best step of one group per row, and what it gains, both [R]."""
    curve, along = (unit * turned).sum(1), (unit * slope).sum(1)
    best = step - np.divide(along, curve, out=np.zeros_like(along), where=curve > 0)
    best = stored_step(np.where(best > LEAST_STEP * step, best, step), bits, scale_dtype)
    move = (best - step).astype(np.float64)
    gain = move * (2 * along + move * curve)
    taken = (gain < 0) & (best > 0)
    return np.where(taken, best, step), np.where(taken, gain, 0)


def _best_codes(codes: Floats, slope: Floats, inner: Floats, top: int) -> tuple[Floats, NDArray[np.float64]]:
    """The best codes of one group, column after column: float32 [R, g], and what they gain in steps squared, [R].

    In units of the step: v_j - G_j / H_jj is the code less slope_j / H_jj, whatever the zero.
    """
    held = codes.T.copy()  # [g, R]: a column is one run of memory
    slope = np.ascontiguousarray(slope.T)
    moves = np.empty_like(held)
    heights = inner.diagonal()
    inverses = np.divide(np.float32(1), heights, out=np.zeros_like(heights), where=heights > 0)
    for start in range(0, len(held), NEAR):
        stop = min(start + NEAR, len(held))
        for column in range(start, stop):
            move = np.multiply(slope[column], -inverses[column], out=moves[column])
            move += held[column]
            np.rint(move, out=move)
            np.minimum(np.maximum(move, 0, out=move), top, out=move)
            move -= held[column]
            slope[column + 1 : stop] += inner[column + 1 : stop, column, None] * move
        slope[stop:] += inner[stop:, start:stop] @ moves[start:stop]
    # the slope of each column is still the one that its move was made on
    gained = (moves * (2 * slope + moves * heights[:, None])).sum(0, dtype=np.float64)
    held += moves
    return np.ascontiguousarray(held.T), gained

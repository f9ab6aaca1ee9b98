"""The Triton kernels: products with packed matrices of 1 to 8 bits, grouped over experts. **Never run on a GPU.**

The tests run them in Triton's interpreter and compile them for sm_80, sm_90 and sm_100; nothing more is known of them.
``triton_experts`` calls them; ``triton_layout`` says how codes lie in memory.

A field of a lane becomes a number with one AND and one OR, two lanes at a time: the OR puts the exponent of a constant
C above the code, so that the number is ``C + code``, exactly. Of ``sum_k x_k (code_k - zero)`` over the inputs of one
scale, a product of ``x`` with those numbers has ``sum_k x_k C_k`` too much, which depends on no row of the matrix: it
is summed once per token (``sums_kernel``) and is what the accumulator starts from, with its sign changed. Scales and
zeros are applied to accumulators, not to weights.

``FAST`` uses PTX for the AND-OR and the shifts; without it the same numbers come from Triton's own operations, which
the interpreter knows. The interpreter computes bf16 wrongly without a word, so there products are of fp32 (``FP32``).

Importing this module imports triton, whose interpreter must be chosen (TRITON_INTERPRET=1) before its first import.
"""

# Triton compiles these functions from their text, where annotations mean constants.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from moezip.kernels import triton_layout

_place = triton.constexpr_function(triton_layout.place)


@triton.constexpr_function
def _and_or(mask: int, exponent: int) -> str:
    """PTX of ``(a & mask) | exponent`` on both halves of a word."""
    return f"lop3.b32 $0, $1, {mask << 16 | mask}, {exponent << 16 | exponent}, 0xEA;"


@triton.constexpr_function
def _moved(shift: int) -> str:
    """PTX of a shift of a word; what crosses from one half to the other is masked away later."""
    return f"shr.b32 $0, $1, {shift};" if shift > 0 else f"shl.b32 $0, $1, {-shift};"


@triton.constexpr_function
def _exponent(power: int, mantissa: int) -> int:
    """The bits of ``2**power``, in fp16 (10 bits of mantissa) or bf16 (7)."""
    return (power + (15 if mantissa == 10 else 127)) << mantissa


@triton.jit
def _numbers(
    lanes, FIELD: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):
    """``constant + (code << SHIFT)`` of one field of int16 lanes, as DTYPE."""
    MANTISSA: tl.constexpr = 10 if DTYPE == tl.float16 else 7  # noqa: SIM300
    PLACE: tl.constexpr = _place(FIELD * WIDTH, WIDTH, MANTISSA)
    MOVE: tl.constexpr = PLACE[0]
    BIT: tl.constexpr = PLACE[1]
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << BIT
    EXPONENT: tl.constexpr = _exponent(MANTISSA - BIT + SHIFT, MANTISSA)
    if FAST:
        if MOVE != 0:
            lanes = tl.inline_asm_elementwise(_moved(MOVE), "=r,r", [lanes], dtype=tl.int16, is_pure=True, pack=2)
        numbers = tl.inline_asm_elementwise(
            _and_or(MASK, EXPONENT), "=r,r", [lanes], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        if MOVE > 0:
            lanes = lanes >> MOVE
        elif MOVE < 0:
            lanes = lanes << (-MOVE)
        numbers = ((lanes & MASK) | EXPONENT).to(tl.int16)
    return numbers.to(DTYPE, bitcast=True)


@triton.jit
def _field_dots(
    acc, x_at, lanes, START: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Adds the products of COUNT fields, from FIRST on; lane l of the run's field f meets input START + f L + l.

    ``acc`` [BM, BN], ``x_at`` [BM, 1] pointers to a token's inputs of this block, ``lanes`` [L, BN] int16.
    """
    L: tl.constexpr = lanes.shape[0]
    for i in tl.static_range(COUNT):
        x = tl.load(x_at + (START + (FIRST + i) * L) + tl.arange(0, L)[None, :])
        w = _numbers(lanes, FIRST + i, WIDTH, SHIFT, DTYPE, FAST)
        if FP32:
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc)
        else:
            acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def grouped_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, sums_ptr, offsets_ptr, rows_ptr, tiles_ptr,
    slots_ptr, codes_at_ptr, scales_at_ptr, sizes_ptr, y_ptr,
    x_stride, sums_stride, y_stride, y_split, y_part, choices, experts,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FAST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """y[split, row, part * y_part + n] = sum over the split's inputs of x[row // choices, k] * weight[n, k].

    One program: a tile of BM rows that chose one expert, BN rows of that expert's matrix, one split of its inputs.

    Args:
        x: DTYPE [tokens, x_stride], zeros from K to the end of the last block.
        codes: int16, all matrices of this width; scales: by matrix [G, N]; zeros: uint8 likewise, if ZEROS.
        sums, offsets: fp32 [tokens, sums_stride]: by unit of inputs, see ``sums_kernel``; sums only if ZEROS.
        rows: int32 [tiles * BM]: a row of y, -1 for none. tiles: int32 [tiles]: an expert, -1 for none.
        slots: int32 [parts, experts]: the matrix of an expert, -1 where it has none of this width.
        codes_at, scales_at: int64 [matrices]: first elements. sizes: int32 [matrices, 2]: N, K.
        y: fp32 [SPLITS, rows, y_stride].
        GROUP: inputs of a scale; 0: all.
    """
    HAS4: tl.constexpr = BITS >= 4
    TWO4: tl.constexpr = BITS == 8
    HAS2: tl.constexpr = BITS % 4 >= 2
    HAS1: tl.constexpr = BITS % 2 == 1
    HALVES: tl.constexpr = 2 if HAS1 else 1
    BLOCK: tl.constexpr = 128 * HALVES
    UNIT: tl.constexpr = 128 if GROUP % 128 == 0 else (64 if GROUP % 64 == 0 else 32)
    UNITS: tl.constexpr = 128 // UNIT
    AT2: tl.constexpr = 32 * HALVES if HAS4 else 0
    AT1: tl.constexpr = AT2 + (16 * HALVES if HAS2 else 0)
    SHIFT2: tl.constexpr = 4 if HAS4 else 0
    SHIFT1: tl.constexpr = SHIFT2 + (2 if HAS2 else 0)

    pn, pt, pz = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(tiles_ptr + pt)
    if expert < 0:
        return
    part, split = pz // SPLITS, pz % SPLITS
    slot = tl.load(slots_ptr + part * experts + expert)
    if slot < 0:
        return
    N, K = tl.load(sizes_ptr + slot * 2), tl.load(sizes_ptr + slot * 2 + 1)
    if pn * BN >= N:
        return
    rows = tl.load(rows_ptr + pt * BM + tl.arange(0, BM))
    real = rows >= 0
    tokens = (tl.maximum(rows, 0) // choices).to(tl.int64)  # a tile's empty rows compute with some token, for nothing
    on = pn * BN + tl.arange(0, BN)
    inside = on < N
    near = tl.minimum(on, N - 1)  # rows behind the last are read as the last, so that no load needs a mask
    codes_at = codes_ptr + tl.multiple_of(tl.load(codes_at_ptr + slot), 16)  # runs are of 16 or 32 lanes
    scales_at = tl.load(scales_at_ptr + slot) + near
    x_at = x_ptr + tokens[:, None] * x_stride
    sums_at = tokens * sums_stride

    blocks = (K + BLOCK - 1) // BLOCK
    per = (blocks + SPLITS - 1) // SPLITS
    lanes_of_block = N.to(tl.int64) * (BLOCK * BITS // 16)
    total = tl.zeros((BM, BN), tl.float32)
    lanes32, lanes16 = tl.arange(0, 32), tl.arange(0, 16)
    for block in range(split * per, tl.minimum(split * per + per, blocks)):
        code = codes_at + block * lanes_of_block
        xb = x_at + block * BLOCK
        if HAS1:
            w1 = tl.load(code + N * AT1 + near[None, :] * 16 + lanes16[:, None])
        for half in tl.static_range(HALVES):
            if HAS4:
                w4 = tl.load(code + N * (half * 32) + near[None, :] * 32 + lanes32[:, None])
            if TWO4:
                w8 = tl.load(code + N * 32 + near[None, :] * 32 + lanes32[:, None])
            if HAS2:
                w2 = tl.load(code + N * (AT2 + half * 16) + near[None, :] * 16 + lanes16[:, None])
            for u in tl.static_range(UNITS):
                unit = block * (UNITS * HALVES) + (half * UNITS + u)
                excess = tl.load(offsets_ptr + sums_at + unit)
                acc = tl.zeros((BM, BN), tl.float32) - excess[:, None]
                if HAS4:
                    acc = _field_dots(acc, xb, w4, half * 128, u * UNIT // 32, UNIT // 32, 4, 0, DTYPE, FAST, FP32)
                if TWO4:
                    acc = _field_dots(acc, xb, w8, half * 128, u * UNIT // 32, UNIT // 32, 4, 4, DTYPE, FAST, FP32)
                if HAS2:
                    acc = _field_dots(acc, xb, w2, half * 128, u * UNIT // 16, UNIT // 16, 2, SHIFT2, DTYPE, FAST, FP32)
                if HAS1:
                    acc = _field_dots(
                        acc, xb, w1, 0, (half * 128 + u * UNIT) // 16, UNIT // 16, 1, SHIFT1, DTYPE, FAST, FP32
                    )
                if GROUP == 0:
                    group = scales_at
                else:  # what fills up the last block has no scale of its own; its products are 0
                    group = scales_at + N * (tl.minimum(unit * UNIT, K - 1) // GROUP)
                scale = tl.load(scales_ptr + group).to(tl.float32)
                if ZEROS:
                    zero = tl.load(zeros_ptr + group).to(tl.float32)
                    sums = tl.load(sums_ptr + sums_at + unit)
                    acc -= zero[None, :] * sums[:, None]
                total += acc * scale[None, :]
    y_at = y_ptr + split * y_split + part * y_part
    y_at += tl.maximum(rows, 0).to(tl.int64)[:, None] * y_stride + on[None, :]
    tl.store(y_at, total, mask=real[:, None] & inside[None, :])


@triton.jit
def sums_kernel(
    x_ptr, constants_ptr, sums_ptr, offsets_ptr, x_stride, sums_stride,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """By unit of UNIT inputs: sums = sum_k x_k, offsets = sum_k x_k C_k. One program: a token's block of inputs.

    Args:
        x: [tokens, x_stride]. constants: fp32 [BLOCK], repeating. sums, offsets: fp32 [tokens, sums_stride].
    """
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inputs = tl.arange(0, BLOCK // UNIT)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    x = tl.load(x_ptr + token * x_stride + block * BLOCK + inputs).to(tl.float32)
    c = tl.load(constants_ptr + inputs)
    at = token * sums_stride + block * (BLOCK // UNIT) + tl.arange(0, BLOCK // UNIT)
    tl.store(sums_ptr + at, tl.sum(x, 1))
    tl.store(offsets_ptr + at, tl.sum(x * c, 1))


@triton.jit
def _tanh(value):
    return 2 * tl.sigmoid(2 * value) - 1


@triton.jit
def gate_kernel(
    y_ptr, bias_ptr, experts_ptr, widths_ptr, h_ptr, y_split, y_stride, y_part, h_stride, limit, alpha,
    SPLITS: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h[row, n] = act(gate) * up of the summed splits, 0 from the expert's width on. One program: BN columns of a row.

    Args:
        y: fp32 [SPLITS, rows, y_stride], gate at n, up at y_part + n. bias: fp32 [experts, 2, y_part], if BIAS.
        experts: int64 [rows], -1 for none. widths: int32 [experts]. h: 16-bit floats [rows, h_stride].
        GATE: silu, gelu, gelu_tanh, or clamped: ``(min(up) + 1) gate sigmoid(alpha gate)`` with both clamped to limit.
    """
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    expert = tl.load(experts_ptr + row)
    real = columns < tl.where(expert >= 0, tl.load(widths_ptr + tl.maximum(expert, 0)), 0)
    gate, up = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for split in tl.static_range(SPLITS):
        at = y_ptr + split * y_split + row * y_stride + columns
        gate += tl.load(at, mask=real, other=0.0)
        up += tl.load(at + y_part, mask=real, other=0.0)
    if BIAS:
        bias_at = bias_ptr + expert * 2 * y_part + columns
        gate += tl.load(bias_at, mask=real, other=0.0)
        up += tl.load(bias_at + y_part, mask=real, other=0.0)
    if GATE == "clamped":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1
        gate = gate * tl.sigmoid(alpha * gate)
    elif GATE == "gelu":
        gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif GATE == "gelu_tanh":
        gate = 0.5 * gate * (1 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = gate * tl.sigmoid(gate)
    value = tl.where(real, gate * up, 0.0)
    tl.store(h_ptr + row * h_stride + columns, value, mask=columns < h_stride)


@triton.jit
def combine_kernel(
    y_ptr, bias_ptr, experts_ptr, weights_ptr, widths_ptr, out_ptr, N, y_split, y_stride, choices,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[token, n] = sum over choices of weight * (summed splits + bias). One program: BN columns of a token.

    The order of the sum is that of the choices, so that the result is the same every time.

    Args:
        y: fp32 [SPLITS, tokens * choices, y_stride]. bias: fp32 [experts, N], if BIAS.
        experts: int64, -1 for none, weights: fp32 [tokens, choices]. widths: int32 [experts], 0 where y
            says nothing.
        out: [tokens, N].
    """
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < N
    total = tl.zeros((BN,), tl.float32)
    for choice in range(0, choices):
        row = token * choices + choice
        expert = tl.load(experts_ptr + row)
        there = tl.where(expert >= 0, N, 0)
        expert = tl.maximum(expert, 0)
        known = columns < tl.where(tl.load(widths_ptr + expert) > 0, there, 0)
        value = tl.zeros((BN,), tl.float32)
        for split in tl.static_range(SPLITS):
            value += tl.load(y_ptr + split * y_split + row * y_stride + columns, mask=known, other=0.0)
        if BIAS:
            value += tl.load(bias_ptr + expert * N + columns, mask=columns < there, other=0.0)
        total += value * tl.load(weights_ptr + row)
    tl.store(out_ptr + token * N + columns, total, mask=inside)

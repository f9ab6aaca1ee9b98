"""Packed codes as the Triton kernels want them: 16-bit lanes of fields, blocks of inputs, all rows of a block together.

A code of ``bits`` bits is cut into planes of 4, 2 and 1 bits, lowest first (3 = 2 + 1, 7 = 4 + 2 + 1). Of a plane of
width W, an int16 lane holds 16 / W codes, its fields; lane l, field f of a run holds the code of input ``f * L + l``,
so that field f of all L lanes multiplies L inputs side by side. No input is moved and no lane is fetched twice.

In memory, for one matrix [N, K]: block after block of inputs (128, or 256 where there is a 1-bit plane, whose 16 lanes
cover as many); in a block the runs of ``runs``; in a run row after row, ``[N, L]``. A tile of rows is contiguous. K is
filled up to whole blocks, with codes that meet inputs of 0. Scales and zeros are [G, N], so that rows lie side by side.

Works on any device; torch alone, no Triton.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}
LANES = {4: 32, 2: 16, 1: 16}
WORD = 32
# Bits of a significand after its first, which is not stored.
MANTISSA = {"float16": 10, "bfloat16": 7}
# Where a field may stand in a significand: (lowest bit, distance to the window of the next shift), by mantissa, width.
# Wide windows need fewer shifts; low places add a larger constant, which is taken off again, and cost its digits.
_WINDOWS = {
    (10, 4): (4, 4),
    (10, 2): (4, 6),
    (10, 1): (4, 6),
    (7, 4): (0, 4),
    (7, 2): (0, 6),
    (7, 1): (0, 7),
}


class Run(NamedTuple):
    """Lanes of one plane that cover ``inputs`` inputs of a block, from ``start`` on.

    ``width`` and ``shift`` are the plane's, ``at`` counts the lanes of a row that lie before it in the block.
    """

    width: int
    shift: int
    start: int
    at: int

    @property
    def lanes(self) -> int:
        return LANES[self.width]

    @property
    def fields(self) -> int:
        return 16 // self.width

    @property
    def inputs(self) -> int:
        return self.lanes * self.fields


def block_inputs(bits: int) -> int:
    """Inputs of a block: those that the widest run covers."""
    return max(LANES[width] * 16 // width for width in PLANES[bits])


def runs(bits: int) -> list[Run]:
    """The runs of a block, as they lie in memory."""
    found, at, shift = [], 0, 0
    for width in PLANES[bits]:
        covered = LANES[width] * 16 // width
        for start in range(0, block_inputs(bits), covered):
            found.append(Run(width, shift, start, at))
            at += LANES[width]
        shift += width
    return found


def padded(inputs: int, bits: int) -> int:
    """``inputs`` filled up to whole blocks."""
    block = block_inputs(bits)
    return -(-inputs // block) * block


def place(position: int, width: int, mantissa: int) -> tuple[int, int]:
    """(shift to the right, bit of the significand) of the field that begins at bit ``position`` of a lane.

    A negative shift goes to the left. OR-ing the exponent of ``2**(mantissa - bit)`` makes the field's code the number
    ``2**(mantissa - bit) + code``, exactly.
    """
    lowest, step = _WINDOWS[mantissa, width]
    shift = (position - lowest) // step * step
    return shift, position - shift


@cache
def constants(bits: int, mantissa: int) -> tuple[float, ...]:
    """By input of a block: what the kernel's numbers have beyond the code (see ``place``), summed over planes."""
    total = [0.0] * block_inputs(bits)
    for run in runs(bits):
        for field in range(run.fields):
            bit = place(field * run.width, run.width, mantissa)[1]
            first = run.start + field * run.lanes
            for k in range(first, first + run.lanes):
                total[k] += 2.0 ** (mantissa - bit + run.shift)
    return tuple(total)


def unit_inputs(group: int) -> int:
    """Inputs whose products are summed before a scale is applied: 128, 64 or 32. ``group`` 0: all of a row.

    Raises:
        ValueError: the group has no such divisor.
    """
    for unit in (128, 64, 32):
        if group % unit == 0:
            return unit
    raise ValueError(f"the Triton kernels take groups of multiples of 32, or whole rows, not {group}")


def unpack_words(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """uint8 codes [R, columns] behind int32 words [R, ceil(columns * bits / 32)], lowest bits first, on any device."""
    import torch

    words = -(-columns // WORD) * bits  # 32 codes fill whole words whatever their width
    if packed.shape[1] < words:
        packed = torch.nn.functional.pad(packed, (0, words - packed.shape[1]))
    runs_of = packed.reshape(packed.shape[0], -1, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty((*runs_of.shape[:2], WORD), dtype=torch.uint8, device=packed.device)
    for number in range(WORD):
        word, low = divmod(number * bits, WORD)
        value = runs_of[..., word] >> low
        if low + bits > WORD:
            value |= runs_of[..., word + 1] << (WORD - low)
        codes[..., number] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(packed.shape[0], -1)[:, :columns]


def lay_out(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int16 [padded(K) * bits / 16 * N] of codes uint8 [N, K]: what one matrix holds in memory, flat."""
    import torch

    rows, inputs = codes.shape
    block = block_inputs(bits)
    whole = torch.nn.functional.pad(codes, (0, padded(inputs, bits) - inputs)).view(rows, -1, block)
    pieces = [_lanes(whole[:, :, run.start : run.start + run.inputs], run) for run in runs(bits)]
    # each [blocks, N * L]: the runs of a block one behind the other
    return torch.cat([piece.transpose(0, 1).reshape(piece.shape[1], -1) for piece in pieces], dim=1).flatten()


def _lanes(codes: torch.Tensor, run: Run) -> torch.Tensor:
    """int16 [N, blocks, L] of the codes uint8 [N, blocks, F * L] that a run covers."""
    import torch

    fields = codes.reshape(*codes.shape[:2], run.fields, run.lanes)
    lanes = torch.zeros((*codes.shape[:2], run.lanes), dtype=torch.int32, device=codes.device)
    for field in range(run.fields):
        part = (fields[:, :, field] >> run.shift) & ((1 << run.width) - 1)
        lanes |= part.to(torch.int32) << (field * run.width)
    return lanes.to(torch.int16)  # the upper half of int32 is 0, so this keeps the 16 bits


def taken_apart(lanes: torch.Tensor, bits: int, rows: int, inputs: int) -> torch.Tensor:
    """The codes uint8 [rows, inputs] behind ``lay_out``."""
    import torch

    block = block_inputs(bits)
    per_row = block * bits // 16
    blocks = lanes.view(-1, rows * per_row)
    codes = torch.zeros((rows, len(blocks), block), dtype=torch.int32, device=lanes.device)
    for run in runs(bits):
        piece = blocks[:, rows * run.at : rows * (run.at + run.lanes)].reshape(-1, rows, run.lanes).transpose(0, 1)
        for field in range(run.fields):
            part = (piece.to(torch.int32) >> (field * run.width)) & ((1 << run.width) - 1)
            first = run.start + field * run.lanes
            codes[:, :, first : first + run.lanes] |= part << run.shift
    return codes.reshape(rows, -1)[:, :inputs].to(torch.uint8)

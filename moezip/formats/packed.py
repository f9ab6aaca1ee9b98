"""Whole-number codes of 1 to 8 bits, packed without gaps: the ``pack-quantized`` layout of compressed-tensors.

A matrix [R, C] with G groups along its input axis is stored as

=====================  =====  =======================  ===========================================================
``weight_packed``      I32    [R, ceil(C * bits / 32)]  the codes of a row, one behind the other, lowest bit first; a
                                                        code may straddle two words
``weight_scale``       F16    [R, G]                    or BF16, F32; U8 where the scales themselves are quantized
``weight_zero_point``  I32    [ceil(R * bits / 32), G]  packed like the codes, but along the rows; asymmetric only
``weight_shape``       I64    [2]                       R, C
``weight_scale_step``  F16    [R, 1]                    or F32; what U8 scales count; not part of compressed-tensors
=====================  =====  =======================  ===========================================================

Codes are unsigned, which is compressed-tensors' signed value + 2**(bits - 1). The weight is ``scale * (code - zero)``;
with one bit it is ``scale * (2 * code - 1)``, which is no affine rule with a whole zero: moezip reads that, others do
not. Bits behind the last code of a row are 0. Source: compressed-tensors 0.20, ``pack_quantized``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING

from moezip.checkpoint.reader import TORCH_DTYPES
from moezip.checkpoint.source import DTYPE_BITS
from moezip.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import torch

WORD = 32  # bits of a word, and so also the number of codes that fill whole words whatever their width
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
STEP = "weight_scale_step"
SCALE_DTYPES = ("F16", "BF16", "F32")
LARGEST_SCALE_CODE = 255
_AGAIN = "download the checkpoint again, or make it again"
# Below 2**-16 the fixed steps of F16's smallest numbers (2**-24) are coarser than BF16's relative ones (2**-8).
F16_RANGE = (2.0**-16, 65504.0)
_TEXT = re.compile(r"int(?P<bits>\d+)-g(?P<group>\d+)(?P<sym>-sym)?(?P<scale>-bf16|-f32)?(?P<double>-double)?\Z")


@dataclass(frozen=True, slots=True)
class Grid:
    """What the codes of one matrix may be.

    Attributes:
        bits: 1 to 8.
        group: weights along the input axis that share a scale; 0: all of an output channel.
        symmetric: no zero is stored, it is 2**(bits - 1). One bit is always symmetric.
        scale: dtype of the stored scales, ``F16`` or ``BF16``; ``F32`` in checkpoints of others.
        double: scales are stored in 8 bits, as multiples 1 to 255 of one step per output channel. The step is F16; with
            BF16, for scales beyond F16, it is F32, because BF16 is too coarse to find the same multiples again.

    Raises:
        PlanError: there is no such grid.
    """

    bits: int
    group: int
    symmetric: bool = False
    scale: str = "F16"
    double: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise PlanError(f"codes of {self.bits} bits do not exist", next="use 1 to 8 bits")
        if self.group < 0:
            raise PlanError(f"{self.group} weights cannot share a scale", next="use 32, 64, 128, or 0 for a channel")
        if self.scale not in SCALE_DTYPES:
            raise PlanError(f"scales cannot be stored as {self.scale}", next=f"use {' or '.join(SCALE_DTYPES)}")
        if self.bits == 1:
            object.__setattr__(self, "symmetric", True)

    def __str__(self) -> str:
        """Such as ``int4-g32``, ``int2-g64-sym``, ``int3-g0-bf16`` or ``int2-g32-double``; ``parse`` reads it."""
        text = f"int{self.bits}-g{self.group}"
        text += "-sym" if self.symmetric and self.bits > 1 else ""
        text += "" if self.scale == "F16" else f"-{self.scale.lower()}"
        return text + ("-double" if self.double else "")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid behind a text such as ``int4-g32-sym``.

        Raises:
            PlanError: the text does not read as one.
        """
        found = _TEXT.match(text)
        if found is None:
            raise PlanError(
                f"{text!r} is no grid of codes", next="write it like int4-g32, int2-g64-sym or int3-g0-bf16"
            )
        return cls(
            int(found["bits"]),
            int(found["group"]),
            found["sym"] is not None,
            (found["scale"] or "-F16")[1:].upper(),
            found["double"] is not None,
        )

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return 1 << self.bits

    def groups(self, columns: int) -> int:
        """Number of scales of a row of ``columns`` weights.

        Raises:
            PlanError: the groups do not divide the row.
        """
        if not self.group:
            return 1
        if columns % self.group:
            raise PlanError(
                f"groups of {self.group} do not divide {columns} input channels",
                next="use a smaller group, or one scale per output channel",
            )
        return columns // self.group

    def specs(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(safetensors dtype, shape) of every stored tensor, by suffix, in the order in which they are written."""
        groups = self.groups(columns)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            PACKED: ("I32", (rows, words(columns, self.bits))),
            SCALE: ("U8" if self.double else self.scale, (rows, groups)),
        }
        if self.double:
            found[STEP] = (self._kept_dtype, (rows, 1))
        if not self.symmetric:
            found[ZERO] = ("I32", (words(rows, self.bits), groups))
        found[SHAPE] = ("I64", (2,))
        return found

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of all stored tensors: codes, scales, zeros, what fills up words, and the shape."""
        return sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in self.specs(rows, columns).values())

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits for each weight, everything counted."""
        return 8 * self.nbytes(rows, columns) / (rows * columns)

    def fitting(self, scales: torch.Tensor) -> Grid:
        """This grid, or the same with BF16 scales where F16 would round these scales worse than BF16, to 0 or to
        infinity."""
        if self.scale != "F16" or not scales.numel():
            return self
        stored = scales.float().amax(1) / LARGEST_SCALE_CODE if self.double else scales
        fits = float(stored.min()) >= F16_RANGE[0] and float(stored.max()) <= F16_RANGE[1]
        return self if fits else with_changes(self, scale="BF16")

    def stored_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales nearest to ``scales`` [R, G] that can be stored, as float32. Twice is the same as once.

        With ``double`` a scale below half a step becomes one step, never 0.

        Raises:
            CheckpointError: a scale is not a positive number, or its stored form would not be.
        """
        return self._unstored(*self._stored(scales))

    @property
    def _kept_dtype(self) -> str:
        """Of the scales, or of their steps where the scales are quantized."""
        return "F32" if self.double and self.scale != "F16" else self.scale

    def _stored(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored scales, and their steps [R, 1] where they are quantized themselves."""
        import torch

        scales = scales.to(torch.float32)
        require_scales(scales, "a scale is not a positive number")
        kept = scales.amax(1, keepdim=True) / LARGEST_SCALE_CODE if self.double else scales
        if self._kept_dtype == "F32":  # 16 leading bits, so that a code times a step is exact in float32
            kept = ((kept.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)
        kept = kept.to(torch_dtype(self._kept_dtype))
        require_scales(kept, f"a scale cannot be stored as {self.scale}", "store the scales as BF16")
        if not self.double:
            return kept, None
        codes = (scales / kept.float()).round().clamp(1, LARGEST_SCALE_CODE)
        return codes.to(torch.uint8), kept

    def _unstored(self, kept: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
        return kept.float() if steps is None else kept.float() * steps.float()


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """One quantized matrix [R, C], unpacked.

    Attributes:
        grid: what the codes may be.
        codes: uint8 [R, C].
        scales: float32 [R, G], exactly the values that the stored form decodes to (``Grid.stored_scales``).
        zeros: uint8 [R, G]; None where the grid is symmetric.
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None


def words(count: int, bits: int) -> int:
    """Number of words that hold ``count`` codes."""
    return -(-count * bits // WORD)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, ceil(C * bits / 32)] of uint8 codes [R, C] below 2**bits."""
    import torch

    from moezip import kernels

    return torch.from_numpy(kernels.pack(codes.detach().cpu().contiguous().numpy(), bits)).to(codes.device)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """uint8 codes [R, columns] behind words int32 [R, ceil(columns * bits / 32)].

    Raises:
        CheckpointError: bits behind the last code are set.
    """
    import torch

    from moezip import kernels

    if columns * bits % WORD:
        _require_clear(packed[:, -1], bits, columns, None)
    found = kernels.unpack(packed.detach().cpu().contiguous().numpy(), bits, columns)
    return torch.from_numpy(found).to(packed.device)


def encode(codes: Codes) -> dict[str, torch.Tensor]:
    """The stored tensors, by suffix; their dtypes and shapes are those of ``Grid.specs``.

    Raises:
        CheckpointError: a code or zero beyond the grid, shapes that do not belong together, or scales that the stored
            form would change.
    """
    import torch

    grid, (rows, columns) = codes.grid, codes.codes.shape
    shape = (rows, grid.groups(columns))
    if codes.scales.shape != shape or (codes.zeros is None) != grid.symmetric:
        raise CheckpointError(
            f"codes of shape {[rows, columns]} on the grid {grid} need scales {list(shape)} and "
            f"{'no zeros' if grid.symmetric else 'as many zeros'}; there are scales {list(codes.scales.shape)} and "
            f"{'no' if codes.zeros is None else list(codes.zeros.shape)} zeros"
        )
    for what, values in (("code", codes.codes), ("zero", codes.zeros)):
        if values is not None and values.numel() and int(values.max()) >= grid.levels:
            raise CheckpointError(f"a {what} is {int(values.max())}; the grid {grid} ends at {grid.levels - 1}")
    kept, steps = grid._stored(codes.scales)
    if not torch.equal(grid._unstored(kept, steps), codes.scales):
        raise CheckpointError(
            f"the scales are not those that the grid {grid} stores", next="round them first (Grid.stored_scales)"
        )
    found = {PACKED: pack(codes.codes, grid.bits), SCALE: kept.contiguous()}
    if steps is not None:
        found[STEP] = steps
    if codes.zeros is not None:
        if codes.zeros.shape != shape:
            raise CheckpointError(f"zeros of shape {list(codes.zeros.shape)} do not belong to scales {list(shape)}")
        found[ZERO] = pack(codes.zeros.t().contiguous(), grid.bits).t().contiguous()
    found[SHAPE] = torch.tensor([rows, columns], dtype=torch.int64)
    return found


def decode(tensors: Mapping[str, torch.Tensor], grid: Grid, where: object = None) -> Codes:
    """The codes behind stored tensors.

    Args:
        tensors: by suffix, all that ``grid`` stores and nothing else.
        where: what the tensors are, for messages.

    Raises:
        CheckpointError: as ``check``.
    """
    check(tensors, grid, where)
    return unpacked(tensors, grid)


def check(tensors: Mapping[str, torch.Tensor], grid: Grid, where: object = None) -> None:
    """Finds what is wrong with stored tensors; of the codes only the last word of a row is looked at.

    Args:
        tensors, where: as of ``decode``.

    Raises:
        CheckpointError: a tensor is missing, too many, of another dtype or shape; the stored shape is not theirs; bits
            behind the last code are set; or a scale is not a positive number.
    """
    if SHAPE not in tensors or tensors[SHAPE].shape != (2,):
        raise CheckpointError(f"there is no {SHAPE} of two numbers", where=where, next=_AGAIN)
    rows, columns = (int(size) for size in tensors[SHAPE])
    if min(rows, columns) < 1 or (grid.group and columns % grid.group):
        raise CheckpointError(f"no matrix on the grid {grid} is {rows} x {columns}", where=where, next=_AGAIN)
    wanted = grid.specs(rows, columns)
    if set(wanted) != set(tensors):
        raise CheckpointError(
            f"the grid {grid} is stored as {', '.join(sorted(wanted))}; there is {', '.join(sorted(tensors))}",
            where=where,
            next=_AGAIN,
        )
    for suffix, (dtype, shape) in wanted.items():
        found = tensors[suffix]
        if found.dtype != torch_dtype(dtype) or found.shape != shape:
            raise CheckpointError(
                f"{suffix} is {found.dtype} {list(found.shape)}; {rows} x {columns} weights on the grid {grid} are "
                f"stored as {dtype} {list(shape)}",
                where=where,
                next=_AGAIN,
            )
    for stored in (tensors[SCALE], tensors.get(STEP)):
        if stored is not None:
            require_scales(stored, "a stored scale is not a positive number", _AGAIN, where)
    _require_clear(tensors[PACKED][:, -1], grid.bits, columns, where)
    if not grid.symmetric:
        _require_clear(tensors[ZERO][-1], grid.bits, rows, where)


def unpacked(tensors: Mapping[str, torch.Tensor], grid: Grid) -> Codes:
    """The codes behind stored tensors that ``check`` found right."""
    rows, columns = (int(size) for size in tensors[SHAPE])
    codes = unpack(tensors[PACKED], grid.bits, columns)
    zeros = None if grid.symmetric else unpack(tensors[ZERO].t().contiguous(), grid.bits, rows).t().contiguous()
    return Codes(grid, codes, grid._unstored(tensors[SCALE], tensors.get(STEP)), zeros)


def _require_clear(last: torch.Tensor, bits: int, count: int, where: object) -> None:
    """Raises CheckpointError if the last words int32 of runs of ``count`` codes have bits set behind the last code."""
    used = count * bits % WORD
    if used and bool((last >> used & ((1 << (WORD - used)) - 1)).any()):
        raise CheckpointError(f"bits behind the last of {count} codes are set", where=where, next=_AGAIN)


def dequantize(codes: Codes, dtype: torch.dtype | None = None, order: torch.Tensor | None = None) -> torch.Tensor:
    """The weights [R, C] in ``dtype`` (float32 by default): computed in float32 and rounded once.

    Args:
        order: [C], the group of every column, where groups are not runs of neighbours.
    """
    import torch

    grid, (rows, columns) = codes.grid, codes.codes.shape
    values, scales = codes.codes.to(torch.float32), codes.scales
    zeros = None if codes.zeros is None else codes.zeros.to(torch.float32)
    if order is None:
        values, scales = values.view(rows, scales.shape[1], -1), scales[:, :, None]
        zeros = None if zeros is None else zeros[:, :, None]
    else:
        scales, zeros = scales[:, order], None if zeros is None else zeros[:, order]
    if grid.bits == 1:
        values.mul_(2).sub_(1)
    else:
        values.sub_(grid.levels // 2 if zeros is None else zeros)
    return values.mul_(scales).view(rows, columns).to(torch.float32 if dtype is None else dtype)


def require_scales(scales: torch.Tensor, what: str, next: str | None = None, where: object = None) -> None:
    """Raises CheckpointError unless every scale is a positive, finite number."""
    import torch

    if scales.dtype != torch.uint8:
        good = torch.isfinite(scales) & (scales > 0)
    else:
        good = scales > 0
    if not bool(good.all()):
        worst = float(scales[~good].flatten()[0])
        raise CheckpointError(f"{what}: {worst:g}", where=where, next=next)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype behind a safetensors name."""
    import torch

    return getattr(torch, TORCH_DTYPES[name])

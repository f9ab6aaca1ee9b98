"""Checkpoints in the layout of AutoGPTQ and GPTQModel: codes packed along the input axis, a zero for every group.

A matrix of C inputs and R outputs with G groups is stored transposed:

===========  =====  ====================  ==========================================================================
``qweight``  I32    [C * bits / 32, R]    the codes of an output channel, one behind the other, lowest bit first
``qzeros``   I32    [G, R * bits / 32]    the zeros of a group, packed likewise
``scales``   F16    [G, R]                or BF16, F32
``g_idx``    I32    [C]                   the group of every input; left out by some writers where groups are neighbours
===========  =====  ====================  ==========================================================================

The weight is ``scale * (code - zero)``. In ``checkpoint_format: gptq``, the older and common one, the words of
``qzeros`` are less by a word of ones than in ``gptq_v2``: every zero is stored less one, and a zero of 0 borrows from
its neighbour, which adding the ones to whole words undoes (so does GPTQModel). Source: GPTQModel, AutoGPTQ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError
from moezip.formats.packed import SCALE_DTYPES, WORD, Codes, pack, require_scales, torch_dtype, unpack
from moezip.formats.stored import CHUNK, Stored, fault, plain_dtype

if TYPE_CHECKING:
    import torch

METHOD = "gptq"
QWEIGHT, QZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
LESS_ONE, AS_IS = "gptq", "gptq_v2"
# Widths whose codes never straddle words. With three bits, writers disagree about where the ones are subtracted.
READ, WRITTEN = (2, 4, 8), (4, 8)
DROP, ALTER = "-:", "+:"


def encode(codes: Codes, *, less_one: bool = True) -> dict[str, torch.Tensor]:
    """The stored tensors of a matrix, by suffix.

    Args:
        less_one: write zeros as ``checkpoint_format: gptq`` has them, else as ``gptq_v2``.

    Raises:
        CheckpointError: a grid that has no such form, sizes that do not fill whole words, or a zero of 0 stored less
            one, which readers disagree about.
    """
    import torch

    grid, (rows, columns) = codes.grid, codes.codes.shape
    if grid.bits not in WRITTEN or grid.double:
        raise CheckpointError(
            f"the grid {grid} has no GPTQ form", next=f"use {' or '.join(map(str, WRITTEN))} bits with plain scales"
        )
    per_word = WORD // grid.bits
    if rows % per_word or columns % per_word:
        raise CheckpointError(f"{rows} x {columns} codes of {grid.bits} bits do not fill whole words both ways")
    zeros = torch.full_like(codes.scales, grid.levels // 2, dtype=torch.uint8) if codes.zeros is None else codes.zeros
    packed = pack(zeros.t().contiguous(), grid.bits)
    if less_one:
        if bool((zeros == 0).any()):
            raise CheckpointError("a zero of 0 cannot be stored less one", next=f"write {AS_IS}, or a symmetric grid")
        packed = packed - _ones(grid.bits)
    groups = grid.groups(columns)
    return {
        QWEIGHT: pack(codes.codes, grid.bits).t().contiguous(),
        QZEROS: packed,
        SCALES: codes.scales.to(torch_dtype(grid.scale)).t().contiguous(),
        ORDER: (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }


def decode(
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    *,
    less_one: bool = True,
    dtype: torch.dtype | None = None,
    where: object = None,
) -> torch.Tensor:
    """The weights [R, C] behind stored tensors, in ``dtype`` (float32 by default): computed in float32, rounded once.

    Args:
        tensors: by suffix; ``g_idx`` may be missing where groups are runs of neighbours.
        where: what the tensors are, for messages.

    Raises:
        CheckpointError: a scale that is no positive number, or a group that is not there.
    """
    import torch

    qweight, qzeros, scales = tensors[QWEIGHT], tensors[QZEROS], tensors[SCALES]
    columns, (groups, rows) = qweight.shape[0] * WORD // bits, scales.shape
    again = "download the checkpoint again"
    require_scales(scales, "a stored scale is not a positive number", again, where)
    order = tensors[ORDER].long() if ORDER in tensors else torch.arange(columns) // -(-columns // groups)
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(
            f"{ORDER} names the groups {int(order.min())} to {int(order.max())}; there are {groups}",
            where=where,
            next=again,
        )
    zeros = unpack(qzeros + _ones(bits) if less_one else qzeros, bits, rows).t()
    values = unpack(qweight.t().contiguous(), bits, columns).to(torch.float32)
    values.sub_(zeros.to(torch.float32)[:, order]).mul_(scales.t().to(torch.float32)[:, order])
    return values.to(torch.float32 if dtype is None else dtype)


def _ones(bits: int) -> int:
    """A word that is full of ones, as codes of ``bits`` bits."""
    return sum(1 << place for place in range(0, WORD, bits))


# -- as a source --------------------------------------------------------------------------------------------


def stored(source: Source) -> Iterator[Stored]:
    """The matrices that a checkpoint stores so.

    Raises:
        ArchitectureError: something that moezip does not read, or a config that the tensors do not bear out.
    """
    config, names = source.config["quantization_config"], set(source.names())
    kind = config.get("checkpoint_format") or config.get("format") or LESS_ONE
    if kind not in (LESS_ONE, AS_IS):
        raise fault(source, f"quantization_config has the checkpoint_format {kind!r}; moezip reads {LESS_ONE}, {AS_IS}")
    if config.get("pack_dtype", "int32") != "int32":
        raise fault(source, f"codes are packed in {config['pack_dtype']!r}; moezip reads int32")
    for name in source.names():
        stem, dot, suffix = name.rpartition(".")
        if suffix in (QWEIGHT, QZEROS, SCALES):
            missing = {QWEIGHT, QZEROS, SCALES} - {
                other for other in (QWEIGHT, QZEROS, SCALES) if stem + dot + other in names
            }
            if missing:
                raise fault(source, f"{name} is stored without {', '.join(sorted(missing))}")
        if suffix == QWEIGHT:
            yield _matrix(source, stem + dot, *_settings(source, config, stem), kind == LESS_ONE, names)


def _settings(source: Source, config: Mapping[str, Any], module: str) -> tuple[int, int]:
    """Bits and group size (0: all of a channel) of one module: the first of ``dynamic`` that matches, else the rest."""
    settings = dict(config)
    for pattern, own in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix(DROP).removeprefix(ALTER), module):
            if pattern.startswith(DROP):
                raise fault(source, f"{module}.{QWEIGHT} is there, but by quantization_config it is not quantized")
            settings |= own
            break
    bits, size = settings.get("bits"), settings.get("group_size", -1)
    if bits not in READ or type(bits) is not int:
        raise fault(source, f"{module} has {bits!r} bits; moezip reads GPTQ of {', '.join(map(str, READ))} bits")
    if type(size) is not int or (size < 1 and size != -1):
        raise fault(source, f"{module} has the group_size {size!r}")
    return bits, max(size, 0)


def _matrix(source: Source, stem: str, bits: int, group: int, less_one: bool, names: set[str]) -> Stored:
    specs = {
        suffix: source.spec(stem + suffix) for suffix in (QWEIGHT, QZEROS, SCALES, ORDER) if stem + suffix in names
    }
    codes, scales = specs[QWEIGHT], specs[SCALES]
    rows, columns = codes.shape[-1], codes.shape[0] * WORD // bits
    groups = -(-columns // group) if group else 1
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        QWEIGHT: (("I32",), (columns * bits // WORD, rows)),
        QZEROS: (("I32",), (groups, rows * bits // WORD)),
        SCALES: (SCALE_DTYPES, (groups, rows)),
        ORDER: (("I32",), (columns,)),
    }
    for suffix, spec in specs.items():
        dtypes, shape = wanted[suffix]
        if spec.dtype not in dtypes or spec.shape != shape:
            raise fault(
                source,
                f"{spec.name} is {spec.dtype} {list(spec.shape)}; {bits} bits in groups of {group or columns} and "
                f"{QWEIGHT} {list(codes.shape)} imply {' or '.join(dtypes)} {list(shape)}",
            )
    plain = TensorSpec(f"{stem}weight", plain_dtype(source.config, scales.dtype), (rows, columns), codes.file)
    read = partial(_rows, stem=stem, suffixes=tuple(specs), bits=bits, less_one=less_one, plain=plain)
    return Stored(plain, tuple(specs.values()), read)


def _rows(
    source: Source, rows: range, *, stem: str, suffixes: tuple[str, ...], bits: int, less_one: bool, plain: TensorSpec
) -> Iterator[tuple[int, torch.Tensor]]:
    """The outputs are the last axis here, so the words of the whole matrix are read, and some of them decoded."""
    if not rows:
        return
    height, columns = plain.shape
    whole = {suffix: source.read(stem + suffix) for suffix in suffixes}
    step = max(1, CHUNK // (4 * columns * WORD)) * WORD
    for start in range(rows.start - rows.start % WORD, rows.stop, step):
        stop = min(start + step, rows.stop + -rows.stop % WORD, height)
        part = dict(whole)
        part[QWEIGHT], part[SCALES] = whole[QWEIGHT][:, start:stop], whole[SCALES][:, start:stop]
        part[QZEROS] = whole[QZEROS][:, start * bits // WORD : stop * bits // WORD]
        values = decode(part, bits, less_one=less_one, dtype=torch_dtype(plain.dtype), where=stem + QWEIGHT)
        first, last = max(start, rows.start), min(stop, rows.stop)
        yield first, values[first - start : last - start]

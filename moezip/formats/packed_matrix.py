"""One packed matrix of a checkpoint, read as plain numbers, only the rows that are asked for."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import partial
from typing import TYPE_CHECKING

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError
from moezip.formats.packed import (
    PACKED,
    SCALE,
    SHAPE,
    STEP,
    WORD,
    ZERO,
    Grid,
    decode,
    dequantize,
    torch_dtype,
    words,
)
from moezip.formats.stored import CHUNK, Stored, fault, plain_dtype

if TYPE_CHECKING:
    import torch

# The group of every column, I32 [C], where groups are not runs of neighbours. Others write it, moezip does not.
ORDER = "weight_g_idx"


def matrix(source: Source, stem: str, grid: Grid, names: Container[str]) -> Stored:
    """One packed matrix of a checkpoint; plain, it is ``stem`` + ``weight``, of the model's dtype.

    Args:
        stem: what comes before the suffix in the names of its tensors.
        grid: what the checkpoint's config says of it.
        names: all names of the checkpoint.

    Raises:
        ArchitectureError: a tensor is missing, too many, or of another dtype or shape than the grid implies.
    """
    found = {
        suffix: source.spec(stem + suffix) for suffix in (PACKED, SCALE, STEP, ZERO, SHAPE) if stem + suffix in names
    }
    packed, scale = found.get(PACKED), found.get(SCALE)
    shape = found.get(SHAPE)
    if packed is None or scale is None or shape is None or shape.shape != (2,):
        raise fault(source, f"{stem}{PACKED} is stored without {SCALE}, or without a {SHAPE} of two numbers")
    if len(packed.shape) != 2 or len(scale.shape) != 2:
        raise fault(source, f"{stem}{PACKED} {packed.shape} and {SCALE} {scale.shape} are no matrices")
    if grid.group:
        rows, columns = packed.shape[0], scale.shape[1] * grid.group
    else:  # the width of the words says the number of columns only roughly
        rows, columns = (int(size) for size in source.read(stem + SHAPE))
    wanted = grid.specs(rows, max(columns, 0))
    if wanted != {suffix: (spec.dtype, spec.shape) for suffix, spec in found.items()}:
        listed = ", ".join(f"{suffix} {spec.dtype} {list(spec.shape)}" for suffix, spec in found.items())
        raise fault(source, f"{stem}{PACKED} should be on the grid {grid} by the config, but its tensors are {listed}")
    pieces = list(found.values())
    if stem + ORDER in names:
        order = source.spec(stem + ORDER)
        if order.dtype != "I32" or order.shape != (columns,):
            raise fault(source, f"{order.name} is {order.dtype} {list(order.shape)}, not I32 {[columns]}")
        pieces.append(order)
    plain = TensorSpec(f"{stem}weight", plain_dtype(source.config, grid.scale), (rows, columns), packed.file)
    ordered = stem + ORDER in names
    read = partial(_rows, stem=stem, grid=grid, plain=plain, ordered=ordered)
    return Stored(plain, tuple(pieces), read, None if ordered else grid)


def _rows(
    source: Source, rows: range, *, stem: str, grid: Grid, plain: TensorSpec, ordered: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    import torch

    height, columns = plain.shape
    if source.read(stem + SHAPE).tolist() != [height, columns]:
        raise CheckpointError(
            f"{stem}{SHAPE} is {source.read(stem + SHAPE).tolist()}; codes and scales are of {[height, columns]}",
            where=source.folder,
            next="download the checkpoint again",
        )
    order = _order(source, stem, grid.groups(columns)) if ordered else None
    # Zeros are packed along the rows, and 32 of them fill whole words whatever their width.
    step = max(1, CHUNK // (4 * columns * WORD)) * WORD
    for start in range(rows.start - rows.start % WORD, rows.stop, step):
        stop = min(start + step, rows.stop + -rows.stop % WORD, height)
        parts = {suffix: range(start, stop) for suffix in grid.specs(stop - start, columns) if suffix != SHAPE}
        if ZERO in parts:
            parts[ZERO] = range(start * grid.bits // WORD, words(stop, grid.bits))
        tensors = {suffix: source.read(stem + suffix, part) for suffix, part in parts.items()}
        tensors[SHAPE] = torch.tensor([stop - start, columns])
        values = dequantize(decode(tensors, grid, stem + PACKED), torch_dtype(plain.dtype), order)
        first, last = max(start, rows.start), min(stop, rows.stop)
        yield first, values[first - start : last - start]


def _order(source: Source, stem: str, groups: int) -> torch.Tensor | None:
    """The group of every column; None where they are runs of neighbours after all, which -1 stands for."""
    order = source.read(stem + ORDER).long()
    if bool((order == -1).all()):
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(
            f"{stem}{ORDER} names the groups {int(order.min())} to {int(order.max())}; there are {groups}",
            where=source.folder,
            next="download the checkpoint again",
        )
    return order

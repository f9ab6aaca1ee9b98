"""DeepSeek's stored fp8: e4m3 codes and one factor per block of (by default) 128 x 128.

``weight[i, j] = codes[i, j] * scale_inv[i // bh, j // bw]``: despite its name ``weight_scale_inv`` is multiplied (it
is the inverse of what the weight was multiplied with before rounding). Source: DeepSeek-V3 technical report, section
3.3.2, and the released checkpoints. Blocks at the lower and right edge may be partial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError
from moezip.formats.stored import CHUNK, Stored, fault

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]
BLOCK: Block = (128, 128)
SUFFIX = "_scale_inv"
LARGEST = 448.0  # of float8_e4m3fn


def block_size(config: Mapping[str, Any]) -> Block:
    """(bh, bw) from ``quantization_config.weight_block_size``; 128 x 128 where it is not given.

    Raises:
        CheckpointError: it is not a pair of positive whole numbers.
    """
    given = _settings(config).get("weight_block_size")
    if given is None:
        return BLOCK
    if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int and n > 0 for n in given):
        raise CheckpointError(
            f"quantization_config.weight_block_size is {given!r}, not a pair of positive whole numbers",
            where="config.json",
            next="use the config.json that came with the weights",
        )
    return given[0], given[1]


def powers_of_two(config: Mapping[str, Any]) -> bool:
    """Whether the factors are to be powers of two, as some engines' kernels take them to be (``scale_fmt``)."""
    return _settings(config).get("scale_fmt") == "ue8m0"


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``quantization_config``; the source's own where moezip's format keeps that under ``stored``."""
    given = config.get("quantization_config") or {}
    return given.get("stored") or given


def scale_shape(rows: int, columns: int, block: Block = BLOCK) -> tuple[int, int]:
    """Shape of the factors of a [rows, columns] matrix."""
    return -(-rows // block[0]), -(-columns // block[1])


def decode(
    codes: torch.Tensor,
    scale_inv: torch.Tensor,
    block: Block = BLOCK,
    *,
    first_row: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The weights behind ``codes``.

    Args:
        codes: float8_e4m3fn [..., rows, columns]: a whole matrix, or some of its rows.
        scale_inv: [..., ceil(all rows / bh), ceil(columns / bw)], all of it even where ``codes`` is a part.
        block: (bh, bw).
        first_row: which row of the matrix ``codes`` begins with.
        dtype: of the result; bfloat16 by default. The product is taken in float32 and rounded once.

    Raises:
        CheckpointError: the factors do not cover the codes.
    """
    import torch

    rows, columns = codes.shape[-2:]
    needed = scale_shape(first_row + rows, columns, block)
    if scale_inv.shape[:-2] != codes.shape[:-2] or scale_inv.shape[-2] < needed[0] or scale_inv.shape[-1] != needed[1]:
        raise CheckpointError(
            f"block factors of shape {list(scale_inv.shape)} do not fit codes of shape {list(codes.shape)} "
            f"from row {first_row} in blocks of {block[0]} x {block[1]}",
            next="check quantization_config.weight_block_size in config.json",
        )
    row_blocks = torch.arange(first_row, first_row + rows, device=codes.device) // block[0]
    factors = scale_inv.to(torch.float32).index_select(-2, row_blocks)  # [..., rows, blocks of columns]
    weight = codes.to(torch.float32)
    whole = columns // block[1]
    # Multiplied in place, a block of columns at a time: the factors are never spread out to the weight's size.
    weight[..., : whole * block[1]].unflatten(-1, (whole, block[1])).mul_(factors[..., :whole, None])
    if whole < needed[1]:
        weight[..., whole * block[1] :].mul_(factors[..., whole:])
    return weight.to(torch.bfloat16 if dtype is None else dtype)


def encode(
    weight: torch.Tensor, block: Block = BLOCK, *, powers_of_two: bool = False, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn [..., rows, columns] and factors [..., row blocks, column blocks] of a weight.

    Each factor maps its block's largest magnitude to 448; the factor of an all-zero block is 1.

    Args:
        powers_of_two: the next higher power of two instead, which maps it to at most 448.
        dtype: of the factors, float32 by default; codes are of the rounded factor.
    """
    import torch

    rows, columns = weight.shape[-2:]
    blocks = scale_shape(rows, columns, block)
    padding = (0, blocks[1] * block[1] - columns, 0, blocks[0] * block[0] - rows)
    padded = torch.nn.functional.pad(weight.to(torch.float32), padding)
    tiles = padded.unflatten(-2, (blocks[0], block[0])).unflatten(-1, (blocks[1], block[1]))
    largest = tiles.abs().amax((-3, -1))
    scale_inv = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    if powers_of_two:  # frexp gives a mantissa in [0.5, 1), which is 0.5 of a power of two itself
        mantissa, exponent = torch.frexp(scale_inv)
        scale_inv = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    scale_inv = scale_inv.to(dtype or torch.float32)
    scaled = (tiles / scale_inv.to(torch.float32)[..., :, None, :, None]).clamp(-LARGEST, LARGEST)
    codes = scaled.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()
    return codes.to(torch.float8_e4m3fn), scale_inv


def origins_of(entries: Sequence[int], size: int) -> list[list[int]]:
    """Per block of ``size`` entries, the source block of each."""
    return [[entry // size for entry in entries[i : i + size]] for i in range(0, len(entries), size)]


def take(
    codes: torch.Tensor,
    scale_inv: torch.Tensor,
    entries: Sequence[int],
    axis: int,
    block: Block = BLOCK,
    *,
    powers_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and factors of some rows (``axis`` 0) or columns (1) of a stored matrix.

    A block of the result whose entries all come from one block of the source has that block's factor and codes, bit
    for bit. A block of mixed origin is decoded, and rounded anew with a factor of its own.

    Args:
        codes: float8_e4m3fn [rows, columns]. scale_inv: its factors.
        entries: at least one, in the order wanted.
        powers_of_two: see ``encode``.
    """
    import torch

    wanted = torch.tensor(entries)
    origins = origins_of(entries, block[axis])
    pure = [len(set(origin)) == 1 for origin in origins]
    copied = codes.view(torch.uint8).index_select(axis, wanted)  # no index_select of float8 is needed
    factors = scale_inv.index_select(axis, torch.tensor([origin[0] for origin in origins]))
    if all(pure):
        return copied.view(torch.float8_e4m3fn), factors
    weight = decode(codes, scale_inv, block, dtype=torch.float32).index_select(axis, wanted)
    rounded, fresh = encode(weight, block, powers_of_two=powers_of_two, dtype=scale_inv.dtype)
    found = rounded.view(torch.uint8)
    for number, same in enumerate(pure):
        if same:
            start, length = number * block[axis], len(origins[number])
            found.narrow(axis, start, length).copy_(copied.narrow(axis, start, length))
            fresh.select(axis, number).copy_(factors.select(axis, number))
    return rounded, fresh


def stored(source: Source) -> Iterator[Stored]:
    """The matrices that a checkpoint stores so: ``X.weight`` with ``X.weight_scale_inv``; plain, they are BF16.

    Raises:
        ArchitectureError: factors that are missing or do not fit.
    """
    block, names = block_size(source.config), set(source.names())
    for name in source.names():
        spec = source.spec(name)
        if name + SUFFIX in names:
            scales = source.spec(name + SUFFIX)
            if len(spec.shape) != 2 or scales.shape != scale_shape(*spec.shape, block):
                raise fault(source, f"{name} {spec.shape} and its scales {scales.shape} do not fit blocks of {block}")
            plain = TensorSpec(name, "BF16", spec.shape, spec.file)
            yield Stored(plain, (spec, scales), partial(_rows, name=name, columns=spec.shape[1], block=block))
        elif spec.dtype.startswith("F8_E4M3"):
            raise fault(source, f"{name} is stored in fp8 without {name + SUFFIX}")


def _rows(source: Source, rows: range, *, name: str, columns: int, block: Block) -> Iterator[tuple[int, torch.Tensor]]:
    height = block[0]
    step = max(1, CHUNK // (4 * columns * height)) * height
    # Pieces begin where blocks begin, so that each is decoded with whole rows of scales.
    for start in range(rows.start - rows.start % height, rows.stop, step):
        stop = min(start + step, rows.stop)
        codes = source.read(name, range(start, stop))
        scales = source.read(name + SUFFIX, range(start // height, -(-stop // height)))
        skip = max(0, rows.start - start)
        yield start + skip, decode(codes, scales, block)[skip:]

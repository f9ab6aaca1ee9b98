"""gpt-oss's stored mxfp4: 32 four-bit floats share one power of two.

``weight = e2m1(code) * 2 ** (scale - 127)``; two codes per byte, the earlier value in the low four bits. A scale of
255 stands for NaN. Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError
from moezip.formats.stored import Stored, fault

if TYPE_CHECKING:
    import torch

GROUP = 32  # values per scale
BIAS = 127
BLOCKS, SCALES = "_blocks", "_scales"
# Values of the codes 0 to 7 (sign 0, two exponent bits, one mantissa bit); 8 to 15 are their negatives.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode(blocks: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weights [..., rows, groups * 32] behind the codes, exact in bfloat16 (the default ``dtype``).

    Args:
        blocks: uint8 [..., rows, groups, 16]; any part along the leading axes may be decoded by itself.
        scales: uint8 [..., rows, groups].

    Raises:
        CheckpointError: shapes or dtypes that do not belong together.
    """
    import torch

    if (
        blocks.dtype != torch.uint8
        or scales.dtype != torch.uint8
        or blocks.shape[:-1] != scales.shape
        or blocks.shape[-1] * 2 != GROUP
    ):
        raise CheckpointError(
            f"mxfp4 blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} do not "
            f"belong together: expected uint8 [..., groups, {GROUP // 2}] and uint8 [..., groups]"
        )
    dtype = torch.bfloat16 if dtype is None else dtype
    values = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), dtype=dtype, device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=1)  # [256, 2]: both values of every byte
    decoded = torch.nn.functional.embedding(blocks.to(torch.int32), pairs)  # [..., groups, 16, 2]
    factors = scales.view(torch.float8_e8m0fnu).to(dtype)
    decoded = decoded.flatten(-2).mul_(factors[..., None])
    return decoded.flatten(-2)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks uint8 [..., rows, groups, 16] and scales uint8 [..., rows, groups] of a weight [..., rows, columns].

    The scale is the smallest power of two at which no value of its group exceeds the largest code (6); values round
    to the nearest code, ties to the even one.

    Raises:
        CheckpointError: the columns are not a multiple of 32.
    """
    import torch

    if weight.shape[-1] % GROUP:
        raise CheckpointError(f"mxfp4 groups {GROUP} values, which does not divide {weight.shape[-1]} columns")
    grouped = weight.to(torch.float32).unflatten(-1, (-1, GROUP))
    # frexp: largest / 6 = mantissa * 2 ** exponent with mantissa in [0.5, 1); a mantissa of 0.5 is a power of two.
    mantissa, exponent = torch.frexp(grouped.abs().amax(-1) / MAGNITUDES[-1])
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-BIAS, BIAS)
    magnitude = torch.ldexp(grouped.abs(), -exponent[..., None])
    table = torch.tensor(MAGNITUDES, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    code = torch.bucketize(magnitude, middles)  # a value on a middle gets the lower code
    tie = magnitude == middles[code.clamp(max=len(middles) - 1)]
    code = code + (tie & (code % 2 == 1)) + 8 * torch.signbit(grouped)
    code = code.to(torch.uint8)
    return code[..., 0::2] | (code[..., 1::2] << 4), (exponent + BIAS).to(torch.uint8)


def stored(source: Source) -> Iterator[Stored]:
    """The tensors that a checkpoint stores so, all experts of a layer in one: ``N_blocks`` [E, out, in / 32, 16] and
    ``N_scales`` [E, out, in / 32] are N in its plain form [E, in, out], BF16.

    Raises:
        ArchitectureError: a piece that is missing or does not fit.
    """
    names = set(source.names())
    for name in source.names():
        for suffix, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            if name.endswith(suffix) and name.removesuffix(suffix) + other not in names:
                raise fault(source, f"{name} is stored without {name.removesuffix(suffix) + other}")
        if name.endswith(BLOCKS):
            plain = name.removesuffix(BLOCKS)
            codes, scales = source.spec(name), source.spec(plain + SCALES)
            if len(codes.shape) != 4 or codes.shape[3] != GROUP // 2 or scales.shape != codes.shape[:3]:
                raise fault(source, f"{name} {codes.shape} and its scales {scales.shape} do not fit together")
            experts, out, groups, _ = codes.shape
            spec = TensorSpec(plain, "BF16", (experts, GROUP * groups, out), codes.file)
            yield Stored(spec, (codes, scales), partial(_experts, plain=plain))


def _experts(source: Source, experts: range, *, plain: str) -> Iterator[tuple[int, torch.Tensor]]:
    for expert in experts:
        one = range(expert, expert + 1)
        blocks, scales = source.read(plain + BLOCKS, one), source.read(plain + SCALES, one)
        yield expert, decode(blocks, scales).transpose(1, 2)

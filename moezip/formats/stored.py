"""What every stored quantization tells of a tensor: its plain form, its pieces, and how to decode some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    import torch

    from moezip.formats.packed import Grid

CHUNK = 16 << 20  # bytes of decoded float32 held at a time
PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One tensor that is stored as codes.

    Attributes:
        plain: what it looks like decoded.
        pieces: the stored tensors, all of one file or not; the plain one stands in the place of the first.
        decode: ``decode(source, rows)`` yields (first row, decoded rows) until ``rows`` of the plain tensor are done,
            in pieces of about ``CHUNK`` bytes.
        grid: of the codes, where the pieces are those of ``moezip.formats.packed`` and no others.
    """

    plain: TensorSpec
    pieces: tuple[TensorSpec, ...]
    decode: Callable[[Source, range], Iterator[tuple[int, torch.Tensor]]]
    grid: Grid | None = None


def fault(source: Source, what: str) -> ArchitectureError:
    """The error of a quantization that cannot be read."""
    return ArchitectureError(
        what,
        where=source.folder / "config.json",
        next="moezip reads plain weights, fp8 blocks (DeepSeek), mxfp4 (gpt-oss), pack-quantized (compressed-tensors) "
        "and GPTQ; start from the unquantized checkpoint",
    )


def plain_dtype(config: Mapping[str, Any], other: str) -> str:
    """What codes decode to: the model's own dtype by its safetensors name; ``other`` where the config names none."""
    given = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return PLAIN.get(given, other)

"""What every stored quantization tells of a tensor: its plain form, its pieces, and how to decode some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes of decoded float32 held at a time


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One tensor that is stored as codes.

    Attributes:
        plain: what it looks like decoded.
        pieces: the stored tensors, all of one file or not; the plain one stands in the place of the first.
        decode: ``decode(source, rows)`` yields (first row, decoded rows) until ``rows`` of the plain tensor are done,
            in pieces of about ``CHUNK`` bytes.
    """

    plain: TensorSpec
    pieces: tuple[TensorSpec, ...]
    decode: Callable[[Source, range], Iterator[tuple[int, torch.Tensor]]]


def fault(source: Source, what: str) -> ArchitectureError:
    """The error of a quantization that cannot be read."""
    return ArchitectureError(
        what,
        where=source.folder / "config.json",
        next="moezip reads plain weights, fp8 blocks (DeepSeek) and mxfp4 (gpt-oss); start from the unquantized "
        "checkpoint",
    )

"""What every reader of weights looks like, whether it reads a disk or a disk through a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# Bits per element of every dtype that the safetensors format names.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the headers describe it; nothing is read to make one.

    Attributes:
        name: its key in the file.
        dtype: the safetensors name (``BF16``, ``F8_E4M3``, ...).
        shape: sizes, outermost first.
        file: the shard that holds it, a bare file name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype] // 8


class Source(Protocol):
    """Tensors by name, from a disk (``Checkpoint``) or from a disk through a view (``Applied``, ``Decoded``).

    Everything downstream (calibration, evaluation, writing) takes a Source and cannot tell which it got.
    """

    @property
    def folder(self) -> Path:
        """Where the side files (tokenizer, licence, ...) are."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json`` as this source would write it."""

    @property
    def fingerprint(self) -> str:
        """Hex digest that tells this checkpoint from another."""

    def names(self) -> list[str]:
        """All tensor names, shard by shard and in the order of their bytes inside a shard."""

    def metadata(self, file: str) -> dict[str, str]:
        """The ``__metadata__`` of one shard's header."""

    def raw_header(self, file: str) -> bytes | None:
        """The shard's header exactly as stored (length prefix included) if every tensor of the shard still has its
        name, dtype, shape and place, else None. This is what lets an identity plan give back the same bytes."""

    def spec(self, name: str) -> TensorSpec:
        """Dtype, shape and shard of one tensor. Raises CheckpointError if there is no such tensor."""

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """The tensor, or rows ``rows`` (step 1) of its first axis, in its stored dtype, in fresh memory."""

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        """The bytes of the tensor, or of some rows of it, in order, in pieces of at most 32 MiB."""

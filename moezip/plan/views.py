"""What one output tensor is made of: a source tensor, whole, in part, or one expert's share of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.arch.spec import ExpertRole, ExpertTensor
from moezip.checkpoint.source import Source
from moezip.formats import fp8_block

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class View:
    """A source tensor, whole, or some entries of one of its axes in a given order.

    ``slices`` is for a fused tensor of which every expert keeps other neurons: per kept expert, its entries of
    ``axis``, one of the axes behind the experts'.
    """

    origin: str
    entries: tuple[int, ...] | None = None
    axis: int = 0
    slices: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """One role of one expert of a fused tensor, canonical: [out, in], or [out] of a bias.

    Attributes:
        origin: the fused tensor. tensor: its entry in the table.
        expert: of the source. role: what is taken of it (``gate`` of a ``gate_up``, ...).
        neurons: that the expert keeps, None for all. width: F, how many it has.
    """

    origin: str
    tensor: ExpertTensor
    expert: int
    role: ExpertRole
    neurons: tuple[int, ...] | None
    width: int

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, from that of the fused tensor."""
        shape = stored[1:][::-1] if self.tensor.transposed else stored[1:]
        kept = self.width if self.neurons is None else len(self.neurons)
        if self.role == "down_bias":
            return shape
        return (*shape[:-1], kept) if self.role == "down" else (kept, *shape[1:])

    def read(self, source: Source) -> torch.Tensor:
        import torch

        value = source.read(self.origin, range(self.expert, self.expert + 1))[0]
        if self.tensor.transposed:
            value = value.T
        if self.role == "down_bias" or (self.role == "down" and self.neurons is None):
            return value.contiguous()
        neurons = torch.arange(self.width) if self.neurons is None else torch.tensor(self.neurons)
        if self.role == "down":
            return value.index_select(1, neurons)
        second = self.role.startswith("up")  # else the gate, first of the two
        return value.index_select(0, 2 * neurons + second if self.tensor.interleaved else neurons + second * self.width)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some rows or columns of a matrix that is stored in fp8 blocks: its codes, or their factors.

    Attributes:
        origin: the tensor itself, codes or factors. codes: those that it belongs to.
        entries, axis: which of the codes.
        block: (bh, bw). powers_of_two: as ``moezip.formats.fp8_block.encode`` has it.
    """

    origin: str
    codes: str
    entries: tuple[int, ...]
    axis: int
    block: tuple[int, int]
    powers_of_two: bool

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, from that of the source's codes."""
        kept = len(self.entries)
        shape = (kept, stored[1]) if self.axis == 0 else (stored[0], kept)
        return shape if self.origin == self.codes else fp8_block.scale_shape(*shape, self.block)

    def read(self, source: Source) -> torch.Tensor:
        stored = source.read(self.codes), source.read(self.codes + fp8_block.SUFFIX)
        codes, factors = fp8_block.take(
            *stored, self.entries, self.axis, self.block, powers_of_two=self.powers_of_two
        )  # fmt: skip
        return codes if self.origin == self.codes else factors


def split_roles(tensor: ExpertTensor) -> tuple[ExpertRole, ...]:
    """What a fused tensor holds of every expert."""
    if tensor.role == "gate_up":
        return ("gate", "up")
    if tensor.role == "gate_up_bias":
        return ("gate_bias", "up_bias")
    return (tensor.role,)


def inner_entries(tensor: ExpertTensor, neurons: Sequence[int], width: int) -> tuple[tuple[int, ...], int]:
    """Where neurons sit in one expert's tensor: (entries, axis), of the 2-D matrix or 1-D bias as it is stored.

    Args:
        neurons: ascending, below ``width``, the expert's inner size F.
    """
    if tensor.role in ("gate_up", "gate_up_bias"):
        if tensor.interleaved:
            entries = tuple(place for neuron in neurons for place in (2 * neuron, 2 * neuron + 1))
        else:
            entries = (*neurons, *(width + neuron for neuron in neurons))
    else:
        entries = tuple(neurons)
    if tensor.role == "gate_up_bias":
        return entries, 0
    outputs_first = not tensor.transposed
    inner_is_output = tensor.role != "down"
    return entries, 0 if outputs_first == inner_is_output else 1


def runs(entries: Sequence[int]) -> Iterator[range]:
    """Neighbouring entries as ranges: 0 1 2 5 6 -> 0..3, 5..7."""
    start = 0
    for i in range(1, len(entries) + 1):
        if i == len(entries) or entries[i] != entries[i - 1] + 1:
            yield range(entries[start], entries[i - 1] + 1)
            start = i

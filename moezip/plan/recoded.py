"""A merged view of a checkpoint in fp8 blocks, in fp8 blocks: what was merged is rounded to codes of its own, all other
codes and scales are the source's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from moezip.arch.spec import Architecture, ExpertTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.formats import fp8_block
from moezip.plan.apply import Applied
from moezip.plan.merged import Merged, expert_value, scale_value
from moezip.plan.plan import Plan
from moezip.plan.views import split_roles

if TYPE_CHECKING:
    import torch


def in_fp8_blocks(source: Source) -> bool:
    """Whether a checkpoint stores matrices in fp8 blocks, and nothing else as codes."""
    return (source.config.get("quantization_config") or {}).get("quant_method") == "fp8"


def coded(
    values: Mapping[str, torch.Tensor], source: Source, architecture: Architecture, layer: int
) -> dict[str, torch.Tensor]:
    """The solved values of a layer as a checkpoint in fp8 blocks holds them: codes, and scales beside them.

    Args:
        values: by ``moezip.plan.merged`` names; router rows stay as they are. source: in fp8 blocks.
    """
    names, block, found = set(source.names()), fp8_block.block_size(source.config), {}
    powers = fp8_block.powers_of_two(source.config)
    scales = {
        role: tensor.template.format(layer=layer, expert=0) + fp8_block.SUFFIX
        for tensor in architecture.experts
        for role in split_roles(tensor)
    }
    for name, value in values.items():
        role = name.rpartition(".")[2]
        if ".experts." not in name or scales.get(role) not in names:  # type: ignore[call-overload]
            found[name] = value
            continue
        dtype = source.read(scales[role], range(0)).dtype  # type: ignore[index]
        codes, scale = fp8_block.encode(value, block, powers_of_two=powers, dtype=dtype)
        found |= {name: codes, scale_value(name): scale}
    return found


@final
class Recoded:
    """``kept`` with the codes of ``merged`` where experts or routers are new; a Source like any other.

    Args:
        kept: the stored checkpoint through the plan, merged experts being their dominant ones.
        merged: the same plan over plain numbers.
    """

    def __init__(self, kept: Applied, merged: Merged):
        self._kept, self._merged = kept, merged
        self._block = fp8_block.block_size(kept.source_config)
        self._powers = fp8_block.powers_of_two(kept.source_config)
        self._names = set(kept.names())
        self._last: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None  # scales are read next to their codes

    @property
    def plan(self) -> Plan:
        return self._kept.plan

    @property
    def architecture(self) -> Architecture:
        """The source's own."""
        return self._kept.architecture

    @property
    def recoded(self) -> int:
        """How many matrices were rounded to fp8 anew."""
        return sum(name + fp8_block.SUFFIX in self._names for name in self._names if self._merged.touches(name))

    def _codes(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a matrix that the plan makes: those that were solved, or of the average."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        claim = self._merged.claim(name)
        assert isinstance(claim.tensor, ExpertTensor) and claim.layer is not None and claim.expert is not None
        value = expert_value(claim.layer, claim.expert, claim.tensor.role)
        found = self._merged.solved_codes(value)
        if found is None:
            scales = self._kept.read(name + fp8_block.SUFFIX, range(0))
            found = fp8_block.encode(
                self._merged.read(name), self._block, powers_of_two=self._powers, dtype=scales.dtype
            )
        self._last = (name, found)
        return found

    # -- Source ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._kept.folder

    @property
    def config(self) -> dict[str, Any]:
        return self._kept.config

    @property
    def source_config(self) -> dict[str, Any]:
        """The config of what the plan is applied to."""
        return self._kept.source_config

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor is the source's."""
        return self._kept.changes_nothing

    @property
    def fingerprint(self) -> str:
        return self._kept.fingerprint

    def names(self) -> list[str]:
        return self._kept.names()

    def spec(self, name: str) -> TensorSpec:
        return self._kept.spec(name)

    def metadata(self, file: str) -> dict[str, str]:
        return self._kept.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        return self._kept.raw_header(file)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        matrix = name.removesuffix(fp8_block.SUFFIX)
        if not self._merged.touches(matrix):
            return self._kept.read(name, rows)
        if matrix + fp8_block.SUFFIX not in self._names:
            return self._merged.read(name, rows)
        value = self._codes(matrix)[name != matrix]
        return value if rows is None else value[rows.start : rows.stop]

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        import torch

        if not self._merged.touches(name.removesuffix(fp8_block.SUFFIX)):
            yield from self._kept.chunks(name, rows)
            return
        yield memoryview(self.read(name, rows).contiguous().view(torch.uint8).numpy().tobytes())

"""A checkpoint some of whose tensors are made of others as they are written: a ``Source`` like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from moezip.arch.families import identify
from moezip.arch.layout import Layout, tripwire_of
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PIECE = 32 << 20  # bytes handed to the disk at a time


@dataclass(frozen=True, slots=True)
class Made:
    """One tensor that the checkpoint itself does not have.

    Attributes:
        spec: what it will be.
        read: ``read(rows)`` gives these rows of its first axis one part after the other, so that no more than a part
            of it is in memory.
    """

    spec: TensorSpec
    read: Callable[[range], Iterator[torch.Tensor]]


@final
class Remade:
    """``base`` with another config and other tensors.

    Args:
        tensors: those of the base by name, and those that are made; in the order in which they are written.
    """

    def __init__(self, base: Source, config: Mapping[str, Any], tensors: list[str | Made]):
        self._base, self._config = base, dict(config)
        self._made = {made.spec.name: made for made in tensors if isinstance(made, Made)}
        self._names = [made.spec.name if isinstance(made, Made) else made for made in tensors]
        self._kept = set(self._names)

    @property
    def base(self) -> Source:
        return self._base

    @property
    def folder(self) -> Path:
        return self._base.folder

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def fingerprint(self) -> str:
        """The base's: statistics taken of one are those of the other."""
        return self._base.fingerprint

    def names(self) -> list[str]:
        return list(self._names)

    def metadata(self, file: str) -> dict[str, str]:
        return self._base.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        return None

    def spec(self, name: str) -> TensorSpec:
        if name not in self._kept:
            raise CheckpointError(f"the export has no tensor {name}", where=self.folder)
        return self._made[name].spec if name in self._made else self._base.spec(name)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        spec = self.spec(name)
        if name not in self._made:
            return self._base.read(name, rows)
        import torch

        return torch.cat(list(self._made[name].read(_rows(spec, rows))))

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        spec = self.spec(name)
        if name not in self._made:
            yield from self._base.chunks(name, rows)
            return
        import torch

        for part in self._made[name].read(_rows(spec, rows)):
            flat = part.contiguous().view(torch.uint8).flatten()
            for start in range(0, flat.numel(), PIECE):
                yield flat[start : start + PIECE].numpy().data


def _rows(spec: TensorSpec, rows: range | None) -> range:
    every = range(spec.shape[0])
    if rows is not None and (rows.step != 1 or not 0 <= rows.start <= rows.stop <= len(every)):
        raise CheckpointError(f"{spec.name} of shape {list(spec.shape)} has no rows {rows}")
    return every if rows is None else rows


def stock_config(source: Source) -> dict[str, Any] | None:
    """The config of ``source`` without its quantization, as stock loaders read it; None where layers or experts differ,
    or routers have more rows than there are experts.

    Raises:
        ArchitectureError: experts of another width than the config's, in a family whose config cannot say so.
    """
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    layout = Layout.of(source.config)
    if layout is None:
        return config
    shapes = set(layout.widths.values())
    if layout.remap or len(shapes) > 1 or len(set(next(iter(shapes)))) > 1:
        return None
    entry, row = identify(config, source.folder), next(iter(shapes))
    fact = entry.layer_facts(config)[0]
    if len(row) != fact.experts:
        config.update(dict.fromkeys(entry.count_keys, len(row)))
    if row[0] != fact.width:
        config.update(entry.with_width(config, row[0]))
    return config


def without_tripwire(source: Source) -> list[str]:
    """Names of the tensors that mean something."""
    trip = tripwire_of(identify(source.config, source.folder), source.config)
    return [name for name in source.names() if name != trip]

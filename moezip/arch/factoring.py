"""Which matrices of a checkpoint are stored as factors, and of what size: a table in ``config.json``.

It looks like that of ``moezip.arch.packing``, with sizes in place of grids::

    "factors": {"model.layers.0.mlp.experts.*.gate_proj.weight": ["rank12+8", null, ...]}

The stored tensors are those of ``moezip.formats.factors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moezip.arch.layout import FIX, own_format
from moezip.arch.packing import folded, stem, unfolded_with
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError
from moezip.formats.factors import INDEX, LEFT, RIGHT, Factors, multiplied, require_sound
from moezip.formats.stored import Stored

if TYPE_CHECKING:
    import torch

KEY = "factors"

Factoring = Mapping[str, Factors]

__all__ = ["KEY", "Factoring", "factoring_of", "folded", "stem", "stored", "table_of"]


def table_of(data: Any) -> dict[str, Factors]:
    """The inverse of ``folded``. Raises ArchitectureError if it is no such table."""
    return unfolded_with(data, Factors.parse, KEY)


def factoring_of(config: Mapping[str, Any]) -> dict[str, Factors]:
    """The factored matrices of a checkpoint of moezip's own format; empty where there are none."""
    if not own_format(config):
        return {}
    return table_of(config["quantization_config"].get(KEY) or {})


def stored(source: Source) -> Iterator[Stored]:
    """The factored matrices of a checkpoint of moezip's own format.

    Raises:
        ArchitectureError: a matrix that the table lists has not the tensors that its size implies.
    """
    names = set(source.names())
    for name, size in factoring_of(source.config).items():
        if missing := {stem(name) + suffix for suffix in (LEFT, RIGHT)} - names:
            raise _corrupt(f"lists {name}, but there is no {min(missing)}")
        left, right = source.spec(stem(name) + LEFT), source.spec(stem(name) + RIGHT)
        if len(left.shape) != 2 or len(right.shape) != 2:
            raise _corrupt(f"lists {name}, but {left.name} {left.shape} and {right.name} {right.shape} are no matrices")
        shape = (left.shape[0], right.shape[1])
        wanted = size.specs(*shape, left.dtype)
        for suffix, (dtype, own) in wanted.items():
            piece = stem(name) + suffix
            if piece not in names or (source.spec(piece).dtype, source.spec(piece).shape) != (dtype, own):
                found = f"{source.spec(piece).dtype} {source.spec(piece).shape}" if piece in names else "missing"
                raise _corrupt(f"says {size} of {name}: {piece} should be {dtype} {own} and is {found}")
        pieces = tuple(source.spec(stem(name) + suffix) for suffix in wanted)
        yield Stored(TensorSpec(name, left.dtype, shape, left.file), pieces, _multiplier(name, tuple(wanted)))


def _multiplier(name: str, suffixes: tuple[str, ...]) -> Any:
    def read(source: Source, rows: range) -> Iterator[tuple[int, torch.Tensor]]:
        tensors = {suffix: source.read(stem(name) + suffix) for suffix in suffixes}
        if INDEX in tensors:
            require_sound(tensors, stem(name) + INDEX)
        # one matrix of one expert is small: no part of it is worth reading alone
        yield rows.start, multiplied(tensors)[rows.start : rows.stop]

    return read


def _corrupt(what: str) -> ArchitectureError:
    return ArchitectureError(f"quantization_config.{KEY} {what}", where="config.json", next=FIX)

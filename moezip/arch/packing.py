"""Which matrices of a checkpoint are stored as packed codes, and on which grids: a table in ``config.json``.

In memory it is a plain mapping from a matrix's name (``...experts.3.gate_proj.weight``) to its grid. As JSON the
experts of a layer stand together, under one name with a ``*`` for the expert's number::

    "packed": {"model.layers.0.mlp.experts.*.gate_proj.weight": ["int2-g32", "int3-g32", null, ...],
               "model.layers.0.self_attn.q_proj.weight": "int4-g32"}

Null stands for an expert that is not packed. The stored tensors are those of
``moezip.formats.packed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from moezip.arch.layout import FIX, own_format
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError, PlanError
from moezip.formats.packed import SHAPE, Grid, decode, dequantize
from moezip.formats.stored import Stored

if TYPE_CHECKING:
    import torch

KEY = "packed"
WEIGHT = "weight"
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")

Packing = Mapping[str, Grid]
T = TypeVar("T")


def stem(name: str) -> str:
    """The name of a matrix without ``weight``, to which suffixes such as ``weight_packed`` are added."""
    assert name.endswith(f".{WEIGHT}")
    return name.removesuffix(WEIGHT)


def folded(packing: Mapping[str, object]) -> dict[str, Any]:
    """The table as JSON; grids, or whatever else is said of matrices, as texts."""
    rows: dict[str, dict[int, str]] = {}
    found: dict[str, Any] = {}
    for name, grid in packing.items():
        number = _EXPERT.search(name)
        if number is None:
            found[name] = str(grid)
        else:
            key = _EXPERT.sub("*", name, count=1)
            found.setdefault(key, None)
            rows.setdefault(key, {})[int(number.group())] = str(grid)
    for key, row in rows.items():
        every = [row.get(expert) for expert in range(max(row) + 1)]
        found[key] = every
    return found


def unfolded(table: Any) -> dict[str, Grid]:
    """The inverse of ``folded``. Raises ArchitectureError if it is no such table."""
    return unfolded_with(table, Grid.parse, KEY)


def unfolded_with(table: Any, parse: Callable[[str], T], where: str) -> dict[str, T]:
    """The inverse of ``folded`` for other values than grids. Raises ArchitectureError if it is no such table.

    Args:
        parse: text to value; PlanError or TypeError for none. where: the table's name.
    """
    if not isinstance(table, Mapping):
        raise _corrupt("is no table of names", where)
    found: dict[str, T] = {}
    for key, value in table.items():
        if not isinstance(key, str) or not key.endswith(f".{WEIGHT}"):
            raise _corrupt(f"has the key {key!r}, which names no matrix", where)
        if "*" not in key:
            found[key] = _value(key, value, parse, where)
        elif isinstance(value, list):
            for expert, each in enumerate(value):
                if each is not None:
                    found[key.replace("*", str(expert))] = _value(key, each, parse, where)
        else:
            raise _corrupt(f"says {value!r} of {key}, where a list over the experts belongs", where)
    return found


def _value(key: str, value: Any, parse: Callable[[str], T], where: str) -> T:
    try:
        return parse(value)
    except (PlanError, TypeError) as fault:
        kind = "grid of codes" if where == KEY else "size"
        raise _corrupt(f"says {value!r} of {key}, which is no {kind}", where) from fault


def packing_of(config: Mapping[str, Any]) -> dict[str, Grid]:
    """The packed matrices of a checkpoint of moezip's own format; empty where there are none."""
    if not own_format(config):
        return {}
    return unfolded(config["quantization_config"].get(KEY) or {})


PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plain_dtype(config: Mapping[str, Any]) -> str:
    """What packed matrices decode to: the model's own dtype, by its safetensors name."""
    given = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if given not in PLAIN:
        raise ArchitectureError(f"packed matrices cannot be decoded to {given}", where="config.json")
    return PLAIN[given]


def stored(source: Source) -> Iterator[Stored]:
    """The packed matrices of a checkpoint of moezip's own format.

    Raises:
        ArchitectureError: a matrix that the table lists has not the tensors that its grid implies.
    """
    dtype = plain_dtype(source.config)
    names = set(source.names())
    for name, grid in packing_of(source.config).items():
        shape = stem(name) + SHAPE
        if shape not in names:
            raise _corrupt(f"lists {name}, but there is no {shape}")
        rows, columns = (int(size) for size in source.read(shape))
        if min(rows, columns) < 1 or (grid.group and columns % grid.group):
            raise _corrupt(f"says {grid} of {name}, and {shape} says {rows} x {columns}, which do not fit together")
        wanted = grid.specs(rows, columns)
        for suffix, (kind, size) in wanted.items():
            piece = stem(name) + suffix
            if piece not in names or (source.spec(piece).dtype, source.spec(piece).shape) != (kind, size):
                found = f"{source.spec(piece).dtype} {source.spec(piece).shape}" if piece in names else "missing"
                raise _corrupt(f"says {grid} of {name}: {piece} should be {kind} {size} and is {found}")
        pieces = tuple(source.spec(stem(name) + suffix) for suffix in wanted)
        plain = TensorSpec(name, dtype, (rows, columns), pieces[0].file)
        yield Stored(plain, pieces, _decoder(name, grid, dtype), grid)


def _decoder(name: str, grid: Grid, dtype: str) -> Any:
    def read(source: Source, rows: range) -> Iterator[tuple[int, torch.Tensor]]:
        import torch

        plain = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        # zeros are packed along the rows, and one matrix of one expert is small: no part of it is worth reading alone
        suffixes = grid.specs(1, grid.group or 1)
        whole = dequantize(decode({s: source.read(stem(name) + s) for s in suffixes}, grid, name), plain)
        yield rows.start, whole[rows.start : rows.stop]

    return read


def _corrupt(what: str, table: str = KEY) -> ArchitectureError:
    return ArchitectureError(f"quantization_config.{table} {what}", where="config.json", next=FIX)

"""Which modules of a checkpoint are packed alike, as the regular expressions by which other formats name them.

Those formats, and the engines that read them, treat all experts of a layer as one: one grid for their three matrices,
one shape, as many in every layer. What differs inside a layer cannot be said in them and is refused here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moezip.arch.spec import Architecture
from moezip.errors import PlanError
from moezip.formats.packed import Grid

WEIGHT = ".weight"
HEAD = "lm_head"
_LAYER = re.compile(r"(?P<stem>.*\blayers\.)(?P<layer>\d+)\.(?P<rest>.+)\Z")
_EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<role>[^.]+)\Z")
_NEXT = "quantize with --granularity layer or model, or write moezip's own format"


@dataclass(frozen=True, slots=True)
class Alike:
    """Modules that are stored alike.

    Attributes:
        grid: their grid, with F16 for the scales' dtype, which other formats do not write down; None: plain.
        experts: they are routed experts; others are never in one group with these, so that readers which look for
            the experts' group find it.
        patterns: regular expressions that match the names of these modules, from the beginning, and of no others.
    """

    grid: Grid | None
    experts: bool
    patterns: tuple[str, ...]


def alike(
    architecture: Architecture, grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Alike, ...]:
    """The modules of a checkpoint by how they are stored: experts first, plain ones last.

    Args:
        grids: by name (``....q_proj.weight``), those of the packed matrices.
        shapes: by name, of all weights in their plain form; only matrices ([out, in]) count. The head is added where
            it has no tensor of its own.

    Raises:
        PlanError: experts that only moezip's own format can hold.
    """
    if any(tensor.fused for tensor in architecture.experts):
        raise PlanError(
            f"{architecture.name} publishes all experts of a layer in one tensor, for which other formats have no "
            "packed form",
            next="write moezip's own format",
        )
    matrices = {
        name.removesuffix(WEIGHT): shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(WEIGHT)
    }
    if unknown := grids.keys() - {module + WEIGHT for module in matrices}:
        raise PlanError(f"{min(unknown)} is to be packed, but the checkpoint has no such matrix")
    _require_equal_experts(matrices)
    stored = {module: _plain_scales(grids.get(module + WEIGHT)) for module in [*matrices, HEAD]}
    layers: defaultdict[tuple[str, bool], dict[int, Grid | None]] = defaultdict(dict)
    groups: defaultdict[tuple[Grid | None, bool], list[str]] = defaultdict(list)
    for module, grid in stored.items():
        place = _LAYER.match(module)
        if place is None:
            groups[grid, False].append(re.escape(module) + "$")
            continue
        expert = _EXPERT.match(place["rest"])
        rest = place["rest"] if expert is None else expert["experts"]
        seen = layers[rest, expert is not None].setdefault(int(place["layer"]), grid)
        if seen != grid:
            raise PlanError(
                f"experts of layer {place['layer']} are stored differently ({seen or 'plain'} and {grid or 'plain'}), "
                "which readers of other formats cannot hold",
                next=_NEXT,
            )
    for (rest, expert_like), row in layers.items():
        for grid in dict.fromkeys(row.values()):
            some = {layer for layer, each in row.items() if each == grid}
            inside = rest if expert_like else _whole_block(rest, some, layers) if grid is None else None
            name = re.escape(rest) + "$" if inside is None else re.escape(inside) + r"\..*"
            pattern = rf".*layers\.{_numbers(some, row)}\.{name}"
            if pattern not in groups[grid, expert_like]:
                groups[grid, expert_like].append(pattern)
    order = sorted(groups, key=lambda key: (key[0] is None, not key[1], str(key[0])))
    return tuple(Alike(grid, expert_like, tuple(groups[grid, expert_like])) for grid, expert_like in order)


def _whole_block(rest: str, some: set[int], layers: Mapping[tuple[str, bool], dict[int, Grid | None]]) -> str | None:
    """The block that ``rest`` lies in if nothing of it is packed in the layers ``some``.

    Engines join its matrices under names that no file has (``self_attn.qkv_proj``); only the block's name finds those.
    """
    block = rest.rpartition(".")[0]
    inside = [row for (other, _), row in layers.items() if block and other.startswith(f"{block}.")]
    plain = all(row.get(layer) is None for row in inside for layer in some)
    return block if inside and plain and all(some <= row.keys() for row in inside) else None


def _plain_scales(grid: Grid | None) -> Grid | None:
    return None if grid is None else replace(grid, scale="F16")


def _numbers(some: Iterable[int], every: Iterable[int]) -> str:
    """A regular expression of some numbers among others."""
    listed = sorted(some)
    if listed == sorted(every):
        return r"\d+"
    return str(listed[0]) if len(listed) == 1 else f"({'|'.join(map(str, listed))})"


def _require_equal_experts(matrices: Mapping[str, tuple[int, ...]]) -> None:
    """Raises PlanError where layers differ in their number of experts, or experts in their shapes."""
    counts: defaultdict[str, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for module, shape in matrices.items():
        place = _LAYER.match(module)
        expert = _EXPERT.match(place["rest"]) if place else None
        if place is None or expert is None:
            continue
        counts[expert["experts"]][int(place["layer"])].add(int(expert["number"]))
        first = shapes.setdefault((expert["experts"], expert["role"]), shape)
        if first != shape:
            raise PlanError(
                f"experts differ in width: {module} is {list(shape)}, others are {list(first)}",
                next="keep as many neurons of every expert (--set uniform=true), or write moezip's own format",
            )
    for by_layer in counts.values():
        sizes = {layer: len(numbers) for layer, numbers in by_layer.items()}
        if len(set(sizes.values())) > 1:
            raise PlanError(
                f"layers differ in their number of experts: {sizes}",
                next="keep the same number in every layer (--scope layer), or write moezip's own format",
            )

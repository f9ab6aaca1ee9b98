"""The matrices of a model that can be packed, and the groups that divide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moezip.arch.families import identify
from moezip.arch.layout import tripwire_of
from moezip.arch.packing import Packing
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.source import Source
from moezip.errors import UsageError
from moezip.pipeline.common import Opened

GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Item:
    """A matrix that can be packed.

    Attributes:
        name: on disk.
        kind: ``gate``, ``up``, ``down`` of an expert, else ``attention``, ``shared``, ``dense`` or ``head``.
        shape: [R, C]. layer, expert: where it is, None where that means nothing.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    layer: int | None = None
    expert: int | None = None


def items_of(source: Source, model: Opened) -> list[Item]:
    """Every matrix that can be packed, in the order of the source: experts', and other linears of decoder layers.

    Args:
        source: plain tensors, one per expert and matrix.
    """
    from torch import nn

    from moezip.arch.skeleton import Skeleton

    entry = identify(source.config, source.folder)
    skeleton = Skeleton(source)
    skeleton.require_complete()
    moe = {fact.layer for fact in model.facts}
    linears: dict[str, tuple[str, int | None]] = {}
    head = skeleton.model.get_output_embeddings()
    for path, module in skeleton.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        fills = skeleton.fills.get(f"{path}.weight", [])
        if len(fills) != 1 or fills[0].tensor is not None:
            continue
        if module is head:
            linears[fills[0].name] = ("head", None)
            continue
        inside = path.removeprefix(f"{entry.layers}.")
        if inside == path or module.out_features == 1:
            continue
        number, _, rest = inside.partition(".")
        layer = int(number)
        if rest.startswith(f"{entry.block}."):
            own = rest.removeprefix(f"{entry.block}.")
            if layer in moe and own.split(".")[0] in (entry.router_module, entry.experts_module):
                continue
            linears[fills[0].name] = ("shared" if layer in moe else "dense", layer)
        else:
            linears[fills[0].name] = ("attention", layer)
    found, trip = [], tripwire_of(entry, source.config)
    for name in source.names():
        if name == trip:
            continue
        claim = entry.claim(name, source.config)
        shape = source.spec(name).shape
        if name in linears:
            kind, at = linears[name]
            found.append(Item(name, kind, (shape[0], shape[1]), at))
        elif claim.kind == "expert" and not claim.suffix and len(shape) == 2:
            assert claim.tensor is not None
            found.append(Item(name, claim.tensor.role, (shape[0], shape[1]), claim.layer, claim.expert))  # type: ignore[union-attr]
    return found


def group_size(facts: Sequence[LayerFacts], asked: int | None) -> int:
    """The largest of 128, 64 and 32 that divides both inner sizes, unless one is asked for.

    Raises:
        UsageError: none does, or the one that is asked for does not.
    """
    sizes = {size for fact in facts for size in (fact.hidden, fact.width)}
    if asked is not None:
        if asked < 0 or (asked and any(size % asked for size in sizes)):
            raise UsageError(
                f"groups of {asked} do not divide the experts' sizes {sorted(sizes)}", where=f"--group-size {asked}",
                next=f"use one of {[g for g in GROUPS if not any(size % g for size in sizes)]}, or 0 for one scale per "
                "output channel",
            )  # fmt: skip
        return asked
    for group in GROUPS:
        if not any(size % group for size in sizes):
            return group
    raise UsageError(
        f"no group of {', '.join(map(str, GROUPS))} divides the experts' sizes {sorted(sizes)}",
        next="use --group-size 0: one scale per output channel",
    )


def grid_counts(packing: Packing) -> dict[str, int]:
    """How many matrices are on each grid, widest first."""
    counts: dict[str, int] = {}
    for grid in sorted(packing.values(), key=lambda grid: (-grid.bits, str(grid))):
        counts[str(grid)] = counts.get(str(grid), 0) + 1
    return counts

"""Experts in one canonical form, whatever the disk holds: split or fused, transposed, interleaved, quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moezip.arch.decoded import Decoded, decoded, packed_grids
from moezip.arch.layout import TRIPWIRE_DTYPE, TRIPWIRE_SHAPE, Layout, tripwire
from moezip.arch.mone import Substitution, constant
from moezip.arch.spec import Architecture, ExpertTensor, LayerFacts, RouterTensor
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    import torch

__all__ = ["Decoded", "Expert", "check_shapes", "decoded", "packed_grids", "plain_shape", "read_expert"]

FLOATS = ("BF16", "F16", "F32", "F64")


# -- canonical experts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert, canonical: rows are output channels.

    Attributes:
        gate, up: [F, D]. down: [D, F].
        gate_bias, up_bias: [F]. down_bias: [D]. None where the family has no biases.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


def read_expert(source: Source, architecture: Architecture, layer: int, expert: int) -> Expert:
    """One expert of one layer, whatever the disk form, in its stored dtype.

    Args:
        source: plain tensors; pass ``decoded(source)`` where a quantization may be stored.

    Raises:
        ArchitectureError: a tensor is stored as codes.
        CheckpointError: there is no such layer or expert, or the expert is one of width 0.
    """
    parts: dict[str, torch.Tensor] = {}
    for tensor in architecture.experts:
        name = tensor.template.format(layer=layer, expert=expert)
        if source.spec(name).dtype not in FLOATS:
            raise ArchitectureError(
                f"{name} is stored as {source.spec(name).dtype} codes, not as numbers",
                where=source.folder,
                next="read it through moezip.arch.experts.decoded",
            )
        value = source.read(name, range(expert, expert + 1))[0] if tensor.fused else source.read(name)
        if tensor.transposed:
            value = value.transpose(-1, -2)
        if tensor.role in ("gate_up", "gate_up_bias"):
            suffix = tensor.role.removeprefix("gate_up")
            half = value.shape[0] // 2
            parts["gate" + suffix] = value[0::2] if tensor.interleaved else value[:half]
            parts["up" + suffix] = value[1::2] if tensor.interleaved else value[half:]
        else:
            parts[tensor.role] = value
    return Expert(**{role: part.contiguous() for role, part in parts.items()})


# -- config against tensors ---------------------------------------------------------------------------------


def check_shapes(source: Source, architecture: Architecture) -> None:
    """Config and headers tell the same story: count, width and hidden size of every expert and router.

    Of a ragged checkpoint the story is its layout's, and the tripwire must be there. Nothing is read but headers. Every
    name in an MoE block must be an expert's, the router's or a shared expert's.

    Raises:
        ArchitectureError: with the numbers that disagree, or the name that no entry claims.
    """
    config = source.config
    facts = {fact.layer: fact for fact in architecture.layer_facts(config)}
    layout, plain = Layout.of(config), decoded(source)
    trip = None if layout is None else tripwire(architecture, layout)
    if trip is not None:
        _check_tripwire(plain, trip)
    substitution = Substitution.of(config)
    if substitution is not None:
        layout = substitution.layout(architecture, list(facts.values()))
        _check_constants(plain, architecture, substitution, facts)
    found: dict[tuple[int, ExpertTensor], set[int]] = {}
    routers: set[tuple[int, RouterTensor]] = set()
    for name in plain.names():
        if name == trip:
            continue
        claim = architecture.claim(name, config)
        if claim.kind in ("extra", "constant"):
            continue
        if claim.layer is None or claim.tensor is None:
            _check_neighbour(name, architecture, facts, source)
            continue
        fact, shape = facts.get(claim.layer), plain.spec(name).shape
        if fact is None:
            raise _disagree(f"{name} is there, but by the config layer {claim.layer} has no experts", source)
        if isinstance(claim.tensor, RouterTensor):
            routers.add((claim.layer, claim.tensor))
            axis = claim.tensor.axis
            count = shape[axis] if axis < len(shape) else None
            rows = fact.experts if layout is None else layout.rows(claim.layer)
            if count != rows:
                raise _disagree(f"{name} has {count} experts, the config says {rows}", source)
            continue
        if layout is not None and claim.expert is not None:
            widths = layout.widths[claim.layer]
            if claim.expert >= len(widths) or not (widths[claim.expert] or claim.tensor.role == "down_bias"):
                raise _disagree(f"{name} is there; by the layout there is no such expert, or its width is 0", source)
            fact = replace(fact, width=widths[claim.expert])
        wanted = plain_shape(claim.tensor, fact)
        if claim.tensor.fused and shape[:1] != wanted[:1]:
            raise _disagree(f"{name} holds {shape[:1]} experts, the config says {fact.experts}", source)
        if shape != wanted:
            raise _disagree(
                f"{name} has shape {shape}; with hidden size {fact.hidden} and expert width {fact.width} the config "
                f"implies {wanted}",
                source,
            )
        seen = found.setdefault((claim.layer, claim.tensor), set())
        seen.update(range(fact.experts) if claim.expert is None else (claim.expert,))
    for fact in facts.values():
        wide = None if layout is None else {e for e, width in enumerate(layout.widths[fact.layer]) if width}
        for tensor in architecture.experts:
            needed = None if tensor.role == "down_bias" else wide  # a bias is output whatever the width
            _check_count(found.get((fact.layer, tensor), set()), tensor, fact, source, needed)
        for row in architecture.router:
            if (fact.layer, row) not in routers:
                raise _disagree(f"{row.template.format(layer=fact.layer)} is missing", source)


def plain_shape(tensor: ExpertTensor, fact: LayerFacts) -> tuple[int, ...]:
    """The stored shape of an expert tensor in its plain form."""
    inner = {"gate": fact.width, "up": fact.width, "down": fact.hidden, "gate_up": 2 * fact.width}
    if tensor.role.endswith("_bias"):
        shape: tuple[int, ...] = (inner[tensor.role.removesuffix("_bias")],)
    else:
        shape = (inner[tensor.role], fact.width if tensor.role == "down" else fact.hidden)
    if tensor.transposed:
        shape = shape[::-1]
    return (fact.experts, *shape) if tensor.fused else shape


def _check_tripwire(source: Source, name: str) -> None:
    if name not in source.names() or source.spec(name).shape != TRIPWIRE_SHAPE:
        raise ArchitectureError(
            f"the tensor {name} of shape {list(TRIPWIRE_SHAPE)} ({TRIPWIRE_DTYPE}) is missing, which stops loaders "
            "that do not know the format",
            where=source.folder,
            next="write the checkpoint again with moezip",
        )


def _check_constants(
    source: Source, architecture: Architecture, substitution: Substitution, facts: Mapping[int, LayerFacts]
) -> None:
    """One vector [D] for every dropped expert of a MoNE checkpoint, and no other."""
    wanted = {
        constant(architecture, layer, expert): (facts[layer].hidden,)
        for layer, row in substitution.dropped.items()
        for expert in row
    }
    there = {name for name in source.names() if architecture.claim(name, source.config).kind == "constant"}
    for name in sorted(there ^ wanted.keys()):
        raise _disagree(f"{name} is {'there, but not listed' if name in there else 'missing'}", source)
    for name, shape in wanted.items():
        if source.spec(name).shape != shape:
            raise _disagree(f"{name} has shape {source.spec(name).shape}, the config implies {shape}", source)


def _check_count(
    seen: set[int], tensor: ExpertTensor, fact: LayerFacts, source: Source, wide: set[int] | None = None
) -> None:
    """``wide``: the experts of a ragged layer that have tensors."""
    expected = set(range(fact.experts)) if wide is None else wide
    if seen == expected:
        return
    name = tensor.template.format(layer=fact.layer, expert="*")
    missing = sorted(expected - seen)
    what = f"layer {fact.layer} has {len(seen)} tensors {name}, the config says {fact.experts} experts"
    raise _disagree(f"{what}; the first missing is {missing[0]}" if missing else what, source)


def _check_neighbour(name: str, architecture: Architecture, facts: Mapping[int, object], source: Source) -> None:
    """A tensor of an MoE block that is neither an expert's nor the router's must belong to a shared expert."""
    parts = name.removeprefix(f"{architecture.layers}.").split(".")
    if name.startswith(f"{architecture.layers}.") and len(parts) > 2 and parts[0].isdecimal():
        inside = int(parts[0]) in facts and parts[1] == architecture.disk_block
        if inside and parts[2] not in architecture.shared_modules:
            raise ArchitectureError(
                f"the tensor {name} lies in an MoE block, but the entry for {architecture.name} does not claim it",
                where=source.folder,
                next="it may hold one value per expert, which pruning would leave stale; please report the name",
            )


def _disagree(what: str, source: Source) -> ArchitectureError:
    return ArchitectureError(
        f"config.json and the tensors disagree: {what}",
        where=source.folder,
        next="use the config.json that came with these weights, or download the missing shards again",
    )

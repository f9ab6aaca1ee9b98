"""Quantized checkpoints as plain numbers, under the names that the family publishes: what every loader reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moezip.arch.experts import decoded, plain_shape
from moezip.arch.families import identify
from moezip.arch.spec import Architecture, ExpertTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import PlanError
from moezip.export.remade import Made, Remade, stock_config, without_tripwire
from moezip.plan.views import split_roles

if TYPE_CHECKING:
    import torch


def dense(source: Source) -> Source:
    """``source`` decoded to the model's own dtype, as a stock checkpoint.

    One expert at a time is in memory, even where the family publishes all of a layer in one tensor.

    Raises:
        PlanError: layers or experts differ, which no stock loader reads.
        ArchitectureError: a quantization that moezip cannot decode.
    """
    plain, config = decoded(source), stock_config(source)
    if config is None:
        raise PlanError(
            "its layers or experts differ, which only moezip reads",
            where=source.folder,
            next="export it for moezip (--for moezip), or prune with --scope layer",
        )
    entry = identify(plain.config, source.folder)
    return Remade(plain, config, list(_tensors(plain, entry, config)))


def _tensors(plain: Source, entry: Architecture, config: dict[str, Any]) -> Iterator[str | Made]:
    """Published tensors of a layer's experts stand where the first of their parts stood."""
    facts = {fact.layer: fact for fact in identify(config).layer_facts(config)}
    seen: set[str] = set()
    for name in without_tripwire(plain):
        claim = entry.claim(name, plain.config)
        if claim.kind != "expert" or not entry.published:
            yield name
            continue
        assert claim.layer is not None and claim.tensor is not None
        for tensor in entry.published:
            fused = tensor.template.format(layer=claim.layer)
            if fused not in seen and claim.tensor.role in split_roles(tensor):  # type: ignore[union-attr]
                seen.add(fused)
                part = plain.spec(name)
                spec = TensorSpec(fused, part.dtype, plain_shape(tensor, facts[claim.layer]), part.file)
                yield Made(spec, _Fused(plain, entry, claim.layer, tensor).read)


class _Fused:
    """One published tensor of all experts of a layer, made of the experts' own."""

    def __init__(self, plain: Source, entry: Architecture, layer: int, tensor: ExpertTensor):
        self._plain, self._layer, self._tensor = plain, layer, tensor
        templates = {own.role: own.template for own in entry.experts}
        self._templates = [templates[role] for role in split_roles(tensor)]

    def read(self, experts: range) -> Iterator[torch.Tensor]:
        for expert in experts:
            names = [template.format(layer=self._layer, expert=expert) for template in self._templates]
            yield joined([self._plain.read(name) for name in names], self._tensor)[None]


def joined(parts: Sequence[torch.Tensor], tensor: ExpertTensor) -> torch.Tensor:
    """One expert's share of a published tensor, laid as it is stored.

    Args:
        parts: what it holds of the expert (``split_roles``), [out, in] or [out].
    """
    import torch

    if len(parts) == 1:
        value = parts[0]
    elif tensor.interleaved:
        value = torch.stack(list(parts), dim=1).flatten(0, 1)
    else:
        value = torch.cat(list(parts))
    return value.transpose(-1, -2) if tensor.transposed and value.dim() > 1 else value

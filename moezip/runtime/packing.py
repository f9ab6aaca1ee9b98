"""Makes room for packed codes in a model on the meta device, and checks what was put there.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from moezip.arch.layout import tripwire_of
from moezip.arch.ragged import Matrix
from moezip.arch.spec import Architecture
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError
from moezip.formats.packed import Grid
from moezip.runtime.linear import Packed, PackedLinear

AGAIN = "write the checkpoint again with moezip, or use the config.json that came with the weights"


class Names:
    """Where transformers puts the tensors of a checkpoint in a model."""

    def __init__(self, model: Any, architecture: Architecture):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._architecture, self._prefix = architecture, model.base_model_prefix
        mapping = get_model_conversion_mapping(model)
        self._renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        self._converters = [step for step in mapping if isinstance(step, WeightConverter)]

    def target(self, name: str, config: Mapping[str, Any], places: dict[str, Any]) -> str:
        """The name of a stored tensor in a model whose experts have modules of their own.

        Args:
            places: the model's own ``state_dict``.
        """
        from transformers.core_model_loading import rename_source_key

        entry, claim = self._architecture, self._architecture.claim(name, config)
        if claim.kind == "expert" and claim.tensor is not None:
            inside = claim.tensor.template.partition("{expert}.")[2] + claim.suffix
            return f"{entry.layers}.{claim.layer}.{entry.block}.{entry.experts_module}.{claim.expert}.{inside}"
        return str(rename_source_key(name, self._renamings, self._converters, self._prefix, places)[0])


def make_packed(model: Any, architecture: Architecture, plain: Source, grids: Mapping[str, Grid]) -> None:
    """Puts ``Packed`` in place of the matrices that the checkpoint stores as codes.

    Args:
        model: on the meta device, with experts in modules of their own (``make_ragged``).
        plain: the checkpoint decoded, for shapes.
        grids: by the names of the matrices.

    Raises:
        ArchitectureError: a name is no matrix of the model, or one of another shape.
    """
    names, places = Names(model, architecture), dict(model.state_dict())
    for name, grid in grids.items():
        path = names.target(name, plain.config, places).removesuffix(".weight")
        shape = plain.spec(name).shape
        parent, _, leaf = path.rpartition(".")
        try:
            old = model.get_submodule(path)
        except AttributeError:
            old = None
        if not isinstance(old, Matrix) and type(old) is not nn.Linear:
            raise ArchitectureError(
                f"{name} is stored as packed codes, but the model has no such matrix", where="config.json", next=AGAIN
            )
        place = old.weight
        if place is None or tuple(place.shape) != shape:
            there = None if place is None else list(place.shape)
            raise ArchitectureError(
                f"{name} has shape {list(shape)} where the config implies {there}", where="config.json", next=AGAIN
            )
        made = Packed if isinstance(old, Matrix) else PackedLinear
        packed = made(grid, place.shape[0], place.shape[1], old.bias, place.device)
        packed.train(old.training)
        model.get_submodule(parent).add_module(leaf, packed)


def require_filled(model: Any, architecture: Architecture, source: Source) -> None:
    """Raises ArchitectureError if a parameter or buffer of the model has no tensor in the files.

    transformers would fill it with random numbers, and warn.
    """
    names, places = Names(model, architecture), dict(model.state_dict())
    trip = tripwire_of(architecture, source.config)
    filled = {names.target(name, source.config, places) for name in source.names() if name != trip}
    if trip is not None:
        filled.add(trip.replace(f".{architecture.disk_block}.", f".{architecture.block}.", 1))
    missing = sorted(places.keys() - filled - set(model.all_tied_weights_keys))
    if missing:
        raise ArchitectureError(
            f"{len(missing)} parameters have no tensor in the checkpoint, such as {missing[0]}",
            where=source.folder,
            next="download the missing files again, or use the config.json that came with these weights",
        )


def packed_modules(model: Any) -> Iterator[tuple[str, Packed]]:
    """The packed matrices of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield name, module

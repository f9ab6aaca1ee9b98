"""Loads models whose experts stay on disk (``moezip.runtime.paged``).

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from moezip.arch.experts import check_shapes, decoded, packed_grids
from moezip.arch.factoring import factoring_of
from moezip.arch.layout import Layout, tripwire_of
from moezip.arch.mone import Substitution
from moezip.arch.packing import stem
from moezip.arch.ragged import RaggedExperts, make_ragged
from moezip.arch.skeleton import Skeleton, target_dtypes
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError, CheckpointError, UsageError
from moezip.formats.packed import Grid
from moezip.runtime import unpacked
from moezip.runtime.linear import set_activations
from moezip.runtime.packing import Names, make_packed
from moezip.runtime.paged import COPY, LentExperts, PagedExperts, RaggedPaged, StockPaged
from moezip.runtime.pages import Pages, Unchanged, bytes_of
from moezip.runtime.skipping import attach
from moezip.runtime.tasks import EXPERTS


def load_paged(
    checkpoint: Checkpoint,
    *,
    cache: int | str,
    packed: bool,
    dtype: torch.dtype | None = None,
    activations: str = "exact",
) -> Any:
    """A transformers model whose experts stay in the files of ``checkpoint``, which is closed when the model is gone.

    Args:
        cache: bytes of experts to keep in memory, or a text such as ``2GiB``.
        packed: whether packed matrices run as they are; else they are decoded as they are read.

    Returns:
        The model; ``model.moezip_experts`` is its ``Pages``.

    Raises:
        UsageError: the cache is smaller than one expert.
        ArchitectureError: unknown or incomplete model, or one whose experts cannot stay on disk.
    """
    config, limit = checkpoint.config, bytes_of(cache)
    if Substitution.of(config) is not None or factoring_of(config):
        what = "are factors" if factoring_of(config) else "are partly vectors (MoNE)"
        raise ArchitectureError(
            f"experts that {what} cannot stay on disk in this version", where=checkpoint.folder,
            next="load it with experts='ram'",
        )  # fmt: skip
    source = Unchanged(checkpoint)
    plain = decoded(source)
    skeleton = Skeleton(plain, experts_implementation=EXPERTS, dtype=dtype)
    check_shapes(source, skeleton.architecture)
    skeleton.require_complete()
    pages = Pages(limit, source)
    weakref.finalize(pages, checkpoint.close)
    grids = packed_grids(source) if packed else {}
    dense = _install(skeleton, pages, source, plain, grids)
    if dense:
        skeleton.model.config._is_quantized = True  # some models ask before they reach for a Linear's weight
    _require_room(skeleton.model, limit)
    _load_the_rest(skeleton, source, dense)
    for module in (
        skeleton.model,
        *(each.template() for each in skeleton.model.modules() if isinstance(each, RaggedPaged)),
    ):
        set_activations(module, activations)
    if grids:
        unpacked.use(skeleton.model)
    attach(skeleton.model, skeleton.architecture, config, checkpoint.folder)
    pages.reset_stats()
    return _finished(skeleton, pages)


def _install(
    skeleton: Skeleton, pages: Pages, source: Source, plain: Source, grids: Mapping[str, Grid]
) -> dict[str, str]:
    """Paged experts in every layer, and packed modules in place of Linears: by their paths, the names of matrices."""
    entry, model = skeleton.architecture, skeleton.model
    dtypes = target_dtypes(model, skeleton.dtype)
    bare = _packed_twin(skeleton, plain, grids) if grids else model
    names = Names(bare, entry)
    places = dict(bare.state_dict())
    if grids:
        dtypes |= target_dtypes(bare, skeleton.dtype)
    trip = tripwire_of(entry, plain.config)
    # of one tensor of all experts there are no modules of their own
    targets = (
        {names.target(name, plain.config, places): name for name in plain.names() if name != trip}
        if skeleton.layout or grids
        else {}
    )
    for fact in entry.layer_facts(plain.config):
        block = f"{entry.layers}.{fact.layer}.{entry.block}"
        prefix = f"{block}.{entry.experts_module}."
        stock = bare.get_submodule(prefix[:-1])
        own = {name.removeprefix(prefix): dtype for name, dtype in dtypes.items() if name.startswith(prefix)}
        paged: PagedExperts
        if isinstance(stock, RaggedExperts):
            stored = {name.removeprefix(prefix): at for name, at in targets.items() if name.startswith(prefix)}
            paged = RaggedPaged(fact.layer, pages, stock, stored, own, plain, source)
        else:
            fills = {leaf: skeleton.fills[prefix + leaf] for leaf in own}
            paged = StockPaged(fact.layer, pages, stock, fills, own, plain)
        setattr(model.get_submodule(block), entry.experts_module, paged.train(stock.training))
    dense = {}
    for name in grids:
        if entry.claim(name, plain.config).kind != "expert":
            path = names.target(name, plain.config, places).removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            model.get_submodule(parent).add_module(leaf, bare.get_submodule(path))
            dense[path] = name
    return dense


def _packed_twin(skeleton: Skeleton, plain: Source, grids: Mapping[str, Grid]) -> Any:
    """The model once more, with room for codes, on the meta device; parts of it are taken from there."""
    from transformers import AutoModelForCausalLM

    entry = skeleton.architecture
    with torch.device("meta"):
        twin: Any = AutoModelForCausalLM.from_config(
            skeleton.config, dtype=skeleton.dtype, experts_implementation=EXPERTS
        ).eval()
    layout = skeleton.layout or Layout.uniform(entry.layer_facts(plain.config))
    make_ragged(twin, entry, layout, kind=LentExperts)
    make_packed(twin, entry, plain, grids)
    return twin.requires_grad_(False)


def _require_room(model: Any, limit: int) -> None:
    """Raises UsageError if the cache cannot hold each of the experts."""
    largest = max(
        (module.size(expert) for module in model.modules() if isinstance(module, PagedExperts)
         for expert in range(module.num_experts)),
        default=0,
    )  # fmt: skip
    if limit < largest:
        raise UsageError(
            f"a cache of {limit} bytes does not hold one expert, which takes up to {largest}",
            where="cache", next=f"give at least {largest}; every expert that a token uses in a layer is better",
        )  # fmt: skip


def _load_the_rest(skeleton: Skeleton, source: Source, dense: Mapping[str, str]) -> None:
    """Fills everything but the experts."""
    paged = tuple(f"{name}." for name, module in skeleton.model.named_modules() if isinstance(module, PagedExperts))
    codes = {f"{path}.weight" for path in dense}

    def wanted(targets: list[str]) -> list[str]:
        return [name for name in targets if name not in codes and not name.startswith(paged)]

    for layer in range(len(skeleton.layers)):
        skeleton.load(wanted(skeleton.layer_targets(layer)))
    skeleton.load(wanted(skeleton.outer_targets()))
    for path, name in dense.items():
        matrix = skeleton.model.get_submodule(path)
        for suffix in matrix._buffers:
            matrix._buffers[suffix] = source.read(stem(name) + suffix)
        matrix.require_sound(path)
        matrix.lay_out()
    skeleton.tie()


def _finished(skeleton: Skeleton, pages: Pages) -> Any:
    from transformers import GenerationConfig

    model, folder = skeleton.model, skeleton.source.folder
    model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.moezip_experts = pages

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise CheckpointError("the experts of this model are on disk, so there is no whole model to save", next=COPY)

    model.save_pretrained = save_pretrained
    return model

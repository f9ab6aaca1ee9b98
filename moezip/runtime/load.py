"""``moezip.load``: a checkpoint as a transformers model, whole or with the experts of one task alone."""

from __future__ import annotations

import logging
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from moezip.arch.layout import METHOD, Layout, own_format
from moezip.arch.mone import Substitution
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import UsageError
from moezip.formats import compressed_tensors
from moezip.runtime.tasks import load_for_task, whole

if TYPE_CHECKING:
    import torch

    from moezip.runtime.patterns import Patterns

log = logging.getLogger("moezip")


def load(
    checkpoint: str | PathLike[str],
    *,
    patterns: str | PathLike[str] | Patterns | None = None,
    prompt: str | None = None,
    task: str | None = None,
    threshold: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "exact",
    experts: Literal["ram", "mmap"] = "ram",
    cache: int | str | None = None,
) -> Any:
    """A transformers model, each parameter read once, straight into its place.

    Packed codes stay packed: those of moezip's own format, and those that compressed-tensors wrote, whose package is
    not needed.

    With ``patterns`` (made by `moezip tasks build`) only the experts of one task are read: of the task that ``task``
    names, or of the one nearest to ``prompt``; see ``moezip.runtime.tasks.load_for_task``.

    With ``experts="mmap"`` everything but the experts is read; these stay on disk and are read as they are used, so
    that models larger than memory run. ``model.moezip_experts.stats()`` tells hits, misses and bytes read
    (``moezip.runtime.pages.PageStats``).

    Args:
        checkpoint: a folder. With ``experts="mmap"`` its files must stay as they are while the model is in use.
        dtype: default the config's own.
        activations: what packed matrices are multiplied by: ``exact``, as they are, or ``int8``, rounded to whole
            numbers of 8 bits with one step for every 32 of them, which is faster.
        experts: where they are: in memory, or on disk. The files are read piece by piece and not mapped, as mapped
            pages would count as memory of the process.
        cache: bytes of experts that are kept in memory once read, or a text such as ``2GiB``; default a quarter of
            the memory that is free.

    Raises:
        CheckpointError, ArchitectureError: no model, or one that moezip does not know.
        UsageError: other activations, prompt, task or threshold without patterns, or a task that does not exist; a
            cache that is smaller than one expert, or one without experts on disk.
        PlanError: patterns of another checkpoint.
    """
    if activations not in ("exact", "int8"):
        raise UsageError(f"activations are exact or int8, not {activations!r}", where="moezip.load")
    _require_sense(experts, cache, device, patterns)
    if patterns is not None:
        return load_for_task(
            checkpoint, patterns, prompt=prompt, task=task, threshold=threshold, device=device, dtype=dtype
        )  # fmt: skip
    if prompt is not None or task is not None or threshold is not None:
        raise UsageError("a prompt, a task or a threshold means nothing without patterns", where="moezip.load",
                         next="give patterns=FILE, made by `moezip tasks build`")  # fmt: skip
    if experts == "mmap":
        from moezip.runtime.paged_load import load_paged

        opened = Checkpoint.open(checkpoint)  # which the model keeps
        packed = Layout.of(opened.config) is not None or _stays_packed(opened)
        room = _quarter() if cache is None else cache
        return load_paged(opened, cache=room, packed=packed, dtype=dtype, activations=activations)
    with Checkpoint.open(checkpoint) as source:
        if Substitution.of(source.config) is not None:
            from moezip.calibrate.experts import register

            return whole(source, device=device, dtype=dtype, experts_implementation=register())
        if Layout.of(source.config) is None and not _stays_packed(source):
            return whole(source, device=device, dtype=dtype)
    model = by_transformers(source, device=device, dtype=dtype)
    if activations != "exact":
        from moezip.runtime.linear import set_activations

        set_activations(model, activations)
    return model


def _require_sense(experts: str, cache: int | str | None, device: str, patterns: object) -> None:
    """Raises UsageError if what was asked of the experts cannot be."""
    if experts not in ("ram", "mmap"):
        raise UsageError(f"experts are 'ram' or 'mmap', not {experts!r}", where="moezip.load",
                         next="'mmap' leaves them on disk")  # fmt: skip
    if experts == "ram":
        if cache is not None:
            raise UsageError("a cache is for experts on disk", where="moezip.load", next="give experts='mmap' too")
    elif patterns is not None:
        raise UsageError("the experts of one task are read at once, and cannot stay on disk", where="moezip.load",
                         next="leave out patterns, or experts='mmap'")  # fmt: skip
    elif str(device) != "cpu":
        raise UsageError(f"experts that stay on disk run on the CPU, not on {device}", where="moezip.load",
                         next="leave out device, or experts='mmap'")  # fmt: skip


def _quarter() -> int:
    """A quarter of the memory that is free."""
    import psutil

    return int(psutil.virtual_memory().available // 4)


def _stays_packed(source: Source) -> bool:
    """Whether the codes of a checkpoint that compressed-tensors wrote can be run as they are.

    Those whose groups are no runs of neighbours are decoded, which is logged.
    """
    if (source.config.get("quantization_config") or {}).get("quant_method") != compressed_tensors.METHOD:
        return False
    stored = list(compressed_tensors.stored(source))
    if all(each.grid is not None for each in stored):
        return True
    log.warning("%s: its columns are stored in an order of their own, so it is decoded as it is loaded", source.folder)
    return False


def by_transformers(source: Source, *, device: str, dtype: torch.dtype | None) -> Any:
    """A checkpoint whose layers or experts differ or are packed, loaded so that it can be saved again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moezip.runtime.hook import AWAITED, install

    # by name, as the hook imports moezip.runtime.quantizer at the end of this, which must not be half-way itself
    import_module(AWAITED)
    install()
    from moezip.runtime.quantizer import FOREIGN

    config = AutoConfig.from_pretrained(source.folder)
    if not own_format(source.config):
        config.quantization_config = {"quant_method": METHOD, FOREIGN: source.config["quantization_config"]}
    return AutoModelForCausalLM.from_pretrained(
        source.folder, config=config, device_map=device, dtype=dtype or "auto"
    ).eval()

"""``moezip.load``: a checkpoint as a transformers model, whole or with the experts of one task alone."""

from __future__ import annotations

import logging
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

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
) -> Any:
    """A transformers model, each parameter read once, straight into its place.

    Packed codes stay packed: those of moezip's own format, and those that compressed-tensors wrote, whose package is
    not needed.

    With ``patterns`` (made by `moezip tasks build`) only the experts of one task are read: of the task that ``task``
    names, or of the one nearest to ``prompt``; see ``moezip.runtime.tasks.load_for_task``.

    Args:
        checkpoint: a folder.
        dtype: default the config's own.

    Raises:
        CheckpointError, ArchitectureError: no model, or one that moezip does not know.
        UsageError: prompt, task or threshold without patterns, or a task that does not exist.
        PlanError: patterns of another checkpoint.
    """
    if activations not in ("exact", "int8"):
        raise UsageError(f"activations are exact or int8, not {activations!r}", where="moezip.load")
    if patterns is not None:
        return load_for_task(
            checkpoint, patterns, prompt=prompt, task=task, threshold=threshold, device=device, dtype=dtype
        )  # fmt: skip
    if prompt is not None or task is not None or threshold is not None:
        raise UsageError("a prompt, a task or a threshold means nothing without patterns", where="moezip.load",
                         next="give patterns=FILE, made by `moezip tasks build`")  # fmt: skip
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

"""``moezip.load``: a checkpoint as a transformers model, whole or with the experts of one task alone."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.layout import Layout
from moezip.arch.mone import Substitution
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import UsageError
from moezip.runtime.tasks import load_for_task, whole

if TYPE_CHECKING:
    import torch

    from moezip.runtime.patterns import Patterns


def load(
    checkpoint: str | PathLike[str],
    *,
    patterns: str | PathLike[str] | Patterns | None = None,
    prompt: str | None = None,
    task: str | None = None,
    threshold: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """A transformers model, each parameter read once, straight into its place.

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
        if Layout.of(source.config) is None:
            return whole(source, device=device, dtype=dtype)
    return ragged(source.folder, device=device, dtype=dtype)


def ragged(folder: Path, *, device: str, dtype: torch.dtype | None) -> Any:
    """A checkpoint whose layers or experts differ, by way of transformers, so that it can be saved again."""
    from transformers import AutoModelForCausalLM

    from moezip.runtime.hook import install

    install()
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=dtype or "auto").eval()

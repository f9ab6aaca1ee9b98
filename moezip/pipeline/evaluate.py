"""``moezip evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.checkpoint.source import Source
from moezip.pipeline.common import Common, opened
from moezip.progress import Progress

if TYPE_CHECKING:
    from moezip.evaluate.result import Evaluation


def evaluate_command(
    checkpoint: str,
    common: Common,
    *,
    against: str | None = None,
    data: Sequence[Path] = (),
    tasks: Sequence[Path] = (),
    tokens: int | None = None,
    save: bool = False,
) -> Evaluation:
    """Loss, divergence from ``against`` and task scores of a checkpoint, streamed.

    Args:
        save: keep what was found in the checkpoint's ``moezip/evaluation.json``, and say it in its card.
    """
    from moezip.evaluate import saved
    from moezip.report.card import refresh_card

    model = opened(checkpoint)
    if save:
        saved.require_place(model.source.folder)
    reference = None if against is None else opened(against)
    found = evaluate_source(
        model.source, common, against=None if reference is None else reference.source, data=data, tasks=tasks,
        tokens=tokens,
    )  # fmt: skip
    if save:
        request = saved.Request(data, tasks, None if reference is None else reference.source.folder)
        saved.save(model.source.folder, found.to_json(), request, common.command)
        refresh_card(model.source.folder)
    return found


def evaluate_source(
    source: Source,
    common: Common,
    *,
    against: Source | None = None,
    data: Sequence[Path] = (),
    tasks: Sequence[Path] = (),
    tokens: int | None = None,
) -> Evaluation:
    """The same of a source that is open already, a view perhaps."""
    from moezip.evaluate.loss import evaluate

    def progress(stage: str, done: int, total: int) -> None:
        common.watch(Progress(f"evaluate {stage}", done, total))

    return evaluate(
        source,
        data=data,
        against=against,
        tasks=tasks,
        tokens=tokens,
        seq_len=common.seq_len,
        device=common.device,
        max_memory=common.max_memory,
        workdir=common.workdir,
        progress=progress,
    )

"""``moezip evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
) -> Evaluation:
    """Loss, divergence from ``against`` and task scores of a checkpoint, streamed."""
    from moezip.evaluate.loss import evaluate

    model = opened(checkpoint)
    reference = None if against is None else opened(against)

    def progress(stage: str, done: int, total: int) -> None:
        common.watch(Progress(f"evaluate {stage}", done, total))

    return evaluate(
        model.source,
        data=data,
        against=None if reference is None else reference.source,
        tasks=tasks,
        tokens=tokens,
        seq_len=common.seq_len,
        device=common.device,
        max_memory=common.max_memory,
        workdir=common.workdir,
        progress=progress,
    )

"""What every command that writes a checkpoint ends with: the checkpoint, and a report that says how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moezip.checkpoint.source import Source
from moezip.export.stock import write_checkpoint
from moezip.pipeline.common import Clock, Common
from moezip.plan.plan import Plan
from moezip.report.report import Report, peak_rss_bytes


def write_reported(
    view: Source,
    plan: Plan | None,
    out: Path,
    report: Report,
    text: str | None,
    common: Common,
    clock: Clock,
    extra: Mapping[str, bytes] | None = None,
) -> Report:
    """Writes ``view`` to ``out`` with its report; as of ``write_checkpoint``.

    Args:
        report: all but its times and its peak of memory, which are filled in. In the folder it counts the time until it
            is written itself; the one returned counts all of it.
    """
    before = clock.seconds

    def so_far() -> str:
        stages = {**clock.stages, "write": clock.seconds - before}
        return replace(report, seconds=clock.seconds, stages=stages, peak_rss_bytes=peak_rss_bytes()).to_json()

    with clock.stage("write"):
        write_checkpoint(
            view, plan, out, text=text, report=so_far, command=common.command, extra=extra, overwrite=common.overwrite,
            watch=common.watch,
        )  # fmt: skip
    return replace(report, seconds=clock.seconds, stages=dict(clock.stages), peak_rss_bytes=peak_rss_bytes())

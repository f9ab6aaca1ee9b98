"""What ``moezip skip`` says."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from moezip import console

if TYPE_CHECKING:
    from moezip.pipeline.skip import SkipEstimate
    from moezip.report.report import Report


def show_skip_estimate(found: SkipEstimate, as_json: bool) -> None:
    """What ``--dry-run`` prints."""
    if as_json:
        console.data({"dry_run": True, **asdict(found)})
        return
    console.pairs(
        "nothing was touched",
        {
            "rule": found.rule,
            "settings": ", ".join(f"{key}={value}" for key, value in found.settings.items()),
            "layers": f"{found.moe_layers}, {found.top_k} experts per token",
            "text": f"{found.tokens:,} tokens",
            "output": console.size(found.bytes)
            + (f", and {console.size(found.masks_bytes)} of mask networks" if found.masks_bytes else ""),
        },
    )


def show_skip(report: Report, as_json: bool, quiet: bool) -> None:
    """What the command ends with."""
    if as_json:
        console.data(asdict(report))
        return
    if quiet:
        return
    console.pairs(
        report.out,
        {
            "rule": report.method,
            "settings": ", ".join(f"{key}={value}" for key, value in report.settings.items()),
            "calls dropped": f"{report.statistics['share_dropped']:.1%} on its text",
            "size": f"{console.size(report.bytes_after)}, as it was",
            "time": console.duration(report.seconds),
            "peak memory": console.size(report.peak_rss_bytes),
        },
    )
    for note in report.notes[1:]:
        console.say(note)
    console.say(f"loss and calls saved: moezip evaluate {report.out} --against {report.source} --data TEXT")

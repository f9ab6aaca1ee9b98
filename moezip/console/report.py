"""What ``moezip report`` says on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moezip import console

if TYPE_CHECKING:
    from moezip.report.run import Run


def show_report(runs: Sequence[Run], as_json: bool, page: Path | None) -> None:
    """One run in full, several as a table."""
    if as_json:
        from moezip.report.page import agreement

        plans, found = agreement(runs)
        console.data(
            {"runs": [run.to_json() for run in runs], "predictions": {"plans": plans, "rank_correlation": found}}
        )
    elif page is None:
        show_run(runs[0]) if len(runs) == 1 else show_runs(runs)
    if page is not None:
        console.say(f"{page}: open it in a browser; it needs no network")


def show_run(run: Run) -> None:
    report, measured = run.report, run.measured
    before, after = report.get("bytes_before"), report.get("bytes_after")
    rows = {
        "size": "not in the report"
        if not before or after is None
        else f"{console.size(before)} to {console.size(after)} ({after / before:.0%})",
        "loss": "not measured",
        "predicted rise": "none" if run.predicted is None else f"{run.predicted:+.4f} nats per token, on its own text",
        "read by": _readers(run, "yes") or "nobody is known to read it",
    }
    if measured is not None and measured.nll is not None:
        rows["loss"] = f"{measured.nll:.4f} nats per token, the source was not measured"
        if measured.rise is not None:
            rows["loss"] = (
                f"{measured.source:.4f} to {measured.nll:.4f} nats per token ({measured.rise:+.4f}, perplexity x "
                f"{math.exp(measured.rise):.3f})"
            )
    if run.rise_on_texts is not None:
        rows["predicted rise"] += f"; measured there {run.rise_on_texts[0]:+.4f}"
    if detour := _readers(run, "detour"):
        rows["after one more step"] = detour
    if refused := _readers(run, "no"):
        rows["not read by"] = refused
    rows["method"] = run.method or "unknown"
    if run.texts:
        rows["decided on"] = ", ".join(name + (f" ({n:,} tokens)" if n else "") for name, n in run.texts.items())
    counts = report.get("experts_after") or []
    if counts:
        rows["experts"] = f"{_span(counts)} of {_span(report['experts_before'])} in each of {len(counts)} layers"
    if report.get("seconds") is not None:
        rows["time, peak memory"] = f"{console.duration(report['seconds'])}, {console.size(report['peak_rss_bytes'])}"
    rows["source"] = str(report.get("source") or "unknown")
    if run.manifest.get("command"):
        rows["command"] = str(run.manifest["command"])
    console.pairs(run.name, rows)
    if measured is not None:
        bounded = any(d.likely for d in measured.rows())
        cells = [
            (d.name, f"{d.tokens:,}", _number(d.source), f"{d.nll:.4f}", _number(d.rise, signed=True),
             *([f"{d.likely[0]:+.4f} to {d.likely[1]:+.4f}" if d.likely else "-"] if bounded else []), _number(d.kl))
            for d in measured.rows()
        ]  # fmt: skip
        head = ("text", "tokens", "source", "here", "rise", *(("at 95 %",) if bounded else ()), "KL")
        console.table("loss by text", head, cells)
    for note in report.get("notes") or ():
        console.say(f"note: {note}")
    for what in run.missing:
        console.say(f"missing: {what}")


def show_runs(runs: Sequence[Run]) -> None:
    rows = []
    for run in runs:
        after, before = run.bytes_after, run.report.get("bytes_before")
        share = f" ({after / before:.0%})" if after is not None and before else ""
        rows.append((
            run.name,
            run.method or "-",
            "-" if after is None else f"{console.size(after)}{share}",
            _number(run.rise, signed=True),
            _number(run.predicted, signed=True),
            "-" if run.measured is None else _number(run.measured.kl),
            _readers(run, "yes") or "-",
            run.state or "-",
        ))  # fmt: skip
    states = any(run.state for run in runs)
    head = ("run", "method", "size", "measured rise", "predicted", "KL", "read by", "state")
    console.table("", head if states else head[:-1], rows if states else [row[:-1] for row in rows])
    for run in runs:
        if run.why:
            console.say(f"{run.name}: {run.why}")


def _readers(run: Run, reads: str) -> str:
    """Those that read it so; of moezip's own form, transformers only with moezip's help."""
    found = [each for each in run.readings if each.reads == reads]
    helped = {each.name: " (after import moezip)" for each in found if "import moezip" in each.why}
    return ", ".join(each.name + helped.get(each.name, "") for each in found)


def _number(count: float | None, signed: bool = False) -> str:
    return "-" if count is None else f"{count:+.4f}" if signed else f"{count:.4f}"


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"

"""Reports as one HTML page that needs no network: everything is in it, and its policy forbids the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moezip import __version__
from moezip.report import charts, drawing
from moezip.report.agreement import rank_correlation
from moezip.report.card import megabytes, source_name, span
from moezip.report.charts import Chart, Point
from moezip.report.experts import bits_histogram, expert_map
from moezip.report.run import MEASURE, Run

# Rises of the loss below this are within what another cut of the same text would give, and drawn without alarm.
SLIGHT = 0.02


def page(runs: Sequence[Run], title: str) -> str:
    """One run as a page of its own, several as a comparison.

    Raises:
        UsageError: matplotlib or jinja2 is not installed.
    """
    drawing.require()
    if len(runs) == 1:
        return _render("run.html", title=title, **_one(runs[0]))
    return _render("runs.html", title=title, **_several(runs))


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("moezip.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip

    def svg(chart: Chart) -> Markup:
        """The drawing itself, whose texts are escaped where it is made."""
        return Markup(chart.svg)

    filters: dict[str, Callable[..., Any]] = {
        "svg": svg, "size": megabytes, "span": span, "nats": nats, "signed": partial(nats, signed=True),
        "duration": duration, "value": value, "bare": lambda text: str(text).replace("`", ""),
    }  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template).render(version=__version__, **values)


# -- one run ------------------------------------------------------------------------------------------------


def _one(run: Run) -> dict[str, Any]:
    found = None if run.plan is None else expert_map(run.plan)
    measured = run.measured
    histogram = {} if run.plan is None else bits_histogram(run.plan)
    return {
        "run": run,
        "report": {**_EMPTY, **run.report},
        "source": source_name_of(run),
        "measured": measured,
        "factor": None if run.rise is None else math.exp(run.rise),
        "tone": tone(run.rise),
        "bounded": measured is not None and any(row.likely for row in measured.rows()),
        "map": found,
        "importance": None if found is None else charts.importance(found),
        "bits": None if found is None else charts.bits(found),
        "histogram": charts.histogram(histogram),
        "losses": None if measured is None else charts.losses(measured, run.texts),
        "seconds": charts.seconds(run.report.get("stages") or {}),
        "settings": run.report.get("settings") or {},
        "made_by": {} if run.plan is None else run.plan.made_by,
        "measure": MEASURE.format(out=run.name, source=run.report.get("source") or "SOURCE"),
        "rise_on_texts": run.rise_on_texts,
    }


# Keys that a report of an older or newer moezip may lack.
_EMPTY: dict[str, Any] = {
    "bytes_before": None, "bytes_after": None, "bits_per_weight": None, "experts_before": [], "experts_after": [],
    "predicted_nats": None, "predicted_nats_reason": None, "seconds": None, "peak_rss_bytes": None, "stages": {},
    "price_factors": {}, "method": None, "settings": {}, "source": "", "protected": {}, "unrouted": {}, "notes": [],
    "form": "stock",
}  # fmt: skip


def source_name_of(run: Run) -> str:
    """The source as people call it."""
    from pathlib import Path

    given = str(run.report.get("source") or "")
    return source_name(Path(given)) if given else ""


# -- several ------------------------------------------------------------------------------------------------


def points_of(runs: Sequence[Run]) -> list[Point]:
    """Those of known size, numbered as in the table."""
    return [
        Point(number, run.name, run.bytes_after, run.predicted, run.rise)
        for number, run in enumerate(runs, 1)
        if run.bytes_after is not None
    ]


def agreement(runs: Sequence[Run]) -> tuple[int, float | None]:
    """How many runs are both predicted and measured, and the rank correlation over these."""
    pairs = [(run.predicted, run.rise) for run in runs if run.predicted is not None and run.rise is not None]
    return len(pairs), rank_correlation([p for p, _ in pairs], [m for _, m in pairs])


def _several(runs: Sequence[Run]) -> dict[str, Any]:
    points = points_of(runs)
    ranked = [point for point in points if point.measured is not None]
    best = {ranked[place].number for place in charts.front([(p.size, p.measured or 0.0) for p in ranked])}
    domains = list(dict.fromkeys(d.name for run in runs if run.measured for d in run.measured.domains))
    rises = [
        {d.name: d.rise for d in run.measured.domains if d.rise is not None} if run.measured else {} for run in runs
    ]
    highest = max((each for row in rises for each in row.values()), default=0.0)
    return {
        "runs": runs,
        "reports": [{**_EMPTY, **run.report} for run in runs],
        "best": best,
        "pareto": charts.pareto(points),
        "predictions": charts.predictions(points),
        "agreement": agreement(runs),
        "domains": domains,
        "commands": _commands(runs),
        "rises": rises,
        "level": partial(_level, highest=highest),
        "mixed": len({_measured_on(run) for run in runs if run.rise is not None}) > 1,
        "failed": [run for run in runs if run.state == "failed"],
        "smallest": min(points, key=lambda p: p.size, default=None),
        "least": min(ranked, key=lambda p: p.measured or 0.0, default=None),
        "tones": [tone(run.rise) for run in runs],
    }


def _commands(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What made which runs; a batch made many by one command."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if command := run.manifest.get("command"):
            found.setdefault(str(command), []).append(run.name)
    return found


def _measured_on(run: Run) -> tuple[tuple[str, int], ...]:
    """The texts and how much of each: only losses on the same are comparable."""
    return () if run.measured is None else tuple(sorted((d.name, d.tokens) for d in run.measured.domains))


def _level(rise: float, highest: float) -> int:
    """The shade of a cell in the table of rises: 0 to 3."""
    if rise < SLIGHT or highest <= 0:
        return 0
    return 1 + min(2, int(3 * rise / (highest * 1.001)))


# -- words --------------------------------------------------------------------------------------------------


def tone(rise: float | None) -> str:
    """How alarming a rise looks: by what it does to the perplexity (2 % and 10 % more)."""
    if rise is None:
        return "unknown"
    return "good" if rise < SLIGHT else "fair" if rise < 5 * SLIGHT else "poor"


def nats(count: float | None, signed: bool = False) -> str:
    """Three digits after the point, or four where the number is below a hundredth; an dash for nothing."""
    if count is None:
        return "–"
    count, digits = round(count, 4) + 0.0, 3 if abs(count) >= 0.01 else 4
    if count == 0:
        return "0.0000"
    return (f"{count:+.{digits}f}" if signed else f"{count:.{digits}f}").replace("-", "−")


def duration(count: float | None) -> str:
    """Seconds for people."""
    if count is None:
        return "–"
    if count < 60:
        return f"{count:.1f} s"
    if count < 3600:
        return f"{int(count // 60)} min {int(count % 60)} s"
    return f"{int(count // 3600)} h {int(count % 3600 // 60)} min"


def value(given: Any) -> str:
    """A setting as ``--set`` takes it."""
    if isinstance(given, Mapping | list):
        import json

        return json.dumps(given)
    return str(given).lower() if isinstance(given, bool) else "–" if given is None else str(given)

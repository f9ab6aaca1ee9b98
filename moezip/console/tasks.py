"""How tasks and their patterns look."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from moezip import console

if TYPE_CHECKING:
    from moezip.pipeline.tasks import Built
    from moezip.runtime.patterns import Patterns


def facts(patterns: Patterns) -> dict[str, Any]:
    """What `moezip tasks show --json` prints."""
    names = [task.name for task in patterns.tasks]
    return {
        "source": patterns.source,
        "architecture": patterns.architecture,
        "method": patterns.made_by.get("method"),
        "experts": patterns.experts,
        "keep": patterns.keep,
        "tasks": {
            task.name: {"tokens": task.tokens, "radius": task.radius, "kept": {str(k): v for k, v in task.kept.items()}}
            for task in patterns.tasks
        },
        "overlap": {one: {other: patterns.overlap(one, other) for other in names} for one in names},
        "overlap_by_chance": patterns.keep / patterns.experts,
        "distances": {task.name: patterns.distances(task.query) for task in patterns.tasks},
    }


def show_patterns(patterns: Patterns) -> None:
    """Tasks, what they share, and how far apart their queries are."""
    seen = facts(patterns)
    names = list(seen["tasks"])
    rows = []
    for name, task in seen["tasks"].items():
        other, distance = next(item for item in seen["distances"][name].items() if item[0] != name)
        rows.append((name, f"{task['tokens']:,}", f"{task['radius']:.3f}", other, f"{distance:.3f}"))
    kept = f"{patterns.keep} of {patterns.experts} experts per layer each, by {seen['method']}"
    console.table(kept, ("task", "tokens", "radius", "nearest task", "its distance"), rows)
    overlap = [(one, *("-" if one == other else f"{seen['overlap'][one][other]:.0%}" for other in names))
               for one in names]  # fmt: skip
    console.table(
        f"kept experts in common, mean over the layers ({seen['overlap_by_chance']:.0%} by chance)",
        ("task", *names),
        overlap,
    )
    apart = [(one, *("-" if one == other else f"{seen['distances'][one][other]:.3f}" for other in names))
             for one in names]  # fmt: skip
    console.table("distance between queries", ("task", *names), apart)


def show_built(built: Built, out: Path, as_json: bool, quiet: bool) -> None:
    """What `moezip tasks build` ends with."""
    if as_json:
        console.data(
            {"out": str(out), **facts(built.patterns), "seconds": built.seconds, "peak_rss_bytes": built.peak_rss_bytes}
        )
        return
    if quiet:
        return
    show_patterns(built.patterns)
    console.say(f"{out}: {len(built.patterns.tasks)} tasks, in {console.duration(built.seconds)}")
    call = f"moezip.load({str(built.folder)!r}, patterns={str(out)!r}, prompt=...)"
    console.say(f"look again: moezip tasks show {quote(str(out))}; load: {call}")

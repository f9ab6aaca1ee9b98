"""What ``moezip run`` says: jobs as they fail, and all of them at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moezip import console

if TYPE_CHECKING:
    from moezip.pipeline.batch import JobResult
    from moezip.pipeline.batch.forecast import Forecast


def tell_failure(result: JobResult) -> None:
    """A job that failed or cannot run, as soon as that is known; said even where nothing else is."""
    error = result.error or {}
    if result.status == "not run":
        console.say(f"{result.name} is skipped: {error.get('what')}")
        return
    console.say(f"error in {result.name}: {error.get('what')}")
    for key, label in (("where", "  where: "), ("next", "  next:  ")):
        if error.get(key) is not None:
            console.say(f"{label}{error[key]}")


def show_jobs(results: Sequence[JobResult], rows: Mapping[str, Mapping[str, Any]], as_json: bool, quiet: bool) -> None:
    """Every job.

    Args:
        rows: of the summary, by job.
    """
    from moezip.report.agreement import rank_correlation

    pairs: list[tuple[float, float]] = [
        (row["predicted_nats"], row["rise"])
        for row in (rows[result.name] for result in results)
        if row["predicted_nats"] is not None and row["rise"] is not None
    ]
    agreement = rank_correlation([p for p, _ in pairs], [m for _, m in pairs])
    if as_json:
        jobs = [{**dataclasses.asdict(result), "pareto": rows[result.name]["pareto"]} for result in results]
        console.data({"jobs": jobs, "predictions": {"plans": len(pairs), "rank_correlation": agreement}})
        return
    if quiet:
        return
    columns = {
        "job": lambda row, result: result.name,
        "state": lambda row, result: "finished before" if result.skipped else result.status,
        "size": lambda row, result: "-" if row["bytes"] is None else console.size(row["bytes"]),
        "bits": lambda row, result: "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}",
        "experts": lambda row, result: row["experts"] or "-",
        "loss": lambda row, result: _number(row["loss"], "{:.4f}"),
        "predicted": lambda row, result: _number(row["predicted_nats"], "{:+.4f}"),
        "rise": lambda row, result: _number(row["rise"], "{:+.4f}"),
        "KL": lambda row, result: _number(row["kl"], "{:.4f}"),
        "time": lambda row, result: "-" if row["seconds"] is None else console.duration(row["seconds"]),
        "best": lambda row, result: "*" if row["pareto"] else "",
    }
    cells = [[show(rows[result.name], result) for show in columns.values()] for result in results]
    # a column in which no job has anything to say is left away
    used = [i for i in range(len(columns)) if i < 2 or any(row[i] not in ("-", "") for row in cells)]
    console.table("", [list(columns)[i] for i in used], [[row[i] for i in used] for row in cells])
    if any(rows[result.name]["pareto"] for result in results):
        console.say("*: no other job is smaller and loses no more")
    if agreement is not None:
        console.say(f"rank correlation of predicted and measured rises over {len(pairs)} plans: {agreement:.2f}")
    for result in results:
        if result.status != "done" and result.error is not None:
            console.say(f"{result.name}: {_one_line(result.error)}")


def show_forecast(seen: Forecast, as_json: bool) -> None:
    """What a run would do."""
    if as_json:
        console.data(dataclasses.asdict(seen))
        return
    if seen.passes:
        passes = [
            (
                each.model,
                ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in each.sets.items()) or "-",
                _few(each.saved, "sets"),
                _few(each.jobs, "jobs"),
                "-" if each.seconds is None else console.duration(each.seconds),
            )
            for each in seen.passes
        ]
        console.table("calibration: one pass per row", ("of", "reads", "already there", "shared by", "time"), passes)
    rows = []
    for job in seen.jobs:
        rows.append((
            job.name,
            job.state,
            " > ".join(job.steps),
            _few(job.needs, "jobs"),
            _few(job.reads, "sets"),
            "-" if job.bytes_after is None else console.size(job.bytes_after),
            "-" if job.experts is None else job.experts,
            "-" if job.seconds is None else console.duration(job.seconds),
            "-" if job.memory_bytes is None else console.size(job.memory_bytes),
        ))  # fmt: skip
    head = ("job", "state", "steps", "needs", "reads", "size", "experts", "time", "memory")
    console.table("jobs, in this order; nothing was touched", head, rows)
    for job in seen.jobs:
        if job.error is not None:
            console.say(f"{job.name}: {_one_line(job.error)}")
    if seen.unknown:
        console.say(f"known once the jobs before them are done: the sizes and times of {', '.join(seen.unknown)}")
    console.say(
        f"in all about {console.duration(seen.seconds)}, {console.size(seen.memory_bytes)} of memory and "
        f"{console.size(seen.disk_bytes)} of disk in {seen.output} ({seen.assumes})"
    )


def _few(names: Sequence[str], what: str) -> str:
    """The names, or how many there are."""
    return f"{len(names)} {what}" if len(names) > 4 else ", ".join(names) or "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _one_line(error: Mapping[str, str | None]) -> str:
    where = f" ({error['where']})" if error.get("where") else ""
    after = f"; {error['next']}" if error.get("next") else ""
    return f"{error.get('what')}{where}{after}"

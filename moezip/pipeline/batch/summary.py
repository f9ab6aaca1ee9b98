"""``summary.json`` and ``summary.csv``: one row per job, in the order of the recipe."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moezip.errors import MoezipError
from moezip.export.stock import tensor_bytes
from moezip.pipeline.batch.jobs import Batch, JobResult
from moezip.pipeline.batch.state import digest_of, write
from moezip.pipeline.common import open_checkpoint
from moezip.recipe import Recipe
from moezip.recipe.shape import Evaluate, Job

VERSION = 1
COLUMNS = (
    "job", "status", "method", "ratio", "keep", "bits", "size", "bytes", "bits_per_weight", "experts",
    "predicted_nats", "loss", "source_loss", "rise", "kl", "top1_agreement", "seconds", "peak_rss_bytes", "pareto",
)  # fmt: skip
MEASURED = ("loss", "source_loss", "rise", "kl", "top1_agreement")


def write_summary(batch: Batch, results: Mapping[str, JobResult]) -> None:
    """Both files, of all jobs of the recipe; files that say the same already are left alone."""
    every: dict[str, JobResult | None] = {}
    for name in batch.recipe.jobs:
        try:
            every[name] = results.get(name) or batch.finished(name)
        except MoezipError:  # its own run says it; here it has no result
            every[name] = None
    rows = rows_of(batch.recipe, every)
    record = {
        "version": VERSION,
        "source": {"model": batch.recipe.model, "bytes": tensor_bytes(open_checkpoint(batch.recipe.model))},
        "sweeps": {name: list(members) for name, members in batch.recipe.sweeps.items()},
        "jobs": rows,
    }
    for name, text in (("summary.json", json.dumps(record, indent=2) + "\n"), ("summary.csv", as_csv(rows))):
        file = batch.folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write(file, text)


def summary_of(recipe: Recipe, results: Sequence[JobResult]) -> dict[str, dict[str, Any]]:
    """The rows of these jobs, by name."""
    by_name = {result.name: result for result in results}
    return {row["job"]: row for row in rows_of(recipe, {name: by_name.get(name) for name in recipe.jobs})}


def rows_of(recipe: Recipe, results: Mapping[str, JobResult | None]) -> list[dict[str, Any]]:
    """What is said of each job; None stands for one that has not run."""
    rows = [_row(recipe, name, results[name]) for name in recipe.jobs]
    mark_best(rows)
    return rows


def mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """``pareto``: whether no other job that was measured on the same text is smaller and loses no more, or is as small
    and loses less; None where size or loss is unknown."""
    for row in rows:
        row["pareto"] = _best(row, [other for other in rows if other["measured_on"] == row["measured_on"]])


def _row(recipe: Recipe, name: str, result: JobResult | None) -> dict[str, Any]:
    job = recipe.jobs[name]
    found = result or JobResult(name)
    report = found.report or {}
    before, after = report.get("experts_before", []), report.get("experts_after", [])
    evaluations = [_measured(each) for each in found.evaluations]
    first: dict[str, Any] = next((each for each in evaluations if each["loss"] is not None), {})
    return {
        "job": name,
        "status": "waiting" if result is None else found.status,
        "model": job.model or recipe.model,
        "needs": list(job.before),
        **_settings(job),
        "bytes_before": report.get("bytes_before"),
        "bytes": report.get("bytes_after"),
        "bits_per_weight": report.get("bits_per_weight"),
        "experts": span(after) if after else None,
        "experts_before": span(before) if before else None,
        "predicted_nats": report.get("predicted_nats"),
        **{key: first.get(key) for key in MEASURED},
        "evaluations": evaluations,
        "exports": [{key: each[key] for key in ("out", "form", "bytes_after")} for each in found.exports],
        "seconds": found.seconds if result is not None and found.status == "done" else None,
        "peak_rss_bytes": found.peak_rss_bytes or None,
        "out": found.out,
        "error": None if found.error is None else dict(found.error),
        "measured_on": _measure(job),
    }


def span(counts: Sequence[int]) -> str:
    """``16``, or ``12 to 20`` where layers differ."""
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _settings(job: Job) -> dict[str, Any]:
    """Method and amounts, of all its compressing steps."""
    methods: list[str] = []
    ratios: list[float] = []
    keeps: list[int] = []
    bits = size = None
    for step in job.steps:
        for action in (step.prune, step.merge):
            if action is not None:
                methods.append(action.method)
                ratios += [] if action.ratio is None else [action.ratio]
                keeps += [] if action.keep is None else [action.keep]
        if step.quantize is not None:
            allocate = step.quantize.allocate
            methods.append(step.quantize.solver + ("" if allocate == "uniform" else f" {allocate}"))
            bits, size = step.quantize.bits, step.quantize.size
    return {
        "method": " + ".join(methods) or None,
        "ratio": ratios[0] if len(ratios) == 1 else ratios or None,
        "keep": keeps[0] if len(keeps) == 1 else keeps or None,
        "bits": bits,
        "size": size,
    }


def _measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one evaluation: of all its text, of each file, of tasks."""
    against = evaluation.get("against") or {}
    files, sources = evaluation.get("by_file") or {}, against.get("by_file") or {}
    return {
        **_numbers(evaluation, against),
        "by_file": {name: _numbers(entry, sources.get(name) or {}) for name, entry in files.items()},
        "tasks": {name: entry["accuracy"] for name, entry in (evaluation.get("tasks") or {}).items()},
    }


def _numbers(entry: Mapping[str, Any], against: Mapping[str, Any]) -> dict[str, float | None]:
    loss, source = entry.get("nll"), against.get("nll")
    return {
        "loss": loss,
        "source_loss": source,
        "rise": None if loss is None or source is None else loss - source,
        "kl": against.get("kl"),
        "top1_agreement": against.get("top1_agreement"),
    }


def _measure(job: Job) -> str | None:
    """A name for what the job's first loss was measured on, so that only like is compared with like."""
    first = next((step.evaluate for step in job.steps if step.evaluate is not None and step.evaluate.data), None)
    if first is None:
        return None
    data: Evaluate = first.model_copy(update={"tasks": (), "against": None})
    return digest_of([data.model_dump_json()])[:16]


def _best(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool | None:
    def place(one: Mapping[str, Any]) -> tuple[float, float] | None:
        if one["status"] != "done" or one["bytes"] is None or one["loss"] is None:
            return None
        return one["bytes"], one["loss"]

    own = place(row)
    if own is None:
        return None
    places = [found for other in others if (found := place(other)) is not None]
    return not any(size <= own[0] and loss <= own[1] and (size, loss) != own for size, loss in places)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per job; the columns of further evaluations are ``loss_2`` and so on, tasks are ``task_NAME``."""
    most = max((len(row["evaluations"]) for row in rows), default=0)
    tasks = list(dict.fromkeys(task for row in rows for each in row["evaluations"] for task in each["tasks"]))
    later = [f"{key}_{i}" for i in range(2, most + 1) for key in MEASURED]
    text = io.StringIO()
    file = csv.writer(text, lineterminator="\n")
    file.writerow([*COLUMNS, *later, *(f"task_{task}" for task in tasks), "out", "error"])
    for row in rows:
        evaluations = [*row["evaluations"], *[{}] * (most - len(row["evaluations"]))]
        scores = {task: score for each in row["evaluations"] for task, score in each["tasks"].items()}
        cells = [row[column] for column in COLUMNS]
        cells += [each.get(key) for each in evaluations[1:] for key in MEASURED]
        cells += [scores.get(task) for task in tasks]
        error = row["error"] and ": ".join(filter(None, (row["error"]["where"], row["error"]["what"])))
        file.writerow(["" if cell is None else cell for cell in [*cells, row["out"], error]])
    return text.getvalue()

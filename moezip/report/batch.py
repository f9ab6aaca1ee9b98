"""A folder that ``moezip run`` made, as runs to compare: one per job, in the recipe's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezip.errors import CheckpointError
from moezip.export.stock import REPORT
from moezip.report.measured import BESIDE, beside_of
from moezip.report.run import Run, open_run, read_object

SUMMARY = "summary.json"
VERSION = 1
# Columns of the summary that stand for keys of a report, for jobs whose folder is gone or never was.
KEYS = {
    "bytes_before": "bytes_before", "bytes": "bytes_after", "bits_per_weight": "bits_per_weight",
    "predicted_nats": "predicted_nats", "seconds": "seconds", "peak_rss_bytes": "peak_rss_bytes", "model": "source",
}  # fmt: skip


def is_batch(folder: Path) -> bool:
    """Whether ``moezip run`` made it: by its summary, or by what jobs leave behind."""
    return (folder / SUMMARY).is_file() or (
        not (folder / REPORT).is_file() and (folder / "recipe.yaml").is_file() and any(folder.glob(f"*{BESIDE}"))
    )


def open_runs(folders: list[Path]) -> list[Run]:
    """Outputs one by one, and all jobs of the folders of ``moezip run``.

    Raises:
        CheckpointError, PlanError: no output of moezip, or damaged files in one.
    """
    runs: list[Run] = []
    for folder in folders:
        runs += open_batch(folder) if is_batch(folder) else [open_run(folder)]
    names = [run.name for run in runs]
    alike = [run.folder is not None and names.count(run.name) > 1 for run in runs]
    return [replace(run, name=str(run.folder)) if same else run for run, same in zip(runs, alike)]


def open_batch(folder: Path) -> list[Run]:
    """
    Raises:
        CheckpointError: no job in it, or damaged files.
        PlanError: a damaged plan.
    """
    if not (folder / SUMMARY).is_file():
        names = sorted(file.name.removesuffix(BESIDE) for file in folder.glob(f"*{BESIDE}"))
        return [_job(folder, {"job": name, "status": "done"}) for name in names]
    data = read_object(folder / SUMMARY)
    rows = data.get("jobs")
    if data.get("version") != VERSION or not isinstance(rows, list):
        raise CheckpointError(
            f"a summary of version {data.get('version')}, this moezip reads {VERSION}", where=folder / SUMMARY,
            next="run the recipe again, or name the jobs' folders",
        )  # fmt: skip
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("job"), str) for row in rows):
        raise CheckpointError("the summary lists no jobs", where=folder / SUMMARY, next="run the recipe again")
    return [_job(folder, row) for row in rows]


def _job(folder: Path, row: Mapping[str, Any]) -> Run:
    """A job's own folder tells most; what is not there is told by the summary."""
    name, place = str(row["job"]), folder / str(row["job"])
    label, state, why = str(row.get("method") or ""), str(row.get("status") or ""), _why(row.get("error"))
    if (place / REPORT).is_file():
        return replace(open_run(place), name=name, label=label, state=state, why=why)
    report = {key: row[column] for column, key in KEYS.items() if row.get(column) is not None}
    missing = ("its folder: experts and plan cannot be shown",) if row.get("out") else ()
    found = beside_of(folder / f"{name}{BESIDE}")
    return Run(name, None, report, evaluations=found, missing=missing, label=label, state=state, why=why)


def _why(error: Any) -> str:
    if not isinstance(error, Mapping):
        return ""
    return ": ".join(str(error[key]) for key in ("where", "what") if error.get(key))

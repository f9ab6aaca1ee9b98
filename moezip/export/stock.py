"""Writes a checkpoint that stock loaders read, with plan, report and manifest, proved complete before it appears."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moezip import __version__
from moezip.checkpoint.source import Source
from moezip.checkpoint.writer import Staging
from moezip.export.verify import MANIFEST, manifest_bytes, require_verified
from moezip.plan.plan import Plan
from moezip.progress import Progress, Watch, unwatched
from moezip.runtime.skipping import MASKS, Skipping

PLAN = "moezip/plan.json"
REPORT = "moezip/report.json"
CARD = "README.md"


def config_bytes(source: Source) -> bytes:
    """``config.json`` of ``source``: the file's own bytes where nothing changed, else its keys in their order."""
    raw = (source.folder / "config.json").read_bytes()
    if json.loads(raw) == source.config:
        return raw
    return (json.dumps(source.config, indent=2, ensure_ascii=False) + "\n").encode()


def tensor_bytes(source: Source) -> int:
    """Sum of all tensors, as stored."""
    return sum(source.spec(name).bytes for name in source.names())


def write_checkpoint(
    view: Source,
    plan: Plan | None,
    out: Path,
    *,
    text: str | None,
    report: Callable[[], str],
    command: str,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> dict[str, str]:
    """Writes ``view``, which is a source through ``plan``, to ``out``: all of it or nothing.

    Args:
        plan: None where nothing was decided, only laid out otherwise.
        text: the model card; None where nothing changed, so that the source's own is copied.
        report: makes ``moezip/report.json`` once everything else is written.
        command: for the manifest.
        extra: further files by relative path.

    Returns:
        SHA-256 by file.

    Raises:
        CheckpointError: output exists, disk full, weights that are not finite, or an output that is not complete.
    """
    total, done = tensor_bytes(view), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch(Progress("write", done, total, "bytes"))

    with Staging(out, source=view.folder, overwrite=overwrite, needed=total, check_finite=True) as stage:
        stage.write_tensors(view, advance)
        stage.add("config.json", config_bytes(view))
        stage.copy_side_files(view.folder, skip=() if text is None else (CARD,))
        if text is not None:
            stage.add(CARD, text.encode())
        if plan is not None:
            stage.add(PLAN, plan.to_json().encode())
        for name, content in {**kept_masks(view), **(extra or {})}.items():
            stage.add(name, content)
        stage.add(REPORT, report().encode())
        facts: dict[str, Any] = {
            "version": __version__,
            "command": command,
            "source": view.fingerprint if plan is None else plan.source,
            "seed": None if plan is None else plan.made_by.get("seed"),
        }
        stage.add(MANIFEST, manifest_bytes(facts, stage.digests))
        watch(Progress("verify", 0, 1, "steps"))
        require_verified(stage.folder, digests=stage.digests, deep=False)
        watch(Progress("verify", 1, 1, "steps"))
        return dict(stage.digests)


def kept_masks(view: Source) -> dict[str, bytes]:
    """The mask networks of a source that skips experts by them, which do not depend on how many experts there are."""
    skipping = Skipping.of(view.config)
    if skipping is None or skipping.rule != "otp" or not (view.folder / MASKS).is_file():
        return {}
    return {MASKS: (view.folder / MASKS).read_bytes()}

"""``moezip/evaluation.json``: what was measured of a checkpoint, kept beside it for its report and its model card.

The manifest leaves the file out, as it does the report: measuring a checkpoint changes nothing of it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moezip.errors import CheckpointError, UsageError
from moezip.export.verify import EVALUATION

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. A measurement takes the place of an earlier one of the same request.

    Attributes:
        data, tasks: absolute paths of text and questions.
        against: folder of the reference, None without one.
        more: names of further measurements that were asked for, such as lm-eval's tasks.
    """

    data: Sequence[Path] = ()
    tasks: Sequence[Path] = ()
    against: Path | None = None
    more: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "data": [str(path.resolve()) for path in self.data],
            "tasks": [str(path.resolve()) for path in self.tasks],
            "against": None if self.against is None else str(self.against.resolve()),
            "more": list(self.more),
        }


def require_place(checkpoint: Path) -> None:
    """Raises UsageError, before anything is measured, if ``checkpoint`` is no folder that moezip wrote.

    Raises:
        CheckpointError: what is saved there is damaged, or a later version's.
    """
    if not (checkpoint / EVALUATION).parent.is_dir():
        raise UsageError(
            "measurements are kept in a checkpoint's folder moezip/, and this one has none: moezip did not write it",
            where=f"--save, {checkpoint}", next="leave --save away and write `--json > FILE` instead",
        )  # fmt: skip
    load(checkpoint)


def load(checkpoint: Path) -> list[dict[str, Any]]:
    """The saved measurements of a checkpoint, oldest first; none where nothing was saved.

    Each is the JSON of ``moezip evaluate --json`` (``Evaluation.to_json``) and, beside it, ``date`` (ISO 8601, UTC),
    ``command`` (as typed), ``data`` (names of files or folders), ``against_path`` (null without a reference) and
    ``request`` (``Request.to_json``).

    Raises:
        CheckpointError: the file is damaged, or a later version's.
    """
    file = checkpoint / EVALUATION
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as fault:
        raise CheckpointError(
            f"the saved measurements cannot be read ({fault})", where=file, next="delete the file and measure again"
        ) from fault
    entries = found.get("evaluations") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(
            "the file holds no list of measurements", where=file, next="delete the file and measure again"
        )
    if found.get("version") != SCHEMA:
        raise CheckpointError(
            f"the saved measurements are of version {found.get('version')}, this moezip knows {SCHEMA}", where=file,
            next="use the newer moezip, or delete the file and measure again",
        )  # fmt: skip
    return entries


def save(checkpoint: Path, result: Mapping[str, Any], request: Request, command: str) -> None:
    """Adds the JSON of an evaluation to those saved, in place of an earlier one of the same request.

    The file is replaced in one step: readers and interruptions find the old one or the new one.

    Raises:
        UsageError: ``checkpoint`` is no folder that moezip wrote.
        CheckpointError: what is there is damaged, or the folder cannot be written to.
    """
    require_place(checkpoint)
    asked = request.to_json()
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "data": [path.name for path in map(Path, asked["data"])],
        "against_path": None if request.against is None else str(request.against),
        "request": asked,
        **result,
    }
    entries = [*(each for each in load(checkpoint) if each.get("request") != asked), entry]
    file = checkpoint / EVALUATION
    text = json.dumps({"version": SCHEMA, "evaluations": entries}, indent=2, ensure_ascii=False) + "\n"
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
        ) as stream:
            temporary = Path(stream.name)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(file)
    except OSError as fault:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"the measurements cannot be saved: {fault.strerror}", where=file,
            next="make the folder writable, or leave --save away and write `--json > FILE`",
        ) from fault  # fmt: skip


def _umask() -> int:
    """The process's mask of file permissions, which temporary files ignore."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

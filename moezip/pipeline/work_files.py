"""What a run has solved so far: files in a work folder, and the digest of the job that they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moezip.errors import MoezipError

if TYPE_CHECKING:
    import torch

FACTS = "moezip"  # the entry of a file's metadata that says what else is known of its tensors


class WorkFiles:
    """Files of tensors with facts beside them, each whole or not there. ``STATE`` names the file of the digest."""

    STATE: ClassVar[str]

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job

    def begin(self, resume: bool) -> None:
        """Makes the folder ready; keeps what is there only to go on from it.

        Raises:
            MoezipError: asked to go on, and what is there is of another job.
        """
        state = self.folder / self.STATE
        if resume and state.is_file():
            if json.loads(state.read_text()).get("job") != self.job:
                raise MoezipError(
                    "the work folder holds interrupted work on another checkpoint, other data or other settings",
                    where=self.folder,
                    next="repeat the interrupted command unchanged, or start afresh without --resume",
                )
            return
        self.clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = state.with_suffix(".part")
        temporary.write_text(json.dumps({"job": self.job}))
        temporary.replace(state)

    def write(self, file: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """All of it or nothing."""
        from safetensors.torch import save_file

        temporary = file.with_suffix(".part")
        save_file(dict(tensors), temporary, {FACTS: json.dumps(facts)})
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)

    def facts_of(self, file: Path) -> dict[str, Any]:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            found: dict[str, Any] = json.loads(opened.metadata()[FACTS])
        return found

    def clear(self) -> None:
        """Removes what is there, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for file in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.part"), self.folder / self.STATE):
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

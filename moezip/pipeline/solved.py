"""What is solved waits in the work folder, one file per layer: codes, and what solving them came to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.arch.packing import WEIGHT, stem
from moezip.errors import MoezipError
from moezip.formats.packed import Grid, encode
from moezip.quantize.solution import Solution

if TYPE_CHECKING:
    import torch

STATE = "quantize.json"
FACTS = "moezip"  # key of a layer file's metadata


@dataclass(slots=True)
class LayerReport:
    """What solving one layer came to.

    Attributes:
        error: summed mean squared output error of its matrices. matrices: how many were solved.
        basis: how many have a hessian of their ``own`` tokens, ``mixed`` with, or ``pooled`` from all of the layer's,
            or ``none``. raised: how many needed more damping than was asked for.
        grids: the grid of every matrix, by name.
    """

    error: float = 0.0
    matrices: int = 0
    basis: dict[str, int] = field(default_factory=dict)
    raised: int = 0
    grids: dict[str, str] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        self.error += found.error
        self.matrices += 1
        self.basis[found.basis] = self.basis.get(found.basis, 0) + 1
        self.raised += found.raised
        self.grids[found.name] = found.grid


class Solved:
    """Layer files in a work folder, and the digest of the job that they belong to."""

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job

    def begin(self, resume: bool) -> None:
        """Makes the folder ready; keeps what is there only to go on from it.

        Raises:
            MoezipError: asked to go on, and what is there is of another job.
        """
        state = self.folder / STATE
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

    def file(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], report: LayerReport) -> None:
        """All of a step's codes or none."""
        from safetensors.torch import save_file

        temporary = self.folder / f"{step}.part"
        save_file(dict(tensors), temporary, {FACTS: json.dumps(asdict(report))})
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(self.file(step))

    def load(self, step: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.file(step)))

    def report(self, step: str) -> LayerReport:
        from safetensors import safe_open

        with safe_open(self.file(step), "pt") as opened:
            return LayerReport(**json.loads(opened.metadata()[FACTS]))

    def clear(self) -> None:
        """Removes what is there, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for file in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.part"), self.folder / STATE):
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def job_digest(*parts: object) -> str:
    """Digest of everything that the codes depend on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Found:
    """One solved matrix.

    Attributes:
        stored: its tensors, by their names on disk. grid, error, raised: as of its ``Solution``.
        basis: as of ``LayerReport``.
    """

    name: str
    stored: dict[str, torch.Tensor]
    grid: str
    error: float
    raised: bool
    basis: str

    @classmethod
    def of(cls, name: str, solution: Solution, basis: str) -> Found:
        """In the thread that solved it, so that packing is shared out as well."""
        stored = {stem(name) + suffix: value for suffix, value in encode(solution.codes).items()}
        return cls(name, stored, str(solution.codes.grid), solution.error, solution.raised, basis)


def by_matrix(
    tensors: Mapping[str, torch.Tensor], report: LayerReport
) -> dict[str, tuple[Grid, dict[str, torch.Tensor]]]:
    """The stored tensors of a layer file by matrix, each with its grid."""
    found = {}
    for name, text in report.grids.items():
        prefix = stem(name)
        found[name] = (
            Grid.parse(text),
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix + WEIGHT)},
        )
    return found

"""What is solved waits in the work folder, one file per layer: codes, and what solving them came to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.arch.packing import WEIGHT, stem
from moezip.formats.packed import Grid, encode
from moezip.pipeline.work_files import WorkFiles
from moezip.quantize.solution import Solution

if TYPE_CHECKING:
    import torch



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


class Solved(WorkFiles):
    """Codes in a work folder, one file per layer."""

    STATE = "quantize.json"

    def file(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], report: LayerReport) -> None:
        """All of a step's codes or none."""
        self.write(self.file(step), tensors, asdict(report))

    def load(self, step: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.file(step)))

    def report(self, step: str) -> LayerReport:
        return LayerReport(**self.facts_of(self.file(step)))


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

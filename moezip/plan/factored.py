"""A merged view with some matrices stored as factors: the same interface as reading from disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from moezip.arch.factoring import KEY, folded
from moezip.arch.packing import stem
from moezip.arch.spec import Architecture, ExpertTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError, PlanError
from moezip.formats.factors import Factors
from moezip.plan.merged import Merged, factor_value
from moezip.plan.packed import Values
from moezip.plan.plan import Plan

if TYPE_CHECKING:
    import torch


@final
class Factored:
    """``base`` with the matrices that its plan lists stored as factors, in moezip's own format.

    Args:
        base: the plan's merged view, one tensor per expert and matrix (``split``).
        values: where the factors are, by ``moezip.plan.merged`` names; None for a view of shapes alone.

    Raises:
        PlanError: the plan names a matrix that is no expert's.
    """

    def __init__(self, base: Merged, values: Values | None = None):
        self._base, self._values = base, values
        self._specs: dict[str, TensorSpec] = {}
        self._origin: dict[str, str] = {}  # of a stored factor: the name of its value
        stored = base.architecture.split
        if missing := set(self.plan.factors) - set(base.names()):
            raise PlanError(
                f"the plan's factors name {min(missing)}, which the checkpoint does not have", where=base.folder,
                next="use the plan with the checkpoint that it was made for",
            )  # fmt: skip
        for name in base.names():
            spec = base.spec(name)
            if name not in self.plan.factors:
                self._specs[name] = spec
                continue
            claim = stored.claim(name, base.config)
            if not isinstance(claim.tensor, ExpertTensor) or claim.layer is None or claim.expert is None:
                raise PlanError(f"the plan's factors name {name}, which is no matrix of an expert", where=base.folder)
            rows, columns = spec.shape
            for suffix, (dtype, shape) in self.plan.factors[name].specs(rows, columns, spec.dtype).items():
                piece = stem(name) + suffix
                self._specs[piece] = TensorSpec(piece, dtype, shape, spec.file)
                self._origin[piece] = factor_value(claim.layer, claim.expert, claim.tensor.role, suffix)
        own = {**base.config["quantization_config"], KEY: folded(self.plan.factors)}
        self._config = {**base.config, "quantization_config": own}

    @property
    def plan(self) -> Plan:
        return self._base.plan

    @property
    def architecture(self) -> Architecture:
        """The source's own."""
        return self._base.architecture

    @property
    def source_config(self) -> dict[str, Any]:
        """The config of what the plan is applied to."""
        return self._base.source_config

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor is the source's."""
        return False

    # -- Source ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._base.folder

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._base.fingerprint} {self._config['quantization_config']}".encode()).hexdigest()

    def names(self) -> list[str]:
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise CheckpointError(f"the factored checkpoint has no tensor {name}", where=self.folder)
        return self._specs[name]

    def metadata(self, file: str) -> dict[str, str]:
        return self._base.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        def described(source: Source) -> list[TensorSpec]:
            return [spec for spec in map(source.spec, source.names()) if spec.file == file]

        return self._base.raw_header(file) if described(self) == described(self._base) else None

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        import torch

        spec = self.spec(name)
        if name not in self._origin:
            return self._base.read(name, rows)
        if self._values is None:
            raise CheckpointError(f"{name} is not solved yet", where=self.folder)
        found = self._values.read(self._origin[name])
        if tuple(found.shape) != spec.shape:
            raise PlanError(
                f"the value {self._origin[name]} has shape {tuple(found.shape)}, the plan implies {spec.shape}",
                where=self.folder,
                next="use the plan with the values that it was made with",
            )
        if found.dtype != torch.int32:
            base = stem_name(name)
            found = found.to(self._base.read(base, range(0)).dtype)
        return found if rows is None else found[rows.start : rows.stop]

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        import torch

        if name not in self._origin:
            yield from self._base.chunks(name, rows)
            return
        yield memoryview(self.read(name, rows).contiguous().view(torch.uint8).numpy().tobytes())


def factors_in(values: Values, names: Sequence[str], architecture: Architecture) -> dict[str, Factors]:
    """The matrices whose factors are among the values called ``names``, and their sizes.

    Args:
        architecture: of the source.
    """
    templates = {tensor.role: tensor.template for tensor in architecture.split.experts}
    found, known = {}, set(names)
    for name in names:
        if match := re.fullmatch(r"layers\.(\d+)\.experts\.(\d+)\.(\w+)\.left", name):
            rows = name.removesuffix("left") + "rows"
            kept = values.read(rows).shape[0] if rows in known else 0
            matrix = templates[match[3]].format(layer=match[1], expert=match[2])  # type: ignore[index]
            found[matrix] = Factors(values.read(name).shape[1], kept)
    return found


def stem_name(piece: str) -> str:
    """The name of the matrix that a stored factor belongs to."""
    return piece.rpartition(".")[0] + ".weight"

"""Matrices that are factors in memory too, and the experts made of them.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.arch.ragged import Matrix, RaggedExperts
from moezip.arch.spec import Architecture
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError
from moezip.formats.factors import INDEX, Factors, product, require_sound
from moezip.runtime.packing import AGAIN, Names


class FactoredMatrix(nn.Module):
    """Holds one matrix [R, C] as ``moezip.formats.factors`` does, under the names on disk, and one ``bias`` or None.

    Args:
        size: of the factors. rows, columns: R, C.
        bias: of the matrix that it replaces.
        kind: ``dtype`` and ``device`` of the factors.
    """

    weight_left: nn.Parameter
    weight_right: nn.Parameter
    weight_rows: nn.Parameter | None
    weight_rows_index: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, size: Factors, rows: int, columns: int, bias: nn.Parameter | None, **kind: Any):
        super().__init__()
        self.size, self.rows, self.columns = size, rows, columns
        for suffix, (_, shape) in size.specs(rows, columns, "").items():
            if suffix == INDEX:
                self.register_buffer(suffix, torch.empty(shape, dtype=torch.int32, device=kind.get("device")))
            else:
                self.register_parameter(suffix, nn.Parameter(torch.empty(shape, **kind)))
        self.register_parameter("bias", bias)

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, {self.size}"

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` [..., C] to [..., R]."""
        return product(value, self.tensors(), self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix."""
        return {suffix: getattr(self, suffix) for suffix in self.size.specs(1, 1, "")}

    def require_sound(self, where: str) -> None:
        """Raises CheckpointError if the places of the rows cannot be those of this matrix."""
        require_sound(self.tensors(), where)


class FactoredExperts(RaggedExperts):
    """``RaggedExperts`` some of whose matrices are ``FactoredMatrix``."""

    def expert_linear(self, name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
        if not self.widths[expert]:
            return super().expert_linear(name, expert, value)
        matrices = [self.matrix(expert, role) for role in (("gate", "up") if name == "gate_up_proj" else ("down",))]
        if not any(isinstance(matrix, FactoredMatrix) for matrix in matrices):
            return super().expert_linear(name, expert, value)
        parts = [
            matrix(value) if isinstance(matrix, FactoredMatrix) else F.linear(value, matrix.weight, matrix.bias)
            for matrix in matrices
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def make_factored(model: Any, architecture: Architecture, plain: Source, factors: Mapping[str, Factors]) -> None:
    """Puts ``FactoredMatrix`` in place of the matrices that the checkpoint stores as factors.

    Args:
        model: on the meta device, with ``FactoredExperts``.
        plain: the checkpoint with these matrices multiplied out, for shapes.
        factors: by the names of the matrices.

    Raises:
        ArchitectureError: a name is no matrix of an expert, or one of another shape.
    """
    names, places = Names(model, architecture), dict(model.state_dict())
    for name, size in factors.items():
        path = names.target(name, plain.config, places).removesuffix(".weight")
        try:
            old = model.get_submodule(path)
        except AttributeError:
            old = None
        shape = plain.spec(name).shape
        if not isinstance(old, Matrix) or old.weight is None or tuple(old.weight.shape) != shape:
            raise ArchitectureError(
                f"{name} is stored as factors of {list(shape)}, but the model has no such matrix of an expert",
                where="config.json",
                next=AGAIN,
            )
        place = old.weight
        made = FactoredMatrix(size, place.shape[0], place.shape[1], old.bias, dtype=place.dtype, device=place.device)
        made.train(old.training)
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent).add_module(leaf, made)

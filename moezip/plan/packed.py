"""A source with some of its matrices replaced by packed codes: the same interface as reading from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from moezip.arch.layout import own_format
from moezip.arch.packing import KEY, Packing, folded, stem
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError, PlanError
from moezip.formats.packed import SHAPE

if TYPE_CHECKING:
    import torch


class Values(Protocol):
    """Where solved codes are: tensors by name. A ``Checkpoint`` is one, ``LayerFiles`` another."""

    def names(self) -> list[str]: ...

    def read(self, name: str, rows: range | None = None) -> torch.Tensor: ...


@final
class LayerFiles:
    """The codes that a run leaves in its work folder, one file per step.

    Args:
        folder: with files ``*.safetensors``, none of them half-written.
        pattern: of the names of those that are meant.

    Raises:
        CheckpointError: a file that is none of that format.
    """

    def __init__(self, folder: Path, pattern: str = "*.safetensors"):
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Path] = {}
        self._open: tuple[Path | None, Any] = (None, None)  # the file that was read last: its neighbours are next
        for file in sorted(folder.glob(pattern)):
            try:
                with safe_open(file, "pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as fault:
                raise CheckpointError(
                    f"the file is damaged ({fault})", where=file, next="make it again, or start without --resume"
                ) from fault

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Raises CheckpointError if there is no such tensor."""
        from safetensors import safe_open

        if name not in self._files:
            raise CheckpointError(f"there are no codes {name}", next="start afresh without --resume")
        file = self._files[name]
        held, opened = self._open
        if held != file:
            opened = safe_open(file, "pt")
            self._open = (file, opened)
        found: torch.Tensor = (
            opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows.start : rows.stop]
        )
        return found


@final
class Unsolved:
    """Stands for codes that are not there yet, so that a choice of grids can be checked: shapes, and no codes.

    Args:
        base: the matrices. packing: which will be packed, and on which grids.
    """

    def __init__(self, base: Source, packing: Packing):
        self._shapes = {stem(name) + SHAPE: base.spec(name).shape for name in packing}
        self._names = [stem(n) + suffix for n, grid in packing.items() for suffix in grid.specs(*base.spec(n).shape)]

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """The shape of a matrix. Raises CheckpointError for anything else."""
        import torch

        if name not in self._shapes:
            raise CheckpointError(f"{name} is not solved yet")
        return torch.tensor(self._shapes[name])


@final
class Packed:
    """``base`` with the matrices of ``packing`` stored as codes, in moezip's own format.

    Args:
        base: plain tensors in moezip's own format (``Applied(..., split=True)``), or with ``quantization`` in the
            family's, one per expert and matrix.
        packing: which matrices, and their grids. Shapes are the base's.
        values: where the codes are, under the names that they will have.
        quantization: the ``quantization_config`` to write, for a format of others; default moezip's own.

    Raises:
        PlanError: the packing names a matrix that is not there.
        CheckpointError: codes are missing.
    """

    def __init__(self, base: Source, packing: Packing, values: Values, quantization: Mapping[str, Any] | None = None):
        self._base, self._packing, self._values = base, dict(packing), values
        self._specs: dict[str, TensorSpec] = {}
        self._held = set(values.names())
        missing = set(packing) - set(base.names())
        if missing:
            raise PlanError(
                f"the packing names {min(missing)}, which the checkpoint does not have", where=base.folder,
                next="use the plan with the checkpoint that it was made for",
            )  # fmt: skip
        self._own: set[str] = set()
        for name in base.names():
            spec = base.spec(name)
            if name not in packing:
                self._specs[name] = spec
                continue
            for suffix, (dtype, shape) in packing[name].specs(*spec.shape).items():
                packed = stem(name) + suffix
                if packed not in self._held:
                    raise CheckpointError(f"there are no codes {packed}", where=base.folder)
                self._specs[packed] = TensorSpec(packed, dtype, shape, spec.file)
                self._own.add(packed)
        self._config = dict(base.config)
        if quantization is not None:
            self._config["quantization_config"] = dict(quantization)
        else:
            assert own_format(base.config), "without a tripwire, loaders would fill the packed matrices by chance"
            self._config["quantization_config"] = {**base.config["quantization_config"], KEY: folded(self._packing)}

    @property
    def packing(self) -> dict[str, Any]:
        """Which matrices are codes, and their grids."""
        return dict(self._packing)

    @property
    def base(self) -> Source:
        """What the codes are laid over."""
        return self._base

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
            raise CheckpointError(f"the packed checkpoint has no tensor {name}", where=self.folder)
        return self._specs[name]

    def metadata(self, file: str) -> dict[str, str]:
        return self._base.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        mine = [spec for spec in self._specs.values() if spec.file == file]
        theirs = [spec for spec in map(self._base.spec, self._base.names()) if spec.file == file]
        return self._base.raw_header(file) if mine == theirs else None

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        spec = self.spec(name)
        if name not in self._own:
            return self._base.read(name, rows)
        found = self._values.read(name, rows)
        if rows is None and tuple(found.shape) != spec.shape:
            raise CheckpointError(
                f"the codes {name} have shape {tuple(found.shape)}, the plan implies {spec.shape}",
                where=self.folder,
                next="start afresh without --resume, or use the plan with the codes it was made with",
            )
        if rows is None and name.endswith(SHAPE):
            rows_columns = tuple(self._base.spec(name.removesuffix(SHAPE) + "weight").shape)
            if tuple(found.tolist()) != rows_columns:
                raise CheckpointError(f"{name} says {found.tolist()}, the matrix is {rows_columns}", where=self.folder)
        return found

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        import torch

        if name in self._own:
            yield memoryview(self.read(name, rows).contiguous().view(torch.uint8).numpy().tobytes())
        else:
            yield from self._base.chunks(name, rows)

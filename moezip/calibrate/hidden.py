"""Where hidden states wait between decoder layers: in memory, or in a file when they outgrow the budget."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.errors import MoezipError

if TYPE_CHECKING:
    import torch


class HiddenStates:
    """[N, S, D] hidden states, read and written a few rows at a time.

    Args:
        shape: N, S, D.
        dtype: of the model.
        file: memory-mapped file to keep them in; None keeps them in memory. The file is mapped anew for every access,
            because pages of a standing map would count as resident memory and grow to the whole file.
        there: the file is complete and is gone on with; else it is made anew.

    Raises:
        MoezipError: too little disk, or a file that should be there is not, or has another size.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, file: Path | None = None, *, there: bool = False
    ):
        import torch

        self.shape, self.dtype, self.file = shape, dtype, file
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize
        self._memory: torch.Tensor | None = None
        if file is None:
            self._memory = torch.empty(shape, dtype=dtype)
            return
        if there:
            self._require(file)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(file.parent).free
        if self.bytes > free:
            raise MoezipError(
                f"hidden states need {self.bytes / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free",
                where=file.parent,
                next="name another --workdir, or calibrate with fewer --tokens",
            )
        with file.open("wb") as out:
            out.truncate(self.bytes)

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def _map(self, start: int, stop: int) -> torch.Tensor:
        import numpy as np
        import torch

        assert self.file is not None
        view = np.memmap(
            self.file, np.uint8, "r+", offset=start * self.row_bytes, shape=((stop - start) * self.row_bytes,)
        )  # fmt: skip
        return torch.from_numpy(view).view(self.dtype).view(stop - start, *self.shape[1:])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` [n, S, D]; not to be written to."""
        return self._memory[start:stop] if self._memory is not None else self._map(start, stop).clone()

    def write(self, start: int, stop: int, rows: torch.Tensor) -> None:
        """Replaces rows ``start`` to ``stop``."""
        target = self._memory[start:stop] if self._memory is not None else self._map(start, stop)
        target.copy_(rows)

    def gather(self, positions: Any) -> torch.Tensor:
        """Single positions [n] of the flattened [N * S, D], in that order, in fresh memory."""
        import numpy as np
        import torch

        if self._memory is not None:
            return self._memory.flatten(0, 1)[torch.from_numpy(np.ascontiguousarray(positions, np.int64))]
        assert self.file is not None
        size = self.shape[2] * self.dtype.itemsize
        view = np.memmap(self.file, np.uint8, "r", shape=(self.shape[0] * self.shape[1], size))
        return torch.from_numpy(np.asarray(view[positions])).view(self.dtype)

    def save(self, file: Path, step: int = 64) -> None:
        """Copies all rows to ``file``, forced to disk."""
        import os

        with file.open("wb") as out:
            for start in range(0, self.shape[0], step):
                rows = self.read(start, min(start + step, self.shape[0]))
                out.write(memoryview(_bytes(rows)))
            out.flush()
            os.fsync(out.fileno())

    def restore(self, file: Path) -> None:
        """Takes all rows from a file that ``save`` wrote. Raises MoezipError if it has another size."""
        import numpy as np
        import torch

        self._require(file)
        for start in range(self.shape[0]):
            row = np.fromfile(file, np.uint8, self.row_bytes, offset=start * self.row_bytes)
            self.write(start, start + 1, torch.from_numpy(row).view(self.dtype).view(1, *self.shape[1:]))

    def _require(self, file: Path) -> None:
        """Raises MoezipError unless ``file`` is there with as many bytes as these hidden states have."""
        size = file.stat().st_size if file.is_file() else 0
        if size != self.bytes:
            raise MoezipError(
                f"saved hidden states have {size} bytes, {self.bytes} were expected", where=file,
                next="start afresh without --resume",
            )  # fmt: skip

    def copy_from(self, other: HiddenStates) -> None:
        """Takes all rows of another of the same shape and dtype; between files without passing through memory."""
        if self.file is not None and other.file is not None:
            shutil.copyfile(other.file, self.file)
            return
        for start in range(self.shape[0]):
            self.write(start, start + 1, other.read(start, start + 1))

    def sync(self) -> None:
        """Forces the file to disk, so that it outlives the process and the machine."""
        import os

        if self.file is not None:
            with self.file.open("rb+") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Gives memory and file back."""
        self._memory = None
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _bytes(rows: torch.Tensor) -> bytes:
    import torch

    return rows.contiguous().view(torch.uint8).numpy().tobytes()

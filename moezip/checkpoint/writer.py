"""Writing checkpoints so that an output folder either is complete or does not exist.

Everything goes to a hidden folder beside the output, on the same filesystem; one rename makes it the output. Whatever
happens before (an exception, Ctrl-C, a full disk, kill -9) leaves no folder that a loader would take for a model.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType

from moezip.checkpoint.finite import FiniteCheck
from moezip.checkpoint.header import build_header
from moezip.checkpoint.index import index_bytes, output_names, read_index
from moezip.checkpoint.reader import CONFIG_NAME, INDEX_NAME
from moezip.checkpoint.side_files import file_pieces, side_files
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError

IN_FLIGHT = 3  # chunks between reading and the slower of hashing and writing
HELD = 64 << 20  # bytes: headers, side files and index, beside the tensors


class Staging:
    """A checkpoint in the making, as a context manager: a clean exit publishes it, any exception removes it.

    Args:
        output: the folder to be made. Its parents are created.
        source: the folder that is read; writing into, over or around it is refused.
        overwrite: replace an existing output, which is deleted only once the new one is in its place.
        needed: bytes that the output will take, checked against the free space before anything is written.
        check_finite: refuse NaN and infinity in any floating tensor that is written.

    Attributes:
        folder: where the files are until they are published; readable by a ``Checkpoint`` once all are written.
        digests: relative posix path -> SHA-256 of every file written, taken while writing.

    Raises (on entering):
        CheckpointError: the output exists, overlaps the source, or does not fit on the disk.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        source: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        needed: int = 0,
        check_finite: bool = False,
    ):
        path = Path(os.path.abspath(output))
        self.output = path.parent.resolve() / path.name
        self._overwrite, self._needed, self._check_finite = overwrite, needed, check_finite
        self._source = None if source is None else Path(source).resolve()
        self.digests: dict[str, str] = {}
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.folder = self._beside("staging")
        self._lock: int | None = None
        self._written = 0
        self._published = False
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    def _beside(self, kind: str) -> Path:
        return self.output.with_name(f".{self.output.name}.moezip-{kind}-{self._token}")

    def __enter__(self) -> Staging:
        self.refuse_output()
        with self._disk(self.output.parent):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._clear_stale()
            self.refuse_output()  # again: an output that a killed run had moved aside may be back
        self.require_space(self._needed)
        with self._disk(self.folder):
            self.folder.mkdir()
            self._lock = _lock(self.folder)
        self._pools = (ThreadPoolExecutor(1, "moezip-hash"), ThreadPoolExecutor(1, "moezip-write"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._published:
                self.publish()
        finally:
            for pool in self._pools or ():
                pool.shutdown(cancel_futures=True)
            if not self._published:
                shutil.rmtree(self.folder, ignore_errors=True)
                if self.folder.exists() and error is not None:
                    error.add_note(f"the unfinished files could not be removed: {self.folder}")
            if self._lock is not None:
                os.close(self._lock)

    # -- refusals -------------------------------------------------------------------------------------------

    def refuse_output(self) -> None:
        """Raises CheckpointError if the output is where something else is; may be asked before any work."""
        real = self.output.resolve()
        if self._source is not None and (
            real == self._source
            or real in self._source.parents
            or self._source in real.parents
            or (real.exists() and self._source.exists() and real.samefile(self._source))
        ):
            raise CheckpointError(
                f"the output would be written where the source is read ({self._source})",
                where=self.output,
                next="choose an output folder beside the source, not the same, inside it, or around it",
            )
        if not os.path.lexists(self.output):
            return
        if not self.output.is_dir():
            raise CheckpointError("the output exists and is no folder", where=self.output, next="choose another name")
        if not self._overwrite:
            raise CheckpointError(
                "the output folder exists",
                where=self.output,
                next="choose another, or pass --overwrite to replace it",
            )
        if any(self.output.iterdir()) and not (self.output / CONFIG_NAME).exists():
            raise CheckpointError(
                f"the folder to be overwritten has no {CONFIG_NAME}, so it does not look like a model",
                where=self.output,
                next="check the path; if it is right, delete the folder yourself",
            )

    def require_space(self, needed: int) -> None:
        """Raises CheckpointError where the disk has less than ``needed`` bytes free."""
        free = shutil.disk_usage(self.output.parent).free
        if free < needed:
            raise CheckpointError(
                f"not enough disk space: {needed:,} bytes are needed, {free:,} are free",
                where=self.output.parent,
                next="free some space, or choose an output on another disk",
            )

    def _disk(self, where: Path) -> _DiskErrors:
        return _DiskErrors(self, where)

    def _clear_stale(self) -> None:
        """Remove what killed runs left beside this output; put an old output back that one had moved aside."""
        ours = re.compile(re.escape(f".{self.output.name}.moezip-") + r"(staging|old)-\d+-[0-9a-f]{8}")
        for path in sorted(self.output.parent.iterdir()):
            match = ours.fullmatch(path.name)
            if not match or (held := _lock(path)) is None:
                continue
            try:
                if match[1] == "old" and not os.path.lexists(self.output):
                    path.rename(self.output)
                else:
                    _remove(path)
            finally:
                os.close(held)

    # -- files ----------------------------------------------------------------------------------------------

    def write_tensors(self, source: Source, progress: Callable[[int], None] | None = None) -> None:
        """Write every tensor of ``source``, shard by shard as the specs say, then the index.

        Shards that became empty are dropped and the rest renumbered. Memory: a few chunks of the source.

        Args:
            source: what to write; its ``raw_header`` decides between the stored and the canonical header.
            progress: called with the number of bytes just handed to the disk.

        Raises:
            CheckpointError: the disk is full, the source cannot be read, or (``check_finite``) NaN or infinity.
        """
        shards: dict[str, list[TensorSpec]] = {}
        for name in source.names():
            spec = source.spec(name)
            shards.setdefault(spec.file, []).append(spec)
        if not shards:
            raise CheckpointError("there is no tensor to write", where=source.folder)
        total = sum(spec.bytes for specs in shards.values() for spec in specs)
        self._needed = max(self._needed, total)
        self.require_space(total - self._written)
        old_index = read_index(source.folder)
        names = output_names(list(shards), old_index)
        for file, specs in shards.items():
            header = source.raw_header(file)
            if header is None:
                header = build_header(specs, source.metadata(file))
            self._store(names[file], _pieces(source, header, specs), progress)
        if old_index is not None or len(shards) > 1:
            weight_map = {spec.name: names[file] for file, specs in shards.items() for spec in specs}
            self.add(INDEX_NAME, index_bytes(old_index, weight_map, total))

    def add(self, name: str, content: bytes) -> None:
        """Write one small file, ``name`` relative to the output (``config.json``, ``moezip/plan.json``)."""
        self._store(name, [(None, memoryview(content))])

    def copy_side_files(self, folder: str | os.PathLike[str], skip: Collection[str] = ()) -> list[str]:
        """Carry over every file of the source that is not weights, sub-folders included; returns their names.

        Files that were written already, those in ``skip`` (relative posix paths), ``moezip/`` and the folders of
        version control and caches stay behind. Links to files are followed, links to folders are not.

        Raises:
            CheckpointError: a side file cannot be read, or the disk is full.
        """
        root, copied = Path(folder), []
        for path in side_files(root):
            name = path.relative_to(root).as_posix()
            if name not in self.digests and name not in skip:
                self._store(name, file_pieces(path))
                copied.append(name)
        return copied

    def _store(
        self,
        name: str,
        pieces: Iterable[tuple[TensorSpec | None, memoryview]],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write one file under a temporary name, hashing it in one thread and writing it in another while the next
        piece is read; then fsync and rename."""
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise CheckpointError(f"{name!r} is not a name inside the output folder", where=self.output)
        if name in self.digests:
            raise CheckpointError(f"{name} would be written twice", where=self.output)
        if self._pools is None:
            raise CheckpointError("a staging folder must be entered (with ...) before it is written", where=self.output)
        hashing, writing = self._pools
        path = self.folder / relative
        digest, finite = hashlib.sha256(), _FinitePieces(self._check_finite)
        in_flight: deque[tuple[Future[None], Future[None]]] = deque()
        with self._disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.part")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

            def write(spec: TensorSpec | None, piece: memoryview) -> None:
                finite.update(spec, piece)  # here, because hashing is the slower of the two threads
                done = 0
                while done < len(piece):
                    done += os.write(descriptor, piece[done:])

            def settle(remaining: int) -> None:
                while len(in_flight) > remaining:
                    for future in in_flight.popleft():
                        future.result()

            try:
                for spec, piece in pieces:
                    if not piece.nbytes:
                        continue  # memoryview.cast refuses empty views
                    flat = piece.cast("B")
                    in_flight.append((hashing.submit(digest.update, flat), writing.submit(write, spec, flat)))
                    settle(IN_FLIGHT)
                    self._written += len(flat)
                    if progress is not None and spec is not None:
                        progress(len(flat))
                settle(0)
                os.fsync(descriptor)
            finally:
                # Nothing may still use the descriptor when it is closed: its number could be another file's by then.
                for future in (future for pair in in_flight for future in pair):
                    if not future.cancel():
                        future.exception()
                os.close(descriptor)
            partial.rename(path)
        self.digests[name] = digest.hexdigest()

    def publish(self) -> None:
        """Flush the folder and rename it to the output. A clean exit of the ``with`` block calls this."""
        with self._disk(self.output):
            for folder, _, _ in os.walk(self.folder):
                _fsync_folder(Path(folder))
            self.refuse_output()
            aside = self._beside("old")
            replaces = os.path.lexists(self.output)
            held = _lock(self.output) if replaces else None  # so that nobody takes it for a dead process's
            try:
                if replaces:
                    self.output.rename(aside)
                try:
                    self.folder.rename(self.output)
                except BaseException:
                    if replaces:
                        aside.rename(self.output)
                    raise
                self._published = True
                _fsync_folder(self.output.parent)
                if replaces:
                    _remove(aside)
            finally:
                if held is not None:
                    os.close(held)


class _DiskErrors:
    """Turns what the operating system says about a disk into a CheckpointError with the numbers."""

    def __init__(self, staging: Staging, where: Path):
        self._staging, self._where = staging, where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError):
            return
        staging = self._staging
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = max(staging._needed, staging._written)
            raise CheckpointError(
                f"the disk is full: the output needs {needed:,} bytes in all and the disk filled up after about "
                f"{staging._written:,}; the unfinished files were removed",
                where=staging.output.parent,
                next="free some space, or choose an output on another disk",
            ) from error
        raise CheckpointError(
            f"cannot write: {error.strerror}", where=self._where, next="check the permissions and the disk"
        ) from error


class _FinitePieces:
    """The finiteness check over the pieces of one file after another tensor's."""

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._spec: TensorSpec | None = None
        self._check = FiniteCheck("")

    def update(self, spec: TensorSpec | None, piece: memoryview) -> None:
        if not self._wanted or spec is None:
            return
        if spec is not self._spec:
            self._spec, self._check = spec, FiniteCheck(spec.dtype)
        self._check.update(piece)
        if self._check.bad:
            raise CheckpointError(
                f"the tensor {spec.name} holds NaN or infinity",
                where=spec.file,
                next="the checkpoint is damaged: a model with such a weight answers nonsense; download it again",
            )


def _pieces(source: Source, header: bytes, specs: list[TensorSpec]) -> Iterator[tuple[TensorSpec | None, memoryview]]:
    yield None, memoryview(header)
    for spec in specs:
        given = 0
        for piece in source.chunks(spec.name):
            given += piece.nbytes
            yield spec, piece
        if given != spec.bytes:
            raise CheckpointError(f"{spec.name} should take {spec.bytes} bytes, but its source gave {given}")


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder, None where another process does. The system lets go when a process
    dies however it dies, so a folder that can be locked is nobody's (process ids, in contrast, are used again)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

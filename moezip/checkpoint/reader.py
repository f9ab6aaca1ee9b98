"""Reading safetensors checkpoints: one tensor, or some rows of it, at a time.

Files are read into fresh memory and never mapped: mapped pages would count as the process's own memory, and a
checkpoint larger than the memory is the normal case.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

from moezip.checkpoint.header import DOWNLOAD_AGAIN, Entry, Header, parse_object, read_header
from moezip.checkpoint.source import TensorSpec
from moezip.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth")
CHUNK = 8 << 20  # bytes: large enough for a disk's full speed, small enough to hold a few
LARGEST_READ = 1 << 30  # Linux caps one read below 2 GiB
FINGERPRINTED = 64 << 10  # bytes of each shard's data

TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


@final
class Checkpoint:
    """A checkpoint folder on disk; a ``Source``. Reads may run in several threads at once.

    Open it with ``Checkpoint.open(folder)``: every header is checked and the index compared with the shards before
    anything else, so that a tensor that has a spec can be read.
    """

    def __init__(self, folder: Path, config_bytes: bytes, index_bytes: bytes | None, headers: dict[str, Header]):
        self._folder = folder
        self.config_bytes = config_bytes
        self.index_bytes = index_bytes
        self._config = parse_object(config_bytes, folder / CONFIG_NAME, CONFIG_NAME)
        self._headers = headers
        self._entries = {name: entry for header in headers.values() for name, entry in header.entries.items()}
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint in the folder ``path``.

        Raises:
            CheckpointError: no such folder, no ``config.json``, pickle weights only, or shards, headers and index that
                do not agree.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file, not a checkpoint folder" if folder.exists() else "there is no such folder"
            raise CheckpointError(what, where=folder, next=f"name the folder that holds {CONFIG_NAME} and the weights")
        config_bytes = _read_small(folder / CONFIG_NAME)
        if config_bytes is None:
            raise CheckpointError(
                f"the folder has no {CONFIG_NAME}, so it is not a checkpoint that can be understood",
                where=folder,
                next="name the folder that holds config.json, or download the missing file",
            )
        index_bytes = _read_small(folder / INDEX_NAME)
        if index_bytes is None:
            file = _single_file(folder)
            headers = {file: _load_header(folder / file)}
        else:
            headers = _sharded(folder, index_bytes)
        return cls(folder, config_bytes, index_bytes, headers)

    # -- Source ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, every header, and the first 64 KiB of every shard's data."""
        digest = hashlib.sha256()
        for part in self._fingerprint_parts():
            digest.update(len(part).to_bytes(8, "little"))  # so that bytes cannot move from one part to the next
            digest.update(part)
        return digest.hexdigest()

    def _fingerprint_parts(self) -> Iterator[bytes]:
        yield self.config_bytes
        for file, header in self._headers.items():
            yield self.raw_header(file)
            yield bytes(self._bytes(file, header.data, min(FINGERPRINTED, header.size - header.data)))

    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def files(self) -> list[str]:
        """The shards' names, sorted."""
        return list(self._headers)

    def metadata(self, file: str) -> dict[str, str]:
        return dict(self._header(file).metadata)

    def raw_header(self, file: str) -> bytes:
        return bytes(self._bytes(file, 0, self._header(file).data))

    def spec(self, name: str) -> TensorSpec:
        return self._entry(name).spec

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """The tensor, or rows ``rows`` (step 1) of its first axis, in its stored dtype, in fresh memory.

        Raises:
            CheckpointError: no such tensor or rows, a dtype that torch cannot hold, or a file that ended early.
        """
        import torch

        entry = self._entry(name)
        spec, begin, end, shape = entry.spec, entry.begin, entry.end, entry.spec.shape
        if spec.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"the tensor {name} is stored as {spec.dtype}, which has no torch dtype",
                where=self._folder / spec.file,
                next="moezip can copy such a tensor byte for byte, but not compute with it",
            )
        if rows is not None:
            if not shape or rows.step != 1 or not 0 <= rows.start <= rows.stop <= shape[0]:
                raise CheckpointError(
                    f"{name} of shape {list(shape)} has no rows {rows}", where=self._folder / spec.file
                )
            row = spec.bytes // shape[0] if shape[0] else 0
            begin, end = begin + rows.start * row, begin + rows.stop * row
            shape = (len(rows), *shape[1:])
        dtype = getattr(torch, TORCH_DTYPES[spec.dtype])
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        raw = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(spec.file, self._headers[spec.file].data + begin, raw.numpy().data)
        return raw.view(dtype).view(shape)

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        """The bytes of the tensor, or of rows ``rows`` of its first axis, in fresh pieces of at most 8 MiB.

        Works for every dtype. Raises CheckpointError for rows that are not there.
        """
        entry = self._entry(name)
        begin, end = entry.begin, entry.end
        if rows is not None:
            if not entry.spec.shape or rows.step != 1 or not 0 <= rows.start <= rows.stop <= entry.spec.shape[0]:
                raise CheckpointError(f"{name} of shape {entry.spec.shape} has no rows {rows}", where=self._folder)
            row = entry.spec.bytes // max(entry.spec.shape[0], 1)
            begin, end = begin + rows.start * row, begin + rows.stop * row
        data = self._headers[entry.spec.file].data
        for start in range(begin, end, CHUNK):
            yield self._bytes(entry.spec.file, data + start, min(CHUNK, end - start))

    # -- files ----------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"the checkpoint has no tensor {name}", where=self._folder)
        return self._entries[name]

    def _header(self, file: str) -> Header:
        if file not in self._headers:
            raise CheckpointError(f"the checkpoint has no shard {file}", where=self._folder)
        return self._headers[file]

    def _bytes(self, file: str, offset: int, count: int) -> memoryview:
        view = memoryview(bytearray(count))
        self._fill(file, offset, view)
        return view

    def _fill(self, file: str, offset: int, view: memoryview) -> None:
        descriptor, done = self._descriptor(file), 0
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done : done + LARGEST_READ]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read: {error.strerror}", where=self._folder / file) from error
            if got == 0:
                raise CheckpointError(
                    f"the file ended early: expected {len(view)} bytes at offset {offset}, found {done}",
                    where=self._folder / file,
                    next="it was changed while being read; run again once it is complete",
                )
            done += got

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint was closed", where=self._folder)
            if file not in self._open:
                path, size = self._folder / file, self._header(file).size
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"cannot open the shard: {error.strerror}", where=path) from error
                found = os.fstat(descriptor).st_size
                if found != size:
                    os.close(descriptor)
                    raise CheckpointError(
                        f"the shard changed since its header was read: expected {size} bytes, found {found}",
                        where=path,
                        next="run again once it is complete",
                    )
                self._open[file] = descriptor
            return self._open[file]

    def close(self) -> None:
        """Close the shards; reading afterwards is an error. No other thread may be reading."""
        with self._lock:
            self._closed = True
            while self._open:
                os.close(self._open.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def _read_small(path: Path) -> bytes | None:
    """A config or index file, None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path) from error


def _load_header(path: Path) -> Header:
    try:
        with path.open("rb") as stream:
            return read_header(stream, os.fstat(stream.fileno()).st_size, path)
    except OSError as error:
        raise CheckpointError(f"cannot read the shard: {error.strerror}", where=path) from error


def _single_file(folder: Path) -> str:
    """The name of the only safetensors file of a folder without an index."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_NAME in files:
        return SINGLE_NAME
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"the folder has {len(files)} safetensors files but no {INDEX_NAME} to say which tensor is where",
            where=folder,
            next="download the index that came with the shards",
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"the weights are pickle files ({_listed(pickles)}), which moezip does not open: "
            "unpickling can run code, and a pickle cannot be read tensor by tensor",
            where=folder,
            next="convert them once, on a machine where you trust them: "
            "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(new, safe_serialization=True)",
        )
    raise CheckpointError(
        "the folder has no weights: no *.safetensors file", where=folder, next="name a folder with safetensors weights"
    )


def _sharded(folder: Path, index_bytes: bytes) -> dict[str, Header]:
    """Headers of all shards that the index names, each tensor found exactly where the index says."""
    path = folder / INDEX_NAME
    weight_map = parse_object(index_bytes, path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=path, next=DOWNLOAD_AGAIN)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _bare(file):
            raise CheckpointError(
                f"the index sends {name} to {file!r}, which is not the bare name of a safetensors file in this folder",
                where=path,
                next="such an index could make a program read any file of the machine; do not trust its origin",
            )
    files = sorted(set(weight_map.values()))
    if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in files:
        raise CheckpointError(
            f"the folder has two sets of weights: {SINGLE_NAME} and the shards of {INDEX_NAME}",
            where=folder,
            next="loaders disagree on which one counts; move one of them away",
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shards missing: {_listed(missing)}",
            where=folder,
            next="download them again",
        )
    headers = {file: _load_header(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in headers[file].entries:
            raise CheckpointError(
                f"the index says that {name} is in {file}, but that shard does not hold it",
                where=path,
                next=DOWNLOAD_AGAIN,
            )
    for file, header in headers.items():
        for name in header.entries:
            if weight_map.get(name) != file:
                elsewhere = f"says that it is in {weight_map[name]}" if name in weight_map else "does not know it"
                raise CheckpointError(
                    f"{file} holds {name}, but the index {elsewhere}", where=path, next=DOWNLOAD_AGAIN
                )
    return headers


def _listed(files: list[str]) -> str:
    return ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")


def _bare(file: str) -> bool:
    return file.endswith(".safetensors") and not file.startswith(".") and not set(file) & set("/\\\0:")

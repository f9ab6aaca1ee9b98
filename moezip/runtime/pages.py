"""What is kept in memory of experts that stay on disk: the cache, what it counts, and whether the files are the same.

Files are read, never mapped: mapped pages would count as the process's own memory, without a bound.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, final

from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

Key = tuple[int, int]  # decoder layer, expert

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)\Z", re.IGNORECASE)


def bytes_of(size: int | str) -> int:
    """Bytes, from a number of them or a text such as ``2GiB`` or ``500MB``.

    Raises:
        UsageError: anything else.
    """
    found = _SIZE.match(str(size).strip())
    if isinstance(size, bool) or found is None or found[2].upper() not in _UNITS:
        raise UsageError(f"{size!r} is no size", where="cache", next="write it like '2GiB', '500MB' or 1073741824")
    return int(float(found[1]) * _UNITS[found[2].upper()])


# -- files ------------------------------------------------------------------------------------------------------------


@final
class Unchanged:
    """A ``Source`` that reads no shard which was changed since this was made, and counts the bytes that it reads.

    Raises:
        CheckpointError: from ``read`` and ``chunks``, for a shard of another size, time or place than it had.
    """

    def __init__(self, source: Source):
        self._source = source
        self._lock, self._bytes = Lock(), 0
        files = sorted({source.spec(name).file for name in source.names()})
        self._seen = {file: _identity(source.folder / file) for file in files}

    @property
    def bytes_read(self) -> int:
        return self._bytes

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        return self._source.config

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def names(self) -> list[str]:
        return self._source.names()

    def metadata(self, file: str) -> dict[str, str]:
        return self._source.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        return self._source.raw_header(file)

    def spec(self, name: str) -> TensorSpec:
        return self._source.spec(name)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        file = self._source.spec(name).file
        self._require_same(file)
        found = self._source.read(name, rows)
        self._require_same(file)  # while it was read
        with self._lock:
            self._bytes += found.nbytes
        return found

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        file = self._source.spec(name).file
        for chunk in self._source.chunks(name, rows):
            self._require_same(file)
            with self._lock:
                self._bytes += len(chunk)
            yield chunk

    def _require_same(self, file: str) -> None:
        path = self._source.folder / file
        if _identity(path) != self._seen[file]:
            raise CheckpointError(
                "the shard changed since the model was loaded, whose experts are read from it",
                where=path,
                next="load the model again; leave the folder as it is while a model with experts='mmap' is in use",
            )


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Device, place, size and time of a file."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the shard: {error.strerror}", where=path, next="put it back, or load the model again"
        ) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


# -- the cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PageStats:
    """What happened so far.

    Attributes:
        limit: most bytes of experts that are kept. held: bytes that are. most_held: that ever were.
        experts: number of experts held.
        hits, misses: how often an expert that a layer needed was there or had to be read; once per call of a layer,
            however many tokens need it.
        evicted: experts that were given up.
        bytes_read: of the files, for the misses.
    """

    limit: int
    held: int
    most_held: int
    experts: int
    hits: int
    misses: int
    evicted: int
    bytes_read: int

    @property
    def hit_rate(self) -> float:
        """Share of the uses that needed no reading; 0 before the first."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 0.0

    def __str__(self) -> str:
        return (
            f"{self.hit_rate:.1%} of {self.hits + self.misses} uses of experts were hits, "
            f"{self.bytes_read / 2**20:.1f} MiB read, {self.experts} experts in {self.held / 2**20:.1f} of "
            f"{self.limit / 2**20:.1f} MiB"
        )


@final
class Pages:
    """Experts in memory, never more bytes of them than ``limit``; those used least recently are given up.

    A layer that holds more than the others gives up its own first. Layers are run in turns, so of one common queue the
    oldest is always what the next layer is about to need, and a cache that holds less than one token uses would never
    have a hit.

    Threads may share it. What is lent to a thread stays in memory until the thread is done with it, even if it was
    given up meanwhile: a second thread that runs the model at the same time may add as much as ``limit``.
    """

    def __init__(self, limit: int, source: Unchanged):
        self.limit = limit
        self._source = source
        self._layers: dict[int, OrderedDict[int, tuple[Any, int]]] = {}
        self._sums: dict[int, int] = {}
        self._lock = RLock()
        self.reset_stats()

    # -- figures ------------------------------------------------------------------------------------------------

    def stats(self) -> PageStats:
        with self._lock:
            return PageStats(
                self.limit, self._held, self._most, sum(map(len, self._layers.values())), self._hits, self._misses,
                self._evicted, self._source.bytes_read - self._before,
            )  # fmt: skip

    def reset_stats(self) -> None:
        """Counts from here on; what is held stays."""
        with self._lock:
            self._hits = self._misses = self._evicted = 0
            self._most, self._before = self._held, self._source.bytes_read

    def clear(self) -> None:
        """Gives up everything."""
        with self._lock:
            self._evicted += sum(map(len, self._layers.values()))
            self._layers.clear()
            self._sums.clear()

    @property
    def _held(self) -> int:
        return sum(self._sums.values())

    # -- use ----------------------------------------------------------------------------------------------------

    def held_first(self, layer: int, experts: Sequence[int]) -> list[int]:
        """``experts`` in the order in which to ask for them: no hit is given up for a miss."""
        with self._lock:
            row = self._layers.get(layer, ())
            return sorted(experts, key=lambda expert: expert not in row)

    def lend(
        self, key: Key, size: int, read: Callable[[], Any], keep: Sequence[int] = ()
    ) -> Any:  # fmt: skip
        """An expert, from memory or by ``read``.

        Args:
            size: bytes that it takes, at most ``limit``.
            keep: experts of the same layer that are in use and must not be given up for it.
        """
        layer, expert = key
        with self._lock:
            row: OrderedDict[int, tuple[Any, int]] = self._layers.setdefault(layer, OrderedDict())
            if expert in row:
                self._hits += 1
                row.move_to_end(expert)
                return row[expert][0]
            self._misses += 1
            self._make_room(layer, size, keep)
            made = read()
            row[expert] = made, size
            self._sums[layer] = self._sums.get(layer, 0) + size
            self._most = max(self._most, self._held)
            return made

    def _make_room(self, layer: int, size: int, keep: Sequence[int]) -> None:
        while self._held + size > self.limit:
            # what is about to come counts for its layer; of layers that hold as much, it is that layer
            order = sorted(self._layers, key=lambda each: (-self._sums.get(each, 0) - size * (each == layer),
                                                           each != layer))  # fmt: skip
            kept = frozenset(keep)
            oldest = (
                (each, expert)
                for each in order
                for expert in self._layers[each]
                if each != layer or expert not in kept
            )  # fmt: skip
            loser = next(oldest, None)
            if loser is None:
                raise UsageError(
                    f"a cache of {self.limit} bytes has no room for an expert of {size} beside {len(kept)} in use",
                    where="cache", next="give a larger cache",
                )  # fmt: skip
            self._sums[loser[0]] -= self._layers[loser[0]].pop(loser[1])[1]
            self._evicted += 1

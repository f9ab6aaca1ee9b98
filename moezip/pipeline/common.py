"""What every command shares: options, the clock, opening a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from moezip.arch.experts import check_shapes
from moezip.arch.families import identify
from moezip.arch.spec import Architecture, LayerFacts
from moezip.checkpoint.hub import HubId, fetched, headers
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.writer import Staging
from moezip.errors import CheckpointError, UsageError
from moezip.progress import Watch, unwatched

log = logging.getLogger("moezip.pipeline")


@dataclass(frozen=True, slots=True)
class Common:
    """Options that every command shares.

    Attributes:
        device: where layers are computed.
        max_memory: ceiling of the process in bytes, None for 80 % of what is free.
        workdir: for interrupted passes and spilled hidden states; None puts it beside the output.
        resume: go on from an interrupted pass.
        overwrite: replace an existing output.
        seed: the only source of chance.
        seq_len: window in tokens, None for min(2048, the model's maximum).
        command: as typed, for the manifest.
        watch: told of every step.
    """

    device: str = "cpu"
    max_memory: int | None = None
    workdir: Path | None = None
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    seq_len: int | None = None
    command: str = ""
    watch: Watch = unwatched


@dataclass(slots=True)
class Clock:
    """Seconds by stage."""

    start: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        log.debug("%s begins", name)
        try:
            yield
        finally:
            took = time.monotonic() - begun
            self.stages[name] = self.stages.get(name, 0.0) + took
            log.debug("%s ends after %.3f s", name, took)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Inside, a hub id that is not cached is an error which says how much there is to fetch: for dry runs."""
    before = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(before)


def open_checkpoint(name: str) -> Checkpoint:
    """A folder, the word ``demo``, or a hub id ``ORG/NAME[@REVISION]``, which is fetched if it is not cached.

    A folder of that name wins. Raises CheckpointError where there is none of them.
    """
    path = Path(name)
    if path.exists():
        return Checkpoint.open(path)
    if name == "demo":
        from moezip import demo

        return Checkpoint.open(demo.checkpoint())
    wanted = HubId.of(name)
    if wanted is not None:
        return Checkpoint.open(fetched(wanted, download=_downloads.get()))
    raise CheckpointError(f"there is no folder {name!r}", next="name a folder with config.json and .safetensors files")


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose headers, names and config agree."""

    source: Checkpoint
    architecture: Architecture
    facts: tuple[LayerFacts, ...]


def opened(name: str) -> Opened:
    """Raises CheckpointError or ArchitectureError before anything is computed."""
    return _understood(open_checkpoint(name))


@contextmanager
def looked_at(name: str) -> Iterator[Opened]:
    """``opened`` for those who read headers only: of a hub id nothing else is fetched."""
    wanted = None if Path(name).exists() or name == "demo" else HubId.of(name)
    if wanted is None:
        yield opened(name)
        return
    with headers(wanted) as folder:
        yield _understood(Checkpoint.open(folder))


def _understood(source: Checkpoint) -> Opened:
    entry = identify(source.config, source.folder)
    check_shapes(source, entry)
    facts = tuple(entry.layer_facts(source.config))
    log.debug(
        "opened %s: %s, %d layers with experts, %d tensors, fingerprint %s",
        source.folder, entry.name, len(facts), len(source.names()), source.fingerprint[:12],
    )  # fmt: skip
    return Opened(source, entry, facts)


def refuse_output(out: Path, source: Path, common: Common) -> None:
    """Raises CheckpointError before any work if the checkpoint could not be written to ``out`` in the end."""
    Staging(out, source=source, overwrite=common.overwrite).refuse_output()


def refuse_file(out: Path, what: str, common: Common) -> None:
    """Raises UsageError before any work if the file ``out`` is there already, or is a folder."""
    if out.is_dir():
        raise UsageError(f"the {what} would be a file, and this is a folder", where=out, next="name a file")
    if out.exists() and not common.overwrite:
        raise UsageError(
            f"the {what} exists already", where=out, next="name another one, or give --overwrite to replace it"
        )

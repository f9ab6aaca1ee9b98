"""Checkpoints named by a hub id: fetched into the hub's own cache, safetensors and side files only.

What is fetched is never run or unpickled: weights in other formats and the model's own code stay where they are. An
interrupted download goes on where it stopped; a snapshot that is in the cache is used without a network.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezip.checkpoint.reader import CONFIG_NAME, INDEX_NAME
from moezip.errors import CheckpointError

WEIGHTS = "*.safetensors"
SIDE_FILES = (
    "*.json", "*.txt", "*.md", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# The same weights once more, in the maker's own layout; and folders of other formats.
NOT_FETCHED = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.md")
SPARE = 1 << 30  # bytes left free beside a download

_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?\Z")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubId:
    """``ORG/NAME`` or ``ORG/NAME@REVISION``.

    Attributes:
        name: ``ORG/NAME``. revision: branch, tag or commit; None for ``main``.
    """

    name: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> HubId | None:
        """None where ``text`` cannot be one."""
        found = _ID.match(text)
        if found is None or text.startswith((".", "~")):
            return None
        return cls(found["id"], found["revision"])

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def fetched(wanted: HubId, download: bool = True) -> Path:
    """The folder of its snapshot in the hub's cache, downloaded if it is not there and ``download`` is set.

    What has to be downloaded is said (to the log, before it starts) and compared with the free space.

    Raises:
        CheckpointError: no such model or revision, no safetensors in it, too little disk, or no network and nothing in
            the cache.
    """
    found = _listed(wanted)
    if isinstance(found, Path):
        return found
    needed = sum(file.file_size or 0 for file in found if file.will_download)
    count = sum(file.will_download for file in found)
    if count and not download:
        raise CheckpointError(
            f"a dry run downloads nothing, and of {wanted} {count} files, {_size(needed)}, are not cached",
            next=f"look at it with moezip inspect {wanted}, which reads headers only, or fetch it first (hf download)",
        )
    if needed:
        cache = _cache()
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
        log.warning(
            "%s: %d files, %s, are downloaded into %s (%s free there); once stopped, the same command goes on",
            wanted, count, _size(needed), cache, _size(free),
        )  # fmt: skip
        if free < needed + SPARE:
            raise CheckpointError(
                f"not enough disk space for {wanted}: {needed:,} bytes are to be downloaded and {SPARE:,} left free, "
                f"{free:,} are free",
                where=cache,
                next="free some space, or set HF_HOME to a folder on another disk",
            )
    return Path(_ask(wanted))


@contextmanager
def headers(wanted: HubId) -> Iterator[Path]:
    """A folder that looks like its snapshot, of which only headers and side files were downloaded.

    Its shards have their true sizes and headers, and holes where the numbers would be: enough for whoever reads
    headers alone. A snapshot that is in the cache is given itself.

    Raises:
        CheckpointError: as of ``fetched``, but for the disk.
    """
    found = _listed(wanted)
    if isinstance(found, Path):
        yield found
        return
    shards = [file for file in found if file.filename.endswith(".safetensors")]
    if not any(file.will_download for file in shards):
        yield Path(_ask(wanted))
        return
    log.warning(
        "%s: only headers are read; its weights are %s", wanted, _size(sum(file.file_size or 0 for file in shards))
    )
    with tempfile.TemporaryDirectory(prefix="moezip-headers-") as name:
        folder = Path(name)
        snapshot = Path(_ask(wanted, weights=False))
        for file in (CONFIG_NAME, INDEX_NAME):
            if (snapshot / file).is_file():
                shutil.copyfile(snapshot / file, folder / file)
        for shard in shards:
            _write_header(wanted, shard, folder)
        yield folder


def _write_header(wanted: HubId, shard: Any, folder: Path) -> None:
    from huggingface_hub import HfApi

    with _hub_errors(wanted):
        about = HfApi().parse_safetensors_file_metadata(wanted.name, shard.filename, revision=shard.commit_hash)
    entries: dict[str, Any] = {"__metadata__": dict(about.metadata)} if about.metadata else {}
    for name, tensor in about.tensors.items():
        start, end = tensor.data_offsets
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with (folder / shard.filename).open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        end = max((tensor.data_offsets[1] for tensor in about.tensors.values()), default=0)
        file.truncate(8 + len(content) + end)


def _listed(wanted: HubId) -> Path | list[Any]:
    """What a download would take, file by file; the cached snapshot where the hub cannot be asked."""
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        with _hub_errors(wanted):
            found: list[Any] = _ask(wanted, dry_run=True)
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, DryRunError):
            cause = cause.__cause__ or cause
        answered = isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500
        if answered:
            raise
        try:
            return Path(_ask(wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            raise error from None
    if not any(file.filename.endswith(".safetensors") for file in found):
        raise CheckpointError(
            f"{wanted} has no .safetensors files in its top folder",
            next="moezip reads safetensors only; look for a conversion of this model",
        )
    return found


def _ask(wanted: HubId, weights: bool = True, **options: Any) -> Any:
    import huggingface_hub

    kinds = [WEIGHTS, *SIDE_FILES] if weights else list(SIDE_FILES)
    return huggingface_hub.snapshot_download(
        wanted.name, revision=wanted.revision, allow_patterns=kinds, ignore_patterns=list(NOT_FETCHED), **options
    )


@contextmanager
def _hub_errors(wanted: HubId) -> Iterator[None]:
    from huggingface_hub.errors import (
        DryRunError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"{wanted} is neither a folder nor a hub id: {error}") from error
    except (OSError, LocalEntryNotFoundError, RevisionNotFoundError) as error:
        cause = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ else error
        if isinstance(cause, RepositoryNotFoundError):
            what = f"there is no folder {wanted.name!r}, and the hub shows no model of that name"
            next = "check the spelling; if it is private or gated, log in first (hf auth login)"
        elif isinstance(cause, RevisionNotFoundError):
            what, next = f"{wanted.name} has no revision {wanted.revision!r}", "name a branch, a tag or a commit"
        else:
            offline = isinstance(cause, OfflineModeIsEnabled)
            why = "HF_HUB_OFFLINE is set" if offline else f"the hub did not answer ({type(cause).__name__}: {cause})"
            what = f"there is no folder {wanted.name!r}; as a hub id it cannot be fetched: {why}, and it is not cached"
            revision = "" if wanted.revision is None else f" --revision {wanted.revision}"
            next = (
                f"with a network: HF_HUB_OFFLINE=0 hf download {wanted.name}{revision}; the cache that this fills is "
                "then used without one"
            )
        raise CheckpointError(what, next=next) from error


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

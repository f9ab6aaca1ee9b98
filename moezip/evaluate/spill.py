"""Where hidden states go that do not fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moezip.calibrate.stream import Stream
from moezip.errors import MoezipError


@contextmanager
def spill(streams: Sequence[Stream], need: int, heads: int, workdir: Path | None) -> Iterator[Path | None]:
    """A folder for hidden states if they do not fit into memory, removed whatever happens; None if they fit.

    Args:
        need: bytes that are to be kept. heads: bytes of all heads together.

    Raises:
        MoezipError: they do not fit, and there is no ``workdir``.
    """
    # beside the hidden states there is at any time either one layer or the heads
    room = min(each.hidden_budget() - max(heads - each.layer_bytes, 0) for each in streams)
    if need <= room:
        yield None
        return
    if workdir is None:
        raise MoezipError(
            f"the hidden states take {need / 2**30:.2f} GiB, {max(room, 0) / 2**30:.2f} GiB are allowed",
            next="name a --workdir for them, allow more --max-memory, or use fewer --tokens",
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=workdir) as folder:
        yield Path(folder)


def inside(folder: Path | None, name: str) -> Path | None:
    """A folder in ``folder``, None where there is none."""
    return None if folder is None else folder / name

"""A whole model in memory, for what cannot be streamed: generating text, and measuring its speed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moezip.arch.experts import decoded
from moezip.arch.layout import METHOD
from moezip.calibrate.memory import steady
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError
from moezip.formats import compressed_tensors

# Beside the weights: activations, the cache of keys and values, what loading leaves behind.
ROOM = 1.2
# The interpreter, torch and transformers.
BASE_BYTES = 600 * 2**20
# What ``moezip.load`` runs as it is stored.
STAY_PACKED = (METHOD, compressed_tensors.METHOD)


def needed_bytes(source: Source) -> int:
    """About what a process with this model takes: the stored bytes where experts stay packed, else those of the decoded
    weights (fp8 and mxfp4 blocks, GPTQ)."""
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    held = source if method in STAY_PACKED else decoded(source)
    return BASE_BYTES + int(ROOM * sum(held.spec(name).bytes for name in held.names()))


def allowed_bytes(max_memory: int | None) -> int:
    """The ceiling that was asked for; default 80 % of what is free."""
    import psutil

    return max_memory or int(psutil.virtual_memory().available * 0.8)


def require_room(sources: Sequence[Source], max_memory: int | None, what: str) -> None:
    """Raises MoezipError, before anything is read, if these models do not fit into memory together.

    Args:
        what: what needs them whole, for the message.
    """
    need = sum(needed_bytes(source) for source in sources) - BASE_BYTES * (len(sources) - 1)
    room = allowed_bytes(max_memory)
    if need > room:
        models = "the model" if len(sources) == 1 else f"{len(sources)} models at a time"
        raise MoezipError(
            f"{what} needs {models} whole in memory: about {need / 2**30:.2f} GiB, {room / 2**30:.2f} GiB are allowed",
            where=sources[0].folder,
            next="allow more --max-memory, use a machine with more, or leave this measurement away",
        )


def load_whole(folder: Path, device: str) -> Any:
    """The model as ``moezip.load`` gives it: packed, ragged or plain."""
    from moezip.runtime.load import load

    steady()
    gc.collect()  # what came before may hang in cycles
    return load(folder, device=device)

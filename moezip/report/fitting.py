"""Where a model would fit: its bytes at fewer bits and with fewer experts, beside the memory of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BITS = (16.0, 8.0, 4.0, 2.5)
SHARES = (1.0, 0.5)
# Of a memory, what weights may take: the rest is for the system, activations and the cache of keys and values.
ROOM = 0.9
RAM = "ram"


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that could be done to a model.

    Attributes:
        bits: of each weight in the experts and in the other matrices of the layers, scales and zeros counted.
            Embeddings, head, routers and norms stay in 16. experts: the share of them that stays.
        bytes: what the weights take. fits: by memory, whether that is no more than ``ROOM`` of it.
    """

    bits: float
    experts: float
    bytes: int
    fits: Mapping[str, bool]


def choices(experts: int, matrices: int, rest: int, memory: Mapping[str, int]) -> tuple[Choice, ...]:
    """
    Args:
        experts, matrices, rest: weights in the experts, in the layers' other matrices, and in everything else.
        memory: bytes by name.

    >>> [(choice.bits, choice.experts, choice.bytes) for choice in choices(800, 80, 8, {})][-2:]
    [(2.5, 1.0, 291), (2.5, 0.5, 166)]
    """
    found = []
    for bits in BITS:
        for share in SHARES:
            count = round((experts * share + matrices) * bits / 8 + rest * 2)
            found.append(Choice(bits, share, count, {name: count <= ROOM * size for name, size in memory.items()}))
    return tuple(found)


def memories() -> dict[str, int]:
    """Bytes of this machine's memory, under ``ram``, and of its GPUs, under ``cuda:0`` and so on."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container, which the machine's own number does not know
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return {RAM: total, **_gpus()}


def _gpus() -> dict[str, int]:
    """Asked of torch only where there is a driver: importing it takes longer than all the rest of ``inspect``."""
    if not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None:
        return {}
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {f"cuda:{place}": torch.cuda.get_device_properties(place).total_memory for place in range(count)}


def to_json(found: tuple[Choice, ...], memory: Mapping[str, int]) -> dict[str, Any]:
    """What ``moezip inspect --json`` has under ``fits_in``."""
    rows = [{"bits": c.bits, "experts": c.experts, "bytes": c.bytes, "fits": dict(c.fits)} for c in found]
    return {"memory": dict(memory), "room": ROOM, "choices": rows}

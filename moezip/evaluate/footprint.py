"""What a model takes of memory: loaded, reading a prompt, writing. In a process of its own.

In a process that has held other models, what was freed is used again and the growth says nothing (tried first: 0 bytes
for a model of 5 MB that came after another).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from moezip.errors import MoezipError


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes beyond what the process took before it loaded the model; of the device's memory on a GPU.

    Attributes:
        loaded: resident once it is loaded. prefill, decode: the peak while a prompt was read, and while tokens were
            written; None where the system does not tell peaks.
    """

    loaded: int
    prefill: int | None
    decode: int | None


def footprint(model: Path, device: str, width: int, short: int, new: int) -> Footprint:
    """Starts a process that loads the model, reads ``width`` tokens, then writes ``new`` after ``short``.

    Raises:
        MoezipError: the process failed; what it said is in the message.
    """
    words = [sys.executable, "-m", "moezip.evaluate.footprint", str(model), device, *map(str, (width, short, new))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()
        raise MoezipError(
            f"a process that loads the model to measure its memory failed ({last[-1] if last else done.returncode})",
            where=model, next="there may be too little memory; leave --speed away",
        )  # fmt: skip
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _measure(model: Path, device: str, width: int, short: int, new: int) -> Footprint:
    import torch

    from moezip.evaluate.speed import write
    from moezip.evaluate.whole import load_whole

    _import_late(model)
    gc.collect()
    before = _now(device)
    whole = load_whole(model, device)
    gc.collect()
    loaded = _now(device) - before
    ids = torch.zeros(1, width, dtype=torch.int64)
    peaks = []
    for given, count in ((ids, 1), (ids[:, :short], new)):
        peak = _peak(device)
        write(whole, given, count)
        found = peak()
        peaks.append(None if found is None else max(found - before, 0))
    return Footprint(max(loaded, 0), *peaks)


def _import_late(model: Path) -> None:
    """Has transformers import what it imports as a model is built and runs, 200 MB that are not the model's."""
    import torch
    import transformers.quantizers  # noqa: F401  (and with it moezip's own)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    assert empty.generate
    torch.ones(64, 64) @ torch.ones(64, 64)


def _now(device: str) -> int:
    """Bytes in use now."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def _peak(device: str) -> Callable[[], int | None]:
    """Starts to watch; what comes back tells the peak since then."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: int(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    except OSError:
        return lambda: None
    return _high_water


def _high_water() -> int | None:
    """The peak of this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    _folder, _device, *_counts = sys.argv[1:]
    sys.stdout.write(json.dumps(asdict(_measure(Path(_folder), _device, *map(int, _counts)))) + "\n")

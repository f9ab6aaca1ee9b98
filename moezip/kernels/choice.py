"""Whether the kernels are those of a C++ library, and of which; else the numpy twins, and why."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

# What doing without the C++ library costs (benchmarks/native.py, one expert matrix of 768 x 2048; a token of the model
# of benchmarks/decode.py takes 7 ms with it, 33 by torch's product, 6,400 decoded).
COST = (
    "quantization takes several times as long, and packed models run some times slower, by torch's product for 4 bits, "
    "with 4 or 8 bits of memory per weight more, or, in float32 or groups that it does not take, hundreds of times"
)


@dataclass(frozen=True, slots=True)
class Status:
    """What runs the kernels. ``native`` False: numpy, for the reason in ``why``; then the other texts are None."""

    native: bool
    why: str
    library: str | None = None
    isa: str | None = None
    available: tuple[str, ...] = ()


@cache
def choose() -> tuple[Any, Status]:
    """The functions to call. ``MOEZIP_NATIVE``: 0 means numpy, the name of an instruction set that one.

    Warns, once in a process, where numpy is second best.
    """
    from moezip.kernels import build, reference

    wanted = os.environ.get("MOEZIP_NATIVE", "1")
    if wanted == "0":
        return reference, Status(False, "MOEZIP_NATIVE=0")
    from moezip.kernels import native, selfcheck

    try:
        found = native.find(None if wanted in ("", "1") else wanted)
        faults = selfcheck.faults(found)
        why = f"{found.file} ({found.isa}) computes wrongly: {'; '.join(faults)}" if faults else None
    except (build.BuildError, ValueError) as error:
        why = str(error)
    if why is None:
        return found, Status(True, "the self-check passed", str(found.file), found.isa, tuple(found.sets))
    warnings.warn(
        f"moezip's C++ kernels are not in use ({why}): {COST}. Install a C++ compiler such as g++ and try again; "
        "MOEZIP_NATIVE=0 says that numpy is wanted.",
        RuntimeWarning,
        stacklevel=2,
    )
    return reference, Status(False, why)


_choosing = Lock()


def chosen() -> tuple[Any, Status]:
    with _choosing:  # several threads may come first; one of them builds
        return choose()

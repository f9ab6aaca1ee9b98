"""Compiles the C++ kernels into one shared library that holds a copy for every instruction set.

Used on first need, where no library came with the package, and by the package's own build, which loads this file by
itself: it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"

# The library's name inside an installed package.
LIBRARY = "moezip_kernels.so"

# Products and sums are fused only where the code says so; errno and traps of the arithmetic are not looked at.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
VARIANTS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    "amx": (*_AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
}
# Left out where the compiler does not know the flags (g++ before 11).
OPTIONAL = "amx"


class BuildError(Exception):
    """Why there is no library, in one line."""


def on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def variants() -> dict[str, tuple[str, ...]]:
    """Names and compiler flags of the instruction sets for this machine's architecture."""
    return VARIANTS if on_x86() else {"baseline": ()}


def fingerprint() -> str:
    """16 hex digits that change with the sources, the flags and the kind of machine."""
    digest = hashlib.sha256(repr((FLAGS, variants(), sys.platform, platform.machine())).encode())
    for file in sorted(file for file in SOURCES.iterdir() if file.suffix in (".cpp", ".h")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where libraries built on first need are kept."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "moezip"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "moezip"


def kept() -> Path:
    """Where the library of these sources is kept, once it was built on first need."""
    return cache_folder() / f"kernels-{fingerprint()}.so"


def compiler() -> str:
    """The C++ compiler: ``CXX`` if set, else the first of g++, clang++ and c++.

    Raises:
        BuildError: there is none.
    """
    given = os.environ.get("CXX")
    for name in (given,) if given else ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"the compiler that CXX names, {given}, is not there" if given else "no C++ compiler was found")


def build(target: Path, extra: Sequence[str] = ()) -> None:
    """Compiles the library to ``target``, which appears whole or not at all; several processes may do so at once.

    Args:
        target: the file to make, or to replace.
        extra: further flags, such as those of a sanitizer.

    Raises:
        BuildError: no compiler, one that fails, or a folder that cannot be written.
    """
    tool = compiler()
    define = [f'-DMOEZIP_SOURCE="{fingerprint()}"', *(["-DMOEZIP_X86"] if on_x86() else [])]
    linked = ["-ldl"] if sys.platform == "linux" else []
    runtime = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" and not extra else []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            work = Path(folder)
            sets = dict(variants())
            if OPTIONAL in sets:
                if _knows(tool, sets[OPTIONAL], work):
                    define.append("-DMOEZIP_AMX")
                else:
                    del sets[OPTIONAL]
            jobs = [
                [tool, *FLAGS, *flags, *extra, f"-DMOEZIP_ISA={name}", "-c", SOURCES / "variant.cpp", "-o",
                 work / f"{name}.o"]
                for name, flags in sets.items()
            ]  # fmt: skip
            jobs.append([tool, *FLAGS, *extra, *define, "-c", SOURCES / "library.cpp", "-o", work / "library.o"])
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, jobs))
            objects = sorted(work.glob("*.o"))
            _run([tool, "-shared", *runtime, *extra, *objects, "-o", work / "library", "-pthread", *linked])
            os.replace(work / "library", target)
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or target}") from error


def _knows(tool: str, flags: Sequence[str], work: Path) -> bool:
    """Whether the compiler takes the flags."""
    empty = work / "empty.cpp"
    empty.touch()
    return not subprocess.run([tool, *flags, "-fsyntax-only", str(empty)], capture_output=True).returncode


def _run(command: Sequence[str | Path]) -> None:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ran.returncode:
        lines = (
            [line for line in ran.stderr.splitlines() if "error" in line] or ran.stderr.splitlines() or ["no message"]
        )
        raise BuildError(f"{command[0]} failed: {lines[0]}")

"""The tests of the kernels for AMX on a machine without it, its instructions emulated: `make amx-check`.

A library is built whose copy for AMX calls the functions of ``tiles_emulated.h``, and put where one that was built on
first need is looked for. The rest of that copy needs AVX512 with bf16.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from moezip.kernels import build
from moezip.kernels.native import find

HEADER = Path(__file__).with_name("tiles_emulated.h").resolve()
TESTS = ("tests/test_kernels.py", "tests/test_packed_kernels.py", "tests/test_unpacked.py")


def main() -> int:
    real = build.fingerprint()
    if "avx512bf16" not in find().sets:
        sys.stdout.write("this machine has no AVX512 with bf16: nothing was run for AMX\n")
        return 0
    build.VARIANTS["amx"] = (*build.VARIANTS["avx512bf16"], "-D__AMX_BF16__=1", "-include", str(HEADER))
    build.fingerprint = lambda: real  # whoever loads it compares what it says with the sources
    with tempfile.TemporaryDirectory(prefix="moezip-amx-") as cache:
        build.build(Path(cache) / "moezip" / f"kernels-{real}.so", ("-DMOEZIP_TILES_EMULATED",))
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-k", "amx", *TESTS],
            env={**os.environ, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    passed = re.search(r"(\d+) passed", ran.stdout)
    if ran.returncode or passed is None or " skipped" in ran.stdout:
        sys.stdout.write(ran.stdout + ran.stderr)
        return 1
    sys.stdout.write(f"AMX, emulated: {passed.group(1)} tests passed, none skipped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

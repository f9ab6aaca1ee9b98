"""Runs every kernel of every instruction set under the address and undefined-behaviour sanitizers: `make sanitize`.

numpy's arrays come from the sanitizer's malloc, so that a byte read or written past the end of one ends the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from moezip import kernels
from moezip.kernels import build, products, unpacked
from moezip.kernels.native import Native
from tests import test_packed_kernels as packed
from tests import test_unpacked as unpacked_tests
from tests.test_kernels import SHAPES, dyadic, weights

FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def exercise(library: Native) -> int:
    """Calls all kernels at awkward shapes, with one thread and with three; returns the number of calls."""
    calls = 0
    for rows, columns, group in SHAPES:
        weight, shares = weights(rows, columns), np.array(kernels.SHRINK[::5], np.float32)
        importance, order = np.ones(columns, np.float32), np.arange(columns, dtype=np.int32)
        factor = np.eye(columns, dtype=np.float32)
        library.gptq_factor(factor, order[::-1].copy(), 0.5)
        for bits in range(1, 9):
            for threads in (1, 3):
                scales, zeros = library.clip_search(weight, group, bits, False, shares, importance, "F16", threads)
                codes = library.round_codes(weight, scales, zeros, group, bits, threads)
                packed = library.pack(codes, bits, threads)
                library.unpack(packed, bits, columns, threads)
                for bf16 in (False, True):
                    library.dequantize(packed, scales, zeros, group, bits, columns, bf16, threads)
                step, zero = kernels._affine(scales, zeros.astype(np.uint8), bits)
                library.descend(weight, factor, 0.5, codes, step, zero, bits, "F16", threads)
                library.gptq(weight, factor, order // group, scales, zeros, bits, order, threads)
                library.gptq_refit(
                    weight, factor, group, bits, True, shares, importance, "BF16", order, threads
                )  # fmt: skip
                calls += 8
        halves = (weight.view(np.uint32) >> 16).astype(np.uint16)
        for x in (weight, halves):
            for by in (None, np.ones(rows, np.float32)):
                library.second_moment(x, np.zeros((columns, columns), np.float32), by, 3)
                calls += 1
    problem = dyadic(66, 131, 3)
    library.gptq(
        problem["weight"], problem["factor"], problem["groups"], problem["scales"], problem["scales"], 3,
        problem["order"], 2,
    )  # fmt: skip
    return calls + 1 + exercise_products(library)


def exercise_products(library: Native) -> int:
    """The same for the kernels that run packed models."""
    calls = 0
    for number, (rows, columns, group) in enumerate(packed.SHAPES):
        for bits in range(1, 9):
            laid = packed.case(library, rows, columns, group, bits, packed.KINDS[(number + bits) % 4]).laid
            products.codes(laid, threads=3, library=library)
            for dtype in ("float32", "bfloat16"):
                products.plain(laid, dtype=dtype, threads=3, library=library)
            for tokens in (1, 2, 5, 9, 35):
                x = np.ones((tokens, columns), np.float32)
                for given in (x, packed.rounded(x)):
                    products.linear(laid, given, threads=3, library=library)
                    products.linear(laid, given, activations="int8", threads=3, library=library)
                    calls += 2
            calls += 4
    table, _ = packed.layer(library)
    for tokens in (1, 5, 33, 90):
        x, ids, chosen = packed.routed(tokens)
        for given in (x, packed.rounded(x)):
            for gate in products.GATES:
                table.run(given, ids, chosen, gate, threads=1)
                table.run(given, ids, chosen, gate, activations="int8", threads=3)
                calls += 2
    return calls + exercise_unpacked(library)


def exercise_unpacked(library: Native) -> int:
    """The same for what stands between them."""
    calls = 0
    for rows, columns, tokens in unpacked_tests.SHAPES:
        for made in (unpacked_tests.drawn, unpacked_tests.halves):
            for bias in (None, made(rows)):
                unpacked.linear(made(rows, columns), made(tokens, columns), bias, threads=3, library=library)
            unpacked.rms_norm(made(tokens, columns), made(columns), 1e-6, threads=3, library=library)
            calls += 3
    halves = unpacked_tests.halves
    for experts, columns, tokens, top_k in ((1, 3, 1, 1), (60, 99, 5, 4), (128, 33, 2, 128)):
        router = halves(experts, columns), halves(tokens, columns)
        for small in (False, True):
            unpacked.route(*router, top_k, normalise=True, halves=small, threads=3, library=library)
            calls += 1
    for batch, heads, shared, length, width, out in unpacked_tests.ATTENDED:
        x, angles = halves(batch, heads, width), (halves(batch, width // 4 * 2), halves(batch, width // 4 * 2))
        for weight in (None, halves(width)):
            unpacked.turn(x, *angles, weight, 1e-6, threads=3, library=library)
        keys, values = halves(batch, shared, length, width), halves(batch, shared, length, out)
        looks = np.arange(batch * length).reshape(batch, 1, length) % 3 > 0
        for mask in (None, looks, looks.astype(np.float32), looks.astype(np.uint16)):
            for matrix in (None, (halves(33, heads * out), None)):
                unpacked.attend(x, keys, values, mask, 0.1, matrix, threads=3, library=library)
        for kind in ("packed", "bias"):
            made_of = [unpacked_tests.matrix(kind, n * width, 96, library, n) for n in (heads, shared, shared)]
            unpacked.heads(made_of, halves(batch, 96), width, *angles, threads=3, library=library)
        calls += 12
    table = unpacked_tests.experts_of(5, 72, 40, library)
    for batch in (1, 3):
        unpacked.finish(
            halves(batch, 4, 16), halves(batch, 2, 7, 16), halves(batch, 2, 7, 16), 0.3, (halves(72, 64), None),
            halves(batch, 72), (halves(72), 1e-6), halves(5, 72), 2, table, threads=3, library=library,
        )  # fmt: skip
        calls += 1
    return calls


def main() -> int:
    if len(sys.argv) == 2:  # the second time, with the sanitizer in place
        file = Path(sys.argv[1])
        for isa in Native(file).sets:
            sys.stdout.write(f"{isa}: {exercise(Native(file, isa))} calls, nothing found\n")
            sys.stdout.flush()
        return 0
    with tempfile.TemporaryDirectory(prefix="moezip-sanitize-") as folder:
        file = Path(folder) / "kernels.so"
        build.build(file, FLAGS)
        runtime = subprocess.run(
            [build.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Python itself keeps memory to its end on purpose: leaks are not looked for.
        environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", "tests.sanitize", str(file)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

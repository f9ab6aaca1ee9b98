"""Peak resident memory of ``moezip quantize`` on models of 4, 16 and 48 layers that are alike.

    python benchmarks/quantize_memory.py --work CACHE

4-bit GPTQ of every linear but routers and head, under a ceiling (``--max-memory``) that holds one layer, the hidden
states twice (a layer's experts' inputs are kept beside them), the hessians of one matrix on every core and 600 MiB; and
under none. The ceiling is the same at every depth.

The peak is the system's own figure for the process (``ru_maxrss``); about 380 MiB of interpreter and libraries are
inside, about 70 MiB more where Triton is installed (``make gpu-check`` does that), as transformers imports the part of
torch that imports it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import measure
import models

MIB = measure.MIB
BASE_BYTES = 600 * MIB
# Matrices [C, C] in float32 that exist for one matrix that is solved: own and pooled moments, factor, inverse.
PER_SOLVE = 4


def hessian_bytes(shape: models.Shape) -> int:
    """Of one matrix on every core, and of the layer's pooled inputs."""
    return 4 * max(shape.hidden, shape.width) ** 2 * (PER_SOLVE * (os.cpu_count() or 1) + 1)


def ceiling(shape: models.Shape, tokens: int) -> int:
    """One layer, hidden states and expert inputs of all tokens, hessians, 600 MiB."""
    return shape.layer_bytes + 2 * 2 * tokens * shape.hidden + hessian_bytes(shape) + BASE_BYTES


def quantize(folder: Path, text: Path, given: Any, out: Path, *more: str | Path | int) -> measure.Finished:
    shutil.rmtree(out, ignore_errors=True)
    command = measure.moezip(
        "quantize", folder, out, "--bits", given.bits, "--data", text, "--tokens", given.tokens, "--seq-len",
        given.seq_len, "--quiet", *more,
    )  # fmt: skip
    done = measure.process(command, HF_HUB_OFFLINE="1")
    shutil.rmtree(out)
    return done


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--model", default="peer", choices=[name for name in models.SHAPES if "-" not in name])
    parser.add_argument("--layers", type=int, nargs="+", default=list(models.DEPTHS), choices=models.DEPTHS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    shape = models.SHAPES[given.model]
    limit = ceiling(shape, given.tokens)
    found: dict[int, dict[str, float]] = {}
    with measure.work_folder(given.work) as work:
        text = models.text(given.tokens, shape.vocabulary, work)
        for layers in given.layers:
            name = f"{given.model}-{layers}"
            measure.say(f"{name}: making it, unless it is there")
            # in a process of its own: this one has to stay small, see measure.py
            measure.process([sys.executable, measure.HERE / "models.py", name, "--work", work])
            under = quantize(work / name, text, given, work / "quantized", "--max-memory", limit)
            measure.say(f"{name}: {under.peak_rss_bytes / MIB:.0f} MiB, {under.seconds:.0f} s")
            free = quantize(work / name, text, given, work / "quantized")
            found[layers] = {
                "bytes": models.SHAPES[name].bytes,
                "under_ceiling": under.peak_rss_bytes,
                "without": free.peak_rss_bytes,
                "seconds": under.seconds,
            }
    print(
        f"one layer {shape.layer_bytes / MIB:.0f} MiB, hidden states {2 * given.tokens * shape.hidden / MIB:.0f} MiB, "
        f"hessians {hessian_bytes(shape) / MIB:.0f} MiB, ceiling {limit / MIB:.0f} MiB\n"
    )
    rows = [
        (
            str(layers), f"{one['bytes'] / MIB:.0f}", f"{one['under_ceiling'] / MIB:.0f}",
            f"{one['under_ceiling'] / limit:.2f}", f"{one['without'] / MIB:.0f}", f"{one['seconds']:.0f}",
        )
        for layers, one in found.items()
    ]  # fmt: skip
    print(measure.table(("layers", "model MiB", "peak MiB", "of ceiling", "peak with none", "seconds"), rows))
    measure.save(given.json, {"quantize_memory": {"model": given.model, "ceiling": limit, "depths": found}})


if __name__ == "__main__":
    main()

"""Wall time and peak memory of ``moezip merge``, from process start to closed files.

    python benchmarks/merge_speed.py --work CACHE

Random Qwen3-MoE checkpoints of 2 layers, hidden 1024, 32 and 128 experts of width 384, half of them merged away: by
m-smoe without aligning neurons, with it, and with least squares, and by the other methods; pruning by REAP beside them.
The peak is the system's own figure for the process (``ru_maxrss``); interpreter and libraries are inside.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import measure
import models

SHAPES = {
    f"merge-{experts}": models.Shape(layers=2, hidden=1024, experts=experts, width=384, top_k=8, heads=16)
    for experts in (32, 128)
}
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("prune reap", "prune", ("--method", "reap")),
    ("m-smoe, align=none", "merge", ("--method", "m-smoe", "--set", "align=none")),
    ("m-smoe, align=weights", "merge", ("--method", "m-smoe", "--set", "align=weights")),
    ("m-smoe, least squares", "merge", ("--method", "m-smoe", "--set", "combine=least-squares")),
    ("hc-smoe", "merge", ("--method", "hc-smoe")),
    ("sub-moe", "merge", ("--method", "sub-moe")),
    ("dern", "merge", ("--method", "dern")),
)


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--seq-len", type=int, default=512)
    given = parser.parse_args()
    models.SHAPES.update(SHAPES)
    rows, values = [], []
    with measure.work_folder(given.work) as work:
        for name, shape in SHAPES.items():
            folder = models.checkpoint(name, work)
            text = models.text(given.tokens, shape.vocabulary, work)
            for label, command, options in RUNS:
                out = work / "merged"
                shutil.rmtree(out, ignore_errors=True)
                words = measure.moezip(
                    command, folder, out, "--ratio", "0.5", "--data", text, "--tokens", given.tokens, "--seq-len",
                    given.seq_len, "--json", *options,
                )  # fmt: skip
                measure.say(f"{name} {label}")
                done = measure.process(words, HF_HUB_OFFLINE="1")
                report: dict[str, Any] = json.loads(done.output)
                stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["stages"].items())
                size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
                rows.append((str(shape.experts), label, f"{done.seconds:.1f}", f"{done.cpu_seconds:.1f}", stages,
                             f"{done.peak_rss_bytes / measure.MIB:.0f}", f"{size / measure.MIB:.0f}"))  # fmt: skip
                values.append({"experts": shape.experts, "run": label, "seconds": done.seconds, "bytes": size,
                               "cpu": done.cpu_seconds, "peak": done.peak_rss_bytes, **report["stages"]})  # fmt: skip
                shutil.rmtree(out, ignore_errors=True)
    head = ("experts", "run", "s", "processor s", "stages, s", "peak MiB", "output MiB")
    print(measure.table(head, rows))
    measure.save(given.json, {"merge_speed": values})


if __name__ == "__main__":
    main()

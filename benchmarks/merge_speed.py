"""Wall time and peak memory of ``moezip merge``, from process start to closed files.

    python benchmarks/merge_speed.py --work CACHE

Random Qwen3-MoE checkpoints of 2 layers, hidden 1024, 32 and 128 experts of width 384, half of them merged away: by
m-smoe with and without aligning neurons, with each way to make the router's rows and the merged experts, and by the
other methods; pruning by REAP beside them.
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
    (
        "m-smoe, dominant's row, neurons as they lie",
        "merge",
        ("--method", "m-smoe", "--set", "router=dominant", "--set", "align=none"),
    ),
    ("m-smoe, dominant's row", "merge", ("--method", "m-smoe", "--set", "router=dominant")),
    ("m-smoe, fitted row", "merge", ("--method", "m-smoe", "--set", "router=sum")),
    ("m-smoe, least squares", "merge", ("--method", "m-smoe", "--set", "combine=least-squares")),
    ("m-smoe, neurons", "merge", ("--method", "m-smoe", "--set", "combine=neurons")),
    ("hc-smoe", "merge", ("--method", "hc-smoe")),
    ("sub-moe", "merge", ("--method", "sub-moe")),
    ("dern", "merge", ("--method", "dern")),
    ("mc-smoe", "merge", ("--method", "mc-smoe")),
)


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128], choices=[32, 128])
    parser.add_argument("--only", nargs="*", help="runs whose label holds one of these words")
    given = parser.parse_args()
    models.SHAPES.update(SHAPES)
    rows, values = [], []
    with measure.work_folder(given.work) as work:
        for name, shape in SHAPES.items():
            if shape.experts not in given.experts:
                continue
            folder = models.checkpoint(name, work)
            text = models.text(given.tokens, shape.vocabulary, work)
            for label, command, options in RUNS:
                if given.only and not any(word in label for word in given.only):
                    continue
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

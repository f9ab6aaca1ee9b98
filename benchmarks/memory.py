"""Peak resident memory of whole processes, and the speed of pruning from saved statistics.

    python benchmarks/memory.py --work CACHE

1. ``moezip calibrate`` on a checkpoint and on one of twice as many layers, with the tightest ceiling that holds one
   layer, the hidden states and 600 MiB (``--max-memory``), and with none.
2. ``moezip prune --stats`` on both, half of the experts kept, in turns with ``dd``, which copies the bytes that were
   kept and waits for the disk as moezip does. moezip hashes and checks them too.

The peak is the system's own figure for the process (``ru_maxrss``); interpreter and libraries are inside.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import measure
import models

BASE_BYTES = 600 * measure.MIB
MIB = measure.MIB


def ceiling(shape: models.Shape, tokens: int) -> int:
    """One layer, the hidden states of all tokens, 600 MiB."""
    return shape.layer_bytes + 2 * tokens * shape.hidden + BASE_BYTES


def calibrate(folder: Path, text: Path, given: Any, out: Path, *more: str | Path | int) -> measure.Finished:
    command = measure.moezip(
        "calibrate", folder, "--data", text, "--tokens", given.tokens, "--seq-len", given.seq_len, "--out", out,
        "--overwrite", "--quiet", *more,
    )  # fmt: skip
    return measure.process(command, HF_HUB_OFFLINE="1")


def prune(folder: Path, stats: Path, keep: int, out: Path) -> dict[str, float]:
    """Seconds and peak of the process, seconds that the command itself counts, bytes kept."""
    shutil.rmtree(out, ignore_errors=True)
    command = measure.moezip("prune", folder, out, "--method", "reap", "--keep", keep, "--stats", stats, "--json")
    done = measure.process(command, HF_HUB_OFFLINE="1")
    report = json.loads(done.output)
    return {
        "seconds": done.seconds,
        "command_seconds": report["seconds"],
        "peak_rss_bytes": done.peak_rss_bytes,
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def copy(pruned: Path, out: Path) -> dict[str, float]:
    """The kept bytes through ``dd`` into one file, flushed to the disk."""
    shards = sorted(pruned.glob("*.safetensors"))
    words: list[object] = [
        "sh",
        "-c",
        'out=$1; shift; cat "$@" | dd of="$out" bs=16M iflag=fullblock conv=fsync',
        "copy",
        out,
    ]
    out.unlink(missing_ok=True)
    done = measure.process([*words, *shards])
    out.unlink()
    return {"seconds": done.seconds, "bytes": sum(file.stat().st_size for file in shards)}


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--model", default="large", choices=[name for name in models.SHAPES if "-" not in name])
    parser.add_argument("--rounds", type=int, default=3, help="of pruning against copying")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=512)
    given = parser.parse_args()
    names = [given.model, f"{given.model}-deep"]
    with measure.work_folder(given.work) as work:
        measure.say("making the checkpoints, unless they are there")
        # in a process of its own: this one has to stay small, see measure.py
        measure.process([sys.executable, measure.HERE / "models.py", *names, "--work", work])
        text = models.text(given.tokens, models.SHAPES[given.model].vocabulary, work)
        experts = models.SHAPES[given.model].experts
        calibrations: dict[str, dict[str, int]] = {}
        prunings: dict[str, dict[str, list[dict[str, float]]]] = {}
        for name in names:
            stats, limit = work / f"{name}.stats.safetensors", ceiling(models.SHAPES[name], given.tokens)
            measure.say(f"calibrating {name}")
            calibrations[name] = {
                "bytes": models.SHAPES[name].bytes,
                "ceiling": limit,
                "under_ceiling": calibrate(work / name, text, given, stats, "--max-memory", limit).peak_rss_bytes,
                "without": calibrate(work / name, text, given, stats).peak_rss_bytes,
            }
        print_calibration(names, calibrations)
        for name in names:
            stats, out, keep = work / f"{name}.stats.safetensors", work / f"{name}.pruned", experts // 2
            arms = {
                f"moezip {name}": partial(prune, work / name, stats, keep, out),
                f"copy {name}": partial(copy, out, work / "copy.bin"),
            }
            prunings[name] = measure.in_turns(given.rounds, arms)
            shutil.rmtree(out)
        print_pruning(prunings)
    measure.save(given.json, {"memory": {"calibrate": calibrations, "prune": prunings}})


def print_calibration(names: list[str], found: dict[str, dict[str, int]]) -> None:
    rows = [
        (
            name, f"{one['bytes'] / MIB:.0f}", f"{one['ceiling'] / MIB:.0f}", f"{one['under_ceiling'] / MIB:.0f}",
            f"{one['under_ceiling'] / one['ceiling']:.2f}", f"{one['without'] / MIB:.0f}",
        )
        for name, one in found.items()
    ]  # fmt: skip
    first, second = (found[name] for name in names)
    rows.append((
        "twice the layers", f"{second['bytes'] / first['bytes']:.2f}x", f"{second['ceiling'] / first['ceiling']:.2f}x",
        f"{second['under_ceiling'] / first['under_ceiling']:.2f}x", "", f"{second['without'] / first['without']:.2f}x",
    ))  # fmt: skip
    head = ("calibrate, MiB", "model", "ceiling", "peak under it", "of ceiling", "peak with none")
    print(measure.table(head, rows) + "\n")


def print_pruning(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    rows = []
    for arms in found.values():
        base = measure.median([run["bytes"] / run["seconds"] for run in list(arms.values())[1]])
        for name, runs in arms.items():
            rates = [run["bytes"] / run["seconds"] / 1e6 for run in runs]
            rate = measure.median(rates)
            own = [run["bytes"] / run["command_seconds"] / 1e6 for run in runs if "command_seconds" in run]
            peaks = [run["peak_rss_bytes"] / MIB for run in runs if "peak_rss_bytes" in run]
            rows.append((
                name, f"{runs[0]['bytes'] / 1e6:.0f}", f"{rate:.0f}", measure.all_of(rates, 0),
                f"{rate * 1e6 / base:.2f}", f"{measure.median(own):.0f}" if own else "",
                f"{max(peaks):.0f}" if peaks else "",
            ))  # fmt: skip
    head = ("prune from statistics", "kept MB", "MB/s", "all", "of copy", "MB/s, start-up left out", "peak MiB")
    print(measure.table(head, rows))


if __name__ == "__main__":
    main()

"""What a backward pass costs beside the forward pass alone: time, peak memory of whole processes, disk.

    python benchmarks/backward.py --work CACHE

What ``moezip calibrate`` runs, without and with gradients, on the same tokens, in turns; then the whole command with
``--record gradients``, which goes on to measure probes. Each is a process of its own, under the tightest ceiling that
holds one layer, the hidden states and 600 MiB (``--max-memory``); the model is larger than the ceiling. The peak is the
system's own figure for the process (``ru_maxrss``), interpreter and libraries inside. Disk is the most that the work
folder held, looked at every tenth of a second, beside what ``--dry-run`` says of the pass with gradients.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import measure
import memory
import models

ARMS = ("forward", "forward and backward", "and probes (the command)")
# The calibration of the command without what comes after it: checkpoint, text, statistics, tokens, tokens per window,
# ceiling, records.
PASS = """
import sys
from pathlib import Path
from moezip.calibrate.data import domains_of
from moezip.pipeline import Common, opened, run_calibration
from moezip.pipeline.calibrate import forget, work_folder
folder, text, stats, tokens, seq_len, limit, *record = sys.argv[1:]
common, work = Common(seq_len=int(seq_len), max_memory=int(limit)), work_folder(Path(stats))
texts = domains_of([Path(text)], int(tokens))
run_calibration(opened(folder), texts, common, record=record or None, workdir=work).save(Path(stats))
forget(work)
"""
EVERY_SECONDS = 0.1


def run(folder: Path, text: Path, given: Any, limit: int, arm: str) -> dict[str, float]:
    """One whole process: seconds, processor seconds, peak memory, most disk."""
    stats = folder.with_suffix(".stats.safetensors")
    work = Path(f"{stats}.moezip-work")
    most, done = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(EVERY_SECONDS):
            most = max(most, _size(work))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        if arm == ARMS[2]:
            ended = memory.calibrate(folder, text, given, stats, "--max-memory", limit, "--record", "gradients")
        else:
            words = [
                folder,
                text,
                stats,
                given.tokens,
                given.seq_len,
                limit,
                *(["gradients"] if arm == ARMS[1] else []),
            ]
            ended = measure.process([sys.executable, "-c", PASS, *words], HF_HUB_OFFLINE="1")
    finally:
        done.set()
        watcher.join()
    if work.exists():
        raise SystemExit(f"{work} was left behind")
    return {
        "seconds": ended.seconds,
        "cpu_seconds": ended.cpu_seconds,
        "peak_rss_bytes": ended.peak_rss_bytes,
        "disk_bytes": most,
    }


def _size(folder: Path) -> int:
    """Bytes of all files, which may come and go meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def promised(folder: Path, text: Path, given: Any) -> int:
    """The disk that ``--dry-run`` names."""
    command = measure.moezip(
        "prune", folder, folder.with_suffix(".pruned"), "--method", "nats", "--ratio", "0.5", "--data", text,
        "--tokens", given.tokens, "--seq-len", given.seq_len, "--dry-run", "--json",
    )  # fmt: skip
    found: int = json.loads(measure.process(command, HF_HUB_OFFLINE="1").output)["disk_bytes"]
    return found


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--model", default="large", choices=sorted(models.SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=512)
    given = parser.parse_args()
    shape = models.SHAPES[given.model]
    limit = memory.ceiling(shape, given.tokens)
    with measure.work_folder(given.work) as work:
        measure.say("making the checkpoint, unless it is there")
        # in a process of its own: this one has to stay small, see measure.py
        measure.process([sys.executable, measure.HERE / "models.py", given.model, "--work", work])
        text = models.text(given.tokens, shape.vocabulary, work)
        arms = {name: partial(run, work / given.model, text, given, limit, name) for name in ARMS}
        found = measure.in_turns(given.rounds, arms)
        disk = promised(work / given.model, text, given)
    report(found, shape.bytes, limit, disk)
    values = {"model_bytes": shape.bytes, "ceiling": limit, "promised_disk": disk, "runs": found}
    measure.save(given.json, {"backward": values})


def report(found: dict[str, list[dict[str, float]]], model: int, limit: int, disk: int) -> None:
    base = found[ARMS[0]]
    rows = []
    for name, runs in found.items():
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(runs, base, strict=True)]
        work = [one["cpu_seconds"] / other["cpu_seconds"] for one, other in zip(runs, base, strict=True)]
        peak = max(one["peak_rss_bytes"] for one in runs)
        rows.append((
            name, f"{measure.median([one['seconds'] for one in runs]):.0f}", f"{measure.median(ratios):.2f}",
            measure.all_of(ratios), f"{measure.median(work):.2f}", f"{peak / measure.MIB:.0f}", f"{peak / limit:.2f}",
            f"{max(one['disk_bytes'] for one in runs) / measure.MIB:.0f}",
        ))  # fmt: skip
    head = ("calibrate", "s", "to forward", "all", "processor time", "peak MiB", "of ceiling", "disk MiB")
    print(measure.table(head, rows))
    print(
        f"\nmodel {model / measure.MIB:.0f} MiB, ceiling {limit / measure.MIB:.0f} MiB, disk told before "
        f"{disk / measure.MIB:.0f} MiB"
    )


if __name__ == "__main__":
    main()

"""Calibration tokens per second against a plain transformers forward of the same tokens with the whole model in memory.

    python benchmarks/calibration.py --work CACHE

Both run in this process, in turns. The plain forward (``experts_implementation="grouped_mm"``, no logits, no
statistics) is loaded before the clock starts and gets the fastest of the batch sizes that are tried. moezip's time is
of one whole pass, all statistics recorded: building the empty model, reading the weights from disk, computing,
recording. Its rate is given with the reading and without. ``--cold`` drops the shards from the page cache before every
pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import models


def rows_of(tokens: int, seq_len: int, vocabulary: int) -> Any:
    """Random rows, moezip's and the plain forward's alike."""
    import torch

    from moezip.calibrate.data import Rows

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (tokens // seq_len, seq_len), generator=generator)
    return Rows(ids, None, ("random",) * len(ids))


def plain_forward(folder: Path, rows: Any) -> Callable[[int], float]:
    """Loads the model; the function given back runs all rows in batches of that many and returns the seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()

    def run(batch: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            for start in range(0, len(rows.ids), batch):
                model.model(rows.ids[start : start + batch], use_cache=False)
        return time.perf_counter() - begun

    return run


@contextmanager
def counted(kind: Any, name: str, seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds what ``kind.name`` takes to ``seconds[stage]``."""
    original = getattr(kind, name)

    def timed(*words: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*words, **options)
        finally:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun

    setattr(kind, name, timed)
    try:
        yield
    finally:
        setattr(kind, name, original)


def moezip_pass(folder: Path, rows: Any) -> dict[str, float]:
    """One pass; seconds in all and by stage."""
    from moezip.arch.skeleton import Skeleton
    from moezip.calibrate.capture import Capture
    from moezip.calibrate.record import RECORDS
    from moezip.calibrate.run import calibrate
    from moezip.calibrate.stream import Stream
    from moezip.checkpoint.reader import Checkpoint

    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    with (
        counted(Skeleton, "__init__", seconds, "build"),
        counted(Skeleton, "load", seconds, "read"),
        counted(Stream, "_call", seconds, "forward"),
        counted(Capture, "add", seconds, "record"),
    ):
        calibrate(Checkpoint.open(folder), rows, RECORDS)
    whole = time.perf_counter() - begun
    return {"all": whole, **seconds, "rest": whole - sum(seconds.values())}


def forget(folder: Path) -> None:
    """Asks the system to drop the shards from its page cache (Linux)."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--model", default="large", choices=sorted(models.SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16], help="rows, tried with the plain forward")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    given = parser.parse_args()
    with measure.work_folder(given.work) as work:
        measure.say(f"making {given.model}, unless it is there")
        folder = models.checkpoint(given.model, work)
        rows = rows_of(given.tokens, given.seq_len, models.SHAPES[given.model].vocabulary)
        plain = plain_forward(folder, rows)

        def ours() -> dict[str, float]:
            if given.cold:
                forget(folder)
            return moezip_pass(folder, rows)

        tried = {batch: plain(batch) for batch in given.batch for _ in range(2)}  # the second time counts
        batch = min(tried, key=lambda each: tried[each])
        ours()  # once before the clock as well
        found = measure.in_turns(given.rounds, {"plain": lambda: {"all": plain(batch)}, "moezip": ours})
    tokens = rows.tokens()
    base = tokens / measure.median([run["all"] for run in found["plain"]])
    report(tokens, base, batch, found["plain"], found["moezip"])
    measure.save(given.json, {"calibration": {"tokens": tokens, "tried": tried, "batch": batch, "seconds": found}})


def report(tokens: int, base: float, batch: int, plain: list[dict[str, float]], ours: list[dict[str, float]]) -> None:
    """``base``: tokens per second of the plain forward."""
    rows = []
    without = [run["all"] - run["read"] for run in ours]
    for name, seconds in (
        (f"transformers, {batch} rows at a time", [run["all"] for run in plain]),
        ("moezip, reading included", [run["all"] for run in ours]),
        ("moezip, reading left out", without),
    ):
        rates = [tokens / value for value in seconds]
        rate = measure.median(rates)
        rows.append((name, f"{rate:.0f}", measure.all_of(rates, 0), f"{rate / base:.2f}"))
    print(measure.table(("pass", "tokens/s", "all", "ratio"), rows) + "\n")
    whole = measure.median([run["all"] for run in ours])
    shares = []
    for stage, what in (
        ("build", "the empty model"), ("read", "weights from disk"), ("forward", "the model's forward, norms included"),
        ("record", "sums"), ("rest", "hidden states, checks, opening"),
    ):  # fmt: skip
        value = measure.median([run[stage] for run in ours])
        shares.append((f"{stage}: {what}", f"{value:.2f}", f"{value / whole:.0%}"))
    print(measure.table(("moezip's time", "s", "share"), shares))


if __name__ == "__main__":
    main()

"""Calibration tokens per second against a plain transformers forward of the same tokens with the whole model in memory.

    python benchmarks/calibration.py --work CACHE

Both run in this process, in turns. The plain forward (``experts_implementation="grouped_mm"``, no logits, no
statistics) is loaded before the clock starts and gets the fastest of the batch sizes that are tried. moezip's time is
of one whole pass, all statistics recorded: building the empty model, reading the weights from disk, computing,
recording. Its rate is given with the reading and without, and a third arm, the same pass with nothing recorded, shows
what the statistics cost. Core seconds are those of the processor in all threads; on a machine that is busy with other
things they say more than the clock. ``--cold`` drops the shards from the page cache before every pass.
"""

from __future__ import annotations

import os
import threading
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


def plain_forward(folder: Path, rows: Any) -> Callable[[int], dict[str, float]]:
    """Loads the model; the function given back runs all rows in batches of that many and returns the seconds."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()

    def run(batch: int) -> dict[str, float]:
        begun, cores = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for start in range(0, len(rows.ids), batch):
                model.model(rows.ids[start : start + batch], use_cache=False)
        return {"all": time.perf_counter() - begun, "core": time.process_time() - cores}

    return run


@contextmanager
def counted(kind: Any, name: str, seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds what ``kind.name`` takes to ``seconds[stage]``, over all threads."""
    original, lock = getattr(kind, name), threading.Lock()
    seconds[stage] = 0.0

    def timed(*words: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*words, **options)
        finally:
            with lock:
                seconds[stage] += time.perf_counter() - begun

    setattr(kind, name, timed)
    try:
        yield
    finally:
        setattr(kind, name, original)


def moezip_pass(folder: Path, rows: Any, record: bool) -> dict[str, float]:
    """One pass; seconds in all and by stage. Stages do not overlap and run one after the other."""
    from moezip.arch.skeleton import Skeleton
    from moezip.calibrate.record import RECORDS
    from moezip.calibrate.run import calibrate
    from moezip.calibrate.stream import Stream
    from moezip.checkpoint.reader import Checkpoint

    seconds: dict[str, float] = {}
    begun, cores = time.perf_counter(), time.process_time()
    with (
        counted(Skeleton, "__init__", seconds, "build"),
        counted(Skeleton, "load", seconds, "read"),
        counted(Stream, "_layer", seconds, "layers"),
    ):
        if record:
            calibrate(Checkpoint.open(folder), rows, RECORDS)
        else:
            stream = Stream(Checkpoint.open(folder))
            states = stream.embed(rows)
            for _ in stream.run(rows, states):
                pass
            states.close()
    whole = time.perf_counter() - begun
    core = time.process_time() - cores
    return {"all": whole, **seconds, "rest": whole - sum(seconds.values()), "core": core}


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

        def ours(record: bool) -> dict[str, float]:
            if given.cold:
                forget(folder)
            return moezip_pass(folder, rows, record)

        tried = {batch: plain(batch)["all"] for batch in given.batch for _ in range(2)}  # the second time counts
        batch = min(tried, key=lambda each: tried[each])
        ours(True)  # once before the clock as well
        arms = {
            "plain": lambda: plain(batch),
            "moezip": lambda: ours(True),
            "unrecorded": lambda: ours(False),
        }
        found = measure.in_turns(given.rounds, arms)
    report(rows.tokens(), batch, found)
    values = {"tokens": rows.tokens(), "tried": tried, "batch": batch, "seconds": found}
    measure.save(given.json, {"calibration": values})


def report(tokens: int, batch: int, found: dict[str, list[dict[str, float]]]) -> None:
    """Prints rates, and where the time goes."""
    ours = found["moezip"]
    passes = {
        f"transformers, {batch} rows at a time": [run["all"] for run in found["plain"]],
        "moezip, reading included": [run["all"] for run in ours],
        "moezip, reading left out": [run["all"] - run["read"] for run in ours],
        "moezip, nothing recorded": [run["all"] for run in found["unrecorded"]],
    }
    arms = ["plain", "moezip", None, "unrecorded"]
    base, best = measure.median(next(iter(passes.values()))), min(next(iter(passes.values())))
    rows = [
        (
            name,
            f"{tokens / measure.median(seconds):.0f}",
            measure.all_of([tokens / value for value in seconds], 0),
            f"{base / measure.median(seconds):.2f}",
            f"{best / min(seconds):.2f}",
            "" if arm is None else f"{measure.median([run['core'] for run in found[arm]]):.1f}",
        )
        for arm, (name, seconds) in zip(arms, passes.items())
    ]
    print(measure.table(("pass", "tokens/s", "all", "ratio", "of the best", "core s"), rows) + "\n")

    def stage(arm: str, name: str) -> float:
        return measure.median([run[name] for run in found[arm]])

    statistics = stage("moezip", "layers") - stage("unrecorded", "layers")
    shares = {
        "building the empty model": stage("moezip", "build"),
        "reading weights": stage("moezip", "read"),
        "layers, nothing recorded": stage("unrecorded", "layers"),
        "statistics (difference)": statistics,
        "embedding and the rest": stage("moezip", "rest"),
    }
    whole = stage("moezip", "all")
    lines = [(name, f"{value:.2f}", f"{value / whole:.0%}") for name, value in shares.items()]
    print(measure.table(("where moezip's time goes", "s", "share"), lines))


if __name__ == "__main__":
    main()

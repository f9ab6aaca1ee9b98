"""Alignment of experts before they are averaged: seconds per layer, and what it is worth.

    python benchmarks/merge_align.py
    python benchmarks/merge_align.py --checkpoint CKPT --calib calib --heldout heldout

Without a checkpoint: one layer of random experts (the slow case: no neuron resembles another) of published shapes,
half of them to go; bfloat16 weights in memory, so the disk is left out. One pair of experts of Mixtral's width goes
through random projections and parts. Then how much of the largest likeness parts find, on one width that both ways can
do: for a noisy copy of an expert, and for an unrelated one.

With one: held-out rise of the loss of ``--method`` by way of aligning, at ``--keep`` experts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure

# name, hidden size, width, experts, experts left
SHAPES = (
    ("Qwen3-30B-A3B", 2048, 768, 128, 64),
    ("Qwen1.5-MoE", 2048, 1408, 60, 30),
    ("DeepSeek-V3, 16 of 256", 7168, 2048, 16, 8),
    ("Mixtral 8x7B, one pair", 4096, 14336, 2, 1),
)
DISTINCT = 8  # experts that are in memory; the others are the same ones again


class Layer:
    """Random experts that look like a layer to ``moezip.merge.align``."""

    def __init__(self, hidden: int, width: int, experts: int, groups: tuple[tuple[int, ...], ...]):
        import torch

        chance = torch.Generator().manual_seed(0)
        self.facts, self.groups, self.roles = SimpleNamespace(width=width), groups, ("gate", "up", "down")
        self._stored = [
            {
                role: torch.empty((hidden, width) if role == "down" else (width, hidden), dtype=torch.bfloat16).normal_(
                    0, 0.02, generator=chance
                )
                for role in self.roles
            }
            for _ in range(min(DISTINCT, experts))
        ]

    def matrix(self, expert: int, role: str) -> Any:
        return self._stored[expert % len(self._stored)][role].float()


def speed() -> list[dict[str, Any]]:
    import torch

    from moezip.merge import align
    from moezip.merge.params import MergeParams

    found = []
    for name, hidden, width, experts, keep in SHAPES:
        # two by two, members a step apart from their dominants so that no expert meets itself
        groups = tuple((e, keep + (e + 1) % keep) for e in range(keep))
        layer: Any = Layer(hidden, width, experts, groups)
        begun, worked = time.perf_counter(), time.process_time()
        align.orders(layer, MergeParams())
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
        measure.say(f"{name}: {seconds:.1f} s, {worked:.1f} s of processors")
        found.append({"shape": name, "hidden": hidden, "width": width, "members": experts - keep, "seconds": seconds,
                      "processor_seconds": worked, "threads": torch.get_num_threads()})  # fmt: skip
    return found


def parts(width: int = 2048, columns: int = 2048, part: int = 512) -> list[dict[str, Any]]:
    """The likeness (sum of inner products) that parts of ``part`` find, as a share of the largest."""
    import torch

    from moezip.merge import align

    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(width, columns, generator=chance)
    found = []
    for name, member in (
        ("copy with noise of the same size", rows + torch.randn(width, columns, generator=chance)),
        ("unrelated", torch.randn(width, columns, generator=chance)),
    ):
        member = member[torch.randperm(width, generator=chance)]

        def likeness(member: Any = member) -> float:
            return float((rows * member[list(align.matched(rows, member))]).sum())

        best = likeness()
        wide, size = align.WIDE, align.PART
        try:
            align.WIDE = align.PART = part
            cut = likeness()
        finally:
            align.WIDE, align.PART = wide, size
        found.append({"member": name, "width": width, "parts": width // part, "share": cut / best})
    return found


def quality(given: argparse.Namespace) -> list[dict[str, Any]]:
    from moezip.calibrate.data import domains_of
    from moezip.evaluate.loss import evaluate
    from moezip.export.readers import planned
    from moezip.pipeline import Common, opened, run_calibration
    from moezip.pipeline.merge import MergeJob, make_merge_plan, passing, prepare_merge
    from moezip.plan.packed import LayerFiles

    calib = sorted(given.calib.iterdir()) if given.calib.is_dir() else [given.calib]
    texts, common, model = domains_of(calib, given.tokens), Common(seq_len=given.seq_len), opened(given.checkpoint)

    def rise(view: Any) -> float:
        found = evaluate(view, data=[given.heldout], tasks=[], tokens=given.heldout_tokens, seq_len=given.seq_len)
        assert found.loss is not None
        return float(found.loss.nll)

    dense, stats, found = rise(model.source), None, list[dict[str, Any]]()
    for keep in given.keep:
        for align, reference in (
            ("none", "dominant"), ("weights", "dominant"), ("weights", "first"), ("activations", "dominant"),
            ("activations", "first"),
        ):  # fmt: skip
            settings = {"align": align, "reference": reference, "router": given.router}
            job = MergeJob(given.method, keep=keep, settings=settings, texts=texts)
            prepared = prepare_merge(given.checkpoint, job, common)
            with tempfile.TemporaryDirectory() as work:
                if stats is None:
                    stats = run_calibration(model, texts, common, workdir=Path(work) / "s", **passing(prepared))
                begun = time.perf_counter()
                plan, solved, _ = make_merge_plan(prepared, job, stats, common, Path(work) / "m")
                seconds = time.perf_counter() - begun
                loss = rise(planned(model.source, plan, None, LayerFiles(solved.folder)))
            measure.say(f"{keep} {align} {reference}: {loss - dense:+.4f}")
            found.append({"keep": keep, "align": align, "reference": reference, "rise": loss - dense,
                          "seconds": seconds})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a trained model's folder, or the word demo")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--method", default="m-smoe")
    parser.add_argument("--router", default="remap")
    parser.add_argument("--keep", type=int, nargs="+", default=[24, 16])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=3_584, help="of each held-out file")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()
    if given.checkpoint is None:
        times, shares = speed(), parts()
        print(f"{times[0]['threads']} threads\n")
        lines = [
            (
                r["shape"], str(r["width"]), str(r["members"]), f"{r['seconds']:.1f}", f"{r['processor_seconds']:.1f}",
                f"{r['processor_seconds'] / r['members']:.2f}",
            )
            for r in times
        ]  # fmt: skip
        print(measure.table(("layer", "width", "members", "s", "processor s", "each"), lines) + "\n")
        found = [(r["member"], str(r["width"]), str(r["parts"]), f"{r['share']:.1%}") for r in shares]
        print(measure.table(("member", "width", "parts", "of the largest likeness"), found))
        measure.save(given.json, {"align": times, "parts": shares})
        return
    if given.calib is None or given.heldout is None:
        parser.error("--checkpoint needs --calib and --heldout")
    rises = quality(given)
    rows = [(str(r["keep"]), r["align"], r["reference"], f"{r['rise']:+.4f}", f"{r['seconds']:.1f}") for r in rises]
    print(measure.table(("experts", "align", "reference", "rise of the loss", "s"), rows))
    measure.save(given.json, {"align_quality": rises})


if __name__ == "__main__":
    main()

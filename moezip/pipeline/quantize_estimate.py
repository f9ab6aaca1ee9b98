"""``moezip quantize --dry-run``: what it would do, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moezip.arch.families import identify
from moezip.export.stock import tensor_bytes
from moezip.pipeline.common import Common
from moezip.pipeline.estimate import DISK_BYTES_PER_SECOND, matmul_rate
from moezip.pipeline.items import grid_counts
from moezip.pipeline.quantize import QuantizeJob, chooser, prepare_quantize, views
from moezip.pipeline.widths import PLANNED, WIDTHS, needs_prices, planned
from moezip.report.overview import overview

# What a solver's arithmetic runs at against bf16 products: float32, factorizations, short rows.
SOLVER_SLOWDOWN = 8
# Forward passes that the prices of widths take: one that records, one with gradients (as three), one that prices.
PRICING_PASSES = 5


@dataclass(frozen=True, slots=True)
class QuantizeEstimate:
    """What a quantization would do; nothing was read but headers.

    Attributes:
        widths: matrices by grid; with an allocator that reads text or weights, those of a model in which every weight
            matters alike. experts: that stay, by layer, on the same terms.
        seconds, memory_bytes: rough; ``assumes`` says on what.
        disk_bytes: what waits in the work folder until the output is written.
    """

    solver: str
    matrices: int
    widths: dict[str, int]
    experts: list[int]
    group: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    assumes: str


def estimate_quantize(checkpoint: str, job: QuantizeJob, common: Common) -> QuantizeEstimate:
    """``moezip quantize --dry-run``: reads no data and writes nothing."""
    prepared = prepare_quantize(checkpoint, job, common)
    model = prepared.model
    plain, split = views(model, job.plan, job.values)
    if job.plan is not None and job.planned:
        chosen = planned(job.plan, split)
    else:
        chosen = chooser(prepared, job, plain, split, None, Path(), common).forecast()
    if chosen.plan is not split.plan:
        split = views(model, chosen.plan, job.values)[1]
    guessed = prepared.wanted.allocate not in ("uniform", PLANNED)
    shapes = {name: split.spec(name).shape for name in chosen.packing}
    stored = sum(grid.nbytes(*shapes[name]) for name, grid in chosen.packing.items())
    weights = sum(rows * columns for rows, columns in shapes.values())
    before = sum(split.spec(name).bytes for name in chosen.packing)
    seen = overview(model.source)
    tokens = sum(text.tokens for text in job.texts) if prepared.reads_text else 0
    rate = matmul_rate()
    flops = 0.0
    if prepared.layerwise:
        flops += 3 * tokens * 2 * seen.active_parameters
    if needs_prices(prepared.wanted):
        flops += PRICING_PASSES * tokens * 2 * seen.active_parameters
    share = {fact.layer: fact.top_k / fact.experts for fact in model.facts}
    entry = identify(split.config, split.folder)  # fused experts have names of their own here
    for name, (rows, columns) in shapes.items():
        claim = entry.claim(name, split.config)
        reached = tokens * (share.get(claim.layer, 1.0) if claim.kind == "expert" and claim.layer is not None else 1.0)
        if prepared.layerwise:
            flops += SOLVER_SLOWDOWN * (2 * reached * columns**2 + columns**3 + 6 * rows * columns**2)
        if needs_prices(prepared.wanted):
            flops += 2 * reached * columns**2 + 2 * len(WIDTHS) * rows * columns**2
    hidden = tokens * seen.hidden * 2
    memory = 600 * 2**20 + seen.largest_layer_bytes + 2 * hidden + stored // max(seen.layers, 1)
    return QuantizeEstimate(
        solver=prepared.method.name,
        matrices=len(shapes),
        widths=grid_counts(chosen.packing),
        experts=[len(layer.picks) for layer in chosen.plan.layers],
        group=prepared.wanted.group,
        bytes_before=tensor_bytes(model.source),
        bytes_after=tensor_bytes(split) - before + stored,
        bits_per_weight=8 * stored / max(weights, 1),
        tokens=tokens,
        seconds=flops / rate + (seen.bytes + 2 * stored) / DISK_BYTES_PER_SECOND + 6,
        memory_bytes=min(memory, common.max_memory or memory),
        disk_bytes=stored,
        assumes=("widths of a model in which every weight matters alike, " if guessed else "")
        + f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start",
    )

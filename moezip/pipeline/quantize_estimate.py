"""``moezip quantize --dry-run``: what it would do, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from moezip.errors import UsageError
from moezip.export.stock import tensor_bytes
from moezip.pipeline.common import Common
from moezip.pipeline.estimate import DISK_BYTES_PER_SECOND, matmul_rate
from moezip.pipeline.items import grid_counts, items_of
from moezip.pipeline.quantize import QuantizeJob, prepare_quantize, views
from moezip.pipeline.widths import uniform
from moezip.report.overview import overview

# What a solver's arithmetic runs at against bf16 products: float32, factorizations, short rows.
SOLVER_SLOWDOWN = 8


@dataclass(frozen=True, slots=True)
class QuantizeEstimate:
    """What a quantization would do; nothing was read but headers.

    Attributes:
        widths: matrices by grid. seconds, memory_bytes: rough; ``assumes`` says on what.
        disk_bytes: what waits in the work folder until the output is written.
    """

    solver: str
    matrices: int
    widths: dict[str, int]
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
    split = views(model, job.plan, job.values)[1]
    items = items_of(split, model)
    if job.allocate != "uniform":
        raise UsageError(
            f"what --allocate {job.allocate} chooses is known only once the text was read", where="--dry-run",
            next="see the size of whole widths with --allocate uniform",
        )  # fmt: skip
    packing, _ = uniform(items, int(job.bits or 0), prepared.wanted.group, prepared.wanted.storage)
    chosen = [item for item in items if item.name in packing]
    stored = sum(packing[item.name].nbytes(*item.shape) for item in chosen)
    weights = sum(item.shape[0] * item.shape[1] for item in chosen)
    before = sum(split.spec(item.name).bytes for item in chosen)
    seen = overview(model.source)
    layerwise = prepared.method.schedule == "layerwise"
    tokens = sum(text.tokens for text in job.texts) if layerwise else 0
    rate = matmul_rate()
    flops = 0.0
    if layerwise:
        share = {fact.layer: fact.top_k / fact.experts for fact in model.facts}
        flops = 3 * tokens * 2 * seen.active_parameters
        for item in chosen:
            rows, columns = item.shape
            reached = tokens * (share[item.layer] if item.expert is not None and item.layer is not None else 1.0)
            flops += SOLVER_SLOWDOWN * (2 * reached * columns**2 + columns**3 + 6 * rows * columns**2)
    hidden = tokens * seen.hidden * 2
    memory = 600 * 2**20 + seen.largest_layer_bytes + 2 * hidden + stored // max(seen.layers, 1)
    return QuantizeEstimate(
        solver=prepared.method.name,
        matrices=len(chosen),
        widths=grid_counts(packing),
        group=prepared.wanted.group,
        bytes_before=tensor_bytes(model.source),
        bytes_after=tensor_bytes(split) - before + stored,
        bits_per_weight=8 * stored / weights,
        tokens=tokens,
        seconds=flops / rate + (seen.bytes + 2 * stored) / DISK_BYTES_PER_SECOND + 6,
        memory_bytes=min(memory, common.max_memory or memory),
        disk_bytes=stored,
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start",
    )

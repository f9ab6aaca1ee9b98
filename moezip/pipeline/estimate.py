"""``--dry-run``: what a command would do, from headers alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import wants_gradients
from moezip.export.readers import planned
from moezip.export.stock import tensor_bytes
from moezip.pipeline.common import Common
from moezip.pipeline.neurons import neuron_layers
from moezip.pipeline.probes import probing, probing_cost
from moezip.pipeline.prune import Prepared, PruneJob, make_plan, prepare_prune, require_text
from moezip.plan.plan import LayerPlan, Pick, Plan
from moezip.report.overview import overview

# A pass with gradients against a plain one: every layer twice forward and once backward makes 3 to 4; the rest is a
# guess at what its smaller micro-batches cost.
GRADIENT_WORK = 5
DISK_BYTES_PER_SECOND = 1e9  # a plain SSD; said beside the estimate


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a prune would do; nothing was read but headers (and statistics, if saved ones were given).

    Attributes:
        kept: ids by layer, where they can be known without data.
        seconds, memory_bytes: rough; ``assumes`` says on what.
        disk_bytes: kept on disk while a backward pass runs, or probes are measured after it, beside the output.
        probe_layer_tokens: tokens times decoder layers that measured probes run through, after that pass.
        pass_seconds: those of ``seconds`` that read the text.
    """

    method: str
    keep: int
    experts: int
    moe_layers: int
    bytes_before: int
    bytes_after: int
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    kept: dict[str, list[int]] | None
    assumes: str
    probe_layer_tokens: int = 0
    pass_seconds: float = 0.0


def dry_run(checkpoint: str, job: PruneJob, common: Common) -> Estimate:
    """``moezip prune --dry-run``: reads no data and writes nothing."""
    prepared = prepare_prune(checkpoint, job, common)
    require_text(prepared, job)
    model = prepared.model
    kept = None
    if job.stats is not None or not prepared.method.reads_text:
        stats = None
        if job.stats is not None:
            from moezip.calibrate.statistics import Statistics as Saved

            stats = Saved.load(job.stats)
        plan = make_plan(prepared, job, stats, common)
        kept = {str(layer.layer): list(layer.kept) for layer in plan.layers}
    else:
        plan = alike(prepared, job)
    seen = overview(model.source)
    after = tensor_bytes(planned(model.source, plan, job.reader))
    passes = prepared.method.reads_text and job.stats is None
    tokens = sum(text.tokens for text in job.texts) if passes else 0
    rate = matmul_rate() if passes else 1.0
    hidden = tokens * seen.hidden * 2
    gradients = passes and wants_gradients(prepared.method.needs)
    work = GRADIENT_WORK if gradients else 1
    reads = seen.bytes * (2 if gradients else 1) if passes else 0
    seconds = tokens * 2 * seen.active_parameters * work / rate + reads / DISK_BYTES_PER_SECOND
    seconds += tokens * own_seconds(prepared, rate)
    asked = probing([(prepared.method, prepared.params)] if gradients else [])
    itemsize = 4 if seen.dtype == "F32" else 2
    cost = probing_cost(model.facts, seen.layers, tokens, asked["probes"], asked["kinds"], itemsize)
    probes = cost.layer_tokens
    seconds += probes / seen.layers * 2 * seen.active_parameters / rate
    seconds += seen.bytes / DISK_BYTES_PER_SECOND if probes else 0
    disk = 0
    if gradients:
        from moezip.calibrate.kept import disk_bytes

        backward = disk_bytes(tokens, seen.hidden, itemsize, seen.layers, model.facts)
        disk = max(backward, cost.disk_bytes)  # one after the other
    memory = (600 * 2**20 + seen.largest_layer_bytes + hidden) if passes else 400 * 2**20
    return Estimate(
        method=prepared.method.name,
        keep=prepared.keep,
        experts=model.facts[0].experts,
        moe_layers=len(model.facts),
        bytes_before=seen.bytes,
        bytes_after=after,
        tokens=tokens,
        seconds=seconds + 2 * after / DISK_BYTES_PER_SECOND + 6,
        memory_bytes=min(memory, common.max_memory or memory),
        disk_bytes=disk,
        kept=kept,
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start" if passes else "disk 1 GB/s",
        probe_layer_tokens=probes,
        pass_seconds=seconds,
    )


def alike(prepared: Prepared, job: PruneJob) -> Plan:
    """A plan as large as the one that the job will make, chosen without looking."""
    model = prepared.model
    if prepared.method.unit == "neuron":
        assert job.ratio is not None
        nothing = {fact.layer: np.zeros((fact.experts, fact.width)) for fact in model.facts}
        cut = neuron_layers(model, model.facts, nothing, job.ratio, prepared.params, {})
        return Plan(model.source.fingerprint, model.architecture.name, cut, prepared.params.mtp)
    # any choice of that many experts has the same size
    spread = [_first_of_groups(fact, prepared.keep) for fact in model.facts]
    layers = tuple(
        LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, ids)))
        for fact, ids in zip(model.facts, spread, strict=True)
    )
    return Plan(model.source.fingerprint, model.architecture.name, layers, prepared.params.mtp)


def own_seconds(prepared: Prepared, rate: float) -> float:
    """Seconds per token that the method's own records take, where these run parts of the layers again."""
    method = prepared.method
    records = () if method.records is None else method.records(prepared.params)
    facts = prepared.model.facts
    return sum(record.seconds(fact, rate) for record in records if record.seconds is not None for fact in facts)


def _first_of_groups(fact: LayerFacts, keep: int) -> list[int]:
    size, each = fact.experts // fact.groups, keep // fact.groups
    return [group * size + place for group in range(fact.groups) for place in range(each)]


@cache
def matmul_rate() -> float:
    """Floating-point operations per second of a bf16 matrix product here, best of three; measured once per process, so
    that estimates of several jobs compare."""
    import torch

    a = torch.zeros(512, 1024, dtype=torch.bfloat16)
    b = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * 512 * 1024 * 1024 / best

"""``moezip merge --dry-run``: what it would do, from headers alone."""

from __future__ import annotations

import math
import os
from typing import Any

from moezip.arch.spec import LayerFacts
from moezip.export.readers import planned
from moezip.export.stock import tensor_bytes
from moezip.formats.factors import Factors
from moezip.merge.align import MEANS_STEPS, PART, POWER_STEPS, TOKENS, WIDE
from moezip.merge.solve import FORMS
from moezip.pipeline.common import Common
from moezip.pipeline.estimate import DISK_BYTES_PER_SECOND, GRADIENT_WORK, Estimate, matmul_rate
from moezip.pipeline.merge import MergeJob, Prepared, prepare_merge, require_text
from moezip.plan.plan import LayerPlan, Part, Pick, Plan, RouterForm
from moezip.report.overview import overview


def estimate_merge(checkpoint: str, job: MergeJob, common: Common) -> Estimate:
    """Reads no data and writes nothing. The size is that of groups of any kind: all of one number take the same."""
    prepared = prepare_merge(checkpoint, job, common)
    require_text(prepared, job)
    model, params = prepared.model, prepared.params
    plan = alike(prepared)
    seen = overview(model.source)
    after = tensor_bytes(planned(model.source, plan, job.reader))
    tokens = sum(text.tokens for text in job.texts)
    passes = (prepared.method.reads_text and job.stats is None) + prepared.looks
    rate = matmul_rate()
    forward = tokens * 2 * seen.active_parameters / rate
    seconds = forward * passes * (GRADIENT_WORK if params.price and job.stats is None else 1)
    records = () if prepared.method.records is None else prepared.method.records(params)
    own = sum(r.seconds(fact, rate) for r in records if r.seconds is not None for fact in model.facts)
    seconds += tokens * own if job.stats is None else 0
    aligning = 0.0
    if params.align != "none":
        aligning = sum(align_seconds(fact, prepared.keep, params, rate) for fact in model.facts)
        seconds += aligning
    seconds += ((passes + 1) * seen.bytes + 2 * after) / DISK_BYTES_PER_SECOND
    shared = prepared.method.reads_text and job.stats is None  # the pass before groups are known
    gradients = GRADIENT_WORK if params.price and job.stats is None else 1
    reading = forward * gradients + tokens * own + seen.bytes / DISK_BYTES_PER_SECOND if shared else 0.0
    hidden = tokens * seen.hidden * 2 * (2 if prepared.looks else 1)
    memory = 600 * 2**20 + (seen.largest_layer_bytes + hidden if passes else 0)
    memory += max(align_bytes(fact, params) for fact in model.facts) if aligning else 0
    told = f", {aligning:.0f} s of it to put neurons in order" if aligning >= 1 else ""
    return Estimate(
        method=prepared.method.name,
        keep=prepared.keep,
        experts=model.facts[0].experts,
        moe_layers=len(model.facts),
        bytes_before=seen.bytes,
        bytes_after=after,
        tokens=tokens if passes else 0,
        seconds=seconds + 6,
        memory_bytes=min(memory, common.max_memory or memory),
        disk_bytes=after if prepared.looks else 0,
        kept=None,
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start{told}",
        pass_seconds=reading,
    )


def alike(prepared: Prepared) -> Plan:
    """A plan as large as the one that the job will make, its groups formed without looking."""
    model = prepared.model
    # fitted rows are as many as kept ones, and lie nowhere yet
    router = "remap" if FORMS[prepared.params.router] == "remap" else "kept"
    layers = tuple(any_groups(fact, prepared.keep, router) for fact in model.facts)  # type: ignore[arg-type]
    return Plan(model.source.fingerprint, model.architecture.name, layers, factors=_factors(prepared))


def _factors(prepared: Prepared) -> dict[str, Factors]:
    """What the matrices of the output are stored as, where the method stores factors: of all its experts."""
    method, entry = prepared.method, prepared.model.architecture.split
    if method.factored is None:
        return {}
    return {
        tensor.template.format(layer=fact.layer, expert=number): method.factored(fact, prepared.params)[tensor.role]
        for fact in prepared.model.facts
        for number in range(prepared.keep)
        for tensor in entry.experts
        if tensor.role in ("gate", "up", "down")
    }


def any_groups(fact: LayerFacts, keep: int, router: RouterForm) -> LayerPlan:
    """``keep`` groups, one expert each but for the last of every router group, which has the rest."""
    size, each = fact.experts // fact.groups, keep // fact.groups
    picks = []
    for first in range(0, fact.experts, size):
        picks += [Pick.keep(expert) for expert in range(first, first + each - 1)]
        rest = range(first + each - 1, first + size)
        picks.append(Pick.keep(rest[0]) if len(rest) == 1 else Pick(tuple(Part(e, 1 / len(rest)) for e in rest)))
    return LayerPlan(fact.layer, fact.experts, tuple(picks), router=router)


def align_seconds(fact: LayerFacts, keep: int, params: Any, rate: float) -> float:
    """Of a layer, all members but the dominant ones: products of their rows with the reference's, then assignments.

    Args:
        rate: operations per second of a bfloat16 product; in float32 they take 4 times as long.
    """
    columns = 2 * TOKENS if params.align == "activations" else 3 * fact.hidden
    part, parts, work = fact.width, 1, 0
    if params.align == "activations":  # both experts' activations
        work += 2 * 2 * columns * 2 * fact.hidden * fact.width
    if fact.width > WIDE:
        columns = columns if params.align == "activations" else min(columns, params.projection)
        parts = 2 ** math.ceil(math.log2(fact.width / PART))
        part = -(-fact.width // parts)
        work += int(math.log2(parts)) * 2 * (POWER_STEPS + MEANS_STEPS) * 2 * fact.width * columns
    work += parts * 2 * part**2 * columns
    # measured at 0.02 s for 768 neurons, 0.24 s for 2,048; it grows with the cube
    assigning = parts * 0.24 * (part / 2048) ** 3 / (os.cpu_count() or 1)
    return (fact.experts - keep) * (work * 4 / rate + assigning)


def align_bytes(fact: LayerFacts, params: Any) -> int:
    """Of every thread: rows of two experts, products in float32 and, for the assignment, in float64."""
    wide = fact.width > WIDE
    columns = 2 * TOKENS if params.align == "activations" else 3 * fact.hidden
    columns = min(columns, params.projection) if wide and params.align == "weights" else columns
    one = fact.width * (2 * columns + fact.hidden) * 4 + min(fact.width, PART if wide else WIDE) ** 2 * 12
    return one * (os.cpu_count() or 1)

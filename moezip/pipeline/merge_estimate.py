"""``moezip merge --dry-run``: what it would do, from headers alone."""

from __future__ import annotations

from moezip.arch.spec import LayerFacts
from moezip.export.readers import planned
from moezip.export.stock import tensor_bytes
from moezip.merge.solve import FORMS
from moezip.pipeline.common import Common
from moezip.pipeline.estimate import DISK_BYTES_PER_SECOND, GRADIENT_WORK, Estimate, matmul_rate
from moezip.pipeline.merge import MergeJob, prepare_merge, require_text
from moezip.plan.plan import LayerPlan, Part, Pick, Plan, RouterForm
from moezip.report.overview import overview


def estimate_merge(checkpoint: str, job: MergeJob, common: Common) -> Estimate:
    """Reads no data and writes nothing. The size is that of groups of any kind: all of one number take the same."""
    prepared = prepare_merge(checkpoint, job, common)
    require_text(prepared, job)
    model, params = prepared.model, prepared.params
    # fitted rows are as many as kept ones, and lie nowhere yet
    router = "remap" if FORMS[params.router] == "remap" else "kept"
    layers = tuple(_any_groups(fact, prepared.keep, router) for fact in model.facts)  # type: ignore[arg-type]
    plan = Plan(model.source.fingerprint, model.architecture.name, layers)
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
    seconds += sum(_align_seconds(fact, prepared.keep) for fact in model.facts) if params.align != "none" else 0
    seconds += ((passes + 1) * seen.bytes + 2 * after) / DISK_BYTES_PER_SECOND
    hidden = tokens * seen.hidden * 2 * (2 if prepared.looks else 1)
    memory = 600 * 2**20 + (seen.largest_layer_bytes + hidden if passes else 0)
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
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start",
    )


def _any_groups(fact: LayerFacts, keep: int, router: RouterForm) -> LayerPlan:
    """``keep`` groups, one expert each but for the last of every router group, which has the rest."""
    size, each = fact.experts // fact.groups, keep // fact.groups
    picks = []
    for first in range(0, fact.experts, size):
        picks += [Pick.keep(expert) for expert in range(first, first + each - 1)]
        rest = range(first + each - 1, first + size)
        picks.append(Pick.keep(rest[0]) if len(rest) == 1 else Pick(tuple(Part(e, 1 / len(rest)) for e in rest)))
    return LayerPlan(fact.layer, fact.experts, tuple(picks), router=router)


def _align_seconds(fact: LayerFacts, keep: int) -> float:
    """An assignment of F neurons was measured at 0.17 s for 1,408 and 0.5 s for 2,048; it grows with the cube."""
    return (fact.experts - keep) * 0.5 * (fact.width / 2048) ** 3

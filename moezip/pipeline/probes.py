"""Measured probes after a backward pass: which, on what text, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.pipeline.common import Common, Opened
from moezip.plan.factors import EXPERTS, KINDS, NEURONS, probes_of, removable

if TYPE_CHECKING:
    from moezip.arch.spec import LayerFacts
    from moezip.calibrate.data import Rows
    from moezip.calibrate.statistics import Statistics
    from moezip.plan.plan import Plan
    from moezip.registry import Method

# Probes per layer and kind of decision, where a command has no setting for them.
PROBES = 3


def probing(prunings: Iterable[tuple[Method, Any]]) -> dict[str, Any]:
    """``probes`` and ``kinds`` of the calibration for these methods and their settings.

    Only methods that go by prices ask for probes, of the kind of decision that they take.
    """
    probes, kinds = 0, set[str]()
    for method, params in prunings:
        if count := getattr(params, "probes", 0):
            probes = max(probes, count)
            kinds.add(NEURONS if method.unit == "neuron" else EXPERTS)
    return {"probes": probes, "kinds": tuple(kind for kind in KINDS if kind in kinds)}


def with_probes(
    model: Opened,
    rows: Rows,
    unseen: Callable[[], Rows],
    stats: Statistics,
    common: Common,
    count: int,
    kinds: Sequence[str],
    workdir: Path | None,
) -> Statistics:
    """``stats``, taken from ``rows``, with ``count`` probes per layer and kind, measured on some of the ``unseen``."""
    from moezip.calibrate.probes import SPREAD, affordable_tokens, measure, shared_out, spread_rows

    layers = model.architecture.integer(model.source.config, model.architecture.layers_key)
    places = _places(model.facts, count, kinds)
    if not places:
        return stats
    some = spread_rows(unseen(), SPREAD * affordable_tokens(places, layers, rows.ids.numel()))
    scored = [len(some.scored(row)) for row in range(len(some.ids))]
    total = sum(scored)
    if not total:
        return stats
    shares: dict[str, float] = {}
    for name, tokens in zip(some.domains, scored, strict=True):
        shares[name] = shares.get(name, 0.0) + tokens / total
    chosen = probes_of(model.facts, stats.domains, shares, count, kinds)
    if not chosen:
        return stats
    found = measure(
        model.source,
        some,
        [decision for decision, _ in chosen],
        shared_out(len(some.ids), len(chosen)),
        device=common.device,
        max_memory=common.max_memory,
        workdir=workdir,
        watch=common.watch,
    )
    seen = zip(chosen, found.rise(), found.error(), found.divergence(), found.tokens(), strict=True)
    probes = tuple(
        replace(probe, measured=float(rise), error=float(error), divergence=float(apart), tokens=int(tokens))
        for (_, probe), rise, error, apart, tokens in seen
    )
    return replace(stats, probes=(*stats.probes, *probes))


@dataclass(frozen=True, slots=True)
class ProbingCost:
    """What the probes of a calibration take, at most.

    Attributes:
        layer_tokens: tokens times decoder layers that they run through.
        disk_bytes: of hidden states, where these outgrow memory.
    """

    layer_tokens: int = 0
    disk_bytes: int = 0


def probing_cost(
    facts: Sequence[LayerFacts], layers: int, tokens: int, count: int, kinds: Sequence[str], itemsize: int = 2
) -> ProbingCost:
    """The cost of ``count`` probes per layer and kind after a calibration with ``tokens`` tokens.

    Args:
        layers: decoder layers of the model. itemsize: bytes of one of its numbers.
    """
    from moezip.calibrate.probes import SPREAD, affordable_tokens, layer_passes

    places = _places(facts, count, kinds)
    if not places:
        return ProbingCost()
    each = affordable_tokens(places, layers, tokens)
    disk = each * (SPREAD + len(places)) * facts[0].hidden * itemsize
    return ProbingCost(each * layer_passes(places, layers), disk)


def _places(facts: Sequence[LayerFacts], count: int, kinds: Sequence[str]) -> list[int]:
    """The layer of every probe; there are fewer where experts are too few, or most have no price."""
    return [fact.layer for fact in facts for kind in kinds if kind != EXPERTS or removable(fact) for _ in range(count)]


def factor_note(plan: Plan, stats: Statistics | None) -> str | None:
    """What the reader of a report should know where a predicted rise was to be corrected and is not; else None."""
    if stats is None or "predicted_nats" not in plan.made_by or plan.made_by["settings"].get("probes", PROBES) == 0:
        return None
    if plan.merges:  # what is priced there is no drop, and is not corrected
        return None
    taken = {
        "experts": any(len(layer.picks) < layer.experts for layer in plan.layers),
        "neurons": not all(layer.whole for layer in plan.layers),
    }
    bare = [kind for kind, is_taken in taken.items() if is_taken and kind not in plan.made_by["price_factors"]]
    if not bare:
        return None
    probed = {probe.kind for probe in stats.probes}
    if probed.isdisjoint(bare):
        return (
            f"the predicted rise is not corrected: the statistics hold no measured probes of {' and '.join(bare)} (a "
            "calibration for this method takes them, and so does `moezip calibrate --record gradients`)"
        )
    return f"the predicted rise is not corrected: the measured probes of {' and '.join(bare)} have no price"

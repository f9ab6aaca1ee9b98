"""From neuron scores to picks: which neurons of which experts stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.plan.plan import LayerPlan, Pick

Rank = Literal["global", "layer", "expert"]


def neuron_plans(
    facts: Sequence[LayerFacts],
    scores: Mapping[int, Array],
    ratio: float,
    *,
    rank: Rank = "global",
    step: int = 1,
    uniform: bool = False,
    protected: Mapping[int, Sequence[int]] | None = None,
    allowed: Callable[[int], bool] | None = None,
) -> tuple[LayerPlan, ...]:
    """Keeps the neurons of highest score, all experts staying in place.

    Neurons are kept in lots of ``step``: an expert's best ``step`` neurons, its next best, ... A lot is worth the sum
    of its scores, so with ``step`` 1 this is the plain ranking.

    Args:
        scores: per layer, [E, F], higher stays.
        ratio: share of all routed experts' neurons removed; int(N * (1 - ratio)) stay, rounded down to lots.
        rank: whether the budget is shared over the model, or held in every layer or expert.
        uniform: the same number of neurons in every expert.
        allowed: with ``uniform``, whether the architecture can have this width; the largest such width is taken.
        protected: per layer, experts that keep all neurons (not with ``uniform``, which has one width for all).

    Raises:
        UsageError: a share, a rank or a step that cannot be.
        PlanError: scores that are not finite, or nothing left.
    """
    width = facts[0].width
    if not 0 <= ratio < 1:
        raise UsageError(f"--ratio {ratio:g} is not a share removed", next="give a number from 0 up to, not with, 1")
    if rank not in ("global", "layer", "expert"):
        raise UsageError(f"rank is global, layer or expert, not {rank!r}", where=f"--set rank={rank}")
    if step < 1 or width % step:
        good = [n for n in range(1, width + 1) if width % n == 0]
        raise UsageError(
            f"round={step} does not divide the experts' width {width}", where=f"--set round={step}",
            next=f"choose one of {', '.join(map(str, good))}",
        )  # fmt: skip
    for fact in facts:
        if scores[fact.layer].shape != (fact.experts, fact.width) or not np.isfinite(scores[fact.layer]).all():
            raise PlanError(
                f"the scores of layer {fact.layer} are not {fact.experts} x {fact.width} finite numbers",
                next="the statistics are damaged or the model overflows; calibrate again",
            )
    # best neurons first inside each expert; equal scores keep the lower number
    orders = {layer: np.argsort(-found, axis=1, kind="stable") for layer, found in scores.items()}
    lots = {
        layer: np.take_along_axis(found, orders[layer], 1).reshape(len(found), -1, step).sum(2)
        for layer, found in scores.items()
    }
    if not uniform:
        for layer, experts in (protected or {}).items():
            lots[layer][list(experts)] = np.inf
    kept = _kept_lots(facts, lots, ratio, "expert" if uniform else rank, step)
    if uniform and allowed is not None:
        most = kept[facts[0].layer][0]
        fitting = next((count for count in range(most, 0, -1) if allowed(count * step)), 0)
        if not fitting:
            raise PlanError(
                f"no width of at most {most * step} neurons suits this model's shared experts and stored blocks",
                next="remove a smaller share, or use a smaller round",
            )
        kept = {layer: [fitting] * len(counts) for layer, counts in kept.items()}
    plans = []
    for fact in facts:
        picks = []
        for expert in range(fact.experts):
            best = orders[fact.layer][expert, : kept[fact.layer][expert] * step]
            picks.append(Pick.slim(expert, sorted(int(neuron) for neuron in best), fact.width))
        guarded = () if uniform else tuple((protected or {}).get(fact.layer, ()))
        means = tuple(float(value) for value in scores[fact.layer].sum(1))
        plans.append(LayerPlan(fact.layer, fact.experts, tuple(picks), means, guarded))
    if not any(len(pick.neurons or ()) or pick.neurons is None for plan in plans for pick in plan.picks):
        raise PlanError(f"--ratio {ratio:g} leaves no neuron at all", next="remove a smaller share")
    return tuple(plans)


def _kept_lots(
    facts: Sequence[LayerFacts], lots: Mapping[int, Array], ratio: float, rank: str, step: int
) -> dict[int, list[int]]:
    """How many lots every expert keeps."""

    def budget(neurons: int) -> int:
        # the decimal value that was typed: 1 - 0.3 is 0.7000000000000001 in binary
        return int(round(neurons * (1 - ratio), 6)) // step

    if rank == "expert":
        return {fact.layer: [budget(fact.width)] * fact.experts for fact in facts}
    if rank == "layer":
        return {
            fact.layer: _counts([lots[fact.layer]], budget(fact.experts * fact.width))[0] for fact in facts
        }  # fmt: skip
    total = budget(sum(fact.experts * fact.width for fact in facts))
    return dict(zip((f.layer for f in facts), _counts([lots[f.layer] for f in facts], total), strict=True))


def _counts(tables: Sequence[Array], budget: int) -> list[list[int]]:
    """Lots kept per expert if the best ``budget`` lots of all tables [E, F / step] stay.

    Lots of one expert come in falling order, so the best of all are each expert's first few; ties go to the earlier
    layer, expert and lot.
    """
    values = np.concatenate([table.reshape(-1) for table in tables])
    best = np.argsort(-values, kind="stable")[:budget]
    chosen = np.zeros(len(values), dtype=bool)
    chosen[best] = True
    counts, start = [], 0
    for table in tables:
        here = chosen[start : start + table.size].reshape(table.shape)
        counts.append([int(count) for count in here.sum(1)])
        start += table.size
    return counts

"""Pruning neurons inside experts: what can be asked for, and the layers of such a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.arch.layout import inseparable
from moezip.arch.spec import LayerFacts
from moezip.errors import ArchitectureError, UsageError
from moezip.formats.fp8_block import block_size
from moezip.pipeline.common import Opened
from moezip.plan.neurons import neuron_plans
from moezip.plan.plan import LayerPlan
from moezip.registry import Method

if TYPE_CHECKING:
    from moezip.calibrate.statistics import Array


def require_raggable(model: Opened, what: str) -> None:
    """Raises UsageError if the checkpoint cannot have layers or experts that differ."""
    if reason := inseparable(model.source.config):
        raise UsageError(f"this checkpoint cannot have {what}: {reason}", where=model.source.folder,
                         next="keep the same number everywhere, or start from the unquantized form")  # fmt: skip


def check_neurons(method: Method, model: Opened, keep: int | None, ratio: float | None, params: Any) -> None:
    """Raises UsageError, ArchitectureError or PlanError for what neurons cannot be taken from, or how."""
    if ratio is None or keep is not None:
        raise UsageError(
            f"{method.name} removes neurons inside experts, not experts", where="--keep",
            next="say what share of them with --ratio R",
        )  # fmt: skip
    if reason := inseparable(model.source.config):
        raise UsageError(
            f"{method.name} cannot take neurons out of this checkpoint: {reason}", where=model.source.folder,
            next="prune whole experts of it, or start from its unquantized form",
        )  # fmt: skip
    if params.uniform:
        model.architecture.with_width(model.source.config, model.facts[0].width)
    else:
        require_raggable(model, "experts of different widths (try --set uniform=true)")
    first = model.facts[0]  # share, rank and round are right for all layers if they are for one
    neuron_layers(model, [first], {first.layer: np.zeros((first.experts, first.width))}, ratio, params, {})


def neuron_layers(
    model: Opened,
    facts: Sequence[LayerFacts],
    scores: Mapping[int, Array],
    ratio: float,
    params: Any,
    protected: Mapping[int, Sequence[int]],
) -> tuple[LayerPlan, ...]:
    """The layers of a plan of neurons, within what the architecture and stored fp8 blocks allow."""
    stored = model.source.config.get("quantization_config")
    block = math.lcm(*block_size(model.source.config)) if stored else 1

    def allowed(width: int) -> bool:
        if width % block and width != facts[0].width:  # readers of one width read whole blocks
            return False
        try:
            model.architecture.with_width(model.source.config, width)
        except ArchitectureError:
            return False
        return True

    return neuron_plans(
        facts,
        scores,
        ratio,
        rank=params.rank,
        step=params.round,
        uniform=params.uniform,
        protected=protected,
        allowed=allowed,
    )

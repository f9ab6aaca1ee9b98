"""Statistics of the weights alone, for methods that need no data. One expert is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from moezip.arch.experts import decoded, read_expert
from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.statistics import Array
from moezip.checkpoint.source import Source
from moezip.progress import Progress, Watch, unwatched
from moezip.registry import lookup


def router_row_norm(source: Source, architecture: Architecture, fact: LayerFacts) -> Array:
    """L2 norm of each expert's row of the router weight, [E]."""
    weight = source.read(architecture.router[0].template.format(layer=fact.layer)).double()
    norms: Array = weight.norm(dim=1).numpy()
    return norms


def down_column_norm(source: Source, architecture: Architecture, fact: LayerFacts) -> Array:
    """Mean over the F columns of each expert's down projection of the column's L2 norm, [E]."""
    means = [
        float(read_expert(source, architecture, fact.layer, expert).down.double().norm(dim=0).mean())
        for expert in range(fact.experts)
    ]
    return np.array(means)


WEIGHT_RECORDS: Mapping[str, Callable[[Source, Architecture, LayerFacts], Array]] = {
    "router_row_norm": router_row_norm,
    "down_column_norm": down_column_norm,
}


def weight_statistics(
    source: Source,
    architecture: Architecture,
    facts: Iterable[LayerFacts],
    names: Iterable[str],
    watch: Watch = unwatched,
) -> dict[int, dict[str, Array]]:
    """The statistics called ``names`` for every MoE layer."""
    plain, facts, names = decoded(source), list(facts), list(names)
    found: dict[int, dict[str, Array]] = {}
    for number, fact in enumerate(facts, 1):
        found[fact.layer] = {
            name: lookup(name, WEIGHT_RECORDS, "weight statistic")(plain, architecture, fact) for name in names
        }
        if names:
            watch(Progress("read weights", number, len(facts)))
    return found

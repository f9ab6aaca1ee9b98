"""Statistics of the weights alone, for methods that need no data. One expert is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from moezip.arch.experts import decoded, read_expert
from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.statistics import Array
from moezip.checkpoint.source import Source
from moezip.progress import Progress, Watch, unwatched
from moezip.registry import lookup

# What experts may take in float32 while their inner products are formed.
GRAM_BYTES = 512 * 2**20


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


def expert_gram(source: Source, architecture: Architecture, fact: LayerFacts) -> Array:
    """Inner products of every two experts' weights (gate, up and down as one long row, biases left out), [E, E].

    Experts with tensors of their own are read once, some rows of all of them at a time. Where one tensor holds them
    all, as many are in memory as ``GRAM_BYTES`` allows, and the others are read again for each such lot.
    """
    import torch

    total = np.zeros((fact.experts, fact.experts))
    for tensor in architecture.experts:
        if tensor.role.endswith("bias"):
            continue
        names = [tensor.template.format(layer=fact.layer, expert=expert) for expert in range(fact.experts)]
        spec = source.spec(names[0])
        if tensor.fused:
            lot = max(GRAM_BYTES // (4 * math.prod(spec.shape[1:])), 1)
            for first in range(0, fact.experts, lot):
                mine = source.read(names[0], range(first, min(first + lot, fact.experts))).float().flatten(1)
                for other in range(fact.experts):
                    row = source.read(names[0], range(other, other + 1)).float().flatten()
                    total[first : first + lot, other] += (mine @ row).double().numpy()
            continue
        step = max(GRAM_BYTES // (4 * fact.experts * math.prod(spec.shape[1:])), 1)
        for first in range(0, spec.shape[0], step):
            rows = range(first, min(first + step, spec.shape[0]))
            some = torch.stack([source.read(name, rows).float().flatten() for name in names])
            total += (some @ some.T).double().numpy()
    return total


WEIGHT_RECORDS: Mapping[str, Callable[[Source, Architecture, LayerFacts], Array]] = {
    "router_row_norm": router_row_norm,
    "down_column_norm": down_column_norm,
    "expert_gram": expert_gram,
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

"""Checkpoints whose experts are others of a given checkpoint, their neurons in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moezip.arch.families import identify
from moezip.checkpoint.source import Source
from moezip.plan.merged import Merged, expert_value, read_role
from moezip.plan.plan import Plan
from tests.test_laws import written

Order = tuple[int, ...]


class Held:
    """Values of a plan in memory."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        self._values = dict(values)

    def names(self) -> list[str]:
        return list(self._values)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        value = self._values[name].clone()  # readers own what they are given
        return value if rows is None else value[rows.start : rows.stop]


def shuffled(width: int, seed: int) -> Order:
    return tuple(torch.randperm(width, generator=torch.Generator().manual_seed(seed)).tolist())


def reordered(value: torch.Tensor, role: str, order: Sequence[int]) -> torch.Tensor:
    """One matrix or bias of an expert with its neurons in another order."""
    if role == "down_bias":
        return value
    return value.index_select(1 if role == "down" else 0, torch.tensor(order))


def with_experts(source: Source, wanted: Mapping[int, Sequence[tuple[int, Order]]]) -> Merged:
    """``source`` with other experts behind the same router.

    Args:
        wanted: by layer, for every expert the one of the source that takes its place, and the order of its neurons.
    """
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    biased = any(tensor.role == "down_bias" for tensor in entry.experts)
    roles = ("gate", "up", "down", *(("gate_bias", "up_bias", "down_bias") if biased else ()))
    values = {}
    for layer, row in wanted.items():
        for number, (expert, order) in enumerate(row):
            for role in roles:
                value = read_role(source, entry, layer, expert, role)  # type: ignore[arg-type]
                values[expert_value(layer, number, role)] = reordered(value, role, order).contiguous()
    identity = Plan.identity(source.fingerprint, entry.name, facts)
    plan = Plan(source.fingerprint, entry.name, identity.layers, "keep", solved=tuple(values))
    return Merged(source, plan, Held(values))


def copies(source: Source, of: Mapping[int, int] | None = None) -> Merged:
    """``source`` with every expert a copy of another, each with its neurons in an order of its own.

    Args:
        of: by expert the one that it copies; default: all copy expert 0. Those that copy themselves keep their order.
    """
    facts = identify(source.config).layer_facts(source.config)
    wanted = {}
    for fact in facts:
        origin = dict.fromkeys(range(fact.experts), 0) if of is None else dict(of)
        own = tuple(range(fact.width))
        wanted[fact.layer] = [
            (origin[e], own if origin[e] == e else shuffled(fact.width, 100 * fact.layer + e))
            for e in range(fact.experts)
        ]
    return with_experts(source, wanted)


def written_copies(source: Source, out: Path, of: Mapping[int, int] | None = None) -> Path:
    return written(copies(source, of), out)

"""One layer whose groups are known, with everything that merging it may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import Architecture, ExpertRole, LayerFacts
from moezip.calibrate.moments import ExpertInputs
from moezip.calibrate.statistics import Array
from moezip.checkpoint.source import Source
from moezip.plan.merged import expert_value, read_role, router_value
from moezip.plan.plan import Part, Pick, RouterForm
from moezip.plan.views import split_roles

if TYPE_CHECKING:
    import torch

Group = tuple[int, ...]


@dataclass(slots=True)
class MergeLayer:
    """Attributes:
    source: plain tensors of the model. architecture: of the source.
    groups: the experts of every output expert, the dominant one first.
    stats: recorded statistics, by name, mixed over the domains.
    inputs: what the layer gives to its experts on the text, where it is looked at; None else.
    module: the layer's loaded experts module, where it is looked at.
    """

    source: Source
    architecture: Architecture
    facts: LayerFacts
    groups: tuple[Group, ...]
    stats: dict[str, Array]
    inputs: ExpertInputs | None = None
    module: Any = None

    def matrix(self, expert: int, role: ExpertRole) -> torch.Tensor:
        """``gate``, ``up`` [F, D], ``down`` [D, F] or a bias of a source expert, float32, in fresh memory."""
        return read_role(self.source, self.architecture, self.facts.layer, expert, role).float()

    def dtype(self, role: ExpertRole) -> torch.dtype:
        """Of the source's matrices of a role; solved values are rounded to it, as that is what a checkpoint holds."""
        tensor = next(each for each in self.architecture.experts if role in split_roles(each))
        return self.source.read(tensor.template.format(layer=self.facts.layer, expert=0), range(0)).dtype

    @property
    def roles(self) -> tuple[ExpertRole, ...]:
        """The roles that the family's experts have: the three matrices, and their biases where there are any."""
        biased = any(tensor.role == "down_bias" for tensor in self.architecture.experts)
        return ("gate", "up", "down", *(("gate_bias", "up_bias", "down_bias") if biased else ()))

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The input of the down projection [n, F], from the outputs of gate and up [n, F] (with their biases)."""
        import torch

        assert self.module is not None
        joined = torch.cat([gate, up], 1) if self.module.is_concatenated else torch.stack([gate, up], 2).flatten(1)
        result: torch.Tensor = self.module._apply_gate(joined)
        return result

    def usage(self, combine: str) -> Array:
        """[E]: what an expert weighs in an average, before the group's weights are divided by their sum."""
        import numpy as np

        if combine == "mean":
            return np.ones(self.facts.experts)
        return self.stats["gate_sum" if combine == "gates" else "counts"]


@dataclass(slots=True)
class Merge:
    """What merging one layer came to.

    Attributes:
        picks: of the output. router: how the router follows.
        values: solved matrices and fitted rows, by ``moezip.plan.merged`` names.
        nats: predicted rise of the loss per token; None where there were no gradients or no text to tell by.
        notes: for the report.
    """

    picks: tuple[Pick, ...]
    router: RouterForm
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    nats: float | None = None
    notes: tuple[str, ...] = ()

    def solve_expert(self, layer: int, number: int, role: str, value: torch.Tensor) -> None:
        self.values[expert_value(layer, number, role)] = value.contiguous()

    def solve_router(self, layer: int, place: int, value: torch.Tensor) -> None:
        self.values[router_value(layer, place)] = value.contiguous()


def averages(groups: Sequence[Group], usage: Array, orders: dict[int, tuple[int, ...]]) -> tuple[Pick, ...]:
    """Picks that average every group by ``usage`` [E]; a group that nothing was seen of is averaged plainly.

    Args:
        orders: by expert the order of its neurons, where that is not its own.
    """
    picks = []
    for group in groups:
        mass = [float(usage[expert]) for expert in group]
        total = sum(mass)
        shares = [each / total for each in mass] if total > 0 else [1 / len(group)] * len(group)
        if len(group) == 1:
            picks.append(Pick.keep(group[0]))
            continue
        picks.append(Pick(tuple(Part(e, share, orders.get(e)) for e, share in zip(group, shares, strict=True))))
    return tuple(picks)

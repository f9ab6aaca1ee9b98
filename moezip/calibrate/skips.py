"""What rules for run-time skipping are made of: how a token's gates compare, and what leaving experts out would cost.

Both look at a token's k experts in the order of their gates, the best first: routers do not all give them so.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.capture import Capture
from moezip.calibrate.record import Observation, Record

if TYPE_CHECKING:
    import torch

    from moezip.calibrate.statistics import Array

# Bins of the ratio of a gate to the token's best one, which lies in 0 to 1.
BINS = 2048
# Values of the second moments' temporaries, [n, k, D] float32, that exist at a time.
CHUNK_VALUES = 16 * 2**20


def ranked(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [T, k] by size: places [T, k] of the best, the second, ..., and their ratios to the best, float32.

    Equal gates stay in the router's order. Where the best gate is 0 all ratios are 1: there is nothing to compare.
    """
    import torch

    values, places = gates.float().sort(dim=-1, descending=True, stable=True)
    best = values[:, :1]
    return places, torch.where(best > 0, values / best, torch.ones_like(values))


def _histogram(seen: Observation) -> torch.Tensor:
    import torch

    places, ratios = ranked(seen.gates)
    top_k = ratios.shape[1]
    bins = (ratios.double() * BINS).long().clamp_(0, BINS - 1)
    flat = (bins + BINS * torch.arange(top_k, device=bins.device)).reshape(-1)
    weight = (seen.gates * seen.norms).double().gather(1, places).reshape(-1)
    counts = torch.bincount(flat, minlength=top_k * BINS).double()
    masses = torch.bincount(flat, weights=weight, minlength=top_k * BINS)
    return torch.stack([counts, masses]).view(2, top_k, BINS)


GATE_RATIOS = Record(
    "gate_ratios",
    "per rank, tokens by the ratio of that rank's gate to the best (fixed bins), and their gate weight x output norm",
    "sum",
    lambda facts: (2, facts.top_k, BINS),
    _histogram,
)


@dataclass(frozen=True, slots=True)
class Lessons:
    """What one layer's mask network learns from, n tokens.

    Attributes:
        inputs: [n, D] of the experts module, in the model's dtype.
        ratios: [n, k] float32, of ``ranked``.
        products: [n, k, k] float32: inner products of what the layer's routed output would change by if the best 1, 2,
            ..., k experts ran. The diagonal is the squared error of each choice; the last row and column are 0.
        scale: mean squared length of the residual stream that the routed output joins, in the output's own units.
    """

    inputs: torch.Tensor
    ratios: torch.Tensor
    products: torch.Tensor
    scale: float


class _Given(threading.local):
    arguments: Any = None
    stream: Any = None


class LessonCapture(Capture):
    """Watches MoE layers as ``Capture`` does, and keeps what mask networks learn from in place of sums.

    Args:
        scale: factor on the routed output as it joins the residual stream.
        renormalise: whether the gates that stay share out those of the dropped.
        every: of how many tokens one is kept.
    """

    def __init__(
        self,
        architecture: Architecture,
        facts: Sequence[LayerFacts],
        scale: float,
        *,
        renormalise: bool,
        every: int,
    ):
        super().__init__(architecture, facts, (), scale)
        self.renormalise, self.every = renormalise, every
        self._found: list[Mapping[str, Any]] = []
        self._given = _Given()
        self._experts: Any = None

    def watch(self, layer: int, module: Any) -> None:
        if layer not in self.facts:
            return
        entry = self.architecture
        self._experts = module.get_submodule(entry.block).get_submodule(entry.experts_module)

        def keep(_module: Any, arguments: tuple[Any, ...]) -> None:
            self._given.arguments = arguments

        def keep_stream(_module: Any, arguments: tuple[Any, ...]) -> None:
            self._given.stream = arguments[0]

        self._hooks = [
            self._experts.register_forward_pre_hook(keep),
            module.get_submodule(entry.norm).register_forward_pre_hook(keep_stream),
        ]
        self._found = []

    def release(self, layer: int, module: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._experts = [], None

    def seen(self, layer: int) -> dict[str, Array]:
        if layer not in self.facts:
            return {}
        import torch

        hidden, ids, gates = self._given.arguments
        stream = self._given.stream.reshape(hidden.shape[0], -1)
        self._given.arguments = self._given.stream = None
        valid = self._routed.valid
        real = torch.arange(hidden.shape[0], device=hidden.device)
        real = (real if valid is None else real[valid])[:: self.every]
        with torch.inference_mode():
            found = lessons(self._experts, hidden[real], ids[real], gates[real], self.renormalise)
            found["squares"] = stream[real].float().square().sum(-1) / self.scale**2
        return found  # type: ignore[return-value]

    def add(self, layer: int, domain: str, seen: Mapping[str, Any]) -> None:
        if layer in self.facts:
            self._found.append(seen)

    def taken(self) -> Lessons | None:
        """Of the layer that was watched last, in the order of its tokens; None for one without experts."""
        import torch

        if not self._found:
            return None
        found, self._found = self._found, []
        inputs, ratios, products, squares = (
            torch.cat([each[name].cpu() for each in found]) for name in ("inputs", "ratios", "products", "squares")
        )
        return Lessons(inputs, ratios, products, float(squares.double().mean()))


def lessons(
    experts: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, renormalise: bool
) -> dict[str, torch.Tensor]:
    """Inputs, ratios and products (see ``Lessons``) of n tokens.

    Args:
        experts: the experts module. hidden: [n, D]. ids, gates: [n, k], from the model's own router.
        renormalise: as of ``LessonCapture``.
    """
    import torch

    places, ratios = ranked(gates)
    ids, sizes = ids.gather(1, places), gates.float().gather(1, places)
    products = []
    for start in range(0, len(hidden), step := max(CHUNK_VALUES // (hidden.shape[1] * ids.shape[1]), 1)):
        part = slice(start, start + step)
        partial = (sizes[part, :, None] * outputs_by_rank(experts, hidden[part], ids[part])).cumsum(1)
        whole = partial[:, -1:]
        if renormalise:
            # the best c gates then add up to what all did
            shares = sizes[part].cumsum(1)
            partial = partial * (shares[:, -1:] / shares.clamp_min(torch.finfo(shares.dtype).tiny))[..., None]
        change = partial - whole
        change[:, -1] = 0
        products.append(change @ change.transpose(1, 2))
    return {"inputs": hidden, "ratios": ratios, "products": torch.cat(products)}


def outputs_by_rank(experts: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What the experts ``ids`` [n, k] make of ``hidden`` [n, D], before the gate weight: [n, k, D] float32."""
    import torch

    from moezip.calibrate.experts import expert_output

    remap = getattr(experts, "_remap", None)
    ids = ids if remap is None else remap.to(ids.device)[ids]
    found = torch.zeros(*ids.shape, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for expert in ids.unique().tolist():
        token, rank = torch.where(ids == expert)
        found[token, rank] = expert_output(experts, expert, hidden[token]).float()
    return found

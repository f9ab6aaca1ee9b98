"""What may be recorded of a MoE layer, and how each record is summed.

One entry of ``RECORDS`` is one statistic: a name, how it combines over chunks, its shape and its update. All of them
come out of one ordinary forward pass (``capture.py`` fills an ``Observation`` per layer and micro-batch).
Sums are float64 and never divided: means are formed where a method needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moezip.arch.spec import LayerFacts, Scoring
from moezip.registry import lookup

if TYPE_CHECKING:
    import torch

    from moezip.calibrate.block import Block

Combine = Literal["sum", "max"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one MoE layer did to the real tokens (padding excluded) of one micro-batch.

    Attributes:
        experts: E.
        ids: [T, k] the experts that the model's router chose.
        gates: [T, k] float32, the coefficients that really multiplied their outputs.
        norms: [T, k] float32, L2 norms of their outputs before the coefficient.
        change: [T] float64, max(0, 1 - cos(h, h + r)): how far the routed output r turned the residual stream h
            (EASY-EP, arXiv 2504.06792, its token weight).
        peaks: [E] float32, largest |output| component of each expert, 0 where none was routed.
        logits: [T, E] float32, the router's raw output.
        block: the layer itself, with its inputs; there only if a record asked for it.
        scoring: what the model's router makes of its logits.
    """

    experts: int
    ids: torch.Tensor
    gates: torch.Tensor
    norms: torch.Tensor
    change: torch.Tensor
    peaks: torch.Tensor
    logits: torch.Tensor
    block: Block | None = None
    scoring: Scoring = "softmax"

    def per_expert(self, values: torch.Tensor | None) -> torch.Tensor:
        """[E] float64: the sum of ``values`` [T, k] over the tokens routed to each expert (counts for None)."""
        import torch

        flat = self.ids.reshape(-1)
        weights = None if values is None else values.reshape(-1).double()
        return torch.bincount(flat, weights=weights, minlength=self.experts).double()


@dataclass(frozen=True, slots=True)
class Record:
    """One statistic: ``update`` gives its contribution from one micro-batch.

    ``asks`` says that ``update`` runs parts of the layer again, through ``Observation.block``. ``seconds(facts, rate)``
    then tells roughly what that takes per token of a layer, where matrix products make ``rate`` operations per second.
    """

    name: str
    summary: str
    combine: Combine
    shape: Callable[[LayerFacts], tuple[int, ...]]
    update: Callable[[Observation], torch.Tensor]
    asks: bool = False
    seconds: Callable[[LayerFacts, float], float] | None = None


def _vector(facts: LayerFacts) -> tuple[int, ...]:
    return (facts.experts,)


def _square(facts: LayerFacts) -> tuple[int, ...]:
    return (facts.experts, facts.experts)


def _coactivation(seen: Observation) -> torch.Tensor:
    import torch

    chosen = torch.zeros(seen.ids.shape[0], seen.experts, dtype=torch.float32, device=seen.ids.device)
    chosen.scatter_(1, seen.ids, 1.0)
    # float32 products of 0 and 1 are exact up to 2**24 tokens, far above one micro-batch
    return (chosen.T @ chosen).double()


def _gram(seen: Observation) -> torch.Tensor:
    logits = seen.logits.double()
    return logits.T @ logits


def _probability(seen: Observation) -> torch.Tensor:
    import torch

    every = torch.sigmoid(seen.logits) if seen.scoring == "sigmoid" else torch.softmax(seen.logits, dim=-1)
    return seen.per_expert(every.gather(1, seen.ids.long()))


RECORDS: tuple[Record, ...] = (
    Record("counts", "tokens routed to each expert", "sum", _vector, lambda o: o.per_expert(None)),
    Record("gate_sum", "sum of gate weights", "sum", _vector, lambda o: o.per_expert(o.gates)),
    Record(
        "probability_sum",
        "sum of the router's probability among all experts, before any renormalising or scaling of gates",
        "sum",
        _vector,
        _probability,
    ),
    Record("norm_sum", "sum of output norms", "sum", _vector, lambda o: o.per_expert(o.norms)),
    Record(
        "gate_norm_sum", "sum of gate weight x output norm", "sum", _vector, lambda o: o.per_expert(o.gates * o.norms)
    ),
    Record(
        "change_gate_norm_sum",
        "sum of token weight x gate weight x output norm (EASY-EP)",
        "sum",
        _vector,
        lambda o: o.per_expert((o.gates * o.norms).double() * o.change[:, None]),
    ),
    Record("output_max", "largest |output| component", "max", _vector, lambda o: o.peaks.double()),
    Record("router_gram", "router logits' Gram matrix", "sum", _square, _gram),
    Record("coactivation", "tokens that chose both experts", "sum", _square, _coactivation),
)

BY_NAME: Mapping[str, Record] = {record.name: record for record in RECORDS}


@dataclass(frozen=True, slots=True)
class GradientRecord:
    """A statistic of the backward pass (``backward.py`` fills it); it combines by addition.

    With u the inner activation of an expert for a token (input of its down projection), v the gradient of the summed
    loss with respect to it, and a = u . v the loss's first-order change if the expert's output went. The s are the
    gradients with respect to the outputs of the expert's three products: of gate and up before the activation, of down
    before the gate weight.
    """

    name: str
    summary: str
    shape: Callable[[LayerFacts], tuple[int, ...]]


def _neurons(facts: LayerFacts) -> tuple[int, ...]:
    return (facts.experts, facts.width)


def _outputs(facts: LayerFacts) -> tuple[int, ...]:
    return (facts.experts, facts.hidden)


GRADIENT_RECORDS: tuple[GradientRecord, ...] = (
    GradientRecord("routed", "tokens that reached the expert in the backward pass", _vector),
    GradientRecord("inner_square", "sum of u^2 per neuron", _neurons),
    GradientRecord("inner_grad_square", "sum of v^2 per neuron", _neurons),
    GradientRecord("inner_product_square", "sum of (u v)^2 per neuron", _neurons),
    GradientRecord("gate_grad_square", "sum of s^2 per output channel of the gate projection", _neurons),
    GradientRecord("up_grad_square", "sum of s^2 per output channel of the up projection", _neurons),
    GradientRecord("down_grad_square", "sum of s^2 per output channel of the down projection", _outputs),
    GradientRecord("drop_square", "sum of a^2: the expert goes, other gates stay", _vector),
    GradientRecord("drop_renormalised_square", "sum of a^2 with the other gates grown", _vector),
)
# What asks for all of them on the command line.
GRADIENTS = "gradients"
_GRADIENT_NAMES = frozenset(record.name for record in GRADIENT_RECORDS)


def combine_of(name: str) -> Combine:
    """How the statistic called ``name`` adds up; all but a few are sums."""
    return BY_NAME[name].combine if name in BY_NAME else "sum"


def wants_gradients(names: Iterable[str] | None) -> bool:
    """Whether ``names`` ask for the backward pass, by the word ``gradients`` or by one of its records."""
    return names is not None and any(name == GRADIENTS or name in _GRADIENT_NAMES for name in names)


def chosen_records(names: Iterable[str] | None) -> tuple[Record, ...]:
    """The records called ``names``, in table order; all of them for None. Raises UsageError for an unknown name."""
    if names is None:
        return RECORDS
    asked = list(names)
    known = {**dict.fromkeys([*_GRADIENT_NAMES, GRADIENTS]), **BY_NAME}
    for name in asked:
        lookup(name, known, "record")
    wanted = set(asked) & set(BY_NAME)
    if not wanted:  # gradients alone: the forward half of that pass records everything anyway
        return RECORDS
    return tuple(record for record in RECORDS if record.name in wanted)

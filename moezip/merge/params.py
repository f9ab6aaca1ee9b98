"""Knobs that every merging method has: how neurons are put in order, weights combined, and what the router becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moezip.errors import UsageError

ALIGNMENTS = ("none", "weights", "activations")
COMBINATIONS = ("frequency", "gates", "mean", "least-squares", "neurons")
# Those that are solved on the text.
SOLVED = ("least-squares", "neurons")
ROUTERS = ("auto", "dominant", "sum", "remap")
REFERENCES = ("dominant", "first")


@dataclass(frozen=True, slots=True)
class MergeParams:
    """Common settings.

    Attributes:
        align: put each member's neurons in the order of the reference's before averaging: by ``weights``, by
            ``activations`` on the text, or ``none``.
        reference: whose order: the group's ``dominant`` expert's, or that of the layer's ``first`` expert, as M-SMoE
            published it.
        projection: random projections that stand for a neuron's weights where experts are wider than 4,096.
        combine: the merged weights: an average by ``frequency`` (tokens routed), by ``gates`` (sum of gate weights),
            the plain ``mean``, or ``least-squares`` (least error of the routed outputs on the text), or ``neurons``
            (those of the members' that together explain the outputs best, with the down projection of least error).
        router: the merged expert's row: that of its ``dominant`` member; one fitted to the ``sum`` of the members'
            scores (softmax routers only); or ``remap``: all rows stay and any member's row leads to the merged expert,
            which only moezip reads. ``auto`` is the stock form that lost less: ``sum`` with ``least-squares`` and
            ``neurons`` where it can be, else ``dominant``. Rise of the loss of the reference model on held-out text,
            m-smoe keeping 16 of 32 experts (docs/measured/merging.md): with ``combine=neurons`` 0.180 dominant, 0.140
            sum, 0.110 remap; with averages 0.286, 0.294, 0.282.
        price: predict the rise of the loss, which takes a backward pass over the text. What the router does with other
            rows is left out. On the reference model (34 plans) predicted and measured rises have a rank correlation of
            0.87; averages rise by 1.2 to 4.2 times the prediction, solved experts, which were fitted to the very text,
            by 5 to 25 times.
        ridge: least-squares, neurons, sum: how strongly solutions hold on to the average, as a share of the inputs'
            mean square.
    """

    align: str = "weights"
    reference: str = "dominant"
    projection: int = 2048
    combine: str = "frequency"
    router: str = "auto"
    price: bool = False
    ridge: float = 0.01

    def __post_init__(self) -> None:
        require_one_of("align", self.align, ALIGNMENTS)
        require_one_of("reference", self.reference, REFERENCES)
        require_one_of("combine", self.combine, COMBINATIONS)
        require_one_of("router", self.router, ROUTERS)
        if self.projection < 1:
            raise UsageError("neurons need at least 1 projection", where=f"--set projection={self.projection}")
        if not self.ridge > 0:
            raise UsageError("the ridge must be above 0", where=f"--set ridge={self.ridge:g}")
        if self.combine in SOLVED and getattr(self, "rank", 1.0) < 1:
            raise UsageError(
                f"a rank below 1 cuts averages, and combine={self.combine} makes none",
                where=f"--set combine={self.combine}", next="use --set combine=frequency, gates or mean with it",
            )  # fmt: skip


def require_one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UsageError for a word that a setting does not know."""
    if value not in known:
        words = f"{', '.join(known[:-1])} or {known[-1]}"
        raise UsageError(f"{key} is {words}, not {value!r}", where=f"--set {key}={value}")


def settled(params: Any, scoring: str) -> Any:
    """The settings with a router in place of ``auto``; ``scoring`` is of the model's router."""
    if params.router != "auto":
        return params
    return replace(params, router="sum" if scoring == "softmax" and params.combine in SOLVED else "dominant")


def looks(params: Any) -> bool:
    """Whether the common stages need the layers' inputs with these settings."""
    solved = params.combine in SOLVED or getattr(params, "rank", 1.0) < 1
    return bool(params.align == "activations" or solved or params.router == "sum")

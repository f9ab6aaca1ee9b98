"""Matrices and what each width would cost; a choice of widths, and how it is shown.

A *form* of a matrix is the grid of its codes, or None where it is left as it is. Each form has a price, the predicted
rise of the loss in nats per token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from moezip.errors import PlanError
from moezip.formats.packed import Grid

Form = Grid | None
Granularity = Literal["role", "expert", "layer", "model"]
# From the finest to the coarsest: what shares one width.
GRANULARITIES: Mapping[str, str] = {
    "role": "every matrix has its own width",
    "expert": "gate, up and down of an expert share a width",
    "layer": "all experts of a layer share a width",
    "model": "all experts share a width",
}
UNPACKED_BITS = 16  # how tables call a matrix that is left as it is
FOUND_BY = {"relaxation": "the relaxation", "cbc": "CBC", "dp": "the dynamic program"}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix and what each of its forms would cost.

    Attributes:
        name: on disk. kind: ``gate``, ``up``, ``down`` of an expert, else ``attention``, ``shared``, ...
        shape: [R, C]. layer, expert: where it is, None where that means nothing.
        nats: by form, the predicted rise of the loss, nats per token. A single form is no choice.
        plain_bytes: as it is now.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    layer: int | None
    expert: int | None
    nats: Mapping[Form, float]
    plain_bytes: int

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def nbytes(self, form: Form) -> int:
        """Stored bytes in a form: codes, scales, zeros and padding."""
        return self.plain_bytes if form is None else _nbytes(form, *self.shape)


@lru_cache(maxsize=4096)
def _nbytes(grid: Grid, rows: int, columns: int) -> int:
    return grid.nbytes(rows, columns)


@dataclass(frozen=True, slots=True)
class Reader:
    """What ``--for`` one reader allows: widths of packed experts, the finest granularity, different expert counts."""

    bits: tuple[int, ...] | None = None
    finest: Granularity = "role"
    counts_differ: bool = True


# Engines stack a layer's experts in one tensor; stock transformers decodes every packed linear by one rule.
READERS: Mapping[str, Reader] = {
    "moezip": Reader(),
    "vllm": Reader((2, 3, 4, 5, 6, 7, 8), "layer", False),
    "sglang": Reader((4, 8), "layer", False),
    "transformers": Reader((2, 3, 4, 5, 6, 7, 8), "model", False),
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice of forms.

    Attributes:
        forms: by name, of every matrix that stays. dropped: per layer, the experts that go, where any do.
        bytes: of the matrices that stay, everything counted. budget: bytes that it was to keep within.
        weights: of all matrices, those of dropped experts too.
        nats: predicted rise of the loss; None where the method has no price.
        bound: no choice at this granularity within the budget has fewer nats.
        answered: what chose. remark: what the reader should know of the search, or empty.
        proven: no choice is cheaper, however far the bound is.
    """

    forms: Mapping[str, Form]
    bytes: int
    budget: int
    weights: int
    answered: str
    dropped: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    nats: float | None = None
    bound: float | None = None
    remark: str = ""
    proven: bool = False

    @property
    def packing(self) -> dict[str, Grid]:
        """The grids of the matrices that are packed."""
        return {name: form for name, form in self.forms.items() if form is not None}

    @property
    def bits(self) -> float:
        """Stored bits for each weight of the source, everything counted; those of a dropped expert have none."""
        return 8 * self.bytes / self.weights

    @property
    def gap(self) -> float | None:
        """How far the nats may be from the fewest, as a share of them."""
        if self.nats is None or self.bound is None:
            return None
        return max(self.nats - self.bound, 0.0) / abs(self.nats) if self.nats else 0.0


def budget_of(matrices: Iterable[Matrix], bits: float) -> int:
    """Bytes of so many stored bits for each weight, rounded down."""
    return int(bits * sum(matrix.weights for matrix in matrices) / 8)


def place_of(matrix: Matrix) -> tuple[int, int]:
    """Layer and expert of an expert's matrix."""
    assert matrix.layer is not None and matrix.expert is not None
    return matrix.layer, matrix.expert


# -- for people ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WidthTable:
    """Experts by width per layer, as text for a table.

    Attributes:
        counted: what is counted, ``experts`` or, where an expert's matrices differ, ``matrices`` of them.
        head: ``layer``, then ``dropped`` if any are, the bits, ``bits per weight``. rows: one per layer.
    """

    counted: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def width_table(matrices: Sequence[Matrix], allocation: Allocation) -> WidthTable:
    """How many of every layer's experts have which width; experts as they are count as ``16`` bits.

    Bits per weight count all stored bytes of the layer's experts, and weights of the dropped ones.
    """
    experts = [matrix for matrix in matrices if matrix.expert is not None]
    widths: dict[tuple[int, int], list[int]] = {}
    stored: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for matrix in experts:
        layer, expert = place_of(matrix)
        weights[layer] += matrix.weights
        if matrix.name in allocation.forms:
            form = allocation.forms[matrix.name]
            widths.setdefault((layer, expert), []).append(UNPACKED_BITS if form is None else form.bits)
            stored[layer] += matrix.nbytes(form)
    whole = all(len(set(each)) == 1 for each in widths.values())
    counts: dict[int, Counter[int]] = {layer: Counter() for layer in weights}
    for (layer, _), each in widths.items():
        counts[layer].update(each[:1] if whole else each)
    columns = sorted({bits for each in counts.values() for bits in each})
    gone = {layer: len(experts) for layer, experts in allocation.dropped.items()}
    head = ("layer", *(("dropped",) if gone else ()), *map(str, columns), "bits per weight")
    rows = tuple(
        (
            str(layer),
            *((str(gone.get(layer, 0)),) if gone else ()),
            *(str(counts[layer][bits] or "") for bits in columns),
            f"{8 * stored[layer] / weights[layer]:.3f}",
        )
        for layer in sorted(weights)
    )
    return WidthTable("experts" if whole else "matrices", head, rows)


def search_line(allocation: Allocation) -> str:
    """What a person should know of the answer: predicted nats, the bound, the gap, and who found it."""
    if allocation.nats is None:
        return f"chosen by {allocation.answered}; no price"
    if allocation.bound is None or allocation.gap is None:
        return f"predicted {allocation.nats:.6f} nats per token, chosen by {allocation.answered}"
    line = (
        f"predicted {allocation.nats:.6f} nats per token, at least {allocation.bound:.6f} at this granularity "
        f"(gap {100 * allocation.gap:.3f}%), found by {FOUND_BY.get(allocation.answered, allocation.answered)}"
        f"{' and proven the least' if allocation.proven else ''}"
    )
    return f"{line}; {allocation.remark}" if allocation.remark else line


def assigned(
    matrices: Sequence[Matrix], bits: Mapping[tuple[int, int], int], grids: Mapping[int, Grid], answered: str
) -> Allocation:
    """An allocation from bits by (layer, expert), as ``pmq`` gives them; other matrices keep the only form they have.

    Args:
        grids: by bits. answered: name of the method.

    Raises:
        PlanError: an expert without bits, or another matrix that has a choice.
    """
    forms: dict[str, Form] = {}
    for matrix in matrices:
        if matrix.expert is None and len(matrix.nats) == 1:
            forms[matrix.name] = next(iter(matrix.nats))
        elif matrix.expert is not None and place_of(matrix) in bits:
            forms[matrix.name] = grids[bits[place_of(matrix)]]
        else:
            raise PlanError(f"{answered} gives no width to {matrix.name}")
    total = sum(matrix.nbytes(forms[matrix.name]) for matrix in matrices)
    weights = sum(matrix.weights for matrix in matrices)
    return Allocation(forms, total, total, weights, answered, nats=price_of(matrices, forms))


def price_of(matrices: Sequence[Matrix], forms: Mapping[str, Form]) -> float | None:
    """Nats of all matrices in these forms; None if any has no price in its form."""
    prices = [matrix.nats.get(forms[matrix.name]) for matrix in matrices]
    return None if None in prices else math.fsum(price for price in prices if price is not None)

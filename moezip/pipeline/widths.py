"""Who gets how many bits: prices where a method needs them, then the choice, then the plan that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.checkpoint.source import Source
from moezip.errors import PlanError, UsageError
from moezip.formats.packed import Grid
from moezip.pipeline.bits import WIDTHS, Job, PriceTable, price_bits
from moezip.pipeline.calibrate import run_calibration
from moezip.pipeline.common import Common, Opened
from moezip.pipeline.dropping import freed, without
from moezip.pipeline.flat import GAP, flat_costs, flat_drops, flat_prices, flat_scores
from moezip.plan.allocators import ALLOCATORS
from moezip.plan.bits import allocate
from moezip.plan.importance import block_importance, by_score, outlier_score
from moezip.plan.lp import GAP as SOLVED_GAP
from moezip.plan.plan import Plan
from moezip.plan.pmq import WIDTHS as PMQ_WIDTHS
from moezip.plan.pmq import code_bits, costs, pmq
from moezip.plan.price import expert_prices
from moezip.plan.widths import (
    GRANULARITIES,
    READERS,
    Allocation,
    Form,
    Granularity,
    Matrix,
    WidthTable,
    assigned,
    budget_of,
    search_line,
    width_table,
)
from moezip.quantize.settings import UNPACKED, StorageParams
from moezip.registry import lookup

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText, Rows
    from moezip.calibrate.statistics import Statistics
    from moezip.pipeline.items import Item

LEAST_OTHERS = 4
# Linears that are no experts' are read by every token: the allocators leave them at least so many bits.
LEAST_FREE = 2
# What ``Wanted.allocate`` is where a plan brings the widths.
PLANNED = "plan"


@dataclass(frozen=True, slots=True)
class Widths:
    """A choice of widths.

    Attributes:
        packing: grids by name, in the numbering of the plan's output.
        plan: the picks: without the experts that the choice drops.
        left: matrices that stay as they are because no group divides them.
        nats: predicted rise of the loss, None where there is no price. table, lines: for people.
    """

    packing: dict[str, Grid]
    plan: Plan
    left: tuple[str, ...] = ()
    nats: float | None = None
    table: WidthTable | None = None
    lines: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for.

    Attributes:
        bits: of the codes (uniform, pmq) or stored bits per weight (all others); None with ``size``.
        size: bytes of the output's tensors.
        allocate: a name in ``ALLOCATORS``, and its settings ``params``.
        group: weights that share a scale. storage: how codes are stored, and bits of what is no expert's.
    """

    bits: float | None
    size: int | None
    allocate: str
    params: Any
    granularity: Granularity
    reader: str | None
    group: int
    storage: StorageParams

    def grid(self, bits: int) -> Grid:
        return Grid(bits, self.group, self.storage.symmetric, self.storage.scale, self.storage.double)


def check_wanted(wanted: Wanted) -> None:
    """Raises UsageError for what cannot be, before any work."""
    lookup(wanted.allocate, ALLOCATORS, "way to allocate bits")
    lookup(wanted.granularity, GRANULARITIES, "granularity")
    if wanted.reader == "llamacpp":
        raise UsageError(
            "llama.cpp reads none of the formats that codes are written in", where="--for llamacpp",
            next="quantize for moezip, then see `moezip export --help` for what llama.cpp is given",
        )  # fmt: skip
    if wanted.reader is not None:
        lookup(wanted.reader, READERS, "reader of packed checkpoints")
    if (wanted.bits is None) == (wanted.size is None):
        raise UsageError("the budget is --bits or --size, one of them", next="give --bits 4, or --size 6GiB")
    if wanted.allocate in ("uniform", "pmq") and wanted.bits is None:
        raise UsageError(f"--allocate {wanted.allocate} takes --bits", where="--size", next="use --allocate lp")
    if needs_prices(wanted):
        for kind in ("attention", "shared", "dense", "head"):
            if getattr(wanted.storage, kind) not in (0, *WIDTHS, UNPACKED):
                raise UsageError(
                    f"{getattr(wanted.storage, kind)} bits are not priced", where=f"--set {kind}",
                    next=f"use one of {', '.join(map(str, WIDTHS))}, 16 to leave it as it is, or --allocate uniform",
                )  # fmt: skip
    if wanted.allocate == "uniform" and (wanted.bits != int(wanted.bits or 0) or not 1 <= int(wanted.bits or 0) <= 8):
        raise UsageError(
            f"{wanted.bits:g} bits cannot be given to every weight", where=f"--bits {wanted.bits:g}",
            next="use a whole number from 1 to 8, or let the widths differ: --allocate lp or pmq",
        )  # fmt: skip


def needs_prices(wanted: Wanted) -> bool:
    """Whether a backward pass and a pricing pass come before the choice."""
    return wanted.allocate in ("lp", "pmq")


def uniform(
    items: Sequence[Item], bits: int, group: int, storage: StorageParams
) -> tuple[dict[str, Grid], tuple[str, ...]]:
    """The same width for every expert, and what the settings say for the rest; names left out because no group fits."""
    packing: dict[str, Grid] = {}
    left: list[str] = []
    for item in items:
        own = bits if item.expert is not None else others_bits(item.kind, bits, storage)
        if own == UNPACKED:
            continue
        if group and item.shape[1] % group:
            left.append(item.name)
            continue
        packing[item.name] = Grid(own, group, storage.symmetric, storage.scale, storage.double)
    return packing, tuple(left)


def others_bits(kind: str, bits: int, storage: StorageParams) -> int:
    """Bits of a linear that is no expert's."""
    asked: int = getattr(storage, kind)
    return asked or max(bits, LEAST_OTHERS)


class Chooser:
    """Prices and chooses.

    Args:
        split: the model, one tensor per expert and matrix. plain: the same, as it is streamed. plan: what made both.
        solve: the solver, which a sample is priced with. solver: its name and settings. gate, prior: as it is given
            hessians.
        folder: where passes leave what an interrupted run goes on from.
    """

    def __init__(
        self,
        model: Opened,
        plain: Source,
        split: Source,
        plan: Plan,
        items: Sequence[Item],
        wanted: Wanted,
        *,
        texts: Sequence[DomainText],
        rows: Rows | None,
        solve: Any,
        solver: str,
        gate: bool,
        prior: float,
        folder: Path,
        common: Common,
    ):
        self.model, self.plain, self.split, self.plan, self.wanted = model, plain, split, plan, wanted
        self.texts, self.rows, self.solve, self.gate, self.prior = texts, rows, solve, gate, prior
        self.folder, self.common, self.solver = folder, common, solver
        group = wanted.group
        self.left = tuple(item.name for item in items if group and item.shape[1] % group)
        self.items = [item for item in items if item.name not in self.left]

    def choose(self) -> Widths:
        """
        Raises:
            UsageError, PlanError: a budget that cannot be met, or a choice that the reader cannot read.
        """
        wanted = self.wanted
        expected = self.forecast()  # a budget that nothing fits must not wait for the passes
        if wanted.allocate == "uniform":
            return expected
        if wanted.allocate in ("outlier", "block"):
            return self._by_score(self._scores())
        stats = run_calibration(
            self.model, self.texts, self.common, record=["gradients"], workdir=self.folder.parent
        )  # fmt: skip
        table = self._prices(stats)
        if wanted.allocate == "pmq":
            return self._pmq(self._pmq_costs(stats, table), table)
        prices = self._expert_prices(stats)
        found = self._lp(prices if wanted.params.drops else None, table, wanted.granularity)
        return replace(found, plan=scored(found.plan, prices))

    def forecast(self) -> Widths:
        """What the choice would come to if every weight mattered alike, from headers alone.

        Sizes are right; who gets which width is not known yet, except with ``uniform``.

        Raises:
            UsageError, PlanError: as of ``choose``.
        """
        wanted, facts = self.wanted, self.model.facts
        if wanted.allocate == "uniform":
            assert wanted.bits is not None
            packing, _ = uniform(self.items, int(wanted.bits), wanted.group, wanted.storage)
            return Widths(packing, self.plan, self.left)
        if wanted.allocate in ("outlier", "block"):
            return self._by_score(flat_scores(self.items, wanted.allocate == "block"))
        table = flat_prices(self.items, [wanted.grid(bits) for bits in WIDTHS])
        if wanted.allocate == "pmq":
            found = self._pmq(flat_costs(facts), table)
        else:
            # matrices of an expert are alike here: deciding on them together takes a fifth of the time
            coarse = "expert" if wanted.granularity == "role" else wanted.granularity
            drops = flat_drops(self.items, facts) if wanted.params.drops else None
            found = self._lp(drops, table, coarse, GAP)
        return replace(found, nats=None)

    # -- lp -------------------------------------------------------------------------------------------------

    def _prices(self, stats: Statistics) -> PriceTable:
        from moezip.calibrate.stream import Stream
        from moezip.pipeline.solved import job_digest

        assert self.rows is not None
        grids = [self.wanted.grid(bits) for bits in WIDTHS]
        of_text = (self.model.source.fingerprint, self.rows.fingerprint(), stats.settings)
        digest = job_digest(*of_text, self.wanted, self.solver)
        job = Job(self.items, grids, digest, self.solve, self.gate, self.prior, local=self.wanted.allocate == "pmq")
        common = self.common
        stream = Stream(self.plain, device=common.device, max_memory=common.max_memory, spill=self.folder)
        return price_bits(
            stream, self.rows, stats, job, self.folder, resume=common.resume, watch=common.watch
        )  # fmt: skip

    def _matrices(self, table: PriceTable) -> list[Matrix]:
        """What may be chosen: experts any width, the rest what the settings say, or any of a few widths."""
        found = []
        for matrix in table.matrices({item.name: self.split.spec(item.name).bytes for item in self.items}):
            if matrix.expert is None:
                asked = (
                    UNPACKED
                    if matrix.kind == "head" and self.wanted.storage.head == UNPACKED
                    else getattr(self.wanted.storage, matrix.kind)
                )
                matrix = replace(matrix, nats=_allowed(matrix.nats, asked))
            found.append(matrix)
        return found

    def _budget(self, matrices: Sequence[Matrix]) -> int:
        if self.wanted.bits is not None:
            return budget_of(matrices, self.wanted.bits)
        assert self.wanted.size is not None
        named = {matrix.name for matrix in matrices}
        rest = sum(self.split.spec(name).bytes for name in self.split.names() if name not in named)
        if self.wanted.size <= rest:
            least = rest + sum(min(matrix.nbytes(form) for form in matrix.nats) for matrix in matrices)
            raise PlanError(
                f"--size allows {self.wanted.size:,} bytes, and what is never packed takes {rest:,} alone",
                next=f"allow more; {least:,} bytes are enough for every matrix in its fewest bits",
            )
        return self.wanted.size - rest

    def _expert_prices(self, stats: Statistics) -> dict[int, Any]:
        """Per layer, [E], the price of each expert's going."""
        each = [expert_prices(domain) for domain in stats.domains]
        return {fact.layer: np.mean([prices[fact.layer] for prices in each], axis=0) for fact in self.model.facts}

    def _lp(
        self, drops: dict[int, Any] | None, table: PriceTable, granularity: Granularity, gap: float = SOLVED_GAP
    ) -> Widths:
        matrices = self._matrices(table)
        reader = READERS["moezip" if self.wanted.reader is None else self.wanted.reader]
        if not reader.counts_differ and granularity not in ("layer", "model"):
            drops = None
        allocation = allocate(
            matrices,
            self._budget(matrices),
            facts=self.model.facts,
            drops=drops,
            freed=None
            if drops is None or self.wanted.size is None  # --bits counts the matrices alone
            else freed(self.plain, self.split, self.plan, self.model.facts, {matrix.name for matrix in matrices}),
            granularity=granularity,
            reader=self.wanted.reader,
            gap=gap,
        )
        return self._widths(matrices, allocation, table)

    # -- the others -----------------------------------------------------------------------------------------

    def _pmq_costs(self, stats: Statistics, table: PriceTable) -> dict[int, Any]:
        """[E, 3] by layer."""
        found = {}
        for fact in self.model.facts:
            named = [domain.layers[fact.layer] for domain in stats.domains]
            counts, weights = (np.sum([each[key] for each in named], axis=0) for key in ("counts", "probability_sum"))
            found[fact.layer] = costs(counts, weights, table.losses[fact.layer], self.wanted.params)
        return found

    def _pmq(self, cost: Mapping[int, Any], table: PriceTable) -> Widths:
        """``cost``: [E, 3] by layer."""
        wanted = self.wanted
        assert wanted.bits is not None
        bits: dict[tuple[int, int], int] = {}
        for fact in self.model.facts:
            for expert, width in enumerate(pmq(cost[fact.layer], code_bits(fact.experts, wanted.bits))):
                bits[fact.layer, expert] = width
        matrices = [
            matrix
            if matrix.expert is not None
            else replace(matrix, nats=_allowed(matrix.nats, others_bits(matrix.kind, 1, wanted.storage)))
            for matrix in table.matrices({item.name: self.split.spec(item.name).bytes for item in self.items})
        ]
        allocation = assigned(matrices, bits, {width: wanted.grid(width) for width in PMQ_WIDTHS}, "pmq")
        widths = self._widths(matrices, allocation, table)
        experts = [matrix for matrix in matrices if matrix.expert is not None]
        stored = sum(matrix.nbytes(allocation.forms[matrix.name]) for matrix in experts)
        line = (
            f"experts: {np.mean(list(bits.values())):.3f} bits of codes on average, "
            f"{8 * stored / sum(matrix.weights for matrix in experts):.3f} stored bits per weight; "
            f"{wanted.params.told}"
        )
        return replace(widths, lines=(*widths.lines, line))

    def _scores(self) -> dict[str, float]:
        """Of the experts' matrices, by name."""
        layers = {} if self.wanted.allocate == "outlier" else self._turning()
        return {
            item.name: layers[item.layer] if item.layer in layers else outlier_score(self.split.read(item.name))
            for item in self.items
            if item.expert is not None
        }

    def _by_score(self, scores: Mapping[str, float]) -> Widths:
        wanted = self.wanted
        grids = [wanted.grid(bits) for bits in range(1, 9)]
        matrices = []
        for item in self.items:
            forms: dict[Form, float] = dict.fromkeys(grids, 0.0)
            if item.expert is None:
                own = others_bits(item.kind, 1, wanted.storage)
                forms = {None if own == UNPACKED else wanted.grid(own): 0.0}
            plain = self.split.spec(item.name).bytes
            matrices.append(Matrix(item.name, item.kind, item.shape, item.layer, item.expert, forms, plain))
        allocation = by_score(matrices, scores, self._budget(matrices), grids, wanted.allocate)
        return self._widths(matrices, replace(allocation, nats=None), None)

    def _turning(self) -> dict[int, float]:
        """QuantMoE-Bench's importance of every layer, on a few rows."""
        from moezip.calibrate.stream import Stream

        if self.rows is None:
            raise UsageError("--allocate block reads text", next="give --data PATH, or use --allocate outlier")
        stream = Stream(self.plain, device=self.common.device, max_memory=self.common.max_memory, spill=self.folder)
        states = stream.embed(self.rows)
        found: dict[int, float] = {}
        try:
            rows = min(states.shape[0], TURNING_ROWS)
            before = states.read(0, rows).clone()
            for index in stream.run(self.rows, states):
                after = states.read(0, rows).clone()
                found[index] = block_importance(before.flatten(0, 1), after.flatten(0, 1))
                before = after
        finally:
            states.close()
        return found

    # -- what comes out -------------------------------------------------------------------------------------

    def _widths(self, matrices: Sequence[Matrix], allocation: Allocation, table: PriceTable | None) -> Widths:
        facts: dict[str, Any] = {
            "stored_bits": allocation.bits,
            "answered": allocation.answered,
            "bound_nats": allocation.bound,
            "dropped": {str(layer): list(gone) for layer, gone in allocation.dropped.items()},
        }
        lines = [search_line(allocation)]
        if table is not None:
            facts["price_ratios"] = {
                kind: {str(bits): round(float(ratio), 4) for bits, ratio in zip(table.widths, row, strict=True)}
                for kind, row in table.ratios.items()
            }
            if table.pooled:
                lines.append(f"{len(table.pooled)} matrices that no token reached were priced as average ones")
        plan, renumbered = without(self.plan, allocation.dropped, self.model.facts)
        packing = {renumbered(name): grid for name, grid in allocation.packing.items()}
        shown = width_table(matrices, allocation)
        return Widths(packing, plan, self.left, allocation.nats, shown, tuple(lines), facts)


def planned(plan: Plan, split: Source) -> Widths:
    """The widths that a plan brings.

    Raises:
        PlanError: matrices that are not there, or that the groups do not divide.
    """
    names = set(split.names())
    for name, grid in plan.packing.items():
        if name not in names:
            raise PlanError(f"the plan names {name}, which what it makes of the checkpoint does not have",
                            next="use the plan with the checkpoint that it was made for")  # fmt: skip
        grid.groups(split.spec(name).shape[1])
    return Widths(dict(plan.packing), replace(plan, packing={}, mtp="drop"), nats=plan.made_by.get("predicted_nats"))


# Rows on which layers are compared; the mean over so many tokens moves in the third digit at most.
TURNING_ROWS = 32


def _allowed(nats: Mapping[Form, float], bits: int) -> dict[Form, float]:
    """The forms of a linear that is no expert's: the width asked for, or with 0 any but the narrowest."""
    if bits == 0:
        return {form: price for form, price in nats.items() if form is None or form.bits >= LEAST_FREE}
    chosen = {form: price for form, price in nats.items() if (UNPACKED if form is None else form.bits) == bits}
    if not chosen:
        widths = sorted(UNPACKED if form is None else form.bits for form in nats)
        raise UsageError(f"{bits} bits are not priced", next=f"use one of {', '.join(map(str, widths))}")
    return chosen


def scored(plan: Plan, prices: Mapping[int, Any]) -> Plan:
    """The plan with the experts' prices as their scores, for its reader; as it is where others were chosen before."""
    if any(len(prices[layer.layer]) != layer.experts for layer in plan.layers):
        return plan
    layers = (replace(layer, scores=tuple(float(price) for price in prices[layer.layer])) for layer in plan.layers)
    return replace(plan, layers=tuple(layers))

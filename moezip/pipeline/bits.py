"""What every width of every matrix would cost: predicted nats per token, and bytes.

One streamed forward pass over the unquantized model. A matrix W with inputs x and outputs whose gradient is s, changed
by dW, raises the loss to second order by

    price = 1/(2T) * sum_r G_r * dW_r H dW_r^T      [nats per token]

with H the mean of x x^T over the matrix's own tokens, G_r the sum of s_r^2 over them (from a backward pass) and T the
scored tokens of that pass: the solver's own loss, its rows weighted by how much the model's loss depends on them. It
takes s and x for independent, tokens one by one, and matrices one by one.

Solving every matrix at every width would take as long as quantizing the model once per width. So the codes that are
priced are those of rounding, with ranges searched by the solver's own measure, and what a solver makes of them is
measured on a sample: prices are multiplied by the ratio of the two, by kind of matrix and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moezip.arch.matrices import expert_matrices
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import inner_activation
from moezip.calibrate.gradients import Gradients
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.linears import head_linear, layer_linears
from moezip.calibrate.moments import ExpertInputs, Moment, expert_inputs, head_moment, linear_moments, second_moment
from moezip.calibrate.statistics import Statistics
from moezip.calibrate.stream import Stream
from moezip.formats.packed import Grid
from moezip.pipeline.layerwise import POOL_BELOW, POOL_TOKENS, Solve, inputs_file, map_threads
from moezip.pipeline.price_files import Found, LayerPrices, PriceFiles, forget_prices
from moezip.plan.widths import Matrix
from moezip.progress import Progress, Watch, unwatched
from moezip.quantize.hessian import PRIOR, Mixed, shrunk
from moezip.quantize.local_loss import WIDTHS as LOCAL_WIDTHS
from moezip.quantize.local_loss import local_losses
from moezip.quantize.price import Inputs, prices

if TYPE_CHECKING:
    import torch

    from moezip.pipeline.items import Item

Array = npt.NDArray[np.float64]
WIDTHS = (1, 2, 3, 4, 6, 8)
# Matrices of each kind that are solved per sampled layer, and how many layers are sampled.
SAMPLED, SAMPLED_LAYERS = 2, 8


@dataclass(frozen=True, slots=True, eq=False)
class PriceTable:
    """Prices of all matrices at all widths.

    Attributes:
        items: the matrices, I of them. grids: one per width, W of them.
        rounded: [I, W] nats per token with the codes of rounding.
        ratios: per kind of matrix, [W]: the solver's price to that of rounding, summed over those that were sampled;
            1 where nothing was sampled or no solver was given.
        sampled: how many matrices of each kind that was.
        bytes: [I, W] int64, all that is stored.
        tokens: [I], on whose inputs the matrix was priced; 0: none reached it.
        pooled: names of the matrices that no token reached whose loss is counted, priced as an average expert of their
            layer on all tokens' inputs. Nothing is known about them.
        losses: PMQ's local loss of each expert, by layer: [E, 3] at 1, 2 and 3 bits; empty unless asked for.
    """

    items: tuple[Item, ...]
    grids: tuple[Grid, ...]
    rounded: Array
    ratios: Mapping[str, Array]
    sampled: Mapping[str, int]
    bytes: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    pooled: frozenset[str] = frozenset()
    losses: Mapping[int, Array] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each column."""
        return tuple(grid.bits for grid in self.grids)

    @property
    def nats(self) -> Array:
        """[I, W] nats per token, with the solver that the ratios are of."""
        return self.rounded * np.stack([self.ratios[item.kind] for item in self.items])

    def matrices(self, plain_bytes: Mapping[str, int]) -> list[Matrix]:
        """What widths are chosen from; every matrix may also stay as it is, for nothing.

        Args:
            plain_bytes: by name, as they are now.
        """
        return [
            Matrix(item.name, item.kind, item.shape, item.layer, item.expert,
                   {**dict(zip(self.grids, map(float, row), strict=True)), None: 0.0}, plain_bytes[item.name])
            for item, row in zip(self.items, self.nats, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """What is priced, and how.

    Attributes:
        items: matrices. grids: what each may be stored on, one per width.
        digest: of everything that the prices depend on; prices of another job are not gone on with.
        solve: the solver with its settings, which the sample is solved by; None: rounding is what will be done.
        gate: its hessians count tokens by their gate weight. prior: tokens' worth of the pooled hessian, per column.
        local: also PMQ's local losses.
    """

    items: Sequence[Item]
    grids: Sequence[Grid]
    digest: str
    solve: Solve | None = None
    gate: bool = False
    prior: float = PRIOR
    local: bool = False


def price_bits(
    stream: Stream,
    rows: Rows,
    stats: Statistics,
    job: Job,
    folder: Path,
    *,
    resume: bool = False,
    watch: Watch = unwatched,
) -> PriceTable:
    """One pass over the layers; what each came to waits in ``folder`` until ``forget_prices``.

    Args:
        stream: the model, which stays as it is. rows: whose inputs errors are weighed on.
        stats: of a backward pass.
        resume: take what an interrupted or finished pass of the same job left there.

    Raises:
        StatisticsError: no gradients of one of the matrices.
        MoezipError: asked to go on, and what is there is of another job.
    """
    return _Pass(stream, rows, stats, job, folder, watch).run(resume)


class _Pass:
    def __init__(self, stream: Stream, rows: Rows, stats: Statistics, job: Job, folder: Path, watch: Watch):
        self.stream, self.rows, self.job, self.folder, self.watch = stream, rows, job, folder, watch
        self._entry = entry = stream.skeleton.architecture
        self._facts = {fact.layer: fact for fact in entry.layer_facts(stream.source.config)}
        self._gradients = Gradients(stats)
        self._gradients.require(job.items)
        self._others = {item.name: item for item in job.items if item.expert is None}
        self._experts: dict[int, dict[int, dict[str, Item]]] = {}
        for item in job.items:
            if item.expert is not None and item.layer is not None:
                self._experts.setdefault(item.layer, {}).setdefault(item.expert, {})[item.kind] = item
        layers = sorted({item.layer for item in job.items if item.layer is not None})
        spread = np.linspace(0, len(layers) - 1, min(len(layers), SAMPLED_LAYERS)).round().astype(int)
        self._sampled_layers = {layers[place] for place in spread}

    def run(self, resume: bool) -> PriceTable:
        if not resume:
            forget_prices(self.folder)
        files = PriceFiles(self.folder, self.job.digest)
        steps = [f"{index:04}" for index in range(len(self.stream.layers))]
        head = next((item for item in self.job.items if item.kind == "head"), None)
        steps += ["head"] if head is not None else []
        done = {step: found for step in steps if (found := files.load(step)) is not None}
        missing = [step for step in steps if step not in done]
        self._tick(done)
        if missing:
            states = self.stream.embed(self.rows)
            try:
                for index, step in enumerate(steps[: len(self.stream.layers)]):
                    if step > max(missing):  # digits sort before the head
                        break
                    self.stream.load_layer(index)
                    if step not in done:
                        done[step] = self._layer(index, states)
                        files.save(step, done[step])
                        self._tick(done)
                    if index + 1 < len(self.stream.layers) or "head" in missing:
                        self.stream.advance(index, self.rows, states)
                    self.stream.free_layer(index)
                if head is not None and "head" not in done:
                    done["head"] = self._head(head, states)
                    files.save("head", done["head"])
                    self._tick(done)
            finally:
                states.close()
        return self._table([done[step] for step in steps])

    def _tick(self, done: Mapping[str, LayerPrices]) -> None:
        count = sum(len(each.rounded) for each in done.values())
        self.watch(Progress("price bits", count, len(self.job.items), "matrices"))

    # -- the table ------------------------------------------------------------------------------------------

    def _table(self, steps: Sequence[LayerPrices]) -> PriceTable:
        job = self.job
        rounded = {name: row for step in steps for name, row in step.rounded.items()}
        tokens = {name: count for step in steps for name, count in step.tokens.items()}
        pairs: dict[str, Array] = {}
        sampled: dict[str, int] = {}
        for step in steps:
            for kind, pair in step.pairs.items():
                pairs[kind] = pairs.get(kind, np.zeros((2, len(job.grids)))) + np.array(pair)
                sampled[kind] = sampled.get(kind, 0) + step.sampled[kind]
        ratios = {item.kind: np.ones(len(job.grids)) for item in job.items}
        for kind, (plain, solved) in pairs.items():
            ratios[kind] = np.divide(solved, plain, out=np.ones_like(plain), where=plain > 0)
        return PriceTable(
            tuple(job.items),
            tuple(job.grids),
            np.array([rounded[item.name] for item in job.items]).reshape(-1, len(job.grids)),
            ratios,
            sampled,
            np.array([[grid.nbytes(*item.shape) for grid in job.grids] for item in job.items], np.int64),
            np.array([tokens[item.name] for item in job.items], np.int64),
            frozenset(name for step in steps for name in step.pooled),
            {index: np.array(step.local) for index, step in enumerate(steps) if step.local},
        )

    # -- one layer ------------------------------------------------------------------------------------------

    def _layer(self, index: int, states: HiddenStates) -> LayerPrices:
        priced = LayerPrices()
        linears = {
            path: (self._others[name], module)
            for path, name, module in layer_linears(self.stream, index)
            if name in self._others
        }
        moments = linear_moments(self.stream, index, self.rows, states, {path: m for path, (_, m) in linears.items()})
        sample = self._chosen(index, [item for item, _ in linears.values()])

        def linear(path: str) -> Found:
            item, module = linears[path]
            return self._linear(item, module, moments[path], item.name in sample)

        for found in map_threads(linear, linears):
            priced.add(found)
        if index in self._experts:
            inputs = expert_inputs(self.stream, index, self.rows, states, inputs_file(self.stream, states, self.folder))
            try:
                self._routed(index, inputs, priced)
            finally:
                inputs.close()
        return priced

    def _chosen(self, index: int, items: Iterable[Item]) -> set[str]:
        """Names of the linears of a layer that are solved as well: of each kind others from layer to layer."""
        if self.job.solve is None or index not in self._sampled_layers:
            return set()
        kinds: dict[str, list[str]] = {}
        for item in items:
            kinds.setdefault(item.kind, []).append(item.name)
        place = sorted(self._sampled_layers).index(index) * SAMPLED
        return {names[(place + i) % len(names)] for names in kinds.values() for i in range(SAMPLED)}

    def _linear(self, item: Item, module: Any, moment: Moment, solved: bool) -> Found:
        mean = shrunk(moment.total, moment.tokens, None, 0, 0.0)
        given = Inputs.of(moment, mean, moment.tokens)
        return self._price(item, module.weight.data, given, self._gradients.linear(item.name), solved)

    def _head(self, item: Item, states: HiddenStates) -> LayerPrices:
        import torch

        found = head_linear(self.stream)
        assert found is not None and found[0] == item.name
        self.stream.load_head()
        try:
            with torch.inference_mode():
                moment = head_moment(self.stream, self.rows, states, found[1])
                # its codes are rounded: no sample of one tells more than that one
                priced = LayerPrices()
                priced.add(self._linear(item, found[1], moment, False))
        finally:
            self.stream.free_head()
        return priced

    def _routed(self, index: int, inputs: ExpertInputs, priced: LayerPrices) -> None:
        entry, items = self._entry, self._experts[index]
        layer: Any = self.stream.layers[index]
        experts: Any = layer.get_submodule(f"{entry.block}.{entry.experts_module}")
        sample = inputs.sample(POOL_TOKENS).to(self.stream.device)
        pool = second_moment(sample)
        busiest = sorted(items, key=lambda expert: -len(inputs.slots(expert)))
        solved = self._solved_experts(index, [expert for expert in busiest if len(inputs.slots(expert))])

        def one(expert: int) -> tuple[int, list[Found], list[float]]:
            found = list(self._expert(index, expert, experts, inputs, (sample, pool), expert in solved))
            local = local_losses(experts, expert, inputs, self.job.grids[0]) if self.job.local else []
            return expert, found, local

        local = np.zeros((self._facts[index].experts, len(LOCAL_WIDTHS)))
        for expert, several, losses in map_threads(one, busiest):
            for found in several:
                priced.add(found)
            if self.job.local:
                local[expert] = losses
        priced.local = local.tolist() if self.job.local else []

    def _expert(
        self,
        index: int,
        expert: int,
        experts: Any,
        inputs: ExpertInputs,
        everyone: tuple[torch.Tensor, Moment],
        solved: bool,
    ) -> Iterator[Found]:
        """Prices of one expert's matrices.

        Args:
            everyone: inputs [n, D] of tokens of all experts, and their moment.
        """
        items, matrices = self._experts[index][expert], expert_matrices(experts, expert)
        sample, pool = everyone
        given = inputs.tokens(expert).to(self.stream.device)
        weights = inputs.weights(expert) if self.job.gate else None
        routed = len(given) > 0 and self._gradients.reached(index, expert)
        pooled: Moment | None = pool
        for roles in (("gate", "up"), ("down",)):
            wanted = [role for role in roles if role in items]
            if not wanted:
                continue
            if roles == ("down",):
                given, pooled = inner_activation(experts, expert, given), None
                if not routed or len(given) < POOL_BELOW * given.shape[1]:
                    pooled = second_moment(inner_activation(experts, expert, sample))
            own = second_moment(given)
            mean = self._mixed(second_moment(given, weights) if self.job.gate else own, pooled)
            weighed = Inputs.of(own if routed else pooled, mean, len(given) if routed else 0)
            for role in wanted:
                gradient = self._gradients.expert(index, expert if routed else None, role)
                gradient = gradient[: matrices[role].shape[0]]  # of a ragged layer's experts few are the widest
                yield self._price(items[role], matrices[role], weighed, gradient, solved)

    def _solved_experts(self, index: int, busiest: Sequence[int]) -> set[int]:
        """Experts that are solved as well: neither the busiest nor the idlest."""
        if self.job.solve is None or index not in self._sampled_layers or not busiest:
            return set()
        places = (np.arange(SAMPLED) + 0.5) / SAMPLED * len(busiest)
        return {busiest[int(place)] for place in places}

    def _mixed(self, own: Moment, pool: Moment | None) -> Mixed:
        """The hessian that a solver is given."""
        return shrunk(
            own.total if own.tokens else None,
            own.tokens,
            None if pool is None else pool.total,
            0 if pool is None else pool.tokens,
            self.job.prior * own.total.shape[0],
            mass=own.mass,
        )

    def _price(self, item: Item, weight: torch.Tensor, given: Inputs, gradient: Array, solved: bool) -> Found:
        """Prices of one matrix at every width; ``gradient`` is G, [R]."""
        share = gradient / (2 * self._gradients.scored)
        solve = self.job.solve if solved else None
        return Found(item, given.tokens, *prices(weight, given, share, self.job.grids, solve))

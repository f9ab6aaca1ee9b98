"""The layerwise schedule: look at a layer, solve its matrices, let the next layer see what came out.

Everything that is solved waits in the work folder, one file per layer, so that a killed run goes on behind the last
whole layer with the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.matrices import expert_matrices
from moezip.arch.packing import Packing
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import inner_activation
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.linears import head_linear, layer_linears
from moezip.calibrate.memory import give_back
from moezip.calibrate.moments import ExpertInputs, Moment, expert_inputs, head_moment, linear_moments, second_moment
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.formats.packed import Grid, decode, dequantize
from moezip.pipeline.solved import Found, LayerReport, Solved, by_matrix
from moezip.progress import Progress, Watch, unwatched
from moezip.quantize.hessian import PRIOR, Mixed, shrunk
from moezip.quantize.solution import Solution

if TYPE_CHECKING:
    import torch

# Tokens of the layer, evenly spaced, whose moments stand in for an expert that was reached by few.
POOL_TOKENS = 4096
# An expert with fewer tokens than this many times its input size is given its down projection's inputs for those
# tokens as well; with more, its own outweigh them anyway.
POOL_BELOW = 8
# Each of these experts makes inputs of its down projection for as many of them as this times its input size.
POOL_INNER = 4
# So many tokens of a micro-batch at least, on average, go to each expert: the weights of one are read for all of them.
EXPERT_TOKENS = 128
# What lies between freed blocks of several threads adds up over the layers: 3 MB a layer (measured, 16 layers of 32
# experts). It is handed back after so many, as pages that are used again cost time.
TRIM_EVERY = 4

Solve = Callable[["torch.Tensor", "torch.Tensor | None", Grid], Solution]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear of a decoder layer or of the head, in memory and on disk."""

    name: str
    module: Any


class Layerwise:
    """Solves a model's matrices layer by layer, each layer seeing the quantized outputs of those before it.

    Args:
        stream: the model; its layers' weights are overwritten in memory by what the codes stand for.
        rows: calibration text.
        packing: which matrices, by their names on disk, and their grids.
        solve: the solver, with its settings.
        solved: where the codes go.
        original: layers see the outputs of the unquantized ones instead.
        gate: hessians count every token by its gate weight (MoEQuant).
        prior: tokens' worth of the pooled hessian, per input channel.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Rows,
        packing: Packing,
        solve: Solve,
        solved: Solved,
        *,
        original: bool = False,
        gate: bool = False,
        prior: float = PRIOR,
        watch: Watch = unwatched,
        spill: Path | None = None,
    ):
        self.stream, self.rows, self.packing, self.solve, self.solved = stream, rows, packing, solve, solved
        self.original, self.gate, self.prior, self.watch, self.spill = original, gate, prior, watch, spill
        import torch

        self._threads = torch.get_num_threads()
        entry = stream.skeleton.architecture
        self._entry = entry
        self._templates = {tensor.role: tensor.template for tensor in entry.split.experts}
        self._facts = {fact.layer: fact for fact in entry.layer_facts(stream.source.config)}
        self._done = 0

    def run(self) -> None:
        """All layers, then the head if that is packed.

        Raises:
            MoezipError: weights or hidden states that are not finite.
        """
        states = self.stream.embed(self.rows)
        total = len(self.packing)
        self.watch(Progress("quantize", 0, total, "matrices"))
        with alone(self.stream, self.rows):
            self._run(states)

    def _run(self, states: HiddenStates) -> None:
        try:
            for index in range(len(self.stream.layers)):
                self.stream.load_layer(index)
                step = f"layer-{index:04}"
                if self.solved.file(step).is_file():
                    self._place(index, self.solved.load(step))
                    self._tick(self.solved.report(step).matrices)
                else:
                    self.solved.save(step, *self._layer(index, states))
                if self.original:
                    self.stream.free_layer(index)
                    self.stream.load_layer(index)
                self.stream.advance(index, self.rows, states, most=self._rows_at_once(index))
                self.stream.free_layer(index)
                if index % TRIM_EVERY == TRIM_EVERY - 1:
                    give_back()
            self._head(states)
        finally:
            states.close()

    def _tick(self, count: int = 1) -> None:
        self._done += count
        self.watch(Progress("quantize", self._done, len(self.packing), "matrices"))

    def _rows_at_once(self, index: int) -> int:
        """Rows of a micro-batch: few, as fresh memory for the temporaries of many costs more than it saves."""
        facts = self._facts.get(index)
        return self.stream.few_rows(self.rows, EXPERT_TOKENS * facts.experts // facts.top_k if facts else 1)

    # -- names ----------------------------------------------------------------------------------------------

    def _linears(self, index: int) -> dict[str, Matrix]:
        """The packed matrices of a layer that are no experts', by the path of their module in the layer."""
        return {
            path: Matrix(name, module)
            for path, name, module in layer_linears(self.stream, index)
            if name in self.packing
        }

    def _name(self, layer: int, expert: int, role: str) -> str:
        return self._templates[role].format(layer=layer, expert=expert)  # type: ignore[index]

    # -- one layer ------------------------------------------------------------------------------------------

    def _layer(self, index: int, states: HiddenStates) -> tuple[dict[str, torch.Tensor], LayerReport]:
        tensors: dict[str, torch.Tensor] = {}
        report = LayerReport()
        linears = self._linears(index)
        moments = linear_moments(
            self.stream, index, self.rows, states, {path: each.module for path, each in linears.items()}
        )

        def one(path: str) -> list[Found]:
            matrix = linears[path]
            moment = moments.get(path)
            hessian = shrunk(None if moment is None else moment.total, moment.tokens if moment else 0, None, 0, 0.0)
            return self._found([matrix.name], [matrix.module.weight.data], hessian)

        self._collect(map_threads(one, linears, self._threads), tensors, report)
        if index in self._facts:
            wanted = [
                expert
                for expert in range(self._facts[index].experts)
                if any(self._name(index, expert, role) in self.packing for role in ("gate", "up", "down"))
            ]
            if wanted:
                inputs = expert_inputs(
                    self.stream, index, self.rows, states, inputs_file(self.stream, states, self.spill)
                )
                try:
                    self._experts(index, wanted, inputs, tensors, report)
                finally:
                    inputs.close()
        return tensors, report

    def _experts(
        self,
        index: int,
        wanted: Sequence[int],
        inputs: ExpertInputs,
        tensors: dict[str, torch.Tensor],
        report: LayerReport,
    ) -> None:
        entry = self._entry
        layer: Any = self.stream.layers[index]
        experts: Any = layer.get_submodule(f"{entry.block}.{entry.experts_module}")
        sample = inputs.sample(POOL_TOKENS).to(self.stream.device)
        pool = second_moment(sample)

        def one(expert: int) -> list[Found]:
            matrices = expert_matrices(experts, expert)
            if not matrices:
                return []
            x = inputs.tokens(expert).to(self.stream.device)
            weights = inputs.weights(expert) if self.gate else None
            hessian = self._mixed(second_moment(x, weights), pool)
            roles = [role for role in ("gate", "up") if self._name(index, expert, role) in self.packing]
            found = self._found(
                [self._name(index, expert, role) for role in roles], [matrices[role] for role in roles], hessian
            )
            name = self._name(index, expert, "down")
            if name in self.packing:
                # gate and up are quantized by now, and so are the inputs that their codes make
                inner = inner_activation(experts, expert, x)
                extra, width = None, matrices["down"].shape[1]
                if x.shape[0] < POOL_BELOW * width:
                    some = sample[:: max(len(sample) // (POOL_INNER * width), 1)]
                    extra = second_moment(inner_activation(experts, expert, some))
                found += self._found([name], [matrices["down"]], self._mixed(second_moment(inner, weights), extra))
            return found

        # the experts with most tokens first, so that no thread is left with one at the end; their order on disk is
        # that of the source all the same
        busiest = sorted(wanted, key=lambda expert: -len(inputs.slots(expert)))
        self._collect(map_threads(one, busiest, self._threads), tensors, report)

    def _mixed(self, own: Moment, pool: Moment | None) -> Mixed:
        return shrunk(
            own.total if own.tokens else None,
            own.tokens,
            None if pool is None else pool.total,
            0 if pool is None else pool.tokens,
            self.prior * own.total.shape[0],
            mass=own.mass,
        )

    def _found(self, names: Sequence[str], weights: Sequence[torch.Tensor], hessian: Mixed) -> list[Found]:
        """Solves matrices that have one input and puts what their codes stand for in their places.

        Rows of a matrix do not touch each other, so those on one grid are solved as one: their hessian is factored
        once.
        """
        import torch

        found = []
        for grid in dict.fromkeys(self.packing[name] for name in names):
            own = [at for at, name in enumerate(names) if self.packing[name] == grid]
            solution = self.solve(torch.cat([weights[at].float() for at in own]), hessian.hessian, grid)
            for at, part in zip(own, solution.split([len(weights[at]) for at in own]), strict=True):
                weights[at].copy_(dequantize(part.codes, weights[at].dtype))
                found.append(Found.of(names[at], part, hessian.basis))
        return found

    def _collect(self, found: Iterable[list[Found]], tensors: dict[str, torch.Tensor], report: LayerReport) -> None:
        for each in (one for several in found for one in several):
            tensors.update(each.stored)
            report.add(each)
            self._tick()

    def _place(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts what saved codes stand for into a loaded layer."""
        entry = self._entry
        places = {matrix.name: matrix.module.weight.data for matrix in self._linears(index).values()}
        if index in self._facts:
            layer: Any = self.stream.layers[index]
            experts: Any = layer.get_submodule(f"{entry.block}.{entry.experts_module}")
            for expert in range(self._facts[index].experts):
                for role, view in expert_matrices(experts, expert).items():
                    places[self._name(index, expert, role)] = view
        for name, grid in by_matrix(tensors, self.solved.report(f"layer-{index:04}")).items():
            places[name].copy_(dequantize(decode(grid[1], grid[0], name), places[name].dtype))

    # -- the head -------------------------------------------------------------------------------------------

    def _head(self, states: HiddenStates) -> None:
        found = head_linear(self.stream)
        if found is None or found[0] not in self.packing:
            return
        head = Matrix(*found)
        if self.solved.file("head").is_file():
            self._tick()
            return
        self.stream.load_head()
        try:
            moment = head_moment(self.stream, self.rows, states, head.module)
            report, tensors = LayerReport(), dict[str, "torch.Tensor"]()
            hessian = shrunk(moment.total, moment.tokens, None, 0, 0.0)
            self._collect([self._found([head.name], [head.module.weight.data], hessian)], tensors, report)
            self.solved.save("head", tensors, report)
        finally:
            self.stream.free_head()


def inputs_file(stream: Stream, states: HiddenStates, spill: Path | None) -> Path | None:
    """Where a layer's expert inputs wait: in memory (None) beside the hidden states, if both fit."""
    if states.file is None and 2 * states.bytes <= stream.hidden_budget():
        return None
    folder = states.file.parent if states.file is not None else spill
    return None if folder is None else folder / "expert-inputs.bin"


def solve_free(base: Source, packing: Packing, solve: Solve, solved: Solved, watch: Watch) -> None:
    """Codes of a solver that needs no text: matrix by matrix, one file per decoder layer."""
    steps: dict[str, list[str]] = {}
    for name in packing:
        number = re.search(r"\.(\d+)\.", name)
        steps.setdefault(f"layer-{int(number.group(1)):04}" if number else "head", []).append(name)
    done = 0
    watch(Progress("quantize", done, len(packing), "matrices"))

    def one(name: str) -> Found:
        return Found.of(name, solve(base.read(name).float(), None, packing[name]), "none")

    for step, names in steps.items():
        if not solved.file(step).is_file():
            tensors: dict[str, torch.Tensor] = {}
            report = LayerReport()
            for each in map_threads(one, names):
                tensors.update(each.stored)
                report.add(each)
                watch(Progress("quantize", done + report.matrices, len(packing), "matrices"))
            solved.save(step, tensors, report)
        done += len(names)
        watch(Progress("quantize", done, len(packing), "matrices"))


@contextmanager
def alone(stream: Stream, rows: Rows) -> Iterator[None]:
    """This thread computes by itself meanwhile, unless the text is so short that it also runs the layers.

    What it does between passes (copies, sums) is short: split over the cores, each piece would end in a barrier.
    """
    import torch

    count = torch.get_num_threads()
    if len(stream.steps(rows)) > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def map_threads(work: Callable[[Any], Any], items: Iterable[Any], threads: int | None = None) -> Iterator[Any]:
    """``work`` of every item, in order, over ``threads`` (default: as many as torch has), each computing alone."""
    import torch

    def alone(item: Any) -> Any:
        with torch.inference_mode():
            return work(item)

    count = threads or torch.get_num_threads()
    if count == 1:
        yield from map(alone, items)
        return
    with ThreadPoolExecutor(count, "moezip-solve", torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(alone, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

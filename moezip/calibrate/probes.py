"""What single decisions really cost: many variants of a model measured in one streamed forward pass.

A variant differs from the model in one layer, where some experts or neurons are gone. Up to that layer it is the model,
so its hidden states come into being there, as a copy of the layer's input, and travel on beside the others: every layer
is read once for all variants, and a variant of a late layer costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moezip.arch.reduced import fewer_experts, silence_neurons
from moezip.calibrate.data import Rows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.statistics import Array
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError, UsageError
from moezip.progress import Progress, Watch, unwatched

if TYPE_CHECKING:
    import torch

# Text of one variant: enough to tell a dear expert, few enough that dozens of variants cost about one pass.
PROBE_TOKENS = 2_048


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What a variant leaves out, in one layer.

    Attributes:
        layer: decoder layer index.
        experts: routed experts that are gone; tokens are routed among the others, as after pruning.
        neurons: instead of experts, [E, F], True where a neuron is gone.
    """

    layer: int
    experts: tuple[int, ...] = ()
    neurons: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over the scored tokens of N windows, V variants, in nats.

    Attributes:
        scored: [N] tokens. base: [N] losses of the model itself.
        rises: [V, N] loss of the variant less that of the model. squares: [V, N] sums of its squares by token.
        divergences: [V, N] KL(model || variant): the rise if the text were drawn from the model itself.
    """

    scored: Array
    base: Array
    rises: Array
    squares: Array
    divergences: Array

    def rise(self) -> Array:
        """Mean rise of every variant, [V], nats per token."""
        mean: Array = self.rises.sum(1) / self.scored.sum()
        return mean

    def error(self) -> Array:
        """Standard error of ``rise``, [V], tokens taken one by one."""
        tokens = self.scored.sum()
        spread = self.squares.sum(1) / tokens - self.rise() ** 2
        error: Array = np.sqrt(np.maximum(spread, 0.0) / tokens)
        return error


def spread_rows(rows: Rows, tokens: int = PROBE_TOKENS) -> Rows:
    """At most ``tokens`` tokens of ``rows``, as windows at even distances; a window that is longer is cut."""
    count, width = rows.ids.shape
    wanted = min(max(tokens // width, 1), count)
    chosen = [int((place + 0.5) * count / wanted) for place in range(wanted)]
    mask = None if rows.mask is None else rows.mask[chosen, :tokens]
    return Rows(rows.ids[chosen, :tokens], mask, tuple(rows.domains[row] for row in chosen))


def layer_tokens(rows: int, decisions: Sequence[Decision], layers: int) -> int:
    """Tokens times decoder layers that measuring takes, with ``rows`` tokens of text: what the pass costs."""
    return rows * (layers + sum(layers - decision.layer for decision in decisions))


def measure(
    source: Source,
    rows: Rows,
    decisions: Sequence[Decision],
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    workdir: Path | None = None,
    watch: Watch = unwatched,
    dtype: torch.dtype | None = None,
    micro_rows: int | None = None,
) -> Measured:
    """Runs the model and all variants over ``rows``; every layer is read once.

    Args:
        decisions: one per variant; those of neurons in one layer grow: each holds all neurons of the one before.
        workdir: where hidden states are kept that outgrow memory.

    Raises:
        MoezipError: values that are not finite, too little memory and no ``workdir``.
        UsageError: neurons that do not grow.
    """
    stream = Stream(source, device=device, max_memory=max_memory, spill=workdir, dtype=dtype, micro_rows=micro_rows)
    order = sorted(range(len(decisions)), key=lambda at: (decisions[at].layer, decisions[at].neurons is not None))
    ordered = [decisions[at] for at in order]
    _require_growth(ordered)
    plain = Rows(rows.ids, rows.mask, ("probes",) * len(rows.ids))
    with _all_states(stream, plain, len(ordered) + 1, workdir) as states:
        _forward(stream, plain, ordered, states, watch)
        found = _losses(stream, plain, len(ordered), states)
    stream.skeleton.free(stream.skeleton.outer_targets())
    back = np.argsort(order)
    return Measured(found.scored, found.base, found.rises[back], found.squares[back], found.divergences[back])


def _require_growth(decisions: Sequence[Decision]) -> None:
    """Neurons are set to zero in place, so that a variant of the same layer has those of the one before it too."""
    gone: dict[int, npt.NDArray[np.bool_]] = {}
    for decision in decisions:
        if decision.neurons is not None:
            before = gone.get(decision.layer)
            if before is not None and bool((before & ~decision.neurons).any()):
                raise UsageError(
                    f"variants of layer {decision.layer} leave out neurons that the ones before keep",
                    next="give them in growing order",
                )
            gone[decision.layer] = decision.neurons


@contextmanager
def _all_states(stream: Stream, rows: Rows, variants: int, workdir: Path | None) -> Iterator[HiddenStates]:
    """Room for the hidden states of the model (first) and of every variant, in memory or in a file."""
    shape = (variants * rows.ids.shape[0], rows.ids.shape[1], int(stream.skeleton.config.hidden_size))
    # the copy on which a new variant is run, and the model's own states at the beginning
    need = stream.hidden_bytes(rows) * (variants + 2)
    file = None
    if need > stream.hidden_budget():
        if workdir is None:
            raise MoezipError(
                f"the hidden states of {variants - 1} probes take {need / 2**30:.2f} GiB, "
                f"{stream.hidden_budget() / 2**30:.2f} GiB are allowed",
                next="name a --workdir for them, allow more --max-memory, or ask for fewer probes",
            )
        file = workdir / "probes.bin"
    states = HiddenStates(shape, stream.skeleton.dtype, file)
    try:
        yield states
    finally:
        states.close()


def _forward(stream: Stream, rows: Rows, decisions: Sequence[Decision], states: HiddenStates, watch: Watch) -> None:
    """Takes the model and all variants to the end of the last layer, in the order of ``decisions``."""
    count, total = len(rows.ids), len(stream.layers)
    entry = stream.skeleton.architecture
    embedded = stream.embed(rows)
    try:
        for start, stop in stream.steps(rows):
            states.write(start, stop, embedded.read(start, stop))
    finally:
        embedded.close()
    alive = 1
    for index in range(total):
        new = [decision for decision in decisions if decision.layer == index]
        for place in range(alive, alive + len(new)):  # their input, before the model's own moves on
            for row in range(count):
                states.write(place * count + row, place * count + row + 1, states.read(row, row + 1))
        next(stream.run(_repeated(rows, alive), states, first=index, last=index, keep=bool(new)))
        layer: Any = stream.layers[index]
        for place, decision in enumerate(new, alive):
            own = HiddenStates((count, *states.shape[1:]), states.dtype)
            for row in range(count):
                own.write(row, row + 1, states.read(place * count + row, place * count + row + 1))
            if decision.neurons is not None:
                silence_neurons(layer, entry, decision.neurons)
            experts = layer.get_submodule(entry.block).get_submodule(entry.experts_module).num_experts
            kept = [expert for expert in range(experts) if expert not in decision.experts]
            with fewer_experts(layer, entry, kept) if decision.experts else nullcontext():
                last = place == alive + len(new) - 1
                next(stream.run(rows, own, first=index, last=index, keep=not last))
            for row in range(count):
                states.write(place * count + row, place * count + row + 1, own.read(row, row + 1))
            own.close()
        # what was set aside for the last variant came back after the layer was freed
        stream.skeleton.free(stream.skeleton.layer_targets(index))
        alive += len(new)
        watch(Progress("probes", index + 1, total, tokens=rows.tokens() * (1 + len(decisions))))


def _repeated(rows: Rows, times: int) -> Rows:
    mask = None if rows.mask is None else rows.mask.repeat(times, 1)
    return Rows(rows.ids.repeat(times, 1), mask, rows.domains * times)


def _losses(stream: Stream, rows: Rows, variants: int, states: HiddenStates) -> Measured:
    """Losses of the last hidden states, window by window, of the model and all variants on the same positions."""
    import torch

    count = len(rows.ids)
    scored, base = np.zeros(count), np.zeros(count)
    rises, squares, divergences = (np.zeros((variants, count)) for _ in range(3))
    stream.load_head()
    chunk = max(stream.head_chunk() // 4, 1)  # log-probabilities of both, and what they are compared by
    for row in range(count):
        positions = rows.scored(row)
        scored[row] = len(positions)
        kept = [states.read(place * count + row, place * count + row + 1)[0] for place in range(variants + 1)]
        for start in range(0, len(positions), chunk):
            at = positions[start : start + chunk]
            text = rows.ids[row, at + 1].to(stream.device)[:, None]
            with torch.inference_mode():
                ours = stream.head(kept[0][at]).float().log_softmax(-1)
                losses = -ours.gather(1, text)[:, 0].double()
                shares = ours.exp()
                base[row] += float(losses.sum())
                for place, hidden in enumerate(kept[1:]):
                    theirs = stream.head(hidden[at]).float().log_softmax(-1)
                    rise = -theirs.gather(1, text)[:, 0].double() - losses
                    rises[place, row] += float(rise.sum())
                    squares[place, row] += float(rise.square().sum())
                    divergences[place, row] += float((shares * (ours - theirs)).sum(-1).double().sum())
    stream.free_head()
    if not (np.isfinite(base).all() and np.isfinite(squares).all()):
        raise MoezipError(
            "a probe gives log-probabilities that are not finite",
            next="the weights may be damaged (run `moezip verify`), or the dtype overflows",
        )
    return Measured(scored, base, rises, squares, divergences)

"""What single decisions really cost: many variants of a model measured in one streamed forward pass.

A variant differs from the model in one layer, where some experts or neurons are gone. Up to that layer it is the model,
so its hidden states come into being there, as a copy of the layer's input, and travel on beside the others: every layer
is read once for all variants, and a variant of a late layer costs little.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moezip.arch.reduced import fewer_experts, silence_neurons
from moezip.calibrate.data import DomainText, Rows, stack, text_files, token_stream, windows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.memory import give_back
from moezip.calibrate.statistics import Array
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError, UsageError
from moezip.progress import Progress, Watch, unwatched

if TYPE_CHECKING:
    import torch

# Text of one variant: at most this many tokens, which is enough to tell a dear expert;
PROBE_TOKENS = 2_048
# fewer where all variants together would cost more than this many forward passes over the calibration text (a pass with
# gradients costs about as much as four or five of them),
PASSES = 1
# but never less: some experts would not be asked for at all.
LEAST_TOKENS = 512
# Windows are cut to this, so that a text of 2,048 tokens is not one window of one document: what experts are asked for
# differs more between documents than within one. Much shorter ones would mislead: the beginning of a window uses other
# neurons (with windows of 128 tokens in place of 256 the reference model's neurons came out half as dear again).
PROBE_WINDOW = 512
# The text that the model itself runs over is so many times as long, and each variant takes every so-many-th window of
# it: the windows of one variant are few and differ much, those of all together are a fair sample.
SPREAD = 4
# Rows of a micro-batch against those of a plain pass: what the pass with gradients before it summed is still there.
SHARE_OF_ROWS = 2


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
        seen: [V, N], True where the variant was run on the window; its other sums are 0.
    """

    scored: Array
    base: Array
    rises: Array
    squares: Array
    divergences: Array
    seen: npt.NDArray[np.bool_]

    def tokens(self) -> Array:
        """Scored tokens of every variant, [V]."""
        found: Array = self.seen @ self.scored
        return found

    def rise(self) -> Array:
        """Mean rise of every variant, [V], nats per token."""
        mean: Array = self.rises.sum(1) / self.tokens()
        return mean

    def divergence(self) -> Array:
        """Mean divergence of every variant, [V], nats per token."""
        mean: Array = self.divergences.sum(1) / self.tokens()
        return mean

    def error(self) -> Array:
        """Standard error of ``rise``, [V], tokens taken one by one."""
        tokens = self.tokens()
        spread = self.squares.sum(1) / tokens - self.rise() ** 2
        error: Array = np.sqrt(np.maximum(spread, 0.0) / tokens)
        return error


def spread_rows(rows: Rows, tokens: int = PROBE_TOKENS) -> Rows:
    """At most ``tokens`` tokens of ``rows``: the beginnings of windows at even distances."""
    count, width = len(rows.ids), min(rows.ids.shape[1], PROBE_WINDOW, tokens)
    wanted = min(max(tokens // width, 1), count)
    chosen = [int((place + 0.5) * count / wanted) for place in range(wanted)]
    mask = None if rows.mask is None else rows.mask[chosen, :width]
    return Rows(rows.ids[chosen, :width], mask, tuple(rows.domains[row] for row in chosen))


def unseen_rows(rows: Rows, texts: Sequence[DomainText], tokenizer: Any, seq_len: int) -> Rows:
    """Windows that follow in the files of ``texts`` behind those that ``load_rows`` made ``rows`` of, at most as many.

    What is cheap on the text that prices were taken from is dearer on any other, because it was chosen by that text:
    only other text tells what a price is worth. A domain whose files end gives its own rows once more.
    """
    found: list[list[int]] = []
    names: list[str] = []
    for text in texts:
        files = [file for path in text.paths for file in text_files(path)]
        share = max(text.tokens // len(files), 2)
        own: list[list[int]] = []
        if share >= seq_len:  # else the file's only window is shorter, and a longer one would hold it
            begun = share // seq_len * seq_len
            streams = (token_stream(file, tokenizer, 2 * begun)[begun:] for file in files)
            own = [window for stream in streams if len(stream) >= seq_len for window in windows(stream, seq_len)]
        if not own:
            again = [row for row, name in enumerate(rows.domains) if name == text.name]
            valid = rows.ids if rows.mask is None else rows.ids.masked_fill(~rows.mask, -1)
            own = [[token for token in valid[row].tolist() if token >= 0] for row in again]
        found += own
        names += [text.name] * len(own)
    return stack(found, names)


def layer_passes(places: Sequence[int], layers: int) -> int:
    """Decoder layers that are run, counted once for as many tokens as one variant takes: what measuring costs.

    Args:
        places: the layer of every variant. layers: of the model.
    """
    return SPREAD * layers + sum(layers - place for place in places)


def affordable_tokens(places: Sequence[int], layers: int, tokens: int) -> int:
    """Tokens of text for each variant in these layers, where ``tokens`` were calibrated on; the limits are above."""
    equal_cost = PASSES * tokens * layers // layer_passes(places, layers)
    return min(max(equal_cost, LEAST_TOKENS), PROBE_TOKENS, tokens)


def shared_out(count: int, variants: int) -> list[range]:
    """The windows, of ``count``, that each variant is run on."""
    step = min(SPREAD, count)
    return [range(place % step, count // step * step, step) for place in range(variants)]


def measure(
    source: Source,
    rows: Rows,
    decisions: Sequence[Decision],
    windows: Sequence[Sequence[int]] | None = None,
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    workdir: Path | None = None,
    watch: Watch = unwatched,
    dtype: torch.dtype | None = None,
    micro_rows: int | None = None,
) -> Measured:
    """Runs the model over ``rows``, and all variants over some of them; every layer is read once.

    Args:
        windows: the rows of every variant; all of them if not given.
        decisions: one per variant; those of neurons in one layer grow: each holds all neurons of the one before.
        workdir: where hidden states are kept that outgrow memory; how much disk that takes is told first.

    Raises:
        MoezipError: values that are not finite, too little memory and no ``workdir``.
        UsageError: neurons that do not grow.
    """
    gc.collect()  # the layers of a pass before are tied up in rings
    give_back()
    stream = Stream(source, device=device, max_memory=max_memory, spill=workdir, dtype=dtype, micro_rows=micro_rows)
    stream.micro_rows = micro_rows or max(stream.rows_per_step(rows.ids.shape[1]) // SHARE_OF_ROWS, 1)
    order = sorted(range(len(decisions)), key=lambda at: (decisions[at].layer, decisions[at].neurons is not None))
    ordered = [decisions[at] for at in order]
    _require_growth(ordered)
    everything = range(len(rows.ids))
    shares = [everything if windows is None else windows[at] for at in order]
    plain = Rows(rows.ids, rows.mask, ("probes",) * len(rows.ids))
    with _all_states(stream, plain, shares, workdir, watch) as states:
        _forward(stream, plain, ordered, shares, states, watch)
        found = _losses(stream, plain, shares, states)
    stream.skeleton.free(stream.skeleton.outer_targets())
    give_back()
    back = np.argsort(order)
    return Measured(
        found.scored, found.base, found.rises[back], found.squares[back], found.divergences[back], found.seen[back]
    )


def _chosen(rows: Rows, *lots: Sequence[int]) -> Rows:
    """These rows, one lot after the other."""
    at = [row for lot in lots for row in lot]
    return Rows(rows.ids[at], None if rows.mask is None else rows.mask[at], tuple(rows.domains[row] for row in at))


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
def _all_states(
    stream: Stream, rows: Rows, lots: Sequence[Sequence[int]], workdir: Path | None, watch: Watch
) -> Iterator[HiddenStates]:
    """Room for hidden states, of the model (first) and of every variant, in memory or in a file."""
    shape = (len(rows.ids) + sum(map(len, lots)), rows.ids.shape[1], int(stream.skeleton.config.hidden_size))
    own = prod(shape) * stream.skeleton.dtype.itemsize
    file = None
    if own + stream.hidden_bytes(rows) > stream.hidden_budget():  # the embeddings' output is beside them at first
        if workdir is None:
            raise MoezipError(
                f"the hidden states of {len(lots)} probes take {own / 2**30:.2f} GiB, "
                f"{stream.hidden_budget() / 2**30:.2f} GiB are allowed",
                next="name a --workdir for them, allow more --max-memory, or ask for fewer probes",
            )
        file = workdir / "probes.bin"
        watch(Progress("reserve disk", own, own, "bytes"))
    states = HiddenStates(shape, stream.skeleton.dtype, file)
    try:
        yield states
    finally:
        states.close()


class _Part(HiddenStates):
    """Some rows of others, counted from 0, in the same place."""

    def __init__(self, whole: HiddenStates, first: int, count: int):
        self.whole, self.first = whole, first
        self.file, self._memory = None, None  # what they are kept in is the others'
        self.shape, self.dtype, self.row_bytes = (count, *whole.shape[1:]), whole.dtype, whole.row_bytes

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.whole.read(self.first + start, self.first + stop)

    def write(self, start: int, stop: int, rows: torch.Tensor) -> None:
        self.whole.write(self.first + start, self.first + stop, rows)


def _forward(
    stream: Stream,
    rows: Rows,
    decisions: Sequence[Decision],
    shares: Sequence[Sequence[int]],
    states: HiddenStates,
    watch: Watch,
) -> None:
    """Takes the model and all variants to the end of the last layer, in the order of ``decisions``."""
    total, entry = len(stream.layers), stream.skeleton.architecture
    lots = [range(len(rows.ids)), *shares]
    own = [_Part(states, first, len(lot)) for first, lot in zip(_begins(lots), lots, strict=True)]
    embedded = stream.embed(rows)
    try:
        own[0].copy_from(embedded)
    finally:
        embedded.close()
    alive = 1
    for index in range(total):
        new = [decision for decision in decisions if decision.layer == index]
        for place in range(alive, alive + len(new)):  # their input, before the model's own moves on
            for at, row in enumerate(lots[place]):
                own[place].write(at, at + 1, own[0].read(row, row + 1))
        next(stream.run(_chosen(rows, *lots[:alive]), states, first=index, last=index, keep=bool(new)))
        layer: Any = stream.layers[index]
        for place, decision in enumerate(new, alive):
            if decision.neurons is not None:
                silence_neurons(layer, entry, decision.neurons)
            experts = layer.get_submodule(entry.block).get_submodule(entry.experts_module).num_experts
            kept = [expert for expert in range(experts) if expert not in decision.experts]
            with fewer_experts(layer, entry, kept) if decision.experts else nullcontext():
                last = place == alive + len(new) - 1
                next(stream.run(_chosen(rows, lots[place]), own[place], first=index, last=index, keep=not last))
        # what was set aside for the last variant came back after the layer was freed
        stream.skeleton.free(stream.skeleton.layer_targets(index))
        give_back()
        alive += len(new)
        watch(Progress("probes", index + 1, total, tokens=sum(map(len, lots)) * rows.ids.shape[1]))


def _begins(lots: Sequence[Sequence[int]]) -> list[int]:
    """The first of each lot's rows, where they lie one after the other."""
    return [0, *accumulate(map(len, lots))][:-1]


def _losses(stream: Stream, rows: Rows, lots: Sequence[Sequence[int]], states: HiddenStates) -> Measured:
    """Losses of the last hidden states, window by window, of the model and its variants on the same positions."""
    import torch

    variants, (count, width) = len(lots), rows.ids.shape
    seen = np.array([[row in lot for row in range(count)] for lot in lots], dtype=bool).reshape(variants, count)
    begins = _begins([range(count), *lots])[1:]
    scored, base = np.zeros(count), np.zeros(count)
    rises, squares, divergences = (np.zeros((variants, count)) for _ in range(3))
    stream.load_head()
    chunk = max(stream.head_chunk() // 4, 1)  # log-probabilities of both, and what they are compared by
    for row in range(count):
        positions = rows.scored(row)
        scored[row] = len(positions)
        for start in range(0, len(positions), chunk):
            at = positions[start : start + chunk]
            text = rows.ids[row, at + 1].to(stream.device)[:, None]
            with torch.inference_mode():
                ours = stream.head(states.gather(row * width + at.numpy())).float().log_softmax(-1)
                losses = -ours.gather(1, text)[:, 0].double()
                shares = ours.exp()
                base[row] += float(losses.sum())
                for place in map(int, seen[:, row].nonzero()[0]):
                    own = begins[place] + lots[place].index(row)
                    hidden = states.gather(own * width + at.numpy())
                    theirs = stream.head(hidden).float().log_softmax(-1)
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
    return Measured(scored, base, rises, squares, divergences, seen)

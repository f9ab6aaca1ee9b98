"""Runs a model with one decoder layer in memory at a time.

The model is built on the meta device and its own forward is called, once per layer and micro-batch, with every decoder
layer but the one in turn answering at once. So masks, rotary embeddings, sliding windows, multipliers, the final norm
and the head stay the model's own code, and nothing larger than a micro-batch exists besides the hidden states.
(Calling the forward once for the whole batch was tried first on paper: masks and embeddings of all rows at once
cost more memory than the layer does.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moezip.arch.experts import decoded
from moezip.arch.skeleton import Skeleton
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import register
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.memory import MAPPED_FROM, steady
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError

if TYPE_CHECKING:
    import torch

    from moezip.calibrate.capture import Capture
    from moezip.calibrate.statistics import Array

T = TypeVar("T")

# Memory that a process needs before any weight is read: interpreter, torch, transformers, and the temporaries of one
# micro-batch. Measured: 380 MB after building a meta model, the rest is headroom for the micro-batch.
BASE_BYTES = 600 * 2**20
# What the temporaries of one micro-batch may take: the smaller figure is part of BASE_BYTES; where the ceiling leaves
# room, up to the larger, because more tokens per expert make larger and so faster products.
ACTIVATION_BYTES = 128 * 2**20
MAX_ACTIVATION_BYTES = 512 * 2**20
# Their rough size in hidden-state widths per token (residual, norm, q, k, v, attention output, ...), and on top of it
# one width for each of the k chosen experts' outputs.
WIDTHS_PER_TOKEN = 14
MAX_MICRO_TOKENS = 16_384
# Micro-batches at a time; more would each be too small.
MAX_SIDE_BY_SIDE = 4
# Positions whose logits exist at one time.
HEAD_BYTES = 64 * 2**20


class _Stop(Exception):
    """Carries the hidden states out of the model's forward once the layer in turn has run."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


@cache
def _threads(count: int, cores_each: int) -> ThreadPoolExecutor:
    """Threads for micro-batches, one pool for all streams of the process."""
    import torch

    return ThreadPoolExecutor(count, "moezip-rows", torch.set_num_threads, (cores_each,))


class _Now(threading.local):
    """The layer in turn and its input, of the micro-batch that runs in this thread."""

    turn: int = -1
    hidden: Any = None


class Stream:
    """A model larger than memory, run layer by layer.

    Args:
        source: the checkpoint, plain or through a plan.
        experts_implementation: default is moezip's own, which can record.
        max_memory: ceiling of the whole process in bytes; default 80 % of what is free.
        micro_rows: rows per micro-batch; default as many as the activation budget allows.
        spill: folder for the hidden states' file, should they not fit.

    Raises:
        ArchitectureError: unknown or incomplete model.
        MoezipError: a ceiling below one layer.
    """

    def __init__(
        self,
        source: Source,
        *,
        experts_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        max_memory: int | None = None,
        micro_rows: int | None = None,
        spill: Path | None = None,
    ):
        import psutil
        import torch

        steady()
        plain = decoded(source)
        self.skeleton = Skeleton(
            plain, experts_implementation=experts_implementation or register(), dtype=dtype, device=device
        )
        self.skeleton.require_complete()
        self.source, self.device, self.spill, self.micro_rows = source, self.skeleton.device, spill, micro_rows
        self.model, self.layers = self.skeleton.model, self.skeleton.layers
        self.max_memory = max_memory or int(psutil.virtual_memory().available * 0.8)
        self._targets = [self.skeleton.layer_targets(i) for i in range(len(self.layers))]
        self.layer_bytes = max(self.skeleton.bytes(targets) for targets in self._targets)
        self.model_bytes = self.skeleton.bytes(self.skeleton.outer_targets()) + sum(
            self.skeleton.bytes(targets) for targets in self._targets
        )
        if self.max_memory < BASE_BYTES + self.layer_bytes:
            raise MoezipError(
                f"--max-memory {self.max_memory / 2**30:.2f} GiB is less than one layer "
                f"({self.layer_bytes / 2**30:.2f} GiB) and the program itself ({BASE_BYTES / 2**30:.2f} GiB)",
                next=f"allow at least {(BASE_BYTES + self.layer_bytes) / 2**30:.2f} GiB",
            )
        self._loaded: set[int] = set()
        self._now = _Now()
        # Micro-batches run side by side, each on its share of the cores: a product split over all cores ends in a
        # barrier, and on a machine that does other work besides, barriers were seen to take nine tenths of the time.
        self._cores = torch.get_num_threads()
        self.run_side_by_side(min(self._cores, MAX_SIDE_BY_SIDE) if self.device.type == "cpu" else 1)
        self._run_layer = [layer.forward for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = self._stand_in(index)
        self._embed = self.model.get_input_embeddings()
        self._run_embed = self._embed.forward

    # -- the model's forward, one layer in turn -------------------------------------------------------------

    def _stand_in(self, index: int) -> Callable[..., Any]:
        last = len(self.layers) - 1

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            now = self._now
            if now.turn == index:
                result = self._run_layer[index](now.hidden, *args, **kwargs)
                raise _Stop(result[0] if isinstance(result, tuple) else result)
            if now.turn == -1:
                raise _Stop(hidden_states)
            if now.turn == last + 1 and index == last:
                given: torch.Tensor = now.hidden
                return given
            return hidden_states

        return forward

    def call(
        self, turn: int, ids: torch.Tensor, mask: torch.Tensor | None, hidden: Any, *, grad: bool = False, **more: Any
    ) -> Any:
        """The model's forward on one micro-batch, with layer ``turn`` in turn (-1: embeddings; past the last: head)."""
        import torch

        self._now.turn, self._now.hidden = turn, hidden
        attention = None if mask is None else mask.to(torch.int64).to(self.device)
        try:
            with torch.enable_grad() if grad else torch.inference_mode():
                return self.model(input_ids=ids.to(self.device), attention_mask=attention, use_cache=False, **more)
        except _Stop as stop:
            return stop.hidden
        finally:
            self._now.hidden = None

    def _dummy_embed(self) -> None:
        """Once the embeddings are stored, their table is freed and later calls get an expanded zero of their shape."""
        import torch

        zero = torch.zeros(1, dtype=self.skeleton.dtype, device=self.device)
        width = self._embed.embedding_dim
        self._embed.forward = lambda ids: zero.expand(*ids.shape, width)

    # -- passes ---------------------------------------------------------------------------------------------

    @property
    def activation_bytes(self) -> int:
        """What the temporaries of one micro-batch may take."""
        room = self.max_memory - BASE_BYTES - self.layer_bytes
        return max(min(room // 8, MAX_ACTIVATION_BYTES), ACTIVATION_BYTES)

    def hidden_budget(self) -> int:
        """Bytes of hidden states that may stay in memory beside one layer and one micro-batch."""
        extra = self.activation_bytes - ACTIVATION_BYTES
        return max(self.max_memory - BASE_BYTES - self.layer_bytes - extra, 0)

    def rows_per_step(self, width: int) -> int:
        """Rows of ``width`` tokens per micro-batch."""
        if self.micro_rows:
            return self.micro_rows
        return max(min(self.activation_bytes // self.side_by_side // self.token_bytes, MAX_MICRO_TOKENS) // width, 1)

    @property
    def token_bytes(self) -> int:
        """What the temporaries of a layer take per token of a micro-batch, without gradients."""
        entry, config = self.skeleton.architecture, self.source.config
        widths = WIDTHS_PER_TOKEN + entry.integer(config, entry.top_k_key)
        return entry.integer(config, entry.hidden_key) * self.skeleton.dtype.itemsize * widths

    def run_side_by_side(self, count: int) -> None:
        """Runs ``count`` micro-batches at a time from now on, each on its share of the cores."""
        self.side_by_side, self._pool = count, _threads(count, max(self._cores // count, 1))

    def steps(self, rows: Rows, most: int | None = None) -> list[tuple[int, int]]:
        """Micro-batches as row ranges, of at most ``most`` rows if that is less than fits; none crosses a domain.

        A domain's rows are shared out evenly, over so many that all who work side by side have something to do.
        """
        fit, steps, start = self.rows_per_step(rows.ids.shape[1]), [], 0
        most = fit if most is None else max(min(most, fit), 1)
        for _, domain in groupby(rows.domains):
            count = len(list(domain))
            rounds = ceil(count / most / self.side_by_side)
            parts = min(rounds * self.side_by_side, count)
            size, larger = divmod(count, parts)
            for part in range(parts):
                stop = start + size + (part < larger)
                steps.append((start, stop))
                start = stop
        return steps

    def embed(self, rows: Rows) -> HiddenStates:
        """The input of the first decoder layer for all rows."""
        bytes_needed = self.hidden_bytes(rows)
        file = None
        if bytes_needed > self.hidden_budget():
            if self.spill is None:
                raise MoezipError(
                    f"the hidden states of {rows.tokens():,} tokens take {bytes_needed / 2**30:.2f} GiB, "
                    f"{self.hidden_budget() / 2**30:.2f} GiB are allowed",
                    next="name a --workdir for them, allow more --max-memory, or use fewer --tokens",
                )
            file = self.spill / "hidden.bin"
        return self.embed_all([rows], [file])[0]

    def embed_all(self, groups: Sequence[Rows], files: Sequence[Path | None]) -> list[HiddenStates]:
        """``embed`` for rows of several widths, with the embeddings read once; where each is kept is the caller's."""
        targets = self.skeleton.embedding_targets()
        self._embed.forward = self._run_embed
        self.skeleton.free(targets)
        self.skeleton.load(targets)
        found: list[HiddenStates] = []
        try:
            for rows, file in zip(groups, files, strict=True):
                states = HiddenStates((*rows.ids.shape, self.skeleton.config.hidden_size), self.skeleton.dtype, file)
                found.append(states)
                for start, stop in self.steps(rows):
                    mask = None if rows.mask is None else rows.mask[start:stop]
                    states.write(start, stop, self.call(-1, rows.ids[start:stop], mask, None))
        except BaseException:
            for states in found:
                states.close()
            raise
        if self.model_bytes + sum(states.bytes for states in found) > self.hidden_budget():
            self.skeleton.free(targets)
        self._dummy_embed()
        return found

    def hidden_bytes(self, rows: Rows) -> int:
        """Size of the hidden states of all rows."""
        return rows.ids.numel() * int(self.skeleton.config.hidden_size) * self.skeleton.dtype.itemsize

    def keeps_layers(self, states: HiddenStates) -> bool:
        """Whether the whole model fits beside the hidden states, so that nothing need be read twice."""
        return self.model_bytes + states.bytes <= self.hidden_budget()

    def run(
        self,
        rows: Rows,
        states: HiddenStates,
        *,
        first: int = 0,
        last: int | None = None,
        capture: Capture | None = None,
        keep: bool = False,
    ) -> Iterator[int]:
        """Takes the hidden states through layers ``first`` to ``last``, yielding each layer's index once it is done.

        Args:
            states: input of layer ``first``; holds the input of the next layer whenever this yields.
            capture: a ``Capture`` that watches the MoE layers.
            keep: leave layers loaded for another pass over the same model.

        Raises:
            MoezipError: weights or hidden states that are not finite.
        """
        for index in range(first, len(self.layers) if last is None else last + 1):
            self.load_layer(index)
            layer = self.layers[index]
            if capture is not None:
                capture.watch(index, layer)
            try:
                self.advance(index, rows, states, capture)
            finally:
                if capture is not None:
                    capture.release(index, layer)
                if not keep:
                    self.free_layer(index)
            yield index

    def load_layer(self, index: int) -> None:
        """Reads a layer, unless it is in memory already."""
        if index not in self._loaded:
            self.skeleton.load(self._targets[index])
            self._loaded.add(index)

    def free_layer(self, index: int) -> None:
        """Gives a layer's memory back."""
        self.skeleton.free(self._targets[index])
        self._loaded.discard(index)

    def look(
        self,
        index: int,
        rows: Rows,
        states: HiddenStates,
        seen: Callable[[int, int], T],
        expect: Callable[[torch.Tensor | None], None] = lambda valid: None,
    ) -> Iterator[tuple[int, int, T]]:
        """Runs a loaded layer on its input and throws the output away: for whoever watches its insides.

        Args:
            seen: called with the rows of a micro-batch, in the thread that has just run it.
            expect: called there before it runs, with its valid positions [n * S], None where all are.

        Yields:
            First row, row after the last, and what ``seen`` returned, in order of the rows.
        """

        def step(start: int, stop: int) -> tuple[int, int, T]:
            mask = None if rows.mask is None else rows.mask[start:stop]
            expect(None if mask is None else mask.reshape(-1).to(self.device))
            self.call(index, rows.ids[start:stop], mask, states.read(start, stop).to(self.device))
            return start, stop, seen(start, stop)

        # no experts run, which would be faster on more tokens
        for _, found in self.side_by_side_results(rows, step, self.few_rows(rows)):
            yield found

    def few_rows(self, rows: Rows, tokens: int = 1) -> int:
        """Rows of a micro-batch whose temporaries are so small that their memory is used again, or ``tokens``."""
        few = MAPPED_FROM // 2 // (4 * int(self.skeleton.config.hidden_size))
        return max(few, tokens) // rows.ids.shape[1]

    def advance(
        self,
        index: int,
        rows: Rows,
        states: HiddenStates,
        capture: Capture | None = None,
        most: int | None = None,
    ) -> None:
        """Takes the hidden states through one loaded layer.

        Micro-batches run several at a time; what was seen is added in their order.

        Args:
            most: as of ``steps``.
        """

        def step(start: int, stop: int) -> list[dict[str, Array]]:
            return self._step(index, rows, states, start, stop, capture)

        for domain, found in self.side_by_side_results(rows, step, most):
            for seen in found:
                if capture is not None:
                    capture.add(index, domain, seen)

    def side_by_side_results(
        self, rows: Rows, step: Callable[[int, int], T], most: int | None = None
    ) -> Iterator[tuple[str, T]]:
        """``step(start, stop)`` of every micro-batch, several at a time; domain and result in order of the rows.

        Args:
            most: as of ``steps``.
        """
        steps = self.steps(rows, most)
        if len(steps) == 1:  # it may have all cores
            yield rows.domains[0], step(*steps[0])
            return
        waiting: deque[tuple[str, Future[T]]] = deque()
        try:
            for start, stop in steps:
                if len(waiting) > self.side_by_side:
                    domain, future = waiting.popleft()
                    yield domain, future.result()
                waiting.append((rows.domains[start], self._pool.submit(step, start, stop)))
            while waiting:
                domain, future = waiting.popleft()
                yield domain, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
            wait([future for _, future in waiting])

    def _step(
        self, index: int, rows: Rows, states: HiddenStates, start: int, stop: int, capture: Capture | None
    ) -> list[dict[str, Array]]:
        """One layer over one micro-batch: what was seen, in order.

        Halves the micro-batch and tries again where the device runs out of memory.
        """
        import torch

        mask = None if rows.mask is None else rows.mask[start:stop]
        if capture is not None:
            capture.expect(None if mask is None else mask.to(self.device))
        hidden: Any = None
        result: Any = None
        try:
            hidden = states.read(start, stop).to(self.device)
            result = self.call(index, rows.ids[start:stop], mask, hidden)
        except torch.OutOfMemoryError as fault:
            if stop - start == 1:
                raise MoezipError(
                    f"one row of {rows.ids.shape[1]} tokens is too much for the memory of {self.device}",
                    where=f"decoder layer {index}",
                    next="use a shorter --seq-len, or --device cpu",
                ) from fault
        if result is None:
            # only here, where the exception no longer holds on to the failed attempt's tensors, is their memory free
            hidden = None
            middle = (start + stop) // 2
            self.micro_rows = max((stop - start) // 2, 1)
            return [
                *self._step(index, rows, states, start, middle, capture),
                *self._step(index, rows, states, middle, stop, capture),
            ]
        real = result if mask is None else result[mask.to(self.device)]
        # one number tells: a sum is finite unless something in it is not (float32 cannot overflow on a sum of bf16
        # activations short of values that are lost anyway)
        if not bool(torch.isfinite(real.sum(dtype=torch.float32))):
            raise MoezipError(
                f"decoder layer {index} gives values that are not finite",
                where=f"rows {start} to {stop - 1}",
                next="the weights may be damaged (run `moezip verify`), or the dtype overflows",
            )
        seen = [] if capture is None else [capture.seen(index)]
        states.write(start, stop, result)
        return seen

    # -- the head -------------------------------------------------------------------------------------------

    def load_head(self) -> None:
        """Makes ``logits`` usable."""
        self.skeleton.load(self.skeleton.head_targets())
        self.skeleton.tie()

    def free_head(self) -> None:
        self.skeleton.free(self.skeleton.head_targets())

    def logits(self, rows: Rows, states: HiddenStates, row: int, positions: torch.Tensor) -> torch.Tensor:
        """Logits [len(positions), V] of one row, from the last layer's output, by the model's own norm and head."""
        mask = None if rows.mask is None else rows.mask[row : row + 1]
        hidden = states.read(row, row + 1).to(self.device)
        turn = len(self.layers)
        output = self.call(turn, rows.ids[row : row + 1], mask, hidden, logits_to_keep=positions.to(self.device))
        result: torch.Tensor = output.logits[0]
        return result

    def head(self, hidden: torch.Tensor, grad: bool = False) -> torch.Tensor:
        """Logits [P, V] of outputs [P, D] of the last layer, of any rows: norm and head see one position at a time.

        They go in as P rows of one token, so that no mask over P positions is built.
        """
        import torch

        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.int64)
        output = self.call(len(self.layers), ids, None, hidden.to(self.device)[:, None], grad=grad)
        result: torch.Tensor = output.logits[:, 0]
        return result

    def head_chunk(self) -> int:
        """Positions whose float32 logits fit the head's budget."""
        return max(HEAD_BYTES // (4 * self.skeleton.config.vocab_size), 1)

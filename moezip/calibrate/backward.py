"""The gradient of the loss, one decoder layer in memory at a time.

Forward once, keeping every layer's input and the experts it chose in files; then the layers again from last to first:
each is run on its kept input with gradients on, held to the experts it chose, and hands the gradient of its output
down to the gradient of its input. Gradients of weights are never formed. What is summed is, per routed expert, its
inner activation u (the input of its down projection) and the gradient v of the loss with respect to it: every
second-order price is made of those two.

The loss is the **sum** of the token losses over the scored tokens (not their mean), so that sums add over chunks; the
first token of a window is not scored. Labels are the text's own (empirical Fisher) or drawn from the model (true
Fisher).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import frexp, ldexp
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moezip.calibrate.capture import Capture
from moezip.calibrate.choices import Choices, Recorded, held
from moezip.calibrate.data import Rows
from moezip.calibrate.gradient_sums import Gates, gradient_sums
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.kept import Kept, Standing, disk_bytes
from moezip.calibrate.linears import head_linear, layer_linears, squares_kept
from moezip.calibrate.memory import give_back
from moezip.calibrate.record import GRADIENT_RECORDS
from moezip.calibrate.statistics import Array, Domain
from moezip.calibrate.stream import ACTIVATION_BYTES, BASE_BYTES, Stream
from moezip.calibrate.trace import Trace
from moezip.errors import MoezipError
from moezip.progress import Progress, Watch, unwatched

if TYPE_CHECKING:
    import torch

Labels = Literal["data", "model"]
# A micro-batch with gradients holds every layer-internal activation, about four times what a plain one holds (measured:
# 3.7 times, 512 tokens, D 1024, 8 of 64 experts).
SHARE_OF_ROWS = 4
# float16 ends at 65504 and its gradients vanish below 6e-8. The loss is multiplied by this while it passes the head,
# where the gradient of a logit is 1 at most;
HEAD_SCALE = 1024.0
# inside a layer the gradient of its output is brought to this size by a power of two, which rounds nothing: a factor
# of 4096 is left to grow by, one of 2^28 to shrink by. Between layers gradients are float32.
LARGEST_GRADIENT = 16.0


class Backward:
    """One streamed forward and backward pass.

    Args:
        stream: the model; its micro-batches are made smaller for the whole pass, so that the layers are run again on
            the very rows they were first run on.
        rows: what is run; every position but the first of a row is scored.
        folder: where the layers' inputs and the gradient are kept; ``disk_bytes`` tells how much.
        labels: ``data`` (the text's own next tokens) or ``model`` (drawn from its predictions, by ``seed``).
        capture: watches the forward half, if its records are wanted too.
        job: digest of everything that the sums depend on. With it the pass is saved as it goes, and an interrupted one
            leaves what it needs to go on; without it nothing is ever left.
        save_every: seconds between saves.

    Attributes:
        sums: per domain and layer, the sums of ``GRADIENT_RECORDS``.
        linears: per domain, by name on disk, the summed squares of the output gradients of all other linears.
        losses: per domain, the summed loss of the text's own labels, in nats. scored: tokens that it counts.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Rows,
        folder: Path,
        *,
        labels: Labels = "data",
        seed: int = 0,
        capture: Capture | None = None,
        job: str = "",
        save_every: float = 60.0,
    ):
        import torch

        self.stream, self.rows, self.folder = stream, rows, folder
        self.labels, self.seed = labels, seed
        self._fit_micro_batches()
        entry, config = stream.skeleton.architecture, stream.source.config
        self._entry = entry
        self._facts = {fact.layer: fact for fact in entry.layer_facts(config)}
        self._gates = Gates(
            entry.gates_renormalised(config),
            entry.scoring == "softmax",
            float(config.get("routed_scaling_factor") or 1),
        )
        self._head_scale = HEAD_SCALE if stream.skeleton.dtype == torch.float16 else 1.0
        self._trace, self._recorded = Trace(), Recorded()
        self._generator = torch.Generator().manual_seed(seed)
        self._capture = capture or Capture(entry, list(self._facts.values()), (), 1.0)
        shape = (*rows.ids.shape, int(stream.skeleton.config.hidden_size))
        self._kept = Kept(folder, job, shape, stream.skeleton.dtype, self._facts)
        self._save_every, self._last_save = save_every, time.monotonic()
        self.sums: dict[str, dict[int, dict[str, Array]]] = {}
        self.linears: dict[str, dict[str, Array]] = {}
        self.losses: dict[str, float] = {}
        self.scored: dict[str, int] = {}

    @property
    def disk_bytes(self) -> int:
        """The most that the pass has on disk at one time."""
        skeleton = self.stream.skeleton
        return disk_bytes(
            self.rows.ids.numel(), int(skeleton.config.hidden_size), skeleton.dtype.itemsize, len(self.stream.layers),
            self._facts.values(),
        )  # fmt: skip

    def _fit_micro_batches(self) -> None:
        """Fewer rows at a time, and fewer side by side where a single row is large.

        Raises:
            MoezipError: one row is too much for the ceiling.
        """
        stream, width = self.stream, self.rows.ids.shape[1]
        one, program = SHARE_OF_ROWS * width * stream.token_bytes, BASE_BYTES + stream.layer_bytes - ACTIVATION_BYTES
        room = stream.max_memory - program  # hidden states are on disk
        if stream.micro_rows is None and one > room:
            raise MoezipError(
                f"a window of {width} tokens takes about {one / 2**20:.0f} MiB with gradients, the ceiling of "
                f"{stream.max_memory / 2**30:.2f} GiB leaves {room / 2**20:.0f} MiB for it",
                where="--max-memory",
                next=f"allow at least {(program + one) / 2**30 + 0.01:.2f} GiB, or use a --seq-len of at most "
                f"{width * room // one}",
            )
        stream.run_side_by_side(max(min(stream.side_by_side, room // one), 1))
        stream.micro_rows = max(stream.rows_per_step(width) // SHARE_OF_ROWS, 1)

    def run(self, watch: Watch = unwatched, *, resume: bool = False) -> None:
        """Forward, loss, backward.

        Args:
            resume: go on where an interrupted pass of the same job was last saved; from the start if it was not.

        Raises:
            MoezipError: too little disk, gradients that are not finite, or files of another job or damaged ones.
        """
        restored = self._kept.restore() if resume else None
        if restored is None:
            self._kept.clear()
        standing = Standing() if restored is None else restored[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._require_disk(watch)
            if restored is not None:
                self._take_up(*restored)
            self._last_save = time.monotonic()
            if standing.half == "forward":
                self._forward(standing.next_layer, watch)
                standing = self._loss()
            else:
                self.stream.embed_all([], [])  # its forward stands in for the embeddings from here on
            self._backward(standing, watch)
        except BaseException:
            self._kept.forget_unsaved()
            raise
        self._kept.clear()

    def _require_disk(self, watch: Watch) -> None:
        free = shutil.disk_usage(self.folder).free
        missing = max(self.disk_bytes - self._kept.bytes, 0)
        if missing > free:
            raise MoezipError(
                f"the layers' inputs need {missing / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free",
                where=self.folder,
                next="name another --workdir, or use fewer --tokens",
            )
        watch(Progress("reserve disk", self.disk_bytes, self.disk_bytes, "bytes"))

    def _take_up(self, standing: Standing, sums: Sequence[Domain]) -> None:
        """What was summed before the interruption, and the same micro-batches."""
        own = {record.name for record in GRADIENT_RECORDS}
        for domain in sums:
            self.linears[domain.name] = dict(domain.linears)
            for layer, named in domain.layers.items():
                for name, found in named.items():
                    mine = self.sums if name in own else self._capture.sums
                    mine.setdefault(domain.name, {}).setdefault(layer, {})[name] = found
        self.losses, self.scored = dict(standing.losses), dict(standing.scored)
        self.stream.micro_rows = standing.micro_rows
        self.stream.run_side_by_side(standing.side_by_side)

    def _save(self, standing: Standing) -> None:
        """Saves, if the pass is to be resumable and the last save is old enough."""
        if not self._kept.job or time.monotonic() - self._last_save < self._save_every:
            return
        domains = []
        for name in dict.fromkeys(self.rows.domains):
            own = self.sums.get(name, {})
            layers = {i: {**named, **own.get(i, {})} for i, named in self._capture.sums.get(name, {}).items()}
            domains.append(Domain(name, (), 0, layers, linears=self.linears.get(name, {})))
        self._kept.save(standing, domains)
        self._last_save = time.monotonic()

    def _standing(self, half: Literal["forward", "backward"], next_layer: int, gradient: str = "") -> Standing:
        stream = self.stream
        rows = stream.rows_per_step(self.rows.ids.shape[1])
        losses, scored = dict(self.losses), dict(self.scored)
        return Standing(half, next_layer, rows, stream.side_by_side, gradient, losses, scored)

    # -- forward --------------------------------------------------------------------------------------------

    def _forward(self, first: int, watch: Watch) -> None:
        stream, rows, kept, total = self.stream, self.rows, self._kept, len(self.stream.layers)
        if first == 0:
            [given] = stream.embed_all([rows], [self.folder / "input-0.bin"])
        else:
            stream.embed_all([], [])
            given = kept.input(first, there=True)
        watch(Progress("forward", first, total, tokens=rows.tokens()))
        for index in range(first, total):
            states = kept.input(index + 1)
            states.copy_from(given)
            next(stream.run(rows, states, first=index, last=index, capture=self._choices(index)))
            given = states
            watch(Progress("forward", index + 1, total, tokens=rows.tokens()))
            self._save(self._standing("forward", index + 1))

    def _choices(self, layer: int) -> Choices:
        """The capture, and every token's experts into the layer's file."""
        width, row = self.rows.ids.shape[1], 0
        file = self._kept.ids(layer) if layer in self._facts else None

        def keep(_layer: int, ids: torch.Tensor) -> None:
            nonlocal row
            assert file is not None
            stop = row + ids.shape[0] // width
            file.write(row, stop, ids.view(stop - row, width, -1))
            row = stop

        return Choices(self._capture, keep)

    # -- loss -----------------------------------------------------------------------------------------------

    def _loss(self) -> Standing:
        """Gradient of the summed loss with respect to the last layer's output, a few positions' logits at a time."""
        import torch

        stream, rows, last = self.stream, self.rows, len(self.stream.layers)
        outputs, gradient = self._kept.input(last, there=True), self._kept.gradient(f"gradient-{last}.bin")
        stream.load_head()
        chunk = max(stream.head_chunk() // 4, 1)  # logits, their softmax and its gradient exist side by side
        head = head_linear(stream)
        for row, domain in enumerate(rows.domains):
            hidden = outputs.read(row, row + 1)[0]
            positions = rows.scored(row)
            grads = torch.zeros(hidden.shape, dtype=torch.float32)
            for start in range(0, len(positions), chunk):
                at = positions[start : start + chunk]
                leaf = hidden[at].to(stream.device).detach().requires_grad_()
                self._trace.begin()
                with torch.enable_grad(), squares_kept(self._trace, dict([head] if head else [])):
                    logs = stream.head(leaf, grad=True).float().log_softmax(-1)
                    text = rows.ids[row, at + 1].to(stream.device)[:, None]
                    labels = text if self.labels == "data" else self._drawn(logs.detach())
                    (-logs.gather(1, labels).sum() * self._head_scale).backward()
                self.losses[domain] = self.losses.get(domain, 0.0) - float(logs.detach().gather(1, text).double().sum())
                _add(self.linears.setdefault(domain, {}), self._linear_sums(self._head_scale))
                assert leaf.grad is not None
                grads[at] = leaf.grad.float().cpu() / self._head_scale
            self.scored[domain] = self.scored.get(domain, 0) + len(positions)
            gradient.write(row, row + 1, grads[None])
        stream.free_head()
        give_back()
        assert gradient.file is not None
        standing = self._standing("backward", last - 1, gradient.file.name)
        self._save(standing)
        return standing

    def _drawn(self, logs: torch.Tensor) -> torch.Tensor:
        """A label per position drawn from the model's own distribution, [P, 1]."""
        import torch

        return torch.multinomial(logs.exp().cpu(), 1, generator=self._generator).to(logs.device)

    # -- backward -------------------------------------------------------------------------------------------

    def _backward(self, standing: Standing, watch: Watch) -> None:
        stream, kept, total = self.stream, self._kept, len(self.stream.layers)
        gradient = kept.gradient(standing.gradient, there=True)
        watch(Progress("backward", total - 1 - standing.next_layer, total, tokens=self.rows.tokens()))
        for index in reversed(range(standing.next_layer + 1)):
            assert gradient.file is not None
            # in place, but never in the file that a resumed pass would begin with
            made = gradient if gradient.file.name != kept.saved.gradient else kept.gradient(f"gradient-{index}.bin")
            targets = stream.skeleton.layer_targets(index)
            stream.skeleton.load(targets)
            try:
                with self._watched(index):
                    self._layer(index, gradient, made)
            finally:
                stream.skeleton.free(targets)
            give_back()
            gradient = made
            watch(Progress("backward", total - index, total, tokens=self.rows.tokens()))
            if index:
                assert made.file is not None
                self._save(self._standing("backward", index - 1, made.file.name))

    @contextmanager
    def _watched(self, index: int) -> Iterator[None]:
        """Holds the layer's router to the recorded choices, and what its experts and other linears do for the sums."""
        linears = {name: module for _, name, module in layer_linears(self.stream, index)}
        if index not in self._facts:
            with squares_kept(self._trace, linears):
                yield
            return
        block = self.stream.layers[index].get_submodule(self._entry.block)
        experts: Any = block.get_submodule(self._entry.experts_module)
        experts._moezip_trace = self._trace
        try:
            with (
                held(block.get_submodule(self._entry.router_module), self._recorded, self._facts[index]),
                squares_kept(self._trace, linears),
            ):
                yield
        finally:
            experts._moezip_trace = None

    def _layer(self, index: int, given: HiddenStates, made: HiddenStates) -> None:
        """From the gradient of the layer's output to that of its input."""
        inputs = self._kept.input(index, there=True)
        chosen = self._kept.ids(index, there=True) if index in self._facts else None

        def step(start: int, stop: int) -> tuple[dict[str, Array], dict[str, Array]]:
            ids = None if chosen is None else chosen.read(start, stop).long().flatten(0, 1).to(self.stream.device)
            scale, gradients = self._step(index, inputs.read(start, stop), given.read(start, stop), ids, start)
            made.write(start, stop, gradients)
            linears = self._linear_sums(scale)
            if ids is None:
                return {}, linears
            if not ids.equal(self._trace.ids):
                raise MoezipError(
                    f"the router of decoder layer {index} does not choose by topk and cannot be held to its choices",
                    next="this is a fault in moezip: report it with the architecture's name",
                )
            mask = None if self.rows.mask is None else self.rows.mask[start:stop]
            sums = gradient_sums(self._trace, self._facts[index], self._gates, mask, scale)
            self._trace.clear()
            return sums, linears

        for domain, (found, linears) in self.stream.side_by_side_results(self.rows, step):
            if found:
                _add(self.sums.setdefault(domain, {}).setdefault(index, {}), found)
            _add(self.linears.setdefault(domain, {}), linears)

    def _linear_sums(self, scale: float) -> dict[str, Array]:
        """Of the micro-batch that this thread has just run, whose gradients are ``scale`` times too large."""
        return {name: squares.cpu().numpy() / scale**2 for name, squares in self._trace.linears.items()}

    def _step(
        self, index: int, inputs: torch.Tensor, given: torch.Tensor, ids: torch.Tensor | None, start: int
    ) -> tuple[float, torch.Tensor]:
        """One micro-batch: the scale of the gradients in the trace, and the gradient [n, S, D] of its input."""
        import torch

        stream, stop = self.stream, start + len(inputs)
        mask = None if self.rows.mask is None else self.rows.mask[start:stop]
        hidden = inputs.to(stream.device).detach().clone().requires_grad_()
        scale = _scale(float(given.abs().max()))
        self._recorded.ids = ids
        self._trace.begin()
        with torch.enable_grad():
            output = stream.call(index, self.rows.ids[start:stop], mask, hidden, grad=True)
            output.backward((given * scale).to(device=stream.device, dtype=output.dtype))
        assert hidden.grad is not None
        if not bool(torch.isfinite(hidden.grad.sum(dtype=torch.float32))):
            raise MoezipError(
                f"the gradient at decoder layer {index} is not finite",
                where=f"rows {start} to {stop - 1}",
                next="the weights may be damaged (run `moezip verify`), or the dtype overflows",
            )
        return scale, hidden.grad.float().cpu() / scale


def _add(sums: dict[str, Array], more: Mapping[str, Array]) -> None:
    for name, added in more.items():
        sums[name] = sums[name] + added if name in sums else added


def _scale(peak: float) -> float:
    """The power of two that brings ``peak`` to ``LARGEST_GRADIENT`` or up to half below; 1 for 0 and what is no number.

    Exact in every dtype, so that it changes nothing where nothing would have vanished.
    """
    if not 0.0 < peak < float("inf"):
        return 1.0
    return ldexp(LARGEST_GRADIENT, -frexp(peak)[1])

"""The gradient of the loss, one decoder layer in memory at a time.

Forward once, keeping every layer's input in files; then the layers again from last to first: each is run on its kept
input with gradients on, and hands the gradient of its output down to the gradient of its input. Gradients of weights
are never formed. What is summed is, per routed expert, its inner activation u (the input of its down projection)
and the gradient v of the loss with respect to it: every second-order price is made of those two.

The loss is the **sum** of the token losses over the scored tokens (not their mean), so that sums add over chunks; the
first token of a window is not scored. Labels are the text's own (empirical Fisher) or drawn from the model (true
Fisher).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.capture import Capture
from moezip.calibrate.data import Rows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.record import GRADIENT_RECORDS
from moezip.calibrate.statistics import Array
from moezip.calibrate.stream import Stream
from moezip.calibrate.trace import Trace
from moezip.errors import MoezipError
from moezip.progress import Progress, Watch, unwatched

if TYPE_CHECKING:
    import torch

Labels = Literal["data", "model"]
# A micro-batch with gradients holds every layer-internal activation, several times what a plain one holds.
SHARE_OF_ROWS = 4
# float16 gradients vanish below 6e-8: they travel multiplied by this and are divided when summed.
HALF_SCALE = 1024.0


class Backward:
    """One streamed forward and backward pass.

    Args:
        stream: the model; its micro-batches are made smaller for the whole pass, so that the layers are run again on
            the very rows they were first run on.
        rows: what is run; every position but the first of a row is scored.
        folder: where the layers' inputs and the gradient are kept; ``disk_bytes`` tells how much.
        labels: ``data`` (the text's own next tokens) or ``model`` (drawn from its predictions, by ``seed``).
        capture: watches the forward half, if its records are wanted too.

    Attributes:
        sums: per domain and layer, the sums of ``GRADIENT_RECORDS``.
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
    ):
        import torch

        self._capture = capture
        self.stream, self.rows, self.folder, self.labels = stream, rows, folder, labels
        stream.micro_rows = max(stream.rows_per_step(rows.ids.shape[1]) // SHARE_OF_ROWS, 1)
        entry, config = stream.skeleton.architecture, stream.source.config
        self._entry = entry
        self._facts = {fact.layer: fact for fact in entry.layer_facts(config)}
        self._renormalised = entry.gates_renormalised(config)
        self._softmax = entry.scoring == "softmax"
        self._gate_scale = float(config.get("routed_scaling_factor") or 1.0)
        self._scale = HALF_SCALE if stream.skeleton.dtype == torch.float16 else 1.0
        self._trace = Trace()
        self._generator = torch.Generator().manual_seed(seed)
        self.sums: dict[str, dict[int, dict[str, Array]]] = {}
        self.losses: dict[str, float] = {}
        self.scored: dict[str, int] = {}

    @property
    def disk_bytes(self) -> int:
        """What the pass keeps on disk: the input of every layer, the last output, and the gradient in float32."""
        hidden = self.stream.hidden_bytes(self.rows)
        return hidden * (len(self.stream.layers) + 1) + hidden * 4 // self.stream.skeleton.dtype.itemsize

    def run(self, watch: Watch = unwatched) -> None:
        """Forward, loss, backward.

        Raises:
            MoezipError: too little disk, or gradients that are not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if self.disk_bytes > free:
            raise MoezipError(
                f"the layers' inputs need {self.disk_bytes / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free",
                where=self.folder,
                next="name another --workdir, or use fewer --tokens",
            )
        watch(Progress("reserve disk", self.disk_bytes, self.disk_bytes, "bytes"))
        kept: list[HiddenStates] = []
        try:
            self._forward(kept, watch)
            gradient = self._loss(kept)
            kept.append(gradient)
            self._backward(kept, gradient, watch)
        finally:
            for states in kept:
                states.close()

    # -- forward --------------------------------------------------------------------------------------------

    def _file(self, name: str, dtype: torch.dtype) -> HiddenStates:
        shape = (*self.rows.ids.shape, int(self.stream.skeleton.config.hidden_size))
        return HiddenStates(shape, dtype, self.folder / f"{name}.bin")

    def _forward(self, kept: list[HiddenStates], watch: Watch) -> None:
        stream, dtype = self.stream, self.stream.skeleton.dtype
        steps, total = stream.steps(self.rows), len(stream.layers)
        [states] = stream.embed_all([self.rows], [self.folder / "hidden.bin"])
        try:
            for index in range(total + 1):
                copy = self._file(f"input-{index}", dtype)
                kept.append(copy)
                for start, stop in steps:
                    copy.write(start, stop, states.read(start, stop))
                if index < total:
                    next(stream.run(self.rows, states, first=index, last=index, capture=self._capture))
                    watch(Progress("forward", index + 1, total, tokens=self.rows.tokens()))
        finally:
            states.close()

    # -- loss -----------------------------------------------------------------------------------------------

    def _loss(self, kept: Sequence[HiddenStates]) -> HiddenStates:
        """Gradient of the summed loss with respect to the last layer's output, a few positions' logits at a time."""
        import torch

        stream, rows = self.stream, self.rows
        gradient = self._file("gradient", torch.float32)
        stream.load_head()
        chunk = max(stream.head_chunk() // 4, 1)  # logits, their softmax and its gradient exist side by side
        for row, domain in enumerate(rows.domains):
            hidden = kept[-1].read(row, row + 1)[0]
            positions = self._scored(row)
            grads = torch.zeros(hidden.shape, dtype=torch.float32)
            for start in range(0, len(positions), chunk):
                at = positions[start : start + chunk]
                leaf = hidden[at].to(stream.device).detach().requires_grad_()
                with torch.enable_grad():
                    logs = stream.head(leaf, grad=True).float().log_softmax(-1)
                    text = rows.ids[row, at + 1].to(stream.device)[:, None]
                    labels = text if self.labels == "data" else self._drawn(logs.detach())
                    (-logs.gather(1, labels).sum() * self._scale).backward()
                self.losses[domain] = self.losses.get(domain, 0.0) - float(logs.detach().gather(1, text).double().sum())
                assert leaf.grad is not None
                grads[at] = leaf.grad.float().cpu()
            self.scored[domain] = self.scored.get(domain, 0) + len(positions)
            gradient.write(row, row + 1, grads[None])
        stream.free_head()
        return gradient

    def _scored(self, row: int) -> torch.Tensor:
        """Positions whose successor is a real token, as they are themselves."""
        import torch

        width = self.rows.ids.shape[1]
        if self.rows.mask is None:
            return torch.arange(width - 1)
        real = self.rows.mask[row]
        return torch.nonzero(real[:-1] & real[1:])[:, 0]

    def _drawn(self, logs: torch.Tensor) -> torch.Tensor:
        """A label per position drawn from the model's own distribution, [P, 1]."""
        import torch

        return torch.multinomial(logs.exp().cpu(), 1, generator=self._generator).to(logs.device)

    # -- backward -------------------------------------------------------------------------------------------

    def _backward(self, kept: Sequence[HiddenStates], gradient: HiddenStates, watch: Watch) -> None:
        stream, total = self.stream, len(self.stream.layers)
        for index in reversed(range(total)):
            layer, targets = stream.layers[index], stream.skeleton.layer_targets(index)
            stream.skeleton.load(targets)
            experts: Any = None
            if index in self._facts:
                block = layer.get_submodule(self._entry.block)
                experts = block.get_submodule(self._entry.experts_module)
                experts._moezip_trace = self._trace
            try:
                self._layer(index, kept[index], gradient)
            finally:
                if experts is not None:
                    experts._moezip_trace = None
                stream.skeleton.free(targets)
            kept[index].close()
            watch(Progress("backward", total - index, total, tokens=self.rows.tokens()))

    def _layer(self, index: int, inputs: HiddenStates, gradient: HiddenStates) -> None:
        def step(start: int, stop: int) -> dict[str, Array]:
            return self._step(index, inputs, gradient, start, stop)

        for domain, found in self.stream.side_by_side_results(self.rows, step):
            sums = self.sums.setdefault(domain, {}).setdefault(index, {})
            for name, added in found.items():
                sums[name] = sums[name] + added if name in sums else added
        if index not in self._facts:
            for layers in self.sums.values():
                layers.pop(index, None)

    def _step(
        self, index: int, inputs: HiddenStates, gradient: HiddenStates, start: int, stop: int
    ) -> dict[str, Array]:
        import torch

        stream, mask = self.stream, None if self.rows.mask is None else self.rows.mask[start:stop]
        hidden = inputs.read(start, stop).to(stream.device).detach().clone().requires_grad_()
        with torch.enable_grad():
            output = stream.call(index, self.rows.ids[start:stop], mask, hidden, grad=True)
            output.backward(gradient.read(start, stop).to(device=stream.device, dtype=output.dtype))
        assert hidden.grad is not None
        if not bool(torch.isfinite(hidden.grad.sum(dtype=torch.float32))):
            raise MoezipError(
                f"the gradient at decoder layer {index} is not finite",
                where=f"rows {start} to {stop - 1}",
                next="the weights may be damaged (run `moezip verify`), or the dtype overflows",
            )
        gradient.write(start, stop, hidden.grad.float().cpu())
        if index not in self._facts:
            return {}
        sums = self._sums(self._facts[index], mask)
        self._trace.clear()
        return sums

    def _sums(self, fact: LayerFacts, mask: torch.Tensor | None) -> dict[str, Array]:
        """What one micro-batch adds to the sums of one layer."""
        import torch

        trace = self._trace
        found = {record.name: np.zeros(record.shape(fact)) for record in GRADIENT_RECORDS}
        valid = None if mask is None else mask.reshape(-1).to(trace.ids.device)
        top_k = trace.ids.shape[1]
        # a = g_i (G . f_i) of every choice: the inner product of activation and gradient, plus the bias's share
        push = torch.zeros(trace.ids.numel(), dtype=torch.float64, device=trace.ids.device)
        for part in trace.parts:
            count = part.slots.numel()
            u = part.inner.detach()[:count].float()
            gradient = part.inner.grad
            assert gradient is not None
            v = gradient[:count].float() / self._scale
            here = (u * v).sum(1).double()
            if part.output is not None and part.bias is not None and part.output.grad is not None:
                here += (part.output.grad.float() / self._scale * part.bias.float()).sum(1).double()
            push[part.slots] = here
            if valid is not None:
                real = valid[part.slots // top_k]
                u, v = u[real], v[real]
            found["routed"][part.expert] = u.shape[0]
            found["inner_square"][part.expert] = u.square().sum(0).double().cpu().numpy()
            found["inner_grad_square"][part.expert] = v.square().sum(0).double().cpu().numpy()
            found["inner_product_square"][part.expert] = (u * v).square().sum(0).double().cpu().numpy()
        pushes = push.view(-1, top_k)
        drops = {"drop_square": pushes.square(), "drop_renormalised_square": self._renormalised_drops(pushes).square()}
        for name, squares in drops.items():
            if valid is not None:
                squares = squares * valid[:, None]
            sums = torch.bincount(trace.ids.reshape(-1), squares.reshape(-1), minlength=fact.experts)
            found[name] = sums.double().cpu().numpy()
        return found

    def _renormalised_drops(self, pushes: torch.Tensor) -> torch.Tensor:
        """First-order change of the loss of each token if one of its experts goes and the other gates grow, [T, k].

        With p the share of the gate that goes: p / (1 - p) * (G.y - total * G.f). Gates that are divided by their sum
        share that sum; softmax gates that are not share the whole softmax; others do not move.
        """
        import torch

        gates = self._trace.gates.double()
        if self._renormalised:
            total = gates.sum(1, keepdim=True)
        elif self._softmax:
            total = torch.full_like(gates[:, :1], self._gate_scale)
        else:
            return pushes
        share = gates / total
        # an expert that has the whole gate leaves nothing to grow: only taking its output away is left
        grown = share / (1 - share) * (pushes.sum(1, keepdim=True) - total * pushes / gates.clamp_min(1e-30))
        return torch.where((share < 1 - 1e-9) & (gates > 0), grown, -pushes)

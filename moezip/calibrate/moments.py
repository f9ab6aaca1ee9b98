"""Second moments of the inputs of linear layers, and the experts' own inputs: what an error-compensating solver reads.

A layer is looked at after those before it were quantized, so its inputs are what they will be. The experts are not
run: their input and the router's choice are kept, and whoever solves them takes one expert's tokens at a time, so that
no more than one expert's second moment exists per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip import kernels
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import Taken
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream

if TYPE_CHECKING:
    import torch

# Tokens whose inputs are turned into float32 at a time, on a device.
CHUNK = 2048


@dataclass(slots=True)
class Moment:
    """Sum over tokens of x x^T.

    Attributes:
        total: [C, C] float32, a sum and no mean. tokens: how many are in it. mass: the sum of their weights.
    """

    total: torch.Tensor
    tokens: int
    mass: float

    def add(self, other: Moment) -> None:
        self.total = self.total + other.total  # in place would need the mode that both were made in
        self.tokens += other.tokens
        self.mass += other.mass


def second_moment(x: torch.Tensor, weights: torch.Tensor | None = None) -> Moment:
    """Of inputs [T, C]: sum of w x x^T in float32, w = 1 without ``weights`` [T].

    With weights the count stays that of the tokens, so a solver's damping and shrinkage see the same evidence.
    """
    mass = x.shape[0] if weights is None else float(weights.sum())
    return Moment(_products(x, weights), x.shape[0], mass)


def _products(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The sum itself: on the CPU by moezip's kernel, which needs no copy in float32 and half of the products."""
    import torch

    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    if x.device.type == "cpu":
        given = x.detach().contiguous()
        values = given.view(torch.uint16) if x.dtype == torch.bfloat16 else given.float()
        shares = None if weights is None else weights.detach().float().contiguous().numpy()
        kernels.second_moment(values.numpy(), total.numpy(), weights=shares)
        return total
    for start in range(0, x.shape[0], CHUNK):
        part = x[start : start + CHUNK].float()
        scaled = part if weights is None else part * weights[start : start + CHUNK, None].float()
        total.addmm_(part.T, scaled)
    return total


class _Seen(threading.local):
    """What the hooks saw of the micro-batch that runs in this thread."""

    def __init__(self) -> None:
        self.valid: Any = None
        self.moments: dict[str, Moment] = {}
        # modules that share an input (q, k and v; gate and up) share its moment; the tensors are held so that no
        # other can come to lie at the same address
        self.inputs: list[tuple[torch.Tensor, Moment]] = []


def linear_moments(
    stream: Stream, index: int, rows: Rows, states: HiddenStates, linears: Mapping[str, Any]
) -> dict[str, Moment]:
    """Second moments of the inputs of some modules of a loaded layer, over all real tokens. Experts are not run.

    Args:
        linears: name -> module with inputs [..., C]. Modules that are given the very same tensor share one result.
    """
    if not linears:
        return {}
    seen = _Seen()
    hooks = [module.register_forward_pre_hook(_watcher(seen, name)) for name, module in linears.items()]
    found: dict[str, Moment] = {}

    def expect(valid: torch.Tensor | None) -> None:
        seen.valid = valid

    def take(start: int, stop: int) -> dict[str, Moment]:
        result, seen.moments, seen.inputs = seen.moments, {}, []
        return result

    try:
        with _experts_taken(stream, index):
            for _, _, moments in stream.look(index, rows, states, take, expect):
                added: dict[int, Moment] = {}
                for name, moment in moments.items():
                    if id(moment) in added:
                        found[name] = added[id(moment)]
                    elif name in found:
                        found[name].add(moment)
                        added[id(moment)] = found[name]
                    else:
                        found[name] = added[id(moment)] = moment
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _watcher(seen: _Seen, name: str) -> Callable[[Any, Any], None]:
    def watch(_module: Any, args: Any) -> None:
        given = args[0]
        for known, moment in seen.inputs:
            if known is given:
                seen.moments[name] = moment
                return
        flat = given.reshape(-1, given.shape[-1])
        if seen.valid is not None and seen.valid.numel() == flat.shape[0]:
            flat = flat[seen.valid]
        moment = second_moment(flat)
        seen.inputs.append((given, moment))
        seen.moments[name] = moment

    return watch


@contextmanager
def _experts_taken(stream: Stream, index: int) -> Iterator[Taken | None]:
    entry = stream.skeleton.architecture
    path = f"{entry.block}.{entry.experts_module}"
    layer: Any = stream.layers[index]
    facts = {fact.layer for fact in entry.layer_facts(stream.source.config)}
    if index not in facts:
        yield None
        return
    experts: Any = layer.get_submodule(path)
    taken = experts._moezip_taken = Taken()
    try:
        yield taken
    finally:
        del experts._moezip_taken


@dataclass(slots=True)
class ExpertInputs:
    """The input of one layer's experts over all real tokens, and who got which.

    Attributes:
        hidden: [N, S, D], where it waits. ids: [N * S, k], -1 on padding. gates: [N * S, k] float32.
    """

    hidden: HiddenStates
    ids: np.ndarray[Any, Any]
    gates: np.ndarray[Any, Any]

    def __post_init__(self) -> None:
        flat = self.ids.reshape(-1)
        order = np.argsort(flat, kind="stable")
        self._order, self._starts = order, np.searchsorted(flat[order], np.arange(int(flat.max(initial=0)) + 2))

    _order: Any = None
    _starts: Any = None

    def slots(self, expert: int) -> np.ndarray[Any, Any]:
        """Positions in the flattened choices that name this expert, ascending."""
        if expert + 1 >= len(self._starts):
            return self._order[:0]
        found: np.ndarray[Any, Any] = self._order[self._starts[expert] : self._starts[expert + 1]]
        return found

    def tokens(self, expert: int) -> torch.Tensor:
        """Inputs of the tokens routed to this expert, [n, D]."""
        return self.hidden.gather(self.slots(expert) // self.ids.shape[1])

    def weights(self, expert: int) -> torch.Tensor:
        """Their gate weights, [n] float32."""
        import torch

        return torch.from_numpy(self.gates.reshape(-1)[self.slots(expert)])

    def sample(self, count: int) -> torch.Tensor:
        """Inputs of at most ``count`` real tokens, evenly spaced, whoever they were routed to: [n, D]."""
        real = np.flatnonzero(self.ids[:, 0] >= 0)
        if len(real) > count:
            real = real[np.linspace(0, len(real) - 1, count).astype(np.int64)]
        return self.hidden.gather(real)

    def close(self) -> None:
        self.hidden.close()


def expert_inputs(
    stream: Stream, index: int, rows: Rows, states: HiddenStates, file: Path | None = None
) -> ExpertInputs:
    """What a loaded MoE layer gives to its experts; the experts are not run.

    Args:
        file: where the inputs wait, should they not stay in memory.
    """
    entry = stream.skeleton.architecture
    top_k = entry.integer(stream.source.config, entry.top_k_key)
    count = rows.ids.numel()
    hidden = HiddenStates(states.shape, states.dtype, file)
    ids = np.full((count, top_k), -1, np.int32)
    gates = np.zeros((count, top_k), np.float32)
    width = rows.ids.shape[1]
    with _experts_taken(stream, index) as taken:
        assert taken is not None

        def take(start: int, stop: int) -> tuple[Any, Any, Any]:
            seen = (taken.hidden, taken.ids.cpu().numpy(), taken.gates.float().cpu().numpy())
            taken.hidden = taken.ids = taken.gates = None
            return seen

        for start, stop, (given, chosen, weights) in stream.look(index, rows, states, take):
            hidden.write(start, stop, given.reshape(stop - start, width, -1))
            ids[start * width : stop * width] = chosen
            gates[start * width : stop * width] = weights
    if rows.mask is not None:
        ids[~rows.mask.reshape(-1).bool().numpy()] = -1
    return ExpertInputs(hidden, ids, gates)


def head_moment(stream: Stream, rows: Rows, states: HiddenStates, module: Any) -> Moment:
    """Second moment of the inputs of the loaded head's linear, over all real tokens of the last layer's output."""
    total: list[Moment] = []

    class Enough(Exception):
        pass

    def watch(_module: Any, args: Any) -> None:
        found = second_moment(args[0].reshape(-1, args[0].shape[-1]))
        if total:
            total[0].add(found)
        else:
            total.append(found)
        raise Enough  # before any logit is computed

    hook = module.register_forward_pre_hook(watch)
    try:
        for row in range(states.shape[0]):
            hidden = states.read(row, row + 1)[0]
            with suppress(Enough):
                stream.head(hidden if rows.mask is None else hidden[rows.mask[row].bool()])
    finally:
        hook.remove()
    return total[0]

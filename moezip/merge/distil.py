"""Training the factors of one layer to put out what the source's experts put out, on the calibration text.

MC-SMoE trains its factors, with the whole model, on the labels of a task. Here every layer is trained alone, as it is
streamed by: its inputs are those of the source, its target is the sum of gate times output of the source's experts, and
nothing but the factors moves. A token's gate for an expert goes to the output expert that it was merged into, as
``router=remap`` has it. Some tokens are held back, and training that made their error no smaller is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.formats.factors import INDEX, product
from moezip.merge.layer import MergeLayer
from moezip.plan.plan import Pick

if TYPE_CHECKING:
    import torch

HELD_BACK = 8  # of so many tokens one
MOST_HELD = 4096
CHUNK = 1024


class Layer:
    """The output experts of one layer, some of them factored.

    Args:
        weights: by output expert: matrices and biases by role, float32. Of a factored expert only the biases are read.
        made: by factored expert and role: its factors.
    """

    def __init__(
        self,
        layer: MergeLayer,
        picks: Sequence[Pick],
        weights: Mapping[int, Mapping[Any, torch.Tensor]],
        made: Mapping[int, Mapping[Any, dict[str, torch.Tensor]]],
    ):
        self.layer, self.weights, self.made = layer, weights, made
        self._places = np.full(layer.facts.experts, -1)
        for number, pick in enumerate(picks):
            self._places[list(pick.members)] = number

    def _linear(self, number: int, role: str, x: torch.Tensor) -> torch.Tensor:
        import torch

        bias = self.weights[number].get(f"{role}_bias")
        if number in self.made:
            return product(x, self.made[number][role], bias)
        return torch.nn.functional.linear(x, self.weights[number][role], bias)

    def __call__(self, x: torch.Tensor, ids: np.ndarray[Any, Any], gates: torch.Tensor) -> torch.Tensor:
        """[n, D] for inputs [n, D], the source's experts that each chose [n, k], and their gates."""
        import torch

        result = torch.zeros_like(x)
        places = self._places[ids]
        for number in np.unique(places):
            if number < 0:  # an expert that went nowhere
                continue
            token, slot = map(torch.from_numpy, np.nonzero(places == number))
            given = x[token]
            inner = self.layer.activate(self._linear(number, "gate", given), self._linear(number, "up", given))
            out = self._linear(number, "down", inner) * gates[token, slot, None]
            result = result.index_add(0, token, out)
        return result


def batches(layer: MergeLayer, tokens: np.ndarray[Any, Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Of some tokens, in pieces: inputs [n, D], ids [n, k], gates and the source's own output [n, D], float32."""
    import torch

    inputs, module = layer.inputs, layer.module
    assert inputs is not None and module is not None
    for start in range(0, len(tokens), CHUNK):
        some = tokens[start : start + CHUNK]
        x, ids, gates = inputs.hidden.gather(some), inputs.ids[some], torch.from_numpy(inputs.gates[some])
        with torch.no_grad():
            wanted = module(x, torch.from_numpy(ids).long(), gates.to(x.dtype))
        yield x.float(), ids, gates, wanted.float()


def split(layer: MergeLayer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Numbers of the tokens to train on, and of those held back."""
    assert layer.inputs is not None
    real = np.flatnonzero(layer.inputs.ids[:, 0] >= 0)
    held = real[:: max(HELD_BACK, -(-len(real) // MOST_HELD))]
    return np.setdiff1d(real, held), held


def error(experts: Layer, tokens: np.ndarray[Any, Any]) -> float:
    """Squared distance of the outputs to the source's, as a share of the source's squared size."""
    import torch

    wrong = size = 0.0
    with torch.no_grad():
        for x, ids, gates, wanted in batches(experts.layer, tokens):
            wrong += float((experts(x, ids, gates) - wanted).square().sum())
            size += float(wanted.square().sum())
    return wrong / size if size else 0.0


def train(experts: Layer, *, steps: int, batch: int, rate: float, seed: int) -> tuple[float, float]:
    """Moves the factors in place, with Adam and a step size that falls to 0.

    Args:
        batch: tokens per step. rate: of the first step, as a share of each factor's root mean square.

    Returns:
        The error on the tokens held back, before and after; the same where training was thrown away.
    """
    import torch

    tokens, held = split(experts.layer)
    before = error(experts, held)
    moving = [
        tensor
        for roles in experts.made.values()
        for factors in roles.values()
        for suffix, tensor in factors.items()
        if suffix != INDEX
    ]
    start = [tensor.clone() for tensor in moving]
    groups = [{"params": [tensor], "lr": rate * float(tensor.square().mean().sqrt())} for tensor in moving]
    chance = np.random.default_rng(seed)
    with torch.enable_grad():
        for tensor in moving:
            tensor.requires_grad_(True)
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        for _ in range(steps if len(tokens) else 0):
            adam.zero_grad()
            chosen = np.sort(chance.choice(tokens, min(batch, len(tokens)), replace=False))
            for x, ids, gates, wanted in batches(experts.layer, chosen):
                loss = (experts(x, ids, gates) - wanted).square().sum() / len(chosen)
                loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            falling.step()
    for tensor in moving:
        tensor.requires_grad_(False)
    after = error(experts, held)
    if after < before:
        return before, after
    for tensor, old in zip(moving, start, strict=True):
        tensor.copy_(old)
    return before, before

"""The experts that every token chose: kept in the forward half of a backward pass, held to in the other.

A layer that is run a second time may round a logit otherwise, and where two experts are nearly tied its router would
choose anew. The prices would then be of another computation than the one whose loss they belong to. So the second run
takes the recorded ids, and the model's own router computes their gates from the logits it sees now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moezip.arch.spec import LayerFacts
from moezip.calibrate.capture import Capture
from moezip.calibrate.statistics import Array

CHOSEN = "chosen"


def ids_dtype(experts: int) -> torch.dtype:
    """The smallest integers that number ``experts`` experts."""
    return torch.uint8 if experts <= 2**8 else torch.int16 if experts <= 2**15 else torch.int32


class Choices(Capture):
    """A capture that also hands on the ids that each token chose.

    Args:
        plain: whose sums are added to.
        keep: called per MoE layer and micro-batch, in order of the rows, with the ids [T, k], padding included.
    """

    def __init__(self, plain: Capture, keep: Callable[[int, torch.Tensor], None]):
        super().__init__(plain.architecture, list(plain.facts.values()), plain.records, plain.scale)
        self.sums = plain.sums
        self._keep = keep

    def seen(self, layer: int) -> dict[str, Array]:
        if layer not in self.facts:
            return {}
        # exact: ids are small whole numbers
        ids: Array = self._routed.ids.cpu().double().numpy()
        return {**super().seen(layer), CHOSEN: ids}

    def add(self, layer: int, domain: str, seen: Mapping[str, Array]) -> None:
        if layer in self.facts:
            super().add(layer, domain, seen)
            self._keep(layer, torch.from_numpy(seen[CHOSEN]))


class Recorded(threading.local):
    """The ids [T, k] of the micro-batch that runs in this thread."""

    ids: Any = None


@contextmanager
def held(router: Any, recorded: Recorded, fact: LayerFacts) -> Iterator[None]:
    """Inside, ``router`` (a module of the model) chooses what ``recorded`` says, whatever its logits are."""
    plain = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Held(recorded.ids, fact):
            return plain(*args, **kwargs)

    router.forward = forward
    try:
        yield
    finally:
        router.forward = plain


class _Held(TorchFunctionMode):
    """Answers the choosing calls of a router, in this thread, with recorded ids; everything else stays its own.

    Routers choose by ``topk`` over [T, E], some after a ``topk`` over [T, groups] that masks the other groups; phimoe's
    sparsemixer takes ``max`` over [T, E] once per choice, with the values as thresholds. Values are what stands at the
    recorded ids, so everything that is computed of them keeps its gradient.
    """

    def __init__(self, ids: torch.Tensor, fact: LayerFacts):
        super().__init__()
        self._ids, self._fact, self._column = ids, fact, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            return self._topk(func, *args, **kwargs)
        if func in (torch.max, torch.Tensor.max) and self._over_experts(args[0]):
            return self._maximum(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _over_experts(self, values: torch.Tensor) -> bool:
        return values.ndim == 2 and values.shape[-1] == self._fact.experts

    def _topk(self, func: Any, values: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        fact = self._fact
        if self._over_experts(values) and k == fact.top_k:
            return torch.return_types.topk((values.gather(1, self._ids), self._ids))
        if fact.groups > 1 and values.ndim == 2 and values.shape[-1] == fact.groups and k == fact.top_groups:
            # groups of recorded experts first, then the best of the others
            inside = self._ids // (fact.experts // fact.groups)
            return func(values.scatter(1, inside, float("inf")), k, *args, **kwargs)
        return func(values, k, *args, **kwargs)

    def _maximum(self, func: Any, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs != {"dim": -1, "keepdim": True} or self._column == self._fact.top_k:
            return func(values, *args, **kwargs)
        ids = self._ids[:, self._column, None]
        self._column += 1
        return torch.return_types.max((values.gather(1, ids), ids))

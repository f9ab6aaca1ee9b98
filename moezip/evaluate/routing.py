"""Routing agreement: how far a compressed model still chooses the experts that its source chose for the same tokens.

Of one MoE layer and all tokens t of the text (padding left out), with the k experts S_t that the source's router chose:

- ``p(e)`` is the output expert that source expert e went into by the plan, alone or merged with others; pruned experts
  went nowhere.
- ``P_t = {p(e) : e in S_t, e not pruned}`` is what the source's choice means in the compressed model.
- ``C_t`` is what the compressed model's router chose.
- ``agreement = sum |C_t and P_t| / sum |P_t|``: of the choices that can still be made, the share that is.
- ``remaining = sum |{e in S_t, e not pruned}| / sum |S_t|``: the share of the source's choices that can still be made.

Both are 1 where nothing changed. A later layer's input is changed by what earlier layers lost, so agreement tells how
far the models have come apart there, whatever was done to the layer itself. Where an expert takes the router's choice
but is not run (skipped, or a constant in its place), it counts as not chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.arch.mone import Substitution
from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.choices import ids_dtype
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.plan.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moezip.evaluate.forward import Group, Item

    Ints = NDArray[np.int64]

PLAN = "moezip/plan.json"
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class LayerMap:
    """What router choices of one layer mean in terms of output experts; ``NOWHERE`` for none.

    Attributes:
        source: [E] by the source's ids. ours: by the ids of the compressed model's router; the last entry is for
            whatever lies beyond, which stands for nobody.
    """

    source: Ints
    ours: Ints


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """Sums over the tokens of one layer: see the module."""

    asked: int
    remaining: int
    possible: int
    agreed: int

    def __add__(self, other: LayerRouting) -> LayerRouting:
        return LayerRouting(
            self.asked + other.asked,
            self.remaining + other.remaining,
            self.possible + other.possible,
            self.agreed + other.agreed,
        )

    def to_json(self) -> dict[str, float | None]:
        """``agreement`` (null where every chosen expert is gone), ``remaining``."""
        agreement = self.agreed / self.possible if self.possible else None
        return {"agreement": agreement, "remaining": self.remaining / self.asked}


@dataclass(frozen=True, slots=True)
class Routing:
    """Agreement per MoE layer, or the reason why there is none."""

    layers: Mapping[int, LayerRouting]
    reason: str | None = None

    def total(self) -> LayerRouting:
        """All layers together."""
        return sum(self.layers.values(), LayerRouting(0, 0, 0, 0))

    def to_json(self) -> dict[str, Any]:
        """``agreement`` and ``remaining`` over all layers, ``by_layer`` {layer: the same}, ``reason``."""
        if self.reason is not None:
            return {"agreement": None, "remaining": None, "by_layer": {}, "reason": self.reason}
        by_layer = {str(layer): found.to_json() for layer, found in sorted(self.layers.items())}
        return {**self.total().to_json(), "by_layer": by_layer, "reason": None}


def maps(
    model: Source, reference: Source, facts: Sequence[LayerFacts], reference_facts: Sequence[LayerFacts]
) -> dict[int, LayerMap] | str:
    """Per MoE layer, how the reference's experts correspond to the model's; or why that cannot be told."""
    if [fact.layer for fact in facts] != [fact.layer for fact in reference_facts]:
        return "the two have experts in different layers"
    plan = _plan_of(model)
    if plan is None and not isinstance(model, Checkpoint):
        return "the model is not saved, and its last step says nothing of experts"
    if plan is not None and model.fingerprint != reference.fingerprint:
        if plan.source != reference.fingerprint:
            return "the model's plan was made for another checkpoint than the reference"
        substituted = Substitution.of(model.config) is not None
        return {layer.layer: planned(layer, substituted) for layer in plan.layers}
    if plan is None and _plan_of(reference) is not None:
        return "the reference was made from another checkpoint by a plan, and the model has none"
    if [fact.experts for fact in facts] != [fact.experts for fact in reference_facts]:
        return "the two have different numbers of experts, and there is no plan that says which is which"
    return {fact.layer: LayerMap(np.arange(fact.experts), _open(np.arange(fact.experts))) for fact in facts}


def planned(layer: LayerPlan, substituted: bool = False) -> LayerMap:
    """The correspondence that one layer of a plan makes.

    Args:
        substituted: dropped experts stay in the router, as constants.
    """
    source = np.full(layer.experts, NOWHERE)
    for place, pick in enumerate(layer.picks):
        source[list(pick.members)] = place
    # routers that keep all their rows choose among the source's ids
    whole = substituted or layer.router == "remap"
    return LayerMap(source, _open(source if whole else np.arange(len(layer.picks))))


def _open(ids: Ints) -> Ints:
    return np.append(ids, NOWHERE)


def _plan_of(source: Source) -> Plan | None:
    """The plan that a checkpoint was written by, or that a view reads its source through."""
    if not isinstance(source, Checkpoint):
        found: Plan | None = getattr(source, "plan", None)
        base: Source | None = getattr(source, "base", None)  # what codes or another config are laid over
        return _plan_of(base) if found is None and base is not None else found
    file = source.folder / PLAN
    return Plan.load(file) if file.is_file() else None


def compare(theirs: Ints, ours: Ints, layer: LayerMap) -> LayerRouting:
    """Sums over tokens.

    Args:
        theirs: [T, k], the source's choices, each expert at most once. ours: [T, k'], the compressed model's.
    """
    meant = layer.source[theirs]
    remaining = meant != NOWHERE
    # of several choices that went into one expert, one counts
    meant = np.sort(meant, axis=1)
    first = meant != NOWHERE
    first[:, 1:] &= meant[:, 1:] != meant[:, :-1]
    chosen = layer.ours[np.clip(ours, 0, len(layer.ours) - 1)]
    agreed = (meant[:, :, None] == chosen[:, None, :]).any(2) & first
    return LayerRouting(theirs.size, int(remaining.sum()), int(first.sum()), int(agreed.sum()))


class _Seen(threading.local):
    """The choices of the micro-batch that runs in this thread."""

    ids: Any = None


class Watch:
    """What stands in a capture's place in ``Stream.run``: hands on what every router chose, and takes no time else.

    Args:
        layers: MoE layers to watch.
        take: called per layer and micro-batch, in order of the rows, with the ids [T, k], padding included.
    """

    def __init__(self, architecture: Architecture, layers: Sequence[int], take: Callable[[int, Ints], None]):
        self._entry, self._layers, self._take = architecture, frozenset(layers), take
        self._seen = _Seen()
        self._hook: Any = None

    def watch(self, layer: int, module: Any) -> None:
        if layer not in self._layers:
            return

        def keep(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._seen.ids = args[1] if len(args) > 1 else kwargs["top_k_index"]

        experts = module.get_submodule(self._entry.block).get_submodule(self._entry.experts_module)
        self._hook = experts.register_forward_pre_hook(keep, with_kwargs=True)

    def release(self, layer: int, module: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def expect(self, valid: Any) -> None:
        """Evaluation gives no masks."""

    def seen(self, layer: int) -> dict[str, Any]:
        if layer not in self._layers:
            return {}
        ids, self._seen.ids = self._seen.ids, None
        return {"ids": ids.cpu().long().numpy()}

    def add(self, layer: int, domain: str, seen: Mapping[str, Any]) -> None:
        if layer in self._layers:
            self._take(layer, seen["ids"])


class Agreement:
    """The reference's choices over some groups of rows, kept until the model's come.

    Args:
        folder: where they are kept in files; None keeps them in memory.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerMap],
        facts: Sequence[LayerFacts],
        groups: Sequence[Group],
        items: Sequence[Item],
        folder: Path | None,
    ):
        self.layers = layers
        self._sums = dict.fromkeys(layers, LayerRouting(0, 0, 0, 0))
        # which positions are no padding
        self._real = []
        self._held: list[dict[int, HiddenStates]] = []
        for number, each in enumerate(groups):
            rows, width = each.rows.ids.shape
            lengths = np.array([len(items[i].ids) for i in each.members])
            self._real.append(np.arange(width)[None, :] < lengths[:, None])
            held = {}
            for fact in facts:
                file = None if folder is None else folder / f"choices-{number}-{fact.layer}.bin"
                held[fact.layer] = HiddenStates((rows, width, fact.top_k), ids_dtype(fact.experts), file)
            self._held.append(held)

    @staticmethod
    def bytes(facts: Sequence[LayerFacts], groups: Sequence[Group]) -> int:
        """What keeping the choices takes."""
        each = sum(fact.top_k * ids_dtype(fact.experts).itemsize for fact in facts)
        return each * sum(group.rows.ids.numel() for group in groups)

    def of_reference(self, stream: Stream, number: int) -> Watch:
        """Keeps what the reference chooses for group ``number``."""
        import torch

        at = dict.fromkeys(self.layers, 0)

        def take(layer: int, ids: Ints) -> None:
            held = self._held[number][layer]
            rows = ids.reshape(-1, *held.shape[1:])
            held.write(at[layer], at[layer] + len(rows), torch.from_numpy(rows).to(held.dtype))
            at[layer] += len(rows)

        return Watch(stream.skeleton.architecture, list(self.layers), take)

    def of_model(self, stream: Stream, number: int) -> Watch:
        """Compares what the model chooses for group ``number``; gives a layer's choices back once all rows are done."""
        at = dict.fromkeys(self.layers, 0)

        def take(layer: int, ids: Ints) -> None:
            held, real = self._held[number][layer], self._real[number]
            count, width, top_k = len(ids) // held.shape[1], held.shape[1], held.shape[2]
            start, stop = at[layer], at[layer] + count
            theirs = held.read(start, stop).numpy().astype(np.int64)
            keep = real[start:stop].reshape(-1)
            self._sums[layer] += compare(
                theirs.reshape(count * width, top_k)[keep], ids[keep], self.layers[layer]
            )
            at[layer] = stop
            if stop == held.shape[0]:
                held.close()

        return Watch(stream.skeleton.architecture, list(self.layers), take)

    def result(self) -> Routing:
        return Routing(dict(self._sums))

    def close(self) -> None:
        for held in self._held:
            for each in held.values():
                each.close()

"""Watches one MoE layer while it runs and adds what it did to the sums."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.block import Block
from moezip.calibrate.experts import Routed
from moezip.calibrate.record import Observation, Record
from moezip.calibrate.statistics import Array, Domain

if TYPE_CHECKING:
    import torch

# Tokens whose residual stream is turned into float32 at a time: bounds the temporaries of ``turning``.
CHUNK = 1024


class _Inside(threading.local):
    """What the hooks saw of the micro-batch that runs in this thread."""

    logits: Any = None
    stream: Any = None
    given: Any = None


class Capture:
    """Sums per domain, layer and record name.

    Args:
        facts: the MoE layers.
        records: what to sum.
        scale: factor on the routed output as it joins the residual stream.
    """

    def __init__(
        self, architecture: Architecture, facts: Sequence[LayerFacts], records: Sequence[Record], scale: float
    ):
        self.architecture, self.records, self.scale = architecture, records, scale
        self.facts = {fact.layer: fact for fact in facts}
        self.sums: dict[str, dict[int, dict[str, Array]]] = {}
        self._routed = Routed()
        self._inside = _Inside()
        self._hooks: list[Any] = []
        self._asked = any(record.asks for record in records)
        self._block: Any = None

    def watch(self, layer: int, module: Any) -> None:
        """Hangs itself on a loaded decoder layer, if that has experts."""
        if layer not in self.facts:
            return
        entry = self.architecture
        block = module.get_submodule(entry.block)
        block.get_submodule(entry.experts_module)._moezip_routed = self._routed
        self._block = block

        def keep_logits(_module: Any, args: Any, output: Any) -> None:
            self._inside.logits = output[0] if isinstance(output, tuple) else output
            self._inside.given = args if self._asked else None

        def keep_stream(_module: Any, args: Any) -> None:
            self._inside.stream = args[0]

        self._hooks = [
            block.get_submodule(entry.router_module).register_forward_hook(keep_logits),
            module.get_submodule(entry.norm).register_forward_pre_hook(keep_stream),
        ]

    def release(self, layer: int, module: Any) -> None:
        """Takes its hooks off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._block = [], None
        if layer in self.facts:
            entry = self.architecture
            module.get_submodule(entry.block).get_submodule(entry.experts_module)._moezip_routed = None

    def expect(self, valid: torch.Tensor | None) -> None:
        """Announces the next micro-batch: ``valid`` [n, S] is False on padding, None where there is none."""
        self._routed.valid = None if valid is None else valid.reshape(-1)

    def seen(self, layer: int) -> dict[str, Array]:
        """What the layer just did with the announced micro-batch, by record; empty for a layer without experts."""
        if layer not in self.facts:
            return {}
        seen = self._observation(self.facts[layer])
        found = {record.name: record.update(seen).cpu().numpy() for record in self.records}
        self._routed.ids = self._routed.output = None
        self._inside.logits = self._inside.stream = self._inside.given = None
        return found

    def add(self, layer: int, domain: str, seen: Mapping[str, Array]) -> None:
        """Adds one micro-batch to the sums of ``domain``. The order of the calls is the order of the sums."""
        if layer not in self.facts:
            return
        sums = self.sums.setdefault(domain, {}).setdefault(layer, {})
        for record in self.records:
            if record.name not in sums:
                sums[record.name] = np.zeros(record.shape(self.facts[layer]))
            if record.combine == "max":
                np.maximum(sums[record.name], seen[record.name], out=sums[record.name])
            else:
                sums[record.name] += seen[record.name]

    def _observation(self, facts: LayerFacts) -> Observation:
        routed, entry = self._routed, self.architecture
        ids, gates, norms = routed.ids, routed.gates.float(), routed.norms
        logits = self._inside.logits.reshape(ids.shape[0], -1).float()
        stream = self._inside.stream.reshape(ids.shape[0], -1)
        change = turning(stream, routed.output, self.scale)
        block = self._again(facts) if self._asked else None
        peaks = routed.peaks
        if routed.valid is not None:
            keep = routed.valid
            ids, gates, norms, logits, change = ids[keep], gates[keep], norms[keep], logits[keep], change[keep]
        return Observation(facts.experts, ids, gates, norms, change, peaks, logits, block, entry.scoring)

    def _again(self, facts: LayerFacts) -> Block:
        """The layer, to run parts of it again on the real tokens of this micro-batch."""
        entry, windows = self.architecture, self._inside.stream.shape[0]
        return Block.of(
            entry,
            facts,
            self._block.get_submodule(entry.experts_module),
            self._block.get_submodule(entry.router_module),
            self._inside.given,
            windows,
            self._routed.valid,
        )

    def domain(self, name: str, data: str, tokens: int) -> Domain:
        """The finished record of one domain."""
        return Domain(name, (data,), tokens, self.sums.get(name, {}))


def turning(stream: torch.Tensor, output: torch.Tensor, scale: float) -> torch.Tensor:
    """max(0, 1 - cos(h, h + scale * r)) per token, [T] float64 (arXiv 2504.06792, token weight; clamp from its code).

    Args:
        stream: h, [T, D]: the residual stream just before the MoE block's output is added.
        output: r, [T, D]: the routed experts' weighted sum, shared experts excluded.
    """
    import torch

    parts = []
    for start in range(0, stream.shape[0], CHUNK):
        h = stream[start : start + CHUNK].float()
        r = output[start : start + CHUNK].float() * scale
        hh, hr, rr = ((a * b).sum(-1).double() for a, b in ((h, h), (h, r), (r, r)))
        # cos from three dot products; a zero stream or a zero sum has no direction and counts as unturned
        length = (hh * (hh + 2 * hr + rr).clamp_min(0)).sqrt()
        parts.append(torch.where(length > 0, 1 - (hh + hr) / length, torch.zeros_like(length)).clamp_min(0))
    return torch.cat(parts)

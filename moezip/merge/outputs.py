"""Records of what all experts make of sampled tokens, routed there or not.

Every n-th token of each window is sampled, counted from the window's start, so that the sums do not depend on how many
windows run at a time. ``every=0`` stands for n = experts / top-k, rounded up: E experts on T k / E tokens are T k
products, as many as the layer's own forward makes, so such a record costs about one more forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import Observation, Record
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.registry import record_name

if TYPE_CHECKING:
    import torch

# What the outputs of all experts may take at a time, in the model's dtype, and how many tokens that may be. Their
# float64 copies take four times as much: less than a micro-batch's own temporaries.
OUTPUT_BYTES = 16 * 2**20
MAX_TOKENS = 256


def require_every(every: int) -> None:
    """Raises UsageError for a sampling that is none."""
    if every < 0:
        raise UsageError(
            "every is the distance of sampled tokens, 1 or more; 0 is experts / top-k", where=f"--set every={every}"
        )


def stride(every: int, experts: int, top_k: int) -> int:
    """How far apart sampled tokens lie."""
    return every or -(-experts // top_k)


def sampled(seen: Observation, every: int) -> Iterator[torch.Tensor]:
    """All experts' outputs for the sampled tokens of a micro-batch, [n, E, D] in the model's dtype, in pieces."""
    import torch

    block = seen.block
    assert block is not None
    step = stride(every, *_sizes(seen))
    place = torch.arange(len(block.windows), device=block.windows.device)
    place -= torch.searchsorted(block.windows, block.windows)  # less the first place of its window
    block = replace(block, inputs=block.inputs[place % step == step - 1])
    tokens, hidden = block.inputs.shape
    piece = min(max(OUTPUT_BYTES // (seen.experts * hidden * block.inputs.element_size()), 1), MAX_TOKENS)
    for start in range(0, tokens, piece):
        yield block.outputs(slice(start, start + piece))


def _sizes(seen: Observation) -> tuple[int, int]:
    return seen.experts, seen.ids.shape[1]


def sums_name(every: int) -> str:
    """The name of the record that ``output_sums`` makes."""
    return record_name("hc-smoe", {"every": every})


def output_sums(every: int) -> Record:
    """Sum of every expert's outputs, [E, D]."""

    def update(seen: Observation) -> torch.Tensor:
        import torch

        total = torch.zeros(seen.experts, _hidden(seen), dtype=torch.float64, device=seen.ids.device)
        for outputs in sampled(seen, every):
            total += outputs.sum(0, dtype=torch.float64)
        return total

    def seconds(facts: LayerFacts, rate: float) -> float:
        return _forward_work(facts) / stride(every, facts.experts, facts.top_k) / rate

    return Record(
        sums_name(every), "sum of all experts' outputs on sampled tokens", "sum",
        lambda facts: (facts.experts, facts.hidden), update, asks=True, seconds=seconds,
    )  # fmt: skip


def gram_name(every: int, cosine: bool) -> str:
    """The name of the record that ``output_gram`` makes."""
    return record_name("sub-moe", {"every": every, "cosine": cosine})


def output_gram(every: int, cosine: bool) -> Record:
    """Gram matrix of all experts' outputs, sum over tokens of f_i . f_j, [E, E]; with ``cosine`` of the outputs scaled
    to length 1, that is the sum over tokens of their cosines."""

    def update(seen: Observation) -> torch.Tensor:
        import torch

        total = torch.zeros(seen.experts, seen.experts, dtype=torch.float64, device=seen.ids.device)
        for outputs in sampled(seen, every):
            exact = outputs.double()
            if cosine:
                exact /= exact.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            rows = exact.transpose(0, 1).flatten(1)
            total += rows @ rows.T
        return total

    def seconds(facts: LayerFacts, rate: float) -> float:
        products = 2 * facts.experts**2 * facts.hidden
        return (_forward_work(facts) + products) / stride(every, facts.experts, facts.top_k) / rate

    return Record(
        gram_name(every, cosine), "Gram matrix of all experts' outputs on sampled tokens", "sum",
        lambda facts: (facts.experts, facts.experts), update, asks=True, seconds=seconds,
    )  # fmt: skip


def _hidden(seen: Observation) -> int:
    assert seen.block is not None
    return int(seen.block.inputs.shape[1])


def _forward_work(facts: LayerFacts) -> float:
    """Operations of all experts on one token."""
    return 2 * facts.experts * 3 * facts.hidden * facts.width


def require_sampled(facts: LayerFacts, stats: Mapping[str, Array], name: str) -> None:
    """Raises PlanError where a record of outputs saw no token."""
    if not stats[name].any():
        raise PlanError(
            f"no expert put anything out on the sampled tokens of layer {facts.layer}",
            next="windows may be shorter than the sampling distance: sample more with --set every=1",
        )

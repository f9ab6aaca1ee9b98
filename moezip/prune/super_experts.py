"""Super experts (arXiv 2507.23279): a handful of experts with giant outputs, without which the model breaks.

An expert is one if its largest |output| component exceeds the 99.5th percentile over all experts of all layers and a
tenth of the global maximum, and its layer lies in the first three quarters of the decoder. The authors compare with
``max // 10`` (an integer division); a plain tenth is used here, which differs only below 10. |output| is taken, as
their code does; a signed maximum, as elsewhere, misses half of them.

This is a profile, not a way to prune. `moezip calibrate` reports the super experts that its text shows, with their
peaks and both thresholds (`super_experts` in its JSON), and every pruning method keeps them whatever its own score
says, unless `--set guard=false`. Both read the record `output_max`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array, Statistics
from moezip.prune.params import PruneParams
from moezip.registry import Method

PERCENTILE = 99.5
SHARE_OF_MAXIMUM = 0.1
SHARE_OF_DEPTH = 0.75


@dataclass(frozen=True, slots=True)
class SuperExpert:
    """One that was found; ``peak`` is its largest |output| component."""

    layer: int
    expert: int
    peak: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Super experts and what they had to exceed.

    Attributes:
        percentile: the 99.5th percentile of all peaks.
        share_of_maximum: a tenth of the largest peak.
        found: by layer, then expert.
    """

    percentile: float
    share_of_maximum: float
    found: tuple[SuperExpert, ...]


def profile(output_max: Mapping[int, Array], decoder_layers: int) -> Profile:
    """The super experts with their peaks, and both thresholds.

    Args:
        output_max: per MoE layer, the largest |output| component of each expert, [E].
        decoder_layers: depth of the whole decoder, dense layers included.
    """
    peaks = np.concatenate(list(output_max.values()))
    percentile, share = float(np.percentile(peaks, PERCENTILE)), SHARE_OF_MAXIMUM * float(peaks.max())
    found = tuple(
        SuperExpert(layer, int(i), float(values[i]))
        for layer, values in sorted(output_max.items())
        if layer < SHARE_OF_DEPTH * decoder_layers
        for i in np.flatnonzero(values > max(percentile, share))
    )
    return Profile(percentile, share, found)


def super_experts(output_max: Mapping[int, Array], decoder_layers: int) -> dict[int, list[int]]:
    """The super experts of each layer, ascending; layers without one are left out. Arguments as of ``profile``."""
    layers: dict[int, list[int]] = {}
    for each in profile(output_max, decoder_layers).found:
        layers.setdefault(each.layer, []).append(each.expert)
    return layers


def recorded_peaks(stats: Statistics) -> dict[int, Array] | None:
    """``output_max`` per layer, the largest of all domains; None where it was not recorded."""
    layers = stats.domains[0].layers
    if not all("output_max" in domain.layers[layer] for domain in stats.domains for layer in layers):
        return None
    return {layer: np.max([domain.layers[layer]["output_max"] for domain in stats.domains], axis=0) for layer in layers}


def peaks_of(facts: LayerFacts, stats: Mapping[str, Array], params: PruneParams) -> Array:
    """The largest |output| component of every expert of one layer, float64 [E]."""
    return stats["output_max"]


SUPER_EXPERTS = Method(
    name="super-experts",
    family="profile",
    summary="a profile alone: experts with giant outputs, reported by calibrate and kept by every pruning method",
    paper="Super Experts, arXiv 2507.23279",
    needs=("output_max",),
    run=peaks_of,
)

"""Super experts (arXiv 2507.23279): a handful of experts with giant outputs, without which the model breaks.

An expert is one if its largest |output| component exceeds the 99.5th percentile over all experts of all layers and a
tenth of the global maximum, and its layer lies in the first three quarters of the decoder. The authors compare with
``max // 10`` (an integer division); a plain tenth is used here, which differs only below 10. |output| is taken, as
their code does; a signed maximum, as elsewhere, misses half of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moezip.calibrate.statistics import Array

PERCENTILE = 99.5
SHARE_OF_MAXIMUM = 0.1
SHARE_OF_DEPTH = 0.75


def super_experts(output_max: Mapping[int, Array], decoder_layers: int) -> dict[int, list[int]]:
    """The super experts of each layer, ascending; layers without one are left out.

    Args:
        output_max: per MoE layer, the largest |output| component of each expert, [E].
        decoder_layers: depth of the whole decoder, dense layers included.
    """
    peaks = np.concatenate(list(output_max.values()))
    bar = max(float(np.percentile(peaks, PERCENTILE)), SHARE_OF_MAXIMUM * float(peaks.max()))
    found = {
        layer: [int(i) for i in np.flatnonzero(values > bar)]
        for layer, values in output_max.items()
        if layer < SHARE_OF_DEPTH * decoder_layers
    }
    return {layer: experts for layer, experts in found.items() if experts}

"""Statistics: running sums, never means, so that they add up over chunks, files, ranks and resumed runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Domain:
    """What one ``--data`` path contributed.

    Attributes:
        name: the path's stem, unique inside a Statistics.
        data: fingerprint of the token ids.
        tokens: how many counted (padding excluded).
        layers: per MoE layer, the named sums as float64 arrays (``counts`` [E], ``router_gram`` [E, E], ...).
    """

    name: str
    data: str
    tokens: int
    layers: Mapping[int, Mapping[str, Array]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a calibration pass saw.

    Attributes:
        source: fingerprint of the checkpoint that was run; statistics of another model are refused.
        domains: one per ``--data`` path; never summed away.
        settings: seq_len, seed and other choices of the pass, for the reader.
    """

    source: str
    domains: tuple[Domain, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

"""Means over routed tokens."""

from __future__ import annotations

import numpy as np

from moezip.calibrate.statistics import Array


def per_token(sums: Array, counts: Array) -> Array:
    """``sums / counts``, and 0 where an expert served no token, so that it is pruned first."""
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)

"""The functions of ``unpacked``, slowly and in float64: what the C++ code is checked against.

Arrays are float64 and hold numbers that fit the dtype in question; ``halves`` says that it is bf16, to which is rounded
where the models round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def to_halves(x: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of the nearest bf16, ties to even. NaN is not looked after."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_halves(x: NDArray[np.uint16]) -> Doubles:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(x: Doubles, halves: bool = True) -> Doubles:
    """By way of float32, as the models do."""
    return from_halves(to_halves(x)) if halves else x


def linear(weight: Doubles, x: Doubles, bias: Doubles | None) -> Doubles:
    """[T, R] of ``weight`` [R, C] and ``x`` [T, C]."""
    out = np.zeros((len(x), len(weight)))
    for token, row in np.ndindex(out.shape):
        out[token, row] = sum(x[token] * weight[row]) + (0.0 if bias is None else bias[row])
    return out


def rms_norm(x: Doubles, weight: Doubles, epsilon: float, halves: bool, once: bool = False) -> Doubles:
    """[..., C] of ``x`` [..., C] and ``weight`` [C]."""
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return rounded(weight * rounded(normed, halves and not once), halves)


def route(weight: Doubles, x: Doubles, top_k: int, normalise: bool) -> tuple[Doubles, Doubles, NDArray[np.int64]]:
    """Logits [T, E] as bf16 has them, scores and ids [T, k] of ``weight`` [E, C] and ``x`` [T, C]."""
    logits = rounded(linear(weight, x, None))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    scores = np.take_along_axis(shares, ids, 1)
    return logits, scores / scores.sum(1, keepdims=True) if normalise else scores, ids


def turn(x: Doubles, cosine: Doubles, sine: Doubles) -> Doubles:
    """[n, H, d] of ``x`` [n, H, d], cosine and sine [n or 1, r]; all in bf16."""
    out = x.copy()
    half = cosine.shape[1] // 2
    for column in range(2 * half):
        first = column < half
        other = -x[..., column + half] if first else x[..., column - half]
        one, two = rounded(x[..., column] * cosine[:, None, column]), rounded(other * sine[:, None, column])
        out[..., column] = rounded(one + two)
    return out


def attend(query: Doubles, key: Doubles, value: Doubles, mask: Doubles | None, scaling: float) -> Doubles:
    """[n, H, d'] of ``query`` [n, H, d], ``key`` [n, H', S, d], ``value`` [n, H', S, d'] and ``mask`` [n, H, S], which
    is added: -inf where a token may not look."""
    batch, heads, _ = query.shape
    out = np.zeros((batch, heads, value.shape[-1]))
    for n, head in np.ndindex(batch, heads):
        shared = head // (heads // key.shape[1])
        scores = key[n, shared] @ query[n, head] * scaling + (0.0 if mask is None else mask[n, head])
        if scores.max() == -np.inf:
            continue
        weights = np.exp(scores - scores.max())
        out[n, head] = weights @ value[n, shared] / weights.sum()
    return out

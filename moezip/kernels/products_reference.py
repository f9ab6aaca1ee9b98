"""The products of ``products``, slowly and in float64: what the C++ code is checked against.

Matrices come as codes uint8 [R, C], scales float [R, G] and zeros [R, G] (None: 2**(bits - 1)), as on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezip.kernels.products import BLOCK, UNIT

Doubles = NDArray[np.float64]
# Bits of the parts of a code, from the highest, by width.
PLANES = {bits: (8,) if bits == 8 else tuple(part for part in (4, 2, 1) if bits & part) for bits in range(1, 9)}


def relay(codes: NDArray[np.uint8], groups: int, bits: int) -> NDArray[np.uint8]:
    """The layout, uint8 [blocks, units, bits, 64], of codes [R, C]: by the words of ``cpu/kernels.h``, bit by bit."""
    rows, columns = codes.shape
    group = columns // groups
    per = -(-group // UNIT)
    filled = np.zeros((-(-rows // BLOCK) * BLOCK, groups, per * UNIT), np.uint8)
    filled[:rows, :, :group] = codes.reshape(rows, groups, group)
    units = filled.reshape(-1, BLOCK, groups * per, 4, 8)  # block, row, unit, byte, column of the byte
    lines = []
    low = bits
    for part in PLANES[bits]:
        low -= part
        each = 8 // part  # columns whose parts fill a byte
        fields = ((units >> low) & (2**part - 1)).reshape(*units.shape[:4], part, each)
        shifted = fields.astype(np.uint16) << (part * np.arange(each, dtype=np.uint16))
        lines.append(shifted.sum(-1).astype(np.uint8))  # block, row, unit, byte, line
    whole = np.concatenate(lines, axis=-1).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(whole).reshape(len(units), groups * per, bits, 4 * BLOCK)


def weights(codes: NDArray[np.uint8], scales: NDArray[Any], zeros: NDArray[Any] | None, bits: int) -> Doubles:
    """[R, C]."""
    rows, columns = codes.shape
    step = scales.astype(np.float64)[..., None]
    parts = codes.reshape(rows, scales.shape[1], -1).astype(np.float64)
    if bits == 1:
        return (step * (2 * parts - 1)).reshape(rows, columns)
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.astype(np.float64)[..., None]
    return (step * (parts - zero)).reshape(rows, columns)


def whole_numbers(x: Doubles, groups: int) -> Doubles:
    """``x`` [T, C] as int8 activations stand for it: multiples, -127 to 127, of one step for each unit of a group."""
    columns = x.shape[1]
    group = columns // groups
    found = np.empty_like(x)
    for start in range(0, columns, group):
        for first in range(start, start + group, UNIT):
            part = slice(first, min(first + UNIT, start + group))
            step = np.abs(x[:, part]).max(1, keepdims=True) / 127
            found[:, part] = np.rint(x[:, part] / np.where(step > 0, step, 1)) * step
    return found


def gated(name: str, gate: Doubles, up: Doubles, alpha: float = 1.0, limit: float = 0.0) -> Doubles:
    """Gate and up joined, by the name of the gate in ``products.GATES``."""
    if name == "clamped":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
    if name == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if name == "gelu":
        return 0.5 * gate * (1 + np.vectorize(erf)(gate / 2**0.5)) * up
    return 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


Expert = tuple[tuple[Doubles, Doubles], tuple[Doubles, Doubles], tuple[Doubles, Doubles]]


def experts(
    matrices: Sequence[Expert | Doubles | None],
    x: Doubles,
    ids: NDArray[np.int64],
    chosen: Doubles,
    gate: tuple[str, float, float],
) -> Doubles:
    """Sum over a token's experts of their weight ``chosen`` [T, k] x output: [T, D].

    Args:
        matrices: by expert, (weights, bias) of gate, up and down; or what is added whatever the input, [D]; or None.
    """
    total = np.zeros_like(x)
    for token, places in enumerate(ids):
        for place, expert in enumerate(places):
            found = None if expert < 0 else matrices[expert]
            if found is None:
                continue
            if isinstance(found, np.ndarray):
                out = found
            else:
                inner = [weight @ x[token] + bias for weight, bias in found[:2]]
                weight, bias = found[2]
                out = weight @ gated(gate[0], inner[0], inner[1], *gate[1:]) + bias
            total[token] += chosen[token, place] * out
    return total

"""What stands between packed matrices when a model takes a few tokens: plain matrices, RMS norms, attention.

torch's own kernels for these are made for many tokens: they read a matrix in bf16 at a third of the speed of the
memory (``benchmarks/unpacked.py``), which next to packed experts is much of a token. Arrays are numpy's, float32 or,
as uint16, bf16; sums are float32. Without the C++ library whoever runs a model stays with torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezip.kernels import check, products
from moezip.kernels.products import Activations, Laid, native

# A matrix [R, C]: packed, or in bf16 with a bias [R] or None.
Either = Laid | tuple[NDArray[np.uint16], NDArray[np.uint16] | None]

# As cpu/kernels.h numbers them.
F32, BF16 = 0, 1
WIDEST_HEAD = 1024
# Tokens up to which products are faster here than torch's. Measured at [2048, 2048] in bf16 on one and two threads of a
# Zen 5: 8 tokens 1.8 and 2.4 times as fast, 16 tokens half as fast, as rows of 4 KiB then push each other out of the
# cache.
MOST_TOKENS = 8
NO_MASK, LOOKS, ADDED_BF16, ADDED_F32 = range(4)


class Matrices:
    """Up to three matrices of as many columns by their addresses, packed or not, for ``heads`` and ``attend``.

    Args:
        matrices: of each a ``products.Linear``; or the address of the weight [R, C], R, C, and that of the bias or 0.
    """

    def __init__(self, *matrices: products.Linear | tuple[int, int, int, int]):
        self._kept = matrices
        self._table = np.zeros((len(matrices), 5), np.int64)
        for row, matrix in zip(self._table, matrices, strict=True):
            row[:] = (matrix.address, 0, 0, 0, 0) if isinstance(matrix, products.Linear) else (0, *matrix)
        self.address = self._table.ctypes.data


class Block:
    """The rest of a decoder layer by its addresses, for ``finish``: a norm, a router by softmax, and packed experts.

    Args:
        norm: address of the weight [D] of an RMS norm, in bf16. router: of the router [E, D], in bf16.
        normalise, scores: as of ``route``; the dtype of scores, ``BF16`` or ``F32``.
        gate: name, alpha and limit, as of ``products.Experts.run``.
    """

    def __init__(
        self, norm: int, epsilon: float, router: int, top_k: int, normalise: bool, scores: int, table: products.Experts,
        gate: tuple[str, float, float], activations: str,
    ):  # fmt: skip
        self._kept = table
        self._numbers = np.array(
            [
                norm, table.hidden, router, len(table.table), top_k, normalise, scores, table.address,
                products.path_of(True, activations), products.GATES[gate[0]],
            ],
            np.int64,
        )  # fmt: skip
        self._floats = epsilon, gate[1], gate[2]

    def rest(self, x: int) -> tuple[int, int, float, float, float]:
        """As ``moezip.kernels.native`` takes it, of the layer's input at this address."""
        return (x, self._numbers.ctypes.data, *self._floats)


def linear(
    weight: NDArray[Any], x: NDArray[Any], bias: NDArray[Any] | None = None, *, threads: int = 1, library: Any = None
) -> NDArray[Any]:
    """``x`` [T, C] times ``weight`` [R, C], plus ``bias`` [R]: [T, R]; all of one dtype, sums rounded to it once.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    check.matrix("weight", weight, np.float32, np.uint16)
    check.matrix("x", x, weight.dtype.type)
    rows, columns = weight.shape
    if x.shape[1] != columns:
        raise ValueError(f"x is {list(x.shape)} for a matrix of {columns} columns")
    if bias is not None:
        check.vector("bias", bias, weight.dtype.type, rows)
    out = np.empty((len(x), rows), x.dtype)
    (library or native()).dense(
        weight.ctypes.data, _dtype(x), (rows, columns), None if bias is None else bias.ctypes.data,
        x.ctypes.data, len(x), out.ctypes.data, threads,
    )  # fmt: skip
    return out


def rms_norm(
    x: NDArray[Any], weight: NDArray[Any], epsilon: float, *, once: bool = False, threads: int = 1, library: Any = None
) -> NDArray[Any]:
    """weight x / sqrt(mean(x^2) + epsilon) over the rows of ``x`` [T, C]: [T, C] (Zhang and Sennrich, arXiv 1910.07467,
    eq. 4).

    Args:
        once: bf16 is rounded after the weight [C] alone, as gpt-oss has it; else before it too, as Llama and most have.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    check.matrix("x", x, np.float32, np.uint16)
    tokens, columns = x.shape
    check.vector("weight", weight, x.dtype.type, columns)
    out = np.empty_like(x)
    if columns:
        shape = (tokens, columns, columns)
        (library or native()).norm(
            x.ctypes.data, _dtype(x), shape, weight.ctypes.data, epsilon, once, out.ctypes.data, threads
        )  # fmt: skip
    return out


def turn(
    x: NDArray[np.uint16],
    cosine: NDArray[np.uint16],
    sine: NDArray[np.uint16],
    weight: NDArray[np.uint16] | None = None,
    epsilon: float = 0.0,
    *,
    threads: int = 1,
    library: Any = None,
) -> NDArray[np.uint16]:
    """Heads turned by their positions (rotary embedding, Su et al., arXiv 2104.09864), halves of a head as pairs.

    x cosine + (-x's second half, x's first half) sine, each product and the sum rounded to bf16, as Llama has it.

    Args:
        x: [n, H, d]. cosine, sine: [n or 1, r], r even and at most d; columns from r on stay as they are.
        weight: [d], of an RMS norm of each head before that.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    if not isinstance(x, np.ndarray) or x.dtype != np.uint16 or x.ndim != 3 or not x.flags.c_contiguous:
        raise ValueError("x is no contiguous uint16 array of three axes")
    batch, _, width = x.shape
    positions = _positions(cosine, sine, batch, width)
    if weight is not None:
        check.vector("weight", weight, np.uint16, width)
    out = np.empty_like(x)
    (library or native()).turn(
        x.ctypes.data, x.shape, None if weight is None else weight.ctypes.data, epsilon, positions,
        out.ctypes.data, threads,
    )  # fmt: skip
    return out


def route(
    weight: NDArray[np.uint16],
    x: NDArray[np.uint16],
    top_k: int,
    *,
    normalise: bool,
    halves: bool = True,
    threads: int = 1,
    library: Any = None,
) -> tuple[NDArray[np.uint16], NDArray[Any], NDArray[np.int64]]:
    """Experts of tokens ``x`` [T, C] by a router [E, C]: logits [T, E] in bf16, scores and ids [T, k], the best first.

    Scores are the softmax of all logits. Of experts that are equal the first is chosen.

    Args:
        normalise: scores of a token are made to add up to 1.
        halves: scores are bf16, else float32.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    check.matrix("weight", weight, np.uint16)
    check.matrix("x", x, np.uint16)
    experts, columns = weight.shape
    if x.shape[1] != columns or not 1 <= top_k <= experts:
        raise ValueError(f"x is {list(x.shape)} for a router {list(weight.shape)} that chooses {top_k}")
    logits = np.empty((len(x), experts), np.uint16)
    scores = np.empty((len(x), top_k), np.uint16 if halves else np.float32)
    ids = np.empty((len(x), top_k), np.int64)
    (library or native()).route(
        weight.ctypes.data, x.ctypes.data, (experts, columns, len(x), top_k), normalise, BF16 if halves else F32,
        logits.ctypes.data, scores.ctypes.data, ids.ctypes.data, threads,
    )  # fmt: skip
    return logits, scores, ids


def heads(
    matrices: Sequence[Either],
    x: NDArray[np.uint16],
    width: int,
    cosine: NDArray[np.uint16],
    sine: NDArray[np.uint16],
    norms: Sequence[tuple[NDArray[np.uint16], float] | None] = (None, None),
    *,
    activations: Activations = "exact",
    threads: int = 1,
    library: Any = None,
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16]]:
    """Queries, keys and values [n, H, d] of tokens ``x`` [n, C], in bf16; the first two turned (``turn``).

    Args:
        matrices: of queries, keys and values.
        width: d.
        norms: of the heads of queries and of keys, weight [d] and epsilon; or, both alike, weight [R]: of all heads of
            a token as one.
        activations: of packed matrices.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    check.matrix("x", x, np.uint16)
    rows = [_rows(each, x.shape[1]) for each in matrices]
    if len(rows) != 3 or len(norms) != 2 or width < 1 or any(each % width for each in rows):
        raise ValueError(f"matrices of {rows} rows do not make queries, keys and values of {width} numbers")
    positions = _positions(cosine, sine, len(x), width)
    whole = any(norm is not None and norm[0].shape != (width,) for norm in norms)
    for norm, count in zip(norms, rows, strict=False):
        if norm is not None:
            check.vector("weight", norm[0], np.uint16, count if whole else width)
    out = tuple(np.empty((len(x), each // width, width), np.uint16) for each in rows)
    given = [(None, 0.0) if norm is None else (norm[0].ctypes.data, norm[1]) for norm in norms]
    kept = _at(matrices, library)
    if len(x):
        (library or native()).heads(
            kept.address, products.path_of(True, activations), x.ctypes.data, (None, 0.0), len(x), width,
            (*given[0], *given[1], whole), positions, tuple(each.ctypes.data for each in out), threads,
        )  # fmt: skip
    return out  # type: ignore[return-value]


def attend(
    query: NDArray[np.uint16],
    key: NDArray[np.uint16],
    value: NDArray[np.uint16],
    mask: NDArray[Any] | None,
    scaling: float,
    matrix: Either | None = None,
    *,
    activations: Activations = "exact",
    threads: int = 1,
    library: Any = None,
) -> NDArray[np.uint16]:
    """softmax(scaling x ``query`` ``key``^T + ``mask``) ``value``, of one query for each head: [n, H, d'], in bf16.

    Args:
        query: [n, H, d]. key: [n, H', S, d]. value: [n, H', S, d']; H' is a divisor of H.
        mask: [n or 1, H or 1, S]: bool, False where a token may not look, or float32 or bf16 to be added; None: all
            are looked at. Who may look at nothing gets zeros.
        matrix: [R, H d'], by which that is multiplied: then what is returned is [n, R].

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    batch, heads, width = _attended(query, key, value)
    shared, length, out_width = value.shape[1:]
    shape: tuple[int, ...] = (batch, heads, out_width)
    if matrix is not None:
        shape = (batch, _rows(matrix, heads * out_width))
        kept = _at([matrix], library)
    out = np.empty(shape, np.uint16)
    (library or native()).attend(
        (query.ctypes.data, key.ctypes.data, value.ctypes.data), (batch, heads, shared, length, width, out_width),
        _strides(query, key, value), _mask(mask, batch, heads, length), scaling,
        (None if matrix is None else kept.address, products.path_of(True, activations)), out.ctypes.data, threads,
    )  # fmt: skip
    return out


def finish(
    query: NDArray[np.uint16],
    key: NDArray[np.uint16],
    value: NDArray[np.uint16],
    scaling: float,
    matrix: Either,
    x: NDArray[np.uint16],
    norm: tuple[NDArray[np.uint16], float],
    router: NDArray[np.uint16],
    top_k: int,
    table: products.Experts,
    *,
    normalise: bool = True,
    halves: bool = True,
    gate: str = "silu",
    activations: Activations = "exact",
    threads: int = 1,
    library: Any = None,
) -> NDArray[np.uint16]:
    """A decoder layer from its attention on: with h = ``x`` + ``attend``, h + experts(norm h), [n, D] in bf16.

    Args:
        x: [n, D], what the layer was given. norm: weight [D] and epsilon. The others as of ``attend``, ``route`` and
            ``products.Experts.run``.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    check.matrix("x", x, np.uint16)
    check.vector("weight", norm[0], np.uint16, x.shape[1])
    check.matrix("router", router, np.uint16)
    batch, count, width = _attended(query, key, value)
    if router.shape != (len(table.table), table.hidden) or not 1 <= top_k <= len(router):
        raise ValueError(f"router {list(router.shape)}, which chooses {top_k}, does not belong to {len(table.table)}")
    if x.shape != (batch, table.hidden) or _rows(matrix, count * value.shape[3]) != table.hidden:
        raise ValueError(f"x is {list(x.shape)} for experts of {table.hidden} columns")
    if gate not in products.GATES:
        raise ValueError(f"gate is {', '.join(products.GATES)}, not {gate!r}")
    block = Block(
        norm[0].ctypes.data, norm[1], router.ctypes.data, top_k, normalise, BF16 if halves else F32, table,
        (gate, 1.0, 0.0), activations,
    )  # fmt: skip
    kept, out = _at([matrix], library), np.empty_like(x)
    (library or native()).attend(
        (query.ctypes.data, key.ctypes.data, value.ctypes.data),
        (batch, count, *value.shape[1:3], width, value.shape[3]), _strides(query, key, value), _mask(None, 0, 0, 0),
        scaling, (kept.address, products.path_of(True, activations)), out.ctypes.data, threads,
        block.rest(x.ctypes.data),
    )  # fmt: skip
    return out


def _positions(cosine: Any, sine: Any, batch: int, width: int) -> tuple[int, int, int, int]:
    """Addresses of cosine and sine [n or 1, r], r, and from sequence to sequence."""
    if width > WIDEST_HEAD:
        raise ValueError(f"heads of {width} numbers; at most {WIDEST_HEAD}")
    for name, each in (("cosine", cosine), ("sine", sine)):
        check.matrix(name, each, np.uint16)
        if each.shape != cosine.shape or len(each) not in (1, batch) or each.shape[1] % 2 or each.shape[1] > width:
            raise ValueError(f"{name} is {list(each.shape)} for {batch} tokens and heads of {width} numbers")
    turned = cosine.shape[1]
    return cosine.ctypes.data, sine.ctypes.data, turned, turned if len(cosine) > 1 else 0


def _attended(query: Any, key: Any, value: Any) -> tuple[int, int, int]:
    """Sequences, heads and width of queries, keys and values that fit."""
    for name, each, axes in (("query", query, 3), ("key", key, 4), ("value", value, 4)):
        if not isinstance(each, np.ndarray) or each.dtype != np.uint16 or each.ndim != axes:
            raise ValueError(f"{name} is no uint16 array of {axes} axes")
        if not each.flags.c_contiguous or not each.size:
            raise ValueError(f"{name} is empty or not contiguous")
    batch, heads, width = query.shape
    shared, length = value.shape[1:3]
    if key.shape != (batch, shared, length, width) or len(value) != batch or heads % shared:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit")
    return batch, heads, width


def _strides(query: Any, key: Any, value: Any) -> list[int]:
    """Of sequences and heads of the first, and tokens of the others, in numbers."""
    parts = (*query.strides[:2], *key.strides[:3], *value.strides[:3])
    return [stride // 2 for stride in parts]


def _rows(matrix: Either, columns: int) -> int:
    """Of a matrix of as many columns."""
    if isinstance(matrix, Laid):
        shape = (matrix.rows, matrix.columns)
    else:
        check.matrix("weight", matrix[0], np.uint16)
        shape = matrix[0].shape
        if matrix[1] is not None:
            check.vector("bias", matrix[1], np.uint16, shape[0])
    if shape[1] != columns:
        raise ValueError(f"a matrix of {shape[1]} columns for {columns} numbers")
    return int(shape[0])


def _at(matrices: Sequence[Either], library: Any) -> Matrices:
    return Matrices(*(
        products.Linear(each, library) if isinstance(each, Laid)
        else (each[0].ctypes.data, *each[0].shape, 0 if each[1] is None else each[1].ctypes.data)
        for each in matrices
    ))  # fmt: skip


def _mask(mask: NDArray[Any] | None, batch: int, heads: int, length: int) -> tuple[int | None, int, int, int]:
    if mask is None:
        return None, NO_MASK, 0, 0
    kinds = {"bool": LOOKS, "uint16": ADDED_BF16, "float32": ADDED_F32}
    if not isinstance(mask, np.ndarray) or str(mask.dtype) not in kinds or not mask.flags.c_contiguous:
        raise ValueError("mask is no contiguous array of bool, float32 or uint16")
    if mask.ndim != 3 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or mask.shape[2] != length:
        raise ValueError(f"mask is {list(mask.shape)} for {batch} sequences, {heads} heads and {length} tokens")
    by_head = length if mask.shape[1] > 1 else 0
    by_sequence = mask.shape[1] * length if mask.shape[0] > 1 else 0
    return mask.ctypes.data, kinds[str(mask.dtype)], by_sequence, by_head


def _dtype(x: NDArray[Any]) -> int:
    return BF16 if x.dtype == np.uint16 else F32

"""Products with packed matrices, for running models: one matrix, or all experts of a layer in one call.

A matrix is laid out once for the C++ library (``lay``; ``cpu/kernels.h`` says how), which takes no more memory than on
disk, and is multiplied as it is from then on. There is no twin in numpy to run models on: without the library they are
decoded matrix by matrix, by torch (``moezip.runtime``). ``products_reference`` is what the tests compare with.

Activations are ``exact``: fp32, or bf16 as they are, with sums in fp32; or ``int8``: rounded to whole numbers of 8 bits
with one step for every 32 of them, and whole sums. Arrays are numpy's, row-major; bf16 is uint16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moezip.kernels import check

if TYPE_CHECKING:
    from numpy.typing import NDArray

Activations = Literal["exact", "int8"]
ScaleKind = Literal["F16", "BF16", "F32", "U8"]

BLOCK, UNIT, LINE = 16, 32, 64
_KINDS: dict[str, tuple[int, type]] = {
    "F16": (0, np.uint16), "BF16": (1, np.uint16), "F32": (2, np.float32), "U8": (3, np.uint8),
}  # fmt: skip
_F32, _BF16 = 0, 1
_FLOATS, _HALVES, _BYTES = 0, 1, 2
# How gate and up become one: names as in the configs of transformers, and gpt-oss's own.
GATES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "clamped": 3}
MOST_LAYOUTS = 8


def available() -> bool:
    """Whether there is a C++ library to run on. Builds it if need be; warns, once, where that fails."""
    from moezip import kernels

    return kernels.status().native


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Laid:
    """A packed matrix [R, C] as the products take it.

    Attributes:
        codes: uint8 [blocks of 16 rows, units of 32 columns, bits, 64].
        scales: [blocks, G, 16], float32, uint8, or uint16 with the bits of F16 or BF16.
        zeros: uint8 [blocks, G, 16]; None: 2**(bits - 1).
        steps: float32 [16 blocks], what uint8 scales count; else None.
        bias: float32 [16 blocks] or None, added to products.
        kind: of the scales.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None
    steps: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None
    rows: int
    columns: int
    groups: int
    bits: int
    kind: ScaleKind

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.zeros, self.steps, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def layout(self) -> tuple[int, int]:
        """Matrices in which this is the same read the same prepared activations, which are summed by group."""
        return (self.columns, self.groups)

    def __deepcopy__(self, memo: Any) -> Laid:
        return self  # nothing of it ever changes

    def described(self, layout: int = 0) -> list[int]:
        """The eleven numbers by which the library knows the matrix; good as long as this object lives."""
        parts = (self.codes, self.scales, self.zeros, self.steps, self.bias)
        addresses = [0 if part is None else part.ctypes.data for part in parts]
        return [*addresses, self.rows, self.columns, self.groups, self.bits, _KINDS[self.kind][0], layout]


def lay(
    packed: NDArray[np.int32],
    scales: NDArray[Any],
    zeros: NDArray[np.uint8] | None,
    columns: int,
    bits: int,
    kind: ScaleKind,
    *,
    steps: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    threads: int = 1,
    into: NDArray[np.uint8] | None = None,
    library: Any = None,
) -> Laid:
    """Lays out packed codes, int32 words [R, ceil(C bits / 32)] of ``kernels.pack``; nothing given is kept.

    Args:
        scales: [R, G] of the dtype of ``kind``; F16 and BF16 as uint16.
        zeros: uint8 [R, G], or None.
        steps: float32 [R], with U8 scales.
        bias: float32 [R].
        into: memory for the codes, ``code_bytes`` of it, from ``memory``.
        library: of another instruction set than the one in use, here and below.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.width(bits)
    check.threads(threads)
    check.words(packed, bits, columns)
    if kind not in _KINDS:
        raise ValueError(f"scales are {', '.join(_KINDS)}, not {kind!r}")
    rows = len(packed)
    check.matrix("scales", scales, _KINDS[kind][1])
    groups = scales.shape[1]
    if scales.shape[0] != rows or not rows or not groups or columns < 1 or columns % groups:
        raise ValueError(f"scales {list(scales.shape)} do not belong to {rows} x {columns} codes")
    if zeros is not None:
        check.matrix("zeros", zeros, np.uint8)
        if zeros.shape != scales.shape or bits == 1:
            raise ValueError(f"zeros {list(zeros.shape)} do not belong to scales {list(scales.shape)} of {bits} bits")
    for name, each in (("steps", steps), ("bias", bias)):
        if each is not None:
            check.vector(name, each, np.float32, rows)
    if (kind == "U8") != (steps is not None):
        raise ValueError("scales of 8 bits have steps, and no others have")
    blocks, units = -(-rows // BLOCK), groups * -(-(columns // groups) // UNIT)
    size = code_bytes(rows, columns, groups, bits)
    if into is None:
        into = memory(size)
    check.vector("into", into, np.uint8, size)
    codes = into.reshape(blocks, units, bits, LINE)
    (library or native()).relay(packed, columns, groups, bits, codes, threads)
    return Laid(
        codes, _in_blocks(scales), None if zeros is None else _in_blocks(zeros), _padded(steps), _padded(bias),
        rows, columns, groups, bits, kind,
    )  # fmt: skip


def codes(laid: Laid, *, threads: int = 1, library: Any = None) -> NDArray[np.uint8]:
    """The codes [R, C], a byte each."""
    check.threads(threads)
    used = library or native()
    found: NDArray[np.uint8] = used.unrelay(laid.codes, laid.rows, laid.columns, laid.groups, laid.bits, threads)
    return found


def per_group(laid: Laid, which: Literal["scales", "zeros"]) -> NDArray[Any] | None:
    """The scales or zeros [R, G], as they were given."""
    found = laid.scales if which == "scales" else laid.zeros
    if found is None:
        return None
    return found.transpose(0, 2, 1).reshape(-1, laid.groups)[: laid.rows].copy()  # memory of its own, come what may


def plain(laid: Laid, *, dtype: str = "float32", threads: int = 1, library: Any = None) -> NDArray[Any]:
    """The weights, transposed: [C, R], float32 or, as uint16, bf16 (nearest, ties to even).

    Raises:
        ValueError: another dtype.
    """
    check.threads(threads)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is float32 or bfloat16, not {dtype!r}")
    halves = dtype == "bfloat16"
    size = laid.columns * laid.rows * (2 if halves else 4)
    out = memory(size).view(np.uint16 if halves else np.float32).reshape(laid.columns, laid.rows)
    matrix = np.array(laid.described(), np.int64)
    (library or native()).plain(matrix, _BF16 if halves else _F32, out, threads)
    return out


def linear(
    laid: Laid, x: NDArray[Any], *, activations: Activations = "exact", threads: int = 1, library: Any = None
) -> NDArray[Any]:
    """``x`` [T, C] times the matrix, plus its bias: [T, R] in the dtype of ``x``, float32 or uint16 for bf16.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check.threads(threads)
    check.matrix("x", x, np.float32, np.uint16)
    if x.shape[1] != laid.columns:
        raise ValueError(f"x is {list(x.shape)} for a matrix of {laid.columns} columns")
    out = np.empty((len(x), laid.rows), x.dtype)
    if len(x):
        matrix = Linear(laid, library)
        matrix.run_at(x.ctypes.data, x.dtype == np.uint16, len(x), out.ctypes.data, activations, threads)
    return out


class Linear:
    """A matrix by its address, for calls that take addresses: whoever makes them has checked what is there."""

    def __init__(self, laid: Laid, library: Any = None):
        self.laid = laid
        self._library = library or native()
        self._described = np.array(laid.described(), np.int64)
        self.address = self._described.ctypes.data  # of the numbers by which the library knows the matrix

    def __reduce__(self) -> Any:
        return Linear, (self.laid,)  # addresses are not copied

    def run_at(self, x: int, bf16: bool, tokens: int, out: int, activations: str, threads: int) -> None:
        """``x`` [tokens, C] and ``out`` [tokens, R]: contiguous, bf16 or float32, at these addresses."""
        self._library.linear(self.address, path_of(bf16, activations), x, _BF16 if bf16 else _F32, tokens, out, threads)


class Experts:
    """All experts of a layer, for ``run``.

    Args:
        experts: gate, up and down of each. An expert that is None stays out: tokens sent to it get nothing from it.
        constants: what an expert without matrices adds for its tokens, [D] (the bias of a down projection of nothing).

    Raises:
        ValueError: matrices that do not fit together, or of more than ``MOST_LAYOUTS`` kinds.
    """

    def __init__(
        self,
        experts: Sequence[tuple[Laid, Laid, Laid] | None],
        hidden: int,
        constants: Sequence[NDArray[np.float32] | None] | None = None,
        library: Any = None,
    ):
        self.hidden = hidden
        self._library = library or native()
        self._given = (list(experts), hidden, constants)  # what the table points into
        self._constants = [None if each is None else _padded(each) for each in constants or [None] * len(experts)]
        layouts: dict[tuple[int, int], int] = {}
        self.table = np.zeros((len(experts), 3, 11), np.int64)
        for number, each in enumerate(experts):
            constant = self._constants[number]
            if each is None:
                if constant is not None:
                    check.vector("a constant", constant, np.float32, -(-hidden // BLOCK) * BLOCK)
                    self.table[number, 2, 4] = constant.ctypes.data
                continue
            gate, up, down = each
            if (gate.rows, gate.columns) != (up.rows, hidden) or up.columns != hidden:
                raise ValueError(
                    f"expert {number}: gate and up are no matrices of {hidden} columns, one like the other"
                )
            if (down.rows, down.columns) != (hidden, gate.rows):
                raise ValueError(f"expert {number}: down is {down.rows} x {down.columns}, not {hidden} x {gate.rows}")
            for role, laid in enumerate(each):
                layout = layouts.setdefault(laid.layout, len(layouts)) if role < 2 else 0
                self.table[number, role] = laid.described(layout)
        self.address = self.table.ctypes.data
        if len(layouts) > MOST_LAYOUTS:
            raise ValueError(f"groups of {len(layouts)} sizes in one layer; at most {MOST_LAYOUTS}")

    def __reduce__(self) -> Any:
        return Experts, self._given  # addresses are not copied

    def run(
        self,
        x: NDArray[Any],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        gate: str,
        *,
        alpha: float = 1.0,
        limit: float = 0.0,
        activations: Activations = "exact",
        threads: int = 1,
    ) -> NDArray[Any]:
        """Sum over a token's experts of weight x down(gate(gate x, up x)), with biases.

        Args:
            x: [T, D]. ids: [T, k], those below 0 are left out. weights: [T, k].
            gate: ``silu``, ``gelu``, ``gelu_tanh``, or ``clamped`` (gpt-oss: with ``alpha`` and ``limit``).

        Returns:
            [T, D] in the dtype of ``x``. The same whatever ``threads``.

        Raises:
            ValueError: arguments that do not fit together, or an id beyond the last expert.
        """
        check.threads(threads)
        check.matrix("x", x, np.float32, np.uint16)
        check.matrix("ids", ids, np.int64)
        check.matrix("weights", weights, np.float32)
        if x.shape[1] != self.hidden or ids.shape != weights.shape or len(ids) != len(x):
            raise ValueError(
                f"x {list(x.shape)}, ids {list(ids.shape)} and weights {list(weights.shape)} do not belong together, "
                f"or not to experts of {self.hidden} columns"
            )
        if ids.size and ids.max() >= len(self.table):
            raise ValueError(f"a token was sent to an expert beyond the last of {len(self.table)}")
        if gate not in GATES:
            raise ValueError(f"gate is {', '.join(GATES)}, not {gate!r}")
        out = np.empty_like(x)
        if len(x):
            self.run_at(
                x.ctypes.data, x.dtype == np.uint16, len(x), ids.ctypes.data, weights.ctypes.data, False, ids.shape[1],
                out.ctypes.data, (gate, alpha, limit), activations, threads,
            )  # fmt: skip
        return out

    def run_at(
        self,
        x: int,
        bf16: bool,
        tokens: int,
        ids: int,
        weights: int,
        halves: bool,
        top_k: int,
        out: int,
        gate: tuple[str, float, float],
        activations: str,
        threads: int,
    ) -> None:
        """As ``run``, of contiguous arrays at these addresses; whoever calls has checked what is there.

        The number of experts as an id is run-time skipping's nobody, and left out too.

        Args:
            halves: whether ``weights`` are bf16, else float32.
            gate: its name, alpha, limit.

        Raises:
            ValueError: an id beyond the last expert.
        """
        self._library.experts(
            self.address, len(self.table), top_k, path_of(bf16, activations), (GATES[gate[0]], gate[1], gate[2]),
            (x, _BF16 if bf16 else _F32, tokens, self.hidden), ids,
            (weights, _BF16 if halves else _F32), out, threads,
        )  # fmt: skip


def code_bytes(rows: int, columns: int, groups: int, bits: int) -> int:
    """Memory of the codes of a matrix as it is laid out."""
    return -(-rows // BLOCK) * groups * -(-(columns // groups) // UNIT) * bits * LINE


def memory(size: int) -> NDArray[np.uint8]:
    """Bytes, not set to anything, that begin with a line of the cache.

    numpy asks for huge pages from 4 MiB on, which save the processor a search for every 4 KiB: a twentieth of the time
    of a product. So matrices that are used together had better lie in one piece.
    """
    whole = np.empty(size + LINE, np.uint8)
    start = -whole.ctypes.data % LINE
    return whole[start : start + size]


def _in_blocks(values: NDArray[Any]) -> NDArray[Any]:
    """[R, G] to [blocks, G, 16], with zeros for the rows that are not there."""
    rows, groups = values.shape
    blocks = -(-rows // BLOCK)
    whole = np.zeros((blocks * BLOCK, groups), values.dtype)
    whole[:rows] = values
    return np.ascontiguousarray(whole.reshape(blocks, BLOCK, groups).transpose(0, 2, 1))


def _padded(values: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    if values is None:
        return None
    whole = np.zeros(-(-len(values) // BLOCK) * BLOCK, np.float32)
    whole[: len(values)] = values
    return whole


def path_of(bf16: bool, activations: str) -> int:
    """What the library calls such activations.

    Raises:
        ValueError: neither ``exact`` nor ``int8``.
    """
    if activations == "int8":
        return _BYTES
    if activations != "exact":
        raise ValueError(f"activations are exact or int8, not {activations!r}")
    return _HALVES if bf16 else _FLOATS


def native() -> Any:
    """The library in use.

    Raises:
        ValueError: there is none.
    """
    from moezip import kernels

    if not kernels.status().native:
        raise ValueError(f"there is no C++ library to run on: {kernels.status().why}")
    return kernels._backend()

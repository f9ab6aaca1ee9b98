"""The C++ library behind ctypes: found or built, loaded, and called with the arrays' addresses.

Its functions have the names and arguments of ``reference``, and like there arrive checked; ctypes lets other Python
threads run during a call. Outputs are made here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moezip.kernels import build
from moezip.kernels.reference import DROPPED

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Arguments of each function, by letter: p address, l int64, i int, f float.
_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_ARGUMENTS = {
    "moezip_gptq": "ii pll pl plpp i p lii pl p ppp",
    "moezip_clip": "ii pll liii pl p pp",
    "moezip_factor": "i pl p f p",
    "moezip_descend": "ii pll pf ll pp iii p p",
    "moezip_round": "ii pll pp li p",
    "moezip_pack": "ii pll i pl",
    "moezip_unpack": "ii pll i l p",
    "moezip_dequantize": "ii pll pp lil pp",
    "moezip_moment": "ii ppp ll p",
    "moezip_relay": "ii plll li p",
    "moezip_unrelay": "ii plll i p",
    "moezip_plain": "ii p ip",
    "moezip_linear": "ii p i pil p",
    "moezip_experts": "ii pll iiff pill ppi p",
    "moezip_dense": "ii pill p pl p",
    "moezip_norm": "ii pilll p fi p",
    "moezip_turn": "ii plll pf pp ll p",
    "moezip_route": "ii pp llll ii ppp",
    "moezip_heads": "ii pi ppf ll pfpfi pp ll ppp",
    "moezip_attend": "ii ppp llll ll ll lll lll pill f pi ppfff p",
}
_FAILURES = {1: "out of memory in a kernel"}
_NO_EXPERT = 4
_NOT_DEFINITE = 3


class StaleError(Exception):
    """A library that was built from other sources than those beside this file."""


def _at(array: NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Native:
    """The kernels of one loaded library, for one instruction set."""

    def __init__(self, file: Path, isa: str | None = None):
        """Loads ``file``; ``isa`` asks for another instruction set than the best one that the machine has.

        Raises:
            OSError: the file is no library for this machine.
            StaleError: it was built from other sources.
            ValueError: the machine lacks ``isa``.
        """
        self.file = file
        self._library = ctypes.CDLL(str(file))
        for name, letters in _ARGUMENTS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise StaleError(f"{file} was built from other sources")
            function.argtypes = [_KINDS[letter] for letter in letters.replace(" ", "")]
            function.restype = ctypes.c_int
        self._library.moezip_source.restype = self._library.moezip_name.restype = ctypes.c_char_p
        if self._library.moezip_source().decode() != build.fingerprint():
            raise StaleError(f"{file} was built from other sources")
        best = self._library.moezip_best()
        self.sets = [self._library.moezip_name(number).decode() for number in range(best + 1)]
        if isa is not None and isa not in self.sets:
            raise ValueError(f"this machine has no {isa}, it has {', '.join(self.sets)}")
        self._set = best if isa is None else self.sets.index(isa)
        self.isa = self.sets[self._set]
        # looked up once: a call may take ten microseconds
        self._linear = self._library.moezip_linear
        self._dense, self._norm, self._turn, self._route, self._heads, self._attend = (
            getattr(self._library, f"moezip_{name}") for name in ("dense", "norm", "turn", "route", "heads", "attend")
        )

    def _call(self, name: str, threads: int, *arguments: float | None) -> None:
        _require(getattr(self._library, name)(self._set, threads, *arguments))

    def gptq_factor(self, hessian: Floats, order: NDArray[np.int32], damping: float) -> Floats | None:
        factor = np.empty_like(hessian)
        failed = self._library.moezip_factor(
            self._set, _at(hessian), len(hessian), _at(order), damping, _at(factor)
        )  # fmt: skip
        if failed == _NOT_DEFINITE:
            return None
        _require(failed)
        return factor

    def descend(
        self,
        weight: Floats,
        hessian: Floats,
        damping: float,
        codes: Bytes,
        step: Floats,
        zero: Floats,
        bits: int,
        scale_dtype: str | None,
        threads: int,
    ) -> tuple[Bytes, Floats, NDArray[np.float64]]:
        codes, step, gain = codes.copy(), step.copy(), np.empty(len(weight), np.float64)
        rows, columns = weight.shape
        count = step.shape[1]
        self._call(
            "moezip_descend", threads, _at(weight), rows, columns, _at(hessian), damping, columns // count, count,
            _at(step), _at(zero), bits, scale_dtype is not None, DROPPED[scale_dtype or "F32"], _at(codes), _at(gain),
        )  # fmt: skip
        return codes, step, gain

    def gptq(
        self,
        weight: Floats,
        factor: Floats,
        groups: NDArray[np.int32],
        scales: Floats,
        zeros: Floats,
        bits: int,
        order: NDArray[np.int32],
        threads: int,
    ) -> tuple[Bytes, Floats, Floats]:
        rows, columns = weight.shape
        codes, errors, loss = _outputs(rows, columns)
        self._call(
            "moezip_gptq", threads, _at(weight), rows, columns, _at(factor), factor.strides[0] // 4, _at(groups),
            scales.shape[1], _at(scales), _at(zeros), bits, _at(order), 0, 0, 0, None, 0, None, _at(codes),
            _at(errors), _at(loss),
        )  # fmt: skip
        return codes, errors, loss

    def gptq_refit(
        self,
        weight: Floats,
        factor: Floats,
        group: int,
        bits: int,
        symmetric: bool,
        candidates: Floats,
        importance: Floats,
        scale_dtype: str,
        order: NDArray[np.int32],
        threads: int,
    ) -> tuple[Bytes, Floats, Floats, Floats, Floats]:
        rows, columns = weight.shape
        codes, errors, loss = _outputs(rows, columns)
        scales = np.empty((rows, columns // group), np.float32)
        zeros = np.empty_like(scales)
        self._call(
            "moezip_gptq", threads, _at(weight), rows, columns, _at(factor), factor.strides[0] // 4, None,
            scales.shape[1], _at(scales), _at(zeros), bits, _at(order), group, symmetric, DROPPED[scale_dtype],
            _at(candidates), len(candidates), _at(importance), _at(codes), _at(errors), _at(loss),
        )  # fmt: skip
        return codes, errors, loss, scales, zeros

    def clip_search(
        self,
        weight: Floats,
        group: int,
        bits: int,
        symmetric: bool,
        candidates: Floats,
        importance: Floats,
        scale_dtype: str,
        threads: int,
    ) -> tuple[Floats, Floats]:
        rows, columns = weight.shape
        scales = np.empty((rows, columns // group), np.float32)
        zeros = np.empty_like(scales)
        self._call(
            "moezip_clip", threads, _at(weight), rows, columns, group, bits, symmetric, DROPPED[scale_dtype],
            _at(candidates), len(candidates), _at(importance), _at(scales), _at(zeros),
        )  # fmt: skip
        return scales, zeros

    def round_codes(self, weight: Floats, scales: Floats, zeros: Floats, group: int, bits: int, threads: int) -> Bytes:
        codes = np.empty(weight.shape, np.uint8)
        self._call(
            "moezip_round", threads, _at(weight), *weight.shape, _at(scales), _at(zeros), group, bits, _at(codes)
        )
        return codes

    def pack(self, codes: Bytes, bits: int, threads: int) -> NDArray[np.int32]:
        rows, columns = codes.shape
        packed = np.empty((rows, -(-columns * bits // 32)), np.int32)
        self._call("moezip_pack", threads, _at(codes), rows, columns, bits, _at(packed), packed.shape[1])
        return packed

    def unpack(self, packed: NDArray[np.int32], bits: int, columns: int, threads: int) -> Bytes:
        codes = np.empty((len(packed), columns), np.uint8)
        self._call("moezip_unpack", threads, _at(packed), *packed.shape, bits, columns, _at(codes))
        return codes

    def dequantize(
        self,
        packed: NDArray[np.int32],
        scales: Floats,
        zeros: Floats,
        group: int,
        bits: int,
        columns: int,
        bf16: bool,
        threads: int,
    ) -> Floats | NDArray[np.uint16]:
        values: NDArray = np.empty((len(packed), columns), np.uint16 if bf16 else np.float32)
        self._call(
            "moezip_dequantize", threads, _at(packed), *packed.shape, _at(scales), _at(zeros), group, bits, columns,
            None if bf16 else _at(values), _at(values) if bf16 else None,
        )  # fmt: skip
        return values

    def second_moment(self, x: NDArray, out: Floats, weights: Floats | None, threads: int) -> None:
        halves = x.dtype == np.uint16
        self._call(
            "moezip_moment", threads, None if halves else _at(x), _at(x) if halves else None, _at(weights),
            *x.shape, _at(out),
        )  # fmt: skip

    def relay(
        self, packed: NDArray[np.int32], columns: int, groups: int, bits: int, codes: Bytes, threads: int
    ) -> None:
        """Fills ``codes``, as ``products.Laid`` holds them."""
        self._call("moezip_relay", threads, _at(packed), *packed.shape, columns, groups, bits, _at(codes))

    def unrelay(self, codes: Bytes, rows: int, columns: int, groups: int, bits: int, threads: int) -> Bytes:
        found = np.empty((rows, columns), np.uint8)
        self._call("moezip_unrelay", threads, _at(codes), rows, columns, groups, bits, _at(found))
        return found

    def plain(self, matrix: NDArray[np.int64], dtype: int, out: NDArray, threads: int) -> None:
        self._call("moezip_plain", threads, _at(matrix), dtype, _at(out))

    def linear(self, matrix: int, path: int, x: int, dtype: int, tokens: int, out: int, threads: int) -> None:
        """``matrix``, ``x``, ``out``: addresses."""
        failed = self._linear(self._set, threads, matrix, path, x, dtype, tokens, out)
        if failed:
            _require(failed)

    def experts(
        self,
        table: int,
        count: int,
        top_k: int,
        path: int,
        gate: tuple[int, float, float],
        x: tuple[int, int, int, int],
        ids: int,
        weights: tuple[int, int],
        out: int,
        threads: int,
    ) -> None:
        """Addresses; ``x``: address, dtype, tokens, hidden size; ``weights``: address, dtype."""
        failed = self._library.moezip_experts(
            self._set, threads, table, count, top_k, path, *gate, *x, ids, *weights, out
        )  # fmt: skip
        if failed == _NO_EXPERT:
            raise ValueError(f"a token was sent to an expert beyond the last of {count}")
        _require(failed)

    def dense(
        self, weight: int, dtype: int, shape: tuple[int, int], bias: int | None, x: int, tokens: int, out: int,
        threads: int,
    ) -> None:  # fmt: skip
        """Addresses; ``shape``: rows, columns."""
        failed = self._dense(self._set, threads, weight, dtype, *shape, bias, x, tokens, out)
        if failed:
            _require(failed)

    def norm(
        self, x: int, dtype: int, shape: tuple[int, int, int], weight: int, epsilon: float, once: bool, out: int,
        threads: int,
    ) -> None:  # fmt: skip
        """Addresses; ``shape``: tokens, columns, numbers from token to token."""
        failed = self._norm(self._set, threads, x, dtype, *shape, weight, epsilon, once, out)
        if failed:
            _require(failed)

    def turn(
        self, x: int, shape: tuple[int, int, int], weight: int | None, epsilon: float,
        positions: tuple[int, int, int, int], out: int, threads: int,
    ) -> None:  # fmt: skip
        """Addresses; ``shape``: sequences, heads, width; ``positions``: as the last of ``Turn`` but ``out``."""
        failed = self._turn(self._set, threads, x, *shape, weight, epsilon, *positions, out)
        if failed:
            _require(failed)

    def route(
        self, weight: int, x: int, shape: tuple[int, int, int, int], normalise: bool, dtype: int, logits: int,
        scores: int, ids: int, threads: int,
    ) -> None:  # fmt: skip
        """Addresses; ``shape``: experts, columns, tokens, top-k."""
        failed = self._route(self._set, threads, weight, x, *shape, normalise, dtype, logits, scores, ids)
        if failed:
            _require(failed)

    def heads(
        self, matrices: int, path: int, x: int, norm: tuple[int | None, float], batch: int, width: int,
        norms: tuple[int | None, float, int | None, float, bool], positions: tuple[int, int, int, int],
        out: tuple[int, int, int], threads: int,
    ) -> None:  # fmt: skip
        """As ``Heads`` of ``cpu/kernels.h`` has them, in its order; ``matrices``: the address of three ``Either``."""
        failed = self._heads(self._set, threads, matrices, path, x, *norm, batch, width, *norms, *positions, *out)
        if failed:
            _require(failed)

    def attend(
        self, addresses: tuple[int, int, int], shape: Sequence[int], strides: Sequence[int],
        mask: tuple[int | None, int, int, int], scaling: float, matrix: tuple[int | None, int], out: int, threads: int,
        rest: tuple[int | None, int | None, float, float, float] = (None, None, 0.0, 0.0, 0.0),
    ) -> None:  # fmt: skip
        """As ``Attend`` of ``cpu/kernels.h`` has them, in its order.

        Args:
            matrix: the address of an ``Either``, by which heads are multiplied, and the path of that; or None.
            rest: of a decoder layer: addresses of its input and of a ``Block``, epsilon, alpha and limit.
        """
        failed = self._attend(self._set, threads, *addresses, *shape, *strides, *mask, scaling, *matrix, *rest, out)
        if failed:
            _require(failed)


def _require(failed: int) -> None:
    if failed:
        raise MemoryError(_FAILURES.get(failed, f"a kernel failed with {failed}"))


def _outputs(rows: int, columns: int) -> tuple[Bytes, Floats, Floats]:
    return (
        np.empty((rows, columns), np.uint8),
        np.empty((rows, columns), np.float32),
        np.empty(rows, np.float32),
    )


def find(isa: str | None = None) -> Native:
    """The library that came with the package, one built before, or one built now.

    Raises:
        build.BuildError: there is none, and none can be built.
        ValueError: the machine lacks ``isa``.
    """
    kept = build.kept()
    for file in (Path(__file__).with_name(build.LIBRARY), kept):
        if file.exists():
            try:
                return Native(file, isa)
            except (OSError, StaleError):
                continue  # of another machine, or of other sources: the next one, or a new one
    build.build(kept)
    try:
        return Native(kept, isa)
    except (OSError, StaleError) as error:
        raise build.BuildError(f"the library was built, but does not load: {error}") from error

"""Is every number finite? Answered on the bit patterns, at the speed of the memory, without converting anything."""

from __future__ import annotations

from collections.abc import Iterable

# dtype -> (bytes per element, mask, pattern): an element is NaN or infinite where its bits under the mask equal the
# pattern. IEEE types: all exponent bits set. F8_E4M3 has no infinity and one NaN per sign; F8_E8M0 one NaN; the FNUZ
# types use what would be minus zero.
_PATTERNS = {
    "F64": (8, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7F80_0000, 0x7F80_0000),
    "F16": (2, 0x7C00, 0x7C00),
    "BF16": (2, 0x7F80, 0x7F80),
    "F8_E4M3": (1, 0x7F, 0x7F),
    "F8_E5M2": (1, 0x7C, 0x7C),
    "F8_E8M0": (1, 0xFF, 0xFF),
    "F8_E4M3FNUZ": (1, 0xFF, 0x80),
    "F8_E5M2FNUZ": (1, 0xFF, 0x80),
    "C64": (4, 0x7F80_0000, 0x7F80_0000),
}


class FiniteCheck:
    """Fed the bytes of one tensor in pieces of any length, in order; ``bad`` once it has met NaN or infinity."""

    def __init__(self, dtype: str):
        self.bad = False
        self._pattern = _PATTERNS.get(dtype)  # integers and the 4- and 6-bit floats cannot hold NaN
        self._rest = b""

    def update(self, piece: memoryview) -> None:
        if self._pattern is None or self.bad:
            return
        import numpy as np

        width, mask, pattern = self._pattern
        raw: bytes | memoryview = self._rest + bytes(piece) if self._rest else piece
        whole = len(raw) - len(raw) % width
        self._rest = bytes(raw[whole:])
        if whole:
            bits = np.frombuffer(raw[:whole], dtype=f"<u{width}")
            kind = bits.dtype.type
            masked = bits & kind(mask)
            # The maximum under the mask reaches the mask exactly where all of its bits are set: one pass less.
            self.bad = bool(masked.max() == mask) if mask == pattern else bool((masked == kind(pattern)).any())


def all_finite(dtype: str, pieces: Iterable[memoryview]) -> bool:
    """Whether no element of a tensor, given as its bytes in order, is NaN or infinite."""
    check = FiniteCheck(dtype)
    for piece in pieces:
        check.update(piece)
        if check.bad:
            return False
    return True

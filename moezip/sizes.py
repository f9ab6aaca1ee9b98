"""Sizes as people write them."""

from __future__ import annotations

from moezip.errors import UsageError


def size_of(text: str | None, option: str = "--max-memory") -> int | None:
    """Bytes from ``8GiB``, ``500MB`` or a plain number. Raises UsageError for anything else."""
    if text is None:
        return None
    units = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9,
             "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # fmt: skip
    number = text.strip().rstrip("bBiIkKmMgG")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        count = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count <= 0:
        raise UsageError(f"{text!r} is no size", where=option, next="write it like 8GiB, 500MB or 1073741824")
    return count


def share_or_size(text: str | None) -> float | None:
    """Bytes from ``6GiB``, or a share of 1 from ``40%``. Raises UsageError for anything else."""
    if text is None or not text.strip().endswith("%"):
        return size_of(text, "--size")
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"{text!r} is no share of the source", where="--size", next="write it like 40%, or like 6GiB")
    return share

"""The safetensors header, read with suspicion and written in one canonical way.

A file is an unsigned little-endian 64-bit length N, then N bytes of JSON (name -> dtype, shape, byte offsets counted
from the end of the header), then the tensors' bytes without gaps. Format: huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moezip.checkpoint.source import DTYPE_BITS, TensorSpec
from moezip.errors import CheckpointError

PREFIX = 8
LARGEST_HEADER = 100_000_000  # the bound of the reference implementation: no real header comes near it
LARGEST_SIZE = 1 << 62  # of one axis; more cannot be a byte offset
LARGEST_RANK = 64
ALIGNMENT = 8
DOWNLOAD_AGAIN = "the file is damaged or was made by a faulty program; download it again"


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(f"the key {key[:200]!r} appears twice")
        found[key] = value
    return found


def parse_object(raw: bytes, where: object, what: str) -> dict[str, Any]:
    """A JSON object. Two readers of a file with a repeated key may see two different files, so that is refused.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, or a key appears twice.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text ({error.reason})", where=where, next=DOWNLOAD_AGAIN) from error
    except _DuplicateKey as error:
        raise CheckpointError(f"{what} is ambiguous: {error}", where=where, next="remove one of the two") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}", where=where, next=DOWNLOAD_AGAIN) from error
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{what} is not a JSON object but a {type(parsed).__name__}", where=where, next=DOWNLOAD_AGAIN
        )
    return parsed


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and the bytes ``begin:end`` of the data section that hold it."""

    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """One checked header.

    Attributes:
        file: the shard's bare name.
        data: offset in the file of the first tensor's first byte (= length of prefix and header).
        size: bytes of the whole file.
        metadata: the ``__metadata__`` entry, empty where there is none.
        entries: name -> Entry, in the order of the bytes.
    """

    file: str
    data: int
    size: int
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]


def read_header(stream: BinaryIO, size: int, path: Path) -> Header:
    """Parse and check the header of an open file of ``size`` bytes; nothing is allocated on the word of the file.

    Raises:
        CheckpointError: the header cannot be true of this file.
    """
    prefix = stream.read(PREFIX)
    if len(prefix) < PREFIX:
        raise CheckpointError(
            f"the file is truncated: a safetensors file begins with {PREFIX} bytes of header length, found {size}",
            where=path,
            next="download it again",
        )
    length = int.from_bytes(prefix, "little")
    if length > LARGEST_HEADER or length > size - PREFIX:
        raise CheckpointError(
            f"the header claims a length of {length} bytes, but the file has {size} in all "
            f"and no header may exceed {LARGEST_HEADER}",
            where=path,
            next=DOWNLOAD_AGAIN,
        )
    raw = stream.read(length)
    if len(raw) < length:
        raise CheckpointError(
            f"the file shrank while its header was read: expected {length} bytes, found {len(raw)}", where=path
        )
    return _check(raw, size, path)


def _check(raw: bytes, size: int, path: Path) -> Header:
    parsed = parse_object(raw, path, "the safetensors header")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("the header's __metadata__ must map strings to strings", where=path, next=DOWNLOAD_AGAIN)
    entries = [_entry(name, fields, path) for name, fields in parsed.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    reached, previous = 0, "the start of the data"
    for entry in entries:
        if entry.begin != reached:
            fault = "overlaps" if entry.begin < reached else "leaves a hole after"
            raise CheckpointError(
                f"the tensor {entry.spec.name} at bytes {entry.begin}:{entry.end} {fault} {previous}, "
                f"which ends at {reached}",
                where=path,
                next=DOWNLOAD_AGAIN,
            )
        reached, previous = entry.end, entry.spec.name
    expected = PREFIX + len(raw) + reached
    if size != expected:
        fault = "is truncated" if size < expected else "has bytes that belong to no tensor"
        raise CheckpointError(
            f"the file {fault}: its header describes {expected} bytes, found {size}",
            where=path,
            next="download it again",
        )
    return Header(path.name, PREFIX + len(raw), size, metadata, {entry.spec.name: entry for entry in entries})


def _entry(name: str, fields: object, path: Path) -> Entry:
    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"the header's entry for {name[:200]!r}: {why}", where=path, next=DOWNLOAD_AGAIN)

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise refuse("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {str(dtype)[:80]!r}")
    if not _sizes(shape) or len(shape) > LARGEST_RANK:
        raise refuse(f"the shape must be at most {LARGEST_RANK} non-negative whole numbers, found {str(shape)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets must be two rising non-negative whole numbers, found {str(offsets)[:80]}")
    spec = TensorSpec(name, dtype, tuple(shape), path.name)
    bits = spec.elements * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise refuse(
            f"{dtype} of shape {shape} takes {bits} bits, but its offsets span {offsets[1] - offsets[0]} bytes"
        )
    return Entry(spec, offsets[0], offsets[1])


def _sizes(values: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python, yet no size.
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST_SIZE for value in values)


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The canonical header, length prefix included: metadata first, tensors in the given order without gaps, padded
    with spaces so that the data begin at a multiple of 8.

    Raises:
        CheckpointError: the header would be longer than any reader accepts.
    """
    parsed: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for spec in specs:
        end = reached + spec.bytes
        parsed[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(parsed, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(f"a shard's header would take {len(text)} bytes, above the limit of {LARGEST_HEADER}")
    return len(text).to_bytes(PREFIX, "little") + text

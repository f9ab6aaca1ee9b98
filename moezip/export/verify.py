"""Proof that a folder holds the whole model that its config describes.

Loaders fill what is missing with random numbers and say so in a log line at most, so a pruned checkpoint with a hole
loads and talks nonsense. Every compressing command therefore ends with this check.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moezip.checkpoint.finite import all_finite
from moezip.checkpoint.header import parse_object
from moezip.checkpoint.reader import INDEX_NAME, Checkpoint
from moezip.errors import CheckpointError, MoezipError

MANIFEST = "moezip/manifest.json"
EVALUATION = "moezip/evaluation.json"
# The manifest cannot hold its own digest; the report holds timings; what was measured may come at any time.
UNLISTED = (MANIFEST, "moezip/report.json", EVALUATION)
SCALES = ("_scale", "_scale_inv", "_scales")
POWERS = "_scales"
SHOWN = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: what, and in which file or tensor."""

    what: str
    where: str


def require_verified(folder: str | os.PathLike[str], *, digests: Mapping[str, str] | None = None, deep: bool) -> None:
    """Raises CheckpointError that lists what ``verify`` finds, if it finds anything."""
    findings = verify(folder, digests=digests, deep=deep)
    if findings:
        lines = [f"  {finding.where}: {finding.what}" for finding in findings[:SHOWN]]
        if len(findings) > SHOWN:
            lines.append(f"  ... and {len(findings) - SHOWN} more")
        raise CheckpointError(
            f"the checkpoint is not complete and sound ({len(findings)} problems):\n" + "\n".join(lines),
            where=folder,
            next="do not use it: download it again, or write it again and report this if it was moezip that wrote it",
        )


def verify(folder: str | os.PathLike[str], *, digests: Mapping[str, str] | None = None, deep: bool) -> list[Finding]:
    """Everything that is wrong with a checkpoint; an empty list proves it complete.

    Headers, index and total size; every tensor that the config implies, once, with its shape, and no other; scales
    finite; checksums of ``moezip/manifest.json`` where there is one.

    Args:
        folder: the checkpoint.
        digests: relative path -> SHA-256 taken while the files were written, compared with the manifest instead of
            reading the files again.
        deep: read everything: every float finite, packed codes unpacked and packed again, every checksum taken from
            the disk.
    """
    root = Path(folder)
    findings = list(_checksums(root, digests, deep))
    try:
        checkpoint = Checkpoint.open(root)
    except MoezipError as error:
        return [Finding(error.what, error.where or str(root)), *findings]
    with checkpoint:
        findings += _total_size(checkpoint)
        findings += _model(checkpoint)
        findings += _skipping(checkpoint)
        findings += _finite(checkpoint, deep)
        if deep:
            findings += _codes(checkpoint)
            findings += _factors(checkpoint)
    return findings


def _total_size(checkpoint: Checkpoint) -> Iterator[Finding]:
    if checkpoint.index_bytes is None:
        return
    metadata = parse_object(checkpoint.index_bytes, INDEX_NAME, "the index").get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(checkpoint.spec(name).bytes for name in checkpoint.names())
    if stated is not None and stated != actual:
        yield Finding(f"total_size is {stated}, the tensors take {actual} bytes", INDEX_NAME)


def _model(checkpoint: Checkpoint) -> list[Finding]:
    from moezip.arch.experts import decoded
    from moezip.arch.skeleton import Skeleton

    try:
        problems = Skeleton(decoded(checkpoint)).problems()
    except MoezipError as error:
        return [Finding(error.what, error.where or "config.json")]
    return [Finding(problem, "config against tensors") for problem in problems]


def _skipping(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A rule for run-time skipping that is damaged, does not fit the layers, or lacks its mask networks."""
    from moezip.arch.families import identify
    from moezip.runtime.skipping import Skipping, masks_of

    try:
        skipping = Skipping.of(checkpoint.config)
        if skipping is not None:
            architecture = identify(checkpoint.config, checkpoint.folder)
            skipping.require_fits(architecture, checkpoint.config)
            masks_of(skipping, checkpoint.folder, architecture, checkpoint.config)
    except MoezipError as error:
        yield Finding(error.what, error.where or "config.json")


def _finite(checkpoint: Checkpoint, deep: bool) -> Iterator[Finding]:
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        is_scale = name.endswith(SCALES)
        if deep or is_scale:
            # mxfp4 stores its powers of two as plain bytes, with the NaN of e8m0.
            dtype = "F8_E8M0" if name.endswith(POWERS) and spec.dtype == "U8" else spec.dtype
            try:
                if not all_finite(dtype, checkpoint.chunks(name)):
                    yield Finding("holds NaN or infinity", name)
            except MoezipError as error:
                yield Finding(error.what, name)


def _codes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Packed matrices whose codes, unpacked and packed again, are not the stored ones."""
    from moezip.arch.experts import packed_grids
    from moezip.formats.packed import decode, encode

    try:
        grids = packed_grids(checkpoint)
    except MoezipError:  # found and told by the model's own check
        return
    for name, grid in grids.items():
        stem = name.removesuffix("weight")
        try:
            tensors = {suffix: checkpoint.read(stem + suffix) for suffix in grid.specs(1, grid.group or 1)}
            again = encode(decode(tensors, grid))
        except MoezipError as error:
            yield Finding(error.what, name)
            continue
        for suffix, tensor in tensors.items():
            if not tensor.equal(again[suffix]):
                yield Finding(f"its {suffix} is not what its codes are stored as", name)


def _factors(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Factored matrices whose kept rows have no place."""
    from moezip.arch.factoring import factoring_of, stem
    from moezip.formats.factors import INDEX, LEFT, require_sound

    try:
        factors = factoring_of(checkpoint.config)
        for name, size in factors.items():
            if size.rows:
                require_sound({suffix: checkpoint.read(stem(name) + suffix) for suffix in (LEFT, INDEX)}, name)
    except MoezipError as error:
        yield Finding(error.what, error.where or "config.json")


# -- checksums ----------------------------------------------------------------------------------------------


def _checksums(root: Path, digests: Mapping[str, str] | None, deep: bool) -> Iterator[Finding]:
    path = root / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        yield Finding(f"cannot read: {error.strerror}", MANIFEST)
        return
    try:
        listed = parse_object(raw, path, "the manifest").get("files")
    except CheckpointError as error:
        yield Finding(error.what, MANIFEST)
        return
    if not isinstance(listed, dict) or not all(isinstance(digest, str) for digest in listed.values()):
        yield Finding("has no table of files and their SHA-256", MANIFEST)
        return
    inside = {name: digest for name, digest in listed.items() if _inside(name)}
    yield from (Finding(f"lists {name!r}, which is not inside the folder", MANIFEST) for name in listed.keys() - inside)
    present = {name for name in inside if (root / name).is_file()}
    yield from (Finding("is listed in the manifest but missing", name) for name in inside if name not in present)
    for file in sorted(root.glob("*.safetensors")):
        if file.name not in listed:
            yield Finding("holds weights, but the manifest does not list it", file.name)
    if deep:
        actual = _hash_files(root, sorted(present))
    elif digests is not None:
        actual = dict(digests)
        yield from (
            Finding("was written, but the manifest does not list it", name)
            for name in digests
            if name not in inside and name not in UNLISTED
        )
        yield from (Finding("is in the manifest but was not written", name) for name in present - digests.keys())
    else:
        return
    for name in sorted(present & actual.keys()):
        if actual[name] != inside[name]:
            yield Finding(f"SHA-256 is {actual[name][:16]}..., the manifest says {inside[name][:16]}...", name)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _hash_files(root: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        try:
            with (root / name).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"unreadable ({error.strerror})"

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names)))


def manifest_bytes(facts: Mapping[str, object], digests: Mapping[str, str]) -> bytes:
    """``moezip/manifest.json``: ``facts`` (version, command, fingerprints, seed, ...) and the SHA-256 of every file but
    itself, the report and saved measurements."""
    files = {name: digests[name] for name in sorted(digests) if name not in UNLISTED}
    return (json.dumps({**facts, "files": files}, indent=2, ensure_ascii=False) + "\n").encode()

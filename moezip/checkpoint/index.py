"""The index of a sharded checkpoint (tensor name -> shard) as the writer leaves it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from moezip.checkpoint.header import parse_object
from moezip.checkpoint.reader import INDEX_NAME

NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


def read_index(folder: Path) -> tuple[bytes, dict[str, Any]] | None:
    try:
        raw = (folder / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        return None
    return raw, parse_object(raw, folder / INDEX_NAME, "the index")


def output_names(files: list[str], old_index: tuple[bytes, dict[str, Any]] | None) -> dict[str, str]:
    """Source shard -> output shard: the same names, unless shards were dropped and the names are numbered."""
    dropped = old_index is not None and not set(old_index[1]["weight_map"].values()) <= set(files)
    matches = {file: NUMBERED.fullmatch(file) for file in files}
    if not dropped or not all(matches.values()):
        return {file: file for file in files}
    return {
        file: f"{match['stem']}-{i:0{len(match['number'])}d}-of-{len(files):0{len(match['count'])}d}.safetensors"
        for i, (file, match) in enumerate(((file, match) for file, match in matches.items() if match), start=1)
    }


def index_bytes(old: tuple[bytes, dict[str, Any]] | None, weight_map: dict[str, str], total: int) -> bytes:
    """The source's own index where it still tells the truth, else a new one with its other metadata."""
    metadata = dict(old[1].get("metadata") or {}) if old else {}
    if old and old[1]["weight_map"] == weight_map and metadata.get("total_size") == total:
        return old[0]
    metadata["total_size"] = total
    metadata.pop("total_parameters", None)  # of the source; nobody reads it, and a wrong number is worse than none
    ordered = dict(sorted(weight_map.items()))
    return (json.dumps({"metadata": metadata, "weight_map": ordered}, indent=2, ensure_ascii=False) + "\n").encode()

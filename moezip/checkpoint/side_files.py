"""The files of a checkpoint that are not weights: tokenizer, licence, chat template, the model's own code, ..."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moezip.checkpoint.reader import CHUNK
from moezip.errors import CheckpointError

# Formats of weights: a compressed model must not carry the uncompressed weights along.
WEIGHT_SUFFIXES = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".ot", ".tflite",
)  # fmt: skip
OWN_FOLDER = "moezip"
NOT_CARRIED = {".git", ".cache", "__pycache__"}  # of tools, not of the model


def file_pieces(path: Path) -> Iterator[tuple[None, memoryview]]:
    try:
        with path.open("rb") as stream:
            while piece := stream.read(CHUNK):
                yield None, memoryview(piece)
    except OSError as error:
        raise CheckpointError(f"cannot read the side file: {error.strerror}", where=path) from error


def side_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        at_top = Path(folder) == root
        folders[:] = sorted(f for f in folders if f not in NOT_CARRIED and not (at_top and f == OWN_FOLDER))
        for file in sorted(files):
            path = Path(folder, file)
            if not file.lower().endswith(WEIGHT_SUFFIXES) and (path.is_file() or path.is_symlink()):
                yield path

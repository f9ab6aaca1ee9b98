"""What a quantization can be told besides its solver's own knobs: who gets how many bits, how they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moezip.errors import UsageError
from moezip.registry import Method, NoParams, lookup, parse_params

INPUTS = ("quantized", "original")
UNPACKED = 16


@dataclass(frozen=True, slots=True)
class StorageParams:
    """Attributes:
    attention: bits of every linear in a decoder layer outside the MoE block; 16 leaves it as it is, 0 takes the
        experts' whole bits, or 4 if those are fewer.
    shared: the same for shared experts. dense: for the linears of layers without experts.
    head: bits of the output embedding; 16 leaves it as it is.
    symmetric: store no zeros: smaller, and less exact.
    scale: stored scales, ``F16`` or ``BF16``; ``model`` takes the model's own dtype, which every reader reads alike.
    double: store the scales themselves in 8 bits.
    inputs: layers are solved on the outputs of ``quantized`` layers before them, or of the ``original`` ones.
    """

    attention: int = 0
    shared: int = 0
    dense: int = 0
    head: int = UNPACKED
    symmetric: bool = False
    scale: str = "model"
    double: bool = False
    inputs: str = "quantized"

    def __post_init__(self) -> None:
        for name in ("attention", "shared", "dense", "head"):
            bits = getattr(self, name)
            if bits not in (*range(1, 9), UNPACKED) and not (bits == 0 and name != "head"):
                raise UsageError(f"{name} cannot have {bits} bits", where=f"--set {name}={bits}",
                                 next="use 1 to 8, or 16 to leave it as it is")  # fmt: skip
        if self.scale not in ("model", "F16", "BF16"):
            raise UsageError(f"scales cannot be stored as {self.scale}", where=f"--set scale={self.scale}",
                             next="use F16, BF16, or model for the model's own dtype")  # fmt: skip
        if self.inputs not in INPUTS:
            raise UsageError(f"inputs is {self.inputs!r}", where=f"--set inputs={self.inputs}",
                             next=f"use {' or '.join(INPUTS)}")  # fmt: skip


def scale_dtype(storage: StorageParams, config: Mapping[str, Any]) -> str:
    """``F16`` or ``BF16``: what is asked for, else BF16 in a BF16 model and F16 in all others."""
    if storage.scale != "model":
        return storage.scale
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    return "BF16" if dtype.endswith("bfloat16") else "F16"


def split_settings(
    method: Method, settings: Mapping[str, str], allocator: type = NoParams
) -> tuple[Any, StorageParams, Any]:
    """``--set`` texts as the solver's knobs, the storage's and the allocator's. Raises UsageError for a key of none."""
    stored = {f.name for f in dataclasses.fields(StorageParams)}
    own = {f.name for f in dataclasses.fields(method.params)}
    chosen = {f.name for f in dataclasses.fields(allocator)}
    for key in settings:
        lookup(key, dict.fromkeys(stored | own | chosen), f"setting of quantize --solver {method.name}")
    storage = replace(method, params=StorageParams)
    return (
        parse_params(method, {key: text for key, text in settings.items() if key in own}),
        parse_params(storage, {key: text for key, text in settings.items() if key in stored}),
        parse_params(replace(method, params=allocator), {k: text for k, text in settings.items() if k in chosen}),
    )

"""Checkpoints that compressed-tensors wrote: which matrices its ``quantization_config`` says are packed, and how.

``config_groups`` gives each group of modules its number format; a module belongs to the first of: the group with its
exact name among the ``targets``, the first in alphabetical order whose regular expression (``re:...``) matches the
beginning of its name, the one that targets its class, ``Linear``. ``ignore`` lists, in the same ways, modules that stay
plain. Only ``pack-quantized`` whole numbers are read (``moezip.formats.packed``); everything that would change more
than the weights (activations, caches, rotations, sparsity) is refused. Source: compressed-tensors 0.20,
``QuantizationConfig`` and ``match_targets``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moezip.checkpoint.source import Source
from moezip.formats.packed import PACKED, SCALE, SCALE_DTYPES, Grid
from moezip.formats.packed_matrix import ORDER, matrix
from moezip.formats.stored import Stored, fault

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
REGEX, CLASS = "re:", "Linear"
# Kinds of column order that leave groups runs of neighbours, and those that store the group of every column.
PLAIN_ORDERS, STORED_ORDERS = (None, False, "weight", "static"), (True, "group", "dynamic")


@dataclass(frozen=True, slots=True)
class Targets:
    """Modules listed by exact name, by class, or by a regular expression that begins with ``re:``."""

    listed: tuple[str, ...]

    def find(self, module: str) -> str | None:
        """The entry that speaks of ``module``, the most particular first; None if there is none."""
        if module in self.listed:
            return module
        for target in sorted(self.listed):
            if target.startswith(REGEX) and re.match(target.removeprefix(REGEX), module):
                return target
        return CLASS if CLASS in self.listed else None


def stored(source: Source) -> Iterator[Stored]:
    """The packed matrices of a checkpoint.

    Raises:
        ArchitectureError: something that moezip does not read, or a config that the tensors do not bear out.
    """
    config = source.config["quantization_config"]
    _require_weights_only(source, config)
    grids: dict[str, Any] = {}
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping) or not _texts(group.get("targets")):
            raise fault(source, f"quantization_config.config_groups.{name} has no list of targets")
        _require_packed(source, config, name, group)
        grids |= dict.fromkeys(group["targets"], group["weights"])
    if not grids:
        raise fault(source, "quantization_config has no config_groups")
    if not _texts(config.get("ignore") or []):
        raise fault(source, "quantization_config.ignore is no list of names")
    targets, ignored = Targets(tuple(grids)), Targets(tuple(config.get("ignore") or ()))
    names = set(source.names())
    for name in source.names():
        if name.endswith(f".{PACKED}"):
            stem = name.removesuffix(PACKED)
            target = targets.find(stem[:-1])
            if target is None or ignored.find(stem[:-1]) is not None:
                raise fault(source, f"{name} is there, but by quantization_config {stem[:-1]} is not quantized")
            weights = grids[target]
            if weights.get("actorder") in STORED_ORDERS and stem + ORDER not in names:
                raise fault(source, f"{stem[:-1]} has the column order {weights['actorder']!r}, but no {ORDER}")
            scale = source.spec(stem + SCALE).dtype if stem + SCALE in names else SCALE_DTYPES[0]
            yield matrix(source, stem, _grid(source, weights, scale), names)
        elif name.endswith(f".{SCALE}") and name.removesuffix(SCALE) + PACKED not in names:
            raise fault(source, f"{name} is the scale of a matrix that is not stored as {FORMAT}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _require_weights_only(source: Source, config: Mapping[str, Any]) -> None:
    if config.get("quantization_status") not in (None, "compressed"):
        raise fault(source, f"quantization_status is {config['quantization_status']!r}, not 'compressed'")
    sparsity = config.get("sparsity_config") or {}
    for key, present in (
        ("sparsity_config", bool(sparsity) and sparsity.get("format") != "dense"),
        ("transform_config", bool((config.get("transform_config") or {}).get("config_groups"))),
        ("kv_cache_scheme", bool(config.get("kv_cache_scheme"))),
        ("moe_sparsity_config", bool(config.get("moe_sparsity_config"))),
    ):
        if present:
            raise fault(
                source, f"quantization_config.{key} changes more than the weights, which moezip does not follow"
            )


def _require_packed(source: Source, config: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> None:
    where = f"quantization_config.config_groups.{name}"
    kind = group.get("format") or config.get("format")
    if kind != FORMAT:
        raise fault(source, f"{where} has the format {kind!r}; moezip reads {FORMAT}")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise fault(source, f"{where} quantizes activations ({key}), which moezip does not follow")
    if not isinstance(group.get("weights"), Mapping):
        raise fault(source, f"{where} does not quantize weights")


def _grid(source: Source, weights: Mapping[str, Any], scale: str) -> Grid:
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    if weights.get("type", "int") != "int" or type(bits) is not int or not 2 <= bits <= 8:
        raise fault(source, f"weights of type {weights.get('type')!r} in {bits!r} bits; moezip reads int, 2 to 8 bits")
    if weights.get("dynamic"):
        raise fault(source, "weights are quantized dynamically, so there is nothing stored to read")
    if strategy == "channel":
        size = 0
    elif strategy != "group" or type(size) is not int or size < 1:
        raise fault(source, f"scales per {strategy} of {size!r}; moezip reads one per group or per output channel")
    if weights.get("actorder") not in (*PLAIN_ORDERS, *STORED_ORDERS):
        raise fault(source, f"the column order (actorder) {weights.get('actorder')!r} is unknown")
    if scale not in SCALE_DTYPES:
        raise fault(source, f"scales are stored as {scale}; moezip reads {', '.join(SCALE_DTYPES)}")
    return Grid(bits, size, weights.get("symmetric", True) is True, scale)

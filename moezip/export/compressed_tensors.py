"""Packed checkpoints as compressed-tensors writes them: moezip's own tensors, and a config that other readers know.

The tensors need no change (``moezip.formats.packed``); what is made here is ``quantization_config``. Its groups name
modules by regular expressions, as vLLM, SGLang and transformers look them up; experts by ``...experts\\..*``, because
readers make up names for them that differ from those on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moezip.arch.spec import Architecture
from moezip.errors import PlanError
from moezip.export.modules import HEAD, Alike, alike
from moezip.formats.compressed_tensors import FORMAT, METHOD, REGEX
from moezip.formats.packed import Grid


def quantization_config(
    architecture: Architecture, grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose packed matrices are these.

    Args:
        grids: by name (``....q_proj.weight``), those of the packed matrices.
        shapes: by name, of all weights in their plain form.

    Raises:
        PlanError: what only moezip's own format can hold: one bit, scales in 8 bits, a layer's experts on different
            grids or of different widths, layers with different numbers of experts.
    """
    for name, grid in grids.items():
        if grid.bits == 1 or grid.double:
            what = "one bit, which is no affine code" if grid.bits == 1 else "scales in 8 bits"
            raise PlanError(
                f"{name} is on the grid {grid}: {what}, and compressed-tensors has no such form",
                next="use 2 to 8 bits with plain scales, or write moezip's own format",
            )
    groups = alike(architecture, grids, shapes)
    packed = [group for group in groups if group.grid is not None]
    if not packed:
        raise PlanError("nothing is packed, so there is nothing to write as compressed-tensors")
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": _group(group) for number, group in enumerate(packed)},
        "ignore": [_target(pattern) for group in groups if group.grid is None for pattern in group.patterns],
        "kv_cache_scheme": None,
    }


def _group(group: Alike) -> dict[str, Any]:
    grid = group.grid
    assert grid is not None
    return {
        "targets": [_target(pattern) for pattern in group.patterns],
        "weights": {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "group" if grid.group else "channel",
            "group_size": grid.group or None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def _target(pattern: str) -> str:
    """The head by its plain name, which some readers compare; others as a regular expression."""
    return HEAD if pattern == f"{HEAD}$" else REGEX + pattern


def misread(quantization: Mapping[str, Any], scales: Collection[str], dtype: str) -> str | None:
    """Why transformers with compressed-tensors does not read such a checkpoint as it is meant; None where it does.

    Seen in transformers 5.23 with compressed-tensors 0.20: experts keep the dtype of their scales, whatever the
    model's; all experts of a model are decoded by one group and all other modules by another; stored zeros stop it.

    Args:
        scales: dtypes of the stored scales (safetensors names).
        dtype: the model's.
    """
    if any(scale != dtype for scale in scales):
        return (
            f"scales stored as {', '.join(sorted(scales))} in a {dtype} model make experts of another dtype than the "
            "rest, which gives an error or, without one, other outputs"
        )
    groups = list(quantization["config_groups"].values())
    experts = [group for group in groups if any("experts" in target for target in group["targets"])]
    if len(experts) > 1:
        return "layers whose experts are stored differently are all decoded like the first, without an error"
    if len(groups) - len(experts) > 1:
        return "modules outside the experts that are stored differently are all decoded alike, without an error"
    if any(not group["weights"]["symmetric"] for group in groups):
        return "it stops at stored zeros"
    return None

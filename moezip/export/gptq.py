"""Packed checkpoints as AutoGPTQ and GPTQModel write them: 4 or 8 bits (``moezip.formats.gptq`` has the layout)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import Architecture
from moezip.errors import PlanError
from moezip.export.modules import HEAD, WEIGHT, alike
from moezip.formats.gptq import ALTER, AS_IS, DROP, LESS_ONE, METHOD, WRITTEN, encode
from moezip.formats.packed import WORD, Codes, Grid

if TYPE_CHECKING:
    import torch


def tensors(name: str, codes: Codes, *, less_one: bool = True) -> dict[str, torch.Tensor]:
    """The stored tensors of the matrix ``name`` (``....q_proj.weight``), under their full names.

    Args:
        less_one: as the checkpoint's config says (``stored_less_one``).

    Raises:
        CheckpointError: codes that have no such form.
    """
    stem = name.removesuffix(WEIGHT)
    return {f"{stem}.{suffix}": tensor for suffix, tensor in encode(codes, less_one=less_one).items()}


def stored_less_one(grids: Mapping[str, Grid]) -> bool:
    """Whether a checkpoint of these grids is written with zeros less one, which is older and read by more.

    Not where zeros were chosen: one of 0 has no such form. Who reads those reads the newer form too.
    """
    return all(grid.symmetric for grid in grids.values())


def quantization_config(
    architecture: Architecture, grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose packed matrices are these, written by ``tensors``.

    Most weights' grid is the rule; ``dynamic`` lists what is stored otherwise or not at all.

    Args:
        grids: by name (``....q_proj.weight``), those of the packed matrices.
        shapes: by name, of all weights in their plain form.

    Raises:
        PlanError: a grid or shape that has no such form, or experts of a layer that differ.
    """
    for name, grid in grids.items():
        per_word = WORD // grid.bits
        if grid.bits not in WRITTEN or grid.double:
            raise PlanError(
                f"{name} is on the grid {grid}; GPTQ checkpoints are of {' or '.join(map(str, WRITTEN))} bits with "
                "plain scales",
                next="use other widths, or export to compressed-tensors",
            )
        if any(size % per_word for size in shapes.get(name, ())):
            raise PlanError(
                f"{name} of {list(shapes[name])} in {grid.bits} bits does not fill whole words both ways",
                next="export to compressed-tensors",
            )
    if not grids:
        raise PlanError("nothing is packed, so there is nothing to write as GPTQ")
    groups = alike(architecture, grids, shapes)
    weights: dict[Grid, int] = {}
    for name, grid in grids.items():
        same = Grid(grid.bits, grid.group, grid.symmetric)
        weights[same] = weights.get(same, 0) + math.prod(shapes[name])
    rule = max(weights, key=lambda grid: weights[grid])
    dynamic: dict[str, dict[str, Any]] = {}
    for group in groups:
        for pattern in group.patterns:
            if group.grid is None and pattern != f"{HEAD}$":
                dynamic[DROP + pattern] = {}
            elif group.grid not in (None, rule):
                assert group.grid is not None
                dynamic[ALTER + pattern] = _settings(group.grid)
    return {
        "quant_method": METHOD,
        **_settings(rule),
        "desc_act": False,
        "lm_head": f"{HEAD}{WEIGHT}" in grids,
        "checkpoint_format": LESS_ONE if stored_less_one(grids) else AS_IS,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _settings(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group or -1, "sym": grid.symmetric}

"""Packed matrices on a GPU: a layer's experts, or one linear, through the Triton kernels. **Never run on a GPU.**

``triton_packed`` makes the ``Layer`` or the ``Linear`` of stored tensors. All experts of a layer go in one launch per
width, and nothing waits for the GPU, so that a layer can be captured in a CUDA graph; ``torch.compile`` breaks its own
graph here. Products are exact up to fp32 sums, except that what lies between the two products of an expert is rounded
to the dtype of the inputs.

All functions raise ValueError for arguments that do not fit together, or that the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton

from moezip.kernels import triton_grouped as kernels
from moezip.kernels import triton_layout as layout
from moezip.kernels.triton_packed import DTYPES, Layer, Linear, Stack, require

# Programs per multiprocessor below which the inputs of a product are split between programs.
WANTED = 2
MOST_SPLITS = 8
COLUMNS = 256  # of a program of the small kernels


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens x matrix rows of one program, and how it is compiled."""

    tokens: int
    rows: int
    warps: int
    stages: int

    def stages_at(self, bits: int) -> int:
        """Blocks of inputs on their way at once; those of odd widths are twice as large."""
        return self.stages - bits % 2


# Chosen by what the compiler makes of them (tests/triton_static.json), not by time: with 64 tokens Hopper uses its
# products of warp groups; newer GPUs would go through tensor memory, older ones run out of registers.
DECODE = Tile(16, 128, 4, 4)
PREFILL = Tile(32, 128, 4, 3)
PREFILL_90 = Tile(64, 128, 4, 3)


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    """Which rows go to which expert: int32 ``rows`` [count * tile.tokens], ``experts`` [count]; -1 for none."""

    tile: Tile
    count: int
    rows: torch.Tensor
    experts: torch.Tensor


@torch.compiler.disable
def run_linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """``x`` fp16 or bf16 [..., inputs] to [..., rows]."""
    _check(x, linear.inputs, linear.stacks[0].codes.device)
    flat = x.reshape(-1, linear.inputs)
    tokens = len(flat)
    if not tokens:
        return x.new_empty((*x.shape[:-1], linear.rows))
    with _on(x.device):
        tiles = _all_rows(tokens, x.device)
        y = _multiply(flat, linear.stacks, tiles, 1, linear.rows, parts=1, rows=tokens, experts=1)
        one = torch.zeros((tokens, 1), dtype=torch.int64, device=x.device)
        width = torch.ones(1, dtype=torch.int32, device=x.device)
        out = _combine(y, one, one.float() + 1, width, linear.bias, x.dtype)
    return out.view(*x.shape[:-1], linear.rows)


@torch.compiler.disable
def run_layer(x: torch.Tensor, layer: Layer, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over the chosen experts of gate weight x expert output.

    Args:
        x: fp16 or bf16 [T, D]. chosen: int64 [T, k], experts, -1 for one that is skipped; weights: [T, k].

    Returns:
        [T, D] in the dtype of x.
    """
    _check(x, layer.hidden, layer.widths.device)
    experts = len(layer.widths)
    require(x.ndim == 2, f"x is {list(x.shape)}, not [T, {layer.hidden}]")
    require(
        chosen.shape == weights.shape and chosen.ndim == 2 and len(chosen) == len(x),
        f"chosen {list(chosen.shape)} and weights {list(weights.shape)} do not belong to x {list(x.shape)}",
    )
    require(chosen.dtype == torch.int64, f"chosen experts are {chosen.dtype}, not int64")
    require(chosen.device == x.device == weights.device, "x, chosen and weights lie on several devices")
    if not chosen.numel():
        return torch.zeros_like(x)
    chosen, weights = chosen.contiguous(), weights.float().contiguous()
    pairs, choices = chosen.numel(), chosen.shape[1]
    with _on(x.device):
        tiles = _tiles(
            chosen.flatten(), experts, DECODE if pairs <= DECODE.tokens * experts else prefill_tile(x.device)
        )
        y = _multiply(x, layer.gate_up, tiles, choices, layer.widest, parts=2, rows=pairs, experts=experts)
        h = _gated(y, layer, chosen, x.dtype)
        y = _multiply(h, layer.down, tiles, 1, layer.hidden, parts=1, rows=pairs, experts=experts)
        return _combine(y, chosen, weights, layer.widths, layer.down_bias, x.dtype)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(x: torch.Tensor, inputs: int, device: torch.device) -> None:
    require(x.dtype in DTYPES, f"x is {x.dtype}; the Triton kernels take float16 and bfloat16")
    require(x.shape[-1] == inputs, f"x has {x.shape[-1]} inputs for matrices of {inputs}")
    require(x.device == device, f"x lies on {x.device}, the matrices on {device}")
    require(x.device.type == "cuda" or interpreted(), "the Triton kernels need a GPU, or TRITON_INTERPRET=1 from start")


def interpreted() -> bool:
    """Whether Triton interprets the kernels, which was settled when they were imported."""
    return not isinstance(kernels.grouped_kernel, triton.JITFunction)


def prefill_tile(device: torch.device) -> Tile:
    """The tile for many tokens of one expert."""
    return PREFILL_90 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else PREFILL


def _all_rows(tokens: int, device: torch.device) -> _Tiles:
    """Tiles for one expert that takes every token."""
    tile = DECODE if tokens <= DECODE.tokens else prefill_tile(device)
    count = -(-tokens // tile.tokens)
    rows = torch.full((count * tile.tokens,), -1, dtype=torch.int32, device=device)
    rows[:tokens] = torch.arange(tokens, dtype=torch.int32, device=device)
    return _Tiles(tile, count, rows, torch.zeros(count, dtype=torch.int32, device=device))


def _tiles(chosen: torch.Tensor, experts: int, tile: Tile) -> _Tiles:
    """Tiles for pairs of token and choice, ``chosen`` int64 [P]; as many as could be needed, so that nobody counts."""
    device, pairs = chosen.device, len(chosen)
    count = pairs // tile.tokens + min(experts + 1, pairs)
    chosen = torch.where(chosen < 0, experts, chosen)  # one more expert, last, whose tiles are nobody's
    in_order, order = torch.sort(chosen, stable=True)
    sizes = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    sizes.scatter_add_(0, chosen, torch.ones_like(chosen))
    needed = (sizes + tile.tokens - 1) // tile.tokens
    ends = torch.cumsum(needed, 0)
    rank = torch.arange(pairs, device=device) - (torch.cumsum(sizes, 0) - sizes)[in_order]
    rows = torch.full((count * tile.tokens,), -1, dtype=torch.int32, device=device)
    rows[(ends - needed)[in_order] * tile.tokens + rank] = order.to(torch.int32)
    owner = torch.searchsorted(ends, torch.arange(count, device=device), right=True)
    return _Tiles(tile, count, rows, torch.where(owner < experts, owner, -1).to(torch.int32))


def _multiply(
    x: torch.Tensor,
    stacks: Sequence[Stack],
    tiles: _Tiles,
    choices: int,
    width: int,
    *,
    parts: int,
    rows: int,
    experts: int,
) -> torch.Tensor:
    """fp32 [splits, rows, parts * width]: products of row // choices of ``x``, not yet summed over splits."""
    tile, inputs = tiles.tile, max(stack.inputs for stack in stacks)
    x = F.pad(x, (0, inputs - x.shape[1])) if x.shape[1] < inputs else x.contiguous()
    programs = tiles.count * parts * -(-width // tile.rows)
    blocks = min(stack.inputs // layout.block_inputs(stack.bits) for stack in stacks)
    splits = max(1, min(MOST_SPLITS, blocks, WANTED * _multiprocessors(x.device) // programs))
    splits = 1 << (splits.bit_length() - 1)  # few variants to compile
    y = torch.empty((splits, rows, parts * width), dtype=torch.float32, device=x.device)
    for each in stacks:
        unit = layout.unit_inputs(each.group)
        block = layout.block_inputs(each.bits)
        sums = torch.empty((len(x), each.inputs // unit), dtype=torch.float32, device=x.device)
        offsets = torch.empty_like(sums)
        kernels.sums_kernel[(len(x), each.inputs // block)](
            x, each.constants[x.dtype], sums, offsets, x.stride(0), sums.shape[1], BLOCK=block, UNIT=unit,
            num_warps=1,
        )  # fmt: skip
        grid = (-(-each.rows // tile.rows), tiles.count, parts * splits)
        kernels.grouped_kernel[grid](
            x, each.codes, each.scales, each.zeros, sums, offsets, tiles.rows, tiles.experts, each.slots,
            each.codes_at, each.scales_at, each.sizes, y, x.stride(0), sums.shape[1], y.stride(1), y.stride(0), width,
            choices, experts, BITS=each.bits, GROUP=each.group, ZEROS=each.zeros is not None,
            DTYPE=kernels.tl.float16 if x.dtype == torch.float16 else kernels.tl.bfloat16, SPLITS=splits,
            BM=tile.tokens, BN=tile.rows, FAST=not interpreted(), FP32=interpreted(), num_warps=tile.warps,
            num_stages=tile.stages_at(each.bits),
        )  # fmt: skip
    return y


def _gated(y: torch.Tensor, layer: Layer, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[rows, inputs of the down projections in whole blocks] of gates and ups."""
    stride = max(stack.inputs for stack in layer.down)
    h = torch.empty((y.shape[1], stride), dtype=_stored(dtype), device=y.device)
    bias = layer.gate_up_bias
    kernels.gate_kernel[(y.shape[1], -(-stride // COLUMNS))](
        y, bias, chosen, layer.widths, h, y.stride(0), y.stride(1), layer.widest, stride, layer.limit, layer.alpha,
        SPLITS=len(y), GATE=layer.gate, BIAS=bias is not None, BN=COLUMNS, num_warps=4,
    )  # fmt: skip
    return h.to(dtype)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels write: the interpreter cuts bf16 off where a GPU rounds, so there torch rounds afterwards."""
    return torch.float32 if interpreted() else dtype


def _combine(
    y: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    widths: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[T, N], the weighted sum over the choices of each token, of ``y`` fp32 [splits, T * choices, N]."""
    out = torch.empty((len(chosen), y.shape[2]), dtype=_stored(dtype), device=y.device)
    kernels.combine_kernel[(len(out), -(-out.shape[1] // COLUMNS))](
        y, bias, chosen, weights, widths, out, out.shape[1], y.stride(0), y.stride(1), chosen.shape[1],
        SPLITS=len(y), BIAS=bias is not None, BN=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out.to(dtype)


def _multiprocessors(device: torch.device) -> int:
    """Of the GPU; 8 in the interpreter, so that small tests split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8

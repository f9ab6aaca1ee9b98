"""Packed matrices on a GPU: a layer's experts, or one linear, through the Triton kernels. **Never run on a GPU.**

``lay_out`` makes a ``Matrix`` of stored tensors, ``pack_layer`` and ``pack_linear`` gather matrices, ``run_layer`` and
``run_linear`` multiply. All experts of a layer go in one launch per width, and nothing waits for the GPU, so that a
layer can be captured in a CUDA graph. Products are exact up to fp32 sums, except that what lies between the two
products of an expert is rounded to the dtype of the inputs.

All functions raise ValueError for arguments that do not fit together, or that the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton

from moezip.kernels import triton_grouped as kernels
from moezip.kernels import triton_layout as layout

DTYPES = (torch.float16, torch.bfloat16)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GATES = ("silu", "gelu", "gelu_tanh", "swiglu")
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
class Matrix:
    """One matrix [rows, inputs] in the kernels' layout. ``scales`` [G, rows] are steps: at one bit twice the stored
    scale; ``zeros`` uint8 [G, rows], or None: 2**(bits - 1), at one bit 1/2."""

    bits: int
    group: int
    rows: int
    inputs: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Matrices of one width, group and kind of scale, one behind the other; see ``grouped_kernel`` for the tables.

    ``constants`` fp32 by dtype of the inputs; ``rows``, ``inputs``: the most that a matrix has, inputs in whole blocks.
    """

    bits: int
    group: int
    rows: int
    inputs: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    slots: torch.Tensor
    codes_at: torch.Tensor
    scales_at: torch.Tensor
    sizes: torch.Tensor
    constants: dict[torch.dtype, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros) if t is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The experts of a layer. Biases: gate and up fp32 [E, 2, widest], down fp32 [E, D], or None.

    ``widths`` int32 [E]: inner size of each expert, 0 for one without matrices. ``limit``, ``alpha``: of ``swiglu``.
    """

    hidden: int
    widest: int
    gate_up: tuple[Stack, ...]
    down: tuple[Stack, ...]
    widths: torch.Tensor
    gate: str
    limit: float = 7.0
    alpha: float = 1.702
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """One matrix [rows, inputs] with a bias fp32 [rows] or None."""

    rows: int
    inputs: int
    stacks: tuple[Stack, ...]
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    """Which rows go to which expert: int32 ``rows`` [count * tile.tokens], ``experts`` [count]; -1 for none."""

    tile: Tile
    count: int
    rows: torch.Tensor
    experts: torch.Tensor


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


def lay_out(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int, inputs: int
) -> Matrix:
    """A matrix [N, K] from what a checkpoint stores of it, on the device where that lies.

    Args:
        packed: int32 [N, ceil(K bits / 32)], a dense bit stream per row. scales: [N, G] floats, positive.
        zeros: uint8 [N, G] or None: 2**(bits - 1); one bit has none, a weight there is scale * (2 * code - 1).
        group: inputs that share a scale, a multiple of 32; 0: all. inputs: K.
    """
    _require(1 <= bits <= 8, f"bits are 1 to 8, not {bits}")
    _require(packed.dtype == torch.int32 and packed.ndim == 2, f"codes are {packed.dtype}, not int32 of two axes")
    rows, words = packed.shape
    _require(inputs > 0 and rows > 0, f"a matrix of {rows} x {inputs} is empty")
    _require(words == -(-inputs * bits // 32), f"{words} words do not hold {inputs} codes of {bits} bits")
    layout.unit_inputs(group)
    _require(group == 0 or inputs % group == 0, f"groups of {group} do not divide {inputs} inputs")
    shape = (rows, inputs // group if group else 1)
    _require(scales.shape == shape, f"scales are {list(scales.shape)}, not {list(shape)}")
    _require(scales.dtype in SCALE_DTYPES, f"scales are {scales.dtype}, not fp16, bf16 or fp32")
    if zeros is not None:
        _require(bits > 1, "one bit has no zeros: a weight is scale * (2 * code - 1)")
        _require(zeros.dtype == torch.uint8 and zeros.shape == shape, f"zeros are not uint8 {list(shape)}")
        _require(zeros.device == packed.device, "zeros lie on another device than codes")
    _require(scales.device == packed.device, "scales lie on another device than codes")
    if bits == 1:  # s (2 q - 1) = 2 s (q - 1/2)
        wide = 2 * scales.float()
        scales = wide.to(scales.dtype) if bool((wide < torch.finfo(scales.dtype).max).all()) else wide
    codes = layout.lay_out(layout.unpack_words(packed, bits, inputs), bits)
    turned = None if zeros is None else zeros.t().contiguous()
    return Matrix(bits, group, rows, inputs, codes, scales.t().contiguous(), turned)


def stack(matrices: Mapping[tuple[int, int], Matrix], parts: int, experts: int) -> tuple[Stack, ...]:
    """Matrices by (part, expert), copied into one stack for each width, group and kind of scale."""
    kinds: dict[tuple, list[tuple[int, int]]] = {}
    for key, matrix in matrices.items():
        _require(0 <= key[0] < parts and 0 <= key[1] < experts, f"there is no part and expert {key}")
        kind = (matrix.bits, matrix.group, matrix.zeros is None, str(matrix.scales.dtype))
        kinds.setdefault(kind, []).append(key)
    return tuple(_stacked([(key, matrices[key]) for key in kinds[kind]], parts, experts) for kind in sorted(kinds))


def _stacked(members: Sequence[tuple[tuple[int, int], Matrix]], parts: int, experts: int) -> Stack:
    first = members[0][1]
    device, found = first.codes.device, [matrix for _, matrix in members]
    _require(all(m.codes.device == device for m in found), "the matrices of a layer lie on several devices")
    slots = torch.full((parts, experts), -1, dtype=torch.int32)
    for number, (key, _) in enumerate(members):
        slots[key] = number
    starts = torch.tensor([[0, 0], *([m.codes.numel(), m.scales.numel()] for m in found)]).cumsum(0)[:-1]
    zero = 0.0 if first.zeros is not None else (0.5 if first.bits == 1 else float(1 << (first.bits - 1)))
    constants = {
        dtype: torch.tensor(layout.constants(first.bits, layout.MANTISSA[str(dtype).removeprefix("torch.")])) + zero
        for dtype in DTYPES
    }
    return Stack(
        first.bits,
        first.group,
        max(m.rows for m in found),
        layout.padded(max(m.inputs for m in found), first.bits),
        torch.cat([m.codes for m in found]),
        torch.cat([m.scales.flatten() for m in found]),
        None if first.zeros is None else torch.cat([m.zeros.flatten() for m in found if m.zeros is not None]),
        slots.to(device),
        starts[:, 0].contiguous().to(device),
        starts[:, 1].contiguous().to(device),
        torch.tensor([[m.rows, m.inputs] for m in found], dtype=torch.int32).to(device),
        {dtype: values.to(device) for dtype, values in constants.items()},
    )


def pack_linear(matrix: Matrix, bias: torch.Tensor | None = None) -> Linear:
    """A linear of its own, such as one of attention."""
    _require(bias is None or bias.shape == (matrix.rows,), f"the bias is not [{matrix.rows}]")
    kept = None if bias is None else bias.float().contiguous()
    return Linear(matrix.rows, matrix.inputs, stack({(0, 0): matrix}, 1, 1), kept)


def pack_layer(
    experts: Sequence[tuple[Matrix, Matrix, Matrix] | None],
    gate: str,
    *,
    biases: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor] | None = None,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Layer:
    """A layer of experts that may differ in width and bits.

    Args:
        experts: gate [F, D], up [F, D], down [D, F] of each; None for one of width 0.
        gate: ``silu``, ``gelu``, ``gelu_tanh`` (act(gate) * up) or ``swiglu`` (gpt-oss, with ``limit``, ``alpha``).
        biases: of gate, up, down of each expert; of down alone for one of width 0.
    """
    _require(gate in GATES, f"the gate is {gate!r}, not one of {', '.join(GATES)}")
    there = [expert for expert in experts if expert is not None]
    _require(bool(there), "a layer without matrices")
    hidden = there[0][0].inputs
    for one, up, down in there:
        shapes = [(m.rows, m.inputs) for m in (one, up, down)]
        wanted = [(one.rows, hidden), (one.rows, hidden), (hidden, one.rows)]
        _require(shapes == wanted, f"an expert's gate, up and down are {shapes}, not {wanted}")
    count, widest, device = len(experts), max(one.rows for one, _, _ in there), there[0][0].codes.device
    whole = [(number, expert) for number, expert in enumerate(experts) if expert is not None]
    upper = {(part, number): expert[part] for number, expert in whole for part in (0, 1)}
    widths = torch.tensor([0 if expert is None else expert[0].rows for expert in experts], dtype=torch.int32)
    upper_bias = lower_bias = None
    if biases is not None:
        _require(len(biases) == count, f"biases of {len(biases)} experts for {count}")
        upper_bias = torch.zeros((count, 2, widest), device=device)
        lower_bias = torch.zeros((count, hidden), device=device)
        for number, given in enumerate(biases):
            if isinstance(given, torch.Tensor):
                _require(experts[number] is None, f"expert {number} has no bias of gate and up")
                lower_bias[number] = given
            else:
                upper_bias[number, 0, : len(given[0])] = given[0]
                upper_bias[number, 1, : len(given[1])] = given[1]
                lower_bias[number] = given[2]
    return Layer(
        hidden,
        widest,
        stack(upper, 2, count),
        stack({(0, number): expert[2] for number, expert in whole}, 1, count),
        widths.to(device),
        gate,
        limit,
        alpha,
        upper_bias,
        lower_bias,
    )


def run_linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """``x`` fp16 or bf16 [..., inputs] to [..., rows]."""
    _check(x, linear.inputs, linear.stacks[0].codes.device)
    flat = x.reshape(-1, linear.inputs)
    tokens = len(flat)
    if not tokens:
        return x.new_empty((*x.shape[:-1], linear.rows))
    y = _multiply(flat, linear.stacks, _all_rows(tokens, x.device), 1, linear.rows, parts=1, rows=tokens, experts=1)
    one = torch.zeros((tokens, 1), dtype=torch.int64, device=x.device)
    width = torch.ones(1, dtype=torch.int32, device=x.device)
    return _combine(y, one, one.float() + 1, width, linear.bias, x.dtype).view(*x.shape[:-1], linear.rows)


def run_layer(x: torch.Tensor, layer: Layer, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over the chosen experts of gate weight x expert output.

    Args:
        x: fp16 or bf16 [T, D]. chosen: int64 [T, k], experts, -1 for one that is skipped; weights: [T, k].

    Returns:
        [T, D] in the dtype of x.
    """
    _check(x, layer.hidden, layer.widths.device)
    experts = len(layer.widths)
    _require(x.ndim == 2, f"x is {list(x.shape)}, not [T, {layer.hidden}]")
    _require(
        chosen.shape == weights.shape and chosen.ndim == 2 and len(chosen) == len(x),
        f"chosen {list(chosen.shape)} and weights {list(weights.shape)} do not belong to x {list(x.shape)}",
    )
    _require(chosen.dtype == torch.int64, f"chosen experts are {chosen.dtype}, not int64")
    _require(chosen.device == x.device == weights.device, "x, chosen and weights lie on several devices")
    if not chosen.numel():
        return torch.zeros_like(x)
    chosen, weights = chosen.contiguous(), weights.float().contiguous()
    pairs, choices = chosen.numel(), chosen.shape[1]
    tiles = _tiles(chosen.flatten(), experts, DECODE if pairs <= DECODE.tokens * experts else prefill_tile(x.device))
    y = _multiply(x, layer.gate_up, tiles, choices, layer.widest, parts=2, rows=pairs, experts=experts)
    h = _gated(y, layer, chosen, x.dtype)
    y = _multiply(h, layer.down, tiles, 1, layer.hidden, parts=1, rows=pairs, experts=experts)
    return _combine(y, chosen, weights, layer.widths, layer.down_bias, x.dtype)


def _check(x: torch.Tensor, inputs: int, device: torch.device) -> None:
    _require(x.dtype in DTYPES, f"x is {x.dtype}; the Triton kernels take float16 and bfloat16")
    _require(x.shape[-1] == inputs, f"x has {x.shape[-1]} inputs for matrices of {inputs}")
    _require(x.device == device, f"x lies on {x.device}, the matrices on {device}")
    _require(
        x.device.type == "cuda" or interpreted(), "the Triton kernels need a GPU, or TRITON_INTERPRET=1 from start"
    )


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

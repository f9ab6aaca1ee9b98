"""Packed matrices gathered for the Triton kernels; torch alone, no Triton, on any device.

``lay_out`` makes a ``Matrix`` of stored tensors, ``pack_layer`` and ``pack_linear`` gather matrices for
``triton_experts``. Both copy: what they are made of may be forgotten.

All functions raise ValueError for arguments that do not fit together, or that the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moezip.kernels import triton_layout as layout

DTYPES = (torch.float16, torch.bfloat16)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GATES = ("silu", "gelu", "gelu_tanh", "clamped")


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

    ``widths`` int32 [E]: inner size of each expert, 0 for one without matrices. ``limit``, ``alpha``: of ``clamped``.
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


def require(fits: bool, what: str) -> None:
    """Raises ValueError(what) unless it fits."""
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
    require(1 <= bits <= 8, f"bits are 1 to 8, not {bits}")
    require(packed.dtype == torch.int32 and packed.ndim == 2, f"codes are {packed.dtype}, not int32 of two axes")
    rows, words = packed.shape
    require(inputs > 0 and rows > 0, f"a matrix of {rows} x {inputs} is empty")
    require(words == -(-inputs * bits // 32), f"{words} words do not hold {inputs} codes of {bits} bits")
    layout.unit_inputs(group)
    require(group == 0 or inputs % group == 0, f"groups of {group} do not divide {inputs} inputs")
    shape = (rows, inputs // group if group else 1)
    require(scales.shape == shape, f"scales are {list(scales.shape)}, not {list(shape)}")
    require(scales.dtype in SCALE_DTYPES, f"scales are {scales.dtype}, not fp16, bf16 or fp32")
    if zeros is not None:
        require(bits > 1, "one bit has no zeros: a weight is scale * (2 * code - 1)")
        require(zeros.dtype == torch.uint8 and zeros.shape == shape, f"zeros are not uint8 {list(shape)}")
        require(zeros.device == packed.device, "zeros lie on another device than codes")
    require(scales.device == packed.device, "scales lie on another device than codes")
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
        require(0 <= key[0] < parts and 0 <= key[1] < experts, f"there is no part and expert {key}")
        kind = (matrix.bits, matrix.group, matrix.zeros is None, str(matrix.scales.dtype))
        kinds.setdefault(kind, []).append(key)
    return tuple(_stacked([(key, matrices[key]) for key in kinds[kind]], parts, experts) for kind in sorted(kinds))


def _stacked(members: Sequence[tuple[tuple[int, int], Matrix]], parts: int, experts: int) -> Stack:
    first = members[0][1]
    device, found = first.codes.device, [matrix for _, matrix in members]
    require(all(m.codes.device == device for m in found), "the matrices of a layer lie on several devices")
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
    require(bias is None or bias.shape == (matrix.rows,), f"the bias is not [{matrix.rows}]")
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
        gate: ``silu``, ``gelu``, ``gelu_tanh`` (act(gate) * up) or ``clamped`` (gpt-oss, with ``limit``, ``alpha``).
        biases: of gate, up, down of each expert; of down alone for one of width 0.
    """
    require(gate in GATES, f"the gate is {gate!r}, not one of {', '.join(GATES)}")
    there = [expert for expert in experts if expert is not None]
    require(bool(there), "a layer without matrices")
    hidden = there[0][0].inputs
    for one, up, down in there:
        shapes = [(m.rows, m.inputs) for m in (one, up, down)]
        wanted = [(one.rows, hidden), (one.rows, hidden), (hidden, one.rows)]
        require(shapes == wanted, f"an expert's gate, up and down are {shapes}, not {wanted}")
    count, widest, device = len(experts), max(one.rows for one, _, _ in there), there[0][0].codes.device
    whole = [(number, expert) for number, expert in enumerate(experts) if expert is not None]
    upper = {(part, number): expert[part] for number, expert in whole for part in (0, 1)}
    widths = torch.tensor([0 if expert is None else expert[0].rows for expert in experts], dtype=torch.int32)
    upper_bias = lower_bias = None
    if biases is not None:
        require(len(biases) == count, f"biases of {len(biases)} experts for {count}")
        upper_bias = torch.zeros((count, 2, widest), device=device)
        lower_bias = torch.zeros((count, hidden), device=device)
        for number, given in enumerate(biases):
            if isinstance(given, torch.Tensor):
                require(experts[number] is None, f"expert {number} has no bias of gate and up")
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

"""Packed matrices on the C++ kernels: from buffers as on disk to the kernels' layout and back, and the calls.

Where the kernels cannot be used a matrix is decoded for every product. That is slower, and said once for every reason.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from moezip.formats.packed import PACKED, SCALE, SHAPE, STEP, ZERO, Grid, pack, torch_dtype, unpack
from moezip.kernels import products, status
from moezip.kernels.products import Laid

# Tokens of one expert, or of a dense layer, from which on decoding and torch's own product in bf16 are faster.
# Measured: at 128 the kernels take 1.4 times as long as that product alone (Zen 5). In fp32 they are faster for any
# number.
CROSSOVER = {torch.bfloat16: 256, torch.float16: 256}
# The same on a processor with a matrix unit for bf16 (AMX), which both then use: at 256 tokens the kernels take 1.5
# times as long as that product, and decoding another 0.8.
CROSSOVER_AMX = {torch.bfloat16: 512}

_told: set[str] = set()


def tell(reason: str) -> None:
    """Warns that packed matrices are decoded for every product, once in a process for every reason."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"{reason}: packed matrices are decoded for every product, which makes a token many times slower",
            RuntimeWarning,
            stacklevel=3,
        )


# -- the layout -------------------------------------------------------------------------------------------------------


def laid_out(
    tensors: Mapping[str, torch.Tensor], grid: Grid, bias: torch.Tensor | None, into: np.ndarray | None = None
) -> Laid | None:
    """A matrix's stored tensors (checked) in the layout of the kernels; None, with a warning, where they cannot run.

    Args:
        bias: of the matrix.
        into: memory for the codes.
    """
    packed = tensors[PACKED]
    if packed.is_meta or packed.device.type == "cuda":  # for which there are kernels of their own
        return None
    if packed.device.type != "cpu":
        tell(f"a packed model is on {packed.device.type}, where moezip has no kernels in use")
        return None
    if not products.available():  # which the kernels have warned of
        return None
    rows, columns = (int(size) for size in tensors[SHAPE])
    zeros = None if grid.symmetric else unpack(tensors[ZERO].t().contiguous(), grid.bits, rows).t().contiguous()
    return products.lay(
        packed.contiguous().numpy(),
        _numbers(tensors[SCALE]),
        None if zeros is None else zeros.numpy(),
        columns,
        grid.bits,
        "U8" if grid.double else grid.scale,  # type: ignore[arg-type]
        steps=tensors[STEP].float().flatten().numpy() if grid.double else None,
        bias=None if bias is None else bias.detach().float().contiguous().numpy(),
        threads=torch.get_num_threads(),
        into=into,
    )


def stored(laid: Laid, grid: Grid) -> dict[str, torch.Tensor]:
    """The inverse: the tensors as they were stored."""
    threads = torch.get_num_threads()
    found = {PACKED: pack(torch.from_numpy(products.codes(laid, threads=threads)), grid.bits)}
    kinds = grid.specs(laid.rows, laid.columns)
    scales = torch.from_numpy(products.per_group(laid, "scales"))
    found[SCALE] = scales.view(torch_dtype(kinds[SCALE][0]))
    if grid.double:
        assert laid.steps is not None
        found[STEP] = torch.from_numpy(laid.steps[: laid.rows, None].copy()).to(torch_dtype(kinds[STEP][0]))
    zeros = products.per_group(laid, "zeros")
    if zeros is not None:
        found[ZERO] = pack(torch.from_numpy(zeros).t().contiguous(), grid.bits).t().contiguous()
    found[SHAPE] = torch.tensor([laid.rows, laid.columns], dtype=torch.int64)
    return found


def weight(laid: Laid, dtype: torch.dtype) -> torch.Tensor:
    """[R, C], the same numbers as ``decoded`` of ``moezip.runtime.linear``; columns are runs of memory."""
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    found = torch.from_numpy(products.plain(laid, dtype=name, threads=torch.get_num_threads()))
    return (found.view(torch.bfloat16) if name == "bfloat16" else found.to(dtype)).t()


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as numpy sees it; numbers of 16 bits as uint16."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


# -- the calls --------------------------------------------------------------------------------------------------------


def can_run(value: torch.Tensor) -> bool:
    """Whether the kernels take such activations; else says why not."""
    if value.device.type != "cpu":
        tell(f"activations are on {value.device.type}, packed matrices on the CPU")
    elif torch.is_grad_enabled() and value.requires_grad:
        tell("gradients are wanted of what packed matrices are multiplied by (torch.no_grad() says that they are not)")
    elif value.dtype in (torch.bfloat16, torch.float32, torch.float16):
        return True
    else:
        tell(f"activations are {value.dtype}")
    return False


def crossover(dtype: torch.dtype) -> int | None:
    """Tokens from which on matrices are better decoded; None: never."""
    usual = CROSSOVER.get(dtype)
    return CROSSOVER_AMX.get(dtype, usual) if usual and status().isa == "amx" else usual


def linear(matrix: products.Linear, value: torch.Tensor, activations: str) -> torch.Tensor:
    """``value`` [..., C] to [..., R], with the bias of the matrix."""
    laid = matrix.laid
    if value.shape[-1] != laid.columns:
        raise ValueError(f"activations of {value.shape[-1]} numbers for a matrix of {laid.columns} columns")
    given = (value.float() if value.dtype == torch.float16 else value).contiguous()
    out = given.new_empty((*value.shape[:-1], laid.rows))
    tokens = given.numel() // laid.columns
    if tokens:
        matrix.run_at(
            given.data_ptr(), given.dtype == torch.bfloat16, tokens, out.data_ptr(), activations,
            torch.get_num_threads(),
        )  # fmt: skip
    return out if out.dtype == value.dtype else out.to(value.dtype)


def experts(
    table: products.Experts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: tuple[str, float, float],
    activations: str,
) -> torch.Tensor:
    """Sum over the chosen experts: ``hidden`` [T, D], ids and weights [T, k]; [T, D].

    Ids below 0 are left out, and the number of experts, which is run-time skipping's nobody.
    """
    if hidden.shape[-1] != table.hidden or ids.shape != weights.shape or hidden.shape[:-1] != ids.shape[:-1]:
        raise ValueError(
            f"activations {list(hidden.shape)}, ids {list(ids.shape)} and weights {list(weights.shape)} do not belong "
            f"to experts of {table.hidden} columns"
        )
    given = (hidden.float() if hidden.dtype == torch.float16 else hidden).detach().contiguous()
    halves = weights.dtype == torch.bfloat16
    weights = (weights if halves else weights.to(torch.float32)).detach().contiguous()
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty_like(given)
    if given.numel():
        table.run_at(
            given.data_ptr(), given.dtype == torch.bfloat16, given.numel() // table.hidden, ids.data_ptr(),
            weights.data_ptr(), halves, ids.shape[-1], out.data_ptr(), gate, activations, torch.get_num_threads(),
        )  # fmt: skip
    return out if out.dtype == hidden.dtype else out.to(hidden.dtype)


# -- torch.compile ----------------------------------------------------------------------------------------------------
#
# Graphs cannot hold a matrix that is no tensor: they hold a number, and the number leads to the module.

_modules: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers_left = itertools.count()


def number_of(module: Any) -> int:
    """A number by which the operators below find a module, as long as it lives."""
    number = next(_numbers_left)
    _modules[number] = module
    return number


@torch.library.custom_op("moezip::packed_linear", mutates_args=())
def packed_linear_op(value: torch.Tensor, module: int, rows: int) -> torch.Tensor:
    """``PackedLinear`` number ``module``, of ``rows`` outputs, on ``value`` [..., C]."""
    run: Callable[..., torch.Tensor] = _modules[module].run
    return run(value)


@packed_linear_op.register_fake
def _(value: torch.Tensor, module: int, rows: int) -> torch.Tensor:
    return value.new_empty((*value.shape[:-1], rows))


@torch.library.custom_op("moezip::packed_experts", mutates_args=())
def packed_experts_op(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, module: int) -> torch.Tensor:
    """``PackedExperts`` number ``module`` on ``hidden`` [T, D]."""
    run: Callable[..., torch.Tensor] = _modules[module].run
    return run(hidden, ids, weights)


@packed_experts_op.register_fake
def _(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, module: int) -> torch.Tensor:
    return torch.empty_like(hidden)

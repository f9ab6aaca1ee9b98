"""Matrices that stay packed in memory, and the modules that multiply by them.

On the CPU they are laid out for the C++ kernels once, and multiplied as they are (``moezip.runtime.fast``); on a GPU
for the Triton kernels (``moezip.runtime.gpu``). Where that cannot be, and for so many tokens that torch's own product
is faster all in all, one is decoded, multiplied and forgotten.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.arch.ragged import Matrix, RaggedExperts
from moezip.errors import UsageError
from moezip.formats.packed import PACKED, SHAPE, WORD, ZERO, Grid, check, dequantize, torch_dtype, unpacked, words
from moezip.formats.stored import CHUNK
from moezip.kernels import products
from moezip.runtime import fast, gpu, int4
from moezip.runtime.gates import gate_of
from moezip.runtime.mapped import Range, give_back


def packed_linear(
    value: torch.Tensor, tensors: Mapping[str, torch.Tensor], grid: Grid, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``value`` [..., C] times a packed matrix [R, C]: [..., R] in the dtype of ``value``.

    Args:
        tensors: by suffix, as ``moezip.formats.packed`` stores them; checked once, when they were loaded.
    """
    return F.linear(value, decoded(tensors, grid, value.dtype), bias)


def packed_rows(value: torch.Tensor, matrices: Sequence[Packed | Matrix], bias: torch.Tensor | None) -> torch.Tensor:
    """``value`` [n, C] times matrices of as many columns, one above the other: [n, sum of R].

    Gate and up of an expert are multiplied by as one, because that is how they are where nothing is packed, and two
    products may round otherwise.
    """
    if int4.can_run(value, matrices):
        parts = [int4.product(value, matrix) for matrix in matrices]  # type: ignore[arg-type]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return found if bias is None else found + bias
    weights = [matrix.decoded(value.dtype) if isinstance(matrix, Packed) else matrix.weight for matrix in matrices]
    return F.linear(value, weights[0] if len(weights) == 1 else torch.cat(weights), bias)


def decoded(tensors: Mapping[str, torch.Tensor], grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """[R, C] in ``dtype``: computed in float32 and rounded once, large matrices in pieces of rows."""
    rows, columns = tensors[PACKED].shape[0], int(tensors[SHAPE][1])
    step = max(1, CHUNK // (4 * columns * WORD)) * WORD  # the zeros of 32 rows fill whole words
    if rows <= step:
        return dequantize(unpacked(tensors, grid), dtype)
    whole = torch.empty((rows, columns), dtype=dtype, device=tensors[PACKED].device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}
        part[SHAPE] = torch.tensor([stop - start, columns])
        if ZERO in tensors:
            part[ZERO] = tensors[ZERO][start * grid.bits // WORD : words(stop, grid.bits)]
        whole[start:stop] = dequantize(unpacked(part, grid), dtype)
    return whole


_laying_out = Lock()
# Bytes of a layer's codes that may be in memory in both forms while they are laid out.
TWICE = 16 * 2**20
# What calibration hangs on an experts module that it wants more of than outputs (``moezip.calibrate.experts``).
WATCHERS = ("_moezip_taken", "_moezip_trace", "_moezip_routed")


class Packed(nn.Module):
    """Holds one matrix [R, C] as packed codes, and one ``bias`` [R] or None.

    The codes are in buffers named as on disk, or, once they were laid out for the kernels, there alone; a
    ``state_dict`` has them as on disk in both cases. They keep their dtypes whatever the module is cast to: the scales
    say what the codes stand for.

    Args:
        grid: of the codes. rows, columns: R, C.
        bias: of the matrix that it replaces.
        device: of the buffers.
    """

    bias: nn.Parameter | None
    # What products round activations to: "exact", or "int8" (``moezip.kernels.products``).
    activations: products.Activations = "exact"
    int4: int4.Laid | None = None  # as torch takes it, where there is no library

    def __init__(self, grid: Grid, rows: int, columns: int, bias: nn.Parameter | None, device: torch.device):
        super().__init__()
        self.grid, self.rows, self.columns = grid, rows, columns
        self.matrix: products.Linear | None = None
        self.number = fast.number_of(self)
        for suffix, (dtype, shape) in grid.specs(rows, columns).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=torch_dtype(dtype), device=device))
        self.register_parameter("bias", bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.number = fast.number_of(self)  # a copy's own

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, {self.grid}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix."""
        if self.matrix is not None:
            return fast.stored(self.matrix.laid, self.grid)
        return {suffix: buffer for suffix, buffer in self._buffers.items() if buffer is not None}

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights [R, C]."""
        if self.matrix is not None:
            return fast.weight(self.matrix.laid, dtype)
        return decoded(self.tensors(), self.grid, dtype)

    def require_sound(self, where: str) -> None:
        """Raises CheckpointError if the stored tensors cannot be those of this matrix."""
        check(self.tensors(), self.grid, where)

    # -- the kernels' layout ----------------------------------------------------------------------------------

    @property
    def code_bytes(self) -> int:
        """Memory of the codes in the layout of the kernels."""
        return products.code_bytes(self.rows, self.columns, self.grid.groups(self.columns), self.grid.bits)

    def lay_out(self, into: Any = None) -> bool:
        """Brings the codes into the layout of the kernels, if these can run; whether it did, now or before.

        Args:
            into: memory for them, an array of ``code_bytes``. Whoever gives it gives back what ``memory`` said before.
        """
        held = self.memory() if into is None else []
        with _laying_out:  # several threads may run the model first; one of them lays out
            if self.matrix is None:
                laid = fast.laid_out(self.tensors(), self.grid, self.bias, into)
                if laid is None:
                    return False
                self.matrix = products.Linear(laid)
                for suffix in self._buffers:
                    self._buffers[suffix] = None
        give_back(held)
        return True

    def memory(self) -> list[Range]:
        """Where the buffers are."""
        held = [buffer for buffer in self._buffers.values() if buffer is not None and buffer.device.type == "cpu"]
        return [(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in held]

    def _take_back(self) -> None:
        """The inverse."""
        self.int4 = None
        if self.matrix is not None:
            for suffix, tensor in self.tensors().items():
                self._buffers[suffix] = tensor
            self.matrix = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self.matrix is not None:
            destination.update({prefix + suffix: tensor for suffix, tensor in self.tensors().items()})

    def _load_from_state_dict(self, *given: Any) -> None:
        self._take_back()
        super()._load_from_state_dict(*given)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Packed:
        self._take_back()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class PackedLinear(Packed):
    """A packed matrix in the place of an ``nn.Linear``."""

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` [..., C] to [..., R]."""
        if torch.compiler.is_compiling():
            result: torch.Tensor = fast.packed_linear_op(value, self.number, self.rows)
            return result
        return self.run(value)

    def run(self, value: torch.Tensor) -> torch.Tensor:
        """As ``forward``, whoever calls."""
        if gpu.is_for(value):
            found = gpu.linear_forward(self, value)
            return packed_rows(value, [self], self.bias) if found is None else found
        if (self.matrix is not None or self.lay_out()) and fast.can_run(value):
            most = fast.crossover(value.dtype)
            if self.activations == "int8" or most is None or value.numel() // self.columns < most:
                assert self.matrix is not None
                return fast.linear(self.matrix, value, self.activations)
        return packed_rows(value, [self], self.bias)


class PackedExperts(RaggedExperts):
    """``RaggedExperts`` some of whose matrices are ``Packed``.

    Those of an expert whose matrices all are run on the kernels, all in one call. Others, and those that get so many
    tokens that torch's own product is faster, are decoded one expert at a time.
    """

    activations: products.Activations = "exact"

    def __init__(self, stock: Any, *given: Any, **kind: Any):
        super().__init__(stock, *given, **kind)
        self._gate = gate_of(stock)
        self.number = fast.number_of(self)
        self._table: products.Experts | None = None
        self._apart: frozenset[int] = frozenset()  # experts that the table has not

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.number = fast.number_of(self)

    def lay_out(self) -> bool:
        """Lays out all matrices; whether there is a table to run on, now or before."""
        if self._table is not None:
            return True
        packed = [module for module in self.modules() if isinstance(module, Packed)]
        waiting = [module for module in packed if module.matrix is None]
        piece = products.memory(sum(module.code_bytes for module in waiting))  # touched as it is filled
        held: list[Range] = []
        for module in waiting:
            held += module.memory()
            if not module.lay_out(piece[: module.code_bytes]):
                return False
            piece = piece[module.code_bytes :]
            if sum(stop - start for start, stop in held) >= TWICE or module is waiting[-1]:
                give_back(held)
                held = []
        if not packed:
            return False
        if self._gate is None:
            fast.tell(f"the kernels do not know how {type(self._gating).__name__} joins gate and up")
            return False
        with _laying_out:
            if self._table is None:
                self._make_table()
        return self._table is not None

    def _make_table(self) -> None:
        every: list[Any] = []
        constants: list[Any] = []
        apart = []
        for expert, width in enumerate(self.widths):
            matrices = [self.matrix(expert, role) for role in ("gate", "up", "down")] if width else []
            whole = bool(width) and all(isinstance(matrix, Packed) for matrix in matrices)
            every.append(tuple(matrix.matrix.laid for matrix in matrices) if whole else None)
            constant = None if width or not self.has_bias else self.matrix(expert, "down").bias
            constants.append(None if constant is None else constant.detach().float().contiguous().numpy())
            if width and not whole:
                apart.append(expert)
        try:
            self._table = products.Experts(every, self.hidden_dim, constants)
        except ValueError as error:
            fast.tell(str(error))
            return
        self._apart = frozenset(apart)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedExperts:
        self._table = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        self._table = None
        super()._load_from_state_dict(*given)  # type: ignore[no-untyped-call]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As of ``RaggedExperts``; what is rounded in between is fp32 here."""
        if torch.compiler.is_compiling():
            result: torch.Tensor = fast.packed_experts_op(hidden_states, top_k_index, top_k_weights, self.number)
            return result
        return self.run(hidden_states, top_k_index, top_k_weights)

    def run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """As ``forward``, whoever calls."""
        own = self.__dict__
        watched = any(own.get(name) is not None for name in WATCHERS)
        if not watched and gpu.is_for(hidden_states):
            meant = self._meant(top_k_index).clamp(max=self.num_experts - 1)  # nobody's gates are 0
            found = gpu.experts_forward(self, hidden_states, meant, top_k_weights)
            return super().forward(hidden_states, top_k_index, top_k_weights) if found is None else found
        if watched or not fast.can_run(hidden_states) or not self.lay_out():
            return super().forward(hidden_states, top_k_index, top_k_weights)
        top_k_index = self._meant(top_k_index)
        assert self._table is not None and self._gate is not None
        apart, ids = self._apart | self._crowded(top_k_index, hidden_states.dtype), top_k_index
        if apart:
            others = torch.isin(ids, torch.tensor(sorted(apart), dtype=ids.dtype))
            ids = ids.masked_fill(others, -1)
        result = fast.experts(self._table, hidden_states, ids, top_k_weights, self._gate, self.activations)
        return self._add_decoded(result, apart, hidden_states, top_k_index, top_k_weights)

    def _meant(self, ids: torch.Tensor) -> torch.Tensor:
        """The experts that rows of the router stand for: merged ones have several."""
        return ids if self._remap is None else self._remap.to(ids.device)[ids]

    def _crowded(self, ids: torch.Tensor, dtype: torch.dtype) -> frozenset[int]:
        """Experts with so many tokens that they are faster decoded."""
        most = fast.crossover(dtype)
        if most is None or self.activations == "int8" or ids.shape[0] < most:
            return frozenset()
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts)[: self.num_experts].tolist()
        return frozenset(e for e, count in enumerate(counts) if count >= most and self.widths[e])

    def _add_decoded(
        self,
        result: torch.Tensor,
        apart: frozenset[int],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """``result`` and what the experts ``apart`` make of their tokens."""
        if not apart:
            return result
        total = result.float()
        for expert in sorted(apart):
            token, place = torch.where(top_k_index == expert)
            if not len(token):
                continue
            inner = self._apply_gate(self.expert_linear("gate_up_proj", expert, hidden_states[token]))
            out = self.expert_linear("down_proj", expert, inner)
            total.index_add_(0, token, out.float() * top_k_weights[token, place, None].float())
        return total.to(result.dtype)

    def expert_linear(self, name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
        if not self.widths[expert]:
            return super().expert_linear(name, expert, value)
        roles = ("gate", "up") if name == "gate_up_proj" else ("down",)
        matrices = [self.matrix(expert, role) for role in roles]
        if not any(isinstance(matrix, Packed) for matrix in matrices):
            return super().expert_linear(name, expert, value)
        return packed_rows(value, matrices, self._bias(name, expert) if self.has_bias else None)


def set_activations(model: nn.Module, activations: str) -> None:
    """What the packed matrices of a model round their inputs to: ``exact``, or ``int8``, which is faster and coarser.

    Raises:
        UsageError: neither.
    """
    if activations not in ("exact", "int8"):
        raise UsageError(f"activations are exact or int8, not {activations!r}", where="activations")
    for module in model.modules():
        if isinstance(module, Packed | PackedExperts):
            module.activations = activations  # type: ignore[assignment]

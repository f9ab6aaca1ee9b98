"""Models whose experts stay on disk and are read as they are used, into a cache of bounded size.

Everything else is in memory. Experts are run as ``moezip.load`` runs them in memory, one expert at a time, so that a
cache of one is enough; packed ones on the C++ kernels, all experts of a call that fit into the cache at once.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.arch.matrices import fused_part
from moezip.arch.packing import stem
from moezip.arch.ragged import Expert, Matrix, RaggedExperts
from moezip.arch.skeleton import Fill
from moezip.calibrate.experts import IMPLEMENTATION, expert_output, padded_rows
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError, CheckpointError
from moezip.kernels import products
from moezip.runtime import fast
from moezip.runtime.linear import Packed, PackedExperts
from moezip.runtime.pages import Pages

# Rows and columns that the kernels' layout fills up to whole blocks of, with zeros.
_BLOCK, _UNIT = products.BLOCK, products.UNIT
COPY = "copy the folder that the model was loaded from, or load it with experts='ram'"


# -- running ----------------------------------------------------------------------------------------------------------


class PagedExperts(nn.Module):
    """The experts of one layer, on disk. Called like the experts modules of transformers.

    Args:
        layer: number of the decoder layer. pages: shared by all layers. experts: E.
    """

    def __init__(self, layer: int, pages: Pages, config: Any, experts: int):
        super().__init__()
        self.layer, self.pages, self.config = layer, pages, config
        self.num_experts = self.nobody = experts  # nobody: see ``RaggedExperts``

    def size(self, expert: int) -> int:
        """Bytes that an expert takes in memory; 0 for one that has no tensors."""
        raise NotImplementedError

    def read(self, expert: int) -> Any:
        """An expert from disk."""
        raise NotImplementedError

    @torch.compiler.disable  # what is in memory changes from call to call, which no graph can hold
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the chosen experts of gate weight x expert output.

        Args:
            hidden_states: [T, D]. top_k_index, top_k_weights: [T, k], from the model's own router.

        Returns:
            [T, D].

        Raises:
            ArchitectureError: the model was moved to another device, or to a dtype that the experts do not have.
            CheckpointError: the files were changed.
        """
        if hidden_states.device.type != "cpu":
            raise ArchitectureError(
                f"experts that stay on disk run on the CPU, the rest of the model is on {hidden_states.device}",
                next="move the model back, or load it with experts='ram'",
            )
        return self.run(hidden_states, top_k_index, top_k_weights)

    def run(self, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As ``forward``."""
        tokens, top_k = ids.shape
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        given = hidden[order // top_k]
        outputs = torch.zeros_like(given)
        parts: dict[int, tuple[int, int]] = {}
        start = 0
        for expert, count in enumerate(torch.bincount(flat).tolist()):
            if count and self.size(expert):
                parts[expert] = start, start + count
            start += count
        for expert in self.pages.held_first(self.layer, list(parts)):
            begin, end = parts[expert]
            outputs[begin:end] = self.expert_output(expert, given, begin, end)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel())
        chosen = outputs[places].view(tokens, top_k, -1)
        return (chosen * gates[..., None]).sum(dim=1).to(hidden.dtype)

    def expert_output(self, expert: int, given: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """What an expert makes of its tokens, rows ``begin`` to ``end`` of ``given`` [n, D]: [end - begin, D]."""
        raise NotImplementedError

    def lend(self, expert: int, keep: Iterable[int] = ()) -> Any:
        """An expert, read if need be."""
        return self.pages.lend((self.layer, expert), self.size(expert), lambda: self.read(expert), tuple(keep))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise CheckpointError("the experts of this model are on disk, so there is no whole state to save", next=COPY)

    def _require_dtype(self, given: torch.Tensor, weight: torch.Tensor) -> None:
        if given.dtype != weight.dtype:
            raise ArchitectureError(
                f"activations are {given.dtype}, the experts are read as {weight.dtype}",
                next="choose the dtype as the model is loaded: moezip.load(..., dtype=...)",
            )


class StockPaged(PagedExperts):
    """Experts that are all alike and not packed, run as transformers' ``grouped_mm`` runs them.

    Args:
        stock: the module that it replaces, on the meta device, for its gate and the flags that say how weights lie.
        fills: by the module's parameters, the stored tensors that they are made of.
        dtypes: of the parameters.
        source: plain tensors.
    """

    def __init__(
        self,
        layer: int,
        pages: Pages,
        stock: Any,
        fills: Mapping[str, list[Fill]],
        dtypes: Mapping[str, torch.dtype],
        source: Source,
    ):
        super().__init__(layer, pages, stock.config, stock.num_experts)
        # not as a child, whose parameters would be this model's
        self._stock: Callable[[], Any] = lambda: stock
        self._source, self._dtypes = source, dict(dtypes)
        self._shapes = {leaf: tuple(parameter.shape[1:]) for leaf, parameter in stock.named_parameters(recurse=False)}
        self._fills: dict[str, dict[int | None, list[Fill]]] = {}
        for leaf, each in fills.items():
            for fill in each:
                self._fills.setdefault(leaf, {}).setdefault(fill.expert, []).append(fill)
        self._size = sum(torch.Size(shape).numel() * dtypes[leaf].itemsize for leaf, shape in self._shapes.items())

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts on disk"

    def size(self, expert: int) -> int:
        return self._size if expert < self.num_experts else 0

    def read(self, expert: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for leaf, shape in self._shapes.items():
            whole = torch.empty((1, *shape), dtype=self._dtypes[leaf])
            rows = self._fills[leaf]
            for fill in rows.get(expert, rows.get(None, [])):
                if fill.tensor is None:  # one stored tensor of all experts
                    whole.copy_(self._source.read(fill.name, range(expert, expert + 1)))
                else:
                    fused_part(self._stock(), fill.tensor.role, 0, whole).copy_(self._source.read(fill.name))
            found[leaf] = whole[0]
        return found

    def expert_output(self, expert: int, given: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        held, stock = self.lend(expert), self._stock()
        self._require_dtype(given, held["down_proj"])
        if self.config._experts_implementation == IMPLEMENTATION:  # run-time skipping's

            def linear(name: str, _: int, value: torch.Tensor) -> torch.Tensor:
                weight = held[name]
                return F.linear(value, weight.T if stock.is_transposed else weight, held.get(f"{name}_bias"))

            module = SimpleNamespace(has_gate=True, expert_linear=linear, _apply_gate=stock._apply_gate)
            return expert_output(module, expert, _filled_up(given, begin, end))[: end - begin]

        def product(value: torch.Tensor, name: str) -> torch.Tensor:
            weight = held[name]
            out = torch.mm(value, weight if stock.is_transposed else weight.T)
            return out.add_(held[f"{name}_bias"]) if stock.has_bias else out

        result: torch.Tensor = product(stock._apply_gate(product(given[begin:end], "gate_up_proj")), "down_proj")
        return result


class RaggedPaged(PagedExperts):
    """Experts of different widths, or packed ones.

    Args:
        template: the layer's experts module on the meta device.
        sources: by the modules' names inside it, the stored tensors that they are made of: those of its parameters and
            buffers, by their own names.
        plain, source: the checkpoint decoded, for what is not packed, and as it is, for codes.
        dtypes: of parameters, by their names inside the template.
    """

    def __init__(
        self,
        layer: int,
        pages: Pages,
        template: RaggedExperts,
        names: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
        plain: Source,
        source: Source,
    ):
        super().__init__(layer, pages, template.config, template.num_experts)
        self.nobody = template.nobody
        self.template: Callable[[], RaggedExperts] = lambda: template
        self._packed = isinstance(template, PackedExperts)
        self._names, self._dtypes, self._plain, self._source = dict(names), dict(dtypes), plain, source
        self._sizes = {int(name): self._size(name, child) for name, child in template.named_children()}

    def extra_repr(self) -> str:
        return f"{self.template().extra_repr()}, on disk"

    def size(self, expert: int) -> int:
        return self._sizes.get(expert, 0)

    def _size(self, name: str, expert: nn.Module) -> int:
        found = sum(
            parameter.numel() * self._dtypes[f"{name}.{path}"].itemsize for path, parameter in expert.named_parameters()
        )  # fmt: skip
        return found + sum(packed_bytes(matrix) for matrix in expert.children() if isinstance(matrix, Packed))

    # -- disk -----------------------------------------------------------------------------------------------

    def read(self, expert: int) -> Expert:
        """
        Raises:
            CheckpointError: codes that cannot be those of the matrix.
        """
        made = Expert()
        for role, matrix in getattr(self.template(), str(expert)).named_children():
            path = f"{expert}.{role}"
            made.add_module(
                role, self._codes(path, matrix) if isinstance(matrix, Packed) else self._matrix(path, matrix)
            )
        self._join(made, expert)
        for role, matrix in made.named_children():
            if isinstance(matrix, Packed):
                matrix.require_sound(self._names[f"{expert}.{role}.weight"])
                # memory of our own to lay out into, as what was read is no mapped file that would be given back: asking
                # the system where files are mapped takes 2 ms, most of what reading an expert took
                matrix.lay_out(products.memory(matrix.code_bytes))
        return made

    def _value(self, path: str) -> torch.Tensor:
        return self._plain.read(self._names[path]).to(self._dtypes[path])

    def _codes(self, path: str, matrix: Packed) -> Packed:
        bias = None if matrix.bias is None else nn.Parameter(self._value(f"{path}.bias"), requires_grad=False)
        made = Packed(matrix.grid, matrix.rows, matrix.columns, bias, torch.device("meta"))
        for suffix in made._buffers:
            made._buffers[suffix] = self._source.read(stem(self._names[f"{path}.weight"]) + suffix)
        return made

    def _matrix(self, path: str, matrix: Any) -> Matrix:
        made = Matrix(0, 0, False)
        for leaf, _ in matrix.named_parameters():
            made.register_parameter(leaf, nn.Parameter(self._value(f"{path}.{leaf}"), requires_grad=False))
        return made

    def _join(self, made: Expert, expert: int) -> None:
        """Gate and up as neighbours, each matrix aligned: as ``RaggedExperts.join``."""
        width = self.template().widths[expert]
        if width:
            view = self._view({expert: made})
            view.widths = tuple(width if each == expert else 0 for each in range(self.num_experts))
            RaggedExperts.join(view)

    # -- running --------------------------------------------------------------------------------------------

    def run(self, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        template: Any = self.template()
        if template._remap is not None:
            ids = template._remap[ids]
        if self._packed and template._gate is not None and fast.can_run(hidden) and products.available():
            return self._on_kernels(hidden, ids, gates)
        return super().run(hidden, ids, gates)

    def expert_output(self, expert: int, given: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        view = self._view({expert: self.lend(expert)})
        for matrix in getattr(view, str(expert)).children():
            if isinstance(matrix, Matrix) and matrix.weight is not None:
                self._require_dtype(given, matrix.weight)
        return expert_output(view, expert, _filled_up(given, begin, end))[: end - begin]

    def _on_kernels(self, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """All experts in one call of the kernels; if the cache cannot hold them at once, in several, and their sum."""
        total: torch.Tensor | None = None
        batches = list(self._batches([expert for expert in ids.unique().tolist() if self.size(expert)]))
        for batch in batches or [[]]:
            lent: dict[int, Expert] = {}
            for expert in batch:
                lent[expert] = self.lend(expert, batch)
            view: Any = self._view(lent)
            view.widths = tuple(width if e in lent else 0 for e, width in enumerate(view.widths))
            if batch and not view.lay_out():
                del view, lent
                return super().run(hidden, ids, gates)
            if len(batches) <= 1:
                return view.run(hidden, ids, gates) if batch else torch.zeros_like(hidden)
            here = torch.isin(ids, torch.tensor(batch, dtype=ids.dtype))
            part = view.run(hidden, ids.where(here, view.nobody), gates).float()
            total = part if total is None else total.add_(part)
            del view, lent
        assert total is not None
        return total.to(hidden.dtype)

    def _batches(self, experts: list[int]) -> Iterator[list[int]]:
        """Runs of experts that fit into the cache together, those that are there first."""
        batch: list[int] = []
        for expert in self.pages.held_first(self.layer, experts):
            if batch and sum(map(self.size, batch)) + self.size(expert) > self.pages.limit:
                yield batch
                batch = []
            batch.append(expert)
        if batch:
            yield batch

    def _view(self, lent: Mapping[int, nn.Module]) -> RaggedExperts:
        """The template with these experts alone."""
        view: Any = copy.copy(self.template())
        view.__dict__["_modules"] = {str(expert): module for expert, module in lent.items()}
        view._remap, view.nobody = None, self.num_experts  # ids are experts' own by now
        if self._packed:
            view.__dict__.update(_table=None, _apart=frozenset())
        return view  # type: ignore[no-any-return]


class LentExperts(PackedExperts):
    """``PackedExperts`` of which some are not there."""

    def matrix(self, expert: int, role: str) -> Any:
        return super().matrix(expert, role) if str(expert) in self._modules else _NOTHING


def _filled_up(given: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """An expert's rows and some of the next one's, as ``moezip.calibrate.experts`` takes them for experts in memory."""
    return given[begin : begin + padded_rows(end - begin)]


_NOTHING = SimpleNamespace(weight=None, bias=None)


def packed_bytes(matrix: Packed) -> int:
    """Most bytes that the codes of a matrix take in memory, laid out for the kernels or as on disk."""
    grid, groups = matrix.grid, matrix.grid.groups(matrix.columns)
    rows = -(-matrix.rows // _BLOCK) * _BLOCK
    columns = groups * -(-(matrix.columns // groups) // _UNIT) * _UNIT
    scale = 1 if grid.double else 4 if grid.scale == "F32" else 2
    laid = rows * columns * grid.bits // 8 + rows * groups * (scale + (not grid.symmetric))
    laid += rows * 4 * (grid.double + (matrix.bias is not None))
    return max(laid, grid.nbytes(matrix.rows, matrix.columns))

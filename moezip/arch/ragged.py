"""Experts of different widths in one module, and models made of such modules.

This module imports torch, so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.arch.layout import TRIPWIRE_SHAPE, Layout, tripwire
from moezip.arch.spec import Architecture
from moezip.errors import ArchitectureError

# What transformers' "experts implementation" may be set to: the plain loop below, and moezip's own.
IMPLEMENTATIONS = ("eager", "moezip")
# Matrix products round the last bit differently at other addresses, and are slower there.
ALIGNED = 64
# How the modules of transformers call the number of experts.
COUNTS = ("num_experts", "out_features")


class Matrix(nn.Module):
    """Holds one ``weight`` [rows, columns], None if that is empty, and one ``bias`` [rows], None where there is none.

    No ``nn.Linear``, because it is not called: whoever wraps Linears would wrap in vain.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, bias: bool, **kind: Any):
        super().__init__()
        whole = rows and columns
        self.register_parameter("weight", nn.Parameter(torch.empty(rows, columns, **kind)) if whole else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(rows, **kind)) if bias and rows else None)


class Expert(nn.Module):
    """Three matrices under the names they have on disk; the last alone where an expert of width 0 has a bias."""


class RaggedExperts(nn.Module):
    """The experts of one layer, each as wide as it is. Called like the experts modules of transformers.

    Parameters are named as on disk, ``<expert>.<gate_proj>.weight``; an expert of width 0 has no weights. The gate with
    its activation is that of the module that it replaces, and the flags are the ones by which moezip's experts
    implementation tells how to run it.

    Args:
        stock: the module that it replaces, for its biases, gate and config.
        widths: inner size of every expert.
        remap: for every row of the router the expert that it means; None where each means its own.
        names: the child that holds the matrix of each role: ``gate``, ``up``, ``down``.
        hidden: D.
        kind: ``dtype`` and ``device`` of the parameters.
    """

    def __init__(
        self,
        stock: Any,
        widths: tuple[int, ...],
        names: Mapping[str, str],
        hidden: int,
        remap: tuple[int, ...] | None = None,
        **kind: Any,
    ):
        super().__init__()
        self.config = stock.config
        # no buffer: it is of the config, and models are built on the meta device; its last entry is for ``nobody``
        self._remap = None if remap is None else torch.tensor((*remap, len(widths)), device="cpu")
        # The id that run-time skipping puts in place of an expert that is not to run.
        self.nobody = len(widths) if remap is None else len(remap)
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = True, stock.has_bias, False, True
        self.has_post_expert_norm = self._is_expert_parallel = False
        # A method of the stock module, which thereby stays: without memory, being on the meta device. Some gates take
        # gate and up channels in turns, as their weights are published.
        self._gating: Callable[[torch.Tensor], torch.Tensor] = stock._apply_gate
        self._in_turns = not stock.is_concatenated
        self.num_experts, self.hidden_dim, self.widths = len(widths), hidden, widths
        self.intermediate_dim = max(widths)
        self._names = dict(names)
        for number, width in enumerate(widths):
            if width or self.has_bias:
                expert = Expert()
                for role in ("gate", "up", "down") if width else ("down",):
                    shape = (hidden, width) if role == "down" else (width, hidden)
                    expert.add_module(names[role], Matrix(*shape, self.has_bias, **kind))
                self.add_module(str(number), expert)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, widths {min(self.widths)} to {max(self.widths)}"

    def matrix(self, expert: int, role: str) -> Any:
        """What holds the ``gate``, ``up`` or ``down`` matrix of an expert whose width is not 0: a ``Matrix``."""
        return getattr(getattr(self, str(expert)), self._names[role])

    @property
    def down_proj_bias(self) -> list[torch.Tensor | None]:
        """By expert: [D], what it outputs whatever its input; None where the family has no biases."""
        return [self.matrix(e, "down").bias if self.has_bias else None for e in range(self.num_experts)]

    # -- running --------------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the chosen experts of gate weight x expert output.

        Args:
            hidden_states: [T, D]. top_k_index, top_k_weights: [T, k], from the model's own router.

        Returns:
            [T, D].
        """
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if self._remap is not None:
            if self._remap.device != top_k_index.device:
                self._remap = self._remap.to(top_k_index.device)
            # gates of rows that mean the same expert add up, as that expert's output is added once for each
            top_k_index = self._remap[top_k_index]
        name = self.config._experts_implementation
        if name not in IMPLEMENTATIONS:
            raise ArchitectureError(
                f"the experts implementation {name!r} needs experts of one width; these differ",
                next=f"use {' or '.join(IMPLEMENTATIONS)}",
            )
        run = ALL_EXPERTS_FUNCTIONS.get_interface(name, RaggedExperts.plain)
        result: torch.Tensor = run(self, hidden_states, top_k_index, top_k_weights)
        return result

    def plain(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One expert after the other, operations in the order of the ``eager`` code of transformers."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts or (not self.widths[expert] and not self.has_bias):  # the first is nobody
                continue
            place, token = torch.where((top_k_index == expert).T)
            inner = self._apply_gate(self.expert_linear("gate_up_proj", expert, hidden_states[token]))
            out = self.expert_linear("down_proj", expert, inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result

    def expert_linear(self, name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
        """``value`` times an expert's ``gate_up_proj`` (gate channels, then up) or ``down_proj``, with bias."""
        if not self.widths[expert]:  # products with empty matrices, which gradients pass through
            weight = value.new_empty((0, self.hidden_dim) if name == "gate_up_proj" else (self.hidden_dim, 0))
        elif name == "gate_up_proj":
            weight = self._gate_up(expert)
        else:
            weight = self.matrix(expert, "down").weight
        return F.linear(value, weight, self._bias(name, expert) if self.has_bias else None)

    def _bias(self, name: str, expert: int) -> torch.Tensor | None:
        if name == "down_proj":
            return self.matrix(expert, "down").bias
        if not self.widths[expert]:
            return None
        both = (self.matrix(expert, role).bias for role in ("gate", "up"))
        return torch.cat([bias for bias in both if bias is not None])

    def _gate_up(self, expert: int) -> torch.Tensor:
        """Gate and up as one matrix [2w, D]: without a copy where they are neighbours in memory."""
        gate, up = self.matrix(expert, "gate").weight, self.matrix(expert, "up").weight
        if neighbours(gate, up) and not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
            return gate.detach().as_strided((2 * gate.shape[0], gate.shape[1]), gate.stride())
        return torch.cat([gate, up])

    def _apply_gate(self, inner: torch.Tensor) -> torch.Tensor:
        """[n, w] of gate channels, then up channels, [n, 2w]."""
        if self._in_turns:
            inner = torch.stack(inner.chunk(2, dim=-1), dim=-1).flatten(-2)
        return self._gating(inner)

    # -- memory ---------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Makes gate and up of every expert neighbours in memory, and every matrix aligned. Values stay as they are.

        To be called after parameters were replaced; at most one expert is in memory twice.
        """
        for expert, width in enumerate(self.widths):
            if not width:
                continue
            gate, up, down = (self.matrix(expert, role) for role in ("gate", "up", "down"))
            plain = [matrix for matrix in (gate, up, down) if isinstance(matrix, Matrix)]
            if any(matrix.weight.is_meta for matrix in plain):
                continue
            if gate in plain and up in plain and not neighbours(gate.weight, up.weight):
                both = torch.cat([gate.weight.data, up.weight.data])
                for matrix, part in zip((gate, up), both.split(width), strict=True):
                    matrix.weight = nn.Parameter(part, requires_grad=matrix.weight.requires_grad)
            if down in plain and down.weight.data_ptr() % ALIGNED:
                down.weight = nn.Parameter(down.weight.data.clone(), requires_grad=down.weight.requires_grad)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RaggedExperts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.join()
        return self


def neighbours(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether ``up`` begins in memory where ``gate`` ends, in one allocation that is aligned."""
    return (
        gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and gate.data_ptr() + gate.numel() * gate.element_size() == up.data_ptr()
        and gate.data_ptr() % ALIGNED == 0
        and gate.is_contiguous()
        and up.is_contiguous()
    )


def make_ragged(
    model: Any,
    architecture: Architecture,
    layout: Layout,
    *,
    wired: bool = False,
    kind: type[RaggedExperts] = RaggedExperts,
) -> None:
    """Gives a model on the meta device the layout: experts modules replaced, routers cut to size.

    Args:
        model: of the source's config.
        layout: checked against the architecture (``Layout.facts``).
        wired: make a place for the tripwire.
        kind: of experts module.
    """
    names: dict[str, str] = {}
    for tensor in architecture.split.experts:
        names[tensor.role] = tensor.template.partition("{expert}.")[2].removesuffix(".weight")
    for layer, widths in layout.widths.items():
        block = model.get_submodule(f"{architecture.layers}.{layer}.{architecture.block}")
        stock = block.get_submodule(architecture.experts_module)
        old = stock.gate_up_proj
        hidden = old.shape[1 if stock.is_transposed else 2]
        ragged = kind(stock, widths, names, hidden, layout.remap.get(layer), dtype=old.dtype, device=old.device)
        ragged.train(stock.training)
        setattr(block, architecture.experts_module, ragged)
        _resize_router(block, architecture, old.shape[0], layout.rows(layer))
        if wired and layer == min(layout.widths):
            _add_tripwire(block, tripwire(architecture, layout).partition(f".{architecture.disk_block}.")[2])


def _add_tripwire(block: nn.Module, path: str) -> None:
    """A place in a block for the format's tripwire (``moezip.arch.layout.tripwire``), so that it is saved again."""
    *modules, leaf = path.split(".")
    for name in modules:
        if not hasattr(block, name):
            block.add_module(name, nn.Module())
        block = block.get_submodule(name)
    block.register_buffer(leaf, torch.empty(TRIPWIRE_SHAPE, dtype=torch.uint8, device="meta"))


def _resize_router(block: nn.Module, architecture: Architecture, old: int, new: int) -> None:
    """Sizes whatever has one entry per expert, in the block beside experts and shared experts."""
    others = (architecture.experts_module, *architecture.shared_modules)
    axes = {tensor.template.rpartition(".")[2]: tensor.axis for tensor in architecture.router}
    for path, module in block.named_modules():
        if path.split(".")[0] in others:
            continue
        for leaf, axis in axes.items():
            tensor = module._parameters.get(leaf, module._buffers.get(leaf))
            if tensor is None:
                continue
            sized = tensor.new_empty((*tensor.shape[:axis], new, *tensor.shape[axis + 1 :]))
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(sized, requires_grad=tensor.requires_grad)
            else:
                module._buffers[leaf] = sized
        for name in COUNTS:
            if vars(module).get(name) == old:
                setattr(module, name, new)

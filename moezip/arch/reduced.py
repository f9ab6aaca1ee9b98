"""A loaded decoder layer with fewer experts or neurons for a while, without a copy of its weights.

A view (``moezip.plan.apply.Applied``) is a whole model and is built as one; here one layer that is in memory anyway
does for a moment what it would do in such a view. The router is cut to the experts that stay, by the model's own code,
and what it chooses is renumbered on its way to the experts, which stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import Architecture

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

# How the modules of transformers call the number of experts.
COUNTS = ("num_experts", "out_features")


@contextmanager
def fewer_experts(layer: nn.Module, architecture: Architecture, kept: Sequence[int]) -> Iterator[None]:
    """Lets a loaded decoder layer choose among the experts ``kept`` (ascending) alone; as it was afterwards."""
    import torch

    block = layer.get_submodule(architecture.block)
    experts: Any = block.get_submodule(architecture.experts_module)
    total = experts.num_experts
    others = (architecture.experts_module, *architecture.shared_modules)
    axes = {tensor.template.rpartition(".")[2]: tensor.axis for tensor in architecture.router}
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def put(holder: dict[str, Any], name: str, value: Any) -> None:
        undo.append((holder, name, holder[name]))
        holder[name] = value

    device = experts.down_proj.device
    # one entry more: libraries mark choices that count for nothing with the number after the last
    numbers = torch.tensor([*kept, total], device=device)

    def renumber(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "top_k_index" in kwargs:
            return args, {**kwargs, "top_k_index": numbers[kwargs["top_k_index"]]}
        return (args[0], numbers[args[1]], *args[2:]), kwargs

    hook = experts.register_forward_pre_hook(renumber, with_kwargs=True)
    try:
        chosen = numbers[:-1]
        for path, module in block.named_modules():
            if path.split(".")[0] in others:
                continue
            for leaf, axis in axes.items():
                for holder in (module._parameters, module._buffers):
                    tensor = holder.get(leaf)
                    if tensor is not None:
                        cut = tensor.detach().index_select(axis, chosen)
                        put(holder, leaf, torch.nn.Parameter(cut, False) if holder is module._parameters else cut)
            for name in COUNTS:
                if vars(module).get(name) == total:
                    put(vars(module), name, len(kept))
        yield
    finally:
        hook.remove()
        for holder, name, value in reversed(undo):
            holder[name] = value


def silence_neurons(layer: nn.Module, architecture: Architecture, gone: npt.NDArray[np.bool_]) -> None:
    """Sets the columns of the down projections to zero that these neurons write to, for good.

    Args:
        gone: [E, F], True for a neuron that goes.
    """
    import torch

    block = layer.get_submodule(architecture.block)
    experts: Any = block.get_submodule(architecture.experts_module)
    for expert, neurons in enumerate(torch.from_numpy(gone)):
        matrix = experts.down_proj.data[expert]
        (matrix if experts.is_transposed else matrix.T)[neurons.to(matrix.device)] = 0

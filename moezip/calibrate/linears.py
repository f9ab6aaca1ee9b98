"""The linears of a model outside its routed experts, and how much the loss depends on each of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moezip.arch.packing import WEIGHT
from moezip.calibrate.trace import Trace, keep_squares

if TYPE_CHECKING:
    import torch

    from moezip.calibrate.stream import Stream


def layer_linears(stream: Stream, index: int) -> Iterator[tuple[str, str, Any]]:
    """(path in the layer, name on disk, module) of every linear of a decoder layer that may be packed.

    Experts, routers and gates of shared experts are left out, and linears that are not one tensor on disk.
    """
    from torch import nn

    skeleton = stream.skeleton
    entry = skeleton.architecture
    prefix = f"{entry.layers}.{index}"
    left_out = (f"{entry.block}.{entry.experts_module}.", f"{entry.block}.{entry.router_module}.")
    layer: Any = stream.layers[index]
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or f"{path}.".startswith(left_out) or module.out_features == 1:
            continue
        fills = skeleton.fills.get(f"{prefix}.{path}.{WEIGHT}", [])
        if len(fills) == 1 and fills[0].tensor is None:
            yield path, fills[0].name, module


def head_linear(stream: Stream) -> tuple[str, Any] | None:
    """(name on disk, module) of the output embedding, unless it is tied to the input's."""
    from torch import nn

    skeleton = stream.skeleton
    module = skeleton.model.get_output_embeddings()
    for path, each in skeleton.model.named_modules():
        if each is module and isinstance(each, nn.Linear):
            fills = skeleton.fills.get(f"{path}.{WEIGHT}", [])
            return (fills[0].name, module) if fills else None
    return None


@contextmanager
def squares_kept(trace: Trace, linears: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a backward leaves in ``trace.linears`` the squared gradient of every output of ``linears``.

    Args:
        linears: name -> module.
    """
    hooks = [module.register_forward_hook(_watcher(trace, name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watcher(trace: Trace, name: str) -> Any:
    def watch(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        # a backward on a device runs in a thread of its own, which sees another trace
        sums = trace.linears

        def add(squares: torch.Tensor) -> None:
            sums[name] = sums[name] + squares if name in sums else squares

        keep_squares(output, add)

    return watch

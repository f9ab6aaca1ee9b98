"""One MoE layer with the inputs of a micro-batch in hand, for records that ask what it would have done otherwise.

The model's own forward says what the layer did. Some methods ask more: what every expert would make of every token, and
where tokens would go if some experts were not there. Both are answered by the model's own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.experts import expert_output
from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Block:
    """Experts and router of one layer, and what they were given.

    Attributes:
        inputs: [T, D], the real tokens (padding excluded), of consecutive windows.
        windows: [T], which window of the micro-batch a token lies in, counted from 0.
        more: what the router gets besides, each with one entry per expert along its last axis.
    """

    architecture: Architecture
    facts: LayerFacts
    experts_module: Any
    router: Any
    inputs: torch.Tensor
    windows: torch.Tensor
    more: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        facts: LayerFacts,
        experts_module: Any,
        router: Any,
        given: tuple[torch.Tensor, ...],
        windows: int,
        valid: torch.Tensor | None,
    ) -> Block:
        """From what the router was called with, on ``windows`` windows, of which ``valid`` [T] says what is real."""
        import torch

        inputs = given[0].reshape(-1, given[0].shape[-1])
        numbers = torch.arange(windows, device=inputs.device).repeat_interleave(inputs.shape[0] // windows)
        if valid is not None:
            inputs, numbers = inputs[valid], numbers[valid]
        return cls(architecture, facts, experts_module, router, inputs, numbers, tuple(given[1:]))

    def outputs(self, part: slice) -> torch.Tensor:
        """Every expert's output for these tokens, before the gate weight: [n, E, D] in the model's dtype."""
        import torch

        given = self.inputs[part]
        with torch.inference_mode():
            return torch.stack(
                [expert_output(self.experts_module, each, given) for each in range(self.facts.experts)], 1
            )

    def gates(self, kept: Sequence[int], part: slice) -> torch.Tensor:
        """Each expert's gate weight for these tokens if only the experts ``kept`` (ascending) were there.

        They come from the model's own router with the other experts' rows taken out, as a pruned checkpoint has it.
        Where a router has no selection bias, that is the same as putting these experts' logits at minus infinity.

        Returns:
            [n, E] float64, 0 for experts that were not chosen.

        Raises:
            ArchitectureError: a router that cannot be called without its block.
        """
        import torch

        with torch.inference_mode():
            given = self.inputs[part]
            index = torch.tensor(kept, device=given.device)
            more = [each.index_select(-1, index) for each in self.more]
            answer = _narrowed(self.router, index, self._axes())(given, *more)
            if not isinstance(answer, tuple) or len(answer) != 3 or answer[2].dtype != torch.int64:
                raise ArchitectureError(
                    f"the router of this {self.architecture.name} model does not give logits, gates and experts",
                    where=type(self.router).__name__,
                    next="this version of transformers routes in the block; use transformers 5.23",
                )
            _, gates, ids = answer
            found = torch.zeros(given.shape[0], self.facts.experts, dtype=torch.float64, device=given.device)
            return found.scatter_(1, index[ids], gates.double())

    def _axes(self) -> dict[str, int]:
        """Name of each router tensor in memory, and its axis of experts."""
        return {tensor.template.rpartition(".")[2]: tensor.axis for tensor in self.architecture.router}


def _narrowed(module: Any, index: torch.Tensor, axes: dict[str, int]) -> Any:
    """A router (or a part of one) with some experts alone; the module itself stays as it is.

    Raises:
        ArchitectureError: it has a tensor that the table of architectures does not name.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        tensors = {}
        for name, tensor in getattr(module, kind).items():
            if tensor is not None and name not in axes:
                raise ArchitectureError(
                    f"the router has a tensor {name!r} that its table entry does not name", where=type(module).__name__
                )
            tensors[name] = None if tensor is None else tensor.index_select(axes[name], index)
        twin.__dict__[kind] = tensors
    twin.__dict__["_modules"] = {name: _narrowed(each, index, axes) for name, each in module._modules.items()}
    # watchers of the real router are not meant
    twin.__dict__.update(_forward_hooks={}, _forward_pre_hooks={})
    if "num_experts" in twin.__dict__:
        twin.__dict__["num_experts"] = len(index)
    return twin

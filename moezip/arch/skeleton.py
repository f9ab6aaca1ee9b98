"""A model with no memory, and the map from stored tensors to its parameters.

transformers builds the model on the meta device and tells how stored names become parameter names; the table of
architectures tells which stored tensors are experts. Loading is our own: each parameter is allocated once and
experts are read straight into their slice, where the library would hold a layer up to three times (tensors of the
single experts, their stack, the concatenation).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezip.arch.families import identify
from moezip.arch.layout import Layout, tripwire_of
from moezip.arch.libraries import import_model_code
from moezip.arch.matrices import fused_part
from moezip.arch.mone import LEAF, Substitution
from moezip.arch.spec import Architecture, ExpertTensor
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Fill:
    """One stored tensor and where it goes: the whole target, or one expert's matrix inside it."""

    name: str
    expert: int | None = None
    tensor: ExpertTensor | None = None


def target_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that each parameter and persistent buffer of a model loaded as ``dtype`` has.

    Some families keep routers or biases in fp32 whatever the model's dtype.
    """
    plan = model._get_dtype_plan(dtype)
    patterns = [(re.compile(re.escape(key).replace(r"\*", ".*")), value) for key, value in plan.items()]
    return {
        name: next((value for pattern, value in patterns if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


class Skeleton:
    """The model of ``source`` on the meta device, loadable and freeable part by part.

    Args:
        source: plain tensors (see ``moezip.arch.experts.decoded`` for stored quantization).
        experts_implementation: how the experts run, a name that transformers knows.
        dtype: compute dtype; default the config's own.
        device: where loaded parameters go.

    Raises:
        ArchitectureError: unknown model, or a stored tensor that has no place in it.
    """

    def __init__(
        self,
        source: Source,
        *,
        experts_implementation: str = "eager",
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        architecture: Architecture | None = None,
    ):
        import_model_code(source.config)
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.source, self.device = source, torch.device(device)
        self.architecture = architecture or identify(source.config, source.folder)
        settings = {key: value for key, value in source.config.items() if key != "quantization_config"}
        try:
            self.config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        except (TypeError, ValueError, KeyError) as fault:
            raise ArchitectureError(
                f"transformers refuses the config: {fault}", where=source.folder / "config.json"
            ) from fault
        stored = self.config.dtype if self.config.dtype is not None else torch.bfloat16
        self.dtype: torch.dtype = dtype or (getattr(torch, stored) if isinstance(stored, str) else stored)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, experts_implementation=experts_implementation
            ).eval()
        self.layout = self._make_ragged()
        self.model.requires_grad_(False)
        self.layers: nn.ModuleList = self.model.get_submodule(self.architecture.layers)
        self._meta: dict[str, torch.Tensor] = dict(self.model.state_dict())
        self._dtypes = target_dtypes(self.model, self.dtype)
        self.fills: dict[str, list[Fill]] = {}
        self.strangers: list[str] = []
        self._map_names()
        self._make_buffers()

    def _make_ragged(self) -> Layout | None:
        """Layers and experts as different as the checkpoint's config says, where it does."""
        layout, substitution = Layout.of(self.source.config), Substitution.of(self.source.config)
        if substitution is not None:
            from moezip.arch.novices import make_substituted

            layout = substitution.layout(self.architecture, self.architecture.layer_facts(self.source.config))
            make_substituted(self.model, self.architecture, substitution, layout)
        elif layout is not None:
            from moezip.arch.ragged import make_ragged

            self.architecture.layer_facts(self.source.config)  # raises where the layout cannot be
            make_ragged(self.model, self.architecture, layout)
        return layout

    # -- names ----------------------------------------------------------------------------------------------

    def _map_names(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        converters = [step for step in mapping if isinstance(step, WeightConverter)]
        entry = self.architecture
        trip = tripwire_of(entry, self.source.config)
        for name in self.source.names():
            if name == trip:
                continue
            claim = entry.claim(name, self.source.config)
            if claim.kind == "extra":
                continue
            module = f"{entry.layers}.{claim.layer}.{entry.block}.{entry.experts_module}"
            if claim.kind == "constant":
                target, fill = f"{module}.{claim.expert}.{LEAF}", Fill(name)
            elif claim.kind == "expert" and isinstance(claim.tensor, ExpertTensor):
                if self.layout is not None:
                    own = claim.tensor.template.partition("{expert}.")[2]
                    target, fill = f"{module}.{claim.expert}.{own}", Fill(name)
                else:
                    memory = "down_proj" if claim.tensor.role == "down" else "gate_up_proj"
                    target, fill = f"{module}.{memory}", Fill(name, claim.expert, claim.tensor)
            else:
                target = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self._meta)[0]
                fill = Fill(name)
            if target in self._meta:
                self.fills.setdefault(target, []).append(fill)
            else:
                self.strangers.append(name)

    def problems(self) -> list[str]:
        """What stands between the stored tensors and a complete model, one sentence each; empty when complete.

        Looks at headers only: every parameter filled exactly once, every expert present once, every shape right,
        no tensor left over that the model has no place for.
        """
        found = [f"{name}: the model has no place for this tensor" for name in self.strangers]
        tied = set(self.model.all_tied_weights_keys)
        for target, meta in self._meta.items():
            fills = self.fills.get(target, [])
            if not fills:
                if target not in tied:
                    found.append(f"{target}: no stored tensor fills this parameter, of shape {tuple(meta.shape)}")
            elif fills[0].tensor is None:
                shape = self.source.spec(fills[0].name).shape
                if len(fills) > 1:
                    found.append(f"{target}: filled twice, by {', '.join(fill.name for fill in fills)}")
                elif shape != tuple(meta.shape):
                    found.append(f"{fills[0].name}: shape {shape} where the config implies {tuple(meta.shape)}")
            else:
                found += self._expert_problems(target, meta, fills)
        return found

    def _expert_problems(self, target: str, meta: torch.Tensor, fills: list[Fill]) -> list[str]:
        found = []
        seen: dict[tuple[int, str], str] = {}
        roles = ("down",) if target.endswith("down_proj") else ("gate", "up")
        for fill in fills:
            assert fill.expert is not None and fill.tensor is not None
            if fill.expert >= meta.shape[0]:
                found.append(f"{fill.name}: expert {fill.expert}, but the config counts {meta.shape[0]} (from 0)")
                continue
            place = (fill.expert, fill.tensor.role)
            if place in seen:
                found.append(f"{target}: expert {place[0]} {place[1]} is filled twice, by {seen[place]}, {fill.name}")
            seen[place] = fill.name
            shape, wanted = self.source.spec(fill.name).shape, tuple(self._slice(meta, target, fill).shape)
            if shape != wanted:
                found.append(f"{fill.name}: shape {shape} where the config implies {wanted}")
        for expert in range(meta.shape[0]):
            found += [f"{target}: expert {expert} has no {role} matrix" for role in roles if (expert, role) not in seen]
        return found

    def require_complete(self) -> None:
        """Raises ArchitectureError naming the first few problems, if there are any."""
        problems = self.problems()
        if problems:
            shown = problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else [])
            raise ArchitectureError(
                "the checkpoint does not hold the model that its config describes:\n  " + "\n  ".join(shown),
                where=self.source.folder,
                next="download the missing files again, or use the config.json that came with these weights",
            )

    # -- memory ---------------------------------------------------------------------------------------------

    def layer_targets(self, layer: int) -> list[str]:
        """Parameters and persistent buffers of one decoder layer."""
        prefix = f"{self.architecture.layers}.{layer}."
        return [name for name in self._meta if name.startswith(prefix)]

    def outer_targets(self) -> list[str]:
        """Parameters and persistent buffers outside the decoder layers: embedding, final norm, head."""
        prefix = f"{self.architecture.layers}."
        return [name for name in self._meta if not name.startswith(prefix)]

    def bytes(self, targets: Iterable[str]) -> int:
        """Memory that loading these targets takes."""
        return sum(self._meta[name].numel() * self._dtypes[name].itemsize for name in targets)

    def load(self, targets: Iterable[str]) -> None:
        """Read these parameters from the source. Tied parameters must be re-tied by the caller (``tie``)."""
        touched = set()
        for target in targets:
            if target in self.fills:
                self._assign(target, self._read(target))
                touched.add(target.rpartition(f".{self.architecture.experts_module}.")[0])
        if self.layout is not None:
            self._join(touched)

    def _join(self, blocks: Iterable[str]) -> None:
        """Ragged experts of these blocks: the matrices that are used as one lie together."""
        from moezip.arch.ragged import RaggedExperts

        for block in blocks:
            experts = getattr(self.model.get_submodule(block), self.architecture.experts_module, None)
            if isinstance(experts, RaggedExperts):
                experts.join()

    def free(self, targets: Iterable[str]) -> None:
        """Give their memory back."""
        for target in targets:
            self._assign(target, self._meta[target])

    def tie(self) -> None:
        """Point tied parameters (the head, usually) at what they share. The embedding must be loaded."""
        for target, origin in self.model.all_tied_weights_keys.items():
            if target not in self.fills:
                self._assign(target, self._tensor(origin))

    def head_targets(self) -> list[str]:
        """What the logits need: final norm, head, and whatever the head is tied to."""
        tied = self.model.all_tied_weights_keys
        embedding = {f"{name}.weight" for name, module in self.model.named_modules()
                     if module is self.model.get_input_embeddings()}  # fmt: skip
        origins = {tied[name] for name in tied if name not in self.fills}
        return [name for name in self.outer_targets() if name not in embedding or name in origins]

    def embedding_targets(self) -> list[str]:
        """What turning ids into hidden states needs: everything outside the layers but the head."""
        head = self.model.get_output_embeddings()
        names = {f"{name}.{p}" for name, module in self.model.named_modules() if module is head
                 for p, _ in module.named_parameters(recurse=False)}  # fmt: skip
        return [name for name in self.outer_targets() if name not in names]

    def _read(self, target: str) -> torch.Tensor:
        import torch

        meta, dtype, fills = self._meta[target], self._dtypes[target], self.fills[target]
        if fills[0].tensor is None:
            stored = self.source.read(fills[0].name)
            if tuple(stored.shape) != tuple(meta.shape):
                raise ArchitectureError(
                    f"{fills[0].name} has shape {tuple(stored.shape)}, the config implies {tuple(meta.shape)}",
                    where=self.source.folder,
                )
            return stored.to(device=self.device, dtype=dtype if stored.is_floating_point() else None)
        whole = torch.empty(meta.shape, dtype=dtype, device=self.device)
        for fill in fills:
            self._slice(whole, target, fill).copy_(self.source.read(fill.name))
        return whole

    def _slice(self, whole: torch.Tensor, target: str, fill: Fill) -> torch.Tensor:
        """The part of a fused parameter that one expert's matrix fills, seen as [out, in]."""
        assert fill.tensor is not None and fill.expert is not None
        experts: Any = self.model.get_submodule(target.rpartition(".")[0])
        return fused_part(experts, fill.tensor.role, fill.expert, whole)

    def _tensor(self, target: str) -> torch.Tensor:
        module, _, leaf = target.rpartition(".")
        tensor: torch.Tensor = getattr(self.model.get_submodule(module), leaf)
        return tensor

    def _assign(self, target: str, value: torch.Tensor) -> None:
        from torch import nn

        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _make_buffers(self) -> None:
        """Rotary frequencies and the like are in no file: the model computes them, on the real device."""
        import torch

        owners = {name.rpartition(".")[0] for name, _ in self.model.named_non_persistent_buffers()}
        for owner in owners:
            module = self.model.get_submodule(owner)
            for leaf, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.is_meta and leaf in module._non_persistent_buffers_set:
                    module._buffers[leaf] = torch.empty_like(buffer, device=self.device)
            self.model._init_weights(module)

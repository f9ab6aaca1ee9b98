"""A checkpoint seen through a plan: the same interface as reading from disk, nothing computed, nothing stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.families import identify
from moezip.arch.layout import (
    TRIPWIRE_DTYPE,
    TRIPWIRE_SHAPE,
    TRIPWIRE_VALUE,
    Layout,
    require_uniform,
    tripwire,
)
from moezip.arch.spec import Claim, ExpertTensor, LayerFacts, RouterTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError, PlanError
from moezip.plan.plan import LayerPlan, Plan
from moezip.plan.views import Split, View, inner_entries, runs, split_roles

if TYPE_CHECKING:
    import torch


# What stands for the tripwire of a ragged checkpoint, which no source tensor is behind.
TRIPWIRE = View("")


class Applied:
    """``source`` through ``plan``; a Source like any other.

    Raises:
        PlanError: the plan does not fit the checkpoint, or keeps multi-token-prediction experts of a layout that
            the table of architectures does not describe.
        ArchitectureError: the source is ragged itself.
    """

    def __init__(self, source: Source, plan: Plan):
        self._source, self.plan = source, plan
        self.architecture = identify(source.config, source.folder)
        require_uniform(source.config, "compressing", source.folder)
        facts = self.architecture.layer_facts(source.config)
        plan.validate(facts, source.fingerprint, source.folder)
        self._width = facts[0].width
        self._layers = {layer.layer: layer for layer in plan.layers}
        self._kept = {layer.layer: layer.kept for layer in plan.layers}
        self._same = {layer.layer: layer.whole and layer.kept == tuple(range(layer.experts)) for layer in plan.layers}
        self._layout = self._checked_layout(facts)
        self._views: dict[str, View | Split] = {}
        self._specs: dict[str, TensorSpec] = {}
        for name in source.names():
            claim = self.architecture.claim(name, source.config)
            for target, view in self._seen(name, claim):
                self._add(target, view)
        if self._layout is not None:
            self._add_tripwire(self._layout)
        self._config = self._edited_config()

    # -- names ----------------------------------------------------------------------------------------------

    def _seen(self, name: str, claim: Claim) -> Iterator[tuple[str, View | Split]]:
        """The output tensors that one source tensor becomes: none, itself, or itself under another name."""
        if claim.kind == "extra":
            if self.plan.mtp == "drop":
                return
            yield from self._seen_extra(name)
        elif claim.kind == "fused" and self._layout is not None:
            yield from self._split(name, claim)
        elif claim.layer is None or claim.layer not in self._kept or self._same[claim.layer]:
            yield name, View(name)
        elif claim.kind == "expert":
            yield from self._renumbered(name, claim, self._layers[claim.layer])
        elif claim.kind == "fused":
            yield name, self._fused(name, claim, self._layers[claim.layer])
        else:
            assert isinstance(claim.tensor, RouterTensor)
            yield name, View(name, self._kept[claim.layer], claim.tensor.axis)

    def _seen_extra(self, name: str) -> Iterator[tuple[str, View]]:
        """Multi-token-prediction layers follow the ranking of the last layer."""
        last = max(self._kept)
        claim = self.architecture.claim_extra(name)
        if self._same[last] or claim.kind == "other":
            yield name, View(name)
        elif claim.kind == "expert":
            yield from self._renumbered(name, claim, self._layers[last])
        elif claim.kind == "fused":
            yield name, self._fused(name, claim, self._layers[last])
        else:
            axis = claim.tensor.axis if isinstance(claim.tensor, RouterTensor) else 0
            yield name, View(name, self._kept[last], axis)

    def _renumbered(self, name: str, claim: Claim, layer: LayerPlan) -> Iterator[tuple[str, View]]:
        if claim.expert not in layer.kept:
            return
        number = layer.kept.index(claim.expert)
        view, neurons = View(name), layer.picks[number].neurons
        if neurons == ():  # an expert that outputs nothing has no tensors
            return
        if neurons is not None:
            assert isinstance(claim.tensor, ExpertTensor)
            view = View(name, *inner_entries(claim.tensor, neurons, self._width))
        yield re.sub(r"(?<=experts\.)\d+(?=\.)", str(number), name, count=1), view

    def _fused(self, name: str, claim: Claim, layer: LayerPlan) -> View:
        assert isinstance(claim.tensor, ExpertTensor)
        if layer.whole or claim.tensor.role == "down_bias":
            return View(name, layer.kept)
        every = tuple(range(self._width))
        kept = [every if pick.neurons is None else pick.neurons for pick in layer.picks]
        found = [inner_entries(claim.tensor, neurons, self._width) for neurons in kept]
        return View(name, layer.kept, found[0][1] + 1, tuple(entries for entries, _ in found))

    def _split(self, name: str, claim: Claim) -> Iterator[tuple[str, Split]]:
        """A fused tensor of a ragged output, expert by expert. One that keeps no neuron has a down bias at most."""
        assert isinstance(claim.tensor, ExpertTensor) and claim.layer is not None
        templates = {tensor.role: tensor.template for tensor in self.architecture.split.experts}
        for number, pick in enumerate(self._layers[claim.layer].picks):
            for role in split_roles(claim.tensor):
                if pick.neurons != () or role == "down_bias":
                    target = templates[role].format(layer=claim.layer, expert=number)
                    yield target, Split(name, claim.tensor, pick.kept, role, pick.neurons, self._width)

    def _checked_layout(self, facts: Sequence[LayerFacts]) -> Layout | None:
        """The layout of a ragged output, None for a stock one.

        Raises:
            PlanError, ArchitectureError: neurons that cannot be taken out of this checkpoint, or layers or experts
                that cannot differ.
        """
        plan, width = self.plan, self._width
        whole = all(layer.whole for layer in plan.layers)
        if not whole and self._source.config.get("quantization_config"):
            raise PlanError(
                "the plan keeps some neurons of experts whose stored codes come in blocks",
                where=self._source.folder,
                next="prune whole experts of a quantized checkpoint, or start from its unquantized form",
            )
        if not plan.ragged(width):
            return None
        if self._source.config.get("quantization_config"):
            raise PlanError(
                "the plan keeps different numbers of experts in different layers of a quantized checkpoint",
                where=self._source.folder,
                next="keep the same number everywhere (--scope layer), or start from the unquantized form",
            )
        if plan.mtp == "keep" and any(
            self.architecture.claim(name, self._source.config).kind == "extra" for name in self._source.names()
        ):
            raise PlanError(
                "multi-token-prediction layers cannot follow layers that differ", where=self._source.folder,
                next="leave them out (--set mtp=drop)",
            )  # fmt: skip
        layout = Layout({layer.layer: layer.widths(width) for layer in plan.layers})
        layout.facts(facts)
        return layout

    def _add_tripwire(self, layout: Layout) -> None:
        name = tripwire(self.architecture, layout)
        router = self.architecture.router[0].template.format(layer=min(layout.widths))
        self._views[name] = TRIPWIRE
        self._specs[name] = TensorSpec(name, TRIPWIRE_DTYPE, TRIPWIRE_SHAPE, self._source.spec(router).file)

    def _add(self, target: str, view: View | Split) -> None:
        if target in self._views:
            raise PlanError(f"two source tensors would both become {target}", where=self._source.folder)
        spec = self._source.spec(view.origin)
        shape = spec.shape
        if isinstance(view, Split):
            shape = view.shape(shape)
        elif view.slices is not None and view.entries is not None:
            shape = (len(view.entries), *shape[1:])
            shape = (*shape[: view.axis], len(view.slices[0]), *shape[view.axis + 1 :])
        elif view.entries is not None:
            if len(shape) <= view.axis or shape[view.axis] <= max(view.entries):
                raise PlanError(
                    f"{view.origin} has shape {shape}; the plan keeps entry {max(view.entries)} of axis {view.axis}",
                    where=self._source.folder,
                )
            shape = (*shape[: view.axis], len(view.entries), *shape[view.axis + 1 :])
        self._views[target] = view
        self._specs[target] = replace(spec, name=target, shape=shape)

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor is the source's: a plan that keeps all experts may still drop extra layers."""
        return self.plan.keeps_all and self.names() == self._source.names()

    # -- Source ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        """The source's config with the counts edited; the very same where nothing changes."""
        return self._config

    @property
    def source_config(self) -> dict[str, Any]:
        """The config of what the plan is applied to."""
        return self._source.config

    @property
    def fingerprint(self) -> str:
        import hashlib

        return hashlib.sha256(f"{self._source.fingerprint} {self.plan.to_json()}".encode()).hexdigest()

    def names(self) -> list[str]:
        return list(self._views)

    def spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise CheckpointError(f"the planned checkpoint has no tensor {name}", where=self.folder)
        return self._specs[name]

    def metadata(self, file: str) -> dict[str, str]:
        return self._source.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        def described(source: Source) -> list[TensorSpec]:
            return [spec for spec in map(source.spec, source.names()) if spec.file == file]

        return self._source.raw_header(file) if described(self) == described(self._source) else None

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        import torch

        spec, view = self.spec(name), self._views[name]
        self._require_rows(spec, rows)
        if view is TRIPWIRE:
            return torch.full(TRIPWIRE_SHAPE, TRIPWIRE_VALUE, dtype=torch.uint8)
        if isinstance(view, Split):
            split = view.read(self._source)
            return split if rows is None else split[rows.start : rows.stop]
        if view.entries is None:
            return self._source.read(view.origin, rows)
        if view.slices is not None:
            return torch.cat(list(self._sliced(view, rows or range(len(view.entries)))))
        if view.axis == 0:
            wanted = view.entries if rows is None else view.entries[rows.start : rows.stop]
            whole = torch.empty((len(wanted), *spec.shape[1:]), dtype=self._source.read(view.origin, range(0)).dtype)
            start = 0
            for run in runs(wanted):
                whole[start : start + len(run)] = self._source.read(view.origin, run)
                start += len(run)
            return whole
        whole = self._source.read(view.origin).index_select(view.axis, torch.tensor(view.entries))
        return whole if rows is None else whole[rows.start : rows.stop]

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        spec, view = self.spec(name), self._views[name]
        self._require_rows(spec, rows)
        if view is TRIPWIRE:
            yield memoryview(bytes([TRIPWIRE_VALUE]))
        elif isinstance(view, Split) or (view.entries is not None and view.slices is None and view.axis > 0):
            import torch

            yield memoryview(self.read(name, rows).contiguous().view(torch.uint8).numpy().tobytes())
        elif view.entries is None:
            yield from self._source.chunks(view.origin, rows)
        elif view.slices is not None:
            import torch

            for expert in self._sliced(view, rows or range(len(view.entries))):
                yield memoryview(expert.contiguous().view(torch.uint8).numpy().tobytes())
        else:
            for run in runs(view.entries if rows is None else view.entries[rows.start : rows.stop]):
                yield from self._source.chunks(view.origin, run)

    def _sliced(self, view: View, experts: range) -> Iterator[torch.Tensor]:
        """One kept expert of a fused tensor after another, [1, ...], with its own neurons."""
        import torch

        assert view.slices is not None and view.entries is not None
        for place in experts:
            expert = self._source.read(view.origin, range(view.entries[place], view.entries[place] + 1))
            yield expert.index_select(view.axis, torch.tensor(view.slices[place]))

    def _require_rows(self, spec: TensorSpec, rows: range | None) -> None:
        if rows is not None and (not spec.shape or rows.step != 1 or not 0 <= rows.start <= rows.stop <= spec.shape[0]):
            raise CheckpointError(f"{spec.name} of shape {list(spec.shape)} has no rows {rows}", where=self.folder)

    # -- config ---------------------------------------------------------------------------------------------

    def _edited_config(self) -> dict[str, Any]:
        config, entry = dict(self._source.config), self.architecture
        if self._layout is not None:
            config["quantization_config"] = self._layout.to_config()
        elif not self.plan.keeps_all:
            count = len(self.plan.layers[0].picks)
            for key in entry.count_keys:
                config[key] = count
            [width] = {width for layer in self.plan.layers for width in layer.widths(self._width)}
            if width != self._width:
                config.update(entry.with_width(config, width))
        if self.plan.mtp == "drop":
            for key in entry.extra_count_keys:
                if config.get(key):
                    config[key] = 0
        return config

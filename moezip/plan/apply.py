"""A checkpoint seen through a plan: the same interface as reading from disk, nothing computed, nothing stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.decoded import decoded
from moezip.arch.families import identify
from moezip.arch.layout import (
    TRIPWIRE_DTYPE,
    TRIPWIRE_SHAPE,
    TRIPWIRE_VALUE,
    Layout,
    inseparable,
    require_uniform,
    tripwire,
)
from moezip.arch.spec import Claim, ExpertTensor, LayerFacts, RouterTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError, CheckpointError, PlanError
from moezip.formats import fp8_block
from moezip.plan.plan import LayerPlan, Plan
from moezip.plan.views import Blocks, Split, View, inner_entries, runs, split_roles

if TYPE_CHECKING:
    import torch


Piece = View | Split | Blocks
# What stands for the tripwire of a ragged checkpoint, which no source tensor is behind.
TRIPWIRE = View("")


class Applied:
    """``source`` through ``plan``; a Source like any other.

    Args:
        split: in moezip's own format, one tensor per expert and matrix, even where a stock one would do.

    Raises:
        PlanError: the plan does not fit the checkpoint, or keeps multi-token-prediction experts of a layout that
            the table of architectures does not describe.
        ArchitectureError: the source is ragged itself.
    """

    def __init__(self, source: Source, plan: Plan, *, split: bool = False):
        self._source, self.plan = source, plan
        self.architecture = identify(source.config, source.folder)
        require_uniform(source.config, "compressing", source.folder)
        facts = self.architecture.layer_facts(source.config)
        plan.validate(facts, source.fingerprint, source.folder)
        self._width = facts[0].width
        self._layers = {layer.layer: layer for layer in plan.layers}
        self._kept = {layer.layer: layer.kept for layer in plan.layers}
        self._same = {layer.layer: layer.whole and layer.kept == tuple(range(layer.experts)) for layer in plan.layers}
        self._names = set(source.names())
        self._blocks = (fp8_block.block_size(source.config), fp8_block.powers_of_two(source.config))
        self._layout = self._checked_layout(facts, split)
        self._views: dict[str, Piece] = {}
        self._specs: dict[str, TensorSpec] = {}
        for name in source.names():
            claim = self.architecture.claim(name, source.config)
            for target, view in self._seen(name, claim):
                self._add(target, view)
        if self._layout is not None:
            self._add_tripwire(self._layout)
        self._config = self._edited_config()
        if self._layout is None and not plan.keeps_all:
            self._require_same_forms()

    # -- names ----------------------------------------------------------------------------------------------

    def _seen(self, name: str, claim: Claim) -> Iterator[tuple[str, Piece]]:
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
            if self._layers[claim.layer].router == "remap":
                yield name, View(name)
            else:
                yield name, View(name, self._kept[claim.layer], claim.tensor.axis)

    def _seen_extra(self, name: str) -> Iterator[tuple[str, Piece]]:
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

    def _renumbered(self, name: str, claim: Claim, layer: LayerPlan) -> Iterator[tuple[str, View | Blocks]]:
        if claim.expert not in layer.kept:
            return
        number = layer.kept.index(claim.expert)
        view: View | Blocks = View(name)
        neurons = layer.picks[number].neurons
        if neurons == ():  # an expert that outputs nothing has no tensors
            return
        if neurons is not None:
            assert isinstance(claim.tensor, ExpertTensor)
            entries, axis = inner_entries(claim.tensor, neurons, self._width)
            codes = name.removesuffix(fp8_block.SUFFIX)
            if codes + fp8_block.SUFFIX in self._names:
                view = Blocks(name, codes, entries, axis, *self._blocks)
            else:
                view = View(name, entries, axis)
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

    def _checked_layout(self, facts: Sequence[LayerFacts], split: bool) -> Layout | None:
        """The layout of a ragged output, None for a stock one.

        Raises:
            PlanError, ArchitectureError: neurons that cannot be taken out of this checkpoint, or layers or experts
                that cannot differ.
        """
        plan, width = self.plan, self._width
        if not all(layer.whole for layer in plan.layers):
            self._require_separable("experts of which some neurons are gone")
        if not plan.ragged(width) and not split:
            self._require_whole_blocks()
            return None
        self._require_separable("layers or experts that differ")
        if plan.mtp == "keep" and any(
            self.architecture.claim(name, self._source.config).kind == "extra" for name in self._source.names()
        ):
            raise PlanError(
                "multi-token-prediction layers cannot follow layers that differ", where=self._source.folder,
                next="leave them out (--set mtp=drop)",
            )  # fmt: skip
        stored = self._source.config.get("quantization_config")
        remap = {layer.layer: layer.remap for layer in plan.layers if layer.router == "remap"}
        layout = Layout({layer.layer: layer.widths(width) for layer in plan.layers}, stored, remap)
        layout.facts(facts)
        return layout

    def _require_whole_blocks(self) -> None:
        """Raises PlanError for a stock output whose last fp8 block would be cut: engines refuse it, and transformers
        without a GPU shares the scales out evenly, which decodes it wrongly."""
        [kept] = {width for layer in self.plan.layers for width in layer.widths(self._width)}
        stored = self._source.config.get("quantization_config")
        if stored and kept != self._width and any(kept % size for size in self._blocks[0]):
            raise PlanError(
                f"experts of {kept} neurons do not fill the stored fp8 blocks of {self._blocks[0]}",
                where=self._source.folder,
                next=f"keep a multiple of {math.lcm(*self._blocks[0])} neurons",
            )

    def _require_separable(self, what: str) -> None:
        if reason := inseparable(self._source.config):
            raise PlanError(
                f"the plan makes {what}, but {reason}", where=self._source.folder,
                next="keep whole experts, as many in every layer, or start from the unquantized form",
            )  # fmt: skip

    def _require_same_forms(self) -> None:
        """Raises PlanError where the kept ``quantization_config`` says other things of the renumbered experts than
        their tensors do, as it may when it names experts by their numbers."""
        try:
            decoded(self)
        except ArchitectureError as error:
            raise PlanError(
                f"quantization_config does not fit the experts under their new numbers: {error.what}",
                where=self._source.folder,
                next="moezip prunes quantized checkpoints that treat the experts of a layer alike",
            ) from error

    @property
    def requantised(self) -> int:
        """How many stored matrices hold blocks of mixed origin, which are rounded to fp8 once more."""
        views = (view for view in self._views.values() if isinstance(view, Blocks) and view.origin == view.codes)
        origins = (fp8_block.origins_of(view.entries, view.block[view.axis]) for view in views)
        return sum(any(len(set(block)) > 1 for block in blocks) for blocks in origins)

    @property
    def stored_note(self) -> str | None:
        """What became of the source's stored codes, one sentence for the reader; None where it stores none."""
        if not self._source.config.get("quantization_config"):
            return None
        if not (count := self.requantised):
            return "the stored quantization was kept: codes and scales of the kept experts are the source's bytes"
        return (
            f"re-quantised: {count} matrices keep neurons of several fp8 blocks, which were rounded to fp8 blocks once "
            "more; all other codes and scales are the source's bytes"
        )

    def _add_tripwire(self, layout: Layout) -> None:
        name = tripwire(self.architecture, layout)
        router = self.architecture.router[0].template.format(layer=min(layout.widths))
        self._views[name] = TRIPWIRE
        self._specs[name] = TensorSpec(name, TRIPWIRE_DTYPE, TRIPWIRE_SHAPE, self._source.spec(router).file)

    def _add(self, target: str, view: Piece) -> None:
        if target in self._views:
            raise PlanError(f"two source tensors would both become {target}", where=self._source.folder)
        spec = self._source.spec(view.origin)
        shape = spec.shape
        if isinstance(view, Blocks):
            shape = view.shape(self._source.spec(view.codes).shape)
        elif isinstance(view, Split):
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
        if isinstance(view, Split | Blocks):
            part = view.read(self._source)
            return part if rows is None else part[rows.start : rows.stop]
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
        elif isinstance(view, Split | Blocks) or (view.entries is not None and view.slices is None and view.axis > 0):
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

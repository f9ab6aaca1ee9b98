"""Plans whose layers keep different numbers of experts, in the form that vLLM 0.33 reads (see ``moezip.arch.mone``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.families import identify
from moezip.arch.layout import require_uniform
from moezip.arch.mone import KEY, Substitution, constant
from moezip.arch.spec import ExpertTensor
from moezip.checkpoint.source import DTYPE_BITS, Source, TensorSpec
from moezip.errors import CheckpointError, PlanError
from moezip.plan.plan import Plan

if TYPE_CHECKING:
    import torch


class Substituted:
    """``source`` through ``plan``, dropped experts as constants of zeros: a Source like any other.

    Kept experts keep their numbers and bytes, and everything but experts is the source's.

    Raises:
        PlanError: the plan does not fit the checkpoint, keeps parts of experts or multi-token-prediction layers, or the
            checkpoint is quantized.
        ArchitectureError: a family that stores all experts of a layer in one tensor, or a source that is not uniform.
    """

    def __init__(self, source: Source, plan: Plan):
        self._source, self.plan = source, plan
        self.architecture = identify(source.config, source.folder)
        require_uniform(source.config, "compressing", source.folder)
        facts = self.architecture.layer_facts(source.config)
        plan.validate(facts, source.fingerprint, source.folder)
        require_substitutable(source, plan)
        dropped = {layer.layer: tuple(e for e in range(layer.experts) if e not in layer.kept) for layer in plan.layers}
        self.substitution = Substitution({layer: row for layer, row in dropped.items() if row})
        self.substitution.layout(self.architecture, facts)
        self._constants = {
            constant(self.architecture, layer, expert)
            for layer, row in self.substitution.dropped.items()
            for expert in row
        }
        self._specs = {spec.name: spec for spec in self._seen({fact.layer: fact.hidden for fact in facts})}

    def _seen(self, hidden: dict[int, int]) -> Iterator[TensorSpec]:
        """The output's tensors: each constant stands where the down matrix of its expert stood."""
        for name in self._source.names():
            claim, spec = self.architecture.claim(name, self._source.config), self._source.spec(name)
            if claim.kind == "extra" and self.plan.mtp == "drop":
                continue
            if claim.kind != "expert" or claim.expert not in self.substitution.dropped.get(claim.layer or 0, ()):
                yield spec
            elif isinstance(claim.tensor, ExpertTensor) and claim.tensor.role == "down":
                assert claim.layer is not None and claim.expert is not None
                own = constant(self.architecture, claim.layer, claim.expert)
                yield TensorSpec(own, spec.dtype, (hidden[claim.layer],), spec.file)

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor is the source's."""
        return self.names() == self._source.names()

    # -- Source ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        """The source's config, its counts untouched, and the list of dropped experts."""
        config = dict(self._source.config)
        if self.substitution.dropped:
            config[KEY] = self.substitution.to_config()
        if self.plan.mtp == "drop":
            config.update({key: 0 for key in self.architecture.extra_count_keys if config.get(key)})
        return config

    @property
    def source_config(self) -> dict[str, Any]:
        """The config of what the plan is applied to."""
        return self._source.config

    @property
    def fingerprint(self) -> str:
        import hashlib

        return hashlib.sha256(f"{self._source.fingerprint} {KEY} {self.plan.to_json()}".encode()).hexdigest()

    def names(self) -> list[str]:
        return list(self._specs)

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
        spec = self.spec(name)
        if name not in self._constants:
            return self._source.read(name, rows)
        import torch

        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        return torch.zeros(len(self._rows(spec, rows)), dtype=kinds[spec.dtype])

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        spec = self.spec(name)
        if name not in self._constants:
            yield from self._source.chunks(name, rows)
        else:
            yield memoryview(bytes(len(self._rows(spec, rows)) * DTYPE_BITS[spec.dtype] // 8))

    def _rows(self, spec: TensorSpec, rows: range | None) -> range:
        every = range(spec.shape[0])
        if rows is not None and (rows.step != 1 or not 0 <= rows.start <= rows.stop <= len(every)):
            raise CheckpointError(f"{spec.name} of shape {list(spec.shape)} has no rows {rows}", where=self.folder)
        return every if rows is None else rows


def require_substitutable(source: Source, plan: Plan) -> None:
    """Raises PlanError for what the form, or vLLM's reader of it, cannot hold."""
    if source.config.get("quantization_config") or plan.packing:
        raise PlanError(
            "the plan keeps different numbers of experts in different layers of a quantized checkpoint, which vLLM "
            "does not read",
            where=source.folder,
            next="keep the same number everywhere (--scope layer), or start from the unquantized form",
        )
    if not all(layer.whole for layer in plan.layers):
        raise PlanError(
            "the plan keeps some neurons of an expert, and vLLM reads experts of one width", where=source.folder,
            next="prune whole experts, or neurons with --set uniform=true",
        )  # fmt: skip
    entry = identify(source.config, source.folder)
    if plan.mtp == "keep" and any(entry.claim(name, source.config).kind == "extra" for name in source.names()):
        raise PlanError(
            "multi-token-prediction layers cannot follow layers that differ", where=source.folder,
            next="leave them out (--set mtp=drop)",
        )  # fmt: skip

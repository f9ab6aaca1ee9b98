"""A pruned view with the averages and the solved values of a plan in place of the dominant experts.

Averages are taken when they are read, in float32, and rounded once to the stored dtype. Solved values lie in a file
beside the plan (``plan.safetensors``) or, for a plan inside a checkpoint, in that checkpoint itself:

    layers.<decoder layer>.experts.<number in the output>.<role>    canonical: gate, up [F, D], down [D, F], biases
    layers.<decoder layer>.router.<place in Architecture.router>    as stored, one entry per expert of the output
    layers.<decoder layer>.experts.<number in the output>.<role>.<left|right|rows|rows_index>    of a factored matrix
    layers.<decoder layer>.experts.<number in the output>.<role>.scale_inv    of one in fp8 blocks, beside its codes
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from moezip.arch.families import identify
from moezip.arch.layout import tripwire_of
from moezip.arch.spec import Architecture, Claim, ExpertRole, ExpertTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import CheckpointError, PlanError
from moezip.formats import fp8_block
from moezip.plan.apply import Applied
from moezip.plan.packed import Values
from moezip.plan.plan import Pick, Plan
from moezip.plan.views import Split, split_roles

if TYPE_CHECKING:
    import torch

VALUES = "plan.safetensors"
CHUNK = 32 * 2**20


def expert_value(layer: int, number: int, role: str) -> str:
    """Name of a solved matrix of the output's expert ``number``."""
    return f"layers.{layer}.experts.{number}.{role}"


def factor_value(layer: int, number: int, role: str, suffix: str) -> str:
    """Name of a factor, of ``moezip.formats.factors``, of the output's expert ``number``."""
    return f"{expert_value(layer, number, role)}.{suffix.removeprefix('weight_')}"


def scale_value(name: str) -> str:
    """Name of the scales of a solved matrix ``name`` that is stored in fp8 blocks."""
    return f"{name}.{fp8_block.SUFFIX.removeprefix('_')}"


def router_value(layer: int, place: int = 0) -> str:
    """Name of fitted router rows."""
    return f"layers.{layer}.router.{place}"


def digest_of(values: Values, names: Sequence[str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the values called ``names``, in that order."""
    import torch

    found = hashlib.sha256()
    for name in names:
        value = values.read(name).contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_role(source: Source, architecture: Architecture, layer: int, expert: int, role: ExpertRole) -> torch.Tensor:
    """One matrix of one expert, canonical ([out, in]; [out] of a bias), in its stored dtype.

    Args:
        source: plain tensors.
    """
    tensor = next(each for each in architecture.experts if role in split_roles(each))
    name = tensor.template.format(layer=layer, expert=expert)
    if tensor.fused:
        stored = source.spec(name).shape[1:]
        inner = stored[0] if tensor.transposed == (role == "down") else stored[-1]
        width = inner if len(split_roles(tensor)) == 1 else inner // 2
        return Split(name, tensor, expert, role, None, width).read(source)
    value = source.read(name)
    return value.T.contiguous() if tensor.transposed else value


def average(source: Source, architecture: Architecture, layer: int, pick: Pick, role: ExpertRole) -> torch.Tensor:
    """The weighted mean of one role over a pick's parts, neurons put in order; float32."""
    import torch

    total: torch.Tensor | None = None
    for part in pick.parts:
        value = read_role(source, architecture, layer, part.expert, role).float()
        if part.neurons is not None and role != "down_bias":
            value = value.index_select(1 if role == "down" else 0, torch.tensor(part.neurons))
        total = value.mul_(part.weight) if total is None else total.add_(value, alpha=part.weight)
    assert total is not None
    return total


def stored_form(tensor: ExpertTensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One expert's tensor as the family stores it, from its canonical roles (``split_roles``)."""
    import torch

    if len(parts) == 2:
        value = torch.stack(list(parts), 1).flatten(0, 1) if tensor.interleaved else torch.cat(list(parts))
    else:
        [value] = parts
    return value.transpose(-1, -2).contiguous() if tensor.transposed and value.dim() > 1 else value.contiguous()


@final
class CheckpointValues:
    """The solved values of a plan, read out of a checkpoint that was written with it.

    Args:
        source: the checkpoint. names: the values' names.
    """

    def __init__(self, source: Source, names: Sequence[str]):
        self._source, self._names = source, list(names)
        self._architecture = identify(source.config, source.folder)

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Raises CheckpointError if the checkpoint does not have it."""
        if found := re.fullmatch(r"layers\.(\d+)\.experts\.(\d+)\.(\w+)\.(\w+)", name):
            tensor = next(each for each in self._architecture.experts if each.role == found[3])
            matrix = tensor.template.format(layer=int(found[1]), expert=int(found[2]))
            value = self._source.read(f"{matrix}_{found[4]}")
        elif found := re.fullmatch(r"layers\.(\d+)\.experts\.(\d+)\.(\w+)", name):
            layer, number, role = int(found[1]), int(found[2]), found[3]
            value = read_role(self._source, self._architecture, layer, number, role)  # type: ignore[arg-type]
        elif found := re.fullmatch(r"layers\.(\d+)\.router\.(\d+)", name):
            router = self._architecture.router[int(found[2])]
            value = self._source.read(router.template.format(layer=int(found[1])))
        else:
            raise CheckpointError(f"{name} is no value of a plan", where=self._source.folder)
        return value if rows is None else value[rows.start : rows.stop]


@final
class Merged:
    """``source`` through a plan that merges; a Source like any other.

    Args:
        source: plain tensors (``decoded``). values: the plan's solved values; None if it has none.
        split: as of ``Applied``.

    Raises:
        PlanError: as of ``Applied``, or values that are not those of the plan.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        values: Values | None = None,
        *,
        split: bool = False,
        block: fp8_block.Block = fp8_block.BLOCK,
    ):
        self.base, self._block = Applied(source, plan, split=split), block
        self._source, self.plan, self._values = source, plan, values
        self._solved = frozenset(plan.solved)
        if missing := sorted(self._solved - set(values.names() if values is not None else ())):
            raise PlanError(
                f"the plan's value {missing[0]} is not there ({len(missing)} are missing)",
                next=f"keep {VALUES} beside plan.json, or name the plan.json inside the checkpoint it was written with",
            )
        self.architecture = self.base.architecture  # the source's own
        self._stored = identify(self.base.config, source.folder)
        self._picks = {layer.layer: layer.picks for layer in plan.layers}
        self._claims: dict[str, Claim] = {}
        wire = tripwire_of(self._stored, self.base.config)
        for name in self.base.names():
            if name == wire:
                continue
            claim = self._stored.claim(name, self.base.config)
            if claim.layer in self._picks and claim.tensor is not None and self._touches(claim):
                self._claims[name] = claim

    def _touches(self, claim: Claim) -> bool:
        assert claim.layer is not None
        if claim.kind == "router":
            return any(
                router_value(claim.layer, place) in self._solved
                for place, tensor in enumerate(self._stored.router)
                if tensor == claim.tensor
            )
        if not isinstance(claim.tensor, ExpertTensor):
            return False
        numbers = range(len(self._picks[claim.layer])) if claim.expert is None else (claim.expert,)
        return any(
            self._picks[claim.layer][number].mixed or expert_value(claim.layer, number, role) in self._solved
            for number in numbers
            for role in split_roles(claim.tensor)
        )

    # -- what is not the source's ---------------------------------------------------------------------------

    def touches(self, name: str) -> bool:
        """Whether the tensor is none of the source's."""
        return name in self._claims

    def claim(self, name: str) -> Claim:
        """What a tensor is that ``touches`` tells of."""
        return self._claims[name]

    def solved_codes(self, value: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes and scales of a solved matrix that the plan has in fp8 blocks; None for any other."""
        if scale_value(value) not in self._solved:
            return None
        assert self._values is not None
        return self._values.read(value), self._values.read(scale_value(value))

    def _role(self, layer: int, number: int, role: ExpertRole, dtype: torch.dtype) -> torch.Tensor:
        name = expert_value(layer, number, role)
        if (codes := self.solved_codes(name)) is not None:
            return fp8_block.decode(*codes, self._block, dtype=dtype)
        if name in self._solved:
            assert self._values is not None
            return self._values.read(name).to(dtype)
        pick = self._picks[layer][number]
        if pick.mixed:
            return average(self._source, self.architecture, layer, pick, role).to(dtype)
        return read_role(self._source, self.architecture, layer, pick.kept, role)

    def _expert(self, claim: Claim, number: int, dtype: torch.dtype) -> torch.Tensor:
        assert isinstance(claim.tensor, ExpertTensor) and claim.layer is not None
        parts = [self._role(claim.layer, number, role, dtype) for role in split_roles(claim.tensor)]
        return stored_form(claim.tensor, parts)

    def _pieces(self, name: str, rows: range | None) -> Iterator[torch.Tensor]:
        """The tensor in pieces along its first axis: one expert at a time where it holds them all."""
        spec, claim = self.spec(name), self._claims[name]
        assert claim.layer is not None
        dtype = self.base.read(name, range(0)).dtype
        if claim.kind == "router":
            assert self._values is not None
            place = next(i for i, tensor in enumerate(self._stored.router) if tensor == claim.tensor)
            value = self._values.read(router_value(claim.layer, place)).to(dtype)
            yield value if rows is None else value[rows.start : rows.stop]
        elif claim.kind == "fused":
            for number in rows or range(spec.shape[0]):
                yield self._expert(claim, number, dtype)[None]
        else:
            assert claim.expert is not None
            value = self._expert(claim, claim.expert, dtype)
            yield value if rows is None else value[rows.start : rows.stop]

    # -- Source ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self.base.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.base.config

    @property
    def source_config(self) -> dict[str, Any]:
        """The config of what the plan is applied to."""
        return self.base.source_config

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor is the source's."""
        return self.base.changes_nothing

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    def names(self) -> list[str]:
        return self.base.names()

    def spec(self, name: str) -> TensorSpec:
        return self.base.spec(name)

    def metadata(self, file: str) -> dict[str, str]:
        return self.base.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        return self.base.raw_header(file)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        import torch

        if name not in self._claims:
            return self.base.read(name, rows)
        pieces = list(self._pieces(name, rows))
        if not pieces:
            return self.base.read(name, rows)
        value = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        spec = self.spec(name)
        if rows is None and tuple(value.shape) != spec.shape:
            raise PlanError(
                f"the values for {name} have shape {tuple(value.shape)}, the plan implies {spec.shape}",
                where=self.folder,
                next="use the plan with the values that it was made with",
            )
        return value

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        import torch

        if name not in self._claims:
            yield from self.base.chunks(name, rows)
            return
        for piece in self._pieces(name, rows):
            yield memoryview(piece.contiguous().view(torch.uint8).numpy().tobytes())

"""Experts in one canonical form, whatever the disk holds: split or fused, transposed, interleaved, quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from moezip.arch.layout import METHOD, TRIPWIRE_DTYPE, TRIPWIRE_SHAPE, Layout, tripwire
from moezip.arch.spec import Architecture, ExpertTensor, LayerFacts, RouterTensor
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError, CheckpointError
from moezip.formats import fp8_block, mxfp4

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes of decoded float32 held at a time
FLOATS = ("BF16", "F16", "F32", "F64")
FP8_SUFFIX = "_scale_inv"
MXFP4_SUFFIXES = ("_blocks", "_scales")


# -- stored quantization ------------------------------------------------------------------------------------


def decoded(source: Source) -> Source:
    """``source`` with plain tensors only: itself, or a ``Decoded`` view where its config names a quantization.

    Raises:
        ArchitectureError: a quantization that moezip cannot decode, or one that the tensors do not bear out.
    """
    quantization = source.config.get("quantization_config")
    if quantization is None:
        for name in source.names():
            if name.endswith(FP8_SUFFIX) or source.spec(name).dtype.startswith("F8_E"):
                raise ArchitectureError(
                    f"{name} is a piece of a quantized tensor, but config.json has no quantization_config",
                    where=source.folder / "config.json",
                    next="use the config.json that came with the weights",
                )
        return source
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD:
        return source  # ragged, but plain: whoever asks for the layers' facts has the format checked
    return Decoded(source)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What one plain tensor is stored as."""

    codes: TensorSpec
    scales: TensorSpec
    plain: TensorSpec


@final
class Decoded:
    """A ``Source`` through which stored quantization looks like plain BF16 tensors.

    DeepSeek's fp8 blocks: ``X.weight`` with ``X.weight_scale_inv``, one scale per ``weight_block_size``.
    gpt-oss' mxfp4: ``N_blocks`` [E, out, in / 32, 16] and ``N_scales`` [E, out, in / 32] become N in its plain form
    [E, in, out]. Only the rows asked for are decoded, in pieces.

    Raises:
        ArchitectureError: the quantization is another one, or a piece of a tensor is missing or misshapen.
    """

    def __init__(self, source: Source):
        self._source = source
        quantization = source.config.get("quantization_config")
        if not isinstance(quantization, Mapping):
            raise self._fault("quantization_config is not an object")
        self._method = str(quantization.get("quant_method"))
        self._block = (0, 0)
        if self._method == "fp8":
            self._block = fp8_block.block_size(source.config)
            self._pieces = {p.plain.name: p for p in self._fp8_pieces()}
        elif self._method == "mxfp4":
            self._pieces = {p.plain.name: p for p in self._mxfp4_pieces()}
        else:
            raise self._fault(f"moezip cannot decode weights stored with quant_method {self._method!r}")
        if not self._pieces:
            raise self._fault(f"config.json says {self._method}, but no tensor is stored that way")

    def _fault(self, what: str) -> ArchitectureError:
        return ArchitectureError(
            what,
            where=self._source.folder / "config.json",
            next="moezip reads plain weights, fp8 blocks (DeepSeek) and mxfp4 (gpt-oss); start from the unquantized "
            "checkpoint",
        )

    def _fp8_pieces(self) -> Iterator[Pieces]:
        names = set(self._source.names())
        for name in self._source.names():
            spec = self._source.spec(name)
            if name + FP8_SUFFIX in names:
                scales = self._source.spec(name + FP8_SUFFIX)
                if len(spec.shape) != 2 or scales.shape != fp8_block.scale_shape(*spec.shape, self._block):
                    raise self._fault(
                        f"{name} {spec.shape} and its scales {scales.shape} do not fit blocks of {self._block}"
                    )
                yield Pieces(spec, scales, TensorSpec(name, "BF16", spec.shape, spec.file))
            elif spec.dtype.startswith("F8_E4M3"):
                raise self._fault(f"{name} is stored in fp8 without {name + FP8_SUFFIX}")

    def _mxfp4_pieces(self) -> Iterator[Pieces]:
        names = set(self._source.names())
        for name in self._source.names():
            for suffix, other in (MXFP4_SUFFIXES, MXFP4_SUFFIXES[::-1]):
                if name.endswith(suffix) and name.removesuffix(suffix) + other not in names:
                    raise self._fault(f"{name} is stored without {name.removesuffix(suffix) + other}")
            if name.endswith(MXFP4_SUFFIXES[0]):
                plain = name.removesuffix(MXFP4_SUFFIXES[0])
                codes, scales = self._source.spec(name), self._source.spec(plain + MXFP4_SUFFIXES[1])
                if len(codes.shape) != 4 or codes.shape[3] != 16 or scales.shape != codes.shape[:3]:
                    raise self._fault(f"{name} {codes.shape} and its scales {scales.shape} do not fit together")
                experts, out, groups, _ = codes.shape
                yield Pieces(codes, scales, TensorSpec(plain, "BF16", (experts, 32 * groups, out), codes.file))

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self._source.config.items() if key != "quantization_config"}

    @property
    def fingerprint(self) -> str:
        """The stored checkpoint's: statistics taken through this view belong to it."""
        return self._source.fingerprint

    @cached_property
    def _names(self) -> list[str]:
        plain = {piece.codes.name: piece.plain.name for piece in self._pieces.values()}
        hidden = {piece.scales.name for piece in self._pieces.values()}
        return [plain.get(name, name) for name in self._source.names() if name not in hidden]

    def names(self) -> list[str]:
        return list(self._names)

    def metadata(self, file: str) -> dict[str, str]:
        return self._source.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        touched = {spec.file for piece in self._pieces.values() for spec in (piece.codes, piece.scales)}
        return None if file in touched else self._source.raw_header(file)

    def spec(self, name: str) -> TensorSpec:
        return self._pieces[name].plain if name in self._pieces else self._source.spec(name)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        import torch

        if name not in self._pieces:
            return self._source.read(name, rows)
        piece = self._pieces[name]
        rows = self._rows(piece, rows)
        whole = torch.empty((len(rows), *piece.plain.shape[1:]), dtype=torch.bfloat16)
        for start, part in self._decode(piece, rows):
            whole[start - rows.start : start - rows.start + part.shape[0]] = part
        return whole

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        import torch

        if name not in self._pieces:
            yield from self._source.chunks(name, rows)
            return
        piece = self._pieces[name]
        for _, part in self._decode(piece, self._rows(piece, rows)):
            flat = part.contiguous().view(torch.uint8).flatten()
            for start in range(0, flat.numel(), CHUNK):
                yield flat[start : start + CHUNK].numpy().data

    def _rows(self, piece: Pieces, rows: range | None) -> range:
        whole = range(piece.plain.shape[0])
        if rows is None:
            return whole
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= len(whole):
            raise CheckpointError(
                f"{piece.plain.name} of shape {list(piece.plain.shape)} has no rows {rows}", where=self.folder
            )
        return rows

    def _decode(self, piece: Pieces, rows: range) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, its decoded rows) until ``rows`` are done."""
        if self._method == "mxfp4":
            for expert in rows:
                one = range(expert, expert + 1)
                codes, scales = (self._source.read(spec.name, one) for spec in (piece.codes, piece.scales))
                yield expert, mxfp4.decode(codes, scales).transpose(1, 2)
            return
        height, columns = self._block[0], piece.plain.shape[1]
        step = max(1, CHUNK // (4 * columns * height)) * height
        # Pieces begin where blocks begin, so that each is decoded with whole rows of scales.
        for start in range(rows.start - rows.start % height, rows.stop, step):
            stop = min(start + step, rows.stop)
            codes = self._source.read(piece.codes.name, range(start, stop))
            scales = self._source.read(piece.scales.name, range(start // height, -(-stop // height)))
            values = fp8_block.decode(codes, scales, self._block)
            skip = max(0, rows.start - start)
            yield start + skip, values[skip:]


# -- canonical experts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert, canonical: rows are output channels.

    Attributes:
        gate, up: [F, D]. down: [D, F].
        gate_bias, up_bias: [F]. down_bias: [D]. None where the family has no biases.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


def read_expert(source: Source, architecture: Architecture, layer: int, expert: int) -> Expert:
    """One expert of one layer, whatever the disk form, in its stored dtype.

    Args:
        source: plain tensors; pass ``decoded(source)`` where a quantization may be stored.

    Raises:
        ArchitectureError: a tensor is stored as codes.
        CheckpointError: there is no such layer or expert.
    """
    parts: dict[str, torch.Tensor] = {}
    for tensor in architecture.experts:
        name = tensor.template.format(layer=layer, expert=expert)
        if source.spec(name).dtype not in FLOATS:
            raise ArchitectureError(
                f"{name} is stored as {source.spec(name).dtype} codes, not as numbers",
                where=source.folder,
                next="read it through moezip.arch.experts.decoded",
            )
        value = source.read(name, range(expert, expert + 1))[0] if tensor.fused else source.read(name)
        if tensor.transposed:
            value = value.transpose(-1, -2)
        if tensor.role in ("gate_up", "gate_up_bias"):
            suffix = tensor.role.removeprefix("gate_up")
            half = value.shape[0] // 2
            parts["gate" + suffix] = value[0::2] if tensor.interleaved else value[:half]
            parts["up" + suffix] = value[1::2] if tensor.interleaved else value[half:]
        else:
            parts[tensor.role] = value
    return Expert(**{role: part.contiguous() for role, part in parts.items()})


# -- config against tensors ---------------------------------------------------------------------------------


def check_shapes(source: Source, architecture: Architecture) -> None:
    """Config and headers tell the same story: count, width and hidden size of every expert and router.

    Of a ragged checkpoint the story is its layout's, and the tripwire must be there. Nothing is read but headers. Every
    name in an MoE block must be an expert's, the router's or a shared expert's.

    Raises:
        ArchitectureError: with the numbers that disagree, or the name that no entry claims.
    """
    config = source.config
    facts = {fact.layer: fact for fact in architecture.layer_facts(config)}
    layout, plain = Layout.of(config), decoded(source)
    trip = None if layout is None else tripwire(architecture, layout)
    if trip is not None:
        _check_tripwire(plain, trip)
    found: dict[tuple[int, ExpertTensor], set[int]] = {}
    routers: set[tuple[int, RouterTensor]] = set()
    for name in plain.names():
        claim = architecture.claim(name, config)
        if claim.kind == "extra" or name == trip:
            continue
        if claim.layer is None or claim.tensor is None:
            _check_neighbour(name, architecture, facts, source)
            continue
        fact, shape = facts.get(claim.layer), plain.spec(name).shape
        if fact is None:
            raise _disagree(f"{name} is there, but by the config layer {claim.layer} has no experts", source)
        if isinstance(claim.tensor, RouterTensor):
            routers.add((claim.layer, claim.tensor))
            axis = claim.tensor.axis
            count = shape[axis] if axis < len(shape) else None
            if count != fact.experts:
                raise _disagree(f"{name} has {count} experts, the config says {fact.experts}", source)
            continue
        if layout is not None and claim.expert is not None:
            widths = layout.widths[claim.layer]
            if claim.expert >= len(widths) or not widths[claim.expert]:
                raise _disagree(f"{name} is there; by the layout there is no such expert, or its width is 0", source)
            fact = replace(fact, width=widths[claim.expert])
        wanted = plain_shape(claim.tensor, fact)
        if claim.tensor.fused and shape[:1] != wanted[:1]:
            raise _disagree(f"{name} holds {shape[:1]} experts, the config says {fact.experts}", source)
        if shape != wanted:
            raise _disagree(
                f"{name} has shape {shape}; with hidden size {fact.hidden} and expert width {fact.width} the config "
                f"implies {wanted}",
                source,
            )
        seen = found.setdefault((claim.layer, claim.tensor), set())
        seen.update(range(fact.experts) if claim.expert is None else (claim.expert,))
    for fact in facts.values():
        wide = None if layout is None else {e for e, width in enumerate(layout.widths[fact.layer]) if width}
        for tensor in architecture.experts:
            _check_count(found.get((fact.layer, tensor), set()), tensor, fact, source, wide)
        for row in architecture.router:
            if (fact.layer, row) not in routers:
                raise _disagree(f"{row.template.format(layer=fact.layer)} is missing", source)


def plain_shape(tensor: ExpertTensor, fact: LayerFacts) -> tuple[int, ...]:
    """The stored shape of an expert tensor in its plain form."""
    inner = {"gate": fact.width, "up": fact.width, "down": fact.hidden, "gate_up": 2 * fact.width}
    if tensor.role in ("gate_up_bias", "down_bias"):
        shape: tuple[int, ...] = (inner[tensor.role.removesuffix("_bias")],)
    else:
        shape = (inner[tensor.role], fact.width if tensor.role == "down" else fact.hidden)
    if tensor.transposed:
        shape = shape[::-1]
    return (fact.experts, *shape) if tensor.fused else shape


def _check_tripwire(source: Source, name: str) -> None:
    if name not in source.names() or source.spec(name).shape != TRIPWIRE_SHAPE:
        raise ArchitectureError(
            f"the tensor {name} of shape {list(TRIPWIRE_SHAPE)} ({TRIPWIRE_DTYPE}) is missing, which stops loaders "
            "that do not know the format",
            where=source.folder,
            next="write the checkpoint again with moezip",
        )


def _check_count(
    seen: set[int], tensor: ExpertTensor, fact: LayerFacts, source: Source, wide: set[int] | None = None
) -> None:
    """``wide``: the experts of a ragged layer that have tensors."""
    expected = set(range(fact.experts)) if wide is None else wide
    if seen == expected:
        return
    name = tensor.template.format(layer=fact.layer, expert="*")
    missing = sorted(expected - seen)
    what = f"layer {fact.layer} has {len(seen)} tensors {name}, the config says {fact.experts} experts"
    raise _disagree(f"{what}; the first missing is {missing[0]}" if missing else what, source)


def _check_neighbour(name: str, architecture: Architecture, facts: Mapping[int, object], source: Source) -> None:
    """A tensor of an MoE block that is neither an expert's nor the router's must belong to a shared expert."""
    parts = name.removeprefix(f"{architecture.layers}.").split(".")
    if name.startswith(f"{architecture.layers}.") and len(parts) > 2 and parts[0].isdecimal():
        inside = int(parts[0]) in facts and parts[1] == architecture.disk_block
        if inside and parts[2] not in architecture.shared_modules:
            raise ArchitectureError(
                f"the tensor {name} lies in an MoE block, but the entry for {architecture.name} does not claim it",
                where=source.folder,
                next="it may hold one value per expert, which pruning would leave stale; please report the name",
            )


def _disagree(what: str, source: Source) -> ArchitectureError:
    return ArchitectureError(
        f"config.json and the tensors disagree: {what}",
        where=source.folder,
        next="use the config.json that came with these weights, or download the missing shards again",
    )

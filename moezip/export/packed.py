"""Packed checkpoints in the formats of others: the same codes under another config, or laid out anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from moezip.arch.experts import decoded, packed_grids
from moezip.arch.families import identify
from moezip.arch.packing import stem
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import PlanError
from moezip.export import compressed_tensors, gptq
from moezip.export.remade import Made, Remade, stock_config, without_tripwire
from moezip.formats.gptq import ORDER, QWEIGHT, QZEROS, SCALES
from moezip.formats.packed import PACKED, WORD, Grid, decode

if TYPE_CHECKING:
    import torch

NEXT = "export it as plain numbers (--to safetensors)"


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of a checkpoint, and what the checkpoint is without them.

    Attributes:
        grids: of the packed matrices, by name. shapes: of all weights in plain form, by name.
        config: stock, without a quantization.
        dtype: the model's, by its safetensors name.
    """

    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    dtype: str


def codes_of(source: Source) -> Codes:
    """
    Raises:
        PlanError: there are no packed codes, or layers or experts differ.
        ArchitectureError: codes that the tensors do not bear out.
    """
    grids, plain = packed_grids(source), decoded(source)
    if not grids:
        method = (source.config.get("quantization_config") or {}).get("quant_method")
        stored = f"its weights are stored as {method}" if method else "its weights are plain numbers"
        raise PlanError(
            f"{stored}, and only packed codes can be laid out otherwise",
            where=source.folder,
            next=NEXT if method else "quantize it first (moezip quantize)",
        )
    config = stock_config(source)
    if config is None:
        raise PlanError(
            "its layers or experts differ in number or width, which other formats cannot say",
            where=source.folder,
            next="keep it in moezip's own format, or prune with --scope layer before quantizing",
        )
    shapes = {name: plain.spec(name).shape for name in without_tripwire(plain)}
    return Codes(grids, shapes, config, plain.spec(next(iter(grids))).dtype)


def as_compressed_tensors(source: Source, codes: Codes) -> Remade:
    """``source`` with its tensors as they are, and a config by which compressed-tensors and engines read them.

    Raises:
        PlanError: what that format cannot say.
    """
    if (source.config.get("quantization_config") or {}).get("quant_method") == compressed_tensors.METHOD:
        raise PlanError("it is a compressed-tensors checkpoint already", where=source.folder, next=NEXT)
    quantization = compressed_tensors.quantization_config(identify(codes.config), codes.grids, codes.shapes)
    return Remade(source, {**codes.config, "quantization_config": quantization}, [*without_tripwire(source)])


def as_gptq(source: Source, codes: Codes) -> Remade:
    """``source`` as AutoGPTQ and GPTQModel write it, one matrix at a time in memory.

    Raises:
        PlanError: what that format cannot say.
    """
    quantization = gptq.quantization_config(identify(codes.config), codes.grids, codes.shapes)
    tensors = list(_gptq_tensors(source, codes))
    return Remade(source, {**codes.config, "quantization_config": quantization}, tensors)


def _gptq_tensors(source: Source, codes: Codes) -> Iterator[str | Made]:
    """A matrix' tensors stand where its packed words stood."""
    suffixes = {name: list(grid.specs(1, grid.group or 1)) for name, grid in codes.grids.items()}
    less_one = gptq.stored_less_one(codes.grids)
    pieces = {stem(name) + suffix: name for name, own in suffixes.items() for suffix in own}

    @lru_cache(maxsize=1)  # the four of one matrix follow each other
    def encoded(name: str) -> dict[str, torch.Tensor]:
        stored = {suffix: source.read(stem(name) + suffix) for suffix in suffixes[name]}
        return gptq.tensors(name, decode(stored, codes.grids[name], name), less_one=less_one)

    def rows_of(name: str, full: str, rows: range) -> Iterator[torch.Tensor]:
        yield encoded(name)[full][rows.start : rows.stop]

    for piece in without_tripwire(source):
        if piece not in pieces:
            yield piece
        elif piece.endswith(f".{PACKED}"):
            name = pieces[piece]
            (rows, columns), grid = codes.shapes[name], codes.grids[name]
            groups, per_word = grid.groups(columns), WORD // grid.bits
            specs = {
                QWEIGHT: ("I32", (columns // per_word, rows)),
                QZEROS: ("I32", (groups, rows // per_word)),
                SCALES: (grid.scale, (groups, rows)),
                ORDER: ("I32", (columns,)),
            }
            for suffix, (dtype, shape) in specs.items():
                full = stem(name) + suffix
                spec = TensorSpec(full, dtype, shape, source.spec(piece).file)
                yield Made(spec, partial(rows_of, name, full))


def misread(codes: Codes, view: Source) -> str | None:
    """Why transformers does not read a ``compressed-tensors`` export as it is meant; None where it does."""
    scales = {grid.scale for grid in codes.grids.values()}
    return compressed_tensors.misread(view.config["quantization_config"], scales, codes.dtype)


def unread(reader: str, codes: Codes, view: Source) -> str | None:
    """Why ``reader`` does not read these codes in the format of ``view``; None where it does.

    From the source code of vLLM 0.33 and SGLang 0.5.23, and from running transformers 5.23.
    """
    method = view.config["quantization_config"]["quant_method"]
    widths = sorted({grid.bits for grid in codes.grids.values()})
    if reader == "llamacpp":
        return "llama.cpp reads GGUF files, which --to gguf writes"
    if reader == "transformers" and method == compressed_tensors.METHOD:
        return misread(codes, view)
    if reader == "sglang" and not set(widths) <= {4, 8}:
        return f"SGLang reads 4 and 8 bits, here are {', '.join(map(str, widths))}"
    if method == gptq.METHOD:
        return unread_gptq(reader, all(grid.symmetric for grid in codes.grids.values()))
    return None


# It keeps a layer's experts in one tensor each of gate with up and down, for which its GPTQ loader has no code.
GPTQ_IN_TRANSFORMERS = (
    "transformers finds no codes for the experts, fills them with random numbers and says so in a warning only"
)


def unread_gptq(reader: str, symmetric: bool) -> str | None:
    """Why ``reader`` does not read codes in GPTQ's layout; None where it does.

    Of transformers from running 5.23 with GPTQModel 7.7.
    """
    if reader == "transformers":
        return GPTQ_IN_TRANSFORMERS
    if reader in ("vllm", "sglang") and not symmetric:
        return "vLLM and SGLang read GPTQ without zeros only"
    return None

"""Stored quantization read as plain numbers: a ``Source`` through which codes look like the tensors they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from moezip.arch import factoring, packing
from moezip.arch.layout import METHOD, STORED, own_format
from moezip.checkpoint.reader import TORCH_DTYPES
from moezip.checkpoint.source import Source, TensorSpec
from moezip.errors import ArchitectureError, CheckpointError
from moezip.formats import compressed_tensors, fp8_block, gptq, mxfp4
from moezip.formats.factors import LEFT
from moezip.formats.packed import PACKED, Grid
from moezip.formats.stored import CHUNK, Stored, fault

if TYPE_CHECKING:
    import torch

# Keys of moezip's own ``quantization_config`` that say which matrices are not plain.
OWN = (packing.KEY, factoring.KEY)


def _own(source: Source) -> Iterator[Stored]:
    yield from packing.stored(source)
    yield from factoring.stored(source)


# By ``quant_method``: the format's list of the tensors that a checkpoint stores in it.
FORMS: dict[str, Callable[[Source], Iterator[Stored]]] = {
    "fp8": fp8_block.stored,
    "mxfp4": mxfp4.stored,
    compressed_tensors.METHOD: compressed_tensors.stored,
    gptq.METHOD: gptq.stored,
    METHOD: _own,
}
# How the name of a piece of a quantized tensor may end.
PIECES = (fp8_block.SUFFIX, f".{PACKED}", f".{gptq.QWEIGHT}", f".{LEFT}")


def decoded(source: Source) -> Source:
    """``source`` with plain tensors only: itself, or a ``Decoded`` view where its config names a quantization.

    Raises:
        ArchitectureError: a quantization that moezip cannot decode, or one that the tensors do not bear out.
    """
    quantization = source.config.get("quantization_config")
    if quantization is None:
        for name in source.names():
            if name.endswith(PIECES) or source.spec(name).dtype.startswith("F8_E"):
                raise ArchitectureError(
                    f"{name} is a piece of a quantized tensor, but config.json has no quantization_config",
                    where=source.folder / "config.json",
                    next="use the config.json that came with the weights",
                )
        return source
    if own_format(source.config) and not any(quantization.get(key) for key in (*OWN, STORED)):
        return source  # ragged, but plain: whoever asks for the layers' facts has the format checked
    return Decoded(source)


def packed_grids(source: Source) -> dict[str, Grid]:
    """The matrices that a checkpoint stores in the layout of ``moezip.formats.packed``, and their grids, by name.

    Raises:
        ArchitectureError: as of ``decoded``.
    """
    view = decoded(source)
    stored = view.stored if isinstance(view, Decoded) else {}
    return {name: each.grid for name, each in stored.items() if each.grid is not None}


@final
class Decoded:
    """A ``Source`` through which stored quantization looks like plain tensors.

    What is stored how, the formats say (``FORMS``). Only the rows asked for are decoded, in pieces.

    Raises:
        ArchitectureError: the quantization is another one, or a piece of a tensor is missing or misshapen.
    """

    def __init__(self, source: Source):
        self._source = source
        quantization = source.config.get("quantization_config")
        if not isinstance(quantization, Mapping):
            raise fault(source, "quantization_config is not an object")
        self._stored: dict[str, Stored] = {}
        for each in (quantization, quantization.get(STORED)):  # moezip's own format may hold codes of its source's
            if not each or (each is quantization and own_format(source.config) and not any(map(each.get, OWN))):
                continue
            method = str(each.get("quant_method"))
            if method not in FORMS:
                raise fault(source, f"moezip cannot decode weights stored with quant_method {method!r}")
            found = {stored.plain.name: stored for stored in FORMS[method](source)}
            if not found:
                raise fault(source, f"config.json says {method}, but no tensor is stored that way")
            self._stored |= found

    @property
    def stored(self) -> Mapping[str, Stored]:
        """What is stored as codes, by its name in plain form."""
        return self._stored

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        plain = {key: value for key, value in self._source.config.items() if key != "quantization_config"}
        if own_format(self._source.config):  # its layers may differ all the same
            given = self._source.config["quantization_config"]
            codes = (*OWN, STORED)
            plain["quantization_config"] = {key: value for key, value in given.items() if key not in codes}
        return plain

    @property
    def fingerprint(self) -> str:
        """The stored checkpoint's: statistics taken through this view belong to it."""
        return self._source.fingerprint

    @cached_property
    def _names(self) -> list[str]:
        plain = {stored.pieces[0].name: stored.plain.name for stored in self._stored.values()}
        hidden = {piece.name for stored in self._stored.values() for piece in stored.pieces[1:]}
        return [plain.get(name, name) for name in self._source.names() if name not in hidden]

    def names(self) -> list[str]:
        return list(self._names)

    def metadata(self, file: str) -> dict[str, str]:
        return self._source.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        touched = any(piece.file == file for stored in self._stored.values() for piece in stored.pieces)
        return None if touched else self._source.raw_header(file)

    def spec(self, name: str) -> TensorSpec:
        return self._stored[name].plain if name in self._stored else self._source.spec(name)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        import torch

        if name not in self._stored:
            return self._source.read(name, rows)
        stored = self._stored[name]
        rows, dtype = self._rows(stored, rows), getattr(torch, TORCH_DTYPES[stored.plain.dtype])
        whole = torch.empty((len(rows), *stored.plain.shape[1:]), dtype=dtype)
        for start, part in stored.decode(self._source, rows):
            whole[start - rows.start : start - rows.start + part.shape[0]] = part
        return whole

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        import torch

        if name not in self._stored:
            yield from self._source.chunks(name, rows)
            return
        stored = self._stored[name]
        for _, part in stored.decode(self._source, self._rows(stored, rows)):
            flat = part.contiguous().view(torch.uint8).flatten()
            for start in range(0, flat.numel(), CHUNK):
                yield flat[start : start + CHUNK].numpy().data

    def _rows(self, stored: Stored, rows: range | None) -> range:
        whole = range(stored.plain.shape[0])
        if rows is None:
            return whole
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= len(whole):
            raise CheckpointError(
                f"{stored.plain.name} of shape {list(stored.plain.shape)} has no rows {rows}", where=self.folder
            )
        return rows

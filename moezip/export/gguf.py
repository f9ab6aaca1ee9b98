"""A checkpoint as one GGUF file, llama.cpp's own format: streamed tensor by tensor, an expert at a time in memory."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.families import identify
from moezip.arch.mone import Substitution
from moezip.arch.spec import Architecture
from moezip.checkpoint.source import Source
from moezip.errors import CheckpointError, PlanError, UsageError
from moezip.export import gguf_families
from moezip.export.dense import dense
from moezip.export.gguf_families import FAMILIES, Family
from moezip.export.gguf_tensors import Written, tensors
from moezip.export.gguf_vocabulary import AUTO, NONE, Vocabulary, vocabulary
from moezip.progress import Progress, Watch, unwatched
from moezip.registry import lookup

if TYPE_CHECKING:
    import numpy as np
    import torch

# What users ask for, and llama.cpp's number of such a file.
TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "MXFP4": 38}
LARGEST_F16 = 65504.0
HEADER = 64 << 20  # bytes kept free for metadata and vocabulary


@dataclass(frozen=True, slots=True)
class GGUFParams:
    """Settings of ``--to gguf``.

    Attributes:
        type: of the matrices: F32, F16, BF16, Q8_0, Q4_0, or MXFP4 (experts alone, the rest F16). Norms, routers and
            biases stay F32; with Q4_0, embedding and output are Q8_0.
        pre: llama.cpp's name for the tokenizer's rules; ``auto`` recognises them, ``none`` leaves the tokenizer out.
    """

    type: str = "F16"
    pre: str = AUTO


@dataclass(frozen=True, slots=True)
class Ready:
    """A file that could be written: everything but the numbers is known.

    Attributes:
        metadata: of the model, ``<arch>.`` left out.
        tensors: each with the name of its type.
        notes: what the user must be told.
    """

    source: Source
    entry: Architecture
    family: Family
    params: GGUFParams
    metadata: Mapping[str, gguf_families.Value]
    vocabulary: Vocabulary
    tensors: tuple[tuple[Written, str], ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return sum(_bytes(written, kind) for written, kind in self.tensors)


def ready(source: Source, params: GGUFParams) -> Ready:
    """
    Raises:
        UsageError: no such type, or the package gguf is missing.
        PlanError: what llama.cpp does not read, or would compute otherwise.
    """
    lookup(params.type, TYPES, "type")
    _require_package()
    from transformers import AutoConfig

    if Substitution.of(source.config) is not None:
        raise _refused(source, "it has constants in place of experts (MoNE), which only vLLM and moezip read")
    plain = dense(source)
    entry = identify(plain.config, source.folder)
    family = FAMILIES.get(entry.name)
    if family is None:
        raise _refused(source, f"moezip writes no GGUF of {entry.name} models yet; it does of {', '.join(FAMILIES)}")
    settings = dict(plain.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    why = gguf_families.refusal(family, entry, plain.config, config)
    if why is not None:
        raise _refused(source, f"llama.cpp would compute something else: {why}")
    metadata = gguf_families.metadata(family, entry, plain.config, config)
    words = vocabulary(source.folder, config.vocab_size, params.pre)
    chosen = tuple((written, _type(written, params.type)) for written in tensors(plain, entry, family, config))
    notes = [*_notes(source, entry, params, chosen)]
    if (odd := gguf_families.difference(config)) is not None:
        notes.append(odd)
    return Ready(plain, entry, family, params, metadata, words, chosen, tuple(notes))


def _require_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as missing:
        raise UsageError(
            "GGUF files are written with the package gguf, which is not installed", where="--to gguf",
            next="pip install 'moezip[gguf]'",
        ) from missing  # fmt: skip


def _refused(source: Source, why: str) -> PlanError:
    next = "export it to another format (--to safetensors)"
    return PlanError(f"it cannot be written as GGUF: {why}", where=source.folder, next=next)


def _notes(source: Source, entry: Architecture, params: GGUFParams, chosen: tuple[tuple[Written, str], ...]) -> Any:
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    if method and any(source.spec(name).dtype not in ("BF16", "F16", "F32") for name in source.names()):
        yield f"its codes ({method}) were decoded and stored anew as {params.type}: what that rounds is lost besides"
    odd = Counter(kind for written, kind in chosen if kind == "F16" and not written.full and _asked(written, params))
    if odd:
        yield f"{odd['F16']} matrices stay F16: their rows are no multiple of 32, which {params.type} needs"
    if any(entry.claim(name, source.config).kind == "extra" for name in source.names()):
        yield "layers of multi-token prediction are left out"
    if source.config.get("expert_skipping"):
        yield "llama.cpp runs every expert: the rule that skips some is left out"
    if params.pre == NONE:
        yield "there is no tokenizer in it: only programs that give token numbers can use it"


def _asked(written: Written, params: GGUFParams) -> bool:
    """Whether the type asked for is one that this matrix gets, if its rows allow."""
    return params.type in ("Q8_0", "Q4_0") or (params.type == "MXFP4" and written.expert)


def _type(written: Written, asked: str) -> str:
    if written.full:
        return "F32"
    kind = asked
    if asked == "Q4_0" and written.embedding:
        kind = "Q8_0"
    elif asked == "MXFP4" and not written.expert:
        kind = "F16"
    return kind if kind in ("F32", "F16", "BF16") or written.shape[-1] % 32 == 0 else "F16"


def _bytes(written: Written, kind: str) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(written.shape) // block * size


def write_gguf(
    ready: Ready, out: Path, facts: Mapping[str, str], *, overwrite: bool = False, watch: Watch = unwatched
) -> int:
    """Writes the file ``out``, all of it or nothing, and reads its table of contents back.

    Args:
        facts: where it comes from, stored as ``moezip.<key>``.

    Returns:
        Its bytes.

    Raises:
        CheckpointError: the file exists, the disk is full, or numbers that are not finite or too large for F16.
    """
    refuse_gguf(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(out.parent).free, ready.bytes + HEADER
    if free < needed:
        raise CheckpointError(
            f"not enough disk space: {needed:,} bytes are needed, {free:,} are free", where=out.parent,
            next="free some space, or choose an output on another disk",
        )  # fmt: skip
    staged = out.with_name(f".{out.name}.moezip-staging-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _write(ready, staged, facts, watch)
        _require_whole(ready, staged)
        os.replace(staged, out)
    except OSError as error:
        raise CheckpointError(f"cannot write the file: {error.strerror}", where=out) from error
    finally:
        staged.unlink(missing_ok=True)
    return out.stat().st_size


def refuse_gguf(out: Path, overwrite: bool) -> None:
    """Raises CheckpointError before any work if the file could not be put there in the end."""
    if out.is_dir():
        raise CheckpointError(
            "a GGUF file would be written, and this is a folder", where=out, next=f"name a file, such as {out}.gguf"
        )
    if out.exists() and not overwrite:
        raise CheckpointError("the output exists", where=out, next="choose another, or pass --overwrite to replace it")


def _write(ready: Ready, file: Path, facts: Mapping[str, str], watch: Watch) -> None:
    import gguf

    writer = gguf.GGUFWriter(None, ready.family.arch)
    _describe(ready, writer, facts)
    for written, kind in ready.tensors:
        size = _bytes(written, kind)
        code = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(written.name, written.shape, _numpy_dtype(kind), size, raw_dtype=code)
    total, done = ready.bytes, 0
    try:
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None  # opened with the header
        stream = writer.fout[0]
        for written, kind in ready.tensors:
            writer.write_padding(stream, stream.tell())
            start = stream.tell()
            for piece in written.pieces():
                encoded = encode(piece, kind, written.name)
                encoded.tofile(stream)
                done += encoded.nbytes
                watch(Progress("write", done, total, "bytes"))
            size, meant = stream.tell() - start, _bytes(written, kind)
            if size != meant:
                raise CheckpointError(f"{written.name} came out as {size:,} bytes in place of {meant:,}", where=file)
            writer.write_padding(stream, size)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        writer.close()


def _numpy_dtype(kind: str) -> Any:
    """What ``add_tensor_info`` is to take the shape for: elements, not bytes."""
    import numpy as np

    return np.dtype(np.float32 if kind == "F32" else np.float16)


def encode(piece: torch.Tensor, kind: str, name: str) -> np.ndarray[Any, Any]:
    """Numbers as they are stored.

    Raises:
        CheckpointError: numbers that are not finite, or too large for F16.
    """
    import gguf

    values = piece.float().contiguous().numpy()
    largest = abs(values).max(initial=0.0)
    if not largest < float("inf"):
        raise CheckpointError(f"{name} has numbers that are not finite", next="check the source (moezip verify)")
    if kind == "F16" and largest > LARGEST_F16:
        raise CheckpointError(f"{name} has {largest:g}, more than F16 can hold", next="use --set type=BF16 or F32")
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def _describe(ready: Ready, writer: Any, facts: Mapping[str, str]) -> None:
    import gguf

    folder = ready.source.folder
    writer.add_type(gguf.GGUFType.MODEL)
    talk = logging.getLogger("metadata")  # its word on model cards without a front matter is of no use here
    level = talk.level
    talk.setLevel(logging.CRITICAL)
    try:
        about = gguf.Metadata.load(None, folder, None, 0)
    finally:
        talk.setLevel(level)
    about.name = about.name or folder.name
    about.set_gguf_meta_model(writer)
    for key, value in facts.items():
        writer.add_string(f"moezip.{key}", value)
    writer.add_file_type(TYPES[ready.params.type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
    }  # fmt: skip
    for name, fact in ready.metadata.items():
        add[type(fact)](f"{ready.family.arch}.{name}", fact)
    words = ready.vocabulary
    writer.add_tokenizer_model(words.model)
    if words.model == NONE:
        return
    if words.pre:
        writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.kinds))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.space_first is not None:
        writer.add_add_space_prefix(words.space_first)
    special = gguf.SpecialVocab(folder, load_merges=words.model == "gpt2", n_vocab=len(words.tokens))
    special.add_special_token.setdefault("bos", False)  # else llama.cpp adds one by its own default
    special.add_to_gguf(writer, quiet=True)


def _require_whole(ready: Ready, file: Path) -> None:
    """Raises CheckpointError where the file's table of contents is not what was meant."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for written, kind in ready.tensors:
        tensor = found.pop(written.name, None)
        shape = None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))
        if tensor is None or shape != written.shape or tensor.tensor_type.name != kind:
            raise CheckpointError(f"{written.name} is not in the file as it was written", where=file)
    if found:
        raise CheckpointError(f"{min(found)} is in the file, though nobody wrote it", where=file)

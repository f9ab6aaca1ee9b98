"""Who reads a checkpoint in the form that it was written in, and how: for reports and model cards.

What is said of vLLM and SGLang is from their source code (0.33 and 0.5.23), of transformers from running 5.23, of
llama.cpp from running files that ``moezip export --to gguf`` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moezip.arch.families import identify
from moezip.arch.layout import own_format
from moezip.errors import MoezipError
from moezip.export.gguf_families import FAMILIES
from moezip.export.packed import as_compressed_tensors, codes_of, unread, unread_gptq
from moezip.export.remade import stock_config
from moezip.formats.gptq import METHOD
from moezip.runtime.skipping import Skipping

if TYPE_CHECKING:
    from moezip.checkpoint.source import Source

Form = Literal["stock", "moezip", "mone", "compressed-tensors", "gptq", "gguf"]
NAMES = {
    "transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp", "moezip": "moezip",
}  # fmt: skip
PLACE = "path/to/this/folder"
LOAD = f'import moezip\nmodel = moezip.load("{PLACE}")'
PRETRAINED = f'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("{PLACE}")'
SERVE = {"vllm": f"vllm serve {PLACE}", "sglang": f"python -m sglang.launch_server --model-path {PLACE}"}
CONVERT = f"python convert_hf_to_gguf.py {PLACE} --outfile model.gguf"
GGUF = f"moezip export {PLACE} model.gguf --to gguf"
CODES = f"moezip export {PLACE} codes --to compressed-tensors"
PLAIN = f"moezip export {PLACE} plain --to safetensors"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reader makes of a checkpoint.

    Attributes:
        reader: a key of ``NAMES``.
        reads: ``yes``; ``detour`` after a step that ``why`` names; ``no``.
        why: what to know of it, or why not; may be empty.
        code: what to type; empty where nothing helps. language: ``python`` or ``bash``.
    """

    reader: str
    reads: Literal["yes", "detour", "no"]
    why: str = ""
    code: str = ""

    @property
    def name(self) -> str:
        return NAMES[self.reader]

    @property
    def language(self) -> str:
        return "python" if "import " in self.code else "bash"


def readings(source: Source, form: Form) -> tuple[Reading, ...]:
    """For every reader what it makes of ``source``, a written checkpoint or the view that is about to be one."""
    skips = Skipping.of(source.config) is not None
    found = {"moezip": _skipped(Reading("moezip", "yes", "", LOAD), skips, obeys=True)}
    for reader in ("transformers", "vllm", "sglang", "llamacpp"):
        each = _TABLE[form](reader, source)
        obeys = reader == "transformers" and own_format(source.config)
        found[reader] = _skipped(each, skips and each.reads != "no", obeys=obeys)
    return tuple(found[reader] for reader in NAMES)


def _skipped(reading: Reading, skips: bool, obeys: bool) -> Reading:
    if not skips:
        return reading
    told = "skips experts by the rule in its config" if obeys else "does not know the rule and runs every expert"
    why = f"{reading.why}; {told}" if reading.why else told
    return Reading(reading.reader, reading.reads, why, reading.code)


def _stock(reader: str, source: Source) -> Reading:
    if reader == "transformers":
        return Reading(reader, "yes", "a stock checkpoint, no moezip needed", PRETRAINED)
    if reader == "llamacpp":
        return _llamacpp(source)
    return Reading(reader, "yes", "as it reads the source", SERVE[reader])


def _llamacpp(source: Source) -> Reading:
    """Of layers and experts that are alike."""
    if identify(source.config, source.folder).name in FAMILIES:
        return Reading("llamacpp", "detour", "reads a GGUF file of it, which packs weights anew or not at all", GGUF)
    why = "reads a GGUF file of it, where its own converter knows the source's architecture; moezip does not"
    return Reading("llamacpp", "detour", why, CONVERT)


def _own(reader: str, source: Source) -> Reading:
    if reader == "transformers":
        return Reading(reader, "yes", "after `import moezip`", f"import moezip\n{PRETRAINED}")
    try:
        alike = stock_config(source) is not None
    except MoezipError:  # a family whose config cannot say the experts' width
        alike = False
    packed = bool((source.config.get("quantization_config") or {}).get("packed"))
    if alike and reader == "llamacpp" and identify(source.config, source.folder).name in FAMILIES:
        return _llamacpp(source)
    if alike and packed and reader != "llamacpp" and _exportable(reader, source):
        return Reading(reader, "detour", "reads the same codes as compressed-tensors names them", CODES)
    if alike and packed:
        return Reading(reader, "detour", "does not know the form, but reads plain numbers, in 16 bits again", PLAIN)
    what = "layers or experts that differ" if not alike else "moezip's own format"
    return Reading(reader, "no", f"does not read {what}")


def _exportable(reader: str, source: Source) -> bool:
    """Whether the codes can be named as compressed-tensors does, for this reader."""
    try:
        codes = codes_of(source)
        return unread(reader, codes, as_compressed_tensors(source, codes)) is None
    except MoezipError:
        return False


def _mone(reader: str, source: Source) -> Reading:
    if reader == "vllm":
        why = (
            "from 0.33 on, unquantized and without expert parallelism; 0.32 and older load it and compute anything for "
            "dropped experts. Written after vLLM's source code, not run in it"
        )
        return Reading(reader, "yes", why, SERVE[reader])
    if reader == "transformers":
        why = "version 5 refuses it; version 4 must not load it, as it fills what is missing with random numbers"
        return Reading(reader, "no", why)
    return Reading(reader, "no", "does not read layers that keep different numbers of experts")


def _coded(reader: str, source: Source) -> Reading:
    if reader == "llamacpp":
        return _llamacpp(source)
    told = source.config["quantization_config"]
    if told["quant_method"] == METHOD:
        symmetric = all(each.get("sym", True) for each in (told, *told.get("dynamic", {}).values()))
        why = unread_gptq(reader, symmetric)
    else:
        why = unread(reader, codes_of(source), source)
    if why is not None:
        return Reading(reader, "no", why)
    if reader == "transformers":
        return Reading(reader, "yes", "with the package compressed-tensors", PRETRAINED)
    return Reading(reader, "yes", "", SERVE[reader])


def _file(reader: str, source: Source) -> Reading:
    if reader == "llamacpp":
        return Reading(reader, "yes", "", f"llama-cli -m {PLACE}")
    return Reading(reader, "no", "a GGUF file is llama.cpp's")


_TABLE = {
    "stock": _stock, "moezip": _own, "mone": _mone, "compressed-tensors": _coded, "gptq": _coded, "gguf": _file,
}  # fmt: skip


def card_lines(found: Sequence[Reading]) -> list[str]:
    """The part of a model card that says how to load it."""
    lines = ["## How to load it", ""]
    for each in found:
        why = f" ({each.why})" if each.why else ""
        if each.reads == "no":
            lines += [f"**{each.name}**: no{why}.", ""]
        else:
            lines += [f"**{each.name}**{why}:", "", f"```{each.language}", *each.code.splitlines(), "```", ""]
    return lines[:-1]

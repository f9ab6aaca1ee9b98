"""A checkpoint's tokenizer as llama.cpp reads it: tokens, kinds, merges or scores, special tokens, chat template.

llama.cpp does not read how a tokenizer cuts text into words; it has such rules built in, by name. The name is found
here by comparing the rules of ``tokenizer.json`` with those that llama.cpp's source code (``src/llama-vocab.cpp``)
has under each name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezip.errors import PlanError

FILE = "tokenizer.json"
AUTO, NONE = "auto", "none"

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"[^\r\n\p{L}\p{N}]?"


def _cased(after: str) -> str:
    upper, lower = _CASED
    return f"{_START}{upper}*{lower}+{after}|{_START}{upper}+{lower}*{after}"


_CHINESE_V3 = "[一-龥぀-ゟ゠-ヿ]+"
_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = "bytes"  # the byte-level step alone, all words told apart before it
BYTES_AND_WORDS = "bytes and words"  # the byte-level step with GPT-2's own words
DIGITS = "digits"  # every digit by itself
# Rules in the order of tokenizer.json, and llama.cpp's name for them. Names of equal rules also choose other things
# (such as whether a text starts with a special token), which the file's own keys override.
RULES: Mapping[tuple[str, ...], str] = {
    (BYTES_AND_WORDS,): "gpt-2",
    (DIGITS, BYTES_AND_WORDS): "refact",
    (rf"{_WORD}|{_START}\p{{L}}+|\p{{N}}|{_REST}", BYTES): "qwen2",
    (rf"{_WORD}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", BYTES): "llama-bpe",
    (rf"{_cased('')}|\p{{N}}|{_SLASHED}", BYTES): "tekken",
    (rf"{_cased(_WORD + '?')}|\p{{N}}{{1,3}}|{_SLASHED}", BYTES): "gpt-4o",
    (r"\p{N}{1,3}", _CHINESE_V3, _V3, BYTES): "deepseek-v3",
}
# DeepSeek-V2's rules list hundreds of letters; these two of them tell it from all others.
_DEEPSEEK_LLM = ("[一-龥ࠀ-一가-퟿]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the file says of the tokenizer.

    Attributes:
        model: ``gpt2`` (merges of bytes), ``llama`` (SentencePiece) or ``none``.
        pre: the name of its rules for words; empty where the model needs none.
        tokens, kinds: by id. scores: of ``llama`` alone, the higher is merged first.
        space_first: a space is put before every text; None where that is not said (``gpt2``).
    """

    model: str
    pre: str = ""
    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    space_first: bool | None = None


def vocabulary(folder: Path, size: int, pre: str = AUTO) -> Vocabulary:
    """The tokenizer of the checkpoint in ``folder``.

    Args:
        size: rows of the embedding; ids that no token has are filled up.
        pre: llama.cpp's name for its rules where they are not to be recognised; ``none`` leaves the tokenizer out.

    Raises:
        PlanError: no tokenizer.json, or one that llama.cpp has no rules for.
    """
    if pre == NONE:
        return Vocabulary(NONE)
    file = folder / FILE
    if not file.is_file():
        raise PlanError(
            f"there is no {FILE}, which the vocabulary is taken from",
            where=folder,
            next="add the model's tokenizer.json, or give --set pre=none to write a file without a tokenizer",
        )
    whole = json.loads(file.read_text(encoding="utf-8"))
    model = whole.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise _unknown(file, f"its tokens are found by {model['type']}, where moezip writes byte-pair merges alone")
    spm = bool(model.get("byte_fallback"))
    name = "" if spm else pre if pre != AUTO else _named(whole, file)
    tokens, kinds = _tokens(whole, size, file, spm)
    scores = _scores(model, tokens) if spm else ()
    first = _space_first(whole) if spm else None
    return Vocabulary("llama" if spm else "gpt2", name, tuple(tokens), tuple(kinds), scores, first)


def _named(whole: Mapping[str, Any], file: Path) -> str:
    rules = _rules(whole.get("pre_tokenizer"))
    if tuple(rules) in RULES:
        return RULES[tuple(rules)]
    if all(rule in rules for rule in _DEEPSEEK_LLM):
        return "deepseek-llm"
    raise _unknown(file, f"llama.cpp has no name that moezip knows for its rules ({', '.join(rules) or 'none'})")


def _rules(given: Mapping[str, Any] | None) -> list[str]:
    if given is None:
        return []
    kind = given.get("type")
    if kind == "Sequence":
        return [rule for each in given["pretokenizers"] for rule in _rules(each)]
    if kind == "ByteLevel":
        return [BYTES_AND_WORDS if given.get("use_regex", True) else BYTES]
    if kind == "Digits":
        return [DIGITS if given.get("individual_digits") else "numbers"]
    if kind == "Split":
        pattern = given["pattern"]
        return [str(pattern.get("Regex", pattern.get("String")))]
    return [str(kind)]


def _tokens(whole: Mapping[str, Any], size: int, file: Path, spm: bool) -> tuple[list[str], list[int]]:
    import gguf

    Kind = gguf.TokenType
    found = {id: (token, int(Kind.NORMAL)) for token, id in whole["model"]["vocab"].items()}
    for added in whole.get("added_tokens") or ():
        found[added["id"]] = (added["content"], int(Kind.CONTROL if added["special"] else Kind.USER_DEFINED))
    if spm:
        unknown = whole["model"].get("unk_token")
        for id, (token, kind) in found.items():
            if token == unknown:
                found[id] = (token, int(Kind.UNKNOWN))
            elif kind == Kind.NORMAL and len(token) == 6 and token.startswith("<0x"):
                found[id] = (token, int(Kind.BYTE))
    if max(found) >= size:
        raise PlanError(f"the tokenizer has the id {max(found)}, the embedding only {size} rows", where=file)
    filled = [found.get(id, (f"[PAD{id}]", int(Kind.UNUSED))) for id in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _scores(model: Mapping[str, Any], tokens: list[str]) -> tuple[float, ...]:
    """SentencePiece merges the pair with the highest score first; here an earlier merge has the higher one."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges") or ()):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return tuple(-float(ranks.get(token, len(ranks))) for token in tokens)


def _space_first(whole: Mapping[str, Any]) -> bool:
    steps = [whole.get("normalizer"), whole.get("pre_tokenizer")]
    while steps:
        step = steps.pop() or {}
        steps += [*step.get("normalizers", ()), *step.get("pretokenizers", ())]
        if step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always"):
            return True
    return False


def _unknown(file: Path, why: str) -> PlanError:
    return PlanError(
        f"the tokenizer cannot be written for llama.cpp: {why}",
        where=file,
        next="give llama.cpp's name for its rules (--set pre=NAME), or leave the tokenizer out (--set pre=none)",
    )

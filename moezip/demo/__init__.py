"""The model, the text and the recipe that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal, cast, get_args

from moezip.errors import DataError
from moezip.registry import did_you_mean

Kind = Literal["calib", "heldout", "tasks"]
KINDS: tuple[str, ...] = get_args(Kind)


def _inside(*parts: str) -> Path:
    found = Path(str(files("moezip.demo").joinpath(*parts)))
    if not found.exists():
        raise DataError(
            f"the installed package lacks its own demo file {'/'.join(parts)}",
            where=found,
            next="moezip has to be installed as files in a folder, not run from a zip; install it again with pip",
        )
    return found


def checkpoint() -> Path:
    """The folder of the demo model: a trained Qwen3-MoE of 2.3 M parameters, 4 layers, 16 experts, top-2, bf16.

    Raises:
        DataError: the package was installed without it.
    """
    return _inside("checkpoint")


def data(kind: Kind) -> Path:
    """The folder of one kind of text, ``<domain>.jsonl`` for scripture, factbook, python and arithmetic.

    Args:
        kind: ``calib`` and ``heldout`` have rows ``{"text", "domain"}``; ``tasks`` has multiple choice
            ``{"context", "choices", "answer"}`` or, for arithmetic, ``{"prompt", "answer"}``.

    Raises:
        DataError: the package was installed without it.
    """
    return _inside("data", kind)


def named(text: str) -> Path | None:
    """The path that ``demo:heldout`` or ``demo:heldout/python.jsonl`` stands for; None for any other text.

    Raises:
        DataError: no such kind or file.
    """
    if not text.startswith("demo:"):
        return None
    kind, _, rest = text.removeprefix("demo:").partition("/")
    if kind not in KINDS:
        raise DataError(
            f"the demo has no text called {kind!r}", where=text,
            next=f"{did_you_mean(kind, KINDS)}available: {', '.join(KINDS)}",
        )  # fmt: skip
    folder = data(cast(Kind, kind))
    names = sorted(file.name for file in folder.iterdir())
    if rest and rest not in names:
        raise DataError(
            f"the demo has no {kind} file {rest!r}", where=text,
            next=f"{did_you_mean(rest, names)}available: {', '.join(names)}",
        )  # fmt: skip
    return folder / rest if rest else folder


def recipes() -> dict[str, Path]:
    """The recipes that come with moezip, by name: a wheel carries a copy of the repository's ``recipes/`` in here, an
    editable install has the original.

    Raises:
        DataError: neither is there.
    """
    original = _inside().parents[1] / "recipes"
    copied = _inside() / "recipes"
    folder = original if (original / "demo.yaml").is_file() and not copied.is_dir() else _inside("recipes")
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe() -> Path:
    """The recipe that ``moezip demo`` runs.

    Raises:
        DataError: the package was installed without it.
    """
    return recipes()["demo"]

"""What a recipe's output folder remembers: digests of everything that is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moezip.errors import RecipeError


@dataclass(slots=True)
class State:
    """Digest by name of everything that is finished, in ``state.json``; and of the text that it was made of."""

    folder: Path
    texts: dict[Path, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "state.json"

    def read(self) -> dict[str, str]:
        if not self.file.is_file():
            return {}
        found: dict[str, str] = saved(self.file)
        return found

    def holds(self, name: str, digest: str) -> bool:
        """Whether exactly this was finished under the name."""
        return self.read().get(name) == digest

    def finish(self, name: str, digest: str) -> None:
        write(self.file, json.dumps({**self.read(), name: digest}, indent=2) + "\n")

    def contents(self, paths: Iterable[Path]) -> Iterator[str]:
        """Digests of the text files that these paths stand for, each file read once."""
        from moezip.calibrate.data import text_files

        for path in paths:
            for file in text_files(path):
                if file not in self.texts:
                    with file.open("rb") as stream:
                        self.texts[file] = hashlib.file_digest(stream, "sha256").hexdigest()
                yield f"{file.name} {self.texts[file]}"


def digest_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def saved(path: Path) -> Any:
    """A JSON file of an earlier run. Raises RecipeError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise RecipeError(
            f"what an earlier run left is damaged ({fault})", where=path, next="delete this file; its jobs run again"
        ) from fault


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

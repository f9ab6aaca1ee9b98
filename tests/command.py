"""The command line as a user meets it: words in, and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Answer:
    """What one command left: its exit code, its data and its talk."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout as one JSON value."""
        return json.loads(self.out)


Cli = Callable[..., Answer]


def in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Commands through ``moezip.cli.main``, without the price of another interpreter."""

    def run(*words: object) -> Answer:
        from moezip.cli import main

        monkeypatch.setattr(sys, "argv", ["moezip", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return Answer(int(left.value.code or 0), out, err)

    return run


def process(*words: object, before: str = "", cwd: Path | None = None, **environment: str) -> Answer:
    """A command in a process of its own, after the Python statements ``before``."""
    code = f"import sys; sys.argv[0] = 'moezip'; {before}\nfrom moezip.cli import main\nmain()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env, cwd=cwd, timeout=300
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def model_files(folder: Path) -> dict[str, bytes]:
    """The files that "the same bytes" is about: config, shards, index and plan."""
    return {
        name: content
        for name, content in files_of(folder).items()
        if name in ("config.json", "moezip/plan.json") or ".safetensors" in name
    }


def tree(folder: Path) -> list[str]:
    """Names of everything below ``folder``, hidden things included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write_text(file: Path, seed: int = 0, documents: int = 12, length: int = 90) -> Path:
    """Rows of random printable characters, one token each for the tiny tokenizer."""
    import random

    chance = random.Random(seed)
    rows = ["".join(chr(chance.randrange(32, 127)) for _ in range(length)) for _ in range(documents)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file

"""Shared fixtures. Everything runs offline, on one thread, inside temporary folders."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Triton asks for this when it is first imported; TRITON_INTERPRET=0 runs its kernels on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.command import Cli


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny("qwen3_moe", dtype="bfloat16", ...)``: a folder made once per session by ``tests.tiny.make``.

    The folder is shared, so it is read-only: a test that changes files copies it first.
    """
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items())))
        if key not in made:
            from tests.tiny import make

            made[key] = make(name, tmp_path_factory.mktemp(name), **options)
            for file in made[key].iterdir():
                file.chmod(0o444)
        return made[key]

    return get


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> "Cli":
    """``cli("prune", folder, out, "--keep", 4)``: the command's exit code, stdout and stderr."""
    from tests.command import in_process

    return in_process(monkeypatch, capfd)

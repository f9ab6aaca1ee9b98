"""An ``lp`` run that is killed, as a process of its own, goes on with the same bytes."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import ROOT, Cli, model_files, tree, write_text

# Once the layer is saved the process waits to be killed. Nothing else of it is changed.
HANG = """
import sys, time
from moezip.pipeline import {module}
save = {module}.{kind}.save
def save_and_wait(self, step, *more):
    save(self, step, *more)
    while step == {step!r}:
        time.sleep(1)
{module}.{kind}.save = save_and_wait
sys.argv[0] = "moezip"
from moezip.cli import main
main()
"""

# The same once every shard is written, before the folder gets its name.
HANG_AT_THE_END = """
import sys, time
from pathlib import Path
from moezip.checkpoint.writer import Staging
def wait(self):
    Path({mark!r}).touch()
    while True:
        time.sleep(1)
Staging.publish = wait
sys.argv[0] = "moezip"
from moezip.cli import main
main()
"""


def killed(words: tuple[object, ...], code: str, appears: Path) -> None:
    """Runs a command until the file is there, then kills it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not appears.exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("module", "kind", "step", "file"),
    [
        ("price_files", "PriceFiles", "0001", "prices-0001.json"),
        ("solved", "Solved", "layer-0001", "layer-0001.safetensors"),
    ],
    ids=["while widths are priced", "while codes are solved"],
)
def test_killed_between_layers_the_same_bytes(
    module: str,
    kind: str,
    step: str,
    file: str,
    cli: Cli,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, work, out = write_text(tmp_path / "text.jsonl"), tmp_path / "work", tmp_path / "out"
    options = (
        "--allocate", "lp", "--bits", 4.5, "--group-size", 0, "--data", text, "--tokens", 512, "--seq-len", 32,
        "--workdir", work, "--quiet",
    )  # fmt: skip
    words = ("quantize", tiny("qwen3_moe", dtype="bfloat16"), out, *options)
    killed(words, HANG.format(module=module, kind=kind, step=step), work / "quantize" / file)
    assert not out.exists()
    layers = getattr(importlib.import_module(f"moezip.pipeline.{module}"), kind)
    kept: dict[str, int] = {}
    save = layers.save

    def counted(self: object, step: str, *more: object) -> None:
        kept[step] = kept.get(step, 0) + 1
        save(self, step, *more)

    with monkeypatch.context() as patched:
        patched.setattr(layers, "save", counted)
        answer = cli(*words, "--resume")
    assert answer.code == 0, answer.err
    assert list(kept) == [step.replace("1", "2")]  # layers 0 and 1 of 3 are not done again
    assert cli("quantize", words[1], tmp_path / "straight", *options).code == 0
    assert model_files(out) == model_files(tmp_path / "straight")
    assert not [name for name in tree(tmp_path) if name.startswith("work")]


def test_killed_while_it_is_written_the_same_bytes(
    cli: Cli, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, work, mark = write_text(tmp_path / "text.jsonl"), tmp_path / "work", tmp_path / "written"
    out = tmp_path / "models" / "out"
    options = ("--bits", 3, "--group-size", 0, "--data", text, "--tokens", 256, "--seq-len", 32, "--quiet")
    words = ("quantize", tiny("qwen3_moe", dtype="bfloat16"), out, *options)
    killed((*words, "--workdir", work), HANG_AT_THE_END.format(mark=str(mark)), mark)
    assert not out.exists()

    def never(*_: object) -> None:
        raise AssertionError("a layer is solved again")

    with monkeypatch.context() as patched:
        patched.setattr("moezip.pipeline.solved.Solved.save", never)
        answer = cli(*words, "--workdir", work, "--resume")
    assert answer.code == 0, answer.err
    assert cli("quantize", words[1], tmp_path / "straight", *options).code == 0
    assert model_files(out) == model_files(tmp_path / "straight")
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # what the killed run had written is gone

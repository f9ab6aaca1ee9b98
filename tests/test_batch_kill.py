"""A sweep that is killed inside its second job, as a process of its own, goes on there with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moezip.pipeline import layerwise
from tests.command import ROOT, Cli, model_files, write_text

# Once layer 1 of the second job is saved the process waits to be killed. Nothing else of it is changed.
HANG = """
import sys, time
from moezip.pipeline import layerwise
save, seen = layerwise.Solved.save, []
def save_and_wait(self, step, *more):
    save(self, step, *more)
    seen.append(step)
    while seen.count("layer-0001") == 2:
        time.sleep(1)
layerwise.Solved.save = save_and_wait
sys.argv[0] = "moezip"
from moezip.cli import main
main()
"""


def test_a_killed_sweep_goes_on(
    cli: Cli, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
version: 1
model: {tiny("qwen3_moe", dtype="bfloat16")}
output: {tmp_path / "out"}
seq_len: 32
calibration:
  text: {{data: text.jsonl, tokens: 512}}
jobs:
  pack:
    sweep: {{bits: [4, 3]}}
    steps:
      - quantize: {{group_size: 0}}
      - evaluate: {{data: text.jsonl, tokens: 64}}
""")
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, "run", str(recipe), "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        state = tmp_path / "out/state.json"
        while not (
            state.is_file()
            and "job pack-bits4" in state.read_text()
            and list(tmp_path.glob("out/work/*/*/layer-0001.safetensors"))
        ):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out/pack-bits3").exists()

    save, again = layerwise.Solved.save, []

    def counted(self: object, step: str, *more: object) -> None:
        again.append(step)
        save(self, step, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(layerwise.Solved, "save", counted)
        answer = cli("run", recipe, "--json")
    assert answer.code == 0, answer.err
    assert [job["skipped"] for job in answer.json["jobs"]] == [True, False]
    assert again == ["layer-0002"]  # layers 0 and 1 of 3 are not solved again
    assert not (tmp_path / "out/work").exists()
    assert cli("run", recipe, "--set", f"output={tmp_path / 'straight'}").code == 0
    for name in ("pack-bits4", "pack-bits3"):
        assert model_files(tmp_path / "out" / name) == model_files(tmp_path / "straight" / name)

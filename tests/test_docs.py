"""The documents say what the program does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.record import RECORDS
from moezip.registry import Method

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    # Wide, or the help would cut long options short.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=ROOT)


def test_the_generated_tables_are_fresh():
    checked = run("docs/generate.py", "--check")
    assert checked.returncode == 0, checked.stderr


def test_a_stale_table_is_noticed(tmp_path):
    script = tmp_path / "docs" / "generate.py"
    script.parent.mkdir()
    script.write_text((ROOT / "docs" / "generate.py").read_text(encoding="utf-8"))
    (tmp_path / "README.md").write_text(README.replace("`easy-ep` |", "`easy-pe` |"))
    stale = run(str(script), "--check")
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert run(str(script)).returncode == 0
    assert (tmp_path / "README.md").read_text() == README


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """(command, its flags) for every ``moezip ...`` line in the README's shell blocks."""
    lines = [line.split("#")[0] for block in blocks(README, "bash") for line in block.splitlines()]
    found = [line.split()[1:] for line in lines if line.startswith("moezip ")]
    # a command of the group `tasks` has two words
    return sorted(
        {
            (" ".join(words[: 1 + (words[0] == "tasks")]), tuple(word for word in words if word.startswith("--")))
            for words in found
        }
    )


@pytest.mark.parametrize(("command", "flags"), commands(), ids=lambda value: str(value))
def test_the_commands_of_the_readme_exist(command: str, flags: tuple[str, ...]):
    shown = run("-c", "from moezip.cli import main; main()", *command.split(), "--help")
    assert shown.returncode == 0, shown.stderr
    for flag in flags:
        assert re.search(rf"{flag}\b", shown.stdout), f"moezip {command} has no {flag}"


def test_the_worked_method_works():
    """2 experts with 4 and 0 tokens, gates summing to 3: scores 3/4 and 0."""
    scope: dict[str, object] = {}
    exec(next(block for block in blocks(CONTRIBUTING, "python") if "Method(" in block), scope)
    method = scope["GATE_MEAN"]
    assert isinstance(method, Method)
    assert set(method.needs) <= {record.name for record in RECORDS}
    facts = LayerFacts(layer=0, experts=2, top_k=1, hidden=4, width=4)
    stats = {"counts": np.array([4.0, 0.0]), "gate_sum": np.array([3.0, 0.0])}
    np.testing.assert_array_equal(method.run(facts, stats, method.params()), [0.75, 0.0])


def test_the_worked_architecture_is_one():
    block = next(block for block in blocks(CONTRIBUTING, "python") if "Architecture(" in block)
    scope: dict[str, object] = {}
    exec(block.replace("\nArchitecture(", "\nentry = Architecture("), scope)
    entry = scope["entry"]
    assert isinstance(entry, Architecture)
    claim = entry.claim("model.layers.3.mlp.experts.7.up_proj.weight", {"num_hidden_layers": 4, "num_experts": 8})
    assert (claim.kind, claim.layer, claim.expert) == ("expert", 3, 7)

"""``moezip evaluate --save``: measurements that stay beside the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moezip.errors import CheckpointError, UsageError
from moezip.evaluate import saved
from moezip.export.verify import EVALUATION
from tests.command import Cli, tree, write_text

Tiny = Callable[..., Path]


@pytest.fixture
def pruned(cli: Cli, tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint that moezip wrote, with no measurement yet."""
    out = tmp_path / "out"
    assert cli("prune", tiny("qwen3_moe"), out, "--method", "random", "--keep", 4).code == 0
    return out


def test_measurements_are_kept_beside_the_checkpoint(cli: Cli, tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    one, two = write_text(tmp_path / "one.jsonl", 1), write_text(tmp_path / "two.jsonl", 2)
    source = tiny("qwen3_moe")
    words = ("evaluate", pruned, "--seq-len", 32, "--save", "--json")
    first = cli(*words, "--data", one, "--against", source)
    second = cli(*words, "--data", two, "--data", one)
    assert (first.code, second.code) == (0, 0)
    kept = json.loads((pruned / EVALUATION).read_text())
    assert kept["version"] == 1
    compared, alone = kept["evaluations"]
    for entry, answer in ((compared, first), (alone, second)):
        assert {key: entry[key] for key in answer.json} == answer.json  # all of what --json says
        assert entry["command"].startswith("moezip evaluate")
        assert entry["date"].endswith("+00:00")
    assert compared["data"] == ["one.jsonl"] and alone["data"] == ["two.jsonl", "one.jsonl"]
    assert compared["against_path"] == str(source) and alone["against_path"] is None
    assert saved.load(pruned) == kept["evaluations"]
    # the same text against the same reference, fewer tokens: in place of the first, behind the others
    again = cli(*words, "--data", one, "--against", source, "--tokens", 64)
    entries = saved.load(pruned)
    assert [entry["data"] for entry in entries] == [["two.jsonl", "one.jsonl"], ["one.jsonl"]]
    assert entries[1]["tokens"] == again.json["tokens"] == 62
    assert cli("verify", pruned).code == 0
    assert tree(pruned / "moezip") == ["evaluation.json", "manifest.json", "plan.json", "report.json"]


def test_a_checkpoint_that_moezip_did_not_write_is_left_alone(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    text, source = write_text(tmp_path / "one.jsonl"), tiny("qwen3_moe")
    before = tree(source)
    answer = cli("evaluate", source, "--data", text, "--save")
    assert answer.code == 2 and "moezip did not write it" in answer.err and "--json > FILE" in answer.err
    assert "evaluate model" not in answer.err  # nothing was measured for nothing
    assert tree(source) == before


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot be read"),
        ("[]", "no list of measurements"),
        ('{"version": 1}', "no list of measurements"),
        ('{"version": 1, "evaluations": [3]}', "no list of measurements"),
        ('{"version": 2, "evaluations": []}', "version 2"),
    ],
)
def test_a_damaged_file_is_told_and_not_overwritten(content: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / EVALUATION
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(CheckpointError, match=what):
        saved.require_place(tmp_path)
    with pytest.raises(CheckpointError, match=what):
        saved.save(tmp_path, {}, saved.Request(), "")
    assert file.read_text() == content


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did not write it"):
        saved.save(tmp_path, {}, saved.Request(), "")
    (tmp_path / "moezip").mkdir()
    saved.save(tmp_path, {"nll": 1.0}, saved.Request([tmp_path / "a"]), "first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        saved.save(tmp_path, {"nll": 2.0}, saved.Request([tmp_path / "a"]), "second")
    assert [entry["command"] for entry in saved.load(tmp_path)] == ["first"]
    assert tree(tmp_path / "moezip") == ["evaluation.json"]


def test_a_recipe_s_measurements_are_kept_too(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    write_text(tmp_path / "held.jsonl")
    measure = {"evaluate": {"data": "held.jsonl", "against": "source", "tokens": 64}}
    recipe: dict[str, Any] = {
        "version": 1, "model": str(tiny("qwen3_moe")), "output": str(tmp_path / "out"), "seq_len": 32,
        "jobs": {"half": {"steps": [{"prune": {"method": "random", "keep": 4}}, measure]},
                 "none": {"steps": [measure]}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = cli("run", tmp_path / "recipe.yaml", "--json")
    assert answer.code == 0
    (entry,) = saved.load(tmp_path / "out" / "half")
    (measured,) = answer.json["jobs"][0]["evaluations"]
    assert {key: entry[key] for key in measured} == measured
    assert entry["data"] == ["held.jsonl"] and entry["against_path"] == str(tiny("qwen3_moe"))
    assert cli("verify", tmp_path / "out" / "half").code == 0
    assert not (tiny("qwen3_moe") / "moezip").exists()  # the job that only measures the source

"""The recipes that come with moezip: each runs on the packaged model, with a few tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moezip import demo
from moezip.recipe import load
from tests.command import ROOT, Cli

SHIPPED = {name: file for name, file in demo.recipes().items() if name != "demo"}
TOKENS = 192


def few_tokens(text: str) -> list[str]:
    """``--set`` words that make a recipe small."""
    raw: dict[str, Any] = yaml.safe_load(text)
    words = ["model=demo", "seq_len=64", *(f"calibration.{name}.tokens={TOKENS}" for name in raw["calibration"])]
    for name, job in raw["jobs"].items():
        words += [
            f"jobs.{name}.steps.{i}.evaluate.{key}"
            for i, step in enumerate(job["steps"])
            if "evaluate" in step
            for key in ("tokens=64", "data=demo:heldout/python.jsonl")
        ]
    return [word for each in words for word in ("--set", each)]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_runs_on_the_packaged_model(name: str, cli: Cli, tmp_path: Path) -> None:
    answer = cli("run", name, *few_tokens(SHIPPED[name].read_text()), "--set", f"output={tmp_path / 'out'}", "--json")
    assert answer.code == 0, answer.err
    for job in answer.json["jobs"]:
        assert job["report"]["bytes_after"] < job["report"]["bytes_before"] and job["evaluations"][0]["against"]
        assert (tmp_path / "out" / job["name"] / "moezip" / "plan.json").is_file()
    if name == "olmoe-prune-then-quantize":  # its two ways to a size take the same bytes
        sizes = {job["name"]: job["report"]["bytes_after"] for job in answer.json["jobs"]}
        budget = 0.33 * answer.json["jobs"][0]["report"]["bytes_before"]
        assert all(0.98 * budget < sizes[way] <= budget for way in ("bits-alone", "pruned-then-bits"))


def test_the_recipe_of_the_readme_runs(cli: Cli, tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(version: 1\n.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    assert text is not None
    (tmp_path / "recipe.yaml").write_text(text[1])
    words = [*few_tokens(text[1]), "--set", f"output={tmp_path / 'out'}", "--json"]
    answer = cli("run", tmp_path / "recipe.yaml", *words)
    assert answer.code == 0, answer.err
    names = ["cut-ratio0.25-reap", "cut-ratio0.25-easy-ep", "cut-ratio0.5-reap", "cut-ratio0.5-easy-ep", "packed"]
    assert [job["name"] for job in answer.json["jobs"]] == names
    made = {entry.name for entry in (tmp_path / "out").iterdir() if entry.is_dir()}
    assert made == {*names, "packed.compressed-tensors", "packed.gptq", "statistics"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_names_a_hub_model_its_source_and_what_to_expect(name: str) -> None:
    text = SHIPPED[name].read_text()
    recipe = load(SHIPPED[name])
    assert re.fullmatch(r"[\w-]+/[\w.-]+", recipe.model), "a model of the hub"
    assert "# Expected" in text and ("arXiv" in text or "nothing was published" in text)
    amounts = [getattr(step.action, "keep", None) for job in recipe.jobs.values() for step in job.steps]
    assert amounts == [None] * len(amounts), "shipped recipes use ratios, so that they fit any model"


def test_a_recipe_is_found_by_its_name_and_a_wrong_one_is_told(cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("demo", "recipes/demo.yaml", "demo.yaml"):
        answer = cli("run", word, "--dry-run", "--json", "--only", "random")
        assert answer.code == 0 and [job["name"] for job in answer.json["jobs"]] == ["random"]
    assert list(tmp_path.iterdir()) == []
    wrong = cli("run", "mixtral-8x7b-pqm")
    assert wrong.code == 1 and "did you mean 'mixtral-8x7b-pmq'?" in wrong.err
    assert all(name in wrong.err for name in SHIPPED)
    Path("demo.yaml").write_text("version: 2\n")  # one of the user's own comes first
    assert "version is 2" in cli("run", "demo.yaml").err

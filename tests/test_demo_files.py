"""The model, text and recipe that the package ships are there and have the shape that is promised."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from moezip import demo

ROOT = Path(__file__).parents[1]
DOMAINS = ["arithmetic", "factbook", "python", "scripture"]


@pytest.mark.parametrize("kind", demo.KINDS)
def test_each_kind_has_the_four_domains_and_whole_rows(kind):
    files = sorted(demo.data(kind).iterdir())
    assert [file.name for file in files] == [f"{domain}.jsonl" for domain in DOMAINS]
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        keys = {"text", "domain"} if kind != "tasks" else {"context", "choices", "answer"}
        keys = {"prompt", "answer"} if (kind, file.stem) == ("tasks", "arithmetic") else keys
        assert rows and all(set(row) == keys for row in rows)


def test_no_held_out_document_is_calibrated_on():
    def texts(kind):
        return {
            json.loads(line)["text"] for file in demo.data(kind).iterdir() for line in file.read_text().splitlines()
        }

    assert not texts("calib") & texts("heldout")


def test_the_model_and_its_provenance_are_there():
    names = {file.name for file in demo.checkpoint().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= names


def test_every_domain_has_its_licence():
    listed = (demo.data("calib").parent / "README.md").read_text(encoding="utf-8")
    assert all(f"| {domain} |" in listed for domain in DOMAINS)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (demo.data("calib").parent / "LICENSE-PYTHON.txt").read_text()


def test_the_wheel_gets_the_recipes_that_an_editable_install_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"recipes": "moezip/demo/recipes"}
    assert demo.recipe().read_text() == (ROOT / "recipes" / "demo.yaml").read_text()

"""The documents say what the program does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.record import RECORDS
from moezip.cli import app
from moezip.merge import METHODS as MERGING
from moezip.pipeline.skip import RULES
from moezip.plan.allocators import ALLOCATORS
from moezip.prune import METHODS, PROFILES
from moezip.quantize import METHODS as SOLVERS
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


def test_the_documents_are_fresh():
    checked = run("docs/generate.py", "--check")
    assert checked.returncode == 0, checked.stderr


def test_stale_documents_are_noticed(tmp_path: Path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "README.md").write_text(README.replace("`easy-ep` |", "`easy-pe` |"))
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(site.replace("- reap: methods/prune/reap.md", "- raep: methods/prune/reap.md"))
    page = tmp_path / "docs" / "methods" / "merge" / "dern.md"
    page.unlink()
    cli = tmp_path / "docs" / "cli.md"
    cli.write_text(cli.read_text(encoding="utf-8").replace("--ratio", "--ration"))
    script = str(tmp_path / "docs" / "generate.py")
    stale = run(script, "--check")
    assert stale.returncode == 1
    assert [line.split(";")[0] for line in stale.stderr.splitlines()] == [
        "README.md is stale", "docs/methods/merge/dern.md is missing", "mkdocs.yml is stale", "docs/cli.md is stale",
    ]  # fmt: skip
    assert not page.exists()
    assert run(script).returncode == 0
    assert sections(page.read_text(encoding="utf-8")).keys() == {*HEADINGS, "Settings"}
    assert run(script, "--check").returncode == 0
    assert (tmp_path / "mkdocs.yml").read_text() == site
    assert (tmp_path / "README.md").read_text() == README
    assert cli.read_text() == (ROOT / "docs" / "cli.md").read_text()


HEADINGS = ("Idea", "Formula", "When it fails", "Measured on the reference model")
BY_KIND = {
    "prune": [method.name for method in (*METHODS, *PROFILES)],
    "merge": [method.name for method in MERGING],
    "quantize": [*(method.name for method in SOLVERS), *ALLOCATORS],
    "skip": list(RULES),
}


def sections(page: str) -> dict[str, str]:
    """What stands under each heading of the second level."""
    _, *rest = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return {heading: text.strip() for heading, text in zip(rest[::2], rest[1::2], strict=True)}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BY_KIND.items() for name in names])
def test_every_method_has_a_page(kind: str, name: str):
    path = f"methods/{kind}/{name}.md"
    found = sections((ROOT / "docs" / path).read_text(encoding="utf-8"))
    assert [heading for heading in found if heading != "Settings"] == list(HEADINGS)
    assert all(found[heading] for heading in HEADINGS)
    measured = found[HEADINGS[-1]]  # a figure comes with the command that gives it
    assert measured.startswith("Not measured on the reference model.") or "python benchmarks/" in measured
    assert f" {name}: {path}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"({kind}/{name}.md)" in (ROOT / "docs" / "methods" / f"{kind}.md").read_text(encoding="utf-8")


def test_every_page_of_a_method_is_of_one():
    folder = ROOT / "docs" / "methods"
    pages = {(path.parent.name, path.stem) for path in folder.glob("*/*.md")}
    assert pages == {(kind, name) for kind, names in BY_KIND.items() for name in names}


def commands() -> list[tuple[str, str]]:
    """(document, command) for every ``moezip ...`` line in the shell blocks of the documents."""
    return [
        (str(path.relative_to(ROOT)), line.partition("#")[0].strip())
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
        for block in blocks(path.read_text(encoding="utf-8"), "bash")
        for line in block.splitlines()
        if line.startswith("moezip ")
    ]


@pytest.mark.parametrize(("document", "line"), commands())
def test_the_commands_of_the_documents_exist(document: str, line: str):
    _, *words = shlex.split(line)
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_example_of_the_readme_is_that_of_the_python_page():
    """So that the test which runs the README runs it."""
    ours = next(block for block in blocks(README, "python") if "moezip.open" in block)
    assert ours == blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8"), "python")[0]
    assert len(ours.splitlines()) <= 11  # ten lines and a blank one


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"^ +- [^:]+: (\S+\.md)$", site, re.MULTILINE))


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

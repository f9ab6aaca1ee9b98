"""What a shell and a terminal get: completion, colours, the log, and ``python -m moezip``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moezip.cli import complete
from moezip.console import logs
from tests.command import ROOT, Cli, process

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")  # a foreground colour, alone or with other attributes


def completed(words: str, cwd: Path | None = None) -> list[str]:
    """What bash is offered for the last of these words."""
    asked = {"_MOEZIP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return process(cwd=cwd, **asked).out.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("moezip pru", "prune"),
        ("moezip prune demo out --method rea", "reap"),
        ("moezip merge demo out -m hc", "hc-smoe"),
        ("moezip quantize demo out --solver rt", "rtn"),
        ("moezip quantize demo out --allocate pm", "pmq"),
        ("moezip prune demo out --for vl", "vllm"),
        ("moezip skip demo out --rule ot", "otp"),
        ("moezip export demo out --to gp", "gptq"),
        ("moezip inspect dem", "demo"),
        ("moezip methods easy", "easy-ep"),
    ],
)
def test_names_are_completed(words: str, expected: str, tmp_path: Path):
    assert completed(words, tmp_path) == [expected]


def test_folders_and_recipes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "config.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "note.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete.checkpoints("m") == [("models/", "")]
    assert complete.checkpoints("models/") == [("models/small/", "a checkpoint")]
    assert complete.checkpoints("") == [("demo", "the model of the package"), ("models/", "")]
    assert {("mixtral-8x7b-pmq", "comes with moezip"), ("mine.yaml", "")} <= set(complete.recipes("mi"))
    assert complete.recipes("mo") == [("models/", "")]
    assert [word for word, _ in complete.texts("n")] == ["note.txt"]
    assert ("demo:heldout/python.jsonl", "") in complete.texts("demo:heldout/p")
    assert complete.checkpoints("nowhere/") == []


def test_completion_can_be_shown():
    shown = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert shown.code == 0 and "_MOEZIP_COMPLETE=complete_bash" in shown.out


def test_python_m_moezip_is_moezip():
    ran = subprocess.run([sys.executable, "-m", "moezip", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("moezip ")


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals(environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch):
    """A pipe is no terminal. FORCE_COLOR has it treated as one, NO_COLOR wants no colours even there."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    failed = process("inspect", "nowhere", **environment)
    shown = process("--help", **environment)
    assert bool(COLOUR.search(failed.err)) is coloured
    assert bool(COLOUR.search(shown.out)) is coloured
    if not environment:
        assert "\x1b" not in failed.err + shown.out


def test_the_log_is_shown_when_asked_for(tmp_path: Path):
    quiet = process("inspect", "demo", "--json")
    loud = process("inspect", "demo", "--json", "--debug")
    by_name = process("inspect", "demo", "--json", MOEZIP_LOG="debug")
    assert quiet.err == "" and quiet.json == loud.json == by_name.json
    for told in (loud.err, by_name.err):
        assert re.search(r"^\d{4}-.* DEBUG moezip\.pipeline: opened .*qwen3_moe, 4 layers with experts", told)
    assert process("inspect", "demo", "--json", MOEZIP_LOG="warning").err == ""


def test_an_unknown_level_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(os.environ, logs.VARIABLE, "loud")
    found = cli("inspect", "demo")
    assert found.code == 2 and "debug, info, warning, error" in found.err


def test_the_library_leaves_logging_alone():
    """No handler and no level, so that warnings are seen and a program's own configuration counts."""
    code = "import logging, moezip, moezip.api; log = logging.getLogger('moezip'); print(log.handlers, log.level)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "[] 0"

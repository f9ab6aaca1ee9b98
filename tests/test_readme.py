"""The commands and the Python of README.md, run on the demo model in the order of the page.

A block after ``<!-- not run: REASON -->`` is left out. In the others ``path/to/model`` is the demo and texts are small.
Every command must end with 0; where a block makes an output that an earlier one made too, it makes it anew.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from moezip import demo
from tests.command import ROOT, Cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL
)
# Commands that read text take less of it here, in windows shorter than the tokens that are asked for.
READERS = ("prune", "merge", "quantize", "skip", "calibrate", "evaluate", "tasks")
LESS = ("--tokens", "256", "--seq-len", "64")
ROWS = 40


def readme_blocks() -> list[tuple[str, str]]:
    """(language, text) of the blocks that are run."""
    return [(match["language"], match["text"]) for match in BLOCK.finditer(README) if match["reason"] is None]


def commands(text: str) -> list[list[str]]:
    """Words of every command of a shell block, comments left out."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def output_of(words: list[str]) -> Path | None:
    """What the command makes: its OUT, or the file of ``--out``."""
    if "--out" in words:
        return Path(words[words.index("--out") + 1])
    places = {"prune": 3, "merge": 3, "quantize": 3, "skip": 3, "export": 3, "apply": 4}
    return Path(words[places[words[1]]]) if words[1] in places else None


def test_the_blocks_are_found():
    found = readme_blocks()
    assert len(found) == len(re.findall(r"^```(?:bash|python)$", README, re.MULTILINE)) - README.count("<!-- not run:")
    assert {"bash", "python"} == {language for language, _ in found}
    every = [words for language, text in found if language == "bash" for words in commands(text)]
    assert {words[0] for words in every} == {"moezip"}
    assert {"inspect", "prune", "merge", "quantize", "skip", "evaluate", "verify", "apply", "export"} <= {
        words[1] for words in every
    }


def test_the_readme_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    for name, kind, domain in (
        ("code", "calib", "python"),
        ("heldout", "heldout", "python"),
        ("french", "calib", "scripture"),
    ):
        rows = (demo.data(kind) / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]  # type: ignore[arg-type]
        Path(f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    names: dict[str, Any] = {}
    for language, text in readme_blocks():
        if language == "python":
            small = re.sub(r"tokens=[\d_]+", "tokens=256", text.replace("path/to/model", str(demo.checkpoint())))
            exec(compile(small, "README.md", "exec"), names)
            continue
        for words in commands(text.replace("path/to/model", "demo")):
            less = LESS if words[1] in READERS and words[1:3] != ["tasks", "show"] else ()
            out = output_of(words)
            if out is not None and out.exists():
                shutil.rmtree(out) if out.is_dir() else out.unlink()
            answer = cli(*words[1:], *less)
            assert answer.code == 0, f"{shlex.join(words)}\n{answer.err}"
            if "--dry-run" in words:
                assert out is not None and not out.exists()
            elif out is not None:
                assert out.exists(), shlex.join(words)
    # what the blocks are about is there in the end
    assert json.loads(Path("out-python/moezip/report.json").read_text())["experts_after"] == [8, 8, 8, 8]
    assert json.loads(Path("out-both/moezip/report.json").read_text())["bits_per_weight"] < 5
    assert names["packed"].plan.packing and names["model"].experts == dict.fromkeys(range(4), 16)

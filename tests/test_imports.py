"""Who may import whom, read from the import statements; and what the command line costs to start."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moezip"

# A room imports itself and the rooms of later lines; rooms of one line leave each other alone.
ORDER = (
    ("__main__",),
    ("cli",),
    ("console",),
    ("api",),
    ("pipeline",),
    ("recipe",),
    ("demo",),
    ("report",),
    ("evaluate",),
    ("export",),
    ("runtime",),
    ("prune", "merge", "quantize"),
    ("plan",),
    ("calibrate",),
    ("arch",),
    ("formats",),
    ("kernels",),
    ("checkpoint",),
    ("registry", "progress", "sizes"),
    ("errors",),
)
RANK = {room: rank for rank, line in enumerate(ORDER) for room in line}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """``moezip/arch/spec.py`` -> ``arch``; ``moezip/errors.py`` -> ``errors``; the package's ``__init__`` -> ``""``."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of moezip that the file imports, inside functions too."""
    inside = ["moezip", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:  # `from . import x` in moezip/arch/spec.py starts at moezip.arch
                stem = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [stem])])
            # `from moezip import demo` names the room only in the list of names.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def breaches(text: str, file: Path) -> list[str]:
    """Imports in ``text``, the source of ``file``, that go up or sideways."""
    room, found = room_of(file), []
    for line, name in imported(ast.parse(text), file):
        parts = name.split(".")
        if parts[0] != "moezip" or len(parts) < 2 or parts[1].startswith("__") or parts[1] == room:
            continue
        if parts[1] not in RANK:
            found.append(f"{file.name}:{line} imports moezip.{parts[1]}, which has no place in the order of rooms")
        elif room == "kernels" or RANK[parts[1]] <= RANK[room]:
            found.append(f"{file.name}:{line} ({room}) imports moezip.{parts[1]}, which is not below it")
    return found


def test_every_room_has_a_place_in_the_order():
    assert {room_of(file) for file in FILES} - {""} <= set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_go_down(file: Path):
    if room_of(file) == "":  # the package itself may offer things lazily, but importing it must cost nothing
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert [ast.unparse(node) for node in top if "__future__" not in ast.unparse(node)] == []
    else:
        assert breaches(file.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("arch/spec.py", "from moezip.errors import MoezipError", 0),
        ("arch/spec.py", "from moezip.arch.families import ARCHITECTURES", 0),
        ("arch/spec.py", "from . import families", 0),
        ("arch/spec.py", "from moezip import __version__", 0),
        ("arch/spec.py", "import moezip.plan.plan", 1),
        ("arch/spec.py", "from moezip import cli, errors", 1),
        ("arch/spec.py", "from ..plan import plan", 1),
        ("arch/spec.py", "def f():\n    from moezip.calibrate import data", 1),
        ("arch/spec.py", "from moezip.utils import x", 1),
        ("prune/reap.py", "from moezip.merge import x", 1),
        ("kernels/reference.py", "from moezip.errors import MoezipError", 1),
        ("cli/look.py", "from moezip import pipeline, console", 0),
    ],
)
def test_the_reader_of_imports_sees_what_it_should(file: str, text: str, count: int):
    assert len(breaches(text, PACKAGE / file)) == count


@pytest.mark.parametrize("module", ["moezip", "moezip.cli", "moezip.recipe", "moezip.demo", "moezip.registry"])
def test_what_the_command_line_imports_is_light(module: str):
    """``moezip --help`` has to answer at once: none of the heavy packages is loaded before a command needs it."""
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'numpy', 'scipy'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []

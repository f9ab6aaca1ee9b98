"""Writes what the documents say of the program from the program itself.

Between ``<!-- generated:NAME -->`` and ``<!-- /generated -->`` in README.md and the pages of ``docs/`` stand tables,
and ``docs/cli.md`` is made as a whole. ``python docs/generate.py`` rewrites them; ``--check`` writes nothing and fails
where something is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moezip.arch.families import ARCHITECTURES, REFUSED
from moezip.arch.spec import Architecture
from moezip.export.readers import READERS
from moezip.merge import METHODS as MERGING
from moezip.pipeline.export import FORMATS
from moezip.pipeline.skip import RULES
from moezip.prune import METHODS, PROFILES
from moezip.quantize import METHODS as SOLVERS
from moezip.registry import Method

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- generated:(?P<name>[a-z-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
MARK = "<!-- Made by docs/generate.py from the program; changes belong there. -->\n\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a ``|`` inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def methods() -> str:
    return _methods((*sorted(METHODS, key=lambda m: (not m.reads_text, m.name)), *PROFILES))


def merging() -> str:
    return _methods(MERGING)


def solvers() -> str:
    return _methods(SOLVERS)


def rules() -> str:
    return table(("rule", "what it is", "source"), [(f"`{r.name}`", r.summary, r.paper) for r in RULES.values()])


def _methods(entries: Sequence[Method]) -> str:
    rows = [(f"`{m.name}`", m.summary, "yes" if m.reads_text else "none", m.paper) for m in entries]
    return table(("method", "what it is", "calibration text", "source"), rows)


def _settings(entries: Sequence[Method]) -> Callable[[], str]:
    """Their ``--set`` names and defaults, and what the docstrings of their settings say."""

    def made() -> str:
        found = []
        for method in sorted(entries, key=lambda entry: entry.name):
            names = [f"`{field.name}={_shown(field.default)}`" for field in dataclasses.fields(method.params)]
            found.append(f"- `{method.name}`: {', '.join(names) or 'none'}\n")
        return "".join(found)

    return made


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def explained(entries: Sequence[Method]) -> Callable[[], str]:
    """What ``moezip methods NAME`` says of each: the docstring of its module, as it stands there."""

    def made() -> str:
        found = []
        for method in sorted(entries, key=lambda entry: entry.name):
            found.append(f"### {method.name}\n\n```text\n{method.explanation}\n```\n\n")
        return "".join(found)

    return made


def _routing(entry: Architecture) -> str:
    words = [entry.scoring]
    if entry.gate_norm:
        words.append("renormalised" if entry.gate_norm is True else f"renormalised if `{entry.gate_norm}`")
    if entry.group_keys:
        words.append("in groups")
    return ", ".join(words)


def architectures() -> str:
    rows = [
        (
            f"`{entry.name}`",
            "one tensor per layer" if entry.experts[0].fused else "one tensor per expert",
            _routing(entry),
            "dropped unless `--set mtp=keep`" if entry.extra_prefixes else "–",
            entry.notes or "–",
        )
        for entry in sorted(ARCHITECTURES.values(), key=lambda entry: entry.name)
    ]
    return table(("`model_type`", "experts on disk", "routing", "multi-token prediction", "notes"), rows)


def refused() -> str:
    rows = [(f"`{name}`", reason) for name, reason in sorted(REFUSED.items())]
    return table(("`model_type`", "why not"), rows)


def formats() -> str:
    return table(("`--to`", "what it is"), [(f"`{name}`", what) for name, what in FORMATS.items()])


def readers() -> str:
    return table(("`--for`", "who"), [(f"`{name}`", who) for name, who in READERS.items()])


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": methods, "merging": merging, "solvers": solvers, "rules": rules, "architectures": architectures,
    "refused": refused, "formats": formats, "readers": readers, "pruning-settings": _settings(METHODS),
    "merging-settings": _settings(MERGING), "solver-settings": _settings(SOLVERS),
    "rule-settings": _settings(tuple(RULES.values())), "pruning-explained": explained((*METHODS, *PROFILES)),
    "merging-explained": explained(MERGING), "solvers-explained": explained(SOLVERS),
}  # fmt: skip


def command_line() -> str:
    """``docs/cli.md``: every command and option, as typer itself writes them down."""
    from typer import Context
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from moezip.cli import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="moezip", title="Command line")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n*", "", text)  # cut short by typer, and each has a heading
    return MARK + text.rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {"docs/cli.md": command_line}


def generated(text: str) -> str:
    """``text`` with every block made anew. Raises KeyError for a block that nothing makes."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match["name"]]() + match[3], text)


def documents() -> dict[Path, str]:
    """Every document that has something generated, as it should be. Raises KeyError for a block that none has."""
    found, held = {}, set()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if str(path.relative_to(ROOT)) in PAGES:
            continue
        text = path.read_text(encoding="utf-8")
        held |= {match["name"] for match in BLOCK.finditer(text)}
        found[path] = generated(text)
    if missing := set(BLOCKS) - held:
        raise KeyError(f"no document has a block for {', '.join(sorted(missing))}")
    return {**found, **{ROOT / name: make() for name, make in PAGES.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is stale")
    check, stale = parser.parse_args().check, 0
    for path, text in documents().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{path.relative_to(ROOT)} is stale; run: python docs/generate.py", file=sys.stderr)
            stale = 1
        else:
            path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())

"""Writes the tables of README.md from the code, between ``<!-- generated:NAME -->`` and ``<!-- /generated -->``.

``python docs/generate.py`` rewrites them; ``--check`` writes nothing and fails where they are stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moezip.arch.families import ARCHITECTURES, REFUSED
from moezip.arch.spec import Architecture
from moezip.merge import METHODS as MERGING
from moezip.prune import METHODS, PROFILES
from moezip.quantize import METHODS as SOLVERS
from moezip.registry import Method

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- generated:(?P<name>[a-z]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


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


def _methods(entries: Sequence[Method]) -> str:
    rows = [(f"`{m.name}`", m.summary, "yes" if m.reads_text else "none", m.paper) for m in entries]
    return table(("method", "what it is", "calibration text", "source"), rows)


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


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": methods, "merging": merging, "solvers": solvers, "architectures": architectures, "refused": refused
}  # fmt: skip


def generated(text: str) -> str:
    """``text`` with every block made anew. Raises KeyError for a block that nothing makes, or one that is missing."""
    missing = set(BLOCKS) - {match["name"] for match in BLOCK.finditer(text)}
    if missing:
        raise KeyError(f"README.md has no block for {', '.join(sorted(missing))}")
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match["name"]]() + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a block is stale")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = generated(before)
    if check and after != before:
        print("README.md: generated tables are stale; run: python docs/generate.py", file=sys.stderr)
        return 1
    if after != before:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

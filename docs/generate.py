"""Writes what the documents say of the program from the program itself.

Between ``<!-- generated:NAME -->`` and ``<!-- /generated -->`` in README.md and the pages of ``docs/`` stand tables,
between ``# generated:NAME`` and ``# /generated`` in mkdocs.yml the pages of the methods, and ``docs/cli.md`` is made as
a whole. Every method has a page, ``docs/methods/KIND/NAME.md``; one that is missing is begun.
``python docs/generate.py`` rewrites them; ``--check`` writes nothing and fails where something is stale or missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezip.arch.families import ARCHITECTURES, REFUSED
from moezip.arch.spec import Architecture
from moezip.export.readers import READERS
from moezip.merge import METHODS as MERGING
from moezip.pipeline.export import FORMATS
from moezip.pipeline.quantize import READ_TEXT
from moezip.pipeline.skip import RULES
from moezip.plan import importance, pmq
from moezip.plan.allocators import ALLOCATORS, PAPERS, SUMMARIES
from moezip.prune import METHODS, PROFILES, odp, otp
from moezip.quantize import METHODS as SOLVERS
from moezip.registry import Method

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- generated:(?P<name>[a-z0-9-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
NAVIGATION = re.compile(r"(# generated:(?P<name>[a-z]+)\n).*?( +# /generated)", re.DOTALL)
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


def _methods(entries: Sequence[Method]) -> str:
    rows = [(f"`{m.name}`", m.summary, "yes" if m.reads_text else "none", m.paper) for m in entries]
    return table(("method", "what it is", "calibration text", "source"), rows)


@dataclass(frozen=True, slots=True)
class Page:
    """The page of one method.

    Attributes:
        kind: the page of the kind, ``docs/methods/KIND.md``, and the folder beside it.
        params: the frozen dataclass of its settings.
        text: how the program explains it, None where the docstrings of its settings say all that there is.
        reads_text: whether it needs calibration; None where that is the solver's affair.
        asked: how it is asked for on the command line.
    """

    kind: str
    name: str
    summary: str
    paper: str
    params: type
    text: str | None
    reads_text: bool | None
    asked: str

    @property
    def path(self) -> str:
        return f"docs/methods/{self.kind}/{self.name}.md"

    def facts(self) -> str:
        """The summary as a head, and what it takes."""
        return table(
            ("", self.summary),
            [("asked for by", f"`{self.asked}`"), ("calibration text", TEXT[self.reads_text]), ("source", self.paper)],
        )

    def explained(self) -> str:
        return f"\n```text\n{self.text}\n```\n\n"

    def settings(self) -> str:
        """The ``--set`` names and defaults, and what the docstrings of their dataclasses say."""
        fields = [f"- `{field.name}={_shown(field.default)}`\n" for field in dataclasses.fields(self.params)]
        if not fields:
            return "None.\n"
        owners = [owner for owner in reversed(self.params.__mro__[:-1]) if owner.__doc__]
        said = "\n\n".join(inspect.cleandoc(owner.__doc__ or "") for owner in owners)
        return f"{''.join(fields)}\n```text\n{said}\n```\n\n"

    def begun(self) -> str:
        """The page with what is known of every method, for a person to go on with."""
        explained = f"{_block(f'explained-{self.kind}-{self.name}')}\n" if self.text is not None else ""
        return (
            f"# {self.name}\n\n{_block(f'facts-{self.kind}-{self.name}')}\n"
            f"## Idea\n\n{self.summary[0].upper()}{self.summary[1:]}.\n\n"
            f"## Formula\n\n{explained or 'No formula of its own.' + chr(10) + chr(10)}"
            "## When it fails\n\nNothing is known of this method alone; see "
            f"[what holds for all of its kind](../{self.kind}.md#when-it-fails).\n\n"
            f"## Measured on the reference model\n\n{NOT_MEASURED}\n\n"
            f"## Settings\n\n{_block(f'settings-{self.kind}-{self.name}')}"
        )


TEXT = {True: "yes", False: "none", None: "if the solver reads it"}
NOT_MEASURED = "Not measured on the reference model."
# Where the program explains what has no module of its own. (A width for all, and the least price, need no more.)
SHARING = {"pmq": pmq.costs, "outlier": importance.outlier_score, "block": importance.block_importance}
SKIPPING = {"naee": odp, "odp": odp, "otp": otp}


def pages() -> dict[str, tuple[Page, ...]]:
    """Every method of the program by kind, in the order of the navigation."""

    def of(kind: str, entries: Iterable[Method], asked: str) -> tuple[Page, ...]:
        return tuple(
            Page(kind, m.name, m.summary, m.paper, m.params, m.explanation, m.reads_text, asked.format(m.name))
            for m in sorted(entries, key=lambda entry: entry.name)
        )

    sharing = tuple(
        Page("quantize", name, SUMMARIES[name], PAPERS[name], params,
             inspect.getdoc(SHARING[name]) if name in SHARING else None, True if name in READ_TEXT else None,
             f"moezip quantize --allocate {name}")
        for name, params in ALLOCATORS.items()
    )  # fmt: skip
    skipping = tuple(
        Page("skip", name, rule.summary, rule.paper, rule.params,
             inspect.getdoc(SKIPPING[name]) if name in SKIPPING else None, True,
             f"moezip skip --rule {name}")
        for name, rule in RULES.items()
    )  # fmt: skip
    return {
        "prune": of("prune", METHODS, "moezip prune --method {}") + of("prune", PROFILES, "moezip calibrate"),
        "merge": of("merge", MERGING, "moezip merge --method {}"),
        "quantize": of("quantize", SOLVERS, "moezip quantize --solver {}") + sharing,
        "skip": skipping,
    }


ALL_PAGES = pages()


def _block(name: str) -> str:
    return f"<!-- generated:{name} -->\n<!-- /generated -->\n"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _overview(shown: Sequence[Page]) -> Callable[[], str]:
    """Their table on the page of their kind, each name a link to its page."""

    def made() -> str:
        rows = [(f"[`{p.name}`]({p.kind}/{p.name}.md)", p.summary, TEXT[p.reads_text], p.paper) for p in shown]
        return table(("method", "what it is", "calibration text", "source"), rows)

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
    "methods": methods, "merging": merging, "solvers": solvers, "architectures": architectures,
    "refused": refused, "formats": formats, "readers": readers,
    **{f"pages-{kind}": _overview([p for p in shown if p.name not in ALLOCATORS]) for kind, shown in ALL_PAGES.items()},
    "pages-allocators": _overview([p for p in ALL_PAGES["quantize"] if p.name in ALLOCATORS]),
}  # fmt: skip
for page in (each for kind in ALL_PAGES.values() for each in kind):
    BLOCKS[f"facts-{page.kind}-{page.name}"] = page.facts
    BLOCKS[f"settings-{page.kind}-{page.name}"] = page.settings
    if page.text is not None:
        BLOCKS[f"explained-{page.kind}-{page.name}"] = page.explained


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


def navigation(text: str) -> str:
    """mkdocs.yml with the pages of the methods, as deep as the mark that begins them stands."""

    def made(match: re.Match[str]) -> str:
        margin = re.match(" *", match[3])
        assert margin is not None
        lines = [f"{margin[0]}- {page.name}: {page.path.removeprefix('docs/')}\n" for page in ALL_PAGES[match["name"]]]
        return match[1] + "".join(lines) + match[3]

    return NAVIGATION.sub(made, text)


def documents() -> dict[Path, str]:
    """Every document that has something generated, as it should be. Raises KeyError for a block that none has."""
    found, held = {}, set()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if str(path.relative_to(ROOT)) in PAGES:
            continue
        text = path.read_text(encoding="utf-8")
        held |= {match["name"] for match in BLOCK.finditer(text)}
        found[path] = generated(text)
    for page in (each for kind in ALL_PAGES.values() for each in kind):
        if not (path := ROOT / page.path).is_file():
            found[path] = generated(page.begun())
            held |= {match["name"] for match in BLOCK.finditer(found[path])}
    site = ROOT / "mkdocs.yml"
    found[site] = navigation(site.read_text(encoding="utf-8"))
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
            what = "stale" if path.is_file() else "missing"
            print(f"{path.relative_to(ROOT)} is {what}; run: python docs/generate.py", file=sys.stderr)
            stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())

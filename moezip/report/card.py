"""The model card: what was done, what it cost, who reads the output and how, and the licence of the source.

It is ``README.md`` of every output. The source's own card follows below. What an evaluation measured stands between
two markers and is written anew whenever one is saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.errors import CheckpointError
from moezip.export.reading import card_lines, readings
from moezip.export.stock import CARD
from moezip.export.verify import MANIFEST
from moezip.report.measured import Measured, measured_of

if TYPE_CHECKING:
    from moezip.checkpoint.source import Source
    from moezip.report.report import Report

BEGIN, END = "<!-- moezip:measured -->", "<!-- /moezip:measured -->"
# Results and relations of the source, which the output has not.
NOT_CARRIED = ("base_model", "base_model_relation", "model-index", "model_name", "tags", "quantized_by")
LICENCE_FILES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md", "COPYING")


def model_card(source: Source, view: Source, report: Report, done: str, text: Sequence[str]) -> str:
    """The card of ``view``, made of ``source``.

    Args:
        done: in a word: pruned, merged, quantized, ...
        text: lines that say what was done.
        report: as it will be saved; of it only what two runs of one command share, so that their cards are equal.
    """
    original = _text(source.folder / CARD)
    front, body = front_matter(original)
    name = source_name(source.folder)
    lines = [
        "---",
        *_yaml({**_carried(front), "base_model": name, **_relation(done), "tags": _tags(front, done)}),
        "---",
        f"# {name.rpartition('/')[2]}, {done} by moezip",
        "",
        *text,
        "",
        *_figures(report, done),
        "",
        "## Loss",
        "",
        *_predicted(report),
        *_section(None),
        "",
        *card_lines(readings(view, report.form)),
        *(line for note in report.notes for line in ("", f"Note: {note}.")),
        "",
        *_licence(front, source.folder),
    ]
    if body.strip():
        lines += ["", "## The card of the source model", "", *_without_markers(body)]
    return "\n".join(lines) + "\n"


def refresh_card(folder: Path) -> bool:
    """Writes what the saved evaluations of ``folder`` say into its card, and the card's digest into the manifest.

    Returns:
        False where there is nothing to refresh: no card, or one that is not moezip's.

    Raises:
        CheckpointError: evaluations or a manifest that cannot be read.
    """
    path = folder / CARD
    old = _text(path)
    begin, end = old.find(BEGIN), old.find(END)
    if not 0 <= begin < end:
        return False
    section = "\n".join(_section(measured_of(folder)))
    new = (old[:begin] + section + old[end + len(END) :]).encode()
    listed = _manifest(folder)
    _replace(path, new)
    if listed is not None and CARD in listed["files"]:
        listed["files"][CARD] = hashlib.sha256(new).hexdigest()
        _replace(folder / MANIFEST, (json.dumps(listed, indent=2, ensure_ascii=False) + "\n").encode())
    return True


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise CheckpointError(
            f"the manifest is damaged ({fault})", where=path, next="write the output again"
        ) from fault  # fmt: skip
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise CheckpointError("the manifest has no table of files", where=path, next="write the output again")
    return found


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


# -- sections -----------------------------------------------------------------------------------------------


def _figures(report: Report, done: str) -> list[str]:
    before, after = report.bytes_before, report.bytes_after
    rows = [
        ("size of the tensors", megabytes(before), f"{megabytes(after)} ({after / before:.0%})"),
        ("experts per layer", span(report.experts_before), span(report.experts_after)),
        ("bits per packed weight" if done == "quantized" else "bits per weight", "", f"{report.bits_per_weight:.2f}"),
    ]
    texts = _texts(report)
    lines = ["| | source | here |", "|---|---:|---:|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    return [*lines, *(["", f"Decided on: {texts}."] if texts else [])]


def _texts(report: Report) -> str:
    tokens = {name: count for name, count in report.statistics.items() if isinstance(count, int)}
    named = report.statistics.get("domains")
    if isinstance(named, list):
        return ", ".join(map(str, named))
    return ", ".join(f"{name} ({count:,} tokens)" for name, count in tokens.items())


def _predicted(report: Report) -> Iterator[str]:
    if report.predicted_nats is not None:
        yield f"Predicted on the text that it was decided on: {report.predicted_nats:+.4f} nats per token."
    elif report.predicted_nats_reason:
        yield f"Not predicted: {report.predicted_nats_reason}."
    yield ""


def _section(found: Measured | None) -> list[str]:
    if found is None or not found.domains:
        command = "moezip evaluate path/to/this/folder --against SOURCE --data TEXT --save"
        return [BEGIN, f"Not measured yet; `{command}` does, and writes it here.", END]
    compared = found.rise is not None
    bounded = any(row.likely for row in found.rows())
    head = (
        "| text | tokens | loss |" + (" source | rise |" if compared else "") + (" rise at 95 % |" if bounded else "")
    )
    lines = [BEGIN, f"Measured in nats per token{f', {found.when}' if found.when else ''}:", ""]
    lines += [head, "|---|---:|---:|" + ("---:|---:|" if compared else "") + ("---:|" if bounded else "")]
    for row in found.rows():
        cells = f"| {row.name} | {row.tokens:,} | {row.nll:.4f} |"
        if row.source is not None:
            cells += f" {row.source:.4f} | {row.nll - row.source:+.4f} |"
        if bounded:
            cells += f" {row.likely[0]:+.4f} to {row.likely[1]:+.4f} |" if row.likely else " |"
        lines.append(cells)
    if found.kl is not None:
        lines += ["", f"KL divergence from the source {found.kl:.4f}; the same likeliest token {found.top1:.1%}."]
    if found.tasks:
        scores = (f"{name} {each['accuracy']:.1%} of {each['n']}" for name, each in found.tasks.items())
        lines += ["", f"Tasks: {', '.join(scores)}."]
    return [*lines, END]


def _licence(front: Mapping[str, Any], folder: Path) -> list[str]:
    file = next((name for name in LICENCE_FILES if (folder / name).is_file()), None)
    named = front.get("license")
    if named:
        told = f"That of the source: `{named}`" + (f" (see `{file}`)." if file else ".")
    elif file:
        told = f"That of the source: see `{file}`."
    else:
        told = "The source names none. Find out what it allows before you share this."
    return ["## Licence", "", told]


def megabytes(count: float) -> str:
    """Bytes for people, in the units of ``moezip.console``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def span(counts: Sequence[int]) -> str:
    """``16``, or ``12 to 20``; ``none`` of nothing."""
    if not counts:
        return "none"
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


# -- front matter -------------------------------------------------------------------------------------------


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """The YAML between the leading ``---`` fences and the rest; all of the text is rest where that is no YAML table."""
    import yaml

    lines = text.splitlines()
    fences = [number for number, line in enumerate(lines) if line.strip() == "---"]
    if len(fences) < 2 or fences[0] != 0:
        return {}, text
    try:
        found = yaml.safe_load("\n".join(lines[1 : fences[1]]))
    except yaml.YAMLError:
        return {}, text
    rest = "\n".join(lines[fences[1] + 1 :])
    return (found, rest) if isinstance(found, dict) else ({}, rest if found is None else text)


def _carried(front: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in front.items() if key not in NOT_CARRIED}


def _relation(done: str) -> dict[str, str]:
    """What the hub calls it; it has no word for pruned, and ``merge`` means several models made one."""
    return {"base_model_relation": "quantized"} if done == "quantized" else {}


def _tags(front: Mapping[str, Any], done: str) -> list[str]:
    given = front.get("tags")
    tags = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return list(dict.fromkeys([*map(str, tags), "mixture-of-experts", "moezip", done]))


def source_name(folder: Path) -> str:
    """The hub id where the folder lies in the hub's cache, else the folder's own name."""
    for part in folder.resolve().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return "/".join(part.split("--")[1:])
    return folder.resolve().name


def _yaml(front: Mapping[str, Any]) -> list[str]:
    import yaml

    text: str = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=120)
    return text.splitlines()


def _without_markers(body: str) -> list[str]:
    """The source's card may be moezip's own; only the output's own markers count."""
    return [line for line in body.strip().splitlines() if line.strip() not in (BEGIN, END)]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def made_by(what: str) -> str:
    """``Made by moezip 0.1.0, method `nats`: ...``"""
    return f"Made by moezip {__version__}, {what}"

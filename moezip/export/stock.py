"""Writes a checkpoint that stock loaders read, with plan, report and manifest, proved complete before it appears."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moezip import __version__
from moezip.checkpoint.source import Source
from moezip.checkpoint.writer import Staging
from moezip.export.mone import Substituted
from moezip.export.readers import Planned
from moezip.export.verify import MANIFEST, manifest_bytes, require_verified
from moezip.plan.apply import Applied
from moezip.plan.plan import Plan
from moezip.progress import Progress, Watch, unwatched
from moezip.runtime.skipping import MASKS, Skipping

PLAN = "moezip/plan.json"
REPORT = "moezip/report.json"
CARD = "README.md"


def config_bytes(source: Source) -> bytes:
    """``config.json`` of ``source``: the file's own bytes where nothing changed, else its keys in their order."""
    raw = (source.folder / "config.json").read_bytes()
    if json.loads(raw) == source.config:
        return raw
    return (json.dumps(source.config, indent=2, ensure_ascii=False) + "\n").encode()


def tensor_bytes(source: Source) -> int:
    """Sum of all tensors, as stored."""
    return sum(source.spec(name).bytes for name in source.names())


def write_checkpoint(
    view: Source,
    plan: Plan | None,
    out: Path,
    *,
    text: str | None,
    report: Callable[[], str],
    command: str,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> dict[str, str]:
    """Writes ``view``, which is a source through ``plan``, to ``out``: all of it or nothing.

    Args:
        plan: None where nothing was decided, only laid out otherwise.
        text: the model card; None where nothing changed, so that the source's own is copied.
        report: makes ``moezip/report.json`` once everything else is written.
        command: for the manifest.
        extra: further files by relative path.

    Returns:
        SHA-256 by file.

    Raises:
        CheckpointError: output exists, disk full, weights that are not finite, or an output that is not complete.
    """
    total, done = tensor_bytes(view), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch(Progress("write", done, total, "bytes"))

    with Staging(out, source=view.folder, overwrite=overwrite, needed=total, check_finite=True) as stage:
        stage.write_tensors(view, advance)
        stage.add("config.json", config_bytes(view))
        stage.copy_side_files(view.folder, skip=() if text is None else (CARD,))
        if text is not None:
            stage.add(CARD, text.encode())
        if plan is not None:
            stage.add(PLAN, plan.to_json().encode())
        for name, content in {**kept_masks(view), **(extra or {})}.items():
            stage.add(name, content)
        stage.add(REPORT, report().encode())
        facts: dict[str, Any] = {
            "version": __version__,
            "command": command,
            "source": view.fingerprint if plan is None else plan.source,
            "seed": None if plan is None else plan.made_by.get("seed"),
        }
        stage.add(MANIFEST, manifest_bytes(facts, stage.digests))
        watch(Progress("verify", 0, 1, "steps"))
        require_verified(stage.folder, digests=stage.digests, deep=False)
        watch(Progress("verify", 1, 1, "steps"))
        return dict(stage.digests)


def kept_masks(view: Source) -> dict[str, bytes]:
    """The mask networks of a source that skips experts by them, which do not depend on how many experts there are."""
    skipping = Skipping.of(view.config)
    if skipping is None or skipping.rule != "otp" or not (view.folder / MASKS).is_file():
        return {}
    return {MASKS: (view.folder / MASKS).read_bytes()}


def card(applied: Planned) -> str | None:
    """The model card: what was done and how to load it. The source's own card follows, if it has one.

    None where nothing was done.
    """
    if applied.changes_nothing:
        return None
    plan = applied.plan
    width = applied.architecture.layer_facts(applied.source_config)[0].width
    counts = [len(layer.picks) for layer in plan.layers]
    widths = [each for layer in plan.layers for each in layer.widths(width)]
    kept = f"{_span(counts)} of {plan.layers[0].experts} routed experts in each of {len(plan.layers)} MoE layers"
    if not all(layer.whole for layer in plan.layers):
        kept += f", {_span(widths)} of {width} neurons in an expert"
    if plan.merges:
        kept = (
            f"{plan.layers[0].experts} routed experts in each of {len(plan.layers)} MoE layers were merged into "
            f"{_span(counts)}, which"
        )
    method = plan.made_by.get("method", "a saved plan")
    lines = [
        f"Made by moezip {__version__}, method `{method}`: {kept} are left. What was kept, the scores and the data it "
        "was chosen with are in `moezip/plan.json`; sizes and timings in `moezip/report.json`.",
        "",
        *stored_lines(applied),
        *how_to_load(applied, plan.ragged(width)),
    ]
    done = "merged" if plan.merges else "pruned"
    return with_source_card(applied.folder, f"{applied.architecture.name}, {done}", lines)


def with_source_card(folder: Path, title: str, text: Sequence[str]) -> str:
    """A model card of ``text``, between the front matter and the words of the source's own card, if it has one."""
    original = folder / CARD
    front, body = _front_matter(original.read_text(encoding="utf-8") if original.is_file() else "")
    lines = ["---", *front, "---", f"# {title}", "", *text]
    if body.strip():
        lines += ["", "## The card of the source model", "", body.strip()]
    return "\n".join(lines) + "\n"


def stored_lines(applied: Planned) -> list[str]:
    """Lines of the model card: what became of stored codes, where the source has any."""
    note = applied.stored_note if isinstance(applied, Applied) else None
    return [] if note is None else [f"Stored codes: {note}.", ""]


def how_to_load(applied: Planned, ragged: bool) -> list[str]:
    """Lines of the model card: who reads it, and how."""
    if isinstance(applied, Substituted):
        return [
            "Its layers keep different numbers of experts, in the form that vLLM reads from version 0.33 on "
            "(`approximate_experts`, MoNE, arXiv 2507.00390), unquantized and without expert parallelism. Version 0.32 "
            "and older load it and ignore the list, so that dropped experts compute anything. It was written after "
            "vLLM's source code and has not been run in it.",
            "",
            "The routers are the source's own and still choose among all experts. A dropped one adds nothing, and the "
            "gates of the others do not grow in its place.",
            "",
            "transformers 5 refuses it; transformers 4 must not load it, as it fills what is missing with random "
            "numbers. moezip runs it as vLLM does:",
            "",
            "```python",
            "import moezip",
            'model = moezip.load("path/to/this/folder")',
            "```",
        ]
    return [
        "Its layers or experts differ in size, so it loads with moezip installed:" if ragged else "A stock checkpoint:",
        "",
        "```python",
        *(["import moezip"] if ragged else []),
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
    ]


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _front_matter(text: str) -> tuple[list[str], str]:
    """YAML lines between the leading ``---`` fences, and the rest."""
    lines = text.splitlines()
    if lines and lines[0].strip() == "---" and "---" in [line.strip() for line in lines[1:]]:
        end = 1 + [line.strip() for line in lines[1:]].index("---")
        return lines[1:end], "\n".join(lines[end + 1 :])
    return [], text

"""Commands that look at a checkpoint or at the program itself."""

from __future__ import annotations

from typing import Annotated

import typer

from moezip import console
from moezip.cli import complete
from moezip.cli.options import Ckpt, Debug, Json, Quiet
from moezip.console import results


def inspect(checkpoint: Ckpt, as_json: Json = False, debug: Debug = False) -> None:
    """What a checkpoint is: architecture, experts, sizes, what would fit. Reads headers only."""
    from moezip.pipeline.common import looked_at
    from moezip.report.overview import overview

    with looked_at(checkpoint) as model:
        seen = overview(model.source)
    if as_json:
        console.data(seen.to_json())
        return
    results.show_overview(checkpoint, seen)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, explained.", autocompletion=complete.methods)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The compression methods, from the program's own table."""
    from moezip.merge import METHODS as MERGING
    from moezip.prune import METHODS, PROFILES
    from moezip.quantize import METHODS as SOLVERS
    from moezip.registry import lookup

    every = (*METHODS, *MERGING, *PROFILES, *SOLVERS)
    if name is not None:
        results.explain(lookup(name, {method.name: method for method in every}, "method"), as_json)
        return
    if as_json:
        console.data([results.method_facts(method) for method in every])
        return
    rows = [(m.name, m.family, "text" if m.reads_text else "none", m.summary, m.paper) for m in every]
    console.table("", ("method", "family", "data", "what it does", "source"), rows)


def architectures(as_json: Json = False, debug: Debug = False) -> None:
    """The model families that moezip knows, from its own table."""
    from moezip.arch.families import ARCHITECTURES

    rows = [
        {"model_type": entry.name, "scoring": entry.scoring, "groups": bool(entry.group_keys), "notes": entry.notes}
        for entry in ARCHITECTURES.values()
    ]
    if as_json:
        console.data(rows)
    else:
        columns = ("model_type", "scoring", "groups", "notes")
        console.table(
            "", columns, [[("yes" if row[c] else "no") if c == "groups" else row[c] for c in columns] for row in rows]
        )


def kernels_command(as_json: Json = False, debug: Debug = False) -> None:
    """Which compiled kernels run here, or why none, and whether each computes what its numpy twin does."""
    from dataclasses import asdict

    from moezip import kernels
    from moezip.kernels.selfcheck import examine

    status = kernels.status()
    examined = examine(status)
    if as_json:
        console.data({**asdict(status), "checks": {one.isa: asdict(one) for one in examined}})
    elif not examined:
        console.say(f"numpy: {status.why}; {kernels.COST}")
    else:
        rows = [
            (one.isa, "yes" if one.isa == status.isa else "", f"{one.passed} of {one.passed + len(one.failed)}",
             f"{1e3 * one.seconds:.2f} ms")
            for one in examined
        ]  # fmt: skip
        console.table(status.library or "", ("instruction set", "in use", "checks passed", "GPTQ of 256 x 512"), rows)
        for one in examined:
            for what in one.failed:
                console.say(f"{one.isa}: {what} differs from numpy's")
    if any(one.failed for one in examined):
        raise typer.Exit(1)


def verify(checkpoint: Ckpt, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Proves a checkpoint complete: every tensor that the config implies, once, finite, checksums right."""
    from moezip.export.verify import verify as find
    from moezip.pipeline import open_checkpoint

    folder = open_checkpoint(checkpoint).folder
    findings = find(folder, deep=True)
    if as_json:
        console.data({"ok": not findings, "findings": [{"what": f.what, "where": f.where} for f in findings]})
    elif findings:
        console.table("", ("where", "what is wrong"), [(f.where, f.what) for f in findings])
    else:
        console.say(f"{folder}: complete and sound", quiet)
    if findings:
        raise typer.Exit(1)

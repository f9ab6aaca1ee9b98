"""``moezip calibrate``: text in, statistics out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.errors import UsageError
from moezip.pipeline.common import Clock, Common, Opened, opened
from moezip.report.report import peak_rss_bytes

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText
    from moezip.calibrate.statistics import Statistics


def run_calibration(
    model: Opened,
    texts: Sequence[DomainText],
    common: Common,
    *,
    record: Sequence[str] | None = None,
    workdir: Path | None = None,
) -> Statistics:
    """One pass over the text; statistics of every domain."""
    from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of
    from moezip.calibrate.record import chosen_records
    from moezip.calibrate.run import calibrate

    records = chosen_records(record)
    tokenizer = tokenizer_of(model.source.folder)
    rows = load_rows(texts, tokenizer, common.seq_len or default_seq_len(model.source.config))
    return calibrate(
        model.source,
        rows,
        records,
        device=common.device,
        max_memory=common.max_memory,
        workdir=common.workdir or workdir,
        resume=common.resume,
        watch=common.watch,
    )


def calibrate_command(
    checkpoint: str, data: Sequence[Path], out: Path, common: Common, tokens: int, record: Sequence[str] | None
) -> dict[str, Any]:
    """``moezip calibrate``: writes the statistics file; returns what it holds."""
    from moezip.calibrate.data import domains_of

    if out.exists() and not common.overwrite:
        raise UsageError(
            "the statistics file exists already", where=out, next="give another --out, or --overwrite to replace it"
        )
    clock = Clock()
    model = opened(checkpoint)
    stats = run_calibration(
        model, domains_of(data, tokens), common, record=record, workdir=out.with_name(out.name + ".moezip-work")
    )
    stats.save(out)
    return {
        "out": str(out),
        "source": stats.source,
        "domains": {domain.name: domain.tokens for domain in stats.domains},
        "tokens": stats.tokens,
        "tokens_per_second": stats.tokens / clock.seconds,
        "layers": len(model.facts),
        "unrouted": unrouted(stats),
        "seconds": clock.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def unrouted(stats: Statistics) -> dict[str, int]:
    """Per layer, how many experts no token of any domain reached; layers where all were reached are left out."""
    found: dict[str, int] = {}
    if not stats.domains:
        return found
    for layer in stats.domains[0].layers:
        counts = [domain.layers[layer]["counts"] for domain in stats.domains if "counts" in domain.layers[layer]]
        if counts and (missed := int((sum(counts[1:], counts[0]) == 0).sum())):
            found[str(layer)] = missed
    return found

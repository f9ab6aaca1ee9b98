"""``moezip calibrate``: text in, statistics out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.libraries import import_model_code
from moezip.errors import MoezipError
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_file
from moezip.pipeline.probes import KINDS, PROBES, with_probes
from moezip.progress import Progress
from moezip.report.report import peak_rss_bytes

KEPT = "statistics.safetensors"  # in the work folder

if TYPE_CHECKING:
    from moezip.calibrate.backward import Labels
    from moezip.calibrate.data import DomainText
    from moezip.calibrate.record import Record
    from moezip.calibrate.statistics import Statistics


def run_calibration(
    model: Opened,
    texts: Sequence[DomainText],
    common: Common,
    *,
    record: Sequence[str] | None = None,
    workdir: Path | None = None,
    labels: Labels = "data",
    probes: int = 0,
    kinds: Sequence[str] = KINDS,
) -> Statistics:
    """One pass over the text; statistics of every domain. Then, if asked for, a pass that measures probes.

    They wait in the work folder as well, until ``forget``: what comes after the pass may fail, and ``resume`` then
    takes them from there.

    Args:
        labels: of a backward pass, if the records ask for one.
        probes: decisions of each of the ``kinds`` to measure in every layer after a backward pass.
    """
    import_model_code(model.source.config)  # before the tokenizer imports the half of it
    from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of
    from moezip.calibrate.record import GRADIENT_RECORDS, wants_gradients
    from moezip.calibrate.run import calibrate
    from moezip.calibrate.statistics import Statistics

    begun = time.time()
    records, gradients = records_named(record), labels if wants_gradients(record) else None
    tokenizer = tokenizer_of(model.source.folder)
    common.watch(Progress("read text", 0, 1, "steps"))
    seq_len = common.seq_len or default_seq_len(model.source.config)
    rows = load_rows(texts, tokenizer, seq_len)
    common.watch(Progress("read text", 1, 1, "steps"))
    workdir = common.workdir or workdir

    def probed(stats: Statistics) -> Statistics:
        if not gradients or not probes or stats.probes:
            return stats
        from moezip.calibrate.probes import unseen_rows

        unseen = partial(unseen_rows, rows, texts, tokenizer, seq_len)
        stats = with_probes(model, rows, unseen, stats, common, probes, kinds, workdir)
        if workdir is not None:
            stats.save(workdir / KEPT)
        return stats

    if common.resume and workdir is not None and (workdir / KEPT).is_file():
        kept = Statistics.load(workdir / KEPT)
        domains = [(name, (rows.fingerprint(name),)) for name in dict.fromkeys(rows.domains)]
        wanted = {entry.name for entry in records} | {entry.name for entry in GRADIENT_RECORDS if gradients}
        if (
            kept.source == model.source.fingerprint
            and [(domain.name, domain.data) for domain in kept.domains] == domains
            and all(wanted == named.keys() for domain in kept.domains for named in domain.layers.values())
        ):
            return probed(kept)
    try:
        stats = calibrate(
            model.source,
            rows,
            records,
            device=common.device,
            max_memory=common.max_memory,
            workdir=workdir,
            resume=common.resume,
            watch=common.watch,
            gradients=gradients,
            seed=common.seed,
        )
    except KeyboardInterrupt as stop:
        layers = model.architecture.integer(model.source.config, model.architecture.layers_key)
        stop.add_note(_standing(workdir, begun, common.resume, layers))
        raise
    if workdir is not None:
        stats.save(workdir / KEPT)
    return probed(stats)


def records_named(names: Sequence[str] | None) -> tuple[Record, ...]:
    """What to sum: the standing records called so (all, if none is), and those of methods with records of their own.

    Raises:
        UsageError: a name that is neither, or a setting that does not read.
    """
    from moezip.calibrate.record import chosen_records
    from moezip.merge import METHODS as MERGING
    from moezip.prune import METHODS
    from moezip.registry import own_records

    standing: list[str] = []
    own: dict[str, Record] = {}
    for name in names or ():
        found = own_records(name, (*METHODS, *MERGING))
        if found is None:
            standing.append(name)
        else:
            own.update({record.name: record for record in found})
    records = {record.name: record for record in chosen_records(standing or None)}
    return tuple({**records, **own}.values())


def require_recordable(names: Sequence[str] | None, model: Opened) -> None:
    """Raises what can be known, before any text is read, of records that cannot be taken of this model."""
    from moezip.merge import METHODS as MERGING
    from moezip.prune import METHODS
    from moezip.registry import own_settings

    for name in names or ():
        found = own_settings(name, (*METHODS, *MERGING))
        if found is None or found[0].check is None:
            continue
        for fact in model.facts:
            found[0].check(fact, found[1])


def work_folder(out: Path) -> Path:
    """Where interrupted work waits: beside the output."""
    return out.with_name(out.name + ".moezip-work")


def require_files(texts: Sequence[DomainText]) -> None:
    """Raises DataError for text that is not there, before anything is computed; reads none of it."""
    from moezip.calibrate.data import text_files

    for text in texts:
        for path in text.paths:
            text_files(path)


@contextmanager
def resumable(workdir: Path) -> Iterator[None]:
    """Adds to whatever stops the work how it goes on, if there is something to go on from."""
    try:
        yield
    except (MoezipError, KeyboardInterrupt, OSError) as stop:
        if (workdir / KEPT).is_file():
            stop.add_note(f"the statistics are kept in {workdir / KEPT}")
        if (workdir / KEPT).is_file() or (workdir / "progress.json").is_file():
            stop.add_note("the same command with --resume goes on from there")
        _remove_empty(workdir)
        raise


def forget(workdir: Path) -> None:
    """Removes the statistics that wait in a work folder, and the folder if nothing else is in it."""
    (workdir / KEPT).unlink(missing_ok=True)
    _remove_empty(workdir)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _standing(workdir: Path | None, begun: float, resumed: bool, layers: int) -> str:
    """How far an interrupted pass is saved."""
    state = None if workdir is None else workdir / "progress.json"
    if state is not None and state.is_file() and (resumed or state.stat().st_mtime >= begun):
        saved = json.loads(state.read_text())
        if saved.get("half") == "backward":
            done = layers - 1 - saved["next_layer"]
            return f"the forward half and {done} of {layers} layers of the backward half are saved in {workdir}"
        return f"{saved['next_layer']} of {layers} layers are calibrated and saved in {workdir}"
    return "the calibration had not been saved yet (it is every minute), so it starts anew"


def calibrate_command(
    checkpoint: str, data: Sequence[Path], out: Path, common: Common, tokens: int, record: Sequence[str] | None
) -> dict[str, Any]:
    """``moezip calibrate``: writes the statistics file; returns what it holds."""
    from moezip.calibrate.data import domains_of

    refuse_file(out, "statistics file", common)
    clock = Clock()
    model = opened(checkpoint)
    texts = domains_of(data, tokens)
    require_files(texts)
    require_recordable(record, model)
    workdir = common.workdir or work_folder(out)
    with resumable(workdir):
        stats = run_calibration(model, texts, common, record=record, workdir=workdir, probes=PROBES)
        stats.save(out)
    forget(workdir)
    return {
        "out": str(out),
        "source": stats.source,
        "domains": {domain.name: domain.tokens for domain in stats.domains},
        "tokens": stats.tokens,
        "tokens_per_second": stats.tokens / clock.seconds,
        "layers": len(model.facts),
        "unrouted": unrouted(stats),
        "super_experts": super_expert_profile(model, stats),
        "seconds": clock.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def super_expert_profile(model: Opened, stats: Statistics) -> dict[str, Any] | None:
    """The super experts that the text showed, and both thresholds; None where outputs were not recorded."""
    from dataclasses import asdict

    from moezip.prune.super_experts import PERCENTILE, profile, recorded_peaks

    peaks = recorded_peaks(stats)
    if peaks is None:
        return None
    seen = profile(peaks, model.architecture.integer(model.source.config, model.architecture.layers_key))
    return {
        "percentile": PERCENTILE,
        "above_percentile": seen.percentile,
        "above_share": seen.share_of_maximum,
        "found": [asdict(each) for each in seen.found],
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

"""``moezip tasks build``: one pass over the text of all tasks, and the experts and the query vector of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moezip import __version__
from moezip.calibrate.data import DomainText
from moezip.errors import UsageError
from moezip.pipeline.calibrate import forget, resumable, run_calibration, work_folder
from moezip.pipeline.common import Clock, Common, refuse_file
from moezip.pipeline.prune import Prepared, PruneJob, make_plan, passing, prepare_prune
from moezip.progress import Progress
from moezip.report.report import peak_rss_bytes
from moezip.runtime.patterns import Patterns, Task, require_tasks

if TYPE_CHECKING:
    from moezip.calibrate.statistics import Array, Statistics

DEFAULT_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class TasksJob:
    """What ``moezip tasks build`` was asked for.

    Attributes:
        texts: one domain per task.
        method: a pruning method that reads text.
        keep, ratio: experts kept per layer, or the share removed; half of them with neither.
        settings: ``--set`` texts.
    """

    texts: Sequence[DomainText]
    method: str
    keep: int | None = None
    ratio: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Built:
    """The patterns, what they took, and the folder that they are of."""

    patterns: Patterns
    folder: Path
    seconds: float
    peak_rss_bytes: int


def task_texts(texts: Sequence[str] | None, tokens: int) -> list[DomainText]:
    """Domains from ``NAME=DATA`` texts; a name that is repeated gets the text of all its paths.

    Raises:
        UsageError: a text without ``=``, or fewer than two tasks.
    """
    paths: dict[str, list[Path]] = {}
    for text in texts or ():
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise UsageError(f"{text!r} is no task", where=f"--task {text}", next="write --task NAME=DATA")
        paths.setdefault(name, []).append(Path(path))
    require_tasks(list(paths))
    share = max(tokens // len(paths), 1)
    return [DomainText(name, tuple(found), share) for name, found in paths.items()]


def build_tasks_command(checkpoint: str, out: Path, job: TasksJob, common: Common) -> Built:
    """``moezip tasks build``: writes the patterns file."""
    clock = Clock()
    refuse_file(out, "patterns file", common)
    ratio = DEFAULT_RATIO if job.keep is None and job.ratio is None else job.ratio
    prune = PruneJob(job.method, job.keep, ratio, job.settings, job.texts)
    prepared = prepare_prune(checkpoint, prune, common)
    if not prepared.method.reads_text:
        raise UsageError(
            f"{prepared.method.name} reads no text, so it cannot tell tasks apart", where=f"--method {job.method}",
            next="name a method that does, such as tcess or easy-ep",
        )  # fmt: skip
    if prepared.method.unit != "expert":
        raise UsageError(
            f"{prepared.method.name} takes {prepared.method.unit}s out of experts; tasks keep whole experts",
            where=f"--method {job.method}", next="name a method that ranks experts, such as tcess or easy-ep",
        )  # fmt: skip
    if len({fact.experts for fact in prepared.model.facts}) > 1:
        raise UsageError(
            "the checkpoint's layers have different numbers of experts", where=prepared.model.source.folder,
            next="build the tasks of the checkpoint that it was made from",
        )  # fmt: skip
    workdir = common.workdir or work_folder(out)
    with resumable(workdir):
        stats = run_calibration(prepared.model, job.texts, common, workdir=workdir, **passing(prepared))
        patterns = patterns_of(prepared, prune, stats, common)
        patterns.save(out)
    forget(workdir)
    return Built(patterns, prepared.model.source.folder, clock.seconds, peak_rss_bytes())


def patterns_of(prepared: Prepared, job: PruneJob, stats: Statistics, common: Common) -> Patterns:
    """The patterns of the domains of ``stats``: each as if it had been pruned for alone.

    Reads the first layers once more, for the query vectors: sums over a task cannot tell how far its texts stray.
    """
    model = prepared.model
    queries = _queries(prepared, job, common)
    tasks = []
    for domain in stats.domains:
        alone = type(stats)(stats.source, (domain,), stats.settings)
        plan = make_plan(prepared, job, alone, common)
        query, radius = queries[domain.name]
        kept = {layer.layer: layer.kept for layer in plan.layers}
        tasks.append(Task(domain.name, domain.tokens, domain.data, tuple(query), radius, kept))
    made_by = {
        "version": __version__,
        "method": prepared.method.name,
        "paper": prepared.method.paper,
        "settings": asdict(prepared.params),
        "keep": prepared.keep,
        "seed": common.seed,
        "seq_len": stats.settings["seq_len"],
    }
    return Patterns(
        model.source.fingerprint, model.architecture.name, model.facts[0].experts, tuple(tasks), made_by
    )  # fmt: skip


def _queries(prepared: Prepared, job: PruneJob, common: Common) -> dict[str, tuple[list[float], float]]:
    """Query vector and radius of every task."""
    from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of
    from moezip.runtime.tasks import centre, routing

    source = prepared.model.source
    rows = load_rows(job.texts, tokenizer_of(source.folder), common.seq_len or default_seq_len(source.config))
    ids = [
        (row if rows.mask is None else row[rows.mask[number]]).tolist() for number, row in enumerate(rows.ids)
    ]  # fmt: skip
    found: dict[str, list[Array]] = {}
    scores = routing(source, ids, device=common.device)
    for number, (name, seen) in enumerate(zip(rows.domains, scores, strict=True)):
        found.setdefault(name, []).append(seen)
        common.watch(Progress("queries", number + 1, len(ids), "windows"))
    return {name: centre(seen) for name, seen in found.items()}

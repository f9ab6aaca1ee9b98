"""The order of the stages. Each command is one function here: words go in as typed options, a record comes out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.arch.experts import check_shapes, decoded
from moezip.arch.families import identify
from moezip.arch.spec import Architecture, LayerFacts
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import CheckpointError, PlanError, StatisticsError, UsageError
from moezip.export.stock import tensor_bytes, write_checkpoint
from moezip.plan.apply import Applied
from moezip.plan.plan import Plan, require_keepable
from moezip.progress import Watch, unwatched
from moezip.registry import Method, lookup, parse_params
from moezip.report.report import Report, peak_rss_bytes

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText
    from moezip.calibrate.statistics import Array, Statistics

NO_PRICE = "this method ranks experts but gives no price in nats"


@dataclass(frozen=True, slots=True)
class Common:
    """Options that every command shares.

    Attributes:
        device: where layers are computed.
        max_memory: ceiling of the process in bytes, None for 80 % of what is free.
        workdir: for interrupted passes and spilled hidden states; None puts it beside the output.
        resume: go on from an interrupted pass.
        overwrite: replace an existing output.
        seed: the only source of chance.
        seq_len: window in tokens, None for min(2048, the model's maximum).
        command: as typed, for the manifest.
        watch: told of every step.
    """

    device: str = "cpu"
    max_memory: int | None = None
    workdir: Path | None = None
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    seq_len: int | None = None
    command: str = ""
    watch: Watch = unwatched


@dataclass(slots=True)
class Clock:
    """Seconds by stage."""

    start: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - begun

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def open_checkpoint(name: str) -> Checkpoint:
    """A folder, or the word ``demo``. Raises CheckpointError for anything else."""
    path = Path(name)
    if path.exists():
        return Checkpoint.open(path)
    if name == "demo":
        from moezip import demo

        return Checkpoint.open(demo.checkpoint())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no folder {name!r}; it may be a hub id, which this version does not fetch",
            next=f"download it first, for example: huggingface-cli download {name} --local-dir {path.name}",
        )
    raise CheckpointError(f"there is no folder {name!r}", next="name a folder with config.json and .safetensors files")


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose headers, names and config agree."""

    source: Checkpoint
    architecture: Architecture
    facts: tuple[LayerFacts, ...]


def opened(name: str) -> Opened:
    """Raises CheckpointError or ArchitectureError before anything is computed."""
    source = open_checkpoint(name)
    entry = identify(source.config, source.folder)
    check_shapes(source, entry)
    return Opened(source, entry, tuple(entry.layer_facts(source.config)))


# -- calibrate ----------------------------------------------------------------------------------------------


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


# -- prune --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PruneJob:
    """What ``moezip prune`` was asked for.

    Attributes:
        keep, ratio: experts kept per layer, or the share removed; one of them.
        settings: ``--set`` texts.
        texts: calibration text by domain, if the method needs it. stats: saved statistics instead.
        weights: how much each domain counts, by name.
    """

    method: str
    keep: int | None = None
    ratio: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[DomainText] = ()
    stats: Path | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prune job whose every option has been checked, before any text or weight is read."""

    model: Opened
    method: Method
    params: Any
    keep: int


def prepare_prune(checkpoint: str, job: PruneJob, common: Common) -> Prepared:
    """Raises UsageError, PlanError, CheckpointError or ArchitectureError for everything that can be known now."""
    from dataclasses import replace

    from moezip.plan.allocate import kept_count
    from moezip.prune import METHODS

    method = lookup(job.method, {entry.name: entry for entry in METHODS}, "pruning method")
    params = parse_params(method, job.settings)
    if params.mtp not in ("drop", "keep"):
        raise UsageError(f"mtp is drop or keep, not {params.mtp!r}", where=f"--set mtp={params.mtp}")
    if hasattr(params, "seed") and "seed" not in job.settings:
        params = replace(params, seed=common.seed)
    model = opened(checkpoint)
    keep = kept_count(model.facts[0].experts, job.keep, job.ratio)
    for fact in model.facts:
        require_keepable(fact, keep)
    if job.texts and job.stats:
        raise UsageError("both --data and --stats are given", next="statistics are either saved or taken anew")
    return Prepared(model, method, params, keep)


def make_plan(prepared: Prepared, job: PruneJob, stats: Statistics | None, common: Common) -> Plan:
    """Scores, guard, ranking: decides, and touches no weight."""
    from dataclasses import asdict

    from moezip.calibrate.weights import weight_statistics
    from moezip.plan.allocate import layer_plans

    model, method = prepared.model, prepared.method
    if method.needs and stats is None:
        raise UsageError(
            f"{method.name} needs calibration text",
            next="give --data PATH (text of the domain that the model must stay good at) or --stats FILE",
        )
    if stats is not None:
        stats.require_source(model.source.fingerprint, job.stats)
        stats.require(method.needs, job.stats)
    weights = weight_statistics(model.source, model.architecture, model.facts, method.weights, common.watch)
    scores = {fact.layer: _score(prepared, fact, stats, weights[fact.layer], job.weights) for fact in model.facts}
    protected = _protected(prepared, stats)
    layers = layer_plans(model.facts, scores, prepared.keep, protected)
    made_by: dict[str, Any] = {
        "version": __version__,
        "method": method.name,
        "paper": method.paper,
        "settings": asdict(prepared.params),
        "keep": prepared.keep,
        "seed": common.seed,
    }
    if stats is not None:
        made_by["domains"] = [
            {"name": domain.name, "tokens": domain.tokens, "data": list(domain.data)} for domain in stats.domains
        ]
    return Plan(model.source.fingerprint, model.architecture.name, layers, prepared.params.mtp, made_by)


def _score(
    prepared: Prepared,
    fact: LayerFacts,
    stats: Statistics | None,
    weights: Mapping[str, Array],
    domain_weights: Mapping[str, float],
) -> Array:
    from moezip.plan.allocate import combine_domains

    method = prepared.method
    if not method.needs or stats is None:
        result: Array = method.run(fact, weights, prepared.params)
        return result
    per_domain = [method.run(fact, {**domain.layers[fact.layer], **weights}, prepared.params) for domain in stats.domains]
    return combine_domains(per_domain, [domain_weights.get(domain.name, 1.0) for domain in stats.domains])


def _protected(prepared: Prepared, stats: Statistics | None) -> dict[int, list[int]]:
    """Super experts by layer, where the guard is on and outputs were recorded."""
    import numpy as np

    from moezip.prune.super_experts import super_experts

    if not prepared.params.guard or stats is None:
        return {}
    layers = stats.domains[0].layers
    if not all("output_max" in domain.layers[layer] for domain in stats.domains for layer in layers):
        if prepared.method.needs:
            raise StatisticsError(
                "the statistics lack output_max, which the guard for super experts reads",
                next="calibrate again with --record output_max, or switch the guard off with --set guard=false",
            )
        return {}
    peaks = {
        layer: np.max([domain.layers[layer]["output_max"] for domain in stats.domains], axis=0) for layer in layers
    }
    entry, config = prepared.model.architecture, prepared.model.source.config
    return super_experts(peaks, int(entry.value(config, entry.layers_key)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a prune or apply ended with."""

    plan: Plan
    report: Report | None


def prune_command(
    checkpoint: str, out: Path, job: PruneJob, common: Common, *, plan_only: bool = False, save_stats: Path | None = None
) -> Outcome:
    """``moezip prune``: calibrate (or load), plan, write, verify."""
    clock = Clock()
    prepared = prepare_prune(checkpoint, job, common)
    refuse_output(out, common, plan_only)
    stats: Statistics | None = None
    if job.stats is not None:
        from moezip.calibrate.statistics import Statistics as Saved

        stats = Saved.load(job.stats)
    elif job.texts and prepared.method.needs:
        with clock.stage("calibrate"):
            stats = run_calibration(prepared.model, job.texts, common, workdir=out.with_name(out.name + ".moezip-work"))
        if save_stats is not None:
            stats.save(save_stats)
    with clock.stage("plan"):
        plan = make_plan(prepared, job, stats, common)
    if plan_only:
        _save_plan(plan, out)
        return Outcome(plan, None)
    return Outcome(plan, write_plan(prepared.model.source, plan, out, common, clock, stats))


def refuse_output(out: Path, common: Common, plan_only: bool = False) -> None:
    """Raises before any work if the output is there already."""
    if out.exists() and not common.overwrite:
        what = "plan file" if plan_only else "output folder"
        raise CheckpointError(
            f"the {what} exists already", where=out, next="name another one, or give --overwrite to replace it"
        )


def _save_plan(plan: Plan, out: Path) -> None:
    if out.is_dir():
        raise PlanError("with --plan-only the output is a file, and this is a folder", where=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.part")
    temporary.write_text(plan.to_json(), encoding="utf-8")
    temporary.replace(out)


def apply_command(checkpoint: str, plan_file: Path, out: Path, common: Common) -> Outcome:
    """``moezip apply``: a saved plan, no data."""
    clock = Clock()
    model = opened(checkpoint)
    plan = Plan.load(plan_file)
    refuse_output(out, common)
    return Outcome(plan, write_plan(model.source, plan, out, common, clock, None))


def write_plan(
    source: Checkpoint, plan: Plan, out: Path, common: Common, clock: Clock, stats: Statistics | None
) -> Report:
    """Writes the checkpoint that the plan describes; its report."""
    applied = Applied(source, plan)
    finished: list[Report] = []

    def report() -> str:
        finished.append(_report(source, applied, out, clock, stats))
        return finished[-1].to_json()

    with clock.stage("write"):
        write_checkpoint(
            applied, out, report=report, command=common.command, overwrite=common.overwrite, watch=common.watch
        )
    return finished[-1]


def _report(source: Source, applied: Applied, out: Path, clock: Clock, stats: Statistics | None) -> Report:
    plan = applied.plan
    after = tensor_bytes(applied)
    notes = []
    if applied.config.get("quantization_config"):
        notes.append("the stored quantization was kept: codes and scales of the kept experts are the source's bytes")
    if plan.mtp == "drop" and any(
        applied.architecture.claim(name, source.config).kind == "extra" for name in source.names()
    ):
        notes.append("the multi-token-prediction layers were dropped (keep them with --set mtp=keep)")
    guard = plan.made_by.get("settings", {}).get("guard")
    if guard and stats is None and "method" in plan.made_by:
        notes.append("the guard for super experts had no recorded outputs to look at")
    return Report(
        out=str(out),
        bytes_before=tensor_bytes(source),
        bytes_after=after,
        bits_per_weight=8 * after / weights_of(applied),
        experts_before=[layer.experts for layer in plan.layers],
        experts_after=[len(layer.picks) for layer in plan.layers],
        predicted_nats=None,
        predicted_nats_reason=NO_PRICE,
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        stages=dict(clock.stages),
        method=plan.made_by.get("method"),
        settings=plan.made_by.get("settings", {}),
        source=str(source.folder),
        statistics={} if stats is None else {domain.name: domain.tokens for domain in stats.domains},
        protected={str(layer.layer): list(layer.protected) for layer in plan.layers if layer.protected},
        unrouted={} if stats is None else unrouted(stats),
        notes=notes,
    )


def weights_of(source: Source) -> int:
    """Weights, whatever they are stored in: scales and zero points not counted."""
    plain = decoded(source)
    return sum(plain.spec(name).elements for name in plain.names())


# -- dry run ------------------------------------------------------------------------------------------------

DISK_BYTES_PER_SECOND = 1e9  # a plain SSD; said beside the estimate


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a prune would do; nothing was read but headers (and statistics, if saved ones were given).

    Attributes:
        kept: ids by layer, where they can be known without data.
        seconds, memory_bytes: rough; ``assumes`` says on what.
    """

    method: str
    keep: int
    experts: int
    moe_layers: int
    bytes_before: int
    bytes_after: int
    tokens: int
    seconds: float
    memory_bytes: int
    kept: dict[str, list[int]] | None
    assumes: str


def dry_run(checkpoint: str, job: PruneJob, common: Common) -> Estimate:
    """``moezip prune --dry-run``: reads no data and writes nothing."""
    from moezip.plan.plan import LayerPlan, Pick
    from moezip.report.overview import overview

    prepared = prepare_prune(checkpoint, job, common)
    model = prepared.model
    kept = None
    if job.stats is not None or not prepared.method.needs:
        stats = None
        if job.stats is not None:
            from moezip.calibrate.statistics import Statistics as Saved

            stats = Saved.load(job.stats)
        plan = make_plan(prepared, job, stats, common)
        kept = {str(layer.layer): list(layer.kept) for layer in plan.layers}
    else:
        # any choice of that many experts has the same size
        spread = [_first_of_groups(fact, prepared.keep) for fact in model.facts]
        layers = tuple(
            LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, ids)))
            for fact, ids in zip(model.facts, spread, strict=True)
        )
        plan = Plan(model.source.fingerprint, model.architecture.name, layers, prepared.params.mtp)
    seen = overview(model.source)
    after = tensor_bytes(Applied(model.source, plan))
    passes = bool(prepared.method.needs) and job.stats is None
    tokens = sum(text.tokens for text in job.texts) if passes else 0
    rate = _matmul_rate() if passes else 1.0
    hidden = tokens * seen.hidden * 2
    seconds = tokens * 2 * seen.active_parameters / rate + (seen.bytes * passes + 2 * after) / DISK_BYTES_PER_SECOND
    memory = (600 * 2**20 + seen.largest_layer_bytes + hidden) if passes else 400 * 2**20
    return Estimate(
        method=prepared.method.name,
        keep=prepared.keep,
        experts=model.facts[0].experts,
        moe_layers=len(model.facts),
        bytes_before=seen.bytes,
        bytes_after=after,
        tokens=tokens,
        seconds=seconds + 6,
        memory_bytes=min(memory, common.max_memory or memory),
        kept=kept,
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start" if passes else "disk 1 GB/s",
    )


def _first_of_groups(fact: LayerFacts, keep: int) -> list[int]:
    size, each = fact.experts // fact.groups, keep // fact.groups
    return [group * size + place for group in range(fact.groups) for place in range(each)]


def _matmul_rate() -> float:
    """Floating-point operations per second of a bf16 matrix product here, best of three."""
    import torch

    a = torch.zeros(512, 1024, dtype=torch.bfloat16)
    b = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * 512 * 1024 * 1024 / best

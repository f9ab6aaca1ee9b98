"""``moezip prune``: decide, then cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip import __version__
from moezip.arch.layout import require_uniform
from moezip.arch.spec import LayerFacts
from moezip.errors import StatisticsError, UsageError
from moezip.export.readers import check_reader
from moezip.pipeline.apply import Outcome, write_plan
from moezip.pipeline.calibrate import forget, require_files, resumable, run_calibration, work_folder
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_file, refuse_output
from moezip.pipeline.neurons import check_neurons, neuron_layers, require_raggable
from moezip.pipeline.onward import OBSERVED, joined, seen_through
from moezip.pipeline.plan_files import save_plan
from moezip.pipeline.probes import probing
from moezip.plan.compose import require_onward
from moezip.plan.factors import Factors, factors_of
from moezip.plan.merged import VALUES
from moezip.plan.packed import Values
from moezip.plan.plan import Plan, require_keepable
from moezip.plan.price import expert_prices, predicted_nats, priced
from moezip.registry import Method, lookup, parse_params

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText
    from moezip.calibrate.statistics import Array, Statistics
    from moezip.plan.allocate import Choice


@dataclass(frozen=True, slots=True)
class PruneJob:
    """What ``moezip prune`` was asked for.

    Attributes:
        keep, ratio: experts kept per layer, or the share removed; one of them.
        settings: ``--set`` texts.
        texts: calibration text by domain, if the method needs it. stats: saved statistics instead.
        weights: how much each domain counts, by name.
        scope: ``layer`` (the same number of experts in every layer) or ``model`` (ranked over all layers).
        reader: who must be able to read the output (``moezip.export.readers.READERS``); None for whoever can.
        plan: prune what this plan makes of the checkpoint; None for the checkpoint itself. values: its solved values.
    """

    method: str
    keep: int | None = None
    ratio: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[DomainText] = ()
    stats: Path | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    scope: str = "layer"
    reader: str | None = None
    plan: Plan | None = None
    values: Values | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prune job whose every option has been checked, before any text or weight is read."""

    model: Opened
    method: Method
    params: Any
    keep: int


def prepare_prune(checkpoint: str, job: PruneJob, common: Common, model: Opened | None = None) -> Prepared:
    """A job on a checkpoint, or on a ``model`` that is open already, a view perhaps.

    Raises UsageError, PlanError, CheckpointError or ArchitectureError for everything that can be known now.
    """
    from moezip.plan.allocate import kept_count
    from moezip.prune import METHODS

    method = lookup(job.method, {entry.name: entry for entry in METHODS}, "pruning method")
    _check_scope(method, job)
    params = parse_params(method, job.settings)
    check_reader(
        job.reader,
        counts_differ=method.unit == "expert" and job.scope == "model",
        widths_differ=method.unit == "neuron" and not params.uniform,
    )
    if params.mtp not in ("drop", "keep"):
        raise UsageError(f"mtp is drop or keep, not {params.mtp!r}", where=f"--set mtp={params.mtp}")
    if hasattr(params, "seed") and "seed" not in job.settings:
        params = replace(params, seed=common.seed)
    if getattr(params, "labels", "data") not in ("data", "model"):
        raise UsageError(f"labels are data or model, not {params.labels!r}", where=f"--set labels={params.labels}")
    model = seen_through(opened(checkpoint), job.plan, job.values) if model is None else model
    require_uniform(model.source.config, "compressing", model.source.folder)
    if job.plan is not None:
        require_onward(job.plan, merging=False, neurons=method.unit == "neuron")
    if job.scope == "model" and method.unit == "expert":
        require_raggable(model, "different numbers of experts in its layers")
    if method.unit == "neuron":
        check_neurons(method, model, job.keep, job.ratio, params)
        keep = model.facts[0].experts
    else:
        keep = kept_count(model.facts[0].experts, job.keep, job.ratio)
    for fact in model.facts:
        require_keepable(fact, keep)
    if "keep" in job.settings and hasattr(params, "keep"):
        raise UsageError("the number kept is no setting here", where=f"--set keep={job.settings['keep']}",
                         next="give it as --keep, or as --ratio")  # fmt: skip
    params = counted(params, keep)
    if method.check is not None:
        for fact in model.facts:
            method.check(fact, params)
    if job.texts and job.stats:
        raise UsageError("both --data and --stats are given", next="statistics are either saved or taken anew")
    require_files(job.texts)
    return Prepared(model, method, params, keep)


def counted(params: Any, keep: int) -> Any:
    """The settings with the number of experts that stay, where what is recorded depends on it."""
    return replace(params, keep=keep) if hasattr(params, "keep") else params


def _check_scope(method: Method, job: PruneJob) -> None:
    """Raises UsageError for a ranking over layers that the method cannot have."""
    if job.scope not in ("layer", "model"):
        raise UsageError(f"--scope is layer or model, not {job.scope!r}", where=f"--scope {job.scope}")
    if job.scope == "model" and not method.comparable:
        raise UsageError(
            f"scores of {method.name} mean different things in different layers", where="--scope model",
            next="rank over the model with --method nats, whose prices are nats per token everywhere",
        )  # fmt: skip


def require_text(prepared: Prepared, job: PruneJob) -> None:
    """Raises UsageError if the method reads statistics and there is nothing to take them from."""
    if prepared.method.reads_text and not job.texts and job.stats is None:
        raise UsageError(
            f"{prepared.method.name} needs calibration text",
            next="give --data PATH (text of the domain that the model must stay good at) or --stats FILE",
        )


def make_plan(prepared: Prepared, job: PruneJob, stats: Statistics | None, common: Common) -> Plan:
    """Scores, guard, ranking: decides, and touches no weight."""
    from dataclasses import asdict

    from moezip.calibrate.weights import weight_statistics
    from moezip.plan.allocate import layer_plans

    model, method = prepared.model, prepared.method
    factors = factors_of(stats, getattr(prepared.params, "probes", 1) > 0)
    if stats is not None:
        stats.require_source(model.source.fingerprint, job.stats)
        stats.require(method.reads(prepared.params), job.stats, layers=[fact.layer for fact in model.facts])
    names = method.reads_weights(prepared.params)
    weights = weight_statistics(model.source, model.architecture, model.facts, names, common.watch)
    scores = {fact.layer: _score(prepared, fact, stats, weights[fact.layer], job.weights) for fact in model.facts}
    protected = _protected(prepared, stats)
    if method.unit == "neuron":
        assert job.ratio is not None
        layers = neuron_layers(model, model.facts, scores, job.ratio, prepared.params, protected)
    else:
        choice = None if stats is None else _choice(prepared, stats, job.weights)
        keep: int | dict[int, int] = prepared.keep
        if job.scope == "model":
            assert stats is not None  # only methods that read text have comparable scores
            keep = _counts_over_layers(prepared, job, stats, protected, factors)
        layers = layer_plans(model.facts, scores, keep, protected, choice)
    made_by: dict[str, Any] = {
        "version": __version__,
        "method": method.name,
        "paper": method.paper,
        "settings": asdict(prepared.params),
        "keep": prepared.keep,
        **({"ratio": job.ratio} if method.unit == "neuron" else {}),
        "seed": common.seed,
    }
    if stats is not None:
        made_by["domains"] = [
            {"name": domain.name, "tokens": domain.tokens, "data": list(domain.data)} for domain in stats.domains
        ]
    plan = Plan(model.source.fingerprint, model.architecture.name, layers, prepared.params.mtp, made_by)
    if stats is not None and priced(stats):
        made_by["predicted_nats"] = predicted_nats(plan, stats.domains, job.weights, factors)
        made_by["price_factors"] = factors.to_json()
    return plan


def _counts_over_layers(
    prepared: Prepared,
    job: PruneJob,
    stats: Statistics,
    protected: Mapping[int, Sequence[int]],
    factors: Factors,
) -> dict[int, int]:
    """Experts that each layer keeps, by corrected prices of all domains; as many in all as --scope layer would keep."""
    from moezip.plan.allocate import kept_count, model_counts

    facts = prepared.model.facts
    shares = np.array([job.weights.get(domain.name, 1.0) for domain in stats.domains])
    each = [expert_prices(domain, factors) for domain in stats.domains]
    prices = {fact.layer: np.average([p[fact.layer] for p in each], axis=0, weights=shares) for fact in facts}
    everything = sum(fact.experts for fact in facts)
    total = kept_count(everything, None if job.keep is None else job.keep * len(facts), job.ratio)
    return model_counts(facts, prices, total, protected)


def passing(prepared: Prepared) -> dict[str, Any]:
    """How the method's own calibration pass differs from a plain one."""
    from moezip.calibrate.record import GRADIENTS, wants_gradients

    method, params = prepared.method, prepared.params
    own = own_names(method, params)
    if not wants_gradients(method.needs):
        return {"record": own}
    return {"record": [GRADIENTS, *own], "labels": params.labels}


def own_names(method: Method, params: Any) -> list[str]:
    """The records that a calibration for this method sums besides the standing ones, by name."""
    from moezip.calibrate.record import BY_NAME

    records = () if method.records is None else method.records(params)
    return [record.name for record in records if record.name not in BY_NAME]


def _choice(prepared: Prepared, stats: Statistics, weights: Mapping[str, float]) -> Choice | None:
    """The method's own choice, where it does more than rank."""
    from moezip.plan.allocate import mix_domains

    choose = prepared.method.choose
    if choose is None:
        return None

    def choice(fact: LayerFacts, keep: int, protected: Sequence[int]) -> list[int]:
        mixed = mix_domains(stats.domains, fact.layer, [weights.get(each.name, 1.0) for each in stats.domains])
        return choose(fact, mixed, keep, protected, prepared.params)

    return choice


def _score(
    prepared: Prepared,
    fact: LayerFacts,
    stats: Statistics | None,
    weights: Mapping[str, Array],
    domain_weights: Mapping[str, float],
) -> Array:
    from moezip.plan.allocate import combine_domains

    method = prepared.method
    if not method.reads_text or stats is None:
        result: Array = method.run(fact, weights, prepared.params)
        return result
    per_domain = [
        method.run(fact, {**domain.layers[fact.layer], **weights}, prepared.params) for domain in stats.domains
    ]
    return combine_domains(per_domain, [domain_weights.get(domain.name, 1.0) for domain in stats.domains])


def _protected(prepared: Prepared, stats: Statistics | None) -> dict[int, list[int]]:
    """Super experts by layer, where the guard is on and outputs were recorded."""
    from moezip.prune.super_experts import recorded_peaks, super_experts

    if not prepared.params.guard or stats is None:
        return {}
    peaks = recorded_peaks(stats)
    if peaks is None:
        if prepared.method.reads_text:
            raise StatisticsError(
                "the statistics lack output_max, which the guard for super experts reads",
                next="calibrate again with --record output_max, or switch the guard off with --set guard=false",
            )
        return {}
    entry, config = prepared.model.architecture, prepared.model.source.config
    return super_experts(peaks, int(entry.value(config, entry.layers_key)))


def prune_command(
    checkpoint: str,
    out: Path,
    job: PruneJob,
    common: Common,
    *,
    plan_only: bool = False,
    save_stats: Path | None = None,
) -> Outcome:
    """``moezip prune``: calibrate (or load), plan, write, verify."""
    clock = Clock()
    prepared = prepare_prune(checkpoint, job, common)  # what is wrong with the words comes before what is with files
    source = prepared.model.source if job.plan is None else opened(checkpoint).source
    passes = prepared.method.reads_text and job.stats is None
    require_text(prepared, job)
    if plan_only:
        refuse_file(out, "plan", common)
        if job.values is not None:
            refuse_file(out.with_name(VALUES), "file of values", common)
    else:
        refuse_output(out, source.folder, common)
    if save_stats is not None:
        if not passes:
            raise UsageError("there is no calibration whose statistics could be saved", where="--save-stats",
                             next="leave it out, or give --data and a method that reads text")  # fmt: skip
        refuse_file(save_stats, "statistics file", common)
    workdir = common.workdir or work_folder(out)
    with resumable(workdir):
        made, stats, notes = decide_prune(prepared, job, common, clock, workdir, save_stats=save_stats)
        plan, values = joined(job.plan, job.values, made, None)
        if plan_only:
            save_plan(plan, out, values)
            outcome = Outcome(plan, None)
        else:
            notes += [OBSERVED] if job.plan is not None and passes else []
            report = write_plan(source, plan, out, common, clock, stats, notes, job.reader, values)
            outcome = Outcome(plan, report)
    if passes:
        forget(workdir)
    return outcome


def decide_prune(
    prepared: Prepared,
    job: PruneJob,
    common: Common,
    clock: Clock,
    workdir: Path,
    *,
    stats: Statistics | None = None,
    save_stats: Path | None = None,
) -> tuple[Plan, Statistics | None, list[str]]:
    """The plan, the statistics behind it, and what the report should say.

    Args:
        stats: to decide with; None for those that the job names, or those of its text.
    """
    if stats is None and job.stats is not None:
        from moezip.calibrate.statistics import Statistics as Saved

        stats = Saved.load(job.stats)
    elif stats is None and prepared.method.reads_text:
        with clock.stage("calibrate"):
            asked = {**passing(prepared), **probing([(prepared.method, prepared.params)])}
            stats = run_calibration(prepared.model, job.texts, common, workdir=workdir, **asked)
        if save_stats is not None:
            stats.save(save_stats)
    with clock.stage("plan"):
        plan = make_plan(prepared, job, stats, common)
    unread = job.texts and not prepared.method.reads_text
    return plan, stats, [f"{prepared.method.name} reads no text: --data was not used"] if unread else []

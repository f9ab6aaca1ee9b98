"""``moezip merge``: group, solve layer by layer, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.arch.decoded import decoded
from moezip.arch.layout import require_uniform
from moezip.errors import UsageError
from moezip.export.readers import check_reader
from moezip.pipeline.apply import Outcome, write_plan
from moezip.pipeline.calibrate import forget, require_files, resumable, run_calibration, work_folder
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_file, refuse_output
from moezip.pipeline.neurons import require_raggable
from moezip.pipeline.onward import OBSERVED, joined, seen_through
from moezip.pipeline.plan_files import save_plan
from moezip.pipeline.prune import own_names
from moezip.pipeline.work_files import WorkFiles
from moezip.plan.factored import factors_in
from moezip.plan.merged import VALUES, digest_of
from moezip.plan.packed import LayerFiles
from moezip.plan.plan import LayerPlan, Plan, pick_json, pick_of, require_groups, require_keepable
from moezip.plan.recoded import coded, in_fp8_blocks
from moezip.progress import Progress
from moezip.registry import Method, lookup, parse_params

if TYPE_CHECKING:
    from moezip.arch.spec import LayerFacts
    from moezip.calibrate.data import DomainText, Rows
    from moezip.calibrate.statistics import Array, Statistics
    from moezip.merge.layer import Group, Merge

FOLDER = "merge"  # of the solved layers, in the work folder


@dataclass(frozen=True, slots=True)
class MergeJob:
    """What ``moezip merge`` was asked for.

    Attributes:
        keep, ratio: experts left per layer, or the share removed; one of them.
        settings: ``--set`` texts.
        texts: calibration text by domain. stats: saved statistics instead; layers that must be looked at once groups
            are known need the text all the same.
        weights: how much each domain counts, by name.
        scope: ``layer`` (as many experts in every layer) or ``model`` (layers differ, as the method says).
        reader: who must be able to read the output; None for whoever can.
        plan: merge what this plan, a prune, makes of the checkpoint; None for the checkpoint itself.
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge job whose every option has been checked, before any text or weight is read."""

    model: Opened
    method: Method
    params: Any
    keep: int

    @property
    def looks(self) -> bool:
        """Whether the layers are looked at again once groups are known."""
        return self.params.price or (self.method.looks is not None and self.method.looks(self.params))


def prepare_merge(checkpoint: str, job: MergeJob, common: Common, model: Opened | None = None) -> Prepared:
    """A job on a checkpoint, or on a ``model`` that is open already, a view perhaps.

    Raises UsageError, PlanError, CheckpointError or ArchitectureError for everything that can be known now.
    """
    from moezip.merge import METHODS
    from moezip.merge.params import settled
    from moezip.plan.allocate import kept_count

    method = lookup(job.method, {entry.name: entry for entry in METHODS}, "merging method")
    params = parse_params(method, job.settings)
    if hasattr(params, "seed") and "seed" not in job.settings:
        params = replace(params, seed=common.seed)
    if job.scope not in ("layer", "model"):
        raise UsageError(f"--scope is layer or model, not {job.scope!r}", where=f"--scope {job.scope}")
    if job.scope == "model" and method.counts is None:
        raise UsageError(
            f"{method.name} leaves as many experts in every layer", where="--scope model",
            next="leave --scope out, or use " + ", ".join(entry.name for entry in METHODS if entry.counts is not None),
        )  # fmt: skip
    factored = method.factored is not None
    remapped = params.router == "remap"
    check_reader(job.reader, counts_differ=job.scope == "model", remapped=remapped, factored=factored)
    model = seen_through(opened(checkpoint), job.plan, merging=True) if model is None else model
    require_uniform(model.source.config, "compressing", model.source.folder)
    params = settled(params, model.architecture.scoring)
    if factored:
        require_raggable(model, "experts that are stored as factors")
    if job.scope == "model" or remapped:
        require_raggable(model, "experts that were merged without merging the router's rows" if remapped else
                         "different numbers of experts in its layers")  # fmt: skip
    keep = kept_count(model.facts[0].experts, job.keep, job.ratio)
    for fact in model.facts:
        require_room(fact, keep, remapped)
        if params.router == "sum" and model.architecture.scoring != "softmax":
            raise UsageError(
                f"a {model.architecture.scoring} router scores every expert by itself, so there is no sum of scores "
                "that one row could have",
                where="--set router=sum", next="use --set router=dominant or remap",
            )  # fmt: skip
        if method.check is not None:
            method.check(fact, params)
    if job.texts and job.stats and not (params.price or (method.looks is not None and method.looks(params))):
        raise UsageError("both --data and --stats are given", next="statistics are either saved or taken anew")
    require_files(job.texts)
    return Prepared(model, method, params, keep)


def require_room(fact: LayerFacts, keep: int, remapped: bool) -> None:
    """Raises PlanError for a number of experts that the layer cannot be left with."""
    if not remapped:
        require_keepable(fact, keep)
        return
    require_keepable(replace(fact, top_k=1, groups=1, top_groups=1, group_rank=1), keep)
    if keep % fact.groups:
        raise UsageError(
            f"{keep} experts do not share evenly over the router's {fact.groups} groups, inside which experts merge",
            where=f"layer {fact.layer}", next=f"keep a multiple of {fact.groups}",
        )  # fmt: skip


def require_text(prepared: Prepared, job: MergeJob) -> None:
    """Raises UsageError where text is needed and there is none."""
    name = prepared.method.name
    if prepared.method.reads_text and not job.texts and job.stats is None:
        raise UsageError(
            f"{name} needs calibration text",
            next="give --data PATH (text of the domain that the model must stay good at) or --stats FILE",
        )
    if prepared.looks and not job.texts:
        raise UsageError(
            f"{name} with these settings looks at the layers' inputs, which saved statistics do not hold",
            next="give --data PATH besides, or --set align=weights, combine=frequency, router=dominant, price=false",
        )


# -- deciding -----------------------------------------------------------------------------------------------


def mixed_statistics(stats: Statistics, facts: Sequence[LayerFacts], weights: Mapping[str, float]) -> dict[
    int, dict[str, Array]
]:  # fmt: skip
    """Per layer the statistics of the mixture of domains, and how many scored tokens they stand for."""
    import numpy as np

    from moezip.merge.price import SCORED
    from moezip.plan.allocate import mix_domains

    shares = [weights.get(domain.name, 1.0) for domain in stats.domains]
    scored = np.asarray(mixed_scored(stats, shares))
    return {fact.layer: {**mix_domains(stats.domains, fact.layer, shares), SCORED: scored} for fact in facts}


def mixed_scored(stats: Statistics, shares: Sequence[float]) -> float:
    """Scored tokens on the scale of the mixture's sums, which are per token of each domain where there are several."""
    if len(stats.domains) == 1:
        return float(stats.domains[0].scored)
    return sum(share * domain.scored / domain.tokens for share, domain in zip(shares, stats.domains, strict=True))


def make_groups(
    prepared: Prepared, job: MergeJob, stats: Mapping[int, Mapping[str, Array]]
) -> dict[int, tuple[Group, ...]]:
    """The groups of every layer, in the order of the output, checked.

    Raises:
        PlanError: a grouping that is none, or that the router could not work with.
    """
    from moezip.plan.allocate import kept_count

    facts, method, params = prepared.model.facts, prepared.method, prepared.params
    counts = {fact.layer: prepared.keep for fact in facts}
    if job.scope == "model":
        assert method.counts is not None
        everything = sum(fact.experts for fact in facts)
        total = kept_count(everything, None if job.keep is None else job.keep * len(facts), job.ratio)
        counts = method.counts(facts, stats, total, params)
    found = {}
    for fact in facts:
        assert method.choose is not None
        groups = method.choose(fact, stats[fact.layer], counts[fact.layer], (), params)
        ordered = tuple(sorted((tuple(group) for group in groups), key=lambda group: group[0]))
        require_groups_of(fact, ordered, counts[fact.layer], params.router == "remap")
        found[fact.layer] = ordered
    return found


def require_groups_of(fact: LayerFacts, groups: Sequence[Group], count: int, remapped: bool) -> None:
    """Raises PlanError unless these are ``count`` groups, no expert in two of them, that the router can work with."""
    from moezip.errors import PlanError

    members = [expert for group in groups for expert in group]
    if len(groups) != count or len(set(members)) != len(members) or not set(members) <= set(range(fact.experts)):
        raise PlanError(f"layer {fact.layer}: the method was to form {count} groups and formed {list(groups)}")
    if not remapped:
        require_groups(fact, [group[0] for group in groups])


class Solved(WorkFiles):
    """Merged layers in a work folder, one file each."""

    STATE = "merge.json"

    def file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04}.safetensors"

    def save(self, layer: int, found: Merge) -> None:
        """All of a layer or nothing."""
        import torch

        facts = {"picks": [pick_json(pick) for pick in found.picks], "router": found.router, "nats": found.nats,
                 "notes": list(found.notes), "values": list(found.values)}  # fmt: skip
        self.write(self.file(layer), {**found.values, f"done.{layer}": torch.zeros(1)}, facts)

    def facts(self, layer: int) -> dict[str, Any]:
        return self.facts_of(self.file(layer))


def solve_layers(
    prepared: Prepared,
    groups: Mapping[int, tuple[Group, ...]],
    stats: Mapping[int, Mapping[str, Array]],
    rows: Rows | None,
    solved: Solved,
    common: Common,
) -> None:
    """Merges every layer, into the work folder. With ``rows``, each is looked at on that text first.

    All layers see what the source's own layers before them put out.
    """
    from moezip.merge.layer import MergeLayer
    from moezip.merge.solve import merge

    model = prepared.model
    solve, plain = prepared.method.solve or merge, decoded(model.source)
    codes = in_fp8_blocks(model.source) and prepared.method.factored is None
    facts = {fact.layer: fact for fact in model.facts}
    watch, done = common.watch, 0
    watch(Progress("merge", 0, len(facts), "layers"))

    def one(layer: int, inputs: Any = None, module: Any = None) -> None:
        part = MergeLayer(
            plain, model.architecture, facts[layer], groups[layer], dict(stats[layer]), inputs, module,
        )  # fmt: skip
        found = solve(part, prepared.params)
        if codes:
            found.values = coded(found.values, model.source, model.architecture, layer)
        solved.save(layer, found)

    if rows is None:
        for layer in facts:
            if not solved.file(layer).is_file():
                one(layer)
            done += 1
            watch(Progress("merge", done, len(facts), "layers"))
        return
    from moezip.calibrate.moments import expert_inputs
    from moezip.calibrate.stream import Stream
    from moezip.pipeline.layerwise import inputs_file

    if all(solved.file(layer).is_file() for layer in facts):
        return
    stream = Stream(plain, device=common.device, max_memory=common.max_memory, spill=solved.folder)
    states = stream.embed(rows)
    try:
        for index in range(max(facts) + 1):
            stream.load_layer(index)
            if index in facts and not solved.file(index).is_file():
                inputs = expert_inputs(stream, index, rows, states, inputs_file(stream, states, solved.folder))
                block: Any = stream.layers[index].get_submodule(model.architecture.block)
                try:
                    one(index, inputs, block.get_submodule(model.architecture.experts_module))
                finally:
                    inputs.close()
            if index in facts:
                done += 1
                watch(Progress("merge", done, len(facts), "layers"))
            if index < max(facts):
                stream.advance(index, rows, states)
            stream.free_layer(index)
    finally:
        states.close()


# -- the command --------------------------------------------------------------------------------------------


def merge_command(
    checkpoint: str,
    out: Path,
    job: MergeJob,
    common: Common,
    *,
    plan_only: bool = False,
    save_stats: Path | None = None,
) -> Outcome:
    """``moezip merge``: calibrate (or load), group, solve, write, verify."""
    clock = Clock()
    prepared = prepare_merge(checkpoint, job, common)
    source = prepared.model.source if job.plan is None else opened(checkpoint).source
    require_text(prepared, job)
    passes = prepared.method.reads_text and job.stats is None
    if plan_only:
        refuse_file(out, "plan", common)
        refuse_file(out.with_name(VALUES), "file of values", common)
    else:
        refuse_output(out, source.folder, common)
    if save_stats is not None:
        if not passes:
            raise UsageError("there is no calibration whose statistics could be saved", where="--save-stats",
                             next="leave it out, or give --data and no --stats")  # fmt: skip
        refuse_file(save_stats, "statistics file", common)
    workdir = common.workdir or work_folder(out)
    with resumable(workdir):
        plan, solved, stats, notes = decide_merge(prepared, job, common, clock, workdir, save_stats=save_stats)
        plan, values = joined(job.plan, None, plan, LayerFiles(solved.folder) if plan.solved else None)
        notes = [OBSERVED, *notes] if job.plan is not None and passes else notes
        if plan_only:
            save_plan(plan, out, values)
            outcome = Outcome(plan, None)
        else:
            outcome = Outcome(
                plan, write_plan(source, plan, out, common, clock, stats, notes, job.reader, values=values)
            )
        solved.clear()
    forget(workdir)
    return outcome


def decide_merge(
    prepared: Prepared,
    job: MergeJob,
    common: Common,
    clock: Clock,
    workdir: Path,
    *,
    stats: Statistics | None = None,
    save_stats: Path | None = None,
) -> tuple[Plan, Solved, Statistics | None, list[str]]:
    """The plan, its solved values, the statistics behind it, and what the report should say.

    Args:
        stats: to decide with; None for those that the job names, or those of its text.
    """
    if stats is None and job.stats is not None:
        from moezip.calibrate.statistics import Statistics as Saved

        stats = Saved.load(job.stats)
    elif stats is None and prepared.method.reads_text:
        with clock.stage("calibrate"):
            stats = run_calibration(prepared.model, job.texts, common, workdir=workdir, **passing(prepared))
        if save_stats is not None:
            stats.save(save_stats)
    with clock.stage("merge"):
        plan, solved, notes = make_merge_plan(prepared, job, stats, common, workdir / FOLDER)
    return plan, solved, stats, notes


def passing(prepared: Prepared) -> dict[str, Any]:
    """How the method's own calibration pass differs from a plain one."""
    from moezip.calibrate.record import GRADIENTS

    own = own_names(prepared.method, prepared.params)
    return {"record": [GRADIENTS, *own]} if prepared.params.price else {"record": own}


def make_merge_plan(
    prepared: Prepared, job: MergeJob, stats: Statistics | None, common: Common, folder: Path
) -> tuple[Plan, Solved, list[str]]:
    """The plan, its solved values in ``folder``, and what the report should say."""
    from moezip.calibrate.weights import weight_statistics
    from moezip.pipeline.solved import job_digest

    model, method, params = prepared.model, prepared.method, prepared.params
    named: dict[int, dict[str, Array]] = {fact.layer: {} for fact in model.facts}
    if stats is not None:
        stats.require_source(model.source.fingerprint, job.stats)
        stats.require(method.reads(params), job.stats, layers=[fact.layer for fact in model.facts])
        named = mixed_statistics(stats, model.facts, job.weights)
    read = method.reads_weights(params)
    own = weight_statistics(model.source, model.architecture, model.facts, read, common.watch)
    named = {layer: {**sums, **own[layer]} for layer, sums in named.items()}
    groups = make_groups(prepared, job, named)
    rows = read_rows(prepared, job, common) if prepared.looks else None
    data = () if rows is None else tuple(rows.fingerprint(name) for name in dict.fromkeys(rows.domains))
    solved = Solved(folder, job_digest(model.source.fingerprint, method.name, params, groups, data))
    solved.begin(common.resume)
    solve_layers(prepared, groups, named, rows, solved, common)
    layers, names, prices, notes = [], [], [], []
    for fact in model.facts:
        found = solved.facts(fact.layer)
        scores = tuple(float(value) for value in method.run(fact, named[fact.layer], params))
        picks = tuple(map(pick_of, found["picks"]))
        layers.append(LayerPlan(fact.layer, fact.experts, picks, scores, router=found["router"]))
        names += found["values"]
        prices.append(found["nats"])
        notes += [f"layer {fact.layer}: {note}" for note in found["notes"]]
    made_by: dict[str, Any] = {
        "version": __version__, "method": method.name, "paper": method.paper, "settings": asdict(params),
        "keep": prepared.keep, "scope": job.scope, "seed": common.seed,
    }  # fmt: skip
    if stats is not None:
        made_by["domains"] = [
            {"name": domain.name, "tokens": domain.tokens, "data": list(domain.data)} for domain in stats.domains
        ]
    if all(price is not None for price in prices):
        made_by["predicted_nats"] = sum(prices)
    digest = digest_of(LayerFiles(folder), names) if names else ""
    plan = Plan(
        model.source.fingerprint, model.architecture.name, tuple(layers), "drop", made_by,
        values=digest, solved=tuple(names),
        factors=factors_in(LayerFiles(folder), names, model.architecture),
    )  # fmt: skip
    return plan, solved, notes


def read_rows(prepared: Prepared, job: MergeJob, common: Common) -> Rows:
    """The calibration text in windows."""
    from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of

    source = prepared.model.source
    return load_rows(job.texts, tokenizer_of(source.folder), common.seq_len or default_seq_len(source.config))

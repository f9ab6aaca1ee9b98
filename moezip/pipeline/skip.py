"""``moezip skip``: a rule by which a model skips experts as it runs, found on text and stored in its config."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.layout import own_format
from moezip.errors import ArchitectureError, UsageError
from moezip.export.skipping import WithSkipping, explained
from moezip.export.stock import PLAN, tensor_bytes
from moezip.pipeline.calibrate import forget, require_files, resumable, work_folder
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_output
from moezip.pipeline.reported import write_reported
from moezip.progress import Progress
from moezip.registry import Method, lookup, parse_params
from moezip.report.card import made_by, model_card
from moezip.report.overview import overview
from moezip.report.report import Report
from moezip.runtime.skipping import MASKS, Skipping, masks_bytes

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText, Rows
    from moezip.calibrate.statistics import Array

NO_PRICE = "calls that are skipped as the model runs have no price: measure the loss with `moezip evaluate --against`"
# Tokens that a layer's mask network learns from at most: their inputs are in memory.
LESSONS = 16_384


@dataclass(frozen=True, slots=True)
class NaeeParams:
    """Settings of ``naee``.

    Attributes:
        quantile: of the ratio of each rank's gate to the best, below which it is dropped; the authors take the median.
        renormalise: whether the gates that stay share out those of the dropped: ``yes``, ``no``, or ``auto`` for
            whatever the model's own router does with the gates of the experts that it chooses.
    """

    quantile: float = 0.5
    renormalise: str = "auto"


@dataclass(frozen=True, slots=True)
class OdpParams(NaeeParams):
    """Settings of ``odp``.

    Attributes:
        protect: share of each window's tokens that keep all their experts.
        layers: how many layers take part, those in which dropping loses least; 0 for all.
    """

    protect: float = 0.02
    layers: int = 0


@dataclass(frozen=True, slots=True)
class OtpParams:
    """Settings of ``otp``.

    Attributes:
        penalty: what keeping all of a token's experts costs, in mean squared lengths of the residual stream: larger
            ones skip more.
        steps: of training, per layer.
        renormalise: as of ``naee``.
    """

    penalty: float = 0.01
    steps: int = 600
    renormalise: str = "auto"


@dataclass(frozen=True, slots=True)
class SkipJob:
    """What ``moezip skip`` was asked for: rule, ``--set`` texts and calibration text."""

    rule: str
    settings: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[DomainText] = ()


@dataclass(frozen=True, slots=True)
class Learnt:
    """A rule, and what the text showed.

    Attributes:
        share: of the text's expert calls, those that the rule drops; protected tokens not counted out.
        extra: further files of the checkpoint.
    """

    skipping: Skipping
    share: float
    extra: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedSkip:
    """A job whose every option has been checked, before any text or weight is read."""

    model: Opened
    method: Method
    params: Any
    renormalise: bool


def prepare_skip(checkpoint: str, job: SkipJob, model: Opened | None = None) -> PreparedSkip:
    """A job on a checkpoint, or on a ``model`` that is open already.

    Raises UsageError, DataError, CheckpointError or ArchitectureError for everything that can be known now.
    """
    method = lookup(job.rule, RULES, "rule")
    params = parse_params(method, job.settings)
    for name, low, high in (("quantile", 0, 1), ("protect", 0, 1), ("penalty", 0, None), ("steps", 1, None),
                            ("layers", 0, None)):  # fmt: skip
        value = getattr(params, name, low)
        if not (value >= low and (high is None or value <= high)):
            span = f"from {low} to {high}" if high is not None else f"{low} or more"
            raise UsageError(f"{name} is {span}, not {value:g}", where=f"--set {name}={value:g}")
    if params.renormalise not in ("auto", "yes", "no"):
        raise UsageError(f"renormalise is auto, yes or no, not {params.renormalise!r}",
                         where=f"--set renormalise={params.renormalise}")  # fmt: skip
    if not job.texts:
        raise UsageError(f"{method.name} needs text to learn from",
                         next="give --data PATH, text of the kind that the model is for")  # fmt: skip
    require_files(job.texts)
    model = opened(checkpoint) if model is None else model
    if not model.facts:
        raise ArchitectureError("no layer of this model has experts", where=model.source.folder)
    if model.facts[0].top_k < 2:
        raise ArchitectureError(
            "its tokens have one expert each, so that none can be left out", where=model.source.folder,
            next="prune experts instead, which makes the checkpoint smaller",
        )  # fmt: skip
    own = model.architecture.gates_renormalised(model.source.config)
    return PreparedSkip(model, method, params, {"yes": True, "no": False}.get(params.renormalise, own))


def skip_command(checkpoint: str, out: Path, job: SkipJob, common: Common) -> Report:
    """``moezip skip``: reads text, finds the rule, writes the checkpoint with it, and proves it complete."""
    clock = Clock()
    prepared = prepare_skip(checkpoint, job)
    source = prepared.model.source
    refuse_output(out, source.folder, common)
    workdir = common.workdir or work_folder(out)
    with resumable(workdir):
        with clock.stage("calibrate"):
            learnt = prepared.method.run(prepared, job, common, workdir)
        report = write_skip(prepared, learnt, job, out, common, clock)
    forget(workdir)
    return report


def write_skip(prepared: PreparedSkip, learnt: Learnt, job: SkipJob, out: Path, common: Common, clock: Clock) -> Report:
    """Writes the checkpoint with its rule; its report."""
    source = prepared.model.source
    view = WithSkipping(source, learnt.skipping)
    lines = [f"{made_by(f'`moezip skip --rule {prepared.method.name}`')}.", "", *explained(learnt.skipping)]
    report = _report(prepared, learnt, job, out)
    card = model_card(source, view, report, "skipping experts", lines)
    plan = source.folder / PLAN
    extra = {**({PLAN: plan.read_bytes()} if plan.is_file() else {}), **learnt.extra}
    return write_reported(view, None, out, report, card, common, clock, extra)


def _report(prepared: PreparedSkip, learnt: Learnt, job: SkipJob, out: Path) -> Report:
    model, counts = prepared.model, [fact.experts for fact in prepared.model.facts]
    size = tensor_bytes(model.source)
    notes = [f"on its text the rule drops {learnt.share:.1%} of the expert calls"]
    if learnt.skipping.protect:
        notes[0] += f"; protected tokens, {learnt.skipping.protect:.1%} of each window, keep theirs"
    if not own_format(model.source.config):
        notes.append("moezip.load and moezip evaluate skip; other loaders run every expert, as in the source")
    return Report(
        out=str(out),
        bytes_before=size,
        bytes_after=size,
        bits_per_weight=8 * size / overview(model.source).parameters,
        experts_before=counts,
        experts_after=counts,
        predicted_nats=None,
        predicted_nats_reason=NO_PRICE,
        seconds=0.0,
        peak_rss_bytes=0,
        method=f"skip {prepared.method.name}",
        settings={**asdict(prepared.params), "renormalise": prepared.renormalise},
        source=str(model.source.folder),
        statistics={"domains": [text.name for text in job.texts], "share_dropped": learnt.share},
        stock=not own_format(model.source.config),
        form="moezip" if own_format(model.source.config) else "stock",
        notes=notes,
    )


def _rows(prepared: PreparedSkip, job: SkipJob, common: Common) -> Rows:
    from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of

    source = prepared.model.source
    return load_rows(job.texts, tokenizer_of(source.folder), common.seq_len or default_seq_len(source.config))


# -- thresholds ---------------------------------------------------------------------------------------------


def by_thresholds(prepared: PreparedSkip, job: SkipJob, common: Common, workdir: Path) -> Learnt:
    """``naee`` and ``odp``: one calibration pass, then quantiles of the gates' ratios."""
    sums = gate_ratios(prepared, job, common, workdir)
    return from_ratios(prepared, sums)


def gate_ratios(prepared: PreparedSkip, job: SkipJob, common: Common, workdir: Path) -> dict[int, Array]:
    """Per layer, the histogram of gate ratios (``moezip.calibrate.skips``) over all text, each domain counting once.

    A domain's tokens are what ``--tokens`` shares out evenly, so that none outweighs another.
    """
    from moezip.calibrate.run import calibrate
    from moezip.calibrate.skips import GATE_RATIOS

    rows = _rows(prepared, job, common)
    stats = calibrate(
        prepared.model.source, rows, (GATE_RATIOS,), device=common.device, max_memory=common.max_memory,
        workdir=workdir, resume=common.resume, watch=common.watch,
    )  # fmt: skip
    found: dict[int, Array] = {}
    for domain in stats.domains:
        for layer, named in domain.layers.items():
            seen = named[GATE_RATIOS.name]
            found[layer] = seen if layer not in found else found[layer] + seen
    return found


def from_ratios(prepared: PreparedSkip, sums: Mapping[int, Array]) -> Learnt:
    """The rule that the settings make of the layers' histograms."""
    from moezip.prune.odp import least_harmed, shares_below, thresholds

    params, rule = prepared.params, prepared.method.name
    limits = {layer: thresholds(seen, params.quantile) for layer, seen in sums.items()}
    shares = {layer: shares_below(seen, limits[layer]) for layer, seen in sums.items()}
    count = getattr(params, "layers", 0)
    if count > len(sums):
        raise UsageError(f"{count} layers are to take part, there are {len(sums)} with experts",
                         where=f"--set layers={count}")  # fmt: skip
    chosen = least_harmed({layer: mass for layer, (_, mass) in shares.items()}, count)
    dropped = sum(shares[layer][0] * sums[layer][0].sum() for layer in chosen)
    skipping = Skipping(
        rule,  # type: ignore[arg-type]
        prepared.renormalise,
        {layer: limits[layer] for layer in chosen},
        getattr(params, "protect", 0.0),
    )
    return Learnt(skipping, float(dropped / sum(seen[0].sum() for seen in sums.values())))


# -- masks --------------------------------------------------------------------------------------------------


def by_masks(prepared: PreparedSkip, job: SkipJob, common: Common, workdir: Path) -> Learnt:
    """``otp``: every layer's network is trained as the text passes through the unmasked model."""
    from moezip.calibrate.skips import LessonCapture
    from moezip.calibrate.stream import Stream
    from moezip.prune.otp import train

    model, rows = prepared.model, _rows(prepared, job, common)
    stream = Stream(model.source, device=common.device, max_memory=common.max_memory, spill=workdir)
    every = max(-(-rows.tokens() // LESSONS), 1)
    key = model.architecture.residual_scale_key
    scale = float(model.source.config.get(key) or 1.0) if key else 1.0
    capture = LessonCapture(model.architecture, model.facts, scale, renormalise=prepared.renormalise, every=every)
    networks, dropped, calls = {}, 0, 0
    states = stream.embed(rows)
    try:
        for layer in stream.run(rows, states, last=model.facts[-1].layer, capture=capture):
            lessons = capture.taken()
            if lessons is not None:
                network = train(
                    lessons, penalty=prepared.params.penalty, steps=prepared.params.steps, seed=common.seed + layer
                )
                networks[layer] = network
                kept = network.kept(lessons.inputs, lessons.ratios)
                calls += lessons.ratios.numel()
                dropped += lessons.ratios.numel() - int(kept.sum())
            common.watch(Progress("train masks", layer + 1, model.facts[-1].layer + 1, tokens=rows.tokens()))
    finally:
        states.close()
    raw = masks_bytes(networks)
    skipping = Skipping(
        "otp", prepared.renormalise, layers=tuple(sorted(networks)), sha256=hashlib.sha256(raw).hexdigest()
    )
    return Learnt(skipping, dropped / calls, {MASKS: raw})


RULES: dict[str, Method] = {
    "naee": Method(
        "naee", "profile", "drop an expert whose gate is below the median share of the best", "arXiv 2402.14800",
        (), by_thresholds, NaeeParams,
    ),
    "odp": Method(
        "odp", "profile", "as naee, but the tokens that matter most keep all", "arXiv 2410.06270",
        (), by_thresholds, OdpParams,
    ),
    "otp": Method(
        "otp", "profile", "a small trained network per layer says how many to keep", "arXiv 2510.10962",
        (), by_masks, OtpParams,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SkipEstimate:
    """What ``moezip skip`` would do; nothing was read but headers.

    Attributes:
        rule, settings: as they would be stored.
        moe_layers: that have experts. top_k: experts per token.
        tokens: of text asked for.
        bytes: of the output. masks_bytes: of the mask networks beside it.
    """

    rule: str
    settings: Mapping[str, Any]
    moe_layers: int
    top_k: int
    tokens: int
    bytes: int
    masks_bytes: int


def estimate_skip(checkpoint: str, job: SkipJob) -> SkipEstimate:
    """``moezip skip --dry-run``: reads no text and writes nothing."""
    prepared = prepare_skip(checkpoint, job)
    facts = prepared.model.facts
    networks = sum(4 * fact.top_k * (fact.hidden + fact.top_k + 1) for fact in facts)
    return SkipEstimate(
        prepared.method.name,
        {**asdict(prepared.params), "renormalise": prepared.renormalise},
        len(facts),
        facts[0].top_k,
        sum(text.tokens for text in job.texts),
        tensor_bytes(prepared.model.source),
        networks if prepared.method.name == "otp" else 0,
    )

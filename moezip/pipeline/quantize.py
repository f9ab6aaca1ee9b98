"""``moezip quantize``: who gets how many bits, which codes, and what they are written as."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.arch.experts import decoded
from moezip.arch.libraries import import_model_code
from moezip.arch.packing import Packing
from moezip.checkpoint.source import Source
from moezip.errors import PlanError, UsageError
from moezip.export.stock import tensor_bytes
from moezip.formats.fp8_block import block_size
from moezip.formats.packed import Grid
from moezip.pipeline.calibrate import forget, require_files, work_folder
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_file, refuse_output
from moezip.pipeline.items import grid_counts, group_size, items_of
from moezip.pipeline.packed import About, readable, write_packed
from moezip.pipeline.plan_files import save_plan
from moezip.plan.apply import Applied
from moezip.plan.merged import VALUES, Merged
from moezip.plan.packed import LayerFiles, Packed, Unsolved, Values
from moezip.plan.plan import Plan
from moezip.progress import Progress
from moezip.quantize.hessian import PRIOR
from moezip.quantize.settings import StorageParams, split_settings
from moezip.registry import Method, lookup
from moezip.report.report import Report

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText, Rows
    from moezip.pipeline.solved import LayerReport, Solved
    from moezip.pipeline.widths import Chooser, Wanted, Widths
    from moezip.plan.widths import Granularity


WORK = "quantize"
# Allocators that read text, whatever the solver reads.
READ_TEXT = ("lp", "pmq", "block")


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What ``moezip quantize`` was asked for.

    Attributes:
        bits: of the codes (uniform, pmq), or stored bits per weight. size: of the output instead, in bytes, or as a
            share of the source's.
        solver: a name in ``moezip.quantize.METHODS``. allocate: one in ``moezip.pipeline.widths.ALLOCATORS``.
        granularity: what shares a width. reader: who must be able to read the output, None for moezip.
        group: weights that share a scale; None for the largest that fits.
        settings: ``--set`` texts, of the storage, of the solver and of the allocator.
        values: solved values of the plan, if it has any.
        texts: calibration text by domain, if the solver or the allocator needs it.
        plan: quantize what this plan makes of the checkpoint; None for the checkpoint itself. With widths in it (of
            ``--plan-only``, or of a quantized checkpoint) those are taken, and no budget is given.
    """

    bits: float | None
    solver: str = "gptq"
    allocate: str = "uniform"
    size: float | None = None
    granularity: Granularity = "role"
    reader: str | None = None
    group: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[DomainText] = ()
    plan: Plan | None = None
    values: Values | None = None

    @property
    def planned(self) -> Packing:
        """The widths that the plan brings; empty if it brings none."""
        return {} if self.plan is None else self.plan.packing


@dataclass(frozen=True, slots=True)
class Prepared:
    """A quantize job whose every option has been checked, before any text or weight is read."""

    model: Opened
    method: Method
    params: Any
    wanted: Wanted

    @property
    def gate(self) -> bool:
        """Whether hessians count tokens by their gate weight."""
        return bool(getattr(self.params, "gate", False))

    @property
    def prior(self) -> float:
        """Tokens' worth of the pooled hessian, per input channel."""
        return float(getattr(self.params, "prior", PRIOR))

    @property
    def layerwise(self) -> bool:
        """Whether the solver reads text."""
        return self.method.schedule == "layerwise"

    @property
    def reads_text(self) -> bool:
        """Whether the solver or the choice of widths does."""
        return self.layerwise or self.wanted.allocate in READ_TEXT

    def solve(self, weight: Any, hessian: Any, grid: Grid) -> Any:
        return self.method.run(weight, hessian, grid, self.params)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a quantization ended with."""

    plan: Plan
    report: Report | None
    layers: Mapping[str, LayerReport]
    chosen: Widths

    @property
    def widths(self) -> dict[str, int]:
        """How many matrices are on each grid, widest first."""
        return grid_counts(self.plan.packing)


@dataclass(frozen=True, slots=True)
class Codes:
    """Widths that were chosen, and codes that were solved for them; nothing is written yet.

    Attributes:
        packed: the checkpoint with its codes, which lie in ``solved``.
        notes: for the report.
    """

    about: About
    plan: Plan
    packed: Packed
    solved: Solved
    layers: Mapping[str, LayerReport]
    chosen: Widths
    notes: tuple[str, ...]

    def write(self, out: Path, common: Common, clock: Clock) -> Report:
        return write_packed(self.about, self.plan, self.packed, out, common, clock, self.notes)


def prepare_quantize(checkpoint: str, job: QuantizeJob, common: Common, model: Opened | None = None) -> Prepared:
    """A job on a checkpoint, or on a ``model`` that is open already.

    Raises UsageError, PlanError, CheckpointError or ArchitectureError for everything that can be known now.
    """
    from moezip.pipeline.widths import PLANNED, Wanted, check_wanted, needs_prices
    from moezip.plan.allocators import ALLOCATORS
    from moezip.quantize import METHODS
    from moezip.quantize.settings import scale_dtype

    method = lookup(job.solver, {entry.name: entry for entry in METHODS}, "solver")
    allocator = lookup(job.allocate, ALLOCATORS, "way to allocate bits")
    params, storage, own = split_settings(method, job.settings, allocator)
    if job.planned:
        _check_planned(job, storage, own)
    model = opened(checkpoint) if model is None else model
    if job.reader == "transformers" and "symmetric" not in job.settings:
        storage = replace(storage, symmetric=True)  # its loader for packed codes takes no zeros
    wanted = Wanted(
        job.bits,
        None if job.size is None else int(job.size if job.size > 1 else job.size * tensor_bytes(model.source)),
        PLANNED if job.planned else job.allocate,
        own,
        job.granularity,
        job.reader,
        next(iter(job.planned.values())).group if job.planned else group_size(model.facts, job.group),
        replace(storage, scale=scale_dtype(storage, model.source.config)),
    )
    if not job.planned:
        check_wanted(wanted)
    prepared = Prepared(model, method, params, wanted)
    if prepared.reads_text and not job.texts:
        what = method.name if prepared.layerwise else f"--allocate {wanted.allocate}"
        raise UsageError(
            f"{what} needs calibration text",
            next="give --data PATH (text of the domain that the model must stay good at), or --solver rtn"
            + ("" if prepared.layerwise else " --allocate uniform"),
        )
    if needs_prices(wanted) and job.plan is not None:
        raise UsageError(
            f"--allocate {job.allocate} prices the checkpoint itself, not what a plan makes of it", where="--plan",
            next="write the pruned checkpoint first, or use --allocate uniform",
        )  # fmt: skip
    if prepared.reads_text:
        require_files(job.texts)
    return prepared


def _check_planned(job: QuantizeJob, storage: StorageParams, own: Any) -> None:
    """Raises UsageError for a budget, or anything else that decides about widths, beside a plan that has them."""
    given = [f"--bits {job.bits:g}"] if job.bits is not None else []
    given += ["--size"] if job.size is not None else []
    given += [f"--allocate {job.allocate}"] if job.allocate != "uniform" else []
    given += ["--group-size"] if job.group is not None else []
    deciding = replace(storage, inputs=StorageParams().inputs) != StorageParams() or own != type(own)()
    if given or deciding:
        raise UsageError(
            "the plan says already which matrix gets how many bits",
            where=", ".join(given) or "--set",
            next="give --plan without a budget, or a plan that only chooses experts or neurons",
        )


# -- the command --------------------------------------------------------------------------------------------


def quantize_command(
    checkpoint: str,
    out: Path,
    job: QuantizeJob,
    common: Common,
    tell: Callable[[Widths], None] = lambda chosen: None,
    *,
    plan_only: bool = False,
) -> Outcome:
    """``moezip quantize``: choose widths, solve layer by layer, write, verify.

    Args:
        tell: called with the widths once they are chosen, before anything is solved.
        plan_only: ``out`` is a file that gets the plan: picks and widths, and no codes.
    """
    clock = Clock()
    prepared = prepare_quantize(checkpoint, job, common)
    if plan_only:
        refuse_file(out, "plan", common)
        if job.values is not None:
            refuse_file(out.with_name(VALUES), "file of values", common)
    else:
        refuse_output(out, prepared.model.source.folder, common)
    folder = (common.workdir or work_folder(out)) / WORK
    if plan_only:
        # without codes to solve, only a choice that reads text needs any
        decided = decide_widths(prepared, job, common, clock, folder, prepared.wanted.allocate in READ_TEXT)
        tell(decided.chosen)
        plan = replace(decided.split.plan, made_by=decided.made_by, packing=decided.chosen.packing)
        save_plan(plan, out, job.values)
        forget_work(folder)
        return Outcome(plan, None, {}, decided.chosen)
    codes = solve_quantize(prepared, job, common, clock, folder, tell)
    report = codes.write(out, common, clock)
    codes.solved.clear()
    forget_work(folder)
    return Outcome(codes.plan, report, codes.layers, codes.chosen)


@dataclass(frozen=True, slots=True)
class Decided:
    """Who gets how many bits: the views that codes are solved on, and the provenance for the plan's reader."""

    plain: Source
    split: Applied | Merged
    rows: Rows | None
    chosen: Widths
    made_by: dict[str, Any]


def decide_widths(
    prepared: Prepared, job: QuantizeJob, common: Common, clock: Clock, folder: Path, reads_text: bool
) -> Decided:
    """Raises PlanError where the reader could not read such codes; a refusal must not wait for them."""
    model = prepared.model
    plain, split = views(model, job.plan, job.values)
    import_model_code(model.source.config)
    rows = read_rows(model, job, common) if reads_text else None
    with clock.stage("plan"):
        chosen = choose(prepared, job, plain, split, rows, folder, common)
    if chosen.plan is not split.plan:
        plain, split = views(model, chosen.plan, job.values)
    readable(Packed(split, chosen.packing, Unsolved(split, chosen.packing)), job.reader)
    return Decided(plain, split, rows, chosen, provenance(prepared, job, common, rows, chosen))


def solve_quantize(
    prepared: Prepared,
    job: QuantizeJob,
    common: Common,
    clock: Clock,
    folder: Path,
    tell: Callable[[Widths], None] = lambda chosen: None,
) -> Codes:
    """Chooses widths and solves codes into ``folder``, where they stay."""
    from moezip.pipeline.solved import Solved, job_digest

    decided = decide_widths(prepared, job, common, clock, folder, prepared.reads_text)
    tell(decided.chosen)
    model, rows, packing = prepared.model, decided.rows, decided.chosen.packing
    solved = Solved(
        folder,
        job_digest(decided.split.fingerprint, packing, decided.made_by, None if rows is None else rows.fingerprint()),
    )
    solved.begin(common.resume)
    with clock.stage("solve"):
        solve_all(
            prepared, decided.plain, decided.split, rows if prepared.layerwise else None, packing, solved, common
        )  # fmt: skip
    reports = {file.stem: solved.report(file.stem) for file in sorted(folder.glob("*.safetensors"))}
    grids = {name: Grid.parse(text) for each in reports.values() for name, text in each.grids.items()}
    plan = replace(decided.split.plan, made_by=decided.made_by, packing={name: grids[name] for name in packing})
    packed = Packed(decided.split, plan.packing, LayerFiles(folder))
    notes = list(notes_of(prepared, reports, decided.chosen.left))
    if any(model.architecture.claim(name, model.source.config).kind == "extra" for name in model.source.names()):
        notes.append("the multi-token-prediction layers were dropped")
    if job.texts and not prepared.reads_text:
        notes.append(f"{prepared.method.name} reads no text: --data was not used")
    about = About(prepared.method.name, model, job.reader, decided.chosen.nats)
    return Codes(about, plan, packed, solved, reports, decided.chosen, tuple(notes))


def forget_work(folder: Path) -> None:
    """Removes prices and statistics of a finished run, and its work folders if nothing else is in them."""
    from moezip.pipeline.bits import forget_prices

    forget_prices(folder)
    forget(folder.parent)
    remove_if_empty(folder)
    remove_if_empty(folder.parent)


def choose(
    prepared: Prepared,
    job: QuantizeJob,
    plain: Source,
    split: Applied | Merged,
    rows: Rows | None,
    folder: Path,
    common: Common,
) -> Widths:
    """Who gets how many bits; passes over the text where prices are needed."""
    from moezip.pipeline.widths import planned

    if job.planned:
        assert job.plan is not None
        return planned(job.plan, split)
    return chooser(prepared, job, plain, split, rows, folder, common).choose()


def chooser(
    prepared: Prepared,
    job: QuantizeJob,
    plain: Source,
    split: Applied | Merged,
    rows: Rows | None,
    folder: Path,
    common: Common,
) -> Chooser:
    from moezip.pipeline.widths import Chooser

    items = items_of(split, prepared.model)
    return Chooser(
        prepared.model, plain, split, split.plan, items, prepared.wanted, texts=job.texts, rows=rows,
        solve=prepared.solve if prepared.layerwise else None, solver=f"{prepared.method.name} {prepared.params}",
        gate=prepared.gate, prior=prepared.prior, folder=folder, common=common,
    )  # fmt: skip


def views(model: Opened, plan: Plan | None = None, values: Values | None = None) -> tuple[Source, Applied | Merged]:
    """Plain tensors as the family stores them, and the same with one tensor per expert and matrix.

    Args:
        plan: seen through this plan. values: its solved values.

    Raises:
        PlanError: the plan is for another checkpoint, or stores factors.
    """
    plain = decoded(model.source)
    if plan is None:
        whole = replace(Plan.identity(model.source.fingerprint, model.architecture.name, model.facts), mtp="drop")
        return plain, Applied(plain, whole, split=True)
    plan = replace(plan, mtp="drop", packing={})
    if plan.factors:
        raise PlanError(
            "factors of matrices cannot be quantized", next="merge without factors, or leave them as they are"
        )
    if plan.merges:
        block = block_size(model.source.config)
        return (Merged(plain, plan, values, block=block), Merged(plain, plan, values, split=True, block=block))
    return Applied(plain, plan), Applied(plain, plan, split=True)


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_rows(model: Opened, job: QuantizeJob, common: Common) -> Rows:
    """The calibration text in windows."""
    from moezip.calibrate.data import default_seq_len, load_rows, tokenizer_of

    common.watch(Progress("read text", 0, 1, "steps"))
    tokenizer = tokenizer_of(model.source.folder)
    rows = load_rows(job.texts, tokenizer, common.seq_len or default_seq_len(model.source.config))
    common.watch(Progress("read text", 1, 1, "steps"))
    return rows


def provenance(
    prepared: Prepared, job: QuantizeJob, common: Common, rows: Rows | None, chosen: Widths
) -> dict[str, Any]:
    """Who chose the codes, for the plan's reader."""
    made_by: dict[str, Any] = {
        "version": __version__,
        "method": prepared.method.name,
        "paper": prepared.method.paper,
        "bits": job.bits,
        "size": job.size,
        "allocate": prepared.wanted.allocate,
        "granularity": job.granularity,
        "group_size": prepared.wanted.group,
        "settings": {**asdict(prepared.params), **asdict(prepared.wanted.storage), **asdict(prepared.wanted.params)},
        **chosen.facts,
        "seed": common.seed,
    }
    if chosen.nats is not None:
        made_by["predicted_nats"] = chosen.nats
    if job.plan is not None:
        made_by["chosen_by"] = job.plan.made_by
    if rows is not None:
        made_by["seq_len"] = rows.ids.shape[1]
        made_by["domains"] = [
            {"name": name, "tokens": rows.tokens(name), "data": [rows.fingerprint(name)]}
            for name in dict.fromkeys(rows.domains)
        ]
    return made_by


def solve_all(
    prepared: Prepared,
    plain: Source,
    split: Source,
    rows: Rows | None,
    packing: Packing,
    solved: Any,
    common: Common,
) -> None:
    """Codes for every matrix of ``packing``, into the work folder.

    Args:
        plain: the model that is streamed. split: the same, one tensor per expert and matrix.
    """
    solve = prepared.solve
    if rows is None:
        from moezip.pipeline.layerwise import solve_free

        solve_free(split, packing, solve, solved, common.watch)
        return
    from moezip.calibrate.stream import Stream
    from moezip.pipeline.layerwise import Layerwise

    stream = Stream(plain, device=common.device, max_memory=common.max_memory, spill=solved.folder)
    Layerwise(
        stream,
        rows,
        packing,
        solve,
        solved,
        original=prepared.wanted.storage.inputs == "original",
        gate=prepared.gate,
        prior=prepared.prior,
        watch=common.watch,
        spill=solved.folder,
    ).run()


def notes_of(prepared: Prepared, reports: Mapping[str, LayerReport], left: Sequence[str]) -> Iterator[str]:
    """What the user should know about the codes."""
    basis: dict[str, int] = {}
    for each in reports.values():
        for name, count in each.basis.items():
            basis[name] = basis.get(name, 0) + count
    if prepared.layerwise:
        if basis.get("pooled"):
            yield f"{basis['pooled']} matrices of experts that no token reached were solved on all tokens' inputs"
        if basis.get("none"):
            yield f"{basis['none']} matrices had no inputs at all and were rounded to nearest"
        raised = sum(each.raised for each in reports.values())
        if raised:
            yield f"{raised} matrices needed more damping than was asked for"
    if left:
        group = prepared.wanted.group
        yield f"{len(left)} matrices stay as they are, as groups of {group} do not divide them: {left[0]}, ..."

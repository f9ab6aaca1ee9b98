"""``moezip quantize``: who gets how many bits, which codes, and what they are written as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.arch.experts import decoded
from moezip.arch.packing import Packing
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError, PlanError, UsageError
from moezip.export.stock import tensor_bytes, write_checkpoint
from moezip.formats.packed import Grid
from moezip.pipeline.calibrate import require_files, work_folder
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_output
from moezip.plan.plan import Plan
from moezip.progress import Progress
from moezip.quantize.settings import UNPACKED, StorageParams
from moezip.registry import Method, lookup, parse_params
from moezip.report.report import Report, peak_rss_bytes

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText, Rows
    from moezip.pipeline.layerwise import LayerReport
    from moezip.plan.packed import Packed

GROUPS = (128, 64, 32)
WORK = "quantize"
LEAST_OTHERS = 4


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What ``moezip quantize`` was asked for.

    Attributes:
        bits: of the codes (uniform), or stored bits per weight. group: weights that share a scale; None for the
            largest that fits.
        settings: ``--set`` texts, of the storage and of the solver.
        texts: calibration text by domain, if the solver needs it.
    """

    bits: float
    solver: str = "gptq"
    allocate: str = "uniform"
    group: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[DomainText] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A quantize job whose every option has been checked, before any text or weight is read."""

    model: Opened
    method: Method
    params: Any
    storage: StorageParams
    group: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a quantization ended with."""

    plan: Plan
    report: Report
    layers: Mapping[str, LayerReport]


def prepare_quantize(checkpoint: str, job: QuantizeJob, common: Common) -> Prepared:
    """Raises UsageError, PlanError, CheckpointError or ArchitectureError for everything that can be known now."""
    from moezip.quantize import METHODS

    method = lookup(job.solver, {entry.name: entry for entry in METHODS}, "solver")
    params, storage = split_settings(method, job.settings)
    model = opened(checkpoint)
    if job.allocate == "uniform" and (job.bits != int(job.bits) or not 1 <= job.bits <= 8):
        raise UsageError(
            f"{job.bits:g} bits cannot be given to every weight", where=f"--bits {job.bits:g}",
            next="use a whole number from 1 to 8, or let the widths differ: --allocate lp or pmq",
        )  # fmt: skip
    if method.schedule == "layerwise" and not job.texts:
        raise UsageError(
            f"{method.name} needs calibration text",
            next="give --data PATH (text of the domain that the model must stay good at), or --solver rtn",
        )
    require_files(job.texts)
    return Prepared(model, method, params, storage, group_size(model.facts, job.group))


def split_settings(method: Method, settings: Mapping[str, str]) -> tuple[Any, StorageParams]:
    """``--set`` texts as the solver's knobs and the storage's. Raises UsageError for a key of neither."""
    stored = {f.name for f in dataclasses.fields(StorageParams)}
    own = {f.name for f in dataclasses.fields(method.params)}
    for key in settings:
        lookup(key, dict.fromkeys(stored | own), f"setting of quantize --solver {method.name}")
    storage = replace(method, params=StorageParams)
    return (
        parse_params(method, {key: text for key, text in settings.items() if key in own}),
        parse_params(storage, {key: text for key, text in settings.items() if key in stored}),
    )


def group_size(facts: Sequence[LayerFacts], asked: int | None) -> int:
    """The largest of 128, 64 and 32 that divides both inner sizes, unless one is asked for.

    Raises:
        UsageError: none does, or the one that is asked for does not.
    """
    sizes = {size for fact in facts for size in (fact.hidden, fact.width)}
    if asked is not None:
        if asked < 0 or (asked and any(size % asked for size in sizes)):
            raise UsageError(
                f"groups of {asked} do not divide the experts' sizes {sorted(sizes)}", where=f"--group-size {asked}",
                next=f"use one of {[g for g in GROUPS if not any(size % g for size in sizes)]}, or 0 for one scale per "
                "output channel",
            )  # fmt: skip
        return asked
    for group in GROUPS:
        if not any(size % group for size in sizes):
            return group
    raise UsageError(
        f"no group of {', '.join(map(str, GROUPS))} divides the experts' sizes {sorted(sizes)}",
        next="use --group-size 0: one scale per output channel",
    )


# -- who gets how many bits ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A matrix that can be packed.

    Attributes:
        name: on disk. kind: ``gate``, ``up``, ``down`` of an expert, else ``attention``, ``shared``, ``dense``, ``head``.
        shape: [R, C]. layer, expert: where it is, None where that means nothing.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    layer: int | None = None
    expert: int | None = None


def items_of(source: Source, model: Opened) -> list[Item]:
    """Every matrix that can be packed, in the order of the source: experts', and other linears of decoder layers."""
    from torch import nn

    from moezip.arch.skeleton import Skeleton

    entry = model.architecture
    skeleton = Skeleton(source)
    skeleton.require_complete()
    moe = {fact.layer for fact in model.facts}
    linears: dict[str, tuple[str, int | None]] = {}
    head = skeleton.model.get_output_embeddings()
    for path, module in skeleton.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        fills = skeleton.fills.get(f"{path}.weight", [])
        if len(fills) != 1 or fills[0].tensor is not None:
            continue
        if module is head:
            linears[fills[0].name] = ("head", None)
            continue
        inside = path.removeprefix(f"{entry.layers}.")
        if inside == path or module.out_features == 1:
            continue
        number, _, rest = inside.partition(".")
        layer = int(number)
        if rest.startswith(f"{entry.block}."):
            own = rest.removeprefix(f"{entry.block}.")
            if layer in moe and own.split(".")[0] in (entry.router_module, entry.experts_module):
                continue
            linears[fills[0].name] = ("shared" if layer in moe else "dense", layer)
        else:
            linears[fills[0].name] = ("attention", layer)
    found = []
    for name in source.names():
        claim = entry.claim(name, source.config)
        shape = source.spec(name).shape
        if name in linears:
            kind, at = linears[name]
            found.append(Item(name, kind, (shape[0], shape[1]), at))
        elif claim.kind == "expert" and not claim.suffix and len(shape) == 2:
            assert claim.tensor is not None
            found.append(Item(name, claim.tensor.role, (shape[0], shape[1]), claim.layer, claim.expert))  # type: ignore[union-attr]
    return found


def uniform(items: Sequence[Item], bits: int, group: int, storage: StorageParams) -> tuple[dict[str, Grid], list[str]]:
    """The same width for every expert, and what the settings say for the rest; names left out because no group fits."""
    packing: dict[str, Grid] = {}
    left: list[str] = []
    for item in items:
        own = bits if item.expert is not None else others_bits(item.kind, bits, storage)
        if own == UNPACKED:
            continue
        if group and item.shape[1] % group:
            left.append(item.name)
            continue
        packing[item.name] = Grid(own, group, storage.symmetric, storage.scale, storage.double)
    return packing, left


def others_bits(kind: str, bits: int, storage: StorageParams) -> int:
    """Bits of a linear that is no expert's."""
    asked: int = getattr(storage, kind)
    return asked or max(bits, LEAST_OTHERS)


# -- the command --------------------------------------------------------------------------------------------


def quantize_command(checkpoint: str, out: Path, job: QuantizeJob, common: Common) -> Outcome:
    """``moezip quantize``: choose widths, solve layer by layer, write, verify."""
    from moezip.pipeline.layerwise import Solved, job_digest
    from moezip.plan.packed import LayerFiles, Packed

    clock = Clock()
    prepared = prepare_quantize(checkpoint, job, common)
    model = prepared.model
    refuse_output(out, model.source.folder, common)
    plain = decoded(model.source)
    with clock.stage("plan"):
        packing, left = uniform(items_of(plain, model), int(job.bits), prepared.group, prepared.storage)
    rows = read_rows(model, job, common) if prepared.method.schedule == "layerwise" else None
    folder = (common.workdir or work_folder(out)) / WORK
    made_by = provenance(prepared, job, common, rows)
    solved = Solved(folder, job_digest(model.source.fingerprint, packing, made_by, None if rows is None else rows.fingerprint()))
    solved.begin(common.resume)
    with clock.stage("solve"):
        solve_all(prepared, plain, rows, packing, solved, common)
    reports = {file.stem: solved.report(file.stem) for file in sorted(folder.glob("*.safetensors"))}
    grids = {name: Grid.parse(text) for each in reports.values() for name, text in each.grids.items()}
    base = Plan.identity(model.source.fingerprint, model.architecture.name, model.facts)
    plan = replace(base, made_by=made_by, packing={name: grids[name] for name in packing})
    packed = Packed(plain, plan.packing, LayerFiles(folder))
    report = write_packed(prepared, plan, packed, out, common, clock, notes_of(prepared, reports, left))
    solved.clear()
    remove_if_empty(folder.parent)
    return Outcome(plan, report, reports)


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


def provenance(prepared: Prepared, job: QuantizeJob, common: Common, rows: Rows | None) -> dict[str, Any]:
    """Who chose the codes, for the plan's reader."""
    made_by: dict[str, Any] = {
        "version": __version__,
        "method": prepared.method.name,
        "paper": prepared.method.paper,
        "bits": job.bits,
        "allocate": job.allocate,
        "group_size": prepared.group,
        "settings": {**asdict(prepared.params), **asdict(prepared.storage)},
        "seed": common.seed,
    }
    if rows is not None:
        made_by["seq_len"] = rows.ids.shape[1]
        made_by["domains"] = [
            {"name": name, "tokens": rows.tokens(name), "data": [rows.fingerprint(name)]}
            for name in dict.fromkeys(rows.domains)
        ]
    return made_by


def solve_all(
    prepared: Prepared, plain: Source, rows: Rows | None, packing: Packing, solved: Any, common: Common
) -> None:
    """Codes for every matrix of ``packing``, into the work folder."""
    solve: Callable[..., Any] = partial(_solve, prepared.method, prepared.params)
    if rows is None:
        from moezip.pipeline.layerwise import solve_free

        solve_free(plain, packing, solve, solved, common.watch)
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
        original=prepared.storage.inputs == "original",
        gate=getattr(prepared.params, "gate", False),
        prior=getattr(prepared.params, "prior", 1.0),
        watch=common.watch,
        spill=solved.folder,
    ).run()


def _solve(method: Method, params: Any, weight: Any, hessian: Any, grid: Grid) -> Any:
    return method.run(weight, hessian, grid, params)


def write_packed(
    prepared: Prepared, plan: Plan, packed: Packed, out: Path, common: Common, clock: Clock, notes: Sequence[str]
) -> Report:
    """Writes the packed checkpoint; its report."""
    source = prepared.model.source
    finished: list[Report] = []
    before = clock.seconds

    def report() -> str:
        stages = {**clock.stages, "write": clock.seconds - before}
        finished.append(
            Report(
                out=str(out),
                bytes_before=tensor_bytes(source),
                bytes_after=tensor_bytes(packed),
                bits_per_weight=bits_per_weight(packed),
                experts_before=[fact.experts for fact in prepared.model.facts],
                experts_after=[len(layer.picks) for layer in plan.layers],
                predicted_nats=None,
                predicted_nats_reason="there is no price without gradients: use --allocate lp",
                seconds=clock.seconds,
                peak_rss_bytes=peak_rss_bytes(),
                stages=stages,
                method=prepared.method.name,
                settings=plan.made_by["settings"],
                source=str(source.folder),
                statistics={each["name"]: each["tokens"] for each in plan.made_by.get("domains", [])},
                stock=False,
                notes=list(notes),
            )
        )
        return finished[-1].to_json()

    with clock.stage("write"):
        write_checkpoint(
            packed, plan, out, report=report, command=common.command, overwrite=common.overwrite, watch=common.watch
        )
    return replace(
        finished[-1], seconds=clock.seconds, stages=dict(clock.stages), peak_rss_bytes=peak_rss_bytes()
    )  # fmt: skip


def bits_per_weight(packed: Packed) -> float:
    """Stored bits for each weight of the packed matrices: codes, scales, zeros and padding counted."""
    shapes = {name: packed.base.spec(name).shape for name in packed.packing}
    stored = sum(8 * grid.nbytes(*shapes[name]) for name, grid in packed.packing.items())
    return stored / sum(rows * columns for rows, columns in shapes.values())


def notes_of(prepared: Prepared, reports: Mapping[str, LayerReport], left: Sequence[str]) -> Iterator[str]:
    """What the user should know about the codes."""
    basis: dict[str, int] = {}
    for each in reports.values():
        for name, count in each.basis.items():
            basis[name] = basis.get(name, 0) + count
    if prepared.method.schedule == "layerwise":
        if basis.get("pooled"):
            yield f"{basis['pooled']} matrices of experts that no token reached were solved on the layer's pooled inputs"
        if basis.get("none"):
            yield f"{basis['none']} matrices had no inputs at all and were rounded to nearest"
        raised = sum(each.raised for each in reports.values())
        if raised:
            yield f"{raised} matrices needed more damping than was asked for"
    if left:
        yield f"{len(left)} matrices whose rows no group of {prepared.group} divides were left as they are: {left[0]}, ..."

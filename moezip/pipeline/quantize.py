"""``moezip quantize``: who gets how many bits, which codes, and what they are written as."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip import __version__
from moezip.arch.experts import decoded
from moezip.arch.families import identify
from moezip.arch.layout import tripwire_of
from moezip.arch.packing import Packing
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import PlanError, UsageError
from moezip.export.stock import tensor_bytes, with_source_card, write_checkpoint
from moezip.formats.packed import Grid
from moezip.pipeline.calibrate import require_files, work_folder
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_output
from moezip.plan.apply import Applied
from moezip.plan.packed import LayerFiles, Packed
from moezip.plan.plan import Plan
from moezip.progress import Progress
from moezip.quantize.settings import UNPACKED, StorageParams, split_settings
from moezip.registry import Method, lookup
from moezip.report.report import Report, peak_rss_bytes

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText, Rows
    from moezip.pipeline.layerwise import LayerReport

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
        plan: quantize what this plan makes of the checkpoint; None for the checkpoint itself.
    """

    bits: float
    solver: str = "gptq"
    allocate: str = "uniform"
    group: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[DomainText] = ()
    plan: Plan | None = None


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

    @property
    def widths(self) -> dict[str, int]:
        """How many matrices are on each grid, widest first."""
        return grid_counts(self.plan.packing)


@dataclass(frozen=True, slots=True)
class QuantizeEstimate:
    """What a quantization would do; nothing was read but headers.

    Attributes:
        widths: matrices by grid. seconds, memory_bytes: rough; ``assumes`` says on what.
        disk_bytes: what waits in the work folder until the output is written.
    """

    solver: str
    matrices: int
    widths: dict[str, int]
    group: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    assumes: str


def grid_counts(packing: Packing) -> dict[str, int]:
    """How many matrices are on each grid, widest first."""
    counts: dict[str, int] = {}
    for grid in sorted(packing.values(), key=lambda grid: (-grid.bits, str(grid))):
        counts[str(grid)] = counts.get(str(grid), 0) + 1
    return counts


def prepare_quantize(checkpoint: str, job: QuantizeJob, common: Common) -> Prepared:
    """Raises UsageError, PlanError, CheckpointError or ArchitectureError for everything that can be known now."""
    from moezip.quantize import METHODS
    from moezip.quantize.settings import scale_dtype

    method = lookup(job.solver, {entry.name: entry for entry in METHODS}, "solver")
    params, storage = split_settings(method, job.settings)
    model = opened(checkpoint)
    storage = replace(storage, scale=scale_dtype(storage, model.source.config))
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
        name: on disk.
        kind: ``gate``, ``up``, ``down`` of an expert, else ``attention``, ``shared``, ``dense`` or ``head``.
        shape: [R, C]. layer, expert: where it is, None where that means nothing.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    layer: int | None = None
    expert: int | None = None


def items_of(source: Source, model: Opened) -> list[Item]:
    """Every matrix that can be packed, in the order of the source: experts', and other linears of decoder layers.

    Args:
        source: plain tensors, one per expert and matrix.
    """
    from torch import nn

    from moezip.arch.skeleton import Skeleton

    entry = identify(source.config, source.folder)
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
    found, trip = [], tripwire_of(entry, source.config)
    for name in source.names():
        if name == trip:
            continue
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

    clock = Clock()
    prepared = prepare_quantize(checkpoint, job, common)
    model = prepared.model
    refuse_output(out, model.source.folder, common)
    plain, split = views(model, job.plan)
    with clock.stage("plan"):
        packing, left = uniform(items_of(split, model), int(job.bits), prepared.group, prepared.storage)
    rows = read_rows(model, job, common) if prepared.method.schedule == "layerwise" else None
    folder = (common.workdir or work_folder(out)) / WORK
    made_by = provenance(prepared, job, common, rows)
    solved = Solved(
        folder, job_digest(split.fingerprint, packing, made_by, None if rows is None else rows.fingerprint())
    )
    solved.begin(common.resume)
    with clock.stage("solve"):
        solve_all(prepared, plain, split, rows, packing, solved, common)
    reports = {file.stem: solved.report(file.stem) for file in sorted(folder.glob("*.safetensors"))}
    grids = {name: Grid.parse(text) for each in reports.values() for name, text in each.grids.items()}
    plan = replace(split.plan, made_by=made_by, packing={name: grids[name] for name in packing})
    packed = Packed(split, plan.packing, LayerFiles(folder))
    notes = list(notes_of(prepared, reports, left))
    report = write_packed(About(prepared.method.name, model), plan, packed, out, common, clock, notes)
    solved.clear()
    remove_if_empty(folder.parent)
    return Outcome(plan, report, reports)


# What a solver's arithmetic runs at against bf16 products: float32, factorizations, short rows.
SOLVER_SLOWDOWN = 8
DISK_BYTES_PER_SECOND = 1e9  # a plain SSD


def estimate_quantize(checkpoint: str, job: QuantizeJob, common: Common) -> QuantizeEstimate:
    """``moezip quantize --dry-run``: reads no data and writes nothing."""
    from moezip.pipeline.estimate import matmul_rate
    from moezip.report.overview import overview

    prepared = prepare_quantize(checkpoint, job, common)
    model = prepared.model
    split = views(model, job.plan)[1]
    items = items_of(split, model)
    packing, _ = uniform(items, int(job.bits), prepared.group, prepared.storage)
    chosen = [item for item in items if item.name in packing]
    stored = sum(packing[item.name].nbytes(*item.shape) for item in chosen)
    weights = sum(item.shape[0] * item.shape[1] for item in chosen)
    before = sum(split.spec(item.name).bytes for item in chosen)
    seen = overview(model.source)
    layerwise = prepared.method.schedule == "layerwise"
    tokens = sum(text.tokens for text in job.texts) if layerwise else 0
    rate = matmul_rate()
    flops = 0.0
    if layerwise:
        share = {fact.layer: fact.top_k / fact.experts for fact in model.facts}
        flops = 3 * tokens * 2 * seen.active_parameters
        for item in chosen:
            rows, columns = item.shape
            reached = tokens * (share[item.layer] if item.expert is not None and item.layer is not None else 1.0)
            flops += SOLVER_SLOWDOWN * (2 * reached * columns**2 + columns**3 + 6 * rows * columns**2)
    hidden = tokens * seen.hidden * 2
    memory = 600 * 2**20 + seen.largest_layer_bytes + 2 * hidden + stored // max(seen.layers, 1)
    return QuantizeEstimate(
        solver=prepared.method.name,
        matrices=len(chosen),
        widths=grid_counts(packing),
        group=prepared.group,
        bytes_before=tensor_bytes(model.source),
        bytes_after=tensor_bytes(split) - before + stored,
        bits_per_weight=8 * stored / weights,
        tokens=tokens,
        seconds=flops / rate + (seen.bytes + 2 * stored) / DISK_BYTES_PER_SECOND + 6,
        memory_bytes=min(memory, common.max_memory or memory),
        disk_bytes=stored,
        assumes=f"{rate / 1e9:.0f} GFLOP/s (measured now), disk 1 GB/s, 6 s to start",
    )


def views(model: Opened, plan: Plan | None = None) -> tuple[Source, Applied]:
    """Plain tensors as the family stores them, and the same with one tensor per expert and matrix.

    Args:
        plan: seen through this plan.

    Raises:
        PlanError: the plan is for another checkpoint, or has packed matrices already.
    """
    plain = decoded(model.source)
    if plan is None:
        whole = replace(Plan.identity(model.source.fingerprint, model.architecture.name, model.facts), mtp="drop")
        return plain, Applied(plain, whole, split=True)
    if plan.packing:
        raise PlanError("the plan has packed matrices already", next="use a plan that only chooses experts or neurons")
    plan = replace(plan, mtp="drop")
    return Applied(plain, plan), Applied(plain, plan, split=True)


def apply_packed(model: Opened, plan: Plan, plan_file: Path, out: Path, common: Common, clock: Clock) -> Report:
    """A saved plan with packed matrices: the codes are those of the checkpoint that the plan lies in.

    Raises:
        PlanError: the plan file lies in no checkpoint, or in one with other codes.
    """
    folder = plan_file.resolve().parent.parent
    if plan_file.name != "plan.json" or not (folder / "config.json").is_file():
        raise PlanError(
            "the plan names grids, and the codes on them are in the checkpoint that it was written with",
            where=plan_file,
            next="name the moezip/plan.json inside that checkpoint",
        )
    split = Applied(decoded(model.source), plan, split=True)
    with Checkpoint.open(folder) as values:
        packed = Packed(split, plan.packing, values)
        about = About(str(plan.made_by.get("method", "a saved plan")), model)
        return write_packed(about, plan, packed, out, common, clock, [])


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
    solve: Callable[..., Any] = partial(_solve, prepared.method, prepared.params)
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
        original=prepared.storage.inputs == "original",
        gate=getattr(prepared.params, "gate", False),
        prior=getattr(prepared.params, "prior", 1.0),
        watch=common.watch,
        spill=solved.folder,
    ).run()


def _solve(method: Method, params: Any, weight: Any, hessian: Any, grid: Grid) -> Any:
    return method.run(weight, hessian, grid, params)


@dataclass(frozen=True, slots=True)
class About:
    """Whose codes are written."""

    method: str
    model: Opened


def write_packed(
    about: About, plan: Plan, packed: Packed, out: Path, common: Common, clock: Clock, notes: Sequence[str]
) -> Report:
    """Writes the packed checkpoint; its report."""
    source = about.model.source
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
                experts_before=[layer.experts for layer in plan.layers],
                experts_after=[len(layer.picks) for layer in plan.layers],
                predicted_nats=None,
                predicted_nats_reason="there is no price without gradients: use --allocate lp",
                seconds=clock.seconds,
                peak_rss_bytes=peak_rss_bytes(),
                stages=stages,
                method=about.method,
                settings=plan.made_by.get("settings", {}),
                source=str(source.folder),
                statistics={each["name"]: each["tokens"] for each in plan.made_by.get("domains", [])},
                stock=False,
                form="moezip",
                notes=list(notes),
            )
        )
        return finished[-1].to_json()

    with clock.stage("write"):
        write_checkpoint(
            packed,
            plan,
            out,
            text=card_of(about, plan, packed),
            report=report,
            command=common.command,
            overwrite=common.overwrite,
            watch=common.watch,
        )
    return replace(
        finished[-1], seconds=clock.seconds, stages=dict(clock.stages), peak_rss_bytes=peak_rss_bytes()
    )  # fmt: skip


def card_of(about: About, plan: Plan, packed: Packed) -> str:
    """The model card of a packed checkpoint."""
    lines = [
        f"Made by moezip {__version__}, solver `{about.method}`: {len(plan.packing)} matrices are stored in "
        f"{bits_per_weight(packed):.2f} bits per weight, scales and zeros counted. Which, and on what text they were "
        "solved, is in `moezip/plan.json`; sizes and timings are in `moezip/report.json`.",
        "",
        "It loads with moezip installed:",
        "",
        "```python",
        "import moezip",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
    ]
    return with_source_card(packed.folder, f"{about.model.architecture.name}, quantized", lines)


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
            yield f"{basis['pooled']} matrices of experts that no token reached were solved on all tokens' inputs"
        if basis.get("none"):
            yield f"{basis['none']} matrices had no inputs at all and were rounded to nearest"
        raised = sum(each.raised for each in reports.values())
        if raised:
            yield f"{raised} matrices needed more damping than was asked for"
    if left:
        yield f"{len(left)} matrices stay as they are, as groups of {prepared.group} do not divide them: {left[0]}, ..."

"""The command line: words in, words out. What a command does is in ``moezip.pipeline``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moezip import __version__, console
from moezip.console import results
from moezip.errors import MoezipError, UsageError

if TYPE_CHECKING:
    from moezip.pipeline import Common
    from moezip.progress import Watch


class _Interrupted(Exception):
    """Ctrl-C, which is its cause. Under its own name it would be swallowed by typer, and the advice with it."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Interrupted from stop


app = typer.Typer(
    name="moezip",
    cls=_Commands,
    help="Makes Mixture-of-Experts checkpoints small: measures experts on your text, keeps those that matter, writes a "
    "checkpoint that stock loaders read. Streams models larger than memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Ckpt = Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint folder, or the word demo.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Text: .txt, .jsonl or a folder of them. One path is one domain; repeat for several."),
]
Tokens = Annotated[int, typer.Option("--tokens", min=2, help="Calibration tokens, shared over the domains.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", min=2, help="Window in tokens. Default min(2048, the model's maximum).")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; repeat for several.")]
Device = Annotated[str, typer.Option("--device", help="Where layers are computed, one at a time: cpu, cuda, ...")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", help="Ceiling of the process, such as 8GiB. Default 80% of what is free.")
]
Workdir = Annotated[Path | None, typer.Option("--workdir", help="Where interrupted work waits. Default beside OUT.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run of the same command.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The only source of chance.")]
For = Annotated[
    str | None,
    typer.Option("--for", metavar="READER", help="Who must read OUT: transformers, vllm, sglang, llamacpp or moezip."),
]
Json = Annotated[bool, typer.Option("--json", help="Data as JSON on stdout, talk on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no talk.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"moezip {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


def size_of(text: str | None, option: str = "--max-memory") -> int | None:
    """Bytes from ``8GiB``, ``500MB`` or a plain number. Raises UsageError for anything else."""
    if text is None:
        return None
    units = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9,
             "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # fmt: skip
    number = text.strip().rstrip("bBiIkKmMgG")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        count = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count <= 0:
        raise UsageError(f"{text!r} is no size", where=option, next="write it like 8GiB, 500MB or 1073741824")
    return count


def share_or_size(text: str | None) -> float | None:
    """Bytes from ``6GiB``, or a share of 1 from ``40%``. Raises UsageError for anything else."""
    if text is None or not text.strip().endswith("%"):
        return size_of(text, "--size")
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"{text!r} is no share of the source", where="--size", next="write it like 40%, or like 6GiB")
    return share


def settings_of(texts: Sequence[str] | None) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dict. Raises UsageError for one without ``=``, or a key given twice."""
    settings: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is no setting", where=f"--set {text}", next="write --set KEY=VALUE")
        if key in settings:
            raise UsageError(f"the setting {key} is given twice", where=f"--set {text}", next="give it once")
        settings[key] = value
    return settings


def _common(watch: Watch, **options: Any) -> Common:
    from moezip.pipeline import Common

    max_memory = size_of(options.pop("max_memory", None))
    command = shlex.join(["moezip", *sys.argv[1:]])
    return Common(watch=watch, max_memory=max_memory, command=command, **options)


# -- looking ------------------------------------------------------------------------------------------------


@app.command()
def inspect(checkpoint: Ckpt, as_json: Json = False, debug: Debug = False) -> None:
    """What a checkpoint is: architecture, experts, sizes, what would fit. Reads headers only."""
    from moezip.pipeline import opened
    from moezip.report.overview import overview

    seen = overview(opened(checkpoint).source)
    if as_json:
        console.data(seen.to_json())
        return
    results.show_overview(checkpoint, seen)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, explained.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The compression methods, from the program's own table."""
    from moezip.merge import METHODS as MERGING
    from moezip.prune import METHODS, PROFILES
    from moezip.quantize import METHODS as SOLVERS
    from moezip.registry import lookup

    every = (*METHODS, *MERGING, *PROFILES, *SOLVERS)
    if name is not None:
        results.explain(lookup(name, {method.name: method for method in every}, "method"), as_json)
        return
    if as_json:
        console.data([results.method_facts(method) for method in every])
        return
    rows = [(m.name, m.family, "text" if m.reads_text else "none", m.summary, m.paper) for m in every]
    console.table("", ("method", "family", "data", "what it does", "source"), rows)


@app.command()
def architectures(as_json: Json = False, debug: Debug = False) -> None:
    """The model families that moezip knows, from its own table."""
    from moezip.arch.families import ARCHITECTURES

    rows = [
        {"model_type": entry.name, "scoring": entry.scoring, "groups": bool(entry.group_keys), "notes": entry.notes}
        for entry in ARCHITECTURES.values()
    ]
    if as_json:
        console.data(rows)
    else:
        columns = ("model_type", "scoring", "groups", "notes")
        console.table(
            "", columns, [[("yes" if row[c] else "no") if c == "groups" else row[c] for c in columns] for row in rows]
        )


@app.command("kernels")
def kernels_command(as_json: Json = False, debug: Debug = False) -> None:
    """Which compiled kernels run here, or why none, and whether each computes what its numpy twin does."""
    from dataclasses import asdict

    from moezip import kernels
    from moezip.kernels.selfcheck import examine

    status = kernels.status()
    examined = examine(status)
    if as_json:
        console.data({**asdict(status), "checks": {one.isa: asdict(one) for one in examined}})
    elif not examined:
        console.say(f"numpy: {status.why}; {kernels.COST}")
    else:
        rows = [
            (one.isa, "yes" if one.isa == status.isa else "", f"{one.passed} of {one.passed + len(one.failed)}",
             f"{1e3 * one.seconds:.2f} ms")
            for one in examined
        ]  # fmt: skip
        console.table(status.library or "", ("instruction set", "in use", "checks passed", "GPTQ of 256 x 512"), rows)
        for one in examined:
            for what in one.failed:
                console.say(f"{one.isa}: {what} differs from numpy's")
    if any(one.failed for one in examined):
        raise typer.Exit(1)


@app.command()
def verify(checkpoint: Ckpt, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Proves a checkpoint complete: every tensor that the config implies, once, finite, checksums right."""
    from moezip.export.verify import verify as find
    from moezip.pipeline import open_checkpoint

    folder = open_checkpoint(checkpoint).folder
    findings = find(folder, deep=True)
    if as_json:
        console.data({"ok": not findings, "findings": [{"what": f.what, "where": f.where} for f in findings]})
    elif findings:
        console.table("", ("where", "what is wrong"), [(f.where, f.what) for f in findings])
    else:
        console.say(f"{folder}: complete and sound", quiet)
    if findings:
        raise typer.Exit(1)


# -- doing --------------------------------------------------------------------------------------------------


@app.command()
def calibrate(
    checkpoint: Ckpt,
    data: Data = None,
    out: Annotated[Path, typer.Option("--out", help="The statistics file to make.")] = Path("statistics.safetensors"),
    tokens: Tokens = 65_536,
    seq_len: SeqLen = None,
    record: Annotated[
        list[str] | None,
        typer.Option("--record", help="Only these statistics. METHOD:KEY=VALUE,... adds a method's own. Default all."),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Runs text through the model once, layer by layer, and saves what its experts did."""
    from moezip.pipeline import calibrate_command

    if not data:
        raise UsageError("calibrate needs text", next="give --data PATH, once per domain")
    with console.watching(quiet) as watch:
        common = _common(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len,
        )  # fmt: skip
        result = calibrate_command(checkpoint, data, out, common, tokens, record)
    if as_json:
        console.data(result)
    elif not quiet:
        domains = ", ".join(f"{name} {count:,}" for name, count in result["domains"].items())
        console.say(f"{out}: {result['tokens']:,} tokens ({domains}) in {console.duration(result['seconds'])}")
        results.say_unrouted(result["unrouted"])
        results.say_super_experts(result["super_experts"])


@app.command()
def prune(
    checkpoint: Ckpt,
    out: Out,
    method: Annotated[str, typer.Option("--method", "-m", help="See `moezip methods`.")] = "easy-ep",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Experts kept in each layer.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the experts removed.")] = None,
    data: Data = None,
    stats: Annotated[Path | None, typer.Option("--stats", help="Saved statistics, in place of --data.")] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="layer: as many experts in every layer. model: ranked over all layers.")
    ] = "layer",
    reader: For = None,
    settings: Set = None,
    tokens: Tokens = 65_536,
    seq_len: SeqLen = None,
    save_stats: Annotated[Path | None, typer.Option("--save-stats", help="Keep the statistics for later.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; touch nothing.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write the plan to OUT, and no weights.")] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keeps the experts that matter for your text and writes a smaller stock checkpoint."""
    from moezip.calibrate.data import domains_of
    from moezip.pipeline import PruneJob, prune_command
    from moezip.pipeline import dry_run as estimate

    texts = domains_of(data, tokens) if data else ()
    job = PruneJob(method, keep, ratio, settings_of(settings), texts, stats, scope=scope, reader=reader)
    with console.watching(quiet) as watch:
        common = _common(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        if dry_run:
            results.show_estimate(estimate(checkpoint, job, common), as_json)
            return
        outcome = prune_command(checkpoint, out, job, common, plan_only=plan_only, save_stats=save_stats)
    results.show_outcome(outcome, out, as_json, quiet)


@app.command()
def merge(
    checkpoint: Ckpt,
    out: Out,
    method: Annotated[str, typer.Option("--method", "-m", help="See `moezip methods`.")] = "m-smoe",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Experts left in each layer.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the experts merged away.")] = None,
    data: Data = None,
    stats: Annotated[Path | None, typer.Option("--stats", help="Saved statistics, in place of --data.")] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="layer: as many experts in every layer. model: layers differ.")
    ] = "layer",
    reader: For = None,
    settings: Set = None,
    tokens: Tokens = 65_536,
    seq_len: SeqLen = None,
    save_stats: Annotated[Path | None, typer.Option("--save-stats", help="Keep the statistics for later.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; touch nothing.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write the plan to OUT, and no weights.")] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Makes several experts into one: fewer experts, none of them simply gone."""
    from moezip.calibrate.data import domains_of
    from moezip.pipeline.merge import MergeJob, merge_command
    from moezip.pipeline.merge_estimate import estimate_merge

    texts = domains_of(data, tokens) if data else ()
    job = MergeJob(method, keep, ratio, settings_of(settings), texts, stats, scope=scope, reader=reader)
    with console.watching(quiet) as watch:
        common = _common(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        if dry_run:
            results.show_estimate(estimate_merge(checkpoint, job, common), as_json)
            return
        outcome = merge_command(checkpoint, out, job, common, plan_only=plan_only, save_stats=save_stats)
    results.show_outcome(outcome, out, as_json, quiet)


@app.command()
def quantize(
    checkpoint: Ckpt,
    out: Out,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Bits of the codes; with lp, outlier and block stored bits per weight."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Size of the output instead, such as 6GiB, or 40% of the source's.")
    ] = None,
    solver: Annotated[str, typer.Option("--solver", help="gptq (needs text) or rtn; see `moezip methods`.")] = "gptq",
    allocate: Annotated[
        str,
        typer.Option(
            "--allocate",
            help="uniform: one width. lp: the least predicted loss for the size. pmq: MC-MoE's. outlier, block: "
            "QuantMoE-Bench's.",
        ),
    ] = "uniform",
    granularity: Annotated[
        str, typer.Option("--granularity", help="What shares a width with lp: role (a matrix), expert, layer, model.")
    ] = "role",
    reader: For = None,
    group: Annotated[
        int | None,
        typer.Option("--group-size", help="Weights that share a scale. Default the largest of 128, 64, 32 that fits."),
    ] = None,
    data: Data = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="A plan (of --plan-only): quantize what it makes of CKPT, in its widths if it has any."
        ),
    ] = None,
    settings: Set = None,
    tokens: Tokens = 65_536,
    seq_len: SeqLen = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; touch nothing.")] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Choose widths, write the plan to OUT, solve nothing.")
    ] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Stores weights in 1 to 8 bits, layer by layer, each layer making up for what rounding did before it."""
    from moezip.calibrate.data import domains_of
    from moezip.pipeline.prune import saved_plan
    from moezip.pipeline.quantize import QuantizeJob, quantize_command
    from moezip.pipeline.quantize_estimate import estimate_quantize

    texts = domains_of(data, tokens) if data else ()
    with saved_plan(plan) as (loaded, values), console.watching(quiet) as watch:
        job = QuantizeJob(
            bits, solver, allocate, share_or_size(size), granularity, reader, group=group,  # type: ignore[arg-type]
            settings=settings_of(settings), texts=texts, plan=loaded, values=values,
        )  # fmt: skip
        common = _common(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        if dry_run:
            results.show_quantize_estimate(estimate_quantize(checkpoint, job, common), as_json)
            return
        tell = (lambda chosen: None) if quiet or as_json else results.tell_widths
        outcome = quantize_command(checkpoint, out, job, common, tell, plan_only=plan_only)
    results.show_quantized(outcome, out, as_json, quiet)


@app.command()
def skip(
    checkpoint: Ckpt,
    out: Out,
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            help="naee: drop an expert whose gate is small beside the token's best. odp: the same, but tokens that "
            "matter keep all. otp: a small trained network per layer decides.",
        ),
    ] = "odp",
    data: Data = None,
    settings: Set = None,
    tokens: Tokens = 65_536,
    seq_len: SeqLen = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; touch nothing.")] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Has a model skip experts as it runs, token by token; the rule goes into its config, weights stay as they are."""
    from moezip.calibrate.data import domains_of
    from moezip.console.skip import show_skip, show_skip_estimate
    from moezip.pipeline.skip import SkipJob, estimate_skip, skip_command

    job = SkipJob(rule, settings_of(settings), domains_of(data, tokens) if data else ())
    if dry_run:
        show_skip_estimate(estimate_skip(checkpoint, job), as_json)
        return
    with console.watching(quiet) as watch:
        common = _common(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        report = skip_command(checkpoint, out, job, common)
    show_skip(report, as_json, quiet)


@app.command()
def apply(
    checkpoint: Ckpt,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out: Out,
    reader: For = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Carries out a saved plan: the same bytes again, with no data."""
    from moezip.pipeline import apply_command

    with console.watching(quiet) as watch:
        outcome = apply_command(checkpoint, plan, out, _common(watch, overwrite=overwrite), reader)
    results.show_outcome(outcome, out, as_json, quiet)


@app.command()
def export(
    checkpoint: Ckpt,
    out: Out,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="safetensors (plain numbers), compressed-tensors or gptq.")
    ],
    reader: For = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Writes a quantized checkpoint in the format of another reader; no weight changes."""
    from moezip.console.export import show_export
    from moezip.pipeline.export import export_command

    with console.watching(quiet) as watch:
        report = export_command(checkpoint, out, to, reader, _common(watch, overwrite=overwrite))
    show_export(report, as_json, quiet)


@app.command()
def evaluate(
    checkpoint: Ckpt,
    against: Annotated[
        str | None, typer.Option("--against", help="A reference checkpoint, usually the source.")
    ] = None,
    data: Data = None,
    tasks: Annotated[list[Path] | None, typer.Option("--tasks", help="Questions: .jsonl or a folder of them.")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="At most this many per file. Default all.")
    ] = None,
    seq_len: SeqLen = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measures a checkpoint, streamed: loss on text, divergence from a reference, task accuracy."""
    from moezip.pipeline import evaluate_command

    with console.watching(quiet) as watch:
        common = _common(watch, device=device, max_memory=max_memory, workdir=workdir, seq_len=seq_len)
        result = evaluate_command(
            checkpoint, common, against=against, data=data or (), tasks=tasks or (), tokens=tokens
        )
    if as_json:
        console.data(result.to_json())
        return
    results.show_evaluation(result)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.yaml.")],
    only: Annotated[str | None, typer.Option("--only", help="One job, and what it needs.")] = None,
    settings: Set = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Runs a batch of jobs from a recipe; finished ones are skipped, interrupted ones go on."""
    from moezip.pipeline.batch import run_recipe
    from moezip.recipe import load

    loaded = load(recipe, settings_of(settings))
    with console.watching(quiet) as watch:
        found = run_recipe(loaded, _common(watch, device=device, max_memory=max_memory, workdir=workdir), only)
    results.show_jobs(found, as_json, quiet)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for what the demo makes.")] = Path(
        "moezip-demo"
    ),
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The main job on a small trained model that comes with the package: calibrate, prune to half, measure."""
    from moezip import demo as shipped
    from moezip.pipeline.batch import run_recipe
    from moezip.recipe import load

    loaded = load(shipped.recipe(), {"output": str(out)})
    console.say("The demo model reads scripture, country profiles, Python and sums. Half of its 16 experts per layer "
                "go, once chosen for Python by EASY-EP, once by lot.", quiet or as_json)  # fmt: skip
    with console.watching(quiet) as watch:
        found = run_recipe(loaded, _common(watch, device=device))
    if as_json:
        results.show_jobs(found, as_json, quiet)
        return
    results.show_demo(found, loaded.calibration, out, quiet)


# -- tasks --------------------------------------------------------------------------------------------------

tasks_app = typer.Typer(
    help="Tasks and the experts that each needs: build the patterns once, then load the original checkpoint for one "
    "task alone, with `moezip.load(CKPT, patterns=PATTERNS, prompt=TEXT)`.",
    no_args_is_help=True,
)
app.add_typer(tasks_app, name="tasks")


@tasks_app.command("build")
def tasks_build(
    checkpoint: Ckpt,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME=DATA", help="A task and text of it; repeat for each, two at least."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The patterns file to make.")] = Path("patterns.json"),
    method: Annotated[str, typer.Option("--method", "-m", help="See `moezip methods`.")] = "tcess",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Experts kept per layer. Default half.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the experts removed.")] = None,
    settings: Set = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens in all, shared over the tasks.")] = 65_536,
    seq_len: SeqLen = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workdir: Workdir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Finds the experts of every task in one pass over their texts, and what a task's prompts look like."""
    from moezip.console.tasks import show_built
    from moezip.pipeline.tasks import TasksJob, build_tasks_command, task_texts

    job = TasksJob(task_texts(task, tokens), method, keep, ratio, settings_of(settings))
    with console.watching(quiet) as watch:
        common = _common(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        built = build_tasks_command(checkpoint, out, job, common)
    show_built(built, out, as_json, quiet)


@tasks_app.command("show")
def tasks_show(
    patterns: Annotated[Path, typer.Argument(metavar="PATTERNS", help="What `moezip tasks build` made.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The tasks of a patterns file: which experts they share, and how far apart their prompts are."""
    from moezip.console.tasks import facts, show_patterns
    from moezip.runtime.patterns import Patterns

    found = Patterns.load(patterns)
    if as_json:
        console.data(facts(found))
        return
    show_patterns(found)


# typer carries a click of its own in new versions and uses the installed one in old ones; either way a wrong command
# line is raised as this.
_Wrong: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """The ``moezip`` command. Exit codes: 0 done, 1 our error, 2 usage, 130 interrupted."""
    debug = "--debug" in sys.argv
    try:
        code = app(prog_name="moezip", standalone_mode=False)
    except MoezipError as error:
        if debug:
            raise
        console.fail(error)
        code = error.exit_code
    except _Wrong as error:
        error.show()
        code = 2
    except (_Interrupted, KeyboardInterrupt, typer.Abort) as stop:
        notes = getattr(stop.__cause__ or stop, "__notes__", [])
        console.say("\n".join(["interrupted: no half-written output was left", *notes]))
        code = 130
    except Exception as error:
        if debug:
            raise
        first = (str(error).splitlines() or [""])[0]
        console.fail(MoezipError(
            f"moezip met something that it does not foresee ({type(error).__name__}: {first})",
            next="the same command with --debug shows where; please report it",
        ))  # fmt: skip
        code = 1
    sys.exit(code or 0)

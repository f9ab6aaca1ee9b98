"""Commands that choose what becomes of the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moezip import console
from moezip.cli import complete
from moezip.cli.options import (
    Ckpt,
    Data,
    Debug,
    Device,
    For,
    Json,
    MaxMemory,
    Out,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    SeqLen,
    Set,
    Tokens,
    Workdir,
    common_of,
    settings_of,
)
from moezip.console import results
from moezip.sizes import share_or_size


def prune(
    checkpoint: Ckpt,
    out: Out,
    method: Annotated[
        str, typer.Option("--method", "-m", autocompletion=complete.pruning, help="See `moezip methods`.")
    ] = "easy-ep",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Experts kept in each layer.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the experts removed.")] = None,
    data: Data = None,
    stats: Annotated[Path | None, typer.Option("--stats", help="Saved statistics, in place of --data.")] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="layer: as many experts in every layer. model: ranked over all layers.")
    ] = "layer",
    reader: For = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Prune what this plan, of a merge, makes.")] = None,
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
    from moezip.pipeline.common import without_downloads
    from moezip.pipeline.plan_files import saved_plan

    texts = domains_of(data, tokens) if data else ()
    with saved_plan(plan) as (first, values), console.watching(quiet) as watch:
        job = PruneJob(
            method, keep, ratio, settings_of(settings), texts, stats, scope=scope, reader=reader, plan=first,
            values=values,
        )  # fmt: skip
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        if dry_run:
            with without_downloads():
                results.show_estimate(estimate(checkpoint, job, common), as_json)
            return
        outcome = prune_command(checkpoint, out, job, common, plan_only=plan_only, save_stats=save_stats)
    results.show_outcome(outcome, out, as_json, quiet)


def merge(
    checkpoint: Ckpt,
    out: Out,
    method: Annotated[
        str, typer.Option("--method", "-m", autocompletion=complete.merging, help="See `moezip methods`.")
    ] = "m-smoe",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Experts left in each layer.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the experts merged away.")] = None,
    data: Data = None,
    stats: Annotated[Path | None, typer.Option("--stats", help="Saved statistics, in place of --data.")] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="layer: as many experts in every layer. model: layers differ.")
    ] = "layer",
    reader: For = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Merge what this plan, of a prune, leaves.")] = None,
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
    """Makes several experts into one: fewer experts, none of them simply gone.

    The published averages lose most; `--set combine=neurons`, made of the experts' own neurons, loses least.
    """
    from moezip.calibrate.data import domains_of
    from moezip.pipeline.common import without_downloads
    from moezip.pipeline.merge import MergeJob, merge_command
    from moezip.pipeline.merge_estimate import estimate_merge
    from moezip.pipeline.plan_files import saved_plan

    texts = domains_of(data, tokens) if data else ()
    with saved_plan(plan) as (first, _), console.watching(quiet) as watch:
        job = MergeJob(method, keep, ratio, settings_of(settings), texts, stats, scope=scope, reader=reader, plan=first)
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        if dry_run:
            with without_downloads():
                results.show_estimate(estimate_merge(checkpoint, job, common), as_json)
            return
        outcome = merge_command(checkpoint, out, job, common, plan_only=plan_only, save_stats=save_stats)
    results.show_outcome(outcome, out, as_json, quiet)


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
    solver: Annotated[
        str,
        typer.Option(
            "--solver", autocompletion=complete.solvers, help="gptq (needs text) or rtn; see `moezip methods`."
        ),
    ] = "gptq",
    allocate: Annotated[
        str,
        typer.Option(
            "--allocate",
            autocompletion=complete.allocators,
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
    from moezip.pipeline.common import without_downloads
    from moezip.pipeline.plan_files import saved_plan
    from moezip.pipeline.quantize import QuantizeJob, quantize_command
    from moezip.pipeline.quantize_estimate import estimate_quantize

    texts = domains_of(data, tokens) if data else ()
    with saved_plan(plan) as (loaded, values), console.watching(quiet) as watch:
        job = QuantizeJob(
            bits, solver, allocate, share_or_size(size), granularity, reader, group=group,  # type: ignore[arg-type]
            settings=settings_of(settings), texts=texts, plan=loaded, values=values,
        )  # fmt: skip
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        if dry_run:
            with without_downloads():
                results.show_quantize_estimate(estimate_quantize(checkpoint, job, common), as_json)
            return
        tell = (lambda chosen: None) if quiet or as_json else results.tell_widths
        outcome = quantize_command(checkpoint, out, job, common, tell, plan_only=plan_only)
    results.show_quantized(outcome, out, as_json, quiet)


def skip(
    checkpoint: Ckpt,
    out: Out,
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            autocompletion=complete.rules,
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
    from moezip.pipeline.common import without_downloads
    from moezip.pipeline.skip import SkipJob, estimate_skip, skip_command

    job = SkipJob(rule, settings_of(settings), domains_of(data, tokens) if data else ())
    if dry_run:
        with without_downloads():
            show_skip_estimate(estimate_skip(checkpoint, job), as_json)
        return
    with console.watching(quiet) as watch:
        common = common_of(
            watch, device=device, max_memory=max_memory, workdir=workdir, resume=resume, overwrite=overwrite,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
        report = skip_command(checkpoint, out, job, common)
    show_skip(report, as_json, quiet)

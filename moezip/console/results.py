"""How results look: one function per command's outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from moezip import console

if TYPE_CHECKING:
    from moezip.pipeline import Estimate, Outcome
    from moezip.pipeline.batch import JobResult
    from moezip.pipeline.quantize import Outcome as QuantizeOutcome
    from moezip.pipeline.quantize_estimate import QuantizeEstimate
    from moezip.pipeline.widths import Widths
    from moezip.registry import Method
    from moezip.report.overview import Overview


READ_BY = {
    "stock": "transformers, vLLM and whatever reads the source",
    "moezip": "moezip.load, or transformers after `import moezip`",
    "mone": "vLLM 0.33 or later, moezip.load",
    "compressed-tensors": "vLLM and others that read compressed-tensors, moezip.load",
    "gptq": "whatever reads GPTQ checkpoints, moezip",
}


def show_overview(name: str, seen: Overview) -> None:
    """What a checkpoint is."""
    experts = sorted(set(seen.experts))
    console.pairs(
        name,
        {
            "architecture": f"{seen.architecture} ({seen.model_type})",
            "layers": f"{seen.layers}, {len(seen.moe_layers)} with experts",
            "experts": f"{', '.join(map(str, experts))} per layer, {seen.top_k} per token"
            + (f", routers choose among {seen.routed} (MoNE, for vLLM 0.33 or later)" if seen.routed else "")
            + (f", in {seen.groups} groups" if seen.groups > 1 else "")
            + (f", {seen.shared} shared" if seen.shared else ""),
            "parameters": f"{seen.parameters:,}, {seen.expert_parameters / seen.parameters:.0%} in experts, "
            f"{seen.active_parameters:,} used per token",
            "stored as": seen.dtype + (f" ({seen.quantization})" if seen.quantization else ""),
            **_quantized(seen),
            "size": f"{console.size(seen.bytes)}, experts {console.size(seen.expert_bytes)}",
            "memory to stream": f"about {console.size(seen.largest_layer_bytes + 600 * 2**20)} and the hidden states",
            **{f"size with {what}": console.size(count) for what, count in list(seen.fits.items())[1:]},
        },
    )
    _show_fits(seen.fits_in)


def _show_fits(found: Mapping[str, Any]) -> None:
    """Bytes at fewer bits and with fewer experts, and which memory of this machine holds them."""
    memory: Mapping[str, int] = found["memory"]
    names = [f"{name if name != 'ram' else 'memory'}, {console.size(size)}" for name, size in memory.items()]
    rows = [
        (
            f"{row['bits']:g} bits" + (", half the experts" if row["experts"] < 1 else ""),
            console.size(row["bytes"]),
            *("fits" if row["fits"][name] else "too big" for name in memory),
        )
        for row in found["choices"]
    ]
    title = f"fits in {found['room']:.0%} of this machine's memory (scales counted; embeddings and routers in 16 bits)"
    console.table(title, ("weights in", "size", *names), rows)


def _quantized(seen: Overview) -> dict[str, str]:
    if seen.bits_per_weight is None:
        return {}
    share = f"{seen.quantized_parameters / seen.parameters:.0%} of the weights in {seen.bits_per_weight:.2f} bits each"
    grids = ", ".join(f"{count} in {grid}" for grid, count in seen.grids.items())
    packed = f"; matrices: {grids}" if grids else ""
    return {"quantized": f"{share}, scales and zeros counted{packed}"}


def method_facts(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "family": method.family,
        "summary": method.summary,
        "paper": method.paper,
        "needs": list(method.reads(method.params())),
        "settings": {field.name: field.default for field in dataclasses.fields(method.params)},
    }


def explain(method: Method, as_json: bool) -> None:
    import inspect as source

    if as_json:
        console.data({**method_facts(method), "text": method.explanation})
        return
    console.out.print(method.explanation, markup=False)
    console.out.print("")
    settings = method_facts(method)["settings"]
    console.pairs("settings (--set KEY=VALUE)", settings)
    for owner in reversed(method.params.__mro__[:-1]):
        if owner.__doc__:
            console.out.print(source.cleandoc(owner.__doc__), markup=False)


def show_estimate(result: Estimate, as_json: bool) -> None:
    if as_json:
        console.data({"dry_run": True, **dataclasses.asdict(result)})
        return
    console.pairs(
        "nothing was touched",
        {
            "method": result.method,
            "experts": f"{result.keep} of {result.experts} stay in each of {result.moe_layers} layers",
            "size": f"{console.size(result.bytes_before)} to {console.size(result.bytes_after)} "
            f"({result.bytes_after / result.bytes_before:.0%})",
            "calibration": f"{result.tokens:,} tokens" if result.tokens else "none",
            **(
                {"probes": f"{result.probe_layer_tokens:,} tokens x layers (--set probes=0 leaves them away)"}
                if result.probe_layer_tokens
                else {}
            ),
            "time": f"about {console.duration(result.seconds)} ({result.assumes})",
            "memory": f"about {console.size(result.memory_bytes)}",
            "disk": "the output"
            + (f" and, while it runs, {console.size(result.disk_bytes)}" if result.disk_bytes else ""),
        },
    )
    if result.kept:
        console.table("kept", ("layer", "experts"), [(k, " ".join(map(str, v))) for k, v in result.kept.items()])


def _span(counts: Sequence[int]) -> str:
    """``16``, or ``12 to 20`` where layers differ."""
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def show_outcome(outcome: Outcome, out: Path, as_json: bool, quiet: bool) -> None:
    report = outcome.report
    if report is None:
        if as_json:
            console.data({"plan": str(out), "layers": {str(p.layer): list(p.kept) for p in outcome.plan.layers}})
        else:
            console.say(f"{out}: the plan; carry it out with `moezip apply CKPT {out} OUT`", quiet)
        return
    if as_json:
        console.data(dataclasses.asdict(report))
        return
    if quiet:
        return
    protected = "; ".join(f"layer {layer}: {', '.join(map(str, e))}" for layer, e in report.protected.items())
    console.pairs(
        str(out),
        {
            "experts": f"{_span(report.experts_after)} {'made of' if outcome.plan.merges else 'of'} "
            f"{_span(report.experts_before)} "
            f"in each of {len(report.experts_after)} layers",
            "size": f"{console.size(report.bytes_before)} to {console.size(report.bytes_after)} "
            f"({report.bytes_after / report.bytes_before:.0%}), {report.bits_per_weight:.2f} bits per weight",
            **({} if outcome.plan.merges and not protected else {"super experts kept": protected or "none found"}),
            "predicted rise of the loss": f"none: {report.predicted_nats_reason}"
            if report.predicted_nats is None
            else f"{report.predicted_nats:.4f} nats per token (to compare plans by, see moezip methods nats)",
            **({"its factors": show_factors(report.price_factors)} if report.price_factors else {}),
            "time": f"{console.duration(report.seconds)} ("
            + ", ".join(f"{name} {console.duration(seconds)}" for name, seconds in report.stages.items())
            + ")",
            "peak memory": console.size(report.peak_rss_bytes),
            "read by": READ_BY[report.form],
        },
    )
    for note in report.notes:
        console.say(f"note: {note}")
    say_unrouted(dict(report.unrouted), "weigh nothing in an average" if outcome.plan.merges else "rank last")
    console.say(f"measure it: moezip evaluate {quote(str(out))} --against {quote(report.source)} --data PATH")


def show_quantize_estimate(result: QuantizeEstimate, as_json: bool) -> None:
    if as_json:
        console.data({"dry_run": True, **dataclasses.asdict(result)})
        return
    console.pairs(
        "nothing was touched",
        {
            "solver": result.solver,
            "matrices": f"{result.matrices}: {show_widths(result.widths)}",
            "experts": f"{_span(result.experts)} in each of {len(result.experts)} layers",
            "group": f"{result.group} weights share a scale" if result.group else "one scale per output channel",
            "size": f"{console.size(result.bytes_before)} to {console.size(result.bytes_after)} "
            f"({result.bytes_after / result.bytes_before:.0%}), {result.bits_per_weight:.2f} bits per packed weight",
            "calibration": f"{result.tokens:,} tokens" if result.tokens else "none",
            "time": f"about {console.duration(result.seconds)} ({result.assumes})",
            "memory": f"about {console.size(result.memory_bytes)}",
            "disk": f"the output, and while it runs {console.size(result.disk_bytes)}",
        },
    )


def show_widths(widths: Mapping[str, int]) -> str:
    """``576 in int4-g32, 24 in int8-g32``."""
    return ", ".join(f"{count} in {grid}" for grid, count in widths.items())


def tell_widths(chosen: Widths) -> None:
    """The allocation, as soon as it is chosen."""
    if chosen.table is not None:
        console.table(f"{chosen.table.counted} by bits", chosen.table.head, chosen.table.rows)
    for line in chosen.lines:
        console.say(line)


def show_quantized(outcome: QuantizeOutcome, out: Path, as_json: bool, quiet: bool) -> None:
    report = outcome.report
    if report is None:
        if as_json:
            told = {"widths": outcome.widths, "predicted_nats": outcome.chosen.nats}
            console.data(
                {"plan": str(out), "layers": {str(p.layer): list(p.kept) for p in outcome.plan.layers}, **told}
            )
        else:
            console.say(f"{out}: the plan; solve its codes with `moezip quantize CKPT OUT --plan {out}`", quiet)
        return
    if as_json:
        console.data(dataclasses.asdict(report))
        return
    if quiet:
        return
    console.pairs(
        str(out),
        {
            "packed": show_widths(outcome.widths),
            "size": f"{console.size(report.bytes_before)} to {console.size(report.bytes_after)} "
            f"({report.bytes_after / report.bytes_before:.0%}), {report.bits_per_weight:.2f} bits per packed weight, "
            "scales and zeros counted",
            "predicted rise of the loss": "none"
            if report.predicted_nats is None
            else f"{report.predicted_nats:.4f} nats per token",
            "time": f"{console.duration(report.seconds)} ("
            + ", ".join(f"{name} {console.duration(seconds)}" for name, seconds in report.stages.items())
            + ")",
            "peak memory": console.size(report.peak_rss_bytes),
            "read by": READ_BY[report.form],
        },
    )
    for note in report.notes:
        console.say(f"note: {note}")
    console.say(f"measure it: moezip evaluate {quote(str(out))} --against {quote(report.source)} --data PATH")


def show_factors(factors: Mapping[str, Any]) -> str:
    """``experts x 1.62 (0.9 to 2.8 in 5 layers that tell by themselves), measured on a few``."""
    parts = []
    for kind, entry in factors.items():
        own = list(entry["layers"].values())
        inside = "no layer tells by itself"
        if own:
            inside = f"{min(own):.2g} to {max(own):.2g} in the {len(own)} layers that tell by themselves"
        parts.append(f"{kind} x {entry['pooled']:.2f} ({inside})")
    return "; ".join(parts) + ", from measured probes"


def say_unrouted(unrouted: dict[str, int], so: str = "rank last") -> None:
    if unrouted:
        console.say(
            f"{sum(unrouted.values())} experts in {len(unrouted)} layers saw no token; they {so}. "
            "More or wider text would tell them apart."
        )


def say_super_experts(profile: Mapping[str, Any] | None) -> None:
    if profile is None:
        return
    bars = f"the {profile['percentile']:g}th percentile {profile['above_percentile']:.3g} and a tenth of the largest, "
    bars += f"{profile['above_share']:.3g}"
    found = ", ".join(f"layer {e['layer']} expert {e['expert']} ({e['peak']:.3g})" for e in profile["found"])
    console.say(f"super experts: {found or 'none'}; largest |output| above {bars}")


def show_demo(found: Sequence[JobResult], chosen_for: Collection[str], out: Path, quiet: bool) -> None:
    """What the demo found, as the table that shows the point of the method."""
    by_job = {result.name: result.evaluations[0] for result in found}
    easy, chance = by_job["easy-ep"], by_job["random"]
    rows, rises = [], {}
    for name, entry in sorted(easy["by_file"].items(), key=lambda item: item[0] not in chosen_for):
        source, lot = easy["against"]["by_file"][name]["nll"], chance["by_file"][name]["nll"]
        rises[name] = (entry["nll"] - source, lot - source)
        label = f"{name} (chosen for)" if name in chosen_for else name
        numbers = (f"{source:.3f}", f"{entry['nll']:.3f}", f"{rises[name][0]:+.3f}", f"{lot:.3f}")
        rows.append((label, *numbers, f"{rises[name][1]:+.3f}"))
    console.table("held-out loss, nats per token", ("text", "source", "easy-ep", "rise", "random", "rise"), rows)
    packed = [result for result in found if result.name.endswith("int4")]
    if packed:
        by_size: list[tuple[str, ...]] = []
        for result in (next(r for r in found if r.name == "easy-ep"), *packed):
            assert result.report is not None
            every = [result.evaluations[0]["by_file"][name]["nll"] for name in rises]
            source = [result.evaluations[0]["against"]["by_file"][name]["nll"] for name in rises]
            changes = [f"{after - before:+.3f}" for after, before in zip(every, source, strict=True)]
            by_size.append((result.name, console.size(result.report["bytes_after"]), *changes))
        console.table("rise of the loss by size", ("job", "size", *rises), by_size)
    report = next(result.report for result in found if result.report)
    inside = max(rises[name][0] for name in chosen_for)
    outside = min(rises[name][0] for name in rises if name not in chosen_for)
    by_lot = min(lot for _, lot in rises.values())
    console.say(
        f"{console.size(report['bytes_before'])} became {console.size(report['bytes_after'])}. The text that the "
        f"experts were chosen for loses {inside:.2f} nats per token, other text {outside:.2f} or more; experts chosen "
        f"by lot lose {by_lot:.2f} or more.",
        quiet,
    )
    kept = out / "easy-ep"
    console.say(f"The pruned checkpoint is in {kept}; look at it with: moezip inspect {kept}", quiet)
    console.say("The same on your own: moezip prune CKPT OUT --ratio 0.5 --data your-text.jsonl", quiet)

"""How an evaluation looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moezip import console

if TYPE_CHECKING:
    from moezip.evaluate.confidence import Interval, Rise
    from moezip.evaluate.generation import Generation
    from moezip.evaluate.harness import Harness
    from moezip.evaluate.result import Evaluation
    from moezip.evaluate.routing import Routing
    from moezip.evaluate.speed import Speed


def show_evaluation(result: Evaluation) -> None:
    """Losses by text, routing, and tasks."""
    if result.by_file:
        columns = ("text", "loss", "perplexity", "tokens") + (
            ("reference", "rise [95 %]", "KL", "same top-1") if result.against else ()
        )
        rows = []
        for row in result.rows():
            cells: list[Any] = [row.name, f"{row.loss.nll:.4f}", f"{row.loss.perplexity:.2f}", f"{row.loss.tokens:,}"]
            if row.divergence is not None:
                reference = row.divergence
                cells += [f"{reference.nll:.4f}", _rise(reference.rise), f"{reference.kl:.4f}",
                          f"{reference.top1_agreement:.1%}"]  # fmt: skip
            rows.append(cells)
        console.table(f"loss in nats per token, windows of {result.seq_len}", columns, rows)
        if result.against is not None:
            _say_rise(result.against.rise)
    if result.routing is not None:
        _say_routing(result.routing)
    if result.tasks:
        compared = any(score.against is not None for score in result.tasks.values())
        columns = ("questions", "right [95 %]", "of") + (("reference", "lost", "won", "p") if compared else ())
        rows = []
        for name, score in result.tasks.items():
            cells = [name, f"{score.accuracy:.1%} {_span(score.interval, '.0%')}", score.n]
            if (pair := score.against) is not None:
                cells += [f"{pair.accuracy:.1%}", pair.lost, pair.won, f"{pair.p_value:.3f}"]
            rows.append(cells)
        console.table("tasks" + (" (lost, won: answered rightly by the reference alone, the model alone; p: McNemar)"
                                 if compared else ""), columns, rows)  # fmt: skip
    if result.lm_eval is not None:
        _show_harness(result.lm_eval)
    if result.generation is not None:
        _show_generation(result.generation)
    if result.speed is not None:
        _show_speed(result.speed)
    if result.skipped is not None:
        skipped = result.skipped
        console.say(f"{skipped.rule} skipped {skipped.share:.1%} of {sum(skipped.calls.values()):,} expert calls")


def _span(interval: Interval, form: str) -> str:
    return f"[{interval.low:{form}}, {interval.high:{form}}]"


def _rise(rise: Rise) -> str:
    """``+0.012 [0.004, 0.020]``."""
    return f"{rise.value:+.4f}" + ("" if rise.interval is None else f" {_span(rise.interval, '.4f')}")


def _say_rise(rise: Rise) -> None:
    if rise.interval is None:
        console.say("too few windows for a confidence interval: use more text, or a shorter --seq-len")
    elif not rise.significant:
        console.say("the rise over all texts is within chance (its 95 % interval holds 0)")


def _say_routing(routing: Routing) -> None:
    if routing.reason is not None:
        console.say(f"routing cannot be compared: {routing.reason}")
        return
    total = routing.total()
    told = {layer: found.agreed / found.possible for layer, found in routing.layers.items() if found.possible}
    if not told:
        return
    least = min(told, key=lambda layer: told[layer])
    by_layer = " ".join(f"{layer}:{share:.0%}" for layer, share in sorted(told.items()))
    console.say(
        f"routing: {total.remaining / total.asked:.1%} of the reference's choices can still be made, "
        f"{total.agreed / total.possible:.1%} of these are (least in layer {least}: {told[least]:.1%}); "
        f"by layer {by_layer}"
    )


def _show_harness(found: Harness) -> None:
    columns = ("task", "metric", "value") + (("reference",) if found.against is not None else ())
    rows = []
    for task, metrics in found.tasks.items():
        for metric, value in metrics.items():
            if not isinstance(value, int | float) or metric == "n" or "_stderr" in metric:
                continue
            rows.append((task, metric.removesuffix(",none"), f"{value:.4f}"))
            if found.against is not None:
                rows[-1] += (f"{found.against[task][metric]:.4f}",)  # type: ignore[assignment]
    how = "in memory" if found.mode == "memory" else "streamed"
    console.table(f"lm-eval {found.version}, {how}", columns, rows)


def _show_generation(found: Generation) -> None:
    rows = []
    for who, one in (("model", found), ("reference", found.against)):
        if one is None:
            continue
        for how, written in (("greedy", one.greedy), ("sampled", one.sampled)):
            distinct = " ".join(f"{share:.2f}" for share in written.distinct)
            rows.append((who, how, f"{written.repetition:.1%}", distinct, f"{written.length:.1f}",
                         f"{written.ended:.0%}", f"{written.loops:.0%}"))  # fmt: skip
    columns = ("who", "how", "repeated 4-grams", "distinct-1 -2 -3", "length", "ended", "loops")
    title = f"{found.prompts} texts of at most {found.new_tokens} tokens after {found.prompt_tokens} of the documents"
    console.table(title, columns, rows)
    if found.loops:
        beside = "" if found.against is None else f", {found.against.greedy.loops:.0%} of the reference's"
        console.say(f"the model loops: {found.greedy.loops:.0%} of its greedy continuations end in a loop{beside}")


def _show_speed(found: Speed) -> None:
    ours, theirs, ratios = found.model.to_json(), found.reference.to_json(), found.ratios()
    words = {
        "prefill": f"prefill of {found.prefill_tokens} tokens, tokens/s",
        "decode": f"decode of {found.decode_tokens} tokens, tokens/s",
        "resident": "memory, loaded",
        "prefill_peak": "memory, prefill",
        "decode_peak": "memory, decode",
    }
    rows = []
    for (name, said), mine, other in zip(words.items(), ours.values(), theirs.values(), strict=True):
        cells = [
            "-" if value is None else console.size(value) if said.startswith("memory") else f"{value:,.1f}"
            for value in (mine, other)
        ]
        ratio = ratios[name]
        rows.append((said, *cells, "-" if ratio is None else f"{ratio:.2f}"))
    console.table(f"speed, medians of {found.rounds} rounds in turns", ("what", "model", "reference", "ratio"), rows)

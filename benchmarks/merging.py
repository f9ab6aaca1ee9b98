"""Merging against pruning at equal bytes: loss by domain, tasks, predicted and measured rise.

    python benchmarks/merging.py CKPT --calib calib --heldout heldout --tasks tasks

One calibration with gradients over all files of ``calib``; merging that looks at the layers again does so on the same
text. Every plan leaves the same number of experts in each layer, or as many neurons' worth, and is measured as a view;
sizes are those of its tensors. Prints, per plan, megabytes, held-out loss and its rise, the mean accuracy over
the tasks, and the predicted rise where there is one; rises by domain; and the rank correlation of predictions and
measurements. One calibration set, one seed, one run. Markdown. With ``--stats``, ``--json`` and ``--minutes`` the work
can be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

DENSE = "all experts"
# label, method, settings, scope. ``router`` is said wherever it is part of the comparison: ``remap`` (all rows, moezip
# reads it), ``dominant`` and ``sum`` (one row each, stock).
MERGES: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("m-smoe, all rows", "m-smoe", {"router": "remap"}, "layer"),
    ("m-smoe, dominant's row", "m-smoe", {"router": "dominant"}, "layer"),
    ("m-smoe, fitted row", "m-smoe", {"router": "sum"}, "layer"),
    ("m-smoe over the model, all rows", "m-smoe", {"router": "remap"}, "model"),
    ("m-smoe, least squares, all rows", "m-smoe", {"combine": "least-squares", "router": "remap"}, "layer"),
    ("m-smoe, least squares, fitted row", "m-smoe", {"combine": "least-squares", "router": "sum"}, "layer"),
    ("m-smoe, neurons, all rows", "m-smoe", {"combine": "neurons", "router": "remap"}, "layer"),
    ("m-smoe, neurons, dominant's row", "m-smoe", {"combine": "neurons", "router": "dominant"}, "layer"),
    ("m-smoe, neurons, fitted row", "m-smoe", {"combine": "neurons", "router": "sum"}, "layer"),
    ("m-smoe over the model, neurons, all rows", "m-smoe", {"combine": "neurons", "router": "remap"}, "model"),
    ("hc-smoe, all rows", "hc-smoe", {"router": "remap"}, "layer"),
    ("hc-smoe, all rows, neurons as they lie", "hc-smoe", {"router": "remap", "align": "none"}, "layer"),
    ("hc-smoe, fitted row", "hc-smoe", {"router": "sum"}, "layer"),
    ("sub-moe, all rows", "sub-moe", {"router": "remap"}, "layer"),
    ("sub-moe, fitted row", "sub-moe", {"router": "sum"}, "layer"),
    ("sub-moe over 2 layers, all rows", "sub-moe", {"router": "remap"}, "model"),
    ("sub-moe, rank 0.8, all rows", "sub-moe", {"router": "remap", "rank": "0.8"}, "layer"),
    ("dern", "dern", {}, "layer"),
    ("mc-smoe, all rows", "mc-smoe", {"router": "remap"}, "layer"),
    ("mc-smoe, 300 steps, all rows", "mc-smoe", {"router": "remap", "steps": "300"}, "layer"),
)
PRUNES: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("reap", "reap", {}, "layer"),
    ("easy-ep", "easy-ep", {}, "layer"),
    ("heapr", "heapr", {}, "layer"),
    ("nats over the model", "nats", {}, "model"),
    ("random", "random", {}, "layer"),
)


# Those that answer the questions: the best stock form of each method, and the best that moezip alone reads.
ANSWER = (
    DENSE, "m-smoe, fitted row", "m-smoe, least squares, fitted row", "m-smoe, neurons, fitted row",
    "m-smoe, neurons, all rows", "hc-smoe, all rows", "sub-moe, all rows", "sub-moe, rank 0.8, all rows", "dern",
    "mc-smoe, all rows", "reap", "easy-ep", "heapr",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, help="folder of questions")
    parser.add_argument("--keep", type=int, nargs="+", default=[24, 16, 8])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=2_048, help="of each held-out file")
    parser.add_argument("--questions", type=int, default=50, help="of each task file, the first ones")
    parser.add_argument("--answering", action="store_true", help="only the plans that answer questions")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="plans whose label holds one of these words")
    parser.add_argument("--stats", type=Path, metavar="FILE", help="statistics: taken from there, or left there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there; what is there is not redone")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no plan after that; go on with --json")
    given = parser.parse_args()

    from moezip.calibrate.data import domains_of
    from moezip.calibrate.statistics import Statistics
    from moezip.evaluate.loss import evaluate
    from moezip.export.readers import planned
    from moezip.export.stock import tensor_bytes
    from moezip.pipeline import Common, PruneJob, make_plan, opened, prepare_prune, run_calibration
    from moezip.pipeline.merge import MergeJob, make_merge_plan, passing, prepare_merge
    from moezip.plan.packed import LayerFiles

    calib = sorted(given.calib.iterdir()) if given.calib.is_dir() else [given.calib]
    texts, common, model = domains_of(calib, given.tokens), Common(seq_len=given.seq_len), opened(given.checkpoint)

    def wanted(plans: Any) -> list[Any]:
        return [plan for plan in plans if not given.only or any(word in plan[0] for word in given.only)]

    merges, prunes = wanted(MERGES), wanted(PRUNES)
    if given.answering:
        merges, prunes = ([plan for plan in plans if plan[0] in ANSWER] for plans in (merges, prunes))

    def merging(method: str, settings: dict[str, str], scope: str, keep: int) -> tuple[Any, Any]:
        if method == "mc-smoe":
            # halfway between all experts and those kept, and then so thin that the bytes are the same
            left = (keep + model.facts[0].experts) // 2
            keep, settings = left, {**settings, "share": str(keep / left)}
        if method != "dern":  # whose experts are partly gone: it has no price
            settings = {**settings, "price": "true"}
        job = MergeJob(method, keep=keep, settings=settings, texts=texts, scope=scope)
        return job, prepare_merge(given.checkpoint, job, common)

    record = {"gradients": None}
    for _, method, settings, scope in merges:
        record.update(dict.fromkeys(passing(merging(method, settings, scope, given.keep[0])[1])["record"]))
    start = begun = time.perf_counter()
    if given.stats is not None and given.stats.is_file():
        stats = Statistics.load(given.stats)
    else:
        with tempfile.TemporaryDirectory() as work:
            stats = run_calibration(model, texts, common, record=list(record), workdir=Path(work) / "w", probes=3)
        measure.say(f"calibration: {stats.tokens:,} tokens in {time.perf_counter() - begun:.1f} s")
        if given.stats is not None:
            stats.save(given.stats)

    shorter = tempfile.TemporaryDirectory()  # goes when the process does
    tasks: list[Path] = []
    for file in sorted(given.tasks.glob("*.jsonl")) if given.tasks else ():
        tasks.append(Path(shorter.name) / file.name)
        tasks[-1].write_text("".join(file.read_text().splitlines(keepends=True)[: given.questions]))

    def measured(view: Any, label: str) -> Any:
        answers = tasks if label in ANSWER else []
        return evaluate(view, data=[given.heldout], tasks=answers, tokens=given.heldout_tokens, seq_len=given.seq_len)

    values: list[dict[str, Any]] = []
    if given.json is not None and given.json.is_file():
        values = json.loads(given.json.read_text())["merging"]

    def add(label: str, keep: int, view: Any, plan: Any, seconds: float) -> None:
        found = measured(view, label)
        values.append({
            "keep": keep, "plan": label, "bytes": tensor_bytes(view), "loss": found.loss.nll,
            "tokens": found.loss.tokens, "losses": {name: loss.nll for name, loss in found.by_file.items()},
            "predicted": plan.made_by.get("predicted_nats") if plan is not None else None,
            "tasks": {name: score.accuracy for name, score in found.tasks.items()}, "seconds": seconds,
        })  # fmt: skip
        measure.save(given.json, {"merging": values})  # of hours of work, all that is done
        measure.say(f"{keep} {label}: {found.loss.nll:.4f}")

    def done(label: str, keep: int) -> bool:
        return time.perf_counter() - start > 60 * given.minutes or any(
            (value["plan"], value["keep"]) == (label, keep) for value in values
        )

    if not values:
        add(DENSE, 0, model.source, None, 0.0)
    for keep in given.keep:
        for label, method, settings, scope in merges:
            if done(label, keep):
                continue
            job, prepared = merging(method, settings, scope, keep)
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as work:
                plan, solved, _ = make_merge_plan(prepared, job, stats, common, Path(work) / "w")
                seconds = time.perf_counter() - begun
                add(label, keep, planned(model.source, plan, None, LayerFiles(solved.folder)), plan, seconds)
        for label, method, settings, scope in prunes:
            if done(label, keep):
                continue
            asked: dict[str, Any] = {"keep": keep}
            if method == "heapr":
                asked = {"ratio": 1 - keep / model.facts[0].experts}
            pruning = PruneJob(method, settings=settings, scope=scope, **asked)
            begun = time.perf_counter()
            plan = make_plan(prepare_prune(given.checkpoint, pruning, common), pruning, stats, common)
            add(label, keep, planned(model.source, plan), plan, time.perf_counter() - begun)
    show(values, given.keep, [plan[0] for plan in (*merges, *prunes)], {plan[0] for plan in merges})


def show(values: list[dict[str, Any]], keeps: list[int], labels: list[str], merged: set[str]) -> None:
    """The table, in the order of the plans, and how well predictions rank."""
    from scipy.stats import spearmanr

    by_plan = {(value["keep"], value["plan"]): value for value in values}
    dense = by_plan[0, DENSE]

    def accuracy(value: dict[str, Any]) -> str:
        return f"{sum(value['tasks'].values()) / len(value['tasks']):.3f}" if value["tasks"] else "-"

    def rises(value: dict[str, Any]) -> dict[str, float]:
        return {name: loss - dense["losses"][name] for name, loss in value["losses"].items()}

    print(f"dense: loss {dense['loss']:.4f} over {dense['tokens']:,} tokens, tasks {accuracy(dense)}, "
          f"{dense['bytes'] / 1e6:.2f} MB\n")  # fmt: skip
    rows, domains = [], []
    found = [by_plan[keep, label] for keep in keeps for label in labels if (keep, label) in by_plan]
    for value in found:
        each, predicted = rises(value), value["predicted"]
        rows.append((str(value["keep"]), value["plan"], f"{value['bytes'] / 1e6:.2f}", f"{value['loss']:.4f}",
                     f"{value['loss'] - dense['loss']:+.4f}", accuracy(value),
                     "-" if predicted is None else f"{predicted:+.4f}", f"{value['seconds']:.1f}"))  # fmt: skip
        domains.append((str(value["keep"]), value["plan"], *(f"{rise:+.3f}" for rise in each.values())))
    print(measure.table(("experts", "plan", "MB", "loss", "rise", "tasks", "predicted", "s"), rows))
    print("\nrise by domain\n")
    print(measure.table(("experts", "plan", *dense["losses"]), domains))
    for name, some in (("merges", [v for v in found if v["plan"] in merged]), ("all plans", found)):
        told = [v for v in some if v["predicted"] is not None]
        if len(told) > 2:
            rank = spearmanr([v["predicted"] for v in told], [v["loss"] for v in told]).statistic
            print(f"\nrank correlation of predicted and measured rises, {name} ({len(told)}): {rank:.3f}")


if __name__ == "__main__":
    main()

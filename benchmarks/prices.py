"""What removing a share of the experts' weights costs, predicted and measured, by method and share.

    python benchmarks/prices.py CKPT --calib calib/python.jsonl --heldout heldout

One streamed forward and backward pass over the calibration text; every plan is made from its statistics and measured as
a view, so that no checkpoint is written. At one ratio all plans remove the same number of expert weights (neurons or
whole experts), so their checkpoints have the same size but for the routers' rows. Prints, per plan, the predicted rise
of the loss on the calibration domain, bare and corrected by measured probes, beside the measured one on held-out text
of that domain, the mean rise over all held-out texts, Spearman's rank correlation of predicted and measured, and the
median of measured over predicted, by what the plans remove. Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure

PLANS: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("heapr, over the model", "heapr", {}, "layer"),
    ("heapr, per layer", "heapr", {"rank": "layer"}, "layer"),
    ("heapr, one width", "heapr", {"uniform": "true"}, "layer"),
    ("heapr exact, over the model", "heapr", {"fisher": "exact"}, "layer"),
    ("nats, over the model", "nats", {}, "model"),
    ("nats, per layer", "nats", {}, "layer"),
    ("easy-ep", "easy-ep", {}, "layer"),
    ("reap", "reap", {}, "layer"),
    ("tcess fixed", "tcess", {}, "layer"),
    ("tcess as coded", "tcess", {"form": "coded", "top": "1"}, "layer"),
    ("random", "random", {}, "layer"),
)


# A rise below this, in nats per token, is about as large as its own noise and has no ratio to speak of.
LEAST_RISE = 0.001


def median_ratios(values: list[dict[str, Any]], key: str) -> str:
    """Median of measured over predicted rises: all plans, those of experts, those of neurons."""
    found = []
    for name, kinds in (("all", (False, True)), ("experts", (False,)), ("neurons", (True,))):
        own = [v for v in values if v["measured"] >= LEAST_RISE and v["plan"].startswith("heapr") in kinds]
        ratios = [v["measured"] / v[key] for v in own]
        found.append(f"{name} {measure.median(ratios):.2f} of {len(own)}" if own else f"{name} -")
    return ", ".join(found)


def losses(source: Any, texts: list[Path], given: argparse.Namespace) -> dict[str, float]:
    from moezip.evaluate.loss import evaluate

    found = evaluate(source, data=texts, tokens=given.windows * given.seq_len, seq_len=given.seq_len)
    return {name: loss.nll for name, loss in found.by_file.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text of one domain")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of text to measure on")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens")
    parser.add_argument("--windows", type=int, default=16, help="windows measured per text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--labels", choices=("data", "model"), default="data")
    parser.add_argument("--probes", type=int, default=3, help="measured probes per layer and kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from scipy.stats import spearmanr

    from moezip.calibrate.data import domains_of, text_files
    from moezip.pipeline import Common, PruneJob, make_plan, opened, prepare_prune, run_calibration
    from moezip.plan.apply import Applied
    from moezip.plan.factors import fit
    from moezip.plan.price import predicted_nats
    from moezip.prune import METHODS

    texts, domain = text_files(given.heldout), given.calib.stem
    model, common = opened(given.checkpoint), Common(seq_len=given.seq_len)
    own = {method.name: method for method in METHODS}["tcess"].records
    assert own is not None
    prepared = [
        prepare_prune(given.checkpoint, PruneJob("tcess", ratio=0.2, settings=settings), common).params
        for _, method, settings, _ in PLANS
        if method == "tcess"
    ]
    record = ["gradients", *(entry.name for params in prepared for entry in own(params))]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        stats = run_calibration(
            model, domains_of([given.calib], given.tokens), common, record=record, workdir=Path(work) / "w",
            labels=given.labels, probes=given.probes,
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    dense = losses(model.source, texts, given)
    average = sum(dense.values()) / len(dense)
    print(f"{stats.tokens:,} tokens of {domain}, labels {given.labels}; forward, backward and {len(stats.probes)} "
          f"probes in {seconds:.1f} s; dense {dense[domain]:.4f} on {domain}, {average:.4f} on average\n")  # fmt: skip
    factors = fit(stats.probes).to_json()
    for kind, entry in factors.items():
        listed = ", ".join(f"{layer}: {factor:.2f}" for layer, factor in entry["layers"].items())
        print(f"{kind} x {entry['pooled']:.2f} (by layer {listed})\n")
    rows, values = [], []
    for ratio in given.ratios:
        for label, method, settings, scope in PLANS:
            job = PruneJob(method, ratio=ratio, settings=settings, scope=scope)
            plan = make_plan(prepare_prune(given.checkpoint, job, common), job, stats, common)
            found = losses(Applied(model.source, plan), texts, given)
            bare, predicted = predicted_nats(plan, stats.domains, {}), plan.made_by["predicted_nats"]
            rise = found[domain] - dense[domain]
            everywhere = sum(found.values()) / len(found) - average
            measure.say(f"{ratio:.0%} {label}")
            shown = (f"{bare:.4f}", f"{predicted:.4f}", f"{rise:+.4f}", f"{everywhere:+.4f}")
            rows.append((f"{ratio:.0%}", label, *shown))
            values.append({
                "ratio": ratio, "plan": label, "bare": bare, "predicted": predicted, "measured": rise, "losses": found,
            })  # fmt: skip
    head = ("removed", "plan", "bare price", "corrected", f"rise on {domain}", "mean rise, all texts")
    print(measure.table(head, rows))
    measured = [each["measured"] for each in values]
    for key in ("bare", "predicted"):
        rank = spearmanr([each[key] for each in values], measured).statistic
        name = "bare" if key == "bare" else "corrected"
        print(f"\nrank correlation of {name} prices and measured rises over {len(values)} plans: {rank:.3f}")
        print(f"measured over predicted, median where at least {LEAST_RISE}: {median_ratios(values, key)}")
    probes = [asdict(probe) for probe in stats.probes]
    measure.save(given.json, {"prices": values, "dense": dense, "factors": factors, "probes": probes})


if __name__ == "__main__":
    main()

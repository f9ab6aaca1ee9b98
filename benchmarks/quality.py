"""Held-out loss of a trained model by method, number of experts kept and text.

    python benchmarks/quality.py CKPT --calib calib/python.jsonl --heldout heldout
    python benchmarks/quality.py CKPT --calib calib --heldout heldout --all-domains

One calibration pass; every plan is made from its statistics and measured as a view, so that no checkpoint is written.
Losses are in nats per token over the first windows of each held-out file, the first token of a window not scored.
``--all-domains`` takes the files of ``--calib`` as the domains and prints the mean rise of the loss over the dense
model at 25, 50 and 75 % of the experts removed, each domain weighing the same. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

Losses = dict[str, float]


def losses(source: Any, texts: Sequence[Path], given: argparse.Namespace) -> Losses:
    """Nats per token by file."""
    from moezip.evaluate.loss import evaluate

    found = evaluate(source, data=texts, tokens=given.windows * given.seq_len, seq_len=given.seq_len)
    return {name: loss.nll for name, loss in found.by_file.items()}


class Bench:
    """A model, its statistics, and the losses of what they make of it."""

    def __init__(self, given: argparse.Namespace, texts: Sequence[Path], domains: Sequence[Any]):
        from moezip.pipeline import Common, opened, run_calibration

        self.given, self.texts = given, texts
        self.model = opened(str(given.checkpoint))
        self.common = Common(seq_len=given.seq_len, seed=given.seed)
        begun = time.perf_counter()
        self.stats = run_calibration(self.model, domains, self.common)
        self.seconds = time.perf_counter() - begun
        self.dense = losses(self.model.source, texts, given)

    @property
    def experts(self) -> int:
        return int(self.model.facts[0].experts)

    def pruned(self, method: str, keep: int) -> Losses:
        from moezip.pipeline import PruneJob, make_plan, prepare_prune
        from moezip.plan.apply import Applied

        settings = dict(word.split("=", 1) for word in self.given.set)
        job = PruneJob(method=method, keep=keep, settings=settings)
        plan = make_plan(prepare_prune(str(self.given.checkpoint), job, self.common), job, self.stats, self.common)
        measure.say(f"{method}, keep {keep}")
        return losses(Applied(self.model.source, plan), self.texts, self.given)

    def others(self) -> dict[str, Losses]:
        """Losses of the checkpoints given with ``--also``."""
        from moezip.pipeline import opened

        return {name: losses(opened(name).source, self.texts, self.given) for name in self.given.also}


def by_method(bench: Bench, given: argparse.Namespace) -> dict[str, Losses]:
    """One row per method and count, one column per text."""
    found = {"dense": bench.dense}
    for keep in given.keep or [bench.experts * share // 4 for share in (3, 2, 1)]:
        for method in given.methods:
            found[f"keep {keep} {method}"] = bench.pruned(method, keep)
    found |= bench.others()
    names = list(bench.dense)
    rows = [(label, *(f"{row[name]:.3f}" for name in names), f"{mean(row):.3f}") for label, row in found.items()]
    print(measure.table(("nats per token", *names, "mean"), rows))
    return found


def by_ratio(bench: Bench, given: argparse.Namespace) -> dict[str, Losses]:
    """Mean rise of the loss over the texts."""
    ratios = (0.25, 0.5, 0.75)
    found = {"dense": bench.dense}
    rows = []
    for method in given.methods:
        cells = []
        for ratio in ratios:
            row = found[f"{ratio:.0%} {method}"] = bench.pruned(method, round(bench.experts * (1 - ratio)))
            cells.append(f"{mean(row) - mean(bench.dense):.3f}")
        rows.append((method, *cells))
    print(measure.table(("rise of the mean loss, nats", *(f"{ratio:.0%} removed" for ratio in ratios)), rows))
    others = bench.others()
    if others:
        rows = [(name, f"{mean(row) - mean(bench.dense):.3f}") for name, row in others.items()]
        print("\n" + measure.table(("other checkpoints", "rise of the mean loss, nats"), rows))
    return found | others


def mean(values: Losses) -> float:
    return sum(values.values()) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, nargs="+", required=True, help="calibration text, one domain per path")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of text to measure on")
    parser.add_argument("--keep", type=int, nargs="+", help="default 3/4, 1/2 and 1/4 of the experts")
    parser.add_argument("--methods", nargs="+", default=["easy-ep", "reap", "frequency", "random"])
    parser.add_argument("--tokens", type=int, help="calibration tokens in all; default 8192, or 16384 of all domains")
    parser.add_argument("--windows", type=int, default=16, help="windows measured per text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of random pruning")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every method")
    parser.add_argument("--all-domains", action="store_true", help="calibrate on all files, print the mean rise")
    parser.add_argument("--pool", action="store_true", help="one domain of all files instead of one of each")
    parser.add_argument("--also", nargs="+", default=[], metavar="CKPT", help="measure these on the same text as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from moezip.calibrate.data import DomainText, domains_of, text_files

    texts = text_files(given.heldout)
    tokens = given.tokens or (16_384 if given.all_domains else 8_192)
    paths = [file for path in given.calib for file in text_files(path)] if given.all_domains else given.calib
    domains = [DomainText("all", tuple(paths), tokens)] if given.pool else domains_of(paths, tokens)
    bench = Bench(given, texts, domains)
    print(
        f"{bench.stats.tokens:,} tokens of {', '.join(path.stem for path in paths)}; {given.windows} windows of "
        f"{given.seq_len} tokens per text; calibrated in {bench.seconds:.1f} s\n"
    )
    found = by_ratio(bench, given) if given.all_domains else by_method(bench, given)
    measure.save(given.json, {"quality": found, "tokens": bench.stats.tokens, "calibration_seconds": bench.seconds})


if __name__ == "__main__":
    main()

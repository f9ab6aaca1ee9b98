"""What a task's own experts are worth: held-out loss with its own pattern, with the mixed one, with other tasks'.

    python benchmarks/tasks.py CKPT --calib calib --heldout heldout

Every file of ``--calib`` is a task; the file of the same name in ``--heldout`` is what it is measured on. One
calibration pass; patterns are measured as views. Losses are in nats per token over the first windows of each file, the
first token of a window not scored. A prompt is one such window, of text that is not measured. ``by prompt`` is the loss
to expect when each text gets the pattern that its prompts find: the losses of the patterns, weighted by how often each
was found. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import measure


class Bench:
    """A model, statistics of all tasks, and the texts to measure on."""

    def __init__(self, given: argparse.Namespace):
        from moezip.calibrate.data import DomainText, text_files
        from moezip.pipeline import Common, opened, run_calibration

        heldout = {file.stem: file for file in text_files(given.heldout)}
        calib = [file for file in text_files(given.calib) if file.stem in heldout]
        self.given, self.names = given, [file.stem for file in calib]
        if len(calib) < 2:
            sys.exit("two files of the same name in --calib and --heldout are needed at least")
        self.files = {name: heldout[name] for name in self.names}
        share = given.tokens // len(calib)
        self.texts = [DomainText(file.stem, (file,), share) for file in calib]
        self.model = opened(given.checkpoint)
        self.common = Common(seq_len=given.seq_len)
        begun = time.perf_counter()
        # named alone, such a record comes on top of the standing ones
        records = ["tcess"] if "tcess" in given.methods else None
        self.stats = run_calibration(self.model, self.texts, self.common, record=records)
        self.seconds = time.perf_counter() - begun

    def losses(self, source: Any) -> dict[str, float]:
        """Nats per token by task."""
        from moezip.evaluate.loss import evaluate

        tokens = self.given.windows * self.given.seq_len
        found = evaluate(source, data=list(self.files.values()), tokens=tokens, seq_len=self.given.seq_len)
        return {name: found.by_file[name].nll for name in self.names}

    def found_by_prompts(self, patterns: Any) -> dict[str, Counter[str]]:
        """For every task, which tasks its prompts were taken for."""
        from moezip.calibrate.data import token_stream, tokenizer_of, windows
        from moezip.runtime.tasks import routing

        length, first = self.given.seq_len, self.given.windows
        tokenizer = tokenizer_of(self.model.source.folder)
        found = {}
        for name, file in self.files.items():
            rows = windows(token_stream(file, tokenizer, 2 * first * length), length)
            rows = rows[first:] or rows
            queries = [scores.mean(0).tolist() for scores in routing(self.model.source, rows)]
            found[name] = Counter(next(iter(patterns.distances(query))) for query in queries)
        return found

    def measured(self, method: str) -> dict[str, Any]:
        """Everything about the patterns of one method."""
        from moezip.pipeline import PruneJob, make_plan, prepare_prune
        from moezip.pipeline.tasks import patterns_of
        from moezip.plan.apply import Applied

        source = self.model.source
        job = PruneJob(method, self.given.keep, None if self.given.keep else 0.5, texts=self.texts)
        prepared = prepare_prune(self.given.checkpoint, job, self.common)
        patterns = patterns_of(prepared, job, self.stats, self.common)
        measure.say(f"{method}: mixed")
        mixed = self.losses(Applied(source, make_plan(prepared, job, self.stats, self.common)))
        by_pattern = {}
        for name in self.names:
            measure.say(f"{method}: {name}")
            by_pattern[name] = self.losses(Applied(source, patterns.plan(name)))
        prompts = self.found_by_prompts(patterns)
        overlap = {one: {other: patterns.overlap(one, other) for other in self.names} for one in self.names}
        return {"keep": patterns.keep, "mixed": mixed, "patterns": by_pattern, "prompts": prompts, "overlap": overlap}


def shown(names: list[str], dense: dict[str, float], found: dict[str, Any]) -> str:
    """One row per task."""
    rows, sums = [], [0.0] * 7
    for name in names:
        by_pattern = {pattern: losses[name] for pattern, losses in found["patterns"].items()}
        others = sorted(value for pattern, value in by_pattern.items() if pattern != name)
        prompts = found["prompts"][name]
        total = sum(prompts.values())
        by_prompt = sum(by_pattern[task] * count for task, count in prompts.items()) / total
        cells = [dense[name], by_pattern[name], found["mixed"][name], others[0], sum(others) / len(others), by_prompt]
        rows.append((name, *(f"{cell:.3f}" for cell in cells), f"{prompts[name]}/{total}"))
        sums = [a + b for a, b in zip(sums, [*cells, prompts[name] / total], strict=True)]
    means = [value / len(names) for value in sums]
    rows.append(("mean", *(f"{value:.3f}" for value in means[:-1]), f"{means[-1]:.0%}"))
    head = ("task", "dense", "own", "mixed", "another's, best", "another's, mean", "by prompt", "prompts right")
    return measure.table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, required=True, help="folder of calibration text, one file per task")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of text to measure on")
    parser.add_argument("--methods", nargs="+", default=["tcess", "easy-ep"])
    parser.add_argument("--keep", type=int, help="experts kept per layer; default half")
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens in all")
    parser.add_argument("--windows", type=int, default=16, help="windows measured, and prompts tried, per task")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    bench = Bench(given)
    dense = bench.losses(bench.model.source)
    experts = bench.model.facts[0].experts
    print(
        f"{bench.stats.tokens:,} tokens of {len(bench.names)} tasks, calibrated in {bench.seconds:.1f} s; "
        f"{given.windows} windows of {given.seq_len} tokens per text"
    )
    found = {}
    for method in given.methods:
        found[method] = bench.measured(method)
        print(f"\n{method}, {found[method]['keep']} of {experts} experts kept per layer, nats per token:\n")
        print(shown(bench.names, dense, found[method]))
    measure.save(given.json, {"dense": dense, "methods": found, "tokens": bench.stats.tokens})


if __name__ == "__main__":
    main()

"""What storing weights in fewer bits costs, predicted and measured, by plan.

    python benchmarks/bit_prices.py CKPT --calib calib --heldout heldout

One streamed forward and backward pass over the calibration text and one that prices every matrix at every width. Plans
give widths to some or all matrices, uniformly, by layer, by role or at random; each is measured as a view, so that no
checkpoint is written. The codes of a plan were solved once per width, on the inputs of the unquantized layers. Prints
the ratio of the solver's price to that of rounding, and per plan the predicted rise of the loss beside the measured
one, on the calibration text and on held-out text, with Spearman's rank correlation. Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import measure

WIDTHS = (1, 2, 3, 4, 6, 8)
SOLVERS = ("rtn", "gptq")
Choice = Callable[[Any], int | None]


def plans(items: list[Any], seed: int) -> Iterator[tuple[str, str, Choice]]:
    """(solver, label, width of a matrix or None to leave it as it is)."""
    import numpy as np

    layers = sorted({item.layer for item in items if item.layer is not None})
    for solver in SOLVERS:
        for bits in (4, 3, 2):
            yield solver, f"all at {bits}", partial(_same, bits)
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        yield "gptq", f"layer {layer} at 2", partial(_where, "layer", layer, 2)
    for kind, bits in (("gate", 2), ("up", 2), ("down", 2), ("attention", 3), ("attention", 2), ("gate", 1)):
        label = f"{kind} at {bits}"
        yield "gptq", label, partial(_where, "kind", kind, bits)
    for number in range(3):
        random = np.random.default_rng(seed + number)
        drawn = {item.name: int(random.choice((1, 2, 3, 4, 8) if number else (2, 3, 4))) for item in items}
        label = f"random {'1 to 8' if number else '2 to 4'}, draw {number}"
        yield "gptq", label, partial(_drawn, drawn)


def _same(bits: int, item: Any) -> int | None:
    return bits


def _where(field: str, value: Any, bits: int, item: Any) -> int | None:
    return bits if getattr(item, field) == value else None


def _drawn(widths: Mapping[str, int], item: Any) -> int | None:
    return widths[item.name]


class Codes:
    """Codes of every matrix at one width each, chosen from files with all of them at one width."""

    def __init__(self, files: Mapping[int, Any], packing: Mapping[str, Any]):
        from moezip.arch.packing import stem

        self._by_stem = {stem(name): files[grid.bits] for name, grid in packing.items()}
        self._own = {
            name: file
            for file in files.values()
            for name in file.names()
            if self._by_stem.get(name[: name.rindex("weight")]) is file
        }

    def names(self) -> list[str]:
        return list(self._own)

    def read(self, name: str, rows: range | None = None) -> Any:
        file: Any = self._own[name]
        return file.read(name, rows)


def solved_at(bits: int, solver: str, work: Path, given: Any, job: Any, rows: Any, items: list[Any]) -> Any:
    """Codes of every matrix at one width, in a folder."""
    from moezip.calibrate.stream import Stream
    from moezip.formats.packed import Grid
    from moezip.pipeline.layerwise import Layerwise, solve_free
    from moezip.pipeline.solved import Solved
    from moezip.plan.packed import LayerFiles

    plain, split, group, method, params = job
    packing = {item.name: Grid(bits, group) for item in items}
    solved = Solved(work / f"{solver}-{bits}", "benchmark")
    solved.begin(False)
    solve = partial(_solve, method, params)
    if method.schedule == "layerwise":
        Layerwise(
            Stream(plain), rows, packing, solve, solved, original=True, gate=params.gate, prior=params.prior,
        ).run()  # fmt: skip
    else:
        solve_free(split, packing, solve, solved, lambda progress: None)
    measure.say(f"{solver} at {bits}")
    return LayerFiles(solved.folder)


def _solve(method: Any, params: Any, weight: Any, hessian: Any, grid: Any) -> Any:
    return method.run(weight, hessian, grid, params)


def loss(source: Any, texts: list[Path], tokens: int, seq_len: int) -> float:
    """Nats per token over all texts."""
    from moezip.evaluate.loss import evaluate

    found = evaluate(source, data=texts, tokens=tokens, seq_len=seq_len).loss
    assert found is not None
    return found.nll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text; a folder's files share the tokens")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of text to measure on")
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--measured", type=int, default=4_096, help="tokens measured per text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--labels", choices=("data", "model"), default="data")
    parser.add_argument("--seed", type=int, default=0, help="of random plans")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from scipy.stats import spearmanr

    from moezip.calibrate.data import domains_of, load_rows, text_files, tokenizer_of
    from moezip.calibrate.stream import Stream
    from moezip.formats.packed import Grid
    from moezip.pipeline import Common, opened, run_calibration
    from moezip.pipeline.bits import Job, price_bits
    from moezip.pipeline.items import group_size, items_of
    from moezip.pipeline.quantize import views
    from moezip.plan.packed import Packed
    from moezip.quantize import METHODS

    model, common = opened(given.checkpoint), Common(seq_len=given.seq_len)
    calib, heldout = text_files(given.calib), text_files(given.heldout)
    texts = domains_of([given.calib], given.tokens)
    plain, split = views(model)
    group = group_size(model.facts, None)
    grids = [Grid(bits, group) for bits in WIDTHS]
    items = [item for item in items_of(split, model) if item.kind != "head"]
    methods = {method.name: method for method in METHODS}
    rows = load_rows(texts, tokenizer_of(model.source.folder), given.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        begun = time.perf_counter()
        stats = run_calibration(model, texts, common, record=["gradients"], workdir=work / "w", labels=given.labels)
        seconds = {"backward": time.perf_counter() - begun}
        tables, files = {}, {}
        for name in SOLVERS:
            params = methods[name].params()
            solve = partial(_solve, methods[name], params)
            begun = time.perf_counter()
            job = Job(items, grids, name, solve, getattr(params, "gate", False))
            tables[name] = price_bits(Stream(plain), rows, stats, job, work / f"prices-{name}")
            seconds[f"prices, {name} on the sample"] = time.perf_counter() - begun
            made = (plain, split, group, methods[name], params)
            files[name] = {bits: solved_at(bits, name, work, given, made, rows, items) for bits in WIDTHS}
        index = {item.name: place for place, item in enumerate(items)}
        # the calibration text is measured where it was calibrated on
        measured = ((calib, given.tokens // len(calib)), (heldout, given.measured))
        dense = [loss(model.source, *each, given.seq_len) for each in measured]
        values = []
        for solver, label, choice in plans(items, given.seed):
            packing = {item.name: Grid(bits, group) for item in items if (bits := choice(item)) is not None}
            nats = tables[solver].nats
            predicted = sum(nats[index[name], WIDTHS.index(grid.bits)] for name, grid in packing.items())
            view = Packed(split, packing, Codes(files[solver], packing))
            found = [loss(view, *each, given.seq_len) for each in measured]
            rise = [one - base for one, base in zip(found, dense, strict=True)]
            measure.say(f"{solver} {label}: {predicted:.4f}, {rise[0]:+.4f}, {rise[1]:+.4f}")
            values.append({"solver": solver, "plan": label, "predicted": predicted, "calibration": rise[0],
                           "heldout": rise[1]})  # fmt: skip
    report(given, tables, values, seconds, dense, spearmanr)


def report(
    given: Any, tables: Mapping[str, Any], values: list[dict[str, Any]], seconds: Any, dense: Any, spearmanr: Any
) -> None:
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"labels {given.labels}; dense {dense[0]:.4f} on calibration text, {dense[1]:.4f} held out; {took}\n")
    rows = [
        (solver, kind, str(table.sampled.get(kind, 0)), *(f"{ratio:.2f}" for ratio in ratios))
        for solver, table in tables.items()
        for kind, ratios in table.ratios.items()
    ]
    print(measure.table(("solver", "kind", "sampled", *(f"{bits} bits" for bits in WIDTHS)), rows) + "\n")
    print(measure.table(
        ("solver", "plan", "predicted", "rise on calibration text", "of predicted", "held-out rise", "of predicted"),
        [(v["solver"], v["plan"], f"{v['predicted']:.4f}", f"{v['calibration']:+.4f}",
          f"{v['calibration'] / v['predicted']:.2f}", f"{v['heldout']:+.4f}", f"{v['heldout'] / v['predicted']:.2f}")
         for v in values],
    ))  # fmt: skip
    ranks = {}
    for text in ("calibration", "heldout"):
        ranks[text] = float(spearmanr([v["predicted"] for v in values], [v[text] for v in values]).statistic)
        print(f"\nrank correlation with the rise on {text} text over {len(values)} plans: {ranks[text]:.3f}")
    ratios = {solver: {kind: own.tolist() for kind, own in table.ratios.items()} for solver, table in tables.items()}
    measure.save(given.json, {"bit_prices": values, "ranks": ranks, "ratios": ratios, "seconds": seconds})


if __name__ == "__main__":
    main()

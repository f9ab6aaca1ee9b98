"""The price of every single expert against what dropping it costs, as rank correlations.

    python benchmarks/single_drops.py CKPT --calib calib/python.jsonl --heldout heldout/python.jsonl
    python benchmarks/single_drops.py CKPT --calib calib --heldout heldout --tokens 32768

Experts of the chosen layers go one at a time: tokens are routed among the others and gates renormalised, as after
pruning. The rise of the loss is measured on the calibration tokens (in-sample) and on as many held-out ones, all
experts in one streamed pass per slice of the text. Prices come from one streamed backward pass with the text's labels
and one with labels drawn from the model. Prints Spearman's rank correlation of price and rise by layer, with the 95 %
interval over windows drawn anew with replacement (prices stay: what varies is the text that the rise is measured on),
and the ratio of the summed rises to the summed prices. Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure

if TYPE_CHECKING:
    import numpy as np

    from moezip.calibrate.data import Rows
    from moezip.calibrate.probes import Decision, Measured

LABELS = ("data", "model")


def prices(model: Any, texts: Any, given: argparse.Namespace, labels: Any) -> dict[int, np.ndarray]:
    """Per layer, [E] nats per token, all domains together."""
    import numpy as np

    from moezip.pipeline import Common, run_calibration
    from moezip.plan.price import expert_prices

    common = Common(seq_len=given.seq_len, seed=given.seed)
    with tempfile.TemporaryDirectory() as work:
        stats = run_calibration(model, texts, common, record=["gradients"], workdir=Path(work) / "w", labels=labels)
    total = sum(domain.scored for domain in stats.domains)
    each = [(domain.scored / total, expert_prices(domain)) for domain in stats.domains]
    return {layer: np.sum([share * price[layer] for share, price in each], axis=0) for layer in each[0][1]}


def rises(model: Any, rows: Rows, decisions: list[Decision], given: argparse.Namespace) -> Measured:
    """``measure`` over slices of the rows, so that the variants' hidden states fit."""
    import numpy as np

    from moezip.calibrate.data import Rows
    from moezip.calibrate.probes import Measured
    from moezip.calibrate.probes import measure as probe

    each = max(given.slice // rows.ids.shape[1], 1)
    found = []
    for start in range(0, len(rows.ids), each):
        mask = None if rows.mask is None else rows.mask[start : start + each]
        part = Rows(rows.ids[start : start + each], mask, rows.domains[start : start + each])
        found.append(probe(model.source, part, decisions))
        measure.say(f"{min(start + each, len(rows.ids))} of {len(rows.ids)} windows")
    names = ("scored", "base", "rises", "squares", "divergences", "seen")
    return Measured(*(np.concatenate([getattr(part, name) for part in found], axis=-1) for name in names))


def interval(price: np.ndarray, rises: np.ndarray, scored: np.ndarray, draws: int) -> tuple[float, float, float]:
    """Spearman's correlation of prices [E] with mean rises of [E, N] windows: value, and the middle 95 % of draws."""
    import numpy as np
    from scipy.stats import spearmanr

    def correlation(counts: np.ndarray) -> float:
        return float(spearmanr(price, rises @ counts / (scored @ counts)).statistic)

    random, windows = np.random.default_rng(0), len(scored)
    drawn = [correlation(np.bincount(random.integers(0, windows, windows), minlength=windows)) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return correlation(np.ones(windows)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text; a folder's files share the tokens")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on besides")
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers; default all with experts")
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens, and as many held-out ones")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--slice", type=int, default=4_096, help="tokens measured at a time")
    parser.add_argument("--draws", type=int, default=1000, help="of windows, for the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of labels drawn from the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from moezip.calibrate.data import domains_of, load_rows, tokenizer_of
    from moezip.calibrate.probes import Decision
    from moezip.pipeline import opened

    model = opened(given.checkpoint)
    facts = [fact for fact in model.facts if given.layers is None or fact.layer in given.layers]
    calib, heldout = (domains_of([path], given.tokens) for path in (given.calib, given.heldout))
    tokenizer = tokenizer_of(model.source.folder)
    price = {labels: prices(model, calib, given, labels) for labels in LABELS}
    decisions = [Decision(fact.layer, (expert,)) for fact in facts for expert in range(fact.experts)]
    begun = time.perf_counter()
    found = {
        name: rises(model, load_rows(text, tokenizer, given.seq_len), decisions, given)
        for name, text in (("in-sample", calib), ("held-out", heldout))
    }
    seconds = time.perf_counter() - begun
    tokens = {name: int(seen.scored.sum()) for name, seen in found.items()}
    print(f"{len(decisions)} experts, {tokens['in-sample']:,} and {tokens['held-out']:,} scored tokens, measured in "
          f"{seconds:.0f} s\n")  # fmt: skip
    rows, values, start = [], [], 0
    for fact in facts:
        here = slice(start, start + fact.experts)
        start += fact.experts
        for labels in LABELS:
            own, cells = price[labels][fact.layer], []
            for name, seen in found.items():
                middle, low, high = interval(own, seen.rises[here], seen.scored, given.draws)
                ratio = seen.rise()[here].sum() / own.sum()
                cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{ratio:.2f}"]
                values.append({
                    "layer": fact.layer, "labels": labels, "text": name, "rank": middle, "low": low, "high": high,
                    "ratio": ratio, "predicted": own.tolist(), "measured": seen.rise()[here].tolist(),
                    "error": seen.error()[here].tolist(),
                    "divergence": (seen.divergences[here].sum(1) / seen.scored.sum()).tolist(),
                })  # fmt: skip
            rows.append((str(fact.layer), labels, *cells))
    head = ("layer", "labels", "in-sample rank", "rise / price", "held-out rank", "rise / price")
    print(measure.table(head, rows))
    measure.save(given.json, {"single_drops": values, "tokens": tokens, "seconds": seconds})


if __name__ == "__main__":
    main()

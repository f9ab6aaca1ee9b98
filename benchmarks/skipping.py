"""Run-time skipping: share of expert calls saved against held-out loss, by rule and setting.

    python benchmarks/skipping.py CKPT --calib calib --heldout heldout

Every rule learns from the same text, is written beside the weights and measured as `moezip evaluate` does. Prints, per
rule, the share of expert calls that were not made on the held-out text, the rise of its loss in nats per token over the
unmasked model, KL from it, the largest rise of one domain, and seconds of learning. One calibration set, one seed, one
run. Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RUNS: tuple[tuple[str, dict[str, str]], ...] = (
    *(("naee", {"quantile": q}) for q in ("0.25", "0.5", "0.75")),
    *(("odp", {"quantile": q}) for q in ("0.25", "0.5", "0.75")),
    ("odp", {"quantile": "0.5", "protect": "0.1"}),
    ("odp", {"quantile": "0.75", "layers": "3"}),
    *(("otp", {"penalty": p}) for p in ("0.004", "0.01", "0.02", "0.04")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or the word demo")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=3_584, help="of each held-out file")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="these rules")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from moezip.calibrate.data import domains_of
    from moezip.pipeline import Common, evaluate_command
    from moezip.pipeline.skip import SkipJob, skip_command

    calib = sorted(given.calib.iterdir()) if given.calib.is_dir() else [given.calib]
    texts, common = domains_of(calib, given.tokens), Common(seq_len=given.seq_len)
    found: list[dict[str, Any]] = []
    print("| rule | settings | calls saved | rise of loss | KL | largest rise | learnt in |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, (rule, settings) in enumerate(RUNS):
            if given.only and rule not in given.only:
                continue
            out = Path(folder, str(number))
            report = skip_command(given.checkpoint, out, SkipJob(rule, settings, texts), common)
            measured = evaluate_command(
                str(out), common, against=given.checkpoint, data=[given.heldout], tokens=given.heldout_tokens
            ).to_json()
            against = measured["against"]
            rises = {name: loss["nll"] - against["by_file"][name]["nll"] for name, loss in measured["by_file"].items()}
            worst = max(rises, key=lambda name: rises[name])
            print(
                f"| {rule} | {', '.join(f'{k}={v}' for k, v in settings.items())} | {measured['skipped']['share']:.1%} "
                f"| {measured['nll'] - against['nll']:+.4f} | {against['kl']:.4f} | {rises[worst]:+.4f} ({worst}) "
                f"| {report.stages['calibrate']:.0f} s |",
                flush=True,
            )
            found.append({"rule": rule, "settings": settings, **measured})
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

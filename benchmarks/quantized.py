"""Loss and divergence against size: rounding, GPTQ, MC-MoE's widths and the integer program at equal file bytes.

    python benchmarks/quantized.py CKPT --calib calib --heldout heldout

``uniform`` quantizes every linear but routers, embeddings and head at one width, by rounding with searched ranges
(``rtn``) and by ``gptq``. ``pmq`` gives experts 1, 2 or 3 bits and everything else 4. ``lp`` is given the very size of
each of these files (``--size``), with and without leave to drop experts. Sizes are sums of the tensors in
``.safetensors`` files. Calibration text and held-out text are all files of the two folders. Prints a Markdown table;
one calibration set, one run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=3_584, help="of each held-out file")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="*", default=[8, 4, 3, 2], help="of rtn and gptq")
    parser.add_argument("--pmq", type=float, nargs="*", default=[2.5, 2.0, 1.6])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from moezip.calibrate.data import domains_of
    from moezip.pipeline.common import Common
    from moezip.pipeline.evaluate import evaluate_command
    from moezip.pipeline.quantize import QuantizeJob, quantize_command

    calib = sorted(given.calib.iterdir()) if given.calib.is_dir() else [given.calib]
    heldout = sorted(given.heldout.iterdir()) if given.heldout.is_dir() else [given.heldout]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"

        def run(name: str, **asked: Any) -> dict[str, Any]:
            measure.say(name)
            shutil.rmtree(out, ignore_errors=True)
            texts = () if asked.get("solver") == "rtn" else domains_of(calib, given.tokens)
            job = QuantizeJob(texts=texts, **asked)
            report = quantize_command(given.checkpoint, out, job, Common(seq_len=given.seq_len)).report
            assert report is not None  # there is none of a plan alone
            found = evaluate_command(
                str(out), Common(seq_len=given.seq_len), against=given.checkpoint, data=heldout,
                tokens=given.heldout_tokens,
            ).to_json()  # fmt: skip
            row = {
                "name": name, "bytes": report.bytes_after, "bits": report.bits_per_weight,
                "loss": found["nll"], "rise": found["nll"] - found["against"]["nll"], "kl": found["against"]["kl"],
                "same top-1": found["against"]["top1_agreement"], "predicted": report.predicted_nats,
                "dropped": sum(report.experts_before) - sum(report.experts_after), "seconds": report.seconds,
                "tokens": found["tokens"],
            }  # fmt: skip
            rows.append(row)
            return row

        sizes: dict[str, int] = {}
        for bits in given.widths:
            same = {"settings": {"attention": str(bits), "shared": str(bits), "dense": str(bits)}, "bits": float(bits)}
            run(f"rtn {bits}", solver="rtn", **same)
            sizes[f"{bits}"] = run(f"gptq {bits}", **same)["bytes"]
        for bits in given.pmq:
            sizes[f"pmq {bits:g}"] = run(f"pmq {bits:g}", bits=bits, allocate="pmq")["bytes"]
        for name, size in sizes.items():
            run(f"lp, size of {name}", bits=None, size=float(size), allocate="lp")
            run(f"lp without drops, size of {name}", bits=None, size=float(size), allocate="lp",
                settings={"drops": "false"})  # fmt: skip
    cells = [
        (
            row["name"], f"{row['bytes'] / 1e6:.2f}", f"{row['bits']:.2f}", f"{row['loss']:.4f}", f"{row['rise']:+.4f}",
            f"{row['kl']:.4f}", f"{row['same top-1']:.1%}",
            "-" if row["predicted"] is None else f"{row['predicted']:+.4f}", str(row["dropped"] or "-"),
            f"{row['seconds']:.0f}",
        )
        for row in sorted(rows, key=lambda row: -row["bytes"])
    ]  # fmt: skip
    head = ("plan", "MB", "bits per packed weight", "loss", "rise", "KL", "same top-1", "predicted", "dropped", "s")
    print(measure.table(head, cells))
    measure.save(given.json, {"quantized": rows})


if __name__ == "__main__":
    main()

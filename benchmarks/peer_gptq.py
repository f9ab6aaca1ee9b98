"""The whole job against peers: 4-bit GPTQ of a random Qwen3-MoE, from start of the process to closed files.

    python benchmarks/peer_gptq.py --gptqmodel ENV/bin/python --llm-compressor ENV/bin/python

4 layers, hidden 512, 32 experts of width 256, top-4; 32 windows of 256 tokens; every linear but routers and head at 4
bits in groups of 128. The peers are GPTQModel 7.7 and llm-compressor 0.14 in environments of their own, driven by
``gptqmodel_gptq.py`` and ``llmcompressor_gptq.py`` as they are by default. Processes run in turns; imports are inside
the time. Without an environment its arm is left out. ``--plain`` adds an arm of moezip without refinement, which is
the peers' own method.

Output error is not comparable between files of different tools here (random weights, other scales); quality is
measured on trained models by ``quantized.py``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import models


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--gptqmodel", type=Path, help="interpreter of an environment with GPTQModel")
    parser.add_argument("--llm-compressor", type=Path, help="interpreter of an environment with llm-compressor")
    parser.add_argument("--model", default="peer", choices=sorted(models.SHAPES))
    parser.add_argument("--plain", action="store_true", help="also moezip with --set refine=0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    given = parser.parse_args()
    with measure.work_folder(given.work) as work:
        # in a process of its own: this one has to stay small, see measure.py
        measure.process([sys.executable, measure.HERE / "models.py", given.model, "--work", work])
        source, tokens = work / given.model, given.windows * given.seq_len
        text = models.text(tokens, models.SHAPES[given.model].vocabulary, work)

        def ours(*more: str) -> measure.Finished:
            out = work / "out-moezip"
            shutil.rmtree(out, ignore_errors=True)
            command = measure.moezip(
                "quantize", source, out, "--bits", given.bits, "--group-size", given.group, "--data", text,
                "--tokens", tokens, "--seq-len", given.seq_len, "--quiet", *more,
            )  # fmt: skip
            return measure.process(command, HF_HUB_OFFLINE="1")

        def theirs(python: Path, driver: str) -> measure.Finished:
            out = work / "out-peer"
            shutil.rmtree(out, ignore_errors=True)
            command: list[str | Path] = [
                python.absolute(), measure.HERE.absolute() / driver, source.absolute(), out.absolute(),
                "--text", text.absolute(), "--windows", str(given.windows),
                "--seq-len", str(given.seq_len), "--bits", str(given.bits), "--group", str(given.group),
            ]  # fmt: skip
            return measure.process(command, cwd=work, HF_HUB_OFFLINE="1")  # some leave logs where they are run

        arms: dict[str, Callable[[], measure.Finished]] = {"moezip": ours}
        if given.plain:
            arms["moezip, plain GPTQ"] = lambda: ours("--set", "refine=0")
        if given.gptqmodel:
            arms["GPTQModel"] = lambda: theirs(given.gptqmodel, "gptqmodel_gptq.py")
        if given.llm_compressor:
            arms["llm-compressor"] = lambda: theirs(given.llm_compressor, "llmcompressor_gptq.py")
        found = measure.in_turns(given.rounds, arms)

    base = measure.median([run.seconds for run in found["moezip"]])
    rows = []
    for name, runs in found.items():
        seconds = [run.seconds for run in runs]
        rows.append((
            name, f"{measure.median(seconds):.1f}", measure.all_of(seconds, 1),
            f"{measure.median([run.cpu_seconds for run in runs]):.1f}",
            f"{max(run.peak_rss_bytes for run in runs) / measure.MIB:.0f}", f"{measure.median(seconds) / base:.1f}",
        ))  # fmt: skip
    print(measure.table(("process", "wall s", "all", "cpu s", "peak MiB", "times moezip"), rows))
    values = {
        name: {"seconds": [run.seconds for run in runs], "peak_rss_bytes": [run.peak_rss_bytes for run in runs]}
        for name, runs in found.items()
    }
    measure.save(given.json, {"peer_gptq": values, "model": given.model, "bits": given.bits, "group": given.group})


if __name__ == "__main__":
    main()

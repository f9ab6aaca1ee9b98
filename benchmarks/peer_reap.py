"""The whole job against a peer: REAP on a random Qwen3-MoE, from start of the process to closed files.

    python benchmarks/peer_reap.py --peer-python ENV/bin/python

4 layers, hidden 512, 32 experts of width 256, top-4; 32 windows of 256 tokens; a quarter of the experts removed. The
peer is llm-compressor 0.14 in an environment of its own (``pip install llmcompressor==0.14.0.1``), driven by
``llmcompressor_reap.py``, twice: as it is by default, where all experts see all tokens, and with only the routed
experts computed, which is all that REAP needs. Processes run in turns; imports are inside the time. moezip's guard for
super experts, which the peer lacks, is off. Without ``--peer-python`` only moezip is measured.

A job of this size is over soon, so that importing the libraries is much of it: the table has each side's imports,
measured on their own, and the time beyond them. ``--model large`` is a longer job. ``--busy N`` runs N processes beside
that only spin, for both sides: operations split over all cores wait for the slowest of them.

The last column is the share of moezip's kept experts that the peer keeps too. It is not 100 %: the scores of random
experts lie close together, the peer calibrates a layer on the output of the layers that it has pruned already, and
its traced forward (0.14.0.1 with transformers 5.17) goes without the causal mask: its token counts in the first layer
are those of a plain forward without one, where moezip's are those of the model's own forward.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import models

from moezip.plan.plan import Plan

OUR_IMPORTS = """
import moezip.cli, moezip.pipeline, torch, transformers.integrations.moe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM
"""
PEER_IMPORTS = """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM
"""


def kept_by_moezip(out: Path) -> dict[int, set[int]]:
    return {layer.layer: set(layer.kept) for layer in Plan.load(out / "moezip" / "plan.json").layers}


def kept_by_peer(file: Path) -> dict[int, set[int]]:
    found: dict[str, list[int]] = json.loads(file.read_text(encoding="utf-8"))
    return {int(name.split("layers.")[1].split(".")[0]): set(experts) for name, experts in found.items()}


def overlap(ours: dict[int, set[int]], theirs: dict[int, set[int]]) -> float:
    """Share of our experts that the peer kept too."""
    return sum(len(ours[layer] & theirs[layer]) for layer in ours) / sum(len(kept) for kept in ours.values())


def imports_of(name: str, peer_python: Path | None) -> float:
    """Seconds of a process that imports what the job needs and ends; the better of two."""
    interpreter, modules = (sys.executable, OUR_IMPORTS) if name == "moezip" else (peer_python, PEER_IMPORTS)
    return min(measure.process([interpreter, "-c", modules], HF_HUB_OFFLINE="1").seconds for _ in range(2))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that only spin, ended afterwards."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with llm-compressor")
    parser.add_argument("--model", default="peer", choices=sorted(models.SHAPES))
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that keep cores busy meanwhile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.25)
    given = parser.parse_args()
    with measure.work_folder(given.work) as work:
        # in a process of its own: this one has to stay small, see measure.py
        measure.process([sys.executable, measure.HERE / "models.py", given.model, "--work", work])
        source, tokens = work / given.model, given.windows * given.seq_len
        text = models.text(tokens, models.SHAPES[given.model].vocabulary, work)
        kept: dict[str, dict[int, set[int]]] = {}

        def ours() -> measure.Finished:
            out = work / "out-moezip"
            shutil.rmtree(out, ignore_errors=True)
            command = measure.moezip(
                "prune", source, out, "--method", "reap", "--ratio", given.ratio, "--data", text, "--tokens", tokens,
                "--seq-len", given.seq_len, "--set", "guard=false", "--quiet",
            )  # fmt: skip
            found = measure.process(command, HF_HUB_OFFLINE="1")
            kept["moezip"] = kept_by_moezip(out)
            return found

        def theirs(name: str, *more: str) -> measure.Finished:
            out, file = work / "out-peer", work / "kept-peer.json"
            shutil.rmtree(out, ignore_errors=True)
            command: list[str | Path] = [
                given.peer_python, measure.HERE / "llmcompressor_reap.py", source, out, "--text", text, "--kept", file,
                "--windows", str(given.windows), "--seq-len", str(given.seq_len), "--ratio", str(given.ratio), *more,
            ]  # fmt: skip
            found = measure.process(command, HF_HUB_OFFLINE="1")
            kept[name] = kept_by_peer(file)
            return found

        arms = {"moezip": ours}
        if given.peer_python:
            arms["llm-compressor, default"] = lambda: theirs("llm-compressor, default", "--all-experts")
            arms["llm-compressor, routed only"] = lambda: theirs("llm-compressor, routed only")
        with busy(given.busy):
            imports = {name: imports_of(name, given.peer_python) for name in arms}
            found = measure.in_turns(given.rounds, arms)

    base = measure.median([run.seconds for run in found["moezip"]])
    beyond = base - imports["moezip"]
    rows, values = [], {}
    for name, runs in found.items():
        seconds = [run.seconds for run in runs]
        peak = max(run.peak_rss_bytes for run in runs)
        shared = overlap(kept["moezip"], kept[name])
        rows.append((
            name, f"{measure.median(seconds):.1f}", measure.all_of(seconds, 1),
            f"{measure.median([run.cpu_seconds for run in runs]):.1f}", f"{peak / measure.MIB:.0f}",
            f"{measure.median(seconds) / base:.1f}",
                f"{imports[name]:.1f}",
                f"{(measure.median(seconds) - imports[name]) / beyond:.1f}", f"{shared:.0%}",
        ))  # fmt: skip
        values[name] = _values(runs, shared)
    head = (
        "process",
        "wall s",
        "all",
        "cpu s",
        "peak MiB",
        "times moezip",
        "imports s",
        "times moezip beyond them",
        "experts shared",
    )
    print(measure.table(head, rows))
    measure.save(given.json, {"peer_reap": values, "imports": imports, "busy": given.busy, "model": given.model})


def _values(runs: list[measure.Finished], shared: float) -> dict[str, Any]:
    return {
        "seconds": [run.seconds for run in runs],
        "cpu_seconds": [run.cpu_seconds for run in runs],
        "peak_rss_bytes": [run.peak_rss_bytes for run in runs],
        "kept_shared_with_moezip": shared,
    }


if __name__ == "__main__":
    main()

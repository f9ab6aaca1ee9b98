"""Peak resident memory of loading a packed checkpoint, against what the imports alone take.

    python benchmarks/load.py --work CACHE

A Qwen3-MoE of random 4-bit codes (1.3 GB) is written as ``moezip quantize`` would, one decoder layer to a shard. Then
processes of their own import torch, transformers and the model's module; the same and load the checkpoint by
``from_pretrained``; and also run 64 tokens through it, which decodes most experts of every layer. The ceiling is the
imports' peak, measured in the same round, plus the packed size, plus one layer as it is packed.

The peak is the system's own figure for the process (``ru_maxrss``). What is mapped from the files counts once it was
touched.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import models

if TYPE_CHECKING:
    import torch

SHAPE = models.Shape(layers=8, hidden=2048, experts=64, width=768, top_k=8, vocabulary=2048, heads=16)
NAME = "packed-int4"
GRID = "int4-g128-sym"
MIB = measure.MIB
IMPORTS = """
import torch, transformers, moezip
import transformers.models.qwen3_moe.modeling_qwen3_moe
"""
LOAD = f"""{IMPORTS}
import sys
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
"""
RUN = f"""{LOAD}
with torch.inference_mode():
    model(torch.arange(64)[None])
"""


def write(folder: Path, codes: str = GRID) -> None:
    """The checkpoint, unless it is there: random codes on the grid ``codes``, all scales alike."""
    if (folder / "config.json").exists():
        return
    from moezip.arch.families import ARCHITECTURES
    from moezip.arch.layout import Layout, tripwire
    from moezip.arch.packing import KEY, folded
    from moezip.formats.packed import Grid

    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    grid = Grid.parse(codes)
    layout = Layout({layer: (SHAPE.width,) * SHAPE.experts for layer in range(SHAPE.layers)})
    trip = tripwire(ARCHITECTURES["qwen3_moe"], layout)
    packing = _shards(unfinished, grid, trip)
    config = models._config(SHAPE)
    config["quantization_config"] = {**layout.to_config(), KEY: folded(packing)}
    (unfinished / "config.json").write_text(json.dumps(config))
    unfinished.rename(folder)


def _shards(folder: Path, grid: Any, trip: str) -> dict[str, Any]:
    """Writes the tensors and their index; the grid of every packed matrix."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    packing: dict[str, Any] = {}

    def plain(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    def shape(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, device="meta")

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    for shard in range(SHAPE.layers + 1):
        file = f"model-{shard + 1:05d}-of-{SHAPE.layers + 1:05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        if shard == SHAPE.layers:
            tensors["model.embed_tokens.weight"] = plain(SHAPE.vocabulary, SHAPE.hidden)
            tensors["lm_head.weight"] = plain(SHAPE.vocabulary, SHAPE.hidden)
            tensors["model.norm.weight"] = ones(SHAPE.hidden)
            tensors[trip] = torch.zeros(1, dtype=torch.uint8)
        else:
            for name, value in models._layer(SHAPE, shard, shape, ones).items():
                if not value.is_meta:
                    tensors[name] = value
                elif "_proj" in name:
                    packing[name] = grid
                    rows, columns = value.shape
                    tensors |= _codes(name, grid, rows, columns, generator)
                else:
                    tensors[name] = plain(*value.shape)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return packing


def _codes(name: str, grid: Any, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    from moezip.formats.packed import PACKED, SCALE, SHAPE, words

    stem = name.removesuffix("weight")
    whole = torch.randint(-(2**31), 2**31, (rows, words(columns, grid.bits)), generator=generator)
    return {
        stem + PACKED: whole.to(torch.int32),
        stem + SCALE: torch.full((rows, grid.groups(columns)), columns**-0.5 / 5, dtype=torch.float16),
        stem + SHAPE: torch.tensor([rows, columns]),
    }


def started(code: str, folder: Path) -> measure.Finished:
    return measure.process([sys.executable, "-c", code, folder], HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="only write the checkpoint")
    given = parser.parse_args()
    with measure.work_folder(given.work) as work:
        folder = work / NAME
        if given.make:
            write(folder)
            return
        measure.say("making the checkpoint, unless it is there")
        # in a process of its own: this one has to stay small, see measure.py
        measure.process([sys.executable, __file__, "--make", "--work", work])
        sizes = [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]
        arms = {name: partial(started, code, folder) for name, code in
                (("imports", IMPORTS), ("loaded", LOAD), ("loaded and run", RUN))}  # fmt: skip
        found = measure.in_turns(given.rounds, arms)
        base = min(done.peak_rss_bytes for done in found["imports"])
        limit = base + sum(sizes) + sizes[0]
        rows = []
        for name, runs in found.items():
            peaks = [done.peak_rss_bytes for done in runs]
            rows.append((
                name, measure.all_of([peak / MIB for peak in peaks], 0), f"{(max(peaks) - base) / MIB:.0f}",
                f"{max(peaks) / limit:.2f}", measure.all_of([done.seconds for done in runs], 1),
            ))  # fmt: skip
        print(f"packed {sum(sizes) / MIB:.0f} MiB, one layer {sizes[0] / MIB:.0f} MiB, ceiling {limit / MIB:.0f} MiB\n")
        print(measure.table(("process", "peak MiB, all", "above the imports", "of the ceiling", "seconds"), rows))
        values = {
            name: [{"peak_rss_bytes": done.peak_rss_bytes, "seconds": done.seconds} for done in runs]
            for name, runs in found.items()
        }
        measure.save(given.json, {"load": {"packed_bytes": sum(sizes), "layer_bytes": sizes[0], **values}})


if __name__ == "__main__":
    main()

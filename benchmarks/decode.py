"""Text generation of a packed model on the CPU, against stock transformers in bf16: tokens per second.

    python benchmarks/decode.py --work CACHE [--threads 1]

A Qwen3-MoE of random weights (hidden 2048, 8 layers of 64 experts of 768, 8 per token; 5 GB in bf16) with all matrices
in 4 bits, group 128, then in 2. After a prompt each generates greedily, one token at a time, with transformers' own
``generate`` and its cache. Prompt and tokens are timed apart: a run that stops after the first token is taken off one
that goes on. All in turns; medians, wall time, Markdown.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import load
import measure
import models

PROMPT = 64


def stock() -> Any:
    """The model in bf16, of numbers drawn once and repeated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**models._config(load.SHAPE))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn = (torch.randn(2**20) * load.SHAPE.hidden**-0.5).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1)
            continue
        for start in range(0, flat.numel(), drawn.numel()):
            part = flat[start : start + drawn.numel()]
            part.copy_(drawn[: part.numel()])
    rotary = model.model.rotary_emb
    rotary.__init__(config)  # its buffers were on the meta device
    return model.eval()


def speed(model: Any, tokens: int) -> tuple[float, float]:
    """Prompt tokens per second, generated tokens per second."""
    import torch

    prompt = torch.arange(PROMPT)[None] % load.SHAPE.vocabulary
    taken = []
    for count in (1, tokens + 1):
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        taken.append(time.perf_counter() - begun)
    return PROMPT / taken[0], tokens / (taken[1] - taken[0])


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    given = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(given.threads):  # read when a library is imported: begin again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": str(given.threads)})
    import moezip

    with measure.work_folder(given.work) as work:
        arms = {"bf16": stock()}
        for bits in given.bits:
            folder = Path(work) / f"packed-int{bits}"
            load.write(folder, f"int{bits}-g128-sym")
            for activations in ("exact", "int8"):
                arms[f"{bits} bits, {activations}"] = moezip.load(folder, activations=activations)
        for model in arms.values():
            speed(model, 2)  # whatever is done at first use
        found = measure.in_turns(
            given.rounds, {name: partial(speed, model, given.tokens) for name, model in arms.items()}
        )
    rows = []
    first = None
    for name, runs in found.items():
        prompt, tokens = (measure.median([run[i] for run in runs]) for i in (0, 1))
        first = first or (prompt, tokens)
        rows.append((
            name, f"{prompt:.0f}", f"{prompt / first[0]:.1f}", measure.all_of([run[1] for run in runs], 1),
            f"{tokens / first[1]:.1f}",
        ))  # fmt: skip
    print(f"{given.threads} threads\n")
    head = ("model", "prompt tokens/s", "x bf16", "tokens/s, all", "x bf16")
    print(measure.table(head, rows))
    measure.save(given.json, {"threads": given.threads, "decode": found})


if __name__ == "__main__":
    main()

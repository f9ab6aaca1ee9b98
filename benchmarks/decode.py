"""Text generation of a packed model on the CPU, against stock transformers in bf16: tokens per second.

    python benchmarks/decode.py --work CACHE [--threads 1] [--llama-cpp ENV/bin/python]

A Qwen3-MoE of random weights (hidden 2048, 8 layers of 64 experts of 768, 8 per token; 5 GB in bf16) with all matrices
in 4 bits, group 128, then in 2. After a prompt each generates greedily, one token at a time, with transformers' own
``generate`` and its cache. Prompt and tokens are timed apart: a run that stops after the first token is taken off one
that X

With ``--llama-cpp`` the same is done by llama.cpp (``pip install llama-cpp-python gguf`` in an environment of its own),
on random blocks of Q4_0 (4.5 bits per weight; the 4 bits here are 4.13) and Q2_K (2.63; 2.13), all matrices alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


def speed(model: Any, clock: Callable[[], float], tokens: int) -> tuple[float, float]:
    """Prompt tokens per second, generated tokens per second."""
    import torch

    prompt = torch.arange(PROMPT)[None] % load.SHAPE.vocabulary
    taken = []
    for count in (1, tokens + 1):
        begun = clock()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        taken.append(clock() - begun)
    return PROMPT / taken[0], tokens / (taken[1] - taken[0])


@contextmanager
def llama(python: Path, file: Path, kind: str, threads: int, more: list[str]) -> Iterator[Callable[[int], Any]]:
    """``speed`` of llama.cpp, in a process of its own that lives as long as the context."""
    command = [python, measure.HERE / "llamacpp_decode.py", file, "--type", kind, "--threads", threads,
               "--prompt", PROMPT, *more]  # fmt: skip
    with file.with_suffix(".log").open("w") as log:
        child = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=log, text=True)  # fmt: skip
        given, said = child.stdin, child.stdout
        assert given is not None and said is not None

        def answer() -> str:
            line = said.readline()
            if not line:
                raise SystemExit(f"llama.cpp ended with {child.wait()}; {log.name} has what it said")
            return str(line)

        def speed(tokens: int) -> tuple[float, float]:
            given.write(f"{tokens}\n")
            given.flush()
            prompt, rest = map(float, answer().split())
            return PROMPT / prompt, tokens / rest

        measure.say(answer().strip())
        try:
            yield speed
        finally:
            given.close()
            child.wait()


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--llama-as-stored", action="store_true", help="llama.cpp keeps to the file's layout")
    given = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(given.threads):  # read when a library is imported: begin again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": str(given.threads)})
    import moezip

    with measure.work_folder(given.work) as work, ExitStack() as peers:
        clock = time.process_time if given.threads == 1 else time.perf_counter
        arms: dict[str, Any] = {"bf16": partial(speed, stock(), clock)}
        for bits in given.bits:
            folder = Path(work) / f"packed-int{bits}"
            load.write(folder, f"int{bits}-g128-sym")
            for activations in ("exact", "int8"):
                arms[f"{bits} bits, {activations}"] = partial(
                    speed, moezip.load(folder, activations=activations), clock
                )
        if given.llama_cpp:
            more = ["--as-stored"] if given.llama_as_stored else []
            for kind in ("Q4_0", "Q2_K"):
                peer = llama(given.llama_cpp, Path(work) / f"llama-{kind}.gguf", kind, given.threads, more)
                arms[f"llama.cpp {kind}"] = peers.enter_context(peer)
        for run in arms.values():
            run(2)  # whatever is done at first use
        found = measure.in_turns(given.rounds, {name: partial(run, given.tokens) for name, run in arms.items()})
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

"""The kernels of quantization against what they replace: processor milliseconds on one thread.

    python benchmarks/native.py

GPTQ of one expert matrix: the published way in torch (Cholesky, inverse, Cholesky of the inverse; a Python loop over
the columns with a block of 128), and moezip's (one Cholesky factor and its inverse, all columns in one call).
Both choose scales by the whole range of a group; both see the same matrix and the same second moment, the published one
with its columns reversed, so that they take the same order and should find the same codes. Then the other kernels
beside torch or numpy. All in turns; the values are medians, Markdown.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import numpy as np
import torch

from moezip import kernels

SHAPES = ((768, 2048), (256, 512), (512, 256), (64, 128), (128, 64))
BLOCK = 128


def problem(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [R, C] and the damped second moment [C, C] of inputs with correlated columns."""
    chance = np.random.default_rng(0)
    mixed = np.eye(columns, dtype=np.float32) + 0.02 * chance.standard_normal((columns, columns), dtype=np.float32)
    inputs = chance.standard_normal((columns + 512, columns), dtype=np.float32) @ mixed
    moment = inputs.T @ inputs / len(inputs)
    moment[np.diag_indices(columns)] += 0.01 * moment.diagonal().mean()
    return 0.02 * chance.standard_normal((rows, columns), dtype=np.float32), moment


def published(weight: torch.Tensor, moment: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, float, float]:
    """Codes, seconds of the factorizations, seconds of the loop. The group is no larger than the block."""
    begun = time.process_time()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True)
    factored = time.process_time()
    weight, codes, top = weight.clone(), torch.empty_like(weight), 2**bits - 1
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        part, inside = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            if i % group == 0:
                low = weight[:, start + i : start + i + group].amin(1).clamp(max=0)
                high = weight[:, start + i : start + i + group].amax(1).clamp(min=0)
                scale = ((high - low) / top).half().float()
                zero = torch.round(-low / scale)
            code = torch.clamp(torch.round(part[:, i] / scale + zero), 0, top)
            error = (part[:, i] - scale * (code - zero)) / inside[i, i]
            part[:, i:] -= error[:, None] * inside[i, i:]
            errors[:, i], codes[:, start + i] = error, code
        weight[:, end:] -= errors @ factor[start:end, end:]
    return codes, factored - begun, time.process_time() - factored


def ours(weight: np.ndarray, moment: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, float, float]:
    """As ``published``; scales are found as the columns come up, there as here."""
    begun = time.process_time()
    factor = kernels.gptq_factor(moment)
    factored = time.process_time()
    solved = kernels.gptq_refit(weight, factor, group, bits, False, candidates=np.ones(1, np.float32))
    return solved.codes, factored - begun, time.process_time() - factored


def gptq(rounds: int, bits: int) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for shape in SHAPES:
        weight, moment = problem(*shape)
        group = min(128, shape[1])
        turned = torch.from_numpy(weight[:, ::-1].copy()), torch.from_numpy(moment[::-1, ::-1].copy())
        work: dict[str, Callable[[], tuple[Any, float, float]]] = {
            "published": partial(published, *turned, bits, group),
            "moezip": partial(ours, weight, moment, bits, group),
        }
        found = measure.in_turns(rounds, work)
        same = float((found["published"][0][0].numpy()[:, ::-1] == found["moezip"][0][0]).mean())
        taken = {
            name: [1e3 * measure.median([run[part] for run in runs]) for part in (1, 2)] for name, runs in found.items()
        }
        totals = {name: sum(parts) for name, parts in taken.items()}
        rows.append((
            f"[{shape[0]}, {shape[1]}]", *(f"{part:.2f}" for name in taken for part in (*taken[name], totals[name])),
            f"{totals['published'] / totals['moezip']:.1f}", f"{100 * same:.2f} %",
        ))  # fmt: skip
        values[str(shape)] = {"milliseconds": taken, "same_codes": same}
    return rows, values


def torch_round(weight: torch.Tensor) -> torch.Tensor:
    """Whole range of groups of 128 at 4 bits, eight codes in a word."""
    parts = weight.view(weight.shape[0], -1, 128)
    low, high = parts.amin(2, keepdim=True).clamp(max=0), parts.amax(2, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    codes = torch.clamp(torch.round(parts / scale + torch.round(-low / scale)), 0, 15).to(torch.int32)
    return (codes.view(weight.shape[0], -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)


def torch_read(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    codes = (packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return (scale[..., None] * (codes.view(*scale.shape, 128) - zero[..., None])).flatten(1)


def others(rounds: int) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The other kernels at [768, 2048], 4 bits, groups of 128; the second moment of 1,024 tokens."""
    from moezip.kernels import reference

    weight, moment = problem(768, 2048)
    tensor, importance = torch.from_numpy(weight), moment.diagonal().copy()
    scales, zeros = kernels.minmax(weight, 128, 4, False)
    assert zeros is not None
    packed = kernels.pack(kernels.round_codes(weight, scales, zeros, 128, 4), 4)
    tensors = torch.from_numpy(packed), torch.from_numpy(scales), torch.from_numpy(zeros.astype(np.float32))
    shares = np.array(kernels.SHRINK, np.float32)
    x = np.random.default_rng(1).standard_normal((1024, 2048), dtype=np.float32)
    halves, out = (x.view(np.uint32) >> 16).astype(np.uint16), np.zeros((2048, 2048), np.float32)

    def rounded() -> object:
        found = kernels.minmax(weight, 128, 4, False)
        return kernels.pack(kernels.round_codes(weight, *found, 128, 4), 4)

    pairs: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
        "rounding and packing": ("torch", lambda: torch_round(tensor), rounded),
        "search of scales": (
            "numpy twin",
            lambda: reference.clip_search(weight, 128, 4, False, shares, importance, "F16", 1),
            lambda: kernels.clip_search(weight, 128, 4, False, importance=importance),
        ),
        "dequantizing to fp32": (
            "torch",
            lambda: torch_read(*tensors),
            lambda: kernels.dequantize(packed, scales, zeros, 128, 4, 2048),
        ),
        "second moment, fp32": ("numpy `X.T @ X`", lambda: x.T @ x, lambda: kernels.second_moment(x, out)),
        "second moment, bf16": ("the same in fp32", lambda: x.T @ x, lambda: kernels.second_moment(halves, out)),
    }
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for name, (beside, theirs, mine) in pairs.items():
        found = measure.in_turns(rounds, {beside: partial(timed, theirs), "moezip": partial(timed, mine)})
        one, two = (1e3 * measure.median(runs) for runs in found.values())
        rows.append((name, beside, f"{one:.2f}", f"{two:.2f}", f"{one / two:.1f}"))
        values[name] = {"beside": beside, "milliseconds": [one, two]}
    return rows, values


def timed(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bits", type=int, default=3)
    given = parser.parse_args()
    one = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    if any(os.environ.get(name) != "1" for name in one):  # read when a library is imported: begin again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    torch.set_grad_enabled(False)
    status = kernels.status()
    measure.say(f"kernels: {status.isa if status.native else 'numpy, ' + status.why}")
    rows, solved = gptq(given.rounds, given.bits)
    head = ("matrix", "torch factor", "loop", "total", "moezip factor", "columns", "total", "ratio", "same codes")
    print(measure.table(head, rows), end="\n\n")
    rows, rest = others(given.rounds)
    print(measure.table(("kernel", "beside", "ms", "moezip", "ratio"), rows))
    measure.save(given.json, {"isa": status.isa, "gptq": solved, "others": rest})


if __name__ == "__main__":
    main()

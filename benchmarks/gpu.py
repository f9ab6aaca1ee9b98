"""The Triton kernels on a GPU: first whether they are right, then how fast they are beside torch in bf16.

    python benchmarks/gpu.py
    TRITON_INTERPRET=1 python benchmarks/gpu.py --check-only     the first part alone, small, without a GPU

Nobody has run the second part yet. Right means: random matrices of every width, kind of group and number of tokens
against the decoded weights in float64. If anything is wrong the script ends there, with 1.

Speed: layers of experts in the shapes of Qwen3-30B-A3B, Mixtral 8x7B and DeepSeek-V3, random weights, random routing;
a call is replayed in a CUDA graph of sixteen that choose different experts, so that weights come from memory and not
from a cache. torch's time is the better of its grouped product over sorted tokens and of one product per chosen expert.
``launched`` is the same call without a graph. GB/s are bytes of the chosen experts' codes, scales and zeros over time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F

from moezip.kernels import triton_experts as gpu
from moezip.kernels import triton_layout, triton_packed

WIDTHS = range(1, 9)
CALLS = 16
REPLAYS = 20
# fp32 sums, with up to 64 times the range of the codes added and taken off, and whatever tensor cores leave out.
SUMS = 2e-4
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: hidden and inner size, number of experts in memory, choices of a token."""

    name: str
    hidden: int
    inner: int
    experts: int
    choices: int


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("Mixtral 8x7B", 4096, 14336, 8, 2),
    Shape("DeepSeek-V3", 7168, 2048, 64, 8),  # of 256 experts, to leave room for bf16
)


Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def random_matrix(rows: int, inputs: int, bits: int, group: int, device: str, symmetric: bool = False) -> Stored:
    """Stored tensors of random codes: words, scales, zeros."""
    groups = inputs // group if group else 1
    words = torch.randint(-(2**31), 2**31, (rows, -(-inputs * bits // 32)), dtype=torch.int64, device=device)
    scales = ((0.5 + torch.rand(rows, groups, device=device)) * 0.04 / 2**bits).to(torch.float16)
    zeros = None
    if not symmetric and bits > 1:
        zeros = torch.randint(0, 2**bits, (rows, groups), device=device).to(torch.uint8)
    return words.to(torch.int32), scales, zeros


def decoded(stored: Stored, bits: int, inputs: int) -> torch.Tensor:
    """float64 [rows, inputs]."""
    words, scales, zeros = stored
    codes = triton_layout.unpack_words(words, bits, inputs).double().view(*scales.shape, -1)
    if bits == 1:
        values = 2 * codes - 1
    else:
        values = codes - (2 ** (bits - 1) if zeros is None else zeros.double()[:, :, None])
    return (values * scales.double()[:, :, None]).view(len(words), inputs)


def expert(
    hidden: int, inner: int, bits: int, group: int, device: str
) -> tuple[list[Stored], tuple[triton_packed.Matrix, triton_packed.Matrix, triton_packed.Matrix]]:
    """Gate, up and down: as stored, and laid out."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    stored = [random_matrix(*shape, bits, group, device) for shape in shapes]
    gate, up, down = (triton_packed.lay_out(*each, bits, group, shape[1]) for each, shape in zip(stored, shapes))
    return stored, (gate, up, down)


# -- right or wrong ------------------------------------------------------------------------------------------


def checks(device: str, small: bool) -> Iterator[tuple[str, float, float]]:
    """What, its largest error, and what is allowed; both in parts of the largest output."""
    sizes = [(130, 192), (64, 704)] if small else [(1536, 2048), (2048, 768), (1000, 704), (4096, 7168)]
    for bits in WIDTHS:
        for dtype in triton_packed.DTYPES:
            for rows, inputs in sizes:
                for group in (32, 0) if small else (32, 64, 128, 0):
                    if group and inputs % group:
                        continue
                    stored = random_matrix(rows, inputs, bits, group, device, symmetric=group == 64)
                    linear = triton_packed.pack_linear(triton_packed.lay_out(*stored, bits, group, inputs))
                    weight = decoded(stored, bits, inputs)
                    for tokens in (3,) if small else (1, 5, 16, 17, 100):
                        x = torch.randn(tokens, inputs, device=device).to(dtype)
                        error = _error(gpu.run_linear(x, linear), x.double() @ weight.T)
                        yield f"{bits} bits g{group} {rows}x{inputs} {tokens} tokens {dtype}", error, SUMS + HALF[dtype]
    for tokens in (5,) if small else (1, 7, 64, 1000):
        yield f"layer of mixed widths, {tokens} tokens", _mixed(tokens, device, small), 3 * HALF[torch.bfloat16]


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


def _mixed(tokens: int, device: str, small: bool) -> float:
    """Eight experts, one of each width, two choices, in bf16."""
    hidden, inner = (64, 96) if small else (1024, 704)
    experts = [expert(hidden, inner, bits, 32, device) for bits in WIDTHS]
    x = torch.randn(tokens, hidden, device=device).to(torch.bfloat16)
    chosen = torch.stack([torch.randperm(8, device=device)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, device=device)
    true = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
    for number, (bits, (stored, _)) in enumerate(zip(WIDTHS, experts)):
        token, place = torch.where(chosen == number)
        gate, up, down = (decoded(each, bits, size) for each, size in zip(stored, (hidden, hidden, inner)))
        inner_x = x[token].double()
        h = (F.silu(inner_x @ gate.T) * (inner_x @ up.T)).to(x.dtype).double()
        true.index_add_(0, token, (h @ down.T) * weights[token, place, None].double())
    return _error(
        gpu.run_layer(x, triton_packed.pack_layer([each for _, each in experts], "silu"), chosen, weights), true
    )


def right(device: str, small: bool) -> bool:
    """Prints what is wrong, and the worst of each kind."""
    worst: dict[str, tuple[float, float]] = {}
    wrong = 0
    for what, error, allowed in checks(device, small):
        kind = " ".join(what.split()[:2])
        worst[kind] = max(worst.get(kind, (0.0, allowed)), (error, allowed))
        if not error <= allowed:  # NaN is wrong too
            wrong += 1
            print(f"WRONG: {what}: {error:.1e} of the largest output, {allowed:.1e} allowed", flush=True)
    rows = [[kind, f"{error:.1e}", f"{allowed:.1e}"] for kind, (error, allowed) in worst.items()]
    print(measure.table(["largest error, of the largest output", "found", "allowed"], rows))
    print(f"\n{wrong} wrong\n", flush=True)
    return not wrong


# -- speed ---------------------------------------------------------------------------------------------------


def grouped(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Any:
    """torch's grouped product: tokens sorted by expert. up [E, 2F, D], down [E, D, F]."""
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    _, order = torch.sort(chosen.flatten())
    counts = torch.zeros(len(up), dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.int32))
    ends, token = counts.cumsum(0, dtype=torch.int32), order // chosen.shape[1]
    gate, value = multiply(x[token], up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = multiply(F.silu(gate) * value, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, token, out * weights.flatten()[order, None].to(x.dtype))


def one_by_one(up: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Callable[..., Any]:
    """One product per chosen expert; who chose whom is looked up beforehand, for nothing."""
    pairs = [(number, *torch.where(chosen == number)) for number in chosen.unique().tolist()]
    gates = [weights[token, place, None] for _, token, place in pairs]

    def run(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for (number, token, _), gate in zip(pairs, gates):
            one, two = F.linear(x[token], up[number]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(one) * two, down[number]) * gate.to(x.dtype))
        return out

    return run


def microseconds(calls: Sequence[Callable[[], Any]], graph: bool) -> float:
    """Of one call, all of them in turn; the median of the replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills caches of the allocator
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
    times = []
    for _ in range(REPLAYS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        if graph:
            captured.replay()
        else:
            for call in calls:
                call()
        ended.record()
        ended.synchronize()
        times.append(1000 * begun.elapsed_time(ended) / len(calls))
    return measure.median(times)


def bandwidth() -> float:
    """GB/s of reading 4 GiB."""
    values = torch.empty(2**30, device="cuda")
    return values.numel() * 4 / microseconds([lambda: values.sum()], graph=True) / 1000


def speed(shape: Shape, tokens: int, widths: list[int]) -> list[list[str]]:
    """Rows of the table for one layer and number of tokens."""
    up = torch.randn(shape.experts, 2 * shape.inner, shape.hidden, device="cuda", dtype=torch.bfloat16) * 0.02
    down = torch.randn(shape.experts, shape.hidden, shape.inner, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    # neighbouring calls choose other experts; every call as a router without favourites would
    scores = [torch.rand(tokens, shape.experts, device="cuda") for _ in range(CALLS)]
    chosen = [score.topk(shape.choices, dim=-1).indices for score in scores]
    weights = [torch.softmax(torch.rand(tokens, shape.choices, device="cuda"), -1) for _ in range(CALLS)]
    together = [partial(grouped, x, up, down, c, w) for c, w in zip(chosen, weights)]
    single = [partial(one_by_one(up, down, c, w), x) for c, w in zip(chosen, weights)]
    plain = min(microseconds(together, True), microseconds(single, True))
    used = sum(len(c.unique()) for c in chosen) / CALLS
    rows = [[shape.name, str(tokens), "bf16", f"{plain:.1f}", "", "1.00",
             f"{used * 6 * shape.hidden * shape.inner / plain / 1000:.0f}"]]  # fmt: skip
    del up, down, together, single
    for bits in widths:
        experts = [expert(shape.hidden, shape.inner, bits, 128, "cuda")[1] for _ in range(shape.experts)]
        layer = triton_packed.pack_layer(experts, "silu")
        del experts
        calls = [partial(gpu.run_layer, x, layer, c, w) for c, w in zip(chosen, weights)]
        taken, launched = microseconds(calls, True), microseconds(calls, False)
        size = sum(stack.nbytes for stack in (*layer.gate_up, *layer.down)) / shape.experts * used
        rows.append([shape.name, str(tokens), f"{bits} bits", f"{taken:.1f}", f"{launched:.1f}",
                     f"{plain / taken:.2f}", f"{size / taken / 1000:.0f}"])  # fmt: skip
    return rows


def main() -> int:
    parser = measure.options(__doc__)
    parser.add_argument("--check-only", action="store_true", help="no speed")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], help="widths whose speed is measured")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    given = parser.parse_args()
    torch.manual_seed(0)
    if gpu.interpreted() and given.check_only:
        print("Triton's interpreter, no GPU\n")
        return 0 if right("cpu", small=True) else 1
    if gpu.interpreted() or not torch.cuda.is_available():
        raise SystemExit("this needs a GPU that torch can use, and no TRITON_INTERPRET")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {gpu.triton.__version__}\n", flush=True)
    if not right("cuda", small=False):
        return 1
    if given.check_only:
        return 0
    print(f"reading: {bandwidth():.0f} GB/s\n", flush=True)
    head = ["layer", "tokens", "weights", "us", "launched, us", "times bf16", "GB/s"]
    rows = [row for shape in SHAPES for tokens in given.tokens for row in speed(shape, tokens, given.bits)]
    print(measure.table(head, rows))
    measure.save(given.json, {"device": torch.cuda.get_device_name(), "head": head, "rows": rows})
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.exit(main())

"""Products with packed matrices on the CPU: one expert matrix, and a whole layer of experts, against torch in bf16.

    python benchmarks/products.py [--threads 1 2] [--isa avx2]

One matrix is [768, 2048], group 128; there are so many copies of it, twice the last cache at least, that each call's
comes from memory. Beside it stand torch's ``F.linear`` in bf16 and its ``_weight_int4pack_mm_for_cpu``, and how fast
the machine reads memory (torch's sum over as many bytes, in the same run). A layer has the shape of Qwen3-30B-A3B: 128
experts of [768, 2048], 8 per token, chosen at random; beside it stands the stock experts module of transformers in
bf16, as it runs by default. First come errors against float64, and how fast codes are laid out.

All in turns; the values are the best of many short runs, because others use the machine: processor time of one thread,
wall time of several. Markdown.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F

from moezip import kernels
from moezip.kernels import native, products
from moezip.runtime import fast

ROWS, COLUMNS, GROUP = 768, 2048, 128
EXPERTS, TOP_K = 128, 8
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # Linux: "307200K"
CACHE = 1024 * int(LAST_CACHE.read_text().strip().rstrip("K")) if LAST_CACHE.exists() else 0
POOL = max(128 * measure.MIB, 2 * CACHE)  # of weights that calls take in turns
TOKENS = (1, 4, 16, 64, 128)

Work = Callable[[], object]


def matrix(rows: int, columns: int, bits: int, chance: np.random.Generator) -> products.Laid:
    """Random codes with zeros, and scales such as trained weights have."""
    blocks, groups = -(-rows // products.BLOCK), columns // GROUP
    codes = products.memory(products.code_bytes(rows, columns, groups, bits))
    codes[:] = np.frombuffer(chance.bytes(codes.nbytes), np.uint8)
    codes = codes.reshape(blocks, columns // products.UNIT, bits, products.LINE)
    scales = np.full((blocks, groups, products.BLOCK), 0.02 / 2**bits, np.float16).view(np.uint16)
    zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    return products.Laid(codes, scales, zeros if bits > 1 else None, None, None, rows, columns, groups, bits, "F16")


def copies(laid: products.Laid, count: int) -> list[products.Laid]:
    """As many of it, the codes in one piece of memory, as the experts of a layer have them."""
    whole = products.memory(count * laid.codes.nbytes).reshape(count, *laid.codes.shape)
    whole[:] = laid.codes
    kind = (laid.rows, laid.columns, laid.groups, laid.bits, laid.kind)
    zeros = laid.zeros
    return [
        products.Laid(each, laid.scales.copy(), None if zeros is None else zeros.copy(), None, None, *kind)
        for each in whole
    ]


def best(work: Sequence[Work], threads: int, seconds: float) -> float:
    """Seconds of one call, the entries of ``work`` in turns: the least over runs of about 2 ms."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    found: list[float] = []
    number = 0
    begun = clock()
    work[0]()
    each = max(1, int(0.002 / max(clock() - begun, 1e-7)))
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found) < 5:
        begun = clock()
        for _ in range(each):
            work[number % len(work)]()
            number += 1
        found.append((clock() - begun) / each)
    return min(found)


def reading(threads: int) -> float:
    """Bytes per second."""
    memory = products.memory(POOL)  # of huge pages, as the codes are
    memory[:] = 0
    parts = torch.from_numpy(memory.view(np.float32)).split(16 * measure.MIB // 4)
    return parts[0].nbytes / best([part.sum for part in parts], threads, 0.6)


def one_matrix(threads: int, seconds: float, library: Any) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    chance = np.random.default_rng(0)
    bandwidth = reading(threads)
    x = torch.randn(1, COLUMNS).bfloat16()
    drawn = torch.randn(ROWS, COLUMNS).bfloat16()
    dense = [drawn.clone() for _ in range(POOL // drawn.nbytes)]
    plain = best([partial(F.linear, x, each) for each in dense], threads, seconds)
    del dense
    packed = [
        torch.randint(0, 255, (ROWS, COLUMNS // 2), dtype=torch.uint8) for _ in range(2 * POOL // (ROWS * COLUMNS))
    ]
    both = torch.ones(COLUMNS // GROUP, ROWS, 2).bfloat16()
    four = best([partial(torch._weight_int4pack_mm_for_cpu, x, each, GROUP, both) for each in packed], threads, seconds)
    del packed
    rows: list[tuple[str, ...]] = [
        ("torch bf16", f"{1e6 * plain:.1f}", "", "", ""),
        ("torch int4pack", f"{1e6 * four:.1f}", f"{plain / four:.1f}", "", ""),
    ]
    values: dict[str, Any] = {"bandwidth": bandwidth, "bf16": plain, "int4pack": four}
    out = np.empty((1, ROWS), np.float32)
    for bits in range(1, 9):
        first = matrix(ROWS, COLUMNS, bits, chance)
        calls = [products.Linear(each, library) for each in copies(first, POOL // first.nbytes)]
        for name, activations, halves in (
            ("exact bf16", "exact", True),
            ("exact fp32", "exact", False),
            ("int8", "int8", True),
        ):
            given = x if halves else x.float()
            work = [partial(each.run_at, given.data_ptr(), halves, 1, out.ctypes.data, activations, threads)
                    for each in calls]  # fmt: skip
            took = best(work, threads, seconds)
            share = first.nbytes / took / bandwidth
            rows.append(
                (
                    f"{bits} bits, {name}",
                    f"{1e6 * took:.1f}",
                    f"{plain / took:.1f}",
                    f"{four / took:.2f}",
                    f"{share:.0%}",
                )
            )
            values[f"{bits} {name}"] = {"seconds": took, "bytes": first.nbytes}
    return rows, values


def errors(library: Any) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Deviations from float64, as a share of that of the results; and how fast packed bytes are laid out, on a core."""
    chance = np.random.default_rng(0)
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    halves = torch.from_numpy(chance.standard_normal((16, COLUMNS), dtype=np.float32)).bfloat16()
    x = halves.double().numpy()
    for bits in range(1, 9):
        laid = matrix(ROWS, COLUMNS, bits, chance)
        scale = np.float64(np.float16(0.02 / 2**bits))
        codes = products.codes(laid, library=library)
        weight = scale * (2.0 * codes - 1 if bits == 1 else codes - 2.0 ** (bits - 1))
        true = x @ weight.T

        def off(found: Any, true: Any = true) -> float:
            return float(np.sqrt(((np.asarray(found, np.float64) - true[: len(found)]) ** 2).mean() / (true**2).mean()))

        def product(given: torch.Tensor, activations: Any, laid: products.Laid = laid) -> Any:
            words = given.view(torch.uint16) if given.dtype == torch.bfloat16 else given
            found = torch.from_numpy(products.linear(laid, words.numpy(), activations=activations, library=library))
            return (found.view(torch.bfloat16).float() if found.dtype == torch.uint16 else found).numpy()

        packed = kernels.pack(codes, bits)
        many = [packed.copy() for _ in range(32)]
        given = (laid.columns, laid.groups, bits, laid.codes, 1)
        took = best([partial(library.relay, each, *given) for each in many], 1, 0.2)
        found = {
            "fp32": off(product(halves.float(), "exact")),
            "bf16, 1 token": off(product(halves[:1], "exact")),
            "bf16, 16 tokens": off(product(halves, "exact")),
            "int8": off(product(halves.float(), "int8")),
            "torch bf16": off(F.linear(halves, torch.from_numpy(weight).bfloat16()).float()),
        }
        rows.append((f"{bits}", *(f"{each:.1e}" for each in found.values()), f"{packed.nbytes / took / 1e9:.1f}"))
        values[f"{bits}"] = {**found, "layout_bytes_per_second": packed.nbytes / took}
    return rows, values


def stock_layer() -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=COLUMNS, moe_intermediate_size=ROWS, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"  # what from_pretrained chooses
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module = module.to_empty(device="cpu").bfloat16()
    for parameter in module.parameters():
        parameter.data.view(-1)[:] = torch.randn(2**20).bfloat16().repeat(parameter.numel() // 2**20) * 0.02
    return module


def routes(tokens: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs of a layer: x [T, D], ids and weights [T, k]."""
    torch.manual_seed(tokens)
    return [
        (
            torch.randn(tokens, COLUMNS).bfloat16(),
            torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]),
            torch.full((tokens, TOP_K), 1 / TOP_K).bfloat16(),
        )
        for _ in range(count)
    ]


def layers(
    threads: Sequence[int], widths: Sequence[int], seconds: float, library: Any
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    chance = np.random.default_rng(0)
    stock, tables = stock_layer(), {}
    for bits in widths:
        up, down = matrix(ROWS, COLUMNS, bits, chance), matrix(COLUMNS, ROWS, bits, chance)
        parts = [copies(each, EXPERTS) for each in (up, up, down)]
        tables[bits] = products.Experts(list(zip(*parts, strict=True)), COLUMNS, library=library)
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for count in threads:
        torch.set_num_threads(count)
        for tokens in TOKENS:
            given = routes(tokens, 16)
            plain = best([partial(stock, *each) for each in given], count, 2 * seconds)
            row, found = [f"{count}", f"{tokens}", f"{1e6 * plain:.0f}"], {"bf16": plain}
            for bits, table in tables.items():
                for activations in ("exact", "int8"):
                    work = [partial(fast.experts, table, *each, ("silu", 1.0, 0.0), activations) for each in given]
                    took = best(work, count, seconds)
                    row.append(f"{1e6 * took:.0f} ({plain / took:.1f}x)")
                    found[f"{bits} {activations}"] = took
            rows.append(tuple(row))
            values[f"{count} threads, {tokens} tokens"] = found
    return rows, values


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=("matrix", "layers"), help="one of the two")
    parser.add_argument("--isa", help="another instruction set than the best one")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of the layers")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    given = parser.parse_args()
    most = str(max(given.threads))
    if os.environ.get("OMP_NUM_THREADS") != most:  # read when a library is imported: begin again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": most})
    torch.set_grad_enabled(False)
    library = native.find(given.isa)
    measure.say(f"cache: {CACHE // measure.MIB} MiB")
    measure.say(f"kernels: {library.isa}, of {kernels.status().why}")
    torch.set_num_threads(1)
    rows, off = errors(library)
    head: tuple[str, ...] = ("bits", "fp32", "bf16, 1 token", "bf16, 16", "int8", "torch bf16", "laid out, GB/s")
    print(f"Error against float64, results in the dtype of the activations\n\n{measure.table(head, rows)}\n")
    values: dict[str, Any] = {"isa": library.isa, "errors": off}
    for threads in given.threads:
        torch.set_num_threads(threads)
        if given.only == "layers":
            break
        rows, found = one_matrix(threads, given.seconds, library)
        print(
            f"{threads} threads, {library.isa}; memory is read at {found['bandwidth'] / 1e9:.1f} GB/s, "
            f"{POOL // measure.MIB} MiB of weights in turns\n"
        )
        head = ("[768, 2048], 1 token", "us", "torch bf16 x", "int4pack x", "of bandwidth")
        print(measure.table(head, rows), end="\n\n", flush=True)
        values[f"{threads} threads"] = found
    if given.only == "matrix":
        return measure.save(given.json, values)
    rows, found = layers(given.threads, given.bits, given.seconds, library)
    heads: tuple[str, ...] = (
        "threads",
        "tokens",
        "bf16 us",
        *(f"{b} bits {a}" for b in given.bits for a in ("exact", "int8")),
    )
    print(measure.table(heads, rows))
    measure.save(given.json, {**values, "layers": found})


if __name__ == "__main__":
    main()

"""What stands between packed matrices, for a token or a few on the CPU, against torch: microseconds and ratios.

    python benchmarks/unpacked.py [--threads 1 2]

Plain matrices in bf16 (``F.linear``; so many copies that each call's comes from memory), RMS norms as transformers
writes them, the attention of one query (torch's kernel for it, and the products in float32 that moezip falls back to),
and an attention layer of transformers whole, before and after ``moezip.runtime.unpacked.use``. In turns; the least of
many short runs, processor time of one thread, wall time of several. Markdown.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from products import POOL, best, reading

from moezip.kernels import products
from moezip.runtime import norms, one_query, one_token, unpacked

MATRICES = [(64, 2048, 1), (768, 2048, 1), (2048, 2048, 1), (2048, 2048, 2), (2048, 2048, 4), (2048, 2048, 8),
            (2048, 2048, 16), (8192, 2048, 1)]  # fmt: skip
# heads, of keys, keys, width
QUERIES = [(16, 4, 64, 64), (16, 4, 512, 64), (32, 4, 512, 128), (32, 8, 4096, 128)]


def matrices(threads: int, seconds: float) -> list[tuple[str, ...]]:
    bandwidth = reading(threads)
    rows: list[tuple[str, ...]] = []
    for height, columns, tokens in MATRICES:
        drawn = torch.randn(height, columns).bfloat16()
        plain = [torch.nn.Parameter(drawn.clone(), False) for _ in range(max(2, POOL // drawn.nbytes))]
        ours = [unpacked.Weight.of(each) for each in plain]
        x = torch.randn(tokens, columns).bfloat16()
        theirs = best([partial(F.linear, x, each) for each in plain], threads, seconds)
        taken = best([partial(F.linear, x, each) for each in ours], threads, seconds)
        rows.append((
            f"[{height}, {columns}], {tokens} tokens", f"{1e6 * theirs:.1f}", f"{1e6 * taken:.1f}",
            f"{theirs / taken:.1f}", f"{drawn.nbytes / taken / bandwidth:.0%}",
        ))  # fmt: skip
    return rows


def between(threads: int, seconds: float) -> list[tuple[str, ...]]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    rows: list[tuple[str, ...]] = []
    for tokens, columns in ((1, 2048), (16, 64), (64, 2048)):
        norm: Any = Qwen3MoeRMSNorm(columns).bfloat16()
        x = torch.randn(tokens, columns).bfloat16()
        theirs = best([partial(norm, x)], threads, seconds)
        norms.use(norm)
        taken = best([partial(norm, x)], threads, seconds)
        rows.append((f"norm [{tokens}, {columns}]", f"{1e6 * theirs:.1f}", f"{1e6 * taken:.1f}",
                     f"{theirs / taken:.1f}", ""))  # fmt: skip
    for heads, shared, length, width in QUERIES:
        query = torch.randn(1, heads, 1, width).bfloat16()
        key, value = torch.randn(2, 1, shared, length, width).bfloat16()
        stock = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=heads > shared)
        theirs = best([stock], threads, seconds)
        floats = best([partial(one_query.one_query, query, key, value, None, None)], threads, seconds)
        taken = best([partial(one_query.on_the_library, query, key, value, None, None)], threads, seconds)
        rows.append((f"{heads} heads of {width}, {length} keys of {shared}", f"{1e6 * theirs:.1f}",
                     f"{1e6 * taken:.1f}", f"{theirs / taken:.1f}", f"float32: {1e6 * floats:.1f}"))  # fmt: skip
    return rows


def layer(threads: int, seconds: float) -> tuple[str, ...]:
    """A layer of the shape of ``decode.py``'s, with a cache of 128 tokens that gives what it has."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    config = Qwen3MoeConfig(hidden_size=2048, num_attention_heads=16, num_key_value_heads=4)
    config.head_dim = 64  # type: ignore[attr-defined]
    config._attn_implementation = "sdpa"
    made: Any = Qwen3MoeAttention(config, 0).bfloat16().eval()

    class Cache:
        keys, values = torch.randn(2, 1, 4, 128, 64).bfloat16()

        def update(self, key: Any, value: Any, *_: Any) -> Any:
            return self.keys, self.values

    positions = tuple(torch.randn(2, 1, 1, 64).bfloat16())
    x = torch.randn(1, 1, 2048).bfloat16()
    call = partial(made, x, position_embeddings=positions, attention_mask=None, past_key_values=Cache())
    theirs = best([call], threads, seconds)

    class Model(torch.nn.Module):
        """What ``use`` asks of a model of transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.inner = config, made

        def _can_set_attn_implementation(self) -> bool:
            return True

        def set_attn_implementation(self, name: str) -> None:
            config._attn_implementation = name

    unpacked.use(Model())
    assert isinstance(made, one_token.Attention)
    taken = best([call], threads, seconds)
    return ("attention layer, matrices in the cache", f"{1e6 * theirs:.1f}", f"{1e6 * taken:.1f}",
            f"{theirs / taken:.1f}", "")  # fmt: skip


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--seconds", type=float, default=0.4, help="for each value")
    given = parser.parse_args()
    # as many as the most; each round sets its own. Read when a library is imported: begin again
    wanted = str(max(given.threads))
    if os.environ.get("OMP_NUM_THREADS") != wanted:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": wanted})
    if not products.available():
        raise SystemExit("there is no C++ library to measure")
    found = {}
    with torch.no_grad():
        for threads in given.threads:
            torch.set_num_threads(threads)
            rows = [*matrices(threads, given.seconds), *between(threads, given.seconds), layer(threads, given.seconds)]
            print(f"{threads} threads\n")
            print(measure.table(("bf16", "torch us", "us", "x", "of bandwidth"), rows), end="\n\n", flush=True)
            found[f"{threads} threads"] = rows
    measure.save(given.json, found)


if __name__ == "__main__":
    main()

"""Time of a layer's experts as thin factors against dense ones, on the CPU.

    python benchmarks/factored.py --hidden 2048 --width 768 --experts 32 --top-k 4

Random weights and routing; both are moezip's own experts modules on the same tokens. ``share`` is the part of the
numbers that the factors hold. Prints milliseconds per call, the median of some, for one token and for many. Markdown.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rows", type=float, default=0.1, help="share of whole rows, in a second measurement")
    parser.add_argument("--calls", type=int, default=9)
    given = parser.parse_args()

    import torch

    from moezip.arch.ragged import RaggedExperts
    from moezip.calibrate.experts import register
    from moezip.formats.factors import INDEX
    from moezip.merge.mc_smoe import McSmoeParams, sizes
    from moezip.runtime.factored import FactoredExperts, FactoredMatrix

    names = {role: f"{role}_proj" for role in ("gate", "up", "down")}
    stock = SimpleNamespace(
        config=SimpleNamespace(_experts_implementation=register()), has_bias=False, is_concatenated=True,
        _apply_gate=lambda inner: torch.nn.functional.silu(inner.chunk(2, -1)[0]) * inner.chunk(2, -1)[1],
    )  # fmt: skip

    def experts(share: float | None, rows: float) -> Any:
        from moezip.arch.spec import LayerFacts

        made: type[RaggedExperts] = RaggedExperts if share is None else FactoredExperts
        module: Any = made(stock, (given.width,) * given.experts, names, given.hidden, dtype=torch.bfloat16)
        if share is not None:
            facts = LayerFacts(0, given.experts, given.top_k, given.hidden, given.width)
            for role, size in sizes(facts, McSmoeParams(share=share, rows=rows)).items():
                for expert in range(given.experts):
                    shape = module.matrix(expert, role).weight.shape
                    matrix = FactoredMatrix(size, shape[0], shape[1], None, dtype=torch.bfloat16)
                    getattr(module, str(expert)).add_module(names[role], matrix)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if name.endswith(INDEX):
                    tensor.copy_(torch.arange(len(tensor)))
                else:
                    tensor.normal_(std=0.02)
        module.join()
        return module

    def milliseconds(module: Any, tokens: int) -> float:
        chance = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, given.hidden, generator=chance).bfloat16()
        ids = torch.rand(tokens, given.experts, generator=chance).topk(given.top_k).indices
        gates = torch.full(ids.shape, 1 / given.top_k, dtype=torch.bfloat16)
        times = []
        with torch.inference_mode():
            for _ in range(given.calls + 2):
                begun = time.perf_counter()
                module(x, ids, gates)
                times.append(time.perf_counter() - begun)
        return 1e3 * measure.median(times[2:])

    rows = []
    plans: list[tuple[str, float | None, float]] = [("dense", None, 0.0)]
    for share in given.shares:
        plans += [(f"factors {share:g}", share, 0.0), (f"factors {share:g} and rows {given.rows:g}", share, given.rows)]
    for label, each, kept in plans:
        module = experts(each, kept)
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        rows.append((label, f"{size / 1e6:.1f}", *(f"{milliseconds(module, n):.2f}" for n in given.tokens)))
    print(f"{given.experts} experts of {given.width}, hidden {given.hidden}, top {given.top_k}, "
          f"{torch.get_num_threads()} threads, bf16\n")  # fmt: skip
    print(measure.table(("experts", "MB", *(f"{n} tokens, ms" for n in given.tokens)), rows))


if __name__ == "__main__":
    main()

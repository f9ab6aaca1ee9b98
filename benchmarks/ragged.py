"""Time per kept neuron of ragged experts against the stock ones.

    python benchmarks/ragged.py

One layer's experts of a Qwen3-MoE shape with random weights, in memory, in bf16. The stock module runs ``grouped_mm``,
the transformers default. The ragged ones run moezip's forward: once with every width as configured, once with widths
drawn between none and all of the neurons. A neuron is counted for every token that is sent to its expert; fewer
neurons should cost less time in proportion, so the time per neuron is what is compared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import measure

if TYPE_CHECKING:
    import torch


def modules(hidden: int, experts: int, width: int, top_k: int, widths: Sequence[int]) -> tuple[Any, Any, Any]:
    """The stock module, the ragged one with the same weights, and one with ``widths``."""
    import torch
    from torch import nn
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from moezip.arch.ragged import RaggedExperts
    from moezip.calibrate.experts import register

    settings = {"hidden_size": hidden, "num_experts": experts, "moe_intermediate_size": width,
                "num_experts_per_tok": top_k}  # fmt: skip
    configs = [AutoConfig.for_model("qwen3_moe", **settings) for _ in range(2)]
    configs[0]._experts_implementation, configs[1]._experts_implementation = "grouped_mm", register()
    stock, like = (Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False) for config in configs)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.02)
    found: list[Any] = [stock]
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    for row in ((width,) * experts, tuple(widths)):
        module = RaggedExperts(like, row, names, hidden, dtype=torch.bfloat16)
        for expert, own in enumerate(row):
            if own:
                gate, up = stock.gate_up_proj[expert].chunk(2)
                values = {"gate": gate[:own], "up": up[:own], "down": stock.down_proj[expert][:, :own]}
                for role, value in values.items():
                    module.matrix(expert, role).weight = nn.Parameter(value.clone(), requires_grad=False)
        module.join()
        found.append(module)
    return found[0], found[1], found[2]


def seconds(module: Callable[..., Any], given: tuple[torch.Tensor, ...], repeats: int) -> float:
    """Of one call, mean over ``repeats``, after one that is not counted."""
    import torch

    with torch.inference_mode():
        module(*given)
        begun = time.perf_counter()
        for _ in range(repeats):
            module(*given)
    return (time.perf_counter() - begun) / repeats


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    import torch

    choice = random.Random(0)
    widths = [choice.randint(0, given.width) for _ in range(given.experts)]
    stock, same, slim = modules(given.hidden, given.experts, given.width, given.top_k, widths)
    generator, rows, values = torch.Generator().manual_seed(0), [], {}
    for tokens in given.tokens:
        hidden = torch.randn(tokens, given.hidden, generator=generator).to(torch.bfloat16)
        scores = torch.rand(tokens, given.experts, generator=generator)
        gates, ids = scores.softmax(-1).topk(given.top_k)
        call = (hidden, ids, gates.to(torch.bfloat16))
        if not torch.allclose(stock(*call), same(*call), atol=0.01, rtol=0.05):
            raise SystemExit("the two modules disagree")
        repeats = max(1, min(20, 512 // tokens))
        arms = {"stock": stock, "same widths": same, "random widths": slim}
        work = {name: partial(seconds, module, call, repeats) for name, module in arms.items()}
        found = measure.in_turns(given.rounds, work)
        full = tokens * given.top_k * given.width
        kept = sum(widths[expert] for expert in ids.flatten().tolist())
        neurons = {"stock": full, "same widths": full, "random widths": kept}
        values[str(tokens)] = {"seconds": found, "neurons": neurons}
        base = measure.median(found["stock"]) / full
        for name, times in found.items():
            each = measure.median(times) / max(neurons[name], 1)
            rows.append((f"{name}, {tokens} tokens", f"{measure.median(times) * 1e3:.2f}",
                         f"{neurons[name] / full:.0%}", f"{each * 1e9:.2f}", f"{each / base:.2f}"))  # fmt: skip
    print(measure.table(("experts", "ms", "neurons", "ns per neuron", "ratio"), rows))
    measure.save(given.json, {"ragged": values})


if __name__ == "__main__":
    main()

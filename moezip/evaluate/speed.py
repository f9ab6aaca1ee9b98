"""Speed and memory of a model and its reference, as ratios: both in one process, measured in turns.

A machine that does other things besides gives other figures by the minute. So the two take turns within every round,
and what counts is the ratio of medians; the absolute figures are of this machine at this time. Memory is that of a
process of its own for each (``moezip.evaluate.footprint``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moezip.evaluate.footprint import Footprint, footprint
from moezip.evaluate.whole import load_whole

PREFILL_TOKENS = 512
DECODE_PROMPT, DECODE_TOKENS = 16, 32
WARM_UP, ROUNDS = 1, 5


@dataclass(frozen=True, slots=True)
class Pace:
    """One model, batch 1.

    Attributes:
        prefill: prompt tokens per second, of a prompt of ``PREFILL_TOKENS`` up to its first new token.
        decode: new tokens per second, of ``DECODE_TOKENS`` greedy ones after a prompt of ``DECODE_PROMPT``.
        memory: what it takes for that.
    """

    prefill: float
    decode: float
    memory: Footprint

    def to_json(self) -> dict[str, float | None]:
        """``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``resident_bytes`` (loaded),
        ``prefill_peak_bytes``, ``decode_peak_bytes`` (null where the system does not tell)."""
        return {
            "prefill_tokens_per_second": self.prefill,
            "decode_tokens_per_second": self.decode,
            "resident_bytes": self.memory.loaded,
            "prefill_peak_bytes": self.memory.prefill,
            "decode_peak_bytes": self.memory.decode,
        }


@dataclass(frozen=True, slots=True)
class Speed:
    """A model beside its reference.

    Attributes:
        prefill_tokens: of the prompt that is read. decode_tokens: that are written. rounds: that the medians are of.
    """

    model: Pace
    reference: Pace
    prefill_tokens: int
    decode_tokens: int
    rounds: int

    def ratios(self) -> dict[str, float | None]:
        """Model / reference: of the speeds ``prefill`` and ``decode`` (more is faster), and of the memory ``resident``,
        ``prefill_peak`` and ``decode_peak`` (less is smaller; None where the system does not tell)."""
        found: dict[str, float | None] = {}
        theirs = self.reference.to_json()
        for name, value in self.model.to_json().items():
            short = name.removesuffix("_tokens_per_second").removesuffix("_bytes")
            other = theirs[name]
            found[short] = value / other if value is not None and other else None
        return found

    def to_json(self) -> dict[str, Any]:
        """``prefill_tokens``, ``decode_tokens``, ``rounds``, the model's own figures, ``against`` (the reference's),
        ``ratios``."""
        return {
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "rounds": self.rounds,
            **self.model.to_json(),
            "against": self.reference.to_json(),
            "ratios": self.ratios(),
        }


def measure_speed(
    model: Path,
    reference: Path,
    *,
    longest: int | None,
    vocabulary: int,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Speed:
    """Measures the memory of each, loads both and has them take turns. Prompts are random tokens, the same for both.

    Args:
        longest: the smaller of the two maxima in tokens, None if there is none.
        progress: called with (rounds done, rounds).
    """
    import torch

    width = PREFILL_TOKENS if longest is None else min(PREFILL_TOKENS, longest - 1)
    short = min(DECODE_PROMPT, width)
    new = DECODE_TOKENS if longest is None else min(DECODE_TOKENS, longest - short)
    # before the two are in this process, so that there are never three
    folders = (model, reference)
    memory = [footprint(folder, device, width, short, new) for folder in folders]
    loaded = [load_whole(folder, device) for folder in folders]
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, width), generator=chance)
    prefill: list[list[float]] = [[], []]
    decode: list[list[float]] = [[], []]
    for number in range(WARM_UP + ROUNDS):
        for which, each in enumerate(loaded):
            first, rest = write(each, ids, 1), write(each, ids[:, :short], new)
            if number >= WARM_UP:
                prefill[which].append(width / first)
                decode[which].append(new / rest)
        progress(number + 1, WARM_UP + ROUNDS)
    ours, theirs = (Pace(median(prefill[i]), median(decode[i]), memory[i]) for i in range(2))
    return Speed(ours, theirs, width, new, ROUNDS)


def write(model: Any, ids: Any, new: int) -> float:
    """Seconds to read a prompt [1, S] and write exactly ``new`` greedy tokens."""
    import torch

    ids = ids.to(model.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - begun


def maximum(configs: Sequence[dict[str, Any]]) -> int | None:
    """The smallest ``max_position_embeddings``, None where none is named."""
    found = [int(config["max_position_embeddings"]) for config in configs if config.get("max_position_embeddings")]
    return min(found, default=None)

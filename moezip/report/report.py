"""The report: what a compression did and what it cost, as one record and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Report:
    """What every compressing command says at its end.

    Attributes:
        out: the output folder.
        bytes_before, bytes_after: sums of the ``.safetensors`` tensors.
        bits_per_weight: stored bits, scales included, over the weights they stand for.
        experts_before, experts_after: per MoE layer.
        predicted_nats: predicted rise of the loss in nats per token; None with a reason where a method has no price.
        price_factors: by kind of decision, what probes corrected its prices by (``moezip.plan.factors``).
        seconds: of the whole command. peak_rss_bytes: of the process; in a recipe, of the process during the
            job.
        stages: seconds by stage.
        method, settings, source, statistics: provenance.
        protected: per layer, the super experts that the guard kept.
        unrouted: per layer, how many experts no calibration token reached.
        stock: loads in stock transformers; else ``form`` says what it is: moezip's own format (``moezip``), the one of
            vLLM with constants for dropped experts (``mone``), or a packed one of others.
        notes: what the user should know about the output.
    """

    out: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    experts_before: list[int]
    experts_after: list[int]
    predicted_nats: float | None
    predicted_nats_reason: str | None
    seconds: float
    peak_rss_bytes: int
    stages: Mapping[str, float] = field(default_factory=dict)
    price_factors: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    protected: Mapping[str, list[int]] = field(default_factory=dict)
    unrouted: Mapping[str, int] = field(default_factory=dict)
    stock: bool = True
    form: Literal["stock", "moezip", "mone", "compressed-tensors", "gptq", "gguf"] = "stock"
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def begin_peak() -> None:
    """Has ``peak_rss_bytes`` count from now on, where the system can do that (Linux); else it goes on counting."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, or since ``begin_peak``."""
    import resource
    import sys
    from pathlib import Path

    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the peak of the process that started this one, too
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

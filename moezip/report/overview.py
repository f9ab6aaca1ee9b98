"""``moezip inspect``: what a checkpoint is, from its config and headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from moezip.arch.experts import Decoded, decoded
from moezip.arch.families import identify
from moezip.arch.layout import tripwire_of
from moezip.arch.mone import Substitution
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.source import Source
from moezip.report import fitting


@dataclass(frozen=True, slots=True)
class Overview:
    """The numbers of one checkpoint.

    Attributes:
        experts: E per MoE layer; those that are kept where others are constants.
        routed: in that case (MoNE), how many experts the routers choose among; else None.
        parameters, expert_parameters: weights, whatever they are stored in (scales not counted).
        bytes, expert_bytes: as stored. largest_layer_bytes: of one decoder layer, decoded: what streaming holds.
        dtype: of most bytes.
        quantized_parameters: those stored as codes. bits_per_weight: that each of them takes, scales, zeros and padding
            counted; None where there are none. grids: how many matrices are packed on each grid, widest first.
        fits: bytes as it is stored, and with fewer of its experts. fits_in: bytes at other bits, and which of this
            machine's memories hold them (``moezip.report.fitting``).
    """

    architecture: str
    model_type: str
    layers: int
    moe_layers: list[int]
    experts: list[int]
    top_k: int
    hidden: int
    width: int
    groups: int
    shared: int
    parameters: int
    expert_parameters: int
    active_parameters: int
    bytes: int
    expert_bytes: int
    largest_layer_bytes: int
    dtype: str
    quantization: str | None
    quantized_parameters: int
    bits_per_weight: float | None
    grids: dict[str, int]
    routed: int | None
    fits: dict[str, int]
    fits_in: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def overview(source: Source) -> Overview:
    """Raises ArchitectureError for a model that moezip does not know."""
    config = source.config
    entry = identify(config, source.folder)
    facts: list[LayerFacts] = entry.layer_facts(config)
    trip = tripwire_of(entry, config)
    substitution = Substitution.of(config)
    dropped = {} if substitution is None else substitution.dropped
    stored = [source.spec(name) for name in source.names() if name != trip]
    kinds = {spec.name: entry.claim(spec.name, config).kind for spec in stored}
    plain = decoded(source)
    sizes: Counter[str] = Counter()
    layer_sizes: Counter[str] = Counter()
    for spec in (plain.spec(name) for name in plain.names() if name != trip):
        kind = entry.claim(spec.name, config).kind
        sizes["experts" if kind in ("expert", "fused") else kind] += spec.elements
        if kind == "other" and f"{entry.layers}." in spec.name and len(spec.shape) == 2:
            sizes["matrices"] += spec.elements
        _, _, rest = spec.name.partition(f"{entry.layers}.")
        if rest and kind != "extra":
            layer_sizes[rest.partition(".")[0]] += spec.bytes
    bytes_by_dtype: Counter[str] = Counter()
    for spec in stored:
        bytes_by_dtype[spec.dtype] += spec.bytes
    total = sum(spec.bytes for spec in stored)
    expert_bytes = sum(spec.bytes for spec in stored if kinds[spec.name] in ("expert", "fused"))
    matrices = sizes.pop("matrices", 0)
    parameters, in_experts = sum(sizes.values()), sizes["experts"]
    memory = fitting.memories()
    fits_in = fitting.choices(in_experts, matrices, parameters - in_experts - matrices, memory)
    share = facts[0].top_k / facts[0].experts
    coded = list(plain.stored.values()) if isinstance(plain, Decoded) else []
    weights = sum(each.plain.elements for each in coded)
    codes = sum(piece.bytes for each in coded for piece in each.pieces)
    grids = sorted((each.grid for each in coded if each.grid is not None), key=lambda grid: (-grid.bits, str(grid)))
    return Overview(
        architecture=str((config.get("architectures") or [entry.name])[0]),
        model_type=entry.name,
        layers=int(entry.value(config, entry.layers_key)),
        moe_layers=[fact.layer for fact in facts],
        experts=[fact.experts - len(dropped.get(fact.layer, ())) for fact in facts],
        top_k=facts[0].top_k,
        hidden=facts[0].hidden,
        width=facts[0].width,
        groups=facts[0].groups,
        shared=facts[0].shared,
        parameters=parameters,
        expert_parameters=in_experts,
        active_parameters=round(parameters - in_experts * (1 - share)),
        bytes=total,
        expert_bytes=expert_bytes,
        largest_layer_bytes=max(layer_sizes.values(), default=0),
        dtype=bytes_by_dtype.most_common(1)[0][0] if bytes_by_dtype else "",
        quantization=(config.get("quantization_config") or {}).get("quant_method"),
        quantized_parameters=weights,
        bits_per_weight=8 * codes / weights if weights else None,
        grids=dict(Counter(map(str, grids))),
        routed=facts[0].experts if dropped else None,
        fits={
            "as it is": total,
            "half the experts": total - expert_bytes // 2,
            "a quarter of the experts": total - expert_bytes * 3 // 4,
        },
        fits_in=fitting.to_json(fits_in, memory),
    )

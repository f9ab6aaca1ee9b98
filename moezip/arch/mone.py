"""MoNE checkpoints (arXiv 2507.00390), as vLLM 0.33 reads them: dropped experts replaced by constants, routers whole.

``config.json`` keeps the source's counts and adds::

    "approximate_experts": {"<decoder layer>": [number of a dropped expert, ...], ...}

Kept experts keep their numbers and tensors; in place of a dropped one's there is ``<experts>.<number>.approx_value``
[D]. Router tensors have all their entries and route as ever: a dropped expert that is chosen adds its constant times
its gate, and the gates of the kept are not shared out anew. That is another model than the one without these experts,
whose router can only choose what is there. (vLLM: ``fused_moe/expert_substitution.py``, and the file of the same name
among its models.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezip.arch.layout import FIX, Layout
from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    from moezip.arch.spec import Architecture, LayerFacts

KEY = "approximate_experts"
LEAF = "approx_value"


@dataclass(frozen=True, slots=True)
class Substitution:
    """Which experts are constants.

    Attributes:
        dropped: per decoder layer that has any, their numbers in ascending order.
    """

    dropped: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Substitution | None:
        """What a config names, None where it names none.

        Raises:
            ArchitectureError: the list is damaged, or stands in a config of quantized experts, which vLLM refuses.
        """
        given = config.get(KEY)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise _corrupt(f"{KEY} is no table of layers")
        dropped: dict[int, tuple[int, ...]] = {}
        for key, row in given.items():
            if not str(key).isdecimal() or str(int(key)) != str(key):
                raise _corrupt(f"{KEY} has the key {key!r}, which is no decoder layer")
            if not isinstance(row, Sequence) or isinstance(row, str) or not all(map(_is_number, row)):
                raise _corrupt(f"{KEY}[{key}] is no list of experts")
            if len(set(row)) != len(row):
                raise _corrupt(f"{KEY}[{key}] names an expert twice")
            if row:
                dropped[int(key)] = tuple(sorted(row))
        if dropped and config.get("quantization_config") is not None:
            raise ArchitectureError(
                f"config.json has both {KEY} and a quantization_config, which vLLM refuses and moezip cannot read",
                where="config.json",
                next="start from the unquantized form",
            )
        return cls(dict(sorted(dropped.items()))) if dropped else None

    def to_config(self) -> dict[str, list[int]]:
        """What stands under ``approximate_experts``."""
        return {str(layer): list(row) for layer, row in sorted(self.dropped.items())}

    def layout(self, architecture: Architecture, facts: Sequence[LayerFacts]) -> Layout:
        """Every expert's width, 0 for the dropped: what is left to compute.

        Args:
            facts: of the same config.

        Raises:
            ArchitectureError: a family that stores all experts of a layer in one tensor, layers or experts that are
                not there, or a layer that keeps none.
        """
        if any(tensor.fused for tensor in architecture.experts):
            raise ArchitectureError(
                f"{architecture.name} stores all experts of a layer in one tensor, of which {KEY} can drop none",
                where="config.json",
                next="keep the same number of experts in every layer (--scope layer)",
            )
        if strangers := sorted(self.dropped.keys() - {fact.layer for fact in facts}):
            raise _corrupt(f"{KEY} lists layer {strangers[0]}, which has no experts")
        widths = {}
        for fact in facts:
            gone = self.dropped.get(fact.layer, ())
            if gone and gone[-1] >= fact.experts:
                raise _corrupt(f"{KEY}[{fact.layer}] names expert {gone[-1]}, there are {fact.experts} (from 0)")
            if len(gone) == fact.experts:
                raise _corrupt(f"{KEY}[{fact.layer}] leaves no expert")
            widths[fact.layer] = tuple(0 if e in gone else fact.width for e in range(fact.experts))
        return Layout(widths)


def constant(architecture: Architecture, layer: int, expert: int) -> str:
    """Name of the tensor that stands for a dropped expert."""
    down = next(tensor for tensor in architecture.experts if tensor.role == "down")
    return f"{down.template.format(layer=layer, expert=expert).rpartition(f'.{expert}.')[0]}.{expert}.{LEAF}"


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _corrupt(what: str) -> ArchitectureError:
    return ArchitectureError(what, where="config.json", next=FIX)

"""Ragged checkpoints: layers with different numbers of experts, experts of different widths.

On disk such a checkpoint is its source with fewer tensors of smaller shapes. ``config.json`` keeps the source's own
counts and adds::

    "quantization_config": {"quant_method": "moezip", "version": 1, "bits": 16,
                            "experts": {"<decoder layer>": [width of expert 0, of expert 1, ...], ...}}

and, where the source stored its matrices in fp8 blocks, its own ``quantization_config`` under ``"stored"``: then so do
they here, and the 16 bits are those of what is decoded.

    and, where experts were merged and the router still has the rows of all of them, ``"remap": {"<decoder layer>":
    [expert that stands for router row 0, for row 1, ...], ...}`` (then ``"version": 2``).

Every MoE layer is listed. Every expert has tensors of its own, gate and up [w, D], down [D, w], under the family's
names or, where the family has one tensor for all experts, those of ``Architecture.split``. An expert of width 0, which
outputs nothing but its bias if it has one, has no other tensors. Router tensors have as many entries as the layer has
experts. One more tensor, the tripwire, makes loaders that do not know the format stop: see ``tripwire``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moezip.errors import ArchitectureError

if TYPE_CHECKING:
    from moezip.arch.spec import Architecture, LayerFacts

METHOD = "moezip"
VERSION = 1
REMAPPED = 2  # the version of a layout with a remap, which older readers would not follow
REMAP = "remap"
BITS = 16
STORED = "stored"
# The tripwire's dtype (its safetensors name), shape and value.
TRIPWIRE_DTYPE, TRIPWIRE_SHAPE, TRIPWIRE_VALUE = "U8", (1,), 0
FIX = "write the checkpoint again with moezip, or use the config.json that came with the weights"


def own_format(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its checkpoint is of moezip's own format."""
    given = config.get("quantization_config")
    return isinstance(given, Mapping) and given.get("quant_method") == METHOD


@dataclass(frozen=True, slots=True)
class Layout:
    """How wide every expert is.

    Attributes:
        widths: per MoE layer the inner size of each of its experts; 0 for one that outputs nothing.
        stored: the ``quantization_config`` of the codes that matrices are stored as; None for plain numbers.
        remap: for the layers whose router has more rows than there are experts: which expert each row means.
    """

    widths: Mapping[int, tuple[int, ...]]
    stored: Mapping[str, Any] | None = None
    remap: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def rows(self, layer: int) -> int:
        """How many rows the layer's router has."""
        return len(self.remap.get(layer, self.widths[layer]))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layout | None:
        """The layout that a config names, None where it names none.

        Raises:
            ArchitectureError: the config is of moezip's format, but not as this version reads it.
        """
        if not own_format(config):
            return None
        given = config["quantization_config"]
        if given.get("version") != (REMAPPED if REMAP in given else VERSION) or given.get("bits") != BITS:
            raise ArchitectureError(
                f"the checkpoint is of version {given.get('version')!r} with {given.get('bits')!r} bits of moezip's "
                f"format; this moezip reads version {VERSION} ({REMAPPED} with a {REMAP}), {BITS} bits",
                where="config.json",
                next="use a newer moezip",
            )
        experts = given.get("experts")
        if not isinstance(experts, Mapping) or not experts:
            raise _corrupt("quantization_config.experts is no table of layers")
        widths: dict[int, tuple[int, ...]] = {}
        for key, row in experts.items():
            if not str(key).isdecimal() or str(int(key)) != str(key):
                raise _corrupt(f"quantization_config.experts has the key {key!r}, which is no decoder layer")
            if not isinstance(row, Sequence) or isinstance(row, str) or not row:
                raise _corrupt(f"quantization_config.experts[{key}] is no list of widths")
            if not all(isinstance(width, int) and not isinstance(width, bool) and width >= 0 for width in row):
                raise _corrupt(f"quantization_config.experts[{key}] holds something that is no width")
            widths[int(key)] = tuple(row)
        stored = given.get(STORED)
        if stored is not None and not (isinstance(stored, Mapping) and stored.get("quant_method") == "fp8"):
            raise _corrupt(f"quantization_config.{STORED} names no codes that moezip keeps")
        return cls(dict(sorted(widths.items())), stored, _remap(given.get(REMAP) or {}, widths))

    @classmethod
    def uniform(cls, facts: Sequence[LayerFacts]) -> Layout:
        """The layout of a model whose experts are all alike."""
        return cls({fact.layer: (fact.width,) * fact.experts for fact in facts})

    def to_config(self) -> dict[str, Any]:
        """The ``quantization_config`` that names this layout."""
        experts = {str(layer): list(row) for layer, row in sorted(self.widths.items())}
        found: dict[str, Any] = {"quant_method": METHOD, "version": VERSION, "bits": BITS, "experts": experts}
        if self.remap:
            found["version"] = REMAPPED
            found[REMAP] = {str(layer): list(row) for layer, row in sorted(self.remap.items())}
        return found if self.stored is None else {**found, STORED: dict(self.stored)}

    def facts(self, facts: Sequence[LayerFacts]) -> list[LayerFacts]:
        """``facts`` of the config alone with each layer's own number of experts, and its widest expert's width.

        Raises:
            ArchitectureError: layers that do not match the config's, or a number of experts that the router cannot
                work with.
        """
        if [fact.layer for fact in facts] != sorted(self.widths):
            raise _corrupt(
                f"quantization_config.experts lists the layers {sorted(self.widths)}, by the rest of the config "
                f"experts are in {[fact.layer for fact in facts]}"
            )
        found = []
        for fact in facts:
            row = self.widths[fact.layer]
            own = replace(fact, experts=len(row), width=max(row))
            if fact.layer in self.remap:
                if len(self.remap[fact.layer]) != fact.experts:
                    raise _corrupt(
                        f"quantization_config.{REMAP}[{fact.layer}] has {len(self.remap[fact.layer])} entries, the "
                        f"router {fact.experts} rows"
                    )
            elif problem := router_problem(own):
                raise _corrupt(f"layer {fact.layer}: {problem}")
            found.append(own)
        return found


def _remap(given: Any, widths: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Raises ArchitectureError for a remap that names layers or experts which are not there."""
    found: dict[int, tuple[int, ...]] = {}
    if not isinstance(given, Mapping):
        raise _corrupt(f"quantization_config.{REMAP} is no table of layers")
    for key, row in given.items():
        if not str(key).isdecimal() or int(key) not in widths:
            raise _corrupt(f"quantization_config.{REMAP} has the key {key!r}, which is no layer with experts")
        count = len(widths[int(key)])
        if not isinstance(row, Sequence) or not all(type(each) is int and 0 <= each < count for each in row):
            raise _corrupt(f"quantization_config.{REMAP}[{key}] names experts beyond the {count} that there are")
        found[int(key)] = tuple(row)
    return found


def router_problem(fact: LayerFacts) -> str | None:
    """Why the layer's router could not work with its number of experts; None where it can.

    A router with groups cuts its list of scores into equal runs, so the number must be a multiple of the groups, and
    each group must hold as many as a token may take of it and as its score adds up.
    """
    if fact.experts < fact.top_k:
        return f"{fact.experts} experts, but the router sends every token to {fact.top_k}"
    if fact.groups > 1 and fact.experts % fact.groups:
        return f"{fact.experts} experts do not share evenly over the router's {fact.groups} groups"
    need = max(-(-fact.top_k // fact.top_groups), fact.group_rank)
    if fact.groups > 1 and fact.experts // fact.groups < need:
        return f"{fact.experts} experts leave {fact.experts // fact.groups} in a group, the router needs {need}"
    return None


def tripwire(architecture: Architecture, layout: Layout) -> str:
    """Name of the tensor that stops loaders which do not know the format.

    Stock transformers fills parameters that it finds no tensors for with random numbers and warns; so it would where a
    layer's experts all have width 0, or where it looks for one tensor of all experts. In most other cases it finds
    shapes that do not fit and stops, but not for a reason that anybody promises. The tripwire looks like one matrix
    more of the first MoE layer, as the family publishes it: its down matrix of the expert after the last, or of all
    experts. It has one element, and can be stacked with nothing. Every checkpoint of the format holds it; moezip checks
    that it is there and uses it for nothing.
    """
    layer = min(layout.widths)
    down = next(tensor for tensor in architecture.published or architecture.experts if tensor.role == "down")
    return down.template.format(layer=layer, expert=len(layout.widths[layer]))


def tripwire_of(architecture: Architecture, config: Mapping[str, Any]) -> str | None:
    """``tripwire`` of a config; None for a checkpoint of another format."""
    layout = Layout.of(config)
    return None if layout is None else tripwire(architecture, layout)


def inseparable(config: Mapping[str, Any]) -> str | None:
    """Why no neurons can be taken out of the stored experts, nor layers differ; None where they can."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in (None, "fp8"):
        return None
    if method == "mxfp4":
        return (
            "mxfp4 has one scale for 32 neighbours: what is left of them would have to be rounded to 4 bits again, and "
            "the codes of a layer's experts are one tensor"
        )
    return f"its weights are stored as {method!r}"


def require_uniform(config: Mapping[str, Any], what: str, where: object = None) -> None:
    """Raises ArchitectureError if the checkpoint is ragged; ``what`` names the thing that cannot be done with it."""
    from moezip.arch.mone import Substitution

    if Layout.of(config) is not None or Substitution.of(config) is not None:
        raise ArchitectureError(
            f"{what} a checkpoint whose layers or experts differ is not possible in this version",
            where=where,
            next="start from the checkpoint that it was made of",
        )


def _corrupt(what: str) -> ArchitectureError:
    return ArchitectureError(what, where="config.json", next=FIX)

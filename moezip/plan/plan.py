"""The plan: which source experts make up each new expert. Readable JSON, re-appliable with no data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from moezip.arch.factoring import table_of
from moezip.arch.packing import folded, unfolded
from moezip.arch.spec import LayerFacts
from moezip.errors import ArchitectureError, PlanError
from moezip.formats.factors import Factors
from moezip.formats.packed import Grid

SCHEMA = 1
# How a layer's router follows its experts; see LayerPlan.
RouterForm = Literal["kept", "fitted", "remap"]
# Weights of an average are printed with all their digits, and add to 1 but for the rounding of a few hundred sums.
WEIGHT_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Part:
    """A share of one source expert in a new one.

    Attributes:
        expert: of the source. weight: its share.
        neurons: inner neurons kept, ascending (rows of gate and up, columns of down); None for all. In an average of
            several experts: which neuron of this one goes with neuron 0, 1, ... of the new expert, all of them.
    """

    expert: int
    weight: float = 1.0
    neurons: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    """One output expert: what of the source goes into it.

    Attributes:
        parts: an expert that stays, whole or in part; or several, of whose weights it is the average. The first is the
            dominant one, whose row in the router it has unless the layer's router says otherwise.
    """

    parts: tuple[Part, ...]

    @classmethod
    def keep(cls, expert: int) -> Pick:
        return cls((Part(expert),))

    @classmethod
    def slim(cls, expert: int, neurons: Sequence[int], width: int) -> Pick:
        """Some neurons of one expert; the plain pick where that is all ``width`` of them."""
        return cls((Part(expert, neurons=None if len(neurons) == width else tuple(neurons)),))

    @property
    def neurons(self) -> tuple[int, ...] | None:
        """The neurons that it keeps of its one expert, None for all."""
        return None if self.mixed else self.parts[0].neurons

    @property
    def mixed(self) -> bool:
        """Whether it is an average, and no expert of the source."""
        return len(self.parts) > 1 or self.parts[0].weight != 1.0

    @property
    def kept(self) -> int:
        """The source expert that this pick keeps, whole or in part, or that dominates the average."""
        return self.parts[0].expert

    @property
    def members(self) -> tuple[int, ...]:
        """The source experts in it, the dominant one first."""
        return tuple(part.expert for part in self.parts)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer seen through the plan.

    Attributes:
        layer: decoder layer index.
        experts: E of the source.
        picks: the output's experts, in order.
        scores: the method's score per source expert, for the reader; never used when the plan is applied.
        protected: source experts that the guard kept whatever their score.
        router: ``kept``: the rows of the picks' (dominant) experts. ``fitted``: rows that the plan's values hold.
            ``remap``: all rows of the source, and every choice of an expert means the pick that it went into.
    """

    layer: int
    experts: int
    picks: tuple[Pick, ...]
    scores: tuple[float, ...] = ()
    protected: tuple[int, ...] = ()
    router: RouterForm = "kept"

    @property
    def remap(self) -> tuple[int, ...]:
        """For every source expert the pick that it went into. Raises PlanError if one went nowhere."""
        places = {expert: place for place, pick in enumerate(self.picks) for expert in pick.members}
        if missing := sorted(set(range(self.experts)) - set(places)):
            raise PlanError(
                f"layer {self.layer}: the router keeps the rows of all experts, but {missing[:8]} went into none"
            )
        return tuple(places[expert] for expert in range(self.experts))

    @property
    def kept(self) -> tuple[int, ...]:
        """Source experts in output order."""
        return tuple(pick.kept for pick in self.picks)

    @property
    def whole(self) -> bool:
        """Whether every pick keeps all neurons."""
        return all(pick.neurons is None for pick in self.picks)

    @property
    def merges(self) -> bool:
        """Whether some picks are averages, or the router is another one."""
        return self.router != "kept" or any(pick.mixed for pick in self.picks)

    def widths(self, width: int) -> tuple[int, ...]:
        """Neurons kept of each output expert, of ``width`` in the source."""
        return tuple(width if pick.neurons is None else len(pick.neurons) for pick in self.picks)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the bytes of the output.

    Attributes:
        source: fingerprint of the checkpoint that it was made for.
        architecture: model_type.
        layers: MoE layers, ascending.
        mtp: ``drop`` or ``keep`` the multi-token-prediction layers.
        packing: matrices of the output that are stored as codes, by name, and their grids.
        made_by: method, settings, statistics and data fingerprints, seed, version: for the reader.
        values: digest of the values that no pick can say (``moezip.plan.merged``), which lie in a file beside the
            plan, or in the checkpoint that it was written with; empty without any.
        solved: names of these values.
        factors: matrices of the output that are stored as factors, by name, and their sizes.
    """

    source: str
    architecture: str
    layers: tuple[LayerPlan, ...]
    mtp: str = "drop"
    made_by: dict[str, Any] = field(default_factory=dict)
    packing: dict[str, Grid] = field(default_factory=dict)
    values: str = ""
    solved: tuple[str, ...] = ()
    factors: dict[str, Factors] = field(default_factory=dict)

    @classmethod
    def identity(cls, source: str, architecture: str, facts: Sequence[LayerFacts]) -> Plan:
        """The plan that keeps everything: applied, it gives back the same bytes."""
        layers = tuple(LayerPlan(f.layer, f.experts, tuple(map(Pick.keep, range(f.experts)))) for f in facts)
        return cls(source, architecture, layers, mtp="keep")

    def ragged(self, width: int) -> bool:
        """Whether layers keep different numbers of experts, or experts different numbers of their ``width`` neurons.

        Such a plan, or one with factors, makes a checkpoint in moezip's own format, others a stock one.
        """
        widths = {each for layer in self.layers for each in layer.widths(width)}
        remapped = any(layer.router == "remap" for layer in self.layers)
        return (
            bool(self.factors)
            or remapped
            or len({len(layer.picks) for layer in self.layers}) > 1
            or len(widths) > 1
            or widths == {0}
        )

    @property
    def merges(self) -> bool:
        """Whether there are experts or routers that no source tensor holds."""
        return bool(self.solved or self.factors) or any(layer.merges for layer in self.layers)

    @property
    def keeps_all(self) -> bool:
        """Whether every layer keeps every expert whole and in place."""
        in_place = (layer.whole and layer.kept == tuple(range(layer.experts)) for layer in self.layers)
        return not self.merges and all(in_place)

    def validate(self, facts: Sequence[LayerFacts], fingerprint: str, where: object = None) -> None:
        """Raises PlanError unless this plan can be carried out on the checkpoint with these facts."""
        if self.source != fingerprint:
            raise PlanError(
                f"the plan is for another checkpoint ({self.source[:12]}, not {fingerprint[:12]})",
                where=where,
                next="apply it to the checkpoint that it was made for",
            )
        if [layer.layer for layer in self.layers] != [fact.layer for fact in facts]:
            raise PlanError(
                f"the plan covers layers {[layer.layer for layer in self.layers]}, "
                f"the checkpoint has experts in {[fact.layer for fact in facts]}",
                where=where,
            )
        for layer, fact in zip(self.layers, facts, strict=True):
            kept, used = layer.kept, [expert for pick in layer.picks for expert in pick.members]
            if layer.experts != fact.experts or not all(0 <= e < fact.experts for e in used):
                raise PlanError(
                    f"layer {layer.layer} has experts 0 to {fact.experts - 1}, the plan keeps {used}", where=where
                )
            if len(set(used)) != len(used):
                raise PlanError(f"layer {layer.layer}: the plan keeps an expert twice: {used}", where=where)
            for pick in layer.picks:
                require_neurons(pick, fact, where)
            if layer.router == "remap":
                assert len(layer.remap) == fact.experts
                continue
            require_keepable(fact, len(kept))
            require_groups(fact, kept, where)
        if self.mtp not in ("drop", "keep"):
            raise PlanError(f"mtp is {self.mtp!r}, it must be drop or keep", where=where)

    def to_json(self) -> str:
        """Readable JSON: one line per list, so that two plans can be compared with diff."""
        layers = []
        for layer in self.layers:
            entry: dict[str, Any] = {"layer": layer.layer, "experts": layer.experts}
            entry["picks"] = [pick_json(pick) for pick in layer.picks]
            if layer.protected:
                entry["protected"] = list(layer.protected)
            if layer.router != "kept":
                entry["router"] = layer.router
            if layer.scores:
                entry["scores"] = list(layer.scores)
            body = ",\n".join(f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
            layers.append("    {\n" + body + "\n    }")
        head = {"schema": SCHEMA, "source": self.source, "architecture": self.architecture, "mtp": self.mtp}
        text = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        made_by = json.dumps(self.made_by, indent=2).replace("\n", "\n  ")
        if self.packing:
            table = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in folded(self.packing).items())
            text += '  "packing": {\n' + table + "\n  },\n"
        if self.factors:
            table = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in folded(self.factors).items())
            text += '  "factors": {\n' + table + "\n  },\n"
        if self.solved:
            text += f'  "values": {json.dumps(self.values)},\n'
            text += '  "solved": [\n' + ",\n".join(f"    {json.dumps(name)}" for name in self.solved) + "\n  ],\n"
        return "{\n" + text + f'  "made_by": {made_by},\n  "layers": [\n' + ",\n".join(layers) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str, where: object = None) -> Plan:
        """Raises PlanError if the text is no plan of this schema."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise PlanError(f"plan of schema {data['schema']}, this moezip reads {SCHEMA}", where=where)
            layers = tuple(
                LayerPlan(
                    int(entry["layer"]),
                    int(entry["experts"]),
                    tuple(pick_of(pick) for pick in entry["picks"]),
                    tuple(entry.get("scores", ())),
                    tuple(entry.get("protected", ())),
                    _router(entry.get("router", "kept")),
                )
                for entry in data["layers"]
            )
            names = [data[key] for key in ("source", "architecture", "mtp")]
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"source, architecture and mtp must be texts, not {names}")
            packing = unfolded(data.get("packing", {}))
            values, solved = str(data.get("values", "")), tuple(map(str, data.get("solved", ())))
            factors, made_by = table_of(data.get("factors", {})), dict(data.get("made_by", {}))
            return cls(names[0], names[1], layers, names[2], made_by, packing, values, solved, factors)
        except ArchitectureError as fault:
            raise PlanError(f"the plan's packing cannot be read: {fault.what}", where=where) from fault
        except (ValueError, KeyError, TypeError) as fault:
            raise PlanError(
                f"this is no plan, or a damaged one ({type(fault).__name__}: {fault})", where=where,
                next="make it with `moezip prune ... --plan-only`",
            ) from fault  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises PlanError if the file cannot be read, or is no plan."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as fault:
            raise PlanError("this is no plan: it is not text", where=path, next="name a plan.json") from fault
        except OSError as fault:
            raise PlanError(
                f"the plan cannot be read ({fault.strerror})", where=path, next="name a plan.json"
            ) from fault
        return cls.from_json(text, path)


def pick_json(pick: Pick) -> Any:
    """A pick as the plan's file has it."""
    if len(pick.parts) == 1 and pick.parts[0].weight == 1.0:
        if pick.neurons is not None:
            return {"expert": pick.parts[0].expert, "neurons": ranges(pick.neurons)}
        return pick.parts[0].expert
    return [
        [part.expert, part.weight] + ([] if part.neurons is None else [ranges(part.neurons)]) for part in pick.parts
    ]


def _router(word: str) -> RouterForm:
    if word not in get_args(RouterForm):
        raise ValueError(f"router is {word!r}")
    return word  # type: ignore[return-value]


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as text, each with its successors joined: 0 1 2 5 -> "0-2 5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def numbers_of(text: str) -> tuple[int, ...]:
    """The inverse of ``ranges``. Raises ValueError for anything else."""
    found: list[int] = []
    for word in text.split():
        first, _, last = word.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def pick_of(data: Any) -> Pick:
    """The inverse of ``pick_json``. Raises ValueError, KeyError or TypeError for anything else."""
    if isinstance(data, int):
        return Pick.keep(data)
    if isinstance(data, dict):
        return Pick((Part(int(data["expert"]), neurons=numbers_of(data["neurons"])),))
    return Pick(
        tuple(
            Part(int(expert), float(weight), numbers_of(order[0]) if order else None) for expert, weight, *order in data
        )
    )


def require_neurons(pick: Pick, fact: LayerFacts, where: object = None) -> None:
    """Raises PlanError unless the neurons of a pick are ascending numbers below the width.

    Of an average: unless the weights add to 1, and every part has all neurons, in whatever order.
    """
    if pick.mixed:
        total = sum(part.weight for part in pick.parts)
        if not abs(total - 1) <= WEIGHT_SLACK:
            raise PlanError(f"layer {fact.layer}: weights of {pick.members} add to {total:.6g}, not to 1", where=where)
        for part in pick.parts:
            if part.neurons is not None and sorted(part.neurons) != list(range(fact.width)):
                raise PlanError(
                    f"layer {fact.layer}: the order of expert {part.expert}'s neurons is no order of {fact.width}",
                    where=where,
                )
        return
    neurons = pick.neurons
    if neurons is None:
        return
    ascending = all(a < b for a, b in pairwise(neurons))
    if not ascending or (neurons and not 0 <= neurons[0] <= neurons[-1] < fact.width):
        raise PlanError(
            f"layer {fact.layer}, expert {pick.kept}: neurons are ascending numbers from 0 to {fact.width - 1}, "
            f"the plan keeps {ranges(neurons)[:60]}",
            where=where,
        )


# -- what can be kept at all --------------------------------------------------------------------------------


def group_counts(fact: LayerFacts, kept: Sequence[int]) -> list[int]:
    """How many of ``kept`` lie in each router group."""
    size = fact.experts // fact.groups
    counts = Counter(expert // size for expert in kept)
    return [counts[group] for group in range(fact.groups)]


def require_keepable(fact: LayerFacts, keep: int) -> None:
    """Raises PlanError if no choice of ``keep`` experts leaves the layer's router able to work."""
    if not 1 <= keep <= fact.experts:
        raise PlanError(
            f"cannot keep {keep} of {fact.experts} experts", where=f"layer {fact.layer}",
            next=f"keep between {max(fact.top_k, 1)} and {fact.experts}",
        )  # fmt: skip
    if keep < fact.top_k:
        raise PlanError(
            f"cannot keep {keep} experts: the router sends every token to {fact.top_k}",
            where=f"layer {fact.layer}",
            next=f"keep at least {fact.top_k}",
        )
    if fact.groups == 1:
        return
    if keep % fact.groups or fact.experts % fact.groups:
        below, above = keep - keep % fact.groups, keep - keep % fact.groups + fact.groups
        choices = [str(n) for n in (below, above) if 0 < n <= fact.experts]
        raise PlanError(
            f"{keep} experts do not share evenly over the router's {fact.groups} groups "
            f"({keep} / {fact.groups} = {keep / fact.groups:g})",
            where=f"layer {fact.layer}",
            next=f"keep {' or '.join(choices)}",
        )
    each = keep // fact.groups
    need = max(-(-fact.top_k // fact.top_groups), fact.group_rank)
    if each < need:
        raise PlanError(
            f"{keep} experts leave {each} in each of {fact.groups} groups; a token uses {fact.top_groups} groups and "
            f"{fact.top_k} experts, so each group needs {need}"
            + (f" (its score adds the best {fact.group_rank})" if need == fact.group_rank else ""),
            where=f"layer {fact.layer}",
            next=f"keep at least {need * fact.groups}",
        )


def require_groups(fact: LayerFacts, kept: Sequence[int], where: object = None) -> None:
    """Raises PlanError unless every router group keeps the same number, in its own place of the output order."""
    if fact.groups == 1:
        return
    counts = group_counts(fact, kept)
    size, each = fact.experts // fact.groups, len(kept) // fact.groups
    in_place = all(expert // size == place // each for place, expert in enumerate(kept))
    if len(set(counts)) > 1 or not in_place:
        raise PlanError(
            f"layer {fact.layer}: the router's {fact.groups} groups would keep {counts} experts; a loader cuts the "
            f"list into {fact.groups} equal groups and would mix them up",
            where=where,
            next="keep the same number in every group, groups in order",
        )

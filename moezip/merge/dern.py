"""DERN (arXiv 2509.10377): drop experts, hand their neurons to the retained experts that have similar ones.

A neuron is three vectors: its row of gate, its row of up, its column of down (with biases, the rows are one longer).
As up and down only ever meet as a product, (s up, down / s) is the same neuron for every s, negative ones included.
So neurons are compared with each vector at length 1, up and down both turned where that brings them nearer:

    similarity = (cos gate + |cos up + cos down|) / 3

which of two neurons of one direction is 1, whatever their lengths. Experts whose gate takes up + 1 in place of up
(those with biases) do not turn.

Every retained expert then has its own neurons and those that came, and clusters them back to its width, by directions,
weighted by the gate mass of the expert that each came from. Centres start at its own neurons: random starts cost the
authors 15 points. A neuron alone in its cluster stays as it is, bit by bit. What several become has the direction of
their weighted sum; its lengths, which directions leave open, are weighted means: of gate, of up, and of the product
of up and down. Means and no sums: a token that chose a dropped expert gives its gate to others, by the router's
own normalisation, so a copy of a retained neuron is made up for by larger gates already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.arch.spec import LayerFacts
from moezip.calibrate.statistics import Array
from moezip.errors import UsageError
from moezip.merge.layer import Merge, MergeLayer
from moezip.plan.plan import Pick
from moezip.registry import Method

if TYPE_CHECKING:
    import torch

    from moezip.arch.spec import ExpertRole

# Above so many numbers per neuron, similar ones are searched for by random projections of each vector to SKETCH
# numbers, whose products are off by 0.05 or so; whole vectors are compared with the threshold, and averaged.
EXACT, SKETCH = 1024, 128
# Similarities held at a time.
BATCH = 2**24
# What a neuron weighs at least, as a share of the heaviest: experts that got no token have means all the same.
LEAST = 1e-6
SHORT = 1e-30  # lengths are divided by


@dataclass(frozen=True, slots=True)
class DernParams:
    """Settings.

    Attributes:
        threshold: a neuron of a dropped expert goes to the most similar neuron's expert if the similarity is above
            this (-1 to 1), else it is gone; 1 is plain pruning by gate mass.
        rounds: of clustering, at most.
        seed: of the projections that wide experts are searched with; ``--seed`` where not set.
    """

    threshold: float = 0.6
    rounds: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise UsageError("similarities are from -1 to 1", where=f"--set threshold={self.threshold:g}")
        if self.rounds < 1:
            raise UsageError("there is at least one round", where=f"--set rounds={self.rounds}")

    # what the pipeline asks of every merging method; no choice here
    @property
    def router(self) -> str:
        return "dominant"

    @property
    def align(self) -> str:
        return "none"

    @property
    def price(self) -> bool:
        return False


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: DernParams
) -> list[tuple[int, ...]]:
    """The ``keep`` experts of the largest gate mass, of equal ones the lower id; as many in every router group."""
    mass, size, each = stats["gate_sum"], facts.experts // facts.groups, keep // facts.groups
    found: list[int] = []
    for first in range(0, facts.experts, size):
        found += sorted(range(first, first + size), key=lambda e: (-mass[e], e))[:each]
    return [(expert,) for expert in sorted(found)]


def score(facts: LayerFacts, stats: Mapping[str, Array], params: DernParams) -> Array:
    """Gate mass, float64 [E]."""
    return stats["gate_sum"]


@dataclass(slots=True)
class Neurons:
    """Some neurons, one per row.

    Attributes:
        gate, up: [n, D], with biases [n, D + 1]; down: [n, D]; rows of length 1.
        lengths: [n, 3], what they were of gate, up and down.
        turns: whether up and down may both change signs.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    lengths: torch.Tensor
    turns: bool

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor], turns: bool) -> Neurons:
        """From gate, up and down [n, ...] of any length."""
        import torch

        lengths = torch.stack([part.norm(dim=1) for part in parts], 1)
        gate, up, down = (
            part / length[:, None] for part, length in zip(parts, lengths.clamp_min(SHORT).T, strict=True)
        )
        return cls(gate, up, down, lengths, turns)

    @classmethod
    def joined(cls, some: Sequence[Neurons]) -> Neurons:
        import torch

        gate, up, down, lengths = (torch.cat(parts) for parts in zip(*(each.parts() for each in some), strict=True))
        return cls(gate, up, down, lengths, some[0].turns)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate, self.up, self.down, self.lengths

    def __len__(self) -> int:
        return self.gate.shape[0]

    def take(self, which: torch.Tensor | slice) -> Neurons:
        gate, up, down, lengths = (part[which] for part in self.parts())
        return Neurons(gate, up, down, lengths, self.turns)

    def similarity(self, other: Neurons) -> torch.Tensor:
        """[n], of two lists of the same length: from -1 to 1."""
        rest = (self.up * other.up).sum(1) + (self.down * other.down).sum(1)
        return ((self.gate * other.gate).sum(1) + (rest.abs() if self.turns else rest)) / 3

    def nearest(self, other: Neurons) -> torch.Tensor:
        """[n]: for each the place of the most similar one in ``other``, of equal ones the first."""
        import torch

        step, found = max(1, BATCH // len(other)), []
        for start in range(0, len(self), step):
            part = self.take(slice(start, start + step))
            rest = (part.up @ other.up.T).addmm_(part.down, other.down.T)
            found.append(torch.addmm(rest.abs_() if self.turns else rest, part.gate, other.gate.T).argmax(1))
        return torch.cat(found)

    def sketch(self, seed: int) -> Neurons:
        """The same neurons by fewer numbers, where they have many."""
        import torch

        if sum(part.shape[1] for part in (self.gate, self.up, self.down)) <= EXACT:
            return self
        generator = torch.Generator().manual_seed(seed)
        parts = [
            part @ torch.randn(part.shape[1], SKETCH, generator=generator) for part in (self.gate, self.up, self.down)
        ]
        return Neurons.of(parts, self.turns)


def neurons_of(layer: MergeLayer, expert: int) -> Neurons:
    """All neurons of one expert."""
    import torch

    gate, up, down = (layer.matrix(expert, role) for role in ("gate", "up", "down"))
    biased = "gate_bias" in layer.roles
    if biased:
        gate = torch.cat([gate, layer.matrix(expert, "gate_bias")[:, None]], 1)
        up = torch.cat([up, layer.matrix(expert, "up_bias")[:, None]], 1)
    return Neurons.of((gate, up, down.T), not biased)


# -- who gets which neurons ---------------------------------------------------------------------------------

Offers = dict[int, dict[int, tuple["torch.Tensor", "torch.Tensor"]]]


def offers(layer: MergeLayer, seed: int) -> Offers:
    """By retained and by dropped expert: neurons of the dropped one, and those of the retained one that they resemble.

    Both as numbers inside their experts. A neuron goes no farther than its router group, where its tokens go.
    """
    import torch

    facts, retained = layer.facts, [group[0] for group in layer.groups]
    size = facts.experts // facts.groups
    found: Offers = {expert: {} for expert in retained}
    for first in range(0, facts.experts, size):
        stay = [expert for expert in range(first, first + size) if expert in found]
        gone = [expert for expert in range(first, first + size) if expert not in found]
        if not gone:
            continue
        kept = Neurons.joined([neurons_of(layer, expert).sketch(seed) for expert in stay])
        for expert in gone:
            place = neurons_of(layer, expert).sketch(seed).nearest(kept)
            for number, target in enumerate(stay):
                mine = torch.nonzero(place // facts.width == number)[:, 0]
                if len(mine):
                    found[target][expert] = (mine, place[mine] % facts.width)
    return found


# -- back to the width --------------------------------------------------------------------------------------


def cluster(members: Neurons, weights: torch.Tensor, width: int, rounds: int) -> torch.Tensor:
    """Spherical weighted k-means that starts at the first ``width`` members: [n], the cluster of every member.

    A cluster that lost all its members takes, of those in company, the one that is least like its centre.
    """
    import torch

    label = members.nearest(members.take(slice(width)))
    label[:width] = torch.arange(width)  # equal ones among them stay apart
    for _ in range(rounds):
        centres = combined(members, weights, label, width)
        new = members.nearest(centres)
        count = torch.bincount(new, minlength=width)
        if bool((count == 0).any()):
            alike = members.similarity(centres.take(new))
            for empty in torch.nonzero(count == 0)[:, 0].tolist():
                far = int(alike.masked_fill(count[new] == 1, torch.inf).argmin())
                count[new[far]] -= 1
                count[empty] += 1
                new[far] = empty
        if torch.equal(new, label):
            break
        label = new
    return label


def combined(members: Neurons, weights: torch.Tensor, label: torch.Tensor, width: int) -> Neurons:
    """What every cluster's members become together, [width].

    Directions of weighted sums, every member turned towards its cluster's heaviest; weighted mean lengths of gate, of
    up and of up times down.
    """
    import torch

    order = torch.argsort(weights, stable=True, descending=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    first = torch.full((width,), len(order)).scatter_reduce(0, label, rank, "amin")
    lead = members.take(order[first][label])
    rest = (members.up * lead.up).sum(1) + (members.down * lead.down).sum(1)
    turned = torch.where(rest < 0, -weights, weights) if members.turns else weights

    def total(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.zeros(width, values.shape[1]).index_add_(0, label, values * by[:, None])

    gates, ups, downs = members.lengths.T
    means = total(torch.stack([gates, ups, ups * downs], 1), weights) / total(torch.ones(len(label), 1), weights)
    parts = (total(members.gate, weights), total(members.up, turned), total(members.down, turned))
    made = Neurons.of(parts, members.turns)
    made.lengths = torch.stack([means[:, 0], means[:, 1], means[:, 2] / means[:, 1].clamp_min(SHORT)], 1)
    return made


def rebuilt(layer: MergeLayer, expert: int, arrivals: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
            params: DernParams) -> tuple[dict[ExpertRole, torch.Tensor], int]:  # fmt: skip
    """The changed matrices of a retained expert, by role, in float32, and how many neurons came; none if none came."""
    import torch

    mass = layer.stats["gate_sum"]
    own = neurons_of(layer, expert)
    came, masses = [own], [torch.full((len(own),), float(mass[expert]))]
    for other, (numbers, places) in arrivals.items():
        some = neurons_of(layer, other).take(numbers)
        some = some.take(some.similarity(own.take(places)) > params.threshold)
        came.append(some)
        masses.append(torch.full((len(some),), float(mass[other])))
    members, weights = Neurons.joined(came), torch.cat(masses)
    if len(members) == len(own):
        return {}, 0
    largest = float(weights.max())
    weights = (weights / largest if largest > 0 else weights).clamp_min(LEAST)
    label = cluster(members.sketch(params.seed), weights, len(own), params.rounds)
    made = combined(members, weights, label, len(own))
    alone = torch.bincount(label, minlength=len(own))[label[: len(own)]] == 1
    still = alone & (label[: len(own)] == torch.arange(len(own)))
    change = torch.nonzero(~still)[:, 0]
    new = [part[change] * length[:, None] for part, length in zip(made.parts(), made.lengths[change].T, strict=False)]
    found: dict[ExpertRole, torch.Tensor] = {}
    for role, value in zip(("gate", "up"), new, strict=False):
        matrix = layer.matrix(expert, role)  # type: ignore[arg-type]
        matrix[change] = value[:, : matrix.shape[1]]
        found[role] = matrix  # type: ignore[index]
        if f"{role}_bias" in layer.roles:
            bias = layer.matrix(expert, f"{role}_bias")  # type: ignore[arg-type]
            bias[change] = value[:, -1]
            found[f"{role}_bias"] = bias  # type: ignore[index]
    found["down"] = layer.matrix(expert, "down")
    found["down"][:, change] = new[2].T
    return found, len(members) - len(own)


def solve(layer: MergeLayer, params: DernParams) -> Merge:
    """Retained experts with what came to them."""
    found = Merge(tuple(Pick.keep(group[0]) for group in layer.groups), "kept")
    gone = (layer.facts.experts - len(layer.groups)) * layer.facts.width
    placed = 0
    if params.threshold < 1 and gone:
        for number, (expert, arrivals) in enumerate(offers(layer, params.seed).items()):
            changed, count = rebuilt(layer, expert, arrivals, params)
            placed += count
            for role, value in changed.items():
                found.solve_expert(layer.facts.layer, number, role, value.to(layer.dtype(role)))
    found.notes = (f"{placed:,} of {gone:,} neurons of dropped experts went to retained ones",)
    return found


DERN = Method(
    name="dern",
    family="merge",
    summary="drops the experts of least gate mass, hands their neurons to retained experts with similar ones",
    paper="DERN, arXiv 2509.10377",
    needs=("counts", "gate_sum"),
    params=DernParams,
    choose=choose,
    solve=solve,
    run=score,
)

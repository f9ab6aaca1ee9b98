"""NAEE (arXiv 2402.14800): try every choice of experts, keep the one that changes the layer's output least.

For a layer with router and experts F, and every set S of as many experts as are to stay,

    L(S) = sum over windows w of  || F(X_w) - F_S(X_w) ||        (Frobenius norm, float64)

where X_w are the layer's inputs in window w of the calibration text and F_S is the layer with the experts of S alone:
the router's rows of the others are gone, tokens go to the next best, and gates are what the router makes of those. The
set of least L stays; of equal ones the first. The authors put the logits of dropped experts at minus infinity, which is
the same where a router has no selection bias; where it has one (DeepSeek-V3), a logit at minus infinity could still be
chosen, and the pruned checkpoint's router is what counts. Shared experts are no part of the sum: they stay.

The authors' unit is the batch of their data loader. Here it is the window of --seq-len tokens, so that L does not
depend on how many of them are computed at a time. `--set squared=true` sums the squares, which depends on no unit.

Layers are judged by themselves, with the inputs that the whole model gives them, all in the one calibration pass.
Nothing is kept but L of every set. Only differences are formed: F - F_S of a token is sum over i of c_i f_i, with c the
differences of the gates, so its square is c' G c with G the products f_i . f_j of the experts' outputs.

The number of sets is E over the number kept, in every router group for itself where there are groups (each keeps as
many): 28 for 6 of 8 experts, 1,820 for 12 of 16, 10^37 for 64 of 128. More than `--set limit=` are refused. All experts
run on all tokens, which takes E / top-k times as long as the plain pass, and every set costs a routing.

What `calibrate --record naee:keep=N` saved serves `prune --method naee --stats` with that --keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from typing import TYPE_CHECKING

import numpy as np

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import Observation, Record
from moezip.calibrate.statistics import Array
from moezip.errors import PlanError, UsageError
from moezip.plan.plan import require_keepable
from moezip.prune.params import PruneParams
from moezip.registry import Method, record_name

if TYPE_CHECKING:
    import torch

LIMIT = 2500  # sets per layer: some minutes for the demo model and the default amount of text
# What the outputs of all experts may take at a time, in the model's dtype; how many tokens and sets are judged at a
# time; and how many tokens' outputs are float64 at a time. All of it is less than a micro-batch's temporaries may take.
OUTPUT_BYTES = 16 * 2**20
MAX_TOKENS = 1024
SETS = 32
PIECE = 32
# Routing a token with one set and judging it, on one core (measured, demo model); for estimates.
SET_SECONDS = 7e-7


@dataclass(frozen=True, slots=True)
class NaeeParams(PruneParams):
    """Attributes:
    limit: the largest number of sets to try per layer.
    squared: sum squared norms.
    keep: filled in from --keep or --ratio; only `--record naee:keep=N` needs it said.
    """

    limit: int = LIMIT
    squared: bool = False
    keep: int = 0


def set_count(facts: LayerFacts, keep: int) -> int:
    """How many sets of ``keep`` experts there are, with equally many in every router group."""
    return math.comb(facts.experts // facts.groups, keep // facts.groups) ** facts.groups


def kept_sets(facts: LayerFacts, keep: int) -> Iterator[tuple[int, ...]]:
    """These sets, each ascending, in lexicographic order."""
    size, each = facts.experts // facts.groups, keep // facts.groups
    groups = [combinations(range(group * size, (group + 1) * size), each) for group in range(facts.groups)]
    return (sum(parts, ()) for parts in product(*groups))


def check(facts: LayerFacts, params: NaeeParams) -> None:
    """Raises UsageError or PlanError where there is no number to keep, or there are more sets than the limit."""
    if params.keep == 0:
        raise UsageError(
            "naee tries the sets of as many experts as stay, and that number is not given",
            where="--record naee", next="write --record naee:keep=N",
        )  # fmt: skip
    require_keepable(facts, params.keep)
    count = set_count(facts, params.keep)
    if count > params.limit:
        shown = f"{count:,}" if count < 10**9 else f"{count:.2g}"
        raise PlanError(
            f"{shown} sets of {params.keep} of {facts.experts} experts would have to be tried, more than the limit of "
            f"{params.limit:,}",
            where=f"layer {facts.layer}",
            next="keep more experts, allow it with --set limit=N, or use another method (easy-ep, reap, nats)",
        )


def set_losses(seen: Observation, params: NaeeParams) -> torch.Tensor:
    """L of every set on one micro-batch of whole windows, float64, in the order of ``kept_sets``."""
    import torch

    block = seen.block
    assert block is not None
    facts = block.facts
    tokens, device = seen.ids.shape[0], seen.ids.device
    windows = int(block.windows[-1]) + 1 if tokens else 0
    squares = torch.zeros(windows, set_count(facts, params.keep), dtype=torch.float64, device=device)
    before = torch.zeros(tokens, seen.experts, dtype=torch.float64, device=device)
    before.scatter_(1, seen.ids, seen.gates.double())
    per_token = seen.experts * block.inputs.shape[1] * block.inputs.element_size()
    step = min(max(OUTPUT_BYTES // per_token, 1), MAX_TOKENS)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        products = torch.cat([_products(piece) for piece in block.outputs(part).split(PIECE)])
        sets, first = kept_sets(facts, params.keep), 0
        while some := list(islice(sets, SETS)):
            changes = torch.stack([before[part] - block.gates(kept, part) for kept in some], 1)  # [n, sets, E]
            # a square is never below 0, but for rounding where two experts are alike
            found = ((changes @ products) * changes).sum(-1).clamp_min(0)
            squares[:, first : first + len(some)].index_add_(0, block.windows[part], found)
            first += len(some)
    return (squares if params.squared else squares.sqrt()).sum(0)


def _products(outputs: torch.Tensor) -> torch.Tensor:
    """f_i . f_j of every token, [n, E, E] float64, from [n, E, D]."""
    exact = outputs.double()
    return exact @ exact.mT


def name_of(params: NaeeParams) -> str:
    """The name under which the sums of these settings are recorded."""
    return record_name("naee", {"keep": params.keep, "squared": params.squared})


def records(params: NaeeParams) -> tuple[Record, ...]:
    """The one record that the settings ask for."""

    def shape(facts: LayerFacts) -> tuple[int, ...]:
        return (set_count(facts, params.keep),)

    def seconds(facts: LayerFacts, rate: float) -> float:
        outputs = 2 * facts.experts * facts.hidden * (3 * facts.width + facts.experts)  # and their products
        return outputs / rate + set_count(facts, params.keep) * SET_SECONDS

    summary = f"change of the layer's output for each set of {params.keep} experts"

    def update(seen: Observation) -> torch.Tensor:
        return set_losses(seen, params)

    return (Record(name_of(params), summary, "sum", shape, update, asks=True, seconds=seconds),)


def losses(facts: LayerFacts, stats: Mapping[str, Array], params: NaeeParams) -> Array:
    """L of every set. Raises PlanError where these are not finite numbers, one for each set."""
    found = stats[name_of(params)]
    if found.shape != (set_count(facts, params.keep),) or not np.isfinite(found).all():
        raise PlanError(
            f"the losses of layer {facts.layer} are not {set_count(facts, params.keep):,} finite numbers",
            next="the statistics are damaged or the model overflows; calibrate again",
        )
    return found


def choose(
    facts: LayerFacts, stats: Mapping[str, Array], keep: int, protected: Sequence[int], params: NaeeParams
) -> list[int]:
    """The set of least L among those with all protected experts.

    Raises:
        PlanError: losses that are not finite.
    """
    guarded = set(protected)
    each = zip(losses(facts, stats, params), kept_sets(facts, keep), strict=True)
    return list(min((pair for pair in each if guarded <= set(pair[1])), key=lambda pair: pair[0])[1])


def score(facts: LayerFacts, stats: Mapping[str, Array], params: NaeeParams) -> Array:
    """The least L of a layer without this expert, float64 [E], for the reader of the plan: ``choose`` decides."""
    found = np.full(facts.experts, np.inf)
    everyone = frozenset(range(facts.experts))
    for loss, kept in zip(losses(facts, stats, params), kept_sets(facts, params.keep), strict=True):
        gone = list(everyone.difference(kept))
        found[gone] = np.minimum(found[gone], loss)
    return np.where(np.isfinite(found), found, 0.0)  # nothing is dropped: no set is without an expert


NAEE = Method(
    name="naee",
    family="prune",
    summary="tries every set of experts and keeps the one that changes the layer's output least",
    paper="NAEE, arXiv 2402.14800",
    needs=(),
    params=NaeeParams,
    records=records,
    check=check,
    choose=choose,
    run=score,
)

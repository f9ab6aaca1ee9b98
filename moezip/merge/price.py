"""What a merge costs: the error that it makes of the experts' outputs, and what the loss makes of that.

A token t that went to expert i is now given f_M in place of f_i. To second order, tokens and output channels one by
one and gradients independent of errors, that raises the loss by

    1/(2T) sum_i sum_r G_ir sum_t g_ti^2 (f_M(x_t) - f_i(x_t))_r^2 / sum_t g_ti^2        [nats per token]

with G_ir the sum over the tokens of i of the squared gradient of the loss at channel r of its output, before the gate,
and T the scored tokens. The sums over t run over a sample. What a router does besides that has other rows than before
is not in it, nor that errors of one token add before they are squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moezip.arch.spec import ExpertRole
from moezip.calibrate.statistics import Array
from moezip.formats.factors import INDEX, LEFT, RIGHT, ROWS, multiplied
from moezip.merge.layer import Merge, MergeLayer
from moezip.plan.merged import average, expert_value, factor_value
from moezip.plan.plan import Pick

if TYPE_CHECKING:
    import torch

# Tokens of each expert, evenly spaced, that outputs are compared on.
SAMPLE = 1024
GRADIENT = "down_grad_square"
SCORED = "scored"


@dataclass(frozen=True, slots=True)
class Change:
    """How far one expert's outputs are from those of what it went into.

    Attributes:
        expert: of the source.
        channels: [D], mean over its tokens of the squared change, tokens weighted by their squared gates.
        mass: sum of g^2 over all its tokens. size: mean squared norm of its own output, weighted alike.
    """

    expert: int
    channels: Array
    mass: float
    size: float


def priced(layer: MergeLayer, found: Merge) -> None:
    """Gives ``found`` a note on the relative error, and ``nats`` where the statistics have gradients.

    Layers that were not looked at get neither.
    """
    if layer.inputs is None:
        return
    changes = changes_of(layer, found)
    error = sum(each.mass * float(each.channels.sum()) for each in changes)
    whole = sum(each.mass * each.size for each in changes)
    if whole > 0:
        found.notes += (f"squared error of the routed outputs {error / whole:.4f} of their size",)
    if GRADIENT in layer.stats and SCORED in layer.stats:
        found.nats = nats(changes, layer.stats[GRADIENT], float(layer.stats[SCORED]))


def nats(changes: list[Change], gradients: Array, scored: float) -> float:
    """The equation above.

    Args:
        gradients: G, [E, D]. scored: T.
    """
    return sum(float(gradients[each.expert] @ each.channels) for each in changes) / (2 * scored)


def changes_of(layer: MergeLayer, found: Merge) -> list[Change]:
    """Of every expert that went into one of the output and that some token was routed to."""
    import torch

    assert layer.inputs is not None
    inputs = layer.inputs
    jobs = [
        (number, part.expert)
        for number, pick in enumerate(found.picks)
        for part in pick.parts
        if len(inputs.slots(part.expert))
    ]

    index = layer.facts.layer
    solved = [
        any(name.startswith(expert_value(index, number, "")) for name in found.values)
        for number in range(len(found.picks))
    ]

    def one(job: tuple[int, int]) -> Change:
        number, expert = job
        slots = inputs.slots(expert)
        mass = float(np.square(inputs.gates.reshape(-1)[slots].astype(np.float64)).sum())
        if len(slots) > SAMPLE:
            slots = slots[np.linspace(0, len(slots) - 1, SAMPLE).astype(np.int64)]
        x = inputs.hidden.gather(slots // inputs.ids.shape[1]).float()
        shares = torch.from_numpy(inputs.gates.reshape(-1)[slots]).square()
        shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
        with torch.no_grad():
            before = outputs(layer, x, matrices(layer, found, None, Pick.keep(expert)))
            size = float(shares @ before.square().sum(1))
            channels = np.zeros(before.shape[1])
            if found.picks[number] != Pick.keep(expert) or solved[number]:
                after = outputs(layer, x, matrices(layer, found, number, found.picks[number]))
                channels = (shares @ (after - before).square()).double().numpy()
        return Change(expert, channels, mass, size)

    with ThreadPoolExecutor(torch.get_num_threads(), "moezip-price", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(one, jobs))


def matrices(layer: MergeLayer, found: Merge, number: int | None, pick: Pick) -> dict[ExpertRole, torch.Tensor]:
    """An output expert's matrices by role, float32, rounded as the checkpoint stores them; a source's for None.

    Factors are multiplied out.
    """
    import torch

    result: dict[ExpertRole, torch.Tensor] = {}
    index, values = layer.facts.layer, found.values if number is not None else {}
    for role in layer.roles:
        named = {suffix: factor_value(index, number or 0, role, suffix) for suffix in (LEFT, RIGHT, ROWS, INDEX)}
        if named[LEFT] in values:
            factors = {suffix: values[name] for suffix, name in named.items() if name in values}
            result[role] = multiplied(factors, torch.float32)
            continue
        value = values.get(expert_value(index, number or 0, role))
        if value is None:
            value = average(layer.source, layer.architecture, index, pick, role)
        result[role] = value.to(layer.dtype(role)).float()
    return result


def outputs(layer: MergeLayer, x: torch.Tensor, own: Mapping[ExpertRole, torch.Tensor]) -> torch.Tensor:
    """What an expert makes of inputs [n, D], before the gate: [n, D] float32."""
    import torch.nn.functional as F

    inner = layer.activate(F.linear(x, own["gate"], own.get("gate_bias")), F.linear(x, own["up"], own.get("up_bias")))
    return F.linear(inner, own["down"], own.get("down_bias"))

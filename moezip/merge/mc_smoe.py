"""MC-SMoE (arXiv 2310.01334, its second stage): merged experts stored as thin factors and some whole rows.

Groups and averages are those of ``m-smoe``. Then every matrix W [R, C] becomes left @ right of rank r plus k rows. The
paper finds both by training on a task; here they are found without training, and may be trained to repeat what the
layer put out before (``--set steps=N``).

Without training. With H = sum_t g_t^2 x_t x_t^T over the tokens t routed to the expert, gates g, and s_r the mean
squared gradient at output channel r where gradients were recorded (``--set price=true``), else 1, the error of W' is

    sum_r s_r (W' - W)_r H (W' - W)_r^T,

to second order what it adds to the loss but for a factor. Rows that are kept cost nothing, so for given rows the best
factors are the truncated SVD of the others, whitened: sqrt(s) W L with H = L L^T; for given factors the best rows are
those with the largest error. Both in turn until the rows stay the same; the error never grows. Two starts, without rows
and with the largest ones, of which the better end is taken. Kept rows are W's own, and left is 0 there.

Down sees what the factored gate and up make of the tokens. Where no token was routed to a group, H = I.

The paper keeps a tenth of the rows; the default here is none, because on the reference model numbers in the factors
were worth more than numbers in rows at every share that was tried, trained or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.arch.spec import ExpertRole, LayerFacts
from moezip.errors import MoezipError, UsageError
from moezip.formats.factors import INDEX, LEFT, RIGHT, ROWS, Factors, multiplied
from moezip.merge.distil import Layer, train
from moezip.merge.layer import Merge, MergeLayer
from moezip.merge.m_smoe import M_SMOE, MSmoeParams
from moezip.merge.params import require_one_of
from moezip.merge.price import priced
from moezip.merge.solve import merged
from moezip.plan.merged import average, expert_value, factor_value
from moezip.plan.plan import Pick

if TYPE_CHECKING:
    import torch

    from moezip.calibrate.statistics import Array

ROLES: tuple[ExpertRole, ...] = ("gate", "up", "down")
# The statistic of the squared gradient at the outputs of each role.
GRADIENTS = {"gate": "gate_grad_square", "up": "up_grad_square", "down": "down_grad_square"}
CHUNK = 4096  # tokens held in float32 at a time
ROUNDS = 8  # of choosing rows; they settle in two or three
RIDGE = 1e-3  # what is added to H, as a share of its mean diagonal
LEAST = 1e-6  # the least weight of an output channel, as a share of the mean

Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class McSmoeParams(MSmoeParams):
    """Attributes:
    share: numbers in the two factors, as a share of those in the matrix. rows: share of the rows that are kept.
    experts: which are factored: ``all`` of the output, or the ``merged`` ones, as published.
    steps: of training the factors to repeat the layer's outputs; 0 for none.
    batch: tokens per step. rate: step size, as a share of the factors' own mean size.
    seed: of the tokens' order; ``--seed`` where not set.
    """

    share: float = 0.5
    rows: float = 0.0
    experts: str = "all"
    steps: int = 0
    batch: int = 1024
    rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        MSmoeParams.__post_init__(self)
        require_one_of("experts", self.experts, ("all", "merged"))
        if not (self.share > 0 and self.rows >= 0 and self.share + self.rows < 1):
            raise UsageError(
                f"share and rows are parts of a matrix, together below 1, not {self.share:g} and {self.rows:g}",
                where=f"--set share={self.share:g}, rows={self.rows:g}",
            )
        for key, value, least in (("steps", self.steps, 0), ("batch", self.batch, 1)):
            if value < least:
                raise UsageError(f"{key} is {least} or more", where=f"--set {key}={value}")
        if not self.rate > 0:
            raise UsageError("the rate must be above 0", where=f"--set rate={self.rate:g}")


def sizes(facts: LayerFacts, params: McSmoeParams) -> dict[ExpertRole, Factors]:
    """By role, what every factored expert of a layer is stored as: rounded down, so never more than asked for."""
    wide, hidden = facts.width, facts.hidden
    rank = max(1, int(params.share * wide * hidden / (wide + hidden)))
    inner, outer = Factors(rank, int(params.rows * wide)), Factors(rank, int(params.rows * hidden))
    return {"gate": inner, "up": inner, "down": outer}


# -- one matrix ---------------------------------------------------------------------------------------------


def factored(weight: torch.Tensor, moment: torch.Tensor, channels: torch.Tensor | None, size: Factors) -> Tensors:
    """Left, right, rows and their index, float32, as ``moezip.formats.factors`` has them.

    Args:
        weight: [R, C]. moment: [C, C], sum of x x^T.
        channels: [R], what an error of an output channel weighs; None for all the same.
        size: of the factors; rank at most R and C.

    Raises:
        MoezipError: numbers that are not finite.
    """
    import torch

    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(moment).all())):
        raise MoezipError("weights or inputs of some experts are not finite, so they have no factors",
                          next="look for infinite weights with `moezip verify`")  # fmt: skip
    columns = weight.shape[1]
    scale = float(moment.diagonal().mean())
    moment = moment / scale if scale > 0 else torch.eye(columns)
    lower = torch.linalg.cholesky((moment + RIDGE * torch.eye(columns)).double())
    heavy = torch.ones(weight.shape[0]) if channels is None else channels.float()
    heavy = (heavy / heavy.mean().clamp_min(1e-30)).clamp_min(LEAST).sqrt()
    whitened = heavy[:, None].double() * (weight.double() @ lower)
    basis, kept, _ = min(
        (settled(whitened, start, size) for start in starts(whitened, size)), key=lambda found: found[2]
    )
    left = (whitened @ basis) / heavy[:, None].double()
    left[kept] = 0
    right = torch.linalg.solve_triangular(lower.T, basis, upper=True).T  # basis^T lower^-1
    # both factors of one size, component by component, which training and rounding like best
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt().clamp(1e-6, 1e6)
    left, right = left * balance, right / balance[:, None]
    found = {LEFT: left.float(), RIGHT: right.float()}
    if size.rows:
        found |= {ROWS: weight[kept].float(), INDEX: kept.int()}
    return {suffix: tensor.contiguous() for suffix, tensor in found.items()}


def starts(whitened: torch.Tensor, size: Factors) -> list[torch.Tensor]:
    """Rows to begin with: none, and the largest, as rows of their own kind may be either."""
    import torch

    found = [torch.zeros(0, dtype=torch.long)]
    return [*found, torch.topk(whitened.square().sum(1), size.rows).indices.sort().values] if size.rows else found


def settled(whitened: torch.Tensor, kept: torch.Tensor, size: Factors) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Directions and rows, found in turn until they stay the same, and the error that is left."""
    import torch

    for _ in range(ROUNDS):
        basis = leading(whitened, kept, size.rank)
        error = (whitened - whitened @ basis @ basis.T).square().sum(1)
        chosen = torch.topk(error, size.rows).indices.sort().values
        if torch.equal(chosen, kept):
            break
        kept = chosen  # for the same directions the best
    else:
        basis = leading(whitened, kept, size.rank)
        error = (whitened - whitened @ basis @ basis.T).square().sum(1)
    error[kept] = 0
    return basis, kept, float(error.sum())


def leading(whitened: torch.Tensor, kept: torch.Tensor, rank: int) -> torch.Tensor:
    """[C, rank]: the directions that hold most of all rows but ``kept``."""
    import torch

    rest = whitened.clone()
    rest[kept] = 0
    _, vectors = torch.linalg.eigh(rest.T @ rest)
    return vectors[:, -rank:].flip(1)


# -- one expert ---------------------------------------------------------------------------------------------


def tokens_of(layer: MergeLayer, pick: Pick) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [n, D] of the tokens routed to the members of a pick, and their gates [n], float32, in pieces."""
    import torch

    inputs = layer.inputs
    assert inputs is not None
    for expert in pick.members:
        slots = inputs.slots(expert)
        gates = torch.from_numpy(inputs.gates.reshape(-1)[slots])
        for start in range(0, len(slots), CHUNK):
            part = slice(start, start + CHUNK)
            yield inputs.hidden.gather(slots[part] // inputs.ids.shape[1]).float(), gates[part]


def dense(layer: MergeLayer, found: Merge, number: int) -> dict[ExpertRole, torch.Tensor]:
    """The matrices and biases of an output expert, by role, float32: solved ones, else the average."""
    index, pick = layer.facts.layer, found.picks[number]
    result = {}
    for role in layer.roles:
        name = expert_value(index, number, role)
        solved = found.values.get(name)
        result[role] = (
            average(layer.source, layer.architecture, index, pick, role) if solved is None else solved.float()
        )
    return result


def channel_weights(layer: MergeLayer, pick: Pick, role: ExpertRole) -> torch.Tensor | None:
    """[R]: the squared gradients at the outputs of a role, summed over the members; None where not recorded."""
    import torch

    squares: Array | None = layer.stats.get(GRADIENTS[role])
    if squares is None:
        return None
    rows = []
    for part in pick.parts:
        row = torch.from_numpy(squares[part.expert]).float()
        rows.append(row if part.neurons is None or role == "down" else row[list(part.neurons)])
    return torch.stack(rows).sum(0)


def compressed(layer: MergeLayer, found: Merge, number: int, params: McSmoeParams) -> dict[ExpertRole, Tensors]:
    """The factors of one output expert, by role."""
    import torch

    pick, weights, size = found.picks[number], dense(layer, found, number), sizes(layer.facts, params)
    moment = torch.zeros(layer.facts.hidden, layer.facts.hidden)
    for x, gates in tokens_of(layer, pick):
        moment.addmm_(x.T, x * gates.square()[:, None])
    made = {
        role: factored(weights[role], moment, channel_weights(layer, pick, role), size[role]) for role in ("gate", "up")
    }
    gate, up = multiplied(made["gate"]), multiplied(made["up"])
    moment = torch.zeros(layer.facts.width, layer.facts.width)
    for x, gates in tokens_of(layer, pick):
        inner = layer.activate(
            torch.nn.functional.linear(x, gate, weights.get("gate_bias")),
            torch.nn.functional.linear(x, up, weights.get("up_bias")),
        )
        moment.addmm_(inner.T, inner * gates.square()[:, None])
    made["down"] = factored(weights["down"], moment, channel_weights(layer, pick, "down"), size["down"])
    return made  # type: ignore[return-value]


# -- one layer ----------------------------------------------------------------------------------------------


def solve(layer: MergeLayer, params: McSmoeParams) -> Merge:
    """The common stages of merging, then factors in place of the matrices, then the price of both."""
    import torch

    found = merged(layer, params)
    chosen = [n for n, pick in enumerate(found.picks) if params.experts == "all" or pick.mixed]

    def one(number: int) -> dict[ExpertRole, Tensors]:
        with torch.no_grad():
            return compressed(layer, found, number, params)

    # one expert per thread: threads inside these small operations wait for each other most of the time
    with ThreadPoolExecutor(torch.get_num_threads(), "moezip-factor", torch.set_num_threads, (1,)) as pool:
        made = dict(zip(chosen, pool.map(one, chosen), strict=True))
    if params.steps:
        weights = {number: dense(layer, found, number) for number in range(len(found.picks))}
        experts = Layer(layer, found.picks, weights, made)
        before, after = train(experts, steps=params.steps, batch=params.batch, rate=params.rate, seed=params.seed)
        said = f"{before:.1%} of its size before training, {after:.1%} after"
        found.notes += (f"squared error of the experts' summed output on tokens held back: {said}",)
    index = layer.facts.layer
    for number, roles in made.items():
        for role, tensors in roles.items():
            found.values.pop(expert_value(index, number, role), None)
            dtype = layer.dtype(role)
            for suffix, tensor in tensors.items():
                value = tensor if suffix == INDEX else tensor.to(dtype)
                found.values[factor_value(index, number, role, suffix)] = value
    priced(layer, found)
    return found


MC_SMOE = dataclasses.replace(
    M_SMOE,
    name="mc-smoe",
    summary="merges as m-smoe, then stores experts as thin factors and some whole rows",
    paper="MC-SMoE, arXiv 2310.01334",
    params=McSmoeParams,
    looks=lambda params: True,
    solve=solve,
    factored=sizes,
)

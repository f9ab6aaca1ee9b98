"""MAN and MSAN (arXiv 2606.15716): one family of scores with three exponents.

    S_i(b, alpha, beta) = 1 / n_i^b * sum over tokens routed to i of  g_t,i^alpha * ||f_i(x_t)||^beta

b = 1 is a mean over the tokens that an expert serves, b = 0 a sum, which counts how often it is used; alpha brings the
gate weight in, beta the norm of the output. The paper finds that a model that is to stay general wants the mean of the
bare norm or its square, and a model for one task the sum with the gate:

    (1, 0, 2)   the default, task-agnostic: MSAN, the mean squared activation norm; (1, 0, 1) is MAN, the mean norm
    (0, 1, 1)   `--set task=true`, for the task that the calibration text is of

`--set b=`, `alpha=` and `beta=` set any other, none of them below 0. Other methods are members: (1, 0, 1) is mean-norm,
(1, 1, 1) reap, (0, 1, 0) gate-sum and (0, 0, 0) frequency; their sums are in every statistics file. An expert that no
token reached scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import BY_NAME, Observation, Record
from moezip.calibrate.statistics import Array
from moezip.errors import UsageError
from moezip.prune.params import PruneParams
from moezip.prune.ratios import per_token
from moezip.registry import Method, record_name

if TYPE_CHECKING:
    import torch

GENERAL = (1.0, 0.0, 2.0)
TASK = (0.0, 1.0, 1.0)
# (alpha, beta) whose sums every calibration takes
STANDING = {(0.0, 0.0): "counts", (1.0, 0.0): "gate_sum", (0.0, 1.0): "norm_sum", (1.0, 1.0): "gate_norm_sum"}


@dataclass(frozen=True, slots=True)
class ManParams(PruneParams):
    """Attributes:
    task: exponents (0, 1, 1), for one task, in place of (1, 0, 2).
    b, alpha, beta: the exponents by themselves; -1 as ``task`` says.
    """

    task: bool = False
    b: float = -1.0
    alpha: float = -1.0
    beta: float = -1.0

    def __post_init__(self) -> None:
        for name, default in zip(("b", "alpha", "beta"), TASK if self.task else GENERAL, strict=True):
            given = getattr(self, name)
            if given == -1:
                object.__setattr__(self, name, default)  # so that plans show the exponents that were used
            elif not 0 <= given < float("inf"):
                raise UsageError(
                    f"{name} is {given:g}", where=f"--set {name}={given:g}", next="give a number from 0 up"
                )


def record_of(params: ManParams) -> Record:
    """The sum of g^alpha ||f||^beta."""
    alpha, beta = params.alpha, params.beta
    if standing := STANDING.get((alpha, beta)):
        return BY_NAME[standing]

    def update(seen: Observation) -> torch.Tensor:
        return seen.per_expert(seen.gates.double() ** alpha * seen.norms.double() ** beta)

    name = record_name("man", {"alpha": alpha, "beta": beta})
    return Record(name, f"sum of gate^{alpha:g} x norm^{beta:g}", "sum", lambda facts: (facts.experts,), update)


def records(params: ManParams) -> tuple[Record, ...]:
    """The counts and the sum that these exponents ask for."""
    return BY_NAME["counts"], record_of(params)


def score(facts: LayerFacts, stats: Mapping[str, Array], params: ManParams) -> Array:
    """S_i for every expert of one layer, float64 [E]; 0 for an expert that no token reached."""
    return per_token(stats[record_of(params).name], stats["counts"] ** params.b)


MAN = Method(
    name="man",
    family="prune",
    summary="mean squared output norm (MSAN), or any of its family of gate, norm and frequency exponents",
    paper="MAN/MSAN, arXiv 2606.15716",
    needs=(),
    params=ManParams,
    records=records,
    run=score,
)

"""TCESS of PreMoe (arXiv 2505.17639): how strongly the router's own largest logits ask for an expert.

With z_t the raw router logits of token t, K_a the number of logits kept per token and rho a threshold:

    q_t   = softmax over the K_a largest logits of z_t (only those)
    e_t,i = the strength of expert i if it is among the K_a largest and q_t,i >= rho, else 0
    TCESS_i = mean over all tokens of e_t,i         (the same order as the sum, which is what is kept here)

`--set form=fixed` (the default) takes q_t,i for the strength: a positive number, so that being asked for always counts
in an expert's favour, and one that never is ranks last.

`--set form=coded` takes the raw logit z_t,i, as the authors' code does. It is here for comparison, and it is flawed:
raw logits may be negative, and a token that does not select an expert counts 0. An expert that is selected often with a
negative logit then ranks below one that is never selected, and among those the ranking rewards being used less. In the
index that the authors ship, 234 of the 256 experts of a layer have a negative score. As such scores have no common
scale, negative ones of several domains are refused.

`--set top=K_a`: 0, the default, is the model's own number of experts per token; more than there are experts is all of
them. The authors' demo uses 1, with which q is always 1 and the fixed form counts how often an expert comes first.
`--set threshold=rho`: -1, the default, is none.

The K_a largest are those of the bare logits, as in the paper: no selection bias and no groups, so that for routers that
have these (DeepSeek-V3) they are not always the experts that the model chose. No expert is looked at, only the router.
The authors run their model without its groups; here groups stay, and keep equally many experts each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import Observation, Record
from moezip.calibrate.statistics import Array
from moezip.errors import UsageError
from moezip.prune.params import PruneParams
from moezip.registry import Method, record_name

if TYPE_CHECKING:
    import torch

FORMS = ("fixed", "coded")


@dataclass(frozen=True, slots=True)
class TcessParams(PruneParams):
    """Attributes:
    form: ``fixed`` sums shares of the kept logits, ``coded`` the raw logits (flawed, see above).
    top: K_a, logits kept per token; 0 for the model's number of experts per token.
    threshold: rho, the least share that counts; -1 for none.
    """

    form: str = "fixed"
    top: int = 0
    threshold: float = -1.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"form is fixed or coded, not {self.form!r}", where=f"--set form={self.form}")
        if self.top < 0:
            raise UsageError(
                f"{self.top} logits per token cannot be kept", where=f"--set top={self.top}",
                next="give a number of experts, or 0 for the model's own",
            )  # fmt: skip
        if self.threshold != -1 and not 0 <= self.threshold <= 1:
            raise UsageError(
                f"{self.threshold:g} is no share of a softmax", where=f"--set threshold={self.threshold:g}",
                next="give a number from 0 to 1, or -1 for no threshold",
            )  # fmt: skip


def strengths(seen: Observation, params: TcessParams) -> torch.Tensor:
    """Sum over the tokens of e_t,i, float64 [E]."""
    import torch

    kept, ids = seen.logits.double().topk(min(params.top or seen.ids.shape[1], seen.experts))
    shares = kept.softmax(-1)
    values = shares if params.form == "fixed" else kept
    if params.threshold != -1:
        values = values * (shares >= params.threshold)
    return torch.bincount(ids.reshape(-1), weights=values.reshape(-1), minlength=seen.experts)


def name_of(params: TcessParams) -> str:
    """The name under which the sums of these settings are recorded."""
    return record_name("tcess", {"form": params.form, "top": params.top, "threshold": params.threshold})


def records(params: TcessParams) -> tuple[Record, ...]:
    """The one record that the settings ask for."""
    return (
        Record(
            name_of(params),
            f"TCESS, {params.form} form",
            "sum",
            lambda facts: (facts.experts,),
            lambda seen: strengths(seen, params),
        ),
    )


def score(facts: LayerFacts, stats: Mapping[str, Array], params: TcessParams) -> Array:
    """The sum of TCESS for every expert of one layer, float64 [E]."""
    return stats[name_of(params)]


TCESS = Method(
    name="tcess",
    family="prune",
    summary="how strongly the router's largest logits ask for the expert",
    paper="PreMoe, arXiv 2505.17639",
    needs=(),
    params=TcessParams,
    records=records,
    run=score,
)

"""Criteria with sums or choices of their own: TCESS, MAN/MSAN, STUN, and the profile of super experts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moezip import demo
from moezip.arch.spec import LayerFacts
from moezip.calibrate.record import BY_NAME, RECORDS, Observation
from moezip.calibrate.statistics import Domain, Statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import PlanError, UsageError
from moezip.evaluate.loss import evaluate
from moezip.pipeline.calibrate import records_named
from moezip.pipeline.common import Common
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune
from moezip.plan.allocate import chosen, combine_domains, mix_domains, rank
from moezip.plan.apply import Applied
from moezip.prune import METHODS
from moezip.prune.man import MAN, ManParams
from moezip.prune.stun import STUN, StunParams, choose, clusters, representative, square_distances
from moezip.prune.super_experts import profile
from moezip.prune.tcess import TCESS
from moezip.registry import own_records, parse_params
from tests.command import Cli, write_text

BY_METHOD = {method.name: method for method in METHODS}
# Logits are float32: their rounding, relative, carried through one softmax.
FLOAT32 = 1e-6


def seen_logits(logits: list[list[float]], top_k: int = 2) -> Observation:
    """Tokens with these logits; what else a layer did is of no matter."""
    values = torch.tensor(logits)
    tokens = len(logits)
    return Observation(
        experts=values.shape[1],
        ids=values.topk(top_k).indices,
        gates=torch.ones(tokens, top_k),
        norms=torch.ones(tokens, top_k),
        change=torch.ones(tokens, dtype=torch.float64),
        peaks=torch.ones(values.shape[1]),
        logits=values,
    )


def scores(method: Any, seen: Observation, **settings: Any) -> np.ndarray:
    """The method's scores of one layer, from nothing but the records that it asks for."""
    params = method.params(**settings)
    facts = LayerFacts(layer=0, experts=seen.experts, top_k=seen.ids.shape[1], hidden=4, width=4)
    stats = {record.name: record.update(seen).numpy() for record in method.records(params)}
    assert all(stats[r.name].shape == r.shape(facts) for r in method.records(params))
    assert set(stats) == set(method.reads(params))
    found: np.ndarray = method.run(facts, stats, params)
    assert found.dtype == np.float64
    return found


# -- tcess --------------------------------------------------------------------------------------------------
#
#            logits                          two largest   softmax over these two
#   token 0  ln 3,  0,    -5,         -6     0, 1          3/4, 1/4
#   token 1  -9,    ln 4,  0,         -3     1, 2          4/5, 1/5
#   token 2  -2,    -8,   -2 - ln 9,  -9     0, 2          9/10, 1/10
#
# Expert 3 is never selected.
LN = math.log
TOKENS = seen_logits([[LN(3), 0, -5, -6], [-9, LN(4), 0, -3], [-2, -8, -2 - LN(9), -9]])


def test_tcess_by_hand() -> None:
    # expert 0: 3/4 + 9/10, expert 1: 1/4 + 4/5, expert 2: 1/5 + 1/10
    assert scores(TCESS, TOKENS).tolist() == pytest.approx([1.65, 1.05, 0.3, 0], rel=FLOAT32)
    # without the shares below 0.22: 1/5 and 1/10 go
    assert scores(TCESS, TOKENS, threshold=0.22).tolist() == pytest.approx([1.65, 1.05, 0, 0], rel=FLOAT32)
    # ... and without 1/4
    assert scores(TCESS, TOKENS, threshold=0.5).tolist() == pytest.approx([1.65, 0.8, 0, 0], rel=FLOAT32)
    # of one logit the softmax is 1: experts that come first are counted
    assert scores(TCESS, TOKENS, top=1).tolist() == [2, 1, 0, 0]
    assert scores(TCESS, TOKENS, top=2).tolist() == scores(TCESS, TOKENS).tolist()
    # all of them: the plain softmax, which sums to 1 for each of the three tokens
    assert scores(TCESS, TOKENS, top=4).sum() == pytest.approx(3, rel=1e-12)
    assert scores(TCESS, TOKENS, top=99).tolist() == scores(TCESS, TOKENS, top=4).tolist()


def test_the_form_as_coded_has_the_flaw() -> None:
    # raw logits of the selected: expert 0: ln 3 - 2, expert 1: 0 + ln 4, expert 2: 0 - 2 - ln 9
    coded = scores(TCESS, TOKENS, form="coded")
    assert coded.tolist() == pytest.approx([LN(3) - 2, LN(4), -2 - LN(9), 0], rel=FLOAT32)
    # the expert that no token selects (3) ranks above expert 0, the one most asked for; in the fixed form it is last
    facts = LayerFacts(layer=0, experts=4, top_k=2, hidden=4, width=4)
    assert np.argsort(-coded).tolist() == [1, 3, 0, 2]
    assert rank(facts, coded, 2) == [1, 3]
    assert np.argsort(-scores(TCESS, TOKENS)).tolist() == [0, 1, 2, 3]
    assert rank(facts, scores(TCESS, TOKENS), 2) == [0, 1]
    # the threshold is on the share here too: 1/5 and 1/10 go, and with them the logits 0 and -2 - ln 9
    assert scores(TCESS, TOKENS, form="coded", threshold=0.22)[2] == 0


@pytest.mark.parametrize("shift", [-1000.0, -3.0, 0.0, 5.0])
def test_a_never_selected_expert_ranks_last_whatever_the_signs(shift: float) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(30, 8, generator=generator) * 3
        idle = int(torch.randint(8, (1,), generator=generator))
        logits[:, idle] = logits.min() - 1
        seen = seen_logits((logits + shift).tolist(), top_k=3)
        found = scores(TCESS, seen)
        assert found[idle] == 0
        assert (np.delete(found, idle) > 0).all()
        assert found.sum() == pytest.approx(30, rel=1e-12)  # one for each token


def test_settings_of_tcess() -> None:
    for settings, message in (
        ({"form": "paper"}, "form is fixed or coded, not 'paper'"),
        ({"top": "-1"}, "-1 logits per token"),
        ({"threshold": "1.5"}, "1.5 is no share"),
        ({"threshold": "nan"}, "nan is no share"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_params(TCESS, settings)


# -- man ----------------------------------------------------------------------------------------------------
#
#            chosen   gates        norms
#   token 0   0, 1    0.75, 0.25   2, 4
#   token 1   1, 0    0.5,  0.5    8, 6
#   token 2   1, 0    1,    0.25   1, 16
#   token 3   0, 1    0,    1      3, 3
#
# Expert 2 is never chosen.
ROUTED = Observation(
    experts=3,
    ids=torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]]),
    gates=torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.25], [0.0, 1.0]]),
    norms=torch.tensor([[2.0, 4.0], [8.0, 6.0], [1.0, 16.0], [3.0, 3.0]]),
    change=torch.zeros(4, dtype=torch.float64),
    peaks=torch.ones(3),
    logits=torch.zeros(4, 3),
)


def test_man_by_hand() -> None:
    # (1, 0, 2): expert 0: (4 + 36 + 256 + 9) / 4, expert 1: (16 + 64 + 1 + 9) / 4
    assert scores(MAN, ROUTED).tolist() == [305 / 4, 90 / 4, 0]
    assert scores(MAN, ROUTED, b=0.0).tolist() == [305, 90, 0]
    assert scores(MAN, ROUTED, b=0.5).tolist() == [305 / 2, 90 / 2, 0]
    # (0, 1, 1): expert 0: 0.75*2 + 0.5*6 + 0.25*16 + 0*3, expert 1: 0.25*4 + 0.5*8 + 1*1 + 1*3
    assert scores(MAN, ROUTED, task=True).tolist() == [8.5, 9, 0]
    # (0, 2, 1): expert 0: 0.5625*2 + 0.25*6 + 0.0625*16 + 0, expert 1: 0.0625*4 + 0.25*8 + 1 + 3
    assert scores(MAN, ROUTED, b=0.0, alpha=2.0, beta=1.0).tolist() == [3.625, 6.25, 0]
    # (0, 0.5, 0.5): the roots of the products: expert 0: 1.5, 3, 4, 0; expert 1: 1, 4, 1, 3
    roots = [sum(map(math.sqrt, (1.5, 3, 4, 0))), sum(map(math.sqrt, (1, 4, 1, 3))), 0]
    assert scores(MAN, ROUTED, b=0.0, alpha=0.5, beta=0.5).tolist() == pytest.approx(roots, rel=1e-15)


def test_other_methods_are_members_of_the_family() -> None:
    standing = {record.name: record.update(ROUTED).numpy() for record in RECORDS}
    facts = LayerFacts(layer=0, experts=3, top_k=2, hidden=4, width=4)
    for exponents, name in (
        ((1.0, 0.0, 1.0), "mean-norm"),
        ((1.0, 1.0, 1.0), "reap"),
        ((0.0, 1.0, 0.0), "gate-sum"),
        ((0.0, 0.0, 0.0), "frequency"),
    ):
        method = BY_METHOD[name]
        params = ManParams(b=exponents[0], alpha=exponents[1], beta=exponents[2])
        assert set(MAN.reads(params)) <= set(BY_NAME)  # in every statistics file
        assert MAN.run(facts, standing, params).tolist() == method.run(facts, standing, method.params()).tolist(), name
    assert scores(MAN, ROUTED, task=True).tolist() == standing["gate_norm_sum"].tolist()


def test_settings_of_man() -> None:
    def exponents(**settings: str) -> tuple[float, float, float]:
        found = parse_params(MAN, settings)
        return found.b, found.alpha, found.beta

    assert exponents() == (1, 0, 2)
    assert exponents(task="true") == (0, 1, 1)
    assert exponents(beta="1") == (1, 0, 1)
    assert exponents(task="true", b="1") == (1, 1, 1)
    for bad in ("-2", "nan", "inf"):
        with pytest.raises(UsageError, match="alpha is"):
            exponents(alpha=bad)


# -- names of records that carry settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        (TCESS, {}, "tcess:form=fixed,top=0,threshold=-1"),
        (TCESS, {"form": "coded", "top": 8, "threshold": 0.1}, "tcess:form=coded,top=8,threshold=0.1"),
        (TCESS, {"threshold": 0.1 + 2**-40}, f"tcess:form=fixed,top=0,threshold={0.1 + 2**-40!r}"),
        (MAN, {}, "man:alpha=0,beta=2"),
        (MAN, {"b": 0.0}, "man:alpha=0,beta=2"),  # b divides afterwards: the same sums
        (MAN, {"alpha": 0.5, "beta": 3.0}, "man:alpha=0.5,beta=3"),
    ],
)
def test_names_carry_the_settings_there_and_back(method: Any, settings: dict[str, Any], name: str) -> None:
    record = method.records(method.params(**settings))[-1]
    assert record.name == name
    assert "/" not in name  # it becomes part of a tensor's name
    again = own_records(name, METHODS)
    assert again is not None
    assert again[-1].name == name
    assert again[-1].combine == "sum"
    assert again[-1].update(TOKENS).tolist() == record.update(TOKENS).tolist()


def test_records_are_asked_for_by_name() -> None:
    def names(*asked: str) -> list[str]:
        return [record.name for record in records_named(asked)]

    standing = [record.name for record in RECORDS]
    assert [record.name for record in records_named(None)] == names() == standing
    # a method's own come besides the standing ones, settings left out have their defaults
    assert names("tcess") == names("tcess:") == [*standing, "tcess:form=fixed,top=0,threshold=-1"]
    assert names("tcess:top=3", "man") == [*standing, "tcess:form=fixed,top=3,threshold=-1", "man:alpha=0,beta=2"]
    # ... unless some of those are named
    assert names("output_max", "man") == ["output_max", "counts", "man:alpha=0,beta=2"]
    assert names("stun:similarity=router", "counts") == ["counts", "router_gram"]
    for bad, message in (
        ("tces", "unknown record 'tces'"),
        ("tces:top=3", "did you mean 'tcess'"),
        ("reap:guard=true", "unknown method with records of its own 'reap'"),
        ("tcess:tpo=3", "did you mean 'top'"),
        ("tcess:top", "'top' is no setting"),
        ("tcess:top=many", "'many' does not read as int"),
    ):
        with pytest.raises(UsageError) as caught:
            names(bad)
        assert message in f"{caught.value.what} {caught.value.next}", bad


def test_such_records_add_up_and_survive_the_disk(tmp_path: Path) -> None:
    name = "tcess:form=fixed,top=0,threshold=-1"

    def of(*values: float) -> Statistics:
        layers = {3: {name: np.array(values), "output_max": np.array(values)}}
        return Statistics("model", (Domain("code", (str(values),), 5, layers),))

    both = of(1, 5) + of(3, 2)
    both.save(tmp_path / "s")
    found = Statistics.load(tmp_path / "s").domains[0]
    assert found.layers[3][name].tolist() == [4, 7]
    assert found.layers[3]["output_max"].tolist() == [3, 5]  # a standing one still combines in its own way
    assert found.tokens == 10


# -- stun ---------------------------------------------------------------------------------------------------


def selections(chosen: list[list[int]], experts: int) -> dict[str, np.ndarray]:
    """Counts and co-activation of tokens that chose these experts."""
    marks = np.zeros((len(chosen), experts))
    for token, ids in enumerate(chosen):
        marks[token, ids] = 1
    return {"counts": marks.sum(0), "coactivation": marks.T @ marks, "router_gram": np.full((experts, experts), np.nan)}


def facts_of(experts: int, groups: int = 1, top_k: int = 1) -> LayerFacts:
    return LayerFacts(layer=0, experts=experts, top_k=top_k, hidden=4, width=4, groups=groups, top_groups=groups)


def test_similarity_by_hand() -> None:
    # expert 0: 4 tokens; expert 1: 1, which also chose 0; expert 2: 4, of which 2 also chose 0; expert 3: none
    stats = selections([[0, 1], [0, 2], [0, 2], [0], [2], [2]], 4)
    # s_01 = 1 / min(4, 1) = 1, s_02 = 2 / min(4, 4) = 1/2, s_12 = 0; d^2 = 2 - 2 s; expert 3 resembles nobody
    assert square_distances(stats["coactivation"], range(4), "coactivation").tolist() == [
        [0, 0, 1, 2],
        [0, 0, 2, 2],
        [1, 2, 0, 2],
        [2, 2, 2, 0],
    ]
    # logits of two tokens: (3, 4) and (-6, -8) point in opposite directions, (4, -3) is at a right angle to both
    columns = np.array([[3.0, -6, 4], [4, -8, -3]])
    assert square_distances(columns.T @ columns, range(3), "router") == pytest.approx(
        np.array([[0, 4, 2], [4, 0, 2], [2, 2, 0]]), abs=1e-15
    )


def test_linkage_is_complete() -> None:
    # points 0, 1, 2.5, 4.5 on a line: first 0 and 1 (1 apart). Then 2.5 is 2.5 from the far end of {0, 1}, and 2 from
    # 4.5, so complete linkage joins {2.5, 4.5}; single linkage, 1.5 from the near end, would have joined {0, 1, 2.5}.
    points = np.array([0, 1, 2.5, 4.5])
    squares = (points[:, None] - points) ** 2
    assert clusters(squares, 3) == [[0, 1], [2], [3]]
    assert clusters(squares, 2) == [[0, 1], [2, 3]]
    assert clusters(squares, 4) == [[0], [1], [2], [3]]
    assert clusters(squares, 1) == [[0, 1, 2, 3]]
    # 0 and 1 may not share: 2.5 joins 1 (1.5), and 4.5 is nearest to that (3.5, against 4.5 from 0)
    assert clusters(squares, 2, apart=[0, 1]) == [[0], [1, 2, 3]]


def test_clusters_are_those_of_the_definition() -> None:
    for seed in range(30):
        generator = np.random.default_rng(seed)
        points = generator.random((9, 3))
        squares = ((points[:, None] - points) ** 2).sum(-1)
        left = [[i] for i in range(9)]
        for count in range(9, 0, -1):
            assert clusters(squares, count) == sorted(left), (seed, count)
            pairs = [(a, b) for a in range(len(left)) for b in range(a)]
            if pairs:  # the two whose farthest members are nearest
                a, b = min(pairs, key=lambda p: squares[np.ix_(left[p[0]], left[p[1]])].max())
                left[b] = sorted(left[b] + left.pop(a))


def test_ties_never_change_the_count() -> None:
    for seed in range(50):
        generator = np.random.default_rng(seed)
        n = int(generator.integers(2, 17))
        squares = generator.integers(0, 3, (n, n)).astype(float)
        squares = np.triu(squares, 1) + np.triu(squares, 1).T
        for count in range(1, n + 1):
            found = clusters(squares, count)
            assert len(found) == count
            assert sorted(member for cluster in found for member in cluster) == list(range(n))


def test_the_representative_is_nearest_to_the_centroid() -> None:
    # points 0, 3, 4 on a line: the centroid is 7/3, from which 3 is nearest (2/3; 0 is 7/3 and 4 is 5/3 away)
    points = np.array([0.0, 3, 4])
    squares = (points[:, None] - points) ** 2
    assert representative([0, 1, 2], squares, np.array([9.0, 1, 9])) == 1
    # two are equally near to their centroid: the more used one, of equals the first
    assert representative([0, 2], squares, np.array([1.0, 0, 2])) == 2
    assert representative([0, 2], squares, np.array([2.0, 0, 2])) == 0


@pytest.mark.parametrize("similarity", ["coactivation", "router"])
def test_planted_clusters_are_found(similarity: str) -> None:
    """Experts of one family go together; one of each family stays, and of each the most typical one."""
    for seed in range(10):
        generator = np.random.default_rng(seed)
        family = generator.permutation(np.repeat(np.arange(4), 4))  # 16 experts in 4 families
        tokens = generator.integers(0, 4, 400)
        if similarity == "coactivation":
            # a token chooses 3 of the 4 of its family, and now and then a stranger
            marks = np.zeros((400, 16))
            for token, which in enumerate(tokens):
                marks[token, generator.permutation(np.flatnonzero(family == which))[:3]] = 1
                marks[token, generator.integers(16)] = 1
            stats = {"counts": marks.sum(0), "coactivation": marks.T @ marks}
        else:
            logits = 2.0 * (family == tokens[:, None]) + 0.5 * generator.standard_normal((400, 16))
            stats = {"counts": generator.random(16) + 1, "router_gram": logits.T @ logits}
        params = StunParams(similarity=similarity)
        for keep in range(1, 17):
            kept = choose(facts_of(16), stats, keep, (), params)
            assert kept == sorted(set(kept))
            assert len(kept) == keep
            if keep >= 4:
                assert {int(family[expert]) for expert in kept} == {0, 1, 2, 3}
            if keep == 4:
                with_guard = choose(facts_of(16), stats, 4, [int(np.flatnonzero(family == 2)[3])], params)
                assert np.flatnonzero(family == 2)[3] in with_guard
                assert {int(family[expert]) for expert in with_guard} == {0, 1, 2, 3}


def test_groups_and_guard_are_respected() -> None:
    # 0 1 2 3 always together, 4 .. 7 never: without groups, the first four are one cluster
    tokens = [[0, 1, 2, 3]] * 6 + [[4], [5], [6], [7]]
    stats = selections(tokens, 8)
    kept = choose(facts_of(8), stats, 5, (), StunParams())
    assert kept == [0, 4, 5, 6, 7]
    # two groups keep equally many each: two of 0 .. 3 and two of 4 .. 7
    grouped = choose(facts_of(8, groups=2), stats, 4, (), StunParams())
    assert [sum(expert // 4 == group for expert in grouped) for group in (0, 1)] == [2, 2]
    # the guard: 3 represents its cluster; 2 and 3 are kept apart, though they are alike in everything
    assert choose(facts_of(8), stats, 5, [3], StunParams()) == [3, 4, 5, 6, 7]
    assert {2, 3} <= set(choose(facts_of(8), stats, 2, [2, 3], StunParams()))
    assert {2, 3} <= set(choose(facts_of(8), stats, 5, [2, 3], StunParams()))
    assert choose(facts_of(8), stats, 4, [0, 1, 2, 3], StunParams()) == [0, 1, 2, 3]


def test_a_rare_expert_is_covered_by_the_one_it_is_chosen_beside() -> None:
    # 0 and 1 serve 20 tokens each, never the same; 2 serves two of 0's, 3 two of 1's. s_02 = s_13 = 2/2, others 0: the
    # clusters are {0, 2} and {1, 3}, and of each the busier one stays.
    stats = selections([[0]] * 18 + [[0, 2]] * 2 + [[1]] * 18 + [[1, 3]] * 2, 4)
    assert choose(facts_of(4), stats, 2, (), StunParams()) == [0, 1]
    assert choose(facts_of(4), stats, 2, [2], StunParams()) == [1, 2]


def test_the_central_one_is_nearest_to_the_centroid_of_the_logits() -> None:
    for seed in range(20):
        logits = np.random.default_rng(seed).standard_normal((6, 5))
        columns = logits / np.linalg.norm(logits, axis=0)
        nearest = np.argmin(np.linalg.norm(columns - columns.mean(1, keepdims=True), axis=0))
        stats = {"counts": np.ones(5), "router_gram": logits.T @ logits}
        assert choose(facts_of(5), stats, 1, (), StunParams(similarity="router")) == [nearest]


def test_experts_that_no_token_reached_are_kept_last() -> None:
    # 0 and 1 always together, 2 alone; 3, 4, 5 never: they resemble nobody, yet are no better for it
    stats = selections([[0, 1]] * 5 + [[2]], 6)
    assert choose(facts_of(6), stats, 2, (), StunParams()) == [0, 2]
    assert choose(facts_of(6), stats, 3, (), StunParams()) == [0, 1, 2]
    assert choose(facts_of(6), stats, 4, (), StunParams()) == [0, 1, 2, 3]
    assert 5 in choose(facts_of(6), stats, 2, [5], StunParams())
    assert choose(facts_of(6), selections([], 6), 2, (), StunParams()) == [0, 1]


def test_settings_of_stun() -> None:
    with pytest.raises(UsageError, match="similarity is coactivation or router, not 'weights'"):
        parse_params(STUN, {"similarity": "weights"})
    with pytest.raises(PlanError, match="not finite"):
        choose(facts_of(4), selections([[0], [1]], 4), 2, (), StunParams(similarity="router"))


# -- a choice in place of a ranking -------------------------------------------------------------------------


def test_what_a_method_chooses_is_checked() -> None:
    def given(*kept: int) -> Any:
        return lambda fact, keep, protected: list(kept)

    fact = facts_of(8, groups=2)
    assert chosen(fact, given(6, 1, 0, 7), 4) == [0, 1, 6, 7]
    for wrong in (given(0, 1, 6), given(0, 1, 6, 6), given(0, 1, 6, 8)):
        with pytest.raises(PlanError, match="was to keep 4 experts and chose"):
            chosen(fact, wrong, 4)
    with pytest.raises(PlanError, match="dropped the protected experts"):
        chosen(fact, given(0, 1, 6, 7), 4, [0, 5])
    with pytest.raises(PlanError, match="groups"):
        chosen(fact, given(0, 1, 2, 7), 4)
    with pytest.raises(PlanError, match="more super experts than the 2 it may keep in group 1"):
        chosen(fact, given(0, 1, 6, 7), 4, [5, 6, 7])


def test_domains_are_mixed_by_token() -> None:
    def domain(name: str, tokens: int, counts: list[float], peaks: list[float]) -> Domain:
        return Domain(name, (name,), tokens, {1: {"counts": np.array(counts), "output_max": np.array(peaks)}})

    code, prose = domain("code", 10, [10, 0], [1, 7]), domain("prose", 100, [50, 50], [2, 3])
    # per token: (1, 0) and (0.5, 0.5); equally: (1.5, 0.5); with weights 1 and 2: (2, 1)
    mixed = mix_domains([code, prose], 1, [1, 1])
    assert {name: values.tolist() for name, values in mixed.items()} == {"counts": [1.5, 0.5], "output_max": [2, 7]}
    assert mix_domains([code, prose], 1, [1, 2])["counts"].tolist() == [2, 1]
    assert mix_domains([code], 1, [3])["counts"].tolist() == [10, 0]


def test_scores_below_zero_of_several_domains_are_refused() -> None:
    negative = np.array([-1.0, 3])
    assert combine_domains([negative]).tolist() == [-1, 3]
    with pytest.raises(PlanError, match="cannot be put on one scale"):
        combine_domains([negative, np.array([1.0, 1])])


# -- super experts ------------------------------------------------------------------------------------------


def test_profile_by_hand() -> None:
    # 400 peaks; in order, the 99.5th percentile lies at 0.995 * 399 = 397.005, between the third and the second
    # largest: 200 + 0.005 * (500 - 200) = 201.5. A tenth of the largest is 100.
    peaks = {layer: np.ones(100) for layer in (1, 2, 3, 4)}
    peaks[1][3], peaks[2][7], peaks[4][9] = 1000, 500, 200
    seen = profile(peaks, 8)
    assert seen.percentile == pytest.approx(201.5, rel=1e-12)
    assert seen.share_of_maximum == 100
    assert [(each.layer, each.expert, each.peak) for each in seen.found] == [(1, 3, 1000), (2, 7, 500)]
    # in a decoder of 2 layers only those below 1.5 count, but the bars are of all
    assert [each.layer for each in profile(peaks, 2).found] == [1]
    assert profile(peaks, 2).percentile == seen.percentile


def test_super_experts_are_explained_but_prune_nothing(cli: Cli, tmp_path: Path) -> None:
    told = cli("methods", "super-experts")
    assert told.code == 0
    assert "99.5th percentile" in told.out
    assert {"name": "super-experts", "family": "profile"}.items() <= cli(
        "methods", "super-experts", "--json"
    ).json.items()
    refused = cli("prune", "demo", tmp_path / "out", "--method", "super-experts", "--keep", 8)
    assert refused.code == 2
    assert "unknown pruning method 'super-experts'" in refused.err


# -- through the whole program ------------------------------------------------------------------------------

ASKED = ("tcess", "tcess:form=coded,top=1", "man")
WORDS = ("--data", demo.data("calib") / "python.jsonl", "--tokens", 2048, "--seq-len", 128)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Statistics of the demo model with records of methods, and what calibrate said."""
    from moezip.pipeline import Common, calibrate_command

    out = tmp_path_factory.mktemp("saved") / "own.stats"
    return out, calibrate_command("demo", [WORDS[1]], out, Common(seq_len=128), 2048, ASKED)


def test_calibrate_records_by_name_and_reports_super_experts(saved: tuple[Path, dict[str, Any]], cli: Cli) -> None:
    out, result = saved
    stats = Statistics.load(out)
    own = {"tcess:form=fixed,top=0,threshold=-1", "tcess:form=coded,top=1,threshold=-1", "man:alpha=0,beta=2"}
    for named in stats.domains[0].layers.values():
        assert set(named) == set(BY_NAME) | own
        # a share of 1 for each of the 2,048 tokens
        assert named["tcess:form=fixed,top=0,threshold=-1"].sum() == pytest.approx(2048, rel=1e-9)
        # Cauchy-Schwarz: the sum of squares is at least the square of the sum over the count
        reached = named["counts"] > 0
        assert (named["man:alpha=0,beta=2"] * named["counts"] >= named["norm_sum"] ** 2 * (1 - 1e-6))[reached].all()
    peaks = {layer: named["output_max"] for layer, named in stats.domains[0].layers.items()}
    said = result["super_experts"]
    every = np.concatenate(list(peaks.values()))
    assert said["percentile"] == 99.5
    assert said["above_percentile"] == pytest.approx(np.percentile(every, 99.5), rel=1e-12)
    assert said["above_share"] == pytest.approx(every.max() / 10, rel=1e-12)
    for each in said["found"]:
        assert peaks[each["layer"]][each["expert"]] == each["peak"] > max(said["above_percentile"], said["above_share"])


def test_calibrate_says_the_super_experts(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = (
        "calibrate",
        tiny("qwen3_moe"),
        "--data",
        write_text(tmp_path / "t.jsonl"),
        "--tokens",
        128,
        "--seq-len",
        64,
    )
    told = cli(*words, "--out", tmp_path / "a")
    assert told.code == 0
    assert "super experts: " in told.err
    assert "99.5th percentile" in told.err
    few = cli(*words, "--out", tmp_path / "b", "--record", "counts", "--json")
    assert few.json["super_experts"] is None
    assert "super experts" not in cli(*words, "--out", tmp_path / "c", "--record", "counts").err


def planned(cli: Cli, out: Path, *words: object) -> dict[str, list[int]]:
    answer = cli("prune", "demo", out, "--plan-only", "--overwrite", "--keep", 8, "--json", *words)
    assert answer.code == 0, answer.err
    found: dict[str, list[int]] = answer.json["layers"]
    assert {len(kept) for kept in found.values()} == {8}
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("tcess",),
        ("tcess", "--set", "form=coded", "--set", "top=1"),
        ("man",),
        ("man", "--set", "task=true"),
        ("stun",),
        ("stun", "--set", "similarity=router"),
    ],
    ids=" ".join,
)
def test_saved_statistics_give_the_plan_that_text_gives(
    words: tuple[str, ...], cli: Cli, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    fresh = planned(cli, plan, "--method", *words, *WORDS)
    about = json.loads(plan.read_text())["made_by"]
    assert about["method"] == words[0]
    again = planned(cli, plan, "--method", *words, "--stats", saved[0])
    assert again == fresh
    assert fresh != planned(cli, plan, "--method", "frequency", "--stats", saved[0])


@pytest.mark.parametrize(
    ("method", "settings"),
    [("tcess", {}), ("man", {}), ("man", {"task": "true"}), ("stun", {}), ("stun", {"similarity": "router"})],
)
def test_they_beat_random_experts(method: str, settings: dict[str, str], saved: tuple[Path, dict[str, Any]]) -> None:
    # nats per token of held-out text with half of the experts; random: 6.0 to 6.2 over seeds. Measured: tcess 3.9,
    # man 4.4 and 3.9, stun 4.9 and 4.9.
    source, job = Checkpoint.open(demo.checkpoint()), PruneJob(method, ratio=0.5, settings=settings)
    plan = make_plan(prepare_prune("demo", job, Common()), job, Statistics.load(saved[0]), Common())
    found = evaluate(Applied(source, plan), data=[demo.data("heldout") / "python.jsonl"], tokens=2048, seq_len=128).loss
    assert found is not None
    assert found.nll < 5.5


def test_statistics_without_the_record_are_refused_by_its_name(
    cli: Cli, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    words = ("prune", "demo", tmp_path / "out", "--keep", 8, "--stats", saved[0])
    for asked, name in (
        (("tcess", "--set", "top=3", "--set", "threshold=0.25"), "tcess:form=fixed,top=3,threshold=0.25"),
        (("man", "--set", "beta=3"), "man:alpha=0,beta=3"),
    ):
        refused = cli(*words, "--method", *asked)
        assert refused.code == 1
        said = " ".join(refused.err.split())
        assert f"the statistics lack {name}" in said
        assert f"--record {name}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["tcess", "man", "stun"])
def test_what_is_written_is_sound(method: str, cli: Cli, saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = cli("prune", "demo", out, "--method", method, "--ratio", 0.5, "--stats", saved[0], "--json")
    assert report.code == 0, report.err
    assert report.json["method"] == method
    assert set(report.json["experts_after"]) == {8}
    assert cli("verify", out).code == 0


def test_a_recipe_records_what_its_methods_read(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl")
    jobs = {
        "asked": {"method": "tcess", "keep": 4, "settings": {"top": 1}},
        "clustered": {"method": "stun", "keep": 4},
    }
    recipe = {
        "version": 1,
        "model": str(tiny("deepseek_v3")),  # two router groups
        "output": str(tmp_path / "out"),
        "seq_len": 64,
        "calibration": {"one": {"data": "text.jsonl", "tokens": 256}},
        "jobs": {name: {"steps": [{"prune": step}]} for name, step in jobs.items()},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    answer = cli("run", tmp_path / "recipe.yaml", "--json")
    assert answer.code == 0, answer.err
    stats = Statistics.load(tmp_path / "out" / "statistics" / "one.safetensors")
    for named in stats.domains[0].layers.values():
        assert "tcess:form=fixed,top=1,threshold=-1" in named
        assert "coactivation" in named
    for name in jobs:
        assert cli("verify", tmp_path / "out" / name).code == 0
    skipped = cli("run", tmp_path / "recipe.yaml", "--json").json["jobs"]
    assert all(job["skipped"] for job in skipped)

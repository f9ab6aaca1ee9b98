"""Which experts merge: clusters by hand and by brute force, the records of all experts' outputs, counts over layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.experts import decoded, read_expert
from moezip.arch.families import ARCHITECTURES
from moezip.arch.spec import LayerFacts
from moezip.calibrate import weights as weight_records
from moezip.calibrate.data import Rows
from moezip.calibrate.record import Record
from moezip.calibrate.run import calibrate
from moezip.calibrate.statistics import Array
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import PlanError, UsageError
from moezip.merge import hc_smoe, m_smoe, outputs, sub_moe
from moezip.merge.clusters import (
    average_linkage,
    cut,
    kmeans,
    lloyd,
    moves,
    objective,
    seeded,
    square_distances,
    ward_rises,
)
from moezip.merge.hc_smoe import HCSmoeParams
from moezip.merge.m_smoe import M_SMOE, MSmoeParams
from moezip.merge.outputs import gram_name, output_gram, output_sums, sums_name
from moezip.merge.sub_moe import SubMoeParams
from moezip.plan.plan import Plan
from tests.command import Cli, write_text
from tests.tiny import token_ids

Tiny = Callable[..., Path]

# float64 sums in another order.
EXACT = 1e-12
# float32 products with another number of rows or another order of sums; outputs here are of order 1.
FLOAT32 = 1e-5


def facts_of(experts: int, top_k: int = 1, groups: int = 1, layer: int = 0) -> LayerFacts:
    return LayerFacts(
        layer=layer, experts=experts, top_k=top_k, hidden=2, width=2, groups=groups, top_groups=groups
    )  # fmt: skip


def planted(sizes: Sequence[int], seed: int = 0, length: int = 30) -> tuple[Array, np.ndarray]:
    """Points in shuffled order around far centres, and the number of the centre of each."""
    random = np.random.default_rng(seed)
    centre = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = 10 * random.standard_normal((len(sizes), length))[centre] + random.standard_normal((len(centre), length))
    return points, centre


def as_sets(groups: Sequence[Sequence[int]]) -> set[frozenset[int]]:
    return set(map(frozenset, groups))


# -- clusters -----------------------------------------------------------------------------------------------


def test_average_linkage_by_hand() -> None:
    # on a line at 0, 1, 5, 7: 0 and 1 are 1 apart, 5 and 7 are 2; the pairs are (5 + 7 + 4 + 6) / 4 = 5.5 apart
    line = np.array([0.0, 1, 5, 7])
    tree = average_linkage(abs(line[:, None] - line))
    assert tree[:, 2].tolist() == [1, 2, 5.5]
    assert cut(tree, 4) == [[0], [1], [2], [3]]
    assert cut(tree, 3) == [[0, 1], [2], [3]]
    assert cut(tree, 2) == [[0, 1], [2, 3]]
    assert cut(tree, 1) == [[0, 1, 2, 3]]


def centres_of(points: Array, labels: np.ndarray, count: int) -> Array:
    return np.stack([points[labels == label].mean(0) for label in range(count)])


def test_the_objective_is_that_of_the_points_themselves() -> None:
    random = np.random.default_rng(1)
    points = random.standard_normal((12, 40))
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 2, 2])
    centres = centres_of(points, labels, 3)
    squares = ((points[:, None] - centres) ** 2).sum(-1)
    assert square_distances(points @ points.T, labels, 3) == pytest.approx(squares, rel=1e-9)
    assert objective(points @ points.T, labels) == pytest.approx(squares[np.arange(12), labels].sum(), rel=EXACT)


def test_lloyd_is_lloyd_on_the_points_themselves() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        points = random.standard_normal((20, 5))
        gram = points @ points.T
        labels = seeded(gram, 4, random)
        plain = labels
        while True:
            nearest = ((points[:, None] - centres_of(points, plain, 4)) ** 2).sum(-1).argmin(1)
            if (nearest == plain).all():
                break
            plain = nearest
        assert lloyd(gram, labels, 4).tolist() == plain.tolist()


def test_single_moves_go_on_where_the_iterations_stop() -> None:
    # on a line: {0, 4} with centre 2 and {7.5}. 4 is 2 from its centre and 3.5 from the other, so Lloyd stops at
    # 2^2 + 2^2 = 8. With {0} and {4, 7.5} it is 2 * 1.75^2 = 6.125: leaving saves 2/1 * 4, joining costs 1/2 * 12.25
    line = np.array([0.0, 4, 7.5])
    gram, labels = np.outer(line, line), np.array([0, 0, 1])
    assert lloyd(gram, labels, 2).tolist() == [0, 0, 1]
    assert moves(gram, labels, 2).tolist() == [0, 1, 1]
    assert objective(gram, labels) == pytest.approx(8, rel=EXACT)
    assert objective(gram, np.array([0, 1, 1])) == pytest.approx(6.125, rel=EXACT)
    # at 8.1 the other way costs 1/2 * 4.1^2 = 8.405
    line[2] = 8.1
    assert moves(np.outer(line, line), labels, 2).tolist() == [0, 0, 1]


def test_kmeans_finds_the_best_of_all_partitions() -> None:
    for seed in range(5):
        points = np.random.default_rng(seed).standard_normal((6, 3))
        gram = points @ points.T
        best = min(objective(gram, np.array(each)) for each in product(range(3), repeat=6) if len(set(each)) == 3)
        found = np.zeros(6, int)
        for label, members in enumerate(kmeans(gram, 3, seed=0, restarts=20)):
            found[members] = label
        assert objective(gram, found) == pytest.approx(best, rel=EXACT)


def test_kmeans_beats_its_seedings_and_random_groups() -> None:
    points = np.random.default_rng(2).standard_normal((40, 8))
    gram = points @ points.T
    labels = np.zeros(40, int)
    for label, members in enumerate(kmeans(gram, 10, seed=0, restarts=5)):
        labels[members] = label
    random = np.random.default_rng(0)
    seedings = [objective(gram, seeded(gram, 10, random)) for _ in range(20)]
    chance = [objective(gram, random.permutation(np.arange(40) % 10)) for _ in range(20)]
    assert objective(gram, labels) < min(seedings) < min(chance)


def test_a_planted_clustering_is_found() -> None:
    for seed in range(5):
        points, centre = planted((1, 2, 5, 8), seed)
        wanted = as_sets([np.flatnonzero(centre == each).tolist() for each in range(4)])
        assert as_sets(kmeans(points @ points.T, 4, seed, restarts=10)) == wanted
        distances = np.linalg.norm(points[:, None] - points, axis=-1)
        assert as_sets(cut(average_linkage(distances), 4)) == wanted


def test_copies_fill_as_many_clusters_as_asked_for() -> None:
    for gram in (np.ones((5, 5)), np.zeros((5, 5))):
        groups = kmeans(gram, 3, seed=0, restarts=2)
        assert len(groups) == 3 and all(groups)
        assert sorted(point for group in groups for point in group) == list(range(5))


def test_an_empty_cluster_takes_the_farthest_point() -> None:
    # on a line: {0, 10} has its centre at 5, {4.9} and {5.1} lie beside it ... all but 0 and 10 are singletons, and
    # both leave: 0 for the cluster of 4.9, 10 for that of 5.1. The emptied cluster takes back one of the two
    line = np.array([0.0, 10, 4.9, 5.1])
    found = lloyd(np.outer(line, line), np.array([0, 0, 1, 2]), 3)
    assert sorted(np.bincount(found, minlength=3).tolist()) == [1, 1, 2]


# -- methods: made-up statistics ----------------------------------------------------------------------------


def stats_of(points: Array, counts: Array) -> dict[str, Array]:
    """Statistics of experts whose outputs, router logits and weights are all these points [E, D]."""
    gram = points @ points.T
    return {
        "counts": counts, "router_gram": gram, "expert_gram": gram, sums_name(0): points, gram_name(0, False): gram,
        gram_name(0, True): gram, "coactivation": np.minimum.outer(counts, counts) * (gram > 0),
    }  # fmt: skip


METHODS: tuple[tuple[Any, Any], ...] = (
    (hc_smoe, HCSmoeParams()),
    (sub_moe, SubMoeParams()),
    (sub_moe, SubMoeParams(cosine=True)),
    *((m_smoe, MSmoeParams(similarity=each)) for each in m_smoe.SIMILARITIES),
)


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_groups_lie_inside_router_groups_equally_many_in_each(method: Any, params: Any) -> None:
    random = np.random.default_rng(0)
    points, counts = random.standard_normal((16, 6)), random.integers(0, 50, 16).astype(float)
    stats, facts = stats_of(points, counts), facts_of(16, groups=4)
    for keep in (4, 8, 12, 16):
        groups = method.choose(facts, stats, keep, (), params)
        assert sorted(sum(groups, ())) == list(range(16))
        assert all(len({expert // 4 for expert in group}) == 1 for group in groups)
        assert [sum(group[0] // 4 == g for group in groups) for g in range(4)] == [keep // 4] * 4
        assert all(counts[group[0]] == max(counts[list(group)]) for group in groups)


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_permuted_experts_give_permuted_groups(method: Any, params: Any) -> None:
    points, centre = planted((1, 2, 5, 4), seed=3)
    random = np.random.default_rng(4)
    counts = random.permutation(12).astype(np.float64) + 1
    if method is m_smoe:  # whose dominant experts are the most used ones: one of each cluster
        for number in range(4):
            counts[np.flatnonzero(centre == number)[0]] += 100
    order = random.permutation(12)
    facts = facts_of(12)
    groups = method.choose(facts, stats_of(points, counts), 4, (), params)
    permuted = method.choose(facts, stats_of(points[order], counts[order]), 4, (), params)
    again = {tuple(sorted(int(order[expert]) for expert in group)) for group in permuted}
    assert again == {tuple(sorted(group)) for group in groups}
    assert {int(order[group[0]]) for group in permuted} == {group[0] for group in groups}
    if params not in (MSmoeParams(similarity="coactivation"),):
        assert as_sets(groups) == as_sets([np.flatnonzero(centre == each).tolist() for each in range(4)])


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_damaged_statistics_are_refused(method: Any, params: Any) -> None:
    stats = {name: np.full_like(sums, np.nan) for name, sums in stats_of(np.ones((4, 2)), np.ones(4)).items()}
    with pytest.raises(PlanError, match="not finite"):
        method.choose(facts_of(4), stats, 2, (), params)


@pytest.mark.parametrize("params", [HCSmoeParams(), SubMoeParams(), MSmoeParams(similarity="outputs")])
def test_no_sampled_token_is_told(params: Any) -> None:
    method = next(method for method, each in METHODS if type(each) is type(params))
    with pytest.raises(PlanError, match="every=1"):
        method.choose(facts_of(4), stats_of(np.zeros((4, 2)), np.ones(4)), 2, (), params)


def test_m_smoe_by_hand() -> None:
    # logits of two tokens: expert 0 (1, 0), 1 (0, 2), 2 (1, 1), 3 (1, 3), 4 (-1, 0)
    logits = np.array([[1.0, 0], [0, 2], [1, 1], [1, 3], [-1, 0]])
    gram, facts = logits @ logits.T, facts_of(5)
    counts = np.array([7.0, 5, 1, 1, 0])
    stats = {"counts": counts, "router_gram": gram}
    found = m_smoe.similarity(facts, stats, MSmoeParams())
    assert found[0].tolist() == pytest.approx([1, 0.5, 0.5 + 0.5**1.5, 0.5 + 0.5 / 10**0.5, 0], rel=EXACT)
    # 0 and 1 are dominant. 2 is as near to both, and goes to the more used; 3 is nearer to 1 (cosine 3 / root 10);
    # 4 is opposite to 0 and at right angles to 1
    assert m_smoe.choose(facts, stats, 2, (), MSmoeParams()) == [(0, 2), (1, 3, 4)]
    # with the usage of 0 and 1 exchanged, the tie is broken the other way
    other = {**stats, "counts": counts[[1, 0, 2, 3, 4]]}
    assert m_smoe.choose(facts, other, 2, (), MSmoeParams()) == [(1, 2, 3, 4), (0,)]


def test_coactivation_by_hand() -> None:
    # tokens: 4 chose expert 0 alone or not, 3 chose 1, 2 chose 2, none chose 3; together: 0 and 1 once, 1 and 2 twice
    chosen = np.array([[4.0, 1, 0, 0], [1, 3, 2, 0], [0, 2, 2, 0], [0, 0, 0, 0]])
    stats = {"counts": np.diag(chosen), "coactivation": chosen}
    params, facts = MSmoeParams(similarity="coactivation"), facts_of(4)
    wanted = [[1, 1 / 3, 0, 0], [1 / 3, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert m_smoe.similarity(facts, stats, params).tolist() == wanted
    # 2 was always chosen beside 1; 3 was chosen beside nobody and joins the most used
    assert m_smoe.choose(facts, stats, 2, (), params) == [(0, 3), (1, 2)]


def test_an_unused_expert_is_grouped_by_its_outputs() -> None:
    points = np.array([[0.0, 5], [5.0, 0], [0.1, 5], [4.9, 0]])
    stats = stats_of(points, np.array([3.0, 4, 0, 9]))
    for method, params in ((hc_smoe, HCSmoeParams()), (sub_moe, SubMoeParams())):
        assert sorted(method.choose(facts_of(4), stats, 2, (), params)) == [(0, 2), (3, 1)]


# -- counts over layers -------------------------------------------------------------------------------------


def usage(rows: Sequence[Sequence[float]]) -> dict[int, dict[str, Array]]:
    return {layer: {"counts": np.array(row, dtype=float)} for layer, row in enumerate(rows)}


def test_m_smoe_counts_by_hand() -> None:
    # shares .8 .1 .1 0 and .4 .3 .2 .1; the first of each layer counts as 1
    facts = [facts_of(4, top_k=2, layer=layer) for layer in (0, 1)]
    stats, remap = usage([[8, 1, 1, 0], [4, 3, 2, 1]]), MSmoeParams(router="remap")
    assert m_smoe.counts(facts, stats, 2, remap) == {0: 1, 1: 1}
    assert m_smoe.counts(facts, stats, 4, remap) == {0: 1, 1: 3}
    # three experts share the fifth place at .1; as published (more than the sixth value) there would be 4 groups
    assert m_smoe.counts(facts, stats, 5, remap) == {0: 2, 1: 3}
    assert m_smoe.counts(facts, stats, 6, remap) == {0: 3, 1: 3}
    # a router of the output's own rows has to choose two
    assert m_smoe.counts(facts, stats, 4, MSmoeParams()) == {0: 2, 1: 2}
    with pytest.raises(PlanError, match="the routers need 4"):
        m_smoe.counts(facts, stats, 3, MSmoeParams())
    assert m_smoe.counts(facts, usage([[0, 0, 0, 0], [4, 3, 2, 1]]), 5, remap) == {0: 1, 1: 4}  # .1 against 0


def test_m_smoe_counts_inside_router_groups() -> None:
    # groups of 2: layer 0 has seconds of .1 and .2, layer 1 of .2 and .25: two more go to layer 1
    facts = [facts_of(4, groups=2, layer=layer) for layer in (0, 1)]
    stats = usage([[0.4, 0.1, 0.3, 0.2], [0.25, 0.2, 0.3, 0.25]])
    assert m_smoe.counts(facts, stats, 6, MSmoeParams(router="remap")) == {0: 2, 1: 4}


def lines(*rows: Sequence[float]) -> dict[int, dict[str, Array]]:
    """Layers whose experts' outputs are these numbers."""
    return {
        layer: {"counts": np.ones(len(row)), gram_name(0, False): np.outer(row, row)} for layer, row in enumerate(rows)
    }


def test_sub_moe_counts_by_hand() -> None:
    # 0, 1, 5: joining 0 and 1 costs 2 * 0.5^2 = 0.5; then 5 with their centre 2 * 1 / 3 * 4.5^2 = 13.5; together 14
    # 0, 2, 5: 2 * 1^2 = 2, then 2 * 1 / 3 * 4^2 = 32 / 3; together 38 / 3
    facts = [facts_of(3, top_k=2, layer=layer) for layer in (0, 1)]
    stats, remap = lines((0, 1, 5), (0, 2, 5)), SubMoeParams(router="remap")
    name = gram_name(0, False)
    assert sub_moe.heights(facts[0], stats[0][name]) == pytest.approx([1 / 28, 27 / 28], rel=EXACT)
    assert sub_moe.heights(facts[1], stats[1][name]) == pytest.approx([3 / 19, 16 / 19], rel=EXACT)
    wanted = {6: (3, 3), 5: (2, 3), 4: (2, 2), 3: (2, 1), 2: (1, 1)}
    for total, (first, second) in wanted.items():
        assert sub_moe.counts(facts, stats, total, remap) == {0: first, 1: second}
    # outputs ten times as large differ no more
    larger = lines((0, 10, 50), (0, 2, 5))
    assert sub_moe.counts(facts, larger, 5, remap) == {0: 2, 1: 3}
    # a router of the output's own rows has to choose two
    assert sub_moe.counts(facts, stats, 4, SubMoeParams()) == {0: 2, 1: 2}
    with pytest.raises(PlanError, match="the routers need 4"):
        sub_moe.counts(facts, stats, 3, SubMoeParams())


def test_layers_share_with_their_neighbours_alone() -> None:
    # the first merges cost the less, the nearer the second expert is to the first; the second merges cost far more
    facts = [facts_of(3, layer=layer) for layer in range(5)]
    stats = lines((0, 1, 10), (0, 2, 10), (0, 3, 10), (0, 1.5, 10), (0, 2.5, 10))
    # 11 * 6 / 15 = 4.4, 4.4 and 2.2: 4, 4 and 2, and the one that is over goes to the first pair. Its one merge is
    # in layer 0; the second pair has two; layer 4 one
    found = sub_moe.counts(facts, stats, 11, SubMoeParams(router="remap"))
    assert found == {0: 2, 1: 3, 2: 2, 3: 2, 4: 2}
    # all five together have the four cheapest merges, which are not in layer 2
    found = sub_moe.counts(facts, stats, 11, SubMoeParams(router="remap", layers=5))
    assert found == {0: 2, 1: 2, 2: 3, 3: 2, 4: 2}


def test_rises_add_up_to_the_whole_spread() -> None:
    points = np.random.default_rng(5).standard_normal((9, 4))
    rises = ward_rises(points @ points.T)
    assert (np.diff(rises) >= 0).all()
    assert rises.sum() == pytest.approx(((points - points.mean(0)) ** 2).sum(), rel=EXACT)


def test_shares_are_multiples_of_the_router_groups() -> None:
    facts = [facts_of(8, groups=2, layer=layer) for layer in range(5)]
    random = np.random.default_rng(0)
    stats = {}
    for layer in range(5):
        points = random.standard_normal((8, 3))
        stats[layer] = {"counts": np.ones(8), gram_name(0, False): points @ points.T}
    for total, reached in ((20, 20), (21, 20), (26, 26), (40, 40)):
        found = sub_moe.counts(facts, stats, total, SubMoeParams(router="remap"))
        assert sum(found.values()) == reached and all(count % 2 == 0 for count in found.values())


# -- records ------------------------------------------------------------------------------------------------


def outputs_of(folder: Path, rows: Rows) -> dict[int, Array]:
    """Per layer every expert's output for every token, [rows, length, E, D], by a whole model: as if each expert had
    been chosen alone with gate 1."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    config = Checkpoint.open(folder).config
    entry, found = ARCHITECTURES[config["model_type"]], {}
    for facts in entry.layer_facts(config):
        block = model.get_submodule(f"{entry.layers}.{facts.layer}.{entry.block}")
        given: list[torch.Tensor] = []
        hook = block.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        with torch.no_grad():
            model(rows.ids, use_cache=False)
            hook.remove()
            tokens = given[0].flatten(0, 1)
            experts = block.get_submodule(entry.experts_module)
            each = [
                experts(tokens, torch.full((len(tokens), 1), number), torch.ones(len(tokens), 1))
                for number in range(facts.experts)
            ]
        found[facts.layer] = torch.stack(each, 1).double().unflatten(0, rows.ids.shape).numpy()
    return found


def recorded(folder: Path, rows: Rows, records: Sequence[Record], micro_rows: int = 2) -> Mapping[int, Any]:
    (domain,) = calibrate(Checkpoint.open(folder), rows, records, micro_rows=micro_rows).domains
    return domain.layers


TEXT = Rows(token_ids(3, 10), None, ("text",) * 3)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "jamba"])
def test_outputs_are_those_of_a_whole_model(name: str, tiny: Tiny) -> None:
    folder = tiny(name)
    records = [output_sums(1), output_sums(3), output_gram(3, False), output_gram(3, True)]
    found, wanted = recorded(folder, TEXT, records), outputs_of(folder, TEXT)
    assert list(found) == sorted(wanted)
    for layer, all_outputs in wanted.items():
        some = all_outputs[:, [2, 5, 8]].reshape(9, 8, -1)  # every third of a window
        size = abs(all_outputs).max()
        close = {"rel": FLOAT32, "abs": 30 * FLOAT32 * size}
        assert found[layer][sums_name(1)] == pytest.approx(all_outputs.sum((0, 1)), **close)
        assert found[layer][sums_name(3)] == pytest.approx(some.sum(0), **close)
        gram = np.einsum("tid,tjd->ij", some, some)
        assert found[layer][gram_name(3, False)] == pytest.approx(gram, rel=FLOAT32, abs=FLOAT32 * gram.max())
        unit = some / np.linalg.norm(some, axis=-1, keepdims=True)
        cosines = np.einsum("tid,tjd->ij", unit, unit)
        assert found[layer][gram_name(3, True)] == pytest.approx(cosines, abs=9 * FLOAT32)
        assert np.diag(found[layer][gram_name(3, True)]) == pytest.approx(np.full(8, 9), rel=FLOAT32)


def test_neither_micro_batches_nor_padding_nor_pieces_matter(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, records = tiny("qwen3_moe"), [output_sums(3), output_gram(3, False)]
    ids = token_ids(4, 10)
    one = recorded(folder, Rows(ids, None, ("text",) * 4), records, 1)
    mask = torch.ones(4, 14, dtype=torch.bool)
    mask[:, 10:] = False
    padded = Rows(torch.nn.functional.pad(ids, (0, 4)), mask, ("text",) * 4)
    twins = [recorded(folder, Rows(ids, None, ("text",) * 4), records, 4), recorded(folder, padded, records, 3)]
    monkeypatch.setattr(outputs, "MAX_TOKENS", 1)
    twins.append(recorded(folder, Rows(ids, None, ("text",) * 4), records, 4))
    for twin in twins:
        for layer, named in one.items():
            for name, sums in named.items():
                assert twin[layer][name] == pytest.approx(sums, rel=FLOAT32, abs=FLOAT32 * abs(sums).max())


def test_the_default_takes_as_many_products_as_the_layers_own_forward(tiny: Tiny) -> None:
    # 8 experts, 2 per token: every fourth token
    found = recorded(tiny("qwen3_moe"), TEXT, [output_sums(0), output_sums(4), output_gram(0, True)])
    for named in found.values():
        assert named[sums_name(0)].tolist() == named[sums_name(4)].tolist()
        assert np.diag(named[gram_name(0, True)]) == pytest.approx(np.full(8, 6), rel=FLOAT32)  # places 3, 7 of 3 rows
    facts = replace(facts_of(8, top_k=2), hidden=10, width=100)
    # 2 operations x 3 matrices x 2 experts per token, at one per second; and the 8 x 8 products of 10 numbers / 4
    seconds = output_sums(0).seconds, output_gram(0, False).seconds
    assert seconds[0] and seconds[0](facts, 1.0) == 2 * 3 * 10 * 100 * 2
    assert seconds[1] and seconds[1](facts, 1.0) == 2 * 3 * 10 * 100 * 2 + 2 * 64 * 10 / 4


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gpt_oss", "mixtral"])
def test_inner_products_of_weights(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    source = decoded(Checkpoint.open(tiny(name)))
    entry = ARCHITECTURES[name]
    facts = entry.layer_facts(source.config)[0]
    experts = [read_expert(source, entry, facts.layer, number) for number in range(facts.experts)]
    flat = torch.stack([torch.cat([e.gate.flatten(), e.up.flatten(), e.down.flatten()]) for e in experts]).double()
    wanted = (flat @ flat.T).numpy()
    for limit in (weight_records.GRAM_BYTES, 4 * 32 * 16 * 3, 1):  # all at once, a few, one at a time
        monkeypatch.setattr(weight_records, "GRAM_BYTES", limit)
        found = weight_records.expert_gram(source, entry, facts)
        assert found == pytest.approx(wanted, rel=FLOAT32, abs=FLOAT32 * wanted.max())


# -- settings and commands ----------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused() -> None:
    refused: tuple[tuple[Any, dict[str, Any]], ...] = (
        (HCSmoeParams, {"every": -1}), (SubMoeParams, {"every": -1}), (SubMoeParams, {"restarts": 0}),
        (SubMoeParams, {"layers": 0}), (SubMoeParams, {"rank": 0.0}), (SubMoeParams, {"rank": 1.5}),
        (MSmoeParams, {"similarity": "looks"}), (MSmoeParams, {"every": -2}), (HCSmoeParams, {"router": "none"}),
    )  # fmt: skip
    for kind, values in refused:
        with pytest.raises(UsageError):
            kind(**values)


def test_m_smoe_reads_what_its_similarity_needs() -> None:
    read = {each: M_SMOE.reads(MSmoeParams(similarity=each, every=4)) for each in m_smoe.SIMILARITIES}
    own = {each: set(names) - {"counts", "gate_sum"} for each, names in read.items()}
    assert own == {
        "router": {"router_gram"}, "weights": set(), "coactivation": {"coactivation"},
        "outputs": {"sub-moe:every=4,cosine=False"},
    }  # fmt: skip
    assert M_SMOE.reads_weights(MSmoeParams()) == ()
    assert M_SMOE.reads_weights(MSmoeParams(similarity="weights")) == ("expert_gram",)


@pytest.mark.parametrize(
    ("name", "method", "settings", "scope"),
    [
        ("deepseek_v3", "hc-smoe", (), "layer"),
        ("qwen3_moe", "sub-moe", ("router=remap", "restarts=2"), "model"),
        ("granitemoe", "m-smoe", ("similarity=weights",), "layer"),
        ("qwen3_moe", "m-smoe", ("similarity=outputs", "every=2"), "model"),
    ],
)
def test_the_command(
    name: str, method: str, settings: tuple[str, ...], scope: str, tiny: Tiny, cli: Cli, tmp_path: Path
) -> None:
    folder, text = tiny(name), write_text(tmp_path / "text.jsonl")
    words = ["--method", method, "--keep", 4, "--data", text, "--tokens", 400, "--seq-len", 40, "--scope", scope]
    words += [word for each in settings for word in ("--set", each)]
    dry = cli("merge", folder, tmp_path / "out", *words, "--dry-run", "--json")
    assert dry.code == 0 and dry.json["seconds"] > 0, dry.err
    answer = cli("merge", folder, tmp_path / "out", *words, "--json")
    assert answer.code == 0, answer.err
    plan = Plan.load(tmp_path / "out" / "moezip" / "plan.json")
    assert sum(len(layer.picks) for layer in plan.layers) == 4 * len(plan.layers)
    assert all(sum(map(len, (p.members for p in layer.picks))) == 8 for layer in plan.layers)
    assert cli("verify", tmp_path / "out").code == 0


def test_saved_statistics_serve_every_method(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    folder, text, stats = tiny("qwen3_moe"), write_text(tmp_path / "text.jsonl"), tmp_path / "stats"
    asked = ("--record", "hc-smoe:every=2", "--record", "sub-moe:every=2")
    answer = cli("calibrate", folder, "--data", text, "--tokens", 400, "--seq-len", 40, "--out", stats, *asked)
    assert answer.code == 0, answer.err
    for words in (("hc-smoe",), ("sub-moe",), ("m-smoe", "--set", "similarity=outputs")):
        out = tmp_path / f"{words[0]}.json"
        merged = cli("merge", folder, out, "--method", *words, "--set", "every=2", "--keep", 4, "--stats", stats,
                     "--plan-only")  # fmt: skip
        assert merged.code == 0, merged.err
    lacking = cli("merge", folder, tmp_path / "no", "--method", "hc-smoe", "--keep", 4, "--stats", stats)
    assert lacking.code == 1 and "--record hc-smoe:every=0" in lacking.err

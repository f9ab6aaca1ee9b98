"""From scores to picks, picks to a file, and a checkpoint seen through them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.arch.spec import Architecture, LayerFacts
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import CheckpointError, MoezipError, PlanError, UsageError
from moezip.plan.allocate import combine_domains, kept_count, layer_plans, rank
from moezip.plan.apply import Applied
from moezip.plan.plan import LayerPlan, Part, Pick, Plan, group_counts, require_keepable
from moezip.plan.views import runs
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]


def facts(experts: int = 8, top_k: int = 2, layer: int = 0, **more: int) -> LayerFacts:
    return LayerFacts(layer=layer, experts=experts, top_k=top_k, hidden=32, width=16, **more)


# DeepSeek-V3 in small: 4 groups of 4, a token uses 2 groups and 4 experts, a group scores by its best 2.
GROUPED = facts(16, 4, groups=4, top_groups=2, group_rank=2)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# -- how many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "ratio", "kept"),
    [
        (8, 0.5, 4),
        (8, 0.0, 8),
        (15, 0.5, 8),  # 7.5 rounds up
        (5, 0.5, 3),  # 2.5 rounds up, not to the even 2
        (100, 0.29, 71),
        (30, 0.55, 14),  # 13.5
        (10, 0.7, 3),
        (10, 0.45, 6),  # 5.5
        (128, 0.5, 64),
        (60, 0.25, 45),
        (64, 0.3, 45),  # 44.8
        (256, 0.333, 171),  # 170.752
        (4, 0.9, 0),  # 0.4: refused later, with the layer's numbers
    ],
)
def test_ratio_is_the_share_removed_rounded_half_up(experts: int, ratio: float, kept: int) -> None:
    assert kept_count(experts, None, ratio) == kept


@pytest.mark.parametrize("experts", [5, 8, 15, 30, 60, 64, 100, 128, 160, 384])
def test_every_share_in_thousandths_is_exact(experts: int) -> None:
    # in binary, 30 * (1 - 0.55) is 13.499999999999998
    for i in range(1000):
        exact = Fraction(experts) * (1 - Fraction(i, 1000))
        assert kept_count(experts, None, i / 1000) == floor(exact + Fraction(1, 2)), i


def test_a_count_is_taken_as_it_is() -> None:
    assert kept_count(8, 5, None) == 5


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_shares_that_are_none(ratio: float) -> None:
    with pytest.raises(UsageError, match="is not a share removed"):
        kept_count(8, None, ratio)


@pytest.mark.parametrize("both", [(None, None), (4, 0.5)])
def test_one_of_count_and_share(both: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="say how much to keep"):
        kept_count(8, *both)


# -- which --------------------------------------------------------------------------------------------------


def test_the_best_stay_in_order_of_their_ids() -> None:
    assert rank(facts(), array(5, 1, 7, 3, 9, 0, 2, 4), 4) == [0, 2, 4, 7]


def test_equal_scores_keep_the_lower_id() -> None:
    assert rank(facts(), np.ones(8), 3) == [0, 1, 2]
    # 2 and 6 share the third place
    assert rank(facts(), array(0, 9, 4, 0, 9, 0, 4, 0), 3) == [1, 2, 4]


def test_what_is_kept_grows_with_the_count() -> None:
    scores = np.random.default_rng(0).random(8)
    kept = [set(rank(facts(top_k=1), scores, n)) for n in range(1, 9)]
    assert all(small < large for small, large in pairwise(kept))
    assert kept[-1] == set(range(8))


def test_protected_experts_stay_whatever_their_score() -> None:
    scores = array(5, 1, 7, 3, 9, 0, 2, 4)
    assert rank(facts(), scores, 4, protected=[5]) == [0, 2, 4, 5]
    assert rank(facts(), scores, 2, protected=[5, 1]) == [1, 5]
    with pytest.raises(PlanError, match="layer 0 has more super experts than the 2 it may keep") as caught:
        rank(facts(), scores, 2, protected=[5, 1, 3])
    assert "--set guard=false" in str(caught.value.next)


def test_every_group_keeps_as_many() -> None:
    # By score alone the first eight would be 8 to 15.
    scores = np.arange(16.0)
    assert rank(GROUPED, scores, 8) == [2, 3, 6, 7, 10, 11, 14, 15]
    # Protecting 4 pushes out 6 of its own group, and nobody else.
    assert rank(GROUPED, scores, 8, protected=[4]) == [2, 3, 4, 7, 10, 11, 14, 15]
    with pytest.raises(PlanError, match="more super experts than the 2 it may keep in group 1"):
        rank(GROUPED, scores, 8, protected=[4, 5, 6])
    assert group_counts(GROUPED, rank(GROUPED, np.random.default_rng(0).random(16), 12)) == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "scores",
    [array(1, 2, 3), np.full(8, np.nan), array(1, 2, 3, 4, 5, 6, 7, np.inf), np.ones((8, 1))],
    ids=["too few", "nan", "inf", "shape"],
)
def test_scores_that_cannot_be_ranked(scores: np.ndarray) -> None:
    with pytest.raises(PlanError, match="the scores of layer 3 are not 8 finite numbers"):
        rank(facts(layer=3), scores, 4)


def test_layers_are_ranked_apart() -> None:
    both = [facts(4, 1, layer=1), facts(4, 1, layer=2)]
    plans = layer_plans(both, {1: array(4, 3, 2, 1), 2: array(1, 2, 3, 4)}, 2, {2: [0]})
    assert [(plan.layer, plan.kept, plan.protected) for plan in plans] == [(1, (0, 1), ()), (2, (0, 3), (0,))]
    assert plans[1].scores == (1, 2, 3, 4)


# -- several domains ----------------------------------------------------------------------------------------


def test_domains_are_added_as_shares_of_their_sum() -> None:
    # (1, 3, 0)/4 + (10, 10, 20)/40 = (0.25 + 0.25, 0.75 + 0.25, 0.5)
    assert combine_domains([array(1, 3, 0), array(10, 10, 20)]).tolist() == [0.5, 1.0, 0.5]
    # with weights 1 and 2: (0.25 + 0.5, 0.75 + 0.5, 1)
    assert combine_domains([array(1, 3, 0), array(10, 10, 20)], [1, 2]).tolist() == [0.75, 1.25, 1.0]


def test_the_size_of_a_domain_does_not_matter() -> None:
    small, large = array(1, 3, 0), array(10, 10, 20)
    assert combine_domains([small, large]).tolist() == combine_domains([small, 1024 * large]).tolist()


def test_one_domain_passes_unchanged() -> None:
    scores = array(0.1, 0.2, 0.3)
    assert combine_domains([scores]).tobytes() == scores.tobytes()
    assert combine_domains([scores], [5.0]).tobytes() == scores.tobytes()


def test_a_silent_domain_adds_nothing() -> None:
    assert combine_domains([array(0, 0), array(1, 3)]).tolist() == [0.25, 0.75]
    assert combine_domains([array(1, 3), array(3, 1)], [1, 0]).tolist() == [0.25, 0.75]


def test_a_weight_for_every_domain() -> None:
    with pytest.raises(ValueError, match="zip"):
        combine_domains([array(1), array(1)], [1.0])


# -- what can be kept at all --------------------------------------------------------------------------------


def test_counts_that_no_router_can_work_with() -> None:
    require_keepable(facts(), 2)
    require_keepable(facts(), 8)
    for keep in (0, -1, 9):
        with pytest.raises(PlanError, match=f"cannot keep {keep} of 8 experts") as caught:
            require_keepable(facts(), keep)
        assert caught.value.next == "keep between 2 and 8"
    with pytest.raises(PlanError, match="cannot keep 1 experts: the router sends every token to 2") as caught:
        require_keepable(facts(layer=5), 1)
    assert (caught.value.where, caught.value.next) == ("layer 5", "keep at least 2")


def test_counts_that_do_not_share_over_the_groups() -> None:
    with pytest.raises(
        PlanError, match=r"10 experts do not share evenly over the router's 4 groups \(10 / 4 = 2\.5\)"
    ) as it:
        require_keepable(GROUPED, 10)
    assert it.value.next == "keep 8 or 12"


def test_groups_too_small_for_the_token() -> None:
    require_keepable(GROUPED, 8)
    # 4 of 16 leave 1 per group; 4 experts out of 2 groups need 2 each, and so does the score of the best 2
    with pytest.raises(
        PlanError,
        match="4 experts leave 1 in each of 4 groups; a token uses 2 groups and 4 experts, so each group needs 2",
    ) as caught:
        require_keepable(GROUPED, 4)
    assert caught.value.next == "keep at least 8"
    # top-6 of 2 groups: 3 in each
    with pytest.raises(PlanError, match="a token uses 2 groups and 6 experts, so each group needs 3") as caught:
        require_keepable(replace(GROUPED, top_k=6), 8)
    assert caught.value.next == "keep at least 12"
    # a group's score of its best 2 alone
    with pytest.raises(PlanError, match=r"each group needs 2 \(its score adds the best 2\)"):
        require_keepable(replace(GROUPED, top_k=2), 4)
    require_keepable(replace(GROUPED, top_k=2, group_rank=1), 4)


# -- the file -----------------------------------------------------------------------------------------------


def plan_of(*layers: Sequence[int], experts: int = 8, **more: Any) -> Plan:
    return Plan(
        more.pop("source", "abc"),
        "qwen3_moe",
        tuple(LayerPlan(i, experts, tuple(map(Pick.keep, kept))) for i, kept in enumerate(layers)),
        **more,
    )


MERGED = LayerPlan(1, 8, (Pick.keep(3), Pick((Part(0, 0.25), Part(7, 0.75)))), (0.1, 1 / 3), (3,))


def test_round_trip_through_json() -> None:
    plain = plan_of([0, 3], [1, 2], mtp="keep", made_by={"method": "reap", "settings": {"guard": True}, "é": [1, None]})
    plan = replace(plain, layers=(plain.layers[0], MERGED))
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert json.loads(text)["layers"][1] == {
        "layer": 1, "experts": 8, "picks": [3, [[0, 0.25], [7, 0.75]]], "protected": [3], "scores": [0.1, 1 / 3],
    }  # fmt: skip
    # one line per list
    assert '      "picks": [0, 3]' in text.splitlines()


def test_the_identity_plan_keeps_everything() -> None:
    layers = [facts(layer=i) for i in (1, 2)]
    plan = Plan.identity("abc", "qwen3_moe", layers)
    assert plan.keeps_all
    assert [layer.kept for layer in plan.layers] == [tuple(range(8))] * 2
    plan.validate(layers, "abc")
    assert not plan_of([1, 0], experts=2).keeps_all
    assert not plan_of([0], experts=2).keeps_all


def test_what_a_mixed_pick_is() -> None:
    whole, some, average = Pick((Part(4, 1.0),)), Pick.slim(4, [0, 2], 3), MERGED.picks[1]
    assert (whole.kept, whole.members, whole.mixed) == (4, (4,), False)
    assert (some.kept, some.neurons, some.mixed) == (4, (0, 2), False)
    assert (average.kept, average.members, average.mixed) == (0, (0, 7), True)
    assert average.neurons is None  # an order of all neurons is no choice among them


def test_orders_of_neurons_and_remaps_survive_the_file() -> None:
    orders = Pick((Part(0, 0.25), Part(1, 0.75, (2, 0, 1, 3))))
    layer = LayerPlan(0, 3, (orders, Pick.keep(2)), router="remap")
    plan = replace(plan_of([0, 1]), layers=(layer,), values="ab", solved=("layers.0.experts.0.gate",))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert json.loads(plan.to_json())["layers"][0]["picks"] == [[[0, 0.25], [1, 0.75, "2 0-1 3"]], 2]
    assert again.layers[0].remap == (0, 0, 1)
    with pytest.raises(PlanError, match=r"\[2\] went into none"):
        assert replace(layer, picks=(orders,)).remap


def with_pick(pick: Pick) -> Plan:
    """Two layers, the second of which keeps expert 3 and this pick."""
    return replace(
        plan_of([0, 1], [0, 1]), layers=(plan_of([0, 1]).layers[0], replace(MERGED, picks=(Pick.keep(3), pick)))
    )


def damaged(**changes: Any) -> str:
    return json.dumps(json.loads(plan_of([0, 1]).to_json()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        *(json.dumps({k: v for k, v in json.loads(damaged()).items() if k != key}) for key in
          ("schema", "source", "architecture", "mtp", "layers")),
        damaged(source=None),
        damaged(mtp=1),
        damaged(layers=3),
        damaged(layers=[{"layer": 0}]),
        damaged(layers=[{"layer": 0, "experts": 8, "picks": ["a"]}]),
        damaged(layers=[{"layer": 0, "experts": 8, "picks": [1.5]}]),
        damaged(layers=[{"layer": 0, "experts": 8, "picks": [[[1, "x"]]]}]),
        damaged(made_by=5),
    ],
)  # fmt: skip
def test_damaged_plans(text: str) -> None:
    with pytest.raises(PlanError, match="this is no plan, or a damaged one"):
        Plan.from_json(text, "plan.json")


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    plan = plan_of([0, 1])
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "cut").write_text(plan.to_json()[:-20])
    (tmp_path / "bytes").write_bytes(b"\x00\xff\xfe\x80")
    for name, message in (("cut", "damaged"), ("bytes", "not text"), ("nowhere", "cannot be read"), (".", "cannot be")):
        with pytest.raises(PlanError, match=message):
            Plan.load(tmp_path / name)
    with pytest.raises(PlanError, match="plan of schema 2, this moezip reads 1"):
        Plan.from_json(damaged(schema=2))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of([0, 1], [0, 1], source="xyz"), r"for another checkpoint \(xyz, not abc\)"),
        (plan_of([0, 1]), r"covers layers \[0\], the checkpoint has experts in \[0, 1\]"),
        (plan_of([0, 1], [0, 8]), r"layer 1 has experts 0 to 7, the plan keeps \[0, 8\]"),
        (plan_of([0, 1], [0, -1]), r"layer 1 has experts 0 to 7"),
        (plan_of([0, 1], [0, 1], experts=16), r"layer 0 has experts 0 to 7"),
        (plan_of([0, 1], [3, 3]), r"layer 1: the plan keeps an expert twice: \[3, 3\]"),
        (plan_of([0, 1], [2]), "cannot keep 1 experts: the router sends every token to 2"),
        (plan_of([0, 1], []), "cannot keep 0 of 8"),
        (plan_of([0, 1], [0, 1], mtp="maybe"), "mtp is 'maybe'"),
        (with_pick(Pick((Part(0, 0.25), Part(7, 0.5)))), "weights of \\(0, 7\\) add to 0.75, not to 1"),
        (with_pick(Pick((Part(0, 0.5), Part(3, 0.5)))), "keeps an expert twice: \\[3, 0, 3\\]"),
        (with_pick(Pick((Part(0, 0.5), Part(9, 0.5)))), "has experts 0 to 7"),
        (with_pick(Pick((Part(0, 0.5), Part(7, 0.5, (0, 1, 1))))), "the order of expert 7's neurons"),
    ],
)
def test_plans_that_do_not_fit(plan: Plan, message: str) -> None:
    layers = [facts(layer=0), facts(layer=1)]
    plan_of([0, 1], [6, 7]).validate(layers, "abc")
    with pytest.raises(PlanError, match=message):
        plan.validate(layers, "abc", "somewhere")


@pytest.mark.parametrize(
    ("kept", "fits"),
    [
        ([0, 1, 4, 5, 8, 9, 12, 13], True),
        ([3, 0, 5, 4, 8, 9, 15, 12], True),  # any order inside a group
        ([4, 5, 0, 1, 8, 9, 12, 13], False),  # two groups exchanged
        ([0, 1, 2, 4, 8, 9, 12, 13], False),  # 3, 1, 2, 2
    ],
)
def test_groups_stay_whole_and_in_place(kept: list[int], fits: bool) -> None:
    plan = plan_of(kept, experts=16)
    if fits:
        plan.validate([GROUPED], "abc")
    else:
        with pytest.raises(PlanError, match=r"the router's 4 groups would keep \[\d, \d, 2, 2\]"):
            plan.validate([GROUPED], "abc")


# -- a checkpoint through a plan ----------------------------------------------------------------------------

STORED = [
    *((name, {}) for name in FAMILIES),
    ("qwen3_moe", {"shards": 1, "dtype": "bfloat16"}),
    ("deepseek_v3", {"stored": "fp8", "mtp": True}),
    ("minimax_m2", {"stored": "fp8"}),
    ("gpt_oss", {"stored": "mxfp4"}),
    ("qwen3_next", {"mtp": True}),
]
stored = pytest.mark.parametrize(
    ("name", "options"), STORED, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)


def some_experts(fact: LayerFacts) -> list[int]:
    """Six of eight, out of order, others in every layer; as many of every group."""
    choice, size = random.Random(fact.layer), fact.experts // fact.groups
    each = 6 // fact.groups
    return [e for g in range(fact.groups) for e in choice.sample(range(g * size, (g + 1) * size), each)]


def seen_through(source: Checkpoint, mtp: str = "drop") -> tuple[Architecture, Applied]:
    entry = identify(source.config)
    layers = tuple(
        LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, some_experts(fact))))
        for fact in entry.layer_facts(source.config)
    )
    return entry, Applied(source, Plan(source.fingerprint, entry.name, layers, mtp))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()


def joined(source: Any, name: str, rows: range | None = None) -> bytes:
    return b"".join(map(bytes, source.chunks(name, rows)))


@stored
@pytest.mark.parametrize("mtp", ["drop", "keep"])
def test_specs_reads_chunks_and_rows_agree(name: str, options: dict[str, Any], mtp: str, tiny: Tiny) -> None:
    source = Checkpoint.open(tiny(name, **options))
    _, view = seen_through(source, mtp)
    assert len(set(view.names())) == len(view.names())
    changed = 0
    for target in view.names():
        spec, whole, pieces = view.spec(target), view.read(target), joined(view, target)
        assert spec.name == target
        assert tuple(whole.shape) == spec.shape
        assert raw(whole) == pieces
        assert len(pieces) == spec.bytes
        if not spec.shape:
            continue
        count = spec.shape[0]
        changed += target in source.names() and source.spec(target).shape != spec.shape
        for rows in (range(0, count), range(0, 0), range(count // 2, count), range(1, min(4, count))):
            part = view.read(target, rows)
            assert torch.equal(part.view(torch.uint8), whole[rows.start : rows.stop].contiguous().view(torch.uint8))
            assert joined(view, target, rows) == raw(part)
        for wrong in (range(0, count + 1), range(0, count, 2), range(-1, 1)):
            with pytest.raises(CheckpointError, match="has no rows"):
                view.read(target, wrong)
            with pytest.raises(CheckpointError, match="has no rows"):
                joined(view, target, wrong)
    assert changed
    with pytest.raises(CheckpointError, match="no tensor nowhere"):
        view.spec("nowhere")


@stored
def test_kept_experts_are_the_sources_own_bytes(name: str, options: dict[str, Any], tiny: Tiny) -> None:
    source = Checkpoint.open(tiny(name, **options))
    entry, view = seen_through(source)
    kept = {layer.layer: layer.kept for layer in view.plan.layers}
    seen: dict[str, int] = {}
    for target in view.names():
        claim = entry.claim(target, source.config)
        seen[claim.kind] = seen.get(claim.kind, 0) + 1
        if claim.layer is None:
            assert joined(view, target) == joined(source, target)
        elif claim.kind == "expert":
            assert claim.expert is not None
            origin = target.replace(f"experts.{claim.expert}.", f"experts.{kept[claim.layer][claim.expert]}.")
            assert joined(view, target) == joined(source, origin)
        elif claim.kind == "fused":
            wanted = b"".join(joined(source, target, range(e, e + 1)) for e in kept[claim.layer])
            assert joined(view, target) == wanted
        else:
            axis = getattr(claim.tensor, "axis", 0)
            wanted_rows = source.read(target).index_select(axis, torch.tensor(kept[claim.layer]))
            assert torch.equal(view.read(target), wanted_rows)
    pieces = len(entry.experts) * (2 if options.get("stored") == "fp8" else 1)
    if "expert" in seen:
        assert seen["expert"] == pieces * 6 * len(kept)
    else:
        # mxfp4: both matrices are codes and scales
        assert seen["fused"] == (len(entry.experts) + (2 if options.get("stored") == "mxfp4" else 0)) * len(kept)
    assert seen["router"] == len(entry.router) * len(kept)


@stored
def test_only_the_counts_change_in_the_config(name: str, options: dict[str, Any], tiny: Tiny) -> None:
    source = Checkpoint.open(tiny(name, **options))
    before = json.dumps(source.config)
    entry, view = seen_through(source)
    assert json.dumps(source.config) == before  # the source's own is untouched
    changed = {key for key in view.config if view.config[key] != source.config.get(key)}
    dropped = {key for key in entry.extra_count_keys if source.config.get(key)}
    assert changed == set(entry.count_keys) | dropped
    assert {view.config[key] for key in entry.count_keys} == {6}
    assert all(view.config[key] == 0 for key in dropped)
    # in the same order, new spellings of the count (transformers reads either) at the end
    assert list(view.config)[: len(source.config)] == list(source.config)
    assert set(list(view.config)[len(source.config) :]) <= set(entry.count_keys)
    if name in ("deepseek_v2", "deepseek_v3"):
        for key in ("topk_method", "scoring_func", "n_group", "topk_group"):
            assert view.config[key] == source.config[key]
    if "stored" in options:
        assert view.config["quantization_config"] == source.config["quantization_config"]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next"])
def test_extra_layers_go_or_follow_the_last(name: str, tiny: Tiny) -> None:
    source = Checkpoint.open(tiny(name, mtp=True))
    entry, dropped = seen_through(source)
    extra = [each for each in source.names() if entry.claim(each, source.config).kind == "extra"]
    assert extra
    assert not set(extra) & set(dropped.names())
    assert all(not dropped.config.get(key) for key in entry.extra_count_keys)
    _, kept = seen_through(source, mtp="keep")
    for key in entry.extra_count_keys:
        assert kept.config.get(key) == source.config.get(key)
    assert kept.config.get("num_nextn_predict_layers", 1) == 1
    last = kept.plan.layers[-1].kept
    followed = 0
    for each in extra:
        claim = entry.claim_extra(each)
        if claim.kind == "expert":
            assert claim.expert is not None
            if claim.expert in last:
                target = each.replace(f"experts.{claim.expert}.", f"experts.{last.index(claim.expert)}.")
                assert joined(kept, target) == joined(source, each)
                followed += 1
        elif claim.kind == "router":
            assert torch.equal(kept.read(each), source.read(each)[list(last)])
        else:
            assert joined(kept, each) == joined(source, each)
    assert followed == 3 * len(last)


def test_a_plan_of_another_checkpoint_is_refused_before_anything(tiny: Tiny) -> None:
    source, other = Checkpoint.open(tiny("qwen3_moe")), Checkpoint.open(tiny("qwen3_moe", seed=1))
    _, view = seen_through(source)
    assert view.fingerprint not in (source.fingerprint, other.fingerprint)
    with pytest.raises(MoezipError, match="the plan is for another checkpoint"):
        Applied(other, view.plan)


def test_the_fingerprint_is_that_of_the_plan_too(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    _, view = seen_through(source)
    _, again = seen_through(source)
    other = Applied(source, replace(view.plan, layers=tuple(
        replace(layer, picks=layer.picks[::-1]) for layer in view.plan.layers
    )))  # fmt: skip
    assert view.fingerprint == again.fingerprint != other.fingerprint


def test_a_view_of_a_view(tiny: Tiny) -> None:
    # Plans compose: the second counts the experts that the first left.
    source = Checkpoint.open(tiny("qwen3_moe"))
    _, first = seen_through(source)
    layers = tuple(LayerPlan(layer.layer, 6, tuple(map(Pick.keep, (4, 1)))) for layer in first.plan.layers)
    second = Applied(first, Plan(first.fingerprint, "qwen3_moe", layers))
    for layer in first.plan.layers:
        for place, number in enumerate((4, 1)):
            target = f"model.layers.{layer.layer}.mlp.experts.{{}}.up_proj.weight"
            origin = target.format(layer.kept[number])
            assert joined(second, target.format(place)) == joined(source, origin)
    assert second.config["num_experts"] == 2


def test_neighbours_are_read_together() -> None:
    assert list(runs([0, 1, 2, 5, 6, 4])) == [range(0, 3), range(5, 7), range(4, 5)]
    assert list(runs([])) == []
    assert list(runs([3])) == [range(3, 4)]

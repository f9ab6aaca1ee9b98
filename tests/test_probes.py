"""Probes: variants measured in one pass against views of the plan, and factors against scales that were planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.arch.spec import LayerFacts
from moezip.calibrate.data import DomainText, Rows, load_rows
from moezip.calibrate.probes import (
    LEAST_TOKENS,
    PASSES,
    PROBE_TOKENS,
    PROBE_WINDOW,
    SPREAD,
    Decision,
    Measured,
    affordable_tokens,
    layer_passes,
    measure,
    shared_out,
    spread_rows,
    unseen_rows,
)
from moezip.calibrate.statistics import Domain, Probe, Statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError, UsageError
from moezip.pipeline import Common, PruneJob, make_plan, opened, prepare_prune
from moezip.pipeline.probes import ProbingCost, factor_note, probing, probing_cost
from moezip.plan.apply import Applied
from moezip.plan.factors import Factors, expert_lots, factors_of, fit, neuron_shares, probes_of, ratio, removable
from moezip.plan.plan import LayerPlan, Pick, Plan
from moezip.plan.price import expert_prices, neuron_prices, predicted_nats
from moezip.progress import Progress
from moezip.prune.heapr import HEAPR, HeaprParams
from moezip.prune.nats import NATS, NatsParams
from moezip.prune.reap import REAP
from moezip.report.agreement import rank_correlation
from tests.command import Cli, write_text
from tests.test_laws import streamed_logits
from tests.tiny import FAMILIES, token_ids

Tiny = Callable[..., Path]
# Mean float32 losses of size 5 whose sums were formed in another order, as REORDERED of the laws is of logits.
SAME = 2e-5
ALGEBRA = 1e-12  # float64 in another order


def rows_of(count: int = 3, length: int = 12) -> Rows:
    """Two domains, the last row padded on the right."""
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[-1, 9:] = False
    return Rows(token_ids(count, length), mask, (*["one"] * (count - 1), "two"))


def losses(source: Source, rows: Rows) -> np.ndarray:
    """Summed loss of every row, from logits of a plain streamed pass."""
    found = []
    for row, logits in enumerate(streamed_logits(source, rows)):
        at = rows.scored(row)
        found.append(
            float(torch.nn.functional.cross_entropy(logits[at].double(), rows.ids[row, at + 1], reduction="sum"))
        )
    return np.array(found)


def view(source: Checkpoint, decision: Decision) -> Applied:
    """The checkpoint through the plan that takes this decision alone."""
    entry = identify(source.config)
    layers = []
    for fact in entry.layer_facts(source.config):
        here = fact.layer == decision.layer
        kept = [e for e in range(fact.experts) if not (here and e in decision.experts)]
        picks = [Pick.keep(expert) for expert in kept]
        if here and decision.neurons is not None:
            picks = [Pick.slim(e, (~decision.neurons[e]).nonzero()[0].tolist(), fact.width) for e in kept]
        layers.append(LayerPlan(fact.layer, fact.experts, tuple(picks)))
    return Applied(source, Plan(source.fingerprint, entry.name, tuple(layers), mtp="drop"))


def some_neurons(fact: LayerFacts, share: float) -> np.ndarray:
    return np.random.default_rng(fact.layer).random((fact.experts, fact.width)) < share


@pytest.mark.parametrize("name", FAMILIES)
def test_every_variant_loses_what_the_view_of_its_plan_loses(name: str, tiny: Tiny) -> None:
    """Experts and neurons, early and late, measured together; the model itself is measured beside them."""
    rows = rows_of()
    with Checkpoint.open(tiny(name)) as source:
        facts = identify(source.config).layer_facts(source.config)
        first, last = facts[0], facts[-1]
        size = first.experts // first.groups
        decisions = [
            Decision(last.layer, neurons=some_neurons(last, 0.3)),
            Decision(first.layer, tuple(group * size + at for group in range(first.groups) for at in (1, 2))),
            Decision(last.layer, neurons=some_neurons(last, 0.3) | some_neurons(last, 0.6)),
            Decision(last.layer, tuple(group * size + at for group in range(first.groups) for at in (0, 3))),
        ]
        found = measure(source, rows, decisions, dtype=torch.float32)
        assert found.scored.tolist() == [11, 11, 8]
        base = losses(source, rows)
        assert np.abs(found.base - base).max() <= SAME * 11
        for place, decision in enumerate(decisions):
            wanted = losses(view(source, decision), rows) - base
            assert np.abs(wanted).max() > 100 * SAME  # a decision that changes nothing would prove nothing
            assert np.abs(found.rises[place] - wanted).max() <= 2 * SAME * 11, decision
        # each on windows of its own: the same there, nothing elsewhere
        some = measure(source, rows, decisions, [[2], [0, 1], [1, 2], [0]], dtype=torch.float32)
        assert some.seen.tolist() == [
            [False, False, True],
            [True, True, False],
            [False, True, True],
            [True] + [False] * 2,
        ]
        assert some.tokens().tolist() == [8, 22, 19, 11]
        assert np.abs(some.rises - found.rises * some.seen).max() <= 2 * SAME * 11
        assert np.abs(some.divergences - found.divergences * some.seen).max() <= 2 * SAME * 11


def test_a_quantized_source_is_probed_too(tiny: Tiny) -> None:
    """Nothing is rounded anew: dropping an expert that no token chose changes nothing, another one does."""
    rows = rows_of()
    with Checkpoint.open(tiny("deepseek_v3", stored="fp8")) as source:
        [fact, *_] = identify(source.config).layer_facts(source.config)
        found = measure(source, rows, [Decision(fact.layer, (0, 4)), Decision(fact.layer)])
    assert np.abs(found.rises[0]).max() > 0
    assert np.abs(found.rises[1]).max() == 0


def test_hidden_states_that_outgrow_memory_go_to_a_file(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    from moezip.calibrate import stream

    rows, decisions = rows_of(), [Decision(1, (expert,)) for expert in range(3)]
    with Checkpoint.open(tiny("qwen3_moe")) as source:
        free = measure(source, rows, decisions)
        # room for a row or so
        monkeypatch.setattr(stream.Stream, "hidden_budget", lambda self: 2_000)
        kept = measure(source, rows, decisions, workdir=tmp_path)
        with pytest.raises(MoezipError, match="hidden states of 3 probes"):
            measure(source, rows, decisions)
    assert np.array_equal(free.rises, kept.rises)
    assert list(tmp_path.iterdir()) == []


def test_neurons_that_do_not_grow_are_refused(tiny: Tiny) -> None:
    with Checkpoint.open(tiny("qwen3_moe")) as source:
        fact = identify(source.config).layer_facts(source.config)[0]
        some = some_neurons(fact, 0.5)
        with pytest.raises(UsageError, match="growing order"):
            measure(source, rows_of(), [Decision(fact.layer, neurons=some), Decision(fact.layer, neurons=~some)])


def test_mean_and_error_by_hand() -> None:
    # four tokens in two windows rise by 1, 3 and 0, 0: mean 1, mean square 10 / 4, variance 1.5, error sqrt(1.5 / 4)
    one = np.array([2.0, 2.0])
    found = Measured(one, one, np.array([[4.0, 0.0]]), np.array([[10.0, 0.0]]), np.zeros((1, 2)), one[None] > 0)
    assert found.rise().tolist() == [1.0]
    assert found.error() == pytest.approx([np.sqrt(1.5 / 4)])


def test_probed_text_is_spread_over_the_rows() -> None:
    rows = Rows(torch.arange(40).view(10, 4), None, ("a",) * 5 + ("b",) * 5)
    some = spread_rows(rows, 8)  # two rows of ten: from the middle of each half
    assert some.ids[:, 0].tolist() == [8, 28] and some.domains == ("a", "b")
    assert spread_rows(rows, 3).ids.tolist() == [[20, 21, 22]]  # a row longer than allowed is cut
    assert spread_rows(rows, 1000).ids.tolist() == rows.ids.tolist()
    # long windows are cut so that there are several
    long, cut = PROBE_WINDOW + 8, PROBE_WINDOW
    many = Rows(torch.arange(3 * long).view(3, long), None, ("a",) * 3)
    assert spread_rows(many, 2 * cut).ids[:, -1].tolist() == [cut - 1, 2 * long + cut - 1]


def test_windows_are_shared_out_evenly() -> None:
    assert [list(share) for share in shared_out(9, 5)] == [[0, 4], [1, 5], [2, 6], [3, 7], [0, 4]]
    assert [list(share) for share in shared_out(2, 3)] == [[0], [1], [0]]  # fewer windows than SPREAD


class Words:
    """A tokenizer of numbers; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, **_options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def test_unseen_text_follows_what_was_calibrated_on(tmp_path: Path) -> None:
    words: Any = Words()
    for name, length in (("long", 40), ("short", 11)):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, range(1, length + 1))))
    texts = [DomainText(name, (tmp_path / f"{name}.txt",), 10) for name in ("long", "short")]
    rows = load_rows(texts, words, 4)
    assert rows.ids[:, 0].tolist() == [1, 5, 1, 5]
    found = unseen_rows(rows, texts, words, 4)
    # tokens 9 and 10 filled no window and come first; as many again as went before, or to the end of the file, which
    # for the short one comes after token 11 and the end of its text
    assert found.ids[:, 0].tolist() == [9, 13, 9] and found.ids[-1].tolist() == [9, 10, 11, 0]
    assert found.domains == ("long", "long", "short") and found.mask is None
    # a file that ends gives the same once more, also where it is shorter than a window
    assert unseen_rows(rows, [texts[1]], words, 5).ids.tolist() == rows.ids[2:].tolist()
    alone = load_rows([DomainText("short", texts[1].paths, 100)], words, 64)
    assert unseen_rows(alone, [DomainText("short", texts[1].paths, 100)], words, 64).ids.tolist() == alone.ids.tolist()


# -- factors ------------------------------------------------------------------------------------------------


def probe(layer: int, predicted: float, divergence: float, kind: str = "experts") -> Probe:
    return Probe(layer, kind, 1, predicted, 0.0, 1.0, divergence, 100)


def test_ratio_by_hand() -> None:
    # prices 1 and 2, divergences 3 and 4: 7 / 3, nearer to the dearer one's 2 than to the other's 3
    assert ratio([probe(0, 1.0, 3.0), probe(0, 2.0, 4.0)]) == pytest.approx(7 / 3)
    # a probe without a price tells nothing alone, and its divergence belongs to the sum
    assert ratio([probe(0, 0.0, 1.0)]) is None and ratio([]) is None
    assert ratio([probe(0, 0.0, 1.0), probe(0, 1.0, 1.0)]) == 2.0


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.7])
def test_a_planted_scale_is_found(scale: float) -> None:
    prices = np.random.default_rng(0).lognormal(size=12)
    found = fit([probe(i % 4, float(p), scale * float(p)) for i, p in enumerate(prices)])
    assert found.pooled["experts"] == pytest.approx(scale, rel=ALGEBRA)
    assert all(found.of("experts", layer) == pytest.approx(scale, rel=ALGEBRA) for layer in range(4))
    assert found.of("neurons", 0) == 1.0


def test_layers_without_a_price_take_the_common_factor() -> None:
    found = fit([probe(0, 1.0, 2.0), probe(2, 3.0, 12.0), probe(1, 0.0, 0.0)])
    assert found.layers == {"experts": {0: 2.0, 2: 4.0}}
    assert found.of("experts", 1) == found.pooled["experts"] == 14 / 4
    assert found.to_json() == {"experts": {"pooled": 3.5, "layers": {"0": 2.0, "2": 4.0}}}


def test_factors_keep_to_a_range() -> None:
    assert fit([probe(0, 1.0, 100.0)] * 3).pooled == {"experts": 8.0}
    assert fit([probe(0, 1.0, 0.1, kind="neurons")] * 3).pooled == {"neurons": 0.25}
    assert fit([probe(0, 0.0, 1.0)]) == fit([]) == Factors()


# -- what is probed -----------------------------------------------------------------------------------------

FACT = LayerFacts(layer=2, experts=6, top_k=2, hidden=4, width=4)


def test_lots_by_hand() -> None:
    price = np.array([5.0, 0.0, 3.0, 1.0, 4.0, 2.0])
    # ranked 1 3 5 2 4 0. Of six: a quarter is one, which has no price; half is three; three quarters are four, and as
    # many can go, for two must stay
    assert expert_lots(FACT, price, 3) == [(1, 3, 5), (1, 2, 3, 5)]
    assert expert_lots(FACT, price, 2) == [(1, 3), (1, 2, 3, 5)]  # thirds
    assert expert_lots(FACT, price + 1, 9) == [(1,), (1, 3), (1, 3, 5), (1, 2, 3, 5)]
    assert expert_lots(FACT, np.zeros(6), 3) == []
    grouped = LayerFacts(layer=2, experts=6, top_k=2, hidden=4, width=4, groups=2, top_groups=1)
    # group 0 ranks 1 2 0, group 1 ranks 3 5 4; two must stay in each, so one of each goes
    assert expert_lots(grouped, price, 3) == [(1, 3)]
    assert removable(FACT) and not removable(LayerFacts(0, 2, 2, 4, 4))


def test_neuron_shares_by_hand() -> None:
    price = np.arange(16.0)[::-1].reshape(2, 8)  # expert 1 holds the cheap ones, the last first
    masks = neuron_shares(price, 3)
    assert [mask.sum() for mask in masks] == [4, 8, 12]
    assert masks[0].tolist() == [[False] * 8, [False] * 4 + [True] * 4]
    assert all((small <= large).all() for small, large in pairwise(masks))
    assert [mask.sum() for mask in neuron_shares(np.ones((1, 2)), 3)] == [1]


def domain(name: str, drops: Sequence[float], neurons: Any, scored: int) -> Domain:
    sums = {"drop_renormalised_square": np.array(drops), "inner_product_square": np.array(neurons)}
    return Domain(name, (name,), scored, {2: sums}, scored, 1.0)


def test_prices_of_probes_by_hand() -> None:
    one = domain("one", [8.0, 2.0, 4.0], [[4.0, 2.0], [6.0, 8.0], [1.0, 9.0]], 2)
    two = domain("two", [0.0, 8.0, 0.0], [[0.0] * 2] * 3, 4)
    fact = LayerFacts(layer=2, experts=3, top_k=1, hidden=4, width=2)
    # experts: 1/2 * sums / scored = (2, .5, 1) and (0, 1, 0); text of one and two as 3 to 1: (1.5, .625, .75)
    # neurons: of one (1, .5, 1.5, 2, .25, 2.25), times 3/4; half of six, cheapest first: .25 + .5 + 1 = 1.75
    found = probes_of([fact], [one, two], {"one": 0.75, "two": 0.25}, 1)
    assert [(decision.experts, p.kind, p.size, p.predicted) for decision, p in found] == [
        ((1,), "experts", 1, 0.625),
        ((), "neurons", 3, pytest.approx(1.75 * 0.75)),
    ]
    assert found[1][0].neurons is not None
    assert found[1][0].neurons.tolist() == [[True, True], [False, False], [True, False]]
    assert [p.kind for _, p in probes_of([fact], [one], {"one": 1.0}, 1, ("experts",))] == ["experts"]


# -- prices -------------------------------------------------------------------------------------------------


def test_corrected_prices_by_hand() -> None:
    one = domain("one", [8.0, 2.0, 4.0], [[4.0, 2.0], [6.0, 8.0], [1.0, 9.0]], 2)
    plan = Plan("s", "a", (LayerPlan(2, 3, (Pick.keep(1), Pick.slim(2, [1], 2))),))
    # expert 0 goes for 2, neuron 0 of expert 2 for 1/4
    assert predicted_nats(plan, [one], {}) == 2.25
    factors = Factors({"experts": 3.0, "neurons": 7.0}, {"neurons": {2: 2.0}})
    assert predicted_nats(plan, [one], {}, factors) == 3 * 2 + 2 * 0.25
    assert expert_prices(one, factors)[2].tolist() == [6.0, 1.5, 3.0]
    assert neuron_prices(one, 2, factors)[0].tolist() == [2.0, 1.0]
    # no factors, exactly the bare price
    assert predicted_nats(plan, [one], {}, Factors()) == 2.25


def test_statistics_carry_probes(tmp_path: Path) -> None:
    stats = Statistics("s", (domain("one", [1.0], [[1.0]], 1),), {}, (probe(2, 1.0, 2.0),))
    stats.save(tmp_path / "a")
    assert Statistics.load(tmp_path / "a").probes == stats.probes
    # the same pass twice has its probes once: domains of one pass are saved one by one and meet again
    other = Statistics("s", (domain("two", [1.0], [[1.0]], 1),), {}, (*stats.probes, probe(2, 1.0, 3.0)))
    assert (stats + other).probes == (probe(2, 1.0, 2.0), probe(2, 1.0, 3.0))
    assert factors_of(stats).pooled == {"experts": pytest.approx(2.0)}
    assert factors_of(stats, wanted=False) == factors_of(None) == Factors()


def test_only_priced_methods_ask_for_probes() -> None:
    assert probing([(NATS, NatsParams())]) == {"probes": 3, "kinds": ("experts",)}
    assert probing([(HEAPR, HeaprParams(probes=5)), (NATS, NatsParams())]) == {
        "probes": 5, "kinds": ("experts", "neurons"),
    }  # fmt: skip
    assert probing([(NATS, NatsParams(probes=0)), (REAP, REAP.params())]) == {"probes": 0, "kinds": ()}
    with pytest.raises(UsageError, match="-1 probes"):
        NatsParams(probes=-1)


def test_cost_by_hand() -> None:
    facts = [LayerFacts(1, 6, 2, 4, 4), LayerFacts(2, 6, 2, 4, 4)]
    # three layers: the model runs 3 on four times the text, three variants of layer 1 run 2 each, three of layer 2 run
    # 1: 12 + 6 + 3 = 21; 4 + 6 times 100 tokens' hidden states of 4 numbers of 2 bytes
    assert SPREAD == 4 and layer_passes([1, 1, 1, 2, 2, 2], 3) == 21
    assert probing_cost(facts, 3, 100, 3, ("experts",)) == ProbingCost(2100, 10 * 100 * 4 * 2)
    assert probing_cost(facts, 3, 10**6, 3, ("experts",), 4) == ProbingCost(21 * 2048, 10 * 2048 * 4 * 4)
    assert probing_cost(facts, 3, 100, 3, ()) == ProbingCost()


def test_text_of_probes_costs_no_more_than_some_passes() -> None:
    places = [1, 1, 1, 2, 2, 2]
    # PASSES forward passes of 7000 tokens through 3 layers, shared out over 21
    assert affordable_tokens(places, 3, 7000) == PASSES * 1000
    assert affordable_tokens(places, 3, 10**6) == PROBE_TOKENS
    assert affordable_tokens(places, 3, 600) == LEAST_TOKENS
    assert affordable_tokens(places, 3, 100) == 100  # there is no more


def test_disk_is_told_before_it_is_used(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    from moezip.calibrate import stream

    rows, told, most = rows_of(), list[int](), 0
    monkeypatch.setattr(stream.Stream, "hidden_budget", lambda self: 2_000)

    def watch(progress: Progress) -> None:
        nonlocal most
        if progress.stage == "reserve disk":
            told.append(progress.total)
        else:
            most = max(most, sum(file.stat().st_size for file in tmp_path.iterdir()))

    with Checkpoint.open(tiny("qwen3_moe")) as source:
        [fact, *_] = identify(source.config).layer_facts(source.config)
        measure(source, rows, [Decision(1, (0,))], workdir=tmp_path, watch=watch, dtype=torch.float32)
    assert told == [most] == [2 * rows.ids.numel() * fact.hidden * 4]


# -- through the pipeline -----------------------------------------------------------------------------------


def counts(plan: Plan) -> list[int]:
    return [len(layer.picks) for layer in plan.layers]


def test_factors_move_the_ranking_over_the_model(tiny: Tiny) -> None:
    """Equal prices everywhere; the layer whose probes say that experts are dearer keeps more."""
    common, model = Common(), opened(str(tiny("qwen3_moe")))
    layers = {
        fact.layer: {
            "drop_renormalised_square": np.arange(1.0, fact.experts + 1),
            "inner_product_square": np.ones((fact.experts, fact.width)),
            "output_max": np.ones(fact.experts),
        }
        for fact in model.facts
    }
    scales = {fact.layer: 4.0 if fact.layer == 1 else 1.0 for fact in model.facts}
    probes = tuple(probe(layer, 0.1, 0.1 * scale) for layer, scale in scales.items() for _ in range(2))
    stats = Statistics(model.source.fingerprint, (Domain("d", ("d",), 10, layers, 10, 1.0),), {}, probes)

    def plan_of(**settings: str) -> Plan:
        job = PruneJob("nats", ratio=0.5, scope="model", settings=settings)
        return make_plan(prepare_prune(str(tiny("qwen3_moe")), job, common), job, stats, common)

    bare, corrected = plan_of(probes="0"), plan_of()
    assert counts(bare) == [4, 4, 4] and bare.made_by["price_factors"] == {}
    # layer 1 at four times the price: (4, ..., 32) against (1, ..., 8) twice, the dearest twelve of all stay
    assert counts(corrected) == [3, 7, 2]
    # experts 1 to 4 of every layer gone for (1 + 2 + 3 + 4) / 20 each
    assert bare.made_by["predicted_nats"] == pytest.approx(3 * 0.5)
    assert corrected.made_by["price_factors"]["experts"]["layers"]["1"] == pytest.approx(4.0)
    assert factor_note(corrected, stats) is None and factor_note(bare, stats) is None
    alone = Statistics(stats.source, stats.domains)
    uncorrected = make_plan(prepare_prune(str(tiny("qwen3_moe")), PruneJob("nats", ratio=0.5), common),
                            PruneJob("nats", ratio=0.5), alone, common)  # fmt: skip
    assert "hold no measured probes of experts" in str(factor_note(uncorrected, alone))


def test_prune_measures_and_shows_factors(tiny: Tiny, tmp_path: Path, cli: Cli) -> None:
    write_text(tmp_path / "text.jsonl", seed=1)
    words = ["prune", tiny("qwen3_moe"), "--method", "nats", "--ratio", 0.5, "--data", tmp_path / "text.jsonl",
             "--tokens", 256, "--seq-len", 64]  # fmt: skip

    def answer(out: str, *more: object) -> Any:
        found = cli(*words[:2], tmp_path / out, *words[2:], "--json", "--save-stats", tmp_path / f"{out}.stats", *more)
        assert found.code == 0, found.err
        return SimpleNamespace(report=found.json, stats=Statistics.load(tmp_path / f"{out}.stats"), err=found.err)

    bare, probed = answer("bare", "--set", "probes=0"), answer("probed", "--set", "probes=2")
    assert "probes" not in bare.err and "probes: 3 layers done" in probed.err
    assert bare.stats.probes == () and bare.report["price_factors"] == {}
    assert [(p.layer, p.kind) for p in probed.stats.probes] == [(layer, "experts") for layer in (0, 0, 1, 1, 2, 2)]
    assert all(p.predicted > 0 and p.divergence > 0 and p.tokens in (63, 2 * 63, 4 * 63) for p in probed.stats.probes)
    assert probed.report["price_factors"] == factors_of(probed.stats).to_json()
    assert list(tmp_path.glob("*.moezip-work")) == []
    # the same statistics without their probes: the bare price to the last bit, with a word on why
    again = cli(*words[:2], tmp_path / "again", *words[2:6], "--stats", tmp_path / "bare.stats", "--json")
    assert again.json["predicted_nats"] == bare.report["predicted_nats"]
    assert any("hold no measured probes of experts" in note for note in again.json["notes"])
    corrected = cli(*words[:2], tmp_path / "more", *words[2:6], "--stats", tmp_path / "probed.stats", "--json").json
    assert corrected["predicted_nats"] == probed.report["predicted_nats"]
    dry = cli(*words[:2], tmp_path / "dry", *words[2:], "--set", "probes=2", "--dry-run", "--json").json
    # 256 tokens; the model runs three layers on four times that, two variants each of layers 0, 1, 2 run 3, 2, 1
    assert dry["probe_layer_tokens"] == 256 * (12 + 6 + 4 + 2)


def test_rank_correlation_by_hand_and_against_the_library() -> None:
    from scipy.stats import spearmanr

    assert rank_correlation([0.1, 0.2, 0.9], [1.0, 3.0, 2.0]) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None and rank_correlation([1.0] * 3, [1.0, 2.0, 3.0]) is None
    random = np.random.default_rng(0)
    first, second = random.integers(0, 5, 20).tolist(), random.integers(0, 5, 20).tolist()  # with many equals
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=ALGEBRA)

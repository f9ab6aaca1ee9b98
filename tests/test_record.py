"""What is recorded: by hand on three tokens, and on whole models against plain hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate import capture
from moezip.calibrate.capture import turning
from moezip.calibrate.data import Rows
from moezip.calibrate.record import BY_NAME, GRADIENT_RECORDS, RECORDS, Observation, chosen_records
from moezip.calibrate.run import calibrate
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import UsageError
from moezip.prune import METHODS
from moezip.prune.params import PruneParams
from tests.tiny import token_ids

Tiny = Callable[..., Path]
FACTS = LayerFacts(layer=0, experts=3, top_k=2, hidden=2, width=2)

# -- by hand ------------------------------------------------------------------------------------------------
#
#            chosen   gates        norms     token weight   logits
#   token 0   0, 1    0.75, 0.25   2, 4      0.5            3, 2, 1
#   token 1   1, 0    0.5,  0.5    8, 6      1              0, 1, 0
#   token 2   1, 0    1,    0.25   1, 16     2             -1, 1, 0
#
# Expert 2 is never chosen. All numbers are exact in float32.
SEEN = Observation(
    experts=3,
    ids=torch.tensor([[0, 1], [1, 0], [1, 0]]),
    gates=torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.25]]),
    norms=torch.tensor([[2.0, 4.0], [8.0, 6.0], [1.0, 16.0]]),
    change=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    peaks=torch.tensor([1.5, 7.0, 0.0]),
    logits=torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 1.0, 0.0]]),
)

BY_HAND: dict[str, Any] = {
    "counts": [3, 3, 0],
    # expert 0: 0.75 + 0.5 + 0.25; expert 1: 0.25 + 0.5 + 1
    "gate_sum": [1.5, 1.75, 0],
    # of exp(logits), each over the sum of its token's: token 0 e^3, e^2, e; token 1 1, e, 1; token 2 1/e, e, 1
    "probability_sum": [
        math.e**2 / (math.e**2 + math.e + 1) + 1 / (2 + math.e) + 1 / (1 + math.e + math.e**2),
        math.e / (math.e**2 + math.e + 1) + math.e / (2 + math.e) + math.e**2 / (1 + math.e + math.e**2),
        0,
    ],
    # expert 0: 2 + 6 + 16; expert 1: 4 + 8 + 1
    "norm_sum": [24, 13, 0],
    # expert 0: 0.75*2 + 0.5*6 + 0.25*16 = 1.5 + 3 + 4; expert 1: 0.25*4 + 0.5*8 + 1*1 = 1 + 4 + 1
    "gate_norm_sum": [8.5, 6, 0],
    # the same terms times 0.5, 1, 2: expert 0: 0.75 + 3 + 8; expert 1: 0.5 + 4 + 2
    "change_gate_norm_sum": [11.75, 6.5, 0],
    "output_max": [1.5, 7, 0],
    # columns of the logits: a = (3, 0, -1), b = (2, 1, 1), c = (1, 0, 0)
    # aa = 9+1, ab = 6-1, ac = 3, bb = 4+1+1, bc = 2, cc = 1
    "router_gram": [[10, 5, 3], [5, 6, 2], [3, 2, 1]],
    # tokens that chose both; on the diagonal the counts
    "coactivation": [[3, 3, 0], [3, 3, 0], [0, 0, 0]],
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_by_hand(record: Any) -> None:
    got = record.update(SEEN)
    assert got.dtype == torch.float64
    assert tuple(got.shape) == record.shape(FACTS)
    # exponentials are no exact numbers
    close = 1e-6 if record.name == "probability_sum" else 0
    np.testing.assert_allclose(got, np.array(BY_HAND[record.name], dtype=float), rtol=close)


def test_every_record_is_worked_by_hand_and_named_once() -> None:
    assert set(BY_HAND) == set(BY_NAME)
    assert len(BY_NAME) == len(RECORDS)
    assert {record.name for record in RECORDS if record.combine == "max"} == {"output_max"}
    known = {*BY_NAME, *(record.name for record in GRADIENT_RECORDS)}
    assert {name for method in METHODS for name in method.needs} <= known


def test_records_are_chosen_by_name_in_the_tables_order() -> None:
    assert chosen_records(None) == RECORDS
    assert [record.name for record in chosen_records(["norm_sum", "counts", "counts"])] == ["counts", "norm_sum"]
    with pytest.raises(UsageError, match=r"unknown record 'count'(.|\n)*did you mean 'counts'"):
        chosen_records(["count"])


# -- laws of the scores -------------------------------------------------------------------------------------


def repeated(times: int, gate_factor: float = 1.0) -> dict[str, np.ndarray]:
    """All records of the three tokens taken ``times`` over, every gate times a factor."""

    def tiled(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(times, *[1] * (x.dim() - 1))

    seen = Observation(
        3, tiled(SEEN.ids), tiled(SEEN.gates) * gate_factor, tiled(SEEN.norms), tiled(SEEN.change), SEEN.peaks,
        tiled(SEEN.logits),
    )  # fmt: skip
    return {record.name: record.update(seen).numpy() for record in RECORDS}


def scores(stats: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {
        m.name: m.run(FACTS, stats, PruneParams()).tolist() for m in METHODS if m.needs and set(m.needs) <= set(stats)
    }


def test_a_token_said_twice_doubles_sums_and_leaves_means() -> None:
    once, twice = scores(repeated(1)), scores(repeated(2))
    for name in ("easy-ep", "frequency", "gate-sum"):
        assert twice[name] == [2 * value for value in once[name]], name
    for name in ("reap", "mean-norm"):
        assert twice[name] == once[name], name


def test_scaling_all_gates_changes_no_ranking() -> None:
    plain, scaled = scores(repeated(1)), scores(repeated(1, gate_factor=2.5))
    for name, values in plain.items():
        assert np.argsort(values).tolist() == np.argsort(scaled[name]).tolist(), name
    assert scaled["easy-ep"] == [2.5 * value for value in plain["easy-ep"]]


def test_hand_worked_scores_rank_as_they_should() -> None:
    # easy-ep 11.75 > 6.5, reap 8.5/3 > 6/3, but by gate sum 1.5 < 1.75: the methods do differ
    worked = scores(repeated(1))
    assert worked["easy-ep"] == [11.75, 6.5, 0]
    assert worked["reap"] == [8.5 / 3, 2, 0]
    assert worked["mean-norm"] == [8, 13 / 3, 0]
    assert worked["gate-sum"] == [1.5, 1.75, 0]
    assert worked["frequency"] == [3, 3, 0]


# -- the token weight ---------------------------------------------------------------------------------------


def test_token_weight_by_hand() -> None:
    h = torch.tensor([[3.0, 4.0]] * 6)
    r = torch.tensor([
        [6.0, 8.0],  # the same direction: h + r = 3h, cos 1, weight 0
        [-6.0, -8.0],  # r = -2h: h + r = -h, cos -1, weight 2
        [0.0, 0.0],  # nothing added: weight 0
        [-7.0, -1.0],  # h + r = (-4, 3), at a right angle: cos 0, weight 1
        [-1.5, -2.0],  # r = -h/2: shorter, not turned: weight 0
        [-3.0, -4.0],  # h + r = 0 has no direction: weight 0 by definition
    ])  # fmt: skip
    # the dot products are of small whole numbers (and halves), so only the root and the quotient can round
    assert turning(h, r, 1.0).tolist() == pytest.approx([0, 2, 0, 1, 0, 0], abs=1e-15)
    # half of it joins the stream: h + r/2 = 2h, 0, h, (-0.5, 3.5), 3h/4, h/2
    # fourth: cos = (3*-0.5 + 4*3.5) / (5 * sqrt(12.5)) = 12.5 / (5 * sqrt(12.5)) = sqrt(0.5)
    halved = turning(h, r, 0.5).tolist()
    assert halved == pytest.approx([0, 0, 0, 1 - math.sqrt(0.5), 0, 0], abs=1e-15)


def test_token_weight_is_never_negative_and_of_float64() -> None:
    h = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    found = turning(h, h * 1e-3, 1.0)
    assert found.dtype == torch.float64
    assert float(found.min()) >= 0
    assert float(found.max()) < 1e-6  # parallel, up to the rounding of float32 dot products


def test_token_weight_of_a_zero_stream_is_zero() -> None:
    assert turning(torch.zeros(2, 3), torch.ones(2, 3), 1.0).tolist() == [0, 0]


def test_token_weight_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    h, r = torch.randn(2, 10, 8, generator=generator)
    whole = turning(h, r, 1.0)
    monkeypatch.setattr(capture, "CHUNK", 3)
    assert torch.allclose(whole, turning(h, r, 1.0), rtol=0, atol=1e-7)
    cosine = torch.nn.functional.cosine_similarity(h.double(), (h + r).double())
    assert torch.allclose(whole, 1 - cosine, rtol=0, atol=1e-6)


# -- on whole models ----------------------------------------------------------------------------------------

# The same numbers from the same float32 weights, summed over up to 40 tokens in another order; the token weight comes
# from a cosine near 1, whose float32 dot products leave it an absolute error of about 1e-7.
SAME = 2e-5

FAMILIES = (
    "qwen3_moe",
    "deepseek_v3",  # groups, selection bias, sigmoid, scaling factor, shared experts
    "deepseek_v2",
    "granitemoe",  # residual_multiplier 0.5
    "gpt_oss",  # biases, interleaved, router bias
    "ernie4_5_moe",
    "jamba",
    "minimax_m2",
)


def expected(folder: Path, rows: Rows) -> tuple[Architecture, dict[int, dict[str, np.ndarray]]]:
    """All records from a whole model in memory: what the experts module and the router are given and give back."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    config = model.config.to_dict()
    entry = identify(config)
    assert rows.mask is not None
    real, found = rows.mask.reshape(-1), {}
    for fact in entry.layer_facts(config):
        layer = model.get_submodule(f"{entry.layers}.{fact.layer}")
        block = layer.get_submodule(entry.block)
        seen: dict[str, Any] = {}
        hooks = [
            block.get_submodule(entry.experts_module).register_forward_hook(
                lambda _, args, out, seen=seen: seen.update(x=args[0], ids=args[1], gates=args[2], output=out)
            ),
            block.get_submodule(entry.router_module).register_forward_hook(
                lambda _, args, out, seen=seen: seen.update(logits=out[0] if isinstance(out, tuple) else out)
            ),
            layer.get_submodule(entry.norm).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.update(stream=args[0])
            ),
        ]
        with torch.no_grad():
            model(rows.ids, attention_mask=rows.mask.long(), use_cache=False)
        for hook in hooks:
            hook.remove()
        scale = float(config.get("residual_multiplier") or 1.0)
        seen["scores"] = seen["logits"].sigmoid() if entry.scoring == "sigmoid" else seen["logits"].softmax(-1)
        found[fact.layer] = worked_out(block.get_submodule(entry.experts_module), fact, seen, real, scale)
        if entry.gates_renormalised(config) and entry.scoring != "sparsemixer":  # they are shares of these scores
            chosen = seen["scores"].reshape(real.numel(), -1).gather(1, seen["ids"].long())[real].double()
            shares = seen["gates"][real].double()
            torch.testing.assert_close(
                shares / shares.sum(1, keepdim=True), chosen / chosen.sum(1, keepdim=True), rtol=1e-5, atol=0
            )
    return entry, found


def worked_out(experts: Any, fact: LayerFacts, seen: dict[str, Any], real: torch.Tensor, scale: float) -> Any:
    """The records' definitions, token by token; every expert run by itself on every token it was given."""
    e, (x, ids, gates) = fact.experts, (seen["x"], seen["ids"], seen["gates"])
    sums = {name: np.zeros(BY_NAME[name].shape(fact)) for name in BY_NAME}
    stream, logits = seen["stream"].reshape(x.shape[0], -1).double(), seen["logits"].reshape(x.shape[0], -1).double()
    scores = seen["scores"].reshape(x.shape[0], -1)
    for t in real.nonzero()[:, 0].tolist():
        h, r = stream[t], scale * seen["output"][t].double()
        weight = max(0.0, 1 - float(h @ (h + r) / (h.norm() * (h + r).norm())))
        sums["router_gram"] += torch.outer(logits[t], logits[t]).numpy()
        chosen = np.zeros(e)
        for i, g in zip(ids[t].tolist(), gates[t].tolist()):
            with torch.no_grad():  # a single expert with gate 1: its bare output
                f = experts(x[t : t + 1], torch.tensor([[i]]), torch.ones(1, 1))[0].double()
            norm = float(f.norm())
            sums["counts"][i] += 1
            sums["gate_sum"][i] += g
            sums["probability_sum"][i] += float(scores[t, i])
            sums["norm_sum"][i] += norm
            sums["gate_norm_sum"][i] += g * norm
            sums["change_gate_norm_sum"][i] += g * norm * weight
            sums["output_max"][i] = max(sums["output_max"][i], float(f.abs().max()))
            chosen[i] = 1
        sums["coactivation"] += np.outer(chosen, chosen)
    return sums


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_sums_are_those_of_plain_hooks(name: str, tiny: Tiny) -> None:
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[1, :4] = mask[2, 7:] = False
    rows = Rows(token_ids(4, 10), mask, ("text",) * 4)
    folder = tiny(name)
    entry, wanted = expected(folder, rows)
    stats = calibrate(Checkpoint.open(folder), rows, RECORDS, micro_rows=2)
    (domain,) = stats.domains
    assert domain.tokens == int(mask.sum()) == 33
    assert list(domain.layers) == sorted(wanted)
    for layer, named in wanted.items():
        got = domain.layers[layer]
        for exact in ("counts", "coactivation"):
            assert got[exact].tolist() == named[exact].tolist(), (layer, exact)
        for record in RECORDS:
            difference = np.abs(got[record.name] - named[record.name]).max()
            assert difference <= SAME * np.abs(named[record.name]).max(), (layer, record.name)
        assert named["change_gate_norm_sum"].max() > 0.01
        # the sums a method divides or compares by are not degenerate
        assert got["counts"].sum() == 33 * entry.layer_facts(Checkpoint.open(folder).config)[0].top_k


def test_hooks_are_gone_afterwards(tiny: Tiny) -> None:
    from moezip.calibrate.capture import Capture
    from moezip.calibrate.stream import Stream

    source = Checkpoint.open(tiny("qwen3_moe"))
    stream = Stream(source, micro_rows=1)
    entry = stream.skeleton.architecture
    rows = Rows(token_ids(2, 6), None, ("text",) * 2)
    watcher = Capture(entry, entry.layer_facts(source.config), RECORDS, 1.0)
    states = stream.embed(rows)
    for _ in stream.run(rows, states, capture=watcher):
        pass
    for layer in stream.layers:
        assert layer.mlp.experts._moezip_routed is None
        assert not layer.mlp.gate._forward_hooks
        assert not layer.post_attention_layernorm._forward_pre_hooks

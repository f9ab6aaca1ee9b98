"""How far a compressed model chooses the experts that its source chose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.checkpoint.reader import Checkpoint
from moezip.evaluate.loss import evaluate
from moezip.evaluate.routing import LayerRouting, compare, planned
from moezip.plan.plan import LayerPlan, Part, Pick, Plan
from tests.command import Cli, write_text

Tiny = Callable[..., Path]
# Two experts in a thousand whose logits are equal but for rounding may change places.
TIES = 0.01


def test_the_definition_by_hand() -> None:
    # expert 2 stays as 0, experts 0 and 1 are merged into 1, expert 3 is gone
    plan = LayerPlan(0, 4, (Pick.keep(2), Pick((Part(0, 0.5), Part(1, 0.5)))))
    theirs = np.array([[0, 1], [2, 3], [3, 0]])
    ours = np.array([[1, 0], [1, 0], [0, 2]])  # 2 is beyond the two that there are: nobody
    # chosen: 0 and 1, which mean 1 and count once; 2, which means 0; 0, which means 1. The last is not made.
    assert compare(theirs, ours, planned(plan)) == LayerRouting(asked=6, remaining=4, possible=3, agreed=2)
    # a router that keeps all its rows says the same in the source's ids
    whole = LayerPlan(0, 4, (Pick.keep(2), Pick((Part(0, 0.4), Part(1, 0.3), Part(3, 0.3)))), router="remap")
    assert planned(whole).ours.tolist() == [1, 1, 0, 1, -1]
    # meant: 1; 0 and 1; 1. Chosen: 1 and 0; twice 1; twice 1.
    found = compare(theirs, np.array([[3, 2], [1, 0], [0, 0]]), planned(whole))
    assert found == LayerRouting(asked=6, remaining=6, possible=4, agreed=3)
    # constants in the places of dropped experts are not experts
    assert planned(plan, substituted=True).ours.tolist() == [1, 1, 0, -1, -1]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "jamba"])
def test_a_model_agrees_with_itself(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source, text = Checkpoint.open(tiny(name)), write_text(tmp_path / "text.jsonl", documents=3)
    found = evaluate(source, data=[text], against=source, seq_len=24)
    assert found.routing is not None and found.routing.reason is None
    layers = [fact.layer for fact in identify(source.config, source.folder).layer_facts(source.config)]
    assert sorted(found.routing.layers) == layers
    for layer in found.routing.layers.values():
        assert layer.agreed == layer.possible == layer.remaining == layer.asked
    told = json.loads(json.dumps(found.to_json()))["against"]["routing"]
    assert (told["agreement"], told["remaining"], told["reason"]) == (1.0, 1.0, None)
    assert list(told["by_layer"]) == [str(layer) for layer in layers]


def test_padding_does_not_count(tiny: Tiny, tmp_path: Path) -> None:
    # windows of 32, and a file of 3 lines of 5 characters: one window of 18 tokens, padded in one batch with them
    long, short = write_text(tmp_path / "long.jsonl"), write_text(tmp_path / "short.jsonl", documents=3, length=5)
    source = Checkpoint.open(tiny("qwen3_moe"))
    found = evaluate(source, data=[long, short], against=source, seq_len=32)
    assert found.routing is not None and found.loss is not None
    top_k = source.config["num_experts_per_tok"]
    windows = (found.by_file["long"].tokens // 31) + 1
    for layer in found.routing.layers.values():
        assert layer.asked == (found.loss.tokens + windows) * top_k


def chosen(folder: Path, ids: list[list[int]]) -> list[torch.Tensor]:
    """Per layer the choices [T, k] of a plain transformers model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        def keep(_: Any, given: tuple[Any, ...], number: int = number) -> None:
            seen.setdefault(number, []).append(given[1])

        layer.mlp.experts.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in ids:
            model(torch.tensor([row]))
    return [torch.cat(found) for found in seen.values()]


def test_a_pruned_model_against_a_plain_count(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    source, out, text = tiny("qwen3_moe"), tmp_path / "out", write_text(tmp_path / "text.jsonl", documents=4)
    assert cli("prune", source, out, "--method", "random", "--keep", 5).code == 0
    answer = cli("evaluate", out, "--against", source, "--data", text, "--seq-len", 24, "--json")
    assert answer.code == 0
    told = answer.json["against"]["routing"]
    from tests.test_evaluate import plain_windows

    ids = plain_windows(source, text, 24)
    theirs, ours = chosen(source, ids), chosen(out, ids)
    for entry, before, after in zip(Plan.load(out / "moezip/plan.json").layers, theirs, ours, strict=True):
        places = {expert: place for place, expert in enumerate(entry.kept)}
        possible = agreed = 0
        for old, new in zip(before.tolist(), after.tolist(), strict=True):
            meant = {places[expert] for expert in old if expert in places}
            possible += len(meant)
            agreed += len(meant & set(new))
        found = told["by_layer"][str(entry.layer)]
        assert found["agreement"] == pytest.approx(agreed / possible, abs=TIES)
        assert found["remaining"] == pytest.approx(possible / before.numel(), abs=TIES)
    first = told["by_layer"]["0"]
    assert first["agreement"] == 1.0  # its input is the same, and of the rows that stay the order is
    assert 0.4 < first["remaining"] < 0.9
    answer = cli("evaluate", out, "--against", source, "--data", text, "--seq-len", 24)
    assert "routing: " in answer.err and "by layer 0:100%" in answer.err


def test_a_permuted_model_agrees_with_its_source(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    facts = identify(source.config, source.folder).layer_facts(source.config)
    layers = tuple(LayerPlan(f.layer, f.experts, tuple(map(Pick.keep, reversed(range(f.experts))))) for f in facts)
    (tmp_path / "plan.json").write_text(Plan(source.fingerprint, "qwen3_moe", layers).to_json())
    assert cli("apply", source.folder, tmp_path / "plan.json", tmp_path / "out").code == 0
    text = write_text(tmp_path / "text.jsonl", documents=4)
    found = evaluate(Checkpoint.open(tmp_path / "out"), data=[text], against=source, seq_len=24)
    assert found.routing is not None
    total = found.routing.total()
    assert total.remaining == total.asked and total.agreed >= (1 - TIES) * total.possible


def test_models_that_no_plan_relates_are_told_apart(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny("qwen3_moe"), write_text(tmp_path / "text.jsonl", documents=4)
    for seed, out in enumerate(("one", "two")):
        assert cli("prune", source, tmp_path / out, "--method", "random", "--keep", 4, "--seed", seed).code == 0
    one, two = (Checkpoint.open(tmp_path / out) for out in ("one", "two"))

    def reason(model: Checkpoint, reference: Checkpoint) -> str:
        found = evaluate(model, data=[text], against=reference, seq_len=24, tokens=96)
        assert found.routing is not None and found.against is not None  # all else is measured
        assert found.to_json()["against"]["routing"]["agreement"] is None
        return found.routing.reason or ""

    assert "made for another checkpoint" in reason(one, two)
    assert "the model has none" in reason(Checkpoint.open(source), one)
    assert "different numbers" in reason(Checkpoint.open(source), Checkpoint.open(tiny("qwen3_moe", experts=16)))


def test_a_model_that_is_not_saved_is_seen_through_its_own_plan(tiny: Tiny, tmp_path: Path) -> None:
    import moezip

    text = write_text(tmp_path / "text.jsonl", documents=4)
    source = moezip.open(tiny("qwen3_moe"))
    view = source.prune("random", keep=4)
    found = view.evaluate(text, against=source, tokens=96)
    view.save(tmp_path / "out")
    saved = moezip.open(tmp_path / "out")
    assert found.routing is not None and found.routing.reason is None
    assert found.routing == saved.evaluate(text, against=source, tokens=96).routing
    # of the plan in the folder that it is a view of, a view is none of the output
    again = saved.prune("random", keep=3).evaluate(text, against=source, tokens=96)
    assert again.routing is not None and "made for another checkpoint" in (again.routing.reason or "")

"""``quantize --dry-run``, ``--plan-only`` and ``--plan``: what is known before any pass, and widths without codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezip.arch.spec import LayerFacts
from moezip.formats.packed import Grid
from moezip.pipeline.flat import flat_costs, flat_drops, flat_prices, flat_scores
from moezip.pipeline.items import Item
from moezip.plan.bits import allocate
from moezip.plan.plan import Plan
from moezip.plan.widths import Allocation
from tests.command import Cli, model_files, tree, write_text

Tiny = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


@pytest.fixture
def asked(tiny: Tiny, text: Path) -> Callable[..., tuple[Any, ...]]:
    """A command line on the tiny model."""

    def words(out: Path, *more: Any) -> tuple[Any, ...]:
        common = ("--data", text, "--tokens", 512, "--seq-len", 32)
        return ("quantize", tiny("qwen3_moe", dtype="bfloat16"), out, *common, *more)

    return words


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr("moezip.pipeline.quantize.read_rows", read)
    monkeypatch.setattr("moezip.pipeline.widths.run_calibration", read)


# -- flat prices --------------------------------------------------------------------------------------------


def test_flat_prices_by_hand() -> None:
    """Weights 4 x 8 = 32, 32 and 64: shares 1/4, 1/4, 1/2. 1 bit costs a quarter of that, 2 bits a sixteenth."""
    items = [
        Item("a", "gate", (4, 8), 0, 0), Item("b", "down", (8, 4), 0, 1), Item("c", "attention", (8, 8), 0),
    ]  # fmt: skip
    table = flat_prices(items, [Grid(1, 4), Grid(2, 4)])
    np.testing.assert_array_equal(table.nats, [[1 / 16, 1 / 64], [1 / 16, 1 / 64], [1 / 8, 1 / 32]])
    facts = [LayerFacts(layer=0, experts=2, top_k=1, hidden=8, width=4)]
    np.testing.assert_array_equal(flat_drops(items, facts)[0], [1 / 4, 1 / 4])
    np.testing.assert_array_equal(flat_costs(facts)[0], [[1 / 4, 1 / 16, 1 / 64]] * 2)
    assert flat_scores(items, by_layer=False) == {"a": 0.0, "b": 1.0}
    assert flat_scores(items, by_layer=True) == {"a": 0.0, "b": 0.0}


# -- the dry run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocate", "bits"), [("lp", 4.5), ("lp", 2.2), ("pmq", 2.0), ("outlier", 4.5), ("block", 4.5)]
)
def test_a_dry_run_tells_counts_and_bytes_and_touches_nothing(
    allocate: str, bits: float, asked: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_read(monkeypatch)
    # groups of one row: scales are many in so small a model
    answer = cli(
        *asked(tmp_path / "out", "--allocate", allocate, "--bits", bits, "--group-size", 0, "--dry-run", "--json")
    )
    assert answer.code == 0, answer.err
    told = answer.json
    assert sum(told["widths"].values()) == told["matrices"] > 0
    assert len(told["experts"]) == 3 and all(2 <= count <= 8 for count in told["experts"])
    assert "alike" in told["assumes"]
    assert tree(tmp_path) == ["text.jsonl"]
    # pmq's bits are those of the codes; and where experts go, --bits is of all weights and what is told of what stays
    if allocate != "pmq" and sum(told["experts"]) == 3 * 8:
        assert told["bits_per_weight"] <= bits


def test_the_size_of_a_dry_run_is_about_that_of_the_run(asked: Any, cli: Cli, tmp_path: Path) -> None:
    words = asked(tmp_path / "out", "--allocate", "lp", "--size", "40%", "--group-size", 0, "--json")
    told, done = cli(*words, "--dry-run").json, cli(*words).json
    limit = 0.4 * done["bytes_before"]
    # the wanted optimum lies within 5 % of made-up prices; how full the budget gets is a step of one matrix
    assert 0.95 * limit < told["bytes_after"] <= limit and 0.95 * limit < done["bytes_after"] <= limit


@pytest.mark.parametrize("granularity", ["role", "layer"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_rows_that_go_with_experts_are_counted_by_size_to_the_byte(
    family: str, granularity: str, tiny: Tiny, text: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the choice leaves of its budget is what the file leaves of ``--size``: rows, biases and all."""
    found: list[Allocation] = []
    monkeypatch.setattr("moezip.pipeline.widths.allocate", lambda *a, **k: found.append(allocate(*a, **k)) or found[-1])
    monkeypatch.setattr(  # so that any are dropped: what they are stored in is cheaper than what comes with them
        "moezip.pipeline.widths.flat_drops",
        lambda items, facts: {fact.layer: np.full(fact.experts, 1e-9) for fact in facts},
    )
    budget = ("--allocate", "lp", "--granularity", granularity, "--size", "30%", "--group-size", 0)
    source = tiny(family, dtype="bfloat16")
    told = cli("quantize", source, tmp_path / "out", *budget, "--data", text, "--dry-run", "--json")
    assert told.code == 0, told.err
    assert found[-1].dropped
    assert int(0.30 * told.json["bytes_before"]) - told.json["bytes_after"] == found[-1].budget - found[-1].bytes >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--allocate", "lp", "--bits", 0.2), "smallest choice takes"),
        (("--allocate", "lp", "--size", 4000), "bytes are enough for every matrix in its fewest bits"),
        (("--allocate", "lp", "--bits", 4.5, "--for", "vllm"), "--granularity layer"),
        (("--allocate", "pmq", "--bits", 1.1), "pmq cannot share"),
        (("--allocate", "outlier", "--bits", 0.2), "smallest choice takes"),
        (("--allocate", "block", "--bits", 0.2), "smallest choice takes"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_budget_that_nothing_fits_is_told_before_any_pass(
    words: Any, message: str, dry: Any, asked: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.calibrate.stream import Stream

    def stream(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was begun")

    monkeypatch.setattr(Stream, "__init__", stream)
    monkeypatch.setattr("moezip.pipeline.widths.run_calibration", stream)
    answer = cli(*asked(tmp_path / "out", *words, "--group-size", 0, *dry))
    assert answer.code in (1, 2) and message in " ".join(answer.err.split()), answer.err
    assert not (tmp_path / "out").exists()


# -- plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [("--allocate", "lp", "--bits", 2.2), ("--allocate", "pmq", "--bits", 2), ("--bits", 3)],
    ids=["lp with drops", "pmq", "uniform"],
)
def test_widths_of_a_plan_give_the_bytes_of_the_run_that_chose_them(
    choice: Any, asked: Any, cli: Cli, tmp_path: Path
) -> None:
    plan, out, straight = tmp_path / "plan.json", tmp_path / "out", tmp_path / "straight"
    answer = cli(*asked(plan, *choice, "--group-size", 0, "--plan-only", "--json"))
    assert answer.code == 0, answer.err
    assert tree(tmp_path) == ["plan.json", "text.jsonl"]
    saved = Plan.load(plan)
    assert sum(answer.json["widths"].values()) == len(saved.packing) > 0
    assert cli(*asked(straight, *choice, "--group-size", 0)).code == 0
    assert cli(*asked(out, "--plan", plan)).code == 0
    assert cli("verify", out).code == 0
    found, wanted = model_files(out), model_files(straight)
    assert json.loads(found.pop("moezip/plan.json"))["made_by"]["chosen_by"]["allocate"] == saved.made_by["allocate"]
    wanted.pop("moezip/plan.json")
    assert found == wanted
    if "lp" in choice:
        assert any(len(layer.picks) < layer.experts for layer in saved.layers), "nothing was dropped: no test of that"
    # and from the checkpoint's own plan, in another solver's codes
    again = tmp_path / "again"
    assert cli(*asked(again, "--plan", out / "moezip/plan.json", "--solver", "rtn")).code == 0
    assert Plan.load(again / "moezip/plan.json").packing == Plan.load(out / "moezip/plan.json").packing


@pytest.mark.parametrize(
    "more", [("--bits", 4), ("--size", "40%"), ("--allocate", "lp"), ("--group-size", 0), ("--set", "attention=8")]
)
def test_what_decides_about_widths_is_refused_beside_a_plan_that_has_them(
    more: Any, asked: Any, cli: Cli, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert cli(*asked(plan, "--bits", 3, "--solver", "rtn", "--group-size", 0, "--plan-only")).code == 0
    answer = cli(*asked(tmp_path / "out", "--plan", plan, *more))
    assert answer.code == 2 and "the plan says already" in answer.err, answer.err


def test_plan_only_asks_before_it_replaces_and_a_plan_without_codes_is_not_applied(
    asked: Any, tiny: Tiny, cli: Cli, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    words = asked(plan, "--bits", 3, "--solver", "rtn", "--group-size", 0, "--plan-only")
    assert cli(*words).code == 0
    assert "exists already" in cli(*words).err
    answer = cli("apply", tiny("qwen3_moe", dtype="bfloat16"), plan, tmp_path / "out")
    assert answer.code == 1 and "quantize --plan" in " ".join(answer.err.split()), answer.err


# -- text that nobody reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ["uniform", "outlier"])
def test_rounding_reads_no_text(
    allocate: str, asked: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_read(monkeypatch)
    words = ("--allocate", allocate, "--bits", 6, "--solver", "rtn", "--group-size", 0, "--json")
    answer = cli(*asked(tmp_path / "out", *words))
    assert answer.code == 0, answer.err
    assert "rtn reads no text: --data was not used" in answer.json["notes"]
    assert answer.json["statistics"] == {}

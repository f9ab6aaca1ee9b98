"""MC-SMoE's second stage: factors and rows, where they are stored, and who runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moezip.arch.factoring import factoring_of, folded, table_of
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, CheckpointError, PlanError, UsageError
from moezip.export.stock import tensor_bytes
from moezip.formats.factors import INDEX, LEFT, RIGHT, ROWS, Factors, multiplied, product, require_sound
from moezip.merge.mc_smoe import McSmoeParams, factored
from moezip.plan.plan import Plan
from tests.command import Cli, files_of, model_files, process, write_text
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
# float32 factors of float64 decompositions: sizes of a few, products of a few dozen terms
ROUNDING = 1e-4
# The ridge holds the whitening off the exact second moment by a thousandth of its mean.
SLACK = 1.01


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(weight: torch.Tensor, made: torch.Tensor, moment: torch.Tensor, channels: torch.Tensor) -> float:
    away = made - weight
    return float((channels[:, None] * (away @ moment) * away).sum())


# -- one matrix ---------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    # second moment 1: rank 1 and a row of diag(3, 2, 1). The row with most beside the best direction is kept; with
    # direction 3 gone to the factors, that is row 1, so left is (3, 0, 0) and what is lost is 1
    made = factored(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3), None, Factors(1, 1))
    assert made[INDEX].tolist() == [1]
    assert torch.equal(made[ROWS], torch.tensor([[0.0, 2.0, 0.0]]))
    assert torch.allclose(multiplied(made), torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=ROUNDING)
    assert float(made[LEFT][1].abs().max()) == 0


def test_a_matrix_of_low_rank_beside_some_rows_comes_back() -> None:
    weight = numbers(0, 12, 3) @ numbers(1, 3, 20)
    weight[[2, 7]] = 5 * numbers(2, 2, 20)
    moment = numbers(3, 60, 20).T @ numbers(3, 60, 20)
    made = factored(weight, moment, None, Factors(3, 2))
    assert made[INDEX].tolist() == [2, 7]
    assert torch.allclose(multiplied(made), weight, atol=ROUNDING)


def test_whitening_loses_less_on_the_inputs_than_the_plain_truncation() -> None:
    weight, x = numbers(0, 16, 24), numbers(1, 200, 24) * torch.logspace(-1, 1, 24)
    moment, channels = x.T @ x, torch.linspace(0.1, 3, 16)
    u, s, v = torch.linalg.svd(weight)
    plain = (u[:, :6] * s[:6]) @ v[:6]
    ones = torch.ones(16)
    best = multiplied(factored(weight, moment, None, Factors(6, 0)))
    assert loss(weight, best, moment, ones) < 0.8 * loss(weight, plain, moment, ones)
    # and with weights of the channels it is the better one for these
    weighted = multiplied(factored(weight, moment, channels, Factors(6, 0)))
    assert loss(weight, weighted, moment, channels) < loss(weight, best, moment, channels)
    assert loss(weight, best, moment, ones) < SLACK * loss(weight, weighted, moment, ones)


def test_the_truncation_is_as_good_as_can_be() -> None:
    # Eckart and Young: the least error of rank r is the sum of the squared singular values behind it
    weight, x = numbers(0, 10, 8), numbers(1, 50, 8)
    moment = x.T @ x
    lower = torch.linalg.cholesky(moment)
    least = float(torch.linalg.svdvals(weight @ lower)[3:].square().sum())
    found = loss(weight, multiplied(factored(weight, moment, None, Factors(3, 0))), moment, torch.ones(10))
    assert least * (1 - 1e-4) <= found <= SLACK * least


def test_an_expert_without_tokens_is_cut_by_its_weights_alone() -> None:
    weight = numbers(0, 6, 5)
    made = factored(weight, torch.zeros(5, 5), None, Factors(2, 0))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(multiplied(made), (u[:, :2] * s[:2]) @ v[:2], atol=ROUNDING)


def test_a_product_is_that_of_the_matrix() -> None:
    made = factored(numbers(0, 9, 7), torch.eye(7), None, Factors(2, 3))
    x, bias = numbers(1, 2, 5, 7), numbers(2, 9)
    assert torch.allclose(product(x, made, bias), x @ multiplied(made).T + bias, atol=ROUNDING)


# -- the format ---------------------------------------------------------------------------------------------


def test_sizes_as_text_and_as_table() -> None:
    table = {
        "model.layers.0.mlp.experts.0.gate_proj.weight": Factors(12, 8),
        "model.layers.0.mlp.experts.2.gate_proj.weight": Factors(3, 0),
    }
    data = json.loads(json.dumps(folded(table)))
    assert data == {"model.layers.0.mlp.experts.*.gate_proj.weight": ["rank12+8", None, "rank3+0"]}
    assert table_of(data) == table
    assert Factors(12, 8).numbers(10, 20) == 12 * 30 + 8 * 21


@pytest.mark.parametrize("text", ["rank0+2", "rank3", "int4-g32", "rank3+-1", ""])
def test_other_texts_are_no_size(text: str) -> None:
    with pytest.raises(PlanError):
        Factors.parse(text)
    with pytest.raises(ArchitectureError, match="factors"):
        table_of({"a.weight": text})


@pytest.mark.parametrize("places", [[1, 1], [2, 1], [-1, 2], [0, 4]])
def test_rows_go_to_rows_that_there_are(places: list[int]) -> None:
    tensors = {LEFT: torch.zeros(4, 1), RIGHT: torch.zeros(1, 3), INDEX: torch.tensor(places)}
    with pytest.raises(CheckpointError, match="ascending"):
        require_sound(tensors, "here")


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 0.0},
        {"share": 0.6, "rows": 0.4},
        {"rows": -0.1},
        {"steps": -1},
        {"batch": 0},
        {"rate": 0.0},
        {"experts": "some"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        McSmoeParams(**settings)


# -- the command --------------------------------------------------------------------------------------------


def merged(cli: Cli, source: Path, out: Path, *words: object) -> None:
    text = write_text(out.with_name("text.jsonl"))
    answer = cli(
        "merge", source, out, "--method", "mc-smoe", "--keep", 6, "--data", text, "--set", "rows=0.2",
        "--set", "share=0.4", *words,
    )  # fmt: skip
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_stored_loaded_run_and_saved_as_factors(
    tiny: Tiny, cli: Cli, tmp_path: Path, name: str
) -> None:
    """The model in memory puts out what the checkpoint with multiplied-out matrices does."""
    from moezip.arch.decoded import decoded
    from moezip.arch.skeleton import Skeleton
    from moezip.runtime.factored import FactoredMatrix
    from moezip.runtime.load import load

    source, out = tiny(name, dtype="float32"), tmp_path / "out"
    merged(cli, source, out)
    assert cli("verify", out).code == 0
    with Checkpoint.open(out) as checkpoint, Checkpoint.open(source) as before:
        table = factoring_of(checkpoint.config)
        assert len(table) == 3 * 6 * len(checkpoint.config["quantization_config"]["experts"])
        assert not set(table) & set(checkpoint.names())
        assert tensor_bytes(checkpoint) < tensor_bytes(before)
        skeleton = Skeleton(decoded(checkpoint))
        skeleton.load(skeleton.outer_targets())
        for layer in range(len(skeleton.layers)):
            skeleton.load(skeleton.layer_targets(layer))
        skeleton.tie()
        ids = torch.arange(5, 40)[None]
        model = load(out)
        assert sum(isinstance(module, FactoredMatrix) for module in model.modules()) == len(table)
        with torch.no_grad():
            mine = model(ids).logits
            wanted = skeleton.model(ids).logits
        # float32, but other orders of summation, through a few layers
        assert torch.allclose(mine, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        model.save_pretrained(tmp_path / "saved")
        with Checkpoint.open(tmp_path / "saved") as saved:
            assert set(saved.names()) == set(checkpoint.names())
            assert all(saved.read(piece).equal(checkpoint.read(piece)) for piece in checkpoint.names())


def test_what_is_written_can_be_applied_repeated_and_foretold(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    source, out = tiny("qwen3_moe"), tmp_path / "out"
    merged(cli, source, out, "--set", "router=remap")
    merged(cli, source, tmp_path / "again", "--set", "router=remap")
    assert model_files(out) == model_files(tmp_path / "again")
    answer = cli("apply", source, out / "moezip" / "plan.json", tmp_path / "applied")
    assert answer.code == 0, answer.err
    assert model_files(tmp_path / "applied") == model_files(out)
    plan = Plan.load(out / "moezip" / "plan.json")
    assert plan.factors and Plan.from_json(plan.to_json()) == plan
    told = cli(
        "merge", source, tmp_path / "dry", "--method", "mc-smoe", "--keep", 6, "--data", tmp_path / "text.jsonl",
        "--set", "rows=0.2", "--set", "share=0.4", "--set", "router=remap", "--dry-run", "--json",
    )  # fmt: skip
    with Checkpoint.open(out) as checkpoint:
        assert told.json["bytes_after"] == tensor_bytes(checkpoint)


def test_merged_experts_alone_are_factored_on_demand(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    merged(cli, tiny("qwen3_moe"), tmp_path / "out", "--set", "experts=merged")
    plan = Plan.load(tmp_path / "out" / "moezip" / "plan.json")
    mixed = sum(pick.mixed for layer in plan.layers for pick in layer.picks)
    assert 0 < mixed < 18 and len(plan.factors) == 3 * mixed


def test_training_makes_the_error_smaller_and_moves_nothing_but_factors(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    source = tiny("gpt_oss")
    merged(cli, source, tmp_path / "plain")
    merged(cli, source, tmp_path / "trained", "--set", "steps=30")
    notes = json.loads((tmp_path / "trained" / "moezip" / "report.json").read_text())["notes"]
    errors = [note.split("size: ")[-1] for note in notes if "held back" in note]
    assert len(errors) == 3
    for text in errors:
        before, after = (float(part.split("%")[0].split()[-1]) for part in text.split(" before training, "))
        assert after <= before
    with Checkpoint.open(tmp_path / "plain") as plain, Checkpoint.open(tmp_path / "trained") as trained:
        moved = {name for name in plain.names() if not plain.read(name).equal(trained.read(name))}
    assert moved and all(name.endswith((LEFT, RIGHT, ROWS)) for name in moved)


def test_the_predicted_rise_is_that_of_averages_and_factors(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    source, text = tiny("qwen3_moe"), write_text(tmp_path / "text.jsonl")
    words = ("--keep", 6, "--data", text, "--set", "price=true", "--set", "router=dominant", "--json")
    averages = cli("merge", source, tmp_path / "m", "--method", "m-smoe", *words)
    factors = [
        cli("merge", source, tmp_path / f"f{share}", "--method", "mc-smoe", "--set", f"share={share}", *words)
        for share in (0.3, 0.6)
    ]
    thin, thick = (answer.json["predicted_nats"] for answer in factors)
    assert thin > thick > averages.json["predicted_nats"] > 0


def test_readers_without_moezip_are_refused_before_any_text_is_read(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    answer = cli(
        "merge", tiny("qwen3_moe"), tmp_path / "out", "--method", "mc-smoe", "--keep", 6, "--data", tmp_path / "none",
        "--for", "vllm",
    )  # fmt: skip
    assert answer.code == 2 and "factors" in answer.err


def test_a_missing_factor_is_found(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    merged(cli, tiny("qwen3_moe"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    table = config["quantization_config"]["factors"]
    key = next(iter(table))
    table[key][0] = "rank2+1"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    answer = cli("verify", tmp_path / "out")
    assert answer.code == 1 and "rank2+1" in answer.out + answer.err


def test_rows_without_a_place_are_found(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    merged(cli, tiny("qwen3_moe"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in index if name.endswith(INDEX))
    file = tmp_path / "out" / index[name]
    tensors = load_file(file)
    tensors[name][-1] = 999
    save_file(tensors, file, {"format": "pt"})
    answer = cli("verify", tmp_path / "out")
    assert answer.code == 1 and "ascending" in answer.out + answer.err


def test_load_is_the_first_thing_that_a_process_does(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    merged(cli, tiny("qwen3_moe"), tmp_path / "out")
    before = files_of(tmp_path / "out")
    found = process("--version", before=f"import moezip; moezip.load({str(tmp_path / 'out')!r})")
    assert found.code == 0, found.err
    assert files_of(tmp_path / "out") == before

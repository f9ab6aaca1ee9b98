"""NAEE: losses of sets of experts, by hand and against a whole model with masked logits; the choice; refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moezip import demo
from moezip.arch.families import ARCHITECTURES
from moezip.arch.spec import LayerFacts
from moezip.calibrate.block import Block
from moezip.calibrate.data import Rows
from moezip.calibrate.record import BY_NAME, RECORDS, Observation, Record
from moezip.calibrate.run import calibrate
from moezip.calibrate.statistics import Statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import PlanError, UsageError
from moezip.evaluate.loss import evaluate
from moezip.pipeline.calibrate import calibrate_command
from moezip.pipeline.common import Common
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune
from moezip.plan.apply import Applied
from moezip.plan.plan import LayerPlan, Pick, Plan
from moezip.prune import naee
from moezip.prune.naee import NaeeParams, check, choose, kept_sets, name_of, records, score, set_count, set_losses
from tests.command import Cli, write_text
from tests.tiny import FAMILIES, token_ids

Tiny = Callable[..., Path]

# Differences of float32 outputs, which the twin forms after summing over experts (and adding the shared ones): their
# rounding is 1e-7 of outputs that are up to some ten times the difference, in every element of a norm.
TWIN = 2e-5
# Sums of float32 gates in another order.
FLOAT32 = 1e-6
# The same float32 products with another number of rows, or another order of float64 sums.
ROUNDING = 1e-5


def facts_of(experts: int, top_k: int = 1, groups: int = 1) -> LayerFacts:
    return LayerFacts(layer=0, experts=experts, top_k=top_k, hidden=2, width=2, groups=groups, top_groups=groups)


# -- by hand ------------------------------------------------------------------------------------------------


class Router(torch.nn.Module):
    """Softmax over all, gates of the chosen divided by their sum."""

    def __init__(self, rows: list[list[float]], top_k: int):
        super().__init__()
        self.weight, self.top_k = torch.nn.Parameter(torch.tensor(rows)), top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(x, self.weight)
        gates, ids = logits.softmax(-1).topk(self.top_k)
        return logits, gates / gates.sum(-1, keepdim=True), ids


class Scalings:
    """Experts that multiply their input by a number."""

    has_gate = has_bias = is_transposed = False

    def __init__(self, factors: Sequence[float], size: int):
        self.up_proj = torch.stack([factor * torch.eye(size) for factor in factors])
        self.down_proj = torch.eye(size).expand(len(factors), size, size)

    @staticmethod
    def act_fn(x: torch.Tensor) -> torch.Tensor:
        return x


def seen_by(router: Router, experts: Scalings, inputs: list[list[float]], windows: list[int]) -> Observation:
    x, count = torch.tensor(inputs), experts.up_proj.shape[0]
    with torch.no_grad():
        logits, gates, ids = router(x)
    facts = facts_of(count, router.top_k)
    block = Block(ARCHITECTURES["mixtral"], facts, experts, router, x, torch.tensor(windows))
    nothing = torch.zeros(len(inputs))
    return Observation(count, ids, gates, nothing, nothing, torch.zeros(count), logits, block)


#                logits by the rows (3, 0), (2, 1), (1, 2)     next best     output with expert 0, 1, 2: 1, 3, 4 times x
#   a = (1, 0)   3, 2, 1                                        0, 1, 2
#   b = (0, 1)   0, 1, 2                                        2, 1, 0
#
# Window 0 holds a and b, window 1 holds 2a and a. A token uses one expert, with gate 1.
BY_HAND = seen_by(
    Router([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0]], top_k=1),
    Scalings([1, 3, 4], 2),
    [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0]],
    [0, 0, 1, 1],
)


def test_losses_by_hand() -> None:
    # {0, 1}: b goes from 2 to 1, its output from 4 to 3. {0, 2}: nobody used 1.
    # {1, 2}: a goes from 0 to 1, from 1 to 3; window 0: 2; window 1: 4 and 2, root of 16 + 4
    assert list(kept_sets(facts_of(3), 2)) == [(0, 1), (0, 2), (1, 2)]
    assert set_losses(BY_HAND, NaeeParams(keep=2)).tolist() == pytest.approx([1, 0, 2 + 20**0.5], rel=1e-12)
    # {0}: b from 4 to 1. {1}: window 0: a by 2, b by 1; window 1: 4 and 2. {2}: a by 3 in window 0; 6 and 3 in window 1
    assert set_losses(BY_HAND, NaeeParams(keep=1)).tolist() == pytest.approx(
        [3, 5**0.5 + 20**0.5, 3 + 45**0.5], rel=1e-12
    )
    assert set_losses(BY_HAND, NaeeParams(keep=3)).tolist() == [0]
    # squares need no windows: 1; 0; 4 + 16 + 4
    assert set_losses(BY_HAND, NaeeParams(keep=2, squared=True)).tolist() == pytest.approx([1, 0, 24], rel=1e-12)


def test_gates_are_the_routers_own_of_those_that_are_left() -> None:
    # logits ln 4, ln 2, ln 1; outputs 0, 6, 12. All: gates 2/3, 1/3 of experts 0 and 1, output 2.
    # {0, 1}: the same. {0, 2}: 4/5 and 1/5: 12/5, 0.4 more. {1, 2}: 2/3 and 1/3: 8, 6 more.
    router = Router([[float(np.log(4))], [float(np.log(2))], [0.0]], top_k=2)
    seen = seen_by(router, Scalings([0, 6, 12], 1), [[1.0]], [0])
    assert set_losses(seen, NaeeParams(keep=2)).tolist() == pytest.approx([0, 0.4, 6], rel=FLOAT32, abs=FLOAT32)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = set_losses(BY_HAND, NaeeParams(keep=1))
    monkeypatch.setattr(naee, "MAX_TOKENS", 1)
    monkeypatch.setattr(naee, "SETS", 2)
    assert set_losses(BY_HAND, NaeeParams(keep=1)).tolist() == pytest.approx(whole.tolist(), rel=1e-12)


def test_sets_of_groups_keep_equally_many_of_each() -> None:
    assert list(kept_sets(facts_of(6, groups=2), 4)) == [
        (*a, *b) for a, b in product([(0, 1), (0, 2), (1, 2)], [(3, 4), (3, 5), (4, 5)])
    ]
    for experts, keep, groups in ((8, 6, 1), (8, 6, 2), (12, 8, 4), (5, 5, 1)):
        facts = facts_of(experts, groups=groups)
        assert set_count(facts, keep) == len(list(kept_sets(facts, keep)))
    assert set_count(facts_of(8), 6) == 28  # as in the paper
    assert set_count(facts_of(128), 64) > 10**37


# -- against whole models -----------------------------------------------------------------------------------


@contextmanager
def masked(router: Any, dropped: Sequence[int]) -> Iterator[None]:
    """Inside, the router's logits (and selection biases) of these experts are minus infinity."""
    plain = torch.nn.functional.linear
    biases = [
        tensor for name, tensor in (*router.named_parameters(), *router.named_buffers()) if "correction" in name
    ]  # fmt: skip
    saved = [tensor.detach().clone() for tensor in biases]

    def without(*args: Any) -> torch.Tensor:
        logits = plain(*args)
        logits[..., list(dropped)] = -torch.inf
        return logits

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for tensor in biases:
            tensor[..., list(dropped)] = -torch.inf
        own = type(router).forward

        def forward(self: Any, *args: Any) -> Any:
            patch.setattr(torch.nn.functional, "linear", without)
            try:
                return own(self, *args)
            finally:
                patch.setattr(torch.nn.functional, "linear", plain)

        patch.setattr(type(router), "forward", forward)
        yield
        for tensor, values in zip(biases, saved, strict=True):
            tensor.copy_(values)


def brute_force(folder: Path, rows: Rows, keep: int) -> dict[int, list[float]]:
    """L of every set by layer: the block of a whole model called with every mask, on what the whole model gives it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    source = Checkpoint.open(folder)
    entry = ARCHITECTURES[source.config["model_type"]]
    found = {}
    for facts in entry.layer_facts(source.config):
        block = model.get_submodule(f"{entry.layers}.{facts.layer}.{entry.block}")
        given: list[torch.Tensor] = []
        hook = block.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        with torch.no_grad():
            model(rows.ids, use_cache=False)
        hook.remove()

        def output(block: Any = block, x: torch.Tensor = given[0]) -> torch.Tensor:
            with torch.no_grad():
                answer = block(x)
            return (answer[0] if isinstance(answer, tuple) else answer).double()

        before, losses = output(), []
        for kept in kept_sets(facts, keep):
            with masked(block.get_submodule(entry.router_module), sorted(set(range(facts.experts)) - set(kept))):
                losses.append(float((output() - before).flatten(1).norm(dim=1).sum()))
        found[facts.layer] = losses
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_a_whole_model_with_masked_logits(name: str, tiny: Tiny) -> None:
    rows, keep, folder = Rows(token_ids(3, 10), None, ("text",) * 3), 6, tiny(name)
    params = NaeeParams(keep=keep)
    (domain,) = calibrate(Checkpoint.open(folder), rows, records(params), micro_rows=2).domains
    wanted = brute_force(folder, rows, keep)
    assert list(domain.layers) == sorted(wanted)
    for layer, losses in wanted.items():
        assert len(losses) == (16 if name in ("deepseek_v2", "deepseek_v3") else 28)  # 4 * 4 in two groups
        assert max(losses) > 0.1
        assert domain.layers[layer][name_of(params)].tolist() == pytest.approx(losses, rel=TWIN, abs=TWIN * max(losses))


@pytest.mark.parametrize(
    ("name", "bias"), [*((name, 0.0) for name in FAMILIES), ("deepseek_v3", 3.0), ("minimax_m2", 3.0)]
)
def test_gates_are_those_of_the_pruned_checkpoint(name: str, bias: float, tiny: Tiny, tmp_path: Path) -> None:
    """Also with selection biases so large that experts would be chosen with a logit of minus infinity."""
    folder = tiny(name, shards=1)
    if bias:
        shutil.copytree(folder, tmp_path / "biased")
        folder = tmp_path / "biased"
        (folder / "model.safetensors").chmod(0o644)
        tensors = load_file(folder / "model.safetensors")
        for key in [key for key in tensors if key.endswith("e_score_correction_bias")]:
            tensors[key] += bias * (torch.arange(8) % 4 == 1)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source, kept = Checkpoint.open(folder), (0, 2, 3, 4, 6, 7)
    facts = ARCHITECTURES[name].layer_facts(source.config)

    def gates(seen: Observation) -> torch.Tensor:
        assert seen.block is not None
        return seen.block.gates(kept, slice(None)).sum(0)

    rows = Rows(token_ids(3, 10), None, ("text",) * 3)
    record = Record("gates", "", "sum", lambda facts: (facts.experts,), gates, asks=True)
    (foreseen,) = calibrate(source, rows, [record]).domains
    layers = tuple(LayerPlan(fact.layer, 8, tuple(map(Pick.keep, kept))) for fact in facts)
    pruned = Applied(source, Plan(source.fingerprint, name, layers))
    (real,) = calibrate(pruned, rows, [BY_NAME["gate_sum"]]).domains
    first = facts[0].layer  # later layers get other inputs in the pruned model
    wanted = np.zeros(8)
    wanted[list(kept)] = real.layers[first]["gate_sum"]
    assert foreseen.layers[first]["gates"].tolist() == pytest.approx(wanted.tolist(), rel=FLOAT32, abs=FLOAT32)
    assert wanted.max() > 0


def test_the_plain_sums_stay_as_they_are(tiny: Tiny) -> None:
    rows, source = Rows(token_ids(3, 10), None, ("text",) * 3), Checkpoint.open(tiny("qwen3_moe", dtype="bfloat16"))
    (plain,) = calibrate(source, rows, RECORDS).domains
    (both,) = calibrate(source, rows, [*RECORDS, *records(NaeeParams(keep=6))]).domains
    for layer, named in plain.layers.items():
        for name, sums in named.items():
            assert both.layers[layer][name].tolist() == sums.tolist(), (layer, name)


def test_neither_micro_batches_nor_padding_matter(tiny: Tiny) -> None:
    source, ids, params = Checkpoint.open(tiny("qwen3_moe")), token_ids(4, 10), NaeeParams(keep=6)

    def losses(rows: Rows, micro_rows: int) -> dict[int, np.ndarray]:
        (domain,) = calibrate(source, rows, records(params), micro_rows=micro_rows).domains
        return {layer: named[name_of(params)] for layer, named in domain.layers.items()}

    one = losses(Rows(ids, None, ("text",) * 4), 1)
    for layer, found in losses(Rows(ids, None, ("text",) * 4), 4).items():
        assert found.tolist() == pytest.approx(one[layer].tolist(), rel=ROUNDING)
    mask = torch.ones(4, 14, dtype=torch.bool)
    mask[:, 10:] = False
    wide = torch.nn.functional.pad(ids, (0, 4))
    for layer, found in losses(Rows(wide, mask, ("text",) * 4), 3).items():
        assert found.tolist() == pytest.approx(one[layer].tolist(), rel=ROUNDING)


# -- what is chosen -----------------------------------------------------------------------------------------


def test_the_set_of_least_loss_stays() -> None:
    facts, params = facts_of(4), NaeeParams(keep=2)
    #           {0,1} {0,2} {0,3} {1,2} {1,3} {2,3}
    losses = np.array([5.0, 3, 1, 4, 1, 2])
    stats = {name_of(params): losses}
    assert choose(facts, stats, 2, (), params) == [0, 3]  # of the two with 1, the first
    assert choose(facts, stats, 2, [2], params) == [2, 3]
    assert choose(facts, stats, 2, [1, 2], params) == [1, 2]
    # the least loss without expert 0: of {1,2}, {1,3}, {2,3}; without 1: of {0,2}, {0,3}, {2,3}; ...
    assert score(facts, stats, params).tolist() == [1, 1, 1, 3]
    assert score(facts, {name_of(NaeeParams(keep=4)): np.zeros(1)}, NaeeParams(keep=4)).tolist() == [0] * 4
    for damaged in (losses[:5], np.where(losses == 3, np.nan, losses)):
        with pytest.raises(PlanError, match="not 6 finite numbers"):
            choose(facts, {name_of(params): damaged}, 2, (), params)


SAVED = ("naee:keep=14", "naee:keep=14,squared=true")
PYTHON = demo.data("calib") / "python.jsonl"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the demo model for 14 of 16 experts."""
    out = tmp_path_factory.mktemp("naee") / "stats"
    calibrate_command("demo", [PYTHON], out, Common(seq_len=128), 1024, SAVED)
    return out


@pytest.mark.parametrize("squared", ["false", "true"])
def test_the_chosen_experts_beat_random_ones(squared: str, saved: Path) -> None:
    source, job = Checkpoint.open(demo.checkpoint()), PruneJob("naee", keep=14, settings={"squared": squared})
    plan = make_plan(prepare_prune("demo", job, Common()), job, Statistics.load(saved), Common())
    assert {len(layer.picks) for layer in plan.layers} == {14}

    def loss(plan: Plan) -> float:
        text = [demo.data("heldout") / "python.jsonl"]
        found = evaluate(Applied(source, plan), data=text, tokens=2048, seq_len=128).loss
        assert found is not None
        return found.nll

    lots = PruneJob("random", keep=14)
    drawn = [make_plan(prepare_prune("demo", lots, common), lots, None, common) for common in map(seeded, range(3))]
    assert loss(plan) < min(map(loss, drawn))


def seeded(seed: int) -> Common:
    return Common(seed=seed)


# -- through the program ------------------------------------------------------------------------------------


def test_too_many_sets_are_refused_before_any_text_is_read(cli: Cli, tmp_path: Path) -> None:
    words = ("prune", "demo", tmp_path / "out", "--method", "naee", "--data", tmp_path / "missing.txt")
    for more in ((), ("--dry-run",), ("--plan-only",)):
        refused = cli(*words, "--keep", 8, *more)
        assert refused.code == 1
        assert "12,870 sets of 8 of 16 experts would have to be tried, more than the limit of 2,500" in refused.err
        assert "--set limit=N" in refused.err
    assert "1,820 sets" in cli(*words, "--ratio", 0.25, "--set", "limit=1819").err
    assert "missing.txt" in cli(*words, "--ratio", 0.25, "--set", "limit=1820").err
    assert "missing.txt" in cli(*words, "--keep", 8, "--set", "limit=12870").err
    recorded = ("calibrate", "demo", "--data", PYTHON, "--out", tmp_path / "s", "--record")
    assert "12,870 sets" in cli(*recorded, "naee:keep=8").err
    missing = cli(*recorded, "naee")
    assert missing.code == 2
    assert "naee:keep=N" in missing.err
    assert "layer 0" in cli(*recorded, "naee:keep=1").err  # fewer than a token uses
    with pytest.raises(PlanError, match=r"2\.4e\+37 sets"):
        check(facts_of(128), NaeeParams(keep=64))
    assert not list(tmp_path.iterdir())


def test_the_number_kept_is_no_setting() -> None:
    job = PruneJob("naee", keep=14, settings={"keep": "12"})
    with pytest.raises(UsageError, match="no setting here"):
        prepare_prune("demo", job, Common())


def test_saved_statistics_and_a_recipe_give_the_same_plan(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    folder, text = tiny("deepseek_v3"), write_text(tmp_path / "text.jsonl")
    words = ("--data", text, "--tokens", 256, "--seq-len", 64)
    recorded = cli("calibrate", folder, *words, "--out", tmp_path / "stats", "--record", "naee:keep=6", "--record",
                   "output_max")  # fmt: skip
    assert recorded.code == 0, recorded.err
    plan = ("prune", folder, tmp_path / "plan.json", "--plan-only", "--overwrite", "--json", "--method", "naee")
    fresh = cli(*plan, "--ratio", 0.25, *words)
    assert fresh.code == 0, fresh.err
    for kept in fresh.json["layers"].values():
        assert [sum(expert // 4 == group for expert in kept) for group in (0, 1)] == [3, 3]
    assert cli(*plan, "--keep", 6, "--stats", tmp_path / "stats").json["layers"] == fresh.json["layers"]
    other = cli(*plan, "--keep", 4, "--stats", tmp_path / "stats")
    assert other.code == 1
    assert "--record naee:keep=4" in " ".join(other.err.split())

    recipe = {
        "version": 1,
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "seq_len": 64,
        "calibration": {"one": {"data": "text.jsonl", "tokens": 256}},
        "jobs": {
            f"to{keep}": {"steps": [{"prune": {"method": "naee", "keep": keep}}]} for keep in (4, 6)
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = cli("run", tmp_path / "recipe.yaml", "--json")
    assert answer.code == 0, answer.err
    found = Plan.load(tmp_path / "out" / "to6" / "moezip" / "plan.json")
    assert {str(layer.layer): list(layer.kept) for layer in found.layers} == fresh.json["layers"]
    assert cli("verify", tmp_path / "out" / "to4").code == 0

"""MoNE checkpoints, the form in which vLLM reads layers that keep different numbers of experts; and ``--for``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moezip
from moezip.arch.experts import check_shapes
from moezip.arch.families import ARCHITECTURES, identify
from moezip.arch.mone import KEY, Substitution, constant
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError, MoezipError, PlanError, UsageError
from moezip.export.mone import Substituted
from moezip.export.readers import READERS, check_reader, planned
from moezip.export.verify import verify
from moezip.plan.apply import Applied
from moezip.plan.plan import LayerPlan, Pick, Plan
from tests.command import model_files
from tests.test_laws import (
    REORDERED,
    full_logits,
    largest_difference,
    load,
    plain_rows,
    some_experts,
    streamed_logits,
    written,
)

Tiny = Callable[..., Path]
SEPARATE = [name for name, entry in ARCHITECTURES.items() if not any(tensor.fused for tensor in entry.experts)]
# Beside the plainest: sigmoid with groups and a correction bias; other names of experts; one layer of experts alone.
SOME = ("qwen3_moe", "deepseek_v3", "minimax_m2", "jamba")


def uneven(source: Source) -> Plan:
    """Every layer keeps others; the first as many less as its router allows, of every group alike."""
    entry = identify(source.config)
    layers = []
    for fact in entry.layer_facts(source.config):
        kept = sorted(some_experts(fact))
        if not layers:
            size = fact.experts // fact.groups
            kept = [group * size + e for group in range(fact.groups) for e in (1, 2)]
        layers.append(LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, kept))))
    return Plan(source.fingerprint, entry.name, tuple(layers))


def even(source: Source) -> Plan:
    entry = identify(source.config)
    layers = tuple(
        LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, some_experts(fact))))
        for fact in entry.layer_facts(source.config)
    )
    return Plan(source.fingerprint, entry.name, layers)


def dropped(plan: Plan) -> dict[int, list[int]]:
    return {layer.layer: sorted(set(range(layer.experts)) - set(layer.kept)) for layer in plan.layers}


def muted(folder: Path, plan: Plan) -> Any:
    """The full stock model, the down matrices of dropped experts zero."""
    model, entry = load(folder), ARCHITECTURES[plan.architecture]
    for layer, experts in dropped(plan).items():
        block = model.get_submodule(f"{entry.layers}.{layer}.{entry.block}")
        block.get_submodule(entry.experts_module).down_proj.data[experts] = 0
    return model


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.fixture
def stored(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny deepseek_v3 in the form."""
    source = Checkpoint.open(tiny("deepseek_v3"))
    return written(Substituted(source, uneven(source)), tmp_path / "stored")


# -- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_everything_but_the_dropped_is_the_source_byte_for_byte(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny(name, dtype="bfloat16"))
    entry, plan = identify(source.config), uneven(source)
    folder = written(Substituted(source, plan), tmp_path / "out")
    out = Checkpoint.open(folder)
    gone = dropped(plan)
    constants = {constant(entry, layer, e) for layer, experts in gone.items() for e in experts}
    kept = set()
    for key in source.names():
        claim = entry.claim(key, source.config)
        if claim.kind != "expert" or claim.expert not in gone[claim.layer or 0]:
            kept.add(key)
            assert source.spec(key).shape == out.spec(key).shape
            assert b"".join(source.chunks(key)) == b"".join(out.chunks(key)), key
    assert set(out.names()) == kept | constants
    for key in constants:
        assert (out.spec(key).dtype, out.spec(key).shape) == ("BF16", (32,))
        assert not out.read(key).any()
    extra = {KEY: {str(layer): experts for layer, experts in gone.items()}}
    assert json.loads((folder / "config.json").read_text()) == source.config | extra
    assert verify(folder, deep=True) == []


def test_names_are_those_that_vllm_looks_for() -> None:
    # <path with one number, the layer's>.<expert>.approx_value, where the path is that of the experts
    assert constant(ARCHITECTURES["qwen3_moe"], 3, 17) == "model.layers.3.mlp.experts.17.approx_value"
    assert constant(ARCHITECTURES["mixtral"], 3, 3) == "model.layers.3.block_sparse_moe.experts.3.approx_value"
    assert constant(ARCHITECTURES["jamba"], 1, 0) == "model.layers.1.feed_forward.experts.0.approx_value"


def test_a_plan_that_drops_nothing_is_the_source(tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    entry = identify(source.config)
    view = Substituted(source, Plan.identity(source.fingerprint, entry.name, entry.layer_facts(source.config)))
    assert view.changes_nothing and view.config == source.config
    assert model_files(written(view, tmp_path / "out")).keys() == model_files(source.folder).keys()
    for file in source.folder.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


# -- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEPARATE)
def test_dropped_experts_add_nothing_and_gates_stay(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, rows = tiny(name), plain_rows()
    source = Checkpoint.open(folder)
    plan = uneven(source)
    view = Substituted(source, plan)
    wanted = full_logits(muted(folder, plan), rows)
    assert largest_difference(wanted, streamed_logits(view, rows), rows) < REORDERED
    # as loaded from disk; and it is neither the source nor the pruned model
    model = moezip.load(written(view, tmp_path / "out"))
    assert largest_difference(wanted, full_logits(model, rows), rows) < REORDERED
    for other in (source, Applied(source, plan)):
        assert largest_difference(wanted, streamed_logits(other, rows), rows) > 100 * REORDERED


def test_a_constant_is_added_times_its_gate(tiny: Tiny, tmp_path: Path) -> None:
    # By hand: two tokens of width 2, experts 0 and 2 of 3 dropped. Token 0 has gates 0.25 for expert 0 and 0.5 for 1,
    # token 1 has 0.75 for 2 and 0.25 for 0; constants (4, 8) and (1, 2); kept experts gave (1, 1) and (0, 0).
    from moezip.arch.novices import Novice, add_constants

    experts = torch.nn.Module()
    experts.num_experts, experts.widths = 3, (0, 5, 0)  # type: ignore[assignment]
    for expert, values in ((0, [4.0, 8.0]), (2, [1.0, 2.0])):
        experts.add_module(str(expert), Novice(2))
        experts.get_submodule(str(expert)).approx_value.data = torch.tensor(values)  # type: ignore[union-attr]
    ids, gates = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.25, 0.5], [0.75, 0.25]])
    given = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    # (1, 1) + 0.25 (4, 8) = (2, 3); 0.75 (1, 2) + 0.25 (4, 8) = (1.75, 3.5)
    assert add_constants(experts, (given, ids, gates), given).tolist() == [[2.0, 3.0], [1.75, 3.5]]


def test_constants_of_others_reach_the_logits(stored: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Constants that are not zero, as other tools write them: a down matrix that ignores its input gives the same."""
    rows, plan = plain_rows(), uneven(Checkpoint.open(tiny("deepseek_v3")))
    entry, model = ARCHITECTURES["deepseek_v3"], muted(tiny("deepseek_v3"), plan)
    generator = torch.Generator().manual_seed(3)
    for file in stored.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors:
            if key.endswith(".approx_value"):
                layer, expert = int(key.split(".")[2]), int(key.split(".")[5])
                tensors[key] = torch.randn(32, generator=generator)
                experts = model.get_submodule(f"{entry.layers}.{layer}.{entry.block}").experts
                _give(experts, expert, tensors[key])
        file.unlink()
        save_file(tensors, file, {"format": "pt"})
    wanted = full_logits(model, rows)
    assert largest_difference(wanted, streamed_logits(Checkpoint.open(stored), rows), rows) < REORDERED
    assert largest_difference(wanted, full_logits(moezip.load(stored), rows), rows) < REORDERED
    plain = Substituted(Checkpoint.open(tiny("deepseek_v3")), plan)
    assert largest_difference(wanted, streamed_logits(plain, rows), rows) > 100 * REORDERED


def _give(experts: Any, expert: int, value: torch.Tensor) -> None:
    """Makes an expert of a stock module output ``value`` whatever its input."""
    original = experts.forward

    def forward(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        gate = torch.where(ids == expert, gates, 0).sum(-1, keepdim=True)
        result: torch.Tensor = original(hidden, ids, gates) + gate * value
        return result

    experts.forward = forward


def test_saved_again_it_is_the_same(stored: Path, tmp_path: Path) -> None:
    model = moezip.load(stored)
    model.save_pretrained(tmp_path / "again")
    before, after = whole(stored), whole(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = moezip.load(tmp_path / "again")
    prompt = torch.tensor([[5, 6, 7, 8]])
    tokens = [one.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for one in (model, again)]
    assert torch.equal(*tokens)


# -- readers that do not know it ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEPARATE)
def test_stock_transformers_refuses_it(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Stacked, the kept experts are too few for the parameter: an error, not random numbers; one dropped is enough."""
    from transformers import AutoModelForCausalLM

    source = Checkpoint.open(tiny(name))
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    first = [LayerPlan(f.layer, f.experts, tuple(map(Pick.keep, range(f.experts)))) for f in facts]
    size = facts[0].experts // facts[0].groups
    kept = [e for e in range(facts[0].experts) if e % size]
    first[0] = LayerPlan(facts[0].layer, facts[0].experts, tuple(map(Pick.keep, kept)))
    for number, plan in enumerate((uneven(source), Plan(source.fingerprint, entry.name, tuple(first)))):
        folder = written(Substituted(source, plan), tmp_path / str(number))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("reader", READERS)
def test_an_even_plan_is_a_stock_checkpoint_for_everybody(reader: str, tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    view = planned(source, even(source), reader)
    assert isinstance(view, Applied) and KEY not in view.config
    assert view.config == Applied(source, even(source)).config


@pytest.mark.parametrize("reader", ["transformers", "sglang", "llamacpp"])
def test_others_are_refused_and_told_of_the_scope(reader: str, tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    with pytest.raises(PlanError, match="does not read different numbers of experts") as refused:
        planned(source, uneven(source), reader)
    assert "--scope layer" in str(refused.value)
    with pytest.raises(UsageError, match="does not read different numbers of experts") as early:
        check_reader(reader, counts_differ=True)
    assert "--scope layer" in str(early.value)
    check_reader(reader)


def test_own_readers_get_their_forms(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    plan = uneven(source)
    assert isinstance(planned(source, plan, "vllm"), Substituted)
    for reader in ("moezip", None):
        assert planned(source, plan, reader).config["quantization_config"]["quant_method"] == "moezip"
    with pytest.raises(UsageError, match="unknown reader 'vlm'") as unknown:
        planned(source, plan, "vlm")
    assert "did you mean 'vllm'" in str(unknown.value)


def test_what_vllm_does_not_read_is_refused(tiny: Tiny) -> None:
    fused = Checkpoint.open(tiny("granitemoe"))
    with pytest.raises(ArchitectureError, match="stores all experts of a layer in one tensor") as refused:
        planned(fused, uneven(fused), "vllm")
    assert "--scope layer" in str(refused.value)
    codes = Checkpoint.open(tiny("deepseek_v3", stored="fp8"))
    with pytest.raises(PlanError, match="of a quantized checkpoint, which vLLM does not read"):
        planned(codes, uneven(codes), "vllm")
    source = Checkpoint.open(tiny("qwen3_moe"))
    plan = uneven(source)
    slim = LayerPlan(0, 8, (Pick.slim(0, range(4), 16), Pick.keep(1), Pick.keep(2)))
    narrow = Plan(plan.source, plan.architecture, (slim, *plan.layers[1:]))
    with pytest.raises(PlanError, match="experts of one width") as neurons:
        planned(source, narrow, "vllm")
    assert "uniform=true" in str(neurons.value)
    extra = Checkpoint.open(tiny("deepseek_v3", mtp=True))
    keeping = uneven(extra)
    with pytest.raises(PlanError, match="multi-token-prediction"):
        planned(extra, Plan(keeping.source, keeping.architecture, keeping.layers, "keep"), "vllm")
    without = planned(extra, keeping, "vllm")
    assert without.config["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("model.layers.3.") for name in without.names())


# -- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update({KEY: [[1]]}), "no table of layers"),
        (lambda c: c[KEY].update({"two": [1]}), "'two', which is no decoder layer"),
        (lambda c: c[KEY].update({"2": 1}), "no list of experts"),
        (lambda c: c[KEY].update({"2": [-1]}), "no list of experts"),
        (lambda c: c[KEY].update({"2": [1, 1]}), "names an expert twice"),
        (lambda c: c[KEY].update({"2": [8]}), "names expert 8, there are 8"),
        (lambda c: c[KEY].update({"2": list(range(8))}), "leaves no expert"),
        (lambda c: c[KEY].update({"0": [1]}), "lists layer 0, which has no experts"),
        (lambda c: c[KEY]["2"].pop(), "approx_value is there, but not listed"),
        (lambda c: c.pop(KEY), "approx_value looks like an expert's"),
    ],
)
def test_damaged_lists_are_refused(edit: Callable[[dict[str, Any]], Any], message: str, stored: Path) -> None:
    config = json.loads((stored / "config.json").read_text())
    edit(config)
    (stored / "config.json").unlink()
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoezipError, match=message):
        source = Checkpoint.open(stored)
        check_shapes(source, identify(source.config))
    assert verify(stored, deep=False)
    with pytest.raises(MoezipError):
        moezip.load(stored)


@pytest.mark.parametrize("what", ["constant", "kept"])
def test_holes_are_found(what: str, stored: Path) -> None:
    config = json.loads((stored / "config.json").read_text())
    ending = ".approx_value" if what == "constant" else ".experts.1.up_proj.weight"
    name = next(name for name in Checkpoint.open(stored).names() if name.endswith(ending))
    for file in stored.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            file.unlink()
            save_file(tensors, file, {"format": "pt"})
    index = stored / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][name], table["metadata"]
    index.write_text(json.dumps(table))
    findings = [finding.what for finding in verify(stored, deep=False)]
    assert any(".".join(name.split(".")[-2:]).removesuffix(".weight") in what for what in findings), findings
    source = Checkpoint.open(stored)
    with pytest.raises(ArchitectureError, match="missing"):
        check_shapes(source, identify(config))


def test_quantized_experts_beside_constants_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="which vLLM refuses"):
        Substitution.of({KEY: {"1": [2]}, "quantization_config": {"quant_method": "fp8"}})


def test_empty_rows_mean_nothing() -> None:
    assert Substitution.of({KEY: {"0": [], "3": [2, 1]}}) == Substitution({3: (1, 2)})
    assert Substitution.of({KEY: {"0": []}}) is None
    assert Substitution.of({KEY: None}) is None and Substitution.of({}) is None


# -- commands -----------------------------------------------------------------------------------------------


def test_from_the_command_line(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("deepseek_v3")
    source = Checkpoint.open(folder)
    saved = tmp_path / "plan.json"
    saved.write_text(uneven(source).to_json())
    made = cli("apply", folder, saved, tmp_path / "out", "--for", "vllm", "--json")
    assert made.code == 0
    assert (made.json["form"], made.json["stock"], made.json["experts_after"]) == ("mone", False, [4, 6])
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (card, " ".join(made.json["notes"])):
        assert "0.33" in text and "0.32" in text and "not" in text and "run in it" in text
    seen = cli("inspect", tmp_path / "out", "--json").json
    assert (seen["experts"], seen["routed"]) == ([4, 6], 8)
    assert cli("verify", tmp_path / "out").code == 0
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    measured = cli("evaluate", tmp_path / "out", "--data", text, "--seq-len", 32, "--json").json["nll"]
    from moezip.evaluate.loss import evaluate

    viewed = evaluate(Substituted(source, uneven(source)), data=[text], seq_len=32)
    assert measured == viewed.to_json()["nll"]
    again = cli("prune", tmp_path / "out", tmp_path / "twice", "--method", "random", "--keep", 4)
    assert again.code == 1 and "differ" in again.err
    refused = cli("apply", folder, saved, tmp_path / "no", "--for", "sglang")
    assert refused.code == 1 and "--scope layer" in refused.err and not (tmp_path / "no").exists()


def test_prune_asks_first(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder, out = tiny("qwen3_moe"), tmp_path / "out"
    answer = cli("prune", folder, out, "--method", "nats", "--ratio", 0.5, "--scope", "model", "--for", "sglang",
                 "--data", tmp_path / "no such text.txt")  # fmt: skip
    assert answer.code == 2 and "--scope layer" in answer.err
    answer = cli("prune", folder, out, "--method", "heapr", "--ratio", 0.5, "--for", "vllm")
    assert answer.code == 2 and "uniform=true" in answer.err
    answer = cli("prune", folder, out, "--method", "random", "--keep", 4, "--for", "excel")
    assert answer.code == 2 and "llamacpp" in answer.err
    plain = cli("prune", folder, out, "--method", "random", "--keep", 4, "--json")
    marked = cli("prune", folder, tmp_path / "vllm", "--method", "random", "--keep", 4, "--for", "vllm", "--json")
    assert plain.json["form"] == marked.json["form"] == "stock"
    assert model_files(out) == model_files(tmp_path / "vllm")

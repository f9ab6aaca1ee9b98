"""The laws of the project, for every family: streaming is exact, pruning is slicing, order does not matter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moezip.arch.experts import decoded
from moezip.arch.families import identify
from moezip.arch.spec import Architecture, LayerFacts
from moezip.calibrate.data import Rows
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.checkpoint.writer import Staging
from moezip.plan.apply import Applied
from moezip.plan.plan import LayerPlan, Pick, Plan
from tests.tiny import FAMILIES, token_ids

Tiny = Callable[..., Path]
# Experts summed, or softmax denominators added up, in another order: a few units in the last place of float32 values
# of size 1, carried through three layers.
REORDERED = 2e-5

families = pytest.mark.parametrize("name", FAMILIES)


def padded_rows() -> Rows:
    """Five rows of twelve tokens: full, left-padded, right-padded."""
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, :5] = mask[3, :2] = False
    mask[4, 9:] = False
    return Rows(token_ids(5, 12), mask, ("text",) * 5)


def plain_rows(rows: int = 3, length: int = 12) -> Rows:
    return Rows(token_ids(rows, length), None, ("text",) * rows)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as stock transformers loads it; nothing missing, left over or of another shape.

    Its weights are moved to memory of their own: the loader leaves them in the mapped file, at addresses that are no
    multiple of 64, where matrix products round the last bit differently from products of aligned copies.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval()


def full_logits(model: Any, rows: Rows, step: int = 1) -> list[torch.Tensor]:
    """Logits [S, V] of each row, ``step`` rows at a time."""
    found: list[torch.Tensor] = []
    for start in range(0, len(rows.ids), step):
        mask = None if rows.mask is None else rows.mask[start : start + step].long()
        with torch.no_grad():
            found += model(rows.ids[start : start + step], attention_mask=mask, use_cache=False).logits
    return found


def streamed_logits(source: Source, rows: Rows, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The same, one decoder layer in memory at a time."""
    stream = Stream(source, experts_implementation="eager", dtype=dtype, micro_rows=1)
    states = stream.embed(rows)
    for _ in stream.run(rows, states):
        pass
    stream.load_head()
    return [stream.logits(rows, states, i, torch.arange(rows.ids.shape[1])) for i in range(len(rows.ids))]


def largest_difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rows: Rows) -> float:
    """Over all real tokens."""
    masks = torch.ones_like(rows.ids, dtype=torch.bool) if rows.mask is None else rows.mask
    return max(float((x.float() - y.float())[mask].abs().max()) for x, y, mask in zip(a, b, masks, strict=True))


def planned(source: Source, kept: Callable[[LayerFacts], Sequence[int]], mtp: str = "drop") -> Applied:
    entry = identify(source.config)
    layers = tuple(
        LayerPlan(fact.layer, fact.experts, tuple(map(Pick.keep, kept(fact))))
        for fact in entry.layer_facts(source.config)
    )
    return Applied(source, Plan(source.fingerprint, entry.name, layers, mtp))


def written(source: Source, output: Path) -> Path:
    with Staging(output, source=source.folder) as staging:
        staging.add("config.json", json.dumps(source.config, indent=2).encode())
        staging.write_tensors(source)
        staging.copy_side_files(source.folder)
    return output


def some_experts(fact: LayerFacts) -> list[int]:
    """Others in every layer: five of eight in any order, or three of each group of four."""
    choice = random.Random(fact.layer)
    if fact.groups == 1:
        return choice.sample(range(fact.experts), 5)
    size = fact.experts // fact.groups
    return [e for g in range(fact.groups) for e in choice.sample(range(g * size, (g + 1) * size), 3)]


def keep_in_memory(model: Any, entry: Architecture, plan: Plan) -> None:
    """Slices a loaded model: the parameters of experts and router, and the selection bias where it sits beside."""
    for layer in plan.layers:
        block = model.get_submodule(f"{entry.layers}.{layer.layer}.{entry.block}")
        kept = torch.tensor(layer.kept)
        for name, tensor in block.state_dict(keep_vars=True).items():
            if name.split(".")[0] not in entry.shared_modules:
                tensor.data = tensor.data.index_select(1 if "moe_statics" in name else 0, kept)
        for module in (block.get_submodule(entry.experts_module), block.get_submodule(entry.router_module)):
            module.num_experts = len(kept)


# -- streaming ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_logits_are_the_models_own(name: str, dtype: str, tiny: Tiny) -> None:
    folder, kind, rows = tiny(name, dtype=dtype), getattr(torch, dtype), padded_rows()
    wanted = full_logits(load(folder, kind), rows)
    got = streamed_logits(Checkpoint.open(folder), rows, kind)
    assert largest_difference(wanted, got, rows) == 0.0
    assert float(torch.stack(wanted).float().std()) > 0.1  # logits that say something


@families
def test_streamed_hidden_states_of_larger_micro_batches(name: str, tiny: Tiny) -> None:
    # Two rows at a time on both sides, five rows in all: the last micro-batch is a single row.
    folder, rows, seen = tiny(name), padded_rows(), []
    model = load(folder)
    last = model.get_submodule(identify(model.config.to_dict()).layers)[-1]
    last.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    full_logits(model, rows, step=2)
    stream = Stream(Checkpoint.open(folder), experts_implementation="eager", dtype=torch.float32, micro_rows=2)
    states = stream.embed(rows)
    assert list(stream.run(rows, states)) == list(range(len(stream.layers)))
    assert rows.mask is not None
    assert torch.equal(torch.cat(seen)[rows.mask], states.read(0, 5)[rows.mask])


@pytest.mark.parametrize(("name", "stored"), [("deepseek_v3", "fp8"), ("minimax_m2", "fp8"), ("gpt_oss", "mxfp4")])
def test_stored_quantization_streams_like_the_plain_checkpoint(
    name: str, stored: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder, rows = tiny(name, dtype="bfloat16", stored=stored), plain_rows()
    source = Checkpoint.open(folder)
    plain = written(decoded(source), tmp_path / "plain")
    wanted = full_logits(load(plain, torch.bfloat16), rows)
    assert largest_difference(wanted, streamed_logits(source, rows, torch.bfloat16), rows) == 0.0


# -- pruning ------------------------------------------------------------------------------------------------


@families
def test_pruned_checkpoint_is_the_sliced_model(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, rows = tiny(name), plain_rows()
    source = Checkpoint.open(folder)
    entry, view = identify(source.config), planned(source, some_experts)
    pruned = written(view, tmp_path / "pruned")
    config = json.loads((pruned / "config.json").read_text())
    count = len(view.plan.layers[0].kept)
    assert {config[key] for key in entry.count_keys} == {count}
    sliced = load(folder)
    keep_in_memory(sliced, entry, view.plan)
    wanted, got = full_logits(sliced, rows), full_logits(load(pruned), rows)
    assert largest_difference(wanted, got, rows) == 0.0
    # Through the plan, without writing anything, it is the same model; and not the one it came from.
    assert largest_difference(wanted, streamed_logits(view, rows), rows) == 0.0
    assert largest_difference(wanted, full_logits(load(folder), rows), rows) > 0.01


@families
def test_order_of_experts_does_not_matter(name: str, tiny: Tiny) -> None:
    source, rows = Checkpoint.open(tiny(name)), plain_rows()

    def shuffled(fact: LayerFacts) -> list[int]:
        size, choice = fact.experts // fact.groups, random.Random(fact.layer)
        return [e for g in range(fact.groups) for e in choice.sample(range(g * size, (g + 1) * size), size)]

    view = planned(source, shuffled)
    assert not view.plan.keeps_all
    assert largest_difference(streamed_logits(source, rows), streamed_logits(view, rows), rows) < REORDERED


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FAMILIES),
        ("qwen3_moe", {"shards": 1}),
        ("qwen3_next", {"mtp": True}),
        ("glm4_moe", {"mtp": True}),
        ("deepseek_v3", {"mtp": True, "stored": "fp8", "dtype": "bfloat16"}),
        ("gpt_oss", {"stored": "mxfp4", "dtype": "bfloat16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_identity_plan_gives_the_same_bytes(name: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name, **options)
    source = Checkpoint.open(folder)
    entry = identify(source.config)
    plan = Plan.identity(source.fingerprint, entry.name, entry.layer_facts(source.config))
    view = Applied(source, plan)
    assert view.config == source.config
    output = written(view, tmp_path / "same")
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        if path.name != "config.json":
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("name", "stored"), [("deepseek_v3", "fp8"), ("minimax_m2", "fp8"), ("gpt_oss", "mxfp4")])
def test_pruning_copies_codes_and_scales(name: str, stored: str, tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny(name, stored=stored))
    view = planned(source, some_experts)
    output = Checkpoint.open(written(view, tmp_path / "pruned"))
    assert output.config["quantization_config"] == source.config["quantization_config"]
    kept = {layer.layer: layer.kept for layer in view.plan.layers}
    seen = 0
    for target in output.names():
        claim = view.architecture.claim(target, output.config)
        got = b"".join(map(bytes, output.chunks(target)))
        if claim.kind == "expert" and claim.layer is not None and claim.expert is not None:
            origin = target.replace(f"experts.{claim.expert}.", f"experts.{kept[claim.layer][claim.expert]}.")
            wanted = b"".join(map(bytes, source.chunks(origin)))
        elif claim.kind == "fused" and claim.layer is not None:
            rows = [source.chunks(target, range(e, e + 1)) for e in kept[claim.layer]]
            wanted = b"".join(bytes(chunk) for row in rows for chunk in row)
        else:
            continue
        assert got == wanted, target
        seen += bool(claim.suffix)
    assert seen >= 6


# -- experts that nothing chooses ---------------------------------------------------------------------------

# norm_topk_prob as published differs inside these families; the law holds only where gates are renormalised.
RENORMALISED = {"qwen2_moe": {"norm_topk_prob": True}, "olmoe": {"norm_topk_prob": True}}
UNGROUPED = {"deepseek_v3": {"n_group": 1, "topk_group": 1}}
LAWFUL = [name for name in FAMILIES if name not in ("deepseek_v2", "jamba", "phimoe")]


def chosen_experts(folder: Path, entry: Architecture, rows: Rows) -> dict[int, set[int]]:
    """Per MoE layer, the experts that some token is sent to, as the experts module is told."""
    model, chosen = load(folder), {}

    def note(layer: int) -> Callable[..., None]:
        return lambda _, args: chosen.update({layer: set(args[1].flatten().tolist())})

    for fact in entry.layer_facts(model.config.to_dict()):
        path = f"{entry.layers}.{fact.layer}.{entry.block}.{entry.experts_module}"
        model.get_submodule(path).register_forward_pre_hook(note(fact.layer))
    full_logits(model, rows)
    return chosen


def without_idle_experts(folder: Path, rows: Rows) -> tuple[Architecture, Checkpoint, Applied]:
    """The checkpoint seen without experts that these rows never choose; the same number in every layer."""
    source = Checkpoint.open(folder)
    entry = identify(source.config)
    chosen = chosen_experts(folder, entry, rows)
    count = max(map(len, chosen.values()))

    def kept(fact: LayerFacts) -> list[int]:
        idle = [e for e in range(fact.experts) if e not in chosen[fact.layer]]
        return sorted([*chosen[fact.layer], *idle[: count - len(chosen[fact.layer])]])

    view = planned(source, kept)
    # Four tokens choose at most 8 of 16.
    assert count <= 8
    return entry, source, view


@pytest.mark.parametrize("name", LAWFUL)
def test_dropping_an_expert_that_is_never_chosen_changes_nothing(name: str, tiny: Tiny) -> None:
    options = RENORMALISED.get(name, {}) | UNGROUPED.get(name, {})
    rows = plain_rows(1, 4)
    entry, source, view = without_idle_experts(tiny(name, experts=16, **options), rows)
    assert entry.gates_independent(source.config)
    assert largest_difference(streamed_logits(source, rows), streamed_logits(view, rows), rows) < REORDERED


@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "jamba"])
def test_raw_softmax_gates_do_depend_on_experts_never_chosen(name: str, tiny: Tiny) -> None:
    # The other half of the law: where the denominator runs over all experts, dropping one raises all gates.
    rows = plain_rows(1, 4)
    entry, source, view = without_idle_experts(tiny(name, experts=16), rows)
    assert not entry.gates_independent(source.config)
    assert largest_difference(streamed_logits(source, rows), streamed_logits(view, rows), rows) > 100 * REORDERED


def test_which_families_the_law_leaves_out(tiny: Tiny) -> None:
    for name in ("deepseek_v2", "deepseek_v3", "phimoe", "jamba"):
        source = Checkpoint.open(tiny(name))
        assert not identify(source.config).gates_independent(source.config), name


# -- multi-token prediction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next"])
def test_extra_layers_are_dropped_or_follow_the_last_layer(name: str, tiny: Tiny) -> None:
    source = Checkpoint.open(tiny(name, mtp=True))
    entry = identify(source.config)
    extra = {tensor for tensor in source.names() if entry.claim(tensor, source.config).kind == "extra"}
    dropped = planned(source, some_experts)
    assert not extra & set(dropped.names())
    assert all(not dropped.config.get(key) for key in entry.extra_count_keys)
    kept = planned(source, some_experts, mtp="keep")
    last = kept.plan.layers[-1].kept
    experts = [tensor for tensor in kept.names() if tensor in extra and ".experts." in tensor]
    assert len(experts) == 3 * len(last)
    stem = next(tensor for tensor in experts if tensor.endswith("experts.0.up_proj.weight"))
    for new, old in enumerate(last):
        got = kept.read(stem.replace("experts.0.", f"experts.{new}."))
        assert torch.equal(got, source.read(stem.replace("experts.0.", f"experts.{old}.")))
    gate = next(tensor for tensor in kept.names() if tensor in extra and tensor.endswith("mlp.gate.weight"))
    assert torch.equal(kept.read(gate), source.read(gate)[list(last)])

"""The table of architectures against real files and transformers' own modules, one family after the other."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moezip.arch.experts import Decoded, check_shapes, decoded, read_expert
from moezip.arch.families import ARCHITECTURES, REFUSED, identify
from moezip.arch.spec import Architecture
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import TensorSpec
from moezip.errors import ArchitectureError, CheckpointError
from moezip.formats import fp8_block, mxfp4
from tests import tiny as make_tiny

Tiny = Callable[..., Path]
# Matrices of at most 32 columns in float32: sums in another order differ by a few units in the last place.
FLOAT32_SUM = 1e-5
FP8 = ("deepseek_v3", "minimax_m2")
MTP = ("deepseek_v3", "glm4_moe", "qwen3_next")

families = pytest.mark.parametrize("name", make_tiny.FAMILIES)


def opened(folder: Path) -> tuple[Checkpoint, Architecture]:
    source = Checkpoint.open(folder)
    return source, identify(source.config)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def on_meta(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model without memory, and its config as a plain object."""
    from transformers import AutoModelForCausalLM

    config = make_tiny.config_of(name, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval(), config.to_dict()


class Headers:
    """A source of names and shapes only, to be bent in tests."""

    def __init__(self, source: Checkpoint, config: dict[str, Any] | None = None, **shapes: tuple[int, ...] | None):
        self.folder, self.config = source.folder, source.config if config is None else config
        self._specs: dict[str, TensorSpec] = {name: source.spec(name) for name in source.names()}
        for name, shape in shapes.items():
            if shape is None:
                del self._specs[name]
            else:
                self._specs[name] = TensorSpec(name, "F32", shape, "model.safetensors")

    def names(self) -> list[str]:
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]


# -- names --------------------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    assert set(ARCHITECTURES) == set(make_tiny.FAMILIES)


@families
def test_every_name_is_claimed_once(name: str, tiny: Tiny) -> None:
    source, entry = opened(tiny(name))
    claims = {tensor: entry.claim(tensor, source.config) for tensor in source.names()}
    for tensor, claim in claims.items():
        matches = [owner for pattern, owner in entry._patterns if pattern.match(tensor)]
        assert matches == ([] if claim.kind == "other" else [claim.tensor]), tensor
    # And the other way round: the templates spell exactly the names that are claimed.
    facts = entry.layer_facts(source.config)
    spelled = [row.template.format(layer=fact.layer) for fact in facts for row in entry.router]
    for fact in facts:
        for item in entry.experts:
            spelled += [item.template.format(layer=fact.layer, expert=e) for e in range(1 if item.fused else 8)]
    assert sorted(spelled) == sorted(tensor for tensor, claim in claims.items() if claim.kind != "other")


@pytest.mark.parametrize("name", MTP)
def test_extra_layers_are_told_apart(name: str, tiny: Tiny) -> None:
    plain, entry = opened(tiny(name))
    source, _ = opened(tiny(name, mtp=True))
    kinds = Counter(entry.claim(tensor, source.config).kind for tensor in source.names())
    added = set(source.names()) - set(plain.names())
    assert kinds["extra"] == len(added) > 24  # the eight experts of the extra layer are among them
    assert all(entry.claim(tensor, source.config).kind == "extra" for tensor in added)
    check_shapes(source, entry)


def test_later_extra_layers_count_too() -> None:
    entry, config = ARCHITECTURES["minimax_m2"], {"num_hidden_layers": 62, "num_local_experts": 256}
    for layer, kind in ((61, "expert"), (62, "extra"), (64, "extra"), (100, "extra")):
        assert entry.claim(f"model.layers.{layer}.block_sparse_moe.experts.3.w1.weight", config).kind == kind


def test_unknown_expert_tensor_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="looks like an expert's"):
        ARCHITECTURES["qwen3_moe"].claim("model.layers.0.mlp.experts.gate_up_proj", {"num_hidden_layers": 2})


# -- the entry against the model ----------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in make_tiny.FAMILIES),
    ("qwen2_moe", {"layers": 4, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("qwen3_next", {"layers": 4, "mlp_only_layers": [0, 2]}),
    ("deepseek_v2", {"first_k_dense_replace": 0, "topk_method": "greedy"}),
    ("deepseek_v3", {"layers": 5, "first_k_dense_replace": 3, "n_group": 4, "topk_group": 2}),
    ("glm4_moe", {"first_k_dense_replace": 2, "n_group": 2}),
    ("dots1", {"first_k_dense_replace": 2, "n_group": 2, "n_shared_experts": 3}),
    ("ernie4_5_moe", {"layers": 6, "moe_layer_start_index": 2, "moe_layer_end_index": 4, "moe_layer_interval": 1}),
    ("ernie4_5_moe", {"layers": 6, "moe_layer_start_index": 0, "moe_layer_interval": 2, "moe_num_shared_experts": 2}),
    ("jamba", {"layers": 6, "expert_layer_period": 3, "expert_layer_offset": 2}),
    ("gpt_oss", {"experts": 6, "top_k": 3}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_entry_agrees_with_the_meta_model(name: str, options: dict[str, Any]) -> None:
    model, config = on_meta(name, **options)
    entry = ARCHITECTURES[name]
    layers = model.get_submodule(entry.layers)
    assert len(layers) == config[entry.layers_key]
    blocks = {
        i: dict(layer.named_modules()).get(f"{entry.block}.{entry.experts_module}") for i, layer in enumerate(layers)
    }
    facts = entry.layer_facts(config)
    assert [fact.layer for fact in facts] == [i for i, experts in blocks.items() if experts is not None]
    for fact in facts:
        block, experts = layers[fact.layer].get_submodule(entry.block), blocks[fact.layer]
        roles = {tensor.role: tensor for tensor in entry.experts}
        fused = roles.get("gate_up")
        assert experts.is_transposed == bool(fused and fused.transposed)
        assert experts.is_concatenated == (not (fused and fused.interleaved))
        assert experts.has_bias == ("down_bias" in roles) == ("gate_up_bias" in roles)
        assert experts.has_gate
        gate_up = (2 * fact.width, fact.hidden)
        assert tuple(experts.gate_up_proj.shape) == (
            fact.experts, *(gate_up[::-1] if experts.is_transposed else gate_up)
        )  # fmt: skip
        router = block.get_submodule(entry.router_module)
        assert tuple(router.weight.shape) == (fact.experts, fact.hidden)
        assert router.top_k == fact.top_k
        assert {child for child, _ in block.named_children()} == {
            entry.experts_module, entry.router_module, *entry.shared_modules
        }  # fmt: skip
        assert hasattr(layers[fact.layer], entry.norm)
        grouped = getattr(router, "num_group", 1) if getattr(router, "topk_method", "") != "greedy" else 1
        assert fact.groups == grouped
        assert fact.top_groups == (router.topk_group if grouped > 1 else 1)
        if entry.shared_modules:
            assert block.get_submodule(entry.shared_modules[0]).up_proj.out_features == fact.shared * fact.width
        else:
            assert fact.shared == 0


@families
def test_all_aliases_of_the_count_are_known(name: str) -> None:
    from transformers import CONFIG_MAPPING

    entry, aliases = ARCHITECTURES[name], CONFIG_MAPPING[name].attribute_map or {}
    same = {a for pair in aliases.items() for a in pair if set(pair) & set(entry.count_keys)}
    assert same <= set(entry.count_keys)


@families
def test_norm_block_and_residual_are_where_the_entry_says(name: str, tiny: Tiny) -> None:
    folder = tiny(name)
    source, entry = opened(folder)
    model, seen = load(folder), {}
    layer = model.get_submodule(entry.layers)[entry.moe_layers(source.config)[0]]
    norm, block = getattr(layer, entry.norm), layer.get_submodule(entry.block)

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    norm.register_forward_hook(lambda _, args, out: seen.update(stream=args[0], normed=out))
    block.register_forward_hook(lambda _, args, out: seen.update(inside=args[0], out=first(out)))
    layer.register_forward_hook(lambda _, args, out: seen.update(after=first(out)))
    with torch.no_grad():
        model(make_tiny.token_ids(2, 9))
    assert torch.equal(seen["normed"], seen["inside"])
    scale = source.config[entry.residual_scale_key] if entry.residual_scale_key else 1.0
    assert torch.equal(seen["stream"] + seen["out"] * scale, seen["after"])


@families
def test_gates_sum_to_one_where_the_entry_says_so(name: str, tiny: Tiny) -> None:
    folder = tiny(name)
    source, entry = opened(folder)
    model, sums = load(folder), []
    layer = entry.moe_layers(source.config)[0]
    experts = model.get_submodule(f"{entry.layers}.{layer}.{entry.block}.{entry.experts_module}")
    experts.register_forward_pre_hook(lambda _, args: sums.append(args[2].sum(-1)))
    with torch.no_grad():
        model(make_tiny.token_ids(2, 20))
    spread = float((sums[0] - sums[0].mean()).abs().max())
    assert (spread < FLOAT32_SUM) == entry.gates_renormalised(source.config)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"])
def test_group_rank(name: str) -> None:
    # Two groups of four, one may be used. Logits 4, -9, -9, -9 | 2, 2, -9, -9. The largest single score lies in
    # group 0, the largest sum of two in group 1: sigmoid 0.982 + 0.0001 against 0.881 + 0.881.
    from transformers import AutoModelForCausalLM

    config = make_tiny.config_of(name, n_group=2, topk_group=1)
    entry = ARCHITECTURES[name]
    fact = entry.layer_facts(config.to_dict())[0]
    model = AutoModelForCausalLM.from_config(config).eval()
    router = model.get_submodule(f"{entry.layers}.{fact.layer}.{entry.block}.{entry.router_module}")
    with torch.no_grad():
        router.weight.copy_(torch.eye(8, 32))
        logits = torch.tensor([4.0, -9, -9, -9, 2, 2, -9, -9])
        chosen = router(torch.cat([logits, torch.zeros(24)])[None])[2]
    assert fact.groups == 2
    assert {int(e) // 4 for e in chosen.flatten()} == ({1} if fact.group_rank == 2 else {0})


# -- canonical experts --------------------------------------------------------------------------------------


@families
def test_canonical_expert_computes_what_transformers_computes(name: str, tiny: Tiny) -> None:
    folder = tiny(name)
    source, entry = opened(folder)
    model = load(folder)
    assert getattr(model.config, "hidden_act", "silu") == "silu"
    x = torch.randn(5, make_tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    for fact in entry.layer_facts(source.config):
        experts = model.get_submodule(f"{entry.layers}.{fact.layer}.{entry.block}.{entry.experts_module}")
        for e in range(fact.experts):
            expert = read_expert(source, entry, fact.layer, e)
            assert expert.gate.shape == expert.up.shape == (fact.width, fact.hidden)
            assert expert.down.shape == (fact.hidden, fact.width)
            gate, up = x @ expert.gate.T, x @ expert.up.T
            if expert.gate_bias is not None and expert.up_bias is not None and expert.down_bias is not None:
                # gpt-oss: gate at most 7, up within 7, silu with gain 1.702, up + 1 (its model card's swiglu).
                gate, up = (gate + expert.gate_bias).clamp(max=7.0), (up + expert.up_bias).clamp(-7.0, 7.0)
                wanted = (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ expert.down.T + expert.down_bias
            else:
                wanted = (torch.nn.functional.silu(gate) * up) @ expert.down.T
            with torch.no_grad():
                got = experts(x, torch.full((5, 1), e), torch.ones(5, 1))
            torch.testing.assert_close(got, wanted, rtol=FLOAT32_SUM, atol=FLOAT32_SUM)


# -- stored quantization ------------------------------------------------------------------------------------


def stored_pairs(tiny: Tiny) -> list[tuple[Checkpoint, Checkpoint]]:
    """(plain, stored) checkpoints of the same weights."""
    pairs = [(tiny(name), tiny(name, stored="fp8")) for name in FP8]
    pairs.append((tiny("gpt_oss", intermediate_size=32), tiny("gpt_oss", stored="mxfp4")))
    return [(Checkpoint.open(plain), Checkpoint.open(stored)) for plain, stored in pairs]


def test_decoded_has_the_plain_names_and_shapes(tiny: Tiny) -> None:
    for plain, stored in stored_pairs(tiny):
        view = decoded(stored)
        assert isinstance(view, Decoded)
        assert sorted(view.names()) == sorted(plain.names())
        assert all(view.spec(name).shape == plain.spec(name).shape for name in plain.names())
        assert "quantization_config" not in view.config
        assert view.fingerprint == stored.fingerprint
        check_shapes(stored, identify(stored.config))


def test_decoded_equals_the_formats_decode(tiny: Tiny) -> None:
    for _, stored in stored_pairs(tiny):
        view, touched = decoded(stored), 0
        for name in view.names():
            if f"{name}_scale_inv" in stored.names():
                wanted = fp8_block.decode(stored.read(name), stored.read(f"{name}_scale_inv"), make_tiny.FP8_BLOCK)
            elif f"{name}_blocks" in stored.names():
                wanted = mxfp4.decode(stored.read(f"{name}_blocks"), stored.read(f"{name}_scales")).transpose(1, 2)
            else:
                assert torch.equal(view.read(name), stored.read(name))
                continue
            touched += 1
            whole = view.read(name)
            assert view.spec(name).dtype == "BF16" and whole.dtype == torch.bfloat16
            assert torch.equal(whole, wanted.to(torch.bfloat16))
            for start, stop in ((0, 1), (1, 3), (3, whole.shape[0]), (5, 5)):
                assert torch.equal(view.read(name, range(start, stop)), whole[start:stop])
            raw = whole.contiguous().view(torch.uint8).numpy().tobytes()
            assert b"".join(bytes(chunk) for chunk in view.chunks(name)) == raw
            with pytest.raises(CheckpointError, match="has no rows"):
                view.read(name, range(0, whole.shape[0] + 1))
        assert touched >= 6


def test_decoded_is_near_the_plain_weights(tiny: Tiny) -> None:
    for plain, stored in stored_pairs(tiny):
        view, entry = decoded(stored), identify(stored.config)
        layer = entry.moe_layers(stored.config)[0]
        for e in (0, 7):
            true, got = read_expert(plain, entry, layer, e), read_expert(view, entry, layer, e)
            for role in ("gate", "up", "down"):
                x, y = getattr(true, role).float(), getattr(got, role).float()
                if stored.config["quantization_config"]["quant_method"] == "fp8":
                    # e4m3: half of 2^-3 relative, half of 2^-9 of the block's scale (largest / 448) near zero;
                    # the bf16 result adds 2^-8 relative.
                    bound = x.abs() * (2**-4 + 2**-8) + x.abs().max() / 448 * 2**-10
                else:
                    # The largest step between e2m1 codes is 2 (4 to 6), so half a step is the scale itself, a power
                    # of two at most twice the group's largest / 6.
                    bound = x.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1) / 3
                assert bool(((x - y).abs() <= bound).all()), role
                assert not torch.equal(x, y)


def test_plain_sources_are_not_wrapped(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("deepseek_v3"))
    assert decoded(source) is source


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deepseek_v3", {"quant_method": "awq"}, "quant_method 'awq'"),
        ("deepseek_v3", {"quant_method": "mxfp4"}, "no tensor is stored that way"),
        ("deepseek_v3", {"weight_block_size": [8, 8]}, "do not fit blocks"),
        ("deepseek_v3", None, "has no quantization_config"),
    ],
)
def test_quantization_that_cannot_be_decoded(
    name: str, change: dict[str, Any] | None, message: str, tiny: Tiny
) -> None:
    source = Checkpoint.open(tiny(name, stored="fp8"))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if change is not None:
        config["quantization_config"] = source.config["quantization_config"] | change
    with pytest.raises(ArchitectureError, match=message):
        decoded(Headers(source, config))  # type: ignore[arg-type]


def test_codes_are_not_taken_for_numbers(tiny: Tiny) -> None:
    source, entry = opened(tiny("deepseek_v3", stored="fp8"))
    with pytest.raises(ArchitectureError, match="codes, not as numbers"):
        read_expert(source, entry, 1, 0)


# -- config against tensors ---------------------------------------------------------------------------------


@families
def test_config_and_tensors_agree(name: str, tiny: Tiny) -> None:
    source, entry = opened(tiny(name))
    check_shapes(source, entry)


@families
@pytest.mark.parametrize("count", [6, 10])
def test_wrong_count_in_config(name: str, count: int, tiny: Tiny) -> None:
    source, entry = opened(tiny(name))
    config = source.config | dict.fromkeys(entry.count_keys, count)
    with pytest.raises(ArchitectureError, match=f"(?s)8.*says {count}|says {count}.*8"):
        check_shapes(Headers(source, config), entry)  # type: ignore[arg-type]


def test_wrong_width_hole_and_stranger(tiny: Tiny) -> None:
    source, entry = opened(tiny("qwen3_moe"))
    with pytest.raises(ArchitectureError, match="expert width 24"):
        check_shapes(Headers(source, source.config | {"moe_intermediate_size": 24}), entry)  # type: ignore[arg-type]
    hole = {"model.layers.1.mlp.experts.5.up_proj.weight": None}
    with pytest.raises(ArchitectureError, match=r"layer 1 has 7 .* first missing is 5"):
        check_shapes(Headers(source, **hole), entry)  # type: ignore[arg-type]
    with pytest.raises(ArchitectureError, match=r"layers\.2\.mlp\.gate\.weight is missing"):
        check_shapes(Headers(source, **{"model.layers.2.mlp.gate.weight": None}), entry)  # type: ignore[arg-type]
    stranger = {"model.layers.0.mlp.gate.expert_bias": (8,)}
    with pytest.raises(ArchitectureError, match="does not claim"):
        check_shapes(Headers(source, **stranger), entry)  # type: ignore[arg-type]
    dense = source.config | {"mlp_only_layers": [1]}
    with pytest.raises(ArchitectureError, match="layer 1 has no experts"):
        check_shapes(Headers(source, dense), entry)  # type: ignore[arg-type]


def test_two_counts_that_disagree() -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 6, "num_local_experts": 8, "num_hidden_layers": 1}
    with pytest.raises(ArchitectureError, match="num_experts = 6, num_local_experts = 8"):
        identify(config).expert_count(config)
    assert identify(config).expert_count(config | {"num_local_experts": 6}) == 6


@pytest.mark.parametrize("value", [[2, 2], "2", 2.0, True, None])
def test_numbers_that_are_not(value: object, tiny: Tiny) -> None:
    source, entry = opened(tiny("qwen3_moe"))
    with pytest.raises(ArchitectureError, match="num_experts_per_tok"):
        entry.layer_facts(source.config | {"num_experts_per_tok": value})


# -- identity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_by_name_with_a_reason(model_type: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        identify({"model_type": model_type}, "some/config.json")
    assert model_type in str(caught.value) and REFUSED[model_type] in str(caught.value)
    assert "qwen3_moe" in str(caught.value)


@pytest.mark.parametrize(("given", "nearest"), [("qwen3_mo", "qwen3_moe"), ("deepseek_v32", "deepseek_v3")])
def test_did_you_mean(given: str, nearest: str) -> None:
    with pytest.raises(ArchitectureError, match=f"(?s){given}.*did you mean '{nearest}'"):
        identify({"model_type": given})


def test_no_model_type() -> None:
    with pytest.raises(ArchitectureError, match="no model_type"):
        identify(json.loads("{}"))


def test_entries_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARCHITECTURES["mixtral"].name = "other"  # type: ignore[misc]

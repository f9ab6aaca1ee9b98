"""The table of architectures. One entry is one architecture: adding one touches nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moezip.arch.layout import own_format
from moezip.arch.spec import Architecture, ExpertTensor, RouterTensor, whole_number
from moezip.errors import ArchitectureError
from moezip.registry import did_you_mean

Config = Mapping[str, Any]


def per_expert(
    prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[ExpertTensor, ...]:
    """Three matrices per expert under ``model.layers.{layer}.<prefix>.{expert}.``, stored [out, in]."""
    stem = f"model.layers.{{layer}}.{prefix}.{{expert}}"
    return (
        ExpertTensor("gate", f"{stem}.{gate}.weight"),
        ExpertTensor("up", f"{stem}.{up}.weight"),
        ExpertTensor("down", f"{stem}.{down}.weight"),
    )


def router(*names: str) -> tuple[RouterTensor, ...]:
    """Router tensors under ``model.layers.{layer}.``, expert axis 0."""
    return tuple(RouterTensor(f"model.layers.{{layer}}.{name}") for name in names)


# -- which layers have experts ------------------------------------------------------------------------------


def number(config: Config, key: str, default: int | None = None) -> int:
    """A whole number of the config, or its default. Raises ArchitectureError."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ArchitectureError(f"config.json has no {key!r}", next="use the config.json that came with the weights")
    return whole_number(value, key)


def every_layer(config: Config) -> list[int]:
    return list(range(number(config, "num_hidden_layers")))


def after_dense(default: int) -> Callable[[Config], list[int]]:
    """DeepSeek's rule: dense layers first, then experts. ``moe_layer_freq`` is 1 in all published models.

    Args:
        default: dense layers where the config does not say, as transformers has it for the family.
    """

    def layers(config: Config) -> list[int]:
        first, step = number(config, "first_k_dense_replace", default), number(config, "moe_layer_freq", 1)
        return [i for i in every_layer(config) if i >= first and i % step == 0]

    return layers


def sparse_steps(config: Config) -> list[int]:
    step, dense = number(config, "decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    return [i for i in every_layer(config) if i not in dense and (i + 1) % step == 0]


def start_to_end(config: Config) -> list[int]:
    """ERNIE's rule; an end of -1 is the last layer."""
    layers, step = every_layer(config), number(config, "moe_layer_interval", 1)
    start, end = number(config, "moe_layer_start_index", 1), number(config, "moe_layer_end_index", -1)
    return [i for i in layers if (i + 1) % step == 0 and start <= i <= (layers[-1] if end == -1 else end)]


def period_and_offset(config: Config) -> list[int]:
    """Jamba's rule."""
    period, offset = number(config, "expert_layer_period", 2), number(config, "expert_layer_offset", 1)
    return [i for i in every_layer(config) if i % period == offset]


# -- the table ----------------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            name="mixtral",
            experts=per_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
            router=router("block_sparse_moe.gate.weight"),
            count_keys=("num_local_experts", "num_experts"),
            width_key="intermediate_size",
            moe_layers=every_layer,
        ),
        Architecture(
            name="qwen2_moe",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight"),
            count_keys=("num_experts",),
            moe_layers=sparse_steps,
            gate_norm="norm_topk_prob",
            shared_key="shared_expert_intermediate_size",
            shared_is_width=True,
            shared_modules=("shared_expert", "shared_expert_gate"),
            config_defaults={"norm_topk_prob": False},
        ),
        Architecture(
            name="qwen3_moe",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight"),
            count_keys=("num_experts", "num_local_experts"),
            moe_layers=sparse_steps,
            gate_norm="norm_topk_prob",
            config_defaults={"norm_topk_prob": False},
        ),
        Architecture(
            name="qwen3_next",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight"),
            count_keys=("num_experts",),
            moe_layers=sparse_steps,
            gate_norm="norm_topk_prob",
            shared_key="shared_expert_intermediate_size",
            shared_is_width=True,
            shared_modules=("shared_expert", "shared_expert_gate"),
            extra_prefixes=("mtp.",),
            extra_count_keys=("num_nextn_predict_layers", "mtp_num_hidden_layers"),
            config_defaults={"norm_topk_prob": True},
        ),
        Architecture(
            name="olmoe",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight"),
            count_keys=("num_experts", "num_local_experts"),
            width_key="intermediate_size",
            moe_layers=every_layer,
            gate_norm="norm_topk_prob",
            config_defaults={"norm_topk_prob": False},
        ),
        Architecture(
            name="deepseek_v2",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight"),
            count_keys=("n_routed_experts", "num_experts"),
            moe_layers=after_dense(0),
            gate_norm=False,
            group_keys=("n_group", "topk_group"),
            group_when=("topk_method", "group_limited_greedy"),
            shared_key="n_shared_experts",
            shared_modules=("shared_experts",),
            notes="transformers ignores norm_topk_prob here, and so does moezip, which runs its code",
        ),
        Architecture(
            name="deepseek_v3",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
            count_keys=("n_routed_experts", "num_local_experts"),
            moe_layers=after_dense(3),
            scoring="sigmoid",
            gate_norm="norm_topk_prob",
            group_keys=("n_group", "topk_group"),
            group_rank=2,
            shared_key="n_shared_experts",
            shared_modules=("shared_experts",),
            extra_prefixes=("model.layers.{layers}.",),
            extra_count_keys=("num_nextn_predict_layers", "num_mtp_layers"),
            config_defaults={"norm_topk_prob": True},
        ),
        Architecture(
            name="glm4_moe",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
            count_keys=("n_routed_experts", "num_local_experts"),
            moe_layers=after_dense(1),
            scoring="sigmoid",
            gate_norm="norm_topk_prob",
            group_keys=("n_group", "topk_group"),
            group_rank=2,
            shared_key="n_shared_experts",
            shared_modules=("shared_experts",),
            extra_prefixes=("model.layers.{layers}.",),
            extra_count_keys=("num_nextn_predict_layers", "num_mtp_layers"),
            config_defaults={"norm_topk_prob": True},
        ),
        Architecture(
            name="gpt_oss",
            experts=(
                ExpertTensor(
                    "gate_up", "model.layers.{layer}.mlp.experts.gate_up_proj", transposed=True, interleaved=True
                ),
                ExpertTensor("gate_up_bias", "model.layers.{layer}.mlp.experts.gate_up_proj_bias", interleaved=True),
                ExpertTensor("down", "model.layers.{layer}.mlp.experts.down_proj", transposed=True),
                ExpertTensor("down_bias", "model.layers.{layer}.mlp.experts.down_proj_bias"),
            ),
            router=router("mlp.router.weight", "mlp.router.bias"),
            count_keys=("num_local_experts", "num_experts"),
            width_key="intermediate_size",
            moe_layers=every_layer,
            router_module="router",
            notes="the stored mxfp4 pieces are [out, in]; the plain bf16 form is [in, out]",
        ),
        Architecture(
            name="granitemoe",
            experts=(
                ExpertTensor("gate_up", "model.layers.{layer}.block_sparse_moe.input_linear.weight"),
                ExpertTensor("down", "model.layers.{layer}.block_sparse_moe.output_linear.weight"),
            ),
            router=router("block_sparse_moe.router.layer.weight"),
            count_keys=("num_local_experts",),
            width_key="intermediate_size",
            moe_layers=every_layer,
            block="block_sparse_moe",
            router_module="router",
            residual_scale_key="residual_multiplier",
        ),
        Architecture(
            name="phimoe",
            experts=per_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
            router=router("block_sparse_moe.gate.weight"),
            count_keys=("num_local_experts",),
            width_key="intermediate_size",
            moe_layers=every_layer,
            router_module="router",
            scoring="sparsemixer",
            gate_norm=False,
        ),
        Architecture(
            name="ernie4_5_moe",
            experts=per_expert("mlp.experts"),
            router=(
                *router("mlp.gate.weight"),
                RouterTensor("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias", axis=1),
            ),
            count_keys=("moe_num_experts", "num_experts"),
            top_k_key="moe_k",
            moe_layers=start_to_end,
            shared_key="moe_num_shared_experts",
            shared_modules=("shared_experts",),
            extra_prefixes=("model.mtp_",),
            extra_count_keys=("num_nextn_predict_layers",),
        ),
        Architecture(
            name="dots1",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
            count_keys=("n_routed_experts", "num_local_experts"),
            moe_layers=after_dense(0),
            scoring="sigmoid",
            gate_norm="norm_topk_prob",
            group_keys=("n_group", "topk_group"),
            group_rank=2,
            shared_key="n_shared_experts",
            shared_modules=("shared_experts",),
            config_defaults={"norm_topk_prob": False},
        ),
        Architecture(
            name="jamba",
            experts=per_expert("feed_forward.experts"),
            router=router("feed_forward.router.weight"),
            count_keys=("num_experts", "num_local_experts"),
            width_key="intermediate_size",
            moe_layers=period_and_offset,
            block="feed_forward",
            router_module="router",
            norm="pre_ff_layernorm",
            gate_norm=False,
            width_is_dense_too=True,
            notes="layers without experts have one plain MLP under the same name",
        ),
        Architecture(
            name="minimax_m2",
            experts=per_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
            router=router("block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"),
            count_keys=("num_local_experts", "num_experts"),
            width_key="intermediate_size",
            moe_layers=every_layer,
            scoring="sigmoid",
            extra_prefixes=("model.layers.{layers}.",),
            extra_count_keys=("num_mtp_modules",),
        ),
    )
}

# Models with experts whose layout needs more than a table entry, by model_type.
REFUSED: dict[str, str] = {
    "llama4": "its router scales the experts' inputs and its experts have a layout of their own",
    "llama4_text": "its router scales the experts' inputs and its experts have a layout of their own",
    "dbrx": "all experts of a layer are stacked into flat matrices and its sizes are nested in ffn_config",
    "jetmoe": "its attention is a mixture of experts too, behind the same router code",
    "switch_transformers": "it is an encoder-decoder model with capacity routing",
    "nllb-moe": "it is an encoder-decoder model with capacity routing",
    "nllb_moe": "it is an encoder-decoder model with capacity routing",
    "inkling": "its shared experts take part in the router's softmax",
    "inkling_text": "its shared experts take part in the router's softmax",
    "deepseek_v4": "some layers choose experts by a table of token ids, which pruning would have to rewrite",
    "ernie4_5_vl_moe": "text and vision experts share one range of numbers",
    "longcat_flash": "its router has rows for zero experts that own no weights",
    "zaya": "its router is a network of its own",
    "gemma4": "its experts sit beside a dense MLP, directly in the decoder layer",
    "gemma4_text": "its experts sit beside a dense MLP, directly in the decoder layer",
    "nemotron_h": "its experts have no gate matrix",
    "aria": "its decoder is part of a vision model",
    "aria_text": "its decoder is part of a vision model",
    "qwen3_vl_moe": "its decoder is part of a vision model",
    "glm4v_moe": "its decoder is part of a vision model",
}


def identify(config: Config, where: object = None) -> Architecture:
    """The table's entry for a ``config.json``; ``split`` where that is one of moezip's own format.

    Raises:
        ArchitectureError: not a model that moezip knows; the message says why, or names the nearest one that it does.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureError(
            "config.json has no model_type, so the architecture is unknown",
            where=where,
            next="use the config.json that came with the weights",
        )
    if model_type in ARCHITECTURES:
        entry = ARCHITECTURES[model_type]
        return entry.split if own_format(config) else entry
    known = f"known: {', '.join(sorted(ARCHITECTURES))}"
    if model_type in REFUSED:
        raise ArchitectureError(
            f"moezip cannot compress {model_type!r} models: {REFUSED[model_type]}", where=where, next=known
        )
    raise ArchitectureError(
        f"moezip does not know the architecture {model_type!r}",
        where=where,
        next=f"{did_you_mean(model_type, ARCHITECTURES)}{known}. "
        "CONTRIBUTING.md shows how to add one: a single table entry",
    )

"""The table of architectures. One entry is one architecture: adding one touches nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezip.arch.spec import Architecture, ExpertTensor, RouterTensor
from moezip.errors import ArchitectureError
from moezip.registry import did_you_mean

Config = Mapping[str, Any]


def per_expert(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[ExpertTensor, ...]:
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


def every_layer(config: Config) -> list[int]:
    return list(range(config["num_hidden_layers"]))


def after_first_dense(config: Config) -> list[int]:
    return list(range(config.get("first_k_dense_replace") or 0, config["num_hidden_layers"]))


def sparse_steps(config: Config) -> list[int]:
    step, dense = config.get("decoder_sparse_step") or 1, set(config.get("mlp_only_layers") or ())
    return [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


# -- the table ----------------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            name="mixtral",
            experts=per_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
            router=router("block_sparse_moe.gate.weight"),
            count_keys=("num_local_experts",),
            width_key="intermediate_size",
            moe_layers=every_layer,
        ),
        Architecture(
            name="qwen3_moe",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight"),
            count_keys=("num_experts", "num_local_experts"),
            moe_layers=sparse_steps,
        ),
        Architecture(
            name="deepseek_v3",
            experts=per_expert("mlp.experts"),
            router=router("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
            count_keys=("n_routed_experts",),
            moe_layers=after_first_dense,
            scoring="sigmoid",
            group_keys=("n_group", "topk_group"),
            group_rank=2,
            shared_key="n_shared_experts",
            extra_prefixes=("model.layers.{layers}.",),
            extra_count_keys=("num_nextn_predict_layers",),
        ),
        Architecture(
            name="gpt_oss",
            experts=(
                ExpertTensor("gate_up", "model.layers.{layer}.mlp.experts.gate_up_proj", transposed=True, interleaved=True),
                ExpertTensor("gate_up_bias", "model.layers.{layer}.mlp.experts.gate_up_proj_bias", interleaved=True),
                ExpertTensor("down", "model.layers.{layer}.mlp.experts.down_proj", transposed=True),
                ExpertTensor("down_bias", "model.layers.{layer}.mlp.experts.down_proj_bias"),
            ),
            router=router("mlp.router.weight", "mlp.router.bias"),
            count_keys=("num_local_experts",),
            width_key="intermediate_size",
            moe_layers=every_layer,
            router_module="router",
            notes="the stored mxfp4 pieces are [out, in]; the plain bf16 form is [in, out]",
        ),
    )
}


def identify(config: Config, where: object = None) -> Architecture:
    """The table's entry for a ``config.json``.

    Raises:
        ArchitectureError: not a model that moezip knows; the message names the nearest one that it does.
    """
    model_type = str(config.get("model_type"))
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise ArchitectureError(
        f"moezip does not know the architecture {model_type!r}",
        where=where,
        next=f"{did_you_mean(model_type, ARCHITECTURES)}known: {', '.join(sorted(ARCHITECTURES))}. "
        "CONTRIBUTING.md shows how to add one: a single table entry",
    )

"""Tiny random checkpoints of every family, on disk as the hub publishes them.

transformers builds the model and names the tensors (``save_pretrained`` undoes its own fusion); the shards, the
stored quantization, the extra layers and the hub's spelling of the config are written here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss",
    "granitemoe", "phimoe", "ernie4_5_moe", "dots1", "jamba", "minimax_m2",
)  # fmt: skip

LAYERS = 3
HIDDEN = 32
WIDTH = 16
FP8_BLOCK = (16, 16)
# Characters of the tiny tokenizer, after its four special tokens: newline and printable ASCII.
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(SPECIAL) + len(CHARACTERS)

_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4}  # fmt: skip
_MOE = {"moe_intermediate_size": WIDTH, "intermediate_size": 48}
_DEEPSEEK = {**_MOE, "n_shared_experts": 1, "first_k_dense_replace": 1}


def _settings(name: str, experts: int, top_k: int) -> dict[str, Any]:
    """What distinguishes the family's config from the common part."""
    plain = {"num_experts_per_tok": top_k, "intermediate_size": WIDTH}
    routed = {"n_routed_experts": experts, "num_experts_per_tok": top_k}
    table: dict[str, dict[str, Any]] = {
        "mixtral": {**plain, "num_local_experts": experts, "sliding_window": None},
        "qwen2_moe": {
            **_MOE, "num_experts": experts, "num_experts_per_tok": top_k, "shared_expert_intermediate_size": 2 * WIDTH,
        },
        # The one family here whose embeddings are tied, so that lm_head has no tensor of its own.
        "qwen3_moe": {
            **_MOE, "num_experts": experts, "num_experts_per_tok": top_k, "head_dim": 8, "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
        "qwen3_next": {
            **_MOE, "num_experts": experts, "num_experts_per_tok": top_k, "head_dim": 8,
            "shared_expert_intermediate_size": WIDTH, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
        "olmoe": {**plain, "num_experts": experts},
        "deepseek_v2": {
            **_DEEPSEEK, **_MLA, **routed, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
        "deepseek_v3": {**_DEEPSEEK, **_MLA, **routed, "n_group": 2, "topk_group": 1},
        "glm4_moe": {**_DEEPSEEK, **routed, "head_dim": 8, "n_group": 1, "topk_group": 1},
        "gpt_oss": {**plain, "num_local_experts": experts, "head_dim": 8, "sliding_window": 4},
        "granitemoe": {
            **plain, "num_local_experts": experts, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
        "phimoe": {**plain, "num_local_experts": experts, "attention_bias": True, "lm_head_bias": True},
        "ernie4_5_moe": {
            **_MOE, "moe_num_experts": experts, "moe_k": top_k, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        },
        "dots1": {
            **_DEEPSEEK, **routed, "head_dim": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        },
        "jamba": {
            **plain, "num_experts": experts, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
        "minimax_m2": {**plain, "num_local_experts": experts, "head_dim": 8},
    }  # fmt: skip
    return table[name]


def config_of(name: str, *, experts: int = 8, top_k: int = 2, layers: int = LAYERS, **overrides: Any) -> Any:
    """The transformers config of a tiny model."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **_settings(name, experts, top_k),
        **overrides,
    }
    if "layer_types" in settings:
        settings["layer_types"] = (settings["layer_types"] * layers)[:layers]
    return AutoConfig.for_model(name, **settings)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that routing and logits vary from token to token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, scale: float, centre: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + centre)

    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if "A_log" in name or name.endswith(("dt_bias", "dt_proj.bias", "mamba.D")):
                continue  # state-space decay rates keep their own initial values: random ones explode
            if "correction_bias" in name:
                normal(tensor, 0.1)
            elif "norm" in name:
                zero_centred = type(model).__name__.startswith("Qwen3Next") and "linear_attn" not in name
                normal(tensor, 0.1, centre=0.0 if zero_centred else 1.0)
            elif name.endswith(("gate.weight", "router.weight")):
                normal(tensor, 0.5)
            elif "experts" in name and "shared" not in name:
                normal(tensor, 0.3)
            else:
                normal(tensor, 0.15)
        model.tie_weights()  # type: ignore[operator]


def make(
    name: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    experts: int = 8,
    top_k: int = 2,
    layers: int = LAYERS,
    stored: str | None = None,
    shards: int = 3,
    tokenizer: bool = True,
    mtp: bool = False,
    **overrides: Any,
) -> Path:
    """A tiny random checkpoint in ``folder``.

    Args:
        name: one of FAMILIES.
        dtype: of the weights; selection biases stay float32, as published.
        stored: ``fp8`` (128-block style scales, here 16 x 16) for per-expert families, ``mxfp4`` for gpt_oss.
        shards: number of files; 1 gives ``model.safetensors`` with no index.
        mtp: add the layers of multi-token prediction, where the family publishes them.
        overrides: further config fields.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    if stored == "mxfp4":  # its blocks have 32 elements along the input axis
        overrides = {"intermediate_size": 32, **overrides}
    config = config_of(name, experts=experts, top_k=top_k, layers=layers, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for key, tensor in tensors.items():
        if "correction_bias" in key or (name == "ernie4_5_moe" and key.endswith("mlp.gate.weight")):
            tensors[key] = tensor.float()
    settings = _hub_config(name, json.loads((folder / "config.json").read_text()), dtype)
    if mtp:
        tensors |= _extra_layers(name, tensors, settings)
    if stored is not None:
        tensors = _quantize(stored, tensors, settings)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    _write_shards(folder, tensors, shards)
    if tokenizer:
        _write_tokenizer(folder)
    return folder


def _hub_config(name: str, saved: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The saved config in the spelling of the published files."""
    saved.pop("dtype", None)
    saved["torch_dtype"] = dtype
    if name == "qwen3_moe":
        saved["num_experts"] = saved.pop("num_local_experts")
    if name in ("deepseek_v2", "deepseek_v3"):
        saved |= {"moe_layer_freq": 1}
        saved.setdefault("scoring_func", "softmax" if name == "deepseek_v2" else "sigmoid")
        saved.setdefault("topk_method", "noaux_tc")
    if name in ("deepseek_v3", "glm4_moe"):
        saved.pop("num_mtp_layers", None)
        saved["num_nextn_predict_layers"] = 0
    return saved


def _extra_layers(name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One extra decoder layer: the last one's tensors under new names, and the few that only such a layer has."""
    last, vector = config["num_hidden_layers"] - 1, torch.ones(HIDDEN)
    layer = {key: value for key, value in tensors.items() if key.startswith(f"model.layers.{last}.")}
    if name in ("deepseek_v3", "glm4_moe"):
        config["num_nextn_predict_layers"] = 1
        stem = f"model.layers.{last + 1}."
        own = {"enorm.weight": vector, "hnorm.weight": vector, "shared_head.norm.weight": vector,
               "eh_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN)}  # fmt: skip
    elif name == "qwen3_next":
        stem = "mtp.layers.0."
        own = {"../norm.weight": vector, "../fc.weight": torch.ones(HIDDEN, 2 * HIDDEN)}
    else:
        raise ValueError(f"{name} publishes no multi-token prediction")
    kind = tensors["model.embed_tokens.weight"].dtype
    extra = {stem + key.split(".", 3)[3]: value.clone() for key, value in layer.items()}
    for key, value in own.items():
        target = "mtp." + key.removeprefix("../") if key.startswith("../") else stem + key
        extra[target] = value.to(kind, copy=True)
    return extra


def _quantize(stored: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same tensors as the hub stores them when quantized, and the config that says so."""
    found: dict[str, torch.Tensor] = {}
    if stored == "fp8":
        from moezip.formats import fp8_block

        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
        }  # fmt: skip
        for key, tensor in tensors.items():
            if key.endswith("_proj.weight") or (".experts." in key and key.endswith(".weight")):
                codes, scales = fp8_block.encode(tensor.float(), FP8_BLOCK)
                found |= {key: codes, f"{key}_scale_inv": scales}
            else:
                found[key] = tensor
        return found
    if stored == "mxfp4":
        from moezip.formats import mxfp4

        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        }
        for key, tensor in tensors.items():
            if key.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                blocks, scales = mxfp4.encode(tensor.float().transpose(-1, -2).contiguous())
                found |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            else:
                found[key] = tensor
        return found
    raise ValueError(f"unknown stored form {stored!r}")


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Shards of about equal size, tensors in natural order, with an index unless there is only one."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(value.nbytes for value in tensors.values())
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    done = 0
    for key, value in tensors.items():
        parts[min(shards - 1, done * shards // total)][key] = value.contiguous()
        done += value.nbytes
    where: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    """One token per character."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.save_pretrained(os.fspath(folder))


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (rows, length), generator=generator)

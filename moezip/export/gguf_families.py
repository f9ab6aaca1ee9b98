"""The table of families that are written as GGUF, and what llama.cpp makes of each. One entry is one family.

Facts are of llama.cpp's source code: what its graphs compute (``src/models``), and what its own converter writes
(``conversion``). Where its graph computes something else than transformers does, the entry refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moezip.arch.spec import Architecture

Value = bool | int | float | str
Config = Any  # a transformers config: defaults filled in, aliases resolved
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _nothing(config: Config) -> dict[str, Value]:
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """What one family is called, stores and computes in llama.cpp.

    Attributes:
        arch: its name there.
        keys: metadata beside the common ones, ``<arch>.`` left out: the config field that holds each.
        derived: more of them, that no single field holds.
        gates: whether llama.cpp divides the gates of the chosen experts by their sum; None: as the file says.
        permuted: rows of q and k lie pair by pair (its "norm" rope), not half by half as transformers has them.
        biases: modules of the attention that may have a bias there.
        own_head: it must have an output matrix even where that is the embedding.
        dense: some layers may have no experts.
        latent: keys and values come from a latent vector (MLA), whose up-projection is stored as two.
        sliding: it attends in windows.
        equal_heads: there must be as many key-value heads as heads.
        groups: it chooses groups of experts first.
    """

    arch: str
    keys: Mapping[str, str] = field(default_factory=dict)
    derived: Callable[[Config], dict[str, Value]] = _nothing
    gates: bool | None = True
    permuted: bool = False
    biases: tuple[str, ...] = ()
    own_head: bool = False
    dense: bool = False
    latent: bool = False
    sliding: bool = False
    groups: bool = False
    equal_heads: bool = False


def _latent(config: Config) -> dict[str, Value]:
    """Keys of multi-head latent attention: there it is one key-value head as wide as the latent and the rope part."""
    nope, rope, latent = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    found: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": latent,
        "rope.dimension_count": rope,
        "expert_shared_count": config.n_shared_experts or 0,
        "leading_dense_block_count": config.first_k_dense_replace or 0,
    }
    if config.q_lora_rank is not None:
        found["attention.q_lora_rank"] = config.q_lora_rank
    if (every := config.rope_parameters.get("mscale_all_dim")) is not None:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * every  # so by llama.cpp's convention for this family
    return found


# llama.cpp tells DeepSeek-V2-Lite and its kin, whose queries have no latent vector, by their number of layers.
PLAIN_QUERIES = (26, 27)
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of ``expert_gating_func``


def _deepseek_v2(config: Config) -> dict[str, Value]:
    # transformers, whose numbers are ours, never divides this family's gates, whatever ``norm_topk_prob`` says
    return {**_latent(config), "expert_gating_func": SOFTMAX, "expert_weights_norm": False}


def _deepseek_v3(config: Config) -> dict[str, Value]:
    groups: dict[str, Value] = {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return {
        **_latent(config),
        **(groups if config.n_group > 1 else {}),
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
_ROUTED = {**_WIDTH, "expert_weights_scale": "routed_scaling_factor"}

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family("llama", permuted=True),
    "qwen2_moe": Family(
        "qwen2moe",
        {**_WIDTH, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        gates=False,
        biases=("q_proj", "k_proj", "v_proj"),
        own_head=True,
    ),
    "qwen3_moe": Family("qwen3moe", _WIDTH),
    "olmoe": Family("olmoe", gates=False, own_head=True, equal_heads=True),
    "deepseek_v2": Family("deepseek2", _ROUTED, _deepseek_v2, gates=None, dense=True, latent=True),
    "deepseek_v3": Family("deepseek2", _ROUTED, _deepseek_v3, gates=None, dense=True, latent=True, groups=True),
    "gpt_oss": Family(
        "gpt-oss",
        {"expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window"},
        biases=ATTENTION,
        sliding=True,
    ),
    "granitemoe": Family(
        "granitemoe",
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        permuted=True,
    ),
}

# What all of them store, and the config field that holds it.
COMMON = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def metadata(family: Family, entry: Architecture, raw: Mapping[str, Any], config: Config) -> dict[str, Value]:
    """The metadata of one model, ``<arch>.`` left out.

    Args:
        raw: ``config.json``. config: the same with transformers' defaults.
    """
    found: dict[str, Value] = {key: getattr(config, source) for key, source in COMMON.items()}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found |= {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size}
    found |= {"expert_count": entry.expert_count(raw), "expert_used_count": entry.integer(raw, entry.top_k_key)}
    found |= _rope(config.rope_parameters)
    found |= {key: getattr(config, source) for key, source in family.keys.items()}
    return found | family.derived(config)


def _rope(given: Mapping[str, Any]) -> dict[str, Value]:
    found: dict[str, Value] = {"rope.freq_base": float(given["rope_theta"])}
    kind = given.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(given["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(given["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if given.get(key) is not None:
                found[f"rope.scaling.yarn_{key}"] = float(given[key])
    return found


def refusal(family: Family, entry: Architecture, raw: Mapping[str, Any], config: Config) -> str | None:
    """Why llama.cpp would not compute what transformers does; None where it would."""
    return next(_refusals(family, entry, raw, config), None)


def _refusals(family: Family, entry: Architecture, raw: Mapping[str, Any], config: Config) -> Iterator[str]:
    layers = config.num_hidden_layers
    sparse = entry.moe_layers(raw)
    if len(sparse) < layers and not (family.dense and sparse == list(range(layers - len(sparse), layers))):
        yield f"layers {sorted(set(range(layers)) - set(sparse))} have no experts, where llama.cpp expects some"
    if family.gates is not None and entry.gates_renormalised(raw) != family.gates:
        yield (
            f"llama.cpp {'always' if family.gates else 'never'} divides this family's gates by their sum, and the "
            f"config ({entry.gate_norm}) says otherwise"
        )
    if entry.groups(raw)[0] > 1 and not family.groups:
        yield "its router chooses among groups by their best expert, llama.cpp by their two best"
    if family.latent and config.q_lora_rank is None and layers not in PLAIN_QUERIES:
        yield f"queries without a latent vector are expected of models with {PLAIN_QUERIES} layers, this has {layers}"
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn"):
        yield f"positions are scaled by {kind!r}, which moezip does not write"
    if kind == "yarn" and config.rope_parameters.get("attention_factor") is not None:
        yield "rope_parameters has an attention_factor of its own, which llama.cpp applies otherwise"
    if config.hidden_act not in ("silu", "swish"):
        yield f"its activation is {config.hidden_act!r}, llama.cpp's silu"
    if family.equal_heads and config.num_key_value_heads != config.num_attention_heads:
        yield f"{config.num_key_value_heads} key-value heads for {config.num_attention_heads} heads do not load there"
    if getattr(config, "clip_qkv", None):
        yield "clip_qkv bounds queries, keys and values, which llama.cpp does not do"
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
    if family.sliding:
        if types != ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]:
            yield "layers with and without a window do not alternate, as llama.cpp expects"
    elif window and window < config.max_position_embeddings and (not types or "sliding_attention" in types):
        yield f"it attends in windows of {window} tokens, llama.cpp to everything"


def difference(config: Config) -> str | None:
    """What llama.cpp computes a little otherwise, though it is the same model; None where nothing is known."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn" and not rope.get("truncate", True):
        return (
            "llama.cpp rounds the limits between which YaRN scales positions, which this model does not: logits differ "
            "a little more than by arithmetic"
        )
    return None

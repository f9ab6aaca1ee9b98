"""Random Qwen3-MoE checkpoints to measure speed and memory with, and random text of their vocabulary.

    python benchmarks/models.py large --work CACHE

Weights are random, so nothing here says anything about quality. Shards are written one decoder layer at a time. What
lies in the cache folder already is used again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one checkpoint: L layers, hidden D, E experts of width F of which k are chosen, vocabulary V."""

    layers: int
    hidden: int
    experts: int
    width: int
    top_k: int
    vocabulary: int = 2048
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64

    @property
    def layer_bytes(self) -> int:
        """One decoder layer in bf16."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + 2 * self.head_dim
        experts = self.experts * 3 * self.hidden * self.width
        return 2 * (attention + experts + self.experts * self.hidden + 2 * self.hidden)

    @property
    def bytes(self) -> int:
        """The whole model in bf16, embedding and head untied."""
        return self.layers * self.layer_bytes + 2 * (2 * self.vocabulary * self.hidden + self.hidden)


SHAPES = {
    # the job that llm-compressor's REAP was measured on
    "peer": Shape(layers=4, hidden=512, experts=32, width=256, top_k=4),
    "large": Shape(layers=8, hidden=1024, experts=64, width=512, top_k=8, heads=16),
}
DEPTHS = (4, 16, 48)
SHAPES |= {
    **{f"{name}-deep": replace(shape, layers=2 * shape.layers) for name, shape in SHAPES.items()},
    **{f"{name}-{layers}": replace(shape, layers=layers) for name, shape in SHAPES.items() for layers in DEPTHS},
}


def checkpoint(name: str, work: Path) -> Path:
    """The folder of the checkpoint called ``name``, made if it is not there."""
    folder = work / name
    if not (folder / "config.json").exists():
        unfinished = work / f"{name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(SHAPES[name], unfinished)
        unfinished.rename(folder)
    return folder


def text(tokens: int, vocabulary: int, work: Path) -> Path:
    """A .jsonl file with one document of at least ``tokens`` words, each of them one token."""
    file = work / f"text-{tokens}-{vocabulary}.jsonl"
    if not file.exists():
        chance = random.Random(0)
        words = " ".join(f"w{chance.randrange(1, vocabulary)}" for _ in range(tokens))
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")
    return file


def _write(shape: Shape, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random_matrix(rows: int, columns: int) -> torch.Tensor:
        # outputs keep the size of the inputs, so that no activation overflows or dies out over the layers
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    outer = {
        "model.embed_tokens.weight": random_matrix(shape.vocabulary, shape.hidden),
        "model.norm.weight": ones(shape.hidden),
        "lm_head.weight": random_matrix(shape.vocabulary, shape.hidden),
    }
    index: dict[str, str] = {}
    total = 0
    for shard in range(shape.layers + 1):
        tensors = outer if shard == shape.layers else _layer(shape, shard, random_matrix, ones)
        file = f"model-{shard + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _json(folder / "config.json", _config(shape))
    _json(folder / "generation_config.json", {"eos_token_id": 0})
    _tokenizer(shape, folder)


def _layer(shape: Shape, layer: int, matrix: Any, ones: Any) -> dict[str, torch.Tensor]:
    d, prefix = shape.hidden, f"model.layers.{layer}"
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {
        f"{prefix}.input_layernorm.weight": ones(d),
        f"{prefix}.post_attention_layernorm.weight": ones(d),
        f"{prefix}.self_attn.q_norm.weight": ones(shape.head_dim),
        f"{prefix}.self_attn.k_norm.weight": ones(shape.head_dim),
        f"{prefix}.self_attn.q_proj.weight": matrix(q, d),
        f"{prefix}.self_attn.k_proj.weight": matrix(kv, d),
        f"{prefix}.self_attn.v_proj.weight": matrix(kv, d),
        f"{prefix}.self_attn.o_proj.weight": matrix(d, q),
        f"{prefix}.mlp.gate.weight": matrix(shape.experts, d),
    }
    for expert in range(shape.experts):
        for role, rows, columns in (("gate", shape.width, d), ("up", shape.width, d), ("down", d, shape.width)):
            tensors[f"{prefix}.mlp.experts.{expert}.{role}_proj.weight"] = matrix(rows, columns)
    return tensors


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.width,
        "intermediate_size": 3 * shape.hidden,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _tokenizer(shape: Shape, folder: Path) -> None:
    """One token per word ``w1``, ``w2``, ...; token 0 ends a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {END_OF_TEXT: 0} | {f"w{i}": i for i in range(1, shape.vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES), metavar="NAME", help=", ".join(sorted(SHAPES)))
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    arguments = parser.parse_args()
    for name in arguments.names:
        shape = SHAPES[name]
        print(
            f"{checkpoint(name, arguments.work)}: {shape.bytes / 1e9:.2f} GB, {shape.layer_bytes / 1e9:.3f} GB a layer"
        )


if __name__ == "__main__":
    main()

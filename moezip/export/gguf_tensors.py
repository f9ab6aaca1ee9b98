"""A checkpoint's tensors as llama.cpp names and lays them out, each made piece by piece as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from moezip.arch.spec import Architecture, ExpertRole, ExpertTensor, LayerFacts
from moezip.checkpoint.source import Source
from moezip.errors import PlanError
from moezip.export.gguf_families import ATTENTION, Family
from moezip.plan.views import Split, split_roles

if TYPE_CHECKING:
    import torch

PIECE = 16 << 20  # elements of a matrix that are read at a time
# What a role of the experts is called; all experts of a layer are one tensor.
STACKS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
BUFFERS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's. shape: outermost first, as torch has it.
        pieces: gives it part by part along the first axis, floating.
        full: it stays in 32 bits whatever the file's type is (norms, biases, routers).
        expert: it holds routed experts. embedding: it is the embedding or the output matrix.
    """

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]
    full: bool = False
    expert: bool = False
    embedding: bool = False


def tensors(source: Source, entry: Architecture, family: Family, config: Any) -> Iterator[Written]:
    """The file's tensors.

    Args:
        source: plain numbers under the names that the family publishes.
        config: transformers' of it.

    Raises:
        PlanError: a tensor that llama.cpp has no place for.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    facts = {fact.layer: fact for fact in entry.layer_facts(source.config)}
    tied = bool(config.tie_word_embeddings)
    seen: set[tuple[int, ExpertTensor]] = set()
    for name in source.names():
        claim = entry.claim(name, source.config)
        if claim.kind == "extra" or name.endswith(BUFFERS) or (name == "lm_head.weight" and tied):
            continue
        if claim.kind in ("expert", "fused"):
            assert claim.layer is not None and isinstance(claim.tensor, ExpertTensor)
            if (claim.layer, claim.tensor) not in seen:
                seen.add((claim.layer, claim.tensor))
                yield from _stacks(source, claim.tensor, facts[claim.layer])
            continue
        if name.endswith("self_attn.kv_b_proj.weight") and family.latent:
            yield from _latent(source, name, names, config)
            continue
        written = _renamed(source, name, names, family, config)
        yield written
        if written.name == "token_embd.weight" and tied and family.own_head:
            yield Written("output.weight", written.shape, written.pieces, embedding=True)


def _renamed(source: Source, name: str, names: Any, family: Family, config: Any) -> Written:
    # two names of which the part after the last point is neither weight nor bias
    known = name.replace("e_score_correction_bias", "e_score_correction.bias")
    known = known + ".weight" if known.endswith(".sinks") else known
    target = names.get_name(known, try_suffixes=(".weight", ".bias"))
    module = name.rpartition(".")[0].rpartition(".")[2]
    if target is None or (name.endswith(".bias") and module in ATTENTION and module not in family.biases):
        raise PlanError(
            f"llama.cpp's {family.arch} has no place for the tensor {name}",
            where=source.folder,
            next="export it as plain numbers (--to safetensors), for other readers",
        )
    shape = source.spec(name).shape
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if family.permuted and module in heads:
        pieces = partial(_paired, source, name, heads[module])
    else:
        pieces = partial(_rows, source, name)
    return Written(
        target,
        shape,
        pieces,
        full=len(shape) < 2 or target.endswith(("norm.weight", ".bias", "ffn_gate_inp.weight", "_inp_shexp.weight")),
        embedding=target in ("token_embd.weight", "output.weight"),
    )


def _rows(source: Source, name: str) -> Iterator[torch.Tensor]:
    spec = source.spec(name)
    rows = spec.shape[0]
    step = max(1, PIECE * rows // max(1, spec.elements))
    for start in range(0, rows, step):
        yield source.read(name, range(start, min(rows, start + step)))


def _paired(source: Source, name: str, heads: int) -> Iterator[torch.Tensor]:
    """Rows of q or k so that the two numbers that are turned together lie side by side.

    transformers turns row i of a head with row i + half; llama.cpp's "norm" rope turns row 2i with row 2i + 1.
    """
    value = source.read(name)
    yield value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _latent(source: Source, name: str, names: Any, config: Any) -> Iterator[Written]:
    """The up-projection of the latent, per head: keys [latent, nope], multiplied into the query, and values."""
    heads, nope, values, latent = (
        config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank,
    )  # fmt: skip

    def part(keys: bool) -> Iterator[torch.Tensor]:
        both = source.read(name).unflatten(0, (heads, nope + values))
        yield both[:, :nope].transpose(1, 2) if keys else both[:, nope:]

    for module, shape in (("k_b_proj", (heads, latent, nope)), ("v_b_proj", (heads, values, latent))):
        target = names.get_name(name.replace("kv_b_proj", module), try_suffixes=(".weight",))
        yield Written(target, shape, partial(part, module == "k_b_proj"))


def _stacks(source: Source, tensor: ExpertTensor, fact: LayerFacts) -> Iterator[Written]:
    for role in split_roles(tensor):
        plain = role.removesuffix("_bias")
        bias = role != plain
        inner = fact.hidden if plain == "down" else fact.width
        shape: tuple[int, ...] = (fact.experts, inner)
        if not bias:
            shape += (fact.width if plain == "down" else fact.hidden,)
        yield Written(
            f"blk.{fact.layer}.{STACKS[plain]}.{'bias' if bias else 'weight'}",
            shape,
            partial(_experts, source, tensor, role, fact),
            full=bias,
            expert=True,
        )


def _experts(source: Source, tensor: ExpertTensor, role: str, fact: LayerFacts) -> Iterator[torch.Tensor]:
    """One role of a layer's experts, one expert at a time: [1, out, in], or [1, out] of a bias."""
    for expert in range(fact.experts):
        name = tensor.template.format(layer=fact.layer, expert=expert)
        if tensor.fused:
            value = Split(name, tensor, expert, cast(ExpertRole, role), None, fact.width).read(source)
        else:
            value = source.read(name)
        yield value[None]

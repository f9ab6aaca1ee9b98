"""GGUF files: names, shapes, values and metadata as llama.cpp reads them; with llama.cpp installed, its logits too."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.experts import decoded, read_expert
from moezip.arch.families import ARCHITECTURES, identify
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.demo import checkpoint as demo_checkpoint
from moezip.errors import CheckpointError, MoezipError, PlanError, UsageError
from moezip.export.gguf_families import FAMILIES
from moezip.export.gguf_vocabulary import vocabulary
from moezip.pipeline import Common, apply_command
from tests.command import Cli, tree
from tests.test_laws import full_logits, largest_difference, plain_rows
from tests.test_laws import load as load_stock
from tests.test_mone import uneven
from tests.test_ragged import kept_of, ragged
from tests.tiny import FAMILIES as EVERY

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from moezip.export.gguf import GGUFParams, encode, ready, write_gguf  # noqa: E402

Tiny = Callable[..., Path]
ROOT = Path(__file__).parents[1]
HELDOUT = ROOT / "moezip/demo/data/heldout"
# Tiny models as llama.cpp can load them: no key-value heads shared in olmoe, no groups of DeepSeek-V2's kind.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
FITTING: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "gpt_oss": {"rope_parameters": PLAIN},
}
families = pytest.mark.parametrize("name", FAMILIES)
# Both sides compute in 32 bits, with sums in another order, through three layers of random weights.
F32_TOLERANCE = 1e-4


def made(tiny: Tiny, name: str, **options: Any) -> Path:
    return tiny(name, tokenizer=False, **{**FITTING.get(name, {}), **options})


def written(folder: Path, out: Path, **params: Any) -> dict[str, Any]:
    """The file's tensors by name."""
    write_gguf(ready(Checkpoint.open(folder), GGUFParams(**{"pre": "none", **params})), out, {"version": "test"})
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}


def numbers(tensor: Any) -> np.ndarray[Any, Any]:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


# -- tensors ------------------------------------------------------------------------------------------------


@families
def test_every_expert_and_router_is_in_its_place(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, name)
    found = written(folder, tmp_path / "m.gguf", type="F32")
    source: Source = Checkpoint.open(folder)
    entry = identify(source.config)
    for fact in entry.layer_facts(source.config):
        stem = f"blk.{fact.layer}.ffn_"
        for number in range(fact.experts):
            expert = read_expert(source, entry, fact.layer, number)
            for role in ("gate", "up", "down"):
                stack = numbers(found[f"{stem}{role}_exps.weight"])
                assert np.array_equal(stack[number], getattr(expert, role).float().numpy()), (role, number)
                if getattr(expert, f"{role}_bias") is not None:
                    biases = numbers(found[f"{stem}{role}_exps.bias"])
                    assert np.array_equal(biases[number], getattr(expert, f"{role}_bias").float().numpy())
        router = source.read(entry.router[0].template.format(layer=fact.layer)).float().numpy()
        assert np.array_equal(numbers(found[f"{stem}gate_inp.weight"]), router)
    counted = sum(source.spec(each).elements for each in source.names())
    tied_head = (
        found["token_embd.weight"].n_elements if FAMILIES[name].own_head and "lm_head.weight" not in found else 0
    )
    assert sum(int(tensor.n_elements) for tensor in found.values()) in (counted, counted + tied_head)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_rows_of_q_and_k_lie_in_pairs(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, name)
    found = written(folder, tmp_path / "m.gguf", type="F32")
    source = Checkpoint.open(folder)
    half = 4  # heads of 8
    for module, heads in (("q", 4), ("k", 2)):
        stored = source.read(f"model.layers.1.self_attn.{module}_proj.weight").numpy()
        pairs = numbers(found[f"blk.1.attn_{module}.weight"])
        for head in range(heads):
            for i in range(half):
                assert np.array_equal(pairs[8 * head + 2 * i], stored[8 * head + i])
                assert np.array_equal(pairs[8 * head + 2 * i + 1], stored[8 * head + half + i])
    same = source.read("model.layers.1.self_attn.v_proj.weight").numpy()
    assert np.array_equal(numbers(found["blk.1.attn_v.weight"]), same)


def test_the_latent_projection_is_two(tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, "deepseek_v3")
    found = written(folder, tmp_path / "m.gguf", type="F32")
    both = Checkpoint.open(folder).read("model.layers.0.self_attn.kv_b_proj.weight").numpy()  # [heads * (8 + 8), 8]
    for head in range(4):
        rows = both[16 * head : 16 * head + 16]
        assert np.array_equal(numbers(found["blk.0.attn_k_b.weight"])[head], rows[:8].T)
        assert np.array_equal(numbers(found["blk.0.attn_v_b.weight"])[head], rows[8:])


def test_a_tied_head_is_written_where_llama_cpp_needs_one(tiny: Tiny, tmp_path: Path) -> None:
    found = written(made(tiny, "qwen2_moe", tie_word_embeddings=True), tmp_path / "a.gguf", type="F32")
    assert np.array_equal(numbers(found["output.weight"]), numbers(found["token_embd.weight"]))
    assert "output.weight" not in written(made(tiny, "qwen3_moe"), tmp_path / "b.gguf", type="F32")


def test_experts_are_read_one_at_a_time(tiny: Tiny) -> None:
    for name in ("qwen3_moe", "gpt_oss"):
        file = ready(Checkpoint.open(made(tiny, name)), GGUFParams(pre="none"))
        for tensor, _ in file.tensors:
            if tensor.expert:
                assert [piece.shape[0] for piece in tensor.pieces()] == [1] * tensor.shape[0]


# -- types --------------------------------------------------------------------------------------------------


def test_types_by_what_a_tensor_is(tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, "qwen3_moe", moe_intermediate_size=32)
    kinds = {name: tensor.tensor_type.name for name, tensor in written(folder, tmp_path / "m", type="Q4_0").items()}
    assert kinds["blk.0.ffn_up_exps.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert (
        kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_q_norm.weight"] == kinds["output_norm.weight"] == "F32"
    )
    kinds = {name: tensor.tensor_type.name for name, tensor in written(folder, tmp_path / "n", type="MXFP4").items()}
    assert (kinds["blk.0.ffn_up_exps.weight"], kinds["blk.0.attn_q.weight"]) == ("MXFP4", "F16")
    odd = ready(Checkpoint.open(made(tiny, "qwen3_moe")), GGUFParams("Q8_0", "none"))
    assert {kind for tensor, kind in odd.tensors if "down_exps" in tensor.name} == {"F16"}  # rows of 16
    assert any("3 matrices stay F16" in note for note in odd.notes)


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127), ("Q4_0", 8)])
def test_rounding_stays_within_a_step(kind: str, steps: int, tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, "mixtral", intermediate_size=32)
    found = written(folder, tmp_path / "m.gguf", type=kind)
    exact = written(folder, tmp_path / "x.gguf", type="F32")
    whole = numbers(exact["blk.1.ffn_up_exps.weight"]).reshape(-1, 32)
    error = abs(numbers(found["blk.1.ffn_up_exps.weight"]).reshape(-1, 32) - whole)
    step = abs(whole).max(axis=1, keepdims=True) / steps
    # Q4_0 has 8 steps on one side and 7 on the other, so its far end may lose a whole one; F16 scales lose 2^-11.
    assert (error <= step * (0.5 if kind == "Q8_0" else 1.0) + abs(whole) * 2**-10).all()
    assert error.max() > 0


def test_mxfp4_experts_keep_their_codes(tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, "gpt_oss", stored="mxfp4")
    found = written(folder, tmp_path / "m.gguf", type="MXFP4")
    source = decoded(Checkpoint.open(folder))
    expert = read_expert(source, ARCHITECTURES["gpt_oss"], 1, 3)
    assert np.array_equal(numbers(found["blk.1.ffn_down_exps.weight"])[3], expert.down.float().numpy())


def test_numbers_that_a_type_cannot_hold() -> None:
    with pytest.raises(CheckpointError, match="more than F16 can hold"):
        encode(torch.tensor([7e4]), "F16", "x")
    assert encode(torch.tensor([7e4]), "F32", "x")[0] == np.float32(7e4)
    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="not finite"):
            encode(torch.tensor([value]), "F32", "x")


# -- metadata and tokenizer ---------------------------------------------------------------------------------


def test_metadata_worked_by_hand(tiny: Tiny, tmp_path: Path) -> None:
    written(made(tiny, "deepseek_v3", rope_parameters={**YARN, "mscale_all_dim": 1.0}), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    own = {key.removeprefix("deepseek2."): value for key, value in found.items() if key.startswith("deepseek2.")}
    assert found["general.architecture"] == "deepseek2"
    wanted = {
        "block_count": 3, "context_length": 128, "embedding_length": 32, "feed_forward_length": 48, "vocab_size": 100,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 8 + 8,
        "attention.value_length": 8, "attention.key_length_mla": 8 + 8, "attention.value_length_mla": 8,
        "attention.kv_lora_rank": 8, "attention.q_lora_rank": 8, "rope.dimension_count": 8, "expert_count": 8,
        "expert_used_count": 2, "expert_shared_count": 1, "expert_group_count": 2, "expert_group_used_count": 1,
        "expert_feed_forward_length": 16, "expert_weights_norm": True, "expert_gating_func": 2,
        "leading_dense_block_count": 1, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32, "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {key: own[key] for key in wanted} == wanted
    assert own["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert found["tokenizer.ggml.model"] == "none"


def test_the_demo_tokenizer(tmp_path: Path) -> None:
    written(demo_checkpoint(), tmp_path / "m.gguf", pre="auto")
    found = fields(tmp_path / "m.gguf")
    stored = json.loads((demo_checkpoint() / "tokenizer.json").read_text())
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "refact")
    assert {token: place for place, token in enumerate(found["tokenizer.ggml.tokens"])} == stored["model"]["vocab"]
    assert len(found["tokenizer.ggml.merges"]) == len(stored["model"]["merges"])
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]  # two special ones, then words
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False


def tokenizer_file(folder: Path, **changes: Any) -> Path:
    shutil.copyfile(demo_checkpoint() / "tokenizer.json", folder / "tokenizer.json")
    whole = json.loads((folder / "tokenizer.json").read_text()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def test_rules_are_recognised_or_refused(tmp_path: Path) -> None:
    def name(*rules: dict[str, Any]) -> str:
        return vocabulary(
            tokenizer_file(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": list(rules)}), 4096
        ).pre

    assert name(split(QWEN2), BYTES) == "qwen2"
    assert name(split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), BYTES) == "llama-bpe"
    assert name({**BYTES, "use_regex": True}) == "gpt-2"
    with pytest.raises(PlanError, match=r"no name that moezip knows for its rules \(\\d\+, bytes\)"):
        name(split(r"\d+"), BYTES)
    assert vocabulary(tmp_path, 4096, "qwen2").pre == "qwen2"
    with pytest.raises(PlanError, match="the embedding only 4000 rows"):
        vocabulary(tmp_path, 4000, "qwen2")
    filled = vocabulary(tmp_path, 4099, "qwen2")
    assert filled.tokens[4096:] == ("[PAD4096]", "[PAD4097]", "[PAD4098]")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"no tokenizer\.json"):
        vocabulary(tmp_path, 4096)


def test_sentencepiece_tokens_have_scores(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "a": 4, "b": 5, "c": 6, "ab": 7, "abc": 8}
    model = {
        "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": ["a b", "ab c"],
    }  # fmt: skip
    added = [{"id": 1, "content": "<s>", "special": True}, {"id": 2, "content": "</s>", "special": True}]
    words = vocabulary(tokenizer_file(tmp_path, model=model, added_tokens=added, pre_tokenizer=None), 9)
    assert (words.model, words.pre) == ("llama", "")
    assert words.kinds == (2, 3, 3, 6, 1, 1, 1, 1, 1)  # unknown, control, control, byte, normal ...
    assert words.scores[7] > words.scores[8] > words.scores[4]
    assert words.space_first is False
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    assert vocabulary(tokenizer_file(tmp_path, model=model, added_tokens=added, pre_tokenizer=meta), 9).space_first


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "never divides"),
        ("qwen3_moe", {"norm_topk_prob": False}, "always divides"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"layers \[0, 2\] have no experts"),
        ("qwen3_moe", {"attention_bias": True}, "no place for the tensor"),
        ("olmoe", {"num_key_value_heads": 2}, "2 key-value heads for 4"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mixtral", {"sliding_window": 16}, "windows of 16"),
        ("deepseek_v2", {"n_group": 2, "topk_method": "group_limited_greedy"}, "best expert"),
        ("deepseek_v2", {"q_lora_rank": None}, "26, 27"),
        ("qwen3_moe", {"rope_parameters": {**PLAIN, "rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen3_moe", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "attention_factor"),
        ("glm4_moe", {}, "no GGUF of glm4_moe"),
    ],
)
def test_what_llama_cpp_computes_otherwise(name: str, options: dict[str, Any], words: str, tiny: Tiny) -> None:
    with pytest.raises(PlanError, match=words):
        ready(Checkpoint.open(made(tiny, name, **options)), GGUFParams(pre="none"))


def test_command_line(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    answer = cli("export", "demo", out, "--to", "gguf", "--set", "type=Q8_0", "--for", "llamacpp", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["form"] == "gguf"
    assert answer.json["bytes_after"] == out.stat().st_size
    assert tree(tmp_path) == ["m.gguf"]
    for words, code, said in (
        ((out,), 1, "the output exists"),
        ((tmp_path,), 1, "name a file"),
        ((tmp_path / "n", "--set", "type=Q3"), 2, "unknown type"),
        ((tmp_path / "n", "--set", "kind=F16"), 2, "unknown setting of gguf"),
        ((tmp_path / "n", "--for", "vllm"), 1, "what vLLM makes of them is not known"),
        ((tmp_path / "n", "--to", "gptq", "--set", "type=F16"), 2, "has no settings"),
    ):
        answer = cli("export", "demo", words[0], *(() if "--to" in words else ("--to", "gguf")), *words[1:])
        assert (answer.code, said in answer.err) == (code, True), answer.err
    assert tree(tmp_path) == ["m.gguf"]


def test_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moezip.export.gguf as module

    file = ready(Checkpoint.open(demo_checkpoint()), GGUFParams())

    def stop(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(file, tmp_path / "m.gguf", {})
    assert tree(tmp_path) == []


def test_ragged_and_mone_forms_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(made(tiny, "qwen3_moe"))
    uneven_layers = ragged(source.folder, tmp_path / "ragged", kept_of(source))
    with pytest.raises(PlanError, match="layers or experts differ"):
        ready(Checkpoint.open(uneven_layers), GGUFParams(pre="none"))
    plan = tmp_path / "plan.json"
    plan.write_text(uneven(source).to_json())
    apply_command(str(source.folder), plan, tmp_path / "mone", Common(), "vllm")
    with pytest.raises(PlanError, match="MoNE"):
        ready(Checkpoint.open(tmp_path / "mone"), GGUFParams(pre="none"))


def test_every_family_is_written_or_refused_by_name(tiny: Tiny) -> None:
    for name in set(EVERY) - set(FAMILIES):
        with pytest.raises(MoezipError, match=f"no GGUF of {name}"):
            ready(Checkpoint.open(tiny(name)), GGUFParams(pre="none"))
    with pytest.raises(UsageError, match="unknown type"):
        ready(Checkpoint.open(tiny("mixtral")), GGUFParams(type="Q5"))


# -- llama.cpp itself ---------------------------------------------------------------------------------------

PYTHON = os.environ.get("LLAMACPP_PYTHON") or (
    sys.executable if any(importlib.util.find_spec(each) for each in ("xllamacpp", "llama_cpp")) else None
)
runs_llama_cpp = pytest.mark.skipif(
    PYTHON is None, reason="llama.cpp is not installed (pip install xllamacpp, or LLAMACPP_PYTHON=ENV/bin/python)"
)


def llama_cpp(file: Path, rows: torch.Tensor, folder: Path, texts: list[str] | None = None) -> tuple[Any, Any]:
    """Logits [rows, length, vocabulary] by llama.cpp, and the tokens that it finds in texts."""
    np.save(folder / "rows.npy", rows.numpy())
    words = [str(file), str(folder / "rows.npy"), str(folder / "out.npy")]
    if texts is not None:
        (folder / "texts.json").write_text(json.dumps(texts))
        words += ["--text", str(folder / "texts.json")]
    ran = subprocess.run(
        [str(PYTHON), str(ROOT / "benchmarks/llamacpp_logits.py"), *words], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return torch.from_numpy(np.load(folder / "out.npy")), json.loads(ran.stdout) if texts is not None else None


@runs_llama_cpp
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FAMILIES),
        ("qwen3_moe", {"rope_parameters": YARN}),
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
        ("deepseek_v3", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
        ("mixtral", {"head_dim": 16}),
        ("qwen2_moe", {"tie_word_embeddings": True}),
    ],
)
def test_llama_cpp_computes_the_same(name: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    folder = made(tiny, name, **options)
    written(folder, tmp_path / "m.gguf", type="F32")
    rows = plain_rows()
    found, _ = llama_cpp(tmp_path / "m.gguf", rows.ids, tmp_path)
    assert largest_difference(full_logits(load_stock(folder), rows), list(found), rows) < F32_TOLERANCE


@runs_llama_cpp
def test_llama_cpp_cuts_text_into_the_same_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    written(demo_checkpoint(), tmp_path / "m.gguf", pre="auto")
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    texts = [json.loads(line)["text"] for file in sorted(HELDOUT.glob("*.jsonl")) for line in file.open()]
    _, found = llama_cpp(tmp_path / "m.gguf", torch.tensor([[5, 6]]), tmp_path, texts)
    for text, ids in zip(texts, found):
        assert ids == tokenizer(text, add_special_tokens=False).input_ids, text[:80]


@runs_llama_cpp
@pytest.mark.parametrize("space_first", [True, False])
def test_llama_cpp_merges_by_scores_as_by_merges(space_first: bool, tiny: Tiny, tmp_path: Path) -> None:
    """A SentencePiece-like tokenizer, trained here: the scores made of its merges give the same tokens."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    texts = [json.loads(line)["text"] for line in (HELDOUT / "scripture.jsonl").open()]
    core = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if space_first else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(texts, BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    folder = tmp_path / "model"
    shutil.copytree(made(tiny, "mixtral", vocab_size=700), folder)
    core.save(str(folder / "tokenizer.json"))
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"] = whole["added_tokens"][:3]  # bytes are no special tokens
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    written(folder, tmp_path / "m.gguf", pre="auto")
    _, found = llama_cpp(tmp_path / "m.gguf", torch.tensor([[5, 6]]), tmp_path, [*texts, "Größe, 漢字"])
    same = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids in zip([*texts, "Größe, 漢字"], found):
        assert ids == same.encode(text, add_special_tokens=False).ids, text[:80]

"""Text generation by llama.cpp; runs in an environment of its own (llama-cpp-python, gguf), driven by ``decode.py``.

    PEER/bin/python llamacpp_decode.py FILE.gguf --type Q4_0 --threads 1 --prompt 64

Makes FILE, unless it is there: a Qwen3-MoE of the shape of ``load.py``, of random blocks of one type in all matrices
but embedding, head and router, which are in 16 and 32 bits. Then every line read tells how many tokens to generate
after the prompt, greedily; the answer is a line with the seconds of the prompt and of the tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import numpy as np

# What decode.py asks for; not imported, because its package is not there.
LAYERS, HIDDEN, EXPERTS, WIDTH, TOP_K, VOCABULARY, HEADS, KV_HEADS, HEAD = 8, 2048, 64, 768, 8, 2048, 16, 4, 64


def blocks(kind: str, shape: tuple[int, ...], chance: np.random.Generator) -> np.ndarray:
    """Bytes of random blocks whose numbers have the deviation of a matrix that keeps the size of its inputs."""
    columns = shape[-1]
    if kind == "Q4_0":  # 32 numbers d (q - 8): d in fp16, 16 bytes of codes
        made = chance.integers(0, 256, (int(np.prod(shape)) // 32, 18), dtype=np.uint8)
        made[:, :2] = np.array([columns**-0.5 / 4.6], np.float16).view(np.uint8)
    else:  # Q2_K: 256 numbers d s q - m n: 16 bytes of s and n, 64 of codes, d and m in fp16
        made = chance.integers(0, 256, (int(np.prod(shape)) // 256, 84), dtype=np.uint8)
        made[:, :16] = 0xC8
        made[:, 80:] = np.array([columns**-0.5 / 9] * 2, np.float16).view(np.uint8)
    return made.reshape(*shape[:-1], -1)


def write(file: Path, kind: str) -> None:
    import gguf

    part = file.with_suffix(".part")
    out = gguf.GGUFWriter(part, "qwen3moe")
    out.add_block_count(LAYERS)
    out.add_context_length(4096)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(3 * HIDDEN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(10000.0)
    out.add_expert_count(EXPERTS)
    out.add_expert_used_count(TOP_K)
    out.add_expert_feed_forward_length(WIDTH)
    out.add_vocab_size(VOCABULARY)
    out.add_tokenizer_model("no_vocab")
    chance = np.random.default_rng(0)
    type_ = gguf.GGMLQuantizationType[kind]

    def packed(name: str, *shape: int) -> None:
        out.add_tensor(name, blocks(kind, shape, chance), raw_dtype=type_)

    def plain(name: str, *shape: int, dtype: type = np.float32) -> None:
        out.add_tensor(name, (chance.standard_normal(shape) * shape[-1] ** -0.5).astype(dtype))

    plain("token_embd.weight", VOCABULARY, HIDDEN, dtype=np.float16)
    plain("output.weight", VOCABULARY, HIDDEN, dtype=np.float16)
    out.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        for norm, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", HEAD), ("attn_k_norm", HEAD)):
            out.add_tensor(f"{at}{norm}.weight", np.ones(size, np.float32))
        packed(f"{at}attn_q.weight", HEADS * HEAD, HIDDEN)
        packed(f"{at}attn_k.weight", KV_HEADS * HEAD, HIDDEN)
        packed(f"{at}attn_v.weight", KV_HEADS * HEAD, HIDDEN)
        packed(f"{at}attn_output.weight", HIDDEN, HEADS * HEAD)
        plain(f"{at}ffn_gate_inp.weight", EXPERTS, HIDDEN)
        packed(f"{at}ffn_gate_exps.weight", EXPERTS, WIDTH, HIDDEN)
        packed(f"{at}ffn_up_exps.weight", EXPERTS, WIDTH, HIDDEN)
        packed(f"{at}ffn_down_exps.weight", EXPERTS, HIDDEN, WIDTH)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    part.rename(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=("Q4_0", "Q2_K"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--as-stored", action="store_true", help="no layouts of llama.cpp's own in memory")
    given = parser.parse_args()
    if not given.file.exists():
        write(given.file, given.type)

    import llama_cpp as llama

    llama.llama_backend_init()
    how = llama.llama_model_default_params()
    how.use_extra_bufts = not given.as_stored
    model = llama.llama_model_load_from_file(str(given.file).encode(), how)
    wanted = llama.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_threads, wanted.n_threads_batch = 512, 512, given.threads, given.threads
    context = llama.llama_init_from_model(model, wanted) if model else None
    if not context:
        sys.exit(f"llama.cpp does not load {given.file}")

    def taken(tokens: list[int]) -> int:
        """Puts tokens in; the next one."""
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            sys.exit("llama.cpp failed")
        found = np.ctypeslib.as_array(ctypes.cast(llama.llama_get_logits_ith(context, -1),
                                                  ctypes.POINTER(ctypes.c_float)), (VOCABULARY,))  # fmt: skip
        if not np.isfinite(found).all():
            sys.exit("llama.cpp computed what is no number")
        return int(found.argmax())

    print(llama.llama_print_system_info().decode().strip(), flush=True)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    for line in sys.stdin:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        begun = clock()
        token = taken([number % VOCABULARY for number in range(given.prompt)])
        middle = clock()
        for _ in range(int(line)):
            token = taken([token])
        print(middle - begun, clock() - middle, flush=True)


if __name__ == "__main__":
    main()

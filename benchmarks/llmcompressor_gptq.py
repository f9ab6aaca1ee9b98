"""GPTQ as llm-compressor 0.14 does it; runs in an environment of its own, started by ``peer_gptq.py``.

    PEER/bin/python llmcompressor_gptq.py CHECKPOINT OUT --text FILE.jsonl --windows 32 --seq-len 256 \
        --bits 4 --group 128
"""

from __future__ import annotations

import windows


def main() -> None:
    parser = windows.options(__doc__)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    given = parser.parse_args()

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    rows = windows.cut(given.text, tokenizer, given.windows, given.seq_len)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * given.seq_len for _ in rows]})
    weights = {"num_bits": given.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": given.group}
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype="auto")
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["lm_head", "re:.*mlp.gate$"],
        ),
        max_seq_length=given.seq_len,
        num_calibration_samples=given.windows,
        output_dir=str(given.out),
    )


if __name__ == "__main__":
    main()

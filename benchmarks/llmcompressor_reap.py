"""REAP as llm-compressor 0.14 does it; runs in an environment of its own, started by ``peer_reap.py``.

    PEER/bin/python llmcompressor_reap.py CHECKPOINT OUT --text FILE.jsonl --windows 32 --seq-len 256 --ratio 0.25

``load_quantizable_moe``, the advised way to load, needs torchvision even for text models. Where that is missing, the
model is loaded plainly and llm-compressor splits its experts afterwards, as its own fallback does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the windows are shared over the files")
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--batch", type=int, default=1, help="rows per batch; 1 is llm-compressor's default")
    parser.add_argument("--all-experts", action="store_true", help="its default, which REAP does not need")
    parser.add_argument("--kept", type=Path, required=True, help="JSON file for the experts that were kept")
    given = parser.parse_args()

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    rows: list[list[int]] = []
    for number, file in enumerate(given.text):
        windows = given.windows * (number + 1) // len(given.text) - given.windows * number // len(given.text)
        ids: list[int] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            if len(ids) >= windows * given.seq_len:
                break
        rows += [ids[i * given.seq_len : (i + 1) * given.seq_len] for i in range(windows)]
    if {len(row) for row in rows} != {given.seq_len}:
        raise SystemExit("the text is too short for that many windows")
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * given.seq_len for _ in rows]})
    try:
        import torchvision  # noqa: F401
        from llmcompressor.modeling.moe.linearize import load_quantizable_moe
        from transformers import Qwen3MoeForCausalLM

        with load_quantizable_moe(Qwen3MoeForCausalLM):
            model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype="auto")
    except ImportError:
        model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype="auto")
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=REAPPruningModifier(sparsity=given.ratio, report_path=str(given.kept)),
        batch_size=given.batch,
        num_calibration_samples=len(rows),
        max_seq_length=given.seq_len,
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=given.all_experts,
    )
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()

"""GPTQ as GPTQModel 7.7 does it; runs in an environment of its own, started by ``peer_gptq.py``.

    PEER/bin/python gptqmodel_gptq.py CHECKPOINT OUT --text FILE.jsonl --windows 32 --seq-len 256 \
        --bits 4 --group 128
"""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it, it stops on machines of two cores

import windows


def main() -> None:
    parser = windows.options(__doc__)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    given = parser.parse_args()

    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    rows = windows.cut(given.text, AutoTokenizer.from_pretrained(given.checkpoint), given.windows, given.seq_len)
    data = [{"input_ids": row, "attention_mask": [1] * given.seq_len} for row in rows]
    config = QuantizeConfig(bits=given.bits, group_size=given.group, device="cpu")
    model = GPTQModel.load(str(given.checkpoint), config)
    model.quantize(data, batch_size=1)
    model.save(str(given.out))


if __name__ == "__main__":
    main()

"""A trained model packed at several widths: text that it writes, how fast, and its held-out loss beside the original's.

    python benchmarks/written.py CKPT --calib calib --heldout heldout [--bits 4 3 2.5 2]

Whole widths are GPTQ's, every linear but routers, embeddings and head at that width; 2.5 bits and other mixed ones are
``--allocate lp``, which may drop experts. Each then continues the beginnings of held-out texts greedily, with
transformers' own ``generate``, in turns: tokens per second are medians of wall time. A model as small as the reference
model spends that on Python more than on matrices (``decode.py`` has a larger one). Markdown, then the text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import measure


def beginnings(files: list[Path], tokenizer: Any, tokens: int) -> list[Any]:
    """The first tokens of the first document of each file, [1, tokens]."""
    found = []
    for file in files:
        with file.open(encoding="utf-8") as lines:
            text = json.loads(next(lines))["text"]
            found.append(tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt").input_ids)
    return found


def written(model: Any, prompts: list[Any], tokens: int) -> tuple[float, list[Any]]:
    """Tokens per second, and the tokens."""
    import torch

    begun = time.perf_counter()
    with torch.inference_mode():
        found = [
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            for prompt in prompts
        ]
    return len(prompts) * tokens / (time.perf_counter() - begun), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.0])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=3_584, help="of each held-out file")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--write", type=int, default=40, help="tokens to write after each beginning")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    given = parser.parse_args()

    from transformers import AutoTokenizer

    import moezip
    from moezip.calibrate.data import domains_of
    from moezip.pipeline.common import Common
    from moezip.pipeline.evaluate import evaluate_command
    from moezip.pipeline.quantize import QuantizeJob, quantize_command

    calib, heldout = sorted(given.calib.iterdir()), sorted(given.heldout.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    prompts = beginnings(heldout, tokenizer, 24)
    common = Common(seq_len=given.seq_len)
    arms = {"original": moezip.load(given.checkpoint)}
    facts: dict[str, tuple[float, float, float]] = {}  # bits per packed weight, MB, loss
    with tempfile.TemporaryDirectory() as work:
        for bits in given.bits:
            out = Path(work) / f"{bits:g}"
            asked: dict[str, Any] = {"bits": bits, "allocate": "lp"}
            if bits.is_integer():
                width = f"{bits:g}"
                asked = {"bits": bits, "settings": {"attention": width, "shared": width, "dense": width}}
            measure.say(f"{bits:g} bits")
            job = QuantizeJob(texts=domains_of(calib, given.tokens), **asked)
            report = quantize_command(str(given.checkpoint), out, job, common).report
            assert report is not None  # there is none of a plan alone
            found = evaluate_command(str(out), common, against=str(given.checkpoint), data=heldout,
                                     tokens=given.heldout_tokens).to_json()  # fmt: skip
            facts["original"] = 16, report.bytes_before / 1e6, found["against"]["nll"]
            facts[f"{bits:g} bits"] = report.bits_per_weight, report.bytes_after / 1e6, found["nll"]
            arms[f"{bits:g} bits"] = moezip.load(out)
        for model in arms.values():
            written(model, prompts[:1], 2)  # whatever is done at first use
        runs = measure.in_turns(
            given.rounds, {name: partial(written, model, prompts, given.write) for name, model in arms.items()}
        )
    first, rows, texts = runs["original"], [], []
    for name, run in runs.items():
        speed, same = measure.median([one for one, _ in run]), 0
        for mine, theirs in zip(run[0][1], first[0][1]):
            same += int((mine == theirs).all())
        bits, size, loss = facts[name]
        rows.append((name, f"{bits:.2f}", f"{size:.2f}", f"{loss:.4f}", f"{loss - facts['original'][2]:+.4f}",
                     f"{speed:.0f}", f"{same} of {len(prompts)}"))  # fmt: skip
        texts.append(f"{name}: {tokenizer.decode(run[0][1][0][0])!r}")
    head = ("model", "bits per packed weight", "MB", "held-out loss", "rise", "tokens/s", "same text as the original")
    print(measure.table(head, rows), "", *texts, sep="\n")
    speeds = {name: [one for one, _ in run] for name, run in runs.items()}
    measure.save(given.json, {"written": {"facts": facts, "texts": texts, "speed": speeds}})


if __name__ == "__main__":
    main()

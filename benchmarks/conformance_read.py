"""The held-out loss of checkpoints by one reader; runs in an environment that holds that reader, without moezip.

    ENV/bin/python benchmarks/conformance_read.py transformers|gptqmodel|mlx ROWS.npy CHECKPOINT...

ROWS.npy holds token ids [rows, length]; the first of each row is not scored. Prints one JSON line per checkpoint:
``nll`` (nats per token), or ``error`` with the reader's own words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rows = np.ndarray[Any, Any]


class RandomTensorsError(RuntimeError):
    """A reader found no numbers for some tensors, and went on with random ones."""


def transformers(checkpoint: str, rows: Rows) -> float:
    from transformers import AutoModelForCausalLM

    path = Path(checkpoint)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype="auto", output_loading_info=True)
    model, info = loaded
    missing = sorted(map(str, info["missing_keys"]))
    loss = _torch_loss(model, rows)
    if missing:
        raise RandomTensorsError(f"{len(missing)} tensors are random ({missing[0]}, ...): {loss:.3f}")
    return loss


def gptqmodel(checkpoint: str, rows: Rows) -> float:
    from gptqmodel import BACKEND, GPTQModel

    return _torch_loss(GPTQModel.load(checkpoint, device="cpu", backend=BACKEND.TORCH).model, rows)


def mlx(checkpoint: str, rows: Rows) -> float:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    try:
        model, _ = load_model(Path(checkpoint))
    except TypeError as missing:  # it knows two fields by the names that transformers 4 gave them
        config = json.loads((Path(checkpoint) / "config.json").read_text())
        if "rope_parameters" not in config:
            raise
        told = {"rope_theta": config["rope_parameters"]["rope_theta"]}
        told |= {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
        print(f"NOTE {missing}: given {told}", flush=True)
        model, _ = load_model(Path(checkpoint), model_config=told)
    model.set_dtype(mx.float32)  # on the CPU it multiplies experts in no other
    losses = []
    for row in rows:
        scores = np.array(model(mx.array(row[None].astype(np.int32)))[0].astype(mx.float32))
        losses.append(nll(scores, row))
    return float(np.mean(losses))


def _torch_loss(model: Any, rows: Rows) -> float:
    import torch

    losses = []
    for row in torch.from_numpy(rows):
        with torch.no_grad():
            losses.append(nll(model(input_ids=row[None]).logits[0].float().numpy(), row.numpy()))
    return float(np.mean(losses))


def nll(logits: Rows, row: Rows) -> float:
    """Mean loss of a row from its logits [length, vocabulary], in nats per token."""
    shifted = logits[:-1].astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    right = np.take_along_axis(shifted, row[1:, None].astype(np.int64), axis=-1)[:, 0]
    return float((np.log(np.exp(shifted).sum(axis=-1)) - right).mean())


READERS: dict[str, Callable[[str, Rows], float]] = {"transformers": transformers, "gptqmodel": gptqmodel, "mlx": mlx}


def main() -> None:
    reader, rows = READERS[sys.argv[1]], np.load(sys.argv[2])
    for checkpoint in sys.argv[3:]:
        found: dict[str, Any] = {"checkpoint": checkpoint}
        try:
            found["nll"] = reader(checkpoint, rows)
        except Exception as error:  # whatever a reader raises is what is to be shown
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            found["error"] = f"{type(error).__name__}: {lines[0]}"
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

"""The streamed gradient against a plain backward of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moezip.calibrate.backward import Backward
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import register
from moezip.calibrate.record import GRADIENT_RECORDS
from moezip.calibrate.stream import Stream
from moezip.calibrate.trace import Trace
from moezip.checkpoint.reader import Checkpoint
from tests.tiny import FAMILIES, token_ids

# float32 sums in another order; the law's own bound.
RELATIVE = 1e-5


def rows_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Rows:
    return Rows(ids, mask, ("text",) * len(ids))


def streamed(folder: Path, rows: Rows, work: Path, **options: Any) -> Backward:
    with Checkpoint.open(folder) as source:
        # a quarter of 8: micro-batches of two rows, the last of one
        found = Backward(Stream(source, dtype=torch.float32, micro_rows=8), rows, work, **options)
        found.run()
    return found


def whole(folder: Path, rows: Rows, layers: list[int], entry: Any) -> tuple[float, dict[int, dict[str, np.ndarray]]]:
    """Loss and sums from one backward of the model in memory, expert by expert, in float64 where sums are made."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=register()
    ).eval().requires_grad_(False)  # fmt: skip
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # off the mapped file, whose addresses change the last bit of products
    traces = {}
    for layer in layers:
        block = model.get_submodule(entry.layers)[layer].get_submodule(entry.block)
        experts = block.get_submodule(entry.experts_module)
        traces[layer] = experts._moezip_trace = Trace()
    embedded = model.get_input_embeddings()(rows.ids).detach().requires_grad_()
    mask = None if rows.mask is None else rows.mask.long()
    logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows.ids[:, 1:], reduction="none")
    if rows.mask is not None:
        losses = losses[rows.mask[:, :-1] & rows.mask[:, 1:]]
    loss = losses.sum()
    loss.backward()
    sums: dict[int, dict[str, np.ndarray]] = {}
    for layer, trace in traces.items():
        here = sums.setdefault(layer, {})
        for part in trace.parts:
            count = part.slots.numel()
            token = part.slots // trace.ids.shape[1]
            real = slice(None) if rows.mask is None else rows.mask.reshape(-1)[token]
            u = part.inner.detach()[:count].double()[real]
            v = part.inner.grad[:count].double()[real]
            squares = {"inner_square": u**2, "inner_grad_square": v**2, "inner_product_square": (u * v) ** 2}
            for name, value in squares.items():
                here.setdefault(name, np.zeros((64, u.shape[1])))[part.expert] = value.sum(0).numpy()
    return loss.item(), sums


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_a_plain_backward(name: str, tiny: Any, tmp_path: Path) -> None:
    rows = rows_of(token_ids(5, 12))
    found = streamed(tiny(name), rows, tmp_path)
    entry, facts = found._entry, list(found._facts.values())
    loss, sums = whole(tiny(name), rows, [fact.layer for fact in facts], entry)
    assert found.losses["text"] == pytest.approx(loss, rel=RELATIVE)
    assert found.scored == {"text": 5 * 11}
    assert list(tmp_path.iterdir()) == []
    for fact in facts:
        mine = found.sums["text"][fact.layer]
        assert set(mine) == {record.name for record in GRADIENT_RECORDS}
        assert mine["routed"].sum() == 5 * 12 * fact.top_k
        for key in ("inner_square", "inner_grad_square", "inner_product_square"):
            # norms over the tokens, not their squares, whose relative error is twice that of what was squared; of the
            # product u v both factors may be off
            own, theirs = np.sqrt(mine[key]), np.sqrt(sums[fact.layer][key][: fact.experts])
            bound = 2 * RELATIVE if key == "inner_product_square" else RELATIVE
            assert theirs.max() > 0
            assert np.abs(own - theirs).max() <= bound * theirs.max(), key

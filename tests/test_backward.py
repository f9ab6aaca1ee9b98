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
# A float32 sum of some dozen positive terms, each rounded twice.
FLOAT32_SUM = 1e-5


def rows_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Rows:
    return Rows(ids, mask, ("text",) * len(ids))


class Watched(Backward):
    """Keeps u and v of every token, expert and neuron, by layer: two float64 arrays [T, E, F], NaN where not chosen."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        tokens = self.rows.ids.numel()
        self.inner = {
            fact.layer: np.full((2, tokens, fact.experts, fact.width), np.nan) for fact in self._facts.values()
        }

    def _step(self, index: int, inputs: Any, given: Any, ids: Any, start: int) -> Any:
        scale, gradients = super()._step(index, inputs, given, ids, start)
        if ids is not None:
            spread(self._trace, self.inner[index][:, start * self.rows.ids.shape[1] :], scale)
        return scale, gradients


def spread(trace: Trace, into: np.ndarray, scale: float = 1.0) -> None:
    for part in trace.parts:
        count, token = part.slots.numel(), part.slots // trace.ids.shape[1]
        into[0, token, part.expert] = part.inner.detach()[:count].double()
        into[1, token, part.expert] = part.inner.grad[:count].double() / scale


def streamed(folder: Path, rows: Rows, work: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Watched:
    with Checkpoint.open(folder) as source:
        # a quarter of 8: micro-batches of two rows, the last of one
        found = Watched(Stream(source, dtype=dtype, micro_rows=8), rows, work, **options)
        found.run()
    return found


def whole(folder: Path, rows: Rows, like: Watched) -> tuple[float, dict[int, np.ndarray]]:
    """Loss, and u and v as ``Watched`` has them, from one backward of the model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=register()
    ).eval().requires_grad_(False)  # fmt: skip
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # off the mapped file, whose addresses change the last bit of products
    traces, entry = {}, like._entry
    for layer in like.inner:
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
    found = {layer: np.full_like(inner, np.nan) for layer, inner in like.inner.items()}
    for layer, trace in traces.items():
        spread(trace, found[layer])
    return loss.item(), found


def error_by_expert(own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative error of [T, E, F], as norms over tokens and neurons, [E]; 0 for an expert that nobody chose."""
    difference = np.sqrt(np.nansum((own - wanted) ** 2, (0, 2)))
    size = np.sqrt(np.nansum(wanted**2, (0, 2)))
    return difference / np.where(size > 0, size, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_a_plain_backward(name: str, tiny: Any, tmp_path: Path) -> None:
    rows = rows_of(token_ids(5, 12))
    found = streamed(tiny(name), rows, tmp_path)
    loss, wanted = whole(tiny(name), rows, found)
    assert found.losses["text"] == pytest.approx(loss, rel=RELATIVE)
    assert found.scored == {"text": 5 * 11}
    assert list(tmp_path.iterdir()) == []
    for layer, (u, v) in found.inner.items():
        assert (np.isnan(u) == np.isnan(wanted[layer][0])).all()  # the same experts
        print(name, layer, error_by_expert(u, wanted[layer][0]).max(), error_by_expert(v, wanted[layer][1]).max())
        assert (np.nansum(v**2, (0, 2)) > 0).any()
        assert error_by_expert(u, wanted[layer][0]).max() < RELATIVE
        assert error_by_expert(v, wanted[layer][1]).max() < RELATIVE


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_sums_are_those_of_activations_and_gradients(name: str, tiny: Any, tmp_path: Path) -> None:
    found = streamed(tiny(name), rows_of(token_ids(5, 12)), tmp_path)
    for layer, (u, v) in found.inner.items():
        mine = found.sums["text"][layer]
        assert set(mine) == {record.name for record in GRADIENT_RECORDS}
        assert (mine["routed"] == (~np.isnan(u[:, :, 0])).sum(0)).all()
        squares = {"inner_square": u**2, "inner_grad_square": v**2, "inner_product_square": (u * v) ** 2}
        for key, value in squares.items():
            assert np.allclose(mine[key], np.nansum(value, 0), rtol=FLOAT32_SUM, atol=0), key

"""Attention of one new token on the CPU against float64, and against torch's own in a model that generates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moezip
from moezip.kernels import products
from moezip.runtime import one_query
from tests.command import Cli

Tiny = Callable[..., Path]
# bf16 has 8 significant bits; results are rounded to it once. Sums that nearly cancel keep the error of their terms, of
# size 1 and in float32, which is far below an eighth of that.
ROUNDED = 2.0**-8
# Logits of a tiny bf16 model whose attention was rounded in other places differ by up to 0.05 (measured); without the
# mask by 0.57 at least.
LOGITS = 0.1


def true(query: Any, key: Any, value: Any, looks: Any, scaling: float) -> torch.Tensor:
    """Head by head in float64; ``looks``: [n, H, S] whether a token is looked at."""
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    per = query.shape[1] // key.shape[1]
    for n in range(query.shape[0]):
        for head in range(query.shape[1]):
            products = (key[n, head // per].double() @ query[n, head, 0].double()) * scaling
            weights = torch.exp(products - products.max()) * looks[n, head]
            out[n, head, 0] = (weights / weights.sum()) @ value[n, head // per].double()
    return out


def test_by_hand() -> None:
    """Products ln 3 and 0 are weights 3/4 and 1/4: 0.75 of 4 and 0.25 of 8 are 5. Without the second token, 4."""
    query = torch.tensor([[[[1.0]]]], dtype=torch.bfloat16)
    key, value = torch.tensor([[[[math.log(3)], [0.0]]]]), torch.tensor([[[[4.0], [8.0]]]])
    assert one_query.one_query(query.float(), key, value, None, 1.0).item() == pytest.approx(5.0)
    hidden = torch.tensor([[[[True, False]]]])
    assert one_query.one_query(query.float(), key, value, hidden, 1.0).item() == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "shared", "length", "width", "out"),
    [(1, 1, 1, 1, 8, 8), (1, 4, 4, 17, 16, 16), (2, 6, 2, 33, 8, 24), (3, 8, 1, 129, 32, 8)],
)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "by head", "longer"])
def test_it_is_what_float64_gives(
    batch: int, heads: int, shared: int, length: int, width: int, out: int, mask: str, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(batch, each, tokens, size, generator=random).to(dtype)
        for each, tokens, size in ((heads, 1, width), (shared, length, width), (shared, length, out))
    )
    looks = torch.rand(batch, heads if mask == "by head" else 1, 1, length, generator=random) > 0.3
    looks[..., -1] = True  # a token looks at itself
    looks = looks | (mask == "none")
    given: Any = None if mask == "none" else looks
    if mask == "float":
        given = torch.where(looks, 0.0, torch.finfo(dtype).min).to(dtype)
    if mask == "longer":  # a cache of a fixed size has places that are not in use
        given = torch.cat([looks, torch.zeros(batch, 1, 1, 5, dtype=torch.bool)], -1)
    wanted = true(query, key, value, looks.expand(batch, heads, 1, length)[:, :, 0], width**-0.5)
    found = one_query.one_query(query, key, value, given, None)
    assert found.dtype == dtype and found.shape == (batch, heads, 1, out)
    torch.testing.assert_close(found.double(), wanted, rtol=ROUNDED, atol=ROUNDED / 8)
    on_library = one_query.on_the_library(query, key, value, given, None)
    if dtype == torch.float16 or not products.available():
        assert on_library is None
        return
    assert on_library is not None
    torch.testing.assert_close(on_library.transpose(1, 2).double(), wanted, rtol=ROUNDED, atol=ROUNDED / 8)


def test_anything_else_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, float32, gradients, dropout: nothing of them is computed here."""

    def refuse(*_: Any) -> None:
        raise AssertionError("computed here")

    monkeypatch.setattr(one_query, "one_query", refuse)
    monkeypatch.setattr(one_query, "on_the_library", refuse)
    module = torch.nn.Module()
    key = value = torch.ones(1, 1, 3, 8, dtype=torch.bfloat16)
    one, many = key[:, :, :1], key
    with torch.no_grad():
        for query, keys, more in (
            (many, key, {}), (one.float(), key.float(), {}), (one, key, {"dropout": 0.5}),
            (one, key, {"position_bias": torch.zeros(1, 1, 1, 3, dtype=torch.bfloat16)}),
        ):  # fmt: skip
            one_query.attention(module, query, keys, keys, None, **more)
        with pytest.raises(AssertionError, match="computed here"):
            one_query.attention(module, one, key, value, None)
    one_query.attention(module, one, key, value, None)  # gradients may be wanted


def test_masks_that_do_not_fit_are_not_read() -> None:
    """Fewer places than keys, or another number of sequences or heads: torch says what is wrong with them."""
    query, key = torch.ones(2, 4, 1, 8).bfloat16(), torch.ones(2, 2, 5, 8).bfloat16()
    for shape in ((2, 1, 1, 4), (3, 1, 1, 5), (2, 2, 1, 5), (2, 1, 2, 5)):
        assert one_query.on_the_library(query, key, key, torch.ones(shape, dtype=torch.bool), None) is None
    if products.available():
        for shape in ((2, 1, 1, 5), (1, 4, 1, 9)):
            assert one_query.on_the_library(query, key, key, torch.ones(shape, dtype=torch.bool), None) is not None


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_packed_model_generates_with_it(family: str, tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    """Logits of a new token behind prompts of different lengths are those that torch's own attention gives."""
    source = tiny(family, dtype="bfloat16")
    done = cli("quantize", source, tmp_path / "out", "--solver", "rtn", "--bits", 8, "--group-size", 0)
    assert done.code == 0, done.err
    model = moezip.load(tmp_path / "out")
    assert model.config._attn_implementation == one_query.NAME and "one_query" not in model.config.to_json_string()
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0

    def steps() -> tuple[torch.Tensor, list[torch.Tensor]]:
        found: Any = model.generate(
            ids, attention_mask=padded, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return found.sequences, found.logits

    seen: list[bool] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            found = real(*given)
            seen.append(found is not None)
            return found

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("one_query", "on_the_library"):  # the first one where there is no library
            patch.setattr(one_query, name, counted(getattr(one_query, name)))
        tokens, logits = steps()
    assert sum(seen) == model.config.num_hidden_layers  # the first new token is the prompt's
    model.set_attn_implementation("sdpa")
    theirs, wanted = steps()
    assert torch.equal(logits[0], wanted[0]) and torch.equal(tokens[:, :-1], theirs[:, :-1])
    torch.testing.assert_close(logits[1], wanted[1], rtol=0, atol=LOGITS)


def test_other_models_stay_as_they_are(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    """``eager`` was asked for, stock checkpoints are not packed, and gpt_oss attends in a way that sdpa cannot."""
    from transformers import AutoModelForCausalLM

    assert moezip.load(tiny("qwen3_moe", dtype="bfloat16")).config._attn_implementation == "sdpa"
    for family, more in (("qwen3_moe", {"attn_implementation": "eager"}), ("gpt_oss", {})):
        out = tmp_path / family
        done = cli("quantize", tiny(family, dtype="bfloat16"), out, "--solver", "rtn", "--bits", 8, "--group-size", 0)
        assert done.code == 0, done.err
        assert AutoModelForCausalLM.from_pretrained(out, **more).config._attn_implementation == "eager"

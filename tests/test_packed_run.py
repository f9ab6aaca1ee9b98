"""Packed models on the C++ kernels: every family runs as its decoded form does, however it is asked."""

from __future__ import annotations

import copy
import mmap
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import moezip
from moezip.arch.families import ARCHITECTURES
from moezip.arch.ragged import RaggedExperts
from moezip.errors import UsageError
from moezip.formats.packed import Grid
from moezip.kernels import products
from moezip.pipeline.items import Item
from moezip.runtime import fast, linear
from moezip.runtime.linear import PackedExperts, PackedLinear, set_activations
from moezip.runtime.mapped import give_back
from moezip.runtime.packing import packed_modules
from tests.test_kernels import native
from tests.test_packed_runtime import all_alike, packed
from tests.test_ragged import everything

Tiny = Callable[..., Path]
families = pytest.mark.parametrize("name", ARCHITECTURES)

# fp32 sums in another order, of the largest number, through one layer; and through three of them, with their norms.
FP32 = 2e-5
LOGITS = 1e-3
# bf16 between the layers' products here, fp32 there.
BF16 = 2e-2


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing in this file is slow unless it says so: warnings are faults."""
    native()
    monkeypatch.setattr(fast, "_told", set())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    return bool((found.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max())


def experts_of(model: Any) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def routed(module: PackedExperts, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    k = min(2, module.num_experts)
    ids = torch.stack([torch.randperm(module.num_experts)[:k] for _ in range(tokens)])
    return torch.randn(tokens, module.hidden_dim, dtype=dtype), ids, torch.rand(tokens, k, dtype=dtype)


def test_nobody_runs_and_no_one_else_is_taken_for_it(tiny: Tiny, tmp_path: Path) -> None:
    """The id of run-time skipping's nobody is left out; one beyond it is a fault. Gate weights may be bf16."""
    module = experts_of(moezip.load(packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path, all_alike, everything)))[0]
    assert module.lay_out() and module._table is not None and module._gate is not None
    x, ids, weights = routed(module, 5, torch.bfloat16)
    given = module._gate, "exact"
    whole = fast.experts(module._table, x, ids, weights, *given)
    assert torch.equal(whole, fast.experts(module._table, x, ids, weights.float(), *given))
    nobody = ids.clone()
    nobody[:, 1] = module.num_experts
    none = weights.clone()
    none[:, 1] = 0
    assert torch.equal(
        fast.experts(module._table, x, nobody, weights, *given), fast.experts(module._table, x, ids, none, *given)
    )
    with pytest.raises(ValueError, match="beyond the last"):
        fast.experts(module._table, x, nobody + 1, weights, *given)


@families
def test_every_family(name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of experts of any widths and grids, some not packed; then the whole model."""
    model = moezip.load(packed(tiny(name, dtype="float32"), tmp_path))
    for module in experts_of(model):
        assert module.lay_out()
        for tokens in (1, 5):
            given = routed(module, tokens, torch.float32)
            assert near(module(*given), RaggedExperts.plain(module, *given), FP32)
    assert all(module.matrix is not None for _, module in packed_modules(model))
    prompt = torch.arange(24).view(2, 12) % 90 + 5
    found = model(prompt).logits
    monkeypatch.setattr(products, "available", lambda: False)
    decoded = moezip.load(tmp_path / "packed")
    assert all(module.matrix is None for _, module in packed_modules(decoded))
    assert near(found, decoded(prompt).logits, LOGITS)


@families
def test_generates_with_padding_and_cache(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Greedy tokens of a batch with padding on the left are those of its rows alone, with a cache and without."""
    model = moezip.load(packed(tiny(name, dtype="float32"), tmp_path, all_alike, everything))
    short, long = torch.tensor([[7, 8, 9]]), torch.tensor([[5, 6, 7, 8, 11]])
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(row, **how)[0, row.shape[1] :].tolist() for row in (short, long)]
    assert model.generate(long, use_cache=False, **how)[0, 5:].tolist() == alone[1]
    batch, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    batch[0, 2:], batch[1], mask[0, :2] = short, long, 0
    assert model.generate(batch, attention_mask=mask, **how)[:, 5:].tolist() == alone


def four_bits(items: list[Item]) -> dict[str, Grid]:
    return {item.name: Grid(4, 0) for item in items}


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Any:
    return moezip.load(packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path, four_bits, everything))


def test_experts_with_many_tokens_are_decoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "crossover", {torch.bfloat16: 32}.get)
    module = experts_of(model)[0]
    given = routed(module, 150, torch.bfloat16)
    given[1][:100] = torch.tensor([1, 2])  # these two have more than 32 tokens whatever the others have
    calls: list[int] = []
    own = PackedExperts.expert_linear
    monkeypatch.setattr(
        PackedExperts, "expert_linear", lambda self, name, e, x: calls.append(e) or own(self, name, e, x)
    )
    found = module(*given)
    assert {1, 2} <= set(calls) and len(set(calls)) < module.num_experts
    assert near(found, RaggedExperts.plain(module, *given), BF16)
    calls.clear()
    module.activations = "int8"  # whole numbers are as fast for many tokens
    assert near(module(*given), found, 0.05) and not calls


def test_linears_with_many_tokens_are_decoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "crossover", {torch.bfloat16: 32}.get)
    one = next(module for module in model.modules() if isinstance(module, PackedLinear))
    x = torch.randn(3, 40, one.columns, dtype=torch.bfloat16)
    found = one(x)
    assert found.shape == (3, 40, one.rows) and found.dtype == x.dtype
    assert torch.equal(found, torch.nn.functional.linear(x, one.decoded(x.dtype), one.bias))
    few = torch.cat([one(x[:, i : i + 1]) for i in range(40)], dim=1)
    assert near(few, found, 2**-7)
    assert near(one(x.half()[:1, :1]), few[:1, :1], 2**-7) and one(x.half()[:1, :1]).dtype == torch.float16
    assert one(x[:0]).shape == (0, 40, one.rows)


def test_whole_numbers_by_a_switch(tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny("qwen3_moe", dtype="float32"), tmp_path, four_bits, everything)
    exact, coarse = moezip.load(folder), moezip.load(folder, activations="int8")
    x = torch.randn(2, 32)
    one, two = (model.model.layers[0].self_attn.q_proj(x) for model in (exact, coarse))
    # half a step of 127 on either side, the errors of 32 columns added up as a random walk
    assert not torch.equal(one, two) and near(two, one, 0.02)
    set_activations(coarse, "exact")
    assert torch.equal(coarse.model.layers[0].self_attn.q_proj(x), one)
    with pytest.raises(UsageError, match="int4"):
        moezip.load(folder, activations="int4")
    with pytest.raises(UsageError, match="int4"):
        set_activations(exact, "int4")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(model: Any, backend: str) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = model(prompt, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    assert near(compiled(prompt, use_cache=False).logits, wanted, BF16)
    layer = torch.compile(model.model.layers[0].mlp.experts, backend=backend, fullgraph=True)
    given = routed(experts_of(model)[0], 3, torch.bfloat16)
    assert torch.equal(layer(*given), experts_of(model)[0](*given))


def test_operators_are_sound(model: Any) -> None:
    one, experts = model.model.layers[0].self_attn.q_proj, experts_of(model)[0]
    checks = ("test_schema", "test_faketensor")
    x = torch.randn(3, one.columns, dtype=torch.bfloat16)
    torch.library.opcheck(fast.packed_linear_op, (x, one.number, one.rows), test_utils=checks)
    given = routed(experts, 3, torch.bfloat16)
    torch.library.opcheck(fast.packed_experts_op, (*given, experts.number), test_utils=checks)


def test_from_several_threads_before_anything_is_laid_out(tiny: Tiny, tmp_path: Path) -> None:
    model = moezip.load(packed(tiny("qwen3_moe", dtype="float32"), tmp_path, four_bits, everything))
    wanted = model(torch.tensor([[5, 6, 7]])).logits
    model.to(torch.float32)  # which brings the codes back
    assert all(module.matrix is None for _, module in packed_modules(model))

    def run(_: int) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[5, 6, 7]])).logits  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        assert all(near(each, wanted, FP32) for each in pool.map(run, range(8)))


def test_copies_and_weights_loaded_anew(model: Any) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    wanted, state = model(prompt).logits, model.state_dict()
    other = copy.deepcopy(model)
    assert torch.equal(other(prompt).logits, wanted)
    both = [*model.modules(), *other.modules()]
    numbers = [module.number for module in both if isinstance(module, PackedLinear | PackedExperts)]
    assert len(set(numbers)) == len(numbers)
    changed = {name: tensor + 1 if name.endswith("q_proj.weight_scale") else tensor for name, tensor in state.items()}
    other.load_state_dict(changed)
    assert not torch.equal(other(prompt).logits, wanted) and torch.equal(model(prompt).logits, wanted)
    other.load_state_dict(state)
    assert torch.equal(other(prompt).logits, wanted)
    again = other.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_gradients_pass_through_decoded_matrices_and_it_is_said_once(model: Any) -> None:
    module = experts_of(model)[0]
    hidden, ids, weights = routed(module, 2, torch.bfloat16)
    hidden.requires_grad_()
    with torch.enable_grad(), pytest.warns(RuntimeWarning, match="gradients are wanted") as said:
        module(hidden, ids, weights).float().sum().backward()
        module(hidden, ids, weights)
    assert len(said) == 1 and hidden.grad is not None and bool(hidden.grad.any())


def test_an_unknown_gate_is_said(model: Any) -> None:
    module = experts_of(model)[0]
    module._gate, module._table = None, None
    given = routed(module, 3, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="join") as said:
        found = module(*given)
        module(*given)
    assert len(said) == 1 and near(found, RaggedExperts.plain(module, *given), BF16)


# -- memory -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is given back")
def test_pages_of_files_are_given_back_and_no_others(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    file = tmp_path / "numbers"
    file.write_bytes(bytes(range(256)) * (8 * page // 256))
    mapped = torch.from_file(str(file), shared=False, size=8 * page, dtype=torch.uint8)
    own = torch.full((8 * page,), 7, dtype=torch.uint8)
    mapped[0], mapped[5 * page] = 99, 99  # pages of the process's own now
    at, other = mapped.data_ptr(), own.data_ptr()
    assert (
        give_back([(at + 1, at + 3 * page), (at + 3 * page, at + 4 * page + 5), (other, other + 8 * page)]) == 3 * page
    )
    assert mapped[0] == mapped[5 * page] == 99  # beside the whole pages of the two ranges, which are one
    assert mapped[1 : 5 * page].tolist() == (list(range(256)) * (5 * page // 256))[1:]
    assert bool((own == 7).all())
    assert give_back([]) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is given back")
def test_loading_gives_back_what_was_laid_out(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not twice the codes: those in the file's pages go as those in the kernels' layout come."""
    given: list[int] = []
    monkeypatch.setattr(linear, "give_back", lambda ranges: given.append(sum(b - a for a, b in ranges)))
    model = moezip.load(packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path, all_alike, everything))
    stored = sum(t.nbytes for _, module in packed_modules(model) for t in module.tensors().values())
    assert sum(given) == stored

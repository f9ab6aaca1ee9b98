"""A packed model on a few new tokens: what stands between its packed matrices runs on the C++ library, as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moezip
from moezip.arch.families import ARCHITECTURES
from moezip.kernels import products
from moezip.kernels.unpacked import MOST_TOKENS
from moezip.runtime import norms, one_layer, one_query, one_token, routers, unpacked
from moezip.runtime.linear import PackedLinear, set_activations
from tests.command import Cli

Tiny = Callable[..., Path]
# Families whose attention is of the usual form: q, k and v, perhaps a norm, halves of a head turned as pairs.
USUAL = {
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "phimoe", "dots1", "minimax_m2",
}  # fmt: skip
# Families whose norms are all as Llama's; qwen3_next's are by 1 + weight, or gated, and phimoe's are no RMS norms.
NORMED = set(ARCHITECTURES) - {"qwen3_next", "phimoe"}
# Families whose routers take the softmax of all logits, then the best.
SOFTMAX = {"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "jamba"}
# Families whose decoder layers are of the plain form besides: no shared experts, nothing scaled.
PLAIN = {"mixtral", "qwen3_moe", "olmoe"}
# Errors of logits in bf16 against those in float32, the largest of a token, median over contexts, as a share of
# torch's: 0.7 to 1.6 was measured. Single tokens say little: where two experts are nearly alike, a rounding chooses,
# and torch's own depend on where its memory lies. Heads that are turned the wrong way make 40 and more.
NO_WORSE = 2.5
CONTEXTS = 24
# Logits of size 1 in float32, whose sums run in another order where memory is otherwise aligned.
FLOATS = 1e-4


@pytest.fixture(autouse=True)
def library() -> None:
    if not products.available():
        pytest.skip("there is no C++ library to run on")


def quantized(source: Path, to: Path, cli: Cli, attention: int = 8) -> Path:
    """16 leaves the matrices of the attention as they are."""
    done = cli("quantize", source, to, "--solver", "rtn", "--bits", 8, "--group-size", 0,
               "--set", f"attention={attention}")  # fmt: skip
    assert done.code == 0, done.err
    return to


@pytest.fixture(params=[8, 16], ids=["packed attention", "plain attention"])
def folder(request: pytest.FixtureRequest, tiny: Tiny, cli: Cli, tmp_path: Path) -> Path:
    return quantized(tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "packed", cli, request.param)


def steps(model: Any, rows: int = 2, count: int = 3) -> tuple[torch.Tensor, ...]:
    """Logits of new tokens behind a prompt, whose first row is padded."""
    ids = torch.randint(3, 100, (rows, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found: Any = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return tuple(found.logits)


def new_token(model: Any) -> torch.Tensor:
    """Logits of a token behind each of several contexts."""
    found = []
    for seed in range(CONTEXTS):
        ids = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            cache = model(ids[:, :8], use_cache=True).past_key_values
            found.append(model(ids[:, 8:], past_key_values=cache).logits[0, -1].float())
    return torch.stack(found)


def attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, one_token.Attention)]


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Grows by one with every call of a kernel."""
    seen: list[int] = []
    real = getattr(products.native(), name)
    monkeypatch.setattr(products.native(), name, lambda *given: seen.append(1) or real(*given))
    return seen


# -- all families -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [8, 16])
@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_new_tokens_are_those_of_torch(
    family: str, attention: int, tiny: Tiny, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantized(tiny(family, dtype="bfloat16"), tmp_path / "packed", cli, attention)
    model = moezip.load(path)
    assert len(attentions(model)) == (model.config.num_hidden_layers if family in USUAL else 0)
    left = [m for m in model.modules() if "RMSNorm" in type(m).__name__ and not isinstance(m, norms.Norm)]
    assert bool(left) == (family == "qwen3_next")
    assert any(isinstance(m, norms.Norm) for m in model.modules()) == (family in NORMED)
    routed = [module for module in model.modules() if isinstance(module, routers.Router)]
    blocks = [module for module in model.modules() if type(module).__name__.lower().endswith("router")]
    assert len(routed) == (len(blocks) if family in SOFTMAX else 0)
    layers = [module for module in model.modules() if isinstance(module, one_layer.Layer)]
    assert len(layers) == (model.config.num_hidden_layers if family in PLAIN else 0)
    heads = calls(monkeypatch, "heads")
    ours = new_token(model)
    assert len(heads) == (CONTEXTS * model.config.num_hidden_layers if family in USUAL else 0)
    monkeypatch.setattr(unpacked, "use", lambda model: None)
    theirs, true = new_token(moezip.load(path)), new_token(moezip.load(path, dtype=torch.float32))
    errors = [(found - true).abs().amax(-1).median() for found in (ours, theirs)]
    assert 0 < errors[0] <= NO_WORSE * errors[1]


@pytest.mark.parametrize("family", sorted(USUAL))
def test_a_layer_is_its_own_self_in_numbers(family: str, tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    """One layer, several sequences with keys of their own: what a token adds to the cache, to a rounding."""
    model = moezip.load(quantized(tiny(family, dtype="bfloat16"), tmp_path / "packed", cli))
    layer: Any = attentions(model)[0]
    stock = type(layer).__bases__[1].forward
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 1, model.config.hidden_size, generator=random).bfloat16()
    width = max(layer._moezip_turned)
    angles = 6.3 * torch.rand(3, 1, width // 2, generator=random).repeat(1, 1, 2)
    given = {"position_embeddings": (angles.cos().bfloat16(), angles.sin().bfloat16()), "attention_mask": None}
    seen = []
    for forward in (type(layer).forward, stock):
        cache = one_token.Watching()
        with torch.no_grad():
            out = forward(layer, hidden, past_key_values=cache, **given)[0]
        seen.append((out, *cache.given))
    for one, other in zip(*seen, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=2.0**-6, atol=2.0**-6 * float(other.abs().max()))
    assert torch.equal(seen[0][2], seen[1][2])


def plainly(model: Any) -> list[type]:
    """Has a model's layers run by their modules; returns their classes before."""
    layers = [module for module in model.modules() if isinstance(module, one_layer.Layer)]
    kinds = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = type(layer).__bases__[1]
    return kinds


@pytest.mark.parametrize("attention", [8, 16])
@pytest.mark.parametrize("family", sorted(PLAIN))
def test_a_layer_whole_gives_the_bits_of_its_modules(
    family: str, attention: int, tiny: Tiny, cli: Cli, tmp_path: Path
) -> None:
    """Sequences of different lengths, all that a model can be asked to return, and activations of 8 bits."""
    model = moezip.load(quantized(tiny(family, dtype="bfloat16"), tmp_path / "packed", cli, attention))
    twin = copy.deepcopy(model)
    assert len(plainly(twin)) == model.config.num_hidden_layers
    assert all(torch.equal(one, other) for one, other in zip(steps(model), steps(twin), strict=True))
    found = []
    for each in (model, twin):
        with torch.no_grad():
            cache = each(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
            found.append(each(
                torch.tensor([[8]]), past_key_values=cache, output_hidden_states=True, output_router_logits=True
            ))  # fmt: skip
    assert torch.equal(found[0].logits, found[1].logits)
    for name in ("hidden_states", "router_logits"):
        pairs = list(zip(found[0][name], found[1][name], strict=True))
        assert pairs and all(torch.equal(one, other) for one, other in pairs)
    exact = steps(model)
    for each in (model, twin):
        set_activations(each, "int8")
    assert all(torch.equal(one, other) for one, other in zip(steps(model), steps(twin), strict=True))
    assert not torch.equal(steps(model)[1], exact[1])


def test_a_layer_whole_is_one_call_for_each_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moezip.load(folder)
    seen = {name: calls(monkeypatch, name) for name in ("heads", "attend", "norm", "route", "experts", "linear")}
    steps(model, count=1)
    before = {name: len(each) for name, each in seen.items()}
    steps(model, count=2)
    layers = model.config.num_hidden_layers
    more = {name: len(each) - 2 * before[name] for name, each in seen.items()}
    # of the model itself the last norm; its head is plain
    assert more == {"heads": layers, "attend": layers, "norm": 1, "route": 0, "experts": 0, "linear": 0}


@pytest.mark.parametrize("more", [{"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_other_ways_to_generate(folder: Path, more: dict[str, Any]) -> None:
    """A cache of a fixed size, beams that change places, no cache: the same tokens as by the modules."""
    model = moezip.load(folder)
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    found = model.generate(ids, **given, **more)
    plainly(model)
    assert torch.equal(model.generate(ids, **given, **more), found)
    if "num_beams" not in more:
        assert torch.equal(model.generate(ids, **given), found)


def test_arguments_by_place_are_the_layers_own(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    """Mixtral's decoder layers take positions before the mask, Qwen's after it."""
    for family, order in (("mixtral", "positions first"), ("qwen3_moe", "mask first")):
        model = moezip.load(quantized(tiny(family, dtype="bfloat16"), tmp_path / family, cli))
        layer, hidden = model.model.layers[0], torch.randn(1, 1, model.config.hidden_size).bfloat16()
        positions = tuple(torch.randn(2, 1, 1, layer.self_attn.head_dim).bfloat16())
        with torch.no_grad():
            wanted = layer(hidden, attention_mask=None, position_embeddings=positions)
            if order == "positions first":
                found = layer(hidden, positions, None)
            else:
                found = layer(hidden, None, position_embeddings=positions)
            assert torch.equal(found, wanted)
            (one, _), (other, _) = (
                layer.self_attn(hidden, positions, None),
                layer.self_attn(hidden_states=hidden, position_embeddings=positions, attention_mask=None),
            )
            assert torch.equal(one, other)


@pytest.mark.parametrize("whole", [True, False], ids=["layer", "attention"])
def test_masks_that_the_library_does_not_take(folder: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added in fp16 is torch's to add, when the cache has the token already: it gets it once."""
    model = moezip.load(folder)
    if not whole:
        plainly(model)
    layer = model.model.layers[0]
    module, hidden = (layer if whole else layer.self_attn), torch.randn(2, 1, model.config.hidden_size).bfloat16()
    positions = tuple(torch.randn(2, 1, 1, layer.self_attn.head_dim).bfloat16())
    found = []
    attended = calls(monkeypatch, "attend")
    for dtype in (torch.bfloat16, torch.float16):
        mask = torch.tensor([0.0, -1.0, 0.5, 0.0]).to(dtype).expand(2, 1, 1, 4)
        cache = one_token.Watching()
        with torch.no_grad():
            out = module(hidden, attention_mask=mask, position_embeddings=positions, past_key_values=cache)
        found.append(out if whole else out[0])
        assert cache.updates == 1
    assert len(attended) == 1
    torch.testing.assert_close(*found, rtol=2.0**-6, atol=2.0**-6)


# -- what does not fit --------------------------------------------------------------------------------------


class Clipped(nn.Module):
    """A layer of the usual parts, which does something else with them."""

    def __init__(self, stock: Any):
        super().__init__()
        self.__dict__.update(stock.__dict__)

    def forward(
        self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None,
        past_key_values: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        stock = self.stock
        return stock(hidden_states.clamp(-8, 8), position_embeddings=position_embeddings,
                     attention_mask=attention_mask, past_key_values=past_key_values, **more)  # fmt: skip


def test_a_layer_that_does_something_else_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping what is large, other signs of the turn, a scale of its own: each is found out by asking."""
    model = moezip.load(folder)
    layer: Any = attentions(model)[0]
    width = layer.head_dim
    assert one_token.fits(layer, width)
    clipped: Any = Clipped(layer)
    clipped.__dict__["stock"] = layer
    assert not one_token.fits(clipped, width)

    stock = type(layer).__bases__[1]

    def other(change: Callable[[Any], Any]) -> bool:
        class Other(stock):  # type: ignore[misc,valid-type]
            def forward(self, hidden_states: Any, position_embeddings: Any = None, **more: Any) -> Any:
                return super().forward(hidden_states, position_embeddings=change(position_embeddings), **more)

        made = Other.__new__(Other)
        made.__dict__.update(layer.__dict__)
        return one_token.fits(made, width)

    assert other(lambda positions: positions)
    assert not other(lambda positions: (positions[0], -positions[1]))
    assert not other(lambda positions: (positions[0] * 1.1, positions[1]))


def test_a_decoder_layer_that_does_something_else_is_left_alone(folder: Path) -> None:
    model = moezip.load(folder)
    layer: Any = model.model.layers[0]
    stock = type(layer).__bases__[1]

    class Scaled(stock):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None,
                    past_key_values: Any = None, **more: Any) -> Any:  # fmt: skip
            found = super().forward(hidden_states, position_embeddings=position_embeddings,
                                    attention_mask=attention_mask, past_key_values=past_key_values, **more)  # fmt: skip
            return found + 0.5 * hidden_states

    layer.__class__ = stock
    assert one_layer.fits(layer)
    layer.__class__ = Scaled
    assert not one_layer.fits(layer)


@pytest.mark.parametrize("kind", ["by 1 + weight", "in the middle", "rounded once", "rounded twice"])
def test_norms_are_told_apart(kind: str) -> None:
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(32).bfloat16(), requires_grad=False), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            number = x.float()
            middle = number - number.mean(-1, keepdim=True) if kind == "in the middle" else number
            normed = middle * torch.rsqrt(middle.pow(2).mean(-1, keepdim=True) + self.eps)
            if kind == "rounded twice":
                return self.weight * normed.to(x.dtype)
            weight = 1 + self.weight.float() if kind == "by 1 + weight" else self.weight.float()
            return (normed * weight).to(x.dtype)

    norm: Any = OtherRMSNorm()
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        wanted = norm(x)
        norms.use(norm)
        known = {"rounded once": norms.NormOnce, "rounded twice": norms.Norm}
        assert type(norm).__mro__[1] is known.get(kind, nn.Module)
        assert (norm(x) != wanted).float().mean() <= norms.OTHERS


def routed(weight: torch.Tensor, x: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """Logits, scores and ids of the best two, in one way or another."""
    logits = torch.nn.functional.linear(x, weight)
    if kind == "clipped":
        logits = logits.clamp(-20, 20)
    if kind == "scaled":
        logits = 2 * logits
    scored = logits.float().sigmoid() if kind == "sigmoid" else logits.float().softmax(-1)
    best, ids = (-scored if kind == "worst" else scored).topk(2, -1)
    best = scored.gather(1, ids)
    if kind == "after":
        best = logits.float().gather(1, ids).softmax(-1)
    if kind in ("normalised", "doubled"):
        best = best / best.sum(-1, keepdim=True)
    return logits, ((2 if kind == "doubled" else 1) * best).to(x.dtype), ids


@pytest.mark.parametrize(
    ("kind", "form"),
    [("plain", False), ("normalised", True), ("after", True), ("sigmoid", None), ("clipped", None), ("scaled", None),
     ("worst", None), ("doubled", None)],
)  # fmt: skip
def test_routers_are_told_apart(kind: str, form: bool | None) -> None:
    """The softmax of the best two alone is that of all, normalised."""

    class SomeTopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.top_k = nn.Parameter(torch.randn(6, 32).bfloat16(), requires_grad=False), 2

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return routed(self.weight, hidden_states, kind)

    torch.manual_seed(0)
    router: Any = SomeTopKRouter().eval()
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        wanted = router(x)
        routers.use(router)
        found = router(x)
    assert isinstance(router, routers.Router) == (form is not None)
    assert form is None or router._moezip_route == (form, torch.bfloat16)
    assert torch.equal(found[2], wanted[2])
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-6, atol=2.0**-6)


# -- modules stay what they were ----------------------------------------------------------------------------


def test_weights_are_parameters_as_before(folder: Path, tmp_path: Path) -> None:
    """State, copies, pickles and dtypes; a head that is the embedding stays one with it."""
    model = moezip.load(folder)
    router = model.model.layers[0].mlp.gate
    assert isinstance(router.weight, unpacked.Weight) and isinstance(router.weight, nn.Parameter)
    assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())
    assert type(router.weight + 1) is torch.Tensor
    before, twin = steps(model), copy.deepcopy(model)
    assert type(twin.model.norm).__name__ == "Qwen3MoeRMSNorm" and isinstance(twin.model.norm, norms.Norm)
    assert len(attentions(twin)) == len(attentions(model))
    assert all(torch.equal(one, other) for one, other in zip(before, steps(twin), strict=True))
    with torch.no_grad():  # its own memory: what changes there, stays there
        for module in attentions(twin):
            module.k_norm.weight.zero_()
            module.v_proj.bias = nn.Parameter(torch.ones(module.v_proj.out_features).bfloat16(), False)
    assert not torch.equal(before[1], steps(twin)[1])
    assert all(torch.equal(one, other) for one, other in zip(before, steps(model), strict=True))
    for module in (model.model.norm, attentions(model)[0]):  # a whole model of transformers cannot be pickled
        again = pickle.loads(pickle.dumps(module))
        assert type(again) is type(module)
        assert all(torch.equal(one, other) for one, other in zip(again.parameters(), module.parameters(), strict=True))
    whole = moezip.load(folder, dtype=torch.float32)
    for one, other in zip(steps(model.to(torch.float32)), steps(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOATS)
    assert model.lm_head.weight.dtype == torch.float32


def test_a_tied_head_stays_tied(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    path = quantized(tiny("qwen3_moe", dtype="bfloat16", tie_word_embeddings=True), tmp_path / "packed", cli)
    model = moezip.load(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, unpacked.Weight)


def test_gradients_and_compiled_graphs_are_torchs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moezip.load(folder)
    seen = [calls(monkeypatch, name) for name in ("dense", "norm", "heads", "attend", "route")]
    weight = model.lm_head.weight
    x = torch.randn(1, weight.shape[1]).bfloat16().requires_grad_()
    torch.nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad[0], weight.detach().float().sum(0).bfloat16(), rtol=2.0**-6, atol=2.0**-6)
    norm = model.model.norm
    norm(torch.randn(1, 32).bfloat16().requires_grad_()).sum().backward()
    assert not any(seen)
    with torch.no_grad():
        x = torch.randn(1, 32).bfloat16()
        wanted = norm(x), model.lm_head(x)
        assert [len(each) for each in seen] == [1, 1, 0, 0, 0]
        compiled = torch.compile(lambda x: (norm(x), model.lm_head(x)), backend="eager", fullgraph=True)
        for one, other in zip(compiled(x), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2.0**-6, atol=2.0**-6)
        assert [len(each) for each in seen] == [1, 1, 0, 0, 0]


def test_many_tokens_are_torchs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moezip.load(folder)
    dense, heads = calls(monkeypatch, "dense"), calls(monkeypatch, "heads")
    with torch.no_grad():
        model.lm_head(torch.randn(MOST_TOKENS, 32).bfloat16())
        assert len(dense) == 1
        model.lm_head(torch.randn(MOST_TOKENS + 1, 32).bfloat16())
        model.lm_head(torch.empty(0, 32).bfloat16())
        assert len(dense) == 1
    steps(model, rows=MOST_TOKENS + 1)
    assert not heads


@pytest.fixture
def fused(folder: Path) -> Iterator[Any]:
    model = moezip.load(folder)
    steps(model)
    yield model


def test_hooks_see_what_they_saw(fused: Any) -> None:
    """Somebody who listens to a product gets all of its calls, and the result is the same."""
    wanted, seen = steps(fused), []
    layer = fused.model.layers[0]
    for path in (
        "self_attn.q_proj", "self_attn.o_proj", "self_attn.k_norm", "self_attn", "input_layernorm",
        "post_attention_layernorm", "mlp", "mlp.gate", "mlp.experts",
    ):  # fmt: skip
        module = layer.get_submodule(path)
        for listen in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = listen(lambda *_: seen.append(1))
            found = steps(fused)
            handle.remove()
            assert len(seen) == 3, path  # the prompt and two tokens
            seen.clear()
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_norms_in_another_dtype_and_modules_offloaded_are_not_read(fused: Any, tmp_path: Path) -> None:
    """Numbers that are not bf16, or not there until they are needed, are left to torch and to accelerate."""
    from accelerate import cpu_offload

    before, layer = steps(fused), fused.model.layers[1]
    hidden = torch.randn(1, 1, fused.config.hidden_size).bfloat16()
    positions = tuple(torch.randn(2, 1, 1, layer.self_attn.head_dim).bfloat16())

    def runs() -> bool:
        with torch.no_grad():
            return one_token.takes(layer.self_attn, hidden, positions) and (
                one_layer._run(layer, hidden, positions, None, one_token.Watching(), {}) is not None
            )

    assert runs()
    for path in ("self_attn.q_norm", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
        module = layer.get_submodule(path)
        module.float()
        assert not runs(), path
        module.bfloat16()
        assert runs()
    for layer in fused.model.layers:
        cpu_offload(layer, torch.device("cpu"), offload_buffers=False)
    assert fused.model.layers[0].input_layernorm.weight.is_meta
    for one, other in zip(steps(fused), before, strict=True):
        assert torch.isfinite(one).all()
        if not torch.equal(one.argmax(-1), other.argmax(-1)):
            break


def test_what_is_put_in_the_place_of_a_module_is_used(fused: Any) -> None:
    before = steps(fused)
    layer: Any = attentions(fused)[0]

    class Doubled(nn.Module):
        def __init__(self, stock: Any):
            super().__init__()
            self.stock = stock

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return 2 * self.stock(*given)

    layer.v_proj = Doubled(layer.v_proj)
    changed = steps(fused)
    assert not torch.equal(changed[1], before[1])
    layer.v_proj = layer.v_proj.stock
    assert torch.equal(steps(fused)[1], before[1])
    block = fused.model.layers[0].mlp
    block.experts = Doubled(block.experts)
    assert not torch.equal(steps(fused)[1], before[1])
    block.experts = block.experts.stock
    assert torch.equal(steps(fused)[1], before[1])
    for owner, name in (
        (fused.model.layers[0], "mlp"), (fused.model.layers[0], "post_attention_layernorm"), (layer, "q_norm"),
    ):  # fmt: skip
        stock = owner._modules[name]
        setattr(owner, name, Doubled(stock))
        assert not torch.equal(steps(fused)[1], before[1])
        setattr(owner, name, stock)
        assert torch.equal(steps(fused)[1], before[1])


def test_other_activations_are_seen(tiny: Tiny, cli: Cli, tmp_path: Path) -> None:
    model = moezip.load(quantized(tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "packed", cli))
    assert isinstance(attentions(model)[0].q_proj, PackedLinear)
    exact = steps(model)
    set_activations(model, "int8")
    rounded = steps(model)
    assert not torch.equal(exact[1], rounded[1])
    set_activations(model, "exact")
    assert torch.equal(steps(model)[1], exact[1])


def test_weights_that_move_are_followed(fused: Any) -> None:
    """Numbers were put elsewhere: addresses kept from the call before would be stale."""
    before = steps(fused)
    for module in attentions(fused):
        if isinstance(module.q_proj, PackedLinear):
            module.to(torch.bfloat16)  # unpacks what was laid out, which is laid out anew
            assert module.q_proj.matrix is None
            continue
        for weight in (module.q_proj.weight, module.q_norm.weight):
            old = weight.data
            weight.data = old.clone()
            old.fill_(float("nan"))
    for layer in fused.model.layers:
        for weight in (layer.mlp.gate.weight, layer.input_layernorm.weight, layer.post_attention_layernorm.weight):
            old = weight.data
            weight.data = old.clone()
            old.fill_(float("nan"))
    assert all(torch.equal(one, other) for one, other in zip(steps(fused), before, strict=True))


def test_attention_set_to_another_is_another(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = calls(monkeypatch, "heads")
    assert fused.config._attn_implementation == one_query.NAME
    fused.set_attn_implementation("sdpa")
    steps(fused)
    assert not heads

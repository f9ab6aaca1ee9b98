"""What stands between packed matrices, against float64 over awkward shapes, on every instruction set that there is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from moezip.kernels import build, unpacked
from moezip.kernels import unpacked_reference as true
from moezip.kernels.unpacked_reference import from_halves, to_halves
from tests.test_kernels import native
from tests.test_packed_kernels import case

# fp32 sums of up to a thousand products of numbers of size 1.
SUMS = 2e-5
# A result rounded to bf16, which has 8 bits, once: half a unit of the last one; and what the sum was off before.
ROUNDED = 2.0**-8 + SUMS
# The same where norms, whose sum runs in another order, round differently now and then before the weight.
TWICE = 2 * ROUNDED

# Rows around blocks of 16 and pairs of them, columns around vectors of 4 to 32 and eight of those at once.
SHAPES = [(1, 1, 1), (33, 33, 2), (64, 256, 1), (5, 31, 3), (40, 300, 7), (17, 515, 35), (31, 64, 8)]
# Sequences, heads, heads of keys, keys, width, width of values: four heads at once or fewer, tails of vectors.
ATTENDED = [
    (1, 1, 1, 1, 8, 8), (1, 4, 4, 17, 16, 16), (2, 6, 2, 33, 8, 24), (3, 8, 1, 129, 32, 8), (1, 10, 2, 5, 80, 96),
]  # fmt: skip


@pytest.fixture(params=list(build.variants()))
def library(request: pytest.FixtureRequest) -> Any:
    return native(request.param)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def halves(*shape: int, seed: int = 0) -> np.ndarray:
    return to_halves(drawn(*shape, seed=seed))


def near(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> bool:
    """Each number within its own rounding, or the sums' that it came from."""
    values = from_halves(found) if found.dtype == np.uint16 else found
    return bool((np.abs(values - wanted) <= tolerance * np.abs(wanted) + SUMS).all())


# -- products -----------------------------------------------------------------------------------------------


def test_a_product_by_hand(library: Any) -> None:
    """[1, 2] times rows [3, 4] and [5, -6] is 11 and -7; with a bias of 0.5 and 1, 11.5 and -6."""
    weight, x = np.array([[3, 4], [5, -6]], np.float32), np.array([[1, 2]], np.float32)
    assert unpacked.linear(weight, x, library=library).tolist() == [[11, -7]]
    bias = np.array([0.5, 1], np.float32)
    assert unpacked.linear(weight, x, bias, library=library).tolist() == [[11.5, -6]]
    found = unpacked.linear(to_halves(weight), to_halves(x), to_halves(bias), library=library)
    assert from_halves(found).tolist() == [[11.5, -6]]


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_products_are_what_float64_gives(rows: int, columns: int, tokens: int, library: Any) -> None:
    weight, x, bias = drawn(rows, columns), drawn(tokens, columns, seed=1), drawn(rows, seed=2)
    for given in (None, bias):
        wanted = true.linear(weight.astype(float), x.astype(float), None if given is None else given.astype(float))
        found = [unpacked.linear(weight, x, given, threads=threads, library=library) for threads in (1, 3)]
        assert near(found[0], wanted, SUMS) and np.array_equal(*found)
    parts = [to_halves(each) for each in (weight, x, bias)]
    wanted = true.linear(*map(from_halves, parts))
    found = [unpacked.linear(*parts, threads=threads, library=library) for threads in (1, 3)]
    assert near(found[0], wanted, ROUNDED) and np.array_equal(*found)


# -- norms --------------------------------------------------------------------------------------------------


def test_a_norm_by_hand(library: Any) -> None:
    """The mean square of 1 and 7 is 25; by 5 they are 0.2 and 1.4; by the weights 2 and 0.5, 0.4 and 0.7."""
    x, weight = np.array([[1, 7]], np.float32), np.array([2, 0.5], np.float32)
    assert np.allclose(unpacked.rms_norm(x, weight, 0.0, library=library), [[0.4, 0.7]], rtol=1e-6, atol=0)
    # epsilon goes under the root: the square of 0 + 4 has the root 2, so 0 stays 0 and nothing is divided by 0
    assert not unpacked.rms_norm(np.zeros((1, 2), np.float32), weight, 4.0, library=library).any()


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (2, 33), (3, 64), (1, 300), (40, 515)])
def test_norms_are_what_the_models_compute(tokens: int, columns: int, library: Any) -> None:
    x, weight = drawn(tokens, columns), drawn(columns, seed=1)
    found = [unpacked.rms_norm(x, weight, 1e-6, threads=threads, library=library) for threads in (1, 3)]
    assert np.array_equal(*found)
    assert near(found[0], true.rms_norm(x.astype(float), weight.astype(float), 1e-6, False), SUMS)
    x, weight = to_halves(x), to_halves(weight)
    for once in (False, True):
        wanted = true.rms_norm(from_halves(x), from_halves(weight), 1e-6, True, once)
        found = unpacked.rms_norm(x, weight, 1e-6, once=once, library=library)
        assert near(found, wanted, TWICE)
        # nearly all to the bit: the roundings are where the models have them
        assert (from_halves(found) != wanted).mean() <= 0.01


# -- routers ------------------------------------------------------------------------------------------------


def test_a_route_by_hand(library: Any) -> None:
    """Logits 0, 2, 1 and 2: of equal ones the first comes first, and two of them share evenly. Three of them, not
    normalised, have e^2, e^2 and e of 1 + 2 e^2 + e."""
    weight = to_halves(np.array([[0.0], [2.0], [1.0], [2.0]], np.float32))
    x = to_halves(np.ones((1, 1), np.float32))
    logits, scores, ids = unpacked.route(weight, x, 2, normalise=True, library=library)
    assert from_halves(logits).tolist() == [[0, 2, 1, 2]] and ids.tolist() == [[1, 3]]
    assert from_halves(scores).tolist() == [[0.5, 0.5]]
    _, scores, ids = unpacked.route(weight, x, 3, normalise=False, halves=False, library=library)
    total = 1 + 2 * math.exp(2) + math.exp(1)
    assert ids.tolist() == [[1, 3, 2]]
    assert np.allclose(scores, [[math.exp(2) / total, math.exp(2) / total, math.exp(1) / total]], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("experts", "columns", "tokens", "top_k"), [(1, 3, 1, 1), (8, 64, 3, 2), (60, 100, 5, 4), (128, 33, 2, 128)]
)
def test_routes_are_what_float64_gives(experts: int, columns: int, tokens: int, top_k: int, library: Any) -> None:
    weight, x = halves(experts, columns), halves(tokens, columns, seed=1)
    logits, _, _ = true.route(from_halves(weight), from_halves(x), top_k, False)
    for normalise in (False, True):
        for small in (False, True):
            given = [
                unpacked.route(weight, x, top_k, normalise=normalise, halves=small, threads=threads, library=library)
                for threads in (1, 3)
            ]
            assert all(np.array_equal(one, other) for one, other in zip(*given, strict=True))
            found, scores, ids = given[0]
            assert near(found, logits, ROUNDED)
            # by the logits that came out, which a sum in another order may have rounded the other way
            shares = np.exp(from_halves(found) - from_halves(found).max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            assert np.array_equal(ids, np.argsort(-from_halves(found), axis=1, kind="stable")[:, :top_k])
            wanted = np.take_along_axis(shares, ids, 1)
            wanted = wanted / wanted.sum(1, keepdims=True) if normalise else wanted
            assert near(scores, wanted, ROUNDED if small else SUMS)


def test_a_route_of_what_is_no_number(library: Any) -> None:
    """Experts that exist, each once, and scores that say it."""
    x = np.full((1, 4), 0x7FC0, np.uint16)
    _, scores, ids = unpacked.route(halves(6, 4), x, 3, normalise=True, library=library)
    assert ids.tolist() == [[0, 1, 2]] and np.isnan(from_halves(scores)).all()


# -- turned heads -------------------------------------------------------------------------------------------


def test_a_head_turned_by_hand(library: Any) -> None:
    """A quarter turn (cosine 0, sine 1) makes -2, 1 of the pair 1, 2; the third and fourth number are no part of it."""
    x = to_halves(np.array([[[1, 2, 5, 6]]], np.float32))
    quarter = to_halves(np.zeros((1, 2), np.float32)), to_halves(np.ones((1, 2), np.float32))
    assert from_halves(unpacked.turn(x, *quarter, library=library)).tolist() == [[[-2, 1, 5, 6]]]
    # all four: pairs are the first with the third number, and the second with the fourth
    quarter = to_halves(np.zeros((1, 4), np.float32)), to_halves(np.ones((1, 4), np.float32))
    assert from_halves(unpacked.turn(x, *quarter, library=library)).tolist() == [[[-5, -6, 1, 2]]]


@pytest.mark.parametrize(
    ("batch", "count", "width", "turned", "each"),
    [(1, 1, 2, 2, 1), (2, 3, 8, 8, 2), (1, 16, 64, 64, 1), (3, 2, 80, 40, 3), (1, 5, 96, 96, 1), (1, 1, 1024, 6, 1)],
)  # fmt: skip
def test_turned_heads_are_the_models_to_the_bit(
    batch: int, count: int, width: int, turned: int, each: int, library: Any
) -> None:
    x, cosine, sine = halves(batch, count, width), halves(each, turned, seed=1), halves(each, turned, seed=2)
    wanted = true.turn(*map(from_halves, (x, cosine, sine)))
    found = [unpacked.turn(x, cosine, sine, threads=threads, library=library) for threads in (1, 3)]
    assert np.array_equal(from_halves(found[0]), wanted) and np.array_equal(*found)
    weight = halves(width, seed=3)
    normed = unpacked.rms_norm(x.reshape(-1, width), weight, 1e-5, library=library).reshape(x.shape)
    found = unpacked.turn(x, cosine, sine, weight, 1e-5, library=library)
    assert np.array_equal(found, unpacked.turn(normed, cosine, sine, library=library))


def test_turned_heads_are_those_of_transformers(library: Any) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

    x, cosine, sine = halves(2, 3, 64), halves(2, 64, seed=1), halves(2, 64, seed=2)
    given = [torch.from_numpy(each).view(torch.bfloat16) for each in (x, cosine, sine)]
    wanted, _ = apply_rotary_pos_emb(given[0][:, :, None], given[0][:, :, None], given[1][:, None], given[2][:, None])
    found = torch.from_numpy(unpacked.turn(x, cosine, sine, library=library)).view(torch.bfloat16)
    assert torch.equal(found, wanted[:, :, 0])


# -- attention ----------------------------------------------------------------------------------------------


def test_attention_by_hand(library: Any) -> None:
    """Scores ln 3 and 0 are weights 3/4 and 1/4: of 4 and 8 they make 5. Who may not see the second gets 4."""
    query, key = to_halves(np.ones((1, 1, 1), np.float32)), to_halves(np.array([[[[1], [0]]]], np.float32))
    value = to_halves(np.array([[[[4], [8]]]], np.float32))
    assert from_halves(unpacked.attend(query, key, value, None, math.log(3), library=library)).tolist() == [[[5]]]
    looks = np.array([[[True, False]]])
    assert from_halves(unpacked.attend(query, key, value, looks, 1.0, library=library)).tolist() == [[[4]]]
    assert not unpacked.attend(query, key, value, np.zeros_like(looks), 1.0, library=library).any()
    added = np.array([[[0, -math.log(3)]]], np.float32)
    assert from_halves(unpacked.attend(query, key, value, added, 0.0, library=library)).tolist() == [[[5]]]


@pytest.mark.parametrize("mask", ["none", "bool", "float32", "bf16", "by head"])
@pytest.mark.parametrize(("batch", "count", "shared", "length", "width", "out"), ATTENDED)
def test_attention_is_what_float64_gives(
    batch: int, count: int, shared: int, length: int, width: int, out: int, mask: str, library: Any
) -> None:
    query, key = halves(batch, count, width), halves(batch, shared, length, width, seed=1)
    value = halves(batch, shared, length, out, seed=2)
    looks = np.random.default_rng(3).random((batch, count if mask == "by head" else 1, length)) > 0.3
    looks[..., -1] = True
    added = np.where(looks, drawn(*looks.shape, seed=4), np.finfo(np.float32).min / 2).astype(np.float32)
    given, meant = {
        "none": (None, np.zeros(looks.shape)),
        "bool": (looks, np.where(looks, 0, -np.inf)),
        "by head": (looks, np.where(looks, 0, -np.inf)),
        "float32": (added, added.astype(float)),
        "bf16": (to_halves(added), from_halves(to_halves(added))),
    }[mask]
    meant = np.broadcast_to(meant, (batch, count, length))
    wanted = true.attend(*map(from_halves, (query, key, value)), meant, width**-0.5)
    found = [
        unpacked.attend(query, key, value, given, width**-0.5, threads=threads, library=library) for threads in (1, 3)
    ]
    assert near(found[0], wanted, ROUNDED) and np.array_equal(*found)


def test_what_is_no_number_stays_none(library: Any) -> None:
    """NaN in a query, key or value is not lost among the weights."""
    query, key, value = halves(1, 2, 32), halves(1, 1, 9, 32, seed=1), halves(1, 1, 9, 32, seed=2)
    for number, each in enumerate((query, key, value)):
        bad = [part.copy() for part in (query, key, value)]
        bad[number].reshape(-1, each.shape[-1])[0] = 0x7FC0
        found = from_halves(unpacked.attend(*bad, None, 1.0, library=library))
        assert np.isnan(found[0, 0]).all()
    x = drawn(1, 40)
    x[0, 39] = np.nan
    assert np.isnan(unpacked.rms_norm(x, x[0], 1e-6, library=library)).all()
    assert np.isnan(unpacked.linear(x, x, library=library)).all()


# -- several in one call ------------------------------------------------------------------------------------


def matrix(kind: str, rows: int, columns: int, library: Any, seed: int) -> Any:
    """Packed in 4 bits, groups of 32 or as they come; or plain, with a bias or without."""
    if kind == "packed":
        return case(library, rows, columns, 32 if columns % 32 == 0 else 0, 4, seed=seed).laid
    return halves(rows, columns, seed=seed), halves(rows, seed=seed) if kind == "bias" else None


def alone(made: Any, x: np.ndarray, activations: Any, library: Any) -> np.ndarray:
    from moezip.kernels import products

    if isinstance(made, products.Laid):
        return products.linear(made, x, activations=activations, library=library)
    return unpacked.linear(made[0], x, made[1], library=library)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize(
    "kinds",
    [("packed",) * 3, ("plain",) * 3, ("bias", "packed", "plain"), ("packed", "bias", "packed")],
    ids=" ".join,
)
@pytest.mark.parametrize(("batch", "columns", "width"), [(1, 64, 16), (3, 96, 40)])
def test_heads_are_the_parts_one_after_the_other(
    kinds: tuple[str, ...], batch: int, columns: int, width: int, activations: Any, library: Any
) -> None:
    x, cosine, sine = halves(batch, columns), halves(batch, width, seed=1), halves(batch, width, seed=2)
    counts, norm = (4, 2, 2), (halves(width, seed=3), 1e-6)
    made = [matrix(kind, n * width, columns, library, i) for i, (kind, n) in enumerate(zip(kinds, counts, strict=True))]
    plain = [alone(each, x, activations, library).reshape(batch, -1, width) for each in made]
    for norms in ((None, None), (norm, norm), (None, norm)):
        given = [(None, 0.0) if each is None else each for each in norms]
        wanted = [unpacked.turn(plain[i], cosine, sine, *given[i], library=library) for i in (0, 1)] + [plain[2]]
        for threads in (1, 3):
            found = unpacked.heads(
                made, x, width, cosine, sine, norms, activations=activations, threads=threads, library=library
            )
            assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    # norms of all heads as one
    norms = [(halves(n * width, seed=4), 1e-5) for n in counts[:2]]
    for i, (weight, epsilon) in enumerate(norms):
        normed = unpacked.rms_norm(plain[i].reshape(batch, -1), weight, epsilon, library=library)
        wanted[i] = unpacked.turn(normed.reshape(batch, -1, width), cosine, sine, library=library)
    found = unpacked.heads(made, x, width, cosine, sine, norms, activations=activations, threads=2, library=library)
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["packed", "plain", "bias"])
def test_attention_with_a_matrix_is_both_one_after_the_other(kind: str, library: Any) -> None:
    query, key, value = halves(2, 4, 24), halves(2, 2, 7, 24, seed=1), halves(2, 2, 7, 24, seed=2)
    made = matrix(kind, 50, 96, library, 3)
    heads = unpacked.attend(query, key, value, None, 0.2, library=library)
    wanted = alone(made, heads.reshape(2, 96), "exact", library)
    found = unpacked.attend(query, key, value, None, 0.2, made, threads=2, library=library)
    assert np.array_equal(found, wanted)


def experts_of(count: int, hidden: int, width: int, library: Any) -> Any:
    from moezip.kernels import products

    shapes = (width, hidden), (width, hidden), (hidden, width)
    made = [tuple(case(library, *shape, 0, 3, seed=e + i).laid for i, shape in enumerate(shapes)) for e in range(count)]
    return products.Experts(made, hidden, library=library)  # type: ignore[arg-type]


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize(("kind", "batch", "top_k"), [("packed", 1, 2), ("plain", 3, 4), ("bias", 8, 1)])
def test_a_layer_is_its_parts_one_after_the_other(
    kind: str, batch: int, top_k: int, activations: Any, library: Any
) -> None:
    hidden, table = 72, experts_of(5, 72, 40, library)
    query, key, value = halves(batch, 4, 16), halves(batch, 2, 7, 16, seed=1), halves(batch, 2, 7, 16, seed=2)
    made, x, router = matrix(kind, hidden, 64, library, 3), halves(batch, hidden, seed=4), halves(5, hidden, seed=5)
    norm = halves(hidden, seed=6), 1e-6
    for normalise, small in ((True, True), (False, False)):
        part = unpacked.attend(query, key, value, None, 0.3, made, activations=activations, library=library)
        middle = to_halves(from_halves(x) + from_halves(part))
        normed = unpacked.rms_norm(middle, *norm, library=library)
        _, scores, ids = unpacked.route(router, normed, top_k, normalise=normalise, halves=small, library=library)
        weights = from_halves(scores).astype(np.float32) if small else scores
        out = table.run(normed, ids, weights, "silu", activations=activations)
        wanted = to_halves(from_halves(middle) + from_halves(out))
        for threads in (1, 3):
            found = unpacked.finish(
                query, key, value, 0.3, made, x, norm, router, top_k, table, normalise=normalise, halves=small,
                activations=activations, threads=threads, library=library,
            )  # fmt: skip
            assert np.array_equal(found, wanted)


# -- bad input ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    library = native("baseline")
    weight, x = drawn(4, 8), drawn(2, 8)
    q, k, v = halves(1, 4, 8), halves(1, 2, 3, 8), halves(1, 2, 3, 8)
    angles = halves(1, 8), halves(1, 8)
    plain = [(halves(16, 8), None), (halves(8, 8), None), (halves(8, 8), None)]
    layer: Any = (
        q, k, v, 1.0, (halves(32, 32), None), halves(1, 32), (halves(32), 0.0), halves(5, 32), 2,
        experts_of(5, 32, 8, library),
    )  # fmt: skip
    assert unpacked.finish(*layer, library=library).shape == (1, 32)
    for call in (
        lambda: unpacked.linear(weight, drawn(2, 7), library=library),
        lambda: unpacked.linear(weight, halves(2, 8), library=library),
        lambda: unpacked.linear(weight[:, ::2], x[:, ::2], library=library),
        lambda: unpacked.linear(weight, x, drawn(5), library=library),
        lambda: unpacked.linear(weight, x, threads=0, library=library),
        lambda: unpacked.rms_norm(x, drawn(7), 1e-6, library=library),
        lambda: unpacked.route(halves(4, 8), halves(2, 7), 2, normalise=True, library=library),
        lambda: unpacked.route(halves(4, 8), halves(2, 8), 5, normalise=True, library=library),
        lambda: unpacked.turn(q, halves(1, 10), halves(1, 10), library=library),
        lambda: unpacked.turn(q, halves(1, 3), halves(1, 3), library=library),
        lambda: unpacked.turn(q, halves(2, 8), halves(2, 8), library=library),
        lambda: unpacked.turn(q, *angles, halves(4), library=library),
        lambda: unpacked.turn(halves(1, 1, 1026), *angles, library=library),
        lambda: unpacked.attend(q, k, halves(1, 2, 4, 8), None, 1.0, library=library),
        lambda: unpacked.attend(halves(1, 3, 8), k, v, None, 1.0, library=library),
        lambda: unpacked.attend(q, k[:, :, ::2], v[:, :, ::2], None, 1.0, library=library),
        lambda: unpacked.attend(q, k, v, np.ones((1, 1, 4), bool), 1.0, library=library),
        lambda: unpacked.attend(q, k, v, np.ones((1, 1, 3)), 1.0, library=library),
        lambda: unpacked.attend(q, k, v, None, 1.0, (halves(5, 31), None), library=library),
        lambda: unpacked.finish(*layer[:5], halves(1, 31), *layer[6:], library=library),
        lambda: unpacked.finish(*layer[:7], halves(4, 32), *layer[8:], library=library),
        lambda: unpacked.finish(*layer[:8], 6, layer[9], library=library),
        lambda: unpacked.finish(*layer[:4], (halves(31, 32), None), *layer[5:], library=library),
        lambda: unpacked.finish(*layer, gate="relu", library=library),
        lambda: unpacked.heads(plain, halves(1, 9), 8, *angles, library=library),
        lambda: unpacked.heads(plain[:2], halves(1, 8), 8, *angles, library=library),
        lambda: unpacked.heads(plain, halves(1, 8), 7, *angles, library=library),
        lambda: unpacked.heads(plain, halves(1, 8), 8, *angles, [(halves(4), 0.0), None], library=library),
        lambda: unpacked.heads(plain, halves(1, 8), 8, *angles, activations="int4", library=library),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()

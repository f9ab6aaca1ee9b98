"""Solvers: which codes stand for a matrix. Laws first, then cases worked by hand, then a textbook reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moezip.errors import CheckpointError, MoezipError, PlanError, UsageError
from moezip.formats.packed import Codes, Grid, decode, dequantize, encode
from moezip.quantize import METHODS
from moezip.quantize.gptq import GptqParams, factor
from moezip.quantize.gptq import solve as gptq
from moezip.quantize.hessian import shrunk
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as rtn
from moezip.quantize.solution import Solution, output_error_rows

PLAIN = GptqParams(refine=0)
# Sums in float32 over a few hundred terms.
CLOSE = 1e-4
# Solution.errors are added up while solving, in float32, and the damping's share is taken off again at the end.
SUMMED = 2e-3
# Codes on which float32 and float64, or two orders of summation, may differ: weights that lie halfway between codes.
TIES = 0.005


def correlated(
    rows: int = 48, columns: int = 128, tokens: int = 1024, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [R, C] and the mean of x x^T over inputs that share a few directions and differ in size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns // 4, generator=random)
    sizes = torch.rand(columns, generator=random) + 0.2
    x = torch.randn(tokens, columns // 4, generator=random) @ mix.T / columns**0.5
    x = (x + 0.3 * torch.randn(tokens, columns, generator=random)) * sizes
    return torch.randn(rows, columns, generator=random) * 0.05, x.T @ x / tokens


def output_error(weight: torch.Tensor, codes: Codes, hessian: torch.Tensor | None) -> float:
    return float(output_error_rows(dequantize(codes) - weight, hessian).sum())


def differing(one: Codes, other: Codes) -> float:
    """Share of codes that differ."""
    return float((one.codes != other.codes).float().mean())


def all_equal(one: Codes, other: Codes) -> bool:
    pairs = [(one.codes, other.codes), (one.scales, other.scales)]
    if one.zeros is not None and other.zeros is not None:
        pairs.append((one.zeros, other.zeros))
    return all(torch.equal(a, b) for a, b in pairs)


# Laws


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("form", ["-g32", "-g0", "-g64-sym", "-g32-bf16", "-g32-double"])
def test_every_grid_gives_codes_that_can_be_stored(bits: int, form: str):
    weight, hessian = correlated(rows=20)
    weight *= 30  # so that the scales of 8 bits still fit into half precision
    grid = Grid.parse(f"int{bits}{form}")
    for found in (rtn(weight, None, grid, RtnParams()), gptq(weight, hessian, grid, GptqParams())):
        assert found.codes.grid == grid
        assert all_equal(decode(encode(found.codes), grid), found.codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_more_is_never_worse(bits: int):
    """Rounding, a search, compensation, passes of refinement: each lowers the output error of the one before."""
    weight, hessian = correlated()
    grid = Grid(bits, 32)
    found = [
        rtn(weight, hessian, grid, RtnParams()),
        gptq(weight, hessian, grid, PLAIN),
        gptq(weight, hessian, grid, GptqParams(refine=1)),
        gptq(weight, hessian, grid, GptqParams(refine=3)),
    ]
    errors = [each.error for each in found]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


@pytest.mark.parametrize("form", ["int1-g32", "int2-g32", "int3-g0", "int2-g64-sym"])
def test_a_pass_of_refinement_raises_the_damped_error_of_no_row(form: str):
    weight, hessian = correlated()
    grid, before = Grid.parse(form), None
    ready = factor(hessian, GptqParams())
    assert ready is not None
    damped = hessian + ready.damping * torch.eye(len(hessian))
    for passes in range(4):
        found = gptq(weight, ready, grid, GptqParams(refine=passes))
        after = output_error_rows(dequantize(found.codes) - weight, damped)
        assert before is None or bool((after <= before * (1 + CLOSE)).all())
        before = after


@pytest.mark.parametrize("form", ["int1-g32", "int2-g32", "int4-g32", "int8-g32", "int3-g0", "int2-g32-double"])
@pytest.mark.parametrize("refine", [0, 2])
def test_the_error_that_is_reported_is_that_of_the_codes(form: str, refine: int):
    weight, hessian = correlated()
    found = gptq(weight, hessian, Grid.parse(form), GptqParams(refine=refine))
    rows = output_error_rows(dequantize(found.codes) - weight, hessian)
    assert found.errors.shape == (len(weight),)
    assert torch.allclose(found.errors, rows, rtol=SUMMED, atol=float(rows.mean()) * SUMMED)
    assert found.error == pytest.approx(float(rows.sum()), rel=SUMMED)


@pytest.mark.parametrize("refine", [0, 2])
def test_rows_do_not_touch_each_other(refine: int):
    weight, hessian = correlated()
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    grid, params = Grid(2, 32), GptqParams(refine=refine)
    straight, mixed = gptq(weight, hessian, grid, params), gptq(weight[order], hessian, grid, params)
    permuted = Codes(grid, straight.codes.codes[order], straight.codes.scales[order], straight.codes.zeros[order])
    assert differing(permuted, mixed.codes) <= TIES
    assert torch.allclose(straight.errors[order], mixed.errors, rtol=0.01)


@pytest.mark.parametrize("refine", [0, 2])
def test_the_scale_of_the_hessian_changes_nothing(refine: int):
    weight, hessian = correlated()
    grid, params = Grid(3, 32), GptqParams(refine=refine)
    one, other = gptq(weight, hessian, grid, params), gptq(weight, hessian * 1024, grid, params)
    assert all_equal(one.codes, other.codes)  # a power of two: every rounding is the same
    assert other.error == pytest.approx(1024 * one.error)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_with_uncorrelated_inputs_of_one_size_gptq_is_rounding(bits: int):
    weight, _ = correlated()
    eye = torch.eye(weight.shape[1])
    found = gptq(weight, eye, Grid(bits, 32), GptqParams(damp=0.0, refine=0))
    assert all_equal(found.codes, rtn(weight, None, Grid(bits, 32), RtnParams()).codes)
    assert found.error == pytest.approx(float((dequantize(found.codes) - weight).square().sum()), rel=CLOSE)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ranges_are_searched_for_the_columns_that_count(bits: int):
    """Uncorrelated inputs: nothing is compensated, and what is left of the gain is that ranges suit large inputs."""
    weight, _ = correlated()
    hessian = torch.diag(torch.linspace(-3, 3, 128).view(4, 32).T.flatten().exp())
    found = gptq(weight, hessian, Grid(bits, 32), GptqParams(damp=0.0, refine=0))
    assert found.error < 0.95 * rtn(weight, hessian, Grid(bits, 32), RtnParams()).error


def test_a_prepared_hessian_serves_several_matrices_and_stacked_ones_are_solved_apart():
    weight, hessian = correlated()
    ready, grid = factor(hessian, PLAIN), Grid(3, 32)
    whole = gptq(weight, ready, grid, PLAIN)
    assert all_equal(whole.codes, gptq(weight, hessian, grid, PLAIN).codes)
    top = gptq(weight[:16], ready, grid, PLAIN)
    assert differing(top.codes, Codes(grid, whole.codes.codes[:16], whole.codes.scales[:16])) <= TIES


# Little or no evidence


@pytest.mark.parametrize("hessian", [None, torch.zeros(128, 128)], ids=["none", "zeros"])
def test_without_inputs_weights_are_rounded_and_it_is_said(hessian: torch.Tensor | None):
    weight, _ = correlated()
    found = gptq(weight, hessian, Grid(2, 32), GptqParams())
    assert found.blind
    assert all_equal(found.codes, rtn(weight, None, Grid(2, 32), RtnParams()).codes)
    assert not gptq(weight, correlated()[1], Grid(2, 32), GptqParams()).blind


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_token_is_enough_for_a_hessian_of_rank_one(bits: int):
    weight, _ = correlated()
    x = torch.linspace(-1, 2, weight.shape[1])
    grid = Grid(bits, 32)
    found = gptq(weight, torch.outer(x, x), grid, GptqParams())
    rounded = rtn(weight, None, grid, RtnParams())
    of_token = [float(((dequantize(each.codes) - weight) @ x).square().sum()) for each in (found, rounded)]
    assert of_token[0] < 0.01 * of_token[1]
    # what no input asked for stays near: codes are not spent on one token alone (4: compensation moves weights)
    change = [float((dequantize(each.codes) - weight).square().sum()) for each in (found, rounded)]
    assert change[0] < 4 * change[1]


def test_damping_is_raised_until_a_singular_hessian_can_be_factored_and_it_is_said():
    weight, hessian = correlated()
    singular = torch.outer(hessian[0], hessian[0])
    found = gptq(weight, singular, Grid(2, 32), GptqParams(damp=0.0))
    assert found.raised
    assert found.damping > 0
    assert not gptq(weight, hessian, Grid(2, 32), GptqParams()).raised


@pytest.mark.parametrize("refine", [0, 2])
def test_columns_that_no_input_reached_are_rounded_not_zeroed(refine: int):
    weight, hessian = correlated()
    dead = torch.arange(0, 128, 32)[:, None] + torch.tensor([3, 17])
    hessian[dead.flatten()], hessian[:, dead.flatten()] = 0, 0
    found = gptq(weight, hessian, Grid(4, 32), GptqParams(refine=refine))
    values, at = dequantize(found.codes), dead.flatten()
    step = found.codes.scales.repeat_interleave(32, 1)[:, at]
    low = -found.codes.zeros.float().repeat_interleave(32, 1)[:, at] * step
    inside = weight[:, at].clamp(low, low + 15 * step)
    # half a step, and float32 rounding of the damped slope where refinement looks again
    assert bool(((values[:, at] - inside).abs() <= 0.51 * step).all())


def test_a_hessian_that_is_none_is_refused():
    weight, hessian = correlated()
    with pytest.raises(MoezipError, match="cannot be factored"):
        gptq(weight, hessian - 1000 * torch.ones_like(hessian).fill_diagonal_(0), Grid(2, 32), GptqParams())


@pytest.mark.parametrize("what", ["weight", "hessian"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(what: str, bad: float):
    weight, hessian = correlated()
    (weight if what == "weight" else hessian)[3, 5] = bad
    with pytest.raises(CheckpointError, match=f"the {what} holds NaN or infinity"):
        gptq(weight, hessian, Grid(2, 32), GptqParams())


def test_groups_must_divide_the_columns():
    with pytest.raises(PlanError, match="do not divide"):
        gptq(*correlated(columns=80), Grid(2, 32), GptqParams())


@pytest.mark.parametrize("form", ["int2-g32", "int2-g32-double", "int1-g32", "int4-g0"])
def test_rows_and_groups_of_zeros_stay_zero(form: str):
    weight, hessian = correlated()
    grid = Grid.parse(form)
    weight[5] = 0
    weight[7, :32] = 0
    found = gptq(weight, hessian, grid, PLAIN)
    values = dequantize(found.codes)
    if grid.bits > 1:  # one bit has no zero
        assert not values[5].any()
    others = np.delete(np.arange(len(weight)), [5, 7])
    without = gptq(weight[others], hessian, grid, PLAIN)
    assert torch.allclose(found.errors[others], without.errors, rtol=0.01)
    assert float(found.errors[7]) < 3 * float(found.errors[others].max())


def test_scales_too_small_for_half_precision_are_stored_as_bf16():
    weight, hessian = correlated()
    found = gptq(weight * 1e-6, hessian, Grid(2, 32), GptqParams())
    assert found.codes.grid == Grid(2, 32, scale="BF16")
    assert differing(found.codes, gptq(weight, hessian, Grid(2, 32, scale="BF16"), GptqParams()).codes) < 0.1
    assert found.error < 1e-12 * 1.2 * gptq(weight, hessian, Grid(2, 32), GptqParams()).error


# By hand


def test_a_row_worked_by_hand():
    """Two bits over the whole range of w = (2.4, 1.4, 3): scale 3/3 = 1, zero 0, codes 0 to 3.

    H = [[1, 1/2, 0], [1/2, 2, 0], [0, 0, 1]]. Rounding gives (2, 1, 3): d = (-0.4, -0.4, 0) and
    d H d^T = 0.16 + 2 * 0.16 + 2 * 0.16 / 2 = 0.64.

    Column 1 has the largest diagonal and comes first: 1.4 -> 1, error 0.4. Of the inverse of the upper left block,
    [[2, -1/2], [-1/2, 1]] / 1.75, the ratio H^-1_01 / H^-1_11 is -1/2, so column 0 becomes 2.4 + 0.4 / 2 = 2.6 -> 3.
    Column 2 is exact. d = (0.6, -0.4, 0): 0.36 + 2 * 0.16 - 0.24 = 0.44.
    """
    weight = torch.tensor([[2.4, 1.4, 3.0]])
    hessian = torch.tensor([[1, 0.5, 0], [0.5, 2, 0], [0, 0, 1]])
    grid = Grid(2, 0)
    rounded = rtn(weight, hessian, grid, RtnParams("minmax"))
    assert (rounded.codes.scales.tolist(), rounded.codes.zeros.tolist()) == ([[1.0]], [[0]])
    assert rounded.codes.codes.tolist() == [[2, 1, 3]]
    assert rounded.error == pytest.approx(0.64, rel=CLOSE)

    found = gptq(weight, hessian, grid, GptqParams(damp=0.0, clip="minmax", refine=0))
    assert found.codes.codes.tolist() == [[3, 1, 3]]
    assert found.error == pytest.approx(0.44, rel=CLOSE)

    # Column 0 first: 2.4 -> 2, error 0.4, H^-1_10 / H^-1_00 = -1/4, so column 1 becomes 1.4 + 0.1 -> 1 or, being
    # halfway, 2. From 2.45: error 0.45, column 1 becomes 1.4 + 0.1125 = 1.5125 -> 2.
    # d = (-0.45, 0.6, 0): 0.2025 + 2 * 0.36 - 0.27 = 0.6525
    natural = gptq(
        torch.tensor([[2.45, 1.4, 3.0]]), hessian, grid,
        GptqParams(damp=0.0, clip="minmax", refine=0, order="natural"),
    )  # fmt: skip
    assert natural.codes.codes.tolist() == [[2, 2, 3]]
    assert natural.error == pytest.approx(0.6525, rel=CLOSE)


def test_signs_are_compensated_by_hand():
    """One bit: w = (0.5, 0.1), scale (0.5 + 0.1) / 2 = 0.3 where both columns count alike, values +-0.3.

    H = [[1, 0.9], [0.9, 1]]: rounding gives (0.3, 0.3), d = (-0.2, 0.2) and 0.04 + 0.04 - 2 * 0.9 * 0.04 = 0.008.
    With w = (0.5, 0.1) shifted to (0.5, -0.1): rounding gives (0.3, -0.3), d = (-0.2, -0.2), 0.08 + 0.072 = 0.152.
    Compensated: 0.5 -> 0.3, error 0.2, column 1 becomes -0.1 + 0.2 * 0.9 = 0.08 -> +0.3. d = (-0.2, 0.4):
    0.04 + 0.16 - 2 * 0.9 * 0.08 = 0.056.
    """
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    params = GptqParams(damp=0.0, refine=0)
    for second, value, error in ((0.1, 0.3, 0.008), (-0.1, 0.3, 0.056)):
        found = gptq(torch.tensor([[0.5, second]]), hessian, Grid(1, 0), params)
        assert found.codes.scales.item() == pytest.approx(0.3, rel=2**-11)  # stored in half precision
        assert dequantize(found.codes)[0].tolist() == pytest.approx([0.3, value], rel=2**-11)
        assert found.error == pytest.approx(error, rel=0.01)


def test_refinement_by_hand():
    """From (2, 1, 3) of the first case, one pass: H d^T = (-0.6, -1.0, 0) for d = (-0.4, -0.4, 0).

    The step: u = (2, 1, 3), u H u^T = 4 + 2 + 2 + 9 = 17, u H d^T = -2.2, so the step becomes 1 + 2.2 / 17 = 1.12941,
    in half precision 1.1298828 = 1 + 133/1024; d = (-0.140234, -0.270117, 0.389648). Codes: column 0 wants
    2.4 - (-0.270117 / 2) = 2.535 -> code 2.24 -> 2; column 1 wants 1.4 + 0.140234 / 4 = 1.435 -> 1.27 -> 1; column 2
    wants 3 -> 2.66 -> 3. Nothing moves: E = 0.64 - 2.2^2 / 17 = 0.35529.
    """
    from moezip.quantize.descent import improve
    from moezip.quantize.groups import Groups

    weight = np.array([[2.4, 1.4, 3.0]], np.float32)
    hessian = np.array([[1, 0.5, 0], [0.5, 2, 0], [0, 0, 1]], np.float32)
    groups = Groups(Grid(2, 0), np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    codes, groups, change = improve(weight, hessian, 0.0, np.array([[2, 1, 3]], np.uint8), groups, 1)
    assert codes.tolist() == [[2, 1, 3]]
    assert groups.step.item() == 1 + 133 / 1024 or groups.step.item() == 1 + 132 / 1024
    assert 0.64 + change.item() == pytest.approx(0.35529, abs=1e-4)


# Against the book


def textbook(weight: np.ndarray, hessian: np.ndarray, codes: Codes, order: np.ndarray) -> tuple[np.ndarray, float]:
    """GPTQ as in the paper's equations 2 and 3: after each column the inverse hessian loses that column. float64."""
    rest, inverse = weight.astype(np.float64).copy(), np.linalg.inv(hessian)
    columns = weight.shape[1]
    group = np.arange(columns) // (columns // codes.scales.shape[1])
    scales, top = codes.scales.double().numpy(), codes.grid.levels - 1
    found, loss = np.zeros(weight.shape, np.uint8), 0.0
    for c in order:
        scale = scales[:, group[c]]
        if codes.grid.bits == 1:
            code = (rest[:, c] >= 0).astype(np.float64)
            value = scale * (2 * code - 1)
        else:
            zero = codes.zeros.double().numpy()[:, group[c]]
            code = np.clip(np.rint(rest[:, c] / scale + zero), 0, top)
            value = scale * (code - zero)
        missed = rest[:, c] - value
        loss += float((missed**2).sum() / inverse[c, c])
        rest -= np.outer(missed, inverse[c]) / inverse[c, c]
        inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, :] = inverse[:, c] = 0
        inverse[c, c] = 1
        found[:, c] = code
    return found, loss


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("order", ["activity", "natural"])
def test_float32_and_one_factor_agree_with_the_book_in_float64(bits: int, order: str):
    weight, hessian = correlated(columns=160)  # more than one block of the kernel
    found = gptq(weight, hessian, Grid(bits, 32), GptqParams(refine=0, order=order))
    diagonal = hessian.diagonal().numpy()
    damped = hessian.double().numpy() + 0.1 * diagonal.mean(dtype=np.float64) * np.eye(160)
    places = np.argsort(-diagonal, kind="stable") if order == "activity" else np.arange(160)
    codes, loss = textbook(weight.numpy(), damped, found.codes, places)
    # a code that falls the other way sends the rest of its row another way: rows agree or, rarely, they do not
    assert (found.codes.codes.numpy() != codes).any(1).mean() <= 0.1
    change = (dequantize(found.codes) - weight).double().numpy()
    assert np.einsum("rc,cd,rd->", change, damped, change) == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_compensation_saves_at_least_a_fifth_of_the_output_error(bits: int):
    weight, hessian = correlated()
    grid = Grid(bits, 32)
    rounded = output_error(weight, rtn(weight, None, grid, RtnParams()).codes, hessian)
    assert output_error(weight, gptq(weight, hessian, grid, PLAIN).codes, hessian) < 0.8 * rounded
    # 0.7: refinement adds to that
    assert output_error(weight, gptq(weight, hessian, grid, GptqParams()).codes, hessian) < 0.7 * rounded


def test_fresh_inputs_of_the_same_kind_gain_too():
    """The codes are not fitted to the calibration tokens alone."""
    weight, hessian = correlated(tokens=1024, seed=0)
    random = torch.Generator().manual_seed(5)
    root = torch.linalg.cholesky(hessian.double() + 1e-6 * torch.eye(128))
    x = torch.randn(4096, 128, generator=random, dtype=torch.float64) @ root.T
    fresh = (x.T @ x / len(x)).float()
    grid = Grid(2, 32)
    rounded = output_error(weight, rtn(weight, None, grid, RtnParams()).codes, fresh)
    assert output_error(weight, gptq(weight, hessian, grid, GptqParams()).codes, fresh) < 0.7 * rounded


def test_searching_the_range_beats_the_whole_range():
    weight, _ = correlated()
    for bits in (2, 3, 4):
        searched, whole = (rtn(weight, None, Grid(bits, 32), RtnParams(clip)).error for clip in ("search", "minmax"))
        assert searched < whole


# The hessian of few tokens


def test_shrinkage_by_hand():
    """Own sums 6 over 3 tokens: mean 2. Pooled 40 over 10: mean 4. As if 1 token: (3 * 2 + 1 * 4) / 4 = 2.5."""
    own, pool = torch.full((2, 2), 6.0), torch.full((2, 2), 40.0)
    mixed = shrunk(own, 3, pool, 10, prior=1)
    assert (mixed.basis, mixed.own, mixed.hessian.tolist()) == ("mixed", 0.75, [[2.5, 2.5], [2.5, 2.5]])
    assert own.tolist() == [[6.0, 6.0], [6.0, 6.0]]  # sums are left as they were
    # the three tokens weigh 1.5 together: mean 6 / 1.5 = 4 = the pool's, and the share is still that of three
    weighted = shrunk(own, 3, pool, 10, prior=1, mass=1.5)
    assert (weighted.own, weighted.hessian.tolist()) == (0.75, [[4.0, 4.0], [4.0, 4.0]])


@pytest.mark.parametrize(
    ("own", "count", "pool", "pooled", "prior", "basis", "value"),
    [
        (6.0, 3, 40.0, 10, 0, "own", 2.0),
        (6.0, 3, None, 0, 5, "own", 2.0),
        (0.0, 0, 40.0, 10, 5, "pooled", 4.0),
        (None, 0, 40.0, 10, 0, "pooled", 4.0),
        (None, 0, None, 0, 5, "none", None),
        (0.0, 0, 0.0, 0, 5, "none", None),
    ],
)
def test_what_a_hessian_is_made_of(own, count, pool, pooled, prior, basis, value):
    def sums(entry: float | None) -> torch.Tensor | None:
        return None if entry is None else torch.full((1, 1), entry)

    mixed = shrunk(sums(own), count, sums(pool), pooled, prior)
    assert mixed.basis == basis
    assert (None if mixed.hessian is None else mixed.hessian.item()) == value


def test_an_expert_that_saw_nothing_is_solved_with_the_pool_and_never_zeroed():
    weight, pool = correlated()
    mixed = shrunk(None, 0, pool * 1024, 1024, prior=128)
    found = gptq(weight, mixed.hessian, Grid(2, 32), GptqParams())
    assert not found.blind
    assert found.error < 0.8 * output_error(weight, rtn(weight, None, Grid(2, 32), RtnParams()).codes, pool)
    blind = gptq(weight, shrunk(None, 0, None, 0, prior=128).hessian, Grid(2, 32), GptqParams())
    assert blind.blind
    assert float(dequantize(blind.codes).abs().mean()) > 0.5 * float(weight.abs().mean())


# Prices and settings


def test_the_error_of_each_row_by_hand():
    """d = (1, 2), H = [[2, 1], [1, 3]]: 2 + 2 * 2 * 1 + 3 * 4 = 18; d = (1, -1): 2 - 2 + 3 = 3."""
    change, hessian = torch.tensor([[1.0, 2.0], [1.0, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert output_error_rows(change, hessian).tolist() == [18.0, 3.0]
    assert output_error_rows(change, None).tolist() == [5.0, 2.0]


@pytest.mark.parametrize(
    "settings", [{"order": "random"}, {"clip": "all"}, {"damp": -1.0}, {"refine": -2}, {"prior": -0.5}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict):
    with pytest.raises(UsageError):
        GptqParams(**settings)


def test_refinement_is_for_the_narrow_widths_unless_asked_for():
    assert [GptqParams().passes(bits) for bits in (1, 2, 3, 4, 8)] == [2, 2, 2, 0, 0]
    assert [GptqParams(refine=1).passes(bits) for bits in (2, 8)] == [1, 1]


def test_methods_are_registered():
    assert {method.name for method in METHODS} == {"gptq", "rtn"}
    assert {method.family for method in METHODS} == {"quantize"}
    weight, hessian = correlated()
    for method in METHODS:
        assert isinstance(method.run(weight, hessian, Grid(4, 32), method.params()), Solution)

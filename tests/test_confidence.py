"""Intervals and tests of significance, against hand cases and against how often they hold."""

from __future__ import annotations

import numpy as np
import pytest

from moezip.evaluate.confidence import DRAWS, MIN_WINDOWS, Interval, Paired, Rise, draw, interval, share_interval
from moezip.evaluate.text import Measured

# 400 trials of something that holds in 95 % of cases: 92 to 97.5 % with a probability of 99 %.
COVERED = (0.92, 0.98)


def measured(nll: list[float], reference: list[float], files: list[str], tokens: int = 10) -> Measured:
    """Windows of ``tokens`` tokens with these mean losses."""
    sums = np.zeros((len(nll), 5))
    sums[:, 0], sums[:, 1], sums[:, 4] = tokens, np.array(nll) * tokens, np.array(reference) * tokens
    return Measured(list(dict.fromkeys(files)), files, sums, True)


def test_a_rise_that_every_window_shows_alike_is_certain_however_much_the_windows_differ() -> None:
    reference = [float(i) for i in range(10)]
    found = measured([each + 0.25 for each in reference], reference, ["a"] * 10).results()
    assert found.loss is not None and found.against is not None
    assert found.loss.nll == 4.75 and found.loss.interval is not None
    assert found.loss.interval.high - found.loss.interval.low > 2  # of the loss by itself, little is known
    rise = found.against.rise
    assert rise.value == 0.25 and rise.interval is not None and rise.significant
    assert (rise.interval.low, rise.interval.high) == pytest.approx((0.25, 0.25), abs=1e-12)
    assert rise.to_json() == {"rise": 0.25, "rise_low": rise.interval.low, "rise_high": rise.interval.high,
                              "significant": True}  # fmt: skip


def test_the_mixture_of_the_files_is_not_left_to_chance() -> None:
    found = measured([1.0] * 6 + [5.0] * 6, [1.0] * 12, ["a"] * 6 + ["b"] * 6).results()
    assert found.loss is not None and found.loss.interval is not None and found.loss.nll == 3.0
    # windows of one file are all alike, so only another mixture could move the mean
    assert (found.loss.interval.low, found.loss.interval.high) == pytest.approx((3.0, 3.0), abs=1e-12)
    # six windows of one file are too few
    assert found.by_file["a"].interval is None and found.against_by_file["a"].rise.significant is None


def test_long_windows_weigh_more_than_short_ones() -> None:
    sums = np.zeros((9, 5))
    sums[:, 0] = [2, 98, 1, 1, 1, 1, 1, 1, 1]
    sums[:, 1] = [2 * 4.0, 98 * 1.0, *[1.0] * 7]
    found = Measured(["a"], ["a"] * 9, sums, False).results()
    assert found.loss is not None and found.against is None and found.against_by_file == {}
    assert found.loss.nll == pytest.approx((8 + 98 + 7) / 107)


@pytest.mark.parametrize("windows", [10, 60])
def test_intervals_hold_as_often_as_they_say(windows: int) -> None:
    chance, held = np.random.default_rng(7), 0
    trials = 400
    for _ in range(trials):
        values = chance.normal(2.0, 0.5, windows)
        drawn = draw(np.stack([np.ones(windows), values], 1))
        found = interval(float(values.mean()), drawn[:, 1] / drawn[:, 0], windows)
        assert found is not None
        held += 2.0 in found
    assert COVERED[0] <= held / trials <= COVERED[1]


def test_draws_are_of_windows_with_replacement_and_the_same_every_time() -> None:
    sums = np.eye(5)
    drawn = draw(sums)
    assert drawn.shape == (DRAWS, 5) and (drawn.sum(1) == 5).all()
    # a window is drawn once on the average, with a variance of 1 - 1/5
    assert drawn.mean(0) == pytest.approx(np.ones(5), abs=0.1)
    assert drawn.var(0) == pytest.approx(np.full(5, 0.8), abs=0.1)
    assert (draw(sums) == drawn).all() and not (draw(sums, 1) == drawn).all()


def test_too_few_windows_have_no_interval() -> None:
    assert interval(0.0, np.zeros(DRAWS), MIN_WINDOWS - 1) is None
    assert interval(0.0, np.zeros(DRAWS), MIN_WINDOWS, strata=MIN_WINDOWS) is None
    assert interval(0.0, np.zeros(DRAWS), MIN_WINDOWS) == Interval(0.0, 0.0)
    assert Rise(0.1, None).to_json() == {"rise": 0.1, "rise_low": None, "rise_high": None, "significant": None}


def test_a_rise_within_chance_is_not_significant() -> None:
    assert Rise(0.01, Interval(-0.02, 0.04)).significant is False
    assert Rise(-0.01, Interval(-0.02, -0.004)).significant is True


def test_mcnemar_counts_the_questions_that_only_one_answered() -> None:
    # six that only the reference knew, none the other way: 2 / 2^6
    ours, theirs = [False] * 6 + [True] * 20 + [False] * 20, [True] * 26 + [False] * 20
    found = Paired.of(ours, theirs)
    assert (found.lost, found.won, found.accuracy) == (6, 0, 26 / 46)
    assert found.p_value == pytest.approx(2 / 64) and found.significant
    # five are not enough: 2 / 2^5
    found = Paired.of(ours[1:], theirs[1:])
    assert found.p_value == pytest.approx(2 / 32) and not found.significant
    # two lost, one won of three: every split is at least as lopsided
    assert Paired.of([False, False, True], [True, True, False]).p_value == pytest.approx(1.0)
    assert Paired.of(ours, ours).p_value == 1.0


def test_wilson_s_interval_of_eight_in_ten() -> None:
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 0.8, n = 10, z = 1.96
    found = share_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)

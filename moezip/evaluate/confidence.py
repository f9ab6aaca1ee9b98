"""How far chance may have moved what was measured: intervals of a loss, of its rise, of shares of right answers.

Losses: the bootstrap over windows (Efron 1979). Windows are drawn with replacement, as many of each file as there are,
so that the mixture of the files, which is the user's choice, stays; both models' losses are drawn together, which makes
the interval of the rise a paired one. Percentile intervals are too narrow for small numbers, by the difference between
normal and t, and between n and n - 1 (Hesterberg, arXiv 1411.5279); their distances from the mean are stretched by
these two. (His own remedy, percentiles further out, was tried: with ten windows it held in 91 % of cases, as the
extremes of few windows are near.)

Windows are taken as independent. Where a few long documents make many windows, intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 2000
SEED = 20231
# With fewer windows the percentiles of a bootstrap are little more than its extremes.
MIN_WINDOWS = 8
# Draws x windows whose counts exist at one time.
TOGETHER = 2**21


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the true value lies, at a confidence of 95 %."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Rise:
    """How much larger a model's loss is than the reference's, nats per token.

    Attributes:
        value: the difference of the means.
        interval: None where there are too few windows.
    """

    value: float
    interval: Interval | None

    @property
    def significant(self) -> bool | None:
        """Whether 0 is outside the interval; None where there is none."""
        return None if self.interval is None else 0.0 not in self.interval

    def to_json(self) -> dict[str, Any]:
        """``rise``, ``rise_low``, ``rise_high``, ``significant``; null where there are too few windows."""
        low, high = (None, None) if self.interval is None else (self.interval.low, self.interval.high)
        return {"rise": self.value, "rise_low": low, "rise_high": high, "significant": self.significant}


def draw(sums: Floats, stratum: int = 0) -> Floats:
    """Bootstrap sums of one stratum (file): [DRAWS, C], each over as many windows as there are, with replacement.

    Args:
        sums: [W, C]: what was summed over each window's tokens. All columns are drawn together.
        stratum: numbers the stratum; others are drawn independently of it.
    """
    import numpy as np

    chance = np.random.default_rng([SEED, stratum])
    size = len(sums)
    step = max(TOGETHER // size, 1)
    parts = [
        chance.multinomial(size, np.full(size, 1 / size), size=min(step, DRAWS - start)) @ sums
        for start in range(0, DRAWS, step)
    ]
    return np.concatenate(parts)


def interval(mean: float, drawn: Floats, windows: int, strata: int = 1) -> Interval | None:
    """The interval of a mean whose bootstrap values are ``drawn`` [DRAWS].

    Args:
        windows, strata: how many there are of each; a mean over several files has the draws of all, added up.

    Returns:
        None where there are fewer than ``MIN_WINDOWS`` windows, or no stratum has two.
    """
    import numpy as np
    from scipy import stats

    freedom, tail = windows - strata, (1 - LEVEL) / 2
    if windows < MIN_WINDOWS or freedom < 1:
        return None
    stretch = np.sqrt(windows / freedom) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    low, high = mean + stretch * (np.quantile(drawn, [tail, 1 - tail]) - mean)
    return Interval(float(low), float(high))


@dataclass(frozen=True, slots=True)
class Paired:
    """The same questions answered by a model and by its reference.

    Attributes:
        accuracy: the reference's. lost: questions that it alone answered rightly. won: those that the model alone did.
        p_value: of McNemar's exact test: how often as lopsided a split of lost and won would come by chance.
    """

    accuracy: float
    lost: int
    won: int
    p_value: float

    @classmethod
    def of(cls, model: Sequence[bool], reference: Sequence[bool]) -> Paired:
        """McNemar's test in its exact form (Psychometrika 12, 1947): two-sided, binomial, of the questions that only
        one of the two answered rightly."""
        from scipy.stats import binomtest

        lost = sum(theirs and not ours for ours, theirs in zip(model, reference, strict=True))
        won = sum(ours and not theirs for ours, theirs in zip(model, reference, strict=True))
        p_value = float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
        return cls(sum(reference) / len(reference), lost, won, p_value)

    @property
    def significant(self) -> bool:
        """Whether chance would do it less than once in twenty."""
        return self.p_value < 1 - LEVEL

    def to_json(self) -> dict[str, Any]:
        """``accuracy``, ``lost``, ``won``, ``p_value``, ``significant``."""
        return {
            "accuracy": self.accuracy,
            "lost": self.lost,
            "won": self.won,
            "p_value": self.p_value,
            "significant": self.significant,
        }


def share_interval(right: int, of: int) -> Interval:
    """Wilson's score interval of a share (JASA 22, 1927)."""
    from scipy.stats import binomtest

    found = binomtest(right, of).proportion_ci(LEVEL, method="wilson")
    return Interval(float(found.low), float(found.high))

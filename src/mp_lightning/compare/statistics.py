"""Means with intervals and paired differences over seeds, by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import optimize, stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
POWER = 0.8

_ROUNDING = 1e-12  # what differs by less, relative to the values, is the same value
_TOO_LARGE = 1e100
_LARGEST = 1e4  # noncentrality beyond which scipy cannot be relied on


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        n: number of values.
        mean: not finite if a value is not; NaN of no values.
        low, high: ends of the 95 % interval; None of fewer than two values, or if one is not finite.
    """

    n: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        n, mean, low, high: as for :class:`Estimate`, of the differences.
        p: of the two-sided paired t test; None where there is no interval. Equal differences have p = 1 if they are
            zero, else 0.
        smallest: size of the effect that would have been found with 80 % power, had the differences the standard
            deviation that was seen; None where there is no interval or all differences are equal.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    smallest: float | None


def is_finite(value: float) -> bool:
    """Whether a value can be counted with; one above 10^100 cannot, for its square is not finite."""
    return abs(value) < _TOO_LARGE


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its 95 % t interval."""
    array = np.asarray(values, dtype=np.float64)
    mean = _mean(array)
    if not _has_interval(array):
        return Estimate(len(array), mean, None, None)
    return Estimate(len(array), mean, *_interval(mean, _deviation(array, np.abs(array).max()), len(array)))


def can_be_tested(values: Sequence[float], other: Sequence[float]) -> bool:
    """Whether :func:`paired` has a p value: two pairs or more, all of them finite."""
    return _has_interval(np.asarray([*values, *other], dtype=np.float64)) and len(values) > 1


def paired(values: Sequence[float], other: Sequence[float], level: float = 0.05) -> Difference:
    """The mean of ``values`` minus ``other``, pair by pair.

    Args:
        values, other: of equal length; what stands at the same place belongs together.
        level: two-sided level at which the test is made, for the smallest effect.
    """
    pairs = np.asarray([values, other], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        differences = pairs[0] - pairs[1]
    n, mean = len(differences), _mean(differences)
    if not can_be_tested(values, other):
        return Difference(n, mean, None, None, None, None)
    scale = np.abs(pairs).max()
    deviation = _deviation(differences, scale)
    low, high = _interval(mean, deviation, n)
    if deviation == 0:
        return Difference(n, mean, low, high, 1.0 if abs(mean) <= _ROUNDING * scale else 0.0, None)
    error = deviation / math.sqrt(n)
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    noncentrality = _noncentrality(n - 1, level)
    return Difference(n, mean, low, high, p, None if noncentrality is None else noncentrality * error)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number by the step-down method of Holm (1979), in the same order.

    The chance that any of them is at most L, where nothing differs, is at most L, however they depend on each other.
    What is None stays None and does not count.
    """
    ranked = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p))
        corrected[index] = largest
    return corrected


def _mean(array: np.ndarray) -> float:
    if not len(array):
        return math.nan
    with np.errstate(invalid="ignore"):
        return float(array.mean())


def _has_interval(array: np.ndarray) -> bool:
    return len(array) > 1 and all(map(is_finite, array))


def _deviation(array: np.ndarray, scale: Any) -> float:
    """Standard deviation (n - 1), 0 where values differ by no more than the rounding of numbers as large as scale."""
    return 0.0 if np.ptp(array) <= _ROUNDING * scale else float(array.std(ddof=1))


def _interval(mean: float, deviation: float, n: int) -> tuple[float, float]:
    half = _critical(n - 1, 1 - CONFIDENCE) * deviation / math.sqrt(n)
    return mean - half, mean + half


@cache
def _critical(freedom: int, level: float) -> float:
    """What the size of t exceeds with a probability of ``level``."""
    return float(stats.t.isf(level / 2, freedom))


@cache
def _noncentrality(freedom: int, level: float) -> float | None:
    """Effect, in standard errors, that a two-sided t test finds with 80 % power."""
    critical = _critical(freedom, level)

    def lacking(effect: float) -> float:
        # A verdict with the wrong sign is no finding; its tail is tiny here, and scipy gives it as NaN at times.
        return float(POWER - stats.nct.sf(critical, freedom, effect))

    upper = 1.0
    while lacking(upper) > 0 and upper < _LARGEST:
        upper *= 2
    if not lacking(upper) <= 0:
        return None
    return float(optimize.brentq(lacking, 0.0, upper))

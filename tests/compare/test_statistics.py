"""Intervals, paired tests and corrections against scipy's own tests, tables, definitions and simulation."""

import itertools
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from mp_lightning.compare.statistics import can_be_tested, estimate, holm, paired

NOT_FINITE = [math.nan, math.inf, -math.inf, 1e200]


@pytest.fixture(autouse=True)
def no_warning_leaks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_interval_has_the_factor_of_the_t_table() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)  # 97.5 % of t with 4 degrees of freedom, from a printed table
    assert (found.n, found.mean) == (5, 3.0)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_against_the_tests_of_scipy(n: int) -> None:
    generator = np.random.default_rng(n)
    values = generator.normal(0.8, 0.01, n)
    other = values + generator.normal(0.004, 0.005, n)
    expected = stats.ttest_rel(values, other)
    found = paired(list(values), list(other))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.mean == pytest.approx(float(np.mean(values - other)))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    alone = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate(list(values)).low, estimate(list(values)).high) == pytest.approx(tuple(alone))


def test_interval_covers_the_truth_in_95_per_cent_of_experiments() -> None:
    generator = np.random.default_rng(0)
    found = [estimate(list(generator.normal(0.0, 1.0, 5))) for _ in range(4000)]
    assert 0.94 < np.mean([one.low < 0 < one.high for one in found]) < 0.96


def test_of_equal_differences_is_nothing_to_doubt() -> None:
    assert paired([0.8, 0.9], [0.8, 0.9]).p == 1.0
    # In binary these two differences are not equal, and those of the test below not quite zero.
    found = paired([0.53, 0.93], [0.51, 0.91])
    assert (found.p, found.smallest) == (0.0, None)
    assert (found.low, found.high) == pytest.approx((0.02, 0.02))


def test_differences_of_rounding_alone_are_zero() -> None:
    found = paired([0.1 + 0.2, 0.8, 0.7], [0.3, 0.8, 0.1 * 7])
    assert (found.p, found.smallest) == (1.0, None)


def test_nearly_equal_values_give_no_warning() -> None:
    found = estimate([0.8, 0.8 + 1e-15, 0.8])
    assert found.low == found.high == found.mean
    assert paired([0.8 + 1e-9, 0.8, 0.8], [0.8, 0.8, 0.8]).p == pytest.approx(0.4226, abs=1e-3)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_values_that_are_not_finite_have_no_interval(value: float) -> None:
    for values in ([value, 1.0, 2.0], [value, value], [value, -value]):
        assert (estimate(values).low, estimate(values).high) == (None, None)
        for pair in ((values, [1.0] * len(values)), ([1.0] * len(values), values), (values, values)):
            found = paired(*pair)
            assert (found.low, found.high, found.p, found.smallest) == (None, None, None, None)
            assert not can_be_tested(*pair)


def test_too_few_values_have_no_interval() -> None:
    assert math.isnan(estimate([]).mean)
    assert (estimate([0.8]).n, estimate([0.8]).mean, estimate([0.8]).low) == (1, 0.8, None)
    found = paired([0.8], [0.7])
    assert (found.n, found.p, found.low, found.smallest) == (1, None, None, None)
    assert paired([], []).n == 0
    assert not can_be_tested([0.8], [0.7])
    assert can_be_tested([0.8, 0.9], [0.7, 0.7])


def closed_testing(p_values: list[float]) -> list[float]:
    """Holm by its definition: the largest Bonferroni p of all sets of hypotheses that hold the one in question."""
    indices = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(indices, size)]
    bonferroni = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets}
    return [max(p for s, p in bonferroni.items() if index in s) for index in indices]


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closed_test_of_bonferroni(seed: int) -> None:
    p_values = list(np.random.default_rng(seed).uniform(size=7) ** 3)
    assert holm(p_values) == pytest.approx(closed_testing(p_values))


def test_what_has_no_p_value_does_not_count() -> None:
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]
    assert holm([None]) == [None]
    assert holm([]) == []


@pytest.mark.parametrize(("n", "level"), [(5, 0.05), (5, 0.00625), (3, 0.05), (20, 0.01)])
def test_smallest_effect_is_found_in_80_per_cent_of_experiments(n: int, level: float) -> None:
    generator = np.random.default_rng(n)
    differences = generator.normal(size=n)
    deviation = differences.std(ddof=1)
    smallest = paired(list(differences), [0.0] * n, level).smallest
    experiments = generator.normal(smallest, deviation, size=(20_000, n))
    found = stats.ttest_1samp(experiments, 0.0, axis=1).pvalue <= level
    assert found.mean() == pytest.approx(0.8, abs=0.01)  # 3.5 standard errors


@pytest.mark.parametrize(("n", "level", "in_errors"), [(2, 0.00125, 652.7), (5, 1e-4, 19.1), (1000, 0.05, 2.804)])
def test_smallest_effect_where_the_distribution_is_hard_to_compute(n: int, level: float, in_errors: float) -> None:
    """The expected numbers come from integrating the normal power over the chi-square distribution."""
    differences = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
    error = np.std(differences, ddof=1) / math.sqrt(n)
    assert paired(differences, [0.0] * n, level).smallest == pytest.approx(in_errors * error, rel=1e-3)


def test_smallest_effect_that_cannot_be_computed_is_none() -> None:
    assert paired([1.0, 2.0], [0.0, 0.0], level=1e-12).smallest is None

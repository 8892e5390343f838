from __future__ import annotations

import pytest

from experiments.stats import (
    Interval,
    median_difference,
    median_ratio,
    percentile,
    ratio_of_medians,
    ratio_of_percentiles,
)


def test_equal_pairs_have_no_spread() -> None:
    assert ratio_of_medians([6.0] * 5, [2.0] * 5) == Interval(3.0, 3.0, 3.0)


def test_ratio_of_medians_is_not_the_median_ratio() -> None:
    over, under = [1.0, 2.0, 9.0], [1.0, 4.0, 3.0]
    assert ratio_of_medians(over, under).value == 2 / 3
    assert median_ratio(over, under).value == 1.0


def test_pairs_are_resampled_together() -> None:
    """A machine that is slow for both of a pair does not make their ratio uncertain."""
    pace = [1.0, 5.0, 2.0, 9.0, 3.0, 7.0]
    ratio = median_ratio([2 * p for p in pace], pace)
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0)


def test_interval_holds_the_value_and_widens_with_noise() -> None:
    quiet = median_ratio([1.0, 1.01, 0.99, 1.0, 1.02], [1.0] * 5)
    noisy = median_ratio([1.0, 1.4, 0.6, 1.1, 0.8], [1.0] * 5)
    for ratio in (quiet, noisy):
        assert ratio.low <= ratio.value <= ratio.high
    assert noisy.high - noisy.low > quiet.high - quiet.low


def test_the_same_rows_give_the_same_interval() -> None:
    over, under = [1.0, 1.4, 0.6, 1.1], [1.0, 0.9, 1.1, 1.0]
    assert ratio_of_medians(over, under) == ratio_of_medians(over, under)


@pytest.mark.parametrize(("over", "under"), [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_measurements_are_refused(over: list[float], under: list[float]) -> None:
    with pytest.raises(ValueError, match=r"argument|no measurements"):
        median_ratio(over, under)


def test_percentiles() -> None:
    values = [5.0, 1.0, 3.0]
    assert [percentile(values, p) for p in (0, 25, 50, 95, 100)] == pytest.approx([1, 2, 3, 4.8, 5])
    assert percentile([7.0], 95) == 7.0
    with pytest.raises(ValueError, match="no measurements"):
        percentile([], 50)
    assert ratio_of_percentiles([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], 100).value == 3.0


def test_differences_are_of_pairs() -> None:
    assert median_difference([2.0, 103.0, 8.0], [1.0, 100.0, 7.0]).value == 1.0

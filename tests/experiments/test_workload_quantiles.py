from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.workload.published import WORKLOADS, Counts, PublishedWorkload, Spread
from experiments.workload.quantiles import counted, log_normal, stratified, through

SPREADS = [
    spread
    for workload in WORKLOADS.values()
    for spread in (workload.tokens, workload.retrieval_s, workload.gap_s)
]


@pytest.mark.parametrize("spread", SPREADS)
def test_a_fit_goes_through_the_points_and_has_the_mean(spread: Spread) -> None:
    fit = through(spread)
    shares = np.array([percent / 100 for percent, _ in spread.percentiles])
    assert fit.values(shares) == pytest.approx([value for _, value in spread.percentiles])
    assert fit.moment(1) == pytest.approx(spread.mean)


@pytest.mark.parametrize("spread", SPREADS)
def test_moments_are_those_of_the_values(spread: Spread) -> None:
    fit = through(spread, most=4 * spread.percentiles[-1][1])
    values = fit.values((np.arange(200_000) + 0.5) / 200_000)
    assert values.max() <= 4 * spread.percentiles[-1][1]
    assert fit.moment(1) == pytest.approx(values.mean(), rel=1e-3)
    assert fit.squared_variation == pytest.approx(values.var() / values.mean() ** 2, rel=1e-2)


@given(st.lists(st.floats(1e-9, 1 - 1e-9), min_size=2, max_size=9).map(sorted))
def test_a_higher_share_is_never_a_lower_value(shares: list[float]) -> None:
    for spread in SPREADS:
        assert (np.diff(through(spread).values(np.array(shares))) >= 0).all()


@given(st.floats(0.01, 1e6), st.floats(0, 20))
def test_a_log_normal_has_its_mean_and_variance(mean: float, variation: float) -> None:
    made = log_normal(mean, variation)
    assert made.moment(1) == pytest.approx(mean)
    assert made.squared_variation == pytest.approx(variation, abs=1e-9)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_counts_have_the_published_mean_median_and_ends(workload: PublishedWorkload) -> None:
    fit = counted(workload.chunks, workload.queries)
    values = fit.values((np.arange(100_000) + 0.5) / 100_000)
    assert values.mean() == pytest.approx(workload.chunks.mean, rel=1e-3)
    assert np.median(values) == workload.chunks.median
    assert (values.min(), values.max()) == (workload.chunks.least, workload.chunks.most)
    assert fit.squared_variation == pytest.approx(values.var() / values.mean() ** 2, rel=1e-2)
    # The ends are as rare as one in all published queries makes likely.
    assert 0.1 < (values == workload.chunks.most).mean() * workload.queries < 10


def test_counts_that_cannot_have_the_mean_keep_the_median() -> None:
    values = counted(Counts(3.9, median=2, least=1, most=5), 1000).values(
        (np.arange(1000) + 0.5) / 1000
    )
    assert 2 <= np.median(values) <= 2.5


@given(st.integers(0, 300), st.integers(0, 10))
def test_shares_are_one_in_each_equal_part(count: int, seed: int) -> None:
    shares = stratified(np.random.default_rng(seed), count)
    assert sorted(np.minimum(np.ceil(shares * count), count)) == pytest.approx(
        np.arange(1, count + 1)
    )

"""Delays between attempts, and the budget of all retries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.backoff import RetryBudget, RetryPolicy


def test_delays_grow_to_the_maximum() -> None:
    policy = RetryPolicy(max_backoff_ms=150)
    delays = [policy.delay_s(attempt, lambda: 0.5) for attempt in (1, 2, 3, 4, 5)]
    assert delays == pytest.approx([0.05, 0.075, 0.1125, 0.15, 0.15])


def test_jitter_goes_both_ways() -> None:
    policy = RetryPolicy()
    assert policy.delay_s(1, lambda: 0.0) == pytest.approx(0.04)
    assert policy.delay_s(1, lambda: 0.75) == pytest.approx(0.055)


@given(
    st.integers(1, 10**6),
    st.floats(0, 1000),
    st.floats(1, 10),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_delay_stays_around_its_value(
    attempt: int, initial_ms: float, multiplier: float, jitter: float, drawn: float
) -> None:
    policy = RetryPolicy(3, initial_ms, 1000, multiplier, jitter)
    delay_s = policy.delay_s(attempt, lambda: drawn)
    assert 0 <= delay_s <= (1 + jitter) * 1.0 + 1e-9
    assert delay_s >= (1 - jitter) * initial_ms / 1000 - 1e-9
    assert policy.delay_s(attempt + 1, lambda: drawn) >= delay_s


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_retries": -1},
        {"initial_backoff_ms": 10_000},
        {"initial_backoff_ms": -1},
        {"multiplier": 0.5},
        {"jitter_factor": 1.5},
    ],
)
def test_a_policy_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


def test_a_quiet_router_has_the_minimum() -> None:
    budget = RetryBudget(ratio=0.2, minimum=3)
    assert [budget.may_retry(1.0) for _ in range(5)] == [True, True, True, False, False]


def test_calls_earn_retries() -> None:
    budget = RetryBudget(ratio=0.5, minimum=0)
    assert not budget.may_retry(0.0)
    for _ in range(5):
        budget.request(0.0)
    assert [budget.may_retry(0.5) for _ in range(3)] == [True, True, False]


def test_both_leave_the_window() -> None:
    budget = RetryBudget(ratio=1.0, minimum=1, window_s=10)
    budget.request(0.0)
    assert [budget.may_retry(8.9) for _ in range(3)] == [True, True, False]
    assert not budget.may_retry(10.0)  # the call is gone, its retries are not
    assert not budget.may_retry(17.9)
    assert budget.may_retry(19.0)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=150),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(0, 4),
)
def test_retries_never_pass_the_budget_nor_are_kept_from_it(
    events: list[tuple[int, bool]], ratio: float, minimum: int
) -> None:
    """Times are quarters of seconds, in a window of ten one-second slices."""
    budget = RetryBudget(ratio, minimum, window_s=10)
    now = 0.0
    calls: list[int] = []  # the slice of each
    retries: list[int] = []
    for quarters, is_retry in events:
        now += quarters / 4
        here = int(now)
        if not is_retry:
            budget.request(now)
            calls.append(here)
            continue
        earned = minimum + ratio * sum(here - 10 < at <= here for at in calls)
        spent = sum(here - 10 < at <= here for at in retries)
        taken = budget.may_retry(now)
        assert taken == (spent + 1 <= earned)
        if taken:
            retries.append(here)


@pytest.mark.parametrize("wrong", [(-0.1, 1, 1.0), (0.1, -1, 1.0), (0.1, 1, 0.0)])
def test_a_budget_that_cannot_work_is_refused(wrong: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="retry budget"):
        RetryBudget(*wrong)

"""The circuit breaker: its table, and what holds after any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.breaker import BreakerSettings, Call, CircuitBreaker

SETTINGS = BreakerSettings(failure_threshold=3, success_threshold=2, timeout_s=10, window_s=60)


def opened(at: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(SETTINGS)
    for _ in range(3):
        breaker.failed(at, breaker.started(at))
    assert breaker.state(at) == "open"
    return breaker


def test_failures_within_the_window_open_it_though_others_succeed() -> None:
    breaker = CircuitBreaker(SETTINGS)
    for now in (0.0, 20.0, 59.9):
        assert breaker.allows(now)
        breaker.failed(now, breaker.started(now))
        if now < 59:
            breaker.succeeded(now, breaker.started(now))
    assert breaker.state(59.9) == "open"


def test_failures_further_apart_do_not() -> None:
    breaker = CircuitBreaker(SETTINGS)
    for now in (0.0, 30.0, 60.0, 90.0, 120.0):
        breaker.failed(now, breaker.started(now))
        assert breaker.state(now) == "closed"


def test_open_until_its_time_is_over_and_then_one_trial_at_once() -> None:
    breaker = opened(at=5.0)
    assert not breaker.allows(14.9)
    with pytest.raises(RuntimeError, match="is open"):
        breaker.started(14.9)
    assert breaker.allows(15.0)
    assert breaker.state(15.0) == "half_open"
    breaker.started(15.0)
    assert not breaker.allows(16.0)
    with pytest.raises(RuntimeError, match="is half_open"):
        breaker.started(16.0)


def test_trials_that_succeed_close_it_and_the_old_failures_are_forgotten() -> None:
    breaker = opened()
    breaker.succeeded(11.0, breaker.started(10.0))
    assert breaker.state(11.0) == "half_open"
    breaker.succeeded(12.0, breaker.started(11.0))
    assert breaker.state(12.0) == "closed"
    breaker.failed(12.0, breaker.started(12.0))
    breaker.failed(12.0, breaker.started(12.0))
    assert breaker.state(12.0) == "closed"


def test_a_trial_that_fails_opens_it_for_the_whole_time_again() -> None:
    breaker = opened()
    breaker.succeeded(10.0, breaker.started(10.0))
    breaker.failed(12.0, breaker.started(11.0))
    assert breaker.state(21.9) == "open"
    assert breaker.state(22.0) == "half_open"
    breaker.succeeded(22.0, breaker.started(22.0))
    assert breaker.state(22.0) == "half_open"  # the success before the failure counts no more


def test_an_abandoned_trial_tells_nothing_and_frees_the_next() -> None:
    breaker = opened()
    breaker.abandoned(12.0, breaker.started(10.0))
    assert breaker.state(12.0) == "half_open"
    assert breaker.allows(12.0)


def test_a_call_from_before_it_opened_says_nothing_later() -> None:
    breaker = CircuitBreaker(SETTINGS)
    late = [breaker.started(0.0) for _ in range(3)]
    for _ in range(3):
        breaker.failed(0.0, breaker.started(0.0))
    breaker.failed(5.0, late[0])
    assert breaker.state(10.0) == "half_open"  # counted from the third failure
    trial = breaker.started(10.0)
    breaker.succeeded(11.0, late[1])
    breaker.failed(11.0, late[2])
    assert breaker.state(11.0) == "half_open"
    assert not breaker.allows(11.0)  # the trial is still on
    breaker.succeeded(12.0, trial)
    assert breaker.state(12.0) == "half_open"


@pytest.mark.parametrize("name", ["failure_threshold", "success_threshold"])
def test_settings_that_cannot_work_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BreakerSettings(**{name: 0})
    with pytest.raises(ValueError, match="above 0"):
        BreakerSettings(timeout_s=0)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["start", "succeeded", "failed", "failed", "abandoned", "pass"]),
        st.integers(0, 20),
    ),
    max_size=120,
)


@given(EVENTS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 10), st.integers(1, 20))
def test_the_table_holds_after_any_calls(
    events: list[tuple[str, int]], failures: int, successes: int, timeout: int, window: int
) -> None:
    breaker = CircuitBreaker(BreakerSettings(failures, successes, timeout, window))
    now = 0.0
    opened_at = 0.0
    running: list[Call] = []
    failed_at: list[float] = []  # since it closed last, of calls started since
    trial: Call | None = None
    before = breaker.state(now)
    for event, value in events:
        ended: Call | None = None
        if event == "pass":
            now += value
        elif event == "start":
            if not breaker.allows(now):
                continue
            running.append(breaker.started(now))
            if breaker.state(now) == "half_open":
                assert trial is None
                trial = running[-1]
        elif running:
            ended = running.pop(value % len(running))
            getattr(breaker, event)(now, ended)
        after = breaker.state(now)
        was_trial = ended is not None and ended is trial
        trial = None if was_trial else trial
        if before == "closed" and event == "failed" and ended is not None:
            failed_at.append(now)
        match before, after:
            case "closed", "open":
                inside = [at for at in failed_at if now - at < window]
                assert event == "failed"
                assert len(inside) >= failures
                opened_at = now
            case "half_open", "open":
                assert event == "failed"
                assert was_trial
                opened_at = now
            case "half_open", "closed":
                assert event == "succeeded"
                assert was_trial
                failed_at = []
            case "open", "half_open":
                assert now - opened_at >= timeout
            case _:
                assert before == after
        assert after != "open" or now - opened_at < timeout
        assert breaker.allows(now) == (
            after == "closed" or (after == "half_open" and trial is None)
        )
        before = after

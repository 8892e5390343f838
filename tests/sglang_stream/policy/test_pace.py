from __future__ import annotations

import math

import pytest

from sglang_stream.policy import Pace, Turns


def paced_s(*arrivals_s: float, base_s: float = 0.02, since_s: float = 0.0) -> float:
    """How long an iteration is, so long after the last complete request."""
    pace = Pace()
    for arrival_s in arrivals_s:
        pace.arrived(arrival_s)
    return pace.iteration_s(base_s, (arrivals_s[-1] if arrivals_s else 0.0) + since_s)


def every(gap_s: float) -> list[float]:
    return [number * gap_s for number in range(50)]


def test_iterations_are_long_where_complete_requests_are_rare() -> None:
    assert paced_s() == pytest.approx(0.2)
    assert paced_s(1.0) == pytest.approx(0.2)
    assert paced_s(*every(60.0)) == pytest.approx(0.2)


def test_iterations_balance_waiting_against_the_cost_of_a_forward() -> None:
    assert paced_s(*every(0.4)) == pytest.approx(math.sqrt(0.02 * 0.4))
    assert paced_s(*every(0.01)) == 0.05


def test_a_machine_without_fixed_cost_keeps_iterations_short() -> None:
    assert paced_s(base_s=0.0) == 0.05
    assert paced_s(*every(60.0), base_s=0.003) == 0.05


def test_the_pace_follows_the_load() -> None:
    later = [500.0 + number * 0.2 for number in range(100)]
    assert paced_s(*every(10.0), *later) == pytest.approx(math.sqrt(0.02 * 0.2))


def test_a_burst_is_no_rate_once_nothing_follows() -> None:
    burst = (7.0, 7.001, 7.002, 7.003)
    assert paced_s(*burst) == 0.05
    assert paced_s(*burst, since_s=3.0) == pytest.approx(math.sqrt(0.02 * 3.003 / 3))
    assert paced_s(*burst, since_s=60.0) == pytest.approx(0.2)


def test_requests_decode_longer_than_passes_ran_before_them() -> None:
    turns = Turns()
    assert not turns.decodes
    turns.began(0.0, decodes=False, passes_s=0.1)
    now_s, steps = 0.1, 0
    while turns.decodes:
        turns.began(now_s, decodes=True)
        now_s, steps = now_s + 0.02, steps + 1
    # The first step's own time does not count, nor that of the last one, which has only begun.
    assert steps == 2 + math.ceil(0.3 / 0.02)


def test_what_else_runs_is_no_decoding() -> None:
    turns = Turns()
    turns.began(0.0, decodes=False, passes_s=0.1)
    turns.began(0.1, decodes=True)
    turns.began(0.2, decodes=False)
    turns.began(9.0, decodes=True)
    assert turns.decodes
    turns.began(9.2, decodes=True)
    assert turns.decodes
    turns.began(9.4, decodes=True)
    assert not turns.decodes


def test_one_step_at_least_where_nothing_is_predicted() -> None:
    turns = Turns()
    turns.began(0.0, decodes=False, passes_s=0.0)
    assert turns.decodes
    turns.began(0.1, decodes=True)
    assert not turns.decodes

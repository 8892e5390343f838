from __future__ import annotations

import math

import pytest

from sglang_stream.policy import Pace, decoding_s


def paced(gap_s: float, count: int = 50) -> Pace:
    pace = Pace()
    for number in range(count):
        pace.arrived(number * gap_s)
    return pace


def test_iterations_are_long_where_complete_requests_are_rare() -> None:
    assert Pace().iteration_s(0.02) == pytest.approx(0.2)
    assert paced(1.0, count=1).iteration_s(0.02) == pytest.approx(0.2)
    assert paced(60.0).iteration_s(0.02) == pytest.approx(0.2)


def test_iterations_balance_waiting_against_the_cost_of_a_forward() -> None:
    assert paced(0.4).iteration_s(0.02) == pytest.approx(math.sqrt(2 * 0.02 * 0.4))
    assert paced(0.01).iteration_s(0.02) == 0.05


def test_a_machine_without_fixed_cost_keeps_iterations_short() -> None:
    assert Pace().iteration_s(0.0) == 0.05
    assert paced(60.0).iteration_s(0.003) == 0.05


def test_the_pace_follows_the_load() -> None:
    pace = paced(10.0)
    for number in range(100):
        pace.arrived(500.0 + number * 0.1)
    assert pace.iteration_s(0.02) == pytest.approx(math.sqrt(2 * 0.02 * 0.1), rel=0.05)


def test_requests_decode_longer_than_passes_ran_before_them() -> None:
    assert decoding_s(0.1) == pytest.approx(0.3)

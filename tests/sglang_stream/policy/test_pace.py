from __future__ import annotations

import math

import pytest

from sglang_stream.policy import Pace, Turns


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
    assert paced(0.4).iteration_s(0.02) == pytest.approx(math.sqrt(0.02 * 0.4))
    assert paced(0.01).iteration_s(0.02) == 0.05


def test_a_machine_without_fixed_cost_keeps_iterations_short() -> None:
    assert Pace().iteration_s(0.0) == 0.05
    assert paced(60.0).iteration_s(0.003) == 0.05


def test_the_pace_follows_the_load() -> None:
    pace = paced(10.0)
    for number in range(100):
        pace.arrived(500.0 + number * 0.2)
    assert pace.iteration_s(0.02) == pytest.approx(math.sqrt(0.02 * 0.2), rel=0.05)


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

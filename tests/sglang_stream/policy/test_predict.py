from __future__ import annotations

import pytest

from sglang_stream.policy import SealPredictor
from sglang_stream.policy.predict import _REMEMBERED


def learned(lengths: list[int], gap_s: float = 2.0) -> SealPredictor:
    predictor = SealPredictor()
    predictor.gap(gap_s)
    for length in lengths:
        predictor.sealed(length)
    return predictor


def test_chunks_to_come_are_those_of_streams_that_had_as_many() -> None:
    predictor = learned([2, 4, 4, 6])
    # With one chunk: 1, 3, 3, 5 to come; with four: 0, 0, 2; with six: none.
    assert predictor.due_s(1, 10.0, 0.0) == pytest.approx(10.0 + 3.0 * 2.0)
    assert predictor.due_s(4, 10.0, 6.0) == pytest.approx(10.0 + 2 / 3 * 2.0)
    assert predictor.due_s(6, 10.0, 10.0) == 10.0
    assert predictor.due_s(9, 10.0, 16.0) == 10.0


def test_a_streams_own_gaps_count_more_the_more_there_are() -> None:
    predictor = learned([20])
    young = predictor.due_s(2, 0.0, 8.0) / 18
    old = predictor.due_s(10, 0.0, 72.0) / 10
    assert 2.0 < young < old < 8.0


def test_something_is_predicted_before_anything_is_known() -> None:
    assert SealPredictor().due_s(0, 5.0, 0.0) > 5.0


def test_the_workload_may_change() -> None:
    predictor = learned([50] * _REMEMBERED)
    for _ in range(_REMEMBERED):
        predictor.sealed(2)
    assert predictor.due_s(1, 0.0, 0.0) == pytest.approx(2.0)
    for _ in range(1000):
        predictor.gap(0.5)
    assert predictor.due_s(1, 0.0, 0.0) == pytest.approx(0.5, rel=0.01)

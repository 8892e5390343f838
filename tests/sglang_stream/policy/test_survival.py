from __future__ import annotations

import pytest

from sglang_stream.policy import Survival
from sglang_stream.policy.survival import _REMEMBERED


def learned(*kept: int) -> Survival:
    """Updates of prompts of 100 tokens that kept so many."""
    survival = Survival()
    for tokens in kept:
        survival.updated(tokens, 100)
    return survival


def test_all_stays_while_nothing_is_known_and_where_nothing_is_to_come() -> None:
    assert Survival().part(3.0) == 1.0
    assert learned(10).part(0.0) == 1.0


def test_the_part_that_half_the_updates_keep_outlives_one_of_them() -> None:
    survival = learned(90, 20, 40, 60)
    assert survival.part(1.0) == 0.6
    assert survival.part(2.0) == 0.4  # three of four keep it: nine of sixteen pairs do
    assert survival.part(20.0) == 0.2


def test_what_happens_once_at_least_as_often_as_not_is_expected() -> None:
    """Four of five updates change nothing: three in a row have an even chance of that."""
    survival = learned(100, 100, 100, 100, 30)
    assert survival.part(3.0) == 1.0
    assert survival.part(4.0) == 0.3


def test_an_update_of_an_empty_prompt_replaces_nothing() -> None:
    survival = Survival()
    survival.updated(0, 0)
    assert survival.part(5.0) == 1.0


def test_the_workload_may_change() -> None:
    survival = learned(*[90] * _REMEMBERED)
    for _ in range(_REMEMBERED):
        survival.updated(10, 100)
    assert survival.part(1.0) == pytest.approx(0.1)

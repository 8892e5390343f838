from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.policy.cost import Copying, CostModel, Prefill, Rest

costs = st.one_of(st.just(0.0), st.floats(1e-12, 1e-2))
prefills = st.builds(Prefill, costs, costs, costs)
tokens = st.integers(0, 200_000)


@given(prefills, st.floats(1e-6, 10), tokens)
def test_what_is_computed_within_a_time_takes_that_time(
    prefill: Prefill, seconds: float, cached: int
) -> None:
    most = prefill.tokens_within(seconds, cached)
    if prefill.work_s(1, cached) == 0:
        assert most > 10**6
        return
    assert most >= 0
    assert prefill.work_s(most, cached) <= seconds * (1 + 1e-9)
    if most < 1 << 30:
        assert prefill.work_s(most + 1, cached) >= seconds * (1 - 1e-9)


@given(prefills, st.integers(1, 100_000), tokens)
def test_the_time_of_so_many_tokens_is_enough_for_them(
    prefill: Prefill, new: int, cached: int
) -> None:
    work = prefill.work_s(new, cached)
    if work > 0:
        assert new - 1 <= prefill.tokens_within(work, cached) <= new
        assert prefill.tokens_within(work * 1.000001, cached) >= new


@given(prefills, tokens)
def test_nothing_is_computed_in_no_time(prefill: Prefill, cached: int) -> None:
    assert prefill.tokens_within(0.0, cached) == 0
    assert prefill.tokens_within(-1.0, cached) == 0


def test_the_parts_of_a_prompt_cost_what_it_costs_at_once_and_their_bases() -> None:
    prefill = Prefill(0.01, 1e-4, 1e-8)
    parts = prefill.work_s(700, 0) + prefill.work_s(324, 700)
    assert parts == pytest.approx(prefill.work_s(1024))
    assert prefill.seconds(1024) == pytest.approx(0.01 + parts)


def test_what_a_rest_adds_grows_between_its_points_and_then_no_more() -> None:
    rest = Rest(((0.0, 0.0), (1.0, 0.02), (3.0, 0.1)))
    assert rest.seconds(0) == 0
    assert [rest.seconds(s) for s in (0.5, 1, 2, 3)] == pytest.approx([0.01, 0.02, 0.06, 0.1])
    assert rest.seconds(math.inf) == 0.1


def test_long_prefixes_are_copied_and_short_ones_computed_again() -> None:
    """A copy's fixed cost is the larger one, what each token costs the smaller one."""
    copy = Copying(0.004, 2e-6)
    cost = CostModel(Prefill(0.001, 5e-5, 1e-9), copy, copy)
    assert not cost.swap_is_cheaper(100)
    assert cost.swap_is_cheaper(1000)
    assert cost.swap_is_cheaper(100_000)

"""Which worker takes a stream, and which one decodes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement import WorkerView, choose_decode, choose_prefill, predicted_s
from sglang_stream.config import PlacementName

POLICIES: tuple[PlacementName, ...] = get_args(PlacementName)
small = st.integers(0, 100_000)
views = st.builds(
    WorkerView,
    name=st.just(""),
    todo_tokens=small,
    tokens_per_s=st.just(0.0) | st.floats(1, 1e6),
    free_tokens=small,
    held_tokens=small,
    requests=small,
    streams=small,
    shared_tokens=small,
)
clusters = st.lists(views, min_size=1, max_size=5).map(
    lambda found: [replace(view, name=f"w{i}") for i, view in enumerate(found)]
)


@given(st.sampled_from(POLICIES), clusters, small, st.integers(0, 1000))
def test_the_choice_is_always_one_of_the_workers(
    policy: PlacementName, workers: list[WorkerView], tokens: int, turn: int
) -> None:
    names = {w.name for w in workers}
    placed = choose_prefill(policy, workers, tokens, turn)
    assert placed.name in names
    assert placed.reason in ({"only"} if len(workers) == 1 else {"prefix", "load", "turn"})
    assert choose_decode(policy, workers, tokens, turn).name in names
    if policy == "stream_aware":
        best = min(predicted_s(w, tokens) for w in workers)
        chosen = next(w for w in workers if w.name == placed.name)
        assert predicted_s(chosen, tokens) <= best + 0.005 + 1e-9


@pytest.mark.parametrize("choose", [choose_prefill, choose_decode])
def test_there_must_be_a_worker(choose: object) -> None:
    with pytest.raises(ValueError, match=r"no .* workers"):
        choose("stream_aware", [], 1, 0)  # type: ignore[operator]


@pytest.mark.parametrize("policy", ["stream_aware", "round_robin"])
@pytest.mark.parametrize("count", [2, 3])
def test_cold_misses_spread_evenly(policy: PlacementName, count: int) -> None:
    cold = [WorkerView(f"w{i}", tokens_per_s=5000, free_tokens=90_000) for i in range(count)]
    taken = [choose_prefill(policy, cold, 4000, turn) for turn in range(6 * count)]
    assert Counter(c.name for c in taken) == {w.name: 6 for w in cold}
    assert {c.reason for c in taken} == {"turn"}
    assert {c.name for c in taken[:count]} == {w.name for w in cold}


def test_a_prefix_draws_until_the_queue_costs_more() -> None:
    def chosen(queue: int) -> str:
        warm = WorkerView("warm", todo_tokens=queue, tokens_per_s=1000, shared_tokens=3000)
        cold = WorkerView("cold", tokens_per_s=1000)
        choices = {choose_prefill("stream_aware", [warm, cold], 4000, turn) for turn in (0, 1)}
        (choice,) = choices
        assert choice.reason == ("prefix" if choice.name == "warm" else "load")
        return choice.name

    assert [chosen(queue) for queue in (0, 1000, 2900, 3100, 9000)] == [
        *("warm", "warm", "warm"),
        *("cold", "cold"),
    ]


def test_a_slow_worker_and_a_full_one_are_avoided() -> None:
    quick = WorkerView("quick", todo_tokens=3000, tokens_per_s=4000, free_tokens=9000)
    slow = WorkerView("slow", todo_tokens=1000, tokens_per_s=500, free_tokens=9000)
    assert choose_prefill("stream_aware", [slow, quick], 1000, 0).name == "quick"
    # Its open streams would lose 1000 tokens of KV, which must be computed again.
    full = WorkerView("full", tokens_per_s=1000, free_tokens=0, held_tokens=5000)
    roomy = WorkerView("roomy", todo_tokens=900, tokens_per_s=1000, free_tokens=5000)
    assert choose_prefill("stream_aware", [full, roomy], 1000, 0).name == "roomy"
    assert predicted_s(full, 1000) == pytest.approx(2.0)


def test_what_is_displaced_is_what_is_held_at_most() -> None:
    worker = WorkerView("w", tokens_per_s=100, free_tokens=0, held_tokens=50)
    assert predicted_s(worker, 1000) == pytest.approx(10.5)
    assert predicted_s(replace(worker, shared_tokens=2000), 1000) == 0


def test_streams_that_tie_go_to_the_worker_with_fewer() -> None:
    few, many = WorkerView("few", streams=1), WorkerView("many", streams=5)
    assert {choose_prefill("stream_aware", [many, few], 9, turn).name for turn in range(4)} == {
        "few"
    }


def test_the_other_policies() -> None:
    idle, warm = WorkerView("idle"), WorkerView("warm", todo_tokens=9000, shared_tokens=256)
    assert choose_prefill("least_loaded", [warm, idle], 100, 0).name == "idle"
    assert choose_prefill("prefix", [idle, warm], 100, 0).name == "warm"
    cold = [replace(warm, shared_tokens=0), idle]
    placed = choose_prefill("prefix", cold, 100, 0)
    assert (placed.name, placed.reason) == ("idle", "load")


def test_decode_prefers_room_and_then_fewer_requests() -> None:
    full = WorkerView("full", free_tokens=500, requests=0)
    busy = WorkerView("busy", free_tokens=5000, requests=7)
    calm = WorkerView("calm", free_tokens=2000, requests=3)
    assert choose_decode("stream_aware", [full, busy, calm], 1000, 0).name == "calm"
    assert choose_decode("stream_aware", [full, busy, calm], 3000, 0).name == "busy"
    assert choose_decode("stream_aware", [full, busy, calm], 9000, 0).name == "full"
    in_turn = [choose_decode("round_robin", [full, busy], 1, turn).name for turn in range(4)]
    assert in_turn == ["full", "busy"] * 2


def test_an_open_stream_is_work_to_come() -> None:
    """Two workers of different speed share streams whose contexts are still short."""
    quick = WorkerView("quick", tokens_per_s=2500.0, streams=1)
    slow = WorkerView("slow", tokens_per_s=1500.0)
    assert choose_prefill("stream_aware", [quick, slow], 30, 0).name == "slow"

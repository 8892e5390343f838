from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.policy import FullView, PoolView, StreamView, choose_victims, plan, rank

PLENTY = PoolView(available=100_000, spare=100_000)


def stream(
    name: str,
    arrival: int = 0,
    cacheable: int = 0,
    held: int = 0,
    sealed: bool = False,
    preempted: bool = False,
) -> StreamView:
    return StreamView(name, arrival, cacheable, held, sealed, preempted)


def test_streams_are_served_first_come_first_served_within_the_token_budget() -> None:
    streams = [stream("late", 2, 900), stream("early", 1, 400), stream("idle", 0, 300, 300)]
    decision = plan([], streams, PLENTY, pass_tokens=512, page_size=1)
    assert [(p.stream_id, p.tokens) for p in decision.passes] == [("early", 400), ("late", 112)]
    assert decision.victims == ()


def test_only_whole_pages_are_planned() -> None:
    decision = plan([], [stream("s", 0, 64)], PLENTY, pass_tokens=50, page_size=16)
    assert decision.passes[0].tokens == 48
    assert plan([], [stream("s", 0, 64)], PLENTY, pass_tokens=15, page_size=16).passes == ()


def test_a_full_request_takes_kv_from_idle_streams_before_working_ones() -> None:
    streams = [stream("idle", 0, 300, 300), stream("works", 1, 500, 200)]
    pool = PoolView(available=100, spare=100)
    assert plan([FullView(200, 100)], streams, pool, pass_tokens=512, page_size=1).victims == (
        "idle",
    )
    assert plan([FullView(500, 100)], streams, pool, pass_tokens=512, page_size=1).victims == (
        "idle",
        "works",
    )


def test_no_pass_while_a_full_request_does_not_fit() -> None:
    streams = [stream("works", 0, 500, 100)]
    pool = PoolView(available=100, spare=100)
    assert plan([FullView(5000, 0)], streams, pool, pass_tokens=512, page_size=1).passes == ()


def test_waiting_sealed_streams_are_preempted_last_and_the_latest_first() -> None:
    streams = [
        stream("sealed-1", 0, 200, 200, sealed=True),
        stream("sealed-2", 1, 200, 200, sealed=True),
        stream("open", 2, 200, 200),
    ]
    decision = plan([FullView(550, 0)], streams, PoolView(0, 0), pass_tokens=512, page_size=1)
    assert decision.victims == ("open", "sealed-2", "sealed-1")


def test_a_working_stream_preempts_only_streams_below_it() -> None:
    streams = [stream("first", 0, 1000, 600), stream("second", 1, 1000, 300)]
    pool = PoolView(available=0, spare=0)
    decision = plan([], streams, pool, pass_tokens=256, page_size=1)
    assert decision.victims == ("second",)
    assert [p.stream_id for p in decision.passes] == ["first"]


def test_a_preempted_stream_takes_only_kv_that_nobody_holds() -> None:
    streams = [stream("early", 0, 300, 0, preempted=True), stream("idle", 1, 300, 300)]
    blocked = plan([], streams, PoolView(0, 0), pass_tokens=256, page_size=1)
    assert (blocked.victims, blocked.passes) == ((), ())
    free = plan([], streams, PoolView(400, 400), pass_tokens=256, page_size=1)
    assert [p.stream_id for p in free.passes] == ["early"]


def test_two_streams_that_do_not_fit_together_come_to_rest() -> None:
    """Each preemption must be paid for by something that arrived."""
    pool_size, held, preempted = 1000, {"a": 0, "b": 0}, {"a": False, "b": False}
    rounds = 0
    while True:
        views = [
            stream(n, i, 900, held[n], preempted=preempted[n]) for i, n in enumerate(("a", "b"))
        ]
        free = pool_size - sum(held.values())
        decision = plan([], views, PoolView(free, free), pass_tokens=300, page_size=1)
        if not decision.passes:
            break
        for victim in decision.victims:
            held[victim], preempted[victim] = 0, True
        for planned in decision.passes:
            held[planned.stream_id] += planned.tokens
        rounds += 1
        assert rounds < 50
    assert sum(held.values()) <= pool_size


def test_passes_leave_what_running_requests_may_still_decode() -> None:
    pool = PoolView(available=1000, spare=100)
    decision = plan([], [stream("s", 0, 500)], pool, pass_tokens=512, page_size=1)
    assert decision.passes[0].tokens == 99


views = st.builds(
    lambda arrival, cacheable, share, *flags: (arrival, cacheable, cacheable * share // 4, *flags),
    st.integers(0, 20),
    st.integers(0, 60).map(lambda n: n * 16),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
)


@given(
    st.lists(views, max_size=12),
    st.lists(st.builds(FullView, st.integers(1, 500), st.integers(0, 100)), max_size=3),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.integers(0, 600),
    st.sampled_from([1, 16]),
)
def test_invariants(
    raw: list[tuple[int, int, int, bool, bool]],
    full: list[FullView],
    available: int,
    reserve: int,
    pass_tokens: int,
    page_size: int,
) -> None:
    streams = [
        stream(f"s{i}", arrival, cacheable, held - held % page_size, *flags)
        for i, (arrival, cacheable, held, *flags) in enumerate(raw)
    ]
    pool = PoolView(available, available - reserve)
    decision = plan(full, streams, pool, pass_tokens=pass_tokens, page_size=page_size)
    assert decision == plan(full, streams, pool, pass_tokens=pass_tokens, page_size=page_size)

    by_id = {s.stream_id: s for s in streams}
    planned = {p.stream_id for p in decision.passes}
    assert len(planned) == len(decision.passes)
    assert planned.isdisjoint(decision.victims)
    assert sum(p.tokens for p in decision.passes) <= pass_tokens
    assert all(p.tokens > 0 and p.tokens % page_size == 0 for p in decision.passes)
    assert all(p.tokens <= by_id[p.stream_id].missing for p in decision.passes)
    gained = sum(by_id[v].held for v in decision.victims)
    if decision.passes:
        need = sum(f.need for f in full) + sum(p.tokens for p in decision.passes)
        assert need <= pool.spare + gained
        order = [s.stream_id for s in rank(streams)]
        lowest_pass = max(order.index(p) for p in planned)
        assert all(order.index(v) > lowest_pass for v in decision.victims)


def test_victims_cover_a_deficit_from_the_lowest_rank_upward() -> None:
    ranked = [stream("a", 0, 100, 100), stream("b", 1, 100, 0), stream("c", 2, 100, 100)]
    assert choose_victims(ranked, 50) == ("c",)
    assert choose_victims(ranked, 150) == ("c", "a")
    assert choose_victims(ranked, 0) == ()

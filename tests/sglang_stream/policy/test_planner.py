from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.policy import (
    POLICIES,
    Budget,
    Copying,
    CostModel,
    Decision,
    Order,
    Pass,
    Planner,
    PolicyName,
    PoolView,
    Preemption,
    Prefill,
    Victim,
    View,
)

PLENTY = PoolView(available=100_000, spare=100_000)
AMPLE = Budget(512, 10.0)
# A millisecond a token; a copy of 100 tokens takes as long as computing them.
COST = CostModel(Prefill(0.0, 1e-3, 0.0), Copying(0.05, 0.0), Copying(0.05, 0.0))


def ranked(views: list[View], policy: PolicyName = "fcfs") -> list[View]:
    order = Order(POLICIES[policy])
    for view in views:
        order.put(view)
    return order.views


def plan(
    full: list[View],
    streams: list[View],
    pool: PoolView,
    budget: Budget = AMPLE,
    policy: PolicyName = "fcfs",
    preemption: Preemption = "auto",
    cost: CostModel | None = None,
) -> Decision:
    return Planner(POLICIES[policy], preemption, cost).plan(
        full, ranked(streams, policy), pool, budget
    )


def whole(need: int, reserve: int = 0, name: str = "request", held: int = 0) -> View:
    return View(name, 1 << 20, need + held, held, full=True, reserve=reserve)


def test_passes_are_served_in_order_within_the_token_budget() -> None:
    streams = [View("late", 2, 900), View("early", 1, 400), View("idle", 0, 300, 300)]
    decision = plan([], streams, PLENTY)
    assert decision.passes == (Pass("early", 400), Pass("late", 112))
    assert not decision.victims
    assert decision.spare == PLENTY.spare - 400 - 112 - 2  # each may be rounded up by a page


def test_only_whole_pages_are_planned() -> None:
    pool = PoolView(1000, 1000, page=16)
    assert plan([], [View("s", 0, 64)], pool, Budget(50, 1)).passes == (Pass("s", 48),)
    assert plan([], [View("s", 0, 64)], pool, Budget(15, 1)).passes == ()


def test_passes_end_within_the_seconds_of_the_iteration() -> None:
    streams = [View("a", 0, 130), View("b", 1, 500)]
    decision = plan([], streams, PLENTY, Budget(2048, 0.25), cost=COST)
    assert decision.passes == (Pass("a", 130), Pass("b", 120))


def test_a_long_cached_prefix_makes_a_pass_shorter() -> None:
    cost = CostModel(Prefill(0.0, 1e-3, 1e-7), COST.swap_out, COST.swap_in)
    short = plan([], [View("s", 0, 5000)], PLENTY, Budget(2048, 0.25), cost=cost).passes[0]
    long = plan([], [View("s", 0, 9000, 4000)], PLENTY, Budget(2048, 0.25), cost=cost).passes[0]
    assert long.tokens < short.tokens
    assert long.tokens > 64
    assert cost.prefill.work_s(long.tokens, 4000) <= 0.25


def test_an_iteration_computes_something_however_slow_the_machine_is() -> None:
    slow = CostModel(Prefill(1.0, 1.0, 0.0), COST.swap_out, COST.swap_in)
    assert plan([], [View("s", 0, 500)], PLENTY, Budget(2048, 0.05), cost=slow).passes


def test_full_requests_ahead_take_their_part_of_the_iteration() -> None:
    streams = [View("s", 0, 500)]
    budget = Budget(2048, 0.2501)
    assert plan([whole(200)], streams, PLENTY, budget, cost=COST).passes == (Pass("s", 50),)
    assert plan([whole(300)], streams, PLENTY, budget, cost=COST).passes == ()
    # By arrival alone the stream is the first.
    alone = plan([whole(300)], streams, PLENTY, budget, policy="default", cost=COST)
    assert alone.passes == (Pass("s", 250),)


def test_what_is_likely_to_stay_is_computed_before_what_is_not() -> None:
    streams = [View("first", 0, 400, 100, unsure=200), View("second", 1, 300, unsure=290)]
    assert plan([], streams, PLENTY).passes == (Pass("first", 100), Pass("second", 10))
    computed = [View("first", 0, 400, 200, unsure=200), View("second", 1, 300, 10, unsure=290)]
    assert plan([], computed, PLENTY).passes == (Pass("first", 200), Pass("second", 290))


@pytest.mark.parametrize(
    ("full", "others", "budget"),
    [
        ([whole(10)], [], AMPLE),
        ([], [], Budget(512, 10.0, decoding=True)),
        ([], [View("without its kv", 1, 200, parked=True, unsure=200)], AMPLE),
    ],
)
def test_what_is_likely_to_be_replaced_delays_nobody_and_takes_no_room(
    full: list[View], others: list[View], budget: Budget
) -> None:
    stream = View("s", 0, 400, 200, unsure=200)
    assert plan([], [stream], PLENTY).passes == (Pass("s", 200),)
    assert plan(full, [stream, *others], PLENTY, budget).passes == ()


def test_what_is_likely_to_be_replaced_takes_no_kv_from_others() -> None:
    pool = PoolView(available=50, spare=50)
    idle = View("idle", 1, 300, 300)
    assert plan([], [View("s", 0, 400, 200), idle], pool).victims == (Victim("idle", False),)
    unsure = plan([], [View("s", 0, 400, 200, unsure=200), idle], pool)
    assert unsure == Decision(passes=(Pass("s", 49),))


def test_a_full_request_takes_kv_from_idle_streams_before_working_ones() -> None:
    streams = [View("idle", 0, 300, 300), View("works", 1, 500, 200)]
    pool = PoolView(available=100, spare=100)
    assert [v.id for v in plan([whole(200, 100)], streams, pool).victims] == ["idle"]
    assert [v.id for v in plan([whole(500, 100)], streams, pool).victims] == ["idle", "works"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preemption", ["auto", "recompute", "swap", "off"])
def test_no_open_stream_keeps_a_full_request_out(
    policy: PolicyName, preemption: Preemption
) -> None:
    streams = [View("most-computed", 0, 800, 700), View("idle", 1, 200, 200)]
    decision = plan(
        [whole(900)], streams, PoolView(0, 0, host=1000), policy=policy, preemption=preemption
    )
    assert {v.id for v in decision.victims} == {"most-computed", "idle"}
    assert decision.passes == ()


def test_no_pass_while_a_full_request_does_not_fit() -> None:
    assert plan([whole(5000)], [View("works", 0, 500, 100)], PoolView(100, 100)).passes == ()


def test_waiting_sealed_streams_are_preempted_last_unswapped_and_not_the_first_of_them() -> None:
    streams = [
        View("sealed-1", 0, 200, 200, full=True),
        View("sealed-2", 1, 200, 200, full=True),
        View("open", 2, 200, 200),
    ]
    first = whole(550, name="sealed-1")
    decision = plan([first], streams, PoolView(0, 0, host=1000), preemption="swap")
    assert decision.victims == (Victim("open", True), Victim("sealed-2", False))


def test_a_stream_whose_pass_runs_is_left_alone() -> None:
    streams = [View("runs", 0, 900, 300, busy=True)]
    assert plan([], streams, PLENTY).passes == ()
    assert plan([whole(300)], streams, PoolView(0, 0)).victims == ()


def test_a_working_stream_takes_kv_from_the_lowest_below_it() -> None:
    streams = [View("first", 0, 500), View("second", 1, 500, 400), View("idle", 2, 100, 100)]
    decision = plan([], streams, PoolView(150, 150))
    assert [v.id for v in decision.victims] == ["idle", "second"]
    assert decision.passes == (Pass("first", 500),)


def test_a_parked_stream_takes_only_what_nobody_holds() -> None:
    streams = [View("parked", 0, 500, parked=True), View("idle", 1, 300, 300)]
    assert plan([], streams, PoolView(101, 101)) == Decision(passes=(Pass("parked", 100),))


def test_a_parked_stream_without_room_does_not_keep_others_from_theirs() -> None:
    streams = [View("parked", 0, 500, parked=True), View("works", 1, 300, 200)]
    assert plan([], streams, PoolView(1, 1)).passes == ()
    streams.append(View("idle", 2, 300, 300))
    decision = plan([], streams, PoolView(1, 1))
    assert decision.passes == (Pass("works", 100),)
    assert [v.id for v in decision.victims] == ["idle"]


def test_preemption_off_leaves_open_streams_their_kv() -> None:
    streams = [View("first", 0, 500), View("idle", 1, 300, 300)]
    decision = plan([], streams, PoolView(101, 101), preemption="off")
    assert decision == Decision(passes=(Pass("first", 100),))


@pytest.mark.parametrize(
    ("preemption", "held", "host", "swap"),
    [
        ("recompute", 300, 1000, False),
        ("swap", 300, 1000, True),
        ("swap", 300, 299, False),  # does not fit into host memory
        ("auto", 300, 1000, True),  # 0.3 s to compute, 0.1 s to copy out and back
        ("auto", 90, 1000, False),
    ],
)
def test_each_victim_goes_the_way_that_is_cheaper_for_it(
    preemption: Preemption, held: int, host: int, swap: bool
) -> None:
    streams = [View("victim", 0, held, held)]
    pool = PoolView(0, 0, host=host)
    decision = plan([whole(50)], streams, pool, preemption=preemption, cost=COST)
    assert decision.victims == (Victim("victim", swap),)


def test_a_victim_whose_copy_is_there_already_is_not_copied_again() -> None:
    streams = [View("victim", 0, 400, 100, saved=400)]
    decision = plan([whole(50)], streams, PoolView(0, 0, host=1000), preemption="swap")
    assert decision.victims == (Victim("victim", False),)


def test_a_copy_comes_back_when_its_stream_is_planned_or_sealed() -> None:
    saved = View("s", 0, 700, saved=600)
    decision = plan([], [saved], PLENTY)
    assert (decision.restores, decision.passes) == (("s",), (Pass("s", 100),))
    sealed = saved._replace(full=True, reserve=8)
    assert plan([sealed], [sealed], PLENTY).restores == ("s",)
    assert not plan([], [saved._replace(tokens=600)], PLENTY).restores


def test_a_copy_that_comes_back_needs_room() -> None:
    saved = View("s", 0, 700, saved=600)
    assert plan([], [saved], PoolView(650, 650)).passes == (Pass("s", 49),)
    assert plan([], [saved], PoolView(600, 600)) == Decision(spare=600)


def test_a_long_slice_does_not_share_the_iteration_in_which_another_prefill_ends() -> None:
    forward = Prefill(0.02, 1e-3, 0.0)
    planner = Planner(POLICIES["fcfs"], "auto", CostModel(forward, COST.swap_out, COST.swap_in))
    tail, short, long = whole(16, name="tail"), whole(40, name="short"), whole(41, name="long")
    huge = whole(2000, name="huge")
    assert planner.together([tail, short, short], 512) == (3, 512)
    assert planner.together([tail, short, long, short], 512) == (2, 512)
    assert planner.together([huge, long], 512) == (1, 512)  # the iteration is full
    assert planner.together([huge, long], 4096) == (1, 4096)
    assert planner.together([], 512) == (0, 512)


def test_an_iteration_is_stretched_where_that_ends_a_request() -> None:
    forward = Prefill(0.02, 1e-3, 0.0)
    planner = Planner(POLICIES["fcfs"], "auto", CostModel(forward, COST.swap_out, COST.swap_in))
    with_question, longer = whole(528, name="with a question"), whole(545, name="longer")
    assert planner.together([with_question, with_question], 512) == (1, 528)
    assert planner.together([longer], 512) == (1, 512)
    assert planner.together([whole(500, name="first"), whole(40, name="last")], 512) == (2, 540)


def test_a_slice_that_spares_no_iteration_does_not_join_one_that_ends() -> None:
    forward = Prefill(0.02, 1e-3, 0.0)
    planner = Planner(POLICIES["fcfs"], "auto", CostModel(forward, COST.swap_out, COST.swap_in))
    first = whole(500, name="first")
    assert planner.together([first, whole(528, name="one further in any case")], 512) == (1, 512)
    assert planner.together([first, whole(550, name="two, or one")], 512) == (2, 512)


def test_requests_share_iterations_as_they_come_while_no_cost_is_known() -> None:
    planner = Planner(POLICIES["fcfs"], "auto")
    assert planner.together([whole(16, name="a"), whole(2000, name="b")], 4096) == (2, 4096)


def test_room_to_decode_comes_from_open_streams_first() -> None:
    order = ranked(
        [
            View("sealed", 0, 200, 200, full=True),
            View("works", 1, 400, 200),
            View("idle", 2, 200, 200),
        ]
    )
    planner = Planner(POLICIES["fcfs"], "recompute")
    pool = PoolView(0, 0)
    assert [v.id for v in planner.make_room(order, 50, pool)] == ["idle"]
    assert [v.id for v in planner.make_room(order, 450, pool)] == ["idle", "works", "sealed"]
    assert planner.make_room(order, 0, pool) == []


def views(full: bool) -> st.SearchStrategy[View]:
    return st.builds(
        lambda arrival, tokens, held, saved, reserve, busy, parked, since, due, unsure: View(
            id="",
            arrival=arrival,
            tokens=tokens,
            held=min(held, tokens),
            full=full,
            latest=arrival + 3,
            saved=min(saved, tokens),
            reserve=reserve if full else 0,
            busy=busy and not full,
            parked=parked,
            since_s=since,
            work_s=max(0, tokens - max(held, saved)) * 1e-3,
            due_s=due,
            unsure=min(unsure, tokens),
        ),
        st.integers(0, 1000),
        st.integers(1, 900),
        st.integers(0, 900),
        st.one_of(st.just(0), st.integers(0, 900)),
        st.integers(0, 100),
        st.booleans(),
        st.booleans(),
        st.floats(0, 10),
        st.floats(0, 10),
        st.one_of(st.just(0), st.integers(0, 900)),
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[View], list[View], PoolView, Budget]:
    waiting = draw(st.lists(views(True), max_size=3))
    streams = draw(st.lists(st.one_of(views(False), views(False), views(True)), max_size=12))
    waiting = [v._replace(id=f"w{i}", arrival=2000 + i) for i, v in enumerate(waiting)]
    streams = [v._replace(id=f"s{i}", arrival=v.arrival * 20 + i) for i, v in enumerate(streams)]
    available = draw(st.integers(0, 3000))
    page = draw(st.sampled_from([1, 16]))
    spare = draw(st.integers(-100, available))
    pool = PoolView(available, spare, page, host=draw(st.integers(0, 2000)))
    budget = Budget(draw(st.integers(0, 700)), draw(st.floats(0, 1)), draw(st.booleans()))
    return waiting, streams, pool, budget


@given(
    situations(),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["auto", "recompute", "swap", "off"]),
    st.sampled_from([None, COST]),
)
def test_invariants(
    situation: tuple[list[View], list[View], PoolView, Budget],
    policy: PolicyName,
    preemption: Preemption,
    cost: CostModel | None,
) -> None:
    waiting, streams, pool, budget = situation
    order = ranked(streams, policy)
    planner = Planner(POLICIES[policy], preemption, cost)
    decision = planner.plan(waiting, order, pool, budget)
    assert decision == planner.plan(waiting, order, pool, budget)

    by_id = {v.id: v for v in [*streams, *waiting]}
    places = {v.id: i for i, v in enumerate(order)}
    chosen = {p.id for p in decision.passes}
    victims = [by_id[v.id] for v in decision.victims]

    # Nothing is both chosen and victim, nothing twice, and only what can be is either.
    assert not chosen & {v.id for v in victims}
    assert len(chosen) == len(decision.passes)
    assert len({v.id for v in victims}) == len(victims)
    assert all(v.held and not v.busy for v in victims)
    for p in decision.passes:
        view = by_id[p.id]
        assert not view.full
        assert not view.busy
        assert 0 < p.tokens <= view.missing
        assert p.tokens % pool.page == 0
        if view.restore:
            assert view.id in decision.restores

    # Never over the budget of tokens or of KV.
    assert sum(p.tokens for p in decision.passes) <= budget.tokens
    freed = sum(v.held for v in victims)
    wanted = sum(p.tokens + pool.page + by_id[p.id].restore for p in decision.passes)
    need = sum(v.need for v in waiting)
    if decision.passes:
        assert need <= pool.available
        assert wanted <= pool.spare - need + freed
    # Nor over the seconds, except by the least that is computed at all.
    if cost is not None and len(decision.passes) > 1:
        rest = decision.passes[1:] if not waiting else decision.passes
        assert sum(cost.prefill.work_s(p.tokens) for p in rest) <= budget.seconds + 1e-9

    # Whoever made room for a stream ranks below it; open streams go before sealed ones.
    if need <= pool.available and victims:
        lowest_chosen = max((places[i] for i in chosen), default=-1)
        assert chosen
        assert all(places[v.id] > lowest_chosen for v in victims)
        assert not any(v.full for v in victims)
    sealed = [v.full for v in victims]
    assert sealed == sorted(sealed)
    assert all(not v.swap or by_id[v.id].held <= pool.host for v in decision.victims)

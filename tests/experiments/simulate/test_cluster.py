from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from experiments.cells import Cell
from experiments.request_row import RequestRow
from experiments.simulate.batches import Batches, Formed, Request
from experiments.simulate.clients import Client
from experiments.simulate.cluster import Cluster
from experiments.simulate.holdings import Stream
from experiments.simulate.worker import Worker
from experiments.spec import EngineSpec
from experiments.workload.shapes import Arrived, Document, Query, Step
from sglang_stream.config import Figure
from sglang_stream.policy import Rest
from tests.experiments.simulate.loads import (
    CALL_S,
    POLICY_NAMES,
    PREFILL,
    RESEND,
    WAITING,
    append_query,
    engines,
    machine,
    random_load,
    simulated,
    streaming,
)

SDK, DIRECT = EngineSpec(client="sdk"), EngineSpec(client="direct")


def one(query: Query, cell: Cell, engine: EngineSpec = DIRECT, output: int = 1) -> RequestRow:
    (row,) = simulated(machine(), engine, cell, [Arrived(1.0, query)], output)
    return row


def ttft(row: RequestRow) -> float:
    assert row.ttft_s is not None
    return row.ttft_s


def test_a_waiting_request_alone_takes_its_iterations_and_two_ways() -> None:
    query = append_query("q", (0.5, 3000), (1.0, 2000))
    row = one(query, WAITING)
    iterations = [(2048, 0), (2048, 2048), (5015 - 4096, 4096)]
    expected = sum(PREFILL.seconds(new, cached) for new, cached in iterations) + 2 * CALL_S
    assert ttft(row) == pytest.approx(expected)
    assert (row.last_chunk_s, row.cached_tokens, row.prompt_tokens) == (2.0, 0, 5015)


def test_after_a_rest_a_call_and_a_forward_take_longer() -> None:
    profile = structs.replace(
        machine(),
        call_rest=Figure(Rest(((0.0, 0.0), (10.0, 0.1))), "assumed"),
        forward_rest=Figure(Rest(((0.0, 0.0), (10.0, 0.01))), "assumed"),
    )
    load = [Arrived(at_s, append_query(str(at_s), (0.0, 1000))) for at_s in (1.0, 6.0)]
    first, second = (ttft(row) for row in simulated(profile, SDK, WAITING, load))
    awake_s = PREFILL.seconds(1015) + 2 * CALL_S
    assert first == pytest.approx(awake_s + 0.1 + 0.01)  # before it there was nothing
    since_s = 5 - first + CALL_S  # the first answer left, to the second call
    call_s = CALL_S + 0.01 * since_s
    between_s = since_s + call_s  # the two forwards
    assert second == pytest.approx(awake_s - CALL_S + call_s + 0.001 * between_s)


@pytest.mark.parametrize("engine", [SDK, DIRECT])
def test_a_stream_alone_has_the_last_chunk_and_the_question_left(engine: EngineSpec) -> None:
    query = append_query("q", (0.5, 500), (2.0, 300))
    row = one(query, streaming(), engine)
    assert ttft(row) == pytest.approx(PREFILL.seconds(310, 505) + 2 * CALL_S)
    assert (row.computed_tokens, row.ready_tokens, row.cached_tokens) == (505, 505, 505)


def test_a_client_that_awaits_answers_seals_after_the_pass_of_the_chunk_before() -> None:
    """The first of two chunks is there CALL_S after it came, the last one two ways later, into its
    pass."""
    query = append_query("q", (0.5, 500), (2.0, 300), (2.001, 100))
    row = one(query, streaming(), SDK)
    passes = CALL_S + PREFILL.seconds(300, 505)
    assert ttft(row) == pytest.approx(passes + PREFILL.seconds(110, 805) + CALL_S - 0.001)
    assert row.computed_tokens == 805


def test_a_resent_prompt_finds_what_it_has_in_common_with_the_one_before() -> None:
    row = one(append_query("q", (0.5, 500), (2.0, 300)), RESEND)
    assert ttft(row) == pytest.approx(PREFILL.seconds(310, 505) + 2 * CALL_S)
    assert row.cached_tokens == 505


def test_who_resends_waits_for_the_answer_before() -> None:
    """What came while the first prompt was computed goes into one request, the last one too."""
    chunks = ((0.5, 2000), (0.55, 100), (0.6, 100), (3.0, 300), (3.01, 200))
    row = one(append_query("q", *chunks), RESEND)
    second = PREFILL.seconds(300, 2205) + 2 * CALL_S
    rest = PREFILL.seconds(210, 2505) + 2 * CALL_S
    assert second > 0.01
    assert ttft(row) == pytest.approx(second - 0.01 + rest)
    assert row.seal_s == pytest.approx(1.0 + 3.0 + second)
    assert row.cached_tokens == 2505


def test_the_prompts_on_the_way_of_who_resends() -> None:
    query = append_query("q", (0.5, 2000), (0.55, 100), (0.6, 100), (3.0, 300))
    asked: list[tuple[str, int]] = []

    class Told(Cluster):
        def ask(self, worker: Worker, request: Request, client: Client) -> None:
            asked.append((request.id, request.tokens))
            super().ask(worker, request, client)

    Told(machine(), DIRECT, RESEND).run([Arrived(1.0, query)], 1)
    assert asked == [("q/1", 2005), ("q/3", 2205), ("q", 2515)]


def test_a_list_on_the_way_that_is_larger_than_the_pool() -> None:
    """It would be refused if it were sent, while a stream only computes as much as there is room
    for."""
    lists = ((Document("a", 5000),), (Document("b", 100),))
    query = Query("q", "update", tuple(Step(1.0 + i, each) for i, each in enumerate(lists)), 5, 10)
    rows = {
        cell.mode: simulated(machine(kv_tokens=4000), DIRECT, cell, [Arrived(0.0, query)])[0]
        for cell in (WAITING, RESEND, streaming())
    }
    assert rows["resend"].failed is not None
    assert rows["waiting"].failed is rows["streaming"].failed is None


def test_an_update_keeps_the_common_prefix_and_finds_a_list_that_comes_back() -> None:
    a, b, c = (Document(name, 100) for name in "abc")
    steps = (Step(1.0, (a, b)), Step(2.0, (a, c)), Step(3.0, (a, b)))
    query = Query("q", "update", steps, 5, 10)
    soft, hard = (
        one(query, streaming(), EngineSpec(client="direct", invalidation=kind))
        for kind in ("soft", "hard")
    )
    for row in (soft, hard):
        assert (row.updates, row.lcp_tokens, row.invalidated_tokens) == (3, 5 + 105 + 105, 200)
    assert (soft.computed_tokens, soft.cached_tokens) == (305, 205)
    assert (hard.computed_tokens, hard.cached_tokens) == (305, 105)
    assert ttft(soft) == pytest.approx(PREFILL.seconds(10, 205) + 2 * CALL_S)


def test_the_answer_is_decoded_a_step_a_token() -> None:
    row = one(append_query("q", (0.5, 100)), WAITING, output=4)
    assert row.end_s is not None
    assert row.first_token_s is not None
    context = 115 + 1, 115 + 2, 115 + 3
    decode = machine().decode.value
    steps = sum(decode.seconds(1, tokens) for tokens in context)
    assert row.end_s - row.first_token_s == pytest.approx(steps)
    assert row.output_tokens == 4


def test_apart_the_first_token_comes_after_the_prompts_kv() -> None:
    query = append_query("q", (0.5, 1000))
    apart = EngineSpec(client="direct", decode_workers=1)
    row = one(query, WAITING, apart)
    copy = machine().swap_out.value
    expected = PREFILL.seconds(1015) + copy.seconds(1015) + 2 * CALL_S
    assert ttft(row) == pytest.approx(expected)


def test_a_request_larger_than_the_pool_fails_and_the_others_do_not() -> None:
    load = [
        Arrived(0.0, append_query("large", (1.0, 5000))),
        Arrived(0.5, append_query("q", (1.0, 50))),
    ]
    large, small = simulated(machine(kv_tokens=4000), DIRECT, streaming(), load)
    assert large.failed is not None
    assert large.ttft_s is None
    assert small.failed is None
    assert ttft(small) > 0


def test_streams_that_do_not_fit_lose_their_kv_and_are_computed_again() -> None:
    queries = [append_query(f"q{i}", (0.1, 3000), (3.0, 500)) for i in range(3)]
    load = [Arrived(i * 0.01, query) for i, query in enumerate(queries)]
    engine = EngineSpec(client="direct", kv_tokens=8000, preemption="recompute")
    rows = simulated(machine(), engine, streaming(), load)
    assert sum(row.preemptions or 0 for row in rows) > 0
    swapping = EngineSpec(client="direct", kv_tokens=8000, preemption="swap", host_memory_gb=1.0)
    rows = simulated(machine(), swapping, streaming(), load)
    assert sum(row.swapped_tokens or 0 for row in rows) > 0


def test_what_is_likely_to_be_replaced_is_not_computed_while_others_decode() -> None:
    """Lists whose last document, half of each, changes some times; the others stay."""
    load: list[Arrived] = []
    for number in range(40):
        stay = [Document(f"{number}.{i}", 50) for i in range(4)]
        steps = [Step(i, (*stay, Document(f"{number}:{i}", 200))) for i in range(number % 3 + 4)]
        load.append(Arrived(0.25 * number, Query(str(number), "update", tuple(steps))))
    computed, ready = dict[bool, int](), dict[bool, int]()
    for foresees in (False, True):
        engine = EngineSpec(compute_all=() if foresees else ("fcfs",))
        rows = simulated(machine(), engine, streaming("fcfs"), load, output=250)
        computed[foresees] = sum(row.computed_tokens or 0 for row in rows)
        ready[foresees] = sum(row.ready_tokens or 0 for row in rows)
    assert computed[True] < 0.7 * computed[False]
    assert ready[True] > ready[False]


def test_the_same_load_gives_the_same_rows() -> None:
    load = random_load(3, 40, 4.0)
    engine = EngineSpec(kv_tokens=7000, prefill_workers=2, decode_workers=1, host_memory_gb=0.004)
    first, again = (simulated(machine(), engine, streaming("slack"), load, 3) for _ in range(2))
    assert first == again


def test_two_workers_share_a_load() -> None:
    load = random_load(1, 60, 8.0)
    alone, both = (
        simulated(machine(), EngineSpec(prefill_workers=n), WAITING, load) for n in (1, 2)
    )
    assert sum(map(ttft, both)) < 0.7 * sum(map(ttft, alone))


class Watch:
    """Looks at every iteration of every worker, and counts what is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: dict[str, int] = {}
        self.iterations = 0
        original = Batches.form
        watch = self

        def form(batches: Batches) -> Formed:
            formed = original(batches)
            watch.look(batches, formed)
            return formed

        monkeypatch.setattr(Batches, "form", form)

    def look(self, batches: Batches, formed: Formed) -> None:
        self.iterations += 1
        pool = batches._pool
        assert min(pool.free, pool.used, pool.evictable, pool.protected) >= 0
        assert pool.free + pool.used + pool.evictable + pool.protected == pool.size
        streams = batches._table.live.values()
        assert batches._table.kv.held_tokens == sum(s.held for s in streams)
        host = batches._table.kv.host
        # An update shortens what a copy is good for, not the memory that it takes.
        assert sum(s.saved for s in streams) <= host.tokens <= host.capacity
        new = sum(part.end - part.start for part in formed.slices)
        most = batches._limits.batch_tokens * 17 // 16  # where that ends a request
        assert new <= most + len(formed.slices) * (pool.page - 1)
        for part in formed.slices:
            assert part.start < part.end
            name = part.owner.id
            self.computed[name] = self.computed.get(name, 0) + part.end - part.start
            if isinstance(part.owner, Stream):
                assert not part.owner.sealed


@given(
    st.integers(0, 10_000),
    engines,
    st.sampled_from((WAITING, RESEND, *map(streaming, POLICY_NAMES))),
    st.sampled_from((1, 5)),
)
@settings(max_examples=60, deadline=None)
def test_every_query_is_answered_once_within_the_pool(
    seed: int, engine: EngineSpec, cell: Cell, output: int
) -> None:
    load = random_load(seed, 12, 6.0)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        cluster = Cluster(machine(), engine, cell)
        clients = cluster.run(load, output)
    assert [client.query for client in clients] == [arrived.query for arrived in load]
    for client in clients:
        assert client.request is not None
        assert client.first_token_s is not None
        assert client.end_s is not None
        assert client.end_s >= client.first_token_s >= client.last_chunk_s + 2 * CALL_S
        assert client.request.generated == output
        assert client.request.tokens == client.query.prompt_tokens
        if client.stream is not None:
            usage = client.stream.usage
            done = watch.computed[client.query.query_id]
            assert done == usage.computed_tokens + client.request.tokens - client.request.found
            if not usage.preemptions and client.query.mode == "append":
                whole = usage.computed_tokens == client.request.tokens
                assert done - client.request.tokens == (engine.page if whole else 0)  # the last one
                assert usage.recomputed_tokens == 0
        elif cell is WAITING:
            assert watch.computed[client.query.query_id] == client.request.tokens
    for worker in cluster.workers:
        assert (worker.pool.used, worker.pool.protected) == (0, 0)
        assert not worker.table.live
        assert not worker.batches.queue
    assert {decoder.free for decoder in cluster.decoders} <= {engine.kv_tokens}

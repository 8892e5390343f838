from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import get_args

import pytest

from experiments.bench.counters import COUNTERS
from experiments.cells import Cell
from experiments.report.timelines import request_timeline, worker_timeline
from experiments.request_row import CellRow, EventName, EventRow, LoadRow, RequestRow
from experiments.simulate.rows import simulate
from experiments.spec import EngineSpec
from experiments.workload.shapes import Arrived, Document, Query, Step
from tests.experiments.simulate.loads import (
    RESEND,
    WAITING,
    append_query,
    machine,
    random_load,
    streaming,
)

SWAPPING = EngineSpec(client="direct", kv_tokens=8000, preemption="swap", host_memory_gb=1.0)
TIGHT = [
    Arrived(i * 0.5, append_query(f"q{i}", (0.1, 3000), (3.0, 500), (3.5, 20))) for i in range(4)
]


def rows_of(
    cell: Cell, load: list[Arrived], engine: EngineSpec = SWAPPING, *, events: bool = False
) -> tuple[list[RequestRow], list[EventRow], CellRow]:
    *rows, end = simulate(machine(), engine, cell, load, 3, "test", events=events)
    assert isinstance(end, CellRow)
    requests = [row for row in rows if isinstance(row, RequestRow)]
    happened = [row for row in rows if isinstance(row, EventRow)]
    assert rows == [*requests, *happened]
    return requests, happened, end


def key_of(row: LoadRow) -> list[object]:
    return [getattr(row, name) for name in LoadRow.__struct_fields__]


@pytest.mark.parametrize("cell", [WAITING, RESEND, streaming()], ids=lambda cell: cell.mode)
def test_the_last_row_is_that_of_the_cell(cell: Cell) -> None:
    requests, events, end = rows_of(cell, TIGHT)
    assert (end.requests, end.failed, events) == (4, 0, [])
    assert end.makespan_s == max(row.end_s for row in requests if row.end_s is not None)
    assert {tuple(key_of(row)) for row in requests} == {tuple(key_of(end))}
    assert {row.chunks for row in requests} == {3}


def test_counters_are_those_of_an_engine() -> None:
    counted = rows_of(streaming(), TIGHT)[2].counted
    kinds = {"preemptions_recompute", "preemptions_swap"}
    assert set(counted) == set(COUNTERS.values()) - {"preemptions"} | kinds
    assert set(rows_of(WAITING, TIGHT)[2].counted.values()) == {0}


def test_counters_of_swaps() -> None:
    requests, _, end = rows_of(streaming(), TIGHT)
    assert end.counted["preemptions_swap"] > 0
    assert end.counted["restored_tokens"] > 0
    preemptions = end.counted["preemptions_swap"] + end.counted["preemptions_recompute"]
    assert preemptions == sum(row.preemptions or 0 for row in requests)
    assert end.counted["swapped_tokens"] == sum(row.swapped_tokens or 0 for row in requests)
    assert end.counted["pass_tokens"] == sum(row.computed_tokens or 0 for row in requests)


def test_counters_of_updates() -> None:
    a, b, c = (Document(name, 100) for name in "abc")
    steps = (Step(1.0, (a, b)), Step(2.0, (a, c)), Step(3.0, (a, b)))
    (row,), _, end = rows_of(streaming(), [Arrived(0.0, Query("q", "update", steps, 5, 10))])
    assert (row.chunks, row.updates) == (0, 3)
    assert end.counted["passes"] == 3  # the opening, a and b, c
    assert end.counted["found_again_tokens"] == 100


def test_a_refused_request_has_no_times_after_its_chunks() -> None:
    requests, _, end = rows_of(WAITING, [Arrived(0.0, append_query("q", (1.0, 9000)))])
    assert (end.requests, end.failed, end.makespan_s) == (1, 1, 0.0)
    assert requests[0].failed is not None
    assert (requests[0].iterator_end_s, requests[0].end_s, requests[0].chunks) == (None, None, 1)


def test_events_tell_what_was_computed_for_whom() -> None:
    requests, events, end = rows_of(streaming(), TIGHT, events=True)
    assert rows_of(streaming(), TIGHT)[::2] == (requests, end)
    assert {event.what for event in events} == set(get_args(EventName))
    for row in requests:
        own = [event for event in events if event.query_id == row.query_id]
        tokens = Counter[str]()
        for event in own:
            tokens[event.what] += event.tokens
        assert tokens["pass"] == row.computed_tokens
        assert tokens["prefill"] == (row.prompt_tokens or 0) - (row.cached_tokens or 0)
        assert [e.t_s for e in own if e.what == "chunk"] == [
            row.arrival_s + at_s for at_s in (0.1, 3.0, 3.5)
        ]
        for what in ("seal", "first_token", "end"):
            (only,) = (event for event in own if event.what == what)
            assert only.t_s == getattr(row, f"{what}_s")
        assert sum(event.what == "preempt" for event in own) == row.preemptions
    restored = sum(event.tokens for event in events if event.what == "restore")
    assert restored == end.counted["restored_tokens"]
    assert [event.t_s for event in events] == sorted(event.t_s for event in events)


def test_a_worker_does_one_thing_at_a_time() -> None:
    load = random_load(3, 30, 4.0)
    engine = EngineSpec(kv_tokens=7000, prefill_workers=2, host_memory_gb=0.004)
    events = rows_of(streaming("slack"), load, engine, events=True)[1]
    for worker in ("prefill-0", "prefill-1"):
        forwards = {
            (event.t_s, event.t_s + event.seconds)
            for event in events
            if event.worker == worker and event.what in ("pass", "prefill", "decode")
        }
        spans = sorted(forwards)
        assert len(spans) > 30
        for (_, ends_s), (begins_s, _) in pairwise(spans):
            assert begins_s >= ends_s


def test_timelines_are_drawn_from_them() -> None:
    events = rows_of(streaming(), TIGHT, events=True)[1]
    stream, worker = request_timeline(events), worker_timeline(events)
    assert stream is not None
    assert worker is not None
    assert "prefill-0" in worker.caption

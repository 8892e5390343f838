from __future__ import annotations

import asyncio
from typing import Any

import pytest

from experiments.cells import Cell
from experiments.replay.load import replay_load
from experiments.request_row import CellRow, EventRow, LoadRow, RequestMode, RequestRow
from experiments.spec import WorkloadSpec
from experiments.workload.arrivals import arrivals_of
from experiments.workload.contents import RandomContents
from experiments.workload.load import queries_of
from experiments.workload.shapes import Arrived
from sglang_stream.errors import EngineFailure, InvalidRequest, WorkerUnavailable
from tests.experiments.replay.fake_server import FakeServer

WARM_UPS = 6
DESCRIBED = {"source": "engine", "machine": "fake", "workload": "small"}
CONTENTS = RandomContents(0)


def load_of(kind: Any, count: int = 6) -> list[Arrived]:
    workload = WorkloadSpec(kind, count, scale=500, delay=0.01)
    return arrivals_of(workload, queries_of(workload), 50.0, 0)


def replayed(
    server: FakeServer, mode: RequestMode, load: list[Arrived], **options: Any
) -> list[LoadRow]:
    rows: list[LoadRow] = []
    advanced: list[None] = []
    cell = Cell(mode, "srpf" if mode == "streaming" else None, "stream_aware", 50.0, 0)
    try:
        asyncio.run(
            replay_load(
                server.url,
                cell,
                load,
                CONTENTS,
                2,
                DESCRIBED,
                rows.append,
                lambda: advanced.append(None),
                watch_s=0.02,
                **options,
            )
        )
    finally:
        assert len(advanced) == sum(isinstance(row, RequestRow) for row in rows)
    return rows


@pytest.mark.parametrize("kind", ["crawler", "anns"])
@pytest.mark.parametrize("mode", ["waiting", "resend", "streaming"])
def test_a_row_for_each_request_and_one_for_the_cell(
    server: FakeServer, kind: str, mode: RequestMode
) -> None:
    load = load_of(kind)
    *rows, cell = replayed(server, mode, load)
    assert isinstance(cell, CellRow)
    assert (cell.requests, cell.failed) == (6, 0)
    assert (cell.counted["passes"] > 0) == (mode == "streaming")
    assert server.flushed == 2
    assert server.streams == {}
    by_id = {row.query_id: row for row in rows if isinstance(row, RequestRow)}
    for arrived in load:
        row, query = by_id[arrived.query.query_id], arrived.query
        assert row.prompt_tokens == query.prompt_tokens
        assert row.output_tokens == 2
        assert row.chunks is not None
        times = (row.arrival_s, row.last_chunk_s, row.iterator_end_s)
        times += (row.seal_s, row.first_token_s, row.end_s)
        known = [round(at, 6) for at in times if at is not None]
        assert len(known) == 6
        assert known == sorted(known)
        assert row.ttft_s == pytest.approx((row.first_token_s or 0) - (row.iterator_end_s or 0))
        assert (row.ready_tokens is not None) == (mode == "streaming")


@pytest.mark.parametrize("mode", ["waiting", "resend", "streaming"])
def test_all_modes_end_with_the_same_prompts(server: FakeServer, mode: RequestMode) -> None:
    load = load_of("anns")
    replayed(server, mode, load)
    for arrived in load:
        query = arrived.query
        documents = query.context(len(query.steps))
        context = [i for document in documents for i in CONTENTS.document(document)]
        prompt = [*CONTENTS.opening(query), *context, *CONTENTS.question(query)]
        assert server.prompts.count(prompt) == 1


def test_requests_come_whether_earlier_ones_are_answered_or_not(server: FakeServer) -> None:
    server.alone, server.together = WARM_UPS, WARM_UPS + 6
    rows = replayed(server, "waiting", load_of("crawler"))
    ends = [row.first_token_s for row in rows if isinstance(row, RequestRow)]
    lasts = [row.last_chunk_s for row in rows if isinstance(row, RequestRow)]
    assert min(end for end in ends if end is not None) >= max(lasts)


def test_what_clients_saw(server: FakeServer) -> None:
    load = load_of("crawler")
    rows = replayed(server, "streaming", load, events=True)
    events = [row for row in rows if isinstance(row, EventRow)]
    steps = sum(len(arrived.query.steps) for arrived in load)
    whats = [event.what for event in events]
    assert [whats.count(w) for w in ("chunk", "seal", "first_token", "end")] == [steps, 6, 6, 6]


def test_a_refused_request_has_its_reason(server: FakeServer) -> None:
    server.refuse = {WARM_UPS + 2}
    *rows, cell = replayed(server, "waiting", load_of("crawler"))
    assert isinstance(cell, CellRow)
    assert cell.failed == 1
    assert [row.failed for row in rows if isinstance(row, RequestRow) and row.failed] == [
        "too long"
    ]


def test_a_load_of_which_nothing_is_answered(server: FakeServer) -> None:
    server.refuse = set(range(WARM_UPS + 1, 100))
    with pytest.raises(EngineFailure, match="no request was answered; the first says: too long"):
        replayed(server, "waiting", load_of("crawler"))


@pytest.mark.parametrize("mode", ["waiting", "streaming"])
def test_a_server_that_dies(server: FakeServer, mode: RequestMode) -> None:
    server.dies_at = WARM_UPS + 3
    with pytest.raises(WorkerUnavailable, match="does not answer any more"):
        replayed(server, mode, load_of("crawler"))


def test_a_server_without_streams(server: FakeServer) -> None:
    server.has_streams = False
    with (
        pytest.warns(UserWarning, match="no /v1/streams"),
        pytest.raises(InvalidRequest, match="has no streams"),
    ):
        replayed(server, "streaming", load_of("crawler"))

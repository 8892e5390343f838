from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from pathlib import Path
from typing import Any

import pytest

from retrieval_clients import Page, record, replay
from retrieval_clients.traces import Trace, TraceDocument, TraceMode, TraceStep, recorded_traces
from sglang_stream.sdk.items import parse_chunk, parse_context


class Clock:
    """Time that passes only when it is told to, or slept through."""

    def __init__(self, now: float = 100.0) -> None:
        self.time = now
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep_until(self, deadline: float) -> None:
        self.slept.append(deadline)
        self.time = max(self.time, deadline)


async def source(clock: Clock, *items: tuple[float, Any]) -> AsyncGenerator[Any, None]:
    """Items, each after so many seconds."""
    for wait_s, item in items:
        clock.time += wait_s
        yield item


def recorded(
    path: Path, clock: Clock, items: AsyncIterable[Any], mode: TraceMode = "append"
) -> tuple[list[Any], Trace]:
    async def run() -> list[Any]:
        return [item async for item in record(items, path, "q", "Why?", mode, clock.now)]

    seen = asyncio.run(run())
    (trace,) = recorded_traces(path)
    return seen, trace


def replayed(trace: Trace, clock: Clock, delay: float = 1.0, late_s: float = 0.0) -> list[Any]:
    async def run() -> list[Any]:
        seen = []
        async for item in replay(trace, delay, clock.now, clock.sleep_until):
            seen.append(item)
            clock.time += late_s
        return seen

    return asyncio.run(run())


def test_pages_are_recorded_with_their_times(tmp_path: Path) -> None:
    clock = Clock()
    page = Page("http://a/", "http://a/", "A", "the page", 200, 0.0, 1.0)
    items = [(1.5, page), (0.0, {"id": "b", "text": "a mapping"}), (2.0, "a text")]
    seen, trace = recorded(tmp_path / "t.jsonl", clock, source(clock, *items))
    assert seen == [item for _, item in items]
    assert (trace.query_id, trace.query, trace.mode) == ("q", "Why?", "append")
    assert [at_s for at_s, _ in trace.steps] == [1.5, 1.5, 3.5]
    found = [d for _, (d,) in trace.steps]
    assert [d.text for d in found] == ["the page", "a mapping", "a text"]
    assert [d.id for d in found[:2]] == ["http://a/", "b"]


def test_lists_are_recorded_as_lists(tmp_path: Path) -> None:
    clock = Clock()
    items = [(1.0, ["one", "two"]), (1.0, ({"text": "two"}, {"text": "one"})), (1.0, [])]
    _, trace = recorded(tmp_path / "t.jsonl", clock, source(clock, *items), "update")
    first, second, third = (documents for _, documents in trace.steps)
    assert [d.text for d in first] == ["one", "two"]
    assert second == (first[1], first[0])  # known by their content
    assert third == ()


def test_time_begins_with_the_first_item_asked_for(tmp_path: Path) -> None:
    clock = Clock()

    async def run() -> None:
        items = record(source(clock, (2.0, "x")), tmp_path / "t", "q", "", "append", clock.now)
        clock.time += 50
        assert [item async for item in items] == ["x"]

    asyncio.run(run())
    (trace,) = recorded_traces(tmp_path / "t")
    assert trace.steps[0].at_s == 2.0


class Closing:
    """An iterator that can be closed, and then may fail."""

    def __init__(self, items: Iterable[Any], failure: Exception | None = None) -> None:
        self._items = iter(items)
        self._failure = failure
        self.closed = False

    def __aiter__(self) -> Closing:
        return self

    async def __anext__(self) -> Any:
        for item in self._items:
            return item
        raise self._failure or StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


def test_a_retrieval_left_early_is_closed_and_leaves_no_trace(tmp_path: Path) -> None:
    items = Closing(["a", "b"])

    async def run() -> None:
        recording = record(items, tmp_path / "t", "q", "", "append")
        assert await anext(recording) == "a"
        await recording.aclose()

    asyncio.run(run())
    assert items.closed
    assert not (tmp_path / "t").exists()


def test_a_retrieval_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    items = Closing(["a"], OSError("the network is gone"))
    with pytest.raises(OSError, match="the network is gone"):
        recorded(tmp_path / "t", Clock(), items)
    assert items.closed
    assert not (tmp_path / "t").exists()


def test_a_retrieval_that_brings_nothing_leaves_no_trace(tmp_path: Path) -> None:
    async def run() -> list[Any]:
        return [item async for item in record(Closing([]), tmp_path / "t", "q", "", "append")]

    assert asyncio.run(run()) == []
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("item", "mode", "reason"),
    [
        (7, "append", "not of type int"),
        ({"content": "x"}, "append", "not of type dict"),
        ("x", "update", "not of type str"),
        ([7], "update", "not of type int"),
    ],
)
def test_other_items_are_refused(tmp_path: Path, item: Any, mode: TraceMode, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        recorded(tmp_path / "t", Clock(), Closing([item]), mode)


A, B = TraceDocument("a", "text a"), TraceDocument("b", "text b")
PAGES = Trace("q", "Why?", "append", (TraceStep(1.0, (A, B)), TraceStep(2.5, (A,))))
LISTS = Trace("q", "Why?", "update", (TraceStep(1.0, (A, B)), TraceStep(2.5, (B,))))


@pytest.mark.parametrize(("delay", "due"), [(1.0, [101.0, 102.5]), (10.0, [110.0, 125.0])])
def test_a_trace_is_replayed_at_its_times(delay: float, due: list[float]) -> None:
    clock = Clock()
    assert replayed(LISTS, clock, delay) == [
        [{"id": "a", "text": "text a"}, {"id": "b", "text": "text b"}],
        [{"id": "b", "text": "text b"}],
    ]
    assert clock.slept == due


def test_pages_of_one_step_come_one_by_one() -> None:
    assert [item["id"] for item in replayed(PAGES, Clock())] == ["a", "b", "a"]


def test_who_comes_late_delays_nothing_else() -> None:
    clock = Clock()
    replayed(LISTS, clock, late_s=1.2)
    assert clock.slept == [101.0, 102.5]


def test_the_sdk_takes_what_is_replayed() -> None:
    assert parse_chunk(replayed(PAGES, Clock())[0], 1) is not None
    assert parse_context(replayed(LISTS, Clock())[0], 1) is not None


def test_a_replay_recorded_is_the_trace(tmp_path: Path) -> None:
    clock = Clock()
    items = replay(LISTS, 1.0, clock.now, clock.sleep_until)
    _, trace = recorded(tmp_path / "t", clock, items, "update")
    assert trace.steps == LISTS.steps


def test_the_event_loop_keeps_the_time() -> None:
    short = Trace("q", "", "append", (TraceStep(0.01, (A,)), TraceStep(0.03, (B,))))

    async def run() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert len([item async for item in replay(short, delay=2)]) == 2
        return loop.time() - began

    assert asyncio.run(run()) >= 0.06

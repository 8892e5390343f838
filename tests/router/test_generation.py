"""One generation: its pieces, its readers and its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest

from router.events import MetaInfo, WorkerEvent
from router.generation import Generation
from router.increments import Increments
from sglang_stream.errors import EngineFailure, StreamError, StreamNotFound, WorkerUnavailable
from sglang_stream.messages import Usage
from tests.router.conftest import error_of, opened, until
from tests.router.fake_worker import FakeWorker

STOP = {"type": "stop"}


def event(text: str, ids: list[int] | None = None, last: bool = False) -> WorkerEvent:
    raw = msgspec.Raw(msgspec.json.encode(ids or []))
    return WorkerEvent(text, raw, MetaInfo(finish_reason=STOP if last else None))


def texts(increments: Increments, *events: WorkerEvent) -> list[str]:
    return [increments.take(e).text for e in events]


def test_events_that_repeat_everything() -> None:
    increments = Increments(incremental=False, with_ids=True)
    pieces = [
        increments.take(e)
        for e in (event("a", [1]), event("a", [1, 2]), event("abc", [1, 2, 3, 4], last=True))
    ]
    assert [(p.text, p.ids) for p in pieces] == [("a", [1]), ("", [2]), ("bc", [3, 4])]


def test_events_of_what_is_new() -> None:
    increments = Increments(incremental=True, with_ids=True)
    pieces = [increments.take(e) for e in (event("a", [1]), event("", [2]), event("b", [3]))]
    assert [(p.text, p.ids) for p in pieces] == [("a", [1]), ("", [2]), ("b", [3])]


def test_half_a_character_waits_for_the_other_half() -> None:
    repeating = (event("a\ufffd"), event("aé"), event("aé\ufffd", last=True))
    assert texts(Increments(False, False), *repeating) == ["a", "é", "\ufffd"]
    new = (event("a\ufffd"), event("b"), event("\ufffd", last=True))
    assert texts(Increments(True, False), *new) == ["a", "\ufffdb", "\ufffd"]


@dataclass
class Script:
    """The worker's side of one generation: the test sends what it wants to."""

    queue: asyncio.Queue[WorkerEvent | StreamError | None] = field(default_factory=asyncio.Queue)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    taken: int = 0

    def generation(self, grace_s: float = 60.0) -> Generation:
        async def first_token(_: float) -> Usage:
            return Usage(chunks=2)

        increments = Increments(incremental=True, with_ids=False)
        generation = Generation(
            "r", 0.0, increments, grace_s, 60.0, first_token, self.abandoned.set
        )
        generation.start(self._events())
        return generation

    def send(self, *items: WorkerEvent | StreamError | None) -> None:
        for item in items:
            self.queue.put_nowait(item)

    async def _events(self) -> AsyncIterator[WorkerEvent]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, StreamError):
                    raise item
                self.taken += 1
                yield item
        finally:
            self.closed.set()


def run(test: Callable[[Script], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Script()), 20)

    asyncio.run(main())


async def read(generation: Generation) -> str:
    with generation.attached():
        return "".join([piece.text async for piece in generation.pieces()])


def test_late_and_early_readers_get_everything() -> None:
    async def test(script: Script) -> None:
        generation = script.generation()
        early = asyncio.create_task(read(generation))
        script.send(event("a"), event("b"))
        await generation.started()
        late = asyncio.create_task(read(generation))
        script.send(event("c", last=True), None)
        assert [await early, await late] == ["abc", "abc"]
        assert generation.outcome is not None
        assert generation.outcome.reason == STOP
        assert generation.outcome.stream == Usage(chunks=2)
        assert generation.ended

    run(test)


@pytest.mark.parametrize("error", [WorkerUnavailable("gone"), None])
def test_an_end_without_a_reason(error: StreamError | None) -> None:
    async def test(script: Script) -> None:
        generation = script.generation()
        script.send(event("a"), error)
        with pytest.raises(WorkerUnavailable if error else EngineFailure):
            await read(generation)

    run(test)


def test_a_connection_lost_after_the_reason_is_no_error() -> None:
    async def test(script: Script) -> None:
        generation = script.generation()
        script.send(event("a", last=True), WorkerUnavailable("gone"))
        assert await read(generation) == "a"
        assert generation.error is None

    run(test)


def test_it_is_abandoned_after_the_grace_period() -> None:
    async def test(script: Script) -> None:
        generation = script.generation(grace_s=0.05)
        with generation.attached():
            assert not script.abandoned.is_set()
        assert not script.abandoned.is_set()
        await script.abandoned.wait()

    run(test)


def test_it_is_abandoned_at_once_when_a_token_was_delivered() -> None:
    async def test(script: Script) -> None:
        generation = script.generation()
        with generation.attached(), generation.attached():
            generation.delivered = True
        assert script.abandoned.is_set()

    run(test)


def test_stop_reaches_readers_and_the_worker() -> None:
    async def test(script: Script) -> None:
        generation = script.generation()
        reading: asyncio.Task[Any] = asyncio.create_task(read(generation))
        script.send(event("a"))
        await generation.started()
        generation.stop(StreamNotFound("deleted"))
        with pytest.raises(StreamNotFound, match="deleted"):
            await reading
        await script.closed.wait()

    run(test)


def test_an_event_that_comes_together_with_the_stop_is_not_taken() -> None:
    """Or it would say of a stream that was just given up that it is being answered."""

    async def test(script: Script) -> None:
        generation = script.generation()
        script.send(event("a"))
        await generation.started()
        script.send(event("b"))
        generation.stop(StreamNotFound("deleted"))
        await script.closed.wait()
        assert script.taken == 1

    run(test)


def test_stop_after_the_end() -> None:
    async def test(script: Script) -> None:
        generation = script.generation()
        script.send(event("a", last=True), None)
        with generation.attached():
            assert await read(generation) == "a"
            generation.stop(StreamNotFound("deleted"))
            # Whoever reads already may read to the end.
            assert await read(generation) == "a"
        generation.stop(StreamNotFound("expired"))
        with pytest.raises(StreamNotFound, match="expired"):
            await read(generation)

    run(test)


@pytest.mark.parametrize("settings", [{"request_timeout_secs": 0.5}])
def test_one_that_takes_too_long_ends_in_the_worker(
    client: httpx.Client, worker: FakeWorker
) -> None:
    worker.gates = {0: threading.Event()}
    answer = client.post(f"/v1/streams/{opened(client)}/generate", json={"max_tokens": 3})
    assert "--request-timeout-secs (0.5 s)" in error_of(answer, 503)["message"]
    until(lambda: worker.cut == [worker.seals[0]["rid"]])

"""How a worker is found, lost and found again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from router.worker import Worker, WorkerInfo
from sglang_stream.errors import StreamNotFound, WorkerUnavailable
from sglang_stream.messages import Abort, Query
from tests.router.fake_worker import FakeWorker, serving


async def eventually(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():  # noqa: ASYNC110 (of nothing that could tell)
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 15)


def run(url: str, test: Callable[[Worker, list[WorkerInfo]], Awaitable[None]]) -> None:
    """`test` with a running client of the worker at `url`, and the workers that it found."""

    async def main() -> None:
        found: list[WorkerInfo] = []

        async def on_found(info: WorkerInfo) -> None:
            found.append(info)

        async with httpx.AsyncClient() as http:
            worker = Worker(url, http, on_found, question_timeout_s=0.5, heartbeat_s=0.02)
            running = asyncio.create_task(worker.run())
            try:
                await test(worker, found)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_what_is_known_of_a_worker(worker: FakeWorker, worker_url: str) -> None:
    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        with pytest.raises(WorkerUnavailable, match="not been reached"):
            client.check_ready()
        await eventually(lambda: bool(found))
        await eventually(lambda: client._info is not None)
        client.check_ready()
        info = client.info
        assert (info.worker_id, info.model) == (worker.worker_id, "tiny")
        assert (info.context_len, info.vocab_size, info.incremental) == (1000, 300, False)
        with pytest.raises(StreamNotFound):
            await client.ask(Abort("st-none"))
        assert worker.events == [Abort("st-none")]

    run(worker_url, test)


def test_a_worker_started_anew_is_found_again(worker: FakeWorker, worker_url: str) -> None:
    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        await eventually(lambda: len(found) == 1)
        worker.worker_id = "another"
        await eventually(lambda: len(found) == 2)
        assert found[1].worker_id == "another"

    run(worker_url, test)


def test_a_worker_that_ended(tokenizer_dir: Path) -> None:
    fake = FakeWorker(tokenizer_dir)
    server = serving(fake.app())
    url = server.__enter__()

    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        await eventually(lambda: client._info is not None)
        await asyncio.to_thread(server.__exit__, None, None, None)
        await eventually(lambda: client._info is None)
        with pytest.raises(WorkerUnavailable):
            client.check_ready()
        with pytest.raises(WorkerUnavailable):
            await client.status("st-a")
        with pytest.raises(WorkerUnavailable, match="failed"):
            await anext(client.generate({}))

    run(url, test)


def test_a_silent_scheduler_is_not_ready_but_not_given_up(
    worker: FakeWorker, worker_url: str
) -> None:
    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        await eventually(lambda: client._info is not None)
        worker.answers = False

        def is_silent() -> bool:
            try:
                client.check_ready()
            except WorkerUnavailable as e:
                return "silent" in e.message
            return False

        await eventually(is_silent)
        with pytest.raises(WorkerUnavailable, match="did not answer"):
            await client.ask(Query("st-a"))
        worker.answers = True
        await eventually(lambda: not is_silent())
        client.check_ready()
        assert len(found) == 1

    run(worker_url, test)

"""How a worker is found, lost and found again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from router.description import WorkerInfo
from router.server import create_app
from router.worker import Worker
from sglang_stream.errors import StreamNotFound, WorkerUnavailable
from sglang_stream.messages import Abort, Open, Query, Report, Resync, SealCall
from tests.router.conftest import router_config, until
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
        lost: list[str] = []

        async def accept(_: Worker, info: WorkerInfo) -> None:
            found.append(info)

        async with httpx.AsyncClient() as http:
            worker = Worker(
                url,
                http,
                accept,
                on_ready=lambda w: None,
                on_lost=lambda w: lost.append(w.reason),
                question_timeout_s=0.5,
                heartbeat_s=0.05,
            )
            running = asyncio.create_task(worker.run())
            try:
                await test(worker, found)
                assert len(lost) >= len(found) - 1
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_what_is_known_of_a_worker(worker: FakeWorker, worker_url: str) -> None:
    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        with pytest.raises(WorkerUnavailable, match="not been reached"):
            _ = client.info
        await eventually(lambda: client.ready)
        assert len(found) == 1
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
        await eventually(lambda: client.ready)
        await asyncio.to_thread(server.__exit__, None, None, None)
        await eventually(lambda: not client.ready)
        with pytest.raises(WorkerUnavailable):
            await client.status(Query("st-a"))
        with pytest.raises(WorkerUnavailable):
            await anext(client.generate({}))

    run(url, test)


def test_a_scheduler_that_hangs_is_lost_and_its_calls_end(
    worker: FakeWorker, worker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.worker.HANG_S", 0.3)
    worker.gates = {0: threading.Event()}

    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        await eventually(lambda: client.ready)
        await client.ask(Open("st-a", "append", b"", 60.0))
        custom = SealCall("st-a").to_custom_params()
        body = {"rid": "r", "sampling_params": {"custom_params": custom}}
        answer = asyncio.ensure_future(anext(client.generate(body)))
        await eventually(lambda: bool(worker.seals))
        worker.answers = False
        with pytest.raises(WorkerUnavailable, match="silent"):
            await answer
        assert not client.ready
        worker.answers = True
        await eventually(lambda: client.ready)
        assert len(found) == 2

    run(worker_url, test)


def test_an_announced_forward_is_no_hang(
    worker: FakeWorker, worker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.worker.HANG_S", 0.2)

    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        await eventually(lambda: client.ready)
        client.load.busy_until_s = time.monotonic() + 1.0
        worker.answers = False
        silent_from = time.monotonic()
        await eventually(lambda: not client.ready)
        assert time.monotonic() - silent_from >= 1.2

    run(worker_url, test)


def test_a_worker_of_another_role_is_refused(worker: FakeWorker, worker_url: str) -> None:
    async def main() -> None:
        async def accept(_: Worker, __: WorkerInfo) -> None:
            raise AssertionError("not to be accepted")

        async with httpx.AsyncClient() as http:
            client = Worker(
                worker_url,
                http,
                accept,
                on_ready=lambda w: None,
                on_lost=lambda w: None,
                role="decode",
                heartbeat_s=0.05,
            )
            running = asyncio.create_task(client.run())
            await eventually(lambda: "unified worker, not a decode one" in client.reason)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_report_that_follows_the_snapshot_at_once_is_not_missed(
    worker: FakeWorker, worker_url: str
) -> None:
    block = bytes(range(8))
    worker.report = Report(1, 0.0, 100, 0, 0, 0, 0, 0, 0.0, cached=block)

    async def test(client: Worker, found: list[WorkerInfo]) -> None:
        await eventually(lambda: client.ready)
        await eventually(lambda: bool(client.load.shared_tokens([block])))
        assert sum(isinstance(q, Resync) for q in worker.heard) == 1

    run(worker_url, test)


@pytest.mark.parametrize("secret", ["t", None])
def test_another_secret_is_named_as_the_reason(tokenizer_dir: Path, secret: str | None) -> None:
    fake = FakeWorker(tokenizer_dir, secret="s")
    with (
        serving(fake.app()) as url,
        serving(create_app(router_config(url, secret=secret))) as router,
    ):

        def reason() -> str:
            (shown,) = httpx.get(f"{router}/workers").json()["workers"]
            return str(shown["reason"])

        told = "refused the shared secret: SGLANG_STREAM_SECRET differs"
        until(lambda: told in reason(), timeout_s=5)

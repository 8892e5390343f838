"""Several workers that the tests play, and real routers in front of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.server import create_app
from router.worker import Worker
from sglang_stream import messages as m
from sglang_stream.config import RouterConfig, WorkerAddress
from tests.router.conftest import until
from tests.router.fake_worker import FakeWorker, serving


class Rig:
    """`workers` by URL; `routers`: a client of each, which has found all workers."""

    def __init__(self, stack: ExitStack, tokenizer: Path, roles: list[m.Role]) -> None:
        self._stack = stack
        self.tokenizer = tokenizer
        self.workers: dict[str, FakeWorker] = {}
        self.routers: list[httpx.Client] = []
        for role in roles:
            self.add_worker(role)

    def add_worker(self, role: m.Role = "unified") -> str:
        worker = FakeWorker(self.tokenizer, role=role, spoken=8)
        url = self._stack.enter_context(serving(worker.app()))
        self.workers[url] = worker
        return url

    def add_router(self, stack: ExitStack | None = None, **settings: Any) -> httpx.Client:
        stack = stack or self._stack
        addresses = tuple(WorkerAddress(url, w.role) for url, w in self.workers.items())
        config = RouterConfig(addresses, **{"worker_wait_s": 3.0, **settings})
        url = stack.enter_context(serving(create_app(config)))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=20))
        if settings.get("admin_api_key"):
            client.headers["Authorization"] = f"Bearer {settings['admin_api_key']}"
        until(lambda: set(health(client).values()) == {True})
        self.routers.append(client)
        return client

    def reset(self) -> None:
        """All workers answer again, and the routers know it."""
        for worker in self.workers.values():
            for gate in worker.gates.values():
                gate.set()
            worker.gates = {}
            worker.answers, worker.fails, worker.breaks_after = True, None, None
        for router in self.routers:
            until(lambda r=router: set(health(r).values()) == {True})

    def lose(self, url: str) -> None:
        """A worker falls silent; returns when all routers have noticed."""
        self.workers[url].answers = False
        for router in self.routers:
            until(lambda r=router: health(r)[url] is False)

    def holder(self, router: httpx.Client, stream: str) -> str:
        """The URL of the worker that holds a stream."""
        return str(router.get(f"/v1/streams/{stream}").json()["prefill_worker"])

    def other(self, url: str) -> str:
        return next(other for other in self.workers if other != url)

    def tokens(self, url: str, stream: str) -> list[int]:
        """What a worker has of a stream, nothing if it has none of it."""
        held = self.workers[url].streams.get(stream)
        return (held.tokens if held is not None else array("i")).tolist()


def health(router: httpx.Client) -> dict[str, bool]:
    return {w["url"]: w["healthy"] for w in router.get("/workers").json()["workers"]}


@contextmanager
def rig(tokenizer: Path, *roles: m.Role, routers: int = 2, **settings: Any) -> Iterator[Rig]:
    """Workers of these roles behind `routers` routers that are quick to notice what happens."""
    quick = partial(Worker, heartbeat_s=0.1, question_timeout_s=1.0)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr("router.cluster.Worker", quick)
        patch.setattr("router.worker.HANG_S", 0.6)
        made = Rig(stack, tokenizer, list(roles))
        for _ in range(routers):
            made.add_router(**settings)
        yield made
        for worker in made.workers.values():
            for gate in worker.gates.values():
                gate.set()


def append(router: httpx.Client, stream: str, seq: int, ids: list[int]) -> None:
    answer = router.post(f"/v1/streams/{stream}/chunks", json={"seq": seq, "input_ids": ids})
    assert answer.status_code == 202, answer.text


def text_from(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])

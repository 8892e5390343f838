"""One worker as the router sees it: found, greeted, watched, asked and made to generate.

    look for it -> Welcome -> ready --no process, silent for too long, another id--> look again

A worker is silent for too long when it has said nothing for HANG_S after its last word and after
the end that it predicted for its forward. Calls that run on it end at once when it is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import zmq

from router.breaker import BreakerSettings, CircuitBreaker
from router.description import WorkerInfo, describe, lost
from router.events import AnswerCall, WorkerEvent, decode_event, http_error, raise_failure
from router.link import Link
from router.load import WorkerLoad
from router.sse import sse_data
from sglang_stream.errors import (
    EngineFailure,
    StreamError,
    WorkerUnavailable,
)
from sglang_stream.messages import (
    Accepted,
    Copy,
    Event,
    Fetch,
    Query,
    Report,
    Role,
    Snapshot,
    Status,
    Welcome,
)

logger = logging.getLogger(__name__)

HANG_S = 4.0
"""How long a worker may be silent. Its scheduler answers between two forwards."""

_GONE_TIMEOUT_S = 1.0


class Worker:
    """The client of one worker.

    `role` and `bootstrap_port`: what the operator said of it, which must be true; None to take
    what it says itself. `accept` is awaited with each worker found at `url`, before it counts as
    ready; an error of it is the reason why the worker is not ready. `on_ready` and `on_lost` are
    called when it becomes ready and when it stops being it. `question_timeout_s` bounds a ZeroMQ
    question, `heartbeat_s` is the time between two heartbeats, also between two tries to find a
    worker.
    """

    def __init__(
        self,
        url: str,
        http: httpx.AsyncClient,
        accept: Callable[[Worker, WorkerInfo], Awaitable[None]],
        on_ready: Callable[[Worker], None],
        on_lost: Callable[[Worker], None],
        *,
        role: Role | None = None,
        bootstrap_port: int | None = None,
        secret: str | None = None,
        question_timeout_s: float = 25.0,
        heartbeat_s: float = 1.0,
        breaker: BreakerSettings | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.load = WorkerLoad()
        self.breaker = CircuitBreaker(breaker or BreakerSettings())
        self.ready_since_s = 0.0  # on the wall clock
        self.reached = False  # ever
        self.draining = False  # to be removed: nothing new is placed on it
        self.calls = 0  # that run on it now
        self.placed = 0  # streams and requests given to it since its last report
        self._http = http
        self._accept = accept
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._role = role
        self._bootstrap_port = bootstrap_port
        self._secret = secret
        self._question_timeout_s = question_timeout_s
        self._heartbeat_s = heartbeat_s
        self._link: Link | None = None
        self._info: WorkerInfo | None = None
        self._resyncing: asyncio.Task[None] | None = None
        self._calls: set[AnswerCall] = set()
        self._gone = asyncio.Event()
        self._reason = f"the worker at {self.url} has not been reached yet"

    @property
    def info(self) -> WorkerInfo:
        """The worker that is ready. Raises WorkerUnavailable with the reason why none is."""
        if self._info is None:
            raise WorkerUnavailable(self._reason, retry_after=1)
        return self._info

    @property
    def ready(self) -> bool:
        return self._info is not None

    @property
    def usable(self) -> bool:
        """Whether it is ready and has not failed too often of late."""
        return self.ready and self.breaker.allows(time.monotonic())

    @property
    def role(self) -> Role:
        """Its own word, or else the operator's."""
        return self._info.role if self._info is not None else self._role or "unified"

    @property
    def reason(self) -> str:
        """Why it is not given work."""
        return f"the worker at {self.url} is draining" if self.ready else self._reason

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    async def run(self) -> None:
        """Finds the worker and watches it, for ever."""
        context = zmq.Context()
        try:
            while True:
                try:
                    await self._connect(context)
                    await self._watch()
                except StreamError as e:
                    self._disconnect(e.message)
                except Exception as e:
                    # An answer that no known worker gives, a model's files that do not load.
                    logger.exception("the worker at %s cannot be used", self.url)
                    self._disconnect(f"the worker at {self.url} cannot be used: {e!r}")
                await asyncio.sleep(self._heartbeat_s)
        finally:
            self._disconnect("the router is stopping")
            context.term()

    async def ask(self, event: Event) -> Accepted:
        """The worker's answer to an event that changes a stream; see `Link.ask`."""
        answer = await self._live_link().ask(event)
        if not isinstance(answer, Accepted):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")
        return answer

    async def status(self, query: Query) -> Status:
        """The stream as the worker sees it; see `Link.ask`."""
        answer = await self._live_link().ask(query)
        if not isinstance(answer, Status):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")
        return answer

    async def fetch(self, fetch: Fetch) -> Copy:
        """A copy of a stream; see `Link.ask`."""
        answer = await self._live_link().ask(fetch)
        if not isinstance(answer, Copy):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")
        return answer

    async def generate(
        self, body: dict[str, Any], failed: set[Worker] | None = None
    ) -> AsyncIterator[WorkerEvent]:
        """The events of one `/generate` call. Closing the iterator aborts it in the worker.

        Raises the error that the worker reports, WorkerUnavailable if the connection fails or the
        worker is lost. `failed`: see `counted`.
        """
        with self.counted(failed):
            call = AnswerCall(self._read_events(body))
            self._calls.add(call)
            try:
                async for event in call:
                    yield event
            finally:
                self._calls.discard(call)
                await call.close()

    @contextmanager
    def counted(self, failed: set[Worker] | None = None) -> Iterator[None]:
        """Tells the circuit breaker how a call to this worker ends, which joins `failed` if it
        fails; a client's mistake is no failure. Raises WorkerUnavailable if the worker is not to
        be called now."""
        _ = self.info
        if not self.usable:
            raise WorkerUnavailable(
                f"the worker at {self.url} has failed too often and is left alone for a while",
                retry_after=1,
            )
        call = self.breaker.started(time.monotonic())
        tell = self.breaker.abandoned
        self.calls += 1
        try:
            yield
            tell = self.breaker.succeeded
        except (WorkerUnavailable, EngineFailure):
            tell = self.breaker.failed
            if failed is not None:
                failed.add(self)
            raise
        finally:
            self.calls -= 1
            tell(time.monotonic(), call)

    async def wait_gone(self) -> None:
        """Returns, by raising WorkerUnavailable, when the worker that is ready now is lost."""
        await self._gone.wait()
        raise WorkerUnavailable(self._reason, retry_after=1)

    async def flush_cache(self, query: str) -> str | None:
        """Empties the worker's prefix cache; what went wrong, None if nothing.

        `query`: the call's query string, for SGLang's own options.
        """
        try:
            answer = await self._http.post(f"{self.url}/flush_cache?{query}")
        except httpx.TransportError as e:
            return lost(self.url, e).message
        return None if answer.is_success else answer.text.strip() or f"status {answer.status_code}"

    async def _read_events(self, body: dict[str, Any]) -> AsyncIterator[WorkerEvent]:
        try:
            async with self._http.stream(
                "POST",
                f"{self.url}/generate",
                content=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status_code != 200:
                    raise http_error(response.status_code, await response.aread())
                async for data in sse_data(response.aiter_bytes()):
                    if data == b"[DONE]":
                        continue  # a connection whose answer is read to its end is used again
                    event = decode_event(data)
                    raise_failure(event)
                    yield event
        except httpx.TransportError as e:
            raise lost(self.url, e) from e
        except msgspec.DecodeError as e:
            raise EngineFailure(f"the worker's answer cannot be read: {e}") from e

    def _live_link(self) -> Link:
        _ = self.info
        assert self._link is not None
        return self._link

    async def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        description = await describe(self._http, self.url)
        self.load = WorkerLoad()
        link = Link(
            context,
            description.endpoint,
            self._question_timeout_s,
            self._secret,
            self._heard_load,
        )
        try:
            welcome = await link.hello()
            self._check_role(welcome)
            link.grant(welcome.credits)
            info = description.welcomed(welcome, self._bootstrap_port)
            await link.snapshot()
            await self._accept(self, info)
        except BaseException:
            link.close(self._reason)
            raise
        self._link, self._info = link, info
        self._gone = asyncio.Event()
        self.ready_since_s = time.time()
        self.reached = True
        self._on_ready(self)
        logger.info("worker %s at %s is ready: %s", info.worker_id, self.url, info.model)

    def _check_role(self, welcome: Welcome) -> None:
        if self._role is not None and welcome.role != self._role:
            raise WorkerUnavailable(
                f"the worker at {self.url} is a {welcome.role} worker, not a {self._role} one: "
                "give it to the router by the flag for its role"
            )

    async def _watch(self) -> None:
        """Returns never: raises WorkerUnavailable when this worker is gone."""
        info, link = self.info, self._live_link()
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                welcome = await link.hello(timeout_s=self._heartbeat_s)
            except WorkerUnavailable:
                await self._check_process()
                self._check_silence(link)
                continue
            if welcome.worker_id != info.worker_id:
                raise WorkerUnavailable(f"the worker at {self.url} was started anew: try again")

    async def _check_process(self) -> None:
        """Raises WorkerUnavailable if nothing listens any more; slow is not gone."""
        try:
            await self._http.get(f"{self.url}/model_info", timeout=_GONE_TIMEOUT_S)
        except httpx.TimeoutException:
            return
        except httpx.TransportError as e:
            raise lost(self.url, e) from e

    def _check_silence(self, link: Link) -> None:
        """Raises WorkerUnavailable if the scheduler has been silent for too long."""
        now = time.monotonic()
        silent_s = now - max(link.heard_s, self.load.busy_until_s)
        if silent_s > HANG_S:
            raise WorkerUnavailable(
                f"the scheduler of the worker at {self.url} has been silent for "
                f"{now - link.heard_s:.0f} s"
            )

    def _heard_load(self, said: Report | Snapshot) -> None:
        if isinstance(said, Snapshot):
            self.load.restore(said)
            return
        self.placed = 0
        if self.load.apply(said, time.monotonic()) or self._link is None:
            return
        if self._resyncing is None or self._resyncing.done():
            self._resyncing = asyncio.create_task(self._resync(self._link))

    async def _resync(self, link: Link) -> None:
        try:
            await link.snapshot()
        except StreamError as e:
            logger.warning("no snapshot of the cache of %s: %s", self.url, e.message)

    def _disconnect(self, reason: str) -> None:
        if reason != self._reason:
            logger.warning("%s", reason)
        self._reason = reason
        was_ready = self._info is not None
        if self._link is not None:
            self._link.close(reason)
        self._link = self._info = None
        self._gone.set()
        for call in self._calls:
            call.fail(WorkerUnavailable(reason))
        if was_ready:
            self._on_lost(self)

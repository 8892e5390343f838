"""One answer being generated: read from the worker into a buffer, from which clients are served.

It belongs to the router, not to a connection: a client that lost its connection before the first
token comes again with the same request id and reads on from the buffer. When the last reader
leaves, a generation of which a token was delivered ends at once, another after a grace period.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from router.events import WorkerEvent
from router.increments import Increments, Piece
from sglang_stream.errors import EngineFailure, StreamError, WorkerUnavailable
from sglang_stream.messages import Usage


@dataclass(frozen=True)
class Outcome:
    """How a generation ended. `reason` is SGLang's `finish_reason`; `stream` None if unknown."""

    reason: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    stream: Usage | None
    ttft_ms: float


class Generation:
    """The answer to one sealed stream, or to one that is being sealed.

    `arrived_s`: when the call came (`time.perf_counter`). `timeout_s` bounds the whole answer.
    `on_first_token` is given the seconds until the first token and returns the stream's counters.
    `on_abandoned` is called when nobody will read any more. `delivered`: whether a client was sent
    a token; `ended`: whether the worker is done with it, in whichever way.
    """

    def __init__(
        self,
        request_id: str | None,
        arrived_s: float,
        increments: Increments,
        grace_s: float,
        timeout_s: float,
        on_first_token: Callable[[float], Awaitable[Usage | None]],
        on_abandoned: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self.delivered = False
        self.outcome: Outcome | None = None
        self.error: StreamError | None = None
        self._arrived_s = arrived_s
        self.increments = increments
        self._grace_s = grace_s
        self._timeout_s = timeout_s
        self._on_first_token = on_first_token
        self._on_abandoned = on_abandoned
        self._pieces: list[Piece] = []
        self._changed = asyncio.Event()
        self._readers = 0
        self._grace: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether the worker has said anything."""
        return bool(self._pieces)

    @property
    def ended(self) -> bool:
        return self.outcome is not None or self.error is not None

    def start(self, events: AsyncIterator[WorkerEvent]) -> None:
        """Begins to read the worker's events; its errors reach the readers."""
        self._task = asyncio.create_task(self._run(events))

    def stop(self, error: StreamError) -> None:
        """Ends it now, also in the worker. Readers get `error`, unless all is there to be read."""
        if self.outcome is not None and self._readers:
            return
        self.error = error
        if self._task is not None and self.outcome is None:
            self._task.cancel()
        if self._grace is not None:
            self._grace.cancel()
        self._pieces.clear()
        self._publish()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """For the time of a client's connection."""
        self._readers += 1
        if self._grace is not None:
            self._grace.cancel()
        try:
            yield
        finally:
            self._readers -= 1
            if self._readers == 0:
                self._left()

    async def started(self) -> None:
        """Returns with the first token. Raises the error if there is none."""
        while not self._pieces and not self.ended:
            await self._changed.wait()
        if self.error is not None:
            raise self.error

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces from the first on, as they come. Raises the error that ended them."""
        at = 0
        while True:
            while at < len(self._pieces):
                yield self._pieces[at]
                at += 1
            if self.error is not None:
                raise self.error
            if self.outcome is not None:
                return
            await self._changed.wait()

    async def _run(self, events: AsyncIterator[WorkerEvent]) -> None:
        # No task of its own for the time-out: who is stopped must not take one more event first.
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._time_out)
        try:
            await self._read(events)
            if self.outcome is None:
                raise EngineFailure("the worker ended the answer without a reason")
        except StreamError as e:
            # After the outcome a lost connection changes nothing any more.
            if not self.ended:
                self.error = e
        finally:
            timer.cancel()
            self._publish()

    def _time_out(self) -> None:
        if self.outcome is None:
            self.error = WorkerUnavailable(
                f"the answer took longer than --request-timeout-secs ({self._timeout_s:g} s)"
            )
        if self._task is not None:
            self._task.cancel()

    async def _read(self, events: AsyncIterator[WorkerEvent]) -> None:
        ttft_s: float | None = None
        usage: asyncio.Future[Usage | None] | None = None
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                meta = event.meta_info
                if ttft_s is None:
                    ttft_s = time.perf_counter() - self._arrived_s
                    usage = asyncio.ensure_future(self._on_first_token(ttft_s))
                self._pieces.append(self.increments.take(event))
                self._publish()
                if meta.finish_reason is not None:
                    assert usage is not None
                    self.outcome = Outcome(
                        reason=meta.finish_reason,
                        prompt_tokens=meta.prompt_tokens - len(self.increments.kept),
                        completion_tokens=meta.completion_tokens + len(self.increments.kept),
                        cached_tokens=meta.cached_tokens,
                        stream=await usage,
                        ttft_ms=ttft_s * 1e3,
                    )
                    self._publish()

    def _publish(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _left(self) -> None:
        if self.delivered:
            self._on_abandoned()
        else:
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(self._grace_s, self._on_abandoned)

"""How many calls run at once, and how many wait for one of them to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sglang_stream.errors import LimitReached

_RETRY_AFTER_S = 1


class Admission:
    """Slots for calls, given in the order in which they were asked for.

    `max_concurrent`: slots, None for no limit. `queue_size`: how many calls may wait.
    `queue_timeout_s`: how long one may. A slot goes straight from the call that ends to the first
    that waits, so that no newcomer overtakes. To be used from one event loop.
    """

    def __init__(self, max_concurrent: int | None, queue_size: int, queue_timeout_s: float) -> None:
        """Raises ValueError for a limit that would admit nothing or cannot be kept."""
        if max_concurrent is not None and max_concurrent < 1:
            raise ValueError("max_concurrent must be at least 1, or None for no limit")
        if queue_size < 0 or queue_timeout_s <= 0:
            raise ValueError("queue_size must be at least 0 and queue_timeout_s above 0")
        self._max = max_concurrent
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._running = 0
        self._queue: dict[asyncio.Future[None], None] = {}  # in the order of arrival

    @property
    def running(self) -> int:
        """Calls that hold a slot."""
        return self._running

    @property
    def waiting(self) -> int:
        """Calls that wait for a slot."""
        return len(self._queue)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds a slot. Raises LimitReached if the queue is full, or after the time-out in it."""
        await self._acquire()
        try:
            yield
        finally:
            self._release()

    async def _acquire(self) -> None:
        # A free slot means an empty queue: _release leaves none while somebody waits.
        if self._max is None or self._running < self._max:
            self._running += 1
            return
        if len(self._queue) >= self._queue_size:
            raise LimitReached(
                f"{self._running} calls run and {len(self._queue)} wait, as many as this router "
                "takes: try again later",
                retry_after=_RETRY_AFTER_S,
            )
        await self._wait()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._queue[turn] = None
        # The timer ends the wait through the same future as _release, so that only one of them can.
        timer = loop.call_later(self._queue_timeout_s, self._expire, turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.pop(turn, None)
            if not turn.cancelled() and turn.exception() is None:
                self._release()  # cancelled just after the slot was handed over
            raise
        finally:
            timer.cancel()

    def _expire(self, turn: asyncio.Future[None]) -> None:
        if turn.done():
            return
        del self._queue[turn]
        turn.set_exception(
            LimitReached(
                f"no slot became free in {self._queue_timeout_s:g} s of waiting while "
                f"{self._running} calls run: try again later",
                retry_after=_RETRY_AFTER_S,
            )
        )

    def _release(self) -> None:
        while self._queue:
            turn = next(iter(self._queue))
            del self._queue[turn]
            if not turn.done():  # else cancelled, and its task has not run since
                turn.set_result(None)
                return
        self._running -= 1

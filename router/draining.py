"""Emptying a worker that is to be removed, so that nobody notices.

    DELETE /workers/{id} -> draining: nothing new is placed on it
        its open streams are replayed on other workers; without one they stay, still served
        its running answers end undisturbed
    nothing left -> the link closes, and the worker is no longer listed

What is left there are calls through this router, and streams that the worker itself reports: other
routers may use it, and until they are told to remove it as well, this one still finds them there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from router.cluster import Cluster
from router.logs import log_context
from router.moves import Moves
from router.streams import Stream, Streams
from router.worker import Worker
from sglang_stream.errors import StreamError

logger = logging.getLogger(__name__)

_LOOK_S = 0.2


class Draining:
    """Removes workers of one router. `in_background` runs what nobody waits for."""

    def __init__(
        self,
        cluster: Cluster,
        streams: Streams,
        moves: Moves,
        in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._cluster = cluster
        self._streams = streams
        self._moves = moves
        self._in_background = in_background

    def begin(self, worker_id: str) -> Worker:
        """Begins to empty a worker; again, it changes nothing. Raises StreamNotFound."""
        worker = self._cluster.named(worker_id)
        if not worker.draining:
            worker.draining = True
            self._in_background(self._empty(worker))
        return worker

    async def _empty(self, worker: Worker) -> None:
        """Returns when the worker was removed, or was taken back."""
        while worker.draining and self._cluster.workers.get(worker.url) is worker:
            for stream in self._streams.held_by(worker):
                with log_context(stream_id=stream.id):
                    await self._move(stream, worker)
            if not worker.ready or self._is_empty(worker):
                await self._cluster.remove(worker)
                return
            await asyncio.sleep(_LOOK_S)

    async def _move(self, stream: Stream, worker: Worker) -> None:
        try:
            await self._moves.away(stream)
        except StreamError as e:
            logger.warning("stream %s stays at %s: %s", stream.id, worker.url, e.message)

    def _is_empty(self, worker: Worker) -> bool:
        held = (s for s in self._streams.held_by(worker) if s.state == "open")
        return not (worker.calls or worker.load.latest.open_streams or any(held))

"""Where a stream is: found at the worker that holds it, or replayed on another one.

    known here -----------------------------------------> its worker
    not known here: ask the worker in its id, then all --> a copy, served from here on
    its worker lost: ask all others for a later epoch ---> another router has moved it
                     none has it: open it anew, epoch + 1, and send all chunks again
    its generation failed: the same, on another worker than those that failed

The worker is the authority; two routers that move the same stream at once choose the same worker
and epoch, where the second finds what the first has sent.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from router.auth import Caller
from router.cluster import Cluster
from router.identity import StreamIds, worker_tag
from router.logs import log_context
from router.metrics import RouterMetrics
from router.streams import Stream, Streams, created_s, unknown
from router.worker import Worker
from sglang_stream.errors import (
    LimitReached,
    SequenceConflict,
    StreamError,
    StreamMoved,
    StreamNotFound,
    StreamSealed,
    WorkerUnavailable,
)
from sglang_stream.messages import (
    Abort,
    Accepted,
    Append,
    Copy,
    Fetch,
    Open,
    Update,
    digest,
    pack_tokens,
)

logger = logging.getLogger(__name__)

_TRIES = 4
_REMEMBERED = 4096  # copies left behind; what is forgotten of them expires where it is


class Moves:
    """Finds and moves the streams of one router. `in_background` runs what nobody waits for."""

    def __init__(
        self,
        cluster: Cluster,
        streams: Streams,
        ids: StreamIds,
        metrics: RouterMetrics,
        in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._cluster = cluster
        self._streams = streams
        self._ids = ids
        self._metrics = metrics
        self._in_background = in_background
        self._left: deque[tuple[str, Abort]] = deque(maxlen=_REMEMBERED)

    async def find(self, stream_id: str, caller: Caller) -> Stream:
        """The stream, fetched from its worker if it is not known here. Raises StreamNotFound, and
        WorkerUnavailable while a router that has just started does not reach all workers yet."""
        stream = self._streams.find(stream_id, caller)
        if stream is not None:
            return stream
        tag = self._ids.first_worker(stream_id)
        owner = None if caller.admin else caller.owner
        found = await self._fetch(stream_id, owner, since=0, first=tag)
        if found is not None and created_s(found[0]) < found[1].ready_since_s:
            # That worker may have been away, and the stream have moved without its knowing.
            found = await self._fetch(stream_id, owner, since=0)
        stream = self._streams.find(stream_id, caller)  # meanwhile another call may have found it
        if stream is None:
            if found is None:
                self._cluster.check_all_asked()
                raise unknown(stream_id)
            stream = Stream.from_copy(*found)
            self._streams.add(stream)
        return stream

    async def ensure(self, stream: Stream) -> Worker:
        """The worker that holds the stream, which is replayed if that worker was lost.

        Raises StreamNotFound if not all of its tokens are known here, WorkerUnavailable.
        """
        async with stream.moving:
            if stream.worker is not None and stream.worker.ready:
                return stream.worker
            found = await self._fetch(stream.id, stream.owner, since=stream.known_seq)
            if found is not None and found[0].epoch > stream.epoch:
                await self._follow(stream, *found)
                return found[1]
            return await self._replay(stream, "worker_lost")

    async def refresh(self, stream: Stream) -> None:
        """Follows a stream that another router has moved. Raises StreamNotFound."""
        async with stream.moving:
            found = await self._fetch(stream.id, stream.owner, since=stream.known_seq)
            if found is None or found[0].epoch < stream.epoch:
                raise unknown(stream.id)
            await self._follow(stream, *found)

    async def fill(self, stream: Stream, expected_seq: int | None) -> bool:
        """Sends again what its worker misses from `expected_seq` on; False if that is not known
        here. Raises StreamNotFound, WorkerUnavailable, StreamMoved."""
        if expected_seq is None or stream.known_seq < expected_seq:
            return False
        await self._send_chunks(stream, await self.ensure(stream), since=expected_seq - 1)
        return True

    async def sync(self, stream: Stream) -> None:
        """Gets the tokens that other routers have sent. Raises StreamNotFound, WorkerUnavailable.

        Only a complete copy can be replayed, or decoded on another worker.
        """
        for attempt in range(_TRIES):
            worker = await self.ensure(stream)
            fetch = Fetch(stream.id, since=stream.known_seq, owner=stream.owner)
            try:
                stream.take_copy(await worker.fetch(fetch), worker)
                return
            except WorkerUnavailable:
                if worker.ready or attempt == _TRIES - 1:
                    raise
            except StreamNotFound:
                await self.refresh(stream)
                return

    async def again(self, stream: Stream, failed: Collection[Worker] = ()) -> None:
        """Opens a stream anew whose generation failed before its first token, with all chunks.

        Its own worker is taken if it is still there, since its KV may be, but none of the `failed`
        if there is another. Raises as `ensure`.
        """
        async with stream.moving:
            worker, epoch = stream.worker, stream.epoch
            await self._replay(stream, "generation_failed", failed)
            self._let_go(stream, worker, epoch)

    async def reopen(self, stream: Stream, tokens: array[int], failed: Collection[Worker]) -> None:
        """Opens a sealed stream anew with `tokens` as its whole prompt, on a worker as `again`.
        Raises WorkerUnavailable, and what a worker answers."""
        async with stream.moving:
            worker, epoch = stream.worker, stream.epoch
            self._metrics.replays.labels("continued").inc()
            await self._open_elsewhere(stream, "append", tokens, failed)
            self._let_go(stream, worker, epoch)

    async def away(self, stream: Stream) -> None:
        """Moves an open stream off a worker that is draining, if there is another one, and makes
        the old one drop its copy. Raises what the other workers answer; it stays then."""
        async with stream.moving:
            worker, epoch = stream.worker, stream.epoch
            if worker is None or self._cluster.keeps(worker) or stream.generation is not None:
                return
            try:
                copy = await worker.fetch(Fetch(stream.id, stream.known_seq, stream.owner))
            except (StreamNotFound, StreamSealed):
                self._streams.forget(stream)  # ended, or moved, through another router
                return
            stream.take_copy(copy, worker)
            if stream.state != "open":
                return  # another router has its answer made there
            try:
                moved_to = await self._replay(stream, "drained")
            except StreamError:
                stream.worker, stream.epoch = worker, epoch
                raise
            # With what other routers have sent there until the copy is gone.
            fetch = Fetch(stream.id, stream.known_seq, stream.owner)
            abort = Abort(stream.id, epoch, stream.owner)
            late, _ = await asyncio.gather(
                worker.fetch(fetch), worker.ask(abort), return_exceptions=True
            )
            if isinstance(late, Copy) and late.chunks:
                stream.take_chunks(late)
                await self._send_chunks(stream, moved_to, since=stream.seq)

    async def abort(self, stream: Stream) -> None:
        """Ends the stream where it is, also where another router has moved it. Raises
        StreamNotFound, StreamSealed if its generation has ended, WorkerUnavailable."""
        for attempt in range(_TRIES):
            if stream.worker is None:
                return
            try:
                await stream.worker.ask(Abort(stream.id, stream.epoch, stream.owner))
                return
            except (StreamNotFound, StreamMoved):
                if attempt == _TRIES - 1:
                    raise
                await self.refresh(stream)

    def left(self, stream: Stream, worker: Worker) -> None:
        """Notes that `worker` may still hold a copy of a stream that has left it."""
        abort = Abort(stream.id, epoch=stream.epoch, owner=stream.owner)
        self._left.append((worker.url, abort))

    async def clear_left(self, worker: Worker) -> None:
        """Makes a worker that has come back drop what has left it."""
        left, self._left = self._left, deque(maxlen=_REMEMBERED)
        self._left.extend((url, abort) for url, abort in left if url != worker.url)
        for abort in [abort for url, abort in left if url == worker.url]:
            await _drop_copy(worker, abort)

    def _let_go(self, stream: Stream, worker: Worker | None, epoch: int) -> None:
        """Makes `worker`, which held the stream in `epoch`, drop it if it has moved elsewhere."""
        if worker is not None and worker is not stream.worker:
            self._in_background(_drop_copy(worker, Abort(stream.id, epoch, stream.owner)))

    async def _replay(self, stream: Stream, reason: str, failed: Collection[Worker] = ()) -> Worker:
        if stream.context() is None and stream.worker is not None:
            fetch = Fetch(stream.id, since=stream.known_seq, owner=stream.owner)
            stream.take_copy(await stream.worker.fetch(fetch), stream.worker)
        if stream.context() is None:
            raise unknown(stream.id)
        self._metrics.replays.labels(reason).inc()
        for attempt in range(_TRIES):
            tokens = stream.opening.tokens
            worker = await self._open_elsewhere(stream, stream.mode, tokens, failed)
            try:
                await self._send_chunks(stream, worker)
            except (WorkerUnavailable, StreamMoved):
                stream.worker = None
                if attempt == _TRIES - 1:
                    raise
                continue
            stream.state = "open"
            return worker
        raise AssertionError("the last try returns or raises")

    async def _open_elsewhere(
        self, stream: Stream, mode: str, tokens: array[int], failed: Collection[Worker]
    ) -> Worker:
        """Opens the stream with the next epoch: where it was if that is possible. A worker that
        does not take it is passed by as the `failed` are: if there is another one."""
        for attempt in range(_TRIES):
            epoch = stream.epoch + 1
            stay = stream.worker
            if stay is not None and not (stay.usable and self._cluster.keeps(stay, failed)):
                stay = None
            worker = stay or await self._cluster.place_replay(stream.id, epoch, failed)
            stream.epoch = epoch
            event = Open(
                stream.id,
                "update" if mode == "update" else "append",
                pack_tokens(tokens),
                stream.idle_timeout_s,
                stream.epoch,
                stream.owner,
                stream.namespace,
                stream.memo(),
            )
            try:
                await worker.ask(event)
            except (WorkerUnavailable, LimitReached, StreamMoved, SequenceConflict) as e:
                # A conflict: another router has opened it there otherwise, in the same epoch.
                stream.worker = None
                if attempt == _TRIES - 1:
                    raise
                if isinstance(e, WorkerUnavailable | LimitReached):
                    failed = {*failed, worker}
                continue
            stream.worker = worker
            logger.info("stream %s goes on at %s (epoch %d)", stream.id, worker.url, stream.epoch)
            return worker
        raise AssertionError("the last try returns or raises")

    async def _follow(self, stream: Stream, copy: Copy, worker: Worker) -> None:
        """Goes on with a copy that another router has made, which may lack what went through this
        one."""
        stream.take_copy(copy, worker)
        if copy.status.state == "open" and stream.known_seq > copy.status.seq:
            await self._send_chunks(stream, worker, since=copy.status.seq)

    @staticmethod
    async def _send_chunks(stream: Stream, worker: Worker, since: int = 0) -> None:
        asking: dict[int, asyncio.Future[Accepted]] = {}
        for seq in sorted(s for s in stream.chunks if s > since):
            packed = pack_tokens(stream.chunks[seq])
            fields = (stream.id, seq, packed, digest(packed), stream.epoch, stream.owner)
            event = Append(*fields) if stream.mode == "append" else Update(*fields)
            asking[seq] = asyncio.ensure_future(worker.ask(event))
        answers = await asyncio.gather(*asking.values(), return_exceptions=True)
        for seq, answer in zip(asking, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            if seq >= stream.seq:
                stream.seq, stream.tokens = seq, answer.tokens

    async def _fetch(
        self, stream_id: str, owner: bytes | None, since: int, first: str | None = None
    ) -> tuple[Copy, Worker] | None:
        """The copy with the highest epoch among the workers; `first`: the tag of the one that is
        asked before the others, whose answer then is taken."""
        holders = self._cluster.holders()
        fetch = Fetch(stream_id, since=since, owner=owner)
        named = [w for w in holders if worker_tag(w.url) == first]
        others = [w for w in holders if w not in named]
        for group in (named, others):
            answers = await asyncio.gather(*(_copy(w, fetch) for w in group))
            found = [(copy, w) for copy, w in zip(answers, group, strict=True) if copy is not None]
            if found:
                return max(found, key=lambda f: (f[0].epoch, f[0].status.seq))
        return None


async def _drop_copy(worker: Worker, abort: Abort) -> None:
    with log_context(stream_id=abort.stream_id):
        try:
            await worker.ask(abort)
        except StreamError as e:  # what is missed expires
            logger.debug("stream %s on %s: %s", abort.stream_id, worker.url, e.message)


async def _copy(worker: Worker, fetch: Fetch) -> Copy | None:
    try:
        return await worker.fetch(fetch)
    except StreamError:
        return None

"""The calls that add to a stream's prompt or replace it, from whichever worker holds it by then."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from router.auth import Caller
from router.cluster import Cluster
from router.metrics import RouterMetrics
from router.moves import Moves
from router.schemas import ChunksBody, ContextBody
from router.streams import Placement, Stream, Streams, sealed
from sglang_stream.errors import (
    SequenceGap,
    StreamError,
    StreamMoved,
    StreamNotFound,
    WorkerUnavailable,
)
from sglang_stream.messages import Accepted, Append, Mode, Update, digest, pack_tokens

_TRIES = 4


@dataclass(frozen=True)
class ChunkCall:
    """One numbered call as it goes to the worker. `ids`: what it adds, or the whole context;
    `memo`: what travels with the stream from then on; `last`: the seal follows at once."""

    seq: int
    kind: Mode
    ids: array[int]
    placement: Placement | None
    memo: bytes | None
    last: bool = False


class Chunks:
    """Appends and updates of one router. `in_background` runs what nobody waits for."""

    def __init__(
        self,
        cluster: Cluster,
        streams: Streams,
        moves: Moves,
        metrics: RouterMetrics,
        in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._cluster = cluster
        self._streams = streams
        self._moves = moves
        self._metrics = metrics
        self._in_background = in_background

    async def append(self, stream_id: str, body: ChunksBody, caller: Caller) -> Accepted:
        """Adds chunks. Raises StreamNotFound, Malformed, BodyTooLarge and the worker's errors."""
        stream = await self._moves.find(stream_id, caller)
        async with stream.sending:
            call = await self.prepare(stream, body)
            asking = self.send(stream, call)
        # Sent in this order; the answers need not be waited for one by one.
        answer = await asking
        stream.accepted(call.seq, call.ids, answer)
        if stream.known_seq < stream.seq and stream.state == "open":
            self._in_background(self._sync(stream))  # another router has sent some
        return answer

    async def update(self, stream_id: str, body: ContextBody, caller: Caller) -> Accepted:
        """Replaces the context; raises as `append` does."""
        stream = await self._moves.find(stream_id, caller)
        async with stream.sending:
            return await self.take(stream, await self.prepare(stream, body))

    async def prepare(self, stream: Stream, body: ChunksBody | ContextBody) -> ChunkCall:
        """What a call sends. Raises Malformed. Must hold `stream.sending`."""
        prompts = self._cluster.model.prompts
        placement: Placement | None = None
        memo: bytes | None = None
        if isinstance(body, ChunksBody):
            ids = await prompts.chunks(body)
        elif body.documents is None:
            ids = prompts.context(body.input_ids or [])
        else:
            placement = stream.place(body.seq, body.documents)
            memo = stream.memo(placement.after)
            ids = await prompts.documents(placement.texts)
        kind: Mode = "append" if isinstance(body, ChunksBody) else "update"
        return ChunkCall(body.seq, kind, ids, placement, memo)

    def send(self, stream: Stream, call: ChunkCall) -> asyncio.Task[Accepted]:
        """Sends a call to the worker that holds the stream: its answer."""

        async def ask() -> Accepted:
            answer = await self._tell(stream, call)
            self._metrics.chunks.inc()
            return answer

        return asyncio.create_task(ask())

    async def take(self, stream: Stream, call: ChunkCall) -> Accepted:
        """Sends a call, and notes what the worker has accepted. Must hold `stream.sending`."""
        answer = await self.send(stream, call)
        stream.accepted(call.seq, call.ids, answer, call.placement)
        return answer

    async def _sync(self, stream: Stream) -> None:
        with suppress(StreamError):  # tried again with the next call
            await self._moves.sync(stream)

    async def _tell(self, stream: Stream, call: ChunkCall) -> Accepted:
        """The answer to a call from whichever worker holds the stream by then."""
        packed = pack_tokens(call.ids)
        content = digest(packed)
        for attempt in range(_TRIES):
            if stream.is_lost and stream.state in ("sealed", "finished"):
                raise sealed(stream)  # a replay would open it again
            worker = await self._moves.ensure(stream)
            epoch = stream.epoch
            fields = (stream.id, call.seq, packed, content, epoch, stream.owner, call.last)
            event = Append(*fields) if call.kind == "append" else Update(*fields, call.memo)
            try:
                answer = await worker.ask(event)
                if stream.epoch == epoch:
                    return answer
                # It was moved meanwhile, perhaps without this; a repeat does no harm.
            except WorkerUnavailable:
                if worker.ready or attempt == _TRIES - 1:
                    raise
            except SequenceGap as e:
                # What went to a worker that was lost, while another router moved the stream.
                if attempt == _TRIES - 1 or not await self._moves.fill(stream, e.expected_seq):
                    raise
            except (StreamNotFound, StreamMoved) as e:
                if stream.state in ("sealed", "finished"):
                    raise sealed(stream) from None
                if attempt == _TRIES - 1:
                    raise
                try:
                    await self._moves.refresh(stream)
                except StreamNotFound:
                    self._streams.forget(stream)
                    raise e from None
        raise WorkerUnavailable(
            f"stream {stream.id} is being moved again and again: repeat the call", retry_after=1
        )

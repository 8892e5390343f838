"""The streams of one scheduler: their tokens, sequence and counters; `kv`: what they hold.

Every tensor-parallel rank keeps the same table, because every rank handles the same events in the
same order; the only clock is the time that the events carry.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from heapq import heappop, heappush

from sglang_stream import messages as m
from sglang_stream.engine.cache import Holder
from sglang_stream.engine.holdings import Holdings
from sglang_stream.engine.host import HostMemory
from sglang_stream.engine.metrics import EngineMetrics
from sglang_stream.engine.stream import Stream
from sglang_stream.engine.tokens import common_prefix, pack_ids, unpack_tokens
from sglang_stream.errors import (
    LimitReached,
    PromptTooLong,
    SequenceConflict,
    StreamNotFound,
    StreamSealed,
)
from sglang_stream.policy import SealPredictor, Survival
from sglang_stream.policy.types import Invalidation, PolicyName
from sglang_stream.session import Session, Verdict

_REMEMBERED = 4096  # finished streams whose state can still be asked for
_SEAL_COMES_S = 0.25
"""How long a stream whose seal is on the way is not computed. A pass begun before the seal comes
would hold it up, and its KV would only begin to move to a decode worker after that pass."""


@dataclass(frozen=True)
class Limits:
    """`prompt_tokens`: the longest prompt; `vocab_size`: ids are below it; `streams`: open ones."""

    prompt_tokens: int
    vocab_size: int
    streams: int


class StreamTable:
    """All streams of a scheduler and what the chunk events do to them."""

    def __init__(
        self,
        cache: Holder,
        limits: Limits,
        metrics: EngineMetrics,
        *,
        policy: PolicyName = "slack",
        invalidation: Invalidation = "hard",
        host: HostMemory | None = None,
        page_size: int = 1,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._arrivals = 0
        self._predictor = SealPredictor()
        self._survival = Survival()
        self.kv = Holdings(cache, metrics, policy, invalidation, host or HostMemory(0), page_size)
        self.now = 0.0
        self.live: dict[str, Stream] = {}
        self._dues: list[tuple[float, str]] = []
        self._closing: deque[tuple[float, Stream]] = deque()
        self.open_count = 0
        self._finished: OrderedDict[str, tuple[bytes, m.Status]] = OrderedDict()

    def arrive(self) -> int:
        """The next place in the order of arrival, of streams, chunks and requests alike."""
        self._arrivals += 1
        return self._arrivals

    def next_due_s(self) -> float | None:
        """When the next seal is predicted; None if none is. A prediction that has not come true
        is forgotten: the stream's next chunk brings another."""
        while self._dues:
            due_s, stream_id = self._dues[0]
            stream = self.live.get(stream_id)
            if (
                due_s >= self.now
                and stream is not None
                and stream.due_s == due_s
                and stream.session.state == "open"
            ):
                return due_s
            heappop(self._dues)
        return None

    def tick(self, now: float) -> None:
        """It is `now`. A stream whose seal has not come is computed as the other open ones are."""
        self.now = now
        while self._closing and self._closing[0][0] <= now:
            _, stream = self._closing.popleft()
            if stream.closing and self.live.get(stream.session.stream_id) is stream:
                stream.closing = False
                self.kv.rank(stream)

    def get(self, stream_id: str) -> Stream:
        """The live stream of that id. Raises StreamNotFound; StreamSealed if it has finished."""
        stream = self.live.get(stream_id)
        if stream is None and stream_id in self._finished:
            raise StreamSealed(f"stream {stream_id} has ended: open a new one")
        if stream is None:
            raise StreamNotFound(f"stream {stream_id} is unknown or has expired: open a new one")
        return stream

    def owner(self, stream_id: str) -> bytes | None:
        """Whose stream it is, live or recently finished; None if it is not known."""
        stream = self.live.get(stream_id)
        if stream is not None:
            return stream.owner
        return self._finished[stream_id][0] if stream_id in self._finished else None

    def status(self, stream_id: str) -> m.Status:
        """A live or recently finished stream's state. Raises StreamNotFound."""
        stream = self.live.get(stream_id)
        if stream is None and stream_id in self._finished:
            return self._finished[stream_id][1]
        stream = self.get(stream_id)
        return m.Status(
            stream_id=stream_id,
            mode=stream.session.mode,
            state=stream.session.state,
            seq=stream.session.seq,
            tokens=len(stream.tokens),
            usage=stream.usage.freeze(),
            held=stream.held,
            saved=stream.saved,
            place=self.kv.order.place(stream_id),
        )

    def open(self, event: m.Open, now: float) -> m.Accepted:
        """Begins a stream; the same opening again is a repeat.

        Raises LimitReached, PromptTooLong, Malformed, SequenceConflict.
        """
        opening = self._unpack(event.tokens, before=0)
        known = self.live.get(event.stream_id)
        if known is not None:
            if known.opening != opening or known.session.mode != event.mode:
                raise SequenceConflict(f"stream {event.stream_id} is already open: take a new id")
            return m.Accepted(known.session.seq, len(known.tokens))
        if self.open_count >= self._limits.streams:
            raise LimitReached(
                f"this worker has {self._limits.streams} open streams: try again when one is done",
                retry_after=1,
            )
        arrival = self.arrive()
        stream = Stream(
            session=Session(event.stream_id, event.mode),
            arrival=arrival,
            opening=opening,
            tokens=array("q", opening),
            idle_timeout_s=event.idle_timeout_s,
            last_event_s=now,
            epoch=event.epoch,
            owner=event.owner,
            namespace=event.namespace,
            memo=event.memo,
            latest=arrival,
            since_s=now,
            last_chunk_s=now,
        )
        self.live[event.stream_id] = stream
        self.open_count += 1
        self._predict(stream)
        self.kv.hold(stream)
        return m.Accepted(0, len(opening))

    def append(self, event: m.Append, now: float) -> m.Accepted:
        """Adds a chunk. Raises what `Session.check` raises, PromptTooLong, Malformed."""
        stream = self._touch(event.stream_id, now)
        verdict = stream.session.check("append", event.seq, event.digest)
        self._note(verdict)
        if verdict is Verdict.APPLY:
            tokens = self._unpack(event.tokens, before=len(stream.tokens))
            was_ready = self.kv.is_ready(stream)
            stream.tokens.extend(tokens)
            stream.ends[event.seq] = len(stream.tokens)
            stream.session.record(event.seq, event.digest)
            stream.usage.chunks += 1
            self._metrics.chunks.inc()
            self._arrived(stream, now, was_ready, event.last)
            self.kv.hold(stream)
        return m.Accepted(event.seq, len(stream.tokens))

    def update(self, event: m.Update, now: float) -> m.Accepted:
        """Replaces the context and frees the KV beyond the common prefix.

        `lcp` of the answer is the prefix shared with the prompt before, opening included; for a
        repeat or a superseded update it is the whole prompt, since nothing changes. Raises what
        `Session.check` raises, PromptTooLong, Malformed.
        """
        stream = self._touch(event.stream_id, now)
        verdict = stream.session.check("update", event.seq, event.digest)
        self._note(verdict)
        lcp = len(stream.tokens)
        if verdict is Verdict.APPLY:
            tokens = stream.opening + self._unpack(event.tokens, before=len(stream.opening))
            lcp = common_prefix(stream.tokens, tokens)
            if stream.usage.updates:
                self._survival.updated(lcp, len(stream.tokens))
            stream.ends = {event.seq: len(tokens)}
            stream.memo = stream.memo if event.memo is None else event.memo
            stream.session.record(event.seq, event.digest)
            self._replace(stream, tokens, lcp, now, event.last)
        return m.Accepted(event.seq, len(stream.tokens), lcp)

    def copy(self, stream: Stream, since: int) -> m.Copy:
        """The stream as another router needs it, with the calls after `since`."""
        chunks: list[tuple[int, bytes]] = []
        start = len(stream.opening)
        for seq, end in stream.ends.items():
            if seq > since:
                chunks.append((seq, pack_ids(stream.tokens[start:end])))
            start = end
        return m.Copy(
            status=self.status(stream.session.stream_id),
            epoch=stream.epoch,
            opening=pack_ids(stream.opening),
            chunks=chunks,
            idle_timeout_s=stream.idle_timeout_s,
            namespace=stream.namespace,
            memo=stream.memo,
            owner=stream.owner,
        )

    def drop(self, stream: Stream) -> None:
        """Forgets a stream that was aborted, has expired or has moved to another worker."""
        self.kv.forget(stream)
        if stream.session.state == "open":
            self.open_count -= 1
        stream.session.abort()
        del self.live[stream.session.stream_id]

    def seal(self, stream: Stream, rid: str) -> array[int]:
        """Ends the context; the request `rid` generates from the tokens returned."""
        stream.session.seal()
        stream.closing = False
        stream.rid = rid
        stream.usage.ready_tokens = max(stream.held, stream.saved)
        self.open_count -= 1
        self._predictor.sealed(stream.usage.chunks + stream.usage.updates)
        stream.since_s = self.now
        self.kv.rank(stream)
        return stream.tokens

    def reopen(self, stream: Stream) -> None:
        """Takes back a seal whose request was refused, as if it had never come."""
        stream.session.reopen()
        stream.rid = stream.request = None
        stream.usage.ready_tokens = 0
        self.open_count += 1
        self.kv.hold(stream)

    def finish(self, stream: Stream) -> None:
        """Ends a sealed stream whose generation is over; its state can be asked for a while."""
        self.kv.forget(stream)
        stream.session.finish()
        stream_id = stream.session.stream_id
        self._finished[stream_id] = stream.owner, self.status(stream_id)
        del self.live[stream_id]
        while len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)

    def expired(self, now: float) -> list[str]:
        """Ids of the open streams without an event for their idle time-out."""
        return [
            s.session.stream_id
            for s in self.live.values()
            if s.session.state == "open" and now - s.last_event_s > s.idle_timeout_s
        ]

    def pass_done(self, stream: Stream, ids: array[int], start: int) -> None:
        """Notes that the KV of `ids[start:]` was computed and is in the tree.

        The stream may have changed meanwhile: what no longer belongs to its prompt is freed.
        """
        stream.in_flight = False
        stream.usage.computed_tokens += len(ids) - start
        lcp = common_prefix(stream.tokens, ids)
        again = max(0, min(stream.reach, len(ids)) - start)
        stream.usage.recomputed_tokens += again
        self._metrics.recomputed.inc(again)
        stream.reach = max(stream.reach, min(len(ids), lcp))
        self.kv.computed(stream, ids, fits=lcp)
        if lcp < len(ids):
            self._invalidated(stream, len(ids) - max(lcp, start))

    def _replace(
        self, stream: Stream, tokens: array[int], lcp: int, now: float, last: bool
    ) -> None:
        """Puts an update's prompt in."""
        was_ready = self.kv.is_ready(stream)
        stream.usage.updates += 1
        stream.usage.lcp_tokens += lcp
        self._arrived(stream, now, was_ready, last)
        self._invalidated(stream, self.kv.replace(stream, tokens, lcp))
        self._metrics.chunks.inc()
        self._metrics.lcp.observe(lcp)

    def _arrived(self, stream: Stream, now: float, was_ready: bool, last: bool) -> None:
        """Notes when a chunk or an update came, and when the seal is to be expected. `was_ready`:
        there was nothing to compute before it; `last`: the seal follows at once."""
        if stream.usage.chunks + stream.usage.updates > 1:
            gap = max(0.0, now - stream.last_chunk_s)
            stream.gaps_s += gap
            self._predictor.gap(gap)
        if was_ready:
            stream.since_s = now
        stream.preempted = False
        stream.closing = last
        if last:
            self._closing.append((now + _SEAL_COMES_S, stream))
        stream.last_chunk_s = now
        stream.latest = self.arrive()
        self._predict(stream)

    def _predict(self, stream: Stream) -> None:
        chunks = stream.usage.chunks + stream.usage.updates
        stream.due_s = self._predictor.due_s(chunks, stream.last_chunk_s, stream.gaps_s)
        heappush(self._dues, (stream.due_s, stream.session.stream_id))
        if stream.session.mode == "update":
            stream.stays = self._survival.part(self._predictor.to_come(chunks))

    def _invalidated(self, stream: Stream, tokens: int) -> None:
        stream.usage.invalidated_tokens += tokens
        self._metrics.invalidated.inc(tokens)

    def _note(self, verdict: Verdict) -> None:
        if verdict is not Verdict.APPLY:
            self._metrics.odd.labels("repeated" if verdict is Verdict.REPEAT else "late").inc()

    def _touch(self, stream_id: str, now: float) -> Stream:
        stream = self.get(stream_id)
        stream.last_event_s = now
        return stream

    def _unpack(self, raw: bytes, before: int) -> array[int]:
        if before + len(raw) // 4 > self._limits.prompt_tokens:
            raise PromptTooLong(
                f"the prompt would have {before + len(raw) // 4} tokens, the limit is "
                f"{self._limits.prompt_tokens}: leave documents out"
            )
        return unpack_tokens(raw, self._limits.vocab_size)

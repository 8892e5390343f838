"""The streams of one scheduler: their tokens, sequence, counters and held KV.

Every tensor-parallel rank keeps the same table, because every rank handles the same events in the
same order; the only clock is the time that the events carry.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from sglang_stream import messages as m
from sglang_stream.engine.cache import Hold, Holder
from sglang_stream.engine.metrics import EngineMetrics
from sglang_stream.engine.tokens import common_prefix, pack_ids, unpack_tokens
from sglang_stream.errors import (
    LimitReached,
    PromptTooLong,
    SequenceConflict,
    StreamNotFound,
    StreamSealed,
)
from sglang_stream.policy import StreamView
from sglang_stream.session import Session, Verdict

_REMEMBERED = 4096  # finished streams whose state can still be asked for


@dataclass(frozen=True)
class Limits:
    """`prompt_tokens`: the longest prompt; `vocab_size`: ids are below it; `streams`: open ones."""

    prompt_tokens: int
    vocab_size: int
    streams: int


@dataclass
class Usage:
    """The counters of `messages.Usage` while they still move."""

    chunks: int = 0
    updates: int = 0
    lcp_tokens: int = 0
    invalidated_tokens: int = 0
    computed_tokens: int = 0
    ready_tokens: int = 0
    early_kv_bytes: int = 0
    late_kv_bytes: int = 0

    def freeze(self) -> m.Usage:
        return m.Usage(**self.__dict__)


@dataclass(eq=False)
class Stream:
    """One stream. `epoch`, `owner`, `namespace`, `memo`: see `messages.Open`; `ends`: the prompt's
    length after each chunk of an append stream, after the latest update of another. `in_flight`:
    a pass of it is in the forward now; `preempted`: its KV was taken and no event came since;
    `rid`, `request`: SGLang's request once it is sealed; `aborted`: it was told to end."""

    session: Session
    arrival: int
    opening: array[int]
    tokens: array[int]
    idle_timeout_s: float
    last_event_s: float
    epoch: int = 0
    owner: bytes = b""
    namespace: str | None = None
    memo: bytes = b""
    ends: dict[int, int] = field(default_factory=dict)
    hold: Hold | None = None
    in_flight: bool = False
    preempted: bool = False
    rid: str | None = None
    request: Any = None
    aborted: bool = False
    usage: Usage = field(default_factory=Usage)

    @property
    def held(self) -> int:
        return self.hold.length if self.hold is not None else 0

    def cacheable(self, page_size: int) -> int:
        """Tokens that fill whole pages, the only ones that the tree keeps."""
        return len(self.tokens) - len(self.tokens) % page_size

    def view(self, page_size: int) -> StreamView:
        """How the planner sees it."""
        return StreamView(
            stream_id=self.session.stream_id,
            arrival=self.arrival,
            cacheable=self.cacheable(page_size),
            held=self.held,
            sealed=self.session.state == "sealed",
            preempted=self.preempted,
        )


class StreamTable:
    """All streams of a scheduler and what the chunk events do to them."""

    def __init__(self, cache: Holder, limits: Limits, metrics: EngineMetrics) -> None:
        self._cache = cache
        self._limits = limits
        self._metrics = metrics
        self._arrivals = 0
        self.live: dict[str, Stream] = {}
        self.open_count = 0
        self.held_tokens = 0
        self._finished: OrderedDict[str, tuple[bytes, m.Status]] = OrderedDict()

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
        self._arrivals += 1
        stream = Stream(
            session=Session(event.stream_id, event.mode),
            arrival=self._arrivals,
            opening=opening,
            tokens=array("q", opening),
            idle_timeout_s=event.idle_timeout_s,
            last_event_s=now,
            epoch=event.epoch,
            owner=event.owner,
            namespace=event.namespace,
            memo=event.memo,
        )
        self.live[event.stream_id] = stream
        self.open_count += 1
        self.hold_cached(stream)
        return m.Accepted(0, len(opening))

    def append(self, event: m.Append, now: float) -> m.Accepted:
        """Adds a chunk. Raises what `Session.check` raises, PromptTooLong, Malformed."""
        stream = self._touch(event.stream_id, now)
        verdict = stream.session.check("append", event.seq, event.digest)
        self._note(verdict)
        if verdict is Verdict.APPLY:
            tokens = self._unpack(event.tokens, before=len(stream.tokens))
            stream.tokens.extend(tokens)
            stream.ends[event.seq] = len(stream.tokens)
            stream.session.record(event.seq, event.digest)
            stream.usage.chunks += 1
            self._metrics.chunks.inc()
            self.hold_cached(stream)
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
            stream.ends = {event.seq: len(tokens)}
            stream.memo = stream.memo if event.memo is None else event.memo
            stream.session.record(event.seq, event.digest)
            self._replace(stream, tokens, lcp)
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
        self.release(stream)
        if stream.session.state == "open":
            self.open_count -= 1
        stream.session.abort()
        del self.live[stream.session.stream_id]

    def seal(self, stream: Stream, rid: str) -> array[int]:
        """Ends the context; the request `rid` generates from the tokens returned."""
        stream.session.seal()
        stream.rid = rid
        stream.usage.ready_tokens = stream.held
        self.open_count -= 1
        return stream.tokens

    def reopen(self, stream: Stream) -> None:
        """Takes back a seal whose request was refused, as if it had never come."""
        stream.session.reopen()
        stream.rid = stream.request = None
        stream.usage.ready_tokens = 0
        self.open_count += 1
        self.hold_cached(stream)

    def finish(self, stream: Stream) -> None:
        """Ends a sealed stream whose generation is over; its state can be asked for a while."""
        self.release(stream)
        stream.session.finish()
        stream_id = stream.session.stream_id
        self._finished[stream_id] = stream.owner, self.status(stream_id)
        del self.live[stream_id]
        while len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)

    def release(self, stream: Stream) -> None:
        """Unlocks a stream's KV, which stays cached until it is evicted."""
        self.held_tokens -= stream.held
        self._cache.release(stream.hold)
        stream.hold = None

    def preempt(self, stream: Stream) -> None:
        """Unlocks a victim's KV; what is not evicted is found again by its next pass."""
        self.release(stream)
        stream.preempted = True
        self._metrics.preemptions.inc()

    def hold_cached(self, stream: Stream) -> None:
        """Holds all that the tree has of the prompt, also what another stream computed."""
        self.held_tokens -= stream.held
        stream.hold = self._cache.take(stream.tokens, stream.namespace, stream.hold)
        self.held_tokens += stream.held

    def forget_kv(self) -> None:
        """Unlocks everything, before the cache is flushed; open streams are computed anew."""
        for stream in self.live.values():
            self.release(stream)

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
        done = self._cache.take(ids, stream.namespace)
        if self.live.get(stream.session.stream_id) is stream:
            self.hold_cached(stream)
        self._cache.release(done)
        if lcp < len(ids):
            self._invalidated(stream, len(ids) - max(lcp, start))
            if done is not None:
                self._cache.prune(done.node, stream.hold)

    def _replace(self, stream: Stream, tokens: array[int], lcp: int) -> None:
        """Puts an update's prompt in. The dead branch is freed up to what others share."""
        old, stream.tokens = stream.hold, tokens
        self.hold_cached(stream)
        if old is not None and old.length > lcp:
            self._invalidated(stream, old.length - lcp)
            self._cache.prune(old.node, stream.hold)
        stream.usage.updates += 1
        stream.usage.lcp_tokens += lcp
        self._metrics.chunks.inc()
        self._metrics.lcp.observe(lcp)

    def _invalidated(self, stream: Stream, tokens: int) -> None:
        stream.usage.invalidated_tokens += tokens
        self._metrics.invalidated.inc(tokens)

    def _note(self, verdict: Verdict) -> None:
        if verdict is not Verdict.APPLY:
            self._metrics.odd.labels("repeated" if verdict is Verdict.REPEAT else "late").inc()

    def _touch(self, stream_id: str, now: float) -> Stream:
        stream = self.get(stream_id)
        stream.last_event_s = now
        stream.preempted = False
        return stream

    def _unpack(self, raw: bytes, before: int) -> array[int]:
        if before + len(raw) // 4 > self._limits.prompt_tokens:
            raise PromptTooLong(
                f"the prompt would have {before + len(raw) // 4} tokens, the limit is "
                f"{self._limits.prompt_tokens}: leave documents out"
            )
        return unpack_tokens(raw, self._limits.vocab_size)

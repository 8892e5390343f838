"""The router's copy of its streams: what a prompt is put together from, and who is generating.

The worker is the authority on a stream's sequence and state; what is here is a cache of it, the
tokens that were sent, and the generation. What a worker need not understand but another router
must know travels with the stream as its *memo*.
"""

from __future__ import annotations

import time
from array import array
from asyncio import Lock
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from router.auth import Caller
from router.generation import Generation
from router.schemas import DocumentBody, Order, text_of
from router.worker import Worker
from sglang_stream.errors import LimitReached, StreamError, StreamNotFound, StreamSealed
from sglang_stream.messages import Accepted, Copy, Mode, State, Usage, digest
from sglang_stream.prompt import Opening, arrange

_IDLE_SLACK_S = 1.0
_TOKEN_BYTES = 4
_REMEMBERED = 4096  # deleted streams whose ids are not looked for any more


class Memo(msgspec.Struct, frozen=True, array_like=True):
    """What a router must know of a stream that another one opened."""

    model: str
    created: int
    order: Order
    kind: Literal["chat", "text", "ids"]
    closing: str
    placed: list[bytes] = []


_encode_memo = msgspec.msgpack.Encoder().encode
_decode_memo = msgspec.msgpack.Decoder(Memo).decode


@dataclass(frozen=True)
class Placement:
    """The texts of an update in the order of the prompt; the documents' keys before and after."""

    before: list[bytes]
    after: list[bytes]
    texts: list[str]


@dataclass(eq=False)
class Stream:
    """One stream. `chunks`: the ids of each accepted call by its number; of the latest update only.

    `worker`: who holds it, None while it is between two workers. `epoch`: how often it has moved.
    `owner`, `namespace`: see `messages.Open`. `sending` keeps the calls of one stream in the order
    in which they arrived, while the texts of some are tokenised in a thread; `moving` is held
    while it changes workers. `seq`, `tokens` (the prompt's length), `usage`,
    `held`, `saved` and `priority` (`place` of `messages.Status`) are as the worker last told.
    `tail`: ids after the context, known once it is sealed. `touched_s`: the time of the last call,
    on the monotonic clock.
    """

    id: str
    mode: Mode
    model: str
    opening: Opening
    order: Order
    idle_timeout_s: float
    worker: Worker | None
    owner: bytes = b""
    namespace: str | None = None
    epoch: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = "open"
    seq: int = 0
    tokens: int = 0
    usage: Usage = field(default_factory=Usage)
    held: int = 0
    saved: int = 0
    priority: int | None = None
    chunks: dict[int, array[int]] = field(default_factory=dict)
    tail: array[int] | None = None
    sending: Lock = field(default_factory=Lock)
    moving: Lock = field(default_factory=Lock)
    generation: Generation | None = None
    touched_s: float = field(default_factory=time.monotonic)
    _known_seq: int = 0
    _placed: list[bytes] = field(default_factory=list)
    _placed_before: dict[int, list[bytes]] = field(default_factory=dict)

    @classmethod
    def from_copy(cls, copy: Copy, worker: Worker) -> Stream:
        """A stream of which another router's worker told."""
        memo = _decode_memo(copy.memo)
        opening = array("i")
        opening.frombytes(copy.opening)
        stream = cls(
            id=copy.status.stream_id,
            mode=copy.status.mode,
            model=memo.model,
            opening=Opening(opening, memo.closing, memo.kind),
            order=memo.order,
            idle_timeout_s=copy.idle_timeout_s,
            worker=worker,
            owner=copy.owner,
            namespace=copy.namespace,
            created=memo.created,
        )
        stream.take_copy(copy, worker)
        return stream

    def take_copy(self, copy: Copy, worker: Worker) -> None:
        """Brings the copy here up to what its worker has."""
        self.worker, self.epoch = worker, copy.epoch
        self.state, self.usage = copy.status.state, copy.status.usage
        self.seq, self.tokens = copy.status.seq, copy.status.tokens
        self.take_chunks(copy)
        self._placed = _decode_memo(copy.memo).placed

    def take_chunks(self, copy: Copy) -> None:
        """Notes the tokens that are not known here."""
        if self.mode == "update" and copy.chunks and self.known_seq <= copy.status.seq:
            self.chunks = {}
        for seq, raw in copy.chunks:
            self.chunks[seq] = array("i")
            self.chunks[seq].frombytes(raw)

    def memo(self, placed: list[bytes] | None = None) -> bytes:
        """What travels with the stream; `placed`: the keys of its documents, in their order."""
        return _encode_memo(
            Memo(
                model=self.model,
                created=self.created,
                order=self.order,
                kind=self.opening.kind,
                closing=self.opening.closing,
                placed=self._placed if placed is None else placed,
            )
        )

    def forget_chunks(self) -> None:
        """Frees the ids of the context, which nobody will ask for any more."""
        self.chunks = {}
        self._known_seq = 0

    @property
    def is_lost(self) -> bool:
        """Whether no worker that answers holds it."""
        return self.worker is None or not self.worker.ready

    def touch(self) -> None:
        self.touched_s = time.monotonic()

    def place(self, seq: int, documents: list[str | DocumentBody]) -> Placement:
        """Where the documents of update `seq` stand in the prompt.

        A repeat is placed as the first time, so that the worker sees the same content.
        """
        before = self._placed_before.get(seq, self._placed)
        texts: dict[bytes, list[str]] = {}
        keys: list[bytes] = []
        for document in documents:
            keys.append(_key(document))
            texts.setdefault(keys[-1], []).append(text_of(document))
        after = arrange(before, keys, self.order)
        return Placement(before, after, [texts[key].pop(0) for key in after])

    def accepted(
        self, seq: int, ids: array[int], answer: Accepted, placement: Placement | None = None
    ) -> None:
        """Notes that the worker took `ids` as call `seq`."""
        self.touch()
        if self.mode == "append":
            self.chunks[seq] = ids
        elif seq >= max(self.chunks, default=0):
            self.chunks = {seq: ids}
            if placement is not None:
                self._placed = placement.after
        if placement is not None:
            self._placed_before[seq] = placement.before
        if answer.seq >= self.seq:
            self.seq, self.tokens = answer.seq, answer.tokens

    def tokens_with(self, seq: int, ids: array[int]) -> int | None:
        """The prompt's length once call `seq` is accepted; None if that cannot be told from here:
        the call does not follow on what is known."""
        follows = seq == self.known_seq + 1 if self.mode == "append" else seq > self.known_seq
        if not follows or self.context() is None:
            return None
        return len(ids) + (self.tokens if self.mode == "append" else len(self.opening.tokens))

    def context(self) -> array[int] | None:
        """All ids of the prompt so far; None if the worker has some that are not known of here."""
        ids = array("i", self.opening.tokens)
        for seq in sorted(self.chunks):
            ids.extend(self.chunks[seq])
        return ids if len(ids) == self.tokens and self.known_seq >= self.seq else None

    def prompt(self) -> list[int] | None:
        """All ids of a sealed stream's prompt; None if some are not known of here."""
        context = self.context()
        if context is None or self.tail is None:
            return None
        return (context + self.tail).tolist()

    @property
    def known_seq(self) -> int:
        """Up to which number the ids are known here, without gaps in append mode."""
        if self.mode == "update":
            return max(self.chunks, default=0)
        while self._known_seq + 1 in self.chunks:
            self._known_seq += 1
        return self._known_seq

    @property
    def bytes(self) -> int:
        """What the copy of its prompt takes in memory."""
        return _TOKEN_BYTES * self.tokens

    def described(self, *, with_worker: bool = False) -> dict[str, Any]:
        """The object that answers GET; `with_worker`: also who holds it."""
        place = {"prefill_worker": self.worker.url if self.worker else None}
        return (place if with_worker else {}) | {
            "id": self.id,
            "object": "stream",
            "mode": self.mode,
            "model": self.model,
            "status": self.state,
            "created": self.created,
            "seq": self.seq,
            "held_tokens": self.held,
            "swapped_tokens": self.saved,
            "priority": self.priority,
            "usage": {"prompt_tokens": self.tokens, "stream": msgspec.structs.asdict(self.usage)},
        }


class Streams:
    """The streams by id. `limit`: how many may be open at once; `buffer_bytes`: above this many
    in copies of prompts no new stream is taken."""

    def __init__(self, limit: int, buffer_bytes: int) -> None:
        self._limit = limit
        self._buffer_bytes = buffer_bytes
        self._by_id: dict[str, Stream] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def check_room(self) -> None:
        """Raises LimitReached unless another stream may be opened."""
        if self.open_count() >= self._limit:
            raise LimitReached(
                f"{self._limit} streams are open, which is the limit: try again when one is done",
                retry_after=1,
            )
        if sum(s.bytes for s in self._by_id.values()) > self._buffer_bytes:
            raise LimitReached(
                "the prompts of open streams fill --stream-buffer-gb: try again when one is done",
                retry_after=1,
            )

    def add(self, stream: Stream) -> None:
        self._by_id[stream.id] = stream

    def find(self, stream_id: str, caller: Caller) -> Stream | None:
        """The stream, None if it is not known here. Raises StreamNotFound for another's, which
        only an admin sees."""
        if stream_id in self._ended:
            raise unknown(stream_id)
        stream = self._by_id.get(stream_id)
        if stream is not None and stream.owner != caller.owner and not caller.admin:
            raise unknown(stream_id)
        return stream

    def forget(self, stream: Stream) -> None:
        self._by_id.pop(stream.id, None)

    def end(self, stream: Stream) -> None:
        """Forgets a stream that was deleted, even if its worker still has it for a moment."""
        self.forget(stream)
        self._ended[stream.id] = None
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def open_count(self) -> int:
        return sum(1 for _ in self.open())

    def open(self) -> Iterator[Stream]:
        return (s for s in self._by_id.values() if s.state == "open")

    def open_of(self, caller: Caller) -> Iterator[Stream]:
        """The caller's open streams, all of them for an admin."""
        return (s for s in self.open() if caller.admin or s.owner == caller.owner)

    def held_by(self, worker: Worker | None) -> list[Stream]:
        return [s for s in self._by_id.values() if s.worker is worker]

    def idle(self, now_s: float) -> list[Stream]:
        """The streams whose time is up; one that is being generated never is.

        The worker's clock of a stream started before ours, so an open one is gone there too.
        """
        return [
            s
            for s in self._by_id.values()
            if (s.generation is None or s.generation.ended)
            and now_s - s.touched_s > s.idle_timeout_s + _IDLE_SLACK_S
        ]


def created_s(copy: Copy) -> int:
    """When a stream of which a worker told was opened, on the wall clock."""
    return _decode_memo(copy.memo).created


def unknown(stream_id: str) -> StreamNotFound:
    """The error for an id that names no stream."""
    return StreamNotFound(f"stream {stream_id} is unknown or has expired: open a new one")


def sealed(stream: Stream) -> StreamError:
    """The error for a call that comes after the seal."""
    if stream.state == "aborted":
        return unknown(stream.id)
    return StreamSealed(f"stream {stream.id} is sealed: open a new one for more context")


def _key(document: str | DocumentBody) -> bytes:
    """What makes two documents of two updates the same: the id, or else the text."""
    if isinstance(document, DocumentBody) and document.id is not None:
        return b"i" + document.id.encode()
    return b"t" + digest(text_of(document).encode())

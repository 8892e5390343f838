"""The router's copy of its streams: what a prompt is put together from, and who is generating.

The worker is the authority on a stream's sequence and state; what is here is a cache of it, the
tokens that were sent, and the generation.
"""

from __future__ import annotations

import time
from array import array
from asyncio import Lock
from collections.abc import Iterator
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import msgspec

from router.generation import Generation
from router.schemas import DocumentBody, Order, text_of
from sglang_stream.errors import LimitReached, StreamNotFound
from sglang_stream.messages import Accepted, Mode, State, Usage, digest
from sglang_stream.prompt import Opening, arrange

_IDLE_SLACK_S = 1.0


@dataclass(frozen=True)
class Placement:
    """The texts of an update in the order of the prompt; the documents' keys before and after."""

    before: list[bytes]
    after: list[bytes]
    texts: list[str]


@dataclass(eq=False)
class Stream:
    """One stream. `chunks`: the ids of each accepted call by its number; of the latest update only.

    `sending` keeps the calls of one stream in the order in which they arrived, while the texts of
    some are tokenised in a thread. `seq` and `tokens` (the prompt's length) are as the worker last
    told. `touched_s`: the time of the last call, on the monotonic clock.
    """

    mode: Mode
    model: str
    worker_id: str
    opening: Opening
    order: Order
    idle_timeout_s: float
    id: str = field(default_factory=lambda: f"st-{token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = "open"
    seq: int = 0
    tokens: int = 0
    usage: Usage = field(default_factory=Usage)
    chunks: dict[int, array[int]] = field(default_factory=dict)
    sending: Lock = field(default_factory=Lock)
    generation: Generation | None = None
    touched_s: float = field(default_factory=time.monotonic)
    _placed: list[bytes] = field(default_factory=list)
    _placed_before: dict[int, list[bytes]] = field(default_factory=dict)

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

    def prompt(self, tail: array[int]) -> list[int] | None:
        """All ids of the prompt; None if the worker has some that are not known of here."""
        ids = array("i", self.opening.tokens)
        for seq in sorted(self.chunks):
            ids.extend(self.chunks[seq])
        return (ids + tail).tolist() if len(ids) == self.tokens else None

    def described(self) -> dict[str, Any]:
        """The object that answers GET."""
        return {
            "id": self.id,
            "object": "stream",
            "mode": self.mode,
            "model": self.model,
            "status": self.state,
            "created": self.created,
            "seq": self.seq,
            "usage": {"prompt_tokens": self.tokens, "stream": msgspec.structs.asdict(self.usage)},
        }


class Streams:
    """The streams by id. `limit`: how many may be open at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_id: dict[str, Stream] = {}

    def add(self, stream: Stream) -> None:
        """Raises LimitReached."""
        if self.open_count() >= self._limit:
            raise LimitReached(
                f"{self._limit} streams are open, which is the limit: try again when one is done",
                retry_after=1,
            )
        self._by_id[stream.id] = stream

    def get(self, stream_id: str) -> Stream:
        """Raises StreamNotFound."""
        stream = self._by_id.get(stream_id)
        if stream is None:
            raise unknown(stream_id)
        return stream

    def forget(self, stream: Stream) -> None:
        self._by_id.pop(stream.id, None)

    def open_count(self) -> int:
        return sum(1 for _ in self.open())

    def open(self) -> Iterator[Stream]:
        return (s for s in self._by_id.values() if s.state == "open")

    def of_other_workers(self, worker_id: str) -> list[Stream]:
        return [s for s in self._by_id.values() if s.worker_id != worker_id]

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


def unknown(stream_id: str) -> StreamNotFound:
    """The error for an id that names no stream."""
    return StreamNotFound(f"stream {stream_id} is unknown or has expired: open a new one")


def _key(document: str | DocumentBody) -> bytes:
    """What makes two documents of two updates the same: the id, or else the text."""
    if isinstance(document, DocumentBody) and document.id is not None:
        return b"i" + document.id.encode()
    return b"t" + digest(text_of(document).encode())

"""What a router and a worker say to each other over ZeroMQ.

The worker binds a ROUTER socket, each router connects a DEALER. Every message is two frames:
`[call id, 8 bytes][msgpack of one struct below]`; the answer carries the call id of its question.
One question has one answer: `Welcome`, `Accepted`, `Status` or `Refused`. Token ids travel as
little-endian int32 bytes (`pack_tokens`). A question that has no answer yet may be sent again: the
sequence number makes a repeat harmless.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

PROTOCOL = 1
SEAL_KEY = "sglang_stream"
Mode = Literal["append", "update"]
State = Literal["open", "sealed", "finished", "aborted"]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages: immutable, tagged by class name."""


class Hello(Message, frozen=True, tag=True, array_like=True):
    """A router introduces itself; `protocol` must equal the worker's."""

    protocol: int


class Welcome(Message, frozen=True, tag=True, array_like=True):
    """What a router must know of a worker. `credits`: questions that may be unanswered at once."""

    protocol: int
    worker_id: str
    context_len: int
    vocab_size: int
    page_size: int
    credits: int


class Open(Message, frozen=True, tag=True, array_like=True):
    """Begins a stream with the tokens before its context (may be none)."""

    stream_id: str
    mode: Mode
    tokens: bytes
    idle_timeout_s: float


class Append(Message, frozen=True, tag=True, array_like=True):
    """Chunk `seq` (1, 2, ... without gaps) of an append stream; `digest` tells repeats apart."""

    stream_id: str
    seq: int
    tokens: bytes
    digest: bytes


class Update(Message, frozen=True, tag=True, array_like=True):
    """The whole context of an update stream as of `seq`, without the opening tokens."""

    stream_id: str
    seq: int
    tokens: bytes
    digest: bytes


class Abort(Message, frozen=True, tag=True, array_like=True):
    """Drops a stream, or ends its generation."""

    stream_id: str


class Query(Message, frozen=True, tag=True, array_like=True):
    """Asks for a stream's `Status`."""

    stream_id: str


class Accepted(Message, frozen=True, tag=True, array_like=True):
    """An event took effect, or had done so before. `tokens`: prompt length; `lcp`: of an update."""

    seq: int
    tokens: int
    lcp: int = 0


class Usage(Message, frozen=True, tag=True, array_like=True):
    """The counters of one stream, in tokens unless the name says otherwise (see the README)."""

    chunks: int = 0
    updates: int = 0
    lcp_tokens: int = 0
    invalidated_tokens: int = 0
    computed_tokens: int = 0
    ready_tokens: int = 0


class Status(Message, frozen=True, tag=True, array_like=True):
    """A stream as its worker sees it. `seq`: the last one applied; `tokens`: prompt length."""

    stream_id: str
    mode: Mode
    state: State
    seq: int
    tokens: int
    usage: Usage


class Refused(Message, frozen=True, tag=True, array_like=True):
    """An event was refused and changed nothing; the fields are those of `errors.StreamError`."""

    code: str
    message: str
    param: str | None = None
    expected_seq: int | None = None
    retry_after: int | None = None


class SealCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a small `/generate` call of SGLang says of the stream that it seals.

    Travels as JSON text in `sampling_params.custom_params[SEAL_KEY]`: SGLang hands flat values
    through whatever its processes use among themselves. `tail`: token ids after the context.
    """

    id: str
    last_seq: int | None = None
    tail: list[int] = msgspec.field(default_factory=list)

    def to_custom_params(self) -> dict[str, str]:
        return {SEAL_KEY: msgspec.json.encode(self).decode()}


Event = Open | Append | Update | Abort | Query
Question = Hello | Event
Answer = Welcome | Accepted | Status | Refused

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32 bytes. Raises OverflowError outside int32."""
    return array("i", tokens).tobytes()


def digest(tokens: bytes) -> bytes:
    """16 bytes that tell the contents of one event from another's."""
    return hashlib.blake2b(tokens, digest_size=16).digest()

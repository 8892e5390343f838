"""What a router and a worker say to each other over ZeroMQ.

The worker binds a ROUTER socket, each router connects a DEALER. Every message is two frames:
`[call id, 8 bytes][msgpack of one struct below]`; the answer carries the call id of its question.
One question has one answer: `Welcome`, `Accepted`, `Status`, `Copy`, `Snapshot` or `Refused`. A
`Report` comes unasked, under call id 0, to every router that has greeted the worker. Token ids
travel as little-endian int32 bytes (`pack_tokens`). A question that has no answer yet may be sent
again: the sequence number makes a repeat harmless.

Each move of a stream to another worker raises its *epoch*. Events carry the epoch that their
sender knows; a worker that hears of a later one than its own drops its copy, and refuses an
earlier one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from sglang_stream.policy.types import Invalidation, PolicyName, Preemption

PROTOCOL = 3
SEAL_KEY = "sglang_stream"
Mode = Literal["append", "update"]
State = Literal["open", "sealed", "finished", "aborted"]
Role = Literal["unified", "prefill", "decode"]

PREFIX_BLOCK = 256
"""Tokens of one block of a prompt, by which routers recognise prefixes that a worker has cached."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages: immutable, tagged by class name."""


class Hello(Message, frozen=True, tag=True, array_like=True):
    """A router introduces itself; `protocol` must equal the worker's."""

    protocol: int


class Welcome(Message, frozen=True, tag=True, array_like=True):
    """What a router must know of a worker. `credits`: questions that may be unanswered at once;
    `kv_tokens`: the size of its KV pool."""

    protocol: int
    worker_id: str
    role: Role
    context_len: int
    vocab_size: int
    page_size: int
    kv_tokens: int
    credits: int


class Open(Message, frozen=True, tag=True, array_like=True):
    """Begins a stream with the tokens before its context (may be none).

    `owner`: who may use it (see `owner_of`). `namespace`: SGLang's `extra_key`, which keeps its
    prefix cache apart; None to share. `memo`: what the router wants to be told with a `Copy`.
    An `epoch` above that of a stream of the same id takes its place.
    """

    stream_id: str
    mode: Mode
    tokens: bytes
    idle_timeout_s: float
    epoch: int = 0
    owner: bytes = b""
    namespace: str | None = None
    memo: bytes = b""


class Append(Message, frozen=True, tag=True, array_like=True):
    """Chunk `seq` (1, 2, ... without gaps) of an append stream; `digest` tells repeats apart;
    `last`: the seal follows at once."""

    stream_id: str
    seq: int
    tokens: bytes
    digest: bytes
    epoch: int = 0
    owner: bytes = b""
    last: bool = False


class Update(Message, frozen=True, tag=True, array_like=True):
    """The whole context of an update stream as of `seq`, without the opening tokens.

    `memo`, if given, takes the place of the one before; `last`: the seal follows at once."""

    stream_id: str
    seq: int
    tokens: bytes
    digest: bytes
    epoch: int = 0
    owner: bytes = b""
    last: bool = False
    memo: bytes | None = None


class Abort(Message, frozen=True, tag=True, array_like=True):
    """Drops a stream, or ends its generation."""

    stream_id: str
    epoch: int = 0
    owner: bytes = b""


class Query(Message, frozen=True, tag=True, array_like=True):
    """Asks for a stream's `Status`."""

    stream_id: str
    owner: bytes = b""


class Fetch(Message, frozen=True, tag=True, array_like=True):
    """Asks for a `Copy` of a stream, as another router needs to serve it; `since`: the last
    number of which the asker has the tokens. `owner`: None for an admin, who sees all."""

    stream_id: str
    since: int = 0
    owner: bytes | None = b""


class Resync(Message, frozen=True, tag=True, array_like=True):
    """Asks for a `Snapshot`: a router has just come, or missed a report."""


class Configure(Message, frozen=True, tag=True, array_like=True):
    """Has a worker schedule otherwise from now on (see `policy.types`); refused while it has
    streams. For whoever compares policies on one running worker."""

    policy: PolicyName
    preemption: Preemption
    invalidation: Invalidation


class Accepted(Message, frozen=True, tag=True, array_like=True):
    """An event took effect, or had done so before. `tokens`: prompt length; `lcp`: of an update."""

    seq: int
    tokens: int
    lcp: int = 0


class Usage(Message, frozen=True, tag=True, array_like=True):
    """The counters of one stream, in tokens unless the name says otherwise (see the README).

    `early_kv_bytes`, `late_kv_bytes`: KV sent to the decode worker before and after the last
    forward. `preemptions`: how often its KV was given up for others.
    """

    chunks: int = 0
    updates: int = 0
    lcp_tokens: int = 0
    invalidated_tokens: int = 0
    computed_tokens: int = 0
    ready_tokens: int = 0
    early_kv_bytes: int = 0
    late_kv_bytes: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0


class Status(Message, frozen=True, tag=True, array_like=True):
    """A stream as its worker sees it. `seq`: the last one applied; `tokens`: prompt length;
    `held`, `saved`: the prefix whose KV is on the device, and in host memory; `place`: in the
    order in which streams are served, 0 for the first, None once it is out of that order."""

    stream_id: str
    mode: Mode
    state: State
    seq: int
    tokens: int
    usage: Usage
    held: int = 0
    saved: int = 0
    place: int | None = None


class Copy(Message, frozen=True, tag=True, array_like=True):
    """A stream as another router needs it.

    `opening`: the tokens before the context. `chunks`: the calls after `since` that hold the
    context, of an update stream the latest alone.
    """

    status: Status
    epoch: int
    opening: bytes
    chunks: list[tuple[int, bytes]]
    idle_timeout_s: float
    namespace: str | None
    memo: bytes
    owner: bytes = b""


class Report(Message, frozen=True, tag=True, array_like=True):
    """A worker's load and what has changed in its prefix cache.

    `seq` counts reports without gaps. `busy_s`: for how long it expects to answer nothing.
    `free_tokens`: KV that is free or can be evicted; `held_tokens`: KV of open streams, which
    gives way to full requests. `todo_tokens`: prompt tokens that are still to be computed, of
    streams and of requests; `running`, `queued`: requests. `tokens_per_s`: how fast it computes
    prompts, 0 if not known. `cached`, `evicted`: prefix blocks, 8 bytes each (`prefix_blocks`).
    """

    seq: int
    busy_s: float
    free_tokens: int
    held_tokens: int
    todo_tokens: int
    running: int
    queued: int
    open_streams: int
    tokens_per_s: float
    cached: bytes = b""
    evicted: bytes = b""


class Snapshot(Message, frozen=True, tag=True, array_like=True):
    """All prefix blocks that a worker has cached as of report `seq`."""

    seq: int
    cached: bytes


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
    epoch: int = 0

    def to_custom_params(self) -> dict[str, str]:
        return {SEAL_KEY: msgspec.json.encode(self).decode()}


Event = Open | Append | Update | Abort | Query | Fetch
Question = Hello | Resync | Configure | Event
Answer = Welcome | Accepted | Status | Copy | Snapshot | Refused
Said = Answer | Report

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_said = msgspec.msgpack.Decoder(Said).decode


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32 bytes. Raises OverflowError outside int32."""
    return array("i", tokens).tobytes()


def digest(tokens: bytes) -> bytes:
    """16 bytes that tell the contents of one event from another's."""
    return hashlib.blake2b(tokens, digest_size=16).digest()


def curve_keys(secret: str) -> tuple[bytes, bytes]:
    """The public and the secret CurveZMQ key of workers that share `secret` with their routers.

    The public key never travels, so only who knows the secret can reach such a worker (RFC 26).
    """
    import zmq  # not a dependency of the SDK, which needs the rest of this module
    from zmq.utils import z85

    derived = hashlib.blake2b(secret.encode(), digest_size=32, person=b"sglang-stream").digest()
    secret_key = z85.encode(derived)
    return zmq.curve_public(secret_key), secret_key


def prefix_blocks(tokens: bytes, namespace: str | None = None) -> list[bytes]:
    """Fingerprints, 8 bytes each, of the whole blocks of a prompt (`tokens`: little-endian int32).

    Each covers the prompt up to its end, so two prompts share a fingerprint only where they share
    all that is before it.

        tokens  |--- PREFIX_BLOCK ---|--- PREFIX_BLOCK ---|-- rest --|
                         blocks[0] ->|        blocks[1] ->|
    """
    running = hashlib.blake2b((namespace or "").encode(), digest_size=8)
    size = 4 * PREFIX_BLOCK
    blocks: list[bytes] = []
    for end in range(size, len(tokens) + 1, size):
        running.update(tokens[end - size : end])
        blocks.append(running.copy().digest())
    return blocks

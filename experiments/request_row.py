"""The rows of a load, the same from the runner and from the simulator; `kind` tells them apart.

    request   one request, from its arrival to its last token
    event     what happened to a request or on a worker at one time, for timelines
    cell      the load is over: without this row it was broken off

Times are seconds after the load began. `ttft_s` counts from `iterator_end_s`, when the iterator of
chunks has yielded its last one: with an open loop that is `last_chunk_s`, when it was due, unless
the sender was late.
"""

from __future__ import annotations

from typing import Literal

import msgspec

RequestMode = Literal["waiting", "streaming", "resend"]

WINDOW_S = 20.0  # of a worker's timeline


class LoadRow(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Which load a row is of. `machine`: name of the profile or of the machine. `stream_policy`:
    None unless streaming. `seed`: of the arrivals, so of the repetition."""

    source: Literal["engine", "simulator"]
    machine: str
    workload: str
    mode: RequestMode
    stream_policy: str | None
    placement: str | None
    qps: float
    seed: int


class RequestRow(LoadRow, frozen=True, kw_only=True, tag="request"):
    """One request of one load. A refused one has `failed` and no times after the seal.

    `cached_tokens`: prompt tokens found in the cache, 0 for waiting. Counters are those of
    `usage.stream`, None where the mode has none; but `chunks` are then the steps. `swapped_tokens`
    are the simulator's: an engine counts them for the cell.
    """

    query_id: str
    arrival_s: float
    last_chunk_s: float
    iterator_end_s: float | None = None
    seal_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    chunks: int | None = None
    updates: int | None = None
    lcp_tokens: int | None = None
    invalidated_tokens: int | None = None
    computed_tokens: int | None = None
    ready_tokens: int | None = None
    preemptions: int | None = None
    recomputed_tokens: int | None = None
    swapped_tokens: int | None = None
    failed: str | None = None


EventName = Literal[
    "chunk", "seal", "first_token", "end", "pass", "prefill", "decode", "preempt", "restore"
]


class EventRow(LoadRow, frozen=True, kw_only=True, tag="event"):
    """What happened at `t_s`, or from then on for `seconds`, to `query_id` or on `worker`.

    `chunk`, `seal`, `first_token`, `end`: of a request, seen by its client. `pass`: tokens of an
    open stream computed; `prefill`: those of a complete request; `decode`: a step, `tokens`
    requests; `preempt`: KV given up; `restore`: KV copied back.
    """

    what: EventName
    t_s: float
    seconds: float = 0.0
    tokens: int = 0
    query_id: str | None = None
    worker: str | None = None


class CellRow(LoadRow, frozen=True, kw_only=True, tag="cell"):
    """The end of one load. `makespan_s`: of the last answer; `counted`: what the workers counted
    meanwhile (see `bench.counters`)."""

    requests: int
    failed: int
    makespan_s: float
    counted: dict[str, int] = {}

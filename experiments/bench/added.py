"""What the router adds to a chunk and to the first token: calls through it and past it, in turn.

    chunk         POST .../chunks with 200 token ids      against the same `Append` over ZeroMQ
    first token   POST .../generate                       against the worker's own `/generate`

Each call finds an idle worker that has computed all that it was sent before, and each side has
streams of its own; who comes first changes from pair to pair.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Literal

from experiments.direct import DirectHttp, DirectWorker
from experiments.rows import Row
from sglang_stream.errors import EngineFailure

By = Literal["router", "worker"]

CHUNK_TOKENS = 200
TAIL_TOKENS = 16
ANSWER_TOKENS = 4
_CHUNKS_OF_A_STREAM = 20
_IDLE_TIMEOUT_S = 600
_QUIET_S = 0.02
_COMPUTED_S = 60.0
_TOKEN_IDS = range(300, 4000)
MAX_PAIRS = len(_TOKEN_IDS) // 4


class ThroughRouter:
    """A stream by the router's HTTP calls."""

    def __init__(self, http: DirectHttp) -> None:
        self._http = http
        body = {"mode": "append", "input_ids": [], "idle_timeout_s": _IDLE_TIMEOUT_S}
        self.id = str(http.call("POST", "/v1/streams", body)["id"])

    def append(self, seq: int, ids: Sequence[int]) -> None:
        body = {"seq": seq, "input_ids": list(ids)}
        self._http.call("POST", f"/v1/streams/{self.id}/chunks", body)

    def first_token_s(self, tail: Sequence[int]) -> float:
        body = {
            "input_ids": list(tail),
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        return self._http.first_event_s(f"/v1/streams/{self.id}/generate", body)

    def abort(self) -> None:
        self._http.call("DELETE", f"/v1/streams/{self.id}")


class PastRouter:
    """A stream by the worker's own calls."""

    def __init__(self, worker: DirectWorker) -> None:
        self._worker = worker
        self.id = f"st-{uuid.uuid4().hex}"
        worker.open(self.id, _IDLE_TIMEOUT_S)

    def append(self, seq: int, ids: Sequence[int]) -> None:
        self._worker.append(self.id, seq, ids)

    def first_token_s(self, tail: Sequence[int]) -> float:
        return self._worker.first_token_s(self.id, tail, ANSWER_TOKENS)

    def abort(self) -> None:
        self._worker.abort(self.id)


def measure(
    router_url: str,
    worker_url: str,
    pairs: int,
    seed: int,
    add: Callable[[Row], None],
    advance: Callable[[], None],
) -> None:
    """Gives one row for each call to `add`; `advance` hears of each pair.

    Raises EngineFailure if the worker does not compute what it is sent, and what it refuses with.
    """
    rng = random.Random(f"added/{seed}")
    with closing(DirectHttp(router_url)) as http, closing(DirectWorker(worker_url)) as worker:
        http.call("POST", "/flush_cache?timeout=60")  # else nothing would be computed
        contents = _Contents(rng)
        for kind, timed in (("chunk", _chunks), ("first token", _first_tokens)):
            for number, (by, seconds) in enumerate(timed(http, worker, pairs, contents)):
                row = {"bench": "router", "what": kind, "pair": number // 2, "by": by}
                add(row | {"seconds": seconds})
                if number % 2:
                    advance()


class _Contents:
    """Random token ids. No two chunks share their first one, so that no stream finds a token of
    another one cached: all that it is sent is counted as computed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._firsts = iter(rng.sample(_TOKEN_IDS, len(_TOKEN_IDS)))

    def chunk(self) -> list[int]:
        return [next(self._firsts), *self._rng.choices(_TOKEN_IDS, k=CHUNK_TOKENS - 1)]

    def tail(self) -> list[int]:
        return self._rng.choices(_TOKEN_IDS, k=TAIL_TOKENS)


def _chunks(
    http: DirectHttp, worker: DirectWorker, pairs: int, contents: _Contents
) -> Iterator[tuple[By, float]]:
    """Who did it and how long an append took, pair after pair."""
    for begin in range(0, pairs, _CHUNKS_OF_A_STREAM):
        streams = _both(http, worker)
        for number in range(begin, min(begin + _CHUNKS_OF_A_STREAM, pairs)):
            seq = number - begin + 1
            for by in _turn(number):
                ids = contents.chunk()
                began = time.perf_counter()
                streams[by].append(seq, ids)
                yield by, time.perf_counter() - began
                _let_compute(worker, streams[by].id)
        for stream in streams.values():
            stream.abort()


def _first_tokens(
    http: DirectHttp, worker: DirectWorker, pairs: int, contents: _Contents
) -> Iterator[tuple[By, float]]:
    """Who did it and how long the first token of a computed stream took, pair after pair."""
    for number in range(pairs):
        streams = _both(http, worker)
        for stream in streams.values():
            stream.append(1, contents.chunk())
            _let_compute(worker, stream.id)
        for by in _turn(number):
            yield by, streams[by].first_token_s(contents.tail())
            time.sleep(_QUIET_S)


def _both(http: DirectHttp, worker: DirectWorker) -> dict[By, ThroughRouter | PastRouter]:
    return {"router": ThroughRouter(http), "worker": PastRouter(worker)}


def _turn(number: int) -> tuple[By, By]:
    return ("worker", "router") if number % 2 else ("router", "worker")


def _let_compute(worker: DirectWorker, stream_id: str) -> None:
    """Waits until all whole pages of a stream are computed and the worker sleeps again."""
    deadline = time.monotonic() + _COMPUTED_S
    while True:
        time.sleep(_QUIET_S)
        status = worker.status(stream_id)
        if status.usage.computed_tokens >= status.tokens - status.tokens % worker.page_size:
            break
        if time.monotonic() > deadline:
            raise EngineFailure(f"{status.tokens} tokens were not computed in {_COMPUTED_S:g} s")
    time.sleep(_QUIET_S)

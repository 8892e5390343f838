"""One cell on a running server: warm-up, empty caches, then all requests at their times, whether
earlier ones are answered or not (an open loop)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence, Set
from contextlib import suppress
from typing import Any, TypeVar

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from experiments.bench.counters import counted_since, read_counters
from experiments.cells import Cell
from experiments.client import empty_caches
from experiments.replay.clients import LoadClient, Timed
from experiments.request_row import CellRow, EventName, EventRow, LoadRow, RequestRow
from experiments.workload.contents import VOCABULARY, Contents
from experiments.workload.shapes import Arrived, Document, Query, Step
from sglang_stream.errors import EngineFailure, InvalidRequest, StreamError, WorkerUnavailable
from sglang_stream.policy import PolicyName

T = TypeVar("T")

WATCH_S = 2.0
_MISSES = 5  # in a row, after which a server is taken for dead
_WARMING = (10, 50, 95)  # percentiles of a load's prompts
_WARM_ROUNDS = 2
_CALL_TIMEOUT_S = 90.0
_PASSES = "sglang_stream_passes_total"


async def require_policies(url: str, policies: Set[PolicyName]) -> None:
    """Raises InvalidRequest if the metrics page of a worker behind a router says that it serves
    streams by a policy that is none of these."""
    async with httpx.AsyncClient(base_url=url, timeout=_CALL_TIMEOUT_S, trust_env=False) as http:
        for worker in await _worker_urls(http):
            page = await http.get(f"{worker}/metrics", follow_redirects=True)
            served = {
                sample.labels["policy"]
                for family in text_string_to_metric_families(page.text if page.is_success else "")
                for sample in family.samples
                if sample.name == _PASSES and "policy" in sample.labels
            }
            if served and served.isdisjoint(policies):
                raise InvalidRequest(
                    f"{worker} serves streams by {', '.join(sorted(served))}: cells.policies has "
                    f"{', '.join(sorted(policies))}, name what it was started with",
                    param="cells.policies",
                )


async def replay_load(
    url: str,
    cell: Cell,
    load: Sequence[Arrived],
    contents: Contents,
    output_tokens: int,
    described: dict[str, Any],
    add: Callable[[LoadRow], None],
    advance: Callable[[], None],
    *,
    events: bool = False,
    watch_s: float = WATCH_S,
) -> None:
    """Gives one row for each request to `add` as it ends, then one for the cell.

    `described`: the fields of `LoadRow` that the cell does not know. `events`: rows of what each
    client saw, too. Raises WorkerUnavailable if the server dies, EngineFailure if it answers no
    request at all or its caches cannot be emptied, InvalidRequest if it is no router.
    """
    keys = described | {
        "mode": cell.mode,
        "stream_policy": cell.policy,
        "placement": cell.placement,
        "qps": cell.qps,
        "seed": cell.seed,
    }
    async with (
        httpx.AsyncClient(base_url=url, timeout=_CALL_TIMEOUT_S, trust_env=False) as http,
        LoadClient(url, contents, output_tokens) as client,
    ):
        workers = await _worker_urls(http)
        await _watched(http, _warm_up(url, cell, load, output_tokens), watch_s)
        await empty_caches(http)
        before = _counters_of(workers)
        began = time.perf_counter()

        async def one(arrived: Arrived) -> RequestRow:
            row = await _request_row(client, cell, arrived, began, keys)
            add(row)
            for event in events_of(arrived, row, keys) if events else ():
                add(event)
            advance()
            return row

        rows = await _watched(http, _all([one(arrived) for arrived in load]), watch_s)
        if not await _is_alive(http):
            raise _died(http)
        refused = [row.failed for row in rows if row.failed is not None]
        if len(refused) == len(rows):
            raise EngineFailure(
                f"{cell.name}: no request was answered; the first says: {refused[0]}"
            )
        end_s = max(row.end_s for row in rows if row.end_s is not None)
        await empty_caches(http)
        counted = counted_since(before, _counters_of(workers))
        add(
            CellRow(
                **keys,
                requests=len(rows),
                failed=len(refused),
                makespan_s=end_s,
                counted=counted,
            )
        )


def _counters_of(workers: Sequence[str]) -> dict[str, float]:
    """The counters of all workers together; none where they were started without metrics."""
    total: dict[str, float] = {}
    for worker in workers:
        with suppress(httpx.HTTPStatusError):
            for name, value in read_counters(worker).items():
                total[name] = total.get(name, 0.0) + value
    return total


def events_of(arrived: Arrived, row: RequestRow, keys: dict[str, Any]) -> Iterator[EventRow]:
    """What the client of a request saw: each step when it was due, and the times of its row."""

    def event(what: EventName, t_s: float, tokens: int = 0) -> EventRow:
        return EventRow(**keys, what=what, t_s=t_s, tokens=tokens, query_id=row.query_id)

    query = arrived.query
    for step in query.steps:
        tokens = sum(document.tokens for document in step.documents)
        yield event("chunk", arrived.at_s + step.at_s, tokens)
    times: tuple[tuple[EventName, float | None], ...] = (
        ("seal", row.seal_s),
        ("first_token", row.first_token_s),
        ("end", row.end_s),
    )
    for what, t_s in times:
        if t_s is not None:
            yield event(what, t_s)


async def _request_row(
    client: LoadClient, cell: Cell, arrived: Arrived, began: float, keys: dict[str, Any]
) -> RequestRow:
    query = arrived.query
    row = RequestRow(
        **keys,
        query_id=query.query_id,
        arrival_s=arrived.at_s,
        last_chunk_s=arrived.at_s + query.last_chunk_s,
        chunks=len(query.steps),
    )
    try:
        timed = await client.ask(cell.mode, arrived, began)
        if timed.usage["prompt_tokens"] != query.prompt_tokens:
            raise EngineFailure(
                f"the prompt had {timed.usage['prompt_tokens']} tokens in place of "
                f"{query.prompt_tokens}"
            )
    except StreamError as e:
        return msgspec.structs.replace(row, failed=e.message)
    except httpx.HTTPError as e:  # the connection broke in the middle of the answer
        return msgspec.structs.replace(row, failed=f"{type(e).__name__}: {e}")
    return msgspec.structs.replace(row, **_told(timed, began))


def _told(timed: Timed, began: float) -> dict[str, Any]:
    """What an answer adds to its row."""
    counters = timed.usage.get("stream") or {}
    names = set(RequestRow.__struct_fields__) & set(counters)
    return {name: counters[name] for name in names} | {
        "iterator_end_s": timed.iterator_end_s - began,
        "seal_s": timed.seal_s - began,
        "first_token_s": timed.first_token_s - began,
        "end_s": timed.end_s - began,
        "ttft_s": timed.first_token_s - timed.iterator_end_s,
        "prompt_tokens": timed.usage["prompt_tokens"],
        "output_tokens": timed.usage["completion_tokens"],
        "cached_tokens": timed.cached_tokens,
    }


async def _warm_up(url: str, cell: Cell, load: Sequence[Arrived], output_tokens: int) -> None:
    """Prompts of several of the load's lengths, with tokens that it does not have, one by one."""
    mode = load[0].query.mode
    sizes = sorted(arrived.query.prompt_tokens for arrived in load)
    async with LoadClient(url, _Noise(), output_tokens) as client:
        for number, percent in enumerate(_WARMING * _WARM_ROUNDS):
            tokens = sizes[(len(sizes) - 1) * percent // 100]
            first, second = (Document(f"{number}/{i}", -(-tokens // 2)) for i in range(2))
            last = (first, second) if mode == "update" else (second,)
            query = Query(f"warm-up {number}", mode, (Step(0.0, (first,)), Step(0.0, last)))
            await client.ask(cell.mode, Arrived(0.0, query), time.perf_counter())


class _Noise:
    """Random tokens, the same for the same document."""

    def opening(self, query: Query) -> list[int]:
        return []

    def document(self, document: Document) -> list[int]:
        return random.Random(f"warm-up {document.id}").choices(VOCABULARY, k=document.tokens)

    def question(self, query: Query) -> list[int]:
        return []


async def _all(requests: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all give; when this is cancelled it waits until they have taken back what they began."""
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:  # each once: a second time would break off the taking back
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]


async def _watched(http: httpx.AsyncClient, work: Awaitable[T], watch_s: float) -> T:
    """What `work` gives. Raises WorkerUnavailable if the server does not live to see it."""
    task = asyncio.ensure_future(work)
    misses = 0
    try:
        while True:
            await asyncio.wait({task}, timeout=watch_s)
            if task.done():
                return task.result()
            misses = 0 if await _is_alive(http) else misses + 1
            if misses == _MISSES:
                raise _died(http)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, StreamError, httpx.HTTPError):
            await task


def _died(http: httpx.AsyncClient) -> WorkerUnavailable:
    return WorkerUnavailable(
        f"{http.base_url} does not answer any more: see its log, and run the same command again "
        "to go on"
    )


async def _is_alive(http: httpx.AsyncClient) -> bool:
    """Not so if it refuses connections or has no worker; a busy server may be slow to answer."""
    try:
        return (await http.get("/readiness")).status_code != httpx.codes.SERVICE_UNAVAILABLE
    except httpx.TimeoutException:
        return True
    except httpx.TransportError:
        return False


async def _worker_urls(http: httpx.AsyncClient) -> list[str]:
    answer = await http.get("/workers")
    if not answer.is_success:
        raise InvalidRequest(
            f"{http.base_url}workers answers {answer.status_code}: give the address of a router, "
            "started by `sglang-stream serve` or `sglang-stream router`",
            param="--base-url",
        )
    return [str(worker["url"]) for worker in answer.json()["workers"]]

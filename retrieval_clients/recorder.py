"""Recording what a retrieval client yields, and yielding it again with its timings.

async for text in stream_chat(record(crawl(urls), file, "q1", question, "append"), ...):
    ...
(trace,) = recorded_traces(file)
async for text in stream_chat(replay(trace, delay=10), ...):
    ...
"""

from __future__ import annotations

import hashlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from pathlib import Path
from typing import Any, TypeVar

import anyio

from retrieval_clients.traces import Trace, TraceDocument, TraceMode, TraceStep, write_trace

Item = TypeVar("Item")
Piece = dict[str, str]


async def record(
    items: AsyncIterable[Item],
    path: Path,
    query_id: str,
    query: str,
    mode: TraceMode,
    now: Callable[[], float] = anyio.current_time,
) -> AsyncGenerator[Item, None]:
    """Yields `items` as they are, and adds them to `path` as a trace when they end.

    An item is what the SDK takes: a text, a mapping with `text`, an object with `page_content` (and
    perhaps an `id`) or, in update mode, an iterable of these. Times count from when the first item
    is asked for; the consumer should take items at once, as the SDK does, since an item is there
    only when it is asked for. A retrieval that fails, is left early or brings nothing leaves no
    trace. Raises TypeError for other items.
    """
    began = now()
    steps: list[TraceStep] = []
    try:
        async for item in items:
            parts = _list(item) if mode == "update" else [item]
            steps.append(TraceStep(now() - began, tuple(map(_document, parts))))
            yield item
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
    if steps:
        write_trace(path, Trace(query_id, query, mode, tuple(steps)))


async def replay(
    trace: Trace,
    delay: float = 1.0,
    now: Callable[[], float] = anyio.current_time,
    sleep_until: Callable[[float], Awaitable[object]] = anyio.sleep_until,
) -> AsyncGenerator[Piece | list[Piece], None]:
    """Yields the documents of a trace, or its lists, at their times multiplied by `delay`.

    A document is a mapping with `id` and `text`. Times count from when the first one is asked for;
    a consumer that comes late gets at once what is due.
    """
    began = now()
    for at_s, documents in trace.steps:
        await sleep_until(began + at_s * delay)
        pieces: list[Piece] = [{"id": d.id, "text": d.text} for d in documents]
        if trace.mode == "update":
            yield pieces
        else:
            for piece in pieces:
                yield piece


def _list(item: object) -> list[Any]:
    if isinstance(item, Iterable) and not isinstance(item, (str, bytes, Mapping)):
        return list(item)
    raise TypeError(f"an update is a list of documents, not of type {type(item).__name__}")


def _document(item: Any) -> TraceDocument:
    """What the SDK would take the item as; without an `id` it is known by its content."""
    text: object
    name: object
    if isinstance(item, str):
        text, name = item, None
    elif isinstance(item, Mapping):
        text, name = item.get("text"), item.get("id")
    else:
        text, name = getattr(item, "page_content", None), getattr(item, "id", None)
    if not isinstance(text, str):
        raise TypeError(
            f"a document is a text, a mapping with 'text' or an object with page_content, not of "
            f"type {type(item).__name__}"
        )
    if name is None:
        name = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    return TraceDocument(str(name), text)

"""What other libraries retrieve or write, as chunks for `stream_chat`.

    stream_chat(langchain_chunks(question, dense, keyword), question)      # LangChain retrievers
    stream_chat(llama_index_chunks(question, dense, keyword), question)    # LlamaIndex retrievers
    stream_chat(model_chunks(first_model_stream), "Check this answer.")    # another model's tokens

None of these libraries is imported: an object counts by the methods it has.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from typing import Any, cast

import anyio

Chunk = dict[str, str]
Retrieve = Callable[[str], Awaitable[Iterable[Any]]]


def langchain_chunks(query: str, *retrievers: Any) -> AsyncGenerator[Chunk, None]:
    """The documents of LangChain retrievers, those of each as soon as it has answered.

    A retriever has `ainvoke` or, before LangChain 0.2, `aget_relevant_documents`; one with
    `get_relevant_documents` alone is called in a thread. A text that several find comes once.
    What a retriever raises is raised after the documents that came before, and ends the others.
    Raises TypeError for what is no retriever.
    """
    names = ("ainvoke", "aget_relevant_documents")
    calls = [_retrieve_with(r, names, "get_relevant_documents") for r in retrievers]
    return _as_they_answer(query, calls, _langchain_chunk)


def llama_index_chunks(query: str, *retrievers: Any) -> AsyncGenerator[Chunk, None]:
    """The nodes of LlamaIndex retrievers (`aretrieve`, or `retrieve` in a thread), as above."""
    calls = [_retrieve_with(r, ("aretrieve",), "retrieve") for r in retrievers]
    return _as_they_answer(query, calls, _llama_index_chunk)


async def model_chunks(
    events: AsyncIterable[Any], chars: int = 400, seconds: float = 0.5
) -> AsyncGenerator[str, None]:
    """The text that another model is writing, in pieces that are worth a prefill.

    `events`: texts, or the events of an OpenAI-compatible stream (chat or plain completions, as
    objects or mappings), of which the first choice counts. A chunk is yielded once `chars`
    characters or what came in `seconds` are together. It ends before a space where it can, so that
    words stay whole for the tokenizer. Leaving early closes `events`.
    """
    iterator = aiter(events)
    text = ""
    due = 0.0
    event: asyncio.Task[Any] | None = None
    try:
        while True:
            if event is None:
                event = asyncio.create_task(_next(iterator))
            await asyncio.wait({event}, timeout=max(0.0, due - time.monotonic()) if text else None)
            if event.done():
                piece = _text_of(event.result())
                event = None
                if piece is None:
                    break
                if piece and not text:
                    due = time.monotonic() + seconds
                text += piece
            if text and (len(text) >= chars or time.monotonic() >= due):
                ready, text = _at_a_space(text)
                due = time.monotonic() + seconds
                yield ready
        if text:
            yield text
    finally:
        if event is not None:
            await _cancel(event)
        await _close(iterator, events)


def _retrieve_with(retriever: Any, names: Iterable[str], blocking: str) -> Retrieve:
    """The first of these asynchronous methods that there is, or the blocking one in a thread."""
    for name in names:
        if (method := getattr(retriever, name, None)) is not None:
            return cast(Retrieve, method)
    method = getattr(retriever, blocking, None)
    if method is None:
        raise TypeError(
            f"{type(retriever).__name__} is no retriever: it has none of "
            f"{', '.join((*names, blocking))}"
        )
    return lambda query: asyncio.to_thread(method, query)


async def _as_they_answer(
    query: str, calls: Iterable[Retrieve], chunk_of: Callable[[Any], Chunk]
) -> AsyncGenerator[Chunk, None]:
    seen: set[str] = set()

    async def ask(call: Retrieve) -> Iterable[Any]:
        return await call(query)

    tasks = [asyncio.create_task(ask(call)) for call in calls]
    try:
        for answered in asyncio.as_completed(tasks):
            for chunk in map(chunk_of, await answered):
                if chunk["text"] not in seen:
                    seen.add(chunk["text"])
                    yield chunk
    finally:
        await _cancel(*tasks)


def _langchain_chunk(document: Any) -> Chunk:
    name = getattr(document, "id", None)
    return _chunk(None if name is None else str(name), document.page_content)


def _llama_index_chunk(found: Any) -> Chunk:
    """Of a NodeWithScore; its text without the metadata that LlamaIndex would add for a model."""
    return _chunk(found.node.node_id, found.node.get_content())


def _chunk(name: str | None, text: str) -> Chunk:
    return {"text": text} if name is None else {"id": name, "text": text}


async def _next(iterator: AsyncIterator[Any]) -> Any:
    """The next event, or None at the end."""
    return await anext(iterator, None)


def _text_of(event: Any) -> str | None:
    """The new text of an event, "" if it brings none (usage, a role); None for the end."""
    if event is None or isinstance(event, str):
        return event
    choices = _field(event, "choices") or ()
    choice = next((c for c in choices if not _field(c, "index")), None)
    delta = _field(choice, "delta")
    text = _field(choice, "text") if delta is None else _field(delta, "content")
    return text if isinstance(text, str) else ""


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _at_a_space(text: str) -> tuple[str, str]:
    """What to send, and what to keep: a word that may go on, with the space before it."""
    kept = max(text.rfind(" "), text.rfind("\n"))
    return (text[:kept], text[kept:]) if kept > 0 else (text, "")


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Ends tasks and waits for that, also where the caller is being cancelled itself."""
    with anyio.CancelScope(shield=True):
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(*opened: Any) -> None:
    """Closes generators (`aclose`) and streams of the OpenAI client (`close`)."""
    with anyio.CancelScope(shield=True):
        for one in opened:
            close = getattr(one, "aclose", None) or getattr(one, "close", None)
            closing = close() if close is not None else None
            if inspect.isawaitable(closing):
                await closing

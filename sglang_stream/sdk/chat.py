"""`stream_chat` and what it returns.

The asynchronous side is the implementation. The synchronous one runs it in an event loop of its
own thread while the caller's iterable is pulled in the caller's thread: sending goes on during a
wait for the next item, and the iterable stays where its connections and its Ctrl-C belong.
"""

from __future__ import annotations

import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, overload

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from sglang_stream.messages import Mode
from sglang_stream.sdk.answer import Usage
from sglang_stream.sdk.client import AsyncStreamClient
from sglang_stream.sdk.plan import Order, Plan
from sglang_stream.sdk.request import StreamedRequest


class _Result:
    """What both kinds of stream tell about their request; all None before it is known."""

    def __init__(self, request: StreamedRequest) -> None:
        self._request = request

    @property
    def usage(self) -> Usage | None:
        """Tokens used and, in `usage.stream`, what streaming did; known at the end."""
        return self._request.answer.usage

    @property
    def t0(self) -> float | None:
        """When the iterable yielded its last item, by `time.perf_counter` (seconds)."""
        return self._request.t0

    @property
    def sealed_at(self) -> float | None:
        """When all of the context was sent and the answer asked for, by `time.perf_counter`."""
        return self._request.sealed_at

    @property
    def first_token_at(self) -> float | None:
        """When the first token was received, by `time.perf_counter` (seconds)."""
        return self._request.first_token_at

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from `t0` to `first_token_at`, in seconds."""
        if self.t0 is None or self.first_token_at is None:
            return None
        return self.first_token_at - self.t0

    def _completion(self) -> dict[str, Any]:
        if not self._request.finished:
            raise RuntimeError("the stream was closed before its end: there is no completion")
        return self._request.answer.completion()


class Stream(_Result, Iterator[str]):
    """The pieces of an answer, once over. Nothing is sent before the first one is asked for.

    As a context manager it drops the request and closes the caller's generator when left early;
    so does the end of a `for` loop that holds the only reference.
    """

    def __init__(self, request: StreamedRequest, source: Iterable[Any]) -> None:
        super().__init__(request)
        # The generator knows nothing of this object: no cycle keeps it alive after a `break`.
        self._pieces = _in_own_loop(request, source)

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the request, at the server too. Without effect after the end."""
        self._pieces.close()

    def get_final_completion(self) -> dict[str, Any]:
        """Reads to the end; the whole answer as one OpenAI completion. RuntimeError if closed."""
        for _ in self:
            pass
        return self._completion()


class AsyncStream(_Result, AsyncIterator[str]):
    """`Stream` for asynchronous code; the iterable is pulled in the task that asks for text."""

    def __init__(self, request: StreamedRequest, source: AsyncIterable[Any]) -> None:
        super().__init__(request)
        self._pieces: AsyncGenerator[str, None] = request.pieces(source)

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the request, at the server too. Without effect after the end."""
        await self._pieces.aclose()

    async def get_final_completion(self) -> dict[str, Any]:
        """Reads to the end; the whole answer as one OpenAI completion. RuntimeError if closed."""
        async for _ in self:
            pass
        return self._completion()


@overload
def stream_chat(
    chunks_iter: AsyncIterable[Any], question: str | None = None, **options: Any
) -> AsyncStream: ...
@overload
def stream_chat(
    chunks_iter: Iterable[Any], question: str | None = None, **options: Any
) -> Stream: ...
def stream_chat(
    chunks_iter: Iterable[Any] | AsyncIterable[Any],
    question: str | None = None,
    *,
    base_url: str = "http://localhost:30000",
    mode: Mode = "append",
    order: Order = "relevance",
    messages: Sequence[Mapping[str, Any]] | None = None,
    prompt: str | None = None,
    input_ids: Sequence[int] | None = None,
    preamble: str | None = None,
    question_ids: Sequence[int] | None = None,
    model: str | None = None,
    api_key: str | None = None,
    idle_timeout_s: float | None = None,
    timeout: float = 600.0,
    max_retries: int = 5,
    transport: httpx.AsyncBaseTransport | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    extra_body: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> Stream | AsyncStream:
    """Asks `question` over a context that is still arriving; the answer's text comes in pieces.

    `chunks_iter` yields the context: in append mode texts (taken verbatim), documents (mappings
    with `text` and perhaps `id`, or objects with `page_content`) or sequences of token ids; in
    update mode lists of documents, each of which replaces the one before. An asynchronous
    iterable gives an `AsyncStream`, any other a `Stream`.

    `messages` (system and history), `prompt` or `input_ids` open the prompt; without any of them
    it is a chat of one user message: `preamble`, context, question. `order` "sticky" keeps
    documents that stay in the list where they are in the prompt. `timeout` (seconds) bounds each
    wait for the next tokens. Further OpenAI sampling fields are sent as they are.

    Raises ValueError for arguments without a meaning; the rest is raised while iterating:
    TypeError for an item of another kind, what the iterable raises, and `StreamError`.
    """
    if isinstance(chunks_iter, (str, bytes)):
        raise TypeError("chunks_iter is one text: give an iterable of chunks, [text] for example")
    fields = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": stop,
        "seed": seed,
        **sampling,
    }
    plan = Plan(
        mode=mode,
        question=question,
        question_ids=question_ids,
        messages=messages,
        prompt=prompt,
        input_ids=input_ids,
        preamble=preamble,
        order=order,
        model=model,
        idle_timeout_s=idle_timeout_s,
        sampling={k: v for k, v in fields.items() if v is not None} | dict(extra_body or {}),
    )

    def connect() -> AsyncStreamClient:
        return AsyncStreamClient(
            base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            transport=transport,
        )

    request = StreamedRequest(plan, connect)
    if isinstance(chunks_iter, AsyncIterable):
        return AsyncStream(request, chunks_iter)
    return Stream(request, chunks_iter)


def _in_own_loop(request: StreamedRequest, source: Iterable[Any]) -> Generator[str, None, None]:
    """Runs the request in a loop of its own; leaving at any point cancels it and waits for that."""
    with start_blocking_portal(name="sglang-stream") as portal:
        texts: SimpleQueue[str | None] = SimpleQueue()

        async def forward() -> None:
            async for text in request.pieces(None):
                texts.put(text)

        done: Future[None] = portal.start_task_soon(forward)
        done.add_done_callback(lambda _: texts.put(None))
        _push(request, source, portal, done)
        while (text := texts.get()) is not None:
            yield text
        done.result()


def _push(
    request: StreamedRequest, source: Iterable[Any], portal: BlockingPortal, done: Future[None]
) -> None:
    """Hands the iterable's items over as they come, until its end or the request's failure."""
    iterator = iter(source)
    try:
        for item in iterator:
            at = time.perf_counter()
            if done.done():
                return
            portal.call(request.accept, item, at)
        portal.call(request.end, time.perf_counter())
    finally:
        if isinstance(iterator, Generator):
            iterator.close()

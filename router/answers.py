"""Serving answers that take a while, and noticing when their client is gone.

Starlette tells of a client that vanished only to who waits for it, so an `AdmittedAnswer` runs
beside a task that does: waiting for a slot, for the first token, and sending all end with the
connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Response
from starlette.types import Receive, Scope, Send

from router.admission import Admission
from router.errors_http import error_response, json_response
from router.generation import Generation
from router.openai_format import AnswerFormat
from router.sse import DONE, sse_event
from sglang_stream.errors import StreamError

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` until it is done or the client is gone; the request's body was read before."""
    working = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, gone):
            task.cancel()
        results = await asyncio.gather(working, gone, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


class AdmittedAnswer(Response):
    """The answer that `make` makes, once there is a slot for it; it holds the slot until it was
    sent. A client that leaves gives up its place in the queue."""

    def __init__(self, admission: Admission, make: Callable[[], Awaitable[Response]]) -> None:
        super().__init__()
        self._admission = admission
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            try:
                async with self._admission.slot():
                    answer = await self._make()
                    await answer(scope, receive, send)
            except StreamError as e:
                await error_response(e)(scope, receive, send)

        await while_connected(receive, work)


class GenerationAnswer(Response):
    """The answer to a generate call: server-sent events, or one object when all is generated.

    An error before the first byte is an ordinary error answer; later it is the last event.
    """

    def __init__(
        self, generation: Generation, form: AnswerFormat, *, stream: bool, include_usage: bool
    ) -> None:
        super().__init__()
        self._generation = generation
        self._form = form
        self._stream = stream
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation.attached():
            try:
                await self._generation.started()
                if self._stream:
                    await self._send_events(send)
                    return
                answer = await self._whole()
            except StreamError as e:
                answer = error_response(e)
            await answer(scope, receive, send)
            self._generation.delivered |= answer.status_code == 200

    async def _whole(self) -> Response:
        texts: list[str] = []
        ids: list[int] = []
        async for piece in self._generation.pieces():
            texts.append(piece.text)
            ids += piece.ids
        assert self._generation.outcome is not None
        return json_response(self._form.completion("".join(texts), ids, self._generation.outcome))

    async def _send_events(self, send: Send) -> None:
        start = Response(headers=SSE_HEADERS, media_type="text/event-stream")
        del start.headers["content-length"]
        headers = start.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        first = True
        try:
            async for piece in self._generation.pieces():
                if first or piece.text or piece.ids:
                    await _send_body(send, sse_event(self._form.chunk(piece, first)))
                    self._generation.delivered = True
                    first = False
        except StreamError as e:
            await _send_body(send, sse_event({"error": e.to_fields()}), last=True)
            return
        outcome = self._generation.outcome
        assert outcome is not None
        end = sse_event(self._form.last_chunk(outcome))
        if self._include_usage:
            end += sse_event(self._form.usage_chunk(outcome))
        await _send_body(send, end + DONE, last=True)


async def _send_body(send: Send, body: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

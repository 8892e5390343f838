"""Ordinary OpenAI calls, passed to the worker and back as they are, but for the shape of errors."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from router.answers import while_connected
from router.errors_http import error_response
from router.legs import ROOMS
from router.worker import Worker
from sglang_stream.errors import BodyTooLarge, StreamError, WorkerUnavailable, from_fields

# Of one connection only (RFC 9110, 7.6.1), or written anew by the client or the server here.
_NOT_PASSED = frozenset(
    (
        *(
            "connection",
            "keep-alive",
            "proxy-authenticate",
            "proxy-authorization",
            "proxy-connection",
        ),
        *("te", "trailer", "transfer-encoding", "upgrade", "expect"),
        *("host", "content-length", "date", "server"),
    )
)


@dataclass(frozen=True)
class Route:
    """Where an ordinary call goes. `worker` answers it; `prefill` computes its prompt first."""

    worker: Worker
    prefill: Worker | None = None


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises BodyTooLarge as soon as more than `limit` bytes are known of."""
    error = BodyTooLarge(f"the body is over {limit} bytes: send less at a time")
    if int(request.headers.get("content-length", 0)) > limit:
        raise error
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise error
        parts.append(part)
    return b"".join(parts)


class ForwardedAnswer(Response):
    """The worker's answer to `request`, whose body was read already.

    It is passed on piece by piece; a client that leaves ends the call in the worker. On workers
    apart the prefill worker gets the same call; its failure ends the answer that is waited for.
    """

    def __init__(
        self, http: httpx.AsyncClient, route: Route, request: Request, body: bytes
    ) -> None:
        super().__init__()
        self._http = http
        self._route = route
        self._request = request
        if route.prefill is not None:
            body = with_bootstrap(body, route.prefill)
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            prefilling = asyncio.create_task(self._prefill())
            try:
                answer = await self._answer(prefilling)
                try:
                    await _pass_on(answer, send)
                finally:
                    await answer.aclose()
            except StreamError as e:
                await error_response(e)(scope, receive, send)
            finally:
                prefilling.cancel()
                await asyncio.gather(prefilling, return_exceptions=True)

        await while_connected(receive, work)

    async def _answer(self, prefilling: asyncio.Task[None]) -> httpx.Response:
        """The beginning of the answer. Raises the error of whichever call fails first."""
        calling = asyncio.create_task(self._send(self._route.worker, stream=True))
        try:
            await asyncio.wait({calling, prefilling}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                prefilling.result()
            return await calling
        except BaseException:
            calling.cancel()
            raise

    async def _prefill(self) -> None:
        """The same call on the prefill worker, which answers when the KV has gone."""
        if self._route.prefill is None:
            return
        answer = await self._send(self._route.prefill, stream=False)
        if answer.is_error:
            raise from_fields(_error_fields(answer.content), status=answer.status_code)

    async def _send(self, worker: Worker, *, stream: bool) -> httpx.Response:
        request = self._request
        query = f"?{request.url.query}" if request.url.query else ""
        call = self._http.build_request(
            request.method,
            f"{worker.url}{request.url.path}{query}",
            headers=[(k, v) for k, v in request.headers.items() if _passed(k)],
            content=self._body,
        )
        try:
            return await self._http.send(call, stream=stream)
        except httpx.TransportError as e:
            raise WorkerUnavailable(
                f"the worker at {worker.url} cannot be reached "
                f"({type(e).__name__}: {e}): try again",
                retry_after=1,
            ) from e


def with_bootstrap(body: bytes, prefill: Worker) -> bytes:
    """The body of an ordinary call with where and under which room number its KV is handed over.

    A call with several prompts, or `n` answers, is several requests with a room each, as SGLang's
    own gateway does it. What cannot be read is left to the worker's error.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return body
    prompt = fields.get("prompt")
    host, port = prefill.host, prefill.info.bootstrap_port
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        fields["bootstrap_host"] = [host] * len(prompt)
        fields["bootstrap_port"] = [port] * len(prompt)
        fields["bootstrap_room"] = [secrets.randbelow(ROOMS) for _ in prompt]
    else:
        fields |= {
            "bootstrap_host": host,
            "bootstrap_port": port,
            "bootstrap_room": secrets.randbelow(ROOMS),
        }
    return msgspec.json.encode(fields)


async def _pass_on(answer: httpx.Response, send: Send) -> None:
    headers = [(k.lower(), v) for k, v in answer.headers.raw if _passed(k.decode("latin-1"))]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    if answer.is_error:
        body = b"".join([part async for part in answer.aiter_raw()])
        await send({"type": "http.response.body", "body": _in_openai_shape(body)})
        return
    async for part in answer.aiter_raw():
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _error_fields(body: bytes) -> dict[str, Any]:
    """What stands under "error" in an answer of a worker's."""
    try:
        fields = msgspec.json.decode(_in_openai_shape(body), type=dict[str, Any])
    except msgspec.DecodeError:
        fields = {}
    error = fields.get("error")
    return error if isinstance(error, dict) else {"message": body[:500].decode(errors="replace")}


def _in_openai_shape(body: bytes) -> bytes:
    """The body of an error, with the object around it that SGLang leaves out in most."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return body
    if "error" in fields or "message" not in fields:
        return body
    fields.pop("object", None)
    return msgspec.json.encode({"error": fields})


def _passed(header: str) -> bool:
    return header.lower() not in _NOT_PASSED

"""Ordinary OpenAI calls, passed to the worker and back as they are, but for the shape of errors."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from router.answers import while_connected
from router.errors_http import error_response
from sglang_stream.errors import BodyTooLarge, ModelNotFound, WorkerUnavailable

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

    It is passed on piece by piece; a client that leaves ends the call in the worker.
    """

    def __init__(
        self, http: httpx.AsyncClient, worker_url: str, request: Request, body: bytes
    ) -> None:
        super().__init__()
        self._http = http
        self._worker_url = worker_url
        self._call = http.build_request(
            request.method,
            forwarded_url(worker_url, request),
            headers=[(k, v) for k, v in request.headers.items() if _passed(k)],
            content=body,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            try:
                answer = await self._http.send(self._call, stream=True)
            except httpx.TransportError as e:
                error = WorkerUnavailable(
                    f"the worker at {self._worker_url} cannot be reached "
                    f"({type(e).__name__}: {e}): try again",
                    retry_after=1,
                )
                await error_response(error)(scope, receive, send)
                return
            try:
                await _pass_on(answer, send)
            finally:
                await answer.aclose()

        await while_connected(receive, work)


def forwarded_url(worker_url: str, request: Request) -> httpx.URL:
    """The URL of a call at the worker: path and query as the client wrote them.

    Raises ModelNotFound for a path with `..` or with characters that belong encoded: the worker
    would be asked for another one. Only a model's name can have them, other paths are fixed.
    """
    target: bytes = request.scope["raw_path"]
    if request.url.query:
        target += b"?" + request.scope["query_string"]
    try:
        url = httpx.URL(worker_url).copy_with(raw_path=target)
    except (httpx.InvalidURL, UnicodeDecodeError):
        url = None
    if url is None or url.raw_path != target:
        raise ModelNotFound("no model has this name: GET /v1/models lists those there are")
    return url


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

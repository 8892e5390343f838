"""Ordinary OpenAI calls, passed to the worker and back as they are, but for the shape of errors."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from router.backoff import RetryBudget, RetryPolicy
from router.errors_http import error_response
from router.legs import ROOMS
from router.worker import Worker
from sglang_stream.errors import (
    BodyTooLarge,
    Malformed,
    ModelNotFound,
    StreamError,
    WorkerUnavailable,
    from_fields,
)

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
        "authorization",  # the key is the router's
    )
)


@dataclass(frozen=True)
class Route:
    """Where an ordinary call goes. `worker` answers it; `prefill` computes its prompt first."""

    worker: Worker
    prefill: Worker | None = None

    @property
    def workers(self) -> list[Worker]:
        return [self.worker] if self.prefill is None else [self.worker, self.prefill]


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

    `place` says where the call goes, and again where it goes instead when that worker cannot be
    reached, as often as `retries` and `budget` allow; it takes at most `timeout_s` until the answer
    begins. The answer is passed on piece by piece. On workers apart the prefill worker gets the
    same call; its failure ends the answer that is waited for. `namespace`: see `messages.Open`.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        request: Request,
        body: bytes,
        *,
        place: Callable[[], Awaitable[Route]],
        namespace: str | None,
        retries: RetryPolicy,
        budget: RetryBudget,
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._http = http
        self._request = request
        self._body = body
        self._place = place
        self._namespace = namespace
        self._retries = retries
        self._budget = budget
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._answer() as answer:
                await _pass_on(answer, send)
        except StreamError as e:
            await error_response(e)(scope, receive, send)

    @asynccontextmanager
    async def _answer(self) -> AsyncIterator[httpx.Response]:
        """The beginning of an answer, from the first worker that gives one."""
        self._budget.request(time.monotonic())
        prefilling: asyncio.Task[None] | None = None
        answer: httpx.Response | None = None
        try:
            with _at_most(self._timeout_s):
                for attempt in itertools.count(1):
                    route = await self._place()
                    body = addressed(self._body, route, self._namespace)
                    prefilling = asyncio.create_task(self._prefill(route, body))
                    try:
                        answer = await self._begin(route, body, prefilling)
                        break
                    except WorkerUnavailable:
                        await _ended(prefilling)
                        if attempt > self._retries.max_retries:
                            raise
                        if not self._budget.may_retry(time.monotonic()):
                            raise
                    await asyncio.sleep(self._retries.delay_s(attempt, random.random))
            assert answer is not None
            yield answer
        finally:
            if prefilling is not None:
                await _ended(prefilling)
            if answer is not None:
                await answer.aclose()

    async def _begin(
        self, route: Route, body: bytes, prefilling: asyncio.Task[None]
    ) -> httpx.Response:
        """The beginning of the answer. Raises the error of whichever call fails first."""
        calling = asyncio.create_task(self._send(route.worker, body, stream=True))
        watching = [asyncio.create_task(w.wait_gone()) for w in route.workers]
        waiting = {calling, prefilling, *watching}
        try:
            while not calling.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {calling}:
                    task.result()
            return calling.result()
        except BaseException:
            await _ended(calling)
            if not calling.cancelled() and calling.exception() is None:
                await calling.result().aclose()  # it came just when the client left
            raise
        finally:
            for task in watching:
                await _ended(task)

    async def _prefill(self, route: Route, body: bytes) -> None:
        """The same call on the prefill worker, which answers when the KV has gone."""
        if route.prefill is None:
            return
        answer = await self._send(route.prefill, body, stream=False)
        if answer.is_error:
            raise from_fields(_error_fields(answer.content), status=answer.status_code)

    async def _send(self, worker: Worker, body: bytes, *, stream: bool) -> httpx.Response:
        request = self._request
        call = self._http.build_request(
            request.method,
            forwarded_url(worker.url, request),
            headers=[(k, v) for k, v in request.headers.items() if _passed(k)],
            content=body,
        )
        with worker.counted():
            try:
                return await self._http.send(call, stream=stream)
            except httpx.TransportError as e:
                raise WorkerUnavailable(
                    f"the worker at {worker.url} cannot be reached "
                    f"({type(e).__name__}: {e}): try again",
                    retry_after=1,
                ) from e


def check_object(body: bytes) -> None:
    """Raises Malformed unless the body is a JSON object; for others SGLang answers 500."""
    try:
        msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as e:
        raise Malformed(f"the body must be a JSON object: {e}") from None


def addressed(body: bytes, route: Route, namespace: str | None) -> bytes:
    """The body of an ordinary call with where and under which room number its KV is handed over,
    and with the caller's namespace.

    A call with several prompts is several requests with a room each, as SGLang's own gateway does
    it.
    """
    if route.prefill is None and namespace is None:
        return body
    fields = msgspec.json.decode(body, type=dict[str, Any])
    if namespace is not None:
        # At the end, where no salt of a client's can imitate another caller's.
        given = fields.get("extra_key")
        if isinstance(given, list):
            fields["extra_key"] = [f"{key or ''}{namespace}" for key in given]
        else:
            fields["extra_key"] = f"{given or ''}{namespace}"
    if route.prefill is not None:
        fields |= _meeting(fields.get("prompt"), route.prefill)
    return msgspec.json.encode(fields)


def _meeting(prompt: Any, prefill: Worker) -> dict[str, Any]:
    host, port = prefill.host, prefill.info.bootstrap_port
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return {
            "bootstrap_host": [host] * len(prompt),
            "bootstrap_port": [port] * len(prompt),
            "bootstrap_room": [secrets.randbelow(ROOMS) for _ in prompt],
        }
    return {
        "bootstrap_host": host,
        "bootstrap_port": port,
        "bootstrap_room": secrets.randbelow(ROOMS),
    }


@contextmanager
def _at_most(timeout_s: float) -> Iterator[None]:
    try:
        with anyio.fail_after(timeout_s):
            yield
    except TimeoutError:
        raise WorkerUnavailable(
            f"no answer began within --request-timeout-secs ({timeout_s:g} s)"
        ) from None


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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

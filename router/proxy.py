"""Ordinary OpenAI calls, passed to the worker and back as they are, but for the shape of errors.

attempt --first byte of the body--> the client gets it as it comes --ends--> done
   | worker lost, or a failure of its      `-- fails: an error event, or a broken connection
   `-- another attempt, on a worker that has not failed if there is one
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from router.backoff import RetryBudget, RetryPolicy
from router.description import lost
from router.errors_http import error_response
from router.events import http_error
from router.legs import ROOMS
from router.sse import sse_event
from router.worker import Worker
from sglang_stream.errors import (
    BodyTooLarge,
    EngineFailure,
    Malformed,
    ModelNotFound,
    StreamError,
    WorkerUnavailable,
)

logger = logging.getLogger(__name__)

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


_Take = Callable[[httpx.Response], Awaitable[None]]


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

    `place` says where the call goes, and where it goes instead when workers have failed, as often
    as `retries` and `budget` allow; `alone` whether there is one worker only, which is not asked
    again when it has failed. The answer is passed on piece by piece, and takes at most `timeout_s`.
    On workers apart the prefill worker gets the same call; its failure ends the answer that is
    waited for. `namespace`: see `messages.Open`.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        request: Request,
        body: bytes,
        *,
        place: Callable[[set[Worker]], Awaitable[Route]],
        alone: Callable[[], bool],
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
        self._alone = alone
        self._namespace = namespace
        self._retries = retries
        self._budget = budget
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = _Passing(send)
        try:
            await self._in_time(passing)
        except StreamError as e:
            if passing.begun:
                logger.warning("%s broke off: %s", self._request.url.path, e.message)
                await passing.break_off(e)
            else:
                await error_response(e)(scope, receive, send)

    async def _in_time(self, passing: _Passing) -> None:
        try:
            await asyncio.wait_for(self._answer(passing), self._timeout_s)
        except asyncio.TimeoutError:
            raise WorkerUnavailable(
                f"the answer took longer than --request-timeout-secs ({self._timeout_s:g} s)"
            ) from None

    async def _answer(self, passing: _Passing) -> None:
        """The answer of the first worker that begins one."""
        self._budget.request(time.monotonic())
        failed: set[Worker] = set()
        for attempt in itertools.count(1):
            route = await self._place(failed)
            try:
                await self._attempt(route, passing, failed)
                return
            except (WorkerUnavailable, EngineFailure) as e:
                if passing.begun or attempt > self._retries.max_retries:
                    raise
                if isinstance(e, EngineFailure) and self._alone():
                    raise
                if not self._budget.may_retry(time.monotonic()):
                    raise
                logger.warning("%s: %s; trying again", self._request.url.path, e.message)
            await asyncio.sleep(self._retries.delay_s(attempt, random.random))

    async def _attempt(self, route: Route, passing: _Passing, failed: set[Worker]) -> None:
        """The answer of one worker. Raises the error of whichever call fails first, and after the
        first byte that of the answer; who fails joins `failed`."""
        body = addressed(self._body, route, self._namespace)
        if route.prefill is None:
            await self._call(route.worker, body, passing.take, failed)
            return
        answering = asyncio.create_task(self._call(route.worker, body, passing.take, failed))
        prefilling = asyncio.create_task(self._call(route.prefill, body, _read, failed))
        try:
            await asyncio.wait({answering, prefilling}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not passing.begun:
                prefilling.result()
            await answering
        finally:
            await _ended(answering, prefilling)

    async def _call(self, worker: Worker, body: bytes, take: _Take, failed: set[Worker]) -> None:
        """One call to one worker, which ends when that is lost; `take` reads its answer."""
        with worker.counted(failed):
            calling = asyncio.create_task(self._send(worker, body, take))
            watching = asyncio.create_task(worker.wait_gone())
            try:
                await asyncio.wait({calling, watching}, return_when=asyncio.FIRST_COMPLETED)
                await (calling if calling.done() else watching)
            finally:
                await _ended(calling, watching)

    async def _send(self, worker: Worker, body: bytes, take: _Take) -> None:
        request = self._request
        url = forwarded_url(worker.url, request)
        headers = [(k, v) for k, v in request.headers.items() if _passed(k)]
        try:
            async with self._http.stream(
                request.method, url, headers=headers, content=body
            ) as answer:
                if answer.is_server_error:
                    raise http_error(answer.status_code, await answer.aread())
                await take(answer)
        except httpx.TransportError as e:
            raise lost(worker.url, e) from e


class _Passing:
    """The way of an answer to the client, which begins with the first byte of its body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._are_events = False
        self._between_events = True
        self.begun = False

    async def take(self, answer: httpx.Response) -> None:
        """Passes an answer on as it comes; that of an error in OpenAI's shape."""
        if answer.is_error:
            body = b"".join([part async for part in answer.aiter_raw()])
            await self._pass_on(answer, _in_openai_shape(body))
        else:
            async for part in answer.aiter_raw():
                await self._pass_on(answer, part)
        await self._pass_on(answer, b"", last=True)

    async def break_off(self, error: StreamError) -> None:
        """Ends server-sent events with one of the error. Any other body stays without its end,
        for which the server closes the connection."""
        if self._are_events:
            event = sse_event({"error": error.to_fields()})
            await self._send_body(event if self._between_events else b"\n\n" + event, last=True)

    async def _pass_on(self, answer: httpx.Response, part: bytes, *, last: bool = False) -> None:
        if not self.begun:
            self._are_events = answer.headers.get("content-type", "").startswith(
                "text/event-stream"
            )
            headers = [
                (k.lower(), v) for k, v in answer.headers.raw if _passed(k.decode("latin-1"))
            ]
            start = {"type": "http.response.start", "status": answer.status_code}
            await self._send(start | {"headers": headers})
            self.begun = True
        await self._send_body(part, last=last)
        self._between_events = part.endswith(b"\n\n")

    async def _send_body(self, body: bytes, *, last: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})


async def _read(answer: httpx.Response) -> None:
    """Reads the answer of a prefill worker, which ends when the KV has gone. Raises its error."""
    content = await answer.aread()
    if answer.is_error:
        raise http_error(answer.status_code, content)


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


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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

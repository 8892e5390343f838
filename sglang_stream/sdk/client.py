"""The HTTP calls of a stream, each repeated while that is harmless and may help.

Repeated: a lost connection, a time-out, 429, 502, 503 and 504, after `Retry-After` or a random,
doubling pause. Sequence numbers and request ids make a repeat harmless; only `open` may leave a
second stream behind, which the server drops after its idle time-out.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any

import anyio
import httpx
import msgspec
from httpx_sse import EventSource, SSEError

from sglang_stream.errors import EngineFailure, StreamError, WorkerUnavailable, from_fields
from sglang_stream.sdk.outbox import TEXTS_FIELDS, Call

CALL_TIMEOUT_S = 30.0
"""For the answer to everything but a generation; a call that is answered at once in health."""

CONNECT_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 2.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
_OWN_404 = ("model_not_found", "stream_not_found")
_PASSING = (429, 502, 503, 504)

_encode = msgspec.json.Encoder().encode


class NoStreamsHere(Exception):
    """The server has no `/v1/streams`: a plain OpenAI-compatible one."""


class AsyncStreamClient:
    """The stream calls of one server. An async context manager; nothing is sent on entering it.

    `base_url`: with or without a final `/v1`. `timeout` (seconds) bounds every wait for the next
    bytes of a generation, the first ones included. `max_retries`: repeats of one call.
    `transport`: httpx's seam, for tests and for servers in the same process.

    Every call raises a `StreamError` for an error answer and `WorkerUnavailable` when no answer
    came.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.max_retries = max_retries
        self._generation_wait_s = timeout
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            # A retriever may be silent for long; the connection should be warm when it ends.
            limits=httpx.Limits(keepalive_expiry=120.0),
            transport=transport,
        )

    async def __aenter__(self) -> AsyncStreamClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def open(self, body: Mapping[str, Any]) -> str:
        """Opens a stream and returns its id. Raises NoStreamsHere for a server without streams."""
        response = await self._send("POST", "/v1/streams", body, passing=(404, 405))
        if not response.is_success:
            error = _error_fields(response)
            if error.get("code") not in _OWN_404:
                raise NoStreamsHere(self.base_url)
            raise from_fields(error, status=response.status_code)
        return str(self._decoded(response.content)["id"])

    async def append(self, stream_id: str, call: Call) -> dict[str, Any]:
        """Sends chunks: `{"seq", "tokens"}`."""
        return await self.json(
            "POST", f"/v1/streams/{stream_id}/chunks", call.body(TEXTS_FIELDS["append"])
        )

    async def update(self, stream_id: str, call: Call) -> dict[str, Any]:
        """Sets the whole context: `{"seq", "tokens", "lcp"}`."""
        return await self.json(
            "PUT", f"/v1/streams/{stream_id}/context", call.body(TEXTS_FIELDS["update"])
        )

    async def abort(self, stream_id: str) -> None:
        """Drops the stream, or ends its generation. One try, no error: what is missed expires."""
        with suppress(httpx.HTTPError):
            url = f"{self.base_url}/v1/streams/{stream_id}"
            await self._http.delete(url, timeout=ABORT_TIMEOUT_S)

    async def events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a generation (`/v1/streams/{id}/generate` or an ordinary call), parsed.

        Raises httpx.TransportError when the connection is lost before the final `[DONE]`.
        """
        response = await self._send("POST", path, body, wait_s=self._generation_wait_s, stream=True)
        try:
            async with aclosing(EventSource(response).aiter_sse()) as events:
                async for event in events:
                    if event.data == "[DONE]":
                        return
                    yield self._decoded(event.data)
            raise httpx.RemoteProtocolError("the answer ended before [DONE]")
        except SSEError as e:
            raise EngineFailure(
                f"{self.base_url}{path} did not answer with an event stream: {e}"
            ) from e
        finally:
            await response.aclose()

    async def json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One call and its JSON answer."""
        response = await self._send(method, path, body)
        return self._decoded(response.content)

    async def pause(self, attempt: int, wanted_s: float | None = None) -> None:
        """Waits before repeat `attempt` (from 0): `wanted_s`, or a random time that doubles."""
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
        await anyio.sleep(random.uniform(0, longest) if wanted_s is None else wanted_s)

    def unreachable(self, error: httpx.TransportError) -> WorkerUnavailable:
        """What the user reads when no answer came."""
        return WorkerUnavailable(
            f"no answer from {self.base_url} ({type(error).__name__}: {error}): check the address "
            "and that the server runs, then send the request again"
        )

    def _decoded(self, content: bytes | str) -> dict[str, Any]:
        try:
            return msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.DecodeError as e:
            raise EngineFailure(
                f"{self.base_url} answered with something else than a JSON object ({e}): check "
                "that base_url is the address of an sglang-stream router"
            ) from e

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        wait_s: float = CALL_TIMEOUT_S,
        stream: bool = False,
        passing: tuple[int, ...] = (),
    ) -> httpx.Response:
        """The answer to one call: a success, or a status in `passing`."""
        for attempt in range(self.max_retries + 1):
            request = self._http.build_request(
                method,
                self.base_url + path,
                content=None if body is None else _encode(body),
                headers={"Content-Type": "application/json"},
                timeout=httpx.Timeout(wait_s, connect=CONNECT_TIMEOUT_S),
            )
            wanted_s = None
            try:
                response = await self._http.send(request, stream=stream)
                if response.is_success or response.status_code in passing:
                    return response
                error = await _error_of(response)
                wanted_s = error.retry_after
                last = attempt == self.max_retries or (wanted_s or 0) > LONGEST_PAUSE_S
                if last or response.status_code not in _PASSING:
                    raise error
            except httpx.UnsupportedProtocol as e:
                raise self.unreachable(e) from e
            except httpx.TransportError as e:
                if attempt == self.max_retries:
                    raise self.unreachable(e) from e
            await self.pause(attempt, wanted_s)
        raise AssertionError("unreachable: the last attempt returns or raises")


async def _error_of(response: httpx.Response) -> StreamError:
    """The error that an answer describes; the connection is given back."""
    try:
        await response.aread()
    finally:
        await response.aclose()
    return from_fields(_error_fields(response), status=response.status_code)


def _error_fields(response: httpx.Response) -> dict[str, Any]:
    """What stands under "error", completed for answers of other shapes."""
    try:
        answer = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        answer = None
    fields = answer.get("error", answer) if isinstance(answer, dict) else None
    if not isinstance(fields, dict):
        fields = {}
    if not isinstance(fields.get("message"), str):
        reason = fields.get("detail") or response.text[:500] or response.reason_phrase
        fields = {**fields, "message": f"{response.status_code} from the server: {reason}"}
    seconds = response.headers.get("Retry-After", "")
    if fields.get("retry_after") is None and seconds.isdecimal():
        fields = {**fields, "retry_after": int(seconds)}
    return fields

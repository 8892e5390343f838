"""One worker as the router sees it: found, greeted, watched, asked and made to generate.

look for it -> Welcome, tokenizer loaded -> ready --no process, another worker id--> look again
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import zmq.asyncio

from router.link import Link
from router.sse import sse_data
from sglang_stream.errors import EngineFailure, StreamError, WorkerUnavailable, from_fields
from sglang_stream.messages import Accepted, Event, Query, Status

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class WorkerInfo:
    """What a ready worker is. `context_len`: prompt and answer together, in tokens.

    `incremental`: whether each event of its answers holds the new tokens only, or all so far.
    `server`: SGLang's own description of the server.
    """

    worker_id: str
    model: str
    context_len: int
    vocab_size: int
    incremental: bool
    server: dict[str, Any]


class MetaInfo(msgspec.Struct):
    """`meta_info` of SGLang's answers, as far as it is used."""

    finish_reason: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class WorkerEvent(msgspec.Struct):
    """One event of a worker's answer (sglang/srt/managers/tokenizer_manager.py)."""

    text: str | None = None
    output_ids: msgspec.Raw = msgspec.Raw(b"[]")
    meta_info: MetaInfo = msgspec.field(default_factory=MetaInfo)
    error: dict[str, Any] | None = None


_decode_event = msgspec.json.Decoder(WorkerEvent).decode


class Worker:
    """The client of one worker.

    `on_found` is awaited with each worker found at `url`, before it counts as ready; an error of
    it is the reason why the worker is not ready. `question_timeout_s` bounds a ZeroMQ question,
    `heartbeat_s` is the time between two heartbeats, also between two tries to find a worker.
    """

    def __init__(
        self,
        url: str,
        http: httpx.AsyncClient,
        on_found: Callable[[WorkerInfo], Awaitable[None]],
        *,
        question_timeout_s: float = 25.0,
        heartbeat_s: float = 1.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._http = http
        self._on_found = on_found
        self._question_timeout_s = question_timeout_s
        self._heartbeat_s = heartbeat_s
        self._link: Link | None = None
        self._info: WorkerInfo | None = None
        self._reason = f"the worker at {self.url} has not been reached yet"

    @property
    def info(self) -> WorkerInfo:
        """The worker that is ready. Raises WorkerUnavailable with the reason why none is."""
        if self._info is None:
            raise WorkerUnavailable(self._reason, retry_after=1)
        return self._info

    def check_ready(self) -> None:
        """Raises WorkerUnavailable unless the worker was found and its scheduler answers."""
        _ = self.info
        assert self._link is not None
        silent_s = time.monotonic() - self._link.heard_s
        if silent_s > self._question_timeout_s:
            raise WorkerUnavailable(
                f"the scheduler of the worker at {self.url} has been silent for {silent_s:.0f} s"
            )

    async def run(self) -> None:
        """Finds the worker and watches it, for ever."""
        context = zmq.asyncio.Context()
        try:
            while True:
                try:
                    await self._connect(context)
                    await self._watch()
                except StreamError as e:
                    self._disconnect(e.message)
                except Exception as e:
                    # An answer that no known worker gives, a model's files that do not load.
                    logger.exception("the worker at %s cannot be used", self.url)
                    self._disconnect(f"the worker at {self.url} cannot be used: {e!r}")
                await asyncio.sleep(self._heartbeat_s)
        finally:
            self._disconnect("the router is stopping")
            context.term()

    async def ask(self, event: Event) -> Accepted:
        """The worker's answer to an event that changes a stream; see `Link.ask`."""
        answer = await self._live_link().ask(event)
        if not isinstance(answer, Accepted):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")
        return answer

    async def status(self, stream_id: str) -> Status:
        """The stream as the worker sees it; see `Link.ask`."""
        answer = await self._live_link().ask(Query(stream_id))
        if not isinstance(answer, Status):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")
        return answer

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[WorkerEvent]:
        """The events of one `/generate` call. Closing the iterator aborts it in the worker.

        Raises the error that the worker reports, WorkerUnavailable if the connection fails.
        """
        try:
            async with self._http.stream(
                "POST",
                f"{self.url}/generate",
                content=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status_code != 200:
                    raise _http_error(response.status_code, await response.aread())
                async for data in sse_data(response.aiter_bytes()):
                    if data == b"[DONE]":
                        return
                    event = _decode_event(data)
                    _raise_failure(event)
                    yield event
        except httpx.TransportError as e:
            raise self._lost(e) from e
        except msgspec.DecodeError as e:
            raise EngineFailure(f"the worker's answer cannot be read: {e}") from e

    async def flush_cache(self, query: str) -> str | None:
        """Empties the worker's prefix cache; what went wrong, None if nothing.

        `query`: the call's query string, for SGLang's own options.
        """
        try:
            answer = await self._http.post(f"{self.url}/flush_cache?{query}")
        except httpx.TransportError as e:
            return self._lost(e).message
        return None if answer.is_success else answer.text.strip() or f"status {answer.status_code}"

    def _live_link(self) -> Link:
        _ = self.info
        assert self._link is not None
        return self._link

    def _lost(self, error: httpx.TransportError) -> WorkerUnavailable:
        return WorkerUnavailable(
            f"the connection to the worker at {self.url} failed ({type(error).__name__}: {error})"
        )

    async def _connect(self, context: zmq.asyncio.Context) -> None:
        await self._get("/health")  # SGLang answers 503 until it is warm
        server = await self._get("/server_info")
        stream_support = (server.get("internal_states") or [{}])[0].get("sglang_stream")
        if not stream_support:
            raise WorkerUnavailable(
                f"the worker at {self.url} runs without stream support: start it with "
                "`sglang-stream worker`"
            )
        card = (await self._get("/v1/models"))["data"][0]
        link = Link(context, stream_support["endpoint"], self._question_timeout_s)
        try:
            welcome = await link.hello()
            link.grant(welcome.credits)
            info = WorkerInfo(
                worker_id=welcome.worker_id,
                model=card["id"],
                context_len=card["max_model_len"],
                vocab_size=welcome.vocab_size,
                incremental=bool(server.get("incremental_streaming_output")),
                server=server,
            )
            await self._on_found(info)
        except BaseException:
            link.close(self._reason)
            raise
        self._link, self._info = link, info
        logger.info("worker %s at %s is ready: %s", info.worker_id, self.url, info.model)

    async def _watch(self) -> None:
        """Returns never: raises WorkerUnavailable when this worker is gone."""
        info, link = self.info, self._live_link()
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                welcome = await link.hello(timeout_s=max(self._heartbeat_s, 1.0))
            except WorkerUnavailable:
                await self._check_process()  # its scheduler may be busy with a long forward
                continue
            if welcome.worker_id != info.worker_id:
                raise WorkerUnavailable(f"the worker at {self.url} was started anew: try again")

    async def _check_process(self) -> None:
        """Raises WorkerUnavailable if nothing listens any more; slow is not gone."""
        try:
            await self._http.get(f"{self.url}/model_info", timeout=_PROBE_TIMEOUT_S)
        except httpx.TimeoutException:
            return
        except httpx.TransportError as e:
            raise self._lost(e) from e

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            answer = await self._http.get(self.url + path, timeout=_PROBE_TIMEOUT_S)
        except httpx.ConnectError as e:
            raise WorkerUnavailable(f"there is no worker at {self.url} ({e})") from e
        except httpx.TransportError as e:
            raise self._lost(e) from e
        if not answer.is_success:
            raise WorkerUnavailable(
                f"the worker at {self.url} is not ready: {path} answered {answer.status_code}"
            )
        return msgspec.json.decode(answer.content, type=dict[str, Any]) if answer.content else {}

    def _disconnect(self, reason: str) -> None:
        if reason != self._reason:
            logger.warning("%s", reason)
        self._reason = reason
        if self._link is not None:
            self._link.close(reason)
        self._link = self._info = None


def _raise_failure(event: WorkerEvent) -> None:
    """Raises the error that an event reports, if it does."""
    if event.error is not None:
        code = event.error.get("code")
        raise from_fields(event.error, status=code if isinstance(code, int) else 500)
    reason = event.meta_info.finish_reason
    if reason is None or reason.get("type") != "abort":
        return
    refusal = reason.get("sglang_stream_error")
    if refusal is not None:
        raise from_fields(msgspec.json.decode(refusal, type=dict[str, Any]))
    message = f"the engine aborted the generation: {reason.get('message')}"
    raise from_fields({"message": message}, status=int(reason.get("status_code") or 500))


def _http_error(status: int, body: bytes) -> StreamError:
    """The error in an answer of SGLang's HTTP server."""
    try:
        answer = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        answer = {}
    fields = answer.get("error", answer)
    if not isinstance(fields, dict) or "message" not in fields:
        fields = {"message": f"the worker answered {status}: {body[:500].decode(errors='replace')}"}
    return from_fields(fields, status=status)

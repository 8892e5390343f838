"""Who asks: one request of a load in one of the modes, by the SDK's own client.

    waiting    all steps awaited, then one ordinary request
    resend     an ordinary request with what has come, for one token, whenever there is something
               new and the one before is answered; then as waiting, on the cache that they left
    streaming  `stream_chat` over an iterator that yields each step when it is due

All requests go over one pool of connections. Times are seconds of `perf_counter`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from experiments.pacing import until
from experiments.request_row import RequestMode
from experiments.workload.contents import Contents
from experiments.workload.shapes import Arrived, Document, Query
from sglang_stream import stream_chat
from sglang_stream.errors import EngineFailure, InvalidRequest
from sglang_stream.sdk.answer import Answer
from sglang_stream.sdk.client import AsyncStreamClient

TIMEOUT_S = 600.0
_UNLIMITED = httpx.Limits(
    max_connections=None, max_keepalive_connections=None, keepalive_expiry=120.0
)


@dataclass(frozen=True)
class Timed:
    """One answer. `iterator_end_s`: when the last step came; `usage`: as the server tells it."""

    iterator_end_s: float
    seal_s: float
    first_token_s: float
    end_s: float
    usage: dict[str, Any]

    @property
    def cached_tokens(self) -> int:
        """SGLang tells them only where there are some."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


class LoadClient:
    """The requests of one load to one server. `output_tokens`: of each answer."""

    def __init__(self, url: str, contents: Contents, output_tokens: int) -> None:
        self._url = url
        self._contents = contents
        self._output_tokens = output_tokens
        self._transport = _SharedTransport()
        self._plain = AsyncStreamClient(url, timeout=TIMEOUT_S, transport=self._transport)

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._transport.close()

    async def ask(self, mode: RequestMode, arrived: Arrived, began: float) -> Timed:
        """One request of a load that began at `began`. Raises StreamError if it is refused."""
        at_s = began + arrived.at_s
        await until(at_s)
        match mode:
            case "waiting":
                return await self._wait(arrived.query, at_s)
            case "resend":
                return await self._resend(arrived.query, at_s)
            case "streaming":
                return await self._stream(arrived.query, at_s)

    async def plain(self, prompt: list[int], output_tokens: int, came_s: float) -> Timed:
        """One ordinary greedy request; the last of its prompt came at `came_s`."""
        body = {
            "model": "default",
            "prompt": prompt,
            "max_tokens": output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
        }
        called_s = time.perf_counter()
        first_token_s = 0.0
        answer = Answer()
        async with aclosing(self._plain.events("/v1/completions", body)) as events:
            async for event in events:
                answer.add(event)
                if answer.has_token and not first_token_s:
                    first_token_s = time.perf_counter()
        usage = answer.completion().get("usage") or {}
        return _checked(Timed(came_s, called_s, first_token_s, time.perf_counter(), usage))

    async def _wait(self, query: Query, at_s: float) -> Timed:
        prompt = self._prompt(query, len(query.steps), whole=True)
        await until(at_s + query.last_chunk_s)
        return await self.plain(prompt, self._output_tokens, time.perf_counter())

    async def _resend(self, query: Query, at_s: float) -> Timed:
        steps, sent = query.steps, 0
        prompt = self._prompt(query, len(steps), whole=True)
        while True:
            await until(at_s + steps[sent].at_s)
            sent = sum(at_s + step.at_s <= time.perf_counter() for step in steps)
            if sent == len(steps):
                return await self.plain(prompt, self._output_tokens, at_s + query.last_chunk_s)
            await self.plain(self._prompt(query, sent), 1, at_s)

    async def _stream(self, query: Query, at_s: float) -> Timed:
        async with stream_chat(
            self._steps(query, at_s),
            base_url=self._url,
            mode=query.mode,
            input_ids=self._contents.opening(query),
            question_ids=self._contents.question(query),
            idle_timeout_s=TIMEOUT_S,
            timeout=TIMEOUT_S,
            transport=self._transport,
            max_tokens=self._output_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        ) as stream:
            completion = await stream.get_final_completion()
        usage = completion.get("usage") or {}
        if not usage.get("stream"):
            raise InvalidRequest(f"{self._url} has no streams: start it with `sglang-stream serve`")
        assert stream.t0 is not None
        assert stream.sealed_at is not None
        return _checked(
            Timed(
                stream.t0,
                stream.sealed_at,
                stream.first_token_at or 0.0,
                time.perf_counter(),
                usage,
            )
        )

    async def _steps(self, query: Query, at_s: float) -> AsyncIterator[list[int]]:
        """The tokens of each step when it is due."""
        for step in query.steps:
            ids = self._ids(step.documents)
            await until(at_s + step.at_s)
            yield ids

    def _prompt(self, query: Query, steps: int, *, whole: bool = False) -> list[int]:
        """All tokens after so many steps, with the question if it is the `whole` prompt."""
        question = self._contents.question(query) if whole else []
        return [*self._contents.opening(query), *self._ids(query.context(steps)), *question]

    def _ids(self, documents: tuple[Document, ...]) -> list[int]:
        return [i for document in documents for i in self._contents.document(document)]


def _checked(timed: Timed) -> Timed:
    if not timed.first_token_s:
        raise EngineFailure("an answer without a token")
    return timed


class _SharedTransport(httpx.AsyncBaseTransport):
    """One pool of connections for many clients, of which each closes what it was given."""

    def __init__(self) -> None:
        self._pool = httpx.AsyncHTTPTransport(limits=_UNLIMITED)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._pool.handle_async_request(request)

    async def close(self) -> None:
        await self._pool.aclose()

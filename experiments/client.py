"""Measured calls. Time to first token is taken at the client, in seconds of `perf_counter`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import aconnect_sse

from sglang_stream import StreamUsage, stream_chat
from sglang_stream.errors import EngineFailure, from_fields

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Answer:
    """One measured answer. `ttft_s`: from `t0` to its first token; `cached_tokens`: of its prompt,
    as the engine reports it (None for a streamed one, whose `usage` has `ready_tokens`)."""

    ttft_s: float
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    cached_tokens: int | None = None
    usage: StreamUsage | None = None


class MeasuredClient:
    """Calls to one server over a warm connection."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._http = httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S)

    async def __aenter__(self) -> MeasuredClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._http.__aexit__(*details)

    async def flush(self) -> None:
        """Empties the cache. Raises EngineFailure if streams or requests are in the way."""
        await empty_caches(self._http)

    async def plain(
        self, prompt: Sequence[int], max_tokens: int, t0: float | None = None
    ) -> Answer:
        """One ordinary greedy request; `t0` defaults to the moment of the call."""
        if t0 is None:
            t0 = time.perf_counter()
        body = {
            "model": "default",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        first = 0.0
        tokens: list[int] = []
        cached = 0
        async with aconnect_sse(self._http, "POST", "/v1/completions", json=body) as events:
            if events.response.status_code != 200:
                fields = (await events.response.aread()).decode(errors="replace")
                raise from_fields({"message": fields}, status=events.response.status_code)
            async for event in events.aiter_sse():
                if event.data == "[DONE]":
                    break
                fields = event.json()
                if "error" in fields:
                    raise from_fields(fields["error"])
                if fields["choices"] and not first:
                    first = time.perf_counter()
                tokens += [t for c in fields["choices"] for t in c.get("token_ids") or ()]
                details = (fields.get("usage") or {}).get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens", cached)
        return Answer(first - t0, tuple(prompt), tuple(tokens), cached_tokens=cached)

    async def streamed(self, chunks: AsyncIterable[Any], max_tokens: int, **request: Any) -> Answer:
        """One greedy streamed request; `request` as for `stream_chat`."""
        body = {"return_token_ids": True, "ignore_eos": True, **request.pop("extra_body", {})}
        async with stream_chat(
            chunks,
            base_url=self.base_url,
            max_tokens=max_tokens,
            temperature=0,
            extra_body=body,
            **request,
        ) as stream:
            completion = await stream.get_final_completion()
        assert stream.ttft_s is not None
        assert stream.usage is not None
        return Answer(
            stream.ttft_s,
            tuple(completion["prompt_token_ids"]),
            tuple(completion["choices"][0]["token_ids"]),
            usage=stream.usage.stream,
        )


async def empty_caches(http: httpx.AsyncClient) -> None:
    """Empties those of a server's workers, by a client of that server.

    Raises EngineFailure if streams or requests are in the way.
    """
    listed = await http.get("/v1/streams")
    if listed.status_code != 200:
        raise EngineFailure(f"the open streams are not told: {listed.text}")
    open_streams = listed.json()["data"]
    response = await http.post("/flush_cache", params={"timeout": 60})
    if open_streams or response.status_code != 200:
        raise EngineFailure(
            f"the cache is not empty: {len(open_streams)} open streams, {response.text}"
        )

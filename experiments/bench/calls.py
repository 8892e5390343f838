"""Greedy requests by token ids to our router, many at once over one client, with their times."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from experiments.client import empty_caches
from sglang_stream.errors import EngineFailure, from_fields

_TIMEOUT_S = 600.0
_IDLE_TIMEOUT_S = 600.0
_SAMPLING = {
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@dataclass(frozen=True)
class Timed:
    """One answer: when its call was made, its first token came and its last one, in seconds of
    `perf_counter`, and its `usage`."""

    called_s: float
    first_token_s: float
    end_s: float
    usage: dict[str, Any]

    @property
    def cached_tokens(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


class LoadClient:
    """The calls of `MeasuredClient`, one by one and without a client for each stream."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=_TIMEOUT_S,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> LoadClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._http.__aexit__(*details)

    async def flush(self) -> None:
        """Empties the cache. Raises EngineFailure if streams or requests are in the way."""
        await empty_caches(self._http)

    async def open(self, mode: str, opening: Sequence[int]) -> str:
        body = {"mode": mode, "input_ids": opening, "idle_timeout_s": _IDLE_TIMEOUT_S}
        return str((await self._call("POST", "/v1/streams", body))["id"])

    async def append(self, stream_id: str, seq: int, ids: Sequence[int]) -> None:
        await self._call("POST", f"/v1/streams/{stream_id}/chunks", {"seq": seq, "input_ids": ids})

    async def update(self, stream_id: str, seq: int, ids: Sequence[int]) -> None:
        await self._call("PUT", f"/v1/streams/{stream_id}/context", {"seq": seq, "input_ids": ids})

    async def generate(
        self,
        stream_id: str,
        last_seq: int,
        question: Sequence[int],
        max_tokens: int,
        last: Sequence[int] | None = None,
    ) -> Timed:
        """Seals a stream and reads its answer; `last`: the ids of its last call, if it goes along,
        as in the SDK."""
        body: dict[str, Any] = {
            "last_seq": last_seq,
            "input_ids": question,
            "max_tokens": max_tokens,
        }
        if last is not None:
            body["last"] = {"seq": last_seq, "input_ids": last}
        return await self._answer(f"/v1/streams/{stream_id}/generate", body)

    async def plain(self, prompt: Sequence[int], max_tokens: int) -> Timed:
        """One ordinary request."""
        body = {"model": "default", "prompt": prompt, "max_tokens": max_tokens}
        return await self._answer("/v1/completions", body)

    async def _call(self, method: str, path: str, body: Any) -> dict[str, Any]:
        response = await self._http.request(method, path, json=body)
        if response.status_code >= 300:
            raise from_fields({"message": f"{path}: {response.text}"}, status=response.status_code)
        return dict(response.json())

    async def _answer(self, path: str, body: dict[str, Any]) -> Timed:
        called = time.perf_counter()
        first = 0.0
        usage: dict[str, Any] = {}
        async with self._http.stream("POST", path, json=body | _SAMPLING) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise from_fields({"message": f"{path}: {text}"}, status=response.status_code)
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise from_fields(event["error"])
                if event["choices"] and not first:
                    first = time.perf_counter()
                usage = event.get("usage") or usage
        if not first:
            raise EngineFailure(f"{path}: an answer without a token")
        return Timed(called, first, time.perf_counter(), usage)

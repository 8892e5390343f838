"""A server with the calls that a load makes and no engine: it counts tokens and answers at once.

`refuse`, `dies_at` and `on_answer` make it misbehave at the answer of that number (from 1). Answers
after the number `alone` wait until the one of number `together` is asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

_COUNTER = "sglang_stream_passes_total"
_DEAD = {"error": {"message": "no worker", "code": "worker_unavailable"}}
_REFUSED = {"error": {"message": "too long", "code": "context_length_exceeded"}}


@dataclass
class FakeServer:
    url: str = ""
    dies_at: int | None = None
    refuse: set[int] = field(default_factory=set)
    alone: int = 0
    together: int = 0
    on_answer: Callable[[int], None] = lambda number: None
    has_streams: bool = True
    policy: str | None = None
    dead: bool = False
    asked: int = 0
    flushed: int = 0
    opened: int = 0
    calls: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    _together: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> Starlette:
        one = "/v1/streams/{id}"
        calls: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", "/readiness", self._ready),
            ("GET", "/workers", self._workers),
            ("GET", "/metrics", self._metrics),
            ("POST", "/flush_cache", self._flush),
            ("GET", "/v1/models", self._models),
            ("POST", "/v1/completions", self._complete),
            ("GET", "/v1/streams", self._list),
            ("POST", "/v1/streams", self._open),
            ("POST", f"{one}/chunks", self._append),
            ("PUT", f"{one}/context", self._update),
            ("POST", f"{one}/generate", self._generate),
            ("DELETE", one, self._abort),
        ]
        return Starlette(
            routes=[Route(path, self._alive(act), methods=[how]) for how, path, act in calls]
        )

    def _alive(self, act: Callable[..., Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            if self.dead:
                return JSONResponse(_DEAD, 503)
            raw = await request.body()
            answer: Response = await act(
                request.path_params.get("id", ""), json.loads(raw) if raw else {}
            )
            return answer

        return handle

    async def _ready(self, _: str, body: Any) -> Response:
        return JSONResponse({"status": "ready"})

    async def _workers(self, _: str, body: Any) -> Response:
        return JSONResponse({"workers": [{"url": self.url}]})

    async def _metrics(self, _: str, body: Any) -> Response:
        label = f'{{policy="{self.policy}"}}' if self.policy else ""
        return PlainTextResponse(f"# TYPE {_COUNTER} counter\n{_COUNTER}{label} {self.calls}\n")

    async def _models(self, _: str, body: Any) -> Response:
        return JSONResponse({"data": [{"id": "fake"}]})

    async def _flush(self, _: str, body: Any) -> Response:
        self.flushed += 1
        return PlainTextResponse("flushed")

    async def _complete(self, _: str, body: Any) -> Response:
        return await self._answered(body["prompt"], body["max_tokens"], None)

    async def _list(self, _: str, body: Any) -> Response:
        return JSONResponse({"data": list(self.streams)})

    async def _open(self, _: str, body: Any) -> Response:
        if not self.has_streams:
            return JSONResponse({"detail": "Not Found"}, 404)
        self.opened += 1
        name = f"st-{self.opened}"
        self.streams[name] = {
            "mode": body["mode"],
            "opening": body["input_ids"],
            "context": [],
            "chunks": 0,
        }
        return JSONResponse({"id": name}, 201)

    async def _append(self, name: str, body: Any) -> Response:
        self._take(name, body)
        return JSONResponse({"seq": body["seq"], "tokens": 0}, 202)

    async def _update(self, name: str, body: Any) -> Response:
        self._take(name, body)
        return JSONResponse({"seq": body["seq"], "tokens": 0, "lcp": 0}, 202)

    def _take(self, name: str, body: Any) -> None:
        stream = self.streams[name]
        self.calls += 1
        stream["chunks"] += 1
        before = stream["context"] if stream["mode"] == "append" else []
        stream["context"] = before + body["input_ids"]

    async def _generate(self, name: str, body: Any) -> Response:
        if "last" in body:
            self._take(name, body["last"])
        stream = self.streams.pop(name)
        prompt = [*stream["opening"], *stream["context"], *body["input_ids"]]
        usage = {"chunks": stream["chunks"], "ready_tokens": len(stream["context"])}
        return await self._answered(prompt, body["max_tokens"], usage)

    async def _abort(self, name: str, body: Any) -> Response:
        self.streams.pop(name, None)
        return JSONResponse({"id": name})

    async def _answered(self, prompt: list[int], count: int, usage: Any) -> Response:
        self.asked += 1
        number = self.asked
        self.prompts.append(prompt)
        self.on_answer(number)
        if self.dies_at is not None and number >= self.dies_at:
            self.dead = True
            return JSONResponse(_DEAD, 503)
        if number in self.refuse:
            return JSONResponse(_REFUSED, 400)
        if number >= self.together:
            self._together.set()
        elif number > self.alone:
            await self._together.wait()
        return StreamingResponse(_events(len(prompt), count, usage), media_type="text/event-stream")


async def _events(tokens: int, count: int, stream: Any) -> AsyncIterator[str]:
    for i in range(count):
        choice = {"index": 0, "text": "", "token_ids": [i], "finish_reason": None}
        yield f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n"
    usage = {
        "prompt_tokens": tokens,
        "completion_tokens": count,
        "prompt_tokens_details": {"cached_tokens": 0},
    } | ({"stream": stream} if stream else {})
    yield f"data: {json.dumps({'object': 'text_completion', 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"

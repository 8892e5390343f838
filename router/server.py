"""The router's HTTP server: routes to thin handlers, and how it starts and stops."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import FastAPI, Query, Request, Response

from router.answers import GenerationAnswer
from router.errors_http import install_error_handlers, json_response
from router.metrics import RequestCounter, RouterMetrics
from router.openai_format import AnswerFormat
from router.openapi import describe
from router.proxy import ForwardedAnswer, read_body
from router.schemas import B, ChunksBody, ContextBody, GenerateBody, OpenBody, parse
from router.service import StreamService
from sglang_stream.config import RouterConfig
from sglang_stream.errors import StreamError, WorkerUnavailable

DRAIN_S = 30
"""How long answers that are being written may take to end when the router is stopped."""

KEEP_ALIVE_S = 130
"""How long an idle connection is kept: a retriever may be silent between two chunks."""


class RouterHandlers:
    """The handlers of one router. Stream calls raise `StreamError`, answered by `errors_http`."""

    def __init__(
        self,
        config: RouterConfig,
        service: StreamService,
        http: httpx.AsyncClient,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._service = service
        self._http = http
        self._metrics = metrics

    def add_to(self, app: FastAPI) -> None:
        """Registers all routes."""
        stream = "/v1/streams/{stream_id}"
        app.add_api_route("/v1/streams", self.open, methods=["POST"])
        app.add_api_route("/v1/streams", self.list_open, methods=["GET"])
        app.add_api_route(stream, self.look, methods=["GET"])
        app.add_api_route(stream, self.delete, methods=["DELETE"])
        app.add_api_route(f"{stream}/chunks", self.append, methods=["POST"])
        app.add_api_route(f"{stream}/context", self.update, methods=["PUT"])
        app.add_api_route(f"{stream}/generate", self.generate, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.forward, methods=["POST"])
        app.add_api_route("/v1/completions", self.forward, methods=["POST"])
        app.add_api_route("/v1/models", self.forward, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.forward, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/readiness", self.readiness, methods=["GET"])
        app.add_api_route("/workers", self.workers, methods=["GET"])
        app.add_api_route("/flush_cache", self.flush_cache, methods=["GET", "POST"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])

    async def open(self, request: Request) -> Response:
        stream = await self._service.open(await self._body(request, OpenBody))
        return json_response(stream.described(), 201)

    async def list_open(self) -> Response:
        data = [stream.described() for stream in self._service.streams.open()]
        return json_response({"object": "list", "data": data})

    async def look(self, stream_id: str) -> Response:
        return json_response((await self._service.refresh(stream_id)).described())

    async def delete(self, stream_id: str) -> Response:
        await self._service.delete(stream_id)
        return json_response({"id": stream_id, "object": "stream", "deleted": True})

    async def append(self, stream_id: str, request: Request) -> Response:
        body = await self._body(request, ChunksBody)
        answer = await self._service.append(stream_id, body)
        return json_response({"seq": answer.seq, "tokens": answer.tokens}, 202)

    async def update(self, stream_id: str, request: Request) -> Response:
        body = await self._body(request, ContextBody)
        answer = await self._service.update(stream_id, body)
        fields = {"seq": answer.seq, "tokens": answer.tokens, "lcp": answer.lcp}
        return json_response(fields, 202)

    async def generate(self, stream_id: str, request: Request) -> Response:
        arrived_s = time.perf_counter()
        body = await self._body(request, GenerateBody)
        stream, generation, tail = await self._service.generate(stream_id, body, arrived_s)
        chat = stream.opening.kind == "chat"
        with_ids = bool(body.return_token_ids)
        form = AnswerFormat(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{stream.id.removeprefix('st-')}",
            created=stream.created,
            model=stream.model,
            chat=chat,
            with_ids=with_ids,
            prompt_ids=stream.prompt(tail) if with_ids else None,
        )
        options = body.stream_options
        return GenerationAnswer(
            generation,
            form,
            stream=bool(body.stream),
            include_usage=bool(options and options.include_usage),
        )

    async def forward(self, request: Request) -> Response:
        body = await read_body(request, self._config.max_body_bytes)
        return ForwardedAnswer(self._http, self._service.worker.url, request, body)

    async def health(self) -> Response:
        return Response()

    async def readiness(self) -> Response:
        self._service.worker.check_ready()
        return json_response({"status": "ready"})

    async def workers(self) -> Response:
        worker: dict[str, Any] = {"url": self._service.worker.url, "role": "unified"}
        try:
            self._service.worker.check_ready()
            worker |= {"healthy": True, "model": self._service.worker.info.model}
        except StreamError as e:
            worker |= {"healthy": False, "reason": e.message}
        return json_response({"workers": [worker], "total": 1})

    async def flush_cache(
        self, request: Request, timeout: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0
    ) -> Response:
        """Empties the prefix cache of every worker, whose option `timeout` (seconds) is."""
        worker = self._service.worker
        failure = await worker.flush_cache(request.url.query)
        flushed = {"url": worker.url, "flushed": failure is None, "reason": failure}
        if failure is None:
            return json_response({"workers": [flushed]})
        error = WorkerUnavailable(f"not flushed: {worker.url} ({failure})")
        return json_response({"error": error.to_fields(), "workers": [flushed]}, error.status)

    async def metrics(self) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def _body(self, request: Request, model: type[B]) -> B:
        return parse(model, await read_body(request, self._config.max_body_bytes))


def create_app(config: RouterConfig) -> FastAPI:
    """The router as an ASGI application; its lifespan finds the worker and watches it."""
    http = httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=5.0),
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0
        ),
        trust_env=False,
    )
    metrics = RouterMetrics()
    service = StreamService(config, http, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.run())
        async with http:
            try:
                yield
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running

    app = FastAPI(lifespan=lifespan, redoc_url=None)
    install_error_handlers(app)
    RouterHandlers(config, service, http, metrics).add_to(app)
    describe(app)
    app.add_middleware(RequestCounter, metrics=metrics)
    return app


def run(config: RouterConfig) -> None:
    """Serves until SIGINT or SIGTERM, then lets running answers end for up to DRAIN_S seconds."""
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(config),
            host=config.host,
            port=config.port,
            access_log=False,
            timeout_graceful_shutdown=DRAIN_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )
    with _signals_end_quietly():
        server.run()


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done; here that is the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

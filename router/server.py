"""The router's HTTP server: routes to thin handlers, and how it starts and stops."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import httpx
import uvicorn
from fastapi import FastAPI, Query, Request, Response

from router.admission import Admission
from router.answers import AdmittedAnswer, GenerationAnswer
from router.auth import ApiKeys, Caller
from router.cluster import described
from router.errors_http import install_error_handlers, json_response
from router.generation import Generation
from router.logs import configure, log_context
from router.metrics import RequestCounter, RouterMetrics
from router.openai_format import AnswerFormat
from router.openapi import describe
from router.proxy import ForwardedAnswer, Route, check_object, read_body
from router.schemas import (
    B,
    ChunksBody,
    ContextBody,
    GenerateBody,
    OpenBody,
    WorkerBody,
    parse,
)
from router.service import StreamService
from router.streams import Stream
from router.worker import Worker
from sglang_stream.config import RouterConfig, WorkerAddress
from sglang_stream.errors import InvalidRequest, WorkerUnavailable

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
        self._keys = _read_keys(config)
        self._admission = Admission(
            config.max_concurrent_requests, config.queue_size, config.queue_timeout_secs
        )
        metrics.watch_queue(lambda: self._admission.waiting)

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
        app.add_api_route("/workers", self.add_worker, methods=["POST"])
        app.add_api_route("/workers/{worker_id}", self.remove_worker, methods=["DELETE"])
        app.add_api_route("/flush_cache", self.flush_cache, methods=["GET", "POST"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])

    async def open(self, request: Request) -> Response:
        caller = self._caller(request)
        stream = await self._service.open(await self._body(request, OpenBody), caller)
        return json_response(stream.described(), 201)

    async def list_open(self, request: Request) -> Response:
        streams = await self._service.open_of(self._caller(request))
        return json_response({"object": "list", "data": [s.described() for s in streams]})

    async def look(self, stream_id: str, request: Request) -> Response:
        caller = self._caller(request)
        with log_context(stream_id=stream_id):
            stream = await self._service.refresh(stream_id, caller)
        return json_response(stream.described(with_worker=caller.admin))

    async def delete(self, stream_id: str, request: Request) -> Response:
        caller = self._caller(request)
        with log_context(stream_id=stream_id):
            await self._service.delete(stream_id, caller)
        return json_response({"id": stream_id, "object": "stream", "deleted": True})

    async def append(self, stream_id: str, request: Request) -> Response:
        caller = self._caller(request)
        body = await self._body(request, ChunksBody)
        with log_context(stream_id=stream_id):
            answer = await self._service.chunks.append(stream_id, body, caller)
        return json_response({"seq": answer.seq, "tokens": answer.tokens}, 202)

    async def update(self, stream_id: str, request: Request) -> Response:
        caller = self._caller(request)
        body = await self._body(request, ContextBody)
        with log_context(stream_id=stream_id):
            answer = await self._service.chunks.update(stream_id, body, caller)
        fields = {"seq": answer.seq, "tokens": answer.tokens, "lcp": answer.lcp}
        return json_response(fields, 202)

    async def generate(self, stream_id: str, request: Request) -> Response:
        arrived_s = time.perf_counter()
        caller = self._caller(request)
        body = await self._body(request, GenerateBody)

        async def make() -> Response:
            with log_context(stream_id=stream_id):
                stream, generation = await self._service.generate(
                    stream_id, body, caller, arrived_s
                )
            return _generation_answer(stream, generation, body)

        return AdmittedAnswer(self._admission, make)

    async def forward(self, request: Request) -> Response:
        caller = self._caller(request)
        body = await read_body(request, self._config.max_body_bytes)
        if request.method == "POST":
            check_object(body)
        service = self._service

        async def place(failed: set[Worker]) -> Route:
            worker, prefill = await service.cluster.place_request(failed)
            return Route(worker, prefill if request.method == "POST" else None)

        answer = ForwardedAnswer(
            self._http,
            request,
            body,
            place=place,
            alone=lambda: service.cluster.is_single,
            namespace=caller.namespace if request.method == "POST" else None,
            retries=service.retries,
            budget=service.budget,
            timeout_s=self._config.request_timeout_secs,
        )
        if request.method == "GET":
            return answer

        async def make() -> Response:
            return answer

        return AdmittedAnswer(self._admission, make)

    async def health(self) -> Response:
        return Response()

    async def readiness(self) -> Response:
        self._service.cluster.check_ready()
        return json_response({"status": "ready"})

    async def workers(self, request: Request) -> Response:
        self._caller(request).require_admin()
        cluster = self._service.cluster
        data = [described(w) for w in cluster.workers.values()]
        return json_response({"workers": data, "total": len(data)})

    async def add_worker(self, request: Request) -> Response:
        self._caller(request).require_admin()
        body = await self._body(request, WorkerBody)
        address = WorkerAddress(body.url, body.role, body.bootstrap_port)
        worker = self._service.cluster.add(address)
        return json_response(described(worker), 202)

    async def remove_worker(self, worker_id: str, request: Request) -> Response:
        self._caller(request).require_admin()
        return json_response(described(self._service.draining.begin(worker_id)), 202)

    async def flush_cache(
        self, request: Request, timeout: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0
    ) -> Response:
        """Empties the prefix cache of every worker, whose option `timeout` (seconds) is."""
        self._caller(request).require_admin()
        workers = list(self._service.cluster.workers.values())
        failures = await asyncio.gather(*(w.flush_cache(request.url.query) for w in workers))
        flushed = [
            {"url": worker.url, "flushed": failure is None, "reason": failure}
            for worker, failure in zip(workers, failures, strict=True)
        ]
        failed = [f"{f['url']} ({f['reason']})" for f in flushed if not f["flushed"]]
        if not failed:
            return json_response({"workers": flushed})
        error = WorkerUnavailable(f"not flushed: {', '.join(failed)}")
        return json_response({"error": error.to_fields(), "workers": flushed}, error.status)

    async def metrics(self) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    def _caller(self, request: Request) -> Caller:
        return self._keys.identify(request.headers.get("authorization"))

    async def _body(self, request: Request, model: type[B]) -> B:
        return parse(model, await read_body(request, self._config.max_body_bytes))


def _generation_answer(
    stream: Stream, generation: Generation, body: GenerateBody
) -> GenerationAnswer:
    chat = stream.opening.kind == "chat"
    with_ids = bool(body.return_token_ids)
    form = AnswerFormat(
        id=f"{'chatcmpl' if chat else 'cmpl'}-{stream.id.removeprefix('st-')}",
        created=stream.created,
        model=stream.model,
        chat=chat,
        with_ids=with_ids,
        prompt_ids=stream.prompt() if with_ids else None,
    )
    options = body.stream_options
    return GenerationAnswer(
        generation,
        form,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
    )


def _read_keys(config: RouterConfig) -> ApiKeys:
    """Raises InvalidRequest that names the file and the line at fault."""
    path = config.api_key_file
    try:
        lines = None if path is None else Path(path).read_text(encoding="utf-8").splitlines()
        return ApiKeys.from_lines(
            lines, config.admin_api_key or None, share_prefixes=config.share_prefixes
        )
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"--api-key-file {path} cannot be read: {e}") from e
    except InvalidRequest as e:
        raise InvalidRequest(f"--api-key-file {path}: {e.message}") from e


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
    configure(config.log_level, config.log_json)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(config),
            log_config=None,
            host=config.host,
            port=config.port,
            access_log=False,
            proxy_headers=False,
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
